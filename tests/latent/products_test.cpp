// Products of rows with a basis: sums in the order of the channels, each product rounded before it is added, on
// every instruction set; and the largest difference of two sets of rows.
#include "kvplane/latent/products.hpp"

#include <cmath>

#include "kvplane/quantize/kernels.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::Index;
using kvplane::Isa;
using kvplane::Matrix;
using kvplane::detail::row_view;
using kvplane_test::for_each_isa;
using kvplane_test::normal_matrix;

/// One number after the other. Products of fp32 numbers are exact in double, and so are rounded once.
Matrix product(const Matrix& x, const Matrix& columns) {
    Matrix to(x.rows(), columns.cols());
    for (Index r = 0; r < x.rows(); ++r)
        for (Index j = 0; j < columns.cols(); ++j) {
            float sum = 0.0f;
            for (Index c = 0; c < x.cols(); ++c) {
                const double exact = static_cast<double>(x(r, c)) * static_cast<double>(columns(c, j));
                sum += static_cast<float>(exact);
            }
            to(r, j) = sum;
        }
    return to;
}

TEST(LatentProducts, AreSumsInTheOrderOfTheChannels) {
    kvplane_test::Random random(kvplane_test::seed());
    for (const Index rows : {1, 3, 8, 13, 128})
        for (const Index channels : {1, 40, 128, 300})
            for (const Index count : {16, 32, 48, 80, 112}) {
                const Matrix x = normal_matrix(rows, channels, random),
                             columns = normal_matrix(channels, count, random), expected = product(x, columns);
                for_each_isa([&](Isa isa) {
                    Matrix found = Matrix::Constant(rows, count + 1, -99.0f);
                    kvplane::detail::multiply_rows(isa, row_view(x), row_view(columns), count,
                                                   {found.data(), found.cols(), rows});
                    EXPECT_EQ(found.leftCols(count), expected)
                        << rows << " rows of " << channels << ", " << count << " columns";
                    EXPECT_TRUE((found.rightCols(1).array() == -99.0f).all());
                });
            }
}

TEST(LatentProducts, TheLargestDifferenceWhereverItIs) {
    for (const Index count : {1, 15, 16, 40, 67})
        for (Index at = 0; at < 3 * count; at += 7)
            for (const float off : {-2.5f, 2.5f})
                for_each_isa([&](Isa isa) {
                    Matrix a = Matrix::Constant(3, count, 1.0f), b = Matrix::Constant(3, count, 1.5f);
                    a.data()[at] = 1.5f + off;
                    EXPECT_EQ(kvplane::detail::largest_difference(isa, row_view(a), row_view(b), count),
                              2.5f);
                });
}

}  // namespace
