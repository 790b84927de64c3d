// kvplane/recipes.hpp: each method as a configuration of the parts, and its name on a command line.
//
//   fp16                      two bytes a number
//   block32:BITS[:rotated]    symmetric blocks of 32 channels (4 or 8 bits), every token at once: what common
//                             engines do; the baseline
//   kivi:BITS[:GROUP]         keys by channel, values by token, one width (arXiv 2402.02750)
//   key_favored:KEY:VALUE     more bits for keys (arXiv 2502.15075), values rotated, sinks and recent tokens
//   standard, compact         the defaults without calibration; see their comments
//   svdq:SCHEDULE[:VALUE]     keys before RoPE in the SVD basis of all heads (arXiv 2502.15304); SCHEDULE 2,
//                             1.25 or the widths of equal groups, 8-4-2-1-1-0-0-0; values fp16, or VALUE bits
//   latent:KEY:VALUE          keys in the query-weighted basis of the tile frame, KEY bits (a real number) in
//                             the best schedule; values rotated
//   weighted:KEY:VALUE        the same without a basis: widths by channel, from the queries' second moment
//
// A name may go on with settings, each after a '+': sinks=N, recent=N, recent_bits=8|16, key_scheme=,
// value_scheme=cell|min_max|symmetric, key_clip, value_clip (intervals of least squared error), rotate_keys=,
// rotate_values=0|1, key_group=32|64|128 (tokens), value_group=N (channels; 0: the whole head); of latents
// frame=before_rope|after_rope|tile, query_weighted=, heads_together=, layers_together=0|1, context=N,
// fit_tokens=N (tokens).
#pragma once

#include <charconv>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvplane/allocate/key_favored.hpp"
#include "kvplane/attention/parameters.hpp"
#include "kvplane/cache/configuration.hpp"
#include "kvplane/error.hpp"

