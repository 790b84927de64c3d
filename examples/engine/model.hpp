// examples/engine/model.hpp: the forward pass of a transformer from a GGUF file, with Eigen.
//
//   x = embedding of the token
//   each layer:  x += W_o attention(rope(W_q n), rope(W_k n), W_v n)      n = rms_norm(x)
//                x += W_down (silu(W_gate n) * (W_up n))                  n = rms_norm(x)
//   logits = W_embedding rms_norm(x)
//
// Architectures differ in traits (`architectures` below), and the pass asks for traits, never for an
// architecture.
//
// Attention goes through LayerCache (layer_cache.hpp), so the same model runs on any KV cache.
//
// Arithmetic is fp32 and activations are never rounded, so that two runs differ in their caches alone. Weights stay in
// the file as they are, 4 to 8 bits each. A product takes 64 rows of a weight at a time, converts them to float in a
// buffer that stays in the second-level cache, and multiplies; threads share these groups of rows. For one token that
// was measured as fast as weights in fp32 (unpacking costs what a seventh of the memory traffic saves), for 32 tokens
// faster, at 100 MB instead of 540.
// SmolLM2-135M on two cores with AVX-512: 14 ms for a token, 85 ms for 32 tokens with all their logits, 1 s
// for 512. Without -march=native, half the CPU time of one thread: 16 ms, 150 ms, 2.3 s.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/gguf.hpp"
#include "engine/layer_cache.hpp"
#include "engine/parallel.hpp"
#include "engine/tokenizer.hpp"
#include "kvplane/transform/rope.hpp"

namespace engine {

/// What tells one architecture from another.
struct Traits {
    const char* architecture;  ///< general.architecture, with which the names of all sizes begin
    kvplane::RopeLayout rope_layout = kvplane::RopeLayout::interleaved;
    bool biases = false;        ///< of queries, keys and values
    bool head_norms = false;    ///< RMSNorm of each head of queries and keys, before RoPE
    bool output_norms = false;  ///< RMSNorm of what attention and feed-forward give, before it is added to x
    bool gelu = false;          ///< the gate is GELU's (by tanh), not silu's
    bool scale_embedding = false;  ///< by sqrt(width)
    /// Layers see a window of tokens, but for each layer of this number, which sees all. 0: all see all.
    Index global_every = 0;
    double windowed_rope_base = 0.0;  ///< of layers that see a window
};

/// The architectures that the engine runs.
inline constexpr std::array<Traits, 3> architectures{{
    {.architecture = "llama"},
    {.architecture = "qwen2", .rope_layout = kvplane::RopeLayout::halves, .biases = true},
    {.architecture = "gemma3",
     .rope_layout = kvplane::RopeLayout::halves,
     .head_norms = true,
     .output_norms = true,
     .gelu = true,
     .scale_embedding = true,
     .global_every = 6,
     .windowed_rope_base = 10000},
}};

/// The traits and sizes of a model.
struct ModelConfig {
    Traits traits;
    Index layers, width, query_heads, kv_heads, head_dim, feed_forward, vocabulary;
    Index context;     ///< positions the model was trained for
    Index any_window;  ///< of layers that have one
    float rms_epsilon;
    double rope_base;  ///< pair i of a head turns by position * rope_base^(-2i / head_dim)

