// examples/engine/tune.cpp: bits by layer and side from what they do to a model's predictions.
//
// For every layer the divergence is measured that some ways to store its keys, its values and its recent
// tokens make, all else exact (layer_scan.hpp). Widths in between follow from those (harm_at). Among all of
// them the allocator takes what does the least harm in sum within the budget, and what every layer needs
// for that goes into one file (kvplane/io/policy_file.hpp).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/kvplane_cache.hpp"
#include "engine/layer_recipes.hpp"
#include "engine/layer_scan.hpp"
#include "engine/model.hpp"
#include "engine/text_file.hpp"
#include "engine/text_statistics.hpp"
#include "engine/tokenizer.hpp"
#include "kvplane/allocate/sensitivity.hpp"
#include "kvplane/io/latent_file.hpp"
#include "kvplane/io/policy_file.hpp"
#include "kvplane/recipe_names.hpp"
#include "options.hpp"

namespace {

using namespace engine;
using kvplane_examples::Options;

constexpr const char* summary =
    R"(Measures what quantizing each layer's keys and values does to the model's predictions, chooses how every
layer is stored within --budget true bits an element, and writes all that caches need for it to one file, which
`evaluate --policy` and `generate --policy` load. Statistics for bases come from the text's first tokens,
measurements from those behind them.)";

struct Settings {
    std::string model, text, basis, out, csv, measured;
    std::vector<std::string> keys;
    double budget = 3.0;
    Index first_token = 0, tokens = 16384, scan = 768, every = 1, context = 4096, threads = 0;
};

// The menu --------------------------------------------------------------------------------------------------

/// A way to store one side in several widths. Its recipe's words and settings, with % for the width, if it has
/// several; those of the other side are put beside them.
struct Form {
    const char *name, *recipe;
    std::vector<double> measured,
        offered;  ///< widths; a harm of those that are not measured follows from the others

    /// Whether recent keys are rotated, which 8 bits then do little harm to.
    bool rotates() const { return std::string(recipe).find("rotate_keys=1") != std::string::npos; }
};

std::vector<double> range(double first, double last, double step) {
    std::vector<double> widths;
    for (double width = first; width <= last; width += step) widths.push_back(width);
    return widths;
}

/// Ways to store keys. What is added here is measured and offered.
const std::vector<Form>& key_forms() {
    static const std::vector<Form> forms{
        {"shaped", "key_favored:%+shaped_keys=1", {2, 4}, {2, 3, 4, 5}},
        {"rotated", "key_favored:%+shaped_keys=1+rotate_keys=1", {2, 4}, {2, 3, 4, 5}},
        {"latent", "latent:%+rotate_keys=1", {1, 3}, range(.5, 5, .25)},
        {"before_rope", "latent:%+rotate_keys=1+frame=before_rope", {1, 3}, range(.5, 5, .25)},
    };
    return forms;
}
const std::vector<Form>& value_forms() {
    static const std::vector<Form> forms{
        {"values", "%", {1, 2, 3}, {1, 2, 3, 4}},
        {"by_token", "2+value_widths=16x4/48x2/64x1", {1.75}, {1.75}},
        {"by_token", "2+value_widths=16x4/80x2/32x1", {2}, {2}},
        {"by_token", "2+value_widths=16x4/112x2", {2.25}, {2.25}},
        {"by_token", "3+value_widths=32x5/32x3/64x2", {3}, {3}},
    };
    return forms;
}

constexpr const char *exact_keys = "key_favored:16", *exact_values = "16";

std::string number_text(double number) {
    std::ostringstream text;
    text << number;
    return text.str();
}
std::string filled(const Form& form, double width) {
    std::string recipe = form.recipe;
    const std::size_t at = recipe.find('%');
    return at == std::string::npos ? recipe : recipe.replace(at, 1, number_text(width));
}

/// The recipe of keys and values that are stored in given ways. Bits of recent tokens: 8 or 16.
std::string composed(const std::string& keys, const std::string& values, int recent_keys, int recent_values) {
    const auto words = [](const std::string& side) { return side.substr(0, side.find('+')); };
    const auto settings = [&](const std::string& side) { return side.substr(words(side).size()); };
    std::string recipe = words(keys) + ":" + words(values) + settings(keys) + settings(values);
    if (recent_values != 16) recipe += "+recent_bits=" + std::to_string(recent_values);
    if (recent_keys != recent_values) recipe += "+recent_key_bits=" + std::to_string(recent_keys);
    return recipe;
}

