// examples/engine/kvplane_cache.hpp: kvplane as the engine's KV cache. All that an engine author needs is here.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/layer_cache.hpp"
#include "engine/model.hpp"
#include "engine/parallel.hpp"
#include "kvplane/cache/capabilities.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/recipes.hpp"

namespace engine {

/// What the layers of a sequence share at a read, because they are read one after another.
struct SharedWorkspace {
    explicit SharedWorkspace(Executor& threads) : workspace(&threads) {}
    kvplane::AttentionWorkspace workspace;
    double bits = 0.0;  ///< sum over `reads`
    Index reads = 0;
};

/// One layer's kvplane cache behind the engine's interface.
class KvplaneCache final : public LayerCache {
  public:
    /// The parameters say what attention does: over a sliding window, which is all that is kept, or with keys
    /// left out.
    KvplaneCache(const kvplane::CacheConfiguration& configuration, kvplane::TilePool& pool,
                 std::shared_ptr<SharedWorkspace> shared, const kvplane::AttentionParameters& parameters = {})
        : cache_(configuration, pool), shared_(std::move(shared)), parameters_(parameters) {}

    void append(const Matrix& keys, const Matrix& values, const Matrix& queries) override {
        drop_unseen();
        const Index sure = std::min(sure_.value_or(keys.rows()), keys.rows()), drafts = keys.rows() - sure;
        if (sure > 0)
            cache_.append(keys.topRows(sure), values.topRows(sure), queries.topRows(sure),
                          shared_->workspace);
        if (drafts > 0)
            cache_.append_provisional(keys.bottomRows(drafts), values.bottomRows(drafts),
                                      queries.bottomRows(drafts));
    }
    void attend(const Matrix& queries, Matrix& out) const override {
        const auto& c = cache_.configuration();
        out.resize(queries.rows(), c.query_heads * c.value_head_dim);
        cache_.attend(queries, out, parameters_, shared_->workspace);
        if (const auto& report = shared_->workspace.report(); report.mean_bits > 0.0) {
            shared_->bits += report.mean_bits;
            ++shared_->reads;
        }
    }
    /// Bits that attention read of a packed element on average over all layers and calls so far, or 0.
    double mean_read_bits() const noexcept {
        return shared_->reads > 0 ? shared_->bits / static_cast<double>(shared_->reads) : 0.0;
    }
    Index tokens() const override { return cache_.tokens(); }
    /// How much later reads take; one cache serves them all.
    void read(const kvplane::ReadPolicy& policy) noexcept { parameters_.read = policy; }
    void truncate(Index tokens) { cache_.truncate(tokens); }
    /// How many of the tokens of each call to come are sure. The others are drafts, which truncate() takes back
    /// without a trace. none: all are sure, and drafts that are left are accepted.
    void expect_drafts(std::optional<Index> sure) {
        sure_ = sure;
        if (!sure) cache_.accept();
    }
    const kvplane::KvCache& cache() const noexcept { return cache_; }

  private:
    /// A layer with a sliding window gives the pages of tokens that no later query sees back to the pool.
    /// Drafts may be taken back, so that windows are those of the token after the sure ones.
    void drop_unseen() {
        const Index seen = cache_.tokens() - cache_.provisional_tokens() + 1 - parameters_.sliding_window;
        if (parameters_.sliding_window > 0 && seen > 0) cache_.drop_before(seen, 0);
    }

