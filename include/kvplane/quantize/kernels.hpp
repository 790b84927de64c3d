// kvplane/quantize/kernels.hpp: the loops of quantization, one source for every instruction set.
//
// The bodies are written once with the compilers' vector types, `Lanes` values at a time, and compiled for
// each instruction set by a function target attribute: 16 lanes for AVX-512, 8 for AVX2, 4 for the baseline
// (SSE2, Advanced SIMD). No inexact product feeds a sum, so contraction to fused multiply-add cannot change
// a bit: all instruction sets, and the scalar functions of grid.hpp, give the same grids and codes.
//
// Accumulators: fp32 minima and maxima (exact). Errors: those of Grid::encode and Grid::decode.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kvplane/isa.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/grid.hpp"

namespace kvplane {

/// Tokens as a kernel reads them: channels contiguous, one row every `stride` elements.
struct SourceRows {
    const void* data = nullptr;
    ScalarType type = ScalarType::float32;
    Index stride = 0;
};

/// Where fit_grids writes: one entry a group in each array. `stored_*` are the fp16 forms.
struct GridArrays {
    float* lower;
    float* step;
    float* inverse;  ///< 1 / step, 0 where step is 0
    Eigen::half* stored_lower;
    Eigen::half* stored_step;
};

/// Rows given to the kernels are padded to a multiple of this many channels.
inline constexpr Index kernel_channels = 16;
constexpr Index padded_channels(Index channels) noexcept {
    return (channels + kernel_channels - 1) / kernel_channels * kernel_channels;
}

namespace detail::quantize {

template <class T, int Lanes>
struct VectorOf {
    typedef T type __attribute__((vector_size(sizeof(T) * Lanes)));
};
template <class T, int Lanes>
using Vector = typename VectorOf<T, Lanes>::type;
template <int Lanes>
using Floats = Vector<float, Lanes>;
template <int Lanes>
using Words = Vector<std::uint32_t, Lanes>;
template <int Lanes>
using Ints = Vector<std::int32_t, Lanes>;

// Vectors are passed by reference: by value their calling convention would depend on the instruction set.
template <class V>
KVPLANE_INLINE void load(V& to, const void* from) {
    std::memcpy(&to, from, sizeof(V));
}
template <class V>
KVPLANE_INLINE void store(void* to, const V& from) {
    std::memcpy(to, &from, sizeof(V));
}

/// 16-bit elements in the upper halves of 32-bit lanes. A shuffle with zero: compilers make one instruction
/// of it where they make three of a widening conversion.
template <int Lanes, std::size_t... Place>
KVPLANE_INLINE void upper_halves(Ints<Lanes>& to, const void* from, std::index_sequence<Place...>) {
    Vector<std::uint16_t, Lanes> narrow, zero{};
    load(narrow, from);
    to = (Ints<Lanes>)__builtin_shufflevector(narrow, zero, (Place % 2 ? Place / 2 : Lanes)...);
}

/// fp16 to fp32, exactly. No operand and no result of the arithmetic is a subnormal fp32 number: a product
/// with 2^112 would be shorter, but takes fp16's subnormals for zero where another library has set
/// denormals-are-zero, and some processors a hundred times as long. Infinities and NaN come out as 65536 and
/// more, which is all the range check needs.
template <int Lanes>
KVPLANE_INLINE void widen(Floats<Lanes>& to, const Eigen::half* from) {
    Ints<Lanes> bits;
    upper_halves<Lanes>(bits, from, std::make_index_sequence<2 * Lanes>{});
    const Ints<Lanes> magnitude = (bits >> 3) & 0x0FFFE000;
    const Floats<Lanes> subnormal = (Floats<Lanes>)(magnitude + (113 << 23)) - 0x1p-14f;
    const Ints<Lanes> value = magnitude < (1 << 23) ? (Ints<Lanes>)subnormal : magnitude + (112 << 23);
    to = (Floats<Lanes>)((Words<Lanes>)value | ((Words<Lanes>)bits & 0x80000000u));
}
template <int Lanes>
KVPLANE_INLINE void widen(Floats<Lanes>& to, const Eigen::bfloat16* from) {
    Ints<Lanes> bits;
    upper_halves<Lanes>(bits, from, std::make_index_sequence<2 * Lanes>{});
    to = (Floats<Lanes>)bits;
}
template <int Lanes>
KVPLANE_INLINE void widen(Floats<Lanes>& to, const float* from) {
    load(to, from);
}

/// Stores the low byte of every lane.
template <int Lanes>
KVPLANE_INLINE void store_low_bytes(std::uint8_t* to, const Ints<Lanes>& from) {
    if constexpr (Lanes == 8) {
        const auto bytes = (Vector<std::uint8_t, 4 * Lanes>)from;
        const Vector<std::uint8_t, Lanes> low =
            __builtin_shufflevector(bytes, bytes, 0, 4, 8, 12, 16, 20, 24, 28);
        store(to, low);
    } else {
        // In two steps, for in one g++ 12 takes the lanes out one by one.
        const auto halves = __builtin_convertvector((Words<Lanes>)from, Vector<std::uint16_t, Lanes>);
        store(to, __builtin_convertvector(halves, Vector<std::uint8_t, Lanes>));
    }
}

/// Running extremes of one vector of values. NaN compares false and would slip through, so types that can
/// hold it also keep a mask of the values inside fp16's range; widened fp16 holds none.
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
        if constexpr (!std::is_same_v<Scalar, Eigen::half>)
            inside &= (Floats<Lanes>)((Words<Lanes>)x & 0x7FFFFFFFu) <= fp16_max;
    }
    /// All bits of a lane set where all its values can be stored.
    KVPLANE_INLINE void good_lanes(Ints<Lanes>& good) const {
        good &= inside & (min >= -fp16_max) & (max <= fp16_max);
    }
};

