// kvplane/allocate/exact.hpp: the exact method.
//
// At the price found by greedy, the options that minimise error + price * cost give a lower bound of the
// error (weak duality). Every other option has a reduced cost, which is what it adds to that bound. An
// allocation's error is
//
//     bound + sum of its reduced costs + price * (bits of the budget it leaves unused).
//
// All terms are >= 0, so an allocation can beat the best known one only if both sums are below the gap
// between the best known error and the bound. An item is settled if each of its other options has a reduced
// cost above the gap. The other items go through a frontier of states (cost, error), both relative to the
// bound's choice. A state is dropped if another is no dearer and no worse, or if the gap rules it out. Narrow
// passes come first, which keep only some of the states. Their answers are good enough to close most of the
// gap, so that the last, complete pass is small.
#pragma once

#include <cstddef>

#include "kvplane/allocate/greedy.hpp"

namespace kvplane::detail::allocation {

/// The best positions for `problem`. `state` is its greedy answer and must not be complete. Throws Error
/// (option) if the frontier would need more than `max_states` states.
Positions exact_positions(const Problem& problem, const Greedy& state, std::size_t max_states);

}  // namespace kvplane::detail::allocation

#if !defined(KVPLANE_COMPILED)
#include "kvplane/allocate/impl/exact.hpp"
#endif
