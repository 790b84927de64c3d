// kvplane/attention/impl/tile_attention.hpp: factors, integer sums, and what they come to.
#pragma once

#include <algorithm>
#include <array>

#include "kvplane/attention/factors.hpp"
#include "kvplane/attention/half_tile.hpp"
#include "kvplane/attention/kernels/dispatch.hpp"
#include "kvplane/attention/plane_range.hpp"
#include "kvplane/attention/round_factors.hpp"
#include "kvplane/attention/tile_attention.hpp"
#include "kvplane/attention/token_grids.hpp"

namespace kvplane::detail {

/// The grids of one group of tokens (keys) or of one run of channels (values).
struct GridView {
    const Eigen::half *step, *lower;  ///< lower is nullptr where the scheme has none
    float centre;                     ///< the middle of all codes in steps above lower; above 0 without it
};
/// `count` grids from `first` on.
inline GridView grids_of(const TileFormat::Placed& segment, const std::byte* tile, Index first, Index count,
                         AttentionScratch& scratch) noexcept {
    const auto* const lower = reinterpret_cast<const Eigen::half*>(tile + segment.lower_at);
    return {steps_of(segment, tile, first, count, scratch.steps()),
            has_lower(segment.scheme) ? lower + first : nullptr, centre_of(segment.scheme, segment.bits)};
}

/// The factors of several rows, and the sums of their products with the planes of one segment, in one run of
/// its blocks at a time. The low halves of wide factors are rows of their own, after all high halves.
class PlaneSums {
  public:
    /// along: how many channels (keys) or tokens (values) the dot product goes over.
    PlaneSums(Isa isa, const TileFormat::Placed& segment, const TileRead& read, Index along, Index rows,
              AttentionScratch& scratch) noexcept
        : isa_(isa),
          segment_(segment),
          read_(read),
          along_(along),
          rows_(rows),
          wide_(segment.bits > 4 && read.wide_factors),
          scratch_(scratch) {
        if (!read.planes) return;
        groups_ = plane_groups(segment.split, along);
        prefix_ = &scratch.prefix_read(segment.split, groups_, read.planes, padded_depth(along), wide_);
    }

    /// Whether any plane is read.
    bool reads_any() const noexcept { return !prefix_ || !prefix_->active.empty(); }

    /// Makes the factors of all rows from x [row][along] and these grids.
    void make_factors(RowView<const float> x, const GridView& grids) noexcept {
        const float middle = 0.5f * (power_of_two(segment_.bits) - 1.0f);
        const Factors all{.x = x.data,
                          .stride = x.stride,
                          .count = along_,
                          .step = grids.step,
                          .lower = grids.lower,
                          .centre = grids.centre,
                          .middle = middle,
                          .middle_below = 0.5f * (power_of_two(segment_.split.shift(0)) - 1.0f),
                          .depth = padded_depth(along_),
                          .folded = scratch_.folded(),
                          .unread = prefix_ ? prefix_->unread : nullptr,
                          .unread_low = prefix_ ? prefix_->unread_low : nullptr,
                          .active = prefix_ ? prefix_->active.data() : nullptr,
                          .active_count = prefix_ ? static_cast<Index>(prefix_->active.size()) : 0,
                          .high = scratch_.factors(0),
                          .low = wide_ ? scratch_.factors(rows_) : nullptr,
                          .factor_stride = scratch_.depth(),
                          .worth = worth_.data(),
                          .base = base_.data()};
        round_factors(isa_, all, rows_);
    }

    /// Sums `blocks` blocks from `first` on.
    void sum(Index first, Index blocks) noexcept {
        if (prefix_)
            sum_prefixes(first, blocks);
        else
            sum_all(first, blocks);
    }

    /// to[r][16 b ...] += (or =, if fresh) what row r and block b come to, and more[r].
    void add(Index blocks, bool fresh, const float* more, RowView<float> to) noexcept {
        const Index stride = sum_rows() * unit_lanes;
        run_on(isa_, [&](auto lanes) KVPLANE_BODY {
            for (Index r = 0; r < rows_; ++r) {
                const std::int32_t* const high = scratch_.sums() + r * unit_lanes;
                const std::int32_t* const low = wide_ ? high + rows_ * unit_lanes : nullptr;
                const float worth = worth_[static_cast<std::size_t>(r)],
                            base = base_[static_cast<std::size_t>(r)] + (more ? more[r] : 0.0f);
                if (fresh)
                    add_sums<lanes, true>(high, low, stride, blocks, worth, base, to[r]);
                else
                    add_sums<lanes, false>(high, low, stride, blocks, worth, base, to[r]);
            }
        });
    }

