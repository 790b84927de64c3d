// kvplane/attention/factors.hpp: queries and softmax weights as the small integers that meet codes.
//
// A factor is x step: an element of the query times the step of its channel, or a softmax weight times the
// step of its token. The factors of a row are rounded at one scale for a tile and segment:
//
//   narrow   to int8, for codes of up to 4 bits, and for reads of little more than 4 bits
//   wide     to int16, split in two int8 halves (wide_factors), for codes of more bits. Both halves meet the
//            first plane. The high half alone meets the planes below it, whose codes weigh a sixteenth or less.
//
// A factor is off by at most its row's largest / 254; a wide one by largest / 65000 on the first plane and
// by a sixteenth of largest / 254 on the others (T14). Where the largest is 1e-30 or less, all count as 0.
// Queries whose products with steps may be no floats do not come here (ScoreRange in cache/queries.hpp).
// What rounding does to the middle of all codes, which every token has in common, is added back, so that a
// factor errs by a code's distance from the middle only. Sums of rounded factors stay below 2^24 for depths
// up to 512, and beyond that are off by less than the rounding of the sums that they correct.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kvplane/attention/lanes.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane::detail {

/// Channels or tokens that the factors of a row are padded to: the depth of the deepest unit.
constexpr Index padded_depth(Index count) noexcept {
    return (count + 31) / 32 * 32;
}

/// The middle of all codes of a grid, in steps above its lower end; above 0 for schemes that store none.
inline float centre_of(Scheme scheme, int bits) noexcept {
    const float middle = 0.5f * power_of_two(bits);
    return has_lower(scheme) ? middle : middle + lower_in_steps(scheme, bits);
}

/// The factors of some rows: what goes in, and where what comes out goes.
struct Factors {
    const float* x;  ///< [row][stride], of which `count` are used
    Index stride, count;
    const Eigen::half *step, *lower;  ///< [count]; lower is nullptr where grids have none
    float centre;                     ///< the middle of all codes, in steps above lower, or above 0
    float middle, middle_below;       ///< the middle code, of all planes and of those below the first
    Index depth;                      ///< `count` in whole units; factors beyond count are 0
    float* folded;                    ///< [row][depth] x step, before rounding
    /// [depth] what the unread bits of a code count as, or nullptr where all are read. The low halves of
    /// factors count it only for the bits that they meet.
    const float *unread, *unread_low;
    /// Blocks of 16 of which any plane is read, or nullptr: all. The factors of other blocks meet nothing and
    /// are not made: what rounding does to them would be taken back with what is unread.
    const std::uint16_t* active;
    Index active_count;
    std::int8_t *high, *low;  ///< [row][factor_stride]; low is nullptr for narrow factors
    Index factor_stride;
    float *worth, *base;  ///< [row] what 1 in a rounded factor stands for; what to add to every sum

    /// The same of the rows from `first` on.
    Factors from_row(Index first) const noexcept {
        Factors some = *this;
        some.x += first * stride;
        some.high += first * factor_stride;
        if (low) some.low += first * factor_stride;
        some.worth += first;
        some.base += first;
        return some;
    }
};

/// The largest magnitude of a rounded factor.
constexpr float largest_factor(const Factors& f) noexcept {
    return f.low ? 32512.0f : 127.0f;
}
/// Products up to that count as 0: their scale would not be finite.
inline constexpr float no_factor = 1e-30f;
/// What the products of a row are multiplied by before they are rounded; `top` is the largest magnitude of them.
KVPLANE_INLINE float scale_of(const Factors& f, float top) noexcept {
    return top > no_factor ? largest_factor(f) / top : 0.0f;
}
/// What some rows' factors stand for, corrected for what rounding does to the middle of all codes.
///   top            the largest magnitudes of the products
///   sum            x times the middles of the grids
///   whole, high    the sums of the rounded factors and of their high halves
///   unread         their sum times what is unread
KVPLANE_INLINE void finish_rows(const Factors& f, int rows, const float* top, const float* sum,
                                const float* whole, const float* high, const float* unread) {
    for (int r = 0; r < rows; ++r) {
        const float worth = top[r] > no_factor ? top[r] / largest_factor(f) : 0.0f;
        f.worth[r] = worth;
        f.base[r] = sum[r] + worth * (unread[r] - f.middle * whole[r]);
        if (f.low) f.base[r] += f.middle_below * worth * (whole[r] - 256.0f * high[r]);
    }
}

