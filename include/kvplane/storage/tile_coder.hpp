// kvplane/storage/tile_coder.hpp: tokens to tiles and tiles to numbers, in the layout of tile_format.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/block.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/quantize/rule.hpp"
#include "kvplane/quantize/shaped.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/storage/half_bytes.hpp"
#include "kvplane/storage/tile_format.hpp"
#include "kvplane/storage/tile_planes.hpp"
#include "kvplane/storage/tile_sequence.hpp"

namespace kvplane::detail {

/// Which tokens of some rows go where in a tile: the tokens [first, first + count) of one head become the
/// tokens [tile_token, tile_token + count) of the tile.
struct TileTokens {
    Index head = 0;
    Index first = 0;
    Index count = tile_tokens;
    Index tile_token = 0;
};

/// Turns tokens into tiles and tiles into numbers, in memory that is reused from tile to tile.
class TileCoder {
  public:
    explicit TileCoder(const TileFormat& format) : format_(format) {
        for (const auto& segment : format.segments()) codes_.emplace_back(segment.channels);
    }

    /// Quantizes and packs tokens into `tile`; its other tokens stay as they are. Grids per channel need
    /// whole groups: tile_token and count must be multiples of the group (count may stop short at the end of
    /// a sequence). Formats whose tokens have different widths take all 128 at once. `argument` names the rows
    /// in errors. Throws Error (shape, index; not_finite and
    /// beyond_fp16 with the position) and may then have written part of the tile.
    template <CacheScalar Scalar>
    void encode(const HeadRows<Scalar>& rows, std::string_view argument, const TileTokens& tokens,
                std::byte* tile);

    /// Tokens encoded from now on have shaped codes, for queries u with E[u u^T] = weight [channel][channel].
    /// Formats of one segment with grids per channel alone. Throws Error (option, shape, not_finite).
    void shape(const Eigen::Ref<const Matrix>& weight);

    /// Tokens encoded from now on count so much each: of formats whose tokens have different widths, those with
    /// the largest weight times squared norm become the widest. Without weights [128] all count alike.
    void weigh(std::span<const double> weights) { weights_.assign(weights.begin(), weights.end()); }

    /// The first `tokens` tokens of a tile as floats, [token][channel], rows `stride` apart, read at `depth`
    /// bits: every segment at the lesser of depth and its width; fp16 at 8, 12 or 16 bits. Throws Error
    /// (index, option) before it writes anything.
    void decode(const std::byte* tile, Index tokens, int depth, float* values, Index stride);
    /// All bits of them.
    void decode(const std::byte* tile, Index tokens, float* values, Index stride) {
        decode(tile, tokens, 16, values, stride);
    }

    /// Makes the tokens [first, last) of a tile what they are where none has come. Grids over several tokens
    /// stay as they are.
    void clear(std::byte* tile, Index first, Index last);

    /// Bound of |x - x'| over the tokens [first, last), clipped values aside (see excess()): half the widest
    /// cell, or the rounding to fp16 of the largest magnitude.
    double error_bound(const std::byte* tile, Index first, Index last);
    double error_bound(const std::byte* tile, Index tokens) { return error_bound(tile, 0, tokens); }

    /// How far tokens of the last encode() lay outside their grids: 0 without clipping.
    ClipExcess excess() const noexcept { return excess_; }

    const TileFormat& format() const noexcept { return format_; }

  private:
    using Segment = TileFormat::Placed;

