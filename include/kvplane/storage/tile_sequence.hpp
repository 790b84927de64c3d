// kvplane/storage/tile_sequence.hpp: the packed part of a cache, as every reader takes it.
//
// A page holds the tiles of all heads for the same 128 tokens. Readers know nothing of caches, pools or
// reference counts: they take a TileSequence, which is pointers and numbers. Pages carry no header, so that a
// device can hold them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "kvplane/matrix.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane {

/// Where the tiles of all heads stand in a page. The heads that share a tile of keys are a subspace: each
/// head is one by itself, or all of them share one where keys are in latents of one basis.
struct PageLayout {
    std::vector<TileFormat> keys;         ///< one for all subspaces, or one for each
    TileFormat values;                    ///< of every head
    std::vector<Index> key_at, value_at;  ///< [subspace], [head]: offsets in bytes
    Index bytes = 0;                      ///< of a page
    /// The values of a head are the first channels of its keys: `values` and `value_at` are those of the
    /// keys.
    bool values_in_keys = false;
    /// Where a byte for each head says whether its keys were rotated before they were stored (1) or not (0);
    /// -1: all of a cache's tiles are alike in that.
    Index rotated_at = -1;

    bool rotates_by_tile() const noexcept { return rotated_at >= 0; }
    /// Of a head's keys in a page, where rotates_by_tile().
    bool rotated(const std::byte* page, Index head) const noexcept {
        return page[rotated_at + head] != std::byte{0};
    }
    Index subspaces() const noexcept { return static_cast<Index>(key_at.size()); }
    Index subspace_of(Index head) const noexcept { return subspaces() == 1 ? 0 : head; }
    const TileFormat& key_format(Index subspace) const noexcept {
        return keys[keys.size() == 1 ? 0 : static_cast<std::size_t>(subspace)];
    }
    const TileFormat& key_format_of_head(Index head) const noexcept { return key_format(subspace_of(head)); }
};

/// Lays out a page: for every head its keys (where it is the first of its subspace), then its values.
inline PageLayout page_layout(std::vector<TileFormat> keys, Index subspaces, const TileFormat& values,
                              Index heads) {
    PageLayout layout{.keys = std::move(keys), .values = values, .key_at = {}, .value_at = {}, .bytes = 0};
    const auto take = [&](std::vector<Index>& to, Index bytes) {
        to.push_back(layout.bytes);
        layout.bytes += bytes;
    };
    for (Index head = 0; head < heads; ++head) {
        if (head < subspaces) take(layout.key_at, layout.key_format(head).bytes());
        take(layout.value_at, layout.values.bytes());
    }
    return layout;
}

/// Makes room behind the tiles for what rotated() says.
inline PageLayout with_rotation_by_tile(PageLayout layout) {
    constexpr Index unit = 16;  // pages that follow each other stay aligned
    layout.rotated_at = layout.bytes;
    layout.bytes += (static_cast<Index>(layout.value_at.size()) + unit - 1) / unit * unit;
    return layout;
}

/// Lays out a page of keys whose first channels are the values.
inline PageLayout page_layout_in_keys(const TileFormat& keys, Index heads) {
    PageLayout layout{
        .keys = {keys}, .values = keys, .key_at = {}, .value_at = {}, .bytes = 0, .values_in_keys = true};
    for (Index head = 0; head < heads; ++head) layout.key_at.push_back(head * keys.bytes());
    layout.value_at = layout.key_at;
    layout.bytes = heads * keys.bytes();
    return layout;
}

/// A page of tiles, and the tokens of it that are still part of the sequence: its rows [row, row + tokens).
struct TilePlace {
    const std::byte* page;
    const PageLayout* layout;  ///< of the page
    Index first;               ///< position of the first token
    Index tokens;              ///< up to 128
    Index row = 0;             ///< of the first token; above 0 where tokens before it were removed
    /// By how many positions the tokens have moved towards the beginning since they were stored, because
    /// others before them were removed.
    Index shift = 0;

    /// The position that row 0 has, or would have.
    Index origin() const noexcept { return first - row; }
    Index end_row() const noexcept { return row + tokens; }
};

/// Tiles in the order of their positions.
struct TileSequence {
    const TilePlace* places = nullptr;
    Index tiles = 0;
    const PageLayout* layout = nullptr;  ///< of tiles that were not narrowed; nullptr without tiles
    /// Tokens in [hidden_from, hidden_to) are seen by no query.
    Index hidden_from = 0, hidden_to = 0;
    float largest_value = 0.0f;  ///< the largest magnitude of any value, which fp16 values go by

    /// The tiles before `end`.
    TileSequence until(Index end) const noexcept {
        TileSequence some = *this;
        some.tiles = end;
        return some;
    }
    const TilePlace& operator[](Index tile) const noexcept { return places[tile]; }
    bool hides(Index first, Index count) const noexcept {
        return first >= hidden_from && first + count <= hidden_to;
    }
    bool hides_some(Index first, Index count) const noexcept {
        return std::max(first, hidden_from) < std::min(first + count, hidden_to);
    }
    const TileFormat& key_format(Index tile, Index subspace) const noexcept {
        return places[tile].layout->key_format(subspace);
    }
    const TileFormat& value_format(Index tile) const noexcept { return places[tile].layout->values; }
    bool hidden(Index tile) const noexcept { return hides(places[tile].first, places[tile].tokens); }
    const std::byte* keys(Index tile, Index subspace) const noexcept {
        return places[tile].page + places[tile].layout->key_at[static_cast<std::size_t>(subspace)];
    }
    const std::byte* values(Index tile, Index head) const noexcept {
        return places[tile].page + places[tile].layout->value_at[static_cast<std::size_t>(head)];
    }
};

}  // namespace kvplane
