// Every instruction set gives what the scalar functions of grid.hpp give, bit for bit: extremes, fits, codes,
// values, from fp32, fp16 and bf16. for_each_isa() fails where it reaches no instruction set.
#include "kvplane/quantize/kernels.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <vector>

#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::fp16_max;
using kvplane::Grid;
using kvplane::Index;
using kvplane::Isa;
using kvplane::Matrix;
using kvplane::Scheme;
using kvplane::detail::SourceRows;
using kvplane_test::for_each_isa;
using kvplane_test::Random;

constexpr float infinite = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

std::uint32_t bits_of(float x) {
    return std::bit_cast<std::uint32_t>(x);
}
template <class Scalar>
Scalar from_bits(std::uint16_t bits) {
    return Eigen::numext::bit_cast<Scalar>(bits);
}

template <class Scalar>
SourceRows source(const Scalar* data, Index stride) {
    return {data, kvplane::scalar_type<Scalar>, stride};
}

/// What fit_grids writes.
struct FittedGrids {
    std::vector<float> lower, step, inverse;
    std::vector<Eigen::half> stored_lower, stored_step;

    FittedGrids(Isa isa, Scheme scheme, int bits, const std::vector<float>& min,
                const std::vector<float>& max)
        : lower(min.size()),
          step(lower),
          inverse(lower),
          stored_lower(min.size()),
          stored_step(stored_lower) {
        kvplane::detail::fit_grids(
            isa, scheme, bits, static_cast<Index>(min.size()), min.data(), max.data(),
            {lower.data(), step.data(), inverse.data(), stored_lower.data(), stored_step.data()});
    }
};

template <class Scalar>
class KernelsFrom : public testing::Test {};
using Scalars = testing::Types<float, Eigen::half, Eigen::bfloat16>;
TYPED_TEST_SUITE(KernelsFrom, Scalars);

/// Rows of `channels` values with a stride beyond them, from a float matrix.
template <class Scalar>
struct PaddedRows {
    kvplane::RowMajorMatrix<Scalar> storage;
    SourceRows rows;
    Index tokens, channels;

    explicit PaddedRows(const Matrix& values)
        : storage(values.rows(), values.cols() + 3), tokens(values.rows()), channels(values.cols()) {
        storage.setConstant(Scalar(not_a_number));  // must never be looked at
        storage.leftCols(channels) = values.template cast<Scalar>();
        rows = source(storage.data(), storage.cols());
    }
    float at(Index token, Index channel) const { return static_cast<float>(storage(token, channel)); }
};

// -- Extremes ---------------------------------------------------------------------------------------------

TYPED_TEST(KernelsFrom, ColumnExtremesAreThoseOfPlainLoops) {
    Random random(kvplane_test::seed());
    for (const Index channels : {16, 32, 48, 64, 80, 96, 128, 256, 272})
        for (const Index tokens : {1, 2, 3, 32, 129})
            for (const auto& [name, values] : kvplane_test::difficult_matrices(tokens, channels, random)) {
                const PaddedRows<TypeParam> input(values);
                SCOPED_TRACE(name);
                for_each_isa([&](Isa isa) {
                    std::vector<float> min(static_cast<std::size_t>(channels)), max(min);
                    ASSERT_TRUE(column_extremes(isa, input.rows, tokens, channels, min.data(), max.data()));
                    for (Index c = 0; c < channels; ++c) {
                        float low = input.at(0, c), high = low;
                        for (Index t = 1; t < tokens; ++t) {
                            low = std::min(low, input.at(t, c));
                            high = std::max(high, input.at(t, c));
                        }
                        ASSERT_EQ(min[static_cast<std::size_t>(c)], low) << "channel " << c;
                        ASSERT_EQ(max[static_cast<std::size_t>(c)], high) << "channel " << c;
                    }
                });
            }
}

