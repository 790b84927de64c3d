// kvplane/latent/impl/statistics.hpp: how moments accumulate and merge.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "kvplane/latent/statistics.hpp"

namespace kvplane {

KVPLANE_FUNCTION SecondMoments::SecondMoments(double count, const Eigen::VectorXd& mean,
                                              const MatrixD& scatter)
    : count_(count), mean_(mean), scatter_(scatter) {
    require(scatter.rows() == mean.size() && scatter.cols() == mean.size(), ErrorCode::shape,
            "moments: a scatter of ", scatter.rows(), " x ", scatter.cols(), " and a mean of ", mean.size(),
            " channels, expected as many");
    require(std::isfinite(count) && count >= 0.0, ErrorCode::option, "moments: a count of ", count,
            ", expected 0 or more");
    require(mean.allFinite() && scatter.allFinite(), ErrorCode::not_finite,
            "moments: the mean or the scatter is not finite");
    require((scatter_.diagonal().array() >= 0.0).all(), ErrorCode::option, "moments: a negative variance");
}

KVPLANE_FUNCTION void SecondMoments::add_rows(MatrixD rows, std::string_view argument) {
    require(rows.cols() == channels(), ErrorCode::shape, argument, ": ", rows.cols(), " channels, expected ",
            channels());
    if (rows.rows() == 0 || channels() == 0) return;
    if (!rows.allFinite())
        for (Index t = 0; t < rows.rows(); ++t)
            for (Index c = 0; c < rows.cols(); ++c)
                require(std::isfinite(rows(t, c)), ErrorCode::not_finite, argument, ": the value at token ",
                        t, ", channel ", c, " is ", rows(t, c), "; expected finite values");
    SecondMoments other(0);
    other.count_ = static_cast<double>(rows.rows());
    other.mean_ = rows.colwise().mean().transpose();
    rows.rowwise() -= other.mean_.transpose();
    other.scatter_ = MatrixD::Zero(channels(), channels());
    other.scatter_.selfadjointView<Eigen::Lower>().rankUpdate(rows.transpose());
    other.scatter_.triangularView<Eigen::StrictlyUpper>() = other.scatter_.transpose();
    merge(other);
}

KVPLANE_FUNCTION void SecondMoments::merge(const SecondMoments& other) {
    require(other.channels() == channels(), ErrorCode::shape, "moments of ", other.channels(),
            " channels do not merge with those of ", channels());
    if (other.count_ == 0.0) return;
    const double all = count_ + other.count_;
    const Eigen::VectorXd difference = other.mean_ - mean_;
    scatter_ += other.scatter_;
    scatter_.noalias() += (count_ * other.count_ / all) * difference * difference.transpose();
    mean_ += other.count_ / all * difference;
    count_ = all;
}

KVPLANE_FUNCTION LatentStatistics::LatentStatistics(Index kv_heads, Index query_heads, Index head_dim)
    : query_heads_(query_heads), keys_(std::max<Index>(0, kv_heads * head_dim)) {
    require(kv_heads >= 1 && head_dim >= 1 && query_heads >= 1 && query_heads % kv_heads == 0,
            ErrorCode::option, "latent statistics: ", query_heads, " query heads over ", kv_heads,
            " key heads of ", head_dim, " channels, expected a multiple");
    queries_.assign(static_cast<std::size_t>(kv_heads), SecondMoments(head_dim));
}

KVPLANE_FUNCTION LatentStatistics::LatentStatistics(Index query_heads, SecondMoments keys,
                                                    std::vector<SecondMoments> queries)
    : query_heads_(query_heads), keys_(std::move(keys)), queries_(std::move(queries)) {
    const auto heads = static_cast<Index>(queries_.size());
    require(heads >= 1 && query_heads >= heads && query_heads % heads == 0 && keys_.channels() >= heads &&
                keys_.channels() % heads == 0,
            ErrorCode::shape, "latent statistics: keys of ", keys_.channels(), " channels in ", heads,
            " heads with ", query_heads, " query heads do not fit together");
    for (const SecondMoments& head : queries_)
        require(head.channels() == head_dim(), ErrorCode::shape, "latent statistics: queries of ",
                head.channels(), " channels, expected ", head_dim());
}

namespace detail {

/// Throws Error (shape, not_finite).
inline void require_statistics_of(const LatentStatistics& statistics, const Matrix& queries) {
    const Index channels = statistics.query_heads() * statistics.head_dim();
    require(queries.cols() == channels, ErrorCode::shape, "queries: ", queries.cols(), " channels, expected ",
            channels);
    require(queries.allFinite(), ErrorCode::not_finite, "queries: not all values are finite");
}

inline void add_heads(const Matrix& queries, Index group, std::vector<SecondMoments>& heads) {
    const Index dim = heads[0].channels();
    for (Index h = 0; h < queries.cols() / dim; ++h)
        heads[static_cast<std::size_t>(h / group)].add(queries.middleCols(h * dim, dim));
}

}  // namespace detail

KVPLANE_FUNCTION void LatentStatistics::add_queries(const Matrix& queries_before_rope) {
    detail::require_statistics_of(*this, queries_before_rope);
    require(weighted_.empty(), ErrorCode::option,
            "latent statistics: queries without weights after others with weights, expected weights");
    detail::add_heads(queries_before_rope, query_heads_ / kv_heads(), queries_);
}

KVPLANE_FUNCTION void LatentStatistics::add_queries(const Matrix& queries_before_rope,
                                                    const Matrix& weights) {
    detail::require_statistics_of(*this, queries_before_rope);
    require(weights.rows() == queries_before_rope.rows() && weights.cols() == query_heads_, ErrorCode::shape,
            "queries: weights ", weights.rows(), " x ", weights.cols(), ", expected ",
            queries_before_rope.rows(), " x ", query_heads_);
    require(weights.allFinite() && (weights.size() == 0 || weights.minCoeff() >= 0.0f), ErrorCode::option,
            "queries: weights that are not finite or below 0");
    require(!weighted_.empty() || queries_[0].count() == 0.0, ErrorCode::option,
            "latent statistics: queries with weights after others without, expected none");
    Matrix weighted = queries_before_rope;
    for (Index h = 0; h < query_heads_; ++h)
        weighted.middleCols(h * head_dim(), head_dim()).array().colwise() *= weights.col(h).array().sqrt();
    if (weighted_.empty()) weighted_.assign(queries_.size(), SecondMoments(head_dim()));
    detail::add_heads(queries_before_rope, query_heads_ / kv_heads(), queries_);
    detail::add_heads(weighted, query_heads_ / kv_heads(), weighted_);
}

KVPLANE_FUNCTION void LatentStatistics::set_weighted_queries(std::vector<SecondMoments> queries) {
    require(queries.size() == queries_.size(), ErrorCode::shape, "latent statistics: weighted queries of ",
            queries.size(), " key heads, expected ", queries_.size());
    for (std::size_t h = 0; h < queries.size(); ++h)
        require(queries[h].channels() == head_dim() && queries[h].count() == queries_[h].count(),
                ErrorCode::option, "latent statistics: ", queries[h].count(), " weighted queries of ",
                queries[h].channels(), " channels, expected ", queries_[h].count(), " of ", head_dim());
    weighted_ = std::move(queries);
}

KVPLANE_FUNCTION void LatentStatistics::merge(const LatentStatistics& other) {
    require(other.kv_heads() == kv_heads() && other.query_heads() == query_heads_ &&
                other.head_dim() == head_dim(),
            ErrorCode::mismatch, "latent statistics of ", other.query_heads(), " query heads over ",
            other.kv_heads(), " key heads of ", other.head_dim(), " channels do not merge with those of ",
            query_heads_, ", ", kv_heads(), ", ", head_dim());
    const auto empty = [](const LatentStatistics& one) { return one.queries_[0].count() == 0.0; };
    require(weighted_.empty() == other.weighted_.empty() || empty(*this) || empty(other), ErrorCode::mismatch,
            "latent statistics of queries with weights do not merge with those of queries without");
    if (weighted_.empty() && !other.weighted_.empty())
        weighted_.assign(queries_.size(), SecondMoments(head_dim()));
    keys_.merge(other.keys_);
    for (std::size_t h = 0; h < queries_.size(); ++h) {
        queries_[h].merge(other.queries_[h]);
        if (!other.weighted_.empty()) weighted_[h].merge(other.weighted_[h]);
    }
}

}  // namespace kvplane
