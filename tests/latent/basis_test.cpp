// The latent basis: what latents look like in every frame, what is kept and lost, and the score errors it
// predicts (T6b) on a real model.
#include "kvplane/latent/basis.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kvplane/io/safetensors.hpp"
#include "kvplane/latent/schedule.hpp"
#include "kvplane/storage/quantized.hpp"
#include "kvplane/theory/bounds.hpp"
#include "latent_support.hpp"
#include "real_layers.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::BasisSettings;
using kvplane::ErrorCode;
using kvplane::FramedKeys;
using kvplane::Index;
using kvplane::KeyFrame;
using kvplane::LatentBasis;
using kvplane::LatentDirections;
using kvplane::LatentStatistics;
using kvplane::Matrix;
using kvplane::MatrixD;
using kvplane::RopeLayout;
using kvplane::RopeSettings;
using kvplane::RotaryEmbedding;
using kvplane::SecondMoments;
using kvplane_test::by_definition;
using kvplane_test::correlated;
using kvplane_test::Moments;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::refusal;
using BeforeRope = FramedKeys<KeyFrame::before_rope>;
namespace theory = kvplane::theory;

// -- Latents ----------------------------------------------------------------------------------------------

constexpr RopeSettings small_rope{};
constexpr std::array all_frames{KeyFrame::before_rope, KeyFrame::after_rope, KeyFrame::tile};

std::vector<BasisSettings> all_settings() {
    std::vector<BasisSettings> all;
    for (const KeyFrame frame : all_frames)
        for (const bool weighted : {false, true})
            for (const bool together : {false, true})
                for (const LatentDirections directions :
                     {LatentDirections::eigenvectors, LatentDirections::channels})
                    all.push_back({.frame = frame,
                                   .query_weighted = weighted,
                                   .heads_together = together,
                                   .directions = directions,
                                   .tile_tokens = 16,
                                   .context = 40});
    return all;
}
std::string describe(const BasisSettings& s) {
    return std::string(name(s.frame)) + (s.query_weighted ? ", weighted" : "") +
           (s.heads_together ? ", together" : "") +
           (s.directions == LatentDirections::channels ? ", channels" : "");
}

LatentStatistics statistics_of(const Matrix& keys, const Matrix& queries, Index kv_heads, Index query_heads) {
    LatentStatistics statistics(kv_heads, query_heads, keys.cols() / kv_heads);
    statistics.add_keys({keys, 0});
    statistics.add_queries(queries);
    return statistics;
}

/// Every key at every turn that its frame may give it, each as often: what the basis was fitted to.
Matrix at_every_turn(const Matrix& keys, const RotaryEmbedding& rope, Index turns) {
    Matrix all(keys.rows() * turns, keys.cols());
    for (Index t = 0; t < turns; ++t) {
        auto block = all.middleRows(t * keys.rows(), keys.rows());
        block = keys;
        rope.turn(block, t);
    }
    return all;
}

Matrix encode_any(const LatentBasis& basis, const Matrix& rows) {
    if (basis.frame() == KeyFrame::before_rope) return basis.encode(BeforeRope{rows, 0});
    if (basis.frame() == KeyFrame::after_rope) return basis.encode(FramedKeys<KeyFrame::after_rope>{rows, 0});
    return basis.encode(FramedKeys<KeyFrame::tile>{rows, 0});
}
Matrix decode_any(const LatentBasis& basis, const Matrix& latents, Index kept = -1) {
    if (basis.frame() == KeyFrame::before_rope)
        return basis.decode<KeyFrame::before_rope>(latents, 0, kept).rows;
    if (basis.frame() == KeyFrame::after_rope)
        return basis.decode<KeyFrame::after_rope>(latents, 0, kept).rows;
    return basis.decode<KeyFrame::tile>(latents, 0, kept).rows;
}

