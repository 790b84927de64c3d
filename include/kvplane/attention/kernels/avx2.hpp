// kvplane/attention/kernels/avx2.hpp: integer sums over planes with AVX2, and with AVX-VNNI.
//
// A unit is two registers of 8 lanes. Without VNNI, vpmaddubsw adds pairs of products to 16 bits: a pair is
// at most 2 (2^width - 1) 128 in magnitude, so that 8 fields of 4 bits, 32 of 2 and 127 of 1 bit stay below
// 2^15; then vpmaddwd widens. Fields come 8 / width to a unit, so sums are widened every 4, 8 and 8 units:
// 2^15 - 2^12 at most. With VNNI, vpdpbusd does both. Sums are exact either way.
#pragma once

#include "kvplane/isa.hpp"

#if defined(KVPLANE_X86)
#include <immintrin.h>

#include <cstring>

#include "kvplane/attention/kernels/scalar.hpp"

namespace kvplane::detail::avx2 {

template <int width, int rows>
KVPLANE_TARGET_AVX2 inline void dot_block(const PlaneDotCall& call, const std::byte* units,
                                          const std::byte* ahead, Index row, std::int32_t* sums) noexcept {
    constexpr int fields = 8 / width;
    constexpr Index together = width == 4 ? 4 : 8;  // units between widenings
    const __m256i mask = _mm256_set1_epi8((1 << width) - 1), ones = _mm256_set1_epi16(1);
    __m256i wide[rows][2];
    for (int r = 0; r < rows; ++r) wide[r][0] = wide[r][1] = _mm256_setzero_si256();
    for (Index first = 0; first < call.units; first += together) {
        const Index end = first + together < call.units ? first + together : call.units;
        __m256i narrow[rows][2];
        for (int r = 0; r < rows; ++r) narrow[r][0] = narrow[r][1] = _mm256_setzero_si256();
        for (Index u = first; u < end; ++u) {
            _mm_prefetch(reinterpret_cast<const char*>(ahead + u * 64), _MM_HINT_T0);
            for (int half = 0; half < 2; ++half) {
                const __m256i unit =
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(units + u * 64 + half * 32));
#pragma GCC unroll 8
                for (int i = 0; i < fields; ++i) {
                    const __m256i field =
                        _mm256_and_si256(i == 0 ? unit : _mm256_srli_epi16(unit, i * width), mask);
#pragma GCC unroll 4
                    for (int r = 0; r < rows; ++r) {
                        int four;
                        std::memcpy(&four,
                                    call.factors + (row + r) * call.factor_stride + (u * fields + i) * 4, 4);
                        narrow[r][half] = _mm256_add_epi16(
                            narrow[r][half], _mm256_maddubs_epi16(field, _mm256_set1_epi32(four)));
                    }
                }
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half)
                wide[r][half] = _mm256_add_epi32(wide[r][half], _mm256_madd_epi16(narrow[r][half], ones));
    }
    for (int r = 0; r < rows; ++r)
        for (int half = 0; half < 2; ++half) {
            auto* const to = reinterpret_cast<__m256i*>(sums + (row + r) * 16 + half * 8);
            _mm256_storeu_si256(
                to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_slli_epi32(wide[r][half], call.shift)));
        }
}

template <int width>
KVPLANE_TARGET_AVX2 inline void plane_dot(const PlaneDotCall& call) noexcept {
    for (Index block = 0; block < call.blocks; ++block) {
        const Index at = block * call.units * 64;
        std::int32_t* const sums = call.sums + block * call.rows * 16;
        Index row = 0;
        for (; row + 2 <= call.rows; row += 2)
            dot_block<width, 2>(call, call.plane + at, call.ahead + at, row, sums);
        if (row < call.rows) dot_block<width, 1>(call, call.plane + at, call.ahead + at, row, sums);
    }
}

inline constexpr PlaneDot plane_dots{{plane_dot<1>, plane_dot<2>, plane_dot<4>}};

}  // namespace kvplane::detail::avx2
#endif
