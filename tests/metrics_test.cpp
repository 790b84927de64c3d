// Each metric on cases that can be worked out by hand, at its edges, and in windows with two sides on
// quantized random data: too small an error is as suspect as too large a one.
#include "kvplane/metrics.hpp"

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "kvplane/storage/quantized.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::attention_divergence;
using kvplane::attention_output_error;
using kvplane::AttentionShape;
using kvplane::ErrorCode;
using kvplane::Index;
using kvplane::Matrix;
using kvplane::MatrixD;
using kvplane::mean_squared_error;
using kvplane::relative_error;
using kvplane::RowMajorMatrix;
using kvplane::score_error;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::refusal;

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

MatrixD matrix(Index rows, Index cols, const std::vector<double>& elements) {
    return Eigen::Map<const MatrixD>(elements.data(), rows, cols);
}

// -- Reconstruction ---------------------------------------------------------------------------------------

TEST(MeanSquaredError, ByHand) {
    const MatrixD a = matrix(2, 2, {1, 2, 3, 4}), b = matrix(2, 2, {1, 2, 3, 6}),
                  c = matrix(2, 2, {0, 0, 0, 0});
    EXPECT_EQ(mean_squared_error(a, b), 4.0 / 4.0);
    EXPECT_EQ(mean_squared_error(b, a), 1.0);
    EXPECT_EQ(mean_squared_error(a, c), 30.0 / 4.0);
    EXPECT_EQ(mean_squared_error(a, a), 0.0);
}

TEST(RelativeError, ByHand) {
    const MatrixD a = matrix(2, 2, {1, 2, 3, 4}), b = matrix(2, 2, {1, 2, 3, 6}), zero = MatrixD::Zero(2, 2);
    EXPECT_DOUBLE_EQ(relative_error(a, b), 2.0 / std::sqrt(30.0));
    EXPECT_DOUBLE_EQ(relative_error(b, a), 2.0 / std::sqrt(50.0)) << "relative to the first argument";
    EXPECT_DOUBLE_EQ(relative_error(a, zero), 1.0);
    EXPECT_EQ(relative_error(a, a), 0.0);
    EXPECT_EQ(relative_error(zero, zero), 0.0);
    EXPECT_EQ(relative_error(zero, a), infinity);
}

TEST(Reconstruction, OfNothingIsZeroAndOfNotANumberIsNotANumber) {
    for (const auto& [rows, cols] : {std::pair<Index, Index>{0, 3}, {3, 0}, {0, 0}}) {
        EXPECT_EQ(mean_squared_error(MatrixD(rows, cols), MatrixD(rows, cols)), 0.0);
        EXPECT_EQ(relative_error(MatrixD(rows, cols), MatrixD(rows, cols)), 0.0);
    }
    const MatrixD good = matrix(1, 2, {1, 2}), bad = matrix(1, 2, {1, not_a_number});
    EXPECT_TRUE(std::isnan(mean_squared_error(good, bad)));
    EXPECT_TRUE(std::isnan(relative_error(good, bad)));
    EXPECT_TRUE(std::isnan(relative_error(bad, good)));
}

/// Any element type, layout and expression; tensors are (heads, tokens, channels).
TEST(Reconstruction, TakesEveryKindOfInput) {
    const MatrixD a = matrix(2, 4, {1, 2, 3, 4, 5, 6, 7, 8}), b = a.array() + 0.5;
    const RowMajorMatrix<Eigen::half> half = b.cast<Eigen::half>();
    const RowMajorMatrix<Eigen::bfloat16> bfloat = b.cast<Eigen::bfloat16>();
    const Eigen::MatrixXf columns = b.cast<float>();
    EXPECT_EQ(mean_squared_error(a, half), 0.25);
    EXPECT_EQ(mean_squared_error(a, bfloat), 0.25);
    EXPECT_EQ(mean_squared_error(columns, a), 0.25);
    EXPECT_EQ(mean_squared_error(a, a + MatrixD::Constant(2, 4, 0.5)), 0.25);
    EXPECT_EQ(mean_squared_error(a.leftCols(2), b.leftCols(2)), 0.25);
    Eigen::Tensor<float, 3> tensor(2, 2, 2);
    Eigen::Tensor<Eigen::half, 3, Eigen::RowMajor> half_tensor(2, 2, 2);
    for (Index h = 0; h < 2; ++h)
        for (Index t = 0; t < 2; ++t)
            for (Index c = 0; c < 2; ++c) {
                tensor(h, t, c) = columns(t, h * 2 + c);
                half_tensor(h, t, c) = half(t, h * 2 + c);
            }
    EXPECT_EQ(mean_squared_error(a, tensor), 0.25);
    EXPECT_EQ(mean_squared_error(half_tensor, tensor), 0.0);
    EXPECT_DOUBLE_EQ(relative_error(a, half_tensor), std::sqrt(2.0) / a.norm());
}

