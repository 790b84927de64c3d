// kvplane/attention/kernels/avx512_factors.hpp: rounded factors with AVX-512.
//
// They are those of factor_rows(), bit for bit where its products are fused with its sums too. Instructions that
// vectors of C++ have no words for take the larger magnitude in one step, and pack four vectors of integers to one of
// bytes, whose sum is a dot product with ones.
#pragma once

#include "kvplane/attention/factors.hpp"
#include "kvplane/attention/kernels/avx512.hpp"

#if defined(KVPLANE_X86)
namespace kvplane::detail::avx512 {

typedef std::int16_t SignedShorts __attribute__((vector_size(64)));

/// For instructions whose intrinsics without a mask g++ 12 takes to read a register that was never set.
inline constexpr __mmask16 all_lanes = 0xFFFF;

/// Four vectors of integers within -128 .. 127, or of shorts two by two, as bytes in their order.
KVPLANE_TARGET_AVX512 KVPLANE_INLINE __m512i in_order(const __m512i& packed) noexcept {
    // Packing goes by runs of 128 bits; a run of the result has four bytes of each vector.
    const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_maskz_permutexvar_epi32(all_lanes, places, packed);
}
/// Stores the first `count` bytes: 64, or the 32 that a depth may end with.
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void store_factors(std::int8_t* to, const __m512i& bytes,
                                                        Index count) noexcept {
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(count >= 64 ? 0xFFFF : 0x00FF), bytes);
}

/// Products with steps: see fold_rows() of factors.hpp.
template <int rows>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void fold_rows(const Factors& f, float* top, float* sum) noexcept {
    constexpr int larger_magnitude = 0b1011;
    // Pointers of its own, for what is stored may lie in `f` as far as a compiler knows.
    const float* x[rows];
    float* folded[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        x[r] = f.x + r * f.stride;
        folded[r] = f.folded + r * f.depth;
    }
    const Eigen::half *const steps = f.step, *const lowers = f.lower;
    const Index count = f.count, depth = f.depth;
    const __m512 middle = _mm512_set1_ps(f.centre);
    Floats<16> largest[4]{}, base[4]{};
    for (Index i = 0; i < depth; i += 16) {
        const Index left = count - i;
        const auto there = static_cast<__mmask16>(left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1 << left) - 1);
        const __m512 step = _mm512_maskz_cvtph_ps(all_lanes, _mm256_maskz_loadu_epi16(there, steps + i)),
                     lower = lowers ? _mm512_maskz_cvtph_ps(all_lanes,
                                                            _mm256_maskz_loadu_epi16(there, lowers + i))
                                    : _mm512_setzero_ps(),
                     centre = _mm512_fmadd_ps(step, middle, lower);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const __m512 of_row = _mm512_maskz_loadu_ps(there, x[r] + i),
                         product = _mm512_mul_ps(of_row, step);
            base[r] = _mm512_fmadd_ps(of_row, centre, base[r]);
            largest[r] = _mm512_maskz_range_ps(all_lanes, largest[r], product, larger_magnitude);
            _mm512_storeu_ps(folded[r] + i, product);
        }
    }
    reduce_rows<16>(largest, top, larger);
    reduce_rows<16>(base, sum, plus);
}

/// Rounds row r at `scale`. The sums are of its factors, or of their high and low halves, and of its factors times
/// what is unread.
template <bool wide, bool some_unread>
KVPLANE_TARGET_AVX512 KVPLANE_INLINE void round_row(const Factors& f, int r, float scale,
                                                    Floats<16>& high_sum, Floats<16>& low_sum,
                                                    Floats<16>& unread_sum) noexcept {
    const float* const from = f.folded + r * f.depth;
    std::int8_t *const high = f.high + r * f.factor_stride, *const low =
                                                                wide ? f.low + r * f.factor_stride : nullptr;
    const float* const unread_of = f.unread;
    const Index depth = f.depth;
    const __m512 by = _mm512_set1_ps(scale), to_whole = _mm512_set1_ps(simd::to_whole);
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i highs = _mm512_setzero_si512(), lows = _mm512_setzero_si512();
    __m512 unread = _mm512_setzero_ps();
    for (Index at = 0; at < depth; at += 64) {
        __m512i whole[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const bool there = i < 2 || at + 32 < depth;
            whole[i] = _mm512_setzero_si512();
            if (!there) continue;
            const __m512 x = _mm512_loadu_ps(from + at + i * 16);
            whole[i] = (__m512i)((Words)_mm512_fmadd_ps(x, by, to_whole) - simd::to_whole_bits);
            if (some_unread)
                unread = _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(all_lanes, whole[i]),
                                         _mm512_loadu_ps(unread_of + at + i * 16), unread);
        }
        const __m512i shorts[2] = {_mm512_packs_epi32(whole[0], whole[1]),
                                   _mm512_packs_epi32(whole[2], whole[3])};
        __m512i upper[2] = {shorts[0], shorts[1]};
        if constexpr (wide) {
            // The low byte counts as signed, so the high half rounds.
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i)
                upper[i] = (__m512i)(((SignedShorts)shorts[i] + std::int16_t{128}) >> 8);
            const __m512i byte = _mm512_set1_epi16(255),
                          lower = in_order(_mm512_packus_epi16(shorts[0] & byte, shorts[1] & byte));
            lows = _mm512_dpbusd_epi32(lows, ones, lower);
            store_factors(low + at, lower, depth - at);
        }
        const __m512i bytes = in_order(_mm512_packs_epi16(upper[0], upper[1]));
        highs = _mm512_dpbusd_epi32(highs, ones, bytes);
        store_factors(high + at, bytes, depth - at);
    }
    high_sum = _mm512_maskz_cvtepi32_ps(all_lanes, highs);
    low_sum = _mm512_maskz_cvtepi32_ps(all_lanes, lows);
    unread_sum = unread;
}

template <bool wide, bool some_unread, int rows>
KVPLANE_TARGET_AVX512 inline void factor_rows(const Factors& f) noexcept {
    float top[4], sum[4], high[4], low[4] = {}, unread[4] = {};
    fold_rows<rows>(f, top, sum);
    Floats<16> highs[4]{}, lows[4]{}, unreads[4]{};
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
        round_row<wide, some_unread>(f, r, scale_of(f, top[r]), highs[r], lows[r], unreads[r]);
    reduce_rows<16>(highs, high, plus);
    if (wide) reduce_rows<16>(lows, low, plus);
    if (some_unread) reduce_rows<16>(unreads, unread, plus);
    float whole[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) whole[r] = wide ? 256.0f * high[r] + low[r] : high[r];
    finish_rows(f, rows, top, sum, whole, high, unread);
}

/// Factors of all rows, where no block is left out and only narrow ones have anything unread.
template <bool wide, bool some_unread>
KVPLANE_TARGET_AVX512 inline void factors_of_all(const Factors& f, Index rows) noexcept {
    by_rows(rows, [&](auto together, Index first)
                      KVPLANE_TARGET_AVX512 { factor_rows<wide, some_unread, together>(f.from_row(first)); });
}
KVPLANE_TARGET_AVX512 inline void make_factors(const Factors& f, Index rows) noexcept {
    if (f.low)
        factors_of_all<true, false>(f, rows);
    else if (f.unread)
        factors_of_all<false, true>(f, rows);
    else
        factors_of_all<false, false>(f, rows);
}

}  // namespace kvplane::detail::avx512
#endif
