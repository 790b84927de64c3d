// examples/engine/gguf.hpp: reads GGUF 3 files: the metadata, and tensors turned into float row by row.
//
// A GGUF file is a header (magic, version, two counts), metadata (key, type, value), a description of every
// tensor (name, dimensions, type, offset), padding, and the tensors' data. All numbers are little-endian.
// The file is mapped, not read: a Gguf is a list of views, so opening 100 MB takes no time and weights stay
// in the few bits they are stored in until a row is asked for.
//
// Nothing in a file is trusted. Every length is compared with the bytes that are left before it is used, so
// the reader never looks outside the file and never allocates more than a small multiple of its size. What
// is refused, as kvplane::Error with the byte or the name where it happened:
//   format    malformed content: truncated, a count or length that does not fit, an unknown value type, an
//             array of arrays, a name that appears twice, tensors that are unaligned, overlap or leave the
//             file
//   mismatch  well-formed, but not for this reader: another GGUF version, a tensor type it does not know,
//             metadata that is missing or of another type than asked for
//   io        the operating system could not open or map the file
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/io/file.hpp"
#include "kvplane/matrix.hpp"

namespace engine {

using kvplane::ErrorCode;
using kvplane::Index;

static_assert(std::endian::native == std::endian::little, "GGUF numbers are read as they stand");

// ---------------------------------------------------------------------------------------------------------
// What a file holds
// ---------------------------------------------------------------------------------------------------------

/// The types of metadata values, numbered as in the file.
enum class ValueType : std::uint32_t {
    uint8 = 0,
    int8 = 1,
    uint16 = 2,
    int16 = 3,
    uint32 = 4,
    int32 = 5,
    float32 = 6,
    boolean = 7,
    text = 8,
    array = 9,
    uint64 = 10,
    int64 = 11,
    float64 = 12,
};

/// One metadata value: a scalar, a text, or an array of either. A view of the file, checked when it was read.
/// The accessors throw Error (mismatch) where the value is of another kind and (index) past the end.
struct Value {
    std::string_view key;
    ValueType type;    ///< of the value, or of an array's elements; never `array`
    bool is_array;     ///< arrays of arrays do not exist
    std::size_t size;  ///< number of elements; 1 for what is no array
    std::span<const std::byte> bytes;

    /// Element `index` of any integer type.
    std::int64_t integer(std::size_t index = 0) const;
    /// Element `index` of any integer or floating-point type.
    double number(std::size_t index = 0) const;
    bool flag(std::size_t index = 0) const;
    std::string_view text() const;
    std::vector<std::string_view> texts() const;
};

/// How a tensor's values are packed: blocks of `values` values in `bytes` bytes, numbered as in the file.
struct BlockFormat {
    std::uint32_t type;
    const char* name;
    Index values;
    Index bytes;
    void (*to_float)(const std::byte* blocks, Index count, float* out);
};

/// A tensor as a matrix: `columns` is the first dimension of the file (the one that lies together in memory),
/// `rows` the product of all others. A weight that maps `columns` inputs to `rows` outputs is y = W x.
struct Tensor {
    std::string_view name;
    const BlockFormat* format;
    Index rows;
    Index columns;
    std::span<const std::byte> bytes;

    /// Writes `count` rows, from `first` on, to out[0 .. count * columns). Throws Error (index).
    void to_float(Index first, Index count, float* out) const;
};

/// The metadata and tensors of a GGUF file. All views that it hands out stay valid as long as it (or what it
/// was moved to) lives; made from a span, as long as that memory does.
class Gguf {
  public:
    /// Maps a file. Throws Error (io, format, mismatch).
    static Gguf open(const std::string& path);
    /// Reads a file that is in memory already. Throws Error (format, mismatch).
    explicit Gguf(std::span<const std::byte> bytes);

    const std::vector<Value>& values() const noexcept { return values_; }
    const std::vector<Tensor>& tensors() const noexcept { return tensors_; }

