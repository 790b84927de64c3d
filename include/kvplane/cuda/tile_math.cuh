// kvplane/cuda/tile_math.cuh: attention of eight query rows on one tile, by the 32 lanes of a warp.
//
// Everything is written over a Warp, whose Word, Int and Float are one lane's numbers on a device (warp.cuh),
// and 32 of them in the tests, which run the same source on the host. Lane 4 g + t works for query row g.
//
//   keys     the steps of the grids are folded into the query, and the result is rounded to 16 bits by tile:
//            the high bytes are rows 0 to 7 of A, the low bytes rows 8 to 15. Sums are exact: the largest,
//            256 x 127 x 255 x 256 channels and the low bytes' part, is below 2^31.
//   softmax  weights are relative to the largest score of their tile, so that rounding them to 16 bits loses
//            as little in a tile of small weights; the tile's factor goes to where sums become floats.
//   values   the steps are folded into the weights, rounded to unsigned 16 bits. Sums: 65535 x 255 x 128 <
//            2^31.
//
// What rounding does to the middle of all codes, which all tokens (of values, all channels) have in common,
// is taken back: a rounded factor errs by a code's distance from the middle only. Otherwise all channels of
// a sum of values would be off by the same, which the rotation back puts into one of them.
//
// fp16 tiles are put together in registers, of as many planes as are read, and multiplied as fp16, queries
// and weights in two parts (high and low half) as above. Scores are in units of log 2.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/fragments.hpp"
#include "kvplane/cuda/tile_views.hpp"

namespace kvplane::cuda {

/// Rows of queries in the memory of a block: floats, `stride` bytes apart. In latents instead, of one tile:
/// [latent][row], and what the mean of the keys adds to the scores of each row.
struct QueryRowsView {
    const std::byte* rows;
    std::uint32_t stride;
    std::uint32_t offset_at = 0;  ///< [row] in bytes; of latents alone
};

/// `count` floats, a multiple of 4, `at` bytes behind a base.
template <class W, int count>
KVPLANE_DEVICE void load_floats(const std::byte* from, typename W::Word at, typename W::Float (&to)[count]) {
    KVPLANE_UNROLL
    for (int four = 0; four < count / 4; ++four) {
        typename W::Word words[4];
        W::load16(from, at + std::uint32_t(16 * four), words);
        KVPLANE_UNROLL
        for (int i = 0; i < 4; ++i) to[4 * four + i] = W::as_float(words[i]);
    }
}
/// The sum over the four lanes of a row, and the largest.
template <class W>
KVPLANE_DEVICE typename W::Float over_quarters(typename W::Float x) {
    x = x + W::shuffle_xor(x, 1);
    return x + W::shuffle_xor(x, 2);
}
template <class W>
KVPLANE_DEVICE typename W::Float over_quarters_max(typename W::Float x) {
    x = W::maximum(x, W::shuffle_xor(x, 1));
    return W::maximum(x, W::shuffle_xor(x, 2));
}

/// In place of a width: what the views say at run time; of keys, that of latents; of values, several by
/// token.
inline constexpr int any_width = 0, latent_width = -1, token_widths = -1;

/// A row of a token outside tiles.
template <class W>
struct TokenRow {
    const std::byte* at;
    bool half;
    typename W::Float step;  ///< of bytes

