// The cache against a naive fp32 one: thousands of random operations, and each property by itself.
#include "kvplane/cache/kv_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory_resource>
#include <thread>

#include "cache_support.hpp"
#include "flushed_subnormals.hpp"
#include "kvplane/io/cache_file.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

class CacheOfRecipe : public testing::TestWithParam<std::string> {
  protected:
    CacheConfiguration configuration() const { return kvplane_test::configuration(GetParam()); }
    Matrix keys(Index tokens) {
        return normal_matrix(random_, tokens, configuration().kv_heads * configuration().key_head_dim, 2.0f);
    }
    Matrix values(Index tokens) {
        return normal_matrix(random_, tokens, configuration().kv_heads * configuration().value_head_dim);
    }
    Matrix queries(Index tokens) {
        return normal_matrix(random_, tokens, configuration().query_heads * configuration().key_head_dim);
    }

    std::mt19937_64 random_{seed()};
    TilePool pool_;
};

/// The output against double-precision attention over what is stored (tight), and over what was put in (T13).
void expect_attention(const KvCache& cache, const NaiveCache& naive, const Matrix& queries,
                      AttentionParameters parameters) {
    const auto& c = cache.configuration();
    const Matrix mask = naive.mask(queries.rows(), c.recipe.sink_tokens);
    parameters.bias = nullptr;
    const Matrix output = attend(cache, queries, parameters);
    parameters.bias = &mask;
    const MatrixD exact =
        reference_attention(naive.keys, naive.values, queries, c.query_heads, c.kv_heads, parameters);
    const CacheErrorBound bound = cache.error_bound();
    for (Index head = 0; head < c.query_heads; ++head) {
        const double norm = queries.middleCols(head * c.key_head_dim, c.key_head_dim)
                                .cast<double>()
                                .rowwise()
                                .norm()
                                .maxCoeff();
        // The fused path rounds q step and w step to 8 bits (T14): less than 1% of what they multiply.
        const double fused = 0.02 * norm * naive.keys.cwiseAbs().maxCoeff();
        // |q.dk| <= |q| |dk|, |dk| <= sqrt(d) times the element's bound: sqrt(d) cancels the scale.
        const double off =
            fused +
            output_bound(
                naive.values.cast<double>().middleCols(head / c.group() * c.value_head_dim, c.value_head_dim),
                norm * bound.key, std::sqrt(static_cast<double>(c.value_head_dim)) * bound.value);
        const auto columns = [&](const auto& m) {
            return m.middleCols(head * c.value_head_dim, c.value_head_dim).template cast<double>().eval();
        };
        ASSERT_LE((columns(output) - columns(exact)).rowwise().norm().maxCoeff(), off + 1e-4);
    }
}

/// KVPLANE_TEST_ROUNDS=N runs N sequences of each recipe instead: 12 or so a second.
TEST_P(CacheOfRecipe, RandomOperationsAgainstANaiveCache) {
    for (int sequence = 0, sequences = rounds(sanitized ? 6 : 30); sequence < sequences; ++sequence) {
        KvCache cache(configuration(), pool_);
        NaiveCache naive{Matrix(0, keys(0).cols()), Matrix(0, values(0).cols())};
        const auto up_to = [&](Index most) { return std::uniform_int_distribution<Index>(0, most)(random_); };
        for (int step = 0; step < 40; ++step) {
            switch (up_to(9)) {
                case 0:
                case 1:
                case 2:
                case 3: {
                    const Index count = up_to(3) == 0 ? up_to(300) : up_to(40);
                    const Matrix k = keys(count), v = values(count);
                    up_to(2) == 0 ? append_provisional(cache, k, v) : append(cache, k, v);
                    naive.append(k, v);
                    if (up_to(2) == 0) cache.accept(up_to(cache.provisional_tokens()));
                    break;
                }
                case 4: {
                    const Index least =
                        naive.dropped > configuration().recipe.sink_tokens ? naive.dropped : 0;
                    const Index count = least + up_to(naive.tokens() - least);
                    if (up_to(1) == 0 && naive.tokens() - count > 20) break;  // mostly small steps back
                    cache.truncate(count);
                    naive.truncate(count);
                    break;
                }
                case 5:
                    if (up_to(2) == 0 && naive.tokens() > 0) {
                        const Index token = up_to(naive.tokens() - 1);
                        cache.drop_before(token);
                        naive.dropped = std::max(naive.dropped, token);
                    }
                    break;
                case 6: {
                    // The fork goes its own way; the cache must not notice.
                    cache.accept();
                    KvCache fork = cache.fork();
                    const std::vector<std::byte> before = to_bytes(cache);
                    append(fork, keys(70), values(70));
                    if (naive.dropped == 0) fork.truncate(fork.tokens() / 2);
                    append(fork, keys(3), values(3));
                    ASSERT_EQ(to_bytes(cache), before);
                    break;
                }
                case 7:
                    cache.accept();
                    cache = load_cache(to_bytes(cache), configuration(), pool_);
                    break;
                default: {
                    const Index query_tokens = std::min<Index>(1 + up_to(5), naive.tokens());
                    if (query_tokens == 0) break;
                    AttentionParameters parameters;
                    // No window that reaches what was dropped: that is refused.
                    const Index reach = naive.dropped > configuration().recipe.sink_tokens
                                            ? naive.tokens() - query_tokens + 1 - naive.dropped
                                            : 101;
                    if (up_to(1))
                        parameters.sliding_window =
                            std::clamp<Index>(1 + up_to(100), 0, std::max<Index>(0, reach));
                    if (up_to(1)) parameters.softcap = 5.0;
                    expect_attention(cache, naive, queries(query_tokens), parameters);
                }
            }
            ASSERT_EQ(cache.tokens(), naive.tokens());
            if (step % 8 == 7) expect_within_bounds(cache, naive);
            if (HasFatalFailure()) FAIL() << "sequence " << sequence << ", step " << step;
        }
    }
}

