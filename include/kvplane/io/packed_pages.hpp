// kvplane/io/packed_pages.hpp: pages of a cache for files that are smaller, entropy-coded plane by plane.
//
// Some codes of a grid are more frequent than others: of normally distributed numbers 2 bits have an entropy
// of 1.8 to 1.9, 3 bits 2.6 to 2.8. A byte of a plane holds whole codes of it, and no two bytes depend on
// each other much, so that Huffman codes of bytes take most of the gain. Those of libzstd do.
//
// Bytes of many pages that are alike make a stream:
//   - the even bytes of the grids of keys, and the odd ones (steps are fp16; their upper bytes are alike)
//   - each plane of keys of each width, those of fewer bits first and the most significant plane first
//   - the same of values
//   - which tiles of keys were rotated, where that differs
//   - of pages of tokens outside tiles the even bytes and the odd ones
// A stream goes over all tiles (or segments) of a page that have it, in the order in which they stand there,
// and of each takes the bytes of every page before it goes on. Pages with another layout have streams of
// their own, behind those of the first.
//
// Streams are cut into chunks of 64 KiB, the last one shorter. A chunk is a zstd frame by itself, or where
// that would save less than 1 byte in 64 the bytes as they are: a chunk that takes as much as it holds.
//
// A header-only program that defines KVPLANE_WITH_ZSTD=1, in all of its sources, and links libzstd packs and
// unpacks; others refuse. kvplane::compiled does where CMake found libzstd.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kvplane/cache/pages.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/storage/tile_sequence.hpp"

namespace kvplane::detail {

/// Bytes of a page that are alike: `count` of them from `at` on, side by side (a step of 1) or every other
/// one (2). A stream takes the runs of one kind.
struct PageRun {
    int kind;
    Index at, count, step;
};

/// The runs of a page, by kind. Every byte is in one of them.
struct PageForm {
    Index bytes;
    std::vector<PageRun> runs;

    /// Of pages with tiles.
    static PageForm of(const PageLayout& layout);
    /// Of pages with tokens outside tiles.
    static PageForm of_rows(Index bytes);
};

/// What the pages of a file are packed to.
using PackedChunks = std::vector<std::vector<std::byte>>;

/// The same in a file.
struct PackedPages {
    std::string name;  ///< of the file and what is packed, for sentences
    std::span<const std::byte> chunks;
    std::vector<std::int64_t> chunk_bytes;  ///< what each takes

    /// Throws Error (format) where the chunks are too few for so many bytes.
    void require_room(Index bytes) const;
};

/// Whether this program can pack and unpack.
bool can_pack() noexcept;

/// forms: of each page. Throws Error: option where the program was built without libzstd, out_of_memory.
PackedChunks pack_pages(std::span<const std::span<const std::byte>> pages,
                        std::span<const PageForm* const> forms);

/// The pages, in memory of the pool. Throws Error: format where the chunks do not make up pages of these
/// forms; mismatch where the program was built without libzstd; out_of_memory.
std::vector<PageReference> unpack_pages(const PackedPages& packed, std::span<const PageForm* const> forms,
                                        TilePool& pool);

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/io/impl/packed_pages.hpp"
#endif
