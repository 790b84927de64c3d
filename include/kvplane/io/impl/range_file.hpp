// kvplane/io/impl/range_file.hpp: tiles and recent tokens by themselves.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kvplane/cache/shape.hpp"
#include "kvplane/error.hpp"
#include "kvplane/io/cache_content.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/io/range_file.hpp"
#include "kvplane/io/safetensors.hpp"

namespace kvplane {

namespace detail {

/// Where ranges of a cache may begin and end, ascending.
struct RangeBorders {
    std::vector<Index> firsts, lasts;

    explicit RangeBorders(const CacheState& state) {
        for (const TilePlace& tile : state.tiles)
            if (tile.tokens == tile_tokens) add(tile.first, tile.first + tile_tokens);
        if (state.recent_first < state.tokens) add(state.recent_first, state.tokens);
    }
    void add(Index first, Index last) {
        firsts.push_back(first);
        lasts.push_back(last);
    }
    /// "a or b": the borders on either side of a token.
    static std::string nearest(const std::vector<Index>& borders, Index token) {
        const auto above = std::lower_bound(borders.begin(), borders.end(), token);
        std::string text;
        if (above != borders.begin()) text += std::to_string(*(above - 1));
        if (above != borders.begin() && above != borders.end()) text += " or ";
        if (above != borders.end()) text += std::to_string(*above);
        return text;
    }
};

inline void require_range(const KvCache& cache, Index first, Index last) {
    const CacheState& state = cache.state();
    require(first >= 0 && first < last && last <= state.tokens, ErrorCode::index, "save_range: tokens [",
            first, ", ", last, ") of ", state.tokens);
    if (first == 0) return;
    require(state.layout != nullptr, ErrorCode::option, "save_range: recipe '",
            cache.configuration().recipe.name, "' has yet to fit its basis; expected a range from 0 on");
    require(!state.hides() || last <= state.kept_sinks || first >= state.dropped, ErrorCode::index,
            "save_range: tokens [", first, ", ", last, "), but [", state.kept_sinks, ", ", state.dropped,
            ") were dropped");
    const RangeBorders borders(state);
    const auto among = [](const std::vector<Index>& all, Index token) {
        return std::binary_search(all.begin(), all.end(), token);
    };
    require(!borders.firsts.empty(), ErrorCode::index, "save_range: tokens [", first, ", ", last,
            ") of a cache with no whole tile and no recent tokens; expected a range from 0 on");
    require(among(borders.firsts, first) && among(borders.lasts, last), ErrorCode::index,
            "save_range: tokens [", first, ", ", last, ") would cut a tile; expected to begin at 0, ",
            RangeBorders::nearest(borders.firsts, first), " and to end at ",
            RangeBorders::nearest(borders.lasts, last));
}

/// Makes of a whole cache's content that of a range, whose borders were checked.
inline void narrow(CacheContent& content, const CacheState& state, Index first, Index last) {
    content.range_first = first;
    const auto from = static_cast<std::size_t>(
        std::find_if(state.tiles.begin(), state.tiles.end(), [&](auto& t) { return t.first >= first; }) -
        state.tiles.begin());
    std::size_t to = from;
    while (to < state.tiles.size() && state.tiles[to].first < last) ++to;
    const auto keep = [&](std::vector<std::int64_t>& of, std::size_t each) {
        of = {of.begin() + static_cast<std::ptrdiff_t>(each * from),
              of.begin() + static_cast<std::ptrdiff_t>(each * to)};
    };
    for (std::vector<std::int64_t>* list :
         {&content.tile_first, &content.tile_tokens, &content.tile_row, &content.tile_shift})
        keep(*list, 1);
    keep(content.tile_bits, 2);
    content.tiles = PageArray(std::span(state.tile_pages).subspan(from, to - from), {}, {});
    content.sinks = {};
    if (last <= state.recent_first) {
        content.recent = {};
        content.attention.clear();
    }
    content.tokens = last;
    content.window_first = std::min(last, state.recent_first);
    content.dropped = content.kept_sinks = 0;
    content.basis = nullptr;
    content.queries.clear();
    content.shaping = nullptr;
}

/// That a file's range is one: whole tiles side by side, then recent tokens. Throws Error (format).
inline void require_range(const CacheContent& content, const CacheShape& shape,
                          const std::vector<TilePlace>& places, const std::string& source) {
    const auto expect = [&](bool holds, const auto&... what) {
        require(holds, ErrorCode::format, source, ": ", what...);
    };
    const CacheRecipe& recipe = shape.recipe();
    const Index first = content.range_first.value_or(0), left = content.tokens - content.window_first;
    const std::size_t count = places.size();
    expect(first >= recipe.sink_tokens && content.tokens > first && left >= 0 &&
               left < tile_tokens + recipe.recent_tokens && (left == 0 || !recipe.every_token) &&
               content.dropped <= content.kept_sinks && content.sinks.size() == 0,
           "a range of tokens [", first, ", ", content.tokens, "), of which ", left,
           " recent, contradicts itself");
    Index tile_bytes = 0;
    for (const TilePlace& place : places) tile_bytes += place.layout->bytes;
    expect(static_cast<Index>(content.tiles.size()) == tile_bytes, "tiles: ", content.tiles.size(),
           " bytes for ", count, " tiles of ", tile_bytes, " bytes");
    for (std::size_t i = 0; i < count; ++i)
        expect(
            places[i].first == first + static_cast<Index>(i) * tile_tokens && places[i].tokens == tile_tokens,
            "tile ", i, ": ", places[i].tokens, " tokens from ", places[i].first, ", expected 128 from ",
            first + static_cast<Index>(i) * tile_tokens);
    expect(content.window_first == first + static_cast<Index>(count) * tile_tokens, "the tiles end at token ",
           first + static_cast<Index>(count) * tile_tokens, ", expected ", content.window_first);
    const Index pages = (left + recent_page_tokens - 1) / recent_page_tokens;
    expect(static_cast<Index>(content.recent.size()) == pages * shape.recent_rows().bytes(),
           "recent: ", content.recent.size(), " bytes, expected ", pages, " pages of ",
           shape.recent_rows().bytes());
}

/// The tokens [first, last) that a cache has dropped and given back; those after its end, where it has all.
struct MissingTokens {
    Index first = 0, last = 0;
    std::size_t tile = 0;  ///< of the first tile behind them

