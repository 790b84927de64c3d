// kvplane/cuda/tile_work.hpp: what a block that encodes part of a tile works on, and where it keeps what.
//
// Shared memory: the rows of the tokens that share grids, as fp16 or floats; their grids; partial results. A
// segment's channels begin at a multiple of 32 columns there, whatever channel it begins with, so that eight
// can be loaded at once. What lies between the end of a segment and the next is anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/block.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/input.hpp"
#include "kvplane/cuda/token_rows.hpp"

namespace kvplane::cuda::detail {

/// The part of a segment that a block encodes.
struct SegmentPart {
    const Segment& segment;
    int first, channels;  ///< within the segment
    int column;           ///< of the block's rows
    int channel;          ///< of the tile
    int segment_channels;
};

/// What an item has of segment s; its columns begin at `column`.
KVPLANE_DEVICE inline SegmentPart part_of(const Segment* segments, const Item& item, int s, int column) {
    const Segment& segment = segments[s];
    const int of_item = item.first_channel + item.channels,
              of_segment = segment.first_channel + segment.channels,
              begin = segment.first_channel > item.first_channel ? segment.first_channel : item.first_channel,
              end = of_item < of_segment ? of_item : of_segment;
    return {segment, begin - segment.first_channel, end - begin, column, begin, segment.channels};
}
/// body(part) for every segment that an item has channels of.
template <class Body>
KVPLANE_DEVICE_INLINED void each_part(const Segment* segments, const Item& item, const Body& body) {
    int column = 0;
    for (int s = item.first_segment; s < item.first_segment + item.segments; ++s) {
        const SegmentPart part = part_of(segments, item, s, column);
        column += whole_units_of(part.channels);
        body(part);
    }
}

/// The channels of a run of a token.
struct RunOfChannels {
    int first, count;
};
KVPLANE_DEVICE inline RunOfChannels run_of(const Segment& segment, int run) {
    const int first = run * segment.group, left = segment.channels - first;
    return {first, left < segment.group ? left : segment.group};
}

/// Shares of the rows that channels' extremes are found in, and of the channels of a run.
inline constexpr int channel_shares = 16;
KVPLANE_DEVICE inline int run_shares(const Segment& segment) {
    return segment.group % 8 != 0 && segment.runs > 1 ? 1
           : segment.group >= 256                     ? 8
           : segment.group >= 128                     ? 4
           : segment.group >= 64                      ? 2
                                                      : 1;
}
/// Grids without bias that are fitted at a time, by so many threads each.
inline constexpr int most_unbiased = 64, unbiased_shares = 4;

/// Elements from row to row of fp16 numbers: an odd number of eights, so that eights of as many rows meet all
/// banks.
KVPLANE_DEVICE constexpr int half_pitch_of(int columns) {
    return (columns / 8 | 1) * 8;
}

/// Where a block keeps what; in bytes, multiples of 16.
struct SharedPlan {
    int resident, staging, cells, steps, row_grids, found, partial, bytes;
    int pitch, staging_pitch, step_rows;
    int in_place;  ///< whether rows stay where they were staged
};
KVPLANE_DEVICE inline SharedPlan shared_plan(const Item& item, const Segment* segments, int dim) {
    SharedPlan plan{};
    const int rows = item.resident_rows;
    int bytes = 0, columns = 0, grids = 0, partial = 0;
    const auto at_least = [](int& number, int other) { number = number < other ? other : number; };
    each_part(segments, item, [&](const SegmentPart& part) {
        const int channels = whole_units_of(part.channels);
        columns += channels;
        if (part.segment.bits == 16) return at_least(partial, rows / 4 * channels * 2);
        if (part.segment.by_channel) {
            at_least(grids, channels);
            return at_least(partial, 2 * channel_shares * channels * (item.halves ? 2 : 4));
        }
        at_least(grids, rows * part.segment.runs);
        if (part.segment.scheme == Scheme::unbiased)
            return at_least(partial, 2 * most_unbiased * unbiased_shares * 8);
        at_least(partial, 2 * run_shares(part.segment) * rows * part.segment.runs * 4);
    });
    const auto take = [&bytes](int size) {
        const int at = bytes;
        bytes += (size + 15) / 16 * 16;
        return at;
    };
    plan.step_rows = rows < 2 * step_rows ? rows : 2 * step_rows;
    plan.pitch = item.halves ? half_pitch_of(columns) : pitch_of(columns);
    plan.staging_pitch = pitch_of(dim);
    plan.resident = take(rows * plan.pitch * (item.halves ? 2 : 4));
    plan.in_place = item.staged && !item.halves && item.segments == 1 && item.channels == dim;
    plan.staging =
        plan.in_place ? plan.resident : take(item.staged ? plan.step_rows * plan.staging_pitch * 4 : 0);
    plan.cells = take(grids * 8);
    plan.steps = take(grids * 4);
    plan.row_grids = take(item.staged ? row_grids_bytes(plan.step_rows) : 0);
    plan.found = take(static_cast<int>(sizeof(Findings)));
    if (item.staged) at_least(partial, row_parts_bytes(plan.step_rows));
    plan.partial = take(partial);
    plan.bytes = bytes;
    return plan;
}

/// Rows of shared memory, fp16 bits or floats.
template <class Value>
struct Rows;
template <>
struct Rows<std::uint16_t> {
    std::uint16_t* data;
    int pitch;

