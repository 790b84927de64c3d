// Factors with AVX-512 are those of any lanes, and the nearest integers.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kvplane/attention/kernels/avx512_factors.hpp"
#include "test_support.hpp"

namespace {

#if defined(KVPLANE_X86)
using namespace kvplane;

/// What comes of some rows.
struct Made {
    std::vector<std::int8_t> high, low;  ///< low is empty where factors are narrow
    std::vector<float> worth, base;
    int factor(std::size_t at) const { return low.empty() ? high[at] : 256 * high[at] + low[at]; }
};

TEST(Factors, WithAvx512AreThoseOfAnyLanes) {
    if (!is_supported(Isa::avx512)) GTEST_SKIP() << "this machine lacks AVX512_VNNI";
    std::mt19937_64 random(kvplane_test::seed());
    std::normal_distribution<float> normal;
    for (int round = 0; round < 400; ++round) {
        const auto below = [&](int end) { return static_cast<Index>(random() % static_cast<unsigned>(end)); };
        const Index rows = 1 + below(33), count = 1 + below(300), stride = count + below(20),
                    depth = detail::padded_depth(count), factor_stride = depth + 32 * below(3);
        const bool wide = below(2) == 0, lowers = below(2) == 0, unread = !wide && below(3) == 0;
        const auto size = [](Index a, Index b) { return static_cast<std::size_t>(a * b); };
        std::vector<float> x(size(rows, stride)), folded(size(4, depth)), of_unread(size(1, depth));
        for (float& value : x) value = normal(random);
        for (float& value : of_unread) value = normal(random);
        // Some rows have nothing, or nothing that counts.
        if (below(4) == 0) std::fill_n(x.begin() + below(static_cast<int>(rows)) * stride, count, 0.0f);
        if (below(4) == 0) std::fill_n(x.begin() + below(static_cast<int>(rows)) * stride, count, 1e-32f);
        std::vector<Eigen::half> step(size(1, count)), lower(size(1, count));
        for (Eigen::half& value : step) value = Eigen::half(std::abs(normal(random)));
        for (Eigen::half& value : lower) value = Eigen::half(normal(random));

        const auto make = [&](const auto& maker) {
            Made made{std::vector<std::int8_t>(size(rows, factor_stride)),
                      {},
                      std::vector<float>(size(1, rows)),
                      {}};
            if (wide) made.low = made.high;
            made.base = made.worth;
            maker({.x = x.data(),
                   .stride = stride,
                   .count = count,
                   .step = step.data(),
                   .lower = lowers ? lower.data() : nullptr,
                   .centre = 7.5f,
                   .middle = 7.5f,
                   .middle_below = 3.5f,
                   .depth = depth,
                   .folded = folded.data(),
                   .unread = unread ? of_unread.data() : nullptr,
                   .unread_low = nullptr,
                   .active = nullptr,
                   .active_count = 0,
                   .high = made.high.data(),
                   .low = wide ? made.low.data() : nullptr,
                   .factor_stride = factor_stride,
                   .worth = made.worth.data(),
                   .base = made.base.data()});
            return made;
        };
        const Made with_avx512 =
            make([&](const detail::Factors& f) { detail::avx512::make_factors(f, rows); });
        const Made of_lanes = make([&](const detail::Factors& f) {
            detail::run_on(Isa::avx512, [&](auto lanes) KVPLANE_BODY {
                detail::by_rows(rows, [&](auto together, Index first) KVPLANE_BODY {
                    detail::factor_rows<lanes, together>(f.from_row(first));
                });
            });
        });
        SCOPED_TRACE(std::to_string(rows) + " rows of " + std::to_string(count) +
                     (wide ? ", wide" : ", narrow") + (unread ? ", in part" : ""));
        ASSERT_EQ(with_avx512.worth, of_lanes.worth);
        for (Index r = 0; r < rows; ++r) {
            const auto row = static_cast<std::size_t>(r);
            double reach = 0.0;  // of sums, which are rounded otherwise where products are fused with them
            for (Index i = 0; i < depth; ++i) {
                const auto at = static_cast<std::size_t>(r * factor_stride + i);
                const double of_x = i < count
                                        ? static_cast<double>(x[static_cast<std::size_t>(r * stride + i)])
                                        : 0.0,
                             of_step =
                                 i < count ? static_cast<double>(step[static_cast<std::size_t>(i)]) : 0.0,
                             worth = static_cast<double>(with_avx512.worth[row]),
                             exact = worth > 0.0 ? of_x * of_step / worth : 0.0;
                ASSERT_NEAR(with_avx512.factor(at), exact, 0.51) << "row " << r << ", column " << i;
                ASSERT_NEAR(of_lanes.factor(at), exact, 0.51) << "row " << r << ", column " << i;
                if (i < count)
                    reach +=
                        std::abs(of_x) *
                        (16.0 * of_step + std::abs(static_cast<double>(lower[static_cast<std::size_t>(i)])));
            }
            ASSERT_NEAR(with_avx512.base[row], of_lanes.base[row], 1e-5 * reach) << "row " << r;
        }
    }
}
#endif

}  // namespace
