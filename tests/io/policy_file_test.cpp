// Policies of a model: exact when they come back, and refused for another model, where they are damaged, and
// where they are of a newer version.
#include "kvplane/io/policy_file.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/cache_support.hpp"
#include "cache/latent_sequence.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/io/checksum.hpp"
#include "kvplane/io/latent_file.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/latent/fit.hpp"
#include "test_folder.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

constexpr const char* recipes_of_layers[] = {"latent:2:2+recent_bits=8+recent_key_bits=16",
                                             "key_favored:3:2+shaped_keys=1+rotate_keys=1", "standard",
                                             "latent:1.25:3+frame=before_rope", "weighted:3:4"};

void expect_found(const std::string& sentence, const std::string& what) {
    EXPECT_NE(sentence.find(what), std::string::npos) << "'" << sentence << "' does not say '" << what << "'";
}

/// The checksum of a file, as io/policy_file.hpp describes it.
std::string checksum(const SafetensorsFile& file) {
    detail::WordHash sum;
    const auto add = [&](std::string_view text) { add_serial(sum, std::as_bytes(std::span(text))); };
    for (const auto& [key, value] : file.metadata())
        if (key != "kvplane.checksum") add(key), add(value);
    for (const std::string& tensor : file.names()) {
        add(tensor);
        add(name(file.info(tensor).dtype));
        for (const Index side : file.info(tensor).shape) sum.add(static_cast<std::uint64_t>(side));
        add_serial(sum, file.bytes(tensor));
    }
    return sum.text();
}

class PolicyFiles : public FolderTest {
  protected:
    /// A layer for each recipe, with all that it takes. Every second has a RoPE and a context of its own.
    static std::vector<CacheConfiguration> layers() {
        std::vector<CacheConfiguration> made;
        for (const char* recipe : recipes_of_layers) {
            CacheConfiguration c = configuration(recipe);
            if (made.size() % 2 == 1) {
                c.rope->base = 10000.0;
                c.context = 512;
            }
            c.rotation_seed = made.size() + (std::uint64_t{1} << 63);
            const LatentStatistics moments = statistics(c, Sequence(c, 400, 10 + made.size()));
            if (c.recipe.latents) c.latent_keys = fit_latent_keys(moments, c.rope, *c.recipe.latents);
            if (c.recipe.shaped_keys)
                c.query_moments = std::make_shared<const std::vector<SecondMoments>>(
                    std::vector{moments.queries(0), moments.queries(1)});
            made.push_back(c);
        }
        return made;
    }
    /// What an engine knows of the same layers.
    static std::vector<CacheConfiguration> engine_layers() {
        std::vector<CacheConfiguration> known;
        for (const CacheConfiguration& layer : layers()) {
            CacheConfiguration c = configuration("fp16");
            c.rope = layer.rope;
            known.push_back(c);
        }
        return known;
    }
    std::filesystem::path saved() const {
        ModelPolicy("a model", layers()).save(folder_ / "policy");
        return folder_ / "policy";
    }
    /// The saved file with metadata and tensors changed, and, unless it is `damaged`, its checksum made to
    /// fit.
    std::filesystem::path changed(
        const std::function<void(std::map<std::string, std::string>& metadata,
                                 std::map<std::string, std::vector<std::byte>>& tensors)>& change,
        bool damaged = false) const {
        const SafetensorsFile file = SafetensorsFile::open(saved());
        std::map<std::string, std::string> metadata(file.metadata().begin(), file.metadata().end());
        std::map<std::string, std::vector<std::byte>> tensors;
        for (const std::string& name : file.names())
            tensors[name].assign(file.bytes(name).begin(), file.bytes(name).end());
        change(metadata, tensors);
        const auto write = [&] {
            SafetensorsWriter writer;
            for (const auto& [name, bytes] : tensors)
                writer.add(name, file.info(name).shape, file.info(name).dtype, bytes);
            for (const auto& [key, value] : metadata) writer.metadata(key, value);
            writer.write(folder_ / "changed");
        };
        write();
        if (!damaged && metadata.contains("kvplane.checksum")) {
            metadata["kvplane.checksum"] = checksum(SafetensorsFile::open(folder_ / "changed"));
            write();
        }
        return folder_ / "changed";
    }
    std::string refused(ErrorCode code, const std::filesystem::path& path) const {
        const std::string sentence = refusal(code, [&] { ModelPolicy::load(path); });
        expect_found(sentence, path.string());
        return sentence;
    }
};

