// kvplane/transform/hadamard.hpp: the randomized Hadamard transform of the rows of a matrix.
//
// y = x R with R = D H / sqrt(n), where D holds random signs and H is Sylvester's Hadamard matrix of size n.
// R spreads an outlier channel over all channels of its head, so that one grid for a whole token loses less.
// R is orthogonal. A transform of keys is undone by applying it to the query as well (q R . k R = q . k), and
// a transform of values by applying the inverse to the attention output once.
//
// Any number of channels d will do: R is block-diagonal with the largest powers of two that fit, so
// 80 = 64 + 16 and 96 = 64 + 32. A row takes O(d log d) operations. The signs follow from the seed alone, on
// every machine. Sums are fp32, so R R^T = I to about log2(d) 2^-24.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

/// The transform of the heads of one model; const calls are safe from several threads at once.
class Hadamard {
  public:
    /// For heads of `channels` channels. Throws Error (option) if there is not at least one.
    explicit Hadamard(Index channels, std::uint64_t seed = 0);

    Index channels() const noexcept { return static_cast<Index>(signs_.size()); }
    /// The diagonal of D: 1 and -1.
    const std::vector<float>& signs() const noexcept { return signs_; }

    /// Rotates every row of `rows` [tokens, heads * channels] in place, each head by itself. Throws Error
    /// (shape).
    template <class Derived>
    void rotate(Eigen::MatrixBase<Derived>& rows) const {
        transform(rows, false);
    }
    /// Undoes rotate(). Throws Error (shape).
    template <class Derived>
    void rotate_back(Eigen::MatrixBase<Derived>& rows) const {
        transform(rows, true);
    }

    /// Rotates one head of one token in place.
    void rotate(float* head) const noexcept { transform(head, 1, channels(), false); }
    void rotate_back(float* head) const noexcept { transform(head, 1, channels(), true); }

  private:
    /// Transforms every head of `count` rows of `cols` channels, which lie one after another.
    void transform(float* rows, Index count, Index cols, bool back) const noexcept;
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

#if !defined(KVPLANE_COMPILED)
#include "kvplane/transform/impl/hadamard.hpp"
#endif