    MissingTokens(const CacheState& state, const CacheRecipe& recipe) : first(state.sink_count(recipe)) {
        for (; tile < state.tiles.size(); ++tile) {
            if (state.tiles[tile].first != first) break;
            first += state.tiles[tile].tokens;
        }
        last = tile < state.tiles.size() ? state.tiles[tile].first : state.recent_first;
    }
};

}  // namespace detail

KVPLANE_FUNCTION void save_range(const KvCache& cache, Index first, Index last,
                                 const std::filesystem::path& path, const WriteOptions& options) {
    detail::require_range(cache, first, last);
    if (first == 0) {
        KvCache prefix = cache.fork();
        prefix.truncate(last);
        return save_cache(prefix, path, {.sync = options.sync});
    }
    auto content = detail::CacheContent::of(cache);
    detail::narrow(content, cache.state(), first, last);
    SafetensorsWriter writer;
    content.add_to(writer);
    writer.write(path, options);
}

KVPLANE_FUNCTION void load_range(const std::filesystem::path& path, KvCache& cache) {
    const CacheConfiguration& configuration = cache.configuration();
    const detail::CacheShape& shape = cache.shape();
    const SafetensorsFile file = SafetensorsFile::open(path);
    const std::string source = path.string();
    const auto expect = [&](bool holds, const auto&... what) {
        require(holds, ErrorCode::mismatch, source, ": ", what...);
    };
    expect(!file.metadata().contains(detail::layers_key),
           "a session of several layers, expected a range of tokens");
    const auto content = detail::CacheContent::read(file, source, configuration, cache.pool());
    if (!content.range_first && cache.tokens() == 0) {
        cache = content.restore(configuration, cache.pool(), source);
        return;
    }
    expect(content.range_first || shape.recipe().sink_tokens == 0, "tokens from 0 on, but the cache has ",
           cache.tokens(), ", expected none");
    detail::CacheState state = cache.state();
    expect(content.basis_sum == detail::own_basis_checksum(cache),
           "tokens that were stored in another basis than the cache's own");
    expect(state.layout != nullptr, "tokens in tiles, but the cache has yet to fit its basis");
    std::vector<TilePlace> tiles = content.places(state, source);
    detail::require_range(content, shape, tiles, source);

    const Index first = content.range_first.value_or(0), last = content.tokens;
    const detail::MissingTokens missing(state, shape.recipe());
    const bool at_end = first == state.tokens;
    std::size_t at = state.tiles.size();
    if (at_end) {
        expect(state.provisional.empty() && state.recent_first == state.tokens && !state.cut(),
               "tokens from ", first, " on, but the ", state.tokens,
               " tokens of the cache do not end with a whole tile or its sinks");
    } else {
        expect(content.window_first == last && first >= missing.first && last == missing.last, "tokens [",
               first, ", ", last, "), but the cache lacks [", missing.first, ", ", missing.last,
               "), expected the youngest of them, or those from ", state.tokens, " on");
        at = missing.tile;
    }

    const std::vector<PageReference> pages = content.pages(tiles, cache.pool(), source);
    for (std::size_t i = 0; i < tiles.size(); ++i) tiles[i].page = pages[i].data();
    state.tile_pages.insert(state.tile_pages.begin() + static_cast<std::ptrdiff_t>(at), pages.begin(),
                            pages.end());
    state.tiles.insert(state.tiles.begin() + static_cast<std::ptrdiff_t>(at), tiles.begin(), tiles.end());
    state.settled_extremes.include(content.stored_extremes());
    if (at_end) {
        state.recent = content.recent_pages(shape.recent_rows().bytes(), cache.pool());
        state.tokens = last;
        state.recent_first = content.window_first;
        state.attention = content.attention;
    } else if (first > missing.first) {
        state.dropped = first;
    } else {  // nothing is missing any more
        state.dropped = 0;
        state.kept_sinks = shape.recipe().sink_tokens;
    }
    cache = KvCache(configuration, cache.pool(), std::move(state));
}

}  // namespace kvplane
