// kvplane/cache/reader.hpp: the tokens of a cache as numbers, run by run: sinks, tiles, recent tokens.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/latent/coder.hpp"
#include "kvplane/storage/tile_coder.hpp"

namespace kvplane::detail {

class Reader {
  public:
    /// Consecutive tokens: those of one tile, or others.
    struct Run {
        Index first, count;
        const std::byte* page;  ///< of the tile; nullptr: tokens outside tiles
    };

    Reader(const CacheShape& cache, const CacheState& state)
        : cache_(cache), state_(state), sink_rows_(cache.sink_rows()), recent_rows_(cache.recent_rows()) {
        const Index sinks = state.sink_count(cache.recipe());
        if (sinks > 0) runs_.push_back({0, sinks, nullptr});
        for (const TilePlace& tile : state.tiles) runs_.push_back({tile.first, tile.tokens, tile.page});
        if (!state.recent.empty())
            runs_.push_back({state.recent_first, state.tokens - state.recent_first, nullptr});
        if (state.tiles.empty()) return;
        values_.emplace(state.layout->values);
        if (state.latent)
            latents_.emplace(state.latent);
        else
            keys_.emplace(state.layout->keys[0]);
    }

    /// Runs that hold tokens which are still kept.
    const std::vector<Run>& runs() const noexcept { return runs_; }

    /// [count][dim] one side and head of a run, in the frame in which it is stored. Not for keys in latents.
    const Matrix& rows(const Run& run, TileSide side, Index head) {
        const Index dim = cache_.dim(side);
        decoded_.resize(run.count, dim);
        if (run.page) {
            coder(side).decode(tile(run, side, head), run.count, decoded_.data(), dim);
        } else if (run.first < state_.sink_count(cache_.recipe())) {
            sink_rows_.read(state_.sinks.data(), side, head, 0, run.count, decoded_.data(), dim);
        } else {
            for (Index t = 0; t < run.count; t += recent_page_tokens)
                recent_rows_.read(state_.recent[static_cast<std::size_t>(t / recent_page_tokens)].data(),
                                  side, head, 0, std::min(recent_page_tokens, run.count - t),
                                  decoded_.data() + t * dim, dim);
        }
        return decoded_;
    }

    bool in_latents(const Run& run) const noexcept { return run.page && latents_; }
    LatentCoder& latents() noexcept { return *latents_; }
    /// Where the keys of one head stand in latents.
    const std::byte* latent_tile(const Run& run, Index head) const noexcept {
        return run.page + state_.layout->key_at[static_cast<std::size_t>(state_.layout->subspace_of(head))];
    }

    /// [count][key dim] the keys of one head of a run in the frame of the input; of latents the first `most`
    /// count.
    Matrix input_keys(const Run& run, Index head, Index most) {
        if (in_latents(run))
            return latents_->reconstruct(head, latent_tile(run, head), run.count, run.first, most);
        Matrix keys = rows(run, TileSide::keys, head);
        if (cache_.recipe().keys.rotate) cache_.key_rotation.rotate_back(keys);
        return keys;
    }

    /// The largest error of any element of a side's tiles, as its grids tell; keys in latents were measured
    /// when their tiles were made, and count 0 here.
    double tile_error_bound(TileSide side) {
        double bound = 0.0;
        for (const Run& run : runs_)
            if (run.page) bound = std::max(bound, tile_error_bound(side, run));
        return bound;
    }
    /// The same of one tile.
    double tile_error_bound(TileSide side, const Run& run) {
        double bound = 0.0;
        if (side == TileSide::keys && latents_) return bound;
        for (Index head = 0; head < cache_.configuration.kv_heads; ++head)
            bound = std::max(bound, coder(side).error_bound(tile(run, side, head), run.count));
        return bound;
    }

  private:
    TileCoder& coder(TileSide side) noexcept { return side == TileSide::keys ? *keys_ : *values_; }
    const std::byte* tile(const Run& run, TileSide side, Index head) const noexcept {
        const PageLayout& layout = *state_.layout;
        return run.page +
               (side == TileSide::keys ? layout.key_at : layout.value_at)[static_cast<std::size_t>(head)];
    }

    const CacheShape& cache_;
    const CacheState& state_;
    std::vector<Run> runs_;
    std::optional<TileCoder> keys_, values_;
    std::optional<LatentCoder> latents_;
    TokenRows sink_rows_, recent_rows_;
    Matrix decoded_;
};

/// [count][kv_heads * dim] the stored tokens [first, first + count) of a side, in the frame of the input.
inline Matrix stored_rows(const CacheShape& cache, const CacheState& state, TileSide side, Index first,
                          Index count) {
    const Index dim = cache.dim(side), heads = cache.configuration.kv_heads;
    Matrix all(count, heads * dim);
    if (count == 0) return all;
    Reader reader(cache, state);
    for (Index head = 0; head < heads; ++head)
        for (const Reader::Run& run : reader.runs()) {
            const Index from = std::max(first, run.first),
                        to = std::min(first + count, run.first + run.count);
            if (from >= to) continue;
            all.block(from - first, head * dim, to - from, dim) =
                (side == TileSide::keys ? reader.input_keys(run, head, all.cols())
                                        : reader.rows(run, side, head))
                    .middleRows(from - run.first, to - from);
        }
    if (side == TileSide::values && cache.rotates(side)) cache.value_rotation.rotate_back(all);
    return all;
}

}  // namespace kvplane::detail
