// kvplane/quantize/scalar.hpp: per_channel, per_token and per_group quantization of keys or values.
//
// The input is a matrix, tokens x (heads * head_dim), dense or strided or an expression, of float,
// Eigen::half or Eigen::bfloat16, or a rank-3 Eigen::Tensor (heads, tokens, head_dim) in either storage
// order. The result holds packed bit planes and fp16 grids, so its bytes() are what it really takes.
//
//   Quantized k = per_channel(keys, {.bits = 4, .group_tokens = 128});
//   Quantized v = per_group(values, {.bits = 2, .group_channels = 64});
//   Matrix close = k.dequantize(), coarse = k.dequantize(/*depth=*/2);
#pragma once

#include <algorithm>
#include <cmath>
#include <string_view>
#include <unsupported/Eigen/CXX11/Tensor>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/block.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/storage/planes.hpp"

namespace kvplane {

/// One grid for `group_tokens` consecutive tokens of one channel. What keys want.
struct PerChannelOptions {
    int bits = 4;
    Scheme scheme = Scheme::min_max;
    Clip clip = Clip::none;
    Index group_tokens = 128;
    Index heads = 1;  ///< heads of a matrix; a tensor has its own
};

/// One grid for all channels of one head of one token.
struct PerTokenOptions {
    int bits = 4;
    Scheme scheme = Scheme::min_max;
    Clip clip = Clip::none;
    Index heads = 1;
};

/// One grid for `group_channels` consecutive channels of one head of one token; the last group of a head may
/// be smaller.
struct PerGroupOptions {
    int bits = 4;
    Scheme scheme = Scheme::min_max;
    Clip clip = Clip::none;
    Index group_channels = 32;
    Index heads = 1;
};

/// Keys or values in few bits: shape, grids, and one packed plane after another, most significant first.
/// Every plane holds one row a token, row_bytes(channels, width) bytes each. Copyable; const calls are safe
/// from several threads at once.
class Quantized {
  public:
    Index tokens() const noexcept { return tokens_; }
    /// Channels of all heads.
    Index channels() const noexcept { return heads_ * head_dim_; }
    Index heads() const noexcept { return heads_; }
    Index head_dim() const noexcept { return head_dim_; }
    int bits() const noexcept { return bits_; }
    const GridRule& rule() const noexcept { return rule_; }

    /// Bytes of planes and grids: what storing this takes.
    Index bytes() const noexcept {
        Index sum = rule_.bytes_per_grid() * static_cast<Index>(step_.size());
        for (const auto& plane : planes_) sum += static_cast<Index>(plane.size());
        return sum;
    }
    /// True bits an element, grids counted; 0 for an empty input.
    double bits_per_element() const noexcept {
        const Index elements = tokens_ * channels();
        return elements == 0 ? 0.0 : 8.0 * static_cast<double>(bytes()) / static_cast<double>(elements);
    }

    /// The grid of one element. `channel` counts over all heads. Throws Error (index).
    Grid grid(Index token, Index channel) const {
        require(token >= 0 && token < tokens_ && channel >= 0 && channel < channels(), ErrorCode::index,
                "grid: token ", token, ", channel ", channel, " of a quantized ", tokens_, " x ", channels());
        return grid_at(grid_index(token, channel));
    }
    /// The code of one element. Throws Error (index).
    int code(Index token, Index channel) const {
        require(token >= 0 && token < tokens_ && channel >= 0 && channel < channels(), ErrorCode::index,
                "code: token ", token, ", channel ", channel, " of a quantized ", tokens_, " x ", channels());
        std::vector<std::uint8_t> codes(static_cast<std::size_t>(padded_channels(channels())));
        read_codes(token, bits_, codes.data());
        return codes[static_cast<std::size_t>(channel)];
    }

