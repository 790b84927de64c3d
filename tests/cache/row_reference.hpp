// tests/cache/row_reference.hpp: what one query row does with a cache, in double precision over what is
// stored, and how far attention may be from it: T14 for rounded factors, T13 for what they and reads of
// some planes do to an output.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cache_support.hpp"
#include "kvplane/attention/score_rule.hpp"
#include "kvplane/cache/decode.hpp"
#include "kvplane/theory/bounds.hpp"

namespace kvplane_test {

/// fp32 sums of n terms whose errors are independent: four deviations of sqrt(n) units of 2^-24 of the sum of
/// magnitudes.
inline double rounding(Index terms, double magnitudes) {
    return std::sqrt(static_cast<double>(terms) + 16.0) * 0x1p-22 * magnitudes;
}

/// Whether attention reads packed bits as they are.
inline bool reads_packed(const KvCache& cache, const AttentionParameters& parameters) {
    return !parameters.decode_tiles && cache.packed_tokens() > 0 &&
           detail::decodes(*cache.state().layout, cache.latent_keys());
}

class RowReference {
  public:
    /// Reads all that is stored; the cache must not change afterwards.
    explicit RowReference(const KvCache& cache)
        : cache_(cache),
          sequence_(cache.state().sequence()),
          keys_(kept(TileSide::keys)),
          values_(kept(TileSide::values)) {}

    /// query: [key dim] of one query head. Reads are whole, or `fixed`.
    void compute(const Eigen::RowVectorXf& query, Index head, Index token, Index query_tokens,
                 const AttentionParameters& parameters) {
        const CacheConfiguration& c = cache_.configuration();
        const bool decodes = reads_packed(cache_, parameters);
        read_ = decodes && query_tokens <= detail::decode_query_tokens ? parameters.read : ReadPolicy::all();
        const Index kv_head = head / c.group(),
                    position = parameters.first_position(cache_.tokens(), query_tokens) + token;
        const detail::ScoreRule<double> rule(parameters, head, query_tokens, c.key_head_dim);
        // Of no tokens all columns begin at the same place, which is none.
        const Index at = keys_.rows() > 0 ? kv_head : 0;
        const auto k = keys_.middleCols(at * c.key_head_dim, c.key_head_dim),
                   v = values_.middleCols(at * c.value_head_dim, c.value_head_dim);
        Eigen::VectorXd scores = k * query.cast<double>().transpose();
        double largest = rule.sink_logit(), magnitude = 0.0;
        for (Index t = 0; t < scores.size(); ++t) {
            scores[t] = hides(t) ? -infinity : rule(scores[t], token, position, t);
            largest = std::max(largest, scores[t]);
            if (scores[t] > -infinity) magnitude = std::max(magnitude, std::abs(scores[t]));
        }
        bound = fp32 = score_bound = 0.0;
        log_sum_exp = -infinity;
        output = Eigen::RowVectorXd::Zero(c.value_head_dim);
        if (largest == -infinity) return;
        if (scores.size() == 0) return void(log_sum_exp = rule.sink_logit());
        // std::exp: Eigen's own gives 2e-308 for -infinity.
        weights_ = scores.unaryExpr([&](double score) { return std::exp(score - largest); });
        const double sum = weights_.sum() + std::exp(rule.sink_logit() - largest);
        log_sum_exp = largest + std::log(sum);
        weights_ /= sum;
        output = weights_.transpose() * v;

        // Scores: T14 in tiles, fp32 everywhere. softcap takes off errors; what is added to a score is
        // rounded with it.
        double score_error =
            rounding(c.key_head_dim, query.cast<double>().norm() * k.rowwise().norm().maxCoeff());
        for (Index t = 0; t < sequence_.tiles; ++t)
            score_error = std::max(score_error, tile_score_error(query, kv_head, t, decodes));
        score_error = score_error * rule.scale() + rounding(0, magnitude);
        score_bound = score_error;
        // Values: T14 by channel, in the frame in which they are stored; a weight is off by e^(2
        // score_error).
        const double most = v.cwiseAbs().maxCoeff() * std::sqrt(static_cast<double>(c.value_head_dim));
        const double value_error =
            (decodes ? tile_value_error(kv_head, std::exp(std::min(600.0, 2.0 * score_error))) : 0.0) +
            rounding(cache_.tokens(), 2.0 * most);
        // A learned sink is a token whose value is 0.
        Eigen::RowVectorXd top = v.colwise().maxCoeff(), bottom = v.colwise().minCoeff();
        if (rule.sink_logit() > -infinity) top = top.cwiseMax(0.0), bottom = bottom.cwiseMin(0.0);
        const Eigen::RowVectorXd centre = 0.5 * (top + bottom);
        double radius = (v.rowwise() - centre).rowwise().norm().maxCoeff();
        if (rule.sink_logit() > -infinity) radius = std::max(radius, centre.norm());
        // Numbers near the smallest float are rounded to multiples of it, each once or twice.
        bound = theory::output_error_bound(score_error, radius, value_error) +
                static_cast<double>(2 * (cache_.tokens() + c.value_head_dim)) * 0x1p-149;
        fp32 = 2.0 * rounding(cache_.tokens() + c.key_head_dim, 2.0 * most);
    }

