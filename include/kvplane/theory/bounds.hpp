// kvplane/theory/bounds.hpp: the theorems that the library rests on, each as a function from inputs to the
// bound.
//
// Nothing here quantizes or allocates: the tests compare these numbers with what the library's own code does.
#pragma once

#include <span>
#include <vector>

#include "kvplane/compiled.hpp"
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

/// T6, truncation (Eckart and Young 1936). Of the spectrum of K - mean, descending: its squared singular
/// values, or the eigenvalues of its covariance (then an error a token). No matrix of rank `kept` is nearer
/// to K - mean in squared Frobenius norm than
///
///     sum_{j >= kept} spectrum_j,
///
/// which the first `kept` latents reach. In an orthonormal basis rotation changes no norm, so with latents
/// themselves in error, |K - K'|_F^2 = |L_r - L_r'|_F^2 + this. spectrum: >= 0 and descending; 0 <= kept <=
/// latents. Throws Error (not_finite, option) otherwise.
double truncation_error(const Eigen::Ref<const Eigen::VectorXd>& spectrum, Index kept);

/// T6b, query-weighted basis: latents z = (k - mean) A U / sqrt(lambda), A = C^(1/2), C = E[u u^T] of the
/// queries as the keys' frame sees them. For u independent of the error,
///
///     E[(u.(k - k'))^2] = sum_j lambda_j e_j,    e_j = E[(z_j - z_j')^2],
///
/// in squared (unscaled) scores: a latent that is not kept has e_j = 1. With C = I it is E|k - k'|^2. Exact;
/// a ridge added to C adds the same multiple of E|k - k'|^2. spectrum (lambda) and errors >= 0, one a latent.
/// Throws Error (shape, not_finite, option) otherwise.
double expected_score_error(const Eigen::Ref<const Eigen::VectorXd>& spectrum,
                            const Eigen::Ref<const Eigen::VectorXd>& errors);

/// T7, deterministic bound of SVDq (arXiv 2502.15304). `cell` grids over the intervals of length ranges(j) =
/// max - min of latent j, L = (K - mean) U, over `tokens` tokens:
///
///     |K - K'|_F^2 <= tokens * sum_{bits_j > 0} (ranges(j) / 2^(bits_j + 1))^2
///                     + sum_{bits_j = 0} squared_singular_values(j).
///
/// Reached where every latent lies at the edge of a cell. One grid a latent; where grids cover fewer tokens,
/// it holds for the sum over them. bits 0 or more, all else >= 0, one of each a latent. Throws Error (shape,
/// not_finite, option) otherwise.
double svdq_error_bound(const Eigen::Ref<const Eigen::VectorXd>& ranges, std::span<const int> bits,
                        const Eigen::Ref<const Eigen::VectorXd>& squared_singular_values, Index tokens);

/// T8, what SVDq gains over per-channel quantization at the same mean bits (arXiv 2502.15304 says "x0.1 or
/// even lower"). Latent variances lambda(t) = lambda_0 e^(-decay t), t in [0, 1], errors lambda 4^-b (high
/// rate), and real widths of least error: the ratio of the errors is that of the geometric to the arithmetic
/// mean of the variances,
///
///     (decay / 2) / sinh(decay / 2);
///
/// 1 at a decay of 0, .1000 at 9. decay finite, else Error (not_finite).
double svdq_gain(double decay);

/// T8 at low rate: equal groups of latents, each of rho = e^(-decay / groups) times the energy of the one
/// before, group g with widths[g] bits. The share of the trace that is lost,
///
///     sum_g e_g f(widths[g]),    e_g = (1 - rho) rho^g / (1 - rho^groups),
///
/// f = error_by_width: mean squared error of a latent of variance 1 at 0, 1, 2, ... bits, f(0) = 1 (for the
/// library's grids: latent_grid_error). Divided by f(b) of the mean width it is the ratio that svdq_gain
/// bounds. 0 <= rho <= 1, at least one group, widths within the table, table >= 0. Throws Error (shape,
/// not_finite, option) otherwise.
double svdq_grouped_error(double rho, std::span<const int> widths, std::span<const double> error_by_width);

/// T8: the decay of a measured spectrum, minus the slope of the least squares line through log(spectrum_j)
/// over t_j = (j + 1/2) / latents. At least two latents, all > 0. Throws Error (shape, not_finite, option)
/// otherwise.
double fitted_decay(const Eigen::Ref<const Eigen::VectorXd>& spectrum);

