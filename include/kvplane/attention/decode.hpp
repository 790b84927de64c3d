// kvplane/attention/decode.hpp: attention on packed bits: scores and weighted sums of a tile without decoding
// it.
//
// With the grids' steps folded into the query, a score is a dot product of codes,
//
//   q.k' = sum_c q_c (lower_c + step_c / 2) + sum_c (q_c step_c) code_c,
//
// and with the steps of values folded into the softmax weights, so is an output,
//
//   sum_t w_t v'_tc = sum_t w_t (lower_t + step_t / 2) + sum_t (w_t step_t) code_tc.
//
// The folded factors are rounded to 8 bits, for a whole tile and segment at one scale, and the products
// summed in integers (kernels/). Where codes have more than 4 bits, factors have 16 bits in two parts: both
// meet the first plane, the high one alone the planes below it, whose codes weigh a sixteenth or less. A
// factor is so off by at most its largest / 254, or / 65000 on the first plane and / 254 of a sixteenth
// (T14), and a sum by that times the codes' distances from their middle. A read of part of the planes counts
// what it leaves out as its middle; where little more than 4 bits are read, 8 bits of a factor are enough.
// fp16 values in planes {8,4,4} have no grids: they are put together in registers and multiplied as floats
// (half_planes.hpp), which takes the queries and weights as they are.
//
// Everything here is noexcept, allocates nothing, and gives the same integers on every instruction set.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "kvplane/allocate/precision_alignment.hpp"
#include "kvplane/attention/dispatch.hpp"
#include "kvplane/attention/half_planes.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/simd/half.hpp"
#include "kvplane/simd/isa.hpp"
#include "kvplane/simd/vector.hpp"
#include "kvplane/storage/tile.hpp"

