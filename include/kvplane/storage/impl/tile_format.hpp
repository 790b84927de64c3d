// kvplane/storage/impl/tile_format.hpp: the functions of storage/tile_format.hpp.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>

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
    place_all();
}

KVPLANE_FUNCTION TileFormat::TileFormat(Index channels, const std::vector<TokenRun>& runs,
                                        const GridRule& rule)
    : side_(TileSide::values), rule_(rule) {
    require(runs.size() >= 2 && runs.size() <= 4, ErrorCode::option, "tile: ", runs.size(),
            " widths of tokens, expected 2 to 4");
    require(rule.granularity == Granularity::per_token && rule.group >= 1, ErrorCode::option,
            "tile: tokens of different widths with grids ", name(rule.granularity), " over ", rule.group,
            ", expected per token over at least 1");
    Index tokens = 0;
    int wider = 9;
    for (const TokenRun& run : runs) {
        require(run.bits >= 1 && run.bits < wider, ErrorCode::option, "tile: tokens of ", run.bits,
                " bits, expected widths from 8 to 1, each below the one before it");
        wider = run.bits;
        place({.channels = channels, .bits = run.bits});
        Placed& placed = segments_.back();
        Index depth = unit_lanes;
        for (int p = 0; p < placed.split.count; ++p) depth = std::max(depth, unit_depth(placed.split[p]));
        require(run.tokens >= depth && run.tokens % depth == 0, ErrorCode::option, "tile: ", run.tokens,
                " tokens of ", run.bits, " bits, expected a multiple of ", depth);
        placed.first_channel = 0;
        placed.first_row = tokens;
        placed.rows = run.tokens;
        tokens += run.tokens;
    }
    require(tokens == tile_tokens, ErrorCode::option, "tile: widths for ", tokens, " tokens, expected ",
            tile_tokens);
    channels_ = channels;
    run_planes_ = runs.size() > 2 ? 2 : 1;
    bytes_ = run_planes_ * run_plane_bytes;
    place_all();
}

KVPLANE_FUNCTION void TileFormat::place_all() {
    for (Placed& placed : segments_) place_grids(placed);
    bytes_ = detail::whole_units(bytes_);
    grid_bytes_ = bytes_;
    for (Placed& placed : segments_)
        for (int p = 0; p < placed.split.count; ++p) {
            placed.plane_at[static_cast<std::size_t>(p)] = bytes_;
            bytes_ += plane_bytes(placed, placed.split[p]);
        }
}

KVPLANE_FUNCTION bool TileFormat::grids_span_tokens() const noexcept {
    return rule_.granularity == Granularity::per_channel &&
           std::any_of(segments_.begin(), segments_.end(), [](const Placed& s) { return s.grids > 0; });
}

KVPLANE_FUNCTION Index TileFormat::plane_bytes(const Placed& segment, int width) const noexcept {
    const Index depth = unit_depth(width);
    const Index units = side_ == TileSide::keys
                            ? tile_tokens / unit_lanes * ((segment.channels + depth - 1) / depth)
                            : (segment.channels + unit_lanes - 1) / unit_lanes * (segment.rows / depth);
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
    placed.grids = rule_.grids(placed.rows, placed.channels);
    placed.step_at = bytes_;
    bytes_ += step_bytes(placed.scheme) * placed.grids;
    if (!has_lower(placed.scheme)) return;
    placed.lower_at = bytes_;
    bytes_ += 2 * placed.grids;
}

KVPLANE_FUNCTION bool runs_are_whole(const TileFormat& format, const std::byte* tile) noexcept {
    std::array<Index, 4> tokens{};
    for (Index t = 0; t < tile_tokens; ++t) ++tokens[static_cast<std::size_t>(run_of_token(format, tile, t))];
    for (std::size_t run = 0; run < tokens.size(); ++run) {
        const Index rows = run < format.segments().size() ? format.segments()[run].rows : 0;
        if (tokens[run] != rows) return false;
    }
    return true;
}

KVPLANE_FUNCTION void write_runs(const TileFormat& format, const TokenOfRow& token_of_row,
                                 std::byte* tile) noexcept {
    std::memset(tile, 0, static_cast<std::size_t>(format.run_planes() * run_plane_bytes));
    for (std::size_t run = 0; run < format.segments().size(); ++run) {
        const TileFormat::Placed& segment = format.segments()[run];
        for (Index row = segment.first_row; row < segment.first_row + segment.rows; ++row) {
            const Index t = token_of_row[static_cast<std::size_t>(row)];
            for (int p = 0; p < format.run_planes(); ++p)
                if (run >> (format.run_planes() - 1 - p) & 1)
                    tile[p * run_plane_bytes + t / 8] |= std::byte{1} << (t % 8);
        }
    }
}

KVPLANE_FUNCTION TokenOfRow read_runs(const TileFormat& format, const std::byte* tile) noexcept {
    TokenOfRow token_of_row{};
    Index row = 0;
    for (std::size_t run = 0; run < format.segments().size(); ++run)
        for (Index word = 0; word < tile_tokens / 64; ++word) {
            std::uint64_t members = ~std::uint64_t{0};
            for (int p = 0; p < format.run_planes(); ++p) {
                std::uint64_t plane = 0;
                // Byte by byte, so that the order of a machine's bytes does not count.
                for (Index i = 0; i < 8; ++i)
                    plane |= std::to_integer<std::uint64_t>(tile[p * run_plane_bytes + word * 8 + i])
                             << (8 * i);
                members &= run >> (format.run_planes() - 1 - p) & 1 ? plane : ~plane;
            }
            for (; members != 0 && row < tile_tokens; members &= members - 1)
                token_of_row[static_cast<std::size_t>(row++)] =
                    static_cast<std::uint8_t>(64 * word + std::countr_zero(members));
        }
    return token_of_row;
}

}  // namespace kvplane
