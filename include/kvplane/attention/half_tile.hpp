// kvplane/attention/half_tile.hpp: sums of products with fp16 values that are stored as planes {8,4,4}.
//
// A plane of 8 bits is an fp16 number with 2 bits of fraction (sign, exponent, and those two). With the
// second plane it has 6, with the third all 10. In the place where fp32 has its sign, exponent and fraction,
// and times 2^112, these bits are the number itself, subnormals included. What is not read is filled with its
// midpoint, as TileCoder::decode does. Queries and weights are taken as they are: fp16 has no grids to fold
// into them.
//
//   keys     a lane is a token, and the sum goes over channels
//   values   a lane is a channel, and the sum goes over tokens
//
// Accumulators: fp32.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "kvplane/attention/kernels/plane_dot.hpp"
#include "kvplane/attention/lanes.hpp"
#include "kvplane/attention/plane_groups.hpp"
#include "kvplane/attention/scratch.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane::detail {

/// Channels (keys) or tokens (values) that a unit of the lower planes holds, and two of the first.
inline constexpr Index half_depth = 8;
/// The 2^112 that the bits are short of, in two parts: what a row's factors come times, and what its sums
/// go times.
struct HalfScale {
    float factors, sums;
};
/// Halves of it for factors of any ordinary size; larger ones take less, so that they stay finite.
constexpr HalfScale half_scale(float largest) noexcept {
    return largest < 0x1p60f ? HalfScale{0x1p56f, 0x1p56f} : HalfScale{0x1p-14f, 0x1p126f};
}

/// Where the planes of one block of 16 lanes begin, and where those of a block that is read next do.
struct HalfBlock {
    const std::byte* plane[PlaneSplit::max_planes];
    const std::byte* next[PlaneSplit::max_planes];
};

/// body(i, v, x) for the 8 values x of a unit in each of 16 / Lanes vectors of lanes, of which `have` planes are read.
template <int Lanes, int have, class Body>
KVPLANE_INLINE void for_half_values(const HalfBlock& block, Index unit, const Body& body) {
    for (int v = 0; v < unit_lanes / Lanes; ++v) {
        Words<Lanes> first[2], second{}, third{};
        const Index at = unit * unit_bytes + v * Lanes * 4;
        load(first[0], block.plane[0] + unit * unit_bytes + at);
        load(first[1], block.plane[0] + (unit + 1) * unit_bytes + at);
        if constexpr (have > 1) load(second, block.plane[1] + at);
        if constexpr (have > 2) load(third, block.plane[2] + at);
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
            body(i, v, (Floats<Lanes>)bits);
        }
    }
}

/// sums[row] += the products of 8 values.
template <int Lanes, int rows, int have>
KVPLANE_INLINE void half_unit(const HalfBlock& block, Index unit, const float* const* factors,
                              Floats<Lanes> (&sums)[rows][unit_lanes / Lanes]) {
    for_half_values<Lanes, have>(block, unit, [&](int i, int v, const Floats<Lanes>& x) KVPLANE_BODY {
        for (int r = 0; r < rows; ++r) sums[r][v] += x * factors[r][unit * half_depth + i];
    });
}

/// Fetches the planes of one unit that is read next.
template <int have>
KVPLANE_INLINE void fetch_half_unit(const HalfBlock& block, Index unit) {
    __builtin_prefetch(block.next[0] + 2 * unit * unit_bytes, 0, 2);
    __builtin_prefetch(block.next[0] + (2 * unit + 1) * unit_bytes, 0, 2);
    if (have > 1) __builtin_prefetch(block.next[1] + unit * unit_bytes, 0, 2);
    if (have > 2) __builtin_prefetch(block.next[2] + unit * unit_bytes, 0, 2);
}

/// The groups of one depth. What is read next is fetched in step, because all fetches at once would wait for
/// memory.
template <int Lanes, int rows, int have>
KVPLANE_INLINE void half_units(const HalfBlock& block, const GroupsByDepth& units, const GroupsByDepth& next,
                               const float* const* factors, Floats<Lanes> (&sums)[rows][unit_lanes / Lanes]) {
    const Index count = units.count[have], fetched = next.count[have];
    for (Index i = 0; i < std::max(count, fetched); ++i) {
        if (i < fetched) fetch_half_unit<have>(block, next.group[have][i]);
        if (i < count) half_unit<Lanes, rows, have>(block, units.group[have][i], factors, sums);
    }
}

/// Where the sums of some rows go: to[r][lane] = more[r] (or, without fresh, what is there) + the sums.
struct HalfSums {
    const float* scale;  ///< [row] the sums' part of the scale
    bool fresh;
    const float* more;
    RowView<float> to;

    HalfSums from_row(Index row) const noexcept {
        return {scale + row, fresh, more ? more + row : nullptr, to.from(row)};
    }
};
template <int Lanes, int rows>
KVPLANE_INLINE void store_half_sums(const Floats<Lanes> (&sums)[rows][unit_lanes / Lanes],
                                    const HalfSums& where) {
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < unit_lanes / Lanes; ++v) {
            float* const at = where.to[r] + v * Lanes;
            Floats<Lanes> sum = sums[r][v] * where.scale[r], there;
            if (where.fresh) {
                if (where.more) sum += where.more[r];
            } else {
                load(there, at);
                sum += there;
            }
            store(at, sum);
        }
}

