// kvplane/cache/blocked_attention.hpp: KvCache decoded run by run, and attention with matrix products over
// that. Part of kv_cache.hpp, which includes it.
#pragma once

#include "kvplane/cache/kv_cache.hpp"

namespace kvplane {

/// Decodes, run by run: sinks, tiles, recent tokens.
class KvCache::Reader {
  public:
    /// Consecutive tokens; those of a tile, or not.
    struct Run {
        Index first, count;
        const Tile* tile;
    };

    explicit Reader(const KvCache& cache)
        : cache_(cache), sink_rows_(cache.sink_rows()), window_rows_(cache.window_rows()) {
        const State& state = cache.state_;
        if (cache.sinks() > 0) runs_.push_back({0, cache.sinks(), nullptr});
        for (const Tile& tile : state.tiles) runs_.push_back({tile.first, tile.tokens, &tile});
        if (!state.window.empty())
            runs_.push_back({state.window_first, state.tokens - state.window_first, nullptr});
        if (state.tiles.empty()) return;
        values_.emplace(state.layout->values);
        if (state.layout->latent)
            latents_.emplace(state.layout->latent);
        else
            keys_.emplace(state.layout->keys[0]);
    }

    /// Runs that hold tokens which are still kept.
    const std::vector<Run>& runs() const noexcept { return runs_; }

    /// One side (0 keys, 1 values) and head of a run, in the frame of its rows: count x dim. Not for keys in
    /// latents.
    const Matrix& rows(const Run& run, int side, Index head) {
        const Index dim = cache_.dim(side);
        decoded_.resize(run.count, dim);
        if (run.tile) {
            (side == 0 ? *keys_ : *values_).decode(tile(run, side, head), run.count, decoded_.data(), dim);
        } else if (run.first < cache_.sinks()) {
            sink_rows_.read(cache_.state_.sinks.data(), side, head, 0, run.count, decoded_.data(), dim);
        } else {
            for (Index t = 0; t < run.count; t += window_page_tokens)
                window_rows_.read(
                    cache_.state_.window[static_cast<std::size_t>(t / window_page_tokens)].data(), side, head,
                    0, std::min(window_page_tokens, run.count - t), decoded_.data() + t * dim, dim);
        }
        return decoded_;
    }

    bool in_latents(const Run& run) const noexcept { return run.tile && latents_; }
    /// Keys of one head of a run in the frame of the input; of latents the first `most` count.
    Matrix input_keys(const Run& run, Index head, Index most) {
        if (in_latents(run))
            return latents_->reconstruct(head, latent_tile(run, head), run.count, run.first, most);
        Matrix keys = rows(run, 0, head);
        if (cache_.recipe().keys.rotate) cache_.key_rotation_.rotate_back(keys);
        return keys;
    }

    /// q.k of queries and the keys of a run. Of latents the first `most` count.
    void scores(const Run& run, const Queries& queries, Index most, Matrix& scores);

    double tile_error_bound(const Tile& tile, int side) {
        const Run run{tile.first, tile.tokens, &tile};
        if (side == 0 && latents_) return 0.0;  // measured when it was made
        double bound = 0.0;
        for (Index head = 0; head < cache_.configuration_.kv_heads; ++head)
            bound = std::max(
                bound, (side == 0 ? *keys_ : *values_).error_bound(this->tile(run, side, head), tile.tokens));
        return bound;
    }

  private:
    const std::byte* tile(const Run& run, int side, Index head) const {
        const TileLayout& layout = *cache_.state_.layout;
        return run.tile->page.data() +
               (side == 0 ? layout.key_at : layout.value_at)[static_cast<std::size_t>(head)];
    }
    const std::byte* latent_tile(const Run& run, Index head) const {
        return tile(run, 0, cache_.state_.layout->latent->subspace_of_head(head));
    }

    void projected_scores(const Run& run, const LatentKeys& keys, const Queries& queries, Index most,
                          Matrix& scores);

    const KvCache& cache_;
    std::vector<Run> runs_;
    std::optional<TileCoder> keys_, values_;
    std::optional<LatentCoder> latents_;
    TokenRows sink_rows_, window_rows_;
    Matrix decoded_, turned_, projected_;
};

/// Some of the queries: of the heads that share some key heads, and of some query tokens.
struct KvCache::QueryBlock {
    Index first_head, heads;  ///< of keys
    Index first, tokens;
};

/// Queries of a block, query head by query head below each other, as given and as keys in channels are
/// stored; and what becomes of their scores.
struct KvCache::Queries {
    /// given: all of them, query_tokens x (query_heads * key_head_dim).
    Queries(const KvCache& cache, const Matrix& given, const AttentionParameters& parameters,
            const QueryBlock& which)
        : block(which), per_head(cache.configuration_.group() * which.tokens) {
        const CacheConfiguration& c = cache.configuration_;
        first_position = cache.tokens() - given.rows();
        plain.resize(block.heads * per_head, c.key_head_dim);
        for (Index h = 0; h < block.heads * c.group(); ++h) {
            const Index head = block.first_head * c.group() + h;
            plain.middleRows(h * block.tokens, block.tokens) =
                given.block(block.first, head * c.key_head_dim, block.tokens, c.key_head_dim);
            rules.emplace_back(parameters, head, given.rows(), c.key_head_dim);
        }
        rotated = plain;
        if (c.recipe.keys.rotate) cache.key_rotation_.rotate(rotated);
    }

