// kvplane/cache/impl/configuration.hpp: what is refused before a cache is built.
#pragma once

#include <algorithm>
#include <cmath>

#include "kvplane/attention/kernels/plane_dot.hpp"
#include "kvplane/cache/configuration.hpp"
#include "kvplane/latent/schedule.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane {

namespace detail {

inline void require_side(const SideRecipe& side, const char* which, bool every_token) {
    if (!side.is_half()) {
        require(side.bits >= 1 && side.bits <= 8, ErrorCode::option, which, ": ", side.bits,
                " bits, expected 1 to 8 or 16");
        require_grids(side.rule, side.rule.scheme, side.bits);
        require(
            !every_token || side.rule.granularity == Granularity::per_token, ErrorCode::option, which,
            ": grids per channel need whole tiles, so a recipe that quantizes every token cannot have them; "
            "expected grids per token");
    }
}

/// Throws Error (option) for keys that cannot be shaped, and (mismatch) for moments of other heads.
inline void require_shaping(const CacheConfiguration& c) {
    const CacheRecipe& recipe = c.recipe;
    require(c.context >= 1, ErrorCode::option, "cache: a context of ", c.context, ", expected at least 1");
    if (c.query_moments) {
        require(recipe.shaped_keys, ErrorCode::mismatch, "cache: moments of queries are given, but recipe '",
                recipe.name, "' does not shape keys");
        const auto& heads = *c.query_moments;
        require(static_cast<Index>(heads.size()) == c.kv_heads &&
                    std::all_of(heads.begin(), heads.end(),
                                [&](const SecondMoments& head) { return head.channels() == c.key_head_dim; }),
                ErrorCode::mismatch, "cache: moments of the queries of ", heads.size(), " key heads of ",
                heads.empty() ? 0 : heads[0].channels(), " channels, expected ", c.kv_heads, " of ",
                c.key_head_dim);
    }
    require(
        !recipe.rotates_by_tile || (recipe.shaped_keys && !recipe.keys.rotate), ErrorCode::option,
        "cache: recipe '", recipe.name,
        "' rotates keys tile by tile, expected one that shapes them (shaped_keys=1) and does not rotate all");
    if (!recipe.shaped_keys) return;
    require(!recipe.latents && !c.values_in_keys, ErrorCode::option, "cache: recipe '", recipe.name,
            "' shapes keys that are in latents, or that values are in; expected keys in channels alone");
    require(!recipe.keys.is_half() && recipe.keys.rule.granularity == Granularity::per_channel &&
                recipe.keys.rule.clip == Clip::none && recipe.keys.rule.scheme != Scheme::full_range,
            ErrorCode::option, "cache: recipe '", recipe.name,
            "' shapes keys, which takes 1 to 8 bits on grids per channel that clip nothing");
}

/// Throws Error (mismatch) for latents of another model, layer or recipe.
inline void require_latents(const CacheConfiguration& c) {
    const std::optional<LatentRecipe>& recipe = c.recipe.latents;
    if (!c.latent_keys) return;
    require(recipe.has_value(), ErrorCode::mismatch, "cache: a basis of latents is given, but recipe '",
            c.recipe.name, "' keeps keys in channels");
    const LatentKeys& latent = *c.latent_keys;
    require(latent.kv_heads() == c.kv_heads && latent.query_heads() == c.query_heads &&
                latent.head_dim() == c.key_head_dim,
            ErrorCode::mismatch, "cache: a basis for ", latent.query_heads(), " query heads over ",
            latent.kv_heads(), " key heads of ", latent.head_dim(), " channels, expected ", c.query_heads,
            " over ", c.kv_heads, " of ", c.key_head_dim);
    require(latent.frame() == recipe->basis.frame, ErrorCode::mismatch, "cache: a basis in the frame ",
            name(latent.frame()), ", expected ", name(recipe->basis.frame));
    require(latent.rope() == c.rope, ErrorCode::mismatch,
            "cache: the basis was fitted to keys with another rotary embedding than the configuration's");
    require(latent.settings().heads_together == recipe->basis.heads_together &&
                latent.settings().query_weighted == recipe->basis.query_weighted &&
                latent.settings().directions == recipe->basis.directions,
            ErrorCode::mismatch, "cache: the basis is of another kind than recipe '", c.recipe.name,
            "' asks for");
}

inline void require_latent_recipe(const CacheConfiguration& c) {
    if (!c.recipe.latents) return;
    const LatentRecipe& latents = *c.recipe.latents;
    require(!c.recipe.every_token, ErrorCode::option,
            "cache: latents need whole tiles, so a recipe that quantizes every token cannot have them");
    require(std::isfinite(latents.bits) && latents.bits >= 0.0 && latents.bits <= 8.0, ErrorCode::option,
            "cache: ", latents.bits, " bits for latents, expected 0 to 8");
    require(latents.fit_tokens >= 2 && latents.fit_tokens <= Index{1} << 30, ErrorCode::option,
            "cache: a basis fitted to ", latents.fit_tokens, " tokens, expected at least 2");
    require(latents.basis.tile_tokens == tile_tokens && latents.basis.context >= 1, ErrorCode::option,
            "cache: a basis for tiles of ", latents.basis.tile_tokens, " tokens and a context of ",
            latents.basis.context, ", expected tiles of ", tile_tokens, " and a context of at least 1");
    const bool together = c.latent_keys ? latents.basis.heads_together : latents.own_heads_together;
    const Index part = together ? c.kv_heads * c.key_head_dim : c.key_head_dim;
    if (!latents.groups.empty())  // throws where they do not fit
        (void)grouped_schedule(Eigen::VectorXd::Zero(part), latents.groups);
}

inline void require_values_in_keys(const CacheConfiguration& c) {
    const CacheRecipe& recipe = c.recipe;
    require(recipe.rotary_bits == 0 || recipe.rotary_bits == 16 ||
                (recipe.rotary_bits >= 1 && recipe.rotary_bits <= 8),
            ErrorCode::option, "cache: rotary channels of ", recipe.rotary_bits,
            " bits, expected 1 to 8, 16, or 0 for those of the keys");
    if (!c.values_in_keys) return;
    require(c.value_head_dim <= c.key_head_dim, ErrorCode::option, "cache: values of ", c.value_head_dim,
            " channels in keys of ", c.key_head_dim, ", expected no more than those");
    require(!recipe.latents, ErrorCode::option, "cache: values in keys, but recipe '", recipe.name,
            "' keeps keys in latents; expected keys in channels");
    // The rotation of keys is that of the values and of the rest, each by itself.
    Index whole = 0;
    for (Index left = c.key_head_dim, size; whole < c.value_head_dim; whole += size, left -= size)
        for (size = 1; 2 * size <= left;) size *= 2;
    require(
        !recipe.keys.rotate || whole == c.value_head_dim, ErrorCode::option, "cache: values in the first ",
        c.value_head_dim, " of ", c.key_head_dim,
        " channels of keys cannot be rotated by themselves; expected a recipe that does not rotate keys, or "
        "the largest powers of two that make up the channels, such as 512 of 576");
}

/// Throws Error (option) for widths by token that cannot be.
inline void require_widths_by_token(const CacheConfiguration& c) {
    const CacheRecipe& recipe = c.recipe;
    require(recipe.keys.widths.empty(), ErrorCode::option, "cache: recipe '", recipe.name,
            "' gives tokens of keys different widths, which values alone have");
    if (!c.widths_by_token()) return;
    require(!recipe.every_token, ErrorCode::option, "cache: recipe '", recipe.name,
            "' quantizes every token when it comes; tokens of different widths are chosen in whole tiles");
    const int widest = recipe.values.widths[0].bits;
    require(recipe.values.bits == widest, ErrorCode::option, "cache: values of ", recipe.values.bits,
            " bits whose widest tokens have ", widest, ", expected the same");
    for (const TokenRun& run : recipe.values.widths)
        require_grids(recipe.values.rule, recipe.values.rule.scheme, run.bits);
}

KVPLANE_FUNCTION void require_configuration(const CacheConfiguration& c) {
    require(c.kv_heads >= 1 && c.query_heads >= c.kv_heads && c.query_heads % c.kv_heads == 0,
            ErrorCode::option, "cache: ", c.query_heads, " query heads over ", c.kv_heads,
            " key/value heads, expected a multiple");
    require(c.key_head_dim >= 1 && c.value_head_dim >= 1, ErrorCode::option, "cache: head_dim ",
            c.key_head_dim, " of keys and ", c.value_head_dim, " of values, expected at least 1");
    const CacheRecipe& recipe = c.recipe;
    require(recipe.sink_tokens >= 0 && recipe.recent_tokens >= 0, ErrorCode::option,
            "cache: ", recipe.sink_tokens, " sink tokens and ", recipe.recent_tokens,
            " recent tokens, expected neither below 0");
    for (const TileSide side : {TileSide::keys, TileSide::values}) {
        const int bits = recipe.recent_bits_of(side);
        require(bits == 16 || bits == 8, ErrorCode::option, "cache: recent tokens of ", bits,
                " bits, expected 16 or 8");
    }
    require(!recipe.every_token || (recipe.sink_tokens == 0 && recipe.recent_tokens == 0), ErrorCode::option,
            "cache: a recipe that quantizes every token keeps no sinks and no recent tokens; it asks for ",
            recipe.sink_tokens, " and ", recipe.recent_tokens);
    require(std::max(c.key_head_dim, c.value_head_dim) <= max_depth &&
                (!recipe.latents || c.kv_heads * c.key_head_dim <= max_depth),
            ErrorCode::option, "cache: head_dim ", c.key_head_dim, " of keys and ", c.value_head_dim,
            " of values, expected at most ", max_depth, " (of all heads together in latents)");
    require_side(recipe.keys, "cache keys", recipe.every_token);
    require_side(recipe.values, "cache values", recipe.every_token);
    require_values_in_keys(c);
    require_widths_by_token(c);
    // Throws where the grids are impossible; keys in latents bring a format of their own.
    if (!recipe.latents) (void)c.key_format();
    (void)c.value_format();
    require_latent_recipe(c);
    if (c.rope) RotaryEmbedding(c.key_head_dim, *c.rope);  // throws where there is none
    require_latents(c);
    require_shaping(c);
}

}  // namespace detail

}  // namespace kvplane
