// examples/decode_layer.hpp: the keys, values and queries that examples decode: of a file, or generated.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dump_file.hpp"
#include "engine/command_line.hpp"
#include "kvplane/error.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/recipes.hpp"
#include "synthetic_kv.hpp"

namespace kvplane_examples {

/// One layer: as many queries as tokens, or those of the last tokens.
struct DecodeLayer {
    std::string name;
    Index kv_heads, query_heads;
    Matrix keys, values, queries;
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

inline DecodeLayer generated(const engine::CommandLine& options, Index tokens, std::optional<Index> queries) {
    SyntheticOptions synthetic;
    synthetic.tokens = options.number("--tokens", tokens, 1);
    synthetic.queries = std::min(queries.value_or(synthetic.tokens), synthetic.tokens);
    synthetic.kv_heads = options.number("--kv-heads", 8, 1);
    synthetic.query_heads = options.number("--query-heads", 32, 1);
    synthetic.head_dim = options.number("--head-dim", 128, 1);
    synthetic.seed = static_cast<std::uint64_t>(options.number("--seed", 1));
    kvplane::require(synthetic.query_heads % synthetic.kv_heads == 0, kvplane::ErrorCode::option,
                     "--query-heads: ", synthetic.query_heads, ", expected a multiple of the ",
                     synthetic.kv_heads, " key heads");
    SyntheticLayer made = synthetic_layer(synthetic);
    return {"generated",          synthetic.kv_heads,     synthetic.query_heads,
            std::move(made.keys), std::move(made.values), std::move(made.queries)};
}

}  // namespace detail

/// Those of the files that a command line names, or one generated as its options --tokens, --kv-heads,
/// --query-heads, --head-dim and --seed say, with so many queries (none: as many as tokens). Throws Error.
inline std::vector<DecodeLayer> decode_layers(const engine::CommandLine& options, Index tokens,
                                              std::optional<Index> queries) {
    if (options.rest().empty()) return {detail::generated(options, tokens, queries)};
    return detail::from_files(options.rest());
}

}  // namespace kvplane_examples
