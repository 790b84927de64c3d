// kvplane/latent/statistics.hpp: second moments of keys and queries, which bases are fitted to.
//
// Statistics are kept before RoPE. Moments in the other frames follow from them in closed form
// (latent/turn_average.hpp), so one set of statistics serves every frame, tile size and context length, and
// sets from several texts or machines merge.
#pragma once

#include <string_view>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane {

/// Count, mean and covariance of rows, in double. They accumulate and merge without loss (Chan, Golub and
/// LeVeque 1979).
class SecondMoments {
  public:
    explicit SecondMoments(Index channels)
        : mean_(Eigen::VectorXd::Zero(channels)), scatter_(MatrixD::Zero(channels, channels)) {}
    /// Restores what count(), mean() and scatter() gave. Throws Error (shape, not_finite, option).
    SecondMoments(double count, const Eigen::VectorXd& mean, const MatrixD& scatter);

    Index channels() const noexcept { return mean_.size(); }
    double count() const noexcept { return count_; }
    /// [channels]
    const Eigen::VectorXd& mean() const noexcept { return mean_; }
    /// Sum of (x - mean)(x - mean)^T [channels, channels].
    const MatrixD& scatter() const noexcept { return scatter_; }
    /// The scatter divided by the count.
    MatrixD covariance() const { return count_ > 0.0 ? MatrixD(scatter_ / count_) : scatter_; }

    /// Bytes of memory that the numbers take.
    Index bytes() const noexcept { return 8 * (1 + mean_.size() + scatter_.size()); }

    /// Adds rows [count, channels] of any element type. Throws Error (shape; not_finite with the position).
    template <class Derived>
    void add(const Eigen::MatrixBase<Derived>& rows, std::string_view argument = "rows") {
        add_rows(rows.template cast<double>(), argument);
    }
    /// Has the effect of adding the other's rows. Throws Error (shape).
    void merge(const SecondMoments& other);

  private:
    void add_rows(MatrixD rows, std::string_view argument);

    double count_ = 0.0;
    Eigen::VectorXd mean_;
    MatrixD scatter_;
};

/// What a basis of one layer is fitted to: moments of its keys, with heads concatenated, and of its queries,
/// one set per key head. Both are taken before RoPE.
class LatentStatistics {
  public:
    /// Throws Error (option) unless query_heads is a multiple of kv_heads and all arguments are at least 1.
    LatentStatistics(Index kv_heads, Index query_heads, Index head_dim);
    /// From stored moments. Throws Error (shape, not_finite, option).
    LatentStatistics(Index query_heads, SecondMoments keys, std::vector<SecondMoments> queries);

    Index kv_heads() const noexcept { return static_cast<Index>(queries_.size()); }
    Index query_heads() const noexcept { return query_heads_; }
    Index head_dim() const noexcept { return keys_.channels() / kv_heads(); }
    const SecondMoments& keys() const noexcept { return keys_; }
    /// Each row is one query: count() is the number of tokens times that of the query heads that share the
    /// key head.
    const SecondMoments& queries(Index kv_head) const { return queries_[static_cast<std::size_t>(kv_head)]; }

    /// The same of queries that were added with weights, each times the root of its weight; empty without any.
    const std::vector<SecondMoments>& weighted_queries() const noexcept { return weighted_; }
    /// Those that a basis is fitted to: the weighted ones, where there are any.
    const SecondMoments& basis_queries(Index kv_head) const {
        return weighted_.empty() ? queries(kv_head) : weighted_[static_cast<std::size_t>(kv_head)];
    }

    /// Throws Error (shape, not_finite).
    void add_keys(const FramedKeys<KeyFrame::before_rope>& keys) { keys_.add(keys.rows, "keys"); }
    /// Queries before RoPE [tokens, query_heads * head_dim]. If it throws Error (shape, not_finite), it has
    /// changed nothing.
    void add_queries(const Matrix& queries_before_rope);
    /// The same with weights [tokens, query_heads] from 0 on: how much the errors of packed keys count for the
    /// output of a query, the sum of its squared softmax weights over the tokens that are packed when it comes.
    /// A basis then spares what sharp queries look along, in the layers that have them. All queries have
    /// weights, or none. Throws as above, and Error (option).
    void add_queries(const Matrix& queries_before_rope, const Matrix& weights);
    /// Restores what weighted_queries() gave. Throws Error (shape, option).
    void set_weighted_queries(std::vector<SecondMoments> queries);
    /// Throws Error (mismatch) for other heads or another head_dim, and where one has weights and the other not.
    void merge(const LatentStatistics& other);

    /// Bytes of memory that all moments take.
    Index bytes() const noexcept {
        return keys_.bytes() + (kv_heads() + static_cast<Index>(weighted_.size())) * queries_[0].bytes();
    }

  private:
    Index query_heads_;
    SecondMoments keys_;
    std::vector<SecondMoments> queries_, weighted_;
};

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/latent/impl/statistics.hpp"
#endif
