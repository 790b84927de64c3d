// Keys by budget: the coarse pass, and the refining one over the tiles that have the weight.
#include "kvplane/read/coarse_pass.hpp"

#include <gtest/gtest.h>

#include "read/planner_support.hpp"

namespace {

using namespace kvplane_test;

/// Six groups of 8 channels of {4,4}, that count 2^0, 2^-6, 2^-12, ... 2^-30 for queries of 1. A second plane
/// gains a 2^-8 of what the first does.
float far_key_step(Index channel) {
    return std::ldexp(1.0f, -3 * static_cast<int>(channel / 8));
}
/// The same groups closer to each other: 2^0, 2^-2, ... 2^-10, so that all planes of a tile that has the
/// weight gain more than any of a tile that has none, which is 31 classes below.
float close_key_step(Index channel) {
    return std::ldexp(1.0f, -static_cast<int>(channel / 8));
}
/// Bits of one plane of one group, and bits of it in a tile.
constexpr Index group_plane_bits = 4 * 8, tile_plane_bits = 128 * group_plane_bits;

struct CoarseDrive : Drive {
    explicit CoarseDrive(const DriveShape& shape = {.tiles = 8}, Index channels = 48)
        : Drive({key_format(channels, 8)}, value_format(16, 8), shape),
          queries(Matrix::Ones(shape.heads * shape.rows_per_head, channels)) {
        for (Index t = 0; t < shape.tiles; ++t)
            for (Index head = 0; head < shape.heads; ++head) {
                set_key_steps(t, head, far_key_step);
                set_value_steps(t, head, [](Index) { return 0.25f; });
            }
    }
    void bring_groups_closer() {
        for (Index t = 0; t < shape().tiles; ++t)
            for (Index head = 0; head < shape().heads; ++head) set_key_steps(t, head, close_key_step);
    }
    /// Up to the end of the coarse pass; returns the bits that it took.
    Index coarse_pass(const ReadPolicy& policy) {
        planner.begin(context(policy));
        for (const Index t : planner.samples())
            for (Index block = 0; block < shape().row_blocks(); ++block)
                planner.sample(place(t, block), rows_of(queries, place(t, block)), scratch());
        planner.sampled();
        Index bits = 0;
        for (Index t = 0; t < shape().tiles; ++t)
            for (Index block = 0; block < shape().row_blocks(); ++block)
                if (!sequence().hidden(t)) bits += keys(planner, place(t, block), queries).bits;
        score_all(planner);
        return bits;
    }
    /// The bits that the refining pass takes more.
    Index refining_pass() {
        EXPECT_TRUE(planner.refine());
        Index bits = 0;
        for (Index t = 0; t < shape().tiles; ++t)
            for (Index block = 0; block < shape().row_blocks(); ++block)
                if (!sequence().hidden(t) && planner.refines(t, shape().row_block(block).head))
                    bits += keys(planner, place(t, block), queries).bits;
        return bits;
    }
    std::vector<Index> samples(const ReadPolicy& policy) {
        planner.begin(context(policy));
        return {planner.samples().begin(), planner.samples().end()};
    }
    Matrix queries;
    CoarsePassPlanner planner;
};

/// One token of weight 1: a tile that counts 1.
float heavy(Index token) {
    return token == 77 ? 1.0f : 0.0f;
}
/// Two tokens of weight 1/8: 2^-5.
float light(Index token) {
    return token == 3 || token == 100 ? 0.125f : 0.0f;
}

/// 384 bits are stored of a row of keys, of which an eighth has room for one plane of one group.
TEST(CoarsePassPlanner, LooksAtWhatCountsMost) {
    CoarseDrive drive;
    EXPECT_EQ(drive.coarse_pass(ReadPolicy::aligned(4.0, 8.0)), 8 * tile_plane_bits);
    const Drive::Keys keys = drive.keys(drive.planner, drive.place(3), drive.queries);
    EXPECT_EQ(keys.planes, (Planes{1, 0, 0, 0, 0, 0}));
    EXPECT_EQ(keys.next_planes, keys.planes);
    EXPECT_FALSE(keys.wide_factors);
    // What counts is the query times the step: here the fourth group, 2^10 2^-9.
    for (Index c = 24; c < 32; ++c) drive.queries(0, c) = 1024.0f;
    drive.coarse_pass(ReadPolicy::aligned(4.0, 8.0));
    EXPECT_EQ(drive.key_planes(drive.planner, 3, drive.queries), (Planes{0, 0, 0, 1, 0, 0}));
    // No more than half of the budget: 31 bits of 63 are no plane, 32 of 64 are one.
    drive.coarse_pass(ReadPolicy::aligned(63.0 / 48.0, 8.0));
    EXPECT_EQ(drive.key_planes(drive.planner, 3, drive.queries), Planes(6, 0));
    drive.coarse_pass(ReadPolicy::aligned(64.0 / 48.0, 8.0));
    EXPECT_EQ(drive.key_planes(drive.planner, 3, drive.queries), (Planes{0, 0, 0, 1, 0, 0}));
}

/// 96 channels: 12 groups, an eighth of 768 bits are three first planes, and never a second plane.
TEST(CoarsePassPlanner, LooksNoDeeperThanTheFirstPlane) {
    CoarseDrive drive({.tiles = 2}, 96);
    drive.set_key_steps(
        0, 0, [](Index c) { return c < 8 ? 1.0f : std::ldexp(1.0f, -6 - static_cast<int>(c / 8)); });
    EXPECT_EQ(drive.coarse_pass(ReadPolicy::aligned(4.0, 8.0)), 2 * 3 * tile_plane_bits);
    EXPECT_EQ(drive.key_planes(drive.planner, 1, drive.queries),
              (Planes{1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
}

/// One tile has all the weight. It gets all planes, the others keep those of the coarse pass. Of 8 tiles that
/// is 8 + 11 planes: 608 bits of one row of each, 76 on average.
TEST(CoarsePassPlanner, ReadsTheTileThatHasTheWeight) {
    CoarseDrive drive;
    drive.bring_groups_closer();
    drive.set_weights(5, 0, heavy);
    const Index coarse = drive.coarse_pass(ReadPolicy::aligned(76.0 / 48.0, 8.0)),
                more = drive.refining_pass();
    EXPECT_EQ(coarse, 8 * tile_plane_bits);
    EXPECT_EQ(more, 11 * tile_plane_bits);
    EXPECT_EQ(coarse + more, 8 * 128 * 76) << "the budget";
    for (Index t = 0; t < 8; ++t) {
        EXPECT_EQ(drive.planner.refines(t, 0), t == 5) << t;
        EXPECT_EQ(drive.key_planes(drive.planner, t, drive.queries),
                  t == 5 ? Planes(6, 2) : (Planes{1, 0, 0, 0, 0, 0}))
            << t;
    }
    const Drive::Keys keys = drive.keys(drive.planner, drive.place(5, 0, 6), drive.queries);
    EXPECT_TRUE(keys.wide_factors) << "everything is read";
    EXPECT_EQ(keys.next_planes, (Planes{1, 0, 0, 0, 0, 0}));
}

/// A bit less a row leaves out the plane that gains least, and spends nothing on other tiles.
TEST(CoarsePassPlanner, StaysWithinTheBudget) {
    CoarseDrive drive;
    drive.bring_groups_closer();
    drive.set_weights(5, 0, heavy);
    EXPECT_EQ(drive.coarse_pass(ReadPolicy::aligned(75.0 / 48.0, 8.0)), 8 * tile_plane_bits);
    EXPECT_EQ(drive.refining_pass(), 10 * tile_plane_bits);
    EXPECT_EQ(drive.key_planes(drive.planner, 5, drive.queries), (Planes{2, 2, 2, 2, 2, 1}));
    EXPECT_FALSE(drive.planner.refines(4, 0));
}

/// Two tiles, one of which counts 2^-5 of the other, five classes below. With 72 bits a row, 576 of all
/// tiles, of which the coarse pass took 256, ten planes are left. They gain (first plane, second plane):
///
///     heavy   0: taken, -8    -6, -14    -12, -20    -18, -26    -24, -32    -30, -38
///     light   0: taken, -13  -11, -19    -17, -25    -23, -31    ...
///
/// The ten largest are -6, -8, -11, -12, -13, -14, -17, -18, -19 and -20.
TEST(CoarsePassPlanner, SharesOutOverTilesByWeight) {
    CoarseDrive drive;
    drive.set_weights(5, 0, heavy);
    drive.set_weights(2, 0, light);
    drive.coarse_pass(ReadPolicy::aligned(72.0 / 48.0, 8.0));
    EXPECT_EQ(drive.refining_pass(), 10 * tile_plane_bits);
    EXPECT_EQ(drive.key_planes(drive.planner, 5, drive.queries), (Planes{2, 2, 2, 1, 0, 0}));
    EXPECT_EQ(drive.key_planes(drive.planner, 2, drive.queries), (Planes{2, 2, 1, 0, 0, 0}));
    EXPECT_EQ(drive.key_planes(drive.planner, 3, drive.queries), (Planes{1, 0, 0, 0, 0, 0}));
    for (Index t = 0; t < 8; ++t) EXPECT_EQ(drive.planner.refines(t, 0), t == 5 || t == 2) << t;
    // Tile 5 is then read at 4 (8 + 8 + 8 + 4) / 48 bits, 4.67 of which are planes of 8 or less.
    EXPECT_FALSE(drive.keys(drive.planner, drive.place(5), drive.queries).wide_factors);
}

/// Four tiles of one class cost four times as much: a plane of all of them, or of none.
TEST(CoarsePassPlanner, ReadsAClassOfTilesAlike) {
    CoarseDrive drive;
    for (const Index t : {1, 3, 4, 6}) drive.set_weights(t, 0, heavy);
    // 8 planes of the coarse pass, two planes (-6 and -8) for each of four tiles, three planes are not
    // enough.
    const Index row_bits = (8 + 2 * 4 + 3) * group_plane_bits;  // 608
    drive.coarse_pass(ReadPolicy::aligned(static_cast<double>(row_bits) / 8.0 / 48.0, 8.0));
    EXPECT_EQ(drive.refining_pass(), 8 * tile_plane_bits);
    for (const Index t : {1, 3, 4, 6})
        EXPECT_EQ(drive.key_planes(drive.planner, t, drive.queries), (Planes{2, 1, 0, 0, 0, 0}));
    drive.coarse_pass(
        ReadPolicy::aligned(static_cast<double>(row_bits + group_plane_bits) / 8.0 / 48.0, 8.0));
    EXPECT_EQ(drive.refining_pass(), 12 * tile_plane_bits);
    for (const Index t : {1, 3, 4, 6})
        EXPECT_EQ(drive.key_planes(drive.planner, t, drive.queries), (Planes{2, 1, 1, 0, 0, 0}));
}

/// Heads of their own planes share the budget: all of what is refined goes to the head with the weight.
TEST(CoarsePassPlanner, SharesOutOverHeads) {
    CoarseDrive drive({.heads = 2, .tiles = 4});
    drive.bring_groups_closer();
    // The coarse pass ranks the groups of both heads, whose keys count alike.
    drive.set_weights(1, 1, heavy);
    // 4 tiles: 12 planes of the coarse pass, and 11 for all of head 1's: 23 planes, 736 bits, 184 a row of 96
    // channels.
    EXPECT_EQ(drive.coarse_pass(ReadPolicy::aligned(184.0 / 96.0, 8.0)), 4 * 2 * tile_plane_bits)
        << "half of 184 bits are two planes";
    // So 8 planes, and of the 15 that are left 11 for head 1's tile 1. The next gains, 31 classes below, are
    // those of the second group in the 4 tiles of head 0 and 3 of head 1: the four planes that are left have
    // room for head 0's.
    EXPECT_EQ(drive.refining_pass() / tile_plane_bits, 11 + 4);
    EXPECT_EQ(drive.key_planes(drive.planner, 1, drive.queries, 1), Planes(6, 2));
    EXPECT_EQ(drive.key_planes(drive.planner, 1, drive.queries, 0), (Planes{1, 1, 0, 0, 0, 0}));
    EXPECT_EQ(drive.key_planes(drive.planner, 0, drive.queries, 1), (Planes{1, 0, 0, 0, 0, 0}));
}

/// The first tile that is seen, of four chunks of 16 at most.
TEST(CoarsePassPlanner, SamplesFourChunksAtMost) {
    const ReadPolicy policy = ReadPolicy::aligned(4.0, 8.0);
    const auto samples = [&](Index tiles, Index hidden_to) {
        CoarseDrive drive({.tiles = tiles});
        drive.sequence().hidden_to = hidden_to * tile_tokens;
        return drive.samples(policy);
    };
    EXPECT_EQ(samples(1, 0), (std::vector<Index>{0}));
    EXPECT_EQ(samples(8, 0), (std::vector<Index>{0}));
    EXPECT_EQ(samples(8, 3), (std::vector<Index>{3}));
    EXPECT_EQ(samples(8, 8), (std::vector<Index>{}));
    EXPECT_EQ(samples(64, 0), (std::vector<Index>{0, 16, 32, 48}));
    EXPECT_EQ(samples(65, 0), (std::vector<Index>{0, 32, 64}));  // every second of five
    EXPECT_EQ(samples(64, 20), (std::vector<Index>{20, 32, 48}));
}

/// Values have a budget of their own: planes in the order of what they gain (budget_test.cpp).
TEST(CoarsePassPlanner, ChoosesValuesByTheirOwnBudget) {
    CoarseDrive drive;
    drive.set_weights(5, 0, heavy);
    drive.set_weights(2, 0, light);
    // Three planes of 32 bits by channel, of 8 tiles of 128 codes.
    drive.coarse_pass(ReadPolicy::aligned(72.0 / 48.0, 3 * 32.0 / 1024.0));
    drive.refining_pass();
    drive.planner.choose_values({.key_bits = 0, .keys = 123456, .value_bits = 0, .values = 0});
    // heavy: group 9 counts 1; light: groups 0 and 12 count 2^-6 each, so their planes go together.
    Planes expected(16, 0);
    expected[9] = 1;
    EXPECT_EQ(drive.value_planes(drive.planner, 2), [] {
        Planes both(16, 0);
        both[0] = both[12] = 1;
        return both;
    }());
    EXPECT_EQ(drive.value_planes(drive.planner, 5), expected);
    EXPECT_EQ(drive.value_planes(drive.planner, 0), Planes(16, 0));
    EXPECT_FALSE(drive.planner.wide_values());
}

/// With one budget values get what keys leave of it.
TEST(CoarsePassPlanner, GivesValuesWhatKeysLeave) {
    CoarseDrive drive;
    drive.set_weights(5, 0, heavy);
    drive.set_weights(2, 0, light);
    drive.coarse_pass(ReadPolicy::aligned(2.0));
    drive.planner.refine();
    // 2 bits of 8 x 128 codes a channel, 16 channels: 32768 bits of values. Keys: 8 tiles of 128 x 48 codes
    // may have 98304. Where they took 98304 + 32768 - 3 x 512, three planes of 32 x 16 bits are left.
    const auto plan = [&](Index left) {
        drive.planner.choose_values(
            {.key_bits = 98304 + 32768 - left, .keys = 49152, .value_bits = 0, .values = 0});
        const Planes two = drive.value_planes(drive.planner, 2), five = drive.value_planes(drive.planner, 5);
        return Planes{five[9], two[0], two[12]};
    };
    EXPECT_EQ(plan(0), (Planes{0, 0, 0}));
    EXPECT_EQ(plan(511), (Planes{0, 0, 0}));
    EXPECT_EQ(plan(512), (Planes{1, 0, 0}));
    EXPECT_EQ(plan(3 * 512 - 1), (Planes{1, 0, 0}));
    EXPECT_EQ(plan(3 * 512), (Planes{1, 1, 1}));
    EXPECT_EQ(plan(4 * 512), (Planes{2, 1, 1}));
    EXPECT_EQ(plan(6 * 512), (Planes{2, 2, 2}));
    EXPECT_EQ(plan(-100000), (Planes{0, 0, 0})) << "keys took more than there was";
}

/// Where no plane of keys fits into the coarse pass, each side has a budget of its own: 24 bits, half of 48,
/// are no plane. Values then have 1 bit of each of 1024 codes a channel, whatever keys took.
TEST(CoarsePassPlanner, SharesNothingWhereNoPlaneOfKeysFits) {
    CoarseDrive drive;
    drive.bring_groups_closer();
    drive.set_weights(5, 0, heavy);
    EXPECT_EQ(drive.coarse_pass(ReadPolicy::aligned(1.0)), 0);
    // 12 planes of 32 bits for tile 5, 384 that 8 rows have together, of which none was taken.
    EXPECT_EQ(drive.refining_pass(), 12 * tile_plane_bits);
    EXPECT_EQ(drive.key_planes(drive.planner, 5, drive.queries), Planes(6, 2));
    drive.planner.choose_values({.key_bits = 1 << 30, .keys = 49152, .value_bits = 0, .values = 0});
    Planes expected(16, 0);
    expected[9] = 2;
    EXPECT_EQ(drive.value_planes(drive.planner, 5), expected);
}

}  // namespace
