// What the GGUF reader reads, and what it refuses.
#include "engine/gguf.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <limits>

#include "engine/engine_support.hpp"
#include "test_support.hpp"

namespace {

using engine::Gguf;
using engine::ValueType;
using kvplane::ErrorCode;
using kvplane_test::Bytes;
using kvplane_test::GgufWriter;
using kvplane_test::refusal;

/// The refusal of a file, which must be of the given kind and speak of `part`.
void expect_refused(ErrorCode code, const Bytes& bytes, const std::string& part) {
    const std::string sentence = refusal(code, [&] { Gguf file(bytes); });
    EXPECT_NE(sentence.find(part), std::string::npos) << "'" << sentence << "' does not say '" << part << "'";
}

GgufWriter two_tensors() {
    GgufWriter writer;
    writer.add_text("general.architecture", "llama");
    writer.add("count", ValueType::uint32, std::uint32_t{7});
    writer.add_texts("names", {"a", "", "ccc"});
    const std::vector<float> numbers{1, 2, 3, 4, 5, 6};
    writer.add_tensor("first", {3, 2}, 0, std::as_bytes(std::span(numbers)));
    writer.add_tensor("second", {6}, 0, std::as_bytes(std::span(numbers)));
    return writer;
}

TEST(Gguf, ReadsEveryValueType) {
    GgufWriter writer;
    writer.add("u8", ValueType::uint8, std::uint8_t{200});
    writer.add("i8", ValueType::int8, std::int8_t{-100});
    writer.add("u16", ValueType::uint16, std::uint16_t{60000});
    writer.add("i16", ValueType::int16, std::int16_t{-30000});
    writer.add("u32", ValueType::uint32, std::uint32_t{4000000000});
    writer.add("i32", ValueType::int32, std::int32_t{-2000000000});
    writer.add("u64", ValueType::uint64, std::uint64_t{1} << 62);
    writer.add("i64", ValueType::int64, -(std::int64_t{1} << 62));
    writer.add("f32", ValueType::float32, 1.5f);
    writer.add("f64", ValueType::float64, 0.1);
    writer.add("yes", ValueType::boolean, std::uint8_t{1});
    writer.add("no", ValueType::boolean, std::uint8_t{0});
    writer.add_text("text", "z\xc3\xbcrich");
    const Bytes bytes = writer.bytes();
    const Gguf file(bytes);
    EXPECT_EQ(file.values().size(), 13u);
    EXPECT_EQ(file.value("u8").integer(), 200);
    EXPECT_EQ(file.value("i8").integer(), -100);
    EXPECT_EQ(file.value("u16").integer(), 60000);
    EXPECT_EQ(file.value("i16").integer(), -30000);
    EXPECT_EQ(file.value("u32").integer(), 4000000000);
    EXPECT_EQ(file.value("i32").integer(), -2000000000);
    EXPECT_EQ(file.value("u64").integer(), std::int64_t{1} << 62);
    EXPECT_EQ(file.value("i64").integer(), -(std::int64_t{1} << 62));
    EXPECT_EQ(file.value("i32").number(), -2e9);
    EXPECT_EQ(file.value("f32").number(), 1.5);
    EXPECT_EQ(file.value("f64").number(), 0.1);
    EXPECT_TRUE(file.value("yes").flag());
    EXPECT_FALSE(file.value("no").flag());
    EXPECT_EQ(file.value("text").text(), "z\xc3\xbcrich");
    EXPECT_EQ(file.find_value("absent"), nullptr);
}

TEST(Gguf, ReadsArrays) {
    GgufWriter writer;
    writer.add_array("i16", ValueType::int16, std::vector<std::int16_t>{1, -2, 3});
    writer.add_array("f64", ValueType::float64, std::vector<double>{.5, -.25});
    writer.add_array("flags", ValueType::boolean, std::vector<std::uint8_t>{1, 0, 1});
    writer.add_array("empty", ValueType::uint64, std::vector<std::uint64_t>{});
    writer.add_texts("texts", {"one", "", "three"});
    const Bytes bytes = writer.bytes();
    const Gguf file(bytes);
    EXPECT_EQ(file.value("i16").integer(1), -2);
    EXPECT_EQ(file.value("i16").integer(2), 3);
    EXPECT_EQ(file.value("f64").number(1), -.25);
    EXPECT_TRUE(file.value("flags").flag(2));
    EXPECT_EQ(file.value("empty").size, 0u);
    EXPECT_EQ(file.value("texts").texts(), (std::vector<std::string_view>{"one", "", "three"}));
    refusal(ErrorCode::index, [&] { file.value("i16").integer(3); });
    refusal(ErrorCode::index, [&] { file.value("empty").number(); });
}

TEST(Gguf, RefusesToReadAValueAsAnotherType) {
    GgufWriter writer = two_tensors();
    writer.add("large", ValueType::uint64, std::numeric_limits<std::uint64_t>::max());
    const Bytes bytes = writer.bytes();
    const Gguf file(bytes);
    EXPECT_NE(refusal(ErrorCode::mismatch, [&] { file.value("count").text(); }).find("'count' is a uint32"),
              std::string::npos);
    refusal(ErrorCode::mismatch, [&] { file.value("count").flag(); });
    refusal(ErrorCode::mismatch, [&] { file.value("count").texts(); });
    refusal(ErrorCode::mismatch, [&] { file.value("names").text(); });
    refusal(ErrorCode::mismatch, [&] { file.value("names").integer(); });
    refusal(ErrorCode::mismatch, [&] { file.value("names").number(); });
    refusal(ErrorCode::mismatch, [&] { file.value("large").integer(); });
    EXPECT_NE(refusal(ErrorCode::mismatch, [&] { file.value("absent"); }).find("'absent'"),
              std::string::npos);
}

TEST(Gguf, ReadsTensors) {
    const Bytes bytes = two_tensors().bytes();
    const Gguf file(bytes);
    const engine::Tensor& first = file.tensor("first", 2, 3);
    std::vector<float> row(3);
    first.to_float(1, 1, row.data());
    EXPECT_EQ(row, (std::vector<float>{4, 5, 6}));
    EXPECT_EQ(file.tensor("second", 1, 6).rows, 1);
    EXPECT_EQ(file.find_tensor("third"), nullptr);
    refusal(ErrorCode::mismatch, [&] { file.tensor("third", 1, 6); });
    EXPECT_NE(refusal(ErrorCode::mismatch, [&] { file.tensor("first", 3, 2); }).find("2 x 3"),
              std::string::npos);
    for (const auto& [from, count] : {std::pair{0, 3}, {2, 1}, {-1, 1}, {0, -1}})
        refusal(ErrorCode::index,
                [&, from = from, count = count] { first.to_float(from, count, row.data()); });
}

TEST(Gguf, HalfToFloatIsExactForEveryHalf) {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const auto half = static_cast<std::uint16_t>(bits);
        const float expected = static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(half));
        const float actual = engine::detail::half_to_float(half);
        if (std::isnan(expected))
            ASSERT_TRUE(std::isnan(actual)) << bits;
        else
            ASSERT_EQ(std::bit_cast<std::uint32_t>(actual), std::bit_cast<std::uint32_t>(expected)) << bits;
    }
}

