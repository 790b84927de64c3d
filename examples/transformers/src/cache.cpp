#include "cache.hpp"

#include <algorithm>
#include <utility>

#include "kvplane/recipe_names.hpp"

namespace kvplane_python {

using kvplane::CacheConfiguration;

CacheConfiguration Layer::configuration() const {
    CacheConfiguration c;
    c.kv_heads = kv_heads;
    c.query_heads = query_heads;
    c.key_head_dim = head_dim;
    c.value_head_dim = value_head_dim;
    c.rope = rope;
    if (sliding_window > 0) c.context = sliding_window;
    return c;
}
std::string Layer::text() const {
    const auto number = [](Index n) { return std::to_string(n); };
    std::string text = "kvplane.Layer(kv_heads=";
    text.append(number(kv_heads)).append(", query_heads=").append(number(query_heads)).append(", head_dim=");
    text.append(number(head_dim));
    if (value_head_dim != head_dim) text.append(", value_head_dim=").append(number(value_head_dim));
    if (sliding_window > 0) text.append(", sliding_window=").append(number(sliding_window));
    return text.append(rope ? ", rope=...)" : ")");
}

Contents Contents::of(std::vector<Layer> layers, const std::vector<std::string>& recipes,
                      std::uint64_t rotation_seed) {
    require(!layers.empty(), ErrorCode::shape, "layers: none, expected at least 1");
    require(recipes.size() == 1 || recipes.size() == layers.size(), ErrorCode::shape,
            "recipe: ", recipes.size(), " names for ", layers.size(),
            " layers, expected one for all or one for each");
    Contents made;
    made.layers = std::move(layers);
    for (std::size_t i = 0; i < made.layers.size(); ++i) {
        made.recipes.push_back(recipes[recipes.size() == 1 ? 0 : i]);
        CacheConfiguration& c = made.configurations.emplace_back(made.layers[i].configuration());
        c.recipe = kvplane::recipes::parse(made.recipes.back());
        c.rotation_seed = rotation_seed;
    }
    return made;
}
Contents Contents::of(std::vector<Layer> layers, const kvplane::ModelPolicy& policy,
                      const std::string& model) {
    Contents made;
    made.layers = std::move(layers);
    std::vector<CacheConfiguration> own;
    for (const Layer& layer : made.layers) own.push_back(layer.configuration());
    policy.require_model(model, own);
    made.configurations = policy.configurations();
    for (const CacheConfiguration& c : made.configurations) made.recipes.push_back(c.recipe.name);
    return made;
}

Cache::Cache(Contents contents, Index batch) : contents_(std::move(contents)), batch_(batch) {
    require(batch >= 1, ErrorCode::option, "batch: ", batch, ", expected at least 1");
    for (Index i = 0; i < layers(); ++i)
        require(window(i) >= 0, ErrorCode::option, "layer ", i, ": a sliding window of ", window(i),
                ", expected at least 1, or 0 for none");
}

// What it says of itself -----------------------------------------------------------------------------------

void Cache::require_layer(Index layer) const {
    require(layer >= 0 && layer < layers(), ErrorCode::index, "layer ", layer, " of ", layers(),
            ", expected 0 to ", layers() - 1);
}
void Cache::require_sequence(Index layer, Index sequence) const {
    require_layer(layer);
    require(sequence >= 0 && sequence < batch_, ErrorCode::index, "sequence ", sequence, " of ", batch_,
            ", expected 0 to ", batch_ - 1);
}
const Layer& Cache::layer(Index layer) const {
    require_layer(layer);
    return contents_.layers[static_cast<std::size_t>(layer)];
}
Index Cache::batch() const {
    const Lock lock(turns());
    return batch_;
}

template <class Number>
std::vector<Index> Cache::of_each(Index layer, const Number& number) const {
    require_layer(layer);
    const Lock lock(turns());
    std::vector<Index> all;
    for (Index b = 0; b < batch_; ++b) all.push_back(number(standing(layer, b)));
    return all;
}
std::vector<Index> Cache::tokens(Index layer) const {
    return of_each(layer, [](const Standing& s) { return s.tokens; });
}
std::vector<Index> Cache::provisional_tokens(Index layer) const {
    return of_each(layer, [](const Standing& s) { return s.provisional; });
}
std::vector<Index> Cache::packed_tokens(Index layer) const {
    return of_each(layer, [](const Standing& s) { return s.packed; });
}
std::vector<Index> Cache::first_kept(Index layer) const {
    return of_each(layer, [](const Standing& s) { return s.first_kept; });
}
bool Cache::needs_queries(Index layer) const {
    require_layer(layer);
    const Lock lock(turns());
    return learns_from_queries(layer);
}
bool Cache::uses_queries(Index layer) const {
    require_layer(layer);
    const Lock lock(turns());
    return looks_at_queries(layer);
}

double Cache::bits_per_element() const {
    const double bits = 8.0 * static_cast<double>(bytes());
    const Lock lock(turns());
    double elements = 0.0;
    for (Index i = 0; i < layers(); ++i)
        for (Index b = 0; b < batch_; ++b) {
            const Index all = standing(i, b).tokens, tokens = window(i) > 0 ? std::min(window(i), all) : all;
            elements += static_cast<double>(tokens * configuration(i).elements_per_token());
        }
    return elements > 0.0 ? bits / elements : 0.0;
}

Matrix stored_of(const kvplane::KvCache& cache, kvplane::TileSide side) {
    const Index first = cache.first_kept() > cache.state().kept_sinks ? cache.first_kept() : 0;
    return side == kvplane::TileSide::keys ? cache.stored_keys(first, cache.tokens() - first)
                                           : cache.stored_values(first, cache.tokens() - first);
}

// Arguments ------------------------------------------------------------------------------------------------

void Cache::require_rows(const SequenceRows& rows, const char* name, Index layer, Index heads,
                         Index channels) const {
    require(rows.batch == batch_ && rows.heads == heads && rows.channels == channels, ErrorCode::shape, name,
            ": ", rows.text(), ", expected batch ", batch_, ", ", heads, " heads of ", channels,
            " channels, those of layer ", layer);
}
void Cache::require_padding(std::span<const Index> padding, Index tokens) const {
    require(padding.empty() || static_cast<Index>(padding.size()) == batch_, ErrorCode::shape,
            "padding: ", padding.size(), " numbers for ", batch_, " sequences, expected one for each");
    for (std::size_t b = 0; b < padding.size(); ++b)
        require(padding[b] >= 0 && padding[b] <= tokens, ErrorCode::index, "padding: ", padding[b],
                " of the ", tokens, " rows of sequence ", b, ", expected 0 to ", tokens);
}
namespace {

/// As many tokens as `others`.
void require_tokens(const SequenceRows& rows, const char* name, const SequenceRows& others,
                    const char* name_of_others) {
    require(rows.tokens == others.tokens, ErrorCode::shape, name, ": ", rows.tokens, " tokens, expected ",
            others.tokens, " as ", name_of_others, " have");
}

}  // namespace

void Cache::require_append(Index layer, const SequenceRows& keys, const SequenceRows& values,
                           const SequenceRows* queries, std::span<const Index> padding) const {
    require_layer(layer);
    const CacheConfiguration& c = configuration(layer);
    require_rows(keys, "keys", layer, c.kv_heads, c.key_head_dim);
    require_rows(values, "values", layer, c.kv_heads, c.value_head_dim);
    require_tokens(values, "values", keys, "keys");
    if (queries) {
        require_rows(*queries, "queries", layer, c.query_heads, c.key_head_dim);
        require_tokens(*queries, "queries", keys, "keys");
    }
    require_padding(padding, keys.tokens);
    require(queries || !learns_from_queries(layer), ErrorCode::option, "append: recipe '",
            contents_.recipes[static_cast<std::size_t>(layer)],
            "' learns from the sequence's own queries; expected append(keys, values, queries)");
}
void Cache::require_attend(Index layer, const SequenceRows& queries, const SequenceRows& output,
                           std::span<const Index> padding) const {
    require_layer(layer);
    const CacheConfiguration& c = configuration(layer);
    require_rows(queries, "queries", layer, c.query_heads, c.key_head_dim);
    require_rows(output, "out", layer, c.query_heads, c.value_head_dim);
    require_tokens(output, "out", queries, "queries");
    require_padding(padding, queries.tokens);
}
kvplane::AttentionParameters Cache::parameters(Index layer, const Attention& attention) const {
    kvplane::AttentionParameters parameters;
    parameters.scale = attention.scale;
    parameters.softcap = attention.softcap;
    parameters.sliding_window = window(layer);
    parameters.sink_logits = attention.sink_logits;
    if (!attention.read.empty()) parameters.read = kvplane::recipes::read_policy(attention.read);
    return parameters;
}

// Tokens ---------------------------------------------------------------------------------------------------

void Cache::require_truncation(Index layer, Index sequence, Index count) const {
    const Standing now = standing(layer, sequence);
    const Index window = this->window(layer);
    if (window == 0 || count == 0 || count >= now.tokens || !now.hides) return;
    require(count + 1 - window >= now.first_kept, ErrorCode::index, "truncate: sequence ", sequence,
            ", layer ", layer, ": to ", count, " tokens, whose sliding window of ", window,
            " reaches tokens before ", now.first_kept, ", which were dropped; expected at least ",
            now.first_kept + window - 1,
            " tokens, or that those to be taken back are appended as provisional");
}

void Cache::truncate(std::span<const Index> counts) {
    const Lock lock(turns());
    require(counts.size() == 1 || static_cast<Index>(counts.size()) == batch_, ErrorCode::shape,
            "truncate: ", counts.size(), " numbers of tokens for ", batch_,
            " sequences, expected one for all or one for each");
    const auto count = [&](Index b) { return counts[counts.size() == 1 ? 0 : static_cast<std::size_t>(b)]; };
    for (Index b = 0; b < batch_; ++b) {
        Index longest = 0;
        for (Index i = 0; i < layers(); ++i) {
            longest = std::max(longest, standing(i, b).tokens);
            require_truncation(i, b, count(b));
        }
        require(count(b) >= 0 && count(b) <= longest, ErrorCode::index, "truncate: sequence ", b, ": to ",
                count(b), " of ", longest, " tokens, expected 0 to ", longest);
    }
    for (Index i = 0; i < layers(); ++i)
        for (Index b = 0; b < batch_; ++b)
            if (count(b) < standing(i, b).tokens) truncate_one(i, b, count(b));
}

void Cache::crop(Index count) {
    const Lock lock(turns());
    require(count >= 0, ErrorCode::index, "crop: ", count, " tokens to take off, expected 0 or more");
    for (Index i = 0; i < layers(); ++i)
        for (Index b = 0; b < batch_; ++b) {
            const Index tokens = standing(i, b).tokens;
            require(count <= tokens, ErrorCode::index, "crop: ", count, " of ", tokens,
                    " tokens of sequence ", b, ", layer ", i, ", expected 0 to ", tokens);
            require_truncation(i, b, tokens - count);
        }
    if (count == 0) return;
    for (Index i = 0; i < layers(); ++i)
        for (Index b = 0; b < batch_; ++b) truncate_one(i, b, standing(i, b).tokens - count);
}

void Cache::accept(Index keep) {
    const Lock lock(turns());
    require(keep >= 0, ErrorCode::index, "accept: all but ", keep, " provisional tokens, expected 0 or more");
    for (Index i = 0; i < layers(); ++i)
        for (Index b = 0; b < batch_; ++b)
            if (const Index more = standing(i, b).provisional - keep; more > 0) accept_one(i, b, more);
}

void Cache::reorder(std::span<const Index> indices) {
    const Lock lock(turns());
    require(!indices.empty(), ErrorCode::shape, "reorder: no sequences, expected at least 1");
    for (const Index index : indices)
        require(index >= 0 && index < batch_, ErrorCode::index, "reorder: sequence ", index, " of ", batch_,
                ", expected 0 to ", batch_ - 1);
    reorder_all(indices);
    batch_ = static_cast<Index>(indices.size());
}

}  // namespace kvplane_python
