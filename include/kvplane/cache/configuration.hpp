// kvplane/cache/configuration.hpp: what a cache is made of, checked before it is built.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/latent/fit.hpp"
#include "kvplane/latent/keys.hpp"
#include "kvplane/latent/schedule.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/rule.hpp"
#include "kvplane/storage/tile_format.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane {

/// How one side, keys or values, is stored once it is old enough.
struct SideRecipe {
    int bits = 16;  ///< 1 to 8 on grids, or 16: fp16
    GridRule rule;
    bool rotate = false;  ///< by a randomized Hadamard transform of each head
    /// Of values: how many tokens of a tile have which width, the widest first, where they differ; `bits` is
    /// then the widest. Which tokens get it depends on the queries that append() takes, or without queries on
    /// the norms of values.
    std::vector<TokenRun> widths = {};

    bool is_half() const noexcept { return bits == 16; }
    bool operator==(const SideRecipe&) const = default;
};

/// How a cache stores tokens. recipes.hpp has the named ones.
///
/// The first `sink_tokens` stay fp16 for ever, outside every grid: models attend to them from everywhere, and
/// their keys and values look like no other token's. Of the rest, 128 tokens at a time make a tile, which is
/// quantized when its last token is `recent_tokens` old; until then they are kept in `recent_bits`.
/// Recent keys may have more: where a model adds large biases to some channels of them, a grid over all
/// channels of a token rounds the others away.
struct CacheRecipe {
    std::string name = "fp16";
    SideRecipe keys, values;
    /// Keys of tiles in latents: `keys` then says no more than whether tokens outside tiles are rotated.
    std::optional<LatentRecipe> latents = std::nullopt;
    Index sink_tokens = 4;
    Index recent_tokens = 32;
    int recent_bits = 16;     ///< 16: fp16; 8: symmetric grids, one a head and token
    int recent_key_bits = 0;  ///< of keys; 0: recent_bits
    /// Where values are in keys (CacheConfiguration::values_in_keys): the bits of the channels behind them, which
    /// carry RoPE, 1 to 8 or 16; 0: those of the keys.
    int rotary_bits = 0;
    /// Quantize every token when it comes: what block formats of common engines do. No sinks, no recent
    /// tokens, and grids per token on both sides.
    bool every_token = false;
    /// Codes of keys in channels are chosen so that scores err least (quantize/shaped.hpp), for what queries
    /// look along: CacheConfiguration::query_moments, or the queries of the sequence's first tokens, which
    /// append() then takes. Decoding and sizes stay what they are.
    bool shaped_keys = false;
    /// Of shaped keys: each head of each tile is rotated by a randomized Hadamard transform before it is stored
    /// where that makes the expected error of scores smaller. Rotation helps where few channels of keys are
    /// large, and harms where queries know these channels. Tokens outside tiles are not rotated.
    bool rotates_by_tile = false;

    /// Bits of recent tokens of one side.
    int recent_bits_of(TileSide side) const noexcept {
        return side == TileSide::keys && recent_key_bits != 0 ? recent_key_bits : recent_bits;
    }

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
    /// The values of a head are the first value_head_dim channels of its keys, and are stored once: the rows of
    /// multi-head latent attention (MLA, arXiv 2405.04434), 576 numbers of which 512 are the value. The recipe's
    /// keys say how; what it says of values is not looked at.
    bool values_in_keys = false;
    /// The model's rotary embedding, which latents are turned with, and keys whose tokens move when others are
    /// removed. Recipes with latents take none for a model that has none; others, which seldom look at it, take
    /// frequencies of 0 for that.
    std::optional<RopeSettings> rope = std::nullopt;
    /// For a recipe with latents, the basis and widths of this layer; nullptr: the cache fits its own.
    std::shared_ptr<const LatentKeys> latent_keys = nullptr;
    /// For a recipe with shaped keys, moments of this layer's queries before RoPE, one set a key head (of a
    /// Calibration: LatentStatistics::queries()); nullptr: the cache gathers its own.
    std::shared_ptr<const std::vector<SecondMoments>> query_moments = nullptr;
    /// Over how many positions queries look back: the sliding window, if there is one. Shaped keys are shaped
    /// for these distances.
    Index context = 4096;

    /// Whether the cache fits its own basis.
    bool fits_basis() const noexcept { return recipe.latents && !latent_keys; }
    Index group() const noexcept { return query_heads / kv_heads; }
    /// Whether tokens of values have different widths.
    bool widths_by_token() const noexcept { return !values_in_keys && !recipe.values.widths.empty(); }
    /// Whether a grid of keys covers channels of one token.
    bool keys_by_token() const noexcept {
        return !recipe.latents && !recipe.keys.is_half() &&
               recipe.keys.rule.granularity == Granularity::per_token;
    }
    /// Numbers that one token adds to the layer.
    Index elements_per_token() const noexcept {
        return kv_heads * (key_head_dim + (values_in_keys ? 0 : value_head_dim));
    }
    /// Of what is not in latents.
    TileFormat key_format() const {
        const int rotary_bits = recipe.rotary_bits > 0 ? recipe.rotary_bits : recipe.keys.bits;
        if (!values_in_keys || value_head_dim == key_head_dim || rotary_bits == recipe.keys.bits)
            return {TileSide::keys, key_head_dim, recipe.keys.bits, recipe.keys.rule};
        return {TileSide::keys,
                std::vector<ChannelSegment>{{value_head_dim, recipe.keys.bits},
                                            {key_head_dim - value_head_dim, rotary_bits}},
                recipe.keys.rule};
    }
    /// Where values are not in keys.
    TileFormat value_format() const {
        if (!recipe.values.widths.empty()) return {value_head_dim, recipe.values.widths, recipe.values.rule};
        return {TileSide::values, value_head_dim, recipe.values.bits, recipe.values.rule};
    }
    /// Whether a side is stored rotated (of latents: tokens outside tiles).
    bool rotates(TileSide side) const noexcept {
        return (side == TileSide::keys || values_in_keys ? recipe.keys : recipe.values).rotate;
    }

    bool operator==(const CacheConfiguration&) const = default;
};

namespace detail {

/// Throws Error (option; for latents also shape, mismatch) for what a cache cannot do.
void require_configuration(const CacheConfiguration& configuration);

}  // namespace detail
}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/cache/impl/configuration.hpp"
#endif
