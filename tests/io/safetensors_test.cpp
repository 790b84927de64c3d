// Reading and writing safetensors: what is written comes back bit for bit and equals what the reference
// implementation writes; whatever is malformed is refused with a sentence that names the file, the tensor and
// what was expected; no byte outside the file is read (run with the sanitize preset to see that).
#include "kvplane/io/safetensors.hpp"

#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>

#include "test_support.hpp"

namespace {

using kvplane::DType;
using kvplane::ErrorCode;
using kvplane::Index;
using kvplane::RowMajorMatrix;
using kvplane::SafetensorsFile;
using kvplane::SafetensorsWriter;
using kvplane_test::refusal;
using Bytes = std::vector<std::byte>;

// -- Helpers ----------------------------------------------------------------------------------------------

Bytes bytes_of_text(const std::string& text) {
    const auto bytes = std::as_bytes(std::span(text));
    return {bytes.begin(), bytes.end()};
}

std::string little_endian(std::uint64_t number) {
    std::string text;
    for (int shift = 0; shift < 64; shift += 8) text += static_cast<char>(number >> shift & 0xFF);
    return text;
}

/// A file with this header, as it stands, and `data_bytes` bytes of data: 1, 2, 3, ...
Bytes file_of(const std::string& header, std::size_t data_bytes) {
    std::string text = little_endian(header.size()) + header;
    for (std::size_t i = 0; i < data_bytes; ++i) text += static_cast<char>(i + 1);
    return bytes_of_text(text);
}

/// An object with these members.
std::string object(const std::string& members) {
    std::string text = "{";
    return text.append(members).append("}");
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
    return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
           ",\"data_offsets\":" + offsets + "}";
}

/// Checks that a sentence says all of this.
void expect_said(const std::string& sentence, const std::vector<std::string>& parts) {
    for (const std::string& part : parts) EXPECT_NE(sentence.find(part), std::string::npos) << sentence;
    EXPECT_LT(sentence.size(), 600U) << "a sentence, not the file";
}

template <class Scalar>
std::span<const std::byte> stored(const std::vector<Scalar>& elements) {
    return std::as_bytes(std::span(elements));
}

bool same_bytes(std::span<const std::byte> a, std::span<const std::byte> b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

template <class Scalar>
std::size_t count_nan(const SafetensorsFile& file, const std::string& name) {
    return static_cast<std::size_t>(
        file.matrix<Scalar>(name, 1, file.info(name).size()).array().isNaN().count());
}

/// Reads every byte of every tensor, as bytes and as elements, so that a sanitizer sees a view that is wrong.
std::size_t touch_all(const SafetensorsFile& file) {
    std::size_t sum = 0;
    for (const std::string& name : file.names()) {
        for (const std::byte byte : file.bytes(name)) sum += static_cast<std::size_t>(byte);
        const auto [dtype, shape, begin, end] = file.info(name);
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(file.bytes(name).data()) % bytes_of(dtype), 0U);
        EXPECT_EQ(file.bytes(name).size(), end - begin);
        EXPECT_EQ(file.info(name).size(),
                  std::accumulate(shape.begin(), shape.end(), Index{1}, std::multiplies<>()));
        if (dtype == DType::float64) sum += count_nan<double>(file, name);
        if (dtype == DType::float32) sum += count_nan<float>(file, name);
    }
    return sum;
}

/// A folder of its own for each test, gone after it.
class SafetensorsFolder : public testing::Test {
  protected:
    void SetUp() override {
        std::string pattern = (std::filesystem::temp_directory_path() / "kvplane-XXXXXX").string();
        ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
        folder_ = pattern;
    }
    void TearDown() override { std::filesystem::remove_all(folder_); }

    std::filesystem::path path(const std::string& name) const { return folder_ / name; }

    std::filesystem::path write(const std::string& name, const Bytes& bytes) const {
        std::ofstream out(path(name), std::ios::binary);
        out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        return path(name);
    }

    Bytes read(const std::string& name) const {
        std::ifstream in(path(name), std::ios::binary);
        return bytes_of_text(std::string(std::istreambuf_iterator<char>(in), {}));
    }

    std::size_t files() const {
        return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(folder_), {}));
    }

    std::filesystem::path folder_;
};

// -- Round trips ------------------------------------------------------------------------------------------

template <class Scalar>
class EveryDType : public testing::Test {};
using Scalars = testing::Types<float, Eigen::half, Eigen::bfloat16, double, std::int8_t, std::uint8_t,
                               std::int32_t, std::int64_t>;
TYPED_TEST_SUITE(EveryDType, Scalars);

/// Elements with all kinds of bits, NaN and infinity among them.
template <class Scalar>
std::vector<Scalar> any_bits(std::size_t count) {
    std::mt19937_64 random(kvplane_test::seed());
    std::vector<Scalar> elements(count);
    for (Scalar& element : elements) {
        const std::uint64_t bits = random();
        std::memcpy(static_cast<void*>(&element), &bits, sizeof(Scalar));
    }
    return elements;
}

TYPED_TEST(EveryDType, ComesBackBitForBit) {
    const std::vector<TypeParam> elements = any_bits<TypeParam>(7 * 3 * 5);
    SafetensorsWriter writer;
    writer.add("rank 3", {7, 3, 5}, kvplane::dtype_of<TypeParam>, stored(elements));
    writer.add("odd neighbour", {3}, DType::uint8, stored(std::vector<std::uint8_t>{1, 2, 3}));
    const Bytes bytes = writer.to_bytes();
    const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);

    EXPECT_EQ(file.info("rank 3").dtype, kvplane::dtype_of<TypeParam>);
    EXPECT_EQ(file.info("rank 3").shape, (std::vector<Index>{7, 3, 5}));
    EXPECT_EQ(file.info("rank 3").size(), 105);
    EXPECT_TRUE(same_bytes(file.bytes("rank 3"), stored(elements)));

    const auto tensor = file.tensor<TypeParam, 3>("rank 3");
    const auto matrix = file.matrix<TypeParam>("rank 3");
    const auto other_shape = file.matrix<TypeParam>("rank 3", 5, 21);
    ASSERT_EQ(matrix.rows(), 7);
    ASSERT_EQ(matrix.cols(), 15);
    ASSERT_EQ(tensor.dimension(0), 7);
    ASSERT_EQ(tensor.dimension(1), 3);
    ASSERT_EQ(tensor.dimension(2), 5);
    for (Index i = 0; i < 105; ++i) {
        const auto same = [&](const TypeParam& element) {
            return std::memcmp(&element, &elements[static_cast<std::size_t>(i)], sizeof(TypeParam)) == 0;
        };
        EXPECT_TRUE(same(tensor(i / 15, i / 5 % 3, i % 5))) << i;
        EXPECT_TRUE(same(matrix(i / 15, i % 15))) << i;
        EXPECT_TRUE(same(other_shape(i / 21, i % 21))) << i;
    }
}

