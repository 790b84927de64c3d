// kvplane/cache/impl/token_attention.hpp: softmax weights in whole numbers.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "kvplane/attention/float_rows.hpp"
#include "kvplane/cache/token_attention.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/simd/vector.hpp"

namespace kvplane::detail {

/// Sums of products of such numbers stay below 2^24, where fp32 is exact.
inline float most_level(Index dim) noexcept {
    return dim <= 1024 ? 127.0f : std::floor(4096.0f / std::sqrt(static_cast<float>(dim)));
}

/// x to whole numbers of at most `most`; returns what 1 counts for, or 0 where all are as good as 0.
inline float round_to_levels(Isa isa, float* x, Index padded, float most) noexcept {
    const float largest = largest_magnitude(isa, x, padded);
    if (!(largest > 1e-30f)) {
        std::fill_n(x, padded, 0.0f);
        return 0.0f;
    }
    const float inverse = most / largest;
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        using Doubles = simd::Vector<double, lanes>;
        constexpr double magic = 0x1.8p52;  // its sum with a whole number has that in its low bits
        for (Index i = 0; i < padded; i += lanes) {
            simd::Floats<lanes> value;
            simd::load(value, x + i);
            // The product of two fp32 numbers is exact, so that a fused addition rounds alike.
            const Doubles sum =
                __builtin_convertvector(value, Doubles) * static_cast<double>(inverse) + magic;
            const auto low =
                __builtin_convertvector((simd::Vector<std::uint64_t, lanes>)sum, simd::Words<lanes>);
            simd::store(x + i, __builtin_convertvector((simd::Ints<lanes>)low, simd::Floats<lanes>));
        }
    });
    return 1.0f / inverse;
}

namespace token_attention {

/// Adds squared softmax weights of `scores`, which units make sixteenths of an octave of, to squares [128]. All
/// in whole numbers, or in products that are rounded once. Arrays go on to whole vectors.
template <int Lanes>
KVPLANE_INLINE void add_squares(float* scores, const float* units, float unit, Index seen, Index first,
                                std::int32_t* squares) {
    using Whole = simd::Ints<Lanes>;
    constexpr float most = 1e9f;  // far beyond what weighs anything
    constexpr int octave = 16, one = 1 << 16;
    Whole top = Whole{} - static_cast<std::int32_t>(most);
    simd::Floats<Lanes> score, scale;
    for (Index t = 0; t < seen; t += Lanes) {
        simd::load(score, scores + t);
        simd::load(scale, units + t);
        score *= scale * unit;
        score = score > most ? simd::Floats<Lanes>{} + most : score;
        score = score < -most ? simd::Floats<Lanes>{} - most : score;
        Whole level = __builtin_convertvector(score, Whole);
        for (Index i = seen - t; i < Lanes; ++i) level[i] = static_cast<std::int32_t>(-most);
        top = level > top ? level : top;
        simd::store(scores + t, level);
    }
    std::int32_t largest = top[0];
    for (int i = 1; i < Lanes; ++i) largest = std::max<std::int32_t>(largest, top[i]);
    Whole sums{};
    for (Index t = 0; t < seen; t += Lanes) {
        Whole below;
        simd::load(below, scores + t);
        below = largest - below;
        below = below > 31 * octave ? Whole{} + 31 * octave : below;
        // A straight line between powers of two is near enough.
        const Whole weight = (one - (below & (octave - 1)) * (one / (2 * octave))) >> (below / octave);
        sums += weight;
        simd::store(scores + t, weight);
    }
    float sum = 0.0f;
    for (int i = 0; i < Lanes; ++i) sum += static_cast<float>(sums[i]);
    const float share = 32768.0f / sum;
    for (Index t = 0; t < tile_tokens; t += Lanes) {
        Whole weight, so_far;
        simd::load(weight, scores + first + t);
        simd::load(so_far, squares + t);
        weight = __builtin_convertvector(__builtin_convertvector(weight, simd::Floats<Lanes>) * share, Whole);
        const Whole square = weight * weight >> 10, room = std::numeric_limits<std::int32_t>::max() - so_far;
        simd::store(squares + t, so_far + (square < room ? square : room));
    }
}

}  // namespace token_attention

