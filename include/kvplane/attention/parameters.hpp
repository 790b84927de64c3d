// kvplane/attention/parameters.hpp: what attention does to scores, the same for every path.
#pragma once

#include <cmath>
#include <limits>
#include <span>

#include "kvplane/allocate/precision_alignment.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

/// How much of what is stored a read takes: planes, most significant first. One cache serves every policy.
struct ReadPolicy {
    enum class Kind {
        all,
        fixed,      ///< of every code as many planes as fit into so many bits
        aligned,    ///< so many bits in the mean, where the query and the softmax weights make them count
        tolerance,  ///< what keeps every head's output within an error, by T13 (theory/bounds.hpp)
        exponents   ///< of fp16, by T11: AlignedKV (arXiv 2409.16546)
    };
    Kind kind = Kind::all;
    double key_bits = 16.0, value_bits = 16.0;
    /// |o - o'|_2 / max |v|_2 of a head: o of a read of everything, the largest value that the head's grids
    /// can hold. 0 reads all that has a part in the output.
    double error = 0.0;
    AlignmentThresholds thresholds = AlignmentThresholds::accurate();
    /// Of aligned reads: one budget for keys and values, both of so many bits in the mean, of which each gets
    /// what it makes most of.
    bool shared = false;

    static constexpr ReadPolicy all() noexcept { return {}; }
    static constexpr ReadPolicy fixed(double bits) noexcept {
        return {Kind::fixed, bits, bits, 0.0, {}, false};
    }
    static constexpr ReadPolicy aligned(double mean_bits) noexcept {
        return {Kind::aligned, mean_bits, mean_bits, 0.0, {}, true};
    }
    static constexpr ReadPolicy aligned(double mean_key_bits, double mean_value_bits) noexcept {
        return {Kind::aligned, mean_key_bits, mean_value_bits, 0.0, {}, false};
    }
    static constexpr ReadPolicy tolerance(double error) noexcept {
        return {Kind::tolerance, 16.0, 16.0, error, {}, false};
    }
    static constexpr ReadPolicy exponents(
        const AlignmentThresholds& thresholds = AlignmentThresholds::accurate()) noexcept {
        return {Kind::exponents, 16.0, 16.0, 0.0, thresholds, false};
    }
};

/// The score of query token i (at position p) and key t is
///
///     s = scale q.k;   s = softcap tanh(s / softcap) where there is a softcap;   s += slope_h (t - p) + bias
///
/// and key t is seen when t <= p, and, with a sliding window, p - t < window or t < sinks. A query that sees
/// nothing gets zeros; a query row that is not finite gets NaN, and no other row notices.
struct AttentionParameters {
    double scale = 0.0;                        ///< of q.k; 0: 1 / sqrt(head_dim)
    double softcap = 0.0;                      ///< 0, or 1e30 and more: none; applied before masking
    Index sliding_window = 0;                  ///< keys a query sees, itself included; 0: all
    Index sinks = 0;                           ///< first tokens that stay visible in spite of the window
    std::span<const float> alibi_slopes = {};  ///< one a query head, or none
    /// Added to scores: query_tokens x keys for all heads, or (query_heads * query_tokens) x keys, head by
    /// head; -infinity masks. nullptr: none.
    const Matrix* bias = nullptr;
    /// The share of the tokens in tiles whose keys take part, for each query: those of the largest scores by
    /// the leading latents. Sinks and recent tokens always do. Below 1 for recipes with latents alone.
    double key_fraction = 1.0;
    Index selection_latents = 0;  ///< how many latents of a part choose; 0: a quarter of the part's channels
    /// For up to 8 query tokens and recipes of the fused path; other recipes refuse all but `all`. More query
    /// tokens read all.
    ReadPolicy read = {};
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
    const ReadPolicy& read = parameters.read;
    require(read.kind == ReadPolicy::Kind::all || (read.key_bits >= 0.0 && read.key_bits <= 16.0 &&
                                                   read.value_bits >= 0.0 && read.value_bits <= 16.0),
            ErrorCode::option, "attention: reads of ", read.key_bits, " bits of keys and ", read.value_bits,
            " of values, expected 0 to 16");
    require(read.error >= 0.0 && std::isfinite(read.error), ErrorCode::option, "attention: a tolerance of ",
            read.error, ", expected a finite number, 0 or more");
    require_thresholds(read.thresholds);
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
    require(!parameters.bias ||
                (parameters.bias->cols() == keys && (parameters.bias->rows() == query_tokens ||
                                                     parameters.bias->rows() == query_heads * query_tokens)),
            ErrorCode::shape, "attention: a bias of ", parameters.bias ? parameters.bias->rows() : 0, " x ",
            parameters.bias ? parameters.bias->cols() : 0, ", expected ", query_tokens, " (or ",
            query_heads * query_tokens, ") x ", keys);
    if (parameters.bias) require_bias(*parameters.bias);
}

/// What a query at position p does to a score; -infinity where it does not see key t.
template <class Real>
class ScoreRule {
  public:
    ScoreRule(const AttentionParameters& parameters, Index head, Index query_tokens, Index head_dim)
        : parameters_(parameters),
          scale_(static_cast<Real>(parameters.scale > 0.0 ? parameters.scale
                                                          : 1.0 / std::sqrt(static_cast<double>(head_dim)))),
          // Beyond, tanh(x) is x for every score that there can be.
          softcap_(parameters.softcap < 1e30 ? static_cast<Real>(parameters.softcap) : Real(0)),
          slope_(parameters.alibi_slopes.empty()
                     ? Real(0)
                     : static_cast<Real>(parameters.alibi_slopes[static_cast<std::size_t>(head)])),
          bias_row_(parameters.bias && parameters.bias->rows() > query_tokens ? head * query_tokens : 0) {}

    Real scale() const noexcept { return scale_; }
    bool sees(Index position, Index key) const noexcept {
        return key <= position && (parameters_.sliding_window == 0 ||
                                   position - key < parameters_.sliding_window || key < parameters_.sinks);
    }
    /// From q.k (not scaled) to what the softmax takes.
    Real operator()(Real product, Index query, Index position, Index key) const noexcept {
        if (!sees(position, key)) return -std::numeric_limits<Real>::infinity();
        Real score = scale_ * product;
        if (softcap_ > Real(0)) score = softcap_ * std::tanh(score / softcap_);
        score += slope_ * static_cast<Real>(key - position);
        if (parameters_.bias) score += static_cast<Real>((*parameters_.bias)(bias_row_ + query, key));
        return score;
    }
    /// Whether it is no more than a product and a causal mask.
    bool plain() const noexcept {
        return softcap_ == Real(0) && slope_ == Real(0) && !parameters_.bias &&
               parameters_.sliding_window == 0;
    }

  private:
    AttentionParameters parameters_;
    Real scale_, softcap_, slope_;
    Index bias_row_;
};

}  // namespace detail
}  // namespace kvplane
