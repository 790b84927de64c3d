// examples/engine/calibrate.cpp: statistics of a model's keys and queries, for bases of latents.
#include <cstdio>
#include <string>

#include "engine/command_line.hpp"
#include "engine/model.hpp"
#include "engine/tokenizer.hpp"
#include "kvplane/io/latent_file.hpp"
#include "kvplane/latent/fit.hpp"
#include "kvplane/recipes.hpp"

namespace {

using namespace engine;

constexpr const char* usage =
    "usage: calibrate --model FILE --text FILE --out FILE [OPTIONS]\n"
    "       calibrate --dump A,B,C --rope-base BASE --out FILE [OPTIONS]\n"
    "       calibrate --merge A,B,C --out FILE [OPTIONS]\n"
    "\n"
    "Writes the means and second moments, before RoPE, that `evaluate --basis` and `generate --basis` fit "
    "bases\n"
    "of latents to: of a model on a text, of tensors (layers.L.keys_before_rope and .queries, as the dump "
    "example\n"
    "writes them, all layers from 0 on), or of several such files.\n"
    "  --first-token N     of the text (0)\n"
    "  --tokens N          (4096), in windows of --context N (2048); the first 4 of each are left out\n"
    "  --name NAME         the model's name, with --dump (\"unnamed\")\n"
    "  --rope-layout L     interleaved or halves, with --dump (interleaved)\n"
    "  --recipe NAME       also fit the bases and widths of this recipe to what was seen, and write them\n"
    "  --bases FILE        to this file, which is what an engine ships\n"
    "  --threads N         0: one a core (0)\n";

constexpr Index sinks = 4;  // no recipe puts the first tokens into tiles

kvplane::Calibration from_text(const CommandLine& options) {
    Threads threads(static_cast<int>(options.number("--threads", 0)));
    const Model model(Gguf::open(options.required("--model")), threads);
    const ModelConfig& config = model.config();
    const std::vector<TokenId> text = Tokenizer(model.file()).encode(read_text(options.required("--text")));
    const Index first = options.number("--first-token", 0), count = options.number("--tokens", 4096, 1),
                context = options.number("--context", 2048, sinks + 1);
    kvplane::require(first + count <= static_cast<Index>(text.size()), ErrorCode::index, "tokens ", first,
                     " to ", first + count, " of a text of ", text.size());
    kvplane::Calibration calibration{model.name(), config.rope(), {}};
    calibration.layers.assign(static_cast<std::size_t>(config.layers),
                              {config.kv_heads, config.query_heads, config.head_dim});
    for (Index done = 0; done < count; done += context) {
        LayerCaches caches = model.exact_caches();
        const std::span<const TokenId> window(text.data() + first + done,
                                              static_cast<std::size_t>(std::min(context, count - done)));
        model.forward(window, caches, Logits::none, [&](const LayerActivations& a) {
            const Index rows = std::max<Index>(0, a.keys.rows() - (a.first_position == 0 ? sinks : 0));
            kvplane::LatentStatistics& layer = calibration.layers[static_cast<std::size_t>(a.layer)];
            layer.add_keys({a.keys_before_rope.bottomRows(rows), 0});
            layer.add_queries(a.queries_before_rope.bottomRows(rows));
        });
        std::fprintf(stderr, "\r  token %ld of %ld", static_cast<long>(std::min(count, done + context)),
                     static_cast<long>(count));
    }
    std::fprintf(stderr, "\n");
    return calibration;
}

Index heads_of(const kvplane::SafetensorsFile& file, const std::string& tensor) {
    const auto& shape = file.info(tensor).shape;
    kvplane::require(shape.size() == 3, ErrorCode::shape, tensor, ": rank ", shape.size(),
                     ", expected [tokens, heads, head_dim]");
    return shape[1];
}

kvplane::Calibration from_dump(const std::string& path, const CommandLine& options) {
    const auto file = kvplane::SafetensorsFile::open(path);
    const std::string layout = options.text("--rope-layout", "interleaved");
    kvplane::require(layout == "interleaved" || layout == "halves", ErrorCode::option, "--rope-layout: '",
                     layout, "', expected interleaved or halves");
    kvplane::RopeSettings rope;
    rope.base = options.real("--rope-base", 0.0);
    kvplane::require(rope.base > 0.0, ErrorCode::option,
                     "--dump needs --rope-base: the model's, for its queries stand after RoPE in the file");
    if (layout == "halves") rope.layout = kvplane::RopeLayout::halves;
    kvplane::Calibration calibration{options.text("--name", "unnamed"), rope, {}};
    for (Index layer = 0;; ++layer) {
        const std::string prefix = "layers." + std::to_string(layer) + ".";
        if (!file.contains(prefix + "keys_before_rope")) break;
        const Matrix keys = file.to_float_matrix(prefix + "keys_before_rope");
        Matrix queries = file.to_float_matrix(prefix + "queries");
        const Index kv_heads = heads_of(file, prefix + "keys_before_rope"),
                    query_heads = heads_of(file, prefix + "queries"), dim = keys.cols() / kv_heads;
        kvplane::require(keys.rows() > sinks && queries.rows() <= keys.rows(), ErrorCode::shape, path, ": ",
                         keys.rows(), " keys and ", queries.rows(), " queries of layer ", layer,
                         ", expected more than ", sinks, " keys, and queries of the last of them");
        kvplane::RotaryEmbedding(dim, rope).rotate_back(queries, keys.rows() - queries.rows());
        kvplane::LatentStatistics& statistics = calibration.layers.emplace_back(kv_heads, query_heads, dim);
        statistics.add_keys({keys.bottomRows(keys.rows() - sinks), sinks});
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

void run(const CommandLine& options) {
    const std::string out = options.required("--out");
    const bool bases = options.has("--recipe");
    kvplane::require(bases == options.has("--bases"), ErrorCode::option,
                     "--recipe and --bases go together: which bases, and where to");
    kvplane::Calibration calibration;
    if (options.has("--merge"))
        calibration = merged(options.list("--merge"),
                             [](const std::string& path) { return kvplane::load_calibration(path); });
    else if (options.has("--dump"))
        calibration =
            merged(options.list("--dump"), [&](const std::string& path) { return from_dump(path, options); });
    else
        calibration = from_text(options);
    kvplane::save_calibration(calibration, out);
    std::fprintf(stderr, "%s: %zu layers of '%s', %.0f keys\n", out.c_str(), calibration.layers.size(),
                 calibration.model.c_str(), calibration.layers.front().keys().count());
    if (!bases) return;
    const kvplane::CacheRecipe recipe = kvplane::recipes::parse(options.text("--recipe"));
    kvplane::require(recipe.latents.has_value(), ErrorCode::option, "--recipe: '", recipe.name,
                     "' has no latents");
    const auto layers = kvplane::fit_latent_keys(calibration.layers, calibration.rope, *recipe.latents);
    kvplane::save_latent_keys(layers, calibration.model, options.text("--bases"));
    Index bytes = 0;
    for (const auto& layer : layers) bytes += layer->bytes();
    std::fprintf(stderr, "%s: bases of %s, %ld bytes\n", options.text("--bases").c_str(), recipe.name.c_str(),
                 static_cast<long>(bytes));
}

}  // namespace

int main(int count, char** arguments) {
    try {
        const CommandLine options(
            count, arguments,
            {"--model", "--text", "--dump", "--merge", "--out", "--first-token", "--tokens", "--context",
             "--name", "--rope-base", "--rope-layout", "--recipe", "--bases", "--threads"},
            {"--help"});
        if (options.has("--help")) return std::printf("%s", usage), 0;
        run(options);
    } catch (const std::exception& error) {
        return std::fprintf(stderr, "calibrate: %s\n", error.what()), 1;
    }
}
