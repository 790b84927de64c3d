// Rows to columns of all sizes, on every instruction set, against plain loops. What stands around stays as it is.
#include "kvplane/simd/transpose.hpp"

#include <cstdint>
#include <vector>

#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

namespace simd = kvplane::detail::simd;
using kvplane::Index;
using kvplane::Isa;
using kvplane_test::for_each_isa;
using kvplane_test::Random;

template <class T>
std::vector<T> numbers(Random& random, Index count) {
    std::vector<T> made(static_cast<std::size_t>(count));
    for (T& x : made) x = static_cast<T>(random());
    return made;
}

TEST(Transpose, TurnsWordsOfAllSizes) {
    Random random(kvplane_test::seed());
    for (int round = 0; round < 60; ++round) {
        const auto rows = static_cast<Index>(random() % 50), columns = static_cast<Index>(random() % 50),
                   from_stride = columns + static_cast<Index>(random() % 5),
                   to_stride = rows + static_cast<Index>(random() % 5);
        const auto from = numbers<std::uint32_t>(random, rows * from_stride + 1),
                   before = numbers<std::uint32_t>(random, columns * to_stride + 1);
        std::vector<std::uint32_t> expected = before;
        for (Index r = 0; r < rows; ++r)
            for (Index c = 0; c < columns; ++c)
                expected[static_cast<std::size_t>(c * to_stride + r)] =
                    from[static_cast<std::size_t>(r * from_stride + c)];
        for_each_isa([&](Isa isa) {
            std::vector<std::uint32_t> to = before;
            kvplane::detail::run_on(isa, [&](auto) KVPLANE_BODY {
                simd::transpose_words(from.data(), from_stride, rows, columns, to.data(), to_stride);
            });
            EXPECT_EQ(to, expected) << rows << " x " << columns;
        });
    }
}

TEST(Transpose, MirrorsLowerTriangles) {
    Random random(kvplane_test::seed());
    for (Index size = 0; size < 70; ++size) {
        const Index stride = size + static_cast<Index>(random() % 3);
        const auto before = numbers<std::uint32_t>(random, size * stride + 1);
        std::vector<std::uint32_t> expected = before;
        for (Index r = 0; r < size; ++r)
            for (Index c = 0; c < r; ++c)
                expected[static_cast<std::size_t>(c * stride + r)] =
                    before[static_cast<std::size_t>(r * stride + c)];
        for_each_isa([&](Isa isa) {
            std::vector<std::uint32_t> matrix = before;
            kvplane::detail::run_on(
                isa, [&](auto) KVPLANE_BODY { simd::mirror_lower(matrix.data(), stride, size); });
            EXPECT_EQ(matrix, expected) << size;
        });
    }
}

TEST(Transpose, TurnsBlocksOfBytesWhoseRowsStandAnywhere) {
    Random random(kvplane_test::seed());
    const auto from = numbers<std::uint8_t>(random, 40 * 19);
    std::vector<Index> row(16);
    for (Index& r : row) r = static_cast<Index>(random() % 40);
    const Index to_stride = 21;
    const auto before = numbers<std::uint8_t>(random, 16 * to_stride);
    std::vector<std::uint8_t> expected = before;
    for (Index r = 0; r < 16; ++r)
        for (Index c = 0; c < 16; ++c)
            expected[static_cast<std::size_t>(c * to_stride + r)] =
                from[static_cast<std::size_t>(row[static_cast<std::size_t>(r)] * 19 + c)];
    for_each_isa([&](Isa isa) {
        std::vector<std::uint8_t> to = before;
        kvplane::detail::run_on(isa, [&](auto) KVPLANE_BODY {
            simd::transpose_bytes_16x16(
                [&](int r) KVPLANE_BODY { return from.data() + row[static_cast<std::size_t>(r)] * 19; },
                to.data(), to_stride);
        });
        EXPECT_EQ(to, expected);
    });
}

}  // namespace
