// kvplane/storage/tile.hpp: 128 tokens of one head (or latent basis) of keys or values in bit planes.
//
// A tile is one run of bytes, the page of a cache. Its layout is fixed by TileFormat and by nothing else, so
// a stored tile decodes on any machine. It is a list of channel segments, each with its own width: first the
// grids of all, one after another, then their planes, each starting at a multiple of 64 bytes:
//
//   tile:     grids of segment 0 | grids of segment 1 | ... | planes of segment 0 | planes of segment 1 | ...
//   grids     steps (fp16) | lowers (fp16; none for symmetric grids)
//   steps     per_channel: [token group][channel]; per_token: [run of channels][token], for all 128 tokens
//             (fp16 keys have no grids, but a byte for each channel: the exponent of its largest magnitude)
//   plane     64-byte units of 16 lanes x 4 bytes; a byte of a w-bit plane holds 8 / w codes
//
//   keys      a lane is a token, so that one dot-product instruction adds 4 channels to 16 scores. A unit
//   holds
//             16 tokens x 32 / w channels: bits [i w, (i+1) w) of byte (token, j) are the code of channel
//             4 i + j. Units in the order [16 tokens][channels]: the order in which the score loop reads.
//   values    a lane is a channel, so that one instruction adds 4 tokens to 16 outputs. A unit holds
//             16 channels x 32 / w tokens: bits [i w, (i+1) w) of byte (channel, j) are the code of token
//             4 i + j. Units in the order [16 channels][tokens].
//
// Channels that do not fill a unit (keys) or 16 lanes (values) leave it zero; bytes() counts that.
// Rejected: rows of codes one after another (every dot product would end in a horizontal sum); planes of
// all segments interleaved (an unread plane's cache lines would be loaded); 3-bit fields (see planes.hpp);
// interleaving in the width of the vector registers (a stored cache would decode on one machine only).
//
// A width of 0 stores nothing and decodes to 0. A width of 16 stores fp16 values as planes {8,4,4} without
// grids; at a depth of 8 or 12 bits the rest is filled with its midpoint.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/block.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/storage/planes.hpp"

namespace kvplane {

inline constexpr Index tile_tokens = 128;
inline constexpr Index unit_bytes = 64;
inline constexpr Index unit_lanes = 16;

enum class TileSide : std::uint8_t { keys, values };

/// Consecutive channels of one width: 0 to 8, or 16.
struct ChannelSegment {
    Index channels = 0;
    int bits = 4;
    std::optional<Scheme> scheme = std::nullopt;  ///< none: that of the tile's rule

    bool operator==(const ChannelSegment&) const = default;
};

/// What a tile holds and where. Made once for a cache; tiles themselves carry no description.
class TileFormat {
  public:
    /// A segment's place in the tile; offsets in bytes from the tile's start.
    struct Placed {
        Index first_channel, channels;
        int bits;
        Scheme scheme;
        PlaneSplit split;  ///< no planes for width 0
        Index grids;       ///< for 128 tokens; 0 for widths 0 and 16
        Index step_at, lower_at;
        std::array<Index, 3> plane_at;
        Index exponent_at = 0;  ///< of fp16 keys, a byte a channel; see largest_exponents()
    };

    /// Throws Error (option): a width other than 0 to 8 or 16, a group of tokens other than 32, 64 or 128, a
    /// group of channels below 1, a segment without channels.
    TileFormat(TileSide side, const std::vector<ChannelSegment>& segments, const GridRule& rule)
        : side_(side), rule_(rule) {
        require(rule.granularity == Granularity::per_token || rule.group == 32 || rule.group == 64 ||
                    rule.group == tile_tokens,
                ErrorCode::option, "tile: grids over ", rule.group, " tokens, expected 32, 64 or 128");
        require(rule.group >= 1, ErrorCode::option, "tile: grids over ", rule.group,
                " channels, expected at least 1");
        for (const ChannelSegment& segment : segments) place(segment);
        for (Placed& placed : segments_) place_grids(placed);
        bytes_ = aligned(bytes_);
        grid_bytes_ = bytes_;
        for (Placed& placed : segments_)
            for (int p = 0; p < placed.split.count; ++p) {
                placed.plane_at[static_cast<std::size_t>(p)] = bytes_;
                bytes_ += plane_bytes(placed.channels, placed.split[p]);
            }
    }
    /// One width for all channels.
    TileFormat(TileSide side, Index channels, int bits, const GridRule& rule)
        : TileFormat(side, std::vector<ChannelSegment>{{channels, bits}}, rule) {}

