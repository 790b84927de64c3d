// Tiles: grids and codes stand where the layout of tile_format.hpp says, what was packed is read back at
// every depth and equals Quantized, however the tokens came in and whatever instruction set packed them.
#include "kvplane/storage/tile_coder.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "flushed_subnormals.hpp"
#include "kvplane/storage/quantized.hpp"
#include "storage/tile_support.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::ChannelSegment;
using kvplane::Clip;
using kvplane::ErrorCode;
using kvplane::Granularity;
using kvplane::Grid;
using kvplane::GridRule;
using kvplane::head_rows;
using kvplane::Index;
using kvplane::Matrix;
using kvplane::RowMajorMatrix;
using kvplane::Scheme;
using kvplane::TileFormat;
using kvplane::TileSide;
using kvplane::detail::TileCoder;
using kvplane_test::differing;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::refusal;
using kvplane_test::tiles::all_cases;
using kvplane_test::tiles::all_rules;
using kvplane_test::tiles::Case;
using kvplane_test::tiles::DocumentedSegment;
using kvplane_test::tiles::DocumentedTile;
using kvplane_test::tiles::Segments;
using kvplane_test::tiles::Tile;

Tile encoded(const Case& c, const Matrix& values) {
    const TileFormat format = c.format();
    Tile tile(static_cast<std::size_t>(format.bytes()), std::byte{0});
    TileCoder coder(format);
    coder.encode(head_rows(values), "values", {.count = values.rows()}, tile.data());
    return tile;
}

Matrix decoded(const Case& c, const Tile& tile, Index tokens, int depth = 16) {
    TileCoder coder(c.format());
    // The next row begins right after the channels of one: what is written beyond them would be seen.
    Matrix values = Matrix::Constant(tokens, c.channels(), -99.0f);
    coder.decode(tile.data(), tokens, depth, values.data(), values.cols());
    return values;
}

/// What a tile must decode to, from Quantized and from fp16 alone.
Matrix expected_values(const Case& c, const Matrix& values, int depth = 16) {
    Matrix expected = Matrix::Zero(values.rows(), values.cols());
    Index first = 0;
    for (const ChannelSegment& segment : c.segments) {
        const Index size = segment.channels;
        const int bits = segment.bits;
        GridRule rule = c.rule;
        rule.scheme = segment.scheme.value_or(rule.scheme);
        const auto part = values.middleCols(first, size);
        if (bits == 16)
            expected.middleCols(first, size) = part.unaryExpr([&](float x) {
                const int unread = 16 - std::min(depth, 16);
                const int kept = Eigen::half(x).x >> unread << unread;
                const int middle = unread == 0 ? 0 : 1 << (unread - 1);
                return static_cast<float>(
                    Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(kept | middle)));
            });
        else if (bits > 0)
            expected.middleCols(first, size) =
                quantize(head_rows(part), rule, bits, "values").dequantize(std::min(depth, bits));
        first += size;
    }
    return expected;
}

