// kvplane/allocate/precision_alignment.hpp: how many bits of what is stored a query needs to read.
//
// A cache of bit planes can be read in part: a prefix of the planes is a coarser code. What a term of a score
// or an output may be off by is its factor (query, softmax weight) times the width of the cell that was read,
// so that small factors need few bits. Two rules:
//
//   aligned_key_bits, aligned_value_bits   AlignedKV (arXiv 2409.16546): 16, 12, 8 or no bits of fp16 by
//   exponents choose_planes                          planes of grids by marginal gain under a budget of bits
//
// Query heads that share a key head share its reads: the most demanding head decides (or, for the budget, the
// sum of what all heads lose).
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/storage/planes.hpp"

namespace kvplane {

/// How far below the largest term's exponent a term must lie to be read at 12 and at 8 of 16 bits.
struct AlignmentThresholds {
    static constexpr int never = 1000;

    int twelve = 4;
    int eight = 8;
    int none = 12;  ///< not read at all: beyond the paper, which always reads 8 bits

    /// What the bound of T11 supports.
    static constexpr AlignmentThresholds supported() noexcept { return {4, 8, 12}; }
    /// A quarter of that error for each term: outputs are sums over thousands of tokens.
    static constexpr AlignmentThresholds accurate() noexcept { return {6, 10, 14}; }
    /// What the published code ships, where that code differs from its paper: no bound holds.
    static constexpr AlignmentThresholds published() noexcept { return {1, 2, never}; }

    constexpr bool operator==(const AlignmentThresholds&) const = default;
};

/// floor(log2 |x|), but -14 for all that is smaller than the smallest normal fp16 number, zero included: the
/// exponent that tells the last place of an fp16 number.
inline int alignment_exponent(float x) noexcept {
    return std::abs(x) < 0x1p-14f ? -14 : std::ilogb(x);
}

namespace detail {

inline void require_thresholds(const AlignmentThresholds& thresholds) {
    require(thresholds.twelve >= 0 && thresholds.eight >= thresholds.twelve &&
                thresholds.none >= thresholds.eight,
            ErrorCode::option, "alignment thresholds: ", thresholds.twelve, ", ", thresholds.eight, " and ",
            thresholds.none, ", expected 0 <= twelve <= eight <= none");
}
constexpr int aligned_bits(int below, const AlignmentThresholds& thresholds) noexcept {
    if (below >= thresholds.none) return 0;
    return below >= thresholds.eight ? 8 : below >= thresholds.twelve ? 12 : 16;
}

/// Of what has no term at all.
constexpr int bits_of_nothing(const AlignmentThresholds& thresholds) noexcept {
    return thresholds.none < AlignmentThresholds::never ? 0 : 8;
}
/// The same as planes of {8, 4, 4}.
constexpr int aligned_planes(int below, const AlignmentThresholds& thresholds) noexcept {
    const int bits = aligned_bits(below, thresholds);
    return bits == 0 ? 0 : bits / 4 - 1;
}

}  // namespace detail

/// Bits to read of each fp16 key channel (16, 12, 8 or 0), for the rows of `queries` (rows x channels: the
/// heads that share a key head). largest: max |k| by channel over the keys in question; the published code
/// takes the signed maximum, which is too small where keys are mostly negative. A query that is not finite
/// reads all. Throws Error (shape, option).
inline std::vector<int> aligned_key_bits(const Matrix& queries,
                                         const Eigen::Ref<const Eigen::RowVectorXf>& largest,
                                         const AlignmentThresholds& thresholds = {}) {
    detail::require_thresholds(thresholds);
    require(queries.cols() == largest.size(), ErrorCode::shape, "aligned_key_bits: maxima of ",
            largest.size(), " channels, expected ", queries.cols());
    const Index channels = queries.cols();
    std::vector<int> bits(static_cast<std::size_t>(channels), detail::bits_of_nothing(thresholds));
    for (Index r = 0; r < queries.rows(); ++r) {
        if (!queries.row(r).allFinite()) return std::vector<int>(bits.size(), 16);
        int top = std::numeric_limits<int>::min();
        const auto exponent = [&](Index c) {
            return alignment_exponent(queries(r, c)) + alignment_exponent(largest[c]);
        };
        for (Index c = 0; c < channels; ++c) top = std::max(top, exponent(c));
        for (Index c = 0; c < channels; ++c) {
            // A channel that the query does not look at, or that holds nothing, has no term.
            if (queries(r, c) == 0.0f || largest[c] == 0.0f) continue;
            int& most = bits[static_cast<std::size_t>(c)];
            most = std::max(most, detail::aligned_bits(top - exponent(c), thresholds));
        }
    }
    return bits;
}

/// Bits to read of each token's fp16 values, from its softmax weights (rows x tokens, of any common scale):
/// the same rule with the exponents of weights. Weights that are not finite read all. Throws Error (option).
inline std::vector<int> aligned_value_bits(const Matrix& weights,
                                           const AlignmentThresholds& thresholds = {}) {
    detail::require_thresholds(thresholds);
    std::vector<int> bits(static_cast<std::size_t>(weights.cols()), detail::bits_of_nothing(thresholds));
    for (Index r = 0; r < weights.rows(); ++r) {
        if (!weights.row(r).allFinite()) return std::vector<int>(bits.size(), 16);
        const float largest = weights.row(r).maxCoeff();
        if (largest <= 0.0f) continue;
        const int top = std::ilogb(largest);
        for (Index t = 0; t < weights.cols(); ++t) {
            if (weights(r, t) <= 0.0f) continue;
            int& most = bits[static_cast<std::size_t>(t)];
            most = std::max(most, detail::aligned_bits(top - std::ilogb(weights(r, t)), thresholds));
        }
    }
    return bits;
}

/// Channels or tokens that are read to the same depth. Their importance is the sum of squared factors times
/// steps: what an error of one step in each of them adds to the squared error. Where a bound is asked for it
/// is the sum of factors times steps.
struct ReadUnit {
    float importance;
    PlaneSplit split;
    int size;
};

/// What reading plane `plane` as well gains for each bit of a code and each of importance: read in part, a
/// unit errs by importance 4^(unread bits) / 12.
constexpr float plane_worth(const PlaneSplit& split, int plane) noexcept {
    const int unread = split.shift(plane), width = split[plane];
    return (power_of_two(2 * (unread + width)) - power_of_two(2 * unread)) /
           (12.0f * static_cast<float>(width));
}
/// How far a code of which `planes` planes are read lies at most from what it counts as: the middle of what
/// the unread bits hold, (2^unread - 1) / 2; for fp16, whose fill is a bit pattern, 2^unread / 2.
constexpr float unread_reach(const PlaneSplit& split, int planes) noexcept {
    const int unread = split.bits() - split.prefix_bits(planes);
    return unread == 0 ? 0.0f : 0.5f * (power_of_two(unread) - (split.bits() == 16 ? 0.0f : 1.0f));
}
/// What plane `plane` takes off that, for each of its bits.
constexpr float plane_reach(const PlaneSplit& split, int plane) noexcept {
    return (unread_reach(split, plane) - unread_reach(split, plane + 1)) / static_cast<float>(split[plane]);
}
inline float plane_gain(float importance, float worth) noexcept {
    const float gain = importance * worth;
    return gain <= std::numeric_limits<float>::max() ? gain : std::numeric_limits<float>::max();
}

/// How many planes to read of each unit, so that the expected squared error is least and at most `budget`
/// bits are read altogether (a plane of a unit takes width * size). The largest gains for a bit come first,
/// which is exact where all planes take the same (T12: gains fall with every plane), and else off by what the
/// last one that did not fit would have gained. What is not finite is read first. noexcept: it runs at reads.
/// order: room for a number for each plane of each unit. deepest: planes that are read of any unit at most.
inline void choose_planes(std::span<const ReadUnit> units, Index budget, std::span<std::uint16_t> order,
                          std::span<std::uint8_t> planes, int deepest = 3) noexcept {
    constexpr std::size_t most = 3;
    std::size_t count = 0;
    for (std::size_t u = 0; u < units.size(); ++u)
        for (int p = 0; p < std::min(units[u].split.count, deepest); ++p)
            order[count++] = static_cast<std::uint16_t>(u * most + static_cast<std::size_t>(p));
    const auto gain = [&](std::uint16_t item) {
        const ReadUnit& unit = units[item / most];
        return plane_gain(unit.importance, plane_worth(unit.split, static_cast<int>(item % most)));
    };
    std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count),
              [&](std::uint16_t a, std::uint16_t b) {
                  const float gain_a = gain(a), gain_b = gain(b);
                  return gain_a != gain_b ? gain_a > gain_b : a < b;
              });
    std::fill(planes.begin(), planes.end(), std::uint8_t{0});
    for (std::size_t i = 0; i < count; ++i) {
        const std::size_t u = order[i] / most, p = order[i] % most;
        const Index takes = static_cast<Index>(units[u].split[static_cast<int>(p)]) * units[u].size;
        if (planes[u] != p || takes > budget) continue;
        ++planes[u];
        budget -= takes;
    }
}

