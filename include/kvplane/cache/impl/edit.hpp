// kvplane/cache/impl/edit.hpp: edited copies of a state, which take its place when nothing can fail any more.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kvplane/cache/edit.hpp"
#include "kvplane/cache/reader.hpp"
#include "kvplane/simd/floating_point.hpp"
#include "kvplane/storage/narrow.hpp"

namespace kvplane::detail {

// Removing -------------------------------------------------------------------------------------------------

/// The recent tokens of a state without those in [first, last). Tokens behind these are turned by RoPE to
/// their new positions and rounded once more.
class RecentTokens {
  public:
    RecentTokens(const CacheShape& cache, const CacheState& state, TilePool& pool)
        : cache_(cache), state_(state), pool_(pool), rows_(cache.recent_rows()) {}

    void remove(Index first, Index last, CacheState& next) {
        const Index begin = state_.recent_first,
                    stay = std::clamp<Index>(first - begin, 0, state_.tokens - begin),
                    from = std::max(last, begin) - begin, moved = state_.tokens - begin - from;
        if (from == stay && !cache_.rope) return;
        next.recent.resize(static_cast<std::size_t>(stay / recent_page_tokens));
        for (Index t = stay / recent_page_tokens * recent_page_tokens; t < stay; ++t) copy(t, t, next);
        for (Index t = 0; t < moved; ++t) copy(from + t, stay + t, next);
        if (moved > 0 && cache_.rope) turn(from, stay, moved, last - first, next);
    }

  private:
    void copy(Index from, Index to, CacheState& next) {
        if (to / recent_page_tokens == static_cast<Index>(next.recent.size()))
            next.recent.push_back(pool_.page(rows_.bytes()));
        rows_.copy(page(state_, from), from % recent_page_tokens, page(next, to), to % recent_page_tokens);
    }
    /// Turns the keys of `count` tokens, which were at `from`, back by `positions`.
    void turn(Index from, Index at, Index count, Index positions, CacheState& next) {
        const Index heads = cache_.configuration.kv_heads, dim = cache_.dim(TileSide::keys);
        const bool rotates = cache_.rotates(TileSide::keys);
        Matrix keys(count, heads * dim);
        for (Index head = 0; head < heads; ++head)
            for (Index t = 0; t < count; ++t)
                rows_.read(page(state_, from + t), TileSide::keys, head, (from + t) % recent_page_tokens, 1,
                           keys.row(t).data() + head * dim, keys.cols());
        if (rotates) cache_.key_rotation.rotate_back(keys);
        cache_.rope->turn(keys, -positions);
        if (rotates) cache_.key_rotation.rotate(keys);
        BlockQuantizer quantizer;
        for (Index t = 0; t < count; ++t)
            for (Index head = 0; head < heads; ++head)
                rows_.write(TileSide::keys, head, row_view(keys), t, 1, (at + t) % recent_page_tokens,
                            page(next, at + t), quantizer);
        StoredExtremes& extremes = next.settled_extremes;
        extremes.carried.keys =
            cache_.turn_growth() *
            (extremes.carried.keys + cache_.rounding_bound(TileSide::keys, extremes.largest.keys));
        extremes.largest.keys = std::max<double>(extremes.largest.keys, keys.cwiseAbs().maxCoeff());
    }
    static std::byte* page(const CacheState& state, Index token) noexcept {
        return state.recent[static_cast<std::size_t>(token / recent_page_tokens)].data();
    }

    const CacheShape& cache_;
    const CacheState& state_;
    TilePool& pool_;
    TokenRows rows_;
};

KVPLANE_FUNCTION void remove_tokens(const CacheShape& cache, CacheState& state, TilePool& pool, Index first,
                                    Index last) {
    const StandardFloatingPoint standard;
    const auto moved = [&](Index token) { return token - std::clamp<Index>(token - first, 0, last - first); };
    CacheState next = state;
    next.remove_from_tiles(first, last);
    RecentTokens(cache, state, pool).remove(first, last, next);
    next.tokens = moved(state.tokens);
    next.dropped = moved(state.dropped);
    next.kept_sinks = moved(state.kept_sinks);
    next.recent_first = moved(state.recent_first);
    // Where tokens that are not packed yet have moved, it is no longer theirs.
    if (last > state.recent_first) std::fill(next.attention.begin(), next.attention.end(), 0);
    state = std::move(next);
}

// Narrowing ------------------------------------------------------------------------------------------------

inline PerSide<int> widest_codes(const PageLayout& layout) noexcept {
    PerSide<int> most{0, layout.values_in_keys ? 0 : widest_codes(layout.values)};
    for (const TileFormat& keys : layout.keys) most.keys = std::max(most.keys, widest_codes(keys));
    return most;
}
KVPLANE_FUNCTION const PageLayout* narrowed_layout(std::vector<NarrowedLayout>& known, const PageLayout& wide,
                                                   const PerSide<int>& most_bits) {
    const PerSide<int> now = widest_codes(wide);
    if (now.keys <= most_bits.keys && now.values <= most_bits.values) return &wide;
    auto made = std::make_shared<const PageLayout>(narrowed(wide, most_bits.keys, most_bits.values));
    const PerSide<int> most = widest_codes(*made);
    for (const NarrowedLayout& one : known)
        if (one.most_bits == most) return one.layout.get();
    known.push_back({most, std::move(made)});
    return known.back().layout.get();
}

/// Which layout each tile of a state gets.
class NarrowPlan {
  public:
    /// Throws Error (option).
    NarrowPlan(const CacheState& state, Index first, Index last, const PerSide<int>& most_bits)
        : state_(state), layouts_(state.narrowed), of_tiles_(state.tiles.size()) {
        for (std::size_t t = 0; t < state.tiles.size(); ++t) {
            const TilePlace& tile = state.tiles[t];
            // The last tile may be one that still fills.
            if (tile.first < first || tile.first + tile.tokens > last) continue;
            if (t + 1 == state.tiles.size() && tile.end_row() < tile_tokens) continue;
            const PageLayout* const layout = narrowed_layout(layouts_, *tile.layout, most_bits);
            if (layout != tile.layout) of_tiles_[t] = layout;
        }
    }