    Index rows() const noexcept { return plain.rows(); }
    Index token(Index row) const noexcept { return block.first + row % block.tokens; }
    Index position(Index row) const noexcept { return first_position + token(row); }
    /// Of the last query token.
    Index last_position() const noexcept { return first_position + block.first + block.tokens - 1; }

    QueryBlock block;
    Index per_head;  ///< rows of one key head
    Index first_position;
    Matrix plain, rotated;
    std::vector<detail::ScoreRule<float>> rules;  ///< by query head of the block

    /// From q.k of a run to what the softmax takes; hidden tokens get -infinity.
    void apply(const Reader::Run& run, Index hidden_from, Index hidden_to, Matrix& scores) const {
        constexpr float none = -std::numeric_limits<float>::infinity();
        for (Index r = 0; r < rows(); ++r) {
            const detail::ScoreRule<float>& rule = rules[static_cast<std::size_t>(r / block.tokens)];
            auto row = scores.row(r);
            const bool all_seen = run.first + run.count - 1 <= position(r) &&
                                  (run.first >= hidden_to || run.first < hidden_from);
            if (rule.plain() && all_seen) {
                row *= rule.scale();
                continue;
            }
            for (Index t = 0; t < run.count; ++t) {
                const Index key = run.first + t;
                row[t] =
                    key >= hidden_from && key < hidden_to ? none : rule(row[t], token(r), position(r), key);
            }
        }
    }
};

inline void KvCache::Reader::scores(const Run& run, const Queries& queries, Index most, Matrix& scores) {
    const Index first_head = queries.block.first_head, per_head = queries.per_head;
    scores.resize(queries.rows(), run.count);
    const LatentKeys* const keys = in_latents(run) ? cache_.state_.layout->latent.get() : nullptr;
    if (keys && keys->frame() != KeyFrame::before_rope)
        return projected_scores(run, *keys, queries, most, scores);
    for (Index h = 0; h < queries.block.heads; ++h) {
        auto to = scores.middleRows(h * per_head, per_head);
        if (keys)
            to.noalias() = queries.plain.middleRows(h * per_head, per_head) *
                           input_keys(run, first_head + h, most).transpose();
        else
            to.noalias() =
                queries.rotated.middleRows(h * per_head, per_head) * rows(run, 0, first_head + h).transpose();
    }
}

/// The queries are turned and projected, once for the tile; no key is rebuilt. (Keys before RoPE have an
/// angle each, so these are: the slow path that SVDq's authors name.)
inline void KvCache::Reader::projected_scores(const Run& run, const LatentKeys& keys, const Queries& queries,
                                              Index most, Matrix& scores) {
    const Index per_head = queries.per_head, dim = cache_.dim(0);
    turned_ = queries.plain;
    if (keys.frame() == KeyFrame::tile) keys.embedding().turn(turned_, -run.first);
    const Matrix* latents = nullptr;
    for (Index h = 0; h < queries.block.heads; ++h) {
        const Index head = queries.block.first_head + h, subspace = keys.subspace_of_head(head),
                    at = keys.head_offset(head);
        if (!latents || keys.subspaces() > 1)
            latents = &latents_->latents(subspace, latent_tile(run, head), run.count);
        const Index kept = std::min(most, latents->cols());
        const auto turned = turned_.middleRows(h * per_head, per_head);
        projected_.noalias() = turned * latents_->from_latents(subspace).block(at, 0, dim, kept);
        auto to = scores.middleRows(h * per_head, per_head);
        to.noalias() = projected_ * latents->leftCols(kept).transpose();
        to.colwise() += turned * keys.subspace(subspace).mean.segment(at, dim).transpose();
    }
}

/// For every row the least approximate score that a token of a tile needs to take part; and the approximate
/// scores, rows x tokens in tiles.
struct KvCache::Selection {
    Eigen::VectorXf least;
    Matrix scores;
};

inline KvCache::Selection KvCache::select(Reader& reader, const Queries& queries,
                                          const AttentionParameters& parameters) const {
    Selection selection{Eigen::VectorXf(queries.rows()), Matrix(queries.rows(), packed_in_tiles())};
    const Index latents = selection_latents(parameters);
    Matrix scores;
    Index at = 0;
    for (const Reader::Run& run : reader.runs()) {
        if (!run.tile) continue;
        reader.scores(run, queries, latents, scores);
        queries.apply(run, recipe().sink_tokens, state_.dropped, scores);
        selection.scores.middleCols(at, run.count) = scores;
        at += run.count;
    }
    const auto kept = static_cast<Index>(std::ceil(parameters.key_fraction * static_cast<double>(at)));
    std::vector<float> sorted(static_cast<std::size_t>(at));
    for (Index r = 0; r < queries.rows() && at > 0; ++r) {
        std::copy_n(selection.scores.row(r).data(), at, sorted.begin());
        const auto place = sorted.begin() + std::clamp<Index>(kept - 1, 0, at - 1);
        std::nth_element(sorted.begin(), place, sorted.end(), std::greater<>());
        selection.least[r] = *place;
    }
    return selection;
}

/// The blocked path: heads and blocks of query tokens, each by itself, with an online softmax over runs.
class KvCache::Blocked {
  public:
    Blocked(const KvCache& cache, const Matrix& queries, const AttentionParameters& parameters,
            Executor& executor)
        : cache_(cache),
          queries_(queries),
          parameters_(parameters),
          output_(queries.rows(), cache.configuration_.query_heads * cache.dim(1)) {
        const LatentKeys* const keys = cache.latent_keys();
        // One part holds the latents of all heads, which so decode it together.
        const Index heads = cache.configuration_.kv_heads, together = keys && keys->subspaces() == 1 ? heads : 1;
        for (Index head = 0; head < heads; head += together)
            for (Index first = 0; first < queries.rows(); first += block_tokens)
                blocks_.push_back({head, together, first, std::min(block_tokens, queries.rows() - first)});
        readers_.emplace_back(cache);
        if (blocks_.size() > 1)
            while (static_cast<Index>(readers_.size()) < executor.workers())
                readers_.push_back(readers_.front());
    }

