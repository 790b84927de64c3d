// kvplane/read/impl/value_importance.hpp: steps and weights of tokens, a vector at a time.
#pragma once

#include <algorithm>
#include <cmath>

#include "kvplane/attention/lanes.hpp"
#include "kvplane/read/value_importance.hpp"

namespace kvplane::detail {

/// Merges `count` vectors of `from` rows each into one of all rows, x[0].
template <int Lanes, int from, int count, class Combine>
KVPLANE_INLINE void merge_all(Floats<Lanes>* x, const Combine& combine) {
    if constexpr (count > 1) {
        for (int i = 0; i < count / 2; ++i)
            merge_rows<Lanes, from>(x[i], x[2 * i], x[2 * i + 1], combine, std::make_index_sequence<Lanes>{});
        merge_all<Lanes, 2 * from, count / 2>(x, combine);
    }
}
/// to[i] = sum (or largest) of x[8 i .. 8 i + 7], for i below 16. value(t, x) gives x[t .. t + Lanes - 1].
template <int Lanes, class Combine, class Value>
KVPLANE_INLINE void by_eight(const Combine& combine, const Value& value, float* to) {
    constexpr int from = Lanes < 8 ? 1 : Lanes / 8, count = Lanes / from;
    for (Index first = 0; first < tile_tokens; first += Lanes * 8, to += Lanes) {
        Floats<Lanes> x[count], more;
        for (int i = 0; i < count; ++i) {
            value(first + i * 8 * from, x[i]);
            if constexpr (Lanes < 8) {
                value(first + i * 8 + Lanes, more);
                combine(x[i], x[i], more);
            }
        }
        merge_all<Lanes, from, count>(x, combine);
        store(to, x[0]);
    }
}

KVPLANE_FUNCTION float value_steps(Isa isa, const TileFormat& format, const std::byte* tile, float largest,
                                   bool reach, float* squares) noexcept {
    const TileFormat::Placed& s = format.segments()[0];
    if (s.is_half()) {
        // The last place of the largest value, which is never below that of subnormal numbers.
        const float step = std::max(largest * 0x1p-10f, 0x1p-24f), size = static_cast<float>(s.channels);
        std::fill_n(squares, tile_tokens, reach ? step * std::sqrt(size) : step * step * size);
        return largest * std::sqrt(size);
    }
    const auto* lower =
        has_lower(s.scheme) ? reinterpret_cast<const Eigen::half*>(tile + s.lower_at) : nullptr;
    const float to_lower = lower_in_steps(s.scheme, s.bits);
    const Index run = std::min(format.rule().group, s.channels), groups = (s.channels + run - 1) / run;
    const float cells = power_of_two(s.bits);
    float most = 0.0f;
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        Floats<lanes> top{};
        Eigen::half room[lanes];
        for (Index t = 0; t < tile_tokens; t += lanes) {
            Floats<lanes> sum{}, norm{}, x, low;
            for (Index g = 0; g < groups; ++g) {
                const auto size = static_cast<float>(std::min(run, s.channels - g * run));
                widen<lanes>(x, steps_of(s, tile, g * tile_tokens + t, lanes, room));
                sum += x * x * size;
                if (!reach) continue;
                if (lower)
                    widen<lanes>(low, lower + g * tile_tokens + t);
                else
                    low = x * to_lower;
                const Floats<lanes> high = low + x * cells, a = low * low, b = high * high;
                norm += (a < b ? b : a) * size;
            }
            store(squares + t, sum);
            top = top < norm ? norm : top;
        }
        for (int i = 0; i < lanes; ++i) most = std::max(most, top[i]);
    });
    if (!reach) return 0.0f;
    Eigen::Map<Eigen::ArrayXf> roots(squares, tile_tokens);
    roots = roots.sqrt();
    return std::sqrt(most);
}

KVPLANE_FUNCTION void group_weights(Isa isa, const float* weights, Index rows, const float* steps,
                                    GroupWeight kind, Index size, float* groups) noexcept {
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        constexpr Index eighths = tile_tokens / 8;
        for (Index r = 0; r < rows; ++r) {
            const float* const row = weights + r * tile_tokens;
            float eights[eighths];
            if (kind == GroupWeight::largest)
                by_eight<lanes>(
                    larger, [=](Index t, Floats<lanes>& x) KVPLANE_BODY { load(x, row + t); }, eights);
            else
                by_eight<lanes>(
                    plus,
                    [=](Index t, Floats<lanes>& x) KVPLANE_BODY {
                        Floats<lanes> by;
                        load(x, row + t);
                        load(by, steps + t);
                        x *= kind == GroupWeight::squares ? x * by : by;
                    },
                    eights);
            const Index together = size / 8;
            for (Index u = 0; u < eighths / together; ++u) {
                float sum = eights[u * together];
                for (Index i = u * together + 1; i < (u + 1) * together; ++i)
                    sum = kind == GroupWeight::largest ? std::max(sum, eights[i]) : sum + eights[i];
                groups[r * (eighths / together) + u] = sum;
            }
        }
    });
}

}  // namespace kvplane::detail
