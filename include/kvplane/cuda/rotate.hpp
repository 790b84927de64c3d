// kvplane/cuda/rotate.hpp: rotations of rows in shared memory; transform/impl/hadamard.hpp, operation by
// operation.
#pragma once

#include "kvplane/cuda/block.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/numbers.hpp"

namespace kvplane::cuda::detail {

/// The factor that makes a rotation of 2^log_size numbers one.
KVPLANE_DEVICE inline float rotation_scale(int log_size) {
    return quotient_of(1.0f, root_of(static_cast<float>(1 << log_size)));
}

/// Some stages, log2(count) of them, of a rotation of numbers that are a stage's distance apart.
template <int count>
KVPLANE_DEVICE void butterflies(float (&x)[count]) {
    KVPLANE_UNROLL
    for (int apart = 1; apart < count; apart *= 2) {
        KVPLANE_UNROLL
        for (int i = 0; i < count; ++i)
            if ((i & apart) == 0) {
                const float a = x[i], b = x[i + apart];
                x[i] = sum_of(a, b);
                x[i + apart] = difference_of(a, b);
            }
    }
}

/// The first stages of rows of `channels`, a multiple of 8: of channels c to c + 7.
inline constexpr int first_stages = 3;
KVPLANE_DEVICE inline void rotate_eight(float (&x)[8], int c, int channels) {
    butterflies(x);
    if (channels % 16 == 8 && c == channels - 8) {  // a block of its own, the last
        const float scale = rotation_scale(first_stages);
        for (float& number : x) number = product_of(number, scale);
    }
}

/// Stages half, 2 half, .. of a rotation, `count` numbers at a time; the last ones also take the scale.
template <int count>
KVPLANE_DEVICE void rotate_some(float* row, int first, int half, float scale, const float* signs_after) {
    float x[count];
    // The places of c and of first + c are as far apart as those of 0 and c, because the low bits of both do
    // not meet.
    float* const at = row + place_of(first);
    KVPLANE_UNROLL
    for (int i = 0; i < count; ++i) x[i] = at[place_of(i * half)];
    butterflies(x);
    if (scale != 1.0f) {
        KVPLANE_UNROLL
        for (int i = 0; i < count; ++i) x[i] = product_of(x[i], scale);
    }
    if (signs_after) {
        KVPLANE_UNROLL
        for (int i = 0; i < count; ++i) x[i] = product_of(x[i], signs_after[first + i * half]);
    }
    KVPLANE_UNROLL
    for (int i = 0; i < count; ++i) at[place_of(i * half)] = x[i];
}

/// Replaces rows [begin, end) by their products with H / sqrt(n), block by block of the diagonal, and with
/// signs where these are given. `done`: stages that rows have behind them, 0 or first_stages.
template <class Block>
KVPLANE_DEVICE_INLINED void rotate_rows(const Block& block, float* rows, int pitch, int begin, int end,
                                        int channels, int done, const float* signs_after) {
    int log_most = 0;
    while (2 << log_most <= channels) ++log_most;
    const bool has_single = signs_after && channels % 2 == 1;  // a block of one, which no stage touches
    for (int stages; done < log_most; done += stages) {
        // From a stage of 8 on, rows of their pitch let all passes meet different banks; before, two stages
        // do.
        stages = done == 0 ? 2 : log_most - done <= 4 ? log_most - done : 3;
        block.run([=](int thread, int threads) {
            for (int first = 0, log_size; first < channels; first += 1 << log_size) {
                log_size = 0;
                while (2 << log_size <= channels - first) ++log_size;
                if (done >= log_size) continue;
                const int of_block = stages < log_size - done ? stages : log_size - done, half = 1 << done;
                const bool last = done + of_block == log_size;
                const float scale = last ? rotation_scale(log_size) : 1.0f;
                const float* const after = last ? signs_after : nullptr;
                const int log_groups = log_size - of_block;
                for (int item = thread; item < (end - begin) << log_groups; item += threads) {
                    float* const row = rows + (begin + (item >> log_groups)) * pitch;
                    const int group = item & ((1 << log_groups) - 1),
                              at = first + ((group >> done) << (done + of_block)) + (group & (half - 1));
                    if (of_block == 4 && half == 8)
                        rotate_some<16>(row, at, 8, scale, after);
                    else if (of_block == 4)
                        rotate_some<16>(row, at, half, scale, after);
                    else if (of_block == 3)
                        rotate_some<8>(row, at, half, scale, after);
                    else if (of_block == 2)
                        rotate_some<4>(row, at, half, scale, after);
                    else
                        rotate_some<2>(row, at, half, scale, after);
                }
            }
        });
    }
    if (has_single)
        block.run([=](int thread, int threads) {
            for (int row = begin + thread; row < end; row += threads)
                rows[row * pitch + place_of(channels - 1)] =
                    product_of(rows[row * pitch + place_of(channels - 1)], signs_after[channels - 1]);
        });
}

}  // namespace kvplane::cuda::detail
