// kvplane/quantize/unbiased.hpp: grids of the scheme `unbiased`: no bias along a token.
//
// A token x of D rotated channels looks Gaussian. Its cells are as wide as the best uniform quantizer of a
// Gaussian of the same norm has them, so its codes q (half-integers around zero) need nothing but the norm.
// The least squared error would then take the step <q, x> / <q, q>, which makes x' shorter than x: by 12% at
// 2 bits, for all tokens alike. A sum of many weighted tokens averages errors out, but not that. The step
// here is <x, x> / <q, x>, so that <x', x> = <x, x> (theorem T16).
//
// Sums are in double and in one order, 16 of them at a time, whatever the instruction set. Products are of
// numbers of at most 24 bits and so are exact, and contraction to fused multiply-add cannot change a bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kvplane/matrix.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/quantize/rule.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/simd/vector.hpp"

namespace kvplane::detail {

/// Rows of `channels` channels in runs of `group`, both multiples of kernel_channels, of which zeros may fill the
/// last.
struct TokenRuns {
    SourceRows rows;
    Index tokens, channels, group;
    Index used_group, used_channels;  ///< without padding

    Index runs() const noexcept { return channels / group; }
    /// How many channels of a run are no padding.
    Index used(Index run) const noexcept { return std::min(used_group, used_channels - run * used_group); }
};

/// The width of a cell, in root mean squares, of the uniform quantizer of a Gaussian that has 2^bits cells
/// around zero and the least squared error (Max 1960, table II).
inline float gaussian_cell(int bits) noexcept {
    constexpr float widths[] = {1.596f, 0.9957f, 0.5860f, 0.3352f, 0.1881f, 0.1041f, 0.0568f, 0.0307f};
    return widths[bits - 1];
}

/// By how many percent an unbiased step grows where cells of that width grow by one: d log step / d log width
/// of a Gaussian, step = 1 / E[q x] = 1 / sum over edges k of phi(k width). 0 at 1 bit: codes are signs.
inline double step_elasticity(int bits) noexcept {
    constexpr double elasticities[] = {0.0, 0.5445, 0.7964, 0.9153, 0.9670, 0.9879, 0.9957, 0.9985};
    return elasticities[bits - 1];
}

namespace grid_kernels {

/// Sixteen sums in double; element i of a run goes to sum i % 16.
template <int Lanes>
struct SixteenSums {
    static constexpr int half = Lanes / 2, parts = 16 / half;
    using Doubles = Vector<double, half>;
    Doubles sums[parts]{};

    /// Adds the products of the elements first, first + 1, .. , `first` a multiple of Lanes.
    KVPLANE_INLINE void add(Index first, const Floats<Lanes>& a, const Floats<Lanes>& b) {
        add_halves(static_cast<int>(first % 16) / half, a, b, std::make_index_sequence<half>{});
    }
    KVPLANE_INLINE double total() const {
        Doubles all[parts];
        for (int p = 0; p < parts; ++p) all[p] = sums[p];
        for (int width = parts / 2; width > 0; width /= 2)
            for (int p = 0; p < width; ++p) all[p] += all[p + width];
        double lanes[half];
        store(lanes, all[0]);
#pragma GCC unroll 4
        for (int width = half / 2; width > 0; width /= 2)
#pragma GCC unroll 4
            for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
        return lanes[0];
    }

