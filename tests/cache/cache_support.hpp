// tests/cache/cache_support.hpp: configurations and a naive cache that the real one is compared with.
#pragma once

#include <gtest/gtest.h>

#include <cctype>
#include <limits>
#include <memory_resource>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kvplane/attention/reference.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/recipe_names.hpp"

namespace kvplane_test {

using namespace kvplane;

inline CacheConfiguration configuration(const std::string& recipe, Index kv_heads = 2, Index query_heads = 4,
                                        Index key_dim = 32, Index value_dim = 48) {
    CacheConfiguration made;
    made.kv_heads = kv_heads;
    made.query_heads = query_heads;
    made.key_head_dim = key_dim;
    made.value_head_dim = value_dim;
    made.recipe = recipes::parse(recipe);
    made.rope = RopeSettings{};
    return made;
}

/// Queries that follow from the keys, so that they do not depend on how tokens come.
inline Matrix queries_of(const CacheConfiguration& c, const Matrix& keys) {
    Matrix queries(keys.rows(), c.query_heads * c.key_head_dim);
    // Of no tokens there are no columns to take.
    for (Index head = 0; head < c.query_heads && keys.rows() > 0; ++head)
        queries.middleCols(head * c.key_head_dim, c.key_head_dim) =
            keys.middleCols(head / c.group() * c.key_head_dim, c.key_head_dim).rowwise().reverse() *
            (1.0f + 0.1f * static_cast<float>(head));
    return queries;
}

/// Whether the cache looks at queries.
inline bool looks_at_queries(const KvCache& cache) {
    return cache.needs_queries() || cache.configuration().widths_by_token();
}

/// Appends as the recipe wants it: with queries where the cache learns from them.
template <class K, class V>
void append(KvCache& cache, const K& keys, const V& values) {
    if (!looks_at_queries(cache)) return cache.append(keys, values);
    cache.append(keys, values, queries_of(cache.configuration(), to_matrix<float>(keys)));
}
template <class K, class V>
void append_provisional(KvCache& cache, const K& keys, const V& values) {
    if (!looks_at_queries(cache)) return cache.append_provisional(keys, values);
    cache.append_provisional(keys, values, queries_of(cache.configuration(), to_matrix<float>(keys)));
}

/// Every way of storing that the cache has: the named recipes and what changes the path through the code.
inline const std::vector<std::string>& recipe_names() {
    static const std::vector<std::string> names{
        "fp16",
        "block32:4",
        "block32:8:rotated",
        "kivi:2",
        "kivi:4:32",
        "key_favored:4:2",
        "key_favored:8:1+sinks=0+recent=0",
        "key_favored:3:5+rotate_keys=1+recent=100+key_group=64",
        "key_favored:7:6+recent_bits=8+recent_key_bits=16+sinks=17+value_group=16",
        "key_favored:4:4+key_clip=1+value_clip=1",
        "key_favored:3:4+rotate_keys=1+shaped_keys=1",
        "key_favored:4:2+value_widths=32x4/32x2/64x1",
        "latent:3:2+fit_tokens=130+value_widths=16x4/112x2+recent_bits=8",
        "standard",
        "compact",
        "smallest",
        "svdq:2+fit_tokens=140",
        "svdq:8-4-2-0:3+rotate_keys=1+recent_bits=8+fit_tokens=128",
        "latent:3:3+fit_tokens=130+context=100000",
        "latent:2:4+frame=after_rope+heads_together=1+fit_tokens=200",
        "weighted:3:16+fit_tokens=150+recent=0"};
    return names;
}

/// Keys with grids by token beyond recipe_names(), whose stored bytes are pinned: read on packed bits, and not,
/// because runs of channels begin within units.
inline const std::vector<std::string>& token_grid_names() {
    static const std::vector<std::string> names{"block32:8", "block32:5+key_scheme=min_max+key_group=64",
                                                "block32:3:rotated+key_scheme=cell+key_group=96",
                                                "block32:7+key_scheme=min_max", "block32:4+key_group=24"};
    return names;
}
/// The names of both lists.
inline std::vector<std::string> with(std::vector<std::string> names, const std::vector<std::string>& more) {
    names.insert(names.end(), more.begin(), more.end());
    return names;
}

/// A recipe as part of a test's name.
inline std::string test_name(const testing::TestParamInfo<std::string>& info) {
    std::string name;
    for (const char c : info.param) name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
    return name;
}

/// Memory that ends after so many allocations.
class FailingMemory : public std::pmr::memory_resource {
  public:
    Index left = std::numeric_limits<Index>::max();