template <int Lanes, int rows>
KVPLANE_INLINE void fold_vector(const Factors& f, const float* x, Index stride, const Eigen::half* step,
                                const Eigen::half* lower, float* folded, Floats<Lanes>* largest,
                                Floats<Lanes>* base) {
    Floats<Lanes> s, l{}, value;
    widen<Lanes>(s, step);
    if (lower) widen<Lanes>(l, lower);
    const Floats<Lanes> centre = l + s * f.centre;
    for (int r = 0; r < rows; ++r) {
        load(value, x + r * stride);
        base[r] += value * centre;
        const Floats<Lanes> product = value * s;
        store(folded + r * f.depth, product);
        const auto magnitude = (Floats<Lanes>)((Ints<Lanes>)product & 0x7FFFFFFF);
        largest[r] = largest[r] < magnitude ? magnitude : largest[r];
    }
}

/// folded = x step; top[r] = the largest magnitude of a row; sum[r] = x times the middles of the grids.
template <int Lanes, int rows>
KVPLANE_INLINE void fold_rows(const Factors& f, float* top, float* sum) {
    Floats<Lanes> largest[4]{}, base[4]{};
    Index i = 0;
    for (; i + Lanes <= f.count; i += Lanes)
        fold_vector<Lanes, rows>(f, f.x + i, f.stride, f.step + i, f.lower ? f.lower + i : nullptr,
                                 f.folded + i, largest, base);
    if (i < f.count) {
        float rest_x[rows * Lanes] = {};
        std::uint16_t rest_step[Lanes] = {}, rest_lower[Lanes] = {};
        const auto rest = static_cast<std::size_t>(f.count - i);
        for (int r = 0; r < rows; ++r)
            std::memcpy(rest_x + r * Lanes, f.x + r * f.stride + i, rest * sizeof(float));
        std::memcpy(rest_step, f.step + i, rest * sizeof(Eigen::half));
        if (f.lower) std::memcpy(rest_lower, f.lower + i, rest * sizeof(Eigen::half));
        fold_vector<Lanes, rows>(f, rest_x, Lanes, reinterpret_cast<const Eigen::half*>(rest_step),
                                 f.lower ? reinterpret_cast<const Eigen::half*>(rest_lower) : nullptr,
                                 f.folded + i, largest, base);
        i += Lanes;
    }
    for (int r = 0; r < rows; ++r) std::fill(f.folded + r * f.depth + i, f.folded + (r + 1) * f.depth, 0.0f);
    reduce_rows<Lanes>(largest, top, larger);
    reduce_rows<Lanes>(base, sum, plus);
}

/// The sums of one row's rounded factors, lane by lane: all, their high halves, and times what is unread.
template <int Lanes>
struct RoundedSums {
    Floats<Lanes> whole{}, high{}, unread{};
};

/// Rounds the folded factors of row r at `scale`.
template <int Lanes>
KVPLANE_INLINE void round_row(const Factors& f, int r, float scale, RoundedSums<Lanes>& sums) {
    // 1.5 2^23: adding it leaves the rounded integer in the low bits.
    constexpr float magic = 12582912.0f;
    constexpr std::uint32_t magic_bits = 0x4B400000;
    const Index active = f.active ? f.active_count : f.depth / unit_lanes;
    const auto vectors = static_cast<std::uint32_t>(active * (unit_lanes / Lanes));
    const float* const from = f.folded + r * f.depth;
    std::int8_t* const high = f.high + r * f.factor_stride;
    std::int8_t* const low = f.low ? f.low + r * f.factor_stride : nullptr;
    Words<Lanes> all{}, all_high{};
    const auto round = [&](Index at) KVPLANE_BODY {
        Floats<Lanes> x;
        load(x, from + at);
        const auto bits = (Words<Lanes>)(x * scale + magic);
        all += bits;
        store_low_bytes<Lanes>(reinterpret_cast<std::uint8_t*>((low ? low : high) + at), (Ints<Lanes>)bits);
        Floats<Lanes> unread;
        if (f.unread && !low) {
            load(unread, f.unread + at);
            sums.unread += (x * scale + magic - magic) * unread;
        }
        if (!low) return;
        // The low byte counts as signed, so the high half rounds.
        const Words<Lanes> upper = (bits + 128) >> 8;
        if (f.unread) {
            const Floats<Lanes> of_high =
                __builtin_convertvector((Ints<Lanes>)(upper - (magic_bits >> 8)), Floats<Lanes>) * 256.0f;
            load(unread, f.unread + at);
            sums.unread += of_high * unread;
            load(unread, f.unread_low + at);
            sums.unread += (x * scale + magic - magic - of_high) * unread;
        }
        all_high += upper;
        store_low_bytes<Lanes>(reinterpret_cast<std::uint8_t*>(high + at), (Ints<Lanes>)upper);
    };
    for (Index b = 0; b < active; ++b) {
        const Index at = unit_lanes * (f.active ? f.active[b] : b);
        for (Index i = 0; i < unit_lanes; i += Lanes) round(at + i);
    }
    sums.whole = __builtin_convertvector((Ints<Lanes>)(all - vectors * magic_bits), Floats<Lanes>);
    if (low)
        sums.high =
            __builtin_convertvector((Ints<Lanes>)(all_high - vectors * (magic_bits >> 8)), Floats<Lanes>);
}

