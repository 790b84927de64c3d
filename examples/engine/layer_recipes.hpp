// examples/engine/layer_recipes.hpp: recipes from their names on a command line, those by layer included.
//
// To what kvplane/recipes.hpp knows, a model adds `allocated:SOURCE:BITS`: key and value bits by layer under
// a mean of BITS true bits, from
//   norms      |K|_F and |V|_F of a calibration text's cache, and 4^-b (the published rule)
//   weights    |W_K|_F and |W_V|_F, and 4^-b (the published rule without any text)
//   measured   the error of every width on the calibration text's cache, values rotated
#pragma once

#include <string>
#include <vector>

#include "engine/model.hpp"
#include "kvplane/allocate/key_favored.hpp"
#include "kvplane/recipes.hpp"
#include "kvplane/transform/hadamard.hpp"

namespace engine {

class LayerRecipes {
  public:
    /// `calibration`: tokens whose cache `allocated` recipes look at; may be empty where none is asked for.
    LayerRecipes(const Model& model, std::vector<TokenId> calibration)
        : model_(model), calibration_(std::move(calibration)) {}

    /// One recipe, or one a layer. Throws Error (option).
    std::vector<kvplane::CacheRecipe> parse(const std::string& text) {
        if (!text.starts_with("allocated:")) return {kvplane::recipes::parse(text)};
        const std::size_t colon = text.find(':', 10);
        kvplane::require(colon != std::string::npos, ErrorCode::option, "recipe '", text,
                         "', expected allocated:SOURCE:BITS");
        const std::string source = text.substr(10, colon - 10);
        char* end = nullptr;
        const double bits = std::strtod(text.c_str() + colon + 1, &end);
        kvplane::require(*end == '\0' && bits > 0.0, ErrorCode::option, "recipe '", text, "': '",
                         text.substr(colon + 1), "', expected a mean number of bits");
        return kvplane::recipes::key_favored(allocate(text, source, bits));
    }

  private:
    kvplane::KeyFavoredAllocation allocate(const std::string& text, const std::string& source, double bits) {
        kvplane::KeyFavoredOptions options;
        options.key_groups = {kvplane::tile_tokens};
        options.value_groups = {model_.config().head_dim};
        if (source == "weights") return key_favored(weight_norms(), bits, options);
        kvplane::require(source == "norms" || source == "measured", ErrorCode::option, "recipe '", text,
                         "': source '", source, "', expected norms, weights or measured");
        if (profiles_.empty()) measure(text, options);
        if (source == "norms") options.curve = kvplane::DistortionCurve::four_to_minus_bits;
        return key_favored(profiles_, bits, options);
    }

    std::vector<kvplane::LayerNorms> weight_norms() const {
        std::vector<kvplane::LayerNorms> layers;
        const ModelConfig& config = model_.config();
        const auto norm = [&](Index layer, const char* name) {
            Matrix weight(config.kv_heads * config.head_dim, config.width);
            model_.file()
                .tensor("blk." + std::to_string(layer) + "." + name + ".weight", weight.rows(), weight.cols())
                .to_float(0, weight.rows(), weight.data());
            return weight.cast<double>().norm();
        };
        for (Index layer = 0; layer < model_.config().layers; ++layer) {
            kvplane::LayerNorms norms;
            norms.key = norm(layer, "attn_k");
            norms.value = norm(layer, "attn_v");
            norms.head_dim = model_.config().head_dim;
            layers.push_back(norms);
        }
        return layers;
    }

    /// Runs the calibration text once and measures every width on its cache, sinks left out.
    void measure(const std::string& text, const kvplane::KeyFavoredOptions& options) {
        kvplane::require(static_cast<Index>(calibration_.size()) > 4 + kvplane::tile_tokens,
                         ErrorCode::option, "recipe '", text,
                         "' needs a calibration text of more than 132 tokens (--calibration)");
        const ModelConfig& config = model_.config();
        LayerCaches caches = model_.exact_caches();
        std::vector<Matrix> keys(static_cast<std::size_t>(config.layers)), values(keys.size());
        model_.forward(calibration_, caches, Logits::none, [&](const LayerActivations& a) {
            for (const auto& [all, more] : {std::pair{&keys, &a.keys}, {&values, &a.values}}) {
                Matrix& rows = (*all)[static_cast<std::size_t>(a.layer)];
                rows.conservativeResize(rows.rows() + more->rows(), more->cols());
                rows.bottomRows(more->rows()) = *more;
            }
        });
        const kvplane::Hadamard rotation(config.head_dim);
        for (std::size_t layer = 0; layer < keys.size(); ++layer) {
            rotation.rotate(values[layer]);
            profiles_.push_back(kvplane::measure_layer(keys[layer].bottomRows(keys[layer].rows() - 4),
                                                       values[layer].bottomRows(values[layer].rows() - 4),
                                                       options, config.kv_heads));
        }
    }

    const Model& model_;
    std::vector<TokenId> calibration_;
    std::vector<kvplane::LayerProfile> profiles_;
};

}  // namespace engine
