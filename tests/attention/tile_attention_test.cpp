// Scores and outputs of single tiles against decoding them.
#include "kvplane/attention/tile_attention.hpp"
#include "kvplane/storage/tile_coder.hpp"

#include <gtest/gtest.h>

#include "attention/kernels/plane_dot_support.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/theory/bounds.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane::detail;
using kvplane_test::for_each_isa;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::Tile;

struct Encoded {
    Encoded(const TileFormat& tile_format, const Matrix& values) : format(tile_format) {
        tile.resize(static_cast<std::size_t>(format.bytes()));
        TileCoder coder(format);
        coder.encode(head_rows(values), "values", {.count = values.rows()}, tile.data());
        decoded.setZero(tile_tokens, format.channels());
        coder.decode(tile.data(), values.rows(), decoded.data(), decoded.cols());
    }
    TileFormat format;
    Tile tile;
    Matrix decoded;
};

constexpr float offsets[row_block_rows] = {};

/// The steps of all grids of a segment.
std::vector<float> steps(const Tile& tile, const TileFormat::Placed& s) {
    std::vector<Eigen::half> room(static_cast<std::size_t>(s.grids));
    const Eigen::half* const step = steps_of(s, tile.data(), 0, s.grids, room.data());
    return {step, step + s.grids};
}

/// T14 for keys with grids by token: of each run of channels, whose factors are the query's elements, times the
/// token's step.
double token_grid_score_bound(const Encoded& keys, const Eigen::RowVectorXf& query) {
    Eigen::VectorXd worst = Eigen::VectorXd::Zero(tile_tokens);
    for (const TileFormat::Placed& s : keys.format.segments()) {
        if (!s.has_grids()) continue;
        const std::vector<float> step = steps(keys.tile, s);
        const Index run = std::min(keys.format.rule().group, s.channels);
        for (Index first = 0, g = 0; first < s.channels; first += run, ++g) {
            const Index channels = std::min(run, s.channels - first);
            const double largest = query.segment(s.first_channel + first, channels).cwiseAbs().maxCoeff();
            const double error = theory::rounded_factors_error(s.bits, s.split.shift(0), channels, largest);
            for (Index t = 0; t < tile_tokens; ++t)
                worst[t] += error * std::abs(step[static_cast<std::size_t>(g * tile_tokens + t)]);
        }
    }
    return worst.maxCoeff();
}

/// T14 for keys: what rounding the folded factors adds to a score at most, over all segments.
double score_bound(const Encoded& keys, const Eigen::RowVectorXf& query) {
    if (keys.format.rule().granularity == Granularity::per_token) return token_grid_score_bound(keys, query);
    const Index group = keys.format.rule().group;
    double worst = 0.0;
    for (Index g = 0; g * group < tile_tokens; ++g) {
        double sum = 0.0;
        for (const TileFormat::Placed& s : keys.format.segments()) {
            if (s.bits == 0) continue;
            const auto* step =
                reinterpret_cast<const Eigen::half*>(keys.tile.data() + s.step_at) + g * s.channels;
            double largest = 0.0;
            for (Index c = 0; c < s.channels; ++c)
                largest = std::max(largest, std::abs(static_cast<double>(query[s.first_channel + c]) *
                                                     static_cast<double>(step[c])));
            sum += theory::rounded_factors_error(s.bits, s.split.shift(0), s.channels, largest);
        }
        worst = std::max(worst, sum);
    }
    return worst;
}

/// The same for values, over all groups of channels.
double output_bound(const Encoded& values, const Eigen::RowVectorXf& weights) {
    const TileFormat::Placed& s = values.format.segments()[0];
    const std::vector<float> step = steps(values.tile, s);
    double largest = 0.0;
    for (Index i = 0; i < s.grids; ++i)
        largest = std::max(largest, static_cast<double>(weights[i % tile_tokens]) *
                                        std::abs(static_cast<double>(step[static_cast<std::size_t>(i)])));
    return theory::rounded_factors_error(s.bits, s.split.shift(0), tile_tokens, largest);
}

