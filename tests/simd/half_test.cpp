// fp16 arithmetic of vectors: every number widened, rounded and narrowed as Eigen does it one by one, on
// every instruction set, and the same where the thread flushes subnormal numbers.
#include "kvplane/simd/half.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "flushed_subnormals.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

namespace simd = kvplane::detail::simd;
using kvplane::fp16_max;
using kvplane::Index;
using kvplane::Isa;
using kvplane_test::can_flush_subnormals;
using kvplane_test::for_each_isa;
using kvplane_test::with_flushed_subnormals;

std::uint32_t bits_of(float x) {
    return std::bit_cast<std::uint32_t>(x);
}

std::vector<Eigen::half> every_half() {
    std::vector<Eigen::half> all(65536);
    for (std::size_t i = 0; i < all.size(); ++i)
        all[i] = Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(i));
    return all;
}

/// Every finite fp16 number, the middles between neighbours, and what lies next to both, with both signs.
std::vector<float> around_halves() {
    std::vector<float> all;
    for (std::uint16_t i = 0; i < 0x7BFF; ++i) {
        const auto low = static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(i));
        const auto high =
            static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(i + 1)));
        const float middle = 0.5f * (low + high);
        for (const float x : {low, middle})
            for (const float y : {x, std::nextafter(x, 1e9f), std::nextafter(x, 0.0f)})
                for (const float z : {y, -y}) all.push_back(z);
    }
    all.push_back(fp16_max);
    all.push_back(-fp16_max);
    while (all.size() % 16 != 0) all.push_back(0.0f);
    return all;
}

/// to = body of every vector of `from`.
template <class Body>
std::vector<float> rounded(Isa isa, const std::vector<float>& from, const Body& body) {
    std::vector<float> to(from.size());
    kvplane::detail::run_on(isa, [&, count = static_cast<Index>(from.size())](auto lanes) KVPLANE_BODY {
        for (Index i = 0; i < count; i += lanes) {
            simd::Floats<lanes> x;
            simd::load(x, from.data() + i);
            body(lanes, x);
            simd::store(to.data() + i, x);
        }
    });
    return to;
}

/// Runs body() as it stands, and with subnormals flushed where that can be set.
template <class Body>
void in_both_modes(const Body& body) {
    body([](const auto& call) { return call(); });
    if (!can_flush_subnormals) return;
    const testing::ScopedTrace trace(__FILE__, __LINE__, "with subnormals flushed");
    body([](const auto& call) { return with_flushed_subnormals(call); });
}

/// The test's own proof that the mode is on, and off again afterwards.
TEST(FlushedSubnormals, TakesThemForZero) {
    if (!can_flush_subnormals) GTEST_SKIP() << "no such mode known for this processor";
    volatile float least = std::numeric_limits<float>::denorm_min(), scale = 0x1p100f;
    EXPECT_EQ(with_flushed_subnormals([&] { return least * scale; }), 0.0f);
    EXPECT_EQ(least * scale, 0x1p-49f);
}

TEST(Half, WidensEveryNumber) {
    const std::vector<Eigen::half> all = every_half();
    in_both_modes([&](const auto& run) {
        for_each_isa([&](Isa isa) {
            const std::vector<float> wide = run([&] {
                std::vector<float> to(all.size());
                kvplane::detail::run_on(isa, [&](auto lanes) KVPLANE_BODY {
                    for (std::size_t i = 0; i < all.size(); i += lanes) {
                        simd::Floats<lanes> x;
                        simd::widen<lanes>(x, all.data() + i);
                        simd::store(to.data() + i, x);
                    }
                });
                return to;
            });
            for (std::size_t i = 0; i < all.size(); ++i) {
                const auto expected = static_cast<float>(all[i]);
                if (std::isfinite(expected))
                    ASSERT_EQ(bits_of(wide[i]), bits_of(expected)) << i;
                else
                    ASSERT_FALSE(std::abs(wide[i]) <= fp16_max) << i;
            }
        });
    });
}

TEST(Half, WidensRowsOfAnyLength) {
    const std::vector<Eigen::half> all = every_half();
    in_both_modes([&](const auto& run) {
        for_each_isa([&](Isa isa) {
            for (Index count = 0; count < 70; ++count) {
                const std::vector<float> wide = run([&] {
                    std::vector<float> to(71, -7.0f);
                    kvplane::widen_row(isa, all.data() + 1000, count, to.data());
                    return to;
                });
                for (Index i = 0; i < count; ++i)
                    ASSERT_EQ(bits_of(wide[static_cast<std::size_t>(i)]),
                              bits_of(static_cast<float>(all[static_cast<std::size_t>(1000 + i)])));
                ASSERT_EQ(wide[static_cast<std::size_t>(count)], -7.0f);
            }
        });
    });
}

TEST(Half, NarrowsToNearest) {
    const std::vector<float> all = around_halves();
    in_both_modes([&](const auto& run) {
        for_each_isa([&](Isa isa) {
            const std::vector<Eigen::half> narrow = run([&] {
                std::vector<Eigen::half> to(all.size());
                kvplane::narrow_row(isa, all.data(), static_cast<Index>(all.size()), to.data());
                return to;
            });
            for (std::size_t i = 0; i < all.size(); ++i)
                ASSERT_EQ(narrow[i].x, Eigen::half(all[i]).x) << all[i];
        });
    });
}

/// Of numbers that are not subnormal fp32 themselves: those count as zero where the thread flushes them.
TEST(Half, RoundsBelowAboveAndToNearest) {
    std::vector<float> all = around_halves();
    std::erase_if(all, [](float x) { return x != 0.0f && std::abs(x) < 0x1p-126f; });
    while (all.size() % 16 != 0) all.push_back(0.0f);
    in_both_modes([&](const auto& run) {
        for_each_isa([&](Isa isa) {
            const auto below = run([&] {
                return rounded(isa, all,
                               [](auto lanes, auto& x) KVPLANE_BODY { simd::round_below<lanes>(x); });
            });
            const auto above = run([&] {
                return rounded(isa, all, [](auto lanes, auto& x) KVPLANE_BODY {
                    x = x < 0.0f ? -x : x;
                    simd::round_above<lanes>(x);
                });
            });
            const auto nearest = run([&] {
                return rounded(isa, all,
                               [](auto lanes, auto& x) KVPLANE_BODY { simd::round_nearest<lanes>(x); });
            });
            const auto expect = [](float x, Eigen::half expected) {
                // A zero comes out positive.
                ASSERT_EQ(bits_of(x), bits_of(static_cast<float>(expected) + 0.0f)) << x;
            };
            for (std::size_t i = 0; i < all.size(); ++i) {
                expect(below[i], kvplane::half_below(all[i]));
                expect(above[i], kvplane::half_above(std::abs(all[i])));
                expect(nearest[i], Eigen::half(all[i]));
            }
        });
    });
}

}  // namespace
