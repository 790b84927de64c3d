// T1, T2 and T3 of the theorems: each bound against what the library's own quantizers do, on synthetic
// tensors, on keys and values of a real model, and at the edges; each shown tight.
#include <Eigen/Eigenvalues>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "kvplane/io/safetensors.hpp"
#include "kvplane/storage/quantized.hpp"
#include "kvplane/theory/bounds.hpp"
#include "real_layers.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::ErrorCode;
using kvplane::Grid;
using kvplane::Index;
using kvplane::Matrix;
using kvplane::MatrixD;
using kvplane::Quantized;
using kvplane::Scheme;
using kvplane_test::difficult_matrices;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::real_layers;
using kvplane_test::RealLayer;
using kvplane_test::refusal;
using kvplane_test::uniform_matrix;
namespace theory = kvplane::theory;

constexpr Scheme all_schemes[] = {Scheme::cell, Scheme::min_max, Scheme::symmetric};

int least_bits(Scheme scheme) {
    return scheme == Scheme::symmetric ? 2 : 1;
}

double theory_step(Scheme scheme, double min, double max, int bits) {
    if (scheme == Scheme::cell) return theory::cell_step(max - min, bits);
    if (scheme == Scheme::min_max) return theory::min_max_step(max - min, bits);
    return theory::symmetric_step(std::max(std::abs(min), std::abs(max)), bits);
}

// -- T1 ---------------------------------------------------------------------------------------------------

TEST(T1, IsTheFormula) {
    EXPECT_EQ(theory::cell_step(3.0, 2), 0.75);
    EXPECT_EQ(theory::min_max_step(3.0, 2), 1.0);
    EXPECT_EQ(theory::symmetric_step(3.0, 3), 1.0);
    EXPECT_EQ(theory::read_error_bound(1.0, 4, 4), 0.5);
    EXPECT_EQ(theory::read_error_bound(1.0, 4, 1), 4.0);
    for (int bits = 1; bits <= 8; ++bits) {
        EXPECT_EQ(theory::read_error_bound(theory::cell_step(7.0, bits), bits, 1), 7.0 / 4.0)
            << "one bit of any code knows which half of the interval";
        EXPECT_LT(theory::cell_step(7.0, bits), theory::min_max_step(7.0, bits));
    }
    EXPECT_EQ(theory::cell_step(0.0, 8), 0.0);
}

/// All positions inside all cells, in eighths of a cell, between the ends of the data.
Matrix positions(Scheme scheme, float lower, float step, int bits) {
    const int eighths = 8 << bits, margin = scheme == Scheme::cell ? 0 : 4;
    // Symmetric grids use no code 0: -M is the middle of code 1.
    const int first = scheme == Scheme::symmetric ? 8 + margin : margin;
    Matrix values(eighths - margin - first + 1, 1);
    for (Index i = 0; i < values.size(); ++i)
        values(i, 0) = lower + step * static_cast<float>(first + i) / 8.0f;
    return values;
}

/// Every width, every depth, every code, every eighth of a cell, on grids that fp16 holds exactly: the bound
/// holds without any allowance and is reached exactly.
TEST(T1, HoldsAndIsReachedExactlyAtEveryCodeAndDepth) {
    for (const Scheme scheme : all_schemes)
        for (int bits = least_bits(scheme); bits <= 8; ++bits) {
            constexpr float step = 0.25f;
            const float lower =
                scheme == Scheme::symmetric ? -step * (std::ldexp(0.5f, bits) + 0.5f) : -1.375f;
            const Matrix values = positions(scheme, lower, step, bits);
            const Quantized q =
                kvplane::per_channel(values, {.bits = bits, .scheme = scheme, .group_tokens = values.rows()});
            SCOPED_TRACE(testing::Message() << name(scheme) << ", " << bits << " bits");
            ASSERT_EQ(q.grid(0, 0).step, theory_step(scheme, values.minCoeff(), values.maxCoeff(), bits));
            ASSERT_EQ(q.grid(0, 0).lower, lower);
            std::vector<bool> code_seen(static_cast<std::size_t>(1 << bits), false);
            for (Index i = 0; i < values.size(); ++i)
                code_seen[static_cast<std::size_t>(q.code(i, 0))] = true;
            EXPECT_EQ(std::count(code_seen.begin(), code_seen.end(), false),
                      scheme == Scheme::symmetric ? 1 : 0);
            for (int depth = 1; depth <= bits; ++depth) {
                const double bound = theory::read_error_bound(step, bits, depth);
                const MatrixD error = (values - q.dequantize(depth)).cast<double>();
                EXPECT_EQ(error.cwiseAbs().maxCoeff(), bound) << "depth " << depth;
            }
            if (scheme == Scheme::cell) continue;
            const Matrix close = q.dequantize();
            EXPECT_EQ(close(0, 0), values(0, 0)) << "extremes are exact";
            EXPECT_EQ(close(values.rows() - 1, 0), values(values.rows() - 1, 0));
        }
}

