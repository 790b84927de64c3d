// Integer sums over planes against their definition, for whatever kernels.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "kvplane/attention/kernels/scalar.hpp"
#include "kvplane/storage/tile_format.hpp"
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
            for (const Index rows : {1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 33})
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

/// Two planes in one go give the sums of one after the other.
inline void expect_both_planes(const kvplane::detail::PlaneDot& dot, int bits, Random& random) {
    using namespace kvplane;
    const PlaneSplit split = plane_split(bits);
    ASSERT_EQ(split.count, 2);
    const Index depth = TileFormat::unit_depth(split[0]), ratio = TileFormat::unit_depth(split[1]) / depth;
    for (const Index units : {1, 2, 3, 4, 5, 8, 16, 33})
        for (const Index rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 27})
            for (const bool extreme : {false, true}) {
                const Index blocks = 3, low_rows = bits > 4 ? rows : 0, sum_rows = rows + low_rows;
                const Index second_units = (units + ratio - 1) / ratio, stride = units * depth + 32;
                // Blocks of which not all units are summed, too.
                const Index more = extreme ? 0 : 2, first_all = units + more,
                            second_all = second_units + more;
                const Tile first = random_plane(blocks * first_all, extreme, random),
                           second = random_plane(blocks * second_all, extreme, random);
                std::vector<std::int8_t> factors = random_factors(sum_rows, stride, extreme, random);
                // What a last unit of the second plane holds beyond the first's channels counts nothing.
                for (Index row = 0; row < sum_rows; ++row)
                    std::fill_n(factors.begin() + row * stride + units * depth, 32, std::int8_t{0});
                const auto size = static_cast<std::size_t>(blocks * sum_rows * 16);
                std::vector<std::int32_t> sums(size, 5), expected(size, 5);
                dot.pair(bits)({.first = first.data(),
                                .second = second.data(),
                                .first_next = first.data(),
                                .second_next = second.data(),
                                .blocks = blocks,
                                .first_block_units = first_all,
                                .second_block_units = second_all,
                                .first_units = units,
                                .second_units = second_units,
                                .factors = factors.data(),
                                .factor_stride = stride,
                                .rows = rows,
                                .low_rows = low_rows,
                                .shift = split.shift(0),
                                .sums = sums.data(),
                                .sum_rows = sum_rows});
                detail::scalar::plane_dots(
                    split[0], {first.data(), first.data(), blocks, first_all, units, factors.data(), stride,
                               sum_rows, split.shift(0), expected.data(), sum_rows, false});
                detail::scalar::plane_dots(
                    split[1], {second.data(), second.data(), blocks, second_all, second_units, factors.data(),
                               stride, rows, 0, expected.data(), sum_rows, true});
                ASSERT_EQ(sums, expected)
                    << dot.name << ", " << bits << " bits, " << units << " units, " << rows << " rows";
            }
}

}  // namespace kvplane_test
