// kvplane/cache/queries.hpp: the queries of one attention, in every frame in which stored keys may be.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "kvplane/attention/float_rows.hpp"
#include "kvplane/attention/parameters.hpp"
#include "kvplane/attention/score_rule.hpp"
#include "kvplane/attention/scratch.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/read/planner.hpp"
#include "kvplane/simd/line_vector.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane::detail {

/// Tiles whose queries are turned and projected together, so that a basis is read once for all.
inline constexpr Index projected_tiles = 4;

/// Which query rows have scores that are floats, whatever the frame and the order of their sums. Others,
/// and rows that are not finite, get NaN: an infinite score would look like a token that is not seen.
class ScoreRange {
  public:
    ScoreRange(const CacheShape& cache, const CacheState& state) noexcept
        : channels_(static_cast<double>(cache.configuration.key_head_dim)),
          // The directions of latents are not at right angles, so that a latent may be larger than its key. Codes
          // of grids by token, up to 2^8, meet the query before their steps make them keys.
          largest_key_(
              (cache.recipe().latents ? 0x1p20 : 1.0) *
              std::max(cache.configuration.keys_by_token() ? 0x1p8 : 1.0, state.extremes().largest.keys)) {}

    /// squares: the sum of the squares of a row's elements.
    bool holds(double squares, double scale) const noexcept {
        // |q.k| <= |q| |k|. A quarter of the range is left to what grids and rounded factors add.
        return std::sqrt(squares * channels_) * largest_key_ * std::max(1.0, scale) <= 0x1p126;
    }

  private:
    double channels_, largest_key_;
};

/// A query token of a pass.
struct QueryToken {
    Index row;       ///< among the given queries
    Index position;  ///< in its sequence
};

/// The query rows of a DecodeShape, already scaled where scores are no more than scaled products.
class QueryRows {
  public:
    /// Throws std::bad_alloc.
    void begin(const DecodeShape& shape, const CacheShape& cache, const CacheState& state,
               std::span<const QueryToken> tokens) {
        tokens_.assign(tokens.begin(), tokens.end());
        shape_ = shape;
        block_positions_.clear();
        block_positions_.reserve(static_cast<std::size_t>(shape.row_blocks()));
        for (Index b = 0; b < shape.row_blocks(); ++b)
            block_positions_.push_back(positions_of(shape.row_block(b)));
        dim_ = cache.configuration.key_head_dim;
        const auto rows = static_cast<std::size_t>(shape.rows());
        plain_.resize(rows * static_cast<std::size_t>(dim_));
        find_frames(cache, state);
        framed_.resize(frames_.size() * plain_.size());
        partner_.resize(state.latent ? plain_.size() : 0);
        finite_.resize(rows);
        const auto heads = static_cast<std::size_t>(cache.configuration.query_heads);
        rules_.reserve(heads);
        scales_.resize(heads);
    }

    /// Before rows are taken.
    void take_rules(const AnyRows& queries, const AttentionParameters& parameters) noexcept {
        rules_.clear();
        for (Index head = 0; head < queries.heads; ++head) {
            const ScoreRule<float>& rule = rules_.emplace_back(parameters, head, queries.tokens, dim_);
            scales_[static_cast<std::size_t>(head)] = rule.plain() ? 1.0 : static_cast<double>(rule.scale());
        }
    }
    /// Takes the rows [first, end), which several threads may share out.
    void take(const AnyRows& queries, const CacheShape& cache, const CacheState& state, Index first,
              Index end) noexcept {
        const ScoreRange range(cache, state);
        queries.visit([&](const auto& rows) {
            for (Index r = first; r < end; ++r)
                take_row(rows, r / shape_.query_tokens, place(r).token, r, range);
        });
        for (std::size_t i = 0; i < frames_.size(); ++i) fill_frame(i, cache, first, end);
        if (partner_.empty()) return;
        for (Index r = first; r < end; ++r) {
            const float* const row = plain_.data() + r * dim_;
            float* const partner = partner_.data() + r * dim_;
            for (const RotaryEmbedding::Pair& pair : state.latent->embedding().pairs()) {
                const Index second = pair.second >= 0 ? pair.second : pair.first;
                partner[pair.first] = row[second];
                partner[second] = row[pair.first];
            }
        }
    }