    template <CacheScalar Scalar>
    void encode_by_token(const HeadRows<Scalar>& rows, std::string_view argument, const TileTokens& tokens,
                         std::byte* tile);
    template <CacheScalar Scalar>
    TokenOfRow rank_tokens(RowView<const Scalar> values, Index padded) const;
    template <CacheScalar Scalar>
    void quantize_segment(const HeadRows<Scalar>& rows, std::string_view argument, const TileTokens& tokens,
                          const Segment& segment, TileCodes& codes, std::byte* tile);
    template <CacheScalar Scalar>
    void split_half(const HeadRows<Scalar>& rows, std::string_view argument, const TileTokens& tokens,
                    const Segment& segment, TileCodes& codes, std::byte* tile);
    static void join_half(const Segment& segment, int depth, Index tokens, TileCodes& codes, float* values,
                          Index stride);
    template <CacheScalar Scalar>
    void shape_codes(const HeadRows<Scalar>& rows, const TileTokens& tokens, const Segment& segment,
                     TileCodes& codes);
    /// The first tokens, or those of them that are in a segment's rows.
    struct DecodedTokens {
        Index count;
        const std::optional<TokenOfRow>& of_row;
    };
    void decode_segment(const std::byte* tile, const Segment& segment, int depth, const DecodedTokens& tokens,
                        const TileCodes& codes, float* values, Index stride);
    void read_grids(const std::byte* tile, const Segment& segment, int depth);
    void spread_columns(Index group, Index channels);
    void spread_row(Index row, const Segment& segment);
    bool grid_in_use(Index g, const Segment& segment, Index first, Index last) const noexcept;
    void clear_rows(std::byte* tile, const Segment& segment, TileCodes& codes, Index first, Index count);
    static void require_depth(const Segment& segment, int depth);

