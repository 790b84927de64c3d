// Bits by layer from measured sensitivities: what a layer's cache does alone, and the programs that make,
// load and refuse policies, on a small random model.
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/kvplane_cache.hpp"
#include "engine/layer_recipes.hpp"
#include "engine/layer_scan.hpp"
#include "engine_support.hpp"
#include "kvplane/io/policy_file.hpp"
#include "test_folder.hpp"
#include "test_support.hpp"

namespace {

using namespace engine;
using namespace kvplane_test;

/// KL divergence where one layer's cache is quantized, by running all of the model 32 tokens at a time.
double whole_pass(const Model& model, const std::vector<TokenId>& context, Index layer,
                  const kvplane::CacheConfiguration& configuration) {
    kvplane::TilePool pool;
    LayerCaches exact = model.exact_caches(), close = model.exact_caches();
    close[static_cast<std::size_t>(layer)] = std::make_unique<KvplaneCache>(
        configuration, pool, std::make_shared<SharedWorkspace>(model.threads()),
        kvplane::AttentionParameters{.sliding_window = model.config().window(layer), .decode_tiles = true});
    double sum = 0.0;
    Index compared = 0;
    for (std::size_t first = 0; first < context.size(); first += 32) {
        const auto now = std::span(context).subspan(first, std::min<std::size_t>(32, context.size() - first));
        Matrix p = model.forward(now, exact, Logits::all), q = model.forward(now, close, Logits::all);
        log_softmax(p, model.threads());
        log_softmax(q, model.threads());
        for (Index row = 0; row < p.rows(); ++row) {
            if (static_cast<Index>(first) + row < first_compared) continue;
            sum += divergence(p.row(row), q.row(row));
            ++compared;
        }
    }
    return sum / static_cast<double>(compared);
}

std::vector<TokenId> tokens(std::size_t count) {
    std::mt19937_64 random(seed());
    std::vector<TokenId> made(count);
    for (TokenId& token : made) token = static_cast<TokenId>(random() % 256);
    return made;
}

TEST(LayerScan, MeasuresWhatAWholePassDoes) {
    const Bytes bytes = SmallModel().file().bytes();
    kvplane::ThreadExecutor threads(2);
    const Model model(Gguf(bytes), threads);
    const std::vector<TokenId> context = tokens(450);
    const LayerScan scan(model, context, 1);
    const Index last = model.config().layers - 1;
    for (const Index layer : {Index{0}, last}) {
        const auto with = [&](const char* recipe) {
            kvplane::CacheConfiguration c = layer_configuration(model.config(), layer);
            c.recipe = kvplane::recipes::parse(recipe);
            return c;
        };
        const double measured = scan.divergence(layer, with("key_favored:2:2")),
                     expected = whole_pass(model, context, layer, with("key_favored:2:2"));
        EXPECT_GT(expected, 100 * scan.divergence(layer, with("fp16"))) << "nothing to compare";
        // Tokens before those compared are exact in the scan, which layers above a layer see.
        EXPECT_NEAR(measured, expected, (layer == last ? .001 : .3) * expected) << "layer " << layer;
        EXPECT_EQ(measured, scan.divergence(layer, with("key_favored:2:2")));
    }
    refusal(ErrorCode::index, [&] { LayerScan(model, tokens(256), 1); });
    refusal(ErrorCode::shape, [&] {
        LayerCaches caches = model.exact_caches();
        model.resume(last + 1, Matrix::Zero(1, model.config().width), caches);
    });
}

const std::string tuning_programs = KVPLANE_ENGINE_PROGRAMS;

class Policies : public FolderTest {
  protected:
    Policies() {
        for (const char* architecture : {"llama", "qwen2"}) {
            const Bytes bytes = SmallModel().file(false, architecture).bytes();
            std::ofstream(folder_ / architecture, std::ios::binary)
                .write(reinterpret_cast<const char*>(bytes.data()),
                       static_cast<std::streamsize>(bytes.size()));
        }
        std::mt19937_64 random(seed());
        std::ofstream text(folder_ / "text");
        for (int i = 0; i < 3000; ++i) text << static_cast<char>('a' + random() % 26);
    }

