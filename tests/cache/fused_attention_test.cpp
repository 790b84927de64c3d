// Attention on packed bits in a cache: threads, workspaces, memory.
#include <gtest/gtest.h>

#include <cstdlib>
#include <new>

#include "cache_support.hpp"
#include "kvplane/attention/executor.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {
std::atomic<long> allocations{0};
std::atomic<bool> out_of_memory{false};
}  // namespace

// Every allocation of this program. Not inlined, or g++ would see free() meet operator new.
__attribute__((noinline)) void* operator new(std::size_t size) {
    ++allocations;
    void* const memory = out_of_memory ? nullptr : std::malloc(size ? size : 1);
    if (!memory) throw std::bad_alloc();
    return memory;
}
__attribute__((noinline)) void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    ++allocations;
    return std::malloc(size ? size : 1);
}
__attribute__((noinline)) void operator delete(void* memory) noexcept {
    std::free(memory);
}
__attribute__((noinline)) void operator delete(void* memory, std::size_t) noexcept {
    std::free(memory);
}

namespace {

using namespace kvplane;
using namespace kvplane_test;

/// Items from the last to the first, workers in turn.
class Backwards final : public Executor {
  public:
    Index workers() const noexcept override { return 3; }
    void run(Index items, Body body, void* context) noexcept override {
        for (Index item = items - 1; item >= 0; --item) body(context, item, item % 3);
    }
};

/// While its bodies run, there is no memory.
class Starving final : public Executor {
  public:
    Index workers() const noexcept override { return 2; }
    void run(Index items, Body body, void* context) noexcept override {
        out_of_memory = true;
        for (Index item = 0; item < items; ++item) body(context, item, item % 2);
        out_of_memory = false;
    }
};

std::vector<std::string> fused_recipes() {
    return {"key_favored:8:8",
            "standard",
            "compact+recent=0",
            "kivi:2",
            "latent:3:3+fit_tokens=256",
            "latent:3:3+heads_together=1+fit_tokens=256",
            "weighted:3:3+fit_tokens=256"};
}

Matrix attend(const KvCache& cache, const Matrix& queries, Executor* executor) {
    AttentionWorkspace workspace(executor);
    Matrix output(queries.rows(), cache.configuration().query_heads * cache.configuration().value_head_dim);
    cache.attend(queries, output, {}, workspace);
    return output;
}

TEST(FusedAttention, DoesNotDependOnTheNumberOfThreads) {
    std::mt19937_64 random(seed());
    TilePool pool;
    for (const std::string& recipe : fused_recipes()) {
        const CacheConfiguration c = configuration(recipe);
        KvCache cache(c, pool);
        kvplane_test::append(cache, normal_matrix(random, 5000, 64), normal_matrix(random, 5000, 96));
        for (const Index tokens : {1, 5, 8}) {
            const Matrix q = normal_matrix(random, tokens, 128);
            const Matrix serial = attend(cache, q, nullptr);
            for (const Index threads : {1, 2, 5}) {
                ThreadExecutor executor(threads);
                for (int again = 0; again < 3; ++again)
                    ASSERT_EQ(attend(cache, q, &executor), serial) << recipe;
            }
            Backwards backwards;
            ASSERT_EQ(attend(cache, q, &backwards), serial) << recipe;
        }
    }
}

/// Prefill: blocks of query tokens and heads, of which the last is not full.
TEST(BlockedAttention, DoesNotDependOnTheNumberOfThreads) {
    std::mt19937_64 random(seed());
    TilePool pool;
    for (const char* recipe :
         {"fp16", "standard", "latent:3:3+fit_tokens=256", "latent:3:3+heads_together=1+fit_tokens=256",
          "latent:3:3+frame=before_rope+fit_tokens=256"})
        for (const double key_fraction : {1.0, 0.25}) {
            const CacheConfiguration c = configuration(recipe);
            if (key_fraction < 1.0 && !c.recipe.latents) continue;
            KvCache cache(c, pool);
            kvplane_test::append(cache, normal_matrix(random, 900, 64), normal_matrix(random, 900, 96));
            const Matrix q = normal_matrix(random, 301, 128);
            AttentionParameters parameters;
            parameters.key_fraction = key_fraction;
            Matrix serial(301, 4 * 48), other(301, 4 * 48);
            AttentionWorkspace alone;
            cache.attend(q, serial, parameters, alone);
            // Token by token, each with the tokens after it taken back.
            for (const Index tokens : {1, 100, 173}) {
                KvCache shorter = cache.fork();
                shorter.truncate(900 - 301 + tokens);
                if (shorter.packed_tokens() % tile_tokens != 0 || key_fraction < 1.0) continue;
                Matrix first(tokens, 4 * 48);
                shorter.attend(q.topRows(tokens), first, parameters, alone);
                EXPECT_LE((first - serial.topRows(tokens)).cwiseAbs().maxCoeff(), 2e-2f) << recipe;
            }
            for (const Index threads : {2, 5}) {
                ThreadExecutor executor(threads);
                AttentionWorkspace workspace(&executor);
                cache.attend(q, other, parameters, workspace);
                ASSERT_EQ(other, serial) << recipe;
            }
            Backwards backwards;
            AttentionWorkspace workspace(&backwards);
            cache.attend(q, other, parameters, workspace);
            ASSERT_EQ(other, serial) << recipe;
        }
}

/// Memory that ends in a worker ends the call, not the program.
TEST(BlockedAttention, ReportsThatMemoryEnded) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache(configuration("standard"), pool);
    kvplane_test::append(cache, normal_matrix(random, 900, 64), normal_matrix(random, 900, 96));
    const Matrix q = normal_matrix(random, 200, 128);
    Matrix output(200, 4 * 48);
    Starving starving;
    AttentionWorkspace workspace(&starving), alone;
    EXPECT_THROW(cache.attend(q, output, {}, workspace), std::bad_alloc);
    cache.attend(q, output, {}, alone);
    // The fused path needs none: only its first call of a shape takes memory, outside the bodies.
    Matrix starved(2, 4 * 48);
    cache.attend(q.topRows(2), starved, {}, workspace);
    Matrix two(2, 4 * 48);
    cache.attend(q.topRows(2), two, {}, alone);
    EXPECT_EQ(starved, two);
}

