// Lane maps of the CUDA kernels: every code of a tile is read once, by the lane and in the place that the
// maps say.
#include "kvplane/cuda/fragments.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <random>
#include <vector>

#include "kvplane/storage/tile_planes.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane::cuda;

/// A segment of random codes in planes.
struct Packed {
    Packed(TileSide side, Index channels, int bits, std::mt19937_64& random)
        : format(side, channels, bits, {Granularity::per_token, 64, Scheme::cell, Clip::none}),
          codes(channels),
          tile(static_cast<std::size_t>(format.bytes())) {
        for (Index t = 0; t < tile_tokens; ++t)
            for (Index c = 0; c < channels; ++c)
                codes.at(t, c) = static_cast<std::uint8_t>(random() & ((1u << bits) - 1u));
        kvplane::detail::pack_segment(format, 0, codes, 0, tile_tokens, tile.data());
    }
    std::uint32_t word(int plane, std::uint32_t at) const {
        std::uint32_t word;
        std::memcpy(&word, tile.data() + format.segments()[0].plane_at[static_cast<std::size_t>(plane)] + at,
                    4);
        return word;
    }
    TileFormat format;
    kvplane::detail::TileCodes codes;
    std::vector<std::byte> tile;
};

/// The code of number i of an octet (pair of quads) that begins at `first` along the product.
template <class At>
std::uint32_t code_at(const Packed& packed, int bits, std::uint32_t first, std::uint32_t i,
                      const At& word_at) {
    const PlaneSplit split = plane_split(bits);
    std::uint32_t code = 0;
    for (int p = 0; p < split.count; ++p) {
        const auto width = static_cast<std::uint32_t>(split[p]), depth = 32 / width;
        const std::uint32_t unit = first / depth, field = first % depth / 4 + i / 4;
        const std::uint32_t word = packed.word(p, word_at(unit, depth));
        code = code << width | (word >> (8 * (i % 4) + field * width) & ((1u << width) - 1u));
    }
    return code;
}

TEST(Fragments, EveryCodeOfKeysIsReadOnce) {
    std::mt19937_64 random(kvplane_test::seed());
    for (int bits = 1; bits <= 8; ++bits)
        for (const Index channels : {64, 80, 96, 128, 256})
            for (const int chunk : {8, least_chunk(bits)})
                for (const int value_chunk : {8, 16, 32}) {
                    Packed packed(TileSide::keys, channels, bits, random);
                    std::vector<int> seen(static_cast<std::size_t>(tile_tokens * channels));
                    for (std::uint32_t lane = 0; lane < 32; ++lane)
                        for (int m = 0; m < 4; ++m)
                            for (std::uint32_t s = 0; s < 4; ++s)
                                for (int o = 0; o < octets_of(static_cast<int>(channels), chunk); ++o) {
                                    const std::uint32_t token = score_token(m, lane / 4, value_chunk) + s;
                                    const std::uint32_t first = octet_channel(o, lane % 4, chunk);
                                    if (first >= channels) continue;
                                    for (std::uint32_t i = 0; i < 8; ++i) {
                                        const auto c = static_cast<Index>(first + i);
                                        const std::uint32_t code =
                                            code_at(packed, bits, first, i,
                                                    [&](std::uint32_t unit, std::uint32_t depth) {
                                                        const auto units = static_cast<std::uint32_t>(
                                                            (channels + depth - 1) / depth);
                                                        return key_word(token / 4 * 4, unit, units) + 4 * s;
                                                    });
                                        ASSERT_EQ(code, packed.codes.at(token, c));
                                        ++seen[token * static_cast<std::size_t>(channels) +
                                               static_cast<std::size_t>(c)];
                                    }
                                }
                    for (const int times : seen)
                        ASSERT_EQ(times, 1) << bits << " bits, " << channels << " channels";
                }
}

TEST(Fragments, EveryCodeOfValuesIsReadOnce) {
    std::mt19937_64 random(kvplane_test::seed());
    for (int bits = 1; bits <= 8; ++bits)
        for (const Index channels : {64, 80, 128})
            for (const int chunk : {8, least_chunk(bits)}) {
                Packed packed(TileSide::values, channels, bits, random);
                std::vector<int> seen(static_cast<std::size_t>(tile_tokens * channels));
                for (std::uint32_t lane = 0; lane < 32; ++lane)
                    for (std::uint32_t block = 0; block < (channels + 31) / 32; ++block)
                        for (std::uint32_t s = 0; s < 4; ++s)
                            for (int pair = 0; pair < 4; ++pair) {
                                const std::uint32_t channel = 32 * block + 4 * (lane / 4) + s;
                                if (channel >= channels) continue;
                                const std::uint32_t first = quad_token(2 * pair, lane % 4, chunk);
                                ASSERT_EQ(quad_token(2 * pair + 1, lane % 4, chunk), first + 4);
                                for (std::uint32_t i = 0; i < 8; ++i) {
                                    const std::uint32_t code = code_at(
                                        packed, bits, first, i, [&](std::uint32_t unit, std::uint32_t depth) {
                                            return value_word(channel / 4 * 4, unit, 128 / depth) + 4 * s;
                                        });
                                    ASSERT_EQ(code, packed.codes.at(static_cast<Index>(first + i),
                                                                    static_cast<Index>(channel)));
                                    ++seen[(first + i) * static_cast<std::size_t>(channels) + channel];
                                }
                            }
                for (const int times : seen)
                    ASSERT_EQ(times, 1) << bits << " bits, " << channels << " channels";
            }
}

TEST(Fragments, ScoresLeaveWhereWeightsAreNeeded) {
    for (const int chunk : {8, 16, 32})
        for (std::uint32_t quarter = 0; quarter < 4; ++quarter)
            for (int m = 0; m < 4; ++m)
                for (std::uint32_t j = 0; j < 2; ++j)
                    EXPECT_EQ(score_token(m, 2 * quarter + j, chunk),
                              quad_token(2 * m + static_cast<int>(j), quarter, chunk));
}

}  // namespace
