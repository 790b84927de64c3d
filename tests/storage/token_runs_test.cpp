// Tiles whose tokens have different widths: each token is what a tile of its width alone would hold.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "attention/kernels/plane_dot_support.hpp"
#include "kvplane/attention/tile_attention.hpp"
#include "kvplane/storage/narrow.hpp"
#include "kvplane/storage/tile_coder.hpp"
#include "kvplane/theory/bounds.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane::detail;
using namespace kvplane_test;

const std::vector<std::vector<TokenRun>> profiles{
    {{32, 4}, {32, 2}, {64, 1}},          {{16, 4}, {48, 2}, {64, 1}}, {{16, 4}, {112, 2}},
    {{32, 5}, {32, 3}, {32, 2}, {32, 1}}, {{16, 8}, {16, 6}, {96, 3}}, {{64, 7}, {32, 4}, {32, 1}}};

GridRule rule(Scheme scheme, Index group) {
    return {Granularity::per_token, group, scheme, Clip::none};
}

struct Encoded {
    Encoded(const TileFormat& tile_format, const Matrix& values, const std::vector<double>& weights)
        : format(tile_format), coder(format), tile(static_cast<std::size_t>(format.bytes())) {
        coder.weigh(weights);
        coder.encode(head_rows(values), "values", {}, tile.data());
    }
    Matrix decoded(Index tokens = tile_tokens) {
        Matrix numbers = Matrix::Constant(tile_tokens, format.channels(), -1e30f);
        coder.decode(tile.data(), tokens, numbers.data(), numbers.cols());
        return numbers;
    }
    TileFormat format;
    TileCoder coder;
    Tile tile;
};

/// body(format, tokens, weights) for many shapes.
template <class Body>
void for_each_format(const Body& body) {
    Random random(seed());
    for (const auto& runs : profiles)
        for (const Scheme scheme : {Scheme::unbiased, Scheme::min_max})
            for (const Index channels : {1, 16, 40, 64, 200})
                for (const Index group : {Index{32}, whole_head}) {
                    Matrix values = normal_matrix(tile_tokens, channels, random);
                    for (Index t = 0; t < tile_tokens; ++t)
                        values.row(t) *= std::exp(normal_matrix(1, 1, random)(0, 0));
                    std::vector<double> weights(tile_tokens);
                    for (double& weight : weights)
                        weight = std::exp(3.0 * static_cast<double>(normal_matrix(1, 1, random)(0, 0)));
                    body(TileFormat(channels, runs, rule(scheme, group)), values, weights);
                }
}

/// Those that count most are the widest, and every token is decoded as in a tile of its width alone.
TEST(TokenRuns, HoldEveryTokenInItsWidth) {
    for_each_format([](const TileFormat& format, const Matrix& values, const std::vector<double>& weights) {
        Encoded encoded(format, values, weights);
        ASSERT_TRUE(runs_are_whole(format, encoded.tile.data()));
        const TokenOfRow token_of_row = read_runs(format, encoded.tile.data());
        const Matrix decoded = encoded.decoded();
        const auto worth = [&](Index t) {
            return weights[static_cast<std::size_t>(t)] * values.row(t).cast<double>().squaredNorm();
        };
        double least = std::numeric_limits<double>::infinity();
        for (std::size_t run = 0; run < format.segments().size(); ++run) {
            const TileFormat::Placed& segment = format.segments()[run];
            const TileFormat alone(TileSide::values, format.channels(), segment.bits, format.rule());
            TileCoder coder(alone);
            Tile tile(static_cast<std::size_t>(alone.bytes()));
            coder.encode(head_rows(values), "values", {}, tile.data());
            Matrix expected(tile_tokens, format.channels());
            coder.decode(tile.data(), tile_tokens, expected.data(), expected.cols());
            double largest = 0.0, smallest = std::numeric_limits<double>::infinity();
            for (Index row = 0; row < segment.rows; ++row) {
                const Index t = token_of_row[static_cast<std::size_t>(segment.first_row + row)];
                ASSERT_EQ(run_of_token(format, encoded.tile.data(), t), static_cast<int>(run));
                ASSERT_EQ(decoded.row(t), expected.row(t)) << segment.bits << " bits, token " << t;
                largest = std::max(largest, worth(t));
                smallest = std::min(smallest, worth(t));
            }
            ASSERT_LE(largest, least * (1.0 + 1e-12));
            least = smallest;
        }
        ASSERT_LE((decoded - values).cwiseAbs().maxCoeff(),
                  encoded.coder.error_bound(encoded.tile.data(), tile_tokens) +
                      encoded.coder.excess().largest + 1e-6);
    });
}

