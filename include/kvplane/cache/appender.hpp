// kvplane/cache/appender.hpp: how tokens come into a cache.
//
// An Appender builds what an append adds, piece by piece, without changing the cache: new pages, copies of
// shared pages that go on being filled, and the numbers of the state. commit() then cannot fail.
#pragma once

#include "kvplane/attention/executor.hpp"
#include "kvplane/cache/pages.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane::detail {

/// Appends tokens to `state`: as provisional ones, or as settled ones, in which case all others are settled
/// first. The executor's workers share it out by token and by head. Throws Error (shape, not_finite, beyond_fp16,
/// out_of_memory) and then has changed nothing.
///   values   nullptr where they are in keys
///   queries  [token][query_heads * key dim] after RoPE, or nullptr
void append_tokens(const CacheShape& cache, CacheState& state, TilePool& pool, const AnyRows& keys,
                   const AnyRows* values, const AnyRows* queries, bool provisional, Executor& executor);

/// Settles the first `count` provisional tokens. Throws Error (out_of_memory) and then has changed nothing.
void settle_tokens(const CacheShape& cache, CacheState& state, TilePool& pool, Index count);

/// Fits the cache's own basis to its oldest `count` recent tokens, and makes the tiles that are then due.
/// Throws Error (shape, out_of_memory) and then has changed nothing.
void fit_own_basis(const CacheShape& cache, CacheState& state, TilePool& pool, Index count);

/// [token][heads * head_dim] the input as floats.
Matrix widened(const AnyRows& input);

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/cache/impl/appender.hpp"
#endif
