// tests/engine/engine_support.hpp: what the engine's tests share: GGUF files made in memory, a small model
// with random weights, and where the real model file is.
#pragma once

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "engine/gguf.hpp"
#include "engine/tokenizer.hpp"

namespace kvplane_test {

using Bytes = std::vector<std::byte>;

template <class Number>
void put(Bytes& bytes, Number number) {
    const auto* first = reinterpret_cast<const std::byte*>(&number);
    bytes.insert(bytes.end(), first, first + sizeof number);
}

inline void put_text(Bytes& bytes, std::string_view text) {
    put(bytes, std::uint64_t{text.size()});
    for (const char character : text) bytes.push_back(static_cast<std::byte>(character));
}

/// Puts a GGUF file together, right or wrong: the fields are open, so that a test can spoil any of them.
class GgufWriter {
  public:
    struct Tensor {
        std::string name;
        std::vector<std::uint64_t> dimensions;
        std::uint32_t type;
        std::uint64_t offset;
    };
    std::string magic = "GGUF";
    std::uint32_t version = 3;
    std::uint64_t alignment = 32;
    Bytes values, data;
    std::uint64_t value_count = 0;
    std::vector<Tensor> tensors;

    template <class Number>
    void add(std::string_view key, engine::ValueType type, Number number) {
        begin(key, type);
        put(values, number);
    }
    void add_text(std::string_view key, std::string_view text) {
        begin(key, engine::ValueType::text);
        put_text(values, text);
    }
    void add_texts(std::string_view key, const std::vector<std::string>& texts) {
        begin_array(key, engine::ValueType::text, texts.size());
        for (const std::string& text : texts) put_text(values, text);
    }
    template <class Number>
    void add_array(std::string_view key, engine::ValueType type, const std::vector<Number>& numbers) {
        begin_array(key, type, numbers.size());
        for (const Number number : numbers) put(values, number);
    }
    void begin(std::string_view key, engine::ValueType type) {
        ++value_count;
        put_text(values, key);
        put(values, static_cast<std::uint32_t>(type));
    }
    void begin_array(std::string_view key, engine::ValueType type, std::uint64_t count) {
        begin(key, engine::ValueType::array);
        put(values, static_cast<std::uint32_t>(type));
        put(values, count);
    }
    /// A tensor with its data behind those added before, at the next multiple of the alignment.
    void add_tensor(const std::string& name, std::vector<std::uint64_t> dimensions, std::uint32_t type,
                    std::span<const std::byte> content) {
        data.resize((data.size() + alignment - 1) / alignment * alignment);
        tensors.push_back({name, std::move(dimensions), type, data.size()});
        data.insert(data.end(), content.begin(), content.end());
    }

