// kvplane/io/cache_file.hpp: a cache to and from one safetensors file.
//
// Tensors (all little-endian, as the pages hold them):
//   sinks        U8  [bytes]               the page of fp16 sinks, where there are any
//   tiles        U8  [tiles, tile bytes]   the packed tiles, in the order of their positions; [bytes] where
//                                          some were narrowed
//   tile_first   I64 [tiles]               position of each tile's first token
//   tile_tokens  I64 [tiles]               tokens in each
//   tile_row     I64 [tiles]               the row of the tile that the first of them has
//   tile_shift   I64 [tiles]               by how many positions they have moved since they were stored
//   tile_bits    I64 [2 tiles]             the most bits of keys and values of tiles that were narrowed, else 0
//   recent       U8  [pages, page bytes]   pages of tokens that are not in a tile yet
//   extremes     F64 [6]                   largest magnitude of keys and values, clipped excess of each, and
//                                          what tokens of each had lost before they were stored again
//   latent.*                               a basis that the cache fitted (io/latent_file.hpp: parts.P.*)
//   queries.*    F64                       moments of queries, where it has yet to do so
// Metadata: kvplane.format (the version of all this), kvplane.configuration (JSON), kvplane.tokens,
// kvplane.kept_sinks and kvplane.dropped (what is not seen: [kept_sinks, dropped)), kvplane.window_first,
// kvplane.checksum. Rows and codes of tokens that were taken back or removed are zero. The configuration says
// which RoPE keys in channels go by only where some tile has moved.
//
// A cache that was saved compressed is of format 6, and kvplane.compression is `zstd`. It has no tiles and
// no recent, but:
//   tiles.chunks        U8  [bytes]        the pages of tiles, packed as io/packed_pages.hpp says
//   tiles.chunk_bytes   I64 [chunks]       what each chunk takes
//   recent.chunks, recent.chunk_bytes      the pages of recent tokens in the same way
// All else is as in format 5, the checksum too: it is that of the pages. So layouts tell how many bytes the
// chunks must give, and nothing in the file can claim more.
//
// A session (io/session_file.hpp) has kvplane.format and kvplane.layers, the number of its caches. All else
// stands for each of them, its name after the prefix `layer.N.`. A range of tokens (io/range_file.hpp) has
// kvplane.first, its first token, and kvplane.basis, the checksum of the basis that its tiles need (empty:
// none of the cache's own); kvplane.tokens is its end, dropped and kept_sinks are 0, and `sinks` is empty.
//
// Format 4 has no sessions, no ranges, no tile_row, tile_shift and tile_bits, and another checksum. Format 3
// has four extremes, too (nothing was stored again), and no kvplane.kept_sinks (they were the recipe's
// sinks).
//
// The checksum finds damage, it is no protection against forgery. It is a decimal number, a hash h of 64-bit
// words, with the constants of FNV-1a, but over words instead of bytes and with a shift that brings high bits
// down:
//   h = 0xCBF29CE484222325, and for each word w:
//   h = (h xor w) * 0x100000001B3 mod 2^64;  h = h xor (h >> 29)
// An array of bytes is hashed as its size in bytes, and then in four lanes, so that a product need not wait
// for the one before it. Lane k is a hash of its own, which begins at 0xCBF29CE484222325 + k. The bytes,
// filled up with zeros to a multiple of 32, are words (little-endian); word i goes into lane i mod 4. Then
// the four lanes, in their order, are words of h. In this order:
//   of a session, the words layers and the layer's number; of a range, the word first;
//   the array kvplane.configuration; the words tokens, dropped, window_first, kept_sinks;
//   the arrays sinks, tiles, recent, tile_first, tile_tokens, tile_row, tile_shift, tile_bits, extremes;
//   with a basis of its own, the array of its checksum as decimal text (of a range, kvplane.basis);
//   with moments of queries, for each head the arrays count, mean and scatter.
// Formats 3 (without kept_sinks) and 4 hash an array in one lane, which is h: its size in bytes, its whole
// words, and one more word with the 0 to 7 bytes that are left, filled up with zeros.
// A basis has a checksum of its own, with arrays in one lane. For each subspace: for each run of its segments
// the words latents and bits; then the arrays mean, encode_scale, decode_scale, decode, encode, channels
// (empty where there is none).
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <vector>

#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/io/cache_content.hpp"
#include "kvplane/io/file.hpp"

namespace kvplane {

/// How a cache or a session is saved.
struct SaveOptions {
    bool sync = true;  ///< WriteOptions::sync; says nothing where no file is written
    /// Whether tiles and recent tokens are entropy-coded, which loses nothing, and makes saving and loading
    /// slower. What is to be written is in memory as a whole then. Needs can_compress().
    bool compress = false;
};

/// Whether this program can save compressed caches, and load them: one of kvplane::compiled that was built
/// with libzstd, or a header-only one that links it and defines KVPLANE_WITH_ZSTD=1.
bool can_compress() noexcept;

/// The file of a cache in memory. Two caches of the same content give the same bytes, compressed ones with
/// the same version of libzstd. Throws Error (option) as save_cache().
std::vector<std::byte> to_bytes(const KvCache& cache, const SaveOptions& options = {});

/// Writes the file, straight from the cache's pages. Throws Error: option for a cache with provisional tokens
/// (accept them or take them back first), and for compress in a program without libzstd; io and
/// out_of_memory, and then leaves what was at `path`.
void save_cache(const KvCache& cache, const std::filesystem::path& path, const SaveOptions& options = {});

/// Reads a cache that was saved with exactly this configuration, compressed or not, in format 3 to 6. The
/// file is mapped, and copied once: into the pool's pages, after all of it was checked. What is compressed is
/// checked there. Attention of the loaded cache equals that of the saved one bit for bit. Throws Error: io;
/// format (malformed, truncated or altered content); mismatch (another format version, another configuration,
/// a session or range, a compressed file in a program without libzstd); out_of_memory. Then no page stays in
/// use.
KvCache load_cache(const std::filesystem::path& path, const CacheConfiguration& configuration,
                   TilePool& pool);
KvCache load_cache(std::span<const std::byte> bytes, const CacheConfiguration& configuration, TilePool& pool);

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/io/impl/cache_file.hpp"
#endif
