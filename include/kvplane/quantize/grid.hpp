// kvplane/quantize/grid.hpp: an affine grid {lower, step, bits}, its fitting rules, its one decoder.
//
// A grid cuts the interval [lower, lower + 2^bits step] into 2^bits equal cells and stands for each by its
// middle: value = lower + step (code + 1/2). The schemes differ only in the interval:
//
//   cell       exactly [min, max]
//   min_max    half a step further on both sides, so that the extremes are (nearly) reproduced:
//              step = range / (2^bits - 1). KIVI, HQQ and ggml compute this.
//   symmetric  two's complement around zero: alpha = max|x| / (2^(bits-1) - 1), codes -(2^(bits-1) - 1) ..
//              2^(bits-1) - 1 stored with 2^(bits-1) added; lower follows from step and is not stored.
//              The quantizer of theorems 3 and 4 of arXiv 2502.15075.
//   full_range two's complement with its one code more: the value x of the largest magnitude gets the code 0,
//              step = -x / 2^(bits-1), which is negative if x is positive. Values near the other end, up to
//              half a step, are clipped. ggml's Q4_0.
//   unbiased   cells around zero whose width follows from the norm, not from the extremes; step is then
//              chosen so that <x', x> = <x, x> (theorem T16). Values beyond the cells are clipped. It is for
//              rotated values: a sum of many tokens shrinks by what each is short along itself, while other
//              errors average out. Its step takes one byte; see storage below.
//
// The first p bits of a code are the code of the p-bit cell grid over the same interval, whatever the scheme.
// A coarser read therefore needs nothing but fewer bits.
//
// lower and step are kept as fp16 and are rounded outward, so that the interval still covers the data. Codes
// are computed from the rounded values. A group whose values are all equal gets step 0 and decodes to that
// value rounded to fp16. (With the schemes around zero this is so only if the value is zero; another value
// gets a step like any other.)
//
// Storage: the schemes around zero keep no lower. The step of `unbiased` is kept as the upper byte of an fp16
// number without its sign, 5 bits of exponent and 3 of fraction, and is rounded to nearest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kvplane/error.hpp"
#include "kvplane/simd/half_number.hpp"

namespace kvplane {

enum class Scheme : std::uint8_t { cell, min_max, symmetric, full_range, unbiased };

/// Whether the fit may shrink the interval. `mse_optimal` takes the interval with the least squared error
/// over the group; values beyond it are clipped. Off by default: on a real model clipping raises the error
/// of attention, because the extreme values sit in the same channels token after token.
enum class Clip : std::uint8_t { none, mse_optimal };

constexpr const char* name(Scheme scheme) noexcept {
    switch (scheme) {
        case Scheme::cell:
            return "cell";
        case Scheme::min_max:
            return "min_max";
        case Scheme::symmetric:
            return "symmetric";
        case Scheme::full_range:
            return "full_range";
        case Scheme::unbiased:
            return "unbiased";
    }
    return "unknown";
}

/// Whether a grid's lower end is stored. Otherwise it follows from the step; see lower_in_steps().
constexpr bool has_lower(Scheme scheme) noexcept {
    return scheme == Scheme::cell || scheme == Scheme::min_max;
}
/// Whether the first planes of a code are the code of a grid of the same scheme. Around a code that stands
/// for zero they are not, for the coarser cell that holds it is not centred on it.
constexpr bool prefixes_are_grids(Scheme scheme) noexcept {
    return has_lower(scheme) || scheme == Scheme::unbiased;
}
/// Bytes in which a step is stored: an fp16 number, or its upper byte.
constexpr int step_bytes(Scheme scheme) noexcept {
    return scheme == Scheme::unbiased ? 1 : 2;
}

/// The scheme with the better fit at a width if nothing may be clipped. min_max reproduces the extremes, and
/// at 1 and 2 bits it spends so much of the range on them that exact cells are better.
constexpr Scheme scheme_for(int bits) noexcept {
    return bits <= 2 ? Scheme::cell : Scheme::min_max;
}

/// 2^exponent as float, exactly, for small exponents.
constexpr float power_of_two(int exponent) noexcept {
    float power = 1.0f;
    for (; exponent > 0; --exponent) power *= 2.0f;
    for (; exponent < 0; ++exponent) power *= 0.5f;
    return power;
}

/// The lower end of a grid whose scheme stores none, in steps.
constexpr float lower_in_steps(Scheme scheme, int bits) noexcept {
    return -0.5f * power_of_two(bits) - (scheme == Scheme::unbiased ? 0.0f : 0.5f);
}

/// A step of the scheme `unbiased` in the byte that is stored, and back. Rounded to nearest, and at most
/// 61440, the largest such number.
inline std::uint8_t step_byte(float step) noexcept {
    const float bounded = std::min(step, 61440.0f);
    const auto bits = Eigen::numext::bit_cast<std::uint16_t>(Eigen::half(bounded));
    return static_cast<std::uint8_t>((bits + 64) >> 7);
}
inline Eigen::half half_of_step(std::uint8_t byte) noexcept {
    return Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(byte << 7));
}