/// In each frame, on the keys as that frame turns them: mean 0, variance 1, and (eigenvectors, unweighted or
/// not) no correlation within a subspace.
TEST(LatentBasis, LatentsAreWhite) {
    Random random(kvplane_test::seed());
    const Matrix keys = correlated(150, 16, random), queries = correlated(80, 32, random);
    const LatentStatistics statistics = statistics_of(keys, queries, 2, 4);
    const RotaryEmbedding rope(8, small_rope);
    for (const BasisSettings& settings : all_settings()) {
        SCOPED_TRACE(describe(settings));
        const LatentBasis basis = kvplane::fit_latent_basis(statistics, &small_rope, settings);
        const Index turns = settings.frame == KeyFrame::tile         ? 16
                            : settings.frame == KeyFrame::after_rope ? 40
                                                                     : 1;
        const Matrix latents = encode_any(basis, at_every_turn(keys, rope, turns));
        const Moments moments = by_definition(latents);
        EXPECT_LT(moments.mean.cwiseAbs().maxCoeff(), 1e-4);
        EXPECT_LT((moments.covariance.diagonal().array() - 1.0).abs().maxCoeff(), 1e-3);
        if (settings.directions == LatentDirections::channels) continue;
        const Index width = basis.subspace_channels();
        for (Index at = 0; at < 16; at += width)
            EXPECT_LT((moments.covariance.block(at, at, width, width) - MatrixD::Identity(width, width))
                          .cwiseAbs()
                          .maxCoeff(),
                      1e-3);
    }
}

TEST(LatentBasis, DecodeUndoesEncodeAtFullRank) {
    Random random(kvplane_test::seed());
    const Matrix keys = correlated(150, 16, random), queries = correlated(80, 32, random);
    const LatentStatistics statistics = statistics_of(keys, queries, 2, 4);
    const Matrix others = correlated(33, 16, random);  // whatever keys
    for (const RopeSettings* rope : {&small_rope, static_cast<const RopeSettings*>(nullptr)})
        for (const BasisSettings& settings : all_settings()) {
            SCOPED_TRACE(describe(settings));
            const LatentBasis basis = kvplane::fit_latent_basis(statistics, rope, settings);
            for (const LatentBasis::Subspace& subspace : basis.subspaces())
                EXPECT_EQ(subspace.rank, basis.subspace_channels());
            const Matrix close = decode_any(basis, encode_any(basis, others));
            EXPECT_LT((close - others).norm(), 2e-5f * others.norm());
            EXPECT_EQ(basis.rope() == nullptr, rope == nullptr);
            EXPECT_EQ(basis.settings(), settings);
        }
}

/// Without RoPE the frames are the same, so are bases but for what they are called.
TEST(LatentBasis, FramesAgreeWithoutRope) {
    Random random(kvplane_test::seed());
    const Matrix keys = correlated(150, 16, random), queries = correlated(80, 32, random);
    const LatentStatistics statistics = statistics_of(keys, queries, 2, 4);
    const LatentBasis before =
        kvplane::fit_latent_basis(statistics, nullptr, {.frame = KeyFrame::before_rope});
    for (const KeyFrame frame : {KeyFrame::after_rope, KeyFrame::tile}) {
        const LatentBasis other = kvplane::fit_latent_basis(statistics, nullptr, {.frame = frame});
        for (std::size_t p = 0; p < 2; ++p)
            EXPECT_EQ(before.subspaces()[p].spectrum, other.subspaces()[p].spectrum);
    }
}

