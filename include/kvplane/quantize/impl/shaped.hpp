// kvplane/quantize/impl/shaped.hpp: from a second moment and grids to codes.
#pragma once

#include "kvplane/quantize/shaped.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kvplane/error.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/shaped_kernels.hpp"

namespace kvplane {

KVPLANE_FUNCTION ShapedQuantizer::ShapedQuantizer(const Shaping& shaping) : shaping_(shaping) {
    require(std::isfinite(shaping.ridge) && shaping.ridge >= 0.0, ErrorCode::option, "ridge: ", shaping.ridge,
            ", expected 0 or more");
    require(shaping.passes >= 0, ErrorCode::option, "passes: ", shaping.passes, ", expected 0 or more");
}

KVPLANE_FUNCTION void ShapedQuantizer::set_weight(const Eigen::Ref<const MatrixD>& weight) {
    const Index channels = weight.rows();
    require(weight.cols() == channels && channels >= 1 && channels <= detail::shaped::max_channels,
            ErrorCode::shape, "weight: ", channels, " x ", weight.cols(),
            ", expected a square matrix of 1 to ", detail::shaped::max_channels, " channels");
    const double* const entries = weight.data();
    const Index stride = weight.outerStride();
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
                require(std::isfinite(weight(i, j)), ErrorCode::not_finite, "weight: the entry at ", i, ", ",
                        j, " is ", weight(i, j), ", expected finite numbers");
    // By a power of two, so that nothing is rounded but to float; by two of them, which doubles can hold.
    std::frexp(largest, &exponent_);
    const double first = std::ldexp(1.0, -exponent_ / 2),
                 second = std::ldexp(1.0, -exponent_ - -exponent_ / 2);
    double mean = 0.0;
    for (Index i = 0; i < channels; ++i) mean += weight(i, i) * first * second;
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
    for (Index i = 0; i < channels; ++i)
        to[i * channels + i] = static_cast<float>(weight(i, i) * first * second + ridge);
}

/// Places by falling C_cc step_c^2, which for equal ones is by channel.
KVPLANE_FUNCTION void ShapedQuantizer::order_places(const float* step) {
    const auto channels = at(channels_);
    importance_.resize(channels);
    order_.resize(channels);
    for (std::size_t c = 0; c < channels; ++c) {
        const double diagonal = weight_[c * channels + c];
        importance_[c] = static_cast<float>(diagonal * step[c] * step[c]);
    }
    std::iota(order_.begin(), order_.end(), Index{0});
    std::sort(order_.begin(), order_.end(), [&](Index a, Index b) {
        const float of_a = importance_[at(a)], of_b = importance_[at(b)];
        return of_a != of_b ? of_a > of_b : a < b;
    });
}

/// Factorizes C in the order of these steps, and makes the weights of both kinds of passes if they are
/// wanted. Returns false where codes cannot be shaped; all weights are then 0.
KVPLANE_FUNCTION bool ShapedQuantizer::prepare(const float* step, bool with_weights) {
    namespace shaped = detail::shaped;
    order_places(step);
    places_ = (channels_ + shaped::block - 1) / shaped::block * shaped::block;
    stride_ = shaped::padded(channels_);
    const auto size = at(places_ * stride_);
    const auto row = at(stride_);
    by_place_.assign(size, 0.0f);
    step_.assign(row, 0.0f);
    for (Index j = 0; j < channels_; ++j) {
        const Index channel = order_[at(j)];
        step_[at(j)] = step[channel];
        const float* const from = weight_.data() + channel * channels_;
        float* const to = by_place_.data() + j * stride_;
        for (Index i = 0; i < channels_; ++i) to[i] = from[order_[at(i)]];
    }
    rest_.resize(size);
    pivots_.assign(row, 0.0);
    left_.assign(shaped::panel * row, 0.0);
    right_.assign(shaped::panel * row, 0.0);
    ratios_.assign(row, 0.0f);
    room_.assign(row, 0.0f);
    feedback_.assign(size, 0);
    descent_.assign(size, 0);
    feedback_shifts_.assign(at(2 * places_), 0);
    descent_shifts_.assign(at(2 * places_), 0);

    const shaped::Factorization factorization{by_place_.data(), rest_.data(),   pivots_.data(), left_.data(),
                                              right_.data(),    ratios_.data(), channels_,      stride_};
    const float* const steps = step_.data();
    float* const room = room_.data();
    const shaped::Feedback feedback{feedback_.data(), feedback_shifts_.data(), stride_},
        descent{descent_.data(), descent_shifts_.data(), stride_};
    const bool done = detail::run_on(isa_, [&](auto lanes) KVPLANE_BODY {
        return shaped::factorize<lanes>(factorization, [&](Index j) KVPLANE_BODY {
            if (!with_weights || steps[j] == 0.0f) return;
            feedback.set(j, shaped::round_row<lanes>(factorization.ratios, steps, 1.0f / steps[j], j, j, room,
                                                     feedback.weights + j * feedback.stride));
            const float* const ratios = factorization.weight + j * factorization.stride;
            descent.set(j, shaped::round_row<lanes>(ratios, steps, 1.0f / (ratios[j] * steps[j]),
                                                    factorization.places, j, room,
                                                    descent.weights + j * descent.stride));
        });
    });
    if (!done) {
        feedback_.assign(size, 0);
        descent_.assign(size, 0);
    }
    return done;
}

/// Codes up to 128 tokens. Returns false if a value cannot be stored.
KVPLANE_FUNCTION bool ShapedQuantizer::code_tile(const ShapedBlock& block, const Run& run,
                                                 ClipExcess& excess) {
    namespace shaped = detail::shaped;
    constexpr Index rows = 32;  // whose values stay in the first cache
    for (Index t = 0; t < run.count; t += rows)
        for (Index j = 0; j < channels_; ++j) {
            const Index end = std::min(rows, run.count - t);
            const float* from = block.values + (run.first + t) * block.value_stride + order_[at(j)];
            float* const to = values_.data() + j * shaped::tile + t;
            for (Index i = 0; i < end; ++i) to[i] = from[i * block.value_stride];
        }
    const shaped::Tile tile{places_, block.bits, positions_.data(), errors_.data(), codes_.data()};
    const shaped::Feedback feedback{feedback_.data(), feedback_shifts_.data(), stride_},
        descent{descent_.data(), descent_shifts_.data(), stride_};
    const int passes = run.shaped ? shaping_.passes : 0;
    const Index channels = channels_, tokens = run.count;
    const float *const values = values_.data(), *const lower = lower_.data(),
                       *const inverse = inverse_.data();
    const shaped::PositionRange range(block.bits);
    const bool good = detail::run_on(isa_, [=](auto lanes) KVPLANE_BODY {
        bool all = true;
        for (Index j = 0; j < channels; ++j)
            all &= shaped::find_positions<lanes>(values + j * shaped::tile, lower[j], inverse[j], range,
                                                 tile.positions + j * shaped::tile);
        if (!all) return false;
        shaped::code_places<lanes, true>(tile, feedback, tokens);
        for (int pass = 0; pass < passes; ++pass) shaped::code_places<lanes, false>(tile, descent, tokens);
        return true;
    });
    if (!good) return false;
    for (Index t = 0; t < run.count; t += rows)
        for (Index j = 0; j < channels_; ++j) {
            const Index end = std::min(rows, run.count - t);
            const std::uint8_t* const from = codes_.data() + j * shaped::tile + t;
            std::uint8_t* const to = block.codes + (run.first + t) * block.code_stride + order_[at(j)];
            for (Index i = 0; i < end; ++i) to[i * block.code_stride] = from[i];
        }
    const shaped::TileGrids grids{values, lower, step_.data(), codes_.data()};
    const ClipExcess of_tile = detail::run_on(
        isa_, [=](auto lanes) KVPLANE_BODY { return shaped::excess_of<lanes>(grids, channels, tokens); });
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
    values_.assign(size, 0.0f);
    positions_.assign(size, 0);
    errors_.resize(size / 2);
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
