// Attention on a device, against double precision over what the caches store. For machines with one; without
// a device it says so and tests nothing.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

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
using kvplane::cuda::DeviceTile;
using kvplane_test::DeviceBytes;
using kvplane_test::expect_ok;
using kvplane_test::Random;

struct Case {
    std::string recipe;
    Index kv_heads = 2, query_heads = 8, key_dim = 128, value_dim = 128;
    std::vector<Index> tokens = {700};
    Index query_tokens = 1;
    AttentionParameters parameters = {};
    Index drop = 0;
    bool sinks = false, alibi = false, bias = false;
};

CacheConfiguration configuration_of(const Case& c) {
    CacheConfiguration configuration{.kv_heads = c.kv_heads,
                                     .query_heads = c.query_heads,
                                     .key_head_dim = c.key_dim,
                                     .value_head_dim = c.value_dim,
                                     .recipe = recipes::parse(c.recipe),
                                     .rotation_seed = 7};
    if (configuration.recipe.latents) configuration.rope = RopeSettings{.layout = RopeLayout::halves};
    return configuration;
}

/// Normal numbers, some channels four times as large; for latents, of few directions of very different size,
/// so that latents have several widths.
Matrix keys_of(const Case& c, const CacheConfiguration& configuration, Index tokens, Random& random) {
    Matrix keys = kvplane_test::normal_matrix(tokens, c.kv_heads * c.key_dim, random);
    if (!configuration.recipe.latents) {
        for (Index i = 0; i < keys.cols(); i += 7) keys.col(i) *= 4.0f;
        return keys;
    }
    // Of every sequence and head the same directions.
    Random fixed(5);
    for (Index h = 0; h < c.kv_heads; ++h) {
        auto head = keys.middleCols(h * c.key_dim, c.key_dim);
        for (Index j = 0; j < c.key_dim; ++j) head.col(j) *= 0.3f * std::exp(-0.06f * static_cast<float>(j));
        head = (head * kvplane_test::normal_matrix(c.key_dim, c.key_dim, fixed)).eval();
    }
    return keys;
}