template <int Lanes>
KVPLANE_INLINE bool all_set(const Ints<Lanes>& good) {
    std::int32_t lanes = -1;
    for (int i = 0; i < Lanes; ++i) lanes &= good[i];
    return lanes != 0;
}

template <int Lanes, int Strips, class Scalar>
KVPLANE_INLINE void strip_extremes(const Scalar* data, Index stride, Index tokens, float* min, float* max,
                                   Ints<Lanes>& good) {
    Extremes<Lanes, Scalar> strips[Strips];
    for (int s = 0; s < Strips; ++s) strips[s].start(data + s * Lanes);
    // Rows of one head lie apart, often in another page of memory, where hardware does not look ahead.
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

/// The least and the greatest lane, by halving.
template <int Lanes>
KVPLANE_INLINE void across_lanes(const Floats<Lanes>& min, const Floats<Lanes>& max, float& least,
                                 float& greatest) {
    if constexpr (Lanes == 8) {
        const Floats<4> low = __builtin_shufflevector(min, min, 0, 1, 2, 3);
        const Floats<4> low2 = __builtin_shufflevector(min, min, 4, 5, 6, 7);
        const Floats<4> high = __builtin_shufflevector(max, max, 0, 1, 2, 3);
        const Floats<4> high2 = __builtin_shufflevector(max, max, 4, 5, 6, 7);
        across_lanes<4>(low < low2 ? low : low2, high2 < high ? high : high2, least, greatest);
    } else {
        const Floats<4> low = __builtin_shufflevector(min, min, 2, 3, 0, 1);
        const Floats<4> high = __builtin_shufflevector(max, max, 2, 3, 0, 1);
        const Floats<4> min2 = min < low ? min : low, max2 = high < max ? max : high;
        least = min2[0] < min2[1] ? min2[0] : min2[1];
        greatest = max2[1] < max2[0] ? max2[0] : max2[1];
    }
}

/// Eight lanes at most: the halving at the end of every run costs more than wider lanes save.
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

/// A magnitude cut to the fp16 values below and above it (equal where it is one); infinite where fp16 ends.
template <int Lanes>
struct HalfNeighbours {
    Floats<Lanes> toward_zero, away;

    KVPLANE_INLINE explicit HalfNeighbours(const Floats<Lanes>& magnitude) {
        const Floats<Lanes> tiny =
            __builtin_convertvector(__builtin_convertvector(magnitude * 0x1p24f, Ints<Lanes>), Floats<Lanes>);
        const Words<Lanes> cut = (Words<Lanes>)magnitude & ~0x1FFFu;
        const Ints<Lanes> is_normal = magnitude >= 0x1p-14f;
        toward_zero = is_normal ? (Floats<Lanes>)cut : tiny * 0x1p-24f;
        const Floats<Lanes> next = is_normal ? (Floats<Lanes>)(cut + 0x2000u) : (tiny + 1.0f) * 0x1p-24f;
        away = toward_zero < magnitude ? next : toward_zero;
        away = away > fp16_max ? Floats<Lanes>{} + std::numeric_limits<float>::infinity() : away;
    }
};

template <int Lanes>
KVPLANE_INLINE void split_sign(const Floats<Lanes>& x, Floats<Lanes>& magnitude, Words<Lanes>& sign) {
    sign = (Words<Lanes>)x & 0x80000000u;
    magnitude = (Floats<Lanes>)((Words<Lanes>)x & 0x7FFFFFFFu);
}

template <int Lanes>
KVPLANE_INLINE void round_below(Floats<Lanes>& x) {
    Floats<Lanes> magnitude;
    Words<Lanes> sign;
    split_sign<Lanes>(x, magnitude, sign);
    const HalfNeighbours<Lanes> near(magnitude);
    const Floats<Lanes> cut = sign != 0u ? near.away : near.toward_zero;
    x = (Floats<Lanes>)((Words<Lanes>)cut | sign) + 0.0f;
}

/// For x >= 0.
template <int Lanes>
KVPLANE_INLINE void round_above(Floats<Lanes>& x) {
    const HalfNeighbours<Lanes> near(x);
    x = near.away;
}

/// The fp16 bits of a float that holds an fp16 value.
template <int Lanes>
KVPLANE_INLINE void half_bits(const Floats<Lanes>& x, Words<Lanes>& bits) {
    Floats<Lanes> magnitude;
    Words<Lanes> sign;
    split_sign<Lanes>(x, magnitude, sign);
    const Words<Lanes> normal = ((Words<Lanes>)magnitude - (112u << 23)) >> 13;
    const Floats<Lanes> small = magnitude < 0x1p-14f ? magnitude : Floats<Lanes>{};
    const Words<Lanes> subnormal = (Words<Lanes>)__builtin_convertvector(small * 0x1p24f, Ints<Lanes>);
    const Words<Lanes> finite = magnitude < 0x1p-14f ? subnormal : normal;
    bits = (magnitude > fp16_max ? Words<Lanes>{} + 0x7C00u : finite) | sign >> 16;
}

template <int Lanes>
KVPLANE_INLINE void round_nearest(Floats<Lanes>& x) {
    Floats<Lanes> magnitude;
    Words<Lanes> sign, bits;
    split_sign<Lanes>(x, magnitude, sign);
    const HalfNeighbours<Lanes> near(magnitude);
    half_bits<Lanes>(near.toward_zero, bits);
    const Floats<Lanes> below = magnitude - near.toward_zero, above = near.away - magnitude;
    const Ints<Lanes> up = (above < below) | ((above == below) & ((bits & 1u) != 0u));
    const Floats<Lanes> rounded = up ? near.away : near.toward_zero;
    x = (Floats<Lanes>)((Words<Lanes>)rounded | sign) + 0.0f;
}

template <int Lanes>
KVPLANE_INLINE void store_half(Eigen::half* to, const Floats<Lanes>& x) {
    Words<Lanes> bits;
    half_bits<Lanes>(x, bits);
    store(to, __builtin_convertvector(bits, Vector<std::uint16_t, Lanes>));
}

/// fp16 bits of the nearest fp16 number, ties to even, of magnitudes that round to at most fp16_max.
template <int Lanes>
KVPLANE_INLINE void nearest_half_bits(const Floats<Lanes>& x, Words<Lanes>& bits) {
    Floats<Lanes> magnitude;
    Words<Lanes> sign;
    split_sign<Lanes>(x, magnitude, sign);
    const auto all = (Words<Lanes>)magnitude;
    const Words<Lanes> normal = (all - (112u << 23) + 0xFFFu + (all >> 13 & 1u)) >> 13;
    // A half's last place is 2^-24, which is also where fp16 numbers below 2^-14 end.
    const Words<Lanes> subnormal = (Words<Lanes>)(magnitude + 0.5f) - 0x3F000000u;
    bits = (magnitude < 0x1p-14f ? subnormal : normal) | sign >> 16;
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
        round_above<Lanes>(step);
        lower = -step * (0.5f * codes + 0.5f);
        return;
    }
    F constant = min;
    round_nearest<Lanes>(constant);
    lower = scheme == Scheme::cell ? min : min - (max - min) / (2.0f * codes - 2.0f);
    lower = lower < -fp16_max ? F{} - fp16_max : lower;
    round_below<Lanes>(lower);
    step = (max - lower) / (scheme == Scheme::cell ? codes : codes - 0.5f);
    round_above<Lanes>(step);
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
        const Floats<Lanes> inverse = step > 0.0f ? 1.0f / step : Floats<Lanes>{};
        store(grids.lower + i, lower);
        store(grids.step + i, step);
        store(grids.inverse + i, inverse);
        store_half<Lanes>(grids.stored_lower + i, lower);
        store_half<Lanes>(grids.stored_step + i, step);
    }
}