std::vector<TileFormat> key_formats() {
    std::vector<TileFormat> formats;
    for (const Scheme scheme : {Scheme::cell, Scheme::min_max, Scheme::symmetric, Scheme::full_range})
        for (int bits = scheme == Scheme::symmetric ? 2 : 1; bits <= 8; ++bits)
            for (const Index channels : {1, 40, 64, 80, 128})
                for (const Index group : {32, 128})
                    formats.push_back(
                        {TileSide::keys, channels, bits, {Granularity::per_channel, group, scheme}});
    const GridRule rule{Granularity::per_channel, 128, Scheme::min_max};
    formats.push_back({TileSide::keys,
                       {{8, 8}, {16, 6}, {40, 3, Scheme::cell}, {3, 5}, {9, 0}, {33, 1, Scheme::cell}},
                       rule});
    formats.push_back({TileSide::keys, {{5, 0}, {192, 2}}, rule});
    formats.push_back({TileSide::keys, {{7, 0}}, rule});
    return formats;
}

std::vector<TileFormat> token_grid_formats() {
    std::vector<TileFormat> formats;
    for (const Scheme scheme :
         {Scheme::cell, Scheme::min_max, Scheme::symmetric, Scheme::full_range, Scheme::unbiased})
        for (int bits = scheme == Scheme::symmetric ? 2 : 1; bits <= 8; ++bits)
            for (const Index channels : {1, 40, 80, 128})
                for (const Index group : {Index{32}, Index{64}, whole_head})
                    formats.push_back(
                        {TileSide::keys, channels, bits, {Granularity::per_token, group, scheme}});
    const GridRule rule{Granularity::per_token, 32, Scheme::min_max};
    formats.push_back({TileSide::keys, {{64, 8}, {9, 0}, {72, 3, Scheme::cell}, {33, 5}}, rule});
    formats.push_back({TileSide::keys, {{40, 4}, {24, 16}}, rule});
    formats.push_back({TileSide::keys, {{24, 16}, {40, 6}}, rule});
    formats.push_back({TileSide::keys, 7, 8, {Granularity::per_token, 7, Scheme::min_max}});
    return formats;
}
std::vector<TileFormat> all_key_formats() {
    std::vector<TileFormat> formats = key_formats();
    for (const TileFormat& format : token_grid_formats()) formats.push_back(format);
    return formats;
}

TEST(TileScores, AreThoseOfTheDecodedTile) {
    Random random(kvplane_test::seed());
    AttentionScratch scratch(256);
    for (const TileFormat& format : all_key_formats()) {
        ASSERT_TRUE(reads_key_planes(format));
        const Index channels = format.channels();
        Matrix values = normal_matrix(tile_tokens, channels, random);
        values.col(channels / 2) *= 20.0f;
        values.col(0).array() += 7.0f;
        const Encoded keys(format, values);
        for (const Index rows : {Index{1}, Index{3}, Index{8}, row_block_rows}) {
            if (rows == row_block_rows && random() % 8 != 0) continue;
            const Matrix queries = normal_matrix(rows, channels, random);
            const Matrix exact = queries * keys.decoded.transpose();
            Matrix first;
            for_each_isa([&](Isa isa) {
                Matrix scores(rows, tile_tokens);
                tile_scores(isa, format, {.tile = keys.tile.data(), .next = keys.tile.data()},
                            {queries.data(), channels, rows}, offsets, scratch, scores.data());
                for (Index r = 0; r < rows; ++r) {
                    const double bound = score_bound(keys, queries.row(r));
                    const double off = (scores.row(r) - exact.row(r)).cwiseAbs().maxCoeff();
                    ASSERT_LE(off, bound + 1e-4 * (1.0 + exact.row(r).cwiseAbs().maxCoeff()))
                        << format.segments()[0].bits << " bits, " << channels << " channels";
                }
                if (first.size() == 0) first = scores;
                // The same integers; float sums of other lengths around them. A factor that lies within fp32 rounding
                // of two integers may become either: one unit, of which T14 counts half of one for each channel.
                int apart = 0;
                for (Index r = 0; r < rows; ++r) {
                    const double off = (scores.row(r) - first.row(r)).cwiseAbs().maxCoeff(),
                                 fp32 = 1e-4 * (1.0 + exact.cwiseAbs().maxCoeff());
                    apart += off > fp32;
                    ASSERT_LE(off, fp32 + 2.0 * score_bound(keys, queries.row(r)) /
                                              static_cast<double>(std::min<Index>(channels, 8)))
                        << format.segments()[0].bits << " bits, " << channels << " channels";
                }
                ASSERT_LE(apart, 1);
            });
        }
    }
}

