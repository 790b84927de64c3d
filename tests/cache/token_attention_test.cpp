// Values whose tokens have different widths in a cache: which tokens get the bits, that this depends on nothing
// but tokens and queries, and what is refused. The tiles themselves: storage/token_runs_test.cpp.
#include "kvplane/cache/token_attention.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <set>
#include <vector>

#include "cache/cache_support.hpp"
#include "kvplane/cache/capabilities.hpp"
#include "kvplane/io/cache_file.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;
using kvplane::detail::AttentionMeter;
using kvplane::detail::TokenAttention;

constexpr const char* recipe = "key_favored:4:2+value_widths=32x4/32x2/64x1";

/// Squared softmax weights, and how far the meter's are from them at most.
TEST(TokenAttention, IsTheSumOfSquaredWeights) {
    std::mt19937_64 random{seed()};
    for (const Index dim : {1, 24, 64, 128, 576}) {
        const Index sinks = 4, tokens = sinks + tile_tokens + 20;
        Matrix keys = normal_matrix(random, tokens, dim);
        keys.rowwise() += 50.0f * normal_matrix(random, 1, dim).row(0);  // what moves no weight
        const Matrix queries = normal_matrix(random, 20, dim, 1.5f);
        AttentionMeter meter;
        const detail::RowView<float> rows = meter.keys(tokens, dim);
        for (Index t = 0; t < tokens; ++t) std::copy_n(keys.row(t).data(), dim, rows[t]);
        meter.take_keys(sinks + tile_tokens);
        TokenAttention found(tile_tokens);
        Eigen::ArrayXd expected = Eigen::ArrayXd::Zero(tile_tokens);
        for (Index q = 0; q < 20; ++q) {
            const Index seen = sinks + tile_tokens + q + 1;
            meter.measure({queries.row(q).data(), dim, 1}, seen, sinks, found.data());
            Eigen::ArrayXd weights =
                (queries.row(q).cast<double>() * keys.topRows(seen).cast<double>().transpose() /
                 std::sqrt(static_cast<double>(dim)))
                    .transpose()
                    .array();
            weights = (weights - weights.maxCoeff()).exp();
            weights /= weights.sum();
            expected += weights.segment(sinks, tile_tokens).square();
        }
        for (Index t = 0; t < tile_tokens; ++t)
            EXPECT_NEAR(std::ldexp(found[static_cast<std::size_t>(t)], -20), expected[t],
                        0.25 * expected[t] + 1e-4)
                << dim << " channels, token " << t;
    }
}

/// The same numbers on every instruction set.
TEST(TokenAttention, IsTheSameOnEveryInstructionSet) {
    std::mt19937_64 random{seed()};
    const Index dim = 80, tokens = tile_tokens + 30;
    const Matrix keys = normal_matrix(random, tokens, dim), queries = normal_matrix(random, 30, dim, 4.0f);
    std::set<TokenAttention> all;
    for_each_isa([&](Isa) {
        AttentionMeter meter;
        const detail::RowView<float> rows = meter.keys(tokens, dim);
        for (Index t = 0; t < tokens; ++t) std::copy_n(keys.row(t).data(), dim, rows[t]);
        meter.take_keys(tile_tokens);
        TokenAttention found(tile_tokens);
        for (Index q = 0; q < 30; ++q)
            meter.measure({queries.row(q).data(), dim, 1}, tile_tokens + q + 1, 0, found.data());
        all.insert(found);
    });
    EXPECT_EQ(all.size(), 1u);
}

