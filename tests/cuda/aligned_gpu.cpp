// Reads that are decided tile by tile on a device: against double precision over what the caches store, with
// what they certify, count and repeat. For machines with a device; without one it says so and tests nothing.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/aligned_cases.hpp"
#include "cuda/device_bytes.hpp"
#include "kvplane/attention/reference.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cuda/device_attention.cuh"
#include "kvplane/cuda/device_cache.cuh"
#include "kvplane/cuda/layer_view.hpp"
#include "kvplane/recipe_names.hpp"
#include "kvplane/recipes.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using kvplane::cuda::AttendWorkspace;
using kvplane::cuda::DeviceSequence;
using kvplane::cuda::ReadCounts;
using kvplane_test::DeviceBytes;
using kvplane_test::expect_ok;
using kvplane_test::Random;

struct Case {
    std::string recipe;
    ReadPolicy read;
    double hot = 0.1;  ///< share of tiles with a token of much weight
    float peak = 20.0f;
    Index kv_heads = 2, group = 4, dim = 128;
    std::vector<Index> tokens = {6000};
    Index query_tokens = 1;
    AttentionParameters parameters = {};
    Index drop = 0, cut = 0;  ///< tokens that are removed in the middle, and at the end
    bool sinks = false;
};

struct Found {
    ReadReport report;
    double error = 0.0;  ///< the largest, over the largest norm of a value
};

