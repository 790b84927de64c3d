// examples/quickstart.cpp: one layer of a real model in caches of several recipes. What does each take, and what does
// it keep?
#include <cstdio>
#include <kvplane/kvplane.hpp>
#include <string>

using namespace kvplane;

int main() {
    // SmolLM2-135M on 1024 tokens of a novel: keys and values of all of them, queries of the last 64.
    const auto file = SafetensorsFile::open(KVPLANE_EXAMPLE_DATA "/smollm2_layers_16_24.safetensors");
    const Matrix keys = file.to_float_matrix("layers.16.keys"),
                 values = file.to_float_matrix("layers.16.values"),
                 all_queries = file.to_float_matrix("layers.16.queries"),
                 queries = all_queries.bottomRows(32);

    CacheConfiguration layer;
    layer.kv_heads = 3, layer.query_heads = 9;
    layer.key_head_dim = layer.value_head_dim = 64;
    layer.rope = RopeSettings{.base = 100000};

    // What recipes with latents want to know: keys and queries before RoPE. The first half is all they see.
    Matrix earlier = all_queries.topRows(32);
    RotaryEmbedding(64, *layer.rope).rotate_back(earlier, 960);
    LatentStatistics statistics(layer.kv_heads, layer.query_heads, layer.key_head_dim);
    statistics.add_keys({file.to_float_matrix("layers.16.keys_before_rope").topRows(512), 0});
    statistics.add_queries(earlier);

    TilePool pool;
    AttentionWorkspace workspace;
    Matrix exact, output(32, 9 * 64);
    double kivi_bits = 0, kivi_error = 0, best_error = 1;
    std::string best;
    std::printf("%-18s %9s %9s %11s %11s %15s\n", "recipe", "true bits", "smaller", "key error",
                "value error", "attention error");
    for (const std::string recipe : {"fp16", "kivi:4:32", "standard", "compact", "key_favored:4:2",
                                     "svdq:2:3", "latent:4:4", "latent:3:3", "latent:2:2"}) {
        layer.recipe = recipes::parse(recipe);
        if (layer.recipe.latents)
            layer.latent_keys = fit_latent_keys(statistics, layer.rope, *layer.recipe.latents);
        KvCache cache(layer, pool);
        cache.append(keys, values);
        cache.attend(queries, output, {}, workspace);
        if (recipe == "fp16") exact = output;

        const double bits = cache.bits_per_element(), error = relative_error(exact, output);
        std::printf("%-18s %9.2f %8.1fx %11.4f %11.4f %15.4f\n", recipe.c_str(), bits, 16 / bits,
                    relative_error(keys, cache.stored_keys(0, 1024)),
                    relative_error(values, cache.stored_values(0, 1024)), error);
        if (recipe == "kivi:4:32") kivi_bits = bits, kivi_error = error;
        if (kivi_bits > 0 && bits <= kivi_bits && error < best_error) best = recipe, best_error = error;
    }
    std::printf(
        "\nOf all that take no more than kivi:4:32, %s keeps attention best: off by %.1f%%, not %.1f%%.\n",
        best.c_str(), 100 * best_error, 100 * kivi_error);
    return std::fflush(stdout) == 0 ? 0 : 1;
}