/// The definition in plain numbers: what one query sees.
struct PlainMeter {
    PlainMeter(const Matrix& keys, Index whole) : dim(keys.cols()) {
        const Eigen::RowVectorXf mean =
            (keys.topRows(whole).cast<double>().colwise().sum() / static_cast<double>(whole)).cast<float>();
        for (Index t = 0; t < keys.rows(); ++t) rounded.push_back(levels(keys.row(t) - mean));
    }
    struct Levels {
        std::vector<std::int64_t> numbers;
        float unit = 0.0f;
    };
    Levels levels(const Eigen::RowVectorXf& x) const {
        const float most = dim <= 1024 ? 127.0f : std::floor(4096.0f / std::sqrt(static_cast<float>(dim))),
                    largest = x.cwiseAbs().maxCoeff();
        if (!(largest > 1e-30f)) return {std::vector<std::int64_t>(static_cast<std::size_t>(dim)), 0.0f};
        const float inverse = most / largest;
        Levels made{{}, 1.0f / inverse};
        for (const float number : x)
            made.numbers.push_back(std::llrint(static_cast<double>(number) * static_cast<double>(inverse)));
        return made;
    }
    void measure(const Eigen::RowVectorXf& query, Index seen, Index first, TokenAttention& squares) const {
        const Levels looking = levels(query);
        const float unit = looking.unit * static_cast<float>(16.0 * 1.4426950408889634 /
                                                             std::sqrt(static_cast<double>(dim)));
        std::vector<std::int64_t> weights;
        for (Index t = 0; t < seen; ++t) {
            const Levels& key = rounded[static_cast<std::size_t>(t)];
            std::int64_t sum = 0;
            for (std::size_t c = 0; c < key.numbers.size(); ++c) sum += key.numbers[c] * looking.numbers[c];
            weights.push_back(static_cast<std::int64_t>(
                std::clamp(static_cast<float>(sum) * (key.unit * unit), -1e9f, 1e9f)));
        }
        const std::int64_t top = *std::max_element(weights.begin(), weights.end());
        std::int64_t sum = 0;
        for (std::int64_t& weight : weights) {
            const std::int64_t below = std::min<std::int64_t>(top - weight, 31 * 16);
            weight = (65536 - below % 16 * 2048) >> (below / 16);
            sum += weight;
        }
        const float share = 32768.0f / static_cast<float>(sum);
        for (Index t = 0; t < tile_tokens; ++t) {
            const auto weight = static_cast<std::int64_t>(
                static_cast<float>(weights[static_cast<std::size_t>(first + t)]) * share);
            std::int32_t& so_far = squares[static_cast<std::size_t>(t)];
            so_far = static_cast<std::int32_t>(std::min<std::int64_t>(
                so_far + (weight * weight >> 10), std::numeric_limits<std::int32_t>::max()));
        }
    }
    Index dim;
    std::vector<Levels> rounded;
};

/// Number for number, on every instruction set, of any number of query heads and channels.
TEST(TokenAttention, IsWhatItsDefinitionSays) {
    std::mt19937_64 random{seed()};
    for (const Index dim : {1, 16, 20, 33, 128, 1100})
        for (const Index rows : {1, 2, 3, 4, 5, 7, 8}) {
            const Index sinks = static_cast<Index>(random() % 20),
                        tokens = sinks + tile_tokens + 1 + static_cast<Index>(random() % 40);
            Matrix keys = normal_matrix(random, tokens, dim);
            keys.rowwise() += 20.0f * normal_matrix(random, 1, dim).row(0);
            const float scale = random() % 4 == 0 ? 1e-32f : std::ldexp(1.0f, static_cast<int>(random() % 8));
            const Matrix queries = scale * normal_matrix(random, rows, dim);
            // More than one look, so that what is left of the last one is in the way.
            const Index looks[] = {tokens, sinks + tile_tokens + 1, tokens};
            TokenAttention expected(tile_tokens);
            expected[5] = std::numeric_limits<std::int32_t>::max() - 1;
            const PlainMeter plain(keys, sinks + tile_tokens);
            for (const Index seen : looks)
                for (Index r = 0; r < rows; ++r) plain.measure(queries.row(r), seen, sinks, expected);
            for_each_isa([&](Isa) {
                AttentionMeter meter;
                // Memory of keys that were more and longer.
                meter.keys(tokens + 30, dim + 16);
                const detail::RowView<float> to = meter.keys(tokens, dim);
                for (Index t = 0; t < tokens; ++t) std::copy_n(keys.row(t).data(), dim, to[t]);
                meter.take_keys(sinks + tile_tokens);
                TokenAttention found(tile_tokens);
                found[5] = std::numeric_limits<std::int32_t>::max() - 1;
                for (const Index seen : looks)
                    meter.measure({queries.data(), dim, rows}, seen, sinks, found.data());
                EXPECT_EQ(found, expected)
                    << dim << " channels, " << rows << " rows, " << tokens << " tokens";
            });
        }
}

