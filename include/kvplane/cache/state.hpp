// kvplane/cache/state.hpp: the tokens of a cache.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kvplane/cache/configuration.hpp"
#include "kvplane/cache/key_shaping.hpp"
#include "kvplane/cache/pages.hpp"
#include "kvplane/cache/token_attention.hpp"
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
    bool operator==(const PerSide&) const = default;
};

/// Recent tokens are kept in pages of this many, so that little room is unused.
inline constexpr Index recent_page_tokens = 32;

/// What a page of this many bytes counts for.
constexpr Index counted_bytes(Index bytes) noexcept {
    return bytes + PageReference::header_bytes;
}

/// What bounds of errors go by, of some tokens.
struct StoredExtremes {
    PerSide<double> largest;  ///< magnitude ever stored
    PerSide<double> excess;   ///< by which clipped values, and keys in latents, were off
    /// Bound of what tokens had lost before a tile that was cut was opened again, and they went into another.
    PerSide<double> carried;

    void include(const StoredExtremes& other) noexcept {
        for (const TileSide side : {TileSide::keys, TileSide::values}) {
            largest[side] = std::max(largest[side], other.largest[side]);
            excess[side] = std::max(excess[side], other.excess[side]);
            carried[side] = std::max(carried[side], other.carried[side]);
        }
    }
};

/// A layout of pages whose tiles were narrowed, and the most bits that it has.
struct NarrowedLayout {
    PerSide<int> most_bits;
    std::shared_ptr<const PageLayout> layout;
};

/// The tokens of a cache, in the order of their positions: sinks, tiles, recent tokens. The last ones may be
/// provisional: no tile is made of them, and what they add to the rest of the state stands apart, so that
/// they can be taken back without a trace.
struct CacheState {
    using QueryMoments = std::vector<SecondMoments>;  ///< [key head]

    std::shared_ptr<const PageLayout> layout;  ///< of new tiles; nullptr until the cache has fitted its basis
    std::vector<NarrowedLayout> narrowed;      ///< those of others
    std::shared_ptr<const LatentKeys> latent;  ///< what tiles hold keys in; nullptr: channels
    /// Before RoPE, while a basis is still to be fitted to them, or while shaping learns from them.
    std::shared_ptr<const QueryMoments> queries;
    std::shared_ptr<const KeyShaping> shaping;  ///< of shaped keys, once it is known for good
    Index tokens = 0;
    Index dropped = 0;       ///< tokens in [kept_sinks, dropped) are not seen
    Index kept_sinks = 0;    ///< how many of the first tokens stay visible
    Index recent_first = 0;  ///< position of the first token after the tiles
    PageReference sinks;
    std::vector<PageReference> tile_pages;    ///< [tile]; two tiles may be parts of one page
    std::vector<TilePlace> tiles;             ///< [tile]; fewer than 128 tokens where some were forgotten
    std::vector<PageReference> recent;        ///< recent_page_tokens each
    bool stale = false;                       ///< whether the last tile holds traces of tokens taken back
    StoredExtremes settled_extremes;          ///< of all tokens but the provisional ones
    std::vector<StoredExtremes> provisional;  ///< [provisional token]
    Matrix provisional_queries;  ///< [provisional token][query_heads * key dim] after RoPE, or empty
    /// Of the next tile's tokens by the queries behind them, where values have different widths; else empty, and
    /// before the first token.
    TokenAttention attention;