  private:
    template <std::size_t... Lane>
    KVPLANE_INLINE void add_halves(int part, const Floats<Lanes>& a, const Floats<Lanes>& b,
                                   std::index_sequence<Lane...>) {
        const Floats<half> low[2] = {__builtin_shufflevector(a, a, Lane...),
                                     __builtin_shufflevector(b, b, Lane...)},
                           high[2] = {__builtin_shufflevector(a, a, (Lane + half)...),
                                      __builtin_shufflevector(b, b, (Lane + half)...)};
        add_products(sums[part], low[0], low[1]);
        add_products(sums[part + 1], high[0], high[1]);
    }
    KVPLANE_INLINE static void add_products(Doubles& sum, const Floats<half>& a, const Floats<half>& b) {
        Doubles wide_a, wide_b;
        simd::widen_doubles<half>(wide_a, a);
        simd::widen_doubles<half>(wide_b, b);
        sum += wide_a * wide_b;
    }
};

/// body(first, x) for the vectors of a run, sixteen channels at a time.
template <int Lanes, class Scalar, class Body>
KVPLANE_INLINE void each_vector(const Scalar* run, Index count, const Body& body) {
    for (Index i = 0; i < count; i += 16)
        for (Index at = i; at < i + 16; at += Lanes) {
            Floats<Lanes> x;
            widen<Lanes>(x, run + at);
            body(at, x);
        }
}

template <int Lanes, class Scalar>
KVPLANE_INLINE double squared_norm(const Scalar* run, Index count) {
    SixteenSums<Lanes> sums;
    each_vector<Lanes>(run, count,
                       [&](Index at, const Floats<Lanes>& x) KVPLANE_BODY { sums.add(at, x, x); });
    return sums.total();
}

/// ClipExcess while it is found.
template <int Lanes>
struct LaneExcess {
    Floats<Lanes> largest{};
    double energy = 0.0;
};

/// Cells of 2^bits codes around zero.
template <int Lanes>
struct CentredCells {
    float lower, inverse;
    int bits;

    /// The codes of some numbers, and the half-integers that they stand for.
    KVPLANE_INLINE void encode(const Floats<Lanes>& x, Ints<Lanes>& codes, Floats<Lanes>& centred) const {
        const Floats<Lanes> low = Floats<Lanes>{} + lower, scale = Floats<Lanes>{} + inverse;
        cells_of<Lanes>(x, low, scale, (1 << bits) - 1, codes);
        centred =
            __builtin_convertvector(codes, Floats<Lanes>) + (0.5f - static_cast<float>(1 << (bits - 1)));
    }
    template <class Scalar>
    KVPLANE_INLINE double product_with_codes(const Scalar* run, Index count) const {
        SixteenSums<Lanes> sums;
        each_vector<Lanes>(run, count, [&](Index at, const Floats<Lanes>& x) KVPLANE_BODY {
            Ints<Lanes> codes;
            Floats<Lanes> q;
            encode(x, codes, q);
            sums.add(at, x, q);
        });
        return sums.total();
    }
    /// Writes the codes, and notes by how much |x - step q| exceeds half a step. Zeros that fill a run do not.
    template <class Scalar>
    KVPLANE_INLINE void write_codes(const Scalar* run, Index count, float step, std::uint8_t* codes,
                                    LaneExcess<Lanes>& excess) const {
        SixteenSums<Lanes> energy;
        each_vector<Lanes>(run, count, [&](Index at, const Floats<Lanes>& x) KVPLANE_BODY {
            Ints<Lanes> cells;
            Floats<Lanes> q;
            encode(x, cells, q);
            simd::store_low_bytes<Lanes>(codes + at, cells);
            // The product is exact: a step has 4 bits and a code 8.
            const Floats<Lanes> error = x - q * step;
            Floats<Lanes> over = (Floats<Lanes>)((Words<Lanes>)error & 0x7FFFFFFFu) - 0.5f * step;
            over = over > 0.0f ? over : Floats<Lanes>{};
            excess.largest = excess.largest < over ? over : excess.largest;
            energy.add(at, over, over);
        });
        excess.energy += energy.total();
    }
};

/// Runs that are encoded together, so that no run waits for the divisions of another.
inline constexpr int unbiased_runs = 16;
/// The grids of some runs while they are chosen.
struct UnbiasedGrids {
    double squared[unbiased_runs], product[unbiased_runs];  ///< <x, x> and <q, x>
    float lower[unbiased_runs], inverse[unbiased_runs];

