// kvplane/theory/impl/bounds.hpp: the theorems' formulas.
#pragma once

#include "kvplane/theory/bounds.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <span>
#include <vector>

#include "kvplane/error.hpp"

namespace kvplane::theory {

namespace detail {

inline void require_number(double value, const char* what) {
    require(std::isfinite(value), ErrorCode::not_finite, what, ": ", value, ", expected a finite number");
}

inline void require_not_negative(double value, const char* what) {
    require_number(value, what);
    require(value >= 0, ErrorCode::option, what, ": ", value, ", expected 0 or more");
}

inline void require_not_negative(const Eigen::Ref<const Eigen::VectorXd>& values, const char* what) {
    for (const double value : values) require_not_negative(value, what);
}

inline void require_same_size(Index latents, Index size, const char* what) {
    require(size == latents, ErrorCode::shape, what, ": ", size, " entries for ", latents,
            " latents, expected one for each");
}

inline void require_positive(double value, const char* what) {
    require_number(value, what);
    require(value > 0, ErrorCode::option, what, ": ", value, ", expected more than 0");
}

inline void require_bits(int bits, int least) {
    require(bits >= least, ErrorCode::option, "bits: ", bits, ", expected at least ", least);
}

/// |.|_F of a matrix of that shape whose entries are all 1.
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

inline void require_weight(const Eigen::Ref<const MatrixD>& weight) {
    require(weight.rows() == weight.cols() && weight.rows() >= 1, ErrorCode::shape, "weight: ", weight.rows(),
            " x ", weight.cols(), ", expected a square matrix");
    require(weight.allFinite(), ErrorCode::not_finite,
            "weight: holds NaN or infinity, expected finite numbers");
}

inline void require_weight(const Eigen::Ref<const MatrixD>& weight,
                           const Eigen::Ref<const Eigen::VectorXd>& steps) {
    require_weight(weight);
    require(steps.size() == weight.rows(), ErrorCode::shape, "steps: ", steps.size(), " entries for ",
            weight.rows(), " channels, expected one for each");
    require_not_negative(steps, "steps");
}

/// C by places, its factors in place: D on the diagonal, L_ij below, in the row of the later channel j. The
/// last channel is eliminated first.
inline MatrixD factorized(const Eigen::Ref<const MatrixD>& weight, std::span<const Index> order) {
    const Index channels = weight.rows();
    std::vector<bool> seen(order.size(), false);
    for (const Index channel : order) {
        const bool fits = static_cast<Index>(order.size()) == channels && channel >= 0 &&
                          channel < channels && !seen[static_cast<std::size_t>(channel)];
        require(fits, ErrorCode::shape, "order: no permutation of ", channels, " channels, expected one");
        seen[static_cast<std::size_t>(channel)] = true;
    }
    require(static_cast<Index>(order.size()) == channels, ErrorCode::shape, "order: ", order.size(),
            " channels, expected ", channels);
    MatrixD rest(channels, channels);
    for (Index i = 0; i < channels; ++i)
        for (Index j = 0; j < channels; ++j)
            rest(i, j) = weight(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(j)]);
    for (Index j = channels - 1; j >= 0; --j) {
        const double pivot = rest(j, j);
        require(pivot > 0, ErrorCode::option, "weight: not positive definite (pivot ", pivot,
                "), expected a positive definite matrix");
        const Eigen::RowVectorXd row = rest.row(j).head(j);
        rest.row(j).head(j) /= pivot;
        rest.topLeftCorner(j, j) -= row.transpose() * (row / pivot);
    }
    return rest;
}

}  // namespace detail

KVPLANE_FUNCTION double cell_step(double range, int bits) {
    detail::require_not_negative(range, "range");
    detail::require_bits(bits, 1);
    return std::ldexp(range, -bits);
}