namespace kvplane {

/// Query rows (heads that share a key head, times query tokens) that the fused path takes together.
inline constexpr Index fused_rows = 8;
/// Tiles whose queries are turned and projected together, so that a basis is read once for all.
inline constexpr Index fused_tiles = 4;

namespace detail::fused {

using simd::by_rows;
using simd::exponential;
using simd::Floats;
using simd::Ints;
using simd::larger;
using simd::load;
using simd::plus;
using simd::reduce_rows;
using simd::store;
using simd::sum_lanes;
using simd::Vector;
using simd::widen;
using simd::Words;

/// Channels or tokens that the factors of a row are padded to: the depth of the deepest unit.
constexpr Index padded_depth(Index count) noexcept {
    return (count + 31) / 32 * 32;
}

/// Factors of some rows: x step, rounded at a row's own scale.
struct Factors {
    const float* x;  ///< rows x count, `stride` apart
    Index stride, count;
    const Eigen::half *step, *lower;  ///< lower: nullptr on symmetric grids
    float centre;                     ///< the middle of all codes in steps above lower, or above 0
    float middle, middle_below;       ///< the middle code, of all planes and of those below the first
    Index depth;                      ///< count in whole units; factors beyond count are 0
    float* folded;                    ///< rows x depth
    /// What the unread bits of a code count as, by channel, where not all are read: depth each, or nullptr.
    /// The low parts of factors count it only for the bits that they meet.
    const float *unread, *unread_low;
    /// Blocks of 16 of which any plane is read, or nullptr: all. Other factors meet nothing and are not made:
    /// what rounding does to them would be taken back as what is unread.
    const std::uint16_t* active;
    Index active_count;
    std::int8_t *high, *low;  ///< rows x factor_stride; low: nullptr for factors of one part
    Index factor_stride;
    float *worth, *base;  ///< of each row: what 1 in a rounded factor stands for; what to add to every sum
};

template <int Lanes, int rows>
KVPLANE_INLINE void fold_vector(const Factors& f, const float* x, Index stride, const Eigen::half* step,
                                const Eigen::half* lower, float* folded, Floats<Lanes>* largest,
                                Floats<Lanes>* base) {
    Floats<Lanes> s, l{}, value;
    widen<Lanes>(s, step);
    if (lower) widen<Lanes>(l, lower);
    const Floats<Lanes> centre = l + s * f.centre;
    for (int r = 0; r < rows; ++r) {
        load(value, x + r * stride);
        base[r] += value * centre;
        const Floats<Lanes> product = value * s;
        store(folded + r * f.depth, product);
        const auto magnitude = (Floats<Lanes>)((Ints<Lanes>)product & 0x7FFFFFFF);
        largest[r] = largest[r] < magnitude ? magnitude : largest[r];
    }
}

template <int Lanes, int rows>
KVPLANE_INLINE void factor_rows(const Factors& f) {
    Floats<Lanes> largest[4]{}, base[4]{};
    Index i = 0;
    for (; i + Lanes <= f.count; i += Lanes)
        fold_vector<Lanes, rows>(f, f.x + i, f.stride, f.step + i, f.lower ? f.lower + i : nullptr,
                                 f.folded + i, largest, base);
    if (i < f.count) {
        float rest_x[rows * Lanes] = {};
        std::uint16_t rest_step[Lanes] = {}, rest_lower[Lanes] = {};
        const auto rest = static_cast<std::size_t>(f.count - i);
        for (int r = 0; r < rows; ++r)
            std::memcpy(rest_x + r * Lanes, f.x + r * f.stride + i, rest * sizeof(float));
        std::memcpy(rest_step, f.step + i, rest * sizeof(Eigen::half));
        if (f.lower) std::memcpy(rest_lower, f.lower + i, rest * sizeof(Eigen::half));
        fold_vector<Lanes, rows>(f, rest_x, Lanes, reinterpret_cast<const Eigen::half*>(rest_step),
                                 f.lower ? reinterpret_cast<const Eigen::half*>(rest_lower) : nullptr,
                                 f.folded + i, largest, base);
        i += Lanes;
    }
    for (int r = 0; r < rows; ++r) std::fill(f.folded + r * f.depth + i, f.folded + (r + 1) * f.depth, 0.0f);

    float top[4], sum[4], whole[4], high_sum[4] = {}, unread_sum[4] = {};
    reduce_rows<Lanes>(largest, top, larger);
    reduce_rows<Lanes>(base, sum, plus);
    const float most = f.low ? 32512.0f : 127.0f;
    // Factors below that count as 0: their scale would not be finite.
    constexpr float nothing = 1e-30f;
    // 1.5 2^23: adding it leaves the rounded integer in the low bits.
    constexpr float magic = 12582912.0f;
    constexpr std::uint32_t magic_bits = 0x4B400000;
    const Index active = f.active ? f.active_count : f.depth / unit_lanes;
    const auto vectors = static_cast<std::uint32_t>(active * (unit_lanes / Lanes));
    Floats<Lanes> wholes[4]{}, highs[4]{}, unreads[4]{};
    for (int r = 0; r < rows; ++r) {
        const float scale = top[r] > nothing ? most / top[r] : 0.0f;
        const float* const from = f.folded + r * f.depth;
        std::int8_t *const high = f.high + r * f.factor_stride, *const low = f.low
                                                                                 ? f.low + r * f.factor_stride
                                                                                 : nullptr;
        Words<Lanes> all{}, all_high{};
        const auto round = [&](Index at) KVPLANE_BODY {
            Floats<Lanes> x;
            load(x, from + at);
            const auto bits = (Words<Lanes>)(x * scale + magic);
            all += bits;
            simd::store_low_bytes<Lanes>(reinterpret_cast<std::uint8_t*>((low ? low : high) + at),
                                             (Ints<Lanes>)bits);
            Floats<Lanes> unread;
            if (f.unread && !low) {
                load(unread, f.unread + at);
                unreads[r] += (x * scale + magic - magic) * unread;
            }
            if (!low) return;
            // The low byte counts as signed, so the high part rounds.
            const Words<Lanes> upper = (bits + 128) >> 8;
            if (f.unread) {
                const Floats<Lanes> of_high =
                    __builtin_convertvector((Ints<Lanes>)(upper - (magic_bits >> 8)), Floats<Lanes>) * 256.0f;
                load(unread, f.unread + at);
                unreads[r] += of_high * unread;
                load(unread, f.unread_low + at);
                unreads[r] += (x * scale + magic - magic - of_high) * unread;
            }
            all_high += upper;
            simd::store_low_bytes<Lanes>(reinterpret_cast<std::uint8_t*>(high + at), (Ints<Lanes>)upper);
        };
        for (Index b = 0; b < active; ++b) {
            const Index at = unit_lanes * (f.active ? f.active[b] : b);
            for (Index i = 0; i < unit_lanes; i += Lanes) round(at + i);
        }
        // Below 2^24 for depths up to 512, and then off by less than the rounding of the sums that they
        // correct.
        wholes[r] = __builtin_convertvector((Ints<Lanes>)(all - vectors * magic_bits), Floats<Lanes>);
        if (low)
            highs[r] =
                __builtin_convertvector((Ints<Lanes>)(all_high - vectors * (magic_bits >> 8)), Floats<Lanes>);
    }
    reduce_rows<Lanes>(wholes, whole, plus);
    if (f.low) reduce_rows<Lanes>(highs, high_sum, plus);
    if (f.unread) reduce_rows<Lanes>(unreads, unread_sum, plus);
    for (int r = 0; r < rows; ++r) {
        f.worth[r] = top[r] > nothing ? top[r] / most : 0.0f;
        f.base[r] = sum[r] + f.worth[r] * (unread_sum[r] - f.middle * whole[r]);
        if (f.low) f.base[r] += f.middle_below * f.worth[r] * (whole[r] - 256.0f * high_sum[r]);
    }
}

/// to[r][c] += the sum over t of x[r][t] (lower_t + step_t centre), for `channels` channels.
template <int Lanes, int rows>
KVPLANE_INLINE void add_middles(const float* x, const Eigen::half* step, const Eigen::half* lower,
                                float centre, Index channels, float* to, Index stride) {
    Floats<Lanes> sums[4]{}, middle, low, value;
    for (Index t = 0; t < tile_tokens; t += Lanes) {
        widen<Lanes>(middle, step + t);
        middle *= centre;
        if (lower) {
            widen<Lanes>(low, lower + t);
            middle += low;
        }
        for (int r = 0; r < rows; ++r) {
            load(value, x + r * tile_tokens + t);
            sums[r] += value * middle;
        }
    }
    float sum[4];
    reduce_rows<Lanes>(sums, sum, plus);
    for (int r = 0; r < rows; ++r)
        for (Index c = 0; c < channels; c += Lanes) {
            load(value, to + r * stride + c);
            store(to + r * stride + c, value + sum[r]);
        }
}

/// to[i] += scale sums[i] + base (or = that, if fresh), block by block of 16, where sums are high 256 + low.
template <int Lanes, bool fresh>
KVPLANE_INLINE void add_sums(const std::int32_t* high, const std::int32_t* low, Index block_stride,
                             Index blocks, float scale, float base, float* to) {
    const float high_scale = low ? 256.0f * scale : scale;
    for (Index b = 0; b < blocks; ++b)
        for (Index i = 0; i < unit_lanes; i += Lanes) {
            Ints<Lanes> h, l;
            Floats<Lanes> x;
            load(h, high + b * block_stride + i);
            Floats<Lanes> sum = __builtin_convertvector(h, Floats<Lanes>) * high_scale + base;
            if (low) {
                load(l, low + b * block_stride + i);
                sum += __builtin_convertvector(l, Floats<Lanes>) * scale;
            }
            if (!fresh) {
                load(x, to + b * unit_lanes + i);
                sum += x;
            }
            store(to + b * unit_lanes + i, sum);
        }
}

/// x = e^(x - largest); returns the sum, lane by lane.
template <int Lanes>
KVPLANE_INLINE void weigh(float* x, float largest, Index count, Floats<Lanes>& sum) {
    for (Index i = 0; i < count; i += Lanes) {
        Floats<Lanes> value;
        load(value, x + i);
        value -= largest;
        exponential<Lanes>(value);
        sum += value;
        store(x + i, value);
    }
}
template <int Lanes>
KVPLANE_INLINE void multiply(float* x, float by, Index count) {
    for (Index i = 0; i < count; i += Lanes) {
        Floats<Lanes> value;
        load(value, x + i);
        store(x + i, value * by);
    }
}

/// top = the larger of largest and of `count` scores, by row.
template <int Lanes, int rows>
KVPLANE_INLINE void raise_rows(const float* scores, Index count, const float* largest, float* top) {
    Floats<Lanes> most[4]{}, value;
    for (int r = 0; r < rows; ++r) load(most[r], scores + r * tile_tokens);
    for (Index i = Lanes; i < count; i += Lanes)
        for (int r = 0; r < rows; ++r) {
            load(value, scores + r * tile_tokens + i);
            most[r] = most[r] < value ? value : most[r];
        }
    float found[4];
    reduce_rows<Lanes>(most, found, larger);
    for (int r = 0; r < rows; ++r) top[r] = std::max(largest[r], found[r]);
}

/// See fused_softmax().
template <int Lanes, int rows>
KVPLANE_INLINE void softmax_rows(float* scores, Index count, float* largest, float* sum, float* output,
                                 Index stride) {
    constexpr float none = -std::numeric_limits<float>::infinity();
    Floats<Lanes> sums[4]{};
    float top[4], added[4];
    raise_rows<Lanes, rows>(scores, count, largest, top);
    for (int r = 0; r < rows; ++r) {
        if (top[r] == none)
            std::fill_n(scores + r * tile_tokens, count, 0.0f);
        else
            weigh<Lanes>(scores + r * tile_tokens, top[r], count, sums[r]);
    }
    reduce_rows<Lanes>(sums, added, plus);
    for (int r = 0; r < rows; ++r) {
        if (top[r] > largest[r]) {
            const float rescale = largest[r] == none ? 0.0f : std::exp(largest[r] - top[r]);
            sum[r] *= rescale;
            multiply<Lanes>(output + r * stride, rescale, stride);
            largest[r] = top[r];
        }
        sum[r] += added[r];
    }
}

/// scores[r][t] = q_r.k_t of `tokens` rows of floats, `stride` apart.
template <int Lanes, int rows>
KVPLANE_INLINE void row_scores(const float* queries, Index query_stride, const float* keys, Index stride,
                               Index tokens, Index channels, float* scores, Index score_stride) {
    for (Index t = 0; t < tokens; ++t) {
        Floats<Lanes> sums[4]{}, q, k;
        const float* const key = keys + t * stride;
        Index c = 0;
        for (; c + Lanes <= channels; c += Lanes) {
            load(k, key + c);
            for (int r = 0; r < rows; ++r) {
                load(q, queries + r * query_stride + c);
                sums[r] += q * k;
            }
        }
        float score[4];
        reduce_rows<Lanes>(sums, score, plus);
        for (int r = 0; r < rows; ++r) {
            for (Index rest = c; rest < channels; ++rest)
                score[r] += queries[r * query_stride + rest] * key[rest];
            scores[r * score_stride + t] = score[r];
        }
    }
}
/// `vectors` vectors of output[r] += sum over t of weights[r][t] value_t.
template <int Lanes, int rows, int vectors>
KVPLANE_INLINE void add_row_vectors(const float* weights, Index weight_stride, const float* values,
                                    Index stride, Index tokens, float* output, Index output_stride) {
    Floats<Lanes> sums[rows][vectors], v;
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i) load(sums[r][i], output + r * output_stride + i * Lanes);
    for (Index t = 0; t < tokens; ++t)
        for (int i = 0; i < vectors; ++i) {
            load(v, values + t * stride + i * Lanes);
            for (int r = 0; r < rows; ++r) sums[r][i] += v * weights[r * weight_stride + t];
        }
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i) store(output + r * output_stride + i * Lanes, sums[r][i]);
}
template <int Lanes, int rows>
KVPLANE_INLINE void add_rows(const float* weights, Index weight_stride, const float* values, Index stride,
                             Index tokens, Index channels, float* output, Index output_stride) {
    Index c = 0;
    for (; c + 2 * Lanes <= channels; c += 2 * Lanes)
        add_row_vectors<Lanes, rows, 2>(weights, weight_stride, values + c, stride, tokens, output + c,
                                        output_stride);
    for (; c + Lanes <= channels; c += Lanes)
        add_row_vectors<Lanes, rows, 1>(weights, weight_stride, values + c, stride, tokens, output + c,
                                        output_stride);
    for (; c < channels; ++c)
        for (int r = 0; r < rows; ++r)
            for (Index t = 0; t < tokens; ++t)
                output[r * output_stride + c] += weights[r * weight_stride + t] * values[t * stride + c];
}

