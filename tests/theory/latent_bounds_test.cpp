// T6 to T10 of the theorems: what the latent basis, its grids and its schedules do, against the bounds; on
// synthetic latents of known decay, on keys of a real model, and at the edges; each shown tight.
#include <Eigen/QR>
#include <Eigen/SVD>
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <iomanip>
#include <iostream>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvplane/io/safetensors.hpp"
#include "kvplane/latent/basis.hpp"
#include "kvplane/latent/schedule.hpp"
#include "kvplane/storage/quantized.hpp"
#include "kvplane/theory/bounds.hpp"
#include "real_layers.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::ErrorCode;
using kvplane::FramedKeys;
using kvplane::Index;
using kvplane::KeyFrame;
using kvplane::LatentBasis;
using kvplane::LatentStatistics;
using kvplane::Matrix;
using kvplane::MatrixD;
using kvplane::Quantized;
using kvplane::Scheme;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::real_layers;
using kvplane_test::RealLayer;
using kvplane_test::refusal;
using BeforeRope = FramedKeys<KeyFrame::before_rope>;
namespace theory = kvplane::theory;

constexpr std::array<int, 8> two_bits{8, 4, 2, 1, 1, 0, 0, 0};  // arXiv 2502.15304
constexpr std::array<int, 8> one_and_a_quarter{4, 4, 2, 0, 0, 0, 0, 0};

/// SVDq's basis of keys: C = I, before RoPE, all heads together.
LatentBasis svdq_basis(const Matrix& keys) {
    LatentStatistics statistics(1, 1, keys.cols());
    statistics.add_keys({keys, 0});
    return kvplane::fit_latent_basis(
        statistics, nullptr,
        {.frame = KeyFrame::before_rope, .query_weighted = false, .heads_together = true});
}
/// Its latents, of variance lambda: L = (K - mean) U.
Matrix latents_of(const LatentBasis& basis, const Matrix& keys) {
    const Eigen::RowVectorXf deviation = basis.subspaces()[0].spectrum.cwiseSqrt().transpose().cast<float>();
    return basis.encode(BeforeRope{keys, 0}).array().rowwise() * deviation.array();
}
Matrix keys_of(const LatentBasis& basis, const Matrix& latents) {
    Eigen::RowVectorXf inverse = basis.subspaces()[0].spectrum.cwiseSqrt().transpose().cast<float>();
    for (float& x : inverse) x = x > 0.0f ? 1.0f / x : 0.0f;
    return basis.decode<KeyFrame::before_rope>(Matrix(latents.array().rowwise() * inverse.array()), 0).rows;
}

double squared_distance(const Matrix& a, const Matrix& b) {
    return (a.cast<double>() - b.cast<double>()).squaredNorm();
}

Scheme scheme_for(int bits) {
    return bits <= 2 ? Scheme::cell : Scheme::min_max;
}

/// Latent j with bits[j] bits in grids of 128 tokens, 0 where it has none.
Matrix quantized(const Matrix& latents, std::span<const int> bits) {
    Matrix close = Matrix::Zero(latents.rows(), latents.cols());
    for (Index at = 0; at < latents.cols();) {
        const int width = bits[static_cast<std::size_t>(at)];
        Index end = at;
        while (end < latents.cols() && bits[static_cast<std::size_t>(end)] == width) ++end;
        if (width > 0)
            close.middleCols(at, end - at) =
                kvplane::per_channel(latents.middleCols(at, end - at),
                                     {.bits = width, .scheme = scheme_for(width)})
                    .dequantize();
        at = end;
    }
    return close;
}

/// Widths of equal groups, latent by latent.
std::vector<int> spread(std::span<const int> widths, Index latents) {
    std::vector<int> bits;
    for (const int width : widths)
        bits.insert(bits.end(), static_cast<std::size_t>(latents) / widths.size(), width);
    return bits;
}

Eigen::VectorXd decaying(Index latents, double decay) {
    Eigen::VectorXd spectrum(latents);
    for (Index j = 0; j < latents; ++j)
        spectrum[j] = std::exp(-decay * static_cast<double>(j) / static_cast<double>(latents));
    return spectrum;
}

/// Orthonormal, from a normal matrix.
Matrix random_rotation(Index channels, Random& random) {
    const Eigen::MatrixXd normal = normal_matrix(channels, channels, random).cast<double>();
    const Eigen::MatrixXd q = Eigen::HouseholderQR<Eigen::MatrixXd>(normal).householderQ();
    return q.cast<float>();
}

/// Normal latents of these variances behind a random rotation.
Matrix synthetic_keys(const Eigen::VectorXd& spectrum, Index tokens, Random& random) {
    Matrix latents = normal_matrix(tokens, spectrum.size(), random);
    latents.array().rowwise() *= spectrum.cwiseSqrt().transpose().cast<float>().array();
    return latents * random_rotation(spectrum.size(), random).transpose();
}

