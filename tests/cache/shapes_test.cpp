// Caches of many shapes: heads, head_dims, tokens at every border, query tokens and recipes, drawn by a seed.
//
// Attention is compared with double precision over what is stored, within T14. KVPLANE_TEST_SEED draws
// others, KVPLANE_TEST_ROUNDS=N draws N of them for each recipe instead of 8, and larger ones: a second or so
// each.
#include <gtest/gtest.h>

#include <cstdlib>
#include <numeric>
#include <sstream>

#include "cache_support.hpp"
#include "kvplane/cache/decode.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/theory/bounds.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;
using Random = std::mt19937_64;

/// 0: not said.
int chosen_rounds() {
    const char* const chosen = std::getenv("KVPLANE_TEST_ROUNDS");
    return chosen ? std::atoi(chosen) : 0;
}

struct Case {
    std::string recipe;
    Index kv_heads, group, key_dim, value_dim, tokens, query_tokens;
    int variant;  ///< of attention: 0 plain, 1 softcap, 2 sliding window, 3 ALiBi
    std::uint64_t seed;

    CacheConfiguration configuration() const {
        CacheConfiguration made =
            kvplane_test::configuration(recipe, kv_heads, kv_heads * group, key_dim, value_dim);
        // An odd number of channels has no RoPE; half of the time it is asked for and refused (by latents
        // alone).
        if (key_dim % 2 == 1 && variant % 2 == 0) made.rope.reset();
        return made;
    }
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << c.recipe << ": " << c.kv_heads << " key heads of " << c.group << " query heads, head_dim "
               << c.key_dim << " of keys and " << c.value_dim << " of values, " << c.tokens << " tokens, "
               << c.query_tokens << " query tokens, variant " << c.variant << ", inputs of seed " << c.seed;
}

Index one_of(std::initializer_list<Index> choices, Random& random) {
    return choices.begin()[random() % choices.size()];
}

/// Around the end of the sinks, of tiles, and of recent tokens.
Index border(const CacheRecipe& recipe, Random& random) {
    const Index sinks = one_of({0, recipe.sink_tokens}, random),
                recent = one_of({0, recipe.recent_tokens}, random),
                tiles = one_of({0, 1, 1, 2, 2, 3}, random), off = one_of({-1, 0, 1}, random);
    return std::max<Index>(1, sinks + tile_tokens * tiles + recent + off);
}

/// Multiplications of the reference and of fitting a basis, roughly: what a case takes.
double cost(const Case& c) {
    const CacheRecipe recipe = recipes::parse(c.recipe);
    const auto heads = static_cast<double>(c.kv_heads), tokens = static_cast<double>(c.tokens),
               dims = static_cast<double>(c.key_dim + c.value_dim),
               rows = heads * static_cast<double>(c.group * c.query_tokens);
    double sum = rows * tokens * dims + 100.0 * heads * tokens * dims;
    if (recipe.latents) {
        const double channels =
                         static_cast<double>(c.key_dim) * (recipe.latents->own_heads_together ? heads : 1.0),
                     subspaces = recipe.latents->own_heads_together ? 1.0 : heads;
        sum += 50.0 * subspaces * channels * channels * channels + 4.0 * rows * dims * dims * 8.0;
    }
    return sum;
}

Case draw(const std::string& recipe, Random& random) {
    for (;;) {
        Case c{.recipe = recipe,
               .kv_heads = one_of({1, 2, 3, 8}, random),
               .group = one_of({1, 3, 4, 6, 7, 9, 16, 24}, random),
               .key_dim = one_of({1, 31, 64, 72, 80, 96, 112, 128, 160, 256, 512, 576}, random),
               .value_dim = one_of({1, 31, 64, 72, 80, 96, 112, 128, 160, 256, 512, 576}, random),
               .tokens = border(recipes::parse(recipe), random),
               .query_tokens = 1 + static_cast<Index>(random() % 9),
               .variant = static_cast<int>(random() % 4),
               .seed = random()};
        c.query_tokens = std::min(c.query_tokens, c.tokens);
        if (cost(c) < (chosen_rounds() > 0 ? 1e9 : 4e7)) return c;
    }
}

