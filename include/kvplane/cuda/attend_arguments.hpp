// kvplane/cuda/attend_arguments.hpp: what attention kernels take: plain structs of pointers and numbers, and
// the seam between the host's compiler, which plans attention (cuda/device_attention.cuh), and nvcc, which
// compiles the kernels (cuda/attend.cuh).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/latent_view.hpp"
#include "kvplane/cuda/tile_views.hpp"

struct CUstream_st;

namespace kvplane::cuda {

/// All that a kernel knows of a layer.
struct LayerView {
    std::int32_t kv_heads, query_heads, key_head_dim, value_head_dim;
    KeyTileView keys;
    ValueTileView values;
    std::int32_t head_stride,
        value_offset;         ///< in a page: from head to head, and from a head's keys to its values
    std::int32_t rotated_at;  ///< where Rotation::by_tile: the page's byte for head 0
    Rotation rotates_keys;
    bool rotates_values;
    OutsideView sinks, recent;
    LatentView latents;  ///< where keys are in latents; `keys` then has the most bytes of any head's alone
};

namespace detail {

/// Numbers of heads, [tokens][heads][head_dim], of a type of arguments.hpp; strides in elements.
struct NumbersView {
    void* data;
    std::int32_t type;
    std::int64_t token_stride, head_stride, channel_stride;
};

/// Query rows that a block takes, and warps that it has at most.
inline constexpr int rows_of_block = 8, most_warps = 8;

/// A sequence of the batch.
struct SequenceTask {
    const DeviceTile* tiles;
    std::int32_t skip_from, skip;  ///< behind so many tiles, that many are seen by no query
    std::int32_t tile_count;       ///< of those that are
    const std::byte* sinks;
    const std::byte* const* recent;  ///< pages, the first of which is page `recent_page` of the batch
    std::int32_t recent_page;
    std::int32_t sink_count, recent_first, recent_count;
    std::int32_t hidden_from, hidden_to;
    std::int32_t position, query_row, query_tokens;
    std::uint32_t bias_at;  ///< the first number of the sequence's bias
    std::int32_t tokens;
};

/// What one block does.
struct WorkItem {
    SequenceTask sequence;  ///< here, and not by number, for that would be one more wait at a block's begin
    std::int32_t head, first_row;
    std::int32_t first_tile, end_tile;
    std::int32_t part, parts;
    std::int32_t partial;  ///< the first of the head's parts among all
    std::int32_t counter;  ///< of the head's parts that have ended
};

struct AttendArguments {
    LayerView layer;
    const WorkItem* items;
    float* partials;  ///< [part]: [8][value_head_dim], then 8 largest scores, 8 sums and 8 errors
    std::uint32_t* counters;
    NumbersView queries, output;
    float* log_sum_exp;   ///< [query row][query head]
    float* error_bounds;  ///< the same, of reads that leave something out; nullptr: none wanted
    float scale, softcap;
    std::int32_t window, window_sinks;
    bool causal;
    const float *sink_logits, *alibi_slopes, *bias;
    const float *key_signs, *value_signs;  ///< of the rotations
    /// Of a block's memory, in bytes: two slots a warp, then query rows as they are, rotated, and with RoPE's
    /// pairs exchanged, the table of the head's latents, and what each warp has beside its slots.
    std::uint32_t slot_bytes, query_stride, partners_at, head_at, warps_at, warp_bytes;
    std::int32_t most_rows;  ///< query rows of a key head
};

/// Whether there is a kernel that is made for the layer's widths: with keys in channels it keeps no factors
/// in memory.
bool is_made(const AttendArguments& arguments);
/// Launches attention with the kernel that is made for the layer's widths, or that for all. `bytes`: of
/// shared memory. Returns a cudaError_t. Defined by cuda/attend.cuh.
int launch(const AttendArguments& arguments, int blocks, int warps, std::uint32_t bytes, CUstream_st* stream);

}  // namespace detail
}  // namespace kvplane::cuda