/// From numbers to bytes: grids by fit_grid and codes by Grid::encode, each at its documented place, and
/// zeros wherever no channel stands.
TEST(TileEncode, PutsGridsAndCodesWhereTheLayoutSays) {
    Random random(kvplane_test::seed());
    for (const Case& c : all_cases({1, 33, 64}, all_rules())) {
        SCOPED_TRACE(c.text());
        const Matrix values = normal_matrix(128, c.channels(), random);
        Tile tile = encoded(c, values);
        const DocumentedTile documented = c.documented();
        for (std::size_t s = 0; s < documented.segments.size(); ++s) {
            const DocumentedSegment& segment = documented.segments[s];
            const auto part = values.middleCols(segment.first_channel, segment.channels);
            for (Index i = 0; segment.bits == 16 && i < part.size(); ++i) {
                const Index t = i / segment.channels, k = i % segment.channels;
                ASSERT_EQ(documented.code(tile, s, t, k), Eigen::half(part(t, k)).x);
            }
            if (segment.grids == 0) continue;
            const bool by_channel = c.rule.granularity == Granularity::per_channel;
            for (Index t = 0; t < 128; ++t)
                for (Index k = 0; k < segment.channels; ++k) {
                    const Index first = (by_channel ? t : k) / c.rule.group * c.rule.group;
                    const Index size = std::min(c.rule.group, (by_channel ? 128 : segment.channels) - first);
                    const auto group =
                        by_channel ? part.block(first, k, size, 1) : part.block(t, first, 1, size);
                    const Grid stored = documented.grid(tile, s, t, k);
                    if (segment.scheme == Scheme::unbiased) {
                        const kvplane_test::UnbiasedGroup expected(group, segment.bits);
                        ASSERT_EQ(stored.step, expected.step) << "token " << t << ", channel " << k;
                        ASSERT_EQ(documented.code(tile, s, t, k), expected.encode(part(t, k)))
                            << "token " << t << ", channel " << k;
                        continue;
                    }
                    const Grid grid =
                        fit_grid(segment.scheme, segment.bits, group.minCoeff(), group.maxCoeff());
                    ASSERT_EQ(stored.lower, grid.lower) << "token " << t << ", channel " << k;
                    ASSERT_EQ(stored.step, grid.step) << "token " << t << ", channel " << k;
                    ASSERT_EQ(documented.code(tile, s, t, k), grid.encode(part(t, k)))
                        << "token " << t << ", channel " << k;
                }
        }
        // Taking away what is documented leaves nothing.
        for (const DocumentedSegment& segment : documented.segments) {
            const auto clear = [&](Index at, Index count) {
                std::fill_n(tile.begin() + at, count, std::byte{0});
            };
            if (segment.bits == 16 && c.side == TileSide::keys) clear(segment.exponent_at, segment.channels);
            if (segment.grids > 0) clear(segment.step_at, documented.step_bytes(segment) * segment.grids);
            if (segment.grids > 0 && documented.has_lower(segment))
                clear(segment.lower_at, 2 * segment.grids);
            for (std::size_t p = 0; p < segment.planes.size(); ++p)
                for (Index t = 0; t < 128; ++t)
                    for (Index k = 0; k < segment.channels; ++k) {
                        const int width = segment.planes[p];
                        const auto [byte, bit] = documented.place(segment.channels, width, t, k);
                        tile[static_cast<std::size_t>(segment.plane_at[p] + byte)] &=
                            ~static_cast<std::byte>(((1 << width) - 1) << bit);
                    }
        }
        ASSERT_TRUE(std::all_of(tile.begin(), tile.end(), [](std::byte b) { return b == std::byte{0}; }))
            << "padding is not zero";
    }
}

TEST(TileEncode, GivesTheSameBytesOnEveryInstructionSet) {
    Random random(kvplane_test::seed());
    for (const auto& [name, values] : kvplane_test::difficult_matrices(128, 112, random))
        for (const Case& c : all_cases({112}, all_rules())) {
            if (c.channels() != 112 && c.channels() != 105) continue;
            const Matrix part = values.leftCols(c.channels());
            Tile first;
            Matrix first_values;
            kvplane_test::for_each_isa([&](kvplane::Isa isa) {
                const Tile tile = encoded(c, part);
                const Matrix close = decoded(c, tile, 128);
                if (isa == kvplane::Isa::scalar) {
                    first = tile;
                    first_values = close;
                }
                ASSERT_TRUE(tile == first) << c.text();
                ASSERT_EQ(differing(close, first_values), 0) << c.text();
            });
        }
}

// -- Reading back -----------------------------------------------------------------------------------------

TEST(TileDecode, EqualsQuantizedAtEveryDepth) {
    Random random(kvplane_test::seed());
    for (const Case& c : all_cases({1, 33, 80}, all_rules())) {
        SCOPED_TRACE(c.text());
        const Matrix values = normal_matrix(128, c.channels(), random);
        const Tile tile = encoded(c, values);
        const bool has_fp16 = std::any_of(c.segments.begin(), c.segments.end(),
                                          [](const ChannelSegment& s) { return s.bits == 16; });
        for (int depth = 1; depth <= 16; ++depth) {
            if (has_fp16 && depth % 4 + (depth < 8) > 0) {
                refusal(ErrorCode::option, [&] { decoded(c, tile, 128, depth); });
                continue;
            }
            ASSERT_EQ(differing(decoded(c, tile, 128, depth), expected_values(c, values, depth)), 0)
                << "depth " << depth;
        }
    }
}

