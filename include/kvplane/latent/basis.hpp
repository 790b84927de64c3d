// kvplane/latent/basis.hpp: a basis in which keys need few bits, from second moments.
//
// A latent is a coordinate of a key: z = (k - mean) E. The key is k' = mean + z' D^T and the score
// q.k' = q.mean + z'.(D^T q): a query is projected once, and no key is rebuilt. With
//
//   C = E[u u^T]  of the queries u as the keys' frame sees them, summed over the query heads of a key head,
//   A = C^(1/2)   (C = I: the basis of SVDq, arXiv 2502.15304, which is the SVD of the keys),
//   U, lambda     eigenvectors and eigenvalues of cov((k - mean) A),
//
// z = (k - mean) A U / sqrt(lambda): unit variance each, and an error e_j of latent j costs lambda_j e_j^2 of
// expected squared score (theorem T6b). Thus lambda is all that an allocation of bits needs to know.
//
// A subspace is a set of heads that share one basis: each key head has its own, or all of them share one.
#pragma once

#include <cstdint>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/error.hpp"
#include "kvplane/latent/statistics.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane {

enum class LatentDirections : std::uint8_t {
    eigenvectors,  ///< the least error at a given rate
    channels       ///< the channels themselves, most important first: no matrix, and no product at a read
};

struct BasisSettings {
    KeyFrame frame = KeyFrame::tile;
    bool query_weighted = true;   ///< false: C = I
    bool heads_together = false;  ///< one subspace for all heads
    LatentDirections directions = LatentDirections::eigenvectors;
    Index tile_tokens = 128;  ///< in the frame of a tile, how far its keys are turned
    Index context = 4096;     ///< how far queries look back, and, after RoPE, how far keys are turned

    bool operator==(const BasisSettings&) const = default;
};

/// The basis of one layer.
class LatentBasis {
  public:
    struct Subspace {
        /// lambda, descending: expected squared score (q.k, unscaled) of each latent.
        Eigen::VectorXd spectrum;
        Eigen::RowVectorXf mean;  ///< of keys, in the frame
        Matrix to_latents;        ///< E [channels, latents]
        Matrix from_latents;      ///< D [channels, latents]
        Index rank;               ///< latents that the statistics determine; E and D are 0 beyond them
    };

    /// rope: nullptr for a model without. Throws Error (shape, not_finite, option) for subspaces that do not
    /// make up a basis.
    LatentBasis(const BasisSettings& settings, Index kv_heads, Index query_heads, Index head_dim,
                const RopeSettings* rope, std::vector<Subspace> subspaces);

    const BasisSettings& settings() const noexcept { return settings_; }
    KeyFrame frame() const noexcept { return settings_.frame; }
    Index kv_heads() const noexcept { return kv_heads_; }
    Index query_heads() const noexcept { return query_heads_; }
    Index head_dim() const noexcept { return head_dim_; }
    /// Of the model whose keys it was fitted to; nullptr: none.
    const RopeSettings* rope() const noexcept { return has_rope_ ? &rope_ : nullptr; }
    const std::vector<Subspace>& subspaces() const noexcept { return subspaces_; }
    Index subspace_channels() const noexcept {
        return kv_heads_ * head_dim_ / static_cast<Index>(subspaces_.size());
    }

    /// All latents of keys [tokens, kv_heads * head_dim], subspace by subspace. Throws Error (mismatch) for
    /// another frame, (shape) for another width.
    template <KeyFrame frame>
    Matrix encode(const FramedKeys<frame>& keys) const {
        return encode_rows(frame, keys.rows);
    }
    /// The keys of latents; the first `kept` of each subspace count, the rest are taken as 0 (-1: all count).
    template <KeyFrame frame>
    FramedKeys<frame> decode(const Matrix& latents, Index first_position, Index kept = -1) const {
        return {decode_rows(frame, latents, kept), first_position};
    }

    /// Bytes that a cache keeps for every latent that has bits (latent/keys.hpp): two fp16 columns and their
    /// scales; one column where E and D differ in scale alone (C = I), one number for a channel.
    Index bytes_per_latent() const noexcept {
        if (settings_.directions == LatentDirections::channels) return 8 + 2;
        return 8 + 2 * subspace_channels() * (settings_.query_weighted ? 2 : 1);
    }

  private:
    Matrix encode_rows(KeyFrame frame, const Matrix& keys) const;
    Matrix decode_rows(KeyFrame frame, const Matrix& latents, Index kept) const;

    BasisSettings settings_;
    Index kv_heads_, query_heads_, head_dim_;
    bool has_rope_;
    RopeSettings rope_;
    std::vector<Subspace> subspaces_;
};

/// Fits a basis. rope: nullptr for a model without. Throws Error: shape (fewer than two keys; query-weighted
/// and no queries), option (settings).
LatentBasis fit_latent_basis(const LatentStatistics& statistics, const RopeSettings* rope,
                             const BasisSettings& settings);

/// How much of new keys a basis misses that keeps `kept` latents of each subspace: shares of |k - mean|^2,
/// and of the expected squared scores.
struct LatentDrift {
    double energy = 0.0;
    double weighted_energy = 0.0;
};

namespace detail {
/// `latents` and `close` are what the basis makes of the keys, and the keys that `kept` of them give.
LatentDrift latent_drift(const LatentBasis& basis, const Matrix& keys, const Matrix& latents,
                         const Matrix& close, Index kept);
}  // namespace detail

template <KeyFrame frame>
LatentDrift latent_drift(const LatentBasis& basis, const FramedKeys<frame>& keys, Index kept) {
    const Matrix latents = basis.encode(keys);
    const Matrix close = basis.template decode<frame>(latents, keys.first_position, kept).rows;
    return detail::latent_drift(basis, keys.rows, latents, close, kept);
}

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/latent/impl/basis.hpp"
#endif
