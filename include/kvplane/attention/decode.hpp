// kvplane/attention/decode.hpp: attention on packed bits: scores and weighted sums of a tile without decoding
// it.
//
// With the grids' steps folded into the query, a score is a dot product of codes,
//
//   q.k' = sum_c q_c (lower_c + step_c / 2) + sum_c (q_c step_c) code_c,
//
// and with the steps of values folded into the softmax weights, so is an output,
//
//   sum_t w_t v'_tc = sum_t w_t (lower_t + step_t / 2) + sum_t (w_t step_t) code_tc.
//
// The folded factors are rounded to 8 bits, for a whole tile and segment at one scale, and the products
// summed in integers (kernels/). Where codes have more than 4 bits, factors have 16 bits in two parts: both
// meet the first plane, the high one alone the planes below it, whose codes weigh a sixteenth or less. A
// factor is so off by at most its largest / 254, or / 65000 on the first plane and / 254 of a sixteenth
// (T14), and a sum by that times the codes' distances from their middle.
//
// Everything here is noexcept, allocates nothing, and gives the same integers on every instruction set.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "kvplane/attention/dispatch.hpp"
#include "kvplane/isa.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/storage/tile.hpp"

namespace kvplane {

/// Query rows (heads that share a key head, times query tokens) that the fused path takes together.
inline constexpr Index fused_rows = 8;

namespace detail::fused {

using quantize::Floats;
using quantize::Ints;
using quantize::load;
using quantize::store;
using quantize::Vector;
using quantize::widen;

/// Channels or tokens that the factors of a row are padded to: the depth of the deepest unit.
constexpr Index padded_depth(Index count) noexcept {
    return (count + 31) / 32 * 32;
}

struct TwoLanes {
    float a, b;
};
/// The halves of a vector, combined, down to one lane: what is associative only.
template <int Lanes, class V, class Combine, std::size_t... Place>
KVPLANE_INLINE auto halves(const V& x, const Combine& combine, std::index_sequence<Place...>) {
    using Half = Vector<float, Lanes / 2>;
    const Half low = __builtin_shufflevector(x, x, Place...),
               high = __builtin_shufflevector(x, x, (Place + Lanes / 2)...);
    Half both;
    combine(both, low, high);
    if constexpr (Lanes == 4)
        return TwoLanes{both[0], both[1]};
    else
        return halves<Lanes / 2>(both, combine, std::make_index_sequence<Lanes / 4>{});
}
template <int Lanes>
KVPLANE_INLINE float sum_lanes(const Floats<Lanes>& x) {
    const auto [a, b] = halves<Lanes>(
        x, [](auto& to, const auto& l, const auto& h) KVPLANE_BODY { to = l + h; },
        std::make_index_sequence<Lanes / 2>{});
    return a + b;
}
template <int Lanes>
KVPLANE_INLINE float max_lanes(const Floats<Lanes>& x) {
    const auto [a, b] = halves<Lanes>(
        x, [](auto& to, const auto& l, const auto& h) KVPLANE_BODY { to = l < h ? h : l; },
        std::make_index_sequence<Lanes / 2>{});
    return a < b ? b : a;
}

/// Sums of rounded factors, and of their low parts.
struct FactorSums {
    float whole, low;
};
/// round(x scale) to int8, or to 16 bits in two parts, high 256 + low. |x scale| at most 127 or 32512.
template <int Lanes>
KVPLANE_INLINE void round_factors(const float* from, Index count, float scale, std::int8_t* high,
                                  std::int8_t* low, FactorSums& sums) {
    constexpr float magic = 12582912.0f;  // 1.5 2^23: adding it leaves the rounded integer in the low bits
    Ints<Lanes> all{}, lows{};
    for (Index i = 0; i < count; i += Lanes) {
        Floats<Lanes> x;
        load(x, from + i);
        const Ints<Lanes> whole = (Ints<Lanes>)(x * scale + magic) - 0x4B400000;
        all += whole;
        if (!low) {
            quantize::store_low_bytes<Lanes>(reinterpret_cast<std::uint8_t*>(high + i), whole & 0xFF);
            continue;
        }
        const Ints<Lanes> top = (whole + 128) >> 8, rest = whole - top * 256;
        lows += rest;
        quantize::store_low_bytes<Lanes>(reinterpret_cast<std::uint8_t*>(high + i), top & 0xFF);
        quantize::store_low_bytes<Lanes>(reinterpret_cast<std::uint8_t*>(low + i), rest & 0xFF);
    }
    // Below 2^24 for depths up to 512, and then off by less than the rounding of the sums that they correct.
    sums = {sum_lanes<Lanes>(__builtin_convertvector(all, Floats<Lanes>)),
            sum_lanes<Lanes>(__builtin_convertvector(lows, Floats<Lanes>))};
}

/// folded = x step; the largest |folded|, the sum of folded, and the sum of x (lower + step / 2), or, without
/// `lower` (symmetric grids), of x step middle.
struct Fold {
    float largest, sum, base;
};
template <int Lanes>
struct FoldSums {
    Floats<Lanes> largest{}, sum{}, base{};

