// kvplane/allocate/impl/sensitivity.hpp: measured harms as a problem of the one allocator.
#pragma once

#include <algorithm>
#include <cmath>

#include "kvplane/allocate/sensitivity.hpp"
#include "kvplane/error.hpp"

namespace kvplane {

namespace detail::sensitivity {

/// what: "keys of layer 3", "falling_harms".
inline void require_option(const SensitivityOption& option, const std::string& what, std::size_t i) {
    require(std::isfinite(option.bits) && std::isfinite(option.harm), ErrorCode::not_finite, what,
            ": option ", i, " has ", option.bits, " bits and a harm of ", option.harm,
            ", expected finite numbers");
    require(option.bits >= 0.0 && option.harm >= 0.0, ErrorCode::option, what, ": option ", i, " has ",
            option.bits, " bits and a harm of ", option.harm, ", expected neither below 0");
}

inline void require_method(std::span<const SensitivityOption> options, const std::string& function) {
    require(!options.empty(), ErrorCode::option, function, ": no options, expected at least one");
    for (std::size_t i = 0; i < options.size(); ++i) {
        require_option(options[i], function, i);
        require(i == 0 || options[i].bits > options[i - 1].bits, ErrorCode::option, function, ": option ", i,
                " has ", options[i].bits, " bits after ", i == 0 ? 0.0 : options[i - 1].bits,
                ", expected ascending bits");
    }
}

inline double elements_of(std::span<const SensitivityPart> parts) {
    require(!parts.empty(), ErrorCode::option, "sensitivity: no parts, expected at least one");
    double elements = 0.0;
    for (const SensitivityPart& part : parts) {
        require(std::isfinite(part.elements), ErrorCode::not_finite, part.name, ": ", part.elements,
                " elements, expected a finite number");
        require(part.elements > 0.0, ErrorCode::option, part.name, ": ", part.elements,
                " elements, expected more than 0");
        require(!part.options.empty(), ErrorCode::option, part.name, ": no options, expected at least one");
        for (std::size_t i = 0; i < part.options.size(); ++i) require_option(part.options[i], part.name, i);
        elements += part.elements;
    }
    return elements;
}

}  // namespace detail::sensitivity

KVPLANE_FUNCTION std::vector<double> falling_harms(std::span<const SensitivityOption> options) {
    detail::sensitivity::require_method(options, "falling_harms");
    struct Pool {
        double sum;
        std::size_t count;
        double mean() const { return sum / static_cast<double>(count); }
    };
    std::vector<Pool> pools;
    for (const SensitivityOption& option : options) {
        pools.push_back({option.harm, 1});
        while (pools.size() > 1 && pools.back().mean() > pools[pools.size() - 2].mean()) {
            const Pool wider = pools.back();
            pools.pop_back();
            pools.back().sum += wider.sum;
            pools.back().count += wider.count;
        }
    }
    std::vector<double> harms;
    for (const Pool& pool : pools) harms.insert(harms.end(), pool.count, pool.mean());
    return harms;
}

KVPLANE_FUNCTION double harm_at(std::span<const SensitivityOption> measured, double bits) {
    detail::sensitivity::require_method(measured, "harm_at");
    require(std::isfinite(bits), ErrorCode::not_finite, "harm_at: ", bits, " bits, expected a finite number");
    require(bits >= 0.0, ErrorCode::option, "harm_at: ", bits, " bits, expected 0 or more");
    const auto beyond = [&](const SensitivityOption& nearest) {
        return nearest.harm * std::exp2(2.0 * (nearest.bits - bits));
    };
    const auto above = std::find_if(measured.begin(), measured.end(),
                                    [&](const SensitivityOption& option) { return option.bits >= bits; });
    if (above == measured.end()) return beyond(measured.back());
    if (above == measured.begin()) return beyond(*above);
    const SensitivityOption& below = *(above - 1);
    const double share = (bits - below.bits) / (above->bits - below.bits);
    if (below.harm == 0.0 || above->harm == 0.0) return std::lerp(below.harm, above->harm, share);
    return std::exp(std::lerp(std::log(below.harm), std::log(above->harm), share));
}

KVPLANE_FUNCTION SensitivityAllocation allocate_sensitivity(std::span<const SensitivityPart> parts,
                                                            double mean_bits,
                                                            const AllocationSettings& settings) {
    require(std::isfinite(mean_bits), ErrorCode::not_finite, "sensitivity: a budget of ", mean_bits,
            " bits, expected a finite number");
    const double elements = detail::sensitivity::elements_of(parts);
    // A tolerance as allocate() has: means of the cheapest choice need not come back exactly.
    const double cheapest = cheapest_mean_bits(parts);
    require(mean_bits >= cheapest * (1.0 - 1e-9), ErrorCode::option, "sensitivity: a budget of ", mean_bits,
            " bits an element, the cheapest choice takes ", cheapest);
    std::vector<AllocationItem> items;
    for (const SensitivityPart& part : parts) {
        AllocationItem item{1.0, part.elements / elements, {}};
        for (const SensitivityOption& option : part.options)
            item.options.push_back({option.bits, option.harm});
        items.push_back(std::move(item));
    }
    const Allocation best = allocate(items, std::max(mean_bits, cheapest), settings);
    return {best.choice, best.cost, best.error, best.price};
}

KVPLANE_FUNCTION double cheapest_mean_bits(std::span<const SensitivityPart> parts) {
    const double elements = detail::sensitivity::elements_of(parts);
    double bits = 0.0;
    for (const SensitivityPart& part : parts) {
        const auto least = std::min_element(part.options.begin(), part.options.end(),
                                            [](const auto& a, const auto& b) { return a.bits < b.bits; });
        bits += part.elements / elements * least->bits;
    }
    return bits;
}

}  // namespace kvplane