/// The position is within the cells, or a few beyond where values were clipped, so it fits an integer.
template <int Lanes, class Scalar>
KVPLANE_INLINE void encode_lanes(const Scalar* from, const Floats<Lanes>& lower, const Floats<Lanes>& inverse,
                                 int last, std::uint8_t* codes) {
    const Ints<Lanes> zero{}, top = zero + last;
    Floats<Lanes> x;
    widen<Lanes>(x, from);
    Ints<Lanes> cell = __builtin_convertvector((x - lower) * inverse, Ints<Lanes>);
    cell = cell > zero ? cell : zero;
    cell = cell < top ? cell : top;
    store_low_bytes<Lanes>(codes, cell);
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
    Vector<std::uint8_t, Lanes> narrow;
    load(narrow, codes);
    const Floats<Lanes> code =
        __builtin_convertvector(__builtin_convertvector(narrow, Ints<Lanes>), Floats<Lanes>);
    store(values, lower + step * (code + 0.5f));
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

template <int Lanes>
KVPLANE_INLINE void decode_rows(const std::uint8_t* codes, Index code_stride, Index tokens, Index channels,
                                Index group, const float* lower, const float* step, float* values,
                                Index value_stride) {
    for (Index t = 0; t < tokens; ++t) {
        for (Index first = 0; first < channels; first += group, ++lower, ++step) {
            const Floats<Lanes> low = Floats<Lanes>{} + *lower, scale = Floats<Lanes>{} + *step;
            for (Index c = first; c < first + group; c += Lanes)
                decode_lanes<Lanes>(codes + t * code_stride + c, low, scale, values + t * value_stride + c);
        }
    }
}

}  // namespace detail::quantize

