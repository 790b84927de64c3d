// kvplane/cuda/half_planes.hpp: planes of fp16 numbers: their bytes, put in the order of a tile.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/block.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/input.hpp"
#include "kvplane/cuda/numbers.hpp"
#include "kvplane/cuda/tile_planes.hpp"
#include "kvplane/cuda/tile_rows.hpp"
#include "kvplane/cuda/tile_work.hpp"

namespace kvplane::cuda::detail {

/// Eights of resident rows, as fp16 bits. What a source gives of rows that are not written is anything.
template <class Of>
struct ResidentHalves {
    const TileWork<Of>& work;
    int column;  ///< of the part

    template <int rows>
    KVPLANE_DEVICE void load(int row, int c, FourWords (&halves)[rows]) const {
        KVPLANE_UNROLL
        for (int t = 0; t < rows; ++t) {
            const typename Of::Value* const from = work.rows.at(row + t, column + c);
            if constexpr (Of::in_halves) {
                halves[t] = *reinterpret_cast<const FourWords*>(from);
            } else {
                float x[8];
                load_numbers<8>(from, x);
                KVPLANE_UNROLL
                for (int i = 0; i < 4; ++i) halves[t].at[i] = nearest_halves(x[2 * i], x[2 * i + 1]);
            }
        }
    }
};
/// The same of tokens where they are given, as fp16 in eights. Those outside the input's are zero.
struct InputHalves {
    InputPart part;

    Largest<input_half> largest{};

    template <int rows>
    KVPLANE_DEVICE void load(int row, int c, FourWords (&halves)[rows]) {
        const int channels = part.channel + part.count;
        Eight<input_half> eights[rows];
        const std::int64_t token = part.first + row;
        if (row >= part.begin && row + rows <= part.end) {
            KVPLANE_UNROLL
            for (int t = 0; t < rows; ++t)
                eights[t].load(part.input, token + t, part.head, part.channel + c, channels);
        } else {
            KVPLANE_UNROLL
            for (int t = 0; t < rows; ++t) {
                eights[t].clear();
                if (row + t >= part.begin && row + t < part.end)
                    eights[t].load(part.input, token + t, part.head, part.channel + c, channels);
            }
        }
        KVPLANE_UNROLL
        for (int t = 0; t < rows; ++t) {
            largest.note(eights[t]);
            halves[t] = eights[t].words[0];
        }
    }
};

/// Keeps the first `left` of eight fp16 numbers, and makes the others zero.
KVPLANE_DEVICE inline void keep_halves(FourWords& halves, int left) {
    KVPLANE_UNROLL
    for (int i = 0; i < 4; ++i) halves.at[i] &= left >= 2 * i + 2 ? ~0u : left == 2 * i + 1 ? 0xFFFFu : 0u;
}

/// Where the planes of a segment of fp16 numbers are.
struct HalfPlanes {
    std::byte *high, *middle, *low;

