// kvplane/latent/impl/fit.hpp: fits bases for all layers and schedules under one budget, and makes
// LatentKeys.
#pragma once

#include <algorithm>
#include <utility>

#include "kvplane/latent/fit.hpp"
#include "kvplane/latent/schedule.hpp"

namespace kvplane {

namespace detail {

/// Takes the bits from all latents that the statistics do not determine.
inline void limit_to_rank(LatentSchedule& schedule, Index rank) {
    const Index channels = schedule.channels();
    Index left = rank;
    std::vector<ChannelSegment> segments;
    for (const ChannelSegment& segment : schedule.segments) {
        const Index kept = segment.bits > 0 ? std::min(left, segment.channels) : 0;
        if (kept > 0) segments.push_back({kept, segment.bits});
        left -= kept;
    }
    schedule.segments = segments;
    if (schedule.channels() < channels) schedule.segments.push_back({channels - schedule.channels(), 0});
}

}  // namespace detail

KVPLANE_FUNCTION std::vector<std::shared_ptr<const LatentKeys>> fit_latent_keys(
    std::span<const LatentStatistics> layers, const std::optional<RopeSettings>& rope,
    const LatentRecipe& recipe, Index context_tokens, bool cut) {
    std::vector<LatentBasis> bases;
    std::vector<Eigen::VectorXd> spectra;
    ScheduleSettings settings;
    for (const LatentStatistics& layer : layers) {
        bases.push_back(fit_latent_basis(layer, rope ? &*rope : nullptr, recipe.basis));
        for (const LatentBasis::Subspace& subspace : bases.back().subspaces())
            spectra.push_back(subspace.spectrum);
    }
    if (bases.empty()) return {};
    const double tiles = static_cast<double>(context_tokens) / static_cast<double>(tile_tokens);
    if (context_tokens > 0)
        settings.basis_bytes_per_latent = static_cast<double>(bases[0].bytes_per_latent()) / tiles;
    std::vector<LatentSchedule> schedules;
    const std::size_t subspaces = bases[0].subspaces().size();
    if (recipe.groups.empty()) {
        const std::size_t together = recipe.layers_together ? spectra.size() : subspaces;
        for (std::size_t first = 0; first < spectra.size(); first += together)
            for (LatentSchedule& schedule :
                 best_schedules(std::span(spectra).subspan(first, together), recipe.bits + 0.25, settings))
                schedules.push_back(std::move(schedule));
    } else {
        for (const Eigen::VectorXd& spectrum : spectra)
            schedules.push_back(grouped_schedule(spectrum, recipe.groups, settings));
    }
    std::vector<std::shared_ptr<const LatentKeys>> fitted;
    // A run may end beyond the rank by less than a step. A cache that fits its own basis must take whatever
    // keys it gets.
    if (recipe.groups.empty() || cut)
        for (std::size_t i = 0; i < schedules.size(); ++i)
            detail::limit_to_rank(schedules[i], bases[i / subspaces].subspaces()[i % subspaces].rank);
    for (std::size_t layer = 0; layer < bases.size(); ++layer)
        fitted.push_back(std::make_shared<const LatentKeys>(
            bases[layer], std::span(schedules).subspan(layer * subspaces, subspaces)));
    return fitted;
}

}  // namespace kvplane
