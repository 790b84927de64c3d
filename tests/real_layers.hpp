// tests/real_layers.hpp: the tensors of a real model that ship with the examples.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kvplane/io/safetensors.hpp"

namespace kvplane_test {

/// One layer of SmolLM2-135M on real text: 1024 tokens from position 0, 3 key heads of 64 channels.
struct RealLayer {
    int layer;
    kvplane::Matrix keys, keys_before_rope, values;
    kvplane::Matrix queries;  ///< after RoPE, 9 heads, the 64 tokens from position 960 on
};

inline const std::vector<RealLayer>& real_layers() {
    static const std::vector<RealLayer> layers = [] {
        std::vector<RealLayer> read;
        for (const auto& [file_name, in_file] :
             {std::pair{"/smollm2_layers_0_8.safetensors", std::vector<int>{0, 8}},
              std::pair{"/smollm2_layers_16_24.safetensors", std::vector<int>{16, 24}}}) {
            const auto file = kvplane::SafetensorsFile::open(std::string(KVPLANE_EXAMPLE_DATA) + file_name);
            for (const int layer : in_file) {
                const std::string prefix = std::string("layers.") + std::to_string(layer);
                read.push_back({layer, file.to_float_matrix(prefix + ".keys"),
                                file.to_float_matrix(prefix + ".keys_before_rope"),
                                file.to_float_matrix(prefix + ".values"),
                                file.to_float_matrix(prefix + ".queries")});
            }
        }
        return read;
    }();
    return layers;
}

}  // namespace kvplane_test
