// kvplane/allocate/impl/exact.hpp: the frontier and the passes over it.
#pragma once

#include "kvplane/allocate/exact.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "kvplane/error.hpp"

namespace kvplane::detail::allocation {

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
    double room;    ///< budget that `start` leaves unused: >= 0, and > 0 if the last step did not fit
    double margin;  ///< for rounding: no state is dropped that is above the gap by less than this
    double gap;     ///< how far the best known choice is above the bound
    Positions best;
};

inline Deviation deviation(const Core& core, std::size_t item, std::size_t position) {
    const Menu& menu = core.problem.menus[item];
    const Choice &to = menu[position], &from = menu[core.start[item]];
    const double cost = to.cost - from.cost, error = to.error - from.error;
    return {cost, error, std::max(0.0, error + core.price * cost), position};
}

/// How far a choice is above the bound. It is a sum of terms >= 0, so nothing cancels.
inline double gap_of(const Core& core, const Positions& positions) {
    double reduced = 0, cost = 0;
    for (std::size_t i = 0; i < positions.size(); ++i) {
        const Deviation d = deviation(core, i, positions[i]);
        reduced += d.reduced;
        cost += d.cost;
    }
    return reduced + core.price * std::max(0.0, core.room - cost);
}

/// The items that can still deviate from the bound's choice, most constrained first, so that the frontier
/// grows late.
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

/// [item] the least (<= 0) and the most (>= 0) that this item and those after it can still add to the cost.
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

/// Appends states to a frontier in ascending cost. Costs within `tolerance` of each other count as one, and
/// the state of lower error stays, because 1.58 + 1.58 + 2 and 2 + 1.58 + 1.58 differ in the last bits and
/// must not become two states.
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
        // Every merge may raise a cost by the tolerance. All merges together stay within the slack of the
        // budget.
        tolerance_ = core.problem.slack / static_cast<double>(merges);
    }

    /// Improves core.best if it can. Returns true if the optimum is found, false if the width cut states off.
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
                " that are not settled); raise max_states or use greedy");
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

    /// Whether no completion by the items from `next` on fits the budget, or none stays within the gap.
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

KVPLANE_FUNCTION Positions exact_positions(const Problem& problem, const Greedy& state,
                                           std::size_t max_states) {
    Core core = make_core(problem, state);
    for (std::size_t width = 64; core.gap > core.margin; width *= 16) {
        const bool all = width > max_states / (free_items(core).size() + 1);
        if (Pass(core, all ? std::numeric_limits<std::size_t>::max() : width, max_states).run()) break;
    }
    return core.best;
}

}  // namespace kvplane::detail::allocation
