// kvplane/read/exponents.hpp: AlignedKV (arXiv 2409.16546): 16, 12, 8 or no bits of fp16 by exponents (T11).
//
// A term of a sum needs fewer bits the further its exponent lies below that of the largest term.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "kvplane/attention/read_policy.hpp"
#include "kvplane/compiled.hpp"
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
std::vector<int> aligned_key_bits(const Matrix& queries, const Eigen::Ref<const Eigen::RowVectorXf>& largest,
                                  const AlignmentThresholds& thresholds = {});

/// Bits to read of each token's fp16 values, from its softmax weights (rows x tokens, of any common scale):
/// the same rule with the exponents of weights. Weights that are not finite read all. Throws Error (option).
std::vector<int> aligned_value_bits(const Matrix& weights, const AlignmentThresholds& thresholds = {});

namespace detail {

/// Planes of fp16 keys by the exponents of queries and largest magnitudes (aligned_key_bits(), for units);
/// all planes of what has grids.
void align_keys(Isa isa, const TileFormat& format, const std::byte* tile, RowView<const float> queries,
                const AlignmentThresholds& thresholds, AttentionScratch& scratch,
                std::uint8_t* planes) noexcept;

/// Keys by the exponents of queries and of each channel's largest magnitude in the tile; values by those of
/// the softmax weights.
class ExponentsPlanner final : public ReadPlanner {
  public:
    void begin(const PlanContext& context) override {
        context_ = context;
        importance_.begin(context, GroupWeight::largest);
        planes_.begin(context);
    }
    Index keys(const PlanPlace& place, RowView<const float> queries, AttentionScratch& scratch,
               TileRead& read) noexcept override {
        const TileFormat& format = context_.tiles->layout->key_format_of_head(place.block.head);
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
    PlanContext context_{};
    ValueImportance importance_;
    KeyPlanes planes_;
};

}  // namespace detail
}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/read/impl/exponents.hpp"
#endif
