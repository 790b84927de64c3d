// The fewest planes within an error (T13), and the bound that is certified.
#include "kvplane/read/tolerance.hpp"

#include <gtest/gtest.h>

#include "read/planner_support.hpp"

namespace {

using namespace kvplane_test;

/// Six groups of 8 channels of {4,4}, whose steps differ, met by queries of 2^-10.
constexpr float step_of_group[6] = {0x1p-10f, 0x1p-9f, 0x1p-6f, 0x1p-5f, 1.0f, 0x1p-11f};
float key_step(Index channel) {
    return step_of_group[channel / 8];
}
constexpr float query = 0x1p-10f;

/// A tolerance of 4 tanh(x) leaves half of itself, 2 tanh(x), to scores, which may then be off by 2 x. Each
/// of 48 channels has its share of that, a group of 8 a sixth: x / 3.
double tolerance(double x) {
    return 4.0 * std::tanh(x);
}
/// What makes that share 2^-10. The last bits are for the rounding of tanh and its inverse.
constexpr double share = 3 * 0x1p-10 * (1.0 + 1e-12);

/// A group of 8 channels of which no plane is read is off by 8 query step 255 / 2, after the first plane by
/// 8 query step 15 / 2: in units of 2^-10, 1020 step and 60 step. Within 1 is no plane for steps up to 2^-10
/// (0.996), one plane for steps up to 2^-6 (0.9375).
const Planes key_planes{0, 1, 1, 2, 2, 0};
constexpr double score_error =
    0x1p-10 * (1020 * 0x1p-10 + 60 * 0x1p-9 + 60 * 0x1p-6 + 0.0 + 0.0 + 1020 * 0x1p-11);

/// Values: 16 channels of steps 2^-8 from 0 up, so that a grid ends at 1, and its largest vector has norm 4.
/// A token's weight times 4 2^-8 is the norm of its step. Group g of 8 tokens weighs 2^(5 - g), one token's
/// or two tokens' weight, so that it counts 2^-1, 2^-2, ... 2^-6; the ten others nothing.
constexpr double norm = 4.0;
float group_weight(Index token) {
    const Index group = token / 8;
    if (group > 5 || token % 8 > 1) return 0.0f;
    return std::ldexp(1.0f, static_cast<int>(4 - group));
}

/// A certified bound is this one, but for the root of a float, which Eigen finds to the last place or so.
void expect_bound(double found, double bound) {
    EXPECT_NEAR(found, bound, 0x1p-22 * bound);
}

struct ToleranceDrive : Drive {
    explicit ToleranceDrive(const DriveShape& shape = {}, int key_bits = 8)
        : Drive({key_format(48, key_bits)}, value_format(16, 8), shape),
          queries(Matrix::Constant(shape.heads * shape.rows_per_head, 48, query)) {
        for (Index t = 0; t < shape.tiles; ++t) {
            set_key_steps(t, 0, key_step);
            set_value_steps(t, 0, [](Index) { return 0x1p-8f; });
        }
    }
    void begin(double error) { planner.begin(context(ReadPolicy::tolerance(error))); }
    Planes keys_of(Index tile) { return key_planes(planner, tile, queries); }
    Planes values_of(Index tile) { return value_planes(planner, tile); }
    ReadReport certified() const {
        ReadReport report;
        planner.certify(report);
        return report;
    }
    void score() {
        score_all(planner);
        planner.choose_values({});
    }
    Matrix queries;
    TolerancePlanner planner;
};

TEST(TolerancePlanner, GivesEveryChannelItsShare) {
    ToleranceDrive drive;
    drive.begin(tolerance(share));
    const Drive::Keys keys = drive.keys(drive.planner, drive.place(0), drive.queries);
    EXPECT_EQ(keys.planes, key_planes);
    EXPECT_EQ(keys.bits, 128 * 8 * (0 + 4 + 4 + 8 + 8 + 0));
    // Just below 60 2^-6 = 0.9375 and 60 2^-9 = 0.1171875 of that share, and at 0.498046875.
    drive.begin(tolerance(share * 0.9375));
    EXPECT_EQ(drive.keys_of(0), (Planes{1, 1, 1, 2, 2, 0}));
    drive.begin(tolerance(share * 0.9374));
    EXPECT_EQ(drive.keys_of(0), (Planes{1, 1, 2, 2, 2, 0}));
    drive.begin(tolerance(share * 0.4979));
    EXPECT_EQ(drive.keys_of(0), (Planes{1, 1, 2, 2, 2, 1}));
    drive.begin(tolerance(share * 0.1171));
    EXPECT_EQ(drive.keys_of(0), (Planes{1, 2, 2, 2, 2, 1}));
    // The largest of several rows counts, and a scale that queries do not hold yet.
    ToleranceDrive rows({.rows_per_head = 3, .query_tokens = 3});
    rows.queries *= 0.25f;
    rows.queries.row(1) *= -2.0f;
    rows.score_scales()[0] = 2.0;
    rows.begin(tolerance(share));
    EXPECT_EQ(rows.keys_of(0), key_planes);
}

/// Groups of other sizes have shares of their size: {4,2,1} makes groups of 32 and 8 channels of 40, {4,1}
/// one of 8. Off by size q s (2^unread - 1) / 2, where their share of 2^-10 is size / 8, q 2^-10: for each
/// channel no plane is off by 63.5 s and 15.5 s, one by 3.5 s and 0.5 s, two by 0.5 s; the share is an
/// eighth.
TEST(TolerancePlanner, GoesByTheSizeOfGroups) {
    Drive drive({{TileSide::keys, {{40, 7}, {8, 5}}, {Granularity::per_channel, 128, Scheme::min_max}}},
                value_format(16, 8), {});
    const auto plan = [&](float step) {
        drive.set_key_steps(0, 0, [&](Index) { return step; });
        TolerancePlanner planner;
        planner.begin(drive.context(ReadPolicy::tolerance(tolerance(share))));
        return drive.key_planes(planner, 0, Matrix::Constant(1, 48, query));
    };
    EXPECT_EQ(plan(0x1p-9f), (Planes{0, 0, 0}));  // 63.5 2^-9 = 0.124 <= 1/8
    EXPECT_EQ(plan(0x1p-8f), (Planes{1, 1, 0}));  // 15.5 2^-8 = 0.061
    EXPECT_EQ(plan(0x1p-7f), (Planes{1, 1, 0}));  // 15.5 2^-7 = 0.1211
    EXPECT_EQ(plan(0x1p-6f), (Planes{1, 1, 1}));  // 3.5 2^-6 = 0.055
    EXPECT_EQ(plan(0x1p-4f), (Planes{2, 2, 1}));  // 3.5 2^-4 = 0.22; 0.5 2^-4 = 0.031
    EXPECT_EQ(plan(0x1p-2f), (Planes{2, 2, 1}));  // 0.5 2^-2 = 0.125
    EXPECT_EQ(plan(0x1p-1f), all_planes);
}

/// Of fp16 a step is the last place of the largest magnitude, and the first plane is always read.
TEST(TolerancePlanner, ReadsTheFirstPlaneOfHalf) {
    Drive drive({key_format(48, 16)}, value_format(16, 8), {});
    // Largest magnitudes of 2^e, so steps of 2^(e - 10). After the first plane off by 8 q 2^(e - 10) 128,
    // after the second by 8 q 2^(e - 10) 8: in units of 2^-10 with q = 2^-10, 2^e and 2^(e - 4).
    constexpr int exponents[6] = {0, 1, 4, 5, -14, -3};
    drive.set_key_steps(0, 0, [&](Index c) { return std::ldexp(1.0f, exponents[c / 8]); });
    TolerancePlanner planner;
    planner.begin(drive.context(ReadPolicy::tolerance(tolerance(share))));
    EXPECT_EQ(drive.key_planes(planner, 0, Matrix::Constant(1, 48, query)), (Planes{1, 2, 2, 3, 1, 1}));
    planner.begin(drive.context(ReadPolicy::tolerance(1e300)));
    EXPECT_EQ(drive.key_planes(planner, 0, Matrix::Constant(1, 48, query)), Planes(6, 1));
}

/// Without error everything is read that has a part in the output.
TEST(TolerancePlanner, ReadsAllForAnErrorOfZero) {
    ToleranceDrive drive;
    drive.set_weights(0, 0, group_weight);
    drive.begin(0.0);
    const Drive::Keys keys = drive.keys(drive.planner, drive.place(0), drive.queries);
    EXPECT_EQ(keys.planes, all_planes);
    EXPECT_EQ(keys.bits, 128 * 48 * 8);
    drive.score();
    EXPECT_EQ(drive.values_of(0), of_sixteen({2, 2, 2, 2, 2, 2}));
    EXPECT_EQ(drive.certified().error_bound, 0.0);
    EXPECT_EQ(drive.certified().relative_error_bound, 0.0);
}

TEST(TolerancePlanner, ReadsNothingWhereAnyErrorWillDo) {
    ToleranceDrive drive;
    drive.queries.setConstant(0x1p-14f);
    drive.set_weights(0, 0, group_weight);
    drive.begin(1e300);
    const Drive::Keys keys = drive.keys(drive.planner, drive.place(0), drive.queries);
    EXPECT_EQ(keys.planes, Planes(6, 0));
    EXPECT_EQ(keys.bits, 0);
    drive.score();
    EXPECT_EQ(drive.values_of(0), Planes(16, 0));
    // Keys: 8 2^-14 127.5 times the sum of steps; values: 127.5 (1/2 + ... + 1/64).
    const double scores = 1020 * 0x1p-14 * (0x1p-10 + 0x1p-9 + 0x1p-6 + 0x1p-5 + 1.0 + 0x1p-11),
                 expected = 2.0 * std::tanh(0.5 * scores) * norm + 127.5 * (1.0 - 0x1p-6);
    expect_bound(drive.certified().error_bound, expected);
    expect_bound(drive.certified().relative_error_bound, expected / norm);
}

/// Where keys are read whole, values have all of the tolerance. A group that counts I is off by 7.5 I without
/// its second plane and by 120 I more without its first; planes gain 1.875 I and 30 I for each bit, and are
/// left out from the least gain on. That of a second plane coincides with that of the first of a group of a
/// 16th.
///     I           2^-6         2^-5        2^-4      2^-3      2^-2 (and first of 2^-6)
///     second      0.1171875    0.234375    0.46875   0.9375    1.875 + 1.875
TEST(TolerancePlanner, GivesValuesWhatKeysLeave) {
    ToleranceDrive drive;
    drive.queries.setOnes();  // and so all planes of all groups
    drive.set_weights(0, 0, group_weight);
    drive.set_key_steps(0, 0, [](Index) { return 1.0f; });
    const auto plan = [&](double off) {
        drive.begin(off / norm);
        EXPECT_EQ(drive.keys_of(0), all_planes);
        drive.score();
        return drive.values_of(0);
    };
    EXPECT_EQ(plan(0.117187), of_sixteen({2, 2, 2, 2, 2, 2}));
    EXPECT_EQ(plan(0.117188), of_sixteen({2, 2, 2, 2, 2, 1}));
    expect_bound(drive.certified().error_bound, 0.1171875);
    EXPECT_EQ(plan(0.820312), of_sixteen({2, 2, 2, 2, 1, 1}));
    EXPECT_EQ(plan(0.820313), of_sixteen({2, 2, 2, 1, 1, 1}));
    EXPECT_EQ(plan(1.757813), of_sixteen({2, 2, 1, 1, 1, 1}));
    expect_bound(drive.certified().error_bound, 1.7578125);
    expect_bound(drive.certified().relative_error_bound, 1.7578125 / norm);
    EXPECT_EQ(plan(5.507812), of_sixteen({2, 2, 1, 1, 1, 1}));
    EXPECT_EQ(plan(5.507813), of_sixteen({2, 1, 1, 1, 1, 0}));
    expect_bound(drive.certified().error_bound, 5.5078125);
}

/// The bound: 2 tanh(E / 2) times the largest norm, and what values are off by.
TEST(TolerancePlanner, CertifiesKeysAndValues) {
    ToleranceDrive drive;
    drive.set_weights(0, 0, group_weight);
    drive.weights().set_row(0, 0.0f, 0x1p-6f);  // groups count 2^-7 ... 2^-12
    drive.begin(tolerance(share));
    EXPECT_EQ(drive.keys_of(0), key_planes);
    drive.score();
    // Scores take 2 tanh(0.00249 / 2) = 0.00249 of 0.01172; what is left is 0.0369 in norm, and 64 times that
    // 2.363: between 1.7578125 and 5.5078125.
    EXPECT_EQ(drive.values_of(0), of_sixteen({2, 2, 1, 1, 1, 1}));
    const double expected = 2.0 * std::tanh(0.5 * score_error) * norm + 1.7578125 / 64;
    expect_bound(drive.certified().error_bound, expected);
    expect_bound(drive.certified().relative_error_bound, expected / norm);
    EXPECT_LE(drive.certified().relative_error_bound, tolerance(share));
}

/// Tokens outside tiles raise the norm that the bound is relative to.
TEST(TolerancePlanner, KnowsTokensOutsideTiles) {
    ToleranceDrive drive;
    drive.begin(tolerance(share));
    EXPECT_EQ(drive.keys_of(0), key_planes);
    Matrix values = Matrix::Zero(3, 16);
    values(1, 4) = -6.0f;
    values(1, 5) = 8.0f;  // of norm 10
    drive.planner.unpacked(0, {values.data(), 16, 3}, 16);
    drive.score();
    const double expected = 2.0 * std::tanh(0.5 * score_error);
    expect_bound(drive.certified().error_bound, expected * 10.0);
    expect_bound(drive.certified().relative_error_bound, expected);
}

/// Once a tile needs all planes, the rest of its chunk of 16 is read whole; a chunk's error is that of its
/// worst tile, that of values the sum.
TEST(TolerancePlanner, GoesByChunks) {
    ToleranceDrive drive({.tiles = 18});
    drive.set_key_steps(1, 0, [](Index) { return 1.0f; });
    drive.set_key_steps(17, 0, [](Index c) { return c < 8 ? 0x1p-11f : key_step(c); });
    for (Index t = 0; t < 18; ++t) drive.set_weights(t, 0, [](Index) { return 0.0f; });
    for (const Index t : {0, 17}) drive.set_weights(t, 0, [](Index i) { return i == 0 ? 1.0f : 0.0f; });
    drive.weights().set_row(0, 0.0f, 0x1p-10f);
    drive.begin(tolerance(share));
    EXPECT_EQ(drive.keys_of(0), key_planes);
    EXPECT_EQ(drive.keys_of(1), all_planes);
    EXPECT_EQ(drive.keys_of(2), all_planes);
    EXPECT_EQ(drive.keys_of(15), all_planes);
    EXPECT_EQ(drive.keys_of(16), key_planes);
    EXPECT_EQ(drive.keys_of(17), key_planes);
    drive.score();
    // Two groups that count 2^-16 each: 7.5 2^-16 and 120 2^-16 are far within 0.0369.
    EXPECT_EQ(drive.values_of(0), Planes(16, 0));
    EXPECT_EQ(drive.values_of(17), Planes(16, 0));
    expect_bound(drive.certified().error_bound,
                 2.0 * std::tanh(0.5 * score_error) * norm + 2 * 127.5 * 0x1p-16);
}

}  // namespace