    std::span<const QueryToken> tokens() const noexcept { return tokens_; }
    /// A row's place among the given queries.
    struct Place {
        Index token, head;
    };
    Place place(Index row) const noexcept {
        return {tokens_[static_cast<std::size_t>(row % shape_.query_tokens)].row, row / shape_.query_tokens};
    }
    const float* plain(Index row) const noexcept { return plain_.data() + row * dim_; }
    /// With the channels of each RoPE pair exchanged; for latents only.
    const float* partner(Index row) const noexcept { return partner_.data() + row * dim_; }
    /// As tokens outside tiles are stored.
    RowView<const float> outside_tiles(const RowBlock& block) const noexcept { return framed(0, block); }
    /// As keys in channels of a tile are stored.
    RowView<const float> in_frame(const StoredFrame& frame, const RowBlock& block) const noexcept {
        std::size_t i = 0;
        while (frames_[i] != frame) ++i;
        return framed(i, block);
    }
    /// The learned sink of a row's head; -infinity: none.
    float sink_logit(Index row) const noexcept {
        return rules_[static_cast<std::size_t>(row / shape_.query_tokens)].sink_logit();
    }
    /// Whether some row of a block sees one of `count` tokens from position `first` on.
    bool sees_some(const AttentionParameters& parameters, const RowBlock& block, Index first,
                   Index count) const noexcept {
        const auto [least, most] = block_positions_[static_cast<std::size_t>(block.index)];
        return detail::sees_some(parameters, least, most, first, first + count - 1);
    }
    bool finite(Index row) const noexcept { return finite_[static_cast<std::size_t>(row)] != 0; }
    std::span<const double> score_scales() const noexcept { return scales_; }

    /// From q.k (scaled already where that is all) to what the softmax takes, for `count` tokens from
    /// position `first` on. Hidden tokens, and those up to `padded`, get -infinity.
    ///   scores  [row][128]
    void apply(const RowBlock& block, Index first, Index count, Index padded, const TileSequence& sequence,
               float* scores) const noexcept {
        const bool hides_some = sequence.hides_some(first, count);
        Index head = block.first / shape_.query_tokens, token = block.first % shape_.query_tokens;
        for (Index r = 0; r < block.rows; ++r, scores += tile_tokens) {
            const auto [query, position] = tokens_[static_cast<std::size_t>(token)];
            const auto& rule = rules_[static_cast<std::size_t>(head)];
            if (++token == shape_.query_tokens) {
                token = 0;
                ++head;
            }
            std::fill(scores + count, scores + padded, nothing_seen);
            if (rule.plain() && rule.sees_until(position, first + count - 1) && !hides_some) continue;
            for (Index t = 0; t < count; ++t) {
                const Index key = first + t;
                if ((hides_some && sequence.hides(key, 1)) || !rule.sees(position, key))
                    scores[t] = nothing_seen;
                else if (!rule.plain())
                    scores[t] = rule(scores[t], query, position, key);
            }
        }
    }

