// kvplane/cuda/latents.hpp: keys on their way into latents: to the frame of the basis, and times its columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/block.hpp"
#include "kvplane/cuda/device.hpp"
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
            for (int i = thread; i < step_rows * a.pair_count; i += threads) {
                const int row = i / a.pair_count, pair = i % a.pair_count;
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
        for (int i = thread; i < step_rows * dim; i += threads) {
            const int row = i / dim, c = i % dim;
            a.centred[(static_cast<std::int64_t>(tile) * tile_rows + base + row) * a.heads * dim +
                      head * dim + c] =
                difference_of(rows[row * pitch + place_of(c)], a.mean[head * dim + c]);
        }
    });
}

KVPLANE_DEVICE inline int product_shared_bytes() {
    using A = ProductArguments;
    return 4 * (A::rows_of_block * (A::depth + 1) + A::depth * A::columns_of_block +
                A::rows_of_block * A::columns_of_block);
}
/// 64 tokens times 32 columns: block `index` of tiles x subspaces x strips x 2. Sums are in the order of the
/// rows of the columns, each product rounded.
template <class Block>
KVPLANE_DEVICE void multiply_keys(const Block& block, const ProductArguments& a, int index,
                                  std::byte* shared) {
    using A = ProductArguments;
    constexpr int halves = tile_rows / A::rows_of_block, eight = 8;
    const int base = index % halves * A::rows_of_block,
              strip = index / halves % a.strips * A::columns_of_block;
    const Subspace& subspace = a.subspaces[index / halves / a.strips % a.subspace_count];
    const int tile = index / halves / a.strips / a.subspace_count;
    const int depth = a.back ? subspace.kept : subspace.channels,
              columns = a.back ? subspace.channels : subspace.kept;
    if (strip >= columns) return;
    float* const centred = a.centred + (static_cast<std::int64_t>(tile) * tile_rows + base) * a.all_channels +
                           subspace.first_channel;
    float* const latents = a.latents + tile * a.latent_stride + subspace.latent_at +
                           static_cast<std::int64_t>(base) * subspace.latent_stride;
    const float* const from = a.back ? latents : centred;
    const std::int64_t from_stride = a.back ? subspace.latent_stride : a.all_channels;
    const float* const factors = a.back ? subspace.from_latents : subspace.to_latents;
    const int factor_stride = whole_units_of(columns);
    float *const x = reinterpret_cast<float*>(shared), *const y = x + A::rows_of_block * (A::depth + 1),
                 *const sums = y + A::depth * A::columns_of_block;
    block.run([&](int thread, int threads) {
        for (int i = thread; i < A::rows_of_block * A::columns_of_block; i += threads) sums[i] = 0.0f;
    });
    for (int first = 0; first < depth; first += A::depth) {
        const int count = depth - first < A::depth ? depth - first : A::depth;
        block.run([&](int thread, int threads) {
            for (int i = thread; i < A::rows_of_block * A::depth; i += threads) {
                const int row = i / A::depth, k = i % A::depth;
                x[row * (A::depth + 1) + k] = k < count ? from[row * from_stride + first + k] : 0.0f;
            }
            for (int i = thread; i < A::depth * A::columns_of_block; i += threads) {
                const int k = i / A::columns_of_block, j = i % A::columns_of_block;
                y[i] = k < count ? factors[static_cast<std::int64_t>(first + k) * factor_stride + strip + j]
                                 : 0.0f;
            }
        });
        block.run([&](int thread, int threads) {
            for (int i = thread; i < A::rows_of_block / eight * A::columns_of_block; i += threads) {
                const int j = i % A::columns_of_block, row = i / A::columns_of_block * eight;
                float sum[eight];
                for (int r = 0; r < eight; ++r) sum[r] = sums[(row + r) * A::columns_of_block + j];
                for (int k = 0; k < count; ++k) {
                    const float factor = y[k * A::columns_of_block + j];
                    for (int r = 0; r < eight; ++r)
                        sum[r] = sum_of(sum[r], product_of(factor, x[(row + r) * (A::depth + 1) + k]));
                }
                for (int r = 0; r < eight; ++r) sums[(row + r) * A::columns_of_block + j] = sum[r];
            }
        });
    }
    block.run([&](int thread, int threads) {
        constexpr float most = 30000.0f;
        float off = 0.0f;
        for (int i = thread; i < A::rows_of_block * A::columns_of_block; i += threads) {
            const int row = i / A::columns_of_block, j = strip + i % A::columns_of_block;
            if (j >= columns) continue;
            const float sum = sums[i];
            if (a.back) {
                const float difference = magnitude_of(
                    difference_of(centred[static_cast<std::int64_t>(row) * a.all_channels + j], sum));
                off = off < difference ? difference : off;
            } else {
                latents[static_cast<std::int64_t>(row) * subspace.latent_stride + j] = sum < -most  ? -most
                                                                                       : sum > most ? most
                                                                                                    : sum;
            }
        }
        if (off > 0.0f) raise(&a.findings->excess[0], static_cast<double>(off));
    });
}

}  // namespace kvplane::cuda::detail