TYPED_TEST(KernelsFrom, RowExtremesAreThoseOfPlainLoops) {
    Random random(kvplane_test::seed());
    for (const auto& [channels, group] :
         {std::pair<Index, Index>{16, 16}, {48, 16}, {64, 64}, {128, 32}, {96, 48}, {160, 80}, {256, 256}})
        for (const Index tokens : {1, 3, 40})
            for (const auto& [name, values] : kvplane_test::difficult_matrices(tokens, channels, random)) {
                const PaddedRows<TypeParam> input(values);
                const Index runs = channels / group;
                SCOPED_TRACE(name);
                for_each_isa([&, channels = channels, group = group](Isa isa) {
                    std::vector<float> min(static_cast<std::size_t>(tokens * runs)), max(min);
                    ASSERT_TRUE(
                        row_extremes(isa, input.rows, tokens, channels, group, min.data(), max.data()));
                    for (Index g = 0; g < tokens * runs; ++g) {
                        const Index token = g / runs, first = g % runs * group;
                        float low = input.at(token, first), high = low;
                        for (Index c = first; c < first + group; ++c) {
                            low = std::min(low, input.at(token, c));
                            high = std::max(high, input.at(token, c));
                        }
                        ASSERT_EQ(min[static_cast<std::size_t>(g)], low) << "group " << g;
                        ASSERT_EQ(max[static_cast<std::size_t>(g)], high) << "group " << g;
                    }
                });
            }
}

/// The extreme at every place of a row or column, so that no lane is left out of a reduction.
TYPED_TEST(KernelsFrom, ExtremesAreSeenAtEveryPlace) {
    constexpr Index tokens = 3, channels = 80;
    for_each_isa([&](Isa isa) {
        for (Index place = 0; place < tokens * channels; ++place) {
            const Index token = place / channels, channel = place % channels;
            Matrix values = Matrix::Constant(tokens, channels, 1.0f);
            values(token, channel) = place % 2 ? 2.0f : -2.0f;
            const PaddedRows<TypeParam> input(values);
            std::vector<float> min(channels), max(channels);
            ASSERT_TRUE(column_extremes(isa, input.rows, tokens, channels, min.data(), max.data()));
            for (Index c = 0; c < channels; ++c) {
                const float odd = c == channel ? values(token, channel) : 1.0f;
                ASSERT_EQ(min[static_cast<std::size_t>(c)], std::min(1.0f, odd)) << place;
                ASSERT_EQ(max[static_cast<std::size_t>(c)], std::max(1.0f, odd)) << place;
            }
            ASSERT_TRUE(row_extremes(isa, input.rows, tokens, channels, channels, min.data(), max.data()));
            for (Index t = 0; t < tokens; ++t) {
                const float odd = t == token ? values(token, channel) : 1.0f;
                ASSERT_EQ(min[static_cast<std::size_t>(t)], std::min(1.0f, odd)) << place;
                ASSERT_EQ(max[static_cast<std::size_t>(t)], std::max(1.0f, odd)) << place;
            }
        }
    });
}

TYPED_TEST(KernelsFrom, OneBadValueAnywhereIsNoticed) {
    constexpr Index tokens = 3, channels = 80;
    std::vector<float> bad{not_a_number, -not_a_number, infinite, -infinite};
    if constexpr (!std::is_same_v<TypeParam, Eigen::half>) {
        bad.push_back(65792.0f);  // the next bf16 beyond 65504 is 65536; every float above it counts
        bad.push_back(-3e38f);
    }
    if constexpr (std::is_same_v<TypeParam, float>) bad.push_back(std::nextafter(fp16_max, infinite));
    for_each_isa([&](Isa isa) {
        std::vector<float> min(channels), max(channels);
        for (const float value : bad)
            for (Index place = 0; place < tokens * channels; ++place) {
                Matrix values = Matrix::Constant(tokens, channels, 1.0f);
                values.data()[place] = value;
                const PaddedRows<TypeParam> input(values);
                ASSERT_FALSE(column_extremes(isa, input.rows, tokens, channels, min.data(), max.data()))
                    << value << " at " << place;
                ASSERT_FALSE(row_extremes(isa, input.rows, tokens, channels, 16, min.data(), max.data()))
                    << value << " at " << place;
            }
        Matrix largest = Matrix::Constant(tokens, channels, 1.0f);
        largest(2, 70) = -65280.0f;  // the largest bf16 within fp16
        const PaddedRows<TypeParam> input(largest);
        EXPECT_TRUE(column_extremes(isa, input.rows, tokens, channels, min.data(), max.data()));
        EXPECT_EQ(min[70], -65280.0f);
    });
}

