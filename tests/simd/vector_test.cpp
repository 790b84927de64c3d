// What kernels do with vectors beyond arithmetic, on every instruction set, against plain loops.
#include "kvplane/simd/vector.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

namespace simd = kvplane::detail::simd;
using kvplane::Index;
using kvplane::Isa;
using kvplane_test::for_each_isa;
using kvplane_test::Random;

/// 4 rows of 16 numbers, small integers so that sums are exact in any order.
std::array<float, 64> four_rows(Random& random) {
    std::array<float, 64> rows;
    for (float& x : rows) x = static_cast<float>(static_cast<int>(random() % 2001) - 1000);
    return rows;
}

TEST(Vector, ReducesFourRowsAtOnce) {
    Random random(kvplane_test::seed());
    for (int round = 0; round < 100; ++round) {
        const std::array<float, 64> numbers = four_rows(random);
        for_each_isa([&](Isa isa) {
            float sums[4], tops[4], all[4];
            const int lanes = kvplane::detail::run_on(isa, [&](auto lanes) KVPLANE_BODY {
                simd::Floats<lanes> rows[4];
                for (int r = 0; r < 4; ++r) simd::load(rows[r], numbers.data() + r * lanes);
                simd::reduce_rows<lanes>(rows, sums, simd::plus);
                simd::reduce_rows<lanes>(rows, tops, simd::larger);
                for (int r = 0; r < 4; ++r) all[r] = simd::sum_lanes<lanes>(rows[r]);
                return int{lanes};
            });
            for (int r = 0; r < 4; ++r) {
                const float* const row = numbers.data() + r * lanes;
                float sum = 0.0f;
                for (int i = 0; i < lanes; ++i) sum += row[i];
                EXPECT_EQ(sums[r], sum);
                EXPECT_EQ(all[r], sum);
                EXPECT_EQ(tops[r], *std::max_element(row, row + lanes));
            }
        });
    }
}

TEST(Vector, SetsTheFirstLanes) {
    for_each_isa([&](Isa isa) {
        for (int count = -2; count <= 18; ++count) {
            std::array<std::int32_t, 16> mask{};
            const int lanes = kvplane::detail::run_on(isa, [&](auto lanes) KVPLANE_BODY {
                simd::Ints<lanes> first;
                simd::first_lanes<lanes>(first, count);
                simd::store(mask.data(), first);
                return int{lanes};
            });
            for (int i = 0; i < lanes; ++i)
                EXPECT_EQ(mask[static_cast<std::size_t>(i)], i < count ? -1 : 0) << count;
        }
    });
}

/// Halves of vectors, as sums in double take them.
TEST(Vector, WidensToDoubles) {
    Random random(kvplane_test::seed());
    const std::array<float, 64> numbers = four_rows(random);
    for_each_isa([&](Isa isa) {
        std::array<double, 8> wide{};
        const int count = kvplane::detail::run_on(isa, [&](auto lanes) KVPLANE_BODY {
            constexpr int half = lanes / 2;
            simd::Floats<half> narrow;
            simd::Vector<double, half> doubles;
            simd::load(narrow, numbers.data());
            simd::widen_doubles<half>(doubles, narrow);
            simd::store(wide.data(), doubles);
            return int{half};
        });
        for (int i = 0; i < count; ++i)
            EXPECT_EQ(wide[static_cast<std::size_t>(i)],
                      static_cast<double>(numbers[static_cast<std::size_t>(i)]));
    });
}

/// Wherever the extreme stands. 4 and 8 lanes: what row_extremes() takes.
TEST(Vector, FindsTheLeastAndTheGreatestLane) {
    Random random(kvplane_test::seed());
    for (int round = 0; round < 100; ++round) {
        const std::array<float, 64> numbers = four_rows(random);
        for_each_isa([&](Isa isa) {
            float least, greatest;
            const int count = kvplane::detail::run_on(isa, [&](auto lanes) KVPLANE_BODY {
                constexpr int few = lanes < 8 ? int{lanes} : 8;
                simd::Floats<few> x;
                simd::load(x, numbers.data());
                simd::across_lanes<few>(x, x, least, greatest);
                return few;
            });
            EXPECT_EQ(least, *std::min_element(numbers.begin(), numbers.begin() + count));
            EXPECT_EQ(greatest, *std::max_element(numbers.begin(), numbers.begin() + count));
        });
    }
}

