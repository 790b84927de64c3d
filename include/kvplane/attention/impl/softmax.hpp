// kvplane/attention/impl/softmax.hpp: scores to weights, some rows and a vector of tokens at a time.
#pragma once

#include <algorithm>
#include <cmath>

#include "kvplane/attention/lanes.hpp"
#include "kvplane/attention/softmax.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane::detail {

/// x = e^(x - largest), and `sum` grows by it lane by lane.
template <int Lanes>
KVPLANE_INLINE void exponentials(float* x, float largest, Index count, Floats<Lanes>& sum) {
    for (Index i = 0; i < count; i += Lanes) {
        Floats<Lanes> value;
        load(value, x + i);
        value -= largest;
        exponential<Lanes>(value);
        sum += value;
        store(x + i, value);
    }
}
template <int Lanes>
KVPLANE_INLINE void multiply(float* x, float by, Index count) {
    for (Index i = 0; i < count; i += Lanes) {
        Floats<Lanes> value;
        load(value, x + i);
        store(x + i, value * by);
    }
}

/// top[r] = the larger of largest[r] and of `count` scores of row r.
template <int Lanes, int rows>
KVPLANE_INLINE void raise_rows(const float* scores, Index count, const float* largest, float* top) {
    Floats<Lanes> most[4]{}, value;
    for (int r = 0; r < rows; ++r) load(most[r], scores + r * tile_tokens);
    for (Index i = Lanes; i < count; i += Lanes)
        for (int r = 0; r < rows; ++r) {
            load(value, scores + r * tile_tokens + i);
            most[r] = most[r] < value ? value : most[r];
        }
    float found[4];
    reduce_rows<Lanes>(most, found, larger);
    for (int r = 0; r < rows; ++r) top[r] = std::max(largest[r], found[r]);
}

inline bool has_nan(const float* scores, Index count) noexcept {
    return std::any_of(scores, scores + count, [](float score) { return std::isnan(score); });
}

/// See online_softmax().
template <int Lanes, int rows>
KVPLANE_INLINE void softmax_rows(float* scores, Index count, float* largest, float* sum, float* output,
                                 Index stride) {
    Floats<Lanes> sums[4]{};
    float top[4], added[4];
    raise_rows<Lanes, rows>(scores, count, largest, top);
    for (int r = 0; r < rows; ++r) {
        // Comparisons pass over NaN, which must not look like tokens that are not seen.
        if (top[r] == nothing_seen && has_nan(scores + r * tile_tokens, count)) top[r] = 0.0f;
        if (top[r] == nothing_seen)
            std::fill_n(scores + r * tile_tokens, count, 0.0f);
        else
            exponentials<Lanes>(scores + r * tile_tokens, top[r], count, sums[r]);
    }
    reduce_rows<Lanes>(sums, added, plus);
    for (int r = 0; r < rows; ++r) {
        if (top[r] > largest[r]) {
            const float rescale = largest[r] == nothing_seen ? 0.0f : std::exp(largest[r] - top[r]);
            sum[r] *= rescale;
            multiply<Lanes>(output + r * stride, rescale, stride);
            largest[r] = top[r];
        }
        sum[r] += added[r];
    }
}

KVPLANE_FUNCTION void online_softmax(Isa isa, float* scores, Index count, Index rows,
                                     const SoftmaxState& state) noexcept {
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        by_rows(rows, [&](auto together, Index first) KVPLANE_BODY {
            softmax_rows<lanes, together>(scores + first * tile_tokens, count, state.largest + first,
                                          state.sum + first, state.output + first * state.stride,
                                          state.stride);
        });
    });
}

}  // namespace kvplane::detail
