// kvplane/quantize/block.hpp: quantizes one block, tokens x channels of one head, to codes and grids.
//
// The step that every container shares: Quantized (storage/quantized.hpp) and the tiles of a cache
// (storage/tile_coder.hpp) both take codes, one a byte, and fp16 grids from here and pack them in their own
// order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "kvplane/matrix.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/quantize/rule.hpp"
#include "kvplane/quantize/unbiased.hpp"
#include "kvplane/simd/isa.hpp"

namespace kvplane::detail {

template <CacheScalar Scalar>
[[noreturn]] void refuse_value(const HeadRows<Scalar>& rows, std::string_view argument, Index head,
                               Index token, Index channel) {
    const auto value = static_cast<float>(*rows.at(head, token, channel));
    const bool finite = std::isfinite(value);
    fail(finite ? ErrorCode::beyond_fp16 : ErrorCode::not_finite, argument, ": the value at token ", token,
         ", head ", head, ", channel ", channel, " is ", value, "; expected ",
         finite ? "a magnitude of at most 65504, the largest fp16" : "finite values");
}

/// Names the first value that cannot be stored. Called when a kernel has seen one.
template <CacheScalar Scalar>
[[noreturn]] void refuse_first_bad_value(const HeadRows<Scalar>& rows, std::string_view argument) {
    for (Index token = 0; token < rows.tokens(); ++token)
        for (Index head = 0; head < rows.heads(); ++head)
            for (Index channel = 0; channel < rows.head_dim(); ++channel)
                if (!(std::abs(static_cast<float>(*rows.at(head, token, channel))) <= fp16_max))
                    refuse_value(rows, argument, head, token, channel);
    fail(ErrorCode::not_finite, argument, ": holds a value that cannot be stored");
}

/// The part of some rows that BlockQuantizer quantizes, and where its codes go.
struct Block {
    std::string_view argument = "input";    ///< the name of the rows in errors
    Index head = 0;                         ///< which head of the rows
    Index first = 0, count = 0;             ///< tokens first .. first + count - 1
    Index first_channel = 0, channels = 0;  ///< of the head, likewise
    GridRule rule = {};
    int bits = 8;
    std::uint8_t* codes =
        nullptr;  ///< [count][channels], rows `code_stride` apart; none: of grids by channel alone
    Index code_stride = 0;
};

/// Codes and grids of one block, in memory that is reused from block to block.
class BlockQuantizer {
  public:
    /// Writes the codes of a block. Afterwards lower() and step() hold its grids in the order [token
    /// group][channel] or [token][channel group]. Throws Error (not_finite, beyond_fp16) naming the position
    /// in `rows`.
    template <CacheScalar Scalar>
    void quantize(const HeadRows<Scalar>& rows, const Block& block) {
        rule_ = block.rule;
        bits_ = block.bits;
        count_ = rule_.grids(block.count, block.channels);
        lower_.resize(static_cast<std::size_t>(count_));
        step_.resize(static_cast<std::size_t>(count_));
        excess_ = {};
        if (block.count == 0 || block.channels == 0) return;
        if (rule_.granularity == Granularity::per_token) return encode_by_token(rows, block);
        Block group = block;
        Index done = 0;
        for (Index token = 0; token < block.count; token += rule_.group, done += block.channels) {
            group.first = block.first + token;
            group.count = std::min(rule_.group, block.count - token);
            if (block.codes) group.codes = block.codes + token * block.code_stride;
            encode_by_channel(rows, group, done);
        }
    }

    const std::vector<Eigen::half>& lower() const noexcept { return lower_; }
    const std::vector<Eigen::half>& step() const noexcept { return step_; }
    ClipExcess excess() const noexcept { return excess_; }

  private:
    /// Rows in the form that kernels need: contiguous, with runs of `group` channels padded to a multiple of
    /// 16 by repeating a value of the run, or with zeros for unbiased grids. They are the input's own memory
    /// if it has that form already.
    struct Prepared {
        SourceRows rows;
        Index channels;  ///< of the padded row
        Index group;     ///< padded channels of a run
        bool padded;
    };

    template <CacheScalar Scalar>
    Prepared prepare(const HeadRows<Scalar>& rows, const Block& block, Index group) {
        const Index runs = groups_of(block.channels, group), padded_group = padded_channels(group);
        if (rows.channel_stride() == 1 && runs * padded_group == block.channels)
            return {{rows.at(block.head, block.first, block.first_channel), scalar_type<Scalar>,
                     rows.token_stride()},
                    block.channels,
                    group,
                    false};
        const Index padded = runs * padded_group;
        source_.resize(static_cast<std::size_t>(block.count * padded) * sizeof(Scalar));
        auto* to = reinterpret_cast<Scalar*>(source_.data());
        for (Index t = 0; t < block.count; ++t)
            for (Index run = 0; run < runs; ++run)
                for (Index i = 0; i < padded_group; ++i, ++to) {
                    const Index used = std::min(group, block.channels - run * group);
                    if (i >= used && rule_.scheme == Scheme::unbiased)
                        *to = Scalar(0.0f);
                    else
                        *to = *rows.at(block.head, block.first + t,
                                       block.first_channel + run * group + std::min(i, used - 1));
                }
        return {{source_.data(), scalar_type<Scalar>, padded}, padded, padded_group, true};
    }

