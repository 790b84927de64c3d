// kvplane/allocate/key_favored.hpp: more bits for keys than for values, layer by layer, from their norms.
//
// Quantize What Counts (arXiv 2502.15075): a uniform quantizer's squared error is about |M|_F^2 4^-b, keys
// have the larger norm, so bits are best spent on them. Here that is one use of the allocator: two items a
// layer, its keys and its values, weighted by their squared norms; every option is a width with a group size;
// the budget is the mean number of bits per element over all layers and COUNTS the grids:
//
//     keys    width + 32 / group_tokens                        one grid a channel and group of tokens
//     values  width + 32 * ceil(head_dim / group_channels) / head_dim       one a token and group of channels
//
// (32 bits: lower and step in fp16; 16 where the scheme is symmetric and stores a step only).
//
//     std::vector<LayerProfile> layers;
//     for (...) layers.push_back(measure_layer(keys, values, options, heads));
//     const KeyFavoredAllocation bits = key_favored(layers, /*mean_bits=*/3.5, options);
//
// Which norms. Those of the CACHED tensors, best with the error measured at every width and group size. Norms
// of the weights W_K and W_V are a fallback for when no tensor is at hand, and they mislead: where keys are
// normalised after projection (Qwen3) |W_K| says nothing of |K|, and is below |W_V| in nearly all layers of
// the authors' own table (theorem T4, theory::norm_disparity); inputs whose channels differ in size, and a
// bias on keys, do the same to a lesser degree. The spectral norm orders keys before values nearly
// everywhere, but it predicts no error: a quantizer's noise is spread over all directions, not along the
// largest one.
//
// What is minimised is the squared error of the tensors, a key's counting like a value's, as in the paper.
// Attention weighs them otherwise, and measured curves also see that values, unrotated and per token,
// quantize worse than keys per channel: on the shipped tensors they close more than half of the gap that the
// norms alone open. Measure values rotated where the cache rotates them, and scale LayerProfile::norms where
// more is known of what an error costs.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "kvplane/allocate/bit_allocation.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/storage/quantized.hpp"
#include "kvplane/theory/bounds.hpp"

namespace kvplane {

/// Relative squared error as a function of the width.
enum class DistortionCurve : std::uint8_t {
    automatic,           ///< measured where the layers were measured, four_to_minus_bits otherwise
    measured,            ///< what this library's quantizer makes of the tensors: see measure_layer
    four_to_minus_bits,  ///< 4^-b, the law of arXiv 2502.15075; any width
    uniform_gaussian,  ///< the uniform quantizer of least error for a unit Gaussian; see gaussian_distortion
    lloyd_max_gaussian,  ///< the Lloyd-Max quantizer of a unit Gaussian; see gaussian_distortion
};

/// The distortion of an analytic curve at one width, 1 at width 0. The two Gaussian curves are the mean
/// squared errors of the best quantizers of 2^width levels for a Gaussian of variance 1 (J. Max, Quantizing
/// for minimum distortion, IRE Trans. Inf. Theory 6, 1960, tables I and II; recomputed here to ten digits, of
/// which Max's fourth to sixth differ: .009497 there is .009501), for widths 0, 1, 2, ... 8 and 1.58 (three
/// levels). Throws Error (not_finite, option) for a negative width, one that the table lacks, and the curves
/// `automatic` and `measured`, which are none.
double analytic_distortion(DistortionCurve curve, double width);

/// What is known of a layer without looking at its tensors.
struct LayerNorms {
    double key = 0;             ///< |K|_F of the cached keys, or of W_K
    double value = 0;           ///< |V|_F of the cached values, or of W_V
    double key_elements = 1;    ///< elements that a bit of width costs a bit each: only their ratios count
    double value_elements = 1;  ///< likewise
    Index head_dim = 0;         ///< 0: unknown, a value grid then counts as 32 / group_channels per element
};

/// Settings of key_favored and measure_layer, which must be given the same ones.
struct KeyFavoredOptions {
    /// Widths in bits, in any order. Measured: integers 0 (not stored at all) to 8. Otherwise any that the
    /// curve knows; the published allocator's menu is {1, 1.58, 2, 4, 6, 8}.
    std::vector<double> widths = {1, 2, 3, 4, 5, 6, 7, 8};
    std::vector<Index> key_groups = {32, 64, 128};    ///< tokens that share a grid of a channel
    std::vector<Index> value_groups = {32, 64, 128};  ///< channels that share a grid of a token
    DistortionCurve curve = DistortionCurve::automatic;