/// The last query tokens, on every instruction set: what rounding factors to 8 bits may do, and no
/// more.
void expect_fused(const KvCache& cache, const Matrix& queries, const MatrixD& exact,
                  AttentionParameters parameters, int variant) {
    const auto& c = cache.configuration();
    const Index tokens = std::min<Index>(queries.rows(), variant % 2 == 1 ? 1 + variant : 9),
                before = queries.rows() - tokens;
    Matrix bias;
    if (parameters.bias) {
        bias.resize(c.query_heads * tokens, parameters.bias->cols());
        for (Index head = 0; head < c.query_heads; ++head)
            bias.middleRows(head * tokens, tokens) =
                parameters.bias->middleRows(head * queries.rows() + before, tokens);
        parameters.bias = &bias;
    }
    for_each_isa([&](Isa) {
        const MatrixD off =
            attend(cache, queries.bottomRows(tokens), parameters).cast<double>() - exact.bottomRows(tokens);
        const double rms = off.norm() / std::sqrt(static_cast<double>(off.size()));
        const bool fine = c.recipe.keys.bits > 4 && c.recipe.values.bits > 4 && !c.recipe.latents;
        EXPECT_LT(rms, fine ? 0.004 : 0.06) << cache.tokens() << " tokens, variant " << variant;
    });
}

TEST_P(CacheOfRecipe, AttentionEqualsTheReferenceOverWhatIsStored) {
    KvCache cache(configuration(), pool_);
    const auto& c = cache.configuration();
    for (const Index more : {1, 2, 30, 100, 300}) {
        append(cache, keys(more), values(more));
        const Matrix slopes_of = Matrix::Constant(1, c.query_heads, 0.01f);
        const Matrix bias =
            normal_matrix(random_, c.query_heads * std::min<Index>(cache.tokens(), 9), cache.tokens());
        for (int variant = 0; variant < 5; ++variant) {
            AttentionParameters parameters;
            if (variant == 1) parameters.softcap = 3.0;
            if (variant == 2) parameters.sliding_window = 20, parameters.sinks = 2;
            if (variant == 3)
                parameters.alibi_slopes = {slopes_of.data(), static_cast<std::size_t>(c.query_heads)};
            if (variant == 4) parameters.bias = &bias, parameters.scale = 0.3;
            parameters.decode_tiles = true;  // nothing but fp32 rounding
            const Matrix q = queries(std::min<Index>(cache.tokens(), 9));
            const MatrixD exact = reference_attention(cache.stored_keys(0, cache.tokens()),
                                                      cache.stored_values(0, cache.tokens()), q,
                                                      c.query_heads, c.kv_heads, parameters);
            EXPECT_LT((attend(cache, q, parameters).cast<double>() - exact).cwiseAbs().maxCoeff(), 2e-5)
                << cache.tokens() << " tokens, variant " << variant;
            parameters.decode_tiles = false;
            expect_fused(cache, q, exact, parameters, variant);
        }
    }
}

TEST_P(CacheOfRecipe, BytesDoNotDependOnHowTokensCame) {
    const Matrix k = keys(700), v = values(700);
    KvCache at_once(configuration(), pool_), one_by_one(configuration(), pool_),
        chunks(configuration(), pool_);
    append(at_once, k, v);
    for (Index t = 0; t < 700; ++t) append(one_by_one, k.row(t), v.row(t));
    for (Index t = 0, size; t < 700; t += size) {
        size = std::min<Index>(1 + t % 61, 700 - t);
        append(chunks, k.middleRows(t, size), v.middleRows(t, size));
    }
    EXPECT_EQ(to_bytes(at_once), to_bytes(one_by_one));
    EXPECT_EQ(to_bytes(at_once), to_bytes(chunks));
}

TEST_P(CacheOfRecipe, InputTypesAndLayoutsAreTheSameToIt) {
    const auto& c = configuration();
    const RowMajorMatrix<Eigen::half> k = keys(200).cast<Eigen::half>(), v = values(200).cast<Eigen::half>();
    KvCache halves(c, pool_), floats(c, pool_), tensors(c, pool_), expressions(c, pool_);
    append(halves, k, v);
    append(floats, k.cast<float>().eval(), v.cast<float>().eval());
    Eigen::Tensor<float, 3> k_tensor(c.kv_heads, 200, c.key_head_dim),
        v_tensor(c.kv_heads, 200, c.value_head_dim);
    for (Index h = 0; h < c.kv_heads; ++h)
        for (Index t = 0; t < 200; ++t) {
            for (Index i = 0; i < c.key_head_dim; ++i)
                k_tensor(h, t, i) = static_cast<float>(k(t, h * c.key_head_dim + i));
            for (Index i = 0; i < c.value_head_dim; ++i)
                v_tensor(h, t, i) = static_cast<float>(v(t, h * c.value_head_dim + i));
        }
    append(tensors, k_tensor, v_tensor);
    const Eigen::MatrixXf columns = k.cast<float>();
    append(expressions, (2.0f * columns - columns).eval(), v.cast<float>().eval());
    EXPECT_EQ(to_bytes(halves), to_bytes(floats));
    EXPECT_EQ(to_bytes(halves), to_bytes(tensors));
    EXPECT_EQ(to_bytes(halves), to_bytes(expressions));
}

