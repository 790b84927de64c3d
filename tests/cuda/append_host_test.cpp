// The kernels of appends, block by block on the host: the bytes of KvCache, page for page; and what the host's side
// of a device's cache does.
#include <gtest/gtest.h>

#include <span>

#include "append_tests.hpp"
#include "host_queue.hpp"
#include "kvplane/cuda/cache_base.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;
using cuda::AppendCheck;
using cuda::detail::CacheBase;

/// The host in the place of a device.
struct HostMachine {
    using Cache = CacheBase;
    DirtyMemory memory;
    TilePool pool{&memory};
    HostQueue queue;

    std::vector<Cache> upload(std::span<const KvCache* const> caches) {
        return CacheBase::upload(caches, pool, queue);
    }
    KvCache download(Cache& cache, TilePool& host) {
        Cache* const one = &cache;
        return std::move(CacheBase::download({&one, 1}, host, queue)[0]);
    }
    void append(Cache& cache, const StridedRows& keys, const StridedRows* values, AppendCheck check) {
        cache.append(keys.rows, values ? &values->rows : nullptr, queue, check);
    }
    Cache fork(Cache& cache) { return cache.fork(queue); }
    void truncate(Cache& cache, Index count) { cache.truncate(count, queue); }
    void drop_before(Cache& cache, Index token, Index sinks) { cache.drop_before(token, sinks, queue); }
    std::vector<cuda::DeviceTile> table(const Cache& cache) {
        return {cache.device_tiles(), cache.device_tiles() + cache.tiles().size()};
    }
    std::vector<const std::byte*> recent_pages(const Cache& cache) {
        return {cache.device_recent_pages(), cache.device_recent_pages() + cache.recent_pages().size()};
    }
    /// Blocks of other sizes, and whose threads come in another order.
    void shuffle(int round) {
        queue.threads = round % 3 == 0 ? 32 : round % 3 == 1 ? 256 : 96;
        queue.backwards = round % 2 == 0;
    }
};

using AppendOnHost = AppendTest<HostMachine>;
KVPLANE_APPEND_TESTS(AppendOnHost);

}  // namespace