/// projected[r][j] = scale[j] sum over c of queries[r][c] columns[c][j], for j below `kept`; columns are
/// fp16, `kept` to a row, and hold many small numbers.
template <int Lanes, int rows, int strips>
KVPLANE_INLINE void project_strips(const float* queries, Index query_stride, const Eigen::half* columns,
                                   Index channels, Index kept, const float* scale, float* projected,
                                   Index projected_stride) {
    Floats<Lanes> sums[rows][strips]{};
    for (Index c = 0; c < channels; ++c) {
        Floats<Lanes> column[strips];
        for (int s = 0; s < strips; ++s) widen<Lanes>(column[s], columns + c * kept + s * Lanes);
        for (int r = 0; r < rows; ++r)
            for (int s = 0; s < strips; ++s) sums[r][s] += column[s] * queries[r * query_stride + c];
    }
    for (int s = 0; s < strips; ++s) {
        Floats<Lanes> by;
        load(by, scale + s * Lanes);
        for (int r = 0; r < rows; ++r) store(projected + r * projected_stride + s * Lanes, sums[r][s] * by);
    }
}

/// Rows in blocks, latents in strips of vectors: a column is widened once for all rows of a block.
template <int Lanes, int rows, int strips>
KVPLANE_INLINE void project_rows(const float* queries, Index query_stride, const Eigen::half* columns,
                                 Index channels, Index kept, const float* scale, float* projected,
                                 Index projected_stride) {
    Index j = 0;
    if constexpr (strips > 1)
        for (; j + strips * Lanes <= kept; j += strips * Lanes)
            project_strips<Lanes, rows, strips>(queries, query_stride, columns + j, channels, kept, scale + j,
                                                projected + j, projected_stride);
    for (; j + Lanes <= kept; j += Lanes)
        project_strips<Lanes, rows, 1>(queries, query_stride, columns + j, channels, kept, scale + j,
                                       projected + j, projected_stride);
    if (j < kept && kept >= Lanes) {  // the last whole vector, some of it again
        j = kept - Lanes;
        project_strips<Lanes, rows, 1>(queries, query_stride, columns + j, channels, kept, scale + j,
                                       projected + j, projected_stride);
        return;
    }
    for (; j < kept; ++j)
        for (int r = 0; r < rows; ++r) {
            float sum = 0.0f;
            for (Index c = 0; c < channels; ++c)
                sum += static_cast<float>(columns[c * kept + j]) * queries[r * query_stride + c];
            projected[r * projected_stride + j] = sum * scale[j];
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
/// The angles a step further: to cos(a + b), sin(a + b).
template <int Lanes>
KVPLANE_INLINE void step_turn(const float* cosine, const float* sine, const float* step_cosine,
                              const float* step_sine, Index channels, float* to_cosine, float* to_sine) {
    // Rows are padded to whole vectors.
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
}  // namespace detail::fused

/// Memory of one thread for tiles of up to so many channels. Made once; reused by every call.
class FusedScratch {
  public:
    explicit FusedScratch(Index channels = 0) { reserve(channels); }
    /// Not copied: it points into itself.
    FusedScratch(FusedScratch&&) noexcept = default;
    FusedScratch& operator=(FusedScratch&&) noexcept = default;
    void reserve(Index channels) {
        const Index depth = detail::fused::padded_depth(std::max(channels, tile_tokens));
        if (depth <= depth_) return;
        const auto size = static_cast<std::size_t>(fused_rows * depth);
        factors_.resize(2 * size);
        folded_.resize(4 * static_cast<std::size_t>(depth));
        // 16 lanes of every block of a tile: its tokens, or the channels of values.
        sums_.resize(2 * size);
        scores_.resize(static_cast<std::size_t>(fused_rows * tile_tokens));
        rows_.resize(static_cast<std::size_t>(token_rows * depth));
        turned_.resize(fused_tiles * size);
        projected_.resize(fused_tiles * size);
        // Segments of latents may be as small as a unit each.
        const auto units = static_cast<std::size_t>(std::max<Index>(depth, tile_tokens));
        unread_.resize(2 * units);
        active_.resize(units / unit_lanes + 1);
        part_planes_.resize(units);
        part_.units = -1;
        by_depth_.resize(2 * detail::UnitsByDepth::depths * units);
        read_units_.resize(units);
        planes_.resize(units);
        turns_.resize(static_cast<std::size_t>(2 * (fused_tiles + 1) * depth));
        depth_ = depth;  // last: where memory ends before, the arrays that there are still fit the old depth
    }
    /// Unquantized tokens that are taken together.
    static constexpr Index token_rows = 32;

    Index depth() const noexcept { return depth_; }
    std::int8_t* factors(Index row) noexcept {
        return factors_.data() + row * depth_;
    }                                                    ///< 2 fused_rows of them
    float* folded() noexcept { return folded_.data(); }  ///< 4 x depth
    std::int32_t* sums() noexcept { return sums_.data(); }
    float* scores() noexcept { return scores_.data(); }        ///< fused_rows x 128
    float* rows() noexcept { return rows_.data(); }            ///< token_rows x depth
    float* turned() noexcept { return turned_.data(); }        ///< fused_tiles x fused_rows x depth
    float* projected() noexcept { return projected_.data(); }  ///< likewise
    /// Cosines by channel of the turn to a tile, depth of them, then sines, signed as a pair's channels need
    /// them; those of the turn from one tile to the next stand at fused_tiles.
    float* turn(Index tile) noexcept { return turns_.data() + 2 * tile * depth_; }

    /// For plans of partial reads, `depth` each.
    std::span<ReadUnit> read_units() noexcept { return read_units_; }
    std::span<std::uint8_t> planes() noexcept { return planes_; }
    GainHistogram& gains() noexcept { return gains_; }
    /// What this worker has read: bits of codes, and elements.
    struct Read {
        Index key_bits = 0, keys = 0, value_bits = 0, values = 0;
    };
    Read& read() noexcept { return read_; }
    /// Units of a tile (0) and of the one that is read next (1) by depth.
    detail::UnitsByDepth by_depth(int which, const std::uint8_t* planes, Index units, int all) noexcept {
        if (which == 0) part_.units = -1;
        return {planes, units, all, by_depth_.data() + which * static_cast<Index>(by_depth_.size() / 2)};
    }
    /// What a read of part of the planes comes to. It stays for the next tile, which is often read alike.
    struct PartialRead {
        PlaneSplit split;
        Index units = -1, depth = 0;
        bool two_parts = false;
        detail::UnitsByDepth by_depth{};
        /// Blocks of 16 channels or tokens of which some plane is read.
        std::span<const std::uint16_t> active;
        /// What unread bits count as, by channel or token: for the high parts of factors, for the low ones.
        const float *unread = nullptr, *unread_low = nullptr;
    };
    const PartialRead& partial_read(const PlaneSplit& split, Index units, const std::uint8_t* planes,
                                    Index depth, bool two_parts) noexcept;

  private:
    Index depth_ = 0;
    std::vector<ReadUnit> read_units_;
    std::vector<std::uint8_t> planes_;
    GainHistogram gains_;
    Read read_;
    std::vector<float> unread_;
    std::vector<std::uint8_t> part_planes_;
    std::vector<std::uint16_t> active_;
    PartialRead part_;
    std::vector<std::uint16_t> by_depth_;
    std::vector<std::int8_t> factors_;
    std::vector<float> folded_, scores_, rows_, turned_, projected_, turns_;
    std::vector<std::int32_t> sums_;
};

/// Channels of keys or tokens of values whose planes are read or not together: those of the deepest unit.
constexpr Index read_unit_depth(const PlaneSplit& split) noexcept {
    Index depth = 8;
    for (int p = 0; p < split.count; ++p) depth = std::max(depth, TileFormat::unit_depth(split[p]));
    return depth;
}
/// How many such units a tile has: of keys in all segments that have bits, one after another; of values.
inline Index read_units(const TileFormat& format) noexcept {
    Index units = 0;
    for (const TileFormat::Placed& s : format.segments()) {
        if (s.bits == 0) continue;
        const Index depth = read_unit_depth(s.split),
                    count = format.side() == TileSide::keys ? s.channels : tile_tokens;
        units += (count + depth - 1) / depth;
    }
    return units;
}

/// Of unit u (read_unit_depth() channels or tokens) the first planes[u] are read, and the rest counts as its
/// middle.
inline const FusedScratch::PartialRead& FusedScratch::partial_read(const PlaneSplit& split, Index units,
                                                                   const std::uint8_t* planes, Index depth,
                                                                   bool two_parts) noexcept {
    if (part_.units == units && part_.split == split && part_.depth == depth &&
        part_.two_parts == two_parts && std::equal(planes, planes + units, part_planes_.data()))
        return part_;
    const detail::UnitsByDepth lists = by_depth(0, planes, units, split.count);
    std::copy_n(planes, units, part_planes_.data());
    const Index unit = read_unit_depth(split);
    float reach[detail::UnitsByDepth::depths];
    for (int p = 0; p <= split.count; ++p) reach[p] = unread_reach(split, p);
    float *const high = unread_.data(), *const low = high + depth_;
    // Whole units, for which the padding has room.
    for (Index u = 0; u < units; ++u)
        for (Index i = 0; i < unit; i += 8) std::fill_n(high + u * unit + i, 8, reach[planes[u]]);
    std::fill(high + std::min(units * unit, depth), high + depth, 0.0f);
    if (two_parts) {
        // The low parts meet the first plane alone.
        for (Index u = 0; u < units; ++u)
            std::fill_n(low + u * unit, unit, planes[u] > 0 ? 0.0f : reach[0] - reach[1]);
        std::fill(low + std::min(units * unit, depth), low + depth, 0.0f);
    }
    std::size_t active = 0;
    for (Index b = 0; b < depth / unit_lanes; ++b) {
        active_[active] = static_cast<std::uint16_t>(b);
        const Index first = b * unit_lanes / unit, last = ((b + 1) * unit_lanes - 1) / unit;
        bool any = false;
        for (Index u = first; u <= std::min(last, units - 1); ++u) any = any || planes[u] > 0;
        active += any;
    }
    part_ = {split, units, depth, two_parts, lists, std::span(active_).first(active), high, low};
    return part_;
}

namespace detail {

/// What a segment's decoder adds to a code where there is no lower: -(2^(bits - 1)).
inline float symmetric_middle(int bits) noexcept {
    return -0.5f * power_of_two(bits);
}

/// The factors of several rows and the sums of their products with the planes of one segment, and of one run
/// of blocks of it. Of factors in two parts the low ones are rows of their own, after all high ones.
class FusedSums {
  public:
    FusedSums(FusedScratch& scratch, Index rows, bool two_parts) noexcept
        : scratch_(scratch), rows_(rows), two_parts_(two_parts) {}

    /// The factors of all rows: x[r * stride + i] step[i] for i below `count`, rounded; up to `depth` they
    /// are 0. What rounding does to the part of the codes that all have in common, their middle, is added
    /// back with what `lower` adds, so that a rounded factor errs by a code's distance from the middle only.
    void factors(Isa isa, const TileFormat::Placed& segment, const float* x, Index stride,
                 const Eigen::half* step, const Eigen::half* lower, Index count, Index depth) noexcept {
        const float middle = 0.5f * (power_of_two(segment.bits) - 1.0f);
        run_on(isa, [&](auto lanes) KVPLANE_BODY {
            fused::by_rows(rows_, [&](auto rows, Index first) KVPLANE_BODY {
                fused::factor_rows<lanes, rows>(
                    {x + first * stride, stride, count, step, lower,
                     middle + (lower ? 0.5f : symmetric_middle(segment.bits)), middle,
                     0.5f * (power_of_two(segment.split.shift(0)) - 1.0f), depth, scratch_.folded(),
                     part_ ? part_->unread : nullptr, part_ ? part_->unread_low : nullptr,
                     part_ ? part_->active.data() : nullptr,
                     part_ ? static_cast<Index>(part_->active.size()) : 0, scratch_.factors(first),
                     two_parts_ ? scratch_.factors(rows_ + first) : nullptr, scratch_.depth(),
                     worth_.data() + first, base_.data() + first});
            });
        });
    }

    /// Sums of `blocks` blocks from `first_block` on, over planes of `width`s whose blocks have
    /// units_of(width). Low parts meet the first plane alone.
    template <class UnitsOf>
    void sum(Isa isa, const TileFormat::Placed& segment, const std::byte* tile, const std::byte* ahead,
             Index first_block, Index blocks, const UnitsOf& units_of) noexcept {
        const PlaneDot& dot = plane_dot_of(isa);
        if (const auto pair = dot.of_pair[static_cast<std::size_t>(segment.bits)]) {
            const Index units[2] = {units_of(segment.split[0]), units_of(segment.split[1])};
            const Index at[2] = {segment.plane_at[0] + first_block * units[0] * unit_bytes,
                                 segment.plane_at[1] + first_block * units[1] * unit_bytes};
            pair({tile + at[0], tile + at[1], ahead + at[0], ahead + at[1], blocks, units[0], units[1],
                  scratch_.factors(0), scratch_.depth(), rows_, sum_rows() - rows_, segment.split.shift(0),
                  scratch_.sums(), sum_rows()});
            return;
        }
        for (int p = 0; p < segment.split.count; ++p) {
            const int width = segment.split[p];
            const Index units = units_of(width);
            const Index at = segment.plane_at[static_cast<std::size_t>(p)] + first_block * units * unit_bytes;
            dot(width,
                {tile + at, ahead + at, blocks, units, units, scratch_.factors(0), scratch_.depth(),
                 p == 0 ? sum_rows() : rows_, segment.split.shift(p), scratch_.sums(), sum_rows(), p > 0});
        }
    }

    /// Before factors() of a part of the planes. Whether any are read.
    bool leave_out(const PlaneSplit& split, Index read_units, const std::uint8_t* planes,
                   Index depth) noexcept {
        part_ = &scratch_.partial_read(split, read_units, planes, depth, two_parts_);
        return !part_->active.empty();
    }

    /// sum() over these planes. ahead_planes: of the tile that is read next.
    template <class UnitsOf>
    void sum_some(Isa isa, const TileFormat::Placed& segment, const std::byte* tile, const std::byte* ahead,
                  Index first_block, Index blocks, const UnitsOf& units_of, Index read_units,
                  const std::uint8_t* planes, const std::uint8_t* ahead_planes) noexcept {
        const PlaneDot& dot = plane_dot_of(isa);
        if (segment.bits == 8 && dot.some) {
            const Index units = units_of(4), skip = first_block * units * unit_bytes;
            const std::byte *const first = tile + skip, *const next = ahead + skip;
            const UnitsByDepth some = part_->by_depth,
                               ahead_some = ahead_planes == planes
                                                ? some
                                                : scratch_.by_depth(1, ahead_planes, read_units, 2);
            dot.some({first + segment.plane_at[0], first + segment.plane_at[1], next + segment.plane_at[0],
                      next + segment.plane_at[1], blocks, units, some, ahead_some, scratch_.factors(0),
                      scratch_.depth(), rows_, sum_rows() - rows_, scratch_.sums(), sum_rows()});
            return;
        }
        const Index depth = read_unit_depth(segment.split);
        std::fill_n(scratch_.sums(), blocks * sum_rows() * unit_lanes, 0);
        for (int p = 0; p < segment.split.count; ++p) {
            const int width = segment.split[p];
            const Index all = units_of(width), unit = TileFormat::unit_depth(width), each = depth / unit;
            const Index plane_at =
                segment.plane_at[static_cast<std::size_t>(p)] + first_block * all * unit_bytes;
            for (Index from = 0, to; from < read_units; from = to + 1) {  // runs of units that are read
                while (from < read_units && planes[from] <= p) ++from;
                for (to = from; to < read_units && planes[to] > p;) ++to;
                const Index first = from * each, count = std::min(to * each, all) - first;
                if (count <= 0) continue;
                const Index at = plane_at + first * unit_bytes;
                dot(width, {tile + at, ahead + at, blocks, all, count, scratch_.factors(0) + first * unit,
                            scratch_.depth(), p == 0 ? sum_rows() : rows_, segment.split.shift(p),
                            scratch_.sums(), sum_rows(), true});
            }
        }
    }

    /// What a run of values comes to of which nothing is read: its middles.
    void add_middles(Isa isa, const TileFormat::Placed& segment, const float* weights,
                     const Eigen::half* step, const Eigen::half* lower, Index blocks, float* to,
                     Index row_stride) noexcept {
        const float centre =
            0.5f * (power_of_two(segment.bits) - 1.0f) + (lower ? 0.5f : symmetric_middle(segment.bits));
        run_on(isa, [=, rows = rows_](auto lanes) KVPLANE_BODY {
            fused::by_rows(rows, [=](auto together, Index first) KVPLANE_BODY {
                fused::add_middles<lanes, together>(weights + first * tile_tokens, step, lower, centre,
                                                    blocks * unit_lanes, to + first * row_stride, row_stride);
            });
        });
    }
    /// Asks for what sum_some() will read of the next tile.
    template <class UnitsOf>
    void fetch(const TileFormat::Placed& segment, const std::byte* ahead, Index first_block, Index blocks,
               const UnitsOf& units_of, Index read_units, const std::uint8_t* planes) const noexcept {
        const Index depth = read_unit_depth(segment.split);
        for (int p = 0; p < segment.split.count; ++p) {
            const int width = segment.split[p];
            const Index all = units_of(width), each = depth / TileFormat::unit_depth(width);
            const std::byte* const plane =
                ahead + segment.plane_at[static_cast<std::size_t>(p)] + first_block * all * unit_bytes;
            for (Index u = 0; u < read_units; ++u)
                for (Index i = u * each; planes[u] > p && i < std::min((u + 1) * each, all); ++i)
                    for (Index b = 0; b < blocks; ++b)
                        __builtin_prefetch(plane + (b * all + i) * unit_bytes, 0, 2);
        }
    }

    /// to[r * row_stride + b * 16 ...] += (or =, if fresh) what row r and block b come to, and more[r].
    void add(Isa isa, Index blocks, bool fresh, const float* more, float* to, Index row_stride) noexcept {
        const Index stride = sum_rows() * unit_lanes;
        run_on(isa, [&](auto lanes) KVPLANE_BODY {
            for (Index r = 0; r < rows_; ++r) {
                const std::int32_t *const high = scratch_.sums() + r * unit_lanes,
                                          *const low = two_parts_ ? high + rows_ * unit_lanes : nullptr;
                const float worth = worth_[static_cast<std::size_t>(r)],
                            base = base_[static_cast<std::size_t>(r)] + (more ? more[r] : 0.0f);
                if (fresh)
                    fused::add_sums<lanes, true>(high, low, stride, blocks, worth, base, to + r * row_stride);
                else
                    fused::add_sums<lanes, false>(high, low, stride, blocks, worth, base,
                                                  to + r * row_stride);
            }
        });
    }

  private:
    Index sum_rows() const noexcept { return two_parts_ ? 2 * rows_ : rows_; }

    FusedScratch& scratch_;
    Index rows_;
    bool two_parts_;
    const FusedScratch::PartialRead* part_ = nullptr;
    std::array<float, fused_rows> worth_{}, base_{};
};

/// Grids of a tile that is read next; its planes are fetched unit by unit.
inline void prefetch_grids(const TileFormat& format, const std::byte* ahead) noexcept {
    for (Index at = 0; at < format.grid_bytes(); at += unit_bytes) __builtin_prefetch(ahead + at, 0, 2);
}

/// Scores, and weighted sums, of unquantized tokens: see fused::row_scores and add_rows.
inline void row_scores(Isa isa, const float* queries, Index query_stride, Index rows, const float* keys,
                       Index stride, Index tokens, Index channels, float* scores,
                       Index score_stride) noexcept {
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        fused::by_rows(rows, [=](auto together, Index first) KVPLANE_BODY {
            fused::row_scores<lanes, together>(queries + first * query_stride, query_stride, keys, stride,
                                               tokens, channels, scores + first * score_stride, score_stride);
        });
    });
}
inline void add_rows(Isa isa, const float* weights, Index weight_stride, Index rows, const float* values,
                     Index stride, Index tokens, Index channels, float* output,
                     Index output_stride) noexcept {
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        fused::by_rows(rows, [=](auto together, Index first) KVPLANE_BODY {
            fused::add_rows<lanes, together>(weights + first * weight_stride, weight_stride, values, stride,
                                             tokens, channels, output + first * output_stride, output_stride);
        });
    });
}