    KVPLANE_INLINE void take(const float* x, const Eigen::half* step, const Eigen::half* lower,
                             float* folded) {
        Floats<Lanes> value, s, l;
        load(value, x);
        widen<Lanes>(s, step);
        const Floats<Lanes> product = value * s;
        if (lower) {
            widen<Lanes>(l, lower);
            base += value * l;
        }
        sum += product;
        store(folded, product);
        const auto magnitude = (Floats<Lanes>)((Ints<Lanes>)product & 0x7FFFFFFF);
        largest = largest < magnitude ? magnitude : largest;
    }
};
/// folded has room for whole vectors; beyond `count` it gets 0.
template <int Lanes>
KVPLANE_INLINE void fold(const float* x, const Eigen::half* step, const Eigen::half* lower, float middle,
                         Index count, float* folded, Fold& result) {
    FoldSums<Lanes> sums;
    Index i = 0;
    for (; i + Lanes <= count; i += Lanes)
        sums.take(x + i, step + i, lower ? lower + i : nullptr, folded + i);
    if (i < count) {
        float rest_x[Lanes] = {};
        std::uint16_t rest_step[Lanes] = {}, rest_lower[Lanes] = {};
        const auto rest = static_cast<std::size_t>(count - i);
        std::memcpy(rest_x, x + i, rest * sizeof(float));
        std::memcpy(rest_step, step + i, rest * sizeof(Eigen::half));
        if (lower) std::memcpy(rest_lower, lower + i, rest * sizeof(Eigen::half));
        sums.take(rest_x, reinterpret_cast<const Eigen::half*>(rest_step),
                  lower ? reinterpret_cast<const Eigen::half*>(rest_lower) : nullptr, folded + i);
    }
    result = {max_lanes<Lanes>(sums.largest), sum_lanes<Lanes>(sums.sum), sum_lanes<Lanes>(sums.base)};
    result.base += result.sum * (lower ? 0.5f : middle);
}

/// to[i] += scale (high[i] + low[i] / 256).
template <int Lanes>
KVPLANE_INLINE void add_sums(const std::int32_t* high, const std::int32_t* low, float scale, float base,
                             Index count, float* to) {
    for (Index i = 0; i < count; i += Lanes) {
        Ints<Lanes> h, l;
        Floats<Lanes> x;
        load(h, high + i);
        load(x, to + i);
        Floats<Lanes> sum = __builtin_convertvector(h, Floats<Lanes>);
        if (low) {
            load(l, low + i);
            sum += __builtin_convertvector(l, Floats<Lanes>) * (1.0f / 256.0f);
        }
        store(to + i, x + sum * scale + base);
    }
}

/// x = e^x for x <= 0, to 2e-7 relative; 0 below -87 (the last normal number), -infinity included.
template <int Lanes>
KVPLANE_INLINE void exponential(Floats<Lanes>& x) {
    const Floats<Lanes> bounded = x < -87.0f ? Floats<Lanes>{} - 87.0f : x;
    const Floats<Lanes> scaled = bounded * 1.44269504f + 12582912.0f;
    const Floats<Lanes> whole = scaled - 12582912.0f;
    // ln 2 in two parts, so that the remainder is exact.
    const Floats<Lanes> r = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats<Lanes> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const Ints<Lanes> power = ((Ints<Lanes>)scaled - 0x4B400000 + 127) << 23;
    const Floats<Lanes> result = p * (Floats<Lanes>)power;
    x = x < -87.0f ? Floats<Lanes>{} : result;
}

/// The largest of `count` scores.
template <int Lanes>
KVPLANE_INLINE float largest_of(const float* x, Index count) {
    Floats<Lanes> largest, value;
    load(largest, x);
    for (Index i = Lanes; i < count; i += Lanes) {
        load(value, x + i);
        largest = largest < value ? value : largest;
    }
    return max_lanes<Lanes>(largest);
}
/// x = e^(x - largest); returns the sum.
template <int Lanes>
KVPLANE_INLINE float weigh(float* x, float largest, Index count) {
    Floats<Lanes> sum{};
    for (Index i = 0; i < count; i += Lanes) {
        Floats<Lanes> value;
        load(value, x + i);
        value -= largest;
        exponential<Lanes>(value);
        sum += value;
        store(x + i, value);
    }
    return sum_lanes<Lanes>(sum);
}
template <int Lanes>
KVPLANE_INLINE void multiply(float* x, float by, Index count) {
    for (Index i = 0; i < count; i += Lanes) {
        Floats<Lanes> value;
        load(value, x + i);
        store(x + i, value * by);
    }
}

/// scores[t] = q.k_t of `tokens` rows of floats, `stride` apart.
template <int Lanes>
KVPLANE_INLINE void row_scores(const float* query, const float* rows, Index stride, Index tokens,
                               Index channels, float* scores) {
    for (Index t = 0; t < tokens; ++t) {
        Floats<Lanes> sum{};
        Index c = 0;
        for (; c + Lanes <= channels; c += Lanes) {
            Floats<Lanes> q, k;
            load(q, query + c);
            load(k, rows + t * stride + c);
            sum += q * k;
        }
        scores[t] = sum_lanes<Lanes>(sum);
        for (; c < channels; ++c) scores[t] += query[c] * rows[t * stride + c];
    }
}
/// output += sum of weights[t] row_t.
template <int Lanes>
KVPLANE_INLINE void add_rows(const float* weights, const float* rows, Index stride, Index tokens,
                             Index channels, float* output) {
    for (Index t = 0; t < tokens; ++t) {
        if (weights[t] == 0.0f) continue;
        Index c = 0;
        for (; c + Lanes <= channels; c += Lanes) {
            Floats<Lanes> o, v;
            load(o, output + c);
            load(v, rows + t * stride + c);
            store(output + c, o + v * weights[t]);
        }
        for (; c < channels; ++c) output[c] += weights[t] * rows[t * stride + c];
    }
}

/// projected[r][j] = scale[j] sum over c of queries[r][c] columns[c][j], for j below `kept`; columns are
/// fp16, `kept` to a row.
template <int Lanes, int rows, int strips>
KVPLANE_INLINE void project_strips(const float* queries, Index query_stride, const Eigen::half* columns,
                                   Index channels, Index kept, const float* scale, float* projected,
                                   Index projected_stride) {
    Floats<Lanes> sums[rows][strips]{};
    for (Index c = 0; c < channels; ++c) {
        Floats<Lanes> column[strips];
        for (int s = 0; s < strips; ++s) widen<Lanes>(column[s], columns + c * kept + s * Lanes);
        for (int r = 0; r < rows; ++r)
            for (int s = 0; s < strips; ++s) sums[r][s] += column[s] * queries[r * query_stride + c];
    }
    for (int s = 0; s < strips; ++s) {
        Floats<Lanes> by;
        load(by, scale + s * Lanes);
        for (int r = 0; r < rows; ++r) store(projected + r * projected_stride + s * Lanes, sums[r][s] * by);
    }
}
template <int Lanes, int rows>
KVPLANE_INLINE void project_rows(const float* queries, Index query_stride, const Eigen::half* columns,
                                 Index channels, Index kept, const float* scale, float* projected,
                                 Index projected_stride) {
    Index j = 0;
    for (; j + 3 * Lanes <= kept; j += 3 * Lanes)
        project_strips<Lanes, rows, 3>(queries, query_stride, columns + j, channels, kept, scale + j,
                                       projected + j, projected_stride);
    for (; j + Lanes <= kept; j += Lanes)
        project_strips<Lanes, rows, 1>(queries, query_stride, columns + j, channels, kept, scale + j,
                                       projected + j, projected_stride);
    if (j < kept && kept >= Lanes) {  // the last whole vector, some of it again
        j = kept - Lanes;
        project_strips<Lanes, rows, 1>(queries, query_stride, columns + j, channels, kept, scale + j,
                                       projected + j, projected_stride);
        return;
    }
    for (; j < kept; ++j)
        for (int r = 0; r < rows; ++r) {
            float sum = 0.0f;
            for (Index c = 0; c < channels; ++c)
                sum += static_cast<float>(columns[c * kept + j]) * queries[r * query_stride + c];
            projected[r * projected_stride + j] = sum * scale[j];
        }
}

}  // namespace detail::fused

/// Memory of one thread for tiles of up to so many channels. Made once; reused by every call.
class FusedScratch {
  public:
    explicit FusedScratch(Index channels = 0) { reserve(channels); }
    void reserve(Index channels) {
        const Index depth = detail::fused::padded_depth(std::max(channels, tile_tokens));
        if (depth <= depth_) return;
        depth_ = depth;
        const auto size = static_cast<std::size_t>(fused_rows * depth);
        high_.resize(size);
        low_.resize(size);
        folded_.resize(static_cast<std::size_t>(depth));
        // 16 lanes of every block of a tile: its tokens, or the channels of values.
        high_sums_.resize(size);
        low_sums_.resize(size);
        scores_.resize(static_cast<std::size_t>(fused_rows * tile_tokens));
        rows_.resize(static_cast<std::size_t>(token_rows * depth));
        turned_.resize(size);
        projected_.resize(size);
        turns_.resize(static_cast<std::size_t>(4 * depth));
    }
    /// Unquantized tokens that are taken together.
    static constexpr Index token_rows = 32;