  private:
    struct Positions {
        Index least, most;
    };
    Positions positions_of(const RowBlock& block) const noexcept {
        Positions all{std::numeric_limits<Index>::max(), 0};
        for (Index r = block.first; r < block.first + block.rows; ++r) {
            const Index position = tokens_[static_cast<std::size_t>(r % shape_.query_tokens)].position;
            all = {std::min(all.least, position), std::max(all.most, position)};
        }
        return all;
    }
    /// Lists the frames in which keys in channels are stored; that of tokens outside tiles comes first.
    void find_frames(const CacheShape& cache, const CacheState& state) {
        frames_.assign(1, cache.frame_outside_tiles());
        if (state.latent) return;  // their queries are turned tile by tile
        const auto add = [&](const StoredFrame& frame) {
            if (std::find(frames_.begin(), frames_.end(), frame) == frames_.end()) frames_.push_back(frame);
        };
        for (const TilePlace& tile : state.tiles) {
            const Index turn = cache.query_turn(state, tile);
            // Both, so that no page is touched before it is read.
            for (const bool rotated : {false, true})
                if (tile.layout->rotates_by_tile() || rotated == cache.rotates(TileSide::keys))
                    add({turn, rotated});
        }
    }
    RowView<const float> framed(std::size_t frame, const RowBlock& block) const noexcept {
        return {framed_.data() + frame * plain_.size() + block.first * dim_, dim_, block.rows};
    }
    void fill_frame(std::size_t i, const CacheShape& cache, Index first, Index end) noexcept {
        float* const row = framed_.data() + i * plain_.size();
        std::copy(plain_.data() + first * dim_, plain_.data() + end * dim_, row + first * dim_);
        if (frames_[i].turn != 0)
            for (const RotaryEmbedding::Pair& pair : cache.rope->pairs()) {
                if (pair.frequency == 0.0) continue;
                const double angle = static_cast<double>(frames_[i].turn) * pair.frequency;
                const auto cosine = static_cast<float>(std::cos(angle)),
                           sine = static_cast<float>(std::sin(angle));
                for (Index r = first; r < end; ++r) {
                    float &x = row[r * dim_ + pair.first], &y = row[r * dim_ + pair.second];
                    const float turned = x * cosine - y * sine;
                    y = x * sine + y * cosine;
                    x = turned;
                }
            }
        if (!frames_[i].rotated) return;
        for (Index r = first; r < end; ++r) cache.key_rotation.rotate(row + r * dim_);
    }
    template <class Scalar>
    void take_row(const HeadRows<Scalar>& rows, Index head, Index token, Index r,
                  const ScoreRange& range) noexcept {
        const ScoreRule<float>& rule = rules_[static_cast<std::size_t>(head)];
        const float scale = rule.plain() ? rule.scale() : 1.0f;
        float* const row = plain_.data() + r * dim_;
        std::array<double, 4> sums{};  // which do not wait for each other
        for (Index c = 0; c < dim_; ++c) {
            const auto given = static_cast<float>(*rows.at(head, token, c));
            row[c] = scale * given;
            sums[static_cast<std::size_t>(c % 4)] += static_cast<double>(given) * static_cast<double>(given);
        }
        const double squares = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        const bool finite = range.holds(squares, static_cast<double>(rule.scale()));
        // A row that is not finite gets NaN in the end, and must not reach the plans that it shares with
        // others.
        finite_[static_cast<std::size_t>(r)] = finite;
        if (!finite) std::fill_n(row, dim_, 0.0f);
    }

    DecodeShape shape_;
    std::vector<QueryToken> tokens_;          ///< [query token]
    std::vector<Positions> block_positions_;  ///< [row block]
    Index dim_ = 0;
    LineVector<float> plain_, partner_;  ///< [row][key dim]
    std::vector<StoredFrame> frames_;
    LineVector<float> framed_;             ///< [frame][row][key dim]
    std::vector<std::uint8_t> finite_;     ///< [row]
    std::vector<ScoreRule<float>> rules_;  ///< [query head]
    std::vector<double> scales_;           ///< [query head], 1 where queries are scaled already
};

/// One worker's queries on their way into the latents of some tiles.
class QueryProjection {
  public:
    /// For subspaces of up to `channels` channels. Throws std::bad_alloc.
    void reserve(Index channels) {
        const Index depth = padded_depth(std::max(channels, tile_tokens));
        if (depth <= depth_) return;
        const auto size = static_cast<std::size_t>(projected_tiles * row_block_rows * depth);
        turned_.resize(size);
        projected_.resize(size);
        turns_.resize(static_cast<std::size_t>(2 * (projected_tiles + 1) * depth));
        depth_ = depth;
    }

