// kvplane/allocate/greedy.hpp: the allocator's problem as its methods see it, and the greedy method.
//
// Greedy takes steps along the convex hulls of the items' curves, best gain per bit first. A step that does
// not fit is replaced by the best shorter step of the same item, which gains less per bit. The steps tried
// therefore have falling gain per bit, and that makes the error monotone in the budget. To see this, take the
// first step that a larger budget can take and a smaller one cannot. From there on the smaller budget gains
// no more per bit than this step, on fewer bits than the step costs, and thus less than the step gains.
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

/// The problem as the methods see it: the menus, and what is left to spend beyond the cheapest choice.
struct Problem {
    std::vector<Menu> menus;
    double room = 0;   ///< budget less the cheapest choice, not negative
    double slack = 0;  ///< tolerance: a sum of costs may exceed `room` by this much

    bool fits(double cost) const { return cost <= room + slack; }
};

/// [item] position in the item's menu.
using Positions = std::vector<std::size_t>;

struct Greedy {
    Positions positions;
    double price = 0;      ///< gain per bit of the first step that did not fit; 0 where all fit
    Positions at_price;    ///< [item] positions at that step: each minimises error + price * cost
    bool complete = true;  ///< every step fit: nothing is left to gain
};

Greedy greedy(const Problem& problem);

}  // namespace kvplane::detail::allocation

#if !defined(KVPLANE_COMPILED)
#include "kvplane/allocate/impl/greedy.hpp"
#endif
