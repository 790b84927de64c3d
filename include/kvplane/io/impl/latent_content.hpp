// kvplane/io/impl/latent_content.hpp: what latent_file.hpp and cache_file.hpp share: settings as JSON,
// subspaces and moments as tensors. Inline, so that both may include it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/io/json_text.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/latent/keys.hpp"
#include "kvplane/latent/statistics.hpp"
#include "kvplane/quantize/grid.hpp"

namespace kvplane::detail {

inline std::string rope_json(const std::optional<RopeSettings>& rope) {
    if (!rope) return "null";
    return JsonObject()
        .add("layout", name(rope->layout))
        .add("dims", rope->dims)
        .add("base", rope->base)
        .add("frequencies", rope->frequencies)
        .text();
}
inline std::string basis_json(const BasisSettings& settings) {
    return JsonObject()
        .add("frame", name(settings.frame))
        .add("query_weighted", settings.query_weighted)
        .add("heads_together", settings.heads_together)
        .add("channels", settings.directions == LatentDirections::channels)
        .add("tile_tokens", settings.tile_tokens)
        .add("context", settings.context)
        .text();
}

/// The largest number of layers, heads or channels of a head, and of anything else, that a file may give.
inline constexpr Index most_heads = Index{1} << 16, most_tokens = Index{1} << 30;

/// What an error says, without the name of the library, for a sentence that goes around it.
inline std::string_view sentence_of(const Error& error) {
    std::string_view sentence = error.what();
    constexpr std::string_view name = "kvplane: ";
    if (sentence.starts_with(name)) sentence.remove_prefix(name.size());
    return sentence;
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
    Index integer(const nlohmann::json& from, const char* key, Index most = most_tokens) const {
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
    std::optional<RopeSettings> rope(const char* key = "kvplane.rope") const {
        const nlohmann::json from = json(key);
        if (from.is_null()) return std::nullopt;
        RopeSettings rope;
        rope.dims = integer(from, "dims");
        const auto layout = from.find("layout"), base = from.find("base"),
                   frequencies = from.find("frequencies");
        require(layout != from.end() && layout->is_string() && base != from.end() && base->is_number() &&
                    frequencies != from.end() && frequencies->is_array(),
                ErrorCode::format, source_, ": ", key, " is incomplete");
        require(*layout == name(RopeLayout::halves) || *layout == name(RopeLayout::interleaved),
                ErrorCode::format, source_, ": ", key,
                " has an unknown layout, expected 'interleaved' or 'halves'");
        rope.layout = *layout == name(RopeLayout::halves) ? RopeLayout::halves : RopeLayout::interleaved;
        rope.base = base->get<double>();
        for (const auto& frequency : *frequencies) {
            require(frequency.is_number(), ErrorCode::format, source_, ": a frequency is no number");
            rope.frequencies.push_back(frequency.get<double>());
        }
        return rope;
    }
    BasisSettings basis(const char* key = "kvplane.basis") const {
        const nlohmann::json from = json(key);
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
        fail(ErrorCode::format, source_, ": ", key, " names no frame");
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

inline void add_subspace(SafetensorsWriter& writer, const std::string& prefix,
                         const LatentKeys::Subspace& subspace) {
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

}  // namespace kvplane::detail
