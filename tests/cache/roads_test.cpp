// The same tokens by any road: whole or in parts, forked, saved and loaded, drafted and accepted, at every
// border of what a cache is made of. All roads end in the same bytes.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cache_support.hpp"
#include "kvplane/io/cache_file.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

struct Shape {
    Index key_dim, value_dim;
};

/// A recipe and a shape: those of most tests, and two that no power of two, and an odd one that no pair,
/// divides.
class Roads : public testing::TestWithParam<std::string> {
  protected:
    static constexpr Index all = 430;

    static std::vector<CacheConfiguration> configurations() {
        std::vector<CacheConfiguration> made;
        for (const Shape& shape : {Shape{32, 48}, Shape{80, 33}, Shape{33, 80}}) {
            made.push_back(configuration(GetParam(), 2, 2, shape.key_dim, shape.value_dim));
            CacheConfiguration& c = made.back();
            if (shape.key_dim % 2 == 1) c.rope.reset();
            // Groups of latents and blocks of channels that do not divide the shape are refused.
            TilePool pool;
            try {
                KvCache cache(c, pool);
            } catch (const Error& error) {
                EXPECT_NE(shape.key_dim, 32) << error.what();
                made.pop_back();
            }
        }
        return made;
    }
    void draw(const CacheConfiguration& c) {
        keys_ = normal_matrix(random_, all, c.kv_heads * c.key_head_dim, 2.0f);
        values_ = normal_matrix(random_, all, c.kv_heads * c.value_head_dim);
    }
    void append_some(KvCache& cache, Index count) {
        const Index first = cache.tokens();
        append(cache, keys_.middleRows(first, count), values_.middleRows(first, count));
    }
    void draft(KvCache& cache, Index count) {
        const Index first = cache.tokens();
        append_provisional(cache, keys_.middleRows(first, count), values_.middleRows(first, count));
    }
    /// Other tokens, larger ones.
    void append_wrong(KvCache& cache, Index count, bool provisional) {
        const Matrix k = normal_matrix(random_, count, keys_.cols(), 9.0f),
                     v = normal_matrix(random_, count, values_.cols(), 9.0f);
        provisional ? append_provisional(cache, k, v) : append(cache, k, v);
    }
    Index up_to(Index most) { return std::uniform_int_distribution<Index>(0, most)(random_); }

    /// The end of sinks, of pages, of tiles, and where tiles and a basis are due; one token before and
    /// after each.
    static std::vector<Index> borders(const CacheConfiguration& c) {
        const CacheRecipe& r = c.recipe;
        std::vector<Index> found;
        for (const Index from : {Index{0}, r.sink_tokens})
            for (const Index behind :
                 {Index{0}, Index{32}, tile_tokens, tile_tokens + r.recent_tokens, 2 * tile_tokens,
                  2 * tile_tokens + r.recent_tokens, r.latents ? r.latents->fit_tokens : tile_tokens})
                for (const Index off : {-1, 0, 1})
                    if (const Index at = from + behind + off; at >= 0 && at < all) found.push_back(at);
        std::sort(found.begin(), found.end());
        found.erase(std::unique(found.begin(), found.end()), found.end());
        return found;
    }
    /// Fitting a basis or an interval takes long: of the borders of such recipes every fourth, others from
    /// shape to shape.
    std::vector<Index> some_borders(const CacheConfiguration& c) {
        std::vector<Index> found = borders(c);
        const CacheRecipe& r = c.recipe;
        if (!r.latents && r.keys.rule.clip == Clip::none) return found;
        std::vector<Index> some;
        for (std::size_t i = phase_++ % 4; i < found.size(); i += 4) some.push_back(found[i]);
        return some;
    }

    std::size_t phase_ = 0;
    /// Draws the tokens; returns the file of a cache that took all of them at once.
    std::vector<std::byte> drawn(const CacheConfiguration& c) {
        draw(c);
        KvCache plain(c, pool_);
        append_some(plain, all);
        return to_bytes(plain);
    }

    std::mt19937_64 random_{seed()};
    TilePool pool_;
    Matrix keys_, values_;
};