    Index depth() const noexcept { return depth_; }
    std::int8_t* high(Index row) noexcept { return high_.data() + row * depth_; }
    std::int8_t* low(Index row) noexcept { return low_.data() + row * depth_; }
    float* folded() noexcept { return folded_.data(); }
    std::int32_t* high_sums() noexcept { return high_sums_.data(); }
    std::int32_t* low_sums() noexcept { return low_sums_.data(); }
    float* scores() noexcept { return scores_.data(); }        ///< fused_rows x 128
    float* rows() noexcept { return rows_.data(); }            ///< token_rows x depth
    float* turned() noexcept { return turned_.data(); }        ///< fused_rows x depth
    float* projected() noexcept { return projected_.data(); }  ///< fused_rows x depth
    /// Four numbers a pair of channels: cosine and sine of a turn, and of the turn from tile to tile.
    float* turns() noexcept { return turns_.data(); }

  private:
    Index depth_ = 0;
    std::vector<std::int8_t> high_, low_;
    std::vector<float> folded_, scores_, rows_, turned_, projected_, turns_;
    std::vector<std::int32_t> high_sums_, low_sums_;
};

namespace detail {

/// What a segment's decoder adds to a code where there is no lower: -(2^(bits - 1)).
inline float symmetric_middle(int bits) noexcept {
    return -0.5f * power_of_two(bits);
}

/// The factors of several rows and the sums of their products with the planes of one segment, and of one run
/// of blocks of it.
class FusedSums {
  public:
    FusedSums(FusedScratch& scratch, Index rows, bool two_parts) noexcept
        : scratch_(scratch), rows_(rows), two_parts_(two_parts) {}

