// libFuzzer target of the engine's GGUF reader: any bytes are refused with kvplane::Error or read without
// leaving them. What is read is looked at from end to end, and a tokenizer and a model are made of it where
// it is one.
//
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -I tests -I examples gguf_fuzz.cpp
//
// It needs no corpus: its own mutator starts from valid files, a tiny one and a whole small model, and
// changes a short stretch at a time, mostly in front of the tensors' data, where it matters.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <random>

#include "engine/engine_support.hpp"
#include "engine/model.hpp"

// libFuzzer's own mutator, which it gives to custom ones.
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

namespace {

void look_at(const engine::Value& value) {
    for (std::size_t i = 0; i < value.size; ++i) {
        if (engine::detail::is_integer(value.type)) {
            try {
                value.integer(i);
            } catch (const kvplane::Error&) {  // a uint64 beyond int64
            }
        } else if (value.type == engine::ValueType::boolean) {
            value.flag(i);
        } else if (value.type != engine::ValueType::text) {
            value.number(i);
        }
    }
    if (value.type == engine::ValueType::text && value.texts().size() != value.size) std::abort();
}

void look_at(const engine::Tensor& tensor) {
    std::vector<float> row(static_cast<std::size_t>(tensor.columns));
    for (const engine::Index first : {engine::Index{0}, tensor.rows - 1})
        tensor.to_float(first, 1, row.data());
}

void encode_keys(const engine::Gguf& file) {
    const engine::Tokenizer tokenizer(file);
    engine::TextStream stream(tokenizer);
    for (const engine::Value& value : file.values()) {
        const auto tokens = tokenizer.encode(value.key);
        for (const engine::TokenId token : tokens) stream.push(token);
        tokenizer.decode(tokens);
    }
    stream.finish();
}

void run_model(engine::Gguf file) {
    static kvplane::ThreadExecutor threads(1);
    const engine::Model model(std::move(file), threads);
    const engine::TokenId tokens[] = {0, 0};
    engine::LayerCaches caches = model.exact_caches();
    model.forward(std::span(tokens, model.config().context > 1 ? 2 : 1), caches, engine::Logits::last);
}

kvplane_test::Bytes tiny_file() {
    kvplane_test::GgufWriter writer;
    writer.add("count", engine::ValueType::uint32, std::uint32_t{7});
    writer.add_texts("names", {"a", "", "ccc"});
    writer.add_array("flags", engine::ValueType::boolean, std::vector<std::uint8_t>{1, 0});
    writer.add("general.alignment", engine::ValueType::uint32, std::uint32_t{32});
    const std::vector<float> numbers{1, 2, 3, 4, 5, 6};
    writer.add_tensor("first", {3, 2}, 0, std::as_bytes(std::span(numbers)));
    writer.add_tensor("second", {2, 3}, 1, std::as_bytes(std::span(numbers).first(3)));
    return writer.bytes();
}

/// A valid file to start from, where it fits.
std::size_t valid_file(std::uint8_t* data, std::size_t most, bool small) {
    static const kvplane_test::Bytes tiny = tiny_file(), model = kvplane_test::SmallModel::file().bytes();
    const kvplane_test::Bytes& file = small || model.size() > most ? tiny : model;
    if (file.size() > most) return 0;
    std::memcpy(data, file.data(), file.size());
    return file.size();
}

}  // namespace

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most,
                                               unsigned seed) {
    std::mt19937 random(seed);
    if (size < 24 || random() % 100 == 0) size = valid_file(data, most, random() % 2 == 0);
    if (size < 24 || random() % 10 == 0) return LLVMFuzzerMutate(data, size, most);
    const std::size_t front = random() % 10 == 0 ? size : std::min<std::size_t>(size, 8000);
    const std::size_t start = random() % front,
                      stretch = std::min<std::size_t>(size - start, 1 + random() % 16);
    std::uint8_t changed[32] = {};
    std::memcpy(changed, data + start, stretch);
    std::size_t length = LLVMFuzzerMutate(changed, stretch, random() % 2 == 0 ? stretch : sizeof changed);
    length = std::min(length, most - (size - stretch));
    std::memmove(data + start + length, data + start + stretch, size - start - stretch);
    std::memcpy(data + start, changed, length);
    return size - stretch + length;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
    std::optional<engine::Gguf> file;
    try {
        file.emplace(bytes);
    } catch (const kvplane::Error&) {
        return 0;
    }
    for (const engine::Value& value : file->values()) look_at(value);
    for (const engine::Tensor& tensor : file->tensors()) look_at(tensor);
    try {
        encode_keys(*file);
    } catch (const kvplane::Error&) {  // not the engine's kind of tokenizer
    }
    try {
        run_model(std::move(*file));
    } catch (const kvplane::Error&) {  // not the engine's kind of model
    }
    return 0;
}