/// All 65536 patterns of a 16-bit type, in several lanes each.
template <class Scalar>
void widens_every_pattern() {
    for_each_isa([&](Isa isa) {
        for (const int rotation : {0, 1, 6, 11}) {
            for (int first = 0; first < 65536; first += 16) {
                Scalar row[16];
                bool storable = true;
                for (int i = 0; i < 16; ++i) {
                    row[i] = from_bits<Scalar>(static_cast<std::uint16_t>(first + (i + rotation) % 16));
                    storable = storable && std::abs(static_cast<float>(row[i])) <= fp16_max;
                }
                float min[16], max[16];
                ASSERT_EQ(column_extremes(isa, source(row, 16), 1, 16, min, max), storable) << first;
                if (!storable) continue;
                for (int i = 0; i < 16; ++i)
                    ASSERT_EQ(bits_of(min[i]), bits_of(static_cast<float>(row[i]))) << first + i;
            }
        }
    });
}

TEST(Kernels, WidenEveryHalf) {
    widens_every_pattern<Eigen::half>();
}
TEST(Kernels, WidenEveryBfloat16) {
    widens_every_pattern<Eigen::bfloat16>();
}
// -- Fits -------------------------------------------------------------------------------------------------

/// Extremes of many groups against fit_grid, all five arrays.
void expect_fits(const std::vector<float>& min, const std::vector<float>& max, Scheme scheme, int bits) {
    for_each_isa([&](Isa isa) {
        const FittedGrids fitted(isa, scheme, bits, min, max);
        for (std::size_t g = 0; g < min.size(); ++g) {
            const Grid grid = kvplane::fit_grid(scheme, bits, min[g], max[g]);
            const auto where = [&] {
                return testing::Message()
                       << name(scheme) << " " << bits << " bits, " << min[g] << " to " << max[g];
            };
            ASSERT_EQ(bits_of(fitted.lower[g]), bits_of(grid.lower)) << where();
            ASSERT_EQ(bits_of(fitted.step[g]), bits_of(grid.step)) << where();
            ASSERT_EQ(bits_of(fitted.inverse[g]), bits_of(grid.step != 0.0f ? 1.0f / grid.step : 0.0f))
                << where();
            ASSERT_EQ(fitted.stored_step[g].x, Eigen::half(grid.step).x) << where();
            if (!has_lower(scheme)) continue;  // its lower follows from step, and is no fp16 value
            ASSERT_EQ(fitted.stored_lower[g].x, Eigen::half(grid.lower).x) << where();
        }
    });
}

TEST(Kernels, FitEveryKindOfRange) {
    Random random(kvplane_test::seed());
    std::uniform_real_distribution<float> mantissa(1.0f, 2.0f);
    std::uniform_int_distribution<int> exponent(-150, 15), kind(0, 9);
    std::vector<float> min, max;
    const auto number = [&] {
        const float magnitude = std::min(std::ldexp(mantissa(random), exponent(random)), fp16_max);
        return kind(random) < 5 ? magnitude : -magnitude;
    };
    for (int i = 0; i < 4096; ++i) {
        float a = number(), b = number();
        if (kind(random) == 0) a = 0.0f;
        if (kind(random) == 0) a = b;
        if (kind(random) == 0) a = std::nextafter(b, 0.0f);
        if (kind(random) == 0) a = -fp16_max;
        if (kind(random) == 0) b = fp16_max;
        min.push_back(std::min(a, b));
        max.push_back(std::max(a, b));
    }
    for (const Scheme scheme : {Scheme::cell, Scheme::min_max, Scheme::symmetric, Scheme::full_range})
        for (int bits = scheme == Scheme::symmetric ? 2 : 1; bits <= 8; ++bits)
            expect_fits(min, max, scheme, bits);
}

