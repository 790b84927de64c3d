// kvplane/cuda/tile_math.cuh: attention of eight query rows on one tile, by the 32 lanes of a warp.
//
// Everything is written over a Warp, whose Word, Int and Float are one lane's numbers on a device (warp.cuh), and
// 32 of them in the tests, which run the same source on the host. Lane 4 g + t works for query row g.
//
//   keys     the steps of the grids are folded into the query, and the result is rounded to 16 bits by tile: the
//            high bytes are rows 0 to 7 of A, the low bytes rows 8 to 15. Sums are exact: the largest,
//            256 x 127 x 255 x 256 channels and the low bytes' part, is below 2^31.
//   softmax  weights are relative to the largest score of their tile, so that rounding them to 16 bits loses as
//            little in a tile of small weights; the tile's factor goes to where sums become floats.
//   values   the steps are folded into the weights, rounded to unsigned 16 bits. Sums: 65535 x 255 x 128 < 2^31.
//
// fp16 tiles are put together in registers and multiplied as fp16, queries and weights in two parts (high and low
// half) as above. Scores are in units of log 2.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/fragments.hpp"
#include "kvplane/cuda/tile_views.hpp"

namespace kvplane::cuda {

/// Rows of queries in the memory of a block: floats, `stride` bytes apart.
struct QueryRowsView {
    const std::byte* rows;
    std::uint32_t stride;
};

/// A row of a token outside tiles.
template <class W>
struct TokenRow {
    const std::byte* at;
    bool half;
    typename W::Float step;  ///< of bytes

    /// Eight channels; `channel` is a multiple of 8.
    KVPLANE_DEVICE void load(typename W::Word channel, typename W::Float (&to)[8]) const {
        if (half) {
            typename W::Word words[4];
            W::load16(at, channel * 2u, words);
            KVPLANE_UNROLL
            for (int i = 0; i < 4; ++i) {
                to[2 * i] = W::low_half(words[i]);
                to[2 * i + 1] = W::high_half(words[i]);
            }
        } else {
            typename W::Word codes[2];
            W::load8(at, channel, codes);
            KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i)
                to[i] = step * W::to_float(W::to_int(codes[i / 4] >> (8 * (i % 4)) & 0xFFu) - 128);
        }
    }
};
/// Row `at` of a head.
template <class W>
KVPLANE_DEVICE TokenRow<W> token_row(const TokenRowsView& view, const std::byte* page, int head, int at) {
    using Word = typename W::Word;
    const std::int64_t row = head * view.capacity + at;
    TokenRow<W> to{page + view.rows_at + row * view.row_bytes, view.half, typename W::Float(1.0f)};
    if (!view.half) to.step = W::low_half(W::load2(page + view.steps_at + 2 * row, Word(0u)));
    return to;
}

/// What attention does to the scores of a lane's row; AttentionParameters in units of log 2.
template <class W>
struct ScoreRules {
    typename W::Int position;         ///< of the row's query
    typename W::Float slope;          ///< ALiBi
    typename W::Float softcap;        ///< 0: none
    const float* bias;                ///< [rows of the call][keys] of all; nullptr: none
    typename W::Word bias_row;        ///< the first number of the row's bias
    std::int32_t window;              ///< 0: none
    std::int32_t window_sinks;        ///< tokens that stay visible in spite of it
    std::int32_t hidden_from, hidden_to;
    bool causal;
    bool changes_scores;              ///< whether softcap, slope or bias do anything
};

/// Whether every row sees every token in [first, end) with scores as they are.
struct TileMask {
    bool plain;
    std::int32_t origin;           ///< the position that row 0 of the tile has, or would have
    std::int32_t row, end_row;     ///< which rows are tokens of the sequence
};

template <class W>
struct SoftmaxRows {
    typename W::Float largest;  ///< of the row, the same in its four lanes
    typename W::Float sum;      ///< of the lane's own tokens
};

/// key_bits, value_bits: the width of all channels, 16 for fp16; 0: what the views say at run time. key_octets:
/// octets_of() the channels; where widths are known at run time the most that a segment may have. value_blocks: of
/// 32 channels.
template <class W, int key_bits, int key_octets, int value_bits, int value_blocks>
struct TileMath {
    using Word = typename W::Word;
    using Int = typename W::Int;
    using Float = typename W::Float;

    /// Keys of several widths, or with grids over fewer tokens than a tile.
    static constexpr bool segmented = key_bits == 0;
    static constexpr int key_chunk = segmented || key_bits == 16 ? 8 : least_chunk(key_bits);
    /// Of segmented keys quads of tokens ascend, so that those of a grid are neighbours.
    static constexpr int value_chunk = segmented || value_bits == 0 || value_bits == 16 ? 8 : least_chunk(value_bits);
    static constexpr int blocks = value_blocks;
    static constexpr float signed_range = 32512.0f, unsigned_range = 65500.0f;
    static constexpr float masked = -1e30f;

