// Grids of the scheme `unbiased`: their definition, what theorem T16 promises, bounds, padding, input types.
#include "kvplane/quantize/unbiased.hpp"

#include <cmath>

#include "kvplane/storage/quantized.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

Quantized unbiased(const Matrix& values, int bits, Index group, Index heads = 1) {
    return per_group(values,
                     {.bits = bits, .scheme = Scheme::unbiased, .group_channels = group, .heads = heads});
}

/// Codes and steps of every group, on every instruction set, for runs that fill vectors and that do not.
TEST(Unbiased, IsItsDefinition) {
    Random random(seed());
    for (const auto& [name, values] : difficult_matrices(20, 66, random))
        for (const Index group : {5, 16, 33, 66})
            for (int bits = 1; bits <= 8; ++bits)
                for_each_isa([&, &x = values, &input = name](Isa) {
                    const Quantized q = unbiased(x, bits, group);
                    for (Index t = 0; t < x.rows(); ++t)
                        for (Index first = 0; first < x.cols(); first += group) {
                            const Index size = std::min(group, x.cols() - first);
                            const UnbiasedGroup expected(x.block(t, first, 1, size), bits);
                            for (Index c = first; c < first + size; ++c) {
                                ASSERT_EQ(q.grid(t, c).step, expected.step)
                                    << input << ", " << bits << " bits, group " << group << ", token " << t;
                                ASSERT_EQ(q.code(t, c), expected.encode(x(t, c)))
                                    << input << ", " << bits << " bits, group " << group << ", token " << t;
                            }
                        }
                });
}

/// Half a step of the depth, and what excess says, hold for every value at every depth.
TEST(Unbiased, KeepsItsBounds) {
    Random random(seed());
    for (const auto& [name, values] : difficult_matrices(40, 48, random))
        for (int bits = 1; bits <= 8; ++bits) {
            const Quantized q = unbiased(values, bits, 24);
            for (int depth = 1; depth <= bits; ++depth) {
                const Matrix off = values - q.dequantize(depth);
                EXPECT_LE(off.cwiseAbs().maxCoeff(), q.error_bound(depth) * (1.0 + 1e-6))
                    << name << ", " << depth << " of " << bits;
                EXPECT_LE(off.cast<double>().norm(), q.frobenius_error_bound(depth) * (1.0 + 1e-6))
                    << name << ", " << depth << " of " << bits;
            }
        }
}

/// A byte a group: 2 bits of 64 channels take 2.125.
TEST(Unbiased, TakesAByteAGrid) {
    Random random(seed());
    EXPECT_EQ(unbiased(normal_matrix(8, 64, random), 2, 64).bits_per_element(), 2.125);
    EXPECT_EQ(unbiased(normal_matrix(8, 64, random), 3, 32).bits_per_element(), 3.25);
}

TEST(Unbiased, IsTheSameOfEveryInputType) {
    Random random(seed());
    const RowMajorMatrix<Eigen::bfloat16> input = normal_matrix(9, 40, random).cast<Eigen::bfloat16>();
    const Matrix widened = input.cast<float>();
    const PerTokenOptions options{.bits = 3, .scheme = Scheme::unbiased, .heads = 2};
    const Matrix expected = per_token(widened, options).dequantize();
    EXPECT_EQ(per_token(input, options).dequantize(), expected);
    const RowMajorMatrix<Eigen::half> halves = widened.cast<Eigen::half>();
    EXPECT_EQ(per_token(halves, options).dequantize(),
              per_token(Matrix(halves.cast<float>()), options).dequantize());
}

/// T16: <x', x> = <x, x>, of every token nearly and on average closely, although steps are rounded. So sums
/// over n tokens are not short of what they should be. The step of least squared error makes them so by
/// 1 - rho^2, where rho is the cosine of q and x.
TEST(Unbiased, DoesNotShrinkSums) {
    Random random(seed());
    constexpr Index dim = 64;
    const double least_squares_shrinkage[] = {0.3634, 0.1188, 0.0374, 0.0115};  // 1 - E rho^2 of Gaussians
    for (int bits = 1; bits <= 4; ++bits) {
        double kept = 0.0, least_kept = 0.0;
        // All tokens share a part along `common`, as values under one head of attention do.
        const Matrix common = normal_matrix(1, dim, random);
        for (const Index tokens : {1, 16, 256, 4096}) {
            const Matrix x = Matrix(normal_matrix(tokens, dim, random).rowwise() + common.row(0));
            const Quantized q = unbiased(x, bits, dim);
            const Matrix close = q.dequantize();
            double along = 0.0, least_along = 0.0, all = 0.0, deviations = 0.0;
            for (Index t = 0; t < tokens; ++t) {
                const double xx = x.row(t).cast<double>().squaredNorm(),
                             xc = x.row(t).cast<double>().dot(close.row(t).cast<double>()),
                             cc = close.row(t).cast<double>().squaredNorm();
                deviations += (xc / xx - 1.0) * (xc / xx - 1.0);
                along += xc;
                least_along += xc * xc / cc;
                all += xx;
            }
            if (bits > 1) {
                EXPECT_LE(std::sqrt(deviations / static_cast<double>(tokens)), 0.04) << bits << " bits";
            }
            kept = along / all;
            least_kept = least_along / all;
        }
        EXPECT_NEAR(kept, 1.0, 0.002) << bits << " bits, over 4096 tokens";
        EXPECT_NEAR(1.0 - least_kept, least_squares_shrinkage[bits - 1],
                    0.1 * least_squares_shrinkage[bits - 1])
            << bits << " bits";
    }
}

/// T16, errors: |x' - x|^2 = |x|^2 (1 / rho^2 - 1) for the exact step.
TEST(Unbiased, ErrsByItsCosine) {
    Random random(seed());
    for (int bits = 1; bits <= 4; ++bits) {
        const Matrix x = normal_matrix(512, 128, random);
        const Matrix close = unbiased(x, bits, 128).dequantize();
        double expected = 0.0, found = 0.0;
        for (Index t = 0; t < x.rows(); ++t) {
            const Eigen::RowVectorXd a = x.row(t).cast<double>(), b = close.row(t).cast<double>();
            const double cosine = a.dot(b) / (a.norm() * b.norm());
            expected += a.squaredNorm() * (1.0 / (cosine * cosine) - 1.0);
            found += (a - b).squaredNorm();
        }
        // What rounding steps to 3 bits of fraction adds: (1/16)^2 / 3 / 1.4 of |x|^2 at most.
        EXPECT_NEAR(found, expected, 0.0011 * x.squaredNorm()) << bits << " bits";
    }
}

TEST(Unbiased, RefusesWhatItIsNotFor) {
    const Matrix x = Matrix::Ones(4, 8);
    EXPECT_THROW(per_channel(x, {.scheme = Scheme::unbiased}), Error);
    EXPECT_THROW(per_token(x, {.scheme = Scheme::unbiased, .clip = Clip::mse_optimal}), Error);
    EXPECT_THROW(per_token(x, {.bits = 9, .scheme = Scheme::unbiased}), Error);
}

}  // namespace
