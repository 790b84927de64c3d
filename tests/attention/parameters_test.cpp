// What each parameter does, on every path through the cache, against the reference: positions, causality, learned
// sinks, and scores far from zero.
#include "kvplane/attention/parameters.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "cache/cache_support.hpp"
#include "kvplane/recipes.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

constexpr float infinity = std::numeric_limits<float>::infinity();

/// Two caches of the same tokens: fp16, which attention reads by its exact path (decoding and prefill), and 8 bits.
class Parameters : public testing::TestWithParam<std::string> {
  protected:
    static constexpr Index tokens = 450;
    CacheConfiguration configuration_ = kvplane_test::configuration(GetParam());
    std::mt19937_64 random_{seed()};
    TilePool pool_;
    KvCache cache_{configuration_, pool_};

    void SetUp() override {
        cache_.append(normal_matrix(random_, tokens, 64), normal_matrix(random_, tokens, 96));
    }
    Matrix queries(Index count, float scale = 1.0f) { return normal_matrix(random_, count, 128, scale); }
    /// Against the reference over what is stored, so that only the arithmetic of attention may differ.
    void expect_reference(const Matrix& queries, const AttentionParameters& parameters, double tolerance) {
        const MatrixD expected = reference_attention(
            cache_.stored_keys(0, tokens), cache_.stored_values(0, tokens), queries, 4, 2, parameters);
        for_each_isa([&](Isa) {
            Matrix out(queries.rows(), 192), sums;
            AttentionWorkspace workspace;
            cache_.attend(queries, out, parameters, workspace, {.log_sum_exp = &sums});
            ASSERT_EQ(sums.rows(), queries.rows());
            ASSERT_EQ(sums.cols(), 4);
            ASSERT_TRUE(out.allFinite());
            ASSERT_LE((out.cast<double>() - expected).cwiseAbs().maxCoeff(), tolerance);
        });
    }
    /// What rounding factors to integers may do to outputs of values around 1 (T14).
    double rounding() const { return GetParam() == "fp16" ? 2e-5 : 0.02; }
};

TEST_P(Parameters, PositionSaysWhereQueriesAre) {
    for (const Index query_tokens : {1, 3, 8, 9, 20})
        for (const Index position : {0, 1, 3, 100, 127, 128, 300, 440, 449, 450, 5000}) {
            SCOPED_TRACE(std::to_string(query_tokens) + " query tokens from position " +
                         std::to_string(position));
            AttentionParameters parameters;
            parameters.position = position;
            const Matrix q = queries(query_tokens);
            expect_reference(q, parameters, rounding());
            parameters.sliding_window = 130;
            parameters.sinks = 3;
            expect_reference(q, parameters, rounding());
            const std::vector<float> slopes{.1f, .02f, .3f, .004f};
            parameters.alibi_slopes = slopes;
            // Scores of this size are off by their last place.
            expect_reference(q, parameters, rounding() + 0x1p-22 * .3 * static_cast<double>(position));
        }
    // The position of the last tokens changes no bit.
    const Matrix q = queries(5);
    AttentionParameters last;
    last.position = tokens - 5;
    EXPECT_EQ(attend(cache_, q, last), attend(cache_, q));
}

TEST_P(Parameters, WithoutCausalityEveryQuerySeesAllTokens) {
    AttentionParameters parameters;
    parameters.causal = false;
    for (const Index query_tokens : {1, 2, 8, 9, 500})
        expect_reference(queries(query_tokens), parameters, rounding());
    // Rows do not depend on where they stand.
    const Matrix q = queries(1).replicate(7, 1);
    const Matrix out = attend(cache_, q, parameters);
    for (Index i = 1; i < 7; ++i) EXPECT_EQ(out.row(i), out.row(0));
}