/// T9, reverse water-filling (Shannon; Cover and Thomas, theorem 10.3.3).
struct WaterFilling {
    double distortion = 0;  ///< sum over latents, in the spectrum's units
    double level = 0;       ///< theta: what no latent's error exceeds
};

/// T9: normal latents of the variances `spectrum` (any order) cannot be coded, by any means, in a mean of
/// `mean_bits` bits a latent with a summed mean squared error below
///
///     distortion = sum_j min(theta, spectrum_j),    mean_bits = mean_j max(0, 1/2 log2(spectrum_j / theta)).
///
/// No schedule of scalar quantizers reaches it at low rate, as f(b) > 4^-b. spectrum >= 0, at least one
/// latent, mean_bits >= 0. Throws Error (shape, not_finite, option) otherwise.
WaterFilling reverse_water_filling(const Eigen::Ref<const Eigen::VectorXd>& spectrum, double mean_bits);

/// T10: mean bits of equal groups of these widths (>= 0, at least one); 2 for SVDq's (8,4,2,1,1,0,0,0), 1.25
/// for its (4,4,2,0,0,0,0,0). Throws Error (shape, option) otherwise.
double schedule_rate(std::span<const int> widths);

/// T10: how many times smaller keys are than in fp16, by nominal bits and with a share `key_fraction` of the
/// tokens kept: 16 / bits / key_fraction. 409.6 at 1.25 bits and 1/32: the "410x" of arXiv 2502.15304. bits >
/// 0, 0 < key_fraction <= 1. Throws Error (not_finite, option) otherwise.
double key_compression(double bits, double key_fraction);

/// T10: what an element of a key really takes, in bits, where `kept` of `channels` latents have a width, the
/// schedule's mean is `bits`, one fp16 basis (kept vectors of `channels` numbers) serves `tokens` tokens, and
/// every `grid_group` tokens of a latent have an fp16 step and lower:
///
///     bits + 16 kept / tokens + (kept / channels) 32 / grid_group.
///
/// Padding of planes comes on top. 0 <= kept <= channels, the other counts >= 1, bits >= 0. Throws Error
/// (not_finite, option) otherwise.
double latent_true_rate(double bits, Index kept, Index channels, Index tokens, Index grid_group);

/// T11 (the rule of AlignedKV, arXiv 2409.16546, with the thresholds that it supports): fp16 keys read in
/// planes {8, 4, 4} and filled with the middle of what is unread. E* = `largest_exponent` = max over channels
/// of e(q_j) + e(max |k_j|), e the unbiased exponent (-14 for subnormals). A channel whose sum lies 4 or more
/// below E* may be read at 12 bits, 8 or more below at 8 bits: then |q_i (k_i - k_i')| < 2^(E* - 10), what
/// fp16 rounds the largest term by at most.
double aligned_term_bound(int largest_exponent);
/// T11: |s - s'| of a score (q.k / sqrt(head_dim)) of which `truncated` channels were read so. truncated >=
/// 0, head_dim >= 1; throws Error (option) otherwise.
double aligned_score_bound(Index truncated, int largest_exponent, Index head_dim);

/// T13: |s - s'| of scale q.k where channel c is read to a cell of width read_step[c] (step 2^(unread bits)):
/// scale sum |q_c| read_step[c] / 2. Throws Error (shape) where lengths differ.
double read_score_bound(const Eigen::Ref<const Eigen::VectorXd>& query,
                        const Eigen::Ref<const Eigen::VectorXd>& read_step, double scale);
/// T13, the certificate of an output: where no score is off by more than score_error,
///
///     |o - o'|_2 <= 2 tanh(score_error / 2) radius + value_error,
///
/// radius = max_t |v_t - c|_2 over the exact values for any c, value_error = sum_t p'_t |v_t - v'_t|_2.
/// Reached by two tokens whose weights are e^(+-score_error / 2) to each other. Nothing negative; throws
/// Error (not_finite, option) otherwise.
double output_error_bound(double score_error, double radius, double value_error);

/// T14: what rounding factors (the query times a channel's step, a softmax weight times a token's) adds at
/// most to a sum of `count` products with codes of `bits` bits. largest: of the factors' magnitudes. Codes
/// count from their middle, (2^b - 1) / 2 away at most; factors have 8 bits, largest / 254 off, or, for more
/// than 4 bits, two times 8, of which the low one does not meet the `bits_below` bits below the first plane.
/// Throws Error (option) for bits outside 1 to 8, and what is negative.
double rounded_factors_error(int bits, int bits_below, Index count, double largest);

}  // namespace kvplane::theory

#if !defined(KVPLANE_COMPILED)
#include "kvplane/theory/impl/bounds.hpp"
#endif
