// kvplane/attention/kernels/avx2_vnni.hpp: integer sums over planes with AVX2 and AVX-VNNI.
//
// A unit is two registers of 8 lanes, each summed by vpdpbusd. Sums are exact.
//
// The instruction has two encodings, AVX-VNNI's and AVX-512VL's. A test on a machine that has the second only
// defines both macros below and so runs the same kernel.
#pragma once

#include "kvplane/simd/isa.hpp"

#if defined(KVPLANE_X86)
#include <immintrin.h>

#include "kvplane/attention/kernels/avx2.hpp"
#include "kvplane/attention/kernels/plane_dot.hpp"

#ifndef KVPLANE_DPBUSD_256
#define KVPLANE_DPBUSD_256 _mm256_dpbusd_avx_epi32
#define KVPLANE_TARGET_DPBUSD_256 KVPLANE_TARGET_AVX2_VNNI
#endif

namespace kvplane::detail::avx2_vnni {

template <int width, int rows>
KVPLANE_TARGET_DPBUSD_256 inline void dot_block(const PlaneDotCall& call, const std::byte* units,
                                                const std::byte* next, Index row,
                                                std::int32_t* sums) noexcept {
    constexpr int fields = 8 / width;
    __m256i lanes[rows][2];
    for (int r = 0; r < rows; ++r) lanes[r][0] = lanes[r][1] = _mm256_setzero_si256();
    for (Index u = 0; u < call.units; ++u) {
        _mm_prefetch(reinterpret_cast<const char*>(next + u * 64), _MM_HINT_T1);
#pragma GCC unroll 8
        for (int i = 0; i < fields; ++i) {
            const __m256i low = avx2::field_of<width>(units + u * 64, i),
                          high = avx2::field_of<width>(units + u * 64 + 32, i);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                const __m256i factors = avx2::factors_of(call, row + r, u * fields + i);
                lanes[r][0] = KVPLANE_DPBUSD_256(lanes[r][0], low, factors);
                lanes[r][1] = KVPLANE_DPBUSD_256(lanes[r][1], high, factors);
            }
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int half = 0; half < 2; ++half)
            avx2::put(call, lanes[r][half], sums + (row + r) * 16 + half * 8);
}

template <int width>
KVPLANE_TARGET_DPBUSD_256 inline void plane_dot(const PlaneDotCall& call) noexcept {
    for (Index block = 0; block < call.blocks; ++block) {
        const std::byte *const units = call.plane + block * call.block_units * 64, *const next =
                                                                                       call.next +
                                                                                       block *
                                                                                           call.block_units *
                                                                                           64;
        std::int32_t* const sums = call.sums + block * call.sum_rows * 16;
        Index row = 0;
        for (; row + 4 <= call.rows; row += 4) dot_block<width, 4>(call, units, next, row, sums);
        for (; row < call.rows; ++row) dot_block<width, 1>(call, units, next, row, sums);
    }
}

inline constexpr PlaneDot plane_dots{.name = "avx2_vnni",
                                     .of_width = {plane_dot<1>, plane_dot<2>, plane_dot<4>}};

}  // namespace kvplane::detail::avx2_vnni
#endif