// -- T6 ---------------------------------------------------------------------------------------------------

/// A rotation changes no error, and latents that are not kept cost what Eckart and Young say.
TEST(T6, TruncationIsEckartYoung) {
    Random random(kvplane_test::seed());
    std::vector<Matrix> inputs{synthetic_keys(decaying(48, 5.0), 400, random), normal_matrix(20, 48, random)};
    for (const RealLayer& real : real_layers()) inputs.push_back(real.keys_before_rope);
    for (const Matrix& keys : inputs) {
        const auto tokens = static_cast<double>(keys.rows());
        const Index channels = keys.cols();
        const LatentBasis basis = svdq_basis(keys);
        const Eigen::VectorXd& spectrum = basis.subspaces()[0].spectrum;
        const Matrix latents = latents_of(basis, keys);
        EXPECT_NEAR(
            squared_distance(latents, Matrix::Zero(keys.rows(), channels)) / (tokens * spectrum.sum()), 1.0,
            1e-4);
        for (const Index kept : {channels, channels / 2, channels / 8, Index{1}, Index{0}}) {
            SCOPED_TRACE(testing::Message() << channels << " channels, " << kept << " kept");
            std::vector<int> bits(static_cast<std::size_t>(channels), 0);
            std::fill_n(bits.begin(), kept, 4);
            const double tail = tokens * theory::truncation_error(spectrum, kept);
            Matrix cut = latents;
            cut.rightCols(channels - kept).setZero();
            const double by_cut = squared_distance(keys, keys_of(basis, cut));
            EXPECT_NEAR(by_cut, tail, 1e-4 * tail + 1e-9 * keys.cast<double>().squaredNorm());
            const Matrix close = quantized(latents, bits);
            const double of_kept = squared_distance(latents.leftCols(kept), close.leftCols(kept));
            const double all = squared_distance(keys, keys_of(basis, close));
            EXPECT_NEAR(all / (of_kept + tail), 1.0, 1e-3);
        }
    }
}

/// The spectrum is that of a singular value decomposition, and no other projection of the rank does better.
TEST(T6, NoProjectionDoesBetter) {
    Random random(kvplane_test::seed());
    const Matrix keys = synthetic_keys(decaying(24, 6.0), 200, random);
    const LatentBasis basis = svdq_basis(keys);
    const MatrixD centered = keys.cast<double>().rowwise() - keys.cast<double>().colwise().mean();
    const Eigen::VectorXd singular = Eigen::JacobiSVD<Eigen::MatrixXd>(centered).singularValues();
    EXPECT_LT((basis.subspaces()[0].spectrum * 200.0 - singular.cwiseAbs2()).cwiseAbs().maxCoeff(),
              1e-9 * singular[0] * singular[0]);
    for (const Index kept : {1, 5, 20}) {
        const double least = theory::truncation_error(singular.cwiseAbs2(), kept);
        for (int trial = 0; trial < 20; ++trial) {
            const MatrixD some = random_rotation(24, random).leftCols(kept).cast<double>();
            EXPECT_GE((centered - centered * some * some.transpose()).squaredNorm(), least);
        }
    }
}

TEST(T6, IsTheFormula) {
    const Eigen::Vector4d spectrum(8.0, 4.0, 2.0, 1.0);
    EXPECT_EQ(theory::truncation_error(spectrum, 0), 15.0);
    EXPECT_EQ(theory::truncation_error(spectrum, 2), 3.0);
    EXPECT_EQ(theory::truncation_error(spectrum, 4), 0.0);
    refusal(ErrorCode::option, [&] { theory::truncation_error(spectrum, 5); });
    refusal(ErrorCode::option, [&] { theory::truncation_error(spectrum, -1); });
    refusal(ErrorCode::option, [] { theory::truncation_error(Eigen::Vector2d(1.0, 2.0), 1); });
    refusal(ErrorCode::option, [] { theory::truncation_error(Eigen::Vector2d(1.0, -2.0), 1); });
    refusal(ErrorCode::not_finite, [] { theory::truncation_error(Eigen::Vector2d(NAN, 1.0), 1); });
}

// -- T6b (on a real model: latent/basis_test.cpp)
// --------------------------------------------------