/// The same for so many units that sorting would take longer than reading: planes in buckets by gain, each a
/// sixteenth of a power of two, of which the largest are read, whole. Amounts are bits, or errors.
class GainHistogram {
  public:
    static constexpr float bucket_ratio = 1.0625f;  ///< of a bucket's edges, at most

    /// The least number of the same bucket.
    static float rounded_down(float gain) noexcept { return edge(bucket(gain)); }

    void clear() noexcept { amounts_.fill(0.0); }
    void add(float gain, double amount) noexcept { amounts_[bucket(gain)] += amount; }
    /// In any order for whole numbers below 2^53.
    void add(const GainHistogram& other) noexcept {
        for (std::size_t b = 0; b < amounts_.size(); ++b) amounts_[b] += other.amounts_[b];
    }
    /// body(least gain, amount) of every bucket that has some.
    template <class Body>
    void for_each(const Body& body) const noexcept {
        for (std::size_t b = 0; b < amounts_.size(); ++b)
            if (amounts_[b] != 0.0) body(edge(b), amounts_[b]);
    }
    /// The least gain that is read if at most `budget` is.
    float least(double budget) const noexcept {
        for (std::size_t b = amounts_.size(); b-- > 0;) {
            if (amounts_[b] > budget)
                return b + 1 < amounts_.size() ? edge(b + 1) : std::numeric_limits<float>::infinity();
            budget -= amounts_[b];
        }
        return 0.0f;
    }
    /// The least gain that is read if at most `allowed` is not.
    float least_but(double allowed) const noexcept {
        for (std::size_t b = 0; b < amounts_.size(); ++b) {
            if (amounts_[b] > allowed) return edge(b);
            allowed -= amounts_[b];
        }
        return std::numeric_limits<float>::infinity();
    }

  private:
    // The exponent and 4 bits of the fraction. What is not a gain (NaN, or below 0) counts as the largest.
    static std::size_t bucket(float gain) noexcept {
        return std::min<std::size_t>(std::bit_cast<std::uint32_t>(gain) >> 19, buckets - 1);
    }
    static float edge(std::size_t bucket) noexcept {
        return std::bit_cast<float>(static_cast<std::uint32_t>(bucket << 19));
    }
    static constexpr std::size_t buckets = 0x7F800000u / (1u << 19) + 1;
    std::array<double, buckets> amounts_{};
};

}  // namespace kvplane
