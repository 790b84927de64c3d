// kvplane/transform/hadamard.hpp: the randomized Hadamard transform of the rows of a matrix.
//
// y = x R, R = D H / sqrt(n): random signs, then Sylvester's Hadamard matrix. It spreads an outlier channel
// over all channels of its head, so that one grid for a whole token loses less. R is orthogonal: a transform
// of keys is undone by applying it to the query as well (q R . k R = q . k), one of values by applying the
// inverse to the attention output once.
//
// Any number of channels: block-diagonal with the largest powers of two that fit, so 80 = 64 + 16, 96 = 64
// + 32. O(d log d) a row. The signs follow from the seed alone, on every machine; sums are fp32, so R R^T = I
// to about log2(d) 2^-24.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/kernels.hpp"

namespace kvplane {
namespace detail {

/// (a, b) to (a + b, a - b), vector by vector.
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
/// x = (x D) H scale of `size` channels, a power of two, or x H scale D'. signs: of D or D', or nullptr.
/// The same sums in the same order on every instruction set.
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
/// Every block of the diagonal, of one head.
template <int Lanes>
KVPLANE_INLINE void hadamard_blocks(float* head, Index channels, const float* signs, bool back) {
    for (Index first = 0, size; first < channels; first += size) {
        size = 1;
        while (2 * size <= channels - first) size *= 2;
        hadamard<Lanes>(head + first, size, 1.0f / __builtin_sqrtf(static_cast<float>(size)),
                        back ? nullptr : signs + first, back ? signs + first : nullptr);
    }
}
}  // namespace detail

class Hadamard {
  public:
    /// For heads of `channels` channels. Throws Error (option) for less than one.
    explicit Hadamard(Index channels, std::uint64_t seed = 0) : signs_(check(channels)) {
        for (float& sign : signs_) sign = next(seed) >> 63 ? -1.0f : 1.0f;
    }

    Index channels() const noexcept { return static_cast<Index>(signs_.size()); }

    /// Rotates in place every row of tokens x (heads * channels), each head by itself. Throws Error (shape).
    template <class Derived>
    void rotate(Eigen::MatrixBase<Derived>& rows) const {
        transform(rows, false);
    }
    /// Undoes rotate(). Throws Error (shape).
    template <class Derived>
    void rotate_back(Eigen::MatrixBase<Derived>& rows) const {
        transform(rows, true);
    }

    /// One head of one token, in place.
    void rotate(float* head) const noexcept { transform(head, 1, channels(), false); }
    void rotate_back(float* head) const noexcept { transform(head, 1, channels(), true); }

  private:
    static std::size_t check(Index channels) {
        require(channels >= 1, ErrorCode::option, "Hadamard: ", channels, " channels, expected at least 1");
        return static_cast<std::size_t>(channels);
    }
    /// SplitMix64 (Steele, Lea, Flood 2014): its output depends on the seed and on nothing else.
    static std::uint64_t next(std::uint64_t& state) noexcept {
        std::uint64_t z = state += 0x9E3779B97F4A7C15ull;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ z >> 27) * 0x94D049BB133111EBull;
        return z ^ z >> 31;
    }

    /// Every head of `count` rows of `cols` channels.
    void transform(float* rows, Index count, Index cols, bool back) const noexcept {
        const Index width = channels();
        const float* const signs = signs_.data();
        run_on(current_isa(), [=](auto lanes) KVPLANE_BODY {
            for (Index i = 0; i < count * cols; i += width)
                detail::hadamard_blocks<lanes>(rows + i, width, signs, back);
        });
    }
    template <class Derived>
    void transform(Eigen::MatrixBase<Derived>& rows, bool back) const {
        static_assert(std::is_same_v<typename Derived::Scalar, float>, "Hadamard rotates floats");
        require(rows.cols() % channels() == 0, ErrorCode::shape, "Hadamard: rows of ", rows.cols(),
                " channels, expected a multiple of ", channels());
        if constexpr (detail::has_memory<Derived> && Derived::IsRowMajor)
            if (rows.derived().innerStride() == 1) {
                for (Index t = 0; t < rows.rows(); ++t)
                    transform(rows.derived().data() + t * rows.derived().outerStride(), 1, rows.cols(), back);
                return;
            }
        std::vector<float> row(static_cast<std::size_t>(rows.cols()));
        Eigen::Map<Eigen::RowVectorXf> view(row.data(), rows.cols());
        for (Index t = 0; t < rows.rows(); ++t) {
            view = rows.row(t);
            transform(row.data(), 1, rows.cols(), back);
            rows.row(t) = view;
        }
    }

    std::vector<float> signs_;
};

}  // namespace kvplane
