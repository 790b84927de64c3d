// Attention on packed bits in a cache: threads, workspaces, memory.
#include <gtest/gtest.h>

#include <cstdlib>
#include <new>

#include "cache_support.hpp"
#include "kvplane/attention/executor.hpp"
#include "kvplane/read/exponents.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {
std::atomic<long> allocations{0};
std::atomic<bool> out_of_memory{false};
std::atomic<long> allocations_left{-1};  // negative: no end
}  // namespace

// Every allocation of this program. Not inlined, or g++ would see free() meet operator new.
__attribute__((noinline)) void* operator new(std::size_t size) {
    ++allocations;
    if (allocations_left >= 0 && allocations_left-- == 0) throw std::bad_alloc();
    void* const memory = out_of_memory ? nullptr : std::malloc(size ? size : 1);
    if (!memory) throw std::bad_alloc();
    return memory;
}
__attribute__((noinline)) void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    ++allocations;
    return std::malloc(size ? size : 1);
}
__attribute__((noinline)) void* operator new(std::size_t size, std::align_val_t alignment) {
    ++allocations;
    if (allocations_left >= 0 && allocations_left-- == 0) throw std::bad_alloc();
    const auto step = static_cast<std::size_t>(alignment);
    void* const memory = out_of_memory ? nullptr : std::aligned_alloc(step, (size / step + 1) * step);
    if (!memory) throw std::bad_alloc();
    return memory;
}
__attribute__((noinline)) void operator delete(void* memory) noexcept {
    std::free(memory);
}
__attribute__((noinline)) void operator delete(void* memory, std::align_val_t) noexcept {
    std::free(memory);
}
__attribute__((noinline)) void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
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
            "fp16",
            "key_favored:16:4",
            "standard",
            "compact+recent=0",
            "kivi:2",
            "block32:8",
            "block32:4:rotated",
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
        for (const double key_fraction : {1.0, 0.0, 0.25}) {
            const CacheConfiguration c = configuration(recipe);
            if (key_fraction > 0.0 && key_fraction < 1.0 && !c.recipe.latents) continue;
            KvCache cache(c, pool);
            kvplane_test::append(cache, normal_matrix(random, 900, 64), normal_matrix(random, 900, 96));
            const Matrix q = normal_matrix(random, 301, 128);
            AttentionParameters parameters;
            if (key_fraction > 0.0)
                parameters.key_fraction = key_fraction;
            else
                parameters.decode_tiles = true;
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

/// Passes of query tokens, and what they leave out because no query sees it, change no bit of an output.
TEST(FusedAttention, OfManyQueryTokensIsThatOfEachAlone) {
    std::mt19937_64 random(seed());
    TilePool pool;
    constexpr Index tokens = 5000, asked = 75;
    ThreadExecutor team(8);
    AttentionWorkspace of_eight(&team);
    for (const char* recipe : {"fp16", "standard", "smallest", "key_favored:8:8", "key_favored:4:4",
                               "latent:3:3+fit_tokens=256", "latent:3:3+heads_together=1+fit_tokens=256"}) {
        KvCache cache(configuration(recipe), pool);
        kvplane_test::append(cache, normal_matrix(random, tokens, 64), normal_matrix(random, tokens, 96));
        const Matrix q = normal_matrix(random, asked, 128), bias = normal_matrix(random, 4 * asked, tokens);
        for (const int variant : {0, 1, 2, 3, 4}) {
            AttentionParameters all;
            // The first query of the last pass sees one token of a tile; of the middle pass, the last one does.
            if (variant == 1) all.sliding_window = 358, all.sinks = 7;
            if (variant == 2) all.causal = false;
            if (variant == 3) all.bias = &bias, all.softcap = 5.0;
            if (variant == 4) all.position = 2266, all.sliding_window = 1;
            Matrix output(asked, 4 * 48), sums, weights, added;
            AttentionWorkspace workspace;
            cache.attend(q, output, all, workspace, {.log_sum_exp = &sums});
            Matrix with_weights(asked, 4 * 48);
            cache.attend(q, with_weights, all, workspace, {.token_weights = &weights});
            EXPECT_EQ(with_weights, output) << recipe << ", variant " << variant;
            // Eight workers share out the row blocks of a head.
            Matrix of_team(asked, 4 * 48), team_sums;
            cache.attend(q, of_team, all, of_eight, {.log_sum_exp = &team_sums});
            EXPECT_EQ(of_team, output) << recipe << ", variant " << variant;
            EXPECT_EQ(team_sums, sums) << recipe << ", variant " << variant;
            for (Index i = 0; i < asked; ++i) {
                AttentionParameters one = all;
                one.position = all.first_position(tokens, asked) + i;
                Matrix row_bias(4, tokens), row(1, 4 * 48), row_sums, row_weights;
                for (Index head = 0; head < 4; ++head) row_bias.row(head) = bias.row(head * asked + i);
                if (all.bias) one.bias = &row_bias;
                cache.attend(q.row(i), row, one, workspace,
                             {.log_sum_exp = &row_sums, .token_weights = &row_weights});
                ASSERT_EQ(row, output.row(i)) << recipe << ", variant " << variant << ", token " << i;
                ASSERT_EQ(row_sums, sums.row(i)) << recipe << ", variant " << variant << ", token " << i;
                added = i == 0 ? row_weights : Matrix(added + row_weights);
            }
            EXPECT_LT((added - weights).cwiseAbs().maxCoeff(), 1e-4f) << recipe << ", variant " << variant;
        }
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
    AttentionParameters decoding;
    decoding.decode_tiles = true;
    EXPECT_THROW(cache.attend(q, output, decoding, workspace), std::bad_alloc);
    cache.attend(q, output, decoding, alone);
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
        // With sums of weights, in matrices of the caller's.
        Matrix sums, weights;
        cache.attend(q, output, {}, workspace, {.log_sum_exp = &sums, .token_weights = &weights});
        const long with_more = allocations;
        for (int again = 0; again < 5; ++again)
            cache.attend(q, output, {}, workspace, {.log_sum_exp = &sums, .token_weights = &weights});
        EXPECT_EQ(allocations, with_more) << recipe;
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

// -- Read policies -----------------------------------------------------------------------------------------

struct PolicyRead {
    Matrix output;
    ReadReport report;
};
PolicyRead read(const KvCache& cache, const Matrix& queries, const ReadPolicy& policy,
                Executor* executor = nullptr) {
    AttentionWorkspace workspace(executor);
    PolicyRead result{
        Matrix(queries.rows(), cache.configuration().query_heads * cache.configuration().value_head_dim), {}};
    AttentionParameters parameters;
    parameters.read = policy;
    cache.attend(queries, result.output, parameters, workspace);
    result.report = workspace.report();
    return result;
}
std::vector<std::string> planes_recipes() {
    return {"key_favored:8:8",
            "key_favored:8:8+key_group=32+value_group=16",
            "key_favored:5:7",
            "key_favored:5:3+rotate_keys=1+recent_bits=8",
            "key_favored:6:4+shaped_keys=1+rotate_keys=by_tile",
            "fp16",
            "latent:8:8+fit_tokens=256",
            "latent:5:6+heads_together=1+fit_tokens=256"};
}

TEST(ReadPolicies, AreRefusedForTilesThatAreDecoded) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache(configuration("key_favored:8:8"), pool);
    kvplane_test::append(cache, normal_matrix(random, 300, 64), normal_matrix(random, 300, 96));
    Matrix output(1, 4 * 48);
    AttentionParameters parameters;
    parameters.decode_tiles = true;
    parameters.read = ReadPolicy::fixed(4);
    AttentionWorkspace workspace;
    EXPECT_NE(refusal(ErrorCode::option,
                      [&] { cache.attend(normal_matrix(random, 1, 128), output, parameters, workspace); })
                  .find("tiles to be decoded"),
              std::string::npos);
}

TEST(ReadPolicies, ReadAtMostTheirBudgetAndErrLessTheMoreTheyRead) {
    std::mt19937_64 random(seed());
    TilePool pool;
    for (const std::string& recipe : planes_recipes()) {
        KvCache cache(configuration(recipe), pool);
        Matrix keys = normal_matrix(random, 5000, 64);
        keys.col(3) *= 30.0f;
        kvplane_test::append(cache, keys, normal_matrix(random, 5000, 96));
        const Matrix q = normal_matrix(random, 2, 128, 0.5f);
        const PolicyRead all = read(cache, q, ReadPolicy::all());
        double before = std::numeric_limits<double>::infinity();
        for (const double bits : {0.0, 1.0, 2.5, 4.0, 6.0, 8.0, 12.0, 16.0}) {
            if (recipe == "fp16" && bits < 8.0) {
                refusal(ErrorCode::option, [&] { read(cache, q, ReadPolicy::aligned(bits, bits)); });
                refusal(ErrorCode::option, [&] { read(cache, q, ReadPolicy::aligned(bits)); });
                continue;
            }
            const PolicyRead aligned = read(cache, q, ReadPolicy::aligned(bits, bits)),
                             shared = read(cache, q, ReadPolicy::aligned(bits));
            EXPECT_LE(aligned.report.key_bits, bits + 1e-9) << recipe;
            EXPECT_LE(aligned.report.value_bits, bits + 1e-9) << recipe;
            EXPECT_LE(shared.report.mean_bits, bits + 1e-9) << recipe;
            // But for a bucket of values, of which most count alike here.
            if (recipe != "fp16") {
                EXPECT_GT(shared.report.mean_bits, std::min(bits, all.report.mean_bits) - 0.75) << recipe;
                // All weights are alike here, so that nothing is gained, and lost is what such a bucket
                // takes.
                EXPECT_LE((shared.output - all.output).norm(),
                          2.5 * (aligned.output - all.output).norm() + 1e-5)
                    << recipe << " at " << bits;
            }

            const double error = (aligned.output - all.output).norm() / all.output.norm();
            EXPECT_LE(error, before * 2.0 + 1e-3) << recipe << " at " << bits;
            before = error;
            if (bits == 16.0) {
                EXPECT_EQ(aligned.report.key_bits, all.report.key_bits) << recipe;
                EXPECT_EQ(aligned.report.value_bits, all.report.value_bits) << recipe;
                EXPECT_LE(error, 1e-4) << recipe;
            } else if (bits >= 4.0 && recipe != "fp16") {
                // The budget is used but for a bucket of values, and a plane of keys in a class of tiles.
                EXPECT_GT(aligned.report.key_bits, std::min(bits, all.report.key_bits) - 2.0) << recipe;
            }
        }
    }
}

TEST(ReadPolicies, AlignedReadsErrLessThanFixedOnes) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache(configuration("key_favored:8:8"), pool);
    Matrix keys = normal_matrix(random, 3000, 64);
    for (Index c = 0; c < 64; ++c) keys.col(c) *= std::exp(-0.3f * static_cast<float>(c % 32));
    kvplane_test::append(cache, keys, normal_matrix(random, 3000, 96));
    const Matrix q = normal_matrix(random, 1, 128, 2.0f);
    const Matrix all = read(cache, q, ReadPolicy::all()).output;
    const PolicyRead fixed = read(cache, q, {ReadPolicy::Kind::fixed, 4.0, 8.0}),
                     aligned = read(cache, q, ReadPolicy::aligned(4.0, 8.0));
    EXPECT_EQ(fixed.report.key_bits, 4.0);
    EXPECT_EQ(fixed.report.value_bits, 8.0);
    EXPECT_LE(aligned.report.key_bits, 4.0);
    EXPECT_LT((aligned.output - all).norm(), 0.5 * (fixed.output - all).norm());
    EXPECT_EQ(read(cache, q, ReadPolicy::fixed(8)).output, all);
    EXPECT_EQ(read(cache, q, ReadPolicy::fixed(3)).report.key_bits, 0.0) << "no plane of 4 fits";
}

/// One tile of forty matters to the query: it is read in full, and the others not beyond the first look.
/// Four bits of everything err more, at four times the bits.
TEST(ReadPolicies, ReadKeysWhereTheWeightsAre) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache(configuration("key_favored:8:8"), pool);
    const Index tokens = 40 * 128 + 200, from = 17 * 128, dim = 32;
    Matrix keys = normal_matrix(random, tokens, 2 * dim);
    const Matrix q = normal_matrix(random, 1, 4 * dim);
    for (Index t = from; t < from + 100; ++t)
        for (Index h = 0; h < 2; ++h)
            keys.row(t).segment(h * dim, dim) +=
                3.0f * (q.row(0).segment(2 * h * dim, dim) + q.row(0).segment((2 * h + 1) * dim, dim));
    kvplane_test::append(cache, keys, normal_matrix(random, tokens, 96));
    const Matrix all = read(cache, q, ReadPolicy::all()).output;
    const auto error = [&](const PolicyRead& other) { return (other.output - all).norm() / all.norm(); };
    const PolicyRead aligned = read(cache, q, ReadPolicy::aligned(1.5, 8.0)),
                     shared = read(cache, q, ReadPolicy::aligned(1.0)),
                     fixed = read(cache, q, ReadPolicy::fixed(4.0));
    EXPECT_LE(aligned.report.key_bits, 1.5);
    EXPECT_LE(shared.report.mean_bits, 1.0);
    EXPECT_LE(error(aligned), 0.4 * error(fixed));
    EXPECT_LE(error(shared), 0.4 * error(fixed));
}

