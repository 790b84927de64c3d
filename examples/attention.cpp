// examples/attention.cpp: a decode loop on tensors alone. Keys and values arrive token by token, and every token
// attends to all before it, while the context grows.
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "decode_layer.hpp"
#include "kvplane/cache/huge_pages.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/recipe_names.hpp"
#include "kvplane/recipes.hpp"
#include "options.hpp"

namespace {

using namespace kvplane;
using Layer = kvplane_examples::DecodeLayer;
using Clock = std::chrono::steady_clock;
using kvplane_examples::Options;

constexpr const char* summary =
    R"(Prints, at every power of two of the context, tokens a second (append and attend of one layer), the bytes of
the cache, and the error of its output against an fp16 cache's. Of a file, the last tokens of each layer are
decoded, those with queries.)";

void decode(const Layer& layer, const std::string& recipe, Executor& executor) {
    constexpr Index measured = 64;
    CacheConfiguration c = kvplane_examples::configuration(layer, recipe);
    HugePageResource memory;
    TilePool pool(&memory);
    KvCache cache(c, pool);
    c.recipe = recipes::fp16();
    KvCache exact(c, pool);
    AttentionWorkspace workspace(&executor);
    const Index tokens = layer.keys.rows(), without_query = tokens - layer.queries.rows();
    Matrix output(1, layer.query_heads * c.value_head_dim), expected = output;
    const auto append = [&](KvCache& to, Index first, Index count) {
        const Index query = std::max<Index>(0, first - without_query);
        to.append(layer.keys.middleRows(first, count), layer.values.middleRows(first, count),
                  layer.queries.middleRows(std::min(query, layer.queries.rows() - count), count));
    };
    for (Index at = 0, goal = 512; at < tokens; goal *= 2) {
        const Index end = std::min(goal, tokens),
                    first = std::min(end, std::max({at, end - measured, without_query}));
        while (at < first) {
            const Index count = std::min({first - at, layer.queries.rows(), Index{128}});
            append(cache, at, count);
            append(exact, at, count);
            at += count;
        }
        double appending = 0.0, attending = 0.0, error = 0.0, norm = 0.0;
        for (Index t = first; t < end; ++t) {
            const auto start = Clock::now();
            append(cache, t, 1);
            const auto appended = Clock::now();
            cache.attend(layer.queries.middleRows(t - without_query, 1), output, {}, workspace);
            attending += std::chrono::duration<double>(Clock::now() - appended).count();
            appending += std::chrono::duration<double>(appended - start).count();
            append(exact, t, 1);
            exact.attend(layer.queries.middleRows(t - without_query, 1), expected, {}, workspace);
            error += (output - expected).squaredNorm();
            norm += expected.squaredNorm();
        }
        at = end;
        if (end == first) continue;
        const auto count = static_cast<double>(end - first);
        std::printf("%-12s %-22s %8ld %10.0f %10.1f us %8.1f us %12ld %6.2f %10.5f\n", layer.name.c_str(),
                    recipe.c_str(), static_cast<long>(end), count / (appending + attending),
                    1e6 * attending / count, 1e6 * appending / count, static_cast<long>(cache.bytes()),
                    cache.bits_per_element(), norm > 0.0 ? std::sqrt(error / norm) : 0.0);
        std::fflush(stdout);
    }
}

}  // namespace

int main(int count, char** arguments) {
    kvplane_examples::DecodeSettings settings;
    std::vector<std::string> names{"fp16", "standard", "compact", "latent:3:3"};
    Index threads = 2;
    Options options("attention", summary);
    kvplane_examples::add_options(options, settings);
    options.texts("--recipes A,B,C", names, "how keys and values are stored", Options::Need::optional,
                  [](const std::string& name) { (void)recipes::parse(name); });
    options.number("--threads N", threads, {.least = 1, .most = 1024}, "that attend");
    options.footer(kvplane::recipes::help());
    return options.run(count, arguments, [&] {
        ThreadExecutor executor(threads);
        const std::vector<Layer> layers = kvplane_examples::decode_layers(settings);
        std::printf("%-12s %-22s %8s %10s %13s %11s %12s %6s %10s\n", "layer", "recipe", "context",
                    "tokens/s", "attend", "append", "bytes", "bits", "error");
        for (const Layer& layer : layers)
            for (const std::string& name : names) decode(layer, name, executor);
    });
}