/// As many heads as tokens as channels: only strides tell which is which.
TEST(InputLayouts, AreWhatTheirStridesSay) {
    constexpr Index n = 8;
    TilePool pool;
    std::mt19937_64 random(seed());
    const Matrix keys = normal_matrix(random, n, n * n), values = normal_matrix(random, n, n * n);
    const auto bytes_of = [&](const auto& k, const auto& v) {
        KvCache cache(configuration("standard", n, n, n, n), pool);
        cache.append(k, v);
        return to_bytes(cache);
    };
    const std::vector<std::byte> expected = bytes_of(keys, values);

    Eigen::Tensor<float, 3, Eigen::RowMajor> k_rows(n, n, n), v_rows(n, n, n);
    Eigen::Tensor<float, 3, Eigen::ColMajor> k_columns(n, n, n), v_columns(n, n, n);
    for (Index h = 0; h < n; ++h)
        for (Index t = 0; t < n; ++t)
            for (Index c = 0; c < n; ++c) {
                k_rows(h, t, c) = k_columns(h, t, c) = keys(t, h * n + c);
                v_rows(h, t, c) = v_columns(h, t, c) = values(t, h * n + c);
            }
    EXPECT_EQ(bytes_of(k_rows, v_rows), expected);
    EXPECT_EQ(bytes_of(k_columns, v_columns), expected);
    EXPECT_EQ(bytes_of(k_rows, v_columns), expected);

    // From the last token to the first, and [head][token][channel].
    const Matrix k_back = keys.colwise().reverse(), v_back = values.colwise().reverse();
    const Index last = (n - 1) * n * n;
    EXPECT_EQ(bytes_of(HeadRows<float>(k_back.data() + last, n, n, n, n, -n * n, 1),
                       HeadRows<float>(v_back.data() + last, n, n, n, n, -n * n, 1)),
              expected);
    EXPECT_EQ(bytes_of(HeadRows<float>(k_rows.data(), n, n, n, n * n, n, 1), values), expected);

    // A block of a larger map, and one row for all tokens.
    Matrix larger = Matrix::Constant(n + 3, n * n + 5, 9.0f);
    larger.block(2, 4, n, n * n) = keys;
    const Eigen::Map<const Matrix> map(larger.data(), larger.rows(), larger.cols());
    EXPECT_EQ(bytes_of(map.block(2, 4, n, n * n), values), expected);
    using Strided = Eigen::Map<const Matrix, 0, Eigen::OuterStride<>>;
    EXPECT_EQ(bytes_of(Strided(keys.data(), n, n * n, Eigen::OuterStride<>(0)), values),
              bytes_of(Matrix(keys.row(0).replicate(n, 1)), values));
}

TEST_P(CacheOfRecipe, PredictedBytesAreTheBytes) {
    if (configuration().fits_basis()) GTEST_SKIP() << "refused: latent_cache_test.cpp";
    KvCache cache(configuration(), pool_);
    for (Index tokens = 0; tokens < 500; tokens += 7) {
        EXPECT_EQ(cache.bytes(), KvCache::predicted_bytes(configuration(), tokens)) << tokens;
        append(cache, keys(7), values(7));
    }
}

TEST_P(CacheOfRecipe, SaysHowManyTokensComeBeforeATile) {
    KvCache cache(configuration(), pool_);
    if (configuration().recipe.every_token) {
        EXPECT_EQ(cache.tokens_before_tile(), std::numeric_limits<Index>::max());
        return;
    }
    for (const Index cut : {0, 0, 50, 0}) {
        if (cut > 0) {
            cache.truncate(cache.state().tiles.back().first + cut);
            append(cache, keys(1), values(1));  // opens the tile that was cut
        }
        const bool fitted = cache.state().layout != nullptr;
        append(cache, keys(cache.tokens_before_tile()), values(cache.tokens_before_tile()));
        EXPECT_EQ(cache.tokens_before_tile(), 0);
        EXPECT_EQ(cache.state().layout != nullptr, fitted);
        const Index packed = cache.packed_tokens();
        append(cache, keys(1), values(1));
        EXPECT_GT(cache.packed_tokens(), packed);
        if (fitted) {
            EXPECT_EQ(cache.tokens_before_tile(), tile_tokens - 1);
        }
    }
}

TEST_P(CacheOfRecipe, AForkCopiesNothing) {
    KvCache cache(configuration(), pool_);
    append(cache, keys(600), values(600));
    const Index pages = pool_.pages() - pool_.unused_pages(), bytes = pool_.bytes();
    if (!configuration().fits_basis() && !configuration().recipe.shaped_keys &&
        !configuration().widths_by_token()) {
        EXPECT_EQ(bytes, cache.bytes());
    }
    const KvCache fork = cache.fork();
    EXPECT_EQ(pool_.pages() - pool_.unused_pages(), pages);
    EXPECT_EQ(pool_.bytes(), bytes);
    const Matrix q = queries(2);
    EXPECT_EQ(attend(cache, q), attend(fork, q));
}

