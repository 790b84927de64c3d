// kvplane/cuda/device.hpp: marks what is compiled for the device and for the host.
#pragma once

#if defined(__CUDACC__)
#define KVPLANE_DEVICE __host__ __device__
/// A function that is one with its caller, so that what it is given stays in registers.
#define KVPLANE_DEVICE_INLINED __host__ __device__ __forceinline__
/// A function that is seldom run and called at many places.
#define KVPLANE_DEVICE_APART __host__ __device__ __noinline__
/// Before a loop whose counter is an index of registers.
#define KVPLANE_UNROLL _Pragma("unroll")
/// Before a loop of which some rounds should overlap.
#define KVPLANE_UNROLL_FEW _Pragma("unroll 4")
/// Before a loop that is seldom run, so that it takes little of the memory of instructions.
#define KVPLANE_KEEP_ROLLED _Pragma("unroll 1")
#else
#define KVPLANE_DEVICE
#define KVPLANE_DEVICE_INLINED
#define KVPLANE_DEVICE_APART
#define KVPLANE_UNROLL
#define KVPLANE_UNROLL_FEW
#define KVPLANE_KEEP_ROLLED
#endif

namespace kvplane::cuda::detail {

/// A number that is known when code is compiled.
template <int value>
struct Constant {
    static constexpr int count = value;
    KVPLANE_DEVICE constexpr operator int() const { return value; }
};
/// Calls body(Constant<w>{}) for the one of the widths w that `width` is.
template <int... widths, class Body>
KVPLANE_DEVICE void with_bits(int width, const Body& body) {
    (void)((width == widths ? (body(Constant<widths>{}), true) : false) || ...);
}

}  // namespace kvplane::cuda::detail
