// Schedules of latents: the errors they count with, measured; the bytes they count with, those of TileFormat;
// the frontier against brute force; the best schedules against grouped ones, uniform ones, and the limit
// (T9).
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kvplane/latent/schedule.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/theory/bounds.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::ChannelSegment;
using kvplane::ErrorCode;
using kvplane::Index;
using kvplane::LatentSchedule;
using kvplane::ScheduleSettings;
using kvplane::Scheme;
using kvplane::TileFormat;
using kvplane::TileSide;
using kvplane_test::Random;
using kvplane_test::refusal;
namespace theory = kvplane::theory;

constexpr std::array<int, 8> two_bits{8, 4, 2, 1, 1, 0, 0, 0};  // arXiv 2502.15304
constexpr std::array<int, 8> one_and_a_quarter{4, 4, 2, 0, 0, 0, 0, 0};

Eigen::VectorXd decaying(Index latents, double decay, double first = 1.0) {
    Eigen::VectorXd spectrum(latents);
    for (Index j = 0; j < latents; ++j)
        spectrum[j] = first * std::exp(-decay * static_cast<double>(j) / static_cast<double>(latents));
    return spectrum;
}

/// Descending, with jumps and ties.
Eigen::VectorXd irregular(Index latents, Random& random) {
    std::uniform_real_distribution<double> exponent(-6.0, 2.0);
    Eigen::VectorXd spectrum(latents);
    for (double& variance : spectrum) variance = std::exp(std::round(4.0 * exponent(random)) / 4.0);
    std::sort(spectrum.begin(), spectrum.end(), std::greater<>());
    return spectrum;
}

/// What a tile takes for the planes of these segments.
Index tile_plane_bytes(const std::vector<ChannelSegment>& segments) {
    const TileFormat format(TileSide::keys, segments, {.scheme = Scheme::cell});
    Index bytes = 0;
    for (const TileFormat::Placed& segment : format.segments())
        for (int p = 0; p < segment.split.count; ++p) bytes += format.plane_bytes(segment, segment.split[p]);
    return bytes;
}

/// Bytes and error of a schedule from first principles.
double counted_bytes(const LatentSchedule& schedule, double basis_bytes_per_latent) {
    Index kept = 0;
    for (const ChannelSegment& segment : schedule.segments)
        if (segment.bits > 0) kept += segment.channels;
    const Index grids = (4 * kept + 63) / 64 * 64;  // fp16 step and lower, from a multiple of 64 bytes to one
    return static_cast<double>(tile_plane_bytes(schedule.segments) + grids) +
           basis_bytes_per_latent * static_cast<double>(kept);
}
double counted_error(const LatentSchedule& schedule, const Eigen::VectorXd& spectrum) {
    double error = 0;
    Index at = 0;
    for (const ChannelSegment& segment : schedule.segments)
        for (Index j = 0; j < segment.channels; ++j)
            error += spectrum[at++] * kvplane::latent_grid_error[static_cast<std::size_t>(segment.bits)];
    return error;
}

// -- The table --------------------------------------------------------------------------------------------

/// Tiles of 128 normal values in the library's own grids, as latents are stored.
TEST(LatentGridError, IsWhatGridsMake) {
    Random random(kvplane_test::seed());
    std::normal_distribution<float> normal;
    constexpr int tiles = 60000;
    std::array<double, 9> sum{};
    for (int tile = 0; tile < tiles; ++tile) {
        std::array<float, 128> values{};
        for (float& value : values) value = normal(random);
        const auto [least, most] = std::minmax_element(values.begin(), values.end());
        const float low = *least, high = *most;
        for (int bits = 1; bits <= 8; ++bits) {
            const kvplane::Grid grid =
                kvplane::fit_grid(bits <= 2 ? Scheme::cell : Scheme::min_max, bits, low, high);
            for (const float value : values) {
                const double error = value - grid.decode(grid.encode(value));
                sum[static_cast<std::size_t>(bits)] += error * error;
            }
        }
    }
    EXPECT_EQ(kvplane::latent_grid_error[0], 1.0);
    for (std::size_t bits = 1; bits <= 8; ++bits) {
        const double measured = sum[bits] / (128.0 * tiles);
        EXPECT_NEAR(kvplane::latent_grid_error[bits] / measured, 1.0, 0.005) << bits << " bits: " << measured;
    }
}

