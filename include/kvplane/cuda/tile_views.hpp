// kvplane/cuda/tile_views.hpp: tiles as kernels take them: plain numbers, made from TileFormat.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/error.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane::cuda {

/// Channels of one width, and where their planes and grids stand in a tile.
struct SegmentView {
    std::int32_t first_channel, channels;
    std::int32_t bits;    ///< that are read of each code: 1 to 8; 16: fp16, however many are read
    std::int32_t planes;  ///< that are read
    std::int32_t plane_at[PlaneSplit::max_planes];
    std::int32_t step_at, lower_at;  ///< lower_at -1: there are none; step_at of fp16 keys: their exponents
    std::int32_t step_bytes;         ///< 2, or 1 where the upper byte of an fp16 number is stored
    float step_scale;                ///< 2^(bits that are not read)
    float lower_in_steps;            ///< where there are no lowers: of the step that is read

    bool operator==(const SegmentView&) const = default;
};

/// A tile of keys.
struct KeyTileView {
    static constexpr int max_segments = 8, max_rounds = 16;
    /// Up to 32 channels of a segment, which one round of products takes.
    struct alignas(16) Round {
        std::int32_t first_channel, channels;
        std::int32_t step_at,
            lower_at;              ///< of the first channel and group of tokens; lower_at -1: there are none
        std::int32_t group_bytes;  ///< from the grids of a group to those of the next
        float step_scale;          ///< 2^(bits that are not read)
        float middle;              ///< of all codes, in steps beyond the lower; without lowers, beyond 0
        std::int16_t segment, number;  ///< number: among those of the segment
    };
    std::int32_t segments;
    std::int32_t groups;  ///< of tokens, each with grids of its own: 1, 2 or 4
    std::int32_t bytes;   ///< from the tile's begin on that are read
    std::int32_t rounds;
    SegmentView segment[max_segments];
    Round round[max_rounds];

    /// Bytes from row to row of the factors that a warp keeps of eight rows where widths are known at run
    /// time: 16 bits each, and so many that rows begin in different banks of memory.
    KVPLANE_DEVICE std::uint32_t factor_stride() const {
        return static_cast<std::uint32_t>(rounds) * 64u + 16u;
    }
};

/// A tile of values.
struct ValueTileView {
    static constexpr int most_runs = 4;
    /// Bytes from row to row of weights in the order of a tile's rows.
    static constexpr std::uint32_t weight_stride = (128 + 4) * 4;
    /// What a warp keeps where tokens have different widths: weights of eight query rows, and where tokens
    /// stand.
    static constexpr std::uint32_t run_bytes = 8 * weight_stride + 128;

    /// Rows of one width.
    struct Run {
        SegmentView segment;
        std::int32_t first_row, rows;
    };

    SegmentView all;          ///< where runs is 0
    std::int32_t run_blocks;  ///< blocks of 32 channels that share a grid
    std::int32_t bytes;       ///< from the tile's begin on that are read
    std::int32_t runs;        ///< of tokens; 0: all have one width
    std::int32_t run_planes;  ///< that say which run a token is in, at the tile's begin
    Run run[most_runs];
};

/// Rows of one side in a page of tokens outside tiles (cache/token_rows.hpp).
struct TokenRowsView {
    bool half;              ///< fp16; otherwise bytes with a step a row
    std::int32_t capacity;  ///< rows a head
    std::int32_t row_bytes;
    std::int64_t rows_at, steps_at;  ///< of head 0, in the page
};
struct OutsideView {
    TokenRowsView keys, values;
};

enum class Rotation : std::uint8_t { none, all, by_tile };