const std::string narrow_recent_keys = composed(exact_keys, exact_values, 8, 16),
                  narrow_rotated_keys =
                      composed(exact_keys + std::string("+rotate_keys=1"), exact_values, 8, 16),
                  narrow_recent_values = composed(exact_keys, exact_values, 16, 8);

// Configurations --------------------------------------------------------------------------------------------

/// Configurations of layers by the name of their recipe, with bases and moments from statistics.
class LayerConfigurations {
  public:
    LayerConfigurations(const ModelConfig& model, kvplane::Calibration statistics)
        : model_(model), statistics_(std::move(statistics)) {
        for (const kvplane::LatentStatistics& layer : statistics_.layers) {
            std::vector<kvplane::SecondMoments> heads;
            for (Index head = 0; head < layer.kv_heads(); ++head) heads.push_back(layer.queries(head));
            queries_.push_back(std::make_shared<const std::vector<kvplane::SecondMoments>>(std::move(heads)));
        }
    }

    kvplane::CacheConfiguration operator()(Index layer, const std::string& recipe) {
        kvplane::CacheConfiguration c = layer_configuration(model_, layer);
        c.recipe = kvplane::recipes::parse(recipe);
        const auto at = static_cast<std::size_t>(layer);
        if (c.recipe.shaped_keys) c.query_moments = queries_[at];
        if (!c.recipe.latents) return c;
        const auto& latents = *c.recipe.latents;
        auto& fitted = bases_[{layer, latents.basis.frame, latents.bits}];
        if (!fitted) fitted = kvplane::fit_latent_keys(statistics_.layers[at], c.rope, latents);
        c.latent_keys = fitted;
        return c;
    }

  private:
    const ModelConfig& model_;
    kvplane::Calibration statistics_;
    std::vector<std::shared_ptr<const std::vector<kvplane::SecondMoments>>> queries_;  // [layer]
    std::map<std::tuple<Index, kvplane::KeyFrame, double>, std::shared_ptr<const kvplane::LatentKeys>> bases_;
};

/// Bytes and elements of one layer at the end of a context, as `evaluate` counts them.
class LayerSize {
  public:
    LayerSize(const ModelConfig& model, Index layer, Index context) {
        const Index window = model.window(layer);
        const Index seen = window > 0 ? std::min(window, context) : context;
        // A page is given back once its last token has left the window, so that half of one is held beyond
        // it.
        held_ = seen < context ? std::min(context, seen + kvplane::tile_tokens / 2) : seen;
        side_elements_ = seen * model.kv_heads * model.head_dim;
    }
    Index bytes(const kvplane::CacheConfiguration& c) const {
        return kvplane::KvCache::predicted_bytes(c, held_);
    }
    double side_elements() const { return static_cast<double>(side_elements_); }

  private:
    Index held_, side_elements_;
};

// Measuring -------------------------------------------------------------------------------------------------

/// Harms by layer and recipe.
using Harms = std::map<std::pair<Index, std::string>, double>;

/// A bar on stderr with the time that is left. `total`: of the work, in whatever units.
class Progress {
  public:
    Progress(std::string what, Index total) : what_(std::move(what)), total_(total) {}
    void operator()(Index done) const {
        constexpr Index width = 30;
        const std::string bar(static_cast<std::size_t>(width * done / total_), '#');
        const double passed =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
        const auto left = static_cast<long>(passed / static_cast<double>(std::max<Index>(1, done)) *
                                            static_cast<double>(total_ - done));
        std::fprintf(stderr, "\r%-10s [%-30s] %3ld%%, %ld:%02ld left ", what_.c_str(), bar.c_str(),
                     static_cast<long>(100 * done / total_), left / 60, left % 60);
        if (done == total_) std::fprintf(stderr, "\n");
    }

