// kvplane/io/latent_file.hpp: statistics and bases of latent keys, to and from safetensors.
//
// Two kinds of files. Statistics (`calibrate` of the examples writes them) serve every recipe with latents
// and merge; bases are what an engine ships with a model, for one recipe. Both say which model they belong
// to.
//
//   statistics  layers.L.keys.count [1], .mean [d], .scatter [d, d]; layers.L.queries.count [heads], .mean
//               [heads, head_dim], .scatter [heads, head_dim, head_dim]; F64, before RoPE, d = heads *
//               head_dim
//   bases       layers.L.parts.P.segments [runs, 2] I64 (latents, bits), .mean, .encode_scale, .decode_scale
//   F32,
//               .decode, .encode F16 or .channels I64
// Metadata: kvplane.format, kvplane.model (any name), kvplane.rope and kvplane.heads (JSON).
#pragma once

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "kvplane/latent/keys.hpp"
#include "kvplane/error.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/latent/statistics.hpp"

namespace kvplane {

/// Statistics of all layers of a model.
struct Calibration {
    std::string model;
    std::optional<RopeSettings> rope;
    std::vector<LatentStatistics> layers;

    /// Throws Error (mismatch) for another model, rotary embedding or shape, and then has changed nothing.
    void merge(const Calibration& other);
};

/// Throws Error (io) and then leaves what was at `path`.
void save_calibration(const Calibration& calibration, const std::filesystem::path& path);
/// Throws Error: io; format; mismatch (no statistics; with `model` not empty, of another model).
Calibration load_calibration(const std::filesystem::path& path, const std::string& model = "");

/// Bases and widths of all layers of a model. Throws Error (option) for no layers, (io) and then leaves what
/// was at `path`.
void save_latent_keys(const std::vector<std::shared_ptr<const LatentKeys>>& layers, const std::string& model,
                      const std::filesystem::path& path);
/// Throws Error: io; format; mismatch (no bases; with `model` not empty, of another model).
std::vector<std::shared_ptr<const LatentKeys>> load_latent_keys(const std::filesystem::path& path,
                                                                const std::string& model = "");

// Implementation -------------------------------------------------------------------------------------------

namespace detail {

inline nlohmann::json rope_json(const std::optional<RopeSettings>& rope) {
    if (!rope) return nullptr;
    return {{"layout", name(rope->layout)},
            {"dims", rope->dims},
            {"base", rope->base},
            {"frequencies", rope->frequencies}};
}
inline nlohmann::json basis_json(const BasisSettings& settings) {
    return {{"frame", name(settings.frame)},
            {"query_weighted", settings.query_weighted},
            {"heads_together", settings.heads_together},
            {"channels", settings.directions == LatentDirections::channels},
            {"tile_tokens", settings.tile_tokens},
            {"context", settings.context}};
}

/// Tensors and metadata of one file, with sentences that name it.
class LatentFile {
  public:
    LatentFile(const SafetensorsFile& file, std::string source) : file_(file), source_(std::move(source)) {}

    const std::string& text(const char* key) const {
        const auto found = file_.metadata().find(key);
        require(found != file_.metadata().end(), ErrorCode::format, source_, ": no metadata '", key, "'");
        return found->second;
    }
    void require_kind(const char* format, const std::string& model) const {
        const auto found = file_.metadata().find("kvplane.format");
        const std::string kind = found == file_.metadata().end() ? "something else" : found->second;
        require(kind == format, ErrorCode::mismatch, source_, ": '", kind, "', expected '", format, "'");
        require(model.empty() || text("kvplane.model") == model, ErrorCode::mismatch, source_,
                ": of the model '", text("kvplane.model"), "', expected '", model, "'");
    }
    nlohmann::json json(const char* key) const {
        const nlohmann::json parsed = nlohmann::json::parse(text(key), nullptr, false);
        require(!parsed.is_discarded(), ErrorCode::format, source_, ": metadata '", key, "' is no JSON");
        return parsed;
    }
    Index integer(const nlohmann::json& from, const char* key, Index most = Index{1} << 30) const {
        require(from.is_object() && from.contains(key) && from[key].is_number_integer(), ErrorCode::format,
                source_, ": '", key, "' is missing or no whole number");
        const auto value = from[key].get<std::int64_t>();
        require(value >= 0 && value <= most, ErrorCode::format, source_, ": '", key, "' is ", value,
                ", expected 0 to ", most);
        return value;
    }
    bool flag(const nlohmann::json& from, const char* key) const {
        require(from.is_object() && from.contains(key) && from[key].is_boolean(), ErrorCode::format, source_,
                ": '", key, "' is missing or neither true nor false");
        return from[key].get<bool>();
    }
    std::optional<RopeSettings> rope() const {
        const nlohmann::json from = json("kvplane.rope");
        if (from.is_null()) return std::nullopt;
        RopeSettings rope;
        rope.dims = integer(from, "dims");
        const auto layout = from.find("layout"), base = from.find("base"),
                   frequencies = from.find("frequencies");
        require(layout != from.end() && layout->is_string() && base != from.end() && base->is_number() &&
                    frequencies != from.end() && frequencies->is_array(),
                ErrorCode::format, source_, ": kvplane.rope is incomplete");
        rope.layout = *layout == "halves" ? RopeLayout::halves : RopeLayout::interleaved;
        rope.base = base->get<double>();
        for (const auto& frequency : *frequencies) {
            require(frequency.is_number(), ErrorCode::format, source_, ": a frequency is no number");
            rope.frequencies.push_back(frequency.get<double>());
        }
        return rope;
    }
    BasisSettings basis() const {
        const nlohmann::json from = json("kvplane.basis");
        BasisSettings settings;
        settings.query_weighted = flag(from, "query_weighted");
        settings.heads_together = flag(from, "heads_together");
        settings.directions =
            flag(from, "channels") ? LatentDirections::channels : LatentDirections::eigenvectors;
        settings.tile_tokens = integer(from, "tile_tokens");
        settings.context = integer(from, "context");
        const auto frame = from.find("frame");
        for (const KeyFrame known : {KeyFrame::before_rope, KeyFrame::after_rope, KeyFrame::tile})
            if (frame != from.end() && *frame == name(known)) return settings.frame = known, settings;
        fail(ErrorCode::format, source_, ": kvplane.basis names no frame");
    }

