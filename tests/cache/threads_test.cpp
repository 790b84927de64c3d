// Several threads at once: one team for several workspaces, attention within a body of the team, and forks
// that are read, written and given back while others do the same. .ci/run has the thread sanitizer look at
// all of it.
//
// Every output is compared with that of one thread, bit for bit.
#include <gtest/gtest.h>

#include <atomic>
#include <deque>
#include <thread>
#include <vector>

#include "cache_support.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/recipe_names.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

class Threads : public testing::TestWithParam<std::string> {
  protected:
    Threads() {
        for (const Index tokens : {40, 300, 2300}) {
            caches_.emplace_back(configuration_, pool_);
            append(caches_.back(), keys(tokens), values(tokens));
        }
        for (const Index query_tokens : {1, 3, 8, 20})
            for (const KvCache& cache : caches_) {
                asks_.push_back({&cache, normal_matrix(random_, query_tokens, 4 * 32), {}});
                asks_.back().expected = attend(cache, asks_.back().queries);
            }
    }
    Matrix keys(Index tokens) { return normal_matrix(random_, tokens, 2 * 32, 2.0f); }
    Matrix values(Index tokens) { return normal_matrix(random_, tokens, 2 * 48); }

    struct Ask {
        const KvCache* cache;
        Matrix queries, expected;
    };
    /// How many of all asks get another answer than from one thread.
    int differing(AttentionWorkspace& workspace) const {
        int count = 0;
        for (const Ask& ask : asks_) {
            Matrix output(ask.queries.rows(), 4 * 48);
            ask.cache->attend(ask.queries, output, {}, workspace);
            count += output != ask.expected;
        }
        return count;
    }
    /// Runs body(i) in `count` threads at once.
    template <class Body>
    static void run(int count, const Body& body) {
        std::vector<std::thread> threads;
        for (int i = 0; i < count; ++i) threads.emplace_back([&body, i] { body(i); });
        for (std::thread& thread : threads) thread.join();
    }

    static constexpr int times = sanitized ? 2 : 3;
    CacheConfiguration configuration_ = configuration(GetParam());
    std::mt19937_64 random_{seed()};
    TilePool pool_;
    std::deque<KvCache> caches_;
    std::vector<Ask> asks_;
};

TEST_P(Threads, ShareATeamFromWorkspacesOfTheirOwn) {
    ThreadExecutor team(3);
    std::atomic<int> wrong{0};
    run(2, [&](int) {
        AttentionWorkspace workspace(&team);
        for (int time = 0; time < times; ++time) wrong += differing(workspace);
    });
    EXPECT_EQ(wrong, 0);
}

/// All or nothing, and the same bytes, however many workers share the tokens and heads.
TEST_P(Threads, AppendTheBytesOfOneThread) {
    ThreadExecutor team(3);
    AttentionWorkspace workspace(&team);
    FailingMemory memory;
    TilePool pool(&memory);
    KvCache alone(configuration_, pool_), together(configuration_, pool);
    const auto append_together = [&](const Matrix& k, const Matrix& v) {
        if (looks_at_queries(together))
            together.append(k, v, queries_of(configuration_, k), workspace);
        else
            together.append(k, v, workspace);
    };
    for (const Index count : {1, 150, 7, 9, 450, 64}) {
        const Matrix k = keys(count);
        Matrix v = values(count);
        const std::vector<std::byte> before = to_bytes(together);
        for (Index refused = 0;; ++refused) {
            pool.trim();
            memory.left = refused;
            try {
                append_together(k, v);
                break;
            } catch (const Error& error) {
                ASSERT_EQ(error.code(), ErrorCode::out_of_memory) << error.what();
            }
            ASSERT_EQ(to_bytes(together), before) << "after the failure of allocation " << refused;
        }
        memory.left = std::numeric_limits<Index>::max();
        append(alone, k, v);
        ASSERT_EQ(to_bytes(together), to_bytes(alone)) << count << " tokens";
        v(count - 1, 77) = std::numeric_limits<float>::quiet_NaN();
        EXPECT_NE(refusal(ErrorCode::not_finite, [&] { append_together(k, v); })
                      .find("values: the value at token " + std::to_string(count - 1)),
                  std::string::npos);
        ASSERT_EQ(to_bytes(together), to_bytes(alone)) << "after a refusal";
    }
}

