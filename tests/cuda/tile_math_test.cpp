// The arithmetic of the CUDA kernels on the host: what 32 emulated lanes make of tiles, and of whole caches,
// against double precision.
#include "kvplane/cuda/tile_math.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/host_warp.hpp"
#include "kvplane/attention/reference.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cuda/latent_math.cuh"
#include "kvplane/cuda/layer_view.hpp"
#include "kvplane/recipe_names.hpp"
#include "kvplane/recipes.hpp"
#include "kvplane/storage/tile_coder.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane::cuda;
using kvplane_test::Random;

/// Bytes aligned as pages are.
struct AlignedBytes {
    explicit AlignedBytes(Index bytes) : lines(static_cast<std::size_t>(bytes + 63) / 64) {}
    struct alignas(64) Line {
        std::byte at[64];
    };
    std::byte* data() { return lines[0].at; }
    std::vector<Line> lines;
};

/// Rows of queries as a block keeps them.
struct QueryMemory {
    QueryMemory(const Matrix& rows, Index channels)
        : stride(static_cast<std::uint32_t>(channels + 4) * 4), bytes(8 * static_cast<Index>(stride)) {
        for (Index r = 0; r < rows.rows(); ++r)
            for (Index c = 0; c < channels; ++c) {
                const float x = rows(r, c);
                std::memcpy(bytes.data() + r * stride + c * 4, &x, 4);
            }
    }
    QueryRowsView view() { return {bytes.data(), stride}; }
    std::uint32_t stride;
    AlignedBytes bytes;
};

struct Tile {
    Tile(const TileFormat& format_of, const Matrix& values) : format(format_of), bytes(format_of.bytes()) {
        kvplane::detail::TileCoder coder(format);
        coder.encode(head_rows(values), "rows", {.count = values.rows()}, bytes.data());
    }
    Matrix decoded(int depth = 16) {
        Matrix rows(128, format.channels());
        kvplane::detail::TileCoder coder(format);
        coder.decode(bytes.data(), 128, depth, rows.data(), rows.cols());
        return rows;
    }
    TileFormat format;
    AlignedBytes bytes;
};

/// Random rows of channels of very different size, some of them around a mean.
Matrix rows_of(Random& random, Index tokens, Index channels) {
    Matrix rows(tokens, channels);
    std::normal_distribution<float> normal;
    for (Index c = 0; c < channels; ++c) {
        const float scale = std::exp(1.5f * normal(random)), mean = c % 3 == 0 ? 4.0f * scale : 0.0f;
        for (Index t = 0; t < tokens; ++t) rows(t, c) = mean + scale * normal(random);
    }
    return rows;
}

/// The most by which scores of a row may be off for a group of tokens [first, end): every factor, a query
/// times the step of a channel, is off by half a unit, the largest of them over 32512, and meets codes up to
/// half of 2^bits from their middle.
double score_bound(const KeyTileView& view, const Matrix& keys, const Matrix& queries, Index row, Index first,
                   Index end) {
    double largest = 0.0, codes = 0.0;
    for (int i = 0; i < view.segments; ++i) {
        const SegmentView& s = view.segment[i];
        if (s.bits == 16) return 0.0;
        for (Index c = s.first_channel; c < s.first_channel + s.channels; ++c) {
            const auto column = keys.col(c).segment(first, end - first);
            // Of tokens that reach both ends, as all groups here do, the range is at least half of all cells
            // but one; fp16 rounds steps up by 2^-10 of them.
            const double cells = std::ldexp(1.0, s.bits), range = column.maxCoeff() - column.minCoeff();
            largest = std::max(largest, std::abs(queries(row, c)) * 2.0 * range / std::max(1.0, cells - 1.0));
            codes += 0.5 * (cells - 1.0);
        }
    }
    return 0.5 * largest / 32512.0 * codes;
}

/// body(lane, row, token, m, s, j) for every score that a lane has.
template <class Math, class Body>
void each_score(const Body& body) {
    const auto row = Math::row();
    for (int m = 0; m < 4; ++m)
        for (int j = 0; j < Math::own; ++j) {
            const auto token = score_token(m, Math::column(j), Math::value_chunk);
            for (int s = 0; s < 4; ++s)
                for (int lane = 0; lane < 32; ++lane)
                    body(lane, static_cast<Index>(row[lane]), static_cast<Index>(token[lane]) + s, m, s, j);
        }
}

/// Scores of a tile: [row of queries][token].
template <class Math>
Matrix scores_of(Tile& tile, const KeyTileView& view, const Matrix& queries) {
    QueryMemory memory(queries, queries.cols());
    AlignedBytes factors(8 * view.factor_stride());
    typename Math::Scores score;
    Math::score(memory.view(), tile.bytes.data(), view, factors.data(), score);
    Matrix to(8, 128);
    each_score<Math>([&](int lane, Index row, Index token, int m, int s, int j) {
        to(row, token) = score[m][s][j][lane];
    });
    return to;
}