/// A budget that all bits of keys fit into takes them in one look, and of values what is left is exact.
TEST(ReadPolicies, ReadKeysThatFitInFull) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache(configuration("key_favored:8:8"), pool);
    kvplane_test::append(cache, normal_matrix(random, 1500, 64), normal_matrix(random, 1500, 96));
    const Matrix q = normal_matrix(random, 1, 128);
    const Matrix all = read(cache, q, ReadPolicy::all()).output;
    const PolicyRead whole = read(cache, q, ReadPolicy::aligned(8.0, 8.0)),
                     some = read(cache, q, ReadPolicy::aligned(8.0, 4.0));
    EXPECT_EQ(whole.report.key_bits, 8.0);
    EXPECT_EQ(whole.report.value_bits, 8.0);
    EXPECT_LE((whole.output - all).norm(), 1e-5 * all.norm());
    EXPECT_EQ(some.report.key_bits, 8.0);
    EXPECT_LE(some.report.value_bits, 4.0);
    EXPECT_LE((some.output - all).norm(), 0.15 * all.norm());
}

TEST(ReadPolicies, DoNotDependOnThreadsNorAllocate) {
    std::mt19937_64 random(seed());
    TilePool pool;
    for (const std::string& recipe : planes_recipes()) {
        KvCache cache(configuration(recipe), pool);
        kvplane_test::append(cache, normal_matrix(random, 5000, 64), normal_matrix(random, 5000, 96));
        cache.drop_before(600);
        const Matrix q = normal_matrix(random, 3, 128);
        const ReadPolicy policy = ReadPolicy::aligned(recipe == "fp16" ? 9.0 : 3.0);
        const PolicyRead serial = read(cache, q, policy);
        for (const Index threads : {2, 5}) {
            ThreadExecutor executor(threads);
            const PolicyRead other = read(cache, q, policy, &executor);
            ASSERT_EQ(other.output, serial.output) << recipe;
            EXPECT_EQ(other.report.value_bits, serial.report.value_bits);
        }
        AttentionWorkspace workspace;
        AttentionParameters parameters;
        parameters.read = policy;
        Matrix output(3, 4 * 48);
        cache.attend(q, output, parameters, workspace);
        const long before = allocations;
        cache.attend(q, output, parameters, workspace);
        EXPECT_EQ(allocations, before) << recipe;
        EXPECT_EQ(output, serial.output);
    }
}