// -- Scores -----------------------------------------------------------------------------------------------

/// One head of dimension 4 (scale 1/2), two keys, both queries. Errors: 2 in channel 0 of key 0, 4 in channel
/// 1 of key 1. Query 0 sees key 0 alone: 1/2 (3 x 2) = 3. Query 1: 1/2 (1 x 2) = 1 and 1/2 (5 x 4) = 10.
TEST(ScoreError, ByHand) {
    const MatrixD keys = matrix(2, 4, {1, 2, 3, 4, 5, 6, 7, 8});
    const MatrixD close = matrix(2, 4, {3, 2, 3, 4, 5, 2, 7, 8});
    const MatrixD queries = matrix(2, 4, {3, 9, 0, 0, 1, 5, 0, 0});
    const double expected = std::sqrt((9.0 + 1.0 + 100.0) / 3.0);
    EXPECT_DOUBLE_EQ(score_error({}, keys, close, queries), expected);
    EXPECT_DOUBLE_EQ(score_error({.scale = 2.0}, keys, close, queries), 4.0 * expected);
    // The second query alone, where it stands.
    EXPECT_DOUBLE_EQ(score_error({.first_query_position = 1}, keys, close, queries.bottomRows(1)),
                     std::sqrt(101.0 / 2.0));
    // At the first position it would not see key 1.
    EXPECT_DOUBLE_EQ(score_error({}, keys, close, queries.bottomRows(1)), 1.0);
    EXPECT_EQ(score_error({}, keys, keys, queries), 0.0);
}

/// Four query heads over two key heads of dimension 1: an error of 1 in the second key head reaches query
/// heads 2 and 3 alone.
TEST(ScoreError, OfGroupedQueries) {
    const MatrixD keys = matrix(1, 2, {1, 1}), close = matrix(1, 2, {1, 2});
    const AttentionShape shape{.query_heads = 4, .kv_heads = 2};
    for (int head = 0; head < 4; ++head) {
        MatrixD queries = MatrixD::Zero(1, 4);
        queries(0, head) = 6.0;
        EXPECT_DOUBLE_EQ(score_error(shape, keys, close, queries), head < 2 ? 0.0 : std::sqrt(36.0 / 4.0));
    }
}

// -- Attention output -------------------------------------------------------------------------------------

/// Keys whose scores with the query 1 are 0 and log(3): weights 1/4 and 3/4. Equal keys: 1/2 and 1/2.
const MatrixD quarter_keys = matrix(2, 1, {0, std::log(3.0)}), equal_keys = matrix(2, 1, {7, 7});
const AttentionShape at_second{.first_query_position = 1};
const MatrixD one_query = matrix(1, 1, {1});