/// Rows of queries through a basis; see fused::project_rows.
inline void project(Isa isa, const float* queries, Index query_stride, Index rows, const Eigen::half* columns,
                    Index channels, Index kept, const float* scale, float* projected, Index stride) noexcept {
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        Index r = 0;
        const auto block = [&](auto count, auto strips) KVPLANE_BODY {
            for (; r + count <= rows; r += count)
                fused::project_rows<lanes, count, strips>(queries + r * query_stride, query_stride, columns,
                                                          channels, kept, scale, projected + r * stride,
                                                          stride);
        };
        // As many sums as there are registers for: 32 of 16 lanes, 16 of fewer.
        if constexpr (lanes == 16) block(LaneCount<16>{}, LaneCount<1>{});
        block(LaneCount<4>{}, LaneCount<3>{});
        block(LaneCount<1>{}, LaneCount<3>{});
    });
}

/// Sums of x times the fp16 values of one segment, for all its blocks: to[r * to_stride + ...] = more[r], or
/// without `fresh` what is there, + them. x: rows x channels (keys) or tokens (values), `stride` apart.
inline void half_sums(Isa isa, const TileFormat& format, const TileFormat::Placed& segment,
                      const std::byte* tile, const std::byte* ahead, const float* x, Index stride, Index rows,
                      const std::uint8_t* planes, const std::uint8_t* ahead_planes, bool fresh,
                      const float* more, FusedScratch& scratch, float* to, Index to_stride) noexcept {
    const bool keys = format.side() == TileSide::keys;
    const Index count = keys ? segment.channels : tile_tokens,
                units = (count + fused::half_depth - 1) / fused::half_depth,
                blocks = keys ? tile_tokens / unit_lanes : (segment.channels + unit_lanes - 1) / unit_lanes;
    for (Index r = 0; r < rows; ++r) {
        float* const scaled = scratch.rows() + r * scratch.depth();
        for (Index i = 0; i < count; ++i) scaled[i] = x[r * stride + i] * fused::half_factor;
        std::fill(scaled + count, scaled + units * fused::half_depth, 0.0f);
    }
    x = scratch.rows();
    stride = scratch.depth();
    fused::HalfBlock first{};
    Index block_bytes[3];
    for (std::size_t p = 0; p < 3; ++p) {
        first.plane[p] = tile + segment.plane_at[p];
        first.ahead[p] = ahead + segment.plane_at[p];
        const Index depth = TileFormat::unit_depth(segment.split.width[p]);
        block_bytes[p] = (count + depth - 1) / depth * unit_bytes;
    }
    const UnitsByDepth read = scratch.by_depth(0, planes, units, 3),
                       next = ahead_planes == planes ? read : scratch.by_depth(1, ahead_planes, units, 3);
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        fused::by_rows(rows, [=](auto together, Index row) KVPLANE_BODY {
            fused::HalfBlock block = first;
            for (Index b = 0; b < blocks; ++b) {
                fused::half_block<lanes, together>(block, read, next, x + row * stride, stride, fresh,
                                                   more ? more + row : nullptr,
                                                   to + row * to_stride + b * unit_lanes, to_stride);
                for (int p = 0; p < 3; ++p) {
                    block.plane[p] += block_bytes[p];
                    block.ahead[p] += block_bytes[p];
                }
            }
        });
    });
}

}  // namespace detail

