/* The C interface from C99: every function, good input and bad. */
#include <kvplane/c/kvplane.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define EXPECT(holds)                                                                          \
    do {                                                                                       \
        if (!(holds)) {                                                                        \
            printf("%s:%d: %s (%s)\n", __FILE__, __LINE__, #holds, kvplane_last_error());      \
            ++failures;                                                                        \
        }                                                                                      \
    } while (0)
#define EXPECT_REFUSED(status, sentence, call)                                                 \
    do {                                                                                       \
        EXPECT((call) == (status));                                                            \
        EXPECT(strcmp(kvplane_last_error(), (sentence)) == 0);                                 \
    } while (0)

enum { kv_heads = 2, query_heads = 4, dim = 32, tokens = 300 };
static float weights[kv_heads][tokens];

static float keys[tokens][kv_heads][dim], values[tokens][kv_heads][dim], queries[tokens][query_heads][dim];
static float output[tokens][query_heads][dim], again[tokens][query_heads][dim], sums[tokens][query_heads];

/* Numbers between -1 and 1. */
static float number(unsigned* state) {
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) / 8388608.0f - 1.0f;
}

static kvplane_rows rows_of(const void* data, int64_t heads, int64_t count) {
    kvplane_rows rows = {0};
    rows.data = data;
    rows.heads = heads;
    rows.tokens = count;
    rows.head_dim = dim;
    return rows;
}
static kvplane_output to(void* data) {
    kvplane_output out = {0};
    out.data = data;
    return out;
}

/* Attention of one query head over the first `count` tokens, in double. */
static void reference(int count, int head, const float* query, double* out, double* log_sum_exp) {
    double sum = 0.0;
    for (int c = 0; c < dim; ++c) out[c] = 0.0;
    for (int t = 0; t < count; ++t) {
        double score = 0.0;
        for (int c = 0; c < dim; ++c) score += (double)query[c] * keys[t][head / 2][c];
        const double weight = exp(score / sqrt((double)dim));
        sum += weight;
        for (int c = 0; c < dim; ++c) out[c] += weight * values[t][head / 2][c];
    }
    for (int c = 0; c < dim; ++c) out[c] /= sum;
    *log_sum_exp = log(sum);
}