TEST(AttentionOutputError, ByHand) {
    const MatrixD values = matrix(2, 1, {0, 4});
    // 3 with exact keys, 2 with equal ones.
    EXPECT_DOUBLE_EQ(attention_output_error(at_second, quarter_keys, values, equal_keys, values, one_query),
                     1.0 / 3.0);
    EXPECT_DOUBLE_EQ(attention_output_error(at_second, equal_keys, values, quarter_keys, values, one_query),
                     1.0 / 2.0);
    // Values off by one in the second token: 3/4 off.
    const MatrixD off = matrix(2, 1, {0, 5});
    EXPECT_DOUBLE_EQ(attention_output_error(at_second, quarter_keys, values, quarter_keys, off, one_query),
                     0.75 / 3.0);
    // Scale doubled: weights 1/10 and 9/10, against 1/2.
    const AttentionShape doubled{.first_query_position = 1, .scale = 2.0};
    EXPECT_DOUBLE_EQ(attention_output_error(doubled, quarter_keys, values, equal_keys, values, one_query),
                     (3.6 - 2.0) / 3.6);
    EXPECT_EQ(attention_output_error(at_second, quarter_keys, values, quarter_keys, values, one_query), 0.0);
}

/// A query at position 0 sees key 0 alone, whatever stands behind it.
TEST(AttentionOutputError, IsCausal) {
    const MatrixD values = matrix(2, 1, {1, 4}), wild = matrix(2, 1, {1, 1e9});
    EXPECT_EQ(attention_output_error({}, quarter_keys, values, equal_keys, wild, one_query), 0.0);
    // Two queries: the first sees 1, the second 1/4 + 3 = 13/4 and, with equal keys, 5/2.
    const MatrixD two_queries = matrix(2, 1, {1, 1});
    EXPECT_DOUBLE_EQ(attention_output_error({}, quarter_keys, values, equal_keys, values, two_queries),
                     0.75 / std::sqrt(1.0 + 3.25 * 3.25));
}

/// Four query heads over two key heads; values of dimension 2, keys of 1. Heads 0 and 1 ask 1 and read value
/// head 0 with weights 1/4 and 3/4; heads 2 and 3 ask 0 and read value head 1 with 1/2 and 1/2.
TEST(AttentionOutputError, OfGroupedQueriesAndOtherValueDimension) {
    const AttentionShape shape{.query_heads = 4, .kv_heads = 2, .first_query_position = 1};
    const double s = std::log(3.0);
    const MatrixD keys = matrix(2, 2, {0, 0, s, s});
    // Not written as a literal: g++ 12 -O2 -march=native makes {1, 1, 1, 1} of {1, 1, 0, 0} here.
    MatrixD queries = MatrixD::Zero(1, 4);
    queries.leftCols(2).setOnes();
    const MatrixD values = matrix(2, 4, {0, 0, 0, 0, /**/ 4, 0, 0, 8});
    const MatrixD close = matrix(2, 4, {0, 0, 0, 0, /**/ 4, 0, 2, 8});
    // Outputs (3,0), (3,0), (0,4), (0,4); the errors (1,0) in heads 2 and 3.
    EXPECT_DOUBLE_EQ(attention_output_error(shape, keys, values, keys, close, queries),
                     std::sqrt(2.0) / std::sqrt(9.0 + 9.0 + 16.0 + 16.0));
    // Key head 0 made equal: heads 0 and 1 give (2,0). Key head 1: asked with 0, it changes nothing.
    EXPECT_DOUBLE_EQ(attention_output_error(shape, keys, values, matrix(2, 2, {0, 0, 0, s}), values, queries),
                     std::sqrt(2.0) / std::sqrt(50.0));
    EXPECT_EQ(attention_output_error(shape, keys, values, matrix(2, 2, {0, 5, s, -5}), values, queries), 0.0);
}

TEST(AttentionOutputError, WithScoresThatOverflowAnExponential) {
    const MatrixD keys = matrix(2, 1, {-2000, 2000}), values = matrix(2, 1, {1, 4});
    const MatrixD close = matrix(2, 1, {2000, -2000});
    EXPECT_DOUBLE_EQ(attention_output_error(at_second, keys, values, close, values, one_query), 3.0 / 4.0);
}

TEST(AttentionOutputError, WhereTheExactOutputVanishes) {
    const MatrixD zero = MatrixD::Zero(2, 1), ones = MatrixD::Ones(2, 1);
    EXPECT_EQ(attention_output_error(at_second, ones, zero, ones, zero, one_query), 0.0);
    EXPECT_EQ(attention_output_error(at_second, ones, zero, ones, ones, one_query), infinity);
}

// -- Divergence -------------------------------------------------------------------------------------------

