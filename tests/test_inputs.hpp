// tests/test_inputs.hpp: inputs of controlled difficulty, and the loop over instruction sets.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kvplane/simd/isa.hpp"
#include "kvplane/matrix.hpp"

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
