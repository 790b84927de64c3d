// Shaped keys in a cache: what they are shaped for, that scores err less, and what is refused. The encoder
// itself: quantize/shaped_test.cpp.
#include "kvplane/cache/key_shaping.hpp"

#include <algorithm>
#include <cmath>

#include "cache/cache_support.hpp"
#include "kvplane/cache/appender.hpp"
#include "kvplane/cache/capabilities.hpp"
#include "kvplane/cache/reader.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;
using kvplane::detail::KeyShaping;

/// Queries before RoPE that look along few directions, and keys of the same width.
struct QueriedTokens {
    explicit QueriedTokens(const CacheConfiguration& c, Index count)
        : queries(count, c.query_heads * c.key_head_dim),
          keys(normal_matrix(random, count, c.kv_heads * c.key_head_dim)),
          values(normal_matrix(random, count, c.kv_heads * c.value_head_dim)) {
        Matrix spread = normal_matrix(random, c.key_head_dim, c.key_head_dim);
        for (Index j = 0; j < spread.rows(); ++j)
            spread.row(j) *= std::exp(-4.0f * static_cast<float>(j) / static_cast<float>(spread.rows()));
        for (Index head = 0; head < c.query_heads; ++head)
            queries.middleCols(head * c.key_head_dim, c.key_head_dim) =
                normal_matrix(random, count, c.key_head_dim) * spread;
    }
    std::vector<SecondMoments> moments(const CacheConfiguration& c) const {
        std::vector<SecondMoments> heads(static_cast<std::size_t>(c.kv_heads), SecondMoments(c.key_head_dim));
        for (Index head = 0; head < c.query_heads; ++head)
            heads[static_cast<std::size_t>(head / c.group())].add(
                queries.middleCols(head * c.key_head_dim, c.key_head_dim));
        return heads;
    }
    Matrix after_rope(const CacheConfiguration& c) const {
        Matrix turned = queries;
        RotaryEmbedding(c.key_head_dim, *c.rope).rotate(turned, 0);
        return turned;
    }

    std::mt19937_64 random{seed()};
    Matrix queries, keys, values;
};

/// The weight of a tile is the average of R u u^T R^T over all distances, rotated as keys are.
TEST(KeyShaping, IsTheAverageOverDistances) {
    for (const bool rotate : {false, true}) {
        CacheConfiguration c = configuration("key_favored:3:3+shaped_keys=1+recent=20", 1, 2, 16, 16);
        c.recipe.keys.rotate = rotate;
        c.context = 400;
        const QueriedTokens tokens(c, 200);
        const KeyShaping shaping(c, tokens.moments(c));
        const Hadamard rotation(16, 0);
        const RotaryEmbedding rope(16, *c.rope);
        constexpr Index position = 1000;
        MatrixD expected = MatrixD::Zero(16, 16);
        for (Index distance = tile_tokens + 20; distance < 400; ++distance) {
            Matrix turned(2 * tokens.queries.rows(), 16);
            turned << tokens.queries.leftCols(16), tokens.queries.rightCols(16);
            rope.turn(turned, position + distance);
            if (rotate) rotation.rotate(turned);
            expected += (turned.transpose() * turned).cast<double>();
        }
        Matrix weight, room;
        shaping.weigh(detail::KeyShaping::frame(rope, position), rotate ? &rotation : nullptr, 0, weight,
                      room);
        const MatrixD found = weight.cast<double>();
        EXPECT_EQ(found, MatrixD(found.transpose()));
        const double scale = expected.trace() / found.trace();
        EXPECT_LT((scale * found - expected).norm(), 2e-3 * expected.norm());
    }
}