    /// Bound of every |x - x'| when read at `depth` bits (theorem T1): half the widest cell, and how far the
    /// furthest clipped value lies outside. Throws Error (option) for a depth outside 1..bits.
    double error_bound(int depth) const {
        require_depth(depth);
        double bound = 0.0;
        for (std::size_t g = 0; g < step_.size(); ++g)
            bound = std::max(bound, static_cast<double>(grid_at(static_cast<Index>(g)).error_bound(depth)));
        return bound + excess_.largest;
    }
    double error_bound() const { return error_bound(bits_); }

    /// Bound of |X - X'|_F: the root of the sum of the elements' squared bounds, and the clipped excess.
    double frobenius_error_bound(int depth) const {
        require_depth(depth);
        double sum = 0.0;
        for (std::size_t g = 0; g < step_.size(); ++g) {
            const double bound = grid_at(static_cast<Index>(g)).error_bound(depth);
            sum += bound * bound * static_cast<double>(group_size(static_cast<Index>(g)));
        }
        return std::sqrt(sum) + std::sqrt(excess_.energy);
    }
    double frobenius_error_bound() const { return frobenius_error_bound(bits_); }

    /// tokens x channels, from the first `depth` bits of every code. Throws Error (option).
    Matrix dequantize(int depth) const {
        Matrix values(tokens_, channels());
        dequantize_rows(0, depth, values);
        return values;
    }
    Matrix dequantize() const { return dequantize(bits_); }

    /// The tokens from `first` on, as many as `values` has rows, into a matrix or block of any element type
    /// and layout. Throws Error (shape, index, option) before it writes anything.
    template <class Derived>
    void dequantize_rows(Index first, int depth, Eigen::DenseBase<Derived>& values) const {
        require_depth(depth);
        require(values.cols() == channels(), ErrorCode::shape, "dequantize_rows: values has ", values.cols(),
                " columns, expected ", channels());
        require(first >= 0 && values.rows() <= tokens_ - first, ErrorCode::index,
                "dequantize_rows: ", values.rows(), " tokens from ", first, " on, of ", tokens_);
        for_each_block(first, values.rows(), depth, [&](Index token, Index count, const Matrix& block) {
            values.derived().middleRows(token - first, count) =
                block.topLeftCorner(count, channels()).template cast<typename Derived::Scalar>();
        });
    }
    template <class Derived>
    void dequantize_rows(Index first, int depth, Eigen::DenseBase<Derived>&& values) const {
        dequantize_rows(first, depth, values);
    }

    /// (heads, tokens, head_dim), row-major or column-major.
    template <int Options = Eigen::RowMajor>
    Eigen::Tensor<float, 3, Options> dequantize_tensor(int depth) const {
        require_depth(depth);
        Eigen::Tensor<float, 3, Options> values(heads_, tokens_, head_dim_);
        for_each_block(0, tokens_, depth, [&](Index token, Index count, const Matrix& block) {
            for (Index h = 0; h < heads_; ++h)
                for (Index t = 0; t < count; ++t)
                    for (Index c = 0; c < head_dim_; ++c)
                        values(h, token + t, c) = block(t, h * head_dim_ + c);
        });
        return values;
    }
    template <int Options = Eigen::RowMajor>
    Eigen::Tensor<float, 3, Options> dequantize_tensor() const {
        return dequantize_tensor<Options>(bits_);
    }

  private:
    template <CacheScalar Scalar>
    friend Quantized quantize(const HeadRows<Scalar>&, const GridRule&, int, std::string_view);

    /// Tokens that are worked on together: one group of tokens, or as many as stay in the cache.
    static constexpr Index block_tokens = 128;

    void require_depth(int depth) const {
        require(depth >= 1 && depth <= bits_, ErrorCode::option, "depth: ", depth, " bits, expected 1 to ",
                bits_);
    }
    bool by_channel() const noexcept { return rule_.granularity == Granularity::per_channel; }
    Index runs_per_head() const noexcept { return groups_of(head_dim_, rule_.group); }
    Index grids_per_row() const noexcept { return by_channel() ? channels() : heads_ * runs_per_head(); }

