// The arithmetic of the CUDA kernels on the host: what 32 emulated lanes make of tiles, and of whole caches, against
// double precision.
#include "kvplane/cuda/tile_math.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/host_warp.hpp"
#include "kvplane/attention/reference.hpp"
#include "kvplane/cache/kv_cache.hpp"
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

constexpr float log2_e = 1.44269504f;

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

/// Scores of a tile against those of its decoded keys. bits: the widest.
template <class Math>
void expect_scores(Tile& tile, const KeyTileView& view, const Matrix& queries, int bits, int depth,
                   const std::string& name) {
    QueryMemory memory(queries, queries.cols());
    typename Math::Scores score;
    Math::score(memory.view(), tile.bytes.data(), view, score);
    const Matrix keys = tile.decoded(depth);
    const Eigen::MatrixXd exact = queries.cast<double>() * keys.cast<double>().transpose();
    for (int m = 0; m < 4; ++m)
        for (int s = 0; s < 4; ++s)
            for (int j = 0; j < 2; ++j)
                for (int lane = 0; lane < 32; ++lane) {
                    const int row = lane / 4;
                    const auto token = static_cast<Index>(score_token(
                                           m, static_cast<std::uint32_t>(lane % 4 * 2 + j), Math::value_chunk)) +
                                       s;
                    // Every factor is off by half a unit; a unit is the largest factor over 32512. A code's
                    // factor is its query times the step, which is at most a cell of the range of keys.
                    double most = 0.0, size = 0.0;
                    for (Index c = 0; c < keys.cols(); ++c) {
                        const double range = keys.col(c).maxCoeff() - keys.col(c).minCoeff();
                        most = std::max(most, std::abs(queries(row, c)) * 2.0 * (range + 0.01 * std::abs(keys(token, c))));
                        size += std::abs(queries(row, c) * keys(token, c));
                    }
                    // Fewer codes mean larger steps: range (2^bits - 1) / 2^bits at most counts.
                    const double bound = bits == 16 ? 3e-6 * size
                                                    : 0.5 * static_cast<double>(keys.cols()) * most / 32512.0 + 2e-6 * size;
                    ASSERT_NEAR(score[m][s][j][lane], exact(row, token), bound) << name << " row " << row << " token " << token;
                }
}

TEST(TileMath, ScoresAreThoseOfDecodedKeysAtEveryWidth) {
    Random random(kvplane_test::seed());
    const auto check = [&]<int bits, int channels>() {
        const GridRule rule{Granularity::per_channel, 128, scheme_for(bits), Clip::none};
        Tile tile(TileFormat(TileSide::keys, channels, bits, rule), rows_of(random, 128, channels));
        const Matrix queries = rows_of(random, 8, channels);
        const std::string name = std::to_string(bits) + " bits, " + std::to_string(channels) + " channels";
        using Made = TileMath<HostWarp, bits, octets_of(channels, bits == 16 ? 8 : least_chunk(bits)), bits, 4>;
        expect_scores<Made>(tile, key_tile_view(tile.format), queries, bits, 16, name);
        using General = TileMath<HostWarp, 0, 8, 0, 4>;
        expect_scores<General>(tile, key_tile_view(tile.format), queries, bits, 16, name + ", run time");
    };
    const auto every_width = [&]<int channels>() {
        check.template operator()<1, channels>();
        check.template operator()<2, channels>();
        check.template operator()<3, channels>();
        check.template operator()<4, channels>();
        check.template operator()<5, channels>();
        check.template operator()<6, channels>();
        check.template operator()<7, channels>();
        check.template operator()<8, channels>();
        check.template operator()<16, channels>();
    };
    every_width.template operator()<64>();
    every_width.template operator()<80>();
    every_width.template operator()<96>();
    every_width.template operator()<128>();
    every_width.template operator()<256>();
}

