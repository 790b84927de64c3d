// kvplane/cache/impl/prefill.hpp: blocks of queries against decoded runs.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "kvplane/attention/executor.hpp"
#include "kvplane/attention/parameters.hpp"
#include "kvplane/attention/score_rule.hpp"
#include "kvplane/attention/softmax.hpp"
#include "kvplane/cache/prefill.hpp"
#include "kvplane/cache/queries.hpp"
#include "kvplane/cache/reader.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/simd/floating_point.hpp"

namespace kvplane::detail {

/// Some of the queries: of the heads that share some key heads, and of some query tokens.
struct QueryBlock {
    Index first_head, heads;  ///< of keys
    Index first, tokens;
};

/// The queries of a block, query head by query head below each other, and what becomes of their scores.
struct BlockQueries {
    /// given: [query token][query_heads * key dim], all of them
    BlockQueries(const CacheShape& cache, const CacheState& state, const Matrix& given,
                 const AttentionParameters& parameters, const QueryBlock& which)
        : block(which),
          rows_per_head(cache.configuration.group() * which.tokens),
          first_position(parameters.first_position(state.tokens, given.rows())),
          causal(parameters.causal) {
        const CacheConfiguration& c = cache.configuration;
        plain.resize(block.heads * rows_per_head, c.key_head_dim);
        for (Index h = 0; h < block.heads * c.group(); ++h) {
            const Index head = block.first_head * c.group() + h;
            plain.middleRows(h * block.tokens, block.tokens) =
                given.block(block.first, head * c.key_head_dim, block.tokens, c.key_head_dim);
            rules.emplace_back(parameters, head, given.rows(), c.key_head_dim);
        }
        const ScoreRange range(cache, state);
        finite.resize(static_cast<std::size_t>(rows()));
        for (Index r = 0; r < rows(); ++r) {
            const ScoreRule<float>& rule = rules[static_cast<std::size_t>(r / block.tokens)];
            const bool fits =
                range.holds(plain.row(r).cast<double>().squaredNorm(), static_cast<double>(rule.scale()));
            finite[static_cast<std::size_t>(r)] = fits;
            if (!fits) plain.row(r).setZero();
        }
        if (!cache.may_rotate(TileSide::keys)) return;
        rotated = plain;
        cache.key_rotation.rotate(rotated);
    }

    Index rows() const noexcept { return plain.rows(); }
    Index token(Index row) const noexcept { return block.first + row % block.tokens; }
    Index position(Index row) const noexcept { return first_position + token(row); }
    /// Whether none of the queries sees tokens from `first` on.
    bool all_before(Index first) const noexcept {
        return causal && first > first_position + block.first + block.tokens - 1;
    }

    /// From q.k of a run to what the softmax takes; hidden tokens get -infinity.
    void apply(const Reader::Run& run, const TileSequence& sequence, Matrix& scores) const {
        const bool hides_some = sequence.hides_some(run.first, run.count);
        for (Index r = 0; r < rows(); ++r) {
            const ScoreRule<float>& rule = rules[static_cast<std::size_t>(r / block.tokens)];
            auto row = scores.row(r);
            if (rule.plain() && rule.sees_until(position(r), run.first + run.count - 1) && !hides_some) {
                row *= rule.scale();
                continue;
            }
            for (Index t = 0; t < run.count; ++t) {
                const Index key = run.first + t;
                row[t] = sequence.hides(key, 1) ? nothing_seen : rule(row[t], token(r), position(r), key);
            }
        }
    }

    QueryBlock block;
    Index rows_per_head;  ///< of one key head
    Index first_position;
    bool causal;
    Matrix plain, rotated;                ///< [row][key dim] as given, and where keys may be rotated, so
    std::vector<ScoreRule<float>> rules;  ///< [query head of the block]
    std::vector<bool> finite;             ///< [row] the others are 0 here, and get NaN in the end
};

/// Scores of runs, with the memory that they take.
class RunScores {
  public:
    RunScores(const CacheShape& cache, const CacheState& state) : cache_(cache), state_(state) {}

