// examples/quantizer_report.hpp: what each quantizer costs and keeps, as a table or JSON. The report prints it for
// tensors of a file, the study `synthetic` for generated ones.
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvplane/allocate/key_favored.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/metrics.hpp"
#include "kvplane/storage/quantized.hpp"
#include "kvplane/transform/hadamard.hpp"

namespace kvplane_examples {

using namespace kvplane;

/// One layer's tensors: tokens x (heads * head_dim). Without queries there is no output error.
struct LayerTensors {
    int layer = 0;
    Index kv_heads = 1;
    Matrix keys, values;
    std::optional<Matrix> queries;
    AttentionShape attention;
};

/// One line of the table. Errors are relative (Frobenius); `bound` is that of key_error.
struct ReportRow {
    int layer;
    std::string method;
    int key_bits, value_bits;
    double true_bits, key_error, value_error;
    std::optional<double> output_error;
    double bound, compression;
};

/// A way to quantize both sides.
struct Method {
    std::string name;
    int key_bits, value_bits;
    std::function<Quantized(const Matrix&, Index heads, int bits)> keys, values;
    bool rotate_values = false;
};

inline std::vector<Method> methods() {
    const auto by_channel = [](const Matrix& m, Index heads, int bits) {
        return per_channel(m, {.bits = bits, .scheme = scheme_for(bits), .heads = heads});
    };
    const auto by_token = [](const Matrix& m, Index heads, int bits) {
        return per_token(m, {.bits = bits, .scheme = scheme_for(bits), .heads = heads});
    };
    const auto blocks = [](const Matrix& m, Index heads, int bits) {
        return per_group(m,
                         {.bits = bits, .scheme = Scheme::symmetric, .group_channels = 32, .heads = heads});
    };
    std::vector<Method> all;
    for (const auto& [k, v] : {std::pair{8, 8}, {4, 4}, {4, 2}, {2, 4}, {3, 3}, {2, 2}})
        all.push_back({"keys by channel, values by token", k, v, by_channel, by_token});
    for (const auto& [k, v] : {std::pair{4, 2}, {2, 2}})
        all.push_back({"the same, values rotated", k, v, by_channel, by_token, true});
    all.push_back({"both by token", 4, 4, by_token, by_token});
    all.push_back({"both in symmetric blocks of 32", 4, 4, blocks, blocks});
    return all;
}

inline ReportRow fp16_row(const LayerTensors& tensors) {
    const Matrix k = tensors.keys.cast<Eigen::half>().cast<float>();
    const Matrix v = tensors.values.cast<Eigen::half>().cast<float>();
    ReportRow row{tensors.layer,
                  "fp16",
                  16,
                  16,
                  16.0,
                  relative_error(tensors.keys, k),
                  relative_error(tensors.values, v),
                  std::nullopt,
                  std::ldexp(1.0, -11),
                  1.0};
    if (tensors.queries)
        row.output_error =
            attention_output_error(tensors.attention, tensors.keys, tensors.values, k, v, *tensors.queries);
    return row;
}

inline ReportRow measure(const LayerTensors& tensors, const Method& method) {
    Matrix values = tensors.values;
    const Hadamard rotation(values.cols() / tensors.kv_heads);
    if (method.rotate_values) rotation.rotate(values);
    const Quantized k = method.keys(tensors.keys, tensors.kv_heads, method.key_bits);
    const Quantized v = method.values(values, tensors.kv_heads, method.value_bits);
    const Matrix close_keys = k.dequantize();
    Matrix close_values = v.dequantize();
    if (method.rotate_values) rotation.rotate_back(close_values);

    const double elements = static_cast<double>(tensors.keys.size() + tensors.values.size());
    const double bits = 8.0 * static_cast<double>(k.bytes() + v.bytes()) / elements;
    ReportRow row{tensors.layer,
                  method.name,
                  method.key_bits,
                  method.value_bits,
                  bits,
                  relative_error(tensors.keys, close_keys),
                  relative_error(tensors.values, close_values),
                  std::nullopt,
                  k.frobenius_error_bound() / static_cast<double>(tensors.keys.norm()),
                  16.0 / bits};
    if (tensors.queries)
        row.output_error = attention_output_error(tensors.attention, tensors.keys, tensors.values, close_keys,
                                                  close_values, *tensors.queries);
    return row;
}

inline std::vector<ReportRow> measure_all(std::span<const LayerTensors> layers) {
    std::vector<ReportRow> rows;
    for (const LayerTensors& layer : layers) {
        rows.push_back(fp16_row(layer));
        for (const Method& method : methods()) rows.push_back(measure(layer, method));
    }
    return rows;
}

struct Suggestion {
    double mean_bits;
    std::vector<LayerProfile> profiles;
    KeyFavoredAllocation allocation;
};

/// The bits that measured errors suggest under a budget of true bits an element. Values are rotated, as they should be
/// in caches that keep few bits of them. Throws Error where the budget is too small, as it is for very short heads.
inline Suggestion suggest(std::span<const LayerTensors> layers, double mean_bits) {
    Suggestion suggestion{mean_bits, {}, {}};
    const KeyFavoredOptions options;
    for (const LayerTensors& layer : layers) {
        Matrix values = layer.values;
        Hadamard(values.cols() / layer.kv_heads).rotate(values);
        suggestion.profiles.push_back(measure_layer(layer.keys, values, options, layer.kv_heads));
    }
    suggestion.allocation = key_favored(suggestion.profiles, mean_bits, options);
    return suggestion;
}

inline void print_rows(std::span<const ReportRow> rows) {
    int layer = -1;
    for (const ReportRow& row : rows) {
        if (row.layer != layer) {
            layer = row.layer;
            std::printf("\nlayer %d\n%-34s %6s %9s %11s %10s %10s %10s %10s\n", layer, "method", "K/V",
                        "true bits", "compression", "key error", "at most", "val. error", "out. error");
        }
        char widths[16], output[16] = "-";
        std::snprintf(widths, sizeof widths, "%d/%d", row.key_bits, row.value_bits);
        if (row.output_error) std::snprintf(output, sizeof output, "%.5f", *row.output_error);
        std::printf("%-34s %6s %9.3f %10.2fx %10.5f %10.5f %10.5f %10s\n", row.method.c_str(), widths,
                    row.true_bits, row.compression, row.key_error, row.bound, row.value_error, output);
    }
}

/// The output errors of four splits side by side, for the claim that keys need more bits than values.
inline void print_splits(std::span<const LayerTensors> layers, std::span<const ReportRow> rows) {
    std::printf("\nWhich side needs the bits? Output error by layer:\n%5s %9s %9s %9s %9s %9s   %s\n",
                "layer", "|K|/|V|", "K4V4", "K4V2", "K2V4", "K2V2", "at the same size, K4V2 makes");
    for (const LayerTensors& layer : layers) {
        const auto error = [&](int k, int v) {
            for (const ReportRow& row : rows)
                if (row.layer == layer.layer && row.key_bits == k && row.value_bits == v && row.output_error)
                    return *row.output_error;
            return std::nan("");
        };
        std::printf("%5d %9.2f %9.4f %9.4f %9.4f %9.4f   %.2f x the error of K2V4\n", layer.layer,
                    static_cast<double>(layer.keys.norm() / layer.values.norm()), error(4, 4), error(4, 2),
                    error(2, 4), error(2, 2), error(4, 2) / error(2, 4));
    }
}

inline void print_suggestion(std::span<const LayerTensors> layers, const Suggestion& suggestion) {
    std::printf(
        "\nBits that the measured errors suggest for a mean of %.2f true bits an element (grids counted):\n"
        "%5s %10s %10s   %-28s %s\n",
        suggestion.mean_bits, "layer", "|K|", "|V|", "keys", "values (rotated)");
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const LayerAllocation& bits = suggestion.allocation.layers[i];
        const LayerNorms& norms = suggestion.profiles[i].norms;
        char key[64], value[64];
        std::snprintf(key, sizeof key, "%g bits, grids of %ld tokens", bits.key_bits,
                      static_cast<long>(bits.key_group_tokens));
        std::snprintf(value, sizeof value, "%g bits, grids of %ld channels", bits.value_bits,
                      static_cast<long>(bits.value_group_channels));
        std::printf("%5d %10.1f %10.1f   %-28s %s\n", layers[i].layer, norms.key, norms.value, key, value);
    }
}

