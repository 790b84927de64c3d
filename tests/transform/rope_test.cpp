// Rotary embedding: what turns by how much, in both layouts; the three frames of keys, between which scores
// do not change (T6); what is refused.
#include <cmath>
#include <concepts>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

#include "kvplane/io/safetensors.hpp"
#include "kvplane/transform/rope.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::ErrorCode;
using kvplane::FramedKeys;
using kvplane::Index;
using kvplane::KeyFrame;
using kvplane::Matrix;
using kvplane::MatrixD;
using kvplane::RopeLayout;
using kvplane::RopeSettings;
using kvplane::RotaryEmbedding;
using BeforeRope = FramedKeys<KeyFrame::before_rope>;
using kvplane_test::normal_matrix;
using kvplane_test::Random;
using kvplane_test::refusal;

/// The definition, channel by channel, in double: what each channel of a head of `dim` becomes at `position`.
MatrixD turned_by_definition(const MatrixD& rows, Index dim, const RopeSettings& settings, Index dims,
                             double first, double stride) {
    MatrixD turned = rows;
    for (Index t = 0; t < rows.rows(); ++t)
        for (Index head = 0; head < rows.cols(); head += dim)
            for (Index c = 0; c < dims; ++c) {
                const bool interleaved = settings.layout == RopeLayout::interleaved;
                const Index pair = interleaved ? c / 2 : c % (dims / 2);
                const bool is_second = interleaved ? c % 2 == 1 : c >= dims / 2;
                const Index partner = interleaved ? c ^ 1 : (c + dims / 2) % dims;
                const double frequency = settings.frequencies.empty()
                                             ? 1.0 / std::pow(settings.base, 2.0 * static_cast<double>(pair) /
                                                                                 static_cast<double>(dims))
                                             : settings.frequencies[static_cast<std::size_t>(pair)];
                const double angle = (first + stride * static_cast<double>(t)) * frequency;
                turned(t, head + c) = rows(t, head + c) * std::cos(angle) +
                                      (is_second ? 1.0 : -1.0) * rows(t, head + partner) * std::sin(angle);
            }
    return turned;
}

struct Case {
    std::string name;
    Index head_dim;
    RopeSettings settings;
    Index dims;  ///< that turn
};

std::vector<Case> cases() {
    std::vector<Case> all;
    for (const RopeLayout layout : {RopeLayout::interleaved, RopeLayout::halves}) {
        const std::string of = name(layout);
        all.push_back({of + ", all channels", 16, {.layout = layout}, 16});
        all.push_back({of + ", another base", 64, {.layout = layout, .base = 100000.0}, 64});
        all.push_back({of + ", the first of more", 24, {.layout = layout, .dims = 10}, 10});
        all.push_back({of + ", an odd head", 7, {.layout = layout, .dims = 4}, 4});
        all.push_back({of + ", two of three", 3, {.layout = layout, .dims = 2}, 2});
        all.push_back({of + ", listed", 10, {.layout = layout, .frequencies = {1.0, 0.3, -0.2}}, 6});
        all.push_back(
            {of + ", a still pair", 9, {.layout = layout, .dims = 6, .frequencies = {0.7, 0.0, 0.1}}, 6});
    }
    return all;
}

TEST(RotaryEmbedding, TurnsByTheDefinition) {
    Random random(kvplane_test::seed());
    for (const Case& test : cases()) {
        SCOPED_TRACE(test.name);
        const RotaryEmbedding rope(test.head_dim, test.settings);
        const MatrixD rows = normal_matrix(5, 3 * test.head_dim, random).cast<double>();
        MatrixD turned = rows;
        rope.rotate(turned, 1234);
        const MatrixD expected = turned_by_definition(rows, test.head_dim, test.settings, test.dims, 1234, 1);
        EXPECT_LT((turned - expected).cwiseAbs().maxCoeff(), 1e-11);
        EXPECT_GT((turned - rows).norm(), 0.1 * rows.norm());

        MatrixD alike = rows;
        rope.turn(alike, -17);
        const MatrixD back = turned_by_definition(rows, test.head_dim, test.settings, test.dims, -17, 0);
        EXPECT_LT((alike - back).cwiseAbs().maxCoeff(), 1e-11);
    }
}

