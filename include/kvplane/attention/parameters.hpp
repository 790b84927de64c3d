// kvplane/attention/parameters.hpp: what attention does to scores, the same for every path.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <span>

#include "kvplane/attention/read_policy.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

/// The score of query token i (at position p) and key t is
///
///     s = scale q.k;   s = softcap tanh(s / softcap) where there is a softcap;   s += slope_h (t - p) + bias
///
/// and key t is seen when t <= p, and, with a sliding window, p - t < window or t < sinks. The output is
/// the sum of exp(s) v over the seen keys, divided by that of exp(s), and of exp(sink logit) where the head
/// has one. A query that sees nothing gets zeros. A query row that is not finite gets NaN, and so does one
/// so long that its scores may not be floats (|q| times the longest key beyond 8e37); no other row notices.
struct AttentionParameters {
    double scale = 0.0;        ///< of q.k; 0: 1 / sqrt(head_dim)
    double softcap = 0.0;      ///< 0, or 1e30 and more: none; applied before masking
    Index sliding_window = 0;  ///< keys a query sees, itself included; 0: all
    Index sinks = 0;           ///< first tokens that stay visible in spite of the window
    /// The position p of the first query token, anywhere, also beyond the tokens (where the context goes on in
    /// another cache). None: the queries are those of the last tokens.
    std::optional<Index> position = std::nullopt;
    /// false: every query sees all tokens (cross-attention, drafts side by side); without a sliding window.
    bool causal = true;
    /// Learned sinks, one a query head, or none: scores of no token, that take their share of the weights.
    std::span<const float> sink_logits = {};
    std::span<const float> alibi_slopes = {};  ///< one a query head, or none
    /// Added to scores: query_tokens x keys for all heads, or (query_heads * query_tokens) x keys, head by
    /// head; -infinity masks. nullptr: none.
    const Matrix* bias = nullptr;
    /// The share of the tokens in tiles whose keys take part, for each query: those of the largest scores by
    /// the leading latents. Sinks and recent tokens always do. Below 1 for recipes with latents alone, and then
    /// tiles are decoded to floats (cache/prefill.hpp).
    double key_fraction = 1.0;
    Index selection_latents = 0;  ///< how many latents of a subspace choose; 0: a quarter of its channels
    /// Followed for up to 8 query tokens; more read all. Recipes that are not read by planes refuse every
    /// policy but `all`.
    ReadPolicy read = {};
    /// Tiles are decoded to floats, and queries and softmax weights stay floats: what output then errs by is what
    /// is stored, without what rounding them to the bits of packed products adds (T14). Many times as slow; for
    /// measurements and checks, with the policy `all`.
    bool decode_tiles = false;

    /// The position of the first of `query_tokens` over a sequence of `tokens`.
    Index first_position(Index tokens, Index query_tokens) const noexcept {
        return position.value_or(tokens - query_tokens);
    }
};

namespace detail {

/// Throws Error (not_finite) where a bias is NaN or +infinity; -infinity masks.
inline void require_bias(const Matrix& bias) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    for (Index row = 0; row < bias.rows(); ++row)
        for (Index key = 0; key < bias.cols(); ++key)
            require(bias(row, key) < infinity, ErrorCode::not_finite, "attention: a bias of ", bias(row, key),
                    " in row ", row, " for key ", key, ", expected finite numbers, or -infinity to mask");
}

inline void require_parameters(const AttentionParameters& parameters, Index query_heads, Index query_tokens,
                               Index keys) {
    require(parameters.scale >= 0.0 && parameters.scale <= std::numeric_limits<float>::max(),
            ErrorCode::option, "attention: a scale of ", parameters.scale,
            ", expected a positive number that a float holds, or 0 for 1 / sqrt(head_dim)");
    require(std::isfinite(parameters.softcap) && parameters.softcap >= 0.0, ErrorCode::option,
            "attention: a softcap of ", parameters.softcap, ", expected a positive number, or 0 for none");
    require(
        parameters.key_fraction > 0.0 && parameters.key_fraction <= 1.0 && parameters.selection_latents >= 0,
        ErrorCode::option, "attention: a key_fraction of ", parameters.key_fraction, " chosen by ",
        parameters.selection_latents, " latents, expected above 0 and at most 1, and 0 or more");
    require_policy(parameters.read);
    require(!parameters.decode_tiles || parameters.read.kind == ReadPolicy::Kind::all, ErrorCode::option,
            "attention: tiles to be decoded, and a policy of reads by planes; expected ReadPolicy::all()");
    require(parameters.sliding_window >= 0 && parameters.sinks >= 0, ErrorCode::option,
            "attention: a sliding window of ", parameters.sliding_window, " with ", parameters.sinks,
            " sinks, expected neither below 0");
    require(
        parameters.alibi_slopes.empty() || static_cast<Index>(parameters.alibi_slopes.size()) == query_heads,
        ErrorCode::shape, "attention: ", parameters.alibi_slopes.size(), " ALiBi slopes, expected ",
        query_heads, ", one a query head");
    for (const float slope : parameters.alibi_slopes)
        require(std::isfinite(slope), ErrorCode::not_finite, "attention: an ALiBi slope of ", slope,
                ", expected finite numbers");
    require(
        parameters.sink_logits.empty() || static_cast<Index>(parameters.sink_logits.size()) == query_heads,
        ErrorCode::shape, "attention: ", parameters.sink_logits.size(), " sink logits, expected ",
        query_heads, ", one a query head");
    for (const float logit : parameters.sink_logits)
        require(std::isfinite(logit), ErrorCode::not_finite, "attention: a sink logit of ", logit,
                ", expected finite numbers");
    constexpr Index last_position = Index{1} << 40;
    require(!parameters.position || (*parameters.position >= 0 && *parameters.position < last_position),
            ErrorCode::index, "attention: queries at position ", parameters.position.value_or(0),
            ", expected 0 or more");
    require(parameters.causal || parameters.sliding_window == 0, ErrorCode::option,
            "attention: a sliding window of ", parameters.sliding_window,
            " for queries that see all tokens, expected none");
    require(parameters.position || !parameters.causal || query_tokens <= keys, ErrorCode::shape,
            "attention: ", query_tokens, " query tokens over ", keys,
            " cached ones, expected the last of them, or a position");
    require(!parameters.bias ||
                (parameters.bias->cols() == keys && (parameters.bias->rows() == query_tokens ||
                                                     parameters.bias->rows() == query_heads * query_tokens)),
            ErrorCode::shape, "attention: a bias of ", parameters.bias ? parameters.bias->rows() : 0, " x ",
            parameters.bias ? parameters.bias->cols() : 0, ", expected ", query_tokens, " (or ",
            query_heads * query_tokens, ") x ", keys);
    if (parameters.bias) require_bias(*parameters.bias);
}

}  // namespace detail
}  // namespace kvplane
