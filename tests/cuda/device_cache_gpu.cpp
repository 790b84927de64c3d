// Caches in the memory of a device: the bytes of KvCache, page for page. Without a device all of it is
// skipped, which it says.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <span>
#include <utility>
#include <vector>

#include "append_tests.hpp"
#include "cuda/device_bytes.hpp"
#include "kvplane/cuda/device_cache.cuh"

namespace {

using namespace kvplane;
using namespace kvplane_test;
using cuda::AppendCheck;
using cuda::DeviceCache;
using cuda::require_cuda;

/// A copy of the host's bytes in device memory.
DeviceBytes on_device(const std::vector<std::byte>& bytes) {
    return {bytes.data(), bytes.size()};
}

struct DeviceMachine {
    using Cache = DeviceCache;
    cuda::DeviceMemory memory;
    TilePool pool{&memory};
    cudaStream_t stream = nullptr;

    DeviceMachine() {
        require_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    }
    ~DeviceMachine() { (void)cudaStreamDestroy(stream); }
    DeviceMachine(const DeviceMachine&) = delete;
    DeviceMachine& operator=(const DeviceMachine&) = delete;

    std::vector<Cache> upload(std::span<const KvCache* const> caches) {
        return DeviceCache::upload(caches, pool, stream);
    }
    KvCache download(Cache& cache, TilePool& host) { return cache.download(host, stream); }
    void append(Cache& cache, const StridedRows& keys, const StridedRows* values, AppendCheck check) {
        const DeviceBytes key_bytes = on_device(keys.bytes),
                          value_bytes = on_device(values ? values->bytes : std::vector<std::byte>{});
        const auto rows_in = [](const StridedRows& rows, const DeviceBytes& bytes) {
            cuda::DeviceRows to = rows.rows;
            // Rows need not begin where their memory does.
            to.data = bytes.as() + (static_cast<const std::byte*>(rows.rows.data) - rows.bytes.data());
            return to;
        };
        if (!values) return cache.append(rows_in(keys, key_bytes), stream, check);
        cache.append(rows_in(keys, key_bytes), rows_in(*values, value_bytes), stream, check);
    }
    Cache fork(Cache& cache) { return cache.fork(stream); }
    void truncate(Cache& cache, Index count) { cache.truncate(count, stream); }
    void drop_before(Cache& cache, Index token, Index sinks) { cache.drop_before(token, sinks, stream); }
    template <class T>
    std::vector<T> fetched(const T* from, std::size_t count) {
        std::vector<T> to(count);
        if (count > 0)
            require_cuda(cudaMemcpyAsync(to.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, stream),
                         "reading a table");
        require_cuda(cudaStreamSynchronize(stream), "reading a table");
        return to;
    }
    std::vector<cuda::DeviceTile> table(const Cache& cache) {
        return fetched(cache.device_tiles(), cache.tiles().size());
    }
    std::vector<const std::byte*> recent_pages(const Cache& cache) {
        return fetched(cache.device_recent_pages(), cache.recent_pages().size());
    }
    void shuffle(int) {}
};

using AppendOnDevice = AppendTest<DeviceMachine>;
KVPLANE_APPEND_TESTS(AppendOnDevice);

TEST(DeviceMemory, GivesSlabsBack) {
    cuda::DeviceMemory memory(1 << 20);
    {
        TilePool pool(&memory);
        {
            std::vector<PageReference> pages;
            for (int i = 0; i < 10; ++i) pages.push_back(pool.unfilled(300 * 1000));
            for (const PageReference& page : pages)
                EXPECT_EQ(reinterpret_cast<std::uintptr_t>(page.data()) % cuda::DeviceMemory::alignment, 0u);
            EXPECT_EQ(memory.bytes(), 4u << 20);
        }
        pool.trim();
        EXPECT_EQ(memory.bytes(), 0u);
    }
}

/// Work of appends without a check is there for whatever comes behind it on the stream, and nothing waits.
TEST(DeviceCache, ManyTokensWithoutWaiting) {
    DeviceMachine machine;
    TilePool host;
    const CacheConfiguration c = configuration("standard", 8, 32, 128, 128);
    std::mt19937_64 random(seed());
    const Matrix keys = rounded_to(append_numbers(random, 700, 1024), ScalarType::float16),
                 values = rounded_to(append_numbers(random, 700, 1024), ScalarType::float16);
    KvCache expected(c, host);
    expected.append(keys, values);
    const StridedRows key_rows(keys, 8, ScalarType::float16, StridedRows::Order::token_head_channel),
        value_rows(values, 8, ScalarType::float16, StridedRows::Order::token_head_channel);
    const DeviceBytes key_bytes = on_device(key_rows.bytes), value_bytes = on_device(value_rows.bytes);
    DeviceCache cache(c, machine.pool);
    for (Index t = 0; t < 700; ++t) {
        const auto one = [&](const StridedRows& rows, const DeviceBytes& bytes) {
            cuda::DeviceRows row = rows.rows;
            row.tokens = 1;
            row.data = bytes.as() + 2 * t * row.token_stride;
            return row;
        };
        cache.append(one(key_rows, key_bytes), one(value_rows, value_bytes), machine.stream,
                     AppendCheck::none);
    }
    EXPECT_EQ(cache_difference(cache.download(host, machine.stream), expected), "");
}

}  // namespace

int main(int count, char** arguments) {
    testing::InitGoogleTest(&count, arguments);
    int devices = 0;
    const cudaError_t result = cudaGetDeviceCount(&devices);
    if (result != cudaSuccess || devices == 0) {
        std::printf("NO DEVICE (%s): appends on a device are NOT TESTED\n", cudaGetErrorString(result));
        return 0;
    }
    cudaDeviceProp device{};
    if (cudaGetDeviceProperties(&device, 0) == cudaSuccess)
        std::printf("device: %s, compute capability %d.%d\n", device.name, device.major, device.minor);
    return RUN_ALL_TESTS();
}