/// Attends twice, and compares with double precision. Expects what is certified to hold, and counts that are
/// complete.
Found attend(const Case& c, std::uint64_t seed) {
    SCOPED_TRACE(c.recipe + ", group " + std::to_string(c.group) + ", heads of " + std::to_string(c.dim) +
                 ", " + std::to_string(c.query_tokens) + " query tokens, " + std::to_string(c.tokens.size()) +
                 " sequences, hot " + std::to_string(c.hot) + ", policy " +
                 std::to_string(static_cast<int>(c.read.kind)));
    Random random(seed);
    const Index query_heads = c.kv_heads * c.group;
    const CacheConfiguration configuration{.kv_heads = c.kv_heads,
                                           .query_heads = query_heads,
                                           .key_head_dim = c.dim,
                                           .value_head_dim = c.dim,
                                           .recipe = recipes::parse(c.recipe),
                                           .rotation_seed = 7};
    const auto rows = static_cast<Index>(c.tokens.size()) * c.query_tokens;
    Matrix queries(rows, query_heads * c.dim);
    TilePool pool;
    std::vector<KvCache> caches;
    caches.reserve(c.tokens.size());
    kvplane::cuda::DeviceMemory memory;
    TilePool device_pool(&memory);
    std::vector<kvplane::cuda::DeviceCache> uploaded;
    unsigned long long tiles = 0;
    for (std::size_t s = 0; s < c.tokens.size(); ++s) {
        const Matrix of_heads = kvplane_test::normal_matrix(1, c.kv_heads * c.dim, random);
        for (Index t = 0; t < c.query_tokens; ++t)
            for (Index h = 0; h < query_heads; ++h)
                queries.row(static_cast<Index>(s) * c.query_tokens + t).segment(h * c.dim, c.dim) =
                    of_heads.row(0).segment(h / c.group * c.dim, c.dim) +
                    0.1f * kvplane_test::normal_matrix(1, c.dim, random);
        KvCache& cache = caches.emplace_back(configuration, pool);
        Matrix keys = kvplane_test::normal_matrix(c.tokens[s], c.kv_heads * c.dim, random);
        kvplane_test::add_peaks(keys, of_heads, c.kv_heads, c.hot, c.peak, random);
        cache.append(keys, kvplane_test::normal_matrix(c.tokens[s], c.kv_heads * c.dim, random));
        if (c.drop > 0) cache.drop_before(c.drop, 4);
        if (c.cut > 0) cache.truncate(cache.tokens() - c.cut);
        uploaded.push_back(kvplane::cuda::DeviceCache::upload(cache, device_pool, nullptr));
        const auto blocks = static_cast<unsigned long long>((c.query_tokens * c.group + 7) / 8 * c.kv_heads);
        tiles += blocks * cache.state().tiles.size();
    }
    std::vector<DeviceSequence> sequences;
    for (const kvplane::cuda::DeviceCache& one : uploaded) sequences.push_back(one.sequence());
    const RowMajorMatrix<Eigen::half> half_queries = queries.cast<Eigen::half>();
    const auto numbers = static_cast<std::size_t>(rows * query_heads);
    const DeviceBytes in(half_queries.data(), static_cast<std::size_t>(half_queries.size()) * 2),
        out(static_cast<std::size_t>(half_queries.size()) * 4), bounds(numbers * 4),
        counts(sizeof(ReadCounts));

    AttentionParameters parameters = c.parameters, device_parameters = c.parameters;
    std::vector<float> sinks(static_cast<std::size_t>(query_heads), 3.0f);
    const DeviceBytes device_sinks(sinks.data(), sinks.size() * 4);
    if (c.sinks) {
        parameters.sink_logits = sinks;
        device_parameters.sink_logits = {device_sinks.as<float>(), sinks.size()};
    }
    device_parameters.read = c.read;
    AttendWorkspace workspace;
    const auto layer = kvplane::cuda::attend_layer(caches[0].shape());
    workspace.plan(layer, sequences, c.query_tokens, device_parameters, nullptr);
    std::vector<float> first, first_bounds;
    ReadCounts read{};
    for (int call = 0; call < 3; ++call) {
        expect_ok(cudaMemset(counts.as(), 0, sizeof(ReadCounts)));
        workspace.attend({in.as(), ScalarType::float16, rows, query_heads, query_heads * c.dim, c.dim},
                         {out.as(), ScalarType::float32, rows, query_heads, query_heads * c.dim, c.dim},
                         nullptr, nullptr, {bounds.as<float>(), counts.as<ReadCounts>()});
        expect_ok(cudaDeviceSynchronize());
        const std::vector<float> output = out.read<float>(), certified = bounds.read<float>();
        const ReadCounts counted = counts.read<ReadCounts>()[0];
        if (call == 0) first = output, first_bounds = certified, read = counted;
        EXPECT_EQ(std::memcmp(first.data(), output.data(), output.size() * 4), 0) << "calls differ";
        EXPECT_EQ(std::memcmp(first_bounds.data(), certified.data(), certified.size() * 4), 0);
        EXPECT_EQ(std::memcmp(&read, &counted, sizeof read), 0);
    }
    unsigned long long of_keys = 0, of_values = 0;
    for (int p = 0; p < 4; ++p) of_keys += read.keys[p], of_values += read.values[p];
    if (c.parameters.sliding_window == 0) {
        EXPECT_EQ(of_keys, tiles);
    }
    EXPECT_EQ(of_keys, of_values);

    Found found;
    found.report = read_report(layer.prefixes, c.dim, c.dim, read, first_bounds);
    const Eigen::Map<const Matrix> output(first.data(), rows, query_heads * c.dim);
    EXPECT_TRUE(output.allFinite());
    for (std::size_t s = 0; s < caches.size(); ++s) {
        const auto row = static_cast<Index>(s) * c.query_tokens;
        const Index tokens = caches[s].tokens();
        const auto seen = [&](auto stored) {
            if (c.drop == 0) return stored(0, tokens);
            Matrix all(4 + tokens - c.drop, stored(0, 1).cols());
            all << stored(0, 4), stored(c.drop, tokens - c.drop);
            return all;
        };
        const MatrixD expected = reference_attention(
            seen([&](Index at, Index count) { return caches[s].stored_keys(at, count); }),
            seen([&](Index at, Index count) { return caches[s].stored_values(at, count); }),
            half_queries.middleRows(row, c.query_tokens).cast<float>().eval(), query_heads, c.kv_heads,
            parameters);
        for (Index h = 0; h < query_heads; ++h) {
            const double norm = kvplane_test::largest_norm(caches[s], h / c.group);
            for (Index t = 0; t < c.query_tokens; ++t) {
                const double error = (output.row(row + t).segment(h * c.dim, c.dim).cast<double>() -
                                      expected.row(t).segment(h * c.dim, c.dim))
                                         .norm() /
                                     norm;
                found.error = std::max(found.error, error);
                if (c.read.kind != ReadPolicy::Kind::tolerance) continue;
                const auto bound =
                    static_cast<double>(first_bounds[static_cast<std::size_t>((row + t) * query_heads + h)]);
                EXPECT_LE(bound, c.read.error * (1.0 + 1e-5));
                // Beyond what is left out: factors are rounded to 16 bits of the largest, which peaks raise.
                EXPECT_LE(error, bound + 1e-3) << "sequence " << s << " head " << h;
            }
        }
    }
    return found;
}