TEST(AttentionDivergence, ByHand) {
    // p = (1/4, 3/4) from p' = (1/2, 1/2), and the other way round.
    EXPECT_NEAR(attention_divergence(at_second, quarter_keys, equal_keys, one_query),
                0.25 * std::log(0.5) + 0.75 * std::log(1.5), 1e-14);
    EXPECT_NEAR(attention_divergence(at_second, equal_keys, quarter_keys, one_query),
                0.5 * std::log(2.0) + 0.5 * std::log(2.0 / 3.0), 1e-14);
    // Scale doubled: p = (1/10, 9/10).
    EXPECT_NEAR(
        attention_divergence({.first_query_position = 1, .scale = 2.0}, quarter_keys, equal_keys, one_query),
        0.1 * std::log(0.2) + 0.9 * std::log(1.8), 1e-14);
}

/// The mean over queries and heads: a query at position 0 sees one key and has no divergence.
TEST(AttentionDivergence, IsAMeanOverCausalQueriesAndHeads) {
    const double one = 0.25 * std::log(0.5) + 0.75 * std::log(1.5);
    const MatrixD two_queries = matrix(2, 1, {1, 1});
    EXPECT_NEAR(attention_divergence({}, quarter_keys, equal_keys, two_queries), one / 2.0, 1e-14);
    // Two key heads, the first exact; three query heads each, two of them with the query 0.
    MatrixD keys(2, 2), close(2, 2);
    keys << quarter_keys, quarter_keys;
    close << quarter_keys, equal_keys;
    const AttentionShape shape{.query_heads = 6, .kv_heads = 2, .first_query_position = 1};
    EXPECT_NEAR(attention_divergence(shape, keys, close, matrix(1, 6, {1, 1, 1, 0, 1, 0})), one / 6.0, 1e-14);
    EXPECT_NEAR(attention_divergence(shape, keys, close, matrix(1, 6, {1, 1, 1, 0, 0, 0})), 0.0, 1e-14);
}

/// The same vector added to all keys moves all scores of a query alike, which no softmax sees; score_error
/// does.
TEST(AttentionDivergence, DoesNotSeeACommonShift) {
    Random random(kvplane_test::seed());
    const Matrix keys = normal_matrix(50, 8, random), queries = normal_matrix(50, 8, random);
    const MatrixD shifted = keys.cast<double>().rowwise() + Eigen::RowVectorXd::LinSpaced(8, -2.0, 2.0);
    EXPECT_NEAR(attention_divergence({}, keys, shifted, queries), 0.0, 1e-12);
    EXPECT_GE(attention_divergence({}, keys, shifted, queries), 0.0);
    EXPECT_GT(score_error({}, keys, shifted, queries), 0.5);
}

/// Scores 0 and s: p' puts e^-s on the first key, which no double holds for s = 2000; the divergence from
/// p = (1/2, 1/2) is s / 2 - log 2 all the same.
TEST(AttentionDivergence, OfWeightsThatUnderflow) {
    const MatrixD far_keys = matrix(2, 1, {0, 2000});
    EXPECT_DOUBLE_EQ(attention_divergence(at_second, equal_keys, far_keys, one_query),
                     1000.0 - std::log(2.0));
    EXPECT_NEAR(attention_divergence(at_second, far_keys, equal_keys, one_query), std::log(2.0), 1e-12);
}

// -- Edges ------------------------------------------------------------------------------------------------

TEST(Attention, WithoutQueriesHasNoError) {
    const MatrixD keys = MatrixD::Ones(3, 2), close = MatrixD::Zero(3, 2), none(0, 2);
    EXPECT_EQ(score_error({}, keys, close, none), 0.0);
    EXPECT_EQ(attention_output_error({}, keys, keys, close, close, none), 0.0);
    EXPECT_EQ(attention_divergence({}, keys, close, none), 0.0);
    EXPECT_EQ(attention_divergence({}, MatrixD(0, 2), MatrixD(0, 2), none), 0.0);
}

