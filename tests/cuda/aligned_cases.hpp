// tests/cuda/aligned_cases.hpp: caches of which some tiles count, for tests of reads that are decided tile
// by tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>

#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/read/value_importance.hpp"
#include "test_inputs.hpp"

namespace kvplane_test {

/// Adds to a token in every tile with probability `hot`, and to the first token, what makes its score larger
/// by `peak`. queries: [kv_heads * key_head_dim], one head's query for each key head.
inline void add_peaks(kvplane::Matrix& keys, const kvplane::Matrix& queries, kvplane::Index kv_heads,
                      double hot, float peak, Random& random) {
    using kvplane::Index;
    const Index dim = keys.cols() / kv_heads;
    std::bernoulli_distribution is_hot(hot);
    for (Index first = 0; first < keys.rows(); first += 128) {
        if (first > 0 && !is_hot(random)) continue;
        const Index count = std::min<Index>(128, keys.rows() - first);
        const Index token = first == 0 ? 0 : first + static_cast<Index>(random()) % count;
        for (Index head = 0; head < kv_heads; ++head) {
            const auto q = queries.row(0).segment(head * dim, dim);
            keys.row(token).segment(head * dim, dim) +=
                peak * std::sqrt(static_cast<float>(dim)) / q.squaredNorm() * q;
        }
    }
}

/// The largest norm of a value that the grids of a key head can hold, and its tokens outside tiles.
inline double largest_norm(const kvplane::KvCache& cache, kvplane::Index head) {
    const kvplane::Index dim = cache.configuration().value_head_dim;
    // Of what is kept: sinks, and what comes behind the tokens that were dropped.
    const kvplane::Index dropped = cache.state().dropped, sinks = dropped > 0 ? cache.state().kept_sinks : 0;
    kvplane::Matrix values(sinks + cache.tokens() - dropped, dim);
    if (sinks > 0) values.topRows(sinks) = cache.stored_values(0, sinks).middleCols(head * dim, dim);
    values.bottomRows(cache.tokens() - dropped) =
        cache.stored_values(dropped, cache.tokens() - dropped).middleCols(head * dim, dim);
    double most = static_cast<double>(values.rowwise().norm().maxCoeff());
    float steps[128];
    for (const kvplane::TilePlace& tile : cache.state().tiles)
        most = std::max(most, static_cast<double>(kvplane::detail::value_steps(
                                  kvplane::current_isa(), tile.layout->values,
                                  tile.page + tile.layout->value_at[static_cast<std::size_t>(head)],
                                  values.cwiseAbs().maxCoeff(), true, steps)));
    return most;
}

}  // namespace kvplane_test
