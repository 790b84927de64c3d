// kvplane/cache/prefill.hpp: attention on decoded tiles: each is decoded once for a block of query tokens.
//
// It serves what DecodePass cannot read. AttentionParameters::decode_tiles asks for it by name.
//
//   keys in latents before RoPE     each key has an angle of its own, so that it must be built before it is turned
//   a share of the keys             (SVDq, arXiv 2502.15304) which are chosen by scores of all tokens in some latents,
//                                   before the first score in all of them; most recipes that it is meant for have
//                                   keys before RoPE
//   grids by token of other runs    runs of channels that begin within units, for which kernels have no sums
#pragma once

#include <vector>

#include "kvplane/attention/executor.hpp"
#include "kvplane/attention/parameters.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane::detail {

struct PrefillOutput {
    Matrix values;       ///< [query token][query_heads * value dim] in the frame of the input
    Matrix log_sum_exp;  ///< [query token][query head] of the scores, and the sink's logit
};

/// queries: [query token][query_heads * key dim]. token_weights: [key head][token] the sums of softmax
/// weights, a result; nullptr: not wanted. Takes memory (std::bad_alloc), and throws what a worker ran into.
PrefillOutput prefill(const CacheShape& cache, const CacheState& state, const Matrix& queries,
                      const AttentionParameters& parameters, Matrix* token_weights, Executor& executor);

/// The tokens of tiles that take part for each query row with parameters.key_fraction: query head by query
/// head.
std::vector<std::vector<Index>> selected_keys(const CacheShape& cache, const CacheState& state,
                                              const Matrix& given, const AttentionParameters& parameters);

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/cache/impl/prefill.hpp"
#endif