TEST_F(PolicyFiles, ComeBackExactly) {
    const std::vector<CacheConfiguration> before = layers();
    const ModelPolicy policy = ModelPolicy::load(saved());
    EXPECT_EQ(policy.model(), "a model");
    ASSERT_EQ(policy.configurations().size(), before.size());
    for (std::size_t i = 0; i < before.size(); ++i) {
        CacheConfiguration after = policy.configuration(static_cast<Index>(i));
        EXPECT_EQ(after.recipe, before[i].recipe);
        EXPECT_EQ(after.rope, before[i].rope);
        EXPECT_EQ(after.context, before[i].context);
        EXPECT_EQ(after.rotation_seed, before[i].rotation_seed);
        EXPECT_EQ(after.kv_heads, before[i].kv_heads);
        EXPECT_EQ(after.value_head_dim, before[i].value_head_dim);
        ASSERT_EQ(after.query_moments != nullptr, before[i].query_moments != nullptr);
        for (std::size_t h = 0; after.query_moments && h < 2; ++h) {
            EXPECT_EQ((*after.query_moments)[h].scatter(), (*before[i].query_moments)[h].scatter());
            EXPECT_EQ((*after.query_moments)[h].mean(), (*before[i].query_moments)[h].mean());
            EXPECT_EQ((*after.query_moments)[h].count(), (*before[i].query_moments)[h].count());
        }
        // Caches of both store the same bytes.
        const Sequence sequence(before[i], 300, 99);
        TilePool pool;
        KvCache one(before[i], pool), other(after, pool);
        append(one, sequence.keys, sequence.values);
        append(other, sequence.keys, sequence.values);
        EXPECT_EQ(to_bytes(one), to_bytes(other)) << before[i].recipe.name;
    }
    refusal(ErrorCode::index, [&] { policy.configuration(-1); });
    refusal(ErrorCode::index, [&] { policy.configuration(5); });
    // The same policy makes the same file.
    std::ifstream first(folder_ / "policy", std::ios::binary);
    const std::string bytes(std::istreambuf_iterator<char>(first), {});
    policy.save(folder_ / "again");
    std::ifstream second(folder_ / "again", std::ios::binary);
    EXPECT_EQ(bytes, std::string(std::istreambuf_iterator<char>(second), {}));
}

TEST_F(PolicyFiles, AnotherModelIsRefused) {
    const ModelPolicy policy = ModelPolicy::load(saved());
    const std::vector<CacheConfiguration> known = engine_layers();
    policy.require_model("a model", known);
    const auto refused = [&](const std::string& model, auto&& change) {
        std::vector<CacheConfiguration> other = known;
        change(other);
        return refusal(ErrorCode::mismatch, [&] { policy.require_model(model, other); });
    };
    expect_found(refused("another", [](auto&) {}), "made for the model 'a model', not for 'another'");
    expect_found(refused("a model", [](auto& l) { l.pop_back(); }), "of 5 layers, not of 4");
    expect_found(refused("a model", [](auto& l) { l[3].kv_heads = 1; }), "layer 3");
    expect_found(refused("a model", [](auto& l) { l[2].query_heads = 8; }), "not for 8 query heads");
    refused("a model", [](auto& l) { l[0].key_head_dim = 64; });
    refused("a model", [](auto& l) { l[0].value_head_dim = 64; });
    refused("a model", [](auto& l) { l[4].values_in_keys = true; });
    expect_found(refused("a model", [](auto& l) { l[1].rope->base = 500000; }), "layer 1");
    refused("a model", [](auto& l) { l[0].rope->layout = RopeLayout::halves; });
    refused("a model", [](auto& l) { l[0].rope = std::nullopt; });
}

TEST_F(PolicyFiles, OtherVersionsAndOtherFilesAreRefused) {
    const auto of_format = [&](const std::string& format) {
        return changed([&](auto& metadata, auto&) { metadata["kvplane.format"] = format; });
    };
    ModelPolicy::load(of_format("model policy 1"));
    expect_found(refused(ErrorCode::mismatch, of_format("model policy 2")), "newer");
    expect_found(refused(ErrorCode::mismatch, of_format("model policy 0")), "expected 'model policy 1'");
    for (const char* format : {"model policy 1.5", "model policy ", "model policy x", "latent keys 1", ""})
        refused(ErrorCode::mismatch, of_format(format));
    Calibration calibration{"a model", RopeSettings{}, {LatentStatistics(2, 4, 32)}};
    save_calibration(calibration, folder_ / "statistics");
    expect_found(refused(ErrorCode::mismatch, folder_ / "statistics"), "latent statistics 1");
    refusal(ErrorCode::io, [&] { ModelPolicy::load(folder_ / "absent"); });
}