KVPLANE_FUNCTION RowView<float> AttentionMeter::keys(Index tokens, Index dim) {
    tokens_ = tokens;
    dim_ = dim;
    stride_ = padded_channels(dim);
    keys_.assign(static_cast<std::size_t>(tokens * stride_), 0.0f);
    units_.assign(static_cast<std::size_t>(padded_channels(tokens)), 0.0f);
    mean_.assign(static_cast<std::size_t>(dim), 0.0);
    return {keys_.data(), stride_, tokens};
}

KVPLANE_FUNCTION void AttentionMeter::take_keys(Index whole) {
    // What all keys have in common moves no weight, but would take most of the levels.
    for (Index t = 0; t < whole; ++t)
        for (Index c = 0; c < dim_; ++c)
            mean_[static_cast<std::size_t>(c)] +=
                static_cast<double>(keys_[static_cast<std::size_t>(t * stride_ + c)]);
    for (double& mean : mean_) mean /= static_cast<double>(whole);
    const Isa isa = current_isa();
    for (Index t = 0; t < tokens_; ++t) {
        float* const key = keys_.data() + t * stride_;
        for (Index c = 0; c < dim_; ++c) key[c] -= static_cast<float>(mean_[static_cast<std::size_t>(c)]);
        units_[static_cast<std::size_t>(t)] = round_to_levels(isa, key, stride_, most_level(dim_));
    }
}

KVPLANE_FUNCTION void AttentionMeter::measure(RowView<const float> queries, Index seen, Index first,
                                              std::int32_t* squares) {
    const Isa isa = current_isa();
    const Index score_stride = padded_channels(tokens_);
    queries_.assign(static_cast<std::size_t>(queries.rows * stride_), 0.0f);
    scores_.resize(static_cast<std::size_t>(queries.rows * score_stride));
    std::array<float, 4> units{};
    // Scores are counted in sixteenths of an octave.
    const auto per_unit =
        static_cast<float>(16.0 * 1.4426950408889634 / std::sqrt(static_cast<double>(dim_)));
    for (Index from = 0; from < queries.rows; from += 4) {
        const Index rows = std::min<Index>(4, queries.rows - from);
        for (Index r = 0; r < rows; ++r) {
            float* const query = queries_.data() + (from + r) * stride_;
            std::copy_n(queries[from + r], dim_, query);
            units[static_cast<std::size_t>(r)] =
                round_to_levels(isa, query, stride_, most_level(dim_)) * per_unit;
        }
        float* const scores = scores_.data() + from * score_stride;
        row_scores(isa, {queries_.data() + from * stride_, stride_, rows}, {keys_.data(), stride_, seen},
                   stride_, {scores, score_stride, rows});
        run_on(isa, [=, this](auto lanes) KVPLANE_BODY {
            for (Index r = 0; r < rows; ++r)
                token_attention::add_squares<lanes>(scores + r * score_stride, units_.data(),
                                                    units[static_cast<std::size_t>(r)], seen, first, squares);
        });
    }
}

KVPLANE_FUNCTION std::vector<double> attention_by_token(const TokenAttention& attention, Index head) {
    const std::int32_t* const squares = attention.data() + head * tile_tokens;
    std::int64_t sum = 0;
    for (Index t = 0; t < tile_tokens; ++t) sum += squares[t];
    if (sum == 0) return {};
    std::vector<double> weights;
    for (Index t = 0; t < tile_tokens; ++t)
        weights.push_back(static_cast<double>(squares[t]) +
                          0.05 * static_cast<double>(sum) / static_cast<double>(tile_tokens));
    return weights;
}

}  // namespace kvplane::detail
