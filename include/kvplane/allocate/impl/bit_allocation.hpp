// kvplane/allocate/impl/bit_allocation.hpp: checks, the uniform method, and the choice among the methods.
#pragma once

#include "kvplane/allocate/bit_allocation.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvplane/allocate/exact.hpp"
#include "kvplane/allocate/greedy.hpp"
#include "kvplane/error.hpp"

namespace kvplane {

namespace detail::allocation {

inline void require_number(double value, const char* what, std::size_t item) {
    require(std::isfinite(value), ErrorCode::not_finite, what, " of item ", item, ": ", value,
            ", expected a finite number");
    require(value >= 0, ErrorCode::option, what, " of item ", item, ": ", value, ", expected 0 or more");
}

inline void require_item(const AllocationItem& item, std::size_t index) {
    require_number(item.weight, "weight", index);
    require_number(item.count, "count", index);
    require(!item.options.empty(), ErrorCode::option, "item ", index,
            " has no options, expected at least one");
    for (const AllocationOption& option : item.options) {
        require_number(option.cost, "cost", index);
        require_number(option.distortion, "distortion", index);
        require_number(item.count * option.cost, "count * cost", index);
        require_number(item.weight * option.distortion, "weight * distortion", index);
    }
}

inline void require_finite_totals(std::span<const AllocationItem> items) {
    double cost = 0, error = 0;
    for (const AllocationItem& item : items) {
        double most_cost = 0, most_error = 0;
        for (const AllocationOption& option : item.options) {
            most_cost = std::max(most_cost, item.count * option.cost);
            most_error = std::max(most_error, item.weight * option.distortion);
        }
        cost += most_cost;
        error += most_error;
    }
    require(std::isfinite(cost) && std::isfinite(error), ErrorCode::not_finite, "the sum of costs (", cost,
            ") or of errors (", error, ") overflows, expected finite sums");
}

inline double cheapest(const AllocationItem& item) {
    double cost = std::numeric_limits<double>::infinity();
    for (const AllocationOption& option : item.options) cost = std::min(cost, option.cost);
    return item.count * cost;
}

inline Menu efficient_menu(const AllocationItem& item) {
    const double base = cheapest(item);
    Menu all;
    for (std::size_t o = 0; o < item.options.size(); ++o) {
        const double cost = std::max(0.0, item.count * item.options[o].cost - base);
        all.push_back({cost, item.weight * item.options[o].distortion, o});
    }
    std::stable_sort(all.begin(), all.end(), [](const Choice& a, const Choice& b) {
        return a.cost != b.cost ? a.cost < b.cost : a.error < b.error;
    });
    Menu menu;
    for (const Choice& choice : all) {
        if (!menu.empty() && choice.error >= menu.back().error) continue;
        // Costs that differ only by rounding count as equal.
        const bool same_cost =
            !menu.empty() && choice.cost - menu.back().cost <= 1e-12 * (base + choice.cost);
        if (same_cost)
            menu.back() = {menu.back().cost, choice.error, choice.option};
        else
            menu.push_back(choice);
    }
    return menu;
}

inline void require_finite_gains(const Menu& menu, std::size_t item) {
    for (std::size_t p = 1; p < menu.size(); ++p) {
        const double gain = (menu[p - 1].error - menu[p].error) / (menu[p].cost - menu[p - 1].cost);
        require(std::isfinite(gain), ErrorCode::not_finite, "item ", item, ": options ",
                menu[p].cost - menu[p - 1].cost, " bits apart differ in error by ",
                menu[p - 1].error - menu[p].error, ", expected a finite gain per bit");
    }
}

inline Problem make_problem(std::span<const AllocationItem> items, double budget) {
    Problem problem;
    problem.menus.reserve(items.size());
    double base = 0;
    for (const AllocationItem& item : items) {
        problem.menus.push_back(efficient_menu(item));
        require_finite_gains(problem.menus.back(), problem.menus.size() - 1);
        base += cheapest(item);
    }
    problem.slack = 1e-9 * budget;
    require(base <= budget + problem.slack, ErrorCode::option, "budget: ", budget,
            " bits, but the cheapest choice costs ", base, " bits, expected at least that");
    problem.room = std::max(0.0, budget - base);
    return problem;
}

inline Allocation to_allocation(std::span<const AllocationItem> items, const Problem& problem,
                                const Positions& positions, double price) {
    std::vector<std::size_t> choice(items.size());
    for (std::size_t i = 0; i < items.size(); ++i) choice[i] = problem.menus[i][positions[i]].option;
    Allocation result = evaluate_allocation(items, choice);
    result.price = price;
    return result;
}

inline const Allocation& better(const Allocation& a, const Allocation& b) {
    return b.error < a.error ? b : a;
}

inline std::size_t common_options(std::span<const AllocationItem> items) {
    std::size_t common = std::numeric_limits<std::size_t>::max();
    for (const AllocationItem& item : items) common = std::min(common, item.options.size());
    return items.empty() ? 0 : common;
}

/// The best common option that fits; an empty choice where none does.
inline Allocation best_uniform(std::span<const AllocationItem> items, double budget) {
    Allocation best;
    std::vector<std::size_t> choice(items.size());
    for (std::size_t option = 0; option < common_options(items); ++option) {
        std::fill(choice.begin(), choice.end(), option);
        const Allocation candidate = evaluate_allocation(items, choice);
        if (candidate.cost > budget * (1 + 1e-9)) continue;
        const bool first = best.choice.empty(), equal = candidate.error == best.error;
        if (first || candidate.error < best.error || (equal && candidate.cost < best.cost)) best = candidate;
    }
    return best;
}

inline double least_uniform_cost(std::span<const AllocationItem> items) {
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t option = 0; option < common_options(items); ++option)
        least =
            std::min(least, evaluate_allocation(items, std::vector<std::size_t>(items.size(), option)).cost);
    return least;
}

inline Allocation uniform_allocation(std::span<const AllocationItem> items, double budget) {
    const Allocation best = best_uniform(items, budget);
    require(items.empty() || !best.choice.empty(), ErrorCode::option, "budget: ", budget,
            " bits, but the cheapest option common to all items costs ", least_uniform_cost(items),
            " bits, expected at least that");
    return best;
}

/// The better of two allocations: what the steps of `state` reached, and one option for all items.
inline Allocation greedy_allocation(std::span<const AllocationItem> items, double budget,
                                    const Problem& problem, const Greedy& state) {
    const Allocation by_steps = to_allocation(items, problem, state.positions, state.price);
    Allocation by_one = best_uniform(items, budget);
    if (by_one.choice.size() != items.size()) return by_steps;
    by_one.price = state.price;
    return better(by_steps, by_one);
}

inline Allocation exact_allocation(std::span<const AllocationItem> items, double budget,
                                   const AllocationSettings& settings) {
    const Problem problem = make_problem(items, budget);
    const Greedy state = greedy(problem);
    const Allocation known = greedy_allocation(items, budget, problem, state);
    if (state.complete) return known;
    const Positions positions = exact_positions(problem, state, settings.max_states);
    return better(known, to_allocation(items, problem, positions, state.price));
}

}  // namespace detail::allocation