TEST(LatentGridError, TheBetterSchemeAtEachWidth) {
    Random random(kvplane_test::seed());
    std::normal_distribution<float> normal;
    std::array<std::array<double, 9>, 2> sum{};
    for (int tile = 0; tile < 2000; ++tile) {
        std::array<float, 128> values{};
        for (float& value : values) value = normal(random);
        const auto [least, most] = std::minmax_element(values.begin(), values.end());
        for (int bits = 1; bits <= 8; ++bits)
            for (const Scheme scheme : {Scheme::cell, Scheme::min_max}) {
                const kvplane::Grid grid = kvplane::fit_grid(scheme, bits, *least, *most);
                for (const float value : values) {
                    const double error = value - grid.decode(grid.encode(value));
                    sum[scheme == Scheme::cell ? 0 : 1][static_cast<std::size_t>(bits)] += error * error;
                }
            }
    }
    for (std::size_t bits = 1; bits <= 2; ++bits) EXPECT_LT(sum[0][bits], 0.9 * sum[1][bits]) << bits;
    // Above, the two draw together; the schedules use min_max, which keeps the extreme values that attention
    // looks at.
    for (std::size_t bits = 3; bits <= 8; ++bits) EXPECT_LT(sum[1][bits], 1.35 * sum[0][bits]) << bits;
}

TEST(LatentGridError, FallsWithEveryBitAndStaysAboveTheLimit) {
    for (std::size_t bits = 1; bits <= 8; ++bits) {
        EXPECT_LT(kvplane::latent_grid_error[bits], kvplane::latent_grid_error[bits - 1]);
        EXPECT_GT(kvplane::latent_grid_error[bits], std::pow(4.0, -static_cast<double>(bits)));
    }
}

// -- Grouped schedules ------------------------------------------------------------------------------------

TEST(GroupedSchedule, ThePapersSchedules) {
    const Eigen::VectorXd spectrum = decaying(512, 6.0, 3.0);
    const LatentSchedule two = kvplane::grouped_schedule(spectrum, two_bits);
    EXPECT_EQ(two.nominal_bits(), 2.0);
    EXPECT_EQ(two.channels(), 512);
    EXPECT_EQ(two.kept(), 320);
    ASSERT_EQ(two.segments.size(), 5u) << "neighbours of one width are one run";
    const std::array<ChannelSegment, 5> runs{{{64, 8}, {64, 4}, {64, 2}, {128, 1}, {192, 0}}};
    for (std::size_t i = 0; i < 5; ++i) {
        EXPECT_EQ(two.segments[i].channels, runs[i].channels);
        EXPECT_EQ(two.segments[i].bits, runs[i].bits);
    }
    const LatentSchedule less = kvplane::grouped_schedule(spectrum, one_and_a_quarter);
    EXPECT_EQ(less.nominal_bits(), 1.25);
    EXPECT_EQ(less.kept(), 192);
    // No padding here: the widths and (4 bytes a latent kept) / (128 tokens) of grids.
    EXPECT_EQ(two.true_bits(), 2.0 + 320.0 / 512.0 * 0.25);
    EXPECT_EQ(less.true_bits(), 1.25 + 192.0 / 512.0 * 0.25);
    // With a basis in fp16 for 4096 tokens, 32 tiles.
    const LatentSchedule with_basis =
        kvplane::grouped_schedule(spectrum, two_bits, {.basis_bytes_per_latent = 512.0 * 2.0 / 32.0});
    EXPECT_EQ(with_basis.true_bits(), two.true_bits() + 16.0 * 320.0 / 4096.0);
    EXPECT_EQ(with_basis.error, two.error);
}