    TileSide side() const noexcept { return side_; }
    const GridRule& rule() const noexcept { return rule_; }
    Index channels() const noexcept { return channels_; }
    const std::vector<Placed>& segments() const noexcept { return segments_; }
    /// Size of a tile, a multiple of 64; every tile takes it whole, however many tokens it holds.
    Index bytes() const noexcept { return bytes_; }
    /// Bytes before the first plane: the grids of all segments.
    Index grid_bytes() const noexcept { return grid_bytes_; }
    /// Whether several tokens share a grid, so that they must be encoded together.
    bool grids_span_tokens() const noexcept {
        return rule_.granularity == Granularity::per_channel &&
               std::any_of(segments_.begin(), segments_.end(), [](const Placed& s) { return s.grids > 0; });
    }
    /// 8 bytes() / (128 channels): what an element of a full tile takes, grids and padding counted.
    double bits_per_element() const noexcept {
        return channels_ == 0
                   ? 0.0
                   : 8.0 * static_cast<double>(bytes_) / static_cast<double>(tile_tokens * channels_);
    }

    /// Codes that one byte-lane group of a unit covers along the dot product: channels (keys), tokens
    /// (values).
    static constexpr Index unit_depth(int width) noexcept { return 32 / width; }

    /// Bytes of one plane of a segment.
    Index plane_bytes(Index channels, int width) const noexcept {
        const Index depth = unit_depth(width);
        const Index units = side_ == TileSide::keys
                                ? tile_tokens / unit_lanes * ((channels + depth - 1) / depth)
                                : (channels + unit_lanes - 1) / unit_lanes * (tile_tokens / depth);
        return units * unit_bytes;
    }

  private:
    static constexpr Index aligned(Index bytes) noexcept {
        return (bytes + unit_bytes - 1) / unit_bytes * unit_bytes;
    }
    void place(const ChannelSegment& segment) {
        require(segment.channels >= 1, ErrorCode::option, "tile: a segment of ", segment.channels,
                " channels, expected at least 1");
        const Scheme scheme = segment.scheme.value_or(rule_.scheme);
        if (segment.bits != 0 && segment.bits != 16) detail::require_width(segment.bits, scheme);
        Placed placed{channels_, segment.channels, segment.bits, scheme, {}, 0, 0, 0, {}, 0};
        if (segment.bits != 0) placed.split = plane_split(segment.bits);
        channels_ += segment.channels;
        segments_.push_back(placed);
    }
    void place_grids(Placed& placed) {
        if (placed.bits == 16 && side_ == TileSide::keys) {
            placed.exponent_at = bytes_;
            bytes_ += (placed.channels + 1) / 2 * 2;
        }
        if (placed.bits < 1 || placed.bits > 8) return;
        placed.grids = rule_.grids(tile_tokens, placed.channels);
        placed.step_at = bytes_;
        bytes_ += 2 * placed.grids;
        if (placed.scheme == Scheme::symmetric) return;
        placed.lower_at = bytes_;
        bytes_ += 2 * placed.grids;
    }

