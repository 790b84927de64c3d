// examples/engine/evaluate.cpp: what each recipe does to a model's predictions.
//
// Every window of the text is one context. The model runs over it 32 tokens at a time (--chunk): with a plain fp32
// cache, then with every recipe, whose predictions from token 256 on are compared with the exact ones. A cache may
// therefore pack a tile up to 31 tokens earlier than it would token by token. Tiles are decoded to floats, so that
// what is compared is what recipes store; with --packed attention reads packed bits, as it does in an engine, and
// adds what rounding queries and softmax weights costs.
//
// With --recall every window is a document with codes in it instead (recall.hpp), and what is measured is how
// well the model finds them again.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "engine/divergence.hpp"
#include "engine/kvplane_cache.hpp"
#include "engine/layer_recipes.hpp"
#include "engine/model.hpp"
#include "engine/recall.hpp"
#include "engine/text_file.hpp"
#include "engine/tokenizer.hpp"
#include "options.hpp"
#include "plot.hpp"

namespace {

using namespace engine;
using kvplane_examples::Options;

constexpr const char* summary =
    R"(Compares the model's next-token predictions under each recipe with those of an unquantized cache, from token
256 of every context on. Progress goes to stderr.
  true bits   an element of the cache takes at the end of the context; grids, sinks, recent tokens counted
  KL          divergence of the recipe's prediction from the exact one, in nats
  same top    how often both think the same token likeliest
With --recall it asks for codes of five digits that stand in the text, and the answers are forced:
  right, 1st  the share of all digits, and of first digits, that the model thinks likeliest
  NLL         negative log-likelihood of a digit, in nats
Divergences have a long tail: --worst 5 shows where it is.)";

struct Settings {
    std::string model, text, basis, policy, calibration, csv, plot;
    std::vector<std::string> recipes, results;
    Index first_token = 0, context = 2048, windows = 1, chunk = 32, threads = 0, worst = 0;
    Index seed = 1;
    bool json = false, recall = false, packed = false;
};

/// What a recipe did to the prediction of the token after one place of the text.
struct Prediction {
    double divergence;
    Index place;                  ///< of the token before it, counted from the text's first
    Index exact_top, recipe_top;  ///< the tokens that are thought likeliest
};

/// Sums over the compared predictions of one recipe.
struct Result {
    explicit Result(std::string name) : recipe(std::move(name)) {}

    std::string recipe;
    std::vector<Prediction> predictions;
    double negative_log_likelihood = 0.0;
    Index targets = 0;
    Index digits_right = 0, first_digits_right = 0;  // with --recall, whose digits are the targets
    double seconds = 0.0;
    Index tokens = 0;
    CacheSize size;
    std::string decodes_tiles_because;  // empty where attention reads packed bits

    double mean_divergence() const {
        double sum = 0.0;
        for (const Prediction& each : predictions) sum += each.divergence;
        return predictions.empty() ? 0.0 : sum / static_cast<double>(predictions.size());
    }
    double percentile(double share) const {
        if (predictions.empty()) return 0.0;
        const std::vector<Prediction> descending = worst(predictions.size());
        return descending[descending.size() - 1 -
                          static_cast<std::size_t>(share * static_cast<double>(descending.size() - 1))]
            .divergence;
    }
    /// The `count` predictions of the largest divergence, in descending order.
    std::vector<Prediction> worst(std::size_t count) const {
        std::vector<Prediction> sorted = predictions;
        std::ranges::stable_sort(sorted, std::greater<>(), &Prediction::divergence);
        sorted.resize(std::min(count, sorted.size()));
        return sorted;
    }
    double mean_loss() const {
        return targets == 0 ? 0.0 : negative_log_likelihood / static_cast<double>(targets);
    }
    double perplexity() const { return std::exp(mean_loss()); }
    double share_of_digits(Index right, Index one_of) const {
        return targets == 0 ? 0.0 : static_cast<double>(right * one_of) / static_cast<double>(targets);
    }
    double digits() const { return share_of_digits(digits_right, 1); }
    double first_digits() const { return share_of_digits(first_digits_right, RecallDocument::digits); }
    double same_top_rate() const {
        const auto same = std::ranges::count_if(
            predictions, [](const Prediction& each) { return each.exact_top == each.recipe_top; });
        return predictions.empty() ? 0.0
                                   : static_cast<double>(same) / static_cast<double>(predictions.size());
    }
    double tokens_per_second() const { return seconds > 0.0 ? static_cast<double>(tokens) / seconds : 0.0; }
};

