// Reads that are decided tile by tile, on the host: what emulated warps read of caches, and how far that is
// from reading everything.
#include "kvplane/cuda/aligned_math.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cuda/aligned_cases.hpp"
#include "cuda/host_warp.hpp"
#include "kvplane/attention/reference.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cuda/layer_view.hpp"
#include "kvplane/read/exponents.hpp"
#include "kvplane/recipe_names.hpp"
#include "kvplane/recipes.hpp"
#include "kvplane/storage/tile_coder.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane::cuda;
using kvplane_test::Random;

/// Rows of queries as a block keeps them, for one key head.
struct QueryRows {
    QueryRows(const Matrix& rows, bool paired)
        : channels(rows.cols()), lines(static_cast<std::size_t>(8 * (channels + 4) + 15) / 16) {
        for (Index r = 0; r < 8; ++r) {
            // Of paired rows 4 to 7 are rows 0 to 3 once more.
            const Index of = paired ? r % 4 : r;
            for (Index c = 0; c < channels; ++c) at(r)[c] = of < rows.rows() ? rows(of, c) : 0.0f;
        }
    }
    float* at(Index row) { return reinterpret_cast<float*>(lines.data()) + row * (channels + 4); }
    QueryRowsView view() {
        return {reinterpret_cast<const std::byte*>(lines.data()),
                static_cast<std::uint32_t>(channels + 4) * 4};
    }
    struct alignas(64) Line {
        float at[16];
    };
    Index channels;
    std::vector<Line> lines;
};

struct Attended {
    Matrix output;             ///< rotated as values are stored
    std::vector<float> bound;  ///< [query head]
    ReadCounts counts{};
};

