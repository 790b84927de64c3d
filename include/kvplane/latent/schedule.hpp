// kvplane/latent/schedule.hpp: how many bits each latent gets.
//
// A schedule is a list of runs of latents of one width, in the order of the spectrum. Runs of width 0 come
// last. There are two ways to get a schedule:
//
//   grouped_schedule   equal groups of given widths, as SVDq publishes them (arXiv 2502.15304):
//                      (8,4,2,1,1,0,0,0) is 2 bits, (4,4,2,0,0,0,0,0) 1.25 bits
//   best_schedules     the least expected error under a budget of TRUE bits: planes with their padding,
//                      grids, and what the basis costs per tile
//
// Best schedules are found in two steps. Within one basis, dynamic programming over runs gives the whole
// frontier of (bytes, error), exactly for up to 1024 latents. It works on runs because a tile's planes hold
// 8 to 32 channels in a unit, so widths that change too often waste room. Then the one allocator
// (bit_allocation.hpp) picks a point of every frontier, over heads and layers together. For a single basis
// this is the best point that fits.
#pragma once

#include <array>
#include <span>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane {

/// [width in bits] mean squared error of a normally distributed latent of variance 1, on grids of 128 tokens
/// (cell up to 2 bits, min_max above). Measured by tests/latent/schedule_test.cpp. Grids fixed by the
/// spectrum would cost no bytes, but they clip: on a real model they made ten times the divergence.
inline constexpr std::array<double, 9> latent_grid_error = {1.0,     .6152,    .1461,    .04576,  .009957,
                                                            .002331, .0005644, .0001389, 3.450e-5};

/// Widths of the latents of one basis.
struct LatentSchedule {
    std::vector<ChannelSegment> segments;  ///< in the order of the spectrum; widths 0 to 8
    double error = 0.0;                    ///< expected: sum of lambda_j latent_grid_error[b_j]
    double bytes = 0.0;                    ///< of a tile, with the basis' share

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
    /// True bits per element: 8 * bytes / (128 * channels).
    double true_bits() const noexcept {
        return channels() > 0 ? 8.0 * bytes / static_cast<double>(tile_tokens * channels()) : 0.0;
    }
};

struct ScheduleSettings {
    /// Bytes of the basis that every kept latent adds to a tile: 0 for a basis that is part of the model.
    double basis_bytes_per_latent = 0.0;
    int most_bits = 8;
};

/// Equal groups of the given widths, most important first. Throws Error: shape if the groups do not divide
/// the channels, option for a width beyond 8 or one that rises.
LatentSchedule grouped_schedule(const Eigen::VectorXd& spectrum, std::span<const int> widths,
                                const ScheduleSettings& settings = {});

/// The schedules that no other beats in both bytes and error, in ascending order of bytes. The first one
/// keeps nothing. Throws Error (option, not_finite) for a spectrum that does not descend to 0 or more.
std::vector<LatentSchedule> schedule_frontier(const Eigen::VectorXd& spectrum,
                                              const ScheduleSettings& settings = {});

/// The best schedules of several bases (heads, layers) that take at most `bits` true bits per element, on
/// average over all of them. Throws as schedule_frontier and allocate.
std::vector<LatentSchedule> best_schedules(std::span<const Eigen::VectorXd> spectra, double bits,
                                           const ScheduleSettings& settings = {});
inline LatentSchedule best_schedule(const Eigen::VectorXd& spectrum, double bits,
                                    const ScheduleSettings& settings = {}) {
    return best_schedules({&spectrum, 1}, bits, settings).front();
}

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/latent/impl/schedule.hpp"
#endif
