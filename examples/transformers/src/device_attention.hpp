// examples/transformers/src/device_attention.hpp: attention over the sequences of a layer on a device.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "cache.hpp"
#include "device_arrays.hpp"
#include "kvplane/cuda/device_attention.cuh"

namespace kvplane_python {

/// A sequence as kernels take it, and what its tiles are.
struct Attended {
    kvplane::cuda::DeviceSequence sequence;
    const kvplane::detail::CacheShape* shape;
    std::shared_ptr<const kvplane::LatentKeys> latent;
};

/// What attention of one layer has in a device's memory: a workspace, whose plan is on its way while the next
/// layer's is made, and what kernels look up of the layer.
class DeviceAttention {
  public:
    using Workspace = std::unique_ptr<kvplane::cuda::AttendWorkspace>;  ///< made when it is needed

    /// Forgets what it knows of sequences that are gone.
    void forget_views() { views_.clear(); }

    /// The layer of a sequence. Valid until the next call.
    const kvplane::cuda::AttendLayer& view(const Attended& sequence, std::size_t sequences);
    /// Those that are given as a list, in the device's memory; or the ones that are there.
    std::span<const float> sink_logits(const Attention& attention, kvplane::TilePool& pool,
                                       cudaStream_t stream);
    /// The last tokens of each sequence; there are so many at least. Rows of padding become 0. long_calls:
    /// the workspace of calls of many tokens, which layers share.
    void attend(std::span<const Attended> sequences, const SequenceRows& queries, const SequenceRows& output,
                std::span<const Index> padding, kvplane::AttentionParameters parameters,
                Workspace& long_calls, cudaStream_t stream);

  private:
    struct View {
        std::shared_ptr<const kvplane::LatentKeys> basis;  ///< where the cache has fitted its own
        kvplane::cuda::AttendLayer layer;
    };

    Workspace workspace_;
    std::vector<View> views_;
    std::vector<float> sink_logits_;
    kvplane::PageReference sink_logits_there_;
};

}  // namespace kvplane_python