/// With grids in fp16 the bound holds for the stored step, but for the rounding of fp32 arithmetic, and the
/// stored step is the one of the theory rounded outward. Returns the largest error in units of its bound.
double expect_bound(const Quantized& q, const Matrix& values, int depth) {
    const Matrix close = q.dequantize(depth);
    double nearest = 0.0;
    for (Index t = 0; t < values.rows(); ++t)
        for (Index c = 0; c < values.cols(); ++c) {
            const Grid grid = q.grid(t, c);
            const double error = std::abs(static_cast<double>(values(t, c)) - close(t, c));
            if (grid.step == 0.0f) {
                EXPECT_LE(error, std::max(std::abs(values(t, c)) * 0x1p-11, 0x1p-25)) << "one value, to fp16";
                continue;
            }
            const double bound = theory::read_error_bound(grid.step, q.bits(), depth);
            const double rounding = 0x1p-22 * (std::abs(grid.lower) + std::ldexp(grid.step, q.bits()));
            EXPECT_LE(error, bound + rounding) << "token " << t << ", channel " << c;
            nearest = std::max(nearest, error / bound);
        }
    return nearest;
}

TEST(T1, HoldsForStoredStepsOnDifficultInput) {
    Random random(kvplane_test::seed());
    for (const auto& [input_name, values] : difficult_matrices(64, 33, random))
        for (const Scheme scheme : all_schemes)
            for (int bits = least_bits(scheme); bits <= 8; ++bits) {
                SCOPED_TRACE(testing::Message() << input_name << ", " << name(scheme) << ", " << bits);
                const Quantized keys =
                    kvplane::per_channel(values, {.bits = bits, .scheme = scheme, .group_tokens = 64});
                const Quantized tokens = kvplane::per_token(values, {.bits = bits, .scheme = scheme});
                for (int depth = 1; depth <= bits; ++depth) {
                    expect_bound(keys, values, depth);
                    expect_bound(tokens, values, depth);
                }
                for (Index c = 0; c < values.cols(); ++c) {
                    const Grid grid = keys.grid(0, c);
                    if (grid.step == 0.0f) continue;
                    const double min = values.col(c).minCoeff(), max = values.col(c).maxCoeff();
                    const double step = theory_step(scheme, min, max, bits);
                    const double moved = std::abs(grid.lower) * 0x1p-10 + 0x1p-24;  // lower, to fp16
                    EXPECT_GE(grid.step, step * (1 - 0x1p-20));
                    EXPECT_LE(grid.step, (step + moved / ((1 << bits) - 0.5)) * (1 + 0x1p-9) + 0x1p-24);
                }
            }
}

