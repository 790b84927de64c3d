// The fused path on single tiles: integer sums against the definition, scores and outputs against decoding.
#include "kvplane/attention/decode.hpp"

#include <gtest/gtest.h>

#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using kvplane_test::for_each_isa;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using Tile = std::vector<std::byte, Eigen::aligned_allocator<std::byte>>;

// -- Integer sums ------------------------------------------------------------------------------------------

/// Straight from the layout: lane l, byte j, field i.
std::int32_t defined_sum(const Tile& plane, int width, Index units, Index block, int lane,
                         const std::int8_t* factors) {
    const int fields = 8 / width, mask = (1 << width) - 1;
    std::int32_t sum = 0;
    for (Index u = 0; u < units; ++u)
        for (int i = 0; i < fields; ++i)
            for (int j = 0; j < 4; ++j) {
                const auto byte = std::to_integer<int>(
                    plane[static_cast<std::size_t>((block * units + u) * 64 + lane * 4 + j)]);
                sum += (byte >> (i * width) & mask) * factors[(u * fields + i) * 4 + j];
            }
    return sum;
}

TEST(PlaneDot, EveryInstructionSetEqualsTheDefinition) {
    Random random(kvplane_test::seed());
    for (const int width : {1, 2, 4})
        for (const Index units : {1, 2, 3, 4, 5, 7, 8, 9, 16, 33})
            for (const Index rows : {1, 2, 3, 4, 5, 6, 7, 8})
                for (const bool extreme : {false, true}) {
                    const Index blocks = 3, stride = units * 32 / width + 32;
                    Tile plane(static_cast<std::size_t>(blocks * units * 64));
                    for (std::byte& byte : plane) byte = static_cast<std::byte>(extreme ? 255 : random());
                    std::vector<std::int8_t> factors(static_cast<std::size_t>(rows * stride));
                    for (std::int8_t& factor : factors)
                        factor = extreme ? (random() % 2 ? std::int8_t{-128} : std::int8_t{127})
                                         : static_cast<std::int8_t>(random());
                    if (extreme) std::fill_n(factors.begin(), stride, std::int8_t{-128});
                    for_each_isa([&](Isa isa) {
                        std::vector<std::int32_t> sums(static_cast<std::size_t>(blocks * rows * 16), 5);
                        detail::plane_dot_of(isa)(width, {plane.data(), plane.data(), blocks, units,
                                                          factors.data(), stride, rows, 3, sums.data()});
                        for (Index block = 0; block < blocks; ++block)
                            for (Index row = 0; row < rows; ++row)
                                for (int lane = 0; lane < 16; ++lane)
                                    ASSERT_EQ(
                                        sums[static_cast<std::size_t>((block * rows + row) * 16 + lane)],
                                        5 + 8 * defined_sum(plane, width, units, block, lane,
                                                            factors.data() + row * stride))
                                        << "width " << width << ", " << units << " units, row " << row
                                        << " of " << rows << ", lane " << lane;
                    });
                }
}

// -- Tiles -------------------------------------------------------------------------------------------------

struct Encoded {
    Encoded(const TileFormat& tile_format, const Matrix& values) : format(tile_format) {
        tile.resize(static_cast<std::size_t>(format.bytes()));
        TileCoder coder(format);
        coder.encode(head_rows(values), "values", 0, 0, values.rows(), 0, tile.data());
        decoded.setZero(tile_tokens, format.channels());
        coder.decode(tile.data(), values.rows(), decoded.data(), decoded.cols());
    }
    TileFormat format;
    Tile tile;
    Matrix decoded;
};

constexpr float offsets[fused_rows] = {};

/// T14 for keys: what rounding the folded factors adds to a score at most, over all segments.
double score_bound(const Encoded& keys, const Eigen::RowVectorXf& query) {
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
            // Codes are (2^b - 1) / 2 from their middle at most: on 8-bit factors; on two parts those below
            // the first plane, whose factors lack up to 128 of 32512, and all by the rounding of 16 bits.
            const double codes = std::ldexp(1.0, s.bits) - 1.0;
            const double below = s.bits > 4 ? std::ldexp(1.0, s.split.shift(0)) - 1.0 : codes;
            sum += static_cast<double>(s.channels) * largest * 0.5 *
                   (s.bits > 4 ? below * 129.0 / 32512.0 + codes * 0.51 / 32512.0 : codes * 0.51 / 127.0);
        }
        worst = std::max(worst, sum);
    }
    return worst;
}

