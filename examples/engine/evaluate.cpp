// examples/engine/evaluate.cpp: what each recipe does to a model's predictions.
//
// Every window of the text is one context. The model runs over it 32 tokens at a time (--chunk): with a plain
// fp32 cache, then with every recipe, whose predictions are compared with it from token 256 on. A tile may so
// be quantized up to 31 tokens earlier than in decoding one by one.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/command_line.hpp"
#include "engine/kvplane_cache.hpp"
#include "engine/layer_recipes.hpp"
#include "engine/model.hpp"
#include "engine/tokenizer.hpp"
#include "plot.hpp"

namespace {

using namespace engine;

constexpr const char* usage =
    "usage: evaluate --model FILE --text FILE --recipes A,B,C [OPTIONS]\n"
    "\n"
    "Compares the model's next-token predictions under each recipe with those of an unquantized cache, from\n"
    "token 256 of every context on.\n"
    "  --first-token N     of the text (0)\n"
    "  --context N         tokens of one window (2048)\n"
    "  --windows N         consecutive windows (1)\n"
    "  --chunk N           tokens that the model runs over at a time (32); up to 8 attend on packed bits\n"
    "  --recipes A,B,C     fp16, block32:4[:rotated], kivi:4, key_favored:4:2, standard, compact, "
    "svdq:1.25,\n"
    "                      latent:3:3, weighted:3:3, each with settings after '+' (see "
    "kvplane/recipes.hpp);\n"
    "                      allocated:norms|weights|measured:BITS; svdq:1.25@keys=1/32: a share of the keys;\n"
    "                      with --chunk 8 or less how much is read: key_favored:8:8@4, @4:3 (keys,\n"
    "                      values): bits in the mean; @fixed4: of every code; @tolerance=0.02: what keeps\n"
    "                      outputs within that; fp16@published, fp16@aligned: by exponents\n"
    "  --basis FILE        statistics from calibrate, for recipes with latents; without it every cache fits "
    "a\n"
    "                      basis to the first 512 tokens of its own\n"
    "  --calibration FILE  text that `allocated` recipes look at (its first 1024 tokens)\n"
    "  --json              one JSON object on stdout and nothing else\n"
    "  --csv FILE          the figures as a table for plotting\n"
    "  --plot DIR          writes DIR/evaluate.csv and, where gnuplot is installed, DIR/evaluate.svg: KL "
    "over "
    "true\n"
    "                      bits, a point for every recipe\n"
    "  --threads N         0: one a core (0)\n"
    "\n"
    "true bits: bits an element of the cache takes at the end of the context, grids, sinks and recent "
    "tokens\n"
    "counted. KL: divergence of the recipe's prediction from the exact one, in nats. same top: how often "
    "both\n"
    "think the same token likeliest. Progress goes to stderr.\n";

constexpr Index first_compared = 256;

/// Sums over the compared predictions of one recipe.
struct Result {
    explicit Result(std::string name) : recipe(std::move(name)) {}

    std::string recipe;
    std::vector<double> divergences;
    Index same_top = 0;
    double negative_log_likelihood = 0.0;
    Index targets = 0;
    double seconds = 0.0;
    Index tokens = 0;
    CacheSize size;

    double mean_divergence() const {
        double sum = 0.0;
        for (const double kl : divergences) sum += kl;
        return divergences.empty() ? 0.0 : sum / static_cast<double>(divergences.size());
    }
    double percentile(double share) const {
        if (divergences.empty()) return 0.0;
        std::vector<double> sorted = divergences;
        const auto at = static_cast<std::size_t>(share * static_cast<double>(sorted.size() - 1));
        std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(at), sorted.end());
        return sorted[at];
    }
    double perplexity() const {
        return targets == 0 ? 0.0 : std::exp(negative_log_likelihood / static_cast<double>(targets));
    }
    double same_top_rate() const {
        return divergences.empty() ? 0.0
                                   : static_cast<double>(same_top) / static_cast<double>(divergences.size());
    }
    double tokens_per_second() const { return seconds > 0.0 ? static_cast<double>(tokens) / seconds : 0.0; }
};

/// log softmax of every row, in place.
void log_softmax(Matrix& logits, Threads& threads) {
    threads.for_each(logits.rows(), [&](Index i) {
        auto row = logits.row(i).array();
        row -= row.maxCoeff();
        row -= static_cast<float>(std::log(row.exp().cast<double>().sum()));
    });
}

/// One chunk: log probabilities of the tokens after each of `tokens`.
Matrix run_chunk(const Model& model, std::span<const TokenId> tokens, LayerCaches& caches, Result& result) {
    const auto start = std::chrono::steady_clock::now();
    Matrix logits = model.forward(tokens, caches, Logits::all);
    result.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    result.tokens += static_cast<Index>(tokens.size());
    log_softmax(logits, model.threads());
    return logits;
}

