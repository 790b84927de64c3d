// kvplane/attention/impl/float_rows.hpp: the loops over rows of floats.
#pragma once

#include "kvplane/attention/float_rows.hpp"
#include "kvplane/attention/lanes.hpp"

namespace kvplane::detail {

template <int Lanes, int rows>
KVPLANE_INLINE void score_rows(RowView<const float> queries, RowView<const float> keys, Index channels,
                               RowView<float> scores) {
    for (Index t = 0; t < keys.rows; ++t) {
        Floats<Lanes> sums[4]{}, q, k;
        const float* const key = keys[t];
        Index c = 0;
        for (; c + Lanes <= channels; c += Lanes) {
            load(k, key + c);
            for (int r = 0; r < rows; ++r) {
                load(q, queries[r] + c);
                sums[r] += q * k;
            }
        }
        float score[4];
        reduce_rows<Lanes>(sums, score, plus);
        for (int r = 0; r < rows; ++r) {
            for (Index rest = c; rest < channels; ++rest) score[r] += queries[r][rest] * key[rest];
            scores[r][t] = score[r];
        }
    }
}

/// `vectors` vectors, from channel c on, of output[r] += sum over t of weights[r][t] values[t].
template <int Lanes, int rows, int vectors>
KVPLANE_INLINE void add_weighted_vectors(RowView<const float> weights, RowView<const float> values, Index c,
                                         RowView<float> output) {
    Floats<Lanes> sums[rows][vectors], v;
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i) load(sums[r][i], output[r] + c + i * Lanes);
    for (Index t = 0; t < values.rows; ++t)
        for (int i = 0; i < vectors; ++i) {
            load(v, values[t] + c + i * Lanes);
            for (int r = 0; r < rows; ++r) sums[r][i] += v * weights[r][t];
        }
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i) store(output[r] + c + i * Lanes, sums[r][i]);
}
template <int Lanes, int rows>
KVPLANE_INLINE void add_weighted_rows(RowView<const float> weights, RowView<const float> values,
                                      Index channels, RowView<float> output) {
    Index c = 0;
    for (; c + 2 * Lanes <= channels; c += 2 * Lanes)
        add_weighted_vectors<Lanes, rows, 2>(weights, values, c, output);
    for (; c + Lanes <= channels; c += Lanes)
        add_weighted_vectors<Lanes, rows, 1>(weights, values, c, output);
    for (; c < channels; ++c)
        for (int r = 0; r < rows; ++r)
            for (Index t = 0; t < values.rows; ++t) output[r][c] += weights[r][t] * values[t][c];
}

/// projected[r][j] = scale[j] sum over c of queries[r][c] columns[c][j], for `strips` vectors from j on.
template <int Lanes, int rows, int strips>
KVPLANE_INLINE void project_strips(RowView<const float> queries, const ProjectionColumns& basis, Index j,
                                   RowView<float> projected) {
    Floats<Lanes> sums[rows][strips]{};
    for (Index c = 0; c < basis.channels; ++c) {
        Floats<Lanes> column[strips];
        for (int s = 0; s < strips; ++s)
            widen<Lanes>(column[s], basis.columns + c * basis.kept + j + s * Lanes);
        for (int r = 0; r < rows; ++r)
            for (int s = 0; s < strips; ++s) sums[r][s] += column[s] * queries[r][c];
    }
    for (int s = 0; s < strips; ++s) {
        Floats<Lanes> by;
        load(by, basis.scale + j + s * Lanes);
        for (int r = 0; r < rows; ++r) store(projected[r] + j + s * Lanes, sums[r][s] * by);
    }
}

/// Rows in blocks, latents in strips of vectors: a column is widened once for all rows of a block.
template <int Lanes, int rows, int strips>
KVPLANE_INLINE void project_rows(RowView<const float> queries, const ProjectionColumns& basis,
                                 RowView<float> projected) {
    const Index kept = basis.kept;
    Index j = 0;
    if constexpr (strips > 1)
        for (; j + strips * Lanes <= kept; j += strips * Lanes)
            project_strips<Lanes, rows, strips>(queries, basis, j, projected);
    for (; j + Lanes <= kept; j += Lanes) project_strips<Lanes, rows, 1>(queries, basis, j, projected);
    if (j < kept && kept >= Lanes)  // the last whole vector, some of it again
        return project_strips<Lanes, rows, 1>(queries, basis, kept - Lanes, projected);
    for (; j < kept; ++j)
        for (int r = 0; r < rows; ++r) {
            float sum = 0.0f;
            for (Index c = 0; c < basis.channels; ++c)
                sum += static_cast<float>(basis.columns[c * kept + j]) * queries[r][c];
            projected[r][j] = sum * basis.scale[j];
        }
}

