// per_channel, per_token, per_group: grids, codes and bytes by the definition; every kind of input gives the
// same; what is read back, whole, by rows, at a depth, into anything; the stated bounds hold and are reached;
// bad input is refused with its position.
#include "kvplane/storage/quantized.hpp"

#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "flushed_subnormals.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::Clip;
using kvplane::ErrorCode;
using kvplane::Granularity;
using kvplane::Grid;
using kvplane::Index;
using kvplane::Matrix;
using kvplane::MatrixD;
using kvplane::Quantized;
using kvplane::RowMajorMatrix;
using kvplane::Scheme;
using kvplane_test::differing;
using kvplane_test::difficult_matrices;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::refusal;

constexpr Index largest_index = std::numeric_limits<Index>::max();

// -- What to call -----------------------------------------------------------------------------------------

/// One call of the public functions.
struct Method {
    enum Function { per_channel, per_token, per_group } function;
    Index group;  ///< tokens or channels; not used per token
    Scheme scheme = Scheme::min_max;
    int bits = 4;
    Clip clip = Clip::none;

    Method with(Scheme other_scheme, int other_bits, Clip other_clip = Clip::none) const {
        return {function, group, other_scheme, other_bits, other_clip};
    }
    std::string text() const {
        const char* names[] = {"per_channel", "per_token", "per_group"};
        return std::string(names[function]) + " " + std::to_string(group) + ", " + name(scheme) + ", " +
               std::to_string(bits) + " bits" + (clip == Clip::none ? "" : ", clipped");
    }
};

template <class Input>
Quantized quantized(const Method& m, const Input& input, Index heads = 1) {
    switch (m.function) {
        case Method::per_channel:
            return kvplane::per_channel(input, {m.bits, m.scheme, m.clip, m.group, heads});
        case Method::per_token:
            return kvplane::per_token(input, {m.bits, m.scheme, m.clip, heads});
        default:
            return kvplane::per_group(input, {m.bits, m.scheme, m.clip, m.group, heads});
    }
}

const std::vector<Method> all_functions{
    {Method::per_channel, 32}, {Method::per_channel, 128}, {Method::per_channel, 7}, {Method::per_token, 0},
    {Method::per_group, 32},   {Method::per_group, 16},    {Method::per_group, 5}};

std::vector<Method> all_methods(const std::vector<int>& widths = {1, 2, 3, 4, 5, 6, 7, 8}) {
    std::vector<Method> methods;
    for (const Method& method : all_functions)
        for (const Scheme scheme : {Scheme::cell, Scheme::min_max, Scheme::symmetric, Scheme::full_range})
            for (const int bits : widths)
                if (bits > 1 || scheme != Scheme::symmetric) methods.push_back(method.with(scheme, bits));
    return kvplane_test::thinned(std::move(methods));
}

// -- The definition, in plain loops -----------------------------------------------------------------------

/// Which elements share a grid.
struct Groups {
    Method method;
    Index tokens, channels, head_dim;

    std::array<Index, 3> of(Index token, Index channel) const {
        const Index head = channel / head_dim, within = channel % head_dim;
        if (method.function == Method::per_channel) return {token / method.group, head, within};
        return {token, head, method.function == Method::per_token ? 0 : within / method.group};
    }
    template <class Visit>
    void for_each_element(const Visit& visit) const {
        for (Index t = 0; t < tokens; ++t)
            for (Index c = 0; c < channels; ++c) visit(t, c);
    }
};

struct Range {
    float min = std::numeric_limits<float>::infinity(), max = -min;
};

std::map<std::array<Index, 3>, Range> ranges_of_groups(const Groups& groups, const Matrix& values) {
    std::map<std::array<Index, 3>, Range> ranges;
    groups.for_each_element([&](Index t, Index c) {
        Range& range = ranges[groups.of(t, c)];
        range.min = std::min(range.min, values(t, c));
        range.max = std::max(range.max, values(t, c));
    });
    return ranges;
}

/// Bytes of packed rows and grids by the table of planes, written out.
Index expected_bytes(const Method& method, Index tokens, Index channels, Index grids) {
    const std::vector<std::vector<int>> planes{{}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {4, 4}};
    Index bytes = grids * (method.scheme == Scheme::symmetric || method.scheme == Scheme::full_range ? 2 : 4);
    for (const int width : planes[static_cast<std::size_t>(method.bits)])
        bytes += tokens * ((channels * width + 7) / 8);
    return bytes;
}

