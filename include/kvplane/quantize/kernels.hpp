// kvplane/quantize/kernels.hpp: the loops of quantization, one source for every instruction set.
//
// The bodies are written once with the vectors of simd/vector.hpp and are compiled for each instruction set.
// No inexact product feeds a sum, so contraction to fused multiply-add cannot change a bit. All instruction
// sets and the scalar functions of grid.hpp therefore give the same grids and codes.
//
// Accumulators: fp32 minima and maxima (exact). Errors: those of Grid::encode and Grid::decode.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kvplane/matrix.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/simd/half.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/simd/vector.hpp"

namespace kvplane::detail {

/// Tokens as a kernel reads them: channels contiguous, one row every `stride` elements.
struct SourceRows {
    const void* data = nullptr;
    ScalarType type = ScalarType::float32;
    Index stride = 0;
};

/// Where fit_grids writes: arrays [group]. `stored_*` are the fp16 forms.
struct GridArrays {
    float* lower;
    float* step;
    float* inverse;  ///< 1 / step, or 0 where step is 0
    Eigen::half* stored_lower;
    Eigen::half* stored_step;
};

/// Rows given to the kernels are padded to a multiple of this many channels.
inline constexpr Index kernel_channels = 16;
constexpr Index padded_channels(Index channels) noexcept {
    return (channels + kernel_channels - 1) / kernel_channels * kernel_channels;
}

namespace grid_kernels {

using simd::across_lanes;
using simd::all_set;
using simd::Floats;
using simd::Ints;
using simd::load;
using simd::store;
using simd::Vector;
using simd::widen;
using simd::Words;

/// Running extremes of one vector of values, and whether all values are inside fp16's range. The extremes
/// alone would miss NaN, because NaN compares false.
template <int Lanes, class Scalar>
struct Extremes {
    Floats<Lanes> min, max;
    Ints<Lanes> inside;