TEST(GroupedSchedule, CountsErrorsAndBytes) {
    Random random(kvplane_test::seed());
    for (const Index latents : {8, 40, 64, 192, 256}) {
        const Eigen::VectorXd spectrum = irregular(latents, random);
        for (const auto& widths : {two_bits, one_and_a_quarter, {7, 6, 5, 3, 3, 2, 1, 1}, {}})
            for (const double basis : {0.0, 12.5}) {
                const LatentSchedule schedule =
                    kvplane::grouped_schedule(spectrum, widths, {.basis_bytes_per_latent = basis});
                EXPECT_NEAR(schedule.error, counted_error(schedule, spectrum), 1e-12 * spectrum.sum());
                EXPECT_DOUBLE_EQ(schedule.bytes, counted_bytes(schedule, basis));
                EXPECT_EQ(schedule.nominal_bits(), theory::schedule_rate(widths));
            }
    }
}

/// Without a basis a schedule takes what a tile of its segments takes, padding and grids counted.
TEST(GroupedSchedule, BytesAreThoseOfATile) {
    for (const Index latents : {8, 40, 64, 104, 192, 512})
        for (const auto& widths : {two_bits, one_and_a_quarter, {7, 6, 5, 3, 2, 1, 0, 0}, {}}) {
            const LatentSchedule schedule = kvplane::grouped_schedule(decaying(latents, 5.0), widths);
            const TileFormat format(TileSide::keys, schedule.segments, {.scheme = Scheme::cell});
            EXPECT_EQ(schedule.bytes, static_cast<double>(format.bytes())) << latents;
            EXPECT_EQ(schedule.true_bits(), format.bits_per_element()) << latents;
        }
}

TEST(GroupedSchedule, Refusals) {
    const Eigen::VectorXd spectrum = decaying(64, 3.0);
    const auto grouped = [&](const std::vector<int>& widths) {
        return [&spectrum, widths] { kvplane::grouped_schedule(spectrum, widths); };
    };
    EXPECT_NE(refusal(ErrorCode::shape, grouped({4, 2, 0})).find("64 latents do not divide into 3"),
              std::string::npos);
    refusal(ErrorCode::shape, grouped({}));
    EXPECT_NE(refusal(ErrorCode::option, grouped({4, 2, 3, 0})).find("group 2"), std::string::npos);
    refusal(ErrorCode::option, grouped({9, 4}));
    refusal(ErrorCode::option, grouped({16, 4}));
    refusal(ErrorCode::option, grouped({4, -1}));
}

// -- The frontier -----------------------------------------------------------------------------------------

/// Least error by bytes of all schedules with the given step between runs, none dominated: brute force.
std::map<double, double> brute_force_frontier(const Eigen::VectorXd& spectrum, Index step,
                                              const ScheduleSettings& settings) {
    const Index latents = spectrum.size();
    std::vector<std::vector<double>> planes(9,
                                            std::vector<double>(static_cast<std::size_t>(latents + 1), 0.0));
    for (int bits = 1; bits <= 8; ++bits)
        for (Index n = 1; n <= latents; ++n)
            planes[static_cast<std::size_t>(bits)][static_cast<std::size_t>(n)] =
                static_cast<double>(tile_plane_bytes({{n, bits}}));
    std::map<double, double> best;
    // Every composition into runs of falling width.
    const std::function<void(Index, int, double, double)> extend = [&](Index at, int below, double bytes,
                                                                       double error) {
        const double grids = 64.0 * std::ceil(4.0 * static_cast<double>(at) / 64.0);
        const double all = bytes + grids + settings.basis_bytes_per_latent * static_cast<double>(at);
        const double with_rest = error + spectrum.tail(latents - at).sum();
        const auto [place, is_new] = best.try_emplace(all, with_rest);
        if (!is_new) place->second = std::min(place->second, with_rest);
        for (int bits = below - 1; bits >= 1; --bits)
            for (Index end = std::min(at + step, latents); at < latents;
                 end = std::min(end + step, latents)) {
                extend(end, bits,
                       bytes + planes[static_cast<std::size_t>(bits)][static_cast<std::size_t>(end - at)],
                       error + kvplane::latent_grid_error[static_cast<std::size_t>(bits)] *
                                   spectrum.segment(at, end - at).sum());
                if (end == latents) break;
            }
    };
    extend(0, settings.most_bits + 1, 0.0, 0.0);
    double least = std::numeric_limits<double>::infinity();
    std::erase_if(best, [&](const auto& point) {
        if (point.second >= least * (1.0 - 1e-13)) return true;
        least = point.second;
        return false;
    });
    return best;
}

