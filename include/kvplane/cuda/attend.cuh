// kvplane/cuda/attend.cuh: the kernels of attention, for nvcc: include it in one .cu file of a program, or
// link kvplane::cuda, which has done so.
//
// A warp copies its tiles by itself into two slots, one for keys and one for values, and waits for nobody
// until its tiles end: so copies are always under way, and there is no barrier of the block before that.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/attend_arguments.hpp"
#include "kvplane/cuda/latent_math.cuh"
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

template <class Math>
__global__ void __launch_bounds__(32 * most_warps, 1)
    attend_kernel(const __grid_constant__ AttendArguments arguments) {
    using State = typename Math::State;
    extern __shared__ __align__(128) std::byte memory[];
    __shared__ std::uint64_t barriers[2 * most_warps];
    __shared__ float row_largest[most_warps][rows_of_block], row_sum[most_warps][rows_of_block];
    __shared__ float row_total[2][rows_of_block];
    __shared__ bool finite[rows_of_block];
    __shared__ std::uint32_t ended;

    const LayerView& layer = arguments.layer;
    const WorkItem item = arguments.items[blockIdx.x];
    const SequenceTask& sequence = item.sequence;
    const int warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32),
              lane = static_cast<int>(DeviceWarp::lane());
    const int group = layer.query_heads / layer.kv_heads;
    const int rows = min(rows_of_block, sequence.query_tokens * group - item.first_row);

    TileSlot keys, values;
    std::byte* const slots = memory + warp * 2 * arguments.slot_bytes;
    keys.begin(slots, &barriers[2 * warp]);
    values.begin(slots + arguments.slot_bytes, &barriers[2 * warp + 1]);
    TileSlot::begun();

    const int head = item.head;
    const auto place = [&](int i) -> const DeviceTile& {
        return sequence.tiles[i < sequence.skip_from ? i : i + sequence.skip];
    };
    // Of latents each head has tiles of its own size, or all have one tile of keys.
    const LatentView& latents = layer.latents;
    const LatentHead* const latent_head =
        Math::in_latents ? reinterpret_cast<const LatentHead*>(latents.table + head * latents.head_bytes)
                         : nullptr;
    const std::int32_t key_at = Math::in_latents ? latent_head->key_at : head * layer.head_stride,
                       value_at = Math::in_latents ? latent_head->value_at : key_at + layer.value_offset;
    const auto key_bytes =
        static_cast<std::uint32_t>(Math::in_latents ? latent_head->keys.bytes : layer.keys.bytes);
    const auto key_tile = [&](const DeviceTile& tile) { return tile.page + key_at; };
    const auto value_tile = [&](const DeviceTile& tile) { return tile.page + value_at; };
    int tile = item.first_tile + warp;
    DeviceTile now{}, next{};
    if (tile < item.end_tile) {
        now = place(tile);
        keys.fill(key_tile(now), key_bytes);
        values.fill(value_tile(now), static_cast<std::uint32_t>(layer.values.bytes));
        if (tile + warps < item.end_tile) next = place(tile + warps);
    }

    // Queries, as floats, scaled: as they are, and rotated where some keys are.
    float* const plain = reinterpret_cast<float*>(memory + warps * 2 * arguments.slot_bytes);
    const int stride = static_cast<int>(arguments.query_stride / 4);
    float* const rotated = reinterpret_cast<float*>(memory + arguments.rotated_at);
    const float in_score = arguments.scale * log2_e;
    for (int r = warp; r < rows_of_block; r += warps) {
        // Of paired rows 4 to 7 are rows 0 to 3 once more.
        const int of = Math::shares_rows ? r & 3 : r, row = item.first_row + of;
        const std::int64_t at = (sequence.query_row + row / group) * arguments.queries.token_stride +
                                (head * group + row % group) * arguments.queries.head_stride;
        bool good = true;
        for (int c = lane; c < (Math::in_latents ? latents.channels : layer.key_head_dim); c += 32) {
            const float x =
                of < rows && (!Math::in_latents || c < layer.key_head_dim)
                    ? load_number(arguments.queries, at + c * arguments.queries.channel_stride) * in_score
                    : 0.0f;
            good = good && fabsf(x) <= 1e30f;
            plain[r * stride + c] = x;
        }
        good = __all_sync(~0u, good);
        if (!good)
            for (int c = lane; c < layer.key_head_dim; c += 32) plain[r * stride + c] = 0.0f;
        if (lane == 0) finite[r] = good;
        __syncwarp();
        if constexpr (Math::in_latents) {
            const auto* const partners = reinterpret_cast<const std::int32_t*>(
                reinterpret_cast<const std::byte*>(latent_head) + latents.partners_at);
            float* const exchanged = reinterpret_cast<float*>(memory + arguments.partners_at) + r * stride;
            for (int c = lane; c < latents.channels; c += 32) exchanged[c] = plain[r * stride + partners[c]];
        }
        if (layer.rotates_keys == Rotation::none) continue;
        for (int c = lane; c < layer.key_head_dim; c += 32) rotated[r * stride + c] = plain[r * stride + c];
        __syncwarp();
        rotate_row(rotated + r * stride, layer.key_head_dim, arguments.key_signs, false);
    }
    if constexpr (Math::in_latents)
        for (auto i = threadIdx.x; i < latents.head_bytes / 16; i += blockDim.x)
            reinterpret_cast<uint4*>(memory + arguments.head_at)[i] =
                reinterpret_cast<const uint4*>(latent_head)[i];
    __syncthreads();
    const auto queries_of = [&](bool turned) {
        return QueryRowsView{reinterpret_cast<const std::byte*>(turned ? rotated : plain),
                             arguments.query_stride};
    };

    const int row = item.first_row + static_cast<int>(Math::row()),
              row_token = min(row / group, sequence.query_tokens - 1), row_head = head * group + row % group;
    ScoreRules<DeviceWarp> rules{};
    rules.position = sequence.position + row_token;
    rules.softcap = arguments.softcap * log2_e;
    rules.slope = arguments.alibi_slopes ? arguments.alibi_slopes[row_head] * log2_e : 0.0f;
    rules.bias = arguments.bias;
    rules.bias_row = sequence.bias_at + static_cast<std::uint32_t>(row_token * sequence.tokens);
    rules.window = arguments.window;
    rules.window_sinks = arguments.window_sinks;
    rules.hidden_from = sequence.hidden_from;
    rules.hidden_to = sequence.hidden_to;
    rules.causal = arguments.causal;
    rules.changes_scores = arguments.softcap > 0.0f || arguments.alibi_slopes || arguments.bias;

    State state;
    Math::begin(state);

    // Tokens outside tiles, four at a time, while the first tiles come.
    const int loose = sequence.sink_count + sequence.recent_count;
    KVPLANE_KEEP_ROLLED
    for (int first = 4 * (item.part * warps + warp); first < loose; first += 4 * item.parts * warps) {
        const int count = min(4, loose - first);
        TokenRow<DeviceWarp> of_values[4];
        float score[4];
        KVPLANE_KEEP_ROLLED
        for (int i = 0; i < count; ++i) {
            const int n = first + i, at = n - sequence.sink_count;
            const bool sink = at < 0;
            const std::byte* const page =
                sink ? sequence.sinks : sequence.recent[at / layer.recent.keys.capacity];
            const OutsideView& view = sink ? layer.sinks : layer.recent;
            const int in_page = sink ? n : at % layer.recent.keys.capacity;
            of_values[i] = token_row<DeviceWarp>(view.values, page, head, in_page);
            score[i] =
                Math::score_row(queries_of(layer.rotates_keys == Rotation::all),
                                token_row<DeviceWarp>(view.keys, page, head, in_page), layer.key_head_dim);
            score[i] = Math::ruled(rules, score[i], sink ? n : sequence.recent_first + at, true);
        }
        Math::add_rows(of_values, score, count, layer.value_head_dim, state);
    }

    using Latents = LatentMath<DeviceWarp, Math::shares_rows>;
    std::byte* const own = memory + arguments.warps_at + warp * arguments.warp_bytes;
    const auto& own_head = *reinterpret_cast<const LatentHead*>(memory + arguments.head_at);
    const typename Latents::Memory in_block{reinterpret_cast<const std::byte*>(plain),
                                            memory + arguments.partners_at, arguments.query_stride,
                                            memory + arguments.head_at, own};
    float largest_query = 0.0f;
    if constexpr (Math::in_latents) largest_query = Latents::largest_of(latents, in_block);
    // Of latents: where the tiles of the next projection stand, one a lane, and how many tiles are projected.
    const auto origin_ahead = [&](int i) {
        const int of = i + lane * warps;
        if (lane >= Latents::tiles || of >= item.end_tile) return 0;
        const DeviceTile& there = place(of);
        return there.first - there.row;
    };
    int ahead = 0, projected = 0;
    if constexpr (Math::in_latents) ahead = origin_ahead(tile);
    for (; tile < item.end_tile; tile += warps) {
        const bool more = tile + warps < item.end_tile;
        typename Math::Scores scores;
        if constexpr (Math::in_latents) {
            if (projected == 0) {
                std::uint32_t origins[Latents::tiles];
                KVPLANE_UNROLL
                for (int i = 0; i < Latents::tiles; ++i)
                    origins[i] = static_cast<std::uint32_t>(__shfl_sync(~0u, ahead, i));
                ahead = origin_ahead(tile + Latents::tiles * warps);
                Latents::project(latents, own_head, in_block, largest_query, origins);
                projected = Latents::tiles;
            }
            Math::score(Latents::latents(latents, in_block, Latents::tiles - projected), keys.wait(),
                        own_head.keys, own + latents.factors_at(), scores);
            // Where nothing turns, all tiles have the queries of the first.
            if (latents.turns) --projected;
        } else {
            const bool turned =
                layer.rotates_keys == Rotation::all || (layer.rotates_keys == Rotation::by_tile &&
                                                        now.page[layer.rotated_at + head] != std::byte{0});
            Math::score(queries_of(turned), keys.wait(), layer.keys, own, scores);
        }
        __syncwarp();
        if (more)
            keys.fill(key_tile(next), key_bytes);
        else
            TileSlot::skip();
        const int last = now.first + now.tokens - 1;
        const bool plain_tile =
            !rules.changes_scores && now.row == 0 && now.tokens == tile_tokens &&
            (!rules.causal || last <= sequence.position) &&
            (rules.window == 0 || sequence.position + sequence.query_tokens - 1 - now.first < rules.window) &&
            (now.first >= rules.hidden_to || last < rules.hidden_from);
        if (!plain_tile) Math::apply(rules, {now.first - now.row, now.row, now.row + now.tokens}, scores);
        const float factor = Math::weigh(scores, state);
        Math::add_values(values.wait(), layer.values, own + (Math::in_latents ? latents.factors_at() : 0u),
                         scores, factor, state);
        __syncwarp();
        if (!more) break;
        values.fill(value_tile(next), static_cast<std::uint32_t>(layer.values.bytes));
        now = next;
        if (tile + 2 * warps < item.end_tile) next = place(tile + 2 * warps);
    }
    Math::finish(state);

    // The warps' parts, each in its own slots; then those of the block, four channels a thread.
    const int channels = layer.value_head_dim, fours = channels / 4;
    {
        float* const own = reinterpret_cast<float*>(slots);
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
                row_largest[warp][g] = state.softmax.largest;
                row_sum[warp][g] = state.softmax.sum;
            }
        }
    }
    __syncthreads();
    // What each warp's sums are multiplied by, and the largest score and the sum of each row.
    if (threadIdx.x < rows) {
        const auto r = threadIdx.x;
        float largest = row_largest[0][r], sum = 0.0f;
        for (int w = 1; w < warps; ++w) largest = fmaxf(largest, row_largest[w][r]);
        for (int w = 0; w < warps; ++w) {
            const float share = DeviceWarp::exp2(row_largest[w][r] - largest);
            sum += share * row_sum[w][r];
            row_largest[w][r] = share;
        }
        row_total[0][r] = largest;
        row_total[1][r] = sum;
    }
    __syncthreads();
    // Of a head's part: [row][channels], then the largest scores, then the sums.
    const int part_size = rows_of_block * (channels + 2);
    float* const joined = plain;  // queries are done with
    float* const partial =
        arguments.partials + static_cast<std::int64_t>(item.partial + item.part) * part_size;
    for (int i = static_cast<int>(threadIdx.x); i < rows * fours; i += static_cast<int>(blockDim.x)) {
        const int r = i / fours;
        float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int w = 0; w < warps; ++w)
            add_share(out, row_largest[w][r],
                      reinterpret_cast<const float4*>(memory + w * 2 * arguments.slot_bytes)[i]);
        if (item.parts == 1)
            reinterpret_cast<float4*>(joined)[i] = out;
        else
            __stcg(reinterpret_cast<float4*>(partial) + i, out);
    }
    if (item.parts > 1) {
        if (threadIdx.x < rows) {
            __stcg(partial + rows_of_block * channels + threadIdx.x, row_total[0][threadIdx.x]);
            __stcg(partial + rows_of_block * channels + rows_of_block + threadIdx.x,
                   row_total[1][threadIdx.x]);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            ended = atomicAdd(arguments.counters + item.counter, 1u);
            __threadfence();
        }
        __syncthreads();
        if (ended + 1 < static_cast<std::uint32_t>(item.parts)) return;
        // The last block of the head puts the parts together.
        if (threadIdx.x == 0) arguments.counters[item.counter] = 0;  // for the next launch
        const float* const parts = arguments.partials + static_cast<std::int64_t>(item.partial) * part_size;
        float* const shares = reinterpret_cast<float*>(memory);  // [part][row]
        for (int i = static_cast<int>(threadIdx.x); i < item.parts * rows_of_block;
             i += static_cast<int>(blockDim.x)) {
            const int p = i / rows_of_block, r = i % rows_of_block;
            const float* const numbers =
                parts + static_cast<std::int64_t>(p) * part_size + rows_of_block * channels + r;
            shares[i] = r < rows ? __ldcg(numbers) : 0.0f;
            shares[item.parts * rows_of_block + i] = r < rows ? __ldcg(numbers + rows_of_block) : 0.0f;
        }
        __syncthreads();
        if (threadIdx.x < rows) {
            const auto r = threadIdx.x;
            float largest = -1e30f, sum = 0.0f;
            for (int p = 0; p < item.parts; ++p) largest = fmaxf(largest, shares[p * rows_of_block + r]);
            for (int p = 0; p < item.parts; ++p) {
                float& share = shares[p * rows_of_block + r];
                share = DeviceWarp::exp2(share - largest);
                sum += share * shares[(item.parts + p) * rows_of_block + r];
            }
            row_total[0][r] = largest;
            row_total[1][r] = sum;
        }
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < rows * fours; i += static_cast<int>(blockDim.x)) {
            const int r = i / fours;
            float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 16
            for (int p = 0; p < item.parts; ++p)
                add_share(
                    out, shares[p * rows_of_block + r],
                    __ldcg(reinterpret_cast<const float4*>(parts + static_cast<std::int64_t>(p) * part_size) +
                           i));
            reinterpret_cast<float4*>(joined)[i] = out;
        }
    }
    __syncthreads();

    for (int r = warp; r < rows; r += warps) {
        float* const from = joined + r * channels;
        const int at_row = item.first_row + r, at_head = head * group + at_row % group;
        float largest = row_total[0][r], sum = row_total[1][r], shrink = 1.0f;
        if (arguments.sink_logits) {
            const float sink = arguments.sink_logits[at_head] * log2_e, raised = fmaxf(largest, sink);
            shrink = DeviceWarp::exp2(largest - raised);
            sum = sum * shrink + DeviceWarp::exp2(sink - raised);
            largest = raised;
        }
        const float inverse = sum > 0.0f ? shrink / sum : 0.0f;
        for (int c = lane; c < channels; c += 32) from[c] = finite[r] ? from[c] * inverse : nanf("");
        __syncwarp();
        if (layer.rotates_values) rotate_row(from, channels, arguments.value_signs, true);
        const std::int64_t at = (sequence.query_row + at_row / group) * arguments.output.token_stride +
                                at_head * arguments.output.head_stride;
        for (int c = lane; c < channels; c += 32) store_number(arguments.output, at + c, from[c]);
        if (arguments.log_sum_exp && lane == 0)
            arguments.log_sum_exp[static_cast<std::int64_t>(sequence.query_row + at_row / group) *
                                      layer.query_heads +
                                  at_head] =
                finite[r] ? (sum > 0.0f ? (largest + log2f(sum)) / log2_e : -INFINITY) : nanf("");
    }
}

