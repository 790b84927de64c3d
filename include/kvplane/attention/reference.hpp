// kvplane/attention/reference.hpp: attention in plain Eigen and double, the oracle of every test.
//
// Written to be read, not to be fast: one query head and one query token at a time, scores, softmax, sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvplane/attention/parameters.hpp"
#include "kvplane/attention/score_rule.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

/// Attention of `queries`, the last query_tokens of the sequence, causal among themselves, unless the parameters
/// say otherwise.
/// keys: tokens x (kv_heads * key_dim); values: tokens x (kv_heads * value_dim); queries: query_tokens x
/// (query_heads * key_dim); all of any element type, or rank-3 tensors (heads, tokens, channels). Query head
/// h reads key/value head h / (query_heads / kv_heads). Returns query_tokens x (query_heads * value_dim); a
/// query that sees no key gets zeros. Throws Error (shape, option).
template <class K, class V, class Q>
MatrixD reference_attention(const K& keys, const V& values, const Q& queries, Index query_heads,
                            Index kv_heads, const AttentionParameters& parameters = {}) {
    const MatrixD k = to_matrix<double>(keys), v = to_matrix<double>(values), q = to_matrix<double>(queries);
    require(kv_heads >= 1 && query_heads >= 1 && query_heads % kv_heads == 0, ErrorCode::option,
            "reference_attention: ", query_heads, " query heads over ", kv_heads,
            " key/value heads, expected a multiple");
    require(k.rows() == v.rows() && k.cols() % kv_heads == 0 && v.cols() % kv_heads == 0 &&
                q.cols() % query_heads == 0 && q.cols() / query_heads == k.cols() / kv_heads,
            ErrorCode::shape, "reference_attention: keys ", k.rows(), " x ", k.cols(), ", values ", v.rows(),
            " x ", v.cols(), ", queries ", q.rows(), " x ", q.cols(), " in ", kv_heads, " and ", query_heads,
            " heads do not fit together");
    detail::require_parameters(parameters, query_heads, q.rows(), k.rows());

    const Index key_dim = k.cols() / kv_heads, value_dim = v.cols() / kv_heads;
    MatrixD output = MatrixD::Zero(q.rows(), query_heads * value_dim);
    for (Index head = 0; head < query_heads; ++head) {
        const Index kv_head = head / (query_heads / kv_heads);
        const detail::ScoreRule<double> rule(parameters, head, q.rows(), key_dim);
        for (Index i = 0; i < q.rows(); ++i) {
            const Index position = parameters.first_position(k.rows(), q.rows()) + i;
            Eigen::VectorXd scores = k.middleCols(kv_head * key_dim, key_dim) *
                                     q.row(i).segment(head * key_dim, key_dim).transpose();
            for (Index t = 0; t < k.rows(); ++t) scores[t] = rule(scores[t], i, position, t);
            const double seen =
                scores.size() > 0 ? scores.maxCoeff() : -std::numeric_limits<double>::infinity();
            const double largest = std::max(seen, rule.sink_logit());
            if (std::isinf(largest) && largest < 0.0) continue;
            // std::exp: Eigen's own gives 2e-308 for -infinity, and a masked key is to weigh nothing.
            const Eigen::VectorXd weights =
                scores.unaryExpr([&](double score) { return std::exp(score - largest); });
            output.row(i).segment(head * value_dim, value_dim) =
                weights.transpose() * v.middleCols(kv_head * value_dim, value_dim) /
                (weights.sum() + std::exp(rule.sink_logit() - largest));
        }
    }
    return output;
}

}  // namespace kvplane