TEST(TileDecode, EveryLengthOfTheTail) {
    Random random(kvplane_test::seed());
    for (const Case& c : all_cases({33}, all_rules({Scheme::min_max}))) {
        SCOPED_TRACE(c.text());
        const Matrix values = normal_matrix(128, c.channels(), random);
        ASSERT_EQ(decoded(c, encoded(c, Matrix(0, c.channels())), 0).rows(), 0);
        for (Index tokens = 1; tokens <= 128; ++tokens) {
            const Matrix part = values.topRows(tokens);
            ASSERT_EQ(differing(decoded(c, encoded(c, part), tokens), expected_values(c, part)), 0)
                << tokens << " tokens";
        }
    }
}

/// Truncation lowers a tile's token count: fewer tokens of a full tile are its first ones.
TEST(TileDecode, FewerTokensThanItHolds) {
    Random random(kvplane_test::seed());
    for (const Case& c : all_cases({33}, all_rules({Scheme::cell}))) {
        const Matrix values = normal_matrix(128, c.channels(), random);
        const Tile tile = encoded(c, values);
        const Matrix whole = decoded(c, tile, 128);
        for (const Index tokens : {0, 1, 31, 32, 33, 100})
            ASSERT_EQ(differing(decoded(c, tile, tokens), whole.topRows(tokens)), 0) << c.text();
    }
}

TEST(TileDecode, WritesOnlyItsChannels) {
    Random random(kvplane_test::seed());
    for (const Case& c : all_cases({33, 64}, all_rules({Scheme::min_max}))) {
        const Matrix values = normal_matrix(50, c.channels(), random);
        const Tile tile = encoded(c, values);
        Matrix wide = Matrix::Constant(52, c.channels() + 9, -99.0f), expected = wide;
        TileCoder coder(c.format());
        coder.decode(tile.data(), 50, &wide(1, 4), wide.cols());
        expected.block(1, 4, 50, c.channels()) = expected_values(c, values);
        ASSERT_EQ(differing(wide, expected), 0) << c.text();
    }
}

/// fp16 keys keep the exponents of their largest magnitudes, also where tokens come one at a time, and none
/// of a tile that was there before.
TEST(TileEncode, KeepsTheLargestExponents) {
    Random random(kvplane_test::seed());
    const TileFormat format(TileSide::keys, Segments{{20, 4}, {33, 16}}, {Granularity::per_channel, 128});
    const TileFormat alone(TileSide::keys, Segments{{33, 16}}, {Granularity::per_token, 128});
    Matrix values = normal_matrix(128, 53, random);
    for (Index c = 0; c < 53; ++c) values.col(c) *= std::exp2(static_cast<float>(c % 13 - 9));
    values.col(30).setZero();
    Tile tile(static_cast<std::size_t>(format.bytes()), std::byte{255});
    TileCoder(format).encode(head_rows(values), "keys", {}, tile.data());
    const Matrix halves = values.rightCols(33);
    Tile slow(static_cast<std::size_t>(alone.bytes()), std::byte{255});
    TileCoder coder(alone);
    for (Index t = 0; t < 128; ++t)
        coder.encode(head_rows(halves), "keys", {.first = t, .count = 1, .tile_token = t}, slow.data());
    for (Index c = 0; c < 33; ++c) {
        const Eigen::half largest(halves.col(c).cwiseAbs().maxCoeff());
        EXPECT_EQ(largest_exponents(format.segments()[1], tile.data())[c], largest.x >> 10) << c;
        EXPECT_EQ(largest_exponents(alone.segments()[0], slow.data())[c], largest.x >> 10) << c;
    }
}

