// kvplane/allocate/exact.hpp: the exact method.
//
// At the price found by greedy, the options that minimise error + price * cost are a lower bound (weak
// duality), and every other option has a reduced cost: what it adds to that bound. An allocation's error is
//
//     bound + sum of its reduced costs + price * (bits of the budget it leaves),
//
// all terms >= 0, so one that is to beat the best known has both sums below the gap between the two. Items
// that cannot deviate within the gap are settled. The others go through a frontier of states (cost, error)
// relative to the bound's own choice, in which a state is dropped when another is no dearer and no worse, or
// when the gap forbids it. Narrow passes come first: their answers are good enough to close most of the gap,
// so that the last, complete pass is small.
#pragma once

#include <cstddef>

#include "kvplane/allocate/greedy.hpp"

namespace kvplane::detail::allocation {

/// The best positions for the problem, whose greedy answer is given and is not complete. Throws Error
/// (option) where the frontier would need more than `max_states`.
Positions exact_positions(const Problem& problem, const Greedy& state, std::size_t max_states);

}  // namespace kvplane::detail::allocation

#if !defined(KVPLANE_COMPILED)
#include "kvplane/allocate/impl/exact.hpp"
#endif
