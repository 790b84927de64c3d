// kvplane/allocate/bit_allocation.hpp: the one allocator.
//
//     minimise    sum_i weight_i * distortion_i(o_i)         over one option o_i for every item i
//     such that   sum_i count_i  * cost_i(o_i)  <=  budget
//
// An item is anything that gets a width of its own, for example the keys of a layer, a latent channel or a
// channel to read. Its menu is the list of its options, in any order. Each option has a cost in bits per
// element, which is a real number (1.58, or 4 + 32/64 with the grid), and a distortion per unit of weight.
// Menus may differ from item to item and need be neither convex nor monotone. An option may cost nothing.
//
// There are three methods. Each is never worse than the one after it (theorem T5 of theory/bounds.hpp):
//   exact    the optimum, by dynamic programming over the Pareto frontier of (cost, error)
//   greedy   best gain per bit first, along the convex hulls of the curves; fast, no tables
//   uniform  the same option for every item
// No method ever returns a larger error for a larger budget.
//
// Sums of costs are compared with a tolerance of 1e-9 of the budget, because 1.58 and 32/48 are not exact in
// binary. An allocation whose cost on paper is exactly the budget therefore fits.
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

    /// For `exact` only: how many frontier states may be kept, over all items together. Each takes 8 bytes,
    /// and 72 more while its item is the one at work: 1.3 GB at most by default, where one item needs all
    /// of them. If the optimum needs more, allocate() refuses. It never approximates on its own.
    std::size_t max_states = std::size_t{1} << 24;
};

/// One option for every item, with the total cost and error.
struct Allocation {
    std::vector<std::size_t> choice;  ///< by item: index into its options
    double cost = 0;                  ///< sum of count * cost
    double error = 0;                 ///< sum of weight * distortion

    /// The error that one more bit of budget would save at the margin: the Lagrange multiplier of the budget.
    /// It is 0 if the budget buys all there is to gain, and for `uniform`. theory::allocation_lower_bound is
    /// tightest at this price.
    double price = 0;
};

/// Chooses one option for every item. Throws Error: not_finite for a NaN or infinite weight, count, cost,
/// distortion or budget; option if one of these is negative, a menu is empty, the budget is below the
/// cheapest choice (the message says what that costs), or the exact frontier would outgrow
/// settings.max_states.
///
/// `uniform` takes the same index in every menu, out of the indices that even the shortest menu has. Of those
/// that fit the budget it takes the one of least error, which for falling curves is the largest. It refuses
/// if none fits.
///
/// `exact` runs in about items * options * frontier steps. States that a Lagrangian bound shows to be no
/// better than what is already known are dropped, so thousands of items take milliseconds. The worst case is
/// exponential: many items with unrelated real costs and nearly equal gains per bit. max_states is the limit
/// for that case.
Allocation allocate(std::span<const AllocationItem> items, double budget,
                    const AllocationSettings& settings = {});

/// The least that any choice costs: the smallest budget that allocate() accepts (`uniform` may need more).
double cheapest_cost(std::span<const AllocationItem> items);

/// Cost and error of a given choice. Throws Error: shape unless it has one entry per item, index for an entry
/// that is not in the item's menu.
Allocation evaluate_allocation(std::span<const AllocationItem> items, std::span<const std::size_t> choice);

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/allocate/impl/bit_allocation.hpp"
#endif
