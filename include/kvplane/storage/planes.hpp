// kvplane/storage/planes.hpp: how a b-bit code splits into planes, and how planes are packed.
//
// A code is stored most significant plane first, so a prefix of the planes is a coarser code:
//
//   bits     1    2    3      4    5      6      7        8      16 (an fp16 value)
//   planes  {1}  {2}  {2,1}  {4}  {4,1}  {4,2}  {4,2,1}  {4,4}  {8,4,4}
//
// Two packings of one plane:
//   row packing   one token after another, code c of a row in the bits [c w, (c+1) w) of it, low bits first;
//                 every row starts at a byte. Used by Quantized: any shape, any row range.
//   unit packing  64-byte units in the order in which the attention kernels read them; see tile_format.hpp.
//
// Why powers of two: a 3-bit field straddles bytes, and unpacking it costs more instructions a code than the
// dot product that follows; a 2-bit and a 1-bit plane cost a shift and a mask each. Fixed by the format and
// not by a vector length, so a stored cache decodes on any machine.
#pragma once

#include <Eigen/Core>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kvplane/error.hpp"
#include "kvplane/simd/isa.hpp"

namespace kvplane {

using Index = Eigen::Index;

/// The planes of one width, most significant first.
struct PlaneSplit {
    /// The most that any width has.
    static constexpr int max_planes = 3;

    int count = 0;
    std::array<int, max_planes> width{};  ///< bits of each plane; 0 beyond `count`

