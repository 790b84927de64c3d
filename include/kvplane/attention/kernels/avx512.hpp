// kvplane/attention/kernels/avx512.hpp: integer sums over planes with AVX-512 VNNI.
//
// A unit is one register of 16 lanes, so a shift, a mask and one vpdpbusd a row sum 4 fields into 16 lanes.
// Up to 4 rows have accumulators of their own for even and odd fields: a chain of vpdpbusd has a latency of 4
// to 5 cycles. Sums are exact.
//
// Loops over rows are unrolled even where they only fill arrays: g++ otherwise clears these arrays in memory, and
// copies every accumulator once a unit.
#pragma once

#include "kvplane/simd/isa.hpp"

#if defined(KVPLANE_X86)
#include <immintrin.h>

#include <cstring>

#include "kvplane/attention/kernels/plane_dot.hpp"

namespace kvplane::detail::avx512 {

// Operators on these, for g++ 12 warns falsely inside the intrinsics for shifts.
typedef std::uint16_t Shorts __attribute__((vector_size(64)));
typedef std::int32_t Words __attribute__((vector_size(64)));

template <int width, int rows>
KVPLANE_TARGET_AVX512 inline void dot_block(const PlaneDotCall& call, const std::byte* units,
                                            const std::byte* next, Index row, std::int32_t* sums) noexcept {
    constexpr int fields = 8 / width, chains = rows <= 4 ? 2 : 1;
    const __m512i mask = _mm512_set1_epi8((1 << width) - 1);
    __m512i lanes[rows][chains];
    const std::int8_t* factors[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int chain = 0; chain < chains; ++chain) lanes[r][chain] = _mm512_setzero_si512();
        factors[r] = call.factors + (row + r) * call.factor_stride;
    }
    for (Index u = 0; u < call.units; ++u) {
        const __m512i unit = _mm512_loadu_si512(units + u * 64);
        _mm_prefetch(reinterpret_cast<const char*>(next + u * 64), _MM_HINT_T1);
#pragma GCC unroll 8
        for (int i = 0; i < fields; ++i) {
            const __m512i field = (__m512i)((Shorts)unit >> static_cast<std::uint16_t>(i * width)) & mask;
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                int four;
                std::memcpy(&four, factors[r] + (u * fields + i) * 4, 4);
                __m512i& to = lanes[r][i % chains];
                to = _mm512_dpbusd_epi32(to, field, _mm512_set1_epi32(four));
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        std::int32_t* const to = sums + (row + r) * 16;
        Words sum = (Words)lanes[r][0];
        if (chains == 2) sum += (Words)lanes[r][chains - 1];
        sum = sum << call.shift;
        if (call.add) sum += (Words)_mm512_loadu_si512(to);
        _mm512_storeu_si512(to, (__m512i)sum);
    }
}

template <int width>
KVPLANE_TARGET_AVX512 inline void plane_dot(const PlaneDotCall& call) noexcept {
    for (Index block = 0; block < call.blocks; ++block) {
        const std::byte *const units = call.plane + block * call.block_units * 64, *const next =
                                                                                       call.next +
                                                                                       block *
                                                                                           call.block_units *
                                                                                           64;
        std::int32_t* const sums = call.sums + block * call.sum_rows * 16;
        Index row = 0;
        for (; row + 8 <= call.rows; row += 8) dot_block<width, 8>(call, units, next, row, sums);
        switch (call.rows - row) {
            case 7:
                dot_block<width, 7>(call, units, next, row, sums);
                break;
            case 6:
                dot_block<width, 6>(call, units, next, row, sums);
                break;
            case 5:
                dot_block<width, 5>(call, units, next, row, sums);
                break;
            case 4:
                dot_block<width, 4>(call, units, next, row, sums);
                break;
            case 3:
                dot_block<width, 3>(call, units, next, row, sums);
                break;
            case 2:
                dot_block<width, 2>(call, units, next, row, sums);
                break;
            case 1:
                dot_block<width, 1>(call, units, next, row, sums);
                break;
        }
    }
}

/// The tokens of each run, pressed together 16 at a time. What a vector writes beyond them is written again.
KVPLANE_TARGET_AVX512 inline void order_weights(const RunOrderCall& call) noexcept {
    constexpr int blocks = 8;  // of 16 tokens
    std::uint16_t planes[2][blocks], members[4][blocks];
    std::memcpy(planes, call.run_planes, static_cast<std::size_t>(call.plane_count) * sizeof planes[0]);
    for (int run = 0; run < call.runs; ++run)
        for (int b = 0; b < blocks; ++b) {
            unsigned in = 0xFFFF;
            for (int p = 0; p < call.plane_count; ++p)
                in &= run >> (call.plane_count - 1 - p) & 1 ? planes[p][b] : ~unsigned{planes[p][b]};
            members[run][b] = static_cast<std::uint16_t>(in);
        }
    for (Index r = 0; r < call.rows; ++r) {
        const float* const from = call.weights + r * 128;
        float* to = call.to + r * 128;
        for (int run = 0; run < call.runs; ++run)
#pragma GCC unroll 8
            for (int b = 0; b < blocks; ++b) {
                const std::uint16_t in = members[run][b];
                _mm512_storeu_ps(to, _mm512_maskz_compress_ps(in, _mm512_loadu_ps(from + b * 16)));
                to += __builtin_popcount(in);
            }
    }
}

}  // namespace kvplane::detail::avx512
#endif
