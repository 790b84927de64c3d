// kvplane/read/budget.hpp: so many bits of values on average, where the softmax weights make them count
// (T12).
//
// Keys are read whole: their budget holds all that is stored. Budgets that it does not are coarse_pass.hpp's.
#pragma once

#include <algorithm>
#include <vector>

#include "kvplane/read/plan.hpp"
#include "kvplane/read/planner.hpp"
#include "kvplane/read/value_importance.hpp"

namespace kvplane::detail {

/// The choice of values by budget, which several planners share.
class ValueBudget {
  public:
    /// Throws std::bad_alloc.
    void begin(const PlanContext& context) {
        context_ = context;
        importance_.begin(context, GroupWeight::squares);
        worker_gains_.resize(static_cast<std::size_t>(context.executor->workers()));
        tile_importance_.resize(static_cast<std::size_t>(context.shape.row_blocks() * context.shape.tiles));
    }
    void note(const PlanPlace& place, AttentionScratch& scratch) noexcept {
        importance_.note(place, scratch);
    }

    /// How much all values count, and how many groups count how much.
    void rank() noexcept {
        for (GainHistogram& gains : worker_gains_) gains.clear();
        run_items(*context_.executor, context_.shape.row_blocks(), [this](Index index, Index worker) {
            GainHistogram& gains = worker_gains_[static_cast<std::size_t>(worker)];
            importance_.combine(context_.shape.row_block(index), [&](Index tile, float* importance) {
                float sum = 0.0f;
                for (Index g = 0; g < importance_.groups(); ++g) {
                    sum += importance[g];
                    // As its bucket is counted, so that the budget holds.
                    importance[g] = GainHistogram::rounded_down(importance[g]);
                    gains.add(importance[g], 1.0);
                }
                tile_importance_[static_cast<std::size_t>(index * context_.shape.tiles + tile)] = sum;
            });
        });
        for (std::size_t w = 1; w < worker_gains_.size(); ++w) worker_gains_[0].add(worker_gains_[w]);
    }
    /// The sum of a tile's importance, once ranked.
    float tile_importance(Index tile, Index block) const noexcept {
        return tile_importance_[static_cast<std::size_t>(block * context_.shape.tiles + tile)];
    }
    /// Fills `gains` with what the planes of all values gain; amounts are bits by channel.
    void list_gains(GainHistogram& gains) const noexcept {
        const PlaneSplit& split = importance_.split();
        gains.clear();
        worker_gains_[0].for_each([&](float importance, double groups) {
            for (int p = 0; p < split.count; ++p)
                gains.add(plane_gain(importance, importance_.worth()[static_cast<std::size_t>(p)]),
                          groups * static_cast<double>(split[p] * plane_group_size(split)));
        });
    }
    /// Bits of values, by channel, that the policy's mean allows.
    double allowed() const noexcept {
        return context_.policy.value_bits *
               static_cast<double>(visible_tiles() * tile_tokens * context_.shape.row_blocks());
    }
    /// Chooses the planes that gain most, of at most `budget` bits by channel.
    void choose(double budget) noexcept {
        list_gains(gains_);
        least_ = gains_.least(std::max(budget, 0.0) + 1e-6);
    }
    void planes(const PlanPlace& place, std::uint8_t* planes) const noexcept {
        importance_.choose(place.tile, place.block.index, least_, planes);
    }

    Index visible_tiles() const noexcept {
        Index count = 0;
        for (Index t = 0; t < context_.shape.tiles; ++t) count += context_.tiles->hidden(t) ? 0 : 1;
        return count;
    }
    const PlaneSplit& split() const noexcept { return importance_.split(); }

  private:
    PlanContext context_{};
    ValueImportance importance_;
    std::vector<GainHistogram> worker_gains_;  ///< [worker], and then of all in the first
    std::vector<float> tile_importance_;       ///< [row block][tile]
    GainHistogram gains_;
    float least_ = 0.0f;  ///< the least gain that is read
};

class BudgetPlanner final : public ReadPlanner {
  public:
    void begin(const PlanContext& context) override {
        context_ = context;
        values_.begin(context);
    }
    Index keys(const PlanPlace& place, RowView<const float>, AttentionScratch&,
               TileRead& read) noexcept override {
        read.wide_factors = wants_wide_factors(context_.policy.key_bits);
        return bits_read(context_.tiles->layout->key_format_of_head(place.block.head), nullptr);
    }
    void scored(const PlanPlace& place, AttentionScratch& scratch) noexcept override {
        values_.note(place, scratch);
    }
    void choose_values(const ReadCount&) noexcept override {
        values_.rank();
        values_.choose(values_.allowed());
    }
    void values(const PlanPlace& place, std::uint8_t* planes) noexcept override {
        values_.planes(place, planes);
    }
    bool wide_values() const noexcept override { return wants_wide_factors(context_.policy.value_bits); }

  private:
    PlanContext context_{};
    ValueBudget values_;
};

}  // namespace kvplane::detail
