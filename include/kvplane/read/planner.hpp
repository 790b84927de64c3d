// kvplane/read/planner.hpp: the interface of read policies: which planes of which tile are read.
//
// The pass over tiles (cache/decode.hpp) asks a planner before the scores of every tile and row block, tells
// it what came out, and asks again for values. Planners know nothing of the pass. Reading everything needs
// none.
//
//   begin                          all memory is taken here
//   samples, sample, sampled       queries as some tiles see them, before the first pass (coarse_pass.hpp)
//   keys, scored                   for every tile and row block, in any order and thread
//   refine                         all scores are in: whether keys are read a second time
//   choose_values, values          then values, for every tile and row block
//   certify                        what the report says beyond bits
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "kvplane/attention/executor.hpp"
#include "kvplane/attention/plane_groups.hpp"
#include "kvplane/attention/read_policy.hpp"
#include "kvplane/attention/scratch.hpp"
#include "kvplane/attention/softmax.hpp"
#include "kvplane/storage/tile_sequence.hpp"

namespace kvplane::detail {

/// Consecutive query rows of one key head that are taken together.
struct RowBlock {
    Index head;
    Index first, rows;
    Index index;  ///< among all row blocks
};

/// Shapes of one attention over tiles, and the arithmetic of their indices. A query row is (head, query
/// token); the rows of the query heads that share a key head follow each other.
struct DecodeShape {
    Index query_tokens = 0;
    Index heads = 0;          ///< of keys
    Index rows_per_head = 0;  ///< query heads a key head, times query_tokens
    Index subspaces = 0;
    Index tiles = 0;

    /// Tiles that are one item of work, with a softmax state of their own.
    static constexpr Index chunk_tiles = 16;

    Index rows() const noexcept { return heads * rows_per_head; }
    Index chunks() const noexcept { return (tiles + chunk_tiles - 1) / chunk_tiles; }
    Index blocks_per_head() const noexcept { return (rows_per_head + row_block_rows - 1) / row_block_rows; }
    Index row_blocks() const noexcept { return heads * blocks_per_head(); }
    RowBlock row_block(Index index) const noexcept {
        const Index head = index / blocks_per_head(),
                    first = head * rows_per_head + index % blocks_per_head() * row_block_rows;
        return {head, first, std::min(row_block_rows, (head + 1) * rows_per_head - first), index};
    }
    /// Where item i of `count` of a row stands: head by head, so that workers, which have different heads or
    /// chunks, do not write into one cache line.
    Index place(Index row, Index i, Index count) const noexcept {
        return row + i * rows_per_head + row / rows_per_head * rows_per_head * (count - 1);
    }
};

/// The softmax weights of all tiles, where values are read after all scores. The pass fills them.
class TileWeights {
  public:
    /// Throws std::bad_alloc.
    void begin(const DecodeShape& shape) {
        shape_ = shape;
        const auto rows = static_cast<std::size_t>(shape.rows()),
                   tiles = static_cast<std::size_t>(shape.tiles);
        weights_.resize(tiles * rows * static_cast<std::size_t>(tile_tokens));
        tile_max_.resize(tiles * rows);
        largest_.resize(rows);
        inverse_sums_.resize(rows);
    }
    float* weights(Index tile, Index row) noexcept {
        return weights_.data() + (tile * shape_.rows() + row) * tile_tokens;
    }
    const float* weights(Index tile, Index row) const noexcept {
        return weights_.data() + (tile * shape_.rows() + row) * tile_tokens;
    }
    /// The largest score of a tile for a row and, behind it, for the next rows of its head.
    float* tile_max(Index tile, Index row) noexcept {
        return tile_max_.data() + shape_.place(row, tile, shape_.tiles);
    }
    const float* tile_max(Index tile, Index row) const noexcept {
        return tile_max_.data() + shape_.place(row, tile, shape_.tiles);
    }
    float sum(Index tile, Index row) const noexcept {
        return Eigen::Map<const Eigen::ArrayXf>(weights(tile, row), tile_tokens).sum();
    }
    /// The softmax of a row over the whole sequence: its largest score, and 1 / sum of its weights.
    void set_row(Index row, float largest, float inverse_sum) noexcept {
        largest_[static_cast<std::size_t>(row)] = largest;
        inverse_sums_[static_cast<std::size_t>(row)] = inverse_sum;
    }
    float largest(Index row) const noexcept { return largest_[static_cast<std::size_t>(row)]; }
    /// Those of a row and the rows after it.
    const float* largest_scores(Index row) const noexcept { return largest_.data() + row; }
    const float* inverse_sums(Index row) const noexcept { return inverse_sums_.data() + row; }
    /// What a row's weights of a tile are to be multiplied by to be relative to `largest`.
    float rescale(Index tile, Index row, float largest) const noexcept {
        const float own = *tile_max(tile, row);
        return own == largest ? 1.0f : own == nothing_seen ? 0.0f : std::exp(own - largest);
    }

