// T15 of the theorems: the expected score error of shaped and of plain codes, against what ShapedQuantizer
// does: tight on synthetic second moments at high rate, and beside what real keys give at few bits.
#include <Eigen/Eigenvalues>
#include <Eigen/LU>
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/shaped.hpp"
#include "kvplane/theory/bounds.hpp"
#include "real_layers.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::ErrorCode;
using kvplane::Grid;
using kvplane::Index;
using kvplane::Matrix;
using kvplane::MatrixD;
using kvplane::ShapedQuantizer;
using kvplane::Shaping;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::refusal;
using kvplane_test::uniform_matrix;
namespace theory = kvplane::theory;

/// A random rotation of a spectrum that falls from 1 to 1 / condition.
MatrixD second_moment(Index channels, double condition, Random& random) {
    const MatrixD gaussian = normal_matrix(channels, channels, random).cast<double>();
    const Eigen::SelfAdjointEigenSolver<MatrixD> solver(gaussian * gaussian.transpose());
    Eigen::VectorXd spectrum(channels);
    for (Index j = 0; j < channels; ++j)
        spectrum[j] = std::pow(condition, -static_cast<double>(j) / static_cast<double>(channels - 1));
    const MatrixD basis = solver.eigenvectors();
    return basis * spectrum.asDiagonal() * basis.transpose();
}

std::vector<Index> random_order(Index channels, Random& random) {
    std::vector<Index> order(static_cast<std::size_t>(channels));
    std::iota(order.begin(), order.end(), Index{0});
    std::shuffle(order.begin(), order.end(), random);
    return order;
}

/// The mean of e^T C e over keys, with shaped and with nearest codes.
struct Measured {
    double shaped = 0, plain = 0;
};

struct Keys {
    Matrix values;
    std::vector<float> lower, step;
    int bits;

    /// With grids fitted to them.
    Keys(const Matrix& keys, int width) : values(keys), bits(width) {
        for (Index c = 0; c < keys.cols(); ++c) fit(keys.col(c).minCoeff(), keys.col(c).maxCoeff());
    }
    /// Uniform over whole cells, `room` cells from both ends of grids of several sizes, so that no code is
    /// clipped.
    Keys(Index tokens, Index channels, int width, int room, Random& random)
        : values(tokens, channels), bits(width) {
        for (Index c = 0; c < channels; ++c) {
            fit(-1.0f, 1.0f + 0.4f * static_cast<float>(c % 6));
            const float cells = static_cast<float>((1 << width) - room);
            values.col(c) =
                lower.back() +
                step.back() * uniform_matrix(tokens, 1, static_cast<float>(room), cells, random).array();
        }
    }
    void fit(float min, float max) {
        const Grid grid = kvplane::fit_grid(kvplane::scheme_for(bits), bits, min, max);
        lower.push_back(grid.lower);
        step.push_back(grid.step);
    }
    Eigen::VectorXd steps() const {
        return Eigen::Map<const Eigen::VectorXf>(step.data(), values.cols()).cast<double>();
    }
    /// Shaped under `weight`, judged by it or by another.
    Measured measure(const MatrixD& weight, const Shaping& shaping) const {
        return measure(weight, shaping, weight);
    }
    Measured measure(const MatrixD& weight, const Shaping& shaping, const MatrixD& judge) const {
        const Index tokens = values.rows(), channels = values.cols();
        kvplane::RowMajorMatrix<std::uint8_t> codes(tokens, channels);
        ShapedQuantizer quantizer(shaping);
        quantizer.set_weight(weight);
        quantizer.encode({.values = values.data(),
                          .value_stride = channels,
                          .tokens = tokens,
                          .channels = channels,
                          .bits = bits,
                          .lower = lower.data(),
                          .step = step.data(),
                          .codes = codes.data(),
                          .code_stride = channels});
        MatrixD shaped(tokens, channels), plain(tokens, channels);
        for (Index c = 0; c < channels; ++c) {
            const auto at = static_cast<std::size_t>(c);
            const Grid grid{lower[at], step[at], bits};
            for (Index t = 0; t < tokens; ++t) {
                shaped(t, c) = static_cast<double>(grid.decode(codes(t, c))) - values(t, c);
                plain(t, c) = static_cast<double>(grid.decode(grid.encode(values(t, c)))) - values(t, c);
            }
        }
        const auto mean = [&](const MatrixD& e) {
            return (e * judge).cwiseProduct(e).sum() / static_cast<double>(tokens);
        };
        return {mean(shaped), mean(plain)};
    }
};

// -- The formulas -----------------------------------------------------------------------------------------

