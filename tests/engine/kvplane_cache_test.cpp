// kvplane as the engine's cache, and the engine's programs as a user runs them.
#include "engine/kvplane_cache.hpp"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/layer_recipes.hpp"
#include "engine_support.hpp"
#include "kvplane/io/safetensors.hpp"
#include "test_support.hpp"

namespace {

using namespace engine;
using namespace kvplane_test;

/// The small random model on a kvplane cache against the same model on fp32.
class OnSmallModel : public testing::Test {
  protected:
    OnSmallModel() : bytes_(SmallModel().file().bytes()), threads_(2), model_(Gguf(bytes_), threads_) {}

    std::vector<TokenId> tokens(std::size_t count) const {
        std::vector<TokenId> made;
        for (std::size_t i = 0; i < count; ++i)
            made.push_back(static_cast<TokenId>((7 * i * i + 3 * i) %
                                                static_cast<std::size_t>(model_.config().vocabulary)));
        return made;
    }
    Matrix logits(LayerCaches caches) const { return model_.forward(tokens(200), caches, Logits::all); }
    double error(const std::string& recipe) {
        const CachePlan plan = LayerRecipes(model_, tokens(200)).parse(recipe);
        const Matrix exact = logits(model_.exact_caches());
        return (logits(kvplane_caches(model_.config(), plan, pool_, threads_)) - exact).norm() / exact.norm();
    }

    Bytes bytes_;
    kvplane::ThreadExecutor threads_;
    Model model_;
    kvplane::TilePool pool_;
};

TEST_F(OnSmallModel, MoreBitsMakeLessError) {
    EXPECT_LT(error("fp16"), 2e-3);
    EXPECT_LT(error("key_favored:8:8"), 0.02);
    EXPECT_LT(error("key_favored:8:8"), error("key_favored:4:4"));
    EXPECT_LT(error("key_favored:4:4"), error("key_favored:2:2"));
    EXPECT_GT(error("key_favored:2:2"), 1e-3);  // it did quantize
}

TEST_F(OnSmallModel, AllocationsByLayerRun) {
    for (const char* recipe : {"allocated:norms:4.5", "allocated:weights:4.5", "allocated:measured:4.5"}) {
        const auto recipes = LayerRecipes(model_, tokens(200)).parse(recipe);
        EXPECT_EQ(static_cast<Index>(recipes.recipes.size()), model_.config().layers);
        EXPECT_LT(error(recipe), 0.5);
    }
    EXPECT_NE(refusal(ErrorCode::option, [&] { LayerRecipes(model_, {}).parse("allocated:norms:4"); })
                  .find("calibration"),
              std::string::npos);
    refusal(ErrorCode::option, [&] { LayerRecipes(model_, tokens(200)).parse("allocated:luck:4"); });
    refusal(ErrorCode::option, [&] { LayerRecipes(model_, tokens(200)).parse("allocated:norms:many"); });
    refusal(ErrorCode::option, [&] { LayerRecipes(model_, tokens(200)).parse("allocated:norms:0.5"); });
}

TEST_F(OnSmallModel, RefusesAWrongNumberOfRecipes) {
    const std::vector<kvplane::CacheRecipe> two(2 + static_cast<std::size_t>(model_.config().layers));
    refusal(ErrorCode::shape, [&] { kvplane_caches(model_.config(), {two}, pool_, threads_); });
}

TEST_F(OnSmallModel, SaysWhyTilesAreDecoded) {
    const auto why = [&](const char* recipe) {
        return decodes_tiles_because(model_.config(), LayerRecipes(model_, {}).parse(recipe));
    };
    for (const char* packed : {"block32:8", "standard", "latent:3:3"}) EXPECT_EQ(why(packed), "") << packed;
    EXPECT_NE(why("svdq:2").find("before RoPE"), std::string::npos);
    EXPECT_NE(why("only:1:svdq:2").find("before RoPE"), std::string::npos);
    EXPECT_NE(why("latent:3:3@keys=1/8").find("scores all keys"), std::string::npos);
}

TEST_F(OnSmallModel, SizesAreOfAllLayers) {
    LayerCaches caches = kvplane_caches(model_.config(), {{kvplane::recipes::fp16()}}, pool_, threads_);
    model_.forward(tokens(128), caches, Logits::none);
    const CacheSize size = size_of(model_.config(), caches);
    EXPECT_GE(size.bits_per_element, 16.0);  // heads of 8 channels leave half of each value unit unused
    EXPECT_EQ(size.bytes, model_.config().layers *
                              kvplane::KvCache::predicted_bytes(
                                  static_cast<const KvplaneCache&>(*caches[0]).cache().configuration(), 128));
}

/// A model of seven layers, six of which see a window of 24 tokens.
class OnSmallGemma : public testing::Test {
  protected:
    std::vector<TokenId> tokens(std::size_t first, std::size_t count) const {
        std::vector<TokenId> made;
        for (std::size_t i = first; i < first + count; ++i)
            made.push_back(static_cast<TokenId>((7 * i * i + 3 * i) % std::size_t{SmallModel::vocabulary}));
        return made;
    }
    LayerCaches caches(const std::string& recipe) {
        return kvplane_caches(model_.config(), LayerRecipes(model_, {}).parse(recipe), pool_, threads_);
    }
    static const kvplane::KvCache& cache(const LayerCaches& caches, std::size_t layer) {
        return dynamic_cast<const KvplaneCache&>(*caches[layer]).cache();
    }
    double error(const std::string& recipe) {
        LayerCaches exact = model_.exact_caches(), close = caches(recipe);
        double error = 0.0, norm = 0.0;
        for (const auto& [first, count] : {std::pair{0u, 200u}, {200u, 1u}, {201u, 7u}, {208u, 92u}}) {
            const Matrix expected = model_.forward(tokens(first, count), exact, Logits::all);
            error += (model_.forward(tokens(first, count), close, Logits::all) - expected).squaredNorm();
            norm += expected.squaredNorm();
        }
        return std::sqrt(error / norm);
    }

