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
        const TilePlace* tile = nullptr;  ///< nullptr: tokens outside tiles
        std::size_t coders = 0;           ///< which are those of the tile's layout
    };

    Reader(const CacheShape& cache, const CacheState& state)
        : cache_(cache), state_(state), sink_rows_(cache.sink_rows()), recent_rows_(cache.recent_rows()) {
        const Index sinks = state.sink_count(cache.recipe());
        if (sinks > 0) runs_.push_back({.first = 0, .count = sinks});
        for (const TilePlace& tile : state.tiles) runs_.push_back(run_of(tile));
        if (!state.recent.empty())
            runs_.push_back({.first = state.recent_first, .count = state.tokens - state.recent_first});
    }

    /// Runs that hold tokens which are still kept.
    const std::vector<Run>& runs() const noexcept { return runs_; }

    /// [count][dim] one side and head of a run, in the frame in which it is stored. Not for keys in latents.
    const Matrix& rows(const Run& run, TileSide side, Index head) {
        const Index dim = cache_.dim(side);
        if (run.tile) {
            // Rows before the first are decoded too: their grids are the same.
            // So are the channels behind values that are in keys.
            TileCoder& coder = this->coder(side, run);
            const Index channels = coder.format().channels();
            decoded_.resize(run.tile->end_row(), channels);
            coder.decode(tile(run, side, head), decoded_.rows(), decoded_.data(), channels);
            if (run.tile->row > 0 || channels > dim)
                decoded_ = decoded_.bottomLeftCorner(run.count, dim).eval();
            return decoded_;
        }
        decoded_.resize(run.count, dim);
        if (run.first < state_.sink_count(cache_.recipe())) {
            sink_rows_.read(state_.sinks.data(), side, head, 0, run.count, decoded_.data(), dim);
        } else {
            for (Index t = 0; t < run.count; t += recent_page_tokens)
                recent_rows_.read(state_.recent[static_cast<std::size_t>(t / recent_page_tokens)].data(),
                                  side, head, 0, std::min(recent_page_tokens, run.count - t),
                                  decoded_.data() + t * dim, dim);
        }
        return decoded_;
    }

    bool in_latents(const Run& run) const noexcept { return run.tile && state_.latent; }
    /// Of a run in latents: the latents of a subspace [count][kept], valid until the next call.
    const Matrix& latents(const Run& run, Index subspace) {
        const std::byte* const tile =
            run.tile->page + run.tile->layout->key_at[static_cast<std::size_t>(subspace)];
        const Matrix& all = latent_coder(run).latents(subspace, tile, run.tile->end_row());
        if (run.tile->row == 0) return all;
        latents_ = all.bottomRows(run.count);
        return latents_;
    }
    /// Of a run in latents: D of a subspace.
    const Matrix& from_latents(const Run& run, Index subspace) {
        return latent_coder(run).from_latents(subspace);
    }

    /// [count][key dim] the keys of one head of a run in the frame of the input; of latents the first `most`
    /// count.
    Matrix input_keys(const Run& run, Index head, Index most) {
        Matrix keys;
        if (in_latents(run)) {
            const auto subspace = static_cast<std::size_t>(run.tile->layout->subspace_of(head));
            keys = latent_coder(run)
                       .reconstruct(head, run.tile->page + run.tile->layout->key_at[subspace],
                                    run.tile->end_row(), run.tile->origin(), most)
                       .bottomRows(run.count);
        } else {
            keys = rows(run, TileSide::keys, head);
            if (frame(run, head).rotated) cache_.key_rotation.rotate_back(keys);
        }
        if (const Index turn = query_turn(run)) cache_.rope->turn(keys, -turn);
        return keys;
    }
    /// By how many positions queries are turned forward before they meet the stored keys of a run, because its
    /// tokens have moved back since they were stored.
    Index query_turn(const Run& run) const noexcept {
        return run.tile ? cache_.query_turn(state_, *run.tile) : 0;
    }

    /// How queries of a head meet the keys of a run, which are in channels.
    StoredFrame frame(const Run& run, Index head) const noexcept {
        return run.tile ? cache_.frame(state_, *run.tile, head) : cache_.frame_outside_tiles();
    }

    /// The largest error of any element of a side's tiles, as its grids tell; keys in latents were measured
    /// when their tiles were made, and count 0 here.
    double tile_error_bound(TileSide side) {
        double bound = 0.0;
        for (const Run& run : runs_)
            if (run.tile) bound = std::max(bound, tile_error_bound(side, run));
        return bound;
    }
    /// The same of one tile.
    double tile_error_bound(TileSide side, const Run& run) {
        double bound = 0.0;
        if (side == TileSide::keys && state_.latent) return bound;
        for (Index head = 0; head < cache_.configuration.kv_heads; ++head)
            bound = std::max(bound, coder(side, run).error_bound(tile(run, side, head), run.tile->row,
                                                                 run.tile->end_row()));
        return bound;
    }
    /// The run of one tile, which need not be one of runs().
    Run run_of(const TilePlace& tile) {
        const auto known = std::find_if(coders_.begin(), coders_.end(),
                                        [&](const Coders& coders) { return coders.layout == tile.layout; });
        const auto index = static_cast<std::size_t>(known - coders_.begin());
        if (known == coders_.end()) add_coders(*tile.layout);
        return {.first = tile.first, .count = tile.tokens, .tile = &tile, .coders = index};
    }

  private:
    /// For tiles of one layout.
    struct Coders {
        const PageLayout* layout;
        TileCoder values;
        std::optional<TileCoder> keys;       ///< in channels
        std::optional<LatentCoder> latents;  ///< otherwise
    };
    void add_coders(const PageLayout& layout) {
        Coders& coders = coders_.emplace_back(Coders{&layout, TileCoder(layout.values), {}, {}});
        if (state_.latent)
            coders.latents.emplace(state_.latent, layout.keys);
        else
            coders.keys.emplace(layout.keys[0]);
    }
    TileCoder& coder(TileSide side, const Run& run) noexcept {
        Coders& coders = coders_[run.coders];
        return side == TileSide::keys ? *coders.keys : coders.values;
    }
    LatentCoder& latent_coder(const Run& run) noexcept { return *coders_[run.coders].latents; }
    const std::byte* tile(const Run& run, TileSide side, Index head) const noexcept {
        const PageLayout& layout = *run.tile->layout;
        return run.tile->page +
               (side == TileSide::keys ? layout.key_at : layout.value_at)[static_cast<std::size_t>(head)];
    }

    const CacheShape& cache_;
    const CacheState& state_;
    std::vector<Run> runs_;
    std::vector<Coders> coders_;
    TokenRows sink_rows_, recent_rows_;
    Matrix decoded_, latents_;
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
