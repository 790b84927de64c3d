// tests/cache/latent_sequence.hpp: keys and queries for caches with latents, and their statistics.
#pragma once

#include <cmath>
#include <random>

#include "cache/cache_support.hpp"
#include "kvplane/latent/statistics.hpp"

namespace kvplane_test {

/// Keys whose directions decay, before RoPE, with a mean; and queries that look along some more than others.
struct Sequence {
    Sequence(const CacheConfiguration& c, Index tokens, std::uint64_t seed) {
        std::mt19937_64 random(seed), basis_random(5);
        const Index channels = c.kv_heads * c.key_head_dim;
        const Matrix mix = normal_matrix(basis_random, channels, channels),
                     mean = normal_matrix(basis_random, 1, channels);
        Matrix latents = normal_matrix(random, tokens, channels);
        for (Index j = 0; j < channels; ++j)
            latents.col(j) *= std::exp(-4.0f * static_cast<float>(j) / static_cast<float>(channels));
        keys_before = 0.3f * latents * mix;
        keys_before.rowwise() += mean.row(0);
        queries_before = normal_matrix(random, tokens, c.query_heads * c.key_head_dim);
        for (Index h = 0; h < queries_before.cols(); h += 3) queries_before.col(h) *= 3.0f;
        values = normal_matrix(random, tokens, c.kv_heads * c.value_head_dim);
        keys = keys_before, queries = queries_before;
        const RotaryEmbedding rope(c.key_head_dim, *c.rope);
        rope.rotate(keys, 0);
        rope.rotate(queries, 0);
    }

    Matrix keys_before, queries_before, keys, values, queries;
};

inline LatentStatistics statistics(const CacheConfiguration& c, const Sequence& s) {
    LatentStatistics all(c.kv_heads, c.query_heads, c.key_head_dim);
    all.add_keys({s.keys_before, 0});
    all.add_queries(s.queries_before);
    return all;
}

}  // namespace kvplane_test
