// kvplane/metrics.hpp: how far a quantized cache is from the exact one.
//
// All arithmetic is in double. Matrices are tokens x (heads * head_dim) of any element type; rank-3 tensors
// (heads, tokens, channels) are taken too. Reconstruction errors (mean_squared_error, relative_error) say
// little about a model's predictions: score_error, attention_output_error and attention_divergence look at
// keys and values as attention does, and only the model itself has the last word (examples/engine).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

namespace detail {

inline void require_same_shape(const MatrixD& a, const MatrixD& b, std::string_view function) {
    require(a.rows() == b.rows() && a.cols() == b.cols(), ErrorCode::shape, function, ": ", a.rows(), " x ",
            a.cols(), " against ", b.rows(), " x ", b.cols(), "; expected equal shapes");
}

/// |difference| / |reference|; 0 where both vanish, infinite where only the reference does.
inline double ratio_of_norms(double difference, double reference) {
    if (difference == 0.0) return 0.0;
    return reference == 0.0 ? std::numeric_limits<double>::infinity() : difference / reference;
}

}  // namespace detail

/// Mean over all elements of (reference - approximation)^2; 0 for empty input. Throws Error (shape).
template <class A, class B>
double mean_squared_error(const A& reference, const B& approximation) {
    const MatrixD a = to_matrix<double>(reference), b = to_matrix<double>(approximation);
    detail::require_same_shape(a, b, "mean_squared_error");
    return a.size() == 0 ? 0.0 : (a - b).squaredNorm() / static_cast<double>(a.size());
}

/// |reference - approximation|_F / |reference|_F. Throws Error (shape).
template <class A, class B>
double relative_error(const A& reference, const B& approximation) {
    const MatrixD a = to_matrix<double>(reference), b = to_matrix<double>(approximation);
    detail::require_same_shape(a, b, "relative_error");
    return detail::ratio_of_norms((a - b).norm(), a.norm());
}

/// How queries meet keys. Query head h reads key/value head h / (query_heads / kv_heads); query row i stands
/// at position first_query_position + i and sees the keys of positions 0 to its own.
struct AttentionShape {
    Index query_heads = 1;
    Index kv_heads = 1;
    Index first_query_position = 0;
    double scale = 0.0;  ///< of q.k before the softmax; 0 means 1 / sqrt(head_dim)
};

namespace detail {

inline void require_attention(const AttentionShape& shape, const MatrixD& keys, const MatrixD& queries,
                              std::string_view function) {
    require(shape.query_heads >= 1 && shape.kv_heads >= 1 && shape.query_heads % shape.kv_heads == 0,
            ErrorCode::option, function, ": ", shape.query_heads, " query heads over ", shape.kv_heads,
            " key/value heads; expected a multiple");
    require(keys.cols() % shape.kv_heads == 0 && queries.cols() % shape.query_heads == 0 &&
                keys.cols() / shape.kv_heads == queries.cols() / shape.query_heads,
            ErrorCode::shape, function, ": keys of ", keys.cols(), " channels in ", shape.kv_heads,
            " heads and queries of ", queries.cols(), " in ", shape.query_heads,
            "; expected the same head_dim");
    require(shape.first_query_position >= 0 && queries.rows() <= keys.rows() - shape.first_query_position,
            ErrorCode::index, function, ": ", queries.rows(), " queries from position ",
            shape.first_query_position, " on, over ", keys.rows(), " keys");
    require(shape.scale >= 0.0 && std::isfinite(shape.scale), ErrorCode::option, function, ": a scale of ",
            shape.scale, "; expected a positive number, or 0 for 1 / sqrt(head_dim)");
}

/// Scaled scores of one query head, queries x keys; columns that a query does not see are left as computed.
inline MatrixD head_scores(const AttentionShape& shape, const MatrixD& keys, const MatrixD& queries,
                           Index head) {
    const Index dim = queries.cols() / shape.query_heads;
    const Index kv_head = head / (shape.query_heads / shape.kv_heads);
    const double scale = shape.scale > 0.0 ? shape.scale : 1.0 / std::sqrt(static_cast<double>(dim));
    return scale * queries.middleCols(head * dim, dim) * keys.middleCols(kv_head * dim, dim).transpose();
}

/// The causal softmax of scores, row by row; what a query does not see gets 0.
inline MatrixD causal_softmax(const AttentionShape& shape, MatrixD scores) {
    for (Index i = 0; i < scores.rows(); ++i) {
        const Index seen = shape.first_query_position + i + 1;
        auto row = scores.row(i).head(seen);
        row = (row.array() - row.maxCoeff()).exp().matrix().eval();
        row /= row.sum();
        scores.row(i).tail(scores.cols() - seen).setZero();
    }
    return scores;
}

inline MatrixD attention_output(const AttentionShape& shape, const MatrixD& keys, const MatrixD& values,
                                const MatrixD& queries) {
    const Index dim = values.cols() / shape.kv_heads;
    MatrixD output(queries.rows(), shape.query_heads * dim);
    for (Index h = 0; h < shape.query_heads; ++h)
        output.middleCols(h * dim, dim) =
            causal_softmax(shape, head_scores(shape, keys, queries, h)) *
            values.middleCols(h / (shape.query_heads / shape.kv_heads) * dim, dim);
    return output;
}

}  // namespace detail