TEST_P(CacheOfRecipe, PagesGoBackToThePool) {
    {
        KvCache cache(configuration(), pool_);
        append(cache, keys(600), values(600));
        cache.drop_before(500);
        cache.truncate(520);
        const KvCache fork = cache.fork();
        cache.clear();
        EXPECT_EQ(cache.tokens(), 0);
        EXPECT_EQ(cache.bytes(), 0);
    }
    EXPECT_EQ(pool_.pages(), pool_.unused_pages());
    EXPECT_EQ(pool_.bytes(), 0);
    pool_.trim();
    EXPECT_EQ(pool_.pages(), 0);
}

TEST_P(CacheOfRecipe, BadInputChangesNothing) {
    KvCache cache(configuration(), pool_);
    append(cache, keys(150), values(150));
    const std::vector<std::byte> before = to_bytes(cache);
    const Matrix k = keys(40), v = values(40);
    Matrix bad = v;
    bad(33, 5) = std::numeric_limits<float>::quiet_NaN();
    EXPECT_NE(refusal(ErrorCode::not_finite, [&] { append(cache, k, bad); }).find("token 33"),
              std::string::npos);
    bad(33, 5) = 7e4f;
    refusal(ErrorCode::beyond_fp16, [&] { append(cache, k, bad); });
    refusal(ErrorCode::shape, [&] { append(cache, k, v.topRows(39)); });
    refusal(ErrorCode::shape, [&] { append(cache, v, k); });
    Matrix out(1, cache.configuration().query_heads * cache.configuration().value_head_dim);
    refusal(ErrorCode::shape, [&] { cache.attend(v, out); });
    refusal(ErrorCode::shape, [&] { cache.attend(queries(2), out); });
    refusal(ErrorCode::shape, [&] { cache.attend(queries(151), out); });
    refusal(ErrorCode::index, [&] { cache.truncate(151); });
    refusal(ErrorCode::index, [&] { cache.truncate(-1); });
    refusal(ErrorCode::index, [&] { cache.drop_before(151); });
    EXPECT_EQ(to_bytes(cache), before);
}

/// What only the rotation makes too large, in a late piece of a long append, whose first pieces are good.
TEST(KvCache, ARefusalAfterRotationChangesNothing) {
    TilePool pool;
    std::mt19937_64 random(seed());
    KvCache cache(configuration("standard"), pool);
    append(cache, normal_matrix(random, 150, 64), normal_matrix(random, 150, 96));
    const std::vector<std::byte> before = to_bytes(cache);
    const Matrix k = normal_matrix(random, 300, 64);
    Matrix v = normal_matrix(random, 300, 96);
    v.row(250).setConstant(31900.0f);
    const std::string sentence = refusal(ErrorCode::beyond_fp16, [&] { append(cache, k, v); });
    EXPECT_NE(sentence.find("values: token 250"), std::string::npos) << sentence;
    EXPECT_EQ(to_bytes(cache), before);
    v.row(250).setConstant(2000.0f);
    append(cache, k, v);
    EXPECT_EQ(cache.tokens(), 450);
}

TEST_P(CacheOfRecipe, AFailedAllocationLosesNothing) {
    FailingMemory memory;
    TilePool pool(&memory);
    KvCache cache(configuration(), pool);
    append(cache, keys(170), values(170));
    const KvCache fork = cache.fork();  // so that the append must copy a page as well
    const std::vector<std::byte> before = to_bytes(cache);
    const Matrix k = keys(300), v = values(300);
    int refused = 0;
    for (;; ++refused) {
        pool.trim();
        memory.left = refused;
        try {
            append(cache, k, v);
            break;
        } catch (const Error& error) {
            ASSERT_EQ(error.code(), ErrorCode::out_of_memory) << error.what();
        }
        memory.left = std::numeric_limits<Index>::max();
        ASSERT_EQ(to_bytes(cache), before) << "after the failure of allocation " << refused;
        ASSERT_EQ(to_bytes(fork), before);
    }
    EXPECT_GT(refused, 2);
    memory.left = std::numeric_limits<Index>::max();
    EXPECT_EQ(cache.tokens(), 470);
    EXPECT_EQ(to_bytes(fork), before);
}

TEST_P(CacheOfRecipe, ThreadsSharePoolAndReadTogether) {
    KvCache cache(configuration(), pool_);
    append(cache, keys(300), values(300));
    const Matrix q = queries(3), expected = attend(cache, q), k = keys(200), v = values(200);
    std::vector<std::thread> threads;
    std::vector<int> equal(4, 0);
    for (int i = 0; i < 4; ++i)
        threads.emplace_back([&, i, fork = cache.fork()]() mutable {
            for (int round = 0; round < 3; ++round) {
                equal[static_cast<std::size_t>(i)] += attend(cache, q) == expected;
                append(fork, k, v);
                fork.truncate(250 + 10 * i);
            }
        });
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(equal, std::vector<int>(4, 3));
}