/// Attention of the last token of a cache as a block of `warps` warps does it for every key head. The values
/// of a tile are added when the next tile has been decided on.
template <class Math>
Attended attend(const KvCache& cache, const Matrix& queries, const AttentionParameters& parameters,
                int warps) {
    using Warp = HostWarp;
    using Float = Warp::Float;
    const CacheConfiguration& c = cache.configuration();
    const AttendLayer of_layer = attend_layer(cache.shape());
    const LayerView& layer = of_layer.view;
    const PlanePrefixes& views = of_layer.prefixes;
    const AlignedRule rule = aligned_rule(parameters.read, views, c.key_head_dim, c.value_head_dim);
    const auto& held = cache.state();
    const Index group = c.group(), position = cache.tokens() - 1;
    Attended result;
    result.output = Matrix::Zero(1, c.query_heads * c.value_head_dim);
    result.bound.resize(static_cast<std::size_t>(c.query_heads));
    for (Index head = 0; head < c.kv_heads; ++head) {
        Matrix plain(group, c.key_head_dim);
        for (Index r = 0; r < group; ++r)
            plain.row(r) = queries.row(0).segment((head * group + r) * c.key_head_dim, c.key_head_dim) *
                           (log2_e / std::sqrt(static_cast<float>(c.key_head_dim)));
        Matrix rotated = plain;
        cache.shape().rotation(TileSide::keys).rotate(rotated);
        QueryRows as_given(plain, Math::shares_rows), turned(rotated, Math::shares_rows);
        const QueryRowsView of_loose = (layer.rotates_keys == Rotation::all ? turned : as_given).view();
        ScoreRules<Warp> rules{};
        rules.position = Warp::Int(position);
        rules.slope = rules.softcap = Float(0.0f);
        rules.window = static_cast<std::int32_t>(parameters.sliding_window);
        rules.window_sinks = static_cast<std::int32_t>(parameters.sinks);
        rules.causal = true;
        const auto counts = Math::row() < static_cast<std::uint32_t>(group);

        struct Loose {
            TokenRow<Warp> keys, values;
            Index position;
        };
        std::vector<Loose> loose;
        const auto add = [&](const OutsideView& view, const std::byte* page, int row, Index at) {
            loose.push_back({token_row<Warp>(view.keys, page, static_cast<int>(head), row),
                             token_row<Warp>(view.values, page, static_cast<int>(head), row), at});
        };
        for (Index t = 0; t < held.sink_count(c.recipe); ++t)
            add(layer.sinks, held.sinks.data(), static_cast<int>(t), t);
        for (Index t = held.recent_first; !held.recent.empty() && t < cache.tokens(); ++t)
            add(layer.recent, held.recent[static_cast<std::size_t>((t - held.recent_first) / 32)].data(),
                static_cast<int>((t - held.recent_first) % 32), t);
        const auto score_of = [&](const Loose& token) {
            const TokenRow<Warp> rows[1] = {token.keys};
            Float score[1];
            Math::score_rows(of_loose, rows, static_cast<int>(c.key_head_dim), score);
            return Math::ruled(rules, score[0], Warp::Int(token.position), Warp::Flag(true));
        };
        const std::size_t seeds = std::min(loose.size(), static_cast<std::size_t>(4 * warps));
        Float largest_seed(Math::masked), sum_of_seeds(0.0f);
        std::vector<Float> seed_scores;
        for (std::size_t i = 0; i < seeds; ++i) {
            const bool sink = i < static_cast<std::size_t>(held.sink_count(c.recipe));
            seed_scores.push_back(score_of(loose[sink ? i : loose.size() - seeds + i]));
            largest_seed = Warp::maximum(largest_seed, seed_scores.back());
        }
        for (const Float& score : seed_scores)
            sum_of_seeds = sum_of_seeds +
                           Warp::select(score > Math::masked, Warp::exp2(score - largest_seed), Float(0.0f));

        const auto queries_of = [&](const TilePlace& tile) {
            const bool is_turned =
                layer.rotates_keys == Rotation::all ||
                (layer.rotates_keys == Rotation::by_tile && tile.layout->rotated(tile.page, head));
            return (is_turned ? turned : as_given).view();
        };
        // Lines of 16 bytes, as factors are stored.
        struct alignas(16) Line {
            std::byte at[16];
        };
        std::vector<Line> factors(8 * layer.keys.factor_stride() / sizeof(Line));
        const auto memory = reinterpret_cast<std::byte*>(factors.data());
        const auto score = [&](const TilePlace& tile, int planes, typename Math::Scores& to) {
            const std::byte* const keys = tile.page + head * layer.head_stride;
            if (planes == rule.first_planes)
                Math::score_first(queries_of(tile), keys, views, planes, memory, to);
            else
                Math::score(queries_of(tile), keys, views.keys[planes - 1], planes == views.key_planes,
                            memory, to);
            Math::apply(rules,
                        {static_cast<std::int32_t>(tile.origin()), static_cast<std::int32_t>(tile.row),
                         static_cast<std::int32_t>(tile.end_row())},
                        to);
        };
        const auto reach_of = [&](const TilePlace& tile) {
            return Math::key_reach(queries_of(tile), tile.page + head * layer.head_stride,
                                   views.keys[rule.first_planes - 1]) *
                   rule.reach;
        };
        // Without such tokens the first tile and the last tell what is seen first.
        const auto is_seed = [&](std::size_t tile) {
            return loose.empty() && (tile == 0 || tile + 1 == held.tiles.size());
        };
        for (std::size_t t = 0; t < held.tiles.size(); ++t) {
            if (!is_seed(t)) continue;
            typename Math::Scores scores;
            score(held.tiles[t], rule.first_planes, scores);
            Float sum;
            const Float largest = Math::relative(scores, sum),
                        known = Math::seed_sum(largest, Math::row_sum(sum), reach_of(held.tiles[t])),
                        most = Warp::maximum(largest, largest_seed);
            sum_of_seeds =
                sum_of_seeds * Warp::exp2(largest_seed - most) + known * Warp::exp2(largest - most);
            largest_seed = most;
        }

        std::vector<typename Math::State> states;
        std::vector<Float> errors;
        for (int w = 0; w < warps; ++w) {
            typename Math::State state;
            Math::begin(state);
            auto tiles_left =
                static_cast<std::int32_t>((held.tiles.size() + static_cast<std::size_t>(warps - 1 - w)) /
                                          static_cast<std::size_t>(warps));
            typename Math::Tally tally;
            Math::start(rule, largest_seed, sum_of_seeds / static_cast<float>(warps), tiles_left, tally);
            Math::raise(largest_seed, state);
            for (std::size_t i = static_cast<std::size_t>(w); i < loose.size();
                 i += static_cast<std::size_t>(warps)) {
                const Float score = score_of(loose[i]);
                Math::add_rows(&loose[i].values, &score, 1, static_cast<int>(c.value_head_dim), state);
            }
            struct Kept {
                typename Math::Scores weights;
                TilePlanes planes;
                Float largest;
                const TilePlace* tile = nullptr;
            } kept;
            const auto finish_kept = [&] {
                if (!kept.tile) return;
                const TilePlace& tile = *std::exchange(kept.tile, nullptr);
                Float factor;
                if (kept.planes.keys > rule.first_planes) {
                    score(tile, kept.planes.keys, kept.weights);
                    Float sum;
                    const Float largest = Math::relative(kept.weights, sum);
                    factor = Math::enter(largest, sum, state);
                    Math::learn(largest, Math::row_sum(sum),
                                is_seed(static_cast<std::size_t>(&tile - held.tiles.data())), tally);
                } else {
                    factor = Math::factor_of(kept.largest, state);
                }
                if (kept.planes.values > 0)
                    Math::add_values(tile.page + head * layer.head_stride + layer.value_offset, views,
                                     kept.planes.values, kept.weights, factor, state);
            };
            for (std::size_t t = static_cast<std::size_t>(w); t < held.tiles.size();
                 t += static_cast<std::size_t>(warps)) {
                const TilePlace& tile = held.tiles[t];
                typename Math::Scores weights;
                score(tile, rule.first_planes, weights);
                Float sum;
                const Float largest = Math::relative(weights, sum);
                const Float reach = reach_of(tile);
                const TilePlanes planes = Math::choose(rule, largest, Math::row_sum(sum), reach, counts,
                                                       is_seed(t), --tiles_left, tally);
                ++result.counts.keys[planes.keys];
                ++result.counts.values[planes.values];
                finish_kept();
                if (planes.keys == rule.first_planes) Math::enter(largest, sum, state);
                std::memcpy(&kept.weights, &weights, sizeof weights);
                kept.planes = planes;
                kept.largest = largest;
                kept.tile = &tile;
            }
            finish_kept();
            Math::finish(state);
            errors.push_back(Math::error(tally, state));
            states.push_back(state);
        }
        for (Index r = 0; r < group; ++r) {
            const int lane = static_cast<int>(4 * r);
            float largest = -1e30f, sum = 0.0f, error = 0.0f;
            for (const auto& s : states) largest = std::max(largest, s.softmax.largest[lane]);
            const auto share = [&](const auto& s) { return std::exp2(s.softmax.largest[lane] - largest); };
            for (std::size_t w = 0; w < states.size(); ++w) {
                sum += share(states[w]) * states[w].softmax.sum[lane];
                error += share(states[w]) * errors[w][lane];
            }
            const float part = error / sum;
            result.bound[static_cast<std::size_t>(head * group + r)] =
                part < 1.0f ? part / (1.0f - 0.5f * part) : 2.0f;
            for (const auto& s : states)
                for (Index channel = 0; channel < c.value_head_dim; ++channel) {
                    const int in_block = static_cast<int>(channel % 32);
                    result.output(0, (head * group + r) * c.value_head_dim + channel) +=
                        share(s) * s.out[channel / 32][in_block % 4][in_block % 8 / 4][lane + in_block / 8] /
                        sum;
                }
        }
    }
    if (layer.rotates_values)
        for (Index h = 0; h < c.query_heads; ++h) {
            Matrix one = result.output.middleCols(h * c.value_head_dim, c.value_head_dim);
            cache.shape().rotation(TileSide::values).rotate_back(one);
            result.output.middleCols(h * c.value_head_dim, c.value_head_dim) = one;
        }
    return result;
}

