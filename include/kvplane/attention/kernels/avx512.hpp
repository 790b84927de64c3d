// kvplane/attention/kernels/avx512.hpp: integer sums over planes with AVX-512 VNNI.
//
// A unit is one register of 16 lanes, so a shift, a mask and one vpdpbusd a row sum 4 fields into 16 lanes.
// Even and odd fields have accumulators of their own: a chain of vpdpbusd has a latency of 4 to 5 cycles.
// Sums are exact.
#pragma once

#include "kvplane/isa.hpp"

#if defined(KVPLANE_X86)
#include <immintrin.h>

#include <cstring>

#include "kvplane/attention/kernels/scalar.hpp"

namespace kvplane::detail::avx512 {

// Operators on these, for g++ 12 warns falsely inside the intrinsics for shifts.
typedef std::uint16_t Shorts __attribute__((vector_size(64)));
typedef std::int32_t Words __attribute__((vector_size(64)));

template <int width, int rows>
KVPLANE_TARGET_AVX512 inline void dot_block(const PlaneDotCall& call, const std::byte* units,
                                            const std::byte* ahead, Index row, std::int32_t* sums) noexcept {
    constexpr int fields = 8 / width;
    const __m512i mask = _mm512_set1_epi8((1 << width) - 1);
    __m512i even[rows], odd[rows];
    const std::int8_t* factors[rows];
    for (int r = 0; r < rows; ++r) {
        even[r] = odd[r] = _mm512_setzero_si512();
        factors[r] = call.factors + (row + r) * call.factor_stride;
    }
    for (Index u = 0; u < call.units; ++u) {
        const __m512i unit = _mm512_loadu_si512(units + u * 64);
        _mm_prefetch(reinterpret_cast<const char*>(ahead + u * 64), _MM_HINT_T1);
#pragma GCC unroll 8
        for (int i = 0; i < fields; ++i) {
            const __m512i field = (__m512i)((Shorts)unit >> static_cast<std::uint16_t>(i * width)) & mask;
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                int four;
                std::memcpy(&four, factors[r] + (u * fields + i) * 4, 4);
                __m512i& to = i % 2 ? odd[r] : even[r];
                to = _mm512_dpbusd_epi32(to, field, _mm512_set1_epi32(four));
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        std::int32_t* const to = sums + (row + r) * 16;
        const Words sum = (Words)even[r] + (Words)odd[r];
        _mm512_storeu_si512(to, (__m512i)((Words)_mm512_loadu_si512(to) + (sum << call.shift)));
    }
}

template <int width>
KVPLANE_TARGET_AVX512 inline void plane_dot(const PlaneDotCall& call) noexcept {
    for (Index block = 0; block < call.blocks; ++block) {
        const Index at = block * call.units * 64;
        std::int32_t* const sums = call.sums + block * call.rows * 16;
        Index row = 0;
        for (; row + 4 <= call.rows; row += 4)
            dot_block<width, 4>(call, call.plane + at, call.ahead + at, row, sums);
        if (call.rows - row == 3)
            dot_block<width, 3>(call, call.plane + at, call.ahead + at, row, sums);
        else if (call.rows - row == 2)
            dot_block<width, 2>(call, call.plane + at, call.ahead + at, row, sums);
        else if (call.rows - row == 1)
            dot_block<width, 1>(call, call.plane + at, call.ahead + at, row, sums);
    }
}

inline constexpr PlaneDot plane_dots{{plane_dot<1>, plane_dot<2>, plane_dot<4>}};

}  // namespace kvplane::detail::avx512
#endif