/// Value i of a block, written down from the format's definition: slow, one value at a time.
double value_of_block(const std::string& format, const std::byte* block, int i) {
    const auto byte = [block](int at) { return std::to_integer<int>(block[at]); };
    const auto half = [block](int at) {
        std::uint16_t bits;
        std::memcpy(&bits, block + at, 2);
        return static_cast<double>(static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(bits)));
    };
    const auto nibble = [&](int at) { return i < 16 ? byte(at + i) & 15 : byte(at + i - 16) >> 4; };
    if (format == "Q4_0") return half(0) * (nibble(2) - 8);
    if (format == "Q4_1") return half(0) * nibble(4) + half(2);
    if (format == "Q8_0") return half(0) * static_cast<std::int8_t>(byte(2 + i));
    if (format == "F16") return half(0);
    if (format == "Q5_0") return half(0) * (nibble(6) + 16 * (byte(2 + i / 8) >> (i % 8) & 1) - 16);
    if (format == "Q4_K" || format == "Q5_K") {
        const int group = i / 32, position = i % 32, codes = format == "Q4_K" ? 16 : 48;
        int step = byte(4 + group) & 63, lower = byte(8 + group) & 63;
        if (group >= 4) {
            step = (byte(8 + group) & 15) + 16 * (byte(group) >> 6);
            lower = (byte(8 + group) >> 4) + 16 * (byte(4 + group) >> 6);
        }
        int code = byte(codes + 32 * (group / 2) + position) >> (group % 2 * 4) & 15;
        if (format == "Q5_K") code += 16 * (byte(16 + position) >> group & 1);
        return half(0) * step * code - half(2) * lower;
    }
    if (format == "Q6_K") {
        const int part = i / 128, k = i % 128 / 32, position = i % 32;
        const int low = byte(64 * part + 32 * (k % 2) + position) >> (k < 2 ? 0 : 4) & 15;
        const int high = byte(128 + 32 * part + position) >> (2 * k) & 3;
        return half(208) * static_cast<std::int8_t>(byte(192 + i / 16)) * (low + 16 * high - 32);
    }
    float number;
    std::memcpy(&number, block, 4);
    return static_cast<double>(number);
}

