// Reads of so many bits of every code: the planes that fit.
#include "kvplane/read/fixed.hpp"

#include <gtest/gtest.h>

#include "read/planner_support.hpp"

namespace {

using namespace kvplane_test;

Planes planes_of(const TileFormat& format, double bits) {
    std::vector<std::uint8_t> planes(static_cast<std::size_t>(plane_groups(format)) + 1, 77);
    fixed_planes(format, bits, planes.data());
    EXPECT_EQ(planes.back(), 77) << "beyond the groups of the tile";
    return Planes(planes.begin(), planes.end() - 1);
}

/// 48 channels of planes {4,4}: six groups of 8.
TEST(FixedPlanes, AreThoseThatFit) {
    const TileFormat format = key_format(48, 8);
    EXPECT_EQ(planes_of(format, 0.0), Planes(6, 0));
    EXPECT_EQ(planes_of(format, 3.0), Planes(6, 0));
    EXPECT_EQ(planes_of(format, 3.99), Planes(6, 0));
    EXPECT_EQ(planes_of(format, 4.0), Planes(6, 1));
    EXPECT_EQ(planes_of(format, 7.99), Planes(6, 1));
    EXPECT_EQ(planes_of(format, 8.0), Planes(6, 2));
    EXPECT_EQ(planes_of(format, 16.0), Planes(6, 2));
}

/// fp16, {8,4,4}.
TEST(FixedPlanes, OfHalfAreEightTwelveOrSixteenBits) {
    const TileFormat format = key_format(48, 16);
    EXPECT_EQ(planes_of(format, 7.99), Planes(6, 0));
    EXPECT_EQ(planes_of(format, 8.0), Planes(6, 1));
    EXPECT_EQ(planes_of(format, 11.99), Planes(6, 1));
    EXPECT_EQ(planes_of(format, 12.0), Planes(6, 2));
    EXPECT_EQ(planes_of(format, 15.99), Planes(6, 2));
    EXPECT_EQ(planes_of(format, 16.0), Planes(6, 3));
}

/// Latents of widths 7, 4, 2 and 0. Planes {4,2,1} make groups of 32 channels, {4} of 8, {2} of 16, and a
/// width of 0 none: 40 channels are groups of 32 and 8, 24 three of 8, 16 one.
const std::vector<ChannelSegment> latents{{40, 7}, {24, 4}, {16, 2}, {8, 0}};
const GridRule by_channel{Granularity::per_channel, 128, Scheme::min_max};

TEST(FixedPlanes, GoByTheWidthOfEachSegment) {
    const TileFormat format(TileSide::keys, latents, by_channel);
    EXPECT_EQ(planes_of(format, 1.0), (Planes{0, 0, 0, 0, 0, 0}));
    EXPECT_EQ(planes_of(format, 2.0), (Planes{0, 0, 0, 0, 0, 1}));
    EXPECT_EQ(planes_of(format, 3.0), (Planes{0, 0, 0, 0, 0, 1}));
    EXPECT_EQ(planes_of(format, 4.0), (Planes{1, 1, 1, 1, 1, 1}));
    EXPECT_EQ(planes_of(format, 5.0), (Planes{1, 1, 1, 1, 1, 1}));  // 4 + 2 > 5
    EXPECT_EQ(planes_of(format, 6.0), (Planes{2, 2, 1, 1, 1, 1}));
    EXPECT_EQ(planes_of(format, 7.0), (Planes{3, 3, 1, 1, 1, 1}));
}

/// Values share out tokens: 128 in groups of 8, of 16 where a plane has 2 bits, of 32 where one has 1.
TEST(FixedPlanes, OfValuesAreByToken) {
    EXPECT_EQ(planes_of(value_format(24, 8), 4.0), Planes(16, 1));
    EXPECT_EQ(planes_of(value_format(24, 6), 5.0), Planes(8, 1));
    EXPECT_EQ(planes_of(value_format(24, 6), 6.0), Planes(8, 2));
    EXPECT_EQ(planes_of(value_format(24, 3), 2.0), Planes(4, 1));
}

TEST(FixedPlanner, ReadsAndCountsThem) {
    // Head 0 of keys has 8 bits, head 1 the latents.
    Drive drive({key_format(88, 8), {TileSide::keys, latents, by_channel}}, value_format(24, 8),
                {.heads = 2, .tiles = 2});
    const Matrix queries = Matrix::Ones(2, 88);
    FixedPlanner planner;
    planner.begin(drive.context({ReadPolicy::Kind::fixed, 5.0, 8.0}));
    EXPECT_FALSE(planner.values_wait());
    EXPECT_FALSE(planner.refine());
    const Drive::Keys first = drive.keys(planner, drive.place(1, 0), queries);
    EXPECT_EQ(first.planes, Planes(11, 1));
    EXPECT_EQ(first.next_planes, first.planes);
    EXPECT_EQ(first.bits, 128 * 88 * 4);
    EXPECT_FALSE(first.wide_factors) << "5 bits are not more than 5";
    const Drive::Keys second = drive.keys(planner, drive.place(0, 1), queries);
    EXPECT_EQ(second.planes, (Planes{1, 1, 1, 1, 1, 1}));
    EXPECT_EQ(second.bits, 128 * (40 * 4 + 24 * 4 + 16 * 2));
    EXPECT_EQ(drive.value_planes(planner, 0, 1), Planes(16, 2));
    EXPECT_TRUE(planner.wide_values());

    planner.begin(drive.context({ReadPolicy::Kind::fixed, 6.0, 3.0}));
    const Drive::Keys third = drive.keys(planner, drive.place(0, 1), queries);
    EXPECT_EQ(third.planes, (Planes{2, 2, 1, 1, 1, 1}));
    EXPECT_EQ(third.bits, 128 * (40 * 6 + 24 * 4 + 16 * 2));
    EXPECT_TRUE(third.wide_factors);
    EXPECT_EQ(drive.value_planes(planner, 1, 0), Planes(16, 0));
    EXPECT_FALSE(planner.wide_values());
}

}  // namespace
