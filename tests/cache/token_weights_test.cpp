// The softmax weights that tokens get, summed: against what the same attention says of one token alone.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "cache_support.hpp"
#include "kvplane/attention/executor.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/recipes.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

/// How far kept weights are off, of their own, and of the largest of a row, of which there are up to 140 x 3 here.
constexpr double kept = 0x1p-11 + 3e-5, smallest = 420 * 0x1p-25;
constexpr float infinite = std::numeric_limits<float>::infinity();

struct Attended {
    Matrix output, log_sum_exp, token_weights;
};

Attended attended(const KvCache& cache, const Matrix& queries, const AttentionParameters& parameters,
                  Executor* executor = nullptr) {
    const CacheConfiguration& c = cache.configuration();
    Attended result{Matrix(queries.rows(), c.query_heads * c.value_head_dim), {}, Matrix::Ones(3, 3)};
    AttentionWorkspace workspace(executor);
    for (int again = 0; again < 2; ++again)
        cache.attend(queries, result.output, parameters, workspace,
                     {.log_sum_exp = &result.log_sum_exp, .token_weights = &result.token_weights});
    return result;
}

class TokenWeights : public testing::TestWithParam<std::string> {
  protected:
    std::mt19937_64 random_{seed()};
    TilePool pool_;
    CacheConfiguration configuration_ = configuration(GetParam(), 2, 6);

    Index up_to(Index most) { return std::uniform_int_distribution<Index>(0, most)(random_); }
    KvCache cache_of(Index tokens, Index provisional = 0) {
        KvCache cache(configuration_, pool_);
        append(cache, normal_matrix(random_, tokens, 64, 1.5f), normal_matrix(random_, tokens, 96));
        if (provisional > 0)
            append_provisional(cache, normal_matrix(random_, provisional, 64),
                               normal_matrix(random_, provisional, 96));
        return cache;
    }
    /// [kv head] the sums of the weights of a token: each row's is exp(log_sum_exp of it alone - that of all).
    Eigen::Vector2d weights_of(const KvCache& cache, const Matrix& queries, AttentionParameters parameters,
                               const Matrix& all, Index token) {
        Matrix mask = Matrix::Constant(queries.rows(), cache.tokens(), -infinite);
        mask.col(token) = parameters.bias->col(token);
        parameters.bias = &mask;
        parameters.sink_logits = {};
        Matrix output(queries.rows(), 6 * 48), alone;
        AttentionWorkspace workspace;
        cache.attend(queries, output, parameters, workspace, {.log_sum_exp = &alone});
        Eigen::Vector2d sums = Eigen::Vector2d::Zero();
        for (Index i = 0; i < queries.rows(); ++i)
            for (Index head = 0; head < 6; ++head)
                if (!std::isnan(all(i, head)) && alone(i, head) != -infinite)
                    sums[head / 3] += std::exp(static_cast<double>(alone(i, head)) - all(i, head));
        return sums;
    }
    void check(const KvCache& cache, const Matrix& queries, const AttentionParameters& parameters) {
        SCOPED_TRACE(std::to_string(queries.rows()) + " queries over " + std::to_string(cache.tokens()));
        const Attended all = attended(cache, queries, parameters);
        ASSERT_EQ(all.token_weights.rows(), 2);
        ASSERT_EQ(all.token_weights.cols(), cache.tokens());
        EXPECT_GE(all.token_weights.size() > 0 ? all.token_weights.minCoeff() : 0.0f, 0.0f);
        // Asking changes nothing of the output.
        Matrix output(queries.rows(), 6 * 48);
        cache.attend(queries, output, parameters);
        for (Index i = 0; i < output.size(); ++i)
            ASSERT_TRUE(output.data()[i] == all.output.data()[i] || std::isnan(output.data()[i]));
        // All weights of a row that counts sum up to 1 less the sink's share. While a sum is not known weights are
        // fp16 relative to the largest so far: off by 2^-11, or below fp16's normal numbers by 2^-25. Then come the
        // rounding of scores of up to 60, of exp and of log_sum_exp.
        for (Index kv_head = 0; kv_head < 2; ++kv_head) {
            double expected = 0.0;
            for (Index head = kv_head * 3; head < kv_head * 3 + 3; ++head)
                for (Index i = 0; i < queries.rows(); ++i) {
                    const double sum = all.log_sum_exp(i, head);
                    if (std::isnan(sum) || std::isinf(sum)) continue;
                    expected += 1.0;
                    if (!parameters.sink_logits.empty())
                        expected -= std::exp(parameters.sink_logits[static_cast<std::size_t>(head)] - sum);
                }
            const double got = all.token_weights.row(kv_head).cast<double>().sum();
            EXPECT_NEAR(got, expected, kept * expected + 1e-6);
        }
        if (cache.tokens() == 0 || queries.rows() == 0) return;
        // With a bias, as for one token alone: otherwise queries are scaled before their factors are rounded, and
        // some of these come out one apart.
        const Matrix zeros = Matrix::Zero(queries.rows(), cache.tokens());
        AttentionParameters biased = parameters;
        if (!biased.bias) biased.bias = &zeros;
        const Attended with_bias = attended(cache, queries, biased);
        const float most = all.token_weights.size() > 0 ? all.token_weights.maxCoeff() : 0.0f;
        EXPECT_LE((with_bias.token_weights - all.token_weights).cwiseAbs().maxCoeff(), 0.03f * most);
        std::vector<Index> tokens{0, cache.tokens() - 1, std::min<Index>(4, cache.tokens() - 1)};
        for (int i = 0; i < 3; ++i) tokens.push_back(up_to(cache.tokens() - 1));
        // The heaviest, for most others have little.
        for (Index head = 0; head < 2; ++head) {
            Index heaviest;
            all.token_weights.row(head).maxCoeff(&heaviest);
            tokens.push_back(heaviest);
        }
        for (const Index token : tokens) {
            const Eigen::Vector2d expected = weights_of(cache, queries, biased, with_bias.log_sum_exp, token);
            for (Index head = 0; head < 2; ++head)
                EXPECT_NEAR(with_bias.token_weights(head, token), expected[head],
                            kept * expected[head] + smallest)
                    << "token " << token << ", head " << head;
        }
        ThreadExecutor executor(3);
        EXPECT_EQ(attended(cache, queries, parameters, &executor).token_weights, all.token_weights);
    }
};