KVPLANE_FUNCTION double min_max_step(double range, int bits) {
    detail::require_not_negative(range, "range");
    detail::require_bits(bits, 1);
    return range / (std::ldexp(1.0, bits) - 1);
}

KVPLANE_FUNCTION double symmetric_step(double largest, int bits) {
    detail::require_not_negative(largest, "largest");
    detail::require_bits(bits, 2);
    return largest / (std::ldexp(1.0, bits - 1) - 1);
}

KVPLANE_FUNCTION double read_error_bound(double step, int bits, int depth) {
    detail::require_not_negative(step, "step");
    detail::require_bits(bits, 1);
    require(depth >= 1 && depth <= bits, ErrorCode::option, "depth: ", depth, ", expected 1 to ", bits);
    return std::ldexp(step, bits - depth - 1);
}

KVPLANE_FUNCTION double symmetric_frobenius_bound(Index rows, Index columns, double largest, int bits) {
    return detail::root_of_size(rows, columns) * read_error_bound(symmetric_step(largest, bits), bits, bits);
}

KVPLANE_FUNCTION double symmetric_spectral_bound(Index rows, Index columns, double spectral_norm, int bits) {
    return symmetric_frobenius_bound(rows, columns, spectral_norm, bits);
}

KVPLANE_FUNCTION double cell_frobenius_bound(Index rows, Index columns, double range, int bits) {
    return detail::root_of_size(rows, columns) * read_error_bound(cell_step(range, bits), bits, bits);
}

KVPLANE_FUNCTION double key_prioritized_difference(double key_norm, double value_norm, double first_bits,
                                                   double second_bits, double constant) {
    detail::require_not_negative(key_norm, "key_norm");
    detail::require_not_negative(value_norm, "value_norm");
    detail::require_not_negative(constant, "constant");
    detail::require_number(first_bits, "first_bits");
    detail::require_number(second_bits, "second_bits");
    // Written as products, so that the sign is right even if the norms or the widths nearly agree.
    const double norms = (key_norm - value_norm) * (key_norm + value_norm);
    return constant * norms * (std::exp2(-2 * first_bits) - std::exp2(-2 * second_bits));
}

KVPLANE_FUNCTION double optimal_key_value_split(double key_norm, double value_norm) {
    detail::require_positive(key_norm, "key_norm");
    detail::require_positive(value_norm, "value_norm");
    return std::log2(key_norm) - std::log2(value_norm);
}