/// Scores of a tile against those of its decoded keys.
template <class Math>
void expect_scores(Tile& tile, const KeyTileView& view, const Matrix& queries, int depth,
                   const std::string& name) {
    const Matrix found = scores_of<Math>(tile, view, queries), keys = tile.decoded(depth);
    const Eigen::MatrixXd exact = queries.cast<double>() * keys.cast<double>().transpose();
    const Eigen::MatrixXd sizes =
        queries.cast<double>().cwiseAbs() * keys.cast<double>().cwiseAbs().transpose();
    const Index group = 128 / view.groups;
    Eigen::MatrixXd bound(8, view.groups);
    for (Index row = 0; row < 8; ++row)
        for (Index g = 0; g < view.groups; ++g)
            bound(row, g) = score_bound(view, keys, queries, row, g * group, (g + 1) * group);
    for (Index row = 0; row < (Math::shares_rows ? 4 : 8); ++row)
        for (Index token = 0; token < 128; ++token)
            ASSERT_NEAR(found(row, token), exact(row, token),
                        bound(row, token / group) + 3e-6 * sizes(row, token))
                << name << " row " << row << " token " << token;
}

/// check<bits, channels>() at every width, 16 for fp16.
template <int channels, class Check>
void at_every_width(const Check& check) {
    [&]<int... bits>(std::integer_sequence<int, bits...>) {
        (check.template operator()<bits, channels>(), ...);
    }
    (std::integer_sequence<int, 1, 2, 3, 4, 5, 6, 7, 8, 16>{});
}

TEST(TileMath, ScoresAreThoseOfDecodedKeysAtEveryWidth) {
    Random random(kvplane_test::seed());
    const auto check = [&]<int bits, int channels>() {
        const GridRule rule{Granularity::per_channel, 128, scheme_for(bits), Clip::none};
        Tile tile(TileFormat(TileSide::keys, channels, bits, rule), rows_of(random, 128, channels));
        const Matrix queries = rows_of(random, 8, channels);
        const std::string name = std::to_string(bits) + " bits, " + std::to_string(channels) + " channels";
        using Made = TileMath<HostWarp, bits, channels, bits, 128>;
        expect_scores<Made>(tile, key_tile_view(tile.format), queries, 16, name);
        using Paired = TileMath<HostWarp, bits, channels, bits, 128, true>;
        Matrix twice = queries;
        twice.bottomRows(4) = queries.topRows(4);
        expect_scores<Paired>(tile, key_tile_view(tile.format), twice, 16, name + ", paired");
        using General = TileMath<HostWarp, any_width, 256, any_width, 128>;
        expect_scores<General>(tile, key_tile_view(tile.format), queries, 16, name + ", run time");
    };
    at_every_width<64>(check);
    at_every_width<80>(check);
    at_every_width<96>(check);
    at_every_width<128>(check);
    at_every_width<256>(check);
}

TEST(TileMath, GroupsOfTokensSegmentsAndPrefixesAreRead) {
    Random random(kvplane_test::seed());
    using General = TileMath<HostWarp, any_width, 256, any_width, 128>;
    for (const Index group : {32, 64, 128}) {
        const GridRule rule{Granularity::per_channel, group, Scheme::min_max, Clip::none};
        for (const std::vector<ChannelSegment>& segments : {std::vector<ChannelSegment>{{64, 4}},
                                                            {{8, 8}, {8, 6}, {16, 4}, {32, 2}},
                                                            {{5, 7}, {40, 3}, {11, 0}, {72, 1}}}) {
            const TileFormat format(TileSide::keys, segments, rule);
            Tile tile(format, rows_of(random, 128, format.channels()));
            Matrix queries = rows_of(random, 8, format.channels());
            expect_scores<General>(tile, key_tile_view(format), queries, 16,
                                   "group " + std::to_string(group));
        }
    }
    for (const int bits : {3, 5, 6, 7, 8, 16}) {
        const GridRule rule{Granularity::per_channel, 128, Scheme::min_max, Clip::none};
        Tile tile(TileFormat(TileSide::keys, 128, bits, rule), rows_of(random, 128, 128));
        const PlaneSplit split = plane_split(bits);
        for (int planes = 1; planes < split.count; ++planes)
            expect_scores<General>(tile, key_tile_view(tile.format, planes), rows_of(random, 8, 128),
                                   split.prefix_bits(planes),
                                   std::to_string(planes) + " planes of " + std::to_string(bits));
    }
}

/// Weights of a tile whose scores are in units of log 2, relative to the largest of a row.
Eigen::MatrixXd weights_of(const Matrix& scores) {
    return (scores.cast<double>().colwise() - scores.cast<double>().rowwise().maxCoeff())
        .unaryExpr([](double x) { return std::exp2(x); });
}

/// Output of one tile for given scores, not divided by the sum of weights: [row of queries][channel].
template <class Math>
Matrix sums_of(Tile& tile, const ValueTileView& view, const Matrix& scores) {
    typename Math::Scores score;
    each_score<Math>([&](int lane, Index row, Index token, int m, int s, int j) {
        score[m][s][j][lane] = scores(row, token);
    });
    typename Math::State state;
    Math::begin(state);
    const auto factor = Math::weigh(score, state);
    AlignedBytes memory(ValueTileView::run_bytes);
    Math::add_values(tile.bytes.data(), view, memory.data(), score, factor, state);
    Math::finish(state);
    const Eigen::VectorXd weights = weights_of(scores).rowwise().sum();
    Matrix to(8, tile.format.channels());
    for (int row = 0; row < (Math::shares_rows ? 4 : 8); ++row) {
        EXPECT_NEAR(state.softmax.sum[4 * row], weights[row], 1e-5 * weights[row]);
        for (Index c = 0; c < to.cols(); ++c) {
            const int in_block = static_cast<int>(c % 32);
            to(row, c) = state.out[static_cast<std::size_t>(c / 32)][in_block % 4][in_block % 8 / 4]
                                  [4 * row + in_block / 8];
        }
    }
    return to;
}