    Bytes bytes() const {
        Bytes file;
        for (const char character : magic) file.push_back(static_cast<std::byte>(character));
        put(file, version);
        put(file, std::uint64_t{tensors.size()});
        put(file, value_count);
        file.insert(file.end(), values.begin(), values.end());
        for (const Tensor& tensor : tensors) {
            put_text(file, tensor.name);
            put(file, static_cast<std::uint32_t>(tensor.dimensions.size()));
            for (const std::uint64_t dimension : tensor.dimensions) put(file, dimension);
            put(file, tensor.type);
            put(file, tensor.offset);
        }
        if (!tensors.empty()) file.resize((file.size() + alignment - 1) / alignment * alignment);
        file.insert(file.end(), data.begin(), data.end());
        return file;
    }
};

inline const engine::BlockFormat& block_format(std::string_view name) {
    for (const auto& format : engine::detail::block_formats)
        if (format.name == name) return format;
    throw std::logic_error("no such format");
}

/// Random blocks whose values are about `scale` large: random codes, sensible fp16 steps.
inline Bytes random_blocks(const engine::BlockFormat& format, std::uint64_t values, float scale,
                           std::mt19937& random) {
    Bytes bytes;
    std::uniform_real_distribution<float> uniform(-scale, scale);
    const auto put_half = [&](float number) {
        put(bytes, Eigen::numext::bit_cast<std::uint16_t>(Eigen::half(number)));
    };
    const auto put_codes = [&](int count) {
        for (int i = 0; i < count; ++i) bytes.push_back(static_cast<std::byte>(random() & 0xff));
    };
    const std::string name = format.name;
    for (std::uint64_t i = 0; i < values; i += static_cast<std::uint64_t>(format.values)) {
        if (name == "F32") put(bytes, uniform(random));
        if (name == "F16") put_half(uniform(random));
        if (name == "Q4_0") put_half(uniform(random) / 8), put_codes(16);
        if (name == "Q4_1") put_half(scale / 8), put_half(-scale), put_codes(16);
        if (name == "Q5_0") put_half(uniform(random) / 16), put_codes(20);
        if (name == "Q4_K" || name == "Q5_K") {
            const float most = name == "Q4_K" ? 15.f * 63.f : 31.f * 63.f;  // of a code times a step
            put_half(2 * scale / most), put_half(scale / 63), put_codes(12 + (name == "Q4_K" ? 128 : 160));
        }
        if (name == "Q8_0") put_half(uniform(random) / 128), put_codes(32);
        if (name == "Q6_K") put_codes(208), put_half(scale / 32 / 128);
    }
    return bytes;
}

/// A model of two layers (of gemma3 seven, one of which sees all tokens) with random weights in every tensor
/// type, and a tokenizer over single bytes.
struct SmallModel {
    static constexpr Eigen::Index layers = 2, gemma_layers = 7, width = 256, query_heads = 4, kv_heads = 2,
                                  head_dim = 8, feed_forward = 96, vocabulary = 262, context = 1100,
                                  window = 24;
    static constexpr float epsilon = 1e-5f, rope_base = 1000;

