// tests/storage/tile_support.hpp: the layout of tile_format.hpp told again, in the plainest way, and the
// formats that the tests of tiles try.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "kvplane/storage/tile_format.hpp"
#include "test_support.hpp"

namespace kvplane_test::tiles {

using kvplane::ChannelSegment;
using kvplane::Granularity;
using kvplane::Grid;
using kvplane::GridRule;
using kvplane::Index;
using kvplane::Scheme;
using kvplane::TileFormat;
using kvplane::TileSide;

/// Exactly one tile, so that a sanitizer sees what is read or written beyond it.
using Tile = std::vector<std::byte, Eigen::aligned_allocator<std::byte>>;
using Segments = std::vector<ChannelSegment>;

// -- The layout, told again -------------------------------------------------------------------------------

struct DocumentedSegment {
    Index first_channel, channels;
    int bits;
    Scheme scheme;
    std::vector<int> planes;  ///< widths, most significant first
    Index grids, step_at, lower_at;
    std::vector<Index> plane_at;
    Index exponent_at = 0;  ///< of the largest magnitudes of fp16 keys
};

/// Where everything stands, from the head comment of tile_format.hpp.
struct DocumentedTile {
    TileSide side;
    GridRule rule;
    std::vector<DocumentedSegment> segments;
    Index bytes = 0, channels = 0;

    DocumentedTile(TileSide tile_side, const Segments& of_segments, const GridRule& grid_rule)
        : side(tile_side), rule(grid_rule) {
        const std::vector<std::vector<int>> planes{{},     {1},    {2},       {2, 1}, {4},
                                                   {4, 1}, {4, 2}, {4, 2, 1}, {4, 4}};
        for (const ChannelSegment& segment : of_segments) {
            const Index size = segment.channels;
            const int bits = segment.bits;
            DocumentedSegment s{channels, size, bits, segment.scheme.value_or(rule.scheme), {}, 0, 0,
                                0,        {},   0};
            s.planes = bits == 16 ? std::vector<int>{8, 4, 4} : planes[static_cast<std::size_t>(bits)];
            if (bits >= 1 && bits <= 8) {
                s.grids =
                    rule.granularity == Granularity::per_channel ? 128 / rule.group * size : runs(size) * 128;
                s.step_at = take(step_bytes(s) * s.grids);
                if (has_lower(s)) s.lower_at = take(2 * s.grids);
            }
            if (bits == 16 && side == TileSide::keys) s.exponent_at = take((size + 1) / 2 * 2);
            channels += size;
            segments.push_back(s);
        }
        bytes = (bytes + 63) / 64 * 64;
        for (DocumentedSegment& s : segments)
            for (const int width : s.planes) s.plane_at.push_back(take(plane_bytes(s.channels, width)));
    }

    static Index step_bytes(const DocumentedSegment& s) { return s.scheme == Scheme::unbiased ? 1 : 2; }
    static bool has_lower(const DocumentedSegment& s) {
        return s.scheme == Scheme::cell || s.scheme == Scheme::min_max;
    }
    Index runs(Index size) const { return (size + rule.group - 1) / rule.group; }
    Index take(Index size) {
        const Index at = bytes;
        bytes += size;
        return at;
    }
    Index plane_bytes(Index size, int width) const {
        const Index per_unit = 32 / width;
        if (side == TileSide::keys) return 128 / 16 * ((size + per_unit - 1) / per_unit) * 64;
        return (size + 15) / 16 * (128 / per_unit) * 64;
    }

