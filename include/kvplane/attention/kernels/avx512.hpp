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

/// `together` consecutive blocks from `block` on, for some rows. Fields are masked where they stand, and the sums of
/// upper ones are shifted once at the end, which is exact.
template <int width, int rows, int together>
KVPLANE_TARGET_AVX512 inline void dot_blocks(const PlaneDotCall& call, Index block, Index row) noexcept {
    constexpr int fields = 8 / width, chains = fields < 4 ? fields : 4;
    Words lanes[together][rows][chains];
    const std::int8_t* factors[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        factors[r] = call.factors + (row + r) * call.factor_stride;
#pragma GCC unroll 2
        for (int b = 0; b < together; ++b)
#pragma GCC unroll 4
            for (int chain = 0; chain < chains; ++chain) lanes[b][r][chain] = Words{};
    }
    const Index at = block * call.block_units * 64, block_bytes = call.block_units * 64;
    for (Index u = 0; u < call.units; ++u) {
        __m512i unit[together];
#pragma GCC unroll 2
        for (int b = 0; b < together; ++b) {
            unit[b] = _mm512_loadu_si512(call.plane + at + b * block_bytes + u * 64);
            _mm_prefetch(reinterpret_cast<const char*>(call.next + at + b * block_bytes + u * 64),
                         _MM_HINT_T1);
        }
#pragma GCC unroll 8
        for (int i = 0; i < fields; ++i) {
            const int chain = i % chains;
            const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << width) - 1) << (width * chain)));
            __m512i field[together];
#pragma GCC unroll 2
            for (int b = 0; b < together; ++b) {
                if (i == chains) unit[b] = (__m512i)((Shorts)unit[b] >> std::uint16_t{4});
                field[b] = unit[b] & mask;
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                int four;
                std::memcpy(&four, factors[r] + (u * fields + i) * 4, 4);
                const __m512i factor = _mm512_set1_epi32(four);
#pragma GCC unroll 2
                for (int b = 0; b < together; ++b)
                    lanes[b][r][chain] =
                        (Words)_mm512_dpbusd_epi32((__m512i)lanes[b][r][chain], field[b], factor);
            }
        }
    }
#pragma GCC unroll 2
    for (int b = 0; b < together; ++b)
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            std::int32_t* const to = call.sums + ((block + b) * call.sum_rows + row + r) * 16;
            Words sum = lanes[b][r][0];
#pragma GCC unroll 4
            for (int chain = 1; chain < chains; ++chain) sum += lanes[b][r][chain] >> (width * chain);
            sum = sum << call.shift;
            if (call.add) sum += (Words)_mm512_loadu_si512(to);
            _mm512_storeu_si512(to, (__m512i)sum);
        }
}

/// All blocks, `together` at a time.
template <int width, int rows, int together>
KVPLANE_TARGET_AVX512 inline void dot_rows(const PlaneDotCall& call, Index row) noexcept {
    Index block = 0;
    for (; block + together <= call.blocks; block += together)
        dot_blocks<width, rows, together>(call, block, row);
    for (; block < call.blocks; ++block) dot_blocks<width, rows, 1>(call, block, row);
}

template <int width>
KVPLANE_TARGET_AVX512 inline void plane_dot(const PlaneDotCall& call) noexcept {
    // As many accumulators as there are registers for: a chain a field, and two blocks, which share broadcasts.
    constexpr int most = width == 4 ? 8 : 4, two = width == 4 ? 2 : 1;
    Index row = 0;
    for (; row + most <= call.rows; row += most) dot_rows<width, most, 1>(call, row);
    for (; row + 4 <= call.rows; row += 4) dot_rows<width, 4, two>(call, row);
    for (; row + 2 <= call.rows; row += 2) dot_rows<width, 2, 2>(call, row);
    if (row < call.rows) dot_rows<width, 1, 2>(call, row);
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
