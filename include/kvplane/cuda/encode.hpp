// kvplane/cuda/encode.hpp: part of a tile by one block: its tokens to shared memory, grids, codes, planes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/block.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/half_planes.hpp"
#include "kvplane/cuda/numbers.hpp"
#include "kvplane/cuda/tile_grids.hpp"
#include "kvplane/cuda/tile_planes.hpp"
#include "kvplane/cuda/tile_rows.hpp"
#include "kvplane/cuda/tile_work.hpp"

namespace kvplane::cuda::detail {

template <class Of, class Block>
KVPLANE_DEVICE_INLINED void encode_item(const Block& block, const TilesArguments& a, const Item& item,
                                        int tile, std::byte* shared) {
    const Side& side = a.sides[item.side];
    const SharedPlan plan = shared_plan(item, a.segments, side.dim);
    TileWork<Of> work{a,
                      item,
                      side,
                      plan,
                      {reinterpret_cast<typename Of::Value*>(shared + plan.resident), plan.pitch},
                      a.pages[tile] + item.at,
                      shared,
                      tile,
                      reinterpret_cast<Findings*>(shared + plan.found),
                      0,
                      0};
    block.run([&](int thread, int threads) {
        if (thread == 0) *work.found = Findings{};
        const Format& format = a.formats[item.format];
        if (a.fresh && item.clears)
            for (int i = format.grid_end + thread; i < format.plane_begin; i += threads)
                work.tile[i] = std::byte{0};
    });
    // Of a tile that goes on, no more than the tokens around those that are written.
    work.count =
        a.fresh || item.spans_tokens || item.resident_rows < step_rows ? item.resident_rows : step_rows;
    for (work.base = item.first_row; work.base < item.first_row + item.rows; work.base += work.count) {
        if (!a.fresh && (work.base >= a.to || work.base + work.count <= a.from)) continue;
        // fp16 that comes from the input alone is packed as it comes.
        const bool direct = Of::has_halves && item.direct && side.input.type == input_half &&
                            side.input.in_eights && work.fresh() == work.begin();
        if (!direct) load_tokens(block, work);
        int column = 0;
        for (int s = item.first_segment; s < item.first_segment + item.segments; ++s) {
            const SegmentPart part = part_of(a.segments, item, s, column);
            column += whole_units_of(part.channels);
            if (part.segment.bits == 0) continue;
            if constexpr (Of::has_halves)
                if (!Of::has_codes || part.segment.bits == 16) {
                    encode_halves(block, work, part, direct);
                    continue;
                }
            if constexpr (Of::has_codes) {
                fit_grids(block, work, part);
                encode_codes(block, work, part);
            }
        }
    }
    block.run([&](int thread, int) {
        if (thread != 0) return;
        raise(&a.findings->largest[item.side], work.found->largest[item.side]);
        if (work.found->bad[item.side] != 0) raise(&a.findings->bad[item.side], work.found->bad[item.side]);
        double excess;
        memcpy(&excess, &work.found->excess[item.side], sizeof excess);
        if (excess > 0.0) raise(&a.findings->excess[item.side], excess);
    });
}

/// What block `index` of item_count x tile_count does, where all items are of a kind.
template <TileKind kind, class Block>
KVPLANE_DEVICE_INLINED void encode_tile(const Block& block, const TilesArguments& a, int index,
                                        std::byte* shared) {
    const int tile = index / a.item_count;
    const Item item = a.items[index % a.item_count];
    if (index == 0 && a.change.entry)
        block.run([&](int thread, int) {
            if (thread == 0) *a.change.entry = a.change.tile;
        });
    if (!a.fresh && (item.first_row >= a.to || item.first_row + item.rows <= a.from)) return;
    if constexpr (in_halves<kind>)
        encode_item<TilesOf<kind, std::uint16_t>>(block, a, item, tile, shared);
    else if constexpr (kind != tiles_any)
        encode_item<TilesOf<kind, float>>(block, a, item, tile, shared);
    else if (item.halves)
        encode_item<TilesOf<kind, std::uint16_t>>(block, a, item, tile, shared);
    else
        encode_item<TilesOf<kind, float>>(block, a, item, tile, shared);
}

}  // namespace kvplane::cuda::detail
