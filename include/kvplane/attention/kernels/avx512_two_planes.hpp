// kvplane/attention/kernels/avx512_two_planes.hpp: codes of two planes put together in registers (AVX-512).
//
// Codes put together are as fast to multiply as those of one plane. vpdpbusd multiplies unsigned bytes by
// signed ones without saturation, so a code of 8 bits fits. Sums are exact.
#pragma once

#include <utility>
#include "kvplane/attention/kernels/avx512.hpp"
#include "kvplane/attention/kernels/avx512_factors.hpp"

#if defined(KVPLANE_X86)
namespace kvplane::detail::avx512 {

/// Fields of `a` where the mask is set, of `b` elsewhere.
KVPLANE_TARGET_AVX512 KVPLANE_INLINE __m512i either(const __m512i& mask, const __m512i& a,
                                                    const __m512i& b) noexcept {
    return _mm512_ternarylogic_epi32(mask, a, b, 0xCA);
}
KVPLANE_TARGET_AVX512 KVPLANE_INLINE __m512i shifted_right(const __m512i& x, int by) noexcept {
    return (__m512i)((Shorts)x >> static_cast<std::uint16_t>(by));
}
KVPLANE_TARGET_AVX512 KVPLANE_INLINE __m512i shifted_left(const __m512i& x, int by) noexcept {
    return (__m512i)((Shorts)x << static_cast<std::uint16_t>(by));
}
KVPLANE_TARGET_AVX512 KVPLANE_INLINE __m512i four_factors(const std::int8_t* from) noexcept {
    int four;
    std::memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

/// `a` where the mask is set, together with `b`, which has no bits there.
KVPLANE_TARGET_AVX512 KVPLANE_INLINE __m512i masked_or(const __m512i& mask, const __m512i& a,
                                                       const __m512i& b) noexcept {
    return _mm512_ternarylogic_epi32(a, mask, b, 0xEA);
}
/// To the right by a constant, or to the left where that is negative.
template <int by>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE __m512i moved_right(const __m512i& x) noexcept {
    if constexpr (by == 0) return x;
    if constexpr (by < 0) return shifted_left(x, -by);
    return shifted_right(x, by);
}

/// The codes of one unit in planes {4, width}: of even fields in the low bits, and of odd ones where the upper four
/// bits of a byte are their first plane, so that no bits of the first plane move that need not. `part` is the unit's
/// place among those that share a unit of the second plane.
template <int width, int part>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void join_planes(const __m512i& first, const __m512i& second,
                                                      __m512i& even, __m512i& odd) noexcept {
    constexpr int of_even = 2 * width * part, of_odd = 2 * width * (part + 1) - 4,
                  low_bits = (1 << width) - 1;
    const __m512i below_even = moved_right<of_even>(second), below_odd = moved_right<of_odd>(second),
                  above_even = shifted_left(first, width);
    if constexpr (width == 4) {
        const __m512i low_half = _mm512_set1_epi8(15);
        even = either(low_half, below_even, above_even);
        odd = either(low_half, below_odd, first);
    } else {
        const __m512i low = _mm512_set1_epi8(low_bits), high = _mm512_set1_epi8(low_bits << (4 - width));
        even = masked_or(_mm512_set1_epi8(15 << width), above_even, below_even & low);
        odd = masked_or(_mm512_set1_epi8(static_cast<char>(0xF0)), first, below_odd & high);
    }
}

/// The sums of one block for some rows, so far: of high factors with codes, and of low ones with the first plane
/// alone, each of even and of odd fields.
template <int rows>
struct PairSums {
    Words whole[2][rows], first[2][rows];
    const std::int8_t *high_factors[rows], *low_factors[rows];
};
template <int width, int rows, int part>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void add_unit(const __m512i& first, const __m512i& second, Index unit,
                                                   PairSums<rows>& sums) noexcept {
    __m512i code[2];
    join_planes<width, part>(first, second, code[0], code[1]);
    const __m512i field[2] = {first & _mm512_set1_epi8(15),
                              first & _mm512_set1_epi8(static_cast<char>(0xF0))};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const Index place = (unit * 2 + i) * 4;
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            sums.whole[i][r] = (Words)_mm512_dpbusd_epi32((__m512i)sums.whole[i][r], code[i],
                                                          four_factors(sums.high_factors[r] + place));
            sums.first[i][r] = (Words)_mm512_dpbusd_epi32((__m512i)sums.first[i][r], field[i],
                                                          four_factors(sums.low_factors[r] + place));
        }
    }
}
/// The units from `unit` on that share a unit of the second plane, of which `count` are there.
template <int width, int rows, int... parts>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void add_units(const std::byte* first, const std::byte* first_next,
                                                    const __m512i& second, Index unit, Index count,
                                                    PairSums<rows>& sums,
                                                    std::integer_sequence<int, parts...>) noexcept {
    const auto add = [&](auto part) KVPLANE_BODY KVPLANE_TARGET_AVX512 {
        if (part >= count) return;
        _mm_prefetch(reinterpret_cast<const char*>(first_next + part * 64), _MM_HINT_T1);
        add_unit<width, rows, part>(_mm512_loadu_si512(first + part * 64), second, unit + part, sums);
    };
    (add(std::integral_constant<int, parts>{}), ...);
}