/// The certificate holds for every head, is no more than the tolerance, and what is read falls as that rises.
TEST(ReadPolicies, KeepWithinATolerance) {
    std::mt19937_64 random(seed());
    TilePool pool;
    for (const std::string& recipe : planes_recipes())
        for (const bool softcap : {false, true}) {
            KvCache cache(configuration(recipe), pool);
            Matrix keys = normal_matrix(random, 3000, 64);
            for (Index c = 0; c < 64; ++c) keys.col(c) *= std::exp(-0.2f * static_cast<float>(c % 32));
            kvplane_test::append(cache, keys, normal_matrix(random, 3000, 96));
            const Matrix q = normal_matrix(random, 2, 128, 3.0f);
            AttentionParameters parameters;
            if (softcap) parameters.softcap = 8.0;
            AttentionWorkspace workspace;
            Matrix all(2, 4 * 48), output = all;
            cache.attend(q, all, parameters, workspace);
            EXPECT_EQ(workspace.report().error_bound, 0.0);
            double before = 0.0;
            for (const double error : {2.0, 0.5, 0.1, 0.02, 0.001, 0.0}) {
                parameters.read = ReadPolicy::tolerance(error);
                cache.attend(q, output, parameters, workspace);
                const ReadReport report = workspace.report();
                EXPECT_LE(report.relative_error_bound, error * (1.0 + 1e-6)) << recipe;
                for (Index head = 0; head < 4; ++head)
                    for (Index i = 0; i < 2; ++i) {
                        const auto part = [&](const Matrix& m) { return m.row(i).segment(head * 48, 48); };
                        ASSERT_LE((part(output) - part(all)).norm(),
                                  report.error_bound + 2e-3 * part(all).norm())
                            << recipe << " at " << error;
                    }
                EXPECT_GE(report.key_bits + report.value_bits, before - 0.5) << recipe << " at " << error;
                before = report.key_bits + report.value_bits;
                if (error == 2.0) {
                    EXPECT_GT(report.relative_error_bound, 0.1) << recipe << ": what is allowed is used";
                    EXPECT_LT(before, 24.0) << recipe;
                }
            }
            EXPECT_LE((output - all).norm(), 1e-4 * all.norm())
                << recipe << ": nothing that counts is left out";
        }
}