  private:
    std::string what_;
    Index total_;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// The recipes that are measured in every layer.
std::vector<std::string> measured_recipes(const std::vector<Form>& keys) {
    std::vector<std::string> recipes{narrow_recent_keys, narrow_rotated_keys, narrow_recent_values};
    for (const Form& form : keys)
        for (const double width : form.measured)
            recipes.push_back(composed(filled(form, width), exact_values, 16, 16));
    for (const Form& form : value_forms())
        for (const double width : form.measured)
            recipes.push_back(composed(exact_keys, filled(form, width), 16, 16));
    return recipes;
}

Harms measure(const LayerScan& scan, const std::vector<std::string>& recipes, Index layers,
              LayerConfigurations& configurations) {
    Harms harms;
    // A measurement runs the layers from its own on, and logits, which take as long as a few layers.
    const auto work = [&](Index layer) { return layers - layer + (layers + 4) / 5; };
    Index total = 0, done = 0;
    for (Index layer = 0; layer < layers; ++layer) total += static_cast<Index>(recipes.size()) * work(layer);
    const Progress progress("measuring", total);
    for (Index layer = 0; layer < layers; ++layer)
        for (const std::string& recipe : recipes) {
            harms[{layer, recipe}] = scan.divergence(layer, configurations(layer, recipe));
            progress(done += work(layer));
        }
    return harms;
}

constexpr const char* csv_header = "layer,recipe,kl,model";

void write_csv(const std::string& path, const Harms& harms, const std::string& model) {
    std::ofstream file(path);
    file << csv_header << '\n';
    file.precision(9);
    for (const auto& [key, harm] : harms)
        file << key.first << ',' << key.second << ',' << harm << ',' << model << '\n';
    file.flush();
    kvplane::require(file.good(), ErrorCode::io, path, ": cannot be written");
}

/// Throws Error: io; format; mismatch for harms of another model.
Harms read_csv(const std::string& path, const std::string& model) {
    std::ifstream file(path);
    std::string line;
    kvplane::require(static_cast<bool>(std::getline(file, line)), ErrorCode::io, path, ": cannot be read");
    kvplane::require(line == csv_header, ErrorCode::format, path, ": '", line, "', expected '", csv_header,
                     "', as tune --csv writes it");
    Harms harms;
    while (std::getline(file, line)) {
        std::stringstream stream(line);
        std::string layer, recipe, harm, name;
        std::getline(stream, layer, ','), std::getline(stream, recipe, ','), std::getline(stream, harm, ',');
        std::getline(stream, name);
        char* end = nullptr;
        const double kl = std::strtod(harm.c_str(), &end);
        kvplane::require(!harm.empty() && *end == '\0' && std::isfinite(kl) && kl >= 0.0, ErrorCode::format,
                         path, ": '", line, "', expected ", csv_header);
        kvplane::require(name == model, ErrorCode::mismatch, path, ": measured on the model '", name,
                         "', expected '", model, "'");
        harms[{std::strtol(layer.c_str(), nullptr, 10), recipe}] = kl;
    }
    return harms;
}

double harm_of(const Harms& harms, Index layer, const std::string& recipe, const std::string& measured) {
    const auto found = harms.find({layer, recipe});
    kvplane::require(found != harms.end(), ErrorCode::mismatch, measured, ": no harm of '", recipe,
                     "' in layer ", layer, ", expected the same --keys as for --csv");
    return found->second;
}

// Choosing --------------------------------------------------------------------------------------------------

/// An option of a side: how it is stored, and what its recent tokens take.
struct SideOption {
    std::string recipe;
    int recent_bits;
    double bytes;  ///< of the layer where the other side is exact
};
struct Side {
    kvplane::SensitivityPart part;
    std::vector<SideOption> options;

    const SideOption& cheapest() const { return *std::ranges::min_element(options, {}, &SideOption::bytes); }
};

/// The options of the keys and of the values of a layer.
class LayerMenu {
  public:
    LayerMenu(const Harms& harms, const std::vector<Form>& keys, const Settings& settings,
              const ModelConfig& model, LayerConfigurations& configurations)
        : harms_(harms), keys_(keys), settings_(settings), model_(model), configurations_(configurations) {}

    std::pair<Side, Side> of(Index layer) const {
        std::pair<Side, Side> both{side(layer, true), side(layer, false)};
        auto& [keys, values] = both;
        // Bytes of the sides add up, but for what both need. So each has the bits that it takes beyond its
        // cheapest option, and half of those of a layer of which both are cheapest.
        const SideOption &key = keys.cheapest(), &value = values.cheapest();
        const double least =
            bytes(layer, composed(key.recipe, value.recipe, key.recent_bits, value.recent_bits));
        for (Side* side : {&keys, &values}) {
            const double cheapest = side->cheapest().bytes;
            for (std::size_t i = 0; i < side->options.size(); ++i)
                side->part.options[i].bits =
                    8 * (side->options[i].bytes - cheapest + least / 2) / side->part.elements;
        }
        return both;
    }

