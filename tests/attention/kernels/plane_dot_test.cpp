// Integer sums over planes against their definition, on every instruction set.
#include "kvplane/attention/kernels/dispatch.hpp"

#include <gtest/gtest.h>

#include "attention/kernels/plane_dot_support.hpp"
#include "kvplane/storage/tile_format.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using kvplane_test::expect_the_definition;
using kvplane_test::for_each_isa;
using kvplane_test::Random;
using kvplane_test::random_factors;
using kvplane_test::random_plane;
using kvplane_test::Tile;

TEST(PlaneDot, EveryInstructionSetEqualsTheDefinition) {
    Random random(kvplane_test::seed());
    for_each_isa([&](Isa isa) {
        EXPECT_EQ(detail::plane_dot_of(isa).name, name(isa));
        expect_the_definition(detail::plane_dot_of(isa), random);
    });
}

/// Two planes in one go give the sums of one after the other.
TEST(PlaneDot, PairsOfPlanesEqualOneByOne) {
    Random random(kvplane_test::seed());
    for_each_isa([&](Isa isa) {
        const detail::PlaneDot& dot = detail::plane_dot_of(isa);
        for (int bits = 0; bits <= 8; ++bits) {
            const auto pair = dot.pair(bits);
            if (!pair) continue;
            const PlaneSplit split = plane_split(bits);
            ASSERT_EQ(split.count, 2);
            const Index depth = TileFormat::unit_depth(split[0]),
                        ratio = TileFormat::unit_depth(split[1]) / depth;
            for (const Index units : {1, 2, 3, 4, 5, 8, 16, 33})
                for (Index rows = 1; rows <= 8; ++rows)
                    for (const bool extreme : {false, true}) {
                        const Index blocks = 3, low_rows = bits > 4 ? rows : 0, sum_rows = rows + low_rows;
                        const Index second_units = (units + ratio - 1) / ratio, stride = units * depth + 32;
                        const Tile first = random_plane(blocks * units, extreme, random),
                                   second = random_plane(blocks * second_units, extreme, random);
                        std::vector<std::int8_t> factors = random_factors(sum_rows, stride, extreme, random);
                        // What a last unit of the second plane holds beyond the first's channels counts
                        // nothing.
                        for (Index row = 0; row < sum_rows; ++row)
                            std::fill_n(factors.begin() + row * stride + units * depth, 32, std::int8_t{0});
                        const auto size = static_cast<std::size_t>(blocks * sum_rows * 16);
                        std::vector<std::int32_t> sums(size, 5), expected(size, 5);
                        pair({.first = first.data(),
                              .second = second.data(),
                              .first_next = first.data(),
                              .second_next = second.data(),
                              .blocks = blocks,
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
                            split[0], {first.data(), first.data(), blocks, units, units, factors.data(),
                                       stride, sum_rows, split.shift(0), expected.data(), sum_rows, false});
                        detail::scalar::plane_dots(
                            split[1], {second.data(), second.data(), blocks, second_units, second_units,
                                       factors.data(), stride, rows, 0, expected.data(), sum_rows, true});
                        ASSERT_EQ(sums, expected) << name(isa) << ", " << bits << " bits, " << units
                                                  << " units, " << rows << " rows";
                    }
        }
    });
}

}  // namespace
