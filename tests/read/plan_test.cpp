// How many bits a query needs: the published rule by exponents (T11), planes by budget (T12).
#include "kvplane/read/plan.hpp"

#include <gtest/gtest.h>

#include "kvplane/read/exponents.hpp"

#include <numeric>

#include "kvplane/theory/bounds.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane::detail;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::refusal;

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

// -- Budgets -----------------------------------------------------------------------------------------------

double error_of(const std::vector<PlaneGroup>& units, const std::vector<std::uint8_t>& planes) {
    double error = 0.0;
    for (std::size_t u = 0; u < units.size(); ++u)
        error += std::ldexp(static_cast<double>(units[u].importance),
                            2 * (units[u].split.bits() - units[u].split.prefix_bits(planes[u])));
    return error;
}
Index bits_of(const std::vector<PlaneGroup>& units, const std::vector<std::uint8_t>& planes) {
    Index bits = 0;
    for (std::size_t u = 0; u < units.size(); ++u)
        bits += units[u].split.prefix_bits(planes[u]) * units[u].size;
    return bits;
}
std::vector<std::uint8_t> chosen(const std::vector<PlaneGroup>& units, Index budget) {
    std::vector<std::uint8_t> planes(units.size(), 77);
    std::vector<std::uint32_t> order(4 * units.size());
    choose_planes(units, budget, order, planes);
    return planes;
}

/// T12: all choices tried, the greedy one is the best where planes have one size; it never exceeds the
/// budget, and a larger budget never errs more.
TEST(ChoosePlanes, IsExactForPlanesOfOneSize) {
    Random random(kvplane_test::seed());
    for (int round = 0; round < 200; ++round) {
        std::vector<PlaneGroup> units(5);
        for (PlaneGroup& unit : units)
            unit = {std::ldexp(1.0f, static_cast<int>(random() % 30) - 15), plane_split(8), 8};
        double before = std::numeric_limits<double>::infinity();
        for (Index budget = 0; budget <= 5 * 64; budget += 16) {
            const std::vector<std::uint8_t> planes = chosen(units, budget);
            ASSERT_LE(bits_of(units, planes), budget);
            const double error = error_of(units, planes);
            ASSERT_LE(error, before);
            before = error;
            double best = std::numeric_limits<double>::infinity();
            for (int code = 0; code < 243; ++code) {
                std::vector<std::uint8_t> other;
                for (int left = code, i = 0; i < 5; ++i, left /= 3)
                    other.push_back(static_cast<std::uint8_t>(left % 3));
                if (bits_of(units, other) <= budget) best = std::min(best, error_of(units, other));
            }
            ASSERT_LE(error, best * (1.0 + 1e-6)) << "budget " << budget;
        }
    }
}

TEST(ChoosePlanes, TakesUnitsOfAnySize) {
    Random random(kvplane_test::seed());
    for (int round = 0; round < 200; ++round) {
        std::vector<PlaneGroup> units;
        Index all = 0;
        for (int i = 0; i < 20; ++i) {
            const int bits = 1 + static_cast<int>(random() % 8);
            units.push_back({std::exp(static_cast<float>(random() % 20) - 10.0f), plane_split(bits),
                             1 + static_cast<int>(random() % 32)});
            all += bits * units.back().size;
        }
        units[3].importance = std::numeric_limits<float>::quiet_NaN();
        const std::vector<std::uint8_t> everything = chosen(units, all), half = chosen(units, all / 2),
                                        nothing = chosen(units, 0);
        for (std::size_t u = 0; u < units.size(); ++u) {
            EXPECT_EQ(everything[u], units[u].split.count);
            EXPECT_EQ(nothing[u], 0);
        }
        std::vector<std::uint8_t> first(units.size());
        std::vector<std::uint32_t> order(3 * units.size());
        choose_planes(units, all, order, first, 1);
        EXPECT_EQ(first, std::vector<std::uint8_t>(units.size(), 1)) << "no deeper than asked for";
        EXPECT_EQ(half[3], units[3].split.count) << "what is not a number is read first";
        EXPECT_LE(bits_of(units, half), all / 2);
        EXPECT_GT(bits_of(units, half), all / 2 - 4 * 32);
    }
}

TEST(GainHistogram, ReadsWithinTheBudget) {
    Random random(kvplane_test::seed());
    GainHistogram histogram;
    for (int round = 0; round < 20; ++round) {
        histogram.clear();
        std::vector<float> gains(3000);
        for (float& gain : gains) gain = std::exp(static_cast<float>(random() % 4000) * 0.01f - 20.0f);
        gains[5] = 0.0f;
        gains[6] = std::numeric_limits<float>::max();
        for (const float gain : gains) histogram.add(gain, 7);
        for (const Index budget : {0, 6, 7, 5000, 20999, 21000, 30000}) {
            const float least = histogram.least(static_cast<double>(budget));
            const auto read =
                std::count_if(gains.begin(), gains.end(), [&](float gain) { return gain >= least; });
            ASSERT_LE(7 * read, budget);
            // What a bucket holds is at most what was left.
            const auto next =
                std::count_if(gains.begin(), gains.end(), [&](float gain) { return gain >= least / 1.07f; });
            if (budget < 21000) {
                ASSERT_GT(7 * std::max<std::ptrdiff_t>(next, 1), budget - 7) << budget;
            }
            // The other way round: what is not read comes to no more than allowed, and nearly to that.
            const float rest = histogram.least_but(static_cast<double>(budget));
            const auto below = [&](float end) {
                return 7 * std::count_if(gains.begin(), gains.end(), [&](float gain) { return gain < end; });
            };
            ASSERT_LE(below(rest), budget);
            if (budget < 21000) {
                ASSERT_GT(below(rest * 1.07f), budget - 7) << budget;
            }
        }
    }
}

}  // namespace
