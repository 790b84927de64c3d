// The shaped encoding against a plain one in double: as good within a percent, the same codes on every
// instruction set and with every compiler, the codes of Grid::encode where nothing is to be shaped, errors
// that keep to what is reported, and values, steps and weights of all sizes.
#include "kvplane/quantize/shaped.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "byte_hash.hpp"
#include "kvplane/quantize/grid.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::ClipExcess;
using kvplane::ErrorCode;
using kvplane::Grid;
using kvplane::Index;
using kvplane::Isa;
using kvplane::Matrix;
using kvplane::MatrixD;
using kvplane::Scheme;
using kvplane::ScoreError;
using kvplane::ShapedBlock;
using kvplane::ShapedQuantizer;
using kvplane::Shaping;
using kvplane_test::for_each_isa;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::refusal;

using Codes = kvplane::RowMajorMatrix<std::uint8_t>;

/// Keys of one head with a grid for each channel.
struct Head {
    Matrix values;
    std::vector<float> lower, step;
    int bits;

    Head(const Matrix& keys, int width, Scheme scheme = Scheme::min_max) : values(keys), bits(width) {
        for (Index c = 0; c < keys.cols(); ++c) {
            const Grid grid =
                kvplane::fit_grid(scheme, width, keys.col(c).minCoeff(), keys.col(c).maxCoeff());
            lower.push_back(grid.lower);
            step.push_back(grid.step);
        }
    }
    Grid grid(Index channel) const {
        return {lower[static_cast<std::size_t>(channel)], step[static_cast<std::size_t>(channel)], bits};
    }
    double steps(Index channel) const { return step[static_cast<std::size_t>(channel)]; }
    Codes nearest() const {
        return Codes::NullaryExpr(values.rows(), values.cols(), [&](Index t, Index c) {
            return static_cast<std::uint8_t>(grid(c).encode(values(t, c)));
        });
    }
    /// x' - x
    MatrixD errors(const Codes& codes) const {
        return MatrixD::NullaryExpr(values.rows(), values.cols(), [&](Index t, Index c) {
            return lower[static_cast<std::size_t>(c)] + steps(c) * (codes(t, c) + 0.5) - values(t, c);
        });
    }
    /// The mean of e^T C e.
    double cost(const Codes& codes, const MatrixD& weight) const {
        const MatrixD e = errors(codes);
        return (e * weight).cwiseProduct(e).sum() / static_cast<double>(e.rows());
    }
};

struct Shaped {
    Codes codes;
    ClipExcess excess;
};

/// By `quantizer`, whose weight is set, into rows that are longer than the codes.
Shaped encode(ShapedQuantizer& quantizer, const Head& head) {
    const Index tokens = head.values.rows(), channels = head.values.cols();
    const Index value_stride = channels + 3, code_stride = channels + 5;
    Matrix values = Matrix::Constant(tokens, value_stride, std::numeric_limits<float>::quiet_NaN());
    values.leftCols(channels) = head.values;
    Codes codes = Codes::Constant(tokens, code_stride, 0xA5);
    const ClipExcess excess = quantizer.encode({.values = values.data(),
                                                .value_stride = value_stride,
                                                .tokens = tokens,
                                                .channels = channels,
                                                .bits = head.bits,
                                                .lower = head.lower.data(),
                                                .step = head.step.data(),
                                                .codes = codes.data(),
                                                .code_stride = code_stride});
    EXPECT_TRUE((codes.rightCols(5).array() == 0xA5).all()) << "written beyond the channels";
    return {codes.leftCols(channels), excess};
}

Shaped encode(const Head& head, const MatrixD& weight, const Shaping& shaping = {}) {
    ShapedQuantizer quantizer(shaping);
    quantizer.set_weight(weight);
    return encode(quantizer, head);
}

