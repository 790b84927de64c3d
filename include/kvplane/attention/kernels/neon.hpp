// kvplane/attention/kernels/neon.hpp: integer sums over planes with Advanced SIMD's dot product (Armv8.2).
//
// A unit is four registers of 4 lanes. Fields are below 16, so the signed dot product takes them as they are;
// sums are exact.
#pragma once

#include "kvplane/simd/isa.hpp"

#if defined(KVPLANE_NEON)
#include <arm_neon.h>

#include <cstring>

#include "kvplane/attention/kernels/plane_dot.hpp"

namespace kvplane::detail::neon {

template <int width, int rows>
KVPLANE_TARGET_NEON inline void dot_block(const PlaneDotCall& call, const std::byte* units,
                                          const std::byte* next, Index row, std::int32_t* sums) noexcept {
    constexpr int fields = 8 / width;
    const uint8x16_t mask = vdupq_n_u8((1 << width) - 1);
    int32x4_t lanes[rows][4];
    for (int r = 0; r < rows; ++r)
        for (int quarter = 0; quarter < 4; ++quarter) lanes[r][quarter] = vdupq_n_s32(0);
    for (Index u = 0; u < call.units; ++u) {
        __builtin_prefetch(next + u * 64);
        for (int quarter = 0; quarter < 4; ++quarter) {
            const uint8x16_t unit =
                vld1q_u8(reinterpret_cast<const std::uint8_t*>(units + u * 64 + quarter * 16));
            for (int i = 0; i < fields; ++i) {
                const int8x16_t field = vreinterpretq_s8_u8(
                    vandq_u8(vshlq_u8(unit, vdupq_n_s8(static_cast<std::int8_t>(-i * width))), mask));
                for (int r = 0; r < rows; ++r) {
                    std::int32_t four;
                    std::memcpy(&four, call.factors + (row + r) * call.factor_stride + (u * fields + i) * 4,
                                4);
                    lanes[r][quarter] =
                        vdotq_s32(lanes[r][quarter], field, vreinterpretq_s8_s32(vdupq_n_s32(four)));
                }
            }
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int quarter = 0; quarter < 4; ++quarter) {
            std::int32_t* const to = sums + (row + r) * 16 + quarter * 4;
            const int32x4_t sum = vshlq_s32(lanes[r][quarter], vdupq_n_s32(call.shift));
            vst1q_s32(to, call.add ? vaddq_s32(vld1q_s32(to), sum) : sum);
        }
}

template <int width>
KVPLANE_TARGET_NEON inline void plane_dot(const PlaneDotCall& call) noexcept {
    for (Index block = 0; block < call.blocks; ++block) {
        const Index at = block * call.block_units * 64;
        std::int32_t* const sums = call.sums + block * call.sum_rows * 16;
        Index row = 0;
        for (; row + 4 <= call.rows; row += 4)
            dot_block<width, 4>(call, call.plane + at, call.next + at, row, sums);
        for (; row < call.rows; ++row) dot_block<width, 1>(call, call.plane + at, call.next + at, row, sums);
    }
}

inline constexpr PlaneDot plane_dots{.name = "neon", .of_width = {plane_dot<1>, plane_dot<2>, plane_dot<4>}};

}  // namespace kvplane::detail::neon
#endif
