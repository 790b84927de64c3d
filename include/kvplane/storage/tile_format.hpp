// kvplane/storage/tile_format.hpp: 128 tokens of one head (or latent basis) of keys or values in bit planes.
//
// A tile is one run of bytes, the page of a cache. Its layout is fixed by TileFormat and by nothing else, so
// a stored tile decodes on any machine. It is a list of channel segments, each with its own width: first the
// grids of all, one after another, then their planes, each starting at a multiple of 64 bytes:
//
//   tile:     grids of segment 0 | grids of segment 1 | ... | planes of segment 0 | planes of segment 1 | ...
//   grids     steps (fp16, or its upper byte) | lowers (fp16), each where the scheme has it (grid.hpp)
//   steps     per_channel: [token group][channel]; per_token: [run of channels][token], for all 128 tokens
//             (fp16 keys have no grids, but a byte for each channel: the exponent of its largest magnitude)
//   plane     64-byte units of 16 lanes x 4 bytes; a byte of a w-bit plane holds 8 / w codes
//
//   keys      a lane is a token, so that one dot-product instruction adds 4 channels to 16 scores. A unit holds
//             16 tokens x 32 / w channels: bits [i w, (i+1) w) of byte (token, j) are the code of channel
//             4 i + j. Units in the order [16 tokens][channels]: the order in which the score loop reads.
//   values    a lane is a channel, so that one instruction adds 4 tokens to 16 outputs. A unit holds
//             16 channels x 32 / w tokens: bits [i w, (i+1) w) of byte (channel, j) are the code of token
//             4 i + j. Units in the order [16 channels][tokens].
//
// Channels that do not fill a unit (keys) or 16 lanes (values) leave it zero; bytes() counts that.
//
// Tokens of values may have different widths (TokenRun). A segment then is not a run of channels but a run of
// rows, those of the tokens of one width, and the tile begins with which run each token is in:
//
//   tile:     runs of tokens | grids of run 0 | grids of run 1 | ... | planes of run 0 | planes of run 1 | ...
//   runs      one or two planes of 16 bytes, most significant first: bit t % 8 of byte t / 8 is of token t
//   steps     [run of channels][row]; the rows of a run are its tokens in ascending order
//
// Rejected: an order of the tokens in full (7 bits a token instead of 1 or 2); the same order for keys and
// all heads of a page (a truncated or edited page would hold holes in place of a range).
// Rejected: rows of codes one after another (every dot product would end in a horizontal sum); planes of
// all segments interleaved (an unread plane's cache lines would be loaded); 3-bit fields (see planes.hpp);
// interleaving in the width of the vector registers (a stored cache would decode on one machine only).
//
// A width of 0 stores nothing and decodes to 0. A width of 16 stores fp16 values as planes {8,4,4} without
// grids; at a depth of 8 or 12 bits the rest is filled with its midpoint.
#pragma once

#include <Eigen/Core>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/rule.hpp"
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

    /// Whether the channels are stored as fp16 numbers.
    bool is_half() const noexcept { return bits == 16; }

    bool operator==(const ChannelSegment&) const = default;
};

/// So many of a tile's 128 tokens of values have codes of that width.
struct TokenRun {
    Index tokens = 0;
    int bits = 0;

    bool operator==(const TokenRun&) const = default;
};

/// What a tile holds and where. Made once for a cache; tiles themselves carry no description.
class TileFormat {
  public:
    /// A segment's place in the tile; offsets in bytes from the tile's start.
    struct Placed {
        Index first_channel = 0, channels = 0;
        Index first_row = 0, rows = tile_tokens;  ///< fewer where tokens have different widths
        int bits = 0;
        Scheme scheme = Scheme::min_max;
        PlaneSplit split = {};  ///< no planes for width 0
        Index grids = 0;        ///< for all rows; 0 for widths 0 and 16
        Index step_at = 0, lower_at = 0;
        std::array<Index, PlaneSplit::max_planes> plane_at{};
        Index exponent_at = 0;  ///< of fp16 keys, a byte a channel; see largest_exponents()

        /// Whether the channels are stored as fp16 numbers, without grids.
        bool is_half() const noexcept { return bits == 16; }
        /// Whether they are stored as codes of grids.
        bool has_grids() const noexcept { return bits >= 1 && bits <= 8; }

        bool operator==(const Placed&) const = default;
    };