    /// scores [row][count] = q.k of the keys of a run. Of latents the first `most` count.
    void compute(Reader& reader, const Reader::Run& run, const BlockQueries& queries, Index most,
                 Matrix& scores) {
        const Index first_head = queries.block.first_head, rows = queries.rows_per_head;
        scores.resize(queries.rows(), run.count);
        const LatentKeys* const keys = reader.in_latents(run) ? state_.latent.get() : nullptr;
        if (keys && keys->frame() != KeyFrame::before_rope)
            return project(reader, run, *keys, queries, most, scores);
        for (Index h = 0; h < queries.block.heads; ++h) {
            auto to = scores.middleRows(h * rows, rows);
            if (keys)
                to.noalias() = queries.plain.middleRows(h * rows, rows) *
                               reader.input_keys(run, first_head + h, most).transpose();
            else
                to.noalias() = in_frame(reader.frame(run, first_head + h), queries, h) *
                               reader.rows(run, TileSide::keys, first_head + h).transpose();
        }
    }

  private:
    /// The queries of a head of the block as its keys in channels, which may have moved, are stored.
    Eigen::Ref<const Matrix> in_frame(const StoredFrame& frame, const BlockQueries& queries, Index head) {
        const Index rows = queries.rows_per_head;
        if (frame.turn == 0)
            return (frame.rotated ? queries.rotated : queries.plain).middleRows(head * rows, rows);
        turned_ = queries.plain.middleRows(head * rows, rows);
        cache_.rope->turn(turned_, frame.turn);
        if (frame.rotated) cache_.key_rotation.rotate(turned_);
        return turned_;
    }
    /// The queries are turned and projected, once for the tile; no key is rebuilt. (Keys before RoPE have an
    /// angle each, so these are: the slow path that SVDq's authors name.)
    void project(Reader& reader, const Reader::Run& run, const LatentKeys& keys, const BlockQueries& queries,
                 Index most, Matrix& scores) {
        const Index rows = queries.rows_per_head, dim = cache_.dim(TileSide::keys);
        turned_ = queries.plain;
        if (keys.frame() == KeyFrame::tile) keys.embedding().turn(turned_, -run.tile->origin());
        if (const Index turn = reader.query_turn(run)) keys.embedding().turn(turned_, turn);
        const Matrix* latents = nullptr;
        for (Index h = 0; h < queries.block.heads; ++h) {
            const Index head = queries.block.first_head + h, subspace = keys.subspace_of_head(head),
                        at = keys.head_offset(head);
            if (!latents || keys.subspaces() > 1) latents = &reader.latents(run, subspace);
            const Index kept = std::min(most, latents->cols());
            const auto turned = turned_.middleRows(h * rows, rows);
            projected_.noalias() = turned * reader.from_latents(run, subspace).block(at, 0, dim, kept);
            auto to = scores.middleRows(h * rows, rows);
            to.noalias() = projected_ * latents->leftCols(kept).transpose();
            to.colwise() += turned * keys.subspace(subspace).mean.segment(at, dim).transpose();
        }
    }