/// A cache of `tokens` tokens whose keys make the scores of random queries differ by a few units, and those
/// of the first token, and of one in so many tiles, as much larger as `peak` says. Queries: one token, whose
/// heads are alike.
struct Given {
    Given(const char* recipe, Index tokens, double hot, float peak, std::uint64_t seed, float spread = 1.0f)
        : random(seed),
          cache({.kv_heads = 2,
                 .query_heads = 6,
                 .key_head_dim = 128,
                 .value_head_dim = 128,
                 .recipe = recipes::parse(recipe),
                 .rotation_seed = 5},
                pool) {
        queries = kvplane_test::normal_matrix(1, 6 * 128, random);
        for (Index h = 0; h < 6; ++h)
            queries.middleCols(h * 128, 128) =
                queries.middleCols(h / 3 * 384, 128) + 0.1f * kvplane_test::normal_matrix(1, 128, random);
        Matrix keys = spread * kvplane_test::normal_matrix(tokens, 256, random);
        Matrix of_heads(1, 256);
        of_heads << queries.middleCols(0, 128), queries.middleCols(384, 128);
        kvplane_test::add_peaks(keys, of_heads, 2, hot, peak, random);
        cache.append(keys, kvplane_test::normal_matrix(tokens, 256, random));
    }
    MatrixD exact() const {
        return reference_attention(cache.stored_keys(0, cache.tokens()),
                                   cache.stored_values(0, cache.tokens()), queries, 6, 2, {});
    }
    /// |o - o'|_2 of every head over the largest norm of a value.
    std::vector<double> errors(const Matrix& output) const {
        const MatrixD difference = output.cast<double>() - exact();
        const double norms[2] = {kvplane_test::largest_norm(cache, 0), kvplane_test::largest_norm(cache, 1)};
        std::vector<double> all;
        for (Index h = 0; h < 6; ++h)
            all.push_back(difference.middleCols(h * 128, 128).norm() / norms[h / 3]);
        return all;
    }
    Random random;
    TilePool pool;
    KvCache cache;
    Matrix queries;
};

