// kvplane/cache/decode.hpp: attention of some query tokens over a whole cache, straight on the packed bits.
//
// Tiles that no query sees, because they come later or lie before a sliding window, are not read.
// Work is shared out by chunks of tiles and heads, in any order and thread, each into softmax states of its
// own; then these are merged in the order of the sequence, so that results do not depend on the number of
// workers. Where the planes of values depend on all weights, there are two passes: scores, then values.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <utility>

#include "kvplane/attention/executor.hpp"
#include "kvplane/attention/float_rows.hpp"
#include "kvplane/attention/kernels/dispatch.hpp"
#include "kvplane/attention/tile_attention.hpp"
#include "kvplane/cache/queries.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/cache/workspace.hpp"
#include "kvplane/read/planner.hpp"
#include "kvplane/simd/floating_point.hpp"

namespace kvplane::detail {

/// Up to so many query tokens follow a policy of reads.
inline constexpr Index decode_query_tokens = 8;
/// Of more query tokens so many make a pass: enough to share out among workers, while a tile's softmax states stay
/// in a core's cache.
inline constexpr Index pass_query_tokens = 32;

/// Whether DecodePass reads tiles of this layout: keys in channels or in latents of the tile's own frame or of
/// that of the input, values by token.
inline bool decodes(const PageLayout& layout, const LatentKeys* latent) noexcept {
    return (layout.values_in_keys || reads_value_planes(layout.values)) &&
           (latent ? latent->frame() != KeyFrame::before_rope : reads_key_planes(layout.keys[0]));
}

/// Query tokens, and the part of a sequence that they attend to.
struct DecodeTask {
    const CacheShape& cache;
    const CacheState& state;
    std::span<const QueryToken> tokens;
    Index first_tile, end_tile;
    bool unpacked;         ///< whether sinks and recent tokens take part
    PrefixStates* prefix;  ///< of the tiles before first_tile; not used without any
    /// [head][token] the sums of softmax weights, the result; nullptr: not wanted. Not with a prefix.
    Matrix* token_weights;
};

class DecodePass {
  public:
    /// Takes all memory that the attention needs. Throws std::bad_alloc.
    DecodePass(const DecodeTask& task, const AttentionParameters& parameters, Workspace& workspace,
               Executor& executor)
        : cache_(task.cache),
          state_(task.state),
          work_(workspace),
          executor_(executor),
          isa_(current_isa()),
          tiles_(state_.sequence().until(task.end_tile)),
          shape_{.query_tokens = static_cast<Index>(task.tokens.size()),
                 .heads = cache_.configuration.kv_heads,
                 .rows_per_head = cache_.configuration.group() * static_cast<Index>(task.tokens.size()),
                 .subspaces = state_.layout ? state_.layout->subspaces() : 1,
                 .tiles = tiles_.tiles},
          parameters_(parameters),
          together_(state_.latent && shape_.subspaces == 1 && shape_.heads > 1),
          first_tile_(task.first_tile),
          unpacked_(task.unpacked),
          prefix_(task.prefix),
          token_weights_(task.token_weights),
          planner_(tiles_.tiles > 0 ? workspace.planner(parameters.read, *state_.layout) : nullptr),
          sink_rows_(cache_.sink_rows()),
          recent_rows_(cache_.recent_rows()) {
        const Index key_dim = cache_.dim(TileSide::keys), value_dim = cache_.dim(TileSide::values);
        const Index channels = key_dim * (together_ ? shape_.heads : 1);
        work_.workers.resize(static_cast<std::size_t>(executor.workers()));
        for (WorkerScratch& worker : work_.workers) {
            worker.attention.reserve(std::max(channels, padded_channels(value_dim)));
            if (state_.latent) worker.projection.reserve(channels);
            worker.values_in_keys.begin(tiles_, value_dim);
            worker.count = {};
        }
        work_.queries.begin(shape_, cache_, state_, task.tokens);
        work_.states.begin(shape_, value_dim);
        list_chunks();
        parts_ = count_parts();
        if (token_weights_) {
            work_.kept.begin(shape_, shape_.tiles);
            work_.kept_unpacked.begin(shape_, unpacked_blocks());
            for (WorkerScratch& worker : work_.workers) {
                worker.largest.resize(static_cast<std::size_t>(shape_.rows_per_head));
                worker.factors.resize(static_cast<std::size_t>(shape_.rows_per_head));
            }
        }
        if (!planner_) {
            DecodeShape no_tiles = shape_;
            no_tiles.tiles = 0;
            if (token_weights_) work_.weights.begin(no_tiles);
            return;
        }
        work_.weights.begin(shape_);
        planner_->begin({.shape = shape_,
                         .tiles = &tiles_,
                         .policy = parameters.read,
                         .score_scales = work_.queries.score_scales(),
                         .weights = &work_.weights,
                         .executor = &executor_,
                         .isa = isa_});
        values_wait_ = planner_->values_wait();
    }
    DecodePass(const DecodePass&) = delete;
    DecodePass& operator=(const DecodePass&) = delete;

