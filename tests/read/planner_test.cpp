// Shapes of one attention and the arithmetic of their indices; the weights that planners look at.
#include "kvplane/read/planner.hpp"

#include <gtest/gtest.h>

#include <set>

#include "read/planner_support.hpp"

namespace {

using namespace kvplane_test;

/// 2 key heads, each with 4 query heads of 12 query tokens, over 37 tiles.
constexpr DecodeShape shape{.query_tokens = 12, .heads = 2, .rows_per_head = 48, .subspaces = 2, .tiles = 37};

TEST(DecodeShape, CountsRowsChunksAndBlocks) {
    EXPECT_EQ(shape.rows(), 96);
    EXPECT_EQ(shape.chunks(), 3);  // 16 + 16 + 5
    EXPECT_EQ(shape.blocks_per_head(), 2);
    EXPECT_EQ(shape.row_blocks(), 4);
    const auto chunks = [](Index tiles) {
        return DecodeShape{.query_tokens = 1, .heads = 1, .rows_per_head = 1, .subspaces = 1, .tiles = tiles}
            .chunks();
    };
    EXPECT_EQ(chunks(0), 0);
    EXPECT_EQ(chunks(1), 1);
    EXPECT_EQ(chunks(16), 1);
    EXPECT_EQ(chunks(17), 2);
    const auto blocks = [](Index rows) {
        return DecodeShape{.query_tokens = 1, .heads = 3, .rows_per_head = rows, .subspaces = 3, .tiles = 1}
            .row_blocks();
    };
    EXPECT_EQ(blocks(1), 3);
    EXPECT_EQ(blocks(32), 3);
    EXPECT_EQ(blocks(33), 6);
}

TEST(DecodeShape, BlocksHaveUpToThirtyTwoRowsOfOneHead) {
    const auto expect = [](Index index, Index head, Index first, Index rows) {
        const RowBlock block = shape.row_block(index);
        EXPECT_EQ(block.head, head);
        EXPECT_EQ(block.first, first);
        EXPECT_EQ(block.rows, rows);
        EXPECT_EQ(block.index, index);
    };
    expect(0, 0, 0, 32);
    expect(1, 0, 32, 16);
    expect(2, 1, 48, 32);
    expect(3, 1, 80, 16);
}

/// [head][item][row of the head]
TEST(DecodeShape, PlacesGoHeadByHead) {
    EXPECT_EQ(shape.place(0, 0, 37), 0);
    EXPECT_EQ(shape.place(47, 0, 37), 47);
    EXPECT_EQ(shape.place(0, 1, 37), 48);
    EXPECT_EQ(shape.place(48, 0, 37), 37 * 48);
    EXPECT_EQ(shape.place(53, 2, 37), 37 * 48 + 2 * 48 + 5);
    std::set<Index> places;
    for (Index row = 0; row < 96; ++row)
        for (Index i = 0; i < 37; ++i) places.insert(shape.place(row, i, 37));
    EXPECT_EQ(places.size(), 96u * 37u) << "each its own";
    EXPECT_EQ(*places.begin(), 0);
    EXPECT_EQ(*places.rbegin(), 96 * 37 - 1);
}

TEST(TileWeights, HoldWhatIsPutIn) {
    const DecodeShape small{.query_tokens = 1, .heads = 2, .rows_per_head = 2, .subspaces = 2, .tiles = 3};
    TileWeights weights;
    weights.begin(small);
    for (Index t = 0; t < 3; ++t)
        for (Index row = 0; row < 4; ++row) {
            for (Index i = 0; i < tile_tokens; ++i)
                weights.weights(t, row)[i] = static_cast<float>(1000 * t + 200 * row + i);
            *weights.tile_max(t, row) = static_cast<float>(10 * t + row);
        }
    for (Index row = 0; row < 4; ++row)
        weights.set_row(row, 5.0f + static_cast<float>(row), 0.5f * static_cast<float>(row));
    const TileWeights& read = weights;
    for (Index t = 0; t < 3; ++t)
        for (Index row = 0; row < 4; ++row) {
            EXPECT_EQ(read.weights(t, row)[127], static_cast<float>(1000 * t + 200 * row + 127));
            EXPECT_EQ(*read.tile_max(t, row), static_cast<float>(10 * t + row));
            // The sum of 128 terms a + i, i = 0..127, whose sum is 8128; all below 2^24, so exact.
            EXPECT_EQ(read.sum(t, row), static_cast<float>(128 * (1000 * t + 200 * row) + 8128));
        }
    // Rows of a head follow each other: [row][128], and [row] of what there is one of.
    EXPECT_EQ(read.weights(1, 3), read.weights(1, 2) + tile_tokens);
    EXPECT_EQ(read.tile_max(2, 3), read.tile_max(2, 2) + 1);
    EXPECT_EQ(read.largest(2), 7.0f);
    EXPECT_EQ(read.largest_scores(2)[1], 8.0f);
    EXPECT_EQ(read.inverse_sums(2)[1], 1.5f);
}

TEST(TileWeights, RescaleToALargerScore) {
    const DecodeShape small{.query_tokens = 1, .heads = 1, .rows_per_head = 2, .subspaces = 1, .tiles = 1};
    TileWeights weights;
    weights.begin(small);
    *weights.tile_max(0, 0) = 2.0f;
    *weights.tile_max(0, 1) = nothing_seen;
    EXPECT_EQ(weights.rescale(0, 0, 2.0f), 1.0f);
    EXPECT_EQ(weights.rescale(0, 0, 5.0f), std::exp(-3.0f));
    EXPECT_EQ(weights.rescale(0, 1, 5.0f), 0.0f);
}

TEST(KeyPlanes, HaveRoomForTheLargestFormat) {
    // 300 channels of 4 bits: 38 groups; 2 of 8: 1 group. A tile of values needs 128 at most.
    Drive drive({key_format(2, 8), key_format(1200, 4)}, value_format(16, 8), {.heads = 2});
    KeyPlanes planes;
    planes.begin(drive.context(ReadPolicy::all()));
    std::fill_n(planes.of(0), 150, std::uint8_t{1});  // 1200 / 8: a sanitizer sees an overrun
    EXPECT_EQ(planes.of(0)[149], 1);
}

TEST(WideFactors, AreForMoreThanFiveBits) {
    EXPECT_FALSE(wants_wide_factors(4.0));
    EXPECT_FALSE(wants_wide_factors(5.0));
    EXPECT_TRUE(wants_wide_factors(5.01));
    EXPECT_TRUE(wants_wide_factors(8.0));
}

}  // namespace
