// kvplane/recipes.hpp: each method as a configuration of the parts. recipe_names.hpp has their names on a
// command line.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kvplane/allocate/key_favored.hpp"
#include "kvplane/cache/configuration.hpp"
#include "kvplane/error.hpp"

namespace kvplane::recipes {

namespace detail {

/// "method:bits". By append(), because g++ 12 warns falsely where a literal comes before a +.
inline std::string named(const char* method, int bits) {
    return std::string(method).append(":").append(std::to_string(bits));
}

}  // namespace detail

/// Keys: one grid for each channel of `group_tokens` tokens.
inline SideRecipe by_channel(int bits, Index group_tokens = 128) {
    return {bits, {Granularity::per_channel, group_tokens, scheme_for(bits), Clip::none}, false};
}
/// Values: one grid for each head of each token. Rotated ones of up to 4 bits have grids without bias.
inline SideRecipe by_token(int bits, bool rotate) {
    const Scheme scheme = rotate && bits <= 4 ? Scheme::unbiased : scheme_for(bits);
    return {bits, {Granularity::per_token, whole_head, scheme, Clip::none}, rotate};
}

inline CacheRecipe fp16() {
    CacheRecipe recipe;
    recipe.name = "fp16";
    recipe.sink_tokens = recipe.recent_tokens = 0;
    recipe.every_token = true;
    return recipe;
}

/// Blocks of 32 channels along the head, around zero, every token at once, nothing in fp16: ggml's Q8_0 and
/// Q4_0, the latter with all of its 16 levels.
inline CacheRecipe block32(int bits, bool rotated = false) {
    const Scheme scheme = bits == 8 ? Scheme::symmetric : Scheme::full_range;
    const SideRecipe side{bits, {Granularity::per_token, 32, scheme, Clip::none}, rotated};
    return {.name = detail::named("block32", bits).append(rotated ? ":rotated" : ""),
            .keys = side,
            .values = side,
            .sink_tokens = 0,
            .recent_tokens = 0,
            .every_token = true};
}

/// KIVI (arXiv 2402.02750): keys by channel over `group` tokens, values by token over the head, min_max, no
/// rotation and no sinks. The paper groups both by 32; with a group of 32 the values' grids do too.
inline CacheRecipe kivi(int bits, Index group = 128) {
    CacheRecipe recipe;
    recipe.name = detail::named("kivi", bits);
    recipe.sink_tokens = recipe.recent_tokens = 0;
    recipe.keys = {bits, {Granularity::per_channel, group, Scheme::min_max, Clip::none}, false};
    recipe.values = {bits,
                     {Granularity::per_token, group == 128 ? whole_head : group, Scheme::min_max, Clip::none},
                     false};
    if (group != 128) recipe.name.append(":").append(std::to_string(group));
    return recipe;
}

/// Quantize What Counts (arXiv 2502.15075): keys get more bits than values. On top of the paper: sinks and
/// recent tokens stay out of the grids, values are rotated.
inline CacheRecipe key_favored(int key_bits, int value_bits) {
    return {.name = detail::named("key_favored", key_bits).append(":").append(std::to_string(value_bits)),
            .keys = by_channel(key_bits),
            .values = by_token(value_bits, true)};
}

/// The same with the bits and group sizes that allocate/key_favored.hpp chose, one recipe a layer. Widths
/// must be whole numbers from 1 to 8. Throws Error (option).
inline std::vector<CacheRecipe> key_favored(const KeyFavoredAllocation& allocation) {
    std::vector<CacheRecipe> layers;
    for (const LayerAllocation& layer : allocation.layers) {
        const auto key_bits = static_cast<int>(layer.key_bits),
                   value_bits = static_cast<int>(layer.value_bits);
        require(key_bits == layer.key_bits && value_bits == layer.value_bits, ErrorCode::option,
                "key_favored: layer ", layers.size(), " is given ", layer.key_bits, " and ", layer.value_bits,
                " bits, expected whole numbers");
        CacheRecipe recipe = key_favored(key_bits, value_bits);
        recipe.keys.rule.group = layer.key_group_tokens;
        recipe.values.rule.group = layer.value_group_channels;
        layers.push_back(recipe);
    }
    return layers;
}

/// SVDq (arXiv 2502.15304): keys before RoPE, all heads concatenated, in the basis of their SVD; widths of
/// equal groups of latents. The basis is given, or that of the prompt's own keys: call KvCache::fit_basis at
/// its end, or let the cache do it after 512 tokens. The paper leaves values alone.
inline CacheRecipe svdq(std::vector<int> groups, int value_bits = 16) {
    CacheRecipe recipe;
    recipe.name = "svdq";
    recipe.latents = LatentRecipe{};
    recipe.latents->basis.frame = KeyFrame::before_rope;
    recipe.latents->basis.query_weighted = false;
    recipe.latents->basis.heads_together = recipe.latents->own_heads_together = true;
    recipe.latents->groups = std::move(groups);
    recipe.values = by_token(value_bits, value_bits != 16);
    return recipe;
}

/// Keys in the query-weighted basis of the tile frame, `key_bits` in the best schedule; values rotated. A
/// basis that is given covers all heads together, one of the cache's own each head, for its bytes count.
inline CacheRecipe latent(double key_bits, int value_bits) {
    CacheRecipe recipe;
    recipe.name = "latent";
    recipe.latents = LatentRecipe{};
    recipe.latents->basis.heads_together = true;
    recipe.latents->bits = key_bits;
    recipe.values = by_token(value_bits, value_bits != 16);
    return recipe;
}

/// Its cheap sibling: the latents are the channels themselves, so there is no matrix to store or to multiply
/// by.
inline CacheRecipe weighted(double key_bits, int value_bits) {
    CacheRecipe recipe = latent(key_bits, value_bits);
    recipe.name = "weighted";
    recipe.latents->basis.directions = LatentDirections::channels;
    recipe.latents->basis.frame = KeyFrame::after_rope;
    recipe.latents->basis.heads_together = false;
    // Variances by channel say too little about the rounding within a tile to compare layers by.
    recipe.latents->layers_together = false;
    return recipe;
}

/// Keys as they are, values rotated, recent values in 8 bits: what the two defaults share. Keys are not
/// rotated and wait in fp16, so that models with normalised keys or with biases of keys are safe. Chosen on
/// examples/data/jargon_file.txt with examples/engine/evaluate; examples/README.md says how.
inline CacheRecipe safe_default(int key_bits, int value_bits, std::string name) {
    CacheRecipe recipe = key_favored(key_bits, value_bits);
    recipe.name = std::move(name);
    recipe.recent_bits = 8;
    recipe.recent_key_bits = 16;
    return recipe;
}

/// The default: about 4.2 true bits at long contexts, calibration-free.
inline CacheRecipe standard() {
    return safe_default(5, 3, "standard");
}

/// Smaller: about 3.2 true bits at long contexts, calibration-free.
inline CacheRecipe compact() {
    return safe_default(4, 2, "compact");
}

/// Smaller still: about 2.7 true bits at long contexts, without calibration, but it learns from the sequence's
/// own queries: append(keys, values, queries). Three bits of keys are shaped by what these look along, and
/// rotated where that helps, tile by tile; the tokens that they look at keep the most bits of values.
inline CacheRecipe smallest() {
    CacheRecipe recipe = safe_default(3, 2, "smallest");
    recipe.shaped_keys = recipe.rotates_by_tile = true;
    recipe.values.widths = {{16, 4}, {80, 2}, {32, 1}};
    recipe.values.bits = recipe.values.widths[0].bits;
    return recipe;
}

}  // namespace kvplane::recipes