/// Queries that look at nothing, and weights without any query.
TEST(TokenAttention, OfNothingIsNothing) {
    AttentionMeter meter;
    meter.keys(tile_tokens + 1, 16);
    meter.take_keys(tile_tokens);
    TokenAttention found(tile_tokens);
    const Matrix query = Matrix::Ones(1, 16);
    meter.measure({query.data(), 16, 1}, tile_tokens + 1, 0, found.data());
    // All 129 keys alike.
    for (const std::int32_t sum : found) EXPECT_NEAR(sum, (1 << 20) / (129.0 * 129.0), 2.0);
    EXPECT_TRUE(detail::attention_by_token(TokenAttention(tile_tokens), 0).empty());
    for (const double weight : detail::attention_by_token(found, 0)) EXPECT_GT(weight, 0.0);
}

/// Keys that all look alike but for some, which all queries look at.
struct Looked {
    explicit Looked(const CacheConfiguration& c, Index count)
        : keys(Matrix::Zero(count, c.kv_heads * c.key_head_dim)),
          values(normal_matrix(random, count, c.kv_heads * c.value_head_dim)),
          queries(Matrix::Constant(count, c.query_heads * c.key_head_dim, 1.0f)) {
        keys += 0.1f * normal_matrix(random, count, keys.cols());
        for (Index head = 0; head < c.kv_heads; ++head)
            for (Index t = c.recipe.sink_tokens; t < count; t += 4)
                keys.row(t + head % 4).segment(head * c.key_head_dim, c.key_head_dim).array() += 1.0f;
    }
    std::mt19937_64 random{seed()};
    Matrix keys, values, queries;
};

/// Errors of some tokens' values, root mean square.
double error_of(const KvCache& cache, const Matrix& values, Index head, Index first, Index step) {
    const Index dim = cache.configuration().value_head_dim;
    const Matrix stored = cache.stored_values(0, cache.tokens());
    double sum = 0.0;
    Index count = 0;
    for (Index t = first; t < cache.packed_tokens(); t += step, ++count)
        sum += (stored.row(t) - values.row(t)).segment(head * dim, dim).cast<double>().squaredNorm();
    return std::sqrt(sum / static_cast<double>(count * dim));
}

/// A quarter of all tokens is looked at, another quarter in each head, and has 4 bits.
TEST(TokenAttention, GivesBitsToTokensThatQueriesLookAt) {
    const CacheConfiguration c = configuration(recipe, 2, 4, 16, 32);
    const Looked tokens(c, 600);
    TilePool pool;
    KvCache with(c, pool), without(c, pool);
    with.append(tokens.keys, tokens.values, tokens.queries);
    without.append(tokens.keys, tokens.values);
    for (Index head = 0; head < 2; ++head)
        for (Index phase = 0; phase < 4; ++phase) {
            const Index first = c.recipe.sink_tokens + phase;
            const double error = error_of(with, tokens.values, head, first, 4);
            if (phase == head) {
                EXPECT_LT(error, 0.13);  // 4 bits of normal numbers
                EXPECT_GT(error_of(without, tokens.values, head, first, 4), 0.3);
            } else {
                EXPECT_GT(error, 0.3);
            }
        }
    EXPECT_EQ(with.bytes(), without.bytes());
}