/// One chunk: log probabilities of the tokens after each of `tokens`.
Matrix run_chunk(const Model& model, std::span<const TokenId> tokens, LayerCaches& caches, Result& result,
                 Logits wanted = Logits::all) {
    const auto start = std::chrono::steady_clock::now();
    Matrix logits = model.forward(tokens, caches, wanted);
    result.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    result.tokens += static_cast<Index>(tokens.size());
    log_softmax(logits, model.threads());
    return logits;
}

/// Likelihoods of the targets, the token after each of a chunk's, from row `first` on.
void add_likelihoods(std::span<const TokenId> targets, const Matrix& log_probabilities, Index first,
                     Result& result) {
    for (Index i = first; i < static_cast<Index>(targets.size()); ++i, ++result.targets)
        result.negative_log_likelihood -=
            log_probabilities(i, static_cast<Index>(targets[static_cast<std::size_t>(i)]));
}

/// KL(exact || recipe) and the likeliest tokens, row by row from row `first` on. place: of row 0 in the text.
void compare(const Model& model, const Matrix& exact, const Matrix& close, Index first, Index place,
             Result& result) {
    const std::size_t before = result.predictions.size();
    result.predictions.resize(before + static_cast<std::size_t>(close.rows() - first));
    parallel_for(model.threads(), close.rows() - first, [&](Index i) {
        Prediction& prediction = result.predictions[before + static_cast<std::size_t>(i)];
        prediction.divergence = divergence(exact.row(first + i), close.row(first + i));
        prediction.place = place + first + i;
        exact.row(first + i).maxCoeff(&prediction.exact_top);
        close.row(first + i).maxCoeff(&prediction.recipe_top);
    });
}

struct Evaluation {
    Result exact{"exact fp32"};
    std::vector<Result> recipes;
};

/// place: of the window's first token in the text.
void run_window(const Model& model, std::span<const TokenId> tokens, Index place, std::size_t chunk,
                std::vector<LayerCaches>& caches, LayerCaches& plain, Evaluation& all) {
    for (std::size_t first = 0; first < tokens.size(); first += chunk) {
        const std::size_t count = std::min<std::size_t>(chunk, tokens.size() - first);
        const auto now = tokens.subspan(first, count);
        // Row by row: a chunk may begin before the first compared token.
        const Index row = std::max<Index>(0, first_compared - static_cast<Index>(first));
        const bool compared = row < static_cast<Index>(count);
        const auto targets = tokens.subspan(first + 1, std::min(count, tokens.size() - first - 1));
        const Matrix exact = run_chunk(model, now, plain, all.exact);
        if (compared) add_likelihoods(targets, exact, row, all.exact);
        for (std::size_t r = 0; r < caches.size(); ++r) {
            const Matrix close = run_chunk(model, now, caches[r], all.recipes[r]);
            if (!compared) continue;
            add_likelihoods(targets, close, row, all.recipes[r]);
            compare(model, exact, close, row, place + static_cast<Index>(first), all.recipes[r]);
        }
        std::fprintf(stderr, "\r  token %zu of %zu", first + count, tokens.size());
    }
    std::fprintf(stderr, "\n");
    all.exact.size = size_of(model.config(), plain);
    for (std::size_t r = 0; r < caches.size(); ++r) all.recipes[r].size = size_of(model.config(), caches[r]);
}

/// One cache of one recipe over one document.
void run_document(const Model& model, const RecallDocument& document, std::size_t chunk, LayerCaches& caches,
                  Result& result) {
    const std::span<const TokenId> tokens(document.tokens);
    const auto questions = static_cast<std::size_t>(document.questions);
    for (std::size_t first = 0; first < questions; first += chunk)
        run_chunk(model, tokens.subspan(first, std::min(chunk, questions - first)), caches, result,
                  Logits::none);
    std::size_t digit = 0;
    for (std::size_t first = questions; first < tokens.size(); first += chunk) {
        const std::size_t count = std::min(chunk, tokens.size() - first);
        const Matrix predicted = run_chunk(model, tokens.subspan(first, count), caches, result);
        for (; digit < document.answered.size(); ++digit) {  // which the token before predicts
            const auto row = document.answered[digit] - 1 - static_cast<Index>(first);
            if (row >= static_cast<Index>(count)) break;
            const TokenId expected = tokens[static_cast<std::size_t>(document.answered[digit])];
            Index likeliest = 0;
            predicted.row(row).maxCoeff(&likeliest);
            const bool right = likeliest == static_cast<Index>(expected);
            result.digits_right += right;
            result.first_digits_right += right && digit % RecallDocument::digits == 0;
            result.negative_log_likelihood -= predicted(row, static_cast<Index>(expected));
            ++result.targets;
        }
    }
    result.size = size_of(model.config(), caches);
}