    /// to[r][c] += what values come to of which no plane is read: weights times the middles of their grids.
    void add_only_middles(const float* weights, const GridView& grids, Index blocks,
                          RowView<float> to) noexcept {
        run_on(isa_, [=, rows = rows_](auto lanes) KVPLANE_BODY {
            by_rows(rows, [=](auto together, Index first) KVPLANE_BODY {
                add_middles<lanes, together>(weights + first * tile_tokens, grids.step, grids.lower,
                                             grids.centre, blocks * unit_lanes, to[first], to.stride);
            });
        });
    }
    /// Fetches what will be read of the next tile, where this one's planes are not.
    void fetch_next(Index first, Index blocks) const noexcept {
        for (int p = 0; p < segment_.split.count; ++p) {
            const int width = segment_.split[p];
            const Index all = units(width), each = units_of_group(width);
            const std::byte* const plane = read_.next + plane_at(p, first);
            for (Index g = 0; g < groups_; ++g)
                for (Index i = g * each; read_.planes_of_next()[g] > p && i < std::min((g + 1) * each, all);
                     ++i)
                    for (Index b = 0; b < blocks; ++b)
                        __builtin_prefetch(plane + (b * all + i) * unit_bytes, 0, 2);
        }
    }

  private:
    Index sum_rows() const noexcept { return wide_ ? 2 * rows_ : rows_; }
    /// Units of a block in a plane of that width.
    Index units(int width) const noexcept {
        const Index depth = TileFormat::unit_depth(width);
        return (along_ + depth - 1) / depth;
    }
    Index units_of_group(int width) const noexcept {
        return plane_group_size(segment_.split) / TileFormat::unit_depth(width);
    }
    /// Where block `first` begins in plane p.
    Index plane_at(int p, Index first) const noexcept {
        return segment_.plane_at[static_cast<std::size_t>(p)] + first * units(segment_.split[p]) * unit_bytes;
    }

    /// Rows of factors from place `from` on.
    FactorRows factor_rows_from(Index from) noexcept {
        return {.factors = scratch_.factors(0) + from,
                .stride = scratch_.depth(),
                .rows = rows_,
                .low_rows = sum_rows() - rows_,
                .sums = scratch_.sums()};
    }
    void sum_all(Index first, Index blocks) noexcept {
        sum_planes(plane_dot_of(isa_), segment_, read_, {along_, 0, along_, first, blocks},
                   factor_rows_from(0));
    }

    void sum_prefixes(Index first, Index blocks) noexcept {
        const PlaneDot& dot = plane_dot_of(isa_);
        const PlaneSplit& split = segment_.split;
        if (segment_.bits == 8 && dot.some) {
            const Index at[2] = {plane_at(0, first), plane_at(1, first)};
            dot.some({.first = read_.tile + at[0],
                      .second = read_.tile + at[1],
                      .first_next = read_.next + at[0],
                      .second_next = read_.next + at[1],
                      .blocks = blocks,
                      .block_units = units(4),
                      .groups = prefix_->by_depth,
                      .next_groups = read_.planes_of_next() == read_.planes
                                         ? prefix_->by_depth
                                         : scratch_.by_depth(1, read_.next_planes, groups_, split.count),
                      .factors = scratch_.factors(0),
                      .factor_stride = scratch_.depth(),
                      .rows = rows_,
                      .low_rows = sum_rows() - rows_,
                      .sums = scratch_.sums(),
                      .sum_rows = sum_rows()});
            return;
        }
        std::fill_n(scratch_.sums(), blocks * sum_rows() * unit_lanes, 0);
        for (int p = 0; p < split.count; ++p) {
            const Index all = units(split[p]), each = units_of_group(split[p]);
            for (Index from = 0, to; from < groups_; from = to + 1) {  // runs of groups that are read
                while (from < groups_ && read_.planes[from] <= p) ++from;
                for (to = from; to < groups_ && read_.planes[to] > p;) ++to;
                const Index count = std::min(to * each, all) - from * each;
                const Index depth = TileFormat::unit_depth(split[p]), at = from * each * depth;
                if (count > 0)
                    sum_plane(dot, segment_, read_, {along_, at, count * depth, first, blocks},
                              factor_rows_from(at), p, true);
            }
        }
    }

