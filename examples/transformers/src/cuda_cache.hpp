// examples/transformers/src/cuda_cache.hpp: caches on CUDA devices, where the build has them.
#pragma once

#include <memory>
#include <string>

#include "cache.hpp"

namespace kvplane_python {

/// Whether the build has caches on CUDA devices: option KVPLANE_CUDA of CMake.
bool cuda_is_built() noexcept;
/// How many devices there are; 0 also without a driver.
int cuda_device_count() noexcept;
/// What a build without them lacks, as the end of a sentence.
inline constexpr const char* without_cuda =
    "but this build of kvplane has no part for CUDA; expected the CPU, or a build by pip install "
    "./examples/transformers -C cmake.define.KVPLANE_CUDA=ON";

/// A cache in the memory of a device. Threads are for recipes that learn on the CPU. Throws Error (option) for
/// recipes that devices do not serve.
std::unique_ptr<Cache> make_cuda_cache(Contents contents, Index batch, Index threads, int device);

}  // namespace kvplane_python
