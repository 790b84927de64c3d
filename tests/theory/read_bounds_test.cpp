// T13: the certificate of an output whose keys and values were read in part.
#include <gtest/gtest.h>

#include "kvplane/attention/reference.hpp"
#include "kvplane/theory/bounds.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using Vector = Eigen::VectorXd;
using Rows = Eigen::MatrixXd;

Vector softmax(const Vector& scores) {
    const Vector e = (scores.array() - scores.maxCoeff()).exp();
    return e / e.sum();
}

TEST(OutputBound, HoldsForEveryQueryTried) {
    kvplane_test::Random random(kvplane_test::seed());
    std::normal_distribution<double> normal;
    for (int round = 0; round < 2000; ++round) {
        const Index tokens = 2 + static_cast<Index>(random() % 30), channels = 8;
        const double eps = std::exp(3.0 * normal(random) - 2.0);
        const Vector scores = Vector::NullaryExpr(tokens, [&] { return 3.0 * normal(random); });
        // The worst signs are those of the values; some rounds take them, others random ones.
        const Rows values = Rows::NullaryExpr(tokens, channels, [&] { return normal(random); });
        Vector read_scores = scores;
        for (Index t = 0; t < tokens; ++t)
            read_scores[t] += eps * (round % 2 ? (values(t, 0) > 0 ? 1.0 : -1.0)
                                               : std::uniform_real_distribution<double>(-1.0, 1.0)(random));
        const Rows read_values =
            values + 0.1 * Rows::NullaryExpr(tokens, channels, [&] { return normal(random); });
        const Vector p = softmax(scores), read_p = softmax(read_scores);
        const double off = (values.transpose() * p - read_values.transpose() * read_p).norm();
        double value_error = 0.0;
        for (Index t = 0; t < tokens; ++t)
            value_error += read_p[t] * (values.row(t) - read_values.row(t)).norm();
        for (const bool centred : {false, true}) {
            const Eigen::RowVectorXd centre =
                centred ? Eigen::RowVectorXd(values.colwise().mean()) : Eigen::RowVectorXd::Zero(channels);
            const double radius = (values.rowwise() - centre).rowwise().norm().maxCoeff();
            ASSERT_LE(off, theory::output_error_bound(eps, radius, value_error) + 1e-12);
        }
    }
}

/// Two tokens of opposite values, the better one made worse: the bound is reached.
TEST(OutputBound, IsReachedByTwoTokens) {
    for (const double eps : {1e-4, 0.1, 1.0, 3.0}) {
        // Weights e^(eps / 2) : e^(-eps / 2) before, the other way round after.
        Vector scores(2), read(2);
        scores << eps / 2, -eps / 2;
        read << -eps / 2, eps / 2;
        Vector values(2);
        values << 1.0, -1.0;
        const double off = std::abs(values.dot(softmax(scores)) - values.dot(softmax(read)));
        const double bound = theory::output_error_bound(eps, 1.0, 0.0);
        EXPECT_NEAR(off, bound, 1e-12) << eps;
    }
    EXPECT_EQ(theory::output_error_bound(0.0, 5.0, 0.25), 0.25);
}

TEST(ScoreBound, IsReachedAtTheEdgesOfCells) {
    Vector query(3), step(3);
    query << 2.0, -1.0, 0.5;
    step << 0.1, 0.2, 0.4;
    // Every key half a cell off, with the sign of its query.
    const double off = 0.5 * query.cwiseAbs().dot(step);
    EXPECT_DOUBLE_EQ(theory::read_score_bound(query, step, 0.25), 0.25 * off);
    kvplane_test::refusal(ErrorCode::shape, [&] { theory::read_score_bound(query, step.head(2), 1.0); });
    kvplane_test::refusal(ErrorCode::option, [&] { theory::output_error_bound(-1.0, 1.0, 0.0); });
    kvplane_test::refusal(ErrorCode::option, [&] { theory::aligned_score_bound(-1, 0, 64); });
    kvplane_test::refusal(ErrorCode::option, [&] { theory::rounded_factors_error(9, 4, 1, 1.0); });
}

}  // namespace