    /// Eight channels; `channel` is a multiple of 8.
    KVPLANE_DEVICE void load(typename W::Word channel, typename W::Float (&to)[8]) const {
        typename W::Word words[4];
        load_words(channel, words);
        convert(words, to);
    }
    /// The same in two steps, so that other loads can be under way between them.
    KVPLANE_DEVICE void load_words(typename W::Word channel, typename W::Word (&words)[4]) const {
        if (half) {
            W::load16(at, channel * 2u, words);
        } else {
            typename W::Word codes[2];
            W::load8(at, channel, codes);
            words[0] = codes[0];
            words[1] = codes[1];
        }
    }
    KVPLANE_DEVICE void convert(const typename W::Word (&words)[4], typename W::Float (&to)[8]) const {
        KVPLANE_UNROLL
        for (int i = 0; i < 8; ++i) {
            if (half)
                to[i] = i % 2 == 0 ? W::low_half(words[i / 2]) : W::high_half(words[i / 2]);
            else
                to[i] = step * W::to_float(W::to_int(words[i / 4] >> (8 * (i % 4)) & 0xFFu) - 128);
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
    typename W::Int position;   ///< of the row's query
    typename W::Float slope;    ///< ALiBi
    typename W::Float softcap;  ///< 0: none
    const float* bias;          ///< nullptr: none
    typename W::Word bias_row;  ///< the number of the row's query and position 0
    std::int32_t window;        ///< 0: none
    std::int32_t window_sinks;  ///< tokens that stay visible in spite of it
    std::int32_t hidden_from, hidden_to;
    bool causal;
    bool changes_scores;  ///< whether softcap, slope or bias do anything
};

/// Which rows of a tile are tokens of the sequence, and where.
struct TileMask {
    std::int32_t origin;        ///< the position that row 0 of the tile has, or would have
    std::int32_t row, end_row;  ///< rows [row, end_row) are tokens
};

template <class W>
struct SoftmaxRows {
    typename W::Float largest;  ///< of the row, the same in its four lanes
    typename W::Float sum;      ///< of the lane's own tokens
};

/// key_bits, value_bits: the width of all channels, 16 for fp16; any_width: what the views say at run time;
/// latent_width: that, of latents; token_widths: values of several widths by token, and these alone. Of keys
/// and of values with so many channels, where these widths are known; of values otherwise the most there may
/// be. paired: rows 4 to 7 are rows 0 to 3 once more. Of the two tokens whose scores a lane gets by every
/// product, it then takes one, and the lane of the other four rows the other: half of the work between the
/// products.
template <class W, int key_bits, int key_channels, int value_bits, int value_channels, bool paired = false>
struct TileMath {
    using Word = typename W::Word;
    using Int = typename W::Int;
    using Float = typename W::Float;

    static constexpr bool in_latents = key_bits == latent_width;
    /// Keys of several widths, or with grids over fewer tokens than a tile.
    static constexpr bool segmented = key_bits == any_width || in_latents;
    static constexpr bool any_values = value_bits == any_width;
    /// fp16 has no grids, and so no part that all channels share.
    static constexpr bool has_bases = value_bits != 16;
    static constexpr int key_chunk = segmented || key_bits == 16 ? 8 : least_chunk(key_bits);
    /// Where keys have grids over fewer tokens, quads of tokens ascend, so that those of a grid are
    /// neighbours.
    static constexpr int value_chunk =
        key_bits == any_width || value_bits <= 0 || value_bits == 16 ? 8 : least_chunk(value_bits);
    static constexpr int key_octets = octets_of(key_channels, key_chunk);
    static constexpr int blocks = (value_channels + 31) / 32;
    /// Tokens whose scores of one product a lane takes.
    static constexpr int own = paired ? 1 : 2;
    static constexpr bool shares_rows = paired;
    static constexpr float signed_range = 32512.0f, unsigned_range = 65500.0f;
    static constexpr float masked = -1e30f;

    /// The row that a lane works for.
    KVPLANE_DEVICE static Word row() { return paired ? W::lane() >> 2 & 3u : W::lane() >> 2; }
    /// The column of the scores that a lane takes.
    KVPLANE_DEVICE static Word column(int j) {
        return (W::lane() & 3u) * 2u + (paired ? W::lane() >> 4 : Word(std::uint32_t(j)));
    }

    /// What a warp has gathered. out[b][s][j]: channel 32 b + 8 t + 4 j + s of row g.
    struct State {
        SoftmaxRows<W> softmax;
        Float out[blocks][4][2];
        Float base[blocks];  ///< a part of all channels of a block, of the lane's own tokens
    };

    KVPLANE_DEVICE static void begin(State& state) {
        state.softmax = {Float(masked), Float(0.0f)};
        KVPLANE_UNROLL
        for (int b = 0; b < blocks; ++b) {
            state.base[b] = Float(0.0f);
            KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) state.out[b][i / 2][i % 2] = Float(0.0f);
        }
    }

    /// Scores of all tokens: score[m][s][j] of token score_token(m, column(j)) + s of the lane's row.
    using Scores = Float[4][4][own];

    /// The keys of a tile, before softcap and the like. Scores of whatever the tile holds beside tokens are
    /// finite. bits: that are read of keys of one width of codes; a chunk holds the same channels then.
    /// memory: of the warp, where factors of segmented keys go, eight rows of KeyTileView::factor_stride()
    /// bytes.
    template <int bits = key_bits>
    KVPLANE_DEVICE static void score(const QueryRowsView& queries, const std::byte* tile,
                                     const KeyTileView& view, std::byte* memory, Scores& score) {
        static_assert(segmented || key_bits == 16 || least_chunk(bits) == key_chunk);
        if constexpr (key_bits == 16) {
            half_scores(queries, tile, view.segment[0], score);
        } else if constexpr (in_latents) {
            segment_scores(queries, tile, view, 0, memory, score);
        } else if constexpr (segmented) {
            if (view.segment[0].bits == 16)
                half_scores(queries, tile, view.segment[0], score);
            else
                for (int group = 0; group < view.groups; ++group)
                    segment_scores(queries, tile, view, group, memory, score);
        } else {
            Word factors[key_octets][4];
            Float worth, base;
            fold_uniform<bits>(queries, tile, view.segment[0], factors, worth, base);
            Int sums[16][4];
            zero(sums);
            KVPLANE_UNROLL
            for (int round = 0; round < key_octets / (key_chunk / 8); ++round)
                add_round<bits, key_chunk>(tile, view.segment[0], factors + round * (key_chunk / 8), round, 0,
                                           4, sums);
            to_scores(sums, worth, base, 0, 4, score);
        }
    }

    /// Applies the rules to scores, which masks what a row does not see. Few tiles need it.
    KVPLANE_DEVICE static void apply(const ScoreRules<W>& rules, const TileMask& mask, Scores& score) {
        Float scores[16 * own];
        KVPLANE_UNROLL
        for (int i = 0; i < 16 * own; ++i) scores[i] = score[i / (4 * own)][i / own % 4][i % own];
        KVPLANE_KEEP_ROLLED
        for (int i = 0; i < 16 * own; ++i) {
            const Word token =
                score_token(i / (4 * own), column(i % own), value_chunk) + std::uint32_t(i / own % 4);
            const Int row = W::to_int(token);
            scores[i] =
                ruled(rules, scores[i], row + mask.origin, W::both(row >= mask.row, row < mask.end_row));
        }
        KVPLANE_UNROLL
        for (int i = 0; i < 16 * own; ++i) score[i / (4 * own)][i / own % 4][i % own] = scores[i];
    }

    /// One score of a token at `position`, which is part of the sequence where `there`.
    KVPLANE_DEVICE static Float ruled(const ScoreRules<W>& rules, Float score, Int position,
                                      typename W::Flag there) {
        auto seen = there;
        if (rules.causal) seen = W::both(seen, position <= rules.position);
        if (rules.window > 0)
            seen = W::both(
                seen, W::either(rules.position - position < rules.window, position < rules.window_sinks));
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
        Float sum;
        const Float largest = relative(score, sum);
        return enter(largest, sum, state);
    }
    /// The first of these steps. Returns the largest score of the row; sum: of the weights of the lane's own
    /// tokens.
    KVPLANE_DEVICE static Float relative(Scores& score, Float& sum) {
        Float largest = score[0][0][0];
        KVPLANE_UNROLL
        for (int i = 1; i < 16 * own; ++i)
            largest = W::maximum(largest, score[i / (4 * own)][i / own % 4][i % own]);
        largest = over_row_max(largest);
        sum = Float(0.0f);
        KVPLANE_UNROLL
        for (int i = 0; i < 16 * own; ++i) {
            Float& weight = score[i / (4 * own)][i / own % 4][i % own];
            weight = W::exp2(weight - largest);
            sum = sum + weight;
        }
        return largest;
    }
    KVPLANE_DEVICE static Float enter(Float largest, Float sum, State& state) {
        raise(largest, state);
        const Float factor = factor_of(largest, state);
        state.softmax.sum = state.softmax.sum + factor * sum;
        return factor;
    }
    /// What weights relative to `largest` come times. All tokens masked: their weights were 1.
    KVPLANE_DEVICE static Float factor_of(Float largest, const State& state) {
        return W::select(largest > masked, W::exp2(largest - state.softmax.largest), Float(0.0f));
    }
    /// The sum over the lanes of a row.
    KVPLANE_DEVICE static Float row_sum(Float x) { return over_row(x); }

    /// Makes `largest` the largest score, if it is larger than those before.
    KVPLANE_DEVICE static void raise(Float largest, State& state) {
        if (!W::any(largest > state.softmax.largest)) return;
        const Float raised = W::maximum(largest, state.softmax.largest);
        const Float shrink = W::exp2(state.softmax.largest - raised);
        state.softmax.largest = raised;
        state.softmax.sum = state.softmax.sum * shrink;
        KVPLANE_UNROLL
        for (int b = 0; b < blocks; ++b) {
            if (has_bases) state.base[b] = state.base[b] * shrink;
            KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) state.out[b][i / 2][i % 2] = state.out[b][i / 2][i % 2] * shrink;
        }
    }

    /// Adds the values of a tile. weight: relative to `factor`. bits: as for score(). memory: of the warp,
    /// where weights of values of several widths go, ValueTileView::run_bytes bytes.
    template <int bits = value_bits>
    KVPLANE_DEVICE static void add_values(const std::byte* tile, const ValueTileView& view, std::byte* memory,
                                          const Scores& weight, Float factor, State& state) {
        if constexpr (value_bits == 16) {
            half_sums(tile, view.all, weight, factor, state);
        } else if constexpr (value_bits == token_widths) {
            run_sums(tile, view, memory, weight, factor, state);
        } else if constexpr (!any_values) {
            static_assert(least_chunk(bits) == least_chunk(value_bits));
            coded_sums<bits>(tile, view, weight, factor, state);
        } else {
            if (view.all.bits == 16) return half_sums(tile, view.all, weight, factor, state);
            detail::with_bits<1, 2, 3, 4, 5, 6, 7, 8>(
                view.all.bits, [&](auto width) { coded_sums<width>(tile, view, weight, factor, state); });
        }
    }