    /// What a warp has gathered. out[b][s][j]: channel 32 b + 8 t + 4 j + s of row g.
    struct State {
        SoftmaxRows<W> softmax;
        Float out[value_blocks][4][2];
        Float base[value_blocks];  ///< a part of all channels of a block, of the lane's own tokens
    };

    KVPLANE_DEVICE static void begin(State& state) {
        state.softmax = {Float(masked), Float(0.0f)};
KVPLANE_UNROLL
        for (int b = 0; b < value_blocks; ++b) {
            state.base[b] = Float(0.0f);
KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) state.out[b][i / 2][i % 2] = Float(0.0f);
        }
    }

    /// Scores of all tokens: score[m][s][j] of token score_token(m, 2 t + j) + s of row g.
    using Scores = Float[4][4][2];

    /// The keys of a tile, before softcap and the like. Scores of whatever the tile holds beside tokens are
    /// finite.
    KVPLANE_DEVICE static void score(const QueryRowsView& queries, const std::byte* tile,
                                     const KeyTileView& view, Scores& score) {
        if constexpr (key_bits == 16) {
            half_scores(queries, tile, view.segment[0], score);
        } else if constexpr (segmented) {
            if (view.segment[0].bits == 16)
                half_scores(queries, tile, view.segment[0], score);
            else
                for (int group = 0; group < view.groups; ++group)
                    segment_scores(queries, tile, view, group, score);
        } else {
            Word factors[key_octets][4];
            Float worth, base;
            fold_uniform(queries, tile, view.segment[0], factors, worth, base);
            Int sums[16][4];
            zero(sums);
            add_products<key_bits, key_chunk>(tile, view.segment[0], factors, 0, 4, sums);
            to_scores(sums, worth, base, 0, 4, score);
        }
    }

    /// Applies the rules to scores, which masks what a row does not see.
    KVPLANE_DEVICE static void apply(const ScoreRules<W>& rules, const TileMask& mask, Scores& score) {
        const Word quarter = W::lane() & 3u;
KVPLANE_UNROLL
        for (int m = 0; m < 4; ++m)
KVPLANE_UNROLL
            for (int j = 0; j < 2; ++j) {
                const Word first = score_token(m, quarter * 2u + std::uint32_t(j), value_chunk);
KVPLANE_UNROLL
                for (int s = 0; s < 4; ++s) {
                    const Int row = W::to_int(first + std::uint32_t(s));
                    score[m][s][j] = ruled(rules, score[m][s][j], row + mask.origin,
                                           W::both(row >= mask.row, row < mask.end_row));
                }
            }
    }

    /// One score of a token at `position`, which is part of the sequence where `there`.
    KVPLANE_DEVICE static Float ruled(const ScoreRules<W>& rules, Float score, Int position,
                                      typename W::Flag there) {
        auto seen = there;
        if (rules.causal) seen = W::both(seen, position <= rules.position);
        if (rules.window > 0)
            seen = W::both(seen, W::either(rules.position - position < rules.window,
                                           position < rules.window_sinks));
        seen = W::both(seen, W::either(position < rules.hidden_from, position >= rules.hidden_to));
        if (rules.changes_scores) {
            const auto capped = rules.softcap > 0.0f;
            score = W::select(capped,
                              rules.softcap * W::tanh(score / W::select(capped, rules.softcap, Float(1.0f))),
                              score);
            score = score + rules.slope * W::to_float(position - rules.position);
            if (rules.bias)
                score = score + W::load_bias(rules.bias, rules.bias_row, position, seen) * 1.44269504f;
        }
        // Also a bias of -infinity.
        return W::select(seen, W::maximum(score, Float(masked)), Float(masked));
    }

    /// Replaces scores by weights relative to the largest of the tile, enters the tile in the softmax, and
    /// returns the tile's factor. Where no token of a row is seen, its factor is 0.
    KVPLANE_DEVICE static Float weigh(Scores& score, State& state) {
        Float largest = score[0][0][0];
KVPLANE_UNROLL
        for (int i = 1; i < 32; ++i) largest = W::maximum(largest, score[i / 8][i / 2 % 4][i % 2]);
        largest = over_quarters_max(largest);
        Float sum(0.0f);
KVPLANE_UNROLL
        for (int i = 0; i < 32; ++i) {
            Float& weight = score[i / 8][i / 2 % 4][i % 2];
            weight = W::exp2(weight - largest);
            sum = sum + weight;
        }
        raise(largest, state);
        // All tokens masked: their weights were 1.
        const Float factor = W::select(largest > masked, W::exp2(largest - state.softmax.largest), Float(0.0f));
        state.softmax.sum = state.softmax.sum + factor * sum;
        return factor;
    }

    /// Makes `largest` the largest score, if it is larger than those before.
    KVPLANE_DEVICE static void raise(Float largest, State& state) {
        if (!W::any(largest > state.softmax.largest)) return;
        const Float raised = W::maximum(largest, state.softmax.largest);
        const Float shrink = W::exp2(state.softmax.largest - raised);
        state.softmax.largest = raised;
        state.softmax.sum = state.softmax.sum * shrink;
KVPLANE_UNROLL
        for (int b = 0; b < value_blocks; ++b) {
            state.base[b] = state.base[b] * shrink;
KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) state.out[b][i / 2][i % 2] = state.out[b][i / 2][i % 2] * shrink;
        }
    }

    /// Adds the values of a tile. weight: relative to `factor`.
    KVPLANE_DEVICE static void add_values(const std::byte* tile, const ValueTileView& view,
                                          const Scores& weight, Float factor, State& state) {
        if constexpr (value_bits == 16) {
            half_sums(tile, view.all, weight, factor, state);
        } else if constexpr (value_bits != 0) {
            coded_sums<value_bits>(tile, view, weight, factor, state);
        } else {
            switch (view.all.bits) {
                case 1: return coded_sums<1>(tile, view, weight, factor, state);
                case 2: return coded_sums<2>(tile, view, weight, factor, state);
                case 3: return coded_sums<3>(tile, view, weight, factor, state);
                case 4: return coded_sums<4>(tile, view, weight, factor, state);
                case 5: return coded_sums<5>(tile, view, weight, factor, state);
                case 6: return coded_sums<6>(tile, view, weight, factor, state);
                case 7: return coded_sums<7>(tile, view, weight, factor, state);
                case 8: return coded_sums<8>(tile, view, weight, factor, state);
                default: return half_sums(tile, view.all, weight, factor, state);
            }
        }
    }

    /// One token that is in no tile: its score for the row. key: fp16 or codes of 8 bits less 128, see load_row().
    template <class Row>
    KVPLANE_DEVICE static Float score_row(const QueryRowsView& queries, const Row& row, int channels) {
        const Word quarter = W::lane() & 3u, g = W::lane() >> 2;
        Float sum(0.0f);
        for (int c = 0; c < channels; c += 32) {
            const Word channel = quarter * 8u + std::uint32_t(c);
            const auto valid = channel < std::uint32_t(channels);
            const Word at = W::select(valid, channel, Word(0u));
            Float key[8], query[8];
            row.load(at, key);
            load_floats(queries.rows, g * queries.stride + at * 4u, query);
            Float part(0.0f);
KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) part = part + key[i] * query[i];
            sum = sum + W::select(valid, part, Float(0.0f));
        }
        return over_quarters(sum);
    }
    /// Enters up to four such tokens. A masked score has no weight.
    template <class Row>
    KVPLANE_DEVICE static void add_rows(const Row* rows, const Float* score, int count, int channels,
                                        State& state) {
        Float largest = score[0];
        for (int i = 1; i < count; ++i) largest = W::maximum(largest, score[i]);
        raise(largest, state);
        const Word quarter = W::lane() & 3u;
        for (int i = 0; i < count; ++i) {
            const Float weight = W::select(score[i] > masked, W::exp2(score[i] - state.softmax.largest), Float(0.0f));
            // The four lanes of a row have the same token.
            state.softmax.sum = state.softmax.sum + W::select(quarter == 0u, weight, Float(0.0f));
KVPLANE_UNROLL
            for (int b = 0; b < value_blocks; ++b) {
                const Word channel = quarter * 8u + std::uint32_t(32 * b);
                Float value[8];
                rows[i].load(W::select(channel < std::uint32_t(channels), channel, Word(0u)), value);
KVPLANE_UNROLL
                for (int s = 0; s < 4; ++s) {
                    state.out[b][s][0] = state.out[b][s][0] + weight * value[s];
                    state.out[b][s][1] = state.out[b][s][1] + weight * value[4 + s];
                }
            }
        }
    }

    /// Makes sums whole: over the lanes of a row, and bases into outputs.
    KVPLANE_DEVICE static void finish(State& state) {
        state.softmax.sum = over_quarters(state.softmax.sum);
KVPLANE_UNROLL
        for (int b = 0; b < value_blocks; ++b) {
            const Float base = over_quarters(state.base[b]);
            state.base[b] = Float(0.0f);
KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) state.out[b][i / 2][i % 2] = state.out[b][i / 2][i % 2] + base;
        }
    }

  private:
    KVPLANE_DEVICE static Float over_quarters(Float x) {
        x = x + W::shuffle_xor(x, 1);
        return x + W::shuffle_xor(x, 2);
    }
    KVPLANE_DEVICE static Float over_quarters_max(Float x) {
        x = W::maximum(x, W::shuffle_xor(x, 1));
        return W::maximum(x, W::shuffle_xor(x, 2));
    }
    KVPLANE_DEVICE static void zero(Int (&sums)[16][4]) {
KVPLANE_UNROLL
        for (int i = 0; i < 64; ++i) sums[i / 4][i % 4] = Int(0);
    }
    KVPLANE_DEVICE static void load_floats(const std::byte* from, Word at, Float (&to)[8]) {
KVPLANE_UNROLL
        for (int half = 0; half < 2; ++half) {
            Word words[4];
            W::load16(from, at + std::uint32_t(16 * half), words);
KVPLANE_UNROLL
            for (int i = 0; i < 4; ++i) to[4 * half + i] = W::as_float(words[i]);
        }
    }

    /// Steps (or lowers, which take two bytes) of eight channels from grid `first` on.
    template <bool whole>
    KVPLANE_DEVICE static void load_grid(const std::byte* at, int bytes, Word first, Word last, Float (&to)[8]) {
        if constexpr (whole) {
            if (bytes == 2) {
                Word words[4];
                W::load16(at, first * 2u, words);
KVPLANE_UNROLL
                for (int i = 0; i < 4; ++i) {
                    to[2 * i] = W::low_half(words[i]);
                    to[2 * i + 1] = W::high_half(words[i]);
                }
                return;
            }
        }
KVPLANE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const Word grid = W::minimum(first + std::uint32_t(i), last);
            to[i] = bytes == 2 ? W::low_half(W::load2(at, grid * 2u)) : W::low_half(W::load1(at, grid) << 7);
        }
    }

    /// Query times step of eight channels of a segment, and adds what is left of the score to `low`.
    template <bool whole>
    KVPLANE_DEVICE static void fold_octet(const QueryRowsView& queries, const std::byte* tile,
                                          const SegmentView& segment, Word channel, int group, Float (&f)[8],
                                          Float& low) {
        const Word g = W::lane() >> 2;
        const auto channels = std::uint32_t(segment.channels);
        const Word last = Word(channels - 1u);
        Float query[8], step[8], lower[8];
        // Octets behind the last channel take the last eight and count nothing.
        const Word begin = whole ? W::minimum(channel, Word(channels - 8u)) : channel;
        if constexpr (whole) {
            load_floats(queries.rows, g * queries.stride + begin * 4u, query);
        } else {
KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i)
                query[i] = W::as_float(W::load4(
                    queries.rows, g * queries.stride +
                                      (W::minimum(begin + std::uint32_t(i), last) + std::uint32_t(segment.first_channel)) * 4u));
        }
        const int grid = group * segment.channels;
        load_grid<whole>(tile + segment.step_at + grid * segment.step_bytes, segment.step_bytes, begin, last, step);
        if (segment.lower_at >= 0)
            load_grid<whole>(tile + segment.lower_at + grid * 2, 2, begin, last, lower);
