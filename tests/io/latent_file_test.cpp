// Files of statistics and bases: exact when they come back, refused when they are damaged or belong
// elsewhere; what could not be loaded is not saved.
#include "kvplane/io/latent_file.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "cache/cache_support.hpp"
#include "cache/latent_sequence.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/latent/fit.hpp"
#include "test_folder.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

class LatentFiles : public FolderTest {
  protected:
    Calibration calibration(std::uint64_t seed) const {
        const CacheConfiguration c = configuration("latent:3:3");
        Calibration made{"a model", c.rope, {}};
        for (std::uint64_t layer = 0; layer < 3; ++layer)
            made.layers.push_back(statistics(c, Sequence(c, 400, seed + layer)));
        return made;
    }
};

TEST_F(LatentFiles, StatisticsComeBackExactlyAndMerge) {
    const Calibration first = calibration(1), second = calibration(100);
    save_calibration(first, folder_ / "first");
    Calibration loaded = load_calibration(folder_ / "first", "a model");
    ASSERT_EQ(loaded.layers.size(), 3u);
    EXPECT_EQ(loaded.rope, first.rope);
    for (std::size_t i = 0; i < 3; ++i) {
        EXPECT_EQ(loaded.layers[i].keys().scatter(), first.layers[i].keys().scatter());
        EXPECT_EQ(loaded.layers[i].keys().mean(), first.layers[i].keys().mean());
        EXPECT_EQ(loaded.layers[i].queries(1).scatter(), first.layers[i].queries(1).scatter());
        EXPECT_EQ(loaded.layers[i].queries(1).count(), 800.0);
    }
    loaded.merge(second);
    EXPECT_EQ(loaded.layers[2].keys().count(), 800.0);
    Calibration other = second;
    other.model = "another";
    refusal(ErrorCode::mismatch, [&] { loaded.merge(other); });
    other = second;
    other.rope->base = 3.0;
    refusal(ErrorCode::mismatch, [&] { loaded.merge(other); });
    other = second;
    other.layers.pop_back();
    refusal(ErrorCode::mismatch, [&] { loaded.merge(other); });
    EXPECT_EQ(loaded.layers[2].keys().count(), 800.0);
    refusal(ErrorCode::mismatch, [&] { load_calibration(folder_ / "first", "another"); });
    refusal(ErrorCode::mismatch, [&] { load_latent_keys(folder_ / "first"); });
    refusal(ErrorCode::io, [&] { load_calibration(folder_ / "nothing"); });
}

TEST_F(LatentFiles, WeightedQueriesComeBackExactly) {
    const CacheConfiguration c = configuration("latent:3:3");
    Calibration weighted{"a model", c.rope, {}};
    const Sequence tokens(c, 400, 5);
    LatentStatistics& layer = weighted.layers.emplace_back(c.kv_heads, c.query_heads, c.key_head_dim);
    layer.add_keys({tokens.keys_before, 0});
    Matrix weights(400, c.query_heads);
    for (Index t = 0; t < 400; ++t) weights.row(t).setConstant(1.0f / static_cast<float>(1 + t));
    layer.add_queries(tokens.queries_before, weights);
    save_calibration(weighted, folder_ / "weighted");
    const Calibration loaded = load_calibration(folder_ / "weighted");
    ASSERT_EQ(loaded.layers[0].weighted_queries().size(), 2u);
    EXPECT_EQ(loaded.layers[0].basis_queries(1).scatter(), layer.basis_queries(1).scatter());
    EXPECT_NE(loaded.layers[0].basis_queries(1).scatter(), layer.queries(1).scatter());
}

