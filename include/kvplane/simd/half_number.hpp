// kvplane/simd/half_number.hpp: rounding of single numbers to fp16.
//
// Without vectors (simd/half.hpp has these), so that every compiler takes what includes it, CUDA's among them.
#pragma once

#include <Eigen/Core>
#include <cstdint>

namespace kvplane {

using Index = Eigen::Index;

/// The largest finite fp16 magnitude; inputs beyond it are refused.
inline constexpr float fp16_max = 65504.0f;

/// The nearest fp16 values not above and not below x, for |x| <= fp16_max; infinite beyond it.
inline Eigen::half half_below(float x) {
    Eigen::half h(x);
    if (static_cast<float>(h) <= x) return h;
    const std::uint16_t bits = h.x;
    if (bits == 0x0000) return Eigen::numext::bit_cast<Eigen::half>(std::uint16_t{0x8001});
    return Eigen::numext::bit_cast<Eigen::half>(
        static_cast<std::uint16_t>((bits & 0x8000) ? bits + 1 : bits - 1));
}
inline Eigen::half half_above(float x) {
    return -half_below(-x);
}

}  // namespace kvplane
