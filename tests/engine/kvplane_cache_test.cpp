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

TEST_F(OnSmallModel, SizesAreOfAllLayers) {
    LayerCaches caches = kvplane_caches(model_.config(), {{kvplane::recipes::fp16()}}, pool_, threads_);
    model_.forward(tokens(128), caches, Logits::none);
    const CacheSize size = size_of(model_.config(), caches);
    EXPECT_GE(size.bits_per_element, 16.0);  // heads of 8 channels leave half of each value unit unused
    EXPECT_EQ(size.bytes, model_.config().layers *
                              kvplane::KvCache::predicted_bytes(
                                  static_cast<const KvplaneCache&>(*caches[0]).cache().configuration(), 128));
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
    const auto json = nlohmann::json::parse(
        output_of(programs +
                  "/evaluate --json --context 640 --first-token 400 --recipes "
                  "fp16,block32:4:rotated,standard,compact,key_favored:2:4 --model " +
                  model_path() + " --text " KVPLANE_EXAMPLE_DATA "/northanger_abbey.txt 2>/dev/null"));
    const auto& rows = json.at("recipes");
    ASSERT_EQ(rows.size(), 5u);
    const auto kl = [&](std::size_t i) { return rows[i].at("kl_mean").get<double>(); };
    EXPECT_LT(kl(0), 1e-4);
    EXPECT_LT(10.0 * kl(2), kl(1)) << "standard against block32:4:rotated";
    EXPECT_LT(3.0 * kl(3), kl(1)) << "compact against block32:4:rotated";
    EXPECT_LT(3.0 * kl(3), kl(4)) << "4 bits for keys and 2 for values against the opposite (theorem 2)";
    for (const auto& row : rows)
        for (const char* field : {"recipe", "true_bits", "kl_mean", "kl_p99", "same_top", "perplexity",
                                  "cache_bytes", "tokens_per_second"})
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