// -- The reference and its bounds ---------------------------------------------------------------------------

/// fp32 sums of n terms whose errors are independent: four deviations of sqrt(n) units of 2^-24 of the sum of
/// magnitudes.
double rounding(Index terms, double magnitudes) {
    return std::sqrt(static_cast<double>(terms) + 16.0) * 0x1p-22 * magnitudes;
}

/// What one query row does with one cache, in double precision; and how far a read of packed bits may be off.
class RowReference {
  public:
    RowReference(const KvCache& cache, const MatrixD& keys, const MatrixD& values)
        : cache_(cache), keys_(keys), values_(values), sequence_(cache.state().sequence()) {}

    /// query: [key dim] of one query head. `decodes`: whether packed bits are read as they are.
    void compute(const Eigen::RowVectorXf& query, Index head, Index token, Index query_tokens,
                 const AttentionParameters& parameters, bool decodes) {
        const CacheConfiguration& c = cache_.configuration();
        const Index kv_head = head / c.group(), position = cache_.tokens() - query_tokens + token;
        const detail::ScoreRule<double> rule(parameters, head, query_tokens, c.key_head_dim);
        const auto k = keys_.middleCols(kv_head * c.key_head_dim, c.key_head_dim),
                   v = values_.middleCols(kv_head * c.value_head_dim, c.value_head_dim);
        Eigen::VectorXd scores = k * query.cast<double>().transpose();
        for (Index t = 0; t < scores.size(); ++t) scores[t] = rule(scores[t], token, position, t);
        weights_ = (scores.array() - scores.maxCoeff()).exp().matrix();
        weights_ /= weights_.sum();
        output = weights_.transpose() * v;

        // Scores: T14 in tiles, fp32 everywhere. softcap and what is added to a score take off their errors.
        double score_error =
            rounding(c.key_head_dim, query.cast<double>().norm() * k.rowwise().norm().maxCoeff());
        for (Index t = 0; t < sequence_.tiles; ++t)
            score_error = std::max(score_error, tile_score_error(query, kv_head, t, decodes));
        score_error *= rule.scale();
        // Values: T14 by channel, in the frame in which they are stored; a weight is off by e^(2
        // score_error).
        const double largest = v.cwiseAbs().maxCoeff() * std::sqrt(static_cast<double>(c.value_head_dim));
        const double value_error = (decodes ? tile_value_error(kv_head) * std::exp(2.0 * score_error) : 0.0) +
                                   rounding(cache_.tokens(), 2.0 * largest);
        const Eigen::RowVectorXd centre = 0.5 * (v.colwise().maxCoeff() + v.colwise().minCoeff());
        bound = theory::output_error_bound(score_error, (v.rowwise() - centre).rowwise().norm().maxCoeff(),
                                           value_error);
        fp32 = 2.0 * rounding(cache_.tokens() + c.key_head_dim, 2.0 * largest);
    }

    Eigen::RowVectorXd output;
    double bound = 0.0;  ///< of |o - o'|_2
    double fp32 = 0.0;   ///< how far two instruction sets may be apart, but for rounded factors