/// Grids, codes, values at every depth, size and bounds of a quantized matrix against the definition.
void expect_definition(const Method& method, const Matrix& values, Index heads) {
    const Quantized q = quantized(method, values, heads);
    const Groups groups{method, values.rows(), values.cols(), values.cols() / heads};
    ASSERT_EQ(q.tokens(), values.rows());
    ASSERT_EQ(q.channels(), values.cols());
    ASSERT_EQ(q.heads(), heads);
    ASSERT_EQ(q.head_dim(), values.cols() / heads);
    ASSERT_EQ(q.bits(), method.bits);
    ASSERT_EQ(q.rule().scheme, method.scheme);
    ASSERT_EQ(q.rule().group, method.function == Method::per_token ? q.head_dim() : method.group);

    const auto ranges = ranges_of_groups(groups, values);
    ASSERT_EQ(q.bytes(),
              expected_bytes(method, values.rows(), values.cols(), static_cast<Index>(ranges.size())));
    ASSERT_EQ(q.bits_per_element(),
              8.0 * static_cast<double>(q.bytes()) / static_cast<double>(values.size()));

    std::vector<Matrix> close(9, values);
    for (int depth = 1; depth <= method.bits; ++depth)
        close[static_cast<std::size_t>(depth)] = q.dequantize(depth);
    ASSERT_EQ(differing(q.dequantize(), close[static_cast<std::size_t>(method.bits)]), 0);
    std::vector<double> worst(9, 0.0), squares(9, 0.0), largest_bound(9, 0.0), bound_squares(9, 0.0);
    groups.for_each_element([&](Index t, Index c) {
        const Range& range = ranges.at(groups.of(t, c));
        const Grid grid = kvplane::fit_grid(method.scheme, method.bits, range.min, range.max);
        const Grid stored = q.grid(t, c);
        ASSERT_EQ(stored.lower, grid.lower) << "token " << t << ", channel " << c;
        ASSERT_EQ(stored.step, grid.step) << "token " << t << ", channel " << c;
        ASSERT_EQ(stored.bits, grid.bits);
        const int code = grid.encode(values(t, c));
        if (values.size() < 2000 || (t * values.cols() + c) % 11 == 0) {  // code() unpacks a whole row
            ASSERT_EQ(q.code(t, c), code) << "token " << t << ", channel " << c;
        }
        for (int depth = 1; depth <= method.bits; ++depth) {
            const auto p = static_cast<std::size_t>(depth);
            ASSERT_EQ(close[p](t, c), grid.decode(code >> (method.bits - depth), depth))
                << "token " << t << ", channel " << c << ", depth " << depth;
            const double error = std::abs(static_cast<double>(values(t, c)) - close[p](t, c));
            worst[p] = std::max(worst[p], error);
            squares[p] += error * error;
            const double bound = grid.error_bound(depth);
            largest_bound[p] = std::max(largest_bound[p], bound);
            bound_squares[p] += bound * bound;
        }
    });
    for (int depth = 1; depth <= method.bits; ++depth) {
        const auto p = static_cast<std::size_t>(depth);
        EXPECT_LE(worst[p], q.error_bound(depth)) << "depth " << depth;
        EXPECT_LE(std::sqrt(squares[p]), q.frobenius_error_bound(depth)) << "depth " << depth;
        if (method.scheme == Scheme::full_range) {  // its bounds count how far it clips
            EXPECT_GE(q.error_bound(depth), largest_bound[p]) << "depth " << depth;
            continue;
        }
        EXPECT_EQ(q.error_bound(depth), largest_bound[p]) << "depth " << depth;
        EXPECT_NEAR(q.frobenius_error_bound(depth), std::sqrt(bound_squares[p]),
                    1e-9 * std::sqrt(bound_squares[p]))
            << "depth " << depth;
    }
    EXPECT_EQ(q.error_bound(), q.error_bound(method.bits));
    EXPECT_EQ(q.frobenius_error_bound(), q.frobenius_error_bound(method.bits));
}

TEST(Quantize, FollowsTheDefinitionOnDifficultInput) {
    Random random(kvplane_test::seed());
    for (const auto& [name, values] : difficult_matrices(37, 33, random))
        for (const Method& method : all_methods()) {
            SCOPED_TRACE(name + ", " + method.text());
            expect_definition(method, values, 1);
            if (HasFatalFailure()) return;
        }
}

TEST(Quantize, FollowsTheDefinitionInEveryShape) {
    Random random(kvplane_test::seed());
    for (const Index head_dim : {1, 7, 16, 33, 64, 80, 96, 128, 256})
        for (const Index heads : {1, 3})
            for (const Index tokens : {1, 2, 128, 130}) {
                if (tokens * heads * head_dim > 13000) continue;
                const Matrix values = normal_matrix(tokens, heads * head_dim, random);
                for (const Method& method : all_methods({1, 3, 4, 7})) {
                    SCOPED_TRACE(testing::Message() << tokens << " tokens, " << heads << " heads of "
                                                    << head_dim << ", " << method.text());
                    expect_definition(method, values, heads);
                    if (HasFatalFailure()) return;
                }
            }
}

TEST(Quantize, IsTheSameOnEveryInstructionSet) {
    Random random(kvplane_test::seed());
    for (const auto& [name, values] : difficult_matrices(21, 48, random))
        for (const Method& method : all_methods({2, 5, 8}))
            kvplane_test::for_each_isa([&, &input = values](kvplane::Isa) {
                SCOPED_TRACE(method.text());
                expect_definition(method, input, 3);
            });
}

/// Where another library makes the thread flush subnormal numbers, fp16 input is read back as ever.
TEST(Quantize, IsTheSameWithSubnormalsFlushed) {
    if (!kvplane_test::can_flush_subnormals) GTEST_SKIP() << "no such mode known for this processor";
    Random random(kvplane_test::seed());
    for (const kvplane_test::NamedMatrix& input : kvplane_test::half_matrices(40, 48, random)) {
        const std::string& scale = input.name;
        const Matrix& values = input.values;
        const RowMajorMatrix<Eigen::half> halves = values.cast<Eigen::half>();
        for (const Method& method : all_methods({2, 3, 4, 8}))
            kvplane_test::for_each_isa([&](kvplane::Isa) {
                SCOPED_TRACE(scale + ", " + method.text());
                const Quantized expected = quantized(method, values);
                const Quantized flushed =
                    kvplane_test::with_flushed_subnormals([&] { return quantized(method, halves); });
                EXPECT_EQ(differing(flushed.dequantize(), expected.dequantize()), 0) << "quantized";
                for (int depth = 1; depth <= method.bits; ++depth)
                    EXPECT_EQ(differing(kvplane_test::with_flushed_subnormals(
                                            [&] { return expected.dequantize(depth); }),
                                        expected.dequantize(depth)),
                              0)
                        << "read at " << depth << " bits";
                EXPECT_EQ(flushed.error_bound(), expected.error_bound());
            });
    }
}

