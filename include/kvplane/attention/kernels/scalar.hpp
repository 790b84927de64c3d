// kvplane/attention/kernels/scalar.hpp: integer sums over planes in plain C++: the definition.
#pragma once

#include "kvplane/attention/kernels/plane_dot.hpp"

namespace kvplane::detail::scalar {

template <int width>
void plane_dot(const PlaneDotCall& call) noexcept {
    constexpr int fields = 8 / width, mask = (1 << width) - 1;
    for (Index block = 0; block < call.blocks; ++block) {
        const std::byte* const units = call.plane + block * call.block_units * 64;
        for (Index row = 0; row < call.rows; ++row) {
            const std::int8_t* const factors = call.factors + row * call.factor_stride;
            std::int32_t sums[16] = {};
            for (Index u = 0; u < call.units; ++u)
                for (int i = 0; i < fields; ++i)
                    for (int lane = 0; lane < 16; ++lane)
                        for (int j = 0; j < 4; ++j)
                            sums[lane] +=
                                (std::to_integer<int>(units[u * 64 + lane * 4 + j]) >> (i * width) & mask) *
                                factors[(u * fields + i) * 4 + j];
            for (int lane = 0; lane < 16; ++lane) {
                std::int32_t& to = call.sums[(block * call.sum_rows + row) * 16 + lane];
                to = (call.add ? to : 0) + sums[lane] * (1 << call.shift);
            }
        }
    }
}

inline constexpr PlaneDot plane_dots{.name = "scalar",
                                     .of_width = {plane_dot<1>, plane_dot<2>, plane_dot<4>}};

}  // namespace kvplane::detail::scalar
