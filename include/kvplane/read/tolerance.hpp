// kvplane/read/tolerance.hpp: the fewest planes with which every head's output stays within an error (T13).
//
// Half of the tolerance goes to scores, shared out among channels evenly. Values get what the scores that
// were then read leave of it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "kvplane/read/importance.hpp"
#include "kvplane/read/plan.hpp"
#include "kvplane/read/planner.hpp"
#include "kvplane/read/value_importance.hpp"

namespace kvplane::detail {

class TolerancePlanner final : public ReadPlanner {
  public:
    void begin(const PlanContext& context) override {
        context_ = context;
        importance_.begin(context, GroupWeight::reach);
        planes_.begin(context);
        const DecodeShape& shape = context.shape;
        const auto workers = static_cast<std::size_t>(context.executor->workers()),
                   blocks = static_cast<std::size_t>(shape.row_blocks()),
                   chunks = static_cast<std::size_t>(shape.chunks());
        Index most = 0;
        const PageLayout& layout = *context.tiles->layout;
        for (Index s = 0; s < layout.subspaces(); ++s)
            most = std::max(most, plane_groups(layout.key_format(s)));
        groups_per_worker_ = most;
        groups_.resize(workers * static_cast<std::size_t>(most));
        gains_.resize(workers);
        least_.resize(blocks);
        whole_keys_.assign(chunks * blocks, 0);
        score_errors_.assign(chunks * blocks, 0.0);
        value_errors_.assign(chunks * blocks, 0.0);
    }

    Index keys(const PlanPlace& place, RowView<const float> queries, AttentionScratch& scratch,
               TileRead& read) noexcept override {
        const TileFormat& format = context_.tiles->layout->key_format_of_head(place.block.head);
        read.planes = key_planes(format, place, queries, scratch, read.tile);
        return bits_read(format, read.planes);
    }
    void scored(const PlanPlace& place, AttentionScratch& scratch) noexcept override {
        importance_.note(place, scratch);
    }
    /// They count too, because the bound is relative to the largest value.
    void unpacked(Index head, RowView<const float> values, Index channels) noexcept override {
        for (Index t = 0; t < values.rows; ++t)
            importance_.note_norm(context_.shape.chunks(), head,
                                  Eigen::Map<const Eigen::RowVectorXf>(values[t], channels).norm());
    }

    void choose_values(const ReadCount&) noexcept override {
        run_items(*context_.executor, context_.shape.row_blocks(), [this](Index index, Index worker) {
            const RowBlock block = context_.shape.row_block(index);
            importance_.combine(block, [](Index, float*) {});
            bound_values(block, gains_[static_cast<std::size_t>(worker)]);
        });
    }
    void values(const PlanPlace& place, std::uint8_t* planes) noexcept override {
        const Index block = place.block.index;
        importance_.choose(place.tile, block, least_[static_cast<std::size_t>(block)], planes);
        const PlaneSplit& split = importance_.split();
        std::array<float, PlaneSplit::max_planes + 1> reach{};
        for (int p = 0; p <= split.count; ++p) reach[static_cast<std::size_t>(p)] = unread_reach(split, p);
        const float* const importance = importance_.importance(place.tile, block);
        double& error = value_errors_[at(block, place.tile)];
        for (Index g = 0; g < importance_.groups(); ++g)
            error += static_cast<double>(importance[g]) * static_cast<double>(reach[planes[g]]);
    }

    void certify(ReadReport& report) const noexcept override {
        const DecodeShape& shape = context_.shape;
        for (Index block = 0; block < shape.row_blocks(); ++block) {
            const double norm = importance_.largest_norm(shape.row_block(block).head);
            double error = 2.0 * std::tanh(0.5 * score_error(block)) * norm;
            for (Index chunk = 0; chunk < shape.chunks(); ++chunk)
                error += value_errors_[static_cast<std::size_t>(block * shape.chunks() + chunk)];
            if (error == 0.0) continue;
            report.error_bound = std::max(report.error_bound, error);
            report.relative_error_bound = std::max(report.relative_error_bound, error / norm);
        }
    }