    void SetUp() override {
        if (!std::filesystem::exists(tuning_programs + "/tune") ||
            !std::filesystem::exists(tuning_programs + "/evaluate"))
            GTEST_SKIP() << "NOT TESTED: the programs tune and evaluate are not built";
    }
    /// What a program prints: on stdout, or, where it is to be refused, on stderr too.
    std::string said(const std::string& arguments, bool works) const {
        const std::string command = "cd " + folder_.string() + " && " + tuning_programs + "/" + arguments +
                                    " --threads 2 " + (works ? "2>errors" : "2>&1");
        std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), [](FILE*) { return 0; });
        std::string output;
        char buffer[4096];
        for (std::size_t count; (count = std::fread(buffer, 1, sizeof buffer, pipe.get())) > 0;)
            output.append(buffer, count);
        EXPECT_EQ(pclose(pipe.release()) == 0, works) << command << "\n"
                                                      << output << (works ? content("errors") : "");
        return output;
    }
    void expect_refused(const std::string& arguments, const std::string& sentence) const {
        const std::string output = said(arguments, false);
        EXPECT_NE(output.find(sentence), std::string::npos) << "'" << output << "' does not say " << sentence;
    }
    std::string content(const char* file) const {
        std::ifstream stream(folder_ / file, std::ios::binary);
        return {std::istreambuf_iterator<char>(stream), {}};
    }
};

TEST_F(Policies, AreMadeLoadedAndRefused) {
    const std::string tune = "tune --model llama --text text --tokens 1000 --scan 400 --context 600 ";
    const std::string table = said(tune + "--budget 6 --out policy --csv harms.csv", true);
    EXPECT_NE(table.find("policy: "), std::string::npos) << table;
    // The same from what was measured, and for another budget other bits.
    said(tune + "--budget 6 --out again --measured harms.csv", true);
    EXPECT_EQ(content("policy"), content("again"));
    said(tune + "--budget 8 --out larger --measured harms.csv", true);
    EXPECT_NE(content("policy"), content("larger"));

    // evaluate counts no more than was asked for.
    const auto bits = [&](const std::string& policy) {
        const std::string output = said("evaluate --model llama --text text --context 600 --json --policy " +
                                            policy + " --recipes policy,fp16",
                                        true);
        const auto json = nlohmann::json::parse(output);
        const auto& row = json.at("recipes").at(0);
        EXPECT_EQ(row.at("recipe"), "policy");
        EXPECT_GT(row.at("kl_mean").get<double>(), json.at("recipes").at(1).at("kl_mean").get<double>());
        return row.at("true_bits").get<double>();
    };
    EXPECT_LE(bits("policy"), 6.0 + 1e-9);
    EXPECT_GT(bits("policy"), 5.0);
    EXPECT_LE(bits("larger"), 8.0 + 1e-9);
    EXPECT_GT(bits("larger"), bits("policy"));
    said("generate --model llama --policy policy --length 3 hello", true);

    const std::string evaluate = "evaluate --text text --context 600 --recipes policy --policy ";
    expect_refused(evaluate + "policy --model qwen2", "made for the rotary embedding");
    expect_refused("evaluate --text text --context 600 --recipes policy --model llama", "--policy");
    expect_refused(evaluate + "absent --model llama", "absent");
    expect_refused(evaluate + "harms.csv --model llama", "harms.csv");
    std::string damaged = content("policy");
    damaged[damaged.size() - 100] ^= 1;
    std::ofstream(folder_ / "damaged", std::ios::binary) << damaged;
    expect_refused(evaluate + "damaged --model llama", "checksum");

    expect_refused("tune --model llama --text text --tokens 2800 --scan 400 --budget 6 --out x",
                   "tokens, expected at least 3200");
    expect_refused(tune + "--budget 1 --out x --measured harms.csv", "the cheapest choice takes");
    expect_refused(tune + "--budget 6 --out x --keys shaped,none", "'none', expected some of shaped");
    expect_refused(tune + "--budget 6 --out x --measured text", "expected 'layer,recipe,kl,model'");
    expect_refused(tune + "--budget 6 --out x --measured absent", "absent: cannot be read");
    std::ofstream(folder_ / "fewer.csv")
        << content("harms.csv").substr(0, content("harms.csv").find("\n1,") + 1);
    expect_refused(tune + "--budget 6 --out x --measured fewer.csv", "in layer 1");
    EXPECT_FALSE(std::filesystem::exists(folder_ / "x"));
}

}  // namespace
