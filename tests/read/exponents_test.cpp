// The published rule by exponents (T11), and the planner that reads by it.
#include "kvplane/read/exponents.hpp"

#include <gtest/gtest.h>

#include "kvplane/theory/bounds.hpp"
#include "read/planner_support.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane_test;

/// An fp16 number read from its first `bits` bits, the rest filled with their middle.
float read_half(Eigen::half x, int bits) {
    const auto all = std::bit_cast<std::uint16_t>(x);
    const int unread = 16 - bits;
    if (unread == 0) return static_cast<float>(x);
    const auto kept = static_cast<std::uint16_t>((all >> unread << unread) | 1 << (unread - 1));
    return static_cast<float>(std::bit_cast<Eigen::half>(kept));
}

TEST(Alignment, ExponentsAreThoseOfTheLastPlace) {
    EXPECT_EQ(alignment_exponent(1.0f), 0);
    EXPECT_EQ(alignment_exponent(-1.99f), 0);
    EXPECT_EQ(alignment_exponent(0.5f), -1);
    EXPECT_EQ(alignment_exponent(65504.0f), 15);
    EXPECT_EQ(alignment_exponent(0x1p-14f), -14);
    EXPECT_EQ(alignment_exponent(0x1p-20f), -14);
    EXPECT_EQ(alignment_exponent(0.0f), -14);
}

/// T11, for every fp16 key and each depth: with the supported thresholds a term read short is off by less
/// than 2^(E* - 10), and comes near it.
TEST(Alignment, EveryHalfObeysTheTermBound) {
    for (const int bits : {0, 8, 12}) {
        const int below = bits == 0 ? 12 : bits == 8 ? 8 : 4;
        double nearest = 0.0;
        for (std::uint32_t code = 0; code < 0x10000; ++code) {
            const auto k = std::bit_cast<Eigen::half>(static_cast<std::uint16_t>(code));
            const auto value = static_cast<float>(k);
            if (!std::isfinite(value)) continue;
            const int exponent = alignment_exponent(value);
            // The largest query of exponent 0; E* lies `below` above its sum with the key's.
            const double q = 2.0 - 0x1p-10;
            const float read = bits == 0 ? 0.0f : read_half(k, bits);
            const double off = q * std::abs(static_cast<double>(value) - static_cast<double>(read));
            const double bound = theory::aligned_term_bound(exponent + below);
            ASSERT_LT(off, bound) << value << " at " << bits << " bits";
            nearest = std::max(nearest, off / bound);
            // One exponent less and it breaks.
        }
        EXPECT_GT(nearest, 0.99) << bits << " bits: the bound is tight";
    }
}

TEST(Alignment, ScoresObeyTheBoundAndThePublishedThresholdsDoNot) {
    Random random(kvplane_test::seed());
    double worst_published = 0.0;
    for (int round = 0; round < 300; ++round) {
        const Index channels = 64, tokens = 32;
        Matrix keys = normal_matrix(tokens, channels, random), queries = normal_matrix(1, channels, random);
        for (Index c = 0; c < channels; ++c) {
            keys.col(c) *= std::ldexp(1.0f, static_cast<int>(random() % 12) - 6);
            queries(0, c) *= std::ldexp(1.0f, static_cast<int>(random() % 12) - 6);
        }
        keys = keys.cast<Eigen::half>().cast<float>();
        queries = queries.cast<Eigen::half>().cast<float>();
        const Eigen::RowVectorXf largest = keys.cwiseAbs().colwise().maxCoeff();
        int top = -100;
        for (Index c = 0; c < channels; ++c)
            top = std::max(top, alignment_exponent(queries(0, c)) + alignment_exponent(largest[c]));
        for (const bool published : {false, true}) {
            const std::vector<int> bits = aligned_key_bits(
                queries, largest,
                published ? AlignmentThresholds::published() : AlignmentThresholds::supported());
            Index truncated = 0;
            for (const int b : bits) truncated += b < 16;
            const double bound = theory::aligned_score_bound(truncated, top, channels);
            for (Index t = 0; t < tokens; ++t) {
                double off = 0.0;
                for (Index c = 0; c < channels; ++c)
                    off += static_cast<double>(queries(0, c)) *
                           (static_cast<double>(keys(t, c)) -
                            static_cast<double>(
                                bits[static_cast<std::size_t>(c)] == 0
                                    ? 0.0f
                                    : read_half(Eigen::half(keys(t, c)), bits[static_cast<std::size_t>(c)])));
                off = std::abs(off) / std::sqrt(static_cast<double>(channels));
                if (published)
                    worst_published = std::max(worst_published, bound > 0.0 ? off / bound : 0.0);
                else
                    ASSERT_LE(off, bound + 1e-12);
            }
        }
    }
    EXPECT_GT(worst_published, 1.0);
}