/// The published rule and ours, unit by unit as the functions that T11 is about give them.
TEST(ReadPolicies, ReadHalfPlanesByExponents) {
    std::mt19937_64 random(seed());
    TilePool pool;
    const CacheConfiguration c = configuration("fp16", 1, 3, 40, 24);
    KvCache cache(c, pool);
    Matrix keys = normal_matrix(random, 100, 40);
    for (Index i = 0; i < 40; ++i) keys.col(i) *= std::exp2(-static_cast<float>(i / 8) * 3.0f);
    const Matrix values = normal_matrix(random, 100, 24), q = normal_matrix(random, 1, 120, 6.0f);
    cache.append(keys, values);
    const Matrix rows = Eigen::Map<const Matrix>(q.data(), 3, 40);
    const Matrix exact = read(cache, q, ReadPolicy::all()).output;
    for (const AlignmentThresholds& thresholds :
         {AlignmentThresholds::published(), AlignmentThresholds::supported(),
          AlignmentThresholds::accurate()}) {
        const PolicyRead some = read(cache, q, ReadPolicy::exponents(thresholds));
        const Eigen::RowVectorXf largest = keys.cwiseAbs().colwise().maxCoeff();
        const std::vector<int> key_bits = aligned_key_bits(rows / std::sqrt(40.0f), largest, thresholds);
        Matrix weights = rows * keys.transpose() / std::sqrt(40.0f);
        for (Index r = 0; r < 3; ++r)
            weights.row(r) = (weights.row(r).array() - weights.row(r).maxCoeff()).exp();
        const std::vector<int> value_bits = aligned_value_bits(weights, thresholds);
        double of_keys = 0.0, of_values = 0.0;
        for (std::size_t first = 0; first < 40; first += 8)
            of_keys += *std::max_element(key_bits.data() + first, key_bits.data() + first + 8) / 5.0;
        for (std::size_t first = 0; first < 128; first += 8)
            if (first < 100)
                of_values += *std::max_element(value_bits.data() + first,
                                               value_bits.data() + std::min<std::size_t>(first + 8, 100)) /
                             16.0;
        EXPECT_NEAR(some.report.key_bits, of_keys, 1e-9);
        // Weights near a power of two, of scores that are a little off.
        EXPECT_NEAR(some.report.value_bits, of_values, 0.6);
        EXPECT_LT(some.report.key_bits, 14.0);
        const double allowed = thresholds == AlignmentThresholds::published()   ? 4e-2
                               : thresholds == AlignmentThresholds::supported() ? 2e-3
                                                                                : 5e-4;
        EXPECT_LT((some.output - exact).norm(), allowed * exact.norm());
    }
    EXPECT_EQ(read(cache, q, ReadPolicy::exponents({100, 100, 100})).output, exact);
}