    void add_tile(PageReference page, TilePlace place) {
        place.page = page.data();
        tiles.push_back(place);
        tile_pages.push_back(std::move(page));
    }
    Index sink_count(const CacheRecipe& recipe) const noexcept {
        return std::min(recipe.sink_tokens, tokens);
    }
    /// Tokens that are not provisional.
    Index settled() const noexcept { return tokens - static_cast<Index>(provisional.size()); }
    /// Of all tokens.
    StoredExtremes extremes() const noexcept {
        StoredExtremes all = settled_extremes;
        for (const StoredExtremes& token : provisional) all.include(token);
        return all;
    }
    /// Whether some tokens are not seen.
    bool hides() const noexcept { return dropped > kept_sinks; }
    /// Whether the last tile was cut by a truncation, so that the sequence goes on in its middle.
    bool cut() const noexcept {
        return !tiles.empty() && tiles.back().end_row() < tile_tokens &&
               tiles.back().first + tiles.back().tokens == recent_first;
    }
    /// Whether some tile has other widths than new ones get.
    bool has_narrowed() const noexcept {
        return std::any_of(tiles.begin(), tiles.end(),
                           [&](const TilePlace& tile) { return tile.layout != layout.get(); });
    }
    /// Tokens in tiles.
    Index packed() const noexcept {
        Index sum = 0;
        for (const TilePlace& tile : tiles) sum += tile.tokens;
        return sum;
    }
    /// Its tiles, for readers. Valid until the state changes.
    TileSequence sequence() const noexcept {
        return {.places = tiles.data(),
                .tiles = static_cast<Index>(tiles.size()),
                .layout = layout.get(),
                .hidden_from = kept_sinks,
                .hidden_to = dropped,
                .largest_value = static_cast<float>(extremes().largest.values)};
    }
    /// Memory of all pages, headers and unused room included.
    Index page_bytes() const noexcept {
        Index sum = sinks ? counted_bytes(sinks.bytes()) : 0;
        for (std::size_t t = 0; t < tile_pages.size(); ++t)
            if (t == 0 || tile_pages[t] != tile_pages[t - 1]) sum += counted_bytes(tile_pages[t].bytes());
        for (const PageReference& page : recent) sum += counted_bytes(page.bytes());
        return sum;
    }

    /// Forgets all but the first `count` tokens, of which there are more.
    void truncate(Index count) {
        const auto left = static_cast<std::size_t>(std::max<Index>(0, count - settled()));
        provisional.resize(left);
        if (provisional_queries.rows() > 0)
            provisional_queries.conservativeResize(static_cast<Index>(left), Eigen::NoChange);
        tokens = count;
        dropped = std::min(dropped, count);
        while (!tiles.empty() && tiles.back().first >= count) {
            tiles.pop_back();
            tile_pages.pop_back();
            stale = false;
        }
        if (!tiles.empty() && count < tiles.back().first + tiles.back().tokens) {
            tiles.back().tokens = count - tiles.back().first;
            stale = true;
        }
        recent_first = std::min(recent_first, count);
        // The queries behind the tile come again.
        if (count <= recent_first + tile_tokens) std::fill(attention.begin(), attention.end(), 0);
        recent.resize(
            static_cast<std::size_t>((count - recent_first + recent_page_tokens - 1) / recent_page_tokens));
    }
    /// Hides the tokens in [sinks, token), and lets go of the tiles that hold nothing else. keep_last:
    /// whether the last tile stays, however old its tokens, because it is being filled.
    void drop_before(Index token, Index sinks, bool keep_last) {
        kept_sinks = sinks;
        dropped = std::max(dropped, token);
        const auto goes = [&](std::size_t t) {
            return tiles[t].first >= sinks && tiles[t].first + tiles[t].tokens <= dropped &&
                   !(keep_last && t + 1 == tiles.size());
        };
        // Those that go stand side by side.
        std::size_t first = 0, end;
        while (first < tiles.size() && !goes(first)) ++first;
        for (end = first; end < tiles.size() && goes(end);) ++end;
        const auto erase = [&](auto& from) {
            from.erase(from.begin() + static_cast<std::ptrdiff_t>(first),
                       from.begin() + static_cast<std::ptrdiff_t>(end));
        };
        erase(tiles);
        erase(tile_pages);
    }

    /// Takes the tokens [first, last) out of the tiles, and moves those behind them. What is outside tiles is
    /// the caller's.
    void remove_from_tiles(Index first, Index last) {
        std::vector<TilePlace> places;
        std::vector<PageReference> pages;
        places.reserve(tiles.size() + 1);
        pages.reserve(tiles.size() + 1);
        for (std::size_t t = 0; t < tiles.size(); ++t) {
            const TilePlace& tile = tiles[t];
            const Index end = tile.first + tile.tokens;
            if (tile.first < first) {
                places.push_back(tile);
                places.back().tokens = std::min(end, first) - tile.first;
                pages.push_back(tile_pages[t]);
            }
            if (end <= last) continue;
            const Index from = std::max(tile.first, last);
            places.push_back({.page = tile.page,
                              .layout = tile.layout,
                              .first = from - (last - first),
                              .tokens = end - from,
                              .row = tile.row + from - tile.first,
                              .shift = tile.shift + last - first});
            pages.push_back(tile_pages[t]);
        }
        tiles = std::move(places);
        tile_pages = std::move(pages);
    }
};

}  // namespace kvplane::detail