    void run(const AnyRows& queries) noexcept {
        work_.queries.take_rules(queries, parameters_);
        // Together with what follows of a row's own, 50 to 100 ns a row.
        share_rows(shape_.rows() >= 128,
                   [&](Index first, Index end) { work_.queries.take(queries, cache_, state_, first, end); });
        if (planner_ && !planner_->samples().empty()) {
            each(across(), [this](Index item, Index worker) { sample(item, worker); });
            planner_->sampled();
        }
        const Index tile_items = this->tile_items();
        each(tile_items + (unpacked_ ? shape_.heads * parts_ : 0), [=, this](Index item, Index worker) {
            if (item < tile_items)
                score_tiles(work_of(item), worker);
            else
                add_unpacked(blocks_of_part(item - tile_items), worker);
        });
        if (values_wait_) {
            normalise_weights();
            if (planner_->refine()) {
                refining_ = true;
                each(tile_items, [this](Index item, Index worker) { score_tiles(work_of(item), worker); });
                normalise_weights();
            }
            if (token_weights_) sum_weights();
            planner_->choose_values(counted());
            each(tile_items, [this](Index item, Index worker) { add_values(work_of(item), worker); });
        } else if (token_weights_) {
            normalise_weights();
            sum_weights();
        }
        report();
    }

    /// Adds what run() found to the states of the prefix, of which it then is a part.
    void extend_prefix() noexcept {
        const Index complete = shape_.tiles / DecodeShape::chunk_tiles;
        for (Index r = 0; r < shape_.rows(); ++r) {
            const auto [token, head] = work_.queries.place(r);
            for (Index chunk = first_chunk(); chunk < complete; ++chunk)
                merge(prefix_->complete(token, head), work_.states.of(chunk, r));
            const SoftmaxState open = prefix_->open(token, head);
            if (complete < shape_.chunks())
                open.copy(work_.states.of(complete, r));
            else
                open.clear(1);
        }
    }

    struct Output {
        const float* values;  ///< [value dim] in the frame of the input
        float log_sum_exp;    ///< of the scores, and the sink's logit
    };
    /// store(query head, query token, output) for each of them once, after run(), by several workers.
    template <class Store>
    void outputs(const Store& store) noexcept {
        const Index parts = static_cast<Index>(work_.chunks.size()) + 1;  // 25 ns each to merge
        share_rows(shape_.rows() * parts >= 512, [&](Index first, Index end) {
            for (Index row = first; row < end; ++row) {
                const Index head = row / shape_.query_tokens, token = row % shape_.query_tokens;
                store(head, token, output(head, token));
            }
        });
    }

  private:
    /// The output of a row. The states of its chunks end in the first one's, so that it can be asked for once.
    Output output(Index head, Index token) noexcept {
        const Index row = head * shape_.query_tokens + token, value_dim = cache_.dim(TileSide::values);
        const SoftmaxState state = work_.states.of(0, row);
        if (first_chunk() > 0)
            state.copy(prefix_->complete(work_.queries.place(row).token, head));
        else if (shape_.chunks() > 0 && (work_.chunks.empty() || work_.chunks.front() > 0))
            state.clear(1);
        for (const Index chunk : work_.chunks)
            if (chunk > 0) merge(state, work_.states.of(chunk, row));
        if (shape_.chunks() > 0) merge(state, work_.states.of(shape_.chunks(), row));
        if (!work_.queries.finite(row)) {
            std::fill_n(state.output, value_dim, std::numeric_limits<float>::quiet_NaN());
            return {state.output, std::numeric_limits<float>::quiet_NaN()};
        }
        state.add_sink(work_.queries.sink_logit(row), value_dim);
        state.normalise(value_dim);
        if (cache_.rotates(TileSide::values)) cache_.value_rotation.rotate_back(state.output);
        return {state.output, state.log_sum_exp()};
    }

