// kvplane/cuda/append.cuh: the kernels of appends, for nvcc: include it in one .cu file of a program, or
// link kvplane::cuda, which has done so.
//
// A block of 128 threads takes 8 tokens of a head to rows outside tiles; one of 256 a part of a tile
// (cuda/append_tables.hpp says which). Both read the input once, in fours of channels.
#pragma once

#include <cuda_runtime.h>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/encode.hpp"
#include "kvplane/cuda/latents.hpp"
#include "kvplane/cuda/launch.hpp"
#include "kvplane/cuda/token_rows.hpp"

namespace kvplane::cuda::detail {

extern __shared__ FourWords kvplane_shared[];

inline constexpr int row_threads = 128, tile_threads = 256, product_threads = 128;

__global__ void __launch_bounds__(row_threads) rows_kernel(const __grid_constant__ RowsArguments a) {
    write_rows(DeviceBlock{}, a, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y),
               reinterpret_cast<std::byte*>(kvplane_shared));
}
/// Blocks of a multiprocessor. Staged rows go through so many phases that more blocks at once are worth some
/// spilled registers.
constexpr int blocks_of(TileKind kind) {
    return kind == tiles_staged ? 4 : 3;
}
template <TileKind kind>
__global__ void __launch_bounds__(tile_threads, blocks_of(kind))
    tiles_kernel(const __grid_constant__ TilesArguments a) {
    encode_tile<kind>(DeviceBlock{}, a, static_cast<int>(blockIdx.x),
                      reinterpret_cast<std::byte*>(kvplane_shared));
}
__global__ void __launch_bounds__(tile_threads) centre_kernel(const __grid_constant__ CentreArguments a) {
    centre_keys(DeviceBlock{}, a, static_cast<int>(blockIdx.x), reinterpret_cast<std::byte*>(kvplane_shared));
}
__global__ void __launch_bounds__(product_threads)
    product_kernel(const __grid_constant__ ProductArguments a) {
    multiply_keys(DeviceBlock{}, a, static_cast<int>(blockIdx.x),
                  reinterpret_cast<std::byte*>(kvplane_shared));
}
__global__ void probe_kernel(float* results, float tiny, float one, float three) {
    results[0] = sum_of(product_of(tiny, 2.0f), 0.0f);
    results[1] = quotient_of(one, three);
    results[2] = tiny < 0x1p-139f && tiny > 0.0f ? 1.0f : 0.0f;
}

/// Runs a kernel, with more shared memory than blocks have by themselves where it takes more.
template <class Arguments>
int run_kernel(void (*kernel)(Arguments), dim3 blocks, int threads, const Arguments& arguments,
               int shared_bytes, cudaStream_t stream) {
    if (shared_bytes > 48 * 1024) {
        const cudaError_t result = cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (result != cudaSuccess) return result;
    }
    kernel<<<blocks, static_cast<unsigned>(threads), static_cast<std::size_t>(shared_bytes), stream>>>(
        arguments);
    return cudaGetLastError();
}

int launch(const RowsArguments& a, int x, int y, int shared_bytes, CUstream_st* stream) {
    return run_kernel(rows_kernel, dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)), row_threads, a,
                      shared_bytes, stream);
}
int launch(const TilesArguments& a, int blocks, int shared_bytes, CUstream_st* stream) {
    int result = cudaErrorInvalidValue;
    with_kind(a.kind, [&](auto kind) {
        result = run_kernel(tiles_kernel<kind.value>, dim3(static_cast<unsigned>(blocks)), tile_threads, a,
                            shared_bytes, stream);
    });
    return result;
}
int launch(const CentreArguments& a, int blocks, int shared_bytes, CUstream_st* stream) {
    return run_kernel(centre_kernel, dim3(static_cast<unsigned>(blocks)), tile_threads, a, shared_bytes,
                      stream);
}
int launch(const ProductArguments& a, int blocks, int shared_bytes, CUstream_st* stream) {
    return run_kernel(product_kernel, dim3(static_cast<unsigned>(blocks)), product_threads, a, shared_bytes,
                      stream);
}
int launch_probe(float* results, CUstream_st* stream) {
    probe_kernel<<<1, 1, 0, stream>>>(results, 0x1p-140f, 1.0f, 3.0f);
    return cudaGetLastError();
}

}  // namespace kvplane::cuda::detail