  private:
    double bytes(Index layer, const std::string& recipe) const {
        return static_cast<double>(
            LayerSize(model_, layer, settings_.context).bytes(configurations_(layer, recipe)));
    }
    static std::string recipe(const std::string& of_side, bool keys, int recent_bits) {
        return keys ? composed(of_side, exact_values, recent_bits, 16)
                    : composed(exact_keys, of_side, 16, recent_bits);
    }
    double harm(Index layer, const std::string& recipe) const {
        return harm_of(harms_, layer, recipe, settings_.measured);
    }
    Side side(Index layer, bool keys) const {
        Side side{{(keys ? "keys of layer " : "values of layer ") + std::to_string(layer),
                   LayerSize(model_, layer, settings_.context).side_elements(),
                   {}},
                  {}};
        for (const Form& form : keys ? keys_ : value_forms()) {
            const double narrow_harm = harm(layer, !keys            ? narrow_recent_values
                                                   : form.rotates() ? narrow_rotated_keys
                                                                    : narrow_recent_keys);
            std::vector<kvplane::SensitivityOption> curve;
            for (const double width : form.measured)
                curve.push_back({width, harm(layer, recipe(filled(form, width), keys, 16))});
            const std::vector<double> falling = kvplane::falling_harms(curve);
            for (std::size_t i = 0; i < curve.size(); ++i) curve[i].harm = falling[i];
            for (const double width : form.offered)
                for (const int recent : {8, 16}) {
                    const std::string stored = filled(form, width);
                    side.options.push_back({stored, recent, bytes(layer, recipe(stored, keys, recent))});
                    side.part.options.push_back(
                        {0.0, kvplane::harm_at(curve, width) + (recent == 8 ? narrow_harm : 0.0)});
                }
        }
        return side;
    }

