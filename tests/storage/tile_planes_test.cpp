// Planes: every code stands at its place in the units of the layout, and is read back at every depth.
#include "kvplane/storage/tile_planes.hpp"

#include <algorithm>

#include "storage/tile_support.hpp"
#include "test_support.hpp"

namespace {

using kvplane::Granularity;
using kvplane::GridRule;
using kvplane::Index;
using kvplane::TileFormat;
using kvplane::TileSide;
using kvplane::detail::TileCodes;
using kvplane_test::tiles::Case;
using kvplane_test::tiles::DocumentedTile;
using kvplane_test::tiles::Tile;

/// design.md's example: a 64-byte unit of a 4-bit plane of keys holds 16 tokens x 8 channels, byte (token, j)
/// = code[channel j] | code[channel j + 4] << 4; values likewise with tokens and channels exchanged.
TEST(TileLayout, OfFourBitsIsTheExampleOfTheDesign) {
    const GridRule rule{Granularity::per_token, 32};
    for (const TileSide side : {TileSide::keys, TileSide::values}) {
        const TileFormat format(side, 32, 4, rule);
        TileCodes codes(32);
        const auto code = [](Index token, Index channel) { return (token * 5 + channel * 3) % 16; };
        for (Index t = 0; t < 128; ++t)
            for (Index c = 0; c < 32; ++c) codes.at(t, c) = static_cast<std::uint8_t>(code(t, c));
        Tile tile(static_cast<std::size_t>(format.bytes()));
        pack_segment(format, 0, codes, 0, 128, tile.data());
        const auto* plane = reinterpret_cast<const std::uint8_t*>(tile.data()) + 256 + 256;
        for (Index lane = 0; lane < 16; ++lane)
            for (Index j = 0; j < 4; ++j) {
                const bool keys = side == TileSide::keys;
                // The second unit: the next 8 channels of the same tokens, the next 8 tokens of the channels.
                const Index low = keys ? code(lane, 8 + j) : code(8 + j, lane);
                const Index high = keys ? code(lane, 12 + j) : code(12 + j, lane);
                EXPECT_EQ(plane[64 + lane * 4 + j], low | high << 4);
            }
    }
}

/// Every width and every code, at places that change with the start; fp16 with all its bytes.
TEST(TileLayout, HoldsEveryCodeAtItsPlace) {
    const GridRule rule{Granularity::per_token, 64};
    for (const TileSide side : {TileSide::keys, TileSide::values})
        for (const int bits : {1, 2, 3, 4, 5, 6, 7, 8, 16})
            for (const Index channels : {1, 15, 32, 40, 67})
                for (const int start : {0, 1, 77}) {
                    const Case c{side, {{channels, bits}}, rule};
                    SCOPED_TRACE(c.text());
                    const TileFormat format = c.format();
                    const DocumentedTile documented = c.documented();
                    const int step = bits == 16 ? 9973 : 1, patterns = 1 << bits;
                    const auto code = [&](Index t, Index channel) {
                        return static_cast<int>((t * channels + channel) * step + start) % patterns;
                    };
                    TileCodes codes(channels);
                    for (Index t = 0; t < 128; ++t)
                        for (Index channel = 0; channel < channels; ++channel) {
                            const int x = code(t, channel);
                            codes.at(t, channel, 0) = static_cast<std::uint8_t>(bits == 16 ? x >> 8 : x);
                            if (bits == 16) codes.at(t, channel, 1) = static_cast<std::uint8_t>(x & 255);
                        }
                    Tile tile(static_cast<std::size_t>(format.bytes()), std::byte{0});
                    pack_segment(format, 0, codes, 0, 128, tile.data());
                    for (Index t = 0; t < 128; ++t)
                        for (Index channel = 0; channel < channels; ++channel)
                            ASSERT_EQ(documented.code(tile, 0, t, channel), code(t, channel))
                                << "token " << t << ", channel " << channel;
                    // In pieces of any size, which leave the other tokens as they are.
                    Tile in_pieces(tile.size(), std::byte{0});
                    for (Index first = 0, piece = start % 5 + 1; first < 128;
                         first += piece, piece = piece % 11 + 1)
                        pack_segment(format, 0, codes, first, std::min(piece, 128 - first), in_pieces.data());
                    ASSERT_EQ(in_pieces, tile);
                    // A prefix of the planes is a prefix of the code, at every depth that is read.
                    for (int depth = bits == 16 ? 8 : 1; depth <= bits; depth += bits == 16 ? 4 : 1) {
                        TileCodes read(channels);
                        std::fill_n(read.byte(0), 128 * read.stride(), std::uint8_t{0xEE});
                        std::fill_n(read.byte(1), 128 * read.stride(), std::uint8_t{0xEE});
                        unpack_segment(format, 0, depth, tile.data(), read);
                        for (Index t = 0; t < 128; ++t)
                            for (Index channel = 0; channel < channels; ++channel) {
                                const int prefix = code(t, channel) >> (bits - depth);
                                const int found = bits == 16
                                                      ? read.at(t, channel, 0) << 8 | read.at(t, channel, 1)
                                                      : read.at(t, channel, 0);
                                ASSERT_EQ(found, bits == 16 ? prefix << (16 - depth) : prefix)
                                    << "depth " << depth << ", token " << t << ", channel " << channel;
                            }
                    }
                }
}

}  // namespace
