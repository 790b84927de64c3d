// How the grids of a block are counted, in number and in bytes.
#include "kvplane/quantize/rule.hpp"

#include <gtest/gtest.h>

#include <limits>

namespace {

using kvplane::Granularity;
using kvplane::GridRule;
using kvplane::groups_of;
using kvplane::Index;
using kvplane::Scheme;

TEST(GroupsOf, CountsTheLastSmallerOne) {
    EXPECT_EQ(groups_of(0, 5), 0);
    for (const Index count : {1, 4, 5}) EXPECT_EQ(groups_of(count, 5), 1);
    EXPECT_EQ(groups_of(6, 5), 2);
    constexpr Index most = std::numeric_limits<Index>::max();
    EXPECT_EQ(groups_of(most, most), 1);
    EXPECT_EQ(groups_of(most, most - 1), 2);
    EXPECT_EQ(groups_of(most, 2), most / 2 + 1);
}

TEST(GridRule, CountsGridsAndTheirBytes) {
    const GridRule channel{Granularity::per_channel, 32}, token{Granularity::per_token, 32};
    EXPECT_EQ(channel.grids(128, 10), 40);
    EXPECT_EQ(channel.grids(129, 10), 50);
    EXPECT_EQ(channel.grids(0, 10), 0);
    EXPECT_EQ(token.grids(10, 64), 20);
    EXPECT_EQ(token.grids(10, 65), 30);
    for (const Granularity granularity : {Granularity::per_channel, Granularity::per_token}) {
        const GridRule whole{granularity, std::numeric_limits<Index>::max()};
        EXPECT_EQ(whole.grids(7, 9), granularity == Granularity::per_channel ? 9 : 7);
    }
    EXPECT_EQ((GridRule{Granularity::per_token, 32, Scheme::cell}.bytes_per_grid()), 4);
    EXPECT_EQ((GridRule{Granularity::per_token, 32, Scheme::symmetric}.bytes_per_grid()), 2);
    EXPECT_STREQ(name(Granularity::per_channel), "per_channel");
    EXPECT_STREQ(name(Granularity::per_token), "per_token");
}

}  // namespace
