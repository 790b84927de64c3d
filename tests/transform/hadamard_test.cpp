#include "kvplane/transform/hadamard.hpp"

#include <gtest/gtest.h>

#include <random>

#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;

Matrix normal_matrix(std::mt19937_64& random, Index rows, Index cols) {
    std::normal_distribution<float> normal;
    Matrix matrix(rows, cols);
    for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = normal(random);
    return matrix;
}

class HadamardOf : public testing::TestWithParam<Index> {};

/// The matrix of the transform, row by row.
Matrix matrix_of(const Hadamard& rotation) {
    Matrix identity = Matrix::Identity(rotation.channels(), rotation.channels());
    rotation.rotate(identity);
    return identity;
}

TEST_P(HadamardOf, IsOrthonormal) {
    const Matrix r = matrix_of(Hadamard(GetParam(), 3));
    EXPECT_LT((r * r.transpose() - Matrix::Identity(GetParam(), GetParam())).cwiseAbs().maxCoeff(), 1e-6f);
}

TEST_P(HadamardOf, BackIsTheInverse) {
    std::mt19937_64 random(kvplane_test::seed());
    const Hadamard rotation(GetParam());
    const Matrix x = normal_matrix(random, 10, 3 * GetParam());
    Matrix y = x;
    rotation.rotate(y);
    if (GetParam() > 1) {
        EXPECT_GT((y - x).norm(), 0.1f * x.norm());
    }
    rotation.rotate_back(y);
    EXPECT_LT((y - x).cwiseAbs().maxCoeff(), 4e-6f);
}

TEST_P(HadamardOf, KeepsScoresWhenTheQueryIsRotatedToo) {
    std::mt19937_64 random(kvplane_test::seed());
    const Hadamard rotation(GetParam());
    Matrix q = normal_matrix(random, 5, GetParam()), k = normal_matrix(random, 7, GetParam());
    const Matrix scores = q * k.transpose();
    rotation.rotate(q);
    rotation.rotate(k);
    EXPECT_LT((q * k.transpose() - scores).cwiseAbs().maxCoeff(), 1e-4f);
}

/// Blocks of the largest powers of two: within a block every entry has the magnitude 1 / sqrt(size).
TEST_P(HadamardOf, SpreadsEachChannelOverItsWholeBlock) {
    const Matrix r = matrix_of(Hadamard(GetParam(), 11)).cwiseAbs();
    for (Index first = 0, size; first < GetParam(); first += size) {
        size = 1;
        while (2 * size <= GetParam() - first) size *= 2;
        const float entry = 1.0f / std::sqrt(static_cast<float>(size));
        const Matrix expected = Matrix::Constant(size, size, entry);
        EXPECT_LT((r.block(first, first, size, size) - expected).cwiseAbs().maxCoeff(), 1e-6f);
        EXPECT_EQ(r.middleRows(first, size).cwiseAbs().sum() > 0,
                  r.block(first, first, size, size).cwiseAbs().sum() > 0);
        EXPECT_FLOAT_EQ(r.middleRows(first, size).squaredNorm(),
                        r.block(first, first, size, size).squaredNorm());
    }
}

TEST_P(HadamardOf, FollowsFromTheSeed) {
    EXPECT_EQ(matrix_of(Hadamard(GetParam(), 5)), matrix_of(Hadamard(GetParam(), 5)));
    if (GetParam() >= 64) {
        EXPECT_NE(matrix_of(Hadamard(GetParam(), 5)), matrix_of(Hadamard(GetParam(), 6)));
    }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, HadamardOf, testing::Values(1, 2, 7, 33, 64, 80, 96, 128, 256));

TEST(Hadamard, SignsAreTheSameOnEveryMachine) {
    // SplitMix64 from seed 0: the sign is the top bit of each output (e220a8397b1dcdaf, 6e789e6aa1b965f4,
    // 06c45d188009454f, f88bb8a8724c81ec).
    const Matrix r = matrix_of(Hadamard(4, 0));
    EXPECT_FLOAT_EQ(r(0, 0), -0.5f);
    EXPECT_FLOAT_EQ(r(1, 0), 0.5f);
    EXPECT_FLOAT_EQ(r(2, 0), 0.5f);
    EXPECT_FLOAT_EQ(r(3, 0), -0.5f);
}

TEST(Hadamard, AnOutlierChannelIsSpreadOut) {
    Matrix x = Matrix::Zero(1, 64);
    x(0, 17) = 100.0f;
    Hadamard(64).rotate(x);
    EXPECT_FLOAT_EQ(x.cwiseAbs().maxCoeff(), 12.5f);
}

TEST(Hadamard, RefusesWhatDoesNotFit) {
    kvplane_test::refusal(ErrorCode::option, [] { Hadamard rotation(0); });
    Matrix x = Matrix::Zero(2, 100);
    const std::string sentence = kvplane_test::refusal(ErrorCode::shape, [&] { Hadamard(64).rotate(x); });
    EXPECT_NE(sentence.find("100 channels"), std::string::npos);
}

TEST(HadamardKernels, GiveTheSameBitsOnEveryInstructionSet) {
    const kvplane::Isa before = kvplane::current_isa();
    std::mt19937_64 random(kvplane_test::seed());
    for (const kvplane::Index channels : {1, 2, 3, 8, 16, 48, 64, 80, 96, 128, 250, 256}) {
        const kvplane::Hadamard hadamard(channels, 5);
        const kvplane::Matrix input = kvplane_test::normal_matrix(3, 2 * channels, random);
        kvplane::force_isa(kvplane::Isa::scalar);
        kvplane::Matrix expected = input, back;
        hadamard.rotate(expected);
        back = expected;
        hadamard.rotate_back(back);
        EXPECT_LE((back - input).cwiseAbs().maxCoeff(), 1e-5f) << channels;
        for (const kvplane::Isa isa : kvplane::supported_isas()) {
            kvplane::force_isa(isa);
            kvplane::Matrix rotated = input;
            hadamard.rotate(rotated);
            EXPECT_EQ(rotated, expected) << channels << " " << name(isa);
            hadamard.rotate_back(rotated);
            EXPECT_EQ(rotated, back) << channels << " " << name(isa);
            // Column by column in memory, and a part of a larger matrix.
            Eigen::MatrixXf columns = input;
            hadamard.rotate(columns);
            EXPECT_EQ(kvplane::Matrix(columns), expected);
        }
    }
    kvplane::force_isa(before);
}

}  // namespace
