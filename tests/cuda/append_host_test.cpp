// The kernels of appends, block by block on the host: the bytes of KvCache, page for page; and what the
// host's side of a device's cache does.
#include <gtest/gtest.h>

#include <limits>
#include <span>
#include <string>

#include "append_tests.hpp"
#include "host_queue.hpp"
#include "kvplane/cuda/cache_base.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;
using cuda::AppendCheck;
using cuda::detail::CacheBase;

/// The host in the place of a device.
struct HostMachine {
    using Cache = CacheBase;
    DirtyMemory memory;
    TilePool pool{&memory};
    HostQueue queue;

    std::vector<Cache> upload(std::span<const KvCache* const> caches) {
        return CacheBase::upload(caches, pool, queue);
    }
    KvCache download(Cache& cache, TilePool& host) {
        Cache* const one = &cache;
        return std::move(CacheBase::download({&one, 1}, host, queue)[0]);
    }
    void append(Cache& cache, const StridedRows& keys, const StridedRows* values, AppendCheck check) {
        cache.append(keys.rows, values ? &values->rows : nullptr, queue, check);
    }
    Cache fork(Cache& cache) { return cache.fork(queue); }
    void truncate(Cache& cache, Index count) { cache.truncate(count, queue); }
    void drop_before(Cache& cache, Index token, Index sinks) { cache.drop_before(token, sinks, queue); }
    std::vector<cuda::DeviceTile> table(const Cache& cache) {
        return {cache.device_tiles(), cache.device_tiles() + cache.tiles().size()};
    }
    std::vector<const std::byte*> recent_pages(const Cache& cache) {
        return {cache.device_recent_pages(), cache.device_recent_pages() + cache.recent_pages().size()};
    }
    /// Blocks of other sizes, and whose threads come in another order.
    void shuffle(int round) {
        queue.threads = round % 3 == 0 ? 32 : round % 3 == 1 ? 256 : 96;
        queue.backwards = round % 2 == 0;
    }
};

using AppendOnHost = AppendTest<HostMachine>;
KVPLANE_APPEND_TESTS(AppendOnHost);

// What depends on no recipe
// ----------------------------------------------------------------------------------

class OneCache : public testing::Test {
  protected:
    HostMachine machine_;
    TilePool host_;
    std::mt19937_64 random_{seed()};

    Matrix numbers(Index tokens, Index channels) {
        return rounded_to(append_numbers(random_, tokens, channels), ScalarType::float16);
    }
    static StridedRows rows(const Matrix& matrix, Index heads = 2) {
        return {matrix, heads, ScalarType::float16, StridedRows::Order::token_head_channel};
    }
    /// Appends as many tokens as there are rows; the sentence of a refusal.
    std::string append(CacheBase& cache, const StridedRows& keys, const StridedRows& values,
                       ErrorCode expected) {
        return refusal(expected, [&] { machine_.append(cache, keys, &values, AppendCheck::wait); });
    }
};

TEST_F(OneCache, WhatTheHostMustDoIsRefusedByName) {
    const auto sentence = [&](const std::string& recipe) {
        const CacheConfiguration c = configuration(recipe, 2, 4, 32, 48);
        CacheBase cache(c, machine_.pool);
        return append(cache, rows(numbers(1, 64)), rows(numbers(1, 96)), ErrorCode::option);
    };
    const std::string instead = "download(), KvCache::append() and upload() do it";
    EXPECT_EQ(
        sentence("key_favored:3:4+shaped_keys=1"),
        "kvplane: append on the device: recipe 'key_favored:3:4+shaped_keys=1' shapes keys, which is done on "
        "the host; " +
            instead);
    EXPECT_EQ(sentence("key_favored:4:2+value_widths=32x4/32x2/64x1"),
              "kvplane: append on the device: recipe 'key_favored:4:2+value_widths=32x4/32x2/64x1' gives "
              "tokens of values "
              "different widths, which is done on the host; " +
                  instead);
    for (const char* const clips : {"key_favored:4:4+key_clip=1", "key_favored:4:8+value_clip=1"})
        EXPECT_EQ(sentence(clips), std::string("kvplane: append on the device: recipe '") + clips +
                                       "' clips to the least squared error, which is done on the host; " +
                                       instead);
    EXPECT_NE(refusal(ErrorCode::option, [&] { CacheBase(configuration("svdq:2"), machine_.pool); })
                  .find("has yet to fit its basis"),
              std::string::npos);
    KvCache unfitted(configuration("latent:3:3"), host_), drafted(configuration("standard"), host_);
    const KvCache* const caches[] = {&unfitted};
    EXPECT_NE(refusal(ErrorCode::option, [&] { machine_.upload(caches); }).find("has yet to fit its basis"),
              std::string::npos);
    drafted.append_provisional(numbers(3, 64), numbers(3, 96));
    const KvCache* const drafts[] = {&drafted};
    EXPECT_EQ(refusal(ErrorCode::option, [&] { machine_.upload(drafts); }),
              "kvplane: upload: a cache with 3 provisional tokens, which stay on the host; expected accept() "
              "or truncate() "
              "before it");
    machine_.queue.most_shared = 16 * 1024;
    EXPECT_NE(
        sentence("standard").find("bytes of shared memory for heads of 32 and 48 channels, where 16384 are"),
        std::string::npos);
}

