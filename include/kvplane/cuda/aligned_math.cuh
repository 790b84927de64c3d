// kvplane/cuda/aligned_math.cuh: what of a tile is read, decided from the scores of its first planes of
// keys.
//
// A warp knows of the tiles that it has seen itself, and of what all warps see first: some tokens outside
// tiles or, where there are none, the first tile and the last. Every rule goes by these alone, so that
// results do not depend on who is first.
//
//   tolerance  Let w' be the weights that were used, W' their sum, and eps_t what the score of token t may
//              be off by, which is 0 where all planes of keys were read. By T13, with the sum over weights in
//              place of the largest eps, which a tile without weight would set for all,
//
//                |o - o'|_2 <= (2 A / (W' - A) + V / W') R,   A = sum_t w'_t (e^eps_t - 1),
//
//              where R is the largest norm of a value, and V = sum_t w'_t r_t, r_t being the part of R that
//              unread planes of token t are off by: for sum_t |p_t - p'_t|, p and p' being the weights over
//              their sums, is at most 2 A / (W' - A). Where 2 A + V is at most T / (1 + T / 2) of W', the
//              whole is at most T R. A warp keeps that to its own part of W', so that it holds for the sum.
//   exponents  AlignedKV's rule (read/exponents.hpp) for a tile's largest weight, which has to have so many
//              octaves below the best one that was seen. A tile is read by its first planes before, and no
//              channel of it by more planes than others: of keys the rule by channels would read some
//              channel of every tile whole, so they go by the weights, as values do.
//   budget     The same with thresholds that follow what was read so far: up by two octaves for every tile
//              that could be read whole and was not, and down for every one that was read ahead of the
//              budget. What a warp's tiles take never exceeds their budget.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/aligned_rule.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/tile_math.cuh"
#include "kvplane/cuda/tile_views.hpp"

namespace kvplane::cuda {

/// What a warp knows of what it has read so far. Weights are relative to `reference`, the largest score
/// seen.
template <class W>
struct AlignedTally {
    typename W::Float reference;
    typename W::Float known;    ///< the warp's part of the sum of weights, as far as it is known
    typename W::Float error;    ///< 2 A + V
    std::int32_t bits_left[2];  ///< of the budget: of keys and values, or of both in the first
};

/// TileMath that reads some planes of tiles.
template <class W, int key_bits, int key_channels, int value_bits, int value_channels, bool paired = false>
struct AlignedMath : TileMath<W, key_bits, key_channels, value_bits, value_channels, paired> {
    using Base = TileMath<W, key_bits, key_channels, value_bits, value_channels, paired>;
    using typename Base::Float;
    using typename Base::Int;
    using typename Base::Scores;
    using typename Base::State;
    using typename Base::Word;
    using Tally = AlignedTally<W>;

    /// Widths of codes whose prefixes have kernels of their own: of others views alone say what is read.
    static constexpr bool coded_prefix(int bits) {
        return bits > 0 && bits <= 8 && plane_split(bits).count > 1;
    }

    /// The scores of a tile by what is read of keys before anything is known of it.
    KVPLANE_DEVICE static void score_first(const QueryRowsView& queries, const std::byte* tile,
                                           const PlanePrefixes& views, int planes, std::byte* memory,
                                           Scores& score) {
        if constexpr (key_bits == 16)
            Base::template half_scores_of<1>(queries, tile, views.keys[0].segment[0], score);
        else
            AlignedMath::score(queries, tile, views.keys[planes - 1], planes == views.key_planes, memory,
                               score);
    }
    /// The scores of a tile by the planes of keys that `view` tells of; all: whether those are all there
    /// are.
    KVPLANE_DEVICE static void score(const QueryRowsView& queries, const std::byte* tile,
                                     const KeyTileView& view, bool all, std::byte* memory, Scores& score) {
        if constexpr (coded_prefix(key_bits)) {
            if (!all)
                return Base::template score<plane_split(key_bits)[0]>(queries, tile, view, memory, score);
        }
        Base::score(queries, tile, view, memory, score);
    }
    KVPLANE_DEVICE static void add_values(const std::byte* tile, const PlanePrefixes& views, int planes,
                                          const Scores& weight, Float factor, State& state) {
        const ValueTileView& view = views.values[planes - 1];
        if constexpr (coded_prefix(value_bits)) {
            if (planes < plane_split(value_bits).count)
                return Base::template add_values<plane_split(value_bits)[0]>(tile, view, nullptr, weight,
                                                                             factor, state);
        }
        Base::add_values(tile, view, nullptr, weight, factor, state);
    }

