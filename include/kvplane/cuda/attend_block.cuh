// kvplane/cuda/attend_block.cuh: what a block of attention does before and after its warps go through their
// tiles, for nvcc: queries, tokens outside tiles, and how parts are put together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/attend_arguments.hpp"
#include "kvplane/cuda/tile_math.cuh"
#include "kvplane/cuda/warp.cuh"

namespace kvplane::cuda {
namespace detail {

constexpr float log2_e = 1.44269504f;

__device__ inline float load_number(const NumbersView& rows, std::int64_t at) {
    if (rows.type == input_float) return static_cast<const float*>(rows.data)[at];
    if (rows.type == input_half) return __half2float(static_cast<const __half*>(rows.data)[at]);
    return __bfloat162float(static_cast<const __nv_bfloat16*>(rows.data)[at]);
}
__device__ inline void store_number(const NumbersView& rows, std::int64_t at, float x) {
    if (rows.type == input_float)
        static_cast<float*>(rows.data)[at] = x;
    else if (rows.type == input_half)
        static_cast<__half*>(rows.data)[at] = __float2half_rn(x);
    else
        static_cast<__nv_bfloat16*>(rows.data)[at] = __float2bfloat16_rn(x);
}

/// The rotation of transform/hadamard.hpp of one head in the memory of a block, by one warp.
__device__ inline void rotate_row(float* row, int channels, const float* signs, bool back) {
    const int lane = static_cast<int>(DeviceWarp::lane());
    for (int first = 0, size; first < channels; first += size) {
        size = 1;
        while (2 * size <= channels - first) size *= 2;
        float* const x = row + first;
        if (!back)
            for (int i = lane; i < size; i += 32) x[i] *= signs[first + i];
        __syncwarp();
        for (int half = 1; half < size; half *= 2) {
            for (int i = lane; i < size / 2; i += 32) {
                const int at = i / half * 2 * half + i % half;
                const float a = x[at], b = x[at + half];
                x[at] = a + b;
                x[at + half] = a - b;
            }
            __syncwarp();
        }
        const float scale = rsqrtf(static_cast<float>(size));
        for (int i = lane; i < size; i += 32) x[i] *= back ? scale * signs[first + i] : scale;
        __syncwarp();
    }
}

__device__ inline void add_share(float4& sum, float share, const float4& x) {
    sum.x += share * x.x;
    sum.y += share * x.y;
    sum.z += share * x.z;
    sum.w += share * x.w;
}

/// What T13 makes of the errors that warps gathered (cuda/aligned_math.cuh), as a share of the sum of
/// weights.
__device__ inline float certified_error(float share) {
    return share < 1.0f ? share / (1.0f - 0.5f * share) : 2.0f;
}

/// What the warps of a block tell each other of their rows.
struct BlockRows {
    float largest[most_warps][rows_of_block], sum[most_warps][rows_of_block];
    float error[most_warps][rows_of_block];  ///< of reads that are certified
    float total[3][rows_of_block];
    bool finite[rows_of_block];
    std::uint32_t ended;
};

/// A block, as each of its threads sees it.
template <class Math>
struct AttendBlock {
    const AttendArguments& arguments;
    BlockRows& shared;
    std::byte* const memory;         ///< of the block: `warp_bytes` for each warp, then queries
    const std::uint32_t warp_bytes;  ///< a multiple of 128
    const WorkItem& item;
    const int warps, warp, lane;
    const int group, rows;
    float *const plain, *const rotated;  ///< queries as they are, and rotated
    /// In a page, and bytes of a tile of keys that are read. Of latents each head has tiles of its own size,
    /// or all have one tile of keys.
    const std::int32_t key_at, value_at;
    const std::uint32_t key_bytes;

