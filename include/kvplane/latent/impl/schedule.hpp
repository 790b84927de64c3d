// kvplane/latent/impl/schedule.hpp: the frontier of schedules of one basis, and the choice over several.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "kvplane/allocate/bit_allocation.hpp"
#include "kvplane/error.hpp"
#include "kvplane/latent/schedule.hpp"
#include "kvplane/storage/planes.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane {

namespace detail {

inline void require_spectrum(const Eigen::VectorXd& spectrum) {
    require(spectrum.size() >= 1, ErrorCode::shape, "latent schedule: a spectrum of no latents");
    require(spectrum.allFinite(), ErrorCode::not_finite, "latent schedule: the spectrum is not finite");
    for (Index j = 0; j < spectrum.size(); ++j)
        require(spectrum[j] >= 0.0 && (j == 0 || spectrum[j] <= spectrum[j - 1]), ErrorCode::option,
                "latent schedule: the spectrum is ", spectrum[j], " at latent ", j,
                ", expected numbers that descend to 0 or more");
}

/// What all blocks of 16 tokens take of one unit of a plane.
inline constexpr Index plane_unit_bytes = tile_tokens / unit_lanes * unit_bytes;

/// Units of the planes of a run.
inline Index plane_units_of(Index channels, int bits) {
    if (bits == 0) return 0;
    Index units = 0;
    const PlaneSplit split = plane_split(bits);
    for (int p = 0; p < split.count; ++p) {
        const Index depth = TileFormat::unit_depth(split[p]);
        units += (channels + depth - 1) / depth;
    }
    return units;
}

/// Bytes that kept latents take beside their planes: grids, and their share of the basis.
inline double bytes_beside_planes(const ScheduleSettings& settings, Index kept) {
    return 64.0 * std::ceil(static_cast<double>(kept) * 4.0 / 64.0) +
           settings.basis_bytes_per_latent * static_cast<double>(kept);
}

/// Fills in the error and the bytes of a schedule.
inline void account(const Eigen::VectorXd& spectrum, const ScheduleSettings& settings,
                    LatentSchedule& schedule) {
    schedule.error = 0.0;
    Index at = 0, units = 0;
    for (const ChannelSegment& segment : schedule.segments) {
        schedule.error += spectrum.segment(at, segment.channels).sum() *
                          latent_grid_error[static_cast<std::size_t>(segment.bits)];
        units += plane_units_of(segment.channels, segment.bits);
        at += segment.channels;
    }
    schedule.bytes =
        static_cast<double>(units * plane_unit_bytes) + bytes_beside_planes(settings, schedule.kept());
}

inline void append_run(LatentSchedule& schedule, Index channels, int bits) {
    if (channels == 0) return;
    if (!schedule.segments.empty() && schedule.segments.back().bits == bits)
        schedule.segments.back().channels += channels;
    else
        schedule.segments.push_back({channels, bits});
}

/// Dynamic programming over (latents covered, units of planes spent), one width after the other, from wide
/// to narrow. What latents take beside planes follows from how many are covered, so that nothing is rounded
/// and the frontier is exact.
///
/// A run may end anywhere, but another begins at multiples of 8 alone, the depth of the shallowest unit: a
/// run that ends elsewhere and is followed by a narrower one can take a latent from it, which costs no
/// unit. Beyond 1024 latents both go in larger steps, so that time does not grow with more than their
/// number of units.
class ScheduleFrontier {
  public:
    ScheduleFrontier(const Eigen::VectorXd& spectrum, const ScheduleSettings& settings)
        : spectrum_(spectrum), settings_(settings), latents_(spectrum.size()) {
        energy_.assign(static_cast<std::size_t>(latents_ + 1), 0.0);
        for (Index i = 0; i < latents_; ++i)
            energy_[static_cast<std::size_t>(i + 1)] = energy_[static_cast<std::size_t>(i)] + spectrum[i];
        // More than all latents in the most bits is never better. A unit that is not full costs a run no
        // more than one of each plane.
        most_units_ = plane_units_of(latents_, settings.most_bits);
        grain_ = (latents_ + 1023) / 1024;
        step_ = 8 * grain_;
    }

    std::vector<LatentSchedule> run() {
        table_.assign(static_cast<std::size_t>((rows_of(latents_) + 1) * (most_units_ + 1)), Cell{});
        cell(0, 0).error = 0.0;
        for (int bits = settings_.most_bits; bits >= 1; --bits) pass(bits);
        return collect();
    }

  private:
    struct Cell {
        double error = std::numeric_limits<double>::infinity();  ///< of the latents covered
        /// [width] where the run of that width ends; 0: there is none.
        std::array<std::uint16_t, 9> end{};
    };

    Index rows_of(Index covered) const { return (covered + grain_ - 1) / grain_; }
    Cell& cell(Index covered, Index units) {
        return table_[static_cast<std::size_t>(rows_of(covered) * (most_units_ + 1) + units)];
    }

    /// Adds one run of this width, of any length, to every state without one.
    void pass(int bits) {
        std::vector<Cell> before;  // [place where a run begins][units]
        for (Index from = 0; from < latents_; from += step_)
            before.insert(before.end(), &cell(from, 0), &cell(from, 0) + most_units_ + 1);
        const double error = latent_grid_error[static_cast<std::size_t>(bits)];
        for (Index from = 0; from < latents_; from += step_) {
            const Cell* const source = before.data() + from / step_ * (most_units_ + 1);
            for (Index end = from, last = from; (end = std::min(end + grain_, latents_)) > last; last = end) {
                const Index cost = plane_units_of(end - from, bits);
                const double added = error * (energy_[static_cast<std::size_t>(end)] -
                                              energy_[static_cast<std::size_t>(from)]);
                for (Index units = 0; units + cost <= most_units_; ++units) {
                    Cell& target = cell(end, units + cost);
                    if (!(source[units].error + added < target.error)) continue;
                    target = source[units];
                    target.error += added;
                    target.end[static_cast<std::size_t>(bits)] = static_cast<std::uint16_t>(end);
                }
            }
        }
    }

