// Statistics of keys and queries: streams and merges of any chunks are the whole; what is refused.
#include "kvplane/latent/statistics.hpp"

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "latent_support.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::ErrorCode;
using kvplane::Index;
using kvplane::LatentStatistics;
using kvplane::Matrix;
using kvplane::MatrixD;
using kvplane::SecondMoments;
using kvplane_test::by_definition;
using kvplane_test::correlated;
using kvplane_test::Moments;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::refusal;

// -- Second moments ---------------------------------------------------------------------------------------

/// Covariances relative to the deviations, means relative to themselves and those.
void expect_moments(const SecondMoments& moments, const Moments& expected, double allowed) {
    const Eigen::VectorXd deviation = expected.covariance.diagonal().cwiseSqrt();
    const MatrixD covariance = moments.covariance();
    for (Index i = 0; i < deviation.size(); ++i) {
        EXPECT_NEAR(moments.mean()[i], expected.mean[i],
                    1e-15 * 100.0 * std::abs(expected.mean[i]) + allowed * deviation[i]);
        for (Index j = 0; j < deviation.size(); ++j)
            EXPECT_NEAR(covariance(i, j), expected.covariance(i, j), allowed * deviation[i] * deviation[j])
                << i << ", " << j;
    }
}

TEST(SecondMoments, AStreamOfAnyChunksIsTheWhole) {
    Random random(kvplane_test::seed());
    const Matrix rows = correlated(300, 9, random);
    const Moments expected = by_definition(rows);
    for (const Index chunk : {1, 2, 3, 7, 64, 299, 300}) {
        SCOPED_TRACE(testing::Message() << "chunks of " << chunk);
        SecondMoments moments(9);
        for (Index at = 0; at < rows.rows(); at += chunk) {
            moments.add(rows.middleRows(at, std::min(chunk, rows.rows() - at)));
            moments.add(rows.topRows(0));
        }
        EXPECT_EQ(moments.count(), 300.0);
        expect_moments(moments, expected, 1e-12);
    }
}

TEST(SecondMoments, MergedPartsAreTheWhole) {
    Random random(kvplane_test::seed());
    const Matrix rows = correlated(257, 6, random);
    const Moments expected = by_definition(rows);
    for (const Index split : {0, 1, 2, 100, 256, 257}) {
        SCOPED_TRACE(testing::Message() << "the first " << split);
        SecondMoments first(6), second(6);
        first.add(rows.topRows(split));
        second.add(rows.bottomRows(rows.rows() - split));
        SecondMoments reversed = second;
        first.merge(second);
        EXPECT_EQ(first.count(), 257.0);
        expect_moments(first, expected, 1e-12);
        SecondMoments other(6);
        other.add(rows.topRows(split));
        reversed.merge(other);
        expect_moments(reversed, expected, 1e-12);
    }
    SecondMoments twice(6);
    twice.add(rows);
    const SecondMoments copy = twice;
    twice.merge(copy);
    twice.merge(twice);  // with itself, too
    EXPECT_EQ(twice.count(), 4.0 * 257.0);
    expect_moments(twice, expected, 1e-12);
}

/// Sums of squares would keep 1e-5 of this variance at best.
TEST(SecondMoments, HugeMeans) {
    Random random(kvplane_test::seed());
    const Matrix rows = correlated(0.01f * normal_matrix(1000, 5, random), Matrix::Identity(5, 5),
                                   Eigen::RowVectorXf::Constant(5, 3000.0f));
    const Moments expected = by_definition(rows);
    SecondMoments whole(5), single(5);
    whole.add(rows);
    for (Index t = 0; t < rows.rows(); ++t) single.add(rows.row(t));
    expect_moments(whole, expected, 1e-9);
    expect_moments(single, expected, 1e-9);
}

TEST(SecondMoments, EmptyAndSingle) {
    SecondMoments moments(3);
    EXPECT_EQ(moments.count(), 0.0);
    EXPECT_EQ(moments.covariance(), MatrixD::Zero(3, 3));
    moments.merge(SecondMoments(3));
    EXPECT_EQ(moments.count(), 0.0);
    moments.add(Eigen::RowVector3f(1.0f, 2.0f, 3.0f));
    EXPECT_EQ(moments.mean(), Eigen::Vector3d(1.0, 2.0, 3.0));
    EXPECT_EQ(moments.covariance(), MatrixD::Zero(3, 3));
}