/// Directed rounding to fp16 in the kernels, between every two neighbouring fp16 values: of lower downward
/// (cell grids of x to fp16_max), of step upward (1-bit cell grids of 0 to 2 x), of a constant to nearest.
TEST(Kernels, RoundBetweenAllHalfNeighbours) {
    std::vector<float> values;
    for (std::uint16_t bits = 0; bits < 0x7C00; ++bits) {
        const auto low = static_cast<float>(from_bits<Eigen::half>(bits));
        values.push_back(low);
        if (low == fp16_max) break;
        const float high = static_cast<float>(from_bits<Eigen::half>(static_cast<std::uint16_t>(bits + 1)));
        for (const float x : {std::nextafter(low, high), low + 0.25f * (high - low), 0.5f * (low + high),
                              std::nextafter(0.5f * (low + high), low),
                              std::nextafter(0.5f * (low + high), high), std::nextafter(high, low)})
            values.push_back(x);
    }
    while (values.size() % 16) values.push_back(1.0f);
    std::vector<float> negated(values);
    for (float& x : negated) x = -x;
    const std::vector<float> ends(values.size(), fp16_max), zeros(values.size(), 0.0f);
    std::vector<float> doubled(values);
    for (float& x : doubled) x = std::min(2.0f * x, fp16_max);

    expect_fits(values, ends, Scheme::cell, 8);
    expect_fits(negated, ends, Scheme::cell, 8);
    expect_fits(zeros, doubled, Scheme::cell, 1);
    expect_fits(zeros, values, Scheme::symmetric, 2);
    expect_fits(values, values, Scheme::min_max, 4);
    expect_fits(negated, negated, Scheme::min_max, 4);
}

// -- Codes and values -------------------------------------------------------------------------------------

/// One grid a channel, or one a run of `group` channels of each token, over a fixed small shape.
struct GridPlan {
    static constexpr Index tokens = 9, channels = 80, group = 16, runs = channels / group;
    bool by_channel;
    Scheme scheme;
    int bits;

    Index grids() const { return by_channel ? channels : tokens * runs; }
    std::size_t grid(Index token, Index channel) const {
        return static_cast<std::size_t>(by_channel ? channel : token * runs + channel / group);
    }
};

std::vector<GridPlan> all_plans() {
    std::vector<GridPlan> plans;
    for (const bool by_channel : {true, false})
        for (const Scheme scheme : {Scheme::cell, Scheme::min_max, Scheme::symmetric, Scheme::full_range})
            for (int bits = scheme == Scheme::symmetric ? 2 : 1; bits <= 8; ++bits)
                plans.push_back({by_channel, scheme, bits});
    return plans;
}

/// Grids of the `kept` part of the range of the input.
template <class Scalar>
FittedGrids fitted_grids(Isa isa, const GridPlan& plan, const PaddedRows<Scalar>& input, float kept) {
    std::vector<float> min(static_cast<std::size_t>(kvplane::detail::padded_channels(plan.grids()))),
        max(min);
    if (plan.by_channel)
        column_extremes(isa, input.rows, plan.tokens, plan.channels, min.data(), max.data());
    else
        row_extremes(isa, input.rows, plan.tokens, plan.channels, plan.group, min.data(), max.data());
    for (auto* ends : {&min, &max})
        for (float& x : *ends) x *= kept;
    return FittedGrids(isa, plan.scheme, plan.bits, min, max);
}

constexpr Index code_stride = GridPlan::channels + 16;

template <class Scalar>
std::vector<std::uint8_t> encoded(Isa isa, const GridPlan& plan, const PaddedRows<Scalar>& input,
                                  const FittedGrids& grids) {
    std::vector<std::uint8_t> codes(plan.tokens * code_stride, 0xEE);
    if (plan.by_channel)
        encode_columns(isa, input.rows, plan.tokens, plan.channels, plan.bits, grids.lower.data(),
                       grids.inverse.data(), codes.data(), code_stride);
    else
        encode_rows(isa, input.rows, plan.tokens, plan.channels, plan.group, plan.bits, grids.lower.data(),
                    grids.inverse.data(), codes.data(), code_stride);
    return codes;
}

