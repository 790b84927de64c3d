// examples/engine/layer_cache.hpp: what the model asks of a KV cache, and the plain fp32 cache.
//
// The model (model.hpp) knows caches only through LayerCache: for every layer it appends the keys and values of new
// tokens and asks for their attention. A cache that keeps them in another form is one more class.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "engine/parallel.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace engine {

using kvplane::Matrix;

/// The keys and values of one layer and one sequence. Rows are tokens, in order, starting at position 0.
class LayerCache {
  public:
    virtual ~LayerCache() = default;

    /// Adds tokens at the end: keys after RoPE and values, both tokens x (kv_heads * head_dim). Their
    /// queries, tokens x (query_heads * head_dim) after RoPE, are for caches that adapt to them.
    virtual void append(const Matrix& keys, const Matrix& values, const Matrix& queries) = 0;

    /// Attention of the last `queries.rows()` tokens appended, each over itself and all tokens before it, or
    /// as many of them as the layer's window holds: out = softmax(q K^T / sqrt(head_dim)) V. `queries` after
    /// RoPE and `out` are tokens x (query_heads * head_dim); query head h reads key/value head h /
    /// (query_heads / kv_heads). `out` is resized.
    virtual void attend(const Matrix& queries, Matrix& out) const = 0;

    /// The number of tokens so far, which is the position of the next one.
    virtual Index tokens() const = 0;
};

/// One cache for each layer of a model: a sequence.
using LayerCaches = std::vector<std::unique_ptr<LayerCache>>;

/// Keys and values as they come, in fp32: what every other cache is compared with.
class ExactCache final : public LayerCache {
  public:
    /// window: how many tokens a query sees, itself included; 0: all.
    ExactCache(Index query_heads, Index kv_heads, Index head_dim, Executor& threads, Index window = 0)
        : query_heads_(query_heads),
          head_dim_(head_dim),
          window_(window),
          threads_(&threads),
          keys_(static_cast<std::size_t>(kv_heads)),
          values_(keys_.size()) {
        kvplane::require(kv_heads > 0 && head_dim > 0 && query_heads > 0 && query_heads % kv_heads == 0,
                         kvplane::ErrorCode::shape, "exact cache: ", query_heads, " query heads, ", kv_heads,
                         " key/value heads of ", head_dim, " channels do not fit together");
    }

    void append(const Matrix& keys, const Matrix& values, const Matrix& queries) override;
    void attend(const Matrix& queries, Matrix& out) const override;
    Index tokens() const override { return tokens_; }

  private:
    void reserve(Index more);
    /// The first token that the query of a token sees.
    Index first_seen(Index token) const { return window_ > 0 ? std::max<Index>(0, token + 1 - window_) : 0; }
    void attend_block(Index query_head, Index first, const Matrix& queries, Matrix& out) const;

    static constexpr Index block_tokens = 32;  // queries that are multiplied together

    Index query_heads_, head_dim_, window_, tokens_ = 0;
    Index first_ = 0;  // the token in row 0; those before were dropped
    Executor* threads_;
    std::vector<Matrix> keys_,
        values_;  // by head: capacity x head_dim, the first tokens_ - first_ rows in use
};

// ---------------------------------------------------------------------------------------------------------
// Implementation
// ---------------------------------------------------------------------------------------------------------

/// Makes room. Tokens that no query sees any more are dropped only where room is short, so that most appends
/// move nothing.
inline void ExactCache::reserve(Index more) {
    if (keys_[0].rows() >= tokens_ - first_ + more) return;
    const Index dropped = first_seen(tokens_) - first_, kept = tokens_ - first_ - dropped;
    const Index capacity = std::max(keys_[0].rows(), 2 * (kept + more));
    for (std::vector<Matrix>* heads : {&keys_, &values_})
        for (Matrix& head : *heads) {
            Matrix larger(capacity, head_dim_);
            if (kept > 0) larger.topRows(kept) = head.middleRows(dropped, kept);
            head = std::move(larger);
        }
    first_ += dropped;
}

inline void ExactCache::append(const Matrix& keys, const Matrix& values, const Matrix&) {
    const auto kv_heads = static_cast<Index>(keys_.size());
    kvplane::require(
        keys.cols() == kv_heads * head_dim_ && values.cols() == keys.cols() && values.rows() == keys.rows(),
        kvplane::ErrorCode::shape, "exact cache: keys ", keys.rows(), " x ", keys.cols(), " and values ",
        values.rows(), " x ", values.cols(), ", expected both tokens x ", kv_heads * head_dim_);
    reserve(keys.rows());
    for (Index head = 0; head < kv_heads; ++head) {
        const auto h = static_cast<std::size_t>(head);
        keys_[h].middleRows(tokens_ - first_, keys.rows()) = keys.middleCols(head * head_dim_, head_dim_);
        values_[h].middleRows(tokens_ - first_, keys.rows()) = values.middleCols(head * head_dim_, head_dim_);
    }
    tokens_ += keys.rows();
}

inline void ExactCache::attend(const Matrix& queries, Matrix& out) const {
    kvplane::require(queries.cols() == query_heads_ * head_dim_ && queries.rows() <= tokens_ &&
                         first_seen(tokens_ - queries.rows()) >= first_,
                     kvplane::ErrorCode::shape, "exact cache: queries ", queries.rows(), " x ",
                     queries.cols(), ", expected at most ", tokens_, " x ", query_heads_ * head_dim_);
    out.resize(queries.rows(), queries.cols());
    const Index blocks = (queries.rows() + block_tokens - 1) / block_tokens;
    parallel_for(*threads_, blocks * query_heads_, [&](Index item) {
        attend_block(item % query_heads_, item / query_heads_ * block_tokens, queries, out);
    });
}

/// One query head, up to block_tokens queries from row `first` on: two matrix products around a softmax.
inline void ExactCache::attend_block(Index query_head, Index first, const Matrix& queries,
                                     Matrix& out) const {
    const Index count = std::min(block_tokens, queries.rows() - first);
    const Index before = tokens_ - queries.rows() + first;  // the token of the first query
    const Index seen_first = first_seen(before), seen_count = before + count - seen_first;
    const auto kv_head =
        static_cast<std::size_t>(query_head / (query_heads_ / static_cast<Index>(keys_.size())));
    const auto keys = keys_[kv_head].middleRows(seen_first - first_, seen_count);
    const auto values = values_[kv_head].middleRows(seen_first - first_, seen_count);
    const auto block = queries.block(first, query_head * head_dim_, count, head_dim_);

    thread_local Matrix weights;
    weights.resize(count, seen_count);
    weights.noalias() = block * keys.transpose();
    const float scale = 1 / std::sqrt(static_cast<float>(head_dim_));
    for (Index i = 0; i < count; ++i) {
        const Index hidden = first_seen(before + i) - seen_first;
        auto seen = weights.row(i).segment(hidden, seen_count - count + i + 1 - hidden).array();
        seen = (scale * (seen - seen.maxCoeff())).exp();
        seen /= seen.sum();
        weights.row(i).head(hidden).setZero();
        weights.row(i).tail(count - i - 1).setZero();
    }
    out.block(first, query_head * head_dim_, count, head_dim_).noalias() = weights * values;
}

}  // namespace engine