    /// The value of a key, or null.
    const Value* find_value(std::string_view key) const;
    /// The value of a key. Throws Error (mismatch) where there is none.
    const Value& value(std::string_view key) const;
    /// The tensor of that name, or null.
    const Tensor* find_tensor(std::string_view name) const;
    /// The tensor of that name. Throws Error (mismatch) where there is none or its shape is another.
    const Tensor& tensor(std::string_view name, Index rows, Index columns) const;

  private:
    std::shared_ptr<const std::byte> file_;  // the mapping; nullptr where the memory is the caller's
    std::vector<Value> values_;
    std::vector<Tensor> tensors_;
    std::unordered_map<std::string_view, std::size_t> value_of_key_, tensor_of_name_;
};

// ---------------------------------------------------------------------------------------------------------
// Implementation
// ---------------------------------------------------------------------------------------------------------

namespace detail {

/// The number that starts at a byte, which need not be aligned.
template <class Number>
Number load(const std::byte* at) noexcept {
    Number number;
    std::memcpy(&number, at, sizeof number);
    return number;
}

/// fp16 to float, exactly. Scaling by 2^112 instead of adjusting the exponent makes subnormals come out
/// right, and needs no branch: Eigen::half's conversion took longer than unpacking the block's 32 values.
inline float half_to_float(std::uint16_t half) noexcept {
    const std::uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
    const bool is_infinite_or_nan = (half & 0x7c00u) == 0x7c00u;
    const std::uint32_t bits =
        is_infinite_or_nan ? magnitude | 0x7f800000u : std::bit_cast<std::uint32_t>(scaled);
    return std::bit_cast<float>(bits | sign);
}

inline float load_half(const std::byte* at) noexcept {
    return half_to_float(load<std::uint16_t>(at));
}

inline void f32_to_float(const std::byte* blocks, Index count, float* out) noexcept {
    std::memcpy(out, blocks, static_cast<std::size_t>(count) * sizeof(float));
}

inline void f16_to_float(const std::byte* blocks, Index count, float* out) noexcept {
    for (Index i = 0; i < count; ++i) out[i] = load_half(blocks + 2 * i);
}

// In the loops over one block below, unrolling is switched off because both compilers, when they unroll such
// a short loop completely, no longer vectorize it: three to five times slower.

/// 32 values in 34 bytes: fp16 step, 32 signed bytes.
inline void q8_0_to_float(const std::byte* __restrict block, Index count, float* __restrict out) noexcept {
    for (Index b = 0; b < count; ++b, block += 34, out += 32) {
        const float step = load_half(block);
        const auto* codes = reinterpret_cast<const signed char*>(block + 2);
#pragma GCC unroll 1
        for (int i = 0; i < 32; ++i) out[i] = step * static_cast<float>(codes[i]);
    }
}

/// 16 bytes of two 4-bit codes: value i from the low half of byte i, value i + 16 from its high half.
inline void nibbles_to_float(const std::byte* __restrict bytes, float step, float lower,
                             float* __restrict out) noexcept {
    const auto* pairs = reinterpret_cast<const unsigned char*>(bytes);
#pragma GCC unroll 1
    for (int i = 0; i < 16; ++i) {
        const int pair = pairs[i];
        out[i] = step * static_cast<float>(pair & 15) + lower;
        out[i + 16] = step * static_cast<float>(pair >> 4) + lower;
    }
}

/// 32 values in 18 bytes: fp16 step, 4-bit codes around 8.
inline void q4_0_to_float(const std::byte* __restrict block, Index count, float* __restrict out) noexcept {
    for (Index b = 0; b < count; ++b, block += 18, out += 32) {
        const float step = load_half(block);
        nibbles_to_float(block + 2, step, -8 * step, out);
    }
}

/// 32 values in 20 bytes: fp16 step, fp16 lower end, 4-bit codes.
inline void q4_1_to_float(const std::byte* __restrict block, Index count, float* __restrict out) noexcept {
    for (Index b = 0; b < count; ++b, block += 20, out += 32)
        nibbles_to_float(block + 4, load_half(block), load_half(block + 2), out);
}

/// 32 values in 22 bytes: fp16 step, 32 high bits, 16 bytes of low halves; 5-bit codes around 16.
inline void q5_0_to_float(const std::byte* __restrict block, Index count, float* __restrict out) noexcept {
    for (Index b = 0; b < count; ++b, block += 22, out += 32) {
        const float step = load_half(block);
        const auto high = load<std::uint32_t>(block + 2);
        const auto* pairs = reinterpret_cast<const unsigned char*>(block + 6);
#pragma GCC unroll 1
        for (unsigned i = 0; i < 16; ++i) {
            const auto low = static_cast<int>((pairs[i] & 15u) | (high >> i & 1u) << 4);
            const auto upper = static_cast<int>((pairs[i] >> 4) | (high >> (i + 16) & 1u) << 4);
            out[i] = step * static_cast<float>(low - 16);
            out[i + 16] = step * static_cast<float>(upper - 16);
        }
    }
}

/// The steps and lower ends of the 8 groups of 32 values of a Q4_K or Q5_K block, 6 bits each in 12 bytes.
struct GroupScales {
    int step[8], lower[8];
};
inline GroupScales group_scales(const std::byte* bytes) noexcept {
    const auto* packed = reinterpret_cast<const unsigned char*>(bytes);
    GroupScales scales;
    for (int g = 0; g < 4; ++g) {
        scales.step[g] = packed[g] & 63;
        scales.lower[g] = packed[g + 4] & 63;
        // The upper groups have four bits in the last bytes, and two on top of the lower groups'.
        scales.step[g + 4] = (packed[g + 8] & 15) | packed[g] >> 6 << 4;
        scales.lower[g + 4] = packed[g + 8] >> 4 | packed[g + 4] >> 6 << 4;
    }
    return scales;
}

/// 256 values: fp16 step, fp16 lower end, 12 bytes of both by group; of Q5_K 32 bytes of high bits, bit g of
/// byte i that of value i of group g; 128 bytes of two 4-bit codes, those of groups 2 k and 2 k + 1 in 32
/// bytes.
template <bool five_bits>
void k_groups_to_float(const std::byte* __restrict block, Index count, float* __restrict out) noexcept {
    constexpr int bytes = five_bits ? 176 : 144, first_code = five_bits ? 48 : 16;
    for (Index b = 0; b < count; ++b, block += bytes, out += 256) {
        const GroupScales scales = group_scales(block + 4);
        const auto* high = reinterpret_cast<const unsigned char*>(block + 16);
        const auto* pairs = reinterpret_cast<const unsigned char*>(block + first_code);
        for (int g = 0; g < 8; ++g) {
            const float step = load_half(block) * static_cast<float>(scales.step[g]);
            const float lower = load_half(block + 2) * static_cast<float>(scales.lower[g]);
            const int shift = g % 2 * 4;
#pragma GCC unroll 1
            for (int i = 0; i < 32; ++i) {
                int code = pairs[32 * (g / 2) + i] >> shift & 15;
                if constexpr (five_bits) code |= (high[i] >> g & 1) << 4;
                out[32 * g + i] = step * static_cast<float>(code) - lower;
            }
        }
    }
}

/// 128 values of a Q6_K block: 64 bytes of low halves, 32 bytes of high pairs, 8 scales of 16 values each.
/// Value 32 k + i has its low four bits in byte i + 32 (k mod 2), upper half for k >= 2, and its high two
/// bits at position 2 k of high byte i.
inline void q6_k_half_to_float(const unsigned char* __restrict low, const unsigned char* __restrict high,
                               const signed char* __restrict scales, float step,
                               float* __restrict out) noexcept {
    for (int k = 0; k < 4; ++k) {
        const int low_shift = k / 2 * 4, high_shift = 2 * k;
        for (int part = 0; part < 32; part += 16) {
            const float scale = step * static_cast<float>(scales[2 * k + part / 16]);
#pragma GCC unroll 1
            for (int i = part; i < part + 16; ++i) {
                const int low_bits = low[i + 32 * (k % 2)] >> low_shift & 15;
                const int high_bits = high[i] >> high_shift & 3;
                out[32 * k + i] = scale * static_cast<float>((low_bits | high_bits << 4) - 32);
            }
        }
    }
}

/// 256 values in 210 bytes: 128 of low halves, 64 of high pairs, 16 signed scales, fp16 step.
inline void q6_k_to_float(const std::byte* block, Index count, float* out) noexcept {
    for (Index b = 0; b < count; ++b, block += 210, out += 256) {
        const auto* low = reinterpret_cast<const unsigned char*>(block);
        const auto* scales = reinterpret_cast<const signed char*>(block + 192);
        const float step = load_half(block + 208);
        for (int half = 0; half < 2; ++half)
            q6_k_half_to_float(low + 64 * half, low + 128 + 32 * half, scales + 8 * half, step,
                               out + 128 * half);
    }
}

inline constexpr std::array<BlockFormat, 9> block_formats{{
    {0, "F32", 1, 4, f32_to_float},
    {1, "F16", 1, 2, f16_to_float},
    {2, "Q4_0", 32, 18, q4_0_to_float},
    {3, "Q4_1", 32, 20, q4_1_to_float},
    {6, "Q5_0", 32, 22, q5_0_to_float},
    {8, "Q8_0", 32, 34, q8_0_to_float},
    {12, "Q4_K", 256, 144, k_groups_to_float<false>},
    {13, "Q5_K", 256, 176, k_groups_to_float<true>},
    {14, "Q6_K", 256, 210, q6_k_to_float},
}};

/// "F32 (0), F16 (1), ...", for the sentence of an error.
inline std::string known_formats() {
    std::string names;
    for (const BlockFormat& format : block_formats)
        names +=
            (names.empty() ? "" : ", ") + std::string(format.name) + " (" + std::to_string(format.type) + ")";
    return names;
}

/// Bytes of one value in a file. 0 for text and array, whose length is in the file.
constexpr std::size_t bytes_of(ValueType type) noexcept {
    switch (type) {
        case ValueType::uint8:
        case ValueType::int8:
        case ValueType::boolean:
            return 1;
        case ValueType::uint16:
        case ValueType::int16:
            return 2;
        case ValueType::uint32:
        case ValueType::int32:
        case ValueType::float32:
            return 4;
        case ValueType::uint64:
        case ValueType::int64:
        case ValueType::float64:
            return 8;
        case ValueType::text:
        case ValueType::array:
            return 0;
    }
    return 0;
}

constexpr const char* name(ValueType type) noexcept {
    constexpr const char* names[] = {"uint8",   "int8", "uint16", "int16",  "uint32", "int32",  "float32",
                                     "boolean", "text", "array",  "uint64", "int64",  "float64"};
    return names[static_cast<std::uint32_t>(type)];
}

/// A place in a file. Every step forward is checked first; `what` names in the error what was to be read.
class Cursor {
  public:
    explicit Cursor(std::span<const std::byte> bytes) : bytes_(bytes) {}