/// The algorithm in double, without a thought for speed.
Codes reference(const Head& head, const MatrixD& second_moment, const Shaping& shaping = {}) {
    const Index channels = head.values.cols(), last = (1 << head.bits) - 1;
    MatrixD weight = second_moment;
    weight.diagonal().array() += shaping.ridge * second_moment.trace() / static_cast<double>(channels);
    std::vector<Index> order(static_cast<std::size_t>(channels));
    std::iota(order.begin(), order.end(), Index{0});
    std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
        return weight(a, a) * head.steps(a) * head.steps(a) > weight(b, b) * head.steps(b) * head.steps(b);
    });
    // What is left of C when the channels after one are free to make up for it.
    MatrixD rest = weight, rows = MatrixD::Zero(channels, channels);
    for (auto j = order.rbegin(); j != order.rend(); ++j) {
        rows.row(*j) = rest.row(*j) / rest(*j, *j);
        const MatrixD taken = rest.col(*j) * rows.row(*j);
        rest -= taken;
    }
    Codes codes(head.values.rows(), channels);
    for (Index t = 0; t < head.values.rows(); ++t) {
        Eigen::VectorXd error = Eigen::VectorXd::Zero(channels);
        const auto choose = [&](Index c, double cell) {
            const auto code = static_cast<double>(
                std::clamp<Index>(static_cast<Index>(std::floor(std::clamp(cell, -1.0, 256.0))), 0, last));
            codes(t, c) = static_cast<std::uint8_t>(code);
            error[c] =
                head.lower[static_cast<std::size_t>(c)] + head.steps(c) * (code + 0.5) - head.values(t, c);
        };
        for (const Index c : order) {
            const double target = head.values(t, c) - rows.row(c).dot(error);
            const bool constant = head.steps(c) == 0.0;
            choose(c, constant ? 0.0 : (target - head.lower[static_cast<std::size_t>(c)]) / head.steps(c));
            if (constant) error[c] = 0.0;
        }
        for (int pass = 0; pass < shaping.passes; ++pass)
            for (const Index c : order) {
                if (head.steps(c) == 0.0) continue;
                const double slope = weight.row(c).dot(error);
                choose(c, codes(t, c) - std::round(slope / (weight(c, c) * head.steps(c))));
            }
    }
    return codes;
}

/// A second moment of that condition: a random rotation of a falling spectrum.
MatrixD second_moment(Index channels, double condition, Random& random) {
    MatrixD weight = MatrixD::Zero(channels, channels);
    MatrixD basis = normal_matrix(channels, channels, random).cast<double>();
    for (Index j = 0; j < channels; ++j) {
        for (Index i = 0; i < j; ++i) basis.row(j) -= basis.row(j).dot(basis.row(i)) * basis.row(i);
        basis.row(j) /= basis.row(j).norm();
        const double at = channels > 1 ? static_cast<double>(j) / static_cast<double>(channels - 1) : 0.0;
        weight += std::pow(condition, -at) * basis.row(j).transpose() * basis.row(j);
    }
    return weight;
}

// -- Nothing to shape -------------------------------------------------------------------------------------

/// The codes of Grid::encode, and no excess but what its fp32 position rounds.
void expect_nearest(const Head& head, const MatrixD& weight, const Shaping& shaping = {}) {
    const Shaped shaped = encode(head, weight, shaping);
    ASSERT_EQ(kvplane_test::differing(shaped.codes, head.nearest()), 0);
    double allowed = 0.0;
    for (Index c = 0; c < head.values.cols(); ++c) {
        const Grid grid = head.grid(c);
        allowed = std::max(allowed, static_cast<double>(grid.error_bound()) - 0.5 * grid.step);
    }
    ASSERT_LE(shaped.excess.largest, allowed);
}

TEST(Shaped, DiagonalWeightsGiveTheNearestCodes) {
    Random random(kvplane_test::seed());
    for (const auto& [tokens, channels] :
         {std::pair<Index, Index>{1, 1}, {5, 3}, {127, 16}, {128, 64}, {129, 33}, {300, 7}})
        for (const auto& [name, values] : kvplane_test::difficult_matrices(tokens, channels, random))
            for (int bits = 1; bits <= 8; ++bits)
                for (const Scheme scheme : {Scheme::cell, Scheme::min_max, Scheme::symmetric}) {
                    if (scheme == Scheme::symmetric && bits == 1) continue;
                    if (scheme == Scheme::min_max && bits == 1 && name == "nearly the fp16 range") continue;
                    SCOPED_TRACE(name + ", bits " + std::to_string(bits));
                    const Head head(values, bits, scheme);
                    MatrixD diagonal = MatrixD::Identity(channels, channels);
                    if (bits % 2)
                        for (Index c = 0; c < channels; ++c)
                            diagonal(c, c) = std::ldexp(1.0, static_cast<int>(c % 9));
                    expect_nearest(head, diagonal);
                    if (HasFatalFailure()) return;
                }
}

