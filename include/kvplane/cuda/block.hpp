// kvplane/cuda/block.hpp: a block of threads, on a device or on the host in its place, and how its threads
// share work and shared memory.
//
// A block works in phases: block.run(phase) calls phase(thread, threads) for every thread and waits for all
// of them. Between phases nothing is kept but shared and global memory.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/numbers.hpp"

namespace kvplane::cuda::detail {

/// A block of threads that one thread of the host stands for.
struct HostBlock {
    int threads = 64;        ///< a multiple of 32
    bool backwards = false;  ///< the last thread first: a phase in which threads wait for each other shows

    template <class Phase>
    void run(const Phase& phase) const {
        for (int i = 0; i < threads; ++i) phase(backwards ? threads - 1 - i : i, threads);
    }
};

#if defined(__CUDACC__)
/// The block that runs.
struct DeviceBlock {
    template <class Phase>
    __device__ void run(const Phase& phase) const {
        phase(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
        __syncthreads();
    }
};
#endif

/// Division by a number that is a power of two more often than not.
struct Divisor {
    int by, shift;

    KVPLANE_DEVICE explicit Divisor(int number) : by(number), shift(-1) {
        if ((number & (number - 1)) != 0) return;
        shift = 0;
        while (1 << shift < number) ++shift;
    }
    /// For x >= 0.
    KVPLANE_DEVICE int quotient(int x) const {
        return shift >= 0 ? x >> shift
                          : static_cast<int>(static_cast<unsigned>(x) / static_cast<unsigned>(by));
    }
    KVPLANE_DEVICE int rest(int x) const { return x - quotient(x) * by; }
};

/// Threads as rows of a power of two of columns, so that a thread's column stays while its row goes on.
struct ThreadGrid {
    int column, columns, row, rows;

    /// For `across` items a row; no more than `most` columns, a power of two up to 32.
    KVPLANE_DEVICE ThreadGrid(int thread, int threads, int across, int most) {
#if defined(__CUDA_ARCH__)
        const int log_across = across > 1 ? 32 - __clz(across - 1) : 0;
#else
        const auto log_across =
            static_cast<int>(std::bit_width(static_cast<unsigned>(across > 1 ? across - 1 : 0)));
#endif
        columns = 1 << log_across < most ? 1 << log_across : most;
        const int log_columns = 1 << log_across < most ? log_across : log_of(most);
        column = thread & (columns - 1);
        row = thread >> log_columns;
        rows = threads >> log_columns;
    }

  private:
    KVPLANE_DEVICE static constexpr int log_of(int number) {
        return number <= 1 ? 0 : 1 + log_of(number / 2);
    }
};

KVPLANE_DEVICE inline void raise(std::uint32_t* where, std::uint32_t value) {
#if defined(__CUDA_ARCH__)
    atomicMax(where, value);
#else
    if (*where < value) *where = value;
#endif
}
KVPLANE_DEVICE inline void raise(std::uint64_t* where, double value) {
    std::uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
#if defined(__CUDA_ARCH__)
    atomicMax(reinterpret_cast<unsigned long long*>(where), static_cast<unsigned long long>(bits));
#else
    if (*where < bits) *where = bits;
#endif
}
/// raise() by all threads of a phase together.
KVPLANE_DEVICE inline void raise_together(std::uint32_t* where, std::uint32_t value) {
#if defined(__CUDA_ARCH__)
    value = __reduce_max_sync(0xFFFFFFFFu, value);
    if (threadIdx.x % 32 == 0 && value > 0) atomicMax(where, value);
#else
    raise(where, value);
#endif
}

/// Numbers of consecutive elements that are loaded and stored at once.
struct alignas(16) FourFloats {
    float at[4];
};
struct alignas(8) TwoFloats {
    float at[2];
};
struct alignas(8) FourHalves {
    std::uint16_t at[4];
};
struct alignas(16) FourWords {
    std::uint32_t at[4];
};
struct alignas(8) TwoWords {
    std::uint32_t at[2];
};

/// Rows of floats in shared memory are longer by 4 elements for each 32, so that the passes of a rotation
/// meet all banks, and by as many more as make rows next to each other meet different ones. Where channel c
/// stands:
KVPLANE_DEVICE constexpr int place_of(int c) {
    return c + c / 32 * 4;
}
/// Elements from row to row, 8 more than a multiple of 16.
KVPLANE_DEVICE constexpr int pitch_of(int channels) {
    return ((channels + 31) / 32 * 36 + 7) / 16 * 16 + 8;
}
KVPLANE_DEVICE constexpr int whole_units_of(int channels) {
    return (channels + 31) / 32 * 32;
}

}  // namespace kvplane::cuda::detail