    Matrix run(Executor& executor) {
        const auto body = [](void* self, Index item, Index worker) {
            static_cast<Blocked*>(self)->guarded(item, worker);
        };
        if (readers_.size() == 1) {
            SerialExecutor alone;
            alone.run(static_cast<Index>(blocks_.size()), body, this);
        } else {
            executor.run(static_cast<Index>(blocks_.size()), body, this);
        }
#if defined(__cpp_exceptions)
        if (failure_) std::rethrow_exception(failure_);
#endif
        if (cache_.recipe().values.rotate) cache_.value_rotation_.rotate_back(output_);
        return std::move(output_);
    }

  private:
    /// Query tokens of a block: enough to make up for decoding, few enough to share out among threads.
    static constexpr Index block_tokens = 128;

    /// What fails here fails where memory ends; executors take no exceptions.
    void guarded(Index item, Index worker) noexcept {
#if defined(__cpp_exceptions)
        try {
            attend(blocks_[static_cast<std::size_t>(item)], readers_[static_cast<std::size_t>(worker)]);
        } catch (...) {
            const std::lock_guard lock(mutex_);
            failure_ = std::current_exception();
        }
#else
        attend(blocks_[static_cast<std::size_t>(item)], readers_[static_cast<std::size_t>(worker)]);
#endif
    }

