// kvplane/attention/half_planes.hpp: sums of products with fp16 values that are stored as planes {8,4,4}.
//
// A plane of 8 bits is an fp16 number with 2 bits of fraction (sign, exponent, and those two), with the next
// one it has 6, with the last all 10. In the place where fp32 has its sign, exponent and fraction, times
// 2^112, these bits are the number itself, subnormals included; what is not read is filled with its midpoint,
// as TileCoder::decode does. Keys: a lane is a token, the sum goes over channels. Values: a lane is a
// channel, the sum goes over tokens. Accumulators: fp32.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kvplane/attention/kernels/scalar.hpp"
#include "kvplane/simd/vector.hpp"
#include "kvplane/storage/tile.hpp"

namespace kvplane::detail::fused {

/// Channels (keys) or tokens (values) that a unit of the lower planes holds, and two of the first.
inline constexpr Index half_depth = 8;
/// Factors come times this, and sums go times this: together the 2^112 that the bits are short of.
inline constexpr float half_factor = 0x1p56f;

/// Where the planes of one block of 16 lanes begin, and where those of a block that is read next do.
struct HalfBlock {
    const std::byte* plane[3];
    const std::byte* ahead[3];
};

/// sums[row] += the products of 8 values of 16 / Lanes vectors of lanes, of which `have` planes are read.
template <int Lanes, int rows, int have>
KVPLANE_INLINE void half_unit(const HalfBlock& block, Index unit, const float* const* factors,
                              simd::Floats<Lanes> (&sums)[rows][unit_lanes / Lanes]) {
    using simd::Floats;
    using simd::Ints;
    using simd::Words;
    for (int v = 0; v < unit_lanes / Lanes; ++v) {
        Words<Lanes> first[2], second{}, third{};
        const Index at = unit * unit_bytes + v * Lanes * 4;
        simd::load(first[0], block.plane[0] + unit * unit_bytes + at);
        simd::load(first[1], block.plane[0] + (unit + 1) * unit_bytes + at);
        if constexpr (have > 1) simd::load(second, block.plane[1] + at);
        if constexpr (have > 2) simd::load(third, block.plane[2] + at);
#pragma GCC unroll 8
        for (int i = 0; i < half_depth; ++i) {
            // Bits 31 (sign) and 27 to 21, then 20 to 17, then 16 to 13.
            const int byte = 8 * (i % 4), nibble = byte + 4 * (i / 4);
            auto bits = (Words<Lanes>)((Ints<Lanes>)(first[i / 4] << (24 - byte)) >> 3) & 0x8FE00000u;
            if constexpr (have > 1)
                bits |= (nibble < 17 ? second << (17 - nibble) : second >> (nibble - 17)) & 0x001E0000u;
            if constexpr (have > 2)
                bits |= (nibble < 13 ? third << (13 - nibble) : third >> (nibble - 13)) & 0x0001E000u;
            if constexpr (have < 3) bits |= have == 1 ? 0x00100000u : 0x00010000u;
            const auto x = (Floats<Lanes>)bits;
            for (int r = 0; r < rows; ++r) sums[r][v] += x * factors[r][unit * half_depth + i];
        }
    }
}

/// Those of one depth. What is read next is fetched in step, for all at once would wait for memory.
template <int Lanes, int rows, int have>
KVPLANE_INLINE void half_units(const HalfBlock& block, const UnitsByDepth& units, const UnitsByDepth& ahead,
                               const float* const* factors,
                               simd::Floats<Lanes> (&sums)[rows][unit_lanes / Lanes]) {
    const Index count = units.count[have], fetched = ahead.count[have];
    for (Index i = 0; i < std::max(count, fetched); ++i) {
        if (i < fetched) {
            const Index u = ahead.unit[have][i];
            __builtin_prefetch(block.ahead[0] + 2 * u * unit_bytes, 0, 2);
            __builtin_prefetch(block.ahead[0] + (2 * u + 1) * unit_bytes, 0, 2);
            if (have > 1) __builtin_prefetch(block.ahead[1] + u * unit_bytes, 0, 2);
            if (have > 2) __builtin_prefetch(block.ahead[2] + u * unit_bytes, 0, 2);
        }
        if (i < count) half_unit<Lanes, rows, have>(block, units.unit[have][i], factors, sums);
    }
}

/// to[r * to_stride + lane] = more[r] (or, without fresh, what is there) + the sums of one block. factors:
/// rows x (8 units), times half_factor, `stride` apart. units: those of which 1, 2 and 3 planes are read, one
/// depth after another, for a branch on each would be a guess; ahead: likewise of the block that is read
/// next.
template <int Lanes, int rows>
KVPLANE_INLINE void half_block(const HalfBlock& block, const UnitsByDepth& units, const UnitsByDepth& ahead,
                               const float* factors, Index stride, bool fresh, const float* more, float* to,
                               Index to_stride) {
    constexpr int vectors = unit_lanes / Lanes;
    simd::Floats<Lanes> sums[rows][vectors]{};
    const float* row[rows];
    for (int r = 0; r < rows; ++r) row[r] = factors + r * stride;
    half_units<Lanes, rows, 3>(block, units, ahead, row, sums);
    half_units<Lanes, rows, 2>(block, units, ahead, row, sums);
    half_units<Lanes, rows, 1>(block, units, ahead, row, sums);
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vectors; ++v) {
            float* const at = to + r * to_stride + v * Lanes;
            simd::Floats<Lanes> sum = sums[r][v] * half_factor, there;
            if (fresh) {
                if (more) sum += more[r];
            } else {
                simd::load(there, at);
                sum += there;
            }
            simd::store(at, sum);
        }
}

}  // namespace kvplane::detail::fused
