// What a saved cache is refused for: every other configuration, and every byte that differs. A refusal
// leaves the pool as it was.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cache/cache_support.hpp"
#include "kvplane/io/cache_file.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

KvCache filled(const CacheConfiguration& c, TilePool& pool, Index tokens) {
    std::mt19937_64 random(11);
    KvCache cache(c, pool);
    append(cache, normal_matrix(random, tokens, c.kv_heads * c.key_head_dim),
           normal_matrix(random, tokens, c.kv_heads * c.value_head_dim));
    return cache;
}

/// What may not change where a load is refused.
struct PoolCount {
    Index bytes, used;

    static PoolCount of(const TilePool& pool) { return {pool.bytes(), pool.pages() - pool.unused_pages()}; }
    bool operator==(const PoolCount&) const = default;
};

/// The code of the refusal; none where it loads.
std::optional<ErrorCode> load_error(const std::vector<std::byte>& bytes, const CacheConfiguration& c,
                                    TilePool& pool) {
    const PoolCount before = PoolCount::of(pool);
    std::optional<ErrorCode> code;
    try {
        (void)load_cache(bytes, c, pool);
    } catch (const Error& error) {
        code = error.code();
    }
    EXPECT_EQ(PoolCount::of(pool), before);
    return code;
}

struct Change {
    const char* what;
    void (*change)(CacheConfiguration& c);
};

/// Shapes that hold as many bytes, and settings of which no byte says that they differ: a cache that was
/// read as one of these would answer, and be wrong.
TEST(Restore, AnotherConfigurationIsAMismatch) {
    const Change changes[] = {
        {"rotation seed", [](CacheConfiguration& c) { c.rotation_seed = 1; }},
        {"widths of keys and values swapped",
         [](CacheConfiguration& c) { std::swap(c.recipe.keys.bits, c.recipe.values.bits); }},
        {"dims of keys and values swapped",
         [](CacheConfiguration& c) { std::swap(c.key_head_dim, c.value_head_dim); }},
        {"one head of twice the channels",
         [](CacheConfiguration& c) { c.kv_heads = 1, c.key_head_dim *= 2, c.value_head_dim *= 2; }},
        {"two heads of half the channels",
         [](CacheConfiguration& c) { c.kv_heads *= 2, c.key_head_dim /= 2, c.value_head_dim /= 2; }},
        {"grids of other groups", [](CacheConfiguration& c) { c.recipe.keys.rule.group = 64; }},
        {"another scheme", [](CacheConfiguration& c) { c.recipe.keys.rule.scheme = Scheme::cell; }},
        {"rotated keys", [](CacheConfiguration& c) { c.recipe.keys.rotate = !c.recipe.keys.rotate; }},
        {"values not rotated",
         [](CacheConfiguration& c) { c.recipe.values.rotate = !c.recipe.values.rotate; }},
        {"other sinks", [](CacheConfiguration& c) { c.recipe.sink_tokens += 1; }},
        {"other recent tokens", [](CacheConfiguration& c) { c.recipe.recent_tokens += 1; }},
        {"recent tokens of 8 bits", [](CacheConfiguration& c) { c.recipe.recent_bits = 8; }},
        {"recent keys of 8 bits", [](CacheConfiguration& c) { c.recipe.recent_key_bits = 8; }},
    };
    TilePool pool;
    for (const char* recipe : {"key_favored:5:3", "key_favored:3:5+rotate_keys=1"})
        for (const Index tokens : {0, 3, 50, 300}) {
            const CacheConfiguration c = configuration(recipe, 2, 4, 64, 96);
            const std::vector<std::byte> bytes = to_bytes(filled(c, pool, tokens));
            EXPECT_EQ(load_error(bytes, c, pool), std::nullopt);
            for (const Change& change : changes) {
                CacheConfiguration other = c;
                change.change(other);
                ASSERT_FALSE(other == c) << change.what;
                EXPECT_EQ(load_error(bytes, other, pool), ErrorCode::mismatch)
                    << recipe << ", " << tokens << " tokens: " << change.what;
            }
        }
}

