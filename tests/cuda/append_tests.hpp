// tests/cuda/append_tests.hpp: what holds of caches in the memory of a Machine, which is a device, or the
// host in its place. Both programs run all of it: append_host_test.cpp and device_cache_gpu.cpp.
//
// A Machine has a pool, a type Cache, and upload, download, append, fork, truncate, drop_before, table (the
// tiles as kernels read them) and recent_pages for it.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "append_cases.hpp"
#include "kvplane/io/cache_file.hpp"
#include "test_support.hpp"

namespace kvplane_test {

template <class Machine>
class AppendTest : public testing::TestWithParam<AppendCase> {
  protected:
    using Cache = typename Machine::Cache;
    using Order = StridedRows::Order;
    using Check = cuda::AppendCheck;

    CacheConfiguration configuration_ = configuration_of(GetParam());
    const std::uint64_t seed_ = seed();
    std::mt19937_64 random_{seed_};
    TilePool host_;
    Machine machine_;

    struct Tokens {
        Matrix keys, values;
    };
    Tokens tokens(Index count, ScalarType type) {
        const auto& c = configuration_;
        return {rounded_to(append_numbers(random_, count, c.kv_heads * c.key_head_dim), type),
                rounded_to(append_numbers(random_, count, c.kv_heads * c.value_head_dim), type)};
    }
    static Tokens part(const Tokens& tokens, Index first, Index count) {
        return {tokens.keys.middleRows(first, count), tokens.values.middleRows(first, count)};
    }
    Index up_to(Index most) { return std::uniform_int_distribution<Index>(0, most)(random_); }

    void append_host(KvCache& cache, const Tokens& tokens) {
        configuration_.values_in_keys ? cache.append(tokens.keys)
                                      : kvplane_test::append(cache, tokens.keys, tokens.values);
    }
    void append_device(Cache& cache, const Tokens& tokens, ScalarType type = ScalarType::float32,
                       Order order = Order::token_head_channel, Check check = Check::wait) {
        const StridedRows keys(tokens.keys, configuration_.kv_heads, type, order),
            values(tokens.values, configuration_.kv_heads, type, order);
        machine_.append(cache, keys, configuration_.values_in_keys ? nullptr : &values, check);
    }
    void append_both(KvCache& expected, Cache& cache, Index count) {
        const Tokens more = tokens(count, ScalarType::float16);
        append_host(expected, more);
        append_device(cache, more, ScalarType::float16, Order::token_head_channel,
                      count % 2 == 0 ? Check::wait : Check::none);
    }
    Cache uploaded(const KvCache& cache) {
        const KvCache* const one = &cache;
        return std::move(machine_.upload({&one, 1})[0]);
    }
    std::string difference(Cache& cache, const KvCache& expected) {
        return cache_difference(machine_.download(cache, host_), expected);
    }
    /// A cache that knows its basis, where it has one, and so can go to the device.
    KvCache start() {
        KvCache cache(configuration_, host_);
        if (configuration_.fits_basis()) append_host(cache, tokens(300, ScalarType::float32));
        return cache;
    }
    /// The table of tiles says what the state does.
    void expect_table(const Cache& cache) {
        const auto& tiles = cache.state().tiles;
        const std::vector<cuda::DeviceTile> table = machine_.table(cache);
        ASSERT_EQ(table.size(), tiles.size());
        for (std::size_t t = 0; t < tiles.size(); ++t) {
            ASSERT_EQ(table[t], cache.tiles()[t]) << "tile " << t;
            ASSERT_EQ(table[t].page, tiles[t].page) << "tile " << t;
            ASSERT_EQ(table[t].first, tiles[t].first) << "tile " << t;
            ASSERT_EQ(table[t].tokens, tiles[t].tokens) << "tile " << t;
            ASSERT_EQ(table[t].row, tiles[t].row) << "tile " << t;
            ASSERT_EQ(table[t].shift, tiles[t].shift) << "tile " << t;
        }
        std::vector<const std::byte*> pages;
        for (const PageReference& page : cache.state().recent) pages.push_back(page.data());
        ASSERT_EQ(machine_.recent_pages(cache), pages);
    }

