// kvplane/c/impl/kvplane.hpp: the C interface on the C++ one. The source of libkvplane, included by nothing else.
#pragma once

#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "kvplane/attention/merge.hpp"
#include "kvplane/c/kvplane.h"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/recipe_names.hpp"
#include "kvplane/version.hpp"
#if KVPLANE_WITH_JSON
#include "kvplane/io/cache_file.hpp"
#endif

struct kvplane_pool {
    kvplane::TilePool pool;
};
struct kvplane_executor {
    explicit kvplane_executor(kvplane::Index threads) : team(threads) {}
    kvplane::ThreadExecutor team;
};
struct kvplane_workspace {
    explicit kvplane_workspace(kvplane_executor* executor)
        : workspace(executor ? &executor->team : nullptr) {}
    kvplane::AttentionWorkspace workspace;
};
struct kvplane_cache {
    kvplane::KvCache cache;
};

namespace kvplane::c {

/// The last sentence of this thread, in memory that is there when all other has ended.
inline char* last_error() noexcept {
    static thread_local char sentence[1024] = "";
    return sentence;
}
inline kvplane_status failed(kvplane_status status, const char* sentence) noexcept {
    std::snprintf(last_error(), 1024, "%s", sentence);
    return status;
}
inline kvplane_status status_of(ErrorCode code) noexcept {
    return static_cast<kvplane_status>(static_cast<int>(code) + 1);
}
static_assert(static_cast<int>(ErrorCode::shape) + 1 == KVPLANE_SHAPE &&
              static_cast<int>(ErrorCode::out_of_memory) + 1 == KVPLANE_OUT_OF_MEMORY);

/// body() without exceptions.
template <class Body>
kvplane_status guarded(const Body& body) noexcept {
    try {
        body();
        return KVPLANE_OK;
    } catch (const Error& error) {
        return failed(status_of(error.code()), error.what());
    } catch (const std::bad_alloc&) {
        return failed(KVPLANE_OUT_OF_MEMORY, "kvplane: no memory");
    } catch (const std::exception& error) {
        return failed(KVPLANE_INTERNAL, error.what());
    } catch (...) {
        return failed(KVPLANE_INTERNAL, "kvplane: something unknown was thrown");
    }
}

template <class Pointer>
void require_pointer(const Pointer* pointer, const char* argument) {
    require(pointer != nullptr, ErrorCode::option, argument, " is NULL");
}

inline ScalarType scalar_type_of(int type, const char* argument) {
    require(type == KVPLANE_FP32 || type == KVPLANE_FP16 || type == KVPLANE_BF16, ErrorCode::option, argument,
            ": type ", type, ", expected KVPLANE_FP32, KVPLANE_FP16 or KVPLANE_BF16");
    return type == KVPLANE_FP32   ? ScalarType::float32
           : type == KVPLANE_FP16 ? ScalarType::float16
                                  : ScalarType::bfloat16;
}

inline detail::AnyRows rows_of(const kvplane_rows* given, const char* argument) {
    require_pointer(given, argument);
    const kvplane_rows& r = *given;
    require(r.heads >= 0 && r.tokens >= 0 && r.head_dim >= 0, ErrorCode::shape, argument, ": ", r.heads,
            " heads, ", r.tokens, " tokens, ", r.head_dim, " channels, expected none below 0");
    require(r.data || r.heads * r.tokens * r.head_dim == 0, ErrorCode::option, argument, ": data is NULL");
    const bool packed = r.head_stride == 0 && r.token_stride == 0 && r.channel_stride == 0;
    const HeadRows<float> view(static_cast<const float*>(r.data), r.heads, r.tokens, r.head_dim,
                               packed ? r.head_dim : r.head_stride,
                               packed ? r.heads * r.head_dim : r.token_stride, packed ? 1 : r.channel_stride);
    detail::AnyRows rows(view);
    rows.type = scalar_type_of(r.type, argument);
    return rows;
}

inline CacheConfiguration configuration_of(const kvplane_configuration* given) {
    require_pointer(given, "configuration");
    require_pointer(given->recipe, "configuration: recipe");
    CacheConfiguration c;
    c.kv_heads = given->kv_heads;
    c.query_heads = given->query_heads;
    c.key_head_dim = given->key_head_dim;
    c.value_head_dim = given->value_head_dim;
    c.recipe = recipes::parse(given->recipe);
    c.rotation_seed = given->rotation_seed;
    c.values_in_keys = given->values_in_keys != 0;
    if (given->rope_base != 0.0 || given->rope_frequencies) {
        RopeSettings rope;
        if (given->rope_frequencies) {
            require(given->rope_pairs >= 0, ErrorCode::shape, "configuration: ", given->rope_pairs,
                    " frequencies, expected 0 or more");
            rope.frequencies.assign(given->rope_frequencies, given->rope_frequencies + given->rope_pairs);
        }
        if (given->rope_base != 0.0) rope.base = given->rope_base;
        rope.dims = given->rope_dims;
        rope.layout = given->rope_halves ? RopeLayout::halves : RopeLayout::interleaved;
        c.rope = rope;
    }
    return c;
}

/// AttentionParameters and what they look at.
struct Parameters {
    Parameters(const kvplane_attention* given, Index query_heads, Index tokens) {
        if (!given) return;
        const auto per_head = [&](const float* numbers) {
            return numbers ? std::span<const float>(numbers, static_cast<std::size_t>(query_heads))
                           : std::span<const float>();
        };
        all.scale = given->scale;
        all.softcap = given->softcap;
        all.sliding_window = given->sliding_window;
        all.sinks = given->sinks;
        if (given->has_position) all.position = given->position;
        all.causal = !given->not_causal;
        all.sink_logits = per_head(given->sink_logits);
        all.alibi_slopes = per_head(given->alibi_slopes);
        if (given->bias) {
            require(given->bias_rows >= 0, ErrorCode::shape, "attention: bias of ", given->bias_rows,
                    " rows");
            bias = Eigen::Map<const Matrix>(given->bias, given->bias_rows, tokens);
            all.bias = &bias;
        }
        if (given->key_fraction != 0.0) all.key_fraction = given->key_fraction;
        if (given->read) all.read = recipes::read_policy(given->read);
    }
    Parameters(const Parameters&) = delete;
    Parameters& operator=(const Parameters&) = delete;