/// Runs of channels that do not begin at a unit of every plane, as narrower tiles have them, are not read.
TEST(TileScores, NeedRunsOfWholeUnits) {
    for (const int bits : {1, 4, 8})
        for (const Index group : {1, 7, 16, 24, 40, 48}) {
            const GridRule rule{Granularity::per_token, group, Scheme::full_range};
            EXPECT_FALSE(reads_key_planes({TileSide::keys, 64, bits, rule}));
            EXPECT_TRUE(reads_key_planes({TileSide::keys, group, bits, rule}));
            EXPECT_FALSE(reads_key_planes({TileSide::keys, {{group, bits}, {group + 1, bits}}, rule}));
            EXPECT_FALSE(reads_key_planes({TileSide::values, group, bits, rule}));
        }
}

/// The factors that are kept are those of the same queries, bit for bit, and of a segment that is read alike.
TEST(TileScores, FollowTheQueries) {
    Random random(kvplane_test::seed());
    const auto format = [](Index channels, int bits, Index group, Scheme scheme) {
        return TileFormat(TileSide::keys, channels, bits, {Granularity::per_token, group, scheme});
    };
    const TileFormat formats[] = {format(64, 8, 32, Scheme::min_max),   format(64, 5, 32, Scheme::min_max),
                                  format(64, 8, 64, Scheme::min_max),   format(64, 8, 32, Scheme::full_range),
                                  format(64, 8, 32, Scheme::unbiased),  format(40, 8, 32, Scheme::min_max),
                                  format(64, 4, 32, Scheme::full_range)};
    std::vector<Encoded> tiles;
    for (const TileFormat& each : formats)
        tiles.emplace_back(each, normal_matrix(tile_tokens, each.channels(), random));
    AttentionScratch kept(64);
    Matrix queries = normal_matrix(5, 64, random);
    for (int round = 0; round < 200; ++round) {
        const Encoded& tile = tiles[random() % tiles.size()];
        const Index rows = 1 + static_cast<Index>(random() % 5);
        if (random() % 2 == 0)
            queries(static_cast<Index>(random() % 5), static_cast<Index>(random() % 64)) *= -1.0f;
        const Isa isa = random() % 2 == 0 ? Isa::scalar : current_isa();
        AttentionScratch fresh(64);
        Matrix scores[2] = {Matrix(rows, tile_tokens), Matrix(rows, tile_tokens)};
        for (const bool is_fresh : {false, true})
            tile_scores(isa, tile.format, {.tile = tile.tile.data(), .next = tile.tile.data()},
                        {queries.data(), 64, rows}, offsets, is_fresh ? fresh : kept,
                        scores[is_fresh].data());
        ASSERT_EQ(scores[0], scores[1]) << "round " << round;
    }
}

