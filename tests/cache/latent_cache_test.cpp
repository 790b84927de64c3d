// Caches with keys in latents: bases given and fitted, what is refused, what is counted, keys left out.
#include <gtest/gtest.h>

#include "cache_support.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/recipes.hpp"
#include "kvplane/theory/bounds.hpp"
#include "latent_sequence.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

CacheConfiguration given(const std::string& recipe) {
    CacheConfiguration c = configuration(recipe);
    c.latent_keys = fit_latent_keys(statistics(c, Sequence(c, 1500, 77)), c.rope, *c.recipe.latents);
    return c;
}

MatrixD exact(const CacheConfiguration& c, const Matrix& keys, const Matrix& values, const Matrix& queries) {
    return reference_attention(keys, values, queries, c.query_heads, c.kv_heads);
}

double error(const Matrix& output, const MatrixD& exact) {
    return (output.cast<double>() - exact).norm() / exact.norm();
}

class LatentCache : public testing::TestWithParam<std::string> {
  protected:
    TilePool pool_;
};

TEST_P(LatentCache, GivenBasisServesNewTokensAndAttentionIsThatOfWhatIsStored) {
    const CacheConfiguration c = given(GetParam());
    const Sequence s(c, 700, seed());
    KvCache cache(c, pool_);
    cache.append(s.keys, s.values);  // no queries needed
    const Matrix q = s.queries.bottomRows(9);
    AttentionParameters decoding;
    decoding.decode_tiles = true;
    const Matrix output = attend(cache, q, decoding);
    for (const Index tokens : {3, 9}) {
        const Matrix fused = attend(cache, q.bottomRows(tokens));
        EXPECT_LT((fused - output.bottomRows(tokens)).norm() / std::sqrt(static_cast<float>(fused.size())),
                  0.03f);
    }
    EXPECT_LT((output.cast<double>() - exact(c, cache.stored_keys(0, 700), cache.stored_values(0, 700), q))
                  .cwiseAbs()
                  .maxCoeff(),
              3e-5);
    EXPECT_LT(error(output, exact(c, s.keys, s.values, q)), 0.25);
    EXPECT_GT((cache.stored_keys(4, 128) - s.keys.middleRows(4, 128)).norm(), 0.0f)
        << "nothing was quantized";
    // The bound holds, and is the error of some tile.
    const double off = (cache.stored_keys(0, 700) - s.keys).rowwise().norm().maxCoeff();
    EXPECT_LE(off, cache.error_bound().key * std::sqrt(2.0 * static_cast<double>(c.key_head_dim)) + 1e-3);
    EXPECT_EQ(cache.bytes(), KvCache::predicted_bytes(c, 700));
}

TEST_P(LatentCache, FitsItsOwnBasisWhenTheTokensAreThere) {
    CacheConfiguration c = configuration(GetParam() + "+fit_tokens=300");
    const Sequence s(c, 700, seed());
    KvCache cache(c, pool_);
    const bool wants = c.recipe.latents->basis.query_weighted;
    EXPECT_EQ(cache.needs_queries(), wants);
    if (wants) {
        EXPECT_NE(refusal(ErrorCode::option, [&] { cache.append(s.keys, s.values); }).find("queries"),
                  std::string::npos);
        refusal(ErrorCode::shape, [&] { cache.append(s.keys, s.values, s.queries.topRows(3)); });
        cache.append(Matrix(0, s.keys.cols()), Matrix(0, s.values.cols()), Matrix(0, s.queries.cols()));
    }
    refusal(ErrorCode::option, [&] { KvCache::predicted_bytes(c, 100); });
    const Index due = 4 + 300 + c.recipe.recent_tokens;
    const auto append = [&](Index first, Index count) {
        cache.append(s.keys.middleRows(first, count), s.values.middleRows(first, count),
                     s.queries.middleRows(first, count));
    };
    append(0, due - 1);
    EXPECT_EQ(cache.packed_tokens(), 0);
    EXPECT_EQ(cache.latent_keys(), nullptr);
    // All tokens wait unquantized, and what was seen of queries is counted.
    const Index pages = (due - 1 - 4 + 31) / 32, dim = c.key_head_dim;
    const Index page = 32 * c.kv_heads * (dim + c.value_head_dim) * 2 + 64;
    EXPECT_EQ(cache.bytes(), page / 32 / 2 * 0 + pages * page +
                                 4 * c.kv_heads * (dim + c.value_head_dim) * 2 + 64 +
                                 (wants ? c.kv_heads * 8 * (1 + dim + dim * dim) : 0));
    append(due - 1, 1);
    EXPECT_EQ(cache.packed_tokens(), 2 * 128);
    ASSERT_NE(cache.latent_keys(), nullptr);
    EXPECT_FALSE(cache.needs_queries());
    cache.append(s.keys.bottomRows(700 - due), s.values.bottomRows(700 - due));
    EXPECT_LT(
        error(attend(cache, s.queries.bottomRows(2)), exact(c, s.keys, s.values, s.queries.bottomRows(2))),
        0.5);
    refusal(ErrorCode::option, [&] { cache.fit_basis(); });
    // Its own basis is counted: a cache that was given the same one takes so much less.
    CacheConfiguration shared = c;
    shared.recipe.latents->basis.heads_together = shared.recipe.latents->own_heads_together;
    shared.latent_keys = std::make_shared<const LatentKeys>(*cache.latent_keys());
    EXPECT_EQ(cache.bytes(), KvCache::predicted_bytes(shared, 700) + cache.latent_keys()->bytes());
    cache.clear();
    EXPECT_EQ(cache.latent_keys(), nullptr);
    EXPECT_EQ(cache.bytes(), 0);
}

