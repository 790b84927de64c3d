// kvplane/cache/state.hpp: the tokens of a cache.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kvplane/cache/configuration.hpp"
#include "kvplane/cache/pages.hpp"
#include "kvplane/latent/keys.hpp"
#include "kvplane/latent/statistics.hpp"
#include "kvplane/storage/tile_sequence.hpp"

namespace kvplane::detail {

/// One of a kind for keys and one for values.
template <class T>
struct PerSide {
    T keys{}, values{};

    T& operator[](TileSide side) noexcept { return side == TileSide::keys ? keys : values; }
    const T& operator[](TileSide side) const noexcept { return side == TileSide::keys ? keys : values; }
};

/// Recent tokens are kept in pages of this many, so that little room is unused.
inline constexpr Index recent_page_tokens = 32;

/// What a page of this many bytes counts for.
constexpr Index counted_bytes(Index bytes) noexcept {
    return bytes + PageReference::header_bytes;
}

/// The tokens of a cache, in the order of their positions: sinks, tiles, recent tokens.
struct CacheState {
    using QueryMoments = std::vector<SecondMoments>;  ///< [key head]

    std::shared_ptr<const PageLayout> layout;  ///< of tiles; nullptr until the cache has fitted its basis
    std::shared_ptr<const LatentKeys> latent;  ///< what tiles hold keys in; nullptr: channels
    std::shared_ptr<const QueryMoments>
        queries;  ///< before RoPE, while a basis is still to be fitted to them
    Index tokens = 0;
    Index dropped = 0;       ///< tokens before this one, sinks aside, are not seen
    Index recent_first = 0;  ///< position of the first token after the tiles
    PageReference sinks;
    std::vector<PageReference> tile_pages;  ///< [tile]
    std::vector<TilePlace> tiles;  ///< [tile]; fewer than 128 tokens after a truncation, or while it fills
    std::vector<PageReference> recent;  ///< recent_page_tokens each
    // For error bounds: the largest magnitude ever stored, and the largest clipped excess.
    PerSide<double> largest, excess;

    void add_tile(PageReference page, Index first, Index count) {
        tiles.push_back({page.data(), first, count});
        tile_pages.push_back(std::move(page));
    }
    Index sink_count(const CacheRecipe& recipe) const noexcept {
        return std::min(recipe.sink_tokens, tokens);
    }
    /// Tokens in tiles.
    Index packed() const noexcept {
        Index sum = 0;
        for (const TilePlace& tile : tiles) sum += tile.tokens;
        return sum;
    }
    /// Its tiles, for readers. Valid until the state changes.
    TileSequence sequence(const CacheRecipe& recipe) const noexcept {
        return {.places = tiles.data(),
                .tiles = static_cast<Index>(tiles.size()),
                .layout = layout.get(),
                .hidden_from = recipe.sink_tokens,
                .hidden_to = dropped,
                .largest_value = static_cast<float>(largest.values)};
    }
    /// Memory of all pages, headers and unused room included.
    Index page_bytes() const noexcept {
        Index sum = sinks ? counted_bytes(sinks.bytes()) : 0;
        for (const PageReference& page : tile_pages) sum += counted_bytes(page.bytes());
        for (const PageReference& page : recent) sum += counted_bytes(page.bytes());
        return sum;
    }

    /// Forgets all but the first `count` tokens, of which there are more.
    void truncate(Index count) {
        tokens = count;
        dropped = std::min(dropped, count);
        while (!tiles.empty() && tiles.back().first >= count) {
            tiles.pop_back();
            tile_pages.pop_back();
        }
        if (!tiles.empty() && count < recent_first)
            tiles.back().tokens = std::min(tiles.back().tokens, count - tiles.back().first);
        recent_first = std::min(recent_first, count);
        recent.resize(
            static_cast<std::size_t>((count - recent_first + recent_page_tokens - 1) / recent_page_tokens));
    }
    /// Hides the tokens before `token` and lets go of the pages that hold nothing else. keep_last: whether
    /// the last tile stays, however old its tokens, because it is being filled.
    void drop_before(Index token, bool keep_last) {
        if (token <= dropped) return;
        dropped = token;
        std::size_t gone = 0;
        while (gone < tiles.size() && tiles[gone].first + tiles[gone].tokens <= token) ++gone;
        if (keep_last && gone == tiles.size() && gone > 0) --gone;
        tiles.erase(tiles.begin(), tiles.begin() + static_cast<std::ptrdiff_t>(gone));
        tile_pages.erase(tile_pages.begin(), tile_pages.begin() + static_cast<std::ptrdiff_t>(gone));
    }
};

}  // namespace kvplane::detail
