// kvplane/io/impl/cache_file.hpp: one cache, one file.
#pragma once

#include "kvplane/error.hpp"
#include "kvplane/io/cache_content.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/io/safetensors.hpp"

namespace kvplane {

namespace detail {

inline KvCache restored(const SafetensorsFile& file, const std::string& source,
                        const CacheConfiguration& configuration, TilePool& pool) {
    require_configuration(configuration);
    require(!file.metadata().contains(layers_key), ErrorCode::mismatch, source,
            ": a session of several layers, expected one cache; load_session() reads it");
    require(!file.metadata().contains(range_key), ErrorCode::mismatch, source,
            ": a range of tokens, expected a whole cache; load_range() reads it");
    return CacheContent::read(file, source, configuration, pool).restore(configuration, pool, source);
}

}  // namespace detail

KVPLANE_FUNCTION bool can_compress() noexcept {
    return detail::can_pack();
}

KVPLANE_FUNCTION std::vector<std::byte> to_bytes(const KvCache& cache, const SaveOptions& options) {
    auto content = detail::CacheContent::of(cache);
    if (options.compress) content.pack(cache);
    SafetensorsWriter writer;
    content.add_to(writer);
    return writer.to_bytes();
}

KVPLANE_FUNCTION void save_cache(const KvCache& cache, const std::filesystem::path& path,
                                 const SaveOptions& options) {
    auto content = detail::CacheContent::of(cache);
    if (options.compress) content.pack(cache);
    SafetensorsWriter writer;
    content.add_to(writer);
    writer.write(path, {.sync = options.sync});
}

KVPLANE_FUNCTION KvCache load_cache(const std::filesystem::path& path,
                                    const CacheConfiguration& configuration, TilePool& pool) {
    return detail::restored(SafetensorsFile::open(path), path.string(), configuration, pool);
}

KVPLANE_FUNCTION KvCache load_cache(std::span<const std::byte> bytes, const CacheConfiguration& configuration,
                                    TilePool& pool) {
    return detail::restored(SafetensorsFile::from_bytes(bytes), "memory", configuration, pool);
}

}  // namespace kvplane
