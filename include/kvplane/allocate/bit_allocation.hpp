// kvplane/allocate/bit_allocation.hpp: the one allocator.
//
//     minimise    sum_i weight_i * distortion_i(o_i)         over one option o_i for every item i
//     such that   sum_i count_i  * cost_i(o_i)  <=  budget
//
// An item is whatever has a width of its own: the keys of a layer, a latent channel, a channel to read. Its
// options are what it may be given, in any order: each has a cost in bits per element (real: 1.58, or 4 +
// 32/64 with the grid) and a distortion per unit of weight. Menus may differ from item to item, need be
// neither convex nor monotone, and an option may cost nothing.
//
// Three methods, of which each is never worse than the next (theorem T5 of theory/bounds.hpp):
//   exact    the optimum, by dynamic programming over the Pareto frontier of (cost, error)
//   greedy   best gain per bit first, over the convex hulls of the curves; fast, no tables
//   uniform  one option for all
// and none of them ever answers a larger budget with a larger error.
//
// Sums of costs are compared up to a relative 1e-9 of the budget, since 1.58 or 32/48 are not exact in
// binary: an allocation that costs the budget on paper fits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvplane/compiled.hpp"

namespace kvplane {

/// One entry of an item's menu. Both numbers are finite and not negative.
struct AllocationOption {
    double cost = 0;        ///< bits per element
    double distortion = 0;  ///< error per unit of the item's weight
};

/// Something that is given one option of its menu.
struct AllocationItem {
    double weight = 1;  ///< multiplies every distortion; finite, >= 0
    double count = 1;   ///< multiplies every cost: the number of elements; finite, >= 0
    std::vector<AllocationOption> options;
};

enum class AllocationMethod : std::uint8_t { exact, greedy, uniform };

struct AllocationSettings {
    AllocationMethod method = AllocationMethod::exact;

    /// Exact only. How many frontier states may be kept, over all items together (8 bytes each). Where the
    /// optimum needs more, allocate() refuses; it never approximates on its own.
    std::size_t max_states = std::size_t{1} << 24;
};

/// One option for every item, and what that comes to.
struct Allocation {
    std::vector<std::size_t> choice;  ///< by item: index into its options
    double cost = 0;                  ///< sum of count * cost
    double error = 0;                 ///< sum of weight * distortion

    /// Error saved by a further bit at the margin: the Lagrange multiplier of the budget. 0 where the budget
    /// buys all there is to gain, and for `uniform`. With it theory::allocation_lower_bound is tightest.
    double price = 0;
};

/// Allocates. Throws Error: not_finite for a NaN or infinite weight, count, cost, distortion or budget;
/// option for a negative one, an empty menu, a budget below the cheapest choice (the sentence says what that
/// costs), and where the exact frontier would outgrow settings.max_states.
///
/// `uniform` takes the same index of every menu (those below the length of the shortest): the one of least
/// error that fits, which for falling curves is the largest. It refuses where none fits.
///
/// `exact` runs in about items * options * frontier steps. States that a Lagrangian bound shows to be no
/// better than what is already known are dropped, so thousands of items take milliseconds; the worst case,
/// many items with unrelated real costs and nearly equal gains per bit, is exponential and is what max_states
/// is for.
Allocation allocate(std::span<const AllocationItem> items, double budget,
                    const AllocationSettings& settings = {});

/// The least that any choice costs: the smallest budget that allocate() accepts (`uniform` may need more).
double cheapest_cost(std::span<const AllocationItem> items);

/// Cost and error of a given choice. Throws Error (shape, index) where it does not belong to the items.
Allocation evaluate_allocation(std::span<const AllocationItem> items, std::span<const std::size_t> choice);

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/allocate/impl/bit_allocation.hpp"
#endif