TEST(T6b, IsTheFormula) {
    const Eigen::Vector3d spectrum(8.0, 4.0, 1.0);
    EXPECT_EQ(theory::expected_score_error(spectrum, Eigen::Vector3d::Ones()), 13.0) << "nothing kept";
    EXPECT_EQ(theory::expected_score_error(spectrum, Eigen::Vector3d(0.25, 0.5, 1.0)), 5.0);
    refusal(ErrorCode::shape, [&] { theory::expected_score_error(spectrum, Eigen::Vector2d::Ones()); });
    refusal(ErrorCode::option,
            [&] { theory::expected_score_error(spectrum, Eigen::Vector3d(0.0, 0.0, -1.0)); });
    refusal(ErrorCode::not_finite,
            [&] { theory::expected_score_error(spectrum, Eigen::Vector3d(NAN, 0.0, 0.0)); });
}

/// Drawn queries: the mean of (u.(k - k'))^2 over keys and queries that do not know of each other.
TEST(T6b, HoldsForDrawnQueries) {
    Random random(kvplane_test::seed());
    const Matrix keys = synthetic_keys(decaying(32, 4.0), 1024, random);
    const Matrix queries = synthetic_keys(decaying(32, 3.0), 4096, random), fresh = queries.bottomRows(2048);
    LatentStatistics statistics(1, 1, 32);
    statistics.add_keys({keys, 0});
    statistics.add_queries(queries.topRows(2048));
    double last = std::numeric_limits<double>::infinity();
    for (const bool weighted : {false, true}) {
        const LatentBasis basis = kvplane::fit_latent_basis(
            statistics, nullptr, {.frame = KeyFrame::before_rope, .query_weighted = weighted});
        const LatentBasis::Subspace& subspace = basis.subspaces()[0];
        const Matrix latents = basis.encode(BeforeRope{keys, 0});
        const Matrix close = quantized(latents, spread(two_bits, 32));
        const MatrixD error = (keys - basis.decode<KeyFrame::before_rope>(close, 0).rows).cast<double>();
        const double measured = (fresh.cast<double>() * error.transpose()).squaredNorm() / (2048.0 * 1024.0);
        const Eigen::VectorXd errors =
            (latents - close).cast<double>().colwise().squaredNorm().transpose() / 1024.0;
        const double predicted = theory::expected_score_error(subspace.spectrum, errors);
        if (weighted) {
            EXPECT_NEAR(measured / predicted, 1.0, 0.05);
        }
        EXPECT_LT(measured, last) << "weighting helps";
        last = measured;
    }
}

/// Hadamard's inequality: no orthonormal directions have a smaller product of variances than eigenvectors,
/// so none a smaller error at high rate.
TEST(T6b, EigenvectorsHaveTheLeastGeometricMean) {
    Random random(kvplane_test::seed());
    const Matrix keys = synthetic_keys(decaying(24, 4.0), 500, random);
    const Eigen::VectorXd spectrum = svdq_basis(keys).subspaces()[0].spectrum;
    const MatrixD centered = keys.cast<double>().rowwise() - keys.cast<double>().colwise().mean();
    const MatrixD covariance = centered.transpose() * centered / 500.0;
    const double least = spectrum.array().log().mean();
    EXPECT_GT(covariance.diagonal().array().log().mean(), least + 0.1) << "the channels themselves";
    for (int trial = 0; trial < 20; ++trial) {
        const MatrixD u = random_rotation(24, random).cast<double>();
        EXPECT_GT((u.transpose() * covariance * u).diagonal().array().log().mean(), least);
    }
}

// -- T7 ---------------------------------------------------------------------------------------------------

/// |K - K'|_F^2 and its bound with `cell` grids of 128 tokens, ranges as stored.
struct Bounded {
    double error, bound;
};
Bounded svdq_in_cells(const Matrix& keys, std::span<const int> bits) {
    const LatentBasis basis = svdq_basis(keys);
    const Matrix latents = latents_of(basis, keys);
    const Index channels = keys.cols();
    Matrix close = Matrix::Zero(keys.rows(), channels);
    std::vector<Eigen::VectorXd> ranges;
    for (Index at = 0; at < keys.rows(); at += 128) ranges.push_back(Eigen::VectorXd::Zero(channels));
    for (Index j = 0; j < channels; ++j) {
        const int width = bits[static_cast<std::size_t>(j)];
        if (width == 0) continue;
        const Quantized q = kvplane::per_channel(latents.col(j), {.bits = width, .scheme = Scheme::cell});
        close.col(j) = q.dequantize();
        for (std::size_t group = 0; group < ranges.size(); ++group)
            ranges[group][j] =
                std::ldexp(static_cast<double>(q.grid(static_cast<Index>(group) * 128, 0).step), width);
    }
    // Grids cover 128 tokens: the bound is a sum over them, the truncated part counted once.
    double bound = 0;
    const Eigen::VectorXd squared = basis.subspaces()[0].spectrum * static_cast<double>(keys.rows());
    for (std::size_t group = 0; group < ranges.size(); ++group) {
        const Index count = std::min<Index>(128, keys.rows() - static_cast<Index>(group) * 128);
        bound += theory::svdq_error_bound(
            ranges[group], bits, group == 0 ? squared : Eigen::VectorXd(Eigen::VectorXd::Zero(channels)),
            count);
    }
    return {squared_distance(keys, keys_of(basis, close)), bound};
}