std::vector<Case> shapes(const std::string& recipe, const ReadPolicy& read) {
    std::vector<Case> all;
    for (const double hot : {0.0, 0.1, 0.5, 1.0}) all.push_back({.recipe = recipe, .read = read, .hot = hot});
    all.push_back({.recipe = recipe, .read = read, .group = 8});
    all.push_back({.recipe = recipe, .read = read, .group = 1, .tokens = {300, 1, 2000, 40, 129, 5000}});
    all.push_back({.recipe = recipe, .read = read, .kv_heads = 8, .tokens = {6000}});
    all.push_back({.recipe = recipe, .read = read, .group = 3, .tokens = {2000, 700}, .query_tokens = 5});
    all.push_back({.recipe = recipe,
                   .read = read,
                   .tokens = {3000},
                   .query_tokens = 2,
                   .parameters = {.sliding_window = 700, .sinks = 4}});
    all.push_back({.recipe = recipe, .read = read, .tokens = {3000}, .parameters = {.position = 1000}});
    all.push_back({.recipe = recipe, .read = read, .tokens = {3000}, .parameters = {.softcap = 30.0}});
    all.push_back({.recipe = recipe, .read = read, .tokens = {3000}, .drop = 1000});
    all.push_back({.recipe = recipe, .read = read, .tokens = {3000}, .cut = 200});
    all.push_back({.recipe = recipe, .read = read, .tokens = {3000}, .sinks = true});
    all.push_back({.recipe = recipe, .read = read, .dim = 64});
    all.push_back({.recipe = recipe, .read = read, .dim = 256, .tokens = {2500}});
    return all;
}

TEST(CudaAligned, TolerancesAreKept) {
    KVPLANE_NEEDS_DEVICE();
    std::uint64_t seed = kvplane_test::seed();
    for (const char* recipe : {"key_favored:8:8", "fp16", "standard", "key_favored:4:4", "kivi:8:64"})
        for (const double error : {0.0, 0.02, 0.3})
            for (const Case& c : shapes(recipe, ReadPolicy::tolerance(error))) attend(c, seed++);
    // Something is left out, and not where everything counts.
    const Found some = attend({.recipe = "key_favored:8:8", .read = ReadPolicy::tolerance(0.02)}, seed++);
    EXPECT_LE(some.report.mean_bits, 4.0);
    EXPECT_GE(some.report.mean_bits, 2.0);
    const Found all =
        attend({.recipe = "key_favored:8:8", .read = ReadPolicy::tolerance(0.0), .hot = 1.0}, seed++);
    EXPECT_EQ(all.report.mean_bits, 8.0);
    EXPECT_EQ(all.report.relative_error_bound, 0.0);
    EXPECT_LE(all.error, 1e-4);
}

TEST(CudaAligned, ExponentsReadLessAndErrLittle) {
    KVPLANE_NEEDS_DEVICE();
    std::uint64_t seed = kvplane_test::seed();
    for (const Case& c : shapes("fp16", ReadPolicy::exponents())) EXPECT_LE(attend(c, seed++).error, 1e-3);
    const Found some = attend({.recipe = "fp16", .read = ReadPolicy::exponents()}, seed++);
    EXPECT_LE(some.report.mean_bits, 10.0);
    EXPECT_GE(some.report.mean_bits, 4.0);
    constexpr int never = AlignmentThresholds::never;
    const Found all =
        attend({.recipe = "fp16", .read = ReadPolicy::exponents({never, never, never})}, seed++);
    EXPECT_EQ(all.report.mean_bits, 16.0);
    EXPECT_LE(all.error, 1e-5);
    for (const Case& c : shapes("key_favored:8:8", ReadPolicy::exponents())) {
        const Found whole = attend(c, seed++);
        EXPECT_EQ(whole.report.mean_bits, 8.0);
        EXPECT_LE(whole.error, 1e-3);
    }
}

