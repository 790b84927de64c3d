// kvplane/cuda/latent_math.cuh: queries on their way into the latents of a tile, by the 32 lanes of a warp.
//
// Keys in the frame of their tile are those before RoPE, turned by no more than 127 positions
// (transform/rope.hpp). So a query is turned back by the tile's origin, and multiplied with the columns of
// the basis (T6). Both are fp16 in that product; the basis is stored so. Rounding a turned query adds less to
// scores than rounding factors to 16 bits does: a channel's part of them is off by 2^-12 of itself, and the
// parts are many.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/latent_view.hpp"
#include "kvplane/cuda/tile_math.cuh"

namespace kvplane::cuda {

/// paired: of at most four query rows. A product has 16 rows: those of four tiles, otherwise of two.
template <class W, bool paired>
struct LatentMath {
    using Word = typename W::Word;
    using Float = typename W::Float;

    static constexpr int rows = paired ? 4 : 8, tiles = LatentView::product_rows / rows;

    /// Memory of the block: queries as given and with the channels of RoPE's pairs exchanged, and the table
    /// of the head; and of the warp, LatentView::warp_bytes().
    struct Memory {
        const std::byte *queries, *partners;
        std::uint32_t stride;  ///< bytes from row to row
        const std::byte* head;
        std::byte* warp;
    };

    /// The largest magnitude of the lane's query row.
    KVPLANE_DEVICE static Float largest_of(const LatentView& view, const Memory& memory) {
        Float largest(1e-30f);
        for (int first = 0; first < view.channels; first += 16) {
            Float x[4];
            load_floats<W>(memory.queries, query_row() * memory.stride + channel_of(first) * 4u, x);
            KVPLANE_UNROLL
            for (int i = 0; i < 4; ++i) largest = W::maximum(largest, W::absolute(x[i]));
        }
        return over_quarters_max<W>(largest);
    }

    /// Makes the latents of all rows for `tiles` tiles, whose row 0 stands at origin[tile], in the memory of
    /// the warp. largest: largest_of().
    KVPLANE_DEVICE static void project(const LatentView& view, const LatentHead& head, const Memory& memory,
                                       Float largest, const std::uint32_t (&origin)[tiles]) {
        W::sync();  // all lanes are done with the latents before
        turn(view, memory, origin);
        W::sync();
        std::byte* const operands = memory.warp + view.operands_at();
        // So that no sum of two channels leaves fp16.
        const Float scale = 256.0f / largest;
        const Word angles_at = first_tile() * std::uint32_t(view.channels * 8);
        const auto second_tile = std::uint32_t(tiles / 2 * view.channels * 8);
        Float offset[2] = {Float(0.0f), Float(0.0f)};
        for (int first = 0; first < view.channels; first += 16) {
            const Word channel = channel_of(first), at = query_row() * memory.stride + channel * 4u;
            Float x[4], partner[4], mean[4], angles[2][8];
            load_floats<W>(memory.queries, at, x);
            load_floats<W>(memory.partners, at, partner);
            load_floats<W>(memory.warp, angles_at + channel * 8u, angles[0]);
            load_floats<W>(memory.warp, angles_at + (channel * 8u + second_tile), angles[1]);
            load_floats<W>(memory.head + view.mean_at, channel * 4u, mean);
            Word a[4];
            KVPLANE_UNROLL
            for (int tile = 0; tile < 2; ++tile) {
                Float turned[4];
                KVPLANE_UNROLL
                for (int i = 0; i < 4; ++i) {
                    turned[i] = x[i] * angles[tile][2 * i] + partner[i] * angles[tile][2 * i + 1];
                    offset[tile] = offset[tile] + turned[i] * mean[i];
                    turned[i] = turned[i] * scale;
                }
                a[tile] = W::pack_halves(turned[0], turned[1]);
                a[2 + tile] = W::pack_halves(turned[2], turned[3]);
            }
            W::store16(operands, W::lane() * 16u + std::uint32_t(first * 32), a);
        }
        KVPLANE_UNROLL
        for (int tile = 0; tile < 2; ++tile) {
            offset[tile] = over_quarters<W>(offset[tile]);
            W::store4(memory.warp, (W::lane() >> 2) * 4u + (view.offsets_at() + std::uint32_t(32 * tile)),
                      W::as_word(offset[tile]), (W::lane() & 3u) == 0u);
        }
        W::sync();  // operands are there, and angles are not needed any more
        for (int group = 0; group < head.column_groups; ++group)
            multiply(view, memory, operands, group, largest * (1.0f / 256.0f));
        W::sync();
    }