TEST(LatentBasis, RankIsWhatTheStatisticsDetermine) {
    Random random(kvplane_test::seed());
    const Matrix queries = correlated(80, 16, random);
    const BasisSettings settings{.frame = KeyFrame::before_rope};
    const auto expect_rank = [&](const Matrix& keys, Index rank) {
        const LatentBasis basis =
            kvplane::fit_latent_basis(statistics_of(keys, queries, 1, 1), &small_rope, settings);
        const LatentBasis::Subspace& subspace = basis.subspaces().front();
        ASSERT_EQ(subspace.rank, rank);
        EXPECT_EQ(subspace.spectrum.tail(16 - rank).sum(), 0.0);
        EXPECT_EQ(subspace.to_latents.rightCols(16 - rank).squaredNorm(), 0.0f);
        EXPECT_GT(subspace.spectrum[rank - 1], 0.0);
        const Matrix latents = encode_any(basis, keys);
        EXPECT_LT((decode_any(basis, latents) - keys).norm(), 1e-4f * keys.norm())
            << "the keys themselves are in it";
        EXPECT_LT((decode_any(basis, latents, rank) - keys).norm(), 1e-4f * keys.norm());
    };
    for (const Index tokens : {2, 3, 9, 15}) {
        SCOPED_TRACE(testing::Message() << tokens << " tokens");
        expect_rank(correlated(tokens, 16, random), tokens - 1);
    }
    expect_rank(correlated(17, 16, random), 15 + 1);
    for (const Index inner : {1, 5, 12}) {
        SCOPED_TRACE(testing::Message() << inner << " directions");
        const Eigen::RowVectorXf mean = normal_matrix(1, 16, random).row(0);
        expect_rank(correlated(normal_matrix(200, inner, random), normal_matrix(inner, 16, random), mean),
                    inner);
    }
    const LatentBasis constant = kvplane::fit_latent_basis(
        statistics_of(Matrix::Constant(20, 16, 0.5f), queries, 1, 1), &small_rope, settings);
    EXPECT_EQ(constant.subspaces().front().rank, 0);
    EXPECT_EQ(decode_any(constant, encode_any(constant, Matrix::Constant(3, 16, 0.5f))),
              Matrix::Constant(3, 16, 0.5f));
}

TEST(LatentBasis, ChannelsAreChannels) {
    Random random(kvplane_test::seed());
    const Matrix keys = correlated(150, 16, random), queries = correlated(80, 32, random);
    const LatentStatistics statistics = statistics_of(keys, queries, 2, 4);
    for (const bool weighted : {false, true}) {
        const LatentBasis basis = kvplane::fit_latent_basis(statistics, nullptr,
                                                            {.frame = KeyFrame::before_rope,
                                                             .query_weighted = weighted,
                                                             .directions = LatentDirections::channels});
        for (Index head = 0; head < 2; ++head) {
            const LatentBasis::Subspace& subspace = basis.subspaces()[static_cast<std::size_t>(head)];
            std::vector<int> seen(8, 0);
            const Moments key = by_definition(keys.middleCols(8 * head, 8));
            Matrix of_head(160, 8);
            of_head << queries.middleCols(16 * head, 8), queries.middleCols(16 * head + 8, 8);
            // Both query heads count: their sum is twice the mean of all rows.
            const Eigen::VectorXd weight =
                weighted ? Eigen::VectorXd(2.0 * of_head.cast<double>().colwise().squaredNorm().transpose() /
                                           160.0)
                         : Eigen::VectorXd::Ones(8);
            for (Index j = 0; j < 8; ++j) {
                ASSERT_EQ((subspace.to_latents.col(j).array() != 0.0f).count(), 1);
                Index channel = 0;
                subspace.to_latents.col(j).cwiseAbs().maxCoeff(&channel);
                ++seen[static_cast<std::size_t>(channel)];
                EXPECT_NEAR(subspace.to_latents(channel, j),
                            1.0 / std::sqrt(key.covariance(channel, channel)), 1e-5);
                EXPECT_NEAR(subspace.spectrum[j] / (key.covariance(channel, channel) * weight[channel]), 1.0,
                            weighted ? 0.02 : 1e-9)
                    << "up to the ridge";
            }
            EXPECT_EQ(seen, std::vector<int>(8, 1));
        }
    }
}