    /// Byte of a plane, and bit in it, at which the code of (token, channel) begins.
    std::pair<Index, int> place(Index size, int width, Index token, Index channel) const {
        const Index per_unit = 32 / width;
        const bool keys = side == TileSide::keys;
        const Index lane = keys ? token % 16 : channel % 16, along = keys ? channel : token;
        const Index units_along = keys ? (size + per_unit - 1) / per_unit : 128 / per_unit;
        const Index unit = (keys ? token : channel) / 16 * units_along + along / per_unit;
        const Index i = along % per_unit / 4, j = along % 4;
        return {unit * 64 + lane * 4 + j, static_cast<int>(i) * width};
    }
    /// The first planes of a code, together.
    int code(const Tile& tile, std::size_t segment, Index token, Index channel, int planes) const {
        const DocumentedSegment& s = segments[segment];
        int together = 0;
        for (int p = 0; p < planes; ++p) {
            const int width = s.planes[static_cast<std::size_t>(p)];
            const auto [byte, bit] = place(s.channels, width, token, channel);
            const Index at = s.plane_at[static_cast<std::size_t>(p)] + byte;
            const int plane = std::to_integer<int>(tile[static_cast<std::size_t>(at)]) >> bit;
            together = together << width | (plane & ((1 << width) - 1));
        }
        return together;
    }
    int code(const Tile& tile, std::size_t segment, Index token, Index channel) const {
        return code(tile, segment, token, channel, static_cast<int>(segments[segment].planes.size()));
    }
    Grid grid(const Tile& tile, std::size_t segment, Index token, Index channel) const {
        const DocumentedSegment& s = segments[segment];
        const Index g = rule.granularity == Granularity::per_channel
                            ? token / rule.group * s.channels + channel
                            : channel / rule.group * 128 + token;
        const auto half_at = [&](Index at) {
            const auto low = std::to_integer<int>(tile[static_cast<std::size_t>(at + 2 * g)]);
            const auto high = std::to_integer<int>(tile[static_cast<std::size_t>(at + 2 * g + 1)]);
            return static_cast<float>(
                Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(high << 8 | low)));
        };
        Grid stored{0.0f, 0.0f, s.bits};
        if (s.scheme == Scheme::unbiased) {  // 5 bits of exponent, 3 of fraction
            const int byte = std::to_integer<int>(tile[static_cast<std::size_t>(s.step_at + g)]);
            const int exponent = byte >> 3, fraction = byte & 7;
            stored.step = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -17)
                                        : std::ldexp(static_cast<float>(8 + fraction), exponent - 18);
            stored.lower = -stored.step * std::ldexp(0.5f, s.bits);
            return stored;
        }
        stored.step = half_at(s.step_at);
        stored.lower = has_lower(s) ? half_at(s.lower_at) : -stored.step * (std::ldexp(0.5f, s.bits) + 0.5f);
        return stored;
    }
};

// -- Formats to try ---------------------------------------------------------------------------------------

struct Case {
    TileSide side;
    Segments segments;
    GridRule rule;

    TileFormat format() const { return TileFormat(side, segments, rule); }
    DocumentedTile documented() const { return DocumentedTile(side, segments, rule); }
    Index channels() const {
        Index sum = 0;
        for (const auto& segment : segments) sum += segment.channels;
        return sum;
    }
    std::string text() const {
        std::ostringstream text;
        text << (side == TileSide::keys ? "keys" : "values");
        for (const auto& segment : segments) {
            text << ' ' << segment.channels << '@' << segment.bits;
            if (segment.scheme) text << ' ' << name(*segment.scheme);
        }
        text << ", " << name(rule.granularity) << ' ' << rule.group << ", " << name(rule.scheme);
        return text.str();
    }
};

inline std::vector<GridRule> all_rules(const std::vector<Scheme>& schemes = {
                                           Scheme::cell, Scheme::min_max, Scheme::symmetric,
                                           Scheme::full_range, Scheme::unbiased}) {
    std::vector<GridRule> rules;
    for (const Scheme scheme : schemes) {
        if (scheme != Scheme::unbiased)
            for (const Index group : {32, 64, 128})
                rules.push_back({Granularity::per_channel, group, scheme});
        for (const Index group : {5, 32, 64, 256}) rules.push_back({Granularity::per_token, group, scheme});
    }
    return rules;
}

/// Every width alone, both sides, and mixes of widths.
inline std::vector<Case> all_cases(const std::vector<Index>& channel_counts,
                                   const std::vector<GridRule>& rules) {
    std::vector<Case> cases;
    const std::vector<Segments> mixes{{{32, 8}, {64, 4}, {16, 2}, {16, 0}},
                                      {{7, 3}, {1, 16}, {33, 1}, {5, 0}, {48, 6}, {9, 16}, {2, 5}},
                                      {{3, 0}, {40, 7}},
                                      {{8, 6, Scheme::min_max}, {19, 2, Scheme::cell}, {5, 4}}};
    for (const GridRule& rule : rules)
        for (const TileSide side : {TileSide::keys, TileSide::values}) {
            for (const int bits : {0, 1, 2, 3, 4, 5, 6, 7, 8, 16})
                for (const Index channels : channel_counts)
                    if (bits != 1 || rule.scheme != Scheme::symmetric)
                        cases.push_back({side, {{channels, bits}}, rule});
            for (const Segments& segments : mixes)
                if (rule.scheme != Scheme::symmetric || segments.size() < 7)
                    cases.push_back({side, segments, rule});
        }
    return thinned(std::move(cases));
}

}  // namespace kvplane_test::tiles
