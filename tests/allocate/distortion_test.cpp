// The analytic distortion curves against their definitions.
#include "kvplane/allocate/distortion.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "test_support.hpp"

namespace {

using kvplane::analytic_distortion;
using kvplane::DistortionCurve;
using kvplane::ErrorCode;

double density(double x) {
    return std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0));
}
double tail(double x) {
    return 0.5 * std::erfc(x / std::sqrt(2.0));
}

/// Integral of (x - y)^2 over [a, b) under the unit Gaussian; b may be infinite.
double cell_error(double a, double b, double y) {
    const double mass = tail(a) - tail(b), first = density(a) - density(b);
    const double second = mass + a * density(a) - (std::isinf(b) ? 0 : b * density(b));
    return second - 2 * y * first + y * y * mass;
}

/// Mean squared error of a symmetric quantizer with these levels >= 0, ascending (the first is 0 where the
/// number of levels is odd), each value going to the nearest level.
double quantizer_error(const std::vector<double>& levels) {
    double sum = 0, from = 0;
    for (std::size_t k = 0; k < levels.size(); ++k) {
        const bool last = k + 1 == levels.size();
        const double to = last ? std::numeric_limits<double>::infinity() : (levels[k] + levels[k + 1]) / 2;
        sum += 2 * cell_error(from, to, levels[k]);
        from = to;
    }
    return sum;
}

/// The positive half of `count` levels, `step` apart.
std::vector<double> uniform_levels(int count, double step) {
    std::vector<double> levels;
    for (int k = 0; k < (count + 1) / 2; ++k) levels.push_back(step * (k + (count % 2 == 0 ? 0.5 : 0.0)));
    return levels;
}

double best_uniform_error(int count) {
    double low = 1e-3, high = 3;
    const auto error = [&](double step) { return quantizer_error(uniform_levels(count, step)); };
    for (int i = 0; i < 200; ++i) {
        const double third = (high - low) / 3;
        (error(low + third) < error(high - third) ? high : low) +=
            error(low + third) < error(high - third) ? -third : third;
    }
    return error(low);
}

/// Lloyd's iteration from the best uniform quantizer: levels to centroids, until the error stands still.
double lloyd_max_error(int count) {
    std::vector<double> levels = uniform_levels(count, 4.0 / count + 0.5 / std::sqrt(count));
    double last = 2, error = 1;
    for (int i = 0; i < 200000 && error < last * (1 - 1e-15); ++i) {
        std::vector<double> next = levels;
        double from = 0;
        for (std::size_t k = 0; k < levels.size(); ++k) {
            const bool end = k + 1 == levels.size();
            const double to = end ? std::numeric_limits<double>::infinity() : (levels[k] + levels[k + 1]) / 2;
            if (k > 0 || count % 2 == 0) next[k] = (density(from) - density(to)) / (tail(from) - tail(to));
            from = to;
        }
        levels = next;
        last = error;
        error = quantizer_error(levels);
    }
    return error;
}

TEST(DistortionCurves, UniformTableIsTheUniformQuantizerOfLeastError) {
    EXPECT_EQ(analytic_distortion(DistortionCurve::uniform_gaussian, 0), 1);
    for (int bits = 1; bits <= 8; ++bits) {
        const double table = analytic_distortion(DistortionCurve::uniform_gaussian, bits);
        EXPECT_NEAR(table, best_uniform_error(1 << bits), 1e-9 * table) << bits;
    }
    EXPECT_NEAR(analytic_distortion(DistortionCurve::uniform_gaussian, 1.58), best_uniform_error(3), 1e-10);
}

TEST(DistortionCurves, LloydMaxTableIsTheFixedPointOfLloydsIteration) {
    EXPECT_EQ(analytic_distortion(DistortionCurve::lloyd_max_gaussian, 0), 1);
    // Lloyd's iteration nears its limit from above and ever more slowly: two-sided windows that widen.
    const double window[] = {0, 1e-10, 1e-10, 1e-9, 1e-8, 1e-7, 1e-5, 1e-3, 2e-2};
    for (int bits = 1; bits <= 8; ++bits) {
        const double table = analytic_distortion(DistortionCurve::lloyd_max_gaussian, bits);
        const double iterated = lloyd_max_error(1 << bits);
        EXPECT_GE(iterated, table * (1 - 1e-10)) << bits;
        EXPECT_LE(iterated, table * (1 + window[bits])) << bits;
        // The high-rate law sqrt(3) pi / 2 * 4^-b (Panter and Dite) is neared from below.
        const double law = std::sqrt(3.0) * std::acos(-1.0) / 2 * std::pow(4, -bits);
        EXPECT_LT(table, law);
        if (bits >= 6) {
            EXPECT_GT(table, 0.96 * law);
        }
    }
    EXPECT_NEAR(analytic_distortion(DistortionCurve::lloyd_max_gaussian, 1.58), lloyd_max_error(3), 1e-10);
}

TEST(DistortionCurves, AgreeWithMaxAsPrinted) {
    // IRE Trans. Inf. Theory 6 (1960), tables I and II: 2, 4, 8, 16, 32 levels. His last digit is not always
    // right.
    const double lloyd_max[] = {.3634, .1175, .03454, .009497, .002499};
    const double uniform[] = {.3634, .1188, .03744, .01154, .00349};
    for (int bits = 1; bits <= 5; ++bits) {
        EXPECT_NEAR(analytic_distortion(DistortionCurve::lloyd_max_gaussian, bits), lloyd_max[bits - 1],
                    3e-3 * lloyd_max[bits - 1]);
        EXPECT_NEAR(analytic_distortion(DistortionCurve::uniform_gaussian, bits), uniform[bits - 1],
                    3e-3 * uniform[bits - 1]);
    }
}

TEST(DistortionCurves, OrderAndRefusals) {
    for (int bits = 0; bits < 8; ++bits)
        for (const auto curve : {DistortionCurve::uniform_gaussian, DistortionCurve::lloyd_max_gaussian,
                                 DistortionCurve::four_to_minus_bits})
            EXPECT_LT(analytic_distortion(curve, bits + 1), analytic_distortion(curve, bits));
    for (int bits = 0; bits <= 8; ++bits) {
        EXPECT_LE(analytic_distortion(DistortionCurve::lloyd_max_gaussian, bits),
                  analytic_distortion(DistortionCurve::uniform_gaussian, bits));
        EXPECT_EQ(analytic_distortion(DistortionCurve::four_to_minus_bits, bits), std::pow(4, -bits));
    }
    EXPECT_EQ(analytic_distortion(DistortionCurve::four_to_minus_bits, 2.5), std::pow(4, -2.5));
    EXPECT_EQ(analytic_distortion(DistortionCurve::uniform_gaussian, std::log2(3.0)),
              analytic_distortion(DistortionCurve::uniform_gaussian, 1.58));
    for (const double width : {-1.0, 2.5, 9.0, 1.5})
        kvplane_test::refusal(ErrorCode::option,
                              [&] { analytic_distortion(DistortionCurve::uniform_gaussian, width); });
    kvplane_test::refusal(ErrorCode::not_finite,
                          [] { analytic_distortion(DistortionCurve::four_to_minus_bits, NAN); });
    kvplane_test::refusal(ErrorCode::option, [] { analytic_distortion(DistortionCurve::measured, 4); });
    kvplane_test::refusal(ErrorCode::option, [] { analytic_distortion(DistortionCurve::automatic, 4); });
}

}  // namespace
