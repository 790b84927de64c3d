// kvplane/cuda/latents.hpp: keys on their way into latents: to the frame of the basis, and times its columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/block.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/input.hpp"
#include "kvplane/cuda/numbers.hpp"
#include "kvplane/cuda/rotate.hpp"
#include "kvplane/cuda/token_rows.hpp"

namespace kvplane::cuda::detail {

KVPLANE_DEVICE inline int centre_shared_bytes(int dim) {
    return 4 * step_rows * pitch_of(dim) + row_parts_bytes(step_rows) + row_grids_bytes(step_rows);
}
/// 32 tokens of a head of a tile to the frame of the basis: block `index` of tiles x heads x 4.
template <class Block>
KVPLANE_DEVICE void centre_keys(const Block& block, const CentreArguments& a, int index, std::byte* shared) {
    const int base = index % (tile_rows / step_rows) * step_rows,
              head = index / (tile_rows / step_rows) % a.heads,
              tile = index / (tile_rows / step_rows) / a.heads, dim = a.side.dim, pitch = pitch_of(dim);
    float *const rows = reinterpret_cast<float*>(shared), *const parts = rows + step_rows * pitch,
                 *const row_grids = parts + step_rows * row_parts;
    stage_tokens(block, a.side, head, a.sources.first + static_cast<std::int64_t>(tile_rows) * tile, base, 0,
                 step_rows, a.sources.recent[tile], rows, pitch, parts, row_grids, &a.findings->bad[0],
                 &a.findings->largest[0]);
    if (a.rotates_back) rotate_rows(block, rows, pitch, 0, step_rows, dim, 0, a.side.signs);
    if (a.pair_count > 0)
        block.run([&](int thread, int threads) {
            const Divisor pairs(a.pair_count);
            for (int i = thread; i < step_rows * a.pair_count; i += threads) {
                const int row = pairs.quotient(i), pair = pairs.rest(i);
                const std::int64_t of =
                    a.angles_by_row ? static_cast<std::int64_t>(tile) * tile_rows + base + row : tile;
                const float* const angle = a.angles + 2 * (of * a.pair_count + pair);
                float &x = rows[row * pitch + place_of(a.pairs[2 * pair])],
                      &y = rows[row * pitch + place_of(a.pairs[2 * pair + 1])];
                const float xc = product_of(x, angle[0]), ys = product_of(y, angle[1]),
                            xs = product_of(x, angle[1]), yc = product_of(y, angle[0]);
                x = difference_of(xc, ys);
                y = sum_of(xs, yc);
            }
        });
    block.run([&](int thread, int threads) {
        const ThreadGrid grid(thread, threads, dim, 32);
        for (int c = grid.column; c < dim; c += grid.columns) {
            const float mean = a.mean[head * dim + c];
            float* const to = a.centred +
                              (static_cast<std::int64_t>(tile) * tile_rows + base) * a.heads * dim +
                              head * dim + c;
            KVPLANE_UNROLL_FEW
            for (int row = grid.row; row < step_rows; row += grid.rows)
                to[static_cast<std::int64_t>(row) * a.heads * dim] =
                    difference_of(rows[row * pitch + place_of(c)], mean);
        }
    });
}

/// Shared memory of a product's block: [depth][rows] of the left factor, [depth][columns] of the right one,
/// and sums, [rows][columns].
KVPLANE_DEVICE inline int product_shared_bytes() {
    using A = ProductArguments;
    return 4 * (A::depth * (A::rows_of_block + A::columns_of_block) + A::rows_of_block * A::columns_of_block);
}
/// Rows and columns that a thread sums up: as many loads of four numbers as there are fours of them, for 32
/// products.
inline constexpr int product_rows = 8, product_columns = 4;

/// 64 tokens times 64 columns: block `index` of tiles x subspaces x strips x 2. Sums are in the order of the
/// rows of the columns, each product rounded.
template <class Block>
KVPLANE_DEVICE void multiply_keys(const Block& block, const ProductArguments& a, int index,
                                  std::byte* shared) {
    using A = ProductArguments;
    constexpr int parts = tile_rows / A::rows_of_block, half = A::rows_of_block / 2;
    const int base = index % parts * A::rows_of_block, strip = index / parts % a.strips * A::columns_of_block;
    const Subspace& subspace = a.subspaces[index / parts / a.strips % a.subspace_count];
    const int tile = index / parts / a.strips / a.subspace_count;
    const int depth = a.back ? subspace.kept : subspace.channels,
              columns = a.back ? subspace.channels : subspace.kept;
    if (strip >= columns) return;
    float* const centred = a.centred + (static_cast<std::int64_t>(tile) * tile_rows + base) * a.all_channels +
                           subspace.first_channel;
    float* const latents = a.latents + tile * a.latent_stride + subspace.latent_at +
                           static_cast<std::int64_t>(base) * subspace.latent_stride;
    const float* const from = a.back ? latents : centred;
    const std::int64_t from_stride = a.back ? subspace.latent_stride : a.all_channels;
    const bool in_fours = a.back || (a.all_channels % 4 == 0 && subspace.first_channel % 4 == 0);
    const float* const factors = a.back ? subspace.from_latents : subspace.to_latents;
    const int factor_stride = whole_units_of(columns);
    float *const x = reinterpret_cast<float*>(shared), *const y = x + A::depth * A::rows_of_block,
                 *const sums = y + A::depth * A::columns_of_block;
    for (int first = 0; first < depth; first += A::depth) {
        const int count = depth - first < A::depth ? depth - first : A::depth;
        const bool last = first + count == depth;
        block.run([&](int thread, int threads) {
            // Threads side by side have rows side by side, so that they store to different banks.
            KVPLANE_UNROLL_FEW
            for (int i = thread; i < A::rows_of_block * (A::depth / 4); i += threads) {
                const int row = i % A::rows_of_block, k = i / A::rows_of_block * 4;
                const float* const four = from + row * from_stride + first + k;
                float numbers[4] = {};
                if (in_fours && k + 4 <= count) {
                    load_numbers<4>(four, numbers);
                } else {
                    for (int j = 0; j < 4; ++j)
                        if (k + j < count) numbers[j] = four[j];
                }
                for (int j = 0; j < 4; ++j) x[(k + j) * A::rows_of_block + row] = numbers[j];
            }
            KVPLANE_UNROLL_FEW
            for (int i = thread; i < A::depth * (A::columns_of_block / 4); i += threads) {
                const int k = i / (A::columns_of_block / 4), j = i % (A::columns_of_block / 4) * 4;
                float numbers[4] = {};
                if (k < count && strip + j < factor_stride)
                    load_numbers<4>(
                        factors + static_cast<std::int64_t>(first + k) * factor_stride + strip + j, numbers);
                put_numbers<4>(y + k * A::columns_of_block + j, numbers);
            }
        });
        block.run([&](int thread, int threads) {
            constexpr int across = A::columns_of_block / product_columns,
                          down = A::rows_of_block / product_rows;
            float off = 0.0f;
            for (int i = thread; i < down * across; i += threads) {
                // Four rows and, half a block behind them, four more.
                const int row = i % down * 4, j = i / down * product_columns;
                float sum[product_rows][product_columns];
                KVPLANE_UNROLL
                for (int r = 0; r < product_rows; ++r) {
                    const int of_block = row + r % 4 + r / 4 * half;
                    if (first == 0)
                        for (float& number : sum[r]) number = 0.0f;
                    else
                        load_numbers<4>(sums + of_block * A::columns_of_block + j, sum[r]);
                }
                KVPLANE_UNROLL_FEW
                for (int k = 0; k < count; ++k) {
                    float left[product_rows], right[product_columns];
                    KVPLANE_UNROLL
                    for (int r = 0; r < product_rows; r += 4) {
                        float four[4];
                        load_numbers<4>(x + k * A::rows_of_block + row + r / 4 * half, four);
                        for (int n = 0; n < 4; ++n) left[r + n] = four[n];
                    }
                    load_numbers<4>(y + k * A::columns_of_block + j, right);
                    KVPLANE_UNROLL
                    for (int r = 0; r < product_rows; ++r) KVPLANE_UNROLL
                    for (int c = 0; c < product_columns; ++c)
                        sum[r][c] = sum_of(sum[r][c], product_of(right[c], left[r]));
                }
                KVPLANE_UNROLL
                for (int r = 0; r < product_rows; ++r) {
                    const int of_block = row + r % 4 + r / 4 * half;
                    if (!last) {
                        put_numbers<4>(sums + of_block * A::columns_of_block + j, sum[r]);
                        continue;
                    }
                    KVPLANE_UNROLL
                    for (int c = 0; c < product_columns; ++c) {
                        const int column = strip + j + c;
                        if (column >= columns) continue;
                        if (a.back) {
                            const float number =
                                centred[static_cast<std::int64_t>(of_block) * a.all_channels + column];
                            off = greater_of(off, magnitude_of(difference_of(number, sum[r][c])));
                        } else {
                            constexpr float most = 30000.0f;
                            latents[static_cast<std::int64_t>(of_block) * subspace.latent_stride + column] =
                                sum[r][c] < -most  ? -most
                                : sum[r][c] > most ? most
                                                   : sum[r][c];
                        }
                    }
                }
            }
            if (off > 0.0f) raise(&a.findings->excess[0], static_cast<double>(off));
        });
    }
}

}  // namespace kvplane::cuda::detail
