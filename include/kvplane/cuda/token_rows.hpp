// kvplane/cuda/token_rows.hpp: tokens as they are stored outside tiles: rows of fp16 or of 8 bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/block.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/input.hpp"
#include "kvplane/cuda/numbers.hpp"
#include "kvplane/cuda/rotate.hpp"

namespace kvplane::cuda::detail {

/// Parts of a row whose largest magnitudes are found apart.
inline constexpr int row_parts = 8;

/// Where the grid of a row of 8 bits stands.
struct RowGrids {
    float *step, *lower, *inverse;  ///< [rows]
    KVPLANE_DEVICE RowGrids(float* from, int rows) : step(from), lower(from + rows), inverse(lower + rows) {}
};
/// Bytes of shared memory for the parts and the grids of so many rows.
KVPLANE_DEVICE constexpr int row_parts_bytes(int rows) {
    return 4 * rows * row_parts;
}
KVPLANE_DEVICE constexpr int row_grids_bytes(int rows) {
    return 4 * rows * 3;
}

/// Takes tokens first + row of the input to the rows [begin, end) of `rows`, as floats in the frame in which
/// they are stored; checks them, and leaves the largest magnitude of each row in eight parts. to_halves:
/// whether they are then rounded to fp16.
template <class Block>
KVPLANE_DEVICE_INLINED void stage_rows(const Block& block, const Side& side, int head, std::int64_t first,
                                       int begin, int end, float* rows, int pitch, float* parts,
                                       bool to_halves, std::uint32_t* bad, std::uint32_t* largest) {
    if (begin >= end) return;
    const bool in_eights = side.dim % 8 == 0;
    block.run([&](int thread, int threads) {
        const InputPart all{side.input, first, head, 0, side.dim, begin, end};
        float most = 0.0f;
        with_type(side.input, [&](auto type) {
            most = each_eight<decltype(type)::count>(all, thread, threads, [&](int c) {
                struct {
                    float at[8];
                } signs{};
                if (side.signs) {
                    KVPLANE_UNROLL
                    for (int i = 0; i < 8; ++i) signs.at[i] = c + i < side.dim ? side.signs[c + i] : 0.0f;
                }
                return [&side, rows, pitch, signs, c, in_eights](int row, const auto& eight) {
                    float x[8];
                    eight.numbers(x);
                    if (side.signs) {
                        KVPLANE_UNROLL
                        for (int i = 0; i < 8; ++i) x[i] = product_of(x[i], signs.at[i]);
                        if (in_eights) rotate_eight(x, c, side.dim);
                    }
                    put_numbers<8>(rows + row * pitch + place_of(c), x);
                };
            });
        });
        if (!(most <= 65504.0f)) find_bad(all, 65504.0f, bad);
    });
    if (side.signs)
        rotate_rows(block, rows, pitch, begin, end, side.dim, in_eights ? first_stages : 0, nullptr);
    block.run([&](int thread, int threads) {
        float most = 0.0f;
        for (int item = thread; item < (end - begin) * row_parts; item += threads) {
            const int row = begin + item / row_parts, part = item % row_parts;
            float magnitude = 0.0f;
            int c = part * 4;
            for (; c + 4 <= side.dim; c += row_parts * 4) {
                float x[4];
                float* const at = rows + row * pitch + place_of(c);
                load_numbers<4>(at, x);
                KVPLANE_UNROLL
                for (int i = 0; i < 4; ++i) {
                    magnitude = greater_of(magnitude, magnitude_of(x[i]));
                    if (to_halves) x[i] = widened(nearest_half(x[i]));
                }
                if (to_halves) put_numbers<4>(at, x);
            }
            for (; c < side.dim && c % 4 != 3; ++c) {  // the part that has the rest of a row
                float& x = rows[row * pitch + place_of(c)];
                magnitude = magnitude < magnitude_of(x) ? magnitude_of(x) : magnitude;
                if (to_halves) x = widened(nearest_half(x));
            }
            parts[row * row_parts + part] = magnitude;
            most = most < magnitude ? magnitude : most;
            if (!(magnitude <= side.largest)) raise(bad, ~static_cast<std::uint32_t>(first + row));
        }
        raise_together(largest, bits_of(most));
    });
}
/// The grids of rows of 8 bits, from what stage_rows() left.
template <class Block>
KVPLANE_DEVICE void fit_rows(const Block& block, int begin, int end, const float* parts, RowGrids grids) {
    if (begin >= end) return;
    block.run([=](int thread, int threads) {
        for (int row = begin + thread; row < end; row += threads) {
            float most = 0.0f;
            for (int part = 0; part < row_parts; ++part) {
                const float x = parts[row * row_parts + part];
                most = most < x ? x : most;
            }
            const FittedGrid grid = fitted_grid(Scheme::symmetric, 8, -most, most);
            grids.step[row] = grid.step;
            grids.lower[row] = grid.lower;
            grids.inverse[row] = grid.inverse;
        }
    });
}

KVPLANE_DEVICE inline int rows_shared_bytes(int dim) {
    constexpr int rows = RowsArguments::rows_of_block;
    return 4 * rows * pitch_of(dim) + row_parts_bytes(rows) + row_grids_bytes(rows);
}
/// Tokens into rows of pages.
template <class Block>
KVPLANE_DEVICE void write_rows(const Block& block, const RowsArguments& a, int batch, int place,
                               std::byte* shared) {
    constexpr int most = RowsArguments::rows_of_block;
    const int side_index = place / a.heads, head = place % a.heads;
    const Side& side = a.sides[side_index];
    const RowPlace& to = a.places[side_index];
    const int done = batch * most, count = a.count - done < most ? a.count - done : most;
    const int pitch = pitch_of(side.dim);
    float* const rows = reinterpret_cast<float*>(shared);
    float* const parts = rows + most * pitch;
    const RowGrids grids(parts + most * row_parts, most);
    stage_rows(block, side, head, a.first + done, 0, count, rows, pitch, parts, false,
               &a.findings->bad[side_index], &a.findings->largest[side_index]);
    if (to.bits == 8) fit_rows(block, 0, count, parts, grids);
    block.run([&](int thread, int threads) {
        const Divisor fours((side.dim + 3) / 4), pages(a.page_rows);
        for (int item = thread; item < count * fours.by; item += threads) {
            const int row = fours.quotient(item), c = fours.rest(item) * 4, index = a.row + done + row,
                      left = side.dim - c < 4 ? side.dim - c : 4;
            std::byte* const page = a.pages[pages.quotient(index)];
            const std::int64_t at = static_cast<std::int64_t>(head) * to.capacity + pages.rest(index);
            const float* const from = rows + row * pitch + place_of(c);
            if (to.bits == 16) {
                auto* const halves =
                    reinterpret_cast<std::uint16_t*>(page + to.rows_at + 2 * (at * side.dim + c));
                if (side.dim % 4 == 0 && to.rows_at % 8 == 0) {
                    float x[4];
                    load_numbers<4>(from, x);
                    put_numbers<4>(halves, x);
                } else {
                    for (int i = 0; i < left; ++i) halves[i] = nearest_half(from[i]);
                }
                continue;
            }
            auto* const codes = reinterpret_cast<std::uint8_t*>(page + to.rows_at + at * side.dim + c);
            for (int i = 0; i < left; ++i)
                codes[i] = static_cast<std::uint8_t>(
                    bits_of(cell_of(from[i], grids.lower[row], grids.inverse[row], 255.0f)));
            if (c == 0)
                *reinterpret_cast<std::uint16_t*>(page + to.steps_at + 2 * at) =
                    nearest_half(grids.step[row]);
        }
    });
}

// Rows on their way into tiles
// ---------------------------------------------------------------------------

/// Up to four channels of a token that was stored outside tiles before; zeros behind the last.
KVPLANE_DEVICE inline void load_recent(const Side& side, const std::byte* page, int head, int row, int c,
                                       float (&x)[4]) {
    const std::int64_t at = static_cast<std::int64_t>(head) * side.recent.capacity + row % recent_rows;
    if (side.recent.bits == 16) {
        const auto* const halves =
            reinterpret_cast<const std::uint16_t*>(page + side.recent.rows_at + 2 * (at * side.dim + c));
        for (int i = 0; i < 4; ++i) x[i] = c + i < side.dim ? widened(halves[i]) : 0.0f;
        return;
    }
    const auto* const codes =
        reinterpret_cast<const std::uint8_t*>(page + side.recent.rows_at + at * side.dim + c);
    const float step = widened(*reinterpret_cast<const std::uint16_t*>(page + side.recent.steps_at + 2 * at));
    for (int i = 0; i < 4; ++i)
        x[i] =
            c + i < side.dim ? product_of(step, static_cast<float>(static_cast<int>(codes[i]) - 128)) : 0.0f;
}

/// Tokens base + row of a tile, rows [begin, end), of one head, as they are or would be stored outside tiles:
/// floats in `rows`. `first`: the token of the input that is token 0 of the tile. `row_grids`: of end rows.
template <class Block>
KVPLANE_DEVICE_INLINED void stage_tokens(const Block& block, const Side& side, int head, std::int64_t first,
                                         int base, int begin, int end, const std::byte* const* recent,
                                         float* rows, int pitch, float* parts, float* row_grids,
                                         std::uint32_t* bad, std::uint32_t* largest) {
    // Rows [begin, fresh) are recent tokens, [fresh, end) come from the input.
    const std::int64_t before = -(first + base);
    const int fresh = before <= begin ? begin : before >= end ? end : static_cast<int>(before);
    if (begin < fresh)
        block.run([&](int thread, int threads) {
            const Divisor fours((side.dim + 3) / 4);
            for (int item = thread; item < (fresh - begin) * fours.by; item += threads) {
                const int row = begin + fours.quotient(item), c = fours.rest(item) * 4, token = base + row;
                float x[4];
                load_recent(side, recent[token / recent_rows], head, token, c, x);
                put_numbers<4>(rows + row * pitch + place_of(c), x);
            }
        });
    stage_rows(block, side, head, first + base, fresh, end, rows, pitch, parts, side.recent.bits == 16, bad,
               largest);
    if (side.recent.bits != 8 || fresh >= end) return;
    const RowGrids grids(row_grids, end);
    fit_rows(block, fresh, end, parts, grids);
    block.run([&](int thread, int threads) {
        const ThreadGrid grid(thread, threads, (side.dim + 3) / 4, 32);
        for (int row = fresh + grid.row; row < end; row += grid.rows) {
            const float step = grids.step[row], lower = grids.lower[row], inverse = grids.inverse[row];
            for (int c = grid.column * 4; c < side.dim; c += grid.columns * 4) {
                float* const at = rows + row * pitch + place_of(c);
                float x[4];
                load_numbers<4>(at, x);
                // The code less 128, times the step.
                KVPLANE_UNROLL
                for (int i = 0; i < 4; ++i)
                    x[i] = product_of(step,
                                      difference_of(cell_of(x[i], lower, inverse, 255.0f), 0x1p23f + 128.0f));
                put_numbers<4>(at, x);
            }
        }
    });
}

}  // namespace kvplane::cuda::detail