TYPED_TEST(EveryDType, IsAddedFromEveryEigenObject) {
    using Column = Eigen::Matrix<TypeParam, Eigen::Dynamic, Eigen::Dynamic>;
    RowMajorMatrix<TypeParam> rows(3, 8);
    for (Index i = 0; i < rows.size(); ++i)
        rows(i / 8, i % 8) = static_cast<TypeParam>(static_cast<int>(i) - 7);
    const Column columns = rows;
    Eigen::Tensor<TypeParam, 3> tensor_columns(3, 2, 4);
    Eigen::Tensor<TypeParam, 3, Eigen::RowMajor> tensor_rows(3, 2, 4);
    for (Index i = 0; i < rows.size(); ++i)
        tensor_columns(i / 8, i / 4 % 2, i % 4) = tensor_rows(i / 8, i / 4 % 2, i % 4) = rows(i / 8, i % 8);

    SafetensorsWriter writer;
    writer.add("rows", rows);
    writer.add("columns", columns);
    writer.add("array", columns.array());
    writer.add("expression", columns.transpose().transpose().rowwise().reverse().rowwise().reverse());
    writer.add("middle columns", columns.middleCols(2, 3));
    writer.add("vector", columns.col(1));
    writer.add("rank 3 matrix", columns, {3, 2, 4});
    writer.add("rank 3 columns", tensor_columns);
    writer.add("rank 3 rows", tensor_rows);
    writer.add("rank 3 map", Eigen::TensorMap<Eigen::Tensor<TypeParam, 3>>(tensor_columns.data(), 3, 2, 4));
    writer.add("rank 3 sum", tensor_columns + tensor_columns);
    const Bytes bytes = writer.to_bytes();
    const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);

    for (const char* name : {"rows", "columns", "array", "expression"}) {
        EXPECT_EQ(file.info(name).shape, (std::vector<Index>{3, 8})) << name;
        EXPECT_TRUE(file.matrix<TypeParam>(name) == rows) << name;
    }
    for (const char* name : {"rank 3 matrix", "rank 3 columns", "rank 3 rows", "rank 3 map"}) {
        EXPECT_EQ(file.info(name).shape, (std::vector<Index>{3, 2, 4})) << name;
        EXPECT_TRUE(file.matrix<TypeParam>(name) == rows) << name;
    }
    EXPECT_EQ(file.info("vector").shape, std::vector<Index>{3});
    EXPECT_TRUE(file.matrix<TypeParam>("vector", 3, 1) == rows.col(1));
    EXPECT_TRUE(file.matrix<TypeParam>("middle columns") == rows.middleCols(2, 3));
    EXPECT_TRUE(file.matrix<TypeParam>("rank 3 sum") == rows + rows);
}

TYPED_TEST(EveryDType, MayBeEmptyOrASingleNumber) {
    const TypeParam number = static_cast<TypeParam>(42);
    Eigen::Tensor<TypeParam, 0> single;
    single() = number;
    SafetensorsWriter writer;
    writer.add("single", single);
    writer.add("no tokens", RowMajorMatrix<TypeParam>(0, 4));
    writer.add("no channels", RowMajorMatrix<TypeParam>(4, 0));
    writer.add("nothing", {0}, kvplane::dtype_of<TypeParam>, {});
    writer.add("no heads", Eigen::Tensor<TypeParam, 3>(2, 0, 5));
    const Bytes bytes = writer.to_bytes();
    const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);

    EXPECT_TRUE(file.info("single").shape.empty());
    EXPECT_EQ(file.info("single").size(), 1);
    EXPECT_EQ((file.tensor<TypeParam, 0>("single")()), number);
    EXPECT_EQ((file.matrix<TypeParam>("single", 1, 1)(0, 0)), number);
    EXPECT_EQ(file.matrix<TypeParam>("no tokens").rows(), 0);
    EXPECT_EQ(file.matrix<TypeParam>("no tokens").cols(), 4);
    EXPECT_EQ(file.matrix<TypeParam>("no channels").rows(), 4);
    EXPECT_EQ(file.matrix<TypeParam>("no channels").cols(), 0);
    EXPECT_EQ(file.matrix<TypeParam>("no heads").rows(), 2);
    EXPECT_EQ(file.matrix<TypeParam>("no heads").cols(), 0);
    EXPECT_EQ((file.tensor<TypeParam, 3>("no heads").dimension(2)), 5);
    EXPECT_TRUE(file.bytes("nothing").empty());
}

TEST(Safetensors, NamesOfDTypesAndTheirSizes) {
    const std::vector<std::tuple<DType, std::string, std::size_t>> expected{
        {DType::float32, "F32", 4}, {DType::float16, "F16", 2}, {DType::bfloat16, "BF16", 2},
        {DType::float64, "F64", 8}, {DType::int8, "I8", 1},     {DType::uint8, "U8", 1},
        {DType::int32, "I32", 4},   {DType::int64, "I64", 8}};
    for (const auto& [dtype, text, size] : expected) {
        EXPECT_EQ(name(dtype), text);
        EXPECT_EQ(bytes_of(dtype), size);
        const Bytes bytes =
            file_of(object(entry("t", text, "[1]", "[0," + std::to_string(size) + "]")), size);
        EXPECT_EQ(SafetensorsFile::from_bytes(bytes).info("t").dtype, dtype);
    }
}

TEST(Safetensors, AFileWithoutTensors) {
    const Bytes bytes = SafetensorsWriter().to_bytes();
    EXPECT_EQ(bytes, file_of("{}      ", 0));
    const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);
    EXPECT_TRUE(file.names().empty());
    EXPECT_TRUE(file.metadata().empty());
    expect_said(refusal(ErrorCode::index, [&] { file.bytes("keys"); }),
                {"memory", "no tensor 'keys'", "0 tensors"});
}

TEST(Safetensors, NamesAndMetadataAreAnyText) {
    const std::vector<std::string> texts{"",
                                         "层.0.键",
                                         "\xF0\x9F\x97\x9D",
                                         "quote \" backslash \\ slash /",
                                         "\n\t\r\b",
                                         std::string("nul \0 inside", 12),
                                         "caf\xC3\xA9",
                                         "\x7F"};
    SafetensorsWriter writer;
    for (const std::string& text : texts) {
        writer.add(text, {1}, DType::uint8,
                   stored(std::vector<std::uint8_t>{static_cast<std::uint8_t>(text.size())}));
        writer.metadata(text, text + text);
    }
    writer.metadata("__metadata__", "a key like any other");
    const Bytes bytes = writer.to_bytes();
    const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);
    EXPECT_EQ(file.names().size(), texts.size());
    EXPECT_EQ(file.metadata().size(), texts.size() + 1);
    for (const std::string& text : texts) {
        ASSERT_TRUE(file.contains(text)) << text;
        EXPECT_EQ(static_cast<std::size_t>(file.bytes(text)[0]), text.size());
        EXPECT_EQ(file.metadata().find(text)->second, text + text);
    }
}

// -- The reference implementation -------------------------------------------------------------------------

/// What Python's safetensors 0.8.0 writes for the tensors of reference_writer(), byte for byte.
Bytes reference_file() {
    const std::string header =
        R"({"__metadata__":{"model":"a \"b\""},"d":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
        R"("f":{"dtype":"F64","shape":[],"data_offsets":[8,16]},"b":{"dtype":"F32","shape":[2],"data_offsets":[16,24]},)"
        R"("e":{"dtype":"I32","shape":[2,0],"data_offsets":[24,24]},"a":{"dtype":"F16","shape":[1,2],"data_offsets":[24,28]},)"
        R"("g":{"dtype":"I8","shape":[1],"data_offsets":[28,29]},)"
        "\"h\\n\\\"\xC3\xA9\xE5\xB1\xA4\\u0001\":"
        R"({"dtype":"I8","shape":[1],"data_offsets":[29,30]},"c":{"dtype":"U8","shape":[3],"data_offsets":[30,33]}})";
    const std::string data(
        "\xfd\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00\x00\x00\x04\xc0\x00\x00\xc0\x3f\x00\x00\x00\xc0\x00"
        "\x34"
        "\xff\x7b\x80\x07\x01\x02\xff",
        33);
    const std::string padding((8 - header.size() % 8) % 8, ' ');
    return bytes_of_text(little_endian(488) + header + padding + data);
}

