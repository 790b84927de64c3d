// examples/report.cpp: what each quantizer costs and keeps on keys and values of a real model, layer by layer.
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "dump_file.hpp"
#include "kvplane/io/safetensors.hpp"
#include "options.hpp"
#include "quantizer_report.hpp"

namespace {

using namespace kvplane;
using kvplane_examples::layers_in;
using kvplane_examples::LayerTensors;
using kvplane_examples::load;
using kvplane_examples::Options;

constexpr const char* summary =
    R"(Quantizes the keys and values of every layer in FILE with each method, and prints what it costs and keeps.
FILE is a safetensors file with tensors layers.L.keys and layers.L.values [tokens, kv_heads, head_dim] and, for
the error of attention, layers.L.queries [queries, heads, head_dim], which stand at the metadata's
first_query_position, or at the last positions. Without FILE: four layers of SmolLM2-135M on 1024 tokens of
Northanger Abbey, which ship with kvplane.)";

Index position_in(const std::string& metadata) {
    Index position = 0;
    const auto [end, error] = std::from_chars(metadata.data(), metadata.data() + metadata.size(), position);
    require(error == std::errc() && end == metadata.data() + metadata.size(), ErrorCode::format,
            "metadata first_query_position: '", metadata, "', expected a number");
    return position;
}

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
        position = position_in(given->second);
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
    std::vector<std::string> files;
    bool json = false;
    Options options("report", summary);
    options.arguments("FILE", files, Options::Count::at_most_one, "as dump writes it");
    options.flag("--json", json, "one JSON object {\"rows\": [...], \"allocation\": [...]} and nothing else");
    return options.run(count, arguments, [&] { run({files.begin(), files.end()}, json); });
}
