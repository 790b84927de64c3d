// kvplane/attention/kernels/plane_dot.hpp: what every kernel computes: integer sums over planes.
//
// A plane is a list of 64-byte units of 16 lanes x 4 bytes, a byte holding 8 / width fields
// (storage/tile_format.hpp). A block is as many consecutive units as cover the depth of the dot product: of
// keys 16 tokens and all channels, of values 16 channels and 128 tokens. For each block, row (a query head
// and token) and lane,
//
//   sum += 2^shift sum over units u, fields i, bytes j of
//              field_i(byte(u, lane, j)) factor[(u fields + i) 4 + j]
//
// with unsigned fields and signed 8-bit factors in -127 .. 127 (a low half may be -128). Sums are int32:
// codes of 8 bits in two planes add at most 255 x 128 a channel, so a sum could overflow beyond 65,793
// channels in one tile; max_depth refuses such a configuration.
//
// scalar.hpp is the definition; every other file is one instruction set and equals it bit for bit.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "kvplane/matrix.hpp"
#include "kvplane/storage/planes.hpp"

namespace kvplane::detail {

/// One call: `units` consecutive units of each of `blocks` blocks, which are `block_units` apart, for `rows`
/// rows. Each unit that is read prefetches the one at the same place of `next`.
struct PlaneDotCall {
    const std::byte* plane;
    const std::byte* next;
    Index blocks, block_units, units;
    const std::int8_t* factors;  ///< [row][factor_stride]
    Index factor_stride, rows;
    int shift;
    std::int32_t* sums;  ///< [block][sum_rows][16 lanes], of which the first `rows` are written, or added to
    Index sum_rows;
    bool add;
};

/// Two planes of the same codes together. The factors of row r meet whole codes. Those of row rows + r (there
/// are low_rows of them: as many as rows, or none) meet the first plane alone, as in a call of shift `shift`.
/// Blocks are *_block_units apart; the planes' units cover the same fields, but for the last of the second plane.
struct PlanePairCall {
    const std::byte *first, *second;
    const std::byte *first_next, *second_next;
    Index blocks, first_block_units, second_block_units, first_units, second_units;
    const std::int8_t* factors;
    Index factor_stride, rows, low_rows;
    int shift;
    std::int32_t* sums;
    Index sum_rows;
};

/// Channels (keys) or tokens (values) of one tile at most, so that no sum overflows.
inline constexpr Index max_depth = 65536;

/// The plane groups of a segment, listed by how many of their planes are read.
struct GroupsByDepth {
    static constexpr int depths =
        PlaneSplit::max_planes + 1;  ///< groups of which no plane is read are not listed
    std::array<std::uint16_t*, depths> group{};
    std::array<Index, depths> count{};

    GroupsByDepth() = default;
    /// planes  [groups], each at most `all`; nullptr: `all` of every group
    /// room    [depths][groups], which the lists are written to
    GroupsByDepth(const std::uint8_t* planes, Index groups, int all, std::uint16_t* room) noexcept {
        for (std::size_t d = 1; d <= static_cast<std::size_t>(all); ++d) {
            group[d] = room + static_cast<Index>(d) * groups;
            Index listed = 0;
            // No branch depends on `planes`, because nothing could predict it.
            for (Index g = 0; g < groups; ++g) {
                group[d][listed] = static_cast<std::uint16_t>(g);
                listed += (planes ? planes[g] : all) == static_cast<int>(d);
            }
            count[d] = listed;
        }
    }
};

/// Codes of 8 bits in two planes of 4, of which some groups are read in part (a group is then one unit). An
/// unread plane counts as 0. Rows and factors are as in PlanePairCall.
struct PlaneSomeCall {
    const std::byte *first, *second;
    const std::byte *first_next, *second_next;
    Index blocks, block_units;
    GroupsByDepth groups, next_groups;
    const std::int8_t* factors;
    Index factor_stride, rows, low_rows;
    std::int32_t* sums;
    Index sum_rows;
};

/// Weights of tokens in the order of a tile's rows, where these are runs of tokens (storage/tile_format.hpp).
struct RunOrderCall {
    const std::byte* run_planes;  ///< [plane_count][16 bytes]
    int plane_count, runs;
    const float* weights;  ///< [row][128]
    Index rows;
    float* to;  ///< [row][128], with room for 16 more behind the last
};

struct Factors;

/// The kernels of an instruction set.
struct PlaneDot {
    using Pair = void (*)(const PlanePairCall&) noexcept;
    /// A kernel for both planes of codes of so many bits: 3 without low rows; 5, 6 and 8 with.
    struct PairOfBits {
        int bits = 0;
        Pair dot = nullptr;
    };

    std::string_view name;  ///< what simd/isa.hpp calls the instruction set
    /// By width of the plane: 1, 2 and 4.
    void (*of_width[3])(const PlaneDotCall&) noexcept;
    /// Where a kernel for both planes is faster than plane by plane.
    std::array<PairOfBits, 4> pairs{};
    /// Codes of 8 bits of which some groups are read in part; nullptr where plane by plane is as fast.
    void (*some)(const PlaneSomeCall&) noexcept = nullptr;
    /// nullptr where a list of the tokens is as fast.
    void (*order)(const RunOrderCall&) noexcept = nullptr;
    /// The factors of so many rows of which no block is left out, and nothing is unread where they are wide;
    /// nullptr where vectors of C++ (factors.hpp) are as fast.
    void (*factors)(const Factors&, Index rows) noexcept = nullptr;

    void operator()(int width, const PlaneDotCall& call) const noexcept {
        of_width[width == 4 ? 2 : width - 1](call);
    }
    /// The kernel for both planes of `bits`; nullptr: there is none.
    Pair pair(int bits) const noexcept {
        for (const PairOfBits& pair : pairs)
            if (pair.bits == bits) return pair.dot;
        return nullptr;
    }
};

}  // namespace kvplane::detail
