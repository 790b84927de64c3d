// kvplane/quantize/shaped_kernels.hpp: the loops of the shaped encoding, one source for every instruction
// set.
//
// Channels stand at places, the order in which they are coded. Everything that decides a code is an integer:
//
//   positions  int32, in cells, with 21 - bits fractional bits, the last of them 1: the middle of what is cut
//              off. So a cell is exactly that of Grid::encode, and errors have no common sign.
//   errors     int16, decoded minus true in steps, with 15 - bits fractional bits. Two places share a 32-bit
//              word, for the instruction that adds two products of 16 bits.
//   weights    int16, with fractional bits that each row chooses, so that the magnitudes of a row sum to less
//              than 2^15. A sum of products therefore stays below 2^30, whatever the errors are.
//
// From the second pass of coordinate descent on hardly a code changes. So the first one keeps its sums, and
// whichever code changes alters those of the other places: what an error was goes out, what it is comes in.
//
// Integer sums are exact, so their order does not matter. What goes before is floating-point arithmetic in
// which no inexact product feeds a sum: the factorization multiplies numbers of 24 bits in double.
// Contraction to fused multiply-add and the number of lanes therefore cannot change a bit.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/rule.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/simd/transpose.hpp"
#include "kvplane/simd/vector.hpp"

namespace kvplane::detail::shaped {

using simd::add_products;
using simd::Floats;
using simd::Ints;
using simd::load;
using simd::store;
using simd::Vector;
using simd::Words;

/// Tokens that are coded together, and places likewise.
inline constexpr Index tile = 128, block = 4;
/// Sums of magnitudes of a row's weights before they are rounded stay in int32 up to here.
inline constexpr Index max_channels = 1024;
/// By how many bits positions are finer than errors.
inline constexpr int finer_bits = 6;
constexpr int error_bits(int bits) noexcept {
    return 15 - bits;
}
constexpr int position_bits(int bits) noexcept {
    return error_bits(bits) + finer_bits;
}
/// Rows of matrices are padded to whole vectors.
constexpr Index padded(Index places) noexcept {
    return (places + 15) / 16 * 16;
}

/// By how many bits a sum of products is finer than a position, or a position than it: one of both is 0.
struct Shifts {
    std::int32_t sum = 0, position = 0;
};

/// What the errors of other places add to the target of each.
struct Feedback {
    std::int16_t* weights;  ///< [place][stride]
    std::int32_t* shifts;   ///< [place][2]: Shifts
    Index stride;
    const std::int32_t* columns =
        nullptr;  ///< [pair of places][stride]: the two weights of each row, for passes

    KVPLANE_INLINE Shifts at(Index place) const { return {shifts[2 * place], shifts[2 * place + 1]}; }
    KVPLANE_INLINE void set(Index place, Shifts to) const {
        shifts[2 * place] = to.sum;
        shifts[2 * place + 1] = to.position;
    }
};

/// The tile that is coded, by places, padded to a multiple of `block`.
struct Tile {
    Index places;
    int bits;
    std::int32_t* positions;  ///< [place][tile]
    std::int32_t* errors;     ///< [pair of places][tile]
    std::uint8_t* codes;      ///< [place][tile]
    std::int32_t* sums;       ///< [place][strip of tokens] what the errors of all places add up to
};
/// Most tokens of a strip.
inline constexpr Index strip_tokens = 64;

// -- Codes ------------------------------------------------------------------------------------------------

/// What all positions of a width share: their unit, and the cells beyond which values count as there. Values
/// may have been clipped, by any number of cells.
struct PositionRange {
    float fine, lowest, highest;

