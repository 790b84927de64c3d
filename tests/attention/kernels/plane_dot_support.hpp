// Integer sums over planes against their definition, for whatever kernels.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "kvplane/attention/kernels/scalar.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace kvplane_test {

using kvplane::Index;
using Tile = std::vector<std::byte, Eigen::aligned_allocator<std::byte>>;

/// Straight from the layout: lane l, byte j, field i.
inline std::int32_t defined_sum(const Tile& plane, int width, Index units, Index block, int lane,
                                const std::int8_t* factors) {
    const int fields = 8 / width, mask = (1 << width) - 1;
    std::int32_t sum = 0;
    for (Index u = 0; u < units; ++u)
        for (int i = 0; i < fields; ++i)
            for (int j = 0; j < 4; ++j) {
                const auto byte = std::to_integer<int>(
                    plane[static_cast<std::size_t>((block * units + u) * 64 + lane * 4 + j)]);
                sum += (byte >> (i * width) & mask) * factors[(u * fields + i) * 4 + j];
            }
    return sum;
}

inline Tile random_plane(Index units, bool extreme, Random& random) {
    Tile plane(static_cast<std::size_t>(units * 64));
    for (std::byte& byte : plane) byte = static_cast<std::byte>(extreme ? 255 : random());
    return plane;
}
inline std::vector<std::int8_t> random_factors(Index rows, Index stride, bool extreme, Random& random) {
    std::vector<std::int8_t> factors(static_cast<std::size_t>(rows * stride));
    for (std::int8_t& factor : factors)
        factor = extreme ? (random() % 2 ? std::int8_t{-128} : std::int8_t{127})
                         : static_cast<std::int8_t>(random());
    if (extreme) std::fill_n(factors.begin(), stride, std::int8_t{-128});
    return factors;
}

inline void expect_the_definition(const kvplane::detail::PlaneDot& dot, Random& random) {
    for (const int width : {1, 2, 4})
        for (const Index units : {1, 2, 3, 4, 5, 7, 8, 9, 16, 33})
            for (Index rows = 1; rows <= 17; ++rows)
                for (const bool extreme : {false, true}) {
                    const Index blocks = 3, stride = units * 32 / width + 32, sum_rows = rows + rows % 3;
                    const bool add = random() % 2 == 0;
                    const Tile plane = random_plane(blocks * units, extreme, random);
                    const std::vector<std::int8_t> factors = random_factors(rows, stride, extreme, random);
                    std::vector<std::int32_t> sums(static_cast<std::size_t>(blocks * sum_rows * 16), 5);
                    dot(width, {.plane = plane.data(),
                                .next = plane.data(),
                                .blocks = blocks,
                                .block_units = units,
                                .units = units,
                                .factors = factors.data(),
                                .factor_stride = stride,
                                .rows = rows,
                                .shift = 3,
                                .sums = sums.data(),
                                .sum_rows = sum_rows,
                                .add = add});
                    for (Index block = 0; block < blocks; ++block)
                        for (Index row = 0; row < sum_rows; ++row)
                            for (int lane = 0; lane < 16; ++lane) {
                                const auto sum =
                                    row < rows
                                        ? (add ? 5 : 0) + 8 * defined_sum(plane, width, units, block, lane,
                                                                          factors.data() + row * stride)
                                        : 5;
                                ASSERT_EQ(
                                    sums[static_cast<std::size_t>((block * sum_rows + row) * 16 + lane)], sum)
                                    << dot.name << ", width " << width << ", " << units << " units, row "
                                    << row << " of " << rows << ", lane " << lane;
                            }
                }
}

}  // namespace kvplane_test