/// A fitted grid. lower and step hold fp16 values (where lower is not stored it is lower_in_steps() steps,
/// exact in fp32). Only `full_range` has negative steps, and then lower is the upper end.
struct Grid {
    float lower = 0.0f;
    float step = 0.0f;
    int bits = 1;

    int codes() const noexcept { return 1 << bits; }
    /// The other end of the interval.
    float upper() const noexcept { return lower + step * static_cast<float>(codes()); }

    /// The cell that holds x; values outside the interval get the nearest one.
    int encode(float x) const noexcept {
        const float inverse = step != 0.0f ? 1.0f / step : 0.0f;
        const float position = (x - lower) * inverse;
        const auto last = static_cast<float>(codes() - 1);
        return static_cast<int>(std::min(std::max(position, 0.0f), last));
    }
    /// The value that `code` stands for; with depth p < bits, `code` is the prefix of p bits.
    float decode(int code, int depth) const noexcept {
        return lower + step * power_of_two(bits - depth) * (static_cast<float>(code) + 0.5f);
    }
    float decode(int code) const noexcept { return decode(code, bits); }

    /// Bound of |x - decoded x| for x inside the interval, read at `depth` bits (theorem T1): half a cell
    /// plus the rounding of fp32 arithmetic, which is below 2^-22 of the largest magnitude involved. For a
    /// group of equal values (step 0) it is the rounding of that value to fp16.
    float error_bound(int depth) const noexcept {
        const float rounding =
            std::ldexp(std::abs(lower) + std::abs(step) * static_cast<float>(codes()), -22);
        if (step == 0.0f) return std::max(std::ldexp(std::abs(lower), -11), std::ldexp(1.0f, -25));
        return 0.5f * std::abs(step) * power_of_two(bits - depth) + rounding;
    }
    float error_bound() const noexcept { return error_bound(bits); }
};

namespace detail {

/// Throws Error (option) for a width that a scheme has not.
inline void require_width(int bits, Scheme scheme) {
    require(bits >= 1 && bits <= 8, ErrorCode::option, "bits: ", bits, ", expected 1 to 8");
    require(scheme != Scheme::symmetric || bits >= 2, ErrorCode::option,
            "bits: 1 with the symmetric scheme, which has no 1-bit form; expected 2 to 8");
}

}  // namespace detail

/// The grid of values between `min` and `max` (finite, |x| <= fp16_max), for every scheme but `unbiased`,
/// which takes more of them (quantize/unbiased.hpp). A min_max grid whose lower end would
/// lie below fp16 starts at -fp16_max. The step is infinite if fp16 cannot hold it; only 1-bit min_max grids
/// over more than half of the fp16 range get there. The arithmetic is fp32 in this order on every machine, so
/// that the bits stored never differ.
inline Grid fit_grid(Scheme scheme, int bits, float min, float max) {
    Grid grid{0.0f, 0.0f, bits};
    const auto codes = static_cast<float>(1 << bits);
    if (scheme == Scheme::symmetric) {
        const float largest = std::max(std::abs(min), std::abs(max));
        const auto last = static_cast<float>((1 << (bits - 1)) - 1);
        grid.step = static_cast<float>(half_above(largest / last));
        grid.lower = grid.step * lower_in_steps(scheme, bits);
    } else if (scheme == Scheme::full_range) {
        // The end of the larger magnitude, the upper one if both are equal.
        const float largest = std::abs(max) >= std::abs(min) ? max : min;
        const auto size = static_cast<float>(half_above(std::abs(largest) / (0.5f * codes)));
        grid.step = largest > 0.0f ? -size : size;
        grid.lower = grid.step * lower_in_steps(scheme, bits);
    } else if (min == max) {
        grid.lower = static_cast<float>(Eigen::half(min)) + 0.0f;
    } else if (scheme == Scheme::cell) {
        grid.lower = static_cast<float>(half_below(min)) + 0.0f;
        grid.step = static_cast<float>(half_above((max - grid.lower) / codes));
    } else {
        // One division, because half of a quotient is inexact among fp32's subnormals, where contraction
        // would show.
        const float half_step = (max - min) / (2.0f * codes - 2.0f);
        grid.lower = static_cast<float>(half_below(std::max(min - half_step, -fp16_max))) + 0.0f;
        grid.step = static_cast<float>(half_above((max - grid.lower) / (codes - 0.5f)));
    }
    return grid;
}

}  // namespace kvplane