TEST(Quantize, OneGroupForAllTokensMayBeAskedForByAnyLargeNumber) {
    Random random(kvplane_test::seed());
    const Matrix values = normal_matrix(50, 40, random);
    const Quantized whole = kvplane::per_channel(values, {.group_tokens = 50});
    const Quantized token = kvplane::per_token(values);
    for (const Index group : {Index{51}, Index{1} << 40, largest_index}) {
        const Quantized q = kvplane::per_channel(values, {.group_tokens = group});
        EXPECT_EQ(q.bytes(), whole.bytes());
        EXPECT_EQ(differing(q.dequantize(), whole.dequantize()), 0);
        EXPECT_EQ(q.frobenius_error_bound(), whole.frobenius_error_bound());
        const Quantized g = kvplane::per_group(values, {.group_channels = group});
        EXPECT_EQ(g.bytes(), token.bytes());
        EXPECT_EQ(differing(g.dequantize(), token.dequantize()), 0);
        EXPECT_EQ(g.frobenius_error_bound(), token.frobenius_error_bound());
    }
}

TEST(Quantize, StatesTrueBits) {
    const Matrix values = Matrix::Random(256, 128);
    EXPECT_EQ(kvplane::per_channel(values).bits_per_element(), 4.0 + 32.0 / 128.0);
    EXPECT_EQ(kvplane::per_channel(values, {.bits = 3, .group_tokens = 32}).bits_per_element(), 4.0);
    EXPECT_EQ(kvplane::per_token(values, {.bits = 2}).bits_per_element(), 2.0 + 32.0 / 128.0);
    EXPECT_EQ(kvplane::per_token(values, {.bits = 2, .heads = 2}).bits_per_element(), 2.0 + 32.0 / 64.0);
    EXPECT_EQ(kvplane::per_group(values).bits_per_element(), 5.0);
    EXPECT_EQ(kvplane::per_group(values, {.scheme = Scheme::symmetric}).bits_per_element(), 4.5);
}

TEST(Quantize, ReproducesExtremesConstantsAndFp16) {
    // Where the ideal min_max grid is exact in fp16, both extremes come back exactly.
    for (int bits = 1; bits <= 8; ++bits) {
        Matrix values(3, 1);
        values << -1.5f, -1.5f + 0.125f * static_cast<float>((1 << bits) - 1), -1.5f;
        EXPECT_EQ(differing(kvplane::per_channel(values, {.bits = bits}).dequantize(), values), 0) << bits;
    }
    const Matrix constant = Matrix::Constant(5, 40, 0.1f);
    const Matrix expected = Matrix::Constant(5, 40, static_cast<float>(Eigen::half(0.1f)));
    for (const Method& method : all_functions)
        EXPECT_EQ(differing(quantized(method, constant).dequantize(), expected), 0) << method.text();
    // Symmetric grids reproduce their largest magnitude and zero.
    Matrix symmetric(3, 1);
    symmetric << 0.0f, -7.0f, 1.2f;
    const Matrix close = kvplane::per_channel(symmetric, {.scheme = Scheme::symmetric}).dequantize();
    EXPECT_EQ(close(0, 0), 0.0f);
    EXPECT_EQ(close(1, 0), -7.0f);
}

// -- Kinds of input ---------------------------------------------------------------------------------------

void expect_same(const Quantized& a, const Quantized& b) {
    ASSERT_EQ(a.tokens(), b.tokens());
    ASSERT_EQ(a.channels(), b.channels());
    ASSERT_EQ(a.heads(), b.heads());
    ASSERT_EQ(a.bits(), b.bits());
    EXPECT_EQ(a.bytes(), b.bytes());
    EXPECT_EQ(differing(a.dequantize(), b.dequantize()), 0);
    EXPECT_EQ(a.error_bound(), b.error_bound());
    EXPECT_EQ(a.frobenius_error_bound(), b.frobenius_error_bound());
    for (Index t = 0; t < a.tokens(); t += 13)
        for (Index c = 0; c < a.channels(); ++c) {
            ASSERT_EQ(a.code(t, c), b.code(t, c));
            ASSERT_EQ(a.grid(t, c).lower, b.grid(t, c).lower);
            ASSERT_EQ(a.grid(t, c).step, b.grid(t, c).step);
        }
}

template <class Scalar>
class QuantizeFrom : public testing::Test {
  protected:
    using Rows = RowMajorMatrix<Scalar>;
    using Columns = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;
    using AnyStride = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;

    /// Quantizes every kind of matrix that holds `plain` and compares with the plain one.
    static void expect_all_matrices_agree(const Method& method, const Rows& plain, Index heads) {
        const Quantized reference = quantized(method, plain, heads);
        const Index tokens = plain.rows(), channels = plain.cols();
        const auto check = [&](const char* kind, const auto& input) {
            SCOPED_TRACE(kind);
            expect_same(quantized(method, input, heads), reference);
        };
        const Scalar unused = Scalar(std::numeric_limits<float>::quiet_NaN());
        const Columns columns = plain;
        check("column-major", columns);
        check("as float", Matrix(plain.template cast<float>()));

        Rows large_rows = Rows::Constant(tokens + 5, channels + 6, unused);
        large_rows.block(2, 3, tokens, channels) = plain;
        check("block of rows", large_rows.block(2, 3, tokens, channels));
        Columns large_columns = Columns::Constant(tokens + 5, channels + 6, unused);
        large_columns.block(2, 3, tokens, channels) = plain;
        check("block of columns", large_columns.block(2, 3, tokens, channels));

        const Rows row_transposed = plain.transpose();
        const Columns column_transposed = plain.transpose();
        check("transposed", row_transposed.transpose());
        check("transposed column-major", column_transposed.transpose());

        const Rows doubled = Rows::Constant(2 * tokens, 3 * channels, unused);
        Rows spread = doubled;
        const AnyStride strides(2 * spread.cols(), 3);
        Eigen::Map<Rows, 0, AnyStride>(spread.data(), tokens, channels, strides) = plain;
        check("strided map", Eigen::Map<const Rows, 0, AnyStride>(spread.data(), tokens, channels, strides));
        const Eigen::Ref<const Rows, 0, Eigen::OuterStride<>> reference_to_block =
            large_rows.block(2, 3, tokens, channels);
        check("Ref", reference_to_block);

        const Rows reversed = plain.reverse();
        check("expression: reversed twice", reversed.reverse());
        check("expression: sum", plain + Rows::Zero(tokens, channels));
        const Matrix as_float = plain.template cast<float>();
        check("expression: cast", as_float.template cast<Scalar>());
        const Eigen::Array<Scalar, Eigen::Dynamic, Eigen::Dynamic> array = plain;
        check("array", array);
    }

