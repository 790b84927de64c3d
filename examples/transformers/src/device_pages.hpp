// examples/transformers/src/device_pages.hpp: the memory of a device that a cache and its forks share, and
// the order of their work there.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>

#include "arrays.hpp"
#include "kvplane/cache/pages.hpp"
#include "kvplane/cuda/error.cuh"
#include "kvplane/cuda/pages.cuh"

namespace kvplane_python {

/// Makes a device current while this lives.
class CurrentDevice {
  public:
    explicit CurrentDevice(int device) {
        int found = 0;
        kvplane::cuda::require_cuda(cudaGetDevice(&found), "asking for the current device");
        if (found == device) return;
        kvplane::cuda::require_cuda(cudaSetDevice(device), "choosing a device");
        before_ = found;
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;
    ~CurrentDevice() {
        if (before_ >= 0) (void)cudaSetDevice(before_);
    }

  private:
    int before_ = -1;
};

/// The memory of a cache and its forks, whose calls take turns: pages may change hands.
struct SharedPages {
    explicit SharedPages(int of) : device(of) {
        kvplane::cuda::require_cuda(cudaEventCreateWithFlags(&passed, cudaEventDisableTiming),
                                    "making an event");
    }
    SharedPages(const SharedPages&) = delete;
    SharedPages& operator=(const SharedPages&) = delete;
    ~SharedPages() { (void)cudaEventDestroy(passed); }

    /// Work that is started on the stream from now on comes after all work before, also that of calls which
    /// are given no stream. Throws Error (option) for a stream that is captured: a graph's launches would
    /// append no new tokens, and would go by plans that are made over again.
    void enter(cudaStream_t to) {
        cudaStreamCaptureStatus captured = cudaStreamCaptureStatusNone;
        kvplane::cuda::require_cuda(cudaStreamIsCapturing(to, &captured), "looking at a stream");
        require(
            captured == cudaStreamCaptureStatusNone, ErrorCode::option,
            "stream: one that is captured in a CUDA graph, which kvplane's caches do not serve; expected a "
            "stream that works");
        if (to == stream) return;
        kvplane::cuda::require_cuda(cudaEventRecord(passed, stream), "marking the end of work on a stream");
        kvplane::cuda::require_cuda(cudaStreamWaitEvent(to, passed, 0), "waiting for another stream");
        stream = to;
    }

    const int device;
    std::mutex turns;
    kvplane::cuda::DeviceMemory memory;
    kvplane::TilePool pool{&memory};
    cudaStream_t stream = nullptr;  ///< of the last call that was given one; CUDA's default before
    cudaEvent_t passed{};
};

}  // namespace kvplane_python