TEST(Gguf, EveryTensorTypeGivesTheValuesOfItsDefinition) {
    std::mt19937 random(static_cast<std::uint32_t>(kvplane_test::seed()));
    for (const engine::BlockFormat& format : engine::detail::block_formats) {
        SCOPED_TRACE(format.name);
        constexpr int rows = 5, columns = 768;
        GgufWriter writer;
        writer.add_tensor("t", {columns, rows}, format.type,
                          kvplane_test::random_blocks(format, rows * columns, 2, random));
        const Bytes bytes = writer.bytes();
        const Gguf file(bytes);
        const engine::Tensor& tensor = file.tensor("t", rows, columns);
        std::vector<float> values(3 * columns, -1);
        tensor.to_float(1, 3, values.data());
        double largest = 0;
        for (int i = 0; i < 3 * columns; ++i) {
            const auto block = (columns + i) / format.values * format.bytes;
            const double expected =
                value_of_block(format.name, tensor.bytes.data() + block, static_cast<int>(i % format.values));
            ASSERT_NEAR(values[static_cast<std::size_t>(i)], expected, 1e-6) << "value " << i;
            largest = std::max(largest, std::abs(expected));
        }
        EXPECT_GT(largest, .5);  // so that 1e-6 is a relative error
        EXPECT_LT(largest, 10);
    }
}