TEST(TileMath, GroupsOfTokensSegmentsAndPrefixesAreRead) {
    Random random(kvplane_test::seed());
    using General = TileMath<HostWarp, 0, 8, 0, 4>;
    for (const Index group : {32, 64, 128}) {
        const GridRule rule{Granularity::per_channel, group, Scheme::min_max, Clip::none};
        for (const std::vector<ChannelSegment>& segments :
             {std::vector<ChannelSegment>{{64, 4}}, {{8, 8}, {8, 6}, {16, 4}, {32, 2}}, {{5, 7}, {40, 3}, {11, 0}, {72, 1}}}) {
            const TileFormat format(TileSide::keys, segments, rule);
            Tile tile(format, rows_of(random, 128, format.channels()));
            Matrix queries = rows_of(random, 8, format.channels());
            expect_scores<General>(tile, key_tile_view(format), queries, 8, 16, "group " + std::to_string(group));
        }
    }
    for (const int bits : {3, 5, 6, 7, 8}) {
        const GridRule rule{Granularity::per_channel, 128, Scheme::min_max, Clip::none};
        Tile tile(TileFormat(TileSide::keys, 128, bits, rule), rows_of(random, 128, 128));
        const PlaneSplit split = plane_split(bits);
        for (int planes = 1; planes < split.count; ++planes)
            expect_scores<General>(tile, key_tile_view(tile.format, planes), rows_of(random, 8, 128), bits,
                                   split.prefix_bits(planes), std::to_string(planes) + " planes of " + std::to_string(bits));
    }
}

/// Output of one tile against that of its decoded values, for given scores.
template <class Math>
void expect_values(Tile& tile, const ValueTileView& view, const Matrix& scores, int depth, const std::string& name) {
    typename Math::Scores score;
    for (int m = 0; m < 4; ++m)
        for (int s = 0; s < 4; ++s)
            for (int j = 0; j < 2; ++j)
                for (int lane = 0; lane < 32; ++lane)
                    score[m][s][j][lane] = scores(
                        lane / 4, static_cast<Index>(score_token(m, static_cast<std::uint32_t>(lane % 4 * 2 + j),
                                                                 Math::value_chunk)) +
                                      s);
    typename Math::State state;
    Math::begin(state);
    const auto factor = Math::weigh(score, state);
    Math::add_values(tile.bytes.data(), view, score, factor, state);
    Math::finish(state);
    const Matrix values = tile.decoded(depth);
    for (int row = 0; row < 8; ++row) {
        const Eigen::VectorXd weights = (scores.row(row).cast<double>().array() - scores.row(row).maxCoeff())
                                            .unaryExpr([](double x) { return std::exp2(x); })
                                            .matrix();
        const double sum = weights.sum();
        EXPECT_NEAR(state.softmax.sum[4 * row], sum, 1e-5 * sum) << name;
        for (Index c = 0; c < values.cols(); ++c) {
            const double exact = weights.dot(values.col(c).cast<double>()) / sum;
            const auto block = static_cast<std::size_t>(c / 32);
            const int in_block = static_cast<int>(c % 32);
            const double found = state.out[block][in_block % 4][in_block % 8 / 4][4 * row + in_block / 8] / sum;
            // A weight is off by half of 1 / 65500 of the largest step; a step is at most a token's range.
            double bound = 3e-6 * values.cwiseAbs().maxCoeff();
            for (Index t = 0; t < 128; ++t)
                bound += 0.5 / 65500.0 * 2.0 * (values.maxCoeff() - values.minCoeff()) / sum;
            ASSERT_NEAR(found, exact, bound) << name << " row " << row << " channel " << c;
        }
    }
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
                const std::string name = std::to_string(bits) + " bits, " + std::to_string(channels) + " channels, " +
                                         kvplane::name(scheme) + " over " + std::to_string(run);
                using Made = TileMath<HostWarp, 4, 4, bits, (channels + 31) / 32>;
                expect_values<Made>(tile, value_tile_view(tile.format), scores, 16, name);
                using General = TileMath<HostWarp, 0, 8, 0, (channels + 31) / 32>;
                expect_values<General>(tile, value_tile_view(tile.format), scores, 16, name + ", run time");
                if (bits == 16) return;
            }
    };
    const auto every_width = [&]<int channels>() {
        check.template operator()<1, channels>();
        check.template operator()<2, channels>();
        check.template operator()<3, channels>();
        check.template operator()<4, channels>();
        check.template operator()<5, channels>();
        check.template operator()<6, channels>();
        check.template operator()<7, channels>();
        check.template operator()<8, channels>();
        check.template operator()<16, channels>();
    };
    every_width.template operator()<80>();
    every_width.template operator()<128>();
}

}  // namespace
