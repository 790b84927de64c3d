// Names of recipes: what they mean, and how wrong ones are refused.
#include "kvplane/recipe_names.hpp"
#include "kvplane/recipes.hpp"

#include <gtest/gtest.h>

#include "cache/cache_support.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using kvplane_test::refusal;

TEST(Recipes, NamesGiveTheRecipes) {
    EXPECT_EQ(recipes::parse("fp16"), recipes::fp16());
    EXPECT_EQ(recipes::parse("block32:4"), recipes::block32(4));
    EXPECT_EQ(recipes::parse("block32:8:rotated"), recipes::block32(8, true));
    EXPECT_EQ(recipes::parse("kivi:4"), recipes::kivi(4));
    EXPECT_EQ(recipes::parse("kivi:2:32"), recipes::kivi(2, 32));
    EXPECT_EQ(recipes::parse("key_favored:4:2"), recipes::key_favored(4, 2));
    EXPECT_EQ(recipes::parse("standard"), recipes::standard());
    EXPECT_EQ(recipes::parse("compact"), recipes::compact());
    EXPECT_EQ(recipes::parse("smallest"), recipes::smallest());
    CacheRecipe smallest = recipes::parse(
        "key_favored:3:2+shaped_keys=1+rotate_keys=by_tile+value_widths=16x4/80x2/32x1+recent_bits=8+"
        "recent_key_bits=16");
    smallest.name = "smallest";
    EXPECT_EQ(smallest, recipes::smallest());
}

TEST(Recipes, SettingsChangeOneThingEach) {
    const CacheRecipe r = recipes::parse(
        "key_favored:4:3+sinks=1+recent=64+recent_bits=8+key_scheme=cell+value_scheme=symmetric+key_clip=1+"
        "value_clip=0+rotate_keys=1+rotate_values=0+key_group=32+value_group=16");
    EXPECT_EQ(r.sink_tokens, 1);
    EXPECT_EQ(r.recent_tokens, 64);
    EXPECT_EQ(r.recent_bits, 8);
    EXPECT_EQ(r.keys, (SideRecipe{4, {Granularity::per_channel, 32, Scheme::cell, Clip::mse_optimal}, true}));
    EXPECT_EQ(r.values, (SideRecipe{3, {Granularity::per_token, 16, Scheme::symmetric, Clip::none}, false}));
    EXPECT_EQ(recipes::parse("kivi:4:32+value_group=0").values.rule.group, whole_head);
    const SideRecipe by_token = recipes::parse("key_favored:4:2+value_widths=32x4/32x2/64x1").values;
    EXPECT_EQ(by_token.widths, (std::vector<TokenRun>{{32, 4}, {32, 2}, {64, 1}}));
    EXPECT_EQ(by_token.bits, 4);
}

/// The parser, the sentence of its error and the help all print the one table.
TEST(Recipes, TheTableIsTheOnlyListOfNames) {
    const std::string help = recipes::help(),
                      sentence = kvplane_test::refusal(ErrorCode::option, [] { recipes::parse("no such"); });
    ASSERT_GE(recipes::table().size(), 9u);
    for (const recipes::NamedRecipe& recipe : recipes::table()) {
        EXPECT_NE(help.find(recipe.grammar), std::string::npos) << recipe.grammar;
        EXPECT_NE(help.find(recipe.summary), std::string::npos) << recipe.summary;
        EXPECT_NE(sentence.find(recipe.grammar), std::string::npos) << recipe.grammar;
    }
    for (const std::string_view setting :
         {"sinks=", "value_group=", "frame=", "fit_tokens=", "tolerance=0.01"})
        EXPECT_NE(help.find(setting), std::string::npos) << setting;
}

TEST(Recipes, WrongNamesAreRefusedWithTheReason) {
    for (const auto& [text, word] : std::vector<std::pair<std::string, std::string>>{
             {"", "expected fp16"},
             {"fp32", "expected fp16"},
             {"fp16:4", "expected fp16"},
             {"kivi", "expected fp16"},
             {"kivi:four", "'four'"},
             {"kivi:4:32:1", "expected fp16"},
             {"kivi:9", "9 bits"},
             {"block32:4:turned", "'turned', expected rotated"},
             {"kivi:4:7", "grids over 7 tokens"},
             {"standard+key_group=100", "grids over 100 tokens"},
             {"standard+value_group=-1", "grids over -1 channels"},
             {"latent:3:3+value_group=-1", "grids over -1 channels"},
             {"key_favored:1:4+key_scheme=symmetric", "symmetric"},
             {"key_favored:4:4+key_scheme=unbiased", "unbiased"},
             {"key_favored:4", "expected fp16"},
             {"key_favored:4:2+sinks", "needs a value"},
             {"key_favored:4:2+value_widths=32x4", "1 widths"},
             {"key_favored:4:2+value_widths=32x4/32x2", "64 tokens"},
             {"key_favored:4:2+value_widths=64/64x2", "such as 32x4"},
             {"key_favored:4:2+sinks=", "expected a number"},
             {"key_favored:4:2+sinks=-1", "-1 sink"},
             {"key_favored:4:2+colour=3", "unknown setting 'colour'"},
             {"key_favored:4:2+key_scheme=round", "'round'"},
             {"key_favored:4:2+recent_bits=4", "recent tokens of 4 bits"},
             {"fp16+recent=3", "no recent tokens"},
             {"standard+", "unknown setting ''"}}) {
        const std::string sentence =
            kvplane_test::refusal(ErrorCode::option, [&, name = text] { recipes::parse(name); });
        EXPECT_NE(sentence.find(word), std::string::npos) << sentence;
    }
}