TEST(T1, HoldsAndIsReachedOnRealKeysAndValues) {
    for (const RealLayer& real : real_layers())
        for (const Scheme scheme : all_schemes)
            for (const int bits : {2, 4, 8}) {
                SCOPED_TRACE(testing::Message()
                             << "layer " << real.layer << ", " << name(scheme) << ", " << bits);
                for (const Matrix* keys : {&real.keys, &real.keys_before_rope}) {
                    const Quantized q =
                        kvplane::per_channel(*keys, {.bits = bits, .scheme = scheme, .heads = 3});
                    for (const int depth : {1, bits}) EXPECT_GT(expect_bound(q, *keys, depth), 0.99);
                }
                const Quantized q =
                    kvplane::per_token(real.values, {.bits = bits, .scheme = scheme, .heads = 3});
                for (const int depth : {1, bits}) EXPECT_GT(expect_bound(q, real.values, depth), 0.99);
            }
}

TEST(T1, RefusesWhatIsNoQuantizer) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    for (const double bad : {-1.0, infinity, -infinity, std::numeric_limits<double>::quiet_NaN()}) {
        const ErrorCode code = bad == -1.0 ? ErrorCode::option : ErrorCode::not_finite;
        refusal(code, [&] { theory::cell_step(bad, 4); });
        refusal(code, [&] { theory::min_max_step(bad, 4); });
        refusal(code, [&] { theory::symmetric_step(bad, 4); });
        refusal(code, [&] { theory::read_error_bound(bad, 4, 4); });
    }
    for (const int bits : {-1, 0}) {
        refusal(ErrorCode::option, [&] { theory::cell_step(1.0, bits); });
        refusal(ErrorCode::option, [&] { theory::min_max_step(1.0, bits); });
        refusal(ErrorCode::option, [&] { theory::read_error_bound(1.0, bits, 1); });
        refusal(ErrorCode::option, [&] { theory::read_error_bound(1.0, 4, bits); });
    }
    refusal(ErrorCode::option, [&] { theory::symmetric_step(1.0, 1); });
    refusal(ErrorCode::option, [&] { theory::read_error_bound(1.0, 4, 5); });
}

// -- T2 ---------------------------------------------------------------------------------------------------

/// A - A' where one grid serves the whole matrix, as the theorem has it, and the step that was stored.
struct OneGridError {
    MatrixD error;
    double step;

    OneGridError(const Matrix& a, Scheme scheme, int bits) {
        const Eigen::Map<const Matrix> as_row(a.data(), 1, a.size());
        const Quantized q = kvplane::per_token(as_row, {.bits = bits, .scheme = scheme});
        const Matrix close = q.dequantize();
        error = a.cast<double>() - Eigen::Map<const Matrix>(close.data(), a.rows(), a.cols()).cast<double>();
        step = q.grid(0, 0).step;
    }
};

double spectral_norm(const MatrixD& a) {
    const MatrixD gram = a.cols() <= a.rows() ? MatrixD(a.transpose() * a) : MatrixD(a * a.transpose());
    const Eigen::SelfAdjointEigenSolver<MatrixD> solver(gram, Eigen::EigenvaluesOnly);
    return std::sqrt(std::max(0.0, solver.eigenvalues().maxCoeff()));
}

/// The largest step that rounding outward to fp16 can make of one.
double rounded_outward(double step) {
    return step * (1.0 + 0x1p-10) + 0x1p-24;
}

/// The whole chain of inequalities, with the step as it is stored.
void expect_chain(const Matrix& a, int bits) {
    const auto [error, step] = OneGridError(a, Scheme::symmetric, bits);
    const double largest = a.cwiseAbs().maxCoeff(), rounding = 1.0 + 0x1p-12;
    const double stored =
        theory::symmetric_frobenius_bound(a.rows(), a.cols(), step * ((1 << (bits - 1)) - 1), bits);
    EXPECT_LE(spectral_norm(error), error.norm() * rounding);
    EXPECT_LE(error.norm(), stored * rounding);
    EXPECT_LE(step, rounded_outward(theory::symmetric_step(largest, bits)));
    EXPECT_GE(step * rounding, theory::symmetric_step(largest, bits));
    EXPECT_LE(theory::symmetric_frobenius_bound(a.rows(), a.cols(), largest, bits),
              theory::symmetric_spectral_bound(a.rows(), a.cols(), spectral_norm(a.cast<double>()), bits) *
                  rounding);
}

