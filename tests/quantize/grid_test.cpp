// The affine grid: directed rounding to fp16, the three fits, the one decoder, the bound.
#include "kvplane/quantize/grid.hpp"

#include <limits>
#include <vector>

#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::fit_grid;
using kvplane::fp16_max;
using kvplane::Grid;
using kvplane::Scheme;

constexpr Scheme all_schemes[] = {Scheme::cell, Scheme::min_max, Scheme::symmetric};
constexpr float infinity = std::numeric_limits<float>::infinity();

int least_bits(Scheme scheme) {
    return scheme == Scheme::symmetric ? 2 : 1;
}

bool is_half(float x) {
    return static_cast<float>(Eigen::half(x)) == x;
}

/// All finite fp16 values, ascending, by their definition: sign, exponent, fraction.
std::vector<float> all_halves() {
    std::vector<float> magnitudes;
    for (int fraction = 0; fraction < 1024; ++fraction)
        magnitudes.push_back(std::ldexp(static_cast<float>(fraction), -24));
    for (int exponent = -14; exponent <= 15; ++exponent)
        for (int fraction = 0; fraction < 1024; ++fraction)
            magnitudes.push_back(std::ldexp(static_cast<float>(1024 + fraction), exponent - 10));
    std::vector<float> all;
    for (std::size_t i = magnitudes.size() - 1; i > 0; --i) all.push_back(-magnitudes[i]);
    all.insert(all.end(), magnitudes.begin(), magnitudes.end());
    return all;
}

// -- Rounding ---------------------------------------------------------------------------------------------

TEST(HalfRounding, BetweenAllNeighbours) {
    const std::vector<float> halves = all_halves();
    ASSERT_EQ(halves.size(), 2U * 31 * 1024 - 1);
    ASSERT_EQ(halves.back(), fp16_max);
    for (std::size_t i = 0; i < halves.size(); ++i) {
        const float low = halves[i];
        ASSERT_EQ(static_cast<float>(kvplane::half_below(low)), low);
        ASSERT_EQ(static_cast<float>(kvplane::half_above(low)), low);
        if (i + 1 == halves.size()) break;
        const float high = halves[i + 1], gap = high - low;
        for (const float x : {std::nextafter(low, high), low + 0.25f * gap, low + 0.5f * gap,
                              low + 0.75f * gap, std::nextafter(high, low)}) {
            ASSERT_EQ(static_cast<float>(kvplane::half_below(x)), low) << x;
            ASSERT_EQ(static_cast<float>(kvplane::half_above(x)), high) << x;
        }
    }
}

TEST(HalfRounding, TinyValuesDoNotVanish) {
    const float least = std::numeric_limits<float>::denorm_min();
    EXPECT_EQ(static_cast<float>(kvplane::half_above(least)), 0x1p-24f);
    EXPECT_EQ(static_cast<float>(kvplane::half_below(least)), 0.0f);
    EXPECT_EQ(static_cast<float>(kvplane::half_below(-least)), -0x1p-24f);
    EXPECT_EQ(static_cast<float>(kvplane::half_above(-least)), 0.0f);
}

TEST(HalfRounding, BeyondTheRange) {
    for (const float x : {std::nextafter(fp16_max, infinity), 65519.0f, 65520.0f, 65536.0f, 1e30f}) {
        EXPECT_EQ(static_cast<float>(kvplane::half_above(x)), infinity) << x;
        EXPECT_EQ(static_cast<float>(kvplane::half_below(-x)), -infinity) << x;
    }
}

TEST(PowerOfTwo, IsExact) {
    for (int exponent = -30; exponent <= 30; ++exponent)
        EXPECT_EQ(kvplane::power_of_two(exponent), std::ldexp(1.0f, exponent));
}

// -- Fits -------------------------------------------------------------------------------------------------

/// Where the ideal grid is exact in fp16 the fit must give just that.
TEST(Fit, IsTheDefinitionWhereFp16HoldsIt) {
    for (int bits = 1; bits <= 8; ++bits) {
        const auto codes = static_cast<float>(1 << bits);
        const Grid cell = fit_grid(Scheme::cell, bits, -3.0f, -3.0f + 0.25f * codes);
        EXPECT_EQ(cell.lower, -3.0f) << bits;
        EXPECT_EQ(cell.step, 0.25f) << bits;
        EXPECT_EQ(cell.bits, bits);
        const Grid min_max = fit_grid(Scheme::min_max, bits, -3.0f, -3.0f + 0.25f * (codes - 1.0f));
        EXPECT_EQ(min_max.lower, -3.125f) << bits;
        EXPECT_EQ(min_max.step, 0.25f) << bits;
        if (bits < 2) continue;
        const float last = 0.5f * codes - 1.0f;
        for (const auto& [min, max] : {std::pair{-0.25f * last, 0.0f}, std::pair{0.1f, 0.25f * last}}) {
            const Grid symmetric = fit_grid(Scheme::symmetric, bits, min, max);
            EXPECT_EQ(symmetric.step, 0.25f) << bits;
            EXPECT_EQ(symmetric.lower, -0.25f * (0.5f * codes + 0.5f)) << bits;
        }
    }
}

