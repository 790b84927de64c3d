// examples/transformers/src/drafted_sequence.hpp: one sequence of a layer on a device, whose last tokens may
// be provisional.
#pragma once

#include <optional>
#include <vector>

#include "device_arrays.hpp"
#include "kvplane/cuda/device_cache.cuh"

namespace kvplane_python {

using kvplane::cuda::DeviceCache;

/// Provisional tokens are appended like others. A tile that is made with some of them could not be taken back
/// without a trace: so a fork from before the first such tile is kept, and the tokens behind it as they came.
class DraftedSequence {
  public:
    /// truncates_exactly: as kvplane::capabilities() says of the recipe; nothing is kept then.
    DraftedSequence(DeviceCache cache, bool truncates_exactly)
        : cache_(std::move(cache)), truncates_exactly_(truncates_exactly) {}

    DeviceCache& cache() noexcept { return cache_; }
    const DeviceCache& cache() const noexcept { return cache_; }
    Index provisional() const noexcept { return provisional_; }

    /// Throws Error (shape) for provisional tokens that cannot be kept: whose channels are apart, or which
    /// overlap.
    void require_kept(const SequenceRows& rows, const char* name) const;
    void append(const DeviceRows& keys, const DeviceRows& values, bool provisional,
                kvplane::cuda::AppendCheck check, cudaStream_t stream);
    /// Back to so many tokens after an append of a batch has failed; to `before`, if there is a fork from
    /// before it.
    void take_back(Index tokens, bool provisional, DeviceCache* before, cudaStream_t stream);
    /// To fewer tokens than there are.
    void truncate(Index count, cudaStream_t stream);
    /// Makes the first of the provisional tokens tokens like others.
    void accept(Index count);
    void accept_all() { accept(provisional_); }
    DraftedSequence fork(cudaStream_t stream) const;

  private:
    /// Keys and values of some provisional tokens as they came, in pages of the pool.
    struct Draft {
        kvplane::PageReference memory[2];
        DeviceRows keys, values;
    };

    bool makes_tile(Index more) const;
    Draft kept(const DeviceRows& keys, const DeviceRows& values, cudaStream_t stream) const;
    void forget_drafts_from(Index count);

    DeviceCache cache_;
    bool truncates_exactly_;
    Index provisional_ = 0;
    std::optional<DeviceCache> before_;
    std::vector<Draft> drafts_;  ///< those behind before_
};

}  // namespace kvplane_python