TEST_F(OneCache, WrongShapesAreRefused) {
    CacheBase cache(configuration("standard", 2, 4, 32, 48), machine_.pool);
    const StridedRows keys = rows(numbers(3, 64)), values = rows(numbers(3, 96));
    EXPECT_EQ(append(cache, rows(numbers(3, 96), 3), values, ErrorCode::shape),
              "kvplane: append: keys of 3 heads, expected 2");
    EXPECT_EQ(append(cache, keys, rows(numbers(2, 96)), ErrorCode::shape),
              "kvplane: append: 3 keys and 2 values, expected as many of each");
    StridedRows backwards = keys;
    backwards.rows.token_stride = -1;
    EXPECT_NE(append(cache, backwards, values, ErrorCode::shape).find("expected none below 0"),
              std::string::npos);
    StridedRows nowhere = keys;
    nowhere.rows.data = nullptr;
    EXPECT_EQ(append(cache, nowhere, values, ErrorCode::shape), "kvplane: append: keys at no address");
    EXPECT_NE(refusal(ErrorCode::option, [&] { machine_.append(cache, keys, nullptr, AppendCheck::wait); })
                  .find("keys alone"),
              std::string::npos);
    EXPECT_EQ(cache.tokens(), 0);
    EXPECT_NE(refusal(ErrorCode::index, [&] { machine_.truncate(cache, 1); }).find("truncate: to 1 of 0"),
              std::string::npos);
    EXPECT_NE(refusal(ErrorCode::index, [&] { machine_.drop_before(cache, 1, 0); }).find("token 1 of 0"),
              std::string::npos);
    machine_.append(cache, rows(numbers(0, 64)), &(const StridedRows&)rows(numbers(0, 96)),
                    AppendCheck::wait);
    EXPECT_EQ(cache.tokens(), 0);
}

/// A token takes one launch and no wait, but where a page or a tile begins; with the check it waits once.
TEST_F(OneCache, ATokenTakesOneLaunch) {
    for (const char* const recipe : {"standard", "fp16", "block32:8"}) {
        SCOPED_TRACE(recipe);
        CacheBase cache(configuration(recipe, 2, 4, 32, 48), machine_.pool);
        const StridedRows keys = rows(numbers(1, 64)), values = rows(numbers(1, 96));
        for (int t = 0; t < 10; ++t) machine_.append(cache, keys, &values, AppendCheck::none);
        machine_.queue.launches = machine_.queue.waits = machine_.queue.copies = 0;
        for (int t = 0; t < 20; ++t) machine_.append(cache, keys, &values, AppendCheck::none);
        EXPECT_EQ(machine_.queue.launches, 20);
        EXPECT_EQ(machine_.queue.waits, 0);
        EXPECT_EQ(machine_.queue.copies, 0);
        machine_.append(cache, keys, &values, AppendCheck::wait);
        EXPECT_EQ(machine_.queue.waits, 1);
    }
}