    explicit PositionRange(int bits)
        : fine(power_of_two(position_bits(bits) - 1)),
          lowest(-power_of_two(bits)),
          highest(power_of_two(bits + 1)) {}
};

/// The positions of a tile's values at one place, and whether all values can be stored.
template <int Lanes>
KVPLANE_INLINE bool find_positions(const float* values, float lower, float inverse,
                                   const PositionRange& range, std::int32_t* positions) {
    const Floats<Lanes> lowest = Floats<Lanes>{} + range.lowest, highest = Floats<Lanes>{} + range.highest;
    Ints<Lanes> good = Ints<Lanes>{} - 1;
    for (Index t = 0; t < tile; t += Lanes) {
        Floats<Lanes> x;
        load(x, values + t);
        good &= (Floats<Lanes>)((Words<Lanes>)x & 0x7FFFFFFFu) <= fp16_max;
        Floats<Lanes> position = (x - lower) * inverse;
        position = position > lowest ? position : lowest;
        position = position < highest ? position : highest;
        const Ints<Lanes> whole = __builtin_convertvector(position * range.fine, Ints<Lanes>);
        store(positions + t, whole * 2 + 1);
    }
    return simd::all_set<Lanes>(good);
}

/// The sums that a pass goes by: of the errors of the places before (error feedback); of all places, added up
/// anew; or of all places as the pass before left them.
enum class Sums { before, all, kept };
/// Whether a bit of a lane is set.
template <int Lanes, std::size_t... Place>
KVPLANE_INLINE bool any_set(const Ints<Lanes>& x, std::index_sequence<Place...>) {
    if constexpr (Lanes == 4) {
        const auto halves = (Vector<std::int64_t, 2>)x;
        return (halves[0] | halves[1]) != 0;
    } else {
        constexpr int half = Lanes / 2;
        const Ints<half> both = __builtin_shufflevector(x, x, (static_cast<int>(Place))...) |
                                __builtin_shufflevector(x, x, (static_cast<int>(Place) + half)...);
        return any_set<half>(both, std::make_index_sequence<half / 2>{});
    }
}
template <int Lanes>
KVPLANE_INLINE bool any_set(const Ints<Lanes>& x) {
    return any_set<Lanes>(x, std::make_index_sequence<Lanes / 2>{});
}

/// The errors of two places before and after they were coded: what was, negative, and what is.
template <int Lanes>
struct ErrorChange {
    Ints<Lanes> out, in;