/// Blocks worked out by hand, so that the definitions above are tested too.
TEST(Gguf, BlocksGiveTheValuesWorkedOutByHand) {
    const auto values = [](const char* name, const Bytes& block) {
        const engine::BlockFormat& format = kvplane_test::block_format(name);
        EXPECT_EQ(static_cast<Eigen::Index>(block.size()), format.bytes);
        std::vector<float> result(static_cast<std::size_t>(format.values));
        format.to_float(block.data(), 1, result.data());
        return result;
    };
    const auto at = [](Bytes& block, std::size_t place, int byte) {
        block[place] = static_cast<std::byte>(byte);
    };
    const int one = 0x3c, two = 0x40, half = 0x38;  // the high bytes of 1, 2 and .5 in fp16; the low are 0

    Bytes block(22);  // Q5_0: step 2; code 3 + 16 for value 0, 12 for value 16, 15 + 16 for value 31
    at(block, 1, two), at(block, 2, 0x01), at(block, 5, 0x80), at(block, 6, 0xc3), at(block, 21, 0xf0);
    std::vector<float> v = values("Q5_0", block);
    EXPECT_EQ(v[0], 2 * (19 - 16));
    EXPECT_EQ(v[16], 2 * (12 - 16));
    EXPECT_EQ(v[31], 2 * (31 - 16));
    EXPECT_EQ(v[1], -32);

    // Groups 0, 3 and 5 of Q4_K, d = 1, dmin = .5: steps 63, 1 and 9 + 16 * 2, lower ends 2, 40 and 7 + 16.
    block.assign(144, std::byte{0});
    at(block, 1, one), at(block, 3, half);
    at(block, 4, 63), at(block, 8, 2);   // group 0
    at(block, 7, 1), at(block, 11, 40);  // group 3
    at(block, 13, 7 << 4 | 9), at(block, 5, 2 << 6),
        at(block, 9, 1 << 6);       // group 5, beside nothing of group 1
    at(block, 16 + 4, 0x0b);        // value 4 of group 0: 11
    at(block, 16 + 32 + 31, 0xe0);  // value 31 of group 3: 14
    at(block, 16 + 64, 0xf5);       // value 0 of group 5: 15
    v = values("Q4_K", block);
    EXPECT_EQ(v[4], 63 * 11 - .5f * 2);
    EXPECT_EQ(v[5], -.5f * 2);
    EXPECT_EQ(v[32 * 3 + 31], 14 - .5f * 40);
    EXPECT_EQ(v[32 * 5], 41 * 15 - .5f * 23);
    EXPECT_EQ(v[32 * 1 + 4], 0);

    // Q5_K: the same head; the high bits of value 4 of group 0 and of value 0 of group 5.
    Bytes five(block.begin(), block.begin() + 16);
    five.resize(48);
    five.insert(five.end(), block.begin() + 16, block.end());
    at(five, 16 + 4, 1 << 0), at(five, 16, 1 << 5);
    v = values("Q5_K", five);
    EXPECT_EQ(v[4], 63 * (11 + 16) - .5f * 2);
    EXPECT_EQ(v[32 * 3 + 31], 14 - .5f * 40);
    EXPECT_EQ(v[32 * 5], 41 * (15 + 16) - .5f * 23);

    // Q6_K: d = .5; value 130 is 3 + 16 * 2 - 32 with scale -4, value 63 is 0 - 32 with scale 5.
    block.assign(210, std::byte{0});
    at(block, 209, half), at(block, 192 + 8, 0x100 - 4), at(block, 192 + 3, 5);
    at(block, 64 + 2, 0x03), at(block, 128 + 32 + 2, 2);
    v = values("Q6_K", block);
    EXPECT_EQ(v[130], .5f * -4 * 3);
    EXPECT_EQ(v[63], .5f * 5 * -32);
}

TEST(Gguf, RefusesEveryTruncation) {
    GgufWriter without_tensors;
    without_tensors.add_texts("names", {"a", "bc"});
    without_tensors.add("last", ValueType::uint16, std::uint16_t{7});
    for (const Bytes& whole : {two_tensors().bytes(), without_tensors.bytes()}) {
        Gguf{whole};
        for (std::size_t size = 0; size < whole.size(); ++size) {
            const Bytes part(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size));
            expect_refused(ErrorCode::format, part, "GGUF");
        }
    }
}

TEST(Gguf, SkipsPaddingOfEveryLength) {
    for (std::size_t length = 0; length < 32; ++length) {
        GgufWriter writer;
        writer.add_text("text", std::string(length, 'x'));
        const std::vector<float> numbers{1, 2, 3};
        writer.add_tensor("t", {3}, 0, std::as_bytes(std::span(numbers)));
        const Bytes bytes = writer.bytes();
        const Gguf file(bytes);
        std::vector<float> row(3);
        file.tensor("t", 1, 3).to_float(0, 1, row.data());
        EXPECT_EQ(row, numbers);
    }
}

TEST(Gguf, SurvivesEveryChangedByte) {
    Bytes bytes = two_tensors().bytes();
    int accepted = 0, refused = 0;
    for (std::byte& byte : bytes) {
        const std::byte original = byte;
        for (const int change : {0x01, 0x02, 0x08, 0x80, 0xff}) {
            byte = original ^ static_cast<std::byte>(change);
            try {
                const Gguf file(bytes);
                for (const auto& tensor : file.tensors()) {
                    std::vector<float> row(static_cast<std::size_t>(tensor.columns));
                    tensor.to_float(tensor.rows - 1, 1, row.data());
                }
                ++accepted;
            } catch (const kvplane::Error&) {
                ++refused;
            }
        }
        byte = original;
    }
    EXPECT_GT(accepted, 100);  // changed data, names and values are fine
    EXPECT_GT(refused, 100);
}

