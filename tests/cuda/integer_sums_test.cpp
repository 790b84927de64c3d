// The integer sums of the CUDA kernels on emulated lanes: integer_sums_gpu.cu asserts the same hash on a device.
#include "cuda/integer_sums.hpp"

#include <gtest/gtest.h>

#include <cstdio>

#include "cuda/host_warp.hpp"

namespace {

using namespace kvplane_test;

TEST(IntegerSums, AreThoseOfADevice) {
    ByteHash hash;
    at_every_width_of_codes([&]<int bits>() {
        using Sums = SumsOf<kvplane::cuda::HostWarp, bits>;
        const SumsInput input(bits);
        typename Sums::Int sums[Sums::count];
        Sums::make(input.bytes.data(), input.keys, input.values, sums);
        add_sums(hash, Sums::count, [&](int i, int lane) { return sums[i][lane]; });
    });
    std::printf("integer sums: %016llx\n", static_cast<unsigned long long>(hash.value()));
    EXPECT_EQ(hash.value(), golden_integer_sums);
}

}  // namespace
