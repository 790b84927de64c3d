// kvplane/cuda/attend.cuh: the kernels of attention, for nvcc: include it in one .cu file of a program, or
// link kvplane::cuda, which has done so.
//
// A warp copies its tiles by itself into two slots, one for keys and one for values, and waits for nobody
// until its tiles end: so copies are always under way, and there is no barrier of the block before that.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/attend_block.cuh"
#include "kvplane/cuda/latent_math.cuh"

namespace kvplane::cuda {
namespace detail {

template <class Math>
__global__ void __launch_bounds__(32 * most_warps, 1)
    attend_kernel(const __grid_constant__ AttendArguments arguments) {
    extern __shared__ __align__(128) std::byte memory[];
    __shared__ std::uint64_t barriers[2 * most_warps];
    __shared__ BlockRows shared;

    const LayerView& layer = arguments.layer;
    const WorkItem item = arguments.items[blockIdx.x];
    const AttendBlock<Math> block(arguments, item, shared, memory, 2 * arguments.slot_bytes);
    const int warps = block.warps;

    TileSlot keys, values;
    std::byte* const slots = memory + block.warp * 2 * arguments.slot_bytes;
    keys.begin(slots, &barriers[2 * block.warp]);
    values.begin(slots + arguments.slot_bytes, &barriers[2 * block.warp + 1]);
    TileSlot::begun();

    int tile = item.first_tile + block.warp;
    DeviceTile now{}, next{};
    if (tile < item.end_tile) {
        now = block.place(tile);
        keys.fill(block.key_tile(now.page), block.key_bytes);
        values.fill(block.value_tile(now.page), static_cast<std::uint32_t>(layer.values.bytes));
        if (tile + warps < item.end_tile) next = block.place(tile + warps);
    }

    block.load_queries();
    const ScoreRules<DeviceWarp> rules = block.rules();
    typename Math::State state;
    Math::begin(state);
    // While the first tiles come.
    block.add_loose(rules, state);

    using Latents = LatentMath<DeviceWarp, Math::shares_rows>;
    const LatentView& latents = layer.latents;
    std::byte* const own = memory + arguments.warps_at + block.warp * arguments.warp_bytes;
    const auto& own_head = *reinterpret_cast<const LatentHead*>(memory + arguments.head_at);
    const typename Latents::Memory in_block{reinterpret_cast<const std::byte*>(block.plain),
                                            memory + arguments.partners_at, arguments.query_stride,
                                            memory + arguments.head_at, own};
    float largest_query = 0.0f;
    if constexpr (Math::in_latents) largest_query = Latents::largest_of(latents, in_block);
    // Of latents: where the tiles of the next projection stand, one a lane, and how many tiles are projected.
    const auto origin_ahead = [&](int i) {
        const int of = i + block.lane * warps;
        if (block.lane >= Latents::tiles || of >= item.end_tile) return 0;
        const DeviceTile& there = block.place(of);
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
            Math::score(block.queries(block.turned(now.page)), keys.wait(), layer.keys, own, scores);
        }
        __syncwarp();
        if (more)
            keys.fill(block.key_tile(next.page), block.key_bytes);
        else
            TileSlot::skip();
        if (!block.is_plain(now))
            Math::apply(rules, {now.first - now.row, now.row, now.row + now.tokens}, scores);
        const float factor = Math::weigh(scores, state);
        Math::add_values(values.wait(), layer.values, own + (Math::in_latents ? latents.factors_at() : 0u),
                         scores, factor, state);
        __syncwarp();
        if (!more) break;
        values.fill(block.value_tile(next.page), static_cast<std::uint32_t>(layer.values.bytes));
        now = next;
        if (tile + 2 * warps < item.end_tile) next = block.place(tile + 2 * warps);
    }
    Math::finish(state);
    block.merge(state, 0.0f);
}

/// A kernel made for one width of all channels of keys and one of values, 16: fp16, with one grid a token of
/// values; paired: for at most four query rows of a key head.
template <int key_bits, int value_bits, int key_head_dim, bool paired, int value_head_dim = key_head_dim>
struct Made {
    using Math = TileMath<DeviceWarp, key_bits, key_head_dim, value_bits, value_head_dim, paired>;

    static auto kernel() { return attend_kernel<Math>; }
    static bool fits(const AttendArguments& arguments) {
        const LayerView& layer = arguments.layer;
        const bool in_latents = layer.latents.table != nullptr,
                   keys_fit = Math::in_latents ? in_latents
                                               : !in_latents && has_width<key_bits>(layer.keys) &&
                                                     layer.key_head_dim == key_head_dim;
        return keys_fit && has_width<value_bits>(layer.values) && layer.value_head_dim == value_head_dim &&
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

/// The kernel for widths that are known at run time.
template <int key_bits>
int launch_general(const AttendArguments& arguments, const LaunchShape& shape) {
    const auto start_for = [&]<int value_bits, int dim, bool paired>() {
        return start(attend_kernel<TileMath<DeviceWarp, key_bits, 256, value_bits, dim, paired>>, shape,
                     arguments);
    };
    const std::int32_t dim = arguments.layer.value_head_dim;
    if (arguments.layer.values.runs > 0)
        return dim <= 128 ? start_for.template operator()<token_widths, 128, false>()
                          : start_for.template operator()<token_widths, 256, false>();
    if (dim <= 64) return start_for.template operator()<any_width, 64, false>();
    if (dim <= 128 && arguments.most_rows <= 4) return start_for.template operator()<any_width, 128, true>();
    if (dim <= 128) return start_for.template operator()<any_width, 128, false>();
    return start_for.template operator()<any_width, 256, false>();
}

int launch(const AttendArguments& arguments, int blocks, int warps, std::uint32_t bytes,
           CUstream_st* stream) {
    const LaunchShape shape{blocks, warps, bytes, stream};
    int status = cudaSuccess;
    if (KVPLANE_CUDA_KERNELS::launch(status, shape, arguments)) return status;
    return arguments.layer.latents.table ? launch_general<latent_width>(arguments, shape)
                                         : launch_general<any_width>(arguments, shape);
}

}  // namespace detail
}  // namespace kvplane::cuda
