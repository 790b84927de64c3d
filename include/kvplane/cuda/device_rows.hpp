// kvplane/cuda/device_rows.hpp: rows of heads in device memory, as calls take and fill them.
#pragma once

#include "kvplane/matrix.hpp"

namespace kvplane::cuda {

/// Keys, values or queries in device memory, tokens x heads x head_dim. Strides are in elements. What lies
/// between the elements is not looked at.
struct DeviceRows {
    const void* data = nullptr;
    ScalarType type = ScalarType::float16;
    Index tokens = 0, heads = 0;
    Index token_stride = 0, head_stride = 0, channel_stride = 1;
};

/// Where attention puts its output, tokens x heads x head_dim. Strides are in elements; channels are
/// neighbours.
struct DeviceOutput {
    void* data = nullptr;
    ScalarType type = ScalarType::float16;
    Index tokens = 0, heads = 0;
    Index token_stride = 0, head_stride = 0;
};

}  // namespace kvplane::cuda