/// The two's complement quantizer of arXiv 2502.15075: code c stands for alpha (c - 2^(bits-1)).
TEST(Fit, SymmetricDecodesMultiplesOfAlpha) {
    for (int bits = 2; bits <= 8; ++bits) {
        const Grid grid = fit_grid(Scheme::symmetric, bits, -1.9f, 1.2f);
        for (int code = 0; code < grid.codes(); ++code)
            EXPECT_EQ(grid.decode(code), grid.step * static_cast<float>(code - grid.codes() / 2));
        EXPECT_EQ(grid.encode(0.0f), grid.codes() / 2);
        EXPECT_EQ(grid.encode(-1.9f), 1) << "the code below -M is never used";
    }
}

/// ggml's Q4_0: the value of the largest magnitude has the code 0, whatever its sign, and the step has the
/// opposite one.
TEST(Fit, FullRangeUsesEveryCode) {
    for (int bits = 1; bits <= 8; ++bits) {
        const float half = std::ldexp(0.5f, bits);
        for (const auto& [min, max] : {std::pair{-half, 0.7f * half}, std::pair{-0.7f * half, half}}) {
            const Grid grid = fit_grid(Scheme::full_range, bits, min, max);
            const float largest = -min > max ? min : max;
            EXPECT_EQ(grid.step, largest < 0.0f ? 1.0f : -1.0f) << bits;
            EXPECT_EQ(grid.encode(largest), 0);
            EXPECT_EQ(grid.decode(0), largest);
            for (int code = 0; code < grid.codes(); ++code) {
                EXPECT_EQ(grid.decode(code), grid.step * (static_cast<float>(code) - half));
                EXPECT_EQ(grid.encode(grid.decode(code)), code);
            }
            EXPECT_EQ(grid.encode(-largest), grid.codes() - 1) << "clipped";
            EXPECT_GE(grid.error_bound(), 0.5f);
        }
        // Equal magnitudes: the upper one has it, as in ggml only if it comes first.
        EXPECT_EQ(fit_grid(Scheme::full_range, bits, -half, half).step, -1.0f);
        EXPECT_EQ(fit_grid(Scheme::full_range, bits, 0.0f, 0.0f).step, 0.0f);
        EXPECT_EQ(fit_grid(Scheme::full_range, bits, -half, -half).step, 1.0f) << "all values alike";
    }
}

/// All steps that a byte can hold come back, and what lies between goes to the nearest.
TEST(StepByte, RoundsToNearest) {
    for (int byte = 0; byte < 248; ++byte) {
        const auto at = [](int b) {
            return static_cast<float>(kvplane::half_of_step(static_cast<std::uint8_t>(b)));
        };
        const float here = at(byte);
        EXPECT_EQ(kvplane::step_byte(here), byte);
        if (byte == 247) break;
        const float next = at(byte + 1);
        EXPECT_GT(next, here);
        EXPECT_EQ(kvplane::step_byte(here + 0.49f * (next - here)), byte);
        EXPECT_EQ(kvplane::step_byte(here + 0.51f * (next - here)), byte + 1);
    }
    EXPECT_EQ(kvplane::step_byte(65504.0f), 247);
    EXPECT_EQ(kvplane::step_byte(1e30f), 247);
    EXPECT_EQ(static_cast<float>(kvplane::half_of_step(247)), 61440.0f);
}

struct Range {
    float min, max;
};

/// Ranges of every kind: wide, narrow beside their distance from zero, of one sign, subnormal.
std::vector<Range> ranges(kvplane_test::Random& random, int count) {
    std::vector<Range> all{{0.0f, fp16_max / 2}, {-0.1f, 0.1f},     {3000.0f, 3000.01f},  {-7.0f, -6.9999f},
                           {0.0f, 1e-7f},        {-1e-40f, 2e-40f}, {65472.0f, fp16_max}, {1.0f, 1.0000001f}};
    std::uniform_real_distribution<float> mantissa(1.0f, 2.0f);
    std::uniform_int_distribution<int> exponent(-26, 13), sign(0, 1);
    const auto number = [&] {
        return (sign(random) ? 1.0f : -1.0f) * std::ldexp(mantissa(random), exponent(random));
    };
    while (count-- > 0) {
        const float a = number(), b = number();
        all.push_back({std::min(a, b), std::max(a, b)});
    }
    return all;
}

