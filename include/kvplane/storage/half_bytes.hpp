// kvplane/storage/half_bytes.hpp: rows of numbers to the two bytes of fp16, from which planes {8,4,4} are made.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <cstdint>

#include "kvplane/simd/half.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/simd/vector.hpp"

namespace kvplane::detail {

template <int Lanes, class Scalar>
KVPLANE_INLINE bool split_halves(const Scalar* from, Index count, std::uint8_t* high, std::uint8_t* low,
                                 std::uint16_t* largest) {
    using Bits = simd::Vector<std::uint16_t, Lanes>;
    using Bytes = simd::Vector<std::uint8_t, Lanes>;
    simd::Ints<Lanes> inside = simd::Ints<Lanes>{} - 1;
    Index i = 0;
    for (; i + Lanes <= count; i += Lanes) {
        simd::Floats<Lanes> x;
        simd::widen<Lanes>(x, from + i);
        inside &= (simd::Floats<Lanes>)((simd::Words<Lanes>)x & 0x7FFFFFFFu) <= fp16_max;
        Eigen::half halves[Lanes];
        simd::store_nearest_half<Lanes>(halves, x);
        Bits bits, most;
        simd::load(bits, halves);
        simd::store(high + i, __builtin_convertvector(bits >> 8, Bytes));
        simd::store(low + i, __builtin_convertvector(bits & 0xFF, Bytes));
        simd::load(most, largest + i);
        const Bits magnitude = bits & 0x7FFF;
        simd::store(largest + i, most < magnitude ? magnitude : most);
    }
    bool good = simd::all_set<Lanes>(inside);
    for (; i < count; ++i) {
        const auto x = static_cast<float>(from[i]);
        good &= std::abs(x) <= fp16_max;
        const std::uint16_t bits = Eigen::half(x).x, magnitude = bits & 0x7FFF;
        high[i] = static_cast<std::uint8_t>(bits >> 8);
        low[i] = static_cast<std::uint8_t>(bits & 0xFF);
        largest[i] = largest[i] < magnitude ? magnitude : largest[i];
    }
    return good;
}

/// Writes the high and the low bytes of the nearest fp16 numbers, ties to even, and raises largest [channel] to
/// the bits of their magnitudes. Returns false if a number is NaN, infinite or beyond fp16; what is written is
/// then meaningless.
template <class Scalar>
bool split_halves(Isa isa, const Scalar* from, Index count, std::uint8_t* high, std::uint8_t* low,
                  std::uint16_t* largest) noexcept {
    return run_on(
        isa, [=](auto lanes) KVPLANE_BODY { return split_halves<lanes>(from, count, high, low, largest); });
}

}  // namespace kvplane::detail
