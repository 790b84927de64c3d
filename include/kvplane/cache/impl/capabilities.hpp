// kvplane/cache/impl/capabilities.hpp: capabilities as the checks of KvCache see them.
#pragma once

#include <string>
#include <utility>

#include "kvplane/attention/tile_attention.hpp"
#include "kvplane/cache/capabilities.hpp"
#include "kvplane/storage/narrow.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane {

namespace detail {

/// Empty where attention reads packed bits.
inline std::string why_tiles_are_decoded(const CacheConfiguration& c) {
    const CacheRecipe& recipe = c.recipe;
    const auto grids = [](const char* side, const GridRule& rule, const char* expected) {
        return std::string(side)
            .append(" have grids ")
            .append(name(rule.granularity))
            .append(" over ")
            .append(std::to_string(rule.group))
            .append(rule.granularity == Granularity::per_token ? " channels" : " tokens")
            .append(", and packed bits are read of ")
            .append(expected);
    };
    if (recipe.latents && recipe.latents->basis.frame == KeyFrame::before_rope)
        return "keys are latents before RoPE, each of which has an angle of its own to be turned by";
    if (!recipe.latents && !reads_key_planes(c.key_format()))
        return grids("keys", recipe.keys.rule,
                     "the head or multiples of 32 channels, where units of planes begin");
    if (!c.values_in_keys && !reads_value_planes(c.value_format()))
        return grids("values", recipe.values.rule,
                     "grids per_token over the head or multiples of 16 channels");
    return "";
}

}  // namespace detail

KVPLANE_FUNCTION CacheCapabilities capabilities(const CacheConfiguration& c) {
    detail::require_configuration(c);
    const CacheRecipe& recipe = c.recipe;
    const bool half_keys = !recipe.latents && recipe.keys.is_half(), half_values = recipe.values.is_half();
    std::string because = detail::why_tiles_are_decoded(c);
    const bool packed = because.empty(),
               planes = packed && !c.values_in_keys && !c.widths_by_token() && !c.keys_by_token();
    const auto widths_of = [](const SideRecipe& side) {
        return side.is_half() || !prefixes_are_grids(side.rule.scheme) ? std::vector<int>{}
                                                                       : narrower_widths(side.bits);
    };
    CacheCapabilities can;
    can.decodes_packed = packed;
    can.decodes_tiles_because = std::move(because);
    can.reads_by_bits = can.reads_by_tolerance = planes;
    can.reads_by_exponents = planes && (half_keys || half_values);
    can.selects_keys = recipe.latents.has_value();
    const bool half_recents = recipe.recent_bits_of(TileSide::keys) == 16 &&
                              (c.values_in_keys || recipe.recent_bits_of(TileSide::values) == 16);
    can.truncates_exactly = recipe.every_token || (half_keys && (half_values || c.values_in_keys) &&
                                                   half_recents && recipe.rotary_bits % 16 == 0);
    can.removes = c.rope || recipe.latents;
    can.narrower_keys = recipe.latents ? narrower_widths(8) : widths_of(recipe.keys);
    if (!c.values_in_keys && !c.widths_by_token()) can.narrower_values = widths_of(recipe.values);
    can.fits_basis = c.fits_basis();
    can.wants_queries =
        (c.fits_basis() && recipe.latents->basis.query_weighted) || (recipe.shaped_keys && !c.query_moments);
    can.weighs_tokens = c.widths_by_token();
    can.predicts_bytes = !c.fits_basis();
    return can;
}

}  // namespace kvplane