    TileSide side_;
    GridRule rule_;
    Index channels_ = 0, bytes_ = 0, grid_bytes_ = 0;
    std::vector<Placed> segments_;
};

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

namespace detail {

/// Which bits of which byte of a code a plane holds.
struct PlaneSource {
    int byte, width, shift;
};
inline PlaneSource plane_source(const PlaneSplit& split, int p) {
    if (split.bits() != 16) return {0, split[p], split.shift(p)};
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

/// One plane of a segment, keys.
template <int width>
void pack_key_plane(CodeRows from, Index first_token, Index tokens, Index channels, int shift,
                    std::byte* plane) noexcept {
    constexpr Index depth = TileFormat::unit_depth(width);
    const Index units = (channels + depth - 1) / depth;
    for (Index t = first_token; t < first_token + tokens; ++t) {
        const std::uint8_t* row = from.codes + t * from.stride;
        std::byte* lane = plane + t / unit_lanes * units * unit_bytes + t % unit_lanes * 4;
        for (Index u = 0; u < units; ++u)
            store_u32(lane + u * unit_bytes, key_lane<width>(row + u * depth, shift));
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

/// One plane of a segment, values, all 128 tokens: four tokens of a channel make one 32-bit lane.
template <int width>
void pack_value_plane(CodeRows from, Index channels, int shift, std::byte* plane) noexcept {
    constexpr Index depth = TileFormat::unit_depth(width);
    constexpr auto mask = static_cast<std::uint8_t>((1u << width) - 1);
    for (Index c = 0; c < channels; c += unit_lanes)
        for (Index t = 0; t < tile_tokens; t += depth, plane += unit_bytes) {
            Bytes16 row[4]{};
            for (Index i = 0; i < depth; ++i) {
                Bytes16 codes;
                simd::load(codes, from.codes + (t + i) * from.stride + c);
                row[i % 4] |= (codes >> static_cast<std::uint8_t>(shift) & mask)
                              << static_cast<std::uint8_t>(i / 4 * width);
            }
            interleave_rows(row, plane);
        }
}

/// The inverse: code = code << width | plane.
template <int width>
void unpack_value_plane(const std::byte* plane, Index channels, bool first, std::uint8_t* codes,
                        Index stride) noexcept {
    constexpr Index depth = TileFormat::unit_depth(width);
    constexpr auto mask = static_cast<std::uint8_t>((1u << width) - 1);
    for (Index c = 0; c < channels; c += unit_lanes)
        for (Index t = 0; t < tile_tokens; t += depth, plane += unit_bytes) {
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

/// Some tokens of a value plane whose other tokens stay as they are.
inline void merge_value_plane(CodeRows from, Index first_token, Index tokens, Index channels, int width,
                              int shift, std::byte* plane) noexcept {
    const Index depth = TileFormat::unit_depth(width);
    const unsigned mask = (1u << width) - 1;
    for (Index t = first_token; t < first_token + tokens; ++t) {
        const Index i = t % depth;
        const auto up = static_cast<unsigned>(i / 4 * width);
        for (Index c = 0; c < channels; ++c) {
            std::byte& byte = plane[(c / unit_lanes * (tile_tokens / depth) + t / depth) * unit_bytes +
                                    c % unit_lanes * 4 + i % 4];
            const unsigned code = static_cast<unsigned>(from.codes[t * from.stride + c]) >> shift & mask;
            byte = static_cast<std::byte>((static_cast<unsigned>(byte) & ~(mask << up)) | code << up);
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

inline void pack_plane(const TileFormat& format, CodeRows from, Index first_token, Index tokens,
                       Index channels, int width, int shift, std::byte* plane) {
    with_width(width, [&](auto w) {
        if (format.side() == TileSide::keys)
            pack_key_plane<w>(from, first_token, tokens, channels, shift, plane);
        else if (tokens == tile_tokens)
            pack_value_plane<w>(from, channels, shift, plane);
        else
            merge_value_plane(from, first_token, tokens, channels, width, shift, plane);
    });
}

inline void unpack_plane(const TileFormat& format, const std::byte* plane, Index channels, int width,
                         bool first, std::uint8_t* codes, Index stride) {
    with_width(width, [&](auto w) {
        if (format.side() == TileSide::keys)
            unpack_key_plane<w>(plane, channels, first, codes, stride);
        else
            unpack_value_plane<w>(plane, channels, first, codes, stride);
    });
}

}  // namespace detail

/// Packs the codes of the tokens [first_token, first_token + tokens) into the planes of segment `s`; other
/// tokens of the tile stay as they are.
inline void pack_segment(const TileFormat& format, std::size_t s, const TileCodes& codes, Index first_token,
                         Index tokens, std::byte* tile) {
    const TileFormat::Placed& segment = format.segments()[s];
    for (int p = 0; p < segment.split.count; ++p) {
        const detail::PlaneSource source = detail::plane_source(segment.split, p);
        detail::pack_plane(format, {codes.byte(source.byte), codes.stride()}, first_token, tokens,
                           segment.channels, source.width, source.shift,
                           tile + segment.plane_at[static_cast<std::size_t>(p)]);
    }
}

/// Reads the planes of segment `s` that hold the first `depth` bits, all 128 tokens, and leaves exactly those
/// bits: codes of `depth` bits; for fp16 (depth 8, 12 or 16) the bytes with unread bits zero.
inline void unpack_segment(const TileFormat& format, std::size_t s, int depth, const std::byte* tile,
                           TileCodes& codes) {
    const TileFormat::Placed& segment = format.segments()[s];
    int read = 0, last_byte = -1;
    for (int p = 0; p < segment.split.count && read < depth; ++p) {
        const detail::PlaneSource source = detail::plane_source(segment.split, p);
        detail::unpack_plane(format, tile + segment.plane_at[static_cast<std::size_t>(p)], segment.channels,
                             source.width, source.byte != last_byte, codes.byte(source.byte), codes.stride());
        read += source.width;
        last_byte = source.byte;
    }
    const Index all = tile_tokens * codes.stride();
    if (segment.bits == 16) {
        if (depth == 12)
            for (Index i = 0; i < all; ++i)
                codes.byte(1)[i] = static_cast<std::uint8_t>(codes.byte(1)[i] << 4);
        if (depth == 8) std::fill_n(codes.byte(1), all, std::uint8_t{0});
    } else if (read > depth) {
        for (Index i = 0; i < all; ++i)
            codes.byte(0)[i] = static_cast<std::uint8_t>(codes.byte(0)[i] >> (read - depth));
    }
}

/// Of fp16 keys: the exponent field (5 bits) of the largest magnitude of every channel, over the tokens that
/// the tile has ever held since its first was written.
inline const std::uint8_t* largest_exponents(const TileFormat::Placed& segment,
                                             const std::byte* tile) noexcept {
    return reinterpret_cast<const std::uint8_t*>(tile + segment.exponent_at);
}

/// Turns tokens into tiles and tiles into numbers, in memory that is reused from tile to tile.
class TileCoder {
  public:
    explicit TileCoder(const TileFormat& format) : format_(format) {
        for (const auto& segment : format.segments()) codes_.emplace_back(segment.channels);
    }

    /// Quantizes and packs `count` tokens of one head, from token `first` of `rows` on, as the tokens
    /// [tile_token, tile_token + count) of `tile`. Grids per channel need whole groups: tile_token and count
    /// must be multiples of the group (count may stop short at the end of a sequence). Throws Error (shape,
    /// index; not_finite and beyond_fp16 with the position) and may then have written part of the tile.
    template <CacheScalar Scalar>
    void encode(const HeadRows<Scalar>& rows, std::string_view argument, Index head, Index first, Index count,
                Index tile_token, std::byte* tile) {
        require(rows.head_dim() == format_.channels(), ErrorCode::shape, argument, ": ", rows.head_dim(),
                " channels, expected ", format_.channels());
        require(
            head >= 0 && head < rows.heads() && first >= 0 && count >= 0 && count <= rows.tokens() - first,
            ErrorCode::index, argument, ": head ", head, ", ", count, " tokens from ", first, " on, of ",
            rows.heads(), " heads, ", rows.tokens(), " tokens");
        require(tile_token >= 0 && count <= tile_tokens - tile_token, ErrorCode::index, argument, ": ", count,
                " tokens from ", tile_token, " on, of a tile of ", tile_tokens);
        require(!format_.grids_span_tokens() || tile_token % format_.rule().group == 0, ErrorCode::index,
                argument, ": a tile with grids over ", format_.rule().group,
                " tokens takes tokens from a multiple of that on, not from ", tile_token);
        excess_ = {};
        for (std::size_t s = 0; s < format_.segments().size(); ++s) {
            const TileFormat::Placed& segment = format_.segments()[s];
            if (segment.bits == 0) continue;
            codes_[s].clear_padding(tile_token, count);
            if (segment.bits == 16)
                split_half(rows, argument, head, first, count, tile_token, segment, codes_[s], tile);
            else
                quantize_segment(rows, argument, head, first, count, tile_token, segment, codes_[s], tile);
            pack_segment(format_, s, codes_[s], tile_token, count, tile);
        }
    }

    /// The first `tokens` tokens of a tile as floats, rows `stride` apart, read at `depth` bits: every
    /// segment at the lesser of depth and its width; fp16 at 8, 12 or 16 bits. Throws Error (index, option)
    /// before it writes anything.
    void decode(const std::byte* tile, Index tokens, int depth, float* values, Index stride) {
        require(tokens >= 0 && tokens <= tile_tokens, ErrorCode::index, "tile: ", tokens,
                " tokens, expected 0 to ", tile_tokens);
        for (const auto& segment : format_.segments()) require_depth(segment, depth);
        if (tokens == 0) return;  // `values` may be null
        for (std::size_t s = 0; s < format_.segments().size(); ++s) {
            const TileFormat::Placed& segment = format_.segments()[s];
            float* to = values + segment.first_channel;
            if (segment.bits == 0) {
                for (Index t = 0; t < tokens; ++t) std::fill_n(to + t * stride, segment.channels, 0.0f);
                continue;
            }
            const int segment_depth = std::min(depth, segment.bits);
            unpack_segment(format_, s, segment_depth, tile, codes_[s]);
            if (segment.bits == 16)
                join_half(segment, segment_depth, tokens, codes_[s], to, stride);
            else
                decode_segment(tile, segment, segment_depth, tokens, codes_[s], to, stride);
        }
    }
    void decode(const std::byte* tile, Index tokens, float* values, Index stride) {
        decode(tile, tokens, 16, values, stride);
    }

    /// Bound of |x - x'| over the first `tokens` tokens, clipped values aside (see excess()): half the widest
    /// cell, or the rounding to fp16 of the largest magnitude.
    double error_bound(const std::byte* tile, Index tokens) {
        double bound = 0.0;
        for (std::size_t s = 0; s < format_.segments().size(); ++s) {
            const TileFormat::Placed& segment = format_.segments()[s];
            if (segment.bits == 16) {
                decoded_.resize(static_cast<std::size_t>(tile_tokens * segment.channels));
                unpack_segment(format_, s, 16, tile, codes_[s]);
                join_half(segment, 16, tokens, codes_[s], decoded_.data(), segment.channels);
                for (Index i = 0; i < tokens * segment.channels; ++i)
                    bound = std::max(bound, half_rounding(decoded_[static_cast<std::size_t>(i)]));
                continue;
            }
            read_grids(tile, segment, segment.bits);
            for (std::size_t g = 0; g < lower_.size(); ++g)
                if (grid_in_use(static_cast<Index>(g), segment, tokens))
                    bound = std::max<double>(bound, Grid{lower_[g], step_[g], segment.bits}.error_bound());
        }
        return bound;
    }

    /// How far tokens of the last encode() lay outside their grids: 0 without clipping.
    ClipExcess excess() const noexcept { return excess_; }

    const TileFormat& format() const noexcept { return format_; }

  private:
    static double half_rounding(float x) noexcept {
        return std::ldexp(std::abs(static_cast<double>(x)), -11) + 0x1p-25;
    }
    bool grid_in_use(Index g, const TileFormat::Placed& segment, Index tokens) const noexcept {
        return format_.rule().granularity == Granularity::per_channel
                   ? g / segment.channels * format_.rule().group < tokens
                   : g % tile_tokens < tokens;
    }

    static void require_depth(const TileFormat::Placed& segment, int depth) {
        const int read = std::min(depth, segment.bits);
        require(depth >= 1 && (segment.bits != 16 || (read >= 8 && read % 4 == 0)), ErrorCode::option,
                "tile: a depth of ", depth, " bits, expected ",
                segment.bits == 16 ? "8, 12 or 16 for fp16" : "at least 1");
    }

    template <CacheScalar Scalar>
    void quantize_segment(const HeadRows<Scalar>& rows, std::string_view argument, Index head, Index first,
                          Index count, Index tile_token, const TileFormat::Placed& segment, TileCodes& codes,
                          std::byte* tile) {
        GridRule rule = format_.rule();
        rule.scheme = segment.scheme;
        quantizer_.quantize(rows, argument, head, first, count, segment.first_channel, segment.channels, rule,
                            segment.bits, codes.byte(0) + tile_token * codes.stride(), codes.stride());
        excess_.largest = std::max(excess_.largest, quantizer_.excess().largest);
        excess_.energy += quantizer_.excess().energy;
        const bool keep_lower = segment.scheme != Scheme::symmetric;
        auto* step = reinterpret_cast<Eigen::half*>(tile + segment.step_at);
        auto* lower = reinterpret_cast<Eigen::half*>(tile + segment.lower_at);
        if (format_.rule().granularity == Granularity::per_channel) {
            const Index at = tile_token / format_.rule().group * segment.channels;
            std::copy(quantizer_.step().begin(), quantizer_.step().end(), step + at);
            if (keep_lower) std::copy(quantizer_.lower().begin(), quantizer_.lower().end(), lower + at);
            return;
        }
        const Index runs = segment.grids / tile_tokens;
        for (Index t = 0; t < count; ++t)
            for (Index run = 0; run < runs; ++run) {
                const auto from = static_cast<std::size_t>(t * runs + run);
                const Index at = run * tile_tokens + tile_token + t;
                step[at] = quantizer_.step()[from];
                if (keep_lower) lower[at] = quantizer_.lower()[from];
            }
    }

    void decode_segment(const std::byte* tile, const TileFormat::Placed& segment, int depth, Index tokens,
                        const TileCodes& codes, float* values, Index stride) {
        read_grids(tile, segment, depth);
        const Isa isa = current_isa();
        const Index channels = segment.channels, padded = padded_channels(channels);
        const bool by_channel = format_.rule().granularity == Granularity::per_channel;
        const Index group = by_channel ? format_.rule().group : 1;
        const bool direct = channels == padded;
        if (!direct) decoded_.resize(static_cast<std::size_t>(group * padded));
        for (Index t = 0; t < tokens; t += group) {
            const Index count = std::min(group, tokens - t);
            if (by_channel)
                spread_columns(t / group, channels);
            else
                spread_row(t, segment);
            float* to = direct ? values + t * stride : decoded_.data();
            decode_columns(isa, codes.byte(0) + t * codes.stride(), codes.stride(), count, padded,
                           row_lower_.data(), row_step_.data(), to, direct ? stride : padded);
            if (!direct)
                for (Index i = 0; i < count; ++i)
                    std::copy_n(to + i * padded, channels, values + (t + i) * stride);
        }
    }

    /// All grids of a segment as floats, the step that of the depth.
    void read_grids(const std::byte* tile, const TileFormat::Placed& segment, int depth) {
        const auto* step = reinterpret_cast<const Eigen::half*>(tile + segment.step_at);
        const auto* lower = reinterpret_cast<const Eigen::half*>(tile + segment.lower_at);
        const auto grids = static_cast<std::size_t>(segment.grids);
        lower_.resize(grids);
        step_.resize(grids);
        const bool symmetric = segment.scheme == Scheme::symmetric;
        const float to_lower = -(0.5f * power_of_two(segment.bits) + 0.5f);
        const float widen = power_of_two(segment.bits - depth);
        for (std::size_t g = 0; g < grids; ++g) {
            const auto fine = static_cast<float>(step[g]);
            lower_[g] = symmetric ? fine * to_lower : static_cast<float>(lower[g]);
            step_[g] = fine * widen;
        }
        const auto padded = static_cast<std::size_t>(padded_channels(segment.channels));
        row_lower_.resize(std::max(row_lower_.size(), padded));
        row_step_.resize(std::max(row_step_.size(), padded));
    }
    void spread_columns(Index group, Index channels) {
        std::copy_n(lower_.begin() + group * channels, channels, row_lower_.begin());
        std::copy_n(step_.begin() + group * channels, channels, row_step_.begin());
    }
    void spread_row(Index token, const TileFormat::Placed& segment) {
        const Index run = format_.rule().group;
        for (Index c = 0, r = 0; c < segment.channels; c += run, ++r) {
            const auto g = static_cast<std::size_t>(r * tile_tokens + token);
            const Index size = std::min(run, segment.channels - c);
            std::fill_n(row_lower_.begin() + c, size, lower_[g]);
            std::fill_n(row_step_.begin() + c, size, step_[g]);
        }
    }

    /// fp16 bits of tokens to two bytes each; of keys also the exponents of the largest magnitudes.
    template <CacheScalar Scalar>
    void split_half(const HeadRows<Scalar>& rows, std::string_view argument, Index head, Index first,
                    Index count, Index tile_token, const TileFormat::Placed& segment, TileCodes& codes,
                    std::byte* tile) {
        const auto channels = static_cast<std::size_t>(segment.channels);
        std::vector<std::uint16_t>& bits = half_bits_;
        bits.resize(channels);
        largest_.assign(channels, 0);
        for (Index t = 0; t < count; ++t) {
            for (std::size_t c = 0; c < channels; ++c) {
                const auto channel = segment.first_channel + static_cast<Index>(c);
                const auto x = static_cast<float>(*rows.at(head, first + t, channel));
                if (!(std::abs(x) <= fp16_max))
                    detail::refuse_value(rows, argument, head, first + t, channel);
                bits[c] = Eigen::half(x).x;
            }
            std::uint8_t *const high = &codes.at(tile_token + t, 0, 0), *const low =
                                                                            &codes.at(tile_token + t, 0, 1);
            for (std::size_t c = 0; c < channels; ++c) {
                high[c] = static_cast<std::uint8_t>(bits[c] >> 8);
                low[c] = static_cast<std::uint8_t>(bits[c] & 0xFF);
                largest_[c] = std::max(largest_[c], static_cast<std::uint16_t>(bits[c] & 0x7FFF));
            }
        }
        if (format_.side() != TileSide::keys) return;
        for (std::size_t c = 0; c < channels; ++c) {
            std::byte& exponent = tile[segment.exponent_at + static_cast<Index>(c)];
            const auto found = static_cast<std::byte>(largest_[c] >> 10);
            if (tile_token == 0 || exponent < found) exponent = found;
        }
    }
    static void join_half(const TileFormat::Placed& segment, int depth, Index tokens, TileCodes& codes,
                          float* values, Index stride) {
        const int midpoint = depth == 16 ? 0 : 1 << (15 - depth);
        for (Index t = 0; t < tokens; ++t)
            for (Index c = 0; c < segment.channels; ++c) {
                const int bits = codes.at(t, c, 0) << 8 | codes.at(t, c, 1) | midpoint;
                values[t * stride + c] = static_cast<float>(
                    Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(bits)));
            }
    }

    TileFormat format_;
    BlockQuantizer quantizer_;
    ClipExcess excess_;
    std::vector<TileCodes> codes_;
    std::vector<float> lower_, step_, row_lower_, row_step_, decoded_;
    std::vector<std::uint16_t> half_bits_, largest_;
};

}  // namespace kvplane