void expect_attention(const Case& c, std::uint64_t seed) {
    SCOPED_TRACE(c.recipe + ", heads " + std::to_string(c.query_heads) + "/" + std::to_string(c.kv_heads) +
                 " of " + std::to_string(c.key_dim) + "/" + std::to_string(c.value_dim) + ", " +
                 std::to_string(c.query_tokens) + " query tokens, " + std::to_string(c.tokens.size()) +
                 " sequences");
    Random random(seed);
    CacheConfiguration configuration = configuration_of(c);
    const bool latents = configuration.recipe.latents.has_value();
    TilePool pool;
    // Sequences that are attended together have one basis.
    if (latents && c.tokens.size() > 1) {
        KvCache first(configuration, pool);
        first.append(keys_of(c, configuration, 700, random),
                     kvplane_test::normal_matrix(700, c.kv_heads * c.value_dim, random),
                     kvplane_test::normal_matrix(700, c.query_heads * c.key_dim, random));
        configuration.latent_keys = first.state().latent;
    }
    std::vector<KvCache> caches;
    caches.reserve(c.tokens.size());
    kvplane::cuda::DeviceMemory memory;
    TilePool device_pool(&memory);
    std::vector<kvplane::cuda::DeviceCache> uploaded;
    std::vector<DeviceSequence> sequences;
    for (const Index tokens : c.tokens) {
        KvCache& cache = caches.emplace_back(configuration, pool);
        const Matrix keys = keys_of(c, configuration, tokens, random),
                     values = kvplane_test::normal_matrix(tokens, c.kv_heads * c.value_dim, random);
        if (configuration.fits_basis() || configuration.recipe.shaped_keys)
            cache.append(keys, values,
                         kvplane_test::normal_matrix(tokens, c.query_heads * c.key_dim, random));
        else
            cache.append(keys, values);
        if (c.drop > 0) cache.drop_before(c.drop, 4);
        uploaded.push_back(kvplane::cuda::DeviceCache::upload(cache, device_pool, nullptr));
    }
    for (const kvplane::cuda::DeviceCache& one : uploaded) sequences.push_back(one.sequence());

    const auto rows = static_cast<Index>(c.tokens.size()) * c.query_tokens;
    const Matrix queries = kvplane_test::normal_matrix(rows, c.query_heads * c.key_dim, random);
    const RowMajorMatrix<Eigen::half> half_queries = queries.cast<Eigen::half>();
    const auto bytes_of = [](const auto& matrix) {
        return static_cast<std::size_t>(matrix.size()) * sizeof(*matrix.data());
    };
    const DeviceBytes device_queries(half_queries.data(), bytes_of(half_queries));
    const DeviceBytes output(static_cast<std::size_t>(rows * c.query_heads * c.value_dim) * 4);
    const DeviceBytes log_sum_exp(static_cast<std::size_t>(rows * c.query_heads) * 4);

    AttentionParameters parameters = c.parameters, device_parameters = c.parameters;
    std::normal_distribution<float> normal;
    std::vector<float> sinks(static_cast<std::size_t>(c.query_heads)), slopes(sinks.size());
    for (float& sink : sinks) sink = normal(random);
    for (float& slope : slopes) slope = 0.01f * std::abs(normal(random));
    const DeviceBytes device_sinks(sinks.data(), sinks.size() * 4),
        device_slopes(slopes.data(), slopes.size() * 4);
    if (c.sinks) {
        parameters.sink_logits = sinks;
        device_parameters.sink_logits = {device_sinks.as<float>(), sinks.size()};
    }
    if (c.alibi) {
        parameters.alibi_slopes = slopes;
        device_parameters.alibi_slopes = {device_slopes.as<float>(), slopes.size()};
    }

    std::vector<Matrix> biases;
    std::vector<float> all_biases;
    for (const KvCache& cache : caches) {
        Matrix& one =
            biases.emplace_back(kvplane_test::normal_matrix(c.query_tokens, cache.tokens(), random));
        one(0, cache.tokens() / 2) = -std::numeric_limits<float>::infinity();
        all_biases.insert(all_biases.end(), one.data(), one.data() + one.size());
    }
    const DeviceBytes device_bias(all_biases.data(), all_biases.size() * 4);

    AttendWorkspace workspace;
    const auto basis = configuration.fits_basis() ? caches[0].state().latent : nullptr;
    workspace.plan(kvplane::cuda::attend_layer(caches[0].shape(), {}, basis), sequences, c.query_tokens,
                   device_parameters, nullptr, c.bias ? device_bias.as<float>() : nullptr);
    const kvplane::cuda::DeviceRows in{device_queries.as(), ScalarType::float16,       rows,
                                       c.query_heads,       c.query_heads * c.key_dim, c.key_dim};
    const kvplane::cuda::DeviceOutput out{output.as(),   ScalarType::float32,         rows,
                                          c.query_heads, c.query_heads * c.value_dim, c.value_dim};
    std::vector<float> first;
    for (int call = 0; call < 2; ++call) {
        workspace.attend(in, out, log_sum_exp.as<float>(), nullptr);
        expect_ok(cudaDeviceSynchronize());
        const std::vector<float> found = output.read<float>();
        if (call == 0) first = found;
        ASSERT_EQ(std::memcmp(first.data(), found.data(), found.size() * 4), 0) << "calls differ";
    }
    for (std::size_t s = 0; s < caches.size(); ++s) {
        const auto row = static_cast<Index>(s) * c.query_tokens;
        const Index tokens = caches[s].tokens();
        const auto seen = [&](auto stored) {
            if (c.drop == 0) return stored(0, tokens);
            Matrix all(4 + tokens - c.drop, stored(0, 1).cols());
            all << stored(0, 4), stored(c.drop, tokens - c.drop);
            return all;
        };
        const Matrix keys =
            seen([&](Index first, Index count) { return caches[s].stored_keys(first, count); });
        const Matrix values =
            seen([&](Index first, Index count) { return caches[s].stored_values(first, count); });
        AttentionParameters exact = parameters;
        if (c.bias) exact.bias = &biases[s];
        const MatrixD expected = reference_attention(
            keys, values, half_queries.middleRows(row, c.query_tokens).cast<float>().eval(), c.query_heads,
            c.kv_heads, exact);
        const Eigen::Map<const Matrix> found(first.data(), rows, c.query_heads * c.value_dim);
        const auto mine = found.middleRows(row, c.query_tokens).cast<double>();
        // Factors are rounded to 16 bits of the largest, .4 here where some channels are four times as large,
        // and meet codes that are off their middle by 4.6, as one standard deviation, in 128 channels: scores
        // err by .29 (.4 / 32512) 4.6 sqrt(128), 2e-4, and weights by as much of themselves. Outputs are sums
        // of few tokens.
        const double bound = 2e-4;
        EXPECT_LE((mine - expected).cwiseAbs().maxCoeff(),
                  bound * static_cast<double>(values.cwiseAbs().maxCoeff()))
            << "sequence " << s;
        EXPECT_TRUE(mine.allFinite());
    }
}