TEST(T7, BoundsTheErrorOfSvdq) {
    Random random(kvplane_test::seed());
    std::vector<Matrix> inputs{synthetic_keys(decaying(64, 6.0), 300, random),
                               synthetic_keys(decaying(64, 0.0), 128, random)};
    Matrix outliers = synthetic_keys(decaying(64, 3.0), 256, random);
    outliers.col(3) *= 100.0f;
    outliers.row(17) *= 30.0f;
    inputs.push_back(outliers);
    for (const RealLayer& real : real_layers()) inputs.push_back(real.keys_before_rope);
    for (const Matrix& keys : inputs)
        for (const auto& widths :
             {two_bits, one_and_a_quarter, {8, 8, 8, 8, 8, 8, 8, 8}, {1, 1, 1, 1, 1, 1, 1, 1}, {}}) {
            const Bounded result = svdq_in_cells(keys, spread(widths, keys.cols()));
            // 1e-4: fp32 in the projections, and fp16 in what the file holds of a key.
            EXPECT_LE(result.error, result.bound * (1.0 + 1e-4) + 1e-9 * keys.cast<double>().squaredNorm());
            EXPECT_GT(result.error, 0.01 * result.bound);
        }
}

/// Tight: latents of two values, +s and -s (Walsh functions), lie at the ends of their intervals and so
/// at the edges of cells at every width.
TEST(T7, IsReachedAtTheEdgesOfCells) {
    Random random(kvplane_test::seed());
    constexpr Index channels = 24;
    Matrix latents(128, channels);
    for (Index t = 0; t < 128; ++t)
        for (Index j = 0; j < channels; ++j) {
            const auto common = static_cast<unsigned>(t & (j + 1));
            latents(t, j) = (__builtin_popcount(common) % 2 == 0 ? 1.0f : -1.0f) *
                            static_cast<float>(channels + 4 - j);  // variances fall, so the basis is unique
        }
    const Matrix keys = latents * random_rotation(channels, random).transpose();
    for (const auto& widths : {two_bits, one_and_a_quarter, {6, 5, 4, 3, 3, 2, 2, 1}, {}}) {
        const Bounded result = svdq_in_cells(keys, spread(widths, channels));
        EXPECT_NEAR(result.error / result.bound, 1.0, 0.01);
        EXPECT_LE(result.error, result.bound * (1.0 + 1e-4));
    }
}

TEST(T7, IsTheFormula) {
    const Eigen::Vector3d ranges(8.0, 4.0, 100.0), squared(50.0, 20.0, 3.0);
    EXPECT_EQ(theory::svdq_error_bound(ranges, std::array{2, 1, 0}, squared, 10), 10.0 * (1.0 + 1.0) + 3.0);
    EXPECT_EQ(theory::svdq_error_bound(ranges, std::array{0, 0, 0}, squared, 10), 73.0);
    refusal(ErrorCode::shape, [&] { theory::svdq_error_bound(ranges, std::array{2, 1}, squared, 10); });
    refusal(ErrorCode::shape, [&] {
        theory::svdq_error_bound(Eigen::Vector2d(1.0, 1.0), std::array{2, 1, 0}, squared, 10);
    });
    refusal(ErrorCode::option, [&] { theory::svdq_error_bound(ranges, std::array{2, -1, 0}, squared, 10); });
    refusal(ErrorCode::option, [&] { theory::svdq_error_bound(ranges, std::array{2, 1, 0}, squared, -1); });
    refusal(ErrorCode::option, [&] { theory::svdq_error_bound(-ranges, std::array{2, 1, 0}, squared, 1); });
    refusal(ErrorCode::not_finite, [&] {
        theory::svdq_error_bound(ranges, std::array{2, 1, 0}, Eigen::Vector3d(1.0, INFINITY, 1.0), 1);
    });
}

// -- T8 ---------------------------------------------------------------------------------------------------