    std::size_t position() const noexcept { return position_; }
    std::size_t left() const noexcept { return bytes_.size() - position_; }

    std::span<const std::byte> take(std::uint64_t count, std::string_view what) {
        kvplane::require(count <= left(), ErrorCode::format, "GGUF: ", what, " at byte ", position_,
                         " needs ", count, " bytes, but the file has only ", left(), " more");
        position_ += static_cast<std::size_t>(count);
        return bytes_.subspan(position_ - static_cast<std::size_t>(count), static_cast<std::size_t>(count));
    }

    template <class Number>
    Number number(std::string_view what) {
        return load<Number>(take(sizeof(Number), what).data());
    }

    std::string_view text(std::string_view what) {
        const auto length = number<std::uint64_t>(what);
        const auto bytes = take(length, what);
        return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
    }

    /// A number of items that take at least `least_bytes` each, so that an absurd one fails here.
    std::size_t count(std::size_t least_bytes, std::string_view what) {
        const std::size_t at = position_;
        const auto count = number<std::uint64_t>(what);
        kvplane::require(count <= left() / least_bytes, ErrorCode::format, "GGUF: ", what, " at byte ", at,
                         ": ", count, ", but the file has only ", left(), " more bytes");
        return static_cast<std::size_t>(count);
    }

