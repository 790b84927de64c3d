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

/// T1, the step of the grid whose first and last cells have their middles at the ends of an interval of
/// length `range`, so that both ends are reproduced exactly (the scheme `min_max`): range / (2^bits - 1).
/// Throws as cell_step.
double min_max_step(double range, int bits);

/// T1, T2: the step of two's complement around zero (the scheme `symmetric`; alpha in arXiv 2502.15075):
/// largest / (2^(bits-1) - 1), largest = max|x|. Needs bits >= 2; throws as cell_step otherwise.
double symmetric_step(double largest, int bits);

/// T1: whatever the scheme, |x - x'| <= step * 2^(bits - depth) / 2 for every x in the interval that the
/// 2^bits cells cover, read from the first `depth` bits of its code. The bound is reached at the edges of the
/// cells of that depth. If grids are rounded outward to fp16, it holds for the step as stored. step finite
/// and >= 0, 1 <= depth <= bits; throws Error (not_finite, option) otherwise.
double read_error_bound(double step, int bits, int depth);

/// T2, Frobenius and spectral bounds (arXiv 2502.15075, theorems 3 and 4). A is rows x columns, M = `largest`
/// = max|A_ij|, and A' is the symmetric quantization of A by one grid of `bits` >= 2 bits:
///
///     |A - A'|_2 <= |A - A'|_F <= sqrt(rows * columns) * M / (2 * (2^(bits-1) - 1)).
///
/// The bound is approached if every entry but the largest lies half a step from a code. Those errors can all
/// be equal, so the spectral norm comes as close. rows, columns >= 0; throws Error (shape, not_finite,
/// option) otherwise.
///
/// Theorem 3 also prints a lower bound, M <= |A - A'|_2. It is false: an A whose entries lie on the grid has
/// no error at all.
double symmetric_frobenius_bound(Index rows, Index columns, double largest, int bits);

/// T2 from the spectral norm of A alone. Because M <= |A|_2, neither norm of A - A' exceeds
///
///     sqrt(rows * columns) * |A|_2 / (2 * (2^(bits-1) - 1)).
///
/// It is looser than symmetric_frobenius_bound wherever |A|_2 > M. Throws as symmetric_frobenius_bound.
double symmetric_spectral_bound(Index rows, Index columns, double spectral_norm, int bits);

/// T2 for the scheme `cell`, with range = max A_ij - min A_ij:
///
///     |A - A'|_F <= sqrt(rows * columns) * range / 2^(bits+1).
///
/// Because range <= 2 M, it is stronger than symmetric_frobenius_bound by a factor of at least 2^(bits-1) /
/// (2^(bits-1) - 1). It is reached if every entry lies at the edge of a cell. bits >= 1; throws as
/// symmetric_frobenius_bound.
double cell_frobenius_bound(Index rows, Index columns, double range, int bits);

/// T3, key-prioritized quantization (arXiv 2502.15075, theorem 2, in the form that can be proved). Keys and
/// values have the same shape and are quantized by the same uniform quantizer, whose squared error is D(b) =
/// constant * |M|_F^2 * 4^-b. Returns the error of giving `first_bits` to the keys and `second_bits` to the
/// values, less the error of the opposite assignment,
///
///     D_K(b1) + D_V(b2) - D_K(b2) - D_V(b1) = constant * (|K|_F^2 - |V|_F^2) * (4^-b1 - 4^-b2),
///
/// which is negative exactly if the matrix of larger norm gets more bits. Norms finite and >= 0; throws Error
/// (not_finite, option) otherwise.
double key_prioritized_difference(double key_norm, double value_norm, double first_bits, double second_bits,
                                  double constant = 1);

/// T3, the split of least error: b_K - b_V = log2(|K|_F / |V|_F), for real bits and the error D(b) of
/// key_prioritized_difference. At this split the errors of keys and values are equal, and that is where their
/// sum for a given b_K + b_V is least. (Appendix B.4 of arXiv 2502.15075 prints the ratio upside down.) Norms
/// finite and > 0; throws Error (not_finite, option) otherwise.
double optimal_key_value_split(double key_norm, double value_norm);

