// kvplane/io/impl/packed_pages.hpp: pages to streams, streams to chunks, and back.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "kvplane/error.hpp"
#include "kvplane/io/packed_pages.hpp"
#include "kvplane/simd/vector.hpp"
#if !defined(KVPLANE_WITH_ZSTD)
#define KVPLANE_WITH_ZSTD 0
#endif
#if KVPLANE_WITH_ZSTD
#include <zstd.h>
#endif

namespace kvplane::detail {

// Streams --------------------------------------------------------------------------------------------------

/// Even and odd bytes of [at, at + bytes): a run each.
inline void add_interleaved_runs(std::vector<PageRun>& runs, int kind, Index at, Index bytes) {
    runs.push_back({kind, at, (bytes + 1) / 2, 2});
    runs.push_back({kind + 1, at + 1, bytes / 2, 2});
}

KVPLANE_FUNCTION PageForm PageForm::of(const PageLayout& layout) {
    PageForm form{layout.bytes, {}};
    const auto add_tile = [&](const TileFormat& tile, Index at) {
        const int side = tile.side() == TileSide::keys ? 0 : 1024;
        add_interleaved_runs(form.runs, side, at, tile.grid_bytes());
        for (const TileFormat::Placed& segment : tile.segments())
            for (int p = 0; p < segment.split.count; ++p)
                form.runs.push_back({side + 8 * segment.bits + p,
                                     at + segment.plane_at[static_cast<std::size_t>(p)],
                                     tile.plane_bytes(segment, segment.split[p]), 1});
    };
    for (Index s = 0; s < layout.subspaces(); ++s)
        add_tile(layout.key_format(s), layout.key_at[static_cast<std::size_t>(s)]);
    if (!layout.values_in_keys)
        for (const Index at : layout.value_at) add_tile(layout.values, at);
    if (layout.rotates_by_tile())
        form.runs.push_back({2048, layout.rotated_at, layout.bytes - layout.rotated_at, 1});
    std::stable_sort(form.runs.begin(), form.runs.end(),
                     [](const PageRun& a, const PageRun& b) { return a.kind < b.kind; });
    return form;
}

KVPLANE_FUNCTION PageForm PageForm::of_rows(Index bytes) {
    PageForm form{bytes, {}};
    add_interleaved_runs(form.runs, 0, 0, bytes);
    return form;
}

/// Calls begin(bytes) for every stream, and then run(page, run) for what it is made of.
template <class Coder>
void each_stream(std::span<const PageForm* const> forms, Coder& coder) {
    std::vector<const PageForm*> seen;
    for (const PageForm* const form : forms) {
        if (std::find(seen.begin(), seen.end(), form) != seen.end()) continue;
        seen.push_back(form);
        std::vector<std::size_t> pages;
        for (std::size_t page = 0; page < forms.size(); ++page)
            if (forms[page] == form) pages.push_back(page);
        for (auto run = form->runs.begin(); run != form->runs.end();) {
            const auto end = std::find_if(run, form->runs.end(),
                                          [&](const PageRun& other) { return other.kind != run->kind; });
            Index bytes = 0;
            for (auto one = run; one != end; ++one) bytes += one->count;
            coder.begin(bytes * static_cast<Index>(pages.size()));
            for (; run != end; ++run)
                for (const std::size_t page : pages) coder.run(page, *run);
        }
    }
}

// Chunks ---------------------------------------------------------------------------------------------------

inline constexpr Index packed_chunk_bytes = Index{1} << 16;

KVPLANE_FUNCTION void PackedPages::require_room(Index bytes) const {
    const auto count = static_cast<Index>(chunk_bytes.size());
    require(count >= bytes / packed_chunk_bytes, ErrorCode::format, name, ": ", count, " chunks for ", bytes,
            " bytes, expected at least one for every ", packed_chunk_bytes);
}

#if KVPLANE_WITH_ZSTD

KVPLANE_FUNCTION bool can_pack() noexcept {
    return true;
}

struct ZstdDeleter {
    void operator()(ZSTD_CCtx* context) const noexcept { ZSTD_freeCCtx(context); }
    void operator()(ZSTD_DCtx* context) const noexcept { ZSTD_freeDCtx(context); }
};

class PagePacker {
  public:
    explicit PagePacker(std::span<const std::span<const std::byte>> pages)
        : pages_(pages), context_(ZSTD_createCCtx()) {
        require(context_ != nullptr, ErrorCode::out_of_memory, "save: no memory to compress with");
    }