    std::vector<LatentSchedule> collect() {
        struct Point {
            double bytes, error;
            const Cell* cell;
        };
        std::vector<Point> points;
        for (Index row = 0; row <= rows_of(latents_); ++row) {
            const Index covered = std::min(row * grain_, latents_);
            const double left = energy_.back() - energy_[static_cast<std::size_t>(covered)],
                         beside = bytes_beside_planes(settings_, covered);
            for (Index units = 0; units <= most_units_; ++units)
                if (const Cell& at = cell(covered, units); std::isfinite(at.error))
                    points.push_back(
                        {static_cast<double>(units * plane_unit_bytes) + beside, at.error + left, &at});
        }
        std::sort(points.begin(), points.end(), [](const Point& a, const Point& b) {
            return a.bytes != b.bytes ? a.bytes < b.bytes : a.error < b.error;
        });
        std::vector<LatentSchedule> frontier;
        double least = std::numeric_limits<double>::infinity();
        for (const Point& point : points) {
            if (!(point.error < least)) continue;
            least = point.error;
            LatentSchedule next = schedule(*point.cell);
            // The sums of the same numbers in another order.
            if (frontier.empty() || next.error < frontier.back().error) frontier.push_back(std::move(next));
        }
        return frontier;
    }

    LatentSchedule schedule(const Cell& cell) const {
        LatentSchedule schedule;
        Index at = 0;
        for (int bits = 8; bits >= 1; --bits)
            if (const Index end = cell.end[static_cast<std::size_t>(bits)]; end > 0) {
                append_run(schedule, end - at, bits);
                at = end;
            }
        append_run(schedule, latents_ - at, 0);
        account(spectrum_, settings_, schedule);
        return schedule;
    }

    const Eigen::VectorXd& spectrum_;
    ScheduleSettings settings_;
    Index latents_, most_units_ = 0;
    Index grain_ = 1, step_ = 8;  ///< where runs may end, and where they may begin
    std::vector<double> energy_;  ///< [latents] their variances, summed
    std::vector<Cell> table_;     ///< [latents covered / grain][units]
};

}  // namespace detail

KVPLANE_FUNCTION LatentSchedule grouped_schedule(const Eigen::VectorXd& spectrum, std::span<const int> widths,
                                                 const ScheduleSettings& settings) {
    detail::require_spectrum(spectrum);
    const auto groups = static_cast<Index>(widths.size());
    require(groups >= 1 && spectrum.size() % groups == 0, ErrorCode::shape,
            "latent schedule: ", spectrum.size(), " latents do not divide into ", groups, " equal groups");
    LatentSchedule schedule;
    for (std::size_t g = 0; g < widths.size(); ++g) {
        require(widths[g] >= 0 && widths[g] <= 8, ErrorCode::option, "latent schedule: group ", g, " has ",
                widths[g], " bits, expected 0 to 8");
        const int before = widths[g == 0 ? 0 : g - 1];
        require(widths[g] <= before, ErrorCode::option, "latent schedule: group ", g, " has ", widths[g],
                " bits, more than the ", before, " before it; expected the widest first");
        detail::append_run(schedule, spectrum.size() / groups, widths[g]);
    }
    detail::account(spectrum, settings, schedule);
    return schedule;
}

KVPLANE_FUNCTION std::vector<LatentSchedule> schedule_frontier(const Eigen::VectorXd& spectrum,
                                                               const ScheduleSettings& settings) {
    detail::require_spectrum(spectrum);
    require(settings.most_bits >= 1 && settings.most_bits <= 8 && settings.basis_bytes_per_latent >= 0.0 &&
                std::isfinite(settings.basis_bytes_per_latent),
            ErrorCode::option, "latent schedule: at most ", settings.most_bits, " bits and ",
            settings.basis_bytes_per_latent, " bytes a latent, expected 1 to 8 and a number of bytes");
    return detail::ScheduleFrontier(spectrum, settings).run();
}

KVPLANE_FUNCTION std::vector<LatentSchedule> best_schedules(std::span<const Eigen::VectorXd> spectra,
                                                            double bits, const ScheduleSettings& settings) {
    require(std::isfinite(bits) && bits >= 0.0, ErrorCode::option, "latent schedule: a budget of ", bits,
            " bits, expected 0 or more");
    std::vector<std::vector<LatentSchedule>> frontiers;
    std::vector<AllocationItem> items;
    double budget = 0.0;
    for (const Eigen::VectorXd& spectrum : spectra) {
        frontiers.push_back(schedule_frontier(spectrum, settings));
        AllocationItem& item = items.emplace_back();
        for (const LatentSchedule& schedule : frontiers.back())
            item.options.push_back({schedule.bytes, schedule.error});
        budget += bits / 8.0 * static_cast<double>(tile_tokens * spectrum.size());
    }
    const Allocation allocation = allocate(items, budget);
    std::vector<LatentSchedule> chosen;
    for (std::size_t i = 0; i < frontiers.size(); ++i) chosen.push_back(frontiers[i][allocation.choice[i]]);
    return chosen;
}

}  // namespace kvplane
