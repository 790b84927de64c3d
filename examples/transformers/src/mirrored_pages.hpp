// examples/transformers/src/mirrored_pages.hpp: what a device reads of caches on the CPU: their pages,
// copied.
#pragma once

#include <cuda_runtime_api.h>

#include <unordered_map>
#include <utility>
#include <vector>

#include "device_arrays.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cuda/cache_base.hpp"
#include "kvplane/cuda/device_sequence.hpp"
#include "kvplane/cuda/error.cuh"

namespace kvplane_python {

using kvplane::KvCache;
using kvplane::PageReference;
using kvplane::cuda::DeviceSequence;
using kvplane::cuda::require_cuda;

/// Copies of host pages on a device, by the address of the host's: each is copied once, however many caches
/// share it. While a copy is there, so is the host's page, which whoever writes copies first: another page,
/// at another address. So no copy is ever out of date.
class MirroredPages {
  public:
    /// Between begin() and end() all pages are asked for; the copies of others go.
    void begin() { ++round_; }
    std::byte* copy_of(const PageReference& page, kvplane::TilePool& pool, cudaStream_t stream) {
        Copy& copy = copies_[page.data()];
        copy.round = round_;
        if (!copy.here) {
            copy.there = pool.unfilled(page.bytes());
            require_cuda(cudaMemcpyAsync(copy.there.data(), page.data(), to_size(page.bytes()),
                                         cudaMemcpyHostToDevice, stream),
                         "copying a page to the device");
            copy.here = page;
        }
        return copy.there.data();
    }
    void end() {
        std::erase_if(copies_, [&](const auto& one) { return one.second.round != round_; });
    }

  private:
    struct Copy {
        PageReference here, there;
        Index round = 0;
    };
    std::unordered_map<const std::byte*, Copy> copies_;
    Index round_ = 0;
};

/// A sequence whose pages are mirrored.
struct MirroredSequence {
    std::vector<kvplane::cuda::DeviceTile> tiles;
    std::vector<const std::byte*> recent;
    const std::byte* sinks = nullptr;
    PageReference table;

    void show(const KvCache& cache, MirroredPages& pages, kvplane::TilePool& pool, cudaStream_t stream) {
        const auto& state = cache.state();
        std::vector<kvplane::cuda::DeviceTile> next;
        for (std::size_t t = 0; t < state.tiles.size(); ++t) {
            next.push_back(kvplane::cuda::detail::DeviceAppend::device_tile(state.tiles[t]));
            next.back().page = pages.copy_of(state.tile_pages[t], pool, stream);
        }
        if (next != tiles) {
            const Index bytes = static_cast<Index>(next.size() * sizeof(next[0]));
            if (!table || table.bytes() < bytes) table = pool.unfilled((2 * bytes + 255) / 256 * 256);
            tiles.clear();
            if (bytes > 0)
                require_cuda(cudaMemcpyAsync(table.data(), next.data(), to_size(bytes),
                                             cudaMemcpyHostToDevice, stream),
                             "copying a table of tiles");
            tiles = std::move(next);
        }
        recent.clear();
        for (const PageReference& page : state.recent) recent.push_back(pages.copy_of(page, pool, stream));
        sinks = state.sinks ? pages.copy_of(state.sinks, pool, stream) : nullptr;
    }
    DeviceSequence sequence(const KvCache& cache) const {
        const auto& state = cache.state();
        return {.tiles = tiles,
                .device_tiles = tiles.empty()
                                    ? nullptr
                                    : reinterpret_cast<const kvplane::cuda::DeviceTile*>(table.data()),
                .sinks = sinks,
                .recent = recent,
                .sink_count = state.sink_count(cache.configuration().recipe),
                .recent_first = state.recent_first,
                .tokens = cache.tokens(),
                .hidden_from = state.kept_sinks,
                .hidden_to = state.dropped,
                .page_bytes = state.layout->bytes,
                .latent = state.latent.get(),
                .narrowed = state.has_narrowed()};
    }
};

}  // namespace kvplane_python
