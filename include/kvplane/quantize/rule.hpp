// kvplane/quantize/rule.hpp: what shares a grid, and how the grids of a block are counted.
#pragma once

#include <Eigen/Core>
#include <cstdint>

#include "kvplane/quantize/grid.hpp"

namespace kvplane {

using Index = Eigen::Index;

/// What shares one grid: a run of tokens of one channel, or a run of channels of one token.
enum class Granularity : std::uint8_t { per_channel, per_token };

constexpr const char* name(Granularity granularity) noexcept {
    return granularity == Granularity::per_channel ? "per_channel" : "per_token";
}

/// How many groups of `group` elements `count` elements make. The last group may be smaller. `group` may be
/// any number from 1 on, however large.
constexpr Index groups_of(Index count, Index group) noexcept {
    return count / group + (count % group != 0 ? 1 : 0);
}

/// A group of channels that covers a head of any size.
inline constexpr Index whole_head = Index{1} << 30;

/// How a block gets its grids. `group` counts tokens (per_channel) or channels (per_token); the last group of
/// a block may be smaller.
struct GridRule {
    Granularity granularity = Granularity::per_channel;
    Index group = 128;
    Scheme scheme = Scheme::min_max;
    Clip clip = Clip::none;

    /// Grids of one block.
    Index grids(Index tokens, Index channels) const noexcept {
        return granularity == Granularity::per_channel ? groups_of(tokens, group) * channels
                                                       : tokens * groups_of(channels, group);
    }
    /// Bytes that one grid takes in storage: a step, and an fp16 lower unless that follows from it.
    Index bytes_per_grid() const noexcept { return step_bytes(scheme) + (has_lower(scheme) ? 2 : 0); }

    bool operator==(const GridRule&) const = default;
};

namespace detail {

/// Throws Error (option) for what no grid can be: a width that the scheme has not, or unbiased grids per
/// channel or with clipping.
inline void require_grids(const GridRule& rule, Scheme scheme, int bits) {
    require_width(bits, scheme);
    require(scheme != Scheme::unbiased || rule.granularity == Granularity::per_token, ErrorCode::option,
            "grids: scheme unbiased per channel, expected per token: what it keeps is the length of tokens");
    require(scheme != Scheme::unbiased || rule.clip == Clip::none, ErrorCode::option,
            "grids: scheme unbiased with clipping to the least squared error, expected none: its step is "
            "another");
}

}  // namespace detail

/// By how much errors exceed half a step: how far clipped values lie outside their grids' intervals, and what
/// unbiased steps differ by from those that codes were chosen for. 0 without either.
struct ClipExcess {
    double largest = 0.0;  ///< the furthest
    double energy = 0.0;   ///< sum of squares
};

}  // namespace kvplane