/// The same against that of the tile's decoded values.
template <class Math>
void expect_values(Tile& tile, const ValueTileView& view, const Matrix& scores, int depth,
                   const std::string& name) {
    const Matrix found = sums_of<Math>(tile, view, scores), values = tile.decoded(depth);
    // A weight is off by half of 1 / 65500 of the largest step, which times a code's distance from the middle
    // is at most a range; where widths differ, the largest step is one of the least width.
    double codes = 128.0;
    if (view.runs > 0) {
        const double least = std::ldexp(1.0, view.run[view.runs - 1].segment.bits) - 1.0;
        codes = 0.0;
        for (int i = 0; i < view.runs; ++i)
            codes += view.run[i].rows * (std::ldexp(1.0, view.run[i].segment.bits) - 1.0) / least;
    }
    const double rounding = 0.5 * codes / 65500.0 * (values.maxCoeff() - values.minCoeff()),
                 largest = values.cwiseAbs().maxCoeff();
    const Eigen::MatrixXd weights = weights_of(scores), exact = weights * values.cast<double>();
    for (Index row = 0; row < (Math::shares_rows ? 4 : 8); ++row)
        for (Index c = 0; c < values.cols(); ++c)
            ASSERT_NEAR(found(row, c), exact(row, c), rounding + 3e-6 * largest * weights.row(row).sum())
                << name << " row " << row << " channel " << c;
}

/// Numbers that are in the middle of grids from -1 to 1, but for the first two, which are their ends.
Matrix middle_rows(Random& random, Index rows, Index length, int bits) {
    std::uniform_real_distribution<float> half_a_cell(-0.5f, 0.5f);
    Matrix to(rows, length);
    for (Index row = 0; row < rows; ++row)
        for (Index i = 0; i < length; ++i)
            to(row, i) = i < 2 ? 1.0f - 2.0f * static_cast<float>(i) : std::ldexp(half_a_cell(random), -bits);
    return to;
}
/// Scores of tokens all of whose codes are next to the middle: half a step from it.
template <class Math>
void expect_middle_scores(Tile& tile, const Matrix& queries, int bits, const std::string& name) {
    const Matrix found = scores_of<Math>(tile, key_tile_view(tile.format), queries);
    const Eigen::MatrixXd exact = queries.cast<double>() * tile.decoded().cast<double>().transpose();
    for (Index row = 0; row < 8; ++row) {
        const Eigen::VectorXd sizes = queries.row(row).cast<double>().cwiseAbs().transpose();
        const double unit = sizes.maxCoeff() * 2.0 / (std::ldexp(1.0, bits) - 1.0) / 32512.0;
        for (Index token = 2; token < 128; ++token)
            ASSERT_NEAR(found(row, token), exact(row, token),
                        0.5 * unit * 0.5 * static_cast<double>(queries.cols()) + 1e-6 * sizes.sum())
                << name << " row " << row << " token " << token;
    }
}
/// Sums of channels all of whose codes are.
template <class Math>
void expect_middle_values(Tile& tile, const Matrix& scores, const std::string& name) {
    const Matrix found = sums_of<Math>(tile, value_tile_view(tile.format), scores), values = tile.decoded();
    const double step =
        values.col(0).cwiseAbs().maxCoeff() * 2.0 / (std::ldexp(1.0, tile.format.segments()[0].bits) - 1.0);
    const Eigen::MatrixXd weights = weights_of(scores), exact = weights * values.cast<double>(),
                          sizes = weights * values.col(0).cast<double>().cwiseAbs();
    for (Index row = 0; row < 8; ++row)
        for (Index c = 2; c < values.cols(); ++c)
            ASSERT_NEAR(found(row, c), exact(row, c),
                        0.5 * step / 65500.0 * 0.5 * 128.0 + 1e-6 * sizes(row, 0))
                << name << " row " << row << " channel " << c;
}

