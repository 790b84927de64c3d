// kvplane/cuda/numbers.hpp: the arithmetic that decides which bits are stored, for host and device alike.
//
// Operation by operation it is that of quantize/kernels.hpp, quantize/unbiased.hpp and simd/half.hpp, so that
// a device stores what a processor would. On a device every rounding is an instruction of its own, which the
// compiler neither contracts to fused multiply-adds nor changes by -fmad, -prec-div, -ftz or --use_fast_math.
// Comparisons alone follow -ftz: there fp32 numbers below 2^-126 count as zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "kvplane/cuda/device.hpp"
#include "kvplane/quantize/grid.hpp"

namespace kvplane::cuda::detail {

KVPLANE_DEVICE inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
KVPLANE_DEVICE inline float float_of(std::uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
KVPLANE_DEVICE inline float magnitude_of(float x) {
    return float_of(bits_of(x) & 0x7FFFFFFFu);
}

#if defined(__CUDA_ARCH__)
KVPLANE_DEVICE inline float sum_of(float a, float b) {
    float result;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
KVPLANE_DEVICE inline float difference_of(float a, float b) {
    float result;
    asm("sub.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
KVPLANE_DEVICE inline float product_of(float a, float b) {
    float result;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
KVPLANE_DEVICE inline float quotient_of(float a, float b) {
    float result;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
KVPLANE_DEVICE inline float root_of(float x) {
    float result;
    asm("sqrt.rn.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
KVPLANE_DEVICE inline double sum_of(double a, double b) {
    return __dadd_rn(a, b);
}
KVPLANE_DEVICE inline double product_of(double a, double b) {
    return __dmul_rn(a, b);
}
KVPLANE_DEVICE inline double quotient_of(double a, double b) {
    return __ddiv_rn(a, b);
}
KVPLANE_DEVICE inline double root_of(double x) {
    return __dsqrt_rn(x);
}
/// The number that fp16 bits stand for.
KVPLANE_DEVICE inline float widened(std::uint16_t half) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(half));
    return result;
}
/// The bits of the nearest fp16 number, ties to even.
KVPLANE_DEVICE inline std::uint16_t nearest_half(float x) {
    std::uint16_t result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
    return result;
}
/// The same of two numbers, b's bits above a's.
KVPLANE_DEVICE inline std::uint32_t nearest_halves(float a, float b) {
    std::uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(b), "f"(a));
    return result;
}
/// a + b rounded toward zero, a >= 0 and b = 2^23: 2^23 and the whole part of a.
KVPLANE_DEVICE inline float whole_sum_of(float a, float b) {
    float result;
    asm("add.rz.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
/// Of two numbers, the other where one is NaN. The sign of a zero may be either.
KVPLANE_DEVICE inline float lesser_of(float a, float b) {
    return fminf(a, b);
}
KVPLANE_DEVICE inline float greater_of(float a, float b) {
    return fmaxf(a, b);
}
/// sum + a b, of which the product is exact.
KVPLANE_DEVICE inline double sum_with_product(double sum, float a, float b) {
    return __fma_rn(static_cast<double>(a), static_cast<double>(b), sum);
}
/// x within 0 and last; NaN becomes 0.
KVPLANE_DEVICE inline float clamped(float x, float last) {
    float result;
    asm("max.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(x));
    asm("min.f32 %0, %0, %1;" : "+f"(result) : "f"(last));
    return result;
}
/// The lesser, and the greater, of two pairs of fp16 numbers, pair by pair. The sign of a zero may be either.
KVPLANE_DEVICE inline std::uint32_t lesser_halves(std::uint32_t a, std::uint32_t b) {
    std::uint32_t result;
    asm("min.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
KVPLANE_DEVICE inline std::uint32_t greater_halves(std::uint32_t a, std::uint32_t b) {
    std::uint32_t result;
    asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
/// The greater of two pairs of whole numbers of 16 bits.
KVPLANE_DEVICE inline std::uint32_t greater_words(std::uint32_t a, std::uint32_t b) {
    return __vmaxu2(a, b);
}
/// Four of the bytes of two words, b's behind a's: those that the digits of `which` number, the last digit
/// first.
KVPLANE_DEVICE inline std::uint32_t picked(std::uint32_t a, std::uint32_t b, std::uint32_t which) {
    return __byte_perm(a, b, which);
}
#else
/// A product that no compiler contracts with the sum which it goes into.
inline float product_of(float a, float b) {
#if defined(__clang__)
#pragma clang fp contract(off)
    return a * b;
#else
    volatile float product = a * b;
    return product;
#endif
}
inline double product_of(double a, double b) {
#if defined(__clang__)
#pragma clang fp contract(off)
    return a * b;
#else
    volatile double product = a * b;
    return product;
#endif
}
inline float sum_of(float a, float b) {
    return a + b;
}
inline float difference_of(float a, float b) {
    return a - b;
}
inline float quotient_of(float a, float b) {
    return a / b;
}
inline float root_of(float x) {
    return __builtin_sqrtf(x);
}
inline double sum_of(double a, double b) {
    return a + b;
}
inline double quotient_of(double a, double b) {
    return a / b;
}
inline double root_of(double x) {
    return __builtin_sqrt(x);
}
inline float widened(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    if (magnitude >= 0x400u) return float_of(sign | ((magnitude << 13) + (112u << 23)));
    // Exact: 2^-24 is the last place of what is below 2^-14.
    return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
}
inline std::uint16_t nearest_half(float x) {
    const std::uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu, sign = bits >> 16 & 0x8000u;
    std::uint32_t half;
    if (magnitude > 0x7F800000u)
        half = 0x7FFFu;
    else if (magnitude >= 0x477FF000u)
        half = 0x7C00u;
    else if (magnitude >= 0x38800000u)
        half = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    else
        half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    return static_cast<std::uint16_t>(half | sign);
}
inline std::uint32_t nearest_halves(float a, float b) {
    return static_cast<std::uint32_t>(nearest_half(b)) << 16 | nearest_half(a);
}
inline float whole_sum_of(float a, float b) {
    return static_cast<float>(static_cast<int>(a)) + b;
}
inline float lesser_of(float a, float b) {
    return b < a ? b : a;
}
inline float greater_of(float a, float b) {
    return a < b ? b : a;
}
inline double sum_with_product(double sum, float a, float b) {
    return sum + static_cast<double>(a) * static_cast<double>(b);
}
inline float clamped(float x, float last) {
    const float above = x > 0.0f ? x : 0.0f;
    return above < last ? above : last;
}
template <class Choice>
std::uint32_t pair_by_pair(std::uint32_t a, std::uint32_t b, const Choice& choice) {
    return choice(a & 0xFFFFu, b & 0xFFFFu) | choice(a >> 16, b >> 16) << 16;
}
inline std::uint32_t lesser_halves(std::uint32_t a, std::uint32_t b) {
    return pair_by_pair(a, b, [](std::uint32_t x, std::uint32_t y) {
        return widened(static_cast<std::uint16_t>(y)) < widened(static_cast<std::uint16_t>(x)) ? y : x;
    });
}
inline std::uint32_t greater_halves(std::uint32_t a, std::uint32_t b) {
    return pair_by_pair(a, b, [](std::uint32_t x, std::uint32_t y) {
        return widened(static_cast<std::uint16_t>(x)) < widened(static_cast<std::uint16_t>(y)) ? y : x;
    });
}
inline std::uint32_t greater_words(std::uint32_t a, std::uint32_t b) {
    return pair_by_pair(a, b, [](std::uint32_t x, std::uint32_t y) { return x < y ? y : x; });
}
inline std::uint32_t picked(std::uint32_t a, std::uint32_t b, std::uint32_t which) {
    const std::uint64_t both = static_cast<std::uint64_t>(b) << 32 | a;
    std::uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
        result |= static_cast<std::uint32_t>(both >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}
#endif

KVPLANE_DEVICE inline float widened_bfloat(std::uint16_t bits) {
    return float_of(static_cast<std::uint32_t>(bits) << 16);
}

/// A magnitude, given as the bits of a float: those of the greatest fp16 number not above it, and whether
/// that is the number itself.
KVPLANE_DEVICE inline std::uint32_t half_toward_zero(std::uint32_t magnitude, bool& exact) {
    if (magnitude >= 0x38800000u) {
        exact = (magnitude & 0x1FFFu) == 0;
        return (magnitude - (112u << 23)) >> 13;
    }
    const std::uint32_t exponent = magnitude >> 23;
    if (exponent < 103u) {  // below 2^-24
        exact = magnitude == 0;
        return 0;
    }
    const std::uint32_t digits = (magnitude & 0x7FFFFFu) | 0x800000u, below = 126u - exponent;
    exact = (digits & ((1u << below) - 1u)) == 0;
    return digits >> below;
}
/// The greatest fp16 number not above x, |x| <= 65504; zero is positive.
KVPLANE_DEVICE inline std::uint16_t half_below(float x) {
    const std::uint32_t bits = bits_of(x);
    bool exact = true;
    std::uint32_t half = half_toward_zero(bits & 0x7FFFFFFFu, exact);
    if (bits >> 31) {
        half += exact ? 0u : 1u;
        if (half != 0) half |= 0x8000u;
    }
    return static_cast<std::uint16_t>(half);
}
/// The least fp16 number not below x >= 0; infinity beyond 65504.
KVPLANE_DEVICE inline std::uint16_t half_above(float x) {
    const std::uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
    if (magnitude > 0x477FE000u) return 0x7C00u;
    bool exact = true;
    const std::uint32_t half = half_toward_zero(magnitude, exact);
    return static_cast<std::uint16_t>(half + (exact ? 0u : 1u));
}

// Grids ----------------------------------------------------------------------------------------------------

/// A grid as codes are computed with it, and as it is stored.
struct FittedGrid {
    float lower, step, inverse;
    std::uint16_t stored_lower, stored_step;
};

/// The grid of values between two extremes, of every scheme but `unbiased`.
KVPLANE_DEVICE inline FittedGrid fitted_grid(Scheme scheme, int bits, float min, float max) {
    FittedGrid grid{};
    const float codes = static_cast<float>(1 << bits);
    const float low = magnitude_of(min), high = magnitude_of(max);
    if (scheme == Scheme::symmetric) {
        grid.stored_step =
            half_above(quotient_of(low < high ? high : low, static_cast<float>((1 << (bits - 1)) - 1)));
        grid.step = widened(grid.stored_step);
        grid.lower = product_of(grid.step, -0.5f * codes - 0.5f);
    } else if (scheme == Scheme::full_range) {
        grid.stored_step = half_above(quotient_of(low <= high ? high : low, 0.5f * codes));
        if ((low <= high ? max : min) > 0.0f) grid.stored_step |= 0x8000u;
        grid.step = widened(grid.stored_step);
        grid.lower = product_of(grid.step, -0.5f * codes - 0.5f);
    } else if (min == max) {
        grid.stored_lower = nearest_half(min);
        if (grid.stored_lower == 0x8000u) grid.stored_lower = 0;
        grid.lower = widened(grid.stored_lower);
    } else {
        float lower = min;
        if (scheme == Scheme::min_max)
            lower = difference_of(min, quotient_of(difference_of(max, min), 2.0f * codes - 2.0f));
        if (lower < -65504.0f) lower = -65504.0f;
        grid.stored_lower = half_below(lower);
        grid.lower = widened(grid.stored_lower);
        grid.stored_step = half_above(
            quotient_of(difference_of(max, grid.lower), scheme == Scheme::cell ? codes : codes - 0.5f));
        grid.step = widened(grid.stored_step);
    }
    grid.inverse = grid.step != 0.0f ? quotient_of(1.0f, grid.step) : 0.0f;
    return grid;
}

/// The cell of x, the nearest one where x lies outside all, as the float 2^23 + code: the code is in its
/// lowest byte. NaN gets 0.
KVPLANE_DEVICE inline float cell_of(float x, float lower, float inverse, float last) {
    return whole_sum_of(clamped(product_of(difference_of(x, lower), inverse), last), 0x1p23f);
}
/// The code of a cell as a number.
KVPLANE_DEVICE inline float number_of_cell(float cell) {
    return difference_of(cell, 0x1p23f);
}
/// The codes of four cells as the bytes of a word, the first one lowest.
KVPLANE_DEVICE inline std::uint32_t codes_of_cells(float a, float b, float c, float d) {
    return picked(picked(bits_of(a), bits_of(b), 0x0040), picked(bits_of(c), bits_of(d), 0x0040), 0x5410);
}

// Grids without bias ----------------------------------------------------------------------------------------

KVPLANE_DEVICE inline float gaussian_cell_width(int bits) {
    constexpr float widths[] = {1.596f, 0.9957f, 0.5860f, 0.3352f, 0.1881f, 0.1041f, 0.0568f, 0.0307f};
    return widths[bits - 1];
}
KVPLANE_DEVICE inline double elasticity_of_steps(int bits) {
    constexpr double elasticities[] = {0.0, 0.5445, 0.7964, 0.9153, 0.9670, 0.9879, 0.9957, 0.9985};
    return elasticities[bits - 1];
}

/// Cells around zero, by the squared norm of `used` numbers.
KVPLANE_DEVICE inline FittedGrid centred_cells(int bits, double squared, int used) {
    FittedGrid grid{};
    const float below = static_cast<float>(1 << bits) * 0.5f;
    const float width =
        product_of(gaussian_cell_width(bits),
                   static_cast<float>(root_of(quotient_of(squared, static_cast<double>(used)))));
    if (width < 0x1p-26f) return grid;
    grid.lower = product_of(-below, width);
    grid.inverse = quotient_of(1.0f, width);
    return grid;
}
/// The step by the codes in those cells, and the cells that go with it.
KVPLANE_DEVICE inline void choose_step(int bits, double squared, double product, FittedGrid& grid) {
    const double exact = product > 0.0 ? quotient_of(squared, product) : 0.0;
    const float wanted = static_cast<float>(exact), bounded = wanted < 61440.0f ? wanted : 61440.0f;
    const std::uint32_t byte = (nearest_half(bounded) + 64u) >> 7 & 0xFFu;
    grid.stored_step = static_cast<std::uint16_t>(byte << 7);
    grid.step = widened(grid.stored_step);
    const double elasticity = elasticity_of_steps(bits);
    if (elasticity == 0.0 || byte == 0 || grid.inverse == 0.0f) return;
    const double off = quotient_of(static_cast<double>(grid.step), exact);
    double wider = quotient_of(off - 1.0, elasticity);
    wider = wider < -0.25 ? -0.25 : wider > 0.25 ? 0.25 : wider;
    wider = sum_of(wider, 1.0);
    grid.lower = static_cast<float>(product_of(wider, static_cast<double>(grid.lower)));
    grid.inverse = quotient_of(-(static_cast<float>(1 << bits) * 0.5f), grid.lower);
}

}  // namespace kvplane::cuda::detail
