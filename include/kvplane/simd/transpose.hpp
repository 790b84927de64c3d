// kvplane/simd/transpose.hpp: rows to columns.
//
// Blocks of 16 bytes a side on every instruction set: that is what shuffles take without crossing halves of a
// register.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kvplane/simd/vector.hpp"

namespace kvplane::detail::simd {

/// A number of any type that has four bytes.
KVPLANE_INLINE void copy_word(const void* from, void* to) {
    std::memcpy(to, from, 4);
}
/// to[c][r] = from[r][c] for 4 x 4 numbers of 32 bits. Strides are in numbers.
KVPLANE_INLINE void transpose_words_4x4(const std::uint32_t* from, std::ptrdiff_t from_stride,
                                        std::uint32_t* to, std::ptrdiff_t to_stride) {
    Words<4> a, b, c, d;
    load(a, from);
    load(b, from + from_stride);
    load(c, from + 2 * from_stride);
    load(d, from + 3 * from_stride);
    const Words<4> ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5),
                   ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7),
                   cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5),
                   cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store(to, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
    store(to + to_stride, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
    store(to + 2 * to_stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
    store(to + 3 * to_stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}

/// The same for `rows` x `columns` numbers of four bytes, of any type.
KVPLANE_INLINE void transpose_words(const void* from_rows, std::ptrdiff_t from_stride, std::ptrdiff_t rows,
                                    std::ptrdiff_t columns, void* to_rows, std::ptrdiff_t to_stride) {
    const auto* const from = static_cast<const std::uint32_t*>(from_rows);
    auto* const to = static_cast<std::uint32_t*>(to_rows);
    // In blocks of a line of the cache both ways, for rows are often a power of two apart.
    constexpr std::ptrdiff_t block = 16;
    for (std::ptrdiff_t first = 0; first < rows; first += block) {
        const std::ptrdiff_t end = first + block < rows ? first + block : rows;
        for (std::ptrdiff_t column = 0; column < columns; column += block) {
            const std::ptrdiff_t last = column + block < columns ? column + block : columns;
            std::ptrdiff_t r = first;
            for (; r + 4 <= end; r += 4) {
                std::ptrdiff_t c = column;
                for (; c + 4 <= last; c += 4)
                    transpose_words_4x4(from + r * from_stride + c, from_stride, to + c * to_stride + r,
                                        to_stride);
                for (; c < last; ++c)
                    for (int i = 0; i < 4; ++i)
                        copy_word(from + (r + i) * from_stride + c, to + c * to_stride + r + i);
            }
            for (; r < end; ++r)
                for (std::ptrdiff_t c = column; c < last; ++c)
                    copy_word(from + r * from_stride + c, to + c * to_stride + r);
        }
    }
}

/// The lower triangle of `size` x `size` numbers of four bytes to the upper one.
KVPLANE_INLINE void mirror_lower(void* matrix, std::ptrdiff_t stride, std::ptrdiff_t size) {
    auto* const at = static_cast<std::uint32_t*>(matrix);
    constexpr std::ptrdiff_t block = 16;
    for (std::ptrdiff_t first = 0; first < size; first += block) {
        const std::ptrdiff_t end = first + block < size ? first + block : size;
        for (std::ptrdiff_t r = first; r < end; ++r)
            for (std::ptrdiff_t c = first; c < r; ++c) copy_word(at + r * stride + c, at + c * stride + r);
        if (first > 0) transpose_words(at + first * stride, stride, end - first, first, at + first, stride);
    }
}

/// One step of four: bytes of rows i and i + 8 alternate in rows 2 i and 2 i + 1.
KVPLANE_INLINE void interleave_bytes(const Vector<std::uint8_t, 16> (&from)[16],
                                     Vector<std::uint8_t, 16> (&to)[16]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        to[2 * i] = __builtin_shufflevector(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6,
                                            22, 7, 23);
        to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                                13, 29, 14, 30, 15, 31);
    }
}

/// to[c * to_stride + r] = row(r)[c] for 16 x 16 bytes, row(r) a pointer.
template <class Row>
KVPLANE_INLINE void transpose_bytes_16x16(const Row& row, std::uint8_t* to, std::ptrdiff_t to_stride) {
    Vector<std::uint8_t, 16> a[16], b[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) load(a[r], row(r));
    interleave_bytes(a, b);
    interleave_bytes(b, a);
    interleave_bytes(a, b);
    interleave_bytes(b, a);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) store(to + r * to_stride, a[r]);
}

}  // namespace kvplane::detail::simd
