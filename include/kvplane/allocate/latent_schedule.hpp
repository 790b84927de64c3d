// kvplane/allocate/latent_schedule.hpp: how many bits each latent gets.
//
// A schedule is a list of runs of latents of one width, in the order of the spectrum, ending in runs of
// width 0. Two ways to get one:
//
//   grouped_schedule   equal groups of given widths, as SVDq publishes them (arXiv 2502.15304):
//                      (8,4,2,1,1,0,0,0) is 2 bits, (4,4,2,0,0,0,0,0) 1.25 bits
//   best_schedules     the least expected error under a budget of TRUE bits: planes with their padding,
//                      grids, and what the basis costs a tile
//
// Best schedules come in two steps. Within one basis, dynamic programming over runs gives the whole frontier
// of (bytes, error): runs, because a tile's planes hold 8 to 32 channels in a unit, so widths that change too
// often waste room. Then the one allocator (bit_allocation.hpp) picks a point of every frontier: over heads
// and layers together, or, for a single basis, the best that fits.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kvplane/allocate/bit_allocation.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/storage/planes.hpp"
#include "kvplane/storage/tile.hpp"

namespace kvplane {

/// Mean squared error of a latent of variance 1 and normal distribution, by width, on grids of 128 tokens
/// (cell up to 2 bits, min_max above). Measured by tests/allocate/latent_schedule_test.cpp. Grids fixed by
/// the spectrum would cost no bytes, but clip: on a real model they made ten times the divergence.
inline constexpr std::array<double, 9> latent_grid_error = {1.0,     .6152,    .1461,    .04576,  .009957,
                                                            .002331, .0005644, .0001389, 3.450e-5};

/// Widths of the latents of one basis.
struct LatentSchedule {
    std::vector<ChannelSegment> segments;  ///< in the order of the spectrum; widths 0 to 8
    double error = 0.0;                    ///< expected: sum of lambda_j latent_grid_error[b_j]
    double bytes = 0.0;                    ///< a tile's, and the basis' share

    Index channels() const noexcept {
        Index sum = 0;
        for (const ChannelSegment& segment : segments) sum += segment.channels;
        return sum;
    }
    /// Latents of a width above 0.
    Index kept() const noexcept {
        Index sum = 0;
        for (const ChannelSegment& segment : segments) sum += segment.bits > 0 ? segment.channels : 0;
        return sum;
    }
    /// Bits of the planes alone, without padding and grids.
    double nominal_bits() const noexcept {
        double sum = 0.0;
        for (const ChannelSegment& segment : segments)
            sum += static_cast<double>(segment.channels) * segment.bits;
        return channels() > 0 ? sum / static_cast<double>(channels()) : 0.0;
    }
    /// 8 bytes / (128 channels).
    double true_bits() const noexcept {
        return channels() > 0 ? 8.0 * bytes / static_cast<double>(tile_tokens * channels()) : 0.0;
    }
};

struct ScheduleSettings {
    /// Bytes of the basis that every kept latent adds to a tile: 0 for a basis that is part of the model.
    double basis_bytes_per_latent = 0.0;
    int most_bits = 8;
};

/// Equal groups of the given widths, most important first. Throws Error (shape) where the groups do not
/// divide the channels, (option) for a width beyond 8 or one that rises.
LatentSchedule grouped_schedule(const Eigen::VectorXd& spectrum, std::span<const int> widths,
                                const ScheduleSettings& settings = {});

/// All schedules of which none is better in both bytes and error, by bytes. The first one keeps nothing.
/// Throws Error (option, not_finite) for a spectrum that does not descend to 0 or more.
std::vector<LatentSchedule> schedule_frontier(const Eigen::VectorXd& spectrum,
                                              const ScheduleSettings& settings = {});

/// The best schedules of several bases (heads, layers) under a mean of `bits` true bits an element over all
/// of them. Throws as schedule_frontier and allocate.
std::vector<LatentSchedule> best_schedules(std::span<const Eigen::VectorXd> spectra, double bits,
                                           const ScheduleSettings& settings = {});
inline LatentSchedule best_schedule(const Eigen::VectorXd& spectrum, double bits,
                                    const ScheduleSettings& settings = {}) {
    return best_schedules({&spectrum, 1}, bits, settings).front();
}

// Implementation -------------------------------------------------------------------------------------------

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

/// Grids and the basis' share.
inline double bytes_per_latent(const ScheduleSettings& settings) {
    return settings.basis_bytes_per_latent + 4.0;
}

/// Fills in error and bytes.
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
/// Latents go in steps of at least 4, the least that any unit holds, so that a basis of any size has at most
/// 64 steps; bytes in 16ths of a kilobyte.
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
        /// Ends of the runs by width, in steps; 0: none of that width.
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

inline LatentSchedule grouped_schedule(const Eigen::VectorXd& spectrum, std::span<const int> widths,
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

inline std::vector<LatentSchedule> schedule_frontier(const Eigen::VectorXd& spectrum,
                                                     const ScheduleSettings& settings) {
    detail::require_spectrum(spectrum);
    require(settings.most_bits >= 1 && settings.most_bits <= 8 && settings.basis_bytes_per_latent >= 0.0 &&
                std::isfinite(settings.basis_bytes_per_latent),
            ErrorCode::option, "latent schedule: at most ", settings.most_bits, " bits and ",
            settings.basis_bytes_per_latent, " bytes a latent, expected 1 to 8 and a number of bytes");
    return detail::ScheduleFrontier(spectrum, settings).run();
}

inline std::vector<LatentSchedule> best_schedules(std::span<const Eigen::VectorXd> spectra, double bits,
                                                  const ScheduleSettings& settings) {
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
