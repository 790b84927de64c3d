// kvplane/read/coarse_pass.hpp: keys by budget, in a coarse pass over all tiles and a refining one over some.
//
// The coarse pass takes an eighth of the stored bits, the first planes of the channels that count most, and
// tells roughly what every token weighs. The refining pass reads what T12 makes of the rest of the budget: an
// error of a score does to the output what the softmax weights of its tile allow, so that channels of tiles
// without weight get no more bits, and those of others many. Values share the budget or have one of their
// own.
//
// On a CPU the two passes read less and take longer than reading everything (bench/README.md); on a GPU
// skipping pays. Nothing outside this file knows of them.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <vector>

#include "kvplane/read/budget.hpp"
#include "kvplane/read/importance.hpp"
#include "kvplane/read/plan.hpp"
#include "kvplane/read/planner.hpp"

namespace kvplane::detail {

class CoarsePassPlanner final : public ReadPlanner {
  public:
    /// Tiles are sorted into classes a factor of two apart, by what an error of their scores does to the
    /// output.
    static constexpr Index classes = 32;
    /// Chunks whose first tile tells what channels count, at most.
    static constexpr Index most_samples = 4;

    void begin(const PlanContext& context) override {
        context_ = context;
        values_.begin(context);
        shared_ = context.policy.shared;
        refining_ = false;
        const PageLayout& layout = *context.tiles->layout;
        const Index subspaces = layout.subspaces();
        groups_per_tile_ = 0;
        for (Index s = 0; s < subspaces; ++s)
            groups_per_tile_ = std::max(groups_per_tile_, plane_groups(layout.key_format(s)));
        const auto all = static_cast<std::size_t>(subspaces * groups_per_tile_),
                   by_class = static_cast<std::size_t>(subspaces * classes);
        groups_.assign(all, PlaneGroup{0.0f, {}, 0});
        gains_of_.resize(all);
        order_.resize(PlaneSplit::max_planes * all);
        coarse_planes_.resize(all);
        coarse_bits_.resize(static_cast<std::size_t>(subspaces));
        class_planes_.resize(all * classes);
        class_bits_.resize(by_class);
        class_tiles_.resize(by_class);
        tile_class_.resize(static_cast<std::size_t>(context.shape.tiles * subspaces));
        sampled_groups_.resize(static_cast<std::size_t>(context.executor->workers() * groups_per_tile_));
        list_samples();
    }

    std::span<const Index> samples() const noexcept override { return samples_; }
    void sample(const PlanPlace& place, RowView<const float> queries,
                AttentionScratch& scratch) noexcept override {
        const PageLayout& layout = *context_.tiles->layout;
        const Index subspace = layout.subspace_of(place.block.head);
        const TileFormat& format = layout.key_format(subspace);
        PlaneGroup* const found = sampled_groups_.data() + place.worker * groups_per_tile_;
        key_importance(context_.isa, format, context_.tiles->keys(place.tile, subspace), queries, false,
                       scratch.folded(), found);
        PlaneGroup* const to = groups_.data() + subspace * groups_per_tile_;
        for (Index g = 0; g < plane_groups(format); ++g)
            to[g] = {to[g].importance + found[g].importance, found[g].split, found[g].size};
    }
    void sampled() noexcept override {
        // Averaged over rows and tiles.
        const Index rows = context_.shape.rows() / subspaces();
        const auto seen = static_cast<float>(std::max<Index>(1, static_cast<Index>(samples_.size()) * rows));
        Index stored = 0;
        for (std::size_t g = 0; g < groups_.size(); ++g) {
            PlaneGroup& group = groups_[g];
            group.importance /= seen;
            for (int p = 0; p < group.split.count; ++p)
                gains_of_[g][static_cast<std::size_t>(p)] = plane_gain(
                    group.importance / static_cast<float>(group.size), plane_worth(group.split, p));
            stored += group.size * group.split.bits();
        }
        choose_planes(groups_, std::min(stored / 8, key_budget() / 2), order_, coarse_planes_, 1);
        for (Index s = 0; s < subspaces(); ++s)
            coarse_bits_[static_cast<std::size_t>(s)] =
                bits_read(context_.tiles->layout->key_format(s), coarse_planes(s));
        // Where no plane is small enough, nothing is known that a budget could be shared by.
        shared_ = shared_ && std::any_of(coarse_planes_.begin(), coarse_planes_.end(),
                                         [](int planes) { return planes > 0; });
    }

