// kvplane/cache/impl/token_attention.hpp: softmax weights in whole numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "kvplane/cache/token_attention.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/simd/transpose.hpp"
#include "kvplane/simd/vector.hpp"

namespace kvplane::detail {

/// Sums of products of such numbers stay below 2^24, where fp32 is exact.
inline float most_level(Index dim) noexcept {
    return dim <= 1024 ? 127.0f : std::floor(4096.0f / std::sqrt(static_cast<float>(dim)));
}

namespace token_attention {

using simd::Floats;
using simd::load;
using simd::store;

/// [channel] the mean of some rows, padded to whole vectors. Sums are in double, row after row.
template <int Lanes>
KVPLANE_INLINE void mean_of(RowView<const float> rows, Index padded, float* mean) {
    constexpr int half = Lanes / 2, parts = kernel_channels / half;
    using Doubles = simd::Vector<double, half>;
    const auto count = static_cast<double>(rows.rows);
    for (Index c = 0; c < padded; c += kernel_channels) {
        Doubles sums[parts]{};
        for (Index t = 0; t < rows.rows; ++t)
            for (int p = 0; p < parts; ++p) {
                Floats<half> x;
                load(x, rows[t] + c + p * half);
                sums[p] += __builtin_convertvector(x, Doubles);
            }
        for (int p = 0; p < parts; ++p)
            store(mean + c + p * half, __builtin_convertvector(sums[p] / count, Floats<half>));
    }
}

/// x less the mean, if there is one, in whole numbers of at most `most`. Returns what 1 counts for, or 0 where
/// all are as good as 0.
template <int Lanes>
KVPLANE_INLINE float round_to_levels(const float* x, const float* mean, Index padded, float most,
                                     std::int16_t* levels) {
    constexpr int half = Lanes / 2;
    using Doubles = simd::Vector<double, half>;
    using Longs = simd::Vector<std::uint64_t, half>;
    using Shorts = simd::Vector<std::int16_t, half>;
    constexpr double magic = 0x1.8p52;  // its sum with a whole number has that in its low bits
    const auto value = [&](Index i, auto& to) KVPLANE_BODY {
        load(to, x + i);
        if (!mean) return;
        auto less = to;
        load(less, mean + i);
        to -= less;
    };
    Floats<Lanes> at, all{};
    for (Index i = 0; i < padded; i += Lanes) {
        value(i, at);
        at = (Floats<Lanes>)((simd::Words<Lanes>)at & 0x7FFFFFFFu);
        all = at > all ? at : all;
    }
    simd::fold_lanes<Lanes, Lanes>(all, simd::larger, std::make_index_sequence<Lanes>{});
    const float largest = all[0];
    if (!(largest > 1e-30f)) {
        for (Index i = 0; i < padded; i += half) store(levels + i, Shorts{});
        return 0.0f;
    }
    const float inverse = most / largest;
    for (Index i = 0; i < padded; i += half) {
        Floats<half> narrow;
        value(i, narrow);
        Doubles wide;
        simd::widen_doubles<half>(wide, narrow);
        // The product of two fp32 numbers is exact, so that a fused addition rounds alike.
        const Doubles sum = wide * static_cast<double>(inverse) + magic;
        const auto low = __builtin_convertvector((Longs)sum, simd::Words<half>);
        store(levels + i, __builtin_convertvector((simd::Ints<half>)low, Shorts));
    }
    return 1.0f / inverse;
}

/// Sums of products of some rows of rounded queries with the keys of `Blocks` blocks of tokens.
template <int Lanes, int Rows, int Blocks>
KVPLANE_INLINE void score_blocks(RowView<const std::int16_t> queries, const std::int32_t* blocks, Index pairs,
                                 std::int32_t* scores, Index score_stride) {
    constexpr int tokens = 16, vectors = tokens / Lanes;
    simd::Ints<Lanes> sums[Rows][Blocks * vectors]{}, keys[Blocks * vectors];
    for (Index pair = 0; pair < pairs; ++pair) {
#pragma GCC unroll 8
        for (int v = 0; v < Blocks * vectors; ++v)
            load(keys[v], blocks + (v / vectors * pairs + pair) * tokens + v % vectors * Lanes);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            std::int32_t two;
            std::memcpy(&two, queries[r] + 2 * pair, 4);
            const simd::Ints<Lanes> query = simd::Ints<Lanes>{} + two;
#pragma GCC unroll 8
            for (int v = 0; v < Blocks * vectors; ++v) simd::add_products<Lanes>(sums[r][v], keys[v], query);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Blocks * vectors; ++v) store(scores + r * score_stride + v * Lanes, sums[r][v]);
}
template <int Lanes, int Rows>
KVPLANE_INLINE void score_rows(RowView<const std::int16_t> queries, const std::int32_t* blocks, Index pairs,
                               Index seen, std::int32_t* scores, Index score_stride) {
    // As many sums as registers leave room for.
    constexpr int together = Lanes == 16 ? 4 : Lanes == 8 && Rows <= 2 ? 2 : 1, tokens = 16;
    Index t = 0;
    for (; t + (together - 1) * tokens < seen; t += together * tokens)
        score_blocks<Lanes, Rows, together>(queries, blocks + t * pairs, pairs, scores + t, score_stride);
    for (; t < seen; t += tokens)
        score_blocks<Lanes, Rows, 1>(queries, blocks + t * pairs, pairs, scores + t, score_stride);
}

/// Adds squared softmax weights of `scores`, which units make sixteenths of an octave of, to squares [128]. All
/// in whole numbers, or in products that are rounded once. Arrays go on to whole vectors.
template <int Lanes>
KVPLANE_INLINE void add_squares(std::int32_t* scores, const float* units, float unit, Index seen, Index first,
                                std::int32_t* squares) {
    using Whole = simd::Ints<Lanes>;
    constexpr float most = 1e9f;  // far beyond what weighs anything
    constexpr int octave = 16, octave_bits = 4, one = 1 << 16;
    const Whole least = Whole{} - static_cast<std::int32_t>(most);
    Whole top = least, used, sum_of_products;
    Floats<Lanes> score, scale;
    for (Index t = 0; t < seen; t += Lanes) {
        load(sum_of_products, scores + t);
        load(scale, units + t);
        score = __builtin_convertvector(sum_of_products, Floats<Lanes>);
        score *= scale * unit;
        score = score > most ? Floats<Lanes>{} + most : score;
        score = score < -most ? Floats<Lanes>{} - most : score;
        Whole level = __builtin_convertvector(score, Whole);
        simd::first_lanes<Lanes>(used, seen - t);
        level = used != 0 ? level : least;
        top = level > top ? level : top;
        store(scores + t, level);
    }
    std::int32_t largest = top[0];
    for (int i = 1; i < Lanes; ++i) largest = std::max<std::int32_t>(largest, top[i]);
    Whole sums{};
    for (Index t = 0; t < seen; t += Lanes) {
        Whole below;
        load(below, scores + t);
        below = largest - below;
        below = below > 31 * octave ? Whole{} + 31 * octave : below;
        // A straight line between powers of two is near enough.
        const Whole weight = (one - (below & (octave - 1)) * (one / (2 * octave))) >> (below >> octave_bits);
        sums += weight;
        store(scores + t, weight);
    }
    float sum = 0.0f;
    for (int i = 0; i < Lanes; ++i) sum += static_cast<float>(sums[i]);
    const float share = 32768.0f / sum;
    for (Index t = 0; t < tile_tokens; t += Lanes) {
        Whole weight, so_far;
        load(weight, scores + first + t);
        load(so_far, squares + t);
        weight = __builtin_convertvector(__builtin_convertvector(weight, Floats<Lanes>) * share, Whole);
        const Whole square = weight * weight >> 10, room = std::numeric_limits<std::int32_t>::max() - so_far;
        store(squares + t, so_far + (square < room ? square : room));
    }
}

/// Keys of one head as AttentionMeter keeps them.
struct RoundedKeys {
    const std::int32_t* blocks;
    const float* units;
    Index dim, stride, padded_tokens;
};
/// What a query sees of them, and how it is rounded.
struct Look {
    float per_unit, most;
    Index seen, first;
};
/// Memory for up to four rows of queries.
struct Room {
    float* padded;          ///< [stride], zeros from dim on
    std::int16_t* rounded;  ///< [row][stride]
    std::int32_t* scores;   ///< [row][token, padded]
};

/// Adds what `Rows` rows of queries see to squares.
template <int Lanes, int Rows>
KVPLANE_INLINE void measure_rows(RowView<const float> queries, const RoundedKeys& keys, const Look& look,
                                 const Room& room, std::int32_t* squares) {
    float units[Rows];
    for (int r = 0; r < Rows; ++r) {
        const float* query = queries[r];
        if (keys.dim != keys.stride) {
            for (Index c = 0; c < keys.dim; ++c) room.padded[c] = query[c];
            query = room.padded;
        }
        units[r] = look.per_unit * round_to_levels<Lanes>(query, nullptr, keys.stride, look.most,
                                                          room.rounded + r * keys.stride);
    }
    score_rows<Lanes, Rows>({room.rounded, keys.stride, Rows}, keys.blocks, keys.stride / 2, look.seen,
                            room.scores, keys.padded_tokens);
    for (int r = 0; r < Rows; ++r)
        add_squares<Lanes>(room.scores + r * keys.padded_tokens, keys.units, units[r], look.seen, look.first,
                           squares);
}

}  // namespace token_attention

KVPLANE_FUNCTION RowView<float> AttentionMeter::keys(Index tokens, Index dim) {
    tokens_ = tokens;
    dim_ = dim;
    stride_ = padded_channels(dim);
    const Index padded = (tokens + token_block - 1) / token_block * token_block;
    keys_.resize(static_cast<std::size_t>(tokens * stride_));
    for (Index t = 0; t < tokens; ++t)
        std::fill(&keys_[static_cast<std::size_t>(t * stride_)] + dim,
                  &keys_[static_cast<std::size_t>(t * stride_)] + stride_, 0.0f);
    mean_.resize(static_cast<std::size_t>(stride_));
    rounded_.resize(static_cast<std::size_t>(token_block * stride_));
    blocks_.resize(static_cast<std::size_t>(padded * stride_ / 2));
    units_.resize(static_cast<std::size_t>(padded));
    query_.assign(static_cast<std::size_t>(stride_), 0.0f);
    queries_.resize(static_cast<std::size_t>(row_block * stride_));
    scores_.resize(static_cast<std::size_t>(row_block * padded));
    return {keys_.data(), stride_, tokens};
}

KVPLANE_FUNCTION void AttentionMeter::take_keys(Index whole) {
    const RowView<const float> keys{keys_.data(), stride_, tokens_};
    const float most = most_level(dim_);
    const Index stride = stride_, pairs = stride / 2;
    float *const mean = mean_.data(), *const units = units_.data();
    std::int16_t* const rounded = rounded_.data();
    std::int32_t* const blocks = blocks_.data();
    run_on(current_isa(), [=](auto lanes) KVPLANE_BODY {
        // What all keys have in common moves no weight, but would take most of the levels.
        token_attention::mean_of<lanes>({keys.data, stride, whole}, stride, mean);
        for (Index first = 0; first < keys.rows; first += token_block) {
            const Index count = first + token_block < keys.rows ? token_block : keys.rows - first;
            for (Index t = 0; t < count; ++t)
                units[first + t] = token_attention::round_to_levels<lanes>(keys[first + t], mean, stride,
                                                                           most, rounded + t * stride);
            simd::transpose_words(rounded, pairs, token_block, pairs, blocks + first * pairs, token_block);
        }
    });
}

KVPLANE_FUNCTION void AttentionMeter::measure(RowView<const float> queries, Index seen, Index first,
                                              std::int32_t* squares) {
    // Scores are counted in sixteenths of an octave.
    const auto per_unit =
        static_cast<float>(16.0 * 1.4426950408889634 / std::sqrt(static_cast<double>(dim_)));
    const float most = most_level(dim_);
    const token_attention::RoundedKeys keys{blocks_.data(), units_.data(), dim_, stride_,
                                            static_cast<Index>(units_.size())};
    const token_attention::Room room{query_.data(), queries_.data(), scores_.data()};
    run_on(current_isa(), [=](auto lanes) KVPLANE_BODY {
        simd::by_rows(queries.rows, [=](auto rows, Index from) KVPLANE_BODY {
            token_attention::measure_rows<decltype(lanes)::value, rows>(
                queries.from(from), keys, {per_unit, most, seen, first}, room, squares);
        });
    });
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
