// examples/engine/calibrate.cpp: statistics of a model's keys and queries, for bases of latents.
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/layer_recipes.hpp"
#include "engine/model.hpp"
#include "engine/text_file.hpp"
#include "engine/text_statistics.hpp"
#include "engine/tokenizer.hpp"
#include "kvplane/io/latent_file.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/latent/fit.hpp"
#include "kvplane/recipe_names.hpp"
#include "options.hpp"

namespace {

using namespace engine;
using kvplane_examples::Options;

constexpr const char* summary =
    R"(Writes the means and second moments of keys and queries before RoPE, which `evaluate --basis` and `generate
--basis` fit bases of latents to: of a model on a text (--model, --text), of tensors (--dump), or of several such
files (--merge).)";

struct Settings {
    std::string model, text, out, name = "unnamed", rope_layout = "interleaved", recipe, bases;
    std::vector<std::string> dumps, merged;
    Index first_token = 0, tokens = 4096, context = 2048, threads = 0;
    bool weighted = false;
    double rope_base = 0.0;
};

kvplane::Calibration from_text(const Settings& settings) {
    kvplane::require(!settings.model.empty() && !settings.text.empty(), ErrorCode::option,
                     "expected --model and --text, or --dump, or --merge; --help explains them");
    ThreadExecutor threads(thread_count(settings.threads));
    const Model model(Gguf::open(settings.model), threads);
    const Tokenizer tokenizer(model.file());
    kvplane::Calibration calibration =
        statistics_of(model, tokenizer, read_tokens(tokenizer, settings.text),
                      {.first = settings.first_token,
                       .count = settings.tokens,
                       .context = settings.context,
                       .weighted = settings.weighted},
                      [&](Index done) {
                          std::fprintf(stderr, "\r  token %ld of %ld", static_cast<long>(done),
                                       static_cast<long>(settings.tokens));
                      });
    std::fprintf(stderr, "\n");
    return calibration;
}

Index heads_of(const kvplane::SafetensorsFile& file, const std::string& tensor) {
    const auto& shape = file.info(tensor).shape;
    kvplane::require(shape.size() == 3, ErrorCode::shape, tensor, ": rank ", shape.size(),
                     ", expected [tokens, heads, head_dim]");
    return shape[1];
}

kvplane::Calibration from_dump(const std::string& path, const Settings& settings) {
    const auto file = kvplane::SafetensorsFile::open(path);
    kvplane::RopeSettings rope;
    rope.base = settings.rope_base;
    kvplane::require(rope.base > 0.0, ErrorCode::option,
                     "--dump needs --rope-base, the model's, because the file has queries after RoPE");
    if (settings.rope_layout == "halves") rope.layout = kvplane::RopeLayout::halves;
    kvplane::Calibration calibration{settings.name, rope, {}};
    for (Index layer = 0;; ++layer) {
        const std::string prefix = "layers." + std::to_string(layer) + ".";
        if (!file.contains(prefix + "keys_before_rope")) break;
        const Matrix keys = file.to_float_matrix(prefix + "keys_before_rope");
        Matrix queries = file.to_float_matrix(prefix + "queries");
        const Index kv_heads = heads_of(file, prefix + "keys_before_rope"),
                    query_heads = heads_of(file, prefix + "queries"), dim = keys.cols() / kv_heads;
        kvplane::require(keys.rows() > untiled_tokens && queries.rows() <= keys.rows(), ErrorCode::shape,
                         path, ": ", keys.rows(), " keys and ", queries.rows(), " queries of layer ", layer,
                         ", expected more than ", untiled_tokens, " keys, and queries of the last of them");
        kvplane::RotaryEmbedding(dim, rope).rotate_back(queries, keys.rows() - queries.rows());
        kvplane::LatentStatistics& statistics = calibration.layers.emplace_back(kv_heads, query_heads, dim);
        statistics.add_keys({keys.bottomRows(keys.rows() - untiled_tokens), untiled_tokens});
        statistics.add_queries(queries);
    }
    kvplane::require(!calibration.layers.empty(), ErrorCode::format, path,
                     ": no layers.0.keys_before_rope; expected all layers from 0 on");
    return calibration;
}

template <class Read>
kvplane::Calibration merged(const std::vector<std::string>& paths, const Read& read) {
    kvplane::Calibration all = read(paths[0]);
    for (std::size_t i = 1; i < paths.size(); ++i) all.merge(read(paths[i]));
    return all;
}

void run(const Settings& settings) {
    std::optional<kvplane::CacheRecipe> recipe;
    kvplane::require(settings.recipe.empty() == settings.bases.empty(), ErrorCode::option,
                     "--recipe and --bases go together: which bases, and where to");
    if (!settings.recipe.empty()) {
        recipe = kvplane::recipes::parse(settings.recipe);
        kvplane::require(recipe->latents.has_value(), ErrorCode::option, "--recipe: '", recipe->name,
                         "' has no latents");
    }
    kvplane::Calibration calibration;
    if (!settings.merged.empty())
        calibration =
            merged(settings.merged, [](const std::string& path) { return kvplane::load_calibration(path); });
    else if (!settings.dumps.empty())
        calibration =
            merged(settings.dumps, [&](const std::string& path) { return from_dump(path, settings); });
    else
        calibration = from_text(settings);
    kvplane::save_calibration(calibration, settings.out);
    std::fprintf(stderr, "%s: %zu layers of '%s', %.0f keys\n", settings.out.c_str(),
                 calibration.layers.size(), calibration.model.c_str(),
                 calibration.layers.front().keys().count());
    if (!recipe) return;
    std::vector<std::shared_ptr<const kvplane::LatentKeys>> layers;
    if (settings.model.empty()) {
        layers = kvplane::fit_latent_keys(calibration.layers, calibration.rope, *recipe->latents);
    } else {
        ThreadExecutor threads(1);
        const Model model(Gguf::open(settings.model), threads);
        kvplane::require(model.name() == calibration.model && model.config().rope() == calibration.rope &&
                             model.config().layers == static_cast<Index>(calibration.layers.size()),
                         ErrorCode::mismatch, "--model: it is '", model.name(), "', the statistics are of '",
                         calibration.model, "'");
        layers = fit_latent_keys(model.config(), calibration.layers, *recipe->latents);
    }
    kvplane::save_latent_keys(layers, calibration.model, settings.bases);
    Index bytes = 0;
    for (const auto& layer : layers) bytes += layer->bytes();
    std::fprintf(stderr, "%s: bases of %s, %ld bytes\n", settings.bases.c_str(), recipe->name.c_str(),
                 static_cast<long>(bytes));
}

}  // namespace

int main(int count, char** arguments) {
    Settings s;
    Options options("calibrate", summary);
    options.text("--model FILE", s.model,
                 "GGUF file of the model; with --merge and --bases, of one whose layers differ in RoPE");
    options.text("--text FILE", s.text, "what it reads");
    options.texts("--dump A,B,C", s.dumps,
                  "safetensors files with layers.L.keys_before_rope and .queries of all layers "
                  "from 0 on, as dump writes them");
    options.texts("--merge A,B,C", s.merged, "files that this program wrote");
    options.output_file("--out FILE", s.out, "the file to write", Options::Need::required);
    options.number("--first-token N", s.first_token, {}, "of the text");
    options.number("--tokens N", s.tokens, {.least = untiled_tokens + 1}, "from there on");
    options.number("--context N", s.context, {.least = untiled_tokens + 1},
                   "tokens that the model reads at a time; the first 4 of them are left out");
    options.flag(
        "--weighted", s.weighted,
        "with --text, weight queries by the squares of their softmax weights: better for texts like this "
        "one, worse for others");
    options.text("--name NAME", s.name, "the model's name, with --dump");
    options.real("--rope-base B", s.rope_base, "the model's, with --dump");
    options.choice("--rope-layout L", s.rope_layout, {"interleaved", "halves"}, "with --dump");
    options.text("--recipe NAME", s.recipe, "also fit the bases and widths of this recipe with latents");
    options.output_file("--bases FILE", s.bases,
                        "and write them to this file, which is what an engine ships");
    options.number("--threads N", s.threads, {.most = 1024}, "0: one a core");
    options.footer(kvplane::recipes::help());
    return options.run(count, arguments, [&] { run(s); });
}