/// T14 over all magnitudes: from factors that count as 0, subnormal ones among them, to sums near the
/// largest float.
TEST(TileScores, KeepTheBoundAtEveryMagnitude) {
    Random random(kvplane_test::seed());
    AttentionScratch scratch(64);
    for (const GridRule& rule : {GridRule{Granularity::per_channel, 128, Scheme::min_max},
                                 GridRule{Granularity::per_token, 32, Scheme::min_max}})
        for (const int bits : {2, 4, 8})
            for (const float step : {1e-4f, 1.0f, 4266.0f * 15.0f / 255.0f}) {
                const TileFormat format(TileSide::keys, 64, bits, rule);
                Matrix values = normal_matrix(tile_tokens, 64, random);
                values *= step * (std::exp2(static_cast<float>(bits)) - 1.0f) /
                          (2.0f * values.cwiseAbs().maxCoeff());
                const Encoded keys(format, values);
                const Matrix direction = normal_matrix(4, 64, random);
                // Of 64 products up to 3 times 32,000.
                for (float magnitude = 1e-44f; magnitude < 1e31f; magnitude *= 10.0f) {
                    Matrix queries = magnitude * direction;
                    queries.row(3).tail(63) *= 1e-6f;  // all other factors round to 0
                    const MatrixD exact = queries.cast<double>() * keys.decoded.cast<double>().transpose(),
                                  terms = queries.cast<double>().cwiseAbs() *
                                          keys.decoded.cast<double>().cwiseAbs().transpose();
                    for_each_isa([&](Isa isa) {
                        Matrix scores(4, tile_tokens);
                        tile_scores(isa, format, {.tile = keys.tile.data(), .next = keys.tile.data()},
                                    {queries.data(), 64, 4}, offsets, scratch, scores.data());
                        for (Index r = 0; r < 4; ++r) {
                            const double off =
                                (scores.row(r).cast<double>() - exact.row(r)).cwiseAbs().maxCoeff();
                            ASSERT_LE(off, score_bound(keys, queries.row(r)) +
                                               1e-5 * terms.row(r).maxCoeff() + 1e-44)
                                << bits << " bits, steps of " << step << ", queries of " << magnitude
                                << ", row " << r;
                        }
                    });
                }
            }
}

/// By how much the first score of a query is off.
double error_of_first_score(const TileFormat& format, const Encoded& keys, const Matrix& query) {
    AttentionScratch scratch(query.cols());
    Matrix scores(1, tile_tokens);
    tile_scores(current_isa(), format, {.tile = keys.tile.data(), .next = keys.tile.data()},
                {query.data(), query.cols(), 1}, offsets, scratch, scores.data());
    const double exact = (query * keys.decoded.transpose())(0, 0);
    return std::abs(scores(0, 0) - exact);
}

/// T14 is tight: factors half a step off on every channel, codes at the top.
TEST(TileScores, ReachTheBoundOfRounding) {
    const TileFormat format(TileSide::keys, 64, 4, {Granularity::per_channel, 128, Scheme::min_max});
    Matrix values = Matrix::Constant(tile_tokens, 64, 15.0f);
    values.row(1).setZero();
    const Encoded keys(format, values);
    Matrix queries = Matrix::Constant(1, 64, 63.5f);  // between two factors, if the largest is 127
    queries(0, 0) = 127.0f;
    const double error = error_of_first_score(format, keys, queries);
    EXPECT_GT(error, 0.99 * 63 * 0.5 * 7.5);
    EXPECT_LE(error, 1.02 * score_bound(keys, queries.row(0)));
}

/// The same by token: a step of 1, so that factors are off by half of one where they are halves.
TEST(TileScores, ReachTheBoundOfRoundingByToken) {
    const TileFormat format(TileSide::keys, 64, 4, {Granularity::per_token, 32, Scheme::min_max});
    Matrix values = Matrix::Constant(tile_tokens, 64, 15.0f);
    values.col(0).setZero();  // of both runs of channels, so that steps are 1
    values.col(32).setZero();
    const Encoded keys(format, values);
    Matrix queries = Matrix::Constant(1, 64, 63.5f);
    queries(0, 0) = queries(0, 32) = 127.0f;
    const double error = error_of_first_score(format, keys, queries);
    EXPECT_GT(error, 0.99 * 62 * 0.5 * 7.5);
    EXPECT_LE(error, 1.02 * score_bound(keys, queries.row(0)));
}