    /// nullptr: that which it has.
    const PageLayout* layout(std::size_t tile) const noexcept { return of_tiles_[tile]; }
    /// Whether a tile gets the page of the tile before, which is another part of it.
    bool shares_page(std::size_t tile) const noexcept {
        return tile > 0 && state_.tile_pages[tile] == state_.tile_pages[tile - 1] &&
               of_tiles_[tile] == of_tiles_[tile - 1];
    }
    const std::vector<NarrowedLayout>& layouts() const noexcept { return layouts_; }

  private:
    const CacheState& state_;
    std::vector<NarrowedLayout> layouts_;
    std::vector<const PageLayout*> of_tiles_;
};

/// The largest difference of any element between the keys of a tile in latents before and after, in the frame
/// of the input.
inline double largest_difference(const CacheConfiguration& c, Reader& reader, const TilePlace& before,
                                 const TilePlace& after) {
    const Index all = c.kv_heads * c.key_head_dim;
    double largest = 0.0;
    for (Index head = 0; head < c.kv_heads; ++head) {
        const Matrix wide = reader.input_keys(reader.run_of(before), head, all);
        const Matrix narrow = reader.input_keys(reader.run_of(after), head, all);
        largest = std::max<double>(largest, (wide - narrow).cwiseAbs().maxCoeff());
    }
    return largest;
}

KVPLANE_FUNCTION void narrow_tiles(const CacheShape& cache, CacheState& state, TilePool& pool, Index first,
                                   Index last, const PerSide<int>& most_bits) {
    const StandardFloatingPoint standard;
    const NarrowPlan plan(state, first, last, most_bits);
    CacheState next = state;
    next.narrowed = plan.layouts();
    std::optional<Reader> reader;
    if (state.latent) reader.emplace(cache, state);
    double off = 0.0;
    for (std::size_t t = 0; t < state.tiles.size(); ++t) {
        const PageLayout* const layout = plan.layout(t);
        if (!layout) continue;
        if (plan.shares_page(t)) {
            next.tile_pages[t] = next.tile_pages[t - 1];
        } else {
            next.tile_pages[t] = pool.page(layout->bytes);
            narrow_page(*state.tiles[t].layout, state.tiles[t].page, *layout, next.tile_pages[t].data());
        }
        next.tiles[t].page = next.tile_pages[t].data();
        next.tiles[t].layout = layout;
        if (reader)
            off = std::max(off,
                           largest_difference(cache.configuration, *reader, state.tiles[t], next.tiles[t]));
    }
    // Keys in latents have no grids that say how far they are off. RoPE mixes two channels of what was
    // measured.
    next.settled_extremes.excess.keys += std::sqrt(2.0) * off;
    state = std::move(next);
}

KVPLANE_FUNCTION Index narrowed_page_bytes(const CacheState& state, Index first, Index last,
                                           const PerSide<int>& most_bits) {
    const NarrowPlan plan(state, first, last, most_bits);
    Index bytes = state.page_bytes();
    for (std::size_t t = 0; t < state.tiles.size(); ++t) {
        const bool was_shared = t > 0 && state.tile_pages[t] == state.tile_pages[t - 1];
        if (!was_shared) bytes -= counted_bytes(state.tile_pages[t].bytes());
        if (!plan.shares_page(t))
            bytes += counted_bytes(plan.layout(t) ? plan.layout(t)->bytes : state.tile_pages[t].bytes());
    }
    return bytes;
}

}  // namespace kvplane::detail