/// Squared errors of the scores of the last `count` queries with all packed keys.
double score_error(const CacheConfiguration& c, const QueriedTokens& tokens, Index count) {
    TilePool pool;
    KvCache cache(c, pool);
    const Matrix queries = tokens.after_rope(c);
    if (c.recipe.shaped_keys)
        cache.append(tokens.keys, tokens.values, queries);
    else
        cache.append(tokens.keys, tokens.values);
    const Index dim = c.key_head_dim, first = c.recipe.sink_tokens, packed = cache.packed_tokens();
    const Matrix off = cache.stored_keys(first, packed) - tokens.keys.middleRows(first, packed);
    double error = 0.0;
    for (Index head = 0; head < c.query_heads; ++head)
        error += (off.middleCols(head / c.group() * dim, dim) *
                  queries.middleCols(head * dim, dim).bottomRows(count).transpose())
                     .cast<double>()
                     .squaredNorm();
    return error;
}

/// Scores of later queries err less than half as much, by a cache's own queries and by given moments.
TEST(KeyShaping, MakesScoresErrLess) {
    for (const char* recipe :
         {"key_favored:3:4", "key_favored:2:4+rotate_keys=1", "key_favored:4:4+key_group=32"}) {
        CacheConfiguration c = configuration(recipe, 2, 4, 32, 32);
        // All pairs but two turn slowly. Where pairs turn often, averages over distances know no directions.
        c.rope->base = 1e12;
        c.context = 1024;
        const QueriedTokens tokens(c, 1200);
        const double plain = score_error(c, tokens, 300);
        c.recipe.shaped_keys = true;
        EXPECT_LT(score_error(c, tokens, 300), 0.5 * plain) << recipe;
        c.query_moments = std::make_shared<const std::vector<SecondMoments>>(tokens.moments(c));
        EXPECT_LT(score_error(c, tokens, 300), 0.5 * plain) << recipe;
    }
}

/// A cache's shape and state, with all of the tokens appended.
struct Appended {
    Appended(const CacheConfiguration& c, const QueriedTokens& tokens)
        : shape(c), state(shape.empty_state()) {
        const Matrix queries = tokens.after_rope(c);
        const detail::AnyRows values(head_rows(tokens.values, c.kv_heads)),
            looking(head_rows(queries, c.query_heads));
        SerialExecutor executor;
        detail::append_tokens(shape, state, pool, head_rows(tokens.keys, c.kv_heads), &values, &looking,
                              false, executor);
    }
    Matrix stored_keys(Index head) const {
        const Index dim = shape.dim(TileSide::keys);
        return detail::stored_rows(shape, state, TileSide::keys, 4, state.packed())
            .middleCols(head * dim, dim);
    }

    TilePool pool;
    detail::CacheShape shape;
    detail::CacheState state;
};

/// Keys of few large numbers are rotated, whose ranges shrink by that; keys of two numbers are not. What is
/// stored is what it is where all tiles of a head are rotated, or none.
TEST(KeyShaping, RotatesTheTilesThatGain) {
    CacheConfiguration c = configuration("key_favored:3:4+shaped_keys=1+rotate_keys=by_tile", 2, 4, 32, 32);
    QueriedTokens tokens(c, 800);
    tokens.queries = normal_matrix(tokens.random, 800, c.query_heads * 32);
    tokens.keys.leftCols(32) = tokens.keys.leftCols(32).array().cube().matrix().eval();
    tokens.keys.rightCols(32) = tokens.keys.rightCols(32).array().sign().matrix().eval();
    const Appended by_tile(c, tokens);
    ASSERT_EQ(by_tile.state.tiles.size(), 5u);
    for (const TilePlace& tile : by_tile.state.tiles) {
        EXPECT_TRUE(tile.layout->rotated(tile.page, 0)) << tile.first;
        EXPECT_FALSE(tile.layout->rotated(tile.page, 1)) << tile.first;
    }
    c.recipe.rotates_by_tile = false;
    EXPECT_EQ(by_tile.stored_keys(1), Appended(c, tokens).stored_keys(1));
    // Keys wait as they are, or rotated, and are rounded to fp16 so.
    c.recipe.keys.rotate = true;
    const auto error = [&](const Appended& all) {
        return (all.stored_keys(0) - tokens.keys.block(4, 0, 640, 32)).norm();
    };
    const Appended rotated(c, tokens);
    EXPECT_NEAR(error(by_tile), error(rotated), 0.02 * error(rotated));
}