/// Of tokens that are worth the same the earlier ones are wider.
TEST(TokenRuns, GiveEqualTokensTheirWidthsInOrder) {
    const TileFormat format(40, profiles[0], rule(Scheme::unbiased, whole_head));
    Matrix values = Matrix::Ones(tile_tokens, 40);
    values.row(100) *= 3.0f;
    values.row(3) *= 0.5f;
    Encoded encoded(format, values, {});
    const TokenOfRow token_of_row = read_runs(format, encoded.tile.data());
    TokenOfRow expected;
    std::size_t row = 0;
    const auto add = [&](int first, int last) {
        for (int t = first; t <= last; ++t)
            if (t != 3) expected[row++] = static_cast<std::uint8_t>(t);
    };
    add(0, 31);
    expected[row++] = 100;  // behind 31 others
    add(32, 63);
    expected[row++] = 3;
    add(64, 99);
    add(101, 127);
    ASSERT_EQ(row, expected.size());
    EXPECT_EQ(token_of_row, expected);
}

/// The type of the rows, and how they stand in memory, change nothing.
TEST(TokenRuns, AreTheSameFromRowsOfAnyKind) {
    Random random(seed());
    for (const Index channels : {40, 64}) {
        const TileFormat format(channels, profiles[1], rule(Scheme::unbiased, 32));
        const RowMajorMatrix<Eigen::half> halves =
            normal_matrix(tile_tokens + 3, 2 * channels, random).cast<Eigen::half>();
        const Matrix floats = halves.cast<float>();
        std::vector<Tile> tiles;
        for_each_isa([&](Isa) {
            const auto encode = [&](const auto& rows) {
                TileCoder coder(format);
                Tile tile(static_cast<std::size_t>(format.bytes()));
                coder.encode(rows, "values", {.head = 1, .first = 2}, tile.data());
                tiles.push_back(std::move(tile));
            };
            encode(head_rows(halves, 2));
            encode(head_rows(floats, 2));
            const Eigen::MatrixXf by_channel = floats;  // channels of a token far apart
            encode(head_rows(by_channel, 2));
        });
        for (const Tile& tile : tiles) ASSERT_EQ(tile, tiles[0]) << channels << " channels";
    }
}

/// Bits add up: runs, a byte or more of grids for each token, and codes without padding between runs.
TEST(TokenRuns, TakeTheMeanOfTheirWidths) {
    const TileFormat format(64, profiles[0], rule(Scheme::unbiased, whole_head));
    EXPECT_EQ(format.run_planes(), 2);
    EXPECT_EQ(format.grid_bytes(), 192);  // 32 of runs and 128 of steps, in whole units
    EXPECT_EQ(format.bytes(), 192 + 128 * 64 * 2 / 8);
    EXPECT_DOUBLE_EQ(format.bits_per_element(), 2.0 + 192.0 / 1024.0);
    EXPECT_EQ(TileFormat(64, profiles[2], rule(Scheme::unbiased, whole_head)).run_planes(), 1);
}

/// A prefix of the tokens, and tokens that are cleared.
TEST(TokenRuns, ArePartlyDecodedAndCleared) {
    for_each_format([](const TileFormat& format, const Matrix& values, const std::vector<double>& weights) {
        Encoded encoded(format, values, weights);
        const Matrix all = encoded.decoded(), some = encoded.decoded(77);
        ASSERT_EQ(some.topRows(77), all.topRows(77));
        ASSERT_TRUE((some.bottomRows(tile_tokens - 77).array() == -1e30f).all());
        encoded.coder.clear(encoded.tile.data(), 30, 90);
        const Matrix cleared = encoded.decoded();
        ASSERT_EQ(cleared.topRows(30), all.topRows(30));
        ASSERT_EQ(cleared.bottomRows(38), all.bottomRows(38));
        ASSERT_TRUE((cleared.middleRows(30, 60).array() == 0.0f).all());
        ASSERT_LE(encoded.coder.error_bound(encoded.tile.data(), 30, 90), 0x1p-24);
    });
}