Evaluation evaluate(const Model& model, const Tokenizer& tokenizer, const std::vector<TokenId>& text,
                    const Settings& settings, const std::vector<CachePlan>& plans, Executor& threads) {
    Evaluation all;
    for (std::size_t r = 0; r < plans.size(); ++r)
        all.recipes.emplace_back(settings.recipes[r]).decodes_tiles_because =
            decodes_tiles_because(model.config(), plans[r]);
    kvplane::TilePool pool;
    const auto chunk = static_cast<std::size_t>(settings.chunk);
    for (Index window = 0; window < settings.windows; ++window) {
        std::fprintf(stderr, "window %ld of %ld\n", static_cast<long>(window + 1),
                     static_cast<long>(settings.windows));
        const Index first = settings.first_token + window * settings.context;
        const auto caches_of = [&](const CachePlan& plan) {
            return kvplane_caches(model.config(), plan, pool, threads);
        };
        LayerCaches plain = model.exact_caches();
        if (settings.recall) {
            const RecallDocument document = recall_document(
                tokenizer, text, first, settings.context, static_cast<std::uint64_t>(settings.seed + window));
            run_document(model, document, chunk, plain, all.exact);
            for (std::size_t r = 0; r < plans.size(); ++r) {
                LayerCaches caches = caches_of(plans[r]);
                run_document(model, document, chunk, caches, all.recipes[r]);
                std::fprintf(stderr, "\r  recipe %zu of %zu", r + 1, plans.size());
            }
            std::fprintf(stderr, "\n");
            continue;
        }
        std::vector<LayerCaches> caches;
        for (const CachePlan& plan : plans) caches.push_back(caches_of(plan));
        // context_from() puts a token before the text's where the model wants one.
        const Index place = tokenizer.begin_of_text() < 0 ? first : first - 1;
        run_window(model, context_from(tokenizer, text, first, settings.context), place, chunk, caches, plain,
                   all);
    }
    return all;
}

nlohmann::json to_json(const Evaluation& all, bool recall) {
    nlohmann::json rows = nlohmann::json::array();
    for (const Result& result : all.recipes) {
        nlohmann::json row{{"recipe", result.recipe},
                           {"true_bits", result.size.bits_per_element},
                           {"cache_bytes", result.size.bytes},
                           {"read_bits", result.size.read_bits},
                           {"decodes_tiles_because", result.decodes_tiles_because},
                           {"tokens_per_second", result.tokens_per_second()}};
        if (recall)
            row.update({{"digits", result.targets},
                        {"digits_right", result.digits()},
                        {"first_digits_right", result.first_digits()},
                        {"digit_nll", result.mean_loss()}});
        else
            row.update({{"compared", result.predictions.size()},
                        {"kl_mean", result.mean_divergence()},
                        {"kl_p99", result.percentile(0.99)},
                        {"kl_p999", result.percentile(0.999)},
                        {"same_top", result.same_top_rate()},
                        {"perplexity", result.perplexity()}});
        rows.push_back(std::move(row));
    }
    if (!recall) return {{"recipes", rows}, {"exact_perplexity", all.exact.perplexity()}};
    return {{"recipes", rows},
            {"exact_digits_right", all.exact.digits()},
            {"exact_first_digits_right", all.exact.first_digits()},
            {"exact_digit_nll", all.exact.mean_loss()}};
}

void print_table(const Evaluation& all) {
    std::printf("%-44s %9s %9s %9s %9s %9s %10s %12s %9s\n", "recipe", "true bits", "read bits", "KL mean",
                "KL 99.9%", "same top", "perplexity", "cache bytes", "tokens/s");
    const auto line = [](const Result& r) {
        std::printf("%-44s %9.3f %9.3f %9.5f %9.4f %9.4f %10.4f %12ld %9.1f\n", r.recipe.c_str(),
                    r.size.bits_per_element, r.size.read_bits, r.mean_divergence(), r.percentile(0.999),
                    r.same_top_rate(), r.perplexity(), static_cast<long>(r.size.bytes),
                    r.tokens_per_second());
    };
    Result exact = all.exact;
    exact.predictions = {{}};
    line(exact);
    for (const Result& result : all.recipes) line(result);
}

