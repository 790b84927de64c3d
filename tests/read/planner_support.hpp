// tests/read/planner_support.hpp: planners driven by hand, over tiles of which nothing is written but the
// grids.
//
// What a planner decides follows from steps, queries and softmax weights. Powers of two make all of it exact.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "kvplane/read/plan.hpp"
#include "kvplane/read/planner.hpp"

namespace kvplane_test {

using namespace kvplane;
using namespace kvplane::detail;

/// Planes by group; none at all: everything is read.
using Planes = std::vector<int>;
inline const Planes all_planes{};

/// A format of keys with one grid a channel for 128 tokens, or for `group` of them.
inline TileFormat key_format(Index channels, int bits, Index group = 128) {
    return {TileSide::keys, channels, bits, {Granularity::per_channel, group, Scheme::min_max}};
}
/// A format of values with one grid a token.
inline TileFormat value_format(Index channels, int bits) {
    return {TileSide::values, channels, bits, {Granularity::per_token, whole_head, Scheme::min_max}};
}

struct DriveShape {
    Index heads = 1, rows_per_head = 1, query_tokens = 1, tiles = 1;
    bool together = false;  ///< whether all heads share one tile of keys
};

/// Tiles, weights and an executor, and the calls that the pass over tiles would make.
class Drive {
  public:
    Drive(std::vector<TileFormat> keys, const TileFormat& values, const DriveShape& of)
        : layout_(page_layout(std::move(keys), of.together ? 1 : of.heads, values, of.heads)),
          pages_(static_cast<std::size_t>(of.tiles),
                 std::vector<std::byte>(static_cast<std::size_t>(layout_.bytes))),
          shape_{.query_tokens = of.query_tokens,
                 .heads = of.heads,
                 .rows_per_head = of.rows_per_head,
                 .subspaces = layout_.subspaces(),
                 .tiles = of.tiles},
          scales_(static_cast<std::size_t>(of.heads * of.rows_per_head / of.query_tokens), 1.0),
          scratch_(512) {
        for (Index t = 0; t < of.tiles; ++t)
            places_.push_back({pages_[static_cast<std::size_t>(t)].data(), &layout_, t * tile_tokens, tile_tokens});
        sequence_ = {.places = places_.data(), .tiles = of.tiles, .layout = &layout_};
        weights_.begin(shape_);
        for (Index row = 0; row < shape_.rows(); ++row) {
            weights_.set_row(row, 0.0f, 1.0f);
            for (Index t = 0; t < of.tiles; ++t) {
                *weights_.tile_max(t, row) = 0.0f;
                set_weights(t, row, [](Index) { return 0.0f; });
            }
        }
    }
    Drive(const Drive&) = delete;
    Drive& operator=(const Drive&) = delete;

    /// step(channel) for all token groups; of fp16 keys that is the power of two of the largest magnitude.
    template <class Step>
    void set_key_steps(Index tile, Index subspace, const Step& step) {
        std::byte* const at = page(tile) + layout_.key_at[static_cast<std::size_t>(subspace)];
        for (const TileFormat::Placed& s : layout_.key_format(subspace).segments())
            for (Index c = 0; c < s.channels; ++c) {
                const auto width = static_cast<float>(step(s.first_channel + c));
                if (s.bits == 16) at[s.exponent_at + c] = static_cast<std::byte>(Eigen::half(width).x >> 10);
                for (Index g = c; g < s.grids; g += s.channels)
                    reinterpret_cast<Eigen::half*>(at + s.step_at)[g] = Eigen::half(width);
            }
    }
    /// step(token) for all runs of channels.
    template <class Step>
    void set_value_steps(Index tile, Index head, const Step& step) {
        std::byte* const at = page(tile) + layout_.value_at[static_cast<std::size_t>(head)];
        for (const TileFormat::Placed& s : layout_.values.segments())
            for (Index g = 0; g < s.grids; ++g)
                reinterpret_cast<Eigen::half*>(at + s.step_at)[g] =
                    Eigen::half(static_cast<float>(step(g % tile_tokens)));
    }
    /// weight(token), relative to the tile's largest score.
    template <class Weight>
    void set_weights(Index tile, Index row, const Weight& weight) {
        for (Index t = 0; t < tile_tokens; ++t)
            weights_.weights(tile, row)[t] = static_cast<float>(weight(t));
    }
    TileWeights& weights() { return weights_; }
    TileSequence& sequence() { return sequence_; }
    const DecodeShape& shape() const { return shape_; }
    AttentionScratch& scratch() { return scratch_; }
    std::vector<double>& score_scales() { return scales_; }
    PlanContext context(const ReadPolicy& policy) {
        return {.shape = shape_,
                .tiles = &sequence_,
                .policy = policy,
                .score_scales = scales_,
                .weights = &weights_,
                .executor = &executor_,
                .isa = current_isa()};
    }