TEST(T8, IsTheFormula) {
    EXPECT_EQ(theory::svdq_gain(0.0), 1.0);
    EXPECT_NEAR(theory::svdq_gain(9.0), 0.1000, 5e-5) << "the paper's x0.1";
    for (const double decay : {1e-9, 1e-3, 0.5, 3.0, 20.0, 600.0})
        EXPECT_NEAR(theory::svdq_gain(decay) / (0.5 * decay / std::sinh(0.5 * decay)), 1.0, 1e-12) << decay;
    EXPECT_EQ(theory::svdq_gain(-3.0), theory::svdq_gain(3.0)) << "the order of latents does not matter";
    EXPECT_GE(theory::svdq_gain(1e5), 0.0) << "sinh overflows, the gain does not";
    refusal(ErrorCode::not_finite, [] { theory::svdq_gain(NAN); });
    // It is the geometric over the arithmetic mean of the variances.
    for (const double decay : {0.1, 3.0, 9.0, 12.0}) {
        const Eigen::VectorXd spectrum = decaying(20000, decay);
        EXPECT_NEAR(std::exp(spectrum.array().log().mean()) / spectrum.mean() / theory::svdq_gain(decay), 1.0,
                    1e-6);
        EXPECT_NEAR(theory::fitted_decay(spectrum), decay, 1e-9);
        EXPECT_NEAR(theory::fitted_decay(17.0 * spectrum.head(10000)), 0.5 * decay, 1e-9);
    }
    const std::array<double, 3> f{1.0, 0.3, 0.1};
    EXPECT_DOUBLE_EQ(theory::svdq_grouped_error(0.5, std::array{2, 1, 0}, f),
                     (4.0 * 0.1 + 2.0 * 0.3 + 1.0) / 7.0);
    EXPECT_DOUBLE_EQ(theory::svdq_grouped_error(1.0, std::array{2, 0}, f), 0.55) << "no decay: groups alike";
    EXPECT_DOUBLE_EQ(theory::svdq_grouped_error(0.0, std::array{1, 0}, f), 0.3) << "all energy in the first";
    // At low rate svdq_gain is no bound: two groups, of which one gets all bits.
    const double ratio =
        theory::svdq_grouped_error(std::exp(-1.5), std::array{2, 0}, kvplane::latent_grid_error) /
        kvplane::latent_grid_error[1];
    EXPECT_NEAR(ratio, 0.4907, 5e-5);
    EXPECT_NEAR(theory::svdq_gain(3.0), 0.7045, 5e-5);
    refusal(ErrorCode::option, [&] { theory::svdq_grouped_error(1.1, std::array{1}, f); });
    refusal(ErrorCode::option, [&] { theory::svdq_grouped_error(-0.1, std::array{1}, f); });
    refusal(ErrorCode::option, [&] { theory::svdq_grouped_error(0.5, std::array{3}, f); });
    refusal(ErrorCode::option, [&] { theory::svdq_grouped_error(0.5, std::array{-1}, f); });
    refusal(ErrorCode::shape, [&] { theory::svdq_grouped_error(0.5, {}, f); });
    refusal(ErrorCode::shape, [] { theory::fitted_decay(Eigen::VectorXd::Ones(1)); });
    refusal(ErrorCode::option, [] { theory::fitted_decay(Eigen::Vector2d(1.0, 0.0)); });
    refusal(ErrorCode::not_finite, [] { theory::fitted_decay(Eigen::Vector2d(INFINITY, 1.0)); });
}

/// Of the squared error of keys quantized without any basis, per channel and 128 tokens, what latents have.
double measured_ratio(const Matrix& keys, std::span<const int> bits, int per_channel_bits) {
    const LatentBasis basis = svdq_basis(keys);
    const Matrix close = keys_of(basis, quantized(latents_of(basis, keys), bits));
    const Matrix plain =
        kvplane::per_channel(keys, {.bits = per_channel_bits, .scheme = scheme_for(per_channel_bits)})
            .dequantize();
    return squared_distance(keys, close) / squared_distance(keys, plain);
}

/// The paper's schedule of 2 bits and one of 4 against per-channel quantization at 2 and 4 bits.
TEST(T8, PredictsTheGainOnSyntheticLatents) {
    Random random(kvplane_test::seed());
    for (const double decay : {3.0, 6.0, 9.0, 12.0}) {
        const Matrix keys = synthetic_keys(decaying(64, decay), 4096, random);
        for (const auto& [widths, mean_bits] :
             {std::pair{two_bits, 2}, {std::array{8, 7, 6, 4, 3, 2, 1, 1}, 4}}) {
            SCOPED_TRACE(testing::Message() << "decay " << decay << ", " << mean_bits << " bits");
            ASSERT_EQ(theory::schedule_rate(widths), mean_bits);
            const double predicted =
                theory::svdq_grouped_error(std::exp(-decay / 8.0), widths, kvplane::latent_grid_error) /
                kvplane::latent_grid_error[static_cast<std::size_t>(mean_bits)];
            const double measured = measured_ratio(keys, spread(widths, 64), mean_bits);
            EXPECT_NEAR(measured / predicted, 1.0, 0.05);
        }
        EXPECT_NEAR(theory::fitted_decay(svdq_basis(keys).subspaces()[0].spectrum), decay, 0.1);
    }
}