/// Likelihoods of the targets: the token after each of a chunk's.
void add_likelihoods(std::span<const TokenId> targets, const Matrix& log_probabilities, Result& result) {
    for (std::size_t i = 0; i < targets.size(); ++i)
        result.negative_log_likelihood -=
            log_probabilities(static_cast<Index>(i), static_cast<Index>(targets[i]));
    result.targets += static_cast<Index>(targets.size());
}

/// KL(exact || recipe) and whether the likeliest token is the same, row by row.
void compare(const Model& model, const Matrix& exact, const Matrix& close, Result& result) {
    std::vector<double> divergences(static_cast<std::size_t>(close.rows()));
    std::vector<char> same(divergences.size());
    model.threads().for_each(close.rows(), [&](Index i) {
        const auto p = exact.row(i).array(), q = close.row(i).array();
        divergences[static_cast<std::size_t>(i)] = std::max(0.0, (p.exp() * (p - q)).cast<double>().sum());
        Index top_exact = 0, top_close = 0;
        p.maxCoeff(&top_exact);
        q.maxCoeff(&top_close);
        same[static_cast<std::size_t>(i)] = top_exact == top_close;
    });
    result.divergences.insert(result.divergences.end(), divergences.begin(), divergences.end());
    result.same_top += std::count(same.begin(), same.end(), char{1});
}

struct Evaluation {
    Result exact{"exact fp32"};
    std::vector<Result> recipes;
};

void run_window(const Model& model, std::span<const TokenId> tokens, std::size_t chunk,
                std::vector<LayerCaches>& caches, LayerCaches& plain, Evaluation& all) {
    for (std::size_t first = 0; first < tokens.size(); first += chunk) {
        const std::size_t count = std::min<std::size_t>(chunk, tokens.size() - first);
        const auto now = tokens.subspan(first, count);
        const bool compared = static_cast<Index>(first) >= first_compared;
        const auto targets = tokens.subspan(first + 1, std::min(count, tokens.size() - first - 1));
        const Matrix exact = run_chunk(model, now, plain, all.exact);
        if (compared) add_likelihoods(targets, exact, all.exact);
        for (std::size_t r = 0; r < caches.size(); ++r) {
            const Matrix close = run_chunk(model, now, caches[r], all.recipes[r]);
            if (!compared) continue;
            add_likelihoods(targets, close, all.recipes[r]);
            compare(model, exact, close, all.recipes[r]);
        }
        std::fprintf(stderr, "\r  token %zu of %zu", first + count, tokens.size());
    }
    std::fprintf(stderr, "\n");
    all.exact.size = size_of(model.config(), plain);
    for (std::size_t r = 0; r < caches.size(); ++r) all.recipes[r].size = size_of(model.config(), caches[r]);
}

Evaluation evaluate(const Model& model, const std::vector<TokenId>& text, Index first_token, Index context,
                    Index windows, Index chunk, const std::vector<std::string>& names,
                    const std::vector<CachePlan>& plans, Threads& threads) {
    Evaluation all;
    for (const std::string& name : names) all.recipes.emplace_back(name);
    kvplane::TilePool pool;
    for (Index window = 0; window < windows; ++window) {
        std::fprintf(stderr, "window %ld of %ld\n", static_cast<long>(window + 1),
                     static_cast<long>(windows));
        LayerCaches plain = model.exact_caches();
        std::vector<LayerCaches> caches;
        for (const CachePlan& plan : plans)
            caches.push_back(kvplane_caches(model.config(), plan, pool, threads));
        run_window(model, {text.data() + first_token + window * context, static_cast<std::size_t>(context)},
                   static_cast<std::size_t>(chunk), caches, plain, all);
    }
    return all;
}

nlohmann::json to_json(const Evaluation& all) {
    nlohmann::json rows = nlohmann::json::array();
    for (const Result& result : all.recipes)
        rows.push_back({{"recipe", result.recipe},
                        {"true_bits", result.size.bits_per_element},
                        {"kl_mean", result.mean_divergence()},
                        {"kl_p99", result.percentile(0.99)},
                        {"same_top", result.same_top_rate()},
                        {"perplexity", result.perplexity()},
                        {"cache_bytes", result.size.bytes},
                        {"read_bits", result.size.read_bits},
                        {"tokens_per_second", result.tokens_per_second()}});
    return {{"recipes", rows}, {"exact_perplexity", all.exact.perplexity()}};
}

void print_table(const Evaluation& all) {
    std::printf("%-44s %9s %9s %9s %9s %9s %10s %12s %9s\n", "recipe", "true bits", "read bits", "KL mean",
                "KL 99%", "same top", "perplexity", "cache bytes", "tokens/s");
    const auto line = [](const Result& r) {
        std::printf("%-44s %9.3f %9.3f %9.5f %9.4f %9.4f %10.4f %12ld %9.1f\n", r.recipe.c_str(),
                    r.size.bits_per_element, r.size.read_bits, r.mean_divergence(), r.percentile(0.99),
                    r.same_top_rate(), r.perplexity(), static_cast<long>(r.size.bytes),
                    r.tokens_per_second());
    };
    Result exact = all.exact;
    exact.divergences = {0.0};
    exact.same_top = 1;
    line(exact);
    for (const Result& result : all.recipes) line(result);
}

