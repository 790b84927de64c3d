// examples/engine/layer_recipes.hpp: recipes from their names on a command line, those by layer included.
//
// Seven things are added to the names that kvplane/recipe_names.hpp knows:
//   allocated:SOURCE:BITS   key and value bits by layer, BITS true bits on average. SOURCE is
//                             norms      |K|_F and |V|_F of a calibration text's cache, and 4^-b (published rule)
//                             weights    |W_K|_F and |W_V|_F, and 4^-b (the published rule without any text)
//                             measured   the error of every width on the calibration text's cache, values rotated
//   policy                  what a policy file says of each layer (kvplane/io/policy_file.hpp; see `tune`)
//   global:RECIPE           the recipe in layers that see all tokens, fp16 in those with a sliding window
//   only:LAYERS:RECIPE      the recipe in some layers, as 3 or 0-4, fp16 in all others
//   kept:RECIPE             the recipe with the sinks and recent tokens of `standard`, for methods that keep none
//                           (block32, kivi)
//   RECIPE@POLICY           what a read takes (recipes::read_policy()), as in key_favored:8:8@4
//   RECIPE@keys=FRACTION    of recipes with latents, the share of keys that a query reads: svdq:1.25@keys=1/32
#pragma once

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "engine/kvplane_cache.hpp"
#include "engine/model.hpp"
#include "kvplane/allocate/key_favored.hpp"
#include "kvplane/io/latent_file.hpp"
#include "kvplane/io/policy_file.hpp"
#include "kvplane/recipe_names.hpp"
#include "kvplane/recipes.hpp"
#include "kvplane/transform/hadamard.hpp"

namespace engine {

/// Bases of the latents of all layers. Layers of one RoPE are fitted, and their widths chosen, together.
inline std::vector<std::shared_ptr<const kvplane::LatentKeys>> fit_latent_keys(
    const ModelConfig& model, const std::vector<kvplane::LatentStatistics>& layers,
    const kvplane::LatentRecipe& recipe) {
    std::vector<std::shared_ptr<const kvplane::LatentKeys>> all(layers.size());
    for (const bool windowed : {false, true}) {
        std::vector<std::size_t> chosen;
        std::vector<kvplane::LatentStatistics> statistics;
        for (std::size_t i = 0; i < layers.size(); ++i) {
            if (model.is_windowed(static_cast<Index>(i)) != windowed) continue;
            chosen.push_back(i);
            statistics.push_back(layers[i]);
        }
        if (chosen.empty()) continue;
        const auto fitted =
            kvplane::fit_latent_keys(statistics, model.rope(static_cast<Index>(chosen[0])), recipe);
        for (std::size_t i = 0; i < chosen.size(); ++i) all[chosen[i]] = fitted[i];
    }
    return all;
}

/// Throws Error (mismatch) for statistics of another model.
inline void require_statistics(const Model& model, const kvplane::Calibration& statistics) {
    const ModelConfig& config = model.config();
    const kvplane::LatentStatistics& first = statistics.layers.front();
    kvplane::require(static_cast<Index>(statistics.layers.size()) == config.layers &&
                         first.kv_heads() == config.kv_heads && first.query_heads() == config.query_heads &&
                         first.head_dim() == config.head_dim && statistics.rope == config.rope(),
                     ErrorCode::mismatch, "the basis file is for a model of ", statistics.layers.size(),
                     " layers, ", first.query_heads(), " query heads over ", first.kv_heads(), " of ",
                     first.head_dim(), " channels, or of another RoPE; expected ", config.layers, ", ",
                     config.query_heads, ", ", config.kv_heads, ", ", config.head_dim);
}

/// Throws Error (mismatch) for a policy of another model.
inline void require_policy(const Model& model, const kvplane::ModelPolicy& policy) {
    std::vector<kvplane::CacheConfiguration> layers;
    for (Index layer = 0; layer < model.config().layers; ++layer)
        layers.push_back(layer_configuration(model.config(), layer));
    policy.require_model(model.name(), layers);
}

class LayerRecipes {
  public:
    /// `allocated` recipes look at the cache of the `calibration` tokens, which may be empty without such recipes.
    /// Bases of latents are fitted to the statistics `basis`; without it every cache fits its own. The recipe
    /// `policy` takes a policy. Throws Error (mismatch) for statistics or a policy of another model.
    LayerRecipes(const Model& model, std::vector<TokenId> calibration,
                 std::optional<kvplane::Calibration> basis = std::nullopt,
                 std::optional<kvplane::ModelPolicy> policy = std::nullopt)
        : model_(model),
          calibration_(std::move(calibration)),
          basis_(std::move(basis)),
          policy_(std::move(policy)) {
        if (basis_) require_statistics(model, *basis_);
        if (policy_) require_policy(model, *policy_);
    }

    /// Throws Error (option).
    CachePlan parse(const std::string& text) {
        const std::size_t at = text.find('@');
        CachePlan plan = stored(text.substr(0, at));
        if (at != std::string::npos) read(text, text.substr(at + 1), plan);
        return plan;
    }

