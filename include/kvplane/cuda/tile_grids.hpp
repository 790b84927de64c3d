// kvplane/cuda/tile_grids.hpp: fits the grids of the rows that a block has in shared memory, and stores them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/block.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/input.hpp"
#include "kvplane/cuda/numbers.hpp"
#include "kvplane/cuda/tile_work.hpp"

namespace kvplane::cuda::detail {

/// The extremes of eights of numbers, place by place.
template <class Value>
struct ExtremesOfEights;
template <>
struct ExtremesOfEights<std::uint16_t> {
    FourWords low, high;

    KVPLANE_DEVICE void start(const std::uint16_t* from) {
        low = high = *reinterpret_cast<const FourWords*>(from);
    }
    KVPLANE_DEVICE void note(const std::uint16_t* from) {
        const FourWords x = *reinterpret_cast<const FourWords*>(from);
        KVPLANE_UNROLL
        for (int i = 0; i < 4; ++i) {
            low.at[i] = lesser_halves(low.at[i], x.at[i]);
            high.at[i] = greater_halves(high.at[i], x.at[i]);
        }
    }
    KVPLANE_DEVICE void put(std::uint16_t* lows, std::uint16_t* highs) const {
        *reinterpret_cast<FourWords*>(lows) = low;
        *reinterpret_cast<FourWords*>(highs) = high;
    }
    KVPLANE_DEVICE void combine(float& least, float& most) const {
        const std::uint32_t lows = lesser_halves(lesser_halves(low.at[0], low.at[1]),
                                                 lesser_halves(low.at[2], low.at[3])),
                            highs = greater_halves(greater_halves(high.at[0], high.at[1]),
                                                   greater_halves(high.at[2], high.at[3]));
        least = widened(static_cast<std::uint16_t>(lesser_halves(lows, lows >> 16)));
        most = widened(static_cast<std::uint16_t>(greater_halves(highs, highs >> 16)));
    }
};
template <>
struct ExtremesOfEights<float> {
    float low[8], high[8];