/// All finite fp16 values are kept bit for bit, and read with midpoint fill at 8 and 12 bits.
TEST(TileDecode, EveryFp16Value) {
    for (const TileSide side : {TileSide::keys, TileSide::values})
        for (const int sign : {0, 0x8000}) {
            const Case c{side, {{248, 16}}, {Granularity::per_token, 32}};
            RowMajorMatrix<Eigen::half> halves(128, 248);  // 31 x 1024 values
            for (Index i = 0; i < halves.size(); ++i)
                halves.data()[i] = Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(sign + i));
            TileCoder coder(c.format());
            Tile tile(static_cast<std::size_t>(c.format().bytes()));
            coder.encode(head_rows(halves), "values", {}, tile.data());
            for (const int depth : {8, 12, 16}) {
                const Matrix close = decoded(c, tile, 128, depth);
                const Matrix expected = expected_values(c, halves.cast<float>(), depth);
                ASSERT_EQ(std::memcmp(close.data(), expected.data(), sizeof(float) * 128 * 248), 0) << depth;
                if (depth < 16) continue;
                ASSERT_EQ(differing(close, halves.cast<float>()), 0);
            }
        }
}

/// Where another library makes the thread flush subnormal numbers, fp16 input gives the same bytes, and they
/// are read as ever.
TEST(TileEncode, GivesTheSameWithSubnormalsFlushed) {
    if (!kvplane_test::can_flush_subnormals) GTEST_SKIP() << "no such mode known for this processor";
    Random random(kvplane_test::seed());
    const std::vector<GridRule> rules{{Granularity::per_channel, 32}, {Granularity::per_token, 32}};
    for (const Case& c : all_cases({40}, rules))
        for (const kvplane_test::NamedMatrix& input :
             kvplane_test::half_matrices(128, c.channels(), random)) {
            const std::string& scale = input.name;
            const Matrix& values = input.values;
            SCOPED_TRACE(c.text() + ", " + scale);
            const Tile expected = encoded(c, values);
            EXPECT_EQ(kvplane_test::with_flushed_subnormals([&] { return encoded(c, values); }), expected);
            EXPECT_EQ(
                differing(kvplane_test::with_flushed_subnormals([&] { return decoded(c, expected, 128); }),
                          decoded(c, expected, 128)),
                0);
        }
}

// -- How tokens come in -----------------------------------------------------------------------------------

/// Appends in chunks; `next` says how many tokens come, given how many there are.
template <class Next>
Tile appended(const Case& c, const Matrix& values, const Next& next) {
    const TileFormat format = c.format();
    Tile tile(static_cast<std::size_t>(format.bytes()), std::byte{0});
    TileCoder coder(format);
    for (Index at = 0, count; at < values.rows(); at += count) {
        count = std::min<Index>(next(at), values.rows() - at);
        coder.encode(head_rows(values), "values", {.first = at, .count = count, .tile_token = at},
                     tile.data());
    }
    return tile;
}

TEST(TileAppend, TokenByTokenGivesTheBytesOfOneCall) {
    Random random(kvplane_test::seed());
    std::uniform_int_distribution<Index> chunk(1, 50);
    for (const Case& c : all_cases({33, 64}, all_rules())) {
        const Matrix values = normal_matrix(128, c.channels(), random);
        for (const Index tokens : {1, 77, 127, 128}) {
            const Matrix part = values.topRows(tokens);
            const Tile at_once = encoded(c, part);
            SCOPED_TRACE(c.text());
            if (c.rule.granularity == Granularity::per_token) {
                ASSERT_TRUE(appended(c, part, [](Index) { return 1; }) == at_once);
                ASSERT_TRUE(appended(c, part, [&](Index) { return chunk(random); }) == at_once);
            } else {
                ASSERT_TRUE(appended(c, part, [&](Index) { return c.rule.group; }) == at_once);
            }
        }
    }
}

