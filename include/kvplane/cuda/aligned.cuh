// kvplane/cuda/aligned.cuh: the kernels of attention that decide tile by tile what is read, for nvcc:
// include it in one .cu file of a program beside attend.cuh, or link kvplane::cuda, which has done so.
//
// A warp copies the first planes of keys of its tiles ahead into two slots in turn, scores a tile by them,
// and decides (aligned_math.cuh). What else is read of the tile is copied into a third slot while the next
// tile is scored, and used after that: so is the time that the copy takes hidden. That is the tile's values,
// whose weights are kept in the memory of the block meanwhile; or the rest of its keys, by all of which the
// tile is then scored again, and its values follow into the same slot. More slots would leave fewer warps.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "kvplane/cuda/aligned_arguments.hpp"
#include "kvplane/cuda/aligned_math.cuh"
#include "kvplane/cuda/attend_block.cuh"

namespace kvplane::cuda {
namespace detail {

/// The tiles of a warp that are near, in shared memory.
struct NearTiles {
    static constexpr int count = 8;
    DeviceTile tile[count];

    __device__ const DeviceTile& operator[](int turn) const { return tile[turn % count]; }
    __device__ DeviceTile& operator[](int turn) { return tile[turn % count]; }
};

/// The largest scores of some tokens, and the sums of their weights: what all warps know before their first
/// tile.
struct Seeds {
    float largest[most_warps][rows_of_block], sum[most_warps][rows_of_block];
};
/// Of tokens outside tiles: four a warp, of sinks and the most recent ones.
template <class Math>
__device__ inline void seed_from_tokens(const AttendBlock<Math>& block, const ScoreRules<DeviceWarp>& rules,
                                        float& largest, float& sum) {
    const int loose = block.loose_tokens(), seeds = min(loose, 4 * block.warps), first = 4 * block.warp;
    if (first >= seeds) return;
    TokenRow<DeviceWarp> keys[4];
    int position[4];
    KVPLANE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const int seed = min(first + i, seeds - 1);
        const auto of =
            block.loose_token(seed < block.item.sequence.sink_count ? seed : loose - seeds + seed);
        keys[i] = of.keys;
        position[i] = of.position;
    }
    float score[4];
    Math::score_rows(block.queries(block.arguments.layer.rotates_keys == Rotation::all), keys,
                     block.arguments.layer.key_head_dim, score);
    KVPLANE_UNROLL
    for (int i = 0; i < 4; ++i) {
        score[i] = Math::ruled(rules, score[i], position[i], first + i < seeds);
        largest = fmaxf(largest, score[i]);
    }
    KVPLANE_UNROLL
    for (int i = 0; i < 4; ++i)
        if (score[i] > Math::masked) sum += DeviceWarp::exp2(score[i] - largest);
}

template <class Math>
__global__ void __launch_bounds__(32 * most_warps, 1)
    aligned_kernel(const __grid_constant__ AttendArguments arguments,
                   const __grid_constant__ AlignedArguments aligned) {
    extern __shared__ __align__(128) std::byte memory[];
    __shared__ std::uint64_t barriers[3 * most_warps];
    __shared__ BlockRows shared;
    __shared__ Seeds seeds;
    __shared__ std::uint32_t tiles_read[2 * (PlaneSplit::max_planes + 1)];

    const PlanePrefixes& views = aligned.prefixes;
    const AlignedRule& rule = aligned.rule;
    const int first_planes = rule.first_planes;
    const auto bytes_of = [](const auto& view) { return static_cast<std::uint32_t>(view.bytes); };
    const std::uint32_t first_bytes = bytes_of(views.keys[first_planes - 1]);
    // Here, where it takes no registers.
    __shared__ WorkItem item;
    for (unsigned i = threadIdx.x; i < sizeof(WorkItem) / 4; i += blockDim.x)
        reinterpret_cast<std::uint32_t*>(&item)[i] =
            reinterpret_cast<const std::uint32_t*>(arguments.items + blockIdx.x)[i];
    __syncthreads();
    const AttendBlock<Math> block(arguments, item, shared, memory, aligned.warp_bytes);
    const int warps = block.warps, lane = block.lane;

    // [first planes of odd turns][of even ones][the rest][weights][factors][tiles]
    std::byte* const own = memory + block.warp * aligned.warp_bytes;
    TileSlot keys, other, rest;  // `other`: of the turn before, and of the one behind
    keys.begin(own + aligned.even_at, &barriers[3 * block.warp]);
    other.begin(own, &barriers[3 * block.warp + 1]);
    rest.begin(own + aligned.rest_at, &barriers[3 * block.warp + 2]);
    TileSlot::begun();
    // Weights of the tile before are used when those of this one are there: they take turns too.
    float* const kept = reinterpret_cast<float*>(own + aligned.kept_at) + lane;
    const auto weights_of = [&](int turn) { return kept + turn % 2 * (32 * 16 * Math::own); };
    NearTiles& tiles = *reinterpret_cast<NearTiles*>(own + aligned.warp_bytes - sizeof(NearTiles));
    if (threadIdx.x < 2 * (PlaneSplit::max_planes + 1)) tiles_read[threadIdx.x] = 0;

    const int first_tile = item.first_tile + block.warp,
              tiles_of_warp = max(0, (item.end_tile - first_tile + warps - 1) / warps);
    const auto place = [&](int turn) -> const DeviceTile& { return block.place(first_tile + turn * warps); };
    if (lane < min(3, tiles_of_warp)) tiles[lane] = place(lane);
    DeviceTile coming{};  // of lane 0: three turns ahead
    if (lane == 0 && 3 < tiles_of_warp) coming = place(3);
    __syncwarp();
    // Without tokens outside tiles the first tile of the sequence and its last tell what is seen first, one
    // a warp.
    const int tile_count = item.sequence.tile_count;
    const bool from_tiles = block.loose_tokens() == 0,
               seeds_tile = from_tiles && block.warp < min(2, tile_count);
    const DeviceTile& seed_tile = block.place(block.warp == 0 || tile_count == 0 ? 0 : tile_count - 1);
    const auto is_seed = [&](int turn) {
        const int at = first_tile + turn * warps;
        return from_tiles && (at == 0 || (at == tile_count - 1 && warps > 1));
    };
    if (seeds_tile)
        rest.fill(block.key_tile(seed_tile.page), first_bytes);
    else
        TileSlot::skip();
    if (0 < tiles_of_warp)
        keys.fill(block.key_tile(tiles[0].page), first_bytes);
    else
        TileSlot::skip();
    if (1 < tiles_of_warp)
        other.fill(block.key_tile(tiles[1].page), first_bytes);
    else
        TileSlot::skip();

    block.load_queries();
    typename Math::State state;
    Math::begin(state);
    const int row = static_cast<int>(Math::row());
    const bool counts = row < block.rows && shared.finite[row];
    const auto apply = [&](const DeviceTile& of, typename Math::Scores& scores) {
        if (!block.is_plain(of))
            Math::apply(block.rules(), {of.first - of.row, of.row, of.row + of.tokens}, scores);
    };
    const auto reach_of = [&](const QueryRowsView& queries, const std::byte* keys_at) {
        return rule.reach > 0.0f
                   ? rule.reach * Math::key_reach(queries, keys_at, views.keys[first_planes - 1])
                   : 0.0f;
    };
    typename Math::Tally tally;
    {
        float largest = Math::masked, sum = 0.0f;
        seed_from_tokens(block, block.rules(), largest, sum);
        if (seeds_tile) {
            const DeviceTile of = seed_tile;
            typename Math::Scores scores;
            const QueryRowsView queries = block.queries(block.turned(of.page));
            const std::byte* const at = rest.wait<2>();
            Math::score_first(queries, at, views, first_planes, own + aligned.factors_at, scores);
            apply(of, scores);
            largest = Math::relative(scores, sum);
            sum = Math::seed_sum(largest, Math::row_sum(sum), reach_of(queries, at));
            __syncwarp();
        }
        if ((lane & 3) == 0) {
            seeds.largest[block.warp][lane >> 2] = largest;
            seeds.sum[block.warp][lane >> 2] = sum;
        }
        __syncthreads();
        largest = Math::masked, sum = 0.0f;
        for (int w = 0; w < warps; ++w) largest = fmaxf(largest, seeds.largest[w][row]);
        for (int w = 0; w < warps; ++w)
            sum += seeds.sum[w][row] * DeviceWarp::exp2(seeds.largest[w][row] - largest);
        Math::start(rule, largest, sum / static_cast<float>(item.parts * warps), tiles_of_warp, tally);
        Math::raise(largest, state);
    }
    block.add_loose(block.rules(), state);

    // What is used once a turn leaves room for the products in between.
    float* const put_by = kept + 2 * 32 * 16 * Math::own;
    const auto put_tally = [&] {
        put_by[0] = tally.reference;
        put_by[32] = tally.known;
        put_by[64] = tally.error;
    };
    const auto take_tally = [&] {
        tally.reference = put_by[0];
        tally.known = put_by[32];
        tally.error = put_by[64];
    };
    put_tally();
    TilePlanes before{0, 0};  // what is read of the tile before, of which something is still to be used
    bool waits = false;
    // On 8.x every turn makes four copies or skips. Whether the first planes of a tile were copied by the
    // first of them, two turns ahead, or by the second, in the turn before.
    bool early = false, next_early = false;
    for (int turn = 0;; ++turn) {
        const bool there = turn < tiles_of_warp;
        if (!there && !waits) break;
        TilePlanes planes{0, 0};
        float largest = 0.0f;
        bool soon_early = false;
        if (there) {
            const DeviceTile& now = tiles[turn];
            const QueryRowsView queries = block.queries(block.turned(now.page));
            const std::byte* const at = TileSlot::counts() && early ? keys.wait<7>() : keys.wait<1>();
            typename Math::Scores scores;
            Math::score_first(queries, at, views, first_planes, own + aligned.factors_at, scores);
            apply(now, scores);
            float sum;
            largest = Math::relative(scores, sum);
            const float reach = reach_of(queries, at);
            take_tally();
            planes = Math::choose(rule, largest, Math::row_sum(sum), reach, counts, is_seed(turn),
                                  tiles_of_warp - turn - 1, tally);
            put_tally();
            if (planes.keys == first_planes) {
                Math::enter(largest, sum, state);
                if (planes.values > 0) {
                    float* const to = weights_of(turn);
                    KVPLANE_UNROLL
                    for (int i = 0; i < 16 * Math::own; ++i)
                        to[32 * i] = scores[i / (4 * Math::own)][i / Math::own % 4][i % Math::own];
                }
            }
            if (lane == 0) {
                tiles[turn + 3] = coming;
                if (turn + 4 < tiles_of_warp) coming = place(turn + 4);
                atomicAdd(&tiles_read[planes.keys], 1u);
                atomicAdd(&tiles_read[PlaneSplit::max_planes + 1 + planes.values], 1u);
            }
            __syncwarp();
            soon_early = planes.keys == first_planes;
            if (soon_early && turn + 2 < tiles_of_warp)
                keys.fill(block.key_tile(tiles[turn + 2].page), first_bytes);
            else
                TileSlot::skip();
        } else {
            TileSlot::skip();
        }

        if (waits) {
            const bool all_keys = before.keys > first_planes;
            const std::byte* at = rest.wait<1>();
            typename Math::Scores weights;
            float factor;
            if (all_keys) {
                const DeviceTile& of = tiles[turn - 1];
                // Even turns have the rest where it is in a tile.
                Math::score(block.queries(block.turned(of.page)), other.data(),
                            turn % 2 == 1 ? views.keys[before.keys - 1] : aligned.apart[before.keys - 1],
                            before.keys == views.key_planes, own + aligned.factors_at, weights);
                __syncwarp();
                if (before.values > 0)
                    rest.fill(block.value_tile(of.page), bytes_of(views.values[before.values - 1]));
                else
                    TileSlot::skip();
                if (turn + 1 < tiles_of_warp)
                    other.fill(block.key_tile(tiles[turn + 1].page), first_bytes);
                else
                    TileSlot::skip();
                apply(of, weights);
                float sum;
                const float of_largest = Math::relative(weights, sum);
                factor = Math::enter(of_largest, sum, state);
                take_tally();
                Math::learn(of_largest, Math::row_sum(sum), is_seed(turn - 1), tally);
                put_tally();
                if (before.values > 0) at = rest.wait<1>();
            } else {
                TileSlot::skip();
                TileSlot::skip();
                const float* const from = weights_of(turn - 1);
                KVPLANE_UNROLL
                for (int i = 0; i < 16 * Math::own; ++i)
                    weights[i / (4 * Math::own)][i / Math::own % 4][i % Math::own] = from[32 * i];
                factor = Math::factor_of(put_by[96], state);
            }
            if (before.values > 0) Math::add_values(at, views, before.values, weights, factor, state);
            __syncwarp();
        } else {
            TileSlot::skip();
            TileSlot::skip();
        }
        if (!there) break;

        // The rest of this tile.
        const std::byte* const page = tiles[turn].page;
        if (planes.keys > first_planes)
            rest.fill(block.key_tile(page) + first_bytes,
                      bytes_of(views.keys[planes.keys - 1]) - first_bytes);
        else if (planes.values > 0)
            rest.fill(block.value_tile(page), bytes_of(views.values[planes.values - 1]));
        else
            TileSlot::skip();
        before = planes;
        put_by[96] = largest;
        waits = planes.keys > first_planes || planes.values > 0;
        early = next_early;
        next_early = soon_early;
        const TileSlot used = keys;
        keys = other;
        other = used;
    }
    Math::finish(state);
    take_tally();
    const float error = Math::error(tally, state);
    __syncthreads();
    if (aligned.counts && threadIdx.x < 2 * (PlaneSplit::max_planes + 1))
        atomicAdd(reinterpret_cast<unsigned long long*>(aligned.counts) + threadIdx.x,
                  static_cast<unsigned long long>(tiles_read[threadIdx.x]));
    block.merge(state, rule.kind == AlignedRule::tolerance ? error : 0.0f);
}

/// A kernel made for one width of keys and one of values, as Made of attend.cuh.
template <int key_bits, int value_bits, int head_dim, bool paired>
struct AlignedMade {
    using Math = AlignedMath<DeviceWarp, key_bits, head_dim, value_bits, head_dim, paired>;

