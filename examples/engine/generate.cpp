// examples/engine/generate.cpp: text from a prompt, with kvplane as the KV cache.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "engine/kvplane_cache.hpp"
#include "engine/layer_recipes.hpp"
#include "engine/model.hpp"
#include "engine/tokenizer.hpp"
#include "options.hpp"

namespace {

using namespace engine;
using kvplane_examples::Options;

constexpr const char* summary =
    R"(Continues PROMPT with kvplane as the KV cache, streaming the text to stdout. Figures go to stderr.)";

struct Settings {
    std::string model, recipe, basis, policy, draft;
    std::vector<std::string> prompts;
    Index length = 200, seed = 1, threads = 0;
    double temperature = 0.0;
    bool chat = false;
};

/// The likeliest token, or one drawn with probability softmax(logits / temperature).
TokenId choose(const Eigen::RowVectorXf& logits, double temperature, std::mt19937_64& random) {
    Index best = 0;
    const float top = logits.maxCoeff(&best);
    if (temperature <= 0.0) return static_cast<TokenId>(best);
    Eigen::RowVectorXd weights = ((logits.cast<double>().array() - top) / temperature).exp();
    double left = std::uniform_real_distribution<double>(0.0, weights.sum())(random);
    for (Index i = 0; i < weights.size(); ++i)
        if ((left -= weights[i]) < 0.0) return static_cast<TokenId>(i);
    return static_cast<TokenId>(best);
}

Index likeliest(const Matrix& logits, Index row) {
    Index best = 0;
    logits.row(row).maxCoeff(&best);
    return best;
}

/// Speculative decoding with one model and one cache: a few tokens are drafted from a part of the planes,
/// taken back, and run over again together from all planes; as many as full reads agree with are kept.
class Drafter {
  public:
    Drafter(const Model& model, LayerCaches& caches, const kvplane::ReadPolicy& policy)
        : model_(model), caches_(caches), policy_(policy) {}

    /// The likeliest continuation after `logits`, at least one token and at most `count`; the caches then
    /// hold them, and `logits` is what follows.
    std::vector<TokenId> next(Matrix& logits, Index count) {
        const Index before = caches_.front()->tokens();
        std::vector<TokenId> tokens{static_cast<TokenId>(likeliest(logits, 0))};
        expect_drafts(caches_, 0);
        read(caches_, policy_);
        // Tiles are made as they would be without drafts, so that the text is the same.
        const Index most = std::min({count, 1 + ahead, 1 + drafts_before_tile(caches_)});
        while (static_cast<Index>(tokens.size()) < most)
            tokens.push_back(
                static_cast<TokenId>(likeliest(model_.forward({{tokens.back()}}, caches_, Logits::last), 0)));
        truncate(caches_, before);
        read(caches_, kvplane::ReadPolicy::all());
        expect_drafts(caches_, 1);
        const Matrix all = model_.forward(tokens, caches_, Logits::all);
        std::size_t kept = 1;
        while (kept < tokens.size() && likeliest(all, static_cast<Index>(kept) - 1) == tokens[kept]) ++kept;
        drafted_ += static_cast<Index>(tokens.size()) - 1;
        accepted_ += static_cast<Index>(kept) - 1;
        tokens.resize(kept);
        truncate(caches_, before + static_cast<Index>(kept));
        expect_drafts(caches_, std::nullopt);
        logits = all.row(static_cast<Index>(kept) - 1);
        return tokens;
    }
    Index drafted() const noexcept { return drafted_; }
    Index accepted() const noexcept { return accepted_; }

  private:
    /// One token is known and up to 7 are drafted: 8 attend on packed bits together.
    static constexpr Index ahead = 7;