/// The recipes that do without the fast path of attention, and why.
void print_slow_paths(const Evaluation& all) {
    for (const Result& r : all.recipes)
        if (!r.decodes_tiles_because.empty())
            std::printf("%s never reads packed bits but decodes tiles, which is slow, because %s\n",
                        r.recipe.c_str(), r.decodes_tiles_because.c_str());
}

/// Where each recipe diverges most: the text before the prediction, and what is thought to come.
void print_worst(const Evaluation& all, const Tokenizer& tokenizer, const std::vector<TokenId>& text,
                 std::size_t count) {
    constexpr Index words_before = 12;
    const auto quoted = [&](std::span<const TokenId> tokens) {
        return nlohmann::json(tokenizer.decode(tokens))
            .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    };
    for (const Result& result : all.recipes) {
        std::printf("\n%s\n", result.recipe.c_str());
        for (const Prediction& each : result.worst(count)) {
            if (each.place < 0) continue;
            const Index first = std::max<Index>(0, each.place + 1 - words_before);
            const TokenId exact = static_cast<TokenId>(each.exact_top),
                          close = static_cast<TokenId>(each.recipe_top);
            std::printf(
                "  token %6ld  KL %8.4f  ...%s -> %s, with the recipe %s\n", static_cast<long>(each.place),
                each.divergence,
                quoted({text.data() + first, static_cast<std::size_t>(each.place + 1 - first)}).c_str(),
                quoted({&exact, 1}).c_str(), quoted({&close, 1}).c_str());
        }
    }
}

void print_recall(const Evaluation& all) {
    std::printf("%-44s %9s %9s %9s %9s %12s %9s   of %ld digits\n", "recipe", "true bits", "right",
                "1st right", "NLL", "cache bytes", "tokens/s", static_cast<long>(all.exact.targets));
    const auto line = [](const Result& r) {
        std::printf("%-44s %9.3f %9.4f %9.4f %9.4f %12ld %9.1f\n", r.recipe.c_str(), r.size.bits_per_element,
                    r.digits(), r.first_digits(), r.mean_loss(), static_cast<long>(r.size.bytes),
                    r.tokens_per_second());
    };
    line(all.exact);
    for (const Result& result : all.recipes) line(result);
}

void write_csv(const std::string& path, const Evaluation& all, bool recall) {
    std::ofstream file(path);
    file << "recipe,true_bits,read_bits,cache_bytes,tokens_per_second,"
         << (recall ? "digits_right,first_digits_right,digit_nll"
                    : "kl_mean,kl_p99,kl_p999,same_top,perplexity")
         << '\n';
    for (const Result& r : all.recipes) {
        file << r.recipe << ',' << r.size.bits_per_element << ',' << r.size.read_bits << ',' << r.size.bytes
             << ',' << r.tokens_per_second() << ',';
        if (recall)
            file << r.digits() << ',' << r.first_digits() << ',' << r.mean_loss() << '\n';
        else
            file << r.mean_divergence() << ',' << r.percentile(0.99) << ',' << r.percentile(0.999) << ','
                 << r.same_top_rate() << ',' << r.perplexity() << '\n';
    }
    file.flush();
    kvplane::require(file.good(), ErrorCode::io, path, ": cannot be written");
}

/// Recipes of more bits would press all others together in a plot.
constexpr double most_plotted_bits = 10.0;

