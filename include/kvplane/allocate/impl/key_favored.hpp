// kvplane/allocate/impl/key_favored.hpp: from layers to the allocator's items, and back.
#pragma once

#include "kvplane/allocate/key_favored.hpp"

#include <algorithm>
#include <cstddef>

#include "kvplane/error.hpp"
#include "kvplane/storage/quantized.hpp"
#include "kvplane/theory/bounds.hpp"

namespace kvplane {

namespace detail::favored {

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

KVPLANE_FUNCTION void require_options(const KeyFavoredOptions& options) {
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

template <CacheScalar Scalar>
double squared_error(const HeadRows<Scalar>& rows, const Matrix& close) {
    double sum = 0;
    for (Index h = 0; h < rows.heads(); ++h) {
        const auto head = close.middleCols(h * rows.head_dim(), rows.head_dim());
        sum += (rows.head(h).template cast<double>() - head.template cast<double>()).squaredNorm();
    }
    return sum;
}

/// Relative squared error at every option, [width][group]. `granularity` decides whether groups are of tokens
/// or of channels.
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

template <CacheScalar Scalar>
std::vector<double> key_distortion(const HeadRows<Scalar>& keys, const KeyFavoredOptions& options) {
    return measure(keys, Granularity::per_channel, options.key_groups, options, "keys");
}

template <CacheScalar Scalar>
std::vector<double> value_distortion(const HeadRows<Scalar>& values, const KeyFavoredOptions& options) {
    return measure(values, Granularity::per_token, options.value_groups, options, "values");
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

/// What is known of one matrix of a layer, its keys or its values, before it becomes an item.
struct Side {
    double norm, elements;
    const std::vector<Index>& groups;
    const std::vector<double>& distortion;  ///< measured, or empty
    Index run;                              ///< consecutive elements that are cut into groups; 0: unlimited
};

inline double grids_per_element(const Side& side, Index group) {
    if (side.run == 0) return 1.0 / static_cast<double>(group);
    // A group may be any large number.
    return static_cast<double>((side.run - 1) / group + 1) / static_cast<double>(side.run);
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

KVPLANE_FUNCTION std::vector<AllocationItem> key_favored_items(std::span<const LayerProfile> layers,
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

KVPLANE_FUNCTION KeyFavoredAllocation key_favored(std::span<const LayerProfile> layers, double mean_bits,
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

KVPLANE_FUNCTION KeyFavoredAllocation key_favored(std::span<const LayerNorms> layers, double mean_bits,
                                                  const KeyFavoredOptions& options) {
    std::vector<LayerProfile> profiles;
    for (const LayerNorms& norms : layers) profiles.push_back({norms, {}, {}});
    return key_favored(profiles, mean_bits, options);
}

KVPLANE_FUNCTION KeyValueSplit closed_form_split(double key_norm, double value_norm, double mean_bits) {
    require(std::isfinite(mean_bits), ErrorCode::not_finite, "mean_bits: ", mean_bits,
            ", expected a finite number");
    require(mean_bits >= 0, ErrorCode::option, "mean_bits: ", mean_bits, ", expected 0 or more");
    const double half = theory::optimal_key_value_split(key_norm, value_norm) / 2;
    const double shift = std::clamp(half, -mean_bits, mean_bits);
    return {mean_bits + shift, mean_bits - shift};
}

KVPLANE_FUNCTION GroupSizes published_group_sizes(std::span<const LayerNorms> layers,
                                                  std::span<const Index> menu, double mean_group,
                                                  const AllocationSettings& settings) {
    require(std::isfinite(mean_group), ErrorCode::not_finite, "mean_group: ", mean_group,
            ", expected a finite number");
    require(mean_group > 0, ErrorCode::option, "mean_group: ", mean_group, ", expected more than 0");
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

#if defined(KVPLANE_COMPILED)
#define KVPLANE_INSTANTIATE(Scalar)                                                         \
    template double detail::favored::squared_norm(const HeadRows<Scalar>&);                 \
    template std::vector<double> detail::favored::key_distortion(const HeadRows<Scalar>&,   \
                                                                 const KeyFavoredOptions&); \
    template std::vector<double> detail::favored::value_distortion(const HeadRows<Scalar>&, \
                                                                   const KeyFavoredOptions&);
KVPLANE_INSTANTIATE(float)
KVPLANE_INSTANTIATE(Eigen::half)
KVPLANE_INSTANTIATE(Eigen::bfloat16)
#undef KVPLANE_INSTANTIATE
#endif

}  // namespace kvplane