    void gives_the_bytes_of_the_host() {
        int round = 0;
        for (const ScalarType type : {ScalarType::float32, ScalarType::float16, ScalarType::bfloat16})
            for (const Order order : {Order::token_head_channel, Order::head_token_channel,
                                      Order::channels_apart, Order::unaligned}) {
                if (sanitized && round++ % 4 != 0) continue;
                SCOPED_TRACE("element type " + std::to_string(static_cast<int>(type)) + ", order " +
                             std::to_string(static_cast<int>(order)));
                KvCache expected = start();
                Cache cache = uploaded(expected);
                ASSERT_EQ(difference(cache, expected), "");
                for (const Index count : {1, 2, 5, 31, 64, 128, 97, 300, 1, 131}) {
                    SCOPED_TRACE(std::to_string(count) + " tokens after " +
                                 std::to_string(expected.tokens()));
                    const Tokens more = tokens(count, type);
                    append_host(expected, more);
                    append_device(cache, more, type, order, count % 2 == 0 ? Check::wait : Check::none);
                    ASSERT_EQ(difference(cache, expected), "");
                    ASSERT_NO_FATAL_FAILURE(expect_table(cache));
                    ASSERT_EQ(cache.bytes(), expected.bytes());
                }
            }
    }

    void chunks_of_any_size_give_the_same_bytes() {
        for (int round = 0, all = rounds(sanitized ? 1 : 3); round < all; ++round) {
            machine_.shuffle(round);
            KvCache expected = start();
            Cache cache = uploaded(expected);
            const Tokens more = tokens(420, ScalarType::float16);
            append_host(expected, more);
            for (Index done = 0, count; done < 420; done += count) {
                count = std::min(420 - done, 1 + (up_to(3) != 0 ? up_to(2) : up_to(169)));
                append_device(cache, part(more, done, count), ScalarType::float16);
            }
            ASSERT_EQ(difference(cache, expected), "");
        }
    }

    /// More tiles than one launch takes.
    void a_long_prompt_gives_the_same_bytes() {
        KvCache expected = start();
        Cache cache = uploaded(expected);
        append_both(expected, cache, 3);
        append_both(expected, cache, 36 * 128 + 10);
        ASSERT_EQ(difference(cache, expected), "");
        ASSERT_NO_FATAL_FAILURE(expect_table(cache));
    }

    void forks_go_on_by_themselves() {
        for (const Index before : {0, 2, 4, 40, 130, 163, 164, 200, 292}) {
            SCOPED_TRACE(std::to_string(before) + " tokens before the fork");
            KvCache expected = start();
            Cache cache = uploaded(expected);
            if (before > 0) append_both(expected, cache, before);
            KvCache other_expected = expected.fork();
            Cache other = machine_.fork(cache);
            for (const Index count : {1, 6, 150}) {
                append_both(expected, cache, count);
                append_both(other_expected, other, count + 1);
                ASSERT_EQ(difference(cache, expected), "");
                ASSERT_EQ(difference(other, other_expected), "");
                ASSERT_NO_FATAL_FAILURE(expect_table(cache));
                ASSERT_NO_FATAL_FAILURE(expect_table(other));
            }
        }
    }

    void shared_pages_are_uploaded_once() {
        KvCache first = start();
        append_host(first, tokens(300, ScalarType::float16));
        KvCache second = first.fork();
        append_host(second, tokens(2, ScalarType::float16));
        const KvCache* const both[] = {&first, &second};
        std::vector<Cache> caches = machine_.upload(both);
        const auto &a = caches[0].state(), &b = caches[1].state();
        ASSERT_GT(a.tile_pages.size(), 0u);
        EXPECT_EQ(a.tile_pages[0], b.tile_pages[0]);
        if (a.sinks) {
            EXPECT_EQ(a.sinks, b.sinks);
        }
        EXPECT_EQ(difference(caches[0], first), "");
        EXPECT_EQ(difference(caches[1], second), "");
        append_both(first, caches[0], 140);
        append_both(second, caches[1], 3);
        EXPECT_EQ(difference(caches[0], first), "");
        EXPECT_EQ(difference(caches[1], second), "");
    }

