// kvplane/latent/impl/keys.hpp: checks what is stored of a basis, and widens its matrices to float.
#pragma once

#include <utility>

#include "kvplane/error.hpp"
#include "kvplane/latent/keys.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/simd/half.hpp"

namespace kvplane {

namespace detail {

/// Columns divided by their largest magnitude, so that fp16 holds them whatever the size of keys.
inline void store_columns(const Matrix& columns, RowMajorMatrix<Eigen::half>& stored,
                          Eigen::RowVectorXf& scale) {
    scale = columns.size() > 0 ? Eigen::RowVectorXf(columns.cwiseAbs().colwise().maxCoeff())
                               : Eigen::RowVectorXf::Zero(columns.cols());
    const Eigen::RowVectorXf divisor = scale.unaryExpr([](float s) { return s > 0.0f ? s : 1.0f; });
    stored = (columns.array().rowwise() / divisor.array()).matrix().cast<Eigen::half>();
}

inline std::vector<ChannelSegment> kept_segments(const LatentSchedule& schedule) {
    std::vector<ChannelSegment> kept;
    for (ChannelSegment segment : schedule.segments)
        if (segment.bits > 0) {
            segment.scheme = scheme_for(segment.bits);
            kept.push_back(segment);
        }
    return kept;
}

/// Columns times their scales. If directions are channels, each scale stands at its channel.
inline Matrix widened(const LatentKeys::Subspace& subspace, const RowMajorMatrix<Eigen::half>& stored,
                      const Eigen::RowVectorXf& scale) {
    if (stored.size() == 0) {  // channels as directions, or nothing kept
        Matrix columns = Matrix::Zero(subspace.mean.size(), subspace.kept());
        for (std::size_t j = 0; j < subspace.channels.size(); ++j)
            columns(static_cast<Index>(subspace.channels[j]), static_cast<Index>(j)) =
                scale[static_cast<Index>(j)];
        return columns;
    }
    Matrix columns(stored.rows(), stored.cols());
    widen_row(current_isa(), stored.data(), stored.size(), columns.data());
    columns.array().rowwise() *= scale.array();
    return columns;
}

}  // namespace detail

KVPLANE_FUNCTION LatentKeys::LatentKeys(const LatentBasis& basis, std::span<const LatentSchedule> schedules)
    : settings_(basis.settings()),
      kv_heads_(basis.kv_heads()),
      query_heads_(basis.query_heads()),
      head_dim_(basis.head_dim()),
      rope_(basis.rope() ? std::optional(*basis.rope()) : std::nullopt),
      embedding_(rope_ ? RotaryEmbedding(head_dim_, *rope_) : RotaryEmbedding::none(head_dim_)) {
    require(schedules.size() == basis.subspaces().size(), ErrorCode::shape, "latent keys: ", schedules.size(),
            " schedules for a basis of ", basis.subspaces().size(), " subspaces");
    for (std::size_t s = 0; s < schedules.size(); ++s) {
        const LatentBasis::Subspace& from = basis.subspaces()[s];
        const LatentSchedule& schedule = schedules[s];
        const Index kept = schedule.kept();
        require(schedule.channels() == from.spectrum.size(), ErrorCode::shape, "latent keys: a schedule of ",
                schedule.channels(), " latents for subspace ", s, " of ", from.spectrum.size());
        require(kept <= from.rank, ErrorCode::shape, "latent keys: the schedule of subspace ", s, " keeps ",
                kept, " latents, the keys that its basis was fitted to determine only ", from.rank);
        Subspace subspace;
        subspace.segments = detail::kept_segments(schedule);
        subspace.mean = from.mean;
        const Matrix to_latents = from.to_latents.leftCols(kept),
                     from_latents = from.from_latents.leftCols(kept);
        if (settings_.directions == LatentDirections::channels) {
            subspace.to_latents_scale.resize(kept);
            subspace.from_latents_scale.resize(kept);
            for (Index j = 0; j < kept; ++j) {
                Index channel = 0;
                subspace.from_latents_scale[j] = from_latents.col(j).maxCoeff(&channel);
                subspace.to_latents_scale[j] = to_latents(channel, j);
                subspace.channels.push_back(channel);
            }
        } else {
            detail::store_columns(from_latents, subspace.from_latents, subspace.from_latents_scale);
            detail::store_columns(to_latents, subspace.to_latents, subspace.to_latents_scale);
            // The columns are orthonormal, so E and D differ only in scale.
            if (!settings_.query_weighted) subspace.to_latents.resize(0, 0);
        }
        subspaces_.push_back(std::move(subspace));
    }
    require_subspaces();
    for (const Subspace& subspace : subspaces_)
        formats_.emplace_back(TileSide::keys, subspace.segments,
                              GridRule{Granularity::per_channel, tile_tokens});
}

KVPLANE_FUNCTION LatentKeys::LatentKeys(const BasisSettings& settings, Index kv_heads, Index query_heads,
                                        Index head_dim, const std::optional<RopeSettings>& rope,
                                        std::vector<Subspace> subspaces)
    : settings_(settings),
      kv_heads_(kv_heads),
      query_heads_(query_heads),
      head_dim_(head_dim),
      rope_(rope),
      embedding_(rope ? RotaryEmbedding(head_dim, *rope) : RotaryEmbedding::none(head_dim)),
      subspaces_(std::move(subspaces)) {
    require_subspaces();
    for (const Subspace& subspace : subspaces_)
        formats_.emplace_back(TileSide::keys, subspace.segments,
                              GridRule{Granularity::per_channel, tile_tokens});
}

KVPLANE_FUNCTION void LatentKeys::require_subspaces() const {
    const Index count = settings_.heads_together ? 1 : kv_heads_;
    require(subspaces() == count, ErrorCode::shape, "latent keys: ", subspaces(), " subspaces, expected ",
            count);
    const bool by_channel = settings_.directions == LatentDirections::channels;
    for (Index s = 0; s < subspaces(); ++s) {
        const Subspace& subspace = this->subspace(s);
        const Index kept = subspace.kept(), channels = subspace_channels();
        const auto fits = [&](const RowMajorMatrix<Eigen::half>& m, bool wanted) {
            return wanted ? m.rows() == channels && m.cols() == kept : m.size() == 0;
        };
        Index with_bits = 0;
        for (const ChannelSegment& segment : subspace.segments) {
            require(segment.channels >= 1 && segment.bits >= 1 && segment.bits <= 8, ErrorCode::option,
                    "latent keys: subspace ", s, " has a run of ", segment.channels, " latents of ",
                    segment.bits, " bits, expected widths of 1 to 8");
            with_bits += segment.channels;
        }
        require(subspace.mean.size() == channels && kept <= channels && with_bits == kept &&
                    subspace.to_latents_scale.size() == kept && fits(subspace.from_latents, !by_channel) &&
                    fits(subspace.to_latents, !by_channel && settings_.query_weighted) &&
                    static_cast<Index>(subspace.channels.size()) == (by_channel ? kept : 0),
                ErrorCode::shape, "latent keys: subspace ", s, " of ", kept, " latents is not one of ",
                channels, " channels");
        for (const std::int64_t channel : subspace.channels)
            require(channel >= 0 && channel < channels, ErrorCode::index, "latent keys: subspace ", s,
                    ": channel ", channel, " of ", channels);
        require(subspace.mean.allFinite() && subspace.to_latents_scale.allFinite() &&
                    subspace.from_latents_scale.allFinite() &&
                    subspace.from_latents.cast<float>().allFinite() &&
                    subspace.to_latents.cast<float>().allFinite(),
                ErrorCode::not_finite, "latent keys: subspace ", s, " is not finite");
    }
}

KVPLANE_FUNCTION Matrix LatentKeys::to_latents(Index s) const {
    const Subspace& subspace = this->subspace(s);
    const bool both = subspace.to_latents.size() > 0;
    return detail::widened(subspace, both ? subspace.to_latents : subspace.from_latents,
                           subspace.to_latents_scale);
}

KVPLANE_FUNCTION Matrix LatentKeys::from_latents(Index s) const {
    const Subspace& subspace = this->subspace(s);
    return detail::widened(subspace, subspace.from_latents, subspace.from_latents_scale);
}

KVPLANE_FUNCTION Index LatentKeys::bytes() const noexcept {
    Index sum = 0;
    for (const Subspace& subspace : subspaces_)
        sum += 2 * (subspace.from_latents.size() + subspace.to_latents.size()) + 4 * subspace.mean.size() +
               8 * subspace.kept() + 2 * static_cast<Index>(subspace.channels.size());
    return sum;
}

}  // namespace kvplane