    /// One group of tokens: a grid for each channel, stored from `at` on.
    template <CacheScalar Scalar>
    void encode_by_channel(const HeadRows<Scalar>& rows, const Block& block, Index at) {
        const Index count = block.count, channels = block.channels;
        const Prepared source = prepare(rows, block, channels);
        reserve(source.channels);
        if (!column_extremes(isa_, source.rows, count, source.channels, min_.data(), max_.data()))
            refuse_first_bad_value(rows, block.argument);
        fit(source.channels, channels, block);
        for (Index c = 0; c < channels; ++c) {
            const auto value = [&](Index i) {
                return static_cast<float>(*rows.at(block.head, block.first + i, block.first_channel + c));
            };
            if (rule_.clip == Clip::mse_optimal)
                shrink(c, count, value);
            else if (rule_.scheme == Scheme::full_range)
                note_outside(c, count, value);
        }
        std::copy_n(stored_lower_.begin(), channels, lower_.begin() + at);
        std::copy_n(stored_step_.begin(), channels, step_.begin() + at);
        if (!block.codes) return;
        std::uint8_t* const to = source.padded ? padded_codes(count, source.channels) : block.codes;
        const Index stride = source.padded ? source.channels : block.code_stride;
        encode_columns(isa_, source.rows, count, source.channels, bits_, fp_lower_.data(), inverse_.data(),
                       to, stride);
        if (source.padded)
            for (Index t = 0; t < count; ++t)
                std::copy_n(to + t * stride, channels, block.codes + t * block.code_stride);
    }

    /// All tokens: a grid for each run of channels of each token.
    template <CacheScalar Scalar>
    void encode_by_token(const HeadRows<Scalar>& rows, const Block& block) {
        const Index count = block.count, channels = block.channels;
        const Index group = std::min(rule_.group, channels), runs = groups_of(channels, group);
        const Prepared source = prepare(rows, block, group);
        reserve(padded_channels(count * runs));
        if (!row_extremes(isa_, source.rows, count, source.channels, source.group, min_.data(), max_.data()))
            refuse_first_bad_value(rows, block.argument);
        const auto each_group = [&](const auto& body) {
            for (Index g = 0; g < count * runs; ++g) {
                const Index start = g % runs * group;
                body(g, std::min(group, channels - start), [&](Index i) {
                    return static_cast<float>(
                        *rows.at(block.head, block.first + g / runs, block.first_channel + start + i));
                });
            }
        };
        std::uint8_t* const to = source.padded ? padded_codes(count, source.channels) : block.codes;
        const Index stride = source.padded ? source.channels : block.code_stride;
        if (rule_.scheme == Scheme::unbiased) {
            excess_ =
                encode_unbiased(isa_, {source.rows, count, source.channels, source.group, group, channels},
                                bits_, to, stride, stored_step_.data());
            std::fill_n(stored_lower_.begin(), count_, Eigen::half(0.0f));
        } else {
            fit(padded_channels(count * runs), count * runs, block);
            if (rule_.clip == Clip::mse_optimal)
                each_group([&](Index g, Index size, const auto& value) { shrink(g, size, value); });
            else if (rule_.scheme == Scheme::full_range)
                each_group([&](Index g, Index size, const auto& value) { note_outside(g, size, value); });
            encode_rows(isa_, source.rows, count, source.channels, source.group, bits_, fp_lower_.data(),
                        inverse_.data(), to, stride);
        }
        std::copy_n(stored_lower_.begin(), count_, lower_.begin());
        std::copy_n(stored_step_.begin(), count_, step_.begin());
        if (!source.padded) return;
        for (Index t = 0; t < count; ++t)
            for (Index run = 0; run < runs; ++run)
                std::copy_n(to + t * stride + run * source.group, std::min(group, channels - run * group),
                            block.codes + t * block.code_stride + run * group);
    }

    void reserve(Index grids) {
        const auto size = static_cast<std::size_t>(grids);
        if (min_.size() >= size) return;
        for (auto* floats : {&min_, &max_, &fp_lower_, &fp_step_, &inverse_}) floats->resize(size);
        stored_lower_.resize(size);
        stored_step_.resize(size);
    }

    std::uint8_t* padded_codes(Index tokens, Index channels) {
        codes_.resize(static_cast<std::size_t>(tokens * channels));
        return codes_.data();
    }