    /// False: the budget covers the widths alone, as in the published allocator. Group sizes are then free,
    /// and the ones of least error are taken.
    bool count_grids = true;

    Scheme scheme = Scheme::min_max;      ///< of widths of 3 bits and more
    Scheme narrow_scheme = Scheme::cell;  ///< of widths below 3 bits, where min_max wastes the range

    /// Analytic curves know no groups; their distortion is multiplied by (group / 64)^group_exponent.
    /// Measured with min_max grids of 3 bits and more: .35 for Gaussian data; on the shipped tensors .38 to
    /// .44 for keys between 32 and 128 tokens, .5 to 1 for values between 16 and 64 channels.
    double group_exponent = 0.4;

    AllocationSettings allocation;
};

/// A layer with the relative squared error of its keys and values at every option: widths x groups, the group
/// running fastest, in the order of KeyFavoredOptions.
struct LayerProfile {
    LayerNorms norms;
    std::vector<double> key_distortion;
    std::vector<double> value_distortion;
};

/// |K|_F, |V|_F, the numbers of elements and the head_dim of one layer's cached tensors; no quantization.
/// keys and values are as for measure_layer. NaN and infinity pass here and are refused by key_favored.
template <class Keys, class Values>
LayerNorms layer_norms(const Keys& keys, const Values& values, Index heads = 1);

/// Norms of the keys and values of one layer, and what quantizing them at every option of the menu does to
/// them: |K - K'|_F^2 / |K|_F^2 with per_channel grids, |V - V'|_F^2 / |V|_F^2 with per_group grids. keys and
/// values are anything those take: matrices tokens x (heads * head_dim), dense, strided or expressions, or
/// tensors (heads, tokens, head_dim). Give what would be cached: without the sinks that stay in fp16, values
/// rotated if the cache rotates them. Throws Error: option (menus), not_finite, beyond_fp16 and shape
/// (tensors).
template <class Keys, class Values>
LayerProfile measure_layer(const Keys& keys, const Values& values, const KeyFavoredOptions& options = {},
                           Index heads = 1);

/// What one layer gets.
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

/// Bits and group sizes for every layer, of least total squared error, under a mean of `mean_bits` bits per
/// element over the keys and values of all layers together (grids counted unless options say otherwise).
/// Throws Error: option (menus, a curve the layers lack, a budget below the cheapest choice), mismatch (a
/// profile measured with another menu), not_finite.
KeyFavoredAllocation key_favored(std::span<const LayerProfile> layers, double mean_bits,
                                 const KeyFavoredOptions& options = {});

/// The same from norms alone, with an analytic curve.
KeyFavoredAllocation key_favored(std::span<const LayerNorms> layers, double mean_bits,
                                 const KeyFavoredOptions& options = {});

/// The allocator's view of the same problem: item 2 * layer is a layer's keys, 2 * layer + 1 its values;
/// option w * groups + g is widths[w] with group g. For a budget of mean_bits * (elements of all items).
std::vector<AllocationItem> key_favored_items(std::span<const LayerProfile> layers,
                                              const KeyFavoredOptions& options = {});

/// The optimal split of 2 * mean_bits between the keys and values of one layer, in real bits (theorem T3):
/// mean_bits +- log2(|K|_F / |V|_F) / 2, and all bits to the larger where the other's share would be
/// negative.
struct KeyValueSplit {
    double key_bits = 0;
    double value_bits = 0;
};

/// Throws Error (not_finite, option): norms must be > 0, mean_bits >= 0.
KeyValueSplit closed_form_split(double key_norm, double value_norm, double mean_bits);

/// The second step of the published allocator: group sizes alone, widths left aside. Minimises sum |M|_F *
/// group over the keys and values of all layers, with as many groups as if all had the size `mean_group`: sum
/// 1 / group
/// <= 2 * layers / mean_group. (The published code takes the norm itself here, and its square for the
/// widths.) key_favored with grids counted chooses widths and groups together and needs no second step.
struct GroupSizes {
    std::vector<Index> key_group_tokens;
    std::vector<Index> value_group_channels;
    double error = 0;               ///< sum |M|_F * group
    double groups_per_element = 0;  ///< mean of 1 / group
};

/// Throws Error (not_finite, option).
GroupSizes published_group_sizes(std::span<const LayerNorms> layers, std::span<const Index> menu,
                                 double mean_group, const AllocationSettings& settings = {});

// Implementation.

namespace detail::favored {

// Distortion of the best quantizers of a unit Gaussian; index: width in bits.
// tests/allocate/key_favored_test.cpp computes both again.
inline constexpr std::array<double, 9> uniform_table = {1,
                                                        0.3633802276324,
                                                        0.1188460503841,
                                                        0.03743965939152,
                                                        0.01154288443135,
                                                        0.003495211361506,
                                                        0.001040045408792,
                                                        0.000304332770824,
                                                        0.00008768618578399};
inline constexpr std::array<double, 9> lloyd_max_table = {1,
                                                          0.3633802276324,
                                                          0.1174818478293,
                                                          0.0345477607885,
                                                          0.009501008008192,
                                                          0.002504668355675,
                                                          0.0006442396653171,
                                                          0.0001634782299804,
                                                          0.00004118508286698};
inline constexpr double three_levels = 0.1901740392479;  // the same for both: three levels are always uniform

/// Which table entry a width is; -1 for none, 9 for three levels.
inline int table_index(double width) {
    if (std::abs(width - std::log2(3.0)) < 0.006) return 9;  // 1.58 and 1.585 are written for it
    const double rounded = std::round(width);
    return width == rounded && rounded <= 8 ? static_cast<int>(rounded) : -1;
}

inline Scheme scheme_of(double width, const KeyFavoredOptions& options) {
    return width < 3 ? options.narrow_scheme : options.scheme;
}

/// Bits per element that the grids of an option take; an option of width 0 stores none.
inline double grid_bits(double width, double grids_per_element, const KeyFavoredOptions& options) {
    const GridRule rule{Granularity::per_channel, 1, scheme_of(width, options), Clip::none};
    return width == 0 ? 0 : 8.0 * static_cast<double>(rule.bytes_per_grid()) * grids_per_element;
}

inline void require_groups(const std::vector<Index>& groups, const char* what) {
    require(!groups.empty(), ErrorCode::option, what, ": empty, expected at least one group size");
    for (const Index group : groups)
        require(group >= 1, ErrorCode::option, what, ": ", group, ", expected at least 1");
}

inline void require_options(const KeyFavoredOptions& options) {
    require(!options.widths.empty(), ErrorCode::option, "widths: empty, expected at least one");
    for (const double width : options.widths) {
        require(std::isfinite(width), ErrorCode::not_finite, "widths: ", width, ", expected a finite number");
        require(width >= 0, ErrorCode::option, "widths: ", width, ", expected 0 or more");
    }
    require_groups(options.key_groups, "key_groups");
    require_groups(options.value_groups, "value_groups");
    require(std::isfinite(options.group_exponent), ErrorCode::not_finite,
            "group_exponent: ", options.group_exponent, ", expected a finite number");
    // An option's index means the same for keys and values only if the menus are equally long.
    require(options.allocation.method != AllocationMethod::uniform ||
                options.key_groups.size() == options.value_groups.size(),
            ErrorCode::option, "value_groups: ", options.value_groups.size(),
            " sizes, key_groups: ", options.key_groups.size(),
            ", expected as many of both for the uniform method");
}

inline int measurable_width(double width) {
    require(width == std::round(width) && width >= 0 && width <= 8, ErrorCode::option, "widths: ", width,
            " cannot be measured, expected an integer from 0 to 8 (or an analytic curve)");
    return static_cast<int>(width);
}

template <CacheScalar Scalar>
double squared_norm(const HeadRows<Scalar>& rows) {
    double sum = 0;
    for (Index h = 0; h < rows.heads(); ++h) sum += rows.head(h).template cast<double>().squaredNorm();
    return sum;
}

template <CacheScalar KeyScalar, CacheScalar ValueScalar>
LayerNorms norms_of(const HeadRows<KeyScalar>& keys, const HeadRows<ValueScalar>& values) {
    return {std::sqrt(squared_norm(keys)), std::sqrt(squared_norm(values)),
            static_cast<double>(keys.tokens() * keys.channels()),
            static_cast<double>(values.tokens() * values.channels()), values.head_dim()};
}

template <CacheScalar Scalar>
double squared_error(const HeadRows<Scalar>& rows, const Matrix& close) {
    double sum = 0;
    for (Index h = 0; h < rows.heads(); ++h) {
        const auto head = close.middleCols(h * rows.head_dim(), rows.head_dim());
        sum += (rows.head(h).template cast<double>() - head.template cast<double>()).squaredNorm();
    }
    return sum;
}

/// Relative squared error at every option. Granularity decides what the groups count.
template <CacheScalar Scalar>
std::vector<double> measure(const HeadRows<Scalar>& rows, Granularity granularity,
                            const std::vector<Index>& groups, const KeyFavoredOptions& options,
                            const char* argument) {
    const double norm = squared_norm(rows);
    std::vector<double> distortion;
    for (const double width : options.widths) {
        const int bits = measurable_width(width);
        for (const Index group : groups) {
            double error = norm;  // what is not stored is lost
            if (bits > 0) {
                const GridRule rule{granularity, group, scheme_of(width, options), Clip::none};
                error = squared_error(rows, kvplane::quantize(rows, rule, bits, argument).dequantize());
            }
            distortion.push_back(norm > 0 ? error / norm : 0.0);
        }
    }
    return distortion;
}

inline bool measured(const LayerProfile& layer) {
    return !layer.key_distortion.empty() || !layer.value_distortion.empty();
}

inline bool use_measured(std::span<const LayerProfile> layers, DistortionCurve curve) {
    std::size_t count = 0;
    for (const LayerProfile& layer : layers) count += measured(layer) ? 1 : 0;
    if (curve == DistortionCurve::automatic) {
        require(count == 0 || count == layers.size(), ErrorCode::mismatch, count, " of ", layers.size(),
                " layers are measured, expected all or none");
        return count > 0;
    }
    require(curve != DistortionCurve::measured || count == layers.size(), ErrorCode::option,
            "curve: measured, but ", count, " of ", layers.size(),
            " layers are; expected measure_layer for each, or an analytic curve");
    return curve == DistortionCurve::measured;
}

/// How one matrix of a layer becomes an item.
struct Side {
    double norm, elements;
    const std::vector<Index>& groups;
    const std::vector<double>& distortion;  ///< measured, or empty
    Index run;                              ///< elements in a row that are cut into groups; 0: unlimited
};

inline double grids_per_element(const Side& side, Index group) {
    if (side.run == 0) return 1.0 / static_cast<double>(group);
    return static_cast<double>((side.run + group - 1) / group) / static_cast<double>(side.run);
}

inline double grouped_distortion(DistortionCurve curve, double width, Index group, double exponent) {
    const double at_64 = analytic_distortion(curve, width);
    return width == 0 ? at_64 : at_64 * std::pow(static_cast<double>(group) / 64, exponent);
}

inline AllocationItem make_item(const Side& side, DistortionCurve curve, const KeyFavoredOptions& options,
                                std::size_t layer) {
    const std::size_t expected = options.widths.size() * side.groups.size();
    const bool measured = curve == DistortionCurve::measured;
    require(!measured || side.distortion.size() == expected, ErrorCode::mismatch, "layer ", layer,
            ": measured at ", side.distortion.size(), " options, expected the ", expected, " of this menu");
    require(!(side.norm < 0), ErrorCode::option, "norm of layer ", layer, ": ", side.norm,
            ", expected 0 or more");
    AllocationItem item{side.norm * side.norm, side.elements, {}};
    for (const double width : options.widths) {
        for (const Index group : side.groups) {
            const double grids =
                options.count_grids ? grid_bits(width, grids_per_element(side, group), options) : 0;
            const double distortion = measured
                                          ? side.distortion[item.options.size()]
                                          : grouped_distortion(curve, width, group, options.group_exponent);
            item.options.push_back({width + grids, distortion});
        }
    }
    return item;
}

inline double total_elements(std::span<const LayerProfile> layers) {
    double sum = 0;
    for (const LayerProfile& layer : layers) sum += layer.norms.key_elements + layer.norms.value_elements;
    return sum;
}

/// Bits per element of a choice, with or without the grids.
inline double mean_cost(std::span<const LayerProfile> layers, const Allocation& chosen,
                        KeyFavoredOptions options, bool count_grids) {
    options.count_grids = count_grids;
    const double elements = total_elements(layers);
    return elements > 0
               ? evaluate_allocation(key_favored_items(layers, options), chosen.choice).cost / elements
               : 0;
}

}  // namespace detail::favored

inline double analytic_distortion(DistortionCurve curve, double width) {
    require(std::isfinite(width), ErrorCode::not_finite, "width: ", width, ", expected a finite number");
    require(width >= 0, ErrorCode::option, "width: ", width, ", expected 0 or more");
    if (curve == DistortionCurve::four_to_minus_bits) return std::exp2(-2 * width);
    const bool uniform = curve == DistortionCurve::uniform_gaussian;
    require(uniform || curve == DistortionCurve::lloyd_max_gaussian, ErrorCode::option,
            "curve: ", static_cast<int>(curve), ", expected an analytic one");
    const int index = detail::favored::table_index(width);
    require(index >= 0, ErrorCode::option, "width: ", width,
            " is not in the table, expected an integer from 0 to 8, or 1.58");
    if (index == 9) return detail::favored::three_levels;
    const auto& table = uniform ? detail::favored::uniform_table : detail::favored::lloyd_max_table;
    return table[static_cast<std::size_t>(index)];
}

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
    LayerProfile layer{detail::favored::norms_of(key_rows, value_rows), {}, {}};
    layer.key_distortion =
        detail::favored::measure(key_rows, Granularity::per_channel, options.key_groups, options, "keys");
    layer.value_distortion =
        detail::favored::measure(value_rows, Granularity::per_token, options.value_groups, options, "values");
    return layer;
}

