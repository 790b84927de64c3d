// kvplane/allocate/impl/greedy.hpp: steps from one entry of a menu to another.
#pragma once

#include "kvplane/allocate/greedy.hpp"

#include <queue>

namespace kvplane::detail::allocation {

struct Step {
    double gain_per_bit;
    std::size_t item, target;
    bool operator<(const Step& other) const {  // for a max-heap; the lower item index first among equals
        return gain_per_bit != other.gain_per_bit ? gain_per_bit < other.gain_per_bit : item > other.item;
    }
};

/// The step of most gain per bit from `from` to a position below `end`. If there is none, target == from.
inline Step best_step(const Menu& menu, std::size_t item, std::size_t from, std::size_t end) {
    Step best{-1, item, from};
    for (std::size_t to = from + 1; to < end; ++to) {
        const double gain = (menu[from].error - menu[to].error) / (menu[to].cost - menu[from].cost);
        if (gain > best.gain_per_bit) best = {gain, item, to};
    }
    return best;
}

KVPLANE_FUNCTION Greedy greedy(const Problem& problem) {
    const std::size_t items = problem.menus.size();
    Greedy state{.positions = Positions(items, 0), .price = 0, .at_price = {}, .complete = true};
    Positions end(items);  // positions from here on are known not to fit
    std::priority_queue<Step> steps;
    const auto offer = [&](std::size_t i) {
        const Step step = best_step(problem.menus[i], i, state.positions[i], end[i]);
        if (step.target != state.positions[i]) steps.push(step);
    };
    for (std::size_t i = 0; i < items; ++i) {
        end[i] = problem.menus[i].size();
        offer(i);
    }
    double used = 0;
    while (!steps.empty()) {
        const Step step = steps.top();
        steps.pop();
        const Menu& menu = problem.menus[step.item];
        std::size_t& position = state.positions[step.item];
        const double cost = menu[step.target].cost - menu[position].cost;
        if (problem.fits(used + cost)) {
            used += cost;
            position = step.target;
        } else {
            if (state.complete) {
                state.complete = false;
                state.price = step.gain_per_bit;
                state.at_price = state.positions;
            }
            end[step.item] = step.target;
        }
        offer(step.item);
    }
    return state;
}

}  // namespace kvplane::detail::allocation
