// kvplane/io/impl/latent_file.hpp: statistics and bases of all layers of a model.
#pragma once

#include <cmath>
#include <nlohmann/json.hpp>
#include <span>
#include <utility>

#include "kvplane/error.hpp"
#include "kvplane/io/impl/latent_content.hpp"
#include "kvplane/io/json_text.hpp"
#include "kvplane/io/latent_file.hpp"
#include "kvplane/io/safetensors.hpp"

namespace kvplane {

namespace detail {

inline std::string heads_json(Index layers, Index kv_heads, Index query_heads, Index head_dim) {
    return JsonObject()
        .add("layers", layers)
        .add("kv_heads", kv_heads)
        .add("query_heads", query_heads)
        .add("head_dim", head_dim)
        .text();
}

struct HeadCounts {
    Index layers, kv_heads, query_heads, head_dim;
};
inline HeadCounts read_heads(const LatentFile& file) {
    const nlohmann::json from = file.json("kvplane.heads");
    const HeadCounts heads{
        file.integer(from, "layers", most_heads), file.integer(from, "kv_heads", most_heads),
        file.integer(from, "query_heads", most_heads), file.integer(from, "head_dim", most_heads)};
    require(heads.layers >= 1 && heads.kv_heads >= 1 && heads.head_dim >= 1, ErrorCode::format, file.source(),
            ": ", heads.layers, " layers, ", heads.kv_heads, " heads of ", heads.head_dim,
            " channels, expected at least 1 of each");
    return heads;
}

inline constexpr const char* calibration_format = "latent statistics 1";
inline constexpr const char* latent_keys_format = "latent keys 1";

/// Throws Error (option) for numbers that read_heads() would refuse.
inline void require_loadable(const char* function, std::size_t layers, Index kv_heads, Index query_heads,
                             Index head_dim) {
    require(static_cast<Index>(layers) <= most_heads && kv_heads <= most_heads && query_heads <= most_heads &&
                head_dim <= most_heads,
            ErrorCode::option, function, ": ", layers, " layers of ", query_heads, " query heads over ",
            kv_heads, " key heads of ", head_dim, " channels, expected at most ", most_heads, " of each");
}

/// Throws Error (option, not_finite) for what load_calibration() would refuse.
inline void require_loadable(const Calibration& calibration) {
    const LatentStatistics& first = calibration.layers.front();
    require_loadable("save_calibration", calibration.layers.size(), first.kv_heads(), first.query_heads(),
                     first.head_dim());
    if (calibration.rope) RotaryEmbedding(first.head_dim(), *calibration.rope);  // throws where it is none
    const auto is_finite = [](const SecondMoments& moments) {
        return std::isfinite(moments.count()) && moments.mean().allFinite() && moments.scatter().allFinite();
    };
    for (std::size_t i = 0; i < calibration.layers.size(); ++i) {
        const LatentStatistics& layer = calibration.layers[i];
        require(layer.kv_heads() == first.kv_heads() && layer.query_heads() == first.query_heads() &&
                    layer.head_dim() == first.head_dim(),
                ErrorCode::option, "save_calibration: layer ", i, " has ", layer.query_heads(),
                " query heads over ", layer.kv_heads(), " key heads of ", layer.head_dim(),
                " channels, expected those of layer 0: ", first.query_heads(), ", ", first.kv_heads(), ", ",
                first.head_dim());
        bool finite = is_finite(layer.keys());
        for (Index h = 0; h < layer.kv_heads(); ++h)
            finite = finite && is_finite(layer.queries(h)) && is_finite(layer.basis_queries(h));
        require(finite, ErrorCode::not_finite, "save_calibration: the moments of layer ", i,
                " are not finite");
    }
}

}  // namespace detail

KVPLANE_FUNCTION void Calibration::merge(const Calibration& other) {
    require(other.model == model, ErrorCode::mismatch, "calibration: statistics of the model '", other.model,
            "' do not merge with those of '", model, "'");
    require(other.rope == rope, ErrorCode::mismatch, "calibration: another rotary embedding");
    require(other.layers.size() == layers.size(), ErrorCode::mismatch, "calibration: statistics of ",
            other.layers.size(), " layers do not merge with those of ", layers.size());
    std::vector<LatentStatistics> merged = layers;
    for (std::size_t i = 0; i < layers.size(); ++i) merged[i].merge(other.layers[i]);
    layers = std::move(merged);
}

KVPLANE_FUNCTION void save_calibration(const Calibration& calibration, const std::filesystem::path& path) {
    require(!calibration.layers.empty(), ErrorCode::option, "save_calibration: no layers");
    detail::require_loadable(calibration);
    SafetensorsWriter writer;
    const LatentStatistics& first = calibration.layers.front();
    writer.metadata("kvplane.format", detail::calibration_format);
    writer.metadata("kvplane.model", calibration.model);
    writer.metadata("kvplane.rope", detail::rope_json(calibration.rope));
    writer.metadata("kvplane.heads",
                    detail::heads_json(static_cast<Index>(calibration.layers.size()), first.kv_heads(),
                                       first.query_heads(), first.head_dim()));
    for (std::size_t i = 0; i < calibration.layers.size(); ++i) {
        const LatentStatistics& layer = calibration.layers[i];
        const std::string prefix = "layers." + std::to_string(i) + ".";
        writer.add(prefix + "keys.count", MatrixD::Constant(1, 1, layer.keys().count()), {1});
        writer.add(prefix + "keys.mean", layer.keys().mean());
        writer.add(prefix + "keys.scatter", layer.keys().scatter());
        std::vector<SecondMoments> queries;
        for (Index h = 0; h < layer.kv_heads(); ++h) queries.push_back(layer.queries(h));
        detail::add_queries(writer, prefix + "queries.", queries);
        if (!layer.weighted_queries().empty())
            detail::add_queries(writer, prefix + "weighted_queries.", layer.weighted_queries());
    }
    writer.write(path);
}

KVPLANE_FUNCTION Calibration load_calibration(const std::filesystem::path& path, const std::string& model) {
    const SafetensorsFile content = SafetensorsFile::open(path);
    const detail::LatentFile file(content, path.string());
    file.require_kind(detail::calibration_format, model);
    Calibration calibration;
    calibration.model = file.text("kvplane.model");
    calibration.rope = file.rope();
    const detail::HeadCounts heads = detail::read_heads(file);
    const Index channels = heads.kv_heads * heads.head_dim;
    for (Index i = 0; i < heads.layers; ++i) {
        const std::string prefix = "layers." + std::to_string(i) + ".";
        SecondMoments keys(file.matrix<double>(prefix + "keys.count", 1, 1)(0, 0),
                           Eigen::VectorXd(file.matrix<double>(prefix + "keys.mean", channels, 1)),
                           MatrixD(file.matrix<double>(prefix + "keys.scatter", channels, channels)));
        calibration.layers.emplace_back(
            heads.query_heads, std::move(keys),
            detail::read_queries(file, prefix + "queries.", heads.kv_heads, heads.head_dim));
        if (const std::string weighted = prefix + "weighted_queries."; file.contains(weighted + "count"))
            calibration.layers.back().set_weighted_queries(
                detail::read_queries(file, weighted, heads.kv_heads, heads.head_dim));
    }
    return calibration;
}

KVPLANE_FUNCTION void save_latent_keys(const std::vector<std::shared_ptr<const LatentKeys>>& layers,
                                       const std::string& model, const std::filesystem::path& path) {
    require(!layers.empty(), ErrorCode::option, "save_latent_keys: no layers");
    SafetensorsWriter writer;
    const LatentKeys& first = *layers.front();
    detail::require_loadable("save_latent_keys", layers.size(), first.kv_heads(), first.query_heads(),
                             first.head_dim());
    const BasisSettings& settings = first.settings();
    require(settings.tile_tokens >= 0 && settings.tile_tokens <= detail::most_tokens &&
                settings.context >= 0 && settings.context <= detail::most_tokens,
            ErrorCode::option, "save_latent_keys: a basis for tiles of ", settings.tile_tokens,
            " tokens and a context of ", settings.context, ", expected 0 to ", detail::most_tokens);
    writer.metadata("kvplane.format", detail::latent_keys_format);
    writer.metadata("kvplane.model", model);
    writer.metadata("kvplane.rope", detail::rope_json(first.rope()));
    writer.metadata("kvplane.basis", detail::basis_json(first.settings()));
    writer.metadata("kvplane.heads", detail::heads_json(static_cast<Index>(layers.size()), first.kv_heads(),
                                                        first.query_heads(), first.head_dim()));
    for (std::size_t i = 0; i < layers.size(); ++i) {
        require(layers[i]->settings() == first.settings() && layers[i]->kv_heads() == first.kv_heads() &&
                    layers[i]->query_heads() == first.query_heads() &&
                    layers[i]->head_dim() == first.head_dim() && layers[i]->rope() == first.rope(),
                ErrorCode::option, "save_latent_keys: layer ", i, " has another kind of basis than layer 0");
        detail::add_latent_keys(writer, "layers." + std::to_string(i) + ".", *layers[i]);
    }
    writer.write(path);
}

KVPLANE_FUNCTION std::vector<std::shared_ptr<const LatentKeys>> load_latent_keys(
    const std::filesystem::path& path, const std::string& model) {
    const SafetensorsFile content = SafetensorsFile::open(path);
    const detail::LatentFile file(content, path.string());
    file.require_kind(detail::latent_keys_format, model);
    const detail::HeadCounts heads = detail::read_heads(file);
    const std::optional<RopeSettings> rope = file.rope();
    const BasisSettings settings = file.basis();
    std::vector<std::shared_ptr<const LatentKeys>> layers;
    for (Index i = 0; i < heads.layers; ++i)
        layers.push_back(detail::read_latent_keys(file, "layers." + std::to_string(i) + ".", settings,
                                                  heads.kv_heads, heads.query_heads, heads.head_dim, rope));
    return layers;
}

}  // namespace kvplane
