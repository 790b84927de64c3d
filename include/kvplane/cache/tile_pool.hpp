// kvplane/cache/tile_pool.hpp: reference-counted pages of memory that caches share.
//
// A page holds one tile of all heads, or some fp16 tokens. Pages that are no longer referred to stay in the
// pool, by size, and are handed out again; trim() gives them back. Memory comes from a std::pmr resource, so
// that an engine decides where (huge pages, NUMA, a budget) and a test can make it fail. All of it is safe
// from several threads; a pool must outlive the caches that use it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory_resource>
#include <mutex>
#include <new>
#include <utility>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

class TilePool;

/// A counted reference to a page; empty when default-made. Copies share the page.
class PageReference {
  public:
    /// What a page takes beside its bytes().
    static constexpr Index header_bytes = 64;

    PageReference() = default;
    PageReference(const PageReference& other) noexcept : page_(other.page_) {
        if (page_) page_->references.fetch_add(1, std::memory_order_relaxed);
    }
    PageReference(PageReference&& other) noexcept : page_(std::exchange(other.page_, nullptr)) {}
    PageReference& operator=(PageReference other) noexcept {
        std::swap(page_, other.page_);
        return *this;
    }
    ~PageReference() { release(); }

    explicit operator bool() const noexcept { return page_ != nullptr; }
    /// The page's bytes, aligned to 64.
    std::byte* data() const noexcept { return reinterpret_cast<std::byte*>(page_) + header_bytes; }
    Index bytes() const noexcept { return page_ ? page_->bytes : 0; }
    /// How many references there are, this one included. A page that others refer to must not be written.
    Index references() const noexcept {
        return page_ ? static_cast<Index>(page_->references.load(std::memory_order_acquire)) : 0;
    }
    bool operator==(const PageReference&) const = default;

  private:
    friend class TilePool;
    static constexpr std::size_t alignment = 64;

    struct Page {
        std::atomic<std::uint32_t> references;
        TilePool* pool;
        Index bytes;
        Page* next;  ///< in the pool's list of unused pages
    };
    static_assert(static_cast<Index>(sizeof(Page)) <= header_bytes);

    explicit PageReference(Page* page) noexcept : page_(page) {}
    void release() noexcept;

    Page* page_ = nullptr;
};

class TilePool {
  public:
    explicit TilePool(std::pmr::memory_resource* memory = std::pmr::new_delete_resource())
        : memory_(memory) {}
    TilePool(const TilePool&) = delete;
    TilePool& operator=(const TilePool&) = delete;
    ~TilePool() { trim(); }

    /// A page of `bytes` bytes, all zero. Throws Error (out_of_memory) and then has changed nothing.
    PageReference page(Index bytes) {
        PageReference::Page* page = reuse(bytes);
        if (!page) page = make(bytes);
        std::memset(reinterpret_cast<std::byte*>(page) + PageReference::header_bytes, 0,
                    static_cast<std::size_t>(bytes));
        page->references.store(1, std::memory_order_relaxed);
        return PageReference(page);
    }

    /// Gives the memory of unused pages back to the resource.
    void trim() noexcept {
        const std::lock_guard lock(mutex_);
        for (auto& [bytes, first] : unused_)
            while (first) {
                Page* const page = std::exchange(first, first->next);
                memory_->deallocate(page, size_of(bytes), PageReference::alignment);
                --pages_;
                --unused_pages_;
            }
    }

    /// Pages in all: those that are referred to, and those kept for reuse.
    Index pages() const noexcept {
        const std::lock_guard lock(mutex_);
        return pages_;
    }
    Index unused_pages() const noexcept {
        const std::lock_guard lock(mutex_);
        return unused_pages_;
    }

  private:
    friend class PageReference;
    using Page = PageReference::Page;

    static std::size_t size_of(Index bytes) noexcept {
        return static_cast<std::size_t>(bytes + PageReference::header_bytes);
    }

    Page* reuse(Index bytes) {
        const std::lock_guard lock(mutex_);
        const auto list = unused_.find(bytes);
        if (list == unused_.end() || !list->second) return nullptr;
        --unused_pages_;
        return std::exchange(list->second, list->second->next);
    }

    Page* make(Index bytes) {
        void* const memory = allocate(bytes);
        const std::lock_guard lock(mutex_);
        ++pages_;
        return new (memory) Page{{1}, this, bytes, nullptr};
    }

    /// The list for this size is made here, so that giving a page back never allocates.
    void* allocate(Index bytes) {
#if defined(__cpp_exceptions)
        try {
#endif
            {
                const std::lock_guard lock(mutex_);
                unused_.try_emplace(bytes, nullptr);
            }
            return memory_->allocate(size_of(bytes), PageReference::alignment);
#if defined(__cpp_exceptions)
        } catch (const std::bad_alloc&) {
            fail(ErrorCode::out_of_memory, "tile pool: no memory for a page of ", bytes, " bytes");
        }
#endif
    }

    void take_back(Page* page) noexcept {
        const std::lock_guard lock(mutex_);
        Page*& first = unused_.find(page->bytes)->second;
        page->next = std::exchange(first, page);
        ++unused_pages_;
    }

    std::pmr::memory_resource* memory_;
    mutable std::mutex mutex_;
    std::map<Index, Page*> unused_;
    Index pages_ = 0, unused_pages_ = 0;
};

inline void PageReference::release() noexcept {
    if (page_ && page_->references.fetch_sub(1, std::memory_order_acq_rel) == 1)
        page_->pool->take_back(page_);
    page_ = nullptr;
}

}  // namespace kvplane