/// What was moved from is a new cache of the same configuration; what is moved to itself stays as it is.
TEST_P(CacheOfRecipe, WhatIsMovedFromIsEmptyAndUsable) {
    const Matrix k = keys(200), v = values(200), q = queries(2);
    KvCache cache(configuration(), pool_);
    const std::vector<std::byte> nothing = to_bytes(cache);
    append(cache, k, v);
    cache.drop_before(20);
    const std::vector<std::byte> all = to_bytes(cache);
    const Matrix output = attend(cache, q);
    const auto expect_empty = [&](KvCache& moved_from) {
        EXPECT_EQ(moved_from.configuration(), configuration());
        EXPECT_EQ(moved_from.tokens(), 0);
        EXPECT_EQ(moved_from.packed_tokens(), 0);
        EXPECT_EQ(moved_from.first_kept(), 0);
        EXPECT_EQ(moved_from.bytes(), 0);
        EXPECT_EQ(moved_from.latent_keys(), nullptr);
        EXPECT_EQ(to_bytes(moved_from), nothing);
        EXPECT_EQ(to_bytes(load_cache(nothing, configuration(), pool_)), nothing);
        refusal(ErrorCode::shape, [&] { attend(moved_from, q); });
        EXPECT_EQ(attend(moved_from, q.topRows(0)).rows(), 0);
        moved_from.truncate(0);
        moved_from.drop_before(0);
        append(moved_from, k, v);
        moved_from.drop_before(20);
        EXPECT_EQ(to_bytes(moved_from), all);
        EXPECT_EQ(attend(moved_from, q), output);
    };
    KvCache made(std::move(cache));
    EXPECT_EQ(to_bytes(made), all);
    EXPECT_EQ(attend(made, q), output);
    expect_empty(cache);
    // Into a cache of another configuration, and back.
    KvCache other(kvplane_test::configuration("fp16", 1, 3, 16, 16), pool_);
    append(other, normal_matrix(random_, 130, 16), normal_matrix(random_, 130, 16));
    other = std::move(made);
    EXPECT_EQ(other.configuration(), configuration());
    EXPECT_EQ(to_bytes(other), all);
    EXPECT_EQ(attend(other, q), output);
    expect_empty(made);
    KvCache& same = other;
    other = std::move(same);
    EXPECT_EQ(to_bytes(other), all);
    EXPECT_EQ(attend(other, q), output);
    const KvCache loaded = load_cache(to_bytes(other), configuration(), pool_);
    EXPECT_EQ(attend(loaded, q), output);
    append(other, k, v);
    EXPECT_EQ(other.tokens(), 400);
}

/// What attention sees of each token, where all keys are 0 and so all weights equal: the share of a channel that
/// only the given tokens have.
class SeenTokens : public testing::TestWithParam<std::string> {
  protected:
    static constexpr Index channels = 48;

    /// Tokens of which token probes[i] has 1 in channel i, for the first head, and 0 elsewhere.
    KvCache cache_of(Index tokens, const std::vector<Index>& probes) {
        CacheConfiguration c = kvplane_test::configuration(GetParam(), 1, 2);
        KvCache cache(c, pool_);
        Matrix values = Matrix::Zero(tokens, channels);
        for (std::size_t i = 0; i < probes.size(); ++i)
            if (probes[i] >= 0 && probes[i] < tokens) values(probes[i], static_cast<Index>(i)) = 1.0f;
        cache.append(Matrix::Zero(tokens, c.key_head_dim), values);
        return cache;
    }
    /// [query token] how many tokens it sees, and which probes, in one call and path.
    static void expect_seen(const KvCache& cache, const std::vector<Index>& probes, Index query_tokens,
                            const AttentionParameters& parameters,
                            const std::function<bool(Index position, Index token)>& sees) {
        const Matrix out = attend(cache, Matrix::Zero(query_tokens, 2 * 32), parameters);
        for (Index i = 0; i < query_tokens; ++i) {
            const Index position = cache.tokens() - query_tokens + i;
            Index seen = 0;
            for (Index t = 0; t <= position; ++t) seen += sees(position, t);
            for (std::size_t p = 0; p < probes.size(); ++p) {
                if (probes[p] < 0) continue;
                const bool sees_it = probes[p] <= position && sees(position, probes[p]);
                const float share = out(i, static_cast<Index>(p)) * static_cast<float>(seen);
                ASSERT_NEAR(share, sees_it ? 1.0f : 0.0f, 0.03f)
                    << "token " << probes[p] << " at position " << position << ", " << seen << " seen";
            }
        }
    }

    TilePool pool_;
};

