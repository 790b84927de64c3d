// The integer sums of the CUDA kernels on a device, by tensor cores: the hash that integer_sums_test.cpp asserts of
// emulated lanes.
#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

#include "cuda/integer_sums.hpp"
#include "kvplane/cuda/warp.cuh"

namespace {

using namespace kvplane_test;

template <int bits>
__global__ void sums_kernel(const std::byte* input, kvplane::cuda::SegmentView keys,
                            kvplane::cuda::SegmentView values, std::int32_t* to) {
    using Sums = SumsOf<kvplane::cuda::DeviceWarp, bits>;
    std::int32_t sums[Sums::count];
    Sums::make(input, keys, values, sums);
    for (int i = 0; i < Sums::count; ++i) to[32 * i + threadIdx.x] = sums[i];
}

/// Of one width, from a device.
template <int bits>
bool add(ByteHash& hash) {
    constexpr int count = SumsOf<kvplane::cuda::DeviceWarp, bits>::count;
    const SumsInput input(bits);
    std::vector<std::int32_t> sums(32 * count);
    std::byte* bytes = nullptr;
    std::int32_t* results = nullptr;
    bool works =
        cudaMalloc(&bytes, input.bytes.size()) == cudaSuccess &&
        cudaMalloc(&results, sums.size() * 4) == cudaSuccess &&
        cudaMemcpy(bytes, input.bytes.data(), input.bytes.size(), cudaMemcpyHostToDevice) == cudaSuccess;
    if (works) {
        sums_kernel<bits><<<1, 32>>>(bytes, input.keys, input.values, results);
        works = cudaGetLastError() == cudaSuccess &&
                cudaMemcpy(sums.data(), results, sums.size() * 4, cudaMemcpyDeviceToHost) == cudaSuccess;
    }
    cudaFree(bytes);
    cudaFree(results);
    add_sums(hash, count, [&](int i, int lane) { return sums[static_cast<std::size_t>(32 * i + lane)]; });
    return works;
}

}  // namespace

int main() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("NO DEVICE: integer sums on a device are NOT TESTED\n");
        return 0;
    }
    ByteHash hash;
    bool works = true;
    at_every_width_of_codes([&]<int bits>() { works = add<bits>(hash) && works; });
    if (!works) {
        std::printf("FAILED: %s\n", cudaGetErrorString(cudaGetLastError()));
        return 1;
    }
    const bool same = hash.value() == golden_integer_sums;
    std::printf("integer sums: %016llx, %s\n", static_cast<unsigned long long>(hash.value()),
                same ? "those of the emulated lanes" : "FAILED: not those of the emulated lanes");
    return same ? 0 : 1;
}
