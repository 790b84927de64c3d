// kvplane/cuda/launch.hpp: the seam between what the host's compiler reads and what nvcc reads.
//
// nvcc 13 reads the declarations of caches (KVPLANE_COMPILED), but not the vectors of simd/, which
// DeviceCache needs. So these functions are declared for everyone, and cuda/append.cuh, which one .cu file of
// a program includes, defines them; CMake's target kvplane::cuda has such a file. They return what the CUDA
// runtime says, as cudaError_t in an int.
#pragma once

#include "kvplane/cuda/arguments.hpp"

struct CUstream_st;

namespace kvplane::cuda::detail {

int launch(const RowsArguments& arguments, int blocks_x, int blocks_y, int shared_bytes, CUstream_st* stream);
int launch(const TilesArguments& arguments, int blocks, int shared_bytes, CUstream_st* stream);
int launch(const CentreArguments& arguments, int blocks, int shared_bytes, CUstream_st* stream);
int launch(const ProductArguments& arguments, int blocks, int shared_bytes, CUstream_st* stream);

/// Writes what a kernel that was compiled with these headers makes of 2^-140 * 2 and 1 / 3 to three floats of
/// device memory.
int launch_probe(float* results, CUstream_st* stream);

}  // namespace kvplane::cuda::detail