/// Tokens that are there already keep every bit when others come, and those take the place of what was there:
/// a tile that was truncated is written again without being cleared.
void expect_others_untouched(const Case& c, Index from, const Matrix& values) {
    const TileFormat format = c.format();
    const DocumentedTile documented = c.documented();
    const bool by_channel = c.rule.granularity == Granularity::per_channel;
    const Tile before(static_cast<std::size_t>(format.bytes()), std::byte{0xA5});
    Tile tile = before;
    TileCoder coder(format);
    coder.encode(head_rows(values), "values", {.count = values.rows(), .tile_token = from}, tile.data());
    const Matrix close = decoded(c, tile, 128).middleRows(from, values.rows());
    ASSERT_EQ(differing(close, expected_values(c, values)), 0);
    for (std::size_t s = 0; s < documented.segments.size(); ++s)
        for (Index t = 0; t < 128; ++t) {
            if (t >= from && t < from + values.rows()) continue;
            const bool shares_grids = by_channel && t / c.rule.group == from / c.rule.group;
            for (Index k = 0; k < documented.segments[s].channels; ++k) {
                ASSERT_EQ(documented.code(tile, s, t, k), documented.code(before, s, t, k)) << t;
                if (documented.segments[s].grids == 0 || shares_grids) continue;
                ASSERT_EQ(documented.grid(tile, s, t, k).step, documented.grid(before, s, t, k).step);
                ASSERT_EQ(documented.grid(tile, s, t, k).lower, documented.grid(before, s, t, k).lower);
            }
        }
}

TEST(TileAppend, LeavesOtherTokensAlone) {
    Random random(kvplane_test::seed());
    using Places = std::vector<std::pair<Index, Index>>;  // first token, tokens
    for (const Case& c : all_cases({33, 64}, all_rules({Scheme::min_max}))) {
        const bool by_token = c.rule.granularity == Granularity::per_token;
        const Places places = by_token             ? Places{{64, 32}, {1, 127}, {0, 127}, {127, 1}}
                              : c.rule.group < 128 ? Places{{64, 32}, {64, 7}}
                                                   : Places{{0, 32}, {0, 127}};
        for (const auto& [from, count] : places) {
            SCOPED_TRACE(testing::Message() << c.text() << ", " << count << " tokens from " << from);
            expect_others_untouched(c, from, normal_matrix(count, c.channels(), random));
        }
    }
}

/// What is left of a tile whose later tokens were cleared is the tile of the others, where grids do not span
/// tokens.
TEST(TileClear, LeavesTheTileOfTheFirstTokens) {
    Random random(kvplane_test::seed());
    for (const Case& c : all_cases({33, 64}, all_rules())) {
        const bool by_token = c.rule.granularity == Granularity::per_token ||
                              (c.segments.size() == 1 && c.segments[0].bits == 16);
        const Matrix values = normal_matrix(128, c.channels(), random);
        const Tile whole = encoded(c, values);
        for (const Index tokens : {0, 1, 31, 64, 77, 127, 128}) {
            SCOPED_TRACE(testing::Message() << c.text() << ", " << tokens << " tokens");
            Tile tile = whole;
            TileCoder(c.format()).clear(tile.data(), tokens, kvplane::tile_tokens);
            if (by_token) {
                ASSERT_TRUE(tile == (tokens == 0 ? Tile(tile.size()) : encoded(c, values.topRows(tokens))));
            } else {
                ASSERT_EQ(differing(decoded(c, tile, tokens), decoded(c, whole, tokens)), 0);
            }
            const DocumentedTile documented = c.documented();
            for (std::size_t s = 0; s < documented.segments.size(); ++s)
                for (Index t = tokens; t < 128; ++t)
                    for (Index k = 0; k < documented.segments[s].channels; ++k)
                        ASSERT_EQ(documented.code(tile, s, t, k), 0);
        }
    }
}

/// A coder's memory is reused: what it decoded or encoded before does not reach the next tile's bytes.
TEST(TileAppend, DoesNotDependOnEarlierTiles) {
    Random random(kvplane_test::seed());
    for (const Case& c : all_cases({1, 33, 40, 64}, all_rules({Scheme::min_max}))) {
        const Matrix values = normal_matrix(128, c.channels(), random);
        const Tile expected = encoded(c, values);
        const TileFormat format = c.format();
        TileCoder coder(format);
        // As a file from elsewhere may hold it: set bits where no channel stands.
        const Tile strange(static_cast<std::size_t>(format.bytes()), std::byte{0x3F});
        Matrix close(128, c.channels());
        coder.decode(strange.data(), 128, close.data(), close.cols());
        Tile tile(static_cast<std::size_t>(format.bytes()), std::byte{0});
        coder.encode(head_rows(values), "values", {}, tile.data());
        ASSERT_TRUE(tile == expected) << c.text();
    }
}