TEST(Gguf, RefusesAWrongHeader) {
    GgufWriter writer = two_tensors();
    writer.magic = "GGML";
    expect_refused(ErrorCode::format, writer.bytes(), "'GGUF'");
    writer = two_tensors();
    writer.version = 2;
    expect_refused(ErrorCode::mismatch, writer.bytes(), "version 2, expected 3");
    writer.version = 0x03000000;
    expect_refused(ErrorCode::mismatch, writer.bytes(), "big-endian");
    writer = two_tensors();
    writer.value_count = std::uint64_t{1} << 61;
    expect_refused(ErrorCode::format, writer.bytes(), "the number of metadata values");
    Bytes many_tensors = two_tensors().bytes();
    many_tensors[15] = std::byte{0xff};  // the highest byte of the number of tensors
    expect_refused(ErrorCode::format, many_tensors, "the number of tensors");
}

TEST(Gguf, RefusesMalformedMetadata) {
    const auto with = [](auto&& add) {
        GgufWriter writer = two_tensors();
        add(writer);
        return writer.bytes();
    };
    expect_refused(ErrorCode::format, with([](GgufWriter& w) { w.add("count", ValueType::uint8, 'a'); }),
                   "'count' appears twice");
    expect_refused(ErrorCode::format, with([](GgufWriter& w) { w.add("x", ValueType{13}, 'a'); }),
                   "value type 13");
    expect_refused(ErrorCode::format, with([](GgufWriter& w) { w.add("x", ValueType::boolean, '\2'); }),
                   "boolean of 2");
    expect_refused(ErrorCode::format, with([](GgufWriter& w) { w.begin_array("x", ValueType::array, 1); }),
                   "array of arrays");
    for (const auto type : {ValueType::uint8, ValueType::float64, ValueType::text})
        for (const std::uint64_t count : {std::uint64_t{1} << 32, ~std::uint64_t{0}, std::uint64_t{1} << 61})
            expect_refused(ErrorCode::format,
                           with([&](GgufWriter& w) { w.begin_array("absurd", type, count); }), "absurd");
    expect_refused(ErrorCode::format, with([](GgufWriter& w) {
                       w.begin("long", ValueType::text);
                       kvplane_test::put(w.values, ~std::uint64_t{0});
                   }),
                   "long");
    for (const std::uint32_t alignment : {0u, 4u, 12u, 1u << 30})
        expect_refused(ErrorCode::format,
                       with([&](GgufWriter& w) { w.add("general.alignment", ValueType::uint32, alignment); }),
                       "general.alignment");
}

TEST(Gguf, RefusesMalformedTensors) {
    const auto with = [](auto&& change) {
        GgufWriter writer = two_tensors();
        change(writer.tensors[1]);
        return writer.bytes();
    };
    using Tensor = GgufWriter::Tensor;
    const auto format = ErrorCode::format;
    expect_refused(format, with([](Tensor& t) { t.name = "first"; }), "'first' appears twice");
    expect_refused(format, with([](Tensor& t) { t.dimensions = {}; }), "0 dimensions");
    expect_refused(format, with([](Tensor& t) { t.dimensions = {1, 1, 1, 1, 1}; }), "5 dimensions");
    expect_refused(format, with([](Tensor& t) { t.dimensions = {6, 0}; }), "dimension 1 is 0");
    expect_refused(format, with([](Tensor& t) { t.dimensions = {~std::uint64_t{0}}; }), "fewer than 2^48");
    const std::uint64_t large = std::uint64_t{1} << 32;
    expect_refused(format, with([=](Tensor& t) { t.dimensions = {large, large}; }), "fewer than 2^48");
    expect_refused(format, with([=](Tensor& t) { t.dimensions = {large, large, large, large}; }), "2^48");
    expect_refused(format, with([](Tensor& t) { t.dimensions = {std::uint64_t{1} << 47}; }), "second");
    expect_refused(format, with([](Tensor& t) { t.dimensions = {7}; }), "'second' has 28 bytes at offset 32");
    expect_refused(format, with([](Tensor& t) { t.offset = 33; }), "multiple of 32");
    expect_refused(format, with([](Tensor& t) { t.offset = 0; }), "overlap");
    expect_refused(format, with([](Tensor& t) { t.offset = 64; }), "at offset 64");
    expect_refused(format, with([](Tensor& t) { t.offset = ~std::uint64_t{31}; }), "at offset");
    expect_refused(format, with([](Tensor& t) { t.type = 3; }), "multiple of 32 for Q4_1");
    expect_refused(
        ErrorCode::mismatch, with([](Tensor& t) { t.type = 10; }),
        "'second' has type 10; this reader knows F32 (0), F16 (1), Q4_0 (2), Q4_1 (3), Q5_0 (6), Q8_0 (8), "
        "Q4_K (12), Q5_K (13), Q6_K (14)");
}