    __device__ AttendBlock(const AttendArguments& of, const WorkItem& work, BlockRows& rows_of, std::byte* at,
                           std::uint32_t bytes)
        : arguments(of),
          shared(rows_of),
          memory(at),
          warp_bytes(bytes),
          item(work),
          warps(static_cast<int>(blockDim.x / 32)),
          warp(static_cast<int>(threadIdx.x / 32)),
          lane(static_cast<int>(DeviceWarp::lane())),
          group(of.layer.query_heads / of.layer.kv_heads),
          rows(min(rows_of_block, item.sequence.query_tokens * group - item.first_row)),
          plain(reinterpret_cast<float*>(at + warps * bytes)),
          rotated(plain + rows_of_block * stride()),
          key_at(Math::in_latents ? latent_head()->key_at : work.head * of.layer.head_stride),
          value_at(Math::in_latents ? latent_head()->value_at : key_at + of.layer.value_offset),
          key_bytes(static_cast<std::uint32_t>(Math::in_latents ? latent_head()->keys.bytes
                                                                : of.layer.keys.bytes)) {}

    /// In the memory of the device.
    __device__ const LatentHead* latent_head() const {
        const LatentView& latents = arguments.layer.latents;
        return reinterpret_cast<const LatentHead*>(latents.table + item.head * latents.head_bytes);
    }

    __device__ int stride() const { return static_cast<int>(arguments.query_stride / 4); }
    __device__ const DeviceTile& place(int i) const {
        return item.sequence.tiles[i < item.sequence.skip_from ? i : i + item.sequence.skip];
    }
    __device__ const std::byte* key_tile(const std::byte* page) const { return page + key_at; }
    __device__ const std::byte* value_tile(const std::byte* page) const { return page + value_at; }
    __device__ QueryRowsView queries(bool turned) const {
        return {reinterpret_cast<const std::byte*>(turned ? rotated : plain), arguments.query_stride};
    }
    /// Whether the keys of a tile were rotated.
    __device__ bool turned(const std::byte* page) const {
        const LayerView& layer = arguments.layer;
        return layer.rotates_keys == Rotation::all || (layer.rotates_keys == Rotation::by_tile &&
                                                       page[layer.rotated_at + item.head] != std::byte{0});
    }

    /// Queries, as floats, scaled: as they are, and rotated where some keys are; for latents also with the
    /// channels of RoPE's pairs exchanged, and the table of the head. Ends with a barrier.
    __device__ void load_queries() const {
        const LayerView& layer = arguments.layer;
        const float in_score = arguments.scale * log2_e;
        for (int r = warp; r < rows_of_block; r += warps) {
            // Of paired rows 4 to 7 are rows 0 to 3 once more.
            const int of = Math::shares_rows ? r & 3 : r, row = item.first_row + of;
            const std::int64_t at = (item.sequence.query_row + row / group) * arguments.queries.token_stride +
                                    (item.head * group + row % group) * arguments.queries.head_stride;
            bool good = true;
            for (int c = lane; c < (Math::in_latents ? layer.latents.channels : layer.key_head_dim);
                 c += 32) {
                const float x =
                    of < rows && (!Math::in_latents || c < layer.key_head_dim)
                        ? load_number(arguments.queries, at + c * arguments.queries.channel_stride) * in_score
                        : 0.0f;
                good = good && fabsf(x) <= 1e30f;
                plain[r * stride() + c] = x;
            }
            good = __all_sync(~0u, good);
            if (!good)
                for (int c = lane; c < layer.key_head_dim; c += 32) plain[r * stride() + c] = 0.0f;
            if (lane == 0) shared.finite[r] = good;
            __syncwarp();
            if constexpr (Math::in_latents) exchange_partners(r);
            if (layer.rotates_keys == Rotation::none) continue;
            for (int c = lane; c < layer.key_head_dim; c += 32)
                rotated[r * stride() + c] = plain[r * stride() + c];
            __syncwarp();
            rotate_row(rotated + r * stride(), layer.key_head_dim, arguments.key_signs, false);
        }
        if constexpr (Math::in_latents)
            for (auto i = threadIdx.x; i < layer.latents.head_bytes / 16; i += blockDim.x)
                reinterpret_cast<uint4*>(memory + arguments.head_at)[i] =
                    reinterpret_cast<const uint4*>(latent_head())[i];
        __syncthreads();
    }
    __device__ void exchange_partners(int r) const {
        const LatentView& latents = arguments.layer.latents;
        const auto* const partners = reinterpret_cast<const std::int32_t*>(
            reinterpret_cast<const std::byte*>(latent_head()) + latents.partners_at);
        float* const to = reinterpret_cast<float*>(memory + arguments.partners_at) + r * stride();
        for (int c = lane; c < latents.channels; c += 32) to[c] = plain[r * stride() + partners[c]];
    }