  private:
    DecodeShape shape_;
    std::vector<float> weights_;       ///< [tile][row][token] exp(score - tile_max)
    std::vector<float> tile_max_;      ///< [head][tile][row of the head]
    std::vector<float> largest_;       ///< [row]
    std::vector<float> inverse_sums_;  ///< [row]; 0 for rows that count for nothing
};

/// Bits of codes that were read, and elements that these belong to.
struct ReadCount {
    Index key_bits = 0, keys = 0, value_bits = 0, values = 0;

    ReadCount& operator+=(const ReadCount& other) noexcept {
        key_bits += other.key_bits;
        keys += other.keys;
        value_bits += other.value_bits;
        values += other.values;
        return *this;
    }
};

/// What a planner plans for. What it points to lives until the attention ends.
struct PlanContext {
    DecodeShape shape;
    const TileSequence* tiles;
    ReadPolicy policy;
    /// q.k is at most so many times what softmax scores are: the scale where queries are not yet scaled.
    /// [query head]
    std::span<const double> score_scales;
    const TileWeights* weights;
    Executor* executor;
    Isa isa;
};

/// What one call of the pass is about.
struct PlanPlace {
    Index tile;
    Index next;  ///< the tile that this worker probably reads afterwards
    RowBlock block;
    Index worker;
};

/// Room for the planes of a tile of keys, for every worker.
class KeyPlanes {
  public:
    /// Throws std::bad_alloc.
    void begin(const PlanContext& context) {
        groups_ = tile_tokens;
        const PageLayout& layout = *context.tiles->layout;
        for (Index s = 0; s < layout.subspaces(); ++s)
            groups_ = std::max(groups_, plane_groups(layout.key_format(s)));
        planes_.resize(static_cast<std::size_t>(context.executor->workers() * groups_));
    }
    std::uint8_t* of(Index worker) noexcept { return planes_.data() + worker * groups_; }

  private:
    Index groups_ = 0;
    std::vector<std::uint8_t> planes_;  ///< [worker][group]
};

/// One object a policy, kept in the workspace. Every call but begin() is noexcept and allocates nothing.
class ReadPlanner {
  public:
    virtual ~ReadPlanner() = default;

    /// Takes all memory. Throws std::bad_alloc.
    virtual void begin(const PlanContext& context) = 0;

    /// The tiles whose queries it wants to see before the first pass.
    virtual std::span<const Index> samples() const noexcept { return {}; }
    /// queries  [row][channels or latents], as the tile's codes meet them
    virtual void sample(const PlanPlace&, RowView<const float>, AttentionScratch&) noexcept {}
    virtual void sampled() noexcept {}

    /// Before a tile's scores: sets the planes of `read`. Returns the bits that are read beyond those of an
    /// earlier pass.
    virtual Index keys(const PlanPlace& place, RowView<const float> queries, AttentionScratch& scratch,
                       TileRead& read) noexcept = 0;
    /// Whether values are read after all scores, and so to depths that depend on all weights.
    virtual bool values_wait() const noexcept { return true; }
    /// After a tile's scores have become weights, where values wait.
    virtual void scored(const PlanPlace&, AttentionScratch&) noexcept {}

    /// The values of tokens outside tiles: [token][channels].
    virtual void unpacked(Index /*head*/, RowView<const float>, Index /*channels*/) noexcept {}

    /// All scores are in. Whether keys are read a second time; then of the tiles for which refines() is true.
    virtual bool refine() noexcept { return false; }
    virtual bool refines(Index /*tile*/, Index /*subspace*/) const noexcept { return true; }

    /// All scores are final, `so_far` counts what was read of keys.
    virtual void choose_values(const ReadCount& /*so_far*/) noexcept {}
    /// The planes [groups] of a tile's values.
    virtual void values(const PlanPlace& place, std::uint8_t* planes) noexcept = 0;
    /// Whether the factors of values are wide.
    virtual bool wide_values() const noexcept { return true; }

    virtual void certify(ReadReport&) const noexcept {}
};

/// Where little more than 4 bits are read, their own error is larger than that of narrow factors.
constexpr bool wants_wide_factors(double bits) noexcept {
    return bits > 5.0;
}

}  // namespace kvplane::detail
