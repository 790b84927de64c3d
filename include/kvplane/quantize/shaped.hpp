// kvplane/quantize/shaped.hpp: codes of keys chosen so that scores err least, not keys.
//
// A grid's nearest codes make the error e = x' - x of a key as small as can be. What counts is u.e, the error
// of its score with a query u, and over many queries e^T C e with C = E[u u^T]. C is far from a multiple of
// the identity: queries look along few directions. So the codes of one key are chosen together:
//
//   1. Error feedback. Channels are coded one after another, in the order of falling C_cc step_c^2. With
//      C = L D L^T, L unit triangular in that order, the target of channel j is
//
//          x_j - sum over channels i before j of L_ij e_i,
//
//      so that its code makes up for errors already made, as far as queries see both alike. This is the
//      greedy minimum of e^T C e. At high rate the expectation is sum_j D_j step_j^2 / 12 instead of
//      sum_j C_jj step_j^2 / 12 (theorem T15).
//   2. Coordinate descent. Each code in turn becomes the best one for the others as they stand, which never
//      raises e^T C e.
//
// A ridge on C keeps codes sensible where queries are few. Step 1 is LDLQ (QuIP, arXiv 2307.13304) and GPTQ
// (arXiv 2210.17323), applied to a cache instead of weights. Decoding does not change, nor do grids, planes
// and bytes. Single errors may exceed half a step; how far is reported, for bounds of errors.
//
// The same input gives the same codes on every machine (see shaped_kernels.hpp). Rejected: coding tokens
// along the sequence, whose weights hardly correlate; refitting grids afterwards, which shrinks keys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/rule.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/simd/line_vector.hpp"

namespace kvplane {

/// How codes are shaped.
struct Shaping {
    double ridge = 0.1;  ///< added to the diagonal of C, times its mean
    int passes = 2;      ///< of coordinate descent
};

/// Tokens of one head whose channels have grids, and where their codes go.
struct ShapedBlock {
    const float* values = nullptr;  ///< [token][value_stride], |x| <= fp16_max
    Index value_stride = 0;
    Index tokens = 0, channels = 0;
    int bits = 8;
    const float* lower = nullptr;   ///< [channel]
    const float* step = nullptr;    ///< [channel], 0 for a channel whose code is 0
    std::uint8_t* codes = nullptr;  ///< [token][code_stride]
    Index code_stride = 0;
};

/// Expected e^T C e of a token, with C and its ridge, if errors are uniform in their cells (theorem T15).
struct ScoreError {
    double shaped = 0.0;
    double plain = 0.0;  ///< with each value's nearest code
};

/// Shaped codes of one head at a time, in memory that is reused from head to head.
class ShapedQuantizer {
  public:
    explicit ShapedQuantizer(const Shaping& shaping = {});

    /// Sets C = E[u u^T] [channel][channel], symmetric, on any scale. Where C with its ridge is not positive
    /// definite (zero, for instance), or so nearly singular that a pivot is below 2^-20 of its diagonal,
    /// codes are those of Grid::encode. Throws Error (shape, not_finite).
    void set_weight(const Eigen::Ref<const MatrixD>& weight);
    /// The same from floats.
    void set_weight(const Eigen::Ref<const Matrix>& weight);

    /// Writes the codes of a block. Returns how far errors exceed half a step, apart from what fp32 rounds:
    /// |x - x'| <= step / 2 + largest. Throws Error (shape) if the block's channels are not those of C,
    /// (option) for bits outside 1 to 8, (not_finite, beyond_fp16) for values or grids that cannot be.
    ClipExcess encode(const ShapedBlock& block);

    /// What encode() is expected to reach with these steps [channel] if there are many cells and none of them
    /// is the last. It decides between two frames of the same keys, and is the same on every machine. Where
    /// codes are not shaped both numbers are equal. Throws Error (shape, not_finite, option).
    ScoreError expected_error(const Eigen::Ref<const Eigen::VectorXf>& step);

  private:
    /// The tokens of a block that are coded together.
    struct Run {
        Index first = 0, count = 0;
        bool shaped = false;
    };

    static constexpr std::size_t at(Index place) noexcept { return static_cast<std::size_t>(place); }
    template <class Scalar>
    void take_weight(const Scalar* entries, Index rows, Index columns, Index stride);
    void require_steps(const float* step, Index channels) const;
    [[noreturn]] void refuse_value(const ShapedBlock& block) const;
    void order_places(const float* step);
    void lay_out();
    bool prepare(const float* step, bool with_weights);
    bool code_tile(const ShapedBlock& block, const Run& run, ClipExcess& excess);

    Isa isa_ = current_isa();
    Shaping shaping_;
    Index channels_ = 0, places_ = 0, stride_ = 0;
    Index laid_out_ = 0;                  ///< channels that the arrays by places have room for
    int exponent_ = 0;                    ///< C is weight_ times 2 to this
    detail::LineVector<float> weight_;    ///< [channel][channel], the largest entry 1/2 to 1
    std::vector<Index> order_;            ///< [place]: the channel there
    std::vector<Index> place_of_;         ///< [channel]
    std::vector<std::uint64_t> ranks_;    ///< what falls, then the channel
    detail::LineVector<float> by_place_;  ///< weight_ [place][stride]
    detail::LineVector<float> step_;      ///< [place]
    detail::LineVector<double> rest_, pivots_, left_, right_;
    detail::LineVector<float> ratios_, room_, lower_, inverse_;
    detail::LineVector<std::int16_t> feedback_, descent_;  ///< [place][stride]
    detail::LineVector<std::int32_t> columns_;             ///< [pair of places][stride] of descent_
    detail::LineVector<std::int32_t> feedback_shifts_, descent_shifts_;  ///< [place][2]
    detail::LineVector<float> values_;                                   ///< [channel][tile]
    detail::LineVector<std::int32_t> positions_, errors_, sums_;
    detail::LineVector<std::uint8_t> codes_;
};

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/quantize/impl/shaped.hpp"
#endif