using Codes = AlignedMath<HostWarp, 8, 128, 8, 128, true>;
using Halves = AlignedMath<HostWarp, 16, 128, 16, 128, true>;
using General = AlignedMath<HostWarp, 0, 256, 0, 128>;

double share_of(const unsigned long long (&counts)[4], int planes) {
    const auto all = static_cast<double>(counts[0] + counts[1] + counts[2] + counts[3]);
    return static_cast<double>(counts[planes]) / all;
}

/// What is left out of tiles without weight is within the tolerance, and the certificate holds.
template <class Math>
void expect_tolerance(const char* recipe, double hot, float peak, double error, double least_cold,
                      double most_cold) {
    const Given given(recipe, 5000, hot, peak, kvplane_test::seed());
    const Attended found =
        attend<Math>(given.cache, given.queries, {.read = ReadPolicy::tolerance(error)}, 3);
    const std::vector<double> errors = given.errors(found.output);
    for (std::size_t h = 0; h < errors.size(); ++h) {
        EXPECT_LE(static_cast<double>(found.bound[h]), error * (1.0 + 1e-5)) << recipe << " head " << h;
        // Beyond what is left out: the rounding of factors.
        EXPECT_LE(errors[h], static_cast<double>(found.bound[h]) + 2e-4) << recipe << " head " << h;
    }
    EXPECT_GE(share_of(found.counts.keys, 1), least_cold) << recipe << " " << hot;
    EXPECT_LE(share_of(found.counts.keys, 1), most_cold) << recipe << " " << hot;
}

TEST(AlignedMath, TolerancesAreKept) {
    for (const double error : {0.01, 0.1}) {
        if (kvplane_test::sanitized && error != 0.1) continue;
        expect_tolerance<Codes>("key_favored:8:8", 0.1, 25.0f, error, 0.6, 0.97);
        expect_tolerance<Halves>("fp16", 0.1, 25.0f, error, 0.6, 0.97);
        expect_tolerance<General>("standard", 0.1, 25.0f, error, 0.6, 0.97);
        // Everything alike: all of it counts.
        expect_tolerance<Codes>("key_favored:8:8", 0.0, 0.0f, error, 0.0, 0.0);
    }
    // Tiles of some weight, of which some is left out too.
    for (const float peak : {9.0f, 15.0f})
        for (const double error : {0.02, 0.3, 1.0}) {
            if (kvplane_test::sanitized && (error != 0.3 || peak != 15.0f)) continue;
            expect_tolerance<Codes>("key_favored:8:8", 0.2, peak, error, 0.0, 0.97);
            expect_tolerance<General>("key_favored:4:4", 0.2, peak, error, 1.0, 1.0);
        }
    expect_tolerance<Halves>("fp16", 0.2, 15.0f, 0.3, 0.3, 0.97);
    expect_tolerance<General>("key_favored:8:8", 0.2, 15.0f, 0.3, 0.3, 0.97);
    expect_tolerance<General>("kivi:8:64", 0.3, 25.0f, 0.03, 0.3, 0.97);
    expect_tolerance<Halves>("fp16", 1.0, 25.0f, 0.03, 0.0, 0.4);
    // A tolerance of nothing reads everything.
    expect_tolerance<Codes>("key_favored:8:8", 0.1, 25.0f, 0.0, 0.0, 0.0);
}