    /// The factors of all rows: x[r * stride + i] step[i] for i below `count`, rounded; up to `depth` they
    /// are 0. base gets what to add to every sum of a row: that of x lower, and what rounding did to the part
    /// of the codes that all have in common, their middle; so that a rounded factor errs by a code's distance
    /// from the middle only.
    void factors(Isa isa, const TileFormat::Placed& segment, const float* x, Index stride,
                 const Eigen::half* step, const Eigen::half* lower, Index count, Index depth,
                 float* base) noexcept {
        const float most = two_parts_ ? 32512.0f : 127.0f,
                    middle = 0.5f * (power_of_two(segment.bits) - 1.0f),
                    middle_below = 0.5f * (power_of_two(segment.split.shift(0)) - 1.0f),
                    symmetric = symmetric_middle(segment.bits);
        float* const folded = scratch_.folded();
        std::fill(folded + count, folded + depth, 0.0f);
        run_on(isa, [&](auto lanes) KVPLANE_BODY {
            for (Index r = 0; r < rows_; ++r) {
                fused::Fold fold{};
                fused::fold<lanes>(x + r * stride, step, lower, symmetric, count, folded, fold);
                const float worth = fold.largest > 0.0f ? fold.largest / most : 0.0f,
                            scale = fold.largest > 0.0f ? most / fold.largest : 0.0f;
                worth_[static_cast<std::size_t>(r)] = worth;
                fused::FactorSums rounded{};
                fused::round_factors<lanes>(folded, depth, scale, scratch_.high(r),
                                            two_parts_ ? scratch_.low(r) : nullptr, rounded);
                base[r] = fold.base + middle * (fold.sum - worth * rounded.whole) +
                          middle_below * worth * rounded.low;
            }
        });
    }

