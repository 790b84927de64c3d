// kvplane/latent/products.hpp: products of rows of keys with the columns of a basis.
//
// Accumulator: fp32, one a result. Terms are added in the order of the channels, and each product is rounded
// before it is added, so that what is stored is the same on every instruction set and with every compiler.
#pragma once

#include "kvplane/matrix.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/simd/vector.hpp"

namespace kvplane::detail {

template <int Lanes, int rows, int strips>
KVPLANE_INLINE void multiply_block(RowView<const float> x, RowView<const float> columns, RowView<float> to) {
    simd::Floats<Lanes> sums[rows][strips]{}, column[strips];
    for (Index c = 0; c < columns.rows; ++c) {
        for (int s = 0; s < strips; ++s) simd::load(column[s], columns[c] + s * Lanes);
        for (int r = 0; r < rows; ++r) {
            const simd::Floats<Lanes> factor = simd::Floats<Lanes>{} + x[r][c];
            for (int s = 0; s < strips; ++s) {
                simd::Floats<Lanes> product;
                simd::multiply_rounded<Lanes>(product, column[s], factor);
                sums[r][s] += product;
            }
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int s = 0; s < strips; ++s) simd::store(to[r] + s * Lanes, sums[r][s]);
}

/// to[r][j] = sum over c of x[r][c] columns[c][j] for j below `count`, a multiple of 16.
inline void multiply_rows(Isa isa, RowView<const float> x, RowView<const float> columns, Index count,
                          RowView<float> to) noexcept {
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        // As many sums as there are registers for, and at least as many as an addition takes cycles.
        constexpr int rows = lanes == 16 ? 8 : 4;
        const auto strip = [&](auto strips, Index j) KVPLANE_BODY {
            const RowView<const float> from{columns.data + j, columns.stride, columns.rows};
            const RowView<float> results{to.data + j, to.stride, to.rows};
            Index r = 0;
            for (; r + rows <= x.rows; r += rows)
                multiply_block<lanes, rows, strips>(x.from(r), from, results.from(r));
            for (; r < x.rows; ++r) multiply_block<lanes, 1, strips>(x.from(r), from, results.from(r));
        };
        Index j = 0;
        for (; j + 2 * lanes <= count; j += 2 * lanes) strip(LaneCount<2>{}, j);
        for (; j < count; j += lanes) strip(LaneCount<1>{}, j);
    });
}

/// The largest |a - b| over some rows of `count` numbers.
inline float largest_difference(Isa isa, RowView<const float> a, RowView<const float> b,
                                Index count) noexcept {
    return run_on(isa, [=](auto lanes) KVPLANE_BODY {
        simd::Floats<lanes> largest{}, x, y;
        float rest = 0.0f;
        for (Index r = 0; r < a.rows; ++r) {
            Index c = 0;
            for (; c + lanes <= count; c += lanes) {
                simd::load(x, a[r] + c);
                simd::load(y, b[r] + c);
                const auto off = (simd::Floats<lanes>)((simd::Words<lanes>)(x - y) & 0x7FFFFFFFu);
                largest = largest < off ? off : largest;
            }
            for (; c < count; ++c) {
                const float off = a[r][c] - b[r][c];
                rest = rest < off ? off : rest < -off ? -off : rest;
            }
        }
        for (int i = 0; i < lanes; ++i) rest = rest < largest[i] ? largest[i] : rest;
        return rest;
    });
}

}  // namespace kvplane::detail
