// kvplane/cuda/pages.cuh: the memory of a device as that of a TilePool.
//
//   cuda::DeviceMemory memory;
//   TilePool pool(&memory);            // its pages are in the memory of the current device
//   auto cache = cuda::DeviceCache::upload(host_cache, pool, stream);
//
// What a pool knows of its pages stands on the host, so that it never touches theirs. TilePool::page() and
// page_of() write pages from the host and are not for such a pool; unfilled() is.
//
// A page goes back to the pool when the last reference to it goes, and may be handed out at once, while
// kernels that were started before still read it. Work on the caches of one pool therefore belongs on one
// stream, or on streams that wait for each other where pages change hands.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <memory_resource>
#include <new>
#include <vector>

#include "kvplane/cuda/error.cuh"

namespace kvplane::cuda {

/// Memory of one device, taken in slabs, because an allocation of its own for every page would stop the
/// device each time. A slab goes back when nothing of it is in use. Calls are one at a time, as those of a
/// TilePool are.
class DeviceMemory : public std::pmr::memory_resource {
  public:
    static constexpr std::size_t alignment = 256;

    /// Of the device that is current when memory is taken. slab_bytes: what is taken at a time, if pages are
    /// smaller.
    explicit DeviceMemory(std::size_t slab_bytes = std::size_t{64} << 20) : slab_bytes_(slab_bytes) {}
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    ~DeviceMemory() override {
        for (const Slab& slab : slabs_) (void)cudaFree(slab.first);
    }

    /// Bytes taken from the device, in use or not.
    std::size_t bytes() const noexcept {
        std::size_t sum = 0;
        for (const Slab& slab : slabs_) sum += slab.bytes;
        return sum;
    }

  private:
    struct Slab {
        std::byte* first;
        std::size_t bytes, used, pages;  ///< used: bytes handed out, returned ones included
    };

    void* do_allocate(std::size_t bytes, std::size_t) override {
        bytes = std::max(alignment, (bytes + alignment - 1) / alignment * alignment);
        auto slab = std::find_if(slabs_.begin(), slabs_.end(),
                                 [&](const Slab& one) { return one.bytes - one.used >= bytes; });
        if (slab == slabs_.end()) {
            slabs_.reserve(slabs_.size() + 1);
            std::size_t size = std::max(bytes, slab_bytes_);
            void* memory = nullptr;
            cudaError_t result = cudaMalloc(&memory, size);
            if (result == cudaErrorMemoryAllocation && size > bytes) {
                size = bytes;
                (void)cudaGetLastError();
                result = cudaMalloc(&memory, size);
            }
            if (result == cudaErrorMemoryAllocation) {
                (void)cudaGetLastError();
                throw std::bad_alloc();
            }
            require_cuda(result, "taking memory for pages");
            slab = slabs_.insert(slabs_.end(), Slab{static_cast<std::byte*>(memory), size, 0, 0});
        }
        std::byte* const page = slab->first + slab->used;
        slab->used += bytes;
        ++slab->pages;
        return page;
    }
    void do_deallocate(void* memory, std::size_t, std::size_t) override {
        const auto slab = std::find_if(slabs_.begin(), slabs_.end(), [&](const Slab& one) {
            return memory >= one.first && memory < one.first + one.bytes;
        });
        if (slab == slabs_.end() || --slab->pages > 0) return;
        (void)cudaFree(slab->first);  // waits for kernels that use it
        slabs_.erase(slab);
    }
    bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override {
        return this == &other;
    }

    std::size_t slab_bytes_;
    std::vector<Slab> slabs_;
};

}  // namespace kvplane::cuda