/// At every border of sinks, tiles and recent tokens, one window or another ends.
TEST_P(SeenTokens, AreThoseOfTheWindow) {
    for (const Index tokens : {3, 4, 5, 130, 132, 133, 160, 163, 164, 165, 260, 291, 292, 293, 400})
        for (const Index window : {1, 2, 127, 128, 129, 160})
            for (Index query_tokens = 1; query_tokens <= std::min<Index>(9, tokens);
                 query_tokens += sanitized ? 4 : 1) {
                const Index last = tokens - 1, first = tokens - query_tokens;
                std::vector<Index> probes{0, 1, 3, 4, last, first};
                for (const Index position : {first, last})
                    for (const Index border :
                         {position - window - 1, position - window, position - window + 1})
                        probes.push_back(border);
                std::sort(probes.begin(), probes.end());
                probes.erase(std::unique(probes.begin(), probes.end()), probes.end());
                SCOPED_TRACE(std::to_string(tokens) + " tokens, window " + std::to_string(window) + ", " +
                             std::to_string(query_tokens) + " query tokens");
                const KvCache cache = cache_of(tokens, probes);
                for (const Index sinks : {0, 2}) {
                    AttentionParameters parameters;
                    parameters.sliding_window = window;
                    parameters.sinks = sinks;
                    expect_seen(cache, probes, query_tokens, parameters, [&](Index position, Index token) {
                        return position - token < window || token < sinks;
                    });
                    if (HasFatalFailure()) return;
                }
            }
}

/// The sinks that are to be kept stay, whatever the recipe keeps in fp16, and no window reaches what is gone.
TEST_P(SeenTokens, AreTheSinksThatDroppingKeeps) {
    const std::vector<Index> probes{0, 3, 4, 15, 16, 127, 128, 299, 300, 301, 500};
    for (const Index sinks : {0, 2, 4, 16, 140}) {
        SCOPED_TRACE(std::to_string(sinks) + " sinks kept");
        KvCache cache = cache_of(501, probes);
        const Index before = cache.bytes();
        cache.drop_before(200, sinks);
        cache.drop_before(300);
        if (sinks <= 16) {  // of later ones no whole tile can go
            EXPECT_LT(cache.bytes(), before);
        }
        EXPECT_EQ(cache.first_kept(), 300);
        const auto kept = [&](Index, Index token) { return token < sinks || token >= 300; };
        for (const Index query_tokens : {1, 8, 20}) expect_seen(cache, probes, query_tokens, {}, kept);
        AttentionParameters window;
        window.sliding_window = 150;
        window.sinks = sinks;
        for (const Index query_tokens : {1, 8, 20})
            expect_seen(cache, probes, query_tokens, window,
                        [&](Index position, Index token) { return token < sinks || position - token < 150; });
        KvCache loaded = load_cache(to_bytes(cache), cache.configuration(), pool_);
        expect_seen(loaded, probes, 1, {}, kept);
        EXPECT_EQ(to_bytes(loaded), to_bytes(cache));

        window.sinks = sinks + 1;
        Matrix out(1, 2 * channels);
        const auto ask = [&] { cache.attend(Matrix::Zero(1, 2 * 32), out, window); };
        EXPECT_EQ(refusal(ErrorCode::option, ask),
                  "kvplane: attend: " + std::to_string(sinks + 1) + " sinks, but tokens " +
                      std::to_string(sinks) + " to 299 were dropped; expected drop_before() to keep as many");
        window.sinks = sinks;
        window.sliding_window = 202;
        EXPECT_EQ(refusal(ErrorCode::option, ask),
                  "kvplane: attend: a sliding window of 202 reaches token 299, but tokens " +
                      std::to_string(sinks) + " to 299 were dropped");
        refusal(ErrorCode::index, [&] { cache.drop_before(300, sinks + 1); });
        refusal(ErrorCode::index, [&] { cache.truncate(299); });
        cache.truncate(300);
        cache.truncate(sinks);
        EXPECT_EQ(cache.tokens(), sinks);
    }
}

INSTANTIATE_TEST_SUITE_P(Recipes, SeenTokens,
                         testing::Values("fp16", "block32:8", "kivi:8", "key_favored:8:8", "standard",
                                         "key_favored:8:8+sinks=17+recent=0"),
                         test_name);

/// Tokens dropped within the sinks are still seen, and may be truncated; what is then saved can be loaded.
TEST_P(CacheOfRecipe, DropsWithinTheSinksThenTruncatesBelow) {
    const Index sinks = configuration().recipe.sink_tokens;
    if (sinks < 3) GTEST_SKIP() << "it has no sinks";
    for (const Index tokens : {sinks - 1, sinks, Index{200}})
        for (const Index dropped : {Index{1}, sinks - 1, std::min(sinks, tokens)})
            for (const Index left : {dropped, dropped - 1, Index{1}, Index{0}}) {
                SCOPED_TRACE(std::to_string(tokens) + " tokens, dropped before " + std::to_string(dropped) +
                             ", truncated to " + std::to_string(left));
                const Matrix k = keys(tokens), v = values(tokens), more_k = keys(150), more_v = values(150);
                KvCache cache(configuration(), pool_), plain(configuration(), pool_);
                append(cache, k, v);
                append(plain, k, v);
                const Matrix q = queries(1);
                cache.drop_before(dropped);
                EXPECT_EQ(attend(cache, q), attend(plain, q)) << "sinks are seen for ever";
                cache.truncate(left);
                plain.truncate(left);
                EXPECT_EQ(cache.tokens(), left);
                KvCache loaded = load_cache(to_bytes(cache), configuration(), pool_);
                EXPECT_EQ(to_bytes(loaded), to_bytes(cache));
                EXPECT_EQ(loaded.first_kept(), cache.first_kept());
                // It goes on as if nothing had been dropped.
                for (KvCache* const one : {&cache, &plain, &loaded}) append(*one, more_k, more_v);
                EXPECT_EQ(to_bytes(loaded), to_bytes(cache));
                EXPECT_EQ(attend(cache, q), attend(plain, q));
                EXPECT_EQ(attend(loaded, q), attend(plain, q));
            }
}