  private:
    void* do_allocate(std::size_t bytes, std::size_t alignment) override {
        if (left-- <= 0) throw std::bad_alloc();
        return std::pmr::new_delete_resource()->allocate(bytes, alignment);
    }
    void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
        std::pmr::new_delete_resource()->deallocate(memory, bytes, alignment);
    }
    bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

inline Matrix normal_matrix(std::mt19937_64& random, Index rows, Index cols, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    Matrix matrix(rows, cols);
    for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = normal(random);
    return matrix;
}

inline Matrix attend(const KvCache& cache, const Matrix& queries,
                     const AttentionParameters& parameters = {}) {
    const auto& c = cache.configuration();
    Matrix output(queries.rows(), c.query_heads * c.value_head_dim);
    cache.attend(queries, output, parameters);
    return output;
}

/// All tokens in fp32, and which of them are still kept.
struct NaiveCache {
    Matrix keys, values;
    Index dropped = 0;

    Index tokens() const { return keys.rows(); }
    void append(const Matrix& more_keys, const Matrix& more_values) {
        const Index before = keys.rows();
        keys.conservativeResize(before + more_keys.rows(), more_keys.cols());
        values.conservativeResize(before + more_values.rows(), more_values.cols());
        keys.bottomRows(more_keys.rows()) = more_keys;
        values.bottomRows(more_values.rows()) = more_values;
    }
    void truncate(Index count) {
        keys.conservativeResize(count, keys.cols());
        values.conservativeResize(count, values.cols());
        if (count == 0) dropped = 0;
    }
    /// -infinity where a token was dropped: what attention_parameters.bias makes of it.
    Matrix mask(Index query_tokens, Index sinks) const {
        Matrix mask = Matrix::Zero(query_tokens, tokens());
        for (Index t = sinks; t < dropped; ++t)
            mask.col(t).setConstant(-std::numeric_limits<float>::infinity());
        return mask;
    }
};

/// Everything the cache stores is within the bound that it states, and not suspiciously far below it.
inline void expect_within_bounds(const KvCache& cache, const NaiveCache& naive) {
    const auto& c = cache.configuration();
    const CacheErrorBound bound = cache.error_bound();
    const Index from = naive.dropped > cache.state().kept_sinks ? naive.dropped : 0,
                count = naive.tokens() - from;
    if (count <= 0) return;
    const auto expect = [&](const Matrix& stored, const Matrix& exact, Index dim, double element,
                            bool rotated) {
        const Matrix difference = stored - exact.bottomRows(count);
        for (Index head = 0; head < c.kv_heads; ++head) {
            const Matrix off = difference.middleCols(head * dim, dim);
            // Rotation and back is fp32 arithmetic on sums of squares: 1e-5 relative covers it.
            const double rounding = 1e-5 * exact.cwiseAbs().maxCoeff();
            if (!rotated) {
                ASSERT_LE(off.cwiseAbs().maxCoeff(), element + rounding);
            }
            ASSERT_LE(off.rowwise().norm().maxCoeff(),
                      std::sqrt(static_cast<double>(dim)) * element + rounding);
        }
    };
    expect(cache.stored_keys(from, count), naive.keys, c.key_head_dim, bound.key,
           c.recipe.keys.rotate || c.recipe.rotates_by_tile || c.recipe.latents);
    expect(cache.stored_values(from, count), naive.values, c.value_head_dim, bound.value,
           c.recipe.values.rotate);
}

/// Theorem T13: how far the output of one query and head may be off, from the bounds that the cache states.
/// score_bound bounds the error of every scaled score, value_bound that of every row of values in norm.
inline double output_bound(const MatrixD& values, double score_bound, double value_bound) {
    const Eigen::RowVectorXd center = 0.5 * (values.colwise().maxCoeff() + values.colwise().minCoeff());
    const double radius = (values.rowwise() - center).rowwise().norm().maxCoeff();
    return 2.0 * std::tanh(0.5 * score_bound) * radius + value_bound;
}

}  // namespace kvplane_test