/// A window, a softcap, hidden tokens: aligned reads see what full ones see.
TEST(ReadPolicies, ComposeWithTheParameters) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache(configuration("key_favored:8:8"), pool);
    kvplane_test::append(cache, normal_matrix(random, 2000, 64), normal_matrix(random, 2000, 96));
    const Matrix q = normal_matrix(random, 2, 128);
    const std::vector<float> slopes = {0.1f, 0.2f, 0.3f, 0.4f};
    for (int which = 0; which < 3; ++which) {
        AttentionParameters parameters;
        if (which == 0) parameters.sliding_window = 300, parameters.sinks = 2;
        if (which == 1) parameters.softcap = 5.0;
        if (which == 2) parameters.alibi_slopes = slopes;
        AttentionWorkspace workspace;
        Matrix all(2, 4 * 48), aligned(2, 4 * 48);
        cache.attend(q, all, parameters, workspace);
        parameters.read = ReadPolicy::aligned(8.0);
        cache.attend(q, aligned, parameters, workspace);
        EXPECT_LE((aligned - all).norm(), 1e-5 * all.norm()) << which;
    }
}

TEST(ReadPolicies, RefuseWhatTheyCannotRead) {
    std::mt19937_64 random(seed());
    TilePool pool;
    Matrix output(1, 4 * 48);
    AttentionParameters parameters;
    for (const double bits : {-1.0, 17.0, std::numeric_limits<double>::quiet_NaN()}) {
        KvCache cache(configuration("key_favored:8:8"), pool);
        kvplane_test::append(cache, normal_matrix(random, 300, 64), normal_matrix(random, 300, 96));
        parameters.read = ReadPolicy::aligned(bits);
        refusal(ErrorCode::option, [&] { cache.attend(normal_matrix(random, 1, 128), output, parameters); });
    }
    KvCache cache(configuration("block32:8"), pool);
    kvplane_test::append(cache, normal_matrix(random, 300, 64), normal_matrix(random, 300, 96));
    parameters.read = ReadPolicy::aligned(4.0);
    const std::string sentence =
        refusal(ErrorCode::option, [&] { cache.attend(normal_matrix(random, 1, 128), output, parameters); });
    EXPECT_NE(sentence.find("block32:8"), std::string::npos) << sentence;
    KvCache packed(configuration("key_favored:8:8"), pool);
    kvplane_test::append(packed, normal_matrix(random, 600, 64), normal_matrix(random, 600, 96));
    parameters.read = ReadPolicy::exponents();
    refusal(ErrorCode::option, [&] { packed.attend(normal_matrix(random, 1, 128), output, parameters); });
    for (const double error : {-1.0, std::numeric_limits<double>::infinity()}) {
        parameters.read = ReadPolicy::tolerance(error);
        refusal(ErrorCode::option, [&] { packed.attend(normal_matrix(random, 1, 128), output, parameters); });
    }
}

