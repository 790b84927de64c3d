// How tokens come in, and how they are taken back: provisional tokens leave no trace, and a tile that was cut goes on
// as one.
#include "kvplane/cache/appender.hpp"

#include <gtest/gtest.h>

#include <deque>
#include <limits>

#include "cache_support.hpp"
#include "kvplane/io/cache_file.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

class Appending : public testing::TestWithParam<std::string> {
  protected:
    CacheConfiguration configuration_ = kvplane_test::configuration(GetParam());
    std::mt19937_64 random_{seed()};
    TilePool pool_;

    struct Tokens {
        Matrix keys, values;
    };
    Tokens tokens(Index count) {
        return {normal_matrix(random_, count, configuration_.kv_heads * configuration_.key_head_dim, 2.0f),
                normal_matrix(random_, count, configuration_.kv_heads * configuration_.value_head_dim)};
    }
    Matrix queries(Index count) {
        return normal_matrix(random_, count, configuration_.query_heads * configuration_.key_head_dim);
    }
    Index up_to(Index most) { return std::uniform_int_distribution<Index>(0, most)(random_); }
    /// Whether tiles, once packed and opened again, still hold the very numbers that were appended.
    bool exact() const {
        const CacheRecipe& r = configuration_.recipe;
        return !r.latents && r.keys.is_half() && r.values.is_half() && r.recent_bits == 16;
    }
};

TEST_P(Appending, ProvisionalTokensLeaveNoTrace) {
    for (const Index before : {0, 1, 3, 4, 16, 127, 128, 132, 159, 160, 163, 164, 291, 420}) {
        KvCache cache(configuration_, pool_);
        const Tokens first = tokens(before);
        append(cache, first.keys, first.values);
        const std::vector<std::byte> bytes = to_bytes(cache);
        const Index size = cache.bytes();
        const CacheErrorBound bound = cache.error_bound();
        for (const Index drafted : {1, 7, 60, 200}) {
            SCOPED_TRACE(std::to_string(before) + " tokens, " + std::to_string(drafted) + " drafted");
            const Tokens drafts = tokens(drafted);
            append_provisional(cache, drafts.keys * 3.0f, drafts.values * 3.0f);
            EXPECT_EQ(cache.tokens(), before + drafted);
            EXPECT_EQ(cache.provisional_tokens(), drafted);
            cache.truncate(before + drafted / 2);
            EXPECT_EQ(cache.provisional_tokens(), drafted / 2);
            cache.truncate(before);
            ASSERT_EQ(to_bytes(cache), bytes);
            ASSERT_EQ(cache.bytes(), size);
            ASSERT_EQ(cache.error_bound().key, bound.key);
            ASSERT_EQ(cache.error_bound().value, bound.value);
        }
    }
}

/// Drafts of any length, of which any number is accepted, in whatever order: the bytes of one plain append.
TEST_P(Appending, AcceptedTokensAreAsIfAppended) {
    for (int round = 0, all_rounds = rounds(sanitized ? 2 : 6); round < all_rounds; ++round) {
        KvCache plain(configuration_, pool_), drafting(configuration_, pool_);
        const Tokens all = tokens(500);
        append(plain, all.keys, all.values);
        Index settled = 0;
        while (settled < 500) {
            const auto some = [&](const Matrix& of, Index count) { return of.middleRows(settled, count); };
            const Index right = std::min<Index>(500 - settled, up_to(3) == 0 ? up_to(170) : up_to(9)),
                        wrong = up_to(9);
            append_provisional(drafting, some(all.keys, right), some(all.values, right));
            const Tokens drafts = tokens(wrong);
            append_provisional(drafting, drafts.keys, drafts.values);
            if (up_to(1) == 0 && drafting.tokens() > 0) (void)attend(drafting, queries(1));
            switch (up_to(2)) {
                case 0:  // takes the wrong ones back, then accepts the right ones, in one go or two
                    drafting.truncate(settled + right);
                    drafting.accept(right / 2);
                    drafting.accept();
                    break;
                case 1:  // accepts first
                    drafting.accept(right);
                    drafting.truncate(settled + right);
                    break;
                default: {  // the next tokens that are not provisional do it
                    drafting.truncate(settled + right);
                    settled += right;
                    const Index next = std::min<Index>(500 - settled, up_to(40));
                    append(drafting, some(all.keys, next), some(all.values, next));
                    settled += next - right;
                    if (next == 0) drafting.accept();
                }
            }
            settled += right;
            ASSERT_EQ(drafting.tokens(), settled);
            ASSERT_EQ(drafting.provisional_tokens(), 0);
        }
        ASSERT_EQ(to_bytes(drafting), to_bytes(plain)) << "round " << round;
    }
}

