// kvplane/cuda/device.hpp: marks what is compiled for the device and for the host.
#pragma once

#if defined(__CUDACC__)
#define KVPLANE_DEVICE __host__ __device__
/// Before a loop whose counter is an index of registers.
#define KVPLANE_UNROLL _Pragma("unroll")
#else
#define KVPLANE_DEVICE
#define KVPLANE_UNROLL
#endif