    void truncations_go_on_as_on_the_host() {
        for (const Index left : {0, 1, 3, 4, 5, 40, 128, 131, 132, 133, 200, 250, 259, 260, 261, 300, 399}) {
            SCOPED_TRACE("to " + std::to_string(left) + " of 400");
            KvCache expected = start();
            const Index before = expected.tokens();
            Cache cache = uploaded(expected);
            append_both(expected, cache, 400);
            const bool to_nothing = left == 0 && before > 0 && configuration_.fits_basis();
            if (to_nothing) continue;  // the basis would go too
            expected.truncate(before + left);
            machine_.truncate(cache, before + left);
            ASSERT_EQ(difference(cache, expected), "");
            ASSERT_NO_FATAL_FAILURE(expect_table(cache));
            for (const Index count : {1, 2, 170}) {
                append_both(expected, cache, count);
                ASSERT_EQ(difference(cache, expected), "") << count << " tokens more";
                ASSERT_NO_FATAL_FAILURE(expect_table(cache));
            }
        }
    }

    void refuses_what_cannot_be_stored() {
        KvCache expected = start();
        Cache cache = uploaded(expected);
        append_both(expected, cache, 137);
        const std::vector<std::byte> bytes = to_bytes(expected);
        for (const float bad : {std::numeric_limits<float>::quiet_NaN(),
                                std::numeric_limits<float>::infinity(), -65520.0f, 1e30f, 40000.0f})
            for (const bool in_keys : {true, false}) {
                if (!in_keys && configuration_.values_in_keys) continue;
                SCOPED_TRACE(std::to_string(bad) + (in_keys ? " in keys" : " in values"));
                const Index count = 1 + up_to(300);
                Tokens more = tokens(count, ScalarType::float32);
                Matrix& side = in_keys ? more.keys : more.values;
                // The largest number that fp16 recipes take is larger.
                side(up_to(count - 1), up_to(side.cols() - 1)) = bad;
                if (up_to(1) == 0) side(up_to(count - 1), up_to(side.cols() - 1)) = bad;
                std::string wanted;
                try {
                    KvCache copy = expected.fork();
                    append_host(copy, more);
                } catch (const Error& error) {
                    wanted = error.what();
                }
                std::string found;
                try {
                    Cache copy = machine_.fork(cache);
                    append_device(copy, more);
                } catch (const Error& error) {
                    found = error.what();
                }
                ASSERT_EQ(found, wanted);
                if (wanted.empty()) continue;
                // And where no fork shares its pages.
                EXPECT_ANY_THROW(append_device(cache, more));
                ASSERT_EQ(to_bytes(machine_.download(cache, host_)), bytes);
                ASSERT_NO_FATAL_FAILURE(expect_table(cache));
            }
        append_both(expected, cache, 60);
        EXPECT_EQ(to_bytes(machine_.download(cache, host_)), to_bytes(expected));
        // Tiles keep nothing of what was refused, not even where no token is.
        if (configuration_.recipe.every_token) {
            EXPECT_EQ(difference(cache, expected), "");
        }
    }