    AttentionParameters all;
    Matrix bias;
};

/// body(Eigen::Map of the output)
template <class Body>
void with_output(const kvplane_output* given, Index rows, Index cols, const Body& body) {
    require_pointer(given, "output");
    require(given->data || rows == 0, ErrorCode::option, "output: data is NULL");
    const Index stride = given->token_stride != 0 ? given->token_stride : cols;
    const auto map = [&]<class Scalar>(Scalar* data) {
        Eigen::Map<RowMajorMatrix<Scalar>, 0, Eigen::OuterStride<>> output(data, rows, cols,
                                                                           Eigen::OuterStride<>(stride));
        body(output);
    };
    switch (scalar_type_of(given->type, "output")) {
        case ScalarType::float16:
            return map(static_cast<Eigen::half*>(given->data));
        case ScalarType::bfloat16:
            return map(static_cast<Eigen::bfloat16*>(given->data));
        default:
            return map(static_cast<float*>(given->data));
    }
}

inline kvplane_status append(kvplane_cache* cache, const kvplane_rows* keys, const kvplane_rows* values,
                             const kvplane_rows* queries, bool provisional) noexcept {
    return guarded([&] {
        require_pointer(cache, "cache");
        const detail::AnyRows k = rows_of(keys, "keys");
        if (!values) return provisional ? cache->cache.append_provisional(k) : cache->cache.append(k);
        const detail::AnyRows v = rows_of(values, "values");
        if (!queries) return provisional ? cache->cache.append_provisional(k, v) : cache->cache.append(k, v);
        const detail::AnyRows q = rows_of(queries, "queries");
        provisional ? cache->cache.append_provisional(k, v, q) : cache->cache.append(k, v, q);
    });
}

}  // namespace kvplane::c

extern "C" {

const char* kvplane_last_error(void) {
    return kvplane::c::last_error();
}
const char* kvplane_version(void) {
#define KVPLANE_TEXT_OF(x) #x
#define KVPLANE_TEXT(x) KVPLANE_TEXT_OF(x)
    return KVPLANE_TEXT(KVPLANE_VERSION_MAJOR) "." KVPLANE_TEXT(KVPLANE_VERSION_MINOR) "." KVPLANE_TEXT(
        KVPLANE_VERSION_PATCH);
#undef KVPLANE_TEXT
#undef KVPLANE_TEXT_OF
}
const char* kvplane_help(void) {
    try {
        static const std::string text = kvplane::recipes::help();
        return text.c_str();
    } catch (...) {
        return "";
    }
}

kvplane_status kvplane_pool_create(kvplane_pool** pool) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(pool, "pool");
        *pool = new kvplane_pool;
    });
}
void kvplane_pool_destroy(kvplane_pool* pool) {
    delete pool;
}
void kvplane_pool_trim(kvplane_pool* pool) {
    pool->pool.trim();
}
int64_t kvplane_pool_bytes(const kvplane_pool* pool) {
    return pool->pool.bytes();
}