/// Whether fused_scores() reads tiles of keys of this format: fp16, or grids per channel.
inline bool fused_keys(const TileFormat& format) noexcept {
    return format.side() == TileSide::keys &&
           std::all_of(format.segments().begin(), format.segments().end(), [&](const TileFormat::Placed& s) {
               return s.bits == 16 || format.rule().granularity == Granularity::per_channel;
           });
}
/// Whether fused_output() reads tiles of values of this format: one segment, of fp16, or of 1 to 8 bits with
/// grids per token over the head or over multiples of 16 channels.
inline bool fused_values(const TileFormat& format) noexcept {
    if (format.side() != TileSide::values || format.segments().size() != 1) return false;
    if (format.segments()[0].bits == 16) return true;
    return format.rule().granularity == Granularity::per_token && format.segments()[0].bits >= 1 &&
           format.segments()[0].bits <= 8 &&
           (format.rule().group >= format.channels() || format.rule().group % unit_lanes == 0);
}

/// scores[r * 128 + t] = offsets[r] + q_r . k'_t for all 128 tokens of a tile of keys. queries: rows x
/// channels, `stride` apart; rows at most fused_rows. ahead: a tile that is read next, or the same. planes:
/// how many to read of each of read_units(format), the rest taken as its middle; nullptr: all. ahead_planes:
/// likewise of the tile that is read next; nullptr: the same. two_parts: whether factors that meet more than
/// 4 bits have 16 bits, and not 8.
inline void fused_scores(Isa isa, const TileFormat& format, const std::byte* tile, const std::byte* ahead,
                         const float* queries, Index stride, Index rows, const float* offsets,
                         FusedScratch& scratch, float* scores, const std::uint8_t* planes = nullptr,
                         bool two_parts = true, const std::uint8_t* ahead_planes = nullptr) noexcept {
    const Index group = format.rule().group, blocks = group / unit_lanes;
    if (!ahead_planes) ahead_planes = planes;
    detail::prefetch_grids(format, ahead);
    bool fresh = true;
    for (const TileFormat::Placed& segment : format.segments()) {
        if (segment.bits == 0) continue;
        const Index channels = segment.channels, depth = detail::fused::padded_depth(channels);
        const Index unit_depth = read_unit_depth(segment.split),
                    units = (channels + unit_depth - 1) / unit_depth;
        if (segment.bits == 16) {
            detail::half_sums(isa, format, segment, tile, ahead, queries + segment.first_channel, stride,
                              rows, planes, ahead_planes, fresh, fresh ? offsets : nullptr, scratch, scores,
                              tile_tokens);
            fresh = false;
            if (planes) planes += units, ahead_planes += units;
            continue;
        }
        const bool symmetric = segment.scheme == Scheme::symmetric;
        const auto* step = reinterpret_cast<const Eigen::half*>(tile + segment.step_at);
        const auto* lower = reinterpret_cast<const Eigen::half*>(tile + segment.lower_at);
        detail::FusedSums sums(scratch, rows, segment.bits > 4 && two_parts);
        if (planes) sums.leave_out(segment.split, units, planes, depth);
        for (Index g = 0; g * group < tile_tokens; ++g) {
            sums.factors(isa, segment, queries + segment.first_channel, stride, step + g * channels,
                         symmetric ? nullptr : lower + g * channels, channels, depth);
            const auto units_of = [&](int width) {
                const Index unit = TileFormat::unit_depth(width);
                return (channels + unit - 1) / unit;
            };
            if (planes)
                sums.sum_some(isa, segment, tile, ahead, g * blocks, blocks, units_of, units, planes,
                              ahead_planes);
            else
                sums.sum(isa, segment, tile, ahead, g * blocks, blocks, units_of);
            sums.add(isa, blocks, fresh, fresh ? offsets : nullptr, scores + g * group, tile_tokens);
        }
        fresh = false;
        if (planes) planes += units, ahead_planes += units;
    }
    if (!fresh) return;
    for (Index r = 0; r < rows; ++r) std::fill_n(scores + r * tile_tokens, tile_tokens, offsets[r]);
}