TEST(RotaryEmbedding, KnownNumbers) {
    const RotaryEmbedding rope(4, {.frequencies = {std::numbers::pi / 2, 0.0}});
    Matrix rows(2, 4);
    rows << 1.0f, 2.0f, 3.0f, 4.0f, 1.0f, 2.0f, 3.0f, 4.0f;
    rope.rotate(rows, 0);
    EXPECT_TRUE(rows.row(0).isApprox(Eigen::RowVector4f(1.0f, 2.0f, 3.0f, 4.0f), 0.0f));
    EXPECT_TRUE(rows.row(1).isApprox(Eigen::RowVector4f(-2.0f, 1.0f, 3.0f, 4.0f), 1e-6f));
}

/// Every channel is in exactly one pair; alone only where an odd one is left over, and then it does not turn.
TEST(RotaryEmbedding, PairsCoverTheHead) {
    for (Index head_dim = 1; head_dim <= 12; ++head_dim)
        for (Index dims = 0; dims <= head_dim; dims += 2)
            for (const RopeLayout layout : {RopeLayout::interleaved, RopeLayout::halves}) {
                if (dims == 0 && head_dim % 2 == 1) continue;  // 0 stands for all
                const RotaryEmbedding rope(head_dim, {.layout = layout, .dims = dims});
                std::vector<int> seen(static_cast<std::size_t>(head_dim), 0);
                Index turning = 0;
                for (const auto& pair : rope.pairs()) {
                    ++seen[static_cast<std::size_t>(pair.first)];
                    if (pair.second >= 0)
                        ++seen[static_cast<std::size_t>(pair.second)];
                    else
                        EXPECT_EQ(pair.frequency, 0.0);
                    turning += pair.frequency != 0.0 ? 2 : 0;
                }
                EXPECT_EQ(seen, std::vector<int>(static_cast<std::size_t>(head_dim), 1))
                    << head_dim << " channels, " << dims << " turn";
                EXPECT_EQ(turning, dims == 0 ? head_dim : dims);
                EXPECT_EQ(rope.head_dim(), head_dim);
            }
}

TEST(RotaryEmbedding, RotateBackIsTheInverse) {
    Random random(kvplane_test::seed());
    for (const Case& test : cases()) {
        SCOPED_TRACE(test.name);
        const RotaryEmbedding rope(test.head_dim, test.settings);
        const Matrix rows = normal_matrix(40, 2 * test.head_dim, random);
        Matrix turned = rows;
        rope.rotate(turned, 7980);
        EXPECT_NEAR(turned.norm() / rows.norm(), 1.0, 1e-6);
        rope.rotate_back(turned, 7980);
        EXPECT_LT((turned - rows).cwiseAbs().maxCoeff(), 2e-6f);
    }
}

/// In fp32 an angle at position 8000 would be off by up to 2^-12 = 2.4e-4, and so would what it turns.
TEST(RotaryEmbedding, AnglesAreExactFarOut) {
    Random random(kvplane_test::seed());
    const RopeSettings settings{.base = 100000.0};
    const RotaryEmbedding rope(64, settings);
    const Matrix rows = normal_matrix(64, 64, random);
    Matrix turned = rows;
    rope.rotate(turned, 7936);
    const MatrixD expected = turned_by_definition(rows.cast<double>(), 64, settings, 64, 7936, 1);
    EXPECT_LT((turned.cast<double>() - expected).cwiseAbs().maxCoeff(), 1e-6);
}