    template <int Layout>
    static Eigen::Tensor<Scalar, 3, Layout> tensor_of(const Rows& plain, Index heads) {
        const Index head_dim = plain.cols() / heads;
        Eigen::Tensor<Scalar, 3, Layout> tensor(heads, plain.rows(), head_dim);
        for (Index h = 0; h < heads; ++h)
            for (Index t = 0; t < plain.rows(); ++t)
                for (Index c = 0; c < head_dim; ++c) tensor(h, t, c) = plain(t, h * head_dim + c);
        return tensor;
    }

    /// The same for tensors; their heads are their own, whatever the options say.
    template <int Layout>
    static void expect_tensors_agree(const Method& method, const Rows& plain, Index heads) {
        const Quantized reference = quantized(method, plain, heads);
        const Eigen::Tensor<Scalar, 3, Layout> tensor = tensor_of<Layout>(plain, heads);
        expect_same(quantized(method, tensor), reference);
        const Eigen::TensorMap<const Eigen::Tensor<Scalar, 3, Layout>> map(tensor.data(),
                                                                           tensor.dimensions());
        expect_same(quantized(method, map), reference);
        Eigen::Tensor<Scalar, 3, Layout> copy = tensor;
        const Eigen::TensorMap<Eigen::Tensor<Scalar, 3, Layout>> writable(copy.data(), copy.dimensions());
        expect_same(quantized(method, writable, 17), reference);
        const auto back = reference.template dequantize_tensor<Layout>();
        const Matrix expected = reference.dequantize();
        const Index head_dim = plain.cols() / heads;
        for (Index h = 0; h < heads; ++h)
            for (Index t = 0; t < plain.rows(); ++t)
                for (Index c = 0; c < head_dim; ++c) ASSERT_EQ(back(h, t, c), expected(t, h * head_dim + c));
        const auto coarse = reference.template dequantize_tensor<Layout>(1);
        ASSERT_EQ(coarse(heads - 1, plain.rows() - 1, head_dim - 1),
                  reference.dequantize(1)(plain.rows() - 1, plain.cols() - 1));
    }
};
using Scalars = testing::Types<float, Eigen::half, Eigen::bfloat16>;
TYPED_TEST_SUITE(QuantizeFrom, Scalars);

struct Shape {
    Index tokens, heads, head_dim;
};
constexpr Shape input_shapes[] = {{37, 2, 33}, {131, 3, 64}, {1, 1, 7}, {40, 1, 1}};

TYPED_TEST(QuantizeFrom, EveryKindOfMatrix) {
    Random random(kvplane_test::seed());
    for (const auto& [tokens, heads, head_dim] : input_shapes) {
        const RowMajorMatrix<TypeParam> plain =
            normal_matrix(tokens, heads * head_dim, random).template cast<TypeParam>();
        for (const Method& method : all_functions)
            for (const Clip clip : {Clip::none, Clip::mse_optimal}) {
                const Method tried = method.with(Scheme::min_max, 5, clip);
                SCOPED_TRACE(tried.text());
                TestFixture::expect_all_matrices_agree(tried, plain, heads);
            }
    }
}

TYPED_TEST(QuantizeFrom, EveryKindOfTensor) {
    Random random(kvplane_test::seed());
    for (const auto& [tokens, heads, head_dim] : input_shapes) {
        const RowMajorMatrix<TypeParam> plain =
            normal_matrix(tokens, heads * head_dim, random).template cast<TypeParam>();
        for (const Method& method : all_functions) {
            SCOPED_TRACE(method.text());
            TestFixture::template expect_tensors_agree<Eigen::RowMajor>(method, plain, heads);
            TestFixture::template expect_tensors_agree<Eigen::ColMajor>(method, plain, heads);
        }
    }
}

// -- Reading back -----------------------------------------------------------------------------------------

TEST(Dequantize, EveryRangeOfRows) {
    Random random(kvplane_test::seed());
    const Matrix values = normal_matrix(45, 2 * 19, random);
    for (const Method& method : all_functions) {
        const Quantized q = quantized(method.with(Scheme::min_max, 7), values, 2);
        for (const int depth : {7, 3}) {
            const Matrix whole = q.dequantize(depth);
            for (Index first = 0; first <= values.rows(); ++first)
                for (Index count = 0; first + count <= values.rows(); ++count) {
                    Matrix rows = Matrix::Constant(count, values.cols(), -99.0f);
                    q.dequantize_rows(first, depth, rows);
                    ASSERT_EQ(differing(rows, whole.middleRows(first, count)), 0)
                        << method.text() << ", rows " << first << " + " << count;
                }
        }
    }
    // Longer than the 128 rows that are decoded together, and starting inside them.
    const Matrix tall = normal_matrix(700, 5, random);
    for (const Method& method : {Method{Method::per_channel, 200}, Method{Method::per_token, 0}}) {
        const Quantized q = quantized(method, tall);
        Matrix rows(500, 5);
        q.dequantize_rows(150, 4, rows);
        EXPECT_EQ(differing(rows, q.dequantize().middleRows(150, 500)), 0) << method.text();
    }
}