TEST_F(PolicyFiles, DamagedOnesAreRefused) {
    // Any bit of any tensor, and any text of the metadata.
    const auto flip = [](auto& bytes) { bytes[bytes.size() / 2] ^= std::byte{16}; };
    for (const char* tensor : {"layers.0.parts.0.decode", "layers.0.parts.0.segments",
                               "layers.1.queries.scatter", "layers.4.parts.1.channels"})
        expect_found(refused(ErrorCode::format,
                             changed([&](auto&, auto& tensors) { flip(tensors.at(tensor)); }, true)),
                     "checksum");
    for (const char* key : {"kvplane.model", "layers.2.recipe", "layers.0.context"})
        refused(ErrorCode::format, changed([&](auto& metadata, auto&) { metadata.at(key) += "0"; }, true));
    for (const std::string key :
         {"kvplane.format", "kvplane.model", "kvplane.heads", "kvplane.checksum", "layers.3.recipe",
          "layers.3.rope", "layers.3.context", "layers.3.basis", "layers.3.rotation_seed"})
        expect_found(refused(ErrorCode::format, changed([&](auto& metadata, auto&) { metadata.erase(key); })),
                     key);
    for (const char* tensor :
         {"layers.0.parts.0.mean", "layers.1.queries.count", "layers.4.parts.1.channels"})
        expect_found(
            refused(ErrorCode::format, changed([&](auto&, auto& tensors) { tensors.erase(tensor); })),
            tensor);
    // Texts that say something else, with a checksum that fits.
    for (const auto& each : std::vector<std::pair<std::string, std::string>>{
             {"layers.2.recipe", "no such recipe"},
             {"layers.2.recipe", "latent:3:3"},  // of which the file has no basis
             {"layers.0.recipe", "latent:2:2+frame=before_rope"},
             {"layers.1.rope", "{"},
             {"layers.1.context", "-1"},
             {"layers.1.context", "0"},
             {"layers.1.context", "99999999999"},
             {"layers.1.rotation_seed", "99999999999999999999"},
             {"kvplane.heads", "[]"}}) {
        const std::string sentence = refused(
            ErrorCode::format, changed([&](auto& metadata, auto&) { metadata[each.first] = each.second; }));
        if (each.first.starts_with("layers")) expect_found(sentence, "layer " + each.first.substr(7, 1));
    }
    for (const char* heads :
         {R"("layers":5,"kv_heads":2,"query_heads":4,"key_head_dim":33,"value_head_dim":48)",
          R"("layers":6,"kv_heads":2,"query_heads":4,"key_head_dim":32,"value_head_dim":48)",
          R"("layers":65536,"kv_heads":65536,"query_heads":65536,"key_head_dim":65536,"value_head_dim":1)",
          R"("layers":0,"kv_heads":2,"query_heads":4,"key_head_dim":32,"value_head_dim":48)",
          R"("layers":5,"kv_heads":-2,"query_heads":4,"key_head_dim":32,"value_head_dim":48)"})
        refused(ErrorCode::format, changed([&](auto& metadata, auto&) {
                    metadata["kvplane.heads"] = std::string("{") + heads + R"(,"values_in_keys":false})";
                }));
}

TEST_F(PolicyFiles, TruncatedOnesAreRefused) {
    const auto size = std::filesystem::file_size(saved());
    for (const std::uintmax_t kept :
         {size - 1, size - 4000, size / 2, std::uintmax_t{100}, std::uintmax_t{7}, std::uintmax_t{0}}) {
        saved();
        std::filesystem::resize_file(folder_ / "policy", kept);
        refused(ErrorCode::format, folder_ / "policy");
    }
}

TEST_F(PolicyFiles, WhatCannotBeLoadedIsNotMade) {
    const auto refused = [&](ErrorCode code, auto&& change) {
        std::vector<CacheConfiguration> changed = layers();
        change(changed);
        return refusal(code, [&] { ModelPolicy("a model", std::move(changed)); });
    };
    refused(ErrorCode::option, [](auto& l) { l.clear(); });
    expect_found(refused(ErrorCode::option, [](auto& l) { l[1].kv_heads = 4; }), "layer 1");
    expect_found(refused(ErrorCode::option, [](auto& l) { l[2].recipe.sink_tokens = 5; }), "layer 2");
    refused(ErrorCode::option, [](auto& l) { l[2].recipe.name = "by hand"; });
    expect_found(refused(ErrorCode::mismatch, [](auto& l) { l[3].latent_keys = nullptr; }), "layer 3");
    refused(ErrorCode::mismatch, [](auto& l) { l[1].query_moments = nullptr; });
    refused(ErrorCode::mismatch, [](auto& l) { l[2].latent_keys = l[0].latent_keys; });
    refused(ErrorCode::mismatch, [](auto& l) { l[0].rope->base = 3; });
    refused(ErrorCode::option, [](auto& l) { l[2].context = Index{1} << 31; });
    refusal(ErrorCode::option, [&] { ModelPolicy("\xff", layers()).save(folder_ / "bad"); });
    EXPECT_FALSE(std::filesystem::exists(folder_ / "bad"));
}

}  // namespace
