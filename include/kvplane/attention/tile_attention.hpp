// kvplane/attention/tile_attention.hpp: scores and weighted sums of one tile, without decoding it.
//
// With the grids' steps folded into the query, a score is a dot product of codes,
//
//   q.k' = sum_c q_c (lower_c + step_c / 2) + sum_c (q_c step_c) code_c
//
// (where grids of keys are by token, their steps multiply the sums instead: token_grids.hpp), and with the steps of
// values folded into the softmax weights, so is an output,
//
//   sum_t w_t v'_tc = sum_t w_t (lower_t + step_t / 2) + sum_t (w_t step_t) code_tc.
//
// The folded factors are small integers (factors.hpp), whose products with codes are summed in integers
// (kernels/). fp16 values in planes {8,4,4} have no grids: they are put together in registers and multiplied
// as floats (half_tile.hpp). A read of part of the planes counts what it leaves out as its middle.
//
// Everything here is noexcept, allocates nothing, and gives the same integers on every instruction set.
#pragma once

#include "kvplane/attention/plane_groups.hpp"
#include "kvplane/attention/scratch.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane::detail {

/// Whether tile_scores() reads tiles of keys of this format: fp16, grids per channel, or grids per token over the
/// head or over multiples of 32 channels, which are whole units of all planes.
bool reads_key_planes(const TileFormat& format) noexcept;
/// Whether add_tile_values() reads tiles of values of this format: one segment of channels, of fp16, or of 1
/// to 8 bits with grids per token over the head or over multiples of 16 channels, or such runs of tokens.
bool reads_value_planes(const TileFormat& format) noexcept;

/// scores[r * 128 + t] = offsets[r] + queries[r] . k'_t for all 128 tokens of a tile of keys.
/// Where grids are per token, all of their planes are read.
///   queries  [row][channels], at most row_block_rows rows
///   offsets  [row]
///   scores   [row][128]
void tile_scores(Isa isa, const TileFormat& format, const TileRead& read, RowView<const float> queries,
                 const float* offsets, AttentionScratch& scratch, float* scores) noexcept;

/// output[r][c] += sum over t of weights[r * 128 + t] v'_tc of a tile of values.
/// Where tokens have different widths, all of their planes are read.
///   weights  [row][128], not negative, 0 where there is no token
///   output   [row][channels], padded to whole 16s
void add_tile_values(Isa isa, const TileFormat& format, const TileRead& read, const float* weights,
                     AttentionScratch& scratch, RowView<float> output) noexcept;

/// Fetches the grids of a tile that is read next; its planes are fetched unit by unit.
inline void prefetch_grids(const TileFormat& format, const std::byte* next) noexcept {
    for (Index at = 0; at < format.grid_bytes(); at += unit_bytes) __builtin_prefetch(next + at, 0, 2);
}

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/attention/impl/tile_attention.hpp"
#endif
