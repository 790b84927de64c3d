// kvplane/attention/kernels/amx.hpp: integer sums over planes with AMX.
//
// Fields of 16 tokens (or channels) and 64 channels (or tokens) are spread to bytes, which makes one tile, and 16
// rows of factors make another. One instruction then does what takes AVX-512 256. Fewer than 8 rows do not make up
// for spreading; they take the kernels of AVX-512. Sums are exact, so both are equal bit for bit.
//
// Kernels take the tiles as a type, so that tests can run them on tiles in plain C++.
#pragma once

#include "kvplane/attention/kernels/amx_tiles.hpp"
#include "kvplane/attention/kernels/avx512_two_planes.hpp"

#if defined(KVPLANE_X86)
#include <algorithm>
#include <cstring>

namespace kvplane::detail::amx {

/// What a tile holds of the depth of a dot product.
inline constexpr Index tile_depth = tile_row_bytes;

/// A group of up to 16 rows of factors, `depth` of each.
struct RowGroup {
    const std::int8_t* factors;
    Index stride, rows, depth;
};

/// Factors [chunk tile_depth, ...) of a group into a tile; what is not there is 0.
template <class Tiles, int to>
KVPLANE_TARGET_AVX512 inline void load_factors(const RowGroup& group, Index chunk) noexcept {
    const Index first = chunk * tile_depth, count = std::min(tile_depth, group.depth - first);
    if (group.rows == tile_rows && count == tile_depth)
        return Tiles::template load<to>(group.factors + first, group.stride);
    alignas(64) std::int8_t padded[tile_bytes] = {};
    for (Index r = 0; r < group.rows; ++r)
        std::memcpy(padded + r * tile_row_bytes, group.factors + r * group.stride + first,
                    static_cast<std::size_t>(count));
    Tiles::template load<to>(padded, tile_row_bytes);
}

/// The fields of 16 / fields units, of which `units` are there, as 16 rows of bytes.
template <int width>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void spread(const std::byte* from, const std::byte* next, Index units,
                                                 std::uint8_t* to) noexcept {
    constexpr int fields = 8 / width, most = tile_rows / fields;
    const __m512i mask = _mm512_set1_epi8((1 << width) - 1);
    for (int u = 0; u < most; ++u) {
        __m512i unit = _mm512_setzero_si512();
        if (u < units) {
            unit = _mm512_loadu_si512(from + u * 64);
            _mm_prefetch(reinterpret_cast<const char*>(next + u * 64), _MM_HINT_T1);
        }
#pragma GCC unroll 8
        for (int i = 0; i < fields; ++i)
            _mm512_store_si512(to + (u * fields + i) * 64,
                               _mm512_and_si512(avx512::shifted_right(unit, i * width), mask));
    }
}
/// The same of codes in two planes.
template <int width, int below>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void spread_pair(const PlanePairCall& call, Index block, Index chunk,
                                                      std::uint8_t* to) noexcept {
    constexpr int fields = 8 / width, fields_below = 8 / below, each = tile_rows / fields,
                  each_below = tile_rows / fields_below;
    const Index at = block * call.first_block_units + chunk * each,
                at_below = block * call.second_block_units + chunk * each_below,
                units_below = call.second_units - chunk * each_below;
    spread<width>(call.first + at * 64, call.first_next + at * 64, call.first_units - chunk * each, to);
    const __m512i mask = _mm512_set1_epi8((1 << below) - 1);
    for (int u = 0; u < std::min<Index>(each_below, units_below); ++u) {
        const __m512i unit = _mm512_loadu_si512(call.second + (at_below + u) * 64);
        _mm_prefetch(reinterpret_cast<const char*>(call.second_next + (at_below + u) * 64), _MM_HINT_T1);
#pragma GCC unroll 8
        for (int i = 0; i < fields_below; ++i) {
            std::uint8_t* const row = to + (u * fields_below + i) * 64;
            _mm512_store_si512(row, avx512::either(mask, avx512::shifted_right(unit, i * below),
                                                   avx512::shifted_left(_mm512_load_si512(row), below)));
        }
    }
}

/// Where sums go: [block][block_stride], of which it has rows of 16. add: to what is there.
struct SumsOfRows {
    std::int32_t* sums;
    Index block_stride;
    int shift;
    bool add;
};

template <class Tiles, int sum>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void store_block(Index rows, const SumsOfRows& to,
                                                      std::int32_t* sums) noexcept {
    if (rows == tile_rows && to.shift == 0 && !to.add)
        return Tiles::template store<sum>(sums, tile_row_bytes);
    alignas(64) std::int32_t found[tile_rows * 16];
    Tiles::template store<sum>(found, tile_row_bytes);
    for (Index r = 0; r < rows; ++r) {
        avx512::Words row = (avx512::Words)_mm512_load_si512(found + r * 16) << to.shift;
        if (to.add) row += (avx512::Words)_mm512_loadu_si512(sums + r * 16);
        _mm512_storeu_si512(sums + r * 16, (__m512i)row);
    }
}

/// Chunks of the depth that are summed in tiles.
inline constexpr Index most_chunks = 16;

/// Adds up to two groups' products with one block's codes to tiles 0 and 1. Factors of up to two chunks are in
/// tiles 4 and 5, and 6 and 7, already.
template <class Tiles, int groups>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void dot_block(const RowGroup (&group)[2], Index first_chunk,
                                                    Index chunks, const std::uint8_t* codes) noexcept {
    Tiles::template zero<0>();
    if constexpr (groups == 2) Tiles::template zero<1>();
    for (Index chunk = 0; chunk < (chunks > 2 ? chunks : 1); ++chunk) {
        Tiles::template load<2>(codes + chunk * tile_bytes, tile_row_bytes);
        if (chunks > 2) load_factors<Tiles, 4>(group[0], first_chunk + chunk);
        Tiles::template dot<0, 4, 2>();
        if constexpr (groups == 2) {
            if (chunks > 2) load_factors<Tiles, 6>(group[1], first_chunk + chunk);
            Tiles::template dot<1, 6, 2>();
        }
    }
    if (chunks != 2) return;
    Tiles::template load<3>(codes + tile_bytes, tile_row_bytes);
    Tiles::template dot<0, 5, 3>();
    if constexpr (groups == 2) Tiles::template dot<1, 7, 3>();
}

/// The sums of up to two groups over up to most_chunks chunks. Codes are made some blocks before they are read: a
/// tile is read long after it has left the core's queue of stores.
template <class Tiles, int groups, class Spread>
KVPLANE_TARGET_AVX512 inline void sum_groups(const RowGroup (&group)[2], Index blocks, Index first_chunk,
                                             Index chunks, const Spread& spread, SumsOfRows to) noexcept {
    alignas(64) std::uint8_t codes[most_chunks * tile_bytes];
    const Index kept = std::clamp<Index>(most_chunks / chunks, 1, 4), block_bytes = chunks * tile_bytes;
    if (chunks <= 2) {
        load_factors<Tiles, 4>(group[0], first_chunk);
        if constexpr (groups == 2) load_factors<Tiles, 6>(group[1], first_chunk);
    }
    if (chunks == 2) {
        load_factors<Tiles, 5>(group[0], first_chunk + 1);
        if constexpr (groups == 2) load_factors<Tiles, 7>(group[1], first_chunk + 1);
    }
    for (Index made = 0; made < blocks + kept - 1; ++made) {
        for (Index chunk = 0; made < blocks && chunk < chunks; ++chunk)
            spread(made, first_chunk + chunk, codes + made % kept * block_bytes + chunk * tile_bytes);
        const Index block = made - (kept - 1);
        if (block < 0) continue;
        dot_block<Tiles, groups>(group, first_chunk, chunks, codes + block % kept * block_bytes);
        std::int32_t* const sums = to.sums + block * to.block_stride;
        store_block<Tiles, 0>(group[0].rows, to, sums);
        if constexpr (groups == 2) store_block<Tiles, 1>(group[1].rows, to, sums + tile_rows * 16);
    }
}

/// The sums of all rows. spread(block, chunk, to) makes a tile of codes.
template <class Tiles, class Spread>
KVPLANE_TARGET_AVX512 inline void sum_rows(const RowGroup& all, Index blocks, const Spread& spread,
                                           SumsOfRows to) noexcept {
    const Index all_chunks = (all.depth + tile_depth - 1) / tile_depth;
    for (Index chunk = 0; chunk < all_chunks; chunk += most_chunks, to.add = true)
        for (Index row = 0; row < all.rows; row += 2 * tile_rows) {
            const Index rows = all.rows - row, chunks = std::min(most_chunks, all_chunks - chunk);
            const std::int8_t* const factors = all.factors + row * all.stride;
            const RowGroup group[2] = {{factors, all.stride, std::min<Index>(tile_rows, rows), all.depth},
                                       {factors + tile_rows * all.stride, all.stride,
                                        std::min<Index>(tile_rows, rows - tile_rows), all.depth}};
            SumsOfRows of_rows = to;
            of_rows.sums += row * 16;
            if (rows > tile_rows)
                sum_groups<Tiles, 2>(group, blocks, chunk, chunks, spread, of_rows);
            else
                sum_groups<Tiles, 1>(group, blocks, chunk, chunks, spread, of_rows);
        }
}

template <class Tiles, int width>
KVPLANE_TARGET_AVX512 inline void plane_dot_on(const PlaneDotCall& call) noexcept {
    constexpr int fields = 8 / width, each = tile_rows / fields;
    const auto spread_plane = [&](Index block, Index chunk, std::uint8_t* to) KVPLANE_TARGET_AVX512 {
        const Index at = (block * call.block_units + chunk * each) * 64;
        spread<width>(call.plane + at, call.next + at, call.units - chunk * each, to);
    };
    sum_rows<Tiles>({call.factors, call.factor_stride, call.rows, call.units * fields * 4}, call.blocks,
                    spread_plane, {call.sums, call.sum_rows * 16, call.shift, call.add});
}

template <class Tiles, int width, int below>
KVPLANE_TARGET_AVX512 inline void pair_dot_on(const PlanePairCall& call) noexcept {
    constexpr int fields = 8 / width;
    const auto spread_codes = [&](Index block, Index chunk, std::uint8_t* to) KVPLANE_TARGET_AVX512 {
        spread_pair<width, below>(call, block, chunk, to);
    };
    sum_rows<Tiles>({call.factors, call.factor_stride, call.rows, call.first_units * fields * 4}, call.blocks,
                    spread_codes, {call.sums, call.sum_rows * 16, 0, false});
    if (call.low_rows == 0) return;
    plane_dot_on<Tiles, width>({.plane = call.first,
                                .next = call.first_next,
                                .blocks = call.blocks,
                                .block_units = call.first_block_units,
                                .units = call.first_units,
                                .factors = call.factors + call.rows * call.factor_stride,
                                .factor_stride = call.factor_stride,
                                .rows = call.low_rows,
                                .shift = call.shift,
                                .sums = call.sums + call.rows * 16,
                                .sum_rows = call.sum_rows,
                                .add = false});
}

template <int width>
inline void plane_dot(const PlaneDotCall& call) noexcept {
    if (call.rows < least_rows) return avx512::plane_dot<width>(call);
    const TileScope scope;
    plane_dot_on<Tiles, width>(call);
}
template <int width, int below, PlaneDot::Pair few_rows>
inline void pair_dot(const PlanePairCall& call) noexcept {
    if (call.rows < least_rows) return few_rows(call);
    const TileScope scope;
    pair_dot_on<Tiles, width, below>(call);
}

inline constexpr PlaneDot plane_dots{
    .name = "amx",
    .of_width = {plane_dot<1>, plane_dot<2>, plane_dot<4>},
    .pairs = {{{.bits = 3, .dot = pair_dot<2, 1, avx512::three_bits_dot>},
               {.bits = 5, .dot = pair_dot<4, 1, avx512::two_planes_dot<1>>},
               {.bits = 6, .dot = pair_dot<4, 2, avx512::two_planes_dot<2>>},
               {.bits = 8, .dot = pair_dot<4, 4, avx512::two_planes_dot<4>>}}},
    .some = avx512::some_dot,
    .order = avx512::order_weights,
    .factors = avx512::make_factors};

}  // namespace kvplane::detail::amx
#endif
