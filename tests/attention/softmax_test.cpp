// The softmax as a state: weights and sums against double precision, and merging in every grouping (T17).
#include "kvplane/attention/softmax.hpp"
#include "kvplane/storage/tile_format.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <span>

#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane::detail;
using kvplane_test::for_each_isa;
using kvplane_test::normal_matrix;
using kvplane_test::Random;

constexpr float none = nothing_seen;

TEST(OnlineSoftmax, TurnsScoresIntoWeights) {
    Random random(kvplane_test::seed());
    for_each_isa([&](Isa isa) {
        Matrix scores = 6.0f * normal_matrix(2, tile_tokens, random);
        scores.row(1).setConstant(none);
        scores(0, 5) = none;
        Matrix weights = scores;
        float largest[2] = {none, none}, sum[2] = {0.0f, 0.0f};
        Matrix output = Matrix::Zero(2, 16);
        online_softmax(isa, weights.data(), tile_tokens, 2, {largest, sum, output.data(), 16});
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

/// The state of some tokens, owned.
struct State {
    float largest = none, sum = 0.0f;
    std::vector<float> output;

    explicit State(Index channels) : output(static_cast<std::size_t>(channels), 0.0f) {}
    SoftmaxState view() { return {&largest, &sum, output.data(), static_cast<Index>(output.size())}; }
};

/// Scores and values of some tokens, and their state computed in one go.
struct Tokens {
    std::vector<float> scores;
    Matrix values;  ///< [token][channels]

    State state(std::span<const Index> which) const {
        State state(values.cols());
        for (const Index t : which)
            if (scores[static_cast<std::size_t>(t)] != none)
                state.largest = std::max(state.largest, scores[static_cast<std::size_t>(t)]);
        for (const Index t : which) {
            const float score = scores[static_cast<std::size_t>(t)];
            if (score == none) continue;
            const float weight = std::exp(score - state.largest);
            state.sum += weight;
            for (Index c = 0; c < values.cols(); ++c)
                state.output[static_cast<std::size_t>(c)] += weight * values(t, c);
        }
        return state;
    }
    /// Softmax times values, and log-sum-exp, in double precision.
    std::vector<double> exact(double& log_sum) const {
        double top = -std::numeric_limits<double>::infinity(), sum = 0.0;
        for (const float score : scores) top = std::max<double>(top, score);
        std::vector<double> output(static_cast<std::size_t>(values.cols()), 0.0);
        for (std::size_t t = 0; t < scores.size(); ++t) {
            const double weight = std::exp(static_cast<double>(scores[t]) - top);
            sum += weight;
            for (Index c = 0; c < values.cols(); ++c)
                output[static_cast<std::size_t>(c)] +=
                    weight * static_cast<double>(values(static_cast<Index>(t), c));
        }
        for (double& x : output) x /= sum;
        log_sum = top + std::log(sum);
        return output;
    }
};

void expect_whole(State& merged, const Tokens& tokens, int merges) {
    double log_sum = 0.0;
    const std::vector<double> exact = tokens.exact(log_sum);
    // Two units of rounding a merge, and what the sums over tokens round.
    const double units = 2.0 * merges + static_cast<double>(tokens.scores.size()) + 4.0;
    EXPECT_NEAR(merged.view().log_sum_exp(), log_sum, units * 0x1p-23 * (1.0 + std::abs(log_sum)));
    merged.view().normalise(tokens.values.cols());
    const double size = tokens.values.cwiseAbs().maxCoeff();
    for (std::size_t c = 0; c < exact.size(); ++c)
        ASSERT_NEAR(merged.output[c], exact[c], units * 0x1p-23 * size) << "channel " << c;
}

/// All ways to put 5 tokens into any number of groups (52 of them), groups merged from the left, from the
/// right and as a tree.
TEST(SoftmaxState, MergesInEveryGrouping) {
    Random random(kvplane_test::seed());
    constexpr Index count = 5;
    int groupings = 0;
    for (int round = 0; round < 8; ++round) {
        Tokens tokens{std::vector<float>(count), normal_matrix(count, 16, random)};
        const float spread = round % 4 == 0 ? 1.0f : round % 4 == 1 ? 30.0f : round % 4 == 2 ? 300.0f : 0.0f;
        for (float& score : tokens.scores) score = spread * normal_matrix(1, 1, random)(0, 0);
        if (round >= 4) tokens.scores[2] = none;
        // A restricted growth string names the group of each token.
        std::vector<Index> group(count, 0);
        for (;;) {
            const Index groups = 1 + *std::max_element(group.begin(), group.end());
            std::vector<State> parts;
            for (Index g = 0; g < groups; ++g) {
                std::vector<Index> members;
                for (Index t = 0; t < count; ++t)
                    if (group[static_cast<std::size_t>(t)] == g) members.push_back(t);
                parts.push_back(tokens.state(members));
            }
            for (const bool backwards : {false, true}) {
                std::vector<State> all = parts;
                if (backwards) std::reverse(all.begin(), all.end());
                for (std::size_t g = 1; g < all.size(); ++g) merge(all[0].view(), all[g].view());
                expect_whole(all[0], tokens, static_cast<int>(groups));
                std::vector<State> tree = parts;
                if (backwards) std::reverse(tree.begin(), tree.end());
                while (tree.size() > 1) {
                    std::vector<State> half;
                    for (std::size_t g = 0; g < tree.size(); g += 2) {
                        if (g + 1 < tree.size()) merge(tree[g].view(), tree[g + 1].view());
                        half.push_back(tree[g]);
                    }
                    tree = half;
                }
                expect_whole(tree[0], tokens, static_cast<int>(groups));
            }
            ++groupings;
            Index t = count - 1;
            while (t > 0 &&
                   group[static_cast<std::size_t>(t)] > *std::max_element(group.begin(), group.begin() + t))
                --t;
            if (t == 0) break;
            ++group[static_cast<std::size_t>(t)];
            std::fill(group.begin() + t + 1, group.end(), Index{0});
        }
    }
    EXPECT_EQ(groupings, 8 * 52);
}

/// Token by token into the same state as all at once, in any order of portions.
TEST(SoftmaxState, GrowsByPortions) {
    Random random(kvplane_test::seed());
    for_each_isa([&](Isa isa) {
        for (int round = 0; round < 10; ++round) {
            const Index portions = 1 + static_cast<Index>(random() % 6), count = portions * 16;
            Tokens tokens{std::vector<float>(static_cast<std::size_t>(count)),
                          normal_matrix(count, 32, random)};
            for (float& score : tokens.scores) score = 10.0f * normal_matrix(1, 1, random)(0, 0);
            State state(32);
            for (Index p = 0; p < portions; ++p) {
                float weights[tile_tokens];
                std::copy_n(tokens.scores.begin() + p * 16, 16, weights);
                online_softmax(isa, weights, 16, 1, state.view());
                for (Index t = 0; t < 16; ++t)
                    for (Index c = 0; c < 32; ++c)
                        state.output[static_cast<std::size_t>(c)] +=
                            weights[t] * tokens.values(p * 16 + t, c);
            }
            expect_whole(state, tokens, static_cast<int>(portions));
        }
    });
}

TEST(SoftmaxState, AnEmptyStateIsNeutral) {
    Tokens tokens{{1.5f, -2.0f}, Matrix::Constant(2, 16, 3.0f)};
    const std::vector<Index> both = {0, 1};
    State some = tokens.state(both), empty(16), into(16);
    const State before = some;
    merge(some.view(), empty.view());
    EXPECT_EQ(some.largest, before.largest);
    EXPECT_EQ(some.sum, before.sum);
    EXPECT_EQ(some.output, before.output);
    merge(into.view(), State(before).view());
    EXPECT_EQ(into.sum, before.sum);
    EXPECT_EQ(into.output, before.output);
    merge(empty.view(), State(16).view());
    EXPECT_EQ(empty.view().log_sum_exp(), none);
    empty.view().normalise(16);
    EXPECT_EQ(empty.output, std::vector<float>(16, 0.0f)) << "a row that saw nothing gets zeros";
}

/// Weights that are kept relative to their own largest score add up like the tokens themselves.
TEST(SoftmaxState, AddsWeights) {
    State state(16);
    add_weights(state.view(), 2.0f, 3.0f);
    EXPECT_EQ(state.sum, 3.0f);
    add_weights(state.view(), none, 7.0f);
    EXPECT_EQ(state.sum, 3.0f);
    add_weights(state.view(), 5.0f, 1.0f);
    EXPECT_EQ(state.largest, 5.0f);
    EXPECT_NEAR(state.sum, 1.0 + 3.0 * std::exp(-3.0), 1e-6);
    add_weights(state.view(), 1.0f, 2.0f);
    EXPECT_EQ(state.largest, 5.0f);
    EXPECT_NEAR(state.sum, 1.0 + 3.0 * std::exp(-3.0) + 2.0 * std::exp(-4.0), 1e-6);
}

}  // namespace
