// examples/dump_file.hpp: tensors of a model's cache in a safetensors file, as the dump example writes them.
#pragma once

#include <cstdio>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "kvplane/io/safetensors.hpp"

namespace kvplane_examples {

/// Four layers of SmolLM2-135M on 1024 tokens of Northanger Abbey, which ship with kvplane.
inline std::vector<std::filesystem::path> shipped_files() {
    return {std::filesystem::path(KVPLANE_EXAMPLE_DATA) / "smollm2_layers_0_8.safetensors",
            std::filesystem::path(KVPLANE_EXAMPLE_DATA) / "smollm2_layers_16_24.safetensors"};
}

/// The layers of which a file has keys, ascending.
inline std::set<int> layers_in(const kvplane::SafetensorsFile& file) {
    std::set<int> layers;
    for (const std::string& name : file.names()) {
        int layer = 0, used = 0;
        if (std::sscanf(name.c_str(), "layers.%d.keys%n", &layer, &used) == 1 &&
            used == static_cast<int>(name.size()))
            layers.insert(layer);
    }
    return layers;
}

/// [tokens, heads, head_dim] checked and flattened to tokens x (heads * head_dim).
inline kvplane::Matrix load(const kvplane::SafetensorsFile& file, const std::string& name,
                            kvplane::Index& heads) {
    using kvplane::ErrorCode;
    const auto& shape = file.info(name).shape;
    kvplane::require(shape.size() == 3, ErrorCode::shape, name, ": rank ", shape.size(),
                     ", expected [tokens, heads, head_dim]");
    kvplane::require(shape[0] >= 1 && shape[1] >= 1 && shape[2] >= 1, ErrorCode::shape, name, ": [", shape[0],
                     ", ", shape[1], ", ", shape[2], "], expected at least one token, head and channel");
    heads = shape[1];
    return file.to_float_matrix(name);
}

}  // namespace kvplane_examples