TEST_P(LatentCache, FitsByRequest) {
    CacheConfiguration c = configuration(GetParam() + "+fit_tokens=100000");
    const Sequence s(c, 500, seed());
    KvCache cache(c, pool_);
    refusal(ErrorCode::shape, [&] { cache.fit_basis(); });
    cache.append(s.keys, s.values, s.queries);
    EXPECT_EQ(cache.packed_tokens(), 0);
    const KvCache before = cache.fork();
    cache.fit_basis();
    EXPECT_EQ(cache.packed_tokens(), (500 - 4 - c.recipe.recent_tokens) / 128 * 128);
    EXPECT_LT(cache.bytes(), before.bytes());
    EXPECT_EQ(before.packed_tokens(), 0);
    EXPECT_LT(
        error(attend(cache, s.queries.bottomRows(2)), exact(c, s.keys, s.values, s.queries.bottomRows(2))),
        0.6);
}

TEST_P(LatentCache, SavedWhileItWaitsItGoesOnTheSame) {
    const CacheConfiguration c = configuration(GetParam() + "+fit_tokens=200");
    const Sequence s(c, 600, seed());
    for (const Index saved : {100, 150, 400}) {
        KvCache cache(c, pool_);
        cache.append(s.keys.topRows(saved), s.values.topRows(saved), s.queries.topRows(saved));
        KvCache loaded = load_cache(to_bytes(cache), c, pool_);
        EXPECT_EQ(loaded.bytes(), cache.bytes());
        for (KvCache* one : {&cache, &loaded})
            one->append(s.keys.bottomRows(600 - saved), s.values.bottomRows(600 - saved),
                        s.queries.bottomRows(600 - saved));
        EXPECT_EQ(to_bytes(loaded), to_bytes(cache)) << saved;
    }
}

TEST_P(LatentCache, DegenerateKeysAreTaken) {
    CacheConfiguration c = configuration(GetParam() + "+fit_tokens=200");
    const Sequence s(c, 500, seed());
    Matrix flat = s.keys_before.leftCols(2) * Matrix::Ones(2, s.keys.cols());  // one direction
    RotaryEmbedding(c.key_head_dim, *c.rope).rotate(flat, 0);
    KvCache cache(c, pool_);
    cache.append(flat, s.values, s.queries);
    EXPECT_GT(cache.packed_tokens(), 0);
    EXPECT_TRUE(attend(cache, s.queries.bottomRows(1)).allFinite());
    KvCache constant(c, pool_);
    constant.append(Matrix::Zero(500, s.keys.cols()), s.values, s.queries);
    EXPECT_TRUE(attend(constant, s.queries.bottomRows(1)).allFinite());
    EXPECT_LT(constant.stored_keys(0, 500).cwiseAbs().maxCoeff(), 1e-5f);
}

INSTANTIATE_TEST_SUITE_P(Recipes, LatentCache,
                         testing::Values("svdq:2", "svdq:8-8-8-4:4", "latent:4:4",
                                         "latent:4:16+heads_together=1", "latent:4:4+frame=before_rope",
                                         "latent:4:16+frame=after_rope", "weighted:5:8"),
                         test_name);

