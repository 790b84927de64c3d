// kvplane/cuda/device.hpp: marks what is compiled for the device and for the host.
#pragma once

#include <type_traits>

#if defined(__CUDACC__)
#define KVPLANE_DEVICE __host__ __device__
/// Before a loop whose counter is an index of registers.
#define KVPLANE_UNROLL _Pragma("unroll")
/// Before a loop that is seldom run, so that it takes little of the memory of instructions.
#define KVPLANE_KEEP_ROLLED _Pragma("unroll 1")
/// Before a loop whose turns are done two at a time, so that what they read is under way at once.
#define KVPLANE_UNROLL_TWICE _Pragma("unroll 2")
#else
#define KVPLANE_DEVICE
#define KVPLANE_UNROLL
#define KVPLANE_KEEP_ROLLED
#define KVPLANE_UNROLL_TWICE
#endif

namespace kvplane::cuda {

/// body() with a width of 1 to 8 bits as a type, whose value the compiler knows.
template <class Body>
KVPLANE_DEVICE void with_width(int bits, const Body& body) {
    switch (bits) {
        case 1:
            return body(std::integral_constant<int, 1>{});
        case 2:
            return body(std::integral_constant<int, 2>{});
        case 3:
            return body(std::integral_constant<int, 3>{});
        case 4:
            return body(std::integral_constant<int, 4>{});
        case 5:
            return body(std::integral_constant<int, 5>{});
        case 6:
            return body(std::integral_constant<int, 6>{});
        case 7:
            return body(std::integral_constant<int, 7>{});
        default:
            return body(std::integral_constant<int, 8>{});
    }
}

}  // namespace kvplane::cuda