TEST(TileValues, IsThatOfTheDecodedTile) {
    Random random(kvplane_test::seed());
    AttentionScratch scratch(256);
    for (const Scheme scheme :
         {Scheme::cell, Scheme::min_max, Scheme::symmetric, Scheme::full_range, Scheme::unbiased})
        for (int bits = scheme == Scheme::symmetric ? 2 : 1; bits <= 8; ++bits)
            for (const Index channels : {16, 40, 64, 80, 96, 256})
                for (const Index group : {Index{16}, Index{32}, whole_head})
                    for (const Index tokens : {1, 77, 128}) {
                        const TileFormat format(TileSide::values, channels, bits,
                                                {Granularity::per_token, group, scheme});
                        ASSERT_TRUE(reads_value_planes(format));
                        const Encoded encoded(format, normal_matrix(tokens, channels, random));
                        const Index rows = 1 + static_cast<Index>(random() % 8),
                                    stride = (channels + 15) / 16 * 16;
                        Matrix weights = normal_matrix(rows, tile_tokens, random).array().exp();
                        weights.rightCols(tile_tokens - tokens).setZero();
                        const Matrix exact = weights * encoded.decoded;
                        for_each_isa([&](Isa isa) {
                            Matrix output = Matrix::Constant(rows, stride, 1.0f);
                            add_tile_values(isa, format,
                                            {.tile = encoded.tile.data(), .next = encoded.tile.data()},
                                            weights.data(), scratch, {output.data(), stride, rows});
                            for (Index r = 0; r < rows; ++r) {
                                const double bound = output_bound(encoded, weights.row(r));
                                ASSERT_LE((output.row(r).head(channels).array() - 1.0f - exact.row(r).array())
                                              .abs()
                                              .maxCoeff(),
                                          bound + 1e-4 * (1.0 + exact.row(r).cwiseAbs().maxCoeff()))
                                    << bits << " bits, " << channels << " channels, group " << group << ", "
                                    << tokens;
                            }
                        });
                    }
}

/// A tile as read with so many planes of each unit; the middle of its grid where none is read.
Matrix partly_read(const Encoded& encoded, const std::vector<std::uint8_t>& planes) {
    const bool keys = encoded.format.side() == TileSide::keys;
    TileCoder coder(encoded.format);
    Matrix all = Matrix::Zero(tile_tokens, encoded.format.channels()), at_depth = all;
    std::size_t unit = 0;
    for (const TileFormat::Placed& s : encoded.format.segments()) {
        if (s.bits == 0) continue;
        const std::vector<float> step = steps(encoded.tile, s);
        const auto* lower = reinterpret_cast<const Eigen::half*>(encoded.tile.data() + s.lower_at);
        const Index depth = plane_group_size(s.split), size = keys ? s.channels : tile_tokens;
        for (Index first = 0; first < size; first += depth, ++unit) {
            const Index count = std::min(depth, size - first), have = planes[unit];
            const auto block = [&](Matrix& m) {
                return keys ? m.block(0, s.first_channel + first, tile_tokens, count)
                            : m.block(first, 0, count, s.channels);
            };
            if (have > 0) {
                coder.decode(encoded.tile.data(), tile_tokens, s.split.prefix_bits(static_cast<int>(have)),
                             at_depth.data(), at_depth.cols());
                block(all) = block(at_depth);
                continue;
            }
            const Index group = encoded.format.rule().group;
            for (Index i = 0; i < count; ++i)
                for (Index other = 0; other < (keys ? tile_tokens : s.channels); ++other) {
                    const Index g = keys ? other / group * s.channels + first + i
                                         : other / std::min(group, s.channels) * tile_tokens + first + i;
                    const float width = step[static_cast<std::size_t>(g)];
                    const float middle = s.scheme == Scheme::unbiased ? 0.0f
                                         : s.scheme == Scheme::symmetric || s.scheme == Scheme::full_range
                                             ? -0.5f * width
                                             : static_cast<float>(lower[g]) + std::ldexp(width, s.bits - 1);
                    (keys ? all(other, s.first_channel + first + i) : all(first + i, other)) = middle;
                }
        }
    }
    return all;
}
/// some: of the units, about; of others no plane is read.
std::vector<std::uint8_t> random_planes(const TileFormat& format, double some, Random& random) {
    std::vector<std::uint8_t> planes;
    std::bernoulli_distribution any(some);
    for (const TileFormat::Placed& s : format.segments()) {
        if (s.bits == 0) continue;
        const Index depth = plane_group_size(s.split),
                    size = format.side() == TileSide::keys ? s.channels : tile_tokens;
        for (Index first = 0; first < size; first += depth)
            planes.push_back(
                any(random) ? static_cast<std::uint8_t>(random() % static_cast<unsigned>(s.split.count + 1))
                            : std::uint8_t{0});
    }
    EXPECT_EQ(static_cast<Index>(planes.size()), plane_groups(format));
    return planes;
}