    /// Grids stand in the order [token group][channel] or [token][head][run of channels].
    Index grid_index(Index token, Index channel) const noexcept {
        if (by_channel()) return token / rule_.group * channels() + channel;
        return token * grids_per_row() + channel / head_dim_ * runs_per_head() +
               channel % head_dim_ / rule_.group;
    }
    Index group_size(Index g) const noexcept {
        if (by_channel()) return std::min(rule_.group, tokens_ - g / channels() * rule_.group);
        return std::min(rule_.group, head_dim_ - g % runs_per_head() * rule_.group);
    }
    Grid grid_at(Index g) const {
        const auto at = static_cast<std::size_t>(g);
        Grid grid{0.0f, static_cast<float>(step_[at]), bits_};
        grid.lower = lower_.empty() ? -grid.step * (0.5f * static_cast<float>(grid.codes()) + 0.5f)
                                    : static_cast<float>(lower_[at]);
        return grid;
    }

    /// The first `depth` bits of the codes of one token.
    void read_codes(Index token, int depth, std::uint8_t* codes) const {
        const PlaneSplit split = plane_split(bits_);
        int read = 0;
        for (int p = 0; p < split.count && read < depth; ++p) {
            const Index bytes = row_bytes(channels(), split[p]);
            unpack_row(planes_[static_cast<std::size_t>(p)].data() + token * bytes, channels(), split[p],
                       p == 0, codes);
            read += split[p];
        }
        if (read == depth) return;
        for (Index c = 0; c < channels(); ++c)
            codes[c] = static_cast<std::uint8_t>(codes[c] >> (read - depth));
    }

    /// lower and step (of the depth) of every channel of one token.
    void spread_grids(Index token, int depth, float* lower, float* step) const {
        const Index run = by_channel() ? 1 : rule_.group;
        Index g = grid_index(token, 0);
        for (Index first = 0; first < channels(); first += head_dim_) {
            for (Index c = 0; c < head_dim_; c += run, ++g) {
                const Grid grid = grid_at(g);
                const Index size = std::min(run, head_dim_ - c);
                std::fill_n(lower + first + c, size, grid.lower);
                std::fill_n(step + first + c, size, grid.step * power_of_two(bits_ - depth));
            }
        }
    }

    /// Calls use(first token, tokens, values) with at most block_tokens dequantized rows at a time.
    template <class Use>
    void for_each_block(Index first, Index count, int depth, const Use& use) const {
        if (count == 0 || channels() == 0) return;
        const Index padded = padded_channels(channels());
        std::vector<std::uint8_t> codes(static_cast<std::size_t>(block_tokens * padded));
        std::vector<float> lower(static_cast<std::size_t>(padded)), step(lower);
        Matrix values(block_tokens, padded);
        for (Index token = first, size; token < first + count; token += size) {
            size = std::min(block_tokens, first + count - token);
            if (by_channel()) size = std::min(size, rule_.group - token % rule_.group);
            for (Index t = 0; t < size; ++t) read_codes(token + t, depth, codes.data() + t * padded);
            // One row of grids serves the whole block per channel, one row of the block per token.
            const Index rows = by_channel() ? size : 1;
            for (Index t = 0; t < size; t += rows) {
                spread_grids(token + t, depth, lower.data(), step.data());
                decode_columns(current_isa(), codes.data() + t * padded, padded, rows, padded, lower.data(),
                               step.data(), values.data() + t * padded, padded);
            }
            use(token, size, values);
        }
    }