    const Model& model_;
    LayerCaches& caches_;
    kvplane::ReadPolicy policy_;
    Index drafted_ = 0, accepted_ = 0;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string recipe_name(const Settings& settings) {
    if (!settings.recipe.empty()) return settings.recipe;
    return settings.policy.empty() ? "standard" : "policy";
}

CachePlan plan_of(const Model& model, const Settings& settings) {
    std::optional<kvplane::Calibration> basis;
    if (!settings.basis.empty()) basis = kvplane::load_calibration(settings.basis, model.name());
    std::optional<kvplane::ModelPolicy> policy;
    if (!settings.policy.empty()) policy = kvplane::ModelPolicy::load(settings.policy);
    return LayerRecipes(model, {}, std::move(basis), std::move(policy)).parse(recipe_name(settings));
}

void require_recipe(const std::string& name) {
    const std::string stored = name.substr(0, name.find('@'));
    if (stored != "exact" && stored != "policy") (void)kvplane::recipes::parse(stored);
}

/// What a user says, in the format of whichever special tokens the vocabulary has for that.
std::string as_chat(const Tokenizer& tokenizer, const std::string& prompt) {
    if (tokenizer.find("<|im_start|>") >= 0)
        return "<|im_start|>user\n" + prompt + "<|im_end|>\n<|im_start|>assistant\n";
    kvplane::require(tokenizer.find("<start_of_turn>") >= 0, ErrorCode::option,
                     "--chat: the model's vocabulary has neither <|im_start|> nor <start_of_turn>");
    return "<start_of_turn>user\n" + prompt + "<end_of_turn>\n<start_of_turn>model\n";
}

void run(const Settings& settings) {
    const std::string name = recipe_name(settings);
    const double temperature = settings.temperature;
    std::optional<kvplane::ReadPolicy> policy;
    if (!settings.draft.empty()) {
        policy = kvplane::recipes::read_policy(settings.draft);
        kvplane::require(temperature <= 0.0 && name != "exact", ErrorCode::option,
                         "--draft: expected a temperature of 0 and a recipe other than exact");
    }
    kvplane::require(settings.prompts.size() == 1, ErrorCode::option, settings.prompts.size(),
                     " prompts, expected one (in quotes)");
    kvplane::require(!settings.model.empty(), ErrorCode::option, "--model is missing; --help explains it");
    ThreadExecutor threads(thread_count(settings.threads));
    const Model model(Gguf::open(settings.model), threads);
    const Tokenizer tokenizer(model.file());
    std::string prompt = settings.prompts[0];
    kvplane::require(!prompt.empty(), ErrorCode::option, "the prompt is empty");
    if (settings.chat) prompt = as_chat(tokenizer, prompt);
    std::vector<TokenId> tokens = tokenizer.encode(prompt);
    if (tokenizer.begin_of_text() >= 0) tokens.insert(tokens.begin(), tokenizer.begin_of_text());
    const Index length =
        std::min<Index>(settings.length, model.config().context - static_cast<Index>(tokens.size()));

    kvplane::TilePool pool;
    LayerCaches caches = name == "exact"
                             ? model.exact_caches()
                             : kvplane_caches(model.config(), plan_of(model, settings), pool, threads);
    auto start = std::chrono::steady_clock::now();
    Matrix logits = model.forward(tokens, caches, Logits::last);
    const double prefill = seconds_since(start);

    std::mt19937_64 random(static_cast<std::uint64_t>(settings.seed));
    TextStream stream(tokenizer);
    start = std::chrono::steady_clock::now();
    Index generated = 0;
    Drafter drafter(model, caches, policy.value_or(kvplane::ReadPolicy::all()));
    for (bool done = false; policy && generated < length && !done;)
        for (const TokenId token : drafter.next(logits, length - generated)) {
            done = done || tokenizer.is_special(token);
            if (done) break;
            std::cout << stream.push(token) << std::flush;
            ++generated;
        }
    while (!policy && generated < length) {
        const TokenId token = choose(logits.row(0), temperature, random);
        if (tokenizer.is_special(token)) break;
        std::cout << stream.push(token) << std::flush;
        ++generated;
        if (generated < length) logits = model.forward({{token}}, caches, Logits::last);
    }
    const double decode = seconds_since(start);
    std::cout << stream.finish() << std::endl;
    const CacheSize size = size_of(model.config(), caches);
    std::fprintf(
        stderr,
        "%s: prompt %zu tokens, %.1f tokens/s; generated %ld tokens, %.1f tokens/s; cache %ld bytes, "
        "%.2f bits an element\n",
        name.c_str(), tokens.size(), static_cast<double>(tokens.size()) / prefill,
        static_cast<long>(generated), static_cast<double>(generated) / decode, static_cast<long>(size.bytes),
        size.bits_per_element);
    if (policy)
        std::fprintf(stderr, "drafts: %ld tokens, of which full reads took %ld\n",
                     static_cast<long>(drafter.drafted()), static_cast<long>(drafter.accepted()));
}

}  // namespace

int main(int count, char** arguments) {
    Settings s;
    Options options("generate", summary);
    options.arguments("PROMPT", s.prompts, Options::Count::any, "one text, in quotes");
    options.text("--model FILE", s.model, "GGUF file of the model");
    options.text(
        "--recipe NAME", s.recipe,
        "how keys and values are stored: see below, exact (plain fp32), or policy, as --policy says; "
        "standard where neither is given",
        Options::Need::optional, require_recipe);
    options.text("--basis FILE", s.basis,
                 "statistics from calibrate, for recipes with latents; without it every cache "
                 "fits a basis to its own first 512 tokens");
    options.text("--policy FILE", s.policy, "what tune wrote for the model: how each layer is stored");
    options.number("--length N", s.length, {.least = 1}, "tokens to generate at most");
    options.real("--temperature T", s.temperature, "0: always the likeliest token; above: sample");
    options.number("--seed N", s.seed, {}, "of sampling");
    options.text("--draft POLICY", s.draft,
                 "draft up to 7 tokens from a part of the same cache (fixed4, 4, ...), and verify "
                 "them together from all of it");
    options.flag("--chat", s.chat, "PROMPT is what a user says, and the model answers");
    options.number("--threads N", s.threads, {.most = 1024}, "0: one a core");
    options.footer(kvplane::recipes::help());
    return options.run(count, arguments, [&] { run(s); });
}
