// kvplane/cache/impl/key_shaping.hpp: averages over distances, and their frames.
#pragma once

#include <algorithm>

#include "kvplane/cache/key_shaping.hpp"
#include "kvplane/latent/turn_average.hpp"
#include "kvplane/simd/half.hpp"
#include "kvplane/simd/transpose.hpp"
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

KVPLANE_FUNCTION void KeyShaping::weigh(const Frame& frame, const Hadamard* rotation, Index head,
                                        Matrix& weight, Matrix& room) const {
    const Index channels = channels_;
    const Isa isa = current_isa();
    weight.resize(channels, channels);
    room.resize(channels, channels);
    const Eigen::half* from = triangles_.data() + head * triangle_size(channels);
    for (Index row = 0; row < channels; from += ++row)
        widen_row(isa, from, row + 1, weight.data() + row * channels);
    float *const to = weight.data(), *const turned = room.data();
    run_on(isa, [=](auto) KVPLANE_BODY { simd::mirror_lower(to, channels, channels); });
    // Rows, then columns: R C R^T.
    for (float* const rows : {to, turned}) {
        float* const columns = rows == to ? turned : to;
        for (Index row = 0; row < channels; ++row) {
            if (frame.rope) frame.rope->turn_row(rows + row * channels, channels, frame.turn);
            if (rotation) rotation->rotate(rows + row * channels);
        }
        run_on(isa, [=](auto) KVPLANE_BODY {
            simd::transpose_words(rows, channels, channels, channels, columns, channels);
        });
    }
    // The one is now the other's transpose. Rounded alike, they make a symmetric matrix.
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        const Index all = channels * channels;
        simd::Floats<lanes> a, b;
        Index i = 0;
        for (; i + lanes <= all; i += lanes) {
            simd::load(a, to + i);
            simd::load(b, turned + i);
            simd::store(to + i, 0.5f * (a + b));
        }
        for (; i < all; ++i) to[i] = 0.5f * (to[i] + turned[i]);
    });
}

}  // namespace kvplane::detail