/// The sums of one block. units: the groups of which 1, 2 and 3 planes are read, taken one depth after another,
/// because a branch on each would be a guess. next: the same of the block that is read next.
///   factors  [row][8 groups], times their part of the scale
template <int Lanes, int rows>
KVPLANE_INLINE void half_block(const HalfBlock& block, const GroupsByDepth& units, const GroupsByDepth& next,
                               RowView<const float> factors, const HalfSums& where) {
    Floats<Lanes> sums[rows][unit_lanes / Lanes]{};
    const float* row[rows];
    for (int r = 0; r < rows; ++r) row[r] = factors[r];
    half_units<Lanes, rows, 3>(block, units, next, row, sums);
    half_units<Lanes, rows, 2>(block, units, next, row, sums);
    half_units<Lanes, rows, 1>(block, units, next, row, sums);
    store_half_sums<Lanes, rows>(sums, where);
}

/// From so many rows on a block's values are put together once for all of them.
inline constexpr Index least_half_rows = 8;
/// The values of one block, of which all planes are read, to [8 groups][16].
template <int Lanes>
KVPLANE_INLINE void put_together(const HalfBlock& block, Index groups, float* to) {
    for (Index u = 0; u < groups; ++u) {
        fetch_half_unit<3>(block, u);
        for_half_values<Lanes, 3>(block, u, [&](int i, int v, const Floats<Lanes>& x) KVPLANE_BODY {
            store(to + (u * half_depth + i) * unit_lanes + v * Lanes, x);
        });
    }
}
/// The sums of one block, of `count` values put together: those of half_block(), bit for bit.
template <int Lanes, int rows>
KVPLANE_INLINE void sum_together(const float* values, Index count, RowView<const float> factors,
                                 const HalfSums& where) {
    Floats<Lanes> sums[rows][unit_lanes / Lanes]{};
    const float* row[rows];
    for (int r = 0; r < rows; ++r) row[r] = factors[r];
    for (Index i = 0; i < count; ++i)
        for (int v = 0; v < unit_lanes / Lanes; ++v) {
            Floats<Lanes> x;
            load(x, values + i * unit_lanes + v * Lanes);
            for (int r = 0; r < rows; ++r) sums[r][v] += x * row[r][i];
        }
    store_half_sums<Lanes, rows>(sums, where);
}

/// Sums of products with the fp16 values of one segment, for all its blocks.
inline void half_sums(Isa isa, const TileFormat& format, const TileFormat::Placed& segment,
                      const TileRead& read, const SegmentProduct& product,
                      AttentionScratch& scratch) noexcept {
    const bool keys = format.side() == TileSide::keys;
    const Index rows = product.x.rows, count = grouped_elements(format, segment),
                groups = (count + half_depth - 1) / half_depth,
                blocks = keys ? tile_tokens / unit_lanes : (segment.channels + unit_lanes - 1) / unit_lanes;
    const RowView<float> x = scratch.rows();
    std::array<float, row_block_rows> back{};
    for (Index r = 0; r < rows; ++r) {
        // Weights of values are at most 1.
        const HalfScale scale = half_scale(keys ? largest_magnitude(isa, product.x[r], count) : 1.0f);
        back[static_cast<std::size_t>(r)] = scale.sums;
        for (Index i = 0; i < count; ++i) x[r][i] = product.x[r][i] * scale.factors;
        std::fill(x[r] + count, x[r] + groups * half_depth, 0.0f);
    }
    HalfBlock first{};
    Index block_bytes[PlaneSplit::max_planes]{};
    for (int p = 0; p < segment.split.count; ++p) {
        const Index at = segment.plane_at[static_cast<std::size_t>(p)];
        first.plane[p] = read.tile + at;
        first.next[p] = read.next + at;
        const Index depth = TileFormat::unit_depth(segment.split[p]);
        block_bytes[p] = (count + depth - 1) / depth * unit_bytes;
    }
    const GroupsByDepth have = scratch.by_depth(0, read.planes, groups, segment.split.count),
                        next = read.planes_of_next() == read.planes
                                   ? have
                                   : scratch.by_depth(1, read.next_planes, groups, segment.split.count);
    const auto each_block = [=](const auto& body) KVPLANE_BODY {
        HalfBlock block = first;
        HalfSums where{back.data(), product.fresh, product.more, product.to};
        for (Index b = 0; b < blocks; ++b) {
            body(block, where);
            where.to.data += unit_lanes;
            for (int p = 0; p < PlaneSplit::max_planes; ++p) {
                block.plane[p] += block_bytes[p];
                block.next[p] += block_bytes[p];
            }
        }
    };
    if (rows >= least_half_rows && have.count[3] == groups) {
        run_on(isa, [&, values = scratch.values()](auto lanes) KVPLANE_BODY {
            constexpr int together = lanes == 16 ? 8 : 4;  // as many sums as an addition takes cycles, twice
            each_block([&](const HalfBlock& block, const HalfSums& where) KVPLANE_BODY {
                put_together<lanes>(block, groups, values);
                Index row = 0;
                for (; row + together <= rows; row += together)
                    sum_together<lanes, together>(values, groups * half_depth, x.from(row),
                                                  where.from_row(row));
                for (; row < rows; ++row)
                    sum_together<lanes, 1>(values, groups * half_depth, x.from(row), where.from_row(row));
            });
        });
        return;
    }
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        by_rows(rows, [&](auto together, Index row) KVPLANE_BODY {
            each_block([&](const HalfBlock& block, const HalfSums& where) KVPLANE_BODY {
                half_block<lanes, together>(block, have, next, x.from(row), where.from_row(row));
            });
        });
    });
}

}  // namespace kvplane::detail