/// output[r * stride + c] += sum over t of weights[r * 128 + t] v'_tc of a tile of values, for channels
/// padded to whole 16s. weights: rows x 128, not negative, 0 where there is no token. planes: as for scores;
/// ahead_planes: of the tile that is read next, nullptr: the same.
inline void fused_output(Isa isa, const TileFormat& format, const std::byte* tile, const std::byte* ahead,
                         const float* weights, Index rows, FusedScratch& scratch, float* output, Index stride,
                         const std::uint8_t* planes = nullptr, bool two_parts = true,
                         const std::uint8_t* ahead_planes = nullptr) noexcept {
    const TileFormat::Placed& segment = format.segments()[0];
    if (!ahead_planes) ahead_planes = planes;
    if (segment.bits == 16) {
        detail::prefetch_grids(format, ahead);
        detail::half_sums(isa, format, segment, tile, ahead, weights, tile_tokens, rows, planes, ahead_planes,
                          false, nullptr, scratch, output, stride);
        return;
    }
    const Index run = std::min(format.rule().group, segment.channels);
    const bool symmetric = segment.scheme == Scheme::symmetric;
    const auto* step = reinterpret_cast<const Eigen::half*>(tile + segment.step_at);
    const auto* lower = reinterpret_cast<const Eigen::half*>(tile + segment.lower_at);
    detail::prefetch_grids(format, ahead);
    detail::FusedSums sums(scratch, rows, segment.bits > 4 && two_parts);
    const Index units = tile_tokens / read_unit_depth(segment.split);
    const bool reads = !planes || sums.leave_out(segment.split, units, planes, tile_tokens);
    const auto units_of = [](int width) { return tile_tokens / TileFormat::unit_depth(width); };
    for (Index first = 0, g = 0; first < segment.channels; first += run, ++g) {
        const Index blocks = (std::min(run, segment.channels - first) + unit_lanes - 1) / unit_lanes;
        const Eigen::half *const run_step = step + g * tile_tokens, *const run_lower =
                                                                        symmetric ? nullptr
                                                                                  : lower + g * tile_tokens;
        if (!reads) {
            sums.add_middles(isa, segment, weights, run_step, run_lower, blocks, output + first, stride);
            sums.fetch(segment, ahead, first / unit_lanes, blocks, units_of, units, ahead_planes);
            continue;
        }
        sums.factors(isa, segment, weights, tile_tokens, run_step, run_lower, tile_tokens, tile_tokens);
        if (planes)
            sums.sum_some(isa, segment, tile, ahead, first / unit_lanes, blocks, units_of, units, planes,
                          ahead_planes);
        else
            sums.sum(isa, segment, tile, ahead, first / unit_lanes, blocks, units_of);
        sums.add(isa, blocks, false, nullptr, output + first, stride);
    }
}

