// examples/quickstart.cpp: what each quantizer costs and keeps on keys and values of a real model.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "dump_file.hpp"
#include "kvplane/io/safetensors.hpp"
#include "quantizer_report.hpp"

namespace {

using namespace kvplane;
using kvplane_examples::layers_in;
using kvplane_examples::LayerTensors;
using kvplane_examples::load;

constexpr const char* usage =
    "usage: quickstart [FILE] [--json] [--help]\n"
    "\n"
    "Quantizes the keys and values of every layer in FILE with each method and prints what it costs and "
    "keeps.\n"
    "FILE is a safetensors file with tensors layers.L.keys and layers.L.values [tokens, kv_heads, head_dim] "
    "and,\n"
    "for the error of attention, layers.L.queries [queries, heads, head_dim]; the queries stand at the "
    "metadata's\n"
    "first_query_position, or at the last positions. Without FILE: four layers of SmolLM2-135M on 1024 "
    "tokens of\n"
    "Northanger Abbey, which ship with kvplane.\n"
    "\n"
    "  --json   one JSON object {\"rows\": [...], \"allocation\": [...]} and nothing else\n";

LayerTensors load_layer(const SafetensorsFile& file, int layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    LayerTensors tensors;
    tensors.layer = layer;
    Index value_heads = 0, query_heads = 0;
    tensors.keys = load(file, prefix + "keys", tensors.kv_heads);
    tensors.values = load(file, prefix + "values", value_heads);
    require(value_heads == tensors.kv_heads && tensors.values.rows() == tensors.keys.rows(), ErrorCode::shape,
            prefix, "values: ", tensors.values.rows(), " tokens of ", value_heads, " heads, expected ",
            tensors.keys.rows(), " of ", tensors.kv_heads, " as the keys have");
    if (!file.contains(prefix + "queries")) return tensors;
    tensors.queries = load(file, prefix + "queries", query_heads);
    Index position = tensors.keys.rows() - tensors.queries->rows();
    if (const auto given = file.metadata().find("first_query_position"); given != file.metadata().end())
        position = std::atol(given->second.c_str());
    tensors.attention = {query_heads, tensors.kv_heads, position};
    return tensors;
}

void run(std::vector<std::filesystem::path> files, bool json) {
    if (files.empty()) files = kvplane_examples::shipped_files();
    std::vector<LayerTensors> layers;
    for (const auto& path : files) {
        const SafetensorsFile file = SafetensorsFile::open(path);
        for (const int layer : layers_in(file)) layers.push_back(load_layer(file, layer));
    }
    require(!layers.empty(), ErrorCode::index, files.front().string(),
            ": no tensor named layers.L.keys, expected at least one layer");
    if (!json)
        std::printf("%zu layers, %ld tokens, %ld key/value heads of %ld channels\n\n", layers.size(),
                    static_cast<long>(layers[0].keys.rows()), static_cast<long>(layers[0].kv_heads),
                    static_cast<long>(layers[0].keys.cols() / layers[0].kv_heads));
    kvplane_examples::report(layers, 3.5, json);
}

}  // namespace

int main(int count, char** arguments) {
    std::vector<std::filesystem::path> files;
    bool json = false;
    for (int i = 1; i < count; ++i) {
        const std::string argument = arguments[i];
        if (argument == "--help") return std::printf("%s", usage), 0;
        if (argument == "--json") {
            json = true;
        } else if (argument.starts_with("-") || !files.empty()) {
            return std::fprintf(stderr, "quickstart: unexpected argument '%s'\n%s", argument.c_str(), usage),
                   2;
        } else {
            files.emplace_back(argument);
        }
    }
    try {
        run(files, json);
    } catch (const std::exception& error) {
        return std::fprintf(stderr, "quickstart: %s\n", error.what()), 1;
    }
}