KVPLANE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const auto valid = whole ? channel < channels : channel + std::uint32_t(i) < channels;
            query[i] = W::select(valid, query[i], Float(0.0f));
            f[i] = query[i] * step[i] * segment.step_scale;
            low = low + (segment.lower_at >= 0 ? query[i] * lower[i] : f[i] * segment.lower_in_steps);
        }
    }

    /// Eight numbers up to signed_range in the bytes of A: the high and the low parts of four, and of four more.
    KVPLANE_DEVICE static void signed_bytes(const Float (&f)[8], Float inverse, Word (&a)[4]) {
        Word bits[8];
        // The low 16 bits of this float are round(f inverse) + 128 in two's complement.
KVPLANE_UNROLL
        for (int i = 0; i < 8; ++i) bits[i] = W::as_word(W::multiply_add(f[i], inverse, Float(12582912.0f + 128.0f)));
KVPLANE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Word* b = bits + 4 * half;
            const Word low = W::template permute<0x5140>(b[0], b[1]), high = W::template permute<0x5140>(b[2], b[3]);
            a[2 * half] = W::template permute<0x7632>(low, high);
            a[2 * half + 1] = W::template permute<0x5410>(low, high) ^ 0x80808080u;
        }
    }

    KVPLANE_DEVICE static void fold_uniform(const QueryRowsView& queries, const std::byte* tile,
                                            const SegmentView& segment, Word (&factors)[key_octets][4],
                                            Float& worth, Float& base) {
        const Word quarter = W::lane() & 3u;
        Float f[key_octets][8];
        Float low(0.0f), sum(0.0f), largest(0.0f);
KVPLANE_UNROLL
        for (int o = 0; o < key_octets; ++o) {
            fold_octet<true>(queries, tile, segment, octet_channel(o, quarter, key_chunk), 0, f[o], low);
            gather(f[o], sum, largest);
        }
        const Float inverse = scale_of(sum, low, largest, worth, base);
KVPLANE_UNROLL
        for (int o = 0; o < key_octets; ++o) signed_bytes(f[o], inverse, factors[o]);
    }
    KVPLANE_DEVICE static void gather(const Float (&f)[8], Float& sum, Float& largest) {
KVPLANE_UNROLL
        for (int i = 0; i < 8; ++i) {
            sum = sum + f[i];
            largest = W::maximum(largest, W::absolute(f[i]));
        }
    }
    /// From the lanes' parts to what a unit of the integer sums is worth, and what is added to them.
    KVPLANE_DEVICE static Float scale_of(Float sum, Float low, Float largest, Float& worth, Float& base) {
        largest = over_quarters_max(largest);
        base = over_quarters(low + sum * 0.5f);
        worth = largest * (1.0f / signed_range);
        return W::select(largest > 1e-30f, signed_range / W::maximum(largest, Float(1e-30f)), Float(0.0f));
    }

    /// Adds the products of the tokens of m in [first_m, end_m) and all octets of a segment.
    template <int bits, int chunk, class Factors>
    KVPLANE_DEVICE static void add_products(const std::byte* tile, const SegmentView& segment,
                                            const Factors& factors, int first_m, int end_m, Int (&sums)[16][4]) {
        constexpr PlaneSplit split = plane_split(bits);
        const Word g = W::lane() >> 2, quarter = W::lane() & 3u;
        const int rounds = octets_of(segment.channels, chunk) / (chunk / 8);
        constexpr int most_rounds = segmented ? 1 : key_octets / (chunk / 8);
KVPLANE_UNROLL
        for (int q = 0; q < (segmented ? rounds : most_rounds); ++q) {
            const Word channel = octet_channel(q * (chunk / 8), quarter, chunk);
KVPLANE_UNROLL
            for (int m = 0; m < 4; ++m) {
                if (segmented && (m < first_m || m >= end_m)) continue;
                const Word token = score_token(m, g, value_chunk);
                Word words[split.count][chunk / 8 < 1 ? 1 : chunk / 8][4];
KVPLANE_UNROLL
                for (int p = 0; p < split.count; ++p) {
                    const int depth = 32 / split[p];
                    const auto units = std::uint32_t((segment.channels + depth - 1) / depth);
KVPLANE_UNROLL
                    for (int u = 0; u < (chunk < depth ? 1 : chunk / depth); ++u)
                        W::load16(tile + segment.plane_at[p],
                                  key_word(token, W::minimum(channel / std::uint32_t(depth) + std::uint32_t(u), Word(units - 1u)), units),
                                  words[p][u]);
                }
KVPLANE_UNROLL
                for (int part = 0; part < chunk / 8; ++part)
KVPLANE_UNROLL
                    for (int s = 0; s < 4; ++s) {
                        Word b[2];
                        code_words<bits, chunk>(words, part, s, channel, b);
                        W::multiply_signed(sums[4 * m + s], factors[q * (chunk / 8) + part], b);
                    }
            }
        }
    }
    /// The two words of B of one pair of quads: four codes a byte each, and four more. words[p][i]: what unit i of
    /// the chunk in plane p holds. first: channel (token) where a chunk is less than a unit.
    template <int bits, int chunk, class Words>
    KVPLANE_DEVICE static void code_words(const Words& words, int part, int s, Word first, Word (&b)[2]) {
        constexpr PlaneSplit split = plane_split(bits);
        b[0] = b[1] = Word(0u);
KVPLANE_UNROLL
        for (int p = 0; p < split.count; ++p) {
            const int width = split[p], depth = 32 / width;
            const std::uint32_t mask = code_mask(width);
            Word word = words[p][chunk < depth ? 0 : 8 * part / depth][s];
            int at = 8 * part % depth / 4 * width;
            if (chunk < depth) {
                word = word >> ((first % std::uint32_t(depth) >> 2) * std::uint32_t(width));
                at = 0;
            }
            b[0] = b[0] << width | (word >> at & mask);
            b[1] = b[1] << width | (word >> (at + width) & mask);
        }
    }

    KVPLANE_DEVICE static void to_scores(const Int (&sums)[16][4], Float worth, Float base, int first_m, int end_m,
                                         Scores& score) {
KVPLANE_UNROLL
        for (int i = 0; i < 16; ++i) {
            if (segmented && (i / 4 < first_m || i / 4 >= end_m)) continue;
KVPLANE_UNROLL
            for (int j = 0; j < 2; ++j)
                score[i / 4][i % 4][j] = W::multiply_add(W::to_float(sums[i][j] * 256 + sums[i][2 + j]), worth, base);
        }
    }

    /// The scores of one group of tokens, of keys whose widths are known at run time.
    KVPLANE_DEVICE static void segment_scores(const QueryRowsView& queries, const std::byte* tile,
                                              const KeyTileView& view, int group, Scores& score) {
        const Word quarter = W::lane() & 3u;
        Float low(0.0f), sum(0.0f), largest(0.0f), f[8];
        for (int i = 0; i < view.segments; ++i)
            for (int o = 0; o < octets_of(view.segment[i].channels, 8); ++o) {
                fold_octet<false>(queries, tile, view.segment[i], octet_channel(o, quarter, 8), group, f, low);
                gather(f, sum, largest);
            }
        Float worth, base;
        const Float inverse = scale_of(sum, low, largest, worth, base);
        Int sums[16][4];
        zero(sums);
        const int first_m = 4 * group / view.groups, end_m = 4 * (group + 1) / view.groups;
        for (int i = 0; i < view.segments; ++i) {
            const SegmentView& segment = view.segment[i];
            Word factors[key_octets][4];
            for (int o = 0; o < octets_of(segment.channels, 8); ++o) {
                Float unused(0.0f);
                fold_octet<false>(queries, tile, segment, octet_channel(o, quarter, 8), group, f, unused);
                signed_bytes(f, inverse, factors[o]);
            }
            switch (segment.bits) {
                case 1: add_products<1, 8>(tile, segment, factors, first_m, end_m, sums); break;
                case 2: add_products<2, 8>(tile, segment, factors, first_m, end_m, sums); break;
                case 3: add_products<3, 8>(tile, segment, factors, first_m, end_m, sums); break;
                case 4: add_products<4, 8>(tile, segment, factors, first_m, end_m, sums); break;
                case 5: add_products<5, 8>(tile, segment, factors, first_m, end_m, sums); break;
                case 6: add_products<6, 8>(tile, segment, factors, first_m, end_m, sums); break;
                case 7: add_products<7, 8>(tile, segment, factors, first_m, end_m, sums); break;
                default: add_products<8, 8>(tile, segment, factors, first_m, end_m, sums); break;
            }
        }
        to_scores(sums, worth, base, first_m, end_m, score);
    }

    template <int bits>
    KVPLANE_DEVICE static void coded_sums(const std::byte* tile, const ValueTileView& view, const Scores& weight,
                                          Float factor, State& state) {
        Word factors[4][4];
        Float worth, base;
KVPLANE_UNROLL
        for (int b = 0; b < value_blocks; ++b) {
            if (b % view.run_blocks == 0)
                fold_weights(tile, view.all, b / view.run_blocks, weight, factors, worth, base);
            state.base[b] = state.base[b] + factor * base;
            add_block<bits>(tile, view.all, factors, factor * worth, b, state.out[b]);
        }
    }

    /// Weights times steps of one run of channels, as the bytes of A.
    KVPLANE_DEVICE static void fold_weights(const std::byte* tile, const SegmentView& segment, int run,
                                            const Scores& weight, Word (&factors)[4][4], Float& worth,
                                            Float& base) {
        const Word quarter = W::lane() & 3u;
        const std::byte* const steps = tile + segment.step_at + run * 128 * segment.step_bytes;
        const std::byte* const lowers = tile + segment.lower_at + run * 128 * 2;
        Float f[8][4];
        Float sum(0.0f), low(0.0f), largest(0.0f);
KVPLANE_UNROLL
        for (int quad = 0; quad < 8; ++quad) {
            const Word token = quad_token(quad, quarter, value_chunk);
            Float step[4], lower[4];
            load_quad(steps, segment.step_bytes, token, step);
            if (segment.lower_at >= 0) load_quad(lowers, 2, token, lower);
KVPLANE_UNROLL
            for (int s = 0; s < 4; ++s) {
                const Float w = weight[quad / 2][s][quad % 2];
                f[quad][s] = w * step[s];
                sum = sum + f[quad][s];
                // Not of products with weights: a scale of all rows.
                largest = W::maximum(largest, step[s]);
                if (segment.lower_at >= 0) low = low + w * lower[s];
            }
        }
        largest = over_quarters_max(largest);
        if (segment.lower_at < 0) low = sum * (segment.lower_in_steps * segment.step_scale);
        base = low + sum * (0.5f * segment.step_scale);
        worth = largest * segment.step_scale * (1.0f / unsigned_range);
        const Float inverse =
            W::select(largest > 1e-30f, unsigned_range / W::maximum(largest, Float(1e-30f)), Float(0.0f));
KVPLANE_UNROLL
        for (int quad = 0; quad < 8; ++quad) {
            Word bits[4];
            // The low 16 bits of this float are the rounded number.
KVPLANE_UNROLL
            for (int s = 0; s < 4; ++s) bits[s] = W::as_word(W::multiply_add(f[quad][s], inverse, Float(8388608.0f)));
            const Word low_pair = W::template permute<0x5140>(bits[0], bits[1]),
                       high_pair = W::template permute<0x5140>(bits[2], bits[3]);
            factors[quad / 2][2 * (quad % 2)] = W::template permute<0x7632>(low_pair, high_pair);
            factors[quad / 2][2 * (quad % 2) + 1] = W::template permute<0x5410>(low_pair, high_pair);
        }
    }
    KVPLANE_DEVICE static void load_quad(const std::byte* at, int bytes, Word token, Float (&to)[4]) {
        if (bytes == 2) {
            Word words[2];
            W::load8(at, token * 2u, words);
KVPLANE_UNROLL
            for (int i = 0; i < 2; ++i) {
                to[2 * i] = W::low_half(words[i]);
                to[2 * i + 1] = W::high_half(words[i]);
            }
        } else {
            const Word word = W::load4(at, token);
KVPLANE_UNROLL
            for (int i = 0; i < 4; ++i) to[i] = W::low_half((word >> (8 * i) & 0xFFu) << 7);
        }
    }

    /// Adds the products of weights and 32 channels of values.
    template <int bits>
    KVPLANE_DEVICE static void add_block(const std::byte* tile, const SegmentView& segment,
                                         const Word (&factors)[4][4], Float worth, int block, Float (&out)[4][2]) {
        constexpr PlaneSplit split = plane_split(bits);
        constexpr int chunk = value_chunk;
        const Word g = W::lane() >> 2, quarter = W::lane() & 3u;
        // A last block may be half there.
        const auto most = std::uint32_t((segment.channels + 15) / 16 * 16 - 4);
        const Word channel = W::minimum(g * 4u + std::uint32_t(32 * block), Word(most));
        Int sums[4][4];
KVPLANE_UNROLL
        for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = Int(0);
KVPLANE_UNROLL
        for (int round = 0; round < 32 / chunk; ++round) {
            const Word token = quad_token(round * chunk / 4, quarter, chunk);
            Word words[split.count][chunk / 8][4];
KVPLANE_UNROLL
            for (int p = 0; p < split.count; ++p) {
                const int depth = 32 / split[p];
                const auto units = std::uint32_t(128 / depth);
KVPLANE_UNROLL
                for (int u = 0; u < (chunk < depth ? 1 : chunk / depth); ++u)
                    W::load16(tile + segment.plane_at[p],
                              value_word(channel, token / std::uint32_t(depth) + std::uint32_t(u), units), words[p][u]);
            }
KVPLANE_UNROLL
            for (int part = 0; part < chunk / 8; ++part)
KVPLANE_UNROLL
                for (int s = 0; s < 4; ++s) {
                    Word b[2];
                    code_words<bits, chunk>(words, part, s, token, b);
                    W::multiply_unsigned(sums[s], factors[round * (chunk / 8) + part], b);
                }
        }
KVPLANE_UNROLL
        for (int s = 0; s < 4; ++s)
KVPLANE_UNROLL
            for (int j = 0; j < 2; ++j)
                out[s][j] = W::multiply_add(W::to_float(sums[s][j] * 256 + sums[s][2 + j]), worth, out[s][j]);
    }

    // Tiles of fp16 numbers.

    /// The planes of fp16 numbers, of 8 numbers along the product: two words of the plane of high bytes, one each
    /// of the two others.
    KVPLANE_DEVICE static void load_halves(const std::byte* tile, const SegmentView& segment, Word at[3],
                                           std::uint32_t next, Word (&words)[4][4]) {
        W::load16(tile + segment.plane_at[0], at[0], words[0]);
        W::load16(tile + segment.plane_at[0], at[0] + next, words[1]);
        W::load16(tile + segment.plane_at[1], at[1], words[2]);
        W::load16(tile + segment.plane_at[2], at[2], words[3]);
    }
    /// Eight fp16 numbers in order, two a word.
    KVPLANE_DEVICE static void join_halves(const Word (&words)[4][4], int s, Word (&halves)[4]) {
KVPLANE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Word middle = (words[2][s] >> (4 * half) & 0x0F0F0F0Fu) << 4,
                       low = words[3][s] >> (4 * half) & 0x0F0F0F0Fu;
            halves[2 * half] = W::template permute<0x5140>(middle | low, words[half][s]);
            halves[2 * half + 1] = W::template permute<0x7362>(middle | low, words[half][s]);
        }
    }
    /// Four floats in the halves of A: rounded to fp16, and what that left.
    KVPLANE_DEVICE static void two_parts(const Float (&x)[4], Word (&a)[4]) {
KVPLANE_UNROLL
        for (int i = 0; i < 2; ++i) {
            a[2 * i] = W::pack_halves(x[2 * i], x[2 * i + 1]);
            a[2 * i + 1] = W::pack_halves(x[2 * i] - W::low_half(a[2 * i]), x[2 * i + 1] - W::high_half(a[2 * i]));
        }
    }

    KVPLANE_DEVICE static void half_scores(const QueryRowsView& queries, const std::byte* tile,
                                           const SegmentView& segment, Scores& score) {
        const Word g = W::lane() >> 2, quarter = W::lane() & 3u;
        const auto channels = std::uint32_t(segment.channels);
        const std::uint32_t units = (channels + 7u) / 8u, high_units = (channels + 3u) / 4u;
        const int octets = segmented ? octets_of(segment.channels, 8) : key_octets;
        // Queries become fp16 numbers, which are largest at 65504: scaled to at most 256 by row.
        Float largest(0.0f);
        Float sums[16][4];
KVPLANE_UNROLL
        for (int i = 0; i < 64; ++i) sums[i / 4][i % 4] = Float(0.0f);
KVPLANE_UNROLL
        for (int o = 0; o < octets; ++o) {
            Float query[8];
            load_floats(queries.rows, g * queries.stride + W::minimum(octet_channel(o, quarter, 8), Word(channels - 8u)) * 4u, query);
KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) largest = W::maximum(largest, W::absolute(query[i]));
        }
        largest = W::maximum(over_quarters_max(largest), Float(1e-30f));
        const Float scale = 256.0f / largest;
