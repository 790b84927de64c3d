// examples/decode_layer.hpp: the keys, values and queries that examples decode, from a file or generated.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "dump_file.hpp"
#include "kvplane/error.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/recipe_names.hpp"
#include "options.hpp"
#include "synthetic_kv.hpp"

namespace kvplane_examples {

/// One layer: as many queries as tokens, or those of the last tokens.
struct DecodeLayer {
    std::string name;
    Index kv_heads, query_heads;
    Matrix keys, values, queries;
};

/// Which layers a program decodes: those of the files, or a generated one of these sizes.
struct DecodeSettings {
    std::vector<std::string> files;
    Index tokens = 8192, kv_heads = 8, query_heads = 32, head_dim = 128, seed = 1;
    Index queries = 1 << 24;  ///< generated, of the last tokens: at most one a token
};

/// The cache of a layer under a recipe, of a model with the default RoPE. Throws Error (option).
inline kvplane::CacheConfiguration configuration(const DecodeLayer& layer, const std::string& recipe) {
    kvplane::CacheConfiguration c;
    c.kv_heads = layer.kv_heads;
    c.query_heads = layer.query_heads;
    c.key_head_dim = layer.keys.cols() / layer.kv_heads;
    c.value_head_dim = layer.values.cols() / layer.kv_heads;
    c.recipe = kvplane::recipes::parse(recipe);
    c.rope = kvplane::RopeSettings{};
    return c;
}

namespace detail {

inline std::vector<DecodeLayer> from_files(const std::vector<std::string>& paths) {
    std::vector<DecodeLayer> layers;
    for (const std::string& path : paths) {
        const kvplane::SafetensorsFile file = kvplane::SafetensorsFile::open(path);
        for (const int layer : layers_in(file)) {
            const std::string name = "layers." + std::to_string(layer);
            DecodeLayer loaded{name, 0, 0, {}, {}, {}};
            Index value_heads = 0;
            loaded.keys = load(file, name + ".keys", loaded.kv_heads);
            loaded.values = load(file, name + ".values", value_heads);
            loaded.queries = load(file, name + ".queries", loaded.query_heads);
            kvplane::require(loaded.values.rows() == loaded.keys.rows() && value_heads == loaded.kv_heads &&
                                 loaded.queries.rows() <= loaded.keys.rows(),
                             kvplane::ErrorCode::shape, path, ": ", name, ": ", loaded.keys.rows(),
                             " keys of ", loaded.kv_heads, " heads, ", loaded.values.rows(), " values of ",
                             value_heads, ", ", loaded.queries.rows(),
                             " queries; expected as many values as keys and no more queries");
            layers.push_back(std::move(loaded));
        }
    }
    return layers;
}

inline DecodeLayer generated(const DecodeSettings& settings) {
    kvplane::require(settings.query_heads % settings.kv_heads == 0, kvplane::ErrorCode::option,
                     "--query-heads: ", settings.query_heads, ", expected a multiple of the ",
                     settings.kv_heads, " key heads");
    SyntheticOptions synthetic;
    synthetic.tokens = settings.tokens;
    synthetic.queries = std::min(settings.queries, settings.tokens);
    synthetic.kv_heads = settings.kv_heads;
    synthetic.query_heads = settings.query_heads;
    synthetic.head_dim = settings.head_dim;
    synthetic.seed = static_cast<std::uint64_t>(settings.seed);
    SyntheticLayer made = synthetic_layer(synthetic);
    return {"generated",          synthetic.kv_heads,     synthetic.query_heads,
            std::move(made.keys), std::move(made.values), std::move(made.queries)};
}

}  // namespace detail

/// The layers of the files, or one that is generated where there are none. Throws Error.
inline std::vector<DecodeLayer> decode_layers(const DecodeSettings& settings) {
    return settings.files.empty() ? std::vector{detail::generated(settings)}
                                  : detail::from_files(settings.files);
}

/// The options that say which layers are decoded.
inline void add_options(Options& options, DecodeSettings& settings) {
    const Options::Range size{.least = 1, .most = 1 << 24};
    options.arguments("FILE", settings.files, Options::Count::any,
                      "safetensors as dump writes them; without, tensors are generated");
    options.number("--tokens N", settings.tokens, size, "generated");
    options.number("--kv-heads N", settings.kv_heads, size, "generated");
    options.number("--query-heads N", settings.query_heads, size, "generated");
    options.number("--head-dim N", settings.head_dim, size, "generated");
    options.number("--seed N", settings.seed, {}, "of what is generated");
}

}  // namespace kvplane_examples
