// tests/cuda/host_queue.hpp: the host in the place of a device: blocks run one after another, and memory that
// is new holds anything.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory_resource>
#include <vector>

#include "kvplane/cuda/encode.hpp"
#include "kvplane/cuda/latents.hpp"
#include "kvplane/cuda/queue.hpp"
#include "kvplane/cuda/token_rows.hpp"

namespace kvplane_test {

/// Memory that is not zero when it is new.
class DirtyMemory : public std::pmr::memory_resource {
  private:
    void* do_allocate(std::size_t bytes, std::size_t alignment) override {
        void* const memory = std::pmr::new_delete_resource()->allocate(bytes, alignment);
        std::memset(memory, 0xA5, bytes);
        return memory;
    }
    void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
        std::pmr::new_delete_resource()->deallocate(memory, bytes, alignment);
    }
    bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

class HostQueue : public kvplane::cuda::detail::Queue {
  public:
    bool backwards = false;  ///< the last thread first
    int threads = 64;        ///< of a block
    int most_shared = 227 * 1024;
    int waits = 0, launches = 0, copies = 0;  ///< copies: between host and device

    void to_device(void* to, const void* from, std::size_t bytes) override {
        ++copies;
        std::memcpy(to, from, bytes);
    }
    void to_host(void* to, const void* from, std::size_t bytes) override {
        ++copies;
        std::memcpy(to, from, bytes);
    }
    void within_device(void* to, const void* from, std::size_t bytes) override {
        std::memcpy(to, from, bytes);
    }
    void clear(void* to, std::size_t bytes) override { std::memset(to, 0, bytes); }
    void wait() override { ++waits; }
    int most_shared_bytes() const override { return most_shared; }

    void run(const kvplane::cuda::detail::RowsArguments& a, int x, int y, int shared) override {
        ++launches;
        for (int place = 0; place < y; ++place)
            for (int batch = 0; batch < x; ++batch)
                write_rows(kvplane::cuda::detail::HostBlock{threads, backwards}, a, batch, place,
                           dirty(shared));
    }
    void run(const kvplane::cuda::detail::TilesArguments& a, int blocks, int shared) override {
        ++launches;
        // Blocks have no order: the last may be the first.
        for (int block = blocks - 1; block >= 0; --block)
            kvplane::cuda::detail::with_kind(a.kind, [&](auto kind) {
                encode_tile<kind.value>(kvplane::cuda::detail::HostBlock{threads, backwards}, a, block,
                                        dirty(shared));
            });
    }
    void run(const kvplane::cuda::detail::CentreArguments& a, int blocks, int shared) override {
        ++launches;
        for (int block = 0; block < blocks; ++block)
            centre_keys(kvplane::cuda::detail::HostBlock{threads, backwards}, a, block, dirty(shared));
    }
    void run(const kvplane::cuda::detail::ProductArguments& a, int blocks, int shared) override {
        ++launches;
        for (int block = 0; block < blocks; ++block)
            multiply_keys(kvplane::cuda::detail::HostBlock{threads, backwards}, a, block, dirty(shared));
    }

  private:
    /// Exactly as much as was asked for, so that a sanitizer sees what is beyond.
    std::byte* dirty(int bytes) {
        shared_.assign(static_cast<std::size_t>(bytes + 15) / 16, Sixteen{});
        std::memset(shared_.data(), 0xA5, shared_.size() * 16);
        return shared_.data()->bytes;
    }
    struct alignas(16) Sixteen {
        std::byte bytes[16];
    };
    std::vector<Sixteen> shared_;
};

}  // namespace kvplane_test