namespace detail {

/// How many planes are read of a segment. Throws Error (option) for none.
inline int planes_read(const TileFormat::Placed& placed, int most) {
    require(most >= 1, ErrorCode::option, "cuda: ", most, " planes to be read, expected at least 1");
    return std::min(most, placed.split.count);
}

/// The first `planes` planes of a segment.
inline SegmentView segment_view(const TileFormat::Placed& placed, int planes) {
    SegmentView view{};
    view.first_channel = static_cast<std::int32_t>(placed.first_channel);
    view.channels = static_cast<std::int32_t>(placed.channels);
    view.bits = placed.is_half() ? placed.bits : placed.split.prefix_bits(planes);
    view.planes = planes;
    for (int p = 0; p < planes; ++p)
        view.plane_at[p] = static_cast<std::int32_t>(placed.plane_at[static_cast<std::size_t>(p)]);
    if (!placed.has_grids()) {
        view.step_at = static_cast<std::int32_t>(placed.exponent_at);
        return view;
    }
    const float unread = power_of_two(placed.bits - view.bits);
    view.step_at = static_cast<std::int32_t>(placed.step_at);
    view.lower_at = has_lower(placed.scheme) ? static_cast<std::int32_t>(placed.lower_at) : -1;
    view.step_bytes = step_bytes(placed.scheme);
    view.step_scale = unread;
    view.lower_in_steps =
        has_lower(placed.scheme) ? 0.0f : lower_in_steps(placed.scheme, placed.bits) / unread;
    return view;
}

/// Where the planes of a segment that are read end.
inline Index read_end(const TileFormat& format, const TileFormat::Placed& placed, int planes) {
    Index end = format.grid_bytes();
    for (int p = 0; p < planes; ++p)
        end = std::max(
            end, placed.plane_at[static_cast<std::size_t>(p)] + format.plane_bytes(placed, placed.split[p]));
    return end;
}

}  // namespace detail

/// planes: how many planes of each segment are read at most. Throws Error (option) for what kernels do not
/// read: grids by token, more than 8 segments.
inline KeyTileView key_tile_view(const TileFormat& format, int planes = PlaneSplit::max_planes) {
    KeyTileView view{};
    Index end = 0;
    for (const TileFormat::Placed& placed : format.segments()) {
        if (placed.bits == 0) continue;
        require(view.segments < KeyTileView::max_segments, ErrorCode::option, "cuda: keys in more than ",
                KeyTileView::max_segments, " widths");
        require(placed.is_half() || format.rule().granularity == Granularity::per_channel, ErrorCode::option,
                "cuda: grids of keys ", name(format.rule().granularity), ", expected per channel");
        require(!placed.has_grids() || step_bytes(placed.scheme) == 2, ErrorCode::option,
                "cuda: grids of keys of the scheme ", name(placed.scheme), ", expected one with fp16 steps");
        const int read = detail::planes_read(placed, planes);
        SegmentView& segment = view.segment[view.segments];
        segment = detail::segment_view(placed, read);
        for (std::int32_t first = 0; first < segment.channels; first += 32) {
            require(view.rounds < KeyTileView::max_rounds, ErrorCode::option, "cuda: keys of more than ",
                    KeyTileView::max_rounds, " times 32 channels of one width");
            const std::int32_t channels = std::min(segment.channels - first, 32);
            view.round[view.rounds++] = {.first_channel = segment.first_channel + first,
                                         .channels = channels,
                                         .step_at = segment.step_at + 2 * first,
                                         .lower_at = segment.lower_at < 0 ? -1 : segment.lower_at + 2 * first,
                                         .group_bytes = 2 * segment.channels,
                                         .step_scale = segment.step_scale,
                                         .middle = 0.5f * power_of_two(segment.bits) +
                                                   (segment.lower_at < 0 ? segment.lower_in_steps : 0.0f),
                                         .segment = static_cast<std::int16_t>(view.segments),
                                         .number = static_cast<std::int16_t>(first / 32)};
        }
        ++view.segments;
        end = std::max(end, detail::read_end(format, placed, read));
    }
    view.groups =
        format.grids_span_tokens() ? static_cast<std::int32_t>(tile_tokens / format.rule().group) : 1;
    view.bytes = static_cast<std::int32_t>(end);
    return view;
}