kvplane_status kvplane_executor_create(int64_t threads, kvplane_executor** executor) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(executor, "executor");
        *executor = new kvplane_executor(threads);
    });
}
void kvplane_executor_destroy(kvplane_executor* executor) {
    delete executor;
}
kvplane_status kvplane_workspace_create(kvplane_executor* executor, kvplane_workspace** workspace) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(workspace, "workspace");
        *workspace = new kvplane_workspace(executor);
    });
}
void kvplane_workspace_destroy(kvplane_workspace* workspace) {
    delete workspace;
}

kvplane_status kvplane_cache_create(const kvplane_configuration* configuration, kvplane_pool* pool,
                                    kvplane_cache** cache) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(pool, "pool");
        kvplane::c::require_pointer(cache, "cache");
        *cache = new kvplane_cache{kvplane::KvCache(kvplane::c::configuration_of(configuration), pool->pool)};
    });
}
void kvplane_cache_destroy(kvplane_cache* cache) {
    delete cache;
}
kvplane_status kvplane_cache_fork(const kvplane_cache* cache, kvplane_cache** fork) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(cache, "cache");
        kvplane::c::require_pointer(fork, "fork");
        *fork = new kvplane_cache{cache->cache.fork()};
    });
}
kvplane_status kvplane_predicted_bytes(const kvplane_configuration* configuration, int64_t tokens,
                                       int64_t* bytes) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(bytes, "bytes");
        *bytes = kvplane::KvCache::predicted_bytes(kvplane::c::configuration_of(configuration), tokens);
    });
}

int64_t kvplane_cache_tokens(const kvplane_cache* cache) {
    return cache->cache.tokens();
}
int64_t kvplane_cache_provisional_tokens(const kvplane_cache* cache) {
    return cache->cache.provisional_tokens();
}
int64_t kvplane_cache_first_kept(const kvplane_cache* cache) {
    return cache->cache.first_kept();
}
int64_t kvplane_cache_bytes(const kvplane_cache* cache) {
    return cache->cache.bytes();
}
double kvplane_cache_bits_per_element(const kvplane_cache* cache) {
    return cache->cache.bits_per_element();
}
kvplane_status kvplane_cache_error_bound(const kvplane_cache* cache, double* key, double* value) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(cache, "cache");
        kvplane::c::require_pointer(key, "key");
        kvplane::c::require_pointer(value, "value");
        const kvplane::CacheErrorBound bound = cache->cache.error_bound();
        *key = bound.key;
        *value = bound.value;
    });
}

int kvplane_cache_needs_queries(const kvplane_cache* cache) {
    return cache->cache.needs_queries();
}
kvplane_status kvplane_cache_append(kvplane_cache* cache, const kvplane_rows* keys,
                                    const kvplane_rows* values, const kvplane_rows* queries) {
    return kvplane::c::append(cache, keys, values, queries, false);
}
kvplane_status kvplane_cache_append_provisional(kvplane_cache* cache, const kvplane_rows* keys,
                                                const kvplane_rows* values, const kvplane_rows* queries) {
    return kvplane::c::append(cache, keys, values, queries, true);
}
kvplane_status kvplane_cache_accept(kvplane_cache* cache, int64_t count) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(cache, "cache");
        cache->cache.accept(count);
    });
}
kvplane_status kvplane_cache_truncate(kvplane_cache* cache, int64_t count) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(cache, "cache");
        cache->cache.truncate(count);
    });
}
kvplane_status kvplane_cache_drop_before(kvplane_cache* cache, int64_t token, int64_t sinks) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(cache, "cache");
        cache->cache.drop_before(token, sinks);
    });
}
kvplane_status kvplane_cache_remove(kvplane_cache* cache, int64_t first, int64_t last) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(cache, "cache");
        cache->cache.remove(first, last);
    });
}
kvplane_status kvplane_cache_narrow(kvplane_cache* cache, int64_t first, int64_t last, int key_bits,
                                    int value_bits) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(cache, "cache");
        cache->cache.narrow(first, last, key_bits, value_bits);
    });
}
kvplane_status kvplane_cache_narrowed_bytes(const kvplane_cache* cache, int64_t first, int64_t last,
                                            int key_bits, int value_bits, int64_t* bytes) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(cache, "cache");
        kvplane::c::require_pointer(bytes, "bytes");
        *bytes = cache->cache.narrowed_bytes(first, last, key_bits, value_bits);
    });
}
void kvplane_cache_clear(kvplane_cache* cache) {
    cache->cache.clear();
}

