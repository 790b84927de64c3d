// examples/studies/synthetic.cpp: the report on generated keys and values.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "options.hpp"
#include "quantizer_report.hpp"
#include "synthetic_kv.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_examples;

constexpr const char* summary =
    R"(Prints the report for generated tensors, one "layer" for each property of real caches:
  0  plain noise
  1  outlier channels, 8 times the rest
  2  large means (8 standard deviations)
  3  an attention sink: a first token that all attend to
  4  a spectrum that decays as e^(-6t) along directions that are no channels
  5  all of it, rotated by position (RoPE)
Every layer but 5 is without RoPE. The same seed gives the same tensors.)";

LayerTensors make(int layer, const SyntheticOptions& options) {
    const SyntheticLayer made = synthetic_layer(options);
    return {layer,        options.kv_heads,
            made.keys,    made.values,
            made.queries, {options.query_heads, options.kv_heads, options.tokens - options.queries}};
}

std::vector<LayerTensors> all_layers(SyntheticOptions base) {
    base.outlier_channels = 0;
    base.mean_scale = 0.0;
    base.sink = false;
    base.spectrum_decay = 0.0;
    base.rope_base = 0.0;
    const SyntheticOptions everything{.tokens = base.tokens,
                                      .kv_heads = base.kv_heads,
                                      .query_heads = base.query_heads,
                                      .head_dim = base.head_dim,
                                      .queries = base.queries,
                                      .seed = base.seed};
    SyntheticOptions outliers = base, means = base, sink = base, spectrum = base;
    outliers.outlier_channels = 2;
    means.mean_scale = 8.0;
    sink.sink = true;
    spectrum.spectrum_decay = 6.0;
    return {make(0, base), make(1, outliers), make(2, means),
            make(3, sink), make(4, spectrum), make(5, everything)};
}

}  // namespace

int main(int count, char** arguments) {
    SyntheticOptions settings;
    Index seed = 1;
    bool json = false;
    Options options("synthetic", summary);
    const Options::Range size{.least = 1, .most = 1 << 24};
    options.number("--tokens N", settings.tokens, size, "of a layer");
    options.number("--head-dim N", settings.head_dim, size, "channels of a head");
    options.number("--kv-heads N", settings.kv_heads, size, "key/value heads");
    options.number("--query-heads N", settings.query_heads, size, "a multiple of these");
    options.number("--seed N", seed, {}, "of what is generated");
    options.flag("--json", json, "one JSON object and nothing else");
    return options.run(count, arguments, [&] {
        settings.seed = static_cast<std::uint64_t>(seed);
        settings.queries = std::min<Index>(settings.queries, settings.tokens);
        require(settings.query_heads % settings.kv_heads == 0, ErrorCode::option,
                "--query-heads: ", settings.query_heads, ", expected a multiple of the ", settings.kv_heads,
                " key/value heads");
        report(all_layers(settings), 3.5, json);
    });
}