TEST_P(Parameters, SinkLogitsTakeTheirShare) {
    const std::vector<float> few{-3.0f, 0.0f, 2.5f, 9.0f}, extreme{-1e30f, 80.0f, 1e4f, -200.0f};
    for (const std::vector<float>* logits : {&few, &extreme})
        for (const Index query_tokens : {1, 4, 8, 9, 30}) {
            AttentionParameters parameters;
            parameters.sink_logits = *logits;
            const Matrix q = queries(query_tokens);
            expect_reference(q, parameters, rounding());
            // Under policies that go by weights, a share of the weights takes its share of what is left unread.
            if (GetParam() == "fp16" || query_tokens > 8) continue;
            for (const char* policy : {"tolerance=0.02", "8:0.5", "6"}) {
                SCOPED_TRACE(policy);
                AttentionParameters none;
                none.read = parameters.read = recipes::read_policy(policy);
                const MatrixD exact = reference_attention(cache_.stored_keys(0, tokens),
                                                          cache_.stored_values(0, tokens), q, 4, 2, none);
                const double without = (attend(cache_, q, none).cast<double>() - exact).cwiseAbs().maxCoeff();
                expect_reference(q, parameters, 1.2 * without + rounding());
            }
        }
    // A window that sees nothing but itself, and a sink above all: the output vanishes.
    AttentionParameters parameters;
    const std::vector<float> above(4, 1e9f);
    parameters.sink_logits = above;
    EXPECT_EQ(attend(cache_, queries(2), parameters), Matrix::Zero(2, 192));
}

TEST_P(Parameters, LogSumExpIsThatOfTheScores) {
    const Matrix keys = cache_.stored_keys(0, tokens);
    const std::vector<float> logits{-3.0f, 0.0f, 2.5f, 9.0f};
    for (const Index query_tokens : {1, 8, 9}) {
        AttentionParameters parameters;
        parameters.sliding_window = 200;
        parameters.sink_logits = logits;
        const Matrix q = queries(query_tokens);
        Matrix out(query_tokens, 192), sums;
        AttentionWorkspace workspace;
        cache_.attend(q, out, parameters, workspace, {.log_sum_exp = &sums});
        for (Index i = 0; i < query_tokens; ++i)
            for (Index head = 0; head < 4; ++head) {
                double sum = std::exp(static_cast<double>(logits[static_cast<std::size_t>(head)]));
                const Index position = tokens - query_tokens + i;
                for (Index t = std::max<Index>(0, position - 199); t <= position; ++t)
                    sum += std::exp(q.row(i)
                                        .segment(head * 32, 32)
                                        .cast<double>()
                                        .dot(keys.row(t).segment(head / 2 * 32, 32).cast<double>()) /
                                    std::sqrt(32.0));
                EXPECT_NEAR(sums(i, head), std::log(sum), rounding());
            }
    }
    // Where nothing is seen, nothing is summed.
    KvCache empty(configuration_, pool_);
    AttentionParameters ahead;
    ahead.position = 0;
    Matrix out(2, 192), sums;
    AttentionWorkspace workspace;
    empty.attend(queries(2), out, ahead, workspace, {.log_sum_exp = &sums});
    EXPECT_EQ(out, Matrix::Zero(2, 192));
    EXPECT_EQ(sums, Matrix::Constant(2, 4, -infinity));
}