/// What is no number must not come out as no error.
TEST(Attention, OfNotANumberIsNotANumber) {
    for (const double bad : {not_a_number, infinity}) {
        MatrixD keys = MatrixD::Ones(3, 2), values = keys, queries = keys;
        MatrixD close = keys;
        close(1, 0) = bad;
        EXPECT_FALSE(std::isfinite(score_error({}, keys, close, queries)));
        EXPECT_FALSE(std::isfinite(attention_divergence({}, keys, close, queries)));
        EXPECT_FALSE(std::isfinite(attention_output_error({}, keys, values, close, values, queries)));
        EXPECT_FALSE(std::isfinite(attention_output_error({}, keys, values, keys, close, queries)));
    }
}

TEST(Attention, TakesTensors) {
    Random random(kvplane_test::seed());
    const Matrix keys = normal_matrix(6, 2 * 4, random), values = normal_matrix(6, 2 * 4, random);
    const Matrix queries = normal_matrix(6, 4 * 4, random);
    const auto tensor = [](const Matrix& from, Index heads) {
        Eigen::Tensor<float, 3> to(heads, from.rows(), from.cols() / heads);
        for (Index h = 0; h < heads; ++h)
            for (Index t = 0; t < from.rows(); ++t)
                for (Index c = 0; c < to.dimension(2); ++c) to(h, t, c) = from(t, h * to.dimension(2) + c);
        return to;
    };
    const AttentionShape shape{.query_heads = 4, .kv_heads = 2};
    const Matrix close = keys + 0.1f * values;
    EXPECT_EQ(score_error(shape, tensor(keys, 2), close, tensor(queries, 4)),
              score_error(shape, keys, close, queries));
    EXPECT_EQ(attention_divergence(shape, keys, tensor(close, 2), queries),
              attention_divergence(shape, keys, close, queries));
    EXPECT_EQ(attention_output_error(shape, keys, tensor(values, 2), close, values, tensor(queries, 4)),
              attention_output_error(shape, keys, values, close, values, queries));
}

// -- Refusals ---------------------------------------------------------------------------------------------

TEST(MetricsRefuse, OtherShapes) {
    const MatrixD a = MatrixD::Zero(2, 3);
    for (const MatrixD& b : {MatrixD(MatrixD::Zero(3, 2)), MatrixD(MatrixD::Zero(2, 4)), MatrixD(0, 0)}) {
        for (const std::function<void()>& call : std::vector<std::function<void()>>{
                 [&] { mean_squared_error(a, b); }, [&] { relative_error(a, b); },
                 [&] { score_error({}, a, b, a); }, [&] { attention_divergence({}, a, b, a); },
                 [&] { attention_output_error({}, a, a, b, a, a); },
                 [&] { attention_output_error({}, a, a, a, b, a); }}) {
            const std::string sentence = refusal(ErrorCode::shape, call);
            EXPECT_NE(sentence.find("expected"), std::string::npos) << sentence;
            EXPECT_NE(sentence.find("2 x 3"), std::string::npos) << sentence;
        }
    }
}

/// One query against keys and values of 6 channels with a shape that does not fit, through every metric.
void expect_refused(ErrorCode code, const AttentionShape& shape, const MatrixD& queries,
                    const std::string& said) {
    const MatrixD keys = MatrixD::Ones(4, 6);
    for (const std::function<void()>& call : std::vector<std::function<void()>>{
             [&] { score_error(shape, keys, keys, queries); },
             [&] { attention_divergence(shape, keys, keys, queries); },
             [&] { attention_output_error(shape, keys, keys, keys, keys, queries); }}) {
        const std::string sentence = refusal(code, call);
        EXPECT_NE(sentence.find(said), std::string::npos) << sentence;
    }
}

