// kvplane/io/range_file.hpp: some tokens of a cache to a file, and back to their places.
//
// Old tokens leave memory, and come back when they are needed:
//
//   save_range(cache, 4, 4 + 16 * 128, "old.safetensors", {.sync = false});
//   cache.drop_before(4 + 16 * 128);           // gives their pages back
//   ...
//   load_range("old.safetensors", cache);      // attention is what it was, bit for bit
//
// A prompt's beginning is kept for other sequences. A range from token 0 on is the file of a cache:
//
//   save_range(cache, 0, 516, "prompt.safetensors");
//   KvCache next = load_cache("prompt.safetensors", configuration, pool);   // as cache.fork().truncate(516)
//
// A range holds what is stored apart: whole tiles, and the recent tokens, all of them or none. So it begins
// and ends where tiles do; after the sinks and every 128 tokens, unless tokens were taken back. Only a range
// from 0 on may end anywhere, as truncate() may. What it cannot do:
//   - Tokens do not move to other positions: keys are stored as they are turned there.
//   - It cannot know whether the tokens are of this sequence. That is for the caller to keep apart.
//   - Tokens that are dropped at the time, and tiles that are not full, are in no range.
//   - Pages that come back are new ones, which the cache's forks do not share.
#pragma once

#include <filesystem>

#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/io/file.hpp"

namespace kvplane {

/// Writes the tokens [first, last). From 0 on, it is what save_cache() writes of a fork that is truncated to
/// `last`. Throws Error: index, with the nearest borders, where something that is stored apart would be cut,
/// for no tokens, and for tokens that were dropped; option as save_cache(), and for a cache that has yet to
/// fit its basis; io, and then leaves what was at `path`.
void save_range(const KvCache& cache, Index first, Index last, const std::filesystem::path& path,
                const WriteOptions& options = {});

/// Puts tokens back into a cache that lacks exactly these:
///   - because they were dropped. What comes back is the youngest of what is missing, so that all tokens from
///     `first` on are seen again; several ranges come back last first. With the oldest, all tokens are seen.
///   - or because the cache ends where they begin: a new cache (from 0 on) or one that was loaded, which
///     several ranges continue in order. It must end with a whole tile or the sinks.
/// A range from 0 on holds the sinks, which are never dropped: it goes into an empty cache alone, unless the
/// recipe keeps none.
/// The file is checked before anything changes. Throws Error: io, format, out_of_memory; mismatch (another
/// configuration or basis, or tokens that the cache does not lack). Then the cache is what it was.
void load_range(const std::filesystem::path& path, KvCache& cache);

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/io/impl/range_file.hpp"
#endif