/// Attention takes provisional tokens for what they are: until a tile is due, bit for bit what it makes of others.
TEST_P(Appending, AttentionSeesProvisionalTokens) {
    int compared = 0;
    for (const Index before : {2, 40, 150, 300}) {
        const Tokens all = tokens(before + 5);
        KvCache plain(configuration_, pool_), drafting(configuration_, pool_);
        append(plain, all.keys.topRows(before), all.values.topRows(before));
        append(drafting, all.keys.topRows(before), all.values.topRows(before));
        append(plain, all.keys.bottomRows(5), all.values.bottomRows(5));
        append_provisional(drafting, all.keys.bottomRows(5), all.values.bottomRows(5));
        if (plain.packed_tokens() != drafting.packed_tokens()) continue;
        ++compared;
        for (const Index query_tokens : {1, 5, 12}) {
            const Matrix q = queries(std::min(query_tokens, before + 5));
            EXPECT_EQ(attend(plain, q), attend(drafting, q)) << before << " tokens";
        }
        EXPECT_EQ(plain.stored_keys(0, before + 5), drafting.stored_keys(0, before + 5));
    }
    EXPECT_GE(compared, 2);
}

TEST_P(Appending, TruncationsInsideTilesDoNotLeak) {
    KvCache cache(configuration_, pool_);
    const Tokens all = tokens(500);
    for (Index kept = 0, most = sanitized ? 100 : 300; kept < most; ++kept) {
        append(cache, all.keys.middleRows(kept, 170), all.values.middleRows(kept, 170));
        cache.truncate(kept + 1);
        if (kept % 50 != 49) continue;
        SCOPED_TRACE(kept);
        const Index tokens = cache.tokens();
        if (!configuration_.fits_basis()) {
            const Index two_tiles = 2 * detail::counted_bytes(cache.state().layout->bytes);
            EXPECT_LE(cache.bytes(), KvCache::predicted_bytes(configuration_, tokens) + two_tiles);
        } else {
            EXPECT_LE(cache.state().tiles.size(), static_cast<std::size_t>(tokens / tile_tokens + 2));
        }
        const Matrix keys_off = cache.stored_keys(0, tokens) - all.keys.topRows(tokens),
                     values_off = cache.stored_values(0, tokens) - all.values.topRows(tokens);
        const CacheErrorBound bound = cache.error_bound();
        const double dim =
            static_cast<double>(std::max(configuration_.key_head_dim, configuration_.value_head_dim));
        // A rotated head is off by as much in norm, so that an element of it may take all of it.
        EXPECT_LE(keys_off.cwiseAbs().maxCoeff(), bound.key * std::sqrt(dim) + 1e-4);
        EXPECT_LE(values_off.cwiseAbs().maxCoeff(), bound.value * std::sqrt(dim) + 1e-4);
        if (exact()) {
            EXPECT_LE(values_off.cwiseAbs().maxCoeff(), 0x1p-9);
        }
    }
    EXPECT_LE(pool_.pages() - pool_.unused_pages(), 300 / 128 + 2 + 1 + 7);
}