inline std::vector<AllocationItem> key_favored_items(std::span<const LayerProfile> layers,
                                                     const KeyFavoredOptions& options) {
    detail::favored::require_options(options);
    DistortionCurve curve = options.curve;
    if (detail::favored::use_measured(layers, curve))
        curve = DistortionCurve::measured;
    else if (curve == DistortionCurve::automatic)
        curve = DistortionCurve::four_to_minus_bits;
    std::vector<AllocationItem> items;
    for (std::size_t l = 0; l < layers.size(); ++l) {
        const LayerNorms& n = layers[l].norms;
        const detail::favored::Side keys{n.key, n.key_elements, options.key_groups, layers[l].key_distortion,
                                         0};
        const detail::favored::Side values{n.value, n.value_elements, options.value_groups,
                                           layers[l].value_distortion, n.head_dim};
        items.push_back(detail::favored::make_item(keys, curve, options, l));
        items.push_back(detail::favored::make_item(values, curve, options, l));
    }
    return items;
}

inline KeyFavoredAllocation key_favored(std::span<const LayerProfile> layers, double mean_bits,
                                        const KeyFavoredOptions& options) {
    require(std::isfinite(mean_bits), ErrorCode::not_finite, "mean_bits: ", mean_bits,
            ", expected a finite number");
    const std::vector<AllocationItem> items = key_favored_items(layers, options);
    const double elements = detail::favored::total_elements(layers);
    if (elements > 0) {
        const double least = cheapest_cost(items) / elements;
        require(least <= mean_bits * (1 + 1e-9), ErrorCode::option, "mean_bits: ", mean_bits,
                ", but the cheapest menu entries come to ", least,
                " bits per element, expected at least that");
    }
    const Allocation chosen = allocate(items, mean_bits * elements, options.allocation);

    KeyFavoredAllocation result;
    result.mean_width = detail::favored::mean_cost(layers, chosen, options, false);
    result.mean_bits = detail::favored::mean_cost(layers, chosen, options, true);
    result.error = chosen.error;
    const std::size_t key_groups = options.key_groups.size(), value_groups = options.value_groups.size();
    for (std::size_t l = 0; l < layers.size(); ++l) {
        const std::size_t key = chosen.choice[2 * l], value = chosen.choice[2 * l + 1];
        result.layers.push_back({options.widths[key / key_groups], options.widths[value / value_groups],
                                 options.key_groups[key % key_groups],
                                 options.value_groups[value % value_groups]});
    }
    return result;
}