    PlanPlace place(Index tile, Index block = 0, Index next = -1) const {
        return {.tile = tile, .next = next < 0 ? tile : next, .block = shape_.row_block(block), .worker = 0};
    }
    /// What keys() plans: planes and the rest.
    struct Keys {
        Planes planes, next_planes;
        bool wide_factors;
        Index bits;
    };
    Keys keys(ReadPlanner& planner, const PlanPlace& where, const Matrix& queries) {
        const Index subspace = layout_.subspace_of(where.block.head),
                    groups = plane_groups(layout_.key_format(subspace));
        const auto list = [&](const std::uint8_t* planes) {
            return planes ? Planes(planes, planes + groups) : all_planes;
        };
        TileRead read{.tile = sequence_.keys(where.tile, subspace),
                      .next = sequence_.keys(where.next, subspace)};
        const Index bits = planner.keys(where, rows_of(queries, where), scratch_, read);
        EXPECT_EQ(layout_.key_format(subspace).side(), TileSide::keys);
        return {list(read.planes), list(read.planes_of_next()), read.wide_factors, bits};
    }
    Planes key_planes(ReadPlanner& planner, Index tile, const Matrix& queries, Index block = 0) {
        return keys(planner, place(tile, block), queries).planes;
    }
    RowView<const float> rows_of(const Matrix& queries, const PlanPlace& where) const {
        return {queries.data() + where.block.first * queries.cols(), queries.cols(), where.block.rows};
    }
    /// scored() for all tiles and row blocks.
    void score_all(ReadPlanner& planner) {
        for (Index block = 0; block < shape_.row_blocks(); ++block)
            for (Index t = 0; t < shape_.tiles; ++t)
                if (!sequence_.hidden(t)) planner.scored(place(t, block), scratch_);
    }
    /// The planes of values; what values() must not touch is checked.
    Planes value_planes(ReadPlanner& planner, Index tile, Index block = 0) {
        const Index groups = plane_groups(layout_.values);
        std::vector<std::uint8_t> planes(static_cast<std::size_t>(groups) + 1, 77);
        planner.values(place(tile, block), planes.data());
        EXPECT_EQ(planes.back(), 77) << "beyond the groups of the tile";
        return Planes(planes.begin(), planes.end() - 1);
    }
    /// The bits of codes that a read of these planes of keys (values) takes.
    Index value_bits(const Planes& planes) const { return bits(layout_.values, planes); }
    Index key_bits(const Planes& planes, Index subspace = 0) const {
        return bits(layout_.key_format(subspace), planes);
    }

  private:
    std::byte* page(Index tile) { return pages_[static_cast<std::size_t>(tile)].data(); }
    static Index bits(const TileFormat& format, const Planes& planes) {
        const std::vector<std::uint8_t> narrow(planes.begin(), planes.end());
        return bits_read(format, planes.empty() ? nullptr : narrow.data());
    }

    PageLayout layout_;
    std::vector<std::vector<std::byte>> pages_;
    std::vector<TilePlace> places_;
    TileSequence sequence_;
    DecodeShape shape_;
    std::vector<double> scales_;
    TileWeights weights_;
    SerialExecutor executor_;
    AttentionScratch scratch_;
};

/// `some` and then zeros, as many as the 16 groups of 8 tokens of a tile of values need.
inline Planes of_sixteen(Planes some) {
    some.resize(16, 0);
    return some;
}

}  // namespace kvplane_test