// What a partial read loses ------------------------------------------------------------------------------

namespace detail::fused {

/// values[c] = (sum of squares of x over rows, or with `reach` the largest |x|) times (the mean square of a
/// channel's steps over its groups of tokens, or the largest), for the channels of a segment from `c` on.
template <int Lanes>
KVPLANE_INLINE Index importance_by_channel(const float* x, Index stride, Index rows, const Eigen::half* step,
                                           Index channels, Index groups, bool reach, float* values) {
    Index c = 0;
    for (; c + Lanes <= channels; c += Lanes) {
        Floats<Lanes> factors{}, steps{}, v;
        for (Index r = 0; r < rows; ++r) {
            load(v, x + r * stride + c);
            v = (Floats<Lanes>)((Words<Lanes>)v & 0x7FFFFFFFu);
            if (reach)
                factors = factors < v ? v : factors;
            else
                factors += v * v;
        }
        for (Index g = 0; g < groups; ++g) {
            widen<Lanes>(v, step + g * channels + c);
            if (reach)
                steps = steps < v ? v : steps;
            else
                steps += v * v * (1.0f / static_cast<float>(groups));
        }
        store(values + c, factors * steps);
    }
    return c;
}

/// The exponents of alignment_exponent(), and -1000 of 0, which has no term.
template <int Lanes>
KVPLANE_INLINE void exponents(const float* x, Ints<Lanes>& to) {
    Ints<Lanes> bits;
    load(bits, x);
    bits &= 0x7FFFFFFF;
    const Ints<Lanes> exponent = (bits >> 23) - 127, least = Ints<Lanes>{} - 14;
    const Ints<Lanes> some = exponent < least ? least : exponent;
    to = bits == 0 ? Ints<Lanes>{} - 1000 : some;
}
/// below[c]: how far the largest term of channel c lies below the largest of its row, in exponents, for the
/// row where that is least. of_keys: exponents of the largest |k|, `padded` of them; x likewise padded.
template <int Lanes>
KVPLANE_INLINE void exponents_below(const float* x, Index stride, Index rows, const std::int32_t* of_keys,
                                    Index padded, std::int32_t* below) {
    for (Index r = 0; r < rows; ++r) {
        Ints<Lanes> most = Ints<Lanes>{} - 3000, q, k, least;
        for (Index c = 0; c < padded; c += Lanes) {
            exponents<Lanes>(x + r * stride + c, q);
            load(k, of_keys + c);
            q += k;
            most = most < q ? q : most;
        }
        int top = most[0];
        for (int i = 1; i < Lanes; ++i) top = std::max<int>(top, most[i]);
        for (Index c = 0; c < padded; c += Lanes) {
            exponents<Lanes>(x + r * stride + c, q);
            load(k, of_keys + c);
            q = top - (q + k);
            if (r > 0) {
                load(least, below + c);
                q = least < q ? least : q;
            }
            store(below + c, q);
        }
    }
}

/// `count` vectors of `from` rows each to one, x[0], of all rows.
template <int Lanes, int from, int count, class Combine>
KVPLANE_INLINE void merge_all(Floats<Lanes>* x, const Combine& combine) {
    if constexpr (count > 1) {
        for (int i = 0; i < count / 2; ++i)
            merge_rows<Lanes, from>(x[i], x[2 * i], x[2 * i + 1], combine, std::make_index_sequence<Lanes>{});
        merge_all<Lanes, 2 * from, count / 2>(x, combine);
    }
}
/// Of 8 lanes after another their sum or largest: to[i] of x[8 i ... 8 i + 8), 128 of them. value(t, x):
/// Lanes of them from t on.
template <int Lanes, class Combine, class Value>
KVPLANE_INLINE void by_eight(const Combine& combine, const Value& value, float* to) {
    constexpr int from = Lanes < 8 ? 1 : Lanes / 8, count = Lanes / from;
    for (Index first = 0; first < tile_tokens; first += Lanes * 8, to += Lanes) {
        Floats<Lanes> x[count], more;
        for (int i = 0; i < count; ++i) {
            value(first + i * 8 * from, x[i]);
            if constexpr (Lanes < 8) {
                value(first + i * 8 + Lanes, more);
                combine(x[i], x[i], more);
            }
        }
        merge_all<Lanes, from, count>(x, combine);
        store(to, x[0]);
    }
}

}  // namespace detail::fused

/// How much every read unit of a tile of keys counts for some rows of queries: the sum over rows and channels
/// of (q step)^2, in the mean over the tile's groups of tokens; with `reach` the sum over channels of the
/// largest |q| times the largest step, which bounds what one step makes of a score. Of fp16 a step is the
/// last place of a channel's largest magnitude. units: read_units(format) of them.
inline void key_importance(Isa isa, const TileFormat& format, const std::byte* tile, const float* queries,
                           Index stride, Index rows, bool reach, FusedScratch& scratch,
                           ReadUnit* units) noexcept {
    float* const values = scratch.folded();
    for (const TileFormat::Placed& s : format.segments()) {
        if (s.bits == 0) continue;
        const float* const x = queries + s.first_channel;
        const auto* step = reinterpret_cast<const Eigen::half*>(tile + s.step_at);
        const Index groups = s.bits == 16 ? 0 : tile_tokens / format.rule().group;
        Index c = 0;
        if (groups > 0)
            run_on(isa, [&](auto lanes) KVPLANE_BODY {
                c = detail::fused::importance_by_channel<lanes>(x, stride, rows, step, s.channels, groups,
                                                                reach, values);
            });
        for (; c < s.channels; ++c) {
            float factors = 0.0f, steps = 0.0f;
            for (Index r = 0; r < rows; ++r) {
                const float q = std::abs(x[r * stride + c]);
                factors = reach ? std::max(factors, q) : factors + q * q;
            }
            for (Index g = 0; g < groups; ++g) {
                const auto width = static_cast<float>(step[g * s.channels + c]);
                steps = reach ? std::max(steps, width) : steps + width * width / static_cast<float>(groups);
            }
            if (s.bits == 16) {
                steps = power_of_two(std::max<int>(largest_exponents(s, tile)[c], 1) - 25);
                if (!reach) steps *= steps;
            }
            values[c] = factors * steps;
        }
        const Index depth = read_unit_depth(s.split);
        for (Index first = 0; first < s.channels; first += depth) {
            const Index end = std::min(first + depth, s.channels);
            float sum = 0.0f;
            for (c = first; c < end; ++c) sum += values[c];
            *units++ = {sum, s.split, static_cast<int>(end - first)};
        }
    }
}

