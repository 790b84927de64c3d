// kvplane/latent/basis.hpp: a basis in which keys need few bits, from second moments.
//
// A latent is a coordinate of a key: z = (k - mean) E. From latents z' as stored, the key is
// k' = mean + z' D^T and the score is q.k' = q.mean + z'.(D^T q). A query is therefore projected once, and no
// key is rebuilt. With
//
//   C = E[u u^T]  the expectation over queries u in the frame of the keys, summed over the query heads of a
//                 key head,
//   A = C^(1/2)   (C = I: the basis of SVDq, arXiv 2502.15304, which is the SVD of the keys),
//   U, lambda     eigenvectors and eigenvalues of cov((k - mean) A),
//
// the latents are z = (k - mean) A U / sqrt(lambda). Each has unit variance, and an error e_j of latent j
// costs lambda_j e_j^2 of expected squared score (theorem T6b). So lambda is all that an allocation of bits
// needs to know.
//
// A subspace is a set of heads that share one basis. Either each key head has a subspace of its own, or all
// of them share one.
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
    channels       ///< the channels themselves, most important first; needs no matrix or product at a read
};

struct BasisSettings {
    KeyFrame frame = KeyFrame::tile;
    bool query_weighted = true;   ///< false: C = I
    bool heads_together = false;  ///< one subspace for all heads
    LatentDirections directions = LatentDirections::eigenvectors;
    Index tile_tokens = 128;  ///< how far keys turn in the frame of a tile, in positions
    Index context = 4096;     ///< how far queries look back; after RoPE, also how far keys turn

    bool operator==(const BasisSettings&) const = default;
};

/// The basis of one layer.
class LatentBasis {
  public:
    struct Subspace {
        /// [latents] lambda, descending: the expected squared score (q.k, unscaled) of each latent.
        Eigen::VectorXd spectrum;
        Eigen::RowVectorXf mean;  ///< [channels] of keys, in the frame
        Matrix to_latents;        ///< E [channels, latents]
        Matrix from_latents;      ///< D [channels, latents]
        Index rank;               ///< latents that the statistics determine; E and D are 0 beyond them
    };

    /// rope: nullptr for a model without RoPE. Throws Error (shape, not_finite, option) for subspaces that do
    /// not make up a basis.
    LatentBasis(const BasisSettings& settings, Index kv_heads, Index query_heads, Index head_dim,
                const RopeSettings* rope, std::vector<Subspace> subspaces);

    const BasisSettings& settings() const noexcept { return settings_; }
    KeyFrame frame() const noexcept { return settings_.frame; }
    Index kv_heads() const noexcept { return kv_heads_; }
    Index query_heads() const noexcept { return query_heads_; }
    Index head_dim() const noexcept { return head_dim_; }
    /// RoPE of the model whose keys the basis was fitted to; nullptr if that model has none.
    const RopeSettings* rope() const noexcept { return has_rope_ ? &rope_ : nullptr; }
    const std::vector<Subspace>& subspaces() const noexcept { return subspaces_; }
    Index subspace_channels() const noexcept {
        return kv_heads_ * head_dim_ / static_cast<Index>(subspaces_.size());
    }

    /// All latents of keys [tokens, kv_heads * head_dim], subspace by subspace. Throws Error: mismatch for
    /// keys in another frame, shape for another number of channels.
    template <KeyFrame frame>
    Matrix encode(const FramedKeys<frame>& keys) const {
        return encode_rows(frame, keys.rows);
    }
    /// The keys that `latents` stand for. The first `kept` latents of each subspace count and the rest are
    /// taken as 0; -1: all count.
    template <KeyFrame frame>
    FramedKeys<frame> decode(const Matrix& latents, Index first_position, Index kept = -1) const {
        return {decode_rows(frame, latents, kept), first_position};
    }

    /// Bytes of basis that a cache keeps for every latent that has bits (latent/keys.hpp): two fp16 columns
    /// and their scales. If E and D differ only in scale (C = I), it keeps one column. If directions are
    /// channels, it keeps one number instead of columns.
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

/// Fits a basis. rope: nullptr for a model without RoPE. Throws Error: shape (fewer than two keys, or a
/// query-weighted basis without queries), option (settings).
LatentBasis fit_latent_basis(const LatentStatistics& statistics, const RopeSettings* rope,
                             const BasisSettings& settings);

/// How much of new keys is missed by a basis that keeps `kept` latents of each subspace: as shares of
/// |k - mean|^2 and of the expected squared scores.
struct LatentDrift {
    double energy = 0.0;
    double weighted_energy = 0.0;
};

namespace detail {
/// `latents` are those of the keys in this basis; `close` are the keys rebuilt from `kept` of them.
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
