// The oracle itself, on cases computed by hand.
#include "kvplane/attention/reference.hpp"

#include <gtest/gtest.h>

#include "test_support.hpp"

namespace {

using namespace kvplane;

/// Two tokens, one head of one channel: keys 0 and log 3, so that a query of 1 weighs them 1 : 3.
struct TwoTokens {
    Matrix keys = (Matrix(2, 1) << 0.0f, std::log(3.0f)).finished();
    Matrix values = (Matrix(2, 2) << 4.0f, 0.0f, 0.0f, 8.0f).finished();
    Matrix query = Matrix::Ones(1, 1);
};

double first(const TwoTokens& t, const AttentionParameters& parameters) {
    return reference_attention(t.keys, t.values, t.query, 1, 1, parameters)(0, 0);
}

TEST(Reference, WeighsValuesByTheSoftmax) {
    const TwoTokens t;
    const MatrixD out = reference_attention(t.keys, t.values, t.query, 1, 1);
    EXPECT_NEAR(out(0, 0), 1.0, 1e-6);
    EXPECT_NEAR(out(0, 1), 6.0, 1e-6);
}

TEST(Reference, IsCausalAmongItsQueries) {
    const TwoTokens t;
    const MatrixD out = reference_attention(t.keys, t.values, Matrix::Ones(2, 1), 1, 1);
    EXPECT_NEAR(out(0, 0), 4.0, 1e-12);  // the first query sees the first token only
    EXPECT_NEAR(out(1, 0), 1.0, 1e-6);
}

TEST(Reference, ScaleSoftcapSlopesAndBias) {
    const TwoTokens t;
    const double log3 = std::log(3.0);
    const auto share = [](double s0, double s1) {
        return 4.0 * std::exp(s0) / (std::exp(s0) + std::exp(s1));
    };
    EXPECT_NEAR(first(t, {.scale = 2.0}), share(0.0, 2.0 * log3), 1e-6);
    EXPECT_NEAR(first(t, {.softcap = 0.5}), share(0.0, 0.5 * std::tanh(log3 / 0.5)), 1e-6);
    const float slope = 0.25f;
    EXPECT_NEAR(first(t, {.alibi_slopes = {&slope, 1}}), share(-0.25, log3), 1e-6);
    const Matrix bias = (Matrix(1, 2) << 1.0f, -1.0f).finished();
    EXPECT_NEAR(first(t, {.bias = &bias}), share(1.0, log3 - 1.0), 1e-6);
    // The cap comes before slopes, bias and mask: it must not cap a mask.
    const Matrix mask = (Matrix(1, 2) << -std::numeric_limits<float>::infinity(), 0.0f).finished();
    EXPECT_EQ(first(t, {.softcap = 0.5, .bias = &mask}), 0.0);
}

TEST(Reference, SlidingWindowAndSinks) {
    Matrix keys = Matrix::Zero(6, 1), values = Matrix::Identity(6, 6);
    const auto weights = [&](const AttentionParameters& parameters) {
        return reference_attention(keys, values, Matrix::Ones(1, 1), 1, 1, parameters).row(0).eval();
    };
    EXPECT_TRUE(weights({.sliding_window = 2}).isApprox((MatrixD(1, 6) << 0, 0, 0, 0, .5, .5).finished()));
    EXPECT_TRUE(weights({.sliding_window = 2, .sinks = 2})
                    .isApprox((MatrixD(1, 6) << .25, .25, 0, 0, .25, .25).finished()));
    EXPECT_TRUE(weights({.sliding_window = 9}).isApprox(MatrixD::Constant(1, 6, 1.0 / 6)));
}

TEST(Reference, GroupedQueriesReadTheirHead) {
    const Matrix keys = Matrix::Zero(1, 2), values = (Matrix(1, 2) << 5.0f, 7.0f).finished();
    const MatrixD out = reference_attention(keys, values, Matrix::Zero(1, 4), 4, 2);
    EXPECT_TRUE(out.isApprox((MatrixD(1, 4) << 5, 5, 7, 7).finished()));
}

TEST(Reference, BiasByHead) {
    const Matrix keys = Matrix::Zero(2, 1), values = (Matrix(2, 1) << 1.0f, 3.0f).finished();
    const float none = -std::numeric_limits<float>::infinity();
    const Matrix bias = (Matrix(2, 2) << 0.0f, none, none, 0.0f).finished();
    const MatrixD out = reference_attention(keys, values, Matrix::Zero(1, 2), 2, 1, {.bias = &bias});
    EXPECT_TRUE(out.isApprox((MatrixD(1, 2) << 1, 3).finished()));
}

TEST(Reference, FullyMaskedRowsAreZero) {
    const TwoTokens t;
    const Matrix mask = Matrix::Constant(1, 2, -std::numeric_limits<float>::infinity());
    EXPECT_EQ(reference_attention(t.keys, t.values, t.query, 1, 1, {.bias = &mask}), MatrixD::Zero(1, 2));
}

TEST(Reference, HugeScoresDoNotOverflow) {
    TwoTokens t;
    t.keys *= 1e30f;
    EXPECT_NEAR(first(t, {}), 0.0, 1e-12);
}

TEST(Reference, RefusesWhatDoesNotFit) {
    const TwoTokens t;
    const auto refused = [&](ErrorCode code, const Matrix& q, Index heads,
                             const AttentionParameters& parameters) {
        kvplane_test::refusal(code, [&] { reference_attention(t.keys, t.values, q, heads, 1, parameters); });
    };
    const Matrix bias = Matrix::Zero(1, 3);
    const float slopes[2] = {1.0f, 2.0f};
    refused(ErrorCode::shape, Matrix::Ones(1, 2), 1, {});
    refused(ErrorCode::shape, Matrix::Ones(3, 1), 1, {});
    refused(ErrorCode::option, Matrix::Ones(1, 1), 0, {});
    refused(ErrorCode::shape, t.query, 1, {.bias = &bias});
    refused(ErrorCode::shape, t.query, 1, {.alibi_slopes = slopes});
    refused(ErrorCode::option, t.query, 1, {.scale = -1.0});
    refused(ErrorCode::option, t.query, 1, {.softcap = std::numeric_limits<double>::quiet_NaN()});
    refused(ErrorCode::option, t.query, 1, {.sliding_window = -1});
}

}  // namespace
