// kvplane/read/exponents.hpp: AlignedKV (arXiv 2409.16546): 16, 12, 8 or no bits of fp16 by exponents (T11).
//
// A term of a sum needs fewer bits the further its exponent lies below that of the largest term.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "kvplane/attention/lanes.hpp"
#include "kvplane/attention/read_policy.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/read/value_importance.hpp"

namespace kvplane {

/// floor(log2 |x|), but -14 for all that is smaller than the smallest normal fp16 number, zero included: the
/// exponent that tells the last place of an fp16 number.
inline int alignment_exponent(float x) noexcept {
    return std::abs(x) < 0x1p-14f ? -14 : std::ilogb(x);
}

namespace detail {

constexpr int aligned_bits(int below, const AlignmentThresholds& thresholds) noexcept {
    if (below >= thresholds.none) return 0;
    return below >= thresholds.eight ? 8 : below >= thresholds.twelve ? 12 : 16;
}

/// Bits for a channel whose query or keys are zero.
constexpr int bits_of_nothing(const AlignmentThresholds& thresholds) noexcept {
    return thresholds.none < AlignmentThresholds::never ? 0 : 8;
}
/// The same in planes of {8, 4, 4}.
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

namespace detail {

/// The exponents of alignment_exponent(), and -1000 of 0, which has no term.
template <int Lanes>
KVPLANE_INLINE void exponents(const float* x, Ints<Lanes>& to) {
    Ints<Lanes> bits;
    load(bits, x);
    bits &= 0x7FFFFFFF;
    const Ints<Lanes> exponent = (bits >> 23) - 127, least = Ints<Lanes>{} - 14;
    const Ints<Lanes> some = exponent < least ? least : exponent;
    to = bits == 0 ? Ints<Lanes>{} - 1000 : some;
}
/// below[c]: how far the largest term of channel c lies below the largest of its row, in exponents, for the
/// row where that is least. of_keys: exponents of the largest |k|, `padded` of them; x likewise padded.
template <int Lanes>
KVPLANE_INLINE void exponents_below(const float* x, Index stride, Index rows, const std::int32_t* of_keys,
                                    Index padded, std::int32_t* below) {
    for (Index r = 0; r < rows; ++r) {
        Ints<Lanes> most = Ints<Lanes>{} - 3000, q, k, least;
        for (Index c = 0; c < padded; c += Lanes) {
            exponents<Lanes>(x + r * stride + c, q);
            load(k, of_keys + c);
            q += k;
            most = most < q ? q : most;
        }
        int top = most[0];
        for (int i = 1; i < Lanes; ++i) top = std::max<int>(top, most[i]);
        for (Index c = 0; c < padded; c += Lanes) {
            exponents<Lanes>(x + r * stride + c, q);
            load(k, of_keys + c);
            q = top - (q + k);
            if (r > 0) {
                load(least, below + c);
                q = least < q ? least : q;
            }
            store(below + c, q);
        }
    }
}

/// Planes of fp16 keys by the exponents of queries and largest magnitudes (aligned_key_bits(), for units);
/// all planes of what has grids.
inline void align_keys(Isa isa, const TileFormat& format, const std::byte* tile, RowView<const float> queries,
                       const AlignmentThresholds& thresholds, AttentionScratch& scratch,
                       std::uint8_t* planes) noexcept {
    const Index rows = queries.rows;
    for (const TileFormat::Placed& s : format.segments()) {
        if (s.bits == 0) continue;
        const Index depth = plane_group_size(s.split), units = (s.channels + depth - 1) / depth,
                    padded = padded_channels(s.channels);
        if (!s.is_half()) {
            std::fill_n(planes, units, static_cast<std::uint8_t>(s.split.count));
            planes += units;
            continue;
        }
        std::int32_t *const of_keys = scratch.sums(), *const below = of_keys + padded;
        const std::uint8_t* const fields = largest_exponents(s, tile);
        for (Index c = 0; c < s.channels; ++c) of_keys[c] = std::max<int>(fields[c], 1) - 15;
        std::fill(of_keys + s.channels, of_keys + padded, 0);
        const float* x = queries.data + s.first_channel;
        Index stride = queries.stride;
        if (padded != s.channels) {
            for (Index r = 0; r < rows; ++r) {
                float* const row = scratch.rows()[r];
                std::copy_n(x + r * stride, s.channels, row);
                std::fill(row + s.channels, row + padded, 0.0f);
            }
            x = scratch.rows().data;
            stride = scratch.depth();
        }
        run_on(isa, [=](auto lanes)
                        KVPLANE_BODY { exponents_below<lanes>(x, stride, rows, of_keys, padded, below); });
        for (Index u = 0; u < units; ++u) {
            const std::int32_t* const first = below + u * depth;
            std::int32_t least = first[0];
            for (Index i = 1; i < std::min(depth, s.channels - u * depth); ++i)
                least = std::min(least, first[i]);
            *planes++ = static_cast<std::uint8_t>(aligned_planes(least, thresholds));
        }
    }
}

/// Keys by the exponents of queries and of each channel's largest magnitude in the tile; values by those of the
/// softmax weights.
class ExponentsPlanner final : public ReadPlanner {
  public:
    void begin(const PlanContext& context) override {
        context_ = context;
        importance_.begin(context, GroupWeight::largest);
        planes_.begin(context);
    }
    Index keys(const PlanPlace& place, RowView<const float> queries, AttentionScratch& scratch,
               TileRead& read) noexcept override {
        const TileFormat& format = context_.tiles->layout->key_format(subspace_of(place));
        std::uint8_t* const planes = planes_.of(place.worker);
        align_keys(context_.isa, format, read.tile, queries, context_.policy.thresholds, scratch, planes);
        read.planes = planes;
        return bits_read(format, planes);
    }
    void scored(const PlanPlace& place, AttentionScratch& scratch) noexcept override {
        importance_.note(place, scratch);
    }
    void values(const PlanPlace& place, std::uint8_t* planes) noexcept override {
        const RowBlock& block = place.block;
        const TileWeights& weights = *context_.weights;
        for (Index g = 0; g < importance_.groups(); ++g) {
            float largest = 0.0f;
            for (Index row = block.first; row < block.first + block.rows; ++row)
                largest = std::max(largest, importance_.weights_of(place.tile, row)[g] *
                                                weights.rescale(place.tile, row, weights.largest(row)));
            // The exponent field: a weight is at most 1, and 0 where it would not be a normal number.
            const int below = 127 - static_cast<int>(std::bit_cast<std::uint32_t>(largest) >> 23);
            const int have = !importance_.split().is_half() ? importance_.split().count
                             : largest > 0.0f ? aligned_planes(below, context_.policy.thresholds)
                                              : 0;
            planes[g] = static_cast<std::uint8_t>(have);
        }
    }

  private:
    Index subspace_of(const PlanPlace& place) const noexcept {
        return context_.tiles->layout->subspace_of(place.block.head);
    }

    PlanContext context_{};
    ValueImportance importance_;
    KeyPlanes planes_;
};

}  // namespace detail
}  // namespace kvplane
