// kvplane/io/cache_content.hpp: what a file holds of one cache, between the cache and the format
// (io/cache_file.hpp). Packed tiles and rows of tokens stay where they are, in the cache's pages or in the
// mapped file, so that a cache goes to a file and back with no copy between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cache/pages.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/io/packed_pages.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/latent/keys.hpp"
#include "kvplane/latent/statistics.hpp"

namespace kvplane::detail {

/// What files are written in, and what they are in which pages are packed. Read are both, and the formats
/// from oldest_cache_format on.
inline constexpr Index cache_format = 5, packed_cache_format = 6, oldest_cache_format = 3;

/// The bytes of some pages, one after another. They belong to the cache or the file.
class PageArray {
  public:
    PageArray() = default;
    /// Pages of a cache. clear: makes zero what one of the pages `partial`, which ascend, holds beyond the
    /// cache's tokens.
    PageArray(std::span<const PageReference> pages, std::vector<std::size_t> partial,
              std::function<void(std::size_t, std::byte*)> clear)
        : pages_(pages), partial_(std::move(partial)), clear_(std::move(clear)) {}
    explicit PageArray(std::span<const std::byte> file) : file_(file) {}

    std::size_t size() const noexcept {
        std::size_t sum = file_.size();
        for (const PageReference& page : pages_) sum += static_cast<std::size_t>(page.bytes());
        return sum;
    }
    /// Gives all bytes, a page at a time. One page at most is copied for it.
    void each(const ByteSink& take) const;
    /// Of a cache: every page. Partial ones are copied, to `copies`.
    std::vector<std::span<const std::byte>> all(std::vector<std::vector<std::byte>>& copies) const;
    /// Of a file: bytes [at, at + bytes) as a page of the pool. Throws Error (out_of_memory).
    PageReference page(TilePool& pool, Index at, Index bytes) const;

  private:
    std::span<const PageReference> pages_;
    std::vector<std::size_t> partial_;
    std::function<void(std::size_t, std::byte*)> clear_;
    std::span<const std::byte> file_;
};

/// What a file holds of one cache, or of a range of its tokens. Valid while the cache does not change, or the
/// file is open.
struct CacheContent {
    Index format = cache_format;
    Index layers = 0, layer = 0;       ///< of a session; no layers: of a file of its own
    std::optional<Index> range_first;  ///< of a range: its first token; `tokens` is its end then
    std::string configuration;
    Index tokens = 0, dropped = 0, window_first = 0, kept_sinks = 0;
    PageArray sinks, tiles, recent;
    std::vector<std::int64_t> tile_first, tile_tokens, tile_row, tile_shift;
    /// Two for each tile: the most bits of keys and of values where it was narrowed, else 0.
    std::vector<std::int64_t> tile_bits;
    std::vector<double> extremes;
    std::string basis_sum;  ///< checksum of the basis below, or of the one that a range needs
    std::shared_ptr<const LatentKeys> basis;    ///< the cache's own
    std::vector<SecondMoments> queries;         ///< while it has none, or while shaping learns from them
    std::shared_ptr<const KeyShaping> shaping;  ///< of shaped keys, afterwards
    TokenAttention attention;                  ///< of the next tile's tokens, where they get different widths
    PackedChunks packed_tiles, packed_recent;  ///< to be written
    /// What was packed in a file. `tiles` and `recent` are these then.
    std::vector<PageReference> unpacked_tiles, unpacked_recent;

    /// Whether tiles and recent tokens are packed in the file.
    bool packed() const noexcept { return format == packed_cache_format; }