    /// A file that a test may still change before it asks for its bytes.
    static GgufWriter file(bool own_output_matrix = false, const std::string& architecture = "llama");
};

inline std::vector<std::string> byte_tokens() {
    std::vector<std::string> tokens(256);
    for (const auto& [character, byte] : engine::detail::byte_alphabet())
        tokens[static_cast<unsigned char>(byte)] = engine::detail::utf8(character);
    return tokens;
}

inline GgufWriter SmallModel::file(bool own_output_matrix, const std::string& architecture) {
    using engine::ValueType;
    const bool gemma = architecture == "gemma3", qwen = architecture == "qwen2";
    const Eigen::Index blocks = gemma ? gemma_layers : layers;
    GgufWriter writer;
    writer.add_text("general.architecture", architecture);
    const auto add_size = [&](const char* name, Eigen::Index size) {
        writer.add(architecture + "." + name, ValueType::uint32, static_cast<std::uint32_t>(size));
    };
    add_size("block_count", blocks);
    add_size("embedding_length", width);
    add_size("attention.head_count", query_heads);
    add_size("attention.head_count_kv", kv_heads);
    add_size("attention.key_length", head_dim);
    add_size("attention.value_length", head_dim);
    add_size("feed_forward_length", feed_forward);
    add_size("context_length", context);
    if (gemma) add_size("attention.sliding_window", window);
    writer.add(architecture + ".attention.layer_norm_rms_epsilon", ValueType::float32, epsilon);
    writer.add(architecture + ".rope.freq_base", ValueType::float32, rope_base);

    std::vector<std::string> tokens = byte_tokens();
    std::vector<std::int32_t> types(256, 1);
    for (const char* special : {"<|end|>", "<|", "<|end"}) tokens.push_back(special), types.push_back(3);
    for (const char* joined : {"he", "ll", "hell"}) tokens.push_back(joined), types.push_back(1);
    writer.add_text("tokenizer.ggml.model", "gpt2");
    writer.add_text("tokenizer.ggml.pre", "smollm");
    writer.add_texts("tokenizer.ggml.tokens", tokens);
    writer.add_array("tokenizer.ggml.token_type", ValueType::int32, types);
    writer.add_texts("tokenizer.ggml.merges", {"h e", "l l", "he ll"});
    writer.add("tokenizer.ggml.eos_token_id", ValueType::uint32, std::uint32_t{256});

    std::mt19937 random(7);
    const auto add = [&](const std::string& name, Eigen::Index rows, Eigen::Index columns, const char* type,
                         float scale) {
        const auto& format = block_format(type);
        const auto r = static_cast<std::uint64_t>(rows), c = static_cast<std::uint64_t>(columns);
        writer.add_tensor(name, rows == 1 ? std::vector{c} : std::vector{c, r}, format.type,
                          random_blocks(format, r * c, scale, random));
    };
    add("token_embd.weight", vocabulary, width, "Q8_0", 1);
    if (own_output_matrix) add("output.weight", vocabulary, width, "Q6_K", .2f);
    add("output_norm.weight", 1, width, "F32", 1);
    for (Eigen::Index layer = 0; layer < blocks; ++layer) {
        const std::string block = "blk." + std::to_string(layer) + ".";
        add(block + "attn_norm.weight", 1, width, "F32", 1);
        add(block + "attn_q.weight", query_heads * head_dim, width, "Q4_1", .2f);
        add(block + "attn_k.weight", kv_heads * head_dim, width, "F16", .2f);
        add(block + "attn_v.weight", kv_heads * head_dim, width, "Q6_K", .2f);
        if (qwen) {
            add(block + "attn_q.bias", 1, query_heads * head_dim, "F32", 1);
            add(block + "attn_k.bias", 1, kv_heads * head_dim, "F32", 3);
            add(block + "attn_v.bias", 1, kv_heads * head_dim, "F32", 1);
        }
        if (gemma) {
            add(block + "attn_q_norm.weight", 1, head_dim, "F32", 2);
            add(block + "attn_k_norm.weight", 1, head_dim, "F32", 2);
            add(block + "post_attention_norm.weight", 1, width, "F32", 1);
            add(block + "post_ffw_norm.weight", 1, width, "F32", 1);
        }
        add(block + "attn_output.weight", width, query_heads * head_dim, "Q4_0", .5f);
        add(block + "ffn_norm.weight", 1, width, "F32", 1);
        add(block + "ffn_gate.weight", feed_forward, width, "Q4_1", .2f);
        add(block + "ffn_up.weight", feed_forward, width, gemma ? "Q5_0" : qwen ? "Q4_K" : "Q8_0", .2f);
        add(block + "ffn_down.weight", width, feed_forward, "Q4_0", .2f);
    }
    return writer;
}

#ifdef KVPLANE_TEST_DATA
/// A real model, "smollm2", "gemma3" or "qwen2" (examples/engine/fetch.sh): what the environment names
/// (KVPLANE_MODEL, KVPLANE_MODEL_GEMMA3, KVPLANE_MODEL_QWEN2), else models/ in the repository; "" where it is
/// missing.
inline std::string model_path(const std::string& model = "smollm2") {
    const std::map<std::string, std::pair<const char*, const char*>> known{
        {"smollm2", {"KVPLANE_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf"}},
        {"gemma3", {"KVPLANE_MODEL_GEMMA3", "gemma-3-270m-q4_k_m.gguf"}},
        {"qwen2", {"KVPLANE_MODEL_QWEN2", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"}}};
    const auto& [variable, file] = known.at(model);
    if (const char* chosen = std::getenv(variable)) {
        if (!std::filesystem::exists(chosen))
            throw std::runtime_error(std::string(variable) + " names a file that is not there: " + chosen);
        return chosen;
    }
    const std::string standard = KVPLANE_TEST_DATA "/../../models/" + std::string(file);
    return std::filesystem::exists(standard) ? standard : "";
}
#endif

}  // namespace kvplane_test

/// First line of a test that needs a real model.
#define KVPLANE_NEEDS_MODEL_OF(model)                                                                   \
    if (kvplane_test::model_path(model).empty())                                                        \
    GTEST_SKIP() << "NOT TESTED: the model file is missing. bash examples/engine/fetch.sh " << (model)  \
                 << " fetches it to models/; KVPLANE_MODEL (KVPLANE_MODEL_GEMMA3, _QWEN2) may name it " \
                    "elsewhere."
#define KVPLANE_NEEDS_MODEL() KVPLANE_NEEDS_MODEL_OF("smollm2")
