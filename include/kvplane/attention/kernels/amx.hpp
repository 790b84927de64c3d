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

/// One block's sums of a group over `chunks` tiles of codes, in tile `sum`. Factors of up to two chunks are in
/// tiles 4 and 5.
template <class Tiles, int sum, int codes>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void dot_block(const RowGroup& group, Index first_chunk, Index chunks,
                                                    const std::uint8_t* from) noexcept {
    Tiles::template zero<sum>();
    Tiles::template load<codes>(from, tile_row_bytes);
    if (chunks > 2) load_factors<Tiles, 4>(group, first_chunk);
    Tiles::template dot<sum, 4, codes>();
    if (chunks == 2) {
        Tiles::template load<codes + 1>(from + tile_bytes, tile_row_bytes);
        Tiles::template dot<sum, 5, codes + 1>();
    }
    for (Index chunk = 1; chunks > 2 && chunk < chunks; ++chunk) {
        load_factors<Tiles, 4>(group, first_chunk + chunk);
        Tiles::template load<codes>(from + chunk * tile_bytes, tile_row_bytes);
        Tiles::template dot<sum, 4, codes>();
    }
}
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

/// The sums of all rows. spread(block, chunk, to) makes a tile of codes. Many are made before the first is read:
/// a tile is read long after it has left the core's queue of stores.
template <class Tiles, class Spread>
KVPLANE_TARGET_AVX512 inline void sum_rows(const RowGroup& all, Index blocks, const Spread& spread,
                                           SumsOfRows to) noexcept {
    constexpr Index room = 16;
    alignas(64) std::uint8_t codes[room * tile_bytes];
    const Index all_chunks = (all.depth + tile_depth - 1) / tile_depth;
    for (Index first_chunk = 0; first_chunk < all_chunks; first_chunk += room, to.add = true) {
        const Index chunks = std::min(room, all_chunks - first_chunk), together = room / chunks,
                    block_bytes = chunks * tile_bytes;
        for (Index first = 0; first < blocks; first += together) {
            const Index count = std::min(together, blocks - first);
            for (Index b = 0; b < count; ++b)
                for (Index chunk = 0; chunk < chunks; ++chunk)
                    spread(first + b, first_chunk + chunk, codes + b * block_bytes + chunk * tile_bytes);
            for (Index row = 0; row < all.rows; row += tile_rows) {
                const RowGroup group{all.factors + row * all.stride, all.stride,
                                     std::min<Index>(tile_rows, all.rows - row), all.depth};
                if (chunks <= 2) load_factors<Tiles, 4>(group, first_chunk);
                if (chunks == 2) load_factors<Tiles, 5>(group, first_chunk + 1);
                const auto sums = [&](Index b) { return to.sums + (first + b) * to.block_stride + row * 16; };
                // Two blocks at a time, so that one is multiplied while the other is loaded or stored.
                for (Index b = 0; b < count; b += 2) {
                    dot_block<Tiles, 0, 2>(group, first_chunk, chunks, codes + b * block_bytes);
                    if (b + 1 < count)
                        dot_block<Tiles, 1, 6>(group, first_chunk, chunks, codes + (b + 1) * block_bytes);
                    store_block<Tiles, 0>(group.rows, to, sums(b));
                    if (b + 1 < count) store_block<Tiles, 1>(group.rows, to, sums(b + 1));
                }
            }
        }
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
    .order = avx512::order_weights};

}  // namespace kvplane::detail::amx
#endif