namespace kvplane::recipes {

/// Keys: one grid for each channel of `group_tokens` tokens.
inline SideRecipe by_channel(int bits, Index group_tokens = 128) {
    return {bits, {Granularity::per_channel, group_tokens, scheme_for(bits), Clip::none}, false};
}
/// Values: one grid for each head of each token.
inline SideRecipe by_token(int bits, bool rotate) {
    return {bits, {Granularity::per_token, whole_head, scheme_for(bits), Clip::none}, rotate};
}

inline CacheRecipe fp16() {
    CacheRecipe recipe;
    recipe.name = "fp16";
    recipe.sink_tokens = recipe.recent_tokens = 0;
    recipe.every_token = true;
    return recipe;
}

/// Symmetric blocks of 32 channels along the head, every token at once, nothing in fp16.
inline CacheRecipe block32(int bits, bool rotated = false) {
    const SideRecipe side{bits, {Granularity::per_token, 32, Scheme::symmetric, Clip::none}, rotated};
    return {.name = "block32:" + std::to_string(bits) + (rotated ? ":rotated" : ""),
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
    recipe.name = "kivi:" + std::to_string(bits);
    recipe.sink_tokens = recipe.recent_tokens = 0;
    recipe.keys = {bits, {Granularity::per_channel, group, Scheme::min_max, Clip::none}, false};
    recipe.values = {bits,
                     {Granularity::per_token, group == 128 ? whole_head : group, Scheme::min_max, Clip::none},
                     false};
    if (group != 128) recipe.name += ":" + std::to_string(group);
    return recipe;
}

/// Quantize What Counts (arXiv 2502.15075): keys get more bits than values. On top of the paper: sinks and
/// recent tokens stay out of the grids, values are rotated.
inline CacheRecipe key_favored(int key_bits, int value_bits) {
    return {.name = "key_favored:" + std::to_string(key_bits) + ":" + std::to_string(value_bits),
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

namespace detail {

inline std::vector<std::string_view> split(std::string_view text, char separator) {
    std::vector<std::string_view> parts;
    for (std::size_t at = 0; at <= text.size();) {
        const std::size_t end = std::min(text.find(separator, at), text.size());
        parts.push_back(text.substr(at, end - at));
        at = end + 1;
    }
    return parts;
}

inline int number(std::string_view recipe, std::string_view text) {
    int value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    require(error == std::errc() && end == text.data() + text.size(), ErrorCode::option, "recipe '", recipe,
            "': '", text, "', expected a number");
    return value;
}

inline double real(std::string_view recipe, std::string_view text) {
    double value = 0.0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    require(error == std::errc() && end == text.data() + text.size(), ErrorCode::option, "recipe '", recipe,
            "': '", text, "', expected a number");
    return value;
}

inline std::vector<int> groups(std::string_view recipe, std::string_view text) {
    if (text == "2") return {8, 4, 2, 1, 1, 0, 0, 0};
    if (text == "1.25") return {4, 4, 2, 0, 0, 0, 0, 0};
    std::vector<int> widths;
    for (const std::string_view width : split(text, '-')) widths.push_back(number(recipe, width));
    require(widths.size() >= 2, ErrorCode::option, "recipe '", recipe, "': schedule '", text,
            "', expected 2, 1.25 or widths, 8-4-2-1-1-0-0-0");
    return widths;
}

inline KeyFrame frame(std::string_view recipe, std::string_view text) {
    for (const KeyFrame frame : {KeyFrame::before_rope, KeyFrame::after_rope, KeyFrame::tile})
        if (text == kvplane::name(frame)) return frame;
    fail(ErrorCode::option, "recipe '", recipe, "': frame '", text,
         "', expected before_rope, after_rope or tile");
}

inline Scheme scheme(std::string_view recipe, std::string_view text) {
    for (const Scheme scheme : {Scheme::cell, Scheme::min_max, Scheme::symmetric})
        if (text == name(scheme)) return scheme;
    fail(ErrorCode::option, "recipe '", recipe, "': scheme '", text,
         "', expected cell, min_max or symmetric");
}

}  // namespace detail

/// Keys and values both rotated, recent tokens in 8 bits: what the two defaults share. Chosen on
/// examples/data/jargon_file.txt with examples/engine/evaluate; README says how.
inline CacheRecipe rotated(int key_bits, int value_bits, std::string name) {
    CacheRecipe recipe = key_favored(key_bits, value_bits);
    recipe.name = std::move(name);
    recipe.keys.rotate = true;
    recipe.recent_bits = 8;
    return recipe;
}

/// The default: about 4.5 true bits at long contexts, calibration-free.
inline CacheRecipe standard() {
    return rotated(5, 3, "standard");
}

/// Smaller: about 3.5 true bits at long contexts, calibration-free.
inline CacheRecipe compact() {
    return rotated(4, 2, "compact");
}

namespace detail {

inline CacheRecipe named(std::string_view text, std::string_view name) {
    const auto parts = split(name, ':');
    const auto is = [&](std::string_view method, std::size_t least, std::size_t most) {
        return parts[0] == method && parts.size() > least && parts.size() <= most + 1;
    };
    if (is("fp16", 0, 0)) return fp16();
    if (is("standard", 0, 0)) return standard();
    if (is("compact", 0, 0)) return compact();
    if (is("block32", 1, 2) && (parts.size() == 2 || parts[2] == "rotated"))
        return block32(number(text, parts[1]), parts.size() == 3);
    if (is("kivi", 1, 2))
        return kivi(number(text, parts[1]), parts.size() == 3 ? number(text, parts[2]) : 128);
    if (is("key_favored", 2, 2)) return key_favored(number(text, parts[1]), number(text, parts[2]));
    if (is("svdq", 1, 2))
        return svdq(groups(text, parts[1]), parts.size() == 3 ? number(text, parts[2]) : 16);
    if (is("latent", 2, 2)) return latent(real(text, parts[1]), number(text, parts[2]));
    if (is("weighted", 2, 2)) return weighted(real(text, parts[1]), number(text, parts[2]));
    fail(ErrorCode::option, "recipe '", text,
         "': expected fp16, block32:BITS[:rotated], kivi:BITS[:GROUP], key_favored:KEY:VALUE, standard, "
         "compact, "
         "svdq:SCHEDULE[:VALUE], latent:KEY:VALUE or weighted:KEY:VALUE");
}

/// A setting of latents; false: it is none.
inline bool set_latents(LatentRecipe& latents, std::string_view text, std::string_view key,
                        std::string_view value) {
    if (key == "frame")
        latents.basis.frame = frame(text, value);
    else if (key == "query_weighted")
        latents.basis.query_weighted = number(text, value) != 0;
    else if (key == "heads_together")
        latents.basis.heads_together = latents.own_heads_together = number(text, value) != 0;
    else if (key == "layers_together")
        latents.layers_together = number(text, value) != 0;
    else if (key == "context")
        latents.basis.context = number(text, value);
    else if (key == "fit_tokens")
        latents.fit_tokens = number(text, value);
    else
        return false;
    return true;
}

inline void set(CacheRecipe& recipe, std::string_view text, std::string_view setting) {
    const std::size_t equals = setting.find('=');
    const std::string_view key = setting.substr(0, equals);
    require(equals != std::string_view::npos || key.empty(), ErrorCode::option, "recipe '", text,
            "': setting '", key, "' needs a value: ", key, "=...");
    const std::string_view value = key.empty() ? key : setting.substr(equals + 1);
    if (key == "sinks")
        recipe.sink_tokens = number(text, value);
    else if (key == "recent")
        recipe.recent_tokens = number(text, value);
    else if (key == "recent_bits")
        recipe.recent_bits = number(text, value);
    else if (key == "key_scheme")
        recipe.keys.rule.scheme = scheme(text, value);
    else if (key == "value_scheme")
        recipe.values.rule.scheme = scheme(text, value);
    else if (key == "key_clip")
        recipe.keys.rule.clip = number(text, value) ? Clip::mse_optimal : Clip::none;
    else if (key == "value_clip")
        recipe.values.rule.clip = number(text, value) ? Clip::mse_optimal : Clip::none;
    else if (key == "rotate_keys")
        recipe.keys.rotate = number(text, value) != 0;
    else if (key == "rotate_values")
        recipe.values.rotate = number(text, value) != 0;
    else if (key == "key_group")
        recipe.keys.rule.group = number(text, value);
    else if (key == "value_group")
        recipe.values.rule.group = number(text, value) ? number(text, value) : whole_head;
    else if (!recipe.latents || !set_latents(*recipe.latents, text, key, value))
        fail(ErrorCode::option, "recipe '", text, "': unknown setting '", key, "'");
}

}  // namespace detail

/// The recipe of a name as listed at the top. Throws Error (option) saying what is wrong with it.
inline CacheRecipe parse(std::string_view text) {
    const auto parts = detail::split(text, '+');
    CacheRecipe recipe = detail::named(text, parts[0]);
    for (std::size_t i = 1; i < parts.size(); ++i) detail::set(recipe, text, parts[i]);
    recipe.name = text;
    CacheConfiguration check;
    check.recipe = recipe;
    // Whether groups divide the latents depends on the model.
    if (recipe.latents && !recipe.latents->groups.empty())
        check.key_head_dim = static_cast<Index>(recipe.latents->groups.size());
    kvplane::detail::require_configuration(check);
    return recipe;
}

/// A read policy by the name that follows a recipe's after an @:
///
///     4                       aligned at a mean of so many bits, which keys and values share
///     4:3                     aligned at a mean of so many, of keys and of values
///     fixed4, fixed4:8        so many bits of every code
///     tolerance=0.01          whatever keeps every head's output within that (ReadPolicy::tolerance)
///     published, aligned      fp16 by exponents, at the thresholds that AlignedKV ships, and at 6, 10, 14
///     exponents=4:8:12        at others: 12 bits, 8 bits and nothing from so many below the largest on
///
/// Throws Error (option) saying what is wrong with it.
inline ReadPolicy read_policy(std::string_view text) {
    if (text == "published") return ReadPolicy::exponents(AlignmentThresholds::published());
    if (text == "aligned") return ReadPolicy::exponents(AlignmentThresholds::accurate());
    const auto bad = [&] {
        fail(ErrorCode::option, "read policy '", text,
             "', expected 4 (mean bits), 4:3 (of keys and of values), fixed4, fixed4:8, tolerance=0.01, "
             "published, aligned or exponents=4:8:12");
    };
    const auto number = [&](std::string_view digits, double most) {
        double value = 0.0;
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
        if (error != std::errc() || end != digits.data() + digits.size() || !(value >= 0.0 && value <= most))
            bad();
        return value;
    };
    constexpr std::string_view tolerance = "tolerance=", fixed = "fixed";
    if (text.starts_with(tolerance))
        return ReadPolicy::tolerance(number(text.substr(tolerance.size()), fp16_max));
    constexpr std::string_view exponents = "exponents=";
    if (text.starts_with(exponents)) {
        const auto below = detail::split(text.substr(exponents.size()), ':');
        if (below.size() != 3) bad();
        const auto at = [&](std::size_t i) {
            return static_cast<int>(number(below[i], AlignmentThresholds::never));
        };
        const AlignmentThresholds thresholds{at(0), at(1), at(2)};
        if (thresholds.twelve > thresholds.eight || thresholds.eight > thresholds.none) bad();
        return ReadPolicy::exponents(thresholds);
    }
    const bool is_fixed = text.starts_with(fixed);
    const auto parts = detail::split(is_fixed ? text.substr(fixed.size()) : text, ':');
    if (parts.size() > 2) bad();
    const double first = number(parts.front(), 16.0), last = number(parts.back(), 16.0);
    ReadPolicy policy = parts.size() == 1 ? ReadPolicy::aligned(first) : ReadPolicy::aligned(first, last);
    if (is_fixed) {
        policy.kind = ReadPolicy::Kind::fixed;
        policy.shared = false;
    }
    return policy;
}

}  // namespace kvplane::recipes