/// An engine's own loop over layers or sequences, in the team that attention is given as well.
TEST_P(Threads, AttendWithinABodyOfTheTeam) {
    ThreadExecutor team(3);
    std::atomic<int> wrong{0};
    std::deque<AttentionWorkspace> workspaces;
    for (Index item = 0; item < 6; ++item) workspaces.emplace_back(&team);
    // From two threads, so that a body runs while another run waits for its turn.
    run(2, [&](int thread) {
        for (int time = 0; time < times; ++time)
            detail::run_items(team, 3, [&](Index item, Index) {
                wrong += differing(workspaces[static_cast<std::size_t>(3 * thread + item)]);
            });
    });
    EXPECT_EQ(wrong, 0);
}

/// Eight threads: some attend what is shared, others go on with forks of it, one gives unused pages back,
/// and two decode batches.
TEST_P(Threads, AttendForksWhileOthersAppendTruncateAndTrim) {
    const Matrix more_keys = keys(170), more_values = values(170);
    const auto go_on = [&](KvCache& fork, int round) {
        append(fork, more_keys, more_values);
        if (fork.tokens() > 400) fork.drop_before(200);
        append_provisional(fork, more_keys.topRows(5), more_values.topRows(5));
        fork.truncate(fork.tokens() - 20 - round);
        append(fork, more_keys.topRows(60 + round), more_values.topRows(60 + round));
    };
    std::vector<std::vector<std::byte>> expected_bytes;
    for (const KvCache& cache : caches_) {
        KvCache fork = cache.fork();
        for (int round = 0; round < times; ++round) go_on(fork, round);
        expected_bytes.push_back(to_bytes(fork));
    }
    std::vector<const KvCache*> batch;
    std::vector<Index> offsets{0};
    Matrix batch_queries(12, 4 * 32), batch_expected(12, 4 * 48);
    for (std::size_t ask = 0; ask < 6; ++ask) {  // of 1 and of 3 query tokens
        const Index first = offsets.back(), count = asks_[ask].queries.rows();
        batch.push_back(asks_[ask].cache);
        offsets.push_back(first + count);
        batch_queries.middleRows(first, count) = asks_[ask].queries;
        batch_expected.middleRows(first, count) = asks_[ask].expected;
    }
    ASSERT_EQ(offsets.back(), 12);

    ThreadExecutor team(2);
    std::atomic<int> wrong{0}, busy{7};
    run(8, [&](int thread) {
        if (thread == 7) {
            while (busy > 0) pool_.trim(), std::this_thread::yield();
            return;
        }
        AttentionWorkspace workspace(thread % 2 == 0 ? &team : nullptr);
        if (thread < 2) {
            for (int time = 0; time < times; ++time) wrong += differing(workspace);
        } else if (thread < 4) {
            for (int time = 0; time < 4 * times; ++time) {
                Matrix output = Matrix::Constant(12, 4 * 48, -7.0f);
                KvCache::attend_batch(batch, offsets, batch_queries, output, {}, workspace);
                wrong += output != batch_expected;
            }
        } else {
            const auto which = static_cast<std::size_t>(thread - 4);
            for (int time = 0; time < 2; ++time) {
                KvCache fork = caches_[which].fork();
                for (int round = 0; round < times; ++round) {
                    go_on(fork, round);
                    const Ask& ask = asks_[which];
                    Matrix once(1, 4 * 48), again(1, 4 * 48);
                    fork.attend(ask.queries, once, {}, workspace);
                    KvCache second = fork.fork();
                    second.attend(ask.queries, again, {}, workspace);
                    wrong += once != again;
                }
                wrong += to_bytes(fork) != expected_bytes[which];
            }
        }
        --busy;
    });
    EXPECT_EQ(wrong, 0);
    AttentionWorkspace workspace;
    EXPECT_EQ(differing(workspace), 0) << "what is shared has changed";
    pool_.trim();
    EXPECT_EQ(pool_.unused_pages(), 0);
}

INSTANTIATE_TEST_SUITE_P(Recipes, Threads,
                         testing::ValuesIn(thinned(std::vector<std::string>{
                             "standard", "fp16", "block32:4", "kivi:2", "key_favored:8:8",
                             "latent:3:3+fit_tokens=130", "svdq:2+fit_tokens=140", "compact"})),
                         test_name);

}  // namespace
