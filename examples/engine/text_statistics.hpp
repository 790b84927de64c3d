// examples/engine/text_statistics.hpp: moments of a model's keys and queries on a text.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "engine/model.hpp"
#include "engine/text_file.hpp"
#include "engine/tokenizer.hpp"
#include "kvplane/io/latent_file.hpp"

namespace engine {

/// No recipe puts the first tokens into tiles.
inline constexpr Index untiled_tokens = 4;

/// [token][query head] the squared softmax weights of the tokens that are packed when a query comes, summed up:
/// how much errors of packed keys count for its output.
///   keys    after RoPE, of all tokens up to the last of the queries
inline Matrix weights_of_packed(const Matrix& keys, const LayerActivations& a, const ModelConfig& config,
                                Executor& threads) {
    constexpr Index recent = 32;  // as recipes have it, unless they say otherwise
    const Index dim = config.head_dim, group = config.query_heads / config.kv_heads,
                window = config.window(a.layer), tile = kvplane::tile_tokens;
    Matrix weights(a.queries.rows(), config.query_heads);
    kvplane::detail::run_items(threads, config.query_heads, [&](Index head, Index) {
        for (Index first = 0; first < a.queries.rows(); first += tile) {
            const Index rows = std::min(tile, a.queries.rows() - first), at = a.first_position + first;
            const Matrix scores = a.queries.block(first, head * dim, rows, dim) *
                                  keys.block(0, head / group * dim, at + rows, dim).transpose() /
                                  std::sqrt(static_cast<float>(dim));
            for (Index i = 0; i < rows; ++i) {
                const Index seen = at + i + 1, from = window > 0 ? std::max<Index>(0, seen - window) : 0,
                            packed_from = std::max(untiled_tokens, from),
                            packed_to = untiled_tokens +
                                        std::max<Index>(0, seen - recent - untiled_tokens) / tile * tile;
                const auto row = scores.row(i).segment(from, seen - from).array();
                const Eigen::ArrayXf weight = (row - row.maxCoeff()).exp().transpose();
                const Index packed = std::max<Index>(0, packed_to - packed_from);
                weights(first + i, head) =
                    (weight.segment(packed > 0 ? packed_from - from : 0, packed) / weight.sum())
                        .square()
                        .sum();
            }
        }
    });
    return weights;
}

/// What statistics are taken of.
struct TextPart {
    Index first, count;  ///< tokens of the text
    Index context;       ///< how many the model reads at a time; the first 4 of each context are left out
    /// Whether queries are also weighted by what errors of packed keys count for.
    bool weighted = false;
};

/// Moments before RoPE of all layers. `progress` is told how many tokens are done. Throws Error (index) where the
/// text has fewer.
inline kvplane::Calibration statistics_of(const Model& model, const Tokenizer& tokenizer,
                                          const std::vector<TokenId>& text, const TextPart& part,
                                          const std::function<void(Index)>& progress) {
    const Index count = part.count, first = part.first, context = part.context;
    (void)context_from(tokenizer, text, first, count);  // refuses more than there are
    const ModelConfig& config = model.config();
    kvplane::Calibration calibration{model.name(), config.rope(), {}};
    calibration.layers.assign(static_cast<std::size_t>(config.layers),
                              {config.kv_heads, config.query_heads, config.head_dim});
    for (Index done = 0; done < count; done += context) {
        LayerCaches caches = model.exact_caches();
        std::vector<Matrix> keys(
            static_cast<std::size_t>(config.layers));  // of the window so far, after RoPE
        const auto window = context_from(tokenizer, text, first + done, std::min(context, count - done));
        model.forward(window, caches, Logits::none, [&](const LayerActivations& a) {
            const Index rows =
                std::max<Index>(0, a.keys.rows() - (a.first_position == 0 ? untiled_tokens : 0));
            kvplane::LatentStatistics& layer = calibration.layers[static_cast<std::size_t>(a.layer)];
            layer.add_keys({a.keys_before_rope.bottomRows(rows), 0});
            if (!part.weighted) return layer.add_queries(a.queries_before_rope.bottomRows(rows));
            Matrix& seen = keys[static_cast<std::size_t>(a.layer)];
            seen.conservativeResize(a.first_position + a.keys.rows(), a.keys.cols());
            seen.bottomRows(a.keys.rows()) = a.keys;
            layer.add_queries(a.queries_before_rope.bottomRows(rows),
                              weights_of_packed(seen, a, config, model.threads()).bottomRows(rows));
        });
        progress(done + static_cast<Index>(window.size()));
    }
    return calibration;
}

}  // namespace engine