    /// Of the lane's row.
    __device__ ScoreRules<DeviceWarp> rules() const {
        const SequenceTask& sequence = item.sequence;
        const int row = item.first_row + static_cast<int>(Math::row()),
                  row_token = min(row / group, sequence.query_tokens - 1),
                  row_head = item.head * group + row % group;
        ScoreRules<DeviceWarp> to{};
        to.position = sequence.position + row_token;
        to.softcap = arguments.softcap * log2_e;
        to.slope = arguments.alibi_slopes ? arguments.alibi_slopes[row_head] * log2_e : 0.0f;
        to.bias = arguments.bias;
        to.bias_row = sequence.bias_at + static_cast<std::uint32_t>(row_token * sequence.tokens);
        to.window = arguments.window;
        to.window_sinks = arguments.window_sinks;
        to.hidden_from = sequence.hidden_from;
        to.hidden_to = sequence.hidden_to;
        to.causal = arguments.causal;
        to.changes_scores = changes_scores();
        return to;
    }
    /// Whether the rules leave all scores of a tile as they are.
    __device__ bool is_plain(const DeviceTile& tile) const {
        const SequenceTask& sequence = item.sequence;
        const int last = tile.first + tile.tokens - 1;
        return !changes_scores() && tile.row == 0 && tile.tokens == tile_rows &&
               (!arguments.causal || last <= sequence.position) &&
               (arguments.window == 0 ||
                sequence.position + sequence.query_tokens - 1 - tile.first < arguments.window) &&
               (tile.first >= sequence.hidden_to || last < sequence.hidden_from);
    }
    __device__ bool changes_scores() const {
        return arguments.softcap > 0.0f || arguments.alibi_slopes || arguments.bias;
    }

    /// Tokens outside tiles: sinks, then recent ones.
    struct LooseToken {
        TokenRow<DeviceWarp> keys, values;
        int position;
    };
    __device__ int loose_tokens() const { return item.sequence.sink_count + item.sequence.recent_count; }
    __device__ LooseToken loose_token(int n) const {
        const LayerView& layer = arguments.layer;
        const SequenceTask& sequence = item.sequence;
        const int at = n - sequence.sink_count;
        const bool sink = at < 0;
        const std::byte* const page =
            sink ? sequence.sinks : sequence.recent[at / layer.recent.keys.capacity];
        const OutsideView& view = sink ? layer.sinks : layer.recent;
        const int in_page = sink ? n : at % layer.recent.keys.capacity;
        return {token_row<DeviceWarp>(view.keys, page, item.head, in_page),
                token_row<DeviceWarp>(view.values, page, item.head, in_page),
                sink ? n : sequence.recent_first + at};
    }
    /// The warp's part of them, four at a time.
    __device__ void add_loose(const ScoreRules<DeviceWarp>& rules, typename Math::State& state) const {
        const LayerView& layer = arguments.layer;
        const int loose = loose_tokens();
        KVPLANE_KEEP_ROLLED
        for (int first = 4 * (item.part * warps + warp); first < loose; first += 4 * item.parts * warps) {
            const int count = min(4, loose - first);
            TokenRow<DeviceWarp> of_values[4];
            float score[4];
            KVPLANE_KEEP_ROLLED
            for (int i = 0; i < count; ++i) {
                const LooseToken token = loose_token(first + i);
                of_values[i] = token.values;
                score[i] = Math::score_row(queries(layer.rotates_keys == Rotation::all), token.keys,
                                           layer.key_head_dim);
                score[i] = Math::ruled(rules, score[i], token.position, true);
            }
            Math::add_rows(of_values, score, count, layer.value_head_dim, state);
        }
    }