    static auto kernel() { return aligned_kernel<Math>; }
    static bool fits(const AttendArguments& arguments, const AlignedArguments& aligned) {
        const PlanePrefixes& views = aligned.prefixes;
        const ValueTileView& values = views.values[views.value_planes - 1];
        return has_width<key_bits>(views.keys[views.key_planes - 1]) && has_width<value_bits>(values) &&
               arguments.layer.key_head_dim == head_dim && arguments.layer.value_head_dim == head_dim &&
               values.run_blocks >= Math::blocks && (!paired || arguments.most_rows <= 4);
    }
};
/// Those that are compiled beside the ones for widths that are known at run time.
using StandardAlignedKernels =
    Kernels<AlignedMade<8, 8, 128, true>, AlignedMade<16, 16, 128, true>, AlignedMade<4, 4, 128, true>,
            AlignedMade<8, 8, 128, false>, AlignedMade<16, 16, 128, false>>;

#if !defined(KVPLANE_CUDA_ALIGNED_KERNELS)
#define KVPLANE_CUDA_ALIGNED_KERNELS StandardAlignedKernels
#endif

bool is_made(const AttendArguments& arguments, const AlignedArguments& aligned) {
    return KVPLANE_CUDA_ALIGNED_KERNELS::fit(arguments, aligned);
}
int launch_aligned(const AttendArguments& arguments, const AlignedArguments& aligned, int blocks, int warps,
                   std::uint32_t bytes, CUstream_st* stream) {
    const LaunchShape shape{blocks, warps, bytes, stream};
    int status = cudaSuccess;
    if (KVPLANE_CUDA_ALIGNED_KERNELS::launch(status, shape, arguments, aligned)) return status;
    return arguments.layer.value_head_dim <= 128
               ? start(aligned_kernel<AlignedMath<DeviceWarp, any_width, 256, any_width, 128>>, shape,
                       arguments, aligned)
               : start(aligned_kernel<AlignedMath<DeviceWarp, any_width, 256, any_width, 256>>, shape,
                       arguments, aligned);
}

}  // namespace detail
}  // namespace kvplane::cuda