    TileFormat format_;
    BlockQuantizer quantizer_;
    std::optional<ShapedQuantizer> shaped_;
    ClipExcess excess_;
    std::vector<double> weights_;              ///< [token], or none
    std::vector<float> gathered_;              ///< [channel] those of one token
    std::vector<std::byte> gathered_rows_;     ///< [token][channel, padded] of the input's type
    std::vector<std::byte> sorted_;            ///< [row][channel, padded] likewise
    std::vector<TileCodes> codes_;             ///< one a segment
    std::vector<float> lower_, step_;          ///< all grids of a segment, as floats
    std::vector<Eigen::half> half_steps_;      ///< the same steps where a byte each is stored
    std::vector<float> row_lower_, row_step_;  ///< [channel] those of one row
    std::vector<float> decoded_;               ///< rows padded to what kernels take
    std::vector<std::uint16_t> largest_;       ///< [channel] fp16 bits of the largest magnitude
};

/// Leaves the tiles of a page no more than the tokens of a place.
inline void clear_tiles(const TilePlace& place, std::byte* page) {
    const PageLayout& layout = *place.layout;
    const auto clear = [&](TileCoder& coder, Index at) {
        coder.clear(page + at, 0, place.row);
        coder.clear(page + at, place.end_row(), tile_tokens);
    };
    for (Index s = 0; s < layout.subspaces(); ++s) {
        TileCoder keys(layout.key_format(s));
        clear(keys, layout.key_at[static_cast<std::size_t>(s)]);
    }
    if (layout.values_in_keys) return;
    TileCoder values(layout.values);
    for (const Index at : layout.value_at) clear(values, at);
}

// Implementation -------------------------------------------------------------------------------------------

template <CacheScalar Scalar>
void TileCoder::encode(const HeadRows<Scalar>& rows, std::string_view argument, const TileTokens& tokens,
                       std::byte* tile) {
    const auto& [head, first, count, tile_token] = tokens;
    require(rows.head_dim() == format_.channels(), ErrorCode::shape, argument, ": ", rows.head_dim(),
            " channels, expected ", format_.channels());
    require(head >= 0 && head < rows.heads() && first >= 0 && count >= 0 && count <= rows.tokens() - first,
            ErrorCode::index, argument, ": head ", head, ", ", count, " tokens from ", first, " on, of ",
            rows.heads(), " heads, ", rows.tokens(), " tokens");
    require(tile_token >= 0 && count <= tile_tokens - tile_token, ErrorCode::index, argument, ": ", count,
            " tokens from ", tile_token, " on, of a tile of ", tile_tokens);
    require(!format_.grids_span_tokens() || tile_token % format_.rule().group == 0, ErrorCode::index,
            argument, ": a tile with grids over ", format_.rule().group,
            " tokens takes tokens from a multiple of that on, not from ", tile_token);
    require(!format_.by_token() || count == tile_tokens, ErrorCode::index, argument, ": ", count,
            " tokens of a tile whose tokens have different widths, expected all ", tile_tokens, " at once");
    excess_ = {};
    if (format_.by_token()) return encode_by_token(rows, argument, tokens, tile);
    for (std::size_t s = 0; s < format_.segments().size(); ++s) {
        const Segment& segment = format_.segments()[s];
        if (segment.bits == 0) continue;
        codes_[s].clear_padding(tile_token, count);
        if (segment.is_half())
            split_half(rows, argument, tokens, segment, codes_[s], tile);
        else
            quantize_segment(rows, argument, tokens, segment, codes_[s], tile);
        pack_segment(format_, s, codes_[s], tile_token, count, tile);
    }
}

/// Tokens in the order of their runs, then run by run.
template <CacheScalar Scalar>
void TileCoder::encode_by_token(const HeadRows<Scalar>& rows, std::string_view argument,
                                const TileTokens& tokens, std::byte* tile) {
    const Index channels = format_.channels(), stride = padded_channels(channels);
    const std::size_t all = static_cast<std::size_t>(tile_tokens * stride) * sizeof(Scalar);
    sorted_.resize(all);
    RowView<const Scalar> of_token{rows.at(tokens.head, tokens.first, 0), rows.token_stride(), tile_tokens};
    if (rows.channel_stride() != 1 || channels != stride) {
        gathered_rows_.resize(all);
        auto* const to = reinterpret_cast<Scalar*>(gathered_rows_.data());
        for (Index t = 0; t < tile_tokens; ++t) {
            for (Index c = 0; c < channels; ++c)
                to[t * stride + c] = *rows.at(tokens.head, tokens.first + t, c);
            std::fill(to + t * stride + channels, to + (t + 1) * stride, Scalar(0.0f));
        }
        of_token = {to, stride, tile_tokens};
    }
    const Isa isa = current_isa();
    for (Index t = 0; t < tile_tokens; ++t) {
        if (largest_magnitude(isa, of_token[t], channels) <= fp16_max) continue;
        for (Index c = 0; c < channels; ++c)
            if (!(std::abs(static_cast<float>(of_token[t][c])) <= fp16_max))
                refuse_value(rows, argument, tokens.head, tokens.first + t, c);
    }
    const TokenOfRow token_of_row = rank_tokens(of_token, stride);
    write_runs(format_, token_of_row, tile);
    auto* const sorted = reinterpret_cast<Scalar*>(sorted_.data());
    for (Index row = 0; row < tile_tokens; ++row)
        std::copy_n(of_token[token_of_row[static_cast<std::size_t>(row)]], channels, sorted + row * stride);
    const HeadRows<Scalar> in_runs(sorted, 1, tile_tokens, channels, 0, stride, 1);
    for (std::size_t s = 0; s < format_.segments().size(); ++s) {
        const Segment& segment = format_.segments()[s];
        codes_[s].clear_padding(0, segment.rows);
        quantize_segment(in_runs, argument, {.first = segment.first_row, .count = segment.rows}, segment,
                         codes_[s], tile);
        pack_segment(format_, s, codes_[s], 0, segment.rows, tile);
    }
}

/// The token of each row, by weights and norms of tokens [token][channel, padded with zeros]. Runs are in the
/// order of their tokens.
template <CacheScalar Scalar>
TokenOfRow TileCoder::rank_tokens(RowView<const Scalar> values, Index padded) const {
    std::array<double, tile_tokens> worth;
    run_on(current_isa(), [=, &worth](auto lanes) KVPLANE_BODY {
        for (Index t = 0; t < tile_tokens; ++t)
            worth[static_cast<std::size_t>(t)] = grid_kernels::squared_norm<lanes>(values[t], padded);
    });
    for (std::size_t t = 0; t < weights_.size(); ++t) worth[t] *= weights_[t];
    const auto before = [&](std::uint8_t a, std::uint8_t b) {
        return worth[a] != worth[b] ? worth[a] > worth[b] : a < b;
    };
    TokenOfRow tokens;
    std::iota(tokens.begin(), tokens.end(), std::uint8_t{0});
    std::array<std::uint8_t, tile_tokens> run_of;
    std::array<Index, tile_tokens> next;  // [run] the next row of it
    for (std::size_t s = 0; s < format_.segments().size(); ++s) {
        const Segment& run = format_.segments()[s];
        const auto first = tokens.begin() + run.first_row, last = first + run.rows;
        if (last != tokens.end()) std::nth_element(first, last, tokens.end(), before);
        for (auto token = first; token != last; ++token) run_of[*token] = static_cast<std::uint8_t>(s);
        next[s] = run.first_row;
    }
    for (std::size_t t = 0; t < run_of.size(); ++t)
        tokens[static_cast<std::size_t>(next[run_of[t]]++)] = static_cast<std::uint8_t>(t);
    return tokens;
}

inline void TileCoder::decode(const std::byte* tile, Index tokens, int depth, float* values, Index stride) {
    require(tokens >= 0 && tokens <= tile_tokens, ErrorCode::index, "tile: ", tokens,
            " tokens, expected 0 to ", tile_tokens);
    for (const auto& segment : format_.segments()) require_depth(segment, depth);
    if (tokens == 0) return;  // `values` may be null
    std::optional<TokenOfRow> token_of_row;
    if (format_.by_token()) token_of_row = read_runs(format_, tile);
    for (std::size_t s = 0; s < format_.segments().size(); ++s) {
        const Segment& segment = format_.segments()[s];
        float* to = values + segment.first_channel;
        if (segment.bits == 0) {
            for (Index t = 0; t < tokens; ++t) std::fill_n(to + t * stride, segment.channels, 0.0f);
            continue;
        }
        const int segment_depth = std::min(depth, segment.bits);
        unpack_segment(format_, s, segment_depth, tile, codes_[s]);
        if (segment.is_half())
            join_half(segment, segment_depth, tokens, codes_[s], to, stride);
        else
            decode_segment(tile, segment, segment_depth, {tokens, token_of_row}, codes_[s], to, stride);
    }
}

inline void TileCoder::clear(std::byte* tile, Index first, Index last) {
    if (first == last) return;
    std::optional<TokenOfRow> token_of_row;
    if (format_.by_token()) token_of_row = read_runs(format_, tile);
    for (std::size_t s = 0; s < format_.segments().size(); ++s) {
        const Segment& segment = format_.segments()[s];
        if (segment.bits == 0) continue;
        TileCodes& codes = codes_[s];
        unpack_segment(format_, s, segment.bits, tile, codes);
        if (!token_of_row) {
            clear_rows(tile, segment, codes, first, last - first);
            pack_segment(format_, s, codes, first, last - first, tile);
            continue;
        }
        for (Index row = 0; row < segment.rows; ++row)
            if (const Index t = (*token_of_row)[static_cast<std::size_t>(segment.first_row + row)];
                first <= t && t < last)
                clear_rows(tile, segment, codes, row, 1);
        pack_segment(format_, s, codes, 0, segment.rows, tile);
    }
}

/// Zeros for the codes of some rows, their grids, and what is known of fp16.
inline void TileCoder::clear_rows(std::byte* tile, const Segment& segment, TileCodes& codes, Index first,
                                  Index count) {
    for (const int which : {0, 1})
        std::fill_n(codes.byte(which) + first * codes.stride(), count * codes.stride(), std::uint8_t{0});
    if (segment.is_half() && format_.side() == TileSide::keys)
        for (Index c = 0; c < segment.channels; ++c) {
            int largest = 0;
            for (Index t = 0; t < tile_tokens; ++t)
                largest = std::max(largest, (codes.at(t, c, 0) << 8 | codes.at(t, c, 1)) & 0x7FFF);
            tile[segment.exponent_at + c] = static_cast<std::byte>(largest >> 10);
        }
    if (!segment.has_grids() || format_.rule().granularity == Granularity::per_channel) return;
    for (Index run = 0; run < segment.grids / segment.rows; ++run) {
        const Index at = run * segment.rows + first;
        const auto zero = [&](Index from, Index bytes) {
            std::memset(tile + from + at * bytes, 0, static_cast<std::size_t>(count * bytes));
        };
        zero(segment.step_at, step_bytes(segment.scheme));
        if (has_lower(segment.scheme)) zero(segment.lower_at, sizeof(Eigen::half));
    }
}

inline double TileCoder::error_bound(const std::byte* tile, Index first, Index last) {
    const auto rounding = [](float x) { return std::ldexp(std::abs(static_cast<double>(x)), -11) + 0x1p-25; };
    double bound = 0.0;
    std::optional<TokenOfRow> token_of_row;
    if (format_.by_token()) token_of_row = read_runs(format_, tile);
    const auto in_use = [&](Index g, const Segment& segment) {
        if (!token_of_row) return grid_in_use(g, segment, first, last);
        const Index t = (*token_of_row)[static_cast<std::size_t>(segment.first_row + g % segment.rows)];
        return first <= t && t < last;
    };
    for (std::size_t s = 0; s < format_.segments().size(); ++s) {
        const Segment& segment = format_.segments()[s];
        if (segment.is_half()) {
            decoded_.resize(static_cast<std::size_t>(tile_tokens * segment.channels));
            unpack_segment(format_, s, 16, tile, codes_[s]);
            join_half(segment, 16, last, codes_[s], decoded_.data(), segment.channels);
            for (Index i = first * segment.channels; i < last * segment.channels; ++i)
                bound = std::max(bound, rounding(decoded_[static_cast<std::size_t>(i)]));
            continue;
        }
        read_grids(tile, segment, segment.bits);
        for (std::size_t g = 0; g < lower_.size(); ++g)
            if (in_use(static_cast<Index>(g), segment))
                bound = std::max<double>(bound, Grid{lower_[g], step_[g], segment.bits}.error_bound());
    }
    return bound;
}

inline bool TileCoder::grid_in_use(Index g, const Segment& segment, Index first, Index last) const noexcept {
    const bool by_channel = format_.rule().granularity == Granularity::per_channel;
    const Index group = by_channel ? format_.rule().group : 1,
                begin = by_channel ? g / segment.channels * group : g % tile_tokens;
    return begin < last && begin + group > first;
}

inline void TileCoder::require_depth(const Segment& segment, int depth) {
    const int read = std::min(depth, segment.bits);
    require(depth >= 1 && (!segment.is_half() || (read >= 8 && read % 4 == 0)), ErrorCode::option,
            "tile: a depth of ", depth, " bits, expected ",
            segment.is_half() ? "8, 12 or 16 for fp16" : "at least 1");
}

template <CacheScalar Scalar>
void TileCoder::quantize_segment(const HeadRows<Scalar>& rows, std::string_view argument,
                                 const TileTokens& tokens, const Segment& segment, TileCodes& codes,
                                 std::byte* tile) {
    GridRule rule = format_.rule();
    rule.scheme = segment.scheme;
    quantizer_.quantize(rows,
                        {.argument = argument,
                         .head = tokens.head,
                         .first = tokens.first,
                         .count = tokens.count,
                         .first_channel = segment.first_channel,
                         .channels = segment.channels,
                         .rule = rule,
                         .bits = segment.bits,
                         .codes = shaped_ ? nullptr : codes.byte(0) + tokens.tile_token * codes.stride(),
                         .code_stride = codes.stride()});
    if (shaped_) {
        shape_codes(rows, tokens, segment, codes);
    } else {
        excess_.largest = std::max(excess_.largest, quantizer_.excess().largest);
        excess_.energy += quantizer_.excess().energy;
    }
    const bool keep_lower = has_lower(segment.scheme);
    auto* step = reinterpret_cast<Eigen::half*>(tile + segment.step_at);
    auto* lower = reinterpret_cast<Eigen::half*>(tile + segment.lower_at);
    if (format_.rule().granularity == Granularity::per_channel) {
        const Index at = tokens.tile_token / format_.rule().group * segment.channels;
        std::copy(quantizer_.step().begin(), quantizer_.step().end(), step + at);
        if (keep_lower) std::copy(quantizer_.lower().begin(), quantizer_.lower().end(), lower + at);
        return;
    }
    const Index runs = segment.grids / segment.rows;
    for (Index t = 0; t < tokens.count; ++t)
        for (Index run = 0; run < runs; ++run) {
            const auto from = static_cast<std::size_t>(t * runs + run);
            const Index at = run * segment.rows + tokens.tile_token + t;
            if (step_bytes(segment.scheme) == 1)
                tile[segment.step_at + at] = static_cast<std::byte>(step_byte(quantizer_.step()[from]));
            else
                step[at] = quantizer_.step()[from];
            if (keep_lower) lower[at] = quantizer_.lower()[from];
        }
}

inline void TileCoder::shape(const Eigen::Ref<const Matrix>& weight) {
    require(format_.segments().size() == 1 && format_.segments()[0].has_grids() &&
                format_.rule().granularity == Granularity::per_channel,
            ErrorCode::option, "tile: shaped codes take one segment with grids per channel");
    if (!shaped_) shaped_.emplace();
    shaped_->set_weight(weight);
}

/// Codes of the grids that were just made, group of tokens by group.
template <CacheScalar Scalar>
void TileCoder::shape_codes(const HeadRows<Scalar>& rows, const TileTokens& tokens, const Segment& segment,
                            TileCodes& codes) {
    const Index channels = segment.channels, group = format_.rule().group;
    const auto size = static_cast<std::size_t>(channels);
    decoded_.resize(static_cast<std::size_t>(tokens.count) * size);
    const Isa isa = current_isa();
    for (Index t = 0; t < tokens.count; ++t) {
        float* const to = decoded_.data() + t * channels;
        if (rows.channel_stride() == 1) {
            widen_checked(isa, rows.at(tokens.head, tokens.first + t, segment.first_channel), channels, to);
            continue;
        }
        for (Index c = 0; c < channels; ++c)
            to[c] = static_cast<float>(*rows.at(tokens.head, tokens.first + t, segment.first_channel + c));
    }
    row_lower_.resize(std::max(row_lower_.size(), size));
    row_step_.resize(std::max(row_step_.size(), size));
    for (Index first = 0, g = 0; first < tokens.count; first += group, g += channels) {
        for (std::size_t c = 0; c < size; ++c) {
            const std::size_t at = static_cast<std::size_t>(g) + c;
            row_lower_[c] = static_cast<float>(quantizer_.lower()[at]);
            row_step_[c] = static_cast<float>(quantizer_.step()[at]);
            if (!has_lower(segment.scheme))
                row_lower_[c] = row_step_[c] * lower_in_steps(segment.scheme, segment.bits);
        }
        const ClipExcess excess =
            shaped_->encode({.values = decoded_.data() + first * channels,
                             .value_stride = channels,
                             .tokens = std::min(group, tokens.count - first),
                             .channels = channels,
                             .bits = segment.bits,
                             .lower = row_lower_.data(),
                             .step = row_step_.data(),
                             .codes = codes.byte(0) + (tokens.tile_token + first) * codes.stride(),
                             .code_stride = codes.stride()});
        excess_.largest = std::max(excess_.largest, excess.largest);
        excess_.energy += excess.energy;
    }
}

inline void TileCoder::decode_segment(const std::byte* tile, const Segment& segment, int depth,
                                      const DecodedTokens& tokens, const TileCodes& codes, float* values,
                                      Index stride) {
    read_grids(tile, segment, depth);
    const Isa isa = current_isa();
    const Index channels = segment.channels, padded = padded_channels(channels);
    const bool by_channel = format_.rule().granularity == Granularity::per_channel;
    const Index group = by_channel ? format_.rule().group : 1;
    const bool direct = channels == padded;
    if (!direct) decoded_.resize(static_cast<std::size_t>(group * padded));
    const Index rows = tokens.of_row ? segment.rows : tokens.count;
    for (Index t = 0; t < rows; t += group) {
        const Index count = std::min(group, rows - t),
                    token =
                        tokens.of_row ? (*tokens.of_row)[static_cast<std::size_t>(segment.first_row + t)] : t;
        if (token >= tokens.count) continue;
        if (by_channel)
            spread_columns(t / group, channels);
        else
            spread_row(t, segment);
        float* to = direct ? values + token * stride : decoded_.data();
        decode_columns(isa, codes.byte(0) + t * codes.stride(), codes.stride(), count, padded,
                       row_lower_.data(), row_step_.data(), to, direct ? stride : padded);
        if (!direct)
            for (Index i = 0; i < count; ++i)
                std::copy_n(to + i * padded, channels, values + (token + i) * stride);
    }
}

/// All grids of a segment as floats, the step that of the depth.
inline void TileCoder::read_grids(const std::byte* tile, const Segment& segment, int depth) {
    const auto grids = static_cast<std::size_t>(segment.grids);
    half_steps_.resize(grids);
    const auto* step = steps_of(segment, tile, 0, segment.grids, half_steps_.data());
    const auto* lower = reinterpret_cast<const Eigen::half*>(tile + segment.lower_at);
    lower_.resize(grids);
    step_.resize(grids);
    const float to_lower = lower_in_steps(segment.scheme, segment.bits);
    const float widen = power_of_two(segment.bits - depth);
    for (std::size_t g = 0; g < grids; ++g) {
        const auto fine = static_cast<float>(step[g]);
        lower_[g] = has_lower(segment.scheme) ? static_cast<float>(lower[g]) : fine * to_lower;
        step_[g] = fine * widen;
    }
    const auto padded = static_cast<std::size_t>(padded_channels(segment.channels));
    row_lower_.resize(std::max(row_lower_.size(), padded));
    row_step_.resize(std::max(row_step_.size(), padded));
}

inline void TileCoder::spread_columns(Index group, Index channels) {
    std::copy_n(lower_.begin() + group * channels, channels, row_lower_.begin());
    std::copy_n(step_.begin() + group * channels, channels, row_step_.begin());
}

inline void TileCoder::spread_row(Index row, const Segment& segment) {
    const Index run = format_.rule().group;
    for (Index c = 0, r = 0; c < segment.channels; c += run, ++r) {
        const auto g = static_cast<std::size_t>(r * segment.rows + row);
        const Index size = std::min(run, segment.channels - c);
        std::fill_n(row_lower_.begin() + c, size, lower_[g]);
        std::fill_n(row_step_.begin() + c, size, step_[g]);
    }
}

/// fp16 bits of tokens to two bytes each; of keys also the exponents of the largest magnitudes.
template <CacheScalar Scalar>
void TileCoder::split_half(const HeadRows<Scalar>& rows, std::string_view argument, const TileTokens& tokens,
                           const Segment& segment, TileCodes& codes, std::byte* tile) {
    const Isa isa = current_isa();
    const auto channels = static_cast<std::size_t>(segment.channels);
    largest_.assign(channels, 0);
    for (Index t = 0; t < tokens.count; ++t) {
        const auto value = [&](Index c) {
            return rows.at(tokens.head, tokens.first + t, segment.first_channel + c);
        };
        std::uint8_t* const high = &codes.at(tokens.tile_token + t, 0, 0);
        std::uint8_t* const low = &codes.at(tokens.tile_token + t, 0, 1);
        bool good = true;
        if (rows.channel_stride() == 1) {
            good = split_halves(isa, value(0), segment.channels, high, low, largest_.data());
        } else {
            gathered_.resize(channels);
            for (std::size_t c = 0; c < channels; ++c)
                gathered_[c] = static_cast<float>(*value(static_cast<Index>(c)));
            good = split_halves(isa, gathered_.data(), segment.channels, high, low, largest_.data());
        }
        for (Index c = 0; !good && c < segment.channels; ++c)
            if (!(std::abs(static_cast<float>(*value(c))) <= fp16_max))
                refuse_value(rows, argument, tokens.head, tokens.first + t, segment.first_channel + c);
    }
    if (format_.side() != TileSide::keys) return;
    for (std::size_t c = 0; c < channels; ++c) {
        std::byte& exponent = tile[segment.exponent_at + static_cast<Index>(c)];
        const auto found = static_cast<std::byte>(largest_[c] >> 10);
        if (tokens.tile_token == 0 || exponent < found) exponent = found;
    }
}

inline void TileCoder::join_half(const Segment& segment, int depth, Index tokens, TileCodes& codes,
                                 float* values, Index stride) {
    const int midpoint = depth == 16 ? 0 : 1 << (15 - depth);
    for (Index t = 0; t < tokens; ++t)
        for (Index c = 0; c < segment.channels; ++c) {
            const int bits = codes.at(t, c, 0) << 8 | codes.at(t, c, 1) | midpoint;
            values[t * stride + c] =
                static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(bits)));
        }
}

}  // namespace kvplane::detail
