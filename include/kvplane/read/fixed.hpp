// kvplane/read/fixed.hpp: of every code as many planes as fit into so many bits.
#pragma once

#include "kvplane/read/plan.hpp"
#include "kvplane/read/planner.hpp"

namespace kvplane::detail {

/// planes [groups]: as many of every group as fit into `bits`.
inline void fixed_planes(const TileFormat& format, double bits, std::uint8_t* planes) noexcept {
    for (const TileFormat::Placed& s : format.segments()) {
        if (s.bits == 0) continue;
        int fit = 0;
        while (fit < s.split.count && s.split.prefix_bits(fit + 1) <= bits) ++fit;
        const Index groups = plane_groups(s.split, grouped_elements(format, s));
        planes = std::fill_n(planes, groups, static_cast<std::uint8_t>(fit));
    }
}

class FixedPlanner final : public ReadPlanner {
  public:
    void begin(const PlanContext& context) override {
        context_ = context;
        planes_.begin(context);
    }
    Index keys(const PlanPlace& place, RowView<const float>, AttentionScratch&,
               TileRead& read) noexcept override {
        const TileFormat& format = context_.tiles->layout->key_format_of_head(place.block.head);
        std::uint8_t* const planes = planes_.of(place.worker);
        fixed_planes(format, context_.policy.key_bits, planes);
        read.planes = planes;
        read.wide_factors = wants_wide_factors(context_.policy.key_bits);
        return bits_read(format, planes);
    }
    bool values_wait() const noexcept override { return false; }
    void values(const PlanPlace&, std::uint8_t* planes) noexcept override {
        fixed_planes(context_.tiles->layout->values, context_.policy.value_bits, planes);
    }
    bool wide_values() const noexcept override { return wants_wide_factors(context_.policy.value_bits); }

  private:
    PlanContext context_{};
    KeyPlanes planes_;
};

}  // namespace kvplane::detail