    /// Of all heads together, in norm.
    double longest_value() const { return values_.size() > 0 ? values_.rowwise().norm().maxCoeff() : 0.0; }

    Eigen::RowVectorXd output;
    double log_sum_exp = 0.0;
    double score_bound = 0.0;  ///< of a score, and of log_sum_exp
    double bound = 0.0;        ///< of |o - o'|_2
    double fp32 = 0.0;         ///< how far two instruction sets may be apart, but for rounded factors

  private:
    bool hides(Index token) const { return sequence_.hides(token, 1); }
    /// [token][kv_heads * dim] what is stored, 0 where tokens were dropped.
    MatrixD kept(TileSide side) const {
        const CacheConfiguration& c = cache_.configuration();
        const bool of_keys = side == TileSide::keys;
        const Index tokens = cache_.tokens(), dropped = cache_.state().dropped,
                    sinks = std::min(cache_.state().kept_sinks, tokens);
        MatrixD all = MatrixD::Zero(tokens, c.kv_heads * (of_keys ? c.key_head_dim : c.value_head_dim));
        const auto take = [&](Index first, Index count) {
            if (count > 0)
                all.middleRows(first, count) =
                    (of_keys ? cache_.stored_keys(first, count) : cache_.stored_values(first, count))
                        .cast<double>();
        };
        if (dropped > sinks) {
            take(0, sinks);
            take(dropped, tokens - dropped);
        } else {
            take(0, tokens);
        }
        return all;
    }
    /// Bits that a fixed read leaves of every code, and how far they move it from the middle of what is read.
    static double unread_steps(const TileFormat::Placed& segment, double bits_read) {
        int read = 0;
        for (int p = 0; p < segment.split.count && read + segment.split[p] <= bits_read; ++p)
            read += segment.split[p];
        return 0.5 * (std::exp2(segment.bits - read) - 1.0);
    }
    /// The same of fp16, relative to its magnitude; and what its smallest numbers lose.
    struct Unread {
        double relative, smallest;
    };
    static Unread unread_half(double bits_read) {
        return bits_read >= 16.0   ? Unread{0.0, 0.0}
               : bits_read >= 12.0 ? Unread{0x1p-7, 0x1p-20}
                                   : Unread{0x1p-3, 0x1p-16};
    }
    bool all_is_read() const { return read_.kind == ReadPolicy::Kind::all; }
    /// T14. Reads of some planes may take narrow factors for any width.
    double factors_error(const TileFormat::Placed& s, Index count, double largest) const {
        return all_is_read() ? theory::rounded_factors_error(s.bits, s.split.shift(0), count, largest)
                             : static_cast<double>(count) * largest * 0.5 * (std::exp2(s.bits) - 1.0) / 254.0;
    }
    /// The query as the codes of a tile meet it, and for every element the sum of magnitudes that made it.
    struct Met {
        Matrix query;
        Eigen::RowVectorXd magnitudes;
        double offset = 0.0;  ///< magnitudes of what a mean adds
    };
    Met met(const Eigen::RowVectorXf& query, Index kv_head, Index tile) const {
        Met met{query, query.cast<double>().cwiseAbs(), 0.0};
        if (const LatentKeys* const latent = cache_.latent_keys()) {
            const Index subspace = latent->subspace_of_head(kv_head), at = latent->head_offset(kv_head),
                        dim = latent->head_dim();
            if (latent->frame() == KeyFrame::tile)
                latent->embedding().turn(met.query, -sequence_[tile].first);
            const Matrix basis = latent->from_latents(subspace).middleRows(at, dim);
            met.offset = met.query.cast<double>().cwiseAbs().row(0).dot(
                latent->subspace(subspace).mean.segment(at, dim).cast<double>().cwiseAbs());
            met.magnitudes = met.query.cast<double>().cwiseAbs() * basis.cast<double>().cwiseAbs();
            met.query = (met.query * basis).eval();
        } else if (cache_.shape().frame(cache_.state(), sequence_[tile], kv_head).rotated) {
            cache_.shape().key_rotation.rotate(met.query);
            // A rotation spreads its rounding over all channels.
            met.magnitudes = met.query.cast<double>().cwiseAbs().array() +
                             query.cast<double>().norm() / std::sqrt(static_cast<double>(query.size()));
        }
        return met;
    }
    double tile_score_error(const Eigen::RowVectorXf& query, Index kv_head, Index tile, bool decodes) const {
        const PageLayout& layout = *sequence_.layout;
        const Index subspace = layout.subspace_of(kv_head);
        const TileFormat& format = layout.key_format(subspace);
        const std::byte* const at = sequence_.keys(tile, subspace);
        const Met met = this->met(query, kv_head, tile);
        // A basis of which nothing is kept has no segments.
        if (!format.segments().empty() && format.segments()[0].is_half()) {
            if (!decodes || all_is_read()) return 0.0;
            const Unread unread = unread_half(read_.key_bits);
            const Index dim = cache_.configuration().key_head_dim;
            const double key = keys_.middleCols(kv_head * dim, dim).rowwise().norm().maxCoeff();
            return query.cast<double>().norm() *
                   (key * unread.relative + std::sqrt(static_cast<double>(dim)) * unread.smallest);
        }
        if (format.rule().granularity == Granularity::per_token)
            return decodes ? token_grid_error(met, format, at, sequence_[tile]) : 0.0;
        double worst = 0.0;
        const Index groups = tile_tokens / format.rule().group;
        for (Index g = 0; g < groups; ++g) {
            double magnitudes = met.offset, error = 0.0;
            for (const TileFormat::Placed& s : format.segments()) {
                if (s.bits == 0 || s.bits == 16) continue;
                const auto* const step =
                    reinterpret_cast<const Eigen::half*>(at + s.step_at) + g * s.channels;
                const auto* const lower =
                    reinterpret_cast<const Eigen::half*>(at + s.lower_at) + g * s.channels;
                const double unread = all_is_read() ? 0.0 : unread_steps(s, read_.key_bits);
                double largest = 0.0;
                for (Index i = 0; i < s.channels; ++i) {
                    const Index channel = s.first_channel + i;
                    const double width = std::abs(static_cast<double>(step[i])),
                                 factor = std::abs(static_cast<double>(met.query(0, channel))) * width;
                    largest = std::max(largest, factor);
                    error += factor * unread;
                    const double reach =
                        std::ldexp(width, s.bits) +
                        (has_lower(s.scheme) ? std::abs(static_cast<double>(lower[i])) : 0.0);
                    magnitudes += met.magnitudes[channel] * reach;
                }
                if (decodes) error += factors_error(s, s.channels, largest);
            }
            worst = std::max(worst, error + rounding(format.channels() + query.size(), magnitudes));
        }
        return worst;
    }
    /// Of keys with grids by token, which are read in full.
    double token_grid_error(const Met& met, const TileFormat& format, const std::byte* tile,
                            const TilePlace& place) const {
        double worst = 0.0;
        Eigen::half room;
        for (Index t = place.row; t < place.end_row(); ++t) {
            double error = 0.0, magnitudes = 0.0;
            for (const TileFormat::Placed& s : format.segments()) {
                if (s.bits == 0 || s.bits == 16) continue;
                const Index run = std::min(format.rule().group, s.channels);
                for (Index first = 0, g = t; first < s.channels; first += run, g += tile_tokens) {
                    const Index count = std::min(run, s.channels - first), channel = s.first_channel + first;
                    const double width = std::abs(static_cast<double>(*steps_of(s, tile, g, 1, &room))),
                                 lower =
                                     has_lower(s.scheme)
                                         ? std::abs(static_cast<double>(
                                               reinterpret_cast<const Eigen::half*>(tile + s.lower_at)[g]))
                                         : 0.0,
                                 largest = static_cast<double>(
                                     met.query.row(0).segment(channel, count).cwiseAbs().maxCoeff());
                    error += width * factors_error(s, count, largest);
                    magnitudes +=
                        met.magnitudes.segment(channel, count).sum() * (std::ldexp(width, s.bits) + lower);
                }
            }
            worst = std::max(worst, error + rounding(2 * format.channels(), magnitudes));
        }
        return worst;
    }
    /// In norm: of every run of channels the sum over tiles, with weights that are `off` times as large at
    /// most. All weights sum up to 1 at most, however far scores are off, and so the sum is no more than
    /// its largest term would be with all of them.
    double tile_value_error(Index kv_head, double off) const {
        if (sequence_.tiles == 0) return 0.0;
        const TileFormat& format = sequence_.layout->values;
        const TileFormat::Placed& s = format.segments()[0];
        const Index dim = cache_.configuration().value_head_dim;
        if (s.is_half()) {
            const Unread unread = all_is_read() ? Unread{} : unread_half(read_.value_bits);
            return values_.middleCols(kv_head * dim, dim).rowwise().norm().maxCoeff() * unread.relative +
                   std::sqrt(static_cast<double>(dim)) * unread.smallest;
        }
        const double unread = all_is_read() ? 0.0 : unread_steps(s, read_.value_bits);
        const Index run = std::min(format.rule().group, s.channels), runs = (s.channels + run - 1) / run;
        double squares = 0.0;
        for (Index r = 0; r < runs; ++r) {
            double sum = 0.0, most = 0.0, widest = 0.0;
            for (Index t = 0; t < sequence_.tiles; ++t) {
                Eigen::half room[tile_tokens];
                const Eigen::half* const step =
                    steps_of(s, sequence_.values(t, kv_head), r * tile_tokens, tile_tokens, room);
                double largest = 0.0;
                for (Index i = 0; i < sequence_[t].tokens; ++i) {
                    const double width = std::abs(static_cast<double>(step[i]));
                    widest = std::max(widest, width);
                    largest = std::max(largest, weights_[sequence_[t].first + i] * width);
                }
                sum += factors_error(s, tile_tokens, largest);
                most = std::max(most, factors_error(s, tile_tokens, widest));
            }
            const double error = std::min(sum * off, most) + widest * unread;
            squares += error * error * static_cast<double>(std::min(run, s.channels - r * run));
        }
        return std::sqrt(squares);
    }

    static constexpr double infinity = std::numeric_limits<double>::infinity();

    const KvCache& cache_;
    TileSequence sequence_;
    MatrixD keys_, values_;
    ReadPolicy read_;
    Eigen::VectorXd weights_;
};

}  // namespace kvplane_test
