// Rows that are key and value at once (MLA): stored once, attended as if they were two.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cache/cache_support.hpp"
#include "kvplane/cache/capabilities.hpp"
#include "kvplane/io/cache_file.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane_test;

CacheConfiguration rows_of(const std::string& recipe, Index kv_heads, Index query_heads, Index key_dim,
                           Index value_dim) {
    CacheConfiguration c = configuration(recipe, kv_heads, query_heads, key_dim, value_dim);
    c.values_in_keys = true;
    // The channels behind the value turn.
    c.rope = RopeSettings{.frequencies = std::vector<double>(static_cast<std::size_t>(key_dim / 2), 0.0)};
    for (Index pair = value_dim / 2; pair < key_dim / 2; ++pair)
        c.rope->frequencies[static_cast<std::size_t>(pair)] =
            std::pow(10000.0, -2.0 * static_cast<double>(pair - value_dim / 2) /
                                  static_cast<double>(key_dim - value_dim));
    return c;
}
/// The first channels of every head.
Matrix values_of(const CacheConfiguration& c, const Matrix& keys) {
    Matrix values(keys.rows(), c.kv_heads * c.value_head_dim);
    for (Index head = 0; head < c.kv_heads; ++head)
        values.middleCols(head * c.value_head_dim, c.value_head_dim) =
            keys.middleCols(head * c.key_head_dim, c.value_head_dim);
    return values;
}
void expect_attention_of_rows(const KvCache& cache, std::mt19937_64& random) {
    const CacheConfiguration& c = cache.configuration();
    const Matrix keys = cache.stored_keys(0, cache.tokens()), values = values_of(c, keys);
    EXPECT_LT((cache.stored_values(0, cache.tokens()) - values).cwiseAbs().maxCoeff(), 1e-5);
    for (const Index query_tokens : {1, 3, 11}) {
        const Matrix queries = normal_matrix(random, query_tokens, c.query_heads * c.key_head_dim);
        const MatrixD expected = reference_attention(keys, values, queries, c.query_heads, c.kv_heads);
        for (const bool decoded : {false, true}) {
            AttentionParameters parameters;
            parameters.decode_tiles = decoded;
            EXPECT_LT((attend(cache, queries, parameters).cast<double>() - expected).cwiseAbs().maxCoeff(),
                      decoded ? 3e-5 : 0.02 * values.cwiseAbs().maxCoeff())
                << query_tokens << " query tokens, decoded " << decoded;
        }
    }
}

class RowsOfRecipe : public testing::TestWithParam<std::string> {};

TEST_P(RowsOfRecipe, LiveAsThoseOfTwoSides) {
    std::mt19937_64 random(seed());
    for (const auto& [kv_heads, query_heads, key_dim, value_dim] :
         {std::array<Index, 4>{1, 16, 80, 64}, {2, 4, 48, 32}, {1, 2, 64, 64}, {1, 40, 72, 64}}) {
        SCOPED_TRACE(std::to_string(key_dim) + " channels, " + std::to_string(value_dim) + " of values");
        const CacheConfiguration c = rows_of(GetParam(), kv_heads, query_heads, key_dim, value_dim);
        TilePool pool;
        KvCache cache(c, pool);
        Matrix keys = normal_matrix(random, 500, kv_heads * key_dim);
        cache.append(keys);
        EXPECT_EQ(cache.bytes(), KvCache::predicted_bytes(c, 500));
        EXPECT_EQ(cache.bytes(), pool.bytes());
        expect_attention_of_rows(cache, random);
        const CacheErrorBound bound = cache.error_bound();
        EXPECT_EQ(bound.key, bound.value);
        if (!c.recipe.keys.rotate) {
            EXPECT_LE((cache.stored_keys(0, 500) - keys).cwiseAbs().maxCoeff(), bound.key);
        }
        // Saved, read, drafted, cut, shifted.
        const std::vector<std::byte> file = to_bytes(cache);
        EXPECT_EQ(to_bytes(load_cache(file, c, pool)), file);
        cache.append_provisional(normal_matrix(random, 5, keys.cols()));
        cache.truncate(500);
        EXPECT_EQ(to_bytes(cache), file);
        KvCache fork = cache.fork();
        fork.truncate(430);
        fork.append(normal_matrix(random, 100, keys.cols()));
        expect_attention_of_rows(fork, random);
        fork.remove(100, 200);
        expect_attention_of_rows(fork, random);
        EXPECT_EQ(to_bytes(cache), file);
    }
}

