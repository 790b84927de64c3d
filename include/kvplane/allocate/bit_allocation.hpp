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

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <queue>
#include <span>
#include <utility>
#include <vector>

#include "kvplane/error.hpp"

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

    /// Exact only. 0: costs as they are. Above 0: what an option costs beyond its item's cheapest one is
    /// rounded UP to a multiple of this many bits (in units of the budget: count * cost), which bounds the
    /// frontier by budget / resolution. The result still fits the budget, is never worse than greedy, and is
    /// at least as good as the optimum for a budget smaller by items * resolution.
    double resolution = 0;

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

// Implementation.

namespace detail::allocation {

/// An option in the units of the problem: cost beyond the item's cheapest option, and weighted error.
struct Choice {
    double cost, error;
    std::size_t option;
};

/// An item's efficient options: ascending cost, strictly falling error. The first one costs 0.
using Menu = std::vector<Choice>;

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

inline double cheapest(const AllocationItem& item) {
    double cost = std::numeric_limits<double>::infinity();
    for (const AllocationOption& option : item.options) cost = std::min(cost, option.cost);
    return item.count * cost;
}

inline Menu efficient_menu(const AllocationItem& item, double resolution) {
    const double base = cheapest(item);
    Menu all;
    for (std::size_t o = 0; o < item.options.size(); ++o) {
        double cost = std::max(0.0, item.count * item.options[o].cost - base);
        // The allowance keeps a cost that is a multiple on paper from being pushed to the next one.
        if (resolution > 0) cost = std::max(0.0, std::ceil(cost / resolution - 1e-9)) * resolution;
        all.push_back({cost, item.weight * item.options[o].distortion, o});
    }
    std::stable_sort(all.begin(), all.end(), [](const Choice& a, const Choice& b) {
        return a.cost != b.cost ? a.cost < b.cost : a.error < b.error;
    });
    Menu menu;
    for (const Choice& choice : all) {
        if (!menu.empty() && choice.error >= menu.back().error) continue;
        // Costs that differ by rounding are one cost.
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

/// The problem as the methods see it: what is left to spend beyond the cheapest choice.
struct Problem {
    std::vector<Menu> menus;
    double room = 0;   ///< budget less the cheapest choice, not negative
    double slack = 0;  ///< by how much a sum of costs may pass `room`
    bool fits(double cost) const { return cost <= room + slack; }
};

inline Problem make_problem(std::span<const AllocationItem> items, double budget, double resolution) {
    Problem problem;
    problem.menus.reserve(items.size());
    double base = 0;
    for (const AllocationItem& item : items) {
        problem.menus.push_back(efficient_menu(item, resolution));
        require_finite_gains(problem.menus.back(), problem.menus.size() - 1);
        base += cheapest(item);
    }
    problem.slack = 1e-9 * budget;
    require(base <= budget + problem.slack, ErrorCode::option, "budget: ", budget,
            " bits, but the cheapest choice costs ", base, " bits, expected at least that");
    problem.room = std::max(0.0, budget - base);
    return problem;
}

/// By item a position in its menu.
using Positions = std::vector<std::size_t>;

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

// Greedy: steps along the convex hulls, best gain per bit first. A step that does not fit is replaced by the
// best shorter step of the same item, which gains less per bit, so the steps tried have falling gain per bit.
// That makes the error monotone in the budget: at the first step that a larger budget B takes and a smaller b
// cannot, all that b still gains is at this gain per bit or less on fewer bits than the step costs, so less
// than the step.

struct Step {
    double gain_per_bit;
    std::size_t item, target;
    bool operator<(const Step& other) const {  // for a max-heap; the lower item index first among equals
        return gain_per_bit != other.gain_per_bit ? gain_per_bit < other.gain_per_bit : item > other.item;
    }
};

/// The step from `from` to a position below `end` of most gain per bit; target == from where there is none.
inline Step best_step(const Menu& menu, std::size_t item, std::size_t from, std::size_t end) {
    Step best{-1, item, from};
    for (std::size_t to = from + 1; to < end; ++to) {
        const double gain = (menu[from].error - menu[to].error) / (menu[to].cost - menu[from].cost);
        if (gain > best.gain_per_bit) best = {gain, item, to};
    }
    return best;
}

struct Greedy {
    Positions positions;
    double price = 0;      ///< gain per bit of the first step that did not fit; 0 where all fit
    Positions at_price;    ///< where the items stood then: each minimises error + price * cost
    bool complete = true;  ///< every step fit: nothing is left to gain
};

inline Greedy greedy(const Problem& problem) {
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

/// The better of what the steps of `state` reached and one option for all.
inline Allocation greedy_allocation(std::span<const AllocationItem> items, double budget,
                                    const Problem& problem, const Greedy& state) {
    const Allocation by_steps = to_allocation(items, problem, state.positions, state.price);
    Allocation by_one = best_uniform(items, budget);
    if (by_one.choice.size() != items.size()) return by_steps;
    by_one.price = state.price;
    return better(by_steps, by_one);
}

// Exact. At the price found by greedy, the options that minimise error + price * cost are a lower bound (weak
// duality), and every other option has a reduced cost: what it adds to that bound. An allocation's error is
//     bound + sum of its reduced costs + price * (bits of the budget it leaves),
// all terms >= 0, so one that is to beat the best known has both sums below the gap between the two. Items
// that cannot deviate within the gap are settled; the others go through a frontier of states (cost, error)
// relative to the bound's own choice, in which a state is dropped when another is no dearer and no worse, or
// when the gap forbids it. Narrow passes come first: their answers are good enough to close most of the gap,
// so that the last, complete pass is small.

struct Deviation {
    double cost, error, reduced;
    std::size_t position;
};

struct FreeItem {
    std::size_t item;
    std::vector<Deviation> deviations;  ///< ascending cost; the bound's own choice is one of them
};

struct State {
    double cost, error;
    std::uint32_t parent, deviation;
};

struct Trace {
    std::uint32_t parent, deviation;
};

struct Core {
    const Problem& problem;
    const Positions& start;  ///< the bound's own choice
    double price;
    double room;    ///< the budget it leaves: below 0 never, above 0 where the last step did not fit
    double margin;  ///< rounding: nothing within it of the gap is dropped
    double gap;     ///< how much the best known choice is above the bound
    Positions best;
};

inline Deviation deviation(const Core& core, std::size_t item, std::size_t position) {
    const Menu& menu = core.problem.menus[item];
    const Choice &to = menu[position], &from = menu[core.start[item]];
    const double cost = to.cost - from.cost, error = to.error - from.error;
    return {cost, error, std::max(0.0, error + core.price * cost), position};
}

/// How far a choice is above the bound, as a sum of terms >= 0: no cancellation.
inline double gap_of(const Core& core, const Positions& positions) {
    double reduced = 0, cost = 0;
    for (std::size_t i = 0; i < positions.size(); ++i) {
        const Deviation d = deviation(core, i, positions[i]);
        reduced += d.reduced;
        cost += d.cost;
    }
    return reduced + core.price * std::max(0.0, core.room - cost);
}

/// Those that can still deviate, most constrained first, so that the frontier grows late.
inline std::vector<FreeItem> free_items(const Core& core) {
    std::vector<std::pair<double, FreeItem>> ranked;
    for (std::size_t i = 0; i < core.start.size(); ++i) {
        FreeItem candidate{i, {}};
        double least = std::numeric_limits<double>::infinity();
        for (std::size_t p = 0; p < core.problem.menus[i].size(); ++p) {
            const Deviation d = deviation(core, i, p);
            if (p != core.start[i]) least = std::min(least, d.reduced);
            if (p == core.start[i] || d.reduced <= core.gap + core.margin) candidate.deviations.push_back(d);
        }
        if (candidate.deviations.size() > 1) ranked.emplace_back(least, std::move(candidate));
    }
    std::stable_sort(ranked.begin(), ranked.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    std::vector<FreeItem> items;
    for (auto& entry : ranked) items.push_back(std::move(entry.second));
    return items;
}

/// Cost that the items after each one can still give back (least, <= 0) and take up (most, >= 0).
struct Reach {
    std::vector<double> least, most;
};

inline Reach reach_after(const std::vector<FreeItem>& items) {
    Reach reach{std::vector<double>(items.size() + 1, 0.0), std::vector<double>(items.size() + 1, 0.0)};
    for (std::size_t i = items.size(); i-- > 0;) {
        reach.least[i] = reach.least[i + 1] + items[i].deviations.front().cost;
        reach.most[i] = reach.most[i + 1] + items[i].deviations.back().cost;
    }
    return reach;
}

/// Appends to a frontier in ascending cost. Costs within `tolerance` of each other count as one, the lower
/// error stays: 1.58 + 1.58 + 2 and 2 + 1.58 + 1.58 differ in the last bits and must not become two states.
class Frontier {
  public:
    Frontier(std::vector<State>& states, double tolerance) : states_(states), tolerance_(tolerance) {}

    void offer(const State& state) {
        if (!states_.empty() && state.error >= states_.back().error) return;
        if (!states_.empty() && state.cost <= anchor_ + tolerance_) {
            states_.back() = state;
        } else {
            states_.push_back(state);
            anchor_ = state.cost;
        }
    }

  private:
    std::vector<State>& states_;
    double tolerance_;
    double anchor_ = 0;  // the first cost merged into the last state, so that merging cannot drift
};

/// One complete or narrow pass over the free items.
class Pass {
  public:
    Pass(Core& core, std::size_t width, std::size_t max_states)
        : core_(core),
          items_(free_items(core)),
          reach_(reach_after(items_)),
          width_(width),
          max_states_(max_states) {
        std::size_t merges = 1;
        for (const FreeItem& item : items_) merges += item.deviations.size();
        // Every merge may raise a cost by the tolerance; all together stay within the slack of the budget.
        tolerance_ = core.problem.slack / static_cast<double>(merges);
    }

    /// Improves core.best where it can. True: the optimum is found. False: the width cut states off.
    bool run() {
        states_ = {{0, 0, 0, 0}};
        for (std::size_t i = 0; i < items_.size() && !states_.empty(); ++i) extend(i);
        if (!states_.empty()) take(states_.back());
        return complete_;
    }

  private:
    void extend(std::size_t i) {
        std::vector<State> merged, next;
        for (std::uint32_t d = 0; d < items_[i].deviations.size(); ++d) {
            next.clear();
            merge_shifted(i, d, merged, next);
            merged.swap(next);
        }
        states_.swap(merged);
        if (states_.size() > width_) narrow();
        kept_ += states_.size();
        require(kept_ <= max_states_, ErrorCode::option, "the exact frontier needs more than ", max_states_,
                " states (at item ", i + 1, " of the ", items_.size(),
                " that are not settled); raise max_states, set a resolution, or use greedy");
        std::vector<Trace>& trace = traces_.emplace_back();
        trace.reserve(states_.size());
        for (const State& s : states_) trace.push_back({s.parent, s.deviation});
    }

    /// Merges the frontier so far with all states moved by one deviation; both are in ascending cost.
    void merge_shifted(std::size_t i, std::uint32_t d, const std::vector<State>& sofar,
                       std::vector<State>& out) const {
        const Deviation& move = items_[i].deviations[d];
        Frontier frontier(out, tolerance_);
        auto other = sofar.begin();
        for (std::uint32_t parent = 0; parent < states_.size(); ++parent) {
            const State moved{states_[parent].cost + move.cost, states_[parent].error + move.error, parent,
                              d};
            if (hopeless(moved, i + 1)) continue;
            while (other != sofar.end() && other->cost <= moved.cost) frontier.offer(*other++);
            frontier.offer(moved);
        }
        while (other != sofar.end()) frontier.offer(*other++);
    }

    double reduced(const State& state) const { return state.error + core_.price * state.cost; }

    /// No completion by the items from `next` on fits the budget, or stays within the gap.
    bool hopeless(const State& state, std::size_t next) const {
        if (state.cost + reach_.least[next] > core_.room + core_.problem.slack) return true;
        const double left_over = std::max(0.0, core_.room - state.cost - reach_.most[next]);
        return reduced(state) + core_.price * left_over > core_.gap + core_.margin;
    }

    /// Keeps the `width_` states nearest to the bound.
    void narrow() {
        complete_ = false;
        std::vector<double> order;
        for (const State& s : states_) order.push_back(reduced(s));
        const auto last = order.begin() + static_cast<std::ptrdiff_t>(width_ - 1);
        std::nth_element(order.begin(), last, order.end());
        const double limit = *last;
        std::size_t ties = width_;  // how many states at the limit itself may stay
        for (const double r : order) ties -= r < limit ? 1 : 0;
        std::erase_if(states_, [&](const State& s) {
            if (reduced(s) < limit) return false;
            return reduced(s) > limit || ties == 0 || ties-- == 0;
        });
    }

    void take(State state) {
        Positions positions = core_.start;
        for (std::size_t i = items_.size(); i-- > 0;) {
            positions[items_[i].item] = items_[i].deviations[state.deviation].position;
            if (i == 0) break;
            const Trace& trace = traces_[i - 1][state.parent];
            state.parent = trace.parent;
            state.deviation = trace.deviation;
        }
        const double gap = gap_of(core_, positions);
        if (gap < core_.gap) {
            core_.gap = gap;
            core_.best = std::move(positions);
        }
    }

    Core& core_;
    std::vector<FreeItem> items_;
    Reach reach_;
    std::size_t width_, max_states_, kept_ = 0;
    double tolerance_ = 0;
    bool complete_ = true;
    std::vector<State> states_;
    std::vector<std::vector<Trace>> traces_;
};

inline Core make_core(const Problem& problem, const Greedy& state) {
    Core core{problem, state.at_price, state.price, problem.room, 0, 0, state.positions};
    double error = 0;
    for (std::size_t i = 0; i < problem.menus.size(); ++i) {
        core.room -= problem.menus[i][state.at_price[i]].cost;
        error += problem.menus[i][state.at_price[i]].error;
    }
    core.margin = 1e-12 * (error + state.price * problem.room);
    core.gap = gap_of(core, core.best);
    return core;
}

/// The best positions for the problem, whose greedy answer is given and is not complete.
inline Positions exact_positions(const Problem& problem, const Greedy& state, std::size_t max_states) {
    Core core = make_core(problem, state);
    for (std::size_t width = 64; core.gap > core.margin; width *= 16) {
        const bool all = width > max_states / (free_items(core).size() + 1);
        if (Pass(core, all ? std::numeric_limits<std::size_t>::max() : width, max_states).run()) break;
    }
    return core.best;
}

inline Allocation exact_allocation(std::span<const AllocationItem> items, double budget,
                                   const AllocationSettings& settings) {
    const Problem problem = make_problem(items, budget, 0);
    const Greedy state = greedy(problem);
    const Allocation known = greedy_allocation(items, budget, problem, state);
    if (state.complete) return known;
    if (settings.resolution == 0) {
        const Positions positions = exact_positions(problem, state, settings.max_states);
        return better(known, to_allocation(items, problem, positions, state.price));
    }
    const Problem rounded = make_problem(items, budget, settings.resolution);
    const Greedy start = greedy(rounded);
    const Positions positions =
        start.complete ? start.positions : exact_positions(rounded, start, settings.max_states);
    return better(known, to_allocation(items, rounded, positions, state.price));
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

}  // namespace detail::allocation

inline Allocation allocate(std::span<const AllocationItem> items, double budget,
                           const AllocationSettings& settings) {
    for (std::size_t i = 0; i < items.size(); ++i) detail::allocation::require_item(items[i], i);
    detail::allocation::require_finite_totals(items);
    require(std::isfinite(budget), ErrorCode::not_finite, "budget: ", budget,
            ", expected a finite number of bits");
    require(std::isfinite(settings.resolution) && settings.resolution >= 0, ErrorCode::option,
            "resolution: ", settings.resolution, ", expected 0 or a positive number of bits");
    require(settings.max_states <= std::numeric_limits<std::uint32_t>::max(), ErrorCode::option,
            "max_states: ", settings.max_states, ", expected at most 4294967295");
    switch (settings.method) {
        case AllocationMethod::exact:
            return detail::allocation::exact_allocation(items, budget, settings);
        case AllocationMethod::greedy: {
            const auto problem = detail::allocation::make_problem(items, budget, 0);
            return detail::allocation::greedy_allocation(items, budget, problem,
                                                         detail::allocation::greedy(problem));
        }
        case AllocationMethod::uniform:
            return detail::allocation::uniform_allocation(items, budget);
    }
    fail(ErrorCode::option, "method: ", static_cast<int>(settings.method),
         ", expected exact, greedy or uniform");
}

inline double cheapest_cost(std::span<const AllocationItem> items) {
    double cost = 0;
    for (std::size_t i = 0; i < items.size(); ++i) {
        detail::allocation::require_item(items[i], i);
        cost += detail::allocation::cheapest(items[i]);
    }
    return cost;
}

inline Allocation evaluate_allocation(std::span<const AllocationItem> items,
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
