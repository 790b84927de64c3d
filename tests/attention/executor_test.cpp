// A team of threads: every item once, callers in turns, and a system that has no more threads.
#include "kvplane/attention/executor.hpp"

#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <thread>
#include <vector>

#include "test_support.hpp"

namespace kvplane {
namespace {

using kvplane_test::refusal;

TEST(ThreadExecutor, RunsEveryItemOnceAndNoWorkerTwiceAtATime) {
    refusal(ErrorCode::option, [] { ThreadExecutor none(0); });
    for (const Index threads : {1, 2, 4}) {
        ThreadExecutor executor(threads);
        ASSERT_EQ(executor.workers(), threads);
        struct Seen {
            std::vector<std::atomic<int>> items = std::vector<std::atomic<int>>(1000),
                                          busy = std::vector<std::atomic<int>>(4);
            std::atomic<int> clashes{0};
        };
        for (int round = 0; round < 50; ++round) {
            Seen seen;
            executor.run(
                1000,
                [](void* context, Index item, Index worker) {
                    Seen& s = *static_cast<Seen*>(context);
                    if (s.busy[static_cast<std::size_t>(worker)]++ != 0) ++s.clashes;
                    ++s.items[static_cast<std::size_t>(item)];
                    --s.busy[static_cast<std::size_t>(worker)];
                },
                &seen);
            EXPECT_EQ(seen.clashes, 0);
            for (const auto& count : seen.items) ASSERT_EQ(count, 1);
        }
        executor.run(
            0, [](void*, Index, Index) { FAIL(); }, nullptr);
    }
}

TEST(ThreadExecutor, RunsOfSeveralThreadsTakeTurns) {
    ThreadExecutor executor(3);
    std::atomic<long> sum{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([&] {
            for (int round = 0; round < 200; ++round)
                executor.run(
                    10,
                    [](void* context, Index item, Index) {
                        *static_cast<std::atomic<long>*>(context) += item;
                    },
                    &sum);
        });
    for (std::thread& caller : callers) caller.join();
    EXPECT_EQ(sum, 4 * 200 * 45);
}

TEST(ThreadExecutor, ABodyMayStartRunsOfItsOwnExecutor) {
    ThreadExecutor executor(3), other(2);
    struct Context {
        ThreadExecutor *executor, *other;
        std::atomic<long> sum{0};
    } context{&executor, &other};
    const auto add = [](void* sum, Index item, Index) { *static_cast<std::atomic<long>*>(sum) += item; };
    for (int round = 0; round < 50; ++round)
        executor.run(
            7,
            [](void* given, Index, Index) {
                auto& all = *static_cast<Context*>(given);
                const auto add_item = [](void* sum, Index item, Index worker) {
                    EXPECT_LE(worker, 1);
                    *static_cast<std::atomic<long>*>(sum) += item;
                };
                all.executor->run(10, add_item, &all.sum);
                all.other->run(10, add_item, &all.sum);
            },
            &context);
    EXPECT_EQ(context.sum, 50 * 7 * 2 * 45);
    // Afterwards the calling thread's runs are shared out again.
    std::atomic<long> sum{0};
    executor.run(100, add, &sum);
    EXPECT_EQ(sum, 4950);
}

TEST(ThreadExecutor, RefusesWhereTheSystemCannotStartSoManyThreads) {
#if defined(__GLIBC__)
    // Stacks of 10 TB: several fit into the address space, 40 do not. Sanitizers would clear them.
#if defined(__SANITIZE_ADDRESS__) || defined(__clang__)
    const std::size_t stack = std::size_t{1} << 47;
#else
    const std::size_t stack = std::size_t{10} << 40;
#endif
    pthread_attr_t before, huge;
    ASSERT_EQ(pthread_getattr_default_np(&before), 0);
    pthread_attr_init(&huge);
    ASSERT_EQ(pthread_attr_setstacksize(&huge, stack), 0);
    ASSERT_EQ(pthread_setattr_default_np(&huge), 0);
    const std::string sentence = refusal(ErrorCode::out_of_memory, [] { ThreadExecutor executor(40); });
    pthread_setattr_default_np(&before);
    EXPECT_NE(sentence.find(" of 40 threads"), std::string::npos) << sentence;
    ThreadExecutor executor(2);
    EXPECT_EQ(executor.workers(), 2);
#else
    GTEST_SKIP() << "there is no portable way to run out of threads";
#endif
}

}  // namespace
}  // namespace kvplane