/// Stored in fp16, rounded outward, and by no more than fp16's spacing.
TEST(Fit, CoversTheRangeTightlyInFp16) {
    kvplane_test::Random random(kvplane_test::seed());
    for (const auto& [min, max] : ranges(random, 20000)) {
        for (const Scheme scheme : all_schemes) {
            for (int bits = least_bits(scheme); bits <= 8; ++bits) {
                const Grid grid = fit_grid(scheme, bits, min, max);
                SCOPED_TRACE(testing::Message() << name(scheme) << " " << bits << " bits, " << min << " to "
                                                << max << ": lower " << grid.lower << " step " << grid.step);
                ASSERT_TRUE(is_half(grid.step));
                ASSERT_GT(grid.step, 0.0f);
                const double codes = 1 << bits, range = static_cast<double>(max) - min;
                const double largest = std::max(std::abs(min), std::abs(max));
                double ideal_step = range / codes, ideal_lower = min;
                if (scheme == Scheme::min_max) {
                    ideal_step = range / (codes - 1.0);
                    ideal_lower = min - 0.5 * ideal_step;
                }
                if (scheme == Scheme::symmetric) {
                    ideal_step = largest / (0.5 * codes - 1.0);
                    ASSERT_EQ(static_cast<double>(grid.lower),
                              -static_cast<double>(grid.step) * (0.5 * codes + 0.5));
                } else {
                    ASSERT_TRUE(is_half(grid.lower));
                    ASSERT_LE(grid.lower, min);
                    ASSERT_GE(grid.lower, ideal_lower - std::abs(ideal_lower) / 512.0 - 0x1p-23);
                }
                // fp32 arithmetic may lose 2^-23 of the numbers involved before it rounds outward.
                const double lost = 0x1p-23 * (std::abs(ideal_lower) + range);
                ASSERT_GE(static_cast<double>(grid.lower) + codes * grid.step, max - 2.0 * lost);
                // Outward: by a spacing of lower spread over the cells, and by one of step.
                const double moved_lower = std::abs(ideal_lower) / 512.0 + 0x1p-23;
                const double largest_step =
                    (ideal_step + moved_lower / (codes - 0.5)) * (1.0 + 1.0 / 512.0) + 0x1p-23;
                ASSERT_LE(grid.step, largest_step);
                ASSERT_GE(grid.step, ideal_step * (1.0 - 0x1p-20) - lost / codes);
            }
        }
    }
}

TEST(Fit, OfEqualValuesIsThatValueInFp16) {
    for (const float x : {0.0f, -0.0f, 0.1f, -1234.56f, 1e-7f, -1e-40f, fp16_max, -fp16_max}) {
        for (const Scheme scheme : {Scheme::cell, Scheme::min_max}) {
            const Grid grid = fit_grid(scheme, 4, x, x);
            EXPECT_EQ(grid.step, 0.0f);
            EXPECT_EQ(grid.decode(grid.encode(x)), static_cast<float>(Eigen::half(x))) << x;
            EXPECT_FALSE(std::signbit(grid.lower) && grid.lower == 0.0f) << "minus zero would change bytes";
            EXPECT_LE(std::abs(x - grid.decode(0)), grid.error_bound()) << x;
        }
    }
    // One value at the middle between two fp16 neighbours: the bound is reached.
    const float middle = 1.0f + 0x1p-11f;
    const Grid grid = fit_grid(Scheme::cell, 4, middle, middle);
    EXPECT_EQ(std::abs(middle - grid.decode(0)), grid.error_bound());
}

/// The fit that would need a lower end beyond fp16 takes the end of fp16: all data that fp16 holds can be
/// stored, but for 1-bit min_max grids over more than half of its range.
TEST(Fit, ReachesTheEndsOfFp16) {
    for (const auto& [min, max] : {Range{-fp16_max, fp16_max}, Range{-fp16_max, 0.0f}, Range{0.0f, fp16_max},
                                   Range{-fp16_max, -65000.0f}, Range{65000.0f, fp16_max}}) {
        for (const Scheme scheme : all_schemes) {
            for (int bits = 2; bits <= 8; ++bits) {
                SCOPED_TRACE(testing::Message()
                             << name(scheme) << " " << bits << " bits, " << min << " to " << max);
                const Grid grid = fit_grid(scheme, bits, min, max);
                ASSERT_TRUE(std::isfinite(grid.lower) && std::isfinite(grid.step));
                for (const float x : {min, 0.5f * min + 0.5f * max, max})
                    EXPECT_LE(std::abs(x - grid.decode(grid.encode(x))), grid.error_bound());
            }
        }
        EXPECT_TRUE(std::isfinite(fit_grid(Scheme::cell, 1, min, max).step));
    }
    EXPECT_EQ(fit_grid(Scheme::min_max, 1, -fp16_max, fp16_max).step, infinity);
}

