// kvplane/cuda/queue.hpp: what copies memory of a device and runs blocks there, in the order of the calls.
#pragma once

#include <cstddef>

#include "kvplane/cuda/arguments.hpp"

namespace kvplane::cuda::detail {

/// A stream of a device (cuda/device_cache.cuh), or the host in its place.
class Queue {
  public:
    virtual ~Queue() = default;

    /// Copies to the device. What is copied may change when the call returns.
    virtual void to_device(void* to, const void* from, std::size_t bytes) = 0;
    /// Copies to the host, where it is after wait().
    virtual void to_host(void* to, const void* from, std::size_t bytes) = 0;
    virtual void within_device(void* to, const void* from, std::size_t bytes) = 0;
    /// Makes memory of the device zero.
    virtual void clear(void* to, std::size_t bytes) = 0;
    /// Until all of it is done.
    virtual void wait() = 0;

    /// The shared memory that a block may take.
    virtual int most_shared_bytes() const = 0;
    virtual void run(const RowsArguments& arguments, int blocks_x, int blocks_y, int shared_bytes) = 0;
    virtual void run(const TilesArguments& arguments, int blocks, int shared_bytes) = 0;
    virtual void run(const CentreArguments& arguments, int blocks, int shared_bytes) = 0;
    virtual void run(const ProductArguments& arguments, int blocks, int shared_bytes) = 0;
};

}  // namespace kvplane::cuda::detail
