// kvplane/cuda/device_cache.cuh: the key/value cache of one layer and one sequence in the memory of a device.
//
//   cuda::DeviceMemory memory;                       // outlives the pool, as the pool outlives the caches
//   TilePool pool(&memory);
//   cuda::DeviceCache cache(configuration, pool);    // or cuda::DeviceCache::upload(host_cache, pool,
//   stream) cache.append(keys, values, stream);              // device pointers with strides, after RoPE
//   ... kernels read cache.device_tiles() ...
//   KvCache again = cache.download(host_pool, stream);
//
// It is a KvCache byte for byte: its tiles, sinks and recent tokens, their layouts, all counts. append()
// stores the very bytes that KvCache::append would of the same numbers, however these come in pieces. What
// goes to a file and comes from one goes through KvCache: download() and save, load and upload().
//
// This header is for the host's compiler and links kvplane::cuda, whose kernels nvcc compiles. (nvcc cannot
// read it; cuda/launch.hpp says why.) Every call starts its work on a stream, and returns before it is done
// unless it says otherwise. Calls for one cache come one at a time; those for caches of one pool go to one
// stream, or to streams that wait for each other (cuda/pages.cuh).
#pragma once

#if defined(__CUDACC__)
#error \
    "kvplane: cuda/device_cache.cuh is for the host's compiler; kernels need no more than cuda/arguments.hpp"
#endif

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cuda/cache_base.hpp"
#include "kvplane/cuda/device_sequence.hpp"
#include "kvplane/cuda/error.cuh"
#include "kvplane/cuda/launch.hpp"
#include "kvplane/cuda/pages.cuh"

namespace kvplane::cuda {

namespace detail {

class StreamQueue final : public Queue {
  public:
    explicit StreamQueue(cudaStream_t stream) : stream_(stream) {}

    // Copies from memory that is not pinned have left it when the call returns.
    void to_device(void* to, const void* from, std::size_t bytes) override {
        copy(to, from, bytes, cudaMemcpyHostToDevice, "copying to the device");
    }
    void to_host(void* to, const void* from, std::size_t bytes) override {
        copy(to, from, bytes, cudaMemcpyDeviceToHost, "copying from the device");
    }
    void within_device(void* to, const void* from, std::size_t bytes) override {
        copy(to, from, bytes, cudaMemcpyDeviceToDevice, "copying a page");
    }
    void clear(void* to, std::size_t bytes) override {
        require_cuda(cudaMemsetAsync(to, 0, bytes, stream_), "clearing a page");
    }
    void wait() override { require_cuda(cudaStreamSynchronize(stream_), "waiting for a stream"); }
    int most_shared_bytes() const override {
        int device = 0, bytes = 0;
        require_cuda(cudaGetDevice(&device), "asking for the device");
        require_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                     "asking for shared memory");
        return bytes;
    }
    void run(const RowsArguments& a, int x, int y, int shared_bytes) override {
        started(launch(a, x, y, shared_bytes, stream_), "storing tokens outside tiles");
    }
    void run(const TilesArguments& a, int blocks, int shared_bytes) override {
        started(launch(a, blocks, shared_bytes, stream_), "making tiles");
    }
    void run(const CentreArguments& a, int blocks, int shared_bytes) override {
        started(launch(a, blocks, shared_bytes, stream_), "turning keys for latents");
    }
    void run(const ProductArguments& a, int blocks, int shared_bytes) override {
        started(launch(a, blocks, shared_bytes, stream_), "projecting keys");
    }

    /// That kernels were compiled without -ftz and --use_fast_math. Throws Error (option). It waits, once in
    /// a program.
    void require_exact_kernels() {
        static std::atomic<bool> known{false};
        if (known.load(std::memory_order_relaxed)) return;
        float* results = nullptr;
        require_cuda(cudaMalloc(reinterpret_cast<void**>(&results), 3 * sizeof(float)), "taking memory");
        float found[3] = {};
        const int launched = launch_probe(results, stream_);
        const cudaError_t copied =
                              cudaMemcpyAsync(found, results, sizeof found, cudaMemcpyDeviceToHost, stream_),
                          waited = cudaStreamSynchronize(stream_);
        (void)cudaFree(results);
        started(launched, "trying a kernel");
        require_cuda(copied, "trying a kernel");
        require_cuda(waited, "trying a kernel");
        require(found[0] == 0x1p-139f && found[1] == 1.0f / 3.0f && found[2] == 1.0f, ErrorCode::option,
                "append on the device: its kernels were compiled with -ftz=true or --use_fast_math, and "
                "would not "
                "store the bytes of KvCache; compile cuda/append.cuh without them");
        known.store(true, std::memory_order_relaxed);
    }

  private:
    void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, const char* doing) {
        require_cuda(cudaMemcpyAsync(to, from, bytes, kind, stream_), doing);
    }
    static void started(int result, const char* doing) {
        require_cuda(static_cast<cudaError_t>(result), doing);
    }

    cudaStream_t stream_;
};

}  // namespace detail

class DeviceCache {
  public:
    /// No tokens. Throws Error (option) for a configuration that cannot be, or whose recipe fits its own
    /// basis. The pool is of a DeviceMemory, and must outlive the cache.
    DeviceCache(const CacheConfiguration& configuration, TilePool& device) : cache_(configuration, device) {}