/// At high rate, with the width of every latent the nearest integer to the ideal one, the gain of the theorem
/// itself: never below it, and within what rounding widths costs (3/2 / ln 4 = 1.082 at most). `cell` grids,
/// whose errors fall by 4 a bit.
TEST(T8, IsReachedAtHighRate) {
    Random random(kvplane_test::seed());
    for (const double decay : {3.0, 6.0, 9.0}) {
        const Eigen::VectorXd spectrum = decaying(64, decay);
        const Matrix keys = synthetic_keys(spectrum, 4096, random);
        const LatentBasis basis = svdq_basis(keys);
        const Matrix latents = latents_of(basis, keys);
        const double mean_log = 0.5 * spectrum.array().log().mean() / std::log(2.0);
        Matrix close(latents.rows(), 64);
        double mean_bits = 0;
        for (Index j = 0; j < 64; ++j) {
            const int width = static_cast<int>(std::lround(5.0 + 0.5 * std::log2(spectrum[j]) - mean_log));
            mean_bits += width / 64.0;
            close.col(j) =
                kvplane::per_channel(latents.col(j), {.bits = width, .scheme = Scheme::cell}).dequantize();
        }
        const double plain = squared_distance(
            keys, kvplane::per_channel(keys, {.bits = 5, .scheme = Scheme::cell}).dequantize());
        const double at_mean = plain * std::exp2(-2.0 * (mean_bits - 5.0));
        const double ratio =
            squared_distance(keys, keys_of(basis, close)) / at_mean / theory::svdq_gain(decay);
        EXPECT_GT(ratio, 0.99) << "decay " << decay;
        EXPECT_LT(ratio, 1.1) << "decay " << decay;
    }
}

/// The least expected error of widths in eight equal groups with that sum.
std::vector<int> best_grouped(const Eigen::VectorXd& spectrum, int sum) {
    std::vector<int> widths, best;
    double least = std::numeric_limits<double>::infinity();
    const std::function<void(int, int)> extend = [&](int left, int most) {
        if (widths.size() == 8) {
            if (left > 0) return;
            const double error = kvplane::grouped_schedule(spectrum, widths).error;
            if (error >= least) return;
            least = error;
            best = widths;
            return;
        }
        for (int bits = std::min(left, most); bits >= 0; --bits) {
            widths.push_back(bits);
            extend(left - bits, bits);
            widths.pop_back();
        }
    };
    extend(sum, 8);
    return best;
}

/// On a real model: heads together, before RoPE, basis and keys from the same text, as the paper measures.
/// Against per-channel grids at 2 bits; at 1.25, which no such grid has, as a share of the energy, and the
/// limit by water-filling for both.
TEST(T8, OnARealModel) {
    std::cout << std::setprecision(3);
    for (const RealLayer& real : real_layers()) {
        SCOPED_TRACE(testing::Message() << "layer " << real.layer);
        const LatentBasis basis = svdq_basis(real.keys_before_rope);
        const Eigen::VectorXd& spectrum = basis.subspaces()[0].spectrum;
        const double decay = theory::fitted_decay(spectrum),
                     tokens = static_cast<double>(real.keys_before_rope.rows());
        const double energy = tokens * spectrum.sum();
        const Matrix latents = latents_of(basis, real.keys_before_rope);
        const auto error = [&](std::span<const int> widths) {
            return squared_distance(real.keys_before_rope,
                                    keys_of(basis, quantized(latents, spread(widths, 192))));
        };
        const double plain = squared_distance(
            real.keys_before_rope,
            kvplane::per_channel(real.keys_before_rope, {.bits = 2, .scheme = Scheme::cell}).dequantize());
        const std::vector<int> best_two = best_grouped(spectrum, 16), best_less = best_grouped(spectrum, 10);
        const double limit_two = tokens * theory::reverse_water_filling(spectrum, 2.0).distortion;
        const double limit_less = tokens * theory::reverse_water_filling(spectrum, 1.25).distortion;
        const double paper_two = error(two_bits), paper_less = error(one_and_a_quarter);
        const double integer_two = error(best_two), integer_less = error(best_less);
        const auto print = [](const std::vector<int>& widths) {
            for (std::size_t g = 0; g < widths.size(); ++g) std::cout << (g == 0 ? "(" : ",") << widths[g];
            std::cout << ")";
        };
        std::cout << "layer " << real.layer << ": decay L " << decay << ", svdq_gain "
                  << theory::svdq_gain(decay) << "\n  2 bits, of the per-channel error (" << plain / energy
                  << " of the energy): paper " << paper_two / plain << ", best integer ";
        print(best_two);
        std::cout << " " << integer_two / plain << ", limit " << limit_two / plain
                  << "\n  1.25 bits, of the energy: paper " << paper_less / energy << ", best integer ";
        print(best_less);
        std::cout << " " << integer_less / energy << ", limit " << limit_less / energy << "\n";
        EXPECT_GT(decay, 2.0);
        EXPECT_LT(paper_two, plain);
        EXPECT_LE(integer_two, 1.02 * paper_two) << "the best by the table is the best on the keys";
        EXPECT_LE(integer_less, 1.02 * paper_less);
        EXPECT_GT(integer_two, limit_two);
        EXPECT_GT(integer_less, limit_less);
    }
}

