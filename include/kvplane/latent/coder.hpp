// kvplane/latent/coder.hpp: keys to tiles of latents and back.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/latent/keys.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/storage/tile_coder.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane {

/// Encodes and decodes the tiles of one LatentKeys, in memory that is reused from tile to tile. Copies share
/// D as floats.
class LatentCoder {
  public:
    explicit LatentCoder(std::shared_ptr<const LatentKeys> keys);
    /// For tiles of other formats than those of the keys, such as narrower ones: one, or one a subspace.
    LatentCoder(std::shared_ptr<const LatentKeys> keys, std::span<const TileFormat> formats);

    /// Encodes 128 keys after RoPE [tokens, kv_heads * head_dim]; the tile of subspace s begins at tiles[s].
    /// Returns the largest |k - k'| of any element in the basis' frame. Latents beyond +-30000 standard
    /// deviations saturate.
    double encode(FramedKeys<KeyFrame::after_rope> keys, std::span<std::byte* const> tiles);

    /// The same of one subspace: keys [tokens, subspace_channels]. Calls for other subspaces may run at the same
    /// time.
    double encode(Index s, FramedKeys<KeyFrame::after_rope> keys, std::byte* tile);

    /// The first `tokens` latents of a subspace's tile [tokens, kept], valid until the next call.
    const Matrix& latents(Index s, const std::byte* tile, Index tokens);
    /// D of a subspace as floats [channels, kept].
    const Matrix& from_latents(Index s) const { return (*from_latents_)[static_cast<std::size_t>(s)]; }

    /// The keys of one head after RoPE [tokens, head_dim], from the first `most` latents. `first`: position
    /// of the tile's first token.
    Matrix reconstruct(Index kv_head, const std::byte* tile, Index tokens, Index first, Index most);

  private:
    Matrix in_frame(FramedKeys<KeyFrame::after_rope> keys) const;
    /// What encoding a subspace takes: E and D transposed, padded to whole vectors, and memory to work in.
    struct Encoding {
        Matrix to_latents;    // [channels, padded kept]
        Matrix from_latents;  // [kept, padded channels]
        Matrix centered, latents, decoded, close;
    };
    Encoding& prepare(Index s);

    std::shared_ptr<const LatentKeys> keys_;
    std::vector<detail::TileCoder> coders_;                    // [subspace]
    std::shared_ptr<const std::vector<Matrix>> from_latents_;  // [subspace] D
    std::vector<Encoding> encodings_;                          // [subspace] filled when it is first encoded
    Matrix latents_;
};

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/latent/impl/coder.hpp"
#endif