/// One truncation inside a tile costs its tokens one more rounding, and the others nothing.
TEST_P(Appending, AfterATruncationInsideATileOnlyItsTokensAreRoundedAgain) {
    if (configuration_.fits_basis() || configuration_.recipe.every_token) GTEST_SKIP() << "no such tiles";
    const Index sinks = configuration_.recipe.sink_tokens;
    const Tokens all = tokens(600);
    KvCache plain(configuration_, pool_), cut(configuration_, pool_);
    append(plain, all.keys, all.values);
    append(cut, all.keys, all.values);
    cut.truncate(sinks + 128 + 50);
    append(cut, all.keys.bottomRows(600 - cut.tokens()), all.values.bottomRows(600 - cut.tokens()));
    EXPECT_EQ(cut.packed_tokens(), plain.packed_tokens());
    EXPECT_EQ(cut.bytes(), plain.bytes());
    const auto same = [&](Index first, Index count) {
        return cut.stored_keys(first, count) == plain.stored_keys(first, count) &&
               cut.stored_values(first, count) == plain.stored_values(first, count);
    };
    EXPECT_TRUE(same(0, sinks + 128));
    // Shaping has learned more when these are packed for the second time.
    if (!configuration_.recipe.shaped_keys) {
        EXPECT_TRUE(same(sinks + 256, 600 - sinks - 256));
    }
    if (exact()) {
        EXPECT_EQ(to_bytes(cut), to_bytes(plain));
    }
    EXPECT_GE(cut.error_bound().value, plain.error_bound().value);
}

/// Drafts behind a tile that was cut: they change nothing of it before they are accepted, and then it is opened as
/// by any other append.
TEST_P(Appending, DraftsBehindATileThatWasCut) {
    for (const Index left : {150, 178, 257}) {
        SCOPED_TRACE(left);
        const Tokens all = tokens(600), drafts = tokens(40);
        KvCache plain(configuration_, pool_);
        append(plain, all.keys, all.values);
        plain.truncate(left);
        KvCache drafting = plain.fork();
        const std::vector<std::byte> before = to_bytes(plain);
        append(plain, drafts.keys, drafts.values);
        append_provisional(drafting, all.keys.topRows(50), all.values.topRows(50));
        drafting.truncate(left);
        EXPECT_EQ(to_bytes(drafting), before);
        append_provisional(drafting, drafts.keys, drafts.values);
        append_provisional(drafting, all.keys.topRows(5), all.values.topRows(5));
        drafting.accept(40);
        drafting.truncate(left + 40);
        EXPECT_EQ(to_bytes(drafting), to_bytes(plain));
    }
}

INSTANTIATE_TEST_SUITE_P(Recipes, Appending, testing::ValuesIn(recipe_names()), test_name);

/// What a refused append wrote behind the tokens of a tile that is being filled does not raise what is known of
/// its largest numbers.
TEST(Refusal, LeavesNoTraceInTheTileThatIsBeingFilled) {
    for (const char* recipe : {"fp16", "block32:8:rotated"}) {
        TilePool pool;
        KvCache cache(configuration(recipe), pool), other(configuration(recipe), pool);
        std::mt19937_64 random(seed());
        const auto both = [&](Index count) {
            const Matrix k = normal_matrix(random, count, 64), v = normal_matrix(random, count, 96);
            cache.append(k, v);
            other.append(k, v);
        };
        both(40);
        const Matrix large = normal_matrix(random, 250, 64, 100.0f);
        Matrix bad = normal_matrix(random, 250, 96, 100.0f);
        bad(249, 95) = std::numeric_limits<float>::infinity();
        EXPECT_NE(refusal(ErrorCode::not_finite, [&] { cache.append(large, bad); })
                      .find("values: the value at token 249"),
                  std::string::npos);
        EXPECT_EQ(cache.tokens(), 40);
        // Keys are looked at first, wherever they are bad.
        Matrix bad_keys = large;
        bad_keys(240, 3) = 1e6f;
        EXPECT_NE(refusal(ErrorCode::beyond_fp16, [&] { cache.append(bad_keys, bad); })
                      .find("keys: the value at token 240"),
                  std::string::npos);
        both(30);
        const auto page = [](const KvCache& of) {
            const TilePlace& tile = of.state().tiles.back();
            return std::vector<std::byte>(tile.page, tile.page + tile.layout->bytes);
        };
        EXPECT_EQ(page(cache), page(other)) << recipe;
        EXPECT_EQ(to_bytes(cache), to_bytes(other)) << recipe;
    }
}