TEST(T2, HoldsOnSyntheticMatrices) {
    Random random(kvplane_test::seed());
    for (const auto& [rows, columns] : {std::pair<Index, Index>{1, 1}, {1, 40}, {40, 1}, {48, 33}})
        for (const auto& [input_name, a] : difficult_matrices(rows, columns, random))
            for (int bits = 2; bits <= 8; ++bits) {
                SCOPED_TRACE(testing::Message()
                             << input_name << " " << rows << " x " << columns << ", " << bits << " bits");
                expect_chain(a, bits);
            }
}

TEST(T2, HoldsOnRealKeysAndValues) {
    for (const RealLayer& real : real_layers())
        for (const int bits : {2, 3, 4, 8}) {
            SCOPED_TRACE(testing::Message() << "layer " << real.layer << ", " << bits << " bits");
            for (const Matrix* a : {&real.keys, &real.keys_before_rope, &real.values}) expect_chain(*a, bits);
        }
}

/// The layouts that the library uses have a grid a group: less than one grid for all, never more.
TEST(T2, HoldsForGridsByChannelAndToken) {
    for (const RealLayer& real : real_layers())
        for (const int bits : {2, 4}) {
            const Matrix& a = real.keys;
            const double largest = a.cwiseAbs().maxCoeff();
            const double symmetric = theory::symmetric_frobenius_bound(a.rows(), a.cols(), largest, bits);
            const double cell =
                theory::cell_frobenius_bound(a.rows(), a.cols(), a.maxCoeff() - a.minCoeff(), bits);
            const auto error = [&](const Quantized& q) { return (a - q.dequantize()).norm(); };
            const Scheme two = Scheme::symmetric;
            EXPECT_LE(error(kvplane::per_channel(a, {.bits = bits, .scheme = two})), symmetric);
            EXPECT_LE(error(kvplane::per_token(a, {.bits = bits, .scheme = two})), symmetric);
            EXPECT_LE(error(kvplane::per_channel(a, {.bits = bits, .scheme = Scheme::cell})), cell);
            EXPECT_LE(error(kvplane::per_token(a, {.bits = bits, .scheme = Scheme::cell})), cell);
        }
}

/// Entries half a step from a code, all but the largest: their errors are all the same, so that both norms
/// come within 1% of the Frobenius bound, and at 8 bits, where |A|_2 is nearly M, of the spectral bound.
TEST(T2, IsReachedWhereEveryEntryLiesAtAHalfStep) {
    Random random(kvplane_test::seed());
    for (int bits = 2; bits <= 8; ++bits) {
        constexpr float alpha = 0.25f;
        const int last = (1 << (bits - 1)) - 1;
        std::bernoulli_distribution sign;
        Matrix a = Matrix::NullaryExpr(12, 10, [&] { return sign(random) ? 0.5f * alpha : -0.5f * alpha; });
        a(3, 4) = alpha * static_cast<float>(last);
        const auto [error, step] = OneGridError(a, Scheme::symmetric, bits);
        ASSERT_EQ(step, alpha);
        const double bound = theory::symmetric_frobenius_bound(12, 10, a(3, 4), bits);
        EXPECT_DOUBLE_EQ(bound, std::sqrt(120.0) * alpha / 2);
        EXPECT_DOUBLE_EQ(error.norm(), std::sqrt(119.0) * alpha / 2);
        EXPECT_LE(error.norm(), bound);
        EXPECT_GE(error.norm(), 0.99 * bound);
        EXPECT_GE(spectral_norm(error), 0.99 * bound);
        if (bits < 8) continue;
        const double from_spectral =
            theory::symmetric_spectral_bound(12, 10, spectral_norm(a.cast<double>()), bits);
        EXPECT_GE(spectral_norm(error), 0.99 * from_spectral);
        EXPECT_LE(spectral_norm(error), from_spectral);
    }
    // Where |A|_2 = M the two bounds are the same.
    EXPECT_EQ(theory::symmetric_spectral_bound(5, 5, 3.0, 4),
              theory::symmetric_frobenius_bound(5, 5, 3.0, 4));
}