std::vector<Case> cases() {
    std::vector<Case> all;
    for (const char* recipe : {"fp16", "key_favored:4:4", "key_favored:8:8", "key_favored:2:2",
                               "key_favored:5:3", "key_favored:4:2", "key_favored:3:3", "key_favored:1:1",
                               "key_favored:6:7", "standard", "compact", "kivi:4", "kivi:2:32", "kivi:8:64",
                               "key_favored:7:1", "smallest", "key_favored:4:4+value_widths=32x4/32x2/64x1"})
        for (const Index dim : {Index{128}, Index{64}, Index{80}, Index{96}, Index{256}})
            all.push_back({.recipe = recipe, .key_dim = dim, .value_dim = dim, .tokens = {900}});
    for (const char* recipe :
         {"latent:3:3+heads_together=0", "latent:2:2+heads_together=0", "latent:4:4+heads_together=0",
          "latent:3:8+heads_together=0", "latent:2:4+heads_together=0+frame=after_rope", "weighted:3:3"})
        for (const Index dim : {Index{128}, Index{64}, Index{80}, Index{96}, Index{256}})
            all.push_back({.recipe = recipe, .key_dim = dim, .value_dim = dim, .tokens = {900}});
    all.push_back(
        {.recipe = "latent:3:3+heads_together=1", .key_dim = 64, .value_dim = 128, .tokens = {2000}});
    for (const char* recipe :
         {"fp16", "standard", "smallest", "key_favored:4:4", "kivi:4:32", "latent:3:3+heads_together=0"}) {
        all.push_back(
            {.recipe = recipe, .kv_heads = 1, .query_heads = 1, .tokens = {1, 3, 31, 129, 5000, 300}});
        all.push_back({.recipe = recipe,
                       .kv_heads = 3,
                       .query_heads = 9,
                       .key_dim = 64,
                       .value_dim = 64,
                       .tokens = {2000, 10},
                       .query_tokens = 5});
        all.push_back(
            {.recipe = recipe, .kv_heads = 2, .query_heads = 32, .tokens = {1000}, .query_tokens = 8});
        all.push_back({.recipe = recipe,
                       .kv_heads = 8,
                       .query_heads = 32,
                       .tokens = {4096, 20000, 700},
                       .query_tokens = 2});
        all.push_back({.recipe = recipe, .key_dim = 96, .value_dim = 128, .tokens = {777}});
        all.push_back(
            {.recipe = recipe, .tokens = {3000}, .query_tokens = 3, .parameters = {.softcap = 20.0}});
        all.push_back({.recipe = recipe,
                       .tokens = {3000},
                       .query_tokens = 3,
                       .parameters = {.sliding_window = 300, .sinks = 4}});
        all.push_back({.recipe = recipe,
                       .tokens = {3000},
                       .query_tokens = 4,
                       .parameters = {.sliding_window = 1000},
                       .sinks = true});
        all.push_back({.recipe = recipe, .tokens = {3000}, .alibi = true});
        all.push_back({.recipe = recipe, .tokens = {3000}, .parameters = {.position = 100}});
        all.push_back(
            {.recipe = recipe, .tokens = {1500}, .query_tokens = 7, .parameters = {.causal = false}});
        all.push_back({.recipe = recipe, .tokens = {3000}, .drop = 1000});
        all.push_back({.recipe = recipe, .tokens = {3000, 50}, .query_tokens = 2, .bias = true});
    }
    return all;
}

