/* kvplane/c/kvplane.h: kvplane for engines in C, Rust, Go, Swift, C# and all else that calls C.
 *
 * A shared library (libkvplane) with plain C99 functions. Every function that can fail returns a kvplane_status and
 * then has changed nothing; kvplane_last_error() says what was wrong, in a sentence. No exception crosses this line.
 * A structure whose bytes are all 0 holds the standard settings. Sizes are in elements, tokens, heads or bytes as their
 * names say; what functions mean is documented in the C++ headers named beside them.
 *
 * Handles are made by kvplane_..._create() and freed by kvplane_..._destroy(), which takes NULL as well. A pool must
 * outlive the caches in it, an executor the workspaces that use it. const functions on one cache may run at the same
 * time, each with a workspace of its own; others need the cache to themselves. */
#ifndef KVPLANE_C_KVPLANE_H
#define KVPLANE_C_KVPLANE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define KVPLANE_C_API __attribute__((visibility("default")))
#else
#define KVPLANE_C_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* error.hpp, in its order; KVPLANE_INTERNAL is a fault of kvplane's own. */
typedef enum kvplane_status {
    KVPLANE_OK = 0,
    KVPLANE_SHAPE = 1,
    KVPLANE_OPTION = 2,
    KVPLANE_INDEX = 3,
    KVPLANE_NOT_FINITE = 4,
    KVPLANE_BEYOND_FP16 = 5,
    KVPLANE_FORMAT = 6,
    KVPLANE_MISMATCH = 7,
    KVPLANE_IO = 8,
    KVPLANE_OUT_OF_MEMORY = 9,
    KVPLANE_INTERNAL = 10
} kvplane_status;

/* The sentence of the last call in this thread that failed; "" before. Valid until the next call that fails. */
KVPLANE_C_API const char* kvplane_last_error(void);
/* "MAJOR.MINOR.PATCH" */
KVPLANE_C_API const char* kvplane_version(void);
/* All recipes, their settings and the read policies, as text of several lines. */
KVPLANE_C_API const char* kvplane_help(void);

typedef struct kvplane_pool kvplane_pool;
typedef struct kvplane_executor kvplane_executor;
typedef struct kvplane_workspace kvplane_workspace;
typedef struct kvplane_cache kvplane_cache;

/* Memory that caches share: cache/pages.hpp. bytes: of the pages in use, each counted once. */
KVPLANE_C_API kvplane_status kvplane_pool_create(kvplane_pool** pool);
KVPLANE_C_API void kvplane_pool_destroy(kvplane_pool* pool);
KVPLANE_C_API void kvplane_pool_trim(kvplane_pool* pool);
KVPLANE_C_API int64_t kvplane_pool_bytes(const kvplane_pool* pool);

/* A team of threads: attention/executor.hpp. */
KVPLANE_C_API kvplane_status kvplane_executor_create(int64_t threads, kvplane_executor** executor);
KVPLANE_C_API void kvplane_executor_destroy(kvplane_executor* executor);

/* What attention works in: one for each thread that attends. executor: NULL for the calling thread alone. */
KVPLANE_C_API kvplane_status kvplane_workspace_create(kvplane_executor* executor, kvplane_workspace** workspace);
KVPLANE_C_API void kvplane_workspace_destroy(kvplane_workspace* workspace);

/* Numbers of heads, wherever they stand: element (head, token, channel) at
 * data + head * head_stride + token * token_stride + channel * channel_stride, in elements. All strides 0:
 * [token][head][channel] without gaps. */
typedef enum kvplane_type { KVPLANE_FP32 = 0, KVPLANE_FP16 = 1, KVPLANE_BF16 = 2 } kvplane_type;
typedef struct kvplane_rows {
    const void* data;
    int type; /* kvplane_type */
    int64_t heads, tokens, head_dim;
    int64_t head_stride, token_stride, channel_stride;
} kvplane_rows;

/* One layer's cache: cache/configuration.hpp. */
typedef struct kvplane_configuration {
    int64_t kv_heads, query_heads, key_head_dim, value_head_dim;
    const char* recipe; /* recipe_names.hpp: "standard", "key_favored:4:4", ... */
    uint64_t rotation_seed;
    /* The rotary embedding, for recipes with latents and kvplane_cache_remove. base 0: none, unless there are
     * frequencies. */
    double rope_base;
    int64_t rope_dims; /* channels that turn; 0: all of a head */
    int rope_halves;   /* 0: pairs are neighbours; otherwise channel i and i + dims / 2 */
    const double* rope_frequencies; /* [rope_pairs] radians per position, instead of a base; NULL: none */
    int64_t rope_pairs;
    int values_in_keys; /* values are the first channels of keys, and appended as values NULL (MLA) */
} kvplane_configuration;

KVPLANE_C_API kvplane_status kvplane_cache_create(const kvplane_configuration* configuration, kvplane_pool* pool,
                                                  kvplane_cache** cache);
KVPLANE_C_API void kvplane_cache_destroy(kvplane_cache* cache);
KVPLANE_C_API kvplane_status kvplane_cache_fork(const kvplane_cache* cache, kvplane_cache** fork);
KVPLANE_C_API kvplane_status kvplane_predicted_bytes(const kvplane_configuration* configuration, int64_t tokens,
                                                     int64_t* bytes);

