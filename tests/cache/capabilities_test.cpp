// What capabilities() says is what the cache does: every call that it promises works, every other one is refused.
#include "kvplane/cache/capabilities.hpp"

#include <gtest/gtest.h>

#include "cache_support.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/recipes.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

/// Whether the call goes through; anything but a refusal as an option is a failure of the test.
template <class Call>
bool works(const Call& call) {
    try {
        call();
        return true;
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::option) << error.what();
        return false;
    }
}

TEST(Capabilities, AreWhatTheCacheDoes) {
    std::mt19937_64 random(seed());
    std::vector<std::string> names = with(recipe_names(), token_grid_names());
    for (const char* more : {"kivi:8", "latent:3:3+frame=before_rope+fit_tokens=130", "key_favored:16:4"})
        names.push_back(more);
    for (const std::string& name : names) {
        SCOPED_TRACE(name);
        const CacheConfiguration c = configuration(name);
        const CacheCapabilities can = capabilities(c);
        TilePool pool;
        KvCache cache(c, pool);
        EXPECT_EQ(cache.needs_queries(), can.wants_queries);
        EXPECT_EQ(works([&] { (void)KvCache::predicted_bytes(c, 100); }), can.predicts_bytes);
        const Matrix keys = normal_matrix(random, 500, 64), values = normal_matrix(random, 500, 96),
                     q = normal_matrix(random, 2, 128);
        append(cache, keys, values);
        EXPECT_EQ(cache.latent_keys() != nullptr, can.fits_basis);
        const auto reads = [&](const ReadPolicy& policy) {
            return works([&] {
                AttentionParameters parameters;
                parameters.read = policy;
                (void)attend(cache, q, parameters);
            });
        };
        EXPECT_EQ(reads(recipes::read_policy("fixed8")), can.reads_by_bits);
        EXPECT_EQ(reads(recipes::read_policy("9")), can.reads_by_bits);
        EXPECT_EQ(reads(recipes::read_policy("tolerance=0.1")), can.reads_by_tolerance);
        EXPECT_EQ(reads(recipes::read_policy("aligned")), can.reads_by_exponents);
        EXPECT_EQ(works([&] {
                      AttentionParameters parameters;
                      parameters.key_fraction = 0.5;
                      (void)attend(cache, q, parameters);
                  }),
                  can.selects_keys);
        AttentionWorkspace workspace;
        Matrix out(2, 192);
        cache.attend(q, out, {}, workspace);
        EXPECT_EQ(workspace.report().mean_bits > 0.0, can.decodes_packed);
        EXPECT_EQ(can.decodes_tiles_because.empty(), can.decodes_packed);
        EXPECT_STREQ(can.path(), can.decodes_packed ? "packed bits" : "decoded tiles");

        KvCache again = cache.fork();
        again.truncate(200);
        append(again, keys.bottomRows(300), values.bottomRows(300));
        EXPECT_EQ(to_bytes(again) == to_bytes(cache), can.truncates_exactly);

        EXPECT_EQ(works([&] { cache.fork().remove(200, 300); }), can.removes);
        if (c.recipe.latents) continue;  // the widths of their segments follow from the basis
        const auto narrows = [&](TileSide side, int bits) {
            KvCache narrow = cache.fork();
            const bool keys = side == TileSide::keys;
            if (!works([&] { narrow.narrow(0, 500, keys ? bits : 16, keys ? 16 : bits); })) return false;
            return narrow.bytes() < cache.bytes();
        };
        for (const TileSide side : {TileSide::keys, TileSide::values}) {
            std::vector<int> widths;
            const bool is_keys = side == TileSide::keys;
            // A width between two is taken for the next below, which the cache has then no fewer bytes than.
            for (int bits = (is_keys ? c.recipe.keys : c.recipe.values).bits - 1; bits > 0; --bits)
                if (narrows(side, bits)) {
                    KvCache narrow = cache.fork();
                    narrow.narrow(0, 500, is_keys ? bits : 16, is_keys ? 16 : bits);
                    const auto& most = narrow.state().narrowed.back().most_bits;
                    if (most[side] == bits) widths.push_back(bits);
                }
            EXPECT_EQ(widths, is_keys ? can.narrower_keys : can.narrower_values);
        }
    }
}

TEST(Capabilities, SayWhyTilesAreDecoded) {
    const auto why = [](const CacheConfiguration& c) { return capabilities(c).decodes_tiles_because; };
    for (const char* packed : {"block32:8", "block32:4:rotated", "block32:3+key_group=1000", "kivi:4:32",
                               "latent:3:3", "fp16", "key_favored:4:4+value_group=16"})
        EXPECT_EQ(why(configuration(packed)), "") << packed;
    EXPECT_EQ(why(configuration("svdq:2")),
              "keys are latents before RoPE, each of which has an angle of its own to be turned by");
    EXPECT_EQ(
        why(configuration("block32:4+key_group=24")),
        "keys have grids per_token over 24 channels, and packed bits are read of the head or multiples of "
        "32 channels, where units of planes begin");
    EXPECT_EQ(
        why(configuration("key_favored:4:4+value_group=24")),
        "values have grids per_token over 24 channels, and packed bits are read of grids per_token over "
        "the head or multiples of 16 channels");
    CacheConfiguration by_channel = configuration("key_favored:4:4");
    by_channel.recipe.values.rule = by_channel.recipe.keys.rule;
    EXPECT_EQ(
        why(by_channel),
        "values have grids per_channel over 128 tokens, and packed bits are read of grids per_token over "
        "the head or multiples of 16 channels");
}

TEST(Capabilities, RefuseAConfigurationThatCannotBe) {
    CacheConfiguration c = configuration("standard");
    c.query_heads = 3;
    refusal(ErrorCode::option, [&] { (void)capabilities(c); });
}

}  // namespace