/// T4, norm disparity (arXiv 2502.15075, theorem 1): E|W_K| > E|W_V|. This is what a table of norms per layer
/// says about that claim.
struct NormDisparity {
    Index layers = 0;
    double mean_key_norm = 0;
    double mean_value_norm = 0;
    std::vector<Index> exceptions;  ///< layers whose key norm is not above their value norm, ascending

    /// Whether the claim holds as stated, for the average over layers.
    bool holds_on_average() const { return mean_key_norm > mean_value_norm; }
    /// Whether the stronger claim holds that allocation layer by layer relies on.
    bool holds_in_every_layer() const { return exceptions.empty(); }
};

/// T4. The claim is empirical. On the authors' own table it holds in Frobenius norm for the Llama models (all
/// layers but 0 and 1 of Llama-3.3-70B) and fails for most layers of every Qwen3 model, whose keys are
/// normalised after projection. In spectral norm it holds in all layers but 0 to 3 of Llama-3.3-70B and layer
/// 33 of Qwen3-4B and Qwen3-8B. One norm per layer, finite and >= 0; throws Error (shape, not_finite, option)
/// otherwise.
NormDisparity norm_disparity(const Eigen::Ref<const Eigen::VectorXd>& key_norms,
                             const Eigen::Ref<const Eigen::VectorXd>& value_norms);

/// T5, weak duality: no choice of one option for every item whose costs sum to at most `budget` has a smaller
/// sum of errors than
///
///     sum_i min_o (errors(i, o) + price * costs(i, o)) - price * budget,
///
/// for any price >= 0, the error charged for a bit. errors and costs are [items][options], with weights and
/// counts multiplied in; an item with fewer options than others repeats one. The bound is tight at the price
/// of the last step taken if all curves are convex and the budget ends with that step. Throws Error (shape,
/// not_finite, option).
double allocation_lower_bound(const Eigen::Ref<const MatrixD>& errors, const Eigen::Ref<const MatrixD>& costs,
                              double price, double budget);

/// T5 in closed form, for D_i(b) = weights(i) * 4^-b and real widths b_i, which may be negative. Item i has
/// counts(i) elements. By the weighted inequality of arithmetic and geometric means, no allocation with
/// sum_i counts(i) * b_i <= budget has an error below
///
///     N * 4^(-budget / N) * prod_i (weights(i) / counts(i))^(counts(i) / N),    N = sum_i counts(i).
///
/// It is reached exactly if weights(i) / counts(i) * 4^-b_i is the same for all items. With two items of
/// equal count that is optimal_key_value_split. weights >= 0, counts > 0; throws Error (shape, not_finite,
/// option) otherwise.
double high_rate_allocation_bound(const Eigen::Ref<const Eigen::VectorXd>& weights,
                                  const Eigen::Ref<const Eigen::VectorXd>& counts, double budget);

/// T5, the premise under which greedy on marginal gain is exact: all steps of all menus cost the same, and no
/// curve gains more by a later step than by an earlier one. errors and costs are as for
/// allocation_lower_bound, with ascending costs. Steps are compared with a relative tolerance of 1e-12.
/// Throws Error (shape, not_finite, option).
bool greedy_is_exact(const Eigen::Ref<const MatrixD>& errors, const Eigen::Ref<const MatrixD>& costs);

/// T6, truncation (Eckart and Young 1936). `spectrum` holds the squared singular values of K - mean,
/// descending. If it holds the eigenvalues of the covariance instead, the result is an error per token. No
/// matrix of rank `kept` is nearer to K - mean in squared Frobenius norm than
///
///     sum_{j >= kept} spectrum_j,
///
/// which the first `kept` latents reach. An orthonormal basis changes no norm, so if the latents themselves
/// have errors, |K - K'|_F^2 = |L_r - L_r'|_F^2 + this sum. spectrum >= 0 and descending; 0 <= kept <=
/// latents. Throws Error (not_finite, option) otherwise.
double truncation_error(const Eigen::Ref<const Eigen::VectorXd>& spectrum, Index kept);

