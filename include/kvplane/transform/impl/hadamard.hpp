// kvplane/transform/impl/hadamard.hpp: the functions of transform/hadamard.hpp.
//
// Accumulator: fp32, log2(channels) additions per number.
#pragma once

#include <utility>

#include "kvplane/simd/isa.hpp"
#include "kvplane/simd/vector.hpp"
#include "kvplane/transform/hadamard.hpp"

namespace kvplane {
namespace detail {

/// Replaces (a, b) by (a + b, a - b), vector by vector.
template <int Lanes>
KVPLANE_INLINE void butterfly(float* a, float* b) {
    simd::Floats<Lanes> x, y;
    simd::load(x, a);
    simd::load(y, b);
    simd::store(a, x + y);
    simd::store(b, x - y);
}
template <int Lanes, int half, std::size_t... Lane>
KVPLANE_INLINE void butterflies_of(simd::Floats<Lanes>& x, std::index_sequence<Lane...> lanes) {
    if constexpr (half < Lanes) {
        const simd::Floats<Lanes> other = __builtin_shufflevector(x, x, (Lane ^ half)...);
        const simd::Floats<Lanes> sign = {(Lane & half ? -1.0f : 1.0f)...};
        x = other + x * sign;
        butterflies_of<Lanes, 2 * half>(x, lanes);
    }
}
/// Replaces x, `size` channels, a power of two, by (x D) H scale or by x H scale D'. signs_before holds D and
/// signs_after D'; either may be nullptr. The sums and their order are the same on every instruction set.
template <int Lanes>
KVPLANE_INLINE void hadamard(float* x, Index size, float scale, const float* signs_before,
                             const float* signs_after) {
    if (size < Lanes) {
        for (Index i = 0; i < size && signs_before; ++i) x[i] *= signs_before[i];
        for (Index half = 1; half < size; half *= 2)
            for (Index block = 0; block < size; block += 2 * half)
                for (Index i = block; i < block + half; ++i) {
                    const float a = x[i], b = x[i + half];
                    x[i] = a + b;
                    x[i + half] = a - b;
                }
        for (Index i = 0; i < size; ++i) x[i] = x[i] * scale * (signs_after ? signs_after[i] : 1.0f);
        return;
    }
    simd::Floats<Lanes> value, sign;
    for (Index i = 0; i < size; i += Lanes) {
        simd::load(value, x + i);
        if (signs_before) {
            simd::load(sign, signs_before + i);
            value *= sign;
        }
        butterflies_of<Lanes, 1>(value, std::make_index_sequence<Lanes>{});
        simd::store(x + i, value);
    }
    for (Index half = Lanes; half < size; half *= 2)
        for (Index block = 0; block < size; block += 2 * half)
            for (Index i = block; i < block + half; i += Lanes) butterfly<Lanes>(x + i, x + i + half);
    for (Index i = 0; i < size; i += Lanes) {
        simd::load(value, x + i);
        value *= scale;
        if (signs_after) {
            simd::load(sign, signs_after + i);
            value *= sign;
        }
        simd::store(x + i, value);
    }
}
/// Transforms one head, every block of the diagonal by itself.
template <int Lanes>
KVPLANE_INLINE void hadamard_blocks(float* head, Index channels, const float* signs, bool back) {
    for (Index first = 0, size; first < channels; first += size) {
        size = 1;
        while (2 * size <= channels - first) size *= 2;
        hadamard<Lanes>(head + first, size, 1.0f / __builtin_sqrtf(static_cast<float>(size)),
                        back ? nullptr : signs + first, back ? signs + first : nullptr);
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): its output depends on the seed and on nothing else.
inline std::uint64_t split_mix(std::uint64_t& state) noexcept {
    std::uint64_t z = state += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

}  // namespace detail

KVPLANE_FUNCTION Hadamard::Hadamard(Index channels, std::uint64_t seed) {
    require(channels >= 1, ErrorCode::option, "Hadamard: ", channels, " channels, expected at least 1");
    signs_.resize(static_cast<std::size_t>(channels));
    for (float& sign : signs_) sign = detail::split_mix(seed) >> 63 ? -1.0f : 1.0f;
}

KVPLANE_FUNCTION void Hadamard::transform(float* rows, Index count, Index cols, bool back) const noexcept {
    const Index width = channels();
    const float* const signs = signs_.data();
    detail::run_on(current_isa(), [=](auto lanes) KVPLANE_BODY {
        for (Index i = 0; i < count * cols; i += width)
            detail::hadamard_blocks<lanes>(rows + i, width, signs, back);
    });
}

}  // namespace kvplane