    /// Makes the turns of queries to where the keys of `count` tiles from tile `first` on stand: exactly for the
    /// first tile, and for others from the tile before where that is 128 tokens away. go_on: whether the tile
    /// before `first` was the last of the call before.
    void turn_to(Isa isa, const LatentKeys& keys, const TileSequence& tiles, Index first, Index count,
                 bool go_on) noexcept {
        const Index channels = keys.head_dim();
        // In the tile's own frame queries are turned back; in that of the input, forward by what tokens moved.
        const bool back = keys.frame() == KeyFrame::tile;
        const Index step = back ? -tile_tokens : 0;
        const auto positions = [&](Index t) { return back ? -tiles[t].origin() : tiles[t].shift; };
        if (!go_on) exact_turn(keys, step, turn(projected_tiles));
        for (Index i = 0; i < count; ++i) {
            float* const to = turn(i);
            if ((i == 0 && !go_on) || positions(first + i) != positions(first + i - 1) + step) {
                exact_turn(keys, positions(first + i), to);
                continue;
            }
            const float* const from = turn(i > 0 ? i - 1 : projected_tiles - 1);
            const float* const step = turn(projected_tiles);
            add_turn(isa, from, step, depth_, channels, to);
        }
    }

    /// Projects the queries of a row block as the latents of `count` tiles see them.
    ///   offsets  [tile][row] what the mean adds to their scores, the result
    void project(Isa isa, const LatentKeys& keys, const QueryRows& queries, const RowBlock& block,
                 Index count, float* offsets) noexcept {
        const LatentKeys::Subspace& subspace = keys.subspace(keys.subspace_of_head(block.head));
        const Index at = keys.head_offset(block.head), kept = subspace.kept(), dim = keys.head_dim();
        for (Index i = 0; i < count; ++i)
            for (Index r = 0; r < block.rows; ++r) {
                const float* const turn = this->turn(i);
                offsets[i * block.rows + r] =
                    turn_query(isa, queries.plain(block.first + r), queries.partner(block.first + r), turn,
                               turn + depth_, subspace.mean.data() + at, dim,
                               turned_.data() + (i * block.rows + r) * depth_);
            }
        const Index rows = count * block.rows;
        const RowView<float> turned{turned_.data(), depth_, rows}, to{projected_.data(), depth_, rows};
        if (keys.settings().directions == LatentDirections::eigenvectors) {
            detail::project(isa, turned,
                            {.columns = subspace.from_latents.data() + at * kept,
                             .channels = dim,
                             .kept = kept,
                             .scale = subspace.from_latents_scale.data()},
                            to);
            return;
        }
        for (Index r = 0; r < rows; ++r)
            for (Index j = 0; j < kept; ++j) {
                const Index c = static_cast<Index>(subspace.channels[static_cast<std::size_t>(j)]) - at;
                to[r][j] = c >= 0 && c < dim ? turned[r][c] * subspace.from_latents_scale[j] : 0.0f;
            }
    }
    /// [row][latents] for the i-th tile of the last project().
    RowView<const float> projected(Index i, const RowBlock& block) const noexcept {
        return {projected_.data() + i * block.rows * depth_, depth_, block.rows};
    }

  private:
    /// [2][depth] cosines by channel, then sines, signed as a pair's channels need them; the turn from one
    /// tile to the next stands at projected_tiles.
    float* turn(Index tile) noexcept { return turns_.data() + 2 * tile * depth_; }
    void exact_turn(const LatentKeys& keys, Index positions, float* cosine) noexcept {
        for (const RotaryEmbedding::Pair& pair : keys.embedding().pairs()) {
            const double angle = static_cast<double>(positions) * pair.frequency;
            const auto sine = static_cast<float>(std::sin(angle));
            cosine[pair.first] = static_cast<float>(std::cos(angle));
            cosine[depth_ + pair.first] = -sine;
            if (pair.second < 0) continue;
            cosine[pair.second] = cosine[pair.first];
            cosine[depth_ + pair.second] = sine;
        }
    }

    Index depth_ = 0;
    LineVector<float> turned_, projected_;  ///< [tile][row][depth]
    LineVector<float> turns_;               ///< [tile, and the step][2][depth]
};

}  // namespace kvplane::detail