    template <class Body>
    void each(Index items, const Body& body) noexcept {
        run_items(executor_, items, [&](Index item, Index worker) {
            const StandardFloatingPoint standard;
            const KernelScope kernels(isa_, shape_.rows_per_head);
            body(item, worker);
        });
    }

    /// body(first, end) for runs of all rows. shared: by all workers, whom it takes some microseconds to tell.
    template <class Body>
    void share_rows(bool shared, const Body& body) noexcept {
        const Index rows = shape_.rows(), runs = shared ? 2 * executor_.workers() : 1,
                    run = (rows + runs - 1) / runs;
        if (runs == 1 || executor_.workers() == 1) return body(0, rows);
        each((rows + run - 1) / run, [&](Index i, Index) { body(i * run, std::min((i + 1) * run, rows)); });
    }

    /// Lists the chunks of tiles that are read. Those that no query sees are left out, where nothing else asks for
    /// what they hold; the others stand where they would without.
    void list_chunks() {
        const bool all = planner_ || token_weights_ || !unpacked_;
        const std::span<const QueryToken> tokens = work_.queries.tokens();
        const auto seen = [&](const TilePlace& tile) {
            return sees_some(parameters_, tokens.front().position, tokens.back().position, tile.first,
                             tile.first + tile.tokens - 1);
        };
        work_.chunks.clear();
        for (Index chunk = first_chunk(); chunk < shape_.chunks(); ++chunk) {
            const TilePlace* const first = tiles_.places + chunk * DecodeShape::chunk_tiles;
            const TilePlace* const end = tiles_.places + end_of(chunk);
            if (all || std::any_of(first, end, seen)) work_.chunks.push_back(chunk);
        }
    }
    /// Whether a row block has nothing to do with some tokens. Planners plan with all of them, and kept weights
    /// must be there.
    bool passes_by(const RowBlock& block, Index first, Index count) const noexcept {
        return !planner_ && !token_weights_ && !work_.queries.sees_some(parameters_, block, first, count);
    }

    /// Into how many parts a head's row blocks are shared out: one each where there are few chunks and heads for the
    /// workers. Planners have one item a head.
    Index count_parts() const noexcept {
        const bool enough = static_cast<Index>(work_.chunks.size()) * shape_.heads >= 4 * executor_.workers();
        return planner_ || together_ || enough || executor_.workers() == 1 ? 1 : shape_.blocks_per_head();
    }
    /// Items of a chunk: one a part of a head, or one for all heads where these read the same tiles of keys.
    Index across() const noexcept { return together_ ? 1 : shape_.heads * parts_; }
    Index first_chunk() const noexcept { return first_tile_ / DecodeShape::chunk_tiles; }
    Index tile_items() const noexcept { return static_cast<Index>(work_.chunks.size()) * across(); }
    Index chunk_of(Index item) const noexcept {
        return work_.chunks[static_cast<std::size_t>(item / across())];
    }
    Index end_of(Index chunk) const noexcept {
        return std::min((chunk + 1) * DecodeShape::chunk_tiles, shape_.tiles);
    }
    /// Row blocks [first, end).
    struct Blocks {
        Index first, end;
    };
    struct Work {
        Index item, chunk;
        Blocks blocks;
        Index first_tile, end_tile;
    };
    /// Part i of all heads' parts.
    Blocks blocks_of_part(Index i) const noexcept {
        const Index each = shape_.blocks_per_head() / parts_;
        return {i * each, (i + 1) * each};
    }
    /// Those of item i of a chunk's.
    Blocks blocks_across(Index i) const noexcept {
        return together_ ? Blocks{0, shape_.row_blocks()} : blocks_of_part(i);
    }
    Work work_of(Index item) const noexcept {
        const Index chunk = chunk_of(item), first = chunk * DecodeShape::chunk_tiles;
        return {.item = item,
                .chunk = chunk,
                .blocks = blocks_across(item % across()),
                .first_tile = std::max(first, first_tile_),
                .end_tile = end_of(chunk)};
    }
    /// The states from which a chunk's tiles go on.
    void begin_states(const Work& work) noexcept {
        const bool goes_on = work.first_tile % DecodeShape::chunk_tiles != 0;
        for_blocks(work.blocks, [&](const RowBlock& block) {
            if (!goes_on) return work_.states.of(work.chunk, block.first).clear(block.rows);
            for (Index r = block.first; r < block.first + block.rows; ++r) {
                const auto [token, query_head] = work_.queries.place(r);
                work_.states.of(work.chunk, r).copy(prefix_->open(token, query_head));
            }
        });
    }
    /// body(row block) for each.
    template <class Body>
    void for_blocks(const Blocks& blocks, const Body& body) noexcept {
        for (Index b = blocks.first; b < blocks.end; ++b) body(shape_.row_block(b));
    }
    WorkerScratch& scratch(Index worker) noexcept { return work_.workers[static_cast<std::size_t>(worker)]; }

