// kvplane/latent/impl/basis.hpp: fitting a basis, and keys to latents and back.
#pragma once

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "kvplane/latent/basis.hpp"
#include "kvplane/latent/turn_average.hpp"

namespace kvplane {

namespace detail {

/// C^(1/2) of one head and its inverse, after C was divided by `scale` so that its mean eigenvalue is 1.
struct QueryWeight {
    MatrixD root, inverse;
    double scale = 1.0;
};

/// V diag(d) V^T
inline MatrixD with_eigenvalues(const Eigen::MatrixXd& vectors, const Eigen::VectorXd& values) {
    const Eigen::MatrixXd scaled = vectors * values.asDiagonal();
    MatrixD matrix(vectors.rows(), vectors.rows());
    matrix.noalias() = scaled * vectors.transpose();
    return matrix;
}

inline QueryWeight query_weight(const MatrixD& moment, LatentDirections directions) {
    // A ridge is added to C, in units of its mean eigenvalue, for directions that no query has looked along
    // so far.
    constexpr double ridge = 1e-3;
    const Index dim = moment.rows();
    const double scale = moment.trace() / static_cast<double>(dim);
    if (!(scale > 0.0)) return {MatrixD::Identity(dim, dim), MatrixD::Identity(dim, dim), 1.0};
    MatrixD c = moment / scale;
    if (directions == LatentDirections::channels) c = MatrixD(c.diagonal().asDiagonal());
    c.diagonal().array() += ridge;
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(c);
    const Eigen::VectorXd root = solver.eigenvalues().cwiseMax(ridge).cwiseSqrt();
    return {with_eigenvalues(solver.eigenvectors(), root),
            with_eigenvalues(solver.eigenvectors(), root.cwiseInverse()), scale};
}

/// Eigenvectors, or channels in the order of their variance.
inline void directions_of(const MatrixD& covariance, LatentDirections directions, Eigen::VectorXd& spectrum,
                          Eigen::MatrixXd& vectors) {
    const Index channels = covariance.rows();
    if (directions == LatentDirections::eigenvectors) {
        const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(covariance);
        spectrum = solver.eigenvalues().reverse().cwiseMax(0.0);
        vectors = solver.eigenvectors().rowwise().reverse();
        return;
    }
    std::vector<Index> order(static_cast<std::size_t>(channels));
    for (Index c = 0; c < channels; ++c) order[static_cast<std::size_t>(c)] = c;
    std::stable_sort(order.begin(), order.end(),
                     [&](Index a, Index b) { return covariance(a, a) > covariance(b, b); });
    spectrum.resize(channels);
    vectors.setZero(channels, channels);
    for (Index j = 0; j < channels; ++j) {
        const Index c = order[static_cast<std::size_t>(j)];
        spectrum[j] = covariance(c, c);
        vectors(c, j) = 1.0;
    }
}

/// One subspace from the moments of its keys in the frame. root and inverse: A and A^-1.
inline LatentBasis::Subspace fit_subspace(const Eigen::VectorXd& mean, const MatrixD& covariance,
                                          const MatrixD& root, const MatrixD& inverse, double scale,
                                          double count, LatentDirections directions) {
    LatentBasis::Subspace subspace;
    Eigen::VectorXd spectrum;
    Eigen::MatrixXd vectors;
    const Eigen::MatrixXd half_weighted = root * covariance;
    const MatrixD weighted = half_weighted * root;
    directions_of(weighted, directions, spectrum, vectors);
    // Eigenvalues below the rounding of the statistics belong to no direction of the keys.
    const double least = 1e-12 * std::max(spectrum[0], 1e-300);
    subspace.rank = 0;
    Eigen::VectorXd deviation = spectrum.cwiseSqrt();
    while (subspace.rank < spectrum.size() && static_cast<double>(subspace.rank) < count - 1.0 &&
           spectrum[subspace.rank] > least)
        ++subspace.rank;
    for (Index j = subspace.rank; j < spectrum.size(); ++j) deviation[j] = spectrum[j] = 0.0;
    Eigen::VectorXd inverse_deviation = deviation;
    for (Index j = 0; j < subspace.rank; ++j) inverse_deviation[j] = 1.0 / deviation[j];
    const auto columns = [&](const MatrixD& matrix, const Eigen::VectorXd& scales) {
        const Eigen::MatrixXd turned = matrix * vectors;
        return Matrix((turned * scales.asDiagonal()).cast<float>());
    };
    subspace.mean = mean.transpose().cast<float>();
    subspace.to_latents = columns(root, inverse_deviation);
    subspace.from_latents = columns(inverse, deviation);
    subspace.spectrum = spectrum * scale;
    return subspace;
}

}  // namespace detail

KVPLANE_FUNCTION LatentBasis fit_latent_basis(const LatentStatistics& statistics, const RopeSettings* rope,
                                              const BasisSettings& settings) {
    const SecondMoments& keys = statistics.keys();
    require(keys.count() >= 2.0, ErrorCode::shape, "latent basis: statistics of ", keys.count(),
            " keys, expected at least 2");
    require(!settings.query_weighted || statistics.queries(0).count() > 0.0, ErrorCode::shape,
            "latent basis: a query-weighted basis needs statistics of queries, these have none");
    require(settings.tile_tokens >= 1 && settings.context >= 1, ErrorCode::option, "latent basis: tiles of ",
            settings.tile_tokens, " tokens in a context of ", settings.context, ", expected at least 1");
    const Index dim = statistics.head_dim(), heads = statistics.kv_heads(), all = heads * dim;
    const RotaryEmbedding turning = rope ? RotaryEmbedding(dim, *rope) : RotaryEmbedding::none(dim);
    const Index key_turns = settings.frame == KeyFrame::tile         ? settings.tile_tokens
                            : settings.frame == KeyFrame::after_rope ? settings.context
                                                                     : 1;

    const detail::TurnAverage turned_keys(turning, key_turns);
    const Eigen::VectorXd mean = turned_keys.mean(keys.mean());
    MatrixD covariance = turned_keys.second_moment(keys.covariance() + keys.mean() * keys.mean().transpose());
    covariance -= mean * mean.transpose();

    const double group = static_cast<double>(statistics.query_heads() / heads);
    const detail::TurnAverage turned_queries(turning, settings.context);
    std::vector<detail::QueryWeight> weights;
    double mean_scale = 0.0;
    for (Index h = 0; h < heads; ++h) {
        if (!settings.query_weighted) {
            weights.push_back({MatrixD::Identity(dim, dim), MatrixD::Identity(dim, dim), 1.0});
        } else {
            const SecondMoments& queries = statistics.basis_queries(h);
            weights.push_back(detail::query_weight(
                group * turned_queries.second_moment(queries.covariance() +
                                                     queries.mean() * queries.mean().transpose()),
                settings.directions));
        }
        mean_scale += weights.back().scale / static_cast<double>(heads);
    }

    std::vector<LatentBasis::Subspace> subspaces;
    if (settings.heads_together) {
        MatrixD root = MatrixD::Zero(all, all), inverse = root;
        for (Index h = 0; h < heads; ++h) {
            const detail::QueryWeight& weight = weights[static_cast<std::size_t>(h)];
            const double relative = std::sqrt(weight.scale / mean_scale);
            root.block(h * dim, h * dim, dim, dim) = weight.root * relative;
            inverse.block(h * dim, h * dim, dim, dim) = weight.inverse / relative;
        }
        subspaces.push_back(detail::fit_subspace(mean, covariance, root, inverse, mean_scale, keys.count(),
                                                 settings.directions));
    } else {
        for (Index h = 0; h < heads; ++h) {
            const detail::QueryWeight& weight = weights[static_cast<std::size_t>(h)];
            subspaces.push_back(detail::fit_subspace(
                mean.segment(h * dim, dim), covariance.block(h * dim, h * dim, dim, dim), weight.root,
                weight.inverse, weight.scale, keys.count(), settings.directions));
        }
    }
    return LatentBasis(settings, heads, statistics.query_heads(), dim, rope, std::move(subspaces));
}

KVPLANE_FUNCTION LatentBasis::LatentBasis(const BasisSettings& settings, Index kv_heads, Index query_heads,
                                          Index head_dim, const RopeSettings* rope,
                                          std::vector<Subspace> subspaces)
    : settings_(settings),
      kv_heads_(kv_heads),
      query_heads_(query_heads),
      head_dim_(head_dim),
      has_rope_(rope != nullptr),
      rope_(rope ? *rope : RopeSettings{}),
      subspaces_(std::move(subspaces)) {
    require(kv_heads >= 1 && head_dim >= 1 && query_heads >= 1 && query_heads % kv_heads == 0,
            ErrorCode::option, "latent basis: ", query_heads, " query heads over ", kv_heads,
            " key heads of ", head_dim, " channels, expected a multiple");
    require(static_cast<Index>(subspaces_.size()) == (settings.heads_together ? 1 : kv_heads),
            ErrorCode::shape, "latent basis: ", subspaces_.size(), " subspaces, expected ",
            settings.heads_together ? 1 : kv_heads);
    if (rope) RotaryEmbedding(head_dim, *rope);  // throws if the settings are invalid
    const Index channels = subspace_channels();
    for (std::size_t s = 0; s < subspaces_.size(); ++s) {
        const Subspace& subspace = subspaces_[s];
        require(subspace.mean.size() == channels && subspace.spectrum.size() == channels &&
                    subspace.to_latents.rows() == channels && subspace.to_latents.cols() == channels &&
                    subspace.from_latents.rows() == channels && subspace.from_latents.cols() == channels &&
                    subspace.rank >= 0 && subspace.rank <= channels,
                ErrorCode::shape, "latent basis: subspace ", s, " is not one of ", channels, " channels");
        require(subspace.mean.allFinite() && subspace.spectrum.allFinite() &&
                    subspace.to_latents.allFinite() && subspace.from_latents.allFinite(),
                ErrorCode::not_finite, "latent basis: subspace ", s, " is not finite");
        require((subspace.spectrum.array() >= 0.0).all() &&
                    std::is_sorted(subspace.spectrum.begin(), subspace.spectrum.end(), std::greater<>()),
                ErrorCode::option, "latent basis: the spectrum of subspace ", s,
                " does not descend to 0 or more");
    }
}

KVPLANE_FUNCTION Matrix LatentBasis::encode_rows(KeyFrame frame, const Matrix& keys) const {
    require(frame == this->frame(), ErrorCode::mismatch, "latent basis: keys in the frame ", name(frame),
            ", expected ", name(this->frame()));
    require(keys.cols() == kv_heads_ * head_dim_, ErrorCode::shape, "latent basis: keys of ", keys.cols(),
            " channels, expected ", kv_heads_ * head_dim_);
    Matrix latents(keys.rows(), keys.cols());
    const Index channels = subspace_channels();
    for (std::size_t s = 0; s < subspaces_.size(); ++s) {
        const Index at = static_cast<Index>(s) * channels;
        const Matrix centered = keys.middleCols(at, channels).rowwise() - subspaces_[s].mean;
        latents.middleCols(at, channels).noalias() = centered * subspaces_[s].to_latents;
    }
    return latents;
}

KVPLANE_FUNCTION Matrix LatentBasis::decode_rows(KeyFrame frame, const Matrix& latents, Index kept) const {
    require(frame == this->frame(), ErrorCode::mismatch, "latent basis: keys wanted in the frame ",
            name(frame), ", expected ", name(this->frame()));
    require(latents.cols() == kv_heads_ * head_dim_, ErrorCode::shape, "latent basis: ", latents.cols(),
            " latents, expected ", kv_heads_ * head_dim_);
    const Index channels = subspace_channels();
    if (kept < 0 || kept > channels) kept = channels;
    Matrix keys(latents.rows(), latents.cols());
    for (std::size_t s = 0; s < subspaces_.size(); ++s) {
        const Index at = static_cast<Index>(s) * channels;
        auto rows = keys.middleCols(at, channels);
        rows.noalias() = latents.middleCols(at, kept) * subspaces_[s].from_latents.leftCols(kept).transpose();
        rows.rowwise() += subspaces_[s].mean;
    }
    return keys;
}

namespace detail {

KVPLANE_FUNCTION LatentDrift latent_drift(const LatentBasis& basis, const Matrix& keys, const Matrix& latents,
                                          const Matrix& close, Index kept) {
    const Index channels = basis.subspace_channels();
    double energy = 0.0, weighted_outside = 0.0, weighted = 0.0;
    for (std::size_t s = 0; s < basis.subspaces().size(); ++s) {
        const LatentBasis::Subspace& subspace = basis.subspaces()[s];
        const auto at = static_cast<Index>(s) * channels;
        energy += (keys.middleCols(at, channels).rowwise() - subspace.mean).cast<double>().squaredNorm();
        for (Index j = 0; j < channels; ++j) {
            const double share = subspace.spectrum[j] * latents.col(at + j).cast<double>().squaredNorm();
            weighted += share;
            if (j >= kept) weighted_outside += share;
        }
    }
    const double outside = (keys - close).cast<double>().squaredNorm();
    return {energy > 0.0 ? outside / energy : 0.0, weighted > 0.0 ? weighted_outside / weighted : 0.0};
}

}  // namespace detail

}  // namespace kvplane