TEST(TileMath, RoundingOfFactorsLeavesTheMiddleOfCodesAsItIs) {
    Random random(kvplane_test::seed());
    std::normal_distribution<float> normal;
    const auto check = [&]<int bits, int channels>() {
        if (bits == 16) return;
        const std::string name = std::to_string(bits) + " bits, " + std::to_string(channels) + " channels";
        const Matrix scores = 3.0f * kvplane_test::normal_matrix(8, 128, random);
        using Made = TileMath<HostWarp, bits, channels, bits, channels>;
        using General = TileMath<HostWarp, any_width, 256, any_width, channels>;
        for (const Scheme scheme : {Scheme::min_max, Scheme::cell}) {
            const std::string with = name + ", " + kvplane::name(scheme);
            const GridRule of_keys{Granularity::per_channel, 128, scheme, Clip::none};
            Tile keys(TileFormat(TileSide::keys, channels, bits, of_keys),
                      middle_rows(random, channels, 128, bits).transpose());
            const Matrix queries = rows_of(random, 8, channels);
            expect_middle_scores<Made>(keys, queries, bits, with);
            expect_middle_scores<General>(keys, queries, bits, with + ", run time");
            Matrix rows = middle_rows(random, 128, channels, bits);
            for (Index t = 0; t < 128; ++t) rows.row(t) *= std::exp2(normal(random));
            const GridRule of_values{Granularity::per_token, whole_head, scheme, Clip::none};
            Tile values(TileFormat(TileSide::values, channels, bits, of_values), rows);
            expect_middle_values<Made>(values, scores, with);
            expect_middle_values<General>(values, scores, with + ", run time");
        }
    };
    at_every_width<80>(check);
    at_every_width<128>(check);
}

TEST(TileMath, PrefixesOfHalvesAreReadWithTheirMiddle) {
    Random random(kvplane_test::seed());
    const auto check = [&]<int channels>() {
        const GridRule keys{Granularity::per_channel, 128, scheme_for(16), Clip::none},
            values{Granularity::per_token, whole_head, scheme_for(16), Clip::none};
        Tile of_keys(TileFormat(TileSide::keys, channels, 16, keys), rows_of(random, 128, channels));
        Tile of_values(TileFormat(TileSide::values, channels, 16, values), rows_of(random, 128, channels));
        Matrix queries = rows_of(random, 8, channels);
        queries.bottomRows(4) = queries.topRows(4);
        const Matrix scores = 3.0f * kvplane_test::normal_matrix(8, 128, random);
        for (int planes = 1; planes <= 3; ++planes) {
            const int bits = plane_split(16).prefix_bits(planes);
            const std::string name = std::to_string(bits) + " bits, " + std::to_string(channels);
            const KeyTileView key_view = key_tile_view(of_keys.format, planes);
            const ValueTileView value_view = value_tile_view(of_values.format, planes);
            // Exponents, and whole planes.
            EXPECT_EQ(key_view.bytes, (channels + 63) / 64 * 64 + 16 * channels * bits);
            EXPECT_EQ(value_view.bytes, (channels + 15) / 16 * 16 * 16 * bits);
            using Paired = TileMath<HostWarp, 16, channels, 16, channels, true>;
            expect_scores<Paired>(of_keys, key_view, queries, bits, name);
            expect_values<Paired>(of_values, value_view, scores, bits, name);
            using Made = TileMath<HostWarp, 16, channels, 16, channels>;
            expect_scores<Made>(of_keys, key_view, queries, bits, name);
            expect_values<Made>(of_values, value_view, scores, bits, name);
            using General = TileMath<HostWarp, 0, 256, 0, channels>;
            expect_values<General>(of_values, value_view, scores, bits, name);
        }
    };
    check.template operator()<80>();
    check.template operator()<128>();
}

TEST(TileMath, ValuesAreWeighedAtEveryWidth) {
    Random random(kvplane_test::seed());
    std::normal_distribution<float> normal;
    Matrix scores(8, 128);
    const auto check = [&]<int bits, int channels>() {
        for (const Index run : {Index{32}, Index{64}, whole_head})
            for (const Scheme scheme : {Scheme::min_max, Scheme::cell, Scheme::symmetric, Scheme::unbiased}) {
                if (bits == 1 && scheme == Scheme::symmetric) continue;
                if (bits > 4 && scheme == Scheme::unbiased) continue;
                if (channels == 80 && run == 32) continue;
                for (Index i = 0; i < scores.size(); ++i) scores.data()[i] = 3.0f * normal(random);
                const GridRule rule{Granularity::per_token, run, scheme, Clip::none};
                Tile tile(TileFormat(TileSide::values, channels, bits, rule), rows_of(random, 128, channels));
                const std::string name = std::to_string(bits) + " bits, " + std::to_string(channels) +
                                         " channels, " + kvplane::name(scheme) + " over " +
                                         std::to_string(run);
                using General = TileMath<HostWarp, any_width, 256, any_width, channels>;
                if (scheme == scheme_for(bits) || bits == 16)
                    expect_values<General>(tile, value_tile_view(tile.format), scores, 16,
                                           name + ", run time");
                if (run != whole_head) continue;
                using Made = TileMath<HostWarp, 4, 128, bits, channels>;
                expect_values<Made>(tile, value_tile_view(tile.format), scores, 16, name);
                using Paired = TileMath<HostWarp, 4, 128, bits, channels, true>;
                expect_values<Paired>(tile, value_tile_view(tile.format), scores, 16, name + ", paired");
                if (bits == 16) return;
            }
    };
    at_every_width<80>(check);
    at_every_width<128>(check);
}

/// A block's and a warp's memory for queries in the latents of a head.
template <bool paired>
struct LatentRows {
    using Latents = LatentMath<HostWarp, paired>;

