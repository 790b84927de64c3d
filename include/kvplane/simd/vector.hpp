// kvplane/simd/vector.hpp: the compilers' vector types, and what kernels do with them beyond arithmetic.
//
// A kernel is written once, `Lanes` fp32 numbers at a time, and compiled for each instruction set by
// run_on(): 16 lanes for AVX-512, 8 for AVX2, 4 for the baseline (SSE2, Advanced SIMD). Operators of C++ are
// arithmetic, lane by lane; a comparison gives -1 or 0 in every lane, and `mask ? a : b` chooses.
//
// The namespace is detail::simd, not detail: load, store and plus are words that other parts want as well.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kvplane/simd/isa.hpp"

namespace kvplane::detail::simd {

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

/// Lanes bytes as integers.
template <int Lanes>
KVPLANE_INLINE void load_bytes(Ints<Lanes>& to, const std::uint8_t* from) {
    Vector<std::uint8_t, Lanes> bytes;
    load(bytes, from);
    // In two steps, as in store_low_bytes().
    to = __builtin_convertvector(__builtin_convertvector(bytes, Vector<std::uint16_t, Lanes>), Ints<Lanes>);
}

/// Keeps compilers from reading a vector from memory again for each of its uses.
template <class V>
KVPLANE_INLINE void keep_in_register([[maybe_unused]] V& x) {
#if defined(KVPLANE_X86) && !defined(__clang__)
    asm("" : "+v"(x));
#endif
}

/// To doubles.
template <int Lanes>
KVPLANE_INLINE void widen_doubles(Vector<double, Lanes>& to, const Floats<Lanes>& from) {
#if defined(KVPLANE_X86) && !defined(__clang__)
    // One instruction of AVX2 and AVX-512, which alone have vectors of so many doubles. g++ 12 makes two halves.
    if constexpr (Lanes == 4 || Lanes == 8) {
        asm("vcvtps2pd %1, %0" : "=v"(to) : "v"(from));
        return;
    }
#endif
    to = __builtin_convertvector(from, Vector<double, Lanes>);
}

/// product = a b, rounded on every instruction set, even where compilers contract a product and a sum to one
/// operation.
template <int Lanes>
KVPLANE_INLINE void multiply_rounded(Floats<Lanes>& product, const Floats<Lanes>& a, const Floats<Lanes>& b) {
#if defined(__clang__)
#pragma clang fp contract(off)
    product = a * b;
#else
    product = a * b;
#if defined(KVPLANE_X86)
    asm("" : "+v"(product));  // g++ contracts across statements, but not across this
#elif defined(__aarch64__)
    asm("" : "+w"(product));
#endif
#endif
}

/// sum += the products of both 16-bit halves of each lane.
template <int Lanes>
KVPLANE_INLINE void add_products(Ints<Lanes>& sum, const Ints<Lanes>& a, const Ints<Lanes>& b) {
#if defined(KVPLANE_X86) && !defined(__clang__)
    // g++ does not see one instruction in the expression below, and intrinsics cannot be inlined into a
    // function that takes its target from its caller.
    if constexpr (Lanes == 16) {
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    } else if constexpr (Lanes == 8) {
        Ints<Lanes> products;
        asm("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(a), "x"(b));
        sum += products;
    } else {
        using Shorts = Vector<short, 2 * Lanes>;
        sum += (Ints<Lanes>)__builtin_ia32_pmaddwd128((Shorts)a, (Shorts)b);
    }
#else
    sum += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

/// All bits of the first `count` lanes, of all lanes if there are not so many.
template <int Lanes>
KVPLANE_INLINE void first_lanes(Ints<Lanes>& mask, std::ptrdiff_t count) {
    Ints<Lanes> lane;
    for (int i = 0; i < Lanes; ++i) lane[i] = i;
    mask = lane < static_cast<std::int32_t>(count);
}

/// Whether all bits of all lanes are set.
template <int Lanes>
KVPLANE_INLINE bool all_set(const Ints<Lanes>& good) {
    std::int32_t lanes = -1;
    for (int i = 0; i < Lanes; ++i) lanes &= good[i];
    return lanes != 0;
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

/// Two vectors of `from` rows each, Lanes / from lanes a row, to one vector of 2 from rows: combine() takes
/// the lower half of every row of both, and the upper half.
template <int Lanes, int from, class Combine, std::size_t... Place>
KVPLANE_INLINE void merge_rows(Floats<Lanes>& to, const Floats<Lanes>& a, const Floats<Lanes>& b,
                               const Combine& combine, std::index_sequence<Place...>) {
    constexpr int half = Lanes / from / 2;
    const Floats<Lanes> low = __builtin_shufflevector(a, b, (Place / half * 2 * half + Place % half)...),
                        high =
                            __builtin_shufflevector(a, b, (Place / half * 2 * half + Place % half + half)...);
    combine(to, low, high);
}
/// Every run of `width` lanes combined, by halving; all lanes of a run then hold the result.
template <int Lanes, int width, class Combine, std::size_t... Place>
KVPLANE_INLINE void fold_lanes(Floats<Lanes>& x, const Combine& combine,
                               std::index_sequence<Place...> places) {
    if constexpr (width > 1) {
        const Floats<Lanes> other = __builtin_shufflevector(x, x, (Place ^ (width / 2))...);
        combine(x, x, other);
        fold_lanes<Lanes, width / 2>(x, combine, places);
    }
}
/// to[r] = all lanes of rows[r], combined, for four rows.
template <int Lanes, class Combine>
KVPLANE_INLINE void reduce_rows(const Floats<Lanes>* rows, float* to, const Combine& combine) {
    constexpr auto places = std::make_index_sequence<Lanes>{};
    Floats<Lanes> first, second, all;
    merge_rows<Lanes, 1>(first, rows[0], rows[1], combine, places);
    merge_rows<Lanes, 1>(second, rows[2], rows[3], combine, places);
    merge_rows<Lanes, 2>(all, first, second, combine, places);
    fold_lanes<Lanes, Lanes / 4>(all, combine, places);
    for (int r = 0; r < 4; ++r) to[r] = all[r * (Lanes / 4)];
}
inline constexpr auto plus = [](auto& to, const auto& a, const auto& b) KVPLANE_BODY { to = a + b; };
inline constexpr auto larger = [](auto& to, const auto& a, const auto& b)
                                   KVPLANE_BODY { to = a < b ? b : a; };

template <int Lanes>
KVPLANE_INLINE float sum_lanes(const Floats<Lanes>& x) {
    Floats<Lanes> all = x;
    fold_lanes<Lanes, Lanes>(all, plus, std::make_index_sequence<Lanes>{});
    return all[0];
}

/// Calls body(count, first) for four rows at a time, then for the one to three that are left. count is an
/// integral constant.
template <class Count, class Body>
KVPLANE_INLINE void by_rows(Count rows, const Body& body) {
    Count row = 0;
    for (; row + 4 <= rows; row += 4) body(LaneCount<4>{}, row);
    if (rows - row == 3)
        body(LaneCount<3>{}, row);
    else if (rows - row == 2)
        body(LaneCount<2>{}, row);
    else if (rows - row == 1)
        body(LaneCount<1>{}, row);
}

/// 1.5 2^23. Adding it to a number below 2^22 leaves the nearest integer in the low bits, ties to even:
/// (Ints)(x + to_whole) - to_whole_bits. Taking it back as a float would do too, but not where a compiler may
/// reassociate.
inline constexpr float to_whole = 12582912.0f;
inline constexpr std::int32_t to_whole_bits = 0x4B400000;

/// x = e^x for x <= 0, off by at most 3e-7 + 8e-8 |x| of it (log2 e and its product are rounded), so by less
/// than 3e-7 absolutely. 0 below -87.7, where numbers cease to be normal, -infinity included.
template <int Lanes>
KVPLANE_INLINE void exponential(Floats<Lanes>& x) {
    constexpr float log2_e = 1.44269504f;
    // -88 gives 2^-127, whose bits are 0.
    const Floats<Lanes> bounded = x < -88.0f ? Floats<Lanes>{} - 88.0f : x;
    const Floats<Lanes> scaled = bounded * log2_e + to_whole;
    const Ints<Lanes> whole = (Ints<Lanes>)scaled - to_whole_bits;
    const Floats<Lanes> f = bounded * log2_e - __builtin_convertvector(whole, Floats<Lanes>);
    // 2^f for |f| <= 1/2, the polynomial of least relative error (7.5e-8).
    Floats<Lanes> p = f * 1.327647217e-3f + 9.675541331e-3f;
    p = p * f + 5.550713273e-2f;
    p = p * f + 0.2402211972f;
    p = p * f + 0.6931469671f;
    p = p * f + 1.000000072f;
    const Ints<Lanes> power = (whole + 127) << 23;
    x = p * (Floats<Lanes>)power;
}

}  // namespace kvplane::detail::simd
