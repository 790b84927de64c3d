// kvplane/cuda/error.cuh: errors of the CUDA runtime as kvplane's.
#pragma once

#include <cuda_runtime.h>

#include "kvplane/error.hpp"

namespace kvplane::cuda::detail {

/// Throws Error (out_of_memory, io) unless the call succeeded. doing: what was being done, "to copy pages".
inline void require_cuda(cudaError_t status, const char* doing) {
    if (status == cudaSuccess) return;
    fail(status == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::io, "cuda: could not ", doing, ": ",
         cudaGetErrorString(status));
}

}  // namespace kvplane::cuda::detail