    Index tokens_ = 0, heads_ = 1, head_dim_ = 0;
    int bits_ = 8;
    GridRule rule_;
    ClipExcess excess_;
    std::vector<Eigen::half> lower_, step_;
    std::vector<std::vector<std::byte>> planes_;
};

/// Quantizes by a rule that is already put together: what the three functions below call. `argument` names
/// the input in errors. Throws Error: option (width, group), not_finite and beyond_fp16 (with the position).
template <CacheScalar Scalar>
Quantized quantize(const HeadRows<Scalar>& rows, const GridRule& rule, int bits, std::string_view argument) {
    detail::require_width(bits, rule.scheme);
    require(rule.group >= 1, ErrorCode::option, "group: ", rule.group, ", expected at least 1");
    Quantized out;
    out.tokens_ = rows.tokens();
    out.heads_ = rows.heads();
    out.head_dim_ = rows.head_dim();
    out.bits_ = bits;
    out.rule_ = rule;
    const Index channels = rows.channels(), tokens = rows.tokens();
    const PlaneSplit split = plane_split(bits);
    for (int p = 0; p < split.count; ++p)
        out.planes_.emplace_back(static_cast<std::size_t>(tokens * row_bytes(channels, split[p])));
    if (tokens == 0 || channels == 0) return out;

    const bool by_channel = rule.granularity == Granularity::per_channel;
    const bool keep_lower = rule.scheme != Scheme::symmetric;
    const Index grids_per_row = out.grids_per_row();
    const Index grids = (by_channel ? groups_of(tokens, rule.group) : tokens) * grids_per_row;
    out.step_.resize(static_cast<std::size_t>(grids));
    if (keep_lower) out.lower_.resize(static_cast<std::size_t>(grids));

    const Index block = by_channel ? std::min(rule.group, tokens) : Quantized::block_tokens;
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(block * channels));
    BlockQuantizer quantizer;
    for (Index first = 0; first < tokens; first += block) {
        const Index count = std::min(block, tokens - first);
        for (Index head = 0; head < rows.heads(); ++head) {
            const Index first_channel = head * rows.head_dim();
            quantizer.quantize(rows, argument, head, first, count, 0, rows.head_dim(), rule, bits,
                               codes.data() + first_channel, channels);
            // The block's grids are one row (per channel) or `count` rows (per token) of this head's grids.
            const Index rows_of_grids = by_channel ? 1 : count;
            const Index per_head = grids_per_row / rows.heads();
            for (Index r = 0; r < rows_of_grids; ++r) {
                const Index to = out.grid_index(first + r, first_channel);
                std::copy_n(quantizer.step().begin() + r * per_head, per_head, out.step_.begin() + to);
                if (keep_lower)
                    std::copy_n(quantizer.lower().begin() + r * per_head, per_head, out.lower_.begin() + to);
            }
            out.excess_.largest = std::max(out.excess_.largest, quantizer.excess().largest);
            out.excess_.energy += quantizer.excess().energy;
        }
        for (int p = 0; p < split.count; ++p) {
            const Index bytes = row_bytes(channels, split[p]);
            for (Index t = 0; t < count; ++t)
                pack_row(codes.data() + t * channels, channels, split[p], split.shift(p),
                         out.planes_[static_cast<std::size_t>(p)].data() + (first + t) * bytes);
        }
    }
    return out;
}

/// Keys or values with one grid for `group_tokens` tokens of each channel. Throws Error; see quantize().
template <class Input>
Quantized per_channel(const Input& input, const PerChannelOptions& options = {}) {
    require(options.group_tokens >= 1, ErrorCode::option, "group_tokens: ", options.group_tokens,
            ", expected at least 1");
    return quantize(input_heads(input, options.heads),
                    {Granularity::per_channel, options.group_tokens, options.scheme, options.clip},
                    options.bits, "input");
}

/// Keys or values with one grid for each head of each token. Throws Error; see quantize().
template <class Input>
Quantized per_token(const Input& input, const PerTokenOptions& options = {}) {
    const auto rows = input_heads(input, options.heads);
    return quantize(
        rows, {Granularity::per_token, std::max<Index>(rows.head_dim(), 1), options.scheme, options.clip},
        options.bits, "input");
}

/// Keys or values with one grid for `group_channels` channels of each token. Throws Error; see quantize().
template <class Input>
Quantized per_group(const Input& input, const PerGroupOptions& options = {}) {
    require(options.group_channels >= 1, ErrorCode::option, "group_channels: ", options.group_channels,
            ", expected at least 1");
    return quantize(input_heads(input, options.heads),
                    {Granularity::per_token, options.group_channels, options.scheme, options.clip},
                    options.bits, "input");
}

}  // namespace kvplane