/// Throws Error (option) for what kernels do not read: grids with negative steps, grids over other runs of
/// channels than multiples of 32 or the whole head; of tokens of different widths, than the whole head.
inline ValueTileView value_tile_view(const TileFormat& format, int planes = PlaneSplit::max_planes) {
    const Index group = std::min(format.rule().group, format.channels());
    const auto require_grids = [&](const TileFormat::Placed& placed) {
        require(placed.bits > 0, ErrorCode::option, "cuda: values of no bits, expected 1 to 8 or 16");
        require(placed.is_half() || (format.rule().granularity == Granularity::per_token &&
                                     (group % 32 == 0 || group == format.channels())),
                ErrorCode::option, "cuda: grids of values ", name(format.rule().granularity), " over ", group,
                ", expected per token over a multiple of 32 channels or the whole head");
        require(
            placed.scheme != Scheme::full_range, ErrorCode::option,
            "cuda: grids of values of the scheme full_range, whose steps may be negative; expected another");
    };
    ValueTileView view{};
    view.run_blocks = static_cast<std::int32_t>((group + 31) / 32);
    Index end = 0;
    if (format.by_token()) {
        require(group == format.channels(), ErrorCode::option, "cuda: grids over ", group,
                " channels of values whose tokens have different widths, expected the whole head");
        view.run_planes = format.run_planes();
        for (const TileFormat::Placed& placed : format.segments()) {
            require_grids(placed);
            const int read = detail::planes_read(placed, planes);
            view.run[view.runs++] = {detail::segment_view(placed, read),
                                     static_cast<std::int32_t>(placed.first_row),
                                     static_cast<std::int32_t>(placed.rows)};
            end = std::max(end, detail::read_end(format, placed, read));
        }
    } else {
        require(format.segments().size() == 1, ErrorCode::option, "cuda: values in ",
                format.segments().size(), " segments, expected one");
        const TileFormat::Placed& placed = format.segments()[0];
        require_grids(placed);
        const int read = detail::planes_read(placed, planes);
        view.all = detail::segment_view(placed, read);
        end = detail::read_end(format, placed, read);
    }
    view.bytes = static_cast<std::int32_t>(end);
    return view;
}

/// The first planes of keys and of values, by how many: what is read of a tile can be decided tile by tile.
struct PlanePrefixes {
    KeyTileView keys[PlaneSplit::max_planes];
    ValueTileView values[PlaneSplit::max_planes];
    std::int32_t key_planes, value_planes;  ///< that there are; 0: keys of several widths
    /// Bits of an element by planes read.
    std::int32_t key_bits[PlaneSplit::max_planes + 1], value_bits[PlaneSplit::max_planes + 1];
};

/// Of at most so many planes of each side. Throws as key_tile_view() and value_tile_view().
inline PlanePrefixes plane_prefixes(const TileFormat& keys, const TileFormat& values,
                                    int key_planes = PlaneSplit::max_planes,
                                    int value_planes = PlaneSplit::max_planes) {
    PlanePrefixes to{};
    if (keys.segments().size() != 1 || values.by_token()) return to;
    const PlaneSplit &of_keys = keys.segments()[0].split, &of_values = values.segments()[0].split;
    to.key_planes = std::min(key_planes, of_keys.count);
    to.value_planes = std::min(value_planes, of_values.count);
    for (int p = 1; p <= to.key_planes; ++p) {
        to.keys[p - 1] = key_tile_view(keys, p);
        to.key_bits[p] = of_keys.prefix_bits(p);
    }
    for (int p = 1; p <= to.value_planes; ++p) {
        to.values[p - 1] = value_tile_view(values, p);
        to.value_bits[p] = of_values.prefix_bits(p);
    }
    return to;
}

}  // namespace kvplane::cuda