/// Runs may begin anywhere: steps of 4 lose nothing where the basis is free, as planes hold at least 8
/// channels in a unit and grids 16 in 64 bytes.
TEST(ScheduleFrontier, EqualsBruteForceOverAllRuns) {
    Random random(kvplane_test::seed());
    for (const Index latents : {1, 3, 8, 11, 12, 16})
        for (const int most_bits : {8, 4}) {
            const Eigen::VectorXd spectrum = irregular(latents, random);
            const ScheduleSettings settings{.most_bits = most_bits};
            const auto expected = brute_force_frontier(spectrum, 1, settings);
            const auto frontier = kvplane::schedule_frontier(spectrum, settings);
            ASSERT_EQ(frontier.size(), expected.size()) << latents << " latents, " << most_bits << " bits";
            std::size_t i = 0;
            for (const auto& [bytes, error] : expected) {
                EXPECT_DOUBLE_EQ(frontier[i].bytes, bytes);
                EXPECT_NEAR(frontier[i].error, error, 1e-12 * spectrum.sum());
                ++i;
            }
        }
}

TEST(ScheduleFrontier, EqualsBruteForceOverRunsOfFours) {
    Random random(kvplane_test::seed());
    for (const Index latents : {32, 40, 64}) {
        const Eigen::VectorXd spectrum = latents == 40 ? decaying(latents, 4.0) : irregular(latents, random);
        const auto expected = brute_force_frontier(spectrum, 4, {});
        const auto frontier = kvplane::schedule_frontier(spectrum);
        ASSERT_EQ(frontier.size(), expected.size());
        std::size_t i = 0;
        for (const auto& [bytes, error] : expected) {
            EXPECT_DOUBLE_EQ(frontier[i].bytes, bytes);
            EXPECT_NEAR(frontier[i].error, error, 1e-12 * spectrum.sum());
            ++i;
        }
    }
}

/// Whatever a latent of the basis costs, so that runs end anywhere.
TEST(ScheduleFrontier, EqualsBruteForceWithABasis) {
    Random random(kvplane_test::seed());
    for (const Index latents : {5, 16, 19})
        for (const double basis : {1.0, 21.0, 33.0, 33.3, 500.0}) {
            SCOPED_TRACE(testing::Message() << latents << " latents, basis " << basis);
            const Eigen::VectorXd spectrum =
                latents == 16 ? decaying(latents, 5.0) : irregular(latents, random);
            const ScheduleSettings settings{.basis_bytes_per_latent = basis,
                                            .most_bits = latents == 19 ? 5 : 8};
            const auto expected = brute_force_frontier(spectrum, 1, settings);
            const auto frontier = kvplane::schedule_frontier(spectrum, settings);
            ASSERT_EQ(frontier.size(), expected.size());
            std::size_t i = 0;
            for (const auto& [bytes, error] : expected) {
                EXPECT_NEAR(frontier[i].bytes, bytes, 1e-9 * bytes);
                EXPECT_NEAR(frontier[i].error, error, 1e-12 * spectrum.sum());
                ++i;
            }
        }
}

/// Where runs are longer than units: no schedule of two runs, ending anywhere, beats the frontier.
TEST(ScheduleFrontier, BeatsEveryPairOfRunsWithABasis) {
    Random random(kvplane_test::seed());
    for (const Eigen::VectorXd& spectrum : {decaying(64, 10.0), irregular(100, random)}) {
        const ScheduleSettings settings{.basis_bytes_per_latent = 33.0};
        const auto frontier = kvplane::schedule_frontier(spectrum, settings);
        for (int wide = 1; wide <= 8; ++wide)
            for (int narrow = 0; narrow < wide; ++narrow)
                for (Index first = 1; first <= spectrum.size(); ++first)
                    for (Index end = first; end <= (narrow > 0 ? spectrum.size() : first); ++end) {
                        LatentSchedule rival{.segments = {{first, wide}}};
                        if (end > first) rival.segments.push_back({end - first, narrow});
                        if (end < spectrum.size()) rival.segments.push_back({spectrum.size() - end, 0});
                        const double bytes = counted_bytes(rival, settings.basis_bytes_per_latent),
                                     error = counted_error(rival, spectrum);
                        const auto above = std::partition_point(
                            frontier.begin(), frontier.end(),
                            [&](const LatentSchedule& s) { return s.bytes <= bytes * (1.0 + 1e-12); });
                        ASSERT_NE(above, frontier.begin());
                        ASSERT_LE(std::prev(above)->error, error * (1.0 + 1e-12))
                            << first << "x" << wide << " to " << end << " x" << narrow;
                    }
    }
}

