// kvplane/cuda/device.hpp: marks what is compiled for the device and for the host.
#pragma once

#if defined(__CUDACC__)
#define KVPLANE_DEVICE __host__ __device__
/// Before a loop whose counter is an index of registers.
#define KVPLANE_UNROLL _Pragma("unroll")
/// Before a loop that is seldom run, so that it takes little of the memory of instructions.
#define KVPLANE_KEEP_ROLLED _Pragma("unroll 1")
#else
#define KVPLANE_DEVICE
#define KVPLANE_UNROLL
#define KVPLANE_KEEP_ROLLED
#endif
