// kvplane/cuda/device.hpp: what functions are marked with that run on the host and on a device.
#pragma once

#ifndef KVPLANE_DEVICE
#if defined(__CUDACC__)
#define KVPLANE_DEVICE __host__ __device__
#else
#define KVPLANE_DEVICE
#endif
#endif