KVPLANE_FUNCTION Allocation allocate(std::span<const AllocationItem> items, double budget,
                                     const AllocationSettings& settings) {
    for (std::size_t i = 0; i < items.size(); ++i) detail::allocation::require_item(items[i], i);
    detail::allocation::require_finite_totals(items);
    require(std::isfinite(budget), ErrorCode::not_finite, "budget: ", budget,
            ", expected a finite number of bits");
    require(settings.max_states <= std::numeric_limits<std::uint32_t>::max(), ErrorCode::option,
            "max_states: ", settings.max_states, ", expected at most 4294967295");
    switch (settings.method) {
        case AllocationMethod::exact:
            return detail::allocation::exact_allocation(items, budget, settings);
        case AllocationMethod::greedy: {
            const auto problem = detail::allocation::make_problem(items, budget);
            return detail::allocation::greedy_allocation(items, budget, problem,
                                                         detail::allocation::greedy(problem));
        }
        case AllocationMethod::uniform:
            return detail::allocation::uniform_allocation(items, budget);
    }
    fail(ErrorCode::option, "method: ", static_cast<int>(settings.method),
         ", expected exact, greedy or uniform");
}

KVPLANE_FUNCTION double cheapest_cost(std::span<const AllocationItem> items) {
    double cost = 0;
    for (std::size_t i = 0; i < items.size(); ++i) {
        detail::allocation::require_item(items[i], i);
        cost += detail::allocation::cheapest(items[i]);
    }
    return cost;
}

KVPLANE_FUNCTION Allocation evaluate_allocation(std::span<const AllocationItem> items,
                                                std::span<const std::size_t> choice) {
    require(choice.size() == items.size(), ErrorCode::shape, "choice: ", choice.size(), " entries for ",
            items.size(), " items, expected one for each");
    Allocation result;
    result.choice.assign(choice.begin(), choice.end());
    for (std::size_t i = 0; i < items.size(); ++i) {
        require(choice[i] < items[i].options.size(), ErrorCode::index, "choice of item ", i, ": ", choice[i],
                ", expected below its ", items[i].options.size(), " options");
        const AllocationOption& option = items[i].options[choice[i]];
        result.cost += items[i].count * option.cost;
        result.error += items[i].weight * option.distortion;
    }
    return result;
}

}  // namespace kvplane