    /// A copy of a cache, or of several at once: pages that these share are copied once and shared again.
    /// Throws Error: option (provisional tokens; a recipe that has yet to fit its basis), out_of_memory, io.
    static DeviceCache upload(const KvCache& cache, TilePool& device, cudaStream_t stream) {
        const KvCache* const one = &cache;
        return std::move(upload(std::span(&one, 1), device, stream).front());
    }
    static std::vector<DeviceCache> upload(std::span<const KvCache* const> caches, TilePool& device,
                                           cudaStream_t stream) {
        detail::StreamQueue queue(stream);
        std::vector<DeviceCache> all;
        for (detail::CacheBase& cache : detail::CacheBase::upload(caches, device, queue))
            all.push_back(DeviceCache(std::move(cache)));
        return all;
    }
    /// The same back, into pages of a pool in the host's memory. Waits for the stream. Throws Error
    /// (out_of_memory, io).
    KvCache download(TilePool& host, cudaStream_t stream) {
        DeviceCache* const one = this;
        return std::move(download(std::span(&one, 1), host, stream).front());
    }
    static std::vector<KvCache> download(std::span<DeviceCache* const> caches, TilePool& host,
                                         cudaStream_t stream) {
        detail::StreamQueue queue(stream);
        std::vector<detail::CacheBase*> bases;
        for (DeviceCache* const cache : caches) bases.push_back(&cache->cache_);
        return detail::CacheBase::download(bases, host, queue);
    }

    /// A cache of the same content. It shares all pages; the first append to a page that is not full copies
    /// that page. It does not wait.
    DeviceCache fork(cudaStream_t stream) const {
        detail::StreamQueue queue(stream);
        return DeviceCache(cache_.fork(queue));
    }

    /// Appends tokens: keys tokens x kv_heads x key_head_dim, values tokens x kv_heads x value_head_dim,
    /// after RoPE. The stream must come to their memory after it is written, and before it is written again.
    ///
    /// Throws Error, and then has changed nothing: shape; not_finite and beyond_fp16 with the position, for
    /// which it waits (AppendCheck says how not to); out_of_memory; io; option for recipes that must append
    /// on the host: that shape keys, give tokens of values different widths, or clip. No tokens are
    /// provisional here.
    ///
    /// After a truncation inside a tile the host opens that tile, as KvCache does, and appends the first
    /// token there: this takes a page to the host and some back.
    void append(const DeviceRows& keys, const DeviceRows& values, cudaStream_t stream,
                AppendCheck check = AppendCheck::wait) {
        append(keys, &values, stream, check);
    }
    /// Where values are in keys.
    void append(const DeviceRows& keys, cudaStream_t stream, AppendCheck check = AppendCheck::wait) {
        append(keys, nullptr, stream, check);
    }

    /// As those of KvCache. They start nothing but copies of what kernels read.
    void truncate(Index count, cudaStream_t stream) {
        detail::StreamQueue queue(stream);
        cache_.truncate(count, queue);
    }
    void drop_before(Index token, Index sinks, cudaStream_t stream) {
        detail::StreamQueue queue(stream);
        cache_.drop_before(token, sinks, queue);
    }
    void drop_before(Index token, cudaStream_t stream) { drop_before(token, state().kept_sinks, stream); }

    const CacheConfiguration& configuration() const noexcept { return cache_.configuration(); }
    TilePool& pool() const noexcept { return cache_.pool(); }
    Index tokens() const noexcept { return cache_.tokens(); }
    /// The first token after the kept sinks that is seen; see drop_before().
    Index first_kept() const noexcept { return cache_.first_kept(); }
    /// Memory of all pages, as KvCache::bytes(). The tables of tiles and of pages, and what appends look up,
    /// are not counted.
    Index bytes() const noexcept { return cache_.bytes(); }

    // What kernels read. Pointers hold until the cache changes; what they point to is there for work that
    // comes later on the stream.

    /// [tile] in device memory, in the order of positions; nullptr without tiles.
    const DeviceTile* device_tiles() const noexcept { return cache_.device_tiles(); }
    /// The same on the host.
    const std::vector<DeviceTile>& tiles() const noexcept { return cache_.tiles(); }
    /// The page of sinks, laid out as cache/token_rows.hpp says, of recipe.sink_tokens tokens; nullptr
    /// without sinks.
    const std::byte* sink_page() const noexcept { return cache_.sink_page(); }
    /// Pages of recent tokens, 32 each, from position state().recent_first on: in device memory, and on the
    /// host.
    const std::byte* const* device_recent_pages() const noexcept { return cache_.device_recent_pages(); }
    const std::vector<const std::byte*>& recent_pages() const noexcept { return cache_.recent_pages(); }

    /// All of that, for attention.
    DeviceSequence sequence() const noexcept {
        return {.tiles = tiles(),
                .device_tiles = device_tiles(),
                .sinks = sink_page(),
                .recent = recent_pages(),
                .sink_count = state().sink_count(configuration().recipe),
                .recent_first = state().recent_first,
                .tokens = tokens(),
                .hidden_from = state().kept_sinks,
                .hidden_to = state().dropped,
                .page_bytes = state().layout->bytes,
                .latent = state().latent.get(),
                .narrowed = state().has_narrowed()};
    }

    /// Pages of this state are in device memory. Its extremes lack tokens that were appended without a check,
    /// until download().
    const kvplane::detail::CacheState& state() const noexcept { return cache_.state(); }
    const kvplane::detail::CacheShape& shape() const noexcept { return cache_.shape(); }

  private:
    explicit DeviceCache(detail::CacheBase&& cache) : cache_(std::move(cache)) {}
    void append(const DeviceRows& keys, const DeviceRows* values, cudaStream_t stream, AppendCheck check) {
        detail::StreamQueue queue(stream);
        queue.require_exact_kernels();
        cache_.append(keys, values, queue, check);
    }

    detail::CacheBase cache_;
};

}  // namespace kvplane::cuda
