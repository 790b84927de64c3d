// kvplane/allocate/key_favored.hpp: more bits for keys than for values, layer by layer, from their norms.
//
// Quantize What Counts (arXiv 2502.15075): a uniform quantizer's squared error is about |M|_F^2 4^-b, and
// keys have the larger norm, so bits are best spent on them. Here this is one use of the allocator. Each
// layer makes two items, its keys and its values, weighted by their squared norms. Every option is a width
// with a group size. The budget is the average number of bits per element over all layers and COUNTS the
// grids:
//
//     keys    width + 32 / group_tokens                     one grid per channel and group of tokens
//     values  width + 32 * ceil(head_dim / group_channels) / head_dim    one per token and group of channels
//
// (A grid takes 32 bits: lower and step in fp16. It takes 16 if the scheme is symmetric, which stores only
// the step.)
//
//     std::vector<LayerProfile> layers;
//     for (...) layers.push_back(measure_layer(keys, values, options, heads));
//     const KeyFavoredAllocation bits = key_favored(layers, /*mean_bits=*/3.5, options);
//
// Which norms? Take those of the CACHED tensors, best with the error measured at every width and group size.
// Norms of the weights W_K and W_V are a fallback for when no tensor is at hand, and they mislead. Where keys
// are normalised after projection (Qwen3), |W_K| says nothing about |K|, and it is below |W_V| in nearly all
// layers of the authors' own table (theorem T4, theory::norm_disparity). Inputs whose channels differ in size
// and a bias on keys have the same effect to a lesser degree. The spectral norm orders keys before values
// nearly everywhere, but it predicts no error, because a quantizer's noise is spread over all directions, not
// along the largest one.
//
// What is minimised is the squared error of the tensors, in which keys count like values, as in the paper.
// Attention weighs them differently. Measured curves also see that values that are not rotated and have a
// grid per token quantize worse than keys with a grid per channel. On the shipped tensors such curves close
// more than half of the gap that the norms alone open. Measure values rotated if the cache rotates them.
// Scale LayerProfile::norms if more is known about what an error costs.
#pragma once

#include <cmath>
#include <span>
#include <vector>

#include "kvplane/allocate/bit_allocation.hpp"
#include "kvplane/allocate/distortion.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/grid.hpp"

namespace kvplane {

/// What is known of a layer without looking at its tensors.
struct LayerNorms {
    double key = 0;             ///< |K|_F of the cached keys, or of W_K
    double value = 0;           ///< |V|_F of the cached values, or of W_V
    double key_elements = 1;    ///< number of elements of the keys; only the ratio to other counts matters
    double value_elements = 1;  ///< the same for the values
    Index head_dim = 0;         ///< 0 if unknown; a value grid then counts as 32 / group_channels per element
};

/// Settings of key_favored and measure_layer. Both must be given the same ones.
struct KeyFavoredOptions {
    /// Widths in bits, in any order. Measured curves take integers from 0 (not stored at all) to 8. Analytic
    /// curves take any width that they are defined for; the published allocator's menu is
    /// {1, 1.58, 2, 4, 6, 8}.
    std::vector<double> widths = {1, 2, 3, 4, 5, 6, 7, 8};
    std::vector<Index> key_groups = {32, 64, 128};    ///< numbers of tokens that share a channel's grid
    std::vector<Index> value_groups = {32, 64, 128};  ///< numbers of channels that share a token's grid
    DistortionCurve curve = DistortionCurve::automatic;

    /// Whether the budget covers the grids. If false, it covers the widths alone, as in the published
    /// allocator. Group sizes are then free, and those of least error are taken.
    bool count_grids = true;

    Scheme scheme = Scheme::min_max;      ///< for widths of 3 bits and more
    Scheme narrow_scheme = Scheme::cell;  ///< for widths below 3 bits, where min_max wastes the range

    /// Analytic curves do not depend on the group size, so their distortion is multiplied by
    /// (group / 64)^group_exponent. The exponent was measured with min_max grids of 3 bits and more. It is
    /// .35 for Gaussian data. On the shipped tensors it is .38 to .44 for keys between 32 and 128 tokens and
    /// .5 to 1 for values between 16 and 64 channels.
    double group_exponent = 0.4;