TEST(Provisional, AcceptChangesNothingWhereMemoryEnds) {
    FailingMemory memory;
    TilePool pool(&memory);
    KvCache cache(configuration("standard"), pool);
    std::mt19937_64 random(seed());
    cache.append(normal_matrix(random, 100, 64), normal_matrix(random, 100, 96));
    cache.append_provisional(normal_matrix(random, 400, 64), normal_matrix(random, 400, 96));
    const Matrix q = normal_matrix(random, 3, 128), before = attend(cache, q);
    pool.trim();
    int refused = 0;
    for (memory.left = 0;; memory.left = ++refused) {
        try {
            cache.accept(390);
            break;
        } catch (const Error& error) {
            ASSERT_EQ(error.code(), ErrorCode::out_of_memory);
        }
        ASSERT_EQ(cache.provisional_tokens(), 400);
        ASSERT_EQ(attend(cache, q), before);
        pool.trim();
    }
    EXPECT_GE(refused, 2);  // a tile each
    EXPECT_EQ(cache.provisional_tokens(), 10);
    EXPECT_EQ(cache.tokens(), 500);
}

TEST(Provisional, AcceptRefusesMoreThanThereAre) {
    TilePool pool;
    KvCache cache(configuration("standard"), pool);
    cache.append_provisional(Matrix::Ones(3, 64), Matrix::Ones(3, 96));
    EXPECT_EQ(refusal(ErrorCode::index, [&] { cache.accept(4); }),
              "kvplane: accept: 4 of 3 provisional tokens");
    refusal(ErrorCode::index, [&] { cache.accept(-1); });
    EXPECT_EQ(cache.provisional_tokens(), 3);
    cache.clear();
    EXPECT_EQ(cache.provisional_tokens(), 0);
}

/// A model's layers have appended, all but the last, which refuses: truncate brings all of them back.
TEST(Provisional, ALayerThatRefusesLeavesNoTraceInTheOthers) {
    TilePool pool;
    std::mt19937_64 random(seed());
    std::deque<KvCache> layers;
    std::vector<std::vector<std::byte>> before;
    for (int l = 0; l < 8; ++l) {
        layers.emplace_back(configuration("standard"), pool);
        layers.back().append(normal_matrix(random, 160, 64), normal_matrix(random, 160, 96));
        before.push_back(to_bytes(layers.back()));
    }
    const Matrix keys = normal_matrix(random, 9, 64);
    Matrix bad = normal_matrix(random, 9, 96);
    for (int l = 0; l < 7; ++l) layers[static_cast<std::size_t>(l)].append_provisional(keys, bad);
    bad(8, 95) = std::numeric_limits<float>::quiet_NaN();
    refusal(ErrorCode::not_finite, [&] { layers[7].append_provisional(keys, bad); });
    for (std::size_t l = 0; l < 8; ++l) {
        layers[l].truncate(160);
        EXPECT_EQ(to_bytes(layers[l]), before[l]) << "layer " << l;
    }
}

/// Forks share pages, provisional rows among them, and do not see each other.
TEST(Provisional, ForksDraftApart) {
    TilePool pool;
    std::mt19937_64 random(seed());
    KvCache cache(configuration("standard"), pool);
    cache.append(normal_matrix(random, 150, 64), normal_matrix(random, 150, 96));
    cache.append_provisional(normal_matrix(random, 3, 64), normal_matrix(random, 3, 96));
    KvCache fork = cache.fork();
    const Matrix q = normal_matrix(random, 1, 128), seen = attend(cache, q);
    EXPECT_EQ(fork.provisional_tokens(), 3);
    fork.truncate(151);
    fork.append_provisional(normal_matrix(random, 20, 64), normal_matrix(random, 20, 96));
    fork.accept();
    EXPECT_EQ(attend(cache, q), seen);
}

}  // namespace