    /// One token that is in no tile: its score for the row. Row: TokenRow.
    template <class Row>
    KVPLANE_DEVICE static Float score_row(const QueryRowsView& queries, const Row& key_row, int channels) {
        const Word quarter = W::lane() & 3u, g = row();
        Float sum(0.0f);
        KVPLANE_KEEP_ROLLED
        for (int c = 0; c < channels; c += 32) {
            const Word channel = quarter * 8u + std::uint32_t(c);
            const auto valid = channel < std::uint32_t(channels);
            const Word at = W::select(valid, channel, Word(0u));
            Float key[8], query[8];
            key_row.load(at, key);
            load_floats<W>(queries.rows, g * queries.stride + at * 4u, query);
            Float part(0.0f);
            KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) part = part + key[i] * query[i];
            sum = sum + W::select(valid, part, Float(0.0f));
        }
        return over_quarters<W>(sum);
    }
    /// The same of several at once, so that their loads do not wait for each other. (One by it would spill
    /// registers of kernels that have none left.)
    template <int count, class Row>
    KVPLANE_DEVICE static void score_rows(const QueryRowsView& queries, const Row (&key_rows)[count],
                                          int channels, Float (&score)[count]) {
        const Word quarter = W::lane() & 3u, g = row();
        KVPLANE_UNROLL
        for (int n = 0; n < count; ++n) score[n] = Float(0.0f);
        KVPLANE_KEEP_ROLLED
        for (int c = 0; c < channels; c += 32) {
            const Word channel = quarter * 8u + std::uint32_t(c);
            const auto valid = channel < std::uint32_t(channels);
            const Word at = W::select(valid, channel, Word(0u));
            Word words[count][4];
            KVPLANE_UNROLL
            for (int n = 0; n < count; ++n) key_rows[n].load_words(at, words[n]);
            Float query[8];
            load_floats<W>(queries.rows, g * queries.stride + at * 4u, query);
            KVPLANE_UNROLL
            for (int n = 0; n < count; ++n) {
                Float key[8], part(0.0f);
                key_rows[n].convert(words[n], key);
                KVPLANE_UNROLL
                for (int i = 0; i < 8; ++i) part = part + key[i] * query[i];
                score[n] = score[n] + W::select(valid, part, Float(0.0f));
            }
        }
        KVPLANE_UNROLL
        for (int n = 0; n < count; ++n) score[n] = over_quarters<W>(score[n]);
    }
    /// Enters up to four such tokens. A masked score has no weight.
    template <class Row>
    KVPLANE_DEVICE static void add_rows(const Row* rows, const Float* score, int count, int channels,
                                        State& state) {
        Float largest = score[0];
        KVPLANE_KEEP_ROLLED
        for (int i = 1; i < count; ++i) largest = W::maximum(largest, score[i]);
        raise(largest, state);
        const Word quarter = W::lane() & 3u;
        KVPLANE_KEEP_ROLLED
        for (int i = 0; i < count; ++i) {
            const Float weight =
                W::select(score[i] > masked, W::exp2(score[i] - state.softmax.largest), Float(0.0f));
            // All lanes of a row have the same token.
            const Float share = W::select(first_of_row(), weight, Float(0.0f));
            state.softmax.sum = state.softmax.sum + share;
            const Float once = paired ? W::select(W::lane() < 16u, weight, Float(0.0f)) : weight;
            KVPLANE_UNROLL
            for (int b = 0; b < blocks; ++b) {
                const Word channel = quarter * 8u + std::uint32_t(32 * b);
                Float value[8];
                rows[i].load(W::select(channel < std::uint32_t(channels), channel, Word(0u)), value);
                KVPLANE_UNROLL
                for (int s = 0; s < 4; ++s) {
                    state.out[b][s][0] = state.out[b][s][0] + once * value[s];
                    state.out[b][s][1] = state.out[b][s][1] + once * value[4 + s];
                }
            }
        }
    }