    /// visit(key, number) for the numbers of tokens in the metadata. What is saved, loaded and hashed follows
    /// this list, in its order.
    template <class Content, class Visit>
    static void each_number(Content& content, const Visit& visit) {
        visit("kvplane.tokens", content.tokens);
        visit("kvplane.dropped", content.dropped);
        visit("kvplane.window_first", content.window_first);
        if (content.format >= 4) visit("kvplane.kept_sinks", content.kept_sinks);
    }
    /// visit(name, array) for the tensors: a PageArray, or a list of numbers. What is saved, loaded and
    /// hashed follows this list, in its order.
    template <class Content, class Visit>
    static void each_tensor(Content& content, const Visit& visit) {
        visit("sinks", content.sinks);
        visit("tiles", content.tiles);
        visit("recent", content.recent);
        visit("tile_first", content.tile_first);
        visit("tile_tokens", content.tile_tokens);
        if (content.format >= 5) {
            visit("tile_row", content.tile_row);
            visit("tile_shift", content.tile_shift);
            visit("tile_bits", content.tile_bits);
        }
        visit("extremes", content.extremes);
    }

    /// Throws Error (option) for a cache with provisional tokens.
    static CacheContent of(const KvCache& cache);
    /// Packs the pages of the cache that this is the content of, for a smaller file. Throws Error: option
    /// where the program was built without libzstd, out_of_memory.
    void pack(const KvCache& cache);
    /// Reads what stands in a file under `prefix`, and checks configuration, format and checksum. The pool
    /// gives memory for what is packed, and for nothing else. expected: its place in a session. Throws Error
    /// (format, mismatch, out_of_memory).
    static CacheContent read(const SafetensorsFile& file, const std::string& source,
                             const CacheConfiguration& configuration, TilePool& pool,
                             const std::string& prefix = "", Index layers = 0, Index layer = 0);
    /// Adds it to a file. It must outlive the writer's last use.
    void add_to(SafetensorsWriter& writer, const std::string& prefix = "") const;
    std::string checksum() const;

    /// Throws Error (format) unless the parts make up a cache: positions without gaps, pages of the right
    /// number and size.
    void require_cache(const CacheConfiguration& configuration, const std::string& source) const;
    /// The cache. Throws Error: format as require_cache(), out_of_memory.
    KvCache restore(const CacheConfiguration& configuration, TilePool& pool, const std::string& source) const;

    /// The places of the tiles in a state, without their pages; layouts of narrowed ones are added to it.
    /// Throws Error (format) for lists of other lengths, tokens beyond a tile, and widths that the recipe
    /// cannot be narrowed to.
    std::vector<TilePlace> places(CacheState& state, const std::string& source) const;
    /// A page for each of these places, one after another. Throws Error: out_of_memory; format where tokens do
    /// not have the recipe's widths.
    std::vector<PageReference> pages(const std::vector<TilePlace>& places, TilePool& pool,
                                     const std::string& source) const;
    /// The pages of recent tokens, of so many bytes each. Throws Error (out_of_memory).
    std::vector<PageReference> recent_pages(Index page_bytes, TilePool& pool) const;
    /// Whether keys have moved since they were stored, so that they go by the configuration's RoPE.
    bool moved() const noexcept;

    /// Of all tokens.
    StoredExtremes stored_extremes() const noexcept;

  private:
    /// Whether all tiles have the recipe's widths.
    bool uniform() const noexcept;
    void require_consistent(const CacheShape& shape, const CacheState& state,
                            const std::vector<TilePlace>& places, const std::string& source) const;
    CacheState empty_state(const CacheShape& shape) const;
    void unpack(const PackedPages& packed_tiles, const PackedPages& packed_recent,
                const CacheConfiguration& configuration, TilePool& pool, const std::string& source);
};

/// "kvplane.first": what tells a range of tokens from a cache; "kvplane.layers": a session from both.
inline constexpr const char *range_key = "kvplane.first", *layers_key = "kvplane.layers";
/// What packed pages are compressed with, which is always zstd.
inline constexpr const char *compression_key = "kvplane.compression", *zstd_compression = "zstd";

/// Says in a file's metadata what it is written in.
void add_format(SafetensorsWriter& writer, Index format);

/// The checksum of the basis that a cache has fitted itself; empty where it has none.
std::string own_basis_checksum(const KvCache& cache);

/// A number of tokens or layers from the metadata. Throws Error (format).
Index metadata_number(const SafetensorsFile& file, const std::string& source, const std::string& key);

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/io/impl/cache_content.hpp"
#endif