    /// The latents of tile `tile` of those that project() made.
    KVPLANE_DEVICE static QueryRowsView latents(const LatentView& view, const Memory& memory, int tile) {
        const std::uint32_t at = std::uint32_t(tile) * view.tile_bytes(rows);
        return {memory.warp + at, 0u, view.offsets_at() + std::uint32_t(4 * rows * tile) - at};
    }

  private:
    KVPLANE_DEVICE static Word query_row() { return paired ? W::lane() >> 2 & 3u : W::lane() >> 2; }
    /// The tile of the lane's row of the first eight of a product; that of the last eight is tiles / 2
    /// further.
    KVPLANE_DEVICE static Word first_tile() { return paired ? W::lane() >> 4 : Word(0u); }
    /// The first of the four channels of sixteen that a lane has.
    KVPLANE_DEVICE static Word channel_of(int first) { return (W::lane() & 3u) * 4u + std::uint32_t(first); }
    /// [tile][channel] cosine and sine of the turn back by the tile's origin.
    KVPLANE_DEVICE static void turn(const LatentView& view, const Memory& memory,
                                    const std::uint32_t (&origin)[tiles]) {
        for (int first = 0; first < view.channels; first += 32) {
            // Of 16 channels half of the lanes do what others do too.
            const Word channel =
                W::minimum(W::lane() + std::uint32_t(first), Word(std::uint32_t(view.channels - 1)));
            Word turns[2];
            W::load8(memory.head + view.turns_at, channel * 8u, turns);
            KVPLANE_UNROLL
            for (int i = 0; i < tiles; ++i) {
                // Whole turns fall away.
                const Word turned = turns[1] * origin[i] + W::multiply_high(turns[0], Word(origin[i]));
                W::store8(memory.warp, (channel + std::uint32_t(i * view.channels)) * 8u,
                          W::as_word(W::cosine(turned)), W::as_word(W::sine(turned)));
            }
        }
    }
    /// The latents of 32 columns.
    KVPLANE_DEVICE static void multiply(const LatentView& view, const Memory& memory,
                                        const std::byte* operands, int group, Float worth) {
        Float sums[4][4];
        KVPLANE_UNROLL
        for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = Float(0.0f);
        const int depth = view.channels / 16;
        const std::byte* const columns = memory.head + view.basis_at + group * depth * 1024;
        KVPLANE_UNROLL_FEW
        for (int k = 0; k < depth; ++k) {
            Word a[4], b[2][4];
            W::load16(operands, W::lane() * 16u + std::uint32_t(512 * k), a);
            KVPLANE_UNROLL
            for (int pair = 0; pair < 2; ++pair)
                W::load16(columns, W::lane() * 16u + std::uint32_t(1024 * k + 512 * pair), b[pair]);
            KVPLANE_UNROLL
            for (int n = 0; n < 4; ++n)
                W::multiply_halves(sums[n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
        const Word row_at = first_tile() * view.tile_bytes(rows) + query_row() * 4u;
        const std::uint32_t second_tile = std::uint32_t(tiles / 2) * view.tile_bytes(rows);
        KVPLANE_UNROLL
        for (int n = 0; n < 4; ++n) {
            const Word column = (W::lane() & 3u) * 2u + std::uint32_t(32 * group + 8 * n);
            Word scale[2];
            W::load8(memory.head + view.scale_at, column * 4u, scale);
            KVPLANE_UNROLL
            for (int i = 0; i < 4; ++i)
                W::store4(memory.warp,
                          row_at + column * std::uint32_t(rows * 4) +
                              (std::uint32_t(i % 2 * rows * 4) + (i / 2 == 1 ? second_tile : 0u)),
                          W::as_word(sums[n][i] * (W::as_float(scale[i % 2]) * worth)));
        }
    }
};

}  // namespace kvplane::cuda