    KVPLANE_DEVICE void start(const float* from) {
        load_numbers<8>(from, low);
        for (int i = 0; i < 8; ++i) high[i] = low[i];
    }
    KVPLANE_DEVICE void note(const float* from) {
        float x[8];
        load_numbers<8>(from, x);
        KVPLANE_UNROLL
        for (int i = 0; i < 8; ++i) {
            low[i] = lesser_of(low[i], x[i]);
            high[i] = greater_of(high[i], x[i]);
        }
    }
    KVPLANE_DEVICE void put(float* lows, float* highs) const {
        put_numbers<8>(lows, low);
        put_numbers<8>(highs, high);
    }
    KVPLANE_DEVICE void combine(float& least, float& most) const {
        least = low[0];
        most = high[0];
        KVPLANE_UNROLL
        for (int i = 1; i < 8; ++i) {
            least = lesser_of(least, low[i]);
            most = greater_of(most, high[i]);
        }
    }
};

/// A grid for each channel of all resident tokens.
template <class Of, class Block>
KVPLANE_DEVICE_INLINED void fit_channels(const Block& block, const TileWork<Of>& work,
                                         const SegmentPart& part) {
    const int channels = whole_units_of(part.channels);
    typename Of::Value *const low = work.template part<typename Of::Value>(work.plan.partial),
                              *const high = low + channel_shares * channels;  // [share][channel]
    block.run([&](int thread, int threads) {
        const Divisor eights((part.channels + 7) / 8);
        for (int i = thread; i < channel_shares * eights.by; i += threads) {
            const int c = eights.rest(i) * 8, share = eights.quotient(i);
            const typename Of::Value* from = work.rows.at(share, part.column + c);
            ExtremesOfEights<typename Of::Value> found;
            found.start(from);
            KVPLANE_UNROLL_FEW
            for (int row = share + channel_shares; row < work.count; row += channel_shares)
                found.note(from += channel_shares * work.rows.pitch);
            found.put(low + share * channels + c, high + share * channels + c);
        }
    });
    block.run([&](int thread, int threads) {
        auto* const step = reinterpret_cast<std::uint16_t*>(work.tile + part.segment.step_at);
        auto* const lower = reinterpret_cast<std::uint16_t*>(work.tile + part.segment.lower_at);
        for (int c = thread; c < part.channels; c += threads) {
            float least = number(low[c]), most = number(high[c]);
            KVPLANE_UNROLL
            for (int share = 1; share < channel_shares; ++share) {
                least = lesser_of(least, number(low[share * channels + c]));
                most = greater_of(most, number(high[share * channels + c]));
            }
            const FittedGrid grid = fitted_grid(part.segment.scheme, part.segment.bits, least, most);
            work.cells()[c] = {grid.lower, grid.inverse};
            work.steps()[c] = grid.step;
            const int at = work.base / part.segment.group * part.segment.channels + part.first + c;
            step[at] = grid.stored_step;
            if (has_lower(part.segment.scheme)) lower[at] = grid.stored_lower;
        }
    });
}

/// Stores the grid of a token's run.
template <class Of>
KVPLANE_DEVICE void store_grid(const TileWork<Of>& work, const Segment& segment, int run, int token,
                               const FittedGrid& grid) {
    const bool given = work.covers(token);
    if (!given && !work.a.fresh) return;
    const int at = run * tile_rows + token;
    if (segment.scheme == Scheme::unbiased)
        work.tile[segment.step_at + at] = static_cast<std::byte>(given ? grid.stored_step >> 7 : 0);
    else
        reinterpret_cast<std::uint16_t*>(work.tile + segment.step_at)[at] =
            given ? grid.stored_step : std::uint16_t{0};
    if (has_lower(segment.scheme))
        reinterpret_cast<std::uint16_t*>(work.tile + segment.lower_at)[at] =
            given ? grid.stored_lower : std::uint16_t{0};
}

/// A grid for each run of channels of each resident token: grid run * rows + row.
template <class Of, class Block>
KVPLANE_DEVICE_INLINED void fit_runs(const Block& block, const TileWork<Of>& work, const SegmentPart& part) {
    const Segment& segment = part.segment;
    const int shares = run_shares(segment), rows = work.count, grids = rows * segment.runs;
    float *const low = work.template part<float>(work.plan.partial), *const high = low + shares * grids;
    const bool in_eights = segment.group % 8 == 0 || segment.runs == 1;
    block.run([&](int thread, int threads) {
        const Divisor of_rows(rows), of_shares(shares);
        for (int i = thread; i < shares * grids; i += threads) {  // [share][run][row], rows fastest
            const int row = of_rows.rest(i), other = of_rows.quotient(i), share = of_shares.rest(other),
                      run = of_shares.quotient(other);
            const RunOfChannels channels = run_of(segment, run);
            const int column = part.column + channels.first;
            // A share without an eight of its own has the first number.
            float least = number(*work.rows.at(row, column)), most = least;
            int c = share * 8;
            if (in_eights) {
                if (c + 8 <= channels.count) {
                    ExtremesOfEights<typename Of::Value> found;
                    found.start(work.rows.at(row, column + c));
                    KVPLANE_UNROLL_FEW
                    for (c += shares * 8; c + 8 <= channels.count; c += shares * 8)
                        found.note(work.rows.at(row, column + c));
                    float low_found, high_found;
                    found.combine(low_found, high_found);
                    least = lesser_of(least, low_found);
                    most = greater_of(most, high_found);
                }
            }
            const int end = in_eights && c + 8 < channels.count ? c + 8 : channels.count;
            KVPLANE_KEEP_ROLLED
            for (; c < end; ++c) {
                const float x = number(*work.rows.at(row, column + c));
                least = lesser_of(least, x);
                most = greater_of(most, x);
            }
            const int at = share * grids + run * rows + row;
            low[at] = least;
            high[at] = most;
        }
    });
    block.run([&](int thread, int threads) {
        const Divisor of_rows(rows);
        for (int g = thread; g < grids; g += threads) {
            float least = low[g], most = high[g];
            for (int share = 1; share < shares; ++share) {
                least = lesser_of(least, low[share * grids + g]);
                most = greater_of(most, high[share * grids + g]);
            }
            const FittedGrid grid = fitted_grid(segment.scheme, segment.bits, least, most);
            work.cells()[g] = {grid.lower, grid.inverse};
            work.steps()[g] = grid.step;
            store_grid(work, segment, of_rows.quotient(g), work.base + of_rows.rest(g), grid);
        }
    });
}

/// The same of grids without bias, some at a time. Element i of a run goes to sum i % 16; sums i and i + 8
/// are added first, then those 4 apart, 2 apart and 1 apart. A thread has sums i, i + 4, i + 8 and i + 12.
template <class Of, class Block>
KVPLANE_DEVICE_INLINED void fit_unbiased(const Block& block, const TileWork<Of>& work,
                                         const SegmentPart& part) {
    const Segment& segment = part.segment;
    const int rows = work.count, grids = rows * segment.runs, bits = segment.bits;
    double *const squares = work.template part<double>(work.plan.partial), *const products =
                                                                               squares + most_unbiased *
                                                                                             unbiased_shares;
    TwoFloats* const cells = work.cells();
    float* const steps = work.steps();
    const Divisor of_rows(rows);
    const auto total = [](const double* of) { return sum_of(sum_of(of[0], of[2]), sum_of(of[1], of[3])); };
    // The sum over a run of term(x), a double, as far as it is a thread's.
    const auto sum_of_run = [&](int g, int share, const auto& term) {
        const RunOfChannels channels = run_of(segment, of_rows.quotient(g));
        const int column = part.column + channels.first, row = of_rows.rest(g);
        double sums[4] = {};
        int c = share;
        if (column % 16 == 0) {
            // Sixteen channels from a multiple of it lie side by side.
            KVPLANE_UNROLL_FEW
            for (; c + 12 < channels.count; c += 16) {
                const typename Of::Value* const from = work.rows.at(row, column + c);
                KVPLANE_UNROLL
                for (int k = 0; k < 4; ++k) sums[k] = term(number(from[4 * k]), sums[k]);
            }
        }
        KVPLANE_KEEP_ROLLED
        for (; c < channels.count; c += 4) {
            const double sum = term(number(*work.rows.at(row, column + c)), sums[0]);
            // The sum of the next channel comes first.
            sums[0] = sums[1];
            sums[1] = sums[2];
            sums[2] = sums[3];
            sums[3] = sum;
        }
        // However often they were turned, the same two are added first.
        return sum_of(sum_of(sums[0], sums[2]), sum_of(sums[1], sums[3]));
    };
    const float centre = 0.5f - static_cast<float>(1 << (bits - 1)),
                last = static_cast<float>((1 << bits) - 1);
    for (int first = 0; first < grids; first += most_unbiased) {
        const int count = grids - first < most_unbiased ? grids - first : most_unbiased;
        block.run([&](int thread, int threads) {
            for (int i = thread; i < count * unbiased_shares; i += threads)
                squares[i] = sum_of_run(first + i / unbiased_shares, i % unbiased_shares,
                                        [](float x, double sum) { return sum_with_product(sum, x, x); });
        });
        block.run([&](int thread, int threads) {
            for (int i = thread; i < count; i += threads) {
                const FittedGrid grid = centred_cells(bits, total(squares + unbiased_shares * i),
                                                      run_of(segment, of_rows.quotient(first + i)).count);
                cells[first + i] = {grid.lower, grid.inverse};
            }
        });
        block.run([&](int thread, int threads) {
            for (int i = thread; i < count * unbiased_shares; i += threads) {
                const int g = first + i / unbiased_shares;
                const TwoFloats cell = cells[g];
                products[i] = sum_of_run(g, i % unbiased_shares, [&](float x, double sum) {
                    const float q = sum_of(number_of_cell(cell_of(x, cell.at[0], cell.at[1], last)), centre);
                    return sum_with_product(sum, x, q);
                });
            }
        });
        block.run([&](int thread, int threads) {
            for (int i = thread; i < count; i += threads) {
                const int g = first + i;
                FittedGrid grid{};
                grid.lower = cells[g].at[0];
                grid.inverse = cells[g].at[1];
                choose_step(bits, total(squares + unbiased_shares * i), total(products + unbiased_shares * i),
                            grid);
                cells[g] = {grid.lower, grid.inverse};
                steps[g] = grid.step;
                store_grid(work, segment, of_rows.quotient(g), work.base + of_rows.rest(g), grid);
            }
        });
    }
}

/// Grids of a part of a segment, which is not fp16.
template <class Of, class Block>
KVPLANE_DEVICE_INLINED void fit_grids(const Block& block, const TileWork<Of>& work, const SegmentPart& part) {
    if (part.segment.by_channel) return fit_channels(block, work, part);
    if constexpr (Of::has_unbiased)
        if (part.segment.scheme == Scheme::unbiased) return fit_unbiased(block, work, part);
    fit_runs(block, work, part);
}

}  // namespace kvplane::cuda::detail
