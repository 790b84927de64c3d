// Tokens are removed from the middle of a sequence, and tiles narrowed, against the stored numbers of before.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cache/cache_support.hpp"
#include "kvplane/cache/capabilities.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/io/range_file.hpp"
#include "kvplane/storage/narrow.hpp"
#include "kvplane/storage/tile_coder.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane_test;

/// Rows of a matrix without those in [first, last).
Matrix without(const Matrix& rows, Index first, Index last) {
    Matrix left(rows.rows() - (last - first), rows.cols());
    left.topRows(first) = rows.topRows(first);
    left.bottomRows(rows.rows() - last) = rows.bottomRows(rows.rows() - last);
    return left;
}
/// Keys after a removal, as they would have been appended: those behind it are turned to their new positions.
Matrix moved(const CacheConfiguration& c, const Matrix& keys, Index first, Index last) {
    Matrix left = without(keys, first, last);
    Matrix behind = left.bottomRows(keys.rows() - last);
    RotaryEmbedding(c.key_head_dim, *c.rope).turn(behind, first - last);
    left.bottomRows(keys.rows() - last) = behind;
    return left;
}

struct Tokens {
    Matrix keys, values;
};
Tokens stored(const KvCache& cache) {
    return {cache.stored_keys(0, cache.tokens()), cache.stored_values(0, cache.tokens())};
}

/// That attention is that of the reference over what is stored, for few and many query tokens.
void expect_attention_of_stored(const KvCache& cache, std::mt19937_64& random) {
    const CacheConfiguration& c = cache.configuration();
    const Tokens all = stored(cache);
    for (const Index query_tokens : {1, 3, 11})
        for (const bool windowed : {false, true}) {
            const Matrix queries = normal_matrix(random, query_tokens, c.query_heads * c.key_head_dim);
            AttentionParameters parameters;
            if (windowed) {
                parameters.sliding_window = 150;
                parameters.sinks = 3;
            }
            const MatrixD expected =
                reference_attention(all.keys, all.values, queries, c.query_heads, c.kv_heads, parameters);
            for (const bool decoded : {false, true}) {
                parameters.decode_tiles = decoded;
                const Matrix output = attend(cache, queries, parameters);
                EXPECT_LT((output.cast<double>() - expected).cwiseAbs().maxCoeff(),
                          decoded ? 3e-5 : 0.02 * all.values.cwiseAbs().maxCoeff())
                    << query_tokens << " query tokens, windowed " << windowed << ", decoded " << decoded;
            }
        }
}

/// That the sums of softmax weights are those over what is stored, and that forks in a batch see the same.
void expect_weights_and_batch(const KvCache& cache, std::mt19937_64& random) {
    const CacheConfiguration& c = cache.configuration();
    const Matrix keys = cache.stored_keys(0, cache.tokens());
    const Matrix query = normal_matrix(random, 1, c.query_heads * c.key_head_dim);
    MatrixD expected = MatrixD::Zero(c.kv_heads, cache.tokens());
    for (Index head = 0; head < c.query_heads; ++head) {
        const Index kv_head = head / c.group();
        Eigen::VectorXd scores =
            keys.middleCols(kv_head * c.key_head_dim, c.key_head_dim).cast<double>() *
            query.row(0).segment(head * c.key_head_dim, c.key_head_dim).transpose().cast<double>() /
            std::sqrt(static_cast<double>(c.key_head_dim));
        scores = (scores.array() - scores.maxCoeff()).exp();
        expected.row(kv_head) += scores.transpose() / scores.sum();
    }
    Matrix weights, output(1, c.query_heads * c.value_head_dim), batch(2, c.query_heads * c.value_head_dim);
    AttentionWorkspace workspace;
    cache.attend(query, output, {}, workspace, {.log_sum_exp = nullptr, .token_weights = &weights});
    EXPECT_LT((weights.cast<double>() - expected).cwiseAbs().maxCoeff(), 0.02);
    const KvCache fork = cache.fork();
    const KvCache* const both[] = {&cache, &fork};
    const Index offsets[] = {0, 1, 2};
    Matrix queries(2, query.cols());
    queries << query, query;
    KvCache::attend_batch(both, offsets, queries, batch, {}, workspace);
    EXPECT_EQ(batch.row(0), output.row(0));
    EXPECT_EQ(batch.row(1), output.row(0));
}

