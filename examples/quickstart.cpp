// examples/quickstart.cpp: one layer of a real model in caches of several recipes. What does each cost and keep?
#include <cstdio>
#include <kvplane/kvplane.hpp>
#include <string>

using namespace kvplane;

int main() {
    // SmolLM2-135M on 1024 tokens of a novel: keys and values of all of them, queries of the last 64.
    const auto file = SafetensorsFile::open(KVPLANE_EXAMPLE_DATA "/smollm2_layers_16_24.safetensors");
    const auto tensor = [&](const char* name) {
        return file.to_float_matrix(std::string("layers.16.") + name);
    };
    const Matrix keys = tensor("keys"), values = tensor("values"), queries = tensor("queries").bottomRows(32);

    CacheConfiguration layer;
    layer.kv_heads = 3, layer.query_heads = 9;
    layer.key_head_dim = layer.value_head_dim = 64;
    layer.rope = RopeSettings{.base = 100000};

    // What recipes with latents are fitted to: keys and queries before RoPE, of earlier tokens than are judged.
    LatentStatistics statistics(layer.kv_heads, layer.query_heads, layer.key_head_dim);
    Matrix earlier = tensor("queries").topRows(32);
    RotaryEmbedding(64, *layer.rope).rotate_back(earlier, 1024 - 64);
    statistics.add_queries(earlier);
    statistics.add_keys({tensor("keys_before_rope").topRows(512), 0});

    TilePool pool;
    AttentionWorkspace workspace;
    Matrix exact, output(queries.rows(), queries.cols());
    std::string best = "nothing";
    double kivi_bits = 0, kivi_error = 1, best_error = 1;
    std::printf("%-16s %9s %8s %11s %13s %17s\n", "recipe", "true bits", "smaller", "key error",
                "value error", "attention error");
    for (const std::string recipe : {"fp16", "kivi:4:32", "standard", "compact", "key_favored:4:2",
                                     "svdq:2:3", "latent:4:4", "latent:3:3", "latent:2:2"}) {
        layer.recipe = recipes::parse(recipe);
        layer.latent_keys =
            layer.recipe.latents ? fit_latent_keys(statistics, layer.rope, *layer.recipe.latents) : nullptr;
        KvCache cache(layer, pool);
        cache.append(keys, values);
        cache.attend(queries, output, {}, workspace);
        if (recipe == "fp16") exact = output;

        const double bits = cache.bits_per_element(), error = relative_error(exact, output);
        std::printf("%-16s %9.2f %7.1fx %11.4f %13.4f %17.4f\n", recipe.c_str(), bits, 16 / bits,
                    relative_error(keys, cache.stored_keys(0, cache.tokens())),
                    relative_error(values, cache.stored_values(0, cache.tokens())), error);
        if (recipe == "kivi:4:32") kivi_bits = bits, kivi_error = error;
        if (bits <= kivi_bits && error < best_error) best = recipe, best_error = error;
    }
    std::printf(
        "\nOf all that take no more than kivi:4:32, %s keeps attention best: off by %.1f%%, not %.1f%%.\n",
        best.c_str(), 100 * best_error, 100 * kivi_error);
    return std::fflush(stdout) == 0 ? 0 : 1;
}
