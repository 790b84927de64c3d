// Formats: every part of a tile stands where the layout says, sizes are exact, and what has no layout is
// refused.
#include "kvplane/storage/tile_format.hpp"

#include <string>

#include "storage/tile_support.hpp"
#include "test_support.hpp"

namespace {

using kvplane::ChannelSegment;
using kvplane::ErrorCode;
using kvplane::Granularity;
using kvplane::GridRule;
using kvplane::Index;
using kvplane::Scheme;
using kvplane::TileFormat;
using kvplane::TileSide;
using kvplane_test::refusal;
using kvplane_test::tiles::all_cases;
using kvplane_test::tiles::all_rules;
using kvplane_test::tiles::Case;
using kvplane_test::tiles::DocumentedTile;
using kvplane_test::tiles::Segments;

TEST(TileFormat, PlacesEveryPartAsDocumented) {
    for (const Case& c : all_cases({1, 7, 16, 31, 33, 64, 80, 96, 128, 256}, all_rules())) {
        SCOPED_TRACE(c.text());
        const TileFormat format = c.format();
        const DocumentedTile documented = c.documented();
        ASSERT_EQ(format.bytes(), documented.bytes);
        ASSERT_EQ(format.channels(), documented.channels);
        ASSERT_EQ(format.side(), c.side);
        EXPECT_DOUBLE_EQ(format.bits_per_element(), 8.0 * static_cast<double>(documented.bytes) /
                                                        static_cast<double>(128 * documented.channels));
        ASSERT_EQ(format.segments().size(), documented.segments.size());
        for (std::size_t s = 0; s < documented.segments.size(); ++s) {
            const auto& placed = format.segments()[s];
            const auto& expected = documented.segments[s];
            EXPECT_EQ(placed.first_channel, expected.first_channel);
            EXPECT_EQ(placed.channels, expected.channels);
            EXPECT_EQ(placed.bits, expected.bits);
            EXPECT_EQ(placed.grids, expected.grids);
            if (expected.grids > 0) {
                EXPECT_EQ(placed.step_at, expected.step_at);
                EXPECT_EQ(placed.scheme, expected.scheme);
                if (c.documented().has_lower(expected)) {
                    EXPECT_EQ(placed.lower_at, expected.lower_at);
                }
            }
            ASSERT_EQ(placed.split.count, static_cast<int>(expected.planes.size()));
            for (std::size_t p = 0; p < expected.planes.size(); ++p)
                EXPECT_EQ(placed.plane_at[p], expected.plane_at[p]);
        }
    }
}

TEST(TileFormat, StatesTrueBits) {
    const auto bits = [](TileSide side, Index channels, int width, const GridRule& rule) {
        return TileFormat(side, channels, width, rule).bits_per_element();
    };
    const GridRule channel{Granularity::per_channel, 128}, token{Granularity::per_token, 64};
    EXPECT_EQ(bits(TileSide::keys, 64, 4, channel), 4.25);
    EXPECT_EQ(bits(TileSide::keys, 64, 4, {Granularity::per_channel, 32}), 5.0);
    EXPECT_EQ(bits(TileSide::values, 64, 2, token), 2.5);
    EXPECT_EQ(bits(TileSide::values, 64, 2, {Granularity::per_token, 64, Scheme::symmetric}), 2.25);
    EXPECT_EQ(bits(TileSide::values, 64, 16, token), 16.0);
    EXPECT_EQ(bits(TileSide::keys, 64, 16, token), 16.0 + 8.0 / 128.0) << "a byte a channel";
    EXPECT_EQ(bits(TileSide::keys, 64, 0, channel), 0.0);
    EXPECT_EQ(bits(TileSide::keys, 72, 4, channel), 4.0 + 320.0 * 8.0 / (128 * 72)) << "slack counts";
    EXPECT_EQ(TileFormat(TileSide::keys, Segments{}, channel).bytes(), 0);
    EXPECT_EQ(TileFormat(TileSide::keys, Segments{}, channel).bits_per_element(), 0.0);
}

TEST(TileFormat, RefusesWhatHasNoLayout) {
    const auto refused = [](const std::string& part, const Segments& segments, const GridRule& rule) {
        for (const TileSide side : {TileSide::keys, TileSide::values}) {
            const std::string sentence =
                refusal(ErrorCode::option, [&] { TileFormat(side, segments, rule); });
            EXPECT_NE(sentence.find(part), std::string::npos) << sentence;
        }
    };
    for (const Index group : {-1, 0, 1, 16, 33, 96, 127, 129, 256})
        refused("expected 32, 64 or 128", {{64, 4}}, {Granularity::per_channel, group});
    for (const Index group : {0, -1}) refused("at least 1", {{64, 4}}, {Granularity::per_token, group});
    for (const int bits : {-1, 9, 10, 12, 15, 17})
        refused(std::to_string(bits) + ", expected", {{32, 4}, {64, bits}}, {Granularity::per_token, 32});
    for (const Index channels : {0, -1}) refused("a segment of", {{64, 4}, {channels, 4}}, {});
    refused("symmetric", {{64, 1}}, {Granularity::per_token, 32, Scheme::symmetric});
}

/// What the rest of the library asks instead of comparing widths.
TEST(TileFormat, SaysWhichSegmentsAreFp16AndWhichHaveGrids) {
    for (const int bits : {0, 1, 2, 3, 4, 5, 6, 7, 8, 16}) {
        EXPECT_EQ((ChannelSegment{3, bits}.is_half()), bits == 16);
        const TileFormat format(TileSide::keys, 3, bits, {Granularity::per_channel, 128});
        EXPECT_EQ(format.segments()[0].is_half(), bits == 16);
        EXPECT_EQ(format.segments()[0].split.is_half(), bits == 16);
        EXPECT_EQ(format.segments()[0].has_grids(), bits > 0 && bits < 16);
        EXPECT_EQ(format.segments()[0].grids, bits > 0 && bits < 16 ? 3 : 0);
        EXPECT_EQ(format.grids_span_tokens(), bits > 0 && bits < 16);
    }
}

}  // namespace