/// A cache learns from 512 tokens behind its sinks; the bytes that this takes are counted and predicted.
TEST(KeyShaping, LearnsFromTheFirstTokens) {
    const CacheConfiguration c = configuration("key_favored:4:2+shaped_keys=1");
    const QueriedTokens tokens(c, 700);
    const Matrix queries = tokens.after_rope(c);
    TilePool pool;
    KvCache cache(c, pool);
    for (Index t = 0; t < 700; t += 20) {
        EXPECT_EQ(cache.needs_queries(), t < 516) << t;
        EXPECT_EQ(cache.bytes(), KvCache::predicted_bytes(c, t)) << t;
        if (cache.needs_queries())
            cache.append(tokens.keys.middleRows(t, 20), tokens.values.middleRows(t, 20),
                         queries.middleRows(t, 20));
        else
            cache.append(tokens.keys.middleRows(t, 20), tokens.values.middleRows(t, 20));
    }
    EXPECT_LE((cache.stored_keys(0, 700) - tokens.keys).cwiseAbs().maxCoeff(), cache.error_bound().key);
    KvCache none(c, pool);
    EXPECT_NE(
        refusal(ErrorCode::option, [&] { none.append(tokens.keys, tokens.values); }).find("own queries"),
        std::string::npos);
    EXPECT_EQ(none.tokens(), 0);
}

/// Given moments need no queries, and are not the cache's own bytes.
TEST(KeyShaping, TakesGivenMoments) {
    CacheConfiguration c = configuration("key_favored:4:2+shaped_keys=1");
    const QueriedTokens tokens(c, 300);
    c.query_moments = std::make_shared<const std::vector<SecondMoments>>(tokens.moments(c));
    TilePool pool;
    KvCache cache(c, pool);
    EXPECT_FALSE(cache.needs_queries());
    EXPECT_FALSE(capabilities(c).wants_queries);
    cache.append(tokens.keys, tokens.values);
    EXPECT_EQ(cache.bytes(), KvCache::predicted_bytes(c, 300));
    CacheConfiguration plain = c;
    plain.recipe.shaped_keys = false;
    plain.query_moments = nullptr;
    EXPECT_EQ(cache.bytes(), KvCache::predicted_bytes(plain, 300));
}

TEST(KeyShaping, RefusesWhatCannotBeShaped) {
    const auto refused = [](ErrorCode code, const char* recipe, auto change) {
        CacheConfiguration c = configuration(recipe);
        change(c);
        TilePool pool;
        return refusal(code, [&] { KvCache(c, pool); });
    };
    const auto shaped = [](CacheConfiguration& c) { c.recipe.shaped_keys = true; };
    for (const char* recipe : {"fp16", "block32:4", "latent:3:3", "key_favored:4:4+key_clip=1",
                               "key_favored:16:4", "key_favored:4:4+key_scheme=full_range"})
        EXPECT_NE(refused(ErrorCode::option, recipe, shaped).find("shapes keys"), std::string::npos)
            << recipe;
    const auto moments = [](Index heads, Index channels) {
        return std::make_shared<const std::vector<SecondMoments>>(static_cast<std::size_t>(heads),
                                                                  SecondMoments(channels));
    };
    for (const char* recipe : {"standard", "latent:3:3", "key_favored:4:4+shaped_keys=1+rotate_keys=1"})
        EXPECT_NE(refused(ErrorCode::option, recipe, [](auto& c) { c.recipe.rotates_by_tile = true; })
                      .find("tile by tile"),
                  std::string::npos)
            << recipe;
    const char* const recipe = "key_favored:4:4+shaped_keys=1";
    EXPECT_NE(refused(ErrorCode::mismatch, recipe, [&](auto& c) { c.query_moments = moments(1, 32); })
                  .find("moments of the queries of 1 key heads"),
              std::string::npos);
    refused(ErrorCode::mismatch, recipe, [&](auto& c) { c.query_moments = moments(2, 31); });
    refused(ErrorCode::mismatch, "key_favored:4:4", [&](auto& c) { c.query_moments = moments(2, 32); });
    refused(ErrorCode::option, recipe, [&](auto& c) { c.context = 0; });
}

}  // namespace
