// examples/engine/layer_scan.hpp: what one layer's quantization does to a model's predictions.
//
// The exact pass over a text is run once, and what came into every layer is kept. A layer's cache changes
// nothing below it, so a measurement starts at that layer: on average it takes half of a pass. It also
// starts at the first token whose prediction is compared. Those before it, which see one packed tile at
// most, are taken as exact.
#pragma once

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "engine/divergence.hpp"
#include "engine/kvplane_cache.hpp"
#include "engine/model.hpp"

namespace engine {

/// A cache that is given tokens 32 at a time, as `evaluate` does, however many come together: no tile is
/// made of tokens that attend in the same call, while all other layers multiply large matrices.
class CacheInChunks final : public LayerCache {
  public:
    explicit CacheInChunks(std::unique_ptr<LayerCache> cache) : cache_(std::move(cache)) {}

    void append(const Matrix& keys, const Matrix& values, const Matrix& queries) override {
        attended_.resize(queries.rows(), queries.cols());
        Matrix part;
        for (Index first = 0; first < keys.rows(); first += chunk) {
            const Index count = std::min(chunk, keys.rows() - first);
            const Matrix now = queries.middleRows(first, count);
            cache_->append(keys.middleRows(first, count), values.middleRows(first, count), now);
            cache_->attend(now, part);
            attended_.middleRows(first, count) = part;
        }
    }
    /// Of the tokens of the last append().
    void attend(const Matrix&, Matrix& out) const override { out = attended_; }
    Index tokens() const override { return cache_->tokens(); }

  private:
    static constexpr Index chunk = 32;

    std::unique_ptr<LayerCache> cache_;
    Matrix attended_;
};

class LayerScan {
  public:
    /// One prediction of `every` is compared, from token 256 on. The model must outlive the scan. Throws
    /// Error (index) for a shorter context.
    LayerScan(const Model& model, const std::vector<TokenId>& context, Index every)
        : model_(model),
          every_(every),
          tokens_(static_cast<Index>(context.size())),
          hidden_(static_cast<std::size_t>(model.config().layers)) {
        kvplane::require(tokens_ > first_compared, ErrorCode::index, "scan: a context of ", tokens_,
                         " tokens, expected more than ", first_compared);
        for (Matrix& rows : hidden_) rows.resize(tokens_ - first_compared, model.config().width);
        LayerCaches caches = model.exact_caches();
        const std::span<const TokenId> all(context);
        const auto before = static_cast<std::size_t>(first_compared);
        model.forward(all.first(before), caches, Logits::none, [&](const LayerActivations& a) {
            before_.push_back({a.keys, a.values, a.queries});
        });
        model.forward(all.subspan(before), caches, Logits::none, [&](const LayerActivations& a) {
            hidden_[static_cast<std::size_t>(a.layer)].middleRows(a.first_position - first_compared,
                                                                  a.hidden.rows()) = a.hidden;
        });
        predictions_ = predictions(0, model.exact_caches());
    }

    /// Mean KL divergence in nats where one layer's cache is as configured and all others are exact.
    /// `layer`: by number from 0.
    double divergence(Index layer, const kvplane::CacheConfiguration& configuration) const {
        kvplane::TilePool pool;
        LayerCaches caches = model_.exact_caches();
        kvplane::AttentionParameters parameters;
        parameters.sliding_window = model_.config().window(layer);
        parameters.decode_tiles = true;  // what is stored, as evaluate compares it
        caches[static_cast<std::size_t>(layer)] =
            std::make_unique<CacheInChunks>(std::make_unique<KvplaneCache>(
                configuration, pool, std::make_shared<SharedWorkspace>(model_.threads()), parameters));
        const Matrix close = predictions(layer, std::move(caches));
        std::vector<double> divergences(static_cast<std::size_t>(close.rows()));
        parallel_for(model_.threads(), close.rows(), [&](Index i) {
            divergences[static_cast<std::size_t>(i)] = engine::divergence(predictions_.row(i), close.row(i));
        });
        double sum = 0.0;
        for (const double each : divergences) sum += each;
        return sum / static_cast<double>(divergences.size());
    }

  private:
    struct Rows {
        Matrix keys, values, queries;
    };

    /// Log probabilities of the tokens after those compared [compared, vocabulary].
    Matrix predictions(Index layer, LayerCaches caches) const {
        for (std::size_t i = static_cast<std::size_t>(layer); i < caches.size(); ++i)
            caches[i]->append(before_[i].keys, before_[i].values, before_[i].queries);
        const Matrix out = model_.resume(layer, hidden_[static_cast<std::size_t>(layer)], caches);
        Matrix compared((out.rows() - 1) / every_ + 1, out.cols());
        for (Index i = 0; i < compared.rows(); ++i) compared.row(i) = out.row(i * every_);
        Matrix logits = model_.logits_of(compared);
        log_softmax(logits, model_.threads());
        return logits;
    }

    const Model& model_;
    Index every_, tokens_;
    std::vector<Rows> before_;    // [layer] of the tokens before those compared
    std::vector<Matrix> hidden_;  // [layer] what came into it [token from first_compared on, width]
    Matrix predictions_;          // of exact caches
};

}  // namespace engine
