// examples/engine/speed.cpp: how fast the model decodes as its context grows, and what part of that is
// attention.
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "engine/kvplane_cache.hpp"
#include "engine/layer_recipes.hpp"
#include "engine/model.hpp"
#include "engine/text_file.hpp"
#include "engine/tokenizer.hpp"
#include "kvplane/cache/huge_pages.hpp"
#include "options.hpp"

namespace {

using namespace engine;
using Clock = std::chrono::steady_clock;
using kvplane_examples::Options;

constexpr const char* summary =
    R"(Decodes a text token by token at each context, and prints tokens a second, the time that attention over the
cache takes and its share, and the size of the cache.)";

struct Settings {
    std::string model, text, basis;
    std::vector<Index> contexts{512, 1024, 2048, 4096, 8160};
    std::vector<std::string> recipes{"fp16", "key_favored:4:4", "latent:3:3"};
    Index measured = 32, threads = 0;
};

/// Times what another cache does.
class TimedCache final : public LayerCache {
  public:
    TimedCache(std::unique_ptr<LayerCache> cache, double& seconds)
        : cache_(std::move(cache)), seconds_(&seconds) {}
    void append(const Matrix& keys, const Matrix& values, const Matrix& queries) override {
        cache_->append(keys, values, queries);
    }
    void attend(const Matrix& queries, Matrix& out) const override {
        const auto start = Clock::now();
        cache_->attend(queries, out);
        *seconds_ += std::chrono::duration<double>(Clock::now() - start).count();
    }
    Index tokens() const override { return cache_->tokens(); }

  private:
    std::unique_ptr<LayerCache> cache_;
    double* seconds_;
};

void run(const Settings& settings) {
    const std::vector<Index>& contexts = settings.contexts;
    for (std::size_t i = 1; i < contexts.size(); ++i)
        kvplane::require(contexts[i - 1] < contexts[i], ErrorCode::option, "--contexts: ", contexts[i],
                         " after ", contexts[i - 1], ", expected ascending numbers");
    const Index measured = settings.measured;
    ThreadExecutor threads(thread_count(settings.threads));
    const Model model(Gguf::open(settings.model), threads);
    const Tokenizer tokenizer(model.file());
    std::vector<TokenId> text = read_tokens(tokenizer, settings.text);
    text = context_from(tokenizer, text, 0, static_cast<Index>(text.size()));
    const Index most = std::min(model.config().context, static_cast<Index>(text.size()));
    kvplane::require(measured <= most && contexts.back() <= most - measured, ErrorCode::option,
                     "--contexts: ", contexts.back(), " tokens and ", measured,
                     " measured ones; the model takes ", model.config().context, ", the text has ",
                     text.size());
    std::optional<kvplane::Calibration> basis;
    if (!settings.basis.empty()) basis = kvplane::load_calibration(settings.basis, model.name());
    LayerRecipes layer_recipes(model, {}, std::move(basis));

    std::printf("%-28s %8s %10s %16s %12s\n", "recipe", "context", "tokens/s", "attention", "cache bytes");
    kvplane::HugePageResource memory;
    kvplane::TilePool pool(&memory);
    for (const std::string& name : settings.recipes) {
        LayerCaches caches = kvplane_caches(model.config(), layer_recipes.parse(name), pool, threads);
        std::vector<const LayerCache*> inner;
        double attention = 0.0;
        for (auto& cache : caches) {
            inner.push_back(cache.get());
            cache = std::make_unique<TimedCache>(std::move(cache), attention);
        }
        const auto piece = [&](Index first, Index count) {
            return std::span<const TokenId>(text.data() + first, static_cast<std::size_t>(count));
        };
        Index at = 0;
        for (const Index context : contexts) {
            while (at < context) {
                const Index count = std::min<Index>(128, context - at);
                model.forward(piece(at, count), caches, Logits::last);
                at += count;
            }
            attention = 0.0;
            const auto start = Clock::now();
            for (Index i = 0; i < measured; ++i) model.forward(piece(at++, 1), caches, Logits::last);
            const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
            Index bytes = 0;
            for (const LayerCache* cache : inner)
                bytes += static_cast<const KvplaneCache*>(cache)->cache().bytes();
            std::printf("%-28s %8ld %10.1f %9.2f ms %2.0f%% %12ld\n", name.c_str(),
                        static_cast<long>(context), static_cast<double>(measured) / seconds,
                        1e3 * attention / static_cast<double>(measured), 100.0 * attention / seconds,
                        static_cast<long>(bytes));
            std::fflush(stdout);
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    using Need = Options::Need;
    Settings s;
    Options options("speed", summary);
    options.text("--model FILE", s.model, "GGUF file of the model", Need::required);
    options.text("--text FILE", s.text, "what it reads", Need::required);
    options.numbers("--contexts A,B,C", s.contexts, {.least = 1}, "tokens before the measured ones");
    options.texts("--recipes A,B,C", s.recipes, "how keys and values are stored");
    options.text("--basis FILE", s.basis, "statistics from calibrate, for recipes with latents");
    options.number("--measure N", s.measured, {.least = 1}, "tokens decoded at each context");
    options.number("--threads N", s.threads, {.most = 1024}, "0: one a core");
    options.footer(kvplane::recipes::help());
    return options.run(count, arguments, [&] { run(s); });
}