    /// Shows the planner the queries of one head (or of all) as some tiles see them.
    void sample(Index item, Index worker) noexcept {
        WorkerScratch& own = scratch(worker);
        for (const Index t : planner_->samples()) {
            if (state_.latent) own.projection.turn_to(isa_, *state_.latent, tiles_, t, 1, false);
            for_blocks(blocks_across(item), [&](const RowBlock& block) {
                std::array<float, row_block_rows> offsets{};
                if (state_.latent)
                    own.projection.project(isa_, *state_.latent, work_.queries, block, 1, offsets.data());
                planner_->sample({.tile = t, .next = t, .block = block, .worker = worker},
                                 state_.latent ? own.projection.projected(0, block) : queries_for(t, block),
                                 own.attention);
            });
        }
    }

    /// Scores of a chunk's tiles and, unless values wait, what their values add.
    void score_tiles(const Work& work, Index worker) noexcept {
        WorkerScratch& own = scratch(worker);
        begin_states(work);
        // Latents go some tiles at a time, for the sake of the projection; others tile by tile. Their turns follow
        // from those of the tiles before, so they begin with the chunk.
        const Index step = state_.latent ? projected_tiles : 1;
        bool turned = false;  // whether the tiles before were
        for (Index first = state_.latent ? work.chunk * DecodeShape::chunk_tiles : work.first_tile;
             first < work.end_tile; first += step) {
            const Index count = std::min(step, work.end_tile - first);
            const bool projects = state_.latent && scores_any(first, count, work);
            if (projects) own.projection.turn_to(isa_, *state_.latent, tiles_, first, count, turned);
            turned = projects;
            if (first + count <= work.first_tile) continue;
            for_blocks(work.blocks, [&](const RowBlock& block) {
                std::array<float, projected_tiles * row_block_rows> offsets{};
                if (projects)
                    own.projection.project(isa_, *state_.latent, work_.queries, block, count, offsets.data());
                for (Index i = std::max<Index>(work.first_tile - first, 0); i < count; ++i) {
                    const Index t = first + i;
                    if (passes_by(block, tiles_[t].first, tiles_[t].tokens)) continue;
                    const PlanPlace place{.tile = t,
                                          .next = next_tile(t, work, tiles_.layout->subspace_of(block.head)),
                                          .block = block,
                                          .worker = worker};
                    score_tile(place, projects ? own.projection.projected(i, block) : queries_for(t, block),
                               offsets.data() + i * block.rows);
                }
            });
        }
    }
    /// The queries as the keys of a tile in channels are stored. Those of latents are projected.
    RowView<const float> queries_for(Index tile, const RowBlock& block) const noexcept {
        if (state_.latent) return work_.queries.outside_tiles(block);
        return work_.queries.in_frame(cache_.frame(state_, tiles_[tile], block.head), block);
    }
    bool scores(Index tile, Index subspace) const noexcept {
        return !tiles_.hidden(tile) && (!refining_ || planner_->refines(tile, subspace));
    }
    bool scores_any(Index first, Index count, const Work& work) const noexcept {
        if (!refining_) return true;
        for (Index t = first; t < first + count; ++t)
            for (Index b = work.blocks.first; b < work.blocks.end; ++b)
                if (planner_->refines(t, tiles_.layout->subspace_of(shape_.row_block(b).head))) return true;
        return false;
    }
    /// The tile that this worker probably reads after tile t; otherwise t again.
    Index next_tile(Index t, const Work& work, Index subspace) const noexcept {
        for (Index next = t + 1; next < work.end_tile; ++next)
            if (scores(next, subspace)) return next;
        const Index item = work.item + executor_.workers();
        return item < tile_items() ? chunk_of(item) * DecodeShape::chunk_tiles : t;
    }