/// Any planes of any units: what is read counts as the prefix of its code, what is not as the middle.
TEST(PartialReads, AreThoseOfThePrefix) {
    Random random(kvplane_test::seed());
    AttentionScratch scratch(256);
    for (const TileFormat& format : key_formats())
        for (const double some : {1.0, 0.2, 0.0}) {
            const Encoded keys(format, normal_matrix(tile_tokens, format.channels(), random));
            const std::vector<std::uint8_t> planes = random_planes(format, some, random);
            const Index rows = 1 + static_cast<Index>(random() % 8);
            const Matrix queries = normal_matrix(rows, format.channels(), random),
                         exact = queries * partly_read(keys, planes).transpose();
            for_each_isa([&](Isa isa) {
                Matrix scores(rows, tile_tokens);
                tile_scores(isa, format,
                            {.tile = keys.tile.data(), .next = keys.tile.data(), .planes = planes.data()},
                            {queries.data(), format.channels(), rows}, offsets, scratch, scores.data());
                for (Index r = 0; r < rows; ++r)
                    ASSERT_LE(
                        (scores.row(r) - exact.row(r)).cwiseAbs().maxCoeff(),
                        score_bound(keys, queries.row(r)) + 1e-4 * (1.0 + exact.row(r).cwiseAbs().maxCoeff()))
                        << format.segments()[0].bits << " bits, " << format.channels() << " channels";
            });
        }
    for (const Scheme scheme : {Scheme::cell, Scheme::symmetric, Scheme::full_range, Scheme::unbiased})
        for (int bits = 2; bits <= 8; ++bits)
            for (const Index channels : {16, 40, 128})
                for (const auto& [group, some] : {std::pair{Index{16}, 1.0},
                                                  {whole_head, 1.0},
                                                  {Index{16}, 0.0},
                                                  {whole_head, 0.0},
                                                  {whole_head, 0.2}}) {
                    const TileFormat format(TileSide::values, channels, bits,
                                            {Granularity::per_token, group, scheme});
                    const Encoded values(format, normal_matrix(tile_tokens, channels, random));
                    const std::vector<std::uint8_t> planes = random_planes(format, some, random);
                    const Index rows = 1 + static_cast<Index>(random() % 8),
                                stride = (channels + 15) / 16 * 16;
                    const Matrix weights = normal_matrix(rows, tile_tokens, random).array().exp(),
                                 exact = weights * partly_read(values, planes);
                    for_each_isa([&](Isa isa) {
                        Matrix output = Matrix::Zero(rows, stride);
                        add_tile_values(
                            isa, format,
                            {.tile = values.tile.data(), .next = values.tile.data(), .planes = planes.data()},
                            weights.data(), scratch, {output.data(), stride, rows});
                        for (Index r = 0; r < rows; ++r)
                            ASSERT_LE((output.row(r).head(channels) - exact.row(r)).cwiseAbs().maxCoeff(),
                                      output_bound(values, weights.row(r)) +
                                          1e-4 * (1.0 + exact.row(r).cwiseAbs().maxCoeff()))
                                << bits << " bits, " << channels << " channels";
                    });
                }
}

