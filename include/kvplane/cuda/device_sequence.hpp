// kvplane/cuda/device_sequence.hpp: the tokens of a cache in device memory, for whoever reads them there.
#pragma once

#include <cstddef>
#include <span>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

class LatentKeys;

namespace cuda {

/// Pointers to pages and tables, and numbers. Valid until the cache changes.
struct DeviceSequence {
    std::span<const DeviceTile> tiles;         ///< on the host, in the order of positions
    const DeviceTile* device_tiles = nullptr;  ///< the same in device memory
    const std::byte* sinks = nullptr;          ///< page of sinks
    std::span<const std::byte* const> recent;  ///< pages of recent tokens, on the host
    Index sink_count = 0, recent_first = 0, tokens = 0;
    Index hidden_from = 0, hidden_to = 0;  ///< tokens that no query sees
    Index page_bytes = 0;                  ///< of a page of tiles
    const LatentKeys* latent = nullptr;    ///< the basis of keys in latents
    bool narrowed = false;                 ///< whether some tiles have other widths than new ones get
};

}  // namespace cuda
}  // namespace kvplane