    void score_tile(const PlanPlace& place, RowView<const float> queries, const float* offsets) noexcept {
        const Index t = place.tile;
        const RowBlock& block = place.block;
        if (tiles_.hidden(t)) return;
        const Index subspace = tiles_.layout->subspace_of(block.head), chunk = t / DecodeShape::chunk_tiles;
        if (refining_ && !planner_->refines(t, subspace)) {
            // Its scores stay as the first pass left them.
            for (Index r = block.first; r < block.first + block.rows; ++r)
                add_weights(work_.states.of(chunk, r), *work_.weights.tile_max(t, r),
                            work_.weights.sum(t, r));
            return;
        }
        if (token_weights_) work_.kept.prefetch(t, block);
        WorkerScratch& own = scratch(place.worker);
        const TileFormat& format = tiles_.key_format(t, subspace);
        TileRead read{.tile = tiles_.keys(t, subspace), .next = tiles_.keys(place.next, subspace)};
        own.count.key_bits +=
            planner_ ? planner_->keys(place, queries, own.attention, read) : bits_read(format, nullptr);
        if (!refining_) own.count.keys += stored_elements(format);
        float* const scores = values_wait_ ? work_.weights.weights(t, block.first) : own.attention.scores();
        tile_scores(isa_, format, read, queries, offsets, own.attention, scores);
        const TilePlace& tile = tiles_[t];
        for (Index r = 0; r < block.rows && tile.row > 0; ++r)
            std::fill_n(scores + r * tile_tokens, tile.row, nothing_seen);
        work_.queries.apply(block, tile.first, tile.tokens, tile_tokens - tile.row, tiles_,
                            scores + tile.row);
        if (values_wait_)
            keep_weights(place, chunk, scores);
        else
            add_tile(place, chunk, scores);
    }
    /// The weights of a tile for later. Each tile keeps its own largest score, because what other tiles seem
    /// to hold may turn out otherwise.
    void keep_weights(const PlanPlace& place, Index chunk, float* scores) noexcept {
        const RowBlock& block = place.block;
        float* const tile_max = work_.weights.tile_max(place.tile, block.first);
        std::array<float, row_block_rows> sums{};
        std::fill_n(tile_max, block.rows, nothing_seen);
        online_softmax(isa_, scores, tile_tokens, block.rows, {tile_max, sums.data(), nullptr, 0});
        for (Index r = 0; r < block.rows; ++r)
            add_weights(work_.states.of(chunk, block.first + r), tile_max[r],
                        sums[static_cast<std::size_t>(r)]);
        if (token_weights_) work_.kept.keep(isa_, place.tile, block, scores, tile_max);
        prefetch_grids(tiles_.value_format(place.next), tiles_.values(place.next, block.head));
        planner_->scored(place, scratch(place.worker).attention);
    }
    void add_tile(const PlanPlace& place, Index chunk, float* scores) noexcept {
        WorkerScratch& own = scratch(place.worker);
        const RowBlock& block = place.block;
        const SoftmaxState to = work_.states.of(chunk, block.first);
        online_softmax(isa_, scores, tile_tokens, block.rows, to);
        if (token_weights_) work_.kept.keep(isa_, place.tile, block, scores, to.largest);
        if (tiles_.layout->values_in_keys)
            return own.values_in_keys.add(isa_, tiles_.value_format(place.tile),
                                          tiles_.values(place.tile, block.head), scores, own.attention,
                                          {to.output, to.stride, block.rows});
        TileRead read{.tile = tiles_.values(place.tile, block.head),
                      .next = tiles_.values(place.next, block.head)};
        if (planner_) {
            planner_->values(place, own.planes[0].data());
            read.planes = own.planes[0].data();
            read.wide_factors = planner_->wide_values();
        }
        const TileFormat& format = tiles_.value_format(place.tile);
        add_tile_values(isa_, format, read, scores, own.attention, {to.output, to.stride, block.rows});
        count_values(own, format, read.planes);
    }
    static void count_values(WorkerScratch& own, const TileFormat& format,
                             const std::uint8_t* planes) noexcept {
        own.count.value_bits += bits_read(format, planes);
        own.count.values += stored_elements(format);
    }