/// 12x4 52x0 was chosen here when runs ended at multiples of 4.
TEST(BestSchedule, EndsItsLastRunAnywhere) {
    const Eigen::VectorXd spectrum = Eigen::VectorXd::NullaryExpr(
        64, [](Index j) { return std::exp(-10.0 * static_cast<double>(j) / 64.0); });
    const LatentSchedule rival{.segments = {{15, 4}, {49, 0}}};
    const LatentSchedule best = kvplane::best_schedule(spectrum, 1.55, {.basis_bytes_per_latent = 33.0});
    EXPECT_LE(best.true_bits(), 1.55);
    EXPECT_LE(best.error, counted_error(rival, spectrum) * (1.0 + 1e-12));
}

/// Every point is a schedule that says what it is, and better than its predecessor.
TEST(ScheduleFrontier, IsOneOfConsistentSchedules) {
    Random random(kvplane_test::seed());
    for (const Index latents : {1, 5, 64, 100, 192, 260, 576, 1100})
        for (const double basis : {0.0, 40.0}) {
            SCOPED_TRACE(testing::Message() << latents << " latents, basis " << basis);
            const Eigen::VectorXd spectrum = irregular(latents, random);
            const auto frontier = kvplane::schedule_frontier(spectrum, {.basis_bytes_per_latent = basis});
            ASSERT_GE(frontier.size(), 2u);
            EXPECT_EQ(frontier[0].kept(), 0);
            EXPECT_EQ(frontier[0].bytes, 0.0);
            EXPECT_NEAR(frontier[0].error, spectrum.sum(), 1e-12 * spectrum.sum());
            EXPECT_NEAR(frontier.back().error, spectrum.sum() * kvplane::latent_grid_error[8],
                        1e-12 * spectrum.sum());
            for (std::size_t i = 0; i < frontier.size(); ++i) {
                const LatentSchedule& schedule = frontier[i];
                EXPECT_EQ(schedule.channels(), latents);
                EXPECT_DOUBLE_EQ(schedule.bytes, counted_bytes(schedule, basis));
                EXPECT_NEAR(schedule.error, counted_error(schedule, spectrum), 1e-12 * spectrum.sum());
                if (basis == 0.0) {
                    const TileFormat format(TileSide::keys, schedule.segments, {.scheme = Scheme::cell});
                    EXPECT_EQ(schedule.bytes, static_cast<double>(format.bytes()));
                }
                for (std::size_t s = 1; s < schedule.segments.size(); ++s)
                    EXPECT_LT(schedule.segments[s].bits, schedule.segments[s - 1].bits);
                if (i == 0) continue;
                EXPECT_GT(schedule.bytes, frontier[i - 1].bytes);
                EXPECT_LT(schedule.error, frontier[i - 1].error);
            }
        }
}

/// T9: no point beats the limit of the bits in its planes, and at high rate they come near it.
TEST(ScheduleFrontier, StaysAboveTheWaterFillingLimit) {
    Random random(kvplane_test::seed());
    for (const Eigen::VectorXd& spectrum :
         {decaying(64, 3.0), decaying(64, 12.0), decaying(192, 9.0, 1e4), irregular(64, random)}) {
        double nearest = std::numeric_limits<double>::infinity();
        for (const LatentSchedule& schedule : kvplane::schedule_frontier(spectrum)) {
            const double limit = theory::reverse_water_filling(spectrum, schedule.nominal_bits()).distortion;
            EXPECT_GE(schedule.error, limit * (1.0 - 1e-12)) << schedule.nominal_bits() << " bits";
            if (schedule.kept() > 0) nearest = std::min(nearest, schedule.error / limit);
        }
        EXPECT_LT(nearest, 3.5);
    }
}