    /// Cells by the norms. A run that fp16 cannot tell from zeros gets 0 for lower and inverse.
    KVPLANE_INLINE void choose_cells(int bits, const Index (&used)[unbiased_runs], int runs) {
        const float cell = gaussian_cell(bits), below = 0.5f * power_of_two(bits);
        for (int r = 0; r < runs; ++r) {
            const float width =
                cell * static_cast<float>(std::sqrt(squared[r] / static_cast<double>(used[r])));
            const bool zero = width < 0x1p-26f;
            lower[r] = zero ? 0.0f : -below * width;
            inverse[r] = zero ? 0.0f : 1.0f / width;
        }
    }
    /// The steps by the codes in those cells, as they are stored. A stored step is up to 1/16 off, all tokens of
    /// one norm alike, so cells are made so much wider or narrower that the codes in them have no bias with that
    /// step. Codes of 1 bit are signs, whatever the cells.
    KVPLANE_INLINE void choose_steps(int bits, Eigen::half* steps, int runs) {
        const double elasticity = step_elasticity(bits);
        const float below = 0.5f * power_of_two(bits);
        for (int r = 0; r < runs; ++r) {
            const double exact = product[r] > 0.0 ? squared[r] / product[r] : 0.0;
            const std::uint8_t byte = step_byte(static_cast<float>(exact));
            steps[r] = half_of_step(byte);
            if (elasticity == 0.0 || byte == 0 || inverse[r] == 0.0f) continue;
            const double off = static_cast<double>(static_cast<float>(steps[r])) / exact,
                         wider = std::clamp((off - 1.0) / elasticity, -0.25, 0.25) + 1.0;
            lower[r] = static_cast<float>(wider * static_cast<double>(lower[r]));
            inverse[r] = -below / lower[r];
        }
    }
};

}  // namespace grid_kernels

/// Writes the code of every value, and the steps [token][run]. Returns by how much errors exceed half of these.
inline ClipExcess encode_unbiased(Isa isa, const TokenRuns& tokens, int bits, std::uint8_t* codes,
                                  Index code_stride, Eigen::half* steps) {
    using namespace grid_kernels;
    ClipExcess excess;
    with_scalar(tokens.rows, [&](const auto* data) {
        run_on(isa, [&](auto lanes) KVPLANE_BODY {
            const Index all = tokens.tokens * tokens.runs(), group = tokens.group;
            LaneExcess<lanes> found;
            UnbiasedGrids grids;
            decltype(data) from[unbiased_runs];
            std::uint8_t* to[unbiased_runs];
            Index used[unbiased_runs];
            Index token = 0, run = 0;
            for (Index first = 0; first < all; first += unbiased_runs) {
                const int count = static_cast<int>(std::min<Index>(unbiased_runs, all - first));
                for (int r = 0; r < count; ++r) {
                    from[r] = data + token * tokens.rows.stride + run * group;
                    to[r] = codes + token * code_stride + run * group;
                    used[r] = tokens.used(run);
                    if (++run == tokens.runs()) run = 0, ++token;
                }
                for (int r = 0; r < count; ++r) grids.squared[r] = squared_norm<lanes>(from[r], group);
                grids.choose_cells(bits, used, count);
                const auto cells = [&](int r) KVPLANE_BODY {
                    return CentredCells<lanes>{grids.lower[r], grids.inverse[r], bits};
                };
                for (int r = 0; r < count; ++r)
                    grids.product[r] = cells(r).product_with_codes(from[r], group);
                grids.choose_steps(bits, steps + first, count);
                for (int r = 0; r < count; ++r)
                    cells(r).write_codes(from[r], group, static_cast<float>(steps[first + r]), to[r], found);
            }
            for (int i = 0; i < lanes; ++i)
                excess.largest = std::max<double>(excess.largest, found.largest[i]);
            excess.energy = found.energy;
        });
    });
    return excess;
}

}  // namespace kvplane::detail