    KVPLANE_INLINE void leave(const Ints<Lanes>& errors) {
        out = (Ints<Lanes>)(-(Vector<std::int16_t, 2 * Lanes>)errors);
    }
    /// In this order, for the sum without both stays below 2^30.
    KVPLANE_INLINE void add_to(Ints<Lanes>& sum, const Ints<Lanes>& weights) const {
        add_products<Lanes>(sum, out, weights);
        add_products<Lanes>(sum, in, weights);
    }
    KVPLANE_INLINE void add_to_rows(std::int32_t* sums, Index stride, const std::int32_t* weights,
                                    Index first, Index last) const {
        for (Index j = first; j < last; ++j) {
            Ints<Lanes> sum;
            load(sum, sums + j * stride);
            add_to(sum, Ints<Lanes>{} + weights[j]);
            store(sums + j * stride, sum);
        }
    }
};

/// Codes the places first .. first + block - 1 of Strip vectors of tokens from `token` on. another: whether a pass
/// follows, which then goes by the errors and sums of this one, and writes the codes.
template <int Lanes, int Strip, Sums from>
KVPLANE_INLINE void code_block(const Tile& to, const Feedback& feedback, Index first, Index token,
                               bool another) {
    constexpr Index sum_stride = Strip * Lanes;
    Ints<Lanes> sums[block][Strip];
    const std::int16_t* rows[block];
    std::int32_t* const kept = to.sums + first * sum_stride;
    const Index own = first / 2;
#pragma GCC unroll 4
    for (int r = 0; r < block; ++r) {
        rows[r] = feedback.weights + (first + r) * feedback.stride;
#pragma GCC unroll 4
        for (int s = 0; s < Strip; ++s) {
            if constexpr (from == Sums::kept)
                load(sums[r][s], kept + r * sum_stride + s * Lanes);
            else
                sums[r][s] = Ints<Lanes>{};
        }
    }
    if constexpr (from != Sums::kept)
        for (Index pair = 0; pair < (from == Sums::before ? own : to.places / 2); ++pair) {
            Ints<Lanes> errors[Strip];
#pragma GCC unroll 4
            for (int s = 0; s < Strip; ++s) load(errors[s], to.errors + pair * tile + token + s * Lanes);
#pragma GCC unroll 4
            for (int r = 0; r < block; ++r) {
                std::int32_t two;
                std::memcpy(&two, rows[r] + 2 * pair, 4);
                const Ints<Lanes> weights = Ints<Lanes>{} + two;
#pragma GCC unroll 4
                for (int s = 0; s < Strip; ++s) add_products<Lanes>(sums[r][s], errors[s], weights);
            }
        }
    if constexpr (from == Sums::all)
        if (another)
#pragma GCC unroll 4
            for (int r = 0; r < block; ++r)
#pragma GCC unroll 4
                for (int s = 0; s < Strip; ++s) store(kept + r * sum_stride + s * Lanes, sums[r][s]);

    // Place after place, all vectors of tokens of each: what one vector waits for, another does not.
    const int fine = position_bits(to.bits), top = (1 << to.bits) - 1;
    const Ints<Lanes> zero{}, last = zero + top;
    Ints<Lanes> most = zero + 32767, least = -most;
    simd::keep_in_register(most);  // g++ 12 knows a minimum by its operand, but not by a constant
    simd::keep_in_register(least);
    const std::int32_t middle = (1 << (fine - 1)) + (1 << (finer_bits - 1));
    ErrorChange<Lanes> errors[block / 2][Strip];
#pragma GCC unroll 2
    for (int p = 0; p < block / 2; ++p)
#pragma GCC unroll 4
        for (int s = 0; s < Strip; ++s) {
            Ints<Lanes>& in = errors[p][s].in;
            if constexpr (from == Sums::before) {
                in = Ints<Lanes>{};
            } else {
                load(in, to.errors + (own + p) * tile + token + s * Lanes);
                errors[p][s].leave(in);
            }
        }
#pragma GCC unroll 4
    for (int r = 0; r < block; ++r) {
        const Shifts shifts = feedback.at(first + r);
        const Index place = (first + r) * tile + token;
#pragma GCC unroll 2
        for (int p = 0; p < (r + 1) / 2; ++p) {
            std::int32_t two;
            std::memcpy(&two, rows[r] + first + 2 * p, 4);
            const Ints<Lanes> weights = Ints<Lanes>{} + two;
#pragma GCC unroll 4
            for (int s = 0; s < Strip; ++s) {
                if constexpr (from == Sums::before)
                    add_products<Lanes>(sums[r][s], errors[p][s].in, weights);
                else
                    errors[p][s].add_to(sums[r][s], weights);
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < Strip; ++s) {
            Ints<Lanes> position;
            load(position, to.positions + place + s * Lanes);
            Ints<Lanes> code =
                ((position >> shifts.position) - (sums[r][s] >> shifts.sum)) >> (fine - shifts.position);
            code = code > zero ? code : zero;
            code = code < last ? code : last;
            if (!another) simd::store_low_bytes<Lanes>(to.codes + place + s * Lanes, code);
            Ints<Lanes> error = ((code << fine) + middle - position) >> finer_bits;
            error = error > least ? error : least;
            error = error < most ? error : most;
            Ints<Lanes>& two = errors[r / 2][s].in;
            two = r % 2 ? (two & 0xFFFF) | (error << 16) : (two & -65536) | (error & 0xFFFF);
        }
    }

    Ints<Lanes> changed{};
#pragma GCC unroll 2
    for (int p = 0; p < block / 2; ++p)
#pragma GCC unroll 4
        for (int s = 0; s < Strip; ++s) {
            std::int32_t* const at = to.errors + (own + p) * tile + token + s * Lanes;
            if constexpr (from != Sums::before) {
                Ints<Lanes> old;
                load(old, at);
                changed |= old ^ errors[p][s].in;
            }
            store(at, errors[p][s].in);
        }
    if constexpr (from != Sums::before) {
        if ((from == Sums::all && !another) || !any_set<Lanes>(changed)) return;
        for (int p = 0; p < block / 2; ++p)
            for (int s = 0; s < Strip; ++s) {
                const ErrorChange<Lanes>& change = errors[p][s];
                if (!any_set<Lanes>((Ints<Lanes>)((Vector<std::int16_t, 2 * Lanes>)change.out +
                                                  (Vector<std::int16_t, 2 * Lanes>)change.in)))
                    continue;
                const std::int32_t* const weights = feedback.columns + (own + p) * feedback.stride;
                // In the pass that adds up anew, later places still will.
                change.add_to_rows(to.sums + s * Lanes, sum_stride, weights, another ? 0 : first + block,
                                   from == Sums::all ? first + block : to.places);
            }
    }
}

/// One pass over all places of a strip of tokens.
template <int Lanes, int Strip, Sums from>
KVPLANE_INLINE void code_places(const Tile& to, const Feedback& feedback, Index token, bool another) {
    for (Index first = 0; first < to.places; first += block)
        code_block<Lanes, Strip, from>(to, feedback, first, token, another);
}

/// Error feedback, then `passes` passes of coordinate descent.
template <int Lanes>
KVPLANE_INLINE void code_tokens(const Tile& to, const Feedback& feedback, const Feedback& descent, int passes,
                                Index tokens) {
    // As many accumulators as registers leave room for.
    constexpr int strip = Lanes == 16 ? 4 : 2;
    static_assert(strip * Lanes <= strip_tokens);
    for (Index token = 0; token < tokens; token += strip * Lanes) {
        code_places<Lanes, strip, Sums::before>(to, feedback, token, passes > 0);
        for (int pass = 0; pass < passes; ++pass) {
            const bool another = pass + 1 < passes;
            if (pass == 0)
                code_places<Lanes, strip, Sums::all>(to, descent, token, another);
            else
                code_places<Lanes, strip, Sums::kept>(to, descent, token, another);
        }
    }
}

/// Codes [place][tile] to [token][channel].
KVPLANE_INLINE void write_codes(const std::uint8_t* codes, const Index* place_of, Index tokens,
                                Index channels, std::uint8_t* to, Index to_stride) {
    constexpr Index side = 16;
    Index c = 0;
    for (; c + side <= channels; c += side) {
        Index t = 0;
        for (; t + side <= tokens; t += side)
            simd::transpose_bytes_16x16([&](int r)
                                            KVPLANE_BODY { return codes + place_of[c + r] * tile + t; },
                                        to + t * to_stride + c, to_stride);
        for (; t < tokens; ++t)
            for (Index r = c; r < c + side; ++r) to[t * to_stride + r] = codes[place_of[r] * tile + t];
    }
    for (; c < channels; ++c)
        for (Index t = 0; t < tokens; ++t) to[t * to_stride + c] = codes[place_of[c] * tile + t];
}

// -- Weights ----------------------------------------------------------------------------------------------

/// The largest magnitude of a row, or what is no number if one of them is none.
template <int Lanes, class Scalar>
KVPLANE_INLINE double largest_magnitude(const Scalar* row, Index count) {
    // Compared as integers, because infinity is then above all numbers, and NaN above infinity.
    using Bits = std::conditional_t<sizeof(Scalar) == 8, std::int64_t, std::int32_t>;
    constexpr int lanes = Lanes * 4 / static_cast<int>(sizeof(Scalar));
    constexpr Bits magnitude = std::numeric_limits<Bits>::max();
    Vector<Bits, lanes> largest{}, bits;
    Index i = 0;
    for (; i + lanes <= count; i += lanes) {
        load(bits, row + i);
        bits &= magnitude;
        largest = largest < bits ? bits : largest;
    }
    Bits all = 0, one;
    for (int lane = 0; lane < lanes; ++lane) all = std::max<Bits>(all, largest[lane]);
    for (; i < count; ++i) {
        std::memcpy(&one, row + i, sizeof one);
        all = std::max<Bits>(all, one & magnitude);
    }
    Scalar result;
    std::memcpy(&result, &all, sizeof result);
    return static_cast<double>(result);
}

/// to = row times two powers of two, of which the second brings what is too small for a double to 0.
template <int Lanes, class Scalar>
KVPLANE_INLINE void narrow_row(const Scalar* row, Index count, double first, double second, float* to) {
    constexpr int lanes = Lanes / 2;
    Vector<double, lanes> x;
    Index i = 0;
    for (; i + lanes <= count; i += lanes) {
        if constexpr (sizeof(Scalar) == 8) {
            load(x, row + i);
        } else {
            Floats<lanes> narrow;
            load(narrow, row + i);
            simd::widen_doubles<lanes>(x, narrow);
        }
        store(to + i, __builtin_convertvector(x * first * second, Floats<lanes>));
    }
    for (; i < count; ++i) to[i] = static_cast<float>(static_cast<double>(row[i]) * first * second);
}

/// All lanes of x added up, width lanes at a time by halving.
template <int Lanes, int width, std::size_t... Place>
KVPLANE_INLINE void add_lanes(Ints<Lanes>& x, std::index_sequence<Place...> places) {
    if constexpr (width > 1) {
        x += __builtin_shufflevector(x, x, (Place ^ (width / 2))...);
        add_lanes<Lanes, width / 2>(x, places);
    }
}

/// One row of weights: ratios[i] steps[i] scale for all i below `places`. It has as many fractional bits as keep
/// its sum of magnitudes below 2^15, and whole cells at least: a row that is larger still is shrunk, but its step
/// is so small that its code will be the first or the last anyway.
template <int Lanes>
KVPLANE_INLINE Shifts round_row(const float* ratios, const float* steps, float scale, Index places,
                                float* room, std::int16_t* row) {
    constexpr auto lanes = std::make_index_sequence<static_cast<std::size_t>(Lanes)>{};
    const Index end = (places + Lanes - 1) / Lanes * Lanes;
    Floats<Lanes> largest{};
    const auto weigh = [&](Index i, Floats<Lanes>& x) KVPLANE_BODY {
        Floats<Lanes> step;
        load(x, ratios + i);
        load(step, steps + i);
        x = x * step * scale;
    };
    const auto take = [&](Index i, const Floats<Lanes>& x) KVPLANE_BODY {
        store(room + i, x);
        const auto magnitude = (Floats<Lanes>)((Words<Lanes>)x & 0x7FFFFFFFu);
        largest = magnitude > largest ? magnitude : largest;
    };
    Floats<Lanes> x;
    Index i = 0;
    for (; i + Lanes <= places; i += Lanes) {
        weigh(i, x);
        take(i, x);
    }
    if (i < end) {
        weigh(i, x);
        Ints<Lanes> used;
        simd::first_lanes<Lanes>(used, places - i);
        take(i, (Floats<Lanes>)((Ints<Lanes>)x & used));
    }
    simd::fold_lanes<Lanes, Lanes>(largest, simd::larger, lanes);
    // By the exponent of the largest, whose magnitude becomes 2^19 to 2^20.
    const int exponent = (((Ints<Lanes>)largest)[0] >> 23) - 126,
              fraction = std::min(std::max(20 - exponent, -100), 25);
    const Ints<Lanes> pattern = Ints<Lanes>{} + ((fraction + 127) << 23);
    Ints<Lanes> sums{};
    for (Index i = 0; i < end; i += Lanes) {
        Floats<Lanes> x;
        load(x, room + i);
        const Ints<Lanes> whole = __builtin_convertvector(x * (Floats<Lanes>)pattern, Ints<Lanes>);
        sums += whole < 0 ? -whole : whole;
        store(room + i, whole);
    }
    add_lanes<Lanes, Lanes>(sums, lanes);
    // Rounding adds half a unit to each magnitude at most.
    constexpr int limit = 32767 - max_channels / 2;
    const int sum = sums[0];
    int drop = std::max(static_cast<int>(std::bit_width(static_cast<unsigned>(sum))) - 15, 0);
    if (sum >> drop >= limit) ++drop;
    const std::int32_t half = (1 << drop) >> 1;
    for (Index i = 0; i < end; i += Lanes) {
        Ints<Lanes> whole;
        load(whole, room + i);
        whole = (whole + half) >> drop;
        store(row + i, __builtin_convertvector(whole, Vector<std::int16_t, Lanes>));
    }
    const int finer = fraction - drop - finer_bits;
    return {std::max(finer, 0), std::min(std::max(-finer, 0), position_bits(8))};
}

// -- Factorization ----------------------------------------------------------------------------------------

/// Pivots whose rows go through memory together.
inline constexpr int panel = 4;

/// C = L D L^T with L unit lower in reversed order, by places: the last place is eliminated first.
struct Factorization {
    float* weight;         ///< C [place][stride], of which the lower triangle is read
    double* rest;          ///< [place][stride]: what is left of C
    double* pivots;        ///< D
    double *left, *right;  ///< [block][stride]: rows of L, and what they were divided from
    float* ratios;         ///< [stride]: a row of L
    Index places, stride;
};

/// rest -= left^T right in `Rows` rows from `first` on, for the `panel` pivots of left and right.
template <int Lanes, int Rows>
KVPLANE_INLINE void eliminate_panel(const Factorization& f, Index first) {
    using Doubles = Vector<double, Lanes / 2>;
    const Index stride = f.stride, end = first + Rows;
    double* const rest = f.rest + first * stride;
    const double* const rights = f.right;
    Doubles left[Rows][panel];
    for (int r = 0; r < Rows; ++r)
        for (int p = 0; p < panel; ++p) left[r][p] = Doubles{} + f.left[p * stride + first + r];
    for (Index i = 0; i < end; i += Lanes / 2) {
        Doubles x[Rows];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) load(x[r], rest + r * stride + i);
#pragma GCC unroll 4
        for (int p = 0; p < panel; ++p) {
            Doubles right;
            load(right, rights + p * stride + i);
            simd::keep_in_register(right);
            // Both are floats, so that the product is exact.
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) x[r] -= left[r][p] * right;
        }
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) store(rest + r * stride + i, x[r]);
    }
}

