// kvplane/read/impl/importance.hpp: queries times steps, a vector of channels at a time.
#pragma once

#include <algorithm>
#include <cmath>

#include "kvplane/attention/lanes.hpp"
#include "kvplane/attention/plane_groups.hpp"
#include "kvplane/read/importance.hpp"

namespace kvplane::detail {

/// values[c] = (sum of squares of x over rows, or with `reach` the largest |x|) times (the mean square of a
/// channel's steps over its groups of tokens, or the largest), for the channels of a segment from `c` on.
template <int Lanes>
KVPLANE_INLINE Index importance_by_channel(const float* x, Index stride, Index rows, const Eigen::half* step,
                                           Index channels, Index groups, bool reach, float* values) {
    Index c = 0;
    for (; c + Lanes <= channels; c += Lanes) {
        Floats<Lanes> factors{}, steps{}, v;
        for (Index r = 0; r < rows; ++r) {
            load(v, x + r * stride + c);
            v = (Floats<Lanes>)((Words<Lanes>)v & 0x7FFFFFFFu);
            if (reach)
                factors = factors < v ? v : factors;
            else
                factors += v * v;
        }
        for (Index g = 0; g < groups; ++g) {
            widen<Lanes>(v, step + g * channels + c);
            v = (Floats<Lanes>)((Words<Lanes>)v & 0x7FFFFFFFu);
            if (reach)
                steps = steps < v ? v : steps;
            else
                steps += v * v * (1.0f / static_cast<float>(groups));
        }
        store(values + c, factors * steps);
    }
    return c;
}

KVPLANE_FUNCTION void key_importance(Isa isa, const TileFormat& format, const std::byte* tile,
                                     RowView<const float> queries, bool reach, float* values,
                                     PlaneGroup* groups_out) noexcept {
    const Index stride = queries.stride, rows = queries.rows;
    for (const TileFormat::Placed& s : format.segments()) {
        if (s.bits == 0) continue;
        const float* const x = queries.data + s.first_channel;
        const auto* step = reinterpret_cast<const Eigen::half*>(tile + s.step_at);
        const Index groups = s.is_half() ? 0 : tile_tokens / format.rule().group;
        Index c = 0;
        if (groups > 0)
            run_on(isa, [&](auto lanes) KVPLANE_BODY {
                c = importance_by_channel<lanes>(x, stride, rows, step, s.channels, groups, reach, values);
            });
        for (; c < s.channels; ++c) {
            float factors = 0.0f, steps = 0.0f;
            for (Index r = 0; r < rows; ++r) {
                const float q = std::abs(x[r * stride + c]);
                factors = reach ? std::max(factors, q) : factors + q * q;
            }
            for (Index g = 0; g < groups; ++g) {
                const float width = std::abs(static_cast<float>(step[g * s.channels + c]));
                steps = reach ? std::max(steps, width) : steps + width * width / static_cast<float>(groups);
            }
            if (s.is_half()) {
                steps = power_of_two(std::max<int>(largest_exponents(s, tile)[c], 1) - 25);
                if (!reach) steps *= steps;
            }
            values[c] = factors * steps;
        }
        const Index depth = plane_group_size(s.split);
        for (Index first = 0; first < s.channels; first += depth) {
            const Index end = std::min(first + depth, s.channels);
            float sum = 0.0f;
            for (c = first; c < end; ++c) sum += values[c];
            *groups_out++ = {sum, s.split, static_cast<int>(end - first)};
        }
    }
}

}  // namespace kvplane::detail