  private:
    /// The chunk of a tile, for a row block.
    std::size_t at(Index block, Index tile) const noexcept {
        return static_cast<std::size_t>(block * context_.shape.chunks() + tile / DecodeShape::chunk_tiles);
    }

    /// The fewest planes with which no score is off by more than half the tolerance allows; nullptr: all.
    const std::uint8_t* key_planes(const TileFormat& format, const PlanPlace& place,
                                   RowView<const float> queries, AttentionScratch& scratch,
                                   const std::byte* tile) noexcept {
        // Once one tile of a chunk needs all planes, the rest of the chunk is read whole: deciding costs as
        // much as reading.
        const std::size_t here = at(place.block.index, place.tile);
        if (whole_keys_[here]) return nullptr;
        PlaneGroup* const groups = groups_.data() + place.worker * groups_per_worker_;
        const Index count = plane_groups(format);
        key_importance(context_.isa, format, tile, queries, true, scratch.folded(), groups);
        // A softcap takes off a score's error, and never adds to it.
        const double scale =
            context_.score_scales[static_cast<std::size_t>(place.block.first / context_.shape.query_tokens)];
        double channels = 0.0, error = 0.0;
        bool whole = true;
        for (Index g = 0; g < count; ++g) channels += groups[g].size;
        const double allowed = 2.0 * std::atanh(std::min(0.25 * context_.policy.error, 0.999));
        std::uint8_t* const planes = planes_.of(place.worker);
        for (Index g = 0; g < count; ++g) {
            const PlaneGroup& group = groups[g];
            const double importance = scale * static_cast<double>(group.importance);
            const auto off = [&](int read) {
                return importance * static_cast<double>(unread_reach(group.split, read));
            };
            // Below its first plane an fp16 number is not one yet.
            int read = group.split.is_half() ? 1 : 0;
            while (read < group.split.count && !(off(read) * channels <= allowed * group.size)) ++read;
            planes[g] = static_cast<std::uint8_t>(read);
            whole = whole && read == group.split.count;
            error += off(read);
        }
        whole_keys_[here] = whole;
        if (whole) return nullptr;
        score_errors_[here] = std::max(score_errors_[here], error);
        return planes;
    }

    /// The least gain of a plane that is read, where what is not read may be off by what is left of the
    /// tolerance.
    void bound_values(const RowBlock& block, GainHistogram& gains) noexcept {
        const PlaneSplit& split = importance_.split();
        gains.clear();
        for (Index t = 0; t < context_.shape.tiles; ++t) {
            if (context_.tiles->hidden(t)) continue;
            const float* const importance = importance_.importance(t, block.index);
            for (Index g = 0; g < importance_.groups(); ++g)
                for (int p = 0; p < split.count; ++p) {
                    const float gain =
                        plane_gain(importance[g], importance_.worth()[static_cast<std::size_t>(p)]);
                    // What is off without the plane.
                    gains.add(gain, static_cast<double>(split[p]) * static_cast<double>(gain));
                }
        }
        const double left = context_.policy.error - 2.0 * std::tanh(0.5 * score_error(block.index));
        least_[static_cast<std::size_t>(block.index)] =
            gains.least_but(std::max(0.0, left) * importance_.largest_norm(block.head));
    }
    double score_error(Index block) const noexcept {
        const Index chunks = context_.shape.chunks();
        double most = 0.0;
        for (Index chunk = 0; chunk < chunks; ++chunk)
            most = std::max(most, score_errors_[static_cast<std::size_t>(block * chunks + chunk)]);
        return most;
    }

    PlanContext context_{};
    ValueImportance importance_;
    KeyPlanes planes_;
    Index groups_per_worker_ = 0;
    std::vector<PlaneGroup> groups_;        ///< [worker][group]
    std::vector<GainHistogram> gains_;      ///< [worker]
    std::vector<float> least_;              ///< [row block]
    std::vector<std::uint8_t> whole_keys_;  ///< [row block][chunk]
    std::vector<double> score_errors_;      ///< [row block][chunk] the largest of any tile
    std::vector<double> value_errors_;      ///< [row block][chunk] the sum over tiles
};

}  // namespace kvplane::detail