TEST(Shaped, WeightsThatAreNotPositiveDefiniteGiveTheNearestCodes) {
    Random random(kvplane_test::seed());
    const Index channels = 37;
    const Head head(normal_matrix(50, channels, random), 3);
    const MatrixD weight = second_moment(channels, 100.0, random);
    MatrixD one_negative = weight, hyperbolic = weight;
    one_negative(5, 5) = -1e-3;
    hyperbolic(20, 3) = hyperbolic(3, 20) = 1e200;
    MatrixD rank_one = MatrixD::Ones(channels, channels);
    for (const MatrixD& bad : {MatrixD(MatrixD::Zero(channels, channels)), MatrixD(-weight), one_negative,
                               hyperbolic, MatrixD(1e-320 * MatrixD::Zero(channels, channels))})
        expect_nearest(head, bad);
    expect_nearest(head, rank_one, {.ridge = 0.0});
    EXPECT_GT(kvplane_test::differing(encode(head, rank_one).codes, head.nearest()), 0);
}

// -- Against double ---------------------------------------------------------------------------------------

TEST(Shaped, IsAsGoodAsInDouble) {
    Random random(kvplane_test::seed());
    for (const auto& [tokens, channels] : kvplane_test::thinned(
             std::vector<std::pair<Index, Index>>{{128, 64}, {128, 96}, {128, 128}, {100, 30}, {128, 256}}))
        for (const double condition : {1e1, 1e4})
            for (const int bits : {1, 2, 3, 4, 6, 8}) {
                if (channels == 256 && bits != 3) continue;
                SCOPED_TRACE(testing::Message()
                             << channels << " channels, condition " << condition << ", bits " << bits);
                const MatrixD weight = second_moment(channels, condition, random);
                Matrix keys = normal_matrix(tokens, channels, random);
                for (Index c = 0; c < channels; ++c)
                    keys.col(c) *= std::exp(0.02f * static_cast<float>(c % 50));
                const Head head(keys, bits, kvplane::scheme_for(bits));
                MatrixD ridged = weight;
                ridged.diagonal().array() += 0.1 * weight.trace() / static_cast<double>(channels);
                const Shaped shaped = encode(head, weight);
                const double cost = head.cost(shaped.codes, ridged),
                             expected = head.cost(reference(head, weight), ridged);
                // Where codes differ, they do by what rounds, one way or the other.
                EXPECT_NEAR(cost, expected, 0.01 * expected);
                const double plain = head.cost(head.nearest(), ridged);
                EXPECT_LT(cost, (condition > 10.0 ? 0.8 : 0.98) * plain);
            }
}

/// Steps of very different sizes, whose weights fill more than 16 bits, and channels that queries do not see.
TEST(Shaped, StepsOfAllSizesAreAsGoodAsInDouble) {
    Random random(kvplane_test::seed());
    for (const int bits : {2, 3, 8}) {
        const Index channels = 60;
        MatrixD weight = second_moment(channels, 1e3, random);
        Matrix keys = normal_matrix(128, channels, random);
        for (Index c = 0; c < channels; ++c) {
            keys.col(c) *= std::ldexp(1.0f, static_cast<int>(c % 20) - 10);
            if (c % 7 == 3) weight.row(c) *= 1e-6;
            if (c % 7 == 3) weight.col(c) *= 1e-6;
        }
        const Head head(keys, bits);
        const double cost = head.cost(encode(head, weight).codes, weight),
                     expected = head.cost(reference(head, weight), weight);
        EXPECT_NEAR(cost, expected, 0.02 * expected) << bits;
    }
}

/// But by what 16-bit weights round where two codes are as good.
TEST(Shaped, DescentNeverRaisesTheCost) {
    Random random(kvplane_test::seed());
    const Index channels = 48;
    for (const int bits : {1, 2, 3, 5}) {
        const Head head(normal_matrix(128, channels, random), bits, kvplane::scheme_for(bits));
        const MatrixD weight = second_moment(channels, 300.0, random);
        MatrixD ridged = weight;
        ridged.diagonal().array() += 0.1 * weight.trace() / static_cast<double>(channels);
        MatrixD before = head.errors(encode(head, weight, {.passes = 0}).codes);
        for (int passes = 1; passes <= 4; ++passes) {
            const MatrixD after = head.errors(encode(head, weight, {.passes = passes}).codes);
            for (Index t = 0; t < 128; ++t)
                ASSERT_LE(after.row(t) * ridged * after.row(t).transpose(),
                          1.001 * (before.row(t) * ridged * before.row(t).transpose())(0))
                    << "token " << t << ", pass " << passes << ", bits " << bits;
            before = after;
        }
    }
}

// -- The same everywhere ----------------------------------------------------------------------------------