// -- Refusals ----------------------------------------------------------------------------------------------

TEST(LatentConfiguration, RefusesABasisOfAnotherModelOrRecipe) {
    TilePool pool;
    const CacheConfiguration good = given("latent:3:3");
    KvCache(good, pool);
    const auto refused = [&](auto change) {
        CacheConfiguration c = good;
        change(c);
        return refusal(ErrorCode::mismatch, [&] { KvCache(c, pool); });
    };
    EXPECT_NE(refused([](auto& c) { c.key_head_dim = 64; }).find("expected 4 over 2 of 64"),
              std::string::npos);
    refused([](auto& c) { c.kv_heads = 4; });
    refused([](auto& c) { c.query_heads = 8; });
    EXPECT_NE(refused([](auto& c) { c.rope->base = 500.0; }).find("rotary"), std::string::npos);
    refused([](auto& c) { c.rope->layout = RopeLayout::halves; });
    refused([](auto& c) { c.rope.reset(); });
    EXPECT_NE(refused([](auto& c) { c.recipe.latents->basis.frame = KeyFrame::before_rope; }).find("frame"),
              std::string::npos);
    refused([](auto& c) { c.recipe = recipes::parse("latent:3:3+heads_together=0"); });
    refused([](auto& c) { c.recipe = recipes::parse("latent:3:3+query_weighted=0"); });
    refused([](auto& c) { c.recipe = recipes::parse("weighted:3:3+frame=tile+heads_together=1"); });
    EXPECT_NE(refused([](auto& c) { c.recipe = recipes::standard(); }).find("channels"), std::string::npos);
}

TEST(LatentConfiguration, RefusesSettingsThatCannotBe) {
    TilePool pool;
    const auto refused = [&](ErrorCode code, const std::string& recipe, auto change) {
        CacheConfiguration c = configuration(recipe);
        change(c);
        return refusal(code, [&] { KvCache(c, pool); });
    };
    refused(ErrorCode::option, "latent:3:3", [](auto& c) { c.recipe.latents->bits = 9.0; });
    refused(ErrorCode::option, "latent:3:3", [](auto& c) { c.recipe.latents->fit_tokens = 1; });
    refused(ErrorCode::option, "latent:3:3", [](auto& c) { c.recipe.latents->basis.tile_tokens = 64; });
    refused(ErrorCode::option, "latent:3:3", [](auto& c) {
        c.recipe.every_token = true;
        c.recipe.sink_tokens = c.recipe.recent_tokens = 0;
    });
    refused(ErrorCode::option, "latent:3:3", [](auto& c) { c.rope->dims = 7; });
    EXPECT_NE(refused(ErrorCode::shape, "svdq:8-4-2-1-0", [](auto&) {}).find("do not divide into 5"),
              std::string::npos);
    refused(ErrorCode::option, "svdq:2", [](auto& c) { c.recipe.latents->groups = {2, 4, 0, 0}; });
    for (const char* recipe :
         {"latent:9:3", "latent:x:3", "latent:3", "svdq:1-2", "svdq:3", "svdq", "weighted:3",
          "latent:3:3+frame=before", "latent:3:3+context=0", "standard+frame=tile"})
        refusal(ErrorCode::option, [&] { recipes::parse(recipe); });
}

TEST(LatentConfiguration, RefusesMoreLatentsThanTheKeysDetermine) {
    const CacheConfiguration c = configuration("svdq:8-8-8-8");
    const Sequence s(c, 20, seed());
    LatentStatistics few = statistics(c, s);
    EXPECT_NE(refusal(ErrorCode::shape, [&] { fit_latent_keys(few, c.rope, *c.recipe.latents); })
                  .find("determine only 19"),
              std::string::npos);
    const LatentStatistics none(c.kv_heads, c.query_heads, c.key_head_dim);
    refusal(ErrorCode::shape, [&] { fit_latent_keys(none, c.rope, *c.recipe.latents); });
    TilePool pool;
    KvCache cache(c, pool);
    cache.append(s.keys, s.values);
    refusal(ErrorCode::shape, [&] { cache.fit_basis(); });
    EXPECT_EQ(cache.tokens(), 20);
    EXPECT_EQ(cache.latent_keys(), nullptr);
}

// -- What is counted ---------------------------------------------------------------------------------------