KVPLANE_UNROLL
        for (int o = 0; o < octets; ++o) {
            const Word channel = octet_channel(o, quarter, 8);
            const auto valid = channel < channels;
            const Word begin = W::minimum(channel, Word(channels - 8u));
            Float query[8], first[4], second[4];
            load_floats(queries.rows, g * queries.stride + begin * 4u, query);
KVPLANE_UNROLL
            for (int i = 0; i < 4; ++i) {
                first[i] = W::select(valid, query[i] * scale, Float(0.0f));
                second[i] = W::select(valid, query[4 + i] * scale, Float(0.0f));
            }
            Word a[2][4];
            two_parts(first, a[0]);
            two_parts(second, a[1]);
KVPLANE_UNROLL
            for (int m = 0; m < 4; ++m) {
                const Word token = score_token(m, g, value_chunk);
                Word at[3] = {key_word(token, begin >> 2, high_units), key_word(token, begin >> 3, units),
                              key_word(token, begin >> 3, units)};
                Word words[4][4];
                load_halves(tile, segment, at, 64u, words);
KVPLANE_UNROLL
                for (int s = 0; s < 4; ++s) {
                    Word halves[4];
                    join_halves(words, s, halves);
                    W::multiply_halves(sums[4 * m + s], a[0], halves[0], halves[1]);
                    W::multiply_halves(sums[4 * m + s], a[1], halves[2], halves[3]);
                }
            }
        }
        const Float worth = largest * (1.0f / 256.0f);