/// Without the check numbers that cannot be stored harm their own grids, and no others.
TEST_F(OneCache, UncheckedNumbersHarmTheirOwnGridsAlone) {
    const CacheConfiguration c = configuration("standard", 2, 4, 32, 48);
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 3e38f}) {
        Matrix keys = normal_matrix(random_, 300, 64), values = normal_matrix(random_, 300, 96);
        KvCache expected(c, host_);
        expected.append(keys, values);
        keys(50, 7) = bad;
        values(60, 50) = bad;
        CacheBase cache(c, machine_.pool);
        const StridedRows key_rows(keys, 2, ScalarType::float32, StridedRows::Order::token_head_channel),
            value_rows(values, 2, ScalarType::float32, StridedRows::Order::token_head_channel);
        machine_.append(cache, key_rows, &value_rows, AppendCheck::none);
        const KvCache found = machine_.download(cache, host_);
        const Matrix stored_keys = found.stored_keys(0, 300), wanted_keys = expected.stored_keys(0, 300),
                     stored_values = found.stored_values(0, 300),
                     wanted_values = expected.stored_values(0, 300);
        for (Index t = 0; t < 300; ++t) {
            for (Index channel = 0; channel < 64; ++channel) {
                if (channel == 7 && t >= 4 && t < 132) continue;  // the channel's grid in the first tile
                ASSERT_EQ(stored_keys(t, channel), wanted_keys(t, channel)) << t << ", " << channel;
            }
            for (Index channel = 0; channel < 96; ++channel) {
                if (t == 60 && channel >= 48) continue;  // the token's row of its head
                ASSERT_EQ(stored_values(t, channel), wanted_values(t, channel)) << t << ", " << channel;
            }
        }
    }
}

/// Narrowed tiles, and those that tokens were removed from, come back as they went, and the sequence goes on.
TEST_F(OneCache, EditedCachesGoOn) {
    for (const char* const recipe : {"standard", "key_favored:8:8", "block32:4", "fp16"}) {
        SCOPED_TRACE(recipe);
        const CacheConfiguration c = configuration(recipe, 2, 4, 32, 48);
        KvCache expected(c, host_);
        expected.append(numbers(600, 64), numbers(600, 96));
        if (std::string(recipe) == "key_favored:8:8") expected.narrow(100, 500, 4, 4);
        expected.remove(180, 190);
        if (c.recipe.every_token) expected.remove(580, 590);
        const KvCache* const one = &expected;
        CacheBase cache = std::move(machine_.upload({&one, 1})[0]);
        ASSERT_EQ(cache_difference(machine_.download(cache, host_), expected), "");
        for (const Index count : {1, 30, 200}) {
            const Matrix keys = numbers(count, 64), values = numbers(count, 96);
            expected.append(keys, values);
            const StridedRows value_rows = rows(values);
            machine_.append(cache, rows(keys), &value_rows, AppendCheck::wait);
            ASSERT_EQ(cache_difference(machine_.download(cache, host_), expected), "") << count << " tokens";
        }
    }
}

/// An append for which memory ends changes nothing.
TEST_F(OneCache, OutOfMemoryChangesNothing) {
    for (const char* const recipe : {"standard", "fp16"}) {
        SCOPED_TRACE(recipe);
        const CacheConfiguration c = configuration(recipe, 2, 4, 32, 48);
        KvCache expected(c, host_);
        FailingMemory memory;
        TilePool pool(&memory);
        CacheBase cache(c, pool);
        const Matrix keys = numbers(700, 64), values = numbers(700, 96);
        const auto some = [&](Index first, Index count) {
            const StridedRows key_rows = rows(keys.middleRows(first, count)),
                              value_rows = rows(values.middleRows(first, count));
            machine_.append(cache, key_rows, &value_rows, AppendCheck::wait);
        };
        some(0, 300);
        expected.append(keys.topRows(300), values.topRows(300));
        for (Index left = 0; left < 4; ++left) {
            pool.trim();
            memory.left = left;
            EXPECT_NE(refusal(ErrorCode::out_of_memory, [&] { some(300, 400); }).find("no memory"),
                      std::string::npos);
        }
        memory.left = std::numeric_limits<Index>::max();
        some(300, 400);
        expected.append(keys.bottomRows(400), values.bottomRows(400));
        EXPECT_EQ(cache_difference(machine_.download(cache, host_), expected), "");
    }
}

