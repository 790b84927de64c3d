// kvplane/simd/floating_point.hpp: the processor's floating-point mode, made standard for a while.
//
// Other libraries flush subnormal numbers to zero in the threads that they share with kvplane (torch,
// TensorFlow, ONNX Runtime, any object linked with -ffast-math). fp16 values below 2^-14 stand in subnormal
// floats on their way through the kernels and would count as 0. Setting the mode costs some ten cycles, so it
// is done once a call or item of work.
#pragma once

#include <cstdint>

#include "kvplane/simd/isa.hpp"

#if defined(KVPLANE_X86)
#include <immintrin.h>
#endif

namespace kvplane::detail {

/// While it lives, this thread rounds to nearest and keeps subnormal numbers.
class StandardFloatingPoint {
  public:
#if defined(KVPLANE_X86)
    StandardFloatingPoint() noexcept : before_(_mm_getcsr()) {
        if (before_ != wanted()) _mm_setcsr(wanted());
    }
    ~StandardFloatingPoint() {
        if (before_ != wanted()) _mm_setcsr(before_);
    }
#elif defined(__aarch64__)
    StandardFloatingPoint() noexcept {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        if (before_ != wanted()) asm volatile("msr fpcr, %0" : : "r"(wanted()));
    }
    ~StandardFloatingPoint() {
        if (before_ != wanted()) asm volatile("msr fpcr, %0" : : "r"(before_));
    }
#endif
    StandardFloatingPoint(const StandardFloatingPoint&) = delete;
    StandardFloatingPoint& operator=(const StandardFloatingPoint&) = delete;

  private:
#if defined(KVPLANE_X86)
    /// Flags of past exceptions stay; rounding mode, FTZ (bit 15) and DAZ (bit 6) are cleared.
    unsigned wanted() const noexcept {
        return before_ & ~0xE040u;
    }
    unsigned before_;
#elif defined(__aarch64__)
    /// Rounding mode (bits 23 and 22), FZ (24) and FZ16 (19) are cleared.
    std::uint64_t wanted() const noexcept {
        return before_ & ~0x01C80000u;
    }
    std::uint64_t before_;
#endif
};

}  // namespace kvplane::detail