    constexpr int bits() const noexcept {
        int sum = 0;
        for (const int w : width) sum += w;
        return sum;
    }
    /// Whether the codes are fp16 numbers, which have no grid.
    constexpr bool is_half() const noexcept { return bits() == 16; }
    /// Bits below plane p: what its code is shifted down by.
    constexpr int shift(int p) const noexcept {
        int below = 0;
        for (int i = p + 1; i < count; ++i) below += width[static_cast<std::size_t>(i)];
        return below;
    }
    constexpr int operator[](int p) const noexcept { return width[static_cast<std::size_t>(p)]; }
    /// The bits that the first `planes` planes hold together.
    constexpr int prefix_bits(int planes) const noexcept {
        return bits() - (planes > 0 ? shift(planes - 1) : bits());
    }
    constexpr bool operator==(const PlaneSplit&) const = default;
};

/// The split of a b-bit code, b in 1..8 or 16. Throws Error (option) for another width.
constexpr PlaneSplit plane_split(int bits) {
    switch (bits) {
        case 1:
            return {1, {1}};
        case 2:
            return {1, {2}};
        case 3:
            return {2, {2, 1}};
        case 4:
            return {1, {4}};
        case 5:
            return {2, {4, 1}};
        case 6:
            return {2, {4, 2}};
        case 7:
            return {3, {4, 2, 1}};
        case 8:
            return {2, {4, 4}};
        case 16:
            return {3, {8, 4, 4}};
        default:
            fail(ErrorCode::option, "bits: ", bits, ", expected 1 to 8 or 16");
    }
}

/// Bytes of one packed row of `codes` codes, `width` bits each.
constexpr Index row_bytes(Index codes, int width) noexcept {
    return (codes * width + 7) / 8;
}

namespace detail {

inline std::uint64_t load_u64(const void* from) noexcept {
    std::uint64_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline std::uint32_t load_u32(const void* from) noexcept {
    std::uint32_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store_u32(void* to, std::uint32_t value) noexcept {
    std::memcpy(to, &value, sizeof value);
}

/// Eight codes, one a byte, to the low 8 * width bits: three halving steps.
constexpr std::uint64_t gather_bits(std::uint64_t codes, int width) noexcept {
    const std::uint64_t pair = 0x0001000100010001ull * ((1ull << (2 * width)) - 1);
    const std::uint64_t quad = 0x0000000100000001ull * ((1ull << (4 * width)) - 1);
    codes = (codes | codes >> (8 - width)) & pair;
    codes = (codes | codes >> (16 - 2 * width)) & quad;
    return (codes | codes >> (32 - 4 * width)) & ((1ull << (8 * width)) - 1);
}
/// The inverse of gather_bits.
constexpr std::uint64_t spread_bits(std::uint64_t bits, int width) noexcept {
    const std::uint64_t quad = 0x0000000100000001ull * ((1ull << (4 * width)) - 1);
    const std::uint64_t pair = 0x0001000100010001ull * ((1ull << (2 * width)) - 1);
    const std::uint64_t one = 0x0101010101010101ull * ((1ull << width) - 1);
    bits = (bits | bits << (32 - 4 * width)) & quad;
    bits = (bits | bits << (16 - 2 * width)) & pair;
    return (bits | bits << (8 - width)) & one;
}

template <int width>
inline void pack_row(const std::uint8_t* codes, Index count, int shift, std::byte* packed) noexcept {
    constexpr std::uint64_t mask = 0x0101010101010101ull * ((1u << width) - 1);
    Index i = 0;
    for (; i + 8 <= count; i += 8, packed += width) {
        const std::uint64_t bits = gather_bits(load_u64(codes + i) >> shift & mask, width);
        std::memcpy(packed, &bits, width);
    }
    if (i == count) return;
    std::uint64_t tail = 0;
    std::memcpy(&tail, codes + i, static_cast<std::size_t>(count - i));
    const std::uint64_t bits = gather_bits(tail >> shift & mask, width);
    std::memcpy(packed, &bits, static_cast<std::size_t>(row_bytes(count - i, width)));
}

/// codes = codes << width | plane, for eight codes at a time; `first` starts from nothing.
template <int width>
inline void unpack_row(const std::byte* packed, Index count, bool first, std::uint8_t* codes) noexcept {
    constexpr std::uint64_t keep = 0x0101010101010101ull * ((0xFFu >> width) & 0xFFu);
    const auto merge = [&](std::uint64_t high, std::uint64_t bits) {
        return (first ? 0 : (high & keep) << width) | spread_bits(bits, width);
    };
    Index i = 0;
    for (; i + 8 <= count; i += 8, packed += width) {
        std::uint64_t bits = 0;
        std::memcpy(&bits, packed, width);
        const std::uint64_t merged = merge(first ? 0 : load_u64(codes + i), bits);
        std::memcpy(codes + i, &merged, 8);
    }
    if (i == count) return;
    const auto rest = static_cast<std::size_t>(count - i);
    std::uint64_t bits = 0, high = 0;
    std::memcpy(&bits, packed, static_cast<std::size_t>(row_bytes(count - i, width)));
    if (!first) std::memcpy(&high, codes + i, rest);
    const std::uint64_t merged = merge(high, bits);
    std::memcpy(codes + i, &merged, rest);
}

}  // namespace detail

/// Packs `width` (1, 2 or 4) bits of each of `count` codes, those from bit `shift` up, into row_bytes()
/// bytes.
inline void pack_row(const std::uint8_t* codes, Index count, int width, int shift,
                     std::byte* packed) noexcept {
    switch (width) {
        case 1:
            return detail::pack_row<1>(codes, count, shift, packed);
        case 2:
            return detail::pack_row<2>(codes, count, shift, packed);
        default:
            return detail::pack_row<4>(codes, count, shift, packed);
    }
}

/// Appends one more plane to `count` codes: code = code << width | plane. `first`: there is none before it.
inline void unpack_row(const std::byte* packed, Index count, int width, bool first,
                       std::uint8_t* codes) noexcept {
    switch (width) {
        case 1:
            return detail::unpack_row<1>(packed, count, first, codes);
        case 2:
            return detail::unpack_row<2>(packed, count, first, codes);
        default:
            return detail::unpack_row<4>(packed, count, first, codes);
    }
}

}  // namespace kvplane
