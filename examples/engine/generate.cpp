// examples/engine/generate.cpp: text from a prompt, with kvplane as the KV cache.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <random>
#include <string>

#include "engine/command_line.hpp"
#include "engine/kvplane_cache.hpp"
#include "engine/layer_recipes.hpp"
#include "engine/model.hpp"
#include "engine/tokenizer.hpp"

namespace {

using namespace engine;

constexpr const char* usage =
    "usage: generate --model FILE [OPTIONS] PROMPT\n"
    "\n"
    "Continues PROMPT, streaming the text to stdout; figures go to stderr.\n"
    "  --recipe NAME       how keys and values are stored (standard; fp16, block32:4[:rotated], kivi:4,\n"
    "                      key_favored:4:2, standard, compact, svdq:1.25, latent:3:3; `exact` is plain\n"
    "                      fp32)\n"
    "  --basis FILE        statistics from calibrate, for recipes with latents; without it the cache fits a\n"
    "                      basis to the first 512 tokens of its own\n"
    "  --length N          tokens to generate at most (200)\n"
    "  --temperature T     0: always the likeliest token (0); above: sample\n"
    "  --seed N            of sampling (1)\n"
    "  --threads N         0: one a core (0)\n"
    "  --draft POLICY      drafts tokens from a part of the same cache (fixed4, 4, ...; see evaluate), and\n"
    "                      verifies up to 7 at once from all of it: the text is that of full reads\n"
    "  --chat              PROMPT is what a user says; the model answers\n";

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
        read(caches_, policy_);
        const Index most = std::min<Index>(count, 1 + ahead);
        while (static_cast<Index>(tokens.size()) < most)
            tokens.push_back(
                static_cast<TokenId>(likeliest(model_.forward({{tokens.back()}}, caches_, Logits::last), 0)));
        truncate(caches_, before);
        read(caches_, kvplane::ReadPolicy::all());
        const Matrix all = model_.forward(tokens, caches_, Logits::all);
        std::size_t kept = 1;
        while (kept < tokens.size() && likeliest(all, static_cast<Index>(kept) - 1) == tokens[kept]) ++kept;
        drafted_ += static_cast<Index>(tokens.size()) - 1;
        accepted_ += static_cast<Index>(kept) - 1;
        tokens.resize(kept);
        truncate(caches_, before + static_cast<Index>(kept));
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

CachePlan plan_of(const Model& model, const std::string& name, const CommandLine& options) {
    std::optional<kvplane::Calibration> basis;
    if (options.has("--basis")) basis = kvplane::load_calibration(options.text("--basis"), model.name());
    return LayerRecipes(model, {}, std::move(basis)).parse(name);
}

void run(const CommandLine& options) {
    kvplane::require(options.rest().size() == 1, ErrorCode::option, options.rest().size(),
                     " prompts, expected one (in quotes)");
    const std::string name = options.text("--recipe", "standard");

    if (name != "exact") (void)kvplane::recipes::parse(name.substr(0, name.find('@')));
    const double temperature = options.real("--temperature", 0.0);
    std::optional<kvplane::ReadPolicy> policy;
    if (options.has("--draft")) {
        policy = kvplane::recipes::read_policy(options.text("--draft"));
        kvplane::require(temperature <= 0.0 && name != "exact", ErrorCode::option,
                         "--draft: expected a temperature of 0 and a recipe other than exact");
    }
    Threads threads(static_cast<int>(options.number("--threads", 0)));
    const Model model(Gguf::open(options.required("--model")), threads);
    const Tokenizer tokenizer(model.file());
    std::string prompt = options.rest()[0];
    if (options.has("--chat")) prompt = "<|im_start|>user\n" + prompt + "<|im_end|>\n<|im_start|>assistant\n";
    const std::vector<TokenId> tokens = tokenizer.encode(prompt);
    kvplane::require(!tokens.empty(), ErrorCode::option, "the prompt is empty");
    const Index length = std::min<Index>(options.number("--length", 200, 1),
                                         model.config().context - static_cast<Index>(tokens.size()));

    kvplane::TilePool pool;
    LayerCaches caches = name == "exact"
                             ? model.exact_caches()
                             : kvplane_caches(model.config(), plan_of(model, name, options), pool, threads);
    auto start = std::chrono::steady_clock::now();
    Matrix logits = model.forward(tokens, caches, Logits::last);
    const double prefill = seconds_since(start);

    std::mt19937_64 random(static_cast<std::uint64_t>(options.number("--seed", 1)));
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
    try {
        const CommandLine options(
            count, arguments,
            {"--model", "--recipe", "--basis", "--length", "--temperature", "--seed", "--threads", "--draft"},
            {"--chat", "--help"});
        if (options.has("--help")) return std::printf("%s", usage), 0;
        run(options);
    } catch (const std::exception& error) {
        return std::fprintf(stderr, "generate: %s\n", error.what()), 1;
    }
}
