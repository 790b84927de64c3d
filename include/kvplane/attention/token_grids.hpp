// kvplane/attention/token_grids.hpp: scores of keys whose grids are by token.
//
// A grid covers a run of channels of one token, so that a score is a sum over runs,
//
//   q.k'_t = sum over runs of step_t sum_c q_c code_tc + (lower_t + step_t / 2) sum_c q_c.
//
// The products of codes are summed in integers run by run (query_factors.hpp, kernels/), and come times the
// steps of 16 tokens at a time. A run has whole units of every plane, or is all of a segment.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kvplane/attention/kernels/dispatch.hpp"
#include "kvplane/attention/lanes.hpp"
#include "kvplane/attention/plane_groups.hpp"
#include "kvplane/attention/plane_range.hpp"
#include "kvplane/attention/query_factors.hpp"
#include "kvplane/attention/scratch.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane::detail {

/// Whether token_grid_scores() reads grids over so many channels of a segment.
constexpr bool reads_token_grids(Index group, const TileFormat::Placed& segment) noexcept {
    return group >= segment.channels || group % TileFormat::unit_depth(1) == 0;
}

/// The sums of a run's products, [block][row][16], and what they stand for.
struct TokenGridSums {
    const std::int32_t *high, *low;  ///< low is nullptr for narrow factors
    Index block_stride, rows;
    QueryFactors::Run run;
    const Eigen::half *step, *lower;  ///< [token]; lower is nullptr where grids have none
};

/// to[r][t] += (or =, with what is `more`, if fresh) the scores of one run, for all 128 tokens.
template <int Lanes, bool fresh>
KVPLANE_INLINE void add_token_grids(const TokenGridSums& sums, const float* more, float* to, Index stride) {
    for (Index t = 0; t < tile_tokens; t += Lanes) {
        Floats<Lanes> step, lower{}, score;
        widen<Lanes>(step, sums.step + t);
        if (sums.lower) widen<Lanes>(lower, sums.lower + t);
        const Index at = t / unit_lanes * sums.block_stride + t % unit_lanes;
        for (Index r = 0; r < sums.rows; ++r) {
            const float worth = sums.run.worth[r];
            Ints<Lanes> high, low;
            load(high, sums.high + at + r * unit_lanes);
            Floats<Lanes> sum =
                __builtin_convertvector(high, Floats<Lanes>) * (sums.low ? 256.0f * worth : worth) +
                sums.run.base[r];
            if (sums.low) {
                load(low, sums.low + at + r * unit_lanes);
                sum += __builtin_convertvector(low, Floats<Lanes>) * worth;
            }
            sum *= step;
            if (sums.lower) sum += lower * sums.run.sum[r];
            if (!fresh) {
                load(score, to + r * stride + t);
                sum += score;
            } else if (more) {
                sum += more[r];
            }
            store(to + r * stride + t, sum);
        }
    }
}

/// Scores of one segment whose grids are by token. All of its planes are read.
inline void token_grid_scores(Isa isa, const TileFormat& format, const TileFormat::Placed& segment,
                              const TileRead& read, const SegmentProduct& product,
                              AttentionScratch& scratch) noexcept {
    const Index rows = product.x.rows, group = std::min(format.rule().group, segment.channels);
    QueryFactors& factors = scratch.query_factors();
    factors.make(isa, segment, group, product.x);
    const Index low_rows = factors.wide() ? rows : 0;
    const auto* const lower = reinterpret_cast<const Eigen::half*>(read.tile + segment.lower_at);
    for (Index first = 0, g = 0; first < segment.channels; first += group, ++g) {
        sum_planes(plane_dot_of(isa), segment, read,
                   {.along = segment.channels,
                    .first = first,
                    .count = std::min(group, segment.channels - first),
                    .first_block = 0,
                    .blocks = tile_tokens / unit_lanes},
                   {.factors = factors.factors(first),
                    .stride = factors.stride(),
                    .rows = rows,
                    .low_rows = low_rows,
                    .sums = scratch.sums()});
        const TokenGridSums sums{
            .high = scratch.sums(),
            .low = low_rows > 0 ? scratch.sums() + rows * unit_lanes : nullptr,
            .block_stride = (rows + low_rows) * unit_lanes,
            .rows = rows,
            .run = factors.run(g),
            .step = steps_of(segment, read.tile, g * tile_tokens, tile_tokens, scratch.steps()),
            .lower = has_lower(segment.scheme) ? lower + g * tile_tokens : nullptr};
        run_on(isa, [&](auto lanes) KVPLANE_BODY {
            if (product.fresh && g == 0)
                add_token_grids<lanes, true>(sums, product.more, product.to.data, product.to.stride);
            else
                add_token_grids<lanes, false>(sums, nullptr, product.to.data, product.to.stride);
        });
    }
}

}  // namespace kvplane::detail