    bool is_windowed(Index layer) const {
        return traits.global_every > 0 && (layer + 1) % traits.global_every != 0;
    }
    /// How many tokens a query of the layer sees, itself included; 0: all.
    Index window(Index layer) const { return is_windowed(layer) ? any_window : 0; }
    kvplane::RopeSettings rope(Index layer) const {
        kvplane::RopeSettings settings;
        settings.layout = traits.rope_layout;
        settings.base = is_windowed(layer) ? traits.windowed_rope_base : rope_base;
        return settings;
    }
    /// That of the layers that see all tokens, the last one among them.
    kvplane::RopeSettings rope() const { return rope(traits.global_every > 0 ? traits.global_every - 1 : 0); }
};

/// What one layer computed for the tokens of one call; keys, values tokens x (kv_heads * head_dim), queries
/// tokens x (query_heads * head_dim), and what came into the layer, tokens x width. Valid during the call of
/// the observer only.
struct LayerActivations {
    Index layer, first_position;
    const Matrix &keys_before_rope, &keys, &values, &queries_before_rope, &queries, &hidden;
};
using Observer = std::function<void(const LayerActivations&)>;

enum class Logits { none, last, all };

/// The weights of a model. Const functions may run concurrently, each on its own caches; they take turns at
/// the threads.
class Model {
  public:
    /// Takes over the file. Throws Error (mismatch) for what the engine does not run: another architecture,
    /// scaled RoPE, experts, tensors missing, of another shape or unknown; (format) where its sizes make no
    /// sense.
    Model(Gguf file, Executor& threads);

    const ModelConfig& config() const noexcept { return config_; }
    const Gguf& file() const noexcept { return file_; }
    /// What the file calls itself.
    std::string name() const {
        const Value* name = file_.find_value("general.name");
        return name ? std::string(name->text()) : "unnamed";
    }
    Executor& threads() const noexcept { return *threads_; }

    /// A sequence whose cache is plain fp32.
    LayerCaches exact_caches() const;

    /// Runs tokens that follow those already in the caches (one for each layer) and appends them there.
    /// Returns the logits of none, the last or all of them: rows x vocabulary, row i predicting the token
    /// after tokens[i]. More than `max_chunk` tokens run in several chunks. The observer, if any, is called
    /// for each chunk and layer, before attention. Throws Error, before anything is appended: (shape) where
    /// the caches do not fit the model, (index) for an unknown token or a position beyond the context.
    Matrix forward(std::span<const TokenId> tokens, LayerCaches& caches, Logits logits,
                   const Observer& observer = {}) const;

    static constexpr std::size_t max_chunk = 512;

    /// What comes out of the last layer for tokens of which `hidden` came into a layer (LayerActivations),
    /// both tokens x width. Caches of the layers before it are not looked at. Throws Error (shape).
    Matrix resume(Index layer, Matrix hidden, LayerCaches& caches) const;
    /// Logits, rows x vocabulary, of rows that came out of the last layer.
    Matrix logits_of(const Matrix& hidden) const;

  private:
    struct Layer {  // null: the architecture has none
        const Tensor *attention_norm, *query, *key, *value, *attention_output;
        const Tensor *query_bias, *key_bias, *value_bias, *query_norm, *key_norm, *attention_output_norm;
        const Tensor *feed_forward_norm, *gate, *up, *down, *feed_forward_output_norm;
    };
    struct Product {
        const Tensor* weight;
        Matrix* output;
    };

    void read_config(const Traits& traits);
    void read_weights();
    Index check(std::span<const TokenId> tokens, const LayerCaches& caches) const;
    Matrix embed(std::span<const TokenId> tokens) const;
    void multiply(const Matrix& input, std::initializer_list<Product> products) const;
    void add_output(Matrix& hidden, const Matrix& output, const Tensor* norm) const;
    void attention(Index layer, Matrix& hidden, LayerCache& cache, const Observer& observer) const;
    void feed_forward(Index layer, Matrix& hidden) const;
    Matrix run_layers(Index first, Matrix hidden, LayerCaches& caches, const Observer& observer) const;
    Matrix forward_chunk(std::span<const TokenId> tokens, LayerCaches& caches, Logits logits,
                         const Observer& observer) const;