  private:
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
        } else if (cache_.configuration().recipe.keys.rotate) {
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
        double worst = 0.0;
        const bool by_channel = format.rule().granularity == Granularity::per_channel;
        const Index groups = by_channel ? tile_tokens / format.rule().group : 1;
        for (Index g = 0; g < groups; ++g) {
            double magnitudes = met.offset, error = 0.0;
            for (const TileFormat::Placed& s : format.segments()) {
                if (s.bits == 0 || s.bits == 16 || !by_channel) continue;
                const auto* const step =
                    reinterpret_cast<const Eigen::half*>(at + s.step_at) + g * s.channels;
                const auto* const lower =
                    reinterpret_cast<const Eigen::half*>(at + s.lower_at) + g * s.channels;
                double largest = 0.0;
                for (Index i = 0; i < s.channels; ++i) {
                    const Index channel = s.first_channel + i;
                    const double width = static_cast<double>(step[i]);
                    largest = std::max(largest, std::abs(static_cast<double>(met.query(0, channel))) * width);
                    const double reach =
                        std::ldexp(width, s.bits) +
                        (s.scheme == Scheme::symmetric ? 0.0 : std::abs(static_cast<double>(lower[i])));
                    magnitudes += met.magnitudes[channel] * reach;
                }
                if (decodes)
                    error += theory::rounded_factors_error(s.bits, s.split.shift(0), s.channels, largest);
            }
            worst = std::max(worst, error + rounding(format.channels() + query.size(), magnitudes));
        }
        return worst;
    }
    /// In norm: of every run of channels the sum over tiles.
    double tile_value_error(Index kv_head) const {
        if (sequence_.tiles == 0) return 0.0;
        const TileFormat& format = sequence_.layout->values;
        const TileFormat::Placed& s = format.segments()[0];
        if (s.bits == 16) return 0.0;
        const Index run = std::min(format.rule().group, s.channels), runs = (s.channels + run - 1) / run;
        double squares = 0.0;
        for (Index r = 0; r < runs; ++r) {
            double sum = 0.0;
            for (Index t = 0; t < sequence_.tiles; ++t) {
                const auto* const step =
                    reinterpret_cast<const Eigen::half*>(sequence_.values(t, kv_head) + s.step_at) +
                    r * tile_tokens;
                double largest = 0.0;
                for (Index i = 0; i < sequence_[t].tokens; ++i)
                    largest =
                        std::max(largest, weights_[sequence_[t].first + i] * static_cast<double>(step[i]));
                sum += theory::rounded_factors_error(s.bits, s.split.shift(0), tile_tokens, largest);
            }
            squares += sum * sum * static_cast<double>(std::min(run, s.channels - r * run));
        }
        return std::sqrt(squares);
    }

    const KvCache& cache_;
    const MatrixD &keys_, &values_;
    TileSequence sequence_;
    Eigen::VectorXd weights_;
};

// -- The sweep ----------------------------------------------------------------------------------------------

/// What a recipe with latents refuses of a shape: groups that do not divide it, half a pair of RoPE.
bool refused(const Case& c, TilePool& pool) {
    const CacheConfiguration configuration = c.configuration();
    const auto& latents = configuration.recipe.latents;
    if (!latents) return false;
    const Index channels = c.key_dim * (latents->own_heads_together ? c.kv_heads : 1);
    const bool divides =
        latents->groups.empty() || channels % static_cast<Index>(latents->groups.size()) == 0;
    if (divides && (!configuration.rope || c.key_dim % 2 == 0)) return false;
    EXPECT_NE(
        refusal(divides ? ErrorCode::option : ErrorCode::shape, [&] { KvCache cache(configuration, pool); }),
        "");
    return true;
}
/// A basis cannot be fitted to fewer than two tokens, nor to fewer than it has latents; nothing then changes.
void expect_fit_or_refusal(const KvCache& cache) {
    if (!cache.configuration().fits_basis() || cache.latent_keys()) return;
    KvCache fork = cache.fork();
    const Index waiting = cache.tokens() - std::min(cache.tokens(), cache.configuration().recipe.sink_tokens);
    const std::vector<std::byte> before = to_bytes(cache);
    try {
        fork.fit_basis();
        EXPECT_GE(waiting, 2);
        EXPECT_NE(fork.latent_keys(), nullptr);
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::shape) << error.what();
        EXPECT_EQ(to_bytes(fork), before);
    }
}

AttentionParameters parameters_of(const Case& c, const std::vector<float>& slopes) {
    AttentionParameters parameters;
    if (c.variant == 1) parameters.softcap = 3.0;
    if (c.variant == 2) parameters.sliding_window = 1 + c.tokens / 2, parameters.sinks = 2;
    if (c.variant == 3) parameters.alibi_slopes = slopes;
    return parameters;
}