/// Of keys that are exact only values are left out, all of them or none: what is certified is what they
/// weigh, and reached where they are alike.
TEST(AlignedMath, TheCertificateIsReachedWhereValuesAreAlike) {
    TilePool pool;
    Random random(kvplane_test::seed());
    KvCache cache({.kv_heads = 2,
                   .query_heads = 6,
                   .key_head_dim = 128,
                   .value_head_dim = 128,
                   .recipe = recipes::parse("kivi:4"),
                   .rotation_seed = 5},
                  pool);
    Matrix queries = kvplane_test::normal_matrix(1, 768, random);
    for (Index h = 0; h < 6; ++h) queries.middleCols(h * 128, 128) = queries.middleCols(h / 3 * 384, 128);
    Matrix keys = 0.5f * kvplane_test::normal_matrix(3000, 256, random);
    for (Index head = 0; head < 2; ++head) {
        const auto q = queries.middleCols(head * 384, 128);
        for (const Index token : {0, 1, 2999}) keys.row(token).middleCols(head * 128, 128) = 0.75f * q;
    }
    // Values whose grids can hold no more than they do.
    Matrix values(3000, 256);
    for (Index c = 0; c < 256; ++c) values.col(c).setConstant(c % 2 == 0 ? 1.0f : -1.0f);
    cache.append(keys, values);
    const Attended found = attend<General>(cache, queries, {.read = ReadPolicy::tolerance(0.5)}, 2);
    EXPECT_GE(share_of(found.counts.values, 0), 0.9);
    const MatrixD difference =
        found.output.cast<double>() -
        reference_attention(cache.stored_keys(0, 3000), cache.stored_values(0, 3000), queries, 6, 2, {});
    for (Index h = 0; h < 6; ++h) {
        const double bound = found.bound[static_cast<std::size_t>(h)],
                     error = difference.middleCols(h * 128, 128).norm() / std::sqrt(128.0);
        EXPECT_GT(bound, 0.01);
        EXPECT_LE(error, bound);
        // The bound divides by what is left of the sum without half of its own, for keys.
        EXPECT_GE(error, 0.99 * bound / (1.0 + 0.5 * bound));
    }
}

/// Scores by first planes are off by no more than key_reach() says, and by some part of it where the query
/// looks at the errors of a token: steps of fp16 are those of a channel's largest number.
template <class Math>
void expect_reach(const char* recipe, float reach) {
    const Given given(recipe, 400, 0.0, 0.0f, kvplane_test::seed());
    const PlanePrefixes views = attend_layer(given.cache.shape()).prefixes;
    const AlignedRule rule = aligned_rule(ReadPolicy::tolerance(0.1), views, 128, 128);
    EXPECT_EQ(rule.reach, reach) << recipe;
    const TilePlace& tile = given.cache.state().tiles[0];
    Matrix first(128, 128), all(128, 128);
    kvplane::detail::TileCoder coder(tile.layout->key_format(0));
    coder.decode(tile.page, 128, views.key_bits[1], first.data(), 128);
    coder.decode(tile.page, 128, 16, all.data(), 128);
    Matrix queries = kvplane_test::normal_matrix(4, 128, const_cast<Given&>(given).random);
    queries.row(0) = (all.row(5) - first.row(5)).cwiseSign().cwiseProduct(queries.row(0).cwiseAbs());
    QueryRows rows(queries, true);
    const auto found = Math::key_reach(rows.view(), tile.page, views.keys[0]);
    for (Index r = 0; r < 4; ++r) {
        const float off = ((all - first) * queries.row(r).transpose()).cwiseAbs().maxCoeff(),
                    bound = rule.reach * found[static_cast<int>(4 * r)];
        EXPECT_LE(off, bound) << recipe;
        if (r == 0) {
            EXPECT_GE(off, (views.key_planes == 3 ? 0.1f : 0.4f) * bound) << recipe;
        }
        for (int lane = 0; lane < 4; ++lane)
            EXPECT_EQ(found[static_cast<int>(4 * r) + lane], found[static_cast<int>(4 * r)]);
    }
}
TEST(AlignedMath, WhatScoresAreOffByIsBounded) {
    expect_reach<Codes>("key_favored:8:8", 7.5f);
    expect_reach<General>("key_favored:8:8", 7.5f);
    expect_reach<General>("kivi:8:32", 7.5f);
    expect_reach<General>("standard", 0.5f);
    expect_reach<Halves>("fp16", 128.0f);
    expect_reach<General>("fp16", 128.0f);
}

