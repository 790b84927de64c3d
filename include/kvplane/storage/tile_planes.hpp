// kvplane/storage/tile_planes.hpp: codes of a tile's segment to planes, in the units of tile_format.hpp, and
// back.
//
// Between quantizer and planes stand codes of one byte, TileCodes: [128 tokens][channels]. pack_segment() and
// unpack_segment() go from one to the other; all else here is how. Vectors are 16 bytes on every instruction
// set, for that is what a unit's four rows of 16 lanes need.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kvplane/simd/vector.hpp"
#include "kvplane/storage/planes.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane::detail {

/// Codes of one segment between quantizer and planes: 128 rows of one byte a code; for fp16 values the high
/// bytes, and the low bytes in a second array. Rows are padded so that the widest unit (32 channels of one
/// bit) stays inside, and the padding is zero.
class TileCodes {
  public:
    explicit TileCodes(Index channels)
        : channels_(channels),
          stride_((channels + 31) / 32 * 32),
          high_(static_cast<std::size_t>(tile_tokens * stride_)),
          low_(high_) {}

    Index stride() const noexcept { return stride_; }
    /// Byte 0: the code, or the high byte of fp16. Byte 1: the low byte of fp16.
    std::uint8_t* byte(int which) noexcept { return which == 0 ? high_.data() : low_.data(); }
    const std::uint8_t* byte(int which) const noexcept { return which == 0 ? high_.data() : low_.data(); }
    std::uint8_t& at(Index token, Index channel, int which = 0) noexcept {
        return byte(which)[token * stride_ + channel];
    }
    /// Makes the padding of some tokens zero again: a tile from elsewhere may have left set bits there.
    void clear_padding(Index first_token, Index tokens) noexcept {
        if (channels_ == stride_) return;
        for (Index t = first_token; t < first_token + tokens; ++t)
            for (int which : {0, 1}) std::fill(&at(t, channels_, which), byte(which) + (t + 1) * stride_, 0);
    }

  private:
    Index channels_;
    Index stride_;
    std::vector<std::uint8_t> high_, low_;
};

/// Which bits of which byte of a code a plane holds.
struct PlaneSource {
    int byte, width, shift;
};
inline PlaneSource plane_source(const PlaneSplit& split, int p) noexcept {
    if (!split.is_half()) return {0, split[p], split.shift(p)};
    return {p == 0 ? 0 : 1, split[p], p == 1 ? 4 : 0};
}

/// A byte array of codes and the distance of its rows.
struct CodeRows {
    const std::uint8_t* codes;
    Index stride;
};

/// One 32-bit lane of a key unit: 32 / width codes, four channels to a byte position, two groups of four at a
/// time.
template <int width>
std::uint32_t key_lane(const std::uint8_t* codes, int shift) noexcept {
    if constexpr (width == 8) return load_u32(codes);
    constexpr std::uint64_t mask = 0x0101010101010101ull * ((1u << width) - 1);
    std::uint64_t pairs = 0;
#pragma GCC unroll 4
    for (int i = 0; i < 4 / width; ++i) pairs |= (load_u64(codes + 8 * i) >> shift & mask) << (2 * i * width);
    return static_cast<std::uint32_t>(pairs | pairs >> (32 - width));
}

using Words4 = simd::Vector<std::uint32_t, 4>;

/// The lanes of one token in four units.
template <int width>
void key_lanes(const std::uint8_t* codes, int shift, Words4& lanes) noexcept {
    if constexpr (width == 8) {
        simd::load(lanes, codes);
    } else if constexpr (width == 4) {
        using Pairs = simd::Vector<std::uint64_t, 2>;
        Pairs pairs[2];
        for (int i = 0; i < 2; ++i) {
            simd::load(pairs[i], codes + 16 * i);
            pairs[i] = pairs[i] >> static_cast<std::uint64_t>(shift) & 0x0F0F0F0F0F0F0F0Full;
            pairs[i] |= pairs[i] >> 28;
        }
        lanes = __builtin_shufflevector((Words4)pairs[0], (Words4)pairs[1], 0, 2, 4, 6);
    } else {
        std::uint32_t lane[4];
        for (int u = 0; u < 4; ++u)
            lane[u] = key_lane<width>(codes + u * TileFormat::unit_depth(width), shift);
        simd::load(lanes, lane);
    }
}

