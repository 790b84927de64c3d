// kvplane/attention/kernels/amx_tiles.hpp: the tile registers of AMX, and which thread has them set up.
//
// There are 8 tiles of 16 rows of 64 bytes. dot<to, a, b>() is tdpbsud:
//
//   to[m][n] += sum over k and j < 4 of a[m][4 k + j] b[k][4 n + j]      a signed bytes, b unsigned, to int32
//
// so that b is 16 rows of units as a plane stores them (kernels/plane_dot.hpp), one byte a field.
#pragma once

#include "kvplane/matrix.hpp"
#include "kvplane/simd/isa.hpp"

#if defined(KVPLANE_X86)
#include <cstdint>

namespace kvplane::detail::amx {

inline constexpr int tile_rows = 16, tile_row_bytes = 64;
inline constexpr Index tile_bytes = tile_rows * tile_row_bytes;
/// Kernels of fewer rows are those of AVX-512: such rows do not make up for spreading fields to bytes.
inline constexpr Index least_rows = 8;

/// The instructions. They are written out because g++ 12's intrinsics do not say that they read and write
/// memory.
struct Tiles {
    template <int to>
    KVPLANE_INLINE static void zero() noexcept {
        asm volatile("tilezero %%tmm%c0" : : "i"(to));
    }
    /// from: 16 rows of 64 bytes, `stride` bytes apart
    template <int to>
    KVPLANE_INLINE static void load(const void* from, Index stride) noexcept {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(to) : "memory");
    }
    template <int from>
    KVPLANE_INLINE static void store(void* to, Index stride) noexcept {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(from) : "memory");
    }
    template <int to, int a, int b>
    KVPLANE_INLINE static void dot() noexcept {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(to), "i"(a), "i"(b));
    }
};

/// Sets up the tiles of this thread, and gives them up again at its end. Inside of another one it does nothing:
/// setting up takes as long as a third of a kernel.
class TileScope {
  public:
    explicit TileScope(bool wanted = true) noexcept : owns_(wanted && !set_up) {
        if (!owns_) return;
        static constexpr Shapes shapes;
        asm volatile("ldtilecfg %0" : : "m"(shapes));
        set_up = true;
    }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
    ~TileScope() {
        if (!owns_) return;
        asm volatile("tilerelease");
        set_up = false;
    }

  private:
    /// What ldtilecfg takes: all tiles are as large as they can be.
    struct alignas(64) Shapes {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static inline thread_local bool set_up = false;

    bool owns_;
};

}  // namespace kvplane::detail::amx
#endif