/// Theorem 3 of arXiv 2502.15075 prints M <= |A - A'|_2. A matrix on the grid has M > 0 and no error.
TEST(T2, ThePrintedLowerBoundIsFalse) {
    for (int bits = 2; bits <= 8; ++bits) {
        const int last = (1 << (bits - 1)) - 1;
        Matrix a(4, 4);
        for (Index i = 0; i < a.size(); ++i)
            a.data()[i] = 0.5f * static_cast<float>(static_cast<int>(i * 7) % (2 * last + 1) - last);
        a(0, 0) = 0.5f * static_cast<float>(last);
        const auto [error, step] = OneGridError(a, Scheme::symmetric, bits);
        EXPECT_EQ(error.cwiseAbs().maxCoeff(), 0.0) << bits;
        EXPECT_FALSE(a.cwiseAbs().maxCoeff() <= spectral_norm(error)) << "the inequality as printed";
    }
}

/// `cell` obeys, and reaches, a stronger bound than two's complement can.
TEST(T2, CellMeetsAStrongerBound) {
    Random random(kvplane_test::seed());
    for (int bits = 1; bits <= 8; ++bits) {
        // Every entry at the edge of a cell of width 1/8.
        std::uniform_int_distribution<int> edge(0, 1 << bits);
        Matrix a =
            Matrix::NullaryExpr(12, 10, [&] { return 0.125f * static_cast<float>(edge(random)) - 1.5f; });
        a(0, 0) = -1.5f;
        a(5, 5) = -1.5f + std::ldexp(0.125f, bits);
        const auto [error, step] = OneGridError(a, Scheme::cell, bits);
        const double bound = theory::cell_frobenius_bound(12, 10, std::ldexp(0.125, bits), bits);
        EXPECT_DOUBLE_EQ(error.norm(), bound) << bits;
    }
    for (const RealLayer& real : real_layers())
        for (int bits = 2; bits <= 8; ++bits) {
            const Matrix& a = real.keys;
            const double range = a.maxCoeff() - a.minCoeff(), largest = a.cwiseAbs().maxCoeff();
            const double cell = theory::cell_frobenius_bound(a.rows(), a.cols(), range, bits);
            const double symmetric = theory::symmetric_frobenius_bound(a.rows(), a.cols(), largest, bits);
            const double codes = std::ldexp(1.0, bits - 1);
            EXPECT_LE(cell * codes / (codes - 1.0), symmetric * (1.0 + 1e-12));
            const auto [error, step] = OneGridError(a, Scheme::cell, bits);
            EXPECT_LE(step, rounded_outward(theory::cell_step(range, bits)));
            EXPECT_LE(error.norm(), cell * step / theory::cell_step(range, bits));
        }
}

TEST(T2, RefusesWhatIsNoMatrix) {
    for (const auto& [rows, columns] : {std::pair<Index, Index>{-1, 4}, {4, -1}}) {
        refusal(ErrorCode::shape,
                [&, r = rows, c = columns] { theory::symmetric_frobenius_bound(r, c, 1.0, 4); });
        refusal(ErrorCode::shape, [&, r = rows, c = columns] { theory::cell_frobenius_bound(r, c, 1.0, 4); });
    }
    refusal(ErrorCode::option, [] { theory::symmetric_frobenius_bound(2, 2, 1.0, 1); });
    refusal(ErrorCode::option, [] { theory::symmetric_spectral_bound(2, 2, -1.0, 4); });
    refusal(ErrorCode::not_finite, [] { theory::cell_frobenius_bound(2, 2, std::nan(""), 4); });
    EXPECT_EQ(theory::cell_frobenius_bound(0, 5, 1.0, 4), 0.0);
}

// -- T3 ---------------------------------------------------------------------------------------------------

enum class Groups { channels, tokens };

