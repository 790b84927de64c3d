// kvplane/attention/kernels/avx2.hpp: integer sums over planes with AVX2.
//
// A unit is two registers of 8 lanes. vpmaddubsw adds pairs of products to 16 bits: a pair is
// at most 2 (2^width - 1) 128 in magnitude, so that 8 fields of 4 bits, 32 of 2 and 127 of 1 bit stay below
// 2^15; then vpmaddwd widens. Fields come 8 / width to a unit, so sums are widened every 4, 8 and 8 units:
// 2^15 - 2^12 at most. Sums are exact.
#pragma once

#include "kvplane/simd/isa.hpp"

#if defined(KVPLANE_X86)
#include <immintrin.h>

#include <cstring>

#include "kvplane/attention/kernels/plane_dot.hpp"

namespace kvplane::detail::avx2 {

/// 8 lanes of the i-th fields of half a unit.
template <int width>
KVPLANE_TARGET_AVX2 KVPLANE_INLINE __m256i field_of(const std::byte* half_unit, int i) noexcept {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half_unit));
    return _mm256_and_si256(i == 0 ? bytes : _mm256_srli_epi16(bytes, i * width),
                            _mm256_set1_epi8((1 << width) - 1));
}
/// The factors that meet the i-th fields of unit u, in every lane.
KVPLANE_TARGET_AVX2 KVPLANE_INLINE __m256i factors_of(const PlaneDotCall& call, Index row,
                                                      Index place) noexcept {
    int four;
    std::memcpy(&four, call.factors + row * call.factor_stride + place * 4, 4);
    return _mm256_set1_epi32(four);
}
KVPLANE_TARGET_AVX2 KVPLANE_INLINE void put(const PlaneDotCall& call, const __m256i& lanes,
                                            std::int32_t* sums) noexcept {
    auto* const to = reinterpret_cast<__m256i*>(sums);
    const __m256i sum = _mm256_slli_epi32(lanes, call.shift);
    _mm256_storeu_si256(to, call.add ? _mm256_add_epi32(_mm256_loadu_si256(to), sum) : sum);
}

template <int width, int rows>
KVPLANE_TARGET_AVX2 inline void dot_block(const PlaneDotCall& call, const std::byte* units,
                                          const std::byte* next, Index row, std::int32_t* sums) noexcept {
    constexpr int fields = 8 / width;
    constexpr Index together = width == 4 ? 4 : 8;  // units between widenings
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i wide[rows][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) wide[r][0] = wide[r][1] = _mm256_setzero_si256();
    for (Index first = 0; first < call.units; first += together) {
        const Index end = first + together < call.units ? first + together : call.units;
        __m256i narrow[rows][2];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) narrow[r][0] = narrow[r][1] = _mm256_setzero_si256();
        for (Index u = first; u < end; ++u) {
            _mm_prefetch(reinterpret_cast<const char*>(next + u * 64), _MM_HINT_T1);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half)
#pragma GCC unroll 8
                for (int i = 0; i < fields; ++i) {
                    const __m256i field = field_of<width>(units + u * 64 + half * 32, i);
#pragma GCC unroll 4
                    for (int r = 0; r < rows; ++r)
                        narrow[r][half] = _mm256_add_epi16(
                            narrow[r][half],
                            _mm256_maddubs_epi16(field, factors_of(call, row + r, u * fields + i)));
                }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half)
                wide[r][half] = _mm256_add_epi32(wide[r][half], _mm256_madd_epi16(narrow[r][half], ones));
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) put(call, wide[r][half], sums + (row + r) * 16 + half * 8);
}

template <int width>
KVPLANE_TARGET_AVX2 inline void plane_dot(const PlaneDotCall& call) noexcept {
    for (Index block = 0; block < call.blocks; ++block) {
        const Index at = block * call.block_units * 64;
        std::int32_t* const sums = call.sums + block * call.sum_rows * 16;
        Index row = 0;
        for (; row + 2 <= call.rows; row += 2)
            dot_block<width, 2>(call, call.plane + at, call.next + at, row, sums);
        if (row < call.rows) dot_block<width, 1>(call, call.plane + at, call.next + at, row, sums);
    }
}

inline constexpr PlaneDot plane_dots{.name = "avx2", .of_width = {plane_dot<1>, plane_dot<2>, plane_dot<4>}};

}  // namespace kvplane::detail::avx2
#endif
