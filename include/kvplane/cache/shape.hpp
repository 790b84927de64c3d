// kvplane/cache/shape.hpp: what a cache is, apart from its tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kvplane/cache/configuration.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/cache/token_rows.hpp"
#include "kvplane/latent/keys.hpp"
#include "kvplane/storage/tile_sequence.hpp"
#include "kvplane/transform/hadamard.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane::detail {

/// The pages of tiles of a configuration whose latents, if it has any, are known. Throws Error (option).
inline PageLayout page_layout(const CacheConfiguration& c, const LatentKeys* latent) {
    if (c.values_in_keys) return page_layout_in_keys(c.key_format(), c.kv_heads);
    if (!latent) {
        PageLayout layout = kvplane::page_layout({c.key_format()}, c.kv_heads, c.value_format(), c.kv_heads);
        return c.recipe.rotates_by_tile ? with_rotation_by_tile(std::move(layout)) : layout;
    }
    std::vector<TileFormat> keys;
    for (Index s = 0; s < latent->subspaces(); ++s) keys.push_back(latent->format(s));
    return kvplane::page_layout(std::move(keys), latent->subspaces(), c.value_format(), c.kv_heads);
}

/// How queries must be changed to meet stored keys in channels.
struct StoredFrame {
    Index turn = 0;        ///< positions forward by RoPE, before the rotation
    bool rotated = false;  ///< by CacheShape::key_rotation

    bool operator==(const StoredFrame&) const = default;
};

/// What a cache is apart from its tokens. Forks share it, and nothing changes it.
struct CacheShape {
    /// Throws Error (option, and as require_configuration()).
    explicit CacheShape(const CacheConfiguration& given)
        : configuration((require_configuration(given), given)),
          key_rotation(given.key_head_dim, given.rotation_seed),
          value_rotation(given.value_head_dim, given.rotation_seed + (given.values_in_keys ? 0 : 1)) {
        if (given.rope) rope.emplace(given.key_head_dim, *given.rope);
        if (given.query_moments) shaping = std::make_shared<const KeyShaping>(given, *given.query_moments);
        if (!given.fits_basis())
            layout = std::make_shared<const PageLayout>(page_layout(given, given.latent_keys.get()));
    }

    const CacheRecipe& recipe() const noexcept { return configuration.recipe; }
    Index dim(TileSide side) const noexcept {
        return side == TileSide::keys ? configuration.key_head_dim : configuration.value_head_dim;
    }
    const Hadamard& rotation(TileSide side) const noexcept {
        return side == TileSide::keys ? key_rotation : value_rotation;
    }
    /// Whether a side's tokens are stored rotated (of latents: those outside tiles).
    bool rotates(TileSide side) const noexcept { return configuration.rotates(side); }
    /// Whether some tokens of a side are.
    bool may_rotate(TileSide side) const noexcept {
        return rotates(side) || (side == TileSide::keys && recipe().rotates_by_tile);
    }
    TokenRows sink_rows() const { return {configuration, recipe().sink_tokens, {16, 16}}; }
    TokenRows recent_rows() const {
        return {configuration,
                recent_page_tokens,
                {recipe().recent_bits_of(TileSide::keys), recipe().recent_bits_of(TileSide::values)}};
    }
    /// The largest magnitude that is taken: half of fp16's range where anything is quantized, so that no grid
    /// can leave fp16 later, when its tile is made and an append could no longer be refused.
    float largest_magnitude() const noexcept {
        const bool half_values = configuration.values_in_keys || recipe().values.is_half();
        const bool exact = recipe().keys.is_half() && half_values && recipe().recent_bits == 16 &&
                           recipe().recent_bits_of(TileSide::keys) == 16 && recipe().rotary_bits % 16 == 0 &&
                           !recipe().latents;
        return exact ? fp16_max : 32000.0f;
    }

    /// By how many positions a query is turned forward before it meets the stored keys of a tile whose tokens
    /// have moved back since they were stored: q.(R(-n) k) = (R(n) q).k. Keys that are stored before RoPE, or
    /// in the frame of their tile, go by the positions that they have now.
    Index query_turn(const CacheState& state, const TilePlace& tile) const noexcept {
        return configuration.rope && (!state.latent || state.latent->frame() == KeyFrame::after_rope)
                   ? tile.shift
                   : 0;
    }
    /// Of sinks and recent tokens.
    StoredFrame frame_outside_tiles() const noexcept { return {0, rotates(TileSide::keys)}; }
    /// Of a head of a tile with keys in channels.
    StoredFrame frame(const CacheState& state, const TilePlace& tile, Index head) const noexcept {
        return {query_turn(state, tile), tile.layout->rotates_by_tile()
                                             ? tile.layout->rotated(tile.page, head)
                                             : rotates(TileSide::keys)};
    }
    /// By how much a turn by RoPE can enlarge an element of a stored key, or its error, at most. It mixes two
    /// channels, and with a rotation around it all.
    double turn_growth() const noexcept {
        return std::sqrt(may_rotate(TileSide::keys) ? static_cast<double>(dim(TileSide::keys)) : 2.0);
    }
    /// The same of going into a tile.
    double packing_growth(TileSide side) const noexcept {
        return std::sqrt(may_rotate(side) && !rotates(side) ? static_cast<double>(dim(side)) : 1.0);
    }

    /// How far an element of a side is off at most while it is a sink or recent, if no magnitude is above
    /// `largest`.
    double rounding_bound(TileSide side, double largest) const noexcept {
        const double half = largest * 0x1p-11 + 0x1p-25;
        return recipe().recent_bits_of(side) == 8 ? std::max(half, largest / 127.0 * (0.5 + 0x1p-9) + 0x1p-24)
                                                  : half;
    }

    /// No tokens.
    CacheState empty_state() const noexcept {
        CacheState state;
        state.layout = layout;
        state.latent = configuration.latent_keys;
        state.shaping = shaping;
        state.kept_sinks = recipe().sink_tokens;
        return state;
    }

    CacheConfiguration configuration;
    Hadamard key_rotation, value_rotation;
    std::optional<RotaryEmbedding> rope;  ///< the configuration's
    std::shared_ptr<const PageLayout>
        layout;  ///< of tiles; nullptr: it follows from a basis of the cache's own
    std::shared_ptr<const KeyShaping> shaping;  ///< by moments that are given
};

}  // namespace kvplane::detail