TEST_P(TokenWeights, AreTheSumsOfSoftmaxWeights) {
    std::vector<KvCache> caches;
    for (const Index tokens : {3, 40, 300, sanitized ? 600 : 2200}) caches.push_back(cache_of(tokens));
    caches.push_back(cache_of(400, 30));
    caches.push_back(cache_of(1000));
    caches.back().drop_before(500, 5);
    caches.push_back(cache_of(1000));
    caches.back().truncate(777);
    const std::vector<float> logits{0.5f, 2.0f, -1.0f, 4.0f, 0.0f, 1.0f}, slopes(6, 0.01f);
    int round = 0;
    for (const KvCache& cache : caches)
        for (const Index queries : {1, 4, 11}) {
            if (queries > cache.tokens()) continue;
            Matrix q = normal_matrix(random_, queries, 6 * 32);
            AttentionParameters parameters;
            Matrix bias;
            switch (round++ % 6) {
                case 1:
                    if (cache.first_kept() <= 5) parameters.sliding_window = 200, parameters.sinks = 3;
                    break;
                case 2:
                    parameters.sink_logits = logits;
                    break;
                case 3:
                    parameters.softcap = 4.0;
                    parameters.alibi_slopes = slopes;
                    break;
                case 4:
                    bias = normal_matrix(random_, queries, cache.tokens());
                    bias = (bias.array() < -0.5f).select(-infinite, bias);
                    parameters.bias = &bias;
                    break;
                case 5:
                    q(queries / 2, 40) = std::numeric_limits<float>::quiet_NaN();
                    break;
            }
            check(cache, q, parameters);
        }
}

/// Blocks of 128 query tokens.
TEST_P(TokenWeights, OfManyQueries) {
    const KvCache cache = cache_of(250);
    check(cache, normal_matrix(random_, 140, 6 * 32), {});
    check(cache, Matrix(0, 6 * 32), {});
}

INSTANTIATE_TEST_SUITE_P(Recipes, TokenWeights,
                         testing::ValuesIn(thinned(with(recipe_names(), token_grid_names()))), test_name);

/// Reads of part of the planes weigh what they read. Of fp16 that is close to the weights in double.
TEST(TokenWeightsOfPolicies, AreThoseOfTheRead) {
    std::mt19937_64 random(seed());
    TilePool pool;
    for (const char* recipe : {"key_favored:8:8", "fp16", "latent:8:8+fit_tokens=256", "standard"}) {
        KvCache cache(configuration(recipe, 2, 6), pool);
        append(cache, normal_matrix(random, 2500, 64), normal_matrix(random, 2500, 96));
        const Matrix q = normal_matrix(random, 2, 6 * 32, 0.5f);
        const Matrix all = attended(cache, q, {}).token_weights;
        std::vector<ReadPolicy> policies{ReadPolicy::fixed(8), ReadPolicy::aligned(8.0, 8.0),
                                         ReadPolicy::aligned(8.0), ReadPolicy::tolerance(1e-3)};
        if (std::string(recipe) == "fp16") policies.push_back(ReadPolicy::exponents());
        for (const ReadPolicy& policy : policies) {
            AttentionParameters parameters;
            parameters.read = policy;
            const Attended some = attended(cache, q, parameters);
            EXPECT_NEAR(some.token_weights.row(0).sum(), 6.0f, 1e-4f);
            EXPECT_NEAR(some.token_weights.row(1).sum(), 6.0f, 1e-4f);
            EXPECT_LE((some.token_weights - all).cwiseAbs().sum(), 0.15f) << recipe;
            ThreadExecutor executor(3);
            EXPECT_EQ(attended(cache, q, parameters, &executor).token_weights, some.token_weights);
            Matrix output(2, 6 * 48);
            cache.attend(q, output, parameters);
            EXPECT_EQ(output, some.output);
        }
    }
}

/// Against weights that were computed in double from the stored keys.
TEST(TokenWeightsOfFp16, AreThoseInDouble) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache(configuration("fp16", 2, 6), pool);
    append(cache, normal_matrix(random, 1000, 64), normal_matrix(random, 1000, 96));
    for (const Index queries : {2, 140}) {
        const Matrix q = normal_matrix(random, queries, 6 * 32);
        const MatrixD keys = cache.stored_keys(0, 1000).cast<double>();
        MatrixD expected = MatrixD::Zero(2, 1000);
        for (Index head = 0; head < 6; ++head)
            for (Index i = 0; i < queries; ++i) {
                const Index seen = 1000 - queries + i + 1;
                Eigen::VectorXd scores = keys.block(0, head / 3 * 32, seen, 32) *
                                         q.row(i).segment(head * 32, 32).transpose().cast<double>() /
                                         std::sqrt(32.0);
                scores = (scores.array() - scores.maxCoeff()).exp();
                expected.row(head / 3).head(seen) += scores.transpose() / scores.sum();
            }
        const Matrix got = attended(cache, q, {}).token_weights;
        EXPECT_LE((got.cast<double>() - expected).cwiseAbs().maxCoeff(), kept * expected.maxCoeff());
    }
}

}  // namespace
