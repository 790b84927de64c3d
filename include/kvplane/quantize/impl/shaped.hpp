// kvplane/quantize/impl/shaped.hpp: from a second moment and grids to codes.
#pragma once

#include "kvplane/quantize/shaped.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kvplane/error.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/shaped_kernels.hpp"
#include "kvplane/simd/transpose.hpp"

namespace kvplane {

KVPLANE_FUNCTION ShapedQuantizer::ShapedQuantizer(const Shaping& shaping) : shaping_(shaping) {
    require(std::isfinite(shaping.ridge) && shaping.ridge >= 0.0, ErrorCode::option, "ridge: ", shaping.ridge,
            ", expected 0 or more");
    require(shaping.passes >= 0, ErrorCode::option, "passes: ", shaping.passes, ", expected 0 or more");
}

template <class Scalar>
void ShapedQuantizer::take_weight(const Scalar* entries, Index channels, Index columns, Index stride) {
    require(columns == channels && channels >= 1 && channels <= detail::shaped::max_channels,
            ErrorCode::shape, "weight: ", channels, " x ", columns, ", expected a square matrix of 1 to ",
            detail::shaped::max_channels, " channels");
    const double largest = detail::run_on(isa_, [=](auto lanes) KVPLANE_BODY {
        double of_all = 0.0;
        for (Index i = 0; i < channels; ++i) {
            const double of_row = detail::shaped::largest_magnitude<lanes>(entries + i * stride, channels);
            if (!(of_row <= of_all)) of_all = of_row;
            if (!(of_all <= std::numeric_limits<double>::max())) break;
        }
        return of_all;
    });
    if (!std::isfinite(largest))
        for (Index i = 0; i < channels; ++i)
            for (Index j = 0; j < channels; ++j)
                require(std::isfinite(entries[i * stride + j]), ErrorCode::not_finite,
                        "weight: the entry at ", i, ", ", j, " is ", entries[i * stride + j],
                        ", expected finite numbers");
    // By a power of two, so that nothing is rounded but to float; by two of them, which doubles can hold.
    std::frexp(largest, &exponent_);
    const double first = std::ldexp(1.0, -exponent_ / 2),
                 second = std::ldexp(1.0, -exponent_ - -exponent_ / 2);
    const auto diagonal = [&](Index i) {
        return static_cast<double>(entries[i * stride + i]) * first * second;
    };
    double mean = 0.0;
    for (Index i = 0; i < channels; ++i) mean += diagonal(i);
    mean /= static_cast<double>(channels);
    const double ridge = shaping_.ridge * mean;

    channels_ = channels;
    weight_.resize(at(channels * channels));
    float* const to = weight_.data();
    detail::run_on(isa_, [=](auto lanes) KVPLANE_BODY {
        for (Index i = 0; i < channels; ++i)
            detail::shaped::narrow_row<lanes>(entries + i * stride, channels, first, second,
                                              to + i * channels);
    });
    for (Index i = 0; i < channels; ++i) to[i * channels + i] = static_cast<float>(diagonal(i) + ridge);
}

KVPLANE_FUNCTION void ShapedQuantizer::set_weight(const Eigen::Ref<const MatrixD>& weight) {
    take_weight(weight.data(), weight.rows(), weight.cols(), weight.outerStride());
}
KVPLANE_FUNCTION void ShapedQuantizer::set_weight(const Eigen::Ref<const Matrix>& weight) {
    take_weight(weight.data(), weight.rows(), weight.cols(), weight.outerStride());
}

/// Places by falling C_cc step_c^2, which for equal ones is by channel.
KVPLANE_FUNCTION void ShapedQuantizer::order_places(const float* step) {
    const auto channels = at(channels_);
    order_.resize(channels);
    place_of_.resize(channels);
    ranks_.resize(channels);
    for (std::size_t c = 0; c < channels; ++c) {
        const double diagonal = weight_[c * channels + c];
        // Zeros have one sign, so that floats are in the order of their bits, negative ones in the other.
        const float importance = static_cast<float>(diagonal * step[c] * step[c]) + 0.0f;
        std::uint32_t bits;
        std::memcpy(&bits, &importance, sizeof bits);
        const std::uint32_t falling = bits >> 31 ? bits : ~bits & 0x7FFFFFFFu;
        ranks_[c] = std::uint64_t{falling} << 32 | c;
    }
    std::sort(ranks_.begin(), ranks_.end());
    for (std::size_t j = 0; j < channels; ++j) {
        order_[j] = static_cast<Index>(ranks_[j] & 0xFFFFFFFFu);
        place_of_[at(order_[j])] = static_cast<Index>(j);
    }
}

/// Makes room for C by places. What pads rows is zero, and nothing writes there.
KVPLANE_FUNCTION void ShapedQuantizer::lay_out() {
    namespace shaped = detail::shaped;
    const Index places = (channels_ + shaped::block - 1) / shaped::block * shaped::block;
    if (laid_out_ == channels_) return;
    places_ = places;
    stride_ = shaped::padded(channels_);
    const auto size = at(places_ * stride_), row = at(stride_);
    by_place_.assign(size, 0.0f);
    step_.assign(row, 0.0f);
    rest_.assign(size, 0.0);
    pivots_.assign(row, 0.0);
    left_.assign(shaped::panel * row, 0.0);
    right_.assign(shaped::panel * row, 0.0);
    ratios_.assign(row, 0.0f);
    room_.assign(row, 0.0f);
    feedback_.assign(size, 0);
    descent_.assign(size, 0);
    columns_.assign(size / 2, 0);
    feedback_shifts_.assign(at(2 * places_), 0);
    descent_shifts_.assign(at(2 * places_), 0);
    laid_out_ = channels_;
}

/// Factorizes C in the order of these steps, and makes the weights of both kinds of passes if they are
/// wanted. Returns false where codes cannot be shaped; all weights are then 0.
KVPLANE_FUNCTION bool ShapedQuantizer::prepare(const float* step, bool with_weights) {
    namespace shaped = detail::shaped;
    order_places(step);
    lay_out();
    for (Index j = 0; j < channels_; ++j) {
        const Index channel = order_[at(j)];
        step_[at(j)] = step[channel];
        const float* const from = weight_.data() + channel * channels_;
        float* const to = by_place_.data() + j * stride_;
        for (Index i = 0; i <= j; ++i) to[i] = from[order_[at(i)]];
    }
    const shaped::Factorization factorization{by_place_.data(), rest_.data(),   pivots_.data(), left_.data(),
                                              right_.data(),    ratios_.data(), channels_,      stride_};
    const float* const steps = step_.data();
    float* const room = room_.data();
    const shaped::Feedback feedback{feedback_.data(), feedback_shifts_.data(), stride_},
        descent{descent_.data(), descent_shifts_.data(), stride_};
    const Index channels = channels_, places = places_, stride = stride_;
    const bool in_columns = shaping_.passes > 1;
    std::int32_t* const columns = columns_.data();
    return detail::run_on(isa_, [&, steps, room, feedback, descent](auto lanes) KVPLANE_BODY {
        if (with_weights) detail::simd::mirror_lower(factorization.weight, stride, channels);
        const bool done = shaped::factorize<lanes>(factorization, [&](Index j) KVPLANE_BODY {
            if (!with_weights) return;
            std::int16_t *const back = feedback.weights + j * stride, *const down =
                                                                          descent.weights + j * stride;
            if (steps[j] == 0.0f) {
                std::memset(back, 0, 2 * static_cast<std::size_t>(stride));
                std::memset(down, 0, 2 * static_cast<std::size_t>(stride));
                feedback.set(j, {});
                descent.set(j, {});
                return;
            }
            feedback.set(
                j, shaped::round_row<lanes>(factorization.ratios, steps, 1.0f / steps[j], j, room, back));
            // Nothing reads the diagonal again, and no error adds to its own target.
            float* const ratios = factorization.weight + j * stride;
            const float scale = 1.0f / (ratios[j] * steps[j]);
            ratios[j] = 0.0f;
            descent.set(j, shaped::round_row<lanes>(ratios, steps, scale, channels, room, down));
        });
        if (!with_weights) return done;
        if (!done) {
            const auto bytes = 2 * static_cast<std::size_t>(places * stride);
            std::memset(feedback.weights, 0, bytes);
            std::memset(descent.weights, 0, bytes);
        } else if (in_columns) {
            detail::simd::transpose_words(descent.weights, stride / 2, places, places / 2, columns, stride);
        }
        return done;
    });
}

/// Codes up to 128 tokens. Returns false if a value cannot be stored.
KVPLANE_FUNCTION bool ShapedQuantizer::code_tile(const ShapedBlock& block, const Run& run,
                                                 ClipExcess& excess) {
    namespace shaped = detail::shaped;
    const shaped::Tile tile{places_,        block.bits,    positions_.data(),
                            errors_.data(), codes_.data(), sums_.data()};
    const shaped::Feedback feedback{feedback_.data(), feedback_shifts_.data(), stride_},
        descent{descent_.data(), descent_shifts_.data(), stride_, columns_.data()};
    const int passes = run.shaped ? shaping_.passes : 0;
    const Index channels = channels_, tokens = run.count, value_stride = block.value_stride,
                code_stride = block.code_stride;
    const float *const from = block.values + run.first * value_stride, *const lower = lower_.data(),
                       *const inverse = inverse_.data();
    float* const values = values_.data();
    std::uint8_t* const codes = block.codes + run.first * code_stride;
    const Index *const order = order_.data(), *const place_of = place_of_.data();
    const shaped::PositionRange range(block.bits);
    const shaped::TileGrids grids{values, order, lower, step_.data(), codes_.data()};
    ClipExcess of_tile;
    const bool good = detail::run_on(isa_, [=, &of_tile](auto lanes) KVPLANE_BODY {
        detail::simd::transpose_words(from, value_stride, tokens, channels, values, shaped::tile);
        bool all = true;
        for (Index j = 0; j < channels; ++j) {
            float* const of_place = values + order[j] * shaped::tile;
            for (Index t = tokens; t < shaped::tile; ++t) of_place[t] = 0.0f;
            all &= shaped::find_positions<lanes>(of_place, lower[j], inverse[j], range,
                                                 tile.positions + j * shaped::tile);
        }
        if (!all) return false;
        shaped::code_tokens<lanes>(tile, feedback, descent, passes, tokens);
        shaped::write_codes(tile.codes, place_of, tokens, channels, codes, code_stride);
        of_tile = shaped::excess_of<lanes>(grids, channels, tokens);
        return true;
    });
    if (!good) return false;
    excess.largest = std::max(excess.largest, of_tile.largest);
    excess.energy += of_tile.energy;
    return true;
}

KVPLANE_FUNCTION void ShapedQuantizer::require_steps(const float* step, Index channels) const {
    require(channels_ > 0 && channels == channels_, ErrorCode::shape, "step: ", channels,
            " channels, expected the ", channels_, " of the weight");
    for (Index c = 0; c < channels; ++c) {
        require(std::isfinite(step[c]), ErrorCode::not_finite, "step: that of channel ", c, " is ", step[c],
                ", expected finite numbers");
        require(step[c] == 0.0f || step[c] >= std::numeric_limits<float>::min(), ErrorCode::option,
                "step: that of channel ", c, " is ", step[c], ", expected 0 or a normal number above");
    }
}

KVPLANE_FUNCTION ClipExcess ShapedQuantizer::encode(const ShapedBlock& block) {
    namespace shaped = detail::shaped;
    require(block.bits >= 1 && block.bits <= 8, ErrorCode::option, "bits: ", block.bits, ", expected 1 to 8");
    require_steps(block.step, block.channels);
    for (Index c = 0; c < block.channels; ++c)
        require(std::isfinite(block.lower[c]), ErrorCode::not_finite, "lower: that of channel ", c, " is ",
                block.lower[c], ", expected finite numbers");
    require(block.tokens >= 0, ErrorCode::shape, "values: ", block.tokens, " tokens, expected 0 or more");
    ClipExcess excess;
    if (block.tokens == 0) return excess;

    Run run;
    run.shaped = prepare(block.step, true);
    const std::size_t size = at(places_ * shaped::tile);
    values_.resize(size);
    positions_.resize(size);
    std::fill(positions_.begin() + channels_ * shaped::tile, positions_.end(), 0);
    errors_.resize(size / 2);
    sums_.resize(at(places_ * shaped::strip_tokens));
    codes_.resize(size);
    lower_.resize(at(channels_));
    inverse_.resize(at(channels_));
    for (Index j = 0; j < channels_; ++j) {
        lower_[at(j)] = block.lower[order_[at(j)]];
        inverse_[at(j)] = step_[at(j)] > 0.0f ? 1.0f / step_[at(j)] : 0.0f;
    }
    for (; run.first < block.tokens; run.first += shaped::tile) {
        run.count = std::min(shaped::tile, block.tokens - run.first);
        if (!code_tile(block, run, excess)) refuse_value(block);
    }
    return excess;
}

KVPLANE_FUNCTION void ShapedQuantizer::refuse_value(const ShapedBlock& block) const {
    for (Index t = 0; t < block.tokens; ++t)
        for (Index c = 0; c < block.channels; ++c) {
            const float x = block.values[t * block.value_stride + c];
            require(std::isfinite(x), ErrorCode::not_finite, "values: that of token ", t, ", channel ", c,
                    " is ", x, "; expected finite values");
            require(std::abs(x) <= fp16_max, ErrorCode::beyond_fp16, "values: that of token ", t,
                    ", channel ", c, " is ", x, "; expected a magnitude of at most 65504, the largest fp16");
        }
    fail(ErrorCode::not_finite, "values: hold one that cannot be stored");
}

KVPLANE_FUNCTION ScoreError ShapedQuantizer::expected_error(const Eigen::Ref<const Eigen::VectorXf>& step) {
    require_steps(step.data(), step.size());
    const bool shaped = prepare(step.data(), false);
    ScoreError error;
    for (Index j = 0; j < channels_; ++j) {
        // Rounded to float, so that no product is left to contract with the sum.
        const double square = static_cast<double>(step_[at(j)]) * step_[at(j)],
                     whole = by_place_[at(j * stride_ + j)];
        error.plain += static_cast<double>(static_cast<float>(whole * square));
        error.shaped += static_cast<double>(static_cast<float>((shaped ? pivots_[at(j)] : whole) * square));
    }
    error.plain = std::ldexp(error.plain / 12.0, exponent_);
    error.shaped = std::ldexp(error.shaped / 12.0, exponent_);
    return error;
}

}  // namespace kvplane