    AllocationSettings allocation;
};

/// A layer with the relative squared error of its keys and of its values at every option. Both vectors are
/// [width][group], in the order of KeyFavoredOptions.
struct LayerProfile {
    LayerNorms norms;
    std::vector<double> key_distortion;
    std::vector<double> value_distortion;
};

/// |K|_F, |V|_F, the numbers of elements and the head_dim of one layer's cached tensors. Nothing is
/// quantized. keys and values are as for measure_layer. NaN and infinity pass here and are refused by
/// key_favored.
template <class Keys, class Values>
LayerNorms layer_norms(const Keys& keys, const Values& values, Index heads = 1);

/// Norms of the keys and values of one layer, and their relative squared error at every option of the menu:
/// |K - K'|_F^2 / |K|_F^2 with per_channel grids, |V - V'|_F^2 / |V|_F^2 with per_group grids. keys and
/// values are anything that per_channel and per_group take: matrices tokens x (heads * head_dim), dense,
/// strided or expressions, or tensors (heads, tokens, head_dim). Pass what would be cached: leave out the
/// sinks, which stay in fp16, and rotate the values if the cache rotates them. Throws Error: option (menus),
/// not_finite, beyond_fp16 and shape (tensors).
template <class Keys, class Values>
LayerProfile measure_layer(const Keys& keys, const Values& values, const KeyFavoredOptions& options = {},
                           Index heads = 1);

/// Widths in bits and group sizes of one layer.
struct LayerAllocation {
    double key_bits = 0;
    double value_bits = 0;
    Index key_group_tokens = 0;
    Index value_group_channels = 0;
};

struct KeyFavoredAllocation {
    std::vector<LayerAllocation> layers;
    double mean_width = 0;  ///< bits per element, grids not counted
    double mean_bits = 0;   ///< bits per element, grids counted: what it takes in memory
    double error = 0;       ///< predicted sum over layers of |K - K'|_F^2 + |V - V'|_F^2
};

/// Bits and group sizes for every layer that give the least total squared error at no more than `mean_bits`
/// bits per element, on average over the keys and values of all layers together (grids counted unless options
/// say otherwise). Throws Error: option (menus, a curve that the layers lack, a budget below the cheapest
/// choice), mismatch (a profile measured with another menu), not_finite.
KeyFavoredAllocation key_favored(std::span<const LayerProfile> layers, double mean_bits,
                                 const KeyFavoredOptions& options = {});

/// The same from norms alone, with an analytic curve.
KeyFavoredAllocation key_favored(std::span<const LayerNorms> layers, double mean_bits,
                                 const KeyFavoredOptions& options = {});

/// The allocator's view of the same problem: item 2 * layer is a layer's keys, 2 * layer + 1 its values;
/// option w * groups + g is widths[w] with group g. The budget that goes with it is mean_bits *
/// (elements of all items).
std::vector<AllocationItem> key_favored_items(std::span<const LayerProfile> layers,
                                              const KeyFavoredOptions& options = {});

/// The optimal split of 2 * mean_bits between the keys and values of one layer, in real bits (theorem T3):
/// mean_bits +- log2(|K|_F / |V|_F) / 2. If that makes one share negative, the other gets all bits.
struct KeyValueSplit {
    double key_bits = 0;
    double value_bits = 0;
};

/// Throws Error (not_finite, option): norms must be > 0, mean_bits >= 0.
KeyValueSplit closed_form_split(double key_norm, double value_norm, double mean_bits);

/// The second step of the published allocator, which chooses group sizes alone and leaves the widths aside.
/// It minimises sum |M|_F * group over the keys and values of all layers, with at most as many groups as if
/// all had the size `mean_group`: sum 1 / group <= 2 * layers / mean_group. (The published code takes the
/// norm itself here, but its square for the widths.) key_favored with grids counted chooses widths and groups
/// together and needs no second step.
struct GroupSizes {
    std::vector<Index> key_group_tokens;
    std::vector<Index> value_group_channels;
    double error = 0;               ///< sum |M|_F * group
    double groups_per_element = 0;  ///< average of 1 / group
};

/// Throws Error (not_finite, option).
GroupSizes published_group_sizes(std::span<const LayerNorms> layers, std::span<const Index> menu,
                                 double mean_group, const AllocationSettings& settings = {});

namespace detail::favored {

void require_options(const KeyFavoredOptions& options);

/// |rows|_F^2.
template <CacheScalar Scalar>
double squared_norm(const HeadRows<Scalar>& rows);

/// Relative squared error at every option.
template <CacheScalar Scalar>
std::vector<double> key_distortion(const HeadRows<Scalar>& keys, const KeyFavoredOptions& options);
template <CacheScalar Scalar>
std::vector<double> value_distortion(const HeadRows<Scalar>& values, const KeyFavoredOptions& options);

template <CacheScalar KeyScalar, CacheScalar ValueScalar>
LayerNorms norms_of(const HeadRows<KeyScalar>& keys, const HeadRows<ValueScalar>& values) {
    return {std::sqrt(squared_norm(keys)), std::sqrt(squared_norm(values)),
            static_cast<double>(keys.tokens() * keys.channels()),
            static_cast<double>(values.tokens() * values.channels()), values.head_dim()};
}

}  // namespace detail::favored

template <class Keys, class Values>
LayerNorms layer_norms(const Keys& keys, const Values& values, Index heads) {
    return detail::favored::norms_of(input_heads(keys, heads), input_heads(values, heads));
}

template <class Keys, class Values>
LayerProfile measure_layer(const Keys& keys, const Values& values, const KeyFavoredOptions& options,
                           Index heads) {
    detail::favored::require_options(options);
    const auto key_rows = input_heads(keys, heads);
    const auto value_rows = input_heads(values, heads);
    return {detail::favored::norms_of(key_rows, value_rows),
            detail::favored::key_distortion(key_rows, options),
            detail::favored::value_distortion(value_rows, options)};
}

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/allocate/impl/key_favored.hpp"
#endif