    kvplane::KvCache cache_;
    std::shared_ptr<SharedWorkspace> shared_;
    kvplane::AttentionParameters parameters_;
    std::optional<Index> sure_;
};

/// How the caches of a model store and read.
struct CachePlan {
    std::vector<kvplane::CacheRecipe> recipes;  ///< one for all layers, or one for each
    /// Bases of latents by layer. Where it is empty, caches with latents fit their own.
    std::vector<std::shared_ptr<const kvplane::LatentKeys>> latents = {};
    /// Moments of queries by layer, for recipes that shape keys. Where it is empty, caches gather their own.
    std::vector<std::shared_ptr<const std::vector<kvplane::SecondMoments>>> query_moments = {};
    kvplane::AttentionParameters read = {};
};

/// A layer of the model, without a recipe: heads, RoPE and over how many positions queries look back.
inline kvplane::CacheConfiguration layer_configuration(const ModelConfig& model, Index layer) {
    kvplane::CacheConfiguration configuration;
    configuration.kv_heads = model.kv_heads;
    configuration.query_heads = model.query_heads;
    configuration.key_head_dim = configuration.value_head_dim = model.head_dim;
    configuration.rope = model.rope(layer);
    if (const Index window = model.window(layer); window > 0) configuration.context = window;
    return configuration;
}

/// The configurations of a plan, one a layer. Throws Error (shape) for a plan of another number of layers.
inline std::vector<kvplane::CacheConfiguration> configurations(const ModelConfig& model,
                                                               const CachePlan& plan) {
    const auto fits = [&](std::size_t layers) { return static_cast<Index>(layers) == model.layers; };
    kvplane::require(plan.recipes.size() == 1 || fits(plan.recipes.size()), ErrorCode::shape,
                     plan.recipes.size(), " recipes for a model of ", model.layers, " layers");
    kvplane::require(plan.latents.empty() || fits(plan.latents.size()), ErrorCode::shape, plan.latents.size(),
                     " bases for a model of ", model.layers, " layers");
    std::vector<kvplane::CacheConfiguration> all;
    for (Index layer = 0; layer < model.layers; ++layer) {
        kvplane::CacheConfiguration& configuration = all.emplace_back(layer_configuration(model, layer));
        const auto at = static_cast<std::size_t>(layer);
        configuration.recipe = plan.recipes[plan.recipes.size() == 1 ? 0 : at];
        if (!plan.latents.empty() && configuration.recipe.latents)
            configuration.latent_keys = plan.latents[at];
        if (!plan.query_moments.empty() && configuration.recipe.shaped_keys)
            configuration.query_moments = plan.query_moments[at];
    }
    return all;
}

/// A sequence: one cache a layer. Throws Error (shape) for a plan of another number of layers.
inline LayerCaches kvplane_caches(const ModelConfig& model, const CachePlan& plan, kvplane::TilePool& pool,
                                  Executor& threads) {
    const auto shared = std::make_shared<SharedWorkspace>(threads);
    LayerCaches caches;
    for (const kvplane::CacheConfiguration& configuration : configurations(model, plan)) {
        kvplane::AttentionParameters parameters = plan.read;
        parameters.sliding_window = model.window(static_cast<Index>(caches.size()));
        caches.push_back(std::make_unique<KvplaneCache>(configuration, pool, shared, parameters));
    }
    return caches;
}

/// Why attention decodes tiles in some layer of a plan, which is slow; empty where packed bits are read in all.
inline std::string decodes_tiles_because(const ModelConfig& model, const CachePlan& plan) {
    if (plan.read.key_fraction < 1.0)
        return "a query scores all keys in some latents before it scores a share of them";
    for (const kvplane::CacheConfiguration& configuration : configurations(model, plan))
        if (const auto can = kvplane::capabilities(configuration); !can.decodes_packed)
            return can.decodes_tiles_because;
    return "";
}

/// A sequence of caches made by kvplane_caches(): how much later reads take, back to its first tokens, and
/// whether tokens to come are drafts.
inline void read(LayerCaches& caches, const kvplane::ReadPolicy& policy) {
    for (auto& layer : caches) dynamic_cast<KvplaneCache&>(*layer).read(policy);
}
inline void truncate(LayerCaches& caches, Index tokens) {
    for (auto& layer : caches) dynamic_cast<KvplaneCache&>(*layer).truncate(tokens);
}
inline void expect_drafts(LayerCaches& caches, std::optional<Index> sure) {
    for (auto& layer : caches) dynamic_cast<KvplaneCache&>(*layer).expect_drafts(sure);
}
/// How many drafts may follow one sure token before some layer would make a tile, had they come one by one.
inline Index drafts_before_tile(const LayerCaches& caches) {
    Index most = std::numeric_limits<Index>::max();
    for (const auto& layer : caches)
        most = std::min(most, dynamic_cast<const KvplaneCache&>(*layer).cache().tokens_before_tile());
    return std::max<Index>(0, most - 1);
}

struct CacheSize {
    double read_bits = 0.0;  ///< of a packed element, on average over reads
    Index bytes = 0;
    double bits_per_element = 0.0;
};

/// The size of all layers together. An fp32 cache counts as 4 bytes for each number it holds. The elements of
/// a layer with a sliding window are those of the window, which is all that it needs.
inline CacheSize size_of(const ModelConfig& model, const LayerCaches& caches) {
    CacheSize size;
    double elements = 0.0;
    for (std::size_t i = 0; i < caches.size(); ++i) {
        const LayerCache& layer = *caches[i];
        const Index per_token = 2 * model.kv_heads * model.head_dim,
                    window = model.window(static_cast<Index>(i));
        const Index tokens = window > 0 ? std::min(window, layer.tokens()) : layer.tokens();
        elements += static_cast<double>(per_token * tokens);
        if (const auto* packed = dynamic_cast<const KvplaneCache*>(&layer)) {
            size.bytes += packed->cache().bytes();
            size.read_bits = packed->mean_read_bits();
        } else
            size.bytes += 4 * per_token * tokens;
    }
    size.bits_per_element = elements > 0.0 ? 8.0 * static_cast<double>(size.bytes) / elements : 0.0;
    return size;
}

}  // namespace engine