void write_csv(const std::string& path, const Evaluation& all) {
    std::ofstream file(path);
    file << "recipe,true_bits,read_bits,kl_mean,kl_p99,same_top,perplexity,cache_bytes,tokens_per_second\n";
    for (const Result& r : all.recipes)
        file << r.recipe << ',' << r.size.bits_per_element << ',' << r.size.read_bits << ','
             << r.mean_divergence() << ',' << r.percentile(0.99) << ',' << r.same_top_rate() << ','
             << r.perplexity() << ',' << r.size.bytes << ',' << r.tokens_per_second() << '\n';
    file.flush();
    kvplane::require(file.good(), ErrorCode::io, path, ": cannot be written");
}

/// A point for every recipe; those of one method, a recipe's name before its numbers and settings, make a
/// series.
kvplane_examples::Plot to_plot(const Evaluation& all) {
    kvplane_examples::Plot plot{"evaluate",
                                "Divergence of predictions from those of an exact cache",
                                "true bits of an element of the cache",
                                "mean KL divergence (nats)",
                                {}};
    for (const Result& r : all.recipes) {
        const std::string method = r.recipe.substr(0, r.recipe.find_first_of(":+@"));
        auto series = std::find_if(plot.series.begin(), plot.series.end(),
                                   [&](const auto& other) { return other.name == method; });
        if (series == plot.series.end()) series = plot.series.insert(series, {method, {}});
        series->points.push_back({r.size.bits_per_element, r.mean_divergence(), r.recipe});
    }
    for (auto& series : plot.series)
        std::stable_sort(series.points.begin(), series.points.end(),
                         [](const auto& a, const auto& b) { return a.x < b.x; });
    return plot;
}

void run(const CommandLine& options) {
    const std::vector<std::string> names = options.list("--recipes");
    Threads threads(static_cast<int>(options.number("--threads", 0)));
    const Model model(Gguf::open(options.required("--model")), threads);
    const Tokenizer tokenizer(model.file());
    const std::vector<TokenId> text = tokenizer.encode(read_text(options.required("--text")));
    const Index first = options.number("--first-token", 0), context = options.number("--context", 2048, 1),
                windows = options.number("--windows", 1, 1);
    kvplane::require(context > first_compared + 1 && context <= model.config().context, ErrorCode::option,
                     "--context: ", context, ", expected ", first_compared + 2, " to ",
                     model.config().context);
    kvplane::require(windows <= (static_cast<Index>(text.size()) - first) / context, ErrorCode::index,
                     windows, " windows of ", context, " tokens from ", first, " on, the text has ",
                     text.size());
    std::vector<TokenId> calibration;
    if (options.has("--calibration")) {
        calibration = tokenizer.encode(read_text(options.text("--calibration")));
        calibration.resize(std::min<std::size_t>(calibration.size(), 1024));
    }
    std::optional<kvplane::Calibration> basis;
    if (options.has("--basis")) basis = kvplane::load_calibration(options.text("--basis"), model.name());
    LayerRecipes layer_recipes(model, calibration, std::move(basis));
    std::vector<CachePlan> plans;
    const Index chunk = options.number("--chunk", 32, 1);
    for (const std::string& name : names) {
        plans.push_back(layer_recipes.parse(name));
        kvplane::require(chunk <= 8 || plans.back().read.read.kind == kvplane::ReadPolicy::Kind::all,
                         ErrorCode::option, "recipe '", name,
                         "' reads in part, which takes --chunk 8 or less; it is ", chunk);
    }

    const Evaluation all = evaluate(model, text, first, context, windows, chunk, names, plans, threads);
    if (options.has("--csv")) write_csv(options.text("--csv"), all);
    if (options.has("--plot")) kvplane_examples::write_plot(options.text("--plot"), to_plot(all));
    if (options.has("--json"))
        std::printf("%s\n", to_json(all).dump().c_str());
    else
        print_table(all);
}

}  // namespace

int main(int count, char** arguments) {
    try {
        const CommandLine options(
            count, arguments,
            {"--model", "--text", "--recipes", "--first-token", "--context", "--windows", "--chunk",
             "--calibration", "--basis", "--csv", "--plot", "--threads"},
            {"--json", "--help"});
        if (options.has("--help")) return std::printf("%s", usage), 0;
        run(options);
    } catch (const std::exception& error) {
        return std::fprintf(stderr, "evaluate: %s\n", error.what()), 1;
    }
}