    Index keys(const PlanPlace& place, RowView<const float>, AttentionScratch&,
               TileRead& read) noexcept override {
        const PageLayout& layout = *context_.tiles->layout;
        const Index subspace = layout.subspace_of(place.block.head);
        if (!refining_) {
            read.planes = read.next_planes = coarse_planes(subspace);
            read.wide_factors = false;
            return coarse_bits(subspace);
        }
        const TileFormat& format = layout.key_format(subspace);
        const Index of_tile = class_of(place.tile, subspace), bits = class_bits(subspace, of_tile);
        read.planes = class_planes(subspace, of_tile);
        read.next_planes = class_planes(subspace, class_of(place.next, subspace));
        read.wide_factors =
            bits == bits_read(format, nullptr) ||
            wants_wide_factors(static_cast<double>(bits) / static_cast<double>(stored_elements(format)));
        return bits - coarse_bits(subspace);
    }
    void scored(const PlanPlace& place, AttentionScratch& scratch) noexcept override {
        values_.note(place, scratch);
    }
    bool refine() noexcept override {
        values_.rank();
        plan_keys();
        refining_ = true;
        return true;
    }
    bool refines(Index tile, Index subspace) const noexcept override {
        return class_bits(subspace, class_of(tile, subspace)) != coarse_bits(subspace);
    }

    void choose_values(const ReadCount& so_far) noexcept override {
        values_.rank();
        double budget = values_.allowed();
        if (shared_)  // and what keys have left, or taken, of it
            budget += (context_.policy.key_bits * static_cast<double>(so_far.keys) -
                       static_cast<double>(so_far.key_bits)) /
                      static_cast<double>(value_dim());
        values_.choose(budget);
    }
    void values(const PlanPlace& place, std::uint8_t* planes) noexcept override {
        values_.planes(place, planes);
    }
    bool wide_values() const noexcept override { return wants_wide_factors(context_.policy.value_bits); }

  private:
    Index subspaces() const noexcept { return context_.tiles->layout->subspaces(); }
    Index value_dim() const noexcept { return context_.tiles->layout->values.channels(); }
    const std::uint8_t* coarse_planes(Index subspace) const noexcept {
        return coarse_planes_.data() + subspace * groups_per_tile_;
    }
    Index coarse_bits(Index subspace) const noexcept {
        return coarse_bits_[static_cast<std::size_t>(subspace)];
    }
    Index class_of(Index tile, Index subspace) const noexcept {
        return tile_class_[static_cast<std::size_t>(tile * subspaces() + subspace)];
    }
    std::uint8_t* class_planes(Index subspace, Index of_tile) noexcept {
        return class_planes_.data() + (subspace * classes + of_tile) * groups_per_tile_;
    }
    Index class_bits(Index subspace, Index of_tile) const noexcept {
        return class_bits_[static_cast<std::size_t>(subspace * classes + of_tile)];
    }

    /// The first tile that is seen of up to four chunks: steps and queries change little from tile to tile.
    void list_samples() {
        samples_.clear();
        const DecodeShape& shape = context_.shape;
        const Index step = (shape.chunks() + most_samples - 1) / most_samples;
        for (Index chunk = 0; chunk < shape.chunks(); chunk += step) {
            const Index end = std::min((chunk + 1) * DecodeShape::chunk_tiles, shape.tiles);
            Index t = chunk * DecodeShape::chunk_tiles;
            while (t < end && context_.tiles->hidden(t)) ++t;
            if (t < end) samples_.push_back(t);
        }
    }
    /// Bits of one key row of all subspaces, if every channel that has bits had the policy's mean.
    Index key_budget() const noexcept {
        Index channels = 0;
        for (Index s = 0; s < subspaces(); ++s)
            channels += stored_elements(context_.tiles->layout->key_format(s)) / tile_tokens;
        return static_cast<Index>(
            std::floor(context_.policy.key_bits * static_cast<double>(channels) + 1e-6));
    }
    /// Channels of values for each token of a tile of keys: what makes their bits comparable.
    float value_dims() const noexcept {
        return static_cast<float>(value_dim()) / static_cast<float>(tile_tokens);
    }

    /// Sorts tiles into classes. A score that is off by one moves the output by the token's weight times its
    /// value's distance from the output. The square of that is taken as a fiftieth of the square of what the
    /// token's grids span (for normal values in 4 to 8 bits it is about that), and so follows from the
    /// importance of the tile's values. Returns the exponent field of the first class: what an error of a
    /// tile's scores counts for a bit of one channel, where the gains of values are for a bit of all channels
    /// of a group.
    int classify_tiles() noexcept {
        const PlaneSplit& split = values_.split();
        // sqrt(2): of the nearest power of two.
        const float span = 1.41421356f * power_of_two(split.is_half() ? 20 : 2 * split.bits()) / 50.0f *
                           static_cast<float>(plane_group_size(split)) * value_dims();
        const Index blocks = context_.shape.row_blocks() / subspaces();
        const auto for_tiles = [&](const auto& body) {
            for (Index t = 0; t < context_.shape.tiles; ++t)
                for (Index s = 0; s < subspaces() && !context_.tiles->hidden(t); ++s)
                    body(s, t, tile_class_[static_cast<std::size_t>(t * subspaces() + s)]);
        };
        int top = 0;
        for_tiles([&](Index s, Index t, std::uint8_t& field) {
            float sum = 0.0f;
            for (Index block = s * blocks; block < (s + 1) * blocks; ++block)
                sum += values_.tile_importance(t, block);
            field = static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(span * sum) >> 23);
            top = std::max<int>(top, field);
        });
        std::fill(class_tiles_.begin(), class_tiles_.end(), Index{0});
        for_tiles([&](Index s, Index, std::uint8_t& of_tile) {
            of_tile = static_cast<std::uint8_t>(std::min<Index>(top - of_tile, classes - 1));
            ++class_tiles_[static_cast<std::size_t>(s * classes + of_tile)];
        });
        return top;
    }

