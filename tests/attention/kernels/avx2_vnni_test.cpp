// The kernel for AVX-VNNI, in AVX-512VL's encoding of its one instruction where the machine has that alone.
#include "kvplane/simd/isa.hpp"

#define KVPLANE_DPBUSD_256 _mm256_dpbusd_epi32
#define KVPLANE_TARGET_DPBUSD_256 KVPLANE_TARGET_AVX512
#include "kvplane/attention/kernels/avx2_vnni.hpp"

#include <gtest/gtest.h>

#include "attention/kernels/plane_dot_support.hpp"

namespace {

TEST(AvxVnni, EqualsTheDefinition) {
#if defined(KVPLANE_X86)
    if (!kvplane::is_supported(kvplane::Isa::avx512)) GTEST_SKIP() << "this machine lacks AVX512_VNNI";
    kvplane_test::Random random(kvplane_test::seed());
    kvplane_test::expect_the_definition(kvplane::detail::avx2_vnni::plane_dots, random);
#else
    GTEST_SKIP() << "a kernel for x86";
#endif
}

}  // namespace