    KVPLANE_INLINE void start(const Scalar* from) {
        widen<Lanes>(min, from);
        max = min;
        inside = Ints<Lanes>{} - 1;
        check(min);
    }
    KVPLANE_INLINE void keep(const Scalar* from) {
        Floats<Lanes> x;
        widen<Lanes>(x, from);
        min = x < min ? x : min;
        max = max < x ? x : max;
        check(x);
    }
    KVPLANE_INLINE void check(const Floats<Lanes>& x) {
        inside &= (Floats<Lanes>)((Words<Lanes>)x & 0x7FFFFFFFu) <= fp16_max;
    }
    /// Keeps all bits of a lane of `good` set if all values of the lane can be stored, and clears them
    /// otherwise.
    KVPLANE_INLINE void good_lanes(Ints<Lanes>& good) const { good &= inside; }
};

template <int Lanes, int Strips, class Scalar>
KVPLANE_INLINE void strip_extremes(const Scalar* data, Index stride, Index tokens, float* min, float* max,
                                   Ints<Lanes>& good) {
    Extremes<Lanes, Scalar> strips[Strips];
    for (int s = 0; s < Strips; ++s) strips[s].start(data + s * Lanes);
    // Rows of one head lie apart, often on different pages of memory, where hardware does not prefetch.
    constexpr int line = 64 / static_cast<int>(sizeof(Scalar)), rows_ahead = 16;
    for (Index t = 1; t < tokens; ++t) {
        if (t + rows_ahead < tokens)
            for (int c = 0; c < Strips * Lanes; c += line)
                __builtin_prefetch(data + (t + rows_ahead) * stride + c);
        for (int s = 0; s < Strips; ++s) strips[s].keep(data + t * stride + s * Lanes);
    }
    for (int s = 0; s < Strips; ++s) {
        store(min + s * Lanes, strips[s].min);
        store(max + s * Lanes, strips[s].max);
        strips[s].good_lanes(good);
    }
}

template <int Lanes, class Scalar>
KVPLANE_INLINE bool column_extremes(const Scalar* data, Index stride, Index tokens, Index channels,
                                    float* min, float* max) {
    constexpr int strips = 4;
    Ints<Lanes> good = Ints<Lanes>{} - 1;
    Index c = 0;
    for (; c + strips * Lanes <= channels; c += strips * Lanes)
        strip_extremes<Lanes, strips>(data + c, stride, tokens, min + c, max + c, good);
    for (; c < channels; c += Lanes)
        strip_extremes<Lanes, 1>(data + c, stride, tokens, min + c, max + c, good);
    return all_set<Lanes>(good);
}

/// Uses 8 lanes at most, because the halving at the end of every run costs more than wider vectors save.
template <int Lanes, class Scalar>
KVPLANE_INLINE bool row_extremes(const Scalar* data, Index stride, Index tokens, Index channels, Index group,
                                 float* min, float* max) {
    constexpr int lanes = Lanes < 8 ? Lanes : 8;
    Ints<lanes> good = Ints<lanes>{} - 1;
    for (Index t = 0; t < tokens; ++t) {
        for (Index c = 0; c < channels; c += group) {
            const Scalar* run = data + t * stride + c;
            Extremes<lanes, Scalar> extremes;
            extremes.start(run);
            for (Index i = lanes; i < group; i += lanes) extremes.keep(run + i);
            extremes.good_lanes(good);
            across_lanes<lanes>(extremes.min, extremes.max, *min++, *max++);
        }
    }
    return all_set<lanes>(good);
}

/// grid.hpp's fit_grid, `Lanes` groups at a time, operation by operation.
template <int Lanes>
KVPLANE_INLINE void fit_lanes(Scheme scheme, int bits, const Floats<Lanes>& min, const Floats<Lanes>& max,
                              Floats<Lanes>& lower, Floats<Lanes>& step) {
    using F = Floats<Lanes>;
    const auto codes = static_cast<float>(1 << bits);
    if (scheme == Scheme::symmetric) {
        const F low = (F)((Words<Lanes>)min & 0x7FFFFFFFu), high = (F)((Words<Lanes>)max & 0x7FFFFFFFu);
        step = (low < high ? high : low) / static_cast<float>((1 << (bits - 1)) - 1);
        simd::round_above<Lanes>(step);
        lower = step * lower_in_steps(scheme, bits);
        return;
    }
    if (scheme == Scheme::full_range) {
        const F low = (F)((Words<Lanes>)min & 0x7FFFFFFFu), high = (F)((Words<Lanes>)max & 0x7FFFFFFFu);
        step = (low <= high ? high : low) / (0.5f * codes);
        simd::round_above<Lanes>(step);
        step = (low <= high ? max : min) > 0.0f ? -step : step;
        lower = step * lower_in_steps(scheme, bits);
        return;
    }
    F constant = min;
    simd::round_nearest<Lanes>(constant);
    lower = scheme == Scheme::cell ? min : min - (max - min) / (2.0f * codes - 2.0f);
    lower = lower < -fp16_max ? F{} - fp16_max : lower;
    simd::round_below<Lanes>(lower);
    step = (max - lower) / (scheme == Scheme::cell ? codes : codes - 0.5f);
    simd::round_above<Lanes>(step);
    lower = min == max ? constant : lower;
    step = min == max ? F{} : step;
}

template <int Lanes>
KVPLANE_INLINE void fit_grids(Scheme scheme, int bits, Index count, const float* min, const float* max,
                              GridArrays grids) {
    for (Index i = 0; i < count; i += Lanes) {
        Floats<Lanes> low, high, lower, step;
        load(low, min + i);
        load(high, max + i);
        fit_lanes<Lanes>(scheme, bits, low, high, lower, step);
        const Floats<Lanes> inverse = step != 0.0f ? 1.0f / step : Floats<Lanes>{};
        store(grids.lower + i, lower);
        store(grids.step + i, step);
        store(grids.inverse + i, inverse);
        simd::store_half<Lanes>(grids.stored_lower + i, lower);
        simd::store_half<Lanes>(grids.stored_step + i, step);
    }
}

/// The position lies within the cells, or a few beyond if values were clipped, so it fits an integer.
template <int Lanes>
KVPLANE_INLINE void cells_of(const Floats<Lanes>& x, const Floats<Lanes>& lower, const Floats<Lanes>& inverse,
                             int last, Ints<Lanes>& cells) {
    const Ints<Lanes> zero{}, top = zero + last;
    const Ints<Lanes> cell = __builtin_convertvector((x - lower) * inverse, Ints<Lanes>),
                      above = cell > zero ? cell : zero;
    cells = above < top ? above : top;
}
template <int Lanes, class Scalar>
KVPLANE_INLINE void encode_lanes(const Scalar* from, const Floats<Lanes>& lower, const Floats<Lanes>& inverse,
                                 int last, std::uint8_t* codes) {
    Floats<Lanes> x;
    widen<Lanes>(x, from);
    Ints<Lanes> cells;
    cells_of<Lanes>(x, lower, inverse, last, cells);
    simd::store_low_bytes<Lanes>(codes, cells);
}

template <int Lanes, class Scalar>
KVPLANE_INLINE void encode_columns(const Scalar* data, Index stride, Index tokens, Index channels, int bits,
                                   const float* lower, const float* inverse, std::uint8_t* codes,
                                   Index code_stride) {
    const int last = (1 << bits) - 1;
    for (Index t = 0; t < tokens; ++t) {
        for (Index c = 0; c < channels; c += Lanes) {
            Floats<Lanes> low, scale;
            load(low, lower + c);
            load(scale, inverse + c);
            encode_lanes<Lanes>(data + t * stride + c, low, scale, last, codes + t * code_stride + c);
        }
    }
}

template <int Lanes, class Scalar>
KVPLANE_INLINE void encode_rows(const Scalar* data, Index stride, Index tokens, Index channels, Index group,
                                int bits, const float* lower, const float* inverse, std::uint8_t* codes,
                                Index code_stride) {
    const int last = (1 << bits) - 1;
    for (Index t = 0; t < tokens; ++t) {
        for (Index first = 0; first < channels; first += group, ++lower, ++inverse) {
            const Floats<Lanes> low = Floats<Lanes>{} + *lower, scale = Floats<Lanes>{} + *inverse;
            for (Index c = first; c < first + group; c += Lanes)
                encode_lanes<Lanes>(data + t * stride + c, low, scale, last, codes + t * code_stride + c);
        }
    }
}

template <int Lanes>
KVPLANE_INLINE void decode_lanes(const std::uint8_t* codes, const Floats<Lanes>& lower,
                                 const Floats<Lanes>& step, float* values) {
    Ints<Lanes> code;
    simd::load_bytes<Lanes>(code, codes);
    store(values, lower + step * (__builtin_convertvector(code, Floats<Lanes>) + 0.5f));
}

template <int Lanes>
KVPLANE_INLINE void decode_columns(const std::uint8_t* codes, Index code_stride, Index tokens, Index channels,
                                   const float* lower, const float* step, float* values, Index value_stride) {
    for (Index t = 0; t < tokens; ++t) {
        for (Index c = 0; c < channels; c += Lanes) {
            Floats<Lanes> low, scale;
            load(low, lower + c);
            load(scale, step + c);
            decode_lanes<Lanes>(codes + t * code_stride + c, low, scale, values + t * value_stride + c);
        }
    }
}

}  // namespace grid_kernels

/// Calls body(pointer of the type that the rows have).
template <class Body>
auto with_scalar(SourceRows rows, const Body& body) {
    switch (rows.type) {
        case ScalarType::float16:
            return body(static_cast<const Eigen::half*>(rows.data));
        case ScalarType::bfloat16:
            return body(static_cast<const Eigen::bfloat16*>(rows.data));
        default:
            return body(static_cast<const float*>(rows.data));
    }
}

// What the rest of the library calls. Pointers need no alignment; `channels` and `group` must be multiples of
// kernel_channels (scratch rows are padded to that).

/// Writes min and max [channel], each over `tokens` rows. Returns false if any value is NaN, infinite or
/// beyond fp16; the extremes are then meaningless.
inline bool column_extremes(Isa isa, SourceRows rows, Index tokens, Index channels, float* min, float* max) {
    return with_scalar(rows, [&](const auto* data) {
        return run_on(isa, [&](auto lanes) KVPLANE_BODY {
            return grid_kernels::column_extremes<lanes>(data, rows.stride, tokens, channels, min, max);
        });
    });
}

/// The same for each run of `group` channels of each row: min and max are [token][run of channels].
inline bool row_extremes(Isa isa, SourceRows rows, Index tokens, Index channels, Index group, float* min,
                         float* max) {
    return with_scalar(rows, [&](const auto* data) {
        return run_on(isa, [&](auto lanes) KVPLANE_BODY {
            return grid_kernels::row_extremes<lanes>(data, rows.stride, tokens, channels, group, min, max);
        });
    });
}

/// grid.hpp's fit_grid for `count` groups, a multiple of 16.
inline void fit_grids(Isa isa, Scheme scheme, int bits, Index count, const float* min, const float* max,
                      GridArrays grids) {
    return run_on(isa, [&](auto lanes) KVPLANE_BODY {
        return grid_kernels::fit_grids<lanes>(scheme, bits, count, min, max, grids);
    });
}

/// Writes the code of every value. lower and inverse are [channel].
inline void encode_columns(Isa isa, SourceRows rows, Index tokens, Index channels, int bits,
                           const float* lower, const float* inverse, std::uint8_t* codes, Index code_stride) {
    return with_scalar(rows, [&](const auto* data) {
        return run_on(isa, [&](auto lanes) KVPLANE_BODY {
            return grid_kernels::encode_columns<lanes>(data, rows.stride, tokens, channels, bits, lower,
                                                       inverse, codes, code_stride);
        });
    });
}

/// Writes the code of every value. lower and inverse are [token][run of channels], as in row_extremes.
inline void encode_rows(Isa isa, SourceRows rows, Index tokens, Index channels, Index group, int bits,
                        const float* lower, const float* inverse, std::uint8_t* codes, Index code_stride) {
    return with_scalar(rows, [&](const auto* data) {
        return run_on(isa, [&](auto lanes) KVPLANE_BODY {
            return grid_kernels::encode_rows<lanes>(data, rows.stride, tokens, channels, group, bits, lower,
                                                    inverse, codes, code_stride);
        });
    });
}

/// Writes lower + step (code + 1/2). `step` [channel] is the step at the depth at which the codes were read.
inline void decode_columns(Isa isa, const std::uint8_t* codes, Index code_stride, Index tokens,
                           Index channels, const float* lower, const float* step, float* values,
                           Index value_stride) {
    return run_on(isa, [&](auto lanes) KVPLANE_BODY {
        return grid_kernels::decode_columns<lanes>(codes, code_stride, tokens, channels, lower, step, values,
                                                   value_stride);
    });
}

/// The largest magnitude of `count` numbers, or 0 if there are none. It is not finite if one of them is not.
template <CacheScalar Scalar>
float largest_magnitude(Isa isa, const Scalar* from, Index count) noexcept {
    // Compared as integers, because infinity is then above all numbers, and NaN above infinity.
    using Bits = std::conditional_t<sizeof(Scalar) == 4, std::int32_t, std::int16_t>;
    constexpr Bits magnitude = std::numeric_limits<Bits>::max();
    return run_on(isa, [=](auto lanes) KVPLANE_BODY {
        namespace simd = simd;
        constexpr int places = lanes * 4 / static_cast<int>(sizeof(Scalar));
        simd::Vector<Bits, places> largest{}, bits;
        Index i = 0;
        for (; i + places <= count; i += places) {
            simd::load(bits, from + i);
            bits &= magnitude;
            largest = largest < bits ? bits : largest;
        }
        Bits all = 0;
        for (int place = 0; place < places; ++place) all = std::max<Bits>(all, largest[place]);
        for (; i < count; ++i) {
            Bits one;
            std::memcpy(&one, from + i, sizeof one);
            all = std::max<Bits>(all, static_cast<Bits>(one & magnitude));
        }
        Scalar result;
        std::memcpy(static_cast<void*>(&result), &all, sizeof all);
        return static_cast<float>(result);
    });
}

/// `count` numbers to float. Returns the largest magnitude, or 0 if there are none; one that is not at most
/// fp16_max if a number is NaN, infinite or beyond fp16.
template <CacheScalar Scalar>
float widen_checked(Isa isa, const Scalar* from, Index count, float* to) noexcept {
    return run_on(isa, [=](auto lanes) KVPLANE_BODY {
        namespace simd = simd;
        constexpr std::int32_t magnitude = std::numeric_limits<std::int32_t>::max();
        simd::Ints<lanes> largest{};
        simd::Floats<lanes> x;
        Index i = 0;
        for (; i + lanes <= count; i += lanes) {
            simd::widen<lanes>(x, from + i);
            simd::store(to + i, x);
            const auto bits = (simd::Ints<lanes>)x & magnitude;
            largest = largest < bits ? bits : largest;
        }
        std::int32_t all = 0, one;
        for (int lane = 0; lane < lanes; ++lane) all = std::max<std::int32_t>(all, largest[lane]);
        for (; i < count; ++i) {
            to[i] = static_cast<float>(from[i]);
            std::memcpy(&one, to + i, sizeof one);
            all = std::max<std::int32_t>(all, one & magnitude);
        }
        float result;
        std::memcpy(&result, &all, sizeof all);
        return result;
    });
}

}  // namespace kvplane::detail
