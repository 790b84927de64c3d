// Values by budget: planes in the order of what they gain, as many as fit.
#include "kvplane/read/budget.hpp"

#include <gtest/gtest.h>

#include "read/planner_support.hpp"

namespace {

using namespace kvplane_test;

/// The weights of some groups of 8 tokens. Steps are such that a token counts for its squared weight, so that
/// the groups count 2^0, 2^-3, 2^-6, 2^-9, 2^-12 and 2^-15: one token of weight 2^-(k / 2), or for odd k two
/// of 2^-((k + 1) / 2).
float weight(Index token) {
    const Index group = token / 8, k = 3 * group;
    if (group > 5) return 0.0f;
    if (k % 2 == 0) return token % 8 == 5 ? std::ldexp(1.0f, static_cast<int>(-k / 2)) : 0.0f;
    return token % 8 == 0 || token % 8 == 7 ? std::ldexp(1.0f, static_cast<int>(-(k + 1) / 2)) : 0.0f;
}

/// Of 8 bits {4,4} the first plane gains 256 times what the second does, (2^16 - 2^8) / (2^8 - 1). So planes
/// gain in the order of -k and -k - 8 (group, plane):
///     0: 0,0   -3: 1,0   -6: 2,0   -8: 0,1   -9: 3,0   -11: 1,1   -12: 4,0   -14: 2,1   -15: 5,0   -17: 3,1
///     -20: 4,1   -23: 5,1
const std::vector<Planes> by_gain = {
    {0, 0, 0, 0, 0, 0}, {1, 0, 0, 0, 0, 0}, {1, 1, 0, 0, 0, 0}, {1, 1, 1, 0, 0, 0}, {2, 1, 1, 0, 0, 0},
    {2, 1, 1, 1, 0, 0}, {2, 2, 1, 1, 0, 0}, {2, 2, 1, 1, 1, 0}, {2, 2, 2, 1, 1, 0}, {2, 2, 2, 1, 1, 1},
    {2, 2, 2, 2, 1, 1}, {2, 2, 2, 2, 2, 1}, {2, 2, 2, 2, 2, 2}};
/// Bits by channel of one plane of one group.
constexpr double plane_bits = 4 * 8;

struct BudgetDrive : Drive {
    explicit BudgetDrive(const DriveShape& shape = {}, const TileFormat& values = value_format(16, 8))
        : Drive({key_format(48, 8)}, values, shape) {
        for (Index t = 0; t < shape.tiles; ++t)
            for (Index head = 0; head < shape.heads; ++head)
                set_value_steps(t, head, [](Index) { return 0.25f; });  // 16 (1/4)^2 = 1
    }
    /// value_bits: the mean of a code.
    void plan(double value_bits) {
        planner.begin(context(ReadPolicy::aligned(8.0, value_bits)));
        score_all(planner);
        planner.choose_values({});
    }
    BudgetPlanner planner;
};

TEST(BudgetPlanner, TakesThePlanesThatGainMost) {
    BudgetDrive drive;
    drive.set_weights(0, 0, weight);
    for (std::size_t count = 0; count < by_gain.size(); ++count) {
        // A tile has 128 codes a channel.
        const double exactly = static_cast<double>(count) * plane_bits / 128.0;
        drive.plan(exactly);
        EXPECT_EQ(drive.value_planes(drive.planner, 0), of_sixteen(by_gain[count])) << count << " planes";
        EXPECT_EQ(drive.value_bits(of_sixteen(by_gain[count])), static_cast<Index>(exactly * 128 * 16));
        if (count == 0) continue;
        drive.plan(exactly - 1.0 / 128.0);
        EXPECT_EQ(drive.value_planes(drive.planner, 0), of_sixteen(by_gain[count - 1]))
            << "a bit less than " << count << " planes";
    }
    // Ten groups count for nothing: read where the budget holds all that is stored, and not a bit before.
    drive.plan(8.0 - 1.0 / 128.0);
    EXPECT_EQ(drive.value_planes(drive.planner, 0), of_sixteen(by_gain.back()));
    drive.plan(8.0);
    EXPECT_EQ(drive.value_planes(drive.planner, 0), Planes(16, 2));
}

/// Groups that count alike are read alike, or not.
TEST(BudgetPlanner, TakesGroupsOfOneGainTogether) {
    BudgetDrive drive;
    drive.set_weights(0, 0, [](Index t) {
        return t == 0 ? 1.0f : t == 8 || t == 16 || t == 40 ? 0.5f : 0.0f;
    });
    drive.plan(3 * plane_bits / 128);  // 1 and two of three
    EXPECT_EQ(drive.value_planes(drive.planner, 0), of_sixteen({1, 0, 0, 0, 0, 0}));
    drive.plan(4 * plane_bits / 128);
    EXPECT_EQ(drive.value_planes(drive.planner, 0), of_sixteen({1, 1, 1, 0, 0, 1}));
}

/// Groups of 16 tokens, {4,2}: planes of 64 and 32 bits by channel. For each bit the first gains
/// (4^6 - 4^2) / 4 = 1020 and the second (4^2 - 1) / 2 = 7.5: 136 times as much, between 2^7 and 2^8.
TEST(BudgetPlanner, CountsPlanesByTheirWidthAndGroupsByTheirSize) {
    BudgetDrive drive({}, value_format(16, 6));
    // Groups that count 1, 2^-4, 2^-8.
    drive.set_weights(0, 0, [](Index t) {
        return t == 15 ? 1.0f : t == 16 ? 0.25f : t == 32 ? 0.0625f : 0.0f;
    });
    // Gains: 0: 0,0; -4: 1,0; -7.1: 0,1; -8: 2,0; -11.1: 1,1; -15.1: 2,1.
    const auto planes = [&](double bits) {
        drive.plan(bits / 128.0);
        Planes found = drive.value_planes(drive.planner, 0);
        found.resize(3);
        return found;
    };
    EXPECT_EQ(planes(63), (Planes{0, 0, 0}));
    EXPECT_EQ(planes(64), (Planes{1, 0, 0}));
    EXPECT_EQ(planes(127), (Planes{1, 0, 0}));
    EXPECT_EQ(planes(128), (Planes{1, 1, 0}));
    EXPECT_EQ(planes(159), (Planes{1, 1, 0}));
    EXPECT_EQ(planes(160), (Planes{2, 1, 0}));
    EXPECT_EQ(planes(223), (Planes{2, 1, 0})) << "32 bits are for no later plane";
    EXPECT_EQ(planes(224), (Planes{2, 1, 1}));
    EXPECT_EQ(planes(256), (Planes{2, 2, 1}));
    EXPECT_EQ(planes(288), (Planes{2, 2, 2}));
}

/// One budget for all heads and tiles; hidden tiles add nothing to it.
TEST(BudgetPlanner, SharesOutOverHeadsAndTiles) {
    BudgetDrive drive({.heads = 2, .tiles = 3});
    drive.sequence().hidden_from = 0;
    drive.sequence().hidden_to = 128;  // the first tile
    drive.set_weights(0, 0, [](Index) { return 1.0f; });
    drive.set_weights(0, 1, [](Index) { return 1.0f; });
    drive.set_weights(1, 1, [](Index t) { return t / 8 < 3 ? weight(t) : 0.0f; });  // 0, -3, -6
    drive.set_weights(2, 0, [](Index t) { return t == 127 ? 0.5f : 0.0f; });  // -2, so that none coincide
    // Two tiles of two heads: 4 x 128 codes a channel. Gains: 0 (b), -2 (c), -3 (b), -6 (b), -8 (b), -10 (c).
    const auto expect = [&](int planes, const Planes& b, int c) {
        drive.plan(planes * plane_bits / 512.0);
        Planes of_c(16, 0);
        of_c[15] = c;
        EXPECT_EQ(drive.value_planes(drive.planner, 1, 0), Planes(16, 0)) << planes;
        EXPECT_EQ(drive.value_planes(drive.planner, 1, 1), of_sixteen(b)) << planes;
        EXPECT_EQ(drive.value_planes(drive.planner, 2, 0), of_c) << planes;
        EXPECT_EQ(drive.value_planes(drive.planner, 2, 1), Planes(16, 0)) << planes;
    };
    expect(1, {1, 0, 0}, 0);
    expect(2, {1, 0, 0}, 1);
    expect(4, {1, 1, 1}, 1);
    expect(5, {2, 1, 1}, 1);
    expect(6, {2, 1, 1}, 2);
}

/// A tile whose largest score lies 2 below the row's counts e^-4 as much, one that the row does not see
/// nothing. Rows of a head add up.
TEST(BudgetPlanner, RelatesTilesToTheRowsLargestScore) {
    BudgetDrive drive({.rows_per_head = 2, .tiles = 3});
    const auto first = [](Index t) { return t == 0 ? 1.0f : 0.0f; };
    for (Index t = 0; t < 3; ++t) drive.set_weights(t, 0, first);
    drive.set_weights(2, 1, [](Index t) { return t == 8 ? 0.5f : 0.0f; });
    *drive.weights().tile_max(1, 0) = -2.0f;
    *drive.weights().tile_max(2, 0) = nothing_seen;
    drive.weights().set_row(1, 0.0f, 0.5f);
    // They count 1, e^-4 = 2^-5.8, 0, and (1/4)^2 = 2^-4. One row block, three tiles.
    const auto expect = [&](int planes, int zero, int one, int two) {
        drive.plan(planes * plane_bits / 384.0);
        EXPECT_EQ(drive.value_planes(drive.planner, 0), of_sixteen({zero}));
        EXPECT_EQ(drive.value_planes(drive.planner, 1), of_sixteen({one}));
        EXPECT_EQ(drive.value_planes(drive.planner, 2), of_sixteen({0, two}));
    };
    expect(1, 1, 0, 0);
    expect(2, 1, 0, 1);
    expect(3, 1, 1, 1);
    expect(4, 2, 1, 1);  // -8
    expect(5, 2, 1, 2);  // -12
    expect(6, 2, 2, 2);  // -13.8
}

TEST(BudgetPlanner, ReadsKeysWhole) {
    BudgetDrive drive;
    drive.planner.begin(drive.context(ReadPolicy::aligned(8.0, 5.0)));
    const Drive::Keys keys = drive.keys(drive.planner, drive.place(0), Matrix::Ones(1, 48));
    EXPECT_EQ(keys.planes, all_planes);
    EXPECT_EQ(keys.bits, 128 * 48 * 8);
    EXPECT_TRUE(keys.wide_factors);
    EXPECT_FALSE(drive.planner.wide_values());
    EXPECT_TRUE(drive.planner.values_wait());
    EXPECT_FALSE(drive.planner.refine());
}

}  // namespace