TEST(Gguf, HonoursTheFilesAlignment) {
    GgufWriter writer;
    writer.alignment = 64;
    writer.add("general.alignment", ValueType::uint32, std::uint32_t{64});
    const std::vector<float> numbers{1, 2, 3};
    writer.add_tensor("a", {3}, 0, std::as_bytes(std::span(numbers)));
    writer.add_tensor("b", {3}, 0, std::as_bytes(std::span(numbers)));
    const Bytes bytes = writer.bytes();
    const Gguf file(bytes);
    float third = 0;
    std::memcpy(&third, file.tensor("b", 1, 3).bytes.data() + 8, 4);
    EXPECT_EQ(third, 3);
    EXPECT_EQ((file.tensors()[1].bytes.data() - bytes.data()) % 64, 0);
}

TEST(Gguf, OpensFiles) {
    const std::string path = testing::TempDir() + "kvplane_gguf_test.gguf";
    const Bytes bytes = two_tensors().bytes();
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    Gguf opened = Gguf::open(path);
    const Gguf file = std::move(opened);  // views stay valid
    EXPECT_EQ(file.value("names").texts()[2], "ccc");
    EXPECT_EQ(file.tensor("second", 1, 6).name, "second");
    std::ofstream(path, std::ios::trunc).close();
    EXPECT_NE(refusal(ErrorCode::io, [&] { Gguf::open(path); }).find(path), std::string::npos);
    std::filesystem::remove(path);
    EXPECT_NE(refusal(ErrorCode::io, [&] { Gguf::open(path); }).find(path), std::string::npos);
    refusal(ErrorCode::io, [] { Gguf::open(testing::TempDir()); });
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    refusal(ErrorCode::io, [&] { Gguf::open(path); });  // and does not wait for its other end
    std::filesystem::remove(path);
}

TEST(Gguf, ReadsTheRealModel) {
    KVPLANE_NEEDS_MODEL();
    const Gguf file = Gguf::open(kvplane_test::model_path());
    EXPECT_EQ(file.values().size(), 33u);
    EXPECT_EQ(file.tensors().size(), 272u);
    std::map<std::string, int> types;
    for (const auto& tensor : file.tensors()) ++types[tensor.format->name];
    EXPECT_EQ(types, (std::map<std::string, int>{{"Q4_1", 210}, {"F32", 61}, {"Q8_0", 1}}));
    EXPECT_EQ(file.value("general.architecture").text(), "llama");
    EXPECT_EQ(file.value("llama.attention.head_count_kv").integer(), 3);
    EXPECT_EQ(file.value("tokenizer.ggml.tokens").size, 49152u);
    EXPECT_EQ(file.value("tokenizer.ggml.merges").size, 48900u);
    for (const auto& tensor : file.tensors()) {
        Eigen::RowVectorXf row(tensor.columns);
        tensor.to_float(tensor.rows - 1, 1, row.data());
        EXPECT_TRUE(row.allFinite()) << tensor.name;
        EXPECT_GT(row.norm(), 0) << tensor.name;
    }
}

}  // namespace