KVPLANE_FUNCTION NormDisparity norm_disparity(const Eigen::Ref<const Eigen::VectorXd>& key_norms,
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

KVPLANE_FUNCTION double allocation_lower_bound(const Eigen::Ref<const MatrixD>& errors,
                                               const Eigen::Ref<const MatrixD>& costs, double price,
                                               double budget) {
    detail::require_curves(errors, costs);
    detail::require_not_negative(price, "price");
    detail::require_number(budget, "budget");
    if (errors.rows() == 0) return 0;
    return (errors + price * costs).rowwise().minCoeff().sum() - price * budget;
}

KVPLANE_FUNCTION double high_rate_allocation_bound(const Eigen::Ref<const Eigen::VectorXd>& weights,
                                                   const Eigen::Ref<const Eigen::VectorXd>& counts,
                                                   double budget) {
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

KVPLANE_FUNCTION bool greedy_is_exact(const Eigen::Ref<const MatrixD>& errors,
                                      const Eigen::Ref<const MatrixD>& costs) {
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

KVPLANE_FUNCTION double truncation_error(const Eigen::Ref<const Eigen::VectorXd>& spectrum, Index kept) {
    detail::require_not_negative(spectrum, "spectrum");
    require(kept >= 0 && kept <= spectrum.size(), ErrorCode::option, "kept: ", kept, ", expected 0 to ",
            spectrum.size());
    for (Index j = 1; j < spectrum.size(); ++j)
        require(spectrum[j] <= spectrum[j - 1], ErrorCode::option, "spectrum: ", spectrum[j], " at ", j,
                " after ", spectrum[j - 1], ", expected descending numbers");
    return spectrum.tail(spectrum.size() - kept).sum();
}

KVPLANE_FUNCTION double expected_score_error(const Eigen::Ref<const Eigen::VectorXd>& spectrum,
                                             const Eigen::Ref<const Eigen::VectorXd>& errors) {
    detail::require_same_size(spectrum.size(), errors.size(), "errors");
    detail::require_not_negative(spectrum, "spectrum");
    detail::require_not_negative(errors, "errors");
    return spectrum.dot(errors);
}

KVPLANE_FUNCTION double svdq_error_bound(const Eigen::Ref<const Eigen::VectorXd>& ranges,
                                         std::span<const int> bits,
                                         const Eigen::Ref<const Eigen::VectorXd>& squared_singular_values,
                                         Index tokens) {
    detail::require_same_size(squared_singular_values.size(), ranges.size(), "ranges");
    detail::require_same_size(squared_singular_values.size(), static_cast<Index>(bits.size()), "bits");
    detail::require_not_negative(ranges, "ranges");
    detail::require_not_negative(squared_singular_values, "squared_singular_values");
    require(tokens >= 0, ErrorCode::option, "tokens: ", tokens, ", expected 0 or more");
    double bound = 0;
    for (Index j = 0; j < ranges.size(); ++j) {
        const int width = bits[static_cast<std::size_t>(j)];
        detail::require_bits(width, 0);
        const double half_step = std::ldexp(ranges[j], -width - 1);
        bound += width > 0 ? static_cast<double>(tokens) * half_step * half_step : squared_singular_values[j];
    }
    return bound;
}

KVPLANE_FUNCTION double svdq_gain(double decay) {
    detail::require_number(decay, "decay");
    const double x = std::abs(decay);
    // As x e^(-x/2) / (1 - e^-x), which neither overflows nor cancels.
    return x == 0 ? 1 : x * std::exp(-x / 2) / -std::expm1(-x);
}

KVPLANE_FUNCTION double svdq_grouped_error(double rho, std::span<const int> widths,
                                           std::span<const double> error_by_width) {
    detail::require_not_negative(rho, "rho");
    require(rho <= 1, ErrorCode::option, "rho: ", rho, ", expected 0 to 1");
    require(!widths.empty(), ErrorCode::shape, "widths: no groups, expected at least one");
    double energy = 1, all = 0, error = 0;
    for (const int width : widths) {
        detail::require_bits(width, 0);
        require(static_cast<std::size_t>(width) < error_by_width.size(), ErrorCode::option, "bits: ", width,
                ", expected below the ", error_by_width.size(), " widths of the table");
        const double of_width = error_by_width[static_cast<std::size_t>(width)];
        detail::require_not_negative(of_width, "error_by_width");
        error += energy * of_width;
        all += energy;
        energy *= rho;
    }
    return error / all;
}

KVPLANE_FUNCTION double fitted_decay(const Eigen::Ref<const Eigen::VectorXd>& spectrum) {
    const Index latents = spectrum.size();
    require(latents >= 2, ErrorCode::shape, "spectrum: ", latents, " latents, expected at least 2");
    double product = 0, square = 0;
    for (Index j = 0; j < latents; ++j) {
        detail::require_positive(spectrum[j], "spectrum");
        const double t = (static_cast<double>(j) + 0.5) / static_cast<double>(latents) - 0.5;  // mean 0
        product += t * std::log(spectrum[j]);
        square += t * t;
    }
    return -product / square;
}

KVPLANE_FUNCTION WaterFilling reverse_water_filling(const Eigen::Ref<const Eigen::VectorXd>& spectrum,
                                                    double mean_bits) {
    detail::require_not_negative(spectrum, "spectrum");
    detail::require_not_negative(mean_bits, "mean_bits");
    require(spectrum.size() > 0, ErrorCode::shape, "spectrum: no latents, expected at least one");
    if (spectrum.maxCoeff() == 0) return {};
    const auto latents = static_cast<double>(spectrum.size());
    // With as many bits the water is below the least double, and with more the search would begin at
    // infinity.
    mean_bits = std::min(mean_bits, 4096.0);
    const auto rate = [&](double log2_level) {
        double sum = 0;
        for (const double variance : spectrum) sum += std::max(0.0, 0.5 * (std::log2(variance) - log2_level));
        return sum / latents;
    };
    // At `above` no latent gets a bit. At `below` the largest latent alone gets all the bits there are.
    double above = std::log2(spectrum.maxCoeff()), below = above - 2 * mean_bits * latents;
    for (int halvings = 0; halvings < 200; ++halvings) {
        const double middle = 0.5 * (above + below);
        (rate(middle) > mean_bits ? below : above) = middle;
    }
    const double level = std::exp2(above);
    return {spectrum.cwiseMin(level).sum(), level};
}

KVPLANE_FUNCTION double schedule_rate(std::span<const int> widths) {
    require(!widths.empty(), ErrorCode::shape, "widths: no groups, expected at least one");
    double sum = 0;
    for (const int width : widths) {
        detail::require_bits(width, 0);
        sum += width;
    }
    return sum / static_cast<double>(widths.size());
}

KVPLANE_FUNCTION double key_compression(double bits, double key_fraction) {
    detail::require_positive(bits, "bits");
    detail::require_positive(key_fraction, "key_fraction");
    require(key_fraction <= 1, ErrorCode::option, "key_fraction: ", key_fraction, ", expected at most 1");
    return 16 / bits / key_fraction;
}

KVPLANE_FUNCTION double latent_true_rate(double bits, Index kept, Index channels, Index tokens,
                                         Index grid_group) {
    detail::require_not_negative(bits, "bits");
    require(channels >= 1 && tokens >= 1 && grid_group >= 1, ErrorCode::option, "channels: ", channels,
            ", tokens: ", tokens, ", grid_group: ", grid_group, ", expected 1 or more");
    require(kept >= 0 && kept <= channels, ErrorCode::option, "kept: ", kept, ", expected 0 to ", channels);
    const auto latents = static_cast<double>(kept);
    return bits + 16 * latents / static_cast<double>(tokens) +
           latents / static_cast<double>(channels) * 32 / static_cast<double>(grid_group);
}

KVPLANE_FUNCTION double aligned_term_bound(int largest_exponent) {
    return std::exp2(largest_exponent - 10);
}

KVPLANE_FUNCTION double aligned_score_bound(Index truncated, int largest_exponent, Index head_dim) {
    require(truncated >= 0 && head_dim >= 1, ErrorCode::option, "truncated: ", truncated,
            ", head_dim: ", head_dim, ", expected 0 or more and 1 or more");
    return static_cast<double>(truncated) * aligned_term_bound(largest_exponent) /
           std::sqrt(static_cast<double>(head_dim));
}

KVPLANE_FUNCTION double read_score_bound(const Eigen::Ref<const Eigen::VectorXd>& query,
                                         const Eigen::Ref<const Eigen::VectorXd>& read_step, double scale) {
    require(query.size() == read_step.size(), ErrorCode::shape, "read_step: ", read_step.size(),
            " channels, expected ", query.size());
    return 0.5 * std::abs(scale) * query.cwiseAbs().dot(read_step.cwiseAbs());
}

KVPLANE_FUNCTION double output_error_bound(double score_error, double radius, double value_error) {
    detail::require_not_negative(score_error, "score_error");
    detail::require_not_negative(radius, "radius");
    detail::require_not_negative(value_error, "value_error");
    return 2 * std::tanh(0.5 * score_error) * radius + value_error;
}

KVPLANE_FUNCTION double rounded_factors_error(int bits, int bits_below, Index count, double largest) {
    detail::require_bits(bits, 1);
    require(bits <= 8 && bits_below >= 0 && bits_below < bits, ErrorCode::option, "bits: ", bits,
            ", of them ", bits_below, " below the first plane, expected 1 to 8 and fewer");
    require(count >= 0, ErrorCode::option, "count: ", count, ", expected 0 or more");
    detail::require_not_negative(largest, "largest");
    const double codes = 0.5 * (std::exp2(bits) - 1), below = 0.5 * (std::exp2(bits_below) - 1);
    const double counts_as_nothing = 1e-30;
    const double off = largest <= counts_as_nothing ? codes
                       : bits <= 4                  ? codes / 254
                                                    : codes / 65024 + below / 254;
    return static_cast<double>(count) * largest * off;
}

KVPLANE_FUNCTION double plain_score_error(const Eigen::Ref<const MatrixD>& weight,
                                          const Eigen::Ref<const Eigen::VectorXd>& steps) {
    detail::require_weight(weight, steps);
    return weight.diagonal().dot(steps.cwiseAbs2()) / 12;
}

KVPLANE_FUNCTION std::vector<Index> shaping_order(const Eigen::Ref<const MatrixD>& weight,
                                                  const Eigen::Ref<const Eigen::VectorXd>& steps) {
    detail::require_weight(weight, steps);
    std::vector<Index> order(static_cast<std::size_t>(weight.rows()));
    std::iota(order.begin(), order.end(), Index{0});
    const Eigen::VectorXd cost = weight.diagonal().cwiseProduct(steps.cwiseAbs2());
    std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return cost[a] > cost[b]; });
    return order;
}

KVPLANE_FUNCTION Eigen::VectorXd shaping_pivots(const Eigen::Ref<const MatrixD>& weight,
                                                std::span<const Index> order) {
    detail::require_weight(weight);
    const MatrixD factors = detail::factorized(weight, order);
    Eigen::VectorXd pivots(weight.rows());
    for (Index j = 0; j < weight.rows(); ++j) pivots[order[static_cast<std::size_t>(j)]] = factors(j, j);
    return pivots;
}

KVPLANE_FUNCTION double shaped_score_error(const Eigen::Ref<const MatrixD>& weight,
                                           const Eigen::Ref<const Eigen::VectorXd>& steps, double ridge) {
    detail::require_not_negative(ridge, "ridge");
    const std::vector<Index> order = shaping_order(weight, steps);
    const Index channels = weight.rows();
    MatrixD ridged = weight;
    ridged.diagonal().array() += ridge * weight.trace() / static_cast<double>(channels);
    const MatrixD factors = detail::factorized(ridged, order);
    double error = 0;
    // The errors that follow from an error of 1 at place j: e_k = -sum_(i < k) L_ik e_i.
    Eigen::VectorXd follows(channels);
    for (Index j = 0; j < channels; ++j) {
        follows.setZero();
        follows[order[static_cast<std::size_t>(j)]] = 1;
        for (Index k = j + 1; k < channels; ++k) {
            double sum = 0;
            for (Index i = j; i < k; ++i) sum += factors(k, i) * follows[order[static_cast<std::size_t>(i)]];
            follows[order[static_cast<std::size_t>(k)]] = -sum;
        }
        const double step = steps[order[static_cast<std::size_t>(j)]];
        error += follows.dot(weight * follows) * step * step / 12;
    }
    return error;
}

KVPLANE_FUNCTION double shaping_limit(const Eigen::Ref<const MatrixD>& weight) {
    detail::require_weight(weight);
    std::vector<Index> order(static_cast<std::size_t>(weight.rows()));
    std::iota(order.begin(), order.end(), Index{0});
    return std::exp(shaping_pivots(weight, order).array().log().mean()) / weight.diagonal().mean();
}

}  // namespace kvplane::theory
