// kvplane/attention/query_factors.hpp: queries as factors of keys whose grids are by token.
//
// Such a grid covers a run of channels of one token. A factor therefore is an element of the query as it is, and
// the token's step multiplies the sum of a run's products. Factors are rounded run by run, as factors.hpp rounds
// those of steps of 1, so that T14 holds for each run, times the token's step.
//
// They are the same for all tiles. The last ones are kept, with the queries that they were made for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "kvplane/attention/round_factors.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/simd/line_vector.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane::detail {

class QueryFactors {
  public:
    /// For up to `rows` rows of up to `depth` channels, whole units. Throws std::bad_alloc.
    void reserve(Index rows, Index depth) {
        const auto size = static_cast<std::size_t>(rows * depth);
        made_ = {};
        queries_.resize(size);
        factors_.resize(2 * size);
        folded_.resize(4 * static_cast<std::size_t>(depth));
        ones_.assign(static_cast<std::size_t>(depth), Eigen::half(1.0f));
        const auto runs = static_cast<std::size_t>(depth / padded_depth(1) * rows);
        worth_.resize(runs);
        base_.resize(runs);
        sums_.resize(runs);
        stride_ = depth;
    }

    /// Makes the factors of queries [row][channels] for a segment with grids over runs of `run` channels.
    void make(Isa isa, const TileFormat::Placed& segment, Index run, RowView<const float> queries) noexcept {
        const Made wanted{isa, queries.rows, segment.channels, run, segment.bits, segment.scheme};
        if (wanted == made_ && same(queries)) return;
        made_ = wanted;
        for (Index r = 0; r < queries.rows; ++r)
            std::copy_n(queries[r], segment.channels, queries_.data() + r * stride_);
        Factors all{.x = queries_.data(),
                    .stride = stride_,
                    .count = 0,
                    .step = ones_.data(),
                    .lower = nullptr,
                    .centre = centre_of(segment.scheme, segment.bits),
                    .middle = 0.5f * (power_of_two(segment.bits) - 1.0f),
                    .middle_below = 0.5f * (power_of_two(segment.split.shift(0)) - 1.0f),
                    .depth = 0,
                    .folded = folded_.data(),
                    .unread = nullptr,
                    .unread_low = nullptr,
                    .active = nullptr,
                    .active_count = 0,
                    .high = factors_.data(),
                    .low = wide() ? factors_.data() + queries.rows * stride_ : nullptr,
                    .factor_stride = stride_,
                    .worth = worth_.data(),
                    .base = base_.data()};
        for (Index first = 0; first < segment.channels; first += run) {
            all.count = std::min(run, segment.channels - first);
            all.depth = padded_depth(all.count);
            make_run(isa, all, sums_.data() + (all.worth - worth_.data()));
            all.x += run, all.high += run;
            if (all.low) all.low += run;
            all.worth += queries.rows, all.base += queries.rows;
        }
    }

    /// Whether factors have low halves.
    bool wide() const noexcept { return made_.bits > 4; }
    /// [row][stride]: factors, or their high halves, then low halves, from channel `first` on.
    const std::int8_t* factors(Index first) const noexcept { return factors_.data() + first; }
    Index stride() const noexcept { return stride_; }

    /// What the sums of a run's products stand for: [row] each.
    struct Run {
        const float* worth;  ///< of 1
        const float* base;   ///< what to add to them
        const float* sum;    ///< of the query's elements
    };
    Run run(Index index) const noexcept {
        const Index at = index * made_.rows;
        return {worth_.data() + at, base_.data() + at, sums_.data() + at};
    }

  private:
    /// What factors were made for, beside the queries.
    struct Made {
        Isa isa = Isa::scalar;
        Index rows = 0, channels = 0, run = 0;
        int bits = 0;
        Scheme scheme = Scheme::min_max;

        bool operator==(const Made&) const = default;
    };

    bool same(RowView<const float> queries) const noexcept {
        for (Index r = 0; r < made_.rows; ++r)
            if (std::memcmp(queries[r], queries_.data() + r * stride_,
                            static_cast<std::size_t>(made_.channels) * sizeof(float)) != 0)
                return false;
        return true;
    }
    void make_run(Isa isa, const Factors& all, float* sums) const noexcept {
        round_factors(isa, all, made_.rows);
        for (Index r = 0; r < made_.rows; ++r)
            sums[r] = std::accumulate(all.x + r * all.stride, all.x + r * all.stride + all.count, 0.0f);
    }

    Made made_;
    Index stride_ = 0;
    LineVector<float> queries_;               ///< [row][stride]
    LineVector<std::int8_t> factors_;         ///< [2 rows][stride]
    LineVector<float> folded_;                ///< [4][stride]
    std::vector<Eigen::half> ones_;           ///< [stride] steps
    std::vector<float> worth_, base_, sums_;  ///< [run][row]
};

}  // namespace kvplane::detail