TEST(Dequantize, IntoAnythingThatHoldsRows) {
    Random random(kvplane_test::seed());
    const Quantized q = kvplane::per_channel(normal_matrix(40, 33, random), {.bits = 8});
    const Matrix expected = q.dequantize().middleRows(7, 20);

    Eigen::MatrixXd columns(20, 33);
    q.dequantize_rows(7, 8, columns);
    EXPECT_EQ(differing(columns, expected.cast<double>()), 0);
    RowMajorMatrix<Eigen::half> halves(20, 33);
    q.dequantize_rows(7, 8, halves);
    EXPECT_EQ(differing(halves, expected.cast<Eigen::half>()), 0);
    RowMajorMatrix<Eigen::bfloat16> bfloats(20, 33);
    q.dequantize_rows(7, 8, bfloats);
    EXPECT_EQ(differing(bfloats, expected.cast<Eigen::bfloat16>()), 0);

    Matrix large = Matrix::Constant(30, 50, -99.0f), untouched = large;
    q.dequantize_rows(7, 8, large.block(4, 6, 20, 33));
    untouched.block(4, 6, 20, 33) = expected;
    EXPECT_EQ(differing(large, untouched), 0) << "only the block is written";
    Matrix transposed(33, 20);
    q.dequantize_rows(7, 8, transposed.transpose());
    EXPECT_EQ(differing(transposed.transpose(), expected), 0);
    using Spread = Eigen::Map<Matrix, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;
    std::vector<float> spread(20 * 33 * 2, -99.0f);
    q.dequantize_rows(7, 8, Spread(spread.data(), 20, 33, {66, 2}));
    for (std::size_t i = 0; i < spread.size(); ++i)
        ASSERT_EQ(spread[i], i % 2 ? -99.0f : expected.data()[i / 2]);
}

/// Cells at the ends of fp16 reach beyond it; what is read into fp16 stays finite.
TEST(Dequantize, IntoFp16AtItsEnds) {
    Matrix values(4, 32);
    for (Index i = 0; i < values.size(); ++i)
        values.data()[i] = (i % 2 == 0 ? 1.0f : -1.0f) * (65504.0f - 32.0f * static_cast<float>(i % 7));
    for (const Method& method : all_methods({2, 4, 8})) {
        const Quantized q = quantized(method, values);
        for (int depth = 1; depth <= method.bits; ++depth) {
            SCOPED_TRACE(method.text() + ", read at " + std::to_string(depth));
            RowMajorMatrix<Eigen::half> halves(4, 32);
            q.dequantize_rows(0, depth, halves);
            const Matrix wide = q.dequantize(depth);
            for (Index i = 0; i < wide.size(); ++i) {
                const float largest = std::min(std::abs(wide.data()[i]), 65504.0f);
                EXPECT_EQ(static_cast<float>(halves.data()[i]),
                          static_cast<float>(Eigen::half(std::copysign(largest, wide.data()[i]))));
            }
        }
    }
}

TEST(Dequantize, ACopyIsTheSame) {
    Random random(kvplane_test::seed());
    auto q = std::make_unique<Quantized>(kvplane::per_token(normal_matrix(9, 20, random)));
    const Matrix expected = q->dequantize();
    const Quantized copy = *q;
    q.reset();
    EXPECT_EQ(differing(copy.dequantize(), expected), 0);
}

// -- Bounds -----------------------------------------------------------------------------------------------

/// Every element at the edge of a cell of the read depth: both bounds are reached.
TEST(Bounds, AreReachedAtTheEdgesOfCells) {
    Random random(kvplane_test::seed());
    for (int bits = 1; bits <= 8; ++bits)
        for (int depth = 1; depth <= bits; ++depth) {
            const float step = std::ldexp(1.0f, -bits), wide = std::ldexp(1.0f, -depth);
            std::uniform_int_distribution<int> cell(0, 1 << depth);
            Matrix values =
                Matrix::NullaryExpr(64, 96, [&] { return wide * static_cast<float>(cell(random)); });
            values.row(0).setZero();
            values.row(1).setOnes();
            values.col(0).setZero();
            values.col(1).setOnes();
            for (const Method& method : {Method{Method::per_channel, 64}, Method{Method::per_token, 0}}) {
                const Quantized q = quantized(method.with(Scheme::cell, bits), values);
                SCOPED_TRACE(testing::Message() << method.text() << ": " << bits << " bits at " << depth);
                // Row 0 and 1 (column 0 and 1) are constant groups where grids run along them.
                const Matrix inner = values.bottomRightCorner(62, 94);
                const MatrixD error = (inner - q.dequantize(depth).bottomRightCorner(62, 94)).cast<double>();
                ASSERT_EQ(q.grid(5, 5).step, step);
                EXPECT_EQ(error.cwiseAbs().minCoeff(), 0.5 * wide) << "every element at a half step";
                EXPECT_GE(error.cwiseAbs().maxCoeff(), 0.999 * q.error_bound(depth));
                EXPECT_GE(error.norm(), 0.97 * q.frobenius_error_bound(depth)) << "62 x 94 of 64 x 96";
                EXPECT_LE((values - q.dequantize(depth)).cast<double>().norm(),
                          q.frobenius_error_bound(depth));
            }
        }
}

/// On random data errors fill the cells evenly, so a group's errors have a norm near 1 / sqrt(3) of the
/// bound, but for its two extremes: `cell` puts them at the edges of cells, min_max in the middle. Too small
/// would be as wrong as too large.
TEST(Bounds, PredictTheErrorOfRandomData) {
    Random random(kvplane_test::seed());
    const Matrix values = normal_matrix(512, 128, random);
    for (const Method& method : all_functions)
        for (const Scheme scheme : {Scheme::cell, Scheme::min_max})
            for (int bits = 3; bits <= 6; ++bits) {  // beyond, fp16 moves the extremes off the edges
                if (method.group == 5 || method.group == 7) continue;  // whose last groups are smaller
                const Quantized q = quantized(method.with(scheme, bits), values);
                const Matrix close = q.dequantize();
                SCOPED_TRACE(method.with(scheme, bits).text());
                double nearest = 0.0;
                for (Index t = 0; t < values.rows(); ++t)
                    for (Index c = 0; c < values.cols(); ++c)
                        nearest = std::max<double>(
                            nearest, std::abs(values(t, c) - close(t, c)) / q.grid(t, c).error_bound());
                EXPECT_GT(nearest, 0.999);
                EXPECT_LE(nearest, 1.0);
                const double size = method.function == Method::per_token ? 128.0 : double(method.group);
                const double extremes = scheme == Scheme::cell ? 2.0 : 0.0;
                const double predicted = std::sqrt(((size - 2.0) / 3.0 + extremes) / size);
                const double ratio = (values - close).cast<double>().norm() / q.frobenius_error_bound();
                EXPECT_NEAR(ratio, predicted, 0.04 * predicted);
            }
}