inline KeyFavoredAllocation key_favored(std::span<const LayerNorms> layers, double mean_bits,
                                        const KeyFavoredOptions& options) {
    std::vector<LayerProfile> profiles;
    for (const LayerNorms& norms : layers) profiles.push_back({norms, {}, {}});
    return key_favored(profiles, mean_bits, options);
}

inline KeyValueSplit closed_form_split(double key_norm, double value_norm, double mean_bits) {
    theory::detail::require_not_negative(mean_bits, "mean_bits");
    const double half = theory::optimal_key_value_split(key_norm, value_norm) / 2;
    const double shift = std::clamp(half, -mean_bits, mean_bits);
    return {mean_bits + shift, mean_bits - shift};
}

inline GroupSizes published_group_sizes(std::span<const LayerNorms> layers, std::span<const Index> menu,
                                        double mean_group, const AllocationSettings& settings) {
    theory::detail::require_positive(mean_group, "mean_group");
    std::vector<AllocationOption> options;
    for (const Index group : menu) {
        require(group >= 1, ErrorCode::option, "menu: ", group, ", expected at least 1");
        options.push_back({1 / static_cast<double>(group), static_cast<double>(group)});
    }
    std::vector<AllocationItem> items;
    for (const LayerNorms& norms : layers) {
        items.push_back({norms.key, 1, options});
        items.push_back({norms.value, 1, options});
    }
    const double matrices = static_cast<double>(items.size());
    const Allocation chosen = allocate(items, matrices / mean_group, settings);
    GroupSizes result;
    for (std::size_t l = 0; l < layers.size(); ++l) {
        result.key_group_tokens.push_back(menu[chosen.choice[2 * l]]);
        result.value_group_channels.push_back(menu[chosen.choice[2 * l + 1]]);
    }
    result.error = chosen.error;
    result.groups_per_element = items.empty() ? 0 : chosen.cost / matrices;
    return result;
}

}  // namespace kvplane