/// Weighted sums on packed bits, on every instruction set: those of the decoded tile within T14.
TEST(TokenRuns, AreSummedOnPackedBits) {
    Random random(seed());
    AttentionScratch scratch(256);
    for_each_format([&](const TileFormat& format, const Matrix& values, const std::vector<double>& worth) {
        ASSERT_TRUE(reads_value_planes(format));
        Encoded encoded(format, values, worth);
        const Matrix decoded = encoded.decoded();
        const Index rows = 1 + static_cast<Index>(random() % 8), channels = format.channels(),
                    stride = padded_channels(channels);
        Matrix weights = normal_matrix(rows, tile_tokens, random).array().exp();
        weights.rightCols(static_cast<Index>(random() % 40)).setZero();
        const MatrixD exact = weights.cast<double>() * decoded.cast<double>();
        for_each_isa([&](Isa isa) {
            Matrix output = Matrix::Zero(rows, stride);
            add_tile_values(isa, format, {.tile = encoded.tile.data(), .next = encoded.tile.data()},
                            weights.data(), scratch, {output.data(), stride, rows});
            for (Index r = 0; r < rows; ++r) {
                // Runs may share the scale of the largest product.
                const TokenOfRow tokens = read_runs(format, encoded.tile.data());
                double largest = 0.0, bound = 0.0;
                for (const TileFormat::Placed& s : format.segments()) {
                    std::vector<Eigen::half> room(static_cast<std::size_t>(s.grids));
                    const Eigen::half* const step = steps_of(s, encoded.tile.data(), 0, s.grids, room.data());
                    for (Index g = 0; g < s.grids; ++g)
                        largest = std::max(
                            largest, static_cast<double>(static_cast<float>(step[g])) *
                                         static_cast<double>(weights(
                                             r, tokens[static_cast<std::size_t>(s.first_row + g % s.rows)])));
                }
                for (const TileFormat::Placed& s : format.segments())
                    bound += theory::rounded_factors_error(s.bits, s.split.shift(0), s.rows, largest);
                const double scale =
                    (weights.row(r).cast<double>() * decoded.cwiseAbs().cast<double>()).maxCoeff();
                ASSERT_LE((output.row(r).head(channels).cast<double>() - exact.row(r)).cwiseAbs().maxCoeff(),
                          bound + 1e-5 * scale)
                    << name(isa);
            }
        });
    });
}

TEST(TokenRuns, AreNarrowedToWhatTheyAre) {
    const TileFormat format(64, profiles[0], rule(Scheme::unbiased, whole_head));
    EXPECT_EQ(narrowed(format, 4), format);
    EXPECT_NE(refusal(ErrorCode::option, [&] { (void)narrowed(format, 3); }).find("expected 4 or more"),
              std::string::npos);
}

TEST(TokenRuns, OfAnotherTileAreTold) {
    const TileFormat format(32, profiles[0], rule(Scheme::unbiased, whole_head));
    Tile tile(static_cast<std::size_t>(format.bytes()));
    EXPECT_FALSE(runs_are_whole(format, tile.data()));
    TokenOfRow order;
    std::iota(order.begin(), order.end(), std::uint8_t{0});
    write_runs(format, order, tile.data());
    EXPECT_TRUE(runs_are_whole(format, tile.data()));
    tile.data()[3] ^= std::byte{1};
    EXPECT_FALSE(runs_are_whole(format, tile.data()));
    // Whatever stands there, rows are of tokens.
    for (std::byte& byte : std::span(tile.data(), 32)) byte = std::byte{0xFF};
    for (const int token : read_runs(format, tile.data())) EXPECT_LT(token, tile_tokens);
}

TEST(TokenRuns, RefuseWhatCannotBe) {
    const GridRule unbiased = rule(Scheme::unbiased, whole_head);
    const auto refused = [&](const std::vector<TokenRun>& runs, const GridRule& grids) {
        return refusal(ErrorCode::option, [&] { TileFormat(64, runs, grids); });
    };
    EXPECT_NE(refused({{64, 4}, {32, 2}}, unbiased).find("widths for 96 tokens, expected 128"),
              std::string::npos);
    EXPECT_NE(refused({{128, 4}}, unbiased).find("1 widths of tokens, expected 2 to 4"), std::string::npos);
    EXPECT_NE(refused({{112, 4}, {16, 1}}, unbiased).find("16 tokens of 1 bits, expected a multiple of 32"),
              std::string::npos);
    EXPECT_NE(refused({{120, 4}, {8, 2}}, unbiased).find("expected a multiple of 16"), std::string::npos);
    EXPECT_NE(refused({{64, 2}, {64, 4}}, unbiased).find("each below the one before"), std::string::npos);
    EXPECT_NE(refused({{64, 2}, {64, 0}}, unbiased).find("0 bits"), std::string::npos);
    EXPECT_NE(refused({{64, 16}, {64, 2}}, unbiased).find("16 bits"), std::string::npos);
    refused(profiles[0], {Granularity::per_channel, 128, Scheme::min_max});
    // A part of a tile has no order.
    const TileFormat format(8, profiles[0], unbiased);
    TileCoder coder(format);
    Tile tile(static_cast<std::size_t>(format.bytes()));
    const Matrix values = Matrix::Ones(tile_tokens, 8);
    EXPECT_NE(refusal(ErrorCode::index,
                      [&] { coder.encode(head_rows(values), "values", {.count = 64}, tile.data()); })
                  .find("expected all 128 at once"),
              std::string::npos);
    Matrix bad = values;
    bad(70, 3) = std::numeric_limits<float>::quiet_NaN();
    EXPECT_NE(refusal(ErrorCode::not_finite, [&] { coder.encode(head_rows(bad), "values", {}, tile.data()); })
                  .find("token 70"),
              std::string::npos);
}

}  // namespace