std::vector<TileFormat> key_formats() {
    std::vector<TileFormat> formats;
    for (const Scheme scheme : {Scheme::cell, Scheme::min_max, Scheme::symmetric})
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

TEST(FusedScores, AreThoseOfTheDecodedTile) {
    Random random(kvplane_test::seed());
    FusedScratch scratch(256);
    for (const TileFormat& format : key_formats()) {
        ASSERT_TRUE(fused_keys(format));
        const Index channels = format.channels();
        Matrix values = normal_matrix(tile_tokens, channels, random);
        values.col(channels / 2) *= 20.0f;
        values.col(0).array() += 7.0f;
        const Encoded keys(format, values);
        for (const Index rows : {1, 3, 8}) {
            const Matrix queries = normal_matrix(rows, channels, random);
            const Matrix exact = queries * keys.decoded.transpose();
            Matrix first;
            for_each_isa([&](Isa isa) {
                Matrix scores(rows, tile_tokens);
                fused_scores(isa, format, keys.tile.data(), keys.tile.data(), queries.data(), channels, rows,
                             offsets, scratch, scores.data());
                for (Index r = 0; r < rows; ++r) {
                    const double bound = score_bound(keys, queries.row(r));
                    const double off = (scores.row(r) - exact.row(r)).cwiseAbs().maxCoeff();
                    ASSERT_LE(off, bound + 1e-4 * (1.0 + exact.row(r).cwiseAbs().maxCoeff()))
                        << format.segments()[0].bits << " bits, " << channels << " channels";
                }
                if (first.size() == 0) first = scores;
                // The same integers; float sums of other lengths around them.
                ASSERT_LE((scores - first).cwiseAbs().maxCoeff(), 1e-4 * (1.0 + exact.cwiseAbs().maxCoeff()));
            });
        }
    }
}

/// T14 is tight: factors half a step off on every channel, codes at the top.
TEST(FusedScores, ReachTheBoundOfRounding) {
    const TileFormat format(TileSide::keys, 64, 4, {Granularity::per_channel, 128, Scheme::min_max});
    Matrix values = Matrix::Constant(tile_tokens, 64, 15.0f);
    values.row(1).setZero();
    const Encoded keys(format, values);
    FusedScratch scratch(64);
    Matrix queries = Matrix::Constant(1, 64, 63.5f);  // between two factors, if the largest is 127
    queries(0, 0) = 127.0f;
    Matrix scores(1, tile_tokens);
    fused_scores(current_isa(), format, keys.tile.data(), keys.tile.data(), queries.data(), 64, 1, offsets,
                 scratch, scores.data());
    const double exact = (queries * keys.decoded.transpose())(0, 0);
    EXPECT_GT(std::abs(scores(0, 0) - exact), 0.99 * 63 * 0.5 * 7.5);
    EXPECT_LE(std::abs(scores(0, 0) - exact), 1.02 * score_bound(keys, queries.row(0)));
}

TEST(FusedOutput, IsThatOfTheDecodedTile) {
    Random random(kvplane_test::seed());
    FusedScratch scratch(256);
    for (const Scheme scheme : {Scheme::cell, Scheme::min_max, Scheme::symmetric})
        for (int bits = scheme == Scheme::symmetric ? 2 : 1; bits <= 8; ++bits)
            for (const Index channels : {16, 40, 64, 80, 96, 256})
                for (const Index group : {Index{16}, Index{32}, whole_head})
                    for (const Index tokens : {1, 77, 128}) {
                        const TileFormat format(TileSide::values, channels, bits,
                                                {Granularity::per_token, group, scheme});
                        ASSERT_TRUE(fused_values(format));
                        const Encoded encoded(format, normal_matrix(tokens, channels, random));
                        const Index rows = 1 + static_cast<Index>(random() % 8),
                                    stride = (channels + 15) / 16 * 16;
                        Matrix weights = normal_matrix(rows, tile_tokens, random).array().exp();
                        weights.rightCols(tile_tokens - tokens).setZero();
                        const Matrix exact = weights * encoded.decoded;
                        for_each_isa([&](Isa isa) {
                            Matrix output = Matrix::Constant(rows, stride, 1.0f);
                            fused_output(isa, format, encoded.tile.data(), encoded.tile.data(),
                                         weights.data(), rows, scratch, output.data(), stride);
                            for (Index r = 0; r < rows; ++r) {
                                // Half of 1/127 (two parts: 1/254 of the bits below the first plane) of the
                                // largest weight times step, for each token, on codes up to 2^b - 1.
                                const double range = 8.0, steps = std::ldexp(1.0, std::min(bits, 4));
                                const double bound =
                                    weights.row(r).maxCoeff() * range * static_cast<double>(tokens) *
                                    (bits > 4 ? 0.6 / 127.0 / 16.0 : 0.55 / 127.0) *
                                    (scheme == Scheme::symmetric ? 2.5 : 1.2) * (steps > 1.0 ? 1.0 : 2.0);
                                ASSERT_LE((output.row(r).head(channels).array() - 1.0f - exact.row(r).array())
                                              .abs()
                                              .maxCoeff(),
                                          bound + 1e-3)
                                    << bits << " bits, " << channels << " channels, group " << group << ", "
                                    << tokens;
                            }
                        });
                    }
}

TEST(FusedSoftmax, MergesInAnyGrouping) {
    Random random(kvplane_test::seed());
    constexpr float none = -std::numeric_limits<float>::infinity();
    for_each_isa([&](Isa isa) {
        Matrix scores = 6.0f * normal_matrix(2, tile_tokens, random);
        scores.row(1).setConstant(none);
        scores(0, 5) = none;
        Matrix weights = scores;
        float largest[2] = {none, none}, sum[2] = {0.0f, 0.0f};
        Matrix output = Matrix::Zero(2, 16);
        fused_softmax(isa, weights.data(), tile_tokens, 2, {largest, sum, output.data(), 16});
        double expected = 0.0;
        for (Index t = 0; t < tile_tokens; ++t) {
            const double w = std::exp(static_cast<double>(scores(0, t)) - scores.row(0).maxCoeff());
            expected += w;
            ASSERT_NEAR(weights(0, t), w, 3e-7);
        }
        EXPECT_EQ(weights(0, 5), 0.0f);
        EXPECT_NEAR(sum[0], expected, 1e-5 * expected);
        EXPECT_EQ(largest[1], none);
        EXPECT_EQ(weights.row(1).cwiseAbs().maxCoeff(), 0.0f);
    });
}

}  // namespace