/// Nor does one of a fork, whose tables others see: they say what the state does.
TEST_F(OneCache, OutOfMemoryLeavesTheTablesOfAFork) {
    for (const char* const recipe : {"standard", "fp16"})
        for (const Index count : {1, 400}) {
            SCOPED_TRACE(std::string(recipe) + ", " + std::to_string(count) + " tokens");
            FailingMemory memory;
            TilePool pool(&memory);
            CacheBase first(configuration(recipe, 2, 4, 32, 48), pool);
            const Matrix keys = numbers(292 + count, 64), values = numbers(292 + count, 96);
            const auto append = [&](CacheBase& cache, Index from, Index some) {
                const StridedRows key_rows = rows(keys.middleRows(from, some)),
                                  value_rows = rows(values.middleRows(from, some));
                machine_.append(cache, key_rows, &value_rows, AppendCheck::wait);
            };
            const auto expect_tables = [&](const CacheBase& cache, Index tokens) {
                ASSERT_EQ(cache.tokens(), tokens);
                ASSERT_EQ(cache.tiles().size(), cache.state().tiles.size());
                const auto table = machine_.table(cache);
                for (std::size_t t = 0; t < table.size(); ++t) {
                    ASSERT_EQ(table[t], cache.tiles()[t]) << "tile " << t;
                    ASSERT_EQ(table[t].tokens, cache.state().tiles[t].tokens) << "tile " << t;
                }
                ASSERT_EQ(cache.recent_pages().size(), cache.state().recent.size());
            };
            append(first, 0, 292);
            int failures = 0;
            for (Index left = 0;; ++left) {
                CacheBase fork = machine_.fork(first);
                pool.trim();
                memory.left = left;
                const auto append_all = [&] { append(fork, 292, count); };
                bool fails = false;
                try {
                    append_all();
                } catch (const Error& error) {
                    ASSERT_EQ(error.code(), ErrorCode::out_of_memory);
                    fails = true;
                    ++failures;
                }
                memory.left = std::numeric_limits<Index>::max();
                ASSERT_NO_FATAL_FAILURE(expect_tables(fork, fails ? 292 : 292 + count));
                ASSERT_NO_FATAL_FAILURE(expect_tables(first, 292));
                if (!fails) break;
                // It goes on as if nothing had been.
                append_all();
                ASSERT_NO_FATAL_FAILURE(expect_tables(fork, 292 + count));
            }
            EXPECT_GE(failures, 2);
        }
}

/// Where memory ends in the middle of a tile that goes on, the tile's next tokens take the place of traces.
TEST_F(OneCache, OutOfMemoryLeavesNoTraceInATileThatGoesOn) {
    for (const char* const recipe : {"fp16", "block32:4", "kivi:4"}) {
        SCOPED_TRACE(recipe);
        const CacheConfiguration c = configuration(recipe, 2, 4, 32, 64);
        const Matrix keys = numbers(500, 64), values = numbers(500, 128);
        const auto some = [&](CacheBase& cache, Index from, Index count) {
            const StridedRows key_rows = rows(keys.middleRows(from, count)),
                              value_rows = rows(values.middleRows(from, count));
            machine_.append(cache, key_rows, &value_rows, AppendCheck::wait);
        };
        FailingMemory memory;
        TilePool pool(&memory);
        CacheBase cache(c, pool);
        some(cache, 0, 50);
        for (const Index left : {0, 1, 2}) {
            pool.trim();
            memory.left = left;
            EXPECT_NE(refusal(ErrorCode::out_of_memory, [&] { some(cache, 50, 450); }), "");
        }
        memory.left = std::numeric_limits<Index>::max();
        some(cache, 50, 3);
        KvCache expected(c, host_);
        expected.append(keys.topRows(50), values.topRows(50));
        expected.append(keys.middleRows(50, 3), values.middleRows(50, 3));
        EXPECT_EQ(cache_difference(machine_.download(cache, host_), expected), "");
    }
}

}  // namespace
