// tests/test_inputs.hpp: inputs of controlled difficulty, and the loop over instruction sets.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kvplane/matrix.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/simd/isa.hpp"

namespace kvplane_test {

using Random = std::mt19937_64;

inline kvplane::Matrix normal_matrix(kvplane::Index tokens, kvplane::Index channels, Random& random) {
    std::normal_distribution<float> normal;
    return kvplane::Matrix::NullaryExpr(tokens, channels, [&] { return normal(random); });
}

inline kvplane::Matrix uniform_matrix(kvplane::Index tokens, kvplane::Index channels, float low, float high,
                                      Random& random) {
    std::uniform_real_distribution<float> uniform(low, high);
    return kvplane::Matrix::NullaryExpr(tokens, channels, [&] { return uniform(random); });
}

struct NamedMatrix {
    std::string name;
    kvplane::Matrix values;
};

/// A group of values in the scheme `unbiased` by its definition, in the library's order of sums.
struct UnbiasedGroup {
    template <class Derived>
    UnbiasedGroup(const Eigen::DenseBase<Derived>& values, int bits) {
        const auto sum = [&](const auto& term) {
            double sums[16] = {};
            for (kvplane::Index i = 0; i < values.size(); ++i) sums[i % 16] += term(i);
            for (int width = 8; width > 0; width /= 2)
                for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
            return sums[0];
        };
        const auto value = [&](kvplane::Index i) {
            return static_cast<float>(
                values.derived()(values.rows() == 1 ? 0 : i, values.rows() == 1 ? i : 0));
        };
        const double squared =
            sum([&](kvplane::Index i) { return static_cast<double>(value(i)) * value(i); });
        constexpr float widths[] = {1.596f, 0.9957f, 0.5860f, 0.3352f, 0.1881f, 0.1041f, 0.0568f, 0.0307f};
        const float width =
            widths[bits - 1] * static_cast<float>(std::sqrt(squared / static_cast<double>(values.size())));
        cells.bits = bits;
        if (width >= 0x1p-26f) {
            cells.step = width;
            cells.lower = -std::ldexp(width, bits - 1);
        }
        const double product = sum([&](kvplane::Index i) {
            return static_cast<double>(value(i)) * (cells.encode(value(i)) + 0.5 - std::ldexp(0.5, bits));
        });
        if (product <= 0.0) return;
        const double exact = squared / product;
        // To 4 significant bits, ties away from zero, not below 2^-17.
        const double wanted = static_cast<double>(
            static_cast<float>(Eigen::half(std::min(static_cast<float>(exact), 61440.0f))));
        int exponent = 0;
        std::frexp(wanted, &exponent);
        const double unit = std::ldexp(1.0, std::max(exponent - 4, -17));
        step = static_cast<float>(std::floor(wanted / unit + 0.5) * unit);
        // The cells for which this step has no bias.
        constexpr double elasticities[] = {0.0, 0.5445, 0.7964, 0.9153, 0.9670, 0.9879, 0.9957, 0.9985};
        if (bits == 1 || step == 0.0f || cells.step == 0.0f) return;
        const double wider =
            1.0 + std::max(-0.25, std::min(0.25, (step / exact - 1.0) / elasticities[bits - 1]));
        lower = static_cast<float>(wider * static_cast<double>(cells.lower));
        cells.lower = lower;
        inverse = -std::ldexp(0.5f, bits) / lower;
    }
    /// The code of one of the values.
    int encode(float x) const {
        if (inverse == 0.0f) return cells.encode(x);
        return static_cast<int>(
            std::min(std::max((x - lower) * inverse, 0.0f), static_cast<float>(cells.codes() - 1)));
    }
    kvplane::Grid cells;  ///< by which codes are chosen at first
    float lower = 0.0f, inverse = 0.0f;
    float step = 0.0f;  ///< as stored
};

/// What quantizers get wrong: outliers, huge means, constants, signed zeros, subnormals of both formats.
inline std::vector<NamedMatrix> difficult_matrices(kvplane::Index tokens, kvplane::Index channels,
                                                   Random& random) {
    using kvplane::Index;
    const kvplane::Matrix normal = normal_matrix(tokens, channels, random);
    kvplane::Matrix outlier_channels = normal, outlier_values = normal, signed_zeros = normal, steps = normal;
    for (Index c = 0; c < channels; c += 5) outlier_channels.col(c) *= 1000.0f;
    for (Index i = 3; i < outlier_values.size(); i += 37) outlier_values.data()[i] *= 1000.0f;
    for (Index i = 0; i < signed_zeros.size(); ++i)
        signed_zeros.data()[i] = i % 3 == 0 ? 0.0f : i % 3 == 1 ? -0.0f : normal.data()[i];
    for (Index i = 0; i < steps.size(); ++i) steps.data()[i] = normal.data()[i] < 0.0f ? -2.0f : 0.1f;
    return {
        {"normal", normal},
        {"outlier channels", outlier_channels},
        {"outlier values", outlier_values},
        {"huge mean", kvplane::Matrix(3000.0f + 0.01f * normal.array())},
        {"negative", kvplane::Matrix(-1.0f - normal.array().abs())},
        {"two values", steps},
        {"constant", kvplane::Matrix::Constant(tokens, channels, 0.1f)},
        {"zero", kvplane::Matrix::Zero(tokens, channels)},
        {"signed zeros", signed_zeros},
        {"fp16 subnormal", kvplane::Matrix(1e-6f * normal)},
        {"fp32 subnormal", kvplane::Matrix(1e-40f * normal)},
        {"nearly the fp16 range", uniform_matrix(tokens, channels, -30000.0f, 30000.0f, random)},
    };
}

/// fp16 numbers of the scales 2^0 to 2^-24, the smallest of them subnormal fp16.
inline std::vector<NamedMatrix> half_matrices(kvplane::Index tokens, kvplane::Index channels,
                                              Random& random) {
    std::vector<NamedMatrix> matrices;
    for (int scale = 0; scale <= 24; ++scale)
        matrices.push_back(
            {"2^-" + std::to_string(scale),
             kvplane::Matrix((std::ldexp(1.0f, -scale) * normal_matrix(tokens, channels, random))
                                 .cast<Eigen::half>()
                                 .cast<float>())});
    return matrices;
}

/// Runs body(isa) with every instruction set of this machine forced, and fails if that was none.
template <class Body>
void for_each_isa(const Body& body) {
    const kvplane::Isa before = kvplane::current_isa();
    int reached = 0;
    for (const kvplane::Isa isa : kvplane::supported_isas()) {
        const testing::ScopedTrace trace(__FILE__, __LINE__, "instruction set " + std::string(name(isa)));
        kvplane::force_isa(isa);
        ASSERT_EQ(kvplane::current_isa(), isa);
        body(isa);
        ++reached;
    }
    kvplane::force_isa(before);
    EXPECT_GT(reached, 0) << "no instruction set was reached";
}

/// The number of elements in which two matrices differ, bit for bit (shapes must agree).
template <class A, class B>
kvplane::Index differing(const A& a, const B& b) {
    if (a.rows() != b.rows() || a.cols() != b.cols()) return a.size() + b.size() + 1;
    kvplane::Index count = 0;
    for (kvplane::Index i = 0; i < a.rows(); ++i)
        for (kvplane::Index j = 0; j < a.cols(); ++j) count += !(a(i, j) == b(i, j));
    return count;
}

}  // namespace kvplane_test
