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

/// Bytes of the planes of a run.
inline double plane_bytes_of(Index channels, int bits) {
    if (bits == 0) return 0.0;
    Index bytes = 0;
    const PlaneSplit split = plane_split(bits);
    for (int p = 0; p < split.count; ++p) {
        const Index depth = TileFormat::unit_depth(split[p]);
        bytes += tile_tokens / unit_lanes * ((channels + depth - 1) / depth) * unit_bytes;
    }
    return static_cast<double>(bytes);
}

/// Bytes that each kept latent adds beside its planes: its grid and its share of the basis.
inline double bytes_per_latent(const ScheduleSettings& settings) {
    return settings.basis_bytes_per_latent + 4.0;
}

/// Fills in the error and the bytes of a schedule.
inline void account(const Eigen::VectorXd& spectrum, const ScheduleSettings& settings,
                    LatentSchedule& schedule) {
    schedule.error = schedule.bytes = 0.0;
    Index at = 0;
    for (const ChannelSegment& segment : schedule.segments) {
        schedule.error += spectrum.segment(at, segment.channels).sum() *
                          latent_grid_error[static_cast<std::size_t>(segment.bits)];
        schedule.bytes += plane_bytes_of(segment.channels, segment.bits);
        at += segment.channels;
    }
    schedule.bytes += 64.0 * std::ceil(static_cast<double>(schedule.kept()) * 4.0 / 64.0);
    schedule.bytes += settings.basis_bytes_per_latent * static_cast<double>(schedule.kept());
}

inline void append_run(LatentSchedule& schedule, Index channels, int bits) {
    if (channels == 0) return;
    if (!schedule.segments.empty() && schedule.segments.back().bits == bits)
        schedule.segments.back().channels += channels;
    else
        schedule.segments.push_back({channels, bits});
}

/// Dynamic programming over (latents covered, bytes spent), one width after the other, from wide to narrow.
/// Latents go in steps of at least 4, the least that any unit holds. Steps grow with the basis, so that a
/// basis of any size has at most 64 of them. Bytes are counted in units of 64.
class ScheduleFrontier {
  public:
    ScheduleFrontier(const Eigen::VectorXd& spectrum, const ScheduleSettings& settings)
        : spectrum_(spectrum), settings_(settings) {
        const Index channels = spectrum.size();
        step_ = 4;
        while ((channels + step_ - 1) / step_ > 64) step_ += 4;
        steps_ = (channels + step_ - 1) / step_;
        energy_.assign(static_cast<std::size_t>(steps_ + 1), 0.0);
        for (Index i = 0; i < steps_; ++i)
            energy_[static_cast<std::size_t>(i + 1)] =
                energy_[static_cast<std::size_t>(i)] + spectrum.segment(i * step_, size(i, 1)).sum();
        const double all =
            plane_bytes_of(channels, 8) * 1.5 + bytes_per_latent(settings) * static_cast<double>(channels);
        spent_ = static_cast<Index>(std::ceil(all / unit)) + 1;
    }

    std::vector<LatentSchedule> run() {
        table_.assign(static_cast<std::size_t>((steps_ + 1) * spent_), Cell{});
        cell(0, 0).error = 0.0;
        for (int bits = settings_.most_bits; bits >= 1; --bits) pass(bits);
        return collect();
    }

  private:
    static constexpr double unit = 64.0;
    struct Cell {
        double error = std::numeric_limits<double>::infinity();
        /// [width] where the run of that width ends, in steps; 0: there is none.
        std::array<std::uint8_t, 9> end{};
    };

    Cell& cell(Index covered, Index spent) {
        return table_[static_cast<std::size_t>(covered * spent_ + spent)];
    }
    Index size(Index first, Index steps) const {
        return std::min(spectrum_.size(), (first + steps) * step_) - first * step_;
    }

    /// Adds one run of this width, of any length, to every state.
    void pass(int bits) {
        const std::vector<Cell> before = table_;
        const double error = latent_grid_error[static_cast<std::size_t>(bits)];
        for (Index steps = 1; steps <= steps_; ++steps)
            for (Index from = 0; from + steps <= steps_; ++from) {
                const Index channels = size(from, steps);
                const auto cost = static_cast<Index>(
                    std::ceil((plane_bytes_of(channels, bits) +
                               bytes_per_latent(settings_) * static_cast<double>(channels)) /
                              unit));
                const double added = error * (energy_[static_cast<std::size_t>(from + steps)] -
                                              energy_[static_cast<std::size_t>(from)]);
                const Cell* const source = before.data() + from * spent_;
                Cell* const target = table_.data() + (from + steps) * spent_ + cost;
                for (Index spent = 0; spent + cost < spent_; ++spent)
                    if (source[spent].error + added < target[spent].error) {
                        target[spent] = source[spent];
                        target[spent].error += added;
                        target[spent].end[static_cast<std::size_t>(bits)] =
                            static_cast<std::uint8_t>(from + steps);
                    }
            }
    }

    std::vector<LatentSchedule> collect() {
        std::vector<LatentSchedule> all;
        for (Index covered = 0; covered <= steps_; ++covered)
            for (Index spent = 0; spent < spent_; ++spent)
                if (std::isfinite(cell(covered, spent).error)) all.push_back(schedule(cell(covered, spent)));
        std::sort(all.begin(), all.end(), [](const LatentSchedule& a, const LatentSchedule& b) {
            return a.bytes != b.bytes ? a.bytes < b.bytes : a.error < b.error;
        });
        std::vector<LatentSchedule> frontier;
        for (LatentSchedule& candidate : all)
            if (frontier.empty() || candidate.error < frontier.back().error)
                frontier.push_back(std::move(candidate));
        return frontier;
    }

    LatentSchedule schedule(const Cell& cell) const {
        LatentSchedule schedule;
        Index at = 0;
        for (int bits = 8; bits >= 1; --bits)
            if (const Index end = cell.end[static_cast<std::size_t>(bits)]; end > 0) {
                append_run(schedule, size(at, end - at), bits);
                at = end;
            }
        append_run(schedule, spectrum_.size() - std::min(spectrum_.size(), at * step_), 0);
        account(spectrum_, settings_, schedule);
        return schedule;
    }

    const Eigen::VectorXd& spectrum_;
    ScheduleSettings settings_;
    Index step_, steps_, spent_;
    std::vector<double> energy_;
    std::vector<Cell> table_;
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