    KVPLANE_DEVICE std::uint16_t* at(int row, int column) const { return data + row * pitch + column; }
};
template <>
struct Rows<float> {
    float* data;
    int pitch;

    KVPLANE_DEVICE float* at(int row, int column) const { return data + row * pitch + place_of(column); }
};

/// Tiles of a kind, as code is compiled for them: what may be among them, and what rows hold in shared memory.
template <TileKind kind, class Value_>
struct TilesOf {
    using Value = Value_;
    static constexpr bool in_halves = sizeof(Value) == 2, any = kind == tiles_any;
    static constexpr bool has_halves = any || kind == tiles_of_halves, has_codes = kind != tiles_of_halves,
                          has_unbiased = any || kind == tiles_staged,
                          has_latents = any || kind == tiles_of_latents,
                          has_staged = any || kind == tiles_staged,
                          has_input = kind != tiles_staged && kind != tiles_of_latents;
};
/// body(k) for the kind that `kind` is, k.value.
template <class Body>
void with_kind(TileKind kind, const Body& body) {
    with_bits<tiles_any, tiles_of_halves, tiles_of_codes, tiles_staged, tiles_of_latents>(
        kind, [&](auto known) {
            body(std::integral_constant<TileKind, static_cast<TileKind>(decltype(known)::count)>{});
        });
}
template <TileKind kind>
constexpr bool in_halves = kind == tiles_of_halves || kind == tiles_of_codes;

/// What encode_tile() works on.
template <class Of>
struct TileWork {
    const TilesArguments& a;
    const Item& item;
    const Side& side;
    const SharedPlan& plan;
    Rows<typename Of::Value> rows;
    std::byte *tile, *shared;
    int tile_index;
    Findings* found;  ///< of the block
    int base, count;  ///< the rows of the tile that are resident

    template <class T>
    KVPLANE_DEVICE T* part(int at) const {
        return reinterpret_cast<T*>(shared + at);
    }
    KVPLANE_DEVICE TwoFloats* cells() const { return part<TwoFloats>(plan.cells); }
    KVPLANE_DEVICE float* steps() const { return part<float>(plan.steps); }

    /// Token of the input that is the first of the tile; below 0: a recent one is.
    KVPLANE_DEVICE std::int64_t first() const {
        return a.sources.first + static_cast<std::int64_t>(tile_rows) * tile_index;
    }
    KVPLANE_DEVICE bool covers(int token) const { return token >= a.from && token < a.to; }
    KVPLANE_DEVICE bool covers(int token, int tokens) const {
        return token >= a.from && token + tokens <= a.to;
    }
    /// Resident rows [begin, fresh) are recent tokens, [fresh, end) come from the input; others are not
    /// written.
    KVPLANE_DEVICE int begin() const { return a.from > base ? a.from - base : 0; }
    KVPLANE_DEVICE int end() const { return a.to - base < count ? a.to - base : count; }
    KVPLANE_DEVICE int fresh() const {
        const std::int64_t before = -(first() + base);
        return before <= begin() ? begin() : before >= end() ? end() : static_cast<int>(before);
    }
};

}  // namespace kvplane::cuda::detail
