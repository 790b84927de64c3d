// kvplane/simd/half.hpp: fp16 arithmetic of vectors: widening, rounding in every direction, narrowing.
//
// All of it is exact or rounds once, as IEEE 754 says, and gives the same bits on every instruction set. It
// also does so in a thread that flushes subnormal numbers (torch, ONNX Runtime and objects linked with
// -ffast-math set that mode), because fp16's subnormals are normal in fp32 and nothing below 2^-126 arises
// from them. Only fp32 and bf16 numbers that are subnormal themselves count as zero there.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include "kvplane/simd/half_number.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/simd/vector.hpp"

namespace kvplane {

namespace detail::simd {

/// 16-bit elements in the upper halves of 32-bit lanes. A shuffle with zero: compilers make one instruction
/// of it where they make three of a widening conversion.
template <int Lanes, std::size_t... Place>
KVPLANE_INLINE void upper_halves(Ints<Lanes>& to, const void* from, std::index_sequence<Place...>) {
    Vector<std::uint16_t, Lanes> narrow, zero{};
    load(narrow, from);
    to = (Ints<Lanes>)__builtin_shufflevector(narrow, zero, (Place % 2 ? Place / 2 : Lanes)...);
}

#if defined(KVPLANE_X86)
/// By F16C's instruction, which is exact in every mode of the thread. Its intrinsics cannot be inlined into a
/// function that takes its target from its caller.
template <int Lanes>
KVPLANE_INLINE void convert_halves(Floats<Lanes>& to, const Eigen::half* from) {
#if defined(__clang__)
    Vector<__fp16, Lanes> halves;
    load(halves, from);
    to = __builtin_convertvector(halves, Floats<Lanes>);
#else
    struct __attribute__((may_alias)) Halves {
        std::uint16_t bits[Lanes];
    };
    asm("vcvtph2ps %1, %0" : "=v"(to) : "m"(*reinterpret_cast<const Halves*>(from)));
#endif
}
/// Back, to nearest, ties to even.
template <int Lanes>
KVPLANE_INLINE void convert_to_halves(Eigen::half* to, const Floats<Lanes>& from) {
#if defined(__clang__)
    store(to, __builtin_convertvector(from, Vector<__fp16, Lanes>));
#else
    struct __attribute__((may_alias)) Halves {
        std::uint16_t bits[Lanes];
    };
    asm("vcvtps2ph $0, %1, %0" : "=m"(*reinterpret_cast<Halves*>(to)) : "v"(from));
#endif
}
#endif

/// Lanes numbers of any of the three types to fp32: finite ones exactly, all others to what compares false with
/// <= fp16_max.
template <int Lanes>
KVPLANE_INLINE void widen(Floats<Lanes>& to, const Eigen::half* from) {
#if defined(KVPLANE_X86)
    if constexpr (Lanes >= 8) {  // every instruction set of so many lanes has F16C
        convert_halves<Lanes>(to, from);
        return;
    }
#endif
    // No operand and no result is a subnormal fp32 number. To move the bits to fp32's place and multiply by
    // 2^112 would be shorter, but takes fp16's subnormals for zero where the thread flushes them, and some
    // processors a hundred times as long.
    Ints<Lanes> bits;
    upper_halves<Lanes>(bits, from, std::make_index_sequence<2 * Lanes>{});
    const Ints<Lanes> magnitude = (bits >> 3) & 0x0FFFE000;
    const Floats<Lanes> subnormal = (Floats<Lanes>)(magnitude + (113 << 23)) - 0x1p-14f;
    const Ints<Lanes> value = magnitude < (1 << 23) ? (Ints<Lanes>)subnormal : magnitude + (112 << 23);
    to = (Floats<Lanes>)(value | (bits & (Ints<Lanes>{} + std::numeric_limits<std::int32_t>::min())));
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

/// x = magnitude with the sign's bit.
template <int Lanes>
KVPLANE_INLINE void split_sign(const Floats<Lanes>& x, Floats<Lanes>& magnitude, Words<Lanes>& sign) {
    sign = (Words<Lanes>)x & 0x80000000u;
    magnitude = (Floats<Lanes>)((Words<Lanes>)x & 0x7FFFFFFFu);
}

/// To the nearest fp16 number not above x. Zero comes out positive, here and below.
template <int Lanes>
KVPLANE_INLINE void round_below(Floats<Lanes>& x) {
    Floats<Lanes> magnitude;
    Words<Lanes> sign;
    split_sign<Lanes>(x, magnitude, sign);
    const HalfNeighbours<Lanes> near(magnitude);
    const Floats<Lanes> cut = sign != 0u ? near.away : near.toward_zero;
    x = (Floats<Lanes>)((Words<Lanes>)cut | sign) + 0.0f;
}

/// To the nearest fp16 number not below x, for x >= 0.
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

/// To the nearest fp16 number, ties to even.
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

/// Stores floats that hold fp16 values.
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

/// Stores the nearest fp16 numbers, ties to even, of magnitudes that round to at most fp16_max.
template <int Lanes>
KVPLANE_INLINE void store_nearest_half(Eigen::half* to, const Floats<Lanes>& x) {
#if defined(KVPLANE_X86)
    if constexpr (Lanes >= 8) {  // as in widen()
        convert_to_halves<Lanes>(to, x);
        return;
    }
#endif
    Words<Lanes> bits;
    nearest_half_bits<Lanes>(x, bits);
    store(to, __builtin_convertvector(bits, Vector<std::uint16_t, Lanes>));
}

}  // namespace detail::simd

/// `count` numbers of fp16 to float.
inline void widen_row(Isa isa, const Eigen::half* from, Index count, float* to) noexcept {
    detail::run_on(isa, [=](auto lanes) KVPLANE_BODY {
        Index i = 0;
        for (; i + lanes <= count; i += lanes) {
            detail::simd::Floats<lanes> wide;
            detail::simd::widen<lanes>(wide, from + i);
            detail::simd::store(to + i, wide);
        }
        for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
    });
}

/// `count` numbers of float to fp16, to nearest; magnitudes at most fp16_max.
inline void narrow_row(Isa isa, const float* from, Index count, Eigen::half* to) noexcept {
    detail::run_on(isa, [=](auto lanes) KVPLANE_BODY {
        namespace simd = detail::simd;
        Index i = 0;
        for (; i + lanes <= count; i += lanes) {
            simd::Floats<lanes> wide;
            simd::load(wide, from + i);
            simd::store_nearest_half<lanes>(to + i, wide);
        }
        for (; i < count; ++i) to[i] = static_cast<Eigen::half>(from[i]);
    });
}

}  // namespace kvplane
