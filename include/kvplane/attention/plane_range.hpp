// kvplane/attention/plane_range.hpp: integer sums over part of a segment's planes, whichever kernels there are.
#pragma once

#include <cstdint>

#include "kvplane/attention/kernels/dispatch.hpp"
#include "kvplane/attention/plane_groups.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane::detail {

/// Channels (keys) or tokens (values) of some of a segment's blocks.
struct PlaneRange {
    Index along;         ///< so many has a block
    Index first, count;  ///< so many are summed; the first of them is that of a unit in every plane
    Index first_block, blocks;

    /// Units of a plane of that width: of a block, and of the range in it.
    Index block_units(int width) const noexcept { return units_of(width, along); }
    Index units(int width) const noexcept { return units_of(width, count); }
    /// Where the range begins in plane p.
    Index at(const TileFormat::Placed& segment, int p) const noexcept {
        const int width = segment.split[p];
        return segment.plane_at[static_cast<std::size_t>(p)] +
               (first_block * block_units(width) + first / TileFormat::unit_depth(width)) * unit_bytes;
    }

  private:
    static Index units_of(int width, Index depth) noexcept {
        return (depth + TileFormat::unit_depth(width) - 1) / TileFormat::unit_depth(width);
    }
};

/// Rows of factors, from a range's first channel or token on, and their sums. Rows of low halves follow all others.
struct FactorRows {
    const std::int8_t* factors;
    Index stride;
    Index rows, low_rows;
    std::int32_t* sums;  ///< [block][rows, then low_rows][16]

    Index all() const noexcept { return rows + low_rows; }
};

/// Sums one plane. Low halves meet the first plane alone.
inline void sum_plane(const PlaneDot& dot, const TileFormat::Placed& segment, const TileRead& read,
                      const PlaneRange& range, const FactorRows& of, int p, bool add) noexcept {
    const int width = segment.split[p];
    const Index at = range.at(segment, p);
    dot(width, {.plane = read.tile + at,
                .next = read.next + at,
                .blocks = range.blocks,
                .block_units = range.block_units(width),
                .units = range.units(width),
                .factors = of.factors,
                .factor_stride = of.stride,
                .rows = p == 0 ? of.all() : of.rows,
                .shift = segment.split.shift(p),
                .sums = of.sums,
                .sum_rows = of.all(),
                .add = add});
}

/// Sums all planes.
inline void sum_planes(const PlaneDot& dot, const TileFormat::Placed& segment, const TileRead& read,
                       const PlaneRange& range, const FactorRows& of) noexcept {
    const PlaneSplit& split = segment.split;
    if (const PlaneDot::Pair pair = dot.pair(segment.bits)) {
        const Index at[2] = {range.at(segment, 0), range.at(segment, 1)};
        pair({.first = read.tile + at[0],
              .second = read.tile + at[1],
              .first_next = read.next + at[0],
              .second_next = read.next + at[1],
              .blocks = range.blocks,
              .first_block_units = range.block_units(split[0]),
              .second_block_units = range.block_units(split[1]),
              .first_units = range.units(split[0]),
              .second_units = range.units(split[1]),
              .factors = of.factors,
              .factor_stride = of.stride,
              .rows = of.rows,
              .low_rows = of.low_rows,
              .shift = split.shift(0),
              .sums = of.sums,
              .sum_rows = of.all()});
        return;
    }
    for (int p = 0; p < split.count; ++p) sum_plane(dot, segment, read, range, of, p, p > 0);
}

}  // namespace kvplane::detail