    void begin(Index bytes) noexcept { left_ = bytes; }
    void run(std::size_t page, const PageRun& run) {
        const std::byte* from = pages_[page].data() + run.at;
        for (Index done = 0; done < run.count;) {
            const Index count = std::min(run.count - done, packed_chunk_bytes - held_);
            std::byte* const to = raw_.data() + held_;
            if (run.step == 1) {
                std::memcpy(to, from, static_cast<std::size_t>(count));
            } else {
                for (Index i = 0; i < count; ++i) to[i] = from[i * run.step];
            }
            from += count * run.step;
            done += count;
            held_ += count;
            left_ -= count;
            if (held_ == packed_chunk_bytes || left_ == 0) finish_chunk();
        }
    }
    PackedChunks take() && noexcept { return std::move(chunks_); }

  private:
    void finish_chunk() {
        if (held_ == 0) return;
        const auto size = static_cast<std::size_t>(held_);
        // It fails where the frame would take more.
        constexpr int level = 1;
        const std::size_t packed =
            ZSTD_compressCCtx(context_.get(), packed_.data(), size - size / 64 - 1, raw_.data(), size, level);
        const std::byte* const from = ZSTD_isError(packed) ? raw_.data() : packed_.data();
        chunks_.emplace_back(from, from + (ZSTD_isError(packed) ? size : packed));
        held_ = 0;
    }

    std::span<const std::span<const std::byte>> pages_;
    std::unique_ptr<ZSTD_CCtx, ZstdDeleter> context_;
    std::vector<std::byte> raw_ = std::vector<std::byte>(packed_chunk_bytes), packed_ = raw_;
    Index held_ = 0, left_ = 0;
    PackedChunks chunks_;
};

/// Bytes to every other byte of a page that is zero there.
inline void spread(const std::byte* from, Index count, std::byte* to) noexcept {
    using Bytes = simd::Vector<std::uint8_t, 16>;
    Index i = 0;
    for (; i + 16 < count; i += 16) {  // not the last one, behind which the page may end
        Bytes bytes, there[2];
        simd::load(bytes, from + i);
        for (int half : {0, 1}) simd::load(there[half], to + 2 * i + 16 * half);
        const Bytes zero{};
        there[0] |=
            __builtin_shufflevector(bytes, zero, 0, 16, 1, 16, 2, 16, 3, 16, 4, 16, 5, 16, 6, 16, 7, 16);
        there[1] |= __builtin_shufflevector(bytes, zero, 8, 16, 9, 16, 10, 16, 11, 16, 12, 16, 13, 16, 14, 16,
                                            15, 16);
        for (int half : {0, 1}) simd::store(to + 2 * i + 16 * half, there[half]);
    }
    for (; i < count; ++i) to[2 * i] = from[i];
}

class PageUnpacker {
  public:
    PageUnpacker(const PackedPages& packed, std::span<const PageReference> pages)
        : packed_(packed), pages_(pages), context_(ZSTD_createDCtx()) {
        require(context_ != nullptr, ErrorCode::out_of_memory, packed.name, ": no memory to decompress with");
    }