TEST(T15, IsTheFormula) {
    MatrixD weight(2, 2);
    weight << 4, 2, 2, 3;
    const Eigen::Vector2d steps(1, 1);
    EXPECT_EQ(theory::plain_score_error(weight, steps), 7.0 / 12);
    EXPECT_EQ(theory::shaping_order(weight, steps), (std::vector<Index>{0, 1}));
    EXPECT_EQ(theory::shaping_order(weight, Eigen::Vector2d(1, 2)), (std::vector<Index>{1, 0}));
    // Channel 1 comes last and makes up for channel 0: 4 - 2 2 / 3 is left.
    const std::vector<Index> order{0, 1}, reversed{1, 0};
    EXPECT_TRUE(theory::shaping_pivots(weight, order).isApprox(Eigen::Vector2d(4 - 4.0 / 3, 3)));
    EXPECT_TRUE(theory::shaping_pivots(weight, reversed).isApprox(Eigen::Vector2d(4, 2)));
    EXPECT_DOUBLE_EQ(theory::shaped_score_error(weight, steps), (4 - 4.0 / 3 + 3) / 12);
    EXPECT_DOUBLE_EQ(theory::shaping_limit(weight), std::sqrt(8.0) / 3.5);
    // The ridge is 1 / 7 of the mean, 1/2: channel 1 makes up for 2 / 3.5 of an error of channel 0.
    const double left = 4 - 2 * 2 * (2 / 3.5) + 3 * (2 / 3.5) * (2 / 3.5);
    EXPECT_DOUBLE_EQ(theory::shaped_score_error(weight, steps, 1.0 / 7), (left + 3) / 12);
}

TEST(T15, PivotsMultiplyToTheDeterminantAndAreAtMostTheDiagonal) {
    Random random(kvplane_test::seed());
    for (const Index channels : {2, 7, 40})
        for (const double condition : {1.0, 1e2, 1e4}) {
            const MatrixD weight = second_moment(channels, condition, random);
            const double log_determinant = std::log(weight.determinant());
            for (int round = 0; round < 5; ++round) {
                const Eigen::VectorXd pivots = theory::shaping_pivots(weight, random_order(channels, random));
                EXPECT_NEAR(pivots.array().log().sum(), log_determinant,
                            1e-8 * static_cast<double>(channels));
                EXPECT_LE((pivots - weight.diagonal()).maxCoeff(), 1e-14);
                EXPECT_GE(pivots.mean() / weight.diagonal().mean(),
                          theory::shaping_limit(weight) * (1 - 1e-9));
            }
            const Eigen::VectorXd spectrum = Eigen::SelfAdjointEigenSolver<MatrixD>(weight).eigenvalues();
            EXPECT_NEAR(theory::shaping_limit(weight),
                        std::exp(spectrum.array().log().mean()) / spectrum.mean(), 1e-9);
        }
}

TEST(T15, IsBetweenItsLimitAndPlainCodes) {
    Random random(kvplane_test::seed());
    for (const Index channels : {2, 16, 64})
        for (const double condition : {1.0, 1e2, 1e4}) {
            const MatrixD weight = second_moment(channels, condition, random);
            const Eigen::VectorXd equal = Eigen::VectorXd::Constant(channels, 0.1),
                                  steps =
                                      equal.array() *
                                      uniform_matrix(channels, 1, 0.1f, 3.0f, random).cast<double>().array();
            const double plain = theory::plain_score_error(weight, equal);
            EXPECT_GE(theory::shaped_score_error(weight, equal),
                      plain * theory::shaping_limit(weight) * (1 - 1e-9));
            EXPECT_LE(theory::shaped_score_error(weight, equal), plain * (1 + 1e-12));
            EXPECT_LE(theory::shaped_score_error(weight, steps),
                      theory::plain_score_error(weight, steps) * (1 + 1e-12));
            // Without a ridge the sum over pivots; with an endless one plain codes.
            const Eigen::VectorXd pivots =
                theory::shaping_pivots(weight, theory::shaping_order(weight, steps));
            EXPECT_NEAR(theory::shaped_score_error(weight, steps), pivots.dot(steps.cwiseAbs2()) / 12,
                        1e-9 * theory::plain_score_error(weight, steps));
            EXPECT_NEAR(theory::shaped_score_error(weight, steps, 1e12),
                        theory::plain_score_error(weight, steps), 1e-6 * plain);
        }
}

/// Equal pivots reach the limit: C = L L^T.
TEST(T15, TheLimitIsReachedByEqualPivots) {
    Random random(kvplane_test::seed());
    const Index channels = 12;
    MatrixD factor = MatrixD::Identity(channels, channels);
    for (Index i = 0; i < channels; ++i)
        for (Index j = i + 1; j < channels; ++j) factor(i, j) = 0.3 * normal_matrix(1, 1, random)(0, 0);
    const MatrixD weight = factor * factor.transpose();
    std::vector<Index> order(static_cast<std::size_t>(channels));
    std::iota(order.begin(), order.end(), Index{0});
    const Eigen::VectorXd pivots = theory::shaping_pivots(weight, order);
    EXPECT_NEAR(pivots.mean() / weight.diagonal().mean(), theory::shaping_limit(weight), 1e-12);
}

// -- What the encoder does --------------------------------------------------------------------------------

