// kvplane/latent/keys.hpp: the keys of one layer in latents: a basis, its widths, and the format of their
// tiles.
//
// LatentKeys is what a cache keeps of a LatentBasis: from every subspace the latents that have bits, as fp16
// columns with a scale each. A subspace's tile is a key tile (storage/tile_format.hpp) whose channels are
// latents. Several caches share one object if it is part of the model. A cache that fits its own object owns
// it and counts its bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/latent/basis.hpp"
#include "kvplane/latent/schedule.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/storage/tile_format.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane {

class LatentKeys {
  public:
    /// One subspace as it is stored. z = (k - mean) E and k' = mean + z' D^T; column j of E is
    /// to_latents_scale[j] times column j of `to_latents`, column j of D likewise with from_latents.
    struct Subspace {
        std::vector<ChannelSegment> segments;  ///< of the kept latents: widths 1 to 8, first latent first
        Eigen::RowVectorXf mean;               ///< [channels]
        Eigen::RowVectorXf to_latents_scale, from_latents_scale;  ///< [kept]
        RowMajorMatrix<Eigen::half> from_latents;  ///< [channels, kept]; empty if directions are channels
        RowMajorMatrix<Eigen::half> to_latents;    ///< the same; also empty if it equals from_latents (C = I)
        std::vector<std::int64_t> channels;        ///< [kept] which channels, if directions are channels

        Index kept() const noexcept { return from_latents_scale.size(); }
    };

    /// From a basis and a schedule for each of its subspaces. Throws Error (shape) if these do not belong
    /// together, or if a schedule keeps more latents than the statistics of the basis determine.
    LatentKeys(const LatentBasis& basis, std::span<const LatentSchedule> schedules);
    /// From stored subspaces. Throws Error (shape, not_finite, option, index).
    LatentKeys(const BasisSettings& settings, Index kv_heads, Index query_heads, Index head_dim,
               const std::optional<RopeSettings>& rope, std::vector<Subspace> subspaces);

    const BasisSettings& settings() const noexcept { return settings_; }
    KeyFrame frame() const noexcept { return settings_.frame; }
    Index kv_heads() const noexcept { return kv_heads_; }
    Index query_heads() const noexcept { return query_heads_; }
    Index head_dim() const noexcept { return head_dim_; }
    const std::optional<RopeSettings>& rope() const noexcept { return rope_; }
    const RotaryEmbedding& embedding() const noexcept { return embedding_; }

    Index subspaces() const noexcept { return static_cast<Index>(subspaces_.size()); }
    const Subspace& subspace(Index s) const { return subspaces_[static_cast<std::size_t>(s)]; }
    Index subspace_channels() const noexcept { return kv_heads_ * head_dim_ / subspaces(); }
    Index subspace_of_head(Index kv_head) const noexcept { return subspaces() == 1 ? 0 : kv_head; }
    /// Where a head's channels begin within its subspace.
    Index head_offset(Index kv_head) const noexcept { return subspaces() == 1 ? kv_head * head_dim_ : 0; }
    /// The format of a subspace's tiles.
    const TileFormat& format(Index s) const { return formats_[static_cast<std::size_t>(s)]; }

    /// E and D as floats [channels, kept].
    Matrix to_latents(Index s) const;
    Matrix from_latents(Index s) const;

    /// Bytes of memory of what is stored: fp16 columns, scales, means, channel numbers.
    Index bytes() const noexcept;

  private:
    void require_subspaces() const;

    BasisSettings settings_;
    Index kv_heads_, query_heads_, head_dim_;
    std::optional<RopeSettings> rope_;
    RotaryEmbedding embedding_;
    std::vector<Subspace> subspaces_;
    std::vector<TileFormat> formats_;
};

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/latent/impl/keys.hpp"
#endif
