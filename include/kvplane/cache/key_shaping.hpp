// kvplane/cache/key_shaping.hpp: what queries look along, by which keys are shaped (quantize/shaped.hpp).
//
// A tile's keys are met by queries that come after it. What is known of them are moments of queries before
// RoPE: given, or those of the sequence's first tokens. A later query at the distance d from the start of the
// tile meets keys as if it were turned by d. So the moment M becomes the average of R(d) M R(d)^T over all
// distances that there can be, which has a closed form (latent/turn_average.hpp). Queries as they come, after
// RoPE, speak of the distances of the past alone; with them normalised keys get worse than plain rounding.
//
// Averages are kept in fp16, the lower triangle of each head, because a cache keeps them for good: shaping
// needs no more, for it adds a tenth of the mean to the diagonal.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "kvplane/cache/configuration.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/latent/statistics.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/transform/hadamard.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane::detail {

/// A cache learns from the queries of this many tokens after its sinks; what is then known is kept.
inline constexpr Index shaping_tokens = 512;

class KeyShaping {
  public:
    /// From moments of queries before RoPE, one set a key head. Throws std::bad_alloc.
    KeyShaping(const CacheConfiguration& configuration, const std::vector<SecondMoments>& queries);
    /// From what triangles() gave.
    KeyShaping(Index heads, Index channels, std::vector<Eigen::half> triangles)
        : heads_(heads), channels_(channels), triangles_(std::move(triangles)) {}

    /// [head][row][column up to row], the largest element of a head 1, or all 0.
    const std::vector<Eigen::half>& triangles() const noexcept { return triangles_; }
    Index bytes() const noexcept { return 2 * static_cast<Index>(triangles_.size()); }
    /// Numbers of one head.
    static constexpr Index triangle_size(Index channels) noexcept { return channels * (channels + 1) / 2; }

    /// How the keys of a tile stand.
    struct Frame {
        const RotaryEmbedding* rope;  ///< nullptr: none
        RotaryEmbedding::Turn turn;   ///< to the position at which the tile begins
    };
    static Frame frame(const std::optional<RotaryEmbedding>& rope, Index position) {
        if (!rope) return {};
        return {&*rope, rope->turn_of(position)};
    }
    /// E[u u^T] of a head's queries [channel][channel], on some scale, as they meet the keys of a tile. rotation: of
    /// these keys; nullptr: none. `room` is taken for what lies between.
    void weigh(const Frame& frame, const Hadamard* rotation, Index head, Matrix& weight, Matrix& room) const;

  private:
    Index heads_, channels_;
    std::vector<Eigen::half> triangles_;
};

/// Bytes that a cache keeps to shape keys after so many tokens behind its sinks: moments, then averages.
inline Index learned_bytes(const CacheConfiguration& c, Index tokens) noexcept {
    if (tokens == 0) return 0;
    return c.kv_heads * (tokens < shaping_tokens ? 8 * (1 + c.key_head_dim + c.key_head_dim * c.key_head_dim)
                                                 : 2 * KeyShaping::triangle_size(c.key_head_dim));
}

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/cache/impl/key_shaping.hpp"
#endif
