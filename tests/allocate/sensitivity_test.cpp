// Choices by measured harm: the best there are, by trying them all; harms that fall; what is refused.
#include "kvplane/allocate/sensitivity.hpp"

#include <cmath>
#include <limits>
#include <string>

#include "test_support.hpp"

namespace {

using kvplane::allocate_sensitivity;
using kvplane::cheapest_mean_bits;
using kvplane::ErrorCode;
using kvplane::falling_harms;
using kvplane::harm_at;
using kvplane::SensitivityAllocation;
using kvplane::SensitivityOption;
using kvplane::SensitivityPart;
using kvplane_test::refusal;
using Parts = std::vector<SensitivityPart>;
using Options = std::vector<SensitivityOption>;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

/// Mean bits and total harm of a choice.
SensitivityOption total(const Parts& parts, const std::vector<std::size_t>& choice) {
    SensitivityOption sum;
    double elements = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
        const SensitivityOption& option = parts[i].options[choice[i]];
        sum.bits += parts[i].elements * option.bits;
        sum.harm += option.harm;
        elements += parts[i].elements;
    }
    sum.bits /= elements;
    return sum;
}

/// The least harm of all choices within the budget.
double least_harm(const Parts& parts, double mean_bits) {
    std::vector<std::size_t> choice(parts.size(), 0);
    double least = std::numeric_limits<double>::infinity();
    for (bool more = true; more;) {
        const SensitivityOption sum = total(parts, choice);
        if (sum.bits <= mean_bits * (1 + 1e-9)) least = std::min(least, sum.harm);
        more = false;
        for (std::size_t i = 0; i < parts.size() && !more; ++i) {
            more = ++choice[i] < parts[i].options.size();
            if (!more) choice[i] = 0;
        }
    }
    return least;
}

class Draws {
  public:
    explicit Draws(std::uint64_t seed) : engine_(seed) {}
    double real(double low, double high) { return std::uniform_real_distribution(low, high)(engine_); }
    std::size_t whole(std::size_t low, std::size_t high) {
        return std::uniform_int_distribution(low, high)(engine_);
    }

  private:
    std::mt19937_64 engine_;
};

/// Parts whose harms span as much as those of layers do, with options in no order, some of them worse than
/// cheaper ones.
Parts random_parts(Draws& random) {
    Parts parts(random.whole(1, 5));
    for (SensitivityPart& part : parts) {
        part.name = "part";
        part.elements = static_cast<double>(random.whole(1, 4) * 192);
        const double scale = std::exp(random.real(-6, 0));
        part.options.resize(random.whole(1, 5));
        for (SensitivityOption& option : part.options) {
            option.bits =
                random.whole(0, 3) == 0 ? random.real(0, 8) : static_cast<double>(random.whole(1, 6)) / 2;
            option.harm = scale * std::exp2(-2 * option.bits) * random.real(.2, 3);
        }
    }
    return parts;
}

TEST(Sensitivity, TheChoiceIsTheBestOfAll) {
    Draws random(kvplane_test::seed());
    for (int round = 0; round < kvplane_test::rounds(3000); ++round) {
        const Parts parts = random_parts(random);
        const double cheapest = cheapest_mean_bits(parts);
        const double budget = round % 4 == 0 ? cheapest : cheapest + random.real(0, 4);
        const SensitivityAllocation best = allocate_sensitivity(parts, budget);
        ASSERT_EQ(best.choice.size(), parts.size());
        const SensitivityOption sum = total(parts, best.choice);
        EXPECT_LE(sum.bits, budget * (1 + 1e-9)) << "round " << round;
        EXPECT_NEAR(best.bits, sum.bits, 1e-9);
        EXPECT_NEAR(best.harm, sum.harm, 1e-12 + 1e-9 * sum.harm);
        EXPECT_NEAR(sum.harm, least_harm(parts, budget), 1e-12 + 1e-9 * sum.harm) << "round " << round;
        EXPECT_EQ(allocate_sensitivity(parts, budget).choice, best.choice);
    }
}

/// A part of many elements pays more for the same bits.
TEST(Sensitivity, ElementsWeighBits) {
    Parts parts{{"large", 300, {{2, .2}, {4, .0}}}, {"small", 100, {{2, .1}, {4, .0}}}};
    EXPECT_EQ(allocate_sensitivity(parts, 2.5).choice, (std::vector<std::size_t>{0, 1}));
    EXPECT_EQ(allocate_sensitivity(parts, 3.5).choice, (std::vector<std::size_t>{1, 0}));
    EXPECT_DOUBLE_EQ(allocate_sensitivity(parts, 3.5).bits, 3.5);
    EXPECT_EQ(allocate_sensitivity(parts, 4).price, 0.0);
}