TEST(SecondMoments, ComesBackFromItsParts) {
    Random random(kvplane_test::seed());
    const Matrix rows = correlated(50, 4, random), more = correlated(31, 4, random);
    SecondMoments moments(4);
    moments.add(rows);
    EXPECT_EQ(moments.covariance(), MatrixD(moments.scatter() / 50.0));
    SecondMoments restored(moments.count(), moments.mean(), moments.scatter());
    moments.add(more);
    restored.add(more);
    EXPECT_EQ(restored.count(), 81.0);
    EXPECT_EQ(restored.mean(), moments.mean()) << "to the last bit";
    EXPECT_EQ(restored.scatter(), moments.scatter());
}

TEST(SecondMoments, Refusals) {
    SecondMoments moments(4);
    const Matrix good = Matrix::Ones(3, 4);
    moments.add(good);
    EXPECT_NE(
        refusal(ErrorCode::shape, [&] { moments.add(Matrix::Ones(3, 5)); }).find("5 channels, expected 4"),
        std::string::npos);
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        Matrix rows = Matrix::Ones(6, 4);
        rows(4, 2) = bad;
        const std::string sentence = refusal(ErrorCode::not_finite, [&] { moments.add(rows, "keys"); });
        EXPECT_NE(sentence.find("keys"), std::string::npos) << sentence;
        EXPECT_NE(sentence.find("token 4, channel 2"), std::string::npos) << sentence;
    }
    refusal(ErrorCode::shape, [&] { moments.merge(SecondMoments(5)); });
    EXPECT_EQ(moments.count(), 3.0) << "a refusal changes nothing";
    EXPECT_EQ(moments.mean(), Eigen::Vector4d::Ones());
    const Eigen::VectorXd mean = Eigen::VectorXd::Zero(2);
    const MatrixD identity = MatrixD::Identity(2, 2);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    refusal(ErrorCode::shape, [&] { SecondMoments(3.0, mean, MatrixD::Identity(3, 3)); });
    refusal(ErrorCode::option, [&] { SecondMoments(-1.0, mean, identity); });
    refusal(ErrorCode::option, [&] { SecondMoments(nan, mean, identity); });
    refusal(ErrorCode::not_finite, [&] { SecondMoments(3.0, Eigen::Vector2d(nan, 0.0), identity); });
    refusal(ErrorCode::not_finite, [&] { SecondMoments(3.0, mean, nan * identity); });
    refusal(ErrorCode::option, [&] { SecondMoments(3.0, mean, -identity); });
}

// -- Statistics -------------------------------------------------------------------------------------------

TEST(LatentStatistics, MergedPartsAreTheWhole) {
    Random random(kvplane_test::seed());
    const Matrix keys = correlated(90, 12, random), queries = correlated(70, 24, random);
    LatentStatistics whole(2, 4, 6), first(2, 4, 6), second(2, 4, 6);
    whole.add_keys({keys, 0});
    whole.add_queries(queries);
    first.add_keys({keys.topRows(40), 0});
    first.add_queries(queries.topRows(1));
    second.add_keys({keys.bottomRows(50), 40});
    second.add_queries(queries.bottomRows(69));
    first.merge(second);
    EXPECT_EQ(first.kv_heads(), 2);
    EXPECT_EQ(first.query_heads(), 4);
    EXPECT_EQ(first.head_dim(), 6);
    expect_moments(first.keys(), by_definition(keys), 1e-12);
    for (Index head = 0; head < 2; ++head) {
        Matrix of_head(140, 6);  // the query heads 2 head and 2 head + 1, one query a row
        of_head << queries.middleCols(12 * head, 6), queries.middleCols(12 * head + 6, 6);
        EXPECT_EQ(first.queries(head).count(), 140.0);
        expect_moments(first.queries(head), by_definition(of_head), 1e-12);
        expect_moments(whole.queries(head), by_definition(of_head), 1e-12);
    }
    EXPECT_EQ(whole.bytes(), 8 * (1 + 12 + 144) + 2 * 8 * (1 + 6 + 36));

    const LatentStatistics restored(4, whole.keys(), {whole.queries(0), whole.queries(1)});
    EXPECT_EQ(restored.head_dim(), 6);
    first.merge(restored);
    EXPECT_EQ(first.keys().count(), 180.0);
}

