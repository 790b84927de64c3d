// kvplane/cuda/latent_view.hpp: keys in latents as kernels take them: plain numbers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/tile_views.hpp"

namespace kvplane::cuda {

/// What differs from head to head.
struct LatentHead {
    KeyTileView keys;
    std::int32_t key_at, value_at;  ///< of the tiles in a page
    std::int32_t column_groups;     ///< of 32 columns of the basis each
};

/// Where a table for each key head says how its queries become latents (cuda/latent_table.hpp). A block of
/// threads keeps that of its head in its own memory. Channels are counted in multiples of 16, columns in
/// multiples of 32; those that are too many are 0. Positions in bytes from the head's begin.
struct LatentView {
    const std::byte* table;  ///< in device memory; nullptr: keys are not in latents
    std::uint32_t head_bytes;
    std::uint32_t
        turns_at;  ///< [channel] turns of RoPE a position in 2^-64, 64 bits, first channels of pairs
                   ///< forward and second ones back
    std::uint32_t partners_at;  ///< [channel] the other channel of the pair
    std::uint32_t mean_at;      ///< [channel] of keys
    std::uint32_t scale_at;     ///< [column] what a column of the basis is multiplied by
    std::uint32_t basis_at;     ///< fp16 columns in the order of operands of tensor cores
    std::int32_t channels, columns;
    std::uint32_t factor_bytes;  ///< what the factors of a tile take of a warp's memory
    bool turns;                  ///< whether queries differ from tile to tile

    /// Rows of tiles that are projected together.
    static constexpr int product_rows = 16;

    // A warp's memory: latents of several tiles, in turn with cosines and sines; what the mean adds; operands
    // of the projection, in turn with factors.

    /// Of a tile's latents, [column][row]; tiles begin in different banks of memory.
    KVPLANE_DEVICE std::uint32_t tile_bytes(int rows) const {
        return static_cast<std::uint32_t>(columns * rows) * 4u + 16u;
    }
    KVPLANE_DEVICE std::uint32_t offsets_at() const {
        const std::uint32_t latents = 4u * tile_bytes(4),
                            angles = 4u * static_cast<std::uint32_t>(channels) * 8u;
        return latents < angles ? angles : latents;
    }
    KVPLANE_DEVICE std::uint32_t operands_at() const { return offsets_at() + 4u * product_rows; }
    KVPLANE_DEVICE std::uint32_t factors_at() const { return operands_at(); }
    KVPLANE_DEVICE std::uint32_t warp_bytes() const {
        const std::uint32_t operands = static_cast<std::uint32_t>(channels) * 32u;
        return operands_at() + (factor_bytes < operands ? operands : factor_bytes);
    }
};

}  // namespace kvplane::cuda