/// Codes in planes {4, width}. A unit of the second covers 4 / width of the first.
template <int width, int rows>
KVPLANE_TARGET_AVX512 inline void two_planes_block(const PlanePairCall& call, Index block,
                                                   Index row) noexcept {
    constexpr int together = 4 / width;
    PairSums<rows> sums;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) sums.whole[i][r] = sums.first[i][r] = Words{};
        sums.high_factors[r] = call.factors + (row + r) * call.factor_stride;
        sums.low_factors[r] = sums.high_factors[r] + call.rows * call.factor_stride;
    }
    const Index first_at = block * call.first_block_units * 64,
                second_at = block * call.second_block_units * 64;
    const std::byte *const first = call.first + first_at, *const first_next = call.first_next + first_at;
    for (Index u = 0; u < call.first_units; u += together) {
        const Index at = second_at + u / together * 64;
        _mm_prefetch(reinterpret_cast<const char*>(call.second_next + at), _MM_HINT_T1);
        add_units<width>(first + u * 64, first_next + u * 64, _mm512_loadu_si512(call.second + at), u,
                         call.first_units - u, sums, std::make_integer_sequence<int, together>{});
    }
    std::int32_t* const to = call.sums + (block * call.sum_rows + row) * 16;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        const Words whole = sums.whole[0][r] + (sums.whole[1][r] >> (4 - width)),
                    lower = sums.first[0][r] + (sums.first[1][r] >> 4);
        _mm512_storeu_si512(to + r * 16, (__m512i)whole);
        _mm512_storeu_si512(to + (call.rows + r) * 16, (__m512i)(lower << call.shift));
    }
}

