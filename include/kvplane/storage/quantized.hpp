// kvplane/storage/quantized.hpp: per_channel, per_token and per_group quantization of keys or values.
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
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <unsupported/Eigen/CXX11/Tensor>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/rule.hpp"

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
/// Every plane holds one row a token, row_bytes(channels, width) bytes each (storage/planes.hpp). Copyable;
/// const calls are safe from several threads at once.
class Quantized {
  public:
    /// No tokens; quantize() and the three functions below make others.
    Quantized() = default;

    /// See quantize().
    template <CacheScalar Scalar>
    static Quantized of(const HeadRows<Scalar>& rows, const GridRule& rule, int bits,
                        std::string_view argument);

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
    Grid grid(Index token, Index channel) const;
    /// The code of one element. Throws Error (index).
    int code(Index token, Index channel) const;

    /// Bound of every |x - x'| when read at `depth` bits (theorem T1): half the widest cell, and how far the
    /// furthest clipped value lies outside. Throws Error (option) for a depth outside 1..bits.
    double error_bound(int depth) const;
    double error_bound() const { return error_bound(bits_); }

    /// Bound of |X - X'|_F: the root of the sum of the elements' squared bounds, and the clipped excess.
    double frobenius_error_bound(int depth) const;
    double frobenius_error_bound() const { return frobenius_error_bound(bits_); }

    /// tokens x channels, from the first `depth` bits of every code. Throws Error (option).
    Matrix dequantize(int depth) const;
    Matrix dequantize() const { return dequantize(bits_); }

    /// The tokens from `first` on, as many as `values` has rows, into a matrix or block of any element type
    /// and layout. Where that is fp16, values that round beyond it, which only cells at its ends hold, become
    /// its largest. Throws Error (shape, index, option) before it writes anything.
    template <class Derived>
    void dequantize_rows(Index first, int depth, Eigen::DenseBase<Derived>& values) const {
        using Scalar = typename Derived::Scalar;
        require_rows(first, values.rows(), values.cols(), depth);
        Rows read;
        for (Index done = 0, count; done < values.rows(); done += count) {
            count = read_rows(first + done, values.rows() - done, depth, read);
            if (count == 0) return;  // no channels
            const auto rows = read.values.topLeftCorner(count, channels());
            if constexpr (std::is_same_v<Scalar, Eigen::half>)
                values.derived().middleRows(done, count) =
                    rows.cwiseMax(-fp16_max).cwiseMin(fp16_max).template cast<Scalar>();
            else
                values.derived().middleRows(done, count) = rows.template cast<Scalar>();
        }
    }
    template <class Derived>
    void dequantize_rows(Index first, int depth, Eigen::DenseBase<Derived>&& values) const {
        dequantize_rows(first, depth, values);
    }

    /// (heads, tokens, head_dim), row-major or column-major. Throws Error (option).
    template <int Options = Eigen::RowMajor>
    Eigen::Tensor<float, 3, Options> dequantize_tensor(int depth) const {
        require_rows(0, tokens_, channels(), depth);
        Eigen::Tensor<float, 3, Options> values(heads_, tokens_, head_dim_);
        Rows read;
        for (Index first = 0, count; first < tokens_; first += count) {
            count = read_rows(first, tokens_ - first, depth, read);
            if (count == 0) break;  // no channels
            for (Index h = 0; h < heads_; ++h)
                for (Index t = 0; t < count; ++t)
                    for (Index c = 0; c < head_dim_; ++c)
                        values(h, first + t, c) = read.values(t, h * head_dim_ + c);
        }
        return values;
    }
    template <int Options = Eigen::RowMajor>
    Eigen::Tensor<float, 3, Options> dequantize_tensor() const {
        return dequantize_tensor<Options>(bits_);
    }

  private:
    /// Some dequantized rows, and the memory in which they are made.
    struct Rows {
        std::vector<std::uint8_t> codes;
        std::vector<float> lower, step;
        Matrix values;  ///< [token][channel], more channels than there are
    };

    /// Tokens that are worked on together: one group of tokens, or as many as stay in the cache.
    static constexpr Index block_tokens = 128;

    void require_depth(int depth) const;
    void require_rows(Index first, Index rows, Index columns, int depth) const;
    bool by_channel() const noexcept { return rule_.granularity == Granularity::per_channel; }
    Index runs_per_head() const noexcept { return groups_of(head_dim_, rule_.group); }
    Index grids_per_row() const noexcept { return by_channel() ? channels() : heads_ * runs_per_head(); }
    Index grid_index(Index token, Index channel) const noexcept;
    Index group_size(Index g) const noexcept;
    Grid grid_at(Index g) const;
    void read_codes(Index token, int depth, std::uint8_t* codes) const;
    void spread_grids(Index token, int depth, float* lower, float* step) const;
    /// Dequantizes at most `most` tokens from `token` on; returns how many. 0 only where there is nothing.
    Index read_rows(Index token, Index most, int depth, Rows& read) const;

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
    return Quantized::of(rows, rule, bits, argument);
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

#if !defined(KVPLANE_COMPILED)
#include "kvplane/storage/impl/quantized.hpp"
#endif