/// Folds, rounds, and corrects for what rounding does to the middle of all codes.
template <int Lanes, int rows>
KVPLANE_INLINE void factor_rows(const Factors& f) {
    float top[4], sum[4], whole[4], high_sum[4] = {}, unread_sum[4] = {};
    fold_rows<Lanes, rows>(f, top, sum);
    Floats<Lanes> wholes[4]{}, highs[4]{}, unreads[4]{};
    for (int r = 0; r < rows; ++r) {
        RoundedSums<Lanes> sums;
        round_row<Lanes>(f, r, scale_of(f, top[r]), sums);
        wholes[r] = sums.whole;
        highs[r] = sums.high;
        unreads[r] = sums.unread;
    }
    reduce_rows<Lanes>(wholes, whole, plus);
    if (f.low) reduce_rows<Lanes>(highs, high_sum, plus);
    if (f.unread) reduce_rows<Lanes>(unreads, unread_sum, plus);
    finish_rows(f, rows, top, sum, whole, high_sum, unread_sum);
}

/// to[r][c] += the sum over t of x[r][t] (lower_t + step_t centre), for `channels` channels.
template <int Lanes, int rows>
KVPLANE_INLINE void add_middles(const float* x, const Eigen::half* step, const Eigen::half* lower,
                                float centre, Index channels, float* to, Index stride) {
    Floats<Lanes> sums[4]{}, middle, low, value;
    for (Index t = 0; t < tile_tokens; t += Lanes) {
        widen<Lanes>(middle, step + t);
        middle *= centre;
        if (lower) {
            widen<Lanes>(low, lower + t);
            middle += low;
        }
        for (int r = 0; r < rows; ++r) {
            load(value, x + r * tile_tokens + t);
            sums[r] += value * middle;
        }
    }
    float sum[4];
    reduce_rows<Lanes>(sums, sum, plus);
    for (int r = 0; r < rows; ++r)
        for (Index c = 0; c < channels; c += Lanes) {
            load(value, to + r * stride + c);
            store(to + r * stride + c, value + sum[r]);
        }
}

/// to[i] += scale sums[i] + base (or = that, if fresh), block by block of 16, where sums are high 256 + low.
template <int Lanes, bool fresh>
KVPLANE_INLINE void add_sums(const std::int32_t* high, const std::int32_t* low, Index block_stride,
                             Index blocks, float scale, float base, float* to) {
    const float high_scale = low ? 256.0f * scale : scale;
    for (Index b = 0; b < blocks; ++b)
        for (Index i = 0; i < unit_lanes; i += Lanes) {
            Ints<Lanes> h, l;
            Floats<Lanes> x;
            load(h, high + b * block_stride + i);
            Floats<Lanes> sum = __builtin_convertvector(h, Floats<Lanes>) * high_scale + base;
            if (low) {
                load(l, low + b * block_stride + i);
                sum += __builtin_convertvector(l, Floats<Lanes>) * scale;
            }
            if (!fresh) {
                load(x, to + b * unit_lanes + i);
                sum += x;
            }
            store(to + b * unit_lanes + i, sum);
        }
}

}  // namespace kvplane::detail