/// Squared errors at every width, [bits]; 0 where the scheme has no such width.
std::vector<double> squared_errors(const Matrix& m, Scheme scheme, Groups groups) {
    std::vector<double> errors(9, 0.0);
    for (int bits = least_bits(scheme); bits <= 8; ++bits) {
        const Quantized q = groups == Groups::channels
                                ? kvplane::per_channel(m, {.bits = bits, .scheme = scheme, .heads = 3})
                                : kvplane::per_token(m, {.bits = bits, .scheme = scheme, .heads = 3});
        errors[static_cast<std::size_t>(bits)] =
            (m.cast<double>() - q.dequantize().cast<double>()).squaredNorm();
    }
    return errors;
}

/// D_K(b1) + D_V(b2) - D_K(b2) - D_V(b1), measured.
double measured_difference(const std::vector<double>& keys, const std::vector<double>& values, int b1,
                           int b2) {
    const auto first = static_cast<std::size_t>(b1), second = static_cast<std::size_t>(b2);
    return keys[first] + values[second] - keys[second] - values[first];
}

struct Pair {
    int more, fewer;
};
std::vector<Pair> all_pairs(Scheme scheme) {
    std::vector<Pair> pairs;
    for (int more = least_bits(scheme); more <= 8; ++more)
        for (int fewer = least_bits(scheme); fewer < more; ++fewer) pairs.push_back({more, fewer});
    return pairs;
}

/// K = s V' with V' the rows of V in another order, uniform, in `cell` grids: D(b) = c |M|_F^2 4^-b with c =
/// 1 nearly exactly (a variance of range^2 / 12, an error of step^2 / 12), so the difference can be
/// predicted, not only its sign.
TEST(T3, PredictsTheDifferenceOnUniformData) {
    Random random(kvplane_test::seed());
    const Matrix values = uniform_matrix(1024, 192, -1.0f, 1.0f, random);
    const Matrix same = values.colwise().reverse();  // whose norm is equal, not only its distribution
    for (const Groups groups : {Groups::channels, Groups::tokens}) {
        const std::vector<double> value_errors = squared_errors(values, Scheme::cell, groups);
        for (const float s : {1.25f, 2.0f, 3.3f, 30.0f}) {
            const Matrix keys = s * same;
            const std::vector<double> key_errors = squared_errors(keys, Scheme::cell, groups);
            for (const auto& [more, fewer] : all_pairs(Scheme::cell)) {
                const double measured = measured_difference(key_errors, value_errors, more, fewer);
                const double predicted = theory::key_prioritized_difference(
                    keys.cast<double>().norm(), values.cast<double>().norm(), more, fewer);
                EXPECT_LT(measured, 0.0) << "s " << s << ", " << more << " and " << fewer << " bits";
                // The interval of 64 or 128 samples is a little narrower than that of the distribution.
                EXPECT_NEAR(measured / predicted, 0.97, 0.05)
                    << "s " << s << ", " << more << " and " << fewer << " bits";
            }
        }
    }
}

/// The strict inequality at all pairs of widths, whatever the data and the scheme: the larger matrix wants
/// the bits. s < 1 turns it round; s = 1 with the same rows in another order makes it an equality.
TEST(T3, HoldsForEveryPairOfWidths) {
    Random random(kvplane_test::seed());
    // The others have no error that more bits would lessen: constants, or data finer than fp16 grids; or it
    // does not fall with every bit (see the next test).
    const std::set<std::string> inputs{"normal", "outlier channels", "negative", "signed zeros"};
    for (const auto& [input_name, values] : difficult_matrices(128, 96, random)) {
        if (!inputs.contains(input_name)) continue;
        const Matrix reversed = values.colwise().reverse();
        for (const Scheme scheme : all_schemes) {
            const std::vector<double> value_errors = squared_errors(values, scheme, Groups::tokens);
            for (const float s : {0.5f, 1.0f, 1.5f, 2.0f}) {
                const std::vector<double> key_errors = squared_errors(s * reversed, scheme, Groups::tokens);
                for (const auto& [more, fewer] : all_pairs(scheme)) {
                    SCOPED_TRACE(testing::Message() << input_name << ", " << name(scheme) << ", s " << s
                                                    << ", " << more << " and " << fewer << " bits");
                    const double measured = measured_difference(key_errors, value_errors, more, fewer);
                    const double predicted = theory::key_prioritized_difference(s, 1.0, more, fewer);
                    if (s == 1.0f) {
                        EXPECT_NEAR(measured, 0.0, 1e-12 * value_errors[static_cast<std::size_t>(fewer)]);
                        EXPECT_EQ(predicted, 0.0);
                    } else {
                        EXPECT_LT(measured * (s - 1.0f), 0.0);
                        EXPECT_LT(predicted * (s - 1.0f), 0.0);
                    }
                }
            }
        }
    }
}