KVPLANE_UNROLL
        for (int i = 0; i < 16; ++i)
KVPLANE_UNROLL
            for (int j = 0; j < 2; ++j) score[i / 4][i % 4][j] = (sums[i][j] + sums[i][2 + j]) * worth;
    }

    KVPLANE_DEVICE static void half_sums(const std::byte* tile, const SegmentView& segment, const Scores& weight,
                                         Float factor, State& state) {
        const Word g = W::lane() >> 2, quarter = W::lane() & 3u;
        Word a[8][4];
KVPLANE_UNROLL
        for (int quad = 0; quad < 8; ++quad) {
            const Float four[4] = {weight[quad / 2][0][quad % 2], weight[quad / 2][1][quad % 2],
                                   weight[quad / 2][2][quad % 2], weight[quad / 2][3][quad % 2]};
            two_parts(four, a[quad]);
        }
        const auto most = std::uint32_t((segment.channels + 15) / 16 * 16 - 4);
KVPLANE_UNROLL
        for (int b = 0; b < value_blocks; ++b) {
            const Word channel = W::minimum(g * 4u + std::uint32_t(32 * b), Word(most));
            Float sums[4][4];
KVPLANE_UNROLL
            for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = Float(0.0f);
KVPLANE_UNROLL
            for (int m = 0; m < 4; ++m) {
                const Word token = quad_token(2 * m, quarter, 8);
                Word at[3] = {value_word(channel, token >> 2, 32u), value_word(channel, token >> 3, 16u),
                              value_word(channel, token >> 3, 16u)};
                Word words[4][4];
                load_halves(tile, segment, at, 64u, words);
KVPLANE_UNROLL
                for (int s = 0; s < 4; ++s) {
                    Word halves[4];
                    join_halves(words, s, halves);
                    W::multiply_halves(sums[s], a[2 * m], halves[0], halves[1]);
                    W::multiply_halves(sums[s], a[2 * m + 1], halves[2], halves[3]);
                }
            }
KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i)
                state.out[b][i / 2][i % 2] = W::multiply_add(sums[i / 2][i % 2] + sums[i / 2][2 + i % 2], factor,
                                                             state.out[b][i / 2][i % 2]);
        }
    }
};

}  // namespace kvplane::cuda