/// The same in one row for the first `count` pivots.
template <int Lanes>
KVPLANE_INLINE void eliminate_row(const Factorization& f, Index row, Index count) {
    using Doubles = Vector<double, Lanes / 2>;
    const Index stride = f.stride;
    double* const rest = f.rest + row * stride;
    const double *const lefts = f.left + row, *const rights = f.right;
    for (Index i = 0; i <= row; i += Lanes / 2) {
        Doubles x, right;
        load(x, rest + i);
        for (Index p = 0; p < count; ++p) {
            load(right, rights + p * stride + i);
            x -= lefts[p * stride] * right;
        }
        store(rest + i, x);
    }
}

/// Calls with_row(place, its row of L) from the last place to the first. Returns false, and stops, where what
/// is left of C is not positive definite, or too nearly singular for 24 bits.
template <int Lanes, class WithRow>
KVPLANE_INLINE bool factorize(const Factorization& f, const WithRow& with_row) {
    constexpr int lanes = Lanes / 2;
    using Doubles = Vector<double, lanes>;
    using Narrow = Vector<float, lanes>;
    const double least = 1e-18;  // of the largest entry, which is 1/2 to 1
    const Index stride = f.stride;
    for (Index j = 0; j < f.places; ++j) {
        const float* const from = f.weight + j * stride;
        double* const to = f.rest + j * stride;
        for (Index i = 0; i <= j; i += lanes) {
            Narrow x;
            Doubles wide;
            load(x, from + i);
            simd::widen_doubles<lanes>(wide, x);
            store(to + i, wide);
        }
    }
    for (Index end = f.places; end > 0;) {
        const Index count = end >= panel ? panel : 1;
        for (Index p = 0; p < count; ++p) {
            const Index j = end - 1 - p;
            if (p > 0) eliminate_row<Lanes>(f, j, p);
            const double* const row = f.rest + j * stride;
            double *const rights = f.right + p * stride, *const lefts = f.left + p * stride;
            float* const ratios = f.ratios;
            const double pivot = row[j], whole = static_cast<double>(f.weight[j * stride + j]);
            if (!(pivot > least && pivot > whole * 0x1p-20)) return false;
            f.pivots[j] = pivot;
            const double inverse = 1.0 / pivot;
            for (Index i = 0; i < j; i += lanes) {
                Doubles x;
                load(x, row + i);
                const Narrow right = __builtin_convertvector(x, Narrow),
                             left = __builtin_convertvector(x * inverse, Narrow);
                Doubles wide;
                simd::widen_doubles<lanes>(wide, right);
                store(rights + i, wide);
                simd::widen_doubles<lanes>(wide, left);
                store(lefts + i, wide);
                store(ratios + i, left);
            }
            with_row(j);
        }
        end -= count;
        constexpr int rows = Lanes == 16 ? 4 : 2;  // as registers leave room for
        Index k = 0;
        if (count == panel)
            for (; k + rows <= end; k += rows) eliminate_panel<Lanes, rows>(f, k);
        for (; k < end; ++k) eliminate_row<Lanes>(f, k, count);
        // A matrix that is not positive definite would grow beyond floats.
        for (k = 0; k < end; ++k)
            if (!(f.rest[k * stride + k] > 0.0)) return false;
    }
    return true;
}