    /// Sums of `blocks` blocks from `first_block` on, over planes of `width`s whose blocks have
    /// units_of(width).
    template <class UnitsOf>
    void sum(Isa isa, const TileFormat::Placed& segment, const std::byte* tile, const std::byte* ahead,
             Index first_block, Index blocks, const UnitsOf& units_of) noexcept {
        const PlaneDot& dot = plane_dot_of(isa);
        const Index sums = blocks * rows_ * unit_lanes;
        std::fill_n(scratch_.high_sums(), sums, 0);
        if (two_parts_) std::fill_n(scratch_.low_sums(), sums, 0);
        for (int p = 0; p < segment.split.count; ++p) {
            const int width = segment.split[p];
            const Index units = units_of(width);
            const Index at = segment.plane_at[static_cast<std::size_t>(p)] + first_block * units * unit_bytes;
            PlaneDotCall call{tile + at,           ahead + at,       blocks, units,
                              scratch_.high(0),    scratch_.depth(), rows_,  segment.split.shift(p),
                              scratch_.high_sums()};
            dot(width, call);
            if (!two_parts_ || p > 0) continue;
            call.factors = scratch_.low(0);
            call.sums = scratch_.low_sums();
            dot(width, call);
        }
    }

    /// to[r * row_stride + b * 16 ...] += the sums of row r and block b, and base[r].
    void add(Isa isa, Index blocks, const float* base, float* to, Index row_stride) noexcept {
        // The high part counts 256 of the units that the scale is in.
        const float unit = two_parts_ ? 256.0f : 1.0f;
        const std::int32_t *high = scratch_.high_sums(), *low = two_parts_ ? scratch_.low_sums() : nullptr;
        run_on(isa, [&](auto lanes) KVPLANE_BODY {
            for (Index b = 0; b < blocks; ++b)
                for (Index r = 0; r < rows_; ++r) {
                    const Index at = (b * rows_ + r) * unit_lanes;
                    fused::add_sums<lanes>(high + at, low ? low + at : nullptr,
                                           worth_[static_cast<std::size_t>(r)] * unit, base[r], unit_lanes,
                                           to + r * row_stride + b * unit_lanes);
                }
        });
    }

