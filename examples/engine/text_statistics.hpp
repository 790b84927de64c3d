// examples/engine/text_statistics.hpp: moments of a model's keys and queries on a text.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "engine/model.hpp"
#include "engine/text_file.hpp"
#include "engine/tokenizer.hpp"
#include "kvplane/io/latent_file.hpp"

namespace engine {

/// No recipe puts the first tokens into tiles.
inline constexpr Index untiled_tokens = 4;

/// Moments before RoPE of all layers, over `count` tokens of the text from `first` on. The model reads
/// `context` tokens at a time, and the first 4 of each context are left out. `progress` is told how many
/// are done. Throws Error (index) where the text has fewer.
inline kvplane::Calibration statistics_of(const Model& model, const Tokenizer& tokenizer,
                                          const std::vector<TokenId>& text, Index first, Index count,
                                          Index context, const std::function<void(Index)>& progress) {
    (void)context_from(tokenizer, text, first, count);  // refuses more than there are
    const ModelConfig& config = model.config();
    kvplane::Calibration calibration{model.name(), config.rope(), {}};
    calibration.layers.assign(static_cast<std::size_t>(config.layers),
                              {config.kv_heads, config.query_heads, config.head_dim});
    for (Index done = 0; done < count; done += context) {
        LayerCaches caches = model.exact_caches();
        const auto window = context_from(tokenizer, text, first + done, std::min(context, count - done));
        model.forward(window, caches, Logits::none, [&](const LayerActivations& a) {
            const Index rows =
                std::max<Index>(0, a.keys.rows() - (a.first_position == 0 ? untiled_tokens : 0));
            kvplane::LatentStatistics& layer = calibration.layers[static_cast<std::size_t>(a.layer)];
            layer.add_keys({a.keys_before_rope.bottomRows(rows), 0});
            layer.add_queries(a.queries_before_rope.bottomRows(rows));
        });
        progress(done + static_cast<Index>(window.size()));
    }
    return calibration;
}

}  // namespace engine