TEST(ScheduleFrontier, LatentsWithoutVarianceGetNothing) {
    Eigen::VectorXd spectrum = decaying(64, 3.0);
    spectrum.tail(40).setZero();
    for (const LatentSchedule& schedule : kvplane::schedule_frontier(spectrum))
        EXPECT_LE(schedule.kept(), 24);
    const auto nothing = kvplane::schedule_frontier(Eigen::VectorXd::Zero(8));
    ASSERT_EQ(nothing.size(), 1u);
    EXPECT_EQ(nothing[0].bytes, 0.0);
}

// -- Best schedules ---------------------------------------------------------------------------------------

TEST(BestSchedule, IsNeverWorseThanGroupedOrUniform) {
    Random random(kvplane_test::seed());
    double most_gained = 1.0;
    for (const Eigen::VectorXd& spectrum : {decaying(64, 3.0), decaying(64, 12.0), decaying(192, 6.0),
                                            irregular(64, random), irregular(192, random)}) {
        std::vector<std::vector<int>> rivals{{8, 4, 2, 1, 1, 0, 0, 0},
                                             {4, 4, 2, 0, 0, 0, 0, 0},
                                             {8, 6, 4, 3, 2, 2, 1, 0},
                                             {5, 5, 5, 5, 0, 0, 0, 0},
                                             {3, 3, 3, 3, 3, 3, 0, 0}};
        for (int bits = 0; bits <= 8; ++bits) rivals.push_back({bits});
        for (const std::vector<int>& widths : rivals) {
            const LatentSchedule rival = kvplane::grouped_schedule(spectrum, widths);
            const LatentSchedule best = kvplane::best_schedule(spectrum, rival.true_bits());
            EXPECT_LE(best.bytes, rival.bytes * (1.0 + 1e-9));
            EXPECT_LE(best.error, rival.error * (1.0 + 1e-12));
            most_gained = std::max(most_gained, rival.error / best.error);
        }
    }
    EXPECT_GT(most_gained, 10.0) << "uniform widths waste what a spectrum offers";
}

/// "The library's own schedule must be the best integer one" (T9): of all schedules in 8 equal groups with a
/// mean of 1.25 or 2 bits none beats it at the same bytes.
TEST(BestSchedule, BeatsEveryScheduleOfEightGroups) {
    for (const double rho : {.2, .3, .4, .5, .8}) {
        const Eigen::VectorXd spectrum = decaying(64, -8.0 * std::log(rho));
        const auto frontier = kvplane::schedule_frontier(spectrum);
        int tried = 0;
        std::vector<int> widths;
        const std::function<void(int, int)> extend = [&](int left, int most) {
            if (widths.size() == 8) {
                if (left > 0) return;
                ++tried;
                const LatentSchedule rival = kvplane::grouped_schedule(spectrum, widths);
                EXPECT_TRUE(std::any_of(frontier.begin(), frontier.end(), [&](const LatentSchedule& s) {
                    return s.bytes <= rival.bytes && s.error <= rival.error * (1.0 + 1e-12);
                }));
                return;
            }
            for (int bits = std::min(left, most); bits >= 0; --bits) {
                widths.push_back(bits);
                extend(left - bits, bits);
                widths.pop_back();
            }
        };
        extend(10, 8);
        extend(16, 8);
        EXPECT_GT(tried, 100);
    }
}

TEST(BestSchedule, KeepsItsBudgetAndUsesIt) {
    const Eigen::VectorXd spectrum = decaying(64, 6.0);
    double last_error = std::numeric_limits<double>::infinity();
    for (double bits = 0.0; bits <= 10.0; bits += 0.25) {
        const LatentSchedule best = kvplane::best_schedule(spectrum, bits);
        EXPECT_LE(best.true_bits(), bits * (1.0 + 1e-9));
        EXPECT_LE(best.error, last_error) << "more bits, more error";
        last_error = best.error;
        if (bits == 0.0) {
            EXPECT_EQ(best.kept(), 0);
        }
    }
    EXPECT_NEAR(last_error, spectrum.sum() * kvplane::latent_grid_error[8], 1e-12);
}

