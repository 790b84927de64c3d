// kvplane/impl/metrics.hpp: the metrics of matrices in double.
#pragma once

#include "kvplane/metrics.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "kvplane/error.hpp"

namespace kvplane::detail::metrics {

inline void require_same_shape(const MatrixD& a, const MatrixD& b, std::string_view function) {
    require(a.rows() == b.rows() && a.cols() == b.cols(), ErrorCode::shape, function, ": ", a.rows(), " x ",
            a.cols(), " against ", b.rows(), " x ", b.cols(), "; expected equal shapes");
}

/// |difference| / |reference|; 0 where both vanish, infinite where only the reference does.
inline double ratio_of_norms(double difference, double reference) {
    if (difference == 0.0) return 0.0;
    return reference == 0.0 ? std::numeric_limits<double>::infinity() : difference / reference;
}

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

KVPLANE_FUNCTION double mean_squared_error(const MatrixD& a, const MatrixD& b) {
    require_same_shape(a, b, "mean_squared_error");
    return a.size() == 0 ? 0.0 : (a - b).squaredNorm() / static_cast<double>(a.size());
}

KVPLANE_FUNCTION double relative_error(const MatrixD& a, const MatrixD& b) {
    require_same_shape(a, b, "relative_error");
    return ratio_of_norms((a - b).norm(), a.norm());
}

KVPLANE_FUNCTION double score_error(const AttentionShape& shape, const MatrixD& k, const MatrixD& close,
                                    const MatrixD& q) {
    require_same_shape(k, close, "score_error");
    require_attention(shape, k, q, "score_error");
    const MatrixD difference = k - close;
    double sum = 0.0, pairs = 0.0;
    for (Index h = 0; h < shape.query_heads; ++h) {
        const MatrixD scores = head_scores(shape, difference, q, h);
        for (Index i = 0; i < q.rows(); ++i) {
            const Index seen = shape.first_query_position + i + 1;
            sum += scores.row(i).head(seen).squaredNorm();
            pairs += static_cast<double>(seen);
        }
    }
    return pairs == 0.0 ? 0.0 : std::sqrt(sum / pairs);
}

KVPLANE_FUNCTION double attention_output_error(const AttentionShape& shape, const MatrixD& k,
                                               const MatrixD& v, const MatrixD& k_close,
                                               const MatrixD& v_close, const MatrixD& q) {
    require_same_shape(k, k_close, "attention_output_error (keys)");
    require_same_shape(v, v_close, "attention_output_error (values)");
    require_attention(shape, k, q, "attention_output_error");
    require(v.rows() == k.rows() && v.cols() % shape.kv_heads == 0, ErrorCode::shape,
            "attention_output_error: values ", v.rows(), " x ", v.cols(), " with ", k.rows(), " keys and ",
            shape.kv_heads, " heads");
    const MatrixD exact = attention_output(shape, k, v, q);
    const MatrixD close = attention_output(shape, k_close, v_close, q);
    return ratio_of_norms((exact - close).norm(), exact.norm());
}

KVPLANE_FUNCTION double attention_divergence(const AttentionShape& shape, const MatrixD& k,
                                             const MatrixD& close, const MatrixD& q) {
    require_same_shape(k, close, "attention_divergence");
    require_attention(shape, k, q, "attention_divergence");
    double sum = 0.0;
    for (Index h = 0; h < shape.query_heads; ++h) {
        const MatrixD exact_scores = head_scores(shape, k, q, h);
        const MatrixD close_scores = head_scores(shape, close, q, h);
        const MatrixD weights = causal_softmax(shape, exact_scores);
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

}  // namespace kvplane::detail::metrics