    /// plain: eight scaled query rows; of paired ones the last four are the first four once more.
    LatentRows(const AttendLayer& layer, Index head_of, const Matrix& plain)
        : view(layer.table->view()),
          table(view.head_bytes),
          warp(view.warp_bytes()),
          given(Matrix::Zero(8, view.channels), view.channels),
          exchanged(given) {
        std::memcpy(table.data(), layer.table->bytes().data() + head_of * view.head_bytes, view.head_bytes);
        std::memcpy(&head, table.data(), sizeof head);
        Matrix padded = Matrix::Zero(8, view.channels), partners = padded;
        padded.leftCols(plain.cols()) = plain;
        for (Index channel = 0; channel < view.channels; ++channel) {
            std::int32_t partner;
            std::memcpy(&partner, table.data() + view.partners_at + channel * 4, 4);
            partners.col(channel) = padded.col(partner);
        }
        given = QueryMemory(padded, view.channels);
        exchanged = QueryMemory(partners, view.channels);
        memory = {given.bytes.data(), exchanged.bytes.data(), given.stride, table.data(), warp.data()};
        largest = Latents::largest_of(view, memory);
    }
    template <class Math>
    void score(const TilePlace& tile, typename Math::Scores& scores) {
        std::uint32_t origins[Latents::tiles];
        for (std::uint32_t& origin : origins) origin = static_cast<std::uint32_t>(tile.origin());
        Latents::project(view, head, memory, largest, origins);
        Math::score(Latents::latents(view, memory, 0), tile.page + head.key_at, head.keys,
                    warp.data() + view.factors_at(), scores);
    }

    LatentView view;
    LatentHead head{};
    AlignedBytes table, warp;
    QueryMemory given, exchanged;
    typename Latents::Memory memory{};
    HostWarp::Float largest{0.0f};
};

TEST(TileMath, ValuesOfSeveralWidthsAreWeighed) {
    Random random(kvplane_test::seed());
    std::normal_distribution<float> normal;
    Matrix scores(8, 128);
    const auto check = [&]<int channels>() {
        for (const std::vector<TokenRun>& runs : {std::vector<TokenRun>{{16, 4}, {80, 2}, {32, 1}},
                                                  {{32, 4}, {32, 2}, {64, 1}},
                                                  {{48, 8}, {80, 2}},
                                                  {{16, 6}, {32, 5}, {32, 3}, {48, 2}},
                                                  {{112, 4}, {16, 2}}})
            for (const Scheme scheme : {Scheme::min_max, Scheme::unbiased}) {
                if (scheme == Scheme::unbiased && runs[0].bits > 4) continue;
                for (Index i = 0; i < scores.size(); ++i) scores.data()[i] = 3.0f * normal(random);
                const GridRule rule{Granularity::per_token, whole_head, scheme, Clip::none};
                const TileFormat format(channels, runs, rule);
                Tile tile(format, rows_of(random, 128, channels));
                const std::string name = std::to_string(runs.size()) + " runs from " +
                                         std::to_string(runs[0].tokens) + " tokens, " + kvplane::name(scheme);
                using General =
                    TileMath<HostWarp, any_width, 256, token_widths, (channels + 127) / 128 * 128>;
                expect_values<General>(tile, value_tile_view(format), scores, 16, name + ", run time");
                using Made = TileMath<HostWarp, 4, 128, token_widths, channels>;
                expect_values<Made>(tile, value_tile_view(format), scores, 16, name);
                using Paired = TileMath<HostWarp, 4, 128, token_widths, channels, true>;
                expect_values<Paired>(tile, value_tile_view(format), scores, 16, name + ", paired");
            }
    };
    check.template operator()<80>();
    check.template operator()<128>();
    check.template operator()<256>();
}

