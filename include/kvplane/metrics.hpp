// kvplane/metrics.hpp: how far a quantized cache is from the exact one.
//
// All arithmetic is in double. Matrices are tokens x (heads * head_dim) of any element type; rank-3 tensors
// (heads, tokens, channels) are taken too. Reconstruction errors (mean_squared_error, relative_error) say
// little about a model's predictions: score_error, attention_output_error and attention_divergence look at
// keys and values as attention does, and only the model itself has the last word (examples/engine).
#pragma once

#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

/// How queries meet keys. Query head h reads key/value head h / (query_heads / kv_heads); query row i stands
/// at position first_query_position + i and sees the keys of positions 0 to its own.
struct AttentionShape {
    Index query_heads = 1;
    Index kv_heads = 1;
    Index first_query_position = 0;
    double scale = 0.0;  ///< of q.k before the softmax; 0 means 1 / sqrt(head_dim)
};

/// The same functions of matrices in double.
namespace detail::metrics {

double mean_squared_error(const MatrixD& a, const MatrixD& b);
double relative_error(const MatrixD& a, const MatrixD& b);
double score_error(const AttentionShape& shape, const MatrixD& k, const MatrixD& close, const MatrixD& q);
double attention_output_error(const AttentionShape& shape, const MatrixD& k, const MatrixD& v,
                              const MatrixD& k_close, const MatrixD& v_close, const MatrixD& q);
double attention_divergence(const AttentionShape& shape, const MatrixD& k, const MatrixD& close,
                            const MatrixD& q);

}  // namespace detail::metrics

/// Mean over all elements of (reference - approximation)^2; 0 for empty input. Throws Error (shape).
template <class A, class B>
double mean_squared_error(const A& reference, const B& approximation) {
    return detail::metrics::mean_squared_error(to_matrix<double>(reference),
                                               to_matrix<double>(approximation));
}

/// |reference - approximation|_F / |reference|_F. Throws Error (shape).
template <class A, class B>
double relative_error(const A& reference, const B& approximation) {
    return detail::metrics::relative_error(to_matrix<double>(reference), to_matrix<double>(approximation));
}

/// Root mean square over queries, heads and visible keys of the difference of scaled scores.
/// Throws Error (shape, option, index).
template <class K, class KApproximate, class Q>
double score_error(const AttentionShape& shape, const K& keys, const KApproximate& approximate_keys,
                   const Q& queries) {
    return detail::metrics::score_error(shape, to_matrix<double>(keys), to_matrix<double>(approximate_keys),
                                        to_matrix<double>(queries));
}

/// |O - O'|_F / |O|_F over all queries and heads, O = softmax(scale q k) v. Throws Error (shape, option,
/// index).
template <class K, class V, class KApproximate, class VApproximate, class Q>
double attention_output_error(const AttentionShape& shape, const K& keys, const V& values,
                              const KApproximate& approximate_keys, const VApproximate& approximate_values,
                              const Q& queries) {
    return detail::metrics::attention_output_error(
        shape, to_matrix<double>(keys), to_matrix<double>(values), to_matrix<double>(approximate_keys),
        to_matrix<double>(approximate_values), to_matrix<double>(queries));
}

/// Mean over queries and heads of the Kullback-Leibler divergence, in nats, of the attention weights of the
/// exact keys from those of the approximate ones. Throws Error (shape, option, index).
template <class K, class KApproximate, class Q>
double attention_divergence(const AttentionShape& shape, const K& keys, const KApproximate& approximate_keys,
                            const Q& queries) {
    return detail::metrics::attention_divergence(
        shape, to_matrix<double>(keys), to_matrix<double>(approximate_keys), to_matrix<double>(queries));
}

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/impl/metrics.hpp"
#endif