/// A constant group counts with the rounding of its value to fp16, reached half way between two of them.
TEST(Bounds, OfConstantGroups) {
    const Matrix values = Matrix::Constant(4, 3, 1.0f + 0x1p-11f);
    const Quantized q = kvplane::per_channel(values);
    EXPECT_EQ(q.error_bound(), 0x1p-11);
    EXPECT_DOUBLE_EQ(q.frobenius_error_bound(), 0x1p-11 * std::sqrt(12.0));
    EXPECT_FLOAT_EQ((values - q.dequantize()).norm(), 0x1p-11f * std::sqrt(12.0f));
}

// -- Clipping ---------------------------------------------------------------------------------------------

/// The candidates of Clip::mse_optimal: the interval shrunk about its middle to 100, 95, ... 30 percent.
/// Products are exact in double, so that no compiler's fused multiply-add can make another grid of them.
std::vector<Grid> candidate_grids(const Method& method, const Range& range) {
    std::vector<Grid> grids{kvplane::fit_grid(method.scheme, method.bits, range.min, range.max)};
    for (int percent = 95; percent >= 30; percent -= 5) {
        const float kept = static_cast<float>(percent) / 100.0f;
        const float middle = 0.5f * (range.min + range.max), reach = 0.5f * (range.max - range.min);
        const double offset = static_cast<double>(kept) * reach;
        const float symmetric[] = {kept * range.min, kept * range.max};
        const float shrunk[] = {static_cast<float>(middle - offset), static_cast<float>(middle + offset)};
        const bool around_zero = method.scheme == Scheme::symmetric || method.scheme == Scheme::full_range;
        const auto& ends = around_zero ? symmetric : shrunk;
        grids.push_back(kvplane::fit_grid(method.scheme, method.bits, ends[0], ends[1]));
    }
    return grids;
}

TEST(Clipping, TakesTheCandidateOfLeastSquaredError) {
    Random random(kvplane_test::seed());
    for (const auto& [input_name, values] : difficult_matrices(40, 24, random))
        for (const Method& base : all_functions)
            for (const Scheme scheme : {Scheme::cell, Scheme::min_max, Scheme::symmetric, Scheme::full_range})
                for (const int bits : {2, 4}) {
                    const Method method = base.with(scheme, bits, Clip::mse_optimal);
                    SCOPED_TRACE(input_name + ", " + method.text());
                    const Quantized q = quantized(method, values);
                    const Groups groups{method, values.rows(), values.cols(), values.cols()};
                    std::map<std::array<Index, 3>, std::vector<float>> members;
                    std::map<std::array<Index, 3>, Grid> chosen;
                    groups.for_each_element([&, &x = values](Index t, Index c) {
                        members[groups.of(t, c)].push_back(x(t, c));
                        chosen[groups.of(t, c)] = q.grid(t, c);
                    });
                    for (const auto& [group, range] : ranges_of_groups(groups, values)) {
                        Grid best;
                        double least = std::numeric_limits<double>::infinity();
                        for (const Grid& grid : candidate_grids(method, range)) {
                            double error = 0.0;
                            for (const float x : members[group]) {
                                const float difference = x - grid.decode(grid.encode(x));
                                error += static_cast<double>(difference) * difference;
                            }
                            if (error < least) {
                                least = error;
                                best = grid;
                            }
                        }
                        ASSERT_EQ(chosen[group].lower, best.lower);
                        ASSERT_EQ(chosen[group].step, best.step);
                    }
                }
}

TEST(Clipping, KeepsItsBoundsAtEveryDepth) {
    Random random(kvplane_test::seed());
    for (const auto& [name, values] : difficult_matrices(40, 24, random))
        for (const Method& base : all_methods({1, 2, 4, 8})) {
            const Method method = base.with(base.scheme, base.bits, Clip::mse_optimal);
            const Quantized q = quantized(method, values, 2);
            for (int depth = 1; depth <= method.bits; ++depth) {
                const MatrixD error = values.cast<double>() - q.dequantize(depth).cast<double>();
                ASSERT_LE(error.cwiseAbs().maxCoeff(), q.error_bound(depth))
                    << name << ", " << method.text() << " at " << depth;
                ASSERT_LE(error.norm(), q.frobenius_error_bound(depth))
                    << name << ", " << method.text() << " at " << depth;
            }
        }
}

/// One group, one outlier: what is clipped lies outside by all of the bound's excess.
TEST(Clipping, BoundCountsWhatLiesOutside) {
    Matrix values = Eigen::VectorXf::LinSpaced(128, -1.0f, 1.0f);
    values(77, 0) = 1.6f;
    values(78, 0) = -1.6f;
    const Quantized q = kvplane::per_channel(values, {.bits = 3, .clip = Clip::mse_optimal});
    const MatrixD error = (values - q.dequantize()).cast<double>();
    EXPECT_GT(error.cwiseAbs().maxCoeff(), 1.5 * q.grid(0, 0).error_bound()) << "something was clipped";
    EXPECT_GT(error.cwiseAbs().maxCoeff(), 0.999 * q.error_bound());
    EXPECT_LE(error.cwiseAbs().maxCoeff(), q.error_bound());
    EXPECT_GT(q.frobenius_error_bound(), 0.5 * q.grid(0, 0).step * std::sqrt(128.0) + 0.1);
}

