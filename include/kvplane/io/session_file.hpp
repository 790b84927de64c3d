// kvplane/io/session_file.hpp: the caches of all layers of a sequence to and from one file.
//
//   std::vector<const KvCache*> layers = ...;
//   save_session(layers, "session.safetensors", {.sync = false});
//   std::vector<KvCache> again = load_session("session.safetensors", configurations, pool);
//
// Each layer has a configuration and a checksum of its own, so that an engine can load the first and begin,
// while others are still on the disk: SessionFile. The format: io/cache_file.hpp.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/io/safetensors.hpp"

namespace kvplane {

/// Writes the file, as save_cache(). The caches may differ in everything. Throws Error: option as
/// save_cache(), and for no caches; io and out_of_memory, and then leaves what was at `path`.
void save_session(std::span<const KvCache* const> layers, const std::filesystem::path& path,
                  const SaveOptions& options = {});

/// A session's file, mapped. Copies share the mapping. Calls may run at the same time.
class SessionFile {
  public:
    /// Reads the header alone. Throws Error: io; format; mismatch (no session, or of another format version).
    static SessionFile open(const std::filesystem::path& path);

    Index layers() const noexcept { return layers_; }

    /// One layer, which is all of the file that is read. Throws Error: index (no such layer); all others as
    /// load_cache().
    KvCache load(Index layer, const CacheConfiguration& configuration, TilePool& pool) const;
    /// All layers. All of them are checked before the pool is asked for a page, unless they are compressed.
    /// Throws Error: mismatch also for another number of layers; all others as load_cache(). Then no page
    /// stays in use.
    std::vector<KvCache> load(std::span<const CacheConfiguration> configurations, TilePool& pool) const;

  private:
    SessionFile(SafetensorsFile file, std::string source, Index layers)
        : file_(std::move(file)), source_(std::move(source)), layers_(layers) {}

    SafetensorsFile file_;
    std::string source_;
    Index layers_;
};

/// All layers of a session that was saved with exactly these configurations. Throws Error as SessionFile.
std::vector<KvCache> load_session(const std::filesystem::path& path,
                                  std::span<const CacheConfiguration> configurations, TilePool& pool);

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/io/impl/session_file.hpp"
#endif