/// A segment does not depend on its neighbours: its grids and planes are those of a tile of it alone.
TEST(TileSegments, StandAlone) {
    Random random(kvplane_test::seed());
    for (const Case& c : all_cases({}, all_rules())) {
        const Matrix values = normal_matrix(128, c.channels(), random);
        const Tile tile = encoded(c, values);
        const DocumentedTile all = c.documented();
        for (std::size_t s = 0; s < c.segments.size(); ++s) {
            const Case one{c.side, {c.segments[s]}, c.rule};
            const DocumentedSegment here = all.segments[s], there = one.documented().segments[0];
            const Tile alone = encoded(one, values.middleCols(here.first_channel, here.channels));
            const auto same = [&](Index at, Index other, Index size) {
                return std::equal(tile.begin() + at, tile.begin() + at + size, alone.begin() + other);
            };
            ASSERT_TRUE(same(here.step_at, there.step_at, all.step_bytes(here) * here.grids)) << c.text();
            if (all.has_lower(here)) {
                ASSERT_TRUE(same(here.lower_at, there.lower_at, 2 * here.grids)) << c.text();
            }
            for (std::size_t p = 0; p < here.planes.size(); ++p)
                ASSERT_TRUE(
                    same(here.plane_at[p], there.plane_at[p], all.plane_bytes(here.channels, here.planes[p])))
                    << c.text();
        }
    }
}

template <class Scalar>
void expect_input_types_agree(const Case& c, const Matrix& values) {
    const RowMajorMatrix<Scalar> typed = values.cast<Scalar>();
    const Matrix as_float = typed.template cast<float>();
    // The second of three heads, from token 3 on, stored column by column.
    Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic> heads(140, 3 * c.channels());
    heads.setConstant(Scalar(77.0f));
    heads.block(3, c.channels(), 128, c.channels()) = typed;
    TileCoder coder(c.format());
    Tile tile(static_cast<std::size_t>(c.format().bytes()), std::byte{0});
    coder.encode(head_rows(heads, 3), "values", {.head = 1, .first = 3}, tile.data());
    EXPECT_TRUE(tile == encoded(c, as_float)) << c.text();
}

TEST(TileEncode, TakesEveryTypeAndAnyHead) {
    Random random(kvplane_test::seed());
    for (const Case& c : all_cases({20, 64}, all_rules({Scheme::min_max}))) {
        const Matrix values = normal_matrix(128, c.channels(), random);
        expect_input_types_agree<float>(c, values);
        expect_input_types_agree<Eigen::half>(c, values);
        expect_input_types_agree<Eigen::bfloat16>(c, values);
    }
}

TEST(TileEncode, ClipsWhereTheRuleSaysSo) {
    Random random(kvplane_test::seed());
    const Matrix values = normal_matrix(128, 40, random);
    for (const TileSide side : {TileSide::keys, TileSide::values})
        for (const GridRule& rule :
             {GridRule{Granularity::per_channel, 64, Scheme::min_max, Clip::mse_optimal},
              GridRule{Granularity::per_token, 32, Scheme::cell, Clip::mse_optimal}}) {
            const Case c{side, {{40, 2}}, rule};
            EXPECT_EQ(differing(decoded(c, encoded(c, values), 128), expected_values(c, values)), 0);
            Case unclipped = c;
            unclipped.rule.clip = Clip::none;
            EXPECT_GT(differing(expected_values(c, values), expected_values(unclipped, values)), 0);
        }
}

// -- Refusals ---------------------------------------------------------------------------------------------

