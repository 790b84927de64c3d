// The kernels of appends, block by block on the host: the bytes of KvCache, page for page.
#include <gtest/gtest.h>

#include <memory>

#include "append_cases.hpp"
#include "host_queue.hpp"
#include "kvplane/cuda/cache_base.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;
using cuda::AppendCheck;
using cuda::detail::CacheBase;

class AppendOnDevice : public testing::TestWithParam<AppendCase> {
  protected:
    CacheConfiguration configuration_ = configuration_of(GetParam());
    std::mt19937_64 random_{seed()};
    DirtyMemory memory_;
    TilePool host_, device_{&memory_};
    HostQueue queue_;

    struct Tokens {
        Matrix keys, values;
    };
    Tokens tokens(Index count, ScalarType type) {
        const auto& c = configuration_;
        return {rounded_to(append_numbers(random_, count, c.kv_heads * c.key_head_dim), type),
                rounded_to(append_numbers(random_, count, c.kv_heads * c.value_head_dim), type)};
    }
    void append_host(KvCache& cache, const Tokens& tokens) {
        configuration_.values_in_keys ? cache.append(tokens.keys)
                                      : kvplane_test::append(cache, tokens.keys, tokens.values);
    }
    void append_device(CacheBase& cache, const Tokens& tokens, ScalarType type, StridedRows::Order order,
                       AppendCheck check = AppendCheck::wait) {
        const StridedRows keys(tokens.keys, configuration_.kv_heads, type, order),
            values(tokens.values, configuration_.kv_heads, type, order);
        cache.append(keys.rows, configuration_.values_in_keys ? nullptr : &values.rows, queue_, check);
    }
    static Tokens part(const Tokens& tokens, Index first, Index count) {
        return {tokens.keys.middleRows(first, count), tokens.values.middleRows(first, count)};
    }
    CacheBase uploaded(const KvCache& cache) {
        const KvCache* const one = &cache;
        return std::move(CacheBase::upload({&one, 1}, device_, queue_)[0]);
    }
    KvCache downloaded(CacheBase& cache) {
        CacheBase* const one = &cache;
        return std::move(CacheBase::download({&one, 1}, host_, queue_)[0]);
    }
    /// A cache that knows its basis, where it has one.
    KvCache start() {
        KvCache cache(configuration_, host_);
        if (!configuration_.fits_basis()) return cache;
        Index count = 300;
        const Tokens first = tokens(count, ScalarType::float32);
        append_host(cache, first);
        EXPECT_NE(cache.state().layout, nullptr);
        return cache;
    }
    /// The table of tiles says what the state does.
    void expect_table(const CacheBase& cache) {
        const auto& tiles = cache.state().tiles;
        ASSERT_EQ(cache.tiles().size(), tiles.size());
        for (std::size_t t = 0; t < tiles.size(); ++t) {
            const cuda::DeviceTile& tile = cache.device_tiles()[t];
            ASSERT_EQ(tile, cache.tiles()[t]) << "tile " << t;
            ASSERT_EQ(tile.page, tiles[t].page) << "tile " << t;
            ASSERT_EQ(tile.first, tiles[t].first);
            ASSERT_EQ(tile.tokens, tiles[t].tokens);
            ASSERT_EQ(tile.row, tiles[t].row);
            ASSERT_EQ(tile.shift, tiles[t].shift);
        }
        ASSERT_EQ(cache.recent_pages().size(), cache.state().recent.size());
        for (std::size_t p = 0; p < cache.recent_pages().size(); ++p)
            ASSERT_EQ(cache.device_recent_pages()[p], cache.state().recent[p].data());
    }
};

TEST_P(AppendOnDevice, GivesTheBytesOfTheHost) {
    int round = 0;
    for (const ScalarType type : {ScalarType::float32, ScalarType::float16, ScalarType::bfloat16})
        for (const auto order :
             {StridedRows::Order::token_head_channel, StridedRows::Order::head_token_channel,
              StridedRows::Order::channels_apart}) {
            if (sanitized && round++ % 3 != 0) continue;
            SCOPED_TRACE("type " + std::to_string(static_cast<int>(type)) + ", order " +
                         std::to_string(static_cast<int>(order)));
            KvCache expected = start();
            CacheBase cache = uploaded(expected);
            ASSERT_EQ(cache_difference(downloaded(cache), expected), "");
            for (const Index count : {1, 2, 5, 31, 64, 128, 97, 300, 1, 131}) {
                SCOPED_TRACE(std::to_string(count) + " tokens after " + std::to_string(expected.tokens()));
                const Tokens more = tokens(count, type);
                append_host(expected, more);
                append_device(cache, more, type, order,
                              count % 2 == 0 ? AppendCheck::wait : AppendCheck::none);
                ASSERT_EQ(cache_difference(downloaded(cache), expected), "");
                ASSERT_NO_FATAL_FAILURE(expect_table(cache));
                ASSERT_EQ(cache.bytes(), expected.bytes());
            }
        }
}

TEST_P(AppendOnDevice, ChunksOfAnySizeGiveTheSameBytes) {
    for (int round = 0, all = rounds(sanitized ? 1 : 3); round < all; ++round) {
        KvCache expected = start();
        CacheBase cache = uploaded(expected);
        const Tokens more = tokens(420, ScalarType::float16);
        append_host(expected, more);
        queue_.threads = round % 2 == 0 ? 32 : 256;
        for (Index done = 0, count; done < 420; done += count) {
            count = std::uniform_int_distribution<Index>(0, 3)(random_) != 0
                        ? std::uniform_int_distribution<Index>(1, 3)(random_)
                        : std::uniform_int_distribution<Index>(1, 170)(random_);
            count = std::min(count, 420 - done);
            append_device(cache, part(more, done, count), ScalarType::float16,
                          StridedRows::Order::token_head_channel);
        }
        ASSERT_EQ(cache_difference(downloaded(cache), expected), "");
    }
}

INSTANTIATE_TEST_SUITE_P(Recipes, AppendOnDevice, testing::ValuesIn(append_cases()),
                         [](const testing::TestParamInfo<AppendCase>& info) {
                             return std::to_string(info.index);
                         });
INSTANTIATE_TEST_SUITE_P(Latents, AppendOnDevice, testing::ValuesIn(latent_cases()),
                         [](const testing::TestParamInfo<AppendCase>& info) {
                             return std::to_string(info.index);
                         });
INSTANTIATE_TEST_SUITE_P(ValuesInKeys, AppendOnDevice, testing::ValuesIn(values_in_keys_cases()),
                         [](const testing::TestParamInfo<AppendCase>& info) {
                             return std::to_string(info.index);
                         });

}  // namespace