TEST(BestSchedules, TogetherAreNeverWorseThanAlone) {
    Random random(kvplane_test::seed());
    const std::vector<Eigen::VectorXd> spectra{decaying(64, 9.0, 100.0), decaying(64, 2.0),
                                               irregular(64, random), decaying(32, 6.0, 0.01)};
    double most_gained = 1.0;
    for (const double bits : {0.5, 1.0, 1.25, 2.0, 3.0}) {
        const auto together = kvplane::best_schedules(spectra, bits);
        ASSERT_EQ(together.size(), spectra.size());
        double error = 0, alone = 0, bytes = 0, channels = 0;
        for (std::size_t i = 0; i < spectra.size(); ++i) {
            EXPECT_NEAR(together[i].error, counted_error(together[i], spectra[i]), 1e-12 * spectra[i].sum());
            error += together[i].error;
            bytes += together[i].bytes;
            channels += static_cast<double>(together[i].channels());
            alone += kvplane::best_schedule(spectra[i], bits).error;
        }
        EXPECT_LE(8.0 * bytes, bits * 128.0 * channels * (1.0 + 1e-9));
        EXPECT_LE(error, alone * (1.0 + 1e-12)) << bits << " bits";
        most_gained = std::max(most_gained, alone / error);
    }
    EXPECT_GT(most_gained, 1.5) << "bits go where scores depend on them";
}

/// Two spectra: the allocator's choice is the best of all pairs of points.
TEST(BestSchedules, AreTheBestPair) {
    Random random(kvplane_test::seed());
    const std::vector<Eigen::VectorXd> spectra{irregular(16, random), irregular(24, random)};
    const auto first = kvplane::schedule_frontier(spectra[0]),
               second = kvplane::schedule_frontier(spectra[1]);
    for (const double bits : {0.7, 1.6, 2.9, 4.4}) {
        double least = std::numeric_limits<double>::infinity();
        for (const LatentSchedule& a : first)
            for (const LatentSchedule& b : second)
                if (8.0 * (a.bytes + b.bytes) <= bits * 128.0 * 40.0)
                    least = std::min(least, a.error + b.error);
        const auto chosen = kvplane::best_schedules(spectra, bits);
        EXPECT_NEAR((chosen[0].error + chosen[1].error) / least, 1.0, 1e-12) << bits;
    }
}

TEST(BestSchedules, ABasisThatCostsIsUsedLess) {
    const Eigen::VectorXd spectrum = decaying(64, 4.0);
    const LatentSchedule cheap = kvplane::best_schedule(spectrum, 2.0);
    const LatentSchedule dear = kvplane::best_schedule(spectrum, 2.0, {.basis_bytes_per_latent = 32.0});
    EXPECT_LT(dear.kept(), cheap.kept());
    EXPECT_GT(dear.error, cheap.error);
    EXPECT_LE(dear.true_bits(), 2.0);
    for (const ChannelSegment& segment : kvplane::best_schedule(spectrum, 9.0, {.most_bits = 3}).segments)
        EXPECT_EQ(segment.bits, 3);
}

