// kvplane/attention/scratch.hpp: what one worker needs to read tiles: arrays that are kept from tile to tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "kvplane/attention/factors.hpp"
#include "kvplane/attention/kernels/plane_dot.hpp"
#include "kvplane/attention/plane_groups.hpp"
#include "kvplane/attention/query_factors.hpp"
#include "kvplane/simd/line_vector.hpp"

namespace kvplane::detail {

/// Query rows (heads that share a key head, times query tokens) that are taken together.
inline constexpr Index row_block_rows = 32;
/// Unquantized tokens that are taken together.
inline constexpr Index token_block = 32;

/// A read of part of the planes of one segment.
struct PrefixRead {
    PlaneSplit split;
    Index groups = -1, depth = 0;
    bool wide_factors = false;
    GroupsByDepth by_depth{};
    /// The blocks of 16 channels or tokens of which some plane is read.
    std::span<const std::uint16_t> active;
    /// [depth] what unread bits count as: for whole factors, or their high halves, and for low halves.
    const float *unread = nullptr, *unread_low = nullptr;
};

class AttentionScratch {
  public:
    /// For tiles of up to `channels` channels.
    explicit AttentionScratch(Index channels = 0) { reserve(channels); }
    /// Not copied: it points into itself.
    AttentionScratch(AttentionScratch&&) noexcept = default;
    AttentionScratch& operator=(AttentionScratch&&) noexcept = default;

    /// Grows, where need be. Throws std::bad_alloc and then is as large as before.
    void reserve(Index channels) {
        const Index depth = padded_depth(std::max(channels, tile_tokens));
        if (depth <= depth_) return;
        const auto size = static_cast<std::size_t>(row_block_rows * depth);
        // Segments of latents may be as small as a group each.
        const auto groups = static_cast<std::size_t>(depth);
        factors_.resize(2 * size);
        folded_.resize(4 * static_cast<std::size_t>(depth));
        sums_.resize(2 * size);
        scores_.resize(static_cast<std::size_t>(row_block_rows * tile_tokens));
        row_weights_.resize(scores_.size() + unit_lanes);
        below_middles_.resize(static_cast<std::size_t>(tile_tokens));
        rows_.resize(static_cast<std::size_t>(token_block * depth));
        values_.resize(static_cast<std::size_t>(unit_lanes * depth));
        steps_.resize(static_cast<std::size_t>(tile_tokens));
        unread_.resize(2 * groups);
        active_.resize(groups / unit_lanes + 1);
        prefix_planes_.resize(groups);
        by_depth_.resize(2 * GroupsByDepth::depths * groups);
        query_factors_.reserve(row_block_rows, depth);
        prefix_.groups = -1;
        depth_ = depth;  // last: where memory ends before, the arrays still fit the old depth
    }

    Index depth() const noexcept { return depth_; }
    /// [2 row_block_rows][depth]: factors, or their high halves, then low halves
    std::int8_t* factors(Index row) noexcept { return factors_.data() + row * depth_; }
    float* folded() noexcept { return folded_.data(); }                ///< [4][depth]
    std::int32_t* sums() noexcept { return sums_.data(); }             ///< [blocks][2 row_block_rows][16]
    float* scores() noexcept { return scores_.data(); }                ///< [row_block_rows][128]
    QueryFactors& query_factors() noexcept { return query_factors_; }  ///< where grids of keys are by token
    // Where tokens have different widths:
    /// [row_block_rows][128] weights in the order of a tile's rows, and room for a vector behind them
    float* row_weights() noexcept { return row_weights_.data(); }
    float* below_middles() noexcept { return below_middles_.data(); }  ///< [128] of the codes of rows
    Eigen::half* steps() noexcept { return steps_.data(); }            ///< [128] of grids by token
    RowView<float> rows() noexcept { return {rows_.data(), depth_, token_block}; }
    float* values() noexcept { return values_.data(); }  ///< [depth][16] of one block of an fp16 tile

    /// The groups of the tile that is read (which = 0) or of the one that is read next (1), by depth.
    GroupsByDepth by_depth(int which, const std::uint8_t* planes, Index groups, int all) noexcept {
        if (which == 0) prefix_.groups = -1;
        return {planes, groups, all, by_depth_.data() + which * static_cast<Index>(by_depth_.size() / 2)};
    }
    /// What a read of planes [groups] comes to. It is kept for the next tile, which is often read alike.
    const PrefixRead& prefix_read(const PlaneSplit& split, Index groups, const std::uint8_t* planes,
                                  Index depth, bool wide_factors) noexcept {
        if (prefix_.groups == groups && prefix_.split == split && prefix_.depth == depth &&
            prefix_.wide_factors == wide_factors &&
            std::equal(planes, planes + groups, prefix_planes_.data()))
            return prefix_;
        const GroupsByDepth lists = by_depth(0, planes, groups, split.count);
        std::copy_n(planes, groups, prefix_planes_.data());
        fill_unread(split, groups, planes, depth, wide_factors);
        const Index active = list_active(split, groups, planes, depth);
        prefix_ = {.split = split,
                   .groups = groups,
                   .depth = depth,
                   .wide_factors = wide_factors,
                   .by_depth = lists,
                   .active = std::span(active_).first(static_cast<std::size_t>(active)),
                   .unread = unread_.data(),
                   .unread_low = unread_.data() + depth_};
        return prefix_;
    }

  private:
    void fill_unread(const PlaneSplit& split, Index groups, const std::uint8_t* planes, Index depth,
                     bool wide_factors) noexcept {
        const Index size = plane_group_size(split);
        float reach[GroupsByDepth::depths];
        for (int p = 0; p <= split.count; ++p) reach[p] = unread_reach(split, p);
        float *const high = unread_.data(), *const low = high + depth_;
        // Whole groups, for which the padding has room.
        for (Index g = 0; g < groups; ++g)
            for (Index i = 0; i < size; i += 8) std::fill_n(high + g * size + i, 8, reach[planes[g]]);
        std::fill(high + std::min(groups * size, depth), high + depth, 0.0f);
        if (!wide_factors) return;
        // Low halves meet the first plane alone.
        for (Index g = 0; g < groups; ++g)
            std::fill_n(low + g * size, size, planes[g] > 0 ? 0.0f : reach[0] - reach[1]);
        std::fill(low + std::min(groups * size, depth), low + depth, 0.0f);
    }
    Index list_active(const PlaneSplit& split, Index groups, const std::uint8_t* planes,
                      Index depth) noexcept {
        const Index size = plane_group_size(split);
        Index active = 0;
        for (Index b = 0; b < depth / unit_lanes; ++b) {
            active_[static_cast<std::size_t>(active)] = static_cast<std::uint16_t>(b);
            const Index first = b * unit_lanes / size, last = ((b + 1) * unit_lanes - 1) / size;
            bool any = false;
            for (Index g = first; g <= std::min(last, groups - 1); ++g) any = any || planes[g] > 0;
            active += any;
        }
        return active;
    }

    Index depth_ = 0;
    LineVector<std::int8_t> factors_;
    LineVector<float> folded_, scores_, row_weights_, below_middles_, rows_, values_;
    LineVector<std::int32_t> sums_;
    LineVector<Eigen::half> steps_;
    QueryFactors query_factors_;
    // Of prefix reads.
    LineVector<float> unread_;                 ///< [2][depth]
    std::vector<std::uint8_t> prefix_planes_;  ///< the planes that prefix_ was made for
    std::vector<std::uint16_t> active_, by_depth_;
    PrefixRead prefix_;
};

}  // namespace kvplane::detail