TEST(CudaAttention, EqualsDoublePrecisionOverWhatIsStored) {
    KVPLANE_NEEDS_DEVICE();
    std::uint64_t seed = kvplane_test::seed();
    for (const Case& c : cases()) expect_attention(c, seed++);
}

/// Two parts of a sequence put together by their sums give the whole; so sums are right.
TEST(CudaAttention, LogarithmsOfSumsAreThoseOfTheHost) {
    KVPLANE_NEEDS_DEVICE();
    Random random(kvplane_test::seed());
    const CacheConfiguration configuration = configuration_of({.recipe = "standard"});
    TilePool pool;
    KvCache cache(configuration, pool);
    cache.append(kvplane_test::normal_matrix(1000, 2 * 128, random),
                 kvplane_test::normal_matrix(1000, 2 * 128, random));
    const Matrix queries = kvplane_test::normal_matrix(3, 8 * 128, random);
    Matrix output(3, 8 * 128), expected;
    AttentionWorkspace host;
    cache.attend(queries, output, {}, host, {.log_sum_exp = &expected});

    kvplane::cuda::DeviceMemory memory;
    TilePool device_pool(&memory);
    const auto uploaded = kvplane::cuda::DeviceCache::upload(cache, device_pool, nullptr);
    const RowMajorMatrix<float> rows = queries;
    const DeviceBytes in(rows.data(), static_cast<std::size_t>(rows.size()) * 4),
        out(static_cast<std::size_t>(rows.size()) * 2), sums(3 * 8 * 4);
    AttendWorkspace workspace;
    const std::array sequences{uploaded.sequence()};
    workspace.plan(kvplane::cuda::attend_layer(cache.shape()), sequences, 3, {}, nullptr);
    workspace.attend({in.as(), ScalarType::float32, 3, 8, 8 * 128, 128},
                     {out.as(), ScalarType::bfloat16, 3, 8, 8 * 128, 128}, sums.as<float>(), nullptr);
    expect_ok(cudaDeviceSynchronize());
    const std::vector<float> found = sums.read<float>();
    for (Index i = 0; i < 24; ++i)
        EXPECT_NEAR(found[static_cast<std::size_t>(i)], expected(i / 8, i % 8), 2e-3);
    const std::vector<Eigen::bfloat16> numbers = out.read<Eigen::bfloat16>();
    const Matrix keys = cache.stored_keys(0, 1000), values = cache.stored_values(0, 1000);
    const MatrixD exact = reference_attention(keys, values, queries, 8, 2);
    const double largest = values.cwiseAbs().maxCoeff();
    for (Index i = 0; i < output.size(); ++i)
        EXPECT_NEAR(static_cast<float>(numbers[static_cast<std::size_t>(i)]), exact(i / 1024, i % 1024),
                    0x1p-8 * std::abs(exact(i / 1024, i % 1024)) + 2e-4 * largest);
}

/// A captured call uses the plan that is there when it is launched.
TEST(CudaAttention, IsCapturedInAGraph) {
    KVPLANE_NEEDS_DEVICE();
    Random random(kvplane_test::seed());
    TilePool pool;
    KvCache cache(configuration_of({.recipe = "key_favored:4:4"}), pool);
    cache.append(kvplane_test::normal_matrix(2000, 2 * 128, random),
                 kvplane_test::normal_matrix(2000, 2 * 128, random));
    kvplane::cuda::DeviceMemory memory;
    TilePool device_pool(&memory);
    const auto uploaded = kvplane::cuda::DeviceCache::upload(cache, device_pool, nullptr);
    const RowMajorMatrix<float> rows = kvplane_test::normal_matrix(1, 8 * 128, random);
    const DeviceBytes in(rows.data(), 8 * 128 * 4), out(8 * 128 * 4);
    cudaStream_t stream;
    expect_ok(cudaStreamCreate(&stream));
    AttendWorkspace workspace;
    const std::array sequences{uploaded.sequence()};
    workspace.plan(kvplane::cuda::attend_layer(cache.shape()), sequences, 1, {}, stream);
    const auto attend = [&] {
        workspace.attend({in.as(), ScalarType::float32, 1, 8, 8 * 128, 128},
                         {out.as(), ScalarType::float32, 1, 8, 8 * 128, 128}, nullptr, stream);
    };
    attend();
    expect_ok(cudaStreamSynchronize(stream));
    const std::vector<float> expected = out.read<float>();
    expect_ok(cudaMemset(out.as(), 0xFF, 8 * 128 * 4));
    kvplane_test::launch_captured(stream, 3, attend);
    EXPECT_EQ(out.read<float>(), expected);
    cudaStreamDestroy(stream);
}