/// The published code takes the signed maximum of a channel's keys: one that is mostly negative seems small.
TEST(Alignment, TheSignedMaximumBreaksTheBound) {
    Matrix keys(2, 2);
    keys << 1.0f, 0x1p-9f, 1.0f, -1023.5f;
    const Matrix queries = Matrix::Ones(1, 2);
    const Eigen::RowVectorXf magnitude = keys.cwiseAbs().colwise().maxCoeff(),
                             with_sign = keys.colwise().maxCoeff();
    const auto off = [&](const std::vector<int>& bits) {
        return std::abs(static_cast<double>(keys(1, 1)) -
                        static_cast<double>(read_half(Eigen::half(keys(1, 1)), bits[1])));
    };
    const std::vector<int> right = aligned_key_bits(queries, magnitude),
                           wrong = aligned_key_bits(queries, with_sign);
    EXPECT_EQ(right[1], 16);
    EXPECT_EQ(off(right), 0.0);
    EXPECT_EQ(wrong[1], 8);
    // What that code believes E* to be: of the first channel.
    EXPECT_GT(off(wrong), 1000.0 * theory::aligned_term_bound(0));
}

TEST(Alignment, TheMostDemandingHeadDecides) {
    Matrix queries(2, 3);
    queries << 256.0f, 1.0f, 16.0f, 1.0f, 256.0f, 1.0f;
    const Eigen::RowVectorXf ones = Eigen::RowVectorXf::Ones(3);
    EXPECT_EQ(aligned_key_bits(queries.topRows(1), ones), (std::vector<int>{16, 8, 12}));
    EXPECT_EQ(aligned_key_bits(queries.bottomRows(1), ones), (std::vector<int>{8, 16, 8}));
    EXPECT_EQ(aligned_key_bits(queries, ones), (std::vector<int>{16, 16, 12}));
    queries(0, 1) = std::numeric_limits<float>::quiet_NaN();
    EXPECT_EQ(aligned_key_bits(queries, ones), (std::vector<int>{16, 16, 16}));
    Matrix weights(1, 4);
    weights << 0.6f, 0.03f, 0.002f, 0.0f;
    EXPECT_EQ(aligned_value_bits(weights), (std::vector<int>{16, 12, 8, 0}));
    EXPECT_EQ(aligned_value_bits(weights, AlignmentThresholds::published()), (std::vector<int>{16, 8, 8, 8}));
    refusal(ErrorCode::shape, [&] { aligned_key_bits(queries, Eigen::RowVectorXf::Ones(2)); });
    refusal(ErrorCode::option, [&] { aligned_key_bits(queries, ones, {4, 3}); });
    refusal(ErrorCode::option, [&] { aligned_key_bits(queries, ones, {4, 8, 7}); });
    refusal(ErrorCode::option, [&] { aligned_value_bits(weights, {-1, 3}); });
}

// -- The planner -------------------------------------------------------------------------------------------

/// Six groups of 8 fp16 channels, of which the largest magnitudes lie so many exponents below the first's.
constexpr int below_first[6] = {0, 4, 5, 6, 10, 14};
float by_group(Index channel) {
    return std::ldexp(1.0f, -below_first[channel / 8]);
}
/// Bits of 8 channels of 128 tokens each.
Index bits_of(std::initializer_list<int> groups) {
    Index sum = 0;
    for (const int bits : groups) sum += 128 * 8 * bits;
    return sum;
}

struct ExponentsDrive : Drive {
    explicit ExponentsDrive(const DriveShape& shape = {})
        : Drive({key_format(48, 16)}, value_format(16, 16), shape) {
        for (Index t = 0; t < shape.tiles; ++t) set_key_steps(t, 0, by_group);
    }
    Drive::Keys plan(const Matrix& queries,
                     const AlignmentThresholds& thresholds = AlignmentThresholds::accurate()) {
        planner.begin(context(ReadPolicy::exponents(thresholds)));
        return keys(planner, place(0), queries);
    }
    ExponentsPlanner planner;
};

/// Terms 4, 5, 6, 10 and 14 exponents below the largest get 16, 16, 12, 8 and no bits: planes {8,4,4}.
TEST(ExponentsPlanner, ReadsKeysByThresholds) {
    ExponentsDrive drive;
    const Matrix ones = Matrix::Ones(1, 48);
    const Drive::Keys accurate = drive.plan(ones);
    EXPECT_EQ(accurate.planes, (Planes{3, 3, 3, 2, 1, 0}));
    EXPECT_EQ(accurate.bits, bits_of({16, 16, 16, 12, 8, 0}));
    EXPECT_TRUE(accurate.wide_factors);
    const Drive::Keys supported = drive.plan(ones, AlignmentThresholds::supported());
    EXPECT_EQ(supported.planes, (Planes{3, 2, 2, 2, 1, 0}));
    EXPECT_EQ(supported.bits, bits_of({16, 12, 12, 12, 8, 0}));
    const Drive::Keys published = drive.plan(ones, AlignmentThresholds::published());
    EXPECT_EQ(published.planes, (Planes{3, 1, 1, 1, 1, 1})) << "never less than 8 bits";
    // One exponent less than each threshold.
    EXPECT_EQ(drive.plan(ones, {5, 11, 15}).planes, (Planes{3, 3, 2, 2, 2, 1}));
}