/// T10: b + 16 r / S + (r / d) (32 / g), and a mean and two scales a latent.
TEST(LatentBytes, AreTheTrueRate) {
    CacheConfiguration c = configuration("svdq:4-4-2-0:16+sinks=0+recent=0+fit_tokens=1024", 2, 4, 64, 64);
    const Index tokens = 1024, d = 128, kept = 96;
    const Sequence s(c, tokens, seed());
    TilePool pool;
    KvCache cache(c, pool);
    cache.append(s.keys, s.values);
    const double values = 2.0 * static_cast<double>(tokens * d), headers = 8.0 * 64.0;
    const double extra = 4.0 * d + 8.0 * kept;
    const double rate =
        theory::latent_true_rate(2.5, kept, d, tokens, 128) / 8.0 * static_cast<double>(tokens * d);
    EXPECT_DOUBLE_EQ(static_cast<double>(cache.bytes()), values + headers + extra + rate);
}

// -- Keys left out -----------------------------------------------------------------------------------------

TEST(KeyFraction, ChoosesByTheLeadingLatentsAndKeepsSinksAndRecentTokens) {
    TilePool pool;
    for (const char* recipe : {"svdq:8-8-4-0", "latent:6:16", "latent:6:16+frame=before_rope"}) {
        const CacheConfiguration c = given(recipe);
        const Sequence s(c, 1200, seed());
        KvCache cache(c, pool);
        cache.append(s.keys, s.values);
        // So many that attention goes by blocks with and without a choice.
        constexpr Index tokens = 10;
        const Matrix q = s.queries.bottomRows(tokens);
        AttentionParameters all, some;
        all.key_fraction = 1.0;
        EXPECT_EQ(attend(cache, q, all), attend(cache, q));
        some.key_fraction = 1.0 / 8.0;
        const auto chosen = cache.selected_keys(q, some);
        ASSERT_EQ(static_cast<Index>(chosen.size()), 4 * tokens);
        // As attention over exactly those tokens, the sinks and the recent ones.
        Matrix bias = Matrix::Zero(4 * tokens, 1200);
        bias.middleCols(4, cache.packed_tokens()).setConstant(-std::numeric_limits<float>::infinity());
        double hits = 0.0, count = 0.0;
        for (std::size_t r = 0; r < chosen.size(); ++r) {
            EXPECT_EQ(static_cast<Index>(chosen[r].size()), (cache.packed_tokens() + 7) / 8);
            for (const Index t : chosen[r]) bias(static_cast<Index>(r), t) = 0.0f;
            // Most of them are the true best.
            const Index head = static_cast<Index>(r) / tokens, kv = head / c.group(), dim = c.key_head_dim;
            const Eigen::VectorXf scores =
                s.keys.block(4, kv * dim, cache.packed_tokens(), dim) *
                q.row(static_cast<Index>(r) % tokens).segment(head * dim, dim).transpose();
            std::vector<float> sorted(scores.begin(), scores.end());
            std::sort(sorted.begin(), sorted.end(), std::greater<>());
            for (const Index t : chosen[r]) hits += scores[t - 4] >= sorted[chosen[r].size() - 1];
            count += static_cast<double>(chosen[r].size());
        }
        EXPECT_GT(hits / count, 0.5) << recipe;
        AttentionParameters masked;
        masked.bias = &bias;
        masked.decode_tiles = true;
        EXPECT_LT((attend(cache, q, some) - attend(cache, q, masked)).cwiseAbs().maxCoeff(), 2e-5f);
    }
}

TEST(KeyFraction, IsRefusedWhereThereIsNothingToChooseBy) {
    TilePool pool;
    const CacheConfiguration c = configuration("standard");
    KvCache cache(c, pool);
    cache.append(Matrix::Ones(10, 64), Matrix::Ones(10, 96));
    AttentionParameters parameters;
    parameters.key_fraction = 0.5;
    EXPECT_NE(
        refusal(ErrorCode::option, [&] { attend(cache, Matrix::Ones(1, 128), parameters); }).find("latents"),
        std::string::npos);
    KvCache latents(given("latent:3:3"), pool);
    latents.append(Matrix::Ones(10, 64), Matrix::Ones(10, 96));
    for (const double fraction : {0.0, -1.0, 1.5, std::nan("")}) {
        parameters.key_fraction = fraction;
        refusal(ErrorCode::option, [&] { attend(latents, Matrix::Ones(1, 128), parameters); });
    }
}

}  // namespace