/// What a basis is fitted to is E[w u u^T], over the plain count of queries, in any chunks.
TEST(LatentStatistics, WeightsCountInTheSecondMoment) {
    Random random(kvplane_test::seed());
    const Matrix queries = correlated(80, 24, random),
                 weights = normal_matrix(80, 4, random).array().square();
    LatentStatistics whole(2, 4, 6), first(2, 4, 6), second(2, 4, 6), plain(2, 4, 6);
    plain.add_queries(queries);
    EXPECT_TRUE(plain.weighted_queries().empty());
    EXPECT_EQ(&plain.basis_queries(1), &plain.queries(1));
    whole.add_queries(queries, weights);
    first.add_queries(queries.topRows(30), weights.topRows(30));
    second.add_queries(queries.bottomRows(50), weights.bottomRows(50));
    LatentStatistics merged(2, 4, 6);  // of none
    merged.merge(first);
    merged.merge(second);
    for (Index head = 0; head < 2; ++head) {
        MatrixD expected = MatrixD::Zero(6, 6);
        for (Index h = 2 * head; h < 2 * head + 2; ++h)
            expected += queries.middleCols(6 * h, 6).cast<double>().transpose() *
                        weights.col(h).cast<double>().asDiagonal() *
                        queries.middleCols(6 * h, 6).cast<double>();
        for (const LatentStatistics* some : {&whole, &merged}) {
            const SecondMoments& found = some->basis_queries(head);
            EXPECT_EQ(found.count(), 160.0);
            const MatrixD moment = 160.0 * (found.covariance() + found.mean() * found.mean().transpose());
            EXPECT_LT((moment - expected).norm(), 1e-6 * expected.norm());
            EXPECT_EQ(some->queries(head).count(), 160.0);
        }
        EXPECT_EQ(whole.queries(head).scatter(), plain.queries(head).scatter());
    }
    EXPECT_GT(whole.bytes(), plain.bytes());

    refusal(ErrorCode::mismatch, [&] { whole.merge(plain); });
    refusal(ErrorCode::mismatch, [&] { plain.merge(whole); });
    refusal(ErrorCode::option, [&] { whole.add_queries(queries); });
    refusal(ErrorCode::option, [&] { plain.add_queries(queries, weights); });
    refusal(ErrorCode::shape, [&] { whole.add_queries(queries, weights.topRows(79)); });
    refusal(ErrorCode::shape, [&] { whole.add_queries(queries, weights.leftCols(3)); });
    refusal(ErrorCode::option, [&] { whole.add_queries(queries, -weights); });
    refusal(ErrorCode::shape, [&] { plain.set_weighted_queries({SecondMoments(6)}); });
    refusal(ErrorCode::option, [&] { plain.set_weighted_queries({SecondMoments(6), SecondMoments(6)}); });
    EXPECT_EQ(whole.queries(0).count(), 160.0) << "a refusal changes nothing";
}

TEST(LatentStatistics, Refusals) {
    for (const auto& [kv_heads, query_heads, head_dim] :
         {std::array<Index, 3>{0, 4, 8}, {2, 3, 8}, {2, 0, 8}, {2, 4, 0}, {-1, 4, 8}, {4, 2, 8}}) {
        const Index kv = kv_heads, query = query_heads, dim = head_dim;
        refusal(ErrorCode::option, [=] { LatentStatistics(kv, query, dim); });
    }
    LatentStatistics statistics(2, 4, 8);
    for (const auto& other : {LatentStatistics(1, 4, 8), LatentStatistics(2, 2, 8), LatentStatistics(2, 4, 6),
                              LatentStatistics(1, 4, 16)})
        refusal(ErrorCode::mismatch, [&] { statistics.merge(other); });
    refusal(ErrorCode::shape, [&] { statistics.add_keys({Matrix::Ones(3, 8), 0}); });
    refusal(ErrorCode::shape, [&] { statistics.add_queries(Matrix::Ones(3, 16)); });
    Matrix bad = Matrix::Ones(3, 32);
    bad(2, 31) = std::numeric_limits<float>::quiet_NaN();
    refusal(ErrorCode::not_finite, [&] { statistics.add_queries(bad); });
    EXPECT_EQ(statistics.queries(0).count(), 0.0) << "a refusal changes nothing";
    bad = Matrix::Ones(3, 16);
    bad(1, 9) = std::numeric_limits<float>::infinity();
    EXPECT_NE(refusal(ErrorCode::not_finite,
                      [&] {
                          statistics.add_keys({bad, 0});
                      })
                  .find("keys: the value at token 1, channel 9"),
              std::string::npos);
    refusal(ErrorCode::shape, [] { LatentStatistics(2, SecondMoments(8), {}); });
    refusal(ErrorCode::shape, [] {
        LatentStatistics(1, SecondMoments(8), {SecondMoments(4), SecondMoments(4)});
    });
    refusal(ErrorCode::shape, [] {
        LatentStatistics(3, SecondMoments(8), {SecondMoments(4), SecondMoments(4)});
    });
    refusal(ErrorCode::shape, [] {
        LatentStatistics(2, SecondMoments(8), {SecondMoments(4), SecondMoments(3)});
    });
}

}  // namespace