/// Per head is each head alone; together, independent heads keep apart, so the spectra merge.
TEST(LatentBasis, PerHeadAndTogether) {
    Random random(kvplane_test::seed());
    // Signs flipped half a batch at a time make heads exactly uncorrelated: [a, b], [a, -b] for all a, b.
    const Matrix a = correlated(60, 8, random), b = correlated(60, 8, random);
    const Eigen::RowVectorXf b_mean = b.colwise().mean();
    Matrix keys(120, 16);
    keys << a, b, a, Matrix(2.0f * b_mean.replicate(60, 1) - b);
    const Matrix queries = correlated(80, 16, random);
    const BasisSettings per_head{.frame = KeyFrame::before_rope},
        together{.frame = KeyFrame::before_rope, .heads_together = true};
    const LatentStatistics statistics = statistics_of(keys, queries, 2, 2);
    const LatentBasis apart = kvplane::fit_latent_basis(statistics, &small_rope, per_head);
    const LatentBasis joint = kvplane::fit_latent_basis(statistics, &small_rope, together);
    ASSERT_EQ(apart.subspaces().size(), 2u);
    ASSERT_EQ(joint.subspaces().size(), 1u);
    EXPECT_EQ(apart.subspace_channels(), 8);
    EXPECT_EQ(joint.subspace_channels(), 16);
    std::vector<double> merged;
    for (Index head = 0; head < 2; ++head) {
        const LatentBasis alone = kvplane::fit_latent_basis(
            statistics_of(keys.middleCols(8 * head, 8), queries.middleCols(8 * head, 8), 1, 1), &small_rope,
            per_head);
        const Eigen::VectorXd& spectrum = apart.subspaces()[static_cast<std::size_t>(head)].spectrum;
        EXPECT_LT((spectrum - alone.subspaces()[0].spectrum).cwiseAbs().maxCoeff(), 1e-9 * spectrum[0]);
        merged.insert(merged.end(), spectrum.begin(), spectrum.end());
    }
    std::sort(merged.begin(), merged.end(), std::greater<>());
    for (Index j = 0; j < 16; ++j)
        EXPECT_NEAR(joint.subspaces()[0].spectrum[j] / merged[static_cast<std::size_t>(j)], 1.0, 1e-4) << j;
}

TEST(LatentBasis, CountsItsBytes) {
    Random random(kvplane_test::seed());
    const LatentStatistics statistics =
        statistics_of(correlated(150, 16, random), correlated(80, 32, random), 2, 4);
    const auto bytes = [&](bool weighted, bool together, LatentDirections directions) {
        return kvplane::fit_latent_basis(
                   statistics, nullptr,
                   {.query_weighted = weighted, .heads_together = together, .directions = directions})
            .bytes_per_latent();
    };
    EXPECT_EQ(bytes(true, false, LatentDirections::eigenvectors), 8 + 2 * 2 * 8) << "E and D in fp16";
    EXPECT_EQ(bytes(true, true, LatentDirections::eigenvectors), 8 + 2 * 2 * 16);
    EXPECT_EQ(bytes(false, false, LatentDirections::eigenvectors), 8 + 2 * 8);
    EXPECT_EQ(bytes(true, false, LatentDirections::channels), 8 + 2) << "the channel's number";
}