    /// The largest score and the sum of weights of every row, over the whole sequence.
    void normalise_weights() noexcept {
        for (Index r = 0; r < shape_.rows(); ++r) {
            const float sink = work_.queries.sink_logit(r);
            float top = sink, sum = 0.0f;
            for (Index chunk = 0; chunk <= shape_.chunks(); ++chunk)
                top = std::max(top, *work_.states.of(chunk, r).largest);
            for (Index chunk = 0; chunk <= shape_.chunks(); ++chunk)
                if (const SoftmaxState part = work_.states.of(chunk, r); *part.largest != nothing_seen)
                    sum += *part.sum * std::exp(*part.largest - top);
            if (sink != nothing_seen) sum += std::exp(sink - top);
            const bool counts = sum > 0.0f && work_.queries.finite(r);
            work_.weights.set_row(r, top, counts ? 1.0f / sum : 0.0f);
        }
    }

    /// Token by token the sum of the weights of a head's rows, once these are normalised. Each tile is summed by
    /// one worker, row by row, so that sums do not depend on workers.
    void sum_weights() noexcept {
        if (tiles_.hidden_to > tiles_.hidden_from)
            token_weights_->middleCols(tiles_.hidden_from, tiles_.hidden_to - tiles_.hidden_from).setZero();
        const Index chunks = shape_.chunks(), sinks = state_.sink_count(cache_.recipe());
        each((chunks + 1) * shape_.heads, [=, this](Index item, Index worker) {
            WorkerScratch& own = scratch(worker);
            const Index head = item % shape_.heads, chunk = item / shape_.heads;
            // No factor yet.
            std::fill(own.largest.begin(), own.largest.end(), std::numeric_limits<float>::quiet_NaN());
            if (chunk < chunks) {
                const Index first = chunk * DecodeShape::chunk_tiles;
                for (Index t = first; t < std::min(first + DecodeShape::chunk_tiles, shape_.tiles); ++t)
                    sum_weights(work_.kept, t, head, {tiles_[t].first, tiles_[t].tokens, tiles_[t].row}, own);
                return;
            }
            for (Index b = 0; b < unpacked_blocks(); ++b) {
                const bool sink = b < sink_blocks();
                const Index first =
                    sink ? b * token_block : state_.recent_first + (b - sink_blocks()) * token_block;
                sum_weights(work_.kept_unpacked, b, head,
                            {first, std::min(token_block, (sink ? sinks : state_.tokens) - first)}, own);
            }
        });
    }
    struct TokenRange {
        Index first, count;
        Index row = 0;  ///< of the first token
    };
    void sum_weights(const KeptWeights& kept, Index tile, Index head, const TokenRange& tokens,
                     WorkerScratch& own) noexcept {
        if (tiles_.hides(tokens.first, tokens.count)) return;
        static constexpr auto ones = [] {
            std::array<float, tile_tokens> all{};
            all.fill(1.0f);
            return all;
        }();
        const Index rows = shape_.rows_per_head, first_row = head * rows;
        const float* const largest = kept.largest(tile, first_row);
        for (Index r = 0; r < rows; ++r) {
            // It seldom changes from tile to tile.
            float& known = own.largest[static_cast<std::size_t>(r)];
            if (known == largest[r]) continue;
            known = largest[r];
            own.factors[static_cast<std::size_t>(r)] =
                known == nothing_seen ? 0.0f
                                      : std::exp(known - work_.weights.largest(first_row + r)) *
                                            *work_.weights.inverse_sums(first_row + r);
        }
        float* const sums = own.attention.scores();
        project(isa_, {own.factors.data(), rows, 1},
                {.columns = kept.weights(tile, first_row),
                 .channels = rows,
                 .kept = tile_tokens,
                 .scale = ones.data()},
                {sums, tile_tokens, 1});
        std::copy_n(sums + tokens.row, tokens.count, &(*token_weights_)(head, tokens.first));
    }