/// Planes of fp16 keys by the exponents of queries and largest magnitudes (aligned_key_bits(), for units);
/// all planes of what has grids.
inline void align_keys(Isa isa, const TileFormat& format, const std::byte* tile, const float* queries,
                       Index stride, Index rows, const AlignmentThresholds& thresholds, FusedScratch& scratch,
                       std::uint8_t* planes) noexcept {
    for (const TileFormat::Placed& s : format.segments()) {
        if (s.bits == 0) continue;
        const Index depth = read_unit_depth(s.split), units = (s.channels + depth - 1) / depth,
                    padded = padded_channels(s.channels);
        if (s.bits != 16) {
            std::fill_n(planes, units, static_cast<std::uint8_t>(s.split.count));
            planes += units;
            continue;
        }
        std::int32_t *const of_keys = scratch.sums(), *const below = of_keys + padded;
        const std::uint8_t* const fields = largest_exponents(s, tile);
        for (Index c = 0; c < s.channels; ++c) of_keys[c] = std::max<int>(fields[c], 1) - 15;
        std::fill(of_keys + s.channels, of_keys + padded, 0);
        const float* x = queries + s.first_channel;
        if (padded != s.channels) {
            for (Index r = 0; r < rows; ++r) {
                float* const row = scratch.rows() + r * scratch.depth();
                std::copy_n(x + r * stride, s.channels, row);
                std::fill(row + s.channels, row + padded, 0.0f);
            }
            x = scratch.rows();
            stride = scratch.depth();
        }
        run_on(isa, [=](auto lanes) KVPLANE_BODY {
            detail::fused::exponents_below<lanes>(x, stride, rows, of_keys, padded, below);
        });
        for (Index u = 0; u < units; ++u) {
            const std::int32_t* const first = below + u * depth;
            std::int32_t least = first[0];
            for (Index i = 1; i < std::min(depth, s.channels - u * depth); ++i)
                least = std::min(least, first[i]);
            *planes++ = static_cast<std::uint8_t>(detail::aligned_planes(least, thresholds));
        }
    }
}

/// Of every token of a tile of values, the sum over channels of the squared step; with `reach` its root, and
/// returned the largest norm that the grids of any token can hold. largest: of the magnitudes of all values,
/// which fp16 goes by.
inline float value_steps(Isa isa, const TileFormat& format, const std::byte* tile, float largest, bool reach,
                         float* squares) noexcept {
    const TileFormat::Placed& s = format.segments()[0];
    if (s.bits == 16) {
        // The last place of the largest value, which is never below that of subnormal numbers.
        const float step = std::max(largest * 0x1p-10f, 0x1p-24f), size = static_cast<float>(s.channels);
        std::fill_n(squares, tile_tokens, reach ? step * std::sqrt(size) : step * step * size);
        return largest * std::sqrt(size);
    }
    const auto* step = reinterpret_cast<const Eigen::half*>(tile + s.step_at);
    const auto* lower =
        s.scheme == Scheme::symmetric ? nullptr : reinterpret_cast<const Eigen::half*>(tile + s.lower_at);
    const Index run = std::min(format.rule().group, s.channels), groups = (s.channels + run - 1) / run;
    const float cells = power_of_two(s.bits);
    float most = 0.0f;
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        using namespace detail::fused;
        Floats<lanes> top{};
        for (Index t = 0; t < tile_tokens; t += lanes) {
            Floats<lanes> sum{}, norm{}, x, low;
            for (Index g = 0; g < groups; ++g) {
                const auto size = static_cast<float>(std::min(run, s.channels - g * run));
                widen<lanes>(x, step + g * tile_tokens + t);
                sum += x * x * size;
                if (!reach) continue;
                if (lower)
                    widen<lanes>(low, lower + g * tile_tokens + t);
                else
                    low = x * (-0.5f * cells - 0.5f);
                const Floats<lanes> high = low + x * cells, a = low * low, b = high * high;
                norm += (a < b ? b : a) * size;
            }
            store(squares + t, sum);
            top = top < norm ? norm : top;
        }
        for (int i = 0; i < lanes; ++i) most = std::max(most, top[i]);
    });
    if (!reach) return 0.0f;
    Eigen::Map<Eigen::ArrayXf> roots(squares, tile_tokens);
    roots = roots.sqrt();
    return std::sqrt(most);
}

/// What the tokens of a read unit weigh, row by row: the sum of weight^2 steps, of weight steps (as
/// value_steps() gives them), or the largest weight.
enum class UnitWeight { squares, reach, largest };
inline void unit_weights(Isa isa, const float* weights, Index rows, const float* steps, UnitWeight kind,
                         Index depth, float* units) noexcept {
    run_on(isa, [=](auto lanes) KVPLANE_BODY {
        using namespace detail::fused;
        constexpr Index eighths = tile_tokens / 8;
        for (Index r = 0; r < rows; ++r) {
            const float* const row = weights + r * tile_tokens;
            float eights[eighths];
            if (kind == UnitWeight::largest)
                by_eight<lanes>(
                    larger, [=](Index t, Floats<lanes>& x) KVPLANE_BODY { load(x, row + t); }, eights);
            else
                by_eight<lanes>(
                    plus,
                    [=](Index t, Floats<lanes>& x) KVPLANE_BODY {
                        Floats<lanes> by;
                        load(x, row + t);
                        load(by, steps + t);
                        x *= kind == UnitWeight::squares ? x * by : by;
                    },
                    eights);
            const Index together = depth / 8;
            for (Index u = 0; u < eighths / together; ++u) {
                float sum = eights[u * together];
                for (Index i = u * together + 1; i < (u + 1) * together; ++i)
                    sum = kind == UnitWeight::largest ? std::max(sum, eights[i]) : sum + eights[i];
                units[r * (eighths / together) + u] = sum;
            }
        }
    });
}

// ---------------------------------------------------------------------------------------------------------

/// What some tokens contribute to the attention of a few rows: exp(score - largest) summed, and times values.
/// Contributions merge in any grouping (flash decoding); for equal results, always in the same one.
struct PartialAttention {
    float* largest;  ///< rows; -infinity: nothing yet
    float* sum;      ///< rows
    float* output;   ///< rows x stride
    Index stride;    ///< channels padded to whole 16s
};

/// Turns the scores of `count` tokens (a multiple of 16; -infinity: not seen) into weights, and scales down
/// what is there where a larger score has come. scores: rows, 128 apart.
inline void fused_softmax(Isa isa, float* scores, Index count, Index rows,
                          const PartialAttention& partial) noexcept {
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        detail::fused::by_rows(rows, [&](auto together, Index first) KVPLANE_BODY {
            detail::fused::softmax_rows<lanes, together>(
                scores + first * tile_tokens, count, partial.largest + first, partial.sum + first,
                partial.output + first * partial.stride, partial.stride);
        });
    });
}

/// Adds another contribution of one row.
inline void merge_partial(const PartialAttention& to, const PartialAttention& from) noexcept {
    constexpr float none = -std::numeric_limits<float>::infinity();
    if (*from.largest == none) return;
    const float top = std::max(*to.largest, *from.largest);
    const float keep = *to.largest == none ? 0.0f : std::exp(*to.largest - top),
                take = std::exp(*from.largest - top);
    *to.sum = *to.sum * keep + *from.sum * take;
    for (Index c = 0; c < to.stride; ++c) to.output[c] = to.output[c] * keep + from.output[c] * take;
    *to.largest = top;
}

}  // namespace kvplane