// -- Excess -----------------------------------------------------------------------------------------------

/// sums += the squares of both halves of x, exact in double.
template <int Lanes, std::size_t... Place>
KVPLANE_INLINE void add_squares(Vector<double, Lanes / 2>* sums, const Floats<Lanes>& x,
                                std::index_sequence<Place...>) {
    using Doubles = Vector<double, Lanes / 2>;
    const Floats<Lanes / 2> low = __builtin_shufflevector(x, x, Place...),
                            high = __builtin_shufflevector(x, x, (Place + Lanes / 2)...);
    Doubles first, second;
    simd::widen_doubles<Lanes / 2>(first, low);
    simd::widen_doubles<Lanes / 2>(second, high);
    sums[0] += first * first;
    sums[1] += second * second;
}

/// What a tile was coded from, and its codes, by places.
struct TileGrids {
    const float* values;  ///< [channel][tile]
    const Index* order;   ///< [place]: the channel there
    const float *lower, *step;
    const std::uint8_t* codes;  ///< [place][tile]
};

/// How far the errors of a tile exceed half a step, over `tokens` tokens of the first `places` places. In 16
/// lanes, however many a vector has, because the order of sums must not depend on the instruction set.
template <int Lanes>
KVPLANE_INLINE ClipExcess excess_of(const TileGrids& grids, Index places, Index tokens) {
    constexpr int lanes = 16, parts = lanes / Lanes, half_lanes = Lanes / 2;
    using Doubles = Vector<double, half_lanes>;
    Floats<Lanes> largest[parts] = {};
    Doubles energy[2 * parts] = {};
    for (Index j = 0; j < places; ++j) {
        const float lower = grids.lower[j], step = grids.step[j];
        for (Index t = 0; t < tokens; t += lanes) {
#pragma GCC unroll 4
            for (int p = 0; p < parts; ++p) {
                const Index first = t + p * Lanes;
                Ints<Lanes> whole;
                Floats<Lanes> value;
                simd::load_bytes<Lanes>(whole, grids.codes + j * tile + first);
                load(value, grids.values + grids.order[j] * tile + first);
                const auto code = __builtin_convertvector(whole, Floats<Lanes>);
                // fp16's step has 11 bits and the code 9, so that the product is exact.
                Floats<Lanes> error = value - (lower + step * (code + 0.5f));
                error = (Floats<Lanes>)((Words<Lanes>)error & 0x7FFFFFFFu) - 0.5f * step;
                error = error > 0.0f ? error : Floats<Lanes>{};
                if (t + lanes > tokens) {
                    Ints<Lanes> used;
                    simd::first_lanes<Lanes>(used, tokens - first);
                    error = (Floats<Lanes>)((Ints<Lanes>)error & used);
                }
                largest[p] = error > largest[p] ? error : largest[p];
                add_squares<Lanes>(energy + 2 * p, error, std::make_index_sequence<half_lanes>{});
            }
        }
    }
    ClipExcess excess;
    for (int p = 0; p < parts; ++p)
        for (int lane = 0; lane < Lanes; ++lane) {
            excess.largest = std::max(excess.largest, static_cast<double>(largest[p][lane]));
            excess.energy += energy[2 * p + lane / half_lanes][lane % half_lanes];
        }
    return excess;
}

}  // namespace kvplane::detail::shaped