    const CacheShape& cache_;
    const CacheState& state_;
    Matrix turned_, projected_;
};

/// Which tokens of tiles take part, by approximate scores from leading latents.
struct KeySelection {
    Eigen::VectorXf least;  ///< [row] the least approximate score of a token that takes part
    Matrix scores;          ///< [row][token in tiles] approximate
};

/// How many leading latents of a subspace choose tokens.
inline Index selection_latents(const CacheState& state, const AttentionParameters& parameters) noexcept {
    if (parameters.selection_latents > 0) return parameters.selection_latents;
    return state.latent ? std::max<Index>(1, state.latent->subspace_channels() / 4) : 1;
}

inline KeySelection select_keys(const CacheState& state, Reader& reader, RunScores& run_scores,
                                const BlockQueries& queries, const AttentionParameters& parameters) {
    KeySelection selection{Eigen::VectorXf(queries.rows()), Matrix(queries.rows(), state.packed())};
    const TileSequence sequence = state.sequence();
    const Index latents = selection_latents(state, parameters);
    Matrix scores;
    Index at = 0;
    for (const Reader::Run& run : reader.runs()) {
        if (!run.tile) continue;
        run_scores.compute(reader, run, queries, latents, scores);
        queries.apply(run, sequence, scores);
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

/// Heads and blocks of query tokens, each by itself, with an online softmax over runs.
class Prefill {
  public:
    /// queries: [query token][query_heads * key dim]
    Prefill(const CacheShape& cache, const CacheState& state, const Matrix& queries,
            const AttentionParameters& parameters, Matrix* token_weights, Executor& executor)
        : cache_(cache),
          state_(state),
          queries_(queries),
          parameters_(parameters),
          token_weights_(token_weights),
          sequence_(state.sequence()),
          output_{Matrix(queries.rows(), cache.configuration.query_heads * cache.dim(TileSide::values)),
                  Matrix(queries.rows(), cache.configuration.query_heads)} {
        // One basis holds the latents of all heads, which therefore decode it together.
        const Index heads = cache.configuration.kv_heads,
                    together = state.latent && state.latent->subspaces() == 1 ? heads : 1;
        for (Index head = 0; head < heads; head += together)
            for (Index first = 0; first < queries.rows(); first += block_tokens)
                blocks_.push_back({head, together, first, std::min(block_tokens, queries.rows() - first)});
        if (token_weights) block_weights_.resize(blocks_.size());
        readers_.emplace_back(cache, state);
        if (blocks_.size() > 1)
            while (static_cast<Index>(readers_.size()) < executor.workers())
                readers_.push_back(readers_.front());
    }

    /// Throws what a block threw.
    PrefillOutput run(Executor& executor) {
        SerialExecutor alone;
        Executor& used = readers_.size() == 1 ? static_cast<Executor&>(alone) : executor;
        run_items(used, static_cast<Index>(blocks_.size()), [this](Index item, Index worker) {
            const StandardFloatingPoint standard;
            failure_.guard([&] { attend(item, readers_[static_cast<std::size_t>(worker)]); });
        });
        failure_.rethrow();
        if (token_weights_) token_weights_->setZero();
        for (std::size_t b = 0; b < block_weights_.size(); ++b)
            token_weights_->middleRows(blocks_[b].first_head, blocks_[b].heads) += block_weights_[b];
        if (cache_.rotates(TileSide::values)) cache_.value_rotation.rotate_back(output_.values);
        return std::move(output_);
    }

  private:
    /// Query tokens of a block: enough to make up for decoding, few enough to share out among threads.
    static constexpr Index block_tokens = 128;

    void attend(Index item, Reader& reader) {
        const QueryBlock& block = blocks_[static_cast<std::size_t>(item)];
        const BlockQueries queries(cache_, state_, queries_, parameters_, block);
        RunScores run_scores(cache_, state_);
        const Index value_dim = cache_.dim(TileSide::values), rows = queries.rows(),
                    per_head = queries.rows_per_head;
        const Index all_latents = cache_.dim(TileSide::keys) * cache_.configuration.kv_heads;
        const bool sparse = parameters_.key_fraction < 1.0;
        KeySelection selection;
        if (sparse) selection = select_keys(state_, reader, run_scores, queries, parameters_);
        Eigen::VectorXf largest = Eigen::VectorXf::Constant(rows, nothing_seen),
                        sum = Eigen::VectorXf::Zero(rows);
        Matrix weighted = Matrix::Zero(rows, value_dim), scores;
        std::vector<RunWeights> kept;

        Index packed = 0;
        for (const Reader::Run& run : reader.runs()) {
            const Index at = std::exchange(packed, run.tile ? packed + run.count : packed);
            if (queries.all_before(run.first)) break;
            if (sequence_.hides(run.first, run.count)) continue;
            if (sparse && run.tile &&
                (selection.scores.middleCols(at, run.count).rowwise().maxCoeff().array() <
                 selection.least.array())
                    .all())
                continue;
            run_scores.compute(reader, run, queries, all_latents, scores);
            queries.apply(run, sequence_, scores);
            if (sparse && run.tile)
                for (Index r = 0; r < rows; ++r)
                    for (Index t = 0; t < run.count; ++t)
                        if (selection.scores(r, at + t) < selection.least[r]) scores(r, t) = nothing_seen;
            for (Index r = 0; r < rows; ++r) add_run(scores.row(r), largest[r], sum[r], weighted.row(r));
            for (Index h = 0; h < block.heads; ++h)
                weighted.middleRows(h * per_head, per_head).noalias() +=
                    scores.middleRows(h * per_head, per_head) *
                    reader.rows(run, TileSide::values, block.first_head + h);
            if (token_weights_) kept.push_back({run, std::move(scores), largest});
        }
        const Index first_head = block.first_head * cache_.configuration.group();
        for (Index r = 0; r < rows; ++r) {
            const Index head = first_head + r / block.tokens, token = queries.token(r);
            const SoftmaxState state{&largest[r], &sum[r], weighted.row(r).data(), value_dim};
            state.add_sink(queries.rules[static_cast<std::size_t>(r / block.tokens)].sink_logit(), value_dim);
            state.normalise(value_dim);
            if (!queries.finite[static_cast<std::size_t>(r)]) {
                constexpr float nan = std::numeric_limits<float>::quiet_NaN();
                weighted.row(r).setConstant(nan);
                sum[r] = largest[r] = nan;
            }
            output_.values.row(token).segment(head * value_dim, value_dim) = weighted.row(r);
            output_.log_sum_exp(token, head) = state.log_sum_exp();
        }
        if (token_weights_)
            block_weights_[static_cast<std::size_t>(item)] = weight_sums(queries, kept, largest, sum);
    }
    /// The weights of a run's tokens, relative to the largest score that a row had seen by then.
    struct RunWeights {
        Reader::Run run;
        Matrix weights;           ///< [row][token of the run]
        Eigen::VectorXf largest;  ///< [row]
    };
    /// [head][token] the weights of a block, normalised and summed.
    Matrix weight_sums(const BlockQueries& queries, std::vector<RunWeights>& kept,
                       const Eigen::VectorXf& largest, const Eigen::VectorXf& sum) const {
        const Index per_head = queries.rows_per_head;
        Matrix sums = Matrix::Zero(queries.block.heads, state_.tokens);
        Eigen::RowVectorXf factors(queries.rows());
        Eigen::Array<bool, Eigen::Dynamic, 1> counts(queries.rows());
        for (Index r = 0; r < queries.rows(); ++r)
            counts[r] = queries.plain.row(r).allFinite() && sum[r] > 0.0f;
        for (RunWeights& of : kept) {
            for (Index r = 0; r < queries.rows(); ++r) {
                const bool seen = counts[r] && of.largest[r] != nothing_seen;
                factors[r] = seen ? std::exp(of.largest[r] - largest[r]) / sum[r] : 0.0f;
                if (!counts[r]) of.weights.row(r).setZero();
            }
            for (Index h = 0; h < queries.block.heads; ++h)
                sums.row(h).segment(of.run.first, of.run.count).noalias() =
                    factors.segment(h * per_head, per_head) * of.weights.middleRows(h * per_head, per_head);
        }
        return sums;
    }
    /// Turns a row of scores into weights, and scales down what is there where a larger score has come.
    template <class Row, class Weighted>
    static void add_run(Row scores, float& largest, float& sum, Weighted weighted) {
        const float top = std::max(largest, scores.maxCoeff());
        if (top == nothing_seen) {
            scores.setZero();
            return;
        }
        const float rescale = std::exp(largest - top);
        scores = (scores.array() - top).exp().matrix();
        sum = sum * rescale + scores.sum();
        weighted *= rescale;
        largest = top;
    }

    const CacheShape& cache_;
    const CacheState& state_;
    const Matrix& queries_;
    const AttentionParameters& parameters_;
    Matrix* token_weights_;
    TileSequence sequence_;
    PrefillOutput output_;
    std::vector<Matrix> block_weights_;  ///< [block][head of it][token], where wanted
    std::vector<QueryBlock> blocks_;
    std::vector<Reader> readers_;  ///< [worker]
    FirstFailure failure_;
};

KVPLANE_FUNCTION std::vector<std::vector<Index>> selected_keys(const CacheShape& cache,
                                                               const CacheState& state, const Matrix& given,
                                                               const AttentionParameters& parameters) {
    const BlockQueries queries(cache, state, given, parameters,
                               {0, cache.configuration.kv_heads, 0, given.rows()});
    Reader reader(cache, state);
    RunScores run_scores(cache, state);
    const KeySelection selection = select_keys(state, reader, run_scores, queries, parameters);
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

KVPLANE_FUNCTION PrefillOutput prefill(const CacheShape& cache, const CacheState& state,
                                       const Matrix& queries, const AttentionParameters& parameters,
                                       Matrix* token_weights, Executor& executor) {
    return Prefill(cache, state, queries, parameters, token_weights, executor).run(executor);
}

}  // namespace kvplane::detail