    /// body(tiles, planes that are read in the end, planes of the coarse pass, the group, gain of a plane)
    /// for every group of every class that has tiles.
    template <class Body>
    void for_groups(int top, const Body& body) noexcept {
        for (Index s = 0; s < subspaces(); ++s)
            for (Index c = 0; c < classes; ++c) {
                const Index tiles = class_tiles_[static_cast<std::size_t>(s * classes + c)];
                const float of_class = std::ldexp(1.0f, top - 127 - static_cast<int>(c));
                for (Index g = 0; g < groups_per_tile_ && tiles > 0; ++g) {
                    const auto at = static_cast<std::size_t>(s * groups_per_tile_ + g);
                    const std::array<float, PlaneSplit::max_planes>& gains = gains_of_[at];
                    body(tiles, class_planes(s, c)[g], coarse_planes(s)[g], groups_[at],
                         [&gains, of_class](int plane) {
                             return plane_gain(gains[static_cast<std::size_t>(plane)], of_class);
                         });
                }
            }
    }
    /// The planes of keys that the refining pass reads, by class of tiles.
    void plan_keys() noexcept {
        const int top = classify_tiles();
        if (shared_)
            values_.list_gains(gains_);
        else
            gains_.clear();
        const double copies = static_cast<double>(context_.shape.row_blocks()) /
                              static_cast<double>(subspaces()) / static_cast<double>(value_dims());
        double taken = 0.0;
        for_groups(top, [&](Index tiles, std::uint8_t& planes, int coarse, const PlaneGroup& group,
                            const auto& gain) {
            planes = static_cast<std::uint8_t>(coarse);
            taken += static_cast<double>(tiles * group.size * group.split.prefix_bits(coarse));
            for (int plane = coarse; plane < group.split.count; ++plane)
                gains_.add(gain(plane),
                           copies * static_cast<double>(tiles * group.size * group.split[plane]));
        });
        const double budget = copies * (static_cast<double>(values_.visible_tiles() * key_budget()) - taken) +
                              (shared_ ? values_.allowed() : 0.0);
        const float least = gains_.least(std::max(budget, 0.0) + 1e-6);
        double left = budget;
        const auto take_from = [&](float gain_from) {
            for_groups(
                top, [&](Index tiles, std::uint8_t& planes, int, const PlaneGroup& group, const auto& gain) {
                    for (; planes < group.split.count && gain(planes) >= gain_from; ++planes) {
                        const double takes =
                            copies * static_cast<double>(tiles * group.size * group.split[planes]);
                        if (gain_from < least && takes > left) break;
                        left -= takes;
                    }
                });
        };
        take_from(least);
        // Of the next bucket, whose gains hardly differ, what the budget has room for.
        if (!shared_) take_from(least / GainHistogram::bucket_ratio);
        for (Index s = 0; s < subspaces(); ++s)
            for (Index c = 0; c < classes; ++c) {
                const auto at = static_cast<std::size_t>(s * classes + c);
                class_bits_[at] = class_tiles_[at] > 0
                                      ? bits_read(context_.tiles->layout->key_format(s), class_planes(s, c))
                                      : 0;
            }
    }

    PlanContext context_{};
    ValueBudget values_;
    bool shared_ = false;    ///< whether keys and values have one budget
    bool refining_ = false;  ///< which pass it is
    Index groups_per_tile_ = 0;
    std::vector<Index> samples_;
    std::vector<PlaneGroup> sampled_groups_;  ///< [worker][group]
    std::vector<PlaneGroup> groups_;          ///< [subspace][group], importance averaged over the samples
    std::vector<std::array<float, PlaneSplit::max_planes>> gains_of_;  ///< [subspace][group] of each plane
    std::vector<std::uint32_t> order_;
    std::vector<std::uint8_t> coarse_planes_;  ///< [subspace][group]
    std::vector<Index> coarse_bits_;           ///< [subspace]
    std::vector<std::uint8_t> tile_class_;     ///< [tile][subspace]
    std::vector<std::uint8_t> class_planes_;   ///< [subspace][class][group]
    std::vector<Index> class_bits_;            ///< [subspace][class]
    std::vector<Index> class_tiles_;           ///< [subspace][class]
    GainHistogram gains_;
};

}  // namespace kvplane::detail