/// Scores of a million and more, masks of all kinds: what the reference says, and no NaN.
TEST_P(Parameters, ScoresFarFromZero) {
    const auto expect = [&](const char* what, float scale, double tolerance,
                            const std::function<void(AttentionParameters&, Matrix & bias)>& change) {
        for (const Index query_tokens : {1, 8, 9}) {
            SCOPED_TRACE(std::string(what) + ", " + std::to_string(query_tokens) + " query tokens");
            AttentionParameters parameters;
            Matrix bias = Matrix::Zero(query_tokens, tokens);
            change(parameters, bias);
            if (!bias.isZero(0.0f)) parameters.bias = &bias;
            expect_reference(queries(query_tokens, scale), parameters, tolerance);
        }
    };
    const double exact = rounding();
    expect("every score at -FLT_MAX", 1.0f, exact,
           [](auto&, Matrix& bias) { bias.setConstant(-std::numeric_limits<float>::max()); });
    // A float of this size has a last place of 1/16.
    expect("scores near 1e6", 1e-3f, 0.05, [](auto&, Matrix& bias) { bias.setConstant(1e6f); });
    expect("scores near -1e6", 1e-3f, 0.05, [](auto&, Matrix& bias) { bias.setConstant(-1e6f); });
    expect("the first tiles masked", 1.0f, exact,
           [](auto&, Matrix& bias) { bias.leftCols(300).setConstant(-infinity); });
    expect("all but one masked", 1.0f, exact, [](auto&, Matrix& bias) {
        bias.setConstant(-infinity);
        bias.col(200).setZero();
    });
    expect("all masked", 1.0f, 0.0, [](auto&, Matrix& bias) { bias.setConstant(-infinity); });
    expect("one key far above", 1.0f, exact, [](auto&, Matrix& bias) { bias.col(131).setConstant(1e30f); });
    expect("tiny queries: all weights equal", 1e-32f, exact, [](auto&, Matrix&) {});
    const std::vector<float> slopes{1.0f, 1000.0f, 1e-6f, 1e6f};
    expect("steep ALiBi", 1e-3f, exact, [&](AttentionParameters& p, Matrix&) { p.alibi_slopes = slopes; });
    // A softcap takes scores of 1e8 to its own size: only their signs are left, which rounding a factor keeps where the
    // score is not small.
    if (GetParam() == "fp16")
        expect("softcap over scores of 1e8", 1e8f, 1e-3,
               [](AttentionParameters& p, Matrix&) { p.softcap = 30.0; });
}

/// Queries and scores up to the limits of a float stay finite.
TEST_P(Parameters, HugeQueriesGiveFiniteOutputs) {
    for (const float scale : {1e10f, 1e20f, 1e30f, 1e35f})
        for (const Index query_tokens : {1, 8, 9}) {
            SCOPED_TRACE(std::to_string(scale) + ", " + std::to_string(query_tokens));
            const Matrix q = queries(query_tokens, scale);
            const Matrix values = cache_.stored_values(0, tokens);
            for_each_isa([&](Isa) {
                const Matrix out = attend(cache_, q);
                ASSERT_TRUE(out.allFinite());
                ASSERT_LE(out.maxCoeff(), values.maxCoeff() * 1.01f + 1e-3f);
            });
        }
}

INSTANTIATE_TEST_SUITE_P(Recipes, Parameters, testing::Values("fp16", "key_favored:8:8"), test_name);

TEST(Parameters, BadOnesAreRefused) {
    TilePool pool;
    KvCache cache(configuration("standard"), pool);
    cache.append(Matrix::Ones(10, 64), Matrix::Ones(10, 96));
    Matrix out(2, 192);
    const auto attend = [&](const AttentionParameters& parameters) {
        cache.attend(Matrix::Ones(2, 128), out, parameters);
    };
    AttentionParameters window;
    window.causal = false;
    window.sliding_window = 5;
    EXPECT_EQ(refusal(ErrorCode::option, [&] { attend(window); }),
              "kvplane: attention: a sliding window of 5 for queries that see all tokens, expected none");
    AttentionParameters before;
    before.position = -1;
    EXPECT_EQ(refusal(ErrorCode::index, [&] { attend(before); }),
              "kvplane: attention: queries at position -1, expected 0 or more");
    AttentionParameters logits;
    const std::vector<float> three(3), endless{0.0f, 1.0f, infinity, 0.0f};
    logits.sink_logits = three;
    EXPECT_EQ(refusal(ErrorCode::shape, [&] { attend(logits); }),
              "kvplane: attention: 3 sink logits, expected 4, one a query head");
    logits.sink_logits = endless;
    refusal(ErrorCode::not_finite, [&] { attend(logits); });
    Matrix more(11, 192);
    EXPECT_EQ(
        refusal(ErrorCode::shape, [&] { cache.attend(Matrix::Ones(11, 128), more); }),
        "kvplane: attention: 11 query tokens over 10 cached ones, expected the last of them, or a position");
}

}  // namespace