/// T6b, query-weighted basis. The latents are z = (k - mean) A U / sqrt(lambda), with A = C^(1/2) and
/// C = E[u u^T] over the queries u in the frame of the keys. For u independent of the error,
///
///     E[(u.(k - k'))^2] = sum_j lambda_j e_j,    e_j = E[(z_j - z_j')^2],
///
/// in squared scores without the factor 1 / sqrt(head_dim). A latent that is not kept has e_j = 1. With C = I
/// the sum is E|k - k'|^2. It is exact. If a ridge is added to C, the sum grows by the same multiple of
/// E|k - k'|^2. spectrum (lambda) and errors >= 0, one entry per latent. Throws Error (shape, not_finite,
/// option) otherwise.
double expected_score_error(const Eigen::Ref<const Eigen::VectorXd>& spectrum,
                            const Eigen::Ref<const Eigen::VectorXd>& errors);

/// T7, deterministic bound of SVDq (arXiv 2502.15304). The latents L = (K - mean) U of `tokens` tokens are
/// quantized with `cell` grids. The grid of latent j covers an interval of length ranges(j) = max - min of
/// that latent:
///
///     |K - K'|_F^2 <= tokens * sum_{bits_j > 0} (ranges(j) / 2^(bits_j + 1))^2
///                     + sum_{bits_j = 0} squared_singular_values(j).
///
/// The bound is reached if every latent lies at the edge of a cell. Each latent has one grid; if grids cover
/// fewer tokens, the bound holds for the sum over the grids. bits 0 or more, everything else >= 0, one entry
/// per latent. Throws Error (shape, not_finite, option) otherwise.
double svdq_error_bound(const Eigen::Ref<const Eigen::VectorXd>& ranges, std::span<const int> bits,
                        const Eigen::Ref<const Eigen::VectorXd>& squared_singular_values, Index tokens);

/// T8, what SVDq gains over per-channel quantization at the same average number of bits (arXiv 2502.15304
/// says "x0.1 or even lower"). Let the latent variances be lambda(t) = lambda_0 e^(-decay t) with t in
/// [0, 1], the errors lambda 4^-b (high rate), and the widths real and of least error. The ratio of the
/// errors is then that of the geometric to the arithmetic mean of the variances,
///
///     (decay / 2) / sinh(decay / 2).
///
/// It is 1 at a decay of 0 and .1000 at 9. decay finite; throws Error (not_finite) otherwise.
double svdq_gain(double decay);

/// T8 at low rate. The latents form equal groups, each with rho = e^(-decay / groups) times the energy of the
/// one before. Group g has widths[g] bits. Returns the share of the trace that is lost,
///
///     sum_g e_g f(widths[g]),    e_g = (1 - rho) rho^g / (1 - rho^groups),
///
/// where f = error_by_width is the mean squared error of a latent of variance 1 at 0, 1, 2, ... bits, and
/// f(0) = 1. (For the library's grids, f is latent_grid_error.) Divided by f(b) at the average width b, the
/// result is the ratio of errors that svdq_gain is about, and no less than that where f falls by 4 with
/// every bit. At low rate f does not, and the ratio may be less: .49 against a gain of .70 for widths {2,
/// 0} and a decay of 3 on the library's grids. 0 <= rho <= 1, at least one group, widths within the table,
/// table >= 0. Throws Error (shape, not_finite, option) otherwise.
double svdq_grouped_error(double rho, std::span<const int> widths, std::span<const double> error_by_width);

/// T8: the decay of a measured spectrum. It is the negative slope of the least squares line through
/// log(spectrum_j) over t_j = (j + 1/2) / latents. At least two latents, all > 0. Throws Error (shape,
/// not_finite, option) otherwise.
double fitted_decay(const Eigen::Ref<const Eigen::VectorXd>& spectrum);