Matrix decoded(Isa isa, const GridPlan& plan, const std::vector<std::uint8_t>& codes, int depth,
               const FittedGrids& grids) {
    std::vector<std::uint8_t> prefixes(codes);
    for (auto& code : prefixes) code = static_cast<std::uint8_t>(code >> (plan.bits - depth));
    std::vector<float> step(grids.step);
    for (float& s : step) s *= kvplane::power_of_two(plan.bits - depth);
    Matrix values = Matrix::Constant(plan.tokens, plan.channels + 5, -7.0f);
    if (plan.by_channel)
        kvplane::detail::decode_columns(isa, prefixes.data(), code_stride, plan.tokens, plan.channels,
                                        grids.lower.data(), step.data(), values.data(), values.cols());
    else  // as containers do it: a row of grids for each token
        for (Index t = 0; t < plan.tokens; ++t) {
            std::vector<float> row_lower, row_step;
            for (Index c = 0; c < plan.channels; ++c) {
                row_lower.push_back(grids.lower[plan.grid(t, c)]);
                row_step.push_back(step[plan.grid(t, c)]);
            }
            kvplane::detail::decode_columns(isa, prefixes.data() + t * code_stride, code_stride, 1,
                                            plan.channels, row_lower.data(), row_step.data(),
                                            values.data() + t * values.cols(), values.cols());
        }
    return values;
}

/// Grids of the whole range, then of its half, so that values lie outside; values at every depth.
TYPED_TEST(KernelsFrom, CodesAndValuesAreThoseOfGrid) {
    Random random(kvplane_test::seed());
    for (const auto& [input_name, values] :
         kvplane_test::difficult_matrices(GridPlan::tokens, GridPlan::channels, random)) {
        const PaddedRows<TypeParam> input(values);
        for (const GridPlan& plan : all_plans())
            for (const float kept : {1.0f, 0.5f}) {
                SCOPED_TRACE(testing::Message()
                             << input_name << ", " << kept << " of the range, " << name(plan.scheme) << " "
                             << plan.bits << " bits " << (plan.by_channel ? "by channel" : "by run"));
                for_each_isa([&](Isa isa) {
                    const FittedGrids grids = fitted_grids(isa, plan, input, kept);
                    const auto grid = [&](Index t, Index c) {
                        const std::size_t g = plan.grid(t, c);
                        return Grid{grids.lower[g], grids.step[g], plan.bits};
                    };
                    const std::vector<std::uint8_t> codes = encoded(isa, plan, input, grids);
                    const auto code = [&](Index t, Index c) -> int {
                        return codes[static_cast<std::size_t>(t * code_stride + c)];
                    };
                    for (Index t = 0; t < plan.tokens; ++t)
                        for (Index c = 0; c < code_stride; ++c)
                            ASSERT_EQ(code(t, c),
                                      c < plan.channels ? grid(t, c).encode(input.at(t, c)) : 0xEE)
                                << "token " << t << ", channel " << c;
                    for (int depth = 1; depth <= plan.bits; ++depth) {
                        const Matrix close = decoded(isa, plan, codes, depth, grids);
                        for (Index t = 0; t < plan.tokens; ++t)
                            for (Index c = 0; c < close.cols(); ++c)
                                ASSERT_EQ(
                                    bits_of(close(t, c)),
                                    bits_of(c < plan.channels
                                                ? grid(t, c).decode(code(t, c) >> (plan.bits - depth), depth)
                                                : -7.0f))
                                    << "read at " << depth << ", token " << t << ", channel " << c;
                    }
                });
            }
    }
}

TEST(PaddedChannels, AreTheNextMultipleOf16) {
    for (Index channels = 0; channels <= 100; ++channels) {
        const Index padded = kvplane::detail::padded_channels(channels);
        EXPECT_EQ(padded % 16, 0);
        EXPECT_GE(padded, channels);
        EXPECT_LT(padded, channels + 16);
    }
}

// -- Rows --------------------------------------------------------------------------------------------------