    void any_operations_in_any_order() {
        for (int round = 0, all = rounds(sanitized ? 2 : 6); round < all; ++round) {
            std::vector<KvCache> expected;
            std::vector<Cache> caches;
            expected.push_back(start());
            const Index least = expected[0].tokens();
            caches.push_back(uploaded(expected[0]));
            for (int step = 0; step < 40; ++step) {
                const auto i = static_cast<std::size_t>(up_to(static_cast<Index>(caches.size()) - 1));
                KvCache& e = expected[i];
                Cache& c = caches[i];
                SCOPED_TRACE("round " + std::to_string(round) + ", step " + std::to_string(step) +
                             ", cache " + std::to_string(i) + " of " + std::to_string(e.tokens()) +
                             " tokens");
                switch (up_to(7)) {
                    case 0:
                        if (caches.size() < 4) {
                            expected.push_back(e.fork());
                            caches.push_back(machine_.fork(c));
                        }
                        break;
                    case 1: {
                        const Index count = std::max(least > 0 ? least : 0, e.tokens() - up_to(180));
                        if (e.state().dropped > e.state().kept_sinks && count < e.state().dropped) break;
                        e.truncate(count);
                        machine_.truncate(c, count);
                        break;
                    }
                    case 2: {
                        const Index token = std::max(e.state().dropped, e.tokens() - up_to(200)),
                                    sinks = std::min<Index>(e.state().kept_sinks, 4);
                        e.drop_before(token, sinks);
                        machine_.drop_before(c, token, sinks);
                        break;
                    }
                    default:
                        append_both(e, c, 1 + (up_to(2) != 0 ? up_to(4) : up_to(200)));
                }
                for (std::size_t k = 0; k < caches.size(); ++k) {
                    if (k != i && step % 8 != 0) continue;
                    ASSERT_EQ(difference(caches[k], expected[k]), "") << "cache " << k;
                    ASSERT_NO_FATAL_FAILURE(expect_table(caches[k]));
                }
            }
        }
    }
};

/// All of it as tests of a fixture, with every recipe.
#define KVPLANE_APPEND_TESTS(Fixture)                                                                   \
    TEST_P(Fixture, GivesTheBytesOfTheHost) {                                                           \
        gives_the_bytes_of_the_host();                                                                  \
    }                                                                                                   \
    TEST_P(Fixture, ChunksOfAnySizeGiveTheSameBytes) {                                                  \
        chunks_of_any_size_give_the_same_bytes();                                                       \
    }                                                                                                   \
    TEST_P(Fixture, ForksGoOnByThemselves) {                                                            \
        forks_go_on_by_themselves();                                                                    \
    }                                                                                                   \
    TEST_P(Fixture, SharedPagesAreUploadedOnce) {                                                       \
        shared_pages_are_uploaded_once();                                                               \
    }                                                                                                   \
    TEST_P(Fixture, TruncationsGoOnAsOnTheHost) {                                                       \
        truncations_go_on_as_on_the_host();                                                             \
    }                                                                                                   \
    TEST_P(Fixture, RefusesWhatCannotBeStored) {                                                        \
        refuses_what_cannot_be_stored();                                                                \
    }                                                                                                   \
    TEST_P(Fixture, AnyOperationsInAnyOrder) {                                                          \
        any_operations_in_any_order();                                                                  \
    }                                                                                                   \
    using Fixture##Long = Fixture;                                                                      \
    TEST_P(Fixture##Long, GivesTheBytesOfTheHost) {                                                     \
        a_long_prompt_gives_the_same_bytes();                                                           \
    }                                                                                                   \
    INSTANTIATE_TEST_SUITE_P(Recipes, Fixture, testing::ValuesIn(thinned(append_cases())),              \
                             append_test_name);                                                         \
    INSTANTIATE_TEST_SUITE_P(Latents, Fixture, testing::ValuesIn(thinned(latent_cases())),              \
                             append_test_name);                                                         \
    INSTANTIATE_TEST_SUITE_P(ValuesInKeys, Fixture, testing::ValuesIn(thinned(values_in_keys_cases())), \
                             append_test_name);                                                         \
    INSTANTIATE_TEST_SUITE_P(Recipes, Fixture##Long,                                                    \
                             testing::Values(AppendCase{"fp16", {}}, AppendCase{"standard", {}},        \
                                             AppendCase{"latent:3:3+fit_tokens=130", {}}),              \
                             append_test_name)

inline std::string append_test_name(const testing::TestParamInfo<AppendCase>& info) {
    std::string name = std::to_string(info.index) + "_";
    for (const char c : info.param.recipe) name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
    const AppendShape& shape = info.param.shape;
    return name + "_" + std::to_string(shape.kv_heads) + "x" + std::to_string(shape.key_dim) + "x" +
           std::to_string(shape.value_dim);
}

}  // namespace kvplane_test