/// What the theorem presupposes, that errors fall with every bit, is not true of all data: two outliers can
/// put a level of a coarse min_max grid right on the bulk and none of a finer one. Then the larger matrix is
/// better off with fewer bits.
TEST(T3, FailsWhereErrorsDoNotFallWithEveryBit) {
    Matrix values = Matrix::Zero(1, 192);
    for (Index head = 0; head < 3; ++head) {
        values(0, 64 * head) = -500.0f;  // levels of 2 bits: -500, 0, 500, 1000; of 3 bits: -71, 143 beside 0
        values(0, 64 * head + 1) = 1000.0f;
    }
    const std::vector<double> value_errors = squared_errors(values, Scheme::min_max, Groups::tokens);
    const std::vector<double> key_errors = squared_errors(2.0f * values, Scheme::min_max, Groups::tokens);
    EXPECT_EQ(value_errors[2], 0.0);
    EXPECT_GT(value_errors[3], 0.0);
    EXPECT_LT(theory::key_prioritized_difference(2.0, 1.0, 3, 2), 0.0);
    EXPECT_GT(measured_difference(key_errors, value_errors, 3, 2), 0.0);
}

/// b_K - b_V = log2(|K| / |V|): with K = 2^k V' the best of all integer splits of a sum is that one, and
/// there keys and values err alike.
TEST(T3, OptimalSplitIsTheBestOfAllIntegerSplits) {
    Random random(kvplane_test::seed());
    const Matrix values = uniform_matrix(512, 192, -1.0f, 1.0f, random);
    const std::vector<double> value_errors = squared_errors(values, Scheme::cell, Groups::channels);
    for (int k = -3; k <= 3; ++k) {
        const Matrix keys = std::ldexp(1.0f, k) * values.colwise().reverse();
        const std::vector<double> key_errors = squared_errors(keys, Scheme::cell, Groups::channels);
        const double split =
            theory::optimal_key_value_split(keys.cast<double>().norm(), values.cast<double>().norm());
        EXPECT_NEAR(split, k, 1e-12);
        for (int sum = 8; sum <= 10; ++sum) {
            if ((sum + k) % 2 != 0) continue;
            int best = 0;
            double least = std::numeric_limits<double>::infinity();
            for (int key_bits = std::max(1, sum - 8); key_bits <= std::min(8, sum - 1); ++key_bits) {
                const double error = key_errors[static_cast<std::size_t>(key_bits)] +
                                     value_errors[static_cast<std::size_t>(sum - key_bits)];
                if (error >= least) continue;
                least = error;
                best = 2 * key_bits - sum;
            }
            EXPECT_EQ(best, k) << "of " << sum << " bits together";
            const double keys_part = key_errors[static_cast<std::size_t>((sum + k) / 2)];
            const double values_part = value_errors[static_cast<std::size_t>((sum - k) / 2)];
            EXPECT_NEAR(keys_part / values_part, 1.0, 0.02);
        }
    }
}

