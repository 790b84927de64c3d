// bench/cases.hpp: shapes, inputs and configurations that benchmarks of whole caches share.
#pragma once

#include <random>
#include <sstream>
#include <string>

#include "kvplane/cache/configuration.hpp"
#include "kvplane/recipe_names.hpp"

namespace kvplane_bench {

using namespace kvplane;

struct Shape {
    Index tokens, query_heads, kv_heads, head_dim;
};

inline Matrix random_rows(Index rows, Index cols, std::uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<float> normal;
    return Matrix::NullaryExpr(rows, cols, [&] { return normal(generator); });
}

inline CacheConfiguration configuration(const std::string& recipe, const Shape& shape) {
    CacheConfiguration c;
    c.kv_heads = shape.kv_heads;
    c.query_heads = shape.query_heads;
    c.key_head_dim = c.value_head_dim = shape.head_dim;
    c.recipe = recipes::parse(recipe);
    c.rope = RopeSettings{};
    if (!c.recipe.latents) return c;
    const Index channels = shape.kv_heads * shape.head_dim;
    Matrix keys = random_rows(2048, channels, 7);
    for (Index j = 0; j < channels; ++j)
        keys.col(j) *=
            std::exp(-3.0f * static_cast<float>(j % shape.head_dim) / static_cast<float>(shape.head_dim));
    LatentStatistics statistics(c.kv_heads, c.query_heads, c.key_head_dim);
    statistics.add_keys({keys, 0});
    statistics.add_queries(random_rows(256, c.query_heads * c.key_head_dim, 8));
    c.latent_keys = fit_latent_keys(statistics, c.rope, *c.recipe.latents);
    return c;
}

inline std::string name_of(const std::string& recipe, const Shape& shape) {
    std::ostringstream name;
    name << recipe << '/' << shape.tokens << '/' << shape.query_heads << '/' << shape.kv_heads << '/'
         << shape.head_dim;
    return name.str();
}

}  // namespace kvplane_bench