  private:
    std::span<const std::byte> bytes_;
    std::size_t position_ = 0;
};

inline ValueType read_value_type(Cursor& cursor, std::string_view key) {
    const auto type = cursor.number<std::uint32_t>("a value type");
    kvplane::require(type <= static_cast<std::uint32_t>(ValueType::float64), ErrorCode::format,
                     "GGUF: metadata '", key, "' has value type ", type, ", expected 0 to 12");
    return static_cast<ValueType>(type);
}

inline Value read_value(Cursor& cursor) {
    const std::string_view key = cursor.text("a metadata key");
    Value value{key, read_value_type(cursor, key), false, 1, {}};
    if (value.type == ValueType::array) {
        value.is_array = true;
        value.type = read_value_type(cursor, key);
        kvplane::require(value.type != ValueType::array, ErrorCode::format, "GGUF: metadata '", key,
                         "' is an array of arrays, which this reader does not accept");
        value.size = cursor.count(value.type == ValueType::text ? 8 : bytes_of(value.type), key);
    }
    if (value.type == ValueType::text) {
        Cursor ahead = cursor;
        for (std::size_t i = 0; i < value.size; ++i) ahead.text(key);
        value.bytes = cursor.take(ahead.position() - cursor.position(), key);
    } else {
        value.bytes = cursor.take(value.size * bytes_of(value.type), key);
    }
    if (value.type == ValueType::boolean)
        for (const std::byte byte : value.bytes)
            kvplane::require(byte <= std::byte{1}, ErrorCode::format, "GGUF: metadata '", key,
                             "' has a boolean of ", std::to_integer<int>(byte), ", expected 0 or 1");
    return value;
}

/// A tensor's description. `offset` gets the place of its data, counted from where all data starts; `bytes`
/// stays empty until that is known, and `size` gets their number.
inline Tensor read_tensor(Cursor& cursor, std::uint64_t& offset, std::uint64_t& size) {
    const std::string_view tensor_name = cursor.text("a tensor name");
    const auto dimensions = cursor.number<std::uint32_t>("a tensor's number of dimensions");
    kvplane::require(dimensions >= 1 && dimensions <= 4, ErrorCode::format, "GGUF: tensor '", tensor_name,
                     "' has ", dimensions, " dimensions, expected 1 to 4");
    std::uint64_t columns = 1, rows = 1;
    for (std::uint32_t d = 0; d < dimensions; ++d) {
        const auto dimension = cursor.number<std::uint64_t>("a tensor dimension");
        constexpr std::uint64_t most = std::uint64_t{1} << 48;  // so that no product below overflows
        kvplane::require(dimension >= 1 && dimension < most && rows * columns <= most / dimension,
                         ErrorCode::format, "GGUF: tensor '", tensor_name, "': dimension ", d, " is ",
                         dimension, ", expected at least 1 and fewer than 2^48 values in all");
        (d == 0 ? columns : rows) *= dimension;
    }
    const auto type = cursor.number<std::uint32_t>("a tensor type");
    offset = cursor.number<std::uint64_t>("a tensor offset");

    const auto* format =
        std::ranges::find_if(block_formats, [type](const BlockFormat& known) { return known.type == type; });
    kvplane::require(format != block_formats.end(), ErrorCode::mismatch, "GGUF: tensor '", tensor_name,
                     "' has type ", type, "; this reader knows ", known_formats());
    kvplane::require(columns % static_cast<std::uint64_t>(format->values) == 0, ErrorCode::format,
                     "GGUF: tensor '", tensor_name, "' has rows of ", columns,
                     " values, expected a multiple of ", format->values, " for ", format->name);
    size = rows * (columns / static_cast<std::uint64_t>(format->values)) *
           static_cast<std::uint64_t>(format->bytes);
    return {tensor_name, format, static_cast<Index>(rows), static_cast<Index>(columns), {}};
}

inline std::uint64_t read_alignment(const Gguf& file) {
    const Value* value = file.find_value("general.alignment");
    if (!value) return 32;
    const std::int64_t alignment = value->integer();
    kvplane::require(alignment >= 8 && alignment <= (1 << 20) && alignment % 8 == 0, ErrorCode::format,
                     "GGUF: general.alignment is ", alignment, ", expected a multiple of 8 up to 2^20");
    return static_cast<std::uint64_t>(alignment);
}

/// No two tensors may share a byte: the reader would not mind, but such a file is not what it says.
inline void require_apart(const std::vector<Tensor>& tensors) {
    std::vector<const Tensor*> in_order;
    for (const Tensor& tensor : tensors) in_order.push_back(&tensor);
    std::ranges::sort(in_order, {}, [](const Tensor* tensor) { return tensor->bytes.data(); });
    for (std::size_t i = 1; i < in_order.size(); ++i)
        kvplane::require(
            in_order[i - 1]->bytes.data() + in_order[i - 1]->bytes.size() <= in_order[i]->bytes.data(),
            ErrorCode::format, "GGUF: the data of tensors '", in_order[i - 1]->name, "' and '",
            in_order[i]->name, "' overlap");
}

inline void require_element(const Value& value, std::size_t index) {
    kvplane::require(index < value.size, ErrorCode::index, "GGUF: metadata '", value.key, "': element ",
                     index, " of ", value.size);
}

[[noreturn]] inline void fail_type(const Value& value, const char* expected) {
    kvplane::fail(ErrorCode::mismatch, "GGUF: metadata '", value.key, "' is ",
                  value.is_array ? "an array of " : "a ", name(value.type), ", expected ", expected);
}

inline bool is_integer(ValueType type) noexcept {
    return type != ValueType::float32 && type != ValueType::float64 && type != ValueType::boolean &&
           type != ValueType::text && type != ValueType::array;
}

}  // namespace detail

inline std::int64_t Value::integer(std::size_t index) const {
    if (!detail::is_integer(type)) detail::fail_type(*this, "an integer");
    detail::require_element(*this, index);
    const std::byte* at = bytes.data() + index * detail::bytes_of(type);
    switch (type) {
        case ValueType::uint8:
            return detail::load<std::uint8_t>(at);
        case ValueType::int8:
            return detail::load<std::int8_t>(at);
        case ValueType::uint16:
            return detail::load<std::uint16_t>(at);
        case ValueType::int16:
            return detail::load<std::int16_t>(at);
        case ValueType::uint32:
            return detail::load<std::uint32_t>(at);
        case ValueType::int32:
            return detail::load<std::int32_t>(at);
        case ValueType::int64:
            return detail::load<std::int64_t>(at);
        default:
            break;
    }
    const auto large = detail::load<std::uint64_t>(at);
    if (large > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
        detail::fail_type(*this, "one below 2^63");
    return static_cast<std::int64_t>(large);
}

inline double Value::number(std::size_t index) const {
    if (detail::is_integer(type)) return static_cast<double>(integer(index));
    if (type != ValueType::float32 && type != ValueType::float64) detail::fail_type(*this, "a number");
    detail::require_element(*this, index);
    if (type == ValueType::float32) return detail::load<float>(bytes.data() + 4 * index);
    return detail::load<double>(bytes.data() + 8 * index);
}

inline bool Value::flag(std::size_t index) const {
    if (type != ValueType::boolean) detail::fail_type(*this, "a boolean");
    detail::require_element(*this, index);
    return bytes[index] != std::byte{0};
}

inline std::string_view Value::text() const {
    if (type != ValueType::text || is_array) detail::fail_type(*this, "a text");
    return detail::Cursor(bytes).text(key);
}

inline std::vector<std::string_view> Value::texts() const {
    if (type != ValueType::text) detail::fail_type(*this, "an array of texts");
    std::vector<std::string_view> result(size);
    detail::Cursor cursor(bytes);
    for (std::string_view& element : result) element = cursor.text(key);
    return result;
}

inline void Tensor::to_float(Index first, Index count, float* out) const {
    kvplane::require(first >= 0 && count >= 0 && count <= rows - first, ErrorCode::index, "tensor '", name,
                     "': rows ", first, " to ", first + count, " of ", rows);
    const Index blocks_of_row = columns / format->values;
    format->to_float(bytes.data() + first * blocks_of_row * format->bytes, count * blocks_of_row, out);
}

inline Gguf::Gguf(std::span<const std::byte> bytes) {
    detail::Cursor cursor(bytes);
    const auto magic = cursor.take(4, "the magic");
    kvplane::require(std::memcmp(magic.data(), "GGUF", 4) == 0, ErrorCode::format,
                     "GGUF: the file does not start with the bytes 'GGUF'");
    const auto version = cursor.number<std::uint32_t>("the version");
    kvplane::require(version == 3, ErrorCode::mismatch, "GGUF: version ", version, ", expected 3",
                     version == 0x03000000 ? " (this is a big-endian file)" : "");
    const std::size_t tensor_count = cursor.count(33, "the number of tensors");
    const std::size_t value_count = cursor.count(13, "the number of metadata values");

    for (std::size_t i = 0; i < value_count; ++i) {
        values_.push_back(detail::read_value(cursor));
        kvplane::require(value_of_key_.emplace(values_.back().key, i).second, ErrorCode::format,
                         "GGUF: metadata '", values_.back().key, "' appears twice");
    }
    std::vector<std::pair<std::uint64_t, std::uint64_t>> places(tensor_count);  // offset, size
    for (std::size_t i = 0; i < tensor_count; ++i) {
        tensors_.push_back(detail::read_tensor(cursor, places[i].first, places[i].second));
        kvplane::require(tensor_of_name_.emplace(tensors_.back().name, i).second, ErrorCode::format,
                         "GGUF: tensor '", tensors_.back().name, "' appears twice");
    }
    if (tensor_count == 0) return;

    const std::uint64_t alignment = detail::read_alignment(*this);
    cursor.take((alignment - cursor.position() % alignment) % alignment, "the padding before the tensors");
    const std::uint64_t data_size = cursor.left();
    const std::byte* data = cursor.take(data_size, "the tensors").data();
    for (std::size_t i = 0; i < tensor_count; ++i) {
        const auto [offset, size] = places[i];
        kvplane::require(offset % alignment == 0, ErrorCode::format, "GGUF: tensor '", tensors_[i].name,
                         "' is at offset ", offset, ", expected a multiple of ", alignment);
        kvplane::require(offset <= data_size && size <= data_size - offset, ErrorCode::format,
                         "GGUF: tensor '", tensors_[i].name, "' has ", size, " bytes at offset ", offset,
                         ", but the data of all tensors ends at ", data_size);
        tensors_[i].bytes = {data + offset, static_cast<std::size_t>(size)};
    }
    detail::require_apart(tensors_);
}

inline Gguf Gguf::open(const std::string& path) {
    const kvplane::MappedFile file = kvplane::MappedFile::open(path);
    kvplane::require(!file.bytes().empty(), ErrorCode::io, "'", path, "' is not a file with content");
    Gguf gguf(file.bytes());
    gguf.file_ = file.owner();
    return gguf;
}

inline const Value* Gguf::find_value(std::string_view key) const {
    const auto found = value_of_key_.find(key);
    return found == value_of_key_.end() ? nullptr : &values_[found->second];
}

inline const Value& Gguf::value(std::string_view key) const {
    const Value* found = find_value(key);
    kvplane::require(found, ErrorCode::mismatch, "GGUF: there is no metadata '", key, "'");
    return *found;
}

inline const Tensor* Gguf::find_tensor(std::string_view name) const {
    const auto found = tensor_of_name_.find(name);
    return found == tensor_of_name_.end() ? nullptr : &tensors_[found->second];
}

inline const Tensor& Gguf::tensor(std::string_view name, Index rows, Index columns) const {
    const Tensor* found = find_tensor(name);
    kvplane::require(found, ErrorCode::mismatch, "GGUF: there is no tensor '", name, "'");
    kvplane::require(found->rows == rows && found->columns == columns, ErrorCode::mismatch, "GGUF: tensor '",
                     name, "' is ", found->rows, " x ", found->columns, ", expected ", rows, " x ", columns);
    return *found;
}

}  // namespace engine