/// What lies outside, summed over groups, heads and blocks of tokens.
TEST(Clipping, BoundsAreThoseOfTheGridsAndOfWhatLiesOutside) {
    Random random(kvplane_test::seed());
    const Matrix values = normal_matrix(300, 2 * 20, random);
    for (const Method& base : all_functions) {
        const Method method = base.with(Scheme::min_max, 2, Clip::mse_optimal);
        const Quantized q = quantized(method, values, 2);
        double largest = 0.0, energy = 0.0, widest = 0.0, squares = 0.0;
        for (Index t = 0; t < values.rows(); ++t)
            for (Index c = 0; c < values.cols(); ++c) {
                const Grid grid = q.grid(t, c);
                const double x = values(t, c), upper = grid.upper();
                const double outside = std::max({0.0, grid.lower - x, x - upper});
                largest = std::max(largest, outside);
                energy += outside * outside;
                const double bound = grid.error_bound();
                widest = std::max(widest, bound);
                squares += bound * bound;
            }
        EXPECT_TRUE(energy > 0.0 || method.group < 16) << "large groups clip something";
        EXPECT_NEAR(q.error_bound(), widest + largest, 1e-9) << method.text();
        EXPECT_NEAR(q.frobenius_error_bound(), std::sqrt(squares) + std::sqrt(energy), 1e-6) << method.text();
    }
}

TEST(Clipping, IsOffByDefaultAndHelpsOnNormalData) {
    Random random(kvplane_test::seed());
    const Matrix values = normal_matrix(1024, 64, random);
    for (const Scheme scheme : {Scheme::cell, Scheme::min_max, Scheme::symmetric}) {
        const auto squared_error = [&](Clip clip) {
            const Quantized q = kvplane::per_channel(values, {.bits = 2, .scheme = scheme, .clip = clip});
            return (values - q.dequantize()).squaredNorm() / static_cast<float>(values.size());
        };
        EXPECT_LT(squared_error(Clip::mse_optimal), 0.85f * squared_error(Clip::none)) << name(scheme);
        EXPECT_GT(squared_error(Clip::mse_optimal), 0.11f) << "the best quantizer of 4 levels has 0.1175";
    }
    EXPECT_EQ(kvplane::PerChannelOptions{}.clip, Clip::none);
    EXPECT_EQ(kvplane::PerTokenOptions{}.clip, Clip::none);
    EXPECT_EQ(kvplane::PerGroupOptions{}.clip, Clip::none);
}

// -- Edges ------------------------------------------------------------------------------------------------

TEST(Empty, InputsMakeEmptyResults) {
    for (const auto& [tokens, channels] : {std::pair<Index, Index>{0, 5}, {5, 0}, {0, 0}})
        for (const Method& method : all_functions) {
            const Quantized q = quantized(method, Matrix(tokens, channels));
            SCOPED_TRACE(testing::Message() << tokens << " x " << channels << ", " << method.text());
            EXPECT_EQ(q.tokens(), tokens);
            EXPECT_EQ(q.channels(), channels);
            EXPECT_EQ(q.bytes(), 0);
            EXPECT_EQ(q.bits_per_element(), 0.0);
            EXPECT_EQ(q.error_bound(), 0.0);
            EXPECT_EQ(q.frobenius_error_bound(), 0.0);
            EXPECT_EQ(q.dequantize().rows(), tokens);
            EXPECT_EQ(q.dequantize().cols(), channels);
            EXPECT_EQ(q.dequantize_tensor().dimension(1), tokens);
            refusal(ErrorCode::index, [&] { q.code(0, 0); });
        }
    const Eigen::Tensor<float, 3> tensor(2, 0, 8);
    EXPECT_EQ(kvplane::per_channel(tensor).heads(), 2);
    const Eigen::Tensor<float, 3> no_heads(0, 3, 8);
    EXPECT_EQ(kvplane::per_token(no_heads).channels(), 0);
}

// -- Refusals ---------------------------------------------------------------------------------------------

template <class Scalar>
class QuantizeRefuses : public testing::Test {};
TYPED_TEST_SUITE(QuantizeRefuses, Scalars);

TYPED_TEST(QuantizeRefuses, NumbersThatCannotBeStoredWithTheirPosition) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    constexpr Index heads = 2, head_dim = 20, tokens = 150;
    std::vector<std::pair<float, ErrorCode>> bad{
        {std::numeric_limits<float>::quiet_NaN(), ErrorCode::not_finite},
        {infinity, ErrorCode::not_finite},
        {-infinity, ErrorCode::not_finite}};
    if constexpr (!std::is_same_v<TypeParam, Eigen::half>) {
        bad.push_back({65792.0f, ErrorCode::beyond_fp16});
        bad.push_back({-1e30f, ErrorCode::beyond_fp16});
    }
    if constexpr (std::is_same_v<TypeParam, float>) bad.push_back({65504.01f, ErrorCode::beyond_fp16});
    struct Position {
        Index token, head, channel;
    };
    for (const auto& [value, code] : bad)
        for (const auto& [token, head, channel] :
             {Position{0, 0, 0}, Position{5, 1, 3}, Position{149, 1, 19}, Position{128, 0, 16}})
            for (const Method& method : all_functions) {
                RowMajorMatrix<TypeParam> input =
                    RowMajorMatrix<TypeParam>::Constant(tokens, heads * head_dim, TypeParam(1.0f));
                input(token, head * head_dim + channel) = TypeParam(value);
                const std::string sentence = refusal(code, [&] { quantized(method, input, heads); });
                const std::string position = "token " + std::to_string(token) + ", head " +
                                             std::to_string(head) + ", channel " + std::to_string(channel) +
                                             " ";
                EXPECT_NE(sentence.find(position), std::string::npos) << sentence;
                EXPECT_NE(sentence.find("expected"), std::string::npos) << sentence;
            }
}

