// kvplane/io/impl/session_file.hpp: several caches under prefixes.
#pragma once

#include <utility>

#include "kvplane/error.hpp"
#include "kvplane/io/cache_content.hpp"
#include "kvplane/io/safetensors_text.hpp"
#include "kvplane/io/session_file.hpp"

namespace kvplane {

namespace detail {

inline std::string layer_prefix(Index layer) {
    return concatenated("layer.", std::to_string(layer), ".");
}

}  // namespace detail

KVPLANE_FUNCTION void save_session(std::span<const KvCache* const> layers, const std::filesystem::path& path,
                                   const SaveOptions& options) {
    require(!layers.empty(), ErrorCode::option, "save_session: no layers");
    std::vector<detail::CacheContent> contents;
    contents.reserve(layers.size());  // the writer refers to them
    SafetensorsWriter writer;
    for (const KvCache* layer : layers) {
        detail::CacheContent& content = contents.emplace_back(detail::CacheContent::of(*layer));
        content.layers = static_cast<Index>(layers.size());
        content.layer = static_cast<Index>(contents.size()) - 1;
        if (options.compress) content.pack(*layer);
        content.add_to(writer, detail::layer_prefix(content.layer));
    }
    detail::add_format(writer, contents.front().format);
    writer.metadata(detail::layers_key, std::to_string(layers.size()));
    writer.write(path, {.sync = options.sync});
}

KVPLANE_FUNCTION SessionFile SessionFile::open(const std::filesystem::path& path) {
    SafetensorsFile file = SafetensorsFile::open(path);
    std::string source = path.string();
    require(file.metadata().contains(detail::layers_key), ErrorCode::mismatch, source,
            ": no session; load_cache() reads the file of one cache");
    const Index layers = detail::metadata_number(file, source, detail::layers_key);
    require(layers > 0, ErrorCode::format, source, ": a session of no layers");
    return {std::move(file), std::move(source), layers};
}

KVPLANE_FUNCTION KvCache SessionFile::load(Index layer, const CacheConfiguration& configuration,
                                           TilePool& pool) const {
    require(layer >= 0 && layer < layers_, ErrorCode::index, source_, ": layer ", layer, " of ", layers_);
    return detail::CacheContent::read(file_, source_, configuration, pool, detail::layer_prefix(layer),
                                      layers_, layer)
        .restore(configuration, pool, source_);
}

KVPLANE_FUNCTION std::vector<KvCache> SessionFile::load(std::span<const CacheConfiguration> configurations,
                                                        TilePool& pool) const {
    require(static_cast<Index>(configurations.size()) == layers_, ErrorCode::mismatch, source_,
            ": a session of ", layers_, " layers, expected ", configurations.size());
    std::vector<detail::CacheContent> contents;
    for (const CacheConfiguration& configuration : configurations) {
        const auto layer = static_cast<Index>(contents.size());
        contents.push_back(detail::CacheContent::read(file_, source_, configuration, pool,
                                                      detail::layer_prefix(layer), layers_, layer));
        contents.back().require_cache(configuration, source_);
    }
    std::vector<KvCache> caches;
    caches.reserve(contents.size());
    for (std::size_t i = 0; i < contents.size(); ++i)
        caches.push_back(contents[i].restore(configurations[i], pool, source_));
    return caches;
}

KVPLANE_FUNCTION std::vector<KvCache> load_session(const std::filesystem::path& path,
                                                   std::span<const CacheConfiguration> configurations,
                                                   TilePool& pool) {
    return SessionFile::open(path).load(configurations, pool);
}

}  // namespace kvplane
