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

/// x to whole numbers of at most `most`; returns what 1 counts for.
inline double round_to_levels(Isa isa, float* x, Index padded, float most) noexcept {
    const float largest = largest_magnitude(isa, x, padded);
    if (!(largest > 1e-30f)) {
        std::fill_n(x, padded, 0.0f);
        return 0.0;
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
    return 1.0 / static_cast<double>(inverse);
}

KVPLANE_FUNCTION RowView<float> AttentionMeter::keys(Index tokens, Index dim) {
    tokens_ = tokens;
    dim_ = dim;
    stride_ = padded_channels(dim);
    keys_.assign(static_cast<std::size_t>(tokens * stride_), 0.0f);
    query_.assign(static_cast<std::size_t>(stride_), 0.0f);
    scores_.resize(static_cast<std::size_t>(tokens));
    units_.resize(scores_.size());
    levels_.resize(scores_.size());
    weights_.resize(scores_.size());
    mean_.assign(static_cast<std::size_t>(dim), 0.0);
    return {keys_.data(), stride_, tokens};
}

KVPLANE_FUNCTION void AttentionMeter::take_keys(Index whole) {
    // What all keys have in common moves no weight, but would take most of the levels.
    for (Index t = 0; t < whole; ++t)
        for (Index c = 0; c < dim_; ++c)
            mean_[static_cast<std::size_t>(c)] +=
                static_cast<double>(keys_[static_cast<std::size_t>(t * stride_ + c)]);
    const Isa isa = current_isa();
    for (Index t = 0; t < tokens_; ++t) {
        float* const key = keys_.data() + t * stride_;
        for (Index c = 0; c < dim_; ++c)
            key[c] -= static_cast<float>(mean_[static_cast<std::size_t>(c)] / static_cast<double>(whole));
        units_[static_cast<std::size_t>(t)] = round_to_levels(isa, key, stride_, most_level(dim_));
    }
}

KVPLANE_FUNCTION void AttentionMeter::measure(const float* query, Index seen, Index first,
                                              std::int32_t* squares) {
    const Isa isa = current_isa();
    std::copy_n(query, dim_, query_.data());
    // Scores are counted in sixteenths of an octave.
    const double unit = round_to_levels(isa, query_.data(), stride_, most_level(dim_)) *
                        (16.0 * 1.4426950408889634 / std::sqrt(static_cast<double>(dim_)));
    row_scores(isa, {query_.data(), stride_, 1}, {keys_.data(), stride_, seen}, stride_,
               {scores_.data(), seen, 1});
    constexpr int octave = 16;
    constexpr std::array<std::uint32_t, octave> powers{
        2147483648, 2056437387, 1969251188, 1885761398, 1805811301, 1729250827, 1655936265, 1585730000,
        1518500250, 1454120821, 1392470869, 1333434672, 1276901417, 1222764986, 1170923762, 1121280436};
    // Products alone: nothing that could be fused, and so round otherwise, on some machines.
    std::int64_t top = std::numeric_limits<std::int64_t>::min();
    for (Index t = 0; t < seen; ++t) {
        const auto i = static_cast<std::size_t>(t);
        levels_[i] = static_cast<std::int64_t>(static_cast<double>(scores_[i]) * (units_[i] * unit));
        top = std::max(top, levels_[i]);
    }
    std::uint64_t sum = 0;
    for (Index t = 0; t < seen; ++t) {
        const auto i = static_cast<std::size_t>(t);
        const auto below = static_cast<unsigned>(std::min<std::int64_t>(top - levels_[i], 31 * octave));
        weights_[i] = powers[below % octave] >> (below / octave);
        sum += weights_[i];
    }
    const double share = 65536.0 / static_cast<double>(sum);
    for (Index t = 0; t < tile_tokens; ++t) {
        const auto weight = static_cast<std::uint64_t>(
            static_cast<double>(weights_[static_cast<std::size_t>(first + t)]) * share);
        const auto square = static_cast<std::int64_t>(weight * weight >> 12);
        squares[t] = static_cast<std::int32_t>(
            std::min<std::int64_t>(squares[t] + square, std::numeric_limits<std::int32_t>::max()));
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