TEST(QuantizeRefusesNumbers, TheFirstOfSeveral) {
    Matrix input = Matrix::Zero(300, 40);
    input(140, 2) = input(130, 39) = input(299, 0) = std::numeric_limits<float>::quiet_NaN();
    for (const Method& method : all_functions) {
        const std::string sentence = refusal(ErrorCode::not_finite, [&] { quantized(method, input, 2); });
        EXPECT_NE(sentence.find("token 130, head 1, channel 19"), std::string::npos) << sentence;
    }
    Eigen::Tensor<float, 3> tensor(2, 9, 5);
    tensor.setZero();
    tensor(1, 8, 4) = 1e9f;
    const std::string sentence = refusal(ErrorCode::beyond_fp16, [&] { kvplane::per_token(tensor, {}); });
    EXPECT_NE(sentence.find("token 8, head 1, channel 4"), std::string::npos) << sentence;
}

TEST(QuantizeRefusesNumbers, ButTakesTheLargestFp16) {
    Matrix input = Matrix::Zero(3, 4);
    input(1, 2) = 65504.0f;
    input(2, 3) = -65504.0f;
    for (const Method& method : all_methods({2, 4, 8})) {
        const Quantized q = quantized(method, input);
        const Matrix error = input - q.dequantize();
        EXPECT_LE(error.cwiseAbs().maxCoeff(), q.error_bound()) << method.text();
    }
    // The one grid that fp16 cannot hold: one bit, extremes reproduced, over more than half of fp16's range.
    Matrix ends(2, 1);
    ends << -65504.0f, 65504.0f;
    for (const Method& method : all_functions) {
        const Method one_bit = method.with(Scheme::min_max, 1);
        if (method.function == Method::per_channel) {
            const std::string sentence = refusal(ErrorCode::beyond_fp16, [&] { quantized(one_bit, ends); });
            EXPECT_NE(sentence.find("1-bit min_max"), std::string::npos) << sentence;
        }
        EXPECT_LE((ends - quantized(method.with(Scheme::cell, 1), ends).dequantize()).cwiseAbs().maxCoeff(),
                  65504.0f / 2 + 1);
    }
}

/// That the sentence names the option and says what was expected.
void expect_option_refused(const std::string& option, const std::function<void()>& call,
                           ErrorCode code = ErrorCode::option) {
    const std::string sentence = refusal(code, call);
    EXPECT_NE(sentence.find(option), std::string::npos) << sentence;
}

TEST(QuantizeRefusesOptions, OutsideWhatIsSupported) {
    const Matrix input = Matrix::Zero(8, 6);
    for (const int bits : {-1, 0, 9, 16, 1000})
        for (const Method& method : all_functions)
            expect_option_refused("expected 1 to 8",
                                  [&] { quantized(method.with(Scheme::min_max, bits), input); });
    for (const Method& method : all_functions)
        expect_option_refused("symmetric", [&] { quantized(method.with(Scheme::symmetric, 1), input); });
    for (const Index group : {Index{0}, Index{-1}, -largest_index}) {
        expect_option_refused("group_tokens", [&] { kvplane::per_channel(input, {.group_tokens = group}); });
        expect_option_refused("group_channels",
                              [&] { kvplane::per_group(input, {.group_channels = group}); });
        expect_option_refused("group", [&] {
            kvplane::quantize(kvplane::head_rows(input), {Granularity::per_token, group}, 4, "input");
        });
    }
    for (const Method& method : all_functions) {
        for (const Index heads : {0, -2})
            expect_option_refused("heads", [&] { quantized(method, input, heads); });
        expect_option_refused(
            "6 channels", [&] { quantized(method, input, 4); }, ErrorCode::shape);
    }
    for (const Method& method : all_functions)
        expect_option_refused("expected 1 to 8",
                              [&] { quantized(method.with(Scheme::min_max, 0), Matrix(0, 6)); });
}

TEST(DequantizeRefuses, WhatIsNotThere) {
    const Quantized q = kvplane::per_channel(Matrix::Random(10, 6), {.bits = 5});
    Matrix values = Matrix::Constant(4, 6, -99.0f);
    const auto tries = [&](Index first, int depth, auto& rows) { q.dequantize_rows(first, depth, rows); };
    for (const int depth : {-1, 0, 6, 16}) {
        expect_option_refused("depth", [&] { tries(0, depth, values); });
        expect_option_refused("depth", [&] { q.dequantize(depth); });
        expect_option_refused("depth", [&] { q.dequantize_tensor(depth); });
        expect_option_refused("depth", [&] { q.error_bound(depth); });
        expect_option_refused("depth", [&] { q.frobenius_error_bound(depth); });
    }
    for (const Index first : {Index{-1}, Index{7}, Index{10}, largest_index})
        expect_option_refused(
            "tokens", [&] { tries(first, 5, values); }, ErrorCode::index);
    for (const Index columns : {0, 5, 7}) {
        Matrix wrong = Matrix::Constant(4, columns, -99.0f);
        expect_option_refused(
            "columns", [&] { tries(0, 5, wrong); }, ErrorCode::shape);
        EXPECT_TRUE((wrong.array() == -99.0f).all());
    }
    EXPECT_TRUE((values.array() == -99.0f).all()) << "nothing is written before a refusal";
    for (const auto& [token, channel] : {std::pair<Index, Index>{-1, 0}, {0, -1}, {10, 0}, {0, 6}}) {
        refusal(ErrorCode::index, [&, t = token, c = channel] { q.code(t, c); });
        refusal(ErrorCode::index, [&, t = token, c = channel] { q.grid(t, c); });
    }
}

}  // namespace