    /// Values of a chunk's tiles, where they waited.
    void add_values(const Work& work, Index worker) noexcept {
        WorkerScratch& own = scratch(worker);
        for_blocks(work.blocks, [&](const RowBlock& block) {
            std::uint8_t *planes = own.planes[0].data(), *next_planes = own.planes[1].data();
            const auto seen_from = [&](Index t) {
                while (t < work.end_tile && tiles_.hidden(t)) ++t;
                return t;
            };
            const auto plan = [&](Index t, std::uint8_t* to) {
                planner_->values({.tile = t, .next = t, .block = block, .worker = worker}, to);
            };
            Index t = seen_from(work.first_tile);
            if (t < work.end_tile) plan(t, planes);
            for (Index next; t < work.end_tile; t = next, std::swap(planes, next_planes)) {
                next = seen_from(t + 1);
                const bool goes_on = next < work.end_tile;
                if (goes_on) plan(next, next_planes);
                count_values(own, tiles_.layout->values, planes);
                add_waiting_tile(block, work.chunk, t, own,
                                 {.tile = tiles_.values(t, block.head),
                                  .next = tiles_.values(goes_on ? next : t, block.head),
                                  .planes = planes,
                                  .next_planes = goes_on ? next_planes : planes,
                                  .wide_factors = planner_->wide_values()});
            }
        });
    }
    void add_waiting_tile(const RowBlock& block, Index chunk, Index t, WorkerScratch& own,
                          const TileRead& read) noexcept {
        const TileFormat& format = tiles_.layout->values;
        // fp16 has no grids, so that nothing is left to add where no plane is read.
        if (format.segments()[0].is_half() && std::all_of(read.planes, read.planes + plane_groups(format),
                                                          [](int planes) { return planes == 0; }))
            return;
        const SoftmaxState to = work_.states.of(chunk, block.first);
        float* const weights = work_.weights.weights(t, block.first);
        for (Index r = 0; r < block.rows; ++r) {
            const float by = work_.weights.rescale(t, block.first + r, to.largest[r]);
            if (by == 1.0f) continue;
            Eigen::Map<Eigen::ArrayXf>(weights + r * tile_tokens, tile_tokens) *= by;
        }
        add_tile_values(isa_, format, read, weights, own.attention, {to.output, to.stride, block.rows});
    }

