// kvplane/latent/impl/coder.hpp: the products between keys and latents.
#pragma once

#include <algorithm>
#include <utility>

#include "kvplane/latent/coder.hpp"
#include "kvplane/latent/products.hpp"

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
    encodings_.resize(coders_.size());
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

KVPLANE_FUNCTION LatentCoder::Encoding& LatentCoder::prepare(Index s) {
    Encoding& encoding = encodings_[static_cast<std::size_t>(s)];
    if (encoding.to_latents.size() > 0) return encoding;
    const Index channels = keys_->subspace_channels(), kept = keys_->subspace(s).kept();
    encoding.to_latents.setZero(channels, detail::padded_channels(kept));
    encoding.to_latents.leftCols(kept) = keys_->to_latents(s);
    encoding.from_latents.setZero(kept, detail::padded_channels(channels));
    encoding.from_latents.leftCols(channels) = from_latents(s).transpose();
    return encoding;
}

KVPLANE_FUNCTION double LatentCoder::encode(FramedKeys<KeyFrame::after_rope> keys,
                                            std::span<std::byte* const> tiles) {
    double largest = 0.0;
    const Index channels = keys_->subspace_channels();
    for (Index s = 0; s < keys_->subspaces(); ++s)
        largest =
            std::max(largest, encode(s, {keys.rows.middleCols(s * channels, channels), keys.first_position},
                                     tiles[static_cast<std::size_t>(s)]));
    return largest;
}

KVPLANE_FUNCTION double LatentCoder::encode(Index s, FramedKeys<KeyFrame::after_rope> keys, std::byte* tile) {
    constexpr float most = 30000.0f;
    const Isa isa = current_isa();
    const Matrix rows = in_frame(std::move(keys));
    const Index channels = keys_->subspace_channels(), kept = keys_->subspace(s).kept(), tokens = rows.rows();
    Encoding& work = prepare(s);
    work.centered = rows.rowwise() - keys_->subspace(s).mean;
    if (kept == 0) return static_cast<double>(work.centered.cwiseAbs().maxCoeff());
    const auto multiply = [&](const Matrix& x, const Matrix& columns, Matrix& to) {
        to.resize(tokens, columns.cols());
        detail::multiply_rows(isa, detail::row_view(x), detail::row_view(columns), columns.cols(),
                              {to.data(), to.cols(), tokens});
    };
    multiply(work.centered, work.to_latents, work.latents);
    work.latents = work.latents.cwiseMax(-most).cwiseMin(most);
    detail::TileCoder& coder = coders_[static_cast<std::size_t>(s)];
    coder.encode(head_rows(work.latents.leftCols(kept)), "latents", {.count = tokens}, tile);
    work.decoded.resize(tokens, kept);
    coder.decode(tile, tokens, work.decoded.data(), kept);
    multiply(work.decoded, work.from_latents, work.close);
    return detail::largest_difference(isa, detail::row_view(work.centered), detail::row_view(work.close),
                                      channels);
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