/// That a file of the cache brings it back, and that all of what attention sees is in it.
void expect_file(const KvCache& cache, std::mt19937_64& random) {
    const CacheConfiguration& c = cache.configuration();
    TilePool pool;
    const std::vector<std::byte> file = to_bytes(cache);
    const KvCache loaded = load_cache(file, c, pool);
    EXPECT_EQ(to_bytes(loaded), file);
    const Matrix queries = normal_matrix(random, 2, c.query_heads * c.key_head_dim);
    EXPECT_EQ(attend(loaded, queries), attend(cache, queries));
    EXPECT_EQ(loaded.error_bound().key, cache.error_bound().key);
}

KvCache filled_cache(const std::string& recipe, Index tokens, std::mt19937_64& random, TilePool& pool) {
    const CacheConfiguration c = configuration(recipe);
    KvCache cache(c, pool);
    cache.append(normal_matrix(random, tokens, c.kv_heads * c.key_head_dim),
                 normal_matrix(random, tokens, c.kv_heads * c.value_head_dim));
    return cache;
}

class EditOfRecipe : public testing::TestWithParam<std::string> {
  protected:
    EditOfRecipe() : random_(kvplane_test::seed()) {}

    KvCache filled(Index tokens, TilePool& pool) {
        const CacheConfiguration c = configuration(GetParam());
        KvCache cache(c, pool);
        input_ = {normal_matrix(random_, tokens, c.kv_heads * c.key_head_dim),
                  normal_matrix(random_, tokens, c.kv_heads * c.value_head_dim)};
        append(cache, input_.keys, input_.values);
        return cache;
    }

    std::mt19937_64 random_;
    Tokens input_;
};

TEST_P(EditOfRecipe, RemovedTokensAreGoneAndOthersMove) {
    TilePool pool;
    const KvCache full = filled(600, pool);
    const CacheConfiguration& c = full.configuration();
    const Tokens before = stored(full);
    const Index sinks = c.recipe.sink_tokens;
    const std::vector<std::pair<Index, Index>> ranges{
        {sinks, sinks + 1}, {sinks, 300}, {150, 151}, {sinks + 128, sinks + 256},
        {200, 210},         {100, 500},   {100, 590}, {570, 590},
        {599, 600},         {sinks, 600}, {300, 300}, {sinks, 599}};
    for (const auto& [first, last] : ranges) {
        SCOPED_TRACE(std::to_string(first) + " to " + std::to_string(last));
        KvCache cache = full.fork();
        const Index packed_end = cache.state().recent_first;
        cache.remove(first, last);
        ASSERT_EQ(cache.tokens(), 600 - (last - first));
        const Tokens now = stored(cache);
        EXPECT_EQ(now.values, without(before.values, first, last));
        const Matrix expected = moved(c, before.keys, first, last);
        // Tokens in tiles are exact but for the turn; recent ones are rounded once more.
        const Index exact = first == last ? 600 : std::max(first, packed_end - (last - first));
        const Index tiled = std::min(exact, now.keys.rows());
        if (tiled > 0) {
            EXPECT_LT((now.keys - expected).topRows(tiled).cwiseAbs().maxCoeff(), 2e-5) << "in tiles";
        }
        if (now.keys.rows() > 0) {
            const double rounding =
                cache.shape().rounding_bound(TileSide::keys, cache.state().extremes().largest.keys) *
                cache.shape().turn_growth();
            EXPECT_LT((now.keys - expected).cwiseAbs().maxCoeff(), rounding + 2e-5);
        }
        if (cache.tokens() >= 11) expect_attention_of_stored(cache, random_);
        if (cache.tokens() < 2) continue;
        expect_file(cache, random_);
        expect_weights_and_batch(cache, random_);
    }
    EXPECT_EQ(stored(full).keys, before.keys) << "the fork's parent has changed";
}

