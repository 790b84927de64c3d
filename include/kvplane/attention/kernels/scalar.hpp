// kvplane/attention/kernels/scalar.hpp: integer sums over planes, in plain C++: the definition.
//
// A plane is a list of 64-byte units of 16 lanes x 4 bytes, a byte holding 8 / width fields
// (storage/tile.hpp). A block is as many consecutive units as cover the depth of the dot product: of keys 16
// tokens and all channels, of values 16 channels and 128 tokens. For each block, row (a query head and token)
// and lane,
//
//   sum += 2^shift sum over units u, fields i, bytes j of field_i(byte(u, lane, j)) factor[(u fields + i) 4 +
//   j]
//
// with unsigned fields and signed 8-bit factors in -127 .. 127 (a low part may be -128). Sums are 32 bits: a
// field of 4 bits and a depth of 2^17 stay below 2^28, and shifts of at most 4 below 2^32 / 2.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "kvplane/matrix.hpp"

namespace kvplane::detail {

/// One call: `units` consecutive units of each of `blocks` blocks, which are `block_units` apart, for `rows`
/// rows. Row r's factors begin at factors + r factor_stride; sums are [block][sum_rows][16 lanes], of which
/// the first `rows` are written, or added to. Each unit read prefetches the one at the same place of `ahead`.
struct PlaneDotCall {
    const std::byte* plane;
    const std::byte* ahead;
    Index blocks, block_units, units;
    const std::int8_t* factors;
    Index factor_stride, rows;
    int shift;
    std::int32_t* sums;
    Index sum_rows;
    bool add;
};

/// Two planes of the same codes together. Row r's factors meet whole codes; row rows + r's (`low_rows`: as
/// many as rows, or none) the first plane alone, as in a call of shift `shift`.
struct PlanePairCall {
    const std::byte *first, *second;
    const std::byte *first_ahead, *second_ahead;
    Index blocks, first_units, second_units;
    const std::int8_t* factors;
    Index factor_stride, rows, low_rows;
    int shift;
    std::int32_t* sums;
    Index sum_rows;
};

/// The read units of a tile, or of one of its segments, by how many planes of them are read.
struct UnitsByDepth {
    static constexpr int depths = 4;  ///< 0 to 3 planes; of 0, nothing is listed
    std::array<std::uint16_t*, depths> unit{};
    std::array<Index, depths> count{};

    UnitsByDepth() = default;
    /// planes: of each of `units`, at most `all`; nullptr: `all` of every one. room: depths * units numbers.
    UnitsByDepth(const std::uint8_t* planes, Index units, int all, std::uint16_t* room) noexcept {
        for (std::size_t d = 1; d <= static_cast<std::size_t>(all); ++d) {
            unit[d] = room + static_cast<Index>(d) * units;
            Index listed = 0;  // without a branch for what no one can predict
            for (Index u = 0; u < units; ++u) {
                unit[d][listed] = static_cast<std::uint16_t>(u);
                listed += (planes ? planes[u] : all) == static_cast<int>(d);
            }
            count[d] = listed;
        }
    }
};

/// Codes of 8 bits in two planes of 4, of which some units are read in part. What is unread counts as 0. Rows
/// and factors as in PlanePairCall.
struct PlaneSomeCall {
    const std::byte *first, *second;
    const std::byte *first_ahead, *second_ahead;
    Index blocks, block_units;
    UnitsByDepth units, ahead;
    const std::int8_t* factors;
    Index factor_stride, rows, low_rows;
    std::int32_t* sums;
    Index sum_rows;
};

/// The kernels of an instruction set.
struct PlaneDot {
    std::string_view name;  ///< what isa.hpp calls the instruction set
    /// By width of the plane: 1, 2 and 4.
    void (*of_width[3])(const PlaneDotCall&) noexcept;
    /// By bits of a code: 3 without low rows, 5, 6 and 8 with; nullptr where plane by plane is as fast. A
    /// byte of 8 bits needs products of unsigned by signed bytes that do not saturate.
    using Pair = void (*)(const PlanePairCall&) noexcept;
    std::array<Pair, 9> of_pair{};
    /// nullptr where plane by plane is as fast.
    void (*some)(const PlaneSomeCall&) noexcept = nullptr;

    void operator()(int width, const PlaneDotCall& call) const noexcept {
        of_width[width == 4 ? 2 : width - 1](call);
    }
};

namespace scalar {

template <int width>
void plane_dot(const PlaneDotCall& call) noexcept {
    constexpr int fields = 8 / width, mask = (1 << width) - 1;
    for (Index block = 0; block < call.blocks; ++block) {
        const std::byte* const units = call.plane + block * call.block_units * 64;
        for (Index row = 0; row < call.rows; ++row) {
            const std::int8_t* const factors = call.factors + row * call.factor_stride;
            std::int32_t sums[16] = {};
            for (Index u = 0; u < call.units; ++u)
                for (int i = 0; i < fields; ++i)
                    for (int lane = 0; lane < 16; ++lane)
                        for (int j = 0; j < 4; ++j)
                            sums[lane] +=
                                (std::to_integer<int>(units[u * 64 + lane * 4 + j]) >> (i * width) & mask) *
                                factors[(u * fields + i) * 4 + j];
            for (int lane = 0; lane < 16; ++lane) {
                std::int32_t& to = call.sums[(block * call.sum_rows + row) * 16 + lane];
                to = (call.add ? to : 0) + sums[lane] * (1 << call.shift);
            }
        }
    }
}

inline constexpr PlaneDot plane_dots{"scalar", {plane_dot<1>, plane_dot<2>, plane_dot<4>}};

}  // namespace scalar
}  // namespace kvplane::detail