TEST(TileRefuses, PositionsAndSizesOutside) {
    const Matrix values = Matrix::Zero(200, 2 * 40);
    constexpr Index largest = std::numeric_limits<Index>::max();
    for (const Granularity granularity : {Granularity::per_channel, Granularity::per_token}) {
        const Case c{TileSide::keys, {{40, 4}}, {granularity, 32}};
        const TileFormat format = c.format();
        const Tile untouched(static_cast<std::size_t>(format.bytes()), std::byte{0xA5});
        Tile tile = untouched;
        TileCoder coder(format);
        const auto refused = [&](ErrorCode code, Index heads, Index head, Index first, Index count,
                                 Index tile_token) {
            const std::string sentence = refusal(code, [&] {
                coder.encode(head_rows(values, heads), "keys", {head, first, count, tile_token}, tile.data());
            });
            EXPECT_NE(sentence.find("keys: "), std::string::npos) << sentence;
        };
        refused(ErrorCode::shape, 1, 0, 0, 32, 0);
        for (const Index head : {Index{-1}, Index{2}, largest}) refused(ErrorCode::index, 2, head, 0, 32, 0);
        for (const Index first : {Index{-1}, Index{169}, Index{200}, largest})
            refused(ErrorCode::index, 2, 0, first, 32, 0);
        for (const Index count : {Index{-1}, Index{129}, Index{201}, largest})
            refused(ErrorCode::index, 2, 0, 0, count, 0);
        for (const Index tile_token : {Index{-32}, Index{97}, Index{128}, largest - 31})
            refused(ErrorCode::index, 2, 0, 0, 32, tile_token);
        if (granularity == Granularity::per_channel)
            for (const Index tile_token : {1, 16, 33, 95}) refused(ErrorCode::index, 2, 0, 0, 32, tile_token);
        EXPECT_TRUE(tile == untouched);

        Matrix close = Matrix::Constant(130, 40, -99.0f);
        for (const Index tokens : {Index{-1}, Index{129}, largest})
            refusal(ErrorCode::index, [&] { coder.decode(tile.data(), tokens, 4, close.data(), 40); });
        TileCoder mixed(TileFormat(TileSide::keys, Segments{{20, 0}, {20, 16}}, {granularity, 32}));
        const Tile of_both(static_cast<std::size_t>(mixed.format().bytes()));
        for (const int depth : {-1, 0, 1, 7, 9, 15}) {
            if (depth < 1)
                refusal(ErrorCode::option, [&] { coder.decode(tile.data(), 128, depth, close.data(), 40); });
            refusal(ErrorCode::option, [&] { mixed.decode(of_both.data(), 128, depth, close.data(), 40); });
        }
        EXPECT_TRUE((close.array() == -99.0f).all()) << "nothing is written before a refusal";
    }
}

TEST(TileRefuses, NumbersThatCannotBeStoredWithTheirPosition) {
    for (const int bits : {4, 16})
        for (const Granularity granularity : {Granularity::per_channel, Granularity::per_token}) {
            const Case c{TileSide::values, {{40, 0}, {33, bits}}, {granularity, 32}};
            Tile tile(static_cast<std::size_t>(c.format().bytes()));
            TileCoder coder(c.format());
            const auto sentence_for = [&](float value, Index channel, ErrorCode code) {
                Matrix values = Matrix::Zero(140, 2 * 73);
                values(139, 73 + channel) = value;
                return refusal(code, [&] {
                    coder.encode(head_rows(values, 2), "values", {.head = 1, .first = 12}, tile.data());
                });
            };
            for (const Index channel : {40, 72}) {
                const std::string place =
                    "values: the value at token 139, head 1, channel " + std::to_string(channel) + " ";
                for (const float value :
                     {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
                    const std::string sentence = sentence_for(value, channel, ErrorCode::not_finite);
                    EXPECT_NE(sentence.find(place), std::string::npos) << sentence;
                }
                const std::string sentence = sentence_for(-65519.0f, channel, ErrorCode::beyond_fp16);
                EXPECT_NE(sentence.find(place), std::string::npos) << sentence;
            }
            // A refused call leaves the coder as good as new.
            Random random(kvplane_test::seed());
            const Matrix values = normal_matrix(5, 73, random);
            std::fill(tile.begin(), tile.end(), std::byte{0});
            coder.encode(head_rows(values), "values", {.count = 5}, tile.data());
            EXPECT_TRUE(tile == encoded(c, values));
        }
}

}  // namespace