    Gguf file_;
    Executor* threads_;
    ModelConfig config_{};
    std::vector<Layer> layers_;
    const Tensor *embedding_ = nullptr, *output_norm_ = nullptr, *output_ = nullptr;
};

// ---------------------------------------------------------------------------------------------------------
// Implementation
// ---------------------------------------------------------------------------------------------------------

namespace detail {

/// A size from the metadata, small enough that no product of three overflows. Throws Error (mismatch,
/// format).
inline Index read_size(const Gguf& file, std::string_view key) {
    const std::int64_t size = file.value(key).integer();
    kvplane::require(size >= 1 && size <= (1 << 20), ErrorCode::format, "model: ", key, " is ", size,
                     ", expected 1 to 2^20");
    return size;
}

inline Index read_size(const Gguf& file, std::string_view key, Index standard) {
    return file.find_value(key) ? read_size(file, key) : standard;
}

/// Each row divided by its root mean square, times the weight.
inline Matrix rms_norm(const Matrix& rows, const Tensor& weight, float epsilon) {
    Eigen::RowVectorXf scale(rows.cols());
    weight.to_float(0, 1, scale.data());
    Matrix result(rows.rows(), rows.cols());
    for (Index i = 0; i < rows.rows(); ++i) {
        const float mean_square = rows.row(i).squaredNorm() / static_cast<float>(rows.cols());
        result.row(i) = rows.row(i).cwiseProduct(scale) / std::sqrt(mean_square + epsilon);
    }
    return result;
}

/// The same of each head of each row, in place. Without a weight nothing.
inline void norm_heads(Matrix& rows, const Tensor* weight, Index head_dim, float epsilon) {
    if (!weight) return;
    Eigen::Map<Matrix> heads(rows.data(), rows.size() / head_dim, head_dim);
    heads = rms_norm(heads, *weight, epsilon);
}

/// Without a bias nothing.
inline void add_bias(Matrix& rows, const Tensor* bias) {
    if (!bias) return;
    Eigen::RowVectorXf row(rows.cols());
    bias->to_float(0, 1, row.data());
    rows.rowwise() += row;
}

/// gate = activation(gate) * up
inline void activate(Matrix& gate, const Matrix& up, bool gelu) {
    auto x = gate.array();
    if (gelu)
        x = x * (1 + (0.7978845608f * (x + 0.044715f * x.cube())).tanh()) / 2 * up.array();
    else
        x *= up.array() / (1 + (-x).exp());
}

}  // namespace detail

inline Model::Model(Gguf file, Executor& threads) : file_(std::move(file)), threads_(&threads) {
    const std::string_view architecture = file_.value("general.architecture").text();
    const auto* traits = std::ranges::find(architectures, architecture, &Traits::architecture);
    std::string known;
    for (const Traits& each : architectures)
        known += (known.empty() ? "" : ", ") + std::string(each.architecture);
    kvplane::require(traits != architectures.end(), ErrorCode::mismatch, "model: the architecture is '",
                     architecture, "'; this engine knows ", known);
    read_config(*traits);
    read_weights();
}

inline void Model::read_config(const Traits& traits) {
    ModelConfig& c = config_;
    c.traits = traits;
    const auto key = [&](const char* name) { return traits.architecture + std::string(".") + name; };
    const auto size = [&](const char* name) { return detail::read_size(file_, key(name)); };
    c.layers = size("block_count");
    c.width = size("embedding_length");
    c.query_heads = size("attention.head_count");
    c.kv_heads = detail::read_size(file_, key("attention.head_count_kv"), c.query_heads);
    c.head_dim = detail::read_size(file_, key("attention.key_length"), c.width / c.query_heads);
    c.feed_forward = size("feed_forward_length");
    c.context = size("context_length");
    c.any_window = traits.global_every > 0 ? size("attention.sliding_window") : 0;
    c.vocabulary = static_cast<Index>(file_.value("tokenizer.ggml.tokens").size);
    c.rms_epsilon = static_cast<float>(file_.value(key("attention.layer_norm_rms_epsilon")).number());
    const Value* base = file_.find_value(key("rope.freq_base"));
    c.rope_base = base ? base->number() : 10000;

    const bool heads_fit = c.query_heads % c.kv_heads == 0 && c.head_dim >= 2 && c.head_dim % 2 == 0;
    kvplane::require(heads_fit, ErrorCode::format, "model: ", c.query_heads, " query heads, ", c.kv_heads,
                     " key/value heads of ", c.head_dim, " channels do not fit together");
    kvplane::require(c.rms_epsilon >= 0 && c.rms_epsilon < 1 && c.rope_base >= 1 && c.rope_base < 1e30,
                     ErrorCode::format, "model: RMS epsilon ", c.rms_epsilon, " or RoPE base ", c.rope_base,
                     " makes no sense");
    kvplane::require(detail::read_size(file_, key("rope.dimension_count"), c.head_dim) == c.head_dim &&
                         detail::read_size(file_, key("attention.value_length"), c.head_dim) == c.head_dim,
                     ErrorCode::mismatch, "model: RoPE over a part of the ", c.head_dim,
                     " channels of a head, or values of another size than keys");
    for (const char* unsupported : {"rope.scaling.type", "rope.scale_linear", "expert_count",
                                    "attn_logit_softcapping", "final_logit_softcapping"})
        kvplane::require(!file_.find_value(key(unsupported)), ErrorCode::mismatch, "model: it has ",
                         key(unsupported), ", which this engine does not implement");
}

inline void Model::read_weights() {
    const ModelConfig& c = config_;
    std::size_t used = 0;
    const auto tensor = [&](const std::string& name, Index rows, Index columns) {
        ++used;
        return &file_.tensor(name, rows, columns);
    };
    embedding_ = tensor("token_embd.weight", c.vocabulary, c.width);
    output_norm_ = tensor("output_norm.weight", 1, c.width);
    output_ =
        file_.find_tensor("output.weight") ? tensor("output.weight", c.vocabulary, c.width) : embedding_;
    const Index queries = c.query_heads * c.head_dim, keys = c.kv_heads * c.head_dim;
    for (Index i = 0; i < c.layers; ++i) {
        const std::string block = "blk." + std::to_string(i) + ".";
        Layer layer{};
        const auto vector = [&](bool wanted, const char* name, Index size) {
            return wanted ? tensor(block + name, 1, size) : nullptr;
        };
        layer.attention_norm = vector(true, "attn_norm.weight", c.width);
        layer.query = tensor(block + "attn_q.weight", queries, c.width);
        layer.key = tensor(block + "attn_k.weight", keys, c.width);
        layer.value = tensor(block + "attn_v.weight", keys, c.width);
        layer.query_bias = vector(c.traits.biases, "attn_q.bias", queries);
        layer.key_bias = vector(c.traits.biases, "attn_k.bias", keys);
        layer.value_bias = vector(c.traits.biases, "attn_v.bias", keys);
        layer.query_norm = vector(c.traits.head_norms, "attn_q_norm.weight", c.head_dim);
        layer.key_norm = vector(c.traits.head_norms, "attn_k_norm.weight", c.head_dim);
        layer.attention_output = tensor(block + "attn_output.weight", c.width, queries);
        layer.attention_output_norm = vector(c.traits.output_norms, "post_attention_norm.weight", c.width);
        layer.feed_forward_norm = vector(true, "ffn_norm.weight", c.width);
        layer.gate = tensor(block + "ffn_gate.weight", c.feed_forward, c.width);
        layer.up = tensor(block + "ffn_up.weight", c.feed_forward, c.width);
        layer.down = tensor(block + "ffn_down.weight", c.width, c.feed_forward);
        layer.feed_forward_output_norm = vector(c.traits.output_norms, "post_ffw_norm.weight", c.width);
        layers_.push_back(layer);
    }
    // A tensor without a part in the above (a bias, an expert, RoPE factors) would be silently ignored.
    kvplane::require(used == file_.tensors().size(), ErrorCode::mismatch, "model: the file has ",
                     file_.tensors().size(), " tensors, of which this engine knows ", used);
}

inline LayerCaches Model::exact_caches() const {
    LayerCaches caches;
    for (Index i = 0; i < config_.layers; ++i)
        caches.push_back(std::make_unique<ExactCache>(config_.query_heads, config_.kv_heads, config_.head_dim,
                                                      *threads_, config_.window(i)));
    return caches;
}

/// The position of the first token. Throws Error (shape, index).
inline Index Model::check(std::span<const TokenId> tokens, const LayerCaches& caches) const {
    kvplane::require(static_cast<Index>(caches.size()) == config_.layers, ErrorCode::shape,
                     "model: ", caches.size(), " caches for ", config_.layers, " layers");
    const Index first = caches[0]->tokens();
    for (const auto& cache : caches)
        kvplane::require(cache->tokens() == first, ErrorCode::shape, "model: the caches hold ", first,
                         " and ", cache->tokens(), " tokens, expected equally many");
    const auto count = static_cast<Index>(tokens.size());
    kvplane::require(count <= config_.context - first, ErrorCode::index, "model: positions ", first, " to ",
                     first + count, " reach beyond the context of ", config_.context);
    for (const TokenId token : tokens)
        kvplane::require(token >= 0 && token < config_.vocabulary, ErrorCode::index, "model: token ", token,
                         " in a vocabulary of ", config_.vocabulary);
    return first;
}

inline Matrix Model::embed(std::span<const TokenId> tokens) const {
    Matrix rows(static_cast<Index>(tokens.size()), config_.width);
    for (Index i = 0; i < rows.rows(); ++i)
        embedding_->to_float(tokens[static_cast<std::size_t>(i)], 1, rows.row(i).data());
    if (config_.traits.scale_embedding) rows *= std::sqrt(static_cast<float>(config_.width));
    return rows;
}

/// output = input * weight^T for weights that share an input, so that the threads have more to share.
inline void Model::multiply(const Matrix& input, std::initializer_list<Product> products) const {
    constexpr Index group = 64;  // rows of a weight: 144 kB in fp32 for a width of 576
    // Few tokens are multiplied one by one, so that each gets the sums that it would get alone, in the same order:
    // drafts that are verified together then choose the tokens that would have come one at a time.
    constexpr Index separate_rows = 8;
    std::vector<std::pair<const Product*, Index>> groups;
    for (const Product& product : products) {
        product.output->resize(input.rows(), product.weight->rows);
        for (Index row = 0; row < product.weight->rows; row += group) groups.emplace_back(&product, row);
    }
    parallel_for(*threads_, static_cast<Index>(groups.size()), [&](Index i) {
        const auto [product, first] = groups[static_cast<std::size_t>(i)];
        const Index count = std::min(group, product->weight->rows - first);
        thread_local Matrix weight;
        weight.resize(count, input.cols());
        product->weight->to_float(first, count, weight.data());
        auto output = product->output->middleCols(first, count);
        if (input.rows() > separate_rows) {
            output.noalias() = input * weight.transpose();
            return;
        }
        for (Index r = 0; r < input.rows(); ++r)
            output.row(r).transpose().noalias() = weight * input.row(r).transpose();
    });
}

inline void Model::add_output(Matrix& hidden, const Matrix& output, const Tensor* norm) const {
    hidden += norm ? detail::rms_norm(output, *norm, config_.rms_epsilon) : output;
}

inline void Model::attention(Index layer, Matrix& hidden, LayerCache& cache, const Observer& observer) const {
    const Layer& weights = layers_[static_cast<std::size_t>(layer)];
    const Index first = cache.tokens();
    const Matrix normed = detail::rms_norm(hidden, *weights.attention_norm, config_.rms_epsilon);
    Matrix queries, keys, values;
    multiply(normed, {{weights.query, &queries}, {weights.key, &keys}, {weights.value, &values}});
    detail::add_bias(queries, weights.query_bias);
    detail::add_bias(keys, weights.key_bias);
    detail::add_bias(values, weights.value_bias);
    detail::norm_heads(queries, weights.query_norm, config_.head_dim, config_.rms_epsilon);
    detail::norm_heads(keys, weights.key_norm, config_.head_dim, config_.rms_epsilon);

    Matrix queries_before_rope, keys_before_rope;
    if (observer) queries_before_rope = queries, keys_before_rope = keys;
    const kvplane::RotaryEmbedding rope(config_.head_dim, config_.rope(layer));
    rope.rotate(queries, first);
    rope.rotate(keys, first);
    if (observer)
        observer({layer, first, keys_before_rope, keys, values, queries_before_rope, queries, hidden});

    cache.append(keys, values, queries);
    Matrix attended, output;
    cache.attend(queries, attended);
    multiply(attended, {{weights.attention_output, &output}});
    add_output(hidden, output, weights.attention_output_norm);
}

inline void Model::feed_forward(Index layer, Matrix& hidden) const {
    const Layer& weights = layers_[static_cast<std::size_t>(layer)];
    const Matrix normed = detail::rms_norm(hidden, *weights.feed_forward_norm, config_.rms_epsilon);
    Matrix gate, up, output;
    multiply(normed, {{weights.gate, &gate}, {weights.up, &up}});
    detail::activate(gate, up, config_.traits.gelu);
    multiply(gate, {{weights.down, &output}});
    add_output(hidden, output, weights.feed_forward_output_norm);
}

inline Matrix Model::run_layers(Index first, Matrix hidden, LayerCaches& caches,
                                const Observer& observer) const {
    for (Index layer = first; layer < config_.layers; ++layer) {
        attention(layer, hidden, *caches[static_cast<std::size_t>(layer)], observer);
        feed_forward(layer, hidden);
    }
    return hidden;
}

inline Matrix Model::resume(Index layer, Matrix hidden, LayerCaches& caches) const {
    kvplane::require(layer >= 0 && layer < config_.layers && hidden.cols() == config_.width &&
                         static_cast<Index>(caches.size()) == config_.layers,
                     ErrorCode::shape, "model: ", hidden.rows(), " x ", hidden.cols(), " into layer ", layer,
                     " with ", caches.size(), " caches, expected tokens x ", config_.width,
                     " into one of the ", config_.layers, " layers, and a cache for each");
    return run_layers(layer, std::move(hidden), caches, {});
}

inline Matrix Model::logits_of(const Matrix& hidden) const {
    Matrix logits;
    multiply(detail::rms_norm(hidden, *output_norm_, config_.rms_epsilon), {{output_, &logits}});
    return logits;
}

inline Matrix Model::forward_chunk(std::span<const TokenId> tokens, LayerCaches& caches, Logits logits,
                                   const Observer& observer) const {
    Matrix hidden = run_layers(0, embed(tokens), caches, observer);
    if (logits == Logits::none) return Matrix(0, config_.vocabulary);
    if (logits == Logits::last) hidden = hidden.bottomRows(1).eval();
    return logits_of(hidden);
}

inline Matrix Model::forward(std::span<const TokenId> tokens, LayerCaches& caches, Logits logits,
                             const Observer& observer) const {
    check(tokens, caches);
    if (tokens.size() <= max_chunk && !tokens.empty()) return forward_chunk(tokens, caches, logits, observer);
    Matrix all(logits == Logits::all ? static_cast<Index>(tokens.size()) : 0, config_.vocabulary);
    for (std::size_t first = 0; first < tokens.size(); first += max_chunk) {
        const auto chunk = tokens.subspan(first, std::min(max_chunk, tokens.size() - first));
        const bool wanted = logits == Logits::all || first + chunk.size() == tokens.size();
        Matrix part = forward_chunk(chunk, caches, wanted ? logits : Logits::none, observer);
        if (logits == Logits::all)
            all.middleRows(static_cast<Index>(first), part.rows()) = part;
        else
            all = std::move(part);
    }
    return all;
}

}  // namespace engine
