// kvplane/allocate/greedy.hpp: the allocator's problem as its methods see it, and the greedy method.
//
// Greedy takes steps along the convex hulls of the items' curves, best gain per bit first. A step that does
// not fit is replaced by the best shorter step of the same item, which gains less per bit, so the steps tried
// have falling gain per bit. That makes the error monotone in the budget: at the first step that a larger
// budget takes and a smaller one cannot, all that the smaller one still gains is at this gain per bit or
// less, on fewer bits than the step costs, and thus less than the step gains.
#pragma once

#include <cstddef>
#include <vector>

#include "kvplane/compiled.hpp"

namespace kvplane::detail::allocation {

/// An option in the units of the problem: cost beyond the item's cheapest option, and weighted error.
struct Choice {
    double cost, error;
    std::size_t option;
};

/// An item's efficient options: ascending cost, strictly falling error. The first one costs 0.
using Menu = std::vector<Choice>;

/// The problem as the methods see it: what is left to spend beyond the cheapest choice.
struct Problem {
    std::vector<Menu> menus;
    double room = 0;   ///< budget less the cheapest choice, not negative
    double slack = 0;  ///< by how much a sum of costs may pass `room`

    bool fits(double cost) const { return cost <= room + slack; }
};

/// By item a position in its menu.
using Positions = std::vector<std::size_t>;

struct Greedy {
    Positions positions;
    double price = 0;      ///< gain per bit of the first step that did not fit; 0 where all fit
    Positions at_price;    ///< where the items stood then: each minimises error + price * cost
    bool complete = true;  ///< every step fit: nothing is left to gain
};

Greedy greedy(const Problem& problem);

}  // namespace kvplane::detail::allocation

#if !defined(KVPLANE_COMPILED)
#include "kvplane/allocate/impl/greedy.hpp"
#endif