kvplane_status kvplane_cache_attend(const kvplane_cache* cache, const kvplane_rows* queries,
                                    const kvplane_output* output, const kvplane_attention* parameters,
                                    kvplane_workspace* workspace, float* log_sum_exp, float* token_weights) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(cache, "cache");
        kvplane::c::require_pointer(workspace, "workspace");
        const auto& c = cache->cache.configuration();
        const kvplane::detail::AnyRows rows = kvplane::c::rows_of(queries, "queries");
        const kvplane::c::Parameters given(parameters, c.query_heads, cache->cache.tokens());
        kvplane::Matrix sums, weights;
        kvplane::c::with_output(output, rows.tokens, c.query_heads * c.value_head_dim, [&](auto& to) {
            cache->cache.attend(rows, to, given.all, workspace->workspace,
                                {.log_sum_exp = log_sum_exp ? &sums : nullptr,
                                 .token_weights = token_weights ? &weights : nullptr});
        });
        if (log_sum_exp) std::copy_n(sums.data(), sums.size(), log_sum_exp);
        if (token_weights) std::copy_n(weights.data(), weights.size(), token_weights);
    });
}
kvplane_status kvplane_attend_batch(const kvplane_cache* const* caches, int64_t count, const int64_t* offsets,
                                    const kvplane_rows* queries, const kvplane_output* output,
                                    const kvplane_attention* parameters, kvplane_workspace* workspace) {
    return kvplane::c::guarded([&] {
        using kvplane::Index;
        if (count == 0) return;
        kvplane::require(count > 0, kvplane::ErrorCode::shape, "batch: ", count, " caches");
        kvplane::c::require_pointer(caches, "caches");
        kvplane::c::require_pointer(offsets, "offsets");
        kvplane::c::require_pointer(workspace, "workspace");
        std::vector<const kvplane::KvCache*> all;
        for (Index i = 0; i < count; ++i) {
            kvplane::c::require_pointer(caches[i], "a cache of the batch");
            all.push_back(&caches[i]->cache);
        }
        const std::vector<Index> ends(offsets, offsets + count + 1);
        const auto& c = all[0]->configuration();
        const kvplane::detail::AnyRows rows = kvplane::c::rows_of(queries, "queries");
        const kvplane::c::Parameters given(parameters, c.query_heads, 0);
        kvplane::c::with_output(output, rows.tokens, c.query_heads * c.value_head_dim, [&](auto& to) {
            kvplane::KvCache::attend_batch(all, ends, rows, to, given.all, workspace->workspace);
        });
    });
}
kvplane_status kvplane_merge_attention(float* output, float* log_sum_exp, const float* more,
                                       const float* more_log_sum_exp, int64_t tokens, int64_t heads,
                                       int64_t value_dim) {
    return kvplane::c::guarded([&] {
        using kvplane::Matrix;
        kvplane::require(tokens >= 0 && heads >= 0 && value_dim >= 0, kvplane::ErrorCode::shape,
                         "merge_attention: ", tokens, " tokens, ", heads, " heads, ", value_dim, " channels");
        if (tokens * heads == 0) return;
        for (const float* pointer : {static_cast<const float*>(output),
                                     static_cast<const float*>(log_sum_exp), more, more_log_sum_exp})
            kvplane::c::require_pointer(pointer, "merge_attention: an array");
        using Map = Eigen::Map<const Matrix>;
        Matrix to = Map(output, tokens, heads * value_dim), sums = Map(log_sum_exp, tokens, heads);
        kvplane::merge_attention(to, sums, Map(more, tokens, heads * value_dim),
                                 Map(more_log_sum_exp, tokens, heads));
        std::copy_n(to.data(), to.size(), output);
        std::copy_n(sums.data(), sums.size(), log_sum_exp);
    });
}

kvplane_status kvplane_cache_save(const kvplane_cache* cache, const char* path) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(cache, "cache");
        kvplane::c::require_pointer(path, "path");
#if KVPLANE_WITH_JSON
        kvplane::save_cache(cache->cache, path);
#else
        kvplane::fail(kvplane::ErrorCode::io, "save: this libkvplane was built without nlohmann/json");
#endif
    });
}
kvplane_status kvplane_cache_load(const char* path, const kvplane_configuration* configuration,
                                  kvplane_pool* pool, kvplane_cache** cache) {
    return kvplane::c::guarded([&] {
        kvplane::c::require_pointer(path, "path");
        kvplane::c::require_pointer(pool, "pool");
        kvplane::c::require_pointer(cache, "cache");
#if KVPLANE_WITH_JSON
        *cache = new kvplane_cache{
            kvplane::load_cache(path, kvplane::c::configuration_of(configuration), pool->pool)};
#else
        kvplane::fail(kvplane::ErrorCode::io, "load: this libkvplane was built without nlohmann/json");
#endif
    });
}

}  // extern "C"
