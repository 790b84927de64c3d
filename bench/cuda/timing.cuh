// bench/cuda/timing.cuh: how long a launch takes whose data is in no cache, and how benches begin.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

namespace kvplane_bench {

inline void must(cudaError_t status, const char* doing) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", doing, cudaGetErrorString(status));
    std::exit(1);
}

static __global__ void read_all(const uint4* from, std::size_t count, std::uint32_t* to) {
    std::uint32_t sum = 0;
    const std::size_t stride = static_cast<std::size_t>(gridDim.x) * blockDim.x;
    std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + 7 * stride < count; i += 8 * stride) {
        uint4 word[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) word[k] = __ldcs(from + i + k * stride);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum ^= word[k].x ^ word[k].y ^ word[k].z ^ word[k].w;
    }
    for (; i < count; i += stride) sum ^= from[i].x;
    if (sum == 0x12345678u) *to = sum;
}

inline constexpr std::size_t flush_bytes = std::size_t{192} << 20;

/// Median time in microseconds of `launch`, whose data is not in the cache.
template <class Launch>
double time_of(const Launch& launch, const std::byte* other) {
    cudaEvent_t begin, end;
    must(cudaEventCreate(&begin), "event");
    must(cudaEventCreate(&end), "event");
    std::vector<float> times;
    for (int i = 0; i < 34; ++i) {
        read_all<<<1024, 256>>>(reinterpret_cast<const uint4*>(other), flush_bytes / 16, nullptr);
        must(cudaEventRecord(begin), "record");
        launch();
        must(cudaEventRecord(end), "record");
        must(cudaEventSynchronize(end), "wait");
        float ms = 0.0f;
        must(cudaEventElapsedTime(&ms, begin, end), "time");
        if (i >= 3) times.push_back(ms * 1000.0f);
    }
    std::nth_element(times.begin(), times.begin() + 15, times.end());
    return times[15];
}

/// Says which device it is. Returns memory that time_of() reads in between.
inline const std::byte* begin_bench() {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    cudaDeviceProp device{};
    must(cudaGetDeviceProperties(&device, 0), "device");
    std::printf("%s, %d multiprocessors, L2 %d MB\n", device.name, device.multiProcessorCount,
                device.l2CacheSize >> 20);
    std::byte* other = nullptr;
    must(cudaMalloc(&other, flush_bytes), "memory");
    must(cudaMemset(other, 1, flush_bytes), "fill");
    return other;
}

/// Whether a recipe is among a program's arguments, or all are wanted.
inline bool is_wanted(const char* recipe, std::span<char*> arguments) {
    return arguments.size() < 2 || std::any_of(arguments.begin() + 1, arguments.end(), [&](const char* name) {
               return std::strcmp(name, recipe) == 0;
           });
}

}  // namespace kvplane_bench
