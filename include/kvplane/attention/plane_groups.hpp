// kvplane/attention/plane_groups.hpp: what one decision about planes covers, and what it leaves out.
//
// A plane group is the channels of keys, or the tokens of values, whose planes are read or not together:
// those that the deepest unit of any of their planes covers.
#pragma once

#include <algorithm>

#include "kvplane/matrix.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane::detail {

/// Channels (keys) or tokens (values) of a whole group.
constexpr Index plane_group_size(const PlaneSplit& split) noexcept {
    Index size = 8;
    for (int p = 0; p < split.count; ++p) size = std::max(size, TileFormat::unit_depth(split[p]));
    return size;
}
/// The groups of `count` channels or tokens.
constexpr Index plane_groups(const PlaneSplit& split, Index count) noexcept {
    const Index size = plane_group_size(split);
    return (count + size - 1) / size;
}
/// The channels of keys, or tokens of values, that a segment's groups share out.
inline Index grouped_elements(const TileFormat& format, const TileFormat::Placed& segment) noexcept {
    return format.side() == TileSide::keys ? segment.channels : segment.rows;
}
/// The groups of a tile, those of all segments that have bits one after another.
inline Index plane_groups(const TileFormat& format) noexcept {
    Index groups = 0;
    for (const TileFormat::Placed& s : format.segments())
        if (s.bits > 0) groups += plane_groups(s.split, grouped_elements(format, s));
    return groups;
}

/// How far a code of which `planes` planes are read lies at most from what it counts as: the middle of what
/// the unread bits hold, (2^unread - 1) / 2; for fp16, whose fill is a bit pattern, 2^unread / 2.
constexpr float unread_reach(const PlaneSplit& split, int planes) noexcept {
    const int unread = split.bits() - split.prefix_bits(planes);
    return unread == 0 ? 0.0f : 0.5f * (power_of_two(unread) - (split.is_half() ? 0.0f : 1.0f));
}

/// How much of a tile a read takes, and which tile comes after it.
struct TileRead {
    const std::byte* tile;
    const std::byte* next;  ///< a tile that is read next, to be prefetched; or the same
    /// [plane_groups(format)] planes to read of each group, the rest counts as its middle; nullptr: all
    const std::uint8_t* planes = nullptr;
    const std::uint8_t* next_planes = nullptr;  ///< the same of `next`; nullptr: as `planes`
    /// Whether factors that meet codes of more than 4 bits are wide (attention/factors.hpp).
    bool wide_factors = true;

    const std::uint8_t* planes_of_next() const noexcept { return next_planes ? next_planes : planes; }
};

/// What a segment of a tile is multiplied by, and where the sums go.
struct SegmentProduct {
    RowView<const float> x;  ///< [row][channels] (keys) or [row][tokens] (values)
    bool fresh;              ///< whether sums replace what is there
    const float* more;       ///< [row] added to fresh sums, or nullptr
    RowView<float> to;       ///< [row][tokens] or [row][channels]
};

}  // namespace kvplane::detail