/// fp16 planes: each unit as TileCoder reads it at that depth, and left out where no plane is read.
TEST(PartialReads, OfHalfPlanesAreThoseOfTheDecodedTile) {
    Random random(kvplane_test::seed());
    AttentionScratch scratch(256);
    for (const TileSide side : {TileSide::keys, TileSide::values})
        for (const Index channels : {1, 7, 20, 64, 96, 128}) {
            const bool keys = side == TileSide::keys;
            const TileFormat format(side, channels, 16, {Granularity::per_token, whole_head});
            ASSERT_TRUE(keys ? reads_key_planes(format) : reads_value_planes(format));
            Matrix values = normal_matrix(tile_tokens, channels, random);
            values.row(3) *= 1e-6f;  // subnormal, and what fp16 has at its end
            values.row(4).setConstant(65504.0f);
            values.row(5).setConstant(-0.0f);
            const Encoded tile(format, values);
            std::vector<Matrix> at_depth(4, Matrix::Zero(tile_tokens, channels));
            TileCoder coder(format);
            for (int have = 1; have <= 3; ++have)
                coder.decode(tile.tile.data(), tile_tokens, 4 + 4 * have,
                             at_depth[static_cast<std::size_t>(have)].data(), channels);
            EXPECT_EQ(at_depth[3], values.cast<Eigen::half>().cast<float>());
            for (const int which : {-1, 1, 2, 3}) {
                std::vector<std::uint8_t> planes(static_cast<std::size_t>(plane_groups(format)));
                Matrix read(tile_tokens, channels);
                for (Index i = 0; i < (keys ? channels : tile_tokens); ++i) {
                    std::uint8_t& have = planes[static_cast<std::size_t>(i / 8)];
                    if (i % 8 == 0)
                        have = static_cast<std::uint8_t>(which < 0 ? static_cast<int>(random() % 4) : which);
                    if (keys)
                        read.col(i) = at_depth[have].col(i);
                    else
                        read.row(i) = at_depth[have].row(i);
                }
                const Index rows = 1 + static_cast<Index>(random() % 20), stride = padded_channels(channels);
                const Matrix x = normal_matrix(rows, keys ? channels : tile_tokens, random),
                             exact = keys ? Matrix(x * read.transpose()) : Matrix(x * read),
                             scale = keys ? Matrix(x.cwiseAbs() * read.cwiseAbs().transpose())
                                          : Matrix(x.cwiseAbs() * read.cwiseAbs());
                for_each_isa([&](Isa isa) {
                    Matrix out = Matrix::Constant(rows, keys ? tile_tokens : stride, 1.0f);
                    if (keys)
                        tile_scores(
                            isa, format,
                            {.tile = tile.tile.data(), .next = tile.tile.data(), .planes = planes.data()},
                            {x.data(), channels, rows}, offsets, scratch, out.data());
                    else
                        add_tile_values(
                            isa, format,
                            {.tile = tile.tile.data(), .next = tile.tile.data(), .planes = planes.data()},
                            x.data(), scratch, {out.data(), stride, rows});
                    const float there = keys ? 0.0f : 1.0f;
                    for (Index r = 0; r < rows; ++r)
                        for (Index i = 0; i < exact.cols(); ++i)
                            ASSERT_LE(std::abs(out(r, i) - there - exact(r, i)), 2e-6f * (1.0f + scale(r, i)))
                                << channels << " channels, " << which << " at " << i;
                });
            }
        }
}

}  // namespace