const std::string last_name = "h\n\"\xC3\xA9\xE5\xB1\xA4\x01";

/// The same tensors; `backwards` adds them in the other order.
SafetensorsWriter reference_writer(bool backwards) {
    using Add = std::function<void(SafetensorsWriter&)>;
    std::vector<Add> steps{
        [](auto& w) {
            w.add("a", RowMajorMatrix<Eigen::half>{{Eigen::half(0.25F), Eigen::half(65504.0F)}});
        },
        [](auto& w) { w.add("b", Eigen::Vector2f(1.5F, -2)); },
        [](auto& w) { w.add("c", Eigen::Vector<std::uint8_t, 3>(1, 2, 255)); },
        [](auto& w) { w.add("d", {1}, DType::int64, stored(std::vector<std::int64_t>{-3})); },
        [](auto& w) { w.add("e", RowMajorMatrix<std::int32_t>(2, 0)); },
        [](auto& w) { w.add("f", {}, DType::float64, stored(std::vector<double>{-2.5})); },
        [](auto& w) { w.add("g", {1}, DType::int8, stored(std::vector<std::int8_t>{-128})); },
        [](auto& w) { w.add(last_name, {1}, DType::int8, stored(std::vector<std::int8_t>{7})); },
        [](auto& w) { w.metadata("model", "a \"b\""); }};
    if (backwards) std::reverse(steps.begin(), steps.end());
    SafetensorsWriter writer;
    for (const Add& add : steps) add(writer);
    return writer;
}

TEST(Safetensors, WritesTheBytesOfTheReferenceImplementation) {
    EXPECT_TRUE(reference_writer(false).to_bytes() == reference_file());
    EXPECT_TRUE(reference_writer(true).to_bytes() == reference_file())
        << "the order of add() must not matter";
}

TEST(Safetensors, ReadsTheBytesOfTheReferenceImplementation) {
    const Bytes bytes = reference_file();
    const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);
    EXPECT_EQ(file.names(), (std::vector<std::string>{"a", "b", "c", "d", "e", "f", "g", last_name}));
    EXPECT_EQ(file.metadata().at("model"), "a \"b\"");
    EXPECT_EQ(static_cast<float>(file.matrix<Eigen::half>("a")(0, 1)), 65504.0F);
    EXPECT_EQ((file.tensor<float, 1>("b")(1)), -2.0F);
    EXPECT_EQ((file.tensor<std::uint8_t, 1>("c")(2)), 255);
    EXPECT_EQ((file.tensor<std::int64_t, 1>("d")(0)), -3);
    EXPECT_EQ((file.tensor<double, 0>("f")()), -2.5);
    EXPECT_EQ((file.tensor<std::int8_t, 1>("g")(0)), -128);
}

TEST(Safetensors, HeaderIsPaddedToEightBytes) {
    for (std::size_t letters = 0; letters < 20; ++letters) {
        SafetensorsWriter writer;
        writer.metadata("key", std::string(letters, 'x'));
        const Bytes bytes = writer.to_bytes();
        std::uint64_t length = 0;
        std::memcpy(&length, bytes.data(), 8);
        EXPECT_EQ(length % 8, 0U);
        EXPECT_EQ(bytes.size(), length + 8);
        EXPECT_LT(length, std::string(R"({"__metadata__":{"key":""}})").size() + letters + 8);
        EXPECT_EQ(bytes[8], std::byte{'{'});
    }
}

// -- Real tensors -----------------------------------------------------------------------------------------

/// Expected numbers: computed from the file with Python's struct and math.fsum.
TEST(Safetensors, ReadsTheShippedTensors) {
    const SafetensorsFile file =
        SafetensorsFile::open(KVPLANE_EXAMPLE_DATA "/smollm2_layers_0_8.safetensors");
    EXPECT_EQ(file.names(),
              (std::vector<std::string>{"layers.0.keys", "layers.0.keys_before_rope", "layers.0.queries",
                                        "layers.0.values", "layers.8.keys", "layers.8.keys_before_rope",
                                        "layers.8.queries", "layers.8.values"}));
    EXPECT_EQ(file.metadata().size(), 7U);
    EXPECT_EQ(file.metadata().at("layout"), "[tokens, heads, head_dim]");
    EXPECT_EQ(file.metadata().at("rope_theta"), "100000");
    EXPECT_EQ(file.info("layers.0.keys").dtype, DType::float16);
    EXPECT_EQ(file.info("layers.8.queries").shape, (std::vector<Index>{64, 9, 64}));

    const auto keys = file.matrix<Eigen::half>("layers.0.keys");
    ASSERT_EQ(keys.rows(), 1024);
    ASSERT_EQ(keys.cols(), 192);
    EXPECT_EQ(static_cast<float>(keys(0, 0)), -0.335693359375F);
    EXPECT_EQ(static_cast<float>(keys(1, 65)), -3.65625F);
    EXPECT_EQ(static_cast<float>((file.tensor<Eigen::half, 3>("layers.0.keys")(1, 1, 1))), -3.65625F);
    EXPECT_EQ(static_cast<float>(keys(1023, 191)), 0.418701171875F);
    EXPECT_NEAR(keys.cast<double>().sum(), -14586.708729803562, 1e-6);
    EXPECT_NEAR(keys.cast<double>().squaredNorm(), 342921.11203806667, 1e-5);

    const kvplane::Matrix values = file.to_float_matrix("layers.8.values");
    EXPECT_EQ(values(1, 65), -0.489013671875F);
    EXPECT_NEAR(values.cast<double>().sum(), -66.33219784498215, 1e-6);
    EXPECT_NEAR(file.to_float_matrix("layers.8.queries").cast<double>().squaredNorm(), 95795.74637770635,
                1e-5);
}

TEST_F(SafetensorsFolder, TheShippedFilesAreWrittenAgain) {
    for (const std::string name : {"smollm2_layers_0_8.safetensors", "smollm2_layers_16_24.safetensors"}) {
        const SafetensorsFile file = SafetensorsFile::open(std::string(KVPLANE_EXAMPLE_DATA "/") + name);
        SafetensorsWriter writer;
        for (const std::string& tensor : file.names())
            writer.add(tensor, file.info(tensor).shape, file.info(tensor).dtype, file.bytes(tensor));
        for (const auto& [key, value] : file.metadata()) writer.metadata(key, value);
        writer.write(path(name));
        const SafetensorsFile copy = SafetensorsFile::open(path(name));
        EXPECT_EQ(copy.names(), file.names());
        EXPECT_EQ(copy.metadata(), file.metadata());
        for (const std::string& tensor : file.names()) {
            EXPECT_EQ(copy.info(tensor).shape, file.info(tensor).shape);
            EXPECT_TRUE(same_bytes(copy.bytes(tensor), file.bytes(tensor))) << tensor;
        }
    }
}

// -- Conversion to float ----------------------------------------------------------------------------------

template <class Scalar>
void expect_float_matrix(double number, float expected) {
    RowMajorMatrix<Scalar> rows(4, 6);
    for (Index i = 0; i < rows.size(); ++i) rows(i / 6, i % 6) = static_cast<Scalar>(static_cast<float>(i));
    rows(3, 5) = static_cast<Scalar>(number);
    SafetensorsWriter writer;
    writer.add("rank 2", rows);
    writer.add("rank 3", rows, {4, 3, 2});
    const Bytes bytes = writer.to_bytes();
    const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);
    for (const char* name : {"rank 2", "rank 3"}) {
        const kvplane::Matrix floats = file.to_float_matrix(name);
        ASSERT_EQ(floats.rows(), 4);
        ASSERT_EQ(floats.cols(), 6);
        for (Index i = 0; i + 1 < floats.size(); ++i) EXPECT_EQ(floats(i / 6, i % 6), static_cast<float>(i));
        EXPECT_EQ(floats(3, 5), expected);
    }
}