  private:
    FusedScratch& scratch_;
    Index rows_;
    bool two_parts_;
    std::array<float, fused_rows> worth_{};
};

inline void row_scores(Isa isa, const float* query, const float* rows, Index stride, Index tokens,
                       Index channels, float* scores) noexcept {
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        fused::row_scores<lanes>(query, rows, stride, tokens, channels, scores);
    });
}
inline void add_rows(Isa isa, const float* weights, const float* rows, Index stride, Index tokens,
                     Index channels, float* output) noexcept {
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        fused::add_rows<lanes>(weights, rows, stride, tokens, channels, output);
    });
}

/// Rows of queries through a basis; see fused::project_rows.
inline void project(Isa isa, const float* queries, Index query_stride, Index rows, const Eigen::half* columns,
                    Index channels, Index kept, const float* scale, float* projected, Index stride) noexcept {
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        Index r = 0;
        for (; r + 4 <= rows; r += 4)
            fused::project_rows<lanes, 4>(queries + r * query_stride, query_stride, columns, channels, kept,
                                          scale, projected + r * stride, stride);
        for (; r < rows; ++r)
            fused::project_rows<lanes, 1>(queries + r * query_stride, query_stride, columns, channels, kept,
                                          scale, projected + r * stride, stride);
    });
}

}  // namespace detail

/// Whether fused_scores() reads tiles of keys of this format: grids per channel, widths 0 to 8.
inline bool fused_keys(const TileFormat& format) noexcept {
    if (format.side() != TileSide::keys || format.rule().granularity != Granularity::per_channel)
        return false;
    return std::all_of(format.segments().begin(), format.segments().end(),
                       [](const TileFormat::Placed& s) { return s.bits <= 8; });
}
/// Whether fused_output() reads tiles of values of this format: one segment of 1 to 8 bits, grids per token
/// over the head or over multiples of 16 channels.
inline bool fused_values(const TileFormat& format) noexcept {
    if (format.side() != TileSide::values || format.rule().granularity != Granularity::per_token)
        return false;
    return format.segments().size() == 1 && format.segments()[0].bits >= 1 &&
           format.segments()[0].bits <= 8 &&
           (format.rule().group >= format.channels() || format.rule().group % unit_lanes == 0);
}

/// scores[r * 128 + t] = offsets[r] + q_r . k'_t for all 128 tokens of a tile of keys. queries: rows x
/// channels, `stride` apart; rows at most fused_rows. ahead: a tile that is read next, or the same.
inline void fused_scores(Isa isa, const TileFormat& format, const std::byte* tile, const std::byte* ahead,
                         const float* queries, Index stride, Index rows, const float* offsets,
                         FusedScratch& scratch, float* scores) noexcept {
    for (Index r = 0; r < rows; ++r) std::fill_n(scores + r * tile_tokens, tile_tokens, offsets[r]);
    const Index group = format.rule().group, blocks = group / unit_lanes;
    for (const TileFormat::Placed& segment : format.segments()) {
        if (segment.bits == 0) continue;
        const Index channels = segment.channels, depth = detail::fused::padded_depth(channels);
        const bool symmetric = segment.scheme == Scheme::symmetric;
        const auto* step = reinterpret_cast<const Eigen::half*>(tile + segment.step_at);
        const auto* lower = reinterpret_cast<const Eigen::half*>(tile + segment.lower_at);
        detail::FusedSums sums(scratch, rows, segment.bits > 4);
        for (Index g = 0; g * group < tile_tokens; ++g) {
            std::array<float, fused_rows> base{};
            sums.factors(isa, segment, queries + segment.first_channel, stride, step + g * channels,
                         symmetric ? nullptr : lower + g * channels, channels, depth, base.data());
            sums.sum(isa, segment, tile, ahead, g * blocks, blocks, [&](int width) {
                const Index unit = TileFormat::unit_depth(width);
                return (channels + unit - 1) / unit;
            });
            sums.add(isa, blocks, base.data(), scores + g * group, tile_tokens);
        }
    }
}