/// Attention of a cache as the kernel does it, with `warps` warps that take turns.
template <class Math>
Matrix attend_as_warps(const KvCache& cache, const Matrix& queries, const AttentionParameters& parameters,
                       int warps) {
    const CacheConfiguration& c = cache.configuration();
    const auto& state = cache.state();
    const AttendLayer of = attend_layer(cache.shape(), {}, c.fits_basis() ? state.latent : nullptr);
    const LayerView& layer = of.view;
    const Index group = c.group(), rows = queries.rows() * group;
    const Index position = parameters.first_position(cache.tokens(), queries.rows());
    Matrix output(queries.rows(), c.query_heads * c.value_head_dim);
    for (Index head = 0; head < c.kv_heads; ++head)
        for (Index first = 0; first < rows; first += 8) {
            const Index count = std::min<Index>(8, rows - first);
            const auto row_of = [&](Index r) { return std::min(first + r, rows - 1); };
            Matrix plain = Matrix::Zero(8, c.key_head_dim);
            for (Index r = 0; r < count; ++r)
                plain.row(r) =
                    queries.row(row_of(r) / group)
                        .segment((head * group + row_of(r) % group) * c.key_head_dim, c.key_head_dim) *
                    (log2_e / std::sqrt(static_cast<float>(c.key_head_dim)));
            Matrix rotated = plain;
            cache.shape().rotation(TileSide::keys).rotate(rotated);
            QueryMemory as_given(plain, c.key_head_dim), turned(rotated, c.key_head_dim);
            std::optional<LatentRows<Math::shares_rows>> latents;
            if (Math::in_latents) latents.emplace(of, head, plain);
            AlignedBytes factors(8 * layer.keys.factor_stride()), weights(ValueTileView::run_bytes);
            ScoreRules<HostWarp> rules{};
            rules.position =
                each<std::int32_t>([&](int lane) { return position + row_of(lane / 4) / group; });
            rules.slope = rules.softcap = HostWarp::Float(0.0f);
            rules.softcap = HostWarp::Float(static_cast<float>(parameters.softcap) * log2_e);
            rules.window = static_cast<std::int32_t>(parameters.sliding_window);
            rules.window_sinks = static_cast<std::int32_t>(parameters.sinks);
            rules.causal = parameters.causal;
            rules.changes_scores = parameters.softcap > 0.0;
            std::vector<typename Math::State> states(static_cast<std::size_t>(warps));
            for (int w = 0; w < warps; ++w) {
                typename Math::State& mine = states[static_cast<std::size_t>(w)];
                Math::begin(mine);
                const auto loose = [&](const OutsideView& view, const std::byte* page, int row, Index at) {
                    const TokenRow<HostWarp> value =
                        token_row<HostWarp>(view.values, page, static_cast<int>(head), row);
                    auto score =
                        Math::score_row(layer.rotates_keys == Rotation::all ? turned.view() : as_given.view(),
                                        token_row<HostWarp>(view.keys, page, static_cast<int>(head), row),
                                        static_cast<int>(c.key_head_dim));
                    score = Math::ruled(rules, score, HostWarp::Int(at), HostWarp::Flag(true));
                    Math::add_rows(&value, &score, 1, static_cast<int>(c.value_head_dim), mine);
                };
                for (Index t = w; t < state.sink_count(c.recipe); t += warps)
                    loose(layer.sinks, state.sinks.data(), static_cast<int>(t), t);
                for (Index t = state.recent_first + w; !state.recent.empty() && t < cache.tokens();
                     t += warps)
                    loose(layer.recent,
                          state.recent[static_cast<std::size_t>((t - state.recent_first) / 32)].data(),
                          static_cast<int>((t - state.recent_first) % 32), t);
                for (std::size_t t = static_cast<std::size_t>(w); t < state.tiles.size();
                     t += static_cast<std::size_t>(warps)) {
                    const TilePlace& tile = state.tiles[t];
                    const bool is_turned =
                        layer.rotates_keys == Rotation::all ||
                        (layer.rotates_keys == Rotation::by_tile && tile.layout->rotated(tile.page, head));
                    typename Math::Scores scores;
                    if (Math::in_latents)
                        latents->template score<Math>(tile, scores);
                    else
                        Math::score(is_turned ? turned.view() : as_given.view(),
                                    tile.page + head * layer.head_stride, layer.keys, factors.data(), scores);
                    Math::apply(
                        rules,
                        {static_cast<std::int32_t>(tile.origin()), static_cast<std::int32_t>(tile.row),
                         static_cast<std::int32_t>(tile.end_row())},
                        scores);
                    const auto factor = Math::weigh(scores, mine);
                    Math::add_values(tile.page + tile.layout->value_at[static_cast<std::size_t>(head)],
                                     layer.values, weights.data(), scores, factor, mine);
                }
                Math::finish(mine);
            }
            for (Index r = 0; r < count; ++r) {
                const int lane = static_cast<int>(4 * r);
                float largest = -1e30f, sum = 0.0f;
                for (const auto& s : states) largest = std::max(largest, s.softmax.largest[lane]);
                for (const auto& s : states)
                    sum += std::exp2(s.softmax.largest[lane] - largest) * s.softmax.sum[lane];
                Matrix out = Matrix::Zero(1, c.value_head_dim);
                for (const auto& s : states)
                    for (Index channel = 0; channel < c.value_head_dim; ++channel) {
                        const int in_block = static_cast<int>(channel % 32);
                        out(0, channel) +=
                            std::exp2(s.softmax.largest[lane] - largest) *
                            s.out[channel / 32][in_block % 4][in_block % 8 / 4][lane + in_block / 8] / sum;
                    }
                if (layer.rotates_values) cache.shape().rotation(TileSide::values).rotate_back(out);
                output.row(row_of(r) / group)
                    .segment((head * group + row_of(r) % group) * c.value_head_dim, c.value_head_dim) = out;
            }
        }
    return output;
}