TEST_P(RowsOfRecipe, TakeLittleMoreThanHalf) {
    std::mt19937_64 random(seed());
    const CacheConfiguration once = rows_of(GetParam(), 1, 8, 576, 512);
    CacheConfiguration twice = once;
    twice.values_in_keys = false;
    // Most bits of the two sides are as many.
    twice.recipe.values.bits = twice.recipe.keys.bits;
    twice.recipe.values.rule.scheme = scheme_for(twice.recipe.keys.bits);
    twice.recipe.recent_bits = once.recipe.recent_bits_of(TileSide::keys);
    const double share = static_cast<double>(KvCache::predicted_bytes(once, 4096)) /
                         static_cast<double>(KvCache::predicted_bytes(twice, 4096));
    const double bits = once.recipe.keys.bits,
                 rotary = once.recipe.rotary_bits > 0 ? once.recipe.rotary_bits : bits;
    EXPECT_LT(share, (512.0 * bits + 64.0 * rotary) / (1088.0 * bits) + 0.02);
}

INSTANTIATE_TEST_SUITE_P(Recipes, RowsOfRecipe,
                         testing::Values("fp16", "block32:8", "key_favored:4:4+rotary_bits=16",
                                         "key_favored:8:8+rotary_bits=4+recent=0+sinks=0", "standard",
                                         "kivi:4:32", "compact+rotary_bits=8"),
                         test_name);

/// The shape of DeepSeek's attention: 128 query heads over one row of 512 + 64.
TEST(ValuesInKeys, OfOneHundredAndTwentyEightHeads) {
    std::mt19937_64 random(seed());
    const CacheConfiguration c = rows_of("standard+rotary_bits=16", 1, 128, 576, 512);
    TilePool pool;
    KvCache cache(c, pool);
    cache.append(normal_matrix(random, 700, 576));
    expect_attention_of_rows(cache, random);
    EXPECT_TRUE(capabilities(c).decodes_packed);
    EXPECT_FALSE(capabilities(c).reads_by_bits);
}

TEST(ValuesInKeys, NarrowWithTheRotaryPartInHalf) {
    std::mt19937_64 random(seed());
    const CacheConfiguration c = rows_of("key_favored:8:8+rotary_bits=16", 1, 16, 80, 64);
    TilePool pool;
    KvCache cache(c, pool);
    const Matrix keys = normal_matrix(random, 600, 80);
    cache.append(keys);
    const Index predicted = cache.narrowed_bytes(0, 600, 4, 4), before = cache.bytes();
    cache.narrow(0, 600, 4, 4);
    EXPECT_EQ(cache.bytes(), predicted);
    EXPECT_LT(predicted, before);
    expect_attention_of_rows(cache, random);
    EXPECT_LE((cache.stored_keys(0, 600) - keys).cwiseAbs().maxCoeff(), cache.error_bound().key);
    EXPECT_LT((cache.stored_keys(0, 600) - keys).rightCols(16).cwiseAbs().maxCoeff(), 2.1e-3)
        << "fp16 changed";
}

TEST(ValuesInKeys, RefuseWhatDoesNotFit) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache(rows_of("standard", 1, 4, 80, 64), pool);
    const Matrix keys = normal_matrix(random, 3, 80), values = keys.leftCols(64);
    refusal(ErrorCode::option, [&] { cache.append(keys, values); });
    EXPECT_EQ(cache.tokens(), 0);
    CacheConfiguration two = rows_of("standard", 1, 4, 80, 64);
    two.values_in_keys = false;
    refusal(ErrorCode::option, [&] { KvCache(two, pool).append(keys); });
    refusal(ErrorCode::option, [&] { KvCache(rows_of("standard", 1, 4, 64, 80), pool); });
    refusal(ErrorCode::option, [&] { KvCache(rows_of("latent:3:3", 1, 4, 80, 64), pool); });
    refusal(ErrorCode::option, [&] { KvCache(rows_of("standard+rotary_bits=9", 1, 4, 80, 64), pool); });
    // 96 = 64 + 32: 48 channels are no part of that.
    const std::string sentence =
        refusal(ErrorCode::option, [&] { KvCache(rows_of("standard+rotate_keys=1", 1, 4, 96, 48), pool); });
    EXPECT_NE(sentence.find("rotate"), std::string::npos);
    KvCache(rows_of("key_favored:4:4", 1, 4, 96, 48), pool);
    cache.append(keys);
    AttentionParameters parameters;
    parameters.read = ReadPolicy::fixed(4);
    refusal(ErrorCode::option, [&] { attend(cache, normal_matrix(random, 1, 320), parameters); });
    const std::vector<std::byte> file = to_bytes(cache);
    refusal(ErrorCode::mismatch, [&] { load_cache(file, two, pool); });
    refusal(ErrorCode::mismatch,
            [&] { load_cache(file, rows_of("standard+rotary_bits=8", 1, 4, 80, 64), pool); });
}

}  // namespace