std::vector<ReadPolicy> policies(const std::string& recipe) {
    const double bits = recipe == "fp16" ? 9.0 : 4.0;
    std::vector<ReadPolicy> all = {ReadPolicy::all(), ReadPolicy::fixed(8.0), ReadPolicy::aligned(bits),
                                   ReadPolicy::aligned(bits, bits), ReadPolicy::tolerance(0.1)};
    if (recipe == "fp16") all.push_back(ReadPolicy::exponents());
    return all;
}

/// One row that is not finite comes out as NaN and leaves every other row as a row of zeros would.
TEST(ReadPolicies, KeepARowThatIsNotFiniteToItself) {
    std::mt19937_64 random(seed());
    TilePool pool;
    for (const std::string recipe : {"key_favored:8:8", "fp16", "latent:8:8+fit_tokens=256"}) {
        KvCache cache(configuration(recipe), pool);
        kvplane_test::append(cache, normal_matrix(random, 900, 64), normal_matrix(random, 900, 96));
        Matrix q = normal_matrix(random, 2, 128);
        const Index head = static_cast<Index>(random() % 4), row = static_cast<Index>(random() % 2);
        for (const ReadPolicy& policy : policies(recipe))
            for (const float bad :
                 {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                  -std::numeric_limits<float>::infinity()}) {
                q.row(row).segment(head * 32, 32).setZero();
                const Matrix without = read(cache, q, ReadPolicy::all()).output;
                q(row, head * 32 + 5) = bad;
                const Matrix with = read(cache, q, policy).output;
                for (Index r = 0; r < 2; ++r)
                    for (Index h = 0; h < 4; ++h) {
                        const auto values = with.row(r).segment(h * 48, 48);
                        if (r == row && h == head)
                            EXPECT_TRUE(values.array().isNaN().all()) << recipe;
                        else if (policy.kind == ReadPolicy::Kind::all)
                            EXPECT_EQ(values, without.row(r).segment(h * 48, 48)) << recipe;
                        else
                            EXPECT_TRUE(values.allFinite()) << recipe;
                    }
            }
        // The path of many query tokens too.
        Matrix many = normal_matrix(random, 9, 128), out(9, 4 * 48);
        cache.attend(many, out);
        const Matrix before = out;
        many(4, 40) = std::numeric_limits<float>::infinity();
        cache.attend(many, out);
        EXPECT_TRUE(out.row(4).segment(48, 48).array().isNaN().all()) << recipe;
        out.row(4).segment(48, 48) = before.row(4).segment(48, 48);
        EXPECT_EQ(out, before) << recipe;
    }
}

