// kvplane/cuda/error.cuh: what CUDA refuses becomes kvplane::Error.
#pragma once

#include <cuda_runtime_api.h>

#include "kvplane/error.hpp"

namespace kvplane::cuda {

/// Throws Error unless a call of the CUDA runtime went well: out_of_memory where memory is what it lacked, io
/// otherwise. `doing` says what was being done. An error of an earlier kernel may show here.
inline void require_cuda(cudaError_t result, const char* doing) {
    if (result == cudaSuccess) [[likely]]
        return;
    // An error that does not stay is taken away, so that the next call does not see it.
    (void)cudaGetLastError();
    fail(result == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::io, "CUDA, while ",
         doing, ": ", cudaGetErrorString(result), " (", cudaGetErrorName(result), ")");
}

}  // namespace kvplane::cuda