TEST(Safetensors, FloatMatrixFromEveryFloatingType) {
    expect_float_matrix<float>(0.1, 0.1F);
    expect_float_matrix<double>(0.1, 0.1F);
    expect_float_matrix<double>(1e300, std::numeric_limits<float>::infinity());
    expect_float_matrix<Eigen::half>(0.1, 0.0999755859375F);
    expect_float_matrix<Eigen::bfloat16>(0.1, 0.10009765625F);
}

// -- Refusals of what the caller asks ---------------------------------------------------------------------

TEST(Safetensors, RefusesWhatTheTensorIsNot) {
    SafetensorsWriter writer;
    writer.add("keys", RowMajorMatrix<float>::Zero(4, 6), {4, 3, 2});
    writer.add("ids", {4}, DType::int32, stored(std::vector<std::int32_t>(4)));
    writer.add("tiles", {2, 2}, DType::uint8, stored(std::vector<std::uint8_t>(4)));
    const Bytes bytes = writer.to_bytes();
    const SafetensorsFile file = SafetensorsFile::from_bytes(bytes, "dump.safetensors");

    EXPECT_FALSE(file.contains("values"));
    for (const std::string& sentence :
         {refusal(ErrorCode::index, [&] { file.info("values"); }),
          refusal(ErrorCode::index, [&] { file.bytes("values"); }),
          refusal(ErrorCode::index, [&] { file.matrix<float>("values"); }),
          refusal(ErrorCode::index, [&] { file.matrix<float>("values", 1, 1); }),
          refusal(ErrorCode::index, [&] { file.tensor<float, 2>("values"); }),
          refusal(ErrorCode::index, [&] { file.to_float_matrix("values"); })})
        expect_said(sentence, {"dump.safetensors", "no tensor 'values'", "3 tensors", "(ids, keys, tiles)"});

    expect_said(refusal(ErrorCode::mismatch, [&] { file.matrix<Eigen::half>("keys"); }),
                {"dump.safetensors", "'keys'", "holds F32", "expected F16"});
    expect_said(refusal(ErrorCode::mismatch, [&] { file.tensor<double, 3>("keys"); }),
                {"holds F32", "expected F64"});
    expect_said(refusal(ErrorCode::mismatch, [&] { file.matrix<std::int8_t>("tiles"); }),
                {"'tiles'", "holds U8", "expected I8"});
    expect_said(refusal(ErrorCode::mismatch, [&] { file.to_float_matrix("tiles"); }),
                {"dump.safetensors", "'tiles'", "holds U8", "expected F32, F16, BF16 or F64"});

    expect_said(refusal(ErrorCode::shape, [&] { file.matrix<std::int32_t>("ids"); }),
                {"dump.safetensors", "'ids'", "[4]", "[rows, cols]"});
    expect_said(refusal(ErrorCode::shape, [&] { file.tensor<float, 2>("keys"); }),
                {"dump.safetensors", "'keys'", "[4, 3, 2]", "expected rank 2"});
    const Index huge = Index{1} << 62;
    for (const auto& [rows, cols] : std::vector<std::pair<Index, Index>>{
             {4, 5}, {24, 2}, {0, 0}, {-4, -6}, {-1, 24}, {huge, 4}, {huge, huge}, {12, -2}})
        expect_said(refusal(ErrorCode::shape,
                            [&, rows = rows, cols = cols] { file.matrix<float>("keys", rows, cols); }),
                    {"'keys'", "[4, 3, 2]", std::to_string(rows) + " x " + std::to_string(cols)});
}

TEST(Safetensors, ListsOnlyTheFirstOfManyNames) {
    SafetensorsWriter writer;
    for (int layer = 0; layer < 1000; ++layer)
        writer.add("layers." + std::to_string(layer), {0}, DType::int8, {});
    const Bytes bytes = writer.to_bytes();
    const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);
    expect_said(refusal(ErrorCode::index, [&] { file.info(std::string(5000, 'x')); }),
                {"xxx...'", "1000 tensors", "layers.0, ", ", ...)"});
}

TEST(Safetensors, WriterRefusesAndStaysAsItWas) {
    SafetensorsWriter writer;
    const std::vector<float> four(4);
    writer.add("keys", {4}, DType::float32, stored(four));
    writer.metadata("model", "tiny");
    const Bytes before = writer.to_bytes();
    const auto add = [&](const std::string& name, const std::vector<Index>& shape) {
        return [&writer, &four, name, shape] { writer.add(name, shape, DType::float32, stored(four)); };
    };
    expect_said(refusal(ErrorCode::option, add("keys", {4})), {"writer", "'keys'", "added before"});
    expect_said(refusal(ErrorCode::option, add("__metadata__", {4})), {"'__metadata__'", "reserved"});
    for (const std::string bad : {"\xFF", "cut \xE5\xB1", "\xC3(", "\xED\xA0\x80"}) {
        expect_said(refusal(ErrorCode::option, add(bad, {4})), {"the name is no UTF-8"});
        expect_said(refusal(ErrorCode::option, [&] { writer.metadata(bad, "value"); }),
                    {"the key is no UTF-8"});
        expect_said(refusal(ErrorCode::option, [&] { writer.metadata("key", bad); }),
                    {"metadata 'key'", "the value is no UTF-8"});
    }
    expect_said(refusal(ErrorCode::shape, add("v", {5})), {"'v'", "16 bytes", "expected 20", "F32 [5]"});
    expect_said(refusal(ErrorCode::shape, add("v", {2, 0})), {"'v'", "16 bytes", "expected 0"});
    expect_said(refusal(ErrorCode::shape, add("v", {-2, -2})), {"'v'", "[-2, -2]", "0 or more"});
    expect_said(refusal(ErrorCode::shape, add("v", {Index{1} << 61, 2})), {"'v'", "overflows"});
    expect_said(refusal(ErrorCode::shape, add("v", {0, Index{1} << 40, Index{1} << 40})),
                {"'v'", "overflows"});
    expect_said(refusal(ErrorCode::shape,
                        [&] {
                            writer.add("v", Eigen::MatrixXf::Zero(4, 6), {4, 7});
                        }),
                {"'v'", "96 bytes", "expected 112", "[4, 7]"});
    expect_said(refusal(ErrorCode::option, [&] { writer.metadata("model", "other"); }),
                {"'model'", "added before"});
    EXPECT_TRUE(writer.to_bytes() == before);
}

// -- Malformed files --------------------------------------------------------------------------------------

struct Malformed {
    std::string what;
    Bytes file;
    std::vector<std::string> said;
};

std::ostream& operator<<(std::ostream& out, const Malformed& malformed) {
    return out << malformed.what;
}

class MalformedFile : public testing::TestWithParam<Malformed> {};

TEST_P(MalformedFile, IsRefusedWithASentence) {
    const auto& [what, bytes, said] = GetParam();
    const std::string sentence = refusal(
        ErrorCode::format, [&bytes = bytes] { SafetensorsFile::from_bytes(bytes, "dump.safetensors"); });
    expect_said(sentence, {"kvplane: dump.safetensors: "});
    EXPECT_EQ(sentence.find("last read"), std::string::npos)
        << "quotes what may be long and no UTF-8: " << sentence;
    expect_said(sentence, said);
}

/// A file with one F32 tensor "k" of four numbers but for the given parts.
Malformed with_entry(const std::string& what, const std::string& dtype, const std::string& shape,
                     const std::string& offsets, const std::vector<std::string>& said) {
    return {what, file_of(object(entry("k", dtype, shape, offsets)), 16), said};
}