namespace detail {

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

}  // namespace detail

// What the rest of the library calls. Pointers need no alignment; `channels` and `group` must be multiples of
// kernel_channels (scratch rows are padded to that).

/// Minima and maxima over `tokens` rows of each of `channels` columns. False when any value is NaN, infinite
/// or beyond fp16; the extremes mean nothing then.
inline bool column_extremes(Isa isa, SourceRows rows, Index tokens, Index channels, float* min, float* max) {
    return detail::with_scalar(rows, [&](const auto* data) {
        return run_on(isa, [&](auto lanes) KVPLANE_BODY {
            return detail::quantize::column_extremes<lanes>(data, rows.stride, tokens, channels, min, max);
        });
    });
}

/// The same for each run of `group` channels of each row, to [token * (channels / group) + run].
inline bool row_extremes(Isa isa, SourceRows rows, Index tokens, Index channels, Index group, float* min,
                         float* max) {
    return detail::with_scalar(rows, [&](const auto* data) {
        return run_on(isa, [&](auto lanes) KVPLANE_BODY {
            return detail::quantize::row_extremes<lanes>(data, rows.stride, tokens, channels, group, min,
                                                         max);
        });
    });
}

/// grid.hpp's fit_grid for `count` groups, a multiple of 16.
inline void fit_grids(Isa isa, Scheme scheme, int bits, Index count, const float* min, const float* max,
                      GridArrays grids) {
    return run_on(isa, [&](auto lanes) KVPLANE_BODY {
        return detail::quantize::fit_grids<lanes>(scheme, bits, count, min, max, grids);
    });
}