    /// The sum over channels of |query| times the largest step, of the lane's row. A step of fp16 is the
    /// last place of a channel's largest magnitude. Of keys in one segment.
    KVPLANE_DEVICE static Float key_reach(const QueryRowsView& queries, const std::byte* tile,
                                          const KeyTileView& view) {
        const SegmentView& segment = view.segment[0];
        const Word quarter = W::lane() & 3u, row_at = (W::lane() >> 2) * queries.stride;
        const int channels = key_bits == 0 ? segment.channels : key_channels;
        Float sum(0.0f);
        KVPLANE_UNROLL
        for (int c = 0; c < channels; c += 32) {
            const Word channel = quarter * 8u + std::uint32_t(c);
            const auto there = channel < std::uint32_t(channels);
            const Word at = W::select(there, channel, Word(0u));
            Float part(0.0f), step[8];
            if (segment.bits == 16) {
                Word fields[2];
                W::load8(tile + segment.step_at, at, fields);
                KVPLANE_UNROLL
                for (int i = 0; i < 8; ++i) {
                    const Word field = fields[i / 4] >> (8 * (i % 4)) & 0xFFu;
                    const Word exponent = W::select(field == 0u, Word(1u), field);
                    step[i] = W::as_float((exponent + (127u - 25u)) << 23);
                }
            } else {
                KVPLANE_UNROLL
                for (int i = 0; i < 8; ++i) step[i] = Float(0.0f);
                for (int group = 0; group < view.groups; ++group) {
                    Word words[4];
                    W::load16(tile + segment.step_at + group * channels * 2, at * 2u, words);
                    KVPLANE_UNROLL
                    for (int i = 0; i < 8; ++i)
                        step[i] = W::maximum(step[i], W::absolute(i % 2 == 0 ? W::low_half(words[i / 2])
                                                                             : W::high_half(words[i / 2])));
                }
            }
            KVPLANE_UNROLL
            for (int half = 0; half < 2; ++half) {
                Word words[4];
                W::load16(queries.rows, row_at + at * 4u + std::uint32_t(16 * half), words);
                KVPLANE_UNROLL
                for (int i = 0; i < 4; ++i)
                    part = part + W::absolute(W::as_float(words[i])) * step[4 * half + i];
            }
            sum = sum + W::select(there, part, Float(0.0f));
        }
        return over_quarters<W>(sum);
    }

    /// A warp that is to see `tiles` tiles. largest, sum: of tokens outside tiles that all warps have seen,
    /// `sum` being this warp's part of theirs, relative to `largest`.
    KVPLANE_DEVICE static void start(const AlignedRule& rule, Float largest, Float sum, std::int32_t tiles,
                                     Tally& tally) {
        tally = {largest, sum, Float(0.0f), {tiles * rule.allowed[0], tiles * rule.allowed[1]}};
    }

    /// The row's part of `sum` of start() that a tile tells which all warps have scored by its first planes:
    /// sum as for choose().
    KVPLANE_DEVICE static Float seed_sum(Float largest, Float sum, Float reach) {
        return W::select(largest > Base::masked, sum * W::exp2(Float(0.0f) - reach), Float(0.0f));
    }

    /// Decides what is read of a tile. largest, sum: of the scores of first planes of the lane's row, and of
    /// the row's weights relative to it; reach: what these scores may be off by, in octaves; counts: whether
    /// the row is one; seed: whether the tile is part of what start() was told; tiles_left: that the warp
    /// sees behind this one.
    KVPLANE_DEVICE static TilePlanes choose(const AlignedRule& rule, Float largest, Float sum, Float reach,
                                            typename W::Flag counts, bool seed, std::int32_t tiles_left,
                                            Tally& tally) {
        if (rule.kind == AlignedRule::tolerance)
            return within_tolerance(rule, largest, sum, reach, counts, seed, tally);
        const Float drop = tally.reference - largest;
        tally.reference = W::maximum(tally.reference, largest);
        if (rule.kind == AlignedRule::exponents) {
            const int planes = wanted(rule, drop, 0.0f, counts);
            return {rule.keys_by[planes], rule.values_by[planes]};
        }
        return within_budget(rule, drop, counts, tiles_left, tally);
    }
    /// Of a tile of which all planes of keys were read after all: its weights. seed: as for choose().
    KVPLANE_DEVICE static void learn(Float largest, Float sum, bool seed, Tally& tally) {
        const Float most = W::maximum(tally.reference, largest), shrink = W::exp2(tally.reference - most);
        tally.known = tally.known * shrink;
        if (!seed)
            tally.known =
                tally.known + W::select(largest > Base::masked, sum * W::exp2(largest - most), Float(0.0f));
        tally.error = tally.error * shrink;
        tally.reference = most;
    }
    /// 2 A + V in the units of the warp's sum of weights.
    KVPLANE_DEVICE static Float error(const Tally& tally, const State& state) {
        return W::select(tally.error > 0.0f, tally.error * W::exp2(tally.reference - state.softmax.largest),
                         Float(0.0f));
    }