TEST(FusedAttention, AllocatesNothingOnceItHasSeenTheShape) {
    std::mt19937_64 random(seed());
    TilePool pool;
    for (const std::string& recipe : fused_recipes()) {
        KvCache cache(configuration(recipe), pool);
        kvplane_test::append(cache, normal_matrix(random, 3000, 64), normal_matrix(random, 3000, 96));
        const Matrix q = normal_matrix(random, 2, 128);
        Matrix output(2, 4 * 48);
        ThreadExecutor executor(2);
        AttentionWorkspace workspace(&executor);
        cache.attend(q, output, {}, workspace);
        const Matrix first = output;
        const long before = allocations;
        for (int again = 0; again < 5; ++again) cache.attend(q, output, {}, workspace);
        EXPECT_EQ(allocations, before) << recipe;
        EXPECT_EQ(output, first);
        // Without a workspace: the thread's own.
        cache.attend(q, output);
        const long then = allocations;
        cache.attend(q, output);
        EXPECT_EQ(allocations, then) << recipe;
        EXPECT_EQ(output, first);
    }
}

TEST(FusedAttention, OneWorkspaceServesCachesOfAnyShape) {
    std::mt19937_64 random(seed());
    TilePool pool;
    AttentionWorkspace shared;
    for (const Index dim : {128, 16, 80, 256})
        for (const char* recipe : {"standard", "latent:3:3+heads_together=1+fit_tokens=256", "fp16"}) {
            const CacheConfiguration c = configuration(recipe, 2, 6, dim, dim / 2);
            KvCache cache(c, pool);
            kvplane_test::append(cache, normal_matrix(random, 700, 2 * dim), normal_matrix(random, 700, dim));
            const Matrix q = normal_matrix(random, 3, 6 * dim);
            Matrix output(3, 3 * dim);
            cache.attend(q, output, {}, shared);
            EXPECT_EQ(output, attend(cache, q, nullptr)) << recipe << " " << dim;
        }
}

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

}  // namespace
