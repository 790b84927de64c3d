// kvplane/theory/bounds.hpp: the theorems that the library rests on, each as a function from inputs to the
// bound.
//
// Nothing here quantizes or allocates: the tests compare these numbers with what the library's own code does.
#pragma once

#include <cmath>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane::theory {

/// T1, affine quantizer: the width of each of 2^bits equal cells over an interval of length `range` (the
/// scheme `cell`). range finite and >= 0, bits >= 1; throws Error (not_finite, option) otherwise.
double cell_step(double range, int bits);

/// T1, the step of the grid whose first and last middle are the ends of an interval of length `range`, so
/// that both are reproduced exactly (the scheme `min_max`): range / (2^bits - 1). Throws as cell_step.
double min_max_step(double range, int bits);

/// T1, T2: the step of two's complement around zero (the scheme `symmetric`; alpha in arXiv 2502.15075):
/// largest / (2^(bits-1) - 1), largest = max|x|. Needs bits >= 2; throws as cell_step otherwise.
double symmetric_step(double largest, int bits);

/// T1: whatever the scheme, |x - x'| <= step * 2^(bits - depth) / 2 for every x in the interval that the
/// 2^bits cells cover, read from the first `depth` bits of its code. Reached at the edges of the cells of
/// that depth. Where grids are rounded outward to fp16 it holds for the step as stored. step finite and >= 0,
/// 1 <= depth <= bits; throws Error (not_finite, option) otherwise.
double read_error_bound(double step, int bits, int depth);

/// T2, Frobenius and spectral bounds (arXiv 2502.15075, theorems 3 and 4). A is rows x columns, M = `largest`
/// = max|A_ij|, and A' is the symmetric quantization of A by one grid of `bits` >= 2 bits:
///
///     |A - A'|_2 <= |A - A'|_F <= sqrt(rows * columns) * M / (2 * (2^(bits-1) - 1)).
///
/// Approached where every entry but the largest lies half a step from a code; those errors can all be equal,
/// so the spectral norm reaches it too. rows, columns >= 0; throws Error (shape, not_finite, option)
/// otherwise.
///
/// Theorem 3 also prints a lower bound, M <= |A - A'|_2. It is false: an A whose entries lie on the grid has
/// no error at all.
double symmetric_frobenius_bound(Index rows, Index columns, double largest, int bits);

/// T2 from the spectral norm of A alone: as M <= |A|_2, neither norm of A - A' exceeds
///
///     sqrt(rows * columns) * |A|_2 / (2 * (2^(bits-1) - 1)).
///
/// Looser than symmetric_frobenius_bound wherever |A|_2 > M. Throws as that.
double symmetric_spectral_bound(Index rows, Index columns, double spectral_norm, int bits);

/// T2 for the scheme `cell`, range = max A_ij - min A_ij: |A - A'|_F <= sqrt(rows * columns) * range /
/// 2^(bits+1). Stronger than symmetric_frobenius_bound by a factor of at least 2^(bits-1) / (2^(bits-1) -
/// 1), as range <= 2 M. Reached where every entry lies at the edge of a cell. bits >= 1; throws as
/// symmetric_frobenius_bound.
double cell_frobenius_bound(Index rows, Index columns, double range, int bits);

/// T3, key-prioritized quantization (arXiv 2502.15075, theorem 2, in the form that can be proved). Keys and
/// values of the same shape, both quantized by the same uniform quantizer with the squared error D(b) =
/// constant * |M|_F^2 * 4^-b. Returns the difference that giving `first_bits` to the keys and `second_bits`
/// to the values makes against the opposite,
///
///     D_K(b1) + D_V(b2) - D_K(b2) - D_V(b1) = constant * (|K|_F^2 - |V|_F^2) * (4^-b1 - 4^-b2),
///
/// which is negative exactly when the matrix of larger norm gets more bits. Norms finite and >= 0; throws
/// Error (not_finite, option) otherwise.
double key_prioritized_difference(double key_norm, double value_norm, double first_bits, double second_bits,
                                  double constant = 1);

/// T3, the split of least error: b_K - b_V = log2(|K|_F / |V|_F), for real bits and the error of
/// key_prioritized_difference. (Appendix B.4 of arXiv 2502.15075 prints the ratio upside down; at this split
/// the errors of keys and values are equal, which is where the sum for a given b_K + b_V is least.) Norms
/// finite and > 0; throws Error (not_finite, option) otherwise.
double optimal_key_value_split(double key_norm, double value_norm);

/// T4, norm disparity (arXiv 2502.15075, theorem 1): E|W_K| > E|W_V|. What a table of norms by layer says of
/// it.
struct NormDisparity {
    Index layers = 0;
    double mean_key_norm = 0;
    double mean_value_norm = 0;
    std::vector<Index> exceptions;  ///< layers whose key norm is not above their value norm, ascending

    /// The claim as stated: of the mean over layers.
    bool holds_on_average() const { return mean_key_norm > mean_value_norm; }
    /// The stronger one that allocation by layer relies on.
    bool holds_in_every_layer() const { return exceptions.empty(); }
};