// -- Encoder and decoder ----------------------------------------------------------------------------------

TEST(Encode, FindsTheCellAndClampsOutside) {
    for (int bits = 1; bits <= 8; ++bits) {
        for (const float lower : {0.0f, -2.0f}) {
            const Grid grid = fit_grid(Scheme::cell, bits, lower, lower + std::ldexp(0.5f, bits));
            for (int code = 0; code < grid.codes(); ++code) {
                const float left = grid.lower + grid.step * static_cast<float>(code);
                const float right = left + grid.step;
                EXPECT_EQ(grid.encode(left), code);
                EXPECT_EQ(grid.encode(grid.decode(code)), code);
                EXPECT_EQ(grid.encode(lower == 0.0f ? std::nextafter(right, 0.0f) : right - 0.001f), code);
            }
            for (const float below : {lower - 0.1f, -fp16_max}) EXPECT_EQ(grid.encode(below), 0);
            for (const float above : {grid.upper(), grid.upper() + 0.1f, fp16_max})
                EXPECT_EQ(grid.encode(above), grid.codes() - 1);
        }
    }
}

TEST(Decode, PrefixIsTheCoarserCellOfTheSameInterval) {
    for (int bits = 1; bits <= 8; ++bits) {
        const Grid grid{-1.5f, 0.125f, bits};
        for (int depth = 1; depth <= bits; ++depth) {
            const float wide = (grid.upper() - grid.lower) / static_cast<float>(1 << depth);
            for (int prefix = 0; prefix < (1 << depth); ++prefix)
                EXPECT_EQ(grid.decode(prefix, depth),
                          grid.lower + wide * static_cast<float>(prefix) + 0.5f * wide);
        }
    }
}

/// The bound holds for every value and depth, and values at the edges of cells come within 1% of it.
TEST(ErrorBound, HoldsAndIsReached) {
    kvplane_test::Random random(kvplane_test::seed());
    std::uniform_real_distribution<double> part(0.0, 1.0);
    for (const auto& [min, max] : ranges(random, 3000)) {
        for (const Scheme scheme : all_schemes) {
            for (int bits = least_bits(scheme); bits <= 8; ++bits) {
                const Grid grid = fit_grid(scheme, bits, min, max);
                for (int depth = 1; depth <= bits; ++depth) {
                    const double bound = grid.error_bound(depth);
                    const auto error = [&](float x) {
                        return std::abs(static_cast<double>(x) -
                                        grid.decode(grid.encode(x) >> (bits - depth), depth));
                    };
                    const auto inside = [&, low = min, high = max](double x) {
                        return std::min(std::max(static_cast<float>(x), low), high);
                    };
                    double worst = std::max(error(min), error(max));
                    for (int i = 0; i < 4; ++i) {
                        const double cell = std::floor(part(random) * (1 << depth));
                        const double edge = grid.lower + grid.step * std::ldexp(cell, bits - depth);
                        worst = std::max(worst, error(inside(edge)));
                        worst = std::max(worst, error(inside(min + part(random) * (max - min))));
                    }
                    ASSERT_LE(worst, bound) << name(scheme) << " " << bits << " bits read at " << depth
                                            << ", " << min << " to " << max;
                }
            }
        }
    }
    const Grid grid = fit_grid(Scheme::min_max, 5, -1.0f, 0.9f);
    for (int depth = 1; depth <= 5; ++depth) {
        const float edge = grid.lower + 0.5f * (grid.upper() - grid.lower);
        const float error = std::abs(edge - grid.decode(grid.encode(edge) >> (5 - depth), depth));
        EXPECT_GT(error, 0.99f * grid.error_bound(depth)) << depth;
    }
}

TEST(Names, AreTheWordsOfTheDesign) {
    EXPECT_STREQ(name(Scheme::cell), "cell");
    EXPECT_STREQ(name(Scheme::min_max), "min_max");
    EXPECT_STREQ(name(Scheme::symmetric), "symmetric");
    EXPECT_STREQ(name(Scheme::full_range), "full_range");
    EXPECT_STREQ(name(Scheme::unbiased), "unbiased");
    EXPECT_STREQ(kvplane::name(static_cast<Scheme>(9)), "unknown");
}

}  // namespace
