// tests/cuda/device_bytes.hpp: what programs that test on a device have in common.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

namespace kvplane_test {

inline bool has_device() {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return true;
    (void)cudaGetLastError();
    return false;
}
#define KVPLANE_NEEDS_DEVICE()                                                                         \
    do {                                                                                               \
        if (!kvplane_test::has_device()) GTEST_SKIP() << "NOT TESTED: no CUDA device on this machine"; \
    } while (false)

inline void expect_ok(cudaError_t status) {
    ASSERT_EQ(status, cudaSuccess) << cudaGetErrorString(status);
}

/// What `body` starts on the stream, in a graph that is launched `times` times and waited for.
template <class Body>
void launch_captured(cudaStream_t stream, int times, const Body& body) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    expect_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    body();
    expect_ok(cudaStreamEndCapture(stream, &graph));
    expect_ok(cudaGraphInstantiate(&executable, graph, 0));
    for (int launch = 0; launch < times; ++launch) expect_ok(cudaGraphLaunch(executable, stream));
    expect_ok(cudaStreamSynchronize(stream));
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
}

/// Memory of the device.
class DeviceBytes {
  public:
    explicit DeviceBytes(std::size_t bytes) : bytes_(bytes) {
        EXPECT_EQ(cudaMalloc(&data_, std::max<std::size_t>(bytes, 16)), cudaSuccess);
        // NaN in every type: what a kernel leaves out is seen.
        EXPECT_EQ(cudaMemset(data_, 0xFF, std::max<std::size_t>(bytes, 16)), cudaSuccess);
    }
    DeviceBytes(const void* from, std::size_t bytes) : DeviceBytes(bytes) {
        EXPECT_EQ(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), cudaSuccess);
    }
    DeviceBytes(DeviceBytes&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
    DeviceBytes(const DeviceBytes&) = delete;
    DeviceBytes& operator=(const DeviceBytes&) = delete;
    ~DeviceBytes() { cudaFree(data_); }
    template <class T = std::byte>
    T* as() const {
        return static_cast<T*>(data_);
    }
    template <class T>
    std::vector<T> read() const {
        std::vector<T> to(bytes_ / sizeof(T));
        EXPECT_EQ(cudaMemcpy(to.data(), data_, bytes_, cudaMemcpyDeviceToHost), cudaSuccess);
        return to;
    }

  private:
    void* data_ = nullptr;
    std::size_t bytes_;
};

}  // namespace kvplane_test