/// output[r * stride + c] += sum over t of weights[r * 128 + t] v'_tc of a tile of values, for channels
/// padded to whole 16s. weights: rows x 128, not negative, 0 where there is no token.
inline void fused_output(Isa isa, const TileFormat& format, const std::byte* tile, const std::byte* ahead,
                         const float* weights, Index rows, FusedScratch& scratch, float* output,
                         Index stride) noexcept {
    const TileFormat::Placed& segment = format.segments()[0];
    const Index run = std::min(format.rule().group, segment.channels);
    const bool symmetric = segment.scheme == Scheme::symmetric;
    const auto* step = reinterpret_cast<const Eigen::half*>(tile + segment.step_at);
    const auto* lower = reinterpret_cast<const Eigen::half*>(tile + segment.lower_at);
    detail::FusedSums sums(scratch, rows, segment.bits > 4);
    for (Index first = 0, g = 0; first < segment.channels; first += run, ++g) {
        const Index blocks = (std::min(run, segment.channels - first) + unit_lanes - 1) / unit_lanes;
        std::array<float, fused_rows> base{};
        sums.factors(isa, segment, weights, tile_tokens, step + g * tile_tokens,
                     symmetric ? nullptr : lower + g * tile_tokens, tile_tokens, tile_tokens, base.data());
        sums.sum(isa, segment, tile, ahead, first / unit_lanes, blocks,
                 [](int width) { return tile_tokens / TileFormat::unit_depth(width); });
        sums.add(isa, blocks, base.data(), output + first, stride);
    }
}

/// What some tokens contribute to the attention of a few rows: exp(score - largest) summed, and times values.
/// Contributions merge in any grouping (flash decoding); for equal results, always in the same one.
struct PartialAttention {
    float* largest;  ///< rows; -infinity: nothing yet
    float* sum;      ///< rows
    float* output;   ///< rows x stride
    Index stride;    ///< channels padded to whole 16s
};

/// Turns the scores of `count` tokens (a multiple of 16; -infinity: not seen) into weights, and scales down
/// what is there where a larger score has come. scores: rows, 128 apart.
inline void fused_softmax(Isa isa, float* scores, Index count, Index rows,
                          const PartialAttention& partial) noexcept {
    constexpr float none = -std::numeric_limits<float>::infinity();
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        for (Index r = 0; r < rows; ++r) {
            float* const row = scores + r * tile_tokens;
            const float top = std::max(partial.largest[r], detail::fused::largest_of<lanes>(row, count));
            if (top == none) {
                std::fill_n(row, count, 0.0f);
                continue;
            }
            const float sum = detail::fused::weigh<lanes>(row, top, count);
            if (top > partial.largest[r]) {
                const float rescale = partial.largest[r] == none ? 0.0f : std::exp(partial.largest[r] - top);
                partial.sum[r] *= rescale;
                detail::fused::multiply<lanes>(partial.output + r * partial.stride, rescale, partial.stride);
                partial.largest[r] = top;
            }
            partial.sum[r] += sum;
        }
    });
}

/// Adds another contribution of one row.
inline void merge_partial(const PartialAttention& to, const PartialAttention& from, Index row) noexcept {
    constexpr float none = -std::numeric_limits<float>::infinity();
    if (from.largest[row] == none) return;
    const float top = std::max(to.largest[row], from.largest[row]);
    const float keep = to.largest[row] == none ? 0.0f : std::exp(to.largest[row] - top),
                take = std::exp(from.largest[row] - top);
    to.sum[row] = to.sum[row] * keep + from.sum[row] * take;
    for (Index c = 0; c < to.stride; ++c)
        to.output[row * to.stride + c] =
            to.output[row * to.stride + c] * keep + from.output[row * from.stride + c] * take;
    to.largest[row] = top;
}

}  // namespace kvplane
