// kvplane/quantize/unbiased.hpp: grids of the scheme `unbiased`: no bias along a token.
//
// A token x of D rotated channels looks Gaussian. Its cells are as wide as the best uniform quantizer of a
// Gaussian of the same norm has them, so its codes q (half-integers around zero) need nothing but the norm.
// The least squared error would then take the step <q, x> / <q, q>, which makes x' shorter than x: by 12% at
// 2 bits, for all tokens alike. A sum of many weighted tokens averages errors out, but not that. The step
// here is <x, x> / <q, x>, so that <x', x> = <x, x> (theorem T16).
//
// Sums are in double and in one order, 16 of them at a time, whatever the instruction set. Products are of
// numbers of at most 24 bits and so are exact, and contraction to fused multiply-add cannot change a bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kvplane/matrix.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/quantize/rule.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/simd/vector.hpp"

namespace kvplane::detail {

/// Rows of `channels` channels in runs of `group`, both multiples of kernel_channels.
struct TokenRuns {
    SourceRows rows;
    Index tokens, channels, group;

    Index runs() const noexcept { return channels / group; }
};

/// The width of a cell, in root mean squares, of the uniform quantizer of a Gaussian that has 2^bits cells
/// around zero and the least squared error (Max 1960, table II).
inline float gaussian_cell(int bits) noexcept {
    constexpr float widths[] = {1.596f, 0.9957f, 0.5860f, 0.3352f, 0.1881f, 0.1041f, 0.0568f, 0.0307f};
    return widths[bits - 1];
}

/// By how many percent an unbiased step grows where cells of that width grow by one: d log step / d log width
/// of a Gaussian, step = 1 / E[q x] = 1 / sum over edges k of phi(k width). 0 at 1 bit: codes are signs.
inline double step_elasticity(int bits) noexcept {
    constexpr double elasticities[] = {0.0, 0.5445, 0.7964, 0.9153, 0.9670, 0.9879, 0.9957, 0.9985};
    return elasticities[bits - 1];
}

namespace grid_kernels {

/// Sixteen sums in double; element i of a run goes to sum i % 16.
template <int Lanes>
struct SixteenSums {
    using Doubles = Vector<double, Lanes>;
    static constexpr int parts = 16 / Lanes;
    Doubles sums[parts]{};

    /// to[i % 16] += value(first + i) for i below 16, where value(at, to) gives a vector of doubles.
    template <class Value>
    KVPLANE_INLINE void add(Index first, const Value& value) {
        Doubles v;
        for (int p = 0; p < parts; ++p) {
            value(first + p * Lanes, v);
            sums[p] += v;
        }
    }
    KVPLANE_INLINE double total() const {
        double all[16];
        for (int p = 0; p < parts; ++p) store(all + p * Lanes, sums[p]);
        for (int width = 8; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) all[i] += all[i + width];
        return all[0];
    }
};

template <int Lanes, class Scalar>
KVPLANE_INLINE double squared_norm(const Scalar* run, Index count) {
    SixteenSums<Lanes> sums;
    for (Index i = 0; i < count; i += 16)
        sums.add(i, [=](Index at, Vector<double, Lanes>& to) KVPLANE_BODY {
            Floats<Lanes> x;
            widen<Lanes>(x, run + at);
            to = __builtin_convertvector(x, Vector<double, Lanes>);
            to *= to;
        });
    return sums.total();
}

/// The half-integers that codes stand for, around zero.
template <int Lanes>
KVPLANE_INLINE void load_centred(Floats<Lanes>& to, const std::uint8_t* codes, int bits) {
    Vector<std::uint8_t, Lanes> narrow;
    load(narrow, codes);
    to = __builtin_convertvector(__builtin_convertvector(narrow, Ints<Lanes>), Floats<Lanes>) +
         (0.5f - static_cast<float>(1 << (bits - 1)));
}

template <int Lanes, class Scalar>
KVPLANE_INLINE double product_with_codes(const Scalar* run, const std::uint8_t* codes, Index count,
                                         int bits) {
    SixteenSums<Lanes> sums;
    for (Index i = 0; i < count; i += 16)
        sums.add(i, [=](Index at, Vector<double, Lanes>& to) KVPLANE_BODY {
            Floats<Lanes> x, q;
            widen<Lanes>(x, run + at);
            load_centred<Lanes>(q, codes + at, bits);
            to = __builtin_convertvector(x, Vector<double, Lanes>) *
                 __builtin_convertvector(q, Vector<double, Lanes>);
        });
    return sums.total();
}

/// By how much |x - step q| exceeds half a step. Zeros that fill a run do not.
template <int Lanes, class Scalar>
KVPLANE_INLINE void note_excess(const Scalar* run, const std::uint8_t* codes, Index count, int bits,
                                float step, ClipExcess& excess) {
    SixteenSums<Lanes> energy;
    Floats<Lanes> largest{};
    for (Index i = 0; i < count; i += 16)
        energy.add(i, [&](Index at, Vector<double, Lanes>& to) KVPLANE_BODY {
            Floats<Lanes> x, q;
            widen<Lanes>(x, run + at);
            load_centred<Lanes>(q, codes + at, bits);
            // The product is exact: a step has 4 bits and a code 8.
            const Floats<Lanes> error = x - q * step;
            Floats<Lanes> over = (Floats<Lanes>)((Words<Lanes>)error & 0x7FFFFFFFu) - 0.5f * step;
            over = over > 0.0f ? over : Floats<Lanes>{};
            largest = largest < over ? over : largest;
            to = __builtin_convertvector(over, Vector<double, Lanes>);
            to *= to;
        });
    for (int i = 0; i < Lanes; ++i) excess.largest = std::max<double>(excess.largest, largest[i]);
    excess.energy += energy.total();
}

}  // namespace grid_kernels

/// How many channels of a run are no padding: all of `group`, but of the last of a row.
struct RunSizes {
    Index group, channels;