/// Hands out no more than so many bytes at a time.
class BudgetedMemory : public std::pmr::memory_resource {
  public:
    explicit BudgetedMemory(Index bytes) : left(bytes) {}
    Index left;

  private:
    void* do_allocate(std::size_t bytes, std::size_t alignment) override {
        if (static_cast<Index>(bytes) > left) throw std::bad_alloc();
        left -= static_cast<Index>(bytes);
        return std::pmr::new_delete_resource()->allocate(bytes, alignment);
    }
    void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
        left += static_cast<Index>(bytes);
        std::pmr::new_delete_resource()->deallocate(memory, bytes, alignment);
    }
    bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

TEST(TilePool, GivesBackUnusedPagesOfOtherSizesWhenTheBudgetIsSpent) {
    BudgetedMemory memory(4096);
    TilePool pool(&memory);
    {
        const PageReference kept = pool.page(1024);
        std::memset(kept.data(), 7, 1024);
        {
            const PageReference a = pool.page(1024), b = pool.page(2048);
            EXPECT_EQ(memory.left, 0);
            EXPECT_NE(refusal(ErrorCode::out_of_memory, [&] { pool.page(64); }).find("64"),
                      std::string::npos);
        }
        EXPECT_EQ(memory.left, 0) << "unused pages stay in the pool";
        EXPECT_EQ(pool.unused_pages(), 2);
        {
            const PageReference again = pool.page(2048);  // of a size that is there
            EXPECT_EQ(pool.unused_pages(), 1);
        }
        const PageReference other = pool.page(3072);
        EXPECT_EQ(memory.left, 0);
        EXPECT_EQ(pool.pages(), 2);
        EXPECT_EQ(pool.unused_pages(), 0);
        EXPECT_EQ(kept.data()[1023], std::byte{7}) << "pages in use are left alone";
        EXPECT_TRUE(
            std::all_of(other.data(), other.data() + 3072, [](std::byte b) { return b == std::byte{}; }));
        refusal(ErrorCode::out_of_memory, [&] { pool.page(64); });
    }
    pool.trim();
    EXPECT_EQ(memory.left, 4096);
}

/// The pages of one model's caches make room for another's.
TEST(TilePool, ServesCachesOfOtherShapesFromOneBudget) {
    std::mt19937_64 random(seed());
    const CacheConfiguration first = configuration("standard"),
                             second = configuration("key_favored:8:8", 1, 2, 80, 80);
    const auto fill = [&](const CacheConfiguration& c, TilePool& pool, Index tokens) {
        KvCache cache(c, pool);
        append(cache, normal_matrix(random, tokens, c.kv_heads * c.key_head_dim),
               normal_matrix(random, tokens, c.kv_heads * c.value_head_dim));
        return cache;
    };
    const auto needs = [&](const CacheConfiguration& c, Index tokens) {
        // While it fills, a cache has up to 128 + 32 recent tokens and a page more.
        return KvCache::predicted_bytes(c, tokens) + 8 * KvCache::predicted_bytes(c, 40);
    };
    BudgetedMemory memory(std::max(needs(first, 1000), needs(second, 1000)));
    TilePool pool(&memory);
    for (int round = 0; round < 4; ++round) {
        EXPECT_EQ(fill(first, pool, 1000).tokens(), 1000);
        EXPECT_EQ(fill(second, pool, 1000).tokens(), 1000);
    }
    // Two at a time do not fit, and the refusal leaves the first as it is.
    KvCache cache = fill(first, pool, 1000);
    const std::vector<std::byte> before = to_bytes(cache);
    refusal(ErrorCode::out_of_memory, [&] { fill(second, pool, 3000); });
    EXPECT_EQ(to_bytes(cache), before);
}

INSTANTIATE_TEST_SUITE_P(Recipes, CacheOfRecipe, testing::ValuesIn(with(recipe_names(), token_grid_names())),
                         test_name);

TEST(Cache, DroppedTokensAreNotSeen) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache(configuration("standard"), pool);
    const Matrix k = normal_matrix(random, 600, 64), q = normal_matrix(random, 1, 128);
    Matrix v = normal_matrix(random, 600, 96);
    v.middleRows(4, 296).setConstant(1000.0f);  // would dominate any output that sees one of them
    append(cache, k, v);
    const Index bytes = cache.bytes();
    cache.drop_before(300);
    EXPECT_LT(attend(cache, q).cwiseAbs().maxCoeff(), 10.0f);
    EXPECT_LT(cache.bytes(), bytes);
    EXPECT_EQ(cache.tokens(), 600);
    EXPECT_EQ(cache.first_kept(), 300);
    EXPECT_NE(refusal(ErrorCode::index, [&] { cache.truncate(299); }).find("300"), std::string::npos);
    cache.truncate(300);  // nothing but the sinks is left to see
    EXPECT_LT(attend(cache, q).cwiseAbs().maxCoeff(), 10.0f);
}

