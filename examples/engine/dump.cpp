// examples/engine/dump.cpp: keys, values and queries of a model on a text, to a safetensors file.
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "engine/model.hpp"
#include "engine/text_file.hpp"
#include "engine/tokenizer.hpp"
#include "kvplane/io/safetensors.hpp"
#include "options.hpp"

namespace {

using namespace engine;
using kvplane_examples::Options;

constexpr const char* summary =
    R"(Writes what a model computes on a text, in fp16: tensors layers.L.keys_before_rope, .keys and .values [tokens,
kv_heads, head_dim], and .queries [queries, heads, head_dim] after RoPE, as the other examples read them.)";

struct Settings {
    std::string model, text, out;
    Index first_token = 0, tokens = 1024, queries = 64, threads = 0;
    std::vector<Index> layers;
};

struct Rows {
    Matrix keys_before_rope, keys, values, queries;
};

void append(Matrix& all, const Matrix& more) {
    all.conservativeResize(all.rows() + more.rows(), more.cols());
    all.bottomRows(more.rows()) = more;
}

void run(const Settings& settings) {
    ThreadExecutor threads(thread_count(settings.threads));
    const Model model(Gguf::open(settings.model), threads);
    const ModelConfig& config = model.config();
    const Tokenizer tokenizer(model.file());
    const std::vector<TokenId> tokens =
        context_from(tokenizer, read_tokens(tokenizer, settings.text), settings.first_token, settings.tokens);
    const Index queries = std::min(settings.tokens, settings.queries);

    std::vector<Index> chosen = settings.layers;
    for (Index layer = 0; settings.layers.empty() && layer < config.layers; ++layer) chosen.push_back(layer);
    for (const Index layer : chosen)
        kvplane::require(layer < config.layers, ErrorCode::index, "--layers: ", layer, ", expected 0 to ",
                         config.layers - 1);

    std::map<Index, Rows> dumped;
    for (const Index layer : chosen) dumped[layer];
    LayerCaches caches = model.exact_caches();
    model.forward(tokens, caches, Logits::none, [&](const LayerActivations& a) {
        const auto found = dumped.find(a.layer);
        if (found == dumped.end()) return;
        append(found->second.keys_before_rope, a.keys_before_rope);
        append(found->second.keys, a.keys);
        append(found->second.values, a.values);
        append(found->second.queries, a.queries);
    });

    kvplane::SafetensorsWriter writer;
    const auto add = [&](Index layer, const char* name, const Matrix& rows, Index heads) {
        writer.add("layers." + std::to_string(layer) + "." + name, rows.cast<Eigen::half>(),
                   {rows.rows(), heads, config.head_dim});
    };
    for (const auto& [layer, rows] : dumped) {
        add(layer, "keys_before_rope", rows.keys_before_rope, config.kv_heads);
        add(layer, "keys", rows.keys, config.kv_heads);
        add(layer, "values", rows.values, config.kv_heads);
        if (queries > 0) add(layer, "queries", rows.queries.bottomRows(queries), config.query_heads);
    }
    writer.metadata("layout", "[tokens, heads, head_dim]");
    writer.metadata("first_key_position", "0");
    writer.metadata("first_query_position", std::to_string(settings.tokens - queries));
    const kvplane::RopeSettings rope = config.rope();
    writer.metadata("rope_pairs", rope.layout == kvplane::RopeLayout::halves
                                      ? "halves: channels i and i + head_dim / 2"
                                      : "interleaved: channels 2i and 2i+1");
    writer.metadata("rope_theta", std::to_string(rope.base));
    if (config.any_window > 0) {
        std::string windowed;
        for (const Index layer : chosen)
            if (config.is_windowed(layer)) windowed += (windowed.empty() ? "" : ",") + std::to_string(layer);
        writer.metadata("sliding_window", std::to_string(config.any_window));
        writer.metadata("windowed_layers", windowed);
        writer.metadata("windowed_rope_theta", std::to_string(config.traits.windowed_rope_base));
    }
    writer.write(settings.out);
    std::fprintf(stderr, "%s: %zu layers, %ld tokens\n", settings.out.c_str(), dumped.size(),
                 static_cast<long>(settings.tokens));
}

}  // namespace

int main(int count, char** arguments) {
    using Need = Options::Need;
    Settings s;
    Options options("dump", summary);
    options.text("--model FILE", s.model, "GGUF file of the model", Need::required);
    options.text("--text FILE", s.text, "what it reads", Need::required);
    options.output_file("--out FILE", s.out, "the safetensors file to write", Need::required);
    options.number("--first-token N", s.first_token, {}, "of the text");
    options.number("--tokens N", s.tokens, {.least = 1}, "from there on");
    options.number("--queries N", s.queries, {}, "of the last tokens");
    options.numbers("--layers A,B,C", s.layers, {}, "all without it");
    options.number("--threads N", s.threads, {.most = 1024}, "0: one a core");
    return options.run(count, arguments, [&] { run(s); });
}