inline nlohmann::json to_json(std::span<const LayerTensors> layers, std::span<const ReportRow> rows,
                              const std::optional<Suggestion>& suggestion) {
    nlohmann::json out{{"rows", nlohmann::json::array()}, {"allocation", nlohmann::json::array()}};
    for (const ReportRow& row : rows)
        out["rows"].push_back(
            {{"layer", row.layer},
             {"method", row.method},
             {"key_bits", row.key_bits},
             {"value_bits", row.value_bits},
             {"true_bits", row.true_bits},
             {"key_error", row.key_error},
             {"value_error", row.value_error},
             {"output_error", row.output_error ? nlohmann::json(*row.output_error) : nullptr},
             {"bound", row.bound},
             {"compression", row.compression}});
    for (std::size_t i = 0; suggestion && i < layers.size(); ++i) {
        const LayerAllocation& bits = suggestion->allocation.layers[i];
        out["allocation"].push_back({{"layer", layers[i].layer},
                                     {"mean_bits", suggestion->mean_bits},
                                     {"key_norm", suggestion->profiles[i].norms.key},
                                     {"value_norm", suggestion->profiles[i].norms.value},
                                     {"key_bits", bits.key_bits},
                                     {"value_bits", bits.value_bits},
                                     {"key_group_tokens", bits.key_group_tokens},
                                     {"value_group_channels", bits.value_group_channels}});
    }
    return out;
}

inline constexpr const char* table_legend =
    "K/V          nominal bits of a key and of a value\n"
    "true bits    bits an element really takes, keys and values together, grids counted (fp16: 16)\n"
    "compression  16 / true bits\n"
    "key error    |K - K'| / |K|, and in the next column what the grids guarantee it is at most (arXiv\n"
    "             2502.15075, theorem 3, with the step of every stored grid in place of the largest)\n"
    "val. error   |V - V'| / |V|\n"
    "out. error   |O - O'| / |O| of the attention output of the given queries: the one that matters\n";

/// Prints everything, or with `json` one JSON object and nothing else.
inline void report(std::span<const LayerTensors> layers, double mean_bits, bool json) {
    const std::vector<ReportRow> rows = measure_all(layers);
    std::optional<Suggestion> suggestion;
    try {
        suggestion = suggest(layers, mean_bits);
    } catch (const Error& error) {
        std::fprintf(stderr, "no bits are suggested for a mean of %.2f: %s\n", mean_bits, error.what());
    }
    if (json) {
        std::printf("%s\n", to_json(layers, rows, suggestion).dump().c_str());
        return;
    }
    std::printf("%s", table_legend);
    print_rows(rows);
    bool queries = true;
    for (const LayerTensors& layer : layers) queries = queries && layer.queries.has_value();
    if (queries) print_splits(layers, rows);
    if (suggestion) print_suggestion(layers, *suggestion);
}

}  // namespace kvplane_examples