TEST_P(EditOfRecipe, RandomRemovalsAndAppendsStayWithinTheBound) {
    const CacheConfiguration c = configuration(GetParam());
    const RotaryEmbedding rope(c.key_head_dim, *c.rope);
    for (Index round = 0; round < rounds(sanitized ? 1 : 3); ++round) {
        TilePool pool;
        KvCache cache(c, pool);
        Matrix keys(0, c.kv_heads * c.key_head_dim), values(0, c.kv_heads * c.value_head_dim);
        for (int step = 0; step < 14; ++step) {
            const auto draw = [&](Index most) {
                return std::uniform_int_distribution<Index>(0, most)(random_);
            };
            const Index tokens = cache.tokens(), sinks = std::min(c.recipe.sink_tokens, tokens);
            if (step % 2 == 0 || tokens == sinks) {
                const Index more = 1 + draw(260);
                const Matrix k = normal_matrix(random_, more, keys.cols()),
                             v = normal_matrix(random_, more, values.cols());
                append(cache, k, v);
                keys.conservativeResize(tokens + more, Eigen::NoChange);
                values.conservativeResize(tokens + more, Eigen::NoChange);
                keys.bottomRows(more) = k;
                values.bottomRows(more) = v;
            } else if (draw(3) == 0) {
                const Index to = sinks + draw(tokens - sinks);
                cache.truncate(to);
                keys.conservativeResize(to, Eigen::NoChange);
                values.conservativeResize(to, Eigen::NoChange);
            } else {
                const Index first = sinks + draw(tokens - sinks), last = first + draw(tokens - first);
                cache.remove(first, last);
                keys = moved(c, keys, first, last);
                values = without(values, first, last);
            }
            ASSERT_EQ(cache.tokens(), keys.rows());
            if (keys.rows() == 0) continue;
            // Bounds are those of stored elements, so that a head's row is off by sqrt(d) times as much in
            // norm.
            const CacheErrorBound bound = cache.error_bound();
            const Tokens now = stored(cache);
            const double key_growth = std::sqrt(static_cast<double>(c.key_head_dim)),
                         value_growth = std::sqrt(static_cast<double>(c.value_head_dim));
            EXPECT_LE((now.values - values).cwiseAbs().maxCoeff(),
                      value_growth * bound.value * 1.0001 + 1e-5);
            if (!c.recipe.latents) {
                EXPECT_LE((now.keys - keys).cwiseAbs().maxCoeff(), key_growth * bound.key * 1.0001 + 1e-5);
            }
            if (c.recipe.keys.is_half() && c.recipe.recent_bits == 16 && !c.recipe.latents) {
                EXPECT_LE((now.keys - keys).cwiseAbs().maxCoeff(), 0.05) << "fp16 has drifted";
            }
        }
        expect_attention_of_stored(cache, random_);
        expect_file(cache, random_);
    }
}

TEST_P(EditOfRecipe, AFailedRemovalChangesNothing) {
    FailingMemory memory;
    TilePool pool(&memory);
    KvCache cache = filled(590, pool);
    const Tokens before = stored(cache);
    const Index bytes = cache.bytes();
    for (Index allowed = 0;; ++allowed) {
        ASSERT_LT(allowed, 40);
        pool.trim();
        memory.left = allowed;
        try {
            cache.remove(100, 333);
            break;
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ErrorCode::out_of_memory);
            EXPECT_EQ(cache.tokens(), 590);
            EXPECT_EQ(cache.bytes(), bytes);
            ASSERT_EQ(stored(cache).keys, before.keys);
        }
    }
    EXPECT_EQ(cache.tokens(), 590 - 233);
}