TEST(LatentBasis, Refusals) {
    Random random(kvplane_test::seed());
    const LatentStatistics statistics =
        statistics_of(correlated(150, 16, random), correlated(80, 32, random), 2, 4);
    const LatentBasis basis = kvplane::fit_latent_basis(statistics, &small_rope, {});
    const Matrix rows = Matrix::Ones(3, 16);
    EXPECT_NE(refusal(ErrorCode::mismatch,
                      [&] {
                          basis.encode(BeforeRope{rows, 0});
                      })
                  .find("before_rope, expected tile"),
              std::string::npos);
    refusal(ErrorCode::mismatch, [&] { basis.encode(FramedKeys<KeyFrame::after_rope>{rows, 0}); });
    refusal(ErrorCode::mismatch, [&] { basis.decode<KeyFrame::after_rope>(rows, 0); });
    refusal(ErrorCode::shape, [&] { basis.encode(FramedKeys<KeyFrame::tile>{Matrix::Ones(3, 8), 0}); });
    refusal(ErrorCode::shape, [&] { basis.decode<KeyFrame::tile>(Matrix::Ones(3, 8), 0); });

    const auto fit = [](const LatentStatistics& of, const RopeSettings* rope, const BasisSettings& settings) {
        return [&of, rope, settings] { kvplane::fit_latent_basis(of, rope, settings); };
    };
    LatentStatistics no_queries(2, 4, 8), one_key(2, 4, 8);
    no_queries.add_keys({correlated(20, 16, random), 0});
    one_key.add_keys({rows.topRows(1), 0});
    one_key.add_queries(Matrix::Ones(2, 32));
    refusal(ErrorCode::shape, fit(one_key, nullptr, {}));
    refusal(ErrorCode::shape, fit(no_queries, nullptr, {}));
    kvplane::fit_latent_basis(no_queries, nullptr, {.query_weighted = false});
    refusal(ErrorCode::option, fit(statistics, nullptr, {.tile_tokens = 0}));
    refusal(ErrorCode::option, fit(statistics, nullptr, {.context = 0}));
    const RopeSettings too_wide{.dims = 10};
    refusal(ErrorCode::option, fit(statistics, &too_wide, {}));

    const auto build = [&](Index changed, auto&& change) {
        std::vector<LatentBasis::Subspace> subspaces = basis.subspaces();
        change(subspaces[static_cast<std::size_t>(changed)]);
        return [subspaces] { LatentBasis({}, 2, 4, 8, nullptr, subspaces); };
    };
    build(0, [](LatentBasis::Subspace&) {})();
    using Subspace = LatentBasis::Subspace;
    refusal(ErrorCode::shape, build(1, [](Subspace& s) { s.mean.conservativeResize(7); }));
    refusal(ErrorCode::shape, build(1, [](Subspace& s) { s.to_latents = Matrix::Ones(8, 7); }));
    refusal(ErrorCode::shape, build(1, [](Subspace& s) { s.rank = 9; }));
    refusal(ErrorCode::not_finite, build(0, [](Subspace& s) { s.from_latents(1, 1) = NAN; }));
    refusal(ErrorCode::option, build(0, [](Subspace& s) { s.spectrum.reverseInPlace(); }));
    refusal(ErrorCode::option, build(0, [](Subspace& s) { s.spectrum[7] = -1.0; }));
    refusal(ErrorCode::shape,
            [&] { LatentBasis({.heads_together = true}, 2, 4, 8, nullptr, basis.subspaces()); });
    refusal(ErrorCode::option, [&] { LatentBasis({}, 2, 3, 8, nullptr, basis.subspaces()); });
    refusal(ErrorCode::option, [&] { LatentBasis({}, 2, 4, 8, &too_wide, basis.subspaces()); });
}

// -- Drift ------------------------------------------------------------------------------------------------

TEST(LatentDrift, IsSmallOnTheSameAndLargeOnOtherKeys) {
    Random random(kvplane_test::seed());
    // Four strong directions in sixteen channels.
    Matrix mixing = 0.05f * normal_matrix(16, 16, random);
    mixing.topRows(4) = normal_matrix(4, 16, random);
    const Eigen::RowVectorXf mean = normal_matrix(1, 16, random).row(0);
    const auto same = [&](Index tokens) {
        return correlated(normal_matrix(tokens, 16, random), mixing, mean);
    };
    const Matrix keys = same(2000);
    for (const bool weighted : {false, true}) {
        const LatentBasis basis =
            kvplane::fit_latent_basis(statistics_of(keys, normal_matrix(500, 16, random), 1, 1), nullptr,
                                      {.frame = KeyFrame::before_rope, .query_weighted = weighted});
        const auto fitted = kvplane::latent_drift(basis, BeforeRope{keys, 0}, 4);
        const auto fresh = kvplane::latent_drift(basis, BeforeRope{same(2000), 0}, 4);
        const auto other = kvplane::latent_drift(basis, BeforeRope{correlated(2000, 16, random), 0}, 4);
        const Eigen::VectorXd& spectrum = basis.subspaces()[0].spectrum;
        const double share = theory::truncation_error(spectrum, 4) / spectrum.sum();
        EXPECT_NEAR(fitted.weighted_energy / share, 1.0, 1e-3);
        if (!weighted) {
            EXPECT_NEAR(fitted.energy / share, 1.0, 1e-3) << "C = I: both are the same";
        }
        EXPECT_NEAR(fresh.energy / fitted.energy, 1.0, 0.1);
        EXPECT_LT(fresh.energy, 0.02);
        EXPECT_GT(other.energy, 10.0 * fresh.energy);
        EXPECT_GT(other.weighted_energy, 10.0 * fresh.weighted_energy);
        const auto all = kvplane::latent_drift(basis, BeforeRope{keys, 0}, 16);
        EXPECT_LT(all.energy, 1e-9);
        EXPECT_EQ(all.weighted_energy, 0.0);
        const auto nothing = kvplane::latent_drift(basis, BeforeRope{keys, 0}, 0);
        EXPECT_NEAR(nothing.energy, 1.0, 1e-6);
        EXPECT_EQ(nothing.weighted_energy, 1.0);
    }
}

