// How much the channels of a tile of keys count.
#include "kvplane/read/importance.hpp"

#include <gtest/gtest.h>

#include "read/planner_support.hpp"
#include "test_inputs.hpp"

namespace {

using namespace kvplane_test;

struct Groups {
    std::vector<PlaneGroup> groups;
    std::vector<float> importance() const {
        std::vector<float> all;
        for (const PlaneGroup& group : groups) all.push_back(group.importance);
        return all;
    }
    std::vector<int> sizes() const {
        std::vector<int> all;
        for (const PlaneGroup& group : groups) all.push_back(group.size);
        return all;
    }
};
Groups importance_of(Isa isa, const TileFormat& format, const std::vector<std::byte>& tile,
                     const Matrix& queries, bool reach) {
    Groups found;
    found.groups.resize(static_cast<std::size_t>(plane_groups(format)));
    std::vector<float> values(static_cast<std::size_t>(format.channels()));
    key_importance(isa, format, tile.data(), {queries.data(), queries.cols(), queries.rows()}, reach,
                   values.data(), found.groups.data());
    return found;
}
/// The tile of one head, with step(token group, channel).
template <class Step>
std::vector<std::byte> tile_of(const TileFormat& format, const Step& step) {
    std::vector<std::byte> tile(static_cast<std::size_t>(format.bytes()));
    for (const TileFormat::Placed& s : format.segments())
        for (Index g = 0; g < s.grids; ++g)
            reinterpret_cast<Eigen::half*>(tile.data() + s.step_at)[g] =
                Eigen::half(static_cast<float>(step(g / s.channels, s.first_channel + g % s.channels)));
    return tile;
}

/// 44 channels of {4,4}: five groups of 8 and one of 4. q = 2 and 1 in two rows: q^2 sums to 5.
TEST(KeyImportance, IsTheSumOfSquaresOfQueryTimesStep) {
    const TileFormat format = key_format(44, 8);
    const auto tile =
        tile_of(format, [](Index, Index c) { return std::ldexp(1.0f, -static_cast<int>(c / 8)); });
    Matrix queries(2, 44);
    queries.row(0).setConstant(-2.0f);
    queries.row(1).setConstant(1.0f);
    for_each_isa([&](Isa isa) {
        const Groups squares = importance_of(isa, format, tile, queries, false);
        // Eight channels of 5 4^-g; the last four.
        EXPECT_EQ(squares.importance(),
                  (std::vector<float>{40.0f, 10.0f, 2.5f, 0.625f, 0.15625f, 0.01953125f}));
        EXPECT_EQ(squares.sizes(), (std::vector<int>{8, 8, 8, 8, 8, 4}));
        EXPECT_EQ(squares.groups[5].split, plane_split(8));
        // With `reach`: the largest |q|, 2, times the step, summed.
        const Groups reach = importance_of(isa, format, tile, queries, true);
        EXPECT_EQ(reach.importance(), (std::vector<float>{16.0f, 8.0f, 4.0f, 2.0f, 1.0f, 0.25f}));
    });
}

/// Steps of several groups of tokens: their mean square, or the largest. Groups of 32 with steps 1, 2, 4 and
/// 0: 21 / 4 = 5.25, and 4.
TEST(KeyImportance, AveragesOverGroupsOfTokens) {
    const TileFormat format = key_format(21, 4, 32);
    constexpr float steps[4] = {1.0f, 2.0f, 4.0f, 0.0f};
    const auto tile = tile_of(format, [&](Index g, Index) { return steps[g]; });
    const Matrix ones = Matrix::Ones(1, 21);
    for_each_isa([&](Isa isa) {
        EXPECT_EQ(importance_of(isa, format, tile, ones, false).importance(),
                  (std::vector<float>{42.0f, 42.0f, 26.25f}));
        EXPECT_EQ(importance_of(isa, format, tile, ones, true).importance(),
                  (std::vector<float>{32.0f, 32.0f, 20.0f}));
    });
}

/// Segments one after another, each in groups of its own size; those without bits have none. A query stride
/// that is larger than the channels.
TEST(KeyImportance, GoesBySegments) {
    const TileFormat format(TileSide::keys, {{5, 0}, {40, 7}, {8, 0}, {9, 2}, {17, 4}},
                            {Granularity::per_channel, 64, Scheme::min_max});
    const auto tile = tile_of(format, [](Index, Index c) { return c < 45 ? 1.0f : c < 62 ? 2.0f : 4.0f; });
    Matrix queries = Matrix::Constant(1, 79, 1.0f);
    queries(0, 5 + 40 + 8 + 9 + 16) = 3.0f;  // the last channel
    for_each_isa([&](Isa isa) {
        const Groups found = importance_of(isa, format, tile, queries, false);
        EXPECT_EQ(found.sizes(), (std::vector<int>{32, 8, 9, 8, 8, 1}));
        EXPECT_EQ(found.importance(), (std::vector<float>{32.0f, 8.0f, 36.0f, 128.0f, 128.0f, 144.0f}));
    });
}

/// Of fp16 a step is the last place of the largest magnitude 2^e: 2^(e - 10), and 2^-24 of subnormal numbers.
TEST(KeyImportance, TakesTheLastPlaceOfHalf) {
    const TileFormat format = key_format(24, 16);
    std::vector<std::byte> tile(static_cast<std::size_t>(format.bytes()));
    const TileFormat::Placed& s = format.segments()[0];
    for (Index c = 0; c < 24; ++c)  // fields: 2^10, 2^12, subnormal
        tile[static_cast<std::size_t>(s.exponent_at + c)] = static_cast<std::byte>(c < 8    ? 25
                                                                                   : c < 16 ? 27
                                                                                            : 0);
    const Matrix queries = Matrix::Constant(1, 24, 0.5f);
    for_each_isa([&](Isa isa) {
        EXPECT_EQ(importance_of(isa, format, tile, queries, false).importance(),
                  (std::vector<float>{2.0f, 32.0f, 2.0f * 0x1p-48f}));
        EXPECT_EQ(importance_of(isa, format, tile, queries, true).importance(),
                  (std::vector<float>{4.0f, 16.0f, 4.0f * 0x1p-24f}));
    });
}

}  // namespace