    void attend(const QueryBlock& block, Reader& reader) {
        const Queries queries(cache_, queries_, parameters_, block);
        const Index value_dim = cache_.dim(1), rows = queries.rows(), per_head = queries.per_head;
        const Index hidden_from = cache_.recipe().sink_tokens, hidden_to = cache_.state_.dropped;
        const Index all_latents = cache_.dim(0) * cache_.configuration_.kv_heads;
        constexpr float none = -std::numeric_limits<float>::infinity();
        Selection selection;
        const bool sparse = parameters_.key_fraction < 1.0;
        if (sparse) selection = cache_.select(reader, queries, parameters_);
        Eigen::VectorXf largest = Eigen::VectorXf::Constant(rows, none), sum = Eigen::VectorXf::Zero(rows);
        Matrix weighted = Matrix::Zero(rows, value_dim), scores;

        Index packed = 0;
        for (const Reader::Run& run : reader.runs()) {
            const Index at = std::exchange(packed, run.tile ? packed + run.count : packed);
            if (run.first > queries.last_position()) break;
            if (run.first >= hidden_from && run.first + run.count <= hidden_to) continue;
            if (sparse && run.tile &&
                (selection.scores.middleCols(at, run.count).rowwise().maxCoeff().array() <
                 selection.least.array())
                    .all())
                continue;
            reader.scores(run, queries, all_latents, scores);
            queries.apply(run, hidden_from, hidden_to, scores);
            if (sparse && run.tile)
                for (Index r = 0; r < rows; ++r)
                    for (Index t = 0; t < run.count; ++t)
                        if (selection.scores(r, at + t) < selection.least[r]) scores(r, t) = none;
            for (Index r = 0; r < rows; ++r) {
                auto row = scores.row(r);
                const float top = std::max(largest[r], row.maxCoeff());
                if (top == none) {
                    row.setZero();
                    continue;
                }
                const float rescale = std::exp(largest[r] - top);
                row = (row.array() - top).exp().matrix();
                sum[r] = sum[r] * rescale + row.sum();
                weighted.row(r) *= rescale;
                largest[r] = top;
            }
            for (Index h = 0; h < block.heads; ++h)
                weighted.middleRows(h * per_head, per_head).noalias() +=
                    scores.middleRows(h * per_head, per_head) * reader.rows(run, 1, block.first_head + h);
        }
        const Index first_head = block.first_head * cache_.configuration_.group();
        for (Index r = 0; r < rows; ++r)
            output_.row(queries.token(r)).segment((first_head + r / block.tokens) * value_dim, value_dim) =
                weighted.row(r) * (sum[r] == 0.0f ? 0.0f : 1.0f / sum[r]);
    }

    const KvCache& cache_;
    const Matrix& queries_;
    const AttentionParameters& parameters_;
    Matrix output_;
    std::vector<QueryBlock> blocks_;
    std::vector<Reader> readers_;  ///< by worker
#if defined(__cpp_exceptions)
    std::mutex mutex_;
    std::exception_ptr failure_;
#endif
};

inline Matrix KvCache::attend_rows(const Matrix& given, const AttentionParameters& parameters,
                                   Executor& executor) const {
    return Blocked(*this, given, parameters, executor).run(executor);
}

inline std::vector<std::vector<Index>> KvCache::selected(const Matrix& given,
                                                         const AttentionParameters& parameters) const {
    const Queries queries(*this, given, parameters, {0, configuration_.kv_heads, 0, given.rows()});
    Reader reader(*this);
    const Selection selection = select(reader, queries, parameters);
    std::vector<std::vector<Index>> all(static_cast<std::size_t>(queries.rows()));
    Index at = 0;
    for (const Reader::Run& run : reader.runs()) {
        if (!run.tile) continue;
        for (Index r = 0; r < queries.rows(); ++r)
            for (Index t = 0; t < run.count; ++t)
                if (selection.scores(r, at + t) >= selection.least[r])
                    all[static_cast<std::size_t>(r)].push_back(run.first + t);
        at += run.count;
    }
    return all;
}

inline Matrix KvCache::stored(int side, Index first, Index count) const {
    require(first >= 0 && count >= 0 && first + count <= tokens(), ErrorCode::index, "stored tokens ", first,
            " to ", first + count, " of ", tokens());
    require(count == 0 || first >= first_kept() || first + count <= sinks() || state_.dropped <= sinks(),
            ErrorCode::index, "stored tokens ", first, " to ", first + count, ": those before ", first_kept(),
            " were dropped");
    Matrix all(count, configuration_.kv_heads * dim(side));
    if (count == 0) return all;
    Reader reader(*this);
    for (Index head = 0; head < configuration_.kv_heads; ++head)
        for (const Reader::Run& run : reader.runs()) {
            const Index from = std::max(first, run.first),
                        to = std::min(first + count, run.first + run.count);
            if (from >= to) continue;
            all.block(from - first, head * dim(side), to - from, dim(side)) =
                (side == 0 ? reader.input_keys(run, head, all.cols()) : reader.rows(run, 1, head))
                    .middleRows(from - run.first, to - from);
        }
    if (side == 1 && recipe().values.rotate) value_rotation_.rotate_back(all);
    return all;
}

/// Rounding of a token while it is recent (or a sink), then the grids of its tile, then what was clipped.
inline CacheErrorBound KvCache::error_bound() const {
    double bound[2];
    Reader reader(*this);
    for (int side = 0; side < 2; ++side) {
        const double largest = state_.largest[side];
        const double half = largest * 0x1p-11 + 0x1p-25;
        const double byte = recipe().recent_bits == 8 ? largest / 127.0 * (0.5 + 0x1p-9) + 0x1p-24 : 0.0;
        double tiles = 0.0;
        for (const Tile& tile : state_.tiles) tiles = std::max(tiles, reader.tile_error_bound(tile, side));
        bound[side] = std::max(half, byte) + tiles + state_.excess[side];
    }
    return {bound[0], bound[1]};
}

}  // namespace kvplane