    Isa isa_;
    const TileFormat::Placed& segment_;
    const TileRead& read_;
    Index along_, rows_;
    Index groups_ = 0;
    bool wide_;
    AttentionScratch& scratch_;
    const PrefixRead* prefix_ = nullptr;  ///< nullptr: all planes are read
    std::array<float, row_block_rows> worth_{}, base_{};
};

KVPLANE_FUNCTION bool reads_key_planes(const TileFormat& format) noexcept {
    return format.side() == TileSide::keys &&
           std::all_of(format.segments().begin(), format.segments().end(), [&](const TileFormat::Placed& s) {
               return s.is_half() || format.rule().granularity == Granularity::per_channel ||
                      reads_token_grids(format.rule().group, s);
           });
}
KVPLANE_FUNCTION bool reads_value_planes(const TileFormat& format) noexcept {
    if (format.side() != TileSide::values || (format.segments().size() != 1 && !format.by_token()))
        return false;
    if (format.segments()[0].is_half()) return true;
    return format.rule().granularity == Granularity::per_token && format.segments()[0].bits >= 1 &&
           format.segments()[0].bits <= 8 &&
           (format.rule().group >= format.channels() || format.rule().group % unit_lanes == 0);
}

KVPLANE_FUNCTION void tile_scores(Isa isa, const TileFormat& format, const TileRead& read,
                                  RowView<const float> queries, const float* offsets,
                                  AttentionScratch& scratch, float* scores) noexcept {
    const Index rows = queries.rows, group = format.rule().group, blocks = group / unit_lanes;
    prefetch_grids(format, read.next);
    TileRead part = read;
    bool fresh = true;
    for (const TileFormat::Placed& segment : format.segments()) {
        if (segment.bits == 0) continue;
        const float* const more = fresh ? offsets : nullptr;
        const RowView<const float> x{queries.data + segment.first_channel, queries.stride, rows};
        if (segment.is_half()) {
            half_sums(isa, format, segment, part,
                      {.x = x, .fresh = fresh, .more = more, .to = {scores, tile_tokens, rows}}, scratch);
        } else if (format.rule().granularity == Granularity::per_token) {
            token_grid_scores(isa, format, segment, part,
                              {.x = x, .fresh = fresh, .more = more, .to = {scores, tile_tokens, rows}},
                              scratch);
        } else {
            PlaneSums sums(isa, segment, part, segment.channels, rows, scratch);
            for (Index g = 0; g * group < tile_tokens; ++g) {
                sums.make_factors(
                    x, grids_of(segment, read.tile, g * segment.channels, segment.channels, scratch));
                sums.sum(g * blocks, blocks);
                sums.add(blocks, fresh, more, {scores + g * group, tile_tokens, rows});
            }
        }
        fresh = false;
        const Index groups = plane_groups(segment.split, segment.channels);
        if (part.planes) part.planes += groups;
        if (part.next_planes) part.next_planes += groups;
    }
    if (!fresh) return;
    for (Index r = 0; r < rows; ++r) std::fill_n(scores + r * tile_tokens, tile_tokens, offsets[r]);
}

/// The weights in the order of a tile's rows.
inline const float* weights_of_rows(Isa isa, const TileFormat& format, const std::byte* tile,
                                    const float* weights, Index rows, AttentionScratch& scratch) noexcept {
    float* const to = scratch.row_weights();
    const PlaneDot& kernels = plane_dot_of(isa);
    if (kernels.order) {
        kernels.order({.run_planes = tile,
                       .plane_count = format.run_planes(),
                       .runs = static_cast<int>(format.segments().size()),
                       .weights = weights,
                       .rows = rows,
                       .to = to});
        return to;
    }
    const TokenOfRow token_of_row = read_runs(format, tile);
    for (Index r = 0; r < rows; ++r)
        for (Index row = 0; row < tile_tokens; ++row)
            to[r * tile_tokens + row] =
                weights[r * tile_tokens + token_of_row[static_cast<std::size_t>(row)]];
    return to;
}

/// Whether one set of narrow factors serves all runs of tokens: the steps of all rows stand side by side, and
/// grids have no lowers.
inline bool shares_factors(const TileFormat& format) noexcept {
    const TileFormat::Placed& widest = format.segments()[0];
    return format.by_token() && widest.bits <= 4 && widest.scheme == Scheme::unbiased &&
           format.rule().group >= format.channels();
}

/// The sums of all runs together, which differ in the middle of their codes alone.
///   weights  [row][128] in the order of the tile's rows
inline void add_runs(Isa isa, const TileFormat& format, const TileRead& read, const float* weights,
                     AttentionScratch& scratch, RowView<float> output) noexcept {
    const Index rows = output.rows, blocks = (format.channels() + unit_lanes - 1) / unit_lanes;
    float* const below = scratch.below_middles();
    for (const TileFormat::Placed& run : format.segments())
        std::fill_n(below + run.first_row, run.rows, -0.5f * (power_of_two(run.bits) - 1.0f));
    std::array<float, row_block_rows> worth{}, base{};
    round_factors(isa,
                  {.x = weights,
                   .stride = tile_tokens,
                   .count = tile_tokens,
                   .step = steps_of(format.segments()[0], read.tile, 0, tile_tokens, scratch.steps()),
                   .lower = nullptr,
                   .centre = 0.0f,
                   .middle = 0.0f,
                   .middle_below = 0.0f,
                   .depth = tile_tokens,
                   .folded = scratch.folded(),
                   .unread = below,
                   .unread_low = nullptr,
                   .active = nullptr,
                   .active_count = 0,
                   .high = scratch.factors(0),
                   .low = nullptr,
                   .factor_stride = scratch.depth(),
                   .worth = worth.data(),
                   .base = base.data()},
                  rows);
    const PlaneDot& dot = plane_dot_of(isa);
    bool add = false;
    for (const TileFormat::Placed& run : format.segments())
        for (int p = 0; p < run.split.count; ++p) {
            const int width = run.split[p];
            const Index at = run.plane_at[static_cast<std::size_t>(p)],
                        units = run.rows / TileFormat::unit_depth(width);
            dot(width, {.plane = read.tile + at,
                        .next = read.next + at,
                        .blocks = blocks,
                        .block_units = units,
                        .units = units,
                        .factors = scratch.factors(0) + run.first_row,
                        .factor_stride = scratch.depth(),
                        .rows = rows,
                        .shift = run.split.shift(p),
                        .sums = scratch.sums(),
                        .sum_rows = rows,
                        .add = add});
            add = true;
        }
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        for (Index r = 0; r < rows; ++r)
            add_sums<lanes, false>(scratch.sums() + r * unit_lanes, nullptr, rows * unit_lanes, blocks,
                                   worth[static_cast<std::size_t>(r)], base[static_cast<std::size_t>(r)],
                                   output[r]);
    });
}