TEST(TileMath, WholeCachesAreAttended) {
    Random random(kvplane_test::seed());
    int cases = 0;
    for (const char* name :
         {"fp16", "standard", "key_favored:4:4", "kivi:2:32", "key_favored:8:1", "smallest"})
        for (const auto& [query_tokens, parameters] : {std::pair<Index, AttentionParameters>{1, {}},
                                                       {5, {.softcap = 15.0}},
                                                       {3, {.sliding_window = 200, .sinks = 4}},
                                                       {2, {.position = 150}},
                                                       {2, {.causal = false}}}) {
            // All names and all parameters still come.
            if (kvplane_test::sanitized && cases++ % 3 != 0) continue;
            TilePool pool;
            KvCache cache({.kv_heads = 2,
                           .query_heads = 6,
                           .key_head_dim = 64,
                           .value_head_dim = 96,
                           .recipe = recipes::parse(name),
                           .rotation_seed = 5},
                          pool);
            const Matrix keys = kvplane_test::normal_matrix(500, 2 * 64, random),
                         values = kvplane_test::normal_matrix(500, 2 * 96, random);
            if (cache.configuration().recipe.shaped_keys)
                cache.append(keys, values, kvplane_test::normal_matrix(500, 6 * 64, random));
            else
                cache.append(keys, values);
            cache.truncate(478);  // where nothing is left outside tiles, the last of which is cut
            const Matrix queries = kvplane_test::normal_matrix(query_tokens, 6 * 64, random);
            using Math = TileMath<HostWarp, any_width, 256, any_width, 96>;
            using OfRuns = TileMath<HostWarp, any_width, 256, token_widths, 96>;
            const Matrix found = cache.configuration().recipe.values.widths.empty()
                                     ? attend_as_warps<Math>(cache, queries, parameters, 3)
                                     : attend_as_warps<OfRuns>(cache, queries, parameters, 3);
            const MatrixD exact = reference_attention(cache.stored_keys(0, 478), cache.stored_values(0, 478),
                                                      queries, 6, 2, parameters);
            // Values are up to 4 or so, and scores off by a few 1e-5.
            EXPECT_LE((found.cast<double>() - exact).cwiseAbs().maxCoeff(),
                      1e-4 * static_cast<double>(cache.stored_values(0, 478).cwiseAbs().maxCoeff()))
                << name << ", " << query_tokens << " query tokens";
        }
}

/// Keys of few directions of very different size, so that latents have several widths.
Matrix keys_of_few_directions(Random& random, Index tokens, Index channels, Index head_dim) {
    Matrix keys(tokens, channels);
    for (Index head = 0; head < channels / head_dim; ++head) {
        Matrix parts = kvplane_test::normal_matrix(tokens, head_dim, random);
        for (Index j = 0; j < head_dim; ++j) parts.col(j) *= std::exp(-0.08f * static_cast<float>(j));
        keys.middleCols(head * head_dim, head_dim) =
            parts * kvplane_test::normal_matrix(head_dim, head_dim, random) * 0.3f;
    }
    return keys;
}

CacheConfiguration latent_configuration(const char* recipe, Index head_dim, RopeLayout layout) {
    return {.kv_heads = 2,
            .query_heads = 6,
            .key_head_dim = head_dim,
            .value_head_dim = 96,
            .recipe = recipes::parse(recipe),
            .rotation_seed = 5,
            .rope = RopeSettings{.layout = layout}};
}

/// Queries turned and projected by the 32 lanes are those of double precision, far from the begin too.
TEST(LatentMath, QueriesBecomeLatents) {
    Random random(kvplane_test::seed());
    const auto check = [&]<bool paired>() {
        for (const char* recipe : {"latent:3:3", "latent:2:2", "weighted:3:3"})
            for (const Index dim : {Index{64}, Index{80}, Index{72}, Index{128}}) {
                if (kvplane_test::sanitized && dim != 80) continue;
                const auto layout = dim == 64 ? RopeLayout::halves : RopeLayout::interleaved;
                TilePool pool;
                KvCache cache(latent_configuration(recipe, dim, layout), pool);
                cache.append(keys_of_few_directions(random, 700, 2 * dim, dim),
                             kvplane_test::normal_matrix(700, 2 * 96, random),
                             kvplane_test::normal_matrix(700, 6 * dim, random));
                ASSERT_TRUE(cache.state().latent) << recipe;
                const AttendLayer layer = attend_layer(cache.shape(), {}, cache.state().latent);
                const LatentKeys& latent = *layer.latent;
                Matrix queries = rows_of(random, 8, dim);
                if (paired) queries.bottomRows(4) = queries.topRows(4);
                for (Index h = 0; h < 2; ++h) {
                    LatentRows<paired> rows(layer, h, queries);
                    using Latents = LatentMath<HostWarp, paired>;
                    std::uint32_t origins[Latents::tiles];
                    for (std::uint32_t& origin : origins)
                        origin = std::uniform_int_distribution<std::uint32_t>(0, 1u << 20)(random);
                    Latents::project(rows.view, rows.head, rows.memory, rows.largest, origins);
                    const Index s = latent.subspace_of_head(h), at = latent.head_offset(h);
                    const MatrixD basis = latent.from_latents(s).middleRows(at, dim).cast<double>();
                    const Eigen::VectorXd mean =
                        latent.subspace(s).mean.segment(at, dim).transpose().cast<double>();
                    for (int tile = 0; tile < Latents::tiles; ++tile)
                        for (Index r = 0; r < (paired ? 4 : 8); ++r) {
                            Eigen::RowVectorXd query = queries.row(r).cast<double>();
                            for (const RotaryEmbedding::Pair& pair : latent.embedding().pairs()) {
                                if (latent.frame() == KeyFrame::after_rope || pair.second < 0) continue;
                                const double angle = -static_cast<double>(origins[tile]) * pair.frequency;
                                const double x = query[pair.first], y = query[pair.second];
                                query[pair.first] = x * std::cos(angle) - y * std::sin(angle);
                                query[pair.second] = x * std::sin(angle) + y * std::cos(angle);
                            }
                            const QueryRowsView made = Latents::latents(rows.view, rows.memory, tile);
                            const auto found = [&](std::size_t byte) {
                                float x;
                                std::memcpy(&x, made.rows + byte + static_cast<std::size_t>(r) * 4, 4);
                                return static_cast<double>(x);
                            };
                            // Of sums of floats; latents of queries that are rounded to fp16, each channel by
                            // up to 2^-11 of itself or of what is lost at the low end.
                            const double size = query.norm(), half = 0x1p-11 + 1e-5;
                            EXPECT_NEAR(found(made.offset_at), query * mean, 2e-6 * size * mean.norm());
                            for (Index j = 0; j < basis.cols(); ++j)
                                ASSERT_NEAR(found(static_cast<std::size_t>(j * Latents::rows) * 4),
                                            query * basis.col(j),
                                            half * query.cwiseAbs() * basis.col(j).cwiseAbs())
                                    << recipe << ", head " << h << " of " << dim << ", latent " << j;
                        }
                }
            }
    };
    check.template operator()<false>();
    check.template operator()<true>();
}