/// A point for every recipe; those of one method, a recipe's name before its numbers and settings, make a
/// series.
kvplane_examples::Plot to_plot(const Evaluation& all) {
    kvplane_examples::Plot plot{"evaluate",
                                "Divergence of predictions from those of an exact cache",
                                "true bits of an element of the cache",
                                "mean KL divergence (nats)",
                                {}};
    for (const Result& r : all.recipes) {
        if (r.size.bits_per_element > most_plotted_bits) continue;
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

/// The recipes of a CSV file that an earlier run wrote, and their divergences. Throws Error (io, format).
std::vector<std::pair<Result, double>> read_csv(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    const auto fields = [&] {
        std::vector<std::string> all;
        std::stringstream stream(line);
        for (std::string field; std::getline(stream, field, ',');) all.push_back(field);
        return all;
    };
    kvplane::require(static_cast<bool>(std::getline(file, line)), ErrorCode::io, path, ": cannot be read");
    const std::vector<std::string> names = fields();
    const auto column = [&](const char* name) {
        const auto at = static_cast<std::size_t>(std::ranges::find(names, name) - names.begin());
        kvplane::require(at < names.size(), ErrorCode::format, path, ": no column ", name,
                         "; expected a file that evaluate --csv wrote, without --recall");
        return at;
    };
    const std::size_t bits = column("true_bits"), kl = column("kl_mean");
    std::vector<std::pair<Result, double>> results;
    while (std::getline(file, line)) {
        const std::vector<std::string> row = fields();
        kvplane::require(row.size() == names.size(), ErrorCode::format, path, ": a row of ", row.size(),
                         " fields, expected ", names.size());
        Result result(row[0]);
        result.size.bits_per_element = std::strtod(row[bits].c_str(), nullptr);
        results.emplace_back(std::move(result), std::strtod(row[kl].c_str(), nullptr));
    }
    return results;
}

/// Recipes of several models. Those of kvplane's own that no other of them beats in both bits and divergence are
/// joined: its frontier.
kvplane_examples::Plot models_plot(const std::vector<std::string>& paths) {
    kvplane_examples::Plot plot{"models",
                                "Divergence of predictions from those of an exact cache",
                                "true bits of an element of the cache",
                                "mean KL divergence (nats)",
                                {}};
    const auto is_ours = [](const std::string& recipe) {
        const std::string method = recipe.substr(0, recipe.find_first_of(":+@"));
        return method == "latent" || method == "weighted" || method == "key_favored" ||
               method == "standard" || method == "compact" || method == "smallest";
    };
    for (const std::string& path : paths) {
        const std::string model = std::filesystem::path(path).stem().string();
        const int colour = static_cast<int>(plot.series.size() / 2);
        kvplane_examples::PlotSeries frontier{model + ": kvplane's frontier", {}, true, colour};
        kvplane_examples::PlotSeries others{model + ": other recipes", {}, false, colour};
        const auto results = read_csv(path);
        for (const auto& each : results) {
            const Result& result = each.first;
            const double bits = result.size.bits_per_element;
            if (bits > most_plotted_bits) continue;
            const bool beaten = std::ranges::any_of(results, [&](const auto& other) {
                return is_ours(other.first.recipe) && other.second < each.second &&
                       other.first.size.bits_per_element <= bits;
            });
            auto& series = is_ours(result.recipe) && !beaten ? frontier : others;
            series.points.push_back({bits, each.second, result.recipe});
        }
        std::ranges::sort(frontier.points, {}, &kvplane_examples::PlotPoint::x);
        plot.series.push_back(std::move(frontier));
        plot.series.push_back(std::move(others));
    }
    return plot;
}

void run(const Settings& settings) {
    if (!settings.results.empty()) {
        kvplane::require(!settings.plot.empty(), ErrorCode::option, "--results draws, which takes --plot");
        return kvplane_examples::write_plot(settings.plot, models_plot(settings.results));
    }
    kvplane::require(!settings.model.empty(), ErrorCode::option, "--model is required");
    kvplane::require(!settings.text.empty(), ErrorCode::option, "--text is required");
    kvplane::require(!settings.recipes.empty(), ErrorCode::option, "--recipes is required");

    ThreadExecutor threads(thread_count(settings.threads));
    const Model model(Gguf::open(settings.model), threads);
    const Tokenizer tokenizer(model.file());
    const std::vector<TokenId> text = read_tokens(tokenizer, settings.text);
    const Index first = settings.first_token, context = settings.context;
    kvplane::require(context > first_compared + 1 && context <= model.config().context, ErrorCode::option,
                     "--context: ", context, ", expected ", first_compared + 2, " to ",
                     model.config().context);
    kvplane::require(settings.windows <= (static_cast<Index>(text.size()) - first) / context,
                     ErrorCode::index, settings.windows, " windows of ", context, " tokens from ", first,
                     " on, the text has ", text.size());
    kvplane::require(!settings.recall || (settings.plot.empty() && settings.worst == 0), ErrorCode::option,
                     "--plot and --worst show divergences, which --recall does not measure");
    std::vector<TokenId> calibration;
    if (!settings.calibration.empty()) {
        calibration = read_tokens(tokenizer, settings.calibration);
        calibration = context_from(tokenizer, calibration, 0,
                                   std::min<Index>(static_cast<Index>(calibration.size()), 1024));
    }
    std::optional<kvplane::Calibration> basis;
    if (!settings.basis.empty()) basis = kvplane::load_calibration(settings.basis, model.name());
    std::optional<kvplane::ModelPolicy> policy;
    if (!settings.policy.empty()) policy = kvplane::ModelPolicy::load(settings.policy);
    LayerRecipes layer_recipes(model, calibration, std::move(basis), std::move(policy));
    std::vector<CachePlan> plans;
    for (const std::string& name : settings.recipes) {
        plans.push_back(layer_recipes.parse(name));
        kvplane::AttentionParameters& read = plans.back().read;
        read.decode_tiles = !settings.packed && read.read.kind == kvplane::ReadPolicy::Kind::all;
        kvplane::require(settings.chunk <= 8 || read.read.kind == kvplane::ReadPolicy::Kind::all,
                         ErrorCode::option, "recipe '", name,
                         "' reads in part, which takes --chunk 8 or less; it is ", settings.chunk);
    }

    const Evaluation all = evaluate(model, tokenizer, text, settings, plans, threads);
    if (settings.json)
        std::printf("%s\n", to_json(all, settings.recall).dump().c_str());
    else if (settings.recall)
        print_recall(all);
    else
        print_table(all);
    if (!settings.json) print_slow_paths(all);
    if (!settings.json && settings.worst > 0)
        print_worst(all, tokenizer, text, static_cast<std::size_t>(settings.worst));
    std::fflush(stdout);
    if (!settings.csv.empty()) write_csv(settings.csv, all, settings.recall);
    if (!settings.plot.empty()) kvplane_examples::write_plot(settings.plot, to_plot(all));
}

}  // namespace

int main(int count, char** arguments) {
    Settings s;
    Options options("evaluate", summary);
    options.text("--model FILE", s.model, "GGUF file of the model");
    options.text("--text FILE", s.text, "what it reads");
    options.texts(
        "--recipes A,B,C", s.recipes,
        "see below; also policy, what --policy says of each layer; "
        "allocated:norms|weights|measured:BITS, bits by layer; kept:RECIPE, with the sinks and recent "
        "tokens of standard; global:RECIPE, fp16 in layers with a sliding window; only:0-4:RECIPE, "
        "fp16 in all other layers; and of recipes with latents svdq:1.25@keys=1/32, a share of "
        "the keys");
    options.number("--first-token N", s.first_token, {}, "of the text");
    options.number("--context N", s.context, {.least = first_compared + 2}, "tokens of a window");
    options.number("--windows N", s.windows, {.least = 1}, "consecutive windows");
    options.number("--chunk N", s.chunk, {.least = 1},
                   "tokens that the model runs over at a time; policies of reads take up to 8");
    options.flag(
        "--packed", s.packed,
        "attend on packed bits, which rounds queries and softmax weights too, instead of decoding tiles");
    options.number("--worst N", s.worst, {}, "also show the N predictions that diverge most of each recipe");
    options.flag("--recall", s.recall, "ask for codes that stand in the text instead");
    options.number("--seed N", s.seed, {}, "of the codes and their order; one more for each further window");
    options.text("--basis FILE", s.basis,
                 "statistics from calibrate, for recipes with latents; without it every cache "
                 "fits a basis to its own first 512 tokens");
    options.text("--policy FILE", s.policy, "what tune wrote, for the recipe policy");
    options.text("--calibration FILE", s.calibration,
                 "text of which `allocated` recipes see the first 1024 tokens");
    options.flag("--json", s.json, "one JSON object on stdout and nothing else");
    options.output_file("--csv FILE", s.csv, "also write the table to this file");
    options.output_folder("--plot DIR", s.plot,
                          "also write DIR/evaluate.csv and, where gnuplot is installed, "
                          "DIR/evaluate.svg: KL over true bits, a point for each recipe");
    options.texts("--results A,B,C", s.results,
                  "files that --csv wrote, each named after its model: --plot draws DIR/models.svg of them, "
                  "and nothing "
                  "else is done");
    options.number("--threads N", s.threads, {.most = 1024}, "0: one a core");
    options.footer(kvplane::recipes::help());
    return options.run(count, arguments, [&] { run(s); });
}