/// Latents are turned by the model's RoPE when they are read.
TEST(Restore, LatentsOfAnotherRopeAreAMismatch) {
    const Change changes[] = {
        {"base", [](CacheConfiguration& c) { c.rope->base *= 2.0; }},
        {"layout",
         [](CacheConfiguration& c) {
             c.rope->layout =
                 c.rope->layout == RopeLayout::halves ? RopeLayout::interleaved : RopeLayout::halves;
         }},
        {"none", [](CacheConfiguration& c) { c.rope.reset(); }},
        {"context", [](CacheConfiguration& c) { c.recipe.latents->basis.context *= 2; }},
        {"one basis for all heads",
         [](CacheConfiguration& c) {
             c.recipe.latents->own_heads_together = !c.recipe.latents->own_heads_together;
         }},
    };
    TilePool pool;
    for (const char* recipe :
         {"latent:3:3+fit_tokens=130", "svdq:2+fit_tokens=140", "weighted:3:16+fit_tokens=150"})
        for (const Index tokens : {100, 400}) {  // before a basis is fitted, and after
            const CacheConfiguration c = configuration(recipe);
            const std::vector<std::byte> bytes = to_bytes(filled(c, pool, tokens));
            EXPECT_EQ(load_error(bytes, c, pool), std::nullopt);
            for (const Change& change : changes) {
                CacheConfiguration other = c;
                change.change(other);
                EXPECT_EQ(load_error(bytes, other, pool), ErrorCode::mismatch)
                    << recipe << ", " << tokens << " tokens: " << change.what;
            }
        }
}

/// Memory that ends at any page: what was restored until then goes back.
TEST(Restore, GivesAllPagesBackWhereMemoryEnds) {
    for (const char* recipe : {"fp16", "standard", "latent:3:3+fit_tokens=130"}) {
        FailingMemory memory;
        TilePool pool(&memory);
        const CacheConfiguration c = configuration(recipe);
        const KvCache cache = filled(c, pool, 400);
        const std::vector<std::byte> bytes = to_bytes(cache);
        std::vector<std::vector<std::byte>> files{bytes};
        if (can_compress()) files.push_back(to_bytes(cache, {.compress = true}));
        const Index used = pool.pages() - pool.unused_pages();
        for (const std::vector<std::byte>& file : files)
            for (Index left = 0; left <= used; ++left) {
                pool.trim();
                memory.left = left;
                EXPECT_EQ(load_error(file, c, pool),
                          left < used ? std::optional(ErrorCode::out_of_memory) : std::nullopt)
                    << recipe << ", " << left << " pages";
            }
        EXPECT_EQ(to_bytes(cache), bytes);
    }
}

class AlteredFile : public testing::TestWithParam<std::string> {};

/// At every offset one bit, another from byte to byte, and the whole byte. Only what the format itself
/// allows to differ (white space in its header, the names of tensors without elements) may load, and then
/// as the very same cache.
TEST_P(AlteredFile, IsRefusedAtEveryOffset) {
    const CacheConfiguration c = configuration(GetParam(), 1, 1, 8, 8);
    for (const Index tokens : {3, 100, 170}) {
        TilePool pool;
        const std::vector<std::byte> bytes = to_bytes(filled(c, pool, tokens));
        std::vector<std::byte> altered = bytes;
        std::uint64_t header = 0;
        std::memcpy(&header, bytes.data(), 8);
        for (std::size_t at = 0; at < bytes.size(); at += sanitized ? 7 : 1)
            for (const unsigned change : {1u << at % 8, 0xFFu}) {
                altered[at] ^= static_cast<std::byte>(change);
                const std::optional<ErrorCode> code = load_error(altered, c, pool);
                if (code) {
                    ASSERT_TRUE(*code == ErrorCode::format || *code == ErrorCode::mismatch)
                        << name(*code) << ", byte " << at << " of " << tokens << " tokens";
                } else {
                    ASSERT_LT(at, 8 + header) << tokens << " tokens";
                    ASSERT_EQ(to_bytes(load_cache(altered, c, pool)), bytes)
                        << "byte " << at << " of " << tokens << " tokens";
                }
                altered[at] = bytes[at];
            }
        EXPECT_EQ(pool.bytes(), 0);
    }
}

INSTANTIATE_TEST_SUITE_P(Recipes, AlteredFile,
                         testing::Values("fp16", "block32:4", "standard", "key_favored:3:5+recent_bits=8",
                                         "latent:3:3+fit_tokens=130", "svdq:2+fit_tokens=140"),
                         test_name);

}  // namespace
