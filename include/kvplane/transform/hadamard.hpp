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
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

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
        for_each_head(rows, [this](float* head) { rotate(head); });
    }
    /// Undoes rotate(). Throws Error (shape).
    template <class Derived>
    void rotate_back(Eigen::MatrixBase<Derived>& rows) const {
        for_each_head(rows, [this](float* head) { rotate_back(head); });
    }

    /// One head of one token, in place.
    void rotate(float* head) const noexcept {
        for (std::size_t c = 0; c < signs_.size(); ++c) head[c] *= signs_[c];
        transform(head);
    }
    void rotate_back(float* head) const noexcept {
        transform(head);
        for (std::size_t c = 0; c < signs_.size(); ++c) head[c] *= signs_[c];
    }

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

    /// Every block of the diagonal.
    void transform(float* head) const noexcept {
        const Index all = channels();
        for (Index first = 0, size; first < all; first += size) {
            size = 1;
            while (2 * size <= all - first) size *= 2;
            butterflies(head + first, size);
        }
    }
    static void butterflies(float* x, Index size) noexcept {
        for (Index half = 1; half < size; half *= 2)
            for (Index block = 0; block < size; block += 2 * half)
                for (Index i = block; i < block + half; ++i) {
                    const float a = x[i], b = x[i + half];
                    x[i] = a + b;
                    x[i + half] = a - b;
                }
        const float scale = 1.0f / std::sqrt(static_cast<float>(size));
        for (Index i = 0; i < size; ++i) x[i] *= scale;
    }

    template <class Derived, class Body>
    void for_each_head(Eigen::MatrixBase<Derived>& rows, const Body& body) const {
        static_assert(std::is_same_v<typename Derived::Scalar, float>, "Hadamard rotates floats");
        require(rows.cols() % channels() == 0, ErrorCode::shape, "Hadamard: rows of ", rows.cols(),
                " channels, expected a multiple of ", channels());
        RowMajorMatrix<float> head(1, channels());
        for (Index t = 0; t < rows.rows(); ++t)
            for (Index c = 0; c < rows.cols(); c += channels()) {
                head = rows.block(t, c, 1, channels());
                body(head.data());
                rows.block(t, c, 1, channels()) = head;
            }
    }

    std::vector<float> signs_;
};

}  // namespace kvplane
