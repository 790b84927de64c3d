// examples/transformers/src/latents.hpp: keys of one layer in a basis that is fitted to them, tile by tile.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "kvplane/latent/keys.hpp"
#include "kvplane/simd/line_vector.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane_python {

struct LatentOptions {
    double bits = 3.0;
    std::optional<kvplane::RopeSettings> rope;
    kvplane::KeyFrame frame = kvplane::KeyFrame::tile;
    Index first_position = 0;
    bool heads_together = false;
    Index context = 4096;
};

/// Keys in latents: what recipes `latent` and `svdq` store of a sequence that is all in tiles.
class Latents {
  public:
    /// keys [tokens, heads * head_dim] after RoPE, at positions from first_position on, and the queries of
    /// the last of these tokens; without queries the basis is that of SVDq (arXiv 2502.15304). Throws Error
    /// (shape, option, not_finite).
    Latents(const Matrix& keys, Index kv_heads, const Matrix* queries, Index query_heads,
            const LatentOptions& options);

    Index tokens() const noexcept { return tokens_; }
    Index channels() const noexcept { return keys_->kv_heads() * keys_->head_dim(); }
    Index kv_heads() const noexcept { return keys_->kv_heads(); }
    /// Of the tiles and of the basis.
    Index bytes() const noexcept;
    Index basis_bytes() const noexcept { return keys_->bytes(); }
    double bits_per_element() const noexcept;
    /// Latents that have bits, subspace by subspace.
    std::vector<Index> kept() const;
    /// [tokens, channels] after RoPE, from the first `most` latents of each subspace. Throws Error (option).
    Matrix dequantize(Index most) const;

  private:
    Index tiles() const noexcept;

    std::shared_ptr<const kvplane::LatentKeys> keys_;
    Index tokens_ = 0, first_position_ = 0;
    std::vector<kvplane::detail::LineVector<std::byte>>
        subspaces_;  ///< [subspace] its tiles, one after another
};

}  // namespace kvplane_python