/// Four tokens of four units: a row of `from` is a token's, a row of `to` a unit's.
inline void transpose(const Words4 (&from)[4], Words4 (&to)[4]) noexcept {
    const Words4 a = __builtin_shufflevector(from[0], from[1], 0, 4, 1, 5),
                 b = __builtin_shufflevector(from[0], from[1], 2, 6, 3, 7),
                 c = __builtin_shufflevector(from[2], from[3], 0, 4, 1, 5),
                 d = __builtin_shufflevector(from[2], from[3], 2, 6, 3, 7);
    to[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    to[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    to[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    to[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

/// One plane of a segment, keys.
template <int width>
void pack_key_plane(CodeRows from, Index first_token, Index tokens, Index channels, int shift,
                    std::byte* plane) noexcept {
    constexpr Index depth = TileFormat::unit_depth(width);
    const Index units = (channels + depth - 1) / depth, end = first_token + tokens;
    const auto row = [&](Index t, Index u) { return from.codes + t * from.stride + u * depth; };
    const auto lane = [&](Index t, Index u) {
        return plane + (t / unit_lanes * units + u) * unit_bytes + t % unit_lanes * 4;
    };
    for (Index t = first_token, count; t < end; t += count) {
        Index u = 0;
        count = t % 4 == 0 && end - t >= 4 ? 4 : 1;
        for (; count == 4 && u + 4 <= units; u += 4) {
            Words4 of_token[4], of_unit[4];
            for (int i = 0; i < 4; ++i) key_lanes<width>(row(t + i, u), shift, of_token[i]);
            transpose(of_token, of_unit);
            for (int i = 0; i < 4; ++i) simd::store(lane(t, u + i), of_unit[i]);
        }
        for (; u < units; ++u)
            for (Index i = t; i < t + count; ++i) store_u32(lane(i, u), key_lane<width>(row(i, u), shift));
    }
}

/// The inverse for all 128 tokens: code = code << width | plane.
template <int width>
void unpack_key_plane(const std::byte* plane, Index channels, bool first, std::uint8_t* codes,
                      Index stride) noexcept {
    constexpr Index depth = TileFormat::unit_depth(width);
    constexpr std::uint32_t mask = 0x01010101u * ((1u << width) - 1);
    constexpr std::uint32_t keep = 0x01010101u * (0xFFu >> width);
    const Index units = (channels + depth - 1) / depth;
    for (Index t = 0; t < tile_tokens; ++t) {
        std::uint8_t* row = codes + t * stride;
        const std::byte* lane = plane + t / unit_lanes * units * unit_bytes + t % unit_lanes * 4;
        for (Index u = 0; u < units; ++u, lane += unit_bytes, row += depth) {
            const std::uint32_t word = load_u32(lane);
#pragma GCC unroll 8
            for (int i = 0; i < 8 / width; ++i) {
                const std::uint32_t high = first ? 0 : (load_u32(row + 4 * i) & keep) << (width % 8);
                store_u32(row + 4 * i, high | (word >> (i * width) & mask));
            }
        }
    }
}

using Bytes16 = simd::Vector<std::uint8_t, 16>;

/// Four rows of 16 bytes to 16 lanes of 4 bytes: what stands at byte j of a lane comes from row j.
inline void interleave_rows(const Bytes16 (&row)[4], std::byte* unit) noexcept {
#define KVPLANE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define KVPLANE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
    using Pairs = simd::Vector<std::uint16_t, 8>;
    const Bytes16 even[2] = {__builtin_shufflevector(row[0], row[1], KVPLANE_LOW),
                             __builtin_shufflevector(row[0], row[1], KVPLANE_HIGH)};
    const Bytes16 odd[2] = {__builtin_shufflevector(row[2], row[3], KVPLANE_LOW),
                            __builtin_shufflevector(row[2], row[3], KVPLANE_HIGH)};
#undef KVPLANE_LOW
#undef KVPLANE_HIGH
    for (int i = 0; i < 2; ++i) {
        const auto a = (Pairs)even[i], b = (Pairs)odd[i];
        simd::store(unit + 32 * i, __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
        simd::store(unit + 32 * i + 16, __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
    }
}

/// The inverse.
inline void separate_rows(const std::byte* unit, Bytes16 (&row)[4]) noexcept {
#define KVPLANE_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define KVPLANE_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
    Bytes16 part[4];
    for (int i = 0; i < 4; ++i) simd::load(part[i], unit + 16 * i);
    const Bytes16 even[2] = {__builtin_shufflevector(part[0], part[1], KVPLANE_EVEN),
                             __builtin_shufflevector(part[2], part[3], KVPLANE_EVEN)};
    const Bytes16 odd[2] = {__builtin_shufflevector(part[0], part[1], KVPLANE_ODD),
                            __builtin_shufflevector(part[2], part[3], KVPLANE_ODD)};
    row[0] = __builtin_shufflevector(even[0], even[1], KVPLANE_EVEN);
    row[1] = __builtin_shufflevector(odd[0], odd[1], KVPLANE_EVEN);
    row[2] = __builtin_shufflevector(even[0], even[1], KVPLANE_ODD);
    row[3] = __builtin_shufflevector(odd[0], odd[1], KVPLANE_ODD);
#undef KVPLANE_EVEN
#undef KVPLANE_ODD
}

/// Which rows of a unit of values: [begin, end) of `depth`.
struct UnitRows {
    Index begin, end;
};

/// 16 channels of some tokens into a unit: four tokens of a channel make one 32-bit lane. The unit's other tokens
/// stay as they are.
template <int width>
void pack_value_unit(const std::uint8_t* codes, Index stride, UnitRows rows, int shift,
                     std::byte* unit) noexcept {
    constexpr Index depth = TileFormat::unit_depth(width);
    constexpr auto mask = static_cast<std::uint8_t>((1u << width) - 1);
    Bytes16 row[4]{}, written[4]{};
    for (Index i = rows.begin; i < rows.end; ++i) {
        const auto up = static_cast<std::uint8_t>(i / 4 * width);
        Bytes16 code;
        simd::load(code, codes + i * stride);
        row[i % 4] |= (code >> static_cast<std::uint8_t>(shift) & mask) << up;
        written[i % 4] |= static_cast<std::uint8_t>(mask << up);
    }
    if (rows.end - rows.begin == depth) return interleave_rows(row, unit);
    std::byte codes_of_unit[unit_bytes], mask_of_unit[unit_bytes];
    interleave_rows(row, codes_of_unit);
    interleave_rows(written, mask_of_unit);
    for (Index i = 0; i < unit_bytes; i += 16) {
        Bytes16 old, put, where;
        simd::load(old, unit + i);
        simd::load(put, codes_of_unit + i);
        simd::load(where, mask_of_unit + i);
        simd::store(unit + i, (old & ~where) | put);
    }
}

/// One plane of a segment, values; other rows stay as they are.
template <int width>
void pack_value_plane(CodeRows from, const TileFormat::Placed& segment, Index first_row, Index rows,
                      int shift, std::byte* plane) noexcept {
    constexpr Index depth = TileFormat::unit_depth(width);
    const Index end = first_row + rows;
    for (Index c = 0; c < segment.channels; c += unit_lanes, plane += segment.rows / depth * unit_bytes)
        for (Index t = first_row / depth * depth; t < end; t += depth) {
            const std::uint8_t* const codes = from.codes + t * from.stride + c;
            std::byte* const unit = plane + t / depth * unit_bytes;
            // What is whole has its bounds known to the compiler.
            if (t >= first_row && t + depth <= end)
                pack_value_unit<width>(codes, from.stride, {0, depth}, shift, unit);
            else
                pack_value_unit<width>(codes, from.stride,
                                       {std::max<Index>(0, first_row - t), std::min(depth, end - t)}, shift,
                                       unit);
        }
}

/// The inverse: code = code << width | plane.
template <int width>
void unpack_value_plane(const std::byte* plane, Index rows, Index channels, bool first, std::uint8_t* codes,
                        Index stride) noexcept {
    constexpr Index depth = TileFormat::unit_depth(width);
    constexpr auto mask = static_cast<std::uint8_t>((1u << width) - 1);
    for (Index c = 0; c < channels; c += unit_lanes)
        for (Index t = 0; t < rows; t += depth, plane += unit_bytes) {
            Bytes16 row[4];
            separate_rows(plane, row);
            for (Index i = 0; i < depth; ++i) {
                std::uint8_t* at = codes + (t + i) * stride + c;
                Bytes16 high{};
                if (!first) {
                    simd::load(high, at);
                    high <<= static_cast<std::uint8_t>(width % 8);
                }
                simd::store(at, high | (row[i % 4] >> static_cast<std::uint8_t>(i / 4 * width) & mask));
            }
        }
}

/// Calls body(width as an integral constant).
template <class Body>
void with_width(int width, const Body& body) {
    switch (width) {
        case 1:
            return body(std::integral_constant<int, 1>{});
        case 2:
            return body(std::integral_constant<int, 2>{});
        case 4:
            return body(std::integral_constant<int, 4>{});
        default:
            return body(std::integral_constant<int, 8>{});
    }
}

inline void pack_plane(TileSide side, CodeRows from, const TileFormat::Placed& segment, Index first_token,
                       Index tokens, int width, int shift, std::byte* plane) {
    with_width(width, [&](auto w) {
        if (side == TileSide::keys)
            pack_key_plane<w>(from, first_token, tokens, segment.channels, shift, plane);
        else
            pack_value_plane<w>(from, segment, first_token, tokens, shift, plane);
    });
}

inline void unpack_plane(TileSide side, const std::byte* plane, const TileFormat::Placed& segment, int width,
                         bool first, std::uint8_t* codes, Index stride) {
    with_width(width, [&](auto w) {
        if (side == TileSide::keys)
            unpack_key_plane<w>(plane, segment.channels, first, codes, stride);
        else
            unpack_value_plane<w>(plane, segment.rows, segment.channels, first, codes, stride);
    });
}

/// Packs the codes of the rows [first_token, first_token + tokens) of segment `s`, which are tokens unless the
/// format is by_token(), into its planes; others stay as they are.
inline void pack_segment(const TileFormat& format, std::size_t s, const TileCodes& codes, Index first_token,
                         Index tokens, std::byte* tile) {
    const TileFormat::Placed& segment = format.segments()[s];
    for (int p = 0; p < segment.split.count; ++p) {
        const PlaneSource source = plane_source(segment.split, p);
        pack_plane(format.side(), {codes.byte(source.byte), codes.stride()}, segment, first_token, tokens,
                   source.width, source.shift, tile + segment.plane_at[static_cast<std::size_t>(p)]);
    }
}

/// Reads the planes of segment `s` that hold the first `depth` bits, all of its rows, and leaves exactly those
/// bits: codes of `depth` bits; for fp16 (depth 8, 12 or 16) the bytes with unread bits zero.
inline void unpack_segment(const TileFormat& format, std::size_t s, int depth, const std::byte* tile,
                           TileCodes& codes) {
    const TileFormat::Placed& segment = format.segments()[s];
    int read = 0, last_byte = -1;
    for (int p = 0; p < segment.split.count && read < depth; ++p) {
        const PlaneSource source = plane_source(segment.split, p);
        unpack_plane(format.side(), tile + segment.plane_at[static_cast<std::size_t>(p)], segment,
                     source.width, source.byte != last_byte, codes.byte(source.byte), codes.stride());
        read += source.width;
        last_byte = source.byte;
    }
    const Index all = tile_tokens * codes.stride();
    if (segment.is_half()) {
        if (depth == 12)
            for (Index i = 0; i < all; ++i)
                codes.byte(1)[i] = static_cast<std::uint8_t>(codes.byte(1)[i] << 4);
        if (depth == 8) std::fill_n(codes.byte(1), all, std::uint8_t{0});
    } else if (read > depth) {
        for (Index i = 0; i < all; ++i)
            codes.byte(0)[i] = static_cast<std::uint8_t>(codes.byte(0)[i] >> (read - depth));
    }
}

}  // namespace kvplane::detail