/// On real keys and values, both quantized alike. Layers 0, 8 and 16 have |K|_F = 30, 2.7 and 3.5 times
/// |V|_F: the inequality holds for every pair of widths, scheme and grouping, and even with keys per channel
/// and values per token, though the "same constant" of the theorem is off by up to 5.3.
TEST(T3, HoldsOnRealLayersWhoseKeysAreLarger) {
    int layers = 0;
    for (const RealLayer& real : real_layers()) {
        const double key_norm = real.keys.norm(), value_norm = real.values.norm();
        if (real.layer == 24) continue;
        ++layers;
        ASSERT_GT(key_norm, 2.0 * value_norm) << "layer " << real.layer;
        for (const Scheme scheme : all_schemes)
            for (const auto& [key_groups, value_groups] : {std::pair{Groups::tokens, Groups::tokens},
                                                           {Groups::channels, Groups::channels},
                                                           {Groups::channels, Groups::tokens}}) {
                const std::vector<double> keys = squared_errors(real.keys, scheme, key_groups);
                const std::vector<double> values = squared_errors(real.values, scheme, value_groups);
                for (const auto& [more, fewer] : all_pairs(scheme)) {
                    EXPECT_LT(theory::key_prioritized_difference(key_norm, value_norm, more, fewer), 0.0);
                    EXPECT_LT(measured_difference(keys, values, more, fewer), 0.0)
                        << "layer " << real.layer << ", " << name(scheme) << ", " << more << " and " << fewer;
                }
            }
    }
    EXPECT_EQ(layers, 3);
}

/// What does not hold: in layer 24 |K|_F = 0.99 |V|_F, so by norms values want the bits. Per channel they do,
/// at every pair; per token (min_max) keys do, at every pair, because there the constant of keys is 1.6 times
/// that of values. Norms decide where they differ by more than the constants; here only the measured errors
/// can.
TEST(T3, NormsDecideNothingWhereTheyAreNearlyEqual) {
    const RealLayer& real = real_layers().back();
    ASSERT_EQ(real.layer, 24);
    const double key_norm = real.keys.norm(), value_norm = real.values.norm();
    EXPECT_GT(key_norm, 0.95 * value_norm);
    EXPECT_LT(key_norm, value_norm);
    const auto errors = [&](const Matrix& m, Groups groups) {
        return squared_errors(m, Scheme::min_max, groups);
    };
    const std::vector<double> key_tokens = errors(real.keys, Groups::tokens);
    const std::vector<double> value_tokens = errors(real.values, Groups::tokens);
    const std::vector<double> key_channels = errors(real.keys, Groups::channels);
    const std::vector<double> value_channels = errors(real.values, Groups::channels);
    for (const auto& [more, fewer] : all_pairs(Scheme::min_max)) {
        EXPECT_GT(theory::key_prioritized_difference(key_norm, value_norm, more, fewer), 0.0);
        EXPECT_GT(measured_difference(key_channels, value_channels, more, fewer), 0.0);
        EXPECT_LT(measured_difference(key_tokens, value_tokens, more, fewer), 0.0)
            << "the same norms, the other way round";
    }
    const auto constant = [](double error, double norm) { return error * 256.0 / (norm * norm); };  // 4 bits
    const double ratio = constant(key_tokens[4], key_norm) / constant(value_tokens[4], value_norm);
    EXPECT_NEAR(ratio, 1.56, 0.05);
}

/// The premise D(b) = c |M|_F^2 4^-b itself: on real tensors c, once measured at 4 bits, serves the widths
/// from 3 to 7 within 5% in `cell` grids. (At 8 bits grids in fp16 begin to show, at 1 and 2 the shape of the
/// distribution.)
TEST(T3, ErrorsOfRealTensorsFallByFourABit) {
    for (const RealLayer& real : real_layers())
        for (const Groups groups : {Groups::channels, Groups::tokens})
            for (const Matrix* m : {&real.keys, &real.values}) {
                const std::vector<double> errors = squared_errors(*m, Scheme::cell, groups);
                for (int bits = 3; bits <= 7; ++bits)
                    EXPECT_NEAR(
                        errors[static_cast<std::size_t>(bits)] * std::exp2(2 * (bits - 4)) / errors[4], 1.0,
                        0.05)
                        << "layer " << real.layer << ", " << bits << " bits";
            }
}

}  // namespace
