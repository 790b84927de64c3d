// kvplane/cuda/tile_rows.hpp: takes the tokens of a tile to shared memory, as they are or would be stored
// outside tiles.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/block.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/input.hpp"
#include "kvplane/cuda/tile_work.hpp"
#include "kvplane/cuda/token_rows.hpp"

namespace kvplane::cuda::detail {

/// To shared memory: some channels of a token that was stored outside tiles before, eight at a time.
template <class Value>
KVPLANE_DEVICE void load_recent_eight(const Side& side, const std::byte* page, int head, int token,
                                      int channel, Value* to) {
    KVPLANE_KEEP_ROLLED
    for (int k = 0; k < 8; k += 4) {
        float four[4] = {};
        if (channel + k < side.dim) load_recent(side, page, head, token, channel + k, four);
        put_numbers<4>(to + k, four);
    }
}

template <class Of, class Block>
KVPLANE_DEVICE_INLINED void load_latents(const Block& block, const TileWork<Of>& work,
                                         const SegmentPart& part) {
    const float* const latents =
        work.a.latents + work.tile_index * work.a.latent_stride + work.item.latent_at + part.channel;
    block.run([&](int thread, int threads) {
        const ThreadGrid grid(thread, threads, (part.channels + 3) / 4, 32);
        for (int c = grid.column * 4; c < part.channels; c += grid.columns * 4)
            for (int row = grid.row; row < work.count; row += grid.rows) {
                const float* const from =
                    latents + static_cast<std::int64_t>(work.base + row) * work.item.latent_stride + c;
                float x[4];
                for (int j = 0; j < 4; ++j) x[j] = c + j < part.channels ? from[j] : 0.0f;
                put_numbers<4>(work.rows.at(row, part.column + c), x);
            }
    });
}

/// Tokens that need no more than to be rounded to fp16, if that.
template <class Of, class Block>
KVPLANE_DEVICE_INLINED void load_input(const Block& block, const TileWork<Of>& work,
                                       const SegmentPart& part) {
    const int begin = work.begin(), fresh = work.fresh(), end = work.end();
    block.run([&](int thread, int threads) {
        const InputPart input{work.side.input,
                              work.first() + work.base,
                              work.item.head,
                              part.channel,
                              part.channels,
                              fresh,
                              end};
        float most = 0.0f;
        with_type(work.side.input, [&](auto type) {
            most = each_eight<decltype(type)::count>(input, thread, threads, [&](int c) {
                return [&work, column = part.column + c](int row, const auto& eight) {
                    typename Of::Value* const to = work.rows.at(row, column);
                    if constexpr (Of::in_halves) {
                        *reinterpret_cast<FourWords*>(to) = eight.halves();
                    } else {
                        float x[8];
                        eight.numbers(x);
                        put_numbers<8>(to, x);
                    }
                };
            });
        });
        raise_together(&work.found->largest[work.item.side], most == most ? bits_of(most) : 0u);
        if (!(most <= work.side.largest))
            find_bad(input, work.side.largest, &work.found->bad[work.item.side]);
        if (fresh == 0 && end == work.count) return;
        const int eights = (part.channels + 7) / 8;
        const ThreadGrid grid(thread, threads, eights, 32);
        KVPLANE_KEEP_ROLLED
        for (int row = grid.row; row < work.count; row += grid.rows) {
            if (row >= fresh && row < end) continue;
            KVPLANE_KEEP_ROLLED
            for (int e = grid.column; e < eights; e += grid.columns) {
                typename Of::Value* const to = work.rows.at(row, part.column + e * 8);
                const int token = work.base + row;
                const float nothing[8] = {};
                if (row >= begin && row < fresh)
                    load_recent_eight(work.side, work.a.sources.recent[work.tile_index][token / recent_rows],
                                      work.item.head, token, part.channel + e * 8, to);
                else
                    put_numbers<8>(to, nothing);
            }
        }
    });
}

/// Tokens that are rotated, or rounded to 8 bits, on the way: all channels of the head, and of these those of
/// the item's parts.
template <class Of, class Block>
KVPLANE_DEVICE_INLINED void load_staged(const Block& block, const TileWork<Of>& work) {
    float* const staging = work.template part<float>(work.plan.staging);
    const int step_rows = work.plan.step_rows < work.count ? work.plan.step_rows : work.count,
              pitch = work.plan.staging_pitch;
    for (int step = 0; step < work.count; step += step_rows) {
        const int low = work.base + step, begin = work.a.from > low ? work.a.from - low : 0,
                  end = work.a.to - low < step_rows ? work.a.to - low : step_rows;
        float* const staged = work.plan.in_place ? staging + step * pitch : staging;
        if (begin < end)
            stage_tokens(block, work.side, work.item.head, work.first(), low, begin, end,
                         work.a.sources.recent[work.tile_index], staged, pitch,
                         work.template part<float>(work.plan.partial),
                         work.template part<float>(work.plan.row_grids), &work.found->bad[work.item.side],
                         &work.found->largest[work.item.side]);
        if (work.plan.in_place && begin == 0 && end == step_rows) continue;
        block.run([&](int thread, int threads) {
            each_part(work.a.segments, work.item, [&](const SegmentPart& part) {
                const ThreadGrid grid(thread, threads, (part.channels + 3) / 4, 32);
                for (int row = grid.row; row < step_rows; row += grid.rows) {
                    const bool given = row >= begin && row < end;
                    if (given && work.plan.in_place) continue;
                    for (int c = grid.column * 4; c < part.channels; c += grid.columns * 4) {
                        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                        if (given && part.channel % 4 == 0)
                            load_numbers<4>(staged + row * pitch + place_of(part.channel + c), x);
                        else if (given)
                            for (int j = 0; j < 4; ++j)
                                if (c + j < part.channels)
                                    x[j] = staged[row * pitch + place_of(part.channel + c + j)];
                        put_numbers<4>(work.rows.at(step + row, part.column + c), x);
                    }
                }
            });
        });
    }
}

/// Takes the tokens of the window to shared memory; those that are not written become zero.
template <class Of, class Block>
KVPLANE_DEVICE_INLINED void load_tokens(const Block& block, const TileWork<Of>& work) {
    if constexpr (Of::has_staged && !Of::in_halves)
        if (!Of::any || work.item.staged) return load_staged(block, work);
    each_part(work.a.segments, work.item, [&](const SegmentPart& part) {
        if (part.segment.bits == 0) return;
        if constexpr (Of::has_latents && !Of::in_halves)
            if (!Of::any || work.item.latent_at >= 0) return load_latents(block, work, part);
        if constexpr (Of::has_input) load_input(block, work, part);
    });
}

}  // namespace kvplane::cuda::detail