/// True bits of long contexts, by hand: widths, and grids of 32 bits for 128 tokens (keys) and 64 channels
/// (values); sinks, the recent tokens and page headers are what is left.
TEST(Recipes, TrueBitsAtLongContexts) {
    const auto bits = [](const char* name) {
        const CacheConfiguration c = kvplane_test::configuration(name, 3, 9, 64, 64);
        const Index tokens = 1 << 20;
        return 8.0 * static_cast<double>(KvCache::predicted_bytes(c, tokens)) /
               static_cast<double>(tokens * c.elements_per_token());
    };
    EXPECT_NEAR(bits("block32:4"), 4.5, 0.02);
    EXPECT_NEAR(bits("key_favored:4:4"), (4.25 + 4.125) / 2, 0.02);
    EXPECT_NEAR(bits("key_favored:4:4+value_scheme=min_max"), (4.25 + 4.5) / 2, 0.02);
    EXPECT_NEAR(bits("kivi:4:32"), 5.0, 0.02);
    EXPECT_NEAR(bits("fp16"), 16.0 + 0.5 * 8.0 / 128.0, 0.02);
    EXPECT_NEAR(bits("standard"), (5.25 + 3.125) / 2, 0.02);
    EXPECT_NEAR(bits("compact"), (4.25 + 2.125) / 2, 0.02);
    EXPECT_NEAR(bits("smallest"), (3.25 + 2.19) / 2, 0.02);
}

TEST(Recipes, AnAllocationBecomesOneRecipeALayer) {
    KeyFavoredAllocation allocation;
    allocation.layers = {{5, 3, 64, 32}, {2, 1, 128, 64}};
    const std::vector<CacheRecipe> layers = recipes::key_favored(allocation);
    ASSERT_EQ(layers.size(), 2u);
    EXPECT_EQ(layers[0].keys.bits, 5);
    EXPECT_EQ(layers[0].keys.rule.group, 64);
    EXPECT_EQ(layers[1].values.bits, 1);
    EXPECT_EQ(layers[1].values.rule.scheme, Scheme::unbiased);
    allocation.layers[0].value_bits = 1.58;
    kvplane_test::refusal(ErrorCode::option, [&] { recipes::key_favored(allocation); });
}

TEST(ReadPolicies, AreReadFromTheirNames) {
    using Kind = ReadPolicy::Kind;
    const auto check = [](const char* text, Kind kind, double keys, double values) {
        const ReadPolicy policy = recipes::read_policy(text);
        EXPECT_EQ(policy.kind, kind) << text;
        EXPECT_EQ(policy.key_bits, keys) << text;
        EXPECT_EQ(policy.value_bits, values) << text;
    };
    check("4", Kind::aligned, 4.0, 4.0);
    check("4.5:3", Kind::aligned, 4.5, 3.0);
    EXPECT_TRUE(recipes::read_policy("4").shared);
    EXPECT_FALSE(recipes::read_policy("4:4").shared);
    EXPECT_FALSE(recipes::read_policy("fixed4").shared);
    check("fixed4", Kind::fixed, 4.0, 4.0);
    check("fixed4:8", Kind::fixed, 4.0, 8.0);
    check("tolerance=0.25", Kind::tolerance, 16.0, 16.0);
    EXPECT_EQ(recipes::read_policy("tolerance=0.25").error, 0.25);
    EXPECT_EQ(recipes::read_policy("published").thresholds, AlignmentThresholds::published());
    EXPECT_EQ(recipes::read_policy("aligned").thresholds, AlignmentThresholds::accurate());
    EXPECT_EQ(recipes::read_policy("exponents=1:2:1000").thresholds, AlignmentThresholds::published());
    for (const char* text : {"exponents=", "exponents=1:2", "exponents=3:2:9", "exponents=1:2:-1", "", "x",
                             "4:", "4:3:2", "-1", "17", "fixed", "fixed4x", "tolerance",
                             "tolerance=", "tolerance=-1", "tolerance=nan", "nan", "inf", "publish"})
        EXPECT_NE(refusal(ErrorCode::option, [&] { recipes::read_policy(text); }).find("expected 4"),
                  std::string::npos)
            << text;
}

}  // namespace