/// Tiles are read as the CPU's rule says of their largest weight's exponent.
TEST(AlignedMath, ExponentsAreThoseOfTheHost) {
    const auto prefixes = [](const char* recipe) {
        return attend_layer(kvplane::detail::CacheShape({.kv_heads = 1,
                                                         .query_heads = 3,
                                                         .key_head_dim = 128,
                                                         .value_head_dim = 128,
                                                         .recipe = recipes::parse(recipe)}))
            .prefixes;
    };
    using Float = HostWarp::Float;
    const auto counts = Halves::row() < 3u;
    for (const AlignmentThresholds& thresholds :
         {AlignmentThresholds::accurate(), AlignmentThresholds::supported(),
          AlignmentThresholds::published()}) {
        const AlignedRule rule = aligned_rule(ReadPolicy::exponents(thresholds), prefixes("fp16"), 128, 128);
        for (int quarter = 0; quarter < 80; ++quarter) {
            const float drop = 0.25f * static_cast<float>(quarter);
            Halves::Tally tally;
            Halves::start(rule, Float(-3.0f), Float(1.0f), 10, tally);
            // The row that wants most decides; rows that do not count say nothing.
            Float largest(-3.0f - drop);
            for (int lane = 0; lane < 32; ++lane) {
                if (lane / 4 % 4 == 1) largest[lane] -= 7.0f;
                if (lane / 4 % 4 == 3) largest[lane] = 50.0f;
            }
            const TilePlanes planes =
                Halves::choose(rule, largest, Float(1.0f), Float(0.0f), counts, false, 9, tally);
            const int expected =
                kvplane::detail::aligned_planes(static_cast<int>(std::ceil(drop)), thresholds);
            EXPECT_EQ(planes.values, expected) << drop;
            EXPECT_EQ(planes.keys, std::max(expected, 1)) << drop;
        }
    }
    // What has grids is read whole.
    const AlignedRule rule = aligned_rule(ReadPolicy::exponents(), prefixes("key_favored:8:8"), 128, 128);
    Codes::Tally tally;
    Codes::start(rule, Float(0.0f), Float(1.0f), 10, tally);
    const TilePlanes planes =
        Codes::choose(rule, Float(-90.0f), Float(1.0f), Float(0.0f), counts, false, 9, tally);
    EXPECT_EQ(rule.first_planes, 2);
    EXPECT_EQ(planes.keys, 2);
    EXPECT_EQ(planes.values, 2);
}

TEST(AlignedMath, ExponentsReadLessAndErrLittle) {
    const auto report = [](const char* recipe, double hot, float peak, const AlignmentThresholds& thresholds,
                           double& error) {
        const Given given(recipe, 5000, hot, peak, kvplane_test::seed());
        const Attended found =
            attend<Halves>(given.cache, given.queries, {.read = ReadPolicy::exponents(thresholds)}, 3);
        const std::vector<double> errors = given.errors(found.output);
        error = *std::max_element(errors.begin(), errors.end());
        return read_report(attend_layer(given.cache.shape()).prefixes, 128, 128, found.counts);
    };
    double error = 0.0;
    const ReadReport some = report("fp16", 0.1, 18.0f, AlignmentThresholds::accurate(), error);
    EXPECT_LE(some.mean_bits, 10.0);
    EXPECT_GE(some.mean_bits, 4.0);
    EXPECT_LE(error, 1e-3);
    // Everything within a few octaves of the best.
    const ReadReport all = report("fp16", 0.0, 0.0f, AlignmentThresholds::accurate(), error);
    EXPECT_GE(all.mean_bits, 15.0);
    EXPECT_LE(error, 1e-4);
    constexpr int never = AlignmentThresholds::never;
    const ReadReport everything = report("fp16", 0.1, 18.0f, {never, never, never}, error);
    EXPECT_EQ(everything.mean_bits, 16.0);
    EXPECT_LE(error, 1e-5);
}