/// T9, reverse water-filling (Shannon; Cover and Thomas, theorem 10.3.3).
struct WaterFilling {
    double distortion = 0;  ///< sum over latents, in the spectrum's units
    double level = 0;       ///< theta: no latent's error exceeds it
};

/// T9: let normal latents have the variances `spectrum`, in any order. No code of any kind that spends
/// `mean_bits` bits per latent on average has a summed mean squared error below
///
///     distortion = sum_j min(theta, spectrum_j),    mean_bits = mean_j max(0, 1/2 log2(spectrum_j / theta)).
///
/// No schedule of scalar quantizers reaches it at low rate, because their error f(b) (see svdq_grouped_error)
/// is above 4^-b. spectrum >= 0, at least one latent, mean_bits >= 0. Throws Error (shape, not_finite,
/// option) otherwise.
WaterFilling reverse_water_filling(const Eigen::Ref<const Eigen::VectorXd>& spectrum, double mean_bits);

/// T10: the average number of bits per latent in equal groups of these widths (>= 0, at least one). It is 2
/// for SVDq's (8,4,2,1,1,0,0,0) and 1.25 for its (4,4,2,0,0,0,0,0). Throws Error (shape, option) otherwise.
double schedule_rate(std::span<const int> widths);

/// T10: how many times smaller keys are than in fp16, counted in nominal bits and with a share `key_fraction`
/// of the tokens kept: 16 / bits / key_fraction. It is 409.6 at 1.25 bits and 1/32, the "410x" of arXiv
/// 2502.15304. bits > 0, 0 < key_fraction <= 1. Throws Error (not_finite, option) otherwise.
double key_compression(double bits, double key_fraction);

/// T10: the bits that one element of a key really takes. `kept` of `channels` latents have a width. The
/// schedule spends `bits` bits per latent on average. One fp16 basis, `kept` vectors of `channels` numbers,
/// serves `tokens` tokens. Every `grid_group` tokens of a latent have an fp16 step and lower:
///
///     bits + 16 kept / tokens + (kept / channels) 32 / grid_group.
///
/// The padding of planes comes on top. 0 <= kept <= channels, the other counts >= 1, bits >= 0. Throws Error
/// (not_finite, option) otherwise.
double latent_true_rate(double bits, Index kept, Index channels, Index tokens, Index grid_group);

/// T11 (the rule of AlignedKV, arXiv 2409.16546, with the thresholds that it supports): fp16 keys are read in
/// planes of {8, 4, 4} bits, and unread bits are filled with the middle of their range. E* =
/// `largest_exponent` = max over channels of e(q_j) + e(max |k_j|), where e is the unbiased exponent (-14 for
/// subnormals). A channel whose sum of exponents lies 4 or more below E* may be read at 12 bits, and one that
/// lies 8 or more below at 8 bits. Then |q_i (k_i - k_i')| < 2^(E* - 10), which is the most that fp16 rounds
/// the largest term by.
double aligned_term_bound(int largest_exponent);
/// T11: bound of |s - s'| for a score s = q.k / sqrt(head_dim) of which `truncated` channels were read in
/// that way. truncated >= 0, head_dim >= 1; throws Error (option) otherwise.
double aligned_score_bound(Index truncated, int largest_exponent, Index head_dim);

/// T13: bound of |s - s'| for a score s = scale q.k whose channel c is read to a cell of width read_step[c]
/// (step 2^(unread bits)): scale sum_c |q_c| read_step[c] / 2. Throws Error (shape) if the lengths differ.
double read_score_bound(const Eigen::Ref<const Eigen::VectorXd>& query,
                        const Eigen::Ref<const Eigen::VectorXd>& read_step, double scale);
/// T13, the certificate of an attention output: if no score is off by more than score_error, then
///
///     |o - o'|_2 <= 2 tanh(score_error / 2) radius + value_error,
///
/// where radius = max_t |v_t - c|_2 over the exact values v_t, for any vector c, and value_error =
/// sum_t p'_t |v_t - v'_t|_2. The bound is reached by two tokens whose unnormalised weights are
/// e^(score_error / 2) and e^(-score_error / 2). All arguments >= 0; throws Error (not_finite, option)
/// otherwise.
double output_error_bound(double score_error, double radius, double value_error);