const std::string good_entry = entry("k", "F32", "[4]", "[0,16]");

/// A file with this member beside or instead of the good entry.
Malformed with_header(const std::string& what, const std::string& header,
                      const std::vector<std::string>& said) {
    return {what, file_of(header, 16), said};
}

INSTANTIATE_TEST_SUITE_P(
    Length, MalformedFile,
    testing::Values(Malformed{"empty", {}, {"the file has 0 bytes", "at least 8"}},
                    Malformed{"seven bytes", Bytes(7), {"the file has 7 bytes", "at least 8"}},
                    Malformed{"only a length",
                              bytes_of_text(little_endian(2)),
                              {"header should have 2 bytes", "ends after 0"}},
                    Malformed{"length 0", bytes_of_text(little_endian(0)), {"no JSON", "expected '{'"}},
                    Malformed{"length one too long",
                              bytes_of_text(little_endian(3) + "{}"),
                              {"should have 3 bytes", "after 2"}},
                    Malformed{"length at the limit",
                              bytes_of_text(little_endian(100'000'000) + "{}"),
                              {"should have 100000000 bytes", "after 2"}},
                    Malformed{"length above the limit",
                              bytes_of_text(little_endian(100'000'001) + "{}"),
                              {"100000001 bytes", "at most 100000000"}},
                    Malformed{"length that overflows with 8",
                              bytes_of_text(little_endian(~std::uint64_t{0} - 7) + "{}"),
                              {"18446744073709551608 bytes", "at most 100000000"}},
                    Malformed{"largest length",
                              bytes_of_text(little_endian(~std::uint64_t{0}) + "{}"),
                              {"18446744073709551615 bytes", "at most 100000000"}},
                    Malformed{"length that is negative if signed",
                              bytes_of_text(little_endian(std::uint64_t{1} << 63) + "{}"),
                              {"9223372036854775808 bytes"}}));