    void begin(Index bytes) noexcept { left_ = bytes; }
    void run(std::size_t page, const PageRun& run) {
        std::byte* to = pages_[page].data() + run.at;
        for (Index done = 0; done < run.count;) {
            if (chunk_.empty()) next_chunk();
            const Index count = std::min(run.count - done, static_cast<Index>(chunk_.size()));
            if (run.step == 1) {
                std::memcpy(to, chunk_.data(), static_cast<std::size_t>(count));
            } else {
                spread(chunk_.data(), count, to);
            }
            to += count * run.step;
            done += count;
            chunk_ = chunk_.subspan(static_cast<std::size_t>(count));
        }
    }
    void finish() const {
        require(next_ == packed_.chunk_bytes.size() && at_ == packed_.chunks.size(), ErrorCode::format,
                packed_.name, ": ", packed_.chunk_bytes.size(), " chunks in ", packed_.chunks.size(),
                " bytes, expected ", next_, " in ", at_);
    }

  private:
    void next_chunk() {
        const auto expect = [&](bool holds, const auto&... what) {
            require(holds, ErrorCode::format, packed_.name, ": chunk ", next_, what...);
        };
        expect(next_ < packed_.chunk_bytes.size(), " is missing");
        const auto size = static_cast<std::size_t>(std::min(left_, packed_chunk_bytes));
        const std::int64_t takes = packed_.chunk_bytes[next_];
        expect(takes >= 1 && takes <= static_cast<std::int64_t>(size) &&
                   static_cast<std::size_t>(takes) <= packed_.chunks.size() - at_,
               " takes ", takes, " bytes, expected 1 to ", size, " of the ", packed_.chunks.size() - at_,
               " that are left");
        chunk_ = packed_.chunks.subspan(at_, static_cast<std::size_t>(takes));
        at_ += chunk_.size();
        left_ -= static_cast<Index>(size);
        if (chunk_.size() < size) {
            const std::size_t given =
                ZSTD_decompressDCtx(context_.get(), raw_.data(), size, chunk_.data(), chunk_.size());
            expect(given == size, ": zstd gives ",
                   ZSTD_isError(given) ? ZSTD_getErrorName(given) : "fewer bytes", ", expected ", size,
                   " bytes");
            chunk_ = std::span(raw_).first(size);
        }
        ++next_;
    }

    const PackedPages& packed_;
    std::span<const PageReference> pages_;
    std::unique_ptr<ZSTD_DCtx, ZstdDeleter> context_;
    std::vector<std::byte> raw_ = std::vector<std::byte>(packed_chunk_bytes);
    std::span<const std::byte> chunk_;  ///< what is left of it
    std::size_t next_ = 0, at_ = 0;     ///< chunk, and where it begins
    Index left_ = 0;                    ///< of the stream, after the chunk
};

KVPLANE_FUNCTION PackedChunks pack_pages(std::span<const std::span<const std::byte>> pages,
                                         std::span<const PageForm* const> forms) {
    PagePacker packer(pages);
    each_stream(forms, packer);
    return std::move(packer).take();
}

KVPLANE_FUNCTION std::vector<PageReference> unpack_pages(const PackedPages& packed,
                                                         std::span<const PageForm* const> forms,
                                                         TilePool& pool) {
    std::vector<PageReference> pages;
    pages.reserve(forms.size());
    for (const PageForm* form : forms) pages.push_back(pool.page(form->bytes));
    PageUnpacker unpacker(packed, pages);
    each_stream(forms, unpacker);
    unpacker.finish();
    return pages;
}

#else

KVPLANE_FUNCTION bool can_pack() noexcept {
    return false;
}

KVPLANE_FUNCTION PackedChunks pack_pages(std::span<const std::span<const std::byte>>,
                                         std::span<const PageForm* const>) {
    fail(ErrorCode::option, "save: compress, but this program was built without libzstd (KVPLANE_WITH_ZSTD)");
}

KVPLANE_FUNCTION std::vector<PageReference> unpack_pages(const PackedPages& packed,
                                                         std::span<const PageForm* const>, TilePool&) {
    fail(ErrorCode::mismatch, packed.name,
         ": compressed with zstd, but this program was built without libzstd (KVPLANE_WITH_ZSTD)");
}

#endif

}  // namespace kvplane::detail