/// T14: the most that rounding the factors adds to a sum of `count` products of a factor and a code of `bits`
/// bits. A factor is the query times a channel's step, or a softmax weight times a token's step. `largest` is
/// the largest magnitude of the factors. Where grids of keys are by token, the factors of a run of channels are
/// the query itself, and this comes times the token's step.
///
/// Codes count from their middle, so they are at most (2^bits - 1) / 2 in magnitude. Up to 4 bits, a factor
/// is rounded to 8 bits and is off by largest / 254 at most. Above 4 bits, it is rounded to two parts of 8
/// bits each, and the low part is not multiplied with the `bits_below` bits below the first plane. Throws
/// Error (option) for bits outside 1 to 8 and for negative arguments.
///
/// It holds for every `largest` with which the sum of count largest 2^bits, the largest there can be, is a
/// float; attention gives NaN to a query that may go beyond. Factors of 1e-30 and less all count as 0, so
/// that the sum is off by itself: count largest codes. What fp32 sums round is not in it.
double rounded_factors_error(int bits, int bits_below, Index count, double largest);

/// T15, plain codes: a key whose channels are rounded to grids of these steps has, at high rate, errors e
/// that are uniform in their cells and independent, so that
///
///     E[e^T C e] = sum_j C_jj steps_j^2 / 12.
///
/// With C = E[u u^T] that is the expected squared error of a score u.k. weight = C, symmetric; steps >= 0,
/// one for each channel. Throws Error (shape, not_finite, option) otherwise.
double plain_score_error(const Eigen::Ref<const MatrixD>& weight,
                         const Eigen::Ref<const Eigen::VectorXd>& steps);

/// T15, the order of the shaped encoding: channels by falling C_jj steps_j^2, equal ones by number. Throws as
/// plain_score_error.
std::vector<Index> shaping_order(const Eigen::Ref<const MatrixD>& weight,
                                 const Eigen::Ref<const Eigen::VectorXd>& steps);

/// T15: the pivots d_j [channel] of C = L D L^T, where L is unit triangular such that the error of a channel
/// takes up those of the channels before it in `order`. d_j is what is left of C_jj if the channels after j
/// make up for an error of j as well as they can. So d_j <= C_jj, and the product of all is det C whatever
/// the order. weight positive definite, order a permutation of its channels; throws Error (shape, not_finite,
/// option) otherwise.
Eigen::VectorXd shaping_pivots(const Eigen::Ref<const MatrixD>& weight, std::span<const Index> order);

/// T15, shaped codes: channels are coded in shaping_order, and each has the target x_j - sum_i L_ij e_i over
/// the channels i before it, with L from C + ridge tr(C) / channels I. Then e = L^-T r with r uniform in its
/// cells, so that at high rate and without clipping
///
///     E[e^T C e] = sum_j (L^-1 C L^-T)_jj steps_j^2 / 12,
///
/// which is sum_j d_j steps_j^2 / 12 without a ridge: never more than plain_score_error. With equal steps the
/// ratio of both is no less than shaping_limit. ridge >= 0; throws as plain_score_error and shaping_pivots.
double shaped_score_error(const Eigen::Ref<const MatrixD>& weight,
                          const Eigen::Ref<const Eigen::VectorXd>& steps, double ridge = 0);

/// T15, the least that any order can leave of plain_score_error if all steps are equal: the geometric mean of
/// C's eigenvalues over their arithmetic mean, (det C)^(1/n) / (tr C / n). It is reached where all d_j are
/// equal. Throws as shaping_pivots.
double shaping_limit(const Eigen::Ref<const MatrixD>& weight);

}  // namespace kvplane::theory

#if !defined(KVPLANE_COMPILED)
#include "kvplane/theory/impl/bounds.hpp"
#endif