INSTANTIATE_TEST_SUITE_P(
    Json, MalformedFile,
    testing::Values(
        with_header("text", "hello   ", {"no JSON", "expected '{'"}),
        with_header("a list", "[]", {"no JSON", "expected '{'"}),
        with_header("space first", " {" + good_entry + "}", {"no JSON", "expected '{'"}),
        with_header("byte order mark", "\xEF\xBB\xBF{" + good_entry + "}", {"no JSON", "expected '{'"}),
        with_header("not closed", "{" + good_entry, {"no JSON", "unexpected end of input", "byte "}),
        with_header("comma at the end", "{" + good_entry + ",}", {"no JSON", "byte "}),
        with_header("name without quotes", "{k:1}", {"no JSON", "byte 2"}),
        with_header("more behind it", "{" + good_entry + "} x", {"no JSON", "byte "}),
        with_header("a second object", "{" + good_entry + "}{}", {"no JSON", "byte "}),
        with_header("zero behind it", object(good_entry) + std::string(1, '\0') + "garbage",
                    {"no JSON", "is zero"}),
        with_header("zero as padding", object(good_entry) + std::string(3, '\0'), {"no JSON", "is zero"}),
        with_header("comment", "{/**/" + good_entry + "}", {"no JSON"}),
        with_header("name that is no UTF-8", "{\"\xFF\":1}", {"no JSON", "UTF-8"}),
        with_header("lone surrogate", R"({"\uD800":1})", {"no JSON"}),
        with_header("newline in a name", "{\"a\nb\":1}", {"no JSON", "U+000A"}),
        with_header("endless token", "{\"" + std::string(100'000, 'x'), {"no JSON", "missing closing quote"}),
        with_header("number beyond double", "{\"k\":1e999}", {"no JSON", "number overflow"}),
        with_header("number of many digits", "{\"k\":1" + std::string(100'000, '0') + "}",
                    {"no JSON", "..."})));

INSTANTIATE_TEST_SUITE_P(
    Types, MalformedFile,
    testing::Values(
        with_header("tensor is a number", "{\"k\":4}", {"tensor 'k'", "a number", "an object with dtype"}),
        with_header("tensor is a string", "{\"k\":\"F32\"}",
                    {"tensor 'k'", "a string", "an object with dtype"}),
        with_header("tensor is null", "{\"k\":null}", {"tensor 'k'", "null", "an object with dtype"}),
        with_header("tensor is true", "{\"k\":true}", {"tensor 'k'", "a boolean", "an object with dtype"}),
        with_header("tensor is a list", "{\"k\":[]}", {"tensor 'k'", "a list", "an object with dtype"}),
        with_header("dtype is a number", R"({"k":{"dtype":32}})",
                    {"tensor 'k'", "dtype", "a number", "a string"}),
        with_header("dtype is a list", R"({"k":{"dtype":["F32"]}})",
                    {"tensor 'k'", "dtype", "a list", "a string"}),
        with_header("dtype is an object", R"({"k":{"dtype":{}}})", {"tensor 'k'", "dtype", "an object"}),
        with_header("field is null", R"({"k":{"shape":null}})", {"tensor 'k'", "shape", "null", "a list"}),
        with_entry("shape is a number", "F32", "4", "[0,16]", {"tensor 'k'", "shape", "a number", "a list"}),
        with_entry("shape is a string", "F32", "\"4\"", "[0,16]",
                   {"tensor 'k'", "shape", "a string", "a list"}),
        with_entry("shape is an object", "F32", "{\"0\":4}", "[0,16]", {"tensor 'k'", "shape", "an object"}),
        with_entry("shape holds a string", "F32", "[\"4\"]", "[0,16]",
                   {"tensor 'k'", "shape", "a string", "whole"}),
        with_entry("shape holds null", "F32", "[null]", "[0,16]",
                   {"tensor 'k'", "shape", "null", "whole number"}),
        with_entry("shape holds true", "F32", "[4,true]", "[0,16]",
                   {"tensor 'k'", "shape", "a boolean", "whole"}),
        with_entry("shape holds an object", "F32", "[{}]", "[0,16]",
                   {"tensor 'k'", "shape", "an object", "whole"}),
        with_entry("shape holds a list", "F32", "[[4]]", "[0,16]",
                   {"tensor 'k'", "shape", "a list", "whole"}),
        with_entry("shape is negative", "F32", "[-4]", "[0,16]",
                   {"tensor 'k'", "shape", "negative", "whole"}),
        with_entry("shape is twice negative", "F32", "[-2,-2]", "[0,16]",
                   {"tensor 'k'", "shape", "negative"}),
        with_entry("shape is a fraction", "F32", "[4.5]", "[0,16]",
                   {"tensor 'k'", "shape", "4.5", "whole number"}),
        with_entry("shape is 4.0", "F32", "[4.0]", "[0,16]", {"tensor 'k'", "shape", "4.0", "whole number"}),
        with_entry("shape is 4e0", "F32", "[4e0]", "[0,16]", {"tensor 'k'", "shape", "4e0", "whole number"}),
        with_entry("offset is negative", "F32", "[4]", "[-16,0]", {"tensor 'k'", "data_offsets", "negative"}),
        with_entry("offset is minus zero", "F32", "[4]", "[-0,16]",
                   {"tensor 'k'", "data_offsets", "negative"}),
        with_entry("offset is a fraction", "F32", "[4]", "[0,16.5]", {"tensor 'k'", "data_offsets", "16.5"}),
        with_entry("offset is a string", "F32", "[4]", "[0,\"16\"]",
                   {"tensor 'k'", "data_offsets", "a string"}),
        with_entry("offset is null", "F32", "[4]", "[null,16]", {"tensor 'k'", "data_offsets", "null"}),
        with_entry("offsets are an object", "F32", "[4]", "{}", {"tensor 'k'", "data_offsets", "an object"}),
        with_header("metadata is a string", R"({"__metadata__":"x"})",
                    {"__metadata__: ", "a string", "of strings"}),
        with_header("metadata is a list", R"({"__metadata__":[]})",
                    {"__metadata__: ", "a list", "of strings"}),
        with_header("metadata is null", R"({"__metadata__":null})", {"__metadata__: ", "null", "of strings"}),
        with_header("metadata holds a number", R"({"__metadata__":{"theta":10000}})",
                    {"__metadata__: 'theta'", "a number", "a string"}),
        with_header("metadata holds an object", R"({"__metadata__":{"theta":{}}})",
                    {"__metadata__: 'theta'", "an object", "a string"}),
        with_header("metadata holds a list", R"({"__metadata__":{"theta":[1]}})",
                    {"__metadata__: 'theta'", "a list", "a string"})));

std::string repeated(const std::string& text, int times) {
    std::string result;
    for (int i = 0; i < times; ++i) result += text;
    return result;
}

INSTANTIATE_TEST_SUITE_P(Depth, MalformedFile,
                         testing::Values(with_header("a million lists", "{\"k\":" + repeated("[", 1'000'000),
                                                     {"tensor 'k'", "a list"}),
                                         with_header("a million objects", repeated("{\"k\":", 1'000'000),
                                                     {"tensor 'k'", "k: not a known field"}),
                                         with_header("a million lists in shape",
                                                     "{\"k\":{\"shape\":" + repeated("[", 1'000'000),
                                                     {"tensor 'k'", "shape", "a list"}),
                                         with_header("a million objects in metadata",
                                                     "{\"__metadata__\":" + repeated("{\"k\":", 1'000'000),
                                                     {"__metadata__: 'k'", "an object"})));

INSTANTIATE_TEST_SUITE_P(
    Names, MalformedFile,
    testing::Values(
        with_header("tensor twice", object(good_entry + "," + good_entry), {"tensor 'k'", "stands twice"}),
        with_header("tensor twice, different", object(good_entry + "," + entry("k", "F32", "[0]", "[16,16]")),
                    {"tensor 'k'", "stands twice"}),
        with_header("tensor twice, escaped",
                    object(good_entry + "," + entry("\\u006b", "F32", "[0]", "[16,16]")),
                    {"tensor 'k'", "stands twice"}),
        with_header("metadata twice", R"({"__metadata__":{},"__metadata__":{}})",
                    {"__metadata__", "stands twice"}),
        with_header("metadata key twice", R"({"__metadata__":{"a":"1","a":"1"}})",
                    {"__metadata__: 'a'", "twice"}),
        with_header("dtype twice", R"({"k":{"dtype":"F32","dtype":"F32"}})",
                    {"tensor 'k'", "dtype", "twice"}),
        with_header("shape twice", R"({"k":{"shape":[],"shape":[]}})", {"tensor 'k'", "shape", "twice"}),
        with_header("offsets twice", R"({"k":{"data_offsets":[0,4],"data_offsets":[0,4]}})",
                    {"tensor 'k'", "data_offsets", "twice"}),
        with_header("no dtype", R"({"k":{"shape":[4],"data_offsets":[0,16]}})",
                    {"tensor 'k'", "dtype: missing"}),
        with_header("no shape", R"({"k":{"dtype":"F32","data_offsets":[0,16]}})",
                    {"tensor 'k'", "shape: missing"}),
        with_header("no offsets", R"({"k":{"dtype":"F32","shape":[4]}})",
                    {"tensor 'k'", "data_offsets: missing"}),
        with_header("nothing", R"({"k":{}})", {"tensor 'k'", "dtype: missing"}),
        with_header("another field", R"({"k":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"scale":2}})",
                    {"tensor 'k'", "scale: not a known field", "expected dtype, shape, data_offsets"}),
        with_header("a long name", "{\"" + std::string(5000, 'n') + "\":1}", {"tensor 'nnn", "n...'"}),
        with_header("a name with control characters", R"({"a\n\u001b[2Jb":1})", {"tensor 'a??[2Jb'"})));

INSTANTIATE_TEST_SUITE_P(
    DTypes, MalformedFile,
    testing::Values(
        with_entry("BOOL", "BOOL", "[16]", "[0,16]",
                   {"tensor 'k'", "dtype", "'BOOL' is not supported", "F32, F16"}),
        with_entry("F8", "F8_E4M3", "[16]", "[0,16]", {"tensor 'k'", "dtype", "'F8_E4M3' is not supported"}),
        with_entry("U16", "U16", "[8]", "[0,16]", {"tensor 'k'", "dtype", "'U16' is not supported"}),
        with_entry("lower case", "f32", "[4]", "[0,16]", {"tensor 'k'", "dtype", "'f32' is not supported"}),
        with_entry("no dtype at all", "", "[4]", "[0,16]", {"tensor 'k'", "dtype", "'' is not supported"}),
        with_entry("prefix", "F3", "[4]", "[0,16]", {"tensor 'k'", "dtype", "'F3' is not supported"})));

INSTANTIATE_TEST_SUITE_P(
    Shapes, MalformedFile,
    testing::Values(
        with_entry("one too few", "F32", "[3]", "[0,16]",
                   {"tensor 'k'", "16 bytes", "expected 12", "F32 [3]"}),
        with_entry("one too many", "F32", "[5]", "[0,16]",
                   {"tensor 'k'", "16 bytes", "expected 20", "F32 [5]"}),
        with_entry("wide for its dtype", "F16", "[4]", "[0,16]", {"tensor 'k'", "16 bytes", "expected 8"}),
        with_entry("rank 0", "F32", "[]", "[0,16]", {"tensor 'k'", "16 bytes", "expected 4", "F32 []"}),
        with_entry("zero", "F32", "[4,0]", "[0,16]", {"tensor 'k'", "16 bytes", "expected 0"}),
        with_entry("many sizes", "U8", "[1,1,1,1,1,1,1,1,1,1]", "[0,16]", {"[1, 1, 1, 1, 1, 1, 1, 1, ...]"}),
        with_entry("product wraps to 0", "F32", "[4294967296,4294967296]", "[0,0]",
                   {"tensor 'k'", "overflows"}),
        with_entry("product wraps to 4", "U8", "[4294967297,4294967297,16]", "[0,16]",
                   {"tensor 'k'", "overflows"}),
        with_entry("bytes wrap", "F64", "[2305843009213693954]", "[0,16]", {"tensor 'k'", "overflows"}),
        with_entry("bytes beyond Index", "I64", "[1152921504606846976]", "[0,16]",
                   {"tensor 'k'", "overflows"}),
        with_entry("size beyond Index", "U8", "[9223372036854775808]", "[0,16]", {"tensor 'k'", "overflows"}),
        with_entry("size beyond 64 bits", "U8", "[18446744073709551616]", "[0,16]",
                   {"tensor 'k'", "shape", "18446744073709551616", "64 bits"}),
        with_entry("empty but huge", "U8", "[0,9223372036854775807,2]", "[0,0]", {"tensor 'k'", "overflows"}),
        with_entry("huge but empty", "U8", "[9223372036854775807,2,0]", "[0,0]",
                   {"tensor 'k'", "overflows"})));

INSTANTIATE_TEST_SUITE_P(
    Offsets, MalformedFile,
    testing::Values(
        with_entry("none", "F32", "[4]", "[]", {"tensor 'k'", "data_offsets", "0 numbers", "[begin, end]"}),
        with_entry("one", "F32", "[4]", "[0]", {"tensor 'k'", "data_offsets", "1 numbers", "[begin, end]"}),
        with_entry("three", "F32", "[4]", "[0,16,16]", {"tensor 'k'", "more than two", "[begin, end]"}),
        with_entry("end before begin", "F32", "[4]", "[16,0]",
                   {"tensor 'k'", "[16, 0]", "ends before it begins"}),
        with_entry("beyond the file", "F32", "[5]", "[0,20]",
                   {"tensor 'k'", "[0, 20]", "beyond the file", "16 bytes"}),
        with_entry("all beyond the file", "F32", "[4]", "[16,32]",
                   {"tensor 'k'", "[16, 32]", "beyond the file"}),
        with_entry("far beyond the file", "U8", "[9223372036854775807]", "[0,9223372036854775807]",
                   {"tensor 'k'", "beyond the file"}),
        with_entry("at the end of numbers", "U8", "[15]", "[18446744073709551600,18446744073709551615]",
                   {"tensor 'k'", "[18446744073709551600, 18446744073709551615]", "beyond the file"}),
        with_entry("beyond 64 bits", "F32", "[4]", "[0,18446744073709551632]", {"tensor 'k'", "64 bits"}),
        with_entry("hole at the start", "F32", "[3]", "[4,16]",
                   {"tensor 'k'", "byte 4", "hole after the start of the data", "expected 0"}),
        with_entry("rest at the end", "F32", "[3]", "[0,12]",
                   {"16 bytes of data", "expected 12 for its tensors"}),
        with_header("no tensor but data", "{}", {"16 bytes of data", "expected 0 for its tensors"}),
        with_entry("not aligned", "F32", "[3]", "[3,15]",
                   {"tensor 'k'", "begins at 3", "a multiple of 4", "F32"}),
        with_header("not aligned behind bytes",
                    object(entry("a", "U8", "[4]", "[0,4]") + "," + entry("b", "F64", "[1]", "[4,12]")),
                    {"tensor 'b'", "begins at 4", "a multiple of 8", "F64"}),
        with_header("hole",
                    object(entry("a", "F32", "[1]", "[0,4]") + "," + entry("b", "F32", "[2]", "[8,16]")),
                    {"tensor 'b'", "byte 8", "hole after tensor 'a'", "expected 4"}),
        with_header("overlap",
                    object(entry("a", "F32", "[3]", "[0,12]") + "," + entry("b", "F32", "[2]", "[8,16]")),
                    {"tensor 'b'", "byte 8", "inside of tensor 'a'", "expected 12"}),
        with_header("overlap, listed backwards",
                    object(entry("b", "F32", "[2]", "[8,16]") + "," + entry("a", "F32", "[3]", "[0,12]")),
                    {"tensor 'b'", "byte 8", "inside of tensor 'a'", "expected 12"}),
        with_header("the same place twice",
                    object(entry("a", "F32", "[4]", "[0,16]") + "," + entry("b", "F32", "[4]", "[0,16]")),
                    {"tensor 'b'", "byte 0", "inside of tensor 'a'", "expected 16"}),
        with_header("one inside the other",
                    object(entry("a", "F32", "[4]", "[0,16]") + "," + entry("b", "F32", "[1]", "[4,8]")),
                    {"tensor 'b'", "byte 4", "inside of tensor 'a'"}),
        with_header("an empty one inside another",
                    object(entry("a", "F32", "[4]", "[0,16]") + "," + entry("b", "F32", "[0]", "[8,8]")),
                    {"tensor 'b'", "byte 8", "inside of tensor 'a'"}),
        with_header("an empty one behind the end",
                    object(entry("a", "F32", "[4]", "[0,16]") + "," + entry("b", "F32", "[0]", "[20,20]")),
                    {"tensor 'b'", "[20, 20]", "beyond the file"})));

TEST(Safetensors, EveryTruncationIsRefused) {
    const Bytes whole = reference_file();
    for (std::size_t size = 0; size < whole.size(); ++size) {
        const Bytes cut(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size));
        refusal(ErrorCode::format, [&] { SafetensorsFile::from_bytes(cut); });
    }
    Bytes longer = whole;
    longer.push_back(std::byte{0});
    refusal(ErrorCode::format, [&] { SafetensorsFile::from_bytes(longer); });
}

/// Every byte of the file through all its values: refused as malformed, or read without leaving the file.
TEST(Safetensors, EveryChangedByteIsRefusedOrRead) {
    const Bytes whole = reference_file();
    std::size_t refused = 0, accepted = 0, sum = 0;
    Bytes changed = whole;
    for (std::size_t i = 0; i < whole.size(); ++i) {
        for (int flip = 1; flip < 256; ++flip) {
            changed[i] = whole[i] ^ static_cast<std::byte>(flip);
            try {
                sum += touch_all(SafetensorsFile::from_bytes(changed));
                ++accepted;
            } catch (const kvplane::Error& error) {
                EXPECT_EQ(error.code(), ErrorCode::format) << error.what();
                ++refused;
            }
        }
        changed[i] = whole[i];
    }
    std::cout << refused << " refused, " << accepted << " accepted, checksum " << sum << "\n";
    EXPECT_GT(refused, 50'000U);
    EXPECT_GT(accepted, 33U * 255) << "all changes of the data, and names with another letter";
}

// -- Alignment --------------------------------------------------------------------------------------------

/// A valid header of each length modulo 8, at each address modulo 8.
TEST(Safetensors, ViewsAreAlignedWhereverTheDataStands) {
    const std::string header =
        object(entry("d", "F64", "[2]", "[0,16]") + "," + entry("h", "F16", "[3]", "[16,22]") + "," +
               entry("u", "U8", "[1]", "[22,23]"));
    for (std::size_t padding = 0; padding < 8; ++padding) {
        const Bytes bytes = file_of(header + std::string(padding, ' '), 23);
        for (std::size_t shift = 0; shift < 8; ++shift) {
            Bytes shifted(shift + bytes.size());
            std::copy(bytes.begin(), bytes.end(), shifted.begin() + static_cast<std::ptrdiff_t>(shift));
            const SafetensorsFile file = SafetensorsFile::from_bytes(std::span(shifted).subspan(shift));
            touch_all(file);
            EXPECT_EQ(file.bytes("d")[0], std::byte{1});
            EXPECT_EQ(file.bytes("u")[0], std::byte{23});
            double second;
            std::memcpy(&second, bytes.data() + bytes.size() - 15, 8);
            EXPECT_EQ(file.matrix<double>("d", 2, 1)(1, 0), second);
            EXPECT_EQ((file.tensor<Eigen::half, 1>("h")(2)),
                      Eigen::numext::bit_cast<Eigen::half>(std::uint16_t{0x1615}));
        }
    }
}

TEST(Safetensors, AlignedDataIsNotCopied) {
    const Bytes bytes = reference_file();
    const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);
    EXPECT_EQ(file.bytes("c").data(), bytes.data() + bytes.size() - 3);
}

// -- Files ------------------------------------------------------------------------------------------------

TEST_F(SafetensorsFolder, MappedFileOfAnyHeaderLength) {
    const std::string header = object(entry("d", "F64", "[2]", "[0,16]"));
    for (std::size_t padding = 0; padding < 8; ++padding) {
        const auto file = SafetensorsFile::open(write("f", file_of(header + std::string(padding, ' '), 16)));
        touch_all(file);
        EXPECT_EQ(file.bytes("d")[15], std::byte{16});
    }
}

TEST_F(SafetensorsFolder, ViewsOutliveAMoveAndAReplacedFile) {
    reference_writer(false).write(path("f"));
    SafetensorsFile file = SafetensorsFile::open(path("f"));
    const auto view = file.matrix<Eigen::half>("a");
    SafetensorsFile moved = std::move(file);
    SafetensorsFile assigned = SafetensorsFile::open(path("f"));
    assigned = std::move(moved);
    SafetensorsWriter().write(path("f"));
    std::filesystem::remove(path("f"));
    EXPECT_EQ(static_cast<float>(view(0, 1)), 65504.0F);
    EXPECT_EQ(assigned.matrix<Eigen::half>("a").data(), view.data());
}

TEST_F(SafetensorsFolder, RefusesWhatIsNoReadableFile) {
    expect_said(refusal(ErrorCode::io, [&] { SafetensorsFile::open(path("absent")); }),
                {path("absent").string(), "cannot open", "No such file"});
    expect_said(refusal(ErrorCode::io, [&] { SafetensorsFile::open(folder_); }),
                {folder_.string(), "not a regular file"});
    ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
    expect_said(refusal(ErrorCode::io, [&] { SafetensorsFile::open(path("pipe")); }), {"not a regular file"});
    expect_said(refusal(ErrorCode::format, [&] { SafetensorsFile::open(write("empty", {})); }),
                {path("empty").string(), "0 bytes"});
    expect_said(refusal(ErrorCode::format, [&] { SafetensorsFile::open(write("short", Bytes(9))); }),
                {path("short").string(), "no JSON"});
}

TEST_F(SafetensorsFolder, WriteReplacesTheFileAndLeavesNothingElse) {
    write("f", bytes_of_text("something else that was there before"));
    reference_writer(false).write(path("f"));
    EXPECT_TRUE(read("f") == reference_file());
    EXPECT_EQ(files(), 1U);
    reference_writer(false).write(path(std::string(255, 'n')));
    EXPECT_EQ(files(), 2U) << "a name as long as the system allows";

    const mode_t mask = ::umask(0027);
    reference_writer(false).write(path("masked"));
    ::umask(mask);
    struct stat status {};
    ASSERT_EQ(::stat(path("masked").c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777U, 0640U);
}

TEST_F(SafetensorsFolder, WriteIntoTheCurrentFolder) {
    const auto before = std::filesystem::current_path();
    std::filesystem::current_path(folder_);
    reference_writer(false).write("f");
    std::filesystem::current_path(before);
    EXPECT_TRUE(read("f") == reference_file());
}

/// Files cannot grow beyond `bytes` while this lives, as on a full disk.
class FileSizeLimit {
  public:
    explicit FileSizeLimit(rlim_t bytes) {
        ::getrlimit(RLIMIT_FSIZE, &before_);
        const rlimit limit{bytes, before_.rlim_max};
        ::setrlimit(RLIMIT_FSIZE, &limit);
        signal_ = std::signal(SIGXFSZ, SIG_IGN);
    }
    ~FileSizeLimit() {
        ::setrlimit(RLIMIT_FSIZE, &before_);
        std::signal(SIGXFSZ, signal_);
    }
    FileSizeLimit(const FileSizeLimit&) = delete;
    FileSizeLimit& operator=(const FileSizeLimit&) = delete;

  private:
    rlimit before_{};
    void (*signal_)(int) = nullptr;
};

TEST_F(SafetensorsFolder, AFailedWriteLeavesTheOldFile) {
    reference_writer(false).write(path("f"));
    SafetensorsWriter large;
    large.add("keys", Eigen::MatrixXf::Ones(100, 100));
    for (const rlim_t room : {0UL, 1UL, 8UL, 50UL, 4096UL, 40'000UL}) {
        std::string sentence;
        {
            const FileSizeLimit full(room);
            sentence = refusal(ErrorCode::io, [&] { large.write(path("f")); });
        }
        expect_said(sentence, {path("f").string(), "cannot write", "File too large"});
        EXPECT_TRUE(read("f") == reference_file()) << room;
        EXPECT_EQ(files(), 1U) << "the temporary file must be gone";
    }
}

TEST_F(SafetensorsFolder, WriteRefusesWhereItCannotPutTheFile) {
    const SafetensorsWriter writer = reference_writer(false);
    expect_said(refusal(ErrorCode::io, [&] { writer.write(path("absent") / "f"); }),
                {(path("absent") / "f").string(), "No such file"});
    std::filesystem::create_directory(path("folder"));
    write("folder/occupied", {});
    expect_said(refusal(ErrorCode::io, [&] { writer.write(path("folder")); }),
                {path("folder").string(), "cannot rename"});
    EXPECT_EQ(files(), 1U);
    EXPECT_TRUE(std::filesystem::exists(path("folder/occupied")));
}

// -- Tensors whose bytes are asked for ----------------------------------------------------------------------

std::vector<std::byte> counted(std::size_t count) {
    std::vector<std::byte> bytes(count);
    for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::byte>(i * 7);
    return bytes;
}

TEST(StreamedTensors, GiveTheFileThatCopiesGive) {
    const std::vector<std::byte> bytes = counted(100);
    const std::span<const std::byte> all(bytes);
    SafetensorsWriter copied, streamed;
    copied.add("a", {50, 2}, DType::uint8, all);
    copied.add("empty", {0}, DType::uint8, {});
    copied.add("other", {2}, DType::float32, all.first(8));
    streamed.add("other", {2}, DType::float32, all.first(8));
    streamed.add_streamed("a", {50, 2}, DType::uint8, [&](const kvplane::ByteSink& take) {
        take(all.first(33));
        take({});
        take(all.subspan(33));
    });
    streamed.add_streamed("empty", {0}, DType::uint8, [](const kvplane::ByteSink&) {});
    EXPECT_EQ(streamed.to_bytes(), copied.to_bytes());
    EXPECT_EQ(streamed.to_bytes(), copied.to_bytes());  // asked again
}

TEST(StreamedTensors, OfAnotherSizeAreRefused) {
    const std::vector<std::byte> bytes = counted(100);
    const auto path = std::filesystem::temp_directory_path() / "kvplane_streamed_test.safetensors";
    std::filesystem::remove(path);
    for (const std::size_t given : {0u, 49u, 51u, 100u}) {
        SafetensorsWriter writer;
        writer.add_streamed("a", {50}, DType::uint8,
                            [&](const kvplane::ByteSink& take) { take(std::span(bytes).first(given)); });
        const std::string sentence = refusal(ErrorCode::shape, [&] { (void)writer.to_bytes(); });
        EXPECT_NE(sentence.find("gave " + std::to_string(given) + " bytes, expected 50"), std::string::npos)
            << sentence;
        refusal(ErrorCode::shape, [&] { writer.write(path); });
        EXPECT_FALSE(std::filesystem::exists(path));
    }
    SafetensorsWriter writer;
    writer.add("a", {50}, DType::uint8, std::span(bytes).first(50));
    refusal(ErrorCode::option,
            [&] { writer.add_streamed("a", {1}, DType::uint8, [](const kvplane::ByteSink&) {}); });
    refusal(ErrorCode::shape,
            [&] { writer.add_streamed("b", {-1}, DType::uint8, [](const kvplane::ByteSink&) {}); });
}

TEST(StreamedTensors, AreWrittenWithoutSyncing) {
    const auto path = std::filesystem::temp_directory_path() / "kvplane_streamed_test.safetensors";
    SafetensorsWriter writer;
    writer.add("a", {50}, DType::uint8, counted(50));
    writer.write(path, {.sync = false});
    EXPECT_EQ(SafetensorsFile::open(path).info("a").size(), 50);
    std::filesystem::remove(path);
}

}  // namespace
