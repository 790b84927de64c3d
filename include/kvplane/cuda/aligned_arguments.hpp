// kvplane/cuda/aligned_arguments.hpp: what kernels that decide tile by tile what is read take beside
// AttendArguments, and the seam to nvcc.
#pragma once

#include <cstdint>

#include "kvplane/cuda/aligned_rule.hpp"
#include "kvplane/cuda/attend_arguments.hpp"
#include "kvplane/cuda/tile_views.hpp"

namespace kvplane::cuda::detail {

struct AlignedArguments {
    PlanePrefixes prefixes;
    /// Those of keys where the planes behind the first ones lie apart: at rest_at, and not behind them.
    KeyTileView apart[PlaneSplit::max_planes];
    AlignedRule rule;
    /// Of a warp's memory, and what it has where: first planes of keys of even turns, what else is read of
    /// tiles, weights, and factors. First planes of odd turns are at its begin.
    std::uint32_t warp_bytes, even_at, rest_at, kept_at, factors_at;
    ReadCounts* counts;  ///< nullptr: not wanted
};
static_assert(sizeof(AttendArguments) + sizeof(AlignedArguments) <= 32764, "what a kernel takes at most");

/// As is_made() and launch() of attend_arguments.hpp. Defined by cuda/aligned.cuh.
bool is_made(const AttendArguments& arguments, const AlignedArguments& aligned);
int launch_aligned(const AttendArguments& arguments, const AlignedArguments& aligned, int blocks, int warps,
                   std::uint32_t bytes, CUstream_st* stream);

}  // namespace kvplane::cuda::detail