    Index sink_blocks() const noexcept {
        return (state_.sink_count(cache_.recipe()) + token_block - 1) / token_block;
    }
    /// Blocks of tokens outside tiles: of sinks, then recent ones.
    Index unpacked_blocks() const noexcept {
        return sink_blocks() + (state_.tokens - state_.recent_first + token_block - 1) / token_block;
    }
    /// Sinks and recent tokens.
    void add_unpacked(const Blocks& blocks, Index worker) noexcept {
        const Index chunk = shape_.chunks(), sinks = state_.sink_count(cache_.recipe());
        for_blocks(blocks,
                   [&](const RowBlock& block) { work_.states.of(chunk, block.first).clear(block.rows); });
        for (Index t = 0; t < sinks; t += token_block)
            add_tokens({.rows = &sink_rows_,
                        .block = t / token_block,
                        .page = state_.sinks.data(),
                        .at = t,
                        .first = t,
                        .count = std::min(token_block, sinks - t)},
                       blocks, worker);
        static_assert(token_block == recent_page_tokens);
        const Index recent = state_.tokens - state_.recent_first;
        for (Index t = 0; t < recent; t += token_block) {
            const auto page = static_cast<std::size_t>(t / token_block);
            add_tokens({.rows = &recent_rows_,
                        .block = sink_blocks() + t / token_block,
                        .page = state_.recent[page].data(),
                        .at = 0,
                        .first = state_.recent_first + t,
                        .count = std::min(token_block, recent - t),
                        .next = t + token_block < recent ? state_.recent[page + 1].data() : nullptr},
                       blocks, worker);
        }
    }
    /// Consecutive tokens of a page.
    struct UnpackedTokens {
        const TokenRows* rows;
        Index block;  ///< among unpacked_blocks()
        const std::byte* page;
        Index at;                         ///< within the page
        Index first, count;               ///< positions
        const std::byte* next = nullptr;  ///< the page whose keys are read afterwards
    };
    void add_tokens(const UnpackedTokens& tokens, const Blocks& blocks, Index worker) noexcept {
        if (tiles_.hides(tokens.first, tokens.count)) return;
        AttentionScratch& own = scratch(worker).attention;
        const Index key_dim = cache_.dim(TileSide::keys), value_dim = cache_.dim(TileSide::values),
                    padded = (tokens.count + unit_lanes - 1) / unit_lanes * unit_lanes;
        for_blocks(blocks, [&](const RowBlock& block) {
            if (passes_by(block, tokens.first, tokens.count)) return;
            const auto read = [&](TileSide side, Index dim) -> RowView<const float> {
                tokens.rows->read(tokens.page, side, block.head, tokens.at, tokens.count, own.rows().data,
                                  dim);
                return {own.rows().data, dim, tokens.count};
            };
            tokens.rows->prefetch(tokens.page, TileSide::values, block.head, tokens.at, tokens.count);
            const RowView<float> scores{own.scores(), tile_tokens, block.rows};
            row_scores(isa_, work_.queries.outside_tiles(block), read(TileSide::keys, key_dim), key_dim,
                       scores);
            work_.queries.apply(block, tokens.first, tokens.count, padded, tiles_, scores.data);
            if (tokens.next)
                tokens.rows->prefetch(tokens.next, TileSide::keys, block.head, 0, recent_page_tokens);
            const SoftmaxState to = work_.states.of(shape_.chunks(), block.first);
            online_softmax(isa_, scores.data, padded, block.rows, to);
            if (token_weights_) work_.kept_unpacked.keep(isa_, tokens.block, block, scores.data, to.largest);
            const RowView<const float> values = read(TileSide::values, value_dim);
            if (planner_) planner_->unpacked(block.head, values, value_dim);
            add_rows(isa_, scores, values, value_dim, {to.output, to.stride, block.rows});
        });
    }

    ReadCount counted() const noexcept {
        ReadCount all;
        for (const WorkerScratch& worker : work_.workers) all += worker.count;
        return all;
    }
    void report() noexcept {
        const ReadCount read = counted();
        const auto mean = [](Index bits, Index elements) {
            return elements > 0 ? static_cast<double>(bits) / static_cast<double>(elements) : 0.0;
        };
        work_.report = {};
        work_.report.key_bits = mean(read.key_bits, read.keys);
        work_.report.value_bits = mean(read.value_bits, read.values);
        if (read.values > 0)
            work_.report.mean_bits = mean(read.key_bits + read.value_bits, read.keys + read.values);
        if (planner_) planner_->certify(work_.report);
    }

    const CacheShape& cache_;
    const CacheState& state_;
    Workspace& work_;
    Executor& executor_;
    Isa isa_;
    TileSequence tiles_;
    DecodeShape shape_;
    const AttentionParameters& parameters_;
    bool together_;  ///< all heads read the same tiles of keys, so they go together
    Index first_tile_;
    bool unpacked_;
    PrefixStates* prefix_;
    Matrix* token_weights_;
    ReadPlanner* planner_;
    Index parts_ = 1;
    bool values_wait_ = false;
    bool refining_ = false;
    TokenRows sink_rows_, recent_rows_;
};

}  // namespace kvplane::detail