TEST(Vector, SeesOneLaneThatIsNotSet) {
    for_each_isa([&](Isa isa) {
        kvplane::detail::run_on(isa, [&](auto lanes) KVPLANE_BODY {
            simd::Ints<lanes> mask = simd::Ints<lanes>{} - 1;
            EXPECT_TRUE(simd::all_set<lanes>(mask));
            for (int i = 0; i < lanes; ++i) {
                mask[i] = 0;
                EXPECT_FALSE(simd::all_set<lanes>(mask)) << i;
                mask[i] = -1;
            }
        });
    });
}

TEST(Vector, StoresTheLowByteOfEveryLane) {
    for_each_isa([&](Isa isa) {
        std::array<std::uint8_t, 17> bytes;
        bytes.fill(0xEE);
        const int count = kvplane::detail::run_on(isa, [&](auto lanes) KVPLANE_BODY {
            simd::Ints<lanes> x;
            for (int i = 0; i < lanes; ++i) x[i] = (0x12345600 | (17 * i + 3)) - 0x7FFFFFFF;
            simd::store_low_bytes<lanes>(bytes.data(), x);
            return int{lanes};
        });
        for (int i = 0; i < count; ++i)
            EXPECT_EQ(bytes[static_cast<std::size_t>(i)], (17 * i + 4) % 256) << i;
        EXPECT_EQ(bytes[static_cast<std::size_t>(count)], 0xEE);
    });
}

TEST(Vector, TakesRowsFourAtATimeAndThenTheRest) {
    for (Index rows = 0; rows < 14; ++rows) {
        std::vector<std::array<Index, 2>> calls, expected;
        simd::by_rows(rows, [&](auto count, Index first) { calls.push_back({count, first}); });
        for (Index row = 0; row < rows; row += 4) expected.push_back({std::min<Index>(4, rows - row), row});
        EXPECT_EQ(calls, expected) << rows;
    }
}

std::vector<float> exponentials(Isa isa, std::vector<float> x) {
    while (x.size() % 16 != 0) x.push_back(0.0f);
    kvplane::detail::run_on(isa, [&](auto lanes) KVPLANE_BODY {
        for (std::size_t i = 0; i < x.size(); i += lanes) {
            simd::Floats<lanes> some;
            simd::load(some, x.data() + i);
            simd::exponential<lanes>(some);
            simd::store(x.data() + i, some);
        }
    });
    return x;
}

/// Two-sided: an error below 1e-8 would say that what was compared is not fp32.
TEST(Exponential, IsOffByWhatItSays) {
    std::vector<float> x;
    for (int i = 0; i <= 400000; ++i) x.push_back(-87.0f * static_cast<float>(i) / 400000.0f);
    for_each_isa([&](Isa isa) {
        const std::vector<float> y = exponentials(isa, x);
        double largest = 0.0;
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double exact = std::exp(static_cast<double>(x[i]));
            const double off = std::abs(y[i] / exact - 1.0);
            ASSERT_LE(off, 3e-7 + 8e-8 * std::abs(static_cast<double>(x[i]))) << x[i];
            ASSERT_LE(off * exact, 3e-7) << x[i];
            largest = std::max(largest, off * exact);
        }
        EXPECT_GT(largest, 1e-8);
    });
}

TEST(Exponential, EndsInZeroAndIsNearlyOneAtZero) {
    for_each_isa([&](Isa isa) {
        const float infinity = std::numeric_limits<float>::infinity();
        const std::vector<float> y =
            exponentials(isa, {-88.0f, -100.0f, -1e30f, -std::numeric_limits<float>::max(), -infinity, 0.0f});
        for (int i = 0; i < 5; ++i) EXPECT_EQ(y[static_cast<std::size_t>(i)], 0.0f) << i;
        EXPECT_NEAR(y[5], 1.0f, 1.2e-7f);
    });
}

}  // namespace