// -- T6b on a real model ----------------------------------------------------------------------------------

constexpr Index context = 256;
const RopeSettings model_rope{.base = 100000.0};

/// A shipped layer before RoPE, 9 query heads, and its statistics.
struct CalibratedLayer {
    int layer;
    Matrix keys_before_rope;     // 1024 tokens from position 0
    Matrix queries_before_rope;  // 64 tokens from position 960
    LatentStatistics statistics;
};
const std::vector<CalibratedLayer>& calibrated_layers() {
    static const std::vector<CalibratedLayer> layers = [] {
        std::vector<CalibratedLayer> made;
        const RotaryEmbedding rope(64, model_rope);
        for (const kvplane_test::RealLayer& real : kvplane_test::real_layers()) {
            Matrix queries = real.queries;
            rope.rotate_back(queries, 960);
            made.push_back({real.layer, real.keys_before_rope, queries,
                            statistics_of(real.keys_before_rope, queries, 3, 9)});
        }
        return made;
    }();
    return layers;
}

/// Latents in the grids of a schedule, 128 tokens each; what gets no bits is 0.
Matrix quantized(const Matrix& latents, const std::vector<kvplane::ChannelSegment>& segments) {
    Matrix close = Matrix::Zero(latents.rows(), latents.cols());
    Index at = 0;
    for (const kvplane::ChannelSegment& segment : segments) {
        if (segment.bits > 0)
            close.middleCols(at, segment.channels) =
                kvplane::per_channel(
                    latents.middleCols(at, segment.channels),
                    {.bits = segment.bits,
                     .scheme = segment.bits <= 2 ? kvplane::Scheme::cell : kvplane::Scheme::min_max})
                    .dequantize();
        at += segment.channels;
    }
    return close;
}

/// Queries of a key head as keys see them: each of the query heads that share it, at every distance.
Matrix seen_queries(const CalibratedLayer& real, Index head) {
    const RotaryEmbedding rope(64, model_rope);
    Matrix of_head(3 * 64, 64);
    for (Index h = 0; h < 3; ++h)
        of_head.middleRows(64 * h, 64) = real.queries_before_rope.middleCols(64 * (3 * head + h), 64);
    return at_every_turn(of_head, rope, context);
}

/// The mean over keys of the sum over the three query heads of the mean over queries of (u.(k - k'))^2.
double mean_squared_score_error(const Matrix& error, const Matrix& queries) {
    MatrixD moment = MatrixD::Zero(64, 64);
    for (Index at = 0; at < queries.rows(); at += 1024) {
        const MatrixD block =
            queries.middleRows(at, std::min<Index>(1024, queries.rows() - at)).cast<double>();
        moment += block.transpose() * block;
    }
    moment *= 3.0 / static_cast<double>(queries.rows());
    const MatrixD wide = error.cast<double>();
    return (wide * moment).cwiseProduct(wide).sum() / static_cast<double>(error.rows());
}

/// By the latents' own errors.
double predicted_error(const LatentBasis::Subspace& subspace, const Matrix& latents, const Matrix& close) {
    const Eigen::VectorXd errors = (latents - close).cast<double>().colwise().squaredNorm().transpose() /
                                   static_cast<double>(latents.rows());
    return theory::expected_score_error(subspace.spectrum, errors);
}