TEST(BestSchedules, Refusals) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const Eigen::VectorXd good = decaying(8, 1.0);
    const auto frontier = [](const Eigen::VectorXd& spectrum, const ScheduleSettings& settings) {
        return [=] { kvplane::schedule_frontier(spectrum, settings); };
    };
    refusal(ErrorCode::shape, frontier(Eigen::VectorXd(), {}));
    refusal(ErrorCode::not_finite, frontier(Eigen::Vector2d(1.0, nan), {}));
    EXPECT_NE(
        refusal(ErrorCode::option, frontier(Eigen::Vector3d(2.0, 1.0, 1.5), {})).find("1.5 at latent 2"),
        std::string::npos);
    refusal(ErrorCode::option, frontier(Eigen::Vector2d(1.0, -1.0), {}));
    refusal(ErrorCode::option, frontier(good, {.most_bits = 0}));
    refusal(ErrorCode::option, frontier(good, {.most_bits = 9}));
    refusal(ErrorCode::option, frontier(good, {.basis_bytes_per_latent = -1.0}));
    refusal(ErrorCode::option, frontier(good, {.basis_bytes_per_latent = nan}));
    refusal(ErrorCode::option, [&] { kvplane::best_schedule(good, -0.5); });
    refusal(ErrorCode::option, [&] { kvplane::best_schedule(good, nan); });
    refusal(ErrorCode::option, [&] {
        kvplane::grouped_schedule(Eigen::Vector2d(1.0, 2.0), std::array{1, 1});
    });
}

// -- T9 ---------------------------------------------------------------------------------------------------

/// Normalised errors of the Lloyd-Max quantizers of a normal variable (Max 1960), by Lloyd's iteration.
std::vector<double> lloyd_max_errors(int most_bits) {
    const auto density = [](double x) { return std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI); };
    const auto below = [](double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); };
    std::vector<double> errors{1.0};
    for (int bits = 1; bits <= most_bits; ++bits) {
        const std::size_t levels = std::size_t{1} << bits;
        std::vector<double> level(levels), mass(levels);
        for (std::size_t i = 0; i < levels; ++i)
            level[i] = -4.0 + 8.0 * (static_cast<double>(i) + 0.5) / static_cast<double>(levels);
        for (int pass = 0; pass < 4000; ++pass) {
            double from = -40.0;
            std::vector<double> moved(levels);
            for (std::size_t i = 0; i < levels; ++i) {
                const double to = i + 1 < levels ? 0.5 * (level[i] + level[i + 1]) : 40.0;
                mass[i] = below(to) - below(from);
                moved[i] = (density(from) - density(to)) / mass[i];
                from = to;
            }
            level = moved;
        }
        double kept = 0.0;  // for centroids the error is 1 - sum of mass * level^2
        for (std::size_t i = 0; i < levels; ++i) kept += mass[i] * level[i] * level[i];
        errors.push_back(1.0 - kept);
    }
    return errors;
}

/// The table of theorem T9: at 1.25 bits the paper's schedule, the best integer one, and the limit.
TEST(T9, TheTableAtOneAndAQuarterBits) {
    const std::vector<double> f = lloyd_max_errors(7);
    EXPECT_NEAR(f[1], .3634, 5e-5);  // Max 1960, table I
    EXPECT_NEAR(f[2], .1175, 5e-5);
    EXPECT_NEAR(f[4], .009497, 5e-6);
    struct Row {
        double rho, paper, best, limit;
    };
    for (const Row& row : {Row{.2, .0209, .0193, .0096}, Row{.3, .0430, .0362, .0209},
                           Row{.4, .0827, .0642, .0385}, Row{.5, .1435, .1024, .0635}}) {
        SCOPED_TRACE(testing::Message() << "rho " << row.rho);
        EXPECT_NEAR(theory::svdq_grouped_error(row.rho, one_and_a_quarter, f), row.paper, 6e-5);
        double best = 1.0;
        std::vector<int> widths(8, 0);
        const std::function<void(std::size_t, int)> fill = [&](std::size_t group, int left) {
            if (group == 8) {
                if (left == 0) best = std::min(best, theory::svdq_grouped_error(row.rho, widths, f));
                return;
            }
            for (int bits = 0; bits <= std::min(left, 7); ++bits) {
                widths[group] = bits;
                fill(group + 1, left - bits);
            }
            widths[group] = 0;
        };
        fill(0, 10);
        EXPECT_NEAR(best, row.best, 6e-5);
        const Eigen::VectorXd spectrum = decaying(512, -8.0 * std::log(row.rho));
        const double limit = theory::reverse_water_filling(spectrum, 1.25).distortion / spectrum.sum();
        EXPECT_NEAR(limit, row.limit, 6e-5);
        EXPECT_GT(best, limit);
    }
}

}  // namespace