TEST(T15, IsTightAtHighRate) {
    Random random(kvplane_test::seed());
    const Index channels = 48, tokens = 49152;
    for (const double condition : {1.0, 1e2, 1e4})
        for (const int bits : {6, 7, 8}) {
            const double ridge = bits == 7 ? 0.1 : 0.0;
            const MatrixD weight = second_moment(channels, condition, random);
            // Errors reach sqrt(condition) steps where queries do not look.
            const Keys keys(tokens, channels, bits, condition > 1e2 ? 8 : 4, random);
            const Measured measured = keys.measure(weight, {.ridge = ridge, .passes = 0});
            const double shaped = theory::shaped_score_error(weight, keys.steps(), ridge),
                         plain = theory::plain_score_error(weight, keys.steps());
            SCOPED_TRACE(testing::Message() << "condition " << condition << ", bits " << bits);
            // With a ridge L is not the best for C itself, so that the rounding of weights to 16 bits shows.
            EXPECT_NEAR(measured.shaped, shaped, (ridge > 0 ? 0.02 : 0.01) * shaped);
            EXPECT_NEAR(measured.plain, plain, 0.01 * plain);
            // Descent lowers the cost with the ridge, of which this is the part without it.
            const Measured descended = keys.measure(weight, {.ridge = ridge, .passes = 2});
            EXPECT_LE(descended.shaped, measured.shaped * (ridge > 0 ? 1.01 : 1 + 1e-6));
        }
}

TEST(T15, ShapedCodesAreNoWorseThanPlainOnAverage) {
    Random random(kvplane_test::seed());
    for (const Index channels : {2, 16, 64})
        for (const double condition : {1.0, 1e1, 1e3})
            for (const int bits : {1, 2, 3, 4, 8}) {
                const MatrixD weight = second_moment(channels, condition, random);
                const Measured measured =
                    Keys(normal_matrix(512, channels, random), bits).measure(weight, {});
                EXPECT_LE(measured.shaped, measured.plain * 1.001)
                    << channels << " channels, condition " << condition << ", bits " << bits;
            }
}

/// Few levels and clipping cost a part of the gain that high rate promises, never all of it.
TEST(T15, RealKeysBesideThePrediction) {
    for (const kvplane_test::RealLayer& layer : kvplane_test::real_layers())
        for (const int bits : {2, 3, 4}) {
            double own = 0, own_plain = 0, shaped = 0, plain = 0, predicted = 0, predicted_plain = 0;
            for (Index head = 0; head < 3; ++head) {
                // The queries of the even of the last 64 positions decide, those of the odd ones judge.
                MatrixD weight = MatrixD::Zero(64, 64), judge = weight;
                for (Index row = 0; row < 64; ++row)
                    for (Index q = 3 * head; q < 3 * head + 3; ++q) {
                        const Eigen::VectorXd query =
                            layer.queries.row(row).segment(q * 64, 64).cast<double>();
                        (row % 2 ? judge : weight) += query * query.transpose() / 96;
                    }
                for (Index tile = 0; tile + 128 <= 900; tile += 128) {
                    const Keys keys(layer.keys.block(4 + tile, head * 64, 128, 64), bits);
                    const Measured measured = keys.measure(weight, {}, judge),
                                   of_own = keys.measure(weight, {});
                    own += of_own.shaped;
                    own_plain += of_own.plain;
                    shaped += measured.shaped;
                    plain += measured.plain;
                    predicted += theory::shaped_score_error(weight, keys.steps(), 0.1);
                    predicted_plain += theory::plain_score_error(weight, keys.steps());
                }
            }
            std::cout << "layer " << layer.layer << ", " << bits << " bits: shaped / plain "
                      << own / own_plain << ", predicted " << predicted / predicted_plain
                      << ", other queries " << shaped / plain << "; shaped / predicted " << own / predicted
                      << "\n";
            EXPECT_LT(own, 0.6 * own_plain);
            EXPECT_LT(shaped, 0.7 * plain);
        }
}

// -- Refusals ---------------------------------------------------------------------------------------------

TEST(T15, RefusesWhatIsNoSecondMoment) {
    const MatrixD weight = MatrixD::Identity(3, 3);
    const Eigen::Vector3d steps(1, 1, 1);
    EXPECT_EQ(refusal(ErrorCode::shape, [&] { theory::plain_score_error(MatrixD::Identity(3, 2), steps); }),
              "kvplane: weight: 3 x 2, expected a square matrix");
    refusal(ErrorCode::shape, [&] { theory::plain_score_error(weight, Eigen::Vector2d(1, 1)); });
    refusal(ErrorCode::option, [&] { theory::plain_score_error(weight, -steps); });
    refusal(ErrorCode::not_finite, [&] { theory::plain_score_error(weight / 0.0, steps); });
    refusal(ErrorCode::option, [&] { theory::shaped_score_error(weight, steps, -1); });
    refusal(ErrorCode::option, [&] { theory::shaped_score_error(-weight, steps); });
    refusal(ErrorCode::option, [&] { theory::shaping_limit(MatrixD::Ones(3, 3)); });
    for (const std::vector<Index>& order :
         {std::vector<Index>{0, 1}, {0, 1, 1}, {0, 1, 3}, {0, 1, -1}, {0, 1, 2, 3}})
        refusal(ErrorCode::shape, [&] { theory::shaping_pivots(weight, order); });
}

}  // namespace