KVPLANE_C_API int64_t kvplane_cache_tokens(const kvplane_cache* cache);
KVPLANE_C_API int64_t kvplane_cache_provisional_tokens(const kvplane_cache* cache);
KVPLANE_C_API int64_t kvplane_cache_first_kept(const kvplane_cache* cache);
KVPLANE_C_API int64_t kvplane_cache_bytes(const kvplane_cache* cache);
KVPLANE_C_API double kvplane_cache_bits_per_element(const kvplane_cache* cache);
/* Bounds of the error of any stored element. */
KVPLANE_C_API kvplane_status kvplane_cache_error_bound(const kvplane_cache* cache, double* key, double* value);

/* cache/kv_cache.hpp. queries: NULL, or those of the same tokens, where the cache learns from them
 * (kvplane_cache_needs_queries) or gives more bits to values that they look at (recipes with value_widths). */
KVPLANE_C_API int kvplane_cache_needs_queries(const kvplane_cache* cache);
KVPLANE_C_API kvplane_status kvplane_cache_append(kvplane_cache* cache, const kvplane_rows* keys,
                                                  const kvplane_rows* values, const kvplane_rows* queries);
KVPLANE_C_API kvplane_status kvplane_cache_append_provisional(kvplane_cache* cache, const kvplane_rows* keys,
                                                              const kvplane_rows* values,
                                                              const kvplane_rows* queries);
KVPLANE_C_API kvplane_status kvplane_cache_accept(kvplane_cache* cache, int64_t count);
KVPLANE_C_API kvplane_status kvplane_cache_truncate(kvplane_cache* cache, int64_t count);
KVPLANE_C_API kvplane_status kvplane_cache_drop_before(kvplane_cache* cache, int64_t token, int64_t sinks);
/* Takes the tokens [first, last) out; those behind them move back. */
KVPLANE_C_API kvplane_status kvplane_cache_remove(kvplane_cache* cache, int64_t first, int64_t last);
/* Leaves the tiles in [first, last) at most that many bits; narrowed_bytes says what that will come to. */
KVPLANE_C_API kvplane_status kvplane_cache_narrow(kvplane_cache* cache, int64_t first, int64_t last, int key_bits,
                                                  int value_bits);
KVPLANE_C_API kvplane_status kvplane_cache_narrowed_bytes(const kvplane_cache* cache, int64_t first, int64_t last,
                                                          int key_bits, int value_bits, int64_t* bytes);
KVPLANE_C_API void kvplane_cache_clear(kvplane_cache* cache);

/* attention/parameters.hpp */
typedef struct kvplane_attention {
    double scale;                /* 0: 1 / sqrt(head_dim) */
    double softcap;              /* 0: none */
    int64_t sliding_window;      /* 0: none */
    int64_t sinks;               /* tokens that stay visible in spite of the window */
    int has_position;            /* whether `position` counts; otherwise the queries are those of the last tokens */
    int64_t position;            /* of the first query token */
    int not_causal;              /* every query sees all tokens */
    const float* sink_logits;    /* [query_heads], or NULL */
    const float* alibi_slopes;   /* [query_heads], or NULL */
    const float* bias;           /* [bias_rows][tokens of the cache], or NULL */
    int64_t bias_rows;           /* query tokens, or query_heads * query tokens, head by head */
    double key_fraction;         /* 0: all keys */
    const char* read;            /* a read policy: "4", "fixed4", "tolerance=0.01", ...; NULL: all bits */
} kvplane_attention;

/* [query token][query_heads * value_head_dim], rows token_stride elements apart (0: without gaps). */
typedef struct kvplane_output {
    void* data;
    int type; /* kvplane_type */
    int64_t token_stride;
} kvplane_output;

/* parameters: NULL for the standard ones. log_sum_exp: [query token][query_heads], or NULL. token_weights:
 * [kv_heads][tokens of the cache] the softmax weights that each token got, summed, or NULL. */
KVPLANE_C_API kvplane_status kvplane_cache_attend(const kvplane_cache* cache, const kvplane_rows* queries,
                                                  const kvplane_output* output, const kvplane_attention* parameters,
                                                  kvplane_workspace* workspace, float* log_sum_exp,
                                                  float* token_weights);
/* Cache i takes the query tokens [offsets[i], offsets[i + 1]) of `queries`: KvCache::attend_batch. */
KVPLANE_C_API kvplane_status kvplane_attend_batch(const kvplane_cache* const* caches, int64_t count,
                                                  const int64_t* offsets, const kvplane_rows* queries,
                                                  const kvplane_output* output, const kvplane_attention* parameters,
                                                  kvplane_workspace* workspace);
/* Adds `more` to `output`, both [tokens][heads * value_dim] with [tokens][heads] sums: attention/merge.hpp. */
KVPLANE_C_API kvplane_status kvplane_merge_attention(float* output, float* log_sum_exp, const float* more,
                                                     const float* more_log_sum_exp, int64_t tokens, int64_t heads,
                                                     int64_t value_dim);

/* io/cache_file.hpp. The configuration must be the one that the cache was saved with. */
KVPLANE_C_API kvplane_status kvplane_cache_save(const kvplane_cache* cache, const char* path);
KVPLANE_C_API kvplane_status kvplane_cache_load(const char* path, const kvplane_configuration* configuration,
                                                kvplane_pool* pool, kvplane_cache** cache);

#ifdef __cplusplus
}
#endif

#endif