template <class Math>
int launch_kernel(const AttendArguments& arguments, int blocks, int warps, std::uint32_t bytes,
                  cudaStream_t stream) {
    const cudaError_t status = cudaFuncSetAttribute(
        attend_kernel<Math>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess) return status;
    attend_kernel<Math>
        <<<static_cast<unsigned>(blocks), static_cast<unsigned>(32 * warps), bytes, stream>>>(arguments);
    return cudaGetLastError();
}

/// A kernel made for one width of all channels of keys and one of values, 16: fp16, with one grid a token of
/// values; paired: for at most four query rows of a key head.
template <int key_bits, int value_bits, int key_head_dim, bool paired, int value_head_dim = key_head_dim>
struct Made {
    using Math = TileMath<DeviceWarp, key_bits, key_head_dim, value_bits, value_head_dim, paired>;

    static bool fits(const AttendArguments& arguments) {
        const LayerView& layer = arguments.layer;
        const bool keys_fit = Math::in_latents
                                  ? layer.latents.table != nullptr
                                  : layer.latents.table == nullptr && layer.keys.segments == 1 &&
                                        layer.keys.groups == 1 && layer.keys.segment[0].bits == key_bits &&
                                        (key_bits == 16 || layer.keys.segment[0].lower_at >= 0) &&
                                        layer.key_head_dim == key_head_dim;
        const bool values_fit = value_bits == token_widths
                                    ? layer.values.runs > 0
                                    : layer.values.runs == 0 && layer.values.all.bits == value_bits;
        return keys_fit && values_fit && layer.value_head_dim == value_head_dim &&
               layer.values.run_blocks >= Math::blocks && (!paired || arguments.most_rows <= 4);
    }
};
/// Keys in latents, whose widths are those of each basis: known at run time.
template <int value_bits, int value_head_dim, bool paired>
using InLatents = Made<latent_width, value_bits, value_head_dim, paired>;
/// For few query rows, and for more.
template <int key_bits, int value_bits, int head_dim>
using Few = Made<key_bits, value_bits, head_dim, true>;
template <int key_bits, int value_bits, int head_dim>
using Many = Made<key_bits, value_bits, head_dim, false>;
/// Of the first kernel that fits: its launch.
template <class... M>
struct Kernels {
    static bool fit(const AttendArguments& arguments) { return (M::fits(arguments) || ...); }
    static bool launch(const AttendArguments& arguments, int blocks, int warps, std::uint32_t bytes,
                       cudaStream_t stream, int& status) {
        return ((M::fits(arguments) &&
                 (status = launch_kernel<typename M::Math>(arguments, blocks, warps, bytes, stream), true)) ||
                ...);
    }
};
/// Those that are compiled beside the ones for widths that are known at run time, which are slower.
using StandardKernels =
    Kernels<Few<4, 4, 128>, Few<8, 8, 128>, Few<5, 3, 128>, Few<4, 2, 128>, Few<3, 3, 128>, Few<2, 2, 128>,
            Few<16, 16, 128>, Few<4, 4, 64>, Few<5, 3, 64>, Few<4, 2, 64>, Many<4, 4, 128>, Many<8, 8, 128>,
            Many<5, 3, 128>, Many<4, 2, 128>, Many<16, 16, 128>, InLatents<2, 128, true>,
            InLatents<3, 128, true>, InLatents<4, 128, true>, Few<3, token_widths, 128>>;