TEST(Shaped, CodesAreTheSameOnEveryInstructionSet) {
    Random random(kvplane_test::seed());
    for (const Index channels : {1, 2, 3, 4, 5, 17, 64, 80, 96, 127, 128, 200, 512}) {
        const Index tokens = channels == 512 ? 20 : 1 + static_cast<Index>(random() % 140);
        const int bits = 1 + static_cast<int>(random() % 8);
        Matrix keys = normal_matrix(tokens, channels, random);
        for (Index c = 0; c < channels; ++c) keys.col(c) *= std::ldexp(1.0f, static_cast<int>(random() % 12));
        const Head head(keys, bits);
        const MatrixD weight = second_moment(channels, 1e3, random);
        Shaped first;
        ScoreError first_error;
        for_each_isa([&](Isa isa) {
            ShapedQuantizer quantizer;
            quantizer.set_weight(weight);
            const Shaped shaped = encode(quantizer, head);
            const ScoreError error =
                quantizer.expected_error(Eigen::Map<const Eigen::VectorXf>(head.step.data(), channels));
            if (first.codes.size() == 0) {
                ASSERT_EQ(isa, Isa::scalar);
                first = shaped;
                first_error = error;
            }
            ASSERT_EQ(kvplane_test::differing(shaped.codes, first.codes), 0) << channels << " channels";
            EXPECT_EQ(shaped.excess.largest, first.excess.largest);
            EXPECT_EQ(shaped.excess.energy, first.excess.energy);
            EXPECT_EQ(error.shaped, first_error.shaped);
            EXPECT_EQ(error.plain, first_error.plain);
        });
    }
}

/// Inputs made of integers alone, so that every compiler and machine makes the same.
TEST(Shaped, CodesAreTheSameWithEveryCompiler) {
    std::uint64_t state = 1;
    kvplane_test::ByteHash hash;
    const auto draw = [&] {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<double>(static_cast<std::int64_t>(state) >> 40);
    };
    for (const Index channels : {1, 13, 64, 128})
        for (int bits = 1; bits <= 8; ++bits) {
            // A^T A of integers, exact in double, with a strong common direction.
            MatrixD queries(2 * channels, channels);
            for (Index i = 0; i < queries.size(); ++i)
                queries.data()[i] = std::floor(draw() / 65536.0) + static_cast<double>(i / channels % 90);
            MatrixD weight = MatrixD::Zero(channels, channels);
            for (Index i = 0; i < channels; ++i)
                for (Index j = 0; j < channels; ++j)
                    for (Index q = 0; q < queries.rows(); ++q) weight(i, j) += queries(q, i) * queries(q, j);
            Matrix keys(64, channels);
            for (Index i = 0; i < keys.size(); ++i) keys.data()[i] = static_cast<float>(draw()) * 0x1p-20f;
            const Shaped shaped = encode(Head(keys, bits), weight);
            hash.add(shaped.codes.data(), static_cast<std::size_t>(shaped.codes.size()));
        }
    EXPECT_EQ(hash.value(), 13820748604595517780u);
}

TEST(Shaped, MemoryOfEarlierHeadsDoesNotMatter) {
    Random random(kvplane_test::seed());
    ShapedQuantizer reused;
    for (const Index channels : {70, 128, 5, 64, 33}) {
        const Head head(normal_matrix(channels == 64 ? 128 : 40, channels, random),
                        1 + static_cast<int>(channels % 4));
        const MatrixD weight = second_moment(channels, 50.0, random);
        reused.set_weight(weight);
        EXPECT_EQ(kvplane_test::differing(encode(reused, head).codes, encode(head, weight).codes), 0);
    }
}

// -- Sizes of numbers -------------------------------------------------------------------------------------

TEST(Shaped, ScalesDoNotMatter) {
    Random random(kvplane_test::seed());
    const Index channels = 40;
    const Matrix keys = normal_matrix(128, channels, random);
    const MatrixD weight = second_moment(channels, 1e3, random);
    const Codes codes = encode(Head(keys, 3), weight).codes;
    for (const int exponent : {-1000, -110, -3, 110, 1000})
        EXPECT_EQ(
            kvplane_test::differing(encode(Head(keys, 3), std::ldexp(1.0, exponent) * weight).codes, codes),
            0)
            << exponent;
    for (const int exponent : {-8, 8}) {
        const Head scaled(std::ldexp(1.0f, exponent) * keys, 3);
        EXPECT_EQ(kvplane_test::differing(encode(scaled, weight).codes, codes), 0) << exponent;
    }
    // fp16 subnormal steps, and keys up to the largest fp16.
    for (const float scale : {1e-6f, 12000.0f}) {
        const Head head(scale * keys, 3);
        EXPECT_LT(head.cost(encode(head, 1e30 * weight).codes, weight),
                  0.7 * head.cost(head.nearest(), weight))
            << scale;
    }
}