/// All fp16 numbers, the points halfway between neighbours, and what lies just beside these.
TEST(NarrowRow, RoundsToNearestAndTiesToEven) {
    std::vector<float> inputs;
    for (std::uint32_t bits = 0; bits < 0x7C00; ++bits) {
        const auto number = [](std::uint32_t b) {
            return static_cast<float>(std::bit_cast<Eigen::half>(static_cast<std::uint16_t>(b)));
        };
        const float x = number(bits);
        inputs.push_back(x);
        if (bits + 1 == 0x7C00) break;
        const float half_way = 0.5f * (x + number(bits + 1));
        for (const float y : {half_way, std::nextafter(half_way, 0.0f), std::nextafter(half_way, 1e9f)})
            inputs.push_back(y);
    }
    for (std::size_t i = inputs.size(); i-- > 0;) inputs.push_back(-inputs[i]);
    for_each_isa([&](kvplane::Isa isa) {
        std::vector<Eigen::half> outputs(inputs.size());
        kvplane::narrow_row(isa, inputs.data(), static_cast<kvplane::Index>(inputs.size()), outputs.data());
        for (std::size_t i = 0; i < inputs.size(); ++i)
            ASSERT_EQ(static_cast<float>(outputs[i]), static_cast<float>(static_cast<Eigen::half>(inputs[i])))
                << inputs[i];
        std::vector<float> back(inputs.size());
        kvplane::widen_row(isa, outputs.data(), static_cast<kvplane::Index>(outputs.size()), back.data());
        for (std::size_t i = 0; i < back.size(); ++i) ASSERT_EQ(back[i], static_cast<float>(outputs[i]));
    });
}

template <class Scalar>
void expect_largest() {
    constexpr float infinite = std::numeric_limits<float>::infinity();
    for_each_isa([&](kvplane::Isa isa) {
        for (const std::size_t count : std::vector<std::size_t>{0, 1, 3, 15, 16, 17, 31, 32, 33, 100})
            for (std::size_t at = 0; at < std::max<std::size_t>(count, 1); ++at) {
                std::vector<Scalar> x(count, Scalar(-1.5f));
                const auto largest = [&] {
                    return kvplane::detail::largest_magnitude(isa, x.data(),
                                                              static_cast<kvplane::Index>(count));
                };
                ASSERT_EQ(largest(), count ? 1.5f : 0.0f);
                if (count == 0) continue;
                x[at] = Scalar(-96.0f);
                ASSERT_EQ(largest(), 96.0f);
                x[at] = Scalar(-infinite);
                ASSERT_EQ(largest(), infinite);
                x[at] = Scalar(std::numeric_limits<float>::quiet_NaN());
                ASSERT_TRUE(std::isnan(largest()));
            }
    });
}
TEST(LargestMagnitude, SeesEveryPlaceAndWhatIsNotFinite) {
    expect_largest<float>();
    expect_largest<Eigen::half>();
    expect_largest<Eigen::bfloat16>();
}

TYPED_TEST(KernelsFrom, WideningSeesTheLargestMagnitudeAndWhatFp16CannotHold) {
    using Scalar = TypeParam;
    kvplane_test::Random random(kvplane_test::seed());
    for (Index count = 0; count <= 70; ++count) {
        const auto row = [&] {
            const kvplane::Matrix values = kvplane_test::normal_matrix(1, count, random);
            return kvplane::RowMajorMatrix<Scalar>(values.template cast<Scalar>());
        }();
        for_each_isa([&](Isa isa) {
            std::vector<float> to(static_cast<std::size_t>(count) + 1, -99.0f);
            float largest = 0.0f;
            const float found = kvplane::detail::widen_checked(isa, row.data(), count, to.data());
            for (Index i = 0; i < count; ++i) {
                const auto x = static_cast<float>(row(0, i));
                largest = std::max(largest, std::abs(x));
                ASSERT_EQ(to[static_cast<std::size_t>(i)], x);
            }
            EXPECT_EQ(found, largest);
            EXPECT_EQ(to.back(), -99.0f);
            constexpr float infinite = std::numeric_limits<float>::infinity();
            for (const float bad : {infinite, -infinite, std::numeric_limits<float>::quiet_NaN()})
                for (Index at = 0; at < count; ++at) {
                    auto with_bad = row;
                    with_bad(0, at) = Scalar(bad);
                    EXPECT_FALSE(kvplane::detail::widen_checked(isa, with_bad.data(), count, to.data()) <=
                                 kvplane::fp16_max)
                        << bad << " at " << at << " of " << count;
                }
        });
    }
}

}  // namespace
