// kvplane/cache/configuration.hpp: what a cache is made of, checked before it is built.
#pragma once

#include <cstdint>
#include <string>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/block.hpp"
#include "kvplane/storage/tile.hpp"

namespace kvplane {

/// How one side, keys or values, is stored once it is old enough.
struct SideRecipe {
    int bits = 16;  ///< 1 to 8 on grids, or 16: fp16
    GridRule rule;
    bool rotate = false;  ///< by a randomized Hadamard transform of each head

    bool operator==(const SideRecipe&) const = default;
};

/// How a cache stores tokens. recipes.hpp has the named ones.
///
/// The first `sink_tokens` stay fp16 for ever, outside every grid: models attend to them from everywhere, and
/// their keys and values look like no other token's. Of the rest, 128 tokens at a time make a tile, which is
/// quantized when its last token is `recent_tokens` old; until then they are kept in `recent_bits`.
struct CacheRecipe {
    std::string name = "fp16";
    SideRecipe keys, values;
    Index sink_tokens = 4;
    Index recent_tokens = 32;
    int recent_bits = 16;  ///< 16: fp16; 8: symmetric grids, one a head and token
    /// Quantize every token when it comes: what block formats of common engines do. No sinks, no recent
    /// tokens, and grids per token on both sides.
    bool every_token = false;

    bool operator==(const CacheRecipe&) const = default;
};

/// One layer's cache.
struct CacheConfiguration {
    Index kv_heads = 1;
    Index query_heads = 1;
    Index key_head_dim = 64;
    Index value_head_dim = 64;
    CacheRecipe recipe;
    std::uint64_t rotation_seed = 0;

    Index group() const noexcept { return query_heads / kv_heads; }
    /// Numbers that one token adds to the layer.
    Index elements_per_token() const noexcept { return kv_heads * (key_head_dim + value_head_dim); }

    bool operator==(const CacheConfiguration&) const = default;
};

namespace detail {

inline void require_side(const SideRecipe& side, const char* which, bool every_token) {
    if (side.bits != 16) {
        require(side.bits >= 1 && side.bits <= 8, ErrorCode::option, which, ": ", side.bits,
                " bits, expected 1 to 8 or 16");
        require_width(side.bits, side.rule.scheme);
        require(
            !every_token || side.rule.granularity == Granularity::per_token, ErrorCode::option, which,
            ": grids per channel need whole tiles, so a recipe that quantizes every token cannot have them; "
            "expected grids per token");
    }
}

/// Throws Error (option) for what a cache cannot do.
inline void require_configuration(const CacheConfiguration& c) {
    require(c.kv_heads >= 1 && c.query_heads >= c.kv_heads && c.query_heads % c.kv_heads == 0,
            ErrorCode::option, "cache: ", c.query_heads, " query heads over ", c.kv_heads,
            " key/value heads, expected a multiple");
    require(c.key_head_dim >= 1 && c.value_head_dim >= 1, ErrorCode::option, "cache: head_dim ",
            c.key_head_dim, " of keys and ", c.value_head_dim, " of values, expected at least 1");
    const CacheRecipe& recipe = c.recipe;
    require(recipe.sink_tokens >= 0 && recipe.recent_tokens >= 0, ErrorCode::option,
            "cache: ", recipe.sink_tokens, " sink tokens and ", recipe.recent_tokens,
            " recent tokens, expected neither below 0");
    require(recipe.recent_bits == 16 || recipe.recent_bits == 8, ErrorCode::option,
            "cache: recent tokens of ", recipe.recent_bits, " bits, expected 16 or 8");
    require(!recipe.every_token || (recipe.sink_tokens == 0 && recipe.recent_tokens == 0), ErrorCode::option,
            "cache: a recipe that quantizes every token keeps no sinks and no recent tokens; it asks for ",
            recipe.sink_tokens, " and ", recipe.recent_tokens);
    require_side(recipe.keys, "cache keys", recipe.every_token);
    require_side(recipe.values, "cache values", recipe.every_token);
}

}  // namespace detail

/// The tile formats of a configuration. Throws Error (option).
inline TileFormat key_format(const CacheConfiguration& c) {
    return {TileSide::keys, c.key_head_dim, c.recipe.keys.bits, c.recipe.keys.rule};
}
inline TileFormat value_format(const CacheConfiguration& c) {
    return {TileSide::values, c.value_head_dim, c.recipe.values.bits, c.recipe.values.rule};
}

}  // namespace kvplane