TEST(Shaped, ConstantChannelsGetCodeZeroAndChangeNoOther) {
    Random random(kvplane_test::seed());
    const Index channels = 30;
    Matrix keys = normal_matrix(100, channels, random);
    for (Index c = 0; c < channels; c += 4) keys.col(c).setConstant(0.1f * static_cast<float>(c));
    const Head head(keys, 3);
    const MatrixD weight = second_moment(channels, 100.0, random);
    const Codes codes = encode(head, weight).codes;
    for (Index c = 0; c < channels; c += 4) EXPECT_TRUE((codes.col(c).array() == 0).all());
    EXPECT_NEAR(head.cost(codes, weight), head.cost(reference(head, weight), weight),
                0.01 * head.cost(codes, weight));
    EXPECT_LT(head.cost(codes, weight), 0.8 * head.cost(head.nearest(), weight));
    const Head all_constant(Matrix::Constant(10, channels, 5.0f), 2);
    EXPECT_TRUE((encode(all_constant, weight).codes.array() == 0).all());
}

/// Grids that cover half of the values, down to a thousandth of them.
TEST(Shaped, ClippedValuesGetTheNearestEndOrMakeUpForOthers) {
    Random random(kvplane_test::seed());
    const Index channels = 24;
    for (const float kept : {0.5f, 0.001f}) {
        Head head(normal_matrix(128, channels, random), 4);
        for (std::size_t c = 0; c < head.step.size(); ++c) {
            head.step[c] = static_cast<float>(Eigen::half(kept * head.step[c]));
            head.lower[c] = -8.0f * head.step[c];
        }
        const MatrixD identity = MatrixD::Identity(channels, channels);
        EXPECT_EQ(kvplane_test::differing(encode(head, identity).codes, head.nearest()), 0) << kept;
        const MatrixD weight = second_moment(channels, 100.0, random);
        EXPECT_LE(head.cost(encode(head, weight).codes, weight), 1.001 * head.cost(head.nearest(), weight))
            << kept;
    }
}

/// Beyond what its error can be counted as: others make up for what is counted, and in the right direction.
TEST(Shaped, OneChannelFarOutsideIsMadeUpFor) {
    Random random(kvplane_test::seed());
    const Index channels = 12;
    for (const int bits : {1, 2, 4, 8})
        for (const float ranges : {-1.0f, 0.0f, 1.0f, 40.0f, -40.0f}) {
            Head head(normal_matrix(128, channels, random), bits, kvplane::scheme_for(bits));
            head.lower[3] += ranges * std::ldexp(head.step[3], bits);
            const MatrixD weight =
                MatrixD::Ones(channels, channels) + 0.1 * MatrixD::Identity(channels, channels);
            EXPECT_LT(head.cost(encode(head, weight).codes, weight),
                      (std::abs(ranges) > 1.0f ? 1.0 : 0.7) * head.cost(head.nearest(), weight))
                << bits << " bits, outside by " << ranges;
        }
}

// -- What is reported -------------------------------------------------------------------------------------

TEST(Shaped, ExcessIsThatOfTheCodes) {
    Random random(kvplane_test::seed());
    for (const Index tokens : {1, 7, 8, 16, 128, 131})
        for (const int bits : {1, 2, 4, 8}) {
            const Index channels = 45;
            const Head head(normal_matrix(tokens, channels, random), bits, kvplane::scheme_for(bits));
            const Shaped shaped = encode(head, second_moment(channels, 1e3, random));
            double largest = 0.0, energy = 0.0;
            for (Index c = 0; c < channels; ++c)
                for (Index t = 0; t < tokens; ++t) {
                    const Grid grid = head.grid(c);
                    const double error =
                                     static_cast<double>(head.values(t, c)) - grid.decode(shaped.codes(t, c)),
                                 outside = std::max(0.0, std::abs(error) - 0.5 * grid.step);
                    ASSERT_LE(std::abs(error), grid.error_bound() + shaped.excess.largest);
                    largest = std::max(largest, outside);
                    energy += outside * outside;
                }
            EXPECT_NEAR(shaped.excess.largest, largest, 1e-6 * largest);
            EXPECT_NEAR(shaped.excess.energy, energy, 1e-5 * energy);
            EXPECT_GT(largest, 0.0);
        }
}