TEST(CudaAligned, BudgetsAreKept) {
    KVPLANE_NEEDS_DEVICE();
    std::uint64_t seed = kvplane_test::seed();
    for (const char* recipe : {"key_favored:8:8", "standard"})
        for (const double bits : {2.5, 4.0, 6.0})
            for (const Case& c : shapes(recipe, ReadPolicy::aligned(bits)))
                EXPECT_LE(attend(c, seed++).report.mean_bits, bits + 1e-9);
    for (const Case& c : shapes("fp16", ReadPolicy::aligned(10.0, 5.0))) {
        const ReadReport read = attend(c, seed++).report;
        EXPECT_LE(read.key_bits, 10.0 + 1e-9);
        EXPECT_LE(read.value_bits, 5.0 + 1e-9);
    }
    EXPECT_LE(attend({.recipe = "key_favored:8:8", .read = ReadPolicy::aligned(8.0)}, seed++).error, 1e-3);
}

/// Prefixes that are the same for all tiles, of fp16 too.
/// Two key heads of 128 channels.
CacheConfiguration configuration_of(const char* recipe, Index group) {
    return {.kv_heads = 2,
            .query_heads = 2 * group,
            .key_head_dim = 128,
            .value_head_dim = 128,
            .recipe = recipes::parse(recipe)};
}

TEST(CudaAligned, FixedPrefixesAreThoseOfTheHost) {
    KVPLANE_NEEDS_DEVICE();
    Random random(kvplane_test::seed());
    for (const char* recipe : {"fp16", "key_favored:8:8"})
        for (const Index group : {Index{4}, Index{6}})
            for (int keys = 1; keys <= 3; ++keys)
                for (int values = 1; values <= 3; ++values) {
                    TilePool pool;
                    KvCache cache(configuration_of(recipe, group), pool);
                    cache.append(kvplane_test::normal_matrix(1500, 256, random),
                                 kvplane_test::normal_matrix(1500, 256, random));
                    const RowMajorMatrix<float> queries =
                        kvplane_test::normal_matrix(1, 2 * group * 128, random);
                    const auto layer = kvplane::cuda::attend_layer(cache.shape(), {keys, values});
                    ReadPolicy fixed = ReadPolicy::fixed(16);
                    fixed.key_bits = layer.prefixes.key_bits[layer.prefixes.key_planes];
                    fixed.value_bits = layer.prefixes.value_bits[layer.prefixes.value_planes];
                    Matrix expected(1, queries.size());
                    AttentionWorkspace host;
                    cache.attend(Matrix(queries), expected, {.read = fixed}, host);

                    kvplane::cuda::DeviceMemory memory;
                    TilePool device_pool(&memory);
                    const auto uploaded = kvplane::cuda::DeviceCache::upload(cache, device_pool, nullptr);
                    const std::array sequences{uploaded.sequence()};
                    const auto bytes = static_cast<std::size_t>(queries.size()) * 4;
                    const DeviceBytes in(queries.data(), bytes), out(bytes);
                    AttendWorkspace workspace;
                    workspace.plan(layer, sequences, 1, {}, nullptr);
                    const Index heads = 2 * group;
                    workspace.attend({in.as(), ScalarType::float32, 1, heads, heads * 128, 128},
                                     {out.as(), ScalarType::float32, 1, heads, heads * 128, 128}, nullptr,
                                     nullptr);
                    expect_ok(cudaDeviceSynchronize());
                    const std::vector<float> found = out.read<float>();
                    // Where few bits are read, codes meet factors of 8 bits on the host: each weight is off
                    // by up to 2^-9 of the largest, and so are the outputs, of values up to 4.8.
                    const float bound = std::string(recipe) == "fp16" ? 1e-5f : 0x1p-9f * 4.8f;
                    for (Index i = 0; i < queries.size(); ++i)
                        ASSERT_NEAR(found[static_cast<std::size_t>(i)], expected(0, i), bound)
                            << recipe << " " << keys << " " << values;
                }
}