/// T4. It is an empirical claim: on the authors' own table it holds in Frobenius norm for the Llama models
/// (all layers but 0 and 1 of Llama-3.3-70B) and fails for most layers of every Qwen3 model, whose keys are
/// normalised after projection; in spectral norm it holds in all layers but 0 to 3 of Llama-3.3-70B and layer
/// 33 of Qwen3-4B and Qwen3-8B. One norm a layer, finite and >= 0; throws Error (shape, not_finite, option)
/// otherwise.
NormDisparity norm_disparity(const Eigen::Ref<const Eigen::VectorXd>& key_norms,
                             const Eigen::Ref<const Eigen::VectorXd>& value_norms);

/// T5, weak duality: no choice of one option for every item whose costs sum to at most `budget` has a smaller
/// sum of errors than
///
///     sum_i min_o (errors(i, o) + price * costs(i, o)) - price * budget,
///
/// whatever price >= 0 an error is charged for a bit. errors and costs are items x options, with weights and
/// counts multiplied in; an item with fewer options than others repeats one. Tight at the price of the last
/// step taken where all curves are convex and the budget ends with that step. Throws Error (shape,
/// not_finite, option).
double allocation_lower_bound(const Eigen::Ref<const MatrixD>& errors, const Eigen::Ref<const MatrixD>& costs,
                              double price, double budget);

/// T5 in closed form for D_i(b) = weights(i) * 4^-b and real widths b_i, also below 0, with counts(i)
/// elements each: by the weighted inequality of means no allocation of sum_i counts(i) * b_i <= budget has an
/// error below
///
///     N * 4^(-budget / N) * prod_i (weights(i) / counts(i))^(counts(i) / N),    N = sum_i counts(i).
///
/// Reached exactly where weights(i) / counts(i) * 4^-b_i is the same for all items; with two items of equal
/// count that is optimal_key_value_split. weights >= 0, counts > 0; throws Error (shape, not_finite, option)
/// otherwise.
double high_rate_allocation_bound(const Eigen::Ref<const Eigen::VectorXd>& weights,
                                  const Eigen::Ref<const Eigen::VectorXd>& counts, double budget);

/// T5, the premise under which greedy on marginal gain is exact: all steps of all menus cost the same and no
/// curve gains more by a later step than by an earlier one. errors and costs as for allocation_lower_bound,
/// costs ascending. Steps are compared up to a relative 1e-12. Throws Error (shape, not_finite, option).
bool greedy_is_exact(const Eigen::Ref<const MatrixD>& errors, const Eigen::Ref<const MatrixD>& costs);

// Implementation.

namespace detail {

inline void require_number(double value, const char* what) {
    require(std::isfinite(value), ErrorCode::not_finite, what, ": ", value, ", expected a finite number");
}

inline void require_not_negative(double value, const char* what) {
    require_number(value, what);
    require(value >= 0, ErrorCode::option, what, ": ", value, ", expected 0 or more");
}

inline void require_positive(double value, const char* what) {
    require_number(value, what);
    require(value > 0, ErrorCode::option, what, ": ", value, ", expected more than 0");
}

inline void require_bits(int bits, int least) {
    require(bits >= least, ErrorCode::option, "bits: ", bits, ", expected at least ", least);
}

/// |.|_F of a matrix of that shape whose entries all are 1.
inline double root_of_size(Index rows, Index columns) {
    require(rows >= 0 && columns >= 0, ErrorCode::shape, "a matrix of ", rows, " x ", columns,
            ", expected sizes of 0 or more");
    return std::sqrt(static_cast<double>(rows)) * std::sqrt(static_cast<double>(columns));
}

inline void require_curves(const Eigen::Ref<const MatrixD>& errors, const Eigen::Ref<const MatrixD>& costs) {
    require(errors.rows() == costs.rows() && errors.cols() == costs.cols(), ErrorCode::shape,
            "errors: ", errors.rows(), " x ", errors.cols(), ", costs: ", costs.rows(), " x ", costs.cols(),
            ", expected the same items x options");
    require(errors.rows() == 0 || errors.cols() > 0, ErrorCode::shape,
            "errors: no options, expected at least one");
    require(errors.allFinite() && costs.allFinite(), ErrorCode::not_finite,
            "errors or costs hold NaN or infinity, expected finite numbers");
}

}  // namespace detail

inline double cell_step(double range, int bits) {
    detail::require_not_negative(range, "range");
    detail::require_bits(bits, 1);
    return std::ldexp(range, -bits);
}

inline double min_max_step(double range, int bits) {
    detail::require_not_negative(range, "range");
    detail::require_bits(bits, 1);
    return range / (std::ldexp(1.0, bits) - 1);
}

inline double symmetric_step(double largest, int bits) {
    detail::require_not_negative(largest, "largest");
    detail::require_bits(bits, 2);
    return largest / (std::ldexp(1.0, bits - 1) - 1);
}

