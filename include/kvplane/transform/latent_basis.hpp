// kvplane/transform/latent_basis.hpp: a basis in which keys need few bits, from second moments.
//
// A latent is a coordinate of a key, z = (k - mean) E, the key k' = mean + z' D^T, the score
// q.k' = q.mean + z'.(D^T q): a query goes through the basis once, and no key is rebuilt. With
//
//   C = E[u u^T]  of the queries u as the keys' frame sees them, summed over the query heads of a key head,
//   A = C^(1/2)   (C = I: the basis of SVDq, arXiv 2502.15304, which is the SVD of the keys),
//   U, lambda     eigenvectors and eigenvalues of cov((k - mean) A),
//
// z = (k - mean) A U / sqrt(lambda): unit variance each, and an error e_j of latent j costs lambda_j e_j^2 of
// expected squared score (theorem T6b). So lambda is all that an allocation of bits needs to know.
//
// Statistics are kept before RoPE, and moments in the other frames follow from them: a key is turned by its
// place in its tile (any of 0 to 127 alike), a query by its distance, and the mean of R(t) M R(t)^T over t
// has a closed form. One set of statistics so serves every frame, tile size and context length, and sets from
// several texts or machines merge.
#pragma once

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane {

/// Count, mean and covariance of rows, in double; they accumulate and merge without loss (Chan, Golub and
/// LeVeque 1979).
class SecondMoments {
  public:
    explicit SecondMoments(Index channels)
        : mean_(Eigen::VectorXd::Zero(channels)), scatter_(MatrixD::Zero(channels, channels)) {}
    /// From what count(), mean() and scatter() gave. Throws Error (shape, not_finite, option).
    SecondMoments(double count, const Eigen::VectorXd& mean, const MatrixD& scatter);

    Index channels() const noexcept { return mean_.size(); }
    double count() const noexcept { return count_; }
    const Eigen::VectorXd& mean() const noexcept { return mean_; }
    /// Sum of (x - mean)(x - mean)^T.
    const MatrixD& scatter() const noexcept { return scatter_; }
    /// The same, divided by the count.
    MatrixD covariance() const { return count_ > 0.0 ? MatrixD(scatter_ / count_) : scatter_; }

    /// Memory of the numbers.
    Index bytes() const noexcept { return 8 * (1 + mean_.size() + scatter_.size()); }

    /// Rows x channels. Throws Error (shape; not_finite with the position).
    template <class Derived>
    void add(const Eigen::MatrixBase<Derived>& rows, std::string_view argument = "rows");
    /// As if the other's rows had been added. Throws Error (shape).
    void merge(const SecondMoments& other);

  private:
    double count_ = 0.0;
    Eigen::VectorXd mean_;
    MatrixD scatter_;
};

/// What a basis of one layer is fitted to: moments of keys, heads concatenated, and of queries, by key head;
/// both before RoPE.
class LatentStatistics {
  public:
    /// Throws Error (option) unless the heads divide.
    LatentStatistics(Index kv_heads, Index query_heads, Index head_dim);
    /// From stored parts. Throws Error (shape, not_finite, option).
    LatentStatistics(Index query_heads, SecondMoments keys, std::vector<SecondMoments> queries);

    Index kv_heads() const noexcept { return static_cast<Index>(queries_.size()); }
    Index query_heads() const noexcept { return query_heads_; }
    Index head_dim() const noexcept { return keys_.channels() / kv_heads(); }
    const SecondMoments& keys() const noexcept { return keys_; }
    /// Rows are single queries: count() is that of tokens times the query heads that share the key head.
    const SecondMoments& queries(Index kv_head) const { return queries_[static_cast<std::size_t>(kv_head)]; }

    /// Throws Error (shape, not_finite).
    void add_keys(const FramedKeys<KeyFrame::before_rope>& keys) { keys_.add(keys.rows, "keys"); }
    /// Queries before RoPE, tokens x (query_heads * head_dim). Throws Error (shape, not_finite) and then has
    /// changed nothing.
    void add_queries(const Matrix& queries_before_rope);
    /// Throws Error (mismatch) for other heads or another head_dim.
    void merge(const LatentStatistics& other);

    /// Memory of all of it.
    Index bytes() const noexcept { return keys_.bytes() + kv_heads() * queries_[0].bytes(); }

  private:
    Index query_heads_;
    SecondMoments keys_;
    std::vector<SecondMoments> queries_;
};

enum class LatentDirections : std::uint8_t {
    eigenvectors,  ///< the least error at a given rate
    channels       ///< the channels themselves, most important first: no matrix, and no product at a read
};

struct BasisSettings {
    KeyFrame frame = KeyFrame::tile;
    bool query_weighted = true;  ///< false: C = I
    bool heads_together = false;
    LatentDirections directions = LatentDirections::eigenvectors;
    Index tile_tokens = 128;  ///< in the frame of a tile, how far its keys are turned
    Index context = 4096;     ///< how far queries look back, and, after RoPE, how far keys are turned

    bool operator==(const BasisSettings&) const = default;
};

/// The basis of one layer: a part for each key head, or one part for all.
class LatentBasis {
  public:
    struct Part {
        Eigen::VectorXd
            spectrum;  ///< lambda, descending; expected squared score (q.k, unscaled) of each latent
        Eigen::RowVectorXf mean;  ///< of keys, in the frame
        Matrix encode;            ///< E: channels x latents
        Matrix decode;            ///< D: channels x latents
        Index rank;               ///< latents that the statistics determine; encode is 0 beyond them
    };

    /// Throws Error (shape, not_finite, option) for parts that do not make up a basis.
    LatentBasis(const BasisSettings& settings, Index kv_heads, Index query_heads, Index head_dim,
                const RopeSettings* rope, std::vector<Part> parts);

    const BasisSettings& settings() const noexcept { return settings_; }
    KeyFrame frame() const noexcept { return settings_.frame; }
    Index kv_heads() const noexcept { return kv_heads_; }
    Index query_heads() const noexcept { return query_heads_; }
    Index head_dim() const noexcept { return head_dim_; }
    /// Of the model whose keys it was fitted to; nullptr: none.
    const RopeSettings* rope() const noexcept { return has_rope_ ? &rope_ : nullptr; }
    const std::vector<Part>& parts() const noexcept { return parts_; }
    Index part_channels() const noexcept { return kv_heads_ * head_dim_ / static_cast<Index>(parts_.size()); }

    /// All latents of keys, tokens x (kv_heads * head_dim), part by part. Throws Error (mismatch) for another
    /// frame, (shape) for another width.
    template <KeyFrame frame>
    Matrix encode(const FramedKeys<frame>& keys) const;
    /// The keys of latents; `kept` of each part count, the rest is 0 (all: -1).
    template <KeyFrame frame>
    FramedKeys<frame> decode(const Matrix& latents, Index first_position, Index kept = -1) const;

    /// Bytes that a cache keeps for every latent that has bits (cache/latent_keys.hpp): two fp16 columns and
    /// their scales; one column where E and D differ in scale alone (C = I), a number for a channel.
    Index bytes_per_latent() const noexcept {
        if (settings_.directions == LatentDirections::channels) return 8 + 2;
        return 8 + 2 * part_channels() * (settings_.query_weighted ? 2 : 1);
    }

  private:
    BasisSettings settings_;
    Index kv_heads_, query_heads_, head_dim_;
    bool has_rope_;
    RopeSettings rope_;
    std::vector<Part> parts_;
};

/// Fits a basis. rope: nullptr for a model without. Throws Error: shape (fewer than two keys; query-weighted
/// and no queries), option (settings).
LatentBasis fit_latent_basis(const LatentStatistics& statistics, const RopeSettings* rope,
                             const BasisSettings& settings);

/// How much of new keys a basis misses that keeps `kept` latents of each part: shares of |k - mean|^2, and of
/// the expected squared scores.
struct LatentDrift {
    double energy = 0.0;
    double weighted_energy = 0.0;
};
template <KeyFrame frame>
LatentDrift latent_drift(const LatentBasis& basis, const FramedKeys<frame>& keys, Index kept);

// Implementation -------------------------------------------------------------------------------------------

inline SecondMoments::SecondMoments(double count, const Eigen::VectorXd& mean, const MatrixD& scatter)
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

template <class Derived>
void SecondMoments::add(const Eigen::MatrixBase<Derived>& rows, std::string_view argument) {
    require(rows.cols() == channels(), ErrorCode::shape, argument, ": ", rows.cols(), " channels, expected ",
            channels());
    if (rows.rows() == 0 || channels() == 0) return;
    MatrixD block = rows.template cast<double>();
    if (!block.allFinite())
        for (Index t = 0; t < block.rows(); ++t)
            for (Index c = 0; c < block.cols(); ++c)
                require(std::isfinite(block(t, c)), ErrorCode::not_finite, argument, ": the value at token ",
                        t, ", channel ", c, " is ", block(t, c), "; expected finite values");
    SecondMoments other(0);
    other.count_ = static_cast<double>(block.rows());
    other.mean_ = block.colwise().mean().transpose();
    block.rowwise() -= other.mean_.transpose();
    other.scatter_ = MatrixD::Zero(channels(), channels());
    other.scatter_.selfadjointView<Eigen::Lower>().rankUpdate(block.transpose());
    other.scatter_.triangularView<Eigen::StrictlyUpper>() = other.scatter_.transpose();
    merge(other);
}

inline void SecondMoments::merge(const SecondMoments& other) {
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

inline LatentStatistics::LatentStatistics(Index kv_heads, Index query_heads, Index head_dim)
    : query_heads_(query_heads), keys_(std::max<Index>(0, kv_heads * head_dim)) {
    require(kv_heads >= 1 && head_dim >= 1 && query_heads >= 1 && query_heads % kv_heads == 0,
            ErrorCode::option, "latent statistics: ", query_heads, " query heads over ", kv_heads,
            " key heads of ", head_dim, " channels, expected a multiple");
    queries_.assign(static_cast<std::size_t>(kv_heads), SecondMoments(head_dim));
}

inline LatentStatistics::LatentStatistics(Index query_heads, SecondMoments keys,
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

inline void LatentStatistics::add_queries(const Matrix& queries_before_rope) {
    require(queries_before_rope.cols() == query_heads_ * head_dim(), ErrorCode::shape,
            "queries: ", queries_before_rope.cols(), " channels, expected ", query_heads_ * head_dim());
    require(queries_before_rope.allFinite(), ErrorCode::not_finite, "queries: not all values are finite");
    const Index group = query_heads_ / kv_heads(), dim = head_dim();
    for (Index h = 0; h < query_heads_; ++h)
        queries_[static_cast<std::size_t>(h / group)].add(queries_before_rope.middleCols(h * dim, dim));
}

inline void LatentStatistics::merge(const LatentStatistics& other) {
    require(other.kv_heads() == kv_heads() && other.query_heads() == query_heads_ &&
                other.head_dim() == head_dim(),
            ErrorCode::mismatch, "latent statistics of ", other.query_heads(), " query heads over ",
            other.kv_heads(), " key heads of ", other.head_dim(), " channels do not merge with those of ",
            query_heads_, ", ", kv_heads(), ", ", head_dim());
    keys_.merge(other.keys_);
    for (std::size_t h = 0; h < queries_.size(); ++h) queries_[h].merge(other.queries_[h]);
}

namespace detail {

/// Means over t = 0 .. count - 1 of turned vectors and second moments, R(t) m and R(t) M R(t)^T.
///
/// A pair as a complex number turns by e^{i t f}. A 2 x 2 block between two pairs is the sum of a part that
/// commutes with rotations, as one complex number, and of one that anticommutes; these turn by
/// e^{i t (f - g)} and e^{i t (f + g)}.
class TurnAverage {
  public:
    TurnAverage(const RotaryEmbedding& rope, Index count) : rope_(rope), count_(static_cast<double>(count)) {}

    Eigen::VectorXd mean(const Eigen::VectorXd& mean) const {
        Eigen::VectorXd turned = mean;
        for (Index head = 0; head < mean.size(); head += rope_.head_dim())
            for (const auto& pair : rope_.pairs()) {
                if (pair.second < 0) continue;
                const std::complex<double> z =
                    phase(pair.frequency) *
                    std::complex<double>(mean[head + pair.first], mean[head + pair.second]);
                turned[head + pair.first] = z.real();
                turned[head + pair.second] = z.imag();
            }
        return turned;
    }

    MatrixD second_moment(const MatrixD& moment) const {
        MatrixD turned = moment;
        const Index dim = rope_.head_dim();
        for (const auto& f : rope_.pairs())
            for (const auto& g : rope_.pairs()) {
                if (f.frequency == 0.0 && g.frequency == 0.0) continue;
                const std::complex<double> minus = phase(f.frequency - g.frequency),
                                           plus = phase(f.frequency + g.frequency);
                for (Index row = 0; row < moment.rows(); row += dim)
                    for (Index col = 0; col < moment.cols(); col += dim)
                        turn_block(moment, row, col, f, g, minus, plus, turned);
            }
        return turned;
    }

  private:
    using Pair = RotaryEmbedding::Pair;

    static void turn_block(const MatrixD& moment, Index row, Index col, const Pair& f, const Pair& g,
                           std::complex<double> minus, std::complex<double> plus, MatrixD& turned) {
        const auto at = [&](Index i, Index j) { return i < 0 || j < 0 ? 0.0 : moment(row + i, col + j); };
        const double a = at(f.first, g.first), b = at(f.first, g.second), c = at(f.second, g.first),
                     d = at(f.second, g.second);
        const std::complex<double> commuting = minus * std::complex<double>(0.5 * (a + d), 0.5 * (c - b));
        const std::complex<double> anti = plus * std::complex<double>(0.5 * (a - d), 0.5 * (c + b));
        const auto set = [&](Index i, Index j, double x) {
            if (i >= 0 && j >= 0) turned(row + i, col + j) = x;
        };
        set(f.first, g.first, commuting.real() + anti.real());
        set(f.second, g.second, commuting.real() - anti.real());
        set(f.second, g.first, anti.imag() + commuting.imag());
        set(f.first, g.second, anti.imag() - commuting.imag());
    }

    /// The mean of e^{i t w}.
    std::complex<double> phase(double w) const {
        const double half = std::sin(0.5 * w);
        if (std::abs(half) < 1e-12) return 1.0;
        const double angle = 0.5 * (count_ - 1.0) * w;  // not std::polar, which takes no negative length
        return std::sin(0.5 * count_ * w) / (count_ * half) *
               std::complex<double>(std::cos(angle), std::sin(angle));
    }

    const RotaryEmbedding& rope_;
    double count_;
};

/// C^(1/2) and its inverse of one head, and what C was divided by so that its mean eigenvalue is 1.
struct QueryWeight {
    MatrixD root, inverse;
    double scale = 1.0;
};

inline QueryWeight query_weight(const MatrixD& moment, LatentDirections directions) {
    constexpr double ridge =
        1e-3;  // of the mean eigenvalue: directions that no query has looked along so far
    const Index dim = moment.rows();
    const double scale = moment.trace() / static_cast<double>(dim);
    if (!(scale > 0.0)) return {MatrixD::Identity(dim, dim), MatrixD::Identity(dim, dim), 1.0};
    MatrixD c = moment / scale;
    if (directions == LatentDirections::channels) c = MatrixD(c.diagonal().asDiagonal());
    c.diagonal().array() += ridge;
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(c);
    const Eigen::VectorXd root = solver.eigenvalues().cwiseMax(ridge).cwiseSqrt();
    const Eigen::MatrixXd& vectors = solver.eigenvectors();
    return {vectors * root.asDiagonal() * vectors.transpose(),
            vectors * root.cwiseInverse().asDiagonal() * vectors.transpose(), scale};
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

/// One part from the moments of its keys in the frame. root and inverse: A and A^-1.
inline LatentBasis::Part fit_part(const Eigen::VectorXd& mean, const MatrixD& covariance, const MatrixD& root,
                                  const MatrixD& inverse, double scale, double count,
                                  LatentDirections directions) {
    LatentBasis::Part part;
    Eigen::VectorXd spectrum;
    Eigen::MatrixXd vectors;
    directions_of(root * covariance * root, directions, spectrum, vectors);
    // What is below the rounding of the statistics is no direction of the keys.
    const double least = 1e-12 * std::max(spectrum[0], 1e-300);
    part.rank = 0;
    Eigen::VectorXd deviation = spectrum.cwiseSqrt();
    while (part.rank < spectrum.size() && static_cast<double>(part.rank) < count - 1.0 &&
           spectrum[part.rank] > least)
        ++part.rank;
    for (Index j = part.rank; j < spectrum.size(); ++j) deviation[j] = spectrum[j] = 0.0;
    Eigen::VectorXd inverse_deviation = deviation;
    for (Index j = 0; j < part.rank; ++j) inverse_deviation[j] = 1.0 / deviation[j];
    part.mean = mean.transpose().cast<float>();
    part.encode = (root * vectors * inverse_deviation.asDiagonal()).cast<float>();
    part.decode = (inverse * vectors * deviation.asDiagonal()).cast<float>();
    part.spectrum = spectrum * scale;
    return part;
}

}  // namespace detail

inline LatentBasis fit_latent_basis(const LatentStatistics& statistics, const RopeSettings* rope,
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
            const SecondMoments& queries = statistics.queries(h);
            weights.push_back(detail::query_weight(
                group * turned_queries.second_moment(queries.covariance() +
                                                     queries.mean() * queries.mean().transpose()),
                settings.directions));
        }
        mean_scale += weights.back().scale / static_cast<double>(heads);
    }

    std::vector<LatentBasis::Part> parts;
    if (settings.heads_together) {
        MatrixD root = MatrixD::Zero(all, all), inverse = root;
        for (Index h = 0; h < heads; ++h) {
            const detail::QueryWeight& weight = weights[static_cast<std::size_t>(h)];
            const double relative = std::sqrt(weight.scale / mean_scale);
            root.block(h * dim, h * dim, dim, dim) = weight.root * relative;
            inverse.block(h * dim, h * dim, dim, dim) = weight.inverse / relative;
        }
        parts.push_back(
            detail::fit_part(mean, covariance, root, inverse, mean_scale, keys.count(), settings.directions));
    } else {
        for (Index h = 0; h < heads; ++h) {
            const detail::QueryWeight& weight = weights[static_cast<std::size_t>(h)];
            parts.push_back(detail::fit_part(
                mean.segment(h * dim, dim), covariance.block(h * dim, h * dim, dim, dim), weight.root,
                weight.inverse, weight.scale, keys.count(), settings.directions));
        }
    }
    return LatentBasis(settings, heads, statistics.query_heads(), dim, rope, std::move(parts));
}

inline LatentBasis::LatentBasis(const BasisSettings& settings, Index kv_heads, Index query_heads,
                                Index head_dim, const RopeSettings* rope, std::vector<Part> parts)
    : settings_(settings),
      kv_heads_(kv_heads),
      query_heads_(query_heads),
      head_dim_(head_dim),
      has_rope_(rope != nullptr),
      rope_(rope ? *rope : RopeSettings{}),
      parts_(std::move(parts)) {
    require(kv_heads >= 1 && head_dim >= 1 && query_heads >= 1 && query_heads % kv_heads == 0,
            ErrorCode::option, "latent basis: ", query_heads, " query heads over ", kv_heads,
            " key heads of ", head_dim, " channels, expected a multiple");
    require(static_cast<Index>(parts_.size()) == (settings.heads_together ? 1 : kv_heads), ErrorCode::shape,
            "latent basis: ", parts_.size(), " parts, expected ", settings.heads_together ? 1 : kv_heads);
    if (rope) RotaryEmbedding(head_dim, *rope);  // throws where it is none
    const Index channels = part_channels();
    for (std::size_t p = 0; p < parts_.size(); ++p) {
        const Part& part = parts_[p];
        require(part.mean.size() == channels && part.spectrum.size() == channels &&
                    part.encode.rows() == channels && part.encode.cols() == channels &&
                    part.decode.rows() == channels && part.decode.cols() == channels && part.rank >= 0 &&
                    part.rank <= channels,
                ErrorCode::shape, "latent basis: part ", p, " is not one of ", channels, " channels");
        require(part.mean.allFinite() && part.spectrum.allFinite() && part.encode.allFinite() &&
                    part.decode.allFinite(),
                ErrorCode::not_finite, "latent basis: part ", p, " is not finite");
        require((part.spectrum.array() >= 0.0).all() &&
                    std::is_sorted(part.spectrum.begin(), part.spectrum.end(), std::greater<>()),
                ErrorCode::option, "latent basis: the spectrum of part ", p,
                " does not descend to 0 or more");
    }
}

template <KeyFrame frame_>
Matrix LatentBasis::encode(const FramedKeys<frame_>& keys) const {
    require(frame_ == frame(), ErrorCode::mismatch, "latent basis: keys in the frame ", name(frame_),
            ", expected ", name(frame()));
    require(keys.rows.cols() == kv_heads_ * head_dim_, ErrorCode::shape, "latent basis: keys of ",
            keys.rows.cols(), " channels, expected ", kv_heads_ * head_dim_);
    Matrix latents(keys.rows.rows(), keys.rows.cols());
    const Index channels = part_channels();
    for (std::size_t p = 0; p < parts_.size(); ++p) {
        const Index at = static_cast<Index>(p) * channels;
        latents.middleCols(at, channels).noalias() =
            (keys.rows.middleCols(at, channels).rowwise() - parts_[p].mean) * parts_[p].encode;
    }
    return latents;
}

template <KeyFrame frame_>
FramedKeys<frame_> LatentBasis::decode(const Matrix& latents, Index first_position, Index kept) const {
    require(frame_ == frame(), ErrorCode::mismatch, "latent basis: keys wanted in the frame ", name(frame_),
            ", expected ", name(frame()));
    require(latents.cols() == kv_heads_ * head_dim_, ErrorCode::shape, "latent basis: ", latents.cols(),
            " latents, expected ", kv_heads_ * head_dim_);
    const Index channels = part_channels();
    if (kept < 0 || kept > channels) kept = channels;
    FramedKeys<frame_> keys{Matrix(latents.rows(), latents.cols()), first_position};
    for (std::size_t p = 0; p < parts_.size(); ++p) {
        const Index at = static_cast<Index>(p) * channels;
        auto rows = keys.rows.middleCols(at, channels);
        rows.noalias() = latents.middleCols(at, kept) * parts_[p].decode.leftCols(kept).transpose();
        rows.rowwise() += parts_[p].mean;
    }
    return keys;
}

template <KeyFrame frame>
LatentDrift latent_drift(const LatentBasis& basis, const FramedKeys<frame>& keys, Index kept) {
    const Matrix latents = basis.encode(keys);
    const Matrix close = basis.template decode<frame>(latents, keys.first_position, kept).rows;
    const Index channels = basis.part_channels();
    double energy = 0.0, weighted_outside = 0.0, weighted = 0.0;
    for (std::size_t p = 0; p < basis.parts().size(); ++p) {
        const LatentBasis::Part& part = basis.parts()[p];
        const auto at = static_cast<Index>(p) * channels;
        energy +=
            (keys.rows.middleCols(at, channels).rowwise() - part.mean).template cast<double>().squaredNorm();
        for (Index j = 0; j < channels; ++j) {
            const double share = part.spectrum[j] * latents.col(at + j).cast<double>().squaredNorm();
            weighted += share;
            if (j >= kept) weighted_outside += share;
        }
    }
    const double outside = (keys.rows - close).template cast<double>().squaredNorm();
    return {energy > 0.0 ? outside / energy : 0.0, weighted > 0.0 ? weighted_outside / weighted : 0.0};
}

}  // namespace kvplane