    const Harms& harms_;
    const std::vector<Form>& keys_;
    const Settings& settings_;
    const ModelConfig& model_;
    LayerConfigurations& configurations_;
};

struct Choice {
    std::vector<std::string> recipes;  ///< by layer
    double predicted = 0.0;            ///< divergence, nats
};

/// Chooses, and prints what.
Choice choose(const LayerMenu& menu, Index layers, double budget) {
    std::vector<Side> sides;
    std::vector<kvplane::SensitivityPart> parts;
    for (Index layer = 0; layer < layers; ++layer) {
        auto [keys, values] = menu.of(layer);
        for (Side* side : {&keys, &values}) {
            parts.push_back(side->part);
            sides.push_back(std::move(*side));
        }
    }
    const kvplane::SensitivityAllocation best = kvplane::allocate_sensitivity(parts, budget);
    Choice choice;
    choice.predicted = best.harm;
    std::printf("%5s %9s %14s %14s  %s\n", "layer", "true bits", "KL of its keys", "of its values", "recipe");
    for (std::size_t k = 0; k < sides.size(); k += 2) {
        const std::size_t v = k + 1, chosen_k = best.choice[k], chosen_v = best.choice[v];
        const SideOption &key = sides[k].options[chosen_k], &value = sides[v].options[chosen_v];
        const auto &key_cost = parts[k].options[chosen_k], &value_cost = parts[v].options[chosen_v];
        choice.recipes.push_back(composed(key.recipe, value.recipe, key.recent_bits, value.recent_bits));
        std::printf("%5zu %9.3f %14.6f %14.6f  %s\n", k / 2, (key_cost.bits + value_cost.bits) / 2,
                    key_cost.harm, value_cost.harm, choice.recipes.back().c_str());
    }
    return choice;
}

std::vector<Form> chosen_forms(const std::vector<std::string>& names) {
    std::string known;
    for (const Form& form : key_forms()) known.append(known.empty() ? "" : ", ").append(form.name);
    std::vector<Form> forms;
    for (const std::string& name : names) {
        const auto found =
            std::ranges::find_if(key_forms(), [&](const Form& form) { return form.name == name; });
        kvplane::require(found != key_forms().end(), ErrorCode::option, "--keys: '", name,
                         "', expected some of ", known);
        forms.push_back(*found);
    }
    return names.empty() ? key_forms() : forms;
}

void run(const Settings& settings) {
    const std::vector<Form> forms = chosen_forms(settings.keys);
    ThreadExecutor threads(thread_count(settings.threads));
    const Model model(Gguf::open(settings.model), threads);
    const ModelConfig& config = model.config();
    const Tokenizer tokenizer(model.file());
    const std::vector<TokenId> text = read_tokens(tokenizer, settings.text);
    const Index scan_first = settings.first_token + settings.tokens;
    kvplane::require(scan_first + settings.scan <= static_cast<Index>(text.size()), ErrorCode::index,
                     settings.text, ": ", text.size(), " tokens, expected at least ",
                     scan_first + settings.scan, ": ", settings.tokens, " for statistics from token ",
                     settings.first_token, " on, and ", settings.scan, " to measure on");
    kvplane::require(settings.context <= config.context && settings.scan <= config.context, ErrorCode::option,
                     "--context ", settings.context, " and --scan ", settings.scan, ", the model has ",
                     config.context);

    kvplane::Calibration statistics;
    if (settings.basis.empty())
        statistics = statistics_of(model, tokenizer, text,
                                   {.first = settings.first_token,
                                    .count = settings.tokens,
                                    .context = std::min<Index>(2048, config.context)},
                                   Progress("statistics", settings.tokens));
    else
        statistics = kvplane::load_calibration(settings.basis, model.name());
    require_statistics(model, statistics);
    LayerConfigurations configurations(config, std::move(statistics));

    Harms harms;
    if (settings.measured.empty()) {
        const LayerScan scan(model, context_from(tokenizer, text, scan_first, settings.scan), settings.every);
        harms = measure(scan, measured_recipes(forms), config.layers, configurations);
        if (!settings.csv.empty()) write_csv(settings.csv, harms, model.name());
    } else {
        harms = read_csv(settings.measured, model.name());
    }

    const Choice choice =
        choose(LayerMenu(harms, forms, settings, config, configurations), config.layers, settings.budget);
    std::vector<kvplane::CacheConfiguration> layers;
    double bytes = 0.0, elements = 0.0;
    for (Index layer = 0; layer < config.layers; ++layer) {
        layers.push_back(configurations(layer, choice.recipes[static_cast<std::size_t>(layer)]));
        const LayerSize size(config, layer, settings.context);
        bytes += static_cast<double>(size.bytes(layers.back()));
        elements += 2 * size.side_elements();
    }
    kvplane::ModelPolicy(model.name(), std::move(layers)).save(settings.out);
    std::printf("%s: %.3f true bits an element at %ld tokens, predicted KL %.5f\n", settings.out.c_str(),
                8 * bytes / elements, static_cast<long>(settings.context), choice.predicted);
}

}  // namespace

int main(int count, char** arguments) {
    Settings s;
    Options options("tune", summary);
    options.text("--model FILE", s.model, "GGUF file of the model", Options::Need::required);
    options.text("--text FILE", s.text, "what it reads", Options::Need::required);
    options.output_file("--out FILE", s.out, "the policy to write", Options::Need::required);
    options.real("--budget B", s.budget,
                 "true bits of an element: grids, sinks and recent tokens counted, as evaluate does");
    options.number("--context N", s.context, {.least = first_compared},
                   "tokens of a sequence at whose end bits are counted; shorter ones take more");
    options.texts(
        "--keys A,B,C", s.keys,
        "ways to store keys, all by default: shaped (in channels), rotated (those, rotated), latent, "
        "before_rope (latents before RoPE, which are slower to read)");
    options.number("--first-token N", s.first_token, {}, "of the text");
    options.number("--tokens N", s.tokens, {.least = untiled_tokens + 2}, "from there on, for statistics");
    options.number("--scan N", s.scan, {.least = first_compared + 1},
                   "tokens behind those, to measure on: predictions from the 256th on");
    options.number("--every N", s.every, {.least = 1},
                   "compare one prediction of N: less memory and time for large vocabularies");
    options.text("--basis FILE", s.basis, "statistics from calibrate, instead of gathering them");
    options.output_file("--csv FILE", s.csv, "also write what was measured");
    options.text("--measured FILE", s.measured, "what --csv wrote, instead of measuring again");
    options.number("--threads N", s.threads, {.most = 1024}, "0: one a core");
    return options.run(count, arguments, [&] { run(s); });
}