TEST(CudaAttention, RefusesWhatItCannotDo) {
    KVPLANE_NEEDS_DEVICE();
    using kvplane_test::refusal;
    TilePool pool;
    KvCache cache(configuration_of({.recipe = "standard"}), pool);
    kvplane::cuda::DeviceMemory memory;
    TilePool device_pool(&memory);
    const auto uploaded = kvplane::cuda::DeviceCache::upload(cache, device_pool, nullptr);
    const std::array sequences{uploaded.sequence()};
    const auto layer = kvplane::cuda::attend_layer(cache.shape());
    AttendWorkspace workspace;
    const auto plan = [&](Index tokens, const AttentionParameters& parameters) {
        workspace.plan(layer, sequences, tokens, parameters, nullptr);
    };
    EXPECT_NE(refusal(ErrorCode::shape, [&] { plan(9, {}); }).find("9 query tokens"), std::string::npos);
    EXPECT_NE(refusal(ErrorCode::shape, [&] { plan(1, {}); }).find("over 0 cached ones"), std::string::npos);
    EXPECT_NE(refusal(ErrorCode::option, [&] { plan(1, {.position = 0, .read = ReadPolicy::fixed(4)}); })
                  .find("policy"),
              std::string::npos);
    const auto other =
        kvplane::cuda::attend_layer(KvCache(configuration_of({.recipe = "fp16"}), pool).shape());
    EXPECT_NE(
        refusal(ErrorCode::mismatch, [&] { workspace.plan(other, sequences, 1, {.position = 0}, nullptr); })
            .find("expected those of the layer"),
        std::string::npos);
    Random random(kvplane_test::seed());
    cache.append(kvplane_test::normal_matrix(400, 256, random),
                 kvplane_test::normal_matrix(400, 256, random));
    cache.narrow(0, 200, 4, 2);
    const auto narrowed = kvplane::cuda::DeviceCache::upload(cache, device_pool, nullptr);
    const std::array narrowed_sequence{narrowed.sequence()};
    EXPECT_NE(refusal(ErrorCode::option, [&] { workspace.plan(layer, narrowed_sequence, 1, {}, nullptr); })
                  .find("narrowed"),
              std::string::npos);
    // Of caches that fit bases of their own each has another.
    std::vector<kvplane::cuda::DeviceCache> latent_caches;
    for (int i = 0; i < 2; ++i) {
        const CacheConfiguration c = configuration_of({.recipe = "latent:3:3+heads_together=0"});
        KvCache one(c, pool);
        one.append(kvplane_test::normal_matrix(700, 256, random),
                   kvplane_test::normal_matrix(700, 256, random),
                   kvplane_test::normal_matrix(700, 8 * 128, random));
        latent_caches.push_back(kvplane::cuda::DeviceCache::upload(one, device_pool, nullptr));
    }
    const auto of_first =
        kvplane::cuda::attend_layer(latent_caches[0].shape(), {}, latent_caches[0].state().latent);
    const std::array second{latent_caches[1].sequence()};
    EXPECT_NE(refusal(ErrorCode::mismatch, [&] { workspace.plan(of_first, second, 1, {}, nullptr); })
                  .find("another basis"),
              std::string::npos);
    EXPECT_NE(refusal(ErrorCode::option, [&] { workspace.attend({}, {}, nullptr, nullptr); }).find("no plan"),
              std::string::npos);
}

}  // namespace