TEST(CudaAligned, IsCapturedInAGraph) {
    KVPLANE_NEEDS_DEVICE();
    Random random(kvplane_test::seed());
    TilePool pool;
    KvCache cache(configuration_of("key_favored:8:8", 4), pool);
    cache.append(kvplane_test::normal_matrix(2000, 256, random),
                 kvplane_test::normal_matrix(2000, 256, random));
    kvplane::cuda::DeviceMemory memory;
    TilePool device_pool(&memory);
    const auto uploaded = kvplane::cuda::DeviceCache::upload(cache, device_pool, nullptr);
    const RowMajorMatrix<float> rows = kvplane_test::normal_matrix(1, 8 * 128, random);
    const DeviceBytes in(rows.data(), 8 * 128 * 4), out(8 * 128 * 4), counts(sizeof(ReadCounts));
    cudaStream_t stream;
    expect_ok(cudaStreamCreate(&stream));
    AttendWorkspace workspace;
    const std::array sequences{uploaded.sequence()};
    workspace.plan(kvplane::cuda::attend_layer(cache.shape()), sequences, 1,
                   {.read = ReadPolicy::tolerance(0.05)}, stream);
    const auto attend = [&] {
        workspace.attend({in.as(), ScalarType::float32, 1, 8, 8 * 128, 128},
                         {out.as(), ScalarType::float32, 1, 8, 8 * 128, 128}, nullptr, stream,
                         {nullptr, counts.as<ReadCounts>()});
    };
    expect_ok(cudaMemset(counts.as(), 0, sizeof(ReadCounts)));
    attend();
    expect_ok(cudaStreamSynchronize(stream));
    const std::vector<float> expected = out.read<float>();
    const ReadCounts once = counts.read<ReadCounts>()[0];
    expect_ok(cudaMemset(out.as(), 0xFF, 8 * 128 * 4));
    kvplane_test::launch_captured(stream, 3, attend);
    EXPECT_EQ(out.read<float>(), expected);
    const ReadCounts all = counts.read<ReadCounts>()[0];
    for (int p = 0; p < 4; ++p) EXPECT_EQ(all.keys[p], 4 * once.keys[p]);
    cudaStreamDestroy(stream);
}

TEST(CudaAligned, RefusesWhatItCannotDo) {
    KVPLANE_NEEDS_DEVICE();
    using kvplane_test::refusal;
    TilePool pool;
    KvCache cache(configuration_of("key_favored:8:8", 4), pool);
    kvplane::cuda::DeviceMemory memory;
    TilePool device_pool(&memory);
    const auto uploaded = kvplane::cuda::DeviceCache::upload(cache, device_pool, nullptr);
    const std::array sequences{uploaded.sequence()};
    const auto layer = kvplane::cuda::attend_layer(cache.shape());
    AttendWorkspace workspace;
    const auto plan = [&](const ReadPolicy& read) {
        workspace.plan(layer, sequences, 1, {.position = 0, .read = read}, nullptr);
    };
    EXPECT_NE(refusal(ErrorCode::option, [&] { plan(ReadPolicy::fixed(4)); }).find("fixed reads"),
              std::string::npos);
    EXPECT_NE(refusal(ErrorCode::option, [&] { plan(ReadPolicy::aligned(1.0)); }).find("fits into it"),
              std::string::npos);
    plan(ReadPolicy::all());
    const DeviceBytes numbers(8 * 128 * 4);
    EXPECT_NE(refusal(ErrorCode::option,
                      [&] {
                          workspace.attend({numbers.as(), ScalarType::float32, 1, 8, 8 * 128, 128},
                                           {numbers.as(), ScalarType::float32, 1, 8, 8 * 128, 128}, nullptr,
                                           nullptr, {numbers.as<float>(), nullptr});
                      })
                  .find("without a policy"),
              std::string::npos);
}

}  // namespace
