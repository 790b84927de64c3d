// kvplane/read/value_importance.hpp: how much the tokens of every tile of values count for the output.
//
// A token's part in the error of an output is its softmax weight times the step of its grid. Weights are
// known when all scores are, so importance is noted tile by tile, relative to the tile's own largest score,
// and combined afterwards.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/read/plan.hpp"
#include "kvplane/read/planner.hpp"

namespace kvplane::detail {

/// squares[t] = the sum over channels of token t's squared step. With `reach` it is the root of that, and the
/// largest norm that the grids of any token can hold is returned. largest: the largest magnitude of all
/// values, which fp16 goes by.
float value_steps(Isa isa, const TileFormat& format, const std::byte* tile, float largest, bool reach,
                  float* squares) noexcept;

/// What the tokens of a plane group weigh: the sum of weight^2 steps, of weight steps (as value_steps() gives
/// them), or the largest weight.
enum class GroupWeight { squares, reach, largest };
///   weights  [row][128]
///   groups   [row][128 / size], the result
void group_weights(Isa isa, const float* weights, Index rows, const float* steps, GroupWeight kind,
                   Index size, float* groups) noexcept;

/// What every plane group of values counts, for every row block.
class ValueImportance {
  public:
    /// Throws std::bad_alloc.
    void begin(const PlanContext& context, GroupWeight weight) {
        context_ = context;
        weight_ = weight;
        const DecodeShape& shape = context.shape;
        split_ = context.tiles->layout->values.segments()[0].split;
        groups_ = tile_tokens / plane_group_size(split_);
        const auto tiles = static_cast<std::size_t>(shape.tiles), groups = static_cast<std::size_t>(groups_);
        group_weights_.resize(tiles * static_cast<std::size_t>(shape.rows()) * groups);
        importance_.resize(tiles * static_cast<std::size_t>(shape.row_blocks()) * groups);
        largest_norms_.assign(static_cast<std::size_t>(shape.heads * (shape.chunks() + 1)), 0.0f);
        for (int p = 0; p < split_.count; ++p)
            worth_[static_cast<std::size_t>(p)] =
                weight == GroupWeight::reach ? plane_reach(split_, p) : plane_worth(split_, p);
    }

    /// Plane groups of a tile of values.
    Index groups() const noexcept { return groups_; }
    const PlaneSplit& split() const noexcept { return split_; }
    /// What each plane of values gains, for a bit and an importance of 1.
    const std::array<float, PlaneSplit::max_planes>& worth() const noexcept { return worth_; }

    /// Notes the weights of a tile, once its scores are weights.
    void note(const PlanPlace& place, AttentionScratch& scratch) noexcept {
        const TileSequence& tiles = *context_.tiles;
        float* const steps = scratch.scores();
        const RowBlock& block = place.block;
        if (weight_ != GroupWeight::largest) {
            const bool reach = weight_ == GroupWeight::reach;
            const float norm =
                value_steps(context_.isa, tiles.layout->values, tiles.values(place.tile, block.head),
                            tiles.largest_value, reach, steps);
            if (reach) note_norm(place.tile / DecodeShape::chunk_tiles, block.head, norm);
        }
        group_weights(context_.isa, context_.weights->weights(place.tile, block.first), block.rows, steps,
                      weight_, plane_group_size(split_),
                      group_weights_.data() + weights_at(place.tile, block.first));
    }
    /// [group] what note() found for a row and, behind it, for the next rows of its head.
    const float* weights_of(Index tile, Index row) const noexcept {
        return group_weights_.data() + weights_at(tile, row);
    }

    /// Raises the largest norm of a head's values, as seen in one chunk (or in tokens outside tiles: the
    /// chunk after the last).
    void note_norm(Index chunk, Index head, float norm) noexcept {
        float& most = largest_norms_[static_cast<std::size_t>(head * (context_.shape.chunks() + 1) + chunk)];
        most = std::max(most, norm);
    }
    double largest_norm(Index head) const noexcept {
        const Index chunks = context_.shape.chunks() + 1;
        const float* const of_head = largest_norms_.data() + head * chunks;
        return static_cast<double>(*std::max_element(of_head, of_head + chunks));
    }

    /// Combines what was noted for one row block: the sum of squares over its rows, or with `reach` the
    /// largest. Calls body(tile, importance [group]) for every tile that is seen, which may round what it is
    /// given.
    template <class Body>
    void combine(const RowBlock& block, const Body& body) noexcept {
        const TileWeights& weights = *context_.weights;
        using Rows = Eigen::Map<const Eigen::ArrayXf>;
        const Rows inverse_sums(weights.inverse_sums(block.first), block.rows),
            largest(weights.largest_scores(block.first), block.rows);
        Eigen::Array<float, Eigen::Dynamic, 1, 0, row_block_rows, 1> by(block.rows);
        for (Index t = 0; t < context_.shape.tiles; ++t) {
            if (context_.tiles->hidden(t)) continue;
            const Rows own(weights.tile_max(t, block.first), block.rows);
            by = (own > nothing_seen).select(inverse_sums * (own - largest).exp(), 0.0f);
            float* const importance = importance_of(t, block.index);
            std::fill_n(importance, groups_, 0.0f);
            for (Index r = 0; r < block.rows; ++r) {
                const float scale = by[r], square = scale * scale;
                const float* const of_row = weights_of(t, block.first + r);
                if (weight_ == GroupWeight::reach)
                    for (Index g = 0; g < groups_; ++g)
                        importance[g] = std::max(importance[g], scale * of_row[g]);
                else
                    for (Index g = 0; g < groups_; ++g) importance[g] += square * of_row[g];
            }
            body(t, importance);
        }
    }
    const float* importance(Index tile, Index block) const noexcept {
        return importance_.data() + (block * context_.shape.tiles + tile) * groups_;
    }

    /// The planes [group] that gain at least `least`. Gains fall from plane to plane.
    void choose(Index tile, Index block, float least, std::uint8_t* planes) const noexcept {
        const float* const importance = this->importance(tile, block);
        std::fill_n(planes, groups_, std::uint8_t{0});
        for (int p = 0; p < split_.count; ++p)
            for (Index g = 0; g < groups_; ++g)
                planes[g] = static_cast<std::uint8_t>(
                    planes[g] + (plane_gain(importance[g], worth_[static_cast<std::size_t>(p)]) >= least));
    }

  private:
    Index weights_at(Index tile, Index row) const noexcept {
        return context_.shape.place(row, tile, context_.shape.tiles) * groups_;
    }
    float* importance_of(Index tile, Index block) noexcept {
        return importance_.data() + (block * context_.shape.tiles + tile) * groups_;
    }

    PlanContext context_{};
    GroupWeight weight_ = GroupWeight::squares;
    PlaneSplit split_;
    Index groups_ = 0;
    std::array<float, PlaneSplit::max_planes> worth_{};
    std::vector<float> group_weights_;  ///< [head][tile][row of the head][group]
    std::vector<float> importance_;     ///< [row block][tile][group]
    std::vector<float> largest_norms_;  ///< [head][chunk, and tokens outside tiles]
};

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/read/impl/value_importance.hpp"
#endif
