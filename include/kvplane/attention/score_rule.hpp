// kvplane/attention/score_rule.hpp: from q.k to what the softmax takes, one query head at a time.
#pragma once

#include <cmath>
#include <limits>

#include "kvplane/attention/parameters.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane::detail {

/// Whether some query at a position in [first, last] sees a key in [first_key, last_key].
inline bool sees_some(const AttentionParameters& parameters, Index first, Index last, Index first_key,
                      Index last_key) noexcept {
    if (!parameters.causal) return true;
    return first_key <= last && (parameters.sliding_window == 0 || first_key < parameters.sinks ||
                                 last_key > first - parameters.sliding_window);
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
          sink_logit_(parameters.sink_logits.empty()
                          ? -std::numeric_limits<Real>::infinity()
                          : static_cast<Real>(parameters.sink_logits[static_cast<std::size_t>(head)])),
          bias_row_(parameters.bias && parameters.bias->rows() > query_tokens ? head * query_tokens : 0) {}

    Real scale() const noexcept { return scale_; }
    bool sees(Index position, Index key) const noexcept {
        return !parameters_.causal ||
               (key <= position && (parameters_.sliding_window == 0 ||
                                    position - key < parameters_.sliding_window || key < parameters_.sinks));
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
    /// Whether all keys up to `last` are seen.
    bool sees_until(Index position, Index last) const noexcept {
        return !parameters_.causal || (last <= position && parameters_.sliding_window == 0);
    }
    /// The learned sink of the head; -infinity: none.
    Real sink_logit() const noexcept { return sink_logit_; }
    /// Whether it is no more than a product and a causal mask.
    bool plain() const noexcept {
        return softcap_ == Real(0) && slope_ == Real(0) && !parameters_.bias &&
               parameters_.sliding_window == 0;
    }

  private:
    AttentionParameters parameters_;
    Real scale_, softcap_, slope_, sink_logit_;
    Index bias_row_;
};

}  // namespace kvplane::detail