  private:
    /// Whether some row that counts has more than what it may have.
    KVPLANE_DEVICE static bool exceeds(Float has, Float may, typename W::Flag counts) {
        return W::any(W::both(counts, may < has));
    }
    KVPLANE_DEVICE static TilePlanes within_tolerance(const AlignedRule& rule, Float largest, Float sum,
                                                      Float reach, typename W::Flag counts, bool seed,
                                                      Tally& tally) {
        const Float most = W::maximum(tally.reference, largest), shrink = W::exp2(tally.reference - most);
        const Float mass = W::select(largest > Base::masked, sum * W::exp2(largest - most), Float(0.0f));
        // Beyond 60 octaves nothing would fit in.
        const Float grown = W::exp2(W::select(reach < 60.0f, reach, Float(60.0f)));
        const Float of_keys = (grown - 1.0f) * 2.0f;
        const Float error = tally.error * shrink, before = tally.known * shrink,
                    known = seed ? before : before + mass;
        for (int planes = 0; planes <= rule.value_planes; ++planes) {
            const Float with = error + mass * (of_keys + rule.share[planes]);
            if (exceeds(with, known * rule.allowance, counts)) continue;
            tally.reference = most;
            tally.known = known;
            tally.error = with;
            return {rule.first_planes, planes};
        }
        // Of all planes of keys a weight is at most `grown` times what it is of the first, and it counts as
        // known when it is.
        int planes = rule.value_planes;
        for (int fewer = rule.value_planes - 1; fewer >= 1; --fewer)
            if (!exceeds(error + mass * grown * rule.share[fewer], before * rule.allowance, counts))
                planes = fewer;
        // Relative to what is certain of the largest score.
        const Float least = W::maximum(tally.reference, largest - reach),
                    to_least = W::exp2(tally.reference - least);
        tally.known = tally.known * to_least;
        tally.error = tally.error * to_least;
        if (planes < rule.value_planes)
            tally.error = tally.error + W::select(largest > Base::masked,
                                                  sum * W::exp2(largest - least) * grown * rule.share[planes],
                                                  Float(0.0f));
        tally.reference = least;
        return {rule.key_planes, planes};
    }

    /// How many planes, of 0 to 3, the row wants that wants most, where thresholds are raised.
    KVPLANE_DEVICE static int wanted(const AlignedRule& rule, Float drop, float raised,
                                     typename W::Flag counts) {
        for (int planes = 3; planes > 0; --planes)
            if (W::any(W::both(counts, drop <= rule.below[planes - 1] + raised))) return planes;
        return 0;
    }
    KVPLANE_DEVICE static TilePlanes within_budget(const AlignedRule& rule, Float drop,
                                                   typename W::Flag counts, std::int32_t tiles_left,
                                                   Tally& tally) {
        int planes[2] = {0, 0};
        const int pools = rule.shared ? 1 : 2;
        for (int pool = 0; pool < pools; ++pool) {
            const std::int32_t least = bits_of(rule, pool, 0), most = bits_of(rule, pool, 3);
            // What the tiles to come have to have, and how far what was read lags behind the budget.
            const std::int32_t there = tally.bits_left[pool] - tiles_left * least;
            const std::int32_t behind = tally.bits_left[pool] - (tiles_left + 1) * rule.allowed[pool];
            const float raised =
                most > least ? 2.0f * static_cast<float>(behind) / static_cast<float>(most - least) : 0.0f;
            int some = wanted(rule, drop, raised, counts);
            while (some > 0 && bits_of(rule, pool, some) > there) --some;
            tally.bits_left[pool] -= bits_of(rule, pool, some);
            planes[pool] = some;
        }
        return {rule.keys_by[planes[0]], rule.values_by[planes[rule.shared ? 0 : 1]]};
    }
    /// Bits of a tile, by channel, that a pool gives for what the rule calls so many planes.
    KVPLANE_DEVICE static std::int32_t bits_of(const AlignedRule& rule, int pool, int planes) {
        if (rule.shared) return rule.key_bits[planes] + rule.value_bits[planes];
        return pool == 0 ? rule.key_bits[planes] : rule.value_bits[planes];
    }
};

}  // namespace kvplane::cuda