TEST_P(EditOfRecipe, NarrowedTilesHoldThePrefixOfTheirCodes) {
    TilePool pool;
    const KvCache full = filled(620, pool);
    const CacheConfiguration& c = full.configuration();
    const CacheCapabilities can = capabilities(c);
    const std::vector<int> none{16};
    const Index first = full.state().tiles.empty() ? 0 : full.state().tiles.front().first;
    for (const int key_bits : can.narrower_keys.empty() ? none : can.narrower_keys)
        for (const int value_bits : can.narrower_values.empty() ? none : can.narrower_values) {
            SCOPED_TRACE(std::to_string(key_bits) + " and " + std::to_string(value_bits) + " bits");
            KvCache cache = full.fork();
            const Index predicted = cache.narrowed_bytes(first, first + 300, key_bits, value_bits);
            cache.narrow(first, first + 300, key_bits, value_bits);
            EXPECT_EQ(cache.bytes(), predicted);
            ASSERT_EQ(cache.tokens(), 620);
            const bool some =
                !can.narrower_values.empty() || (!can.narrower_keys.empty() && !c.recipe.latents);
            if (some) {
                EXPECT_LT(cache.bytes(), full.bytes());
                EXPECT_TRUE(cache.state().has_narrowed());
            }
            for (std::size_t t = 0; t < cache.state().tiles.size(); ++t) {
                const TilePlace &old = full.state().tiles[t], &now = cache.state().tiles[t];
                for (Index head = 0; head < c.kv_heads; ++head)
                    for (const TileSide side : {TileSide::keys, TileSide::values}) {
                        const auto format = [&](const PageLayout& layout) {
                            return side == TileSide::keys ? layout.key_format_of_head(head) : layout.values;
                        };
                        const auto at = [&](const TilePlace& place) {
                            const PageLayout& layout = *place.layout;
                            return place.page +
                                   (side == TileSide::keys
                                        ? layout.key_at[static_cast<std::size_t>(layout.subspace_of(head))]
                                        : layout.value_at[static_cast<std::size_t>(head)]);
                        };
                        const TileFormat wide = format(*old.layout), narrow = format(*now.layout);
                        const bool in_range = t < 2;
                        const int bits = !in_range || wide.segments()[0].is_half() ? 16
                                         : side == TileSide::keys                  ? key_bits
                                                                                   : value_bits;
                        Matrix expected(old.tokens, wide.channels()), got(old.tokens, wide.channels());
                        detail::TileCoder(wide).decode(at(old), old.tokens, bits, expected.data(),
                                                       expected.cols());
                        detail::TileCoder(narrow).decode(at(now), now.tokens, got.data(), got.cols());
                        EXPECT_EQ(got, expected) << "tile " << t;
                    }
            }
            const CacheErrorBound bound = cache.error_bound();
            const Tokens now = stored(cache);
            if (!c.recipe.values.rotate) {
                EXPECT_LE((now.values - input_.values).cwiseAbs().maxCoeff(), bound.value);
            }
            if (!c.recipe.keys.rotate && !c.recipe.rotates_by_tile && !c.recipe.latents) {
                EXPECT_LE((now.keys - input_.keys).cwiseAbs().maxCoeff(), bound.key);
            }
            expect_attention_of_stored(cache, random_);
            // The sequence goes on, is cut, and goes on again.
            const Matrix k = normal_matrix(random_, 150, c.kv_heads * c.key_head_dim),
                         v = normal_matrix(random_, 150, c.kv_heads * c.value_head_dim);
            append(cache, k, v);
            cache.truncate(first + 200);
            append(cache, k, v);
            expect_attention_of_stored(cache, random_);
            expect_file(cache, random_);
            cache.remove(first + 50, first + 220);
            expect_attention_of_stored(cache, random_);
            expect_file(cache, random_);
        }
}

INSTANTIATE_TEST_SUITE_P(Recipes, EditOfRecipe,
                         testing::ValuesIn(thinned(with(recipe_names(), token_grid_names()))), test_name);

TEST(Narrowing, WidthsAreThePrefixesOfTheirPlanes) {
    EXPECT_EQ(narrower_widths(8), std::vector<int>{4});
    EXPECT_EQ(narrower_widths(7), (std::vector<int>{6, 4}));
    EXPECT_EQ(narrower_widths(3), std::vector<int>{2});
    EXPECT_EQ(narrower_widths(4), std::vector<int>{});
    EXPECT_THROW(narrower_widths(9), Error);
}

TEST(Narrowing, TwiceIsOnceToTheNarrowest) {
    std::mt19937_64 random(seed());
    TilePool pool;
    const CacheConfiguration c = configuration("key_favored:7:6");
    KvCache twice(c, pool);
    const Matrix keys = normal_matrix(random, 700, c.kv_heads * c.key_head_dim),
                 values = normal_matrix(random, 700, c.kv_heads * c.value_head_dim);
    twice.append(keys, values);
    KvCache once = twice.fork();
    twice.narrow(0, 700, 6, 6);
    EXPECT_EQ(twice.state().narrowed.size(), 1u);
    twice.narrow(0, 700, 5, 5);  // there are no 5 bits: the widest prefix below is of 4
    once.narrow(0, 700, 4, 4);
    EXPECT_EQ(stored(twice).keys, stored(once).keys);
    EXPECT_EQ(stored(twice).values, stored(once).values);
    EXPECT_EQ(twice.bytes(), once.bytes());
    const Index before = twice.bytes();
    twice.narrow(0, 700, 8, 8);
    EXPECT_EQ(twice.bytes(), before);
}

