// How much the tokens of a tile of values count.
#include "kvplane/read/value_importance.hpp"

#include <gtest/gtest.h>

#include "read/planner_support.hpp"
#include "test_inputs.hpp"

namespace {

using namespace kvplane_test;

/// A tile of values with step(run of channels, token) and lower(run, token).
template <class Step, class Lower>
std::vector<std::byte> tile_of(const TileFormat& format, const Step& step, const Lower& lower) {
    std::vector<std::byte> tile(static_cast<std::size_t>(format.bytes()));
    const TileFormat::Placed& s = format.segments()[0];
    for (Index g = 0; g < s.grids; ++g) {
        const Index run = g / tile_tokens, token = g % tile_tokens;
        reinterpret_cast<Eigen::half*>(tile.data() + s.step_at)[g] = Eigen::half(float(step(run, token)));
        if (s.scheme != Scheme::symmetric)
            reinterpret_cast<Eigen::half*>(tile.data() + s.lower_at)[g] =
                Eigen::half(float(lower(run, token)));
    }
    return tile;
}

/// Of a sum that is exact, Eigen finds the root to the last place or so.
void expect_root(float found, float exact) {
    EXPECT_NEAR(found, exact, 0x1p-22f * exact);
}

/// 40 channels in runs of 16, 16 and 8, of steps 1, 2 and 4: 16 + 64 + 128 = 208; token 9 has steps of 0.
TEST(ValueSteps, AreSummedOverRuns) {
    const TileFormat format(TileSide::values, 40, 4, {Granularity::per_token, 16, Scheme::min_max});
    const auto step = [](Index run, Index token) { return token == 9 ? 0.0f : std::ldexp(1.0f, int(run)); };
    // Grids from lower to lower + 16 step: [-20, -4], [-20, 12], [-20, 44]; token 5 from 2: [2, 18], [2, 34],
    // [2, 66].
    const auto tile = tile_of(format, step, [](Index, Index token) { return token == 5 ? 2.0f : -20.0f; });
    for_each_isa([&](Isa isa) {
        float squares[tile_tokens], roots[tile_tokens];
        EXPECT_EQ(value_steps(isa, format, tile.data(), 1.0f, false, squares), 0.0f);
        // Token 5: 16 18^2 + 16 34^2 + 8 66^2 = 5184 + 18496 + 34848 = 58528. Others 16 400 + 16 400 + 8 44^2
        // = 28288.
        EXPECT_EQ(value_steps(isa, format, tile.data(), 1.0f, true, roots), std::sqrt(58528.0f));
        for (Index t = 0; t < tile_tokens; ++t) {
            EXPECT_EQ(squares[t], t == 9 ? 0.0f : 208.0f);
            expect_root(roots[t], t == 9 ? 0.0f : std::sqrt(208.0f));
        }
    });
}

/// Symmetric grids of 4 bits reach from -8.5 to 7.5 steps.
TEST(ValueSteps, KnowSymmetricGrids) {
    const TileFormat format(TileSide::values, 16, 4, {Granularity::per_token, whole_head, Scheme::symmetric});
    const auto tile = tile_of(
        format, [](Index, Index token) { return token == 127 ? 2.0f : 1.0f; },
        [](Index, Index) { return 0; });
    for_each_isa([&](Isa isa) {
        float roots[tile_tokens];
        EXPECT_EQ(value_steps(isa, format, tile.data(), 1.0f, true, roots), 4 * 17.0f);
        expect_root(roots[0], 4.0f);
        expect_root(roots[127], 8.0f);
    });
}

/// Of fp16 all tokens have the last place of the largest value, at least that of subnormal numbers.
TEST(ValueSteps, OfHalfAreThoseOfTheLargestValue) {
    const TileFormat format(TileSide::values, 64, 16, {});
    for_each_isa([&](Isa isa) {
        float steps[tile_tokens];
        EXPECT_EQ(value_steps(isa, format, nullptr, 4.0f, false, steps), 32.0f);
        EXPECT_EQ(steps[0], 64 * 0x1p-16f);
        EXPECT_EQ(value_steps(isa, format, nullptr, 4.0f, true, steps), 32.0f);
        EXPECT_EQ(steps[127], 8 * 0x1p-8f);
        EXPECT_EQ(value_steps(isa, format, nullptr, 0.0f, true, steps), 0.0f);
        EXPECT_EQ(steps[127], 8 * 0x1p-24f);
    });
}

/// weight(t) = t % 8 + 1 in the first row and 2^-(t / 8) in the second, steps 2: whole numbers of few bits.
TEST(GroupWeights, SumOrTakeTheLargest) {
    Matrix weights(2, tile_tokens);
    for (Index t = 0; t < tile_tokens; ++t) {
        weights(0, t) = static_cast<float>(t % 8 + 1);
        weights(1, t) = std::ldexp(1.0f, -static_cast<int>(t / 8));
    }
    const std::vector<float> steps(tile_tokens, 2.0f);
    for_each_isa([&](Isa isa) {
        for (const Index size : {8, 16, 32}) {
            const Index groups = tile_tokens / size;
            const auto eights = static_cast<float>(size / 8);
            std::vector<float> found(static_cast<std::size_t>(2 * groups));
            const auto plan = [&](GroupWeight kind) {
                group_weights(isa, weights.data(), 2, steps.data(), kind, size, found.data());
            };
            // The sum over a group of second-row terms 8 x 2^-first x (1 + 1/2 + ...), each `by`.
            const auto second = [&](Index g, bool squares) {
                double sum = 0.0;
                for (Index i = g * size / 8; i < (g + 1) * size / 8; ++i)
                    sum += 8.0 * std::ldexp(1.0, -static_cast<int>(squares ? 2 * i : i));
                return static_cast<float>(2.0 * sum);
            };
            plan(GroupWeight::squares);
            for (Index g = 0; g < groups; ++g) {
                EXPECT_EQ(found[static_cast<std::size_t>(g)], 2.0f * 204.0f * eights);  // 1 + 4 + ... + 64
                EXPECT_EQ(found[static_cast<std::size_t>(groups + g)], second(g, true));
            }
            plan(GroupWeight::reach);
            for (Index g = 0; g < groups; ++g) {
                EXPECT_EQ(found[static_cast<std::size_t>(g)], 2.0f * 36.0f * eights);  // 1 + 2 + ... + 8
                EXPECT_EQ(found[static_cast<std::size_t>(groups + g)], second(g, false));
            }
            plan(GroupWeight::largest);
            for (Index g = 0; g < groups; ++g) {
                EXPECT_EQ(found[static_cast<std::size_t>(g)], 8.0f);
                EXPECT_EQ(found[static_cast<std::size_t>(groups + g)],
                          std::ldexp(1.0f, -static_cast<int>(g * size / 8)));
            }
        }
    });
}

/// Two heads of two rows, two tiles, {4,4}: 16 groups. Steps of 1/4 over 16 channels: the sum of squares is
/// 1.
struct Combined {
    Combined()
        : drive({key_format(8, 8)}, value_format(16, 8), {.heads = 2, .rows_per_head = 2, .tiles = 2}) {
        for (Index t = 0; t < 2; ++t)
            for (Index head = 0; head < 2; ++head)
                drive.set_value_steps(t, head, [&](Index) { return head == 0 ? 0.25f : 0.5f; });
        for (Index row = 0; row < 4; ++row) {
            drive.set_weights(0, row, [&](Index token) { return token == 8 * row ? 1.0f : 0.0f; });
            drive.set_weights(1, row, [&](Index token) { return token >= 120 ? 0.5f : 0.0f; });
        }
        drive.weights().set_row(1, 0.0f, 0.25f);
        *drive.weights().tile_max(1, 1) = nothing_seen;
        drive.weights().set_row(3, 0.0f, 0.0f);  // counts for nothing
    }
    /// [tile][group] of a row block.
    std::vector<Planes> importance(Index block, GroupWeight kind, float unit) {
        values.begin(drive.context(ReadPolicy::all()), kind);
        for (Index b = 0; b < 2; ++b)
            for (Index t = 0; t < 2; ++t)
                if (!drive.sequence().hidden(t)) values.note(drive.place(t, b), drive.scratch());
        std::vector<Planes> found(2);
        values.combine(drive.shape().row_block(block), [&](Index tile, float* importance) {
            for (Index g = 0; g < values.groups(); ++g) {
                EXPECT_EQ(importance[g], values.importance(tile, block)[g]);
                found[static_cast<std::size_t>(tile)].push_back(
                    static_cast<int>(std::lround(importance[g] / unit)));
                const float whole = static_cast<float>(found[static_cast<std::size_t>(tile)].back()) * unit;
                if (kind == GroupWeight::squares)
                    EXPECT_EQ(importance[g], whole);
                else
                    expect_root(importance[g], whole);
            }
        });
        return found;
    }
    Drive drive;
    ValueImportance values;
};

TEST(ValueImportance, SumsSquaresOverRows) {
    Combined combined;
    Planes last(16, 0);
    last[15] = 32;  // 8 (1/2)^2 = 2, in 16ths, of row 0; row 1 does not see the tile
    // Tile 0: row 0's group 0 counts 1, row 1's group 1 (1/4)^2.
    EXPECT_EQ(combined.importance(0, GroupWeight::squares, 1.0f / 16),
              (std::vector<Planes>{of_sixteen({16, 1}), last}));
    // Head 1 has steps twice as large: 4 times as much. Its second row counts for nothing.
    last[15] = 8;
    EXPECT_EQ(combined.importance(1, GroupWeight::squares, 1.0f),
              (std::vector<Planes>{of_sixteen({0, 0, 4}), last}));
    EXPECT_EQ(combined.values.weights_of(0, 3)[3], 4.0f) << "as noted, before it is combined";
}

TEST(ValueImportance, TakesTheLargestReach) {
    Combined combined;
    Planes last(16, 0);
    last[15] = 16;  // 8 1/2 = 4, in quarters
    EXPECT_EQ(combined.importance(0, GroupWeight::reach, 0.25f),
              (std::vector<Planes>{of_sixteen({4, 1}), last}));
    // Norms: 256 steps in 16 channels.
    EXPECT_EQ(combined.values.largest_norm(0), 256.0);
    EXPECT_EQ(combined.values.largest_norm(1), 512.0);
    combined.values.note_norm(1, 0, 300.0f);  // tokens outside tiles: the chunk after the last
    EXPECT_EQ(combined.values.largest_norm(0), 300.0);
    EXPECT_EQ(combined.values.largest_norm(1), 512.0);
}

TEST(ValueImportance, LeavesOutHiddenTiles) {
    Combined combined;
    combined.drive.sequence().hidden_to = tile_tokens;
    Planes last(16, 0);
    last[15] = 2;
    EXPECT_EQ(combined.importance(0, GroupWeight::squares, 1.0f), (std::vector<Planes>{{}, last}));
}

/// Planes that gain at least so much: 1360 and 5.3125 for each importance of 1, (4^8 - 4^4) / 48 and
/// (4^4 - 1) / 48.
TEST(ValueImportance, ChoosesPlanesByGain) {
    Combined combined;
    combined.importance(0, GroupWeight::squares, 1.0f / 16);
    EXPECT_EQ(combined.values.worth()[0], 1360.0f);
    EXPECT_EQ(combined.values.worth()[1], 5.3125f);
    const auto plan = [&](float least) {
        std::vector<std::uint8_t> planes(17, 77);
        combined.values.choose(0, 0, least, planes.data());
        EXPECT_EQ(planes.back(), 77);
        return Planes(planes.begin(), planes.begin() + 16);
    };
    EXPECT_EQ(plan(1360.0f), of_sixteen({1, 0}));
    EXPECT_EQ(plan(1360.1f), of_sixteen({0, 0}));
    EXPECT_EQ(plan(85.0f), of_sixteen({1, 1}));  // 1360 / 16
    EXPECT_EQ(plan(5.3125f), of_sixteen({2, 1}));
    EXPECT_EQ(plan(5.3126f), of_sixteen({1, 1}));
    EXPECT_EQ(plan(0.33203125f), of_sixteen({2, 2}));  // 5.3125 / 16
    EXPECT_EQ(plan(0.0f), Planes(16, 2)) << "also what counts for nothing";
    EXPECT_EQ(plan(std::numeric_limits<float>::infinity()), Planes(16, 0));
}

}  // namespace