TEST(MetricsRefuse, HeadsAndPositionsThatDoNotFit) {
    const auto queries = [](Index rows, Index cols) { return MatrixD(MatrixD::Ones(rows, cols)); };
    for (const auto& [query_heads, kv_heads] :
         {std::pair<Index, Index>{0, 1}, {1, 0}, {-2, 1}, {2, -1}, {3, 2}, {1, 2}})
        expect_refused(ErrorCode::option, {.query_heads = query_heads, .kv_heads = kv_heads}, queries(1, 6),
                       "expected a multiple");
    expect_refused(ErrorCode::shape, {}, queries(1, 5), "same head_dim");
    expect_refused(ErrorCode::shape, {.query_heads = 2, .kv_heads = 1}, queries(1, 6), "same head_dim");
    expect_refused(ErrorCode::shape, {.query_heads = 4, .kv_heads = 4}, queries(1, 4), "same head_dim");
    expect_refused(ErrorCode::shape, {.query_heads = 5, .kv_heads = 1}, queries(1, 6), "same head_dim");
    expect_refused(ErrorCode::index, {}, queries(5, 6), "over 4 keys");
    for (const Index position : {Index{-1}, Index{4}, std::numeric_limits<Index>::max()})
        expect_refused(ErrorCode::index, {.first_query_position = position}, queries(1, 6), "over 4 keys");
    for (const double scale : {-0.5, infinity, not_a_number})
        expect_refused(ErrorCode::option, {.scale = scale}, queries(1, 6), "scale");
    for (const auto& [rows, cols] : {std::pair<Index, Index>{3, 6}, {4, 5}}) {
        const MatrixD keys = MatrixD::Ones(4, 6), values = MatrixD::Ones(rows, cols);
        refusal(ErrorCode::shape, [&, &v = values] {
            attention_output_error({.query_heads = 2, .kv_heads = 2}, keys, v, keys, v, queries(1, 6));
        });
    }
}

// -- Windows ----------------------------------------------------------------------------------------------

/// On quantized random data errors can be predicted: uniform in cells, so step^2 / 12 an element, independent
/// of the queries.
TEST(MetricsOnRandomData, AgreeWithTheoryFromBothSides) {
    Random random(kvplane_test::seed());
    constexpr Index tokens = 256, dim = 64, heads = 2, query_heads = 4;
    const Matrix keys = normal_matrix(tokens, heads * dim, random);
    const Matrix values = normal_matrix(tokens, heads * dim, random);
    const Matrix queries = normal_matrix(tokens, query_heads * dim, random);
    const AttentionShape shape{.query_heads = query_heads, .kv_heads = heads};
    for (int bits = 3; bits <= 8; ++bits) {
        SCOPED_TRACE(bits);
        const kvplane::Quantized q = kvplane::per_channel(keys, {.bits = bits});
        const Matrix close = q.dequantize();
        double noise = 0.0;
        for (Index t = 0; t < tokens; t += 128)
            for (Index c = 0; c < heads * dim; ++c)
                noise += std::pow(q.grid(t, c).step, 2) / 12.0 / (2.0 * heads * dim);
        EXPECT_NEAR(mean_squared_error(keys, close), noise, 0.05 * noise);
        EXPECT_NEAR(relative_error(keys, close), std::sqrt(noise), 0.05 * std::sqrt(noise));
        // A score is a sum of 64 products of a unit normal and the noise, divided by 8.
        EXPECT_NEAR(score_error(shape, keys, close, queries), std::sqrt(noise), 0.06 * std::sqrt(noise));
        // Second order: half the variance of the score errors under the weights. Weights of unit normal
        // scores are spread enough that nearly all of it is left.
        const double divergence = attention_divergence(shape, keys, close, queries);
        EXPECT_GT(divergence, 0.80 * noise / 2.0);
        EXPECT_LT(divergence, 1.05 * noise / 2.0);
        // Exact keys, noisy values: output and error are averaged by the same weights.
        const Matrix noisy = values + (close - keys);
        const double output = attention_output_error(shape, keys, values, keys, noisy, queries);
        EXPECT_GT(output, 0.85 * std::sqrt(noise));
        EXPECT_LT(output, 1.15 * std::sqrt(noise));
        // Noisy keys: weights change by the noise of the scores, outputs by about as much.
        const double through_keys = attention_output_error(shape, keys, values, close, values, queries);
        EXPECT_GT(through_keys, 0.7 * std::sqrt(noise));
        EXPECT_LT(through_keys, 1.2 * std::sqrt(noise));
    }
}

}  // namespace
