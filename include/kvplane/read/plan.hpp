// kvplane/read/plan.hpp: how many planes to read of each group, for the least error under a budget (T12).
//
// What a term of a score or an output may be off by is its factor (query, softmax weight) times the width of
// the cell that was read, so that small factors need few bits. Query heads that share a key head share its
// reads: the importance of a group sums up, or is the largest of, what all of them lose.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>

#include "kvplane/attention/plane_groups.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane::detail {

/// Channels or tokens that are read to the same depth. Their importance is the sum of squared factors times
/// steps: what an error of one step in each of them adds to the squared error. Where a bound is asked for, it
/// is the sum of factors times steps.
struct PlaneGroup {
    float importance;
    PlaneSplit split;
    int size;
};

/// What reading plane `plane` as well gains for each bit of a code and each of importance. A group that is
/// read in part errs by importance 4^(unread bits) / 12.
constexpr float plane_worth(const PlaneSplit& split, int plane) noexcept {
    const int unread = split.shift(plane), width = split[plane];
    return (power_of_two(2 * (unread + width)) - power_of_two(2 * unread)) /
           (12.0f * static_cast<float>(width));
}
/// What plane `plane` takes off unread_reach(), for each of its bits.
constexpr float plane_reach(const PlaneSplit& split, int plane) noexcept {
    return (unread_reach(split, plane) - unread_reach(split, plane + 1)) / static_cast<float>(split[plane]);
}
inline float plane_gain(float importance, float worth) noexcept {
    const float gain = importance * worth;
    return gain <= std::numeric_limits<float>::max() ? gain : std::numeric_limits<float>::max();
}

/// How many planes to read of each group, so that the expected squared error is least and at most `budget`
/// bits are read altogether (a plane of a group takes width * size). The largest gains for a bit come first.
/// That is exact where all planes take the same, because gains fall with every plane; otherwise it is off by
/// what the last plane that did not fit would have gained. What is not finite is read first.
///   order    [groups * max_planes], overwritten
///   planes   [groups], the result
///   deepest  planes that are read of any group at most
inline void choose_planes(std::span<const PlaneGroup> groups, Index budget, std::span<std::uint32_t> order,
                          std::span<std::uint8_t> planes, int deepest = PlaneSplit::max_planes) noexcept {
    constexpr std::size_t most = PlaneSplit::max_planes;
    std::size_t count = 0;
    for (std::size_t g = 0; g < groups.size(); ++g)
        for (int p = 0; p < std::min(groups[g].split.count, deepest); ++p)
            order[count++] = static_cast<std::uint32_t>(g * most + static_cast<std::size_t>(p));
    const auto gain = [&](std::uint32_t item) {
        const PlaneGroup& group = groups[item / most];
        return plane_gain(group.importance, plane_worth(group.split, static_cast<int>(item % most)));
    };
    std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count),
              [&](std::uint32_t a, std::uint32_t b) {
                  const float gain_a = gain(a), gain_b = gain(b);
                  return gain_a != gain_b ? gain_a > gain_b : a < b;
              });
    std::fill(planes.begin(), planes.end(), std::uint8_t{0});
    for (std::size_t i = 0; i < count; ++i) {
        const std::size_t g = order[i] / most, p = order[i] % most;
        const Index takes = static_cast<Index>(groups[g].split[static_cast<int>(p)]) * groups[g].size;
        if (planes[g] != p || takes > budget) continue;
        ++planes[g];
        budget -= takes;
    }
}

/// The same choice for so many groups that sorting would take longer than reading. Planes fall into buckets
/// by their gain, each bucket a sixteenth of a power of two wide, and whole buckets are read, the largest
/// first. Amounts are bits, or errors.
class GainHistogram {
  public:
    static constexpr float bucket_ratio = 1.0625f;  ///< of a bucket's edges, at most

    /// The least number of the same bucket.
    static float rounded_down(float gain) noexcept { return edge(bucket(gain)); }

    void clear() noexcept { amounts_.fill(0.0); }
    void add(float gain, double amount) noexcept { amounts_[bucket(gain)] += amount; }
    /// The order of additions does not matter, as long as amounts are whole numbers below 2^53.
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

/// Codes of a full tile: elements of segments that have bits.
inline Index stored_elements(const TileFormat& format) noexcept {
    Index sum = 0;
    for (const TileFormat::Placed& s : format.segments()) sum += s.bits > 0 ? s.channels * s.rows : 0;
    return sum;
}
/// Bits of the codes of a tile of which planes [groups] are read; nullptr: all.
inline Index bits_read(const TileFormat& format, const std::uint8_t* planes) noexcept {
    Index sum = 0;
    for (const TileFormat::Placed& s : format.segments()) {
        if (s.bits == 0) continue;
        const Index size = grouped_elements(format, s), other = s.channels * s.rows / size;
        if (!planes) {
            sum += size * other * s.bits;
            continue;
        }
        std::array<Index, PlaneSplit::max_planes + 1> prefix{};
        for (int p = 0; p <= s.split.count; ++p) prefix[static_cast<std::size_t>(p)] = s.split.prefix_bits(p);
        const Index depth = plane_group_size(s.split);
        Index bits = 0;
        for (Index first = 0; first < size; first += depth)
            bits += std::min(depth, size - first) * prefix[*planes++];
        sum += other * bits;
    }
    return sum;
}

}  // namespace kvplane::detail
