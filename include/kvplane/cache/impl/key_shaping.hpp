// kvplane/cache/impl/key_shaping.hpp: averages over distances, and their frames.
#pragma once

#include <algorithm>

#include "kvplane/cache/key_shaping.hpp"
#include "kvplane/latent/turn_average.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane::detail {

inline RotaryEmbedding rope_of_keys(const CacheConfiguration& c) {
    return c.rope ? RotaryEmbedding(c.key_head_dim, *c.rope) : RotaryEmbedding::none(c.key_head_dim);
}

KVPLANE_FUNCTION KeyShaping::KeyShaping(const CacheConfiguration& c,
                                        const std::vector<SecondMoments>& queries)
    : heads_(c.kv_heads), channels_(c.key_head_dim) {
    // The first query that meets a packed tile is that far from its start; the last, the context.
    const Index nearest = tile_tokens + c.recipe.recent_tokens, furthest = std::max(c.context, nearest + 1);
    const RotaryEmbedding rope = rope_of_keys(c);
    const TurnAverage before(rope, nearest), all(rope, furthest);
    triangles_.reserve(static_cast<std::size_t>(heads_ * triangle_size(channels_)));
    for (const SecondMoments& head : queries) {
        const MatrixD moment = head.covariance() + head.mean() * head.mean().transpose();
        MatrixD average = static_cast<double>(furthest) * all.second_moment(moment) -
                          static_cast<double>(nearest) * before.second_moment(moment);
        const double largest = average.cwiseAbs().maxCoeff();
        if (largest > 0.0) average /= largest;
        for (Index row = 0; row < channels_; ++row)
            for (Index column = 0; column <= row; ++column)
                triangles_.push_back(static_cast<Eigen::half>(static_cast<float>(average(row, column))));
    }
}

KVPLANE_FUNCTION MatrixD KeyShaping::weight(const CacheConfiguration& c, const Hadamard* rotation, Index head,
                                            Index position) const {
    Matrix turned(channels_, channels_);
    const Eigen::half* from = triangles_.data() + head * triangle_size(channels_);
    for (Index row = 0; row < channels_; ++row)
        for (Index column = 0; column <= row; ++column, ++from)
            turned(row, column) = turned(column, row) = static_cast<float>(*from);
    // Rows, then columns: R C R^T.
    const RotaryEmbedding rope = rope_of_keys(c);
    for (int side = 0; side < 2; ++side) {
        rope.turn(turned, position);
        if (rotation) rotation->rotate(turned);
        turned.transposeInPlace();
    }
    const Matrix symmetric = 0.5f * (turned + turned.transpose());
    return symmetric.cast<double>();
}

}  // namespace kvplane::detail
