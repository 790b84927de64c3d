// The step that all containers share: codes and grids of one block, in memory that is reused, and the check
// that a container makes before it changes.
#include "kvplane/quantize/block.hpp"

#include <limits>
#include <string>

#include "flushed_subnormals.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::Clip;
using kvplane::ErrorCode;
using kvplane::Granularity;
using kvplane::GridRule;
using kvplane::head_rows;
using kvplane::Index;
using kvplane::Matrix;
using kvplane::RowMajorMatrix;
using kvplane::Scheme;
using kvplane::detail::BlockQuantizer;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::refusal;

using Codes = RowMajorMatrix<std::uint8_t>;

/// What one call leaves behind.
struct Result {
    Codes codes;
    std::vector<Eigen::half> lower, step;
    kvplane::ClipExcess excess;

    bool operator==(const Result& other) const {
        const auto same = [](const std::vector<Eigen::half>& a, const std::vector<Eigen::half>& b) {
            return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                              [](Eigen::half x, Eigen::half y) { return x.x == y.x; });
        };
        return codes == other.codes && same(lower, other.lower) && same(step, other.step) &&
               excess.largest == other.excess.largest && excess.energy == other.excess.energy;
    }
};

template <class Input>
Result quantized(BlockQuantizer& quantizer, const Input& values, const GridRule& rule, int bits) {
    Codes codes = Codes::Constant(values.rows(), values.cols(), 0xEE);
    quantizer.quantize(head_rows(values), {.argument = "block",
                                           .count = values.rows(),
                                           .channels = values.cols(),
                                           .rule = rule,
                                           .bits = bits,
                                           .codes = codes.data(),
                                           .code_stride = codes.cols()});
    return {codes, quantizer.lower(), quantizer.step(), quantizer.excess()};
}

std::vector<GridRule> all_rules() {
    std::vector<GridRule> rules;
    for (const Granularity granularity : {Granularity::per_channel, Granularity::per_token})
        for (const Index group : {5, 32, 128})
            for (const Scheme scheme : {Scheme::cell, Scheme::min_max, Scheme::symmetric, Scheme::full_range})
                for (const Clip clip : {Clip::none, Clip::mse_optimal})
                    rules.push_back({granularity, group, scheme, clip});
    for (const Index group : {5, 32, 128})
        rules.push_back({Granularity::per_token, group, Scheme::unbiased, Clip::none});
    return rules;
}

/// What an earlier block left in the reused memory changes nothing: not its size, not its numbers, not that
/// it was refused.
TEST(BlockQuantizer, IsTheSameAfterAnyOtherBlock) {
    Random random(kvplane_test::seed());
    constexpr float infinity = std::numeric_limits<float>::infinity();
    std::vector<Matrix> before{normal_matrix(130, 70, random), Matrix::Constant(128, 64, 1e-7f),
                               Matrix::Constant(128, 64, infinity),
                               Matrix::Constant(128, 64, std::numeric_limits<float>::quiet_NaN())};
    Matrix wide = Matrix::Constant(128, 64, 65504.0f);
    wide.leftCols(32).array() *= -1.0f;
    before.push_back(wide);
    for (const GridRule& rule : all_rules())
        for (const auto& [tokens, channels] : {std::pair<Index, Index>{1, 1}, {5, 3}, {7, 40}, {40, 64}}) {
            const Matrix values = normal_matrix(tokens, channels, random);
            BlockQuantizer fresh;
            const Result expected = quantized(fresh, values, rule, 2);
            for (const Matrix& earlier : before)
                for (const GridRule& earlier_rule :
                     {GridRule{Granularity::per_token, 64}, GridRule{Granularity::per_channel, 128}}) {
                    BlockQuantizer used;
                    try {
                        quantized(used, earlier, earlier_rule, 8);
                    } catch (const kvplane::Error&) {
                    }
                    try {
                        EXPECT_TRUE(quantized(used, values, rule, 2) == expected)
                            << tokens << " x " << channels << ", " << name(rule.granularity) << " "
                            << rule.group << ", " << name(rule.scheme);
                    } catch (const kvplane::Error& error) {
                        ADD_FAILURE() << "refused after an earlier block: " << error.what();
                    }
                }
        }
}