TEST_P(Roads, MeetAfterAnyBorder) {
    for (const CacheConfiguration& c : configurations()) {
        SCOPED_TRACE("head_dims " + std::to_string(c.key_head_dim) + " and " +
                     std::to_string(c.value_head_dim));
        const std::vector<std::byte> expected = drawn(c);
        KvCache until(c, pool_);
        for (const Index border : some_borders(c)) {
            SCOPED_TRACE("a border at " + std::to_string(border));
            append_some(until, border - until.tokens());
            const std::vector<std::byte> before = to_bytes(until);

            KvCache in_two = until.fork();
            append_some(in_two, all - border);
            ASSERT_EQ(to_bytes(in_two), expected) << "forked";
            ASSERT_EQ(to_bytes(until), before) << "what was forked";

            // The fork goes astray; what it came from goes on.
            KvCache going_on = until.fork(), astray = going_on.fork();
            append_wrong(astray, 150, false);
            append_some(going_on, all - border);
            ASSERT_EQ(to_bytes(going_on), expected) << "forked from";

            KvCache loaded = load_cache(before, c, pool_);
            ASSERT_EQ(to_bytes(loaded), before);
            append_some(loaded, all - border);
            ASSERT_EQ(to_bytes(loaded), expected) << "saved and loaded";

            KvCache drafted = until.fork();
            draft(drafted, std::min<Index>(all - border, 7));
            append_wrong(drafted, 3, true);
            drafted.truncate(drafted.tokens() - 3);
            drafted.accept(drafted.provisional_tokens() / 2);
            ASSERT_EQ(drafted.tokens(), border + std::min<Index>(all - border, 7));
            append_some(drafted, all - drafted.tokens());
            ASSERT_EQ(to_bytes(drafted), expected) << "drafted";

            KvCache taken_back = until.fork();
            append_wrong(taken_back, 40, true);
            taken_back.truncate(border);
            ASSERT_EQ(to_bytes(taken_back), before) << "taken back";
            append_some(taken_back, all - border);
            ASSERT_EQ(to_bytes(taken_back), expected) << "taken back";
        }
    }
}

/// All of it in any order. KVPLANE_TEST_ROUNDS=N draws N roads instead of 5.
TEST_P(Roads, MeetHoweverTheyWind) {
    for (const CacheConfiguration& c : configurations()) {
        SCOPED_TRACE("head_dims " + std::to_string(c.key_head_dim) + " and " +
                     std::to_string(c.value_head_dim));
        const std::vector<std::byte> expected = drawn(c);
        for (int round = 0, most = rounds(sanitized ? 1 : 5); round < most; ++round) {
            KvCache cache(c, pool_);
            std::string road;
            while (cache.tokens() < all) {
                const Index left = all - cache.tokens(),
                            count = std::min(left, up_to(2) == 0 ? up_to(140) : up_to(12));
                switch (up_to(5)) {
                    case 0:
                    case 1:
                        append_some(cache, count);
                        road += " append " + std::to_string(count);
                        break;
                    case 2:
                        draft(cache, count);
                        road += " draft " + std::to_string(count);
                        if (const Index some = up_to(2 * cache.provisional_tokens());
                            some <= cache.provisional_tokens()) {
                            cache.accept(some);
                            road += " accept " + std::to_string(some);
                        }
                        break;
                    case 3: {
                        const Index tokens = cache.tokens();
                        append_wrong(cache, count, true);
                        cache.truncate(tokens);
                        road += " take back " + std::to_string(count);
                        break;
                    }
                    case 4: {
                        KvCache fork = cache.fork();
                        append_wrong(up_to(1) ? fork : cache, count, up_to(1) == 0);
                        if (fork.tokens() <= cache.tokens()) cache = std::move(fork);
                        road += " fork";
                        break;
                    }
                    default:
                        cache.accept();
                        cache = load_cache(to_bytes(cache), c, pool_);
                        road += " load";
                }
            }
            cache.accept();
            ASSERT_EQ(to_bytes(cache), expected) << road;
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Recipes, Roads, testing::ValuesIn(thinned(recipe_names())), test_name);

}  // namespace