// -- T9 (its table and all schedules: latent/schedule_test.cpp)
// --------------------------------------

TEST(T9, WaterFillsInReverse) {
    const Eigen::Vector3d spectrum(16.0, 4.0, 1.0);
    // theta 1: 2 + 1 + 0 bits.
    theory::WaterFilling filled = theory::reverse_water_filling(spectrum, 1.0);
    EXPECT_NEAR(filled.level, 1.0, 1e-12);
    EXPECT_NEAR(filled.distortion, 3.0, 1e-12);
    // Only the first above the water: theta = 16 / 4^(3 * 1/3).
    filled = theory::reverse_water_filling(spectrum, 1.0 / 3.0);
    EXPECT_NEAR(filled.level, 4.0, 1e-12);
    EXPECT_NEAR(filled.distortion, 9.0, 1e-12);
    filled = theory::reverse_water_filling(spectrum, 0.0);
    EXPECT_EQ(filled.level, 16.0);
    EXPECT_EQ(filled.distortion, 21.0);
    // High rate: n GM 4^-b.
    filled = theory::reverse_water_filling(spectrum, 9.0);
    EXPECT_NEAR(filled.distortion / (3.0 * 4.0 * std::pow(4.0, -9.0)), 1.0, 1e-12);
    // However many bits there are, and however small the least variance is.
    for (const double bits : {1200.0, 4096.0, 1e5, 1e300, 1e308})
        EXPECT_EQ(theory::reverse_water_filling(Eigen::Vector3d(1e300, 1.0, 1e-300), bits).distortion, 0.0)
            << bits;
    const Eigen::Vector3d another_order(1.0, 16.0, 4.0);
    EXPECT_DOUBLE_EQ(theory::reverse_water_filling(another_order, 0.7).distortion,
                     theory::reverse_water_filling(spectrum, 0.7).distortion);
    EXPECT_NEAR(theory::reverse_water_filling(1e-30 * spectrum, 1.0).distortion / 3e-30, 1.0, 1e-12);
    EXPECT_EQ(theory::reverse_water_filling(Eigen::Vector2d::Zero(), 1.0).distortion, 0.0);
    EXPECT_NEAR(theory::reverse_water_filling(Eigen::Vector2d(16.0, 0.0), 1.0).distortion, 1.0, 1e-12)
        << "a latent without variance needs no bits";
    refusal(ErrorCode::shape, [] { theory::reverse_water_filling(Eigen::VectorXd(), 1.0); });
    refusal(ErrorCode::option, [&] { theory::reverse_water_filling(spectrum, -1.0); });
    refusal(ErrorCode::option, [&] { theory::reverse_water_filling(-spectrum, 1.0); });
    refusal(ErrorCode::not_finite, [&] { theory::reverse_water_filling(spectrum, NAN); });
    refusal(ErrorCode::not_finite, [] { theory::reverse_water_filling(Eigen::Vector2d(1.0, NAN), 1.0); });
}

/// Real widths of least error, by a fine search, are no better; the stated level says which latents get any.
TEST(T9, NoRealWidthsDoBetter) {
    Random random(kvplane_test::seed());
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    const Eigen::VectorXd spectrum = decaying(6, 7.0);
    for (const double mean_bits : {0.3, 1.0, 2.5}) {
        const theory::WaterFilling limit = theory::reverse_water_filling(spectrum, mean_bits);
        double rate = 0, reached = 0;
        for (const double variance : spectrum) {
            const double bits = std::max(0.0, 0.5 * std::log2(variance / limit.level));
            rate += bits / 6.0;
            reached += variance * std::pow(4.0, -bits);
        }
        EXPECT_NEAR(rate, mean_bits, 1e-9);
        EXPECT_NEAR(reached / limit.distortion, 1.0, 1e-9) << "errors of 4^-b reach it";
        for (int trial = 0; trial < 20000; ++trial) {
            Eigen::VectorXd bits(6);
            for (double& b : bits) b = std::pow(uniform(random), 3.0);
            bits *= 6.0 * mean_bits / bits.sum();
            double error = 0;
            for (Index j = 0; j < 6; ++j) error += spectrum[j] * std::pow(4.0, -bits[j]);
            ASSERT_GE(error, limit.distortion * (1.0 - 1e-12));
        }
    }
}

