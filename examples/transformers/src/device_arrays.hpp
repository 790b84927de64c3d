// examples/transformers/src/device_arrays.hpp: tensors of a device, as kernels and copies take them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

#include "arrays.hpp"
#include "kvplane/cuda/device_rows.hpp"

namespace kvplane_python {

using kvplane::cuda::DeviceOutput;
using kvplane::cuda::DeviceRows;

inline std::size_t size_of(ScalarType type) {
    return kvplane::bytes_of(type);
}
inline std::size_t to_size(Index number) {
    return static_cast<std::size_t>(number);
}

/// The tokens [first, ..) of one sequence.
DeviceRows device_rows(const SequenceRows& rows, Index sequence, Index first);
DeviceOutput device_output(const SequenceRows& rows, Index sequence, Index first);

/// Copies tokens whose channels are neighbours on both sides, in as few copies as strides allow.
void copy_rows(const DeviceRows& from, const DeviceOutput& to, Index channels, cudaMemcpyKind kind,
               cudaStream_t stream);
/// Makes the first rows of a sequence 0.
void clear_rows(const SequenceRows& output, Index sequence, Index rows, cudaStream_t stream);

/// Rows of a device on the host, with the same strides.
class Fetched {
  public:
    Fetched(const SequenceRows& rows, cudaStream_t stream);
    /// After waiting for the stream.
    const SequenceRows& rows() const noexcept { return rows_; }

  private:
    SequenceRows rows_;
    std::vector<std::byte> bytes_;
};

}  // namespace kvplane_python