void check(const Case& c) {
    TilePool pool;
    if (refused(c, pool)) return;
    const CacheConfiguration configuration = c.configuration();
    Random random(c.seed);
    Matrix keys = normal_matrix(random, c.tokens, c.kv_heads * c.key_dim, 2.0f);
    keys.col(keys.cols() / 2) *= 8.0f;
    const Matrix values = normal_matrix(random, c.tokens, c.kv_heads * c.value_dim),
                 queries = normal_matrix(random, c.query_tokens, configuration.query_heads * c.key_dim);
    const std::vector<float> slopes(static_cast<std::size_t>(configuration.query_heads), 0.01f);
    const AttentionParameters parameters = parameters_of(c, slopes);
    const Index first_part = static_cast<Index>(random() % static_cast<std::uint64_t>(c.tokens + 1));

    std::vector<std::byte> bytes;
    std::vector<Matrix> outputs;
    bool decodes = false;  // whether packed bits are read as they are
    MatrixD exact(c.query_tokens, configuration.query_heads * c.value_dim),
        bounds(c.query_tokens, configuration.query_heads), fp32 = bounds;
    for_each_isa([&](Isa) {
        KvCache cache(configuration, pool);
        kvplane_test::append(cache, keys.topRows(first_part), values.topRows(first_part));
        kvplane_test::append(cache, keys.bottomRows(c.tokens - first_part),
                             values.bottomRows(c.tokens - first_part));
        const bool first = bytes.empty();
        if (first) {
            bytes = to_bytes(cache);
            expect_fit_or_refusal(cache);
            const MatrixD k = cache.stored_keys(0, c.tokens).cast<double>(),
                          v = cache.stored_values(0, c.tokens).cast<double>();
            decodes = c.query_tokens <= detail::decode_query_tokens && cache.packed_tokens() > 0 &&
                      detail::decodes(*cache.state().layout, cache.latent_keys());
            RowReference reference(cache, k, v);
            for (Index head = 0; head < configuration.query_heads; ++head)
                for (Index i = 0; i < c.query_tokens; ++i) {
                    reference.compute(queries.row(i).segment(head * c.key_dim, c.key_dim), head, i,
                                      c.query_tokens, parameters, decodes);
                    exact.row(i).segment(head * c.value_dim, c.value_dim) = reference.output;
                    bounds(i, head) = reference.bound;
                    fp32(i, head) = reference.fp32;
                }
        } else {
            EXPECT_EQ(to_bytes(cache), bytes) << "bytes differ between instruction sets";
        }
        outputs.push_back(attend(cache, queries, parameters));
        for (Index head = 0; head < configuration.query_heads; ++head)
            for (Index i = 0; i < c.query_tokens; ++i) {
                const auto part = [&](const auto& m) {
                    return m.row(i).segment(head * c.value_dim, c.value_dim).template cast<double>().eval();
                };
                const double off = (part(outputs.back()) - part(exact)).norm();
                ASSERT_LE(off, bounds(i, head)) << "query head " << head << ", token " << i;
                // A factor that lies within fp32 rounding of two int8 may become either: one unit, of which
                // T14 counts half of one for each of 31 factors or more. Two of them are more than happen.
                const double apart = (part(outputs.back()) - part(outputs[0])).norm();
                ASSERT_LE(apart, fp32(i, head) + (decodes ? bounds(i, head) * 4.0 / 31.0 : 0.0))
                    << "query head " << head << ", token " << i << ", from the first instruction set";
            }
    });
}

class Shapes : public testing::TestWithParam<std::string> {};

TEST_P(Shapes, AttendWithinT14OnAllInstructionSets) {
    const std::string& recipe = GetParam();
    Random random(std::accumulate(recipe.begin(), recipe.end(), seed(), [](std::uint64_t sum, char c) {
        return 31 * sum + static_cast<std::uint64_t>(c);
    }));
    const int rounds = chosen_rounds() > 0 ? chosen_rounds() : 8;
    for (int round = 0; round < rounds && !HasFailure(); ++round) {
        const Case c = draw(recipe, random);
        std::ostringstream described;
        described << "round " << round << ", " << c;
        SCOPED_TRACE(described.str());
        check(c);
    }
}

INSTANTIATE_TEST_SUITE_P(Recipes, Shapes, testing::ValuesIn(recipe_names()), test_name);

}  // namespace
