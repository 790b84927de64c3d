// kvplane/attention/merge.hpp: one attention out of parts of the context, which caches, threads, processes or
// machines have computed by themselves.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

/// Adds the attention of the same queries over other tokens to `output`, which becomes attention over both
/// (flash decoding; T17). A part that saw nothing changes nothing, and the order of parts changes rounding
/// alone. Sink logits belong to one part only.
///   output, more              [query token][query_heads * value dim]
///   log_sum_exp, more_lse     [query token][query head] as KvCache::attend() gives it
/// Throws Error (shape) and then has changed nothing.
inline void merge_attention(Matrix& output, Matrix& log_sum_exp, const Matrix& more, const Matrix& more_lse) {
    const Index heads = log_sum_exp.cols();
    require(output.rows() == more.rows() && output.cols() == more.cols() &&
                log_sum_exp.rows() == output.rows() && more_lse.rows() == output.rows() &&
                more_lse.cols() == heads && (heads == 0 ? output.size() == 0 : output.cols() % heads == 0),
            ErrorCode::shape, "merge_attention: outputs of ", output.rows(), " x ", output.cols(), " and ",
            more.rows(), " x ", more.cols(), " with sums of ", log_sum_exp.rows(), " x ", heads, " and ",
            more_lse.rows(), " x ", more_lse.cols(),
            ", expected two of one shape and a sum for each query token and head");
    for (Index row = 0; row < output.rows(); ++row)
        for (Index head = 0; head < heads; ++head) {
            float& sum = log_sum_exp(row, head);
            const float other = more_lse(row, head);
            if (other == -std::numeric_limits<float>::infinity()) continue;
            const float top = std::max(sum, other), keep = std::exp(sum - top), take = std::exp(other - top);
            const Index dim = output.cols() / heads;
            auto to = output.row(row).segment(head * dim, dim);
            to = (to * keep + more.row(row).segment(head * dim, dim) * take) / (keep + take);
            sum = top + std::log(keep + take);
        }
}

}  // namespace kvplane
