// examples/engine/divergence.hpp: how far two predictions of the next token are apart.
#pragma once

#include <algorithm>
#include <cmath>

#include "engine/parallel.hpp"
#include "kvplane/matrix.hpp"

namespace engine {

/// Predictions are compared from this token of a context on: before it, caches hold little in tiles.
inline constexpr Index first_compared = 256;

/// log softmax of every row, in place.
inline void log_softmax(kvplane::Matrix& logits, Executor& threads) {
    parallel_for(threads, logits.rows(), [&](Index i) {
        auto row = logits.row(i).array();
        row -= row.maxCoeff();
        row -= static_cast<float>(std::log(row.exp().cast<double>().sum()));
    });
}

/// KL(exact || close) in nats, of two rows of log probabilities. Rounding below 0 is taken as 0.
template <class Exact, class Close>
double divergence(const Eigen::DenseBase<Exact>& exact, const Eigen::DenseBase<Close>& close) {
    const auto p = exact.derived().array(), q = close.derived().array();
    return std::max(0.0, (p.exp() * (p - q)).template cast<double>().sum());
}

}  // namespace engine