    Index of(Index run) const noexcept { return std::min(group, channels - run * group); }
};

/// The grids of runs while they are chosen, all [token][run].
struct UnbiasedGrids {
    double* squared;  ///< norms
    float *lower, *inverse;
    Eigen::half* step;
};

/// The cells that codes are chosen by, and the norms that they follow from. A run that fp16 cannot tell from
/// zeros gets 0 for lower and inverse.
inline void unbiased_cells(Isa isa, const TokenRuns& tokens, RunSizes sizes, int bits, UnbiasedGrids grids) {
    with_scalar(tokens.rows, [&](const auto* data) {
        run_on(isa, [&](auto lanes) KVPLANE_BODY {
            const float cell = gaussian_cell(bits), below = 0.5f * power_of_two(bits);
            for (Index t = 0, g = 0; t < tokens.tokens; ++t)
                for (Index run = 0; run < tokens.runs(); ++run, ++g) {
                    const double squared = grid_kernels::squared_norm<lanes>(
                        data + t * tokens.rows.stride + run * tokens.group, tokens.group);
                    const float width =
                        cell * static_cast<float>(std::sqrt(squared / static_cast<double>(sizes.of(run))));
                    const bool zero = width < 0x1p-26f;
                    grids.squared[g] = squared;
                    grids.lower[g] = zero ? 0.0f : -below * width;
                    grids.inverse[g] = zero ? 0.0f : 1.0f / width;
                }
        });
    });
}

/// The steps of these codes, as stored, and the cells that go with them. A stored step is up to 1/16 off, all
/// tokens of one norm alike, so cells are made so much wider or narrower that the codes in them have no bias
/// with that step.
inline void unbiased_steps(Isa isa, const TokenRuns& tokens, const std::uint8_t* codes, Index code_stride,
                           int bits, UnbiasedGrids grids) {
    with_scalar(tokens.rows, [&](const auto* data) {
        run_on(isa, [&](auto lanes) KVPLANE_BODY {
            const double elasticity = step_elasticity(bits);
            for (Index t = 0, g = 0; t < tokens.tokens; ++t)
                for (Index run = 0; run < tokens.runs(); ++run, ++g) {
                    const double product = grid_kernels::product_with_codes<lanes>(
                                     data + t * tokens.rows.stride + run * tokens.group,
                                     codes + t * code_stride + run * tokens.group, tokens.group, bits),
                                 exact = product > 0.0 ? grids.squared[g] / product : 0.0;
                    const std::uint8_t byte = step_byte(static_cast<float>(exact));
                    grids.step[g] = half_of_step(byte);
                    if (elasticity == 0.0 || byte == 0 || grids.inverse[g] == 0.0f) continue;
                    const double off = static_cast<double>(static_cast<float>(grids.step[g])) / exact,
                                 wider = std::clamp((off - 1.0) / elasticity, -0.25, 0.25) + 1.0;
                    grids.lower[g] = static_cast<float>(wider * static_cast<double>(grids.lower[g]));
                    grids.inverse[g] = -0.5f * power_of_two(bits) / grids.lower[g];
                }
        });
    });
}

/// By how much errors exceed half of these steps [token][run].
inline ClipExcess unbiased_excess(Isa isa, const TokenRuns& tokens, const std::uint8_t* codes,
                                  Index code_stride, int bits, const Eigen::half* steps) {
    ClipExcess excess;
    with_scalar(tokens.rows, [&](const auto* data) {
        run_on(isa, [&](auto lanes) KVPLANE_BODY {
            for (Index t = 0; t < tokens.tokens; ++t)
                for (Index run = 0; run < tokens.runs(); ++run, ++steps)
                    grid_kernels::note_excess<lanes>(data + t * tokens.rows.stride + run * tokens.group,
                                                     codes + t * code_stride + run * tokens.group,
                                                     tokens.group, bits, static_cast<float>(*steps), excess);
        });
    });
    return excess;
}

}  // namespace kvplane::detail