TEST(LatentMath, WholeCachesAreAttended) {
    Random random(kvplane_test::seed());
    for (const char* recipe : {"latent:3:3", "latent:2:4", "weighted:3:3"})
        for (const Index dim : {Index{64}, Index{128}}) {
            if (kvplane_test::sanitized && dim != 64) continue;
            TilePool pool;
            KvCache cache(latent_configuration(recipe, dim, RopeLayout::halves), pool);
            cache.append(keys_of_few_directions(random, 900, 2 * dim, dim),
                         kvplane_test::normal_matrix(900, 2 * 96, random),
                         kvplane_test::normal_matrix(900, 6 * dim, random));
            const Index tokens = 870;
            cache.truncate(tokens);
            const Matrix queries = kvplane_test::normal_matrix(3, 6 * dim, random);
            using Math = TileMath<HostWarp, latent_width, 256, any_width, 96>;
            const Matrix found = attend_as_warps<Math>(cache, queries, {}, 3);
            const MatrixD exact = reference_attention(cache.stored_keys(0, tokens),
                                                      cache.stored_values(0, tokens), queries, 6, 2);
            EXPECT_LE((found.cast<double>() - exact).cwiseAbs().maxCoeff(),
                      3e-4 * static_cast<double>(cache.stored_values(0, tokens).cwiseAbs().maxCoeff()))
                << recipe << ", heads of " << dim;
        }
}

/// What attention does not read is refused by name.
TEST(TileMath, OtherTilesAreRefused) {
    using kvplane_test::refusal;
    const auto layer = [](const CacheConfiguration& c) {
        return attend_layer(kvplane::detail::CacheShape(c));
    };
    const CacheConfiguration good{
        .kv_heads = 2, .query_heads = 4, .key_head_dim = 64, .value_head_dim = 64, .recipe = {}};
    const auto with = [&](const char* name) {
        CacheConfiguration c = good;
        c.recipe = recipes::parse(name);
        return c;
    };
    EXPECT_NE(refusal(ErrorCode::option, [&] { layer(with("smallest+value_group=32")); })
                  .find("whose tokens have different widths"),
              std::string::npos);
    EXPECT_NE(refusal(ErrorCode::option, [&] { layer(with("block32:8")); }).find("per_token"),
              std::string::npos);
    EXPECT_NE(refusal(ErrorCode::option,
                      [&] {
                          attend_layer(kvplane::detail::CacheShape(with("key_favored:8:8")),
                                       {.keys = 0, .values = 1});
                      })
                  .find("0 planes"),
              std::string::npos);
    EXPECT_NE(refusal(ErrorCode::option, [&] { layer(with("latent:3:3")); }).find("without a basis"),
              std::string::npos);
    // A basis of keys before RoPE, and one of too many latents.
    Random random(kvplane_test::seed());
    const auto fitted = [&](const char* name, Index heads, const std::string& sentence) {
        CacheConfiguration c = with(name);
        c.kv_heads = c.query_heads = heads;
        c.rope = RopeSettings{};
        TilePool pool;
        KvCache cache(c, pool);
        cache.append(kvplane_test::normal_matrix(900, 64 * heads, random),
                     kvplane_test::normal_matrix(900, 64 * heads, random),
                     kvplane_test::normal_matrix(900, 64 * heads, random));
        const auto& basis = cache.state().latent;
        ASSERT_TRUE(basis);
        EXPECT_NE(refusal(ErrorCode::option, [&] { attend_layer(cache.shape(), {}, basis); }).find(sentence),
                  std::string::npos)
            << name;
        c.recipe = recipes::parse("standard");
        EXPECT_NE(refusal(ErrorCode::option, [&] { attend_layer(kvplane::detail::CacheShape(c), {}, basis); })
                      .find("do not fit one of their own"),
                  std::string::npos);
    };
    fitted("svdq:2", 2, "before_rope");
    fitted("svdq:4-4+frame=tile", 5, "320 latents");
    CacheConfiguration odd = good;
    odd.key_head_dim = 100;
    EXPECT_NE(refusal(ErrorCode::option, [&] { layer(odd); }).find("100 channels of keys"),
              std::string::npos);
}

}  // namespace
