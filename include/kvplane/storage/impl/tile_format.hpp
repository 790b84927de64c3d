// kvplane/storage/impl/tile_format.hpp: the functions of storage/tile_format.hpp.
#pragma once

#include <algorithm>

#include "kvplane/error.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane {

namespace detail {

constexpr Index whole_units(Index bytes) noexcept {
    return (bytes + unit_bytes - 1) / unit_bytes * unit_bytes;
}

}  // namespace detail

KVPLANE_FUNCTION TileFormat::TileFormat(TileSide side, const std::vector<ChannelSegment>& segments,
                                        const GridRule& rule)
    : side_(side), rule_(rule) {
    require(rule.granularity == Granularity::per_token || rule.group == 32 || rule.group == 64 ||
                rule.group == tile_tokens,
            ErrorCode::option, "tile: grids over ", rule.group, " tokens, expected 32, 64 or 128");
    require(rule.group >= 1, ErrorCode::option, "tile: grids over ", rule.group,
            " channels, expected at least 1");
    for (const ChannelSegment& segment : segments) place(segment);
    for (Placed& placed : segments_) place_grids(placed);
    bytes_ = detail::whole_units(bytes_);
    grid_bytes_ = bytes_;
    for (Placed& placed : segments_)
        for (int p = 0; p < placed.split.count; ++p) {
            placed.plane_at[static_cast<std::size_t>(p)] = bytes_;
            bytes_ += plane_bytes(placed.channels, placed.split[p]);
        }
}

KVPLANE_FUNCTION bool TileFormat::grids_span_tokens() const noexcept {
    return rule_.granularity == Granularity::per_channel &&
           std::any_of(segments_.begin(), segments_.end(), [](const Placed& s) { return s.grids > 0; });
}

KVPLANE_FUNCTION Index TileFormat::plane_bytes(Index channels, int width) const noexcept {
    const Index depth = unit_depth(width);
    const Index units = side_ == TileSide::keys
                            ? tile_tokens / unit_lanes * ((channels + depth - 1) / depth)
                            : (channels + unit_lanes - 1) / unit_lanes * (tile_tokens / depth);
    return units * unit_bytes;
}

KVPLANE_FUNCTION void TileFormat::place(const ChannelSegment& segment) {
    require(segment.channels >= 1, ErrorCode::option, "tile: a segment of ", segment.channels,
            " channels, expected at least 1");
    const Scheme scheme = segment.scheme.value_or(rule_.scheme);
    if (segment.bits != 0 && !segment.is_half()) detail::require_grids(rule_, scheme, segment.bits);
    segments_.push_back({.first_channel = channels_,
                         .channels = segment.channels,
                         .bits = segment.bits,
                         .scheme = scheme,
                         .split = segment.bits == 0 ? PlaneSplit{} : plane_split(segment.bits)});
    channels_ += segment.channels;
}

KVPLANE_FUNCTION void TileFormat::place_grids(Placed& placed) {
    if (placed.is_half() && side_ == TileSide::keys) {
        placed.exponent_at = bytes_;
        bytes_ += (placed.channels + 1) / 2 * 2;
    }
    if (!placed.has_grids()) return;
    placed.grids = rule_.grids(tile_tokens, placed.channels);
    placed.step_at = bytes_;
    bytes_ += step_bytes(placed.scheme) * placed.grids;
    if (!has_lower(placed.scheme)) return;
    placed.lower_at = bytes_;
    bytes_ += 2 * placed.grids;
}

}  // namespace kvplane