    KVPLANE_DEVICE HalfPlanes(const Segment& segment, std::byte* tile)
        : high(tile + segment.plane_at[0]),
          middle(tile + segment.plane_at[1]),
          low(tile + segment.plane_at[2]) {}
};

/// Planes of keys, four tokens times eight channels at a time, and the largest magnitudes of each channel and
/// four tokens: [four tokens][channel].
template <class Of, class Source>
KVPLANE_DEVICE_INLINED void pack_half_keys(const TileWork<Of>& work, const SegmentPart& part, Source& source,
                                           int thread, int threads) {
    constexpr int tokens = 4;
    auto* const magnitudes = work.template part<std::uint16_t>(work.plan.partial);
    const int pitch = whole_units_of(part.channels);
    const HalfPlanes planes(part.segment, work.tile);
    const ThreadGrid grid(thread, threads, (part.channels + 7) / 8, 8);
    for (int c = grid.column * 8; c < part.channels; c += grid.columns * 8)
        for (int row = grid.row * tokens; row < work.count; row += grid.rows * tokens) {
            FourWords halves[tokens], most{};
            source.load(row, c, halves);
            const int left = part.channels - c;
            if (left < 8 || !work.covers(work.base + row, tokens)) {
                KVPLANE_UNROLL
                for (int t = 0; t < tokens; ++t)
                    keep_halves(halves[t], work.covers(work.base + row + t) ? left : 0);
            }
            PackedCodes<tokens, 8> high, low;
            KVPLANE_UNROLL
            for (int t = 0; t < tokens; ++t) {
                KVPLANE_UNROLL
                for (int i = 0; i < 2; ++i) {
                    low.four[t][i] = picked(halves[t].at[2 * i], halves[t].at[2 * i + 1], 0x6420);
                    high.four[t][i] = picked(halves[t].at[2 * i], halves[t].at[2 * i + 1], 0x7531);
                }
                KVPLANE_UNROLL
                for (int i = 0; i < 4; ++i)
                    most.at[i] = greater_words(most.at[i], halves[t].at[i] & 0x7FFF7FFFu);
            }
            *reinterpret_cast<FourWords*>(magnitudes + row / tokens * pitch + c) = most;
            pack_keys<8>(work, part, planes.high, 0, high, work.base + row, c);
            pack_keys<4>(work, part, planes.middle, 4, low, work.base + row, c);
            pack_keys<4>(work, part, planes.low, 0, low, work.base + row, c);
        }
}
/// The exponents of the largest magnitudes of channels.
template <class Of, class Block>
KVPLANE_DEVICE void store_exponents(const Block& block, const TileWork<Of>& work, const SegmentPart& part) {
    const auto* const magnitudes = work.template part<std::uint16_t>(work.plan.partial);
    const int pitch = whole_units_of(part.channels);
    block.run([&](int thread, int threads) {
        for (int c = thread; c < part.channels; c += threads) {
            std::uint32_t most = 0;
            KVPLANE_UNROLL_FEW
            for (int row = 0; row < work.count / 4; ++row) {
                const std::uint32_t bits = magnitudes[row * pitch + c];
                most = most < bits ? bits : most;
            }
            std::byte& exponent = work.tile[part.segment.exponent_at + part.first + c];
            const auto found = static_cast<std::byte>(most >> 10);
            const bool starts =
                work.a.fresh ? work.base == work.item.first_row : work.a.from == 0 && work.base == 0;
            if (starts || exponent < found) exponent = found;
            // A list of an odd number of exponents is one byte longer.
            if (starts && part.first + c + 1 == part.segment.channels && part.segment.channels % 2 == 1)
                work.tile[part.segment.exponent_at + part.segment.channels] = std::byte{0};
        }
    });
}

/// Planes of values, eight tokens times eight channels at a time.
template <class Of, class Source>
KVPLANE_DEVICE_INLINED void pack_half_values(const TileWork<Of>& work, const SegmentPart& part,
                                             Source& source, int thread, int threads) {
    constexpr int tokens = 8;
    const int channels = (part.channels + 15) / 16 * 16;
    const HalfPlanes planes(part.segment, work.tile);
    const ThreadGrid grid(thread, threads, channels / 8, 32);
    for (int c = grid.column * 8; c < channels; c += grid.columns * 8)
        for (int row = grid.row * tokens; row < work.count; row += grid.rows * tokens) {
            FourWords halves[tokens] = {};
            const int left = part.channels - c;
            if (left > 0) source.load(row, c, halves);
            if (left < 8 || !work.covers(work.base + row, tokens)) {
                KVPLANE_UNROLL
                for (int t = 0; t < tokens; ++t)
                    keep_halves(halves[t], work.covers(work.base + row + t) ? left : 0);
            }
            KVPLANE_UNROLL
            for (int k = 0; k < 2; ++k) {  // four channels
                PackedCodes<4, 8> high, low;
                KVPLANE_UNROLL
                for (int q = 0; q < 2; ++q) {  // four tokens
                    KVPLANE_UNROLL
                    for (int i = 0; i < 2; ++i) {  // two channels, a word of each token
                        const auto word = [&](int t) { return halves[4 * q + t].at[2 * k + i]; };
                        const auto both = [&](std::uint32_t which, std::uint32_t& first,
                                              std::uint32_t& second) {
                            const std::uint32_t a = picked(word(0), word(1), which),
                                                b = picked(word(2), word(3), which);
                            first = picked(a, b, 0x5410);
                            second = picked(a, b, 0x7632);
                        };
                        both(0x6240, low.four[2 * i][q], low.four[2 * i + 1][q]);
                        both(0x7351, high.four[2 * i][q], high.four[2 * i + 1][q]);
                    }
                }
                pack_values<8>(work, part, planes.high, 0, high, work.base + row, c + 4 * k);
                pack_values<4>(work, part, planes.middle, 4, low, work.base + row, c + 4 * k);
                pack_values<4>(work, part, planes.low, 0, low, work.base + row, c + 4 * k);
            }
        }
}

/// Planes of a part of a segment that is fp16, of the resident rows, or of the input itself where `direct`.
template <class Of, class Block>
KVPLANE_DEVICE_INLINED void encode_halves(const Block& block, const TileWork<Of>& work,
                                          const SegmentPart& part, bool direct) {
    const bool keys = work.a.formats[work.item.format].keys;
    const auto pack = [&](auto& source, int thread, int threads) {
        if (keys)
            pack_half_keys(work, part, source, thread, threads);
        else
            pack_half_values(work, part, source, thread, threads);
    };
    block.run([&](int thread, int threads) {
        if constexpr (Of::in_halves)
            if (direct) {
                InputHalves source{{work.side.input, work.first() + work.base, work.item.head, part.channel,
                                    part.channels, work.begin(), work.end()}};
                pack(source, thread, threads);
                const float most = source.largest.magnitude();
                raise_together(&work.found->largest[work.item.side], most == most ? bits_of(most) : 0u);
                if (!(most <= work.side.largest))
                    find_bad(source.part, work.side.largest, &work.found->bad[work.item.side]);
                return;
            }
        ResidentHalves<Of> source{work, part.column};
        pack(source, thread, threads);
    });
    if (keys) store_exponents(block, work, part);
}

}  // namespace kvplane::cuda::detail