/// The units of one depth, of one block of a PlaneSomeCall. Codes that are read in part have lower bits of 0.
/// The units that are read next are fetched in step, because all fetches at once would wait for memory. With
/// up to 2 rows the low halves have two sums each, so that one does not wait for the other; with 4 there are
/// no registers for that.
template <int rows, bool low_halves, int depth>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void some_units(const PlaneSomeCall& call, Index at,
                                                     const std::int8_t* factors, __m512i (&whole)[2 * rows],
                                                     __m512i (&first)[2 * rows]) noexcept {
    const __m512i low_half = _mm512_set1_epi8(15), high_half = _mm512_set1_epi8(static_cast<char>(0xF0));
    const Index count = call.groups.count[depth], next_count = call.next_groups.count[depth],
                stride = call.factor_stride, low_at = call.rows * stride;
    const std::uint16_t *const units = call.groups.group[depth], *const next = call.next_groups.group[depth];
    const std::byte *const first_plane = call.first + at, *const second_plane = call.second + at;
    const auto *const first_next = reinterpret_cast<const char*>(call.first_next + at),
                      *const second_next = reinterpret_cast<const char*>(call.second_next + at);
    for (Index i = 0; i < count; ++i) {
        if (i < next_count) {
            _mm_prefetch(first_next + next[i] * 64, _MM_HINT_T1);
            if (depth == 2) _mm_prefetch(second_next + next[i] * 64, _MM_HINT_T1);
        }
        const Index u = units[i];
        const std::int8_t* const of_unit = factors + u * 8;
        const __m512i a = _mm512_loadu_si512(first_plane + u * 64),
                      b = depth == 2 ? _mm512_loadu_si512(second_plane + u * 64) : _mm512_setzero_si512();
        const __m512i even = depth == 2 ? either(low_half, b, shifted_left(a, 4))
                                        : _mm512_and_si512(shifted_left(a, 4), high_half),
                      odd = depth == 2 ? either(low_half, shifted_right(b, 4), a)
                                       : _mm512_and_si512(a, high_half);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            whole[r] = _mm512_dpbusd_epi32(whole[r], even, four_factors(of_unit + r * stride));
            whole[rows + r] =
                _mm512_dpbusd_epi32(whole[rows + r], odd, four_factors(of_unit + r * stride + 4));
        }
        if constexpr (low_halves) {
            const __m512i even_field = _mm512_and_si512(a, low_half),
                          odd_field = _mm512_and_si512(shifted_right(a, 4), low_half);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                const std::int8_t* const low = of_unit + low_at + r * stride;
                first[r] = _mm512_dpbusd_epi32(first[r], even_field, four_factors(low));
                __m512i& other = first[rows > 2 ? r : rows + r];
                other = _mm512_dpbusd_epi32(other, odd_field, four_factors(low + 4));
            }
        }
    }
    for (Index i = count; i < next_count; ++i) {
        _mm_prefetch(first_next + next[i] * 64, _MM_HINT_T1);
        if (depth == 2) _mm_prefetch(second_next + next[i] * 64, _MM_HINT_T1);
    }
}
template <int rows, bool low_halves>
KVPLANE_TARGET_AVX512 inline void some_block(const PlaneSomeCall& call, Index block, Index row) noexcept {
    const Index at = block * call.block_units * 64;
    __m512i whole[2 * rows], first[2 * rows];
#pragma GCC unroll 8
    for (int r = 0; r < 2 * rows; ++r) whole[r] = first[r] = _mm512_setzero_si512();
    const std::int8_t* const factors = call.factors + row * call.factor_stride;
    some_units<rows, low_halves, 2>(call, at, factors, whole, first);
    some_units<rows, low_halves, 1>(call, at, factors, whole, first);
    std::int32_t* const sums = call.sums + (block * call.sum_rows + row) * 16;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        _mm512_storeu_si512(sums + r * 16, (__m512i)((Words)whole[r] + (Words)whole[rows + r]));
        if constexpr (low_halves)
            _mm512_storeu_si512(sums + (call.rows + r) * 16,
                                (__m512i)(((Words)first[r] + (Words)first[rows + r]) << 4));
    }
}
template <bool low_halves>
KVPLANE_TARGET_AVX512 inline void some_rows(const PlaneSomeCall& call, Index block) noexcept {
    Index row = 0;
    for (; row + 4 <= call.rows; row += 4) some_block<4, low_halves>(call, block, row);
    for (; row + 2 <= call.rows; row += 2) some_block<2, low_halves>(call, block, row);
    if (row < call.rows) some_block<1, low_halves>(call, block, row);
}
KVPLANE_TARGET_AVX512 inline void some_dot(const PlaneSomeCall& call) noexcept {
    for (Index block = 0; block < call.blocks; ++block) {
        if (call.low_rows > 0)
            some_rows<true>(call, block);
        else
            some_rows<false>(call, block);
    }
}

