// kvplane/attention/float_rows.hpp: attention on rows of floats: tokens outside tiles, and queries on their
// way into latents.
//
// Accumulators: fp32, one a lane. Everything is noexcept and allocates nothing.
#pragma once

#include <Eigen/Core>

#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/simd/isa.hpp"

namespace kvplane::detail {

/// A basis as a projection reads it.
struct ProjectionColumns {
    const Eigen::half* columns;  ///< [channels][kept], many of them small numbers
    Index channels, kept;
    const float* scale;  ///< [kept]
};

/// scores[r][t] = queries[r] . keys[t].
void row_scores(Isa isa, RowView<const float> queries, RowView<const float> keys, Index channels,
                RowView<float> scores) noexcept;

/// output[r] += sum over t of weights[r][t] values[t].
void add_rows(Isa isa, RowView<const float> weights, RowView<const float> values, Index channels,
              RowView<float> output) noexcept;

/// Rows of queries through a basis: projected[r][j] = scale[j] sum over c of queries[r][c] columns[c][j].
void project(Isa isa, RowView<const float> queries, const ProjectionColumns& basis,
             RowView<float> projected) noexcept;

/// turned[c] = query[c] cosine[c] + partner[c] sine[c] for all channels, partner[c] being the query's other
/// channel of c's pair. Returns the sum of turned[c] mean[c].
float turn_query(Isa isa, const float* query, const float* partner, const float* cosine, const float* sine,
                 const float* mean, Index channels, float* turned) noexcept;
/// Turns a step further: [2][depth] cosines, then sines, of a + b, for rows padded to whole vectors.
void add_turn(Isa isa, const float* turn, const float* step, Index depth, Index channels, float* to) noexcept;

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/attention/impl/float_rows.hpp"
#endif