/// Where another library makes the thread flush subnormal numbers, fp16 input gets the same codes and grids.
TEST(BlockQuantizer, GivesTheSameWithSubnormalsFlushed) {
    if (!kvplane_test::can_flush_subnormals) GTEST_SKIP() << "no such mode known for this processor";
    Random random(kvplane_test::seed());
    for (const kvplane_test::NamedMatrix& input : kvplane_test::half_matrices(40, 48, random)) {
        const std::string& scale = input.name;
        const Matrix& values = input.values;
        const RowMajorMatrix<Eigen::half> halves = values.cast<Eigen::half>();
        kvplane_test::for_each_isa([&](kvplane::Isa) {
            for (const GridRule& rule : all_rules())
                for (const int bits : {2, 5}) {
                    SCOPED_TRACE(scale + ", " + name(rule.granularity) + " " + std::to_string(rule.group) +
                                 ", " + name(rule.scheme) + ", " + std::to_string(bits) + " bits");
                    BlockQuantizer quantizer;
                    const Result expected = quantized(quantizer, values, rule, bits);
                    const auto flushed = [&](const auto& input) {
                        return kvplane_test::with_flushed_subnormals(
                            [&] { return quantized(quantizer, input, rule, bits); });
                    };
                    EXPECT_TRUE(flushed(values) == expected) << "from fp32";
                    EXPECT_TRUE(flushed(halves) == expected) << "from fp16";
                }
        });
    }
}

/// A part of the rows is quantized like that part alone, and nothing around the codes is written.
TEST(BlockQuantizer, TakesAnyPartOfTheRows) {
    Random random(kvplane_test::seed());
    const Matrix values = normal_matrix(60, 3 * 50, random);
    for (const GridRule& rule : all_rules())
        for (const auto& [first_channel, channels] : {std::pair<Index, Index>{0, 50}, {16, 32}, {7, 9}}) {
            BlockQuantizer quantizer;
            Codes codes = Codes::Constant(30, 70, 0xEE);
            quantizer.quantize(head_rows(values, 3), {.argument = "block",
                                                      .head = 2,
                                                      .first = 11,
                                                      .count = 20,
                                                      .first_channel = first_channel,
                                                      .channels = channels,
                                                      .rule = rule,
                                                      .bits = 3,
                                                      .codes = &codes(4, 6),
                                                      .code_stride = codes.cols()});
            const Matrix part = values.block(11, 2 * 50 + first_channel, 20, channels);
            BlockQuantizer alone;
            const Result expected = quantized(alone, part, rule, 3);
            const Result result{codes.block(4, 6, 20, channels), quantizer.lower(), quantizer.step(),
                                quantizer.excess()};
            EXPECT_TRUE(result == expected) << name(rule.granularity) << " " << rule.group;
            codes.block(4, 6, 20, channels).setConstant(0xEE);
            EXPECT_TRUE((codes.array() == 0xEE).all()) << "codes beyond the block were written";
        }
}

TEST(BlockQuantizer, LeavesNoGridsForNothing) {
    BlockQuantizer quantizer;
    for (const GridRule& rule : all_rules())
        for (const auto& [tokens, channels] : {std::pair<Index, Index>{0, 5}, {5, 0}}) {
            const Result result = quantized(quantizer, Matrix(tokens, channels), rule, 4);
            EXPECT_EQ(result.step.size(), 0U);
            EXPECT_EQ(result.lower.size(), 0U);
        }
}

/// Both ways through require_storable: rows that a kernel can read, and others.
template <class Scalar>
void expect_positions_named() {
    for (const Index head_dim : {32, 20})
        for (const bool transposed : {false, true})
            for (const auto& [token, head, channel] :
                 {std::array<Index, 3>{0, 0, 0}, {3, 1, 7}, {40, 1, head_dim - 1}}) {
                RowMajorMatrix<Scalar> values =
                    RowMajorMatrix<Scalar>::Constant(41, 2 * head_dim, Scalar(-3.0f));
                const auto check = [&] {
                    const RowMajorMatrix<Scalar> other = values.transpose();
                    if (transposed)
                        kvplane::detail::require_storable(head_rows(other.transpose(), 2), "keys");
                    else
                        kvplane::detail::require_storable(head_rows(values, 2), "keys");
                };
                check();
                values(token, head * head_dim + channel) = Scalar(std::numeric_limits<float>::infinity());
                const std::string sentence = refusal(ErrorCode::not_finite, check);
                const std::string position = "keys: the value at token " + std::to_string(token) + ", head " +
                                             std::to_string(head) + ", channel " + std::to_string(channel) +
                                             " ";
                EXPECT_NE(sentence.find(position), std::string::npos) << sentence;
            }
}

TEST(RequireStorable, NamesThePosition) {
    expect_positions_named<float>();
    expect_positions_named<Eigen::half>();
    expect_positions_named<Eigen::bfloat16>();
    kvplane::detail::require_storable(head_rows(Matrix(0, 32)), "keys");
    kvplane::detail::require_storable(head_rows(Matrix(5, 0)), "keys");
    Matrix beyond = Matrix::Constant(2, 16, 65504.0f);
    kvplane::detail::require_storable(head_rows(beyond), "keys");
    beyond(1, 15) = -65505.0f;
    const std::string sentence = refusal(
        ErrorCode::beyond_fp16, [&] { kvplane::detail::require_storable(head_rows(beyond), "keys"); });
    EXPECT_NE(sentence.find("token 1, head 0, channel 15 is -65505"), std::string::npos) << sentence;
}

}  // namespace
