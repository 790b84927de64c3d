// kvplane/storage/impl/quantized.hpp: the functions of storage/quantized.hpp.
#pragma once

#include <cmath>

#include "kvplane/quantize/block.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/storage/planes.hpp"
#include "kvplane/storage/quantized.hpp"

namespace kvplane {

KVPLANE_FUNCTION Grid Quantized::grid(Index token, Index channel) const {
    require(token >= 0 && token < tokens_ && channel >= 0 && channel < channels(), ErrorCode::index,
            "grid: token ", token, ", channel ", channel, " of a quantized ", tokens_, " x ", channels());
    return grid_at(grid_index(token, channel));
}

KVPLANE_FUNCTION int Quantized::code(Index token, Index channel) const {
    require(token >= 0 && token < tokens_ && channel >= 0 && channel < channels(), ErrorCode::index,
            "code: token ", token, ", channel ", channel, " of a quantized ", tokens_, " x ", channels());
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(detail::padded_channels(channels())));
    read_codes(token, bits_, codes.data());
    return codes[static_cast<std::size_t>(channel)];
}

KVPLANE_FUNCTION double Quantized::error_bound(int depth) const {
    require_depth(depth);
    double bound = 0.0;
    for (std::size_t g = 0; g < step_.size(); ++g)
        bound = std::max(bound, static_cast<double>(grid_at(static_cast<Index>(g)).error_bound(depth)));
    return bound + excess_.largest;
}

KVPLANE_FUNCTION double Quantized::frobenius_error_bound(int depth) const {
    require_depth(depth);
    double sum = 0.0;
    for (std::size_t g = 0; g < step_.size(); ++g) {
        const double bound = grid_at(static_cast<Index>(g)).error_bound(depth);
        sum += bound * bound * static_cast<double>(group_size(static_cast<Index>(g)));
    }
    return std::sqrt(sum) + std::sqrt(excess_.energy);
}

KVPLANE_FUNCTION Matrix Quantized::dequantize(int depth) const {
    Matrix values(tokens_, channels());
    dequantize_rows(0, depth, values);
    return values;
}

KVPLANE_FUNCTION void Quantized::require_depth(int depth) const {
    require(depth >= 1 && depth <= bits_, ErrorCode::option, "depth: ", depth, " bits, expected 1 to ",
            bits_);
}

KVPLANE_FUNCTION void Quantized::require_rows(Index first, Index rows, Index columns, int depth) const {
    require_depth(depth);
    require(columns == channels(), ErrorCode::shape, "dequantize_rows: values has ", columns,
            " columns, expected ", channels());
    require(first >= 0 && rows <= tokens_ - first, ErrorCode::index, "dequantize_rows: ", rows,
            " tokens from ", first, " on, of ", tokens_);
}

/// Grids stand in the order [token group][channel] or [token][head][run of channels].
KVPLANE_FUNCTION Index Quantized::grid_index(Index token, Index channel) const noexcept {
    if (by_channel()) return token / rule_.group * channels() + channel;
    return token * grids_per_row() + channel / head_dim_ * runs_per_head() +
           channel % head_dim_ / rule_.group;
}

/// Elements that share grid g.
KVPLANE_FUNCTION Index Quantized::group_size(Index g) const noexcept {
    if (by_channel()) return std::min(rule_.group, tokens_ - g / channels() * rule_.group);
    return std::min(rule_.group, head_dim_ - g % runs_per_head() * rule_.group);
}

KVPLANE_FUNCTION Grid Quantized::grid_at(Index g) const {
    const auto at = static_cast<std::size_t>(g);
    Grid grid{0.0f, static_cast<float>(step_[at]), bits_};
    grid.lower =
        lower_.empty() ? grid.step * lower_in_steps(rule_.scheme, bits_) : static_cast<float>(lower_[at]);
    return grid;
}

/// The first `depth` bits of the codes of one token.
KVPLANE_FUNCTION void Quantized::read_codes(Index token, int depth, std::uint8_t* codes) const {
    const PlaneSplit split = plane_split(bits_);
    int read = 0;
    for (int p = 0; p < split.count && read < depth; ++p) {
        const Index bytes = row_bytes(channels(), split[p]);
        unpack_row(planes_[static_cast<std::size_t>(p)].data() + token * bytes, channels(), split[p], p == 0,
                   codes);
        read += split[p];
    }
    if (read == depth) return;
    for (Index c = 0; c < channels(); ++c) codes[c] = static_cast<std::uint8_t>(codes[c] >> (read - depth));
}

/// lower and step (of the depth) of every channel of one token.
KVPLANE_FUNCTION void Quantized::spread_grids(Index token, int depth, float* lower, float* step) const {
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

KVPLANE_FUNCTION Index Quantized::read_rows(Index token, Index most, int depth, Rows& read) const {
    if (most == 0 || channels() == 0) return 0;
    const Index padded = detail::padded_channels(channels());
    read.codes.resize(static_cast<std::size_t>(block_tokens * padded));
    read.lower.resize(static_cast<std::size_t>(padded));
    read.step.resize(static_cast<std::size_t>(padded));
    read.values.resize(block_tokens, padded);
    Index count = std::min(block_tokens, most);
    if (by_channel()) count = std::min(count, rule_.group - token % rule_.group);
    for (Index t = 0; t < count; ++t) read_codes(token + t, depth, read.codes.data() + t * padded);
    // One row of grids serves the whole block per channel, one row of the block per token.
    const Index rows = by_channel() ? count : 1;
    for (Index t = 0; t < count; t += rows) {
        spread_grids(token + t, depth, read.lower.data(), read.step.data());
        detail::decode_columns(current_isa(), read.codes.data() + t * padded, padded, rows, padded,
                               read.lower.data(), read.step.data(), read.values.data() + t * padded, padded);
    }
    return count;
}

template <CacheScalar Scalar>
Quantized Quantized::of(const HeadRows<Scalar>& rows, const GridRule& rule, int bits,
                        std::string_view argument) {
    detail::require_grids(rule, rule.scheme, bits);
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
    const bool keep_lower = has_lower(rule.scheme);
    const Index grids_per_row = out.grids_per_row();
    const Index grids = (by_channel ? groups_of(tokens, rule.group) : tokens) * grids_per_row;
    out.step_.resize(static_cast<std::size_t>(grids));
    if (keep_lower) out.lower_.resize(static_cast<std::size_t>(grids));

    const Index block = by_channel ? std::min(rule.group, tokens) : block_tokens;
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(block * channels));
    detail::BlockQuantizer quantizer;
    for (Index first = 0; first < tokens; first += block) {
        const Index count = std::min(block, tokens - first);
        for (Index head = 0; head < rows.heads(); ++head) {
            const Index first_channel = head * rows.head_dim();
            quantizer.quantize(rows, {.argument = argument,
                                      .head = head,
                                      .first = first,
                                      .count = count,
                                      .channels = rows.head_dim(),
                                      .rule = rule,
                                      .bits = bits,
                                      .codes = codes.data() + first_channel,
                                      .code_stride = channels});
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

#if defined(KVPLANE_COMPILED)
template Quantized Quantized::of(const HeadRows<float>&, const GridRule&, int, std::string_view);
template Quantized Quantized::of(const HeadRows<Eigen::half>&, const GridRule&, int, std::string_view);
template Quantized Quantized::of(const HeadRows<Eigen::bfloat16>&, const GridRule&, int, std::string_view);
#endif

}  // namespace kvplane