KVPLANE_FUNCTION void add_tile_values(Isa isa, const TileFormat& format, const TileRead& read,
                                      const float* weights, AttentionScratch& scratch,
                                      RowView<float> output) noexcept {
    prefetch_grids(format, read.next);
    if (format.by_token()) weights = weights_of_rows(isa, format, read.tile, weights, output.rows, scratch);
    if (shares_factors(format)) return add_runs(isa, format, read, weights, scratch, output);
    for (const TileFormat::Placed& segment : format.segments()) {
        const Index rows = segment.rows;
        const RowView<const float> x{weights + segment.first_row, tile_tokens, output.rows};
        if (segment.is_half())
            return half_sums(isa, format, segment, read,
                             {.x = x, .fresh = false, .more = nullptr, .to = output}, scratch);
        const Index run = std::min(format.rule().group, segment.channels);
        PlaneSums sums(isa, segment, read, rows, output.rows, scratch);
        for (Index first = 0, g = 0; first < segment.channels; first += run, ++g) {
            const Index blocks = (std::min(run, segment.channels - first) + unit_lanes - 1) / unit_lanes;
            const GridView grids = grids_of(segment, read.tile, g * rows, rows, scratch);
            const RowView<float> to{output.data + first, output.stride, output.rows};
            if (!sums.reads_any()) {
                sums.add_only_middles(weights, grids, blocks, to);
                sums.fetch_next(first / unit_lanes, blocks);
                continue;
            }
            sums.make_factors(x, grids);
            sums.sum(first / unit_lanes, blocks);
            sums.add(blocks, false, nullptr, to);
        }
    }
}

}  // namespace kvplane::detail