  private:
    CachePlan stored(const std::string& text) {
        if (text == "policy") {
            kvplane::require(policy_.has_value(), ErrorCode::option,
                             "recipe 'policy' takes a file that tune wrote (--policy)");
            CachePlan plan;
            for (const kvplane::CacheConfiguration& layer : policy_->configurations()) {
                plan.recipes.push_back(layer.recipe);
                plan.latents.push_back(layer.latent_keys);
                plan.query_moments.push_back(layer.query_moments);
            }
            return plan;
        }
        if (text.starts_with("global:")) {
            return in_layers(text.substr(7),
                             [&](Index layer) { return !model_.config().is_windowed(layer); });
        }
        if (text.starts_with("only:")) {
            const char* at = text.c_str() + 5;
            char* end = nullptr;
            const long first = std::strtol(at, &end, 10);
            const long last = *end == '-' ? std::strtol(end + 1, &end, 10) : first;
            kvplane::require(
                end != at && *end == ':' && first >= 0 && first <= last && last < model_.config().layers,
                ErrorCode::option, "recipe '", text,
                "', expected only:LAYERS:RECIPE, as only:3:standard or only:0-4:standard, of ",
                model_.config().layers, " layers");
            return in_layers(end + 1, [&](Index layer) { return layer >= first && layer <= last; });
        }
        if (text.starts_with("kept:")) {
            CachePlan plan = stored(text.substr(5));
            const kvplane::CacheRecipe ours = kvplane::recipes::standard();
            for (kvplane::CacheRecipe& recipe : plan.recipes) {
                recipe.every_token = false;
                recipe.sink_tokens = ours.sink_tokens;
                recipe.recent_tokens = ours.recent_tokens;
                recipe.recent_bits = ours.recent_bits;
                recipe.recent_key_bits = ours.recent_key_bits;
            }
            return plan;
        }
        if (!text.starts_with("allocated:")) {
            CachePlan plan{{kvplane::recipes::parse(text)}};
            if (plan.recipes[0].latents && basis_)
                plan.latents = fit_latent_keys(model_.config(), basis_->layers, *plan.recipes[0].latents);
            if (plan.recipes[0].shaped_keys && basis_) plan.query_moments = query_moments();
            return plan;
        }
        const std::size_t colon = text.find(':', 10);
        kvplane::require(colon != std::string::npos, ErrorCode::option, "recipe '", text,
                         "', expected allocated:SOURCE:BITS");
        const std::string source = text.substr(10, colon - 10);
        char* end = nullptr;
        const double bits = std::strtod(text.c_str() + colon + 1, &end);
        kvplane::require(*end == '\0' && bits > 0.0, ErrorCode::option, "recipe '", text, "': '",
                         text.substr(colon + 1), "', expected a mean number of bits");
        return {kvplane::recipes::key_favored(allocate(text, source, bits))};
    }

    /// Moments of queries from the basis file.
    std::vector<std::shared_ptr<const std::vector<kvplane::SecondMoments>>> query_moments() const {
        std::vector<std::shared_ptr<const std::vector<kvplane::SecondMoments>>> layers;
        for (const kvplane::LatentStatistics& layer : basis_->layers) {
            std::vector<kvplane::SecondMoments> heads;
            for (Index head = 0; head < layer.kv_heads(); ++head) heads.push_back(layer.queries(head));
            layers.push_back(std::make_shared<const std::vector<kvplane::SecondMoments>>(std::move(heads)));
        }
        return layers;
    }
    /// The recipe in the layers that `chosen` says, fp16 in all others.
    template <class Chosen>
    CachePlan in_layers(const std::string& recipe, const Chosen& chosen) {
        CachePlan plan = stored(recipe);
        plan.recipes.resize(static_cast<std::size_t>(model_.config().layers), plan.recipes[0]);
        for (std::size_t i = 0; i < plan.recipes.size(); ++i)
            if (!chosen(static_cast<Index>(i))) plan.recipes[i] = kvplane::recipes::fp16();
        return plan;
    }

    static void read(const std::string& text, const std::string& policy, CachePlan& plan) {
        if (!policy.starts_with("keys=")) {
            plan.read.read = kvplane::recipes::read_policy(policy);
            return;
        }
        char* end = nullptr;
        const std::string share = policy.substr(5);
        double fraction = std::strtod(share.c_str(), &end);
        if (*end == '/') fraction /= std::strtod(end + 1, &end);
        kvplane::require(!share.empty() && *end == '\0' && fraction > 0.0 && fraction <= 1.0,
                         ErrorCode::option, "recipe '", text, "': '", share,
                         "', expected a fraction as 1/32");
        kvplane::require(plan.recipes.size() == 1 && plan.recipes[0].latents, ErrorCode::option, "recipe '",
                         text, "' has no latents in all layers to choose keys by");
        plan.read.key_fraction = fraction;
    }
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
    std::optional<kvplane::Calibration> basis_;
    std::optional<kvplane::ModelPolicy> policy_;
};

}  // namespace engine