TEST_F(LatentFiles, BasesComeBackExactly) {
    const Calibration from = calibration(1);
    for (const char* recipe : {"latent:3:3", "svdq:2", "weighted:3:3", "latent:2:2+heads_together=0"}) {
        CacheConfiguration c = configuration(recipe);
        const auto layers = fit_latent_keys(from.layers, from.rope, *c.recipe.latents);
        save_latent_keys(layers, "a model", folder_ / "bases");
        const auto loaded = load_latent_keys(folder_ / "bases", "a model");
        ASSERT_EQ(loaded.size(), layers.size());
        const Sequence s(c, 400, seed());
        TilePool pool;
        std::vector<std::byte> saved[2];
        for (int which : {0, 1}) {
            c.latent_keys = which == 0 ? layers[1] : loaded[1];
            KvCache cache(c, pool);
            cache.append(s.keys, s.values);
            saved[which] = to_bytes(cache);
        }
        EXPECT_EQ(saved[0], saved[1]) << recipe;
        refusal(ErrorCode::mismatch, [&] { load_latent_keys(folder_ / "bases", "another"); });
        refusal(ErrorCode::mismatch, [&] { load_calibration(folder_ / "bases"); });
    }
    // Another layer's basis has other numbers: a cache saved with one is not read with the other.
    CacheConfiguration c = configuration("latent:3:3");
    const auto layers = fit_latent_keys(from.layers, from.rope, *c.recipe.latents);
    TilePool pool;
    c.latent_keys = layers[0];
    const std::vector<std::byte> bytes = to_bytes(KvCache(c, pool));
    c.latent_keys = layers[1];
    refusal(ErrorCode::mismatch, [&] { load_cache(bytes, c, pool); });
}

TEST_F(LatentFiles, DamagedOnesAreRefused) {
    save_calibration(calibration(1), folder_ / "good");
    const SafetensorsFile file = SafetensorsFile::open(folder_ / "good");
    const auto rewritten = [&](const std::string& tensor, const std::string& key, const std::string& value) {
        SafetensorsWriter writer;
        for (const std::string& name : file.names())
            if (name != tensor)
                writer.add(name, file.info(name).shape, file.info(name).dtype, file.bytes(name));
        for (const auto& [name, text] : file.metadata())
            if (name != key || !value.empty()) writer.metadata(name, name == key ? value : text);
        writer.write(folder_ / "bad");
    };
    rewritten("layers.1.keys.mean", "", "");
    EXPECT_NE(
        refusal(ErrorCode::format, [&] { load_calibration(folder_ / "bad"); }).find("layers.1.keys.mean"),
        std::string::npos);
    for (const auto& [key, value] : std::vector<std::pair<std::string, std::string>>{
             {"kvplane.heads", ""},
             {"kvplane.heads", "{"},
             {"kvplane.heads", R"({"layers":3,"kv_heads":-2,"query_heads":4,"head_dim":32})"},
             {"kvplane.heads", R"({"layers":9999999,"kv_heads":2,"query_heads":4,"head_dim":32})"},
             {"kvplane.rope", R"({"dims":0,"base":"x","frequencies":[],"layout":"halves"})"}}) {
        rewritten("", key, value);
        refusal(ErrorCode::format, [&] { load_calibration(folder_ / "bad"); });
    }
    rewritten("", "kvplane.heads", R"({"layers":3,"kv_heads":2,"query_heads":4,"head_dim":33})");
    refusal(ErrorCode::shape, [&] { load_calibration(folder_ / "bad"); });
    Calibration infinite = calibration(1);
    refusal(ErrorCode::not_finite, [&] {
        MatrixD scatter = infinite.layers[0].keys().scatter();
        scatter(0, 0) = std::numeric_limits<double>::infinity();
        SecondMoments(400.0, infinite.layers[0].keys().mean(), scatter);
    });
}