    Bytes bytes_ = SmallModel::file(false, "gemma3").bytes();
    kvplane::ThreadExecutor threads_{2};
    Model model_{Gguf(bytes_), threads_};
    kvplane::TilePool pool_;
};

TEST_F(OnSmallGemma, WindowedCachesAttendAsTheModelDoes) {
    EXPECT_LT(error("fp16"), 5e-3);
    EXPECT_LT(error("key_favored:8:8"), 0.05);
    EXPECT_LT(error("key_favored:8:8"), error("key_favored:3:3"));
    EXPECT_LT(error("kept:block32:8"), 0.05);
}

TEST_F(OnSmallGemma, WindowedLayersCostTheWindowOnly) {
    for (const char* recipe : {"fp16", "key_favored:4:4", "block32:8"}) {
        SCOPED_TRACE(recipe);
        LayerCaches held = caches(recipe);
        Index at_512 = 0, pages_at_512 = 0;
        for (std::size_t first = 0; first < 1088; first += 64) {
            model_.forward(tokens(first, 64), held, Logits::none);
            if (first + 64 != 512) continue;
            at_512 = cache(held, 0).bytes();
            pages_at_512 = pool_.pages() - pool_.unused_pages();
        }
        const auto& windowed = cache(held, 0);
        const auto& global = cache(held, 5);
        EXPECT_EQ(windowed.tokens(), 1088);
        EXPECT_LT(windowed.bytes(), at_512 + 2 * (windowed.predicted_bytes(windowed.configuration(), 256) -
                                                  windowed.predicted_bytes(windowed.configuration(), 128)));
        EXPECT_GT(global.bytes(), 2 * windowed.bytes());
        // 576 more tokens: pages of the global layer alone, and a few that windows share with what they left.
        EXPECT_LE(pool_.pages() - pool_.unused_pages(), pages_at_512 + 5 + 6);
        const CacheSize size = size_of(model_.config(), held);
        EXPECT_GT(size.bits_per_element, 8.0 * static_cast<double>(size.bytes) / (2 * 16 * 7 * 1088));
    }
    EXPECT_EQ(pool_.pages(), pool_.unused_pages()) << "all pages are back";
}

TEST_F(OnSmallGemma, DraftsLeaveNoTraceInWindows) {
    LayerCaches plain = caches("key_favored:8:8"), drafted = caches("key_favored:8:8");
    for (LayerCaches* each : {&plain, &drafted}) model_.forward(tokens(0, 160), *each, Logits::none);
    expect_drafts(drafted, 0);
    for (std::size_t i = 0; i < 7; ++i) model_.forward(tokens(900 + i, 1), drafted, Logits::none);
    truncate(drafted, 160);
    expect_drafts(drafted, std::nullopt);
    for (std::size_t i = 160; i < 180; ++i)
        EXPECT_EQ(model_.forward(tokens(i, 1), drafted, Logits::last),
                  model_.forward(tokens(i, 1), plain, Logits::last));
}

TEST_F(OnSmallGemma, NamesForLayersAndForSinks) {
    const CachePlan plan = LayerRecipes(model_, {}).parse("global:compact");
    ASSERT_EQ(plan.recipes.size(), 7u);
    for (std::size_t layer = 0; layer < 7; ++layer)
        EXPECT_EQ(plan.recipes[layer].name, layer == 5 ? "compact" : "fp16") << layer;
    const CachePlan kept = LayerRecipes(model_, {}).parse("kept:block32:4");
    EXPECT_FALSE(kept.recipes[0].every_token);
    EXPECT_EQ(kept.recipes[0].sink_tokens, 4);
    EXPECT_EQ(kept.recipes[0].recent_tokens, 32);
    EXPECT_EQ(kept.recipes[0].keys, kvplane::recipes::block32(4).keys);
    refusal(ErrorCode::option, [&] { LayerRecipes(model_, {}).parse("global:svdq:2@keys=1/8"); });
}

/// Layers with and without a window differ in RoPE, and their bases are fitted with their own.
TEST_F(OnSmallGemma, BasesAreFittedWithTheRopeOfTheirLayers) {
    const ModelConfig& config = model_.config();
    kvplane::Calibration basis{"", config.rope(), {}};
    basis.layers.assign(7, {config.kv_heads, config.query_heads, config.head_dim});
    LayerCaches exact = model_.exact_caches();
    model_.forward(tokens(0, 400), exact, Logits::none, [&](const LayerActivations& a) {
        auto& layer = basis.layers[static_cast<std::size_t>(a.layer)];
        layer.add_keys({a.keys_before_rope, 0});
        layer.add_queries(a.queries_before_rope);
    });
    const auto fitted = fit_latent_keys(config, basis.layers, *kvplane::recipes::latent(4, 4).latents);
    ASSERT_EQ(fitted.size(), 7u);
    for (Index layer = 0; layer < 7; ++layer)
        EXPECT_EQ(fitted[static_cast<std::size_t>(layer)]->rope()->base, layer == 5 ? 1000 : 10000) << layer;
    const CachePlan plan = LayerRecipes(model_, {}, std::move(basis)).parse("latent:8:8");
    LayerCaches close = kvplane_caches(config, plan, pool_, threads_), plain = model_.exact_caches();
    const Matrix expected = model_.forward(tokens(0, 400), plain, Logits::all);
    EXPECT_LT((model_.forward(tokens(0, 400), close, Logits::all) - expected).norm(), 0.05 * expected.norm());
}

/// What a command prints on stdout; its exit status is checked.
std::string output_of(const std::string& command, int expected_status = 0) {
    std::string output;
    std::FILE* pipe = ::popen(command.c_str(), "r");
    char buffer[4096];
    while (const std::size_t count = std::fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, count);
    const int status = ::pclose(pipe);
    EXPECT_EQ(WEXITSTATUS(status), expected_status) << command << "\n" << output;
    return output;
}

const std::string programs = KVPLANE_ENGINE_PROGRAMS;

TEST(Programs, EvaluateRanksRecipesOnTheRealModel) {
    KVPLANE_NEEDS_MODEL();
    const auto evaluated = [](const std::string& options) {
        const auto json = nlohmann::json::parse(
            output_of(programs + "/evaluate --json --context 640 --first-token 400 " + options + " --model " +
                      model_path() + " --text " KVPLANE_EXAMPLE_DATA "/northanger_abbey.txt 2>/dev/null"));
        return json.at("recipes");
    };
    const auto rows = evaluated("--recipes fp16,block32:4:rotated,standard,compact,key_favored:2:4");
    ASSERT_EQ(rows.size(), 5u);
    const auto kl = [&](std::size_t i) { return rows[i].at("kl_mean").get<double>(); };
    // Rounded queries and weights add little to what is stored.
    const double packed = evaluated("--packed --recipes standard")[0].at("kl_mean").get<double>();
    EXPECT_NE(packed, kl(2));
    EXPECT_NEAR(packed, kl(2), 0.3 * kl(2));
    EXPECT_LT(kl(0), 1e-4);
    EXPECT_LT(10.0 * kl(2), kl(1)) << "standard against block32:4:rotated";
    EXPECT_LT(3.0 * kl(3), kl(1)) << "compact against block32:4:rotated";
    EXPECT_LT(3.0 * kl(3), kl(4)) << "4 bits for keys and 2 for values against the opposite (theorem 2)";
    for (const auto& row : rows)
        for (const char* field : {"recipe", "true_bits", "kl_mean", "kl_p99", "kl_p999", "same_top",
                                  "perplexity", "cache_bytes", "tokens_per_second"})
            EXPECT_TRUE(row.contains(field)) << field;
}

TEST(Programs, GenerateIsTheSameEveryTime) {
    KVPLANE_NEEDS_MODEL();
    const std::string command = programs + "/generate --length 20 --recipe fp16 --model " + model_path() +
                                " 'The capital of France is' 2>/dev/null";
    const std::string text = output_of(command);
    EXPECT_NE(text.find("Paris"), std::string::npos) << text;
    EXPECT_EQ(output_of(command), text);
    const std::string sampled = programs + "/generate --length 20 --temperature 1 --seed 5 --model " +
                                model_path() + " 'Once upon a time' 2>/dev/null";
    EXPECT_EQ(output_of(sampled), output_of(sampled));
}

TEST(Programs, EvaluateAsksForCodes) {
    KVPLANE_NEEDS_MODEL();
    const auto json = nlohmann::json::parse(
        output_of(programs + "/evaluate --recall --json --context 900 --recipes fp16,block32:3 --model " +
                  model_path() + " --text " KVPLANE_EXAMPLE_DATA "/northanger_abbey.txt 2>/dev/null"));
    const auto& rows = json.at("recipes");
    EXPECT_EQ(rows[0].at("digits"), 80);
    EXPECT_GT(json.at("exact_digits_right").get<double>(), .7);
    EXPECT_GT(json.at("exact_first_digits_right").get<double>(), .3);
    EXPECT_NEAR(rows[0].at("digit_nll").get<double>(), json.at("exact_digit_nll").get<double>(), .01);
    EXPECT_GT(rows[1].at("digit_nll").get<double>(), 2 * rows[0].at("digit_nll").get<double>());
    EXPECT_LT(rows[1].at("digits_right").get<double>(), rows[0].at("digits_right").get<double>());
}

/// Drafts from part of the bits change how fast the text comes and not what it says, at the ends of tiles too.
TEST(Programs, DraftsDoNotChangeTheText) {
    KVPLANE_NEEDS_MODEL();
    const std::string prompt = " 'Once upon a time'";
    std::string command;
    for (const auto& [recipe, policy] :
         {std::pair{"key_favored:8:8+recent=0", "fixed4"}, {"standard", "3"}}) {
        command = programs + "/generate --length 180 --recipe " + recipe + " --model " + model_path();
        EXPECT_EQ(output_of(command + " --draft " + policy + prompt + " 2>/dev/null"),
                  output_of(command + prompt + " 2>/dev/null"))
            << recipe;
    }
    EXPECT_NE(output_of(command + " --draft fixed4" + prompt + " 2>&1 >/dev/null").find("drafts: "),
              std::string::npos);
    EXPECT_NE(output_of(command + " --draft 99" + prompt + " 2>&1 >/dev/null", 1).find("read policy '99'"),
              std::string::npos);
}

TEST(Programs, DumpWritesWhatTheQuickstartReads) {
    KVPLANE_NEEDS_MODEL();
    const auto path = (std::filesystem::temp_directory_path() / "kvplane_dump_test.safetensors").string();
    output_of(programs + "/dump --tokens 1024 --first-token 400 --layers 8 --model " + model_path() +
              " --text " KVPLANE_EXAMPLE_DATA "/northanger_abbey.txt --out " + path + " 2>/dev/null");
    const auto ours = kvplane::SafetensorsFile::open(path);
    const auto shipped =
        kvplane::SafetensorsFile::open(KVPLANE_EXAMPLE_DATA "/smollm2_layers_0_8.safetensors");
    for (const char* name :
         {"layers.8.keys_before_rope", "layers.8.keys", "layers.8.values", "layers.8.queries"}) {
        const Matrix a = ours.to_float_matrix(name), b = shipped.to_float_matrix(name);
        ASSERT_EQ(a.rows(), b.rows()) << name;
        EXPECT_LT((a - b).norm(), 1e-3 * b.norm()) << name;
    }
    EXPECT_EQ(ours.metadata().at("first_query_position"), "960");
    std::filesystem::remove(path);
}

TEST(Programs, CalibrateWritesWhatEvaluateReads) {
    KVPLANE_NEEDS_MODEL();
    const auto folder = std::filesystem::temp_directory_path() /
                        ("kvplane_calibrate_" + std::to_string(std::random_device{}()));
    std::filesystem::create_directory(folder);
    const std::string at = folder.string() + "/", text = " --text " KVPLANE_EXAMPLE_DATA "/jargon_file.txt",
                      model = " --model " + model_path();
    for (const char* part : {"a --first-token 0", "b --first-token 600"})
        output_of(programs + "/calibrate --tokens 600" + model + text + " --out " + at + part +
                  " 2>/dev/null");
    output_of(programs + "/calibrate --merge " + at + "a," + at + "b --out " + at +
              "both --recipe latent:3:3 --bases " + at + "bases 2>/dev/null");
    EXPECT_EQ(kvplane::load_calibration(at + "both").layers[7].keys().count(), 2.0 * (600 - 4));
    EXPECT_EQ(kvplane::load_latent_keys(at + "bases").size(), 30u);
    const auto json = nlohmann::json::parse(
        output_of(programs + "/evaluate --json --context 640 --basis " + at + "both" + model +
                  " --recipes key_favored:3:16,latent:3:16,svdq:2,latent:3:16@keys=1/8 "
                  "--text " KVPLANE_EXAMPLE_DATA "/northanger_abbey.txt 2>/dev/null"));
    const auto kl = [&](std::size_t i) { return json.at("recipes")[i].at("kl_mean").get<double>(); };
    EXPECT_LT(3.0 * kl(1), kl(0)) << "three bits in latents against three by channel";
    EXPECT_LT(kl(2), kl(0)) << "SVDq's two bits against three by channel";
    EXPECT_GT(kl(3), kl(1)) << "an eighth of the keys";
    const auto complaint = [](const std::string& arguments) {
        return output_of(programs + arguments + " 2>&1 >/dev/null", 1);
    };
    EXPECT_NE(complaint("/evaluate --recipes latent:3:3 --basis " + at + "bases" + model + text)
                  .find("latent statistics"),
              std::string::npos);
    EXPECT_NE(complaint("/calibrate --tokens 10000000 --out " + at + "c" + model + text).find("of a text of"),
              std::string::npos);
    EXPECT_NE(complaint("/calibrate --merge " + at + "none --out " + at + "c").find("none"),
              std::string::npos);
    std::filesystem::remove_all(folder);
}

/// Where the tests' own outputs would stand; nothing is there.
std::string unwritten(const std::string& name) {
    return (std::filesystem::temp_directory_path() / (name + std::to_string(std::random_device{}())))
        .string();
}

TEST(Programs, EveryTokenFrom256OnIsComparedWhateverTheChunk) {
    KVPLANE_NEEDS_MODEL();
    for (const char* chunk : {"200", "48"}) {
        const auto json = nlohmann::json::parse(output_of(
            programs + "/evaluate --json --context 300 --recipes block32:4 --chunk " + chunk + " --model " +
            model_path() + " --text " KVPLANE_EXAMPLE_DATA "/northanger_abbey.txt 2>/dev/null"));
        const auto& row = json.at("recipes").at(0);
        EXPECT_EQ(row.at("compared"), 300 - 256) << chunk;
        EXPECT_GT(row.at("kl_mean").get<double>(), 0.01) << chunk;
    }
}

TEST(Programs, TokensBeyondTheTextAreRefused) {
    KVPLANE_NEEDS_MODEL();
    const std::string text = " --text " KVPLANE_EXAMPLE_DATA "/jargon_file.txt --model " + model_path();
    const auto complaint = [&](const std::string& arguments) {
        return output_of(programs + arguments + text + " 2>&1 >/dev/null", 1);
    };
    const std::string far = " --first-token 9223372036854775807", out = " --out " + unwritten("kvplane_far");
    EXPECT_NE(complaint("/dump" + far + out).find("of a text of"), std::string::npos);
    EXPECT_NE(complaint("/calibrate" + far + out).find("of a text of"), std::string::npos);
    EXPECT_NE(complaint("/evaluate --recipes fp16" + far).find("the text has"), std::string::npos);
}

TEST(Programs, OutputsThatCannotBeWrittenAreSeenBeforeTheWork) {
    const auto complaint = [](const std::string& arguments) {
        return output_of(programs + arguments + " 2>&1 >/dev/null", 1);
    };
    const std::string here = std::filesystem::temp_directory_path().string();
    for (const std::string arguments : {"/evaluate --csv /none/here.csv", "/evaluate --plot /dev/null/here",
                                        "/dump --out /none/here", "/calibrate --bases /none/here"})
        EXPECT_NE(complaint(arguments).find("/here"), std::string::npos) << arguments;
    EXPECT_NE(complaint("/evaluate --csv " + here).find("it is a folder"), std::string::npos);
    const std::string path = unwritten("kvplane_csv");
    EXPECT_NE(complaint("/evaluate --csv " + path).find("is required"), std::string::npos);
    EXPECT_FALSE(std::filesystem::exists(path)) << "asking whether a file can be written leaves none";
    // stdout full or closed
    EXPECT_NE(output_of(programs + "/dump --help 2>&1 >/dev/full", 1).find("standard output"),
              std::string::npos);
    EXPECT_NE(output_of(programs + "/dump --help 2>&1 >&-", 1).find("standard output"), std::string::npos);
}

TEST(Programs, BadCommandLinesAreRefused) {
    const auto complaint = [](const std::string& arguments) {
        return output_of(programs + arguments + " 2>&1 >/dev/null", 1);
    };
    EXPECT_NE(complaint("/evaluate --recipes foo --model /none --text /none").find("/none"),
              std::string::npos);
    EXPECT_NE(complaint("/evaluate --colour").find("--colour"), std::string::npos);
    EXPECT_NE(complaint("/evaluate --model").find("value is missing"), std::string::npos);
    EXPECT_NE(complaint("/generate --recipe kivi:99 hello").find("99 bits"), std::string::npos);
    EXPECT_NE(complaint("/generate one two").find("2 prompts"), std::string::npos);
    EXPECT_NE(complaint("/dump --model /none --text /none --out " + unwritten("kvplane_none")).find("/none"),
              std::string::npos);
    EXPECT_NE(
        complaint("/dump --tokens many --model /none").find("--tokens: 'many', expected a whole number"),
        std::string::npos);
    EXPECT_NE(complaint("/dump --tokens 3x").find("'3x'"), std::string::npos);
    EXPECT_NE(complaint("/dump --layers 1,abc").find("'abc'"), std::string::npos);
    EXPECT_NE(complaint("/dump --threads 4294967297").find("0 to 1024"), std::string::npos);
    EXPECT_NE(complaint("/dump --tokens 99999999999999999999").find("from 1 on"), std::string::npos);
    EXPECT_NE(complaint("/calibrate --tokens 3").find("from 5 on"), std::string::npos);
    EXPECT_NE(complaint("/evaluate --context 257").find("from 258 on"), std::string::npos);
    EXPECT_NE(complaint("/evaluate --model /none --text /none --recipes fp16 standard").find("standard"),
              std::string::npos);
    EXPECT_NE(complaint("/evaluate --recipes fp16, standard").find("a list A,B,C"), std::string::npos);
    EXPECT_NE(complaint("/evaluate --recipes fp16,,standard").find("a list A,B,C"), std::string::npos);
    EXPECT_NE(complaint("/evaluate --text /none --recipes fp16").find("--model is required"),
              std::string::npos);
    EXPECT_NE(complaint("/generate --temperature nan hello").find("'nan'"), std::string::npos);
    for (const char* program : {"/generate", "/evaluate", "/dump", "/calibrate"})
        EXPECT_NE(output_of(programs + program + " --help").find("usage:"), std::string::npos);
}

}  // namespace
