// Planes by budget (T12).
#include "kvplane/read/plan.hpp"

#include <gtest/gtest.h>

#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane::detail;
using kvplane_test::Random;

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