TEST(RotaryEmbedding, TurnsBlocksInPlace) {
    Random random(kvplane_test::seed());
    const RotaryEmbedding rope(6, {.dims = 4});
    const Matrix all = normal_matrix(9, 18, random);
    Matrix changed = all;
    auto block = changed.block(2, 6, 5, 6);
    rope.rotate(block, 11);
    Matrix expected = all.block(2, 6, 5, 6);
    rope.rotate(expected, 11);
    EXPECT_EQ(kvplane_test::differing(changed.block(2, 6, 5, 6), expected), 0);
    changed.block(2, 6, 5, 6) = all.block(2, 6, 5, 6);
    EXPECT_EQ(kvplane_test::differing(changed, all), 0) << "nothing beside the block changed";

    Eigen::MatrixXf column_major = all;  // another storage order, the same numbers
    rope.rotate(column_major, 5);
    Matrix row_major = all;
    rope.rotate(row_major, 5);
    EXPECT_EQ(kvplane_test::differing(column_major, row_major), 0);
}

/// Rows in one piece are turned by vectors, others pair by pair: with the same bits on every instruction set.
TEST(RotaryEmbedding, TurnsByVectorsAsPairByPair) {
    Random random(kvplane_test::seed());
    for (const RopeLayout layout : {RopeLayout::interleaved, RopeLayout::halves})
        for (const Index dim : {2, 6, 18, 40, 96, 128})
            for (const Index dims : {dim, dim / 4 * 2})
                for (const bool stands : {false, true}) {
                    RopeSettings settings{.layout = layout, .dims = dims};
                    if (dims == 0) continue;
                    settings.frequencies.assign(static_cast<std::size_t>(dims / 2), 0.3);
                    for (std::size_t i = 0; i < settings.frequencies.size(); ++i)
                        settings.frequencies[i] = stands && i == settings.frequencies.size() / 2
                                                      ? 0.0
                                                      : 1.0 / static_cast<double>(i + 1);
                    const RotaryEmbedding rope(dim, settings);
                    const Matrix rows = normal_matrix(5, 3 * dim, random);
                    Eigen::MatrixXf by_pairs = rows;  // by columns
                    rope.rotate(by_pairs, 1234);
                    rope.turn(by_pairs, -77);
                    kvplane_test::for_each_isa([&](kvplane::Isa) {
                        Matrix by_vectors = rows;
                        rope.rotate(by_vectors, 1234);
                        rope.turn(by_vectors, -77);
                        EXPECT_EQ(by_vectors, by_pairs) << name(layout) << ", " << dims << " of " << dim;
                    });
                }
}

/// A turn that is made once turns rows as turn() does.
TEST(RotaryEmbedding, TurnsRowsByATurnMadeOnce) {
    Random random(kvplane_test::seed());
    for (const RopeLayout layout : {RopeLayout::interleaved, RopeLayout::halves})
        for (const Index dims : {2, 10, 40}) {
            const RotaryEmbedding rope(40, {.layout = layout, .dims = dims});
            const Matrix rows = normal_matrix(3, 80, random);
            for (const Index positions : {0, 700, -700}) {
                Matrix expected = rows, found = rows;
                rope.turn(expected, positions);
                const RotaryEmbedding::Turn turn = rope.turn_of(positions);
                for (Index t = 0; t < 3; ++t) rope.turn_row(found.row(t).data(), 80, turn);
                EXPECT_EQ(found, expected) << dims << " channels turn, by " << positions;
            }
        }
}

