// examples/synthetic.cpp: the quickstart's table on generated keys and values.
#include <cstdio>
#include <string>
#include <vector>

#include "quantizer_report.hpp"
#include "synthetic_kv.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_examples;

constexpr const char* usage =
    "usage: synthetic [--tokens N] [--head-dim N] [--kv-heads N] [--query-heads N] [--seed N] [--json] "
    "[--help]\n"
    "\n"
    "Prints the quickstart's table for generated tensors, one \"layer\" for each property of real caches:\n"
    "  0  plain noise\n"
    "  1  outlier channels, 8 times the rest\n"
    "  2  large means (8 standard deviations)\n"
    "  3  an attention sink: a first token that all attend to\n"
    "  4  a spectrum that decays as e^(-6t) along directions that are no channels\n"
    "  5  all of it, rotated by position (RoPE)\n"
    "Every layer but 5 is without RoPE. The same seed gives the same tensors.\n";

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

long number(const std::string& name, const char* text, long least) {
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    require(end != text && *end == '\0' && value >= least, ErrorCode::option, name, ": '", text,
            "', expected a number from ", least, " on");
    return value;
}

}  // namespace

int main(int count, char** arguments) {
    SyntheticOptions options;
    bool json = false;
    try {
        for (int i = 1; i < count; ++i) {
            const std::string argument = arguments[i];
            if (argument == "--help") return std::printf("%s", usage), 0;
            if (argument == "--json") {
                json = true;
                continue;
            }
            const bool known = argument == "--tokens" || argument == "--head-dim" ||
                               argument == "--kv-heads" || argument == "--query-heads" ||
                               argument == "--seed";
            if (!known || i + 1 == count)
                return std::fprintf(stderr, "synthetic: %s '%s'\n%s",
                                    known ? "a value is missing after" : "unexpected argument",
                                    argument.c_str(), usage),
                       2;
            const long value = number(argument, arguments[++i], argument == "--seed" ? 0 : 1);
            if (argument == "--tokens") options.tokens = value;
            if (argument == "--head-dim") options.head_dim = value;
            if (argument == "--kv-heads") options.kv_heads = value;
            if (argument == "--query-heads") options.query_heads = value;
            if (argument == "--seed") options.seed = static_cast<std::uint64_t>(value);
        }
        options.queries = std::min<Index>(options.queries, options.tokens);
        require(options.query_heads % options.kv_heads == 0, ErrorCode::option,
                "--query-heads: ", options.query_heads, ", expected a multiple of the ", options.kv_heads,
                " key/value heads");
        report(all_layers(options), 3.5, json);
    } catch (const std::exception& error) {
        return std::fprintf(stderr, "synthetic: %s\n", error.what()), 1;
    }
}