    bool contains(const std::string& tensor) const { return file_.contains(tensor); }
    Index size(const std::string& tensor) const {
        require(file_.contains(tensor), ErrorCode::format, source_, ": no tensor '", tensor, "'");
        Index count = 1;
        for (const Index side : file_.info(tensor).shape) count *= side;
        return count;
    }
    template <class Scalar>
    RowMajorMatrix<Scalar> matrix(const std::string& tensor, Index rows, Index cols) const {
        (void)size(tensor);
        if (rows * cols == 0) return RowMajorMatrix<Scalar>(rows, cols);
        return file_.matrix<Scalar>(tensor, rows, cols);
    }
    const std::string& source() const noexcept { return source_; }

  private:
    const SafetensorsFile& file_;
    std::string source_;
};

inline void add_subspace(SafetensorsWriter& writer, const std::string& prefix, const LatentKeys::Subspace& subspace) {
    std::vector<std::int64_t> segments;
    for (const ChannelSegment& segment : subspace.segments) {
        segments.push_back(segment.channels);
        segments.push_back(segment.bits);
    }
    writer.add(prefix + "segments", {static_cast<Index>(subspace.segments.size()), 2}, DType::int64,
               std::as_bytes(std::span(segments)));
    writer.add(prefix + "mean", subspace.mean);
    writer.add(prefix + "encode_scale", subspace.to_latents_scale);
    writer.add(prefix + "decode_scale", subspace.from_latents_scale);
    writer.add(prefix + "decode", subspace.from_latents);
    writer.add(prefix + "encode", subspace.to_latents);
    writer.add(prefix + "channels", {static_cast<Index>(subspace.channels.size())}, DType::int64,
               std::as_bytes(std::span(subspace.channels)));
}

inline LatentKeys::Subspace read_subspace(const LatentFile& file, const std::string& prefix, Index channels,
                                  bool by_channel, bool two_matrices) {
    LatentKeys::Subspace subspace;
    const Index runs = file.size(prefix + "segments") / 2, kept = file.size(prefix + "decode_scale");
    const auto segments = file.matrix<std::int64_t>(prefix + "segments", runs, 2);
    for (Index run = 0; run < runs; ++run) {
        const auto bits = static_cast<int>(std::clamp<std::int64_t>(segments(run, 1), -1, 99));
        const auto width = std::clamp<std::int64_t>(segments(run, 0), 0, Index{1} << 30);
        subspace.segments.push_back({width, bits, scheme_for(bits)});
    }
    subspace.mean = file.matrix<float>(prefix + "mean", 1, channels);
    subspace.to_latents_scale = file.matrix<float>(prefix + "encode_scale", 1, kept);
    subspace.from_latents_scale = file.matrix<float>(prefix + "decode_scale", 1, kept);
    if (by_channel) {
        const auto numbers = file.matrix<std::int64_t>(prefix + "channels", 1, kept);
        subspace.channels.assign(numbers.data(), numbers.data() + kept);
        return subspace;
    }
    subspace.from_latents = file.matrix<Eigen::half>(prefix + "decode", channels, kept);
    if (two_matrices) subspace.to_latents = file.matrix<Eigen::half>(prefix + "encode", channels, kept);
    return subspace;
}

inline void add_latent_keys(SafetensorsWriter& writer, const std::string& prefix, const LatentKeys& keys) {
    for (Index s = 0; s < keys.subspaces(); ++s)
        add_subspace(writer, prefix + "parts." + std::to_string(s) + ".", keys.subspace(s));
}

/// The heads and settings are those of the file or the configuration. Throws Error (format, shape, ...).
inline std::shared_ptr<const LatentKeys> read_latent_keys(const LatentFile& file, const std::string& prefix,
                                                          const BasisSettings& settings, Index kv_heads,
                                                          Index query_heads, Index head_dim,
                                                          const std::optional<RopeSettings>& rope) {
    std::vector<LatentKeys::Subspace> subspaces;
    const Index count = settings.heads_together ? 1 : kv_heads, channels = kv_heads * head_dim / count;
    for (Index s = 0; s < count; ++s)
        subspaces.push_back(read_subspace(file, prefix + "parts." + std::to_string(s) + ".", channels,
                                  settings.directions == LatentDirections::channels,
                                  settings.query_weighted));
    return std::make_shared<const LatentKeys>(settings, kv_heads, query_heads, head_dim, rope,
                                              std::move(subspaces));
}

inline void add_queries(SafetensorsWriter& writer, const std::string& prefix,
                        const std::vector<SecondMoments>& heads) {
    const auto count = static_cast<Index>(heads.size()), dim = heads[0].channels();
    MatrixD counts(1, count), means(count, dim), scatters(count * dim, dim);
    for (Index h = 0; h < count; ++h) {
        const SecondMoments& head = heads[static_cast<std::size_t>(h)];
        counts(0, h) = head.count();
        means.row(h) = head.mean().transpose();
        scatters.middleRows(h * dim, dim) = head.scatter();
    }
    writer.add(prefix + "count", counts, {count});
    writer.add(prefix + "mean", means);
    writer.add(prefix + "scatter", scatters, {count, dim, dim});
}

inline std::vector<SecondMoments> read_queries(const LatentFile& file, const std::string& prefix, Index heads,
                                               Index dim) {
    const MatrixD counts = file.matrix<double>(prefix + "count", 1, heads),
                  means = file.matrix<double>(prefix + "mean", heads, dim),
                  scatters = file.matrix<double>(prefix + "scatter", heads * dim, dim);
    std::vector<SecondMoments> queries;
    for (Index h = 0; h < heads; ++h)
        queries.emplace_back(counts(0, h), Eigen::VectorXd(means.row(h).transpose()),
                             MatrixD(scatters.middleRows(h * dim, dim)));
    return queries;
}

inline std::string heads_json(Index layers, Index kv_heads, Index query_heads, Index head_dim) {
    const nlohmann::json heads{
        {"layers", layers}, {"kv_heads", kv_heads}, {"query_heads", query_heads}, {"head_dim", head_dim}};
    return heads.dump();
}

struct HeadCounts {
    Index layers, kv_heads, query_heads, head_dim;
};
inline HeadCounts read_heads(const LatentFile& file) {
    const nlohmann::json from = file.json("kvplane.heads");
    const HeadCounts heads{file.integer(from, "layers", 1 << 16), file.integer(from, "kv_heads", 1 << 16),
                           file.integer(from, "query_heads", 1 << 16),
                           file.integer(from, "head_dim", 1 << 16)};
    require(heads.layers >= 1 && heads.kv_heads >= 1 && heads.head_dim >= 1, ErrorCode::format, file.source(),
            ": ", heads.layers, " layers, ", heads.kv_heads, " heads of ", heads.head_dim,
            " channels, expected at least 1 of each");
    return heads;
}

inline constexpr const char* calibration_format = "latent statistics 1";
inline constexpr const char* latent_keys_format = "latent keys 1";

}  // namespace detail

inline void Calibration::merge(const Calibration& other) {
    require(other.model == model, ErrorCode::mismatch, "calibration: statistics of the model '", other.model,
            "' do not merge with those of '", model, "'");
    require(other.rope == rope, ErrorCode::mismatch, "calibration: another rotary embedding");
    require(other.layers.size() == layers.size(), ErrorCode::mismatch, "calibration: statistics of ",
            other.layers.size(), " layers do not merge with those of ", layers.size());
    std::vector<LatentStatistics> merged = layers;
    for (std::size_t i = 0; i < layers.size(); ++i) merged[i].merge(other.layers[i]);
    layers = std::move(merged);
}

inline void save_calibration(const Calibration& calibration, const std::filesystem::path& path) {
    require(!calibration.layers.empty(), ErrorCode::option, "save_calibration: no layers");
    SafetensorsWriter writer;
    const LatentStatistics& first = calibration.layers.front();
    writer.metadata("kvplane.format", detail::calibration_format);
    writer.metadata("kvplane.model", calibration.model);
    writer.metadata("kvplane.rope", detail::rope_json(calibration.rope).dump());
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
    }
    writer.write(path);
}

inline Calibration load_calibration(const std::filesystem::path& path, const std::string& model) {
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
    }
    return calibration;
}

inline void save_latent_keys(const std::vector<std::shared_ptr<const LatentKeys>>& layers,
                             const std::string& model, const std::filesystem::path& path) {
    require(!layers.empty(), ErrorCode::option, "save_latent_keys: no layers");
    SafetensorsWriter writer;
    const LatentKeys& first = *layers.front();
    writer.metadata("kvplane.format", detail::latent_keys_format);
    writer.metadata("kvplane.model", model);
    writer.metadata("kvplane.rope", detail::rope_json(first.rope()).dump());
    writer.metadata("kvplane.basis", detail::basis_json(first.settings()).dump());
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

inline std::vector<std::shared_ptr<const LatentKeys>> load_latent_keys(const std::filesystem::path& path,
                                                                       const std::string& model) {
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
