// examples/studies/aligned.cpp: one cache, read in full and in part. For every recipe and read policy the bytes that
// a decode step reads, its time, and the error of its output.
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "decode_layer.hpp"
#include "kvplane/cache/huge_pages.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/recipe_names.hpp"
#include "options.hpp"

namespace {

using namespace kvplane;
using Layer = kvplane_examples::DecodeLayer;
using Clock = std::chrono::steady_clock;
using kvplane_examples::Options;

constexpr const char* summary =
    R"(Prints what a decode step reads of a cache under each read policy, the time it takes, and the error of its
output against an fp16 cache's and against reading all, over the last queries. Recipes that differ in the policy
alone share one cache.)";

/// The last queries one after another: each is a decode step over all tokens. The caches have the same content, and
/// each step takes the next, so that it reads from memory.
struct Steps {
    Matrix outputs;
    double seconds = 0.0, key_bits = 0.0, value_bits = 0.0, certificate = 0.0;
};
Steps run(const std::vector<KvCache>& caches, const Matrix& queries, const ReadPolicy& policy,
          Executor& executor) {
    AttentionWorkspace workspace(&executor);
    AttentionParameters parameters;
    parameters.read = policy;
    Steps steps;
    const CacheConfiguration& c = caches[0].configuration();
    steps.outputs.resize(queries.rows(), c.query_heads * c.value_head_dim);
    Matrix output(1, steps.outputs.cols());
    caches[0].attend(queries.topRows(1), output, parameters, workspace);
    for (Index i = 0; i < queries.rows(); ++i) {
        const KvCache& cache = caches[static_cast<std::size_t>(i + 1) % caches.size()];
        const auto start = Clock::now();
        cache.attend(queries.middleRows(i, 1), output, parameters, workspace);
        steps.seconds += std::chrono::duration<double>(Clock::now() - start).count();
        steps.outputs.row(i) = output;
        steps.key_bits += workspace.report().key_bits;
        steps.value_bits += workspace.report().value_bits;
        steps.certificate = std::max(steps.certificate, workspace.report().relative_error_bound);
    }
    const auto count = static_cast<double>(queries.rows());
    steps.seconds /= count;
    steps.key_bits /= count;
    steps.value_bits /= count;
    return steps;
}

void compare(const Layer& layer, const std::vector<std::string>& names, Index count, Index turns,
             Executor& executor) {
    HugePageResource memory;
    TilePool pool(&memory);
    const Matrix queries = layer.queries.bottomRows(std::min(count, layer.queries.rows()));
    const auto filled = [&](const std::string& recipe, Index copies) {
        std::vector<KvCache> caches;
        for (Index i = 0; i < copies; ++i) {
            KvCache& cache = caches.emplace_back(configuration(layer, recipe), pool);
            // A basis of the cache's own would be fitted to queries of the first tokens, which a layer lacks.
            if (cache.needs_queries())
                cache.append(
                    layer.keys, layer.values,
                    Matrix::Zero(layer.keys.rows(), layer.query_heads * cache.configuration().key_head_dim));
            else
                cache.append(layer.keys, layer.values);
        }
        return caches;
    };
    const Matrix exact = run(filled("fp16", 1), queries, ReadPolicy::all(), executor).outputs;
    std::string made;
    std::vector<KvCache> caches;
    Steps full;
    for (const std::string& name : names) {
        const std::size_t at = name.find('@');
        const std::string recipe = name.substr(0, at);
        if (recipe != made) {
            caches.clear();
            caches = filled(recipe, turns);
            full = run(caches, queries, ReadPolicy::all(), executor);
            made = recipe;
        }
        const Steps some = at == std::string::npos
                               ? full
                               : run(caches, queries, recipes::read_policy(name.substr(at + 1)), executor);
        const KvCache& cache = caches[0];
        const CacheConfiguration& c = cache.configuration();
        const auto packed = static_cast<double>(cache.packed_tokens() * c.kv_heads) / 8.0;
        const double bytes =
            static_cast<double>(cache.bytes()) -
            packed * (static_cast<double>(c.key_head_dim) * (full.key_bits - some.key_bits) +
                      static_cast<double>(c.value_head_dim) * (full.value_bits - some.value_bits));
        std::printf("%-10s %-32s %11.0f %6.2f %6.2f %9.1f us %10.6f %10.6f", layer.name.c_str(), name.c_str(),
                    bytes, some.key_bits, some.value_bits, 1e6 * some.seconds,
                    (some.outputs - exact).norm() / exact.norm(),
                    (some.outputs - full.outputs).norm() / full.outputs.norm());
        if (some.certificate > 0.0) std::printf("   certificate %.4f", some.certificate);
        std::printf("\n");
        std::fflush(stdout);
    }
}

}  // namespace

int main(int count, char** arguments) {
    kvplane_examples::DecodeSettings settings;
    settings.tokens = 32768;
    settings.queries = 16;
    std::vector<std::string> names{"fp16",
                                   "fp16@published",
                                   "fp16@aligned",
                                   "key_favored:8:8",
                                   "key_favored:8:8@6",
                                   "key_favored:8:8@5",
                                   "key_favored:8:8@4",
                                   "key_favored:8:8@3",
                                   "key_favored:8:8@fixed4",
                                   "key_favored:8:8@tolerance=0.02",
                                   "key_favored:4:4"};
    Index turns = 8, threads = 2;
    Options options("aligned", summary);
    kvplane_examples::add_options(options, settings);
    options.texts("--recipes A,B,C", names, "recipes with read policies", Options::Need::optional,
                  [](const std::string& name) {
                      const std::size_t at = name.find('@');
                      (void)recipes::parse(name.substr(0, at));
                      if (at != std::string::npos) (void)recipes::read_policy(name.substr(at + 1));
                  });
    options.number("--queries N", settings.queries, {.least = 1}, "of the last tokens, one step each");
    options.number("--layers N", turns, {.least = 1, .most = 1000},
                   "equal caches that take turns, so that a step reads from memory");
    options.number("--threads N", threads, {.least = 1, .most = 1024}, "that attend");
    options.footer(kvplane::recipes::help());
    return options.run(count, arguments, [&] {
        ThreadExecutor executor(threads);
        const std::vector<Layer> layers = kvplane_examples::decode_layers(settings);
        std::printf("%-10s %-32s %11s %6s %6s %12s %10s %10s\n", "layer", "recipe@policy", "bytes read",
                    "keys", "values", "time", "error", "of reading");
        for (const Layer& layer : layers) compare(layer, names, settings.queries, turns, executor);
    });
}