TEST(Narrowing, GivesPagesBackToThePool) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache = filled_cache("key_favored:8:8", 1200, random, pool);
    cache.narrow(0, 1200, 4, 4);
    EXPECT_EQ(pool.bytes(), cache.bytes());
    pool.trim();
    EXPECT_EQ(pool.unused_pages(), 0);
}

TEST(Narrowing, RefusesWhatHasNoPrefixAndChangesNothing) {
    std::mt19937_64 random(seed());
    for (const auto& [recipe, key_bits, value_bits, what] :
         {std::tuple{"fp16", 8, 16, "fp16"}, std::tuple{"block32:8", 4, 8, "symmetric"},
          std::tuple{"key_favored:4:4", 2, 4, "at least 4"},
          std::tuple{"key_favored:8:2", 4, 1, "at least 2"}}) {
        SCOPED_TRACE(recipe);
        TilePool pool;
        KvCache cache = filled_cache(recipe, 400, random, pool);
        const Tokens before = stored(cache);
        try {
            cache.narrow(0, 400, key_bits, value_bits);
            FAIL() << "not refused";
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ErrorCode::option);
            EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
        }
        EXPECT_EQ(stored(cache).keys, before.keys);
        EXPECT_THROW(cache.narrow(0, 401, 4, 4), Error);
        EXPECT_THROW(cache.narrow(-1, 4, 4, 4), Error);
    }
}

TEST(Narrowing, PoliciesOfReadsAreRefused) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache = filled_cache("key_favored:8:8", 400, random, pool);
    const CacheConfiguration& c = cache.configuration();
    AttentionParameters parameters;
    parameters.read = ReadPolicy::fixed(4);
    const Matrix queries = normal_matrix(random, 1, c.query_heads * c.key_head_dim);
    attend(cache, queries, parameters);
    cache.narrow(0, 200, 4, 4);
    EXPECT_THROW(attend(cache, queries, parameters), Error);
}

TEST(Narrowing, RangesOfTokensComeBackAsNarrow) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache = filled_cache("key_favored:7:6", 700, random, pool);
    cache.narrow(0, 260, 4, 4);
    cache.narrow(260, 400, 6, 4);
    cache.remove(4, 132);  // all others move
    const Index tile = cache.state().tiles[1].first;
    const std::vector<std::byte> before = to_bytes(cache);
    const std::string path = testing::TempDir() + "narrowed_range.safetensors";
    save_range(cache, 4, tile + 128, path);
    cache.drop_before(tile + 128);
    load_range(path, cache);
    EXPECT_EQ(to_bytes(cache), before);
    std::remove(path.c_str());
}

TEST(Removing, AFileOfMovedKeysIsOfItsRopeAlone) {
    std::mt19937_64 random(seed());
    TilePool pool;
    const CacheConfiguration c = configuration("standard");
    CacheConfiguration other = c;
    other.rope->base = 500000.0;
    KvCache cache(c, pool);
    cache.append(normal_matrix(random, 400, c.kv_heads * c.key_head_dim),
                 normal_matrix(random, 400, c.kv_heads * c.value_head_dim));
    load_cache(to_bytes(cache), other, pool);  // nothing has moved: keys are as they were given
    cache.remove(10, 20);
    refusal(ErrorCode::mismatch, [&] { load_cache(to_bytes(cache), other, pool); });
}

TEST(Removing, SaysWhatToConfigure) {
    std::mt19937_64 random(seed());
    TilePool pool;
    CacheConfiguration c = configuration("standard");
    c.rope.reset();
    KvCache cache(c, pool);
    cache.append(normal_matrix(random, 300, c.kv_heads * c.key_head_dim),
                 normal_matrix(random, 300, c.kv_heads * c.value_head_dim));
    try {
        cache.remove(10, 20);
        FAIL() << "not refused";
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::option);
        EXPECT_NE(std::string(error.what()).find("CacheConfiguration::rope"), std::string::npos);
    }
    c.rope = RopeSettings{.frequencies = std::vector<double>(16, 0.0)};
    KvCache still(c, pool);
    const Matrix keys = normal_matrix(random, 300, c.kv_heads * c.key_head_dim);
    still.append(keys, normal_matrix(random, 300, c.kv_heads * c.value_head_dim));
    const Matrix before = still.stored_keys(0, 300);
    still.remove(10, 20);
    EXPECT_LT((still.stored_keys(0, 250) - without(before, 10, 20).topRows(250)).cwiseAbs().maxCoeff(), 1e-5);
}