/// turned[c] = query[c] cosine[c] + partner[c] sine[c], partner[c] the query's other channel of c's pair;
/// returns the sum of turned[c] mean[c].
template <int Lanes>
KVPLANE_INLINE float turn_row(const float* query, const float* partner, const float* cosine,
                              const float* sine, const float* mean, Index channels, float* turned) {
    Floats<Lanes> sum{};
    Index c = 0;
    for (; c + Lanes <= channels; c += Lanes) {
        Floats<Lanes> q, p, cos, sin, m;
        load(q, query + c);
        load(p, partner + c);
        load(cos, cosine + c);
        load(sin, sine + c);
        load(m, mean + c);
        const Floats<Lanes> x = q * cos + p * sin;
        store(turned + c, x);
        sum += x * m;
    }
    float all = sum_lanes<Lanes>(sum);
    for (; c < channels; ++c) {
        turned[c] = query[c] * cosine[c] + partner[c] * sine[c];
        all += turned[c] * mean[c];
    }
    return all;
}
/// The angles a step further: cos(a + b) and sin(a + b), for rows padded to whole vectors.
template <int Lanes>
KVPLANE_INLINE void step_turn(const float* cosine, const float* sine, const float* step_cosine,
                              const float* step_sine, Index channels, float* to_cosine, float* to_sine) {
    for (Index c = 0; c < channels; c += Lanes) {
        Floats<Lanes> cos, sin, step_cos, step_sin;
        load(cos, cosine + c);
        load(sin, sine + c);
        load(step_cos, step_cosine + c);
        load(step_sin, step_sine + c);
        store(to_cosine + c, cos * step_cos - sin * step_sin);
        store(to_sine + c, sin * step_cos + cos * step_sin);
    }
}

KVPLANE_FUNCTION void row_scores(Isa isa, RowView<const float> queries, RowView<const float> keys,
                                 Index channels, RowView<float> scores) noexcept {
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        by_rows(queries.rows, [=](auto together, Index first) KVPLANE_BODY {
            score_rows<lanes, together>(queries.from(first), keys, channels, scores.from(first));
        });
    });
}

KVPLANE_FUNCTION void add_rows(Isa isa, RowView<const float> weights, RowView<const float> values,
                               Index channels, RowView<float> output) noexcept {
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        by_rows(weights.rows, [=](auto together, Index first) KVPLANE_BODY {
            add_weighted_rows<lanes, together>(weights.from(first), values, channels, output.from(first));
        });
    });
}

KVPLANE_FUNCTION void project(Isa isa, RowView<const float> queries, const ProjectionColumns& basis,
                              RowView<float> projected) noexcept {
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        Index r = 0;
        const auto block = [&](auto count, auto strips) KVPLANE_BODY {
            for (; r + count <= queries.rows; r += count)
                project_rows<lanes, count, strips>(queries.from(r), basis, projected.from(r));
        };
        // As many sums as there are registers for: 32 of 16 lanes, 16 of fewer.
        if constexpr (lanes == 16) block(LaneCount<16>{}, LaneCount<1>{});
        block(LaneCount<4>{}, LaneCount<3>{});
        block(LaneCount<1>{}, LaneCount<3>{});
    });
}

KVPLANE_FUNCTION float turn_query(Isa isa, const float* query, const float* partner, const float* cosine,
                                  const float* sine, const float* mean, Index channels,
                                  float* turned) noexcept {
    return run_on(isa, [=](auto lanes) KVPLANE_BODY {
        return turn_row<lanes>(query, partner, cosine, sine, mean, channels, turned);
    });
}

KVPLANE_FUNCTION void add_turn(Isa isa, const float* turn, const float* step, Index depth, Index channels,
                               float* to) noexcept {
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        step_turn<lanes>(turn, turn + depth, step, step + depth, channels, to, to + depth);
    });
}

}  // namespace kvplane::detail
