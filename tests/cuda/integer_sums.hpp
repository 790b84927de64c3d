// tests/cuda/integer_sums.hpp: the products of codes alone, which are the same whole numbers on a device and on the
// emulated lanes of the tests: one hash of them all guards the index tables that both go by.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "byte_hash.hpp"
#include "kvplane/cuda/tile_math.cuh"
#include "kvplane/cuda/tile_views.hpp"

namespace kvplane_test {

/// What SumsOf<bits> leaves of all lanes and widths; the test prints it.
inline constexpr std::uint64_t golden_integer_sums = 0xACCA30F35B124D8D;

/// Tiles of keys and of values of one width, and factors; all random bytes, for every byte is a code.
struct SumsInput {
    static constexpr int channels = 128;
    static constexpr std::size_t tile_bytes = 32768, factor_bytes = 2 * 16 * 32 * 16;

    explicit SumsInput(int bits) : bytes(2 * tile_bytes + factor_bytes) {
        using namespace kvplane;
        std::mt19937 random(static_cast<unsigned>(bits));
        for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() >> 24);
        const GridRule by_channel{Granularity::per_channel, 128, Scheme::min_max, Clip::none},
            by_token{Granularity::per_token, whole_head, Scheme::min_max, Clip::none};
        keys = cuda::key_tile_view(TileFormat(TileSide::keys, channels, bits, by_channel)).segment[0];
        values = cuda::value_tile_view(TileFormat(TileSide::values, channels, bits, by_token)).all;
    }

    std::vector<std::byte> bytes;
    kvplane::cuda::SegmentView keys, values;
};

template <class W, int bits>
struct SumsOf : kvplane::cuda::TileMath<W, bits, SumsInput::channels, bits, SumsInput::channels> {
    using Base = kvplane::cuda::TileMath<W, bits, SumsInput::channels, bits, SumsInput::channels>;
    using typename Base::Float;
    using typename Base::Int;
    using typename Base::Word;
    static constexpr int key_sums = 64, value_sums = 8 * Base::blocks, count = key_sums + value_sums;

    /// input: bytes of SumsInput in memory that the lanes read.
    KVPLANE_DEVICE static void make(const std::byte* input, const kvplane::cuda::SegmentView& keys,
                                    const kvplane::cuda::SegmentView& values, Int (&to)[count]) {
        const std::byte* const factors = input + 2 * SumsInput::tile_bytes;
        Word of_keys[Base::key_octets][4];
        KVPLANE_UNROLL
        for (int o = 0; o < Base::key_octets; ++o)
            W::load16(factors, W::lane() * 16u + std::uint32_t(512 * o), of_keys[o]);
        Int sums[16][4];
        Base::zero(sums);
        KVPLANE_UNROLL
        for (int round = 0; round < Base::key_octets / (Base::key_chunk / 8); ++round)
            Base::template add_round<bits, Base::key_chunk>(
                input, keys, of_keys + round * (Base::key_chunk / 8), round, 0, 4, sums);
        KVPLANE_UNROLL
        for (int i = 0; i < key_sums; ++i) to[i] = sums[i / 4][i % 4];

        Word of_values[4][4];
        KVPLANE_UNROLL
        for (int m = 0; m < 4; ++m)
            W::load16(factors + SumsInput::factor_bytes / 2, W::lane() * 16u + std::uint32_t(512 * m),
                      of_values[m]);
        KVPLANE_UNROLL
        for (int b = 0; b < Base::blocks; ++b) {
            // As floats, each of a whole number by one rounding.
            Float out[4][2];
            KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) out[i / 2][i % 2] = Float(0.0f);
            Base::template add_block<bits>(input + SumsInput::tile_bytes, values, of_values, Float(1.0f), b,
                                           out);
            KVPLANE_UNROLL
            for (int i = 0; i < 8; ++i) to[key_sums + 8 * b + i] = W::to_int(W::as_word(out[i / 2][i % 2]));
        }
    }
};

/// Adds numbers of all lanes, in the order of sums. at(i, lane): sum i of a lane.
template <class At>
void add_sums(ByteHash& hash, int count, const At& at) {
    for (int i = 0; i < count; ++i)
        for (int lane = 0; lane < 32; ++lane) {
            const std::int32_t number = at(i, lane);
            hash.add(&number, sizeof number);
        }
}

/// body.operator()<bits>() at every width of codes.
template <class Body>
void at_every_width_of_codes(const Body& body) {
    [&]<int... less>(std::integer_sequence<int, less...>) {
        (body.template operator()<less + 1>(), ...);
    }
    (std::make_integer_sequence<int, 8>{});
}

}  // namespace kvplane_test
