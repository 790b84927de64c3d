// kvplane/cache/huge_pages.hpp: memory for a TilePool in pages of 2 MiB, where the system has them.
//
//   HugePageResource memory;
//   TilePool pool(&memory);
//
// Attention reads all of a cache for every token; with pages of 4 KiB it then misses the processor's table of
// addresses every few tiles. Memory comes in slabs, which are handed out front to back and given back to the
// system when nothing in them is in use: what a TilePool needs, which keeps its unused pages itself. On Linux
// huge pages are asked for by madvise and granted where /sys/kernel/mm/transparent_hugepage/enabled says
// madvise or always; elsewhere a slab is ordinary memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <memory_resource>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kvplane {

/// Safe from several threads; must outlive what is allocated from it.
class HugePageResource final : public std::pmr::memory_resource {
  public:
    static constexpr std::size_t page_bytes = std::size_t{2} << 20;

    /// slab_bytes is rounded up to whole huge pages; a larger allocation gets a slab of its own size.
    explicit HugePageResource(std::size_t slab_bytes = 16 * page_bytes)
        : slab_bytes_(std::max(rounded(slab_bytes, page_bytes), page_bytes)) {}
    HugePageResource(const HugePageResource&) = delete;
    HugePageResource& operator=(const HugePageResource&) = delete;
    ~HugePageResource() override {
        for (const Slab& slab : slabs_) give_back(slab);
    }

    /// Memory of all slabs, used or not. A page of it that was never touched takes no room.
    std::size_t bytes() const {
        const std::lock_guard lock(mutex_);
        std::size_t sum = 0;
        for (const Slab& slab : slabs_) sum += slab.bytes;
        return sum;
    }

  private:
    struct Slab {
        std::byte* memory;
        std::size_t bytes, alignment;
        std::size_t used, allocations;
    };

    static std::size_t rounded(std::size_t bytes, std::size_t to) noexcept {
        return (bytes + to - 1) / to * to;
    }
    static void give_back(const Slab& slab) noexcept {
        ::operator delete (slab.memory, std::align_val_t{slab.alignment});
    }

    void* do_allocate(std::size_t bytes, std::size_t alignment) override {
        const std::lock_guard lock(mutex_);
        if (Slab* const slab = find(current_)) {
            const std::size_t at = rounded(slab->used, alignment);
            if (at <= slab->bytes && bytes <= slab->bytes - at) {
                slab->used = at + bytes;
                ++slab->allocations;
                return slab->memory + at;
            }
        }
        const std::size_t size = std::max({slab_bytes_, bytes, rounded(bytes, page_bytes)});
        const std::size_t aligned_to = std::max(alignment, page_bytes);
        slabs_.reserve(slabs_.size() + 1);  // so that nothing fails once there is memory
        auto* const memory = static_cast<std::byte*>(::operator new (size, std::align_val_t{aligned_to}));
#if defined(__linux__)
        // Refused where the system has none: the memory is as good without.
        (void)::madvise(memory, size, MADV_HUGEPAGE);
#endif
        // The slab before may have been emptied while it was current.
        if (Slab* const slab = find(current_); slab && slab->allocations == 0) drop(*slab);
        const auto place = std::upper_bound(slabs_.begin(), slabs_.end(), memory, before);
        slabs_.insert(place, {memory, size, aligned_to, bytes, 1});
        current_ = memory;
        return memory;
    }

    void do_deallocate(void* allocation, std::size_t, std::size_t) override {
        const std::lock_guard lock(mutex_);
        Slab& slab = *find(static_cast<const std::byte*>(allocation));
        if (--slab.allocations > 0) return;
        if (slab.memory == current_)
            slab.used = 0;
        else
            drop(slab);
    }

    bool do_is_equal(const memory_resource& other) const noexcept override {
        return this == &other;
    }

    static bool before(const std::byte* memory, const Slab& slab) noexcept {
        return memory < slab.memory;
    }
    /// The slab that holds an address; nullptr for nullptr.
    Slab* find(const std::byte* address) noexcept {
        if (!address) return nullptr;
        return &*std::prev(std::upper_bound(slabs_.begin(), slabs_.end(), address, before));
    }
    void drop(const Slab& slab) noexcept {
        give_back(slab);
        slabs_.erase(slabs_.begin() + (&slab - slabs_.data()));
    }

    std::size_t slab_bytes_;
    mutable std::mutex mutex_;
    std::vector<Slab> slabs_;  ///< by address
    std::byte* current_ = nullptr;
};

}  // namespace kvplane