/// Without queries, values of large norms get the bits.
TEST(TokenAttention, FollowsNormsWithoutQueries) {
    const CacheConfiguration c = configuration(recipe, 1, 1, 16, 32);
    Looked tokens(c, 300);
    for (Index t = 4; t < 300; t += 4) tokens.values.row(t) *= 3.0f;
    TilePool pool;
    KvCache cache(c, pool);
    cache.append(tokens.keys, tokens.values);
    EXPECT_LT(error_of(cache, tokens.values, 0, 4, 4), 3.0 * 0.13);
    EXPECT_GT(error_of(cache, tokens.values, 0, 5, 4), 0.3);
}

/// A cache that was saved, forked or given tokens one by one goes on as one that was not.
TEST(TokenAttention, DoesNotDependOnHowTokensCome) {
    for (const char* name : {recipe, "latent:3:2+fit_tokens=130+value_widths=16x4/112x2+recent_bits=8",
                             "key_favored:3:2+rotate_keys=1+shaped_keys=1+value_widths=64x3/64x1"}) {
        SCOPED_TRACE(name);
        const CacheConfiguration c = configuration(name);
        std::mt19937_64 random{seed()};
        const Matrix keys = normal_matrix(random, 800, c.kv_heads * c.key_head_dim),
                     values = normal_matrix(random, 800, c.kv_heads * c.value_head_dim),
                     queries = normal_matrix(random, 800, c.query_heads * c.key_head_dim, 2.0f);
        TilePool pool;
        KvCache once(c, pool);
        once.append(keys, values, queries);
        const auto part = [&](KvCache& cache, Index count) {
            const Index first = cache.tokens();
            cache.append(keys.middleRows(first, count), values.middleRows(first, count),
                         queries.middleRows(first, count));
        };
        KvCache parts(c, pool);
        while (parts.tokens() < 800)
            part(parts, std::min<Index>(1 + static_cast<Index>(random() % 50), 800 - parts.tokens()));
        EXPECT_EQ(to_bytes(parts), to_bytes(once));
        KvCache drafts(c, pool);
        while (drafts.tokens() < 800) {
            const Index first = drafts.tokens(), count = std::min<Index>(7, 800 - first);
            drafts.append_provisional(-keys.middleRows(first, count), values.middleRows(first, count),
                                      queries.middleRows(first, count));
            drafts.truncate(first);
            drafts.append_provisional(keys.middleRows(first, count), values.middleRows(first, count),
                                      queries.middleRows(first, count));
            drafts.accept();
        }
        EXPECT_EQ(to_bytes(drafts), to_bytes(once));
        // In the middle of what queries see of a tile.
        KvCache saved(c, pool);
        part(saved, 4 + 4 * 128 + 128 + 17);
        const std::filesystem::path path =
            std::filesystem::temp_directory_path() / ("token_attention_" + std::to_string(random()) + ".kv");
        save_cache(saved, path);
        KvCache loaded = load_cache(path, c, pool);
        std::filesystem::remove(path);
        EXPECT_EQ(loaded.bytes(), saved.bytes());
        KvCache fork = saved.fork();
        part(fork, 800 - fork.tokens());
        part(loaded, 800 - loaded.tokens());
        EXPECT_EQ(to_bytes(fork), to_bytes(once));
        EXPECT_EQ(to_bytes(loaded), to_bytes(once));
        if (capabilities(c).predicts_bytes) {
            EXPECT_EQ(once.bytes(), KvCache::predicted_bytes(c, 800));
        }
    }
}