TEST(Cache, AQueryThatSeesNothingGetsZeros) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache(configuration("fp16"), pool);
    Matrix out = Matrix::Constant(0, 192, 1.0f);
    cache.attend(Matrix(0, 128), out);
    append(cache, normal_matrix(random, 5, 64), normal_matrix(random, 5, 96));
    const Matrix bias = Matrix::Constant(1, 5, -std::numeric_limits<float>::infinity());
    EXPECT_EQ(attend(cache, normal_matrix(random, 1, 128), {.bias = &bias}), Matrix::Zero(1, 192));
}

TEST(Cache, AHugeSpreadIsRefusedWhenItComesNotWhenItsTileIsMade) {
    TilePool pool;
    KvCache cache(configuration("key_favored:1:1+key_scheme=min_max+value_scheme=min_max"), pool);
    Matrix k = Matrix::Zero(300, 64);
    k(10, 3) = 60000.0f;
    EXPECT_NE(refusal(ErrorCode::beyond_fp16, [&] { append(cache, k, Matrix::Zero(300, 96)); }).find("32000"),
              std::string::npos);
    k(10, 3) = 32000.0f;
    k(11, 3) = -32000.0f;
    append(cache, k, Matrix::Zero(300, 96));
    EXPECT_EQ(cache.packed_tokens(), 256);
}

TEST(Cache, RefusesImpossibleConfigurations) {
    TilePool pool;
    const auto refused = [&](auto change) {
        CacheConfiguration c = configuration("standard");
        change(c);
        return refusal(ErrorCode::option, [&] { KvCache cache(c, pool); });
    };
    EXPECT_NE(refused([](auto& c) { c.query_heads = 3; }).find("multiple"), std::string::npos);
    EXPECT_NE(refused([](auto& c) { c.key_head_dim = 0; }).find("head_dim"), std::string::npos);
    EXPECT_NE(refused([](auto& c) { c.recipe.keys.bits = 9; }).find("9 bits"), std::string::npos);
    EXPECT_NE(refused([](auto& c) { c.recipe.recent_bits = 4; }).find("recent"), std::string::npos);
    EXPECT_NE(refused([](auto& c) { c.recipe.keys.rule.group = 48; }).find("48"), std::string::npos);
    EXPECT_NE(refused([](auto& c) {
                  c.recipe.every_token = true;
                  c.recipe.sink_tokens = c.recipe.recent_tokens = 0;
              }).find("per channel"),
              std::string::npos);
    EXPECT_NE(refused([](auto& c) { c.recipe.every_token = true; }).find("sinks"), std::string::npos);
}

/// Appends and attends in a thread of its own, with subnormal numbers flushed or as they are.
struct Traces {
    std::vector<std::byte> bytes;
    Matrix decode, prefill;
};
Traces trace_of(const CacheConfiguration& c, const Matrix& k, const Matrix& v, const Matrix& q,
                bool flushed) {
    Traces traces;
    std::thread([&] {
        const auto run = [&] {
            TilePool pool;
            KvCache cache(c, pool);
            append(cache, k.topRows(201), v.topRows(201));
            append(cache, k.bottomRows(k.rows() - 201), v.bottomRows(v.rows() - 201));
            traces.decode = attend(cache, q.bottomRows(3));
            traces.prefill = attend(cache, q);
            traces.bytes = to_bytes(cache);
            return 0;
        };
        if (flushed)
            with_flushed_subnormals(run);
        else
            run();
    }).join();
    return traces;
}

/// Other libraries set their threads to flush subnormal numbers. Bytes and outputs are the same bits, also
/// where keys and values are subnormal fp16, or the steps of their grids are.
TEST(Cache, DoesNotDependOnFlushedSubnormals) {
    if (!can_flush_subnormals) GTEST_SKIP() << "this machine's mode cannot be set";
    std::mt19937_64 random(seed());
    const Matrix k = normal_matrix(random, 300, 64), v = normal_matrix(random, 300, 96),
                 q = normal_matrix(random, 12, 128);
    // fp16 is subnormal below 6.1e-5. Values of about 1e-3 span some 5e-3: steps of 2e-5 at 8 bits; those of
    // 1e-6 are subnormal themselves, and those of 1e-40 subnormal floats.
    for (const char* recipe : {"fp16", "key_favored:8:16", "key_favored:8:8", "key_favored:4:5", "standard",
                               "block32:8", "latent:3:3+fit_tokens=130"})
        for (const float scale : {1.0f, 1e-3f, 1e-6f, 1e-40f}) {
            const CacheConfiguration c = configuration(recipe);
            // A basis needs keys that are not 0.
            const Matrix keys = c.fits_basis() ? k : Matrix(scale * k), values = scale * v;
            for_each_isa([&](Isa) {
                const Traces as_they_are = trace_of(c, keys, values, q, false),
                             flushed = trace_of(c, keys, values, q, true);
                EXPECT_EQ(flushed.bytes, as_they_are.bytes) << recipe << ", values of " << scale;
                EXPECT_EQ(differing(flushed.decode, as_they_are.decode), 0)
                    << recipe << ", values of " << scale;
                EXPECT_EQ(differing(flushed.prefill, as_they_are.prefill), 0)
                    << recipe << ", values of " << scale;
                // They are seen: softmax averages are as large as the values.
                if (scale >= 1e-6f) {
                    EXPECT_GT(as_they_are.decode.cwiseAbs().maxCoeff(), 0.01f * scale);
                }
            });
        }
}

}  // namespace