/// Exponents of queries and keys add up, whatever the fraction and the sign of the query.
TEST(ExponentsPlanner, TakesTheQueryInto) {
    ExponentsDrive drive;
    Matrix query(1, 48);
    for (Index c = 0; c < 48; ++c) query(0, c) = (c % 2 == 0 ? 1.99f : -1.0f) * by_group(47 - c);
    // by_group(47 - c) is that of the group as far from the other end: exponents -14, -10, -6, -5, -4, 0.
    // Terms: 0-14, -4-10, -5-6, -6-5, -10-4, -14-0 = -14, -14, -11, -11, -14, -14: 3 below the largest at
    // most.
    EXPECT_EQ(drive.plan(query).planes, Planes(6, 3));
    // With thresholds of 1, 2 and 4 exponents, 3 below is 8 bits.
    EXPECT_EQ(drive.plan(query, {1, 2, 4}).planes, (Planes{1, 1, 3, 3, 1, 1}));
    EXPECT_EQ(drive.plan(query, {1, 2, 3}).planes, (Planes{0, 0, 3, 3, 0, 0}));
}

/// Of a group the channel that needs most decides, of several rows the row where its terms lie nearest to the
/// largest of that row.
TEST(ExponentsPlanner, TheMostDemandingChannelAndRowDecide) {
    ExponentsDrive drive({.rows_per_head = 2});
    Matrix queries = Matrix::Ones(2, 48);
    drive.set_key_steps(0, 0, [](Index c) { return c == 45 ? 0x1p-9f : by_group(c); });
    EXPECT_EQ(drive.plan(queries).planes, (Planes{3, 3, 3, 2, 1, 2}));  // 9 below: 12 bits
    drive.set_key_steps(0, 0, by_group);
    // The second row sees the last group alone: 0 below its largest term.
    queries.row(1).setZero();
    queries.row(1).tail(8).setConstant(0x1p-10f);
    EXPECT_EQ(drive.plan(queries).planes, (Planes{3, 3, 3, 2, 1, 3}));
    // Channels that no row looks at are not read.
    queries.leftCols(8).setZero();
    EXPECT_EQ(drive.plan(queries).planes, (Planes{0, 3, 3, 3, 2, 3}));  // below 2^-4: 0, 1, 2, 6, (10)
}

/// What has grids is read whole.
TEST(ExponentsPlanner, LeavesGridsAlone) {
    Drive drive({{TileSide::keys,
                  {{20, 8}, {24, 16}, {8, 0}, {16, 3}},
                  {Granularity::per_channel, 128, Scheme::min_max}}},
                value_format(16, 8), {});
    drive.set_key_steps(0, 0, [](Index c) { return c < 28 ? 1.0f : c < 36 ? 0x1p-6f : 0x1p-10f; });
    ExponentsPlanner planner;
    planner.begin(drive.context(ReadPolicy::exponents()));
    // {4,4} in groups of 8, fp16 in groups of 8, {2,1} in one of 32.
    const Drive::Keys plan = drive.keys(planner, drive.place(0), Matrix::Ones(1, 68));
    EXPECT_EQ(plan.planes, (Planes{2, 2, 2, 3, 2, 1, 2}));
    EXPECT_EQ(plan.bits, 128 * (20 * 8 + 8 * (16 + 12 + 8) + 16 * 3));
    drive.score_all(planner);
    EXPECT_EQ(drive.value_planes(planner, 0), Planes(16, 2));
}

/// Values of fp16 by the exponents of weights: below a weight of 1, which is that of the largest score.
TEST(ExponentsPlanner, ReadsValuesByWeights) {
    ExponentsDrive drive({.rows_per_head = 2, .tiles = 2});
    // One token of each of seven groups has a weight; that of the last is between two powers of two.
    const float of_group[7] = {1.0f, 0x1p-5f, 0x1p-6f, 0x1p-9f, 0x1p-10f, 0x1p-14f, 1.99f * 0x1p-10f};
    const auto weight = [&](Index t) { return t % 8 == 3 && t / 8 < 7 ? of_group[t / 8] : 0.0f; };
    drive.set_weights(0, 0, weight);
    drive.set_weights(1, 0, weight);
    drive.set_weights(1, 1, [](Index t) { return t == 127 ? 1.0f : 0.0f; });
    *drive.weights().tile_max(1, 0) = std::log(1.2f * 0x1p-7f);
    *drive.weights().tile_max(1, 1) = -100.0f;  // far below the smallest threshold
    drive.planner.begin(drive.context(ReadPolicy::exponents()));
    drive.score_all(drive.planner);
    EXPECT_EQ(drive.value_planes(drive.planner, 0), of_sixteen({3, 3, 2, 2, 1, 0, 1}));
    // Times 1.2 2^-7 they lie 7, 12, 13, 16, 17, 21 and (1.99 1.2 > 2) 16 below.
    drive.planner.begin(drive.context(ReadPolicy::exponents({9, 14, 20})));
    drive.score_all(drive.planner);
    EXPECT_EQ(drive.value_planes(drive.planner, 1), of_sixteen({3, 2, 2, 1, 1, 0, 1}));
}

}  // namespace