struct Outcome {
    double predicted, score_error, squared_error;  // per key
};
/// keys: of all heads, in the basis' frame.
Outcome outcome(const Matrix& keys, const LatentBasis& basis, Index head, const Matrix& queries) {
    const LatentBasis::Subspace& subspace = basis.subspaces()[static_cast<std::size_t>(head)];
    const auto schedule = kvplane::grouped_schedule(subspace.spectrum, std::array{8, 5, 4, 3, 2, 1, 1, 0});
    Matrix latents = encode_any(basis, keys);
    const Matrix of_head = latents.middleCols(64 * head, 64);
    const Matrix close = quantized(of_head, schedule.segments);
    latents.middleCols(64 * head, 64) = close;
    const Matrix error = (keys - decode_any(basis, latents)).middleCols(64 * head, 64);
    return {predicted_error(subspace, of_head, close), mean_squared_score_error(error, queries),
            error.cast<double>().squaredNorm() / static_cast<double>(error.rows())};
}

/// Score errors of queries of the moment C, independent of the keys' errors, are what the spectrum says; and
/// at one schedule the query-weighted basis beats the KLT, which beats the channels.
TEST(T6b, PredictsScoreErrorsOfARealModel) {
    for (const CalibratedLayer& real : calibrated_layers()) {
        const auto fit = [&](bool weighted, LatentDirections directions) {
            return kvplane::fit_latent_basis(real.statistics, &model_rope,
                                             {.frame = KeyFrame::before_rope,
                                              .query_weighted = weighted,
                                              .directions = directions,
                                              .context = context});
        };
        const LatentBasis weighted = fit(true, LatentDirections::eigenvectors);
        const LatentBasis klt = fit(false, LatentDirections::eigenvectors);
        const LatentBasis channels = fit(false, LatentDirections::channels);
        for (Index head = 0; head < 3; ++head) {
            SCOPED_TRACE(testing::Message() << "layer " << real.layer << ", head " << head);
            const Matrix queries = seen_queries(real, head);
            const Outcome by_queries = outcome(real.keys_before_rope, weighted, head, queries);
            const Outcome by_keys = outcome(real.keys_before_rope, klt, head, queries);
            const Outcome by_channel = outcome(real.keys_before_rope, channels, head, queries);
            EXPECT_NEAR(by_queries.predicted / by_queries.score_error, 1.0, 0.04);
            EXPECT_NEAR(by_keys.predicted / by_keys.squared_error, 1.0, 1e-3) << "C = I";
            EXPECT_NEAR(by_channel.predicted / by_channel.squared_error, 1.0, 1e-3) << "C = I";
            EXPECT_LT(by_queries.score_error, by_keys.score_error);
            EXPECT_LT(by_keys.squared_error, by_queries.squared_error);
            EXPECT_LT(by_keys.squared_error, by_channel.squared_error);
            EXPECT_LT(by_queries.score_error, by_channel.score_error);
            std::cout << "layer " << real.layer << ", head " << head << ": predicted / measured "
                      << by_queries.predicted / by_queries.score_error
                      << "; score error, weighted : KLT : channels 1 : "
                      << by_keys.score_error / by_queries.score_error << " : "
                      << by_channel.score_error / by_queries.score_error << "\n";
        }
    }
}

/// The same in the frame of a tile.
TEST(T6b, PredictsScoreErrorsInTheTileFrame) {
    const CalibratedLayer& real = calibrated_layers()[1];
    const RotaryEmbedding rope(64, model_rope);
    Matrix keys = real.keys_before_rope;
    for (Index at = 0; at < keys.rows(); at += 128) {
        auto tile = keys.middleRows(at, 128);
        rope.rotate(tile, 0);
    }
    const LatentBasis basis = kvplane::fit_latent_basis(real.statistics, &model_rope,
                                                        {.frame = KeyFrame::tile, .context = context});
    for (Index head = 0; head < 3; ++head) {
        const Outcome measured = outcome(keys, basis, head, seen_queries(real, head));
        EXPECT_NEAR(measured.predicted / measured.score_error, 1.0, 0.04) << "head " << head;
    }
}

}  // namespace