/// T6: q.k is the same in all three frames, wherever tokens stand.
TEST(RotaryEmbedding, NoFrameChangesAScore) {
    Random random(kvplane_test::seed());
    for (const Case& test : cases()) {
        SCOPED_TRACE(test.name);
        const RotaryEmbedding rope(test.head_dim, test.settings);
        for (const Index m0 : {0, 128, 7872}) {
            const BeforeRope before{normal_matrix(128, test.head_dim, random), m0};
            const FramedKeys<KeyFrame::after_rope> after = rope.after(before);
            const FramedKeys<KeyFrame::tile> tile = rope.to_tile(after);
            const Index query_position = m0 + 128;
            const MatrixD query = normal_matrix(1, test.head_dim, random).cast<double>();

            MatrixD turned = query;  // what the engine multiplies keys after RoPE with
            rope.rotate(turned, query_position);
            MatrixD in_tile = turned;
            rope.turn(in_tile, -m0);
            for (Index t = 0; t < 128; ++t) {
                MatrixD by_distance = query;
                rope.turn(by_distance, query_position - (m0 + t));
                const double score = turned.row(0).dot(after.rows.row(t).cast<double>());
                const double allowed = 1e-6 * query.norm() * after.rows.row(t).norm();
                EXPECT_NEAR(by_distance.row(0).dot(before.rows.row(t).cast<double>()), score, allowed);
                EXPECT_NEAR(in_tile.row(0).dot(tile.rows.row(t).cast<double>()), score, allowed);
            }
        }
    }
}

TEST(RotaryEmbedding, EveryWayBetweenFramesAgrees) {
    Random random(kvplane_test::seed());
    for (const Case& test : cases()) {
        SCOPED_TRACE(test.name);
        const RotaryEmbedding rope(test.head_dim, test.settings);
        const BeforeRope before{normal_matrix(128, 2 * test.head_dim, random), 7552};
        const auto after = rope.after(before);
        const auto tile = rope.to_tile(before);
        EXPECT_EQ(after.first_position, 7552);
        EXPECT_EQ(tile.first_position, 7552);
        const auto apart = [](const Matrix& a, const Matrix& b) { return (a - b).cwiseAbs().maxCoeff(); };
        EXPECT_LT(apart(rope.to_tile(after).rows, tile.rows), 2e-6f);
        EXPECT_LT(apart(rope.after(tile).rows, after.rows), 2e-6f);
        EXPECT_LT(apart(rope.before(after).rows, before.rows), 2e-6f);
        EXPECT_EQ(kvplane_test::differing(tile.rows.row(0), before.rows.row(0)), 0)
            << "the first token of a tile is not turned";
        EXPECT_GT(apart(tile.rows, after.rows), 0.1f);
        EXPECT_GT(apart(tile.rows, before.rows), 0.1f);
    }
}

/// What a model's own arithmetic made of its keys.
TEST(RotaryEmbedding, MatchesARealModel) {
    const RotaryEmbedding rope(64, {.layout = RopeLayout::interleaved, .base = 100000.0});
    for (const auto& [file_name, layer] : {std::pair{"/smollm2_layers_0_8.safetensors", "layers.8"},
                                           {"/smollm2_layers_16_24.safetensors", "layers.24"}}) {
        const auto file = kvplane::SafetensorsFile::open(std::string(KVPLANE_EXAMPLE_DATA) + file_name);
        const Matrix keys = file.to_float_matrix(std::string(layer) + ".keys");
        const auto turned =
            rope.after(BeforeRope{file.to_float_matrix(std::string(layer) + ".keys_before_rope"), 0});
        EXPECT_LT((turned.rows - keys).norm(), 5e-4f * keys.norm()) << "both were rounded to fp16";
        const RotaryEmbedding other(64, {.layout = RopeLayout::halves, .base = 100000.0});
        const auto wrong =
            other.after(BeforeRope{file.to_float_matrix(std::string(layer) + ".keys_before_rope"), 0});
        EXPECT_GT((wrong.rows - keys).norm(), 0.1f * keys.norm());
    }
}

TEST(RotaryEmbedding, NoneLeavesEverythingAsItIs) {
    Random random(kvplane_test::seed());
    for (const Index dim : {1, 2, 5, 64}) {
        const RotaryEmbedding none = RotaryEmbedding::none(dim);
        EXPECT_EQ(none.head_dim(), dim);
        EXPECT_EQ(static_cast<Index>(none.pairs().size()), (dim + 1) / 2);
        const Matrix rows = normal_matrix(3, 2 * dim, random);
        EXPECT_EQ(kvplane_test::differing(none.after(BeforeRope{rows, 77}).rows, rows), 0);
        EXPECT_EQ(kvplane_test::differing(none.to_tile(BeforeRope{rows, 77}).rows, rows), 0);
        EXPECT_EQ(kvplane_test::differing(none.before({rows, 77}).rows, rows), 0);
    }
}

