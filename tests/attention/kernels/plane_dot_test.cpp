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
        for (int bits = 0; bits <= 8; ++bits)
            if (dot.pair(bits)) kvplane_test::expect_both_planes(dot, bits, random);
    });
}

}  // namespace