    /// Makes sums whole: over the lanes of a row, and bases into outputs. Of paired rows lanes from 16 on
    /// then hold what lanes before hold.
    KVPLANE_DEVICE static void finish(State& state) {
        state.softmax.sum = over_row(state.softmax.sum);
        KVPLANE_UNROLL
        for (int b = 0; b < blocks; ++b) {
            const Float base = has_bases ? over_row(state.base[b]) : Float(0.0f);
            state.base[b] = Float(0.0f);
            KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) {
                Float& out = state.out[b][i / 2][i % 2];
                if (paired) out = out + W::shuffle_xor(out, 16);
                out = out + base;
            }
        }
    }

  protected:
    KVPLANE_DEVICE static Float over_row(Float x) {
        x = over_quarters<W>(x);
        return paired ? x + W::shuffle_xor(x, 16) : x;
    }
    KVPLANE_DEVICE static Float over_row_max(Float x) {
        x = over_quarters_max<W>(x);
        return paired ? W::maximum(x, W::shuffle_xor(x, 16)) : x;
    }
    KVPLANE_DEVICE static typename W::Flag first_of_row() { return (W::lane() & (paired ? 19u : 3u)) == 0u; }
    /// Of a pair of tokens that of the lane's column.
    template <class T>
    KVPLANE_DEVICE static T of_column(int j, const T& even, const T& odd) {
        if (paired) return W::select(W::lane() < 16u, even, odd);
        return j == 0 ? even : odd;
    }
    KVPLANE_DEVICE static void zero(Int (&sums)[16][4]) {
        KVPLANE_UNROLL
        for (int i = 0; i < 64; ++i) sums[i / 4][i % 4] = Int(0);
    }
    KVPLANE_DEVICE static constexpr int channels_of(const SegmentView& segment) {
        return segmented ? segment.channels : key_channels;
    }

    /// Steps or lowers of eight channels from `first` on.
    KVPLANE_DEVICE static void load_grid(const std::byte* at, Word first, Float (&to)[8]) {
        Word words[4];
        W::load16(at, first * 2u, words);
        KVPLANE_UNROLL
        for (int i = 0; i < 4; ++i) {
            to[2 * i] = W::low_half(words[i]);
            to[2 * i + 1] = W::high_half(words[i]);
        }
    }

    /// Query times step of eight channels, and adds what is left of the score to `low`.
    KVPLANE_DEVICE static void fold_octet(const QueryRowsView& queries, const std::byte* tile,
                                          const SegmentView& segment, Word channel, Float (&f)[8],
                                          Float& low) {
        const Word g = W::lane() >> 2;
        constexpr bool full = key_channels % (4 * key_chunk) == 0;
        Float query[8], step[8], lower[8];
        // Octets behind the last channel take the last eight and count nothing.
        const Word begin = full ? channel : W::minimum(channel, Word(std::uint32_t(key_channels - 8)));
        load_floats<W>(queries.rows, g * queries.stride + begin * 4u, query);
        load_grid(tile + segment.step_at, begin, step);
        load_grid(tile + segment.lower_at, begin, lower);
        KVPLANE_UNROLL
        for (int i = 0; i < 8; ++i) {
            if (!full) query[i] = W::select(channel < std::uint32_t(key_channels), query[i], Float(0.0f));
            f[i] = query[i] * step[i] * segment.step_scale;
            low = low + query[i] * lower[i];
        }
    }

    /// f inverse, up to signed_range, rounded, on top of signed_zero.
    KVPLANE_DEVICE static Word rounded(Float f, Float inverse) {
        return W::as_word(W::multiply_add(f, inverse, Float(12582912.0f + 128.0f)));
    }
    /// The float of 1.5 2^23 + 128, whose unit in the last place is 1; and that of 2^23.
    static constexpr std::uint32_t signed_zero = 0x4B400080u, unsigned_zero = 0x4B000000u;
    /// Eight numbers up to signed_range in the bytes of A: the high and the low parts of four, and of four
    /// more. Adds the rounded numbers to `total`.
    KVPLANE_DEVICE static void signed_bytes(const Float (&f)[8], Float inverse, Word (&a)[4], Word& total) {
        Word bits[8];
        KVPLANE_UNROLL
        for (int i = 0; i < 8; ++i) {
            bits[i] = rounded(f[i], inverse);
            total = total + bits[i];
        }
        total = total - 8u * signed_zero;
        KVPLANE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Word* b = bits + 4 * half;
            const Word low = W::template permute<0x5140>(b[0], b[1]),
                       high = W::template permute<0x5140>(b[2], b[3]);
            a[2 * half] = W::template permute<0x7632>(low, high);
            a[2 * half + 1] = W::template permute<0x5410>(low, high) ^ 0x80808080u;
        }
    }

    template <int bits>
    KVPLANE_DEVICE static void fold_uniform(const QueryRowsView& queries, const std::byte* tile,
                                            const SegmentView& segment, Word (&factors)[key_octets][4],
                                            Float& worth, Float& base) {
        const Word quarter = W::lane() & 3u;
        Float f[key_octets][8];
        Float low(0.0f), sum(0.0f), largest(0.0f);
        KVPLANE_UNROLL
        for (int o = 0; o < key_octets; ++o) {
            fold_octet(queries, tile, segment, octet_channel(o, quarter, key_chunk), f[o], low);
            gather(f[o], sum, largest);
        }
        largest = over_quarters_max<W>(largest);
        worth = largest * (1.0f / signed_range);
        const Float inverse = inverse_of(largest, signed_range);
        Word total(0u);
        KVPLANE_UNROLL
        for (int o = 0; o < key_octets; ++o) signed_bytes(f[o], inverse, factors[o], total);
        base = over_quarters<W>(low + sum * middle_of(bits) - of_middles(bits, total, worth));
    }
    /// The middle of all codes of a width, in steps.
    KVPLANE_DEVICE static constexpr float middle_of(int bits) { return 0.5f * static_cast<float>(1 << bits); }
    /// What the middle codes take part with in the integer sums, which have factors that sum up to `total`.
    KVPLANE_DEVICE static Float of_middles(int bits, Word total, Float worth) {
        return W::to_float(W::to_int(total)) * worth * (middle_of(bits) - 0.5f);
    }
    KVPLANE_DEVICE static void gather(const Float (&f)[8], Float& sum, Float& largest) {
        KVPLANE_UNROLL
        for (int i = 0; i < 8; ++i) {
            sum = sum + f[i];
            largest = W::maximum(largest, W::absolute(f[i]));
        }
    }
    /// What numbers up to `largest` are multiplied by to be rounded to that range; 0 where there is none.
    KVPLANE_DEVICE static Float inverse_of(Float largest, float range) {
        return W::select(largest > 1e-30f, range / W::maximum(largest, Float(1e-30f)), Float(0.0f));
    }

    /// Adds the products of the tokens of m in [first_m, end_m) and one chunk of each quarter: of round
    /// `round`, which the lane's quarter has factors of.
    template <int bits, int chunk>
    KVPLANE_DEVICE static void add_round(const std::byte* tile, const SegmentView& segment,
                                         const Word (*factors)[4], int round, int first_m, int end_m,
                                         Int (&sums)[16][4]) {
        constexpr PlaneSplit split = plane_split(bits);
        const Word g = W::lane() >> 2, quarter = W::lane() & 3u;
        const Word channel = octet_channel(round * (chunk / 8), quarter, chunk);
        KVPLANE_UNROLL
        for (int m = 0; m < 4; ++m) {
            if (segmented && !in_latents && (m < first_m || m >= end_m)) continue;
            const Word token = score_token(m, g, value_chunk);
            Word words[split.count][chunk / 8][4];
            load_key_planes<bits, chunk>(tile, segment, token, channel, words);
            KVPLANE_UNROLL
            for (int part = 0; part < chunk / 8; ++part) KVPLANE_UNROLL
            for (int s = 0; s < 4; ++s) {
                Word b[2];
                code_words<bits, chunk>(words, part, s, channel, b);
                W::multiply_signed(sums[4 * m + s], factors[part], b);
            }
        }
    }
    /// The words of four tokens that hold the channels of a chunk, from every plane.
    template <int bits, int chunk, int plane = 0, class Words>
    KVPLANE_DEVICE static void load_key_planes(const std::byte* tile, const SegmentView& segment, Word token,
                                               Word channel, Words& words) {
        constexpr int depth = 32 / plane_split(bits)[plane];
        const auto units = std::uint32_t((channels_of(segment) + depth - 1) / depth);
        constexpr bool full = !segmented && key_channels % (4 * chunk) == 0;
        KVPLANE_UNROLL
        for (int u = 0; u < (chunk < depth ? 1 : chunk / depth); ++u) {
            const Word unit = channel / std::uint32_t(depth) + std::uint32_t(u);
            W::load16(tile + segment.plane_at[plane],
                      key_word(token, full ? unit : W::minimum(unit, Word(units - 1u)), units),
                      words[plane][u]);
        }
        if constexpr (plane + 1 < plane_split(bits).count)
            load_key_planes<bits, chunk, plane + 1>(tile, segment, token, channel, words);
    }
    /// The words of four channels that hold the tokens of a chunk.
    template <int bits, int plane = 0, class Words>
    KVPLANE_DEVICE static void load_value_planes(const std::byte* tile, const SegmentView& segment,
                                                 Word token, Word channel, Words& words) {
        constexpr int depth = 32 / plane_split(bits)[plane];
        KVPLANE_UNROLL
        for (int u = 0; u < (value_chunk < depth ? 1 : value_chunk / depth); ++u)
            W::load16(tile + segment.plane_at[plane],
                      value_word(channel, token / std::uint32_t(depth) + std::uint32_t(u),
                                 std::uint32_t(128 / depth)),
                      words[plane][u]);
        if constexpr (plane + 1 < plane_split(bits).count)
            load_value_planes<bits, plane + 1>(tile, segment, token, channel, words);
    }

    /// The two words of B of an octet or a pair of quads: four codes a byte each, and four more. words[p][i]:
    /// what unit i of the chunk in plane p holds. first: channel (token) where a chunk is less than a unit.
    template <int bits, int chunk, class Words>
    KVPLANE_DEVICE static void code_words(const Words& words, int part, int s, Word first, Word (&b)[2]) {
        constexpr int planes = plane_split(bits).count;
        b[0] = b[1] = Word(0u);
        add_plane<bits, chunk, 0>(words, part, s, first, b);
        if constexpr (planes > 1) add_plane<bits, chunk, 1>(words, part, s, first, b);
        if constexpr (planes > 2) add_plane<bits, chunk, 2>(words, part, s, first, b);
    }
    template <int bits, int chunk, int plane, class Words>
    KVPLANE_DEVICE static void add_plane(const Words& words, int part, int s, Word first, Word (&b)[2]) {
        constexpr int width = plane_split(bits)[plane], depth = 32 / width,
                      below = plane_split(bits).shift(plane);
        constexpr std::uint32_t mask = code_mask(width) << below;
        Word word = words[plane][chunk < depth ? 0 : 8 * part / depth][s];
        if constexpr (chunk < depth)
            word = word >> ((first % std::uint32_t(depth) >> 2) * std::uint32_t(width));
        const int at = chunk < depth ? 0 : 8 * part % depth / 4 * width;
        b[0] = b[0] | (moved(word, at - below) & mask);
        b[1] = b[1] | (moved(word, at + width - below) & mask);
    }
    /// Down by that many bits, or up.
    KVPLANE_DEVICE static Word moved(Word word, int bits) {
        return bits > 0 ? word >> std::uint32_t(bits) : bits < 0 ? word << std::uint32_t(-bits) : word;
    }

    KVPLANE_DEVICE static void to_scores(const Int (&sums)[16][4], Float worth, Float base, int first_m,
                                         int end_m, Scores& score) {
        KVPLANE_UNROLL
        for (int i = 0; i < 16; ++i) {
            if (segmented && !in_latents && (i / 4 < first_m || i / 4 >= end_m)) continue;
            KVPLANE_UNROLL
            for (int j = 0; j < own; ++j) {
                const Int high = of_column(j, sums[i][0], sums[i][1]),
                          low = of_column(j, sums[i][2], sums[i][3]);
                score[i / 4][i % 4][j] = W::multiply_add(W::to_float(high * 256 + low), worth, base);
            }
        }
    }

    /// Query rows that are not the same.
    static constexpr int rows = paired ? 4 : 8;
    /// Rounds that are folded together, so that what they read is under way at once.
    static constexpr int folded = 4;

    /// Of keys whose widths are known at run time lanes fold channels, each for all rows: grids stand
    /// anywhere in such tiles. Makes the factors of one group of tokens in the memory of the warp, [row][32
    /// channels a round], each in 16 bits.
    KVPLANE_DEVICE static void fold_segments(const QueryRowsView& queries, const std::byte* tile,
                                             const KeyTileView& view, int group, std::byte* factors,
                                             Float& worth, Float& base) {
        Float f[folded][rows], low[rows], largest[rows];
        KVPLANE_UNROLL
        for (int r = 0; r < rows; ++r) low[r] = largest[r] = Float(0.0f);
        for (int first = 0; first < view.rounds; first += folded)
            fold_rounds(queries, tile, view, group, first, f, low, largest);
        const Float most = across_lanes(largest, [](Float a, Float b) { return W::maximum(a, b); });
        worth = most * (1.0f / signed_range);
        const Float inverse = inverse_of(most, signed_range);
        Float inverses[rows];
        Float counted[rows];  // what is in `low` already
        Word total[rows];     // of rounded factors times the largest codes
        KVPLANE_UNROLL
        for (int r = 0; r < rows; ++r) {
            inverses[r] = W::of_lane(inverse, 4 * r);
            counted[r] = Float(0.0f);
            total[r] = Word(0u);
        }
        for (int first = 0; first < view.rounds; first += folded) {
            if (view.rounds > folded) fold_rounds(queries, tile, view, group, first, f, counted, largest);
            KVPLANE_UNROLL
            for (int i = 0; i < folded; ++i) {
                if (first + i >= view.rounds) break;
                const std::uint32_t largest_code =
                    (1u << view.segment[view.round[first + i].segment].bits) - 1u;
                KVPLANE_UNROLL
                for (int r = 0; r < rows; ++r) {
                    const Word factor = rounded(f[i][r], inverses[r]);
                    total[r] = total[r] + (factor - signed_zero) * largest_code;
                    W::store2(factors,
                              W::lane() * 2u +
                                  (std::uint32_t(r) * view.factor_stride() + std::uint32_t(64 * (first + i))),
                              factor);
                }
            }
        }
        KVPLANE_UNROLL
        for (int r = 0; r < rows; ++r)
            low[r] = low[r] - W::to_float(W::to_int(total[r])) * (W::of_lane(worth, 4 * r) * 0.5f);
        base = across_lanes(low, [](Float a, Float b) { return a + b; });
    }
    /// Query times step of a channel a lane, of up to `folded` rounds from round `first` on, for all rows;
    /// their largest magnitude, and what they add to the score beside the products. Rounds that are not there
    /// count nothing, instead of branches.
    KVPLANE_DEVICE static void fold_rounds(const QueryRowsView& queries, const std::byte* tile,
                                           const KeyTileView& view, int group, int first,
                                           Float (&f)[folded][rows], Float (&low)[rows],
                                           Float (&largest)[rows]) {
        KVPLANE_UNROLL
        for (int i = 0; i < folded; ++i) {
            const bool is_one = first + i < view.rounds;
            const KeyTileView::Round round = view.round[is_one ? first + i : 0];
            const auto there = W::lane() < std::uint32_t(is_one ? round.channels : 0);
            const Word channel = W::select(there, W::lane(), Word(0u));
            const std::byte* const grids = tile + group * round.group_bytes;
            Float step = W::low_half(W::load2(grids + round.step_at, channel * 2u));
            step = W::select(there, step * round.step_scale, Float(0.0f));
            Float offset = step * round.middle;
            if (round.lower_at >= 0)
                offset =
                    offset + W::select(there, W::low_half(W::load2(grids + round.lower_at, channel * 2u)),
                                       Float(0.0f));
            Float query[rows];
            load_channel(queries, channel + std::uint32_t(round.first_channel), query);
            KVPLANE_UNROLL
            for (int r = 0; r < rows; ++r) {
                f[i][r] = query[r] * step;
                low[r] = W::multiply_add(query[r], offset, low[r]);
                largest[r] = W::maximum(largest[r], W::absolute(f[i][r]));
            }
        }
    }
    /// All rows of a channel.
    KVPLANE_DEVICE static void load_channel(const QueryRowsView& queries, Word channel, Float (&to)[rows]) {
        KVPLANE_UNROLL
        for (int r = 0; r < rows; ++r) {
            if constexpr (in_latents) {
                if (r % 4 != 0) continue;
                Word words[4];
                W::load16(queries.rows, channel * std::uint32_t(rows * 4) + std::uint32_t(4 * r), words);
                KVPLANE_UNROLL
                for (int i = 0; i < 4; ++i) to[r + i] = W::as_float(words[i]);
            } else {
                to[r] = W::as_float(W::load4(queries.rows, channel * 4u + std::uint32_t(r) * queries.stride));
            }
        }
    }
    /// Puts each lane's numbers of all rows together with those of all lanes, and leaves in each lane that of
    /// its row: half of the rows change lanes at a time.
    template <class Operation>
    KVPLANE_DEVICE static Float across_lanes(Float (&x)[rows], const Operation& operation) {
        across_half<rows / 2>(x, operation);
        x[0] = operation(x[0], W::shuffle_xor(x[0], 1));
        x[0] = operation(x[0], W::shuffle_xor(x[0], 2));
        return paired ? operation(x[0], W::shuffle_xor(x[0], 16)) : x[0];
    }
    template <int half, class Operation>
    KVPLANE_DEVICE static void across_half(Float (&x)[rows], const Operation& operation) {
        const auto upper = (W::lane() & std::uint32_t(4 * half)) != 0u;
        KVPLANE_UNROLL
        for (int i = 0; i < half; ++i) {
            const Float kept = W::select(upper, x[i + half], x[i]),
                        given = W::select(upper, x[i], x[i + half]);
            x[i] = operation(kept, W::shuffle_xor(given, 4 * half));
        }
        if constexpr (half > 1) across_half<half / 2>(x, operation);
    }

    /// The scores of one group of tokens, of keys whose widths are known at run time.
    KVPLANE_DEVICE static void segment_scores(const QueryRowsView& queries, const std::byte* tile,
                                              const KeyTileView& view, int group, std::byte* memory,
                                              Scores& score) {
        Float worth, base;
        W::sync();  // all lanes are done with the factors before
        fold_segments(queries, tile, view, group, memory, worth, base);
        W::sync();
        if (in_latents) base = base + W::as_float(W::load4(queries.rows, row() * 4u + queries.offset_at));
        Int sums[16][4];
        zero(sums);
        const int first_m = 4 * group / view.groups, end_m = 4 * (group + 1) / view.groups;
        for (int r = 0; r < view.rounds; ++r) {
            const KeyTileView::Round& round = view.round[r];
            const SegmentView& segment = view.segment[round.segment];
            Word words[4], factors[1][4];
            W::load16(memory, row() * view.factor_stride() + (W::lane() & 3u) * 16u + std::uint32_t(64 * r),
                      words);
            KVPLANE_UNROLL
            for (int i = 0; i < 2; ++i) {
                factors[0][2 * i] = W::template permute<0x7531>(words[2 * i], words[2 * i + 1]);
                factors[0][2 * i + 1] =
                    W::template permute<0x6420>(words[2 * i], words[2 * i + 1]) ^ 0x80808080u;
            }
            detail::with_bits<1, 2, 3, 4, 5, 6, 7, 8>(segment.bits, [&](auto bits) {
                add_round<bits, 8>(tile, segment, factors, round.number, first_m, end_m, sums);
            });
        }
        to_scores(sums, worth, base, first_m, end_m, score);
    }

    template <int bits>
    KVPLANE_DEVICE static void coded_sums(const std::byte* tile, const ValueTileView& view,
                                          const Scores& weight, Float factor, State& state) {
        Word factors[4][4];
        Float worth, base;
        KVPLANE_UNROLL
        for (int b = 0; b < blocks; ++b) {
            // Kernels that are made for a width have one grid a token.
            if (any_values ? b % view.run_blocks == 0 : b == 0)
                fold_weights(tile, view.all, any_values ? b / view.run_blocks : 0, bits, weight, factors,
                             worth, base);
            state.base[b] = state.base[b] + factor * base;
            add_block<bits>(tile, view.all, factors, factor * worth, b, state.out[b]);
        }
    }

    /// Weights times steps of one run of channels, as the bytes of A.
    KVPLANE_DEVICE static void fold_weights(const std::byte* tile, const SegmentView& segment, int run,
                                            int bits, const Scores& weight, Word (&factors)[4][4],
                                            Float& worth, Float& base) {
        if (segment.lower_at >= 0)
            fold_weights_by<2, true>(tile, segment, run, bits, weight, factors, worth, base);
        else if (segment.step_bytes == 2)
            fold_weights_by<2, false>(tile, segment, run, bits, weight, factors, worth, base);
        else
            fold_weights_by<1, false>(tile, segment, run, bits, weight, factors, worth, base);
    }
    template <int step_bytes, bool lowers_there>
    KVPLANE_DEVICE static void fold_weights_by(const std::byte* tile, const SegmentView& segment, int run,
                                               int bits, const Scores& weight, Word (&factors)[4][4],
                                               Float& worth, Float& base) {
        const std::byte* const steps = tile + segment.step_at + run * 128 * step_bytes;
        const std::byte* const lowers = tile + segment.lower_at + run * 128 * 2;
        Float f[4 * own][4];
        Float sum(0.0f), low(0.0f), largest(0.0f);
        KVPLANE_UNROLL
        for (int quad = 0; quad < 4 * own; ++quad) {
            const Word token = score_token(quad / own, column(quad % own), value_chunk);
            Float step[4], lower[4];
            load_quad<step_bytes>(steps, token, step);
            if (lowers_there) load_quad<2>(lowers, token, lower);
            KVPLANE_UNROLL
            for (int s = 0; s < 4; ++s) {
                const Float w = weight[quad / own][s][quad % own];
                f[quad][s] = w * step[s];
                sum = sum + f[quad][s];
                // Not of products with weights: a scale of all rows.
                largest = W::maximum(largest, step[s]);
                if (lowers_there) low = low + w * lower[s];
            }
        }
        largest = over_row_max(largest);
        worth = largest * segment.step_scale * (1.0f / unsigned_range);
        const Float inverse = inverse_of(largest, unsigned_range);
        Word total(0u);
        KVPLANE_UNROLL
        for (int quad = 0; quad < 4 * own; ++quad)
            put_quad(quad, f[quad], inverse, factors[quad / own], total);
        // In steps: of schemes that store no lower it is often exactly 0.
        const float middle = middle_of(bits) + (lowers_there ? 0.0f : segment.lower_in_steps);
        base = sum * (middle * segment.step_scale) - of_middles(bits, total, worth);
        if (lowers_there) base = base + low;
    }
    /// Four numbers up to unsigned_range, in the bytes of A where the lane's quad has its place: high and low
    /// parts; the place of a quad that the lane has not gets zeros. Adds the rounded numbers to `total`.
    KVPLANE_DEVICE static void put_quad(int quad, const Float (&f)[4], Float inverse, Word (&a)[4],
                                        Word& total) {
        Word bits[4];
        KVPLANE_UNROLL
        for (int s = 0; s < 4; ++s) {
            bits[s] = W::as_word(W::multiply_add(f[s], inverse, Float(8388608.0f)));
            total = total + bits[s];
        }
        total = total - 4u * unsigned_zero;
        const Word low_pair = W::template permute<0x5140>(bits[0], bits[1]),
                   high_pair = W::template permute<0x5140>(bits[2], bits[3]);
        const Word high = W::template permute<0x7632>(low_pair, high_pair),
                   low = W::template permute<0x5410>(low_pair, high_pair);
        if (paired) {
            const auto even = W::lane() < 16u;
            const Word none(0u);
            a[0] = W::select(even, high, none);
            a[1] = W::select(even, low, none);
            a[2] = W::select(even, none, high);
            a[3] = W::select(even, none, low);
        } else {
            a[2 * (quad % 2)] = high;
            a[2 * (quad % 2) + 1] = low;
        }
    }
    template <int bytes>
    KVPLANE_DEVICE static void load_quad(const std::byte* at, Word token, Float (&to)[4]) {
        if constexpr (bytes == 2) {
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

    /// The first of the four channels of values that a lane loads of a block.
    KVPLANE_DEVICE static Word block_channel(const SegmentView& segment, int block) {
        const Word channel = (W::lane() >> 2) * 4u + std::uint32_t(32 * block);
        if (value_bits > 0 && value_channels % 32 == 0) return channel;
        // A last block may be half there.
        const int channels = value_bits > 0 ? value_channels : segment.channels;
        return W::minimum(channel, Word(std::uint32_t((channels + 15) / 16 * 16 - 4)));
    }

    /// Adds the products of weights and 32 channels of values.
    template <int bits>
    KVPLANE_DEVICE static void add_block(const std::byte* tile, const SegmentView& segment,
                                         const Word (&factors)[4][4], Float worth, int block,
                                         Float (&out)[4][2]) {
        constexpr PlaneSplit split = plane_split(bits);
        constexpr int chunk = value_chunk;
        const Word quarter = W::lane() & 3u;
        const Word channel = block_channel(segment, block);
        Int sums[4][4];
        KVPLANE_UNROLL
        for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = Int(0);
        KVPLANE_UNROLL
        for (int round = 0; round < 32 / chunk; ++round) {
            const Word token = quad_token(round * chunk / 4, quarter, chunk);
            Word words[split.count][chunk / 8][4];
            load_value_planes<bits>(tile, segment, token, channel, words);
            KVPLANE_UNROLL
            for (int part = 0; part < chunk / 8; ++part) KVPLANE_UNROLL
            for (int s = 0; s < 4; ++s) {
                Word b[2];
                code_words<bits, chunk>(words, part, s, token, b);
                W::multiply_unsigned(sums[s], factors[round * (chunk / 8) + part], b);
            }
        }
        KVPLANE_UNROLL
        for (int s = 0; s < 4; ++s) KVPLANE_UNROLL
        for (int j = 0; j < 2; ++j)
            out[s][j] = W::multiply_add(W::to_float(sums[s][j] * 256 + sums[s][2 + j]), worth, out[s][j]);
    }

    // Values of several widths by token. Rows of such a tile are runs of tokens of one width each.

    static constexpr std::uint32_t weight_stride = ValueTileView::weight_stride;

    /// Puts the rows that all tokens stand in into the memory of the warp, a byte each. A lane finds four.
    KVPLANE_DEVICE static void place_tokens(const std::byte* tile, const ValueTileView& view, std::byte* to) {
        // Bit t of a plane: a digit of the run of token t, the upper one first. A lone plane is the lower
        // digit.
        Word planes[2][4], own_digits[2];
        const Word none(0u), word = W::lane() >> 3, first_bit = (W::lane() & 7u) * 4u;
        KVPLANE_UNROLL
        for (int digit = 0; digit < 2; ++digit) {
            const int plane = view.run_planes - 2 + digit;
            KVPLANE_UNROLL
            for (int w = 0; w < 4; ++w) planes[digit][w] = none;
            own_digits[digit] = none;
            if (plane < 0) continue;
            W::load16(tile, Word(std::uint32_t(16 * plane)), planes[digit]);
            own_digits[digit] = W::load4(tile, word * 4u + std::uint32_t(16 * plane)) >> first_bit;
        }
        Word row[ValueTileView::most_runs];
        KVPLANE_UNROLL
        for (int r = 0; r < ValueTileView::most_runs; ++r) {
            row[r] = Word(std::uint32_t(view.run[r].first_row));
            KVPLANE_UNROLL
            for (int w = 0; w < 4; ++w) {
                const Word members = (planes[0][w] ^ (r / 2 == 0 ? 0xFFFFFFFFu : 0u)) &
                                     (planes[1][w] ^ (r % 2 == 0 ? 0xFFFFFFFFu : 0u));
                const Word before =
                    W::select(word > std::uint32_t(w), Word(0xFFFFFFFFu),
                              W::select(word == std::uint32_t(w), (Word(1u) << first_bit) - 1u, none));
                row[r] = row[r] + W::count_bits(members & before);
            }
        }
        Word packed(0u);
        KVPLANE_UNROLL
        for (int t = 0; t < 4; ++t) {
            const Word run =
                (own_digits[0] >> std::uint32_t(t) & 1u) * 2u + (own_digits[1] >> std::uint32_t(t) & 1u);
            KVPLANE_UNROLL
            for (int r = 0; r < ValueTileView::most_runs; ++r) {
                const auto mine = run == std::uint32_t(r);
                packed = packed | W::select(mine, row[r] << std::uint32_t(8 * t), none);
                row[r] = row[r] + W::select(mine, Word(1u), none);
            }
        }
        // Of a tile that is broken, too.
        W::store4(to, W::lane() * 4u, packed & 0x7F7F7F7Fu);
    }

    /// Weights times steps in the order of rows, in the memory of the warp: [row of queries][row of the
    /// tile]; the largest of the lane's row, and what they add beside the products.
    KVPLANE_DEVICE static void fold_runs(const std::byte* tile, const ValueTileView& view, std::byte* memory,
                                         const Scores& weight, Float& largest, Float& base) {
        std::byte* const places = memory + rows * weight_stride;
        W::sync();  // all lanes are done with what was there
        place_tokens(tile, view, places);
        W::sync();
        KVPLANE_UNROLL
        for (int quad = 0; quad < 4 * own; ++quad) {
            const Word place = W::load4(places, score_token(quad / own, column(quad % own), value_chunk));
            KVPLANE_UNROLL
            for (int s = 0; s < 4; ++s)
                W::store4(memory, row() * weight_stride + (place >> std::uint32_t(8 * s) & 0xFFu) * 4u,
                          W::as_word(weight[quad / own][s][quad % own]));
        }
        W::sync();
        Float low[rows], most[rows];
        KVPLANE_UNROLL
        for (int r = 0; r < rows; ++r) low[r] = most[r] = Float(0.0f);
        for (int i = 0; i < view.runs; ++i) {
            const ValueTileView::Run& run = view.run[i];
            const SegmentView& segment = run.segment;
            for (std::int32_t first = 0; first < run.rows; first += 32) {
                // A lane has a row.
                const auto there = W::lane() + std::uint32_t(first) < std::uint32_t(run.rows);
                const Word at = W::select(there, W::lane() + std::uint32_t(first), Word(0u));
                Float step = segment.step_bytes == 2 ? W::low_half(W::load2(tile + segment.step_at, at * 2u))
                                                     : W::low_half(W::load1(tile + segment.step_at, at) << 7);
                step = W::select(there, step * segment.step_scale, Float(0.0f));
                Float offset = step * (middle_of(segment.bits) +
                                       (segment.lower_at >= 0 ? 0.0f : segment.lower_in_steps));
                if (segment.lower_at >= 0)
                    offset =
                        offset + W::select(there, W::low_half(W::load2(tile + segment.lower_at, at * 2u)),
                                           Float(0.0f));
                // Lanes without a row look where nobody writes.
                const Word in_row = W::select(there, at + std::uint32_t(run.first_row), Word(128u)) * 4u;
                KVPLANE_UNROLL
                for (int r = 0; r < rows; ++r) {
                    const Word row_at = in_row + std::uint32_t(r) * weight_stride;
                    const Float w = W::select(there, W::as_float(W::load4(memory, row_at)), Float(0.0f));
                    const Float f = w * step;
                    low[r] = W::multiply_add(w, offset, low[r]);
                    // Steps of narrow runs are large, but their tokens' weights are small.
                    most[r] = W::maximum(most[r], f);
                    W::store4(memory, row_at, W::as_word(f), there);
                }
            }
        }
        base = across_lanes(low, [](Float a, Float b) { return a + b; });
        largest = across_lanes(most, [](Float a, Float b) { return W::maximum(a, b); });
        W::sync();
    }

    KVPLANE_DEVICE static void run_sums(const std::byte* tile, const ValueTileView& view, std::byte* memory,
                                        const Scores& weight, Float factor, State& state) {
        Float largest, base;
        fold_runs(tile, view, memory, weight, largest, base);
        const Float worth = factor * (largest * (1.0f / unsigned_range));
        const Float inverse = inverse_of(largest, unsigned_range);
        // All lanes of a row have the same.
        const Float once = W::select(first_of_row(), factor * base, Float(0.0f));
        // Sums of four blocks at a time stay in registers.
        KVPLANE_UNROLL
        for (int first_block = 0; first_block < blocks; first_block += 4) {
            Int sums[4][4][4];
            KVPLANE_UNROLL
            for (int i = 0; i < 64; ++i) sums[i / 16][i / 4 % 4][i % 4] = Int(0);
            Word middles(0u);  // of rounded factors times the largest codes
            for (int i = 0; i < view.runs; ++i) {
                const ValueTileView::Run& run = view.run[i];
                Word total(0u);
                KVPLANE_KEEP_ROLLED
                for (std::int32_t first = 0; first < run.rows; first += 32) {
                    const Word in_run = (W::lane() & 3u) * 8u + std::uint32_t(first);
                    const auto there = in_run < std::uint32_t(run.rows);
                    const Word begin = W::select(there, in_run, Word(0u));
                    Word factors[4];
                    run_factors(memory, begin + std::uint32_t(run.first_row),
                                W::select(there, inverse, Float(0.0f)), factors, total);
                    detail::with_bits<1, 2, 3, 4, 5, 6, 7, 8>(run.segment.bits, [&](auto bits) {
                        KVPLANE_UNROLL
                        for (int b = 0; b < 4; ++b)
                            if (first_block + b < blocks)
                                add_run<bits>(tile, run, begin, first_block + b, factors, sums[b]);
                    });
                }
                middles = middles + total * ((1u << run.segment.bits) - 1u);
            }
            const Float added = once - W::to_float(W::to_int(middles)) * (0.5f * worth);
            KVPLANE_UNROLL
            for (int b = 0; b < 4; ++b) {
                if (first_block + b >= blocks) continue;
                state.base[first_block + b] = state.base[first_block + b] + added;
                KVPLANE_UNROLL
                for (int s = 0; s < 4; ++s) KVPLANE_UNROLL
                for (int j = 0; j < 2; ++j) {
                    Float& out = state.out[first_block + b][s][j];
                    out = W::multiply_add(W::to_float(sums[b][s][j] * 256 + sums[b][s][2 + j]), worth, out);
                }
            }
        }
    }
    /// The bytes of A of the eight rows of the tile from `begin` on.
    KVPLANE_DEVICE static void run_factors(const std::byte* memory, Word begin, Float inverse, Word (&a)[4],
                                           Word& total) {
        a[0] = a[1] = a[2] = a[3] = Word(0u);
        KVPLANE_UNROLL
        for (int quad = 0; quad < own; ++quad) {
            // Of paired rows a lane has one of the two quads.
            const Word at = begin + (paired ? (W::lane() >> 4) * 4u : Word(std::uint32_t(4 * quad)));
            Float f[4];
            load_floats<W>(memory, row() * weight_stride + at * 4u, f);
            put_quad(quad, f, inverse, a, total);
        }
    }
    /// Adds the products of weights and 32 channels of values of one round of a run.
    template <int bits>
    KVPLANE_DEVICE static void add_run(const std::byte* tile, const ValueTileView::Run& run, Word begin,
                                       int block, const Word (&factors)[4], Int (&sums)[4][4]) {
        constexpr PlaneSplit split = plane_split(bits);
        Word words[split.count][1][4];
        load_run_planes<bits>(tile, run, begin, block_channel(run.segment, block), words);
        KVPLANE_UNROLL
        for (int s = 0; s < 4; ++s) {
            Word b[2];
            code_words<bits, 8>(words, 0, s, begin, b);
            W::multiply_unsigned(sums[s], factors, b);
        }
    }
    template <int bits, int plane = 0, class Words>
    KVPLANE_DEVICE static void load_run_planes(const std::byte* tile, const ValueTileView::Run& run,
                                               Word begin, Word channel, Words& words) {
        constexpr std::uint32_t depth = 32 / plane_split(bits)[plane];
        W::load16(tile + run.segment.plane_at[plane],
                  value_word(channel, begin / depth, std::uint32_t(run.rows) / depth), words[plane][0]);
        if constexpr (plane + 1 < plane_split(bits).count)
            load_run_planes<bits, plane + 1>(tile, run, begin, channel, words);
    }

    // Tiles of fp16 numbers.

    /// The first planes of fp16 numbers, of 8 numbers along the product: two words of the plane of high
    /// bytes, one each of the two others.
    template <int planes>
    KVPLANE_DEVICE static void load_halves(const std::byte* tile, const SegmentView& segment, Word at[3],
                                           std::uint32_t next, Word (&words)[4][4]) {
        W::load16(tile + segment.plane_at[0], at[0], words[0]);
        W::load16(tile + segment.plane_at[0], at[0] + next, words[1]);
        if constexpr (planes > 1) W::load16(tile + segment.plane_at[1], at[1], words[2]);
        if constexpr (planes > 2) W::load16(tile + segment.plane_at[2], at[2], words[3]);
    }
    /// Eight fp16 numbers in order, two a word. Bits that are not read are filled with their middle, as
    /// TileCoder::decode does.
    template <int planes>
    KVPLANE_DEVICE static void join_halves(const Word (&words)[4][4], int s, Word (&halves)[4]) {
        KVPLANE_UNROLL
        for (int half = 0; half < 2; ++half) {
            Word low(0x80808080u);
            if constexpr (planes > 1) low = (words[2][s] >> (4 * half) & 0x0F0F0F0Fu) << 4;
            if constexpr (planes == 2) low = low | 0x08080808u;
            if constexpr (planes > 2) low = low | (words[3][s] >> (4 * half) & 0x0F0F0F0Fu);
            halves[2 * half] = W::template permute<0x5140>(low, words[half][s]);
            halves[2 * half + 1] = W::template permute<0x7362>(low, words[half][s]);
        }
    }
    /// Four floats in the halves of A: rounded to fp16, and what that left.
    KVPLANE_DEVICE static void two_parts(const Float (&x)[4], Word (&a)[4]) {
        KVPLANE_UNROLL
        for (int i = 0; i < 2; ++i) {
            a[2 * i] = W::pack_halves(x[2 * i], x[2 * i + 1]);
            a[2 * i + 1] =
                W::pack_halves(x[2 * i] - W::low_half(a[2 * i]), x[2 * i + 1] - W::high_half(a[2 * i]));
        }
    }

    KVPLANE_DEVICE static void half_scores(const QueryRowsView& queries, const std::byte* tile,
                                           const SegmentView& segment, Scores& score) {
        if (segment.planes == 1)
            half_scores_of<1>(queries, tile, segment, score);
        else if (segment.planes == 2)
            half_scores_of<2>(queries, tile, segment, score);
        else
            half_scores_of<3>(queries, tile, segment, score);
    }
    template <int planes>
    KVPLANE_DEVICE static void half_scores_of(const QueryRowsView& queries, const std::byte* tile,
                                              const SegmentView& segment, Scores& score) {
        const Word g = W::lane() >> 2, quarter = W::lane() & 3u;
        const auto channels = std::uint32_t(channels_of(segment));
        const std::uint32_t units = (channels + 7u) / 8u, high_units = (channels + 3u) / 4u;
        const int octets = segmented ? octets_of(segment.channels, 8) : octets_of(key_channels, 8);
        // Queries become fp16 numbers, which are largest at 65504: scaled to at most 256 by row.
        Float largest(0.0f);
        Float sums[16][4];
        KVPLANE_UNROLL
        for (int i = 0; i < 64; ++i) sums[i / 4][i % 4] = Float(0.0f);
        KVPLANE_UNROLL
        for (int o = 0; o < octets; ++o) {
            Float query[8];
            load_floats<W>(
                queries.rows,
                g * queries.stride + W::minimum(octet_channel(o, quarter, 8), Word(channels - 8u)) * 4u,
                query);
            KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) largest = W::maximum(largest, W::absolute(query[i]));
        }
        largest = W::maximum(over_quarters_max<W>(largest), Float(1e-30f));
        const Float scale = 256.0f / largest;
        KVPLANE_UNROLL
        for (int o = 0; o < octets; ++o) {
            const Word channel = octet_channel(o, quarter, 8);
            const auto valid = channel < channels;
            const Word begin = W::minimum(channel, Word(channels - 8u));
            Float query[8], first[4], second[4];
            load_floats<W>(queries.rows, g * queries.stride + begin * 4u, query);
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
                load_halves<planes>(tile, segment, at, 64u, words);
                KVPLANE_UNROLL
                for (int s = 0; s < 4; ++s) {
                    Word halves[4];
                    join_halves<planes>(words, s, halves);
                    W::multiply_halves(sums[4 * m + s], a[0], halves[0], halves[1]);
                    W::multiply_halves(sums[4 * m + s], a[1], halves[2], halves[3]);
                }
            }
        }
        const Float worth = largest * (1.0f / 256.0f);
        KVPLANE_UNROLL
        for (int i = 0; i < 16; ++i) KVPLANE_UNROLL
        for (int j = 0; j < own; ++j)
            score[i / 4][i % 4][j] =
                (of_column(j, sums[i][0], sums[i][1]) + of_column(j, sums[i][2], sums[i][3])) * worth;
    }

    KVPLANE_DEVICE static void half_sums(const std::byte* tile, const SegmentView& segment,
                                         const Scores& weight, Float factor, State& state) {
        if (segment.planes == 1)
            half_sums_of<1>(tile, segment, weight, factor, state);
        else if (segment.planes == 2)
            half_sums_of<2>(tile, segment, weight, factor, state);
        else
            half_sums_of<3>(tile, segment, weight, factor, state);
    }
    template <int planes>
    KVPLANE_DEVICE static void half_sums_of(const std::byte* tile, const SegmentView& segment,
                                            const Scores& weight, Float factor, State& state) {
        const Word quarter = W::lane() & 3u;
        Word a[8][4];
        KVPLANE_UNROLL
        for (int quad = 0; quad < 8; ++quad) {
            const int m = quad / 2, j = paired ? 0 : quad % 2;
            Float four[4] = {weight[m][0][j], weight[m][1][j], weight[m][2][j], weight[m][3][j]};
            if (paired) {
                const auto there = (W::lane() >> 4) == std::uint32_t(quad % 2);
                KVPLANE_UNROLL
                for (Float& x : four) x = W::select(there, x, Float(0.0f));
            }
            two_parts(four, a[quad]);
        }
        KVPLANE_UNROLL
        for (int b = 0; b < blocks; ++b) {
            const Word channel = block_channel(segment, b);
            Float sums[4][4];
            KVPLANE_UNROLL
            for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = Float(0.0f);
            KVPLANE_UNROLL
            for (int m = 0; m < 4; ++m) {
                const Word token = quad_token(2 * m, quarter, 8);
                Word at[3] = {value_word(channel, token >> 2, 32u), value_word(channel, token >> 3, 16u),
                              value_word(channel, token >> 3, 16u)};
                Word words[4][4];
                load_halves<planes>(tile, segment, at, 64u, words);
                KVPLANE_UNROLL
                for (int s = 0; s < 4; ++s) {
                    Word halves[4];
                    join_halves<planes>(words, s, halves);
                    W::multiply_halves(sums[s], a[2 * m], halves[0], halves[1]);
                    W::multiply_halves(sums[s], a[2 * m + 1], halves[2], halves[3]);
                }
            }
            KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i)
                state.out[b][i / 2][i % 2] = W::multiply_add(sums[i / 2][i % 2] + sums[i / 2][2 + i % 2],
                                                             factor, state.out[b][i / 2][i % 2]);
        }
    }
};

}  // namespace kvplane::cuda