/// Numbers in the parameters that are not finite are refused by name, before anything is written.
TEST(ReadPolicies, RefuseParametersThatAreNotFinite) {
    std::mt19937_64 random(seed());
    TilePool pool;
    constexpr float infinity = std::numeric_limits<float>::infinity(),
                    nan = std::numeric_limits<float>::quiet_NaN();
    KvCache cache(configuration("key_favored:8:8"), pool);
    kvplane_test::append(cache, normal_matrix(random, 300, 64), normal_matrix(random, 300, 96));
    const Matrix q = normal_matrix(random, 1, 128);
    for (const ReadPolicy& policy : policies("key_favored:8:8")) {
        Matrix output = Matrix::Constant(1, 4 * 48, 7.0f);
        const auto refused = [&](AttentionParameters parameters, ErrorCode code) {
            parameters.read = policy;
            const std::string sentence = refusal(code, [&] { cache.attend(q, output, parameters); });
            EXPECT_EQ(output, Matrix::Constant(1, 4 * 48, 7.0f));
            return sentence;
        };
        for (const float bad : {infinity, nan}) {
            Matrix bias = Matrix::Zero(1, 300);
            bias(0, 170) = bad;
            const std::string sentence = refused({.bias = &bias}, ErrorCode::not_finite);
            EXPECT_NE(sentence.find("key 170"), std::string::npos) << sentence;
            const std::vector<float> slopes = {0.1f, bad, 0.1f, 0.1f};
            refused({.alibi_slopes = slopes}, ErrorCode::not_finite);
            refused({.softcap = static_cast<double>(bad)}, ErrorCode::option);
        }
        refused({.scale = 1e39}, ErrorCode::option);
        Matrix plain = output, capped = output;
        cache.attend(q, plain, {.read = policy});
        cache.attend(q, capped, {.softcap = 1e39, .read = policy});
        EXPECT_EQ(plain, capped) << "a softcap beyond every score does nothing";
    }
}

/// Scores that the first look takes for large ones and that turn out small must not stay as a maximum: the
/// output would be 0, or NaN would index.
TEST(ReadPolicies, ForgetWhatTheFirstLookOnlySeemedToSee) {
    TilePool pool;
    for (const float size : {60.0f, 200.0f, 2000.0f}) {
        KvCache cache(configuration("key_favored:8:8+sinks=0+recent=0+rotate_values=0", 1, 1, 64, 64), pool);
        Matrix keys = Matrix::Zero(512, 64), values = Matrix::Zero(512, 64);
        // One token scores `size` in its first 16 channels and takes it back in the others, its neighbour
        // does the opposite.
        keys.row(5).head(16).setConstant(size / 16.0f);
        keys.row(5).tail(48).setConstant(-size / 48.0f);
        keys.row(6) = -keys.row(5);
        for (Index t = 0; t < 512; ++t) values.row(t).setConstant(1.0f + static_cast<float>(t % 2));
        cache.append(keys, values);
        const Matrix q = Matrix::Ones(1, 64);
        AttentionParameters parameters{.scale = 1.0, .read = ReadPolicy::aligned(4.5, 4.0)};
        AttentionWorkspace workspace;
        Matrix output(1, 64), all(1, 64);
        cache.attend(q, all, {.scale = 1.0});
        cache.attend(q, output, parameters, workspace);
        EXPECT_LE(workspace.report().value_bits, 4.0 + 1e-9) << size;
        EXPECT_LE((output - all).cwiseAbs().maxCoeff(), 0.6f) << size;
        EXPECT_GE(output.minCoeff(), 0.9f) << size;
    }
}
TEST(ReadPolicies, StayFiniteWithScoresOfAnySpread) {
    std::mt19937_64 random(seed());
    TilePool pool;
    for (const float spread : {20.0f, 50.0f, 100.0f})
        for (const std::string recipe : {"key_favored:8:8", "standard", "latent:8:8+fit_tokens=256"}) {
            KvCache cache(configuration(recipe), pool);
            const Matrix values = normal_matrix(random, 1500, 96);
            kvplane_test::append(cache, normal_matrix(random, 1500, 64), values);
            const Matrix q = normal_matrix(random, 3, 128, spread);
            for (const double bits : {1.0, 3.0, 4.5}) {
                for (const ReadPolicy& policy :
                     {ReadPolicy::aligned(bits), ReadPolicy::aligned(bits, bits)}) {
                    const PolicyRead some = read(cache, q, policy);
                    ASSERT_TRUE(some.output.allFinite()) << recipe;
                    // Weights add up to 1: no head's output is larger than its values, and none is nothing.
                    ASSERT_LE(some.output.cwiseAbs().maxCoeff(), 1.5f * values.cwiseAbs().maxCoeff() + 1.0f);
                    for (Index h = 0; h < 4; ++h)
                        ASSERT_GT(some.output.middleCols(h * 48, 48).rowwise().norm().minCoeff(), 1e-3f)
                            << recipe << ", " << bits << " bits, spread " << spread;
                }
            }
        }
}

