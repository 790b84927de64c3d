// kvplane/storage/impl/narrow.hpp: the functions of storage/narrow.hpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "kvplane/error.hpp"
#include "kvplane/storage/narrow.hpp"
#include "kvplane/storage/planes.hpp"

namespace kvplane {

KVPLANE_FUNCTION std::vector<int> narrower_widths(int bits) {
    require(bits >= 1 && bits <= 8, ErrorCode::option, "narrow: codes of ", bits, " bits, expected 1 to 8");
    const PlaneSplit split = plane_split(bits);
    std::vector<int> widths;
    for (int planes = split.count - 1; planes > 0; --planes) widths.push_back(split.prefix_bits(planes));
    return widths;
}

namespace detail {

KVPLANE_FUNCTION int widest_codes(const TileFormat& format) noexcept {
    int widest = 0;
    bool all_half = true;
    for (const TileFormat::Placed& segment : format.segments()) {
        if (segment.is_half()) continue;
        widest = std::max(widest, segment.bits);
        all_half = false;
    }
    return all_half ? 16 : widest;
}

inline bool can_narrow(const TileFormat& format, int bits) noexcept {
    if (format.by_token()) return bits >= widest_codes(format);
    if (widest_codes(format) == 16) return bits >= 16;
    return std::all_of(format.segments().begin(), format.segments().end(), [&](const TileFormat::Placed& s) {
        return s.is_half() || s.bits <= bits || (prefixes_are_grids(s.scheme) && s.split[0] <= bits);
    });
}
KVPLANE_FUNCTION bool can_narrow(const PageLayout& layout, int key_bits, int value_bits) noexcept {
    return std::all_of(layout.keys.begin(), layout.keys.end(),
                       [&](const TileFormat& keys) { return can_narrow(keys, key_bits); }) &&
           (layout.values_in_keys || can_narrow(layout.values, value_bits));
}

KVPLANE_FUNCTION TileFormat narrowed(const TileFormat& format, int bits) {
    const char* const side = format.side() == TileSide::keys ? "keys" : "values";
    require(widest_codes(format) < 16 || bits >= 16, ErrorCode::option, "narrow: ", side, " in fp16 to ",
            bits, " bits, expected 16: they have no grid that could be coarser");
    if (format.by_token()) {
        require(bits >= widest_codes(format), ErrorCode::option, "narrow: ", side, " of different widths to ",
                bits, " bits, expected ", widest_codes(format), " or more, which leaves them as they are");
        return format;
    }
    std::vector<ChannelSegment> segments;
    for (const TileFormat::Placed& segment : format.segments()) {
        int width = segment.bits;
        if (width > bits && !segment.is_half()) {
            require(prefixes_are_grids(segment.scheme), ErrorCode::option, "narrow: ", side, " of ", width,
                    " bits to ", bits, ", but their grids are ", name(segment.scheme),
                    ", of which no prefix of the planes is one");
            const std::vector<int> widths = narrower_widths(width);
            const auto found = std::find_if(widths.begin(), widths.end(), [&](int w) { return w <= bits; });
            require(found != widths.end(), ErrorCode::option, "narrow: ", side, " of ", width, " bits to ",
                    bits, ", expected at least ", widths.empty() ? width : widths.back(),
                    ", the width of their first plane");
            width = *found;
        }
        segments.push_back({segment.channels, width, segment.scheme});
    }
    return TileFormat(format.side(), segments, format.rule());
}

KVPLANE_FUNCTION PageLayout narrowed(const PageLayout& layout, int key_bits, int value_bits) {
    std::vector<TileFormat> keys;
    for (const TileFormat& format : layout.keys) keys.push_back(narrowed(format, key_bits));
    if (layout.values_in_keys) return page_layout_in_keys(keys[0], layout.subspaces());
    PageLayout narrow = page_layout(std::move(keys), layout.subspaces(), narrowed(layout.values, value_bits),
                                    static_cast<Index>(layout.value_at.size()));
    return layout.rotates_by_tile() ? with_rotation_by_tile(std::move(narrow)) : narrow;
}

inline void narrow_segment(const TileFormat::Placed& wide, const std::byte* from,
                           const TileFormat::Placed& narrow, std::byte* to,
                           const TileFormat& format) noexcept {
    if (wide.is_half() && format.side() == TileSide::keys)
        std::memcpy(to + narrow.exponent_at, from + wide.exponent_at,
                    static_cast<std::size_t>(wide.channels));
    // Exact: a step is at most a cell of fp16's range, and what is multiplied up loses no bit.
    const float by = power_of_two(wide.bits - narrow.bits);
    Eigen::half room;
    for (Index g = 0; g < wide.grids; ++g) {
        const auto step =
            static_cast<Eigen::half>(static_cast<float>(*steps_of(wide, from, g, 1, &room)) * by);
        std::byte* const at = to + narrow.step_at + g * step_bytes(narrow.scheme);
        if (step_bytes(narrow.scheme) == 1)
            *at = static_cast<std::byte>(step_byte(static_cast<float>(step)));
        else
            std::memcpy(at, &step, sizeof step);
    }
    if (has_lower(wide.scheme))
        std::memcpy(to + narrow.lower_at, from + wide.lower_at, static_cast<std::size_t>(2 * wide.grids));
    for (int p = 0; p < narrow.split.count; ++p)
        std::memcpy(to + narrow.plane_at[static_cast<std::size_t>(p)],
                    from + wide.plane_at[static_cast<std::size_t>(p)],
                    static_cast<std::size_t>(format.plane_bytes(narrow, narrow.split[p])));
}
inline void narrow_tile(const TileFormat& wide, const std::byte* from, const TileFormat& narrow,
                        std::byte* to) noexcept {
    if (wide.by_token()) {
        std::memcpy(to, from, static_cast<std::size_t>(wide.bytes()));
        return;
    }
    for (std::size_t s = 0; s < wide.segments().size(); ++s)
        narrow_segment(wide.segments()[s], from, narrow.segments()[s], to, narrow);
}

KVPLANE_FUNCTION void narrow_page(const PageLayout& wide, const std::byte* from, const PageLayout& narrow,
                                  std::byte* to) noexcept {
    for (Index s = 0; s < wide.subspaces(); ++s) {
        const auto at = static_cast<std::size_t>(s);
        narrow_tile(wide.key_format(s), from + wide.key_at[at], narrow.key_format(s), to + narrow.key_at[at]);
    }
    for (std::size_t head = 0; head < wide.value_at.size() && !wide.values_in_keys; ++head)
        narrow_tile(wide.values, from + wide.value_at[head], narrow.values, to + narrow.value_at[head]);
    if (wide.rotates_by_tile())
        std::copy_n(from + wide.rotated_at, wide.value_at.size(), to + narrow.rotated_at);
}

}  // namespace detail
}  // namespace kvplane