    /// Puts the warps' parts together, and those of the head's blocks, in their order, and writes the
    /// output. Each warp's output goes through its own memory. error: what the warp's reads are off by, in
    /// the units of its sum, where they are certified.
    __device__ void merge(const typename Math::State& state, float error) const {
        const LayerView& layer = arguments.layer;
        // The warps' parts, each in its own slots; then those of the block, four channels a thread.
        const int channels = layer.value_head_dim, fours = channels / 4;
        {
            float* const own = reinterpret_cast<float*>(memory + warp * warp_bytes);
            const int g = lane >> 2, t = lane & 3;
            if (!Math::shares_rows || g < 4) {
                KVPLANE_UNROLL
                for (int b = 0; b < Math::blocks; ++b) KVPLANE_UNROLL
                for (int j = 0; j < 2; ++j) {
                    const int channel = 32 * b + 8 * t + 4 * j;
                    if (channel < channels)
                        *reinterpret_cast<float4*>(own + g * channels + channel) = make_float4(
                            state.out[b][0][j], state.out[b][1][j], state.out[b][2][j], state.out[b][3][j]);
                }
                if (t == 0) {
                    shared.largest[warp][g] = state.softmax.largest;
                    shared.sum[warp][g] = state.softmax.sum;
                    shared.error[warp][g] = error;
                }
            }
        }
        __syncthreads();
        // What each warp's sums are multiplied by, and the largest score and the sum of each row.
        if (threadIdx.x < rows) {
            const auto r = threadIdx.x;
            float largest = shared.largest[0][r], sum = 0.0f, errors = 0.0f;
            for (int w = 1; w < warps; ++w) largest = fmaxf(largest, shared.largest[w][r]);
            for (int w = 0; w < warps; ++w) {
                const float share = DeviceWarp::exp2(shared.largest[w][r] - largest);
                sum += share * shared.sum[w][r];
                errors += share * shared.error[w][r];
                shared.largest[w][r] = share;
            }
            shared.total[0][r] = largest;
            shared.total[1][r] = sum;
            shared.total[2][r] = errors;
        }
        __syncthreads();
        // Of a head's part: [row][channels], then the largest scores, the sums, and the errors.
        const int part_size = rows_of_block * (channels + 3);
        float* const joined = plain;  // queries are done with
        float* const partial =
            arguments.partials + static_cast<std::int64_t>(item.partial + item.part) * part_size;
        for (int i = static_cast<int>(threadIdx.x); i < rows * fours; i += static_cast<int>(blockDim.x)) {
            const int r = i / fours;
            float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for (int w = 0; w < warps; ++w)
                add_share(out, shared.largest[w][r],
                          reinterpret_cast<const float4*>(memory + w * warp_bytes)[i]);
            if (item.parts == 1)
                reinterpret_cast<float4*>(joined)[i] = out;
            else
                __stcg(reinterpret_cast<float4*>(partial) + i, out);
        }
        if (item.parts > 1) {
            if (threadIdx.x < rows) {
                float* const numbers = partial + rows_of_block * channels + threadIdx.x;
                for (int i = 0; i < 3; ++i) __stcg(numbers + i * rows_of_block, shared.total[i][threadIdx.x]);
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                __threadfence();
                shared.ended = atomicAdd(arguments.counters + item.counter, 1u);
                __threadfence();
            }
            __syncthreads();
            if (shared.ended + 1 < static_cast<std::uint32_t>(item.parts)) return;
            // The last block of the head puts the parts together.
            if (threadIdx.x == 0) arguments.counters[item.counter] = 0;  // for the next launch
            const float* const parts =
                arguments.partials + static_cast<std::int64_t>(item.partial) * part_size;
            // [part][row], then sums and errors likewise.
            float* const shares = reinterpret_cast<float*>(memory);
            const int numbers_of_parts = item.parts * rows_of_block;
            for (int i = static_cast<int>(threadIdx.x); i < numbers_of_parts;
                 i += static_cast<int>(blockDim.x)) {
                const int p = i / rows_of_block, r = i % rows_of_block;
                const float* const numbers =
                    parts + static_cast<std::int64_t>(p) * part_size + rows_of_block * channels + r;
                for (int of = 0; of < 3; ++of)
                    shares[of * numbers_of_parts + i] =
                        r < rows ? __ldcg(numbers + of * rows_of_block) : 0.0f;
            }
            __syncthreads();
            if (threadIdx.x < rows) {
                const auto r = threadIdx.x;
                float largest = -1e30f, sum = 0.0f, errors = 0.0f;
                for (int p = 0; p < item.parts; ++p) largest = fmaxf(largest, shares[p * rows_of_block + r]);
                for (int p = 0; p < item.parts; ++p) {
                    float& share = shares[p * rows_of_block + r];
                    share = DeviceWarp::exp2(share - largest);
                    sum += share * shares[numbers_of_parts + p * rows_of_block + r];
                    errors += share * shares[2 * numbers_of_parts + p * rows_of_block + r];
                }
                shared.total[0][r] = largest;
                shared.total[1][r] = sum;
                shared.total[2][r] = errors;
            }
            __syncthreads();
            for (int i = static_cast<int>(threadIdx.x); i < rows * fours; i += static_cast<int>(blockDim.x)) {
                const int r = i / fours;
                float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 16
                for (int p = 0; p < item.parts; ++p)
                    add_share(out, shares[p * rows_of_block + r],
                              __ldcg(reinterpret_cast<const float4*>(parts + static_cast<std::int64_t>(p) *
                                                                                 part_size) +
                                     i));
                reinterpret_cast<float4*>(joined)[i] = out;
            }
        }
        __syncthreads();

        for (int r = warp; r < rows; r += warps) {
            float* const from = joined + r * channels;
            const int at_row = item.first_row + r, at_head = item.head * group + at_row % group;
            float largest = shared.total[0][r], sum = shared.total[1][r], shrink = 1.0f;
            if (arguments.sink_logits) {
                const float sink = arguments.sink_logits[at_head] * log2_e, raised = fmaxf(largest, sink);
                shrink = DeviceWarp::exp2(largest - raised);
                sum = sum * shrink + DeviceWarp::exp2(sink - raised);
                largest = raised;
            }
            const float inverse = sum > 0.0f ? shrink / sum : 0.0f;
            for (int c = lane; c < channels; c += 32)
                from[c] = shared.finite[r] ? from[c] * inverse : nanf("");
            __syncwarp();
            if (layer.rotates_values) rotate_row(from, channels, arguments.value_signs, true);
            const std::int64_t at =
                (item.sequence.query_row + at_row / group) * arguments.output.token_stride +
                at_head * arguments.output.head_stride;
            for (int c = lane; c < channels; c += 32) store_number(arguments.output, at + c, from[c]);
            if (lane != 0) continue;
            const std::int64_t at_number =
                static_cast<std::int64_t>(item.sequence.query_row + at_row / group) * layer.query_heads +
                at_head;
            if (arguments.log_sum_exp)
                arguments.log_sum_exp[at_number] =
                    shared.finite[r] ? (sum > 0.0f ? (largest + log2f(sum)) / log2_e : -INFINITY) : nanf("");
            if (arguments.error_bounds)
                arguments.error_bounds[at_number] =
                    shared.finite[r] ? certified_error(shared.total[2][r] * inverse) : nanf("");
        }
    }
};

/// How a kernel is started: blocks, warps of each, and bytes of shared memory.
struct LaunchShape {
    int blocks, warps;
    std::uint32_t bytes;
    cudaStream_t stream;
};
template <class... Taken, class... Given>
int start(void (*kernel)(Taken...), const LaunchShape& shape, const Given&... arguments) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shape.bytes));
    if (status != cudaSuccess) return status;
    kernel<<<static_cast<unsigned>(shape.blocks), static_cast<unsigned>(32 * shape.warps), shape.bytes,
             shape.stream>>>(arguments...);
    return cudaGetLastError();
}

/// Whether a kernel that is made for a width of all channels, 16: fp16, reads such tiles.
template <int bits>
bool has_width(const KeyTileView& view) {
    return view.segments == 1 && view.groups == 1 && view.segment[0].bits == bits &&
           (bits == 16 || view.segment[0].lower_at >= 0);
}
template <int bits>
bool has_width(const ValueTileView& view) {
    return bits == token_widths ? view.runs > 0 : view.runs == 0 && view.all.bits == bits;
}

/// Kernels that are made for some widths each, the first of which that fits is started.
template <class... M>
struct Kernels {
    template <class... Arguments>
    static bool fit(const Arguments&... arguments) {
        return (M::fits(arguments...) || ...);
    }
    /// Returns whether one fits; status: of its start.
    template <class... Arguments>
    static bool launch(int& status, const LaunchShape& shape, const Arguments&... arguments) {
        return ((M::fits(arguments...) && (status = start(M::kernel(), shape, arguments...), true)) || ...);
    }
};

}  // namespace detail
}  // namespace kvplane::cuda
