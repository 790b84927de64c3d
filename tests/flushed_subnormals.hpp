// tests/flushed_subnormals.hpp: runs a test's body as it runs beside libraries that flush subnormal numbers.
//
// gcc links a constructor that sets this mode into everything linked with -ffast-math; torch and ONNX Runtime
// set it for their threads. It is a property of a thread.
#pragma once

#include <string>

#if defined(__SSE2__)
#include <pmmintrin.h>
#include <xmmintrin.h>
#endif

namespace kvplane_test {

#if defined(__SSE2__)
inline constexpr bool can_flush_subnormals = true;

/// Subnormal operands count as zero and subnormal results become zero, while this lives.
class FlushedSubnormals {
  public:
    FlushedSubnormals() : before_(_mm_getcsr()) {
        _MM_SET_FLUSH_ZERO_MODE(_MM_FLUSH_ZERO_ON);
        _MM_SET_DENORMALS_ZERO_MODE(_MM_DENORMALS_ZERO_ON);
    }
    ~FlushedSubnormals() { _mm_setcsr(before_); }
    FlushedSubnormals(const FlushedSubnormals&) = delete;
    FlushedSubnormals& operator=(const FlushedSubnormals&) = delete;

  private:
    unsigned before_;
};
#else
inline constexpr bool can_flush_subnormals = false;
class FlushedSubnormals {};
#endif

/// A call that the compiler cannot see through: arithmetic does not move out of the mode that is set here.
template <class Body>
[[gnu::noinline]] auto apart(const Body& body) {
    const Body* volatile hidden = &body;
    return (*hidden)();
}

/// What body() returns with subnormals flushed.
template <class Body>
auto with_flushed_subnormals(const Body& body) {
    [[maybe_unused]] const FlushedSubnormals mode;
    return apart(body);
}

}  // namespace kvplane_test
