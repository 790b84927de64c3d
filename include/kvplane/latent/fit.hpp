// kvplane/latent/fit.hpp: fits bases and widths to statistics, as a recipe asks.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/latent/basis.hpp"
#include "kvplane/latent/keys.hpp"
#include "kvplane/latent/statistics.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane {

/// How keys are stored as latents instead of channels. The basis is either part of the model
/// (CacheConfiguration::latent_keys), or the cache fits one to the first tokens of its own sequence.
struct LatentRecipe {
    BasisSettings basis;
    /// Widths of equal groups of latents, as SVDq gives them. If empty, the best widths for `bits` are
    /// chosen.
    std::vector<int> groups;
    /// The budget if widths are chosen, given as the width of keys by channel that take as many bytes. 3.0
    /// means 3 bits plus .25 for the grid, because grids by channel take 32 bits for 128 tokens. The bytes of
    /// a cache's own basis count too, spread over basis.context tokens.
    double bits = 3.0;
    /// Whether the widths of given bases are chosen over all layers together, not for each layer at the same
    /// budget.
    bool layers_together = true;
    /// Whether a basis that the cache fits itself covers all heads together. (For a given basis,
    /// basis.heads_together says so.) The bytes of such a basis count, and there are as many times more of
    /// them as there are heads.
    bool own_heads_together = false;
    Index fit_tokens = 512;  ///< tokens after the sinks that the cache's own basis is fitted to

    bool operator==(const LatentRecipe&) const = default;
};

/// Bases and widths of all layers of a model from their statistics, as the recipe asks. context_tokens: the
/// number of tokens over which the bytes of the basis are spread; 0 if they do not count, as for a basis that
/// is part of the model. cut: whether latents that the statistics do not determine get no bits; if false, a
/// schedule by groups that asks for them is refused. Throws Error (shape, option) as fit_latent_basis,
/// grouped_schedule and best_schedules do.
std::vector<std::shared_ptr<const LatentKeys>> fit_latent_keys(std::span<const LatentStatistics> layers,
                                                               const std::optional<RopeSettings>& rope,
                                                               const LatentRecipe& recipe,
                                                               Index context_tokens = 0, bool cut = false);

/// The same for one layer.
inline std::shared_ptr<const LatentKeys> fit_latent_keys(const LatentStatistics& statistics,
                                                         const std::optional<RopeSettings>& rope,
                                                         const LatentRecipe& recipe, Index context_tokens = 0,
                                                         bool cut = false) {
    return fit_latent_keys({&statistics, 1}, rope, recipe, context_tokens, cut).front();
}

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/latent/impl/fit.hpp"
#endif