TEST(RotaryEmbedding, TakesNoTokens) {
    const RotaryEmbedding rope(8);
    EXPECT_EQ(rope.after(BeforeRope{Matrix(0, 16), 3}).rows.rows(), 0);
}

/// The frame is part of the type: keys turned once cannot be turned again.
template <class Keys>
concept HasAfter = requires(const RotaryEmbedding& rope, Keys keys) {
    rope.after(keys);
};
template <class Keys>
concept HasBefore = requires(const RotaryEmbedding& rope, Keys keys) {
    rope.before(keys);
};
template <class Keys>
concept HasTile = requires(const RotaryEmbedding& rope, Keys keys) {
    rope.to_tile(keys);
};
static_assert(HasAfter<FramedKeys<KeyFrame::before_rope>> && HasAfter<FramedKeys<KeyFrame::tile>> &&
              !HasAfter<FramedKeys<KeyFrame::after_rope>>);
static_assert(HasBefore<FramedKeys<KeyFrame::after_rope>> && !HasBefore<FramedKeys<KeyFrame::before_rope>>);
static_assert(HasTile<FramedKeys<KeyFrame::after_rope>> && HasTile<FramedKeys<KeyFrame::before_rope>> &&
              !HasTile<FramedKeys<KeyFrame::tile>>);

TEST(RotaryEmbedding, RefusesWhatIsNone) {
    const auto make = [](Index head_dim, const RopeSettings& settings) {
        return [=] { RotaryEmbedding(head_dim, settings); };
    };
    const double nan = std::numeric_limits<double>::quiet_NaN(),
                 infinity = std::numeric_limits<double>::infinity();
    EXPECT_NE(refusal(ErrorCode::option, make(8, {.dims = 3})).find("3 channels"), std::string::npos);
    refusal(ErrorCode::option, make(8, {.dims = 10}));
    refusal(ErrorCode::option, make(8, {.dims = -2}));
    refusal(ErrorCode::option, make(7, {}));
    refusal(ErrorCode::option, make(0, {}));
    for (const double base : {0.0, -10000.0, nan, infinity})
        refusal(ErrorCode::option, make(8, {.base = base}));
    EXPECT_NE(refusal(ErrorCode::option, make(8, {.dims = 8, .frequencies = {1.0, 0.5}}))
                  .find("2 frequencies, expected 4"),
              std::string::npos);
    refusal(ErrorCode::option, make(2, {.frequencies = {1.0, 0.5}}));
    for (const double frequency : {nan, infinity, -infinity})
        EXPECT_NE(refusal(ErrorCode::option, make(4, {.frequencies = {1.0, frequency}})).find("pair 1"),
                  std::string::npos);
    const RotaryEmbedding rope(8);
    Matrix rows = Matrix::Ones(2, 12);
    EXPECT_NE(refusal(ErrorCode::shape, [&] { rope.rotate(rows, 1); }).find("12"), std::string::npos);
    EXPECT_EQ(kvplane_test::differing(rows, Matrix::Ones(2, 12)), 0);
}

TEST(RotaryEmbedding, Names) {
    EXPECT_STREQ(name(RopeLayout::interleaved), "interleaved");
    EXPECT_STREQ(name(RopeLayout::halves), "halves");
    EXPECT_STREQ(name(KeyFrame::before_rope), "before_rope");
    EXPECT_STREQ(name(KeyFrame::after_rope), "after_rope");
    EXPECT_STREQ(name(KeyFrame::tile), "tile");
}

}  // namespace