/// Field i of a unit in planes {2, 1}, with its code in bits 2 i - 1 and above, or in the lowest. `part` is the unit's
/// place among the two that share a unit of the second plane.
template <int part, int i>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE __m512i join_three_bits(const __m512i& first,
                                                             const __m512i& second) noexcept {
    constexpr int lowest = i == 0 ? 0 : 2 * i - 1;
    const __m512i below = moved_right<4 * part + i - lowest>(second) & _mm512_set1_epi8(1 << lowest);
    return masked_or(_mm512_set1_epi8(static_cast<char>(3 << (lowest + 1))),
                     i == 0 ? shifted_left(first, 1) : first, below);
}
template <int rows, int part>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void add_three_bits(const __m512i& first, const __m512i& second,
                                                         Index unit,
                                                         const std::int8_t* const (&factors)[rows],
                                                         Words (&sums)[4][rows]) noexcept {
    const __m512i code[4] = {join_three_bits<part, 0>(first, second), join_three_bits<part, 1>(first, second),
                             join_three_bits<part, 2>(first, second),
                             join_three_bits<part, 3>(first, second)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
            sums[i][r] = (Words)_mm512_dpbusd_epi32((__m512i)sums[i][r], code[i],
                                                    four_factors(factors[r] + (unit * 4 + i) * 4));
}
/// Codes of 3 bits in planes {2, 1}: a unit of the second covers two of the first.
template <int rows>
KVPLANE_TARGET_AVX512 inline void three_bits_block(const PlanePairCall& call, Index block,
                                                   Index row) noexcept {
    const std::int8_t* factors[rows];
    Words sums[4][rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i][r] = Words{};
        factors[r] = call.factors + (row + r) * call.factor_stride;
    }
    const Index first_at = block * call.first_block_units * 64,
                second_at = block * call.second_block_units * 64;
    for (Index u = 0; u < call.first_units; u += 2) {
        const Index at = first_at + u * 64, below_at = second_at + u / 2 * 64;
        const __m512i second = _mm512_loadu_si512(call.second + below_at);
        _mm_prefetch(reinterpret_cast<const char*>(call.second_next + below_at), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(call.first_next + at), _MM_HINT_T1);
        add_three_bits<rows, 0>(_mm512_loadu_si512(call.first + at), second, u, factors, sums);
        if (u + 1 == call.first_units) break;
        _mm_prefetch(reinterpret_cast<const char*>(call.first_next + at + 64), _MM_HINT_T1);
        add_three_bits<rows, 1>(_mm512_loadu_si512(call.first + at + 64), second, u + 1, factors, sums);
    }
    std::int32_t* const to = call.sums + (block * call.sum_rows + row) * 16;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
        _mm512_storeu_si512(
            to + r * 16, (__m512i)(sums[0][r] + (sums[1][r] >> 1) + (sums[2][r] >> 3) + (sums[3][r] >> 5)));
}

template <int width>
KVPLANE_TARGET_AVX512 inline void two_planes_dot(const PlanePairCall& call) noexcept {
    for (Index block = 0; block < call.blocks; ++block) {
        Index row = 0;
        for (; row + 4 <= call.rows; row += 4) two_planes_block<width, 4>(call, block, row);
        for (; row + 2 <= call.rows; row += 2) two_planes_block<width, 2>(call, block, row);
        if (row < call.rows) two_planes_block<width, 1>(call, block, row);
    }
}
KVPLANE_TARGET_AVX512 inline void three_bits_dot(const PlanePairCall& call) noexcept {
    for (Index block = 0; block < call.blocks; ++block) {
        Index row = 0;
        for (; row + 4 <= call.rows; row += 4) three_bits_block<4>(call, block, row);
        for (; row + 2 <= call.rows; row += 2) three_bits_block<2>(call, block, row);
        if (row < call.rows) three_bits_block<1>(call, block, row);
    }
}

// The kernels above are written for these splits.
static_assert(plane_split(3) == PlaneSplit{2, {2, 1}} && plane_split(5) == PlaneSplit{2, {4, 1}} &&
              plane_split(6) == PlaneSplit{2, {4, 2}} && plane_split(8) == PlaneSplit{2, {4, 4}});

inline constexpr PlaneDot plane_dots{.name = "avx512",
                                     .of_width = {plane_dot<1>, plane_dot<2>, plane_dot<4>},
                                     .pairs = {{{.bits = 3, .dot = three_bits_dot},
                                                {.bits = 5, .dot = two_planes_dot<1>},
                                                {.bits = 6, .dot = two_planes_dot<2>},
                                                {.bits = 8, .dot = two_planes_dot<4>}}},
                                     .some = some_dot,
                                     .order = order_weights,
                                     .factors = make_factors};

}  // namespace kvplane::detail::avx512
#endif
