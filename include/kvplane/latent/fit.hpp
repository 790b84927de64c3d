// kvplane/latent/fit.hpp: from statistics and a recipe to bases with widths.
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

/// Keys in latents instead of channels. The basis is part of the model (CacheConfiguration::latent_keys), or
/// the cache fits one to the first tokens of its own sequence.
struct LatentRecipe {
    BasisSettings basis;
    /// Widths of equal groups of latents, as SVDq gives them; empty: the best widths for `bits`.
    std::vector<int> groups;
    /// Budget where widths are chosen, as an equivalent width by channel: 3.0 means 3 bits, and .25 more for
    /// the grid, because grids by channel take 32 bits for 128 tokens. The bytes of a cache's own basis count
    /// too, spread over basis.context tokens.
    double bits = 3.0;
    /// Widths of given bases are chosen over all layers together, not for each layer at the same budget.
    bool layers_together = true;
    /// A basis of the cache's own covers all heads (basis.heads_together says so of one that is given). Its
    /// bytes count, and are as many times more as there are heads.
    bool own_heads_together = false;
    Index fit_tokens = 512;  ///< tokens after the sinks that a basis of the cache's own is fitted to

    bool operator==(const LatentRecipe&) const = default;
};

/// Bases and widths of all layers of a model from their statistics, as the recipe asks. context_tokens: over
/// how many tokens the basis' bytes are spread; 0: they do not count, as where the basis is part of the
/// model. cut: latents that the statistics do not determine get no bits; without it a schedule by groups that
/// asks for them is refused. Throws Error (shape, option) as fit_latent_basis, grouped_schedule and
/// best_schedules do.
std::vector<std::shared_ptr<const LatentKeys>> fit_latent_keys(std::span<const LatentStatistics> layers,
                                                               const std::optional<RopeSettings>& rope,
                                                               const LatentRecipe& recipe,
                                                               Index context_tokens = 0, bool cut = false);

/// Those of one layer.
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
