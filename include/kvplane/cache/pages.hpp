// kvplane/cache/pages.hpp: reference-counted pages of memory that caches share.
//
// A page holds one tile of all heads, or some unquantized tokens. Pages that are no longer referred to stay
// in the pool, by size, and are handed out again; trim() gives them back. Memory comes from a std::pmr
// resource, so that an engine decides where (huge pages, NUMA, a budget) and a test can make it fail. What
// the pool knows of a page stands outside it, so that nothing but tiles lies in the resource's memory.
//
// All of it is safe from several threads, and the resource is called by one at a time. A pool must outlive
// the caches that use it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <memory_resource>
#include <mutex>
#include <new>
#include <utility>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

class TilePool;

namespace detail {

/// What the pool knows of a page.
struct PageHeader {
    std::atomic<std::uint32_t> references;
    TilePool* pool;
    std::byte* data;
    Index bytes;
    PageHeader* next;  ///< in the pool's list of unused pages
};

}  // namespace detail

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
    /// Takes over a reference that is counted already.
    explicit PageReference(detail::PageHeader* page) noexcept : page_(page) {}

    explicit operator bool() const noexcept { return page_ != nullptr; }
    /// The page's bytes, aligned to 64.
    std::byte* data() const noexcept { return page_->data; }
    Index bytes() const noexcept { return page_ ? page_->bytes : 0; }
    /// How many references there are, this one included. A page that others refer to must not be written.
    Index references() const noexcept {
        return page_ ? static_cast<Index>(page_->references.load(std::memory_order_acquire)) : 0;
    }
    bool operator==(const PageReference&) const = default;

  private:
    void release() noexcept;

    detail::PageHeader* page_ = nullptr;
};

class TilePool {
  public:
    explicit TilePool(std::pmr::memory_resource* memory = std::pmr::new_delete_resource())
        : memory_(memory) {}
    TilePool(const TilePool&) = delete;
    TilePool& operator=(const TilePool&) = delete;
    ~TilePool() { trim(); }

    /// A page of `bytes` bytes, all zero. Where memory ends, unused pages of other sizes are given back
    /// first. Throws Error (out_of_memory) and then no page that is in use has changed.
    PageReference page(Index bytes) {
        PageReference page = unfilled(bytes);
        std::memset(page.data(), 0, static_cast<std::size_t>(bytes));
        return page;
    }
    /// A page with these bytes. Throws as page().
    PageReference page_of(const std::byte* content, Index bytes) {
        PageReference page = unfilled(bytes);
        std::memcpy(page.data(), content, static_cast<std::size_t>(bytes));
        return page;
    }

    /// A page that holds anything: of memory that the host does not write, or that is written whole anyway.
    /// Throws as page().
    PageReference unfilled(Index bytes) {
        detail::PageHeader* page = nullptr;
        {
            const std::lock_guard lock(mutex_);
            page = reuse(bytes);
            if (!page) page = make(bytes);
            if (page) used_bytes_ += bytes + PageReference::header_bytes;
        }
        if (!page) fail(ErrorCode::out_of_memory, "tile pool: no memory for a page of ", bytes, " bytes");
        page->references.store(1, std::memory_order_relaxed);
        return PageReference(page);
    }

    /// Gives the memory of unused pages back to the resource.
    void trim() noexcept {
        const std::lock_guard lock(mutex_);
        give_back();
    }

    /// Pages in all: those that are referred to, and those kept for reuse.
    Index pages() const noexcept {
        const std::lock_guard lock(mutex_);
        return pages_;
    }
    /// Memory of the pages that are referred to, each counted once however many forks share it, and with what
    /// the pool knows of it.
    Index bytes() const noexcept {
        const std::lock_guard lock(mutex_);
        return used_bytes_;
    }
    Index unused_pages() const noexcept {
        const std::lock_guard lock(mutex_);
        return unused_pages_;
    }

    /// For PageReference: takes back a page that nothing refers to.
    void take_back(detail::PageHeader* page) noexcept {
        const std::lock_guard lock(mutex_);
        detail::PageHeader*& first = unused_.find(page->bytes)->second;
        page->next = std::exchange(first, page);
        ++unused_pages_;
        used_bytes_ -= page->bytes + PageReference::header_bytes;
    }

  private:
    static constexpr std::size_t alignment = 64;

    // Each of these holds the lock.
    void give_back() noexcept {
        for (auto& [bytes, first] : unused_)
            while (first) {
                const std::unique_ptr<detail::PageHeader> page(std::exchange(first, first->next));
                memory_->deallocate(page->data, static_cast<std::size_t>(bytes), alignment);
                --pages_;
                --unused_pages_;
            }
    }
    detail::PageHeader* reuse(Index bytes) {
        const auto list = unused_.find(bytes);
        if (list == unused_.end() || !list->second) return nullptr;
        --unused_pages_;
        return std::exchange(list->second, list->second->next);
    }
    /// nullptr where there is no memory.
    detail::PageHeader* make(Index bytes) {
#if defined(__cpp_exceptions)
        try {
            return allocate(bytes);
        } catch (const std::bad_alloc&) {
            if (unused_pages_ == 0) return nullptr;
        }
        give_back();
        try {
            return allocate(bytes);
        } catch (const std::bad_alloc&) {
            return nullptr;
        }
#else
        return allocate(bytes);
#endif
    }
    detail::PageHeader* allocate(Index bytes) {
        // The list for this size is made here, so that taking a page back never allocates.
        unused_.try_emplace(bytes, nullptr);
        auto header = std::make_unique<detail::PageHeader>();
        header->data = static_cast<std::byte*>(memory_->allocate(static_cast<std::size_t>(bytes), alignment));
        header->pool = this;
        header->bytes = bytes;
        ++pages_;
        return header.release();
    }

    std::pmr::memory_resource* memory_;
    mutable std::mutex mutex_;
    std::map<Index, detail::PageHeader*> unused_;
    Index pages_ = 0, unused_pages_ = 0, used_bytes_ = 0;
};

inline void PageReference::release() noexcept {
    if (page_ && page_->references.fetch_sub(1, std::memory_order_acq_rel) == 1)
        page_->pool->take_back(page_);
    page_ = nullptr;
}

}  // namespace kvplane
