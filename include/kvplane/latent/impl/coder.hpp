// kvplane/latent/impl/coder.hpp: the products between keys and latents.
#pragma once

#include <algorithm>
#include <utility>

#include "kvplane/latent/coder.hpp"

namespace kvplane {

KVPLANE_FUNCTION LatentCoder::LatentCoder(std::shared_ptr<const LatentKeys> keys)
    : LatentCoder(std::move(keys), {}) {}
KVPLANE_FUNCTION LatentCoder::LatentCoder(std::shared_ptr<const LatentKeys> keys,
                                          std::span<const TileFormat> formats)
    : keys_(std::move(keys)) {
    std::vector<Matrix> from_latents;
    for (Index s = 0; s < keys_->subspaces(); ++s) {
        coders_.emplace_back(formats.empty()
                                 ? keys_->format(s)
                                 : formats[formats.size() == 1 ? 0 : static_cast<std::size_t>(s)]);
        from_latents.push_back(keys_->from_latents(s));
    }
    from_latents_ = std::make_shared<const std::vector<Matrix>>(std::move(from_latents));
}

KVPLANE_FUNCTION const Matrix& LatentCoder::latents(Index s, const std::byte* tile, Index tokens) {
    latents_.resize(tokens, keys_->subspace(s).kept());
    if (latents_.size() > 0)
        coders_[static_cast<std::size_t>(s)].decode(tile, tokens, latents_.data(), latents_.cols());
    return latents_;
}

KVPLANE_FUNCTION Matrix LatentCoder::in_frame(FramedKeys<KeyFrame::after_rope> keys) const {
    switch (keys_->frame()) {
        case KeyFrame::before_rope:
            return keys_->embedding().before(std::move(keys)).rows;
        case KeyFrame::tile:
            return keys_->embedding().to_tile(std::move(keys)).rows;
        default:
            return std::move(keys.rows);
    }
}

KVPLANE_FUNCTION double LatentCoder::encode(FramedKeys<KeyFrame::after_rope> keys,
                                            std::span<std::byte* const> tiles) {
    constexpr float most = 30000.0f;
    if (to_latents_.empty())
        for (Index s = 0; s < keys_->subspaces(); ++s) to_latents_.push_back(keys_->to_latents(s));
    const Matrix rows = in_frame(std::move(keys));
    const Index channels = keys_->subspace_channels();
    double largest = 0.0;
    for (Index s = 0; s < keys_->subspaces(); ++s) {
        const Matrix centered = rows.middleCols(s * channels, channels).rowwise() - keys_->subspace(s).mean;
        const Index kept = keys_->subspace(s).kept();
        if (kept == 0) {
            largest = std::max(largest, static_cast<double>(centered.cwiseAbs().maxCoeff()));
            continue;
        }
        Matrix latents(rows.rows(), kept);
        latents.noalias() = centered * to_latents_[static_cast<std::size_t>(s)];
        latents = latents.cwiseMax(-most).cwiseMin(most);
        std::byte* const tile = tiles[static_cast<std::size_t>(s)];
        coders_[static_cast<std::size_t>(s)].encode(head_rows(latents), "latents", {.count = rows.rows()},
                                                    tile);
        const Matrix close = this->latents(s, tile, rows.rows()) * from_latents(s).transpose();
        largest = std::max(largest, static_cast<double>((centered - close).cwiseAbs().maxCoeff()));
    }
    return largest;
}

KVPLANE_FUNCTION Matrix LatentCoder::reconstruct(Index kv_head, const std::byte* tile, Index tokens,
                                                 Index first, Index most) {
    const Index s = keys_->subspace_of_head(kv_head), at = keys_->head_offset(kv_head),
                dim = keys_->head_dim();
    const Matrix& z = latents(s, tile, tokens);
    const Index kept = std::min(most, z.cols());
    Matrix rows(tokens, dim);
    rows.noalias() = z.leftCols(kept) * from_latents(s).block(at, 0, dim, kept).transpose();
    rows.rowwise() += keys_->subspace(s).mean.segment(at, dim);
    if (keys_->frame() == KeyFrame::before_rope) keys_->embedding().rotate(rows, first);
    if (keys_->frame() == KeyFrame::tile) keys_->embedding().turn(rows, first);
    return rows;
}

}  // namespace kvplane