/// An unknown layout of pairs is not taken for a known one.
TEST_F(LatentFiles, UnknownRopeLayoutsAreRefused) {
    const auto loaded = [&](const std::string& layout) {
        save_calibration(calibration(1), folder_ / "good");
        const SafetensorsFile file = SafetensorsFile::open(folder_ / "good");
        SafetensorsWriter writer;
        for (const std::string& name : file.names())
            writer.add(name, file.info(name).shape, file.info(name).dtype, file.bytes(name));
        for (const auto& [name, text] : file.metadata())
            writer.metadata(name,
                            name == "kvplane.rope"
                                ? R"({"base":500000.0,"dims":0,"frequencies":[],"layout":")" + layout + "\"}"
                                : text);
        writer.write(folder_ / "changed");
        return load_calibration(folder_ / "changed").rope->layout;
    };
    EXPECT_EQ(loaded("interleaved"), RopeLayout::interleaved);
    EXPECT_EQ(loaded("halves"), RopeLayout::halves);
    for (const char* unknown : {"half", "", "Halves", "interleaved ", "neox"})
        EXPECT_NE(refusal(ErrorCode::format, [&] { loaded(unknown); }).find("layout"), std::string::npos);
}

TEST_F(LatentFiles, WhatCannotBeLoadedIsNotSaved) {
    const auto refused = [&](ErrorCode code, auto&& change) {
        Calibration changed = calibration(1);
        change(changed);
        const std::string sentence = refusal(code, [&] { save_calibration(changed, folder_ / "bad"); });
        EXPECT_FALSE(std::filesystem::exists(folder_ / "bad")) << sentence;
        return sentence;
    };
    refused(ErrorCode::option, [](Calibration& c) { c.layers.clear(); });
    EXPECT_NE(refused(ErrorCode::option, [](Calibration& c) { c.layers[1] = LatentStatistics(1, 4, 32); })
                  .find("layer 1"),
              std::string::npos);
    refused(ErrorCode::option, [](Calibration& c) { c.layers[2] = LatentStatistics(2, 8, 32); });
    refused(ErrorCode::option,
            [](Calibration& c) { c.rope->base = std::numeric_limits<double>::infinity(); });
    refused(ErrorCode::option, [](Calibration& c) { c.rope->frequencies = {NAN}; });
    refused(ErrorCode::option, [](Calibration& c) { c.rope->dims = Index{1} << 31; });
    refused(ErrorCode::option, [](Calibration& c) { c.rope->dims = -2; });
    refused(ErrorCode::option, [](Calibration& c) { c.model = "\xff"; });
    // Merging finite moments that lie 1e200 apart overflows.
    EXPECT_NE(refused(ErrorCode::not_finite,
                      [](Calibration& c) {
                          const Index channels = c.layers[2].keys().channels();
                          LatentStatistics far(4,
                                               SecondMoments(1.0, Eigen::VectorXd::Constant(channels, 1e200),
                                                             MatrixD::Zero(channels, channels)),
                                               {c.layers[2].queries(0), c.layers[2].queries(1)});
                          c.layers[2].merge(far);
                      })
                  .find("layer 2"),
              std::string::npos);
    Calibration many = calibration(1);
    many.layers.assign((1 << 16) + 1, LatentStatistics(1, 1, 1));
    many.rope.reset();
    refusal(ErrorCode::option, [&] { save_calibration(many, folder_ / "bad"); });

    // Without queries, of which SVDq needs none, statistics are whole.
    Calibration keys_only = calibration(1);
    for (LatentStatistics& layer : keys_only.layers)
        layer = LatentStatistics(4, layer.keys(), {SecondMoments(32), SecondMoments(32)});
    save_calibration(keys_only, folder_ / "keys");
    EXPECT_EQ(load_calibration(folder_ / "keys").layers[0].keys().mean(), keys_only.layers[0].keys().mean());

    const LatentRecipe recipe = *configuration("latent:3:3").recipe.latents;
    LatentRecipe endless = recipe;
    endless.basis.context = Index{1} << 31;
    const Calibration from = calibration(1);
    const auto layers = fit_latent_keys(from.layers, from.rope, endless);
    EXPECT_NE(refusal(ErrorCode::option, [&] { save_latent_keys(layers, "a model", folder_ / "bad"); })
                  .find("context"),
              std::string::npos);
    EXPECT_FALSE(std::filesystem::exists(folder_ / "bad"));
}

}  // namespace