/// Attention on packed bits is that of what the cache holds, also where tiles are hidden or cut.
TEST(TokenAttention, IsAttendedLikeAnyOther) {
    const CacheConfiguration c = configuration(recipe, 2, 6, 32, 48);
    std::mt19937_64 random{seed()};
    TilePool pool;
    KvCache cache(c, pool);
    cache.append(normal_matrix(random, 1000, 64), normal_matrix(random, 1000, 96),
                 normal_matrix(random, 1000, 192));
    EXPECT_TRUE(capabilities(c).decodes_packed);
    const Matrix query = normal_matrix(random, 2, 192);
    const auto check = [&](Index tokens) {
        ASSERT_EQ(cache.tokens(), tokens);
        Matrix found(2, 6 * 48);
        cache.attend(query, found);
        const Matrix expected =
            reference_attention(cache.stored_keys(0, tokens), cache.stored_values(0, tokens), query, 6, 2)
                .cast<float>();
        // What rounding factors costs: a tenth of what these widths do, .045 root mean square.
        EXPECT_LE((found - expected).norm() / std::sqrt(static_cast<float>(found.size())), 0.006f);
    };
    check(1000);
    cache.truncate(4 + 256 + 77);
    check(4 + 256 + 77);
    cache.remove(100, 150);
    check(4 + 256 + 27);
}

TEST(TokenAttention, RefusesWhatItCannot) {
    const auto refused = [](const char* name, auto change) {
        TilePool pool;
        return refusal(ErrorCode::option, [&] {
            CacheConfiguration c = configuration(name);
            change(c.recipe);
            KvCache(c, pool);
        });
    };
    const auto nothing = [](CacheRecipe&) {};
    EXPECT_NE(refused("key_favored:4:4+value_widths=32x4/32x2", nothing).find("widths for 64 tokens"),
              std::string::npos);
    EXPECT_NE(refused("key_favored:4:4+value_widths=32x4/96", nothing).find("such as 32x4"),
              std::string::npos);
    EXPECT_NE(refused("key_favored:4:4+value_widths=ax4/96x2", nothing).find("expected a number"),
              std::string::npos);
    EXPECT_NE(refused("block32:4+value_widths=64x4/64x2", nothing).find("when it comes"), std::string::npos);
    EXPECT_NE(refused("key_favored:4:4",
                      [](CacheRecipe& r) {
                          r.keys.widths = {{64, 4}, {64, 2}};
                      })
                  .find("which values alone have"),
              std::string::npos);
    EXPECT_NE(refused("key_favored:4:4",
                      [](CacheRecipe& r) {
                          r.values.widths = {{64, 3}, {64, 2}};
                      })
                  .find("expected the same"),
              std::string::npos);

    const CacheConfiguration c = configuration(recipe);
    const CacheCapabilities can = capabilities(c);
    EXPECT_TRUE(can.weighs_tokens);
    EXPECT_FALSE(can.reads_by_bits || can.reads_by_tolerance || can.wants_queries);
    EXPECT_TRUE(can.narrower_values.empty());
    TilePool pool;
    KvCache cache(c, pool);
    std::mt19937_64 random{seed()};
    const Matrix keys = normal_matrix(random, 300, 64), values = normal_matrix(random, 300, 96);
    EXPECT_NE(refusal(ErrorCode::shape, [&] { cache.append(keys, values, normal_matrix(random, 300, 64)); })
                  .find("queries of"),
              std::string::npos);
    Matrix bad = normal_matrix(random, 300, 128);
    bad(7, 5) = std::numeric_limits<float>::infinity();
    EXPECT_NE(refusal(ErrorCode::not_finite, [&] { cache.append(keys, values, bad); }).find("token 7"),
              std::string::npos);
    EXPECT_EQ(cache.tokens(), 0);
    cache.append(keys, values);
    AttentionParameters parameters;
    parameters.read = ReadPolicy::aligned(3.0);
    Matrix out(1, 4 * 48);
    EXPECT_NE(
        refusal(ErrorCode::option, [&] { cache.attend(normal_matrix(random, 1, 128), out, parameters); })
            .find("read in full"),
        std::string::npos);
    EXPECT_NE(refusal(ErrorCode::option, [&] { cache.narrow(0, 300, 4, 2); }).find("expected 4 or more"),
              std::string::npos);
    cache.narrow(0, 300, 4, 4);
}

}  // namespace
