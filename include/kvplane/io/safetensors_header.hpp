// kvplane/io/safetensors_header.hpp: what the header of a safetensors file says, read and written.
//
// A safetensors file is [header length: 8 bytes, little-endian][header: JSON, padded with spaces][data]. The
// header maps every tensor's name to its dtype, shape and [begin, end) in the data, and "__metadata__" to
// pairs of strings. Tensors are row-major and fill the data without holes.
// https://huggingface.co/docs/safetensors; limits and order as in its reference implementation.
#pragma once

#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

static_assert(std::endian::native == std::endian::little,
              "safetensors data is little-endian and is not converted");

/// The element types that are read and written, in the order in which the reference implementation ranks
/// them; the writer relies on their sizes never falling in this order. Others (BOOL, F8_E4M3, ...) are
/// refused.
enum class DType : std::uint8_t { uint8, int8, float16, bfloat16, int32, float32, float64, int64 };

namespace detail {

struct DTypeFacts {
    DType dtype;
    const char* name;
    std::size_t bytes;
};

inline constexpr std::array<DTypeFacts, 8> dtypes{{{DType::uint8, "U8", 1},
                                                   {DType::int8, "I8", 1},
                                                   {DType::float16, "F16", 2},
                                                   {DType::bfloat16, "BF16", 2},
                                                   {DType::int32, "I32", 4},
                                                   {DType::float32, "F32", 4},
                                                   {DType::float64, "F64", 8},
                                                   {DType::int64, "I64", 8}}};

/// The reader finds an entry at its dtype's number; the writer aligns tensors by the order of sizes.
constexpr bool dtypes_in_order() {
    for (std::size_t i = 0; i < dtypes.size(); ++i) {
        if (static_cast<std::size_t>(dtypes[i].dtype) != i) return false;
        if (i > 0 && dtypes[i].bytes < dtypes[i - 1].bytes) return false;
    }
    return true;
}
static_assert(dtypes_in_order());

}  // namespace detail

/// The dtype as the format spells it: "F16", "BF16", "I32", ...
constexpr const char* name(DType dtype) noexcept {
    return detail::dtypes[static_cast<std::size_t>(dtype)].name;
}

/// Bytes of one element.
constexpr std::size_t bytes_of(DType dtype) noexcept {
    return detail::dtypes[static_cast<std::size_t>(dtype)].bytes;
}

/// The C++ types of the elements.
template <class Scalar>
concept TensorScalar = CacheScalar<Scalar> || std::same_as<Scalar, double> ||
    std::same_as<Scalar, std::int8_t> || std::same_as<Scalar, std::uint8_t> ||
    std::same_as<Scalar, std::int32_t> || std::same_as<Scalar, std::int64_t>;

/// The dtype of a C++ type: dtype_of<Eigen::half> is DType::float16.
template <TensorScalar Scalar>
inline constexpr DType dtype_of = std::same_as<Scalar, float>             ? DType::float32
                                  : std::same_as<Scalar, Eigen::half>     ? DType::float16
                                  : std::same_as<Scalar, Eigen::bfloat16> ? DType::bfloat16
                                  : std::same_as<Scalar, double>          ? DType::float64
                                  : std::same_as<Scalar, std::int8_t>     ? DType::int8
                                  : std::same_as<Scalar, std::uint8_t>    ? DType::uint8
                                  : std::same_as<Scalar, std::int32_t>    ? DType::int32
                                                                          : DType::int64;

/// What the header says of one tensor. `begin` and `end` are bytes from the start of the data.
struct TensorInfo {
    DType dtype = DType::float32;
    std::vector<Index> shape;  ///< outermost first; empty for a single number
    std::size_t begin = 0;
    std::size_t end = 0;

    /// Number of elements.
    Index size() const noexcept { return static_cast<Index>((end - begin) / bytes_of(dtype)); }
};

namespace detail {

/// The longest header that the reference implementation reads, in bytes.
inline constexpr std::uint64_t longest_header = 100'000'000;
inline constexpr std::size_t length_field_bytes = 8;
inline constexpr std::string_view metadata_key = "__metadata__";

using TensorInfos = std::map<std::string, TensorInfo, std::less<>>;
using Metadata = std::map<std::string, std::string, std::less<>>;

/// What a file says before its data.
struct SafetensorsHeader {
    TensorInfos tensors;
    Metadata metadata;
    std::size_t data_at = 0;  ///< where the data begins in the file
};

/// Reads the header of a whole file and checks all of it. `source` stands for the file in error sentences.
/// Throws Error (format).
SafetensorsHeader read_header(std::span<const std::byte> file, const std::string& source);

/// One tensor of a file that is written.
struct NamedTensor {
    const std::string* name;
    TensorInfo info;
};

/// The length field and the padded header: all of the file before the data. Names, keys and values are UTF-8.
/// Throws Error (option) where the header would be longer than the format allows.
std::string written_header(const std::vector<NamedTensor>& tensors, const Metadata& metadata);

/// Whether JSON can hold the text.
bool is_utf8(const std::string& text);

}  // namespace detail

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/io/impl/safetensors_header.hpp"
#endif