inline double read_error_bound(double step, int bits, int depth) {
    detail::require_not_negative(step, "step");
    detail::require_bits(bits, 1);
    require(depth >= 1 && depth <= bits, ErrorCode::option, "depth: ", depth, ", expected 1 to ", bits);
    return std::ldexp(step, bits - depth - 1);
}

inline double symmetric_frobenius_bound(Index rows, Index columns, double largest, int bits) {
    return detail::root_of_size(rows, columns) * read_error_bound(symmetric_step(largest, bits), bits, bits);
}

inline double symmetric_spectral_bound(Index rows, Index columns, double spectral_norm, int bits) {
    return symmetric_frobenius_bound(rows, columns, spectral_norm, bits);
}

inline double cell_frobenius_bound(Index rows, Index columns, double range, int bits) {
    return detail::root_of_size(rows, columns) * read_error_bound(cell_step(range, bits), bits, bits);
}

inline double key_prioritized_difference(double key_norm, double value_norm, double first_bits,
                                         double second_bits, double constant) {
    detail::require_not_negative(key_norm, "key_norm");
    detail::require_not_negative(value_norm, "value_norm");
    detail::require_not_negative(constant, "constant");
    detail::require_number(first_bits, "first_bits");
    detail::require_number(second_bits, "second_bits");
    // As products, so that the sign is right where the norms or the widths nearly agree.
    const double norms = (key_norm - value_norm) * (key_norm + value_norm);
    return constant * norms * (std::exp2(-2 * first_bits) - std::exp2(-2 * second_bits));
}

inline double optimal_key_value_split(double key_norm, double value_norm) {
    detail::require_positive(key_norm, "key_norm");
    detail::require_positive(value_norm, "value_norm");
    return std::log2(key_norm) - std::log2(value_norm);
}

inline NormDisparity norm_disparity(const Eigen::Ref<const Eigen::VectorXd>& key_norms,
                                    const Eigen::Ref<const Eigen::VectorXd>& value_norms) {
    require(key_norms.size() == value_norms.size(), ErrorCode::shape, "key_norms: ", key_norms.size(),
            " layers, value_norms: ", value_norms.size(), ", expected the same number");
    NormDisparity result;
    result.layers = key_norms.size();
    for (Index layer = 0; layer < result.layers; ++layer) {
        detail::require_not_negative(key_norms[layer], "key_norms");
        detail::require_not_negative(value_norms[layer], "value_norms");
        if (!(key_norms[layer] > value_norms[layer])) result.exceptions.push_back(layer);
    }
    if (result.layers > 0) {
        result.mean_key_norm = key_norms.mean();
        result.mean_value_norm = value_norms.mean();
    }
    return result;
}

inline double allocation_lower_bound(const Eigen::Ref<const MatrixD>& errors,
                                     const Eigen::Ref<const MatrixD>& costs, double price, double budget) {
    detail::require_curves(errors, costs);
    detail::require_not_negative(price, "price");
    detail::require_number(budget, "budget");
    if (errors.rows() == 0) return 0;
    return (errors + price * costs).rowwise().minCoeff().sum() - price * budget;
}

inline double high_rate_allocation_bound(const Eigen::Ref<const Eigen::VectorXd>& weights,
                                         const Eigen::Ref<const Eigen::VectorXd>& counts, double budget) {
    require(weights.size() == counts.size(), ErrorCode::shape, "weights: ", weights.size(),
            " items, counts: ", counts.size(), ", expected the same number");
    detail::require_number(budget, "budget");
    double total = 0, log2_mean = 0;
    for (Index i = 0; i < weights.size(); ++i) {
        detail::require_not_negative(weights[i], "weights");
        detail::require_positive(counts[i], "counts");
        total += counts[i];
        log2_mean +=
            counts[i] * (std::log2(weights[i]) - std::log2(counts[i]));  // -infinity for a weight of 0
    }
    return total == 0 ? 0 : total * std::exp2((log2_mean - 2 * budget) / total);
}

inline bool greedy_is_exact(const Eigen::Ref<const MatrixD>& errors, const Eigen::Ref<const MatrixD>& costs) {
    detail::require_curves(errors, costs);
    if (errors.rows() == 0 || errors.cols() < 2) return true;
    const double unit = costs(0, 1) - costs(0, 0), allowance = 1e-12 * costs.cwiseAbs().maxCoeff();
    for (Index item = 0; item < errors.rows(); ++item) {
        double last_gain = 0;
        for (Index option = 1; option < errors.cols(); ++option) {
            const double step = costs(item, option) - costs(item, option - 1);
            require(step > 0, ErrorCode::option, "costs of item ", item, ": a step of ", step,
                    " bits, expected ascending costs");
            const double gain = errors(item, option - 1) - errors(item, option);
            if (std::abs(step - unit) > allowance) return false;
            if (option > 1 && gain > last_gain + 1e-12 * std::abs(last_gain)) return false;
            last_gain = gain;
        }
    }
    return true;
}

}  // namespace kvplane::theory