/// The last place of fp16 values is never below 2^-24, which the certificate has to count.
TEST(ReadPolicies, CertifyTinyHalfValues) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache cache(configuration("key_favored:8:16+rotate_values=0"), pool);
    const float size = 3e-6f;
    kvplane_test::append(cache, normal_matrix(random, 900, 64), normal_matrix(random, 900, 96, size));
    const Matrix q = normal_matrix(random, 2, 128, 3.0f), all = read(cache, q, ReadPolicy::all()).output;
    for (const double tolerance : {0.5, 0.1, 0.01}) {
        const PolicyRead some = read(cache, q, ReadPolicy::tolerance(tolerance));
        EXPECT_LE(some.report.relative_error_bound, tolerance * (1.0 + 1e-6));
        for (Index h = 0; h < 4; ++h)
            for (Index i = 0; i < 2; ++i)
                EXPECT_LE((some.output - all).row(i).segment(h * 48, 48).norm(),
                          some.report.error_bound + 2e-3 * all.row(i).segment(h * 48, 48).norm());
    }
}

TEST(ReadPolicies, RefuseFewerBitsOfHalfNumbersThanAreOne) {
    std::mt19937_64 random(seed());
    TilePool pool;
    for (const std::string recipe : {"fp16", "key_favored:8:16", "key_favored:16:4"}) {
        KvCache cache(configuration(recipe), pool);
        kvplane_test::append(cache, normal_matrix(random, 300, 64), normal_matrix(random, 300, 96));
        const Matrix q = normal_matrix(random, 1, 128);
        for (const ReadPolicy& policy :
             {ReadPolicy::fixed(4.0), ReadPolicy::aligned(7.9), ReadPolicy::aligned(7.9, 7.9)}) {
            const std::string sentence = refusal(ErrorCode::option, [&] { read(cache, q, policy); });
            EXPECT_NE(sentence.find(recipe), std::string::npos) << sentence;
            EXPECT_NE(sentence.find("at least 8"), std::string::npos) << sentence;
        }
        const Matrix all = read(cache, q, ReadPolicy::all()).output,
                     first = read(cache, q, ReadPolicy::fixed(8.0)).output;
        EXPECT_LE((first - all).norm(), 0.4f * all.norm()) << recipe;
    }
}

/// A call that runs out of memory leaves a workspace that the next call can use.
TEST(FusedAttention, AWorkspaceOutlivesTheEndOfMemory) {
    std::mt19937_64 random(seed());
    TilePool pool;
    KvCache small(configuration("standard"), pool), large(configuration("standard", 2, 4, 512, 512), pool);
    kvplane_test::append(small, normal_matrix(random, 300, 64), normal_matrix(random, 300, 96));
    kvplane_test::append(large, normal_matrix(random, 300, 1024), normal_matrix(random, 300, 1024));
    const Matrix q = normal_matrix(random, 1, 2048);
    const Matrix expected = attend(large, q, nullptr);
    Matrix output(1, 2048), little(1, 4 * 48);
    int failed = 0;
    for (bool done = false; !done; ++failed) {
        AttentionWorkspace workspace;
        small.attend(q.leftCols(128), little, {}, workspace);
        allocations_left = failed;
        try {
            large.attend(q, output, {}, workspace);
            done = true;
        } catch (const std::bad_alloc&) {
        }
        allocations_left = -1;
        if (!done) large.attend(q, output, {}, workspace);
        EXPECT_EQ(output, expected) << "after the failure of allocation " << failed;
    }
    EXPECT_GT(failed, 10);
}

}  // namespace