/// Of every warp, whatever comes first.
TEST(AlignedMath, BudgetsAreKept) {
    double best = 0.0;
    for (const double hot : {0.0, 0.1, 0.5, 1.0}) {
        if (kvplane_test::sanitized && hot != 0.1 && hot != 0.5) continue;
        const float peak = hot > 0.0 ? 12.0f : 0.0f;
        const Given codes("key_favored:8:8", 5000, hot, peak, kvplane_test::seed()),
            halves("fp16", 5000, hot, peak, kvplane_test::seed());
        const auto expect = [&](const Given& given, const ReadPolicy& policy, const Attended& found) {
            const ReadReport read =
                read_report(attend_layer(given.cache.shape()).prefixes, 128, 128, found.counts);
            if (policy.shared) {
                EXPECT_LE(read.mean_bits, policy.key_bits + 1e-9) << hot;
                best = std::max(best, read.mean_bits / policy.key_bits);
            } else {
                EXPECT_LE(read.key_bits, policy.key_bits + 1e-9) << hot;
                EXPECT_LE(read.value_bits, policy.value_bits + 1e-9) << hot;
            }
        };
        for (const ReadPolicy& policy : {ReadPolicy::aligned(2.0), ReadPolicy::aligned(3.3),
                                         ReadPolicy::aligned(6.0), ReadPolicy::aligned(5.0, 3.0)})
            expect(codes, policy, attend<Codes>(codes.cache, codes.queries, {.read = policy}, 3));
        for (const ReadPolicy& policy : {ReadPolicy::aligned(6.0), ReadPolicy::aligned(12.0, 9.0)})
            expect(halves, policy, attend<Halves>(halves.cache, halves.queries, {.read = policy}, 3));
    }
    EXPECT_GE(best, 0.9);
}
/// A budget is spent on tiles that count: better than the same bits of every code.
TEST(AlignedMath, BudgetsGoWhereTheyCount) {
    const Given given("key_favored:8:8", 5000, 0.2, 12.0f, kvplane_test::seed());
    const auto largest = [&](const Matrix& output) {
        const std::vector<double> errors = given.errors(output);
        return *std::max_element(errors.begin(), errors.end());
    };
    const auto with = [&](double bits) {
        return largest(
            attend<Codes>(given.cache, given.queries, {.read = ReadPolicy::aligned(bits)}, 3).output);
    };
    Matrix fixed(1, 768);
    AttentionWorkspace workspace;
    given.cache.attend(given.queries, fixed, {.read = ReadPolicy::fixed(4.0)}, workspace);
    EXPECT_LE(with(4.0), 0.5 * largest(fixed));
    EXPECT_LE(with(8.0), 1e-3);
}

TEST(AlignedMath, OtherPoliciesAreRefused) {
    using kvplane_test::refusal;
    const auto rule = [](const char* recipe, const ReadPolicy& policy) {
        const CacheConfiguration c{.kv_heads = 1,
                                   .query_heads = 4,
                                   .key_head_dim = 128,
                                   .value_head_dim = 128,
                                   .recipe = recipes::parse(recipe)};
        return aligned_rule(policy, attend_layer(kvplane::detail::CacheShape(c)).prefixes, 128, 128);
    };
    const auto expect = [&](const ReadPolicy& policy, const char* text) {
        EXPECT_NE(refusal(ErrorCode::option, [&] { rule("key_favored:8:8", policy); }).find(text),
                  std::string::npos)
            << text;
    };
    expect(ReadPolicy::fixed(4), "fixed reads");
    expect(ReadPolicy::aligned(1.0), "fits into it");
    expect(ReadPolicy::aligned(3.0, 8.0), "fits into it");
    expect(ReadPolicy::tolerance(-1.0), "tolerance");
    expect(ReadPolicy::exponents({5, 4, 3}), "alignment thresholds");
    PlanePrefixes none{};
    EXPECT_NE(refusal(ErrorCode::option, [&] { aligned_rule(ReadPolicy::tolerance(0.1), none, 128, 128); })
                  .find("several widths"),
              std::string::npos);
}

}  // namespace