int main(void) {
    unsigned state = 1;
    for (int t = 0; t < tokens; ++t)
        for (int h = 0; h < query_heads; ++h)
            for (int c = 0; c < dim; ++c) {
                queries[t][h][c] = number(&state);
                if (h >= kv_heads) continue;
                keys[t][h][c] = number(&state);
                values[t][h][c] = number(&state);
            }

    kvplane_pool* pool = NULL;
    kvplane_executor* executor = NULL;
    kvplane_workspace *workspace = NULL, *alone = NULL;
    EXPECT(kvplane_pool_create(&pool) == KVPLANE_OK);
    EXPECT(kvplane_executor_create(2, &executor) == KVPLANE_OK);
    EXPECT(kvplane_workspace_create(executor, &workspace) == KVPLANE_OK);
    EXPECT(kvplane_workspace_create(NULL, &alone) == KVPLANE_OK);
    EXPECT(strlen(kvplane_version()) >= 5);
    EXPECT(strstr(kvplane_help(), "key_favored") != NULL);
    EXPECT_REFUSED(KVPLANE_OPTION, "kvplane: ThreadExecutor: 0 threads, expected at least 1",
                   kvplane_executor_create(0, &executor));

    kvplane_configuration layer = {0};
    layer.kv_heads = kv_heads;
    layer.query_heads = query_heads;
    layer.key_head_dim = layer.value_head_dim = dim;
    layer.recipe = "fp16";
    kvplane_cache *cache = NULL, *fork = NULL, *loaded = NULL, *other = NULL;
    EXPECT(kvplane_cache_create(&layer, pool, &cache) == KVPLANE_OK);

    /* Appending in two pieces, once from a [head][token][channel] array. */
    static float by_head[kv_heads][100][dim];
    for (int t = 0; t < 100; ++t)
        for (int h = 0; h < kv_heads; ++h) memcpy(by_head[h][t], keys[t][h], sizeof by_head[h][t]);
    kvplane_rows k = rows_of(by_head, kv_heads, 100), v = rows_of(values, kv_heads, 100);
    k.head_stride = 100 * dim;
    k.token_stride = dim;
    k.channel_stride = 1;
    EXPECT(kvplane_cache_append(cache, &k, &v, NULL) == KVPLANE_OK);
    k = rows_of(keys[100], kv_heads, 200);
    v = rows_of(values[100], kv_heads, 200);
    EXPECT(kvplane_cache_append(cache, &k, &v, NULL) == KVPLANE_OK);
    EXPECT(kvplane_cache_tokens(cache) == tokens);
    EXPECT(kvplane_cache_needs_queries(cache) == 0);
    int64_t predicted = 0;
    EXPECT(kvplane_predicted_bytes(&layer, tokens, &predicted) == KVPLANE_OK);
    EXPECT(kvplane_cache_bytes(cache) == predicted && kvplane_pool_bytes(pool) == predicted);
    EXPECT(kvplane_cache_bits_per_element(cache) > 16.0);
    double key_bound = 0.0, value_bound = 0.0;
    EXPECT(kvplane_cache_error_bound(cache, &key_bound, &value_bound) == KVPLANE_OK);
    EXPECT(key_bound > 0.0 && key_bound < 1e-3);

    for (int64_t count = 1; count <= 12; count += 11) {
        const kvplane_rows q = rows_of(queries[tokens - count], query_heads, count);
        const kvplane_output out = to(output);
        EXPECT(kvplane_cache_attend(cache, &q, &out, NULL, workspace, &sums[0][0], &weights[0][0]) == KVPLANE_OK);
        double given = 0.0;
        for (int t = 0; t < tokens; ++t) given += weights[1][t];
        EXPECT(fabs(given - (double)(count * query_heads / kv_heads)) < 1e-2);
        for (int i = 0; i < count; ++i)
            for (int head = 0; head < query_heads; ++head) {
                double expected[dim], sum;
                reference(tokens - (int)count + i + 1, head, queries[tokens - count + i][head], expected, &sum);
                EXPECT(fabs(sums[i][head] - sum) < 1e-3);
                for (int c = 0; c < dim; ++c) EXPECT(fabs(output[i][head][c] - expected[c]) < 1e-3);
            }
    }

    /* A batch is each by itself. */
    EXPECT(kvplane_cache_fork(cache, &fork) == KVPLANE_OK);
    EXPECT(kvplane_pool_bytes(pool) == predicted);
    EXPECT(kvplane_cache_truncate(fork, 200) == KVPLANE_OK);
    const kvplane_cache* both[2];
    both[0] = cache;
    both[1] = fork;
    const int64_t offsets[3] = {0, 3, 5};
    kvplane_rows q = rows_of(queries, query_heads, 5);
    kvplane_output out = to(output);
    EXPECT(kvplane_attend_batch(both, 2, offsets, &q, &out, NULL, workspace) == KVPLANE_OK);
    q = rows_of(queries, query_heads, 3);
    out = to(again);
    EXPECT(kvplane_cache_attend(cache, &q, &out, NULL, alone, NULL, NULL) == KVPLANE_OK);
    q = rows_of(queries[3], query_heads, 2);
    out = to(again[3]);
    EXPECT(kvplane_cache_attend(fork, &q, &out, NULL, alone, NULL, NULL) == KVPLANE_OK);
    EXPECT(memcmp(output, again, 5 * sizeof output[0]) == 0);

    /* Parameters: a window with sinks, which dropping keeps; learned sinks; a position. */
    kvplane_attention window = {0};
    window.sliding_window = 50;
    window.sinks = 2;
    q = rows_of(queries, query_heads, 1);
    out = to(output);
    EXPECT(kvplane_cache_attend(cache, &q, &out, &window, workspace, NULL, NULL) == KVPLANE_OK);
    EXPECT(kvplane_cache_drop_before(fork, 100, 2) == KVPLANE_OK);
    EXPECT(kvplane_cache_first_kept(fork) == 100);
    window.sinks = 3;
    EXPECT_REFUSED(KVPLANE_OPTION,
                   "kvplane: attend: 3 sinks, but tokens 2 to 99 were dropped; expected drop_before() to keep as many",
                   kvplane_cache_attend(fork, &q, &out, &window, workspace, NULL, NULL));
    const float logits[query_heads] = {1e9f, 1e9f, 1e9f, 1e9f};
    kvplane_attention sinks = {0};
    sinks.sink_logits = logits;
    sinks.has_position = 1;
    sinks.position = 1000;
    EXPECT(kvplane_cache_attend(cache, &q, &out, &sinks, workspace, &sums[0][0], NULL) == KVPLANE_OK);
    EXPECT(output[0][0][0] == 0.0f && sums[0][0] == 1e9f);

    /* Provisional tokens. */
    const int64_t before = kvplane_cache_bytes(cache);
    k = rows_of(keys, kv_heads, 3);
    v = rows_of(values, kv_heads, 3);
    EXPECT(kvplane_cache_append_provisional(cache, &k, &v, NULL) == KVPLANE_OK);
    EXPECT(kvplane_cache_provisional_tokens(cache) == 3);
    EXPECT(kvplane_cache_accept(cache, 1) == KVPLANE_OK);
    EXPECT(kvplane_cache_truncate(cache, tokens) == KVPLANE_OK);
    EXPECT(kvplane_cache_bytes(cache) == before);
    EXPECT_REFUSED(KVPLANE_INDEX, "kvplane: accept: 1 of 0 provisional tokens", kvplane_cache_accept(cache, 1));

    /* Tokens are removed, tiles narrowed; values in keys. */
    {
        kvplane_configuration narrow = layer;
        kvplane_cache* wide = NULL;
        kvplane_cache* once = NULL;
        int64_t bytes = 0;
        const double still[dim / 2] = {0.0};
        narrow.recipe = "key_favored:8:8";
        narrow.rope_base = 0.0;
        narrow.rope_frequencies = still;
        narrow.rope_pairs = dim / 2;
        EXPECT(kvplane_cache_create(&narrow, pool, &wide) == KVPLANE_OK);
        k = rows_of(keys, kv_heads, tokens);
        v = rows_of(values, kv_heads, tokens);
        EXPECT(kvplane_cache_append(wide, &k, &v, NULL) == KVPLANE_OK);
        EXPECT(kvplane_cache_narrowed_bytes(wide, 0, tokens, 4, 4, &bytes) == KVPLANE_OK);
        EXPECT(bytes < kvplane_cache_bytes(wide));
        EXPECT(kvplane_cache_narrow(wide, 0, tokens, 4, 4) == KVPLANE_OK);
        EXPECT(kvplane_cache_bytes(wide) == bytes);
        EXPECT(kvplane_cache_narrow(wide, 0, tokens, 3, 4) == KVPLANE_OPTION);
        EXPECT(kvplane_cache_remove(wide, 50, 100) == KVPLANE_OK);
        EXPECT(kvplane_cache_tokens(wide) == tokens - 50);
        EXPECT(kvplane_cache_remove(wide, 0, 10) == KVPLANE_INDEX);
        EXPECT_REFUSED(KVPLANE_OPTION,
                       "kvplane: append: keys alone, but the configuration does not have values in keys; expected "
                       "append(keys, values)",
                       kvplane_cache_append(wide, &k, NULL, NULL));
        narrow.values_in_keys = 1;
        EXPECT(kvplane_cache_create(&narrow, pool, &once) == KVPLANE_OK);
        EXPECT(kvplane_cache_append(once, &k, NULL, NULL) == KVPLANE_OK);
        EXPECT(kvplane_cache_tokens(once) == tokens);
        kvplane_cache_destroy(wide);
        kvplane_cache_destroy(once);
        v = rows_of(values, kv_heads, 3);
    }

    /* Saving and loading. */
    char path[] = "/tmp/kvplane_c_test_XXXXXX.safetensors";
    snprintf(path, sizeof path, "/tmp/kvplane_c_test_%06u.safetensors", (unsigned)((uintptr_t)&state >> 4) % 1000000u);
    EXPECT(kvplane_cache_save(cache, path) == KVPLANE_OK);
    EXPECT(kvplane_cache_load(path, &layer, pool, &loaded) == KVPLANE_OK);
    EXPECT(kvplane_cache_tokens(loaded) == tokens);
    layer.rotation_seed = 7;
    EXPECT(kvplane_cache_load(path, &layer, pool, &other) == KVPLANE_MISMATCH);
    EXPECT(other == NULL);
    remove(path);
    EXPECT(kvplane_cache_load(path, &layer, pool, &other) == KVPLANE_IO);

    /* Parts of a context. */
    float a[2] = {1.0f, 2.0f}, a_sum[1] = {0.0f}, b[2] = {3.0f, 6.0f}, b_sum[1] = {0.0f};
    EXPECT(kvplane_merge_attention(a, a_sum, b, b_sum, 1, 1, 2) == KVPLANE_OK);
    EXPECT(a[0] == 2.0f && a[1] == 4.0f && fabs(a_sum[0] - log(2.0)) < 1e-6);

    /* Bad input is refused with a sentence, and changes nothing. */
    layer.recipe = "kivi:99";
    EXPECT(kvplane_cache_create(&layer, pool, &other) == KVPLANE_OPTION && other == NULL);
    EXPECT(strstr(kvplane_last_error(), "99") != NULL);
    layer.recipe = NULL;
    EXPECT_REFUSED(KVPLANE_OPTION, "kvplane: configuration: recipe is NULL",
                   kvplane_cache_create(&layer, pool, &other));
    EXPECT_REFUSED(KVPLANE_OPTION, "kvplane: keys is NULL", kvplane_cache_append(cache, NULL, &v, NULL));
    k = rows_of(NULL, kv_heads, 3);
    EXPECT_REFUSED(KVPLANE_OPTION, "kvplane: keys: data is NULL", kvplane_cache_append(cache, &k, &v, NULL));
    k = rows_of(keys, kv_heads, 2);
    EXPECT_REFUSED(KVPLANE_SHAPE, "kvplane: append: 2 keys and 3 values, expected as many of each",
                   kvplane_cache_append(cache, &k, &v, NULL));
    k = rows_of(keys, kv_heads, 3);
    k.type = 9;
    EXPECT_REFUSED(KVPLANE_OPTION, "kvplane: keys: type 9, expected KVPLANE_FP32, KVPLANE_FP16 or KVPLANE_BF16",
                   kvplane_cache_append(cache, &k, &v, NULL));
    keys[1][0][5] = NAN;
    k = rows_of(keys, kv_heads, 3);
    EXPECT(kvplane_cache_append(cache, &k, &v, NULL) == KVPLANE_NOT_FINITE);
    EXPECT(kvplane_cache_tokens(cache) == tokens);

    kvplane_cache_clear(cache);
    EXPECT(kvplane_cache_tokens(cache) == 0);
    kvplane_cache_destroy(cache);
    kvplane_cache_destroy(fork);
    kvplane_cache_destroy(loaded);
    kvplane_cache_destroy(NULL);
    EXPECT(kvplane_pool_bytes(pool) == 0);
    kvplane_pool_trim(pool);
    kvplane_workspace_destroy(workspace);
    kvplane_workspace_destroy(alone);
    kvplane_executor_destroy(executor);
    kvplane_pool_destroy(pool);
    printf("%d failures\n", failures);
    return failures != 0;
}