TEST(Shaped, ExpectedErrorIsReachedAtHighRate) {
    Random random(kvplane_test::seed());
    const Index channels = 64;
    const MatrixD weight = 1e-20 * second_moment(channels, 1e3, random);
    const Head head(kvplane_test::uniform_matrix(2048, channels, -1.0f, 1.0f, random), 7);
    ShapedQuantizer quantizer({.ridge = 0.01, .passes = 0});
    quantizer.set_weight(weight);
    const ScoreError expected =
        quantizer.expected_error(Eigen::Map<const Eigen::VectorXf>(head.step.data(), channels));
    MatrixD ridged = weight;
    ridged.diagonal().array() += 0.01 * weight.trace() / static_cast<double>(channels);
    EXPECT_NEAR(head.cost(encode(quantizer, head).codes, ridged), expected.shaped, 0.03 * expected.shaped);
    EXPECT_NEAR(head.cost(head.nearest(), ridged), expected.plain, 0.03 * expected.plain);
    EXPECT_LT(expected.shaped, 0.5 * expected.plain);
    quantizer.set_weight(MatrixD::Zero(channels, channels));
    const ScoreError none =
        quantizer.expected_error(Eigen::Map<const Eigen::VectorXf>(head.step.data(), channels));
    EXPECT_EQ(none.shaped, 0.0);
    EXPECT_EQ(none.plain, 0.0);
}

// -- Refusals ---------------------------------------------------------------------------------------------

TEST(Shaped, RefusesWhatCannotBe) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
    EXPECT_EQ(refusal(ErrorCode::option, [] { ShapedQuantizer({.ridge = -1.0}); }),
              "kvplane: ridge: -1, expected 0 or more");
    EXPECT_EQ(refusal(ErrorCode::option, [] { ShapedQuantizer({.passes = -1}); }),
              "kvplane: passes: -1, expected 0 or more");
    ShapedQuantizer quantizer;
    Head head(Matrix::Random(10, 4), 3);
    EXPECT_NE(
        refusal(ErrorCode::shape, [&] { encode(quantizer, head); }).find("4 channels, expected the 0 of"),
        std::string::npos);
    EXPECT_EQ(refusal(ErrorCode::shape, [&] { quantizer.set_weight(MatrixD::Identity(4, 3)); }),
              "kvplane: weight: 4 x 3, expected a square matrix of 1 to 1024 channels");
    refusal(ErrorCode::shape, [&] { quantizer.set_weight(MatrixD()); });
    MatrixD weight = MatrixD::Identity(4, 4);
    weight(2, 1) = not_a_number;
    EXPECT_EQ(refusal(ErrorCode::not_finite, [&] { quantizer.set_weight(weight); }),
              "kvplane: weight: the entry at 2, 1 is nan, expected finite numbers");
    weight(2, 1) = static_cast<double>(infinity);
    refusal(ErrorCode::not_finite, [&] { quantizer.set_weight(weight); });
    quantizer.set_weight(MatrixD::Identity(4, 4));
    refusal(ErrorCode::shape, [&] { encode(quantizer, Head(Matrix::Random(10, 5), 3)); });
    for (const int bits : {0, 9}) {
        head.bits = bits;
        refusal(ErrorCode::option, [&] { encode(quantizer, head); });
    }
    head.bits = 3;
    for (const float step : {-1.0f, infinity}) {
        Head bad = head;
        bad.step[1] = step;
        refusal(step < 0.0f ? ErrorCode::option : ErrorCode::not_finite, [&] { encode(quantizer, bad); });
    }
    Head bad = head;
    bad.lower[3] = infinity;
    refusal(ErrorCode::not_finite, [&] { encode(quantizer, bad); });
    for (const float value : {infinity, -infinity, std::nanf(""), 65536.0f})
        for (Index place = 0; place < 40; place += 13) {
            bad = head;
            bad.values.data()[place] = value;
            refusal(value == 65536.0f ? ErrorCode::beyond_fp16 : ErrorCode::not_finite,
                    [&] { encode(quantizer, bad); });
        }
    EXPECT_EQ(encode(quantizer, head).codes, head.nearest());
    EXPECT_EQ(encode(quantizer, Head(Matrix::Zero(1, 4), 3)).excess.energy, 0.0);
}

}  // namespace
