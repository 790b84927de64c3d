// examples/engine/dump.cpp: keys, values and queries of a model on a text, to a safetensors file.
#include <cstdio>
#include <string>

#include "engine/command_line.hpp"
#include "engine/model.hpp"
#include "engine/tokenizer.hpp"
#include "kvplane/io/safetensors.hpp"

namespace {

using namespace engine;

constexpr const char* usage =
    "usage: dump --model FILE --text FILE --out FILE [OPTIONS]\n"
    "\n"
    "Writes layers.L.keys_before_rope, .keys, .values [tokens, kv_heads, head_dim] and .queries [queries,\n"
    "heads, head_dim] (after RoPE) as fp16: what quickstart and the other examples read.\n"
    "  --first-token N     of the text (0)\n"
    "  --tokens N          (1024)\n"
    "  --queries N         of the last positions (64)\n"
    "  --layers A,B,C      (all)\n"
    "  --threads N         0: one a core (0)\n";

struct Rows {
    Matrix keys_before_rope, keys, values, queries;
};

void append(Matrix& all, const Matrix& more) {
    all.conservativeResize(all.rows() + more.rows(), more.cols());
    all.bottomRows(more.rows()) = more;
}

void run(const CommandLine& options) {
    Threads threads(static_cast<int>(options.number("--threads", 0)));
    const Model model(Gguf::open(options.required("--model")), threads);
    const ModelConfig& config = model.config();
    std::vector<TokenId> tokens = Tokenizer(model.file()).encode(read_text(options.required("--text")));
    const Index first = options.number("--first-token", 0), count = options.number("--tokens", 1024, 1);
    kvplane::require(first + count <= static_cast<Index>(tokens.size()), ErrorCode::index, "tokens ", first,
                     " to ", first + count, " of a text of ", tokens.size());
    tokens = {tokens.begin() + first, tokens.begin() + first + count};
    const Index queries = std::min(count, options.number("--queries", 64));

    std::vector<Index> chosen;
    if (options.has("--layers"))
        for (const std::string& layer : options.list("--layers")) chosen.push_back(std::atol(layer.c_str()));
    else
        for (Index layer = 0; layer < config.layers; ++layer) chosen.push_back(layer);
    for (const Index layer : chosen)
        kvplane::require(layer >= 0 && layer < config.layers, ErrorCode::index, "--layers: ", layer,
                         ", expected 0 to ", config.layers - 1);

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
    writer.metadata("first_query_position", std::to_string(count - queries));
    writer.metadata("rope_pairs", "interleaved: channels 2i and 2i+1");
    writer.metadata("rope_theta", std::to_string(config.rope_base));
    writer.write(options.required("--out"));
    std::fprintf(stderr, "%s: %zu layers, %ld tokens\n", options.required("--out").c_str(), dumped.size(),
                 static_cast<long>(count));
}

}  // namespace

int main(int count, char** arguments) {
    try {
        const CommandLine options(
            count, arguments,
            {"--model", "--text", "--out", "--first-token", "--tokens", "--queries", "--layers", "--threads"},
            {"--help"});
        if (options.has("--help")) return std::printf("%s", usage), 0;
        run(options);
    } catch (const std::exception& error) {
        return std::fprintf(stderr, "dump: %s\n", error.what()), 1;
    }
}