    /// Throws Error (option): a width other than 0 to 8 or 16, a group of tokens other than 32, 64 or 128, a
    /// group of channels below 1, a segment without channels.
    TileFormat(TileSide side, const std::vector<ChannelSegment>& segments, const GridRule& rule);
    /// One width for all channels.
    TileFormat(TileSide side, Index channels, int bits, const GridRule& rule)
        : TileFormat(side, std::vector<ChannelSegment>{{channels, bits}}, rule) {}
    /// Values whose tokens have different widths, the widest first. Throws Error (option) unless there are 2 to
    /// 4 runs of falling widths from 1 to 8 that sum to 128 tokens, each of whole units of its planes (32 tokens
    /// where one has a bit, else 16), and grids are per token.
    TileFormat(Index channels, const std::vector<TokenRun>& runs, const GridRule& rule);

    TileSide side() const noexcept { return side_; }
    const GridRule& rule() const noexcept { return rule_; }
    Index channels() const noexcept { return channels_; }
    const std::vector<Placed>& segments() const noexcept { return segments_; }
    /// Size of a tile, a multiple of 64; every tile takes it whole, however many tokens it holds.
    Index bytes() const noexcept { return bytes_; }
    /// Whether segments are runs of tokens.
    bool by_token() const noexcept { return run_planes_ > 0; }
    /// Planes that say which run tokens are in, 16 bytes each at the tile's begin.
    int run_planes() const noexcept { return run_planes_; }
    /// Bytes before the first plane: the grids of all segments.
    Index grid_bytes() const noexcept { return grid_bytes_; }
    /// Whether several tokens share a grid, so that they must be encoded together.
    bool grids_span_tokens() const noexcept;
    /// 8 bytes() / (128 channels): what an element of a full tile takes, grids and padding counted.
    double bits_per_element() const noexcept {
        return channels_ == 0
                   ? 0.0
                   : 8.0 * static_cast<double>(bytes_) / static_cast<double>(tile_tokens * channels_);
    }

    /// What a unit of a plane covers along the dot product: channels of keys, tokens of values.
    static constexpr Index unit_depth(int width) noexcept { return 32 / width; }

    bool operator==(const TileFormat&) const = default;

    /// Bytes of one plane of a segment.
    Index plane_bytes(const Placed& segment, int width) const noexcept;

  private:
    void place(const ChannelSegment& segment);
    void place_grids(Placed& placed);
    void place_all();

    TileSide side_;
    GridRule rule_;
    int run_planes_ = 0;
    Index channels_ = 0, bytes_ = 0, grid_bytes_ = 0;
    std::vector<Placed> segments_;
};

/// `count` steps of a segment from grid `first` on, as fp16. Those stored in a byte are widened to `room`.
inline const Eigen::half* steps_of(const TileFormat::Placed& segment, const std::byte* tile, Index first,
                                   Index count, Eigen::half* room) noexcept {
    const std::byte* const from = tile + segment.step_at + first * step_bytes(segment.scheme);
    if (step_bytes(segment.scheme) == 2) return reinterpret_cast<const Eigen::half*>(from);
    for (Index g = 0; g < count; ++g) room[g] = half_of_step(static_cast<std::uint8_t>(from[g]));
    return room;
}

/// Which token each row of a tile by_token() holds.
using TokenOfRow = std::array<std::uint8_t, tile_tokens>;
inline constexpr Index run_plane_bytes = tile_tokens / 8;

/// The run of token t.
inline int run_of_token(const TileFormat& format, const std::byte* tile, Index t) noexcept {
    int run = 0;
    for (int p = 0; p < format.run_planes(); ++p)
        run = 2 * run + (std::to_integer<int>(tile[p * run_plane_bytes + t / 8]) >> (t % 8) & 1);
    return run;
}
/// Whether as many tokens are in each run as it has rows. What is read of another tile is no token's.
bool runs_are_whole(const TileFormat& format, const std::byte* tile) noexcept;
/// Writes which run tokens are in.
void write_runs(const TileFormat& format, const TokenOfRow& token_of_row, std::byte* tile) noexcept;
/// The tokens of all rows; of a tile whose runs are not whole, some tokens twice and others not.
TokenOfRow read_runs(const TileFormat& format, const std::byte* tile) noexcept;

/// Of fp16 keys: the exponent field (5 bits) of the largest magnitude of every channel, over the tokens that
/// the tile has ever held since its first was written.
inline const std::uint8_t* largest_exponents(const TileFormat::Placed& segment,
                                             const std::byte* tile) noexcept {
    return reinterpret_cast<const std::uint8_t*>(tile + segment.exponent_at);
}

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/storage/impl/tile_format.hpp"
#endif