/// Root mean square over queries, heads and visible keys of the difference of scaled scores.
/// Throws Error (shape, option, index).
template <class K, class KApproximate, class Q>
double score_error(const AttentionShape& shape, const K& keys, const KApproximate& approximate_keys,
                   const Q& queries) {
    const MatrixD k = to_matrix<double>(keys), close = to_matrix<double>(approximate_keys),
                  q = to_matrix<double>(queries);
    detail::require_same_shape(k, close, "score_error");
    detail::require_attention(shape, k, q, "score_error");
    const MatrixD difference = k - close;
    double sum = 0.0, pairs = 0.0;
    for (Index h = 0; h < shape.query_heads; ++h) {
        const MatrixD scores = detail::head_scores(shape, difference, q, h);
        for (Index i = 0; i < q.rows(); ++i) {
            const Index seen = shape.first_query_position + i + 1;
            sum += scores.row(i).head(seen).squaredNorm();
            pairs += static_cast<double>(seen);
        }
    }
    return pairs == 0.0 ? 0.0 : std::sqrt(sum / pairs);
}

/// |O - O'|_F / |O|_F over all queries and heads, O = softmax(scale q k) v. Throws Error (shape, option,
/// index).
template <class K, class V, class KApproximate, class VApproximate, class Q>
double attention_output_error(const AttentionShape& shape, const K& keys, const V& values,
                              const KApproximate& approximate_keys, const VApproximate& approximate_values,
                              const Q& queries) {
    const MatrixD k = to_matrix<double>(keys), v = to_matrix<double>(values),
                  k_close = to_matrix<double>(approximate_keys),
                  v_close = to_matrix<double>(approximate_values), q = to_matrix<double>(queries);
    detail::require_same_shape(k, k_close, "attention_output_error (keys)");
    detail::require_same_shape(v, v_close, "attention_output_error (values)");
    detail::require_attention(shape, k, q, "attention_output_error");
    require(v.rows() == k.rows() && v.cols() % shape.kv_heads == 0, ErrorCode::shape,
            "attention_output_error: values ", v.rows(), " x ", v.cols(), " with ", k.rows(), " keys and ",
            shape.kv_heads, " heads");
    const MatrixD exact = detail::attention_output(shape, k, v, q);
    const MatrixD close = detail::attention_output(shape, k_close, v_close, q);
    return detail::ratio_of_norms((exact - close).norm(), exact.norm());
}

/// Mean over queries and heads of the Kullback-Leibler divergence, in nats, of the attention weights of the
/// exact keys from those of the approximate ones. Throws Error (shape, option, index).
template <class K, class KApproximate, class Q>
double attention_divergence(const AttentionShape& shape, const K& keys, const KApproximate& approximate_keys,
                            const Q& queries) {
    const MatrixD k = to_matrix<double>(keys), close = to_matrix<double>(approximate_keys),
                  q = to_matrix<double>(queries);
    detail::require_same_shape(k, close, "attention_divergence");
    detail::require_attention(shape, k, q, "attention_divergence");
    double sum = 0.0;
    for (Index h = 0; h < shape.query_heads; ++h) {
        const MatrixD exact_scores = detail::head_scores(shape, k, q, h);
        const MatrixD close_scores = detail::head_scores(shape, close, q, h);
        const MatrixD weights = detail::causal_softmax(shape, exact_scores);
        for (Index i = 0; i < q.rows(); ++i) {
            // KL = sum p (s - s') + log Z' - log Z: no logarithm of a weight that may be 0.
            const Index seen = shape.first_query_position + i + 1;
            const auto log_sum = [&](const MatrixD& scores) {
                const auto row = scores.row(i).head(seen).array();
                return row.maxCoeff() + std::log((row - row.maxCoeff()).exp().sum());
            };
            sum += weights.row(i).head(seen).dot((exact_scores - close_scores).row(i).head(seen)) +
                   log_sum(close_scores) - log_sum(exact_scores);
        }
    }
    const Index rows = q.rows() * shape.query_heads;
    // Rounding may leave a little less than 0. In this order the maximum keeps NaN.
    return rows == 0 ? 0.0 : std::max(sum / static_cast<double>(rows), 0.0);
}

}  // namespace kvplane