/// What the library's own grids do to normal latents, at the best of all schedules for every size.
TEST(T9, MeasuredErrorsStayAboveTheLimit) {
    Random random(kvplane_test::seed());
    const Matrix keys = synthetic_keys(decaying(64, 6.0), 2048, random);
    const LatentBasis basis = svdq_basis(keys);
    const Eigen::VectorXd& spectrum = basis.subspaces()[0].spectrum;
    const Matrix latents = latents_of(basis, keys);
    for (const double true_bits : {0.75, 1.25, 2.0, 3.0, 5.0}) {
        const kvplane::LatentSchedule schedule = kvplane::best_schedule(spectrum, true_bits);
        std::vector<int> bits;
        for (const kvplane::ChannelSegment& segment : schedule.segments)
            bits.insert(bits.end(), static_cast<std::size_t>(segment.channels), segment.bits);
        const double measured = squared_distance(keys, keys_of(basis, quantized(latents, bits))) / 2048.0;
        EXPECT_NEAR(measured / schedule.error, 1.0, 0.03) << "what the schedule expects";
        EXPECT_GT(measured, theory::reverse_water_filling(spectrum, schedule.nominal_bits()).distortion);
    }
}

// -- T10 --------------------------------------------------------------------------------------------------

TEST(T10, Rates) {
    EXPECT_EQ(theory::schedule_rate(two_bits), 2.0);
    EXPECT_EQ(theory::schedule_rate(one_and_a_quarter), 1.25);
    EXPECT_NEAR(theory::key_compression(1.25, 1.0 / 32.0), 409.6, 1e-9) << "the paper's 410x";
    EXPECT_EQ(theory::key_compression(16.0, 1.0), 1.0);
    EXPECT_EQ(theory::latent_true_rate(1.25, 48, 128, 4096, 128), 1.25 + 16.0 * 48.0 / 4096.0 + 0.375 * 0.25);
    EXPECT_EQ(theory::latent_true_rate(0.0, 0, 128, 1, 32), 0.0);
    refusal(ErrorCode::shape, [] { theory::schedule_rate({}); });
    refusal(ErrorCode::option, [] { theory::schedule_rate(std::array{2, -1}); });
    refusal(ErrorCode::option, [] { theory::key_compression(0.0, 1.0); });
    refusal(ErrorCode::option, [] { theory::key_compression(2.0, 0.0); });
    refusal(ErrorCode::option, [] { theory::key_compression(2.0, 1.5); });
    refusal(ErrorCode::not_finite, [] { theory::key_compression(NAN, 1.0); });
    refusal(ErrorCode::option, [] { theory::latent_true_rate(1.0, 129, 128, 1, 32); });
    refusal(ErrorCode::option, [] { theory::latent_true_rate(1.0, -1, 128, 1, 32); });
    refusal(ErrorCode::option, [] { theory::latent_true_rate(1.0, 1, 128, 0, 32); });
    refusal(ErrorCode::option, [] { theory::latent_true_rate(1.0, 1, 128, 1, 0); });
    refusal(ErrorCode::option, [] { theory::latent_true_rate(-1.0, 1, 128, 1, 32); });
}

/// What a schedule says of its size is the theorem's rate where no plane is padded, and above it elsewhere;
/// and grids alone, without a basis, are what a tile takes.
TEST(T10, IsWhatSchedulesCount) {
    for (const Index channels : {64, 128, 192, 256, 512})
        for (const auto& widths : {two_bits, one_and_a_quarter, {8, 8, 4, 4, 4, 2, 2, 2}, {}})
            for (const Index tokens : {1024, 8192}) {
                const double basis_bytes =
                    2.0 * static_cast<double>(channels * 128) / static_cast<double>(tokens);
                const kvplane::LatentSchedule schedule = kvplane::grouped_schedule(
                    decaying(channels, 5.0), widths, {.basis_bytes_per_latent = basis_bytes});
                const double rate =
                    theory::latent_true_rate(schedule.nominal_bits(), schedule.kept(), channels, tokens, 128);
                if (channels >= 256) {
                    EXPECT_NEAR(schedule.true_bits(), rate, 1e-12) << channels << " channels";
                } else {
                    EXPECT_GE(schedule.true_bits(), rate - 1e-12) << channels << " channels";
                }
                EXPECT_LT(schedule.true_bits(), rate + 0.7);
            }
}

}  // namespace
