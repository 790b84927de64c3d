// kvplane/io/impl/policy_file.hpp: configurations of all layers as one safetensors file.
#pragma once

#include <charconv>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

#include "kvplane/error.hpp"
#include "kvplane/io/checksum.hpp"
#include "kvplane/io/impl/latent_content.hpp"
#include "kvplane/io/json_text.hpp"
#include "kvplane/io/policy_file.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/recipe_names.hpp"

namespace kvplane {

namespace detail::policy {

inline constexpr std::string_view kind = "model policy ";
inline constexpr int version = 1;
inline constexpr const char* checksum_key = "kvplane.checksum";

/// "layers.3."
inline std::string prefix(std::size_t layer) {
    return "layers." + std::to_string(layer) + ".";
}

/// Does what `call` does. What it refuses is refused in a sentence that begins with `where`, and as `code`
/// if there is one.
template <class Call>
auto refused_as([[maybe_unused]] std::optional<ErrorCode> code, [[maybe_unused]] const std::string& where,
                const Call& call) {
#if defined(__cpp_exceptions)
    try {
        return call();
    } catch (const Error& error) {
        if (error.code() == ErrorCode::io || error.code() == ErrorCode::out_of_memory) throw;
        fail(code.value_or(error.code()), where, ": ", sentence_of(error));
    }
#else
    return call();
#endif
}

/// Heads, channels and whether values are in keys.
inline bool same_heads(const CacheConfiguration& a, const CacheConfiguration& b) {
    return a.kv_heads == b.kv_heads && a.query_heads == b.query_heads && a.key_head_dim == b.key_head_dim &&
           a.value_head_dim == b.value_head_dim && a.values_in_keys == b.values_in_keys;
}
inline std::string heads_text(const CacheConfiguration& c) {
    std::string text = std::to_string(c.query_heads);
    text.append(" query heads over ").append(std::to_string(c.kv_heads)).append(" key heads of ");
    text.append(std::to_string(c.key_head_dim)).append(" channels, values ");
    if (c.values_in_keys) text.append("in keys, ");
    return text.append("of ").append(std::to_string(c.value_head_dim));
}

/// The hash of a file's tensors and metadata, but for the hash itself.
inline std::string checksum(const SafetensorsFile& file) {
    WordHash sum;
    const auto add = [&](std::string_view text) { add_serial(sum, std::as_bytes(std::span(text))); };
    for (const auto& [key, value] : file.metadata()) {
        if (key == checksum_key) continue;
        add(key);
        add(value);
    }
    for (const std::string& name : file.names()) {
        add(name);
        add(kvplane::name(file.info(name).dtype));
        for (const Index side : file.info(name).shape) sum.add(static_cast<std::uint64_t>(side));
        add_serial(sum, file.bytes(name));
    }
    return sum.text();
}

/// A version of this format. Throws Error (mismatch).
inline void require_version(const LatentFile& file) {
    const std::string& format = file.text("kvplane.format");
    const std::string expected = std::string(kind).append(std::to_string(version));
    require(format.starts_with(kind), ErrorCode::mismatch, file.source(), ": '", printable(format),
            "', expected '", expected, "'");
    int number = 0;
    const char* const end = format.data() + format.size();
    const auto [last, error] = std::from_chars(format.data() + kind.size(), end, number);
    require(error == std::errc() && last == end && number == version, ErrorCode::mismatch, file.source(),
            ": '", printable(format), "', a policy of ", number > version ? "a newer" : "another",
            " version of the format; expected '", expected, "'");
}

inline std::uint64_t whole_number(const LatentFile& file, const std::string& key) {
    const std::string& digits = file.text(key.c_str());
    std::uint64_t number = 0;
    const char* const end = digits.data() + digits.size();
    const auto [last, error] = std::from_chars(digits.data(), end, number);
    require(error == std::errc() && last == end && !digits.empty(), ErrorCode::format, file.source(), ": ",
            key, " is '", printable(digits), "', expected a whole number");
    return number;
}

/// Heads and channels, the same in all layers.
inline CacheConfiguration read_heads(const LatentFile& file, Index& layers) {
    const nlohmann::json from = file.json("kvplane.heads");
    layers = file.integer(from, "layers", most_heads);
    CacheConfiguration c;
    c.kv_heads = file.integer(from, "kv_heads", most_heads);
    c.query_heads = file.integer(from, "query_heads", most_heads);
    c.key_head_dim = file.integer(from, "key_head_dim", most_heads);
    c.value_head_dim = file.integer(from, "value_head_dim", most_heads);
    c.values_in_keys = file.flag(from, "values_in_keys");
    require(layers >= 1 && c.kv_heads >= 1 && c.key_head_dim >= 1 && c.value_head_dim >= 1, ErrorCode::format,
            file.source(), ": ", layers, " layers of ", heads_text(c), ", expected at least 1 of each");
    return c;
}

inline CacheConfiguration read_layer(const LatentFile& file, std::size_t layer, CacheConfiguration c) {
    const std::string at = prefix(layer);
    c.recipe = recipes::parse(file.text((at + "recipe").c_str()));
    c.rope = file.rope((at + "rope").c_str());
    c.rotation_seed = whole_number(file, at + "rotation_seed");
    const std::uint64_t context = whole_number(file, at + "context");
    require(context <= most_tokens, ErrorCode::format, "a context of ", context, ", expected at most ",
            most_tokens);
    c.context = static_cast<Index>(context);
    if (c.recipe.latents)
        c.latent_keys = read_latent_keys(file, at, file.basis((at + "basis").c_str()), c.kv_heads,
                                         c.query_heads, c.key_head_dim, c.rope);
    if (c.recipe.shaped_keys)
        c.query_moments = std::make_shared<const std::vector<SecondMoments>>(
            read_queries(file, at + "queries.", c.kv_heads, c.key_head_dim));
    return c;
}

inline void require_layer(const CacheConfiguration& c, const CacheConfiguration& first) {
    require(same_heads(c, first), ErrorCode::option, heads_text(c),
            ", expected those of layer 0: ", heads_text(first));
    require(c.kv_heads <= most_heads && c.query_heads <= most_heads && c.key_head_dim <= most_heads &&
                c.value_head_dim <= most_heads && c.context <= most_tokens,
            ErrorCode::option, heads_text(c), " and a context of ", c.context, ", expected at most ",
            most_heads, " of each and ", most_tokens);
    require(recipes::parse(c.recipe.name) == c.recipe, ErrorCode::option, "recipe '", c.recipe.name,
            "' is not what its name says, expected one of recipes::parse()");
    require_configuration(c);
    require(!c.recipe.latents || c.latent_keys, ErrorCode::mismatch, "recipe '", c.recipe.name,
            "' has latents, expected a basis");
    require(!c.recipe.shaped_keys || c.query_moments, ErrorCode::mismatch, "recipe '", c.recipe.name,
            "' shapes keys, expected moments of queries");
}

/// All of the file but for its checksum.
inline SafetensorsWriter content(const ModelPolicy& policy) {
    SafetensorsWriter writer;
    const CacheConfiguration& first = policy.configurations().front();
    writer.metadata("kvplane.format", std::string(kind).append(std::to_string(version)));
    writer.metadata("kvplane.model", policy.model());
    writer.metadata("kvplane.heads", JsonObject()
                                         .add("layers", policy.configurations().size())
                                         .add("kv_heads", first.kv_heads)
                                         .add("query_heads", first.query_heads)
                                         .add("key_head_dim", first.key_head_dim)
                                         .add("value_head_dim", first.value_head_dim)
                                         .add("values_in_keys", first.values_in_keys)
                                         .text());
    for (std::size_t layer = 0; layer < policy.configurations().size(); ++layer) {
        const CacheConfiguration& c = policy.configurations()[layer];
        const std::string at = prefix(layer);
        writer.metadata(at + "recipe", c.recipe.name);
        writer.metadata(at + "rope", rope_json(c.rope));
        writer.metadata(at + "context", std::to_string(c.context));
        writer.metadata(at + "rotation_seed", std::to_string(c.rotation_seed));
        if (c.latent_keys) {
            writer.metadata(at + "basis", basis_json(c.latent_keys->settings()));
            add_latent_keys(writer, at, *c.latent_keys);
        }
        if (c.query_moments) add_queries(writer, at + "queries.", *c.query_moments);
    }
    return writer;
}

}  // namespace detail::policy

KVPLANE_FUNCTION ModelPolicy::ModelPolicy(std::string model, std::vector<CacheConfiguration> layers)
    : model_(std::move(model)), layers_(std::move(layers)) {
    require(!layers_.empty() && layers_.size() <= static_cast<std::size_t>(detail::most_heads),
            ErrorCode::option, "policy: ", layers_.size(), " layers, expected 1 to ", detail::most_heads);
    for (std::size_t i = 0; i < layers_.size(); ++i)
        detail::policy::refused_as(std::nullopt, "policy: layer " + std::to_string(i),
                                   [&] { detail::policy::require_layer(layers_[i], layers_.front()); });
}

KVPLANE_FUNCTION const CacheConfiguration& ModelPolicy::configuration(Index layer) const {
    require(layer >= 0 && layer < static_cast<Index>(layers_.size()), ErrorCode::index, "policy: layer ",
            layer, ", expected 0 to ", layers_.size() - 1);
    return layers_[static_cast<std::size_t>(layer)];
}

KVPLANE_FUNCTION void ModelPolicy::require_model(const std::string& model,
                                                 std::span<const CacheConfiguration> layers) const {
    require(model == model_, ErrorCode::mismatch, "policy: made for the model '", model_, "', not for '",
            model, "'");
    require(layers.size() == layers_.size(), ErrorCode::mismatch, "policy: made for a model of ",
            layers_.size(), " layers, not of ", layers.size());
    for (std::size_t i = 0; i < layers.size(); ++i) {
        require(detail::policy::same_heads(layers[i], layers_[i]), ErrorCode::mismatch, "policy: layer ", i,
                ": made for ", detail::policy::heads_text(layers_[i]), ", not for ",
                detail::policy::heads_text(layers[i]));
        require(layers[i].rope == layers_[i].rope, ErrorCode::mismatch, "policy: layer ", i,
                ": made for the rotary embedding ", detail::rope_json(layers_[i].rope), ", not for ",
                detail::rope_json(layers[i].rope));
    }
}

KVPLANE_FUNCTION void ModelPolicy::save(const std::filesystem::path& path) const {
    const std::vector<std::byte> unsigned_file = detail::policy::content(*this).to_bytes();
    const std::string sum = detail::policy::checksum(SafetensorsFile::from_bytes(unsigned_file, "policy"));
    SafetensorsWriter writer = detail::policy::content(*this);
    writer.metadata(detail::policy::checksum_key, sum);
    writer.write(path);
}

KVPLANE_FUNCTION ModelPolicy ModelPolicy::load(const std::filesystem::path& path) {
    const SafetensorsFile content = SafetensorsFile::open(path);
    const detail::LatentFile file(content, path.string());
    detail::policy::require_version(file);
    require(file.text(detail::policy::checksum_key) == detail::policy::checksum(content), ErrorCode::format,
            file.source(), ": the checksum does not match: the content was altered");
    Index count = 0;
    const CacheConfiguration heads = detail::policy::read_heads(file, count);
    std::vector<CacheConfiguration> layers;
    for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i)
        layers.push_back(
            detail::policy::refused_as(ErrorCode::format, file.source() + ": layer " + std::to_string(i),
                                       [&] { return detail::policy::read_layer(file, i, heads); }));
    return detail::policy::refused_as(ErrorCode::format, file.source(), [&] {
        return ModelPolicy(file.text("kvplane.model"), std::move(layers));
    });
}

}  // namespace kvplane