/// Codes of every value; the grid of channel c stands at [c].
inline void encode_columns(Isa isa, SourceRows rows, Index tokens, Index channels, int bits,
                           const float* lower, const float* inverse, std::uint8_t* codes, Index code_stride) {
    return detail::with_scalar(rows, [&](const auto* data) {
        return run_on(isa, [&](auto lanes) KVPLANE_BODY {
            return detail::quantize::encode_columns<lanes>(data, rows.stride, tokens, channels, bits, lower,
                                                           inverse, codes, code_stride);
        });
    });
}

/// Codes of every value; the grid of a run stands where row_extremes puts it.
inline void encode_rows(Isa isa, SourceRows rows, Index tokens, Index channels, Index group, int bits,
                        const float* lower, const float* inverse, std::uint8_t* codes, Index code_stride) {
    return detail::with_scalar(rows, [&](const auto* data) {
        return run_on(isa, [&](auto lanes) KVPLANE_BODY {
            return detail::quantize::encode_rows<lanes>(data, rows.stride, tokens, channels, group, bits,
                                                        lower, inverse, codes, code_stride);
        });
    });
}

/// lower + step (code + 1/2), with `step` that of the depth at which the codes were read.
inline void decode_columns(Isa isa, const std::uint8_t* codes, Index code_stride, Index tokens,
                           Index channels, const float* lower, const float* step, float* values,
                           Index value_stride) {
    return run_on(isa, [&](auto lanes) KVPLANE_BODY {
        return detail::quantize::decode_columns<lanes>(codes, code_stride, tokens, channels, lower, step,
                                                       values, value_stride);
    });
}

/// The same with a grid for each run of `group` channels of each row.
inline void decode_rows(Isa isa, const std::uint8_t* codes, Index code_stride, Index tokens, Index channels,
                        Index group, const float* lower, const float* step, float* values,
                        Index value_stride) {
    return run_on(isa, [&](auto lanes) KVPLANE_BODY {
        return detail::quantize::decode_rows<lanes>(codes, code_stride, tokens, channels, group, lower, step,
                                                    values, value_stride);
    });
}

/// float to fp16, to nearest; magnitudes at most fp16_max.
inline void narrow_row(Isa isa, const float* from, Index count, Eigen::half* to) noexcept {
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        namespace quantize = detail::quantize;
        Index i = 0;
        for (; i + lanes <= count; i += lanes) {
            quantize::Floats<lanes> wide;
            quantize::Words<lanes> bits;
            quantize::load(wide, from + i);
            quantize::nearest_half_bits<lanes>(wide, bits);
            quantize::store(to + i, __builtin_convertvector(bits, quantize::Vector<std::uint16_t, lanes>));
        }
        for (; i < count; ++i) to[i] = static_cast<Eigen::half>(from[i]);
    });
}

/// The largest magnitude of `count` numbers, 0 of none; not finite where one of them is not.
template <CacheScalar Scalar>
float largest_magnitude(Isa isa, const Scalar* from, Index count) noexcept {
    // As integers, for so infinity is above all numbers, and NaN above infinity.
    using Bits = std::conditional_t<sizeof(Scalar) == 4, std::int32_t, std::int16_t>;
    constexpr Bits magnitude = std::numeric_limits<Bits>::max();
    return run_on(isa, [=](auto lanes) KVPLANE_BODY {
        namespace quantize = detail::quantize;
        constexpr int places = lanes * 4 / static_cast<int>(sizeof(Scalar));
        quantize::Vector<Bits, places> largest{}, bits;
        Index i = 0;
        for (; i + places <= count; i += places) {
            quantize::load(bits, from + i);
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
/// fp16 to float.
inline void widen_row(Isa isa, const Eigen::half* from, Index count, float* to) noexcept {
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        Index i = 0;
        for (; i + lanes <= count; i += lanes) {
            detail::quantize::Floats<lanes> wide;
            detail::quantize::widen<lanes>(wide, from + i);
            detail::quantize::store(to + i, wide);
        }
        for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
    });
}

}  // namespace kvplane
