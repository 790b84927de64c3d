// kvplane/attention/softmax.hpp: the softmax of a part of the sequence, as a state that grows and merges.
//
// The state of a query row is (largest score, sum of exp(score - largest), that sum times values). Tokens
// come in any portions (online softmax), and the states of any partition of the tokens merge to that of the
// whole (flash decoding; T17). An empty state is neutral. The order of merging changes rounding alone, so
// whoever wants equal bits merges in the same order.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/simd/isa.hpp"

namespace kvplane::detail {

/// The largest score of a row that has seen no token.
inline constexpr float nothing_seen = -std::numeric_limits<float>::infinity();

/// A view of the states of some rows.
struct SoftmaxState {
    float* largest;  ///< [row]; nothing_seen: no token yet
    float* sum;      ///< [row] exp(score - largest), summed
    float* output;   ///< [row][stride] the same sum, each term times its token's values
    Index stride;    ///< channels padded to whole 16s

    void clear(Index rows) const noexcept {
        std::fill_n(largest, rows, nothing_seen);
        std::fill_n(sum, rows, 0.0f);
        std::fill_n(output, rows * stride, 0.0f);
    }
    /// Takes over the state of one row.
    void copy(const SoftmaxState& from) const noexcept {
        *largest = *from.largest;
        *sum = *from.sum;
        std::copy_n(from.output, stride, output);
    }
    /// log of the sum of exp(score) over the tokens of one row; nothing_seen without any.
    float log_sum_exp() const noexcept { return *sum == 0.0f ? *largest : *largest + std::log(*sum); }
    /// Gives a score that no token has its share of one row's weights; -infinity: none.
    void add_sink(float logit, Index channels) const noexcept {
        if (logit == nothing_seen) return;
        if (logit > *largest) {
            const float keep = std::exp(*largest - logit);
            *sum *= keep;
            for (Index c = 0; c < channels; ++c) output[c] *= keep;
            *largest = logit;
        }
        *sum += std::exp(logit - *largest);
    }
    /// Divides the output of one row by its sum: what attention returns. A row that saw nothing gets zeros,
    /// one whose sum is NaN gets NaN.
    void normalise(Index channels) const noexcept {
        for (Index c = 0; c < channels; ++c) output[c] = *sum == 0.0f ? 0.0f : output[c] / *sum;
    }
};

/// Turns the scores of `count` tokens (a multiple of 16; -infinity: not seen) into exp(score - largest) and
/// adds these weights to the states, whose output is scaled down where a larger score has come. The caller
/// then adds weights times values to the output. scores  [row][128]
void online_softmax(Isa isa, float* scores, Index count, Index rows, const SoftmaxState& state) noexcept;

/// Adds weights that sum up to `sum` relative to `largest` to the state of one row, output aside.
inline void add_weights(const SoftmaxState& to, float largest, float sum) noexcept {
    if (largest == nothing_seen) return;
    const float larger = std::max(*to.largest, largest);
    const float there = *to.largest == nothing_seen ? 0.0f : *to.sum * std::exp(*to.largest - larger);
    *to.sum = there + sum * std::exp(largest - larger);
    *to.largest = larger;
}

/// Adds the state of other tokens to that of one row.
inline void merge(const SoftmaxState& to, const SoftmaxState& from) noexcept {
    if (*from.largest == nothing_seen) return;
    const float top = std::max(*to.largest, *from.largest);
    const float keep = *to.largest == nothing_seen ? 0.0f : std::exp(*to.largest - top),
                take = std::exp(*from.largest - top);
    *to.sum = *to.sum * keep + *from.sum * take;
    for (Index c = 0; c < to.stride; ++c) to.output[c] = to.output[c] * keep + from.output[c] * take;
    *to.largest = top;
}

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/attention/impl/softmax.hpp"
#endif