TEST(Sensitivity, HarmsFallWithBits) {
    const auto falling = [](const Options& options) { return falling_harms(options); };
    EXPECT_EQ(falling({{1, .8}, {2, .4}, {3, .1}}), (std::vector<double>{.8, .4, .1}));
    EXPECT_EQ(falling({{1, .8}, {2, .1}, {3, .3}}), (std::vector<double>{.8, .2, .2}));
    // .25 and 1 make .625, which draws in the first .25.
    EXPECT_EQ(falling({{1, .25}, {2, .25}, {3, 1}, {4, 0}}), (std::vector<double>{.5, .5, .5, 0}));
    Draws random(kvplane_test::seed());
    for (int round = 0; round < kvplane_test::rounds(300); ++round) {
        Options options(random.whole(1, 8));
        double sum = 0, pooled = 0;
        for (std::size_t i = 0; i < options.size(); ++i) {
            options[i] = {static_cast<double>(i) + random.real(0, .5), random.real(0, 1)};
            sum += options[i].harm;
        }
        const std::vector<double> harms = falling_harms(options);
        for (std::size_t i = 0; i < harms.size(); ++i) {
            pooled += harms[i];
            if (i > 0) {
                EXPECT_LE(harms[i], harms[i - 1]) << "round " << round;
            }
        }
        EXPECT_NEAR(pooled, sum, 1e-12);
    }
}

TEST(Sensitivity, HarmsBetweenAndBeyondWhatWasMeasured) {
    const Options measured{{1, .64}, {3, .04}, {4, .04}};
    EXPECT_DOUBLE_EQ(harm_at(measured, 1), .64);
    EXPECT_DOUBLE_EQ(harm_at(measured, 3), .04);
    EXPECT_NEAR(harm_at(measured, 2), .16, 1e-15);  // a quarter for each bit
    EXPECT_NEAR(harm_at(measured, 1.5), .32, 1e-15);
    EXPECT_DOUBLE_EQ(harm_at(measured, 3.5), .04);
    EXPECT_DOUBLE_EQ(harm_at(measured, 0), 2.56);
    EXPECT_DOUBLE_EQ(harm_at(measured, 6), .0025);
    EXPECT_DOUBLE_EQ(harm_at(Options{{2, .5}, {4, 0}}, 3), .25);
    EXPECT_DOUBLE_EQ(harm_at(Options{{2, .5}}, 3), .125);
}

TEST(Sensitivity, BadInputIsRefused) {
    const Parts good{{"keys of layer 0", 1, {{2, .1}, {3, .01}}}, {"values of layer 7", 1, {{2, .1}}}};
    const auto refused = [&](ErrorCode code, auto&& change, double budget = 3) {
        Parts parts = good;
        change(parts);
        return refusal(code, [&] { allocate_sensitivity(parts, budget); });
    };
    const auto says = [](const std::string& sentence, const char* what) {
        EXPECT_NE(sentence.find(what), std::string::npos) << sentence;
    };
    says(refused(ErrorCode::option, [](Parts& p) { p.clear(); }), "no parts");
    says(refused(ErrorCode::option, [](Parts& p) { p[1].options.clear(); }), "values of layer 7: no options");
    says(refused(ErrorCode::option, [](Parts& p) { p[0].options[1].harm = -1e-9; }),
         "keys of layer 0: option 1");
    says(refused(ErrorCode::not_finite, [](Parts& p) { p[0].options[0].harm = nan; }),
         "keys of layer 0: option 0");
    refused(ErrorCode::option, [](Parts& p) { p[0].options[0].bits = -1; });
    refused(ErrorCode::not_finite, [](Parts& p) { p[0].options[0].bits = nan; });
    refused(ErrorCode::option, [](Parts& p) { p[0].elements = 0; });
    refused(ErrorCode::not_finite, [](Parts& p) { p[0].elements = nan; });
    says(refused(
             ErrorCode::option, [](Parts&) {}, 1.9),
         "the cheapest choice takes 2");
    refused(
        ErrorCode::not_finite, [](Parts&) {}, nan);
    refusal(ErrorCode::option, [] { falling_harms(Options{}); });
    refusal(ErrorCode::option, [] { falling_harms(Options{{2, .1}, {2, .1}}); });
    refusal(ErrorCode::option, [] { harm_at(Options{{3, .1}, {2, .1}}, 2); });
    refusal(ErrorCode::not_finite, [] { harm_at(Options{{2, nan}}, 2); });
    refusal(ErrorCode::not_finite, [] { harm_at(Options{{2, .1}}, nan); });
    refusal(ErrorCode::option, [] { harm_at(Options{{2, .1}}, -1); });
}

}  // namespace