    /// Fits `padded` grids. Those beyond `grids` come from whatever the memory held and are not looked at.
    void fit(Index padded, Index grids, const Block& block) {
        fit_grids(
            isa_, rule_.scheme, bits_, padded, min_.data(), max_.data(),
            {fp_lower_.data(), fp_step_.data(), inverse_.data(), stored_lower_.data(), stored_step_.data()});
        const auto finite = [](float x) { return std::abs(x) < std::numeric_limits<float>::infinity(); };
        for (Index g = 0; g < grids; ++g)
            require(finite(fp_step_[static_cast<std::size_t>(g)]) &&
                        finite(fp_lower_[static_cast<std::size_t>(g)]),
                    ErrorCode::beyond_fp16, block.argument, ": head ", block.head, ", tokens from ",
                    block.first, ": values between ", min_[static_cast<std::size_t>(g)], " and ",
                    max_[static_cast<std::size_t>(g)], " need a ", bits_, "-bit ", name(rule_.scheme),
                    " grid beyond fp16; expected a smaller range, more bits, or the cell scheme");
    }

    /// Replaces grid g by the one with the least squared error over the group, whose interval is shrunk about
    /// its middle, and adds what then lies outside to excess_. Products are exact in double, so that
    /// contraction to fused multiply-add cannot choose another grid.
    template <class Value>
    void shrink(Index g, Index size, const Value& value) {
        const auto at = static_cast<std::size_t>(g);
        const float middle = 0.5f * (min_[at] + max_[at]), reach = 0.5f * (max_[at] - min_[at]);
        Grid best;
        double least = std::numeric_limits<double>::infinity();
        for (int percent = 100; percent >= 30; percent -= 5) {
            const float kept = static_cast<float>(percent) / 100.0f;
            const double offset = static_cast<double>(kept) * reach;
            float low = min_[at], high = max_[at];
            if (!has_lower(rule_.scheme)) {
                low *= kept;
                high *= kept;
            } else if (percent < 100) {
                low = static_cast<float>(middle - offset);
                high = static_cast<float>(middle + offset);
            }
            const Grid grid = fit_grid(rule_.scheme, bits_, low, high);
            double error = 0.0;
            for (Index i = 0; i < size; ++i) {
                const float x = value(i), difference = x - grid.decode(grid.encode(x));
                error += static_cast<double>(difference) * difference;
            }
            if (error >= least) continue;
            least = error;
            best = grid;
        }
        fp_lower_[at] = best.lower;
        fp_step_[at] = best.step;
        inverse_[at] = best.step != 0.0f ? 1.0f / best.step : 0.0f;
        stored_lower_[at] = Eigen::half(best.lower);
        stored_step_[at] = Eigen::half(best.step);
        note_outside(g, size, value);
    }
    /// Adds how far values lie outside grid g to excess_.
    template <class Value>
    void note_outside(Index g, Index size, const Value& value) {
        const auto at = static_cast<std::size_t>(g);
        const Grid grid{fp_lower_[at], fp_step_[at], bits_};
        if (grid.step == 0.0f) return;
        const double low = std::min(grid.lower, grid.upper()), high = std::max(grid.lower, grid.upper());
        for (Index i = 0; i < size; ++i) {
            const double x = value(i), outside = std::max({0.0, low - x, x - high});
            excess_.largest = std::max(excess_.largest, outside);
            excess_.energy += outside * outside;
        }
    }

    Isa isa_ = current_isa();
    GridRule rule_;
    int bits_ = 8;
    Index count_ = 0;
    ClipExcess excess_;
    std::vector<Eigen::half> lower_, step_, stored_lower_, stored_step_;
    std::vector<float> min_, max_, fp_lower_, fp_step_, inverse_;
    std::vector<std::uint8_t> codes_;
    std::vector<std::byte> source_;
};

/// The largest magnitude, where fp16 holds all of them. Otherwise a magnitude beyond fp16, infinity or NaN:
/// that of the first row with one, whatever comes after it.
template <CacheScalar Scalar>
float largest_magnitude(const HeadRows<Scalar>& rows) {
    if (rows.tokens() == 0 || rows.channels() == 0) return 0.0f;
    const Isa isa = current_isa();
    const bool together = rows.channel_stride() == 1 && rows.head_stride() == rows.head_dim();
    const Index pieces = together ? 1 : rows.heads(), length = rows.channels() / pieces;
    float largest = 0.0f;
    for (Index token = 0; token < rows.tokens(); ++token)
        for (Index piece = 0; piece < pieces; ++piece) {
            float magnitude = 0.0f;
            if (rows.channel_stride() == 1)
                magnitude = largest_magnitude(isa, rows.at(piece, token), length);
            else
                for (Index c = 0; c < length && magnitude <= fp16_max; ++c)
                    magnitude = std::max(std::abs(static_cast<float>(*rows.at(piece, token, c))), magnitude);
            if (!(magnitude <= fp16_max)) return magnitude;
            largest = std::max(largest, magnitude);
        }
    return largest;
}

/// Refuses values that cannot be stored and names the argument and the position. A container calls this on
/// all of its input before it changes anything. Throws Error (not_finite, beyond_fp16).
template <CacheScalar Scalar>
void require_storable(const HeadRows<Scalar>& rows, std::string_view argument) {
    if (!(largest_magnitude(rows) <= fp16_max)) refuse_first_bad_value(rows, argument);
}

}  // namespace kvplane::detail
