// examples/engine/speed.cpp: how fast the model decodes as its context grows, and what part of that is
// attention.
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "engine/command_line.hpp"
#include "engine/kvplane_cache.hpp"
#include "engine/layer_recipes.hpp"
#include "engine/model.hpp"
#include "engine/tokenizer.hpp"
#include "kvplane/cache/huge_pages.hpp"

namespace {

using namespace engine;
using Clock = std::chrono::steady_clock;

constexpr const char* usage =
    "usage: speed --model FILE --text FILE [OPTIONS]\n"
    "\n"
    "Decodes the text token by token at each context and prints tokens a second, the share of the time that\n"
    "attention over the cache takes, and the size of the cache.\n"
    "  --contexts A,B,C    tokens before the measured ones (512,1024,2048,4096,8160)\n"
    "  --recipes A,B,C     (fp16,key_favored:4:4,latent:3:3)\n"
    "  --basis FILE        statistics from calibrate, for recipes with latents\n"
    "  --measure N         tokens decoded at each context (32)\n"
    "  --threads N         0: one a core (0)\n";

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

void run(const CommandLine& options) {
    std::vector<Index> contexts;
    const auto listed = options.has("--contexts")
                            ? options.list("--contexts")
                            : std::vector<std::string>{"512", "1024", "2048", "4096", "8160"};
    for (const std::string& text : listed) {
        char* end = nullptr;
        contexts.push_back(std::strtol(text.c_str(), &end, 10));
        kvplane::require(*end == '\0' && contexts.back() >= 1 &&
                             (contexts.size() == 1 || contexts[contexts.size() - 2] < contexts.back()),
                         ErrorCode::option, "--contexts: '", text, "', expected ascending numbers from 1 on");
    }
    const auto recipes = options.has("--recipes")
                             ? options.list("--recipes")
                             : std::vector<std::string>{"fp16", "key_favored:4:4", "latent:3:3"};
    const Index measured = options.number("--measure", 32, 1);
    Threads threads(static_cast<int>(options.number("--threads", 0)));
    const Model model(Gguf::open(options.required("--model")), threads);
    const Tokenizer tokenizer(model.file());
    const std::vector<TokenId> text = tokenizer.encode(read_text(options.required("--text")));
    const Index last = contexts.back() + measured;
    kvplane::require(last <= model.config().context && last <= static_cast<Index>(text.size()),
                     ErrorCode::option, "--contexts: ", last,
                     " tokens with the measured ones; the model takes ", model.config().context,
                     ", the text has ", text.size());
    std::optional<kvplane::Calibration> basis;
    if (options.has("--basis")) basis = kvplane::load_calibration(options.text("--basis"), model.name());
    LayerRecipes layer_recipes(model, {}, std::move(basis));

    std::printf("%-28s %8s %10s %16s %12s\n", "recipe", "context", "tokens/s", "attention", "cache bytes");
    kvplane::HugePageResource memory;
    kvplane::TilePool pool(&memory);
    for (const std::string& name : recipes) {
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
    try {
        const CommandLine options(
            count, arguments,
            {"--model", "--text", "--contexts", "--recipes", "--basis", "--measure", "--threads"},
            {"--help"});
        if (options.has("--help")) return std::printf("%s", usage), 0;
        run(options);
    } catch (const std::exception& error) {
        return std::fprintf(stderr, "speed: %s\n", error.what()), 1;
    }
}