TEST(Removing, RefusesSinksProvisionalTokensAndOtherRanges) {
    std::mt19937_64 random(seed());
    TilePool pool;
    const CacheConfiguration c = configuration("standard+rotate_keys=1");
    KvCache cache(c, pool);
    const auto more = [&](Index tokens) {
        return std::pair{normal_matrix(random, tokens, c.kv_heads * c.key_head_dim),
                         normal_matrix(random, tokens, c.kv_heads * c.value_head_dim)};
    };
    const auto [keys, values] = more(300);
    cache.append(keys, values);
    const auto code = [&](Index first, Index last) {
        try {
            cache.remove(first, last);
        } catch (const Error& error) {
            return error.code();
        }
        return ErrorCode::io;
    };
    EXPECT_EQ(code(3, 20), ErrorCode::index);
    EXPECT_EQ(code(20, 301), ErrorCode::index);
    EXPECT_EQ(code(20, 19), ErrorCode::index);
    EXPECT_EQ(code(-1, 19), ErrorCode::index);
    const auto [k, v] = more(2);
    cache.append_provisional(k, v);
    EXPECT_EQ(code(20, 30), ErrorCode::option);
    cache.accept();
    EXPECT_EQ(code(20, 30), ErrorCode::io) << "it was refused";
    KvCache large(c, pool);
    large.append(keys * 3000.0f, values);
    try {
        large.remove(20, 30);
        FAIL() << "not refused";
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::beyond_fp16);
    }
}

/// What llama.cpp calls a context shift: half of what is no sink goes whenever the context is full.
TEST(Removing, AShiftingContextTakesNoMoreThanAFreshOne) {
    std::mt19937_64 random(seed());
    TilePool pool;
    const CacheConfiguration c = configuration("standard");
    KvCache cache(c, pool);
    const Index full = 1024, sinks = c.recipe.sink_tokens;
    // A tile's tokens may wait as recent ones, which are larger.
    const Index tile =
        tile_tokens / detail::recent_page_tokens * detail::counted_bytes(cache.shape().recent_rows().bytes());
    for (Index step = 0; step < 60; ++step) {
        cache.append(normal_matrix(random, 100, c.kv_heads * c.key_head_dim),
                     normal_matrix(random, 100, c.kv_heads * c.value_head_dim));
        if (cache.tokens() > full) cache.remove(sinks, sinks + (cache.tokens() - sinks) / 2);
        ASSERT_LE(cache.bytes(), KvCache::predicted_bytes(c, cache.tokens()) + 2 * tile);
        ASSERT_EQ(cache.bytes(), pool.bytes());
    }
    expect_attention_of_stored(cache, random);
}

TEST(Removing, WindowsAndDroppedTokensMoveToo) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache = filled_cache("key_favored:4:4", 700, random, pool);
    const CacheConfiguration& c = cache.configuration();
    cache.drop_before(300);
    cache.remove(400, 450);
    EXPECT_EQ(cache.first_kept(), 300);
    cache.remove(290, 310);  // ten of these are dropped already
    EXPECT_EQ(cache.first_kept(), 290);
    cache.remove(100, 200);
    EXPECT_EQ(cache.first_kept(), 190);
    EXPECT_EQ(cache.tokens(), 700 - 50 - 20 - 100);
    const Index tokens = cache.tokens();
    Matrix keys = Matrix::Zero(tokens, c.kv_heads * c.key_head_dim),
           values = Matrix::Zero(tokens, c.kv_heads * c.value_head_dim);
    keys.topRows(4) = cache.stored_keys(0, 4);
    values.topRows(4) = cache.stored_values(0, 4);
    keys.bottomRows(tokens - 190) = cache.stored_keys(190, tokens - 190);
    values.bottomRows(tokens - 190) = cache.stored_values(190, tokens - 190);
    Matrix bias = Matrix::Zero(2, tokens);
    bias.middleCols(4, 186).setConstant(-std::numeric_limits<float>::infinity());
    AttentionParameters masked;
    masked.bias = &bias;
    const Matrix queries = normal_matrix(random, 2, c.query_heads * c.key_head_dim);
    const MatrixD expected = reference_attention(keys, values, queries, c.query_heads, c.kv_heads, masked);
    EXPECT_LT((attend(cache, queries).cast<double>() - expected).cwiseAbs().maxCoeff(), 0.05);
}

}  // namespace
