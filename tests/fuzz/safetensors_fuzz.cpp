// libFuzzer target of the safetensors reader: any bytes are refused with kvplane::Error or read without
// leaving them, and what is read can be written and read again.
//
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined safetensors_fuzz.cpp
//
// It needs no corpus: its own mutator starts from valid files and keeps the header's length true in most
// changes, without which nearly every input would end at the length.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kvplane/io/safetensors.hpp"

// libFuzzer's own mutator, which it gives to custom ones.
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

namespace {

using kvplane::DType;
using kvplane::Index;
using kvplane::SafetensorsFile;
using kvplane::SafetensorsWriter;
using Bytes = std::vector<std::byte>;

/// assert() that stays in every build.
void check(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "safetensors_fuzz: %s\n", what);
    std::abort();
}

/// Sums a tensor's elements through its typed view, for the sanitizers to see every access.
template <class Scalar>
double sum_elements(const SafetensorsFile& file, const std::string& name) {
    return file.matrix<Scalar>(name, 1, file.info(name).size()).template cast<double>().sum();
}

double sum_elements(const SafetensorsFile& file, const std::string& name) {
    switch (file.info(name).dtype) {
        case DType::float32:
            return sum_elements<float>(file, name);
        case DType::float16:
            return sum_elements<Eigen::half>(file, name);
        case DType::bfloat16:
            return sum_elements<Eigen::bfloat16>(file, name);
        case DType::float64:
            return sum_elements<double>(file, name);
        case DType::int8:
            return sum_elements<std::int8_t>(file, name);
        case DType::uint8:
            return sum_elements<std::uint8_t>(file, name);
        case DType::int32:
            return sum_elements<std::int32_t>(file, name);
        case DType::int64:
            return sum_elements<std::int64_t>(file, name);
    }
    std::abort();
}

bool same_bytes(std::span<const std::byte> a, std::span<const std::byte> b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

/// Writes what was read, and reads it again.
void check_round_trip(const SafetensorsFile& file) {
    SafetensorsWriter writer;
    for (const std::string& name : file.names())
        writer.add(name, file.info(name).shape, file.info(name).dtype, file.bytes(name));
    for (const auto& [key, value] : file.metadata()) writer.metadata(key, value);
    const Bytes bytes = writer.to_bytes();
    const SafetensorsFile again = SafetensorsFile::from_bytes(bytes);
    check(again.names() == file.names(), "names changed in a round trip");
    check(again.metadata() == file.metadata(), "metadata changed in a round trip");
    for (const std::string& name : file.names()) {
        check(again.info(name).shape == file.info(name).shape, "a shape changed in a round trip");
        check(again.info(name).dtype == file.info(name).dtype, "a dtype changed in a round trip");
        check(same_bytes(again.bytes(name), file.bytes(name)), "elements changed in a round trip");
    }
}

/// Reads a file and looks at all of it; false where it was refused.
bool read_all(std::span<const std::byte> bytes) {
    try {
        const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);
        std::size_t elements_bytes = 0;
        for (const std::string& name : file.names()) {
            [[maybe_unused]] volatile double sum = sum_elements(file, name);
            const std::size_t rank = file.info(name).shape.size();
            if (rank == 2 || rank == 3) {
                const DType dtype = file.info(name).dtype;
                if (dtype == DType::float16) (void)file.matrix<Eigen::half>(name);
                if (dtype == DType::float32) (void)file.matrix<float>(name);
            }
            elements_bytes += file.bytes(name).size();
        }
        check(elements_bytes <= bytes.size(), "the tensors have more bytes than the file");
        check_round_trip(file);
        return true;
    } catch (const kvplane::Error& error) {
        check(error.code() == kvplane::ErrorCode::format, error.what());
        check(std::strlen(error.what()) < 1000, "a sentence that is too long");
        return false;
    }
}

Bytes valid_file(unsigned choice) {
    SafetensorsWriter writer;
    if (choice & 1) writer.metadata("layout", "[tokens, heads, head_dim]");
    writer.add("layers.0.keys", Eigen::MatrixXf::Ones(3, 4).cast<Eigen::half>(), {3, 2, 2});
    if (choice & 2) writer.add("layers.0.values", Eigen::MatrixXf::Identity(2, 2));
    if (choice & 4) writer.add("ids", Eigen::Vector2i(1, 2));
    if (choice & 8) writer.add("tiles", Eigen::Vector<std::uint8_t, 5>::Constant(7));
    if (choice & 16) writer.add("\xC3\xA9\n\"", Eigen::Vector<double, 0>());
    return writer.to_bytes();
}

}  // namespace

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most,
                                               unsigned seed) {
    std::minstd_rand random(seed);
    if (size < 8 || random() % 64 == 0) {
        const Bytes file = valid_file(static_cast<unsigned>(random()));
        if (file.size() > most) return LLVMFuzzerMutate(data, size, most);
        std::memcpy(data, file.data(), file.size());
        return file.size();
    }
    if (random() % 8 == 0) return LLVMFuzzerMutate(data, size, most);
    std::uint64_t header_bytes;
    std::memcpy(&header_bytes, data, 8);
    if (header_bytes > size - 8) return LLVMFuzzerMutate(data, size, most);

    // Change the header alone, put the data behind it again, and make the length true.
    const Bytes rest(reinterpret_cast<std::byte*>(data) + 8 + header_bytes,
                     reinterpret_cast<std::byte*>(data) + size);
    header_bytes = LLVMFuzzerMutate(data + 8, static_cast<std::size_t>(header_bytes), most - 8 - rest.size());
    std::memcpy(data, &header_bytes, 8);
    if (!rest.empty()) std::memcpy(data + 8 + header_bytes, rest.data(), rest.size());
    return 8 + static_cast<std::size_t>(header_bytes) + rest.size();
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const auto bytes = std::as_bytes(std::span(data, size));
    const bool accepted = read_all(bytes);
    // The same file at an odd address, where the data must be copied to be aligned.
    Bytes shifted(size + 1);
    std::copy(bytes.begin(), bytes.end(), shifted.begin() + 1);
    check(read_all(std::span(shifted).subspan(1)) == accepted, "alignment decides what is refused");
    return 0;
}