#if !defined(KVPLANE_CUDA_KERNELS)
#define KVPLANE_CUDA_KERNELS StandardKernels
#endif

bool is_made(const AttendArguments& arguments) {
    return KVPLANE_CUDA_KERNELS::fit(arguments);
}

template <int key_bits>
int launch_general(const AttendArguments& arguments, int blocks, int warps, std::uint32_t bytes,
                   CUstream_st* stream) {
    const std::int32_t dim = arguments.layer.value_head_dim;
    if (dim <= 64)
        return launch_kernel<TileMath<DeviceWarp, key_bits, 256, any_width, 64>>(arguments, blocks, warps,
                                                                                 bytes, stream);
    if (dim <= 96)
        return launch_kernel<TileMath<DeviceWarp, key_bits, 256, any_width, 96>>(arguments, blocks, warps,
                                                                                 bytes, stream);
    if (dim <= 128)
        return launch_kernel<TileMath<DeviceWarp, key_bits, 256, any_width, 128>>(arguments, blocks, warps,
                                                                                  bytes, stream);
    return launch_kernel<TileMath<DeviceWarp, key_bits, 256, any_width, 256>>(arguments, blocks, warps, bytes,
                                                                              stream);
}

int launch(const AttendArguments& arguments, int blocks, int warps, std::uint32_t bytes,
           CUstream_st* stream) {
    int status = cudaSuccess;
    if (KVPLANE_CUDA_KERNELS::launch(arguments, blocks, warps, bytes, stream, status)) return status;
    return arguments.layer.latents.table
               ? launch_general<latent_width>(arguments, blocks, warps, bytes, stream)
               : launch_general<any_width>(arguments, blocks, warps, bytes, stream);
}

}  // namespace detail
}  // namespace kvplane::cuda
