// Attention over parts of a context, put together: the same as attention over all of it.
#include "kvplane/attention/merge.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "cache/cache_support.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

struct Part {
    Matrix output, sums;
};

/// Attention of `queries`, the last tokens of a sequence, over its tokens [first, end).
Part part_of(const Matrix& keys, const Matrix& values, Index first, Index end, const Matrix& queries,
             std::span<const float> sink_logits, TilePool& pool) {
    KvCache cache(configuration("fp16"), pool);
    cache.append(keys.middleRows(first, end - first), values.middleRows(first, end - first));
    AttentionParameters parameters;
    parameters.position = std::max<Index>(0, keys.rows() - queries.rows() - first);
    // Of a part that begins among the queries' own tokens, the first queries see nothing.
    const Index ahead = std::max<Index>(0, first - (keys.rows() - queries.rows()));
    parameters.sink_logits = sink_logits;
    Part part{Matrix::Zero(queries.rows(), 192),
              Matrix::Constant(queries.rows(), 4, -std::numeric_limits<float>::infinity())};
    const Matrix asking = queries.bottomRows(queries.rows() - ahead);
    Matrix output(asking.rows(), 192), sums;
    AttentionWorkspace workspace;
    cache.attend(asking, output, parameters, workspace, {.log_sum_exp = &sums});
    part.output.bottomRows(asking.rows()) = output;
    part.sums.bottomRows(asking.rows()) = sums;
    return part;
}

TEST(MergeAttention, PartsOfAContextMakeTheWhole) {
    std::mt19937_64 random(seed());
    TilePool pool;
    for (const Index query_tokens : {1, 8, 20})
        for (int round = 0; round < 12; ++round) {
            const Index tokens = std::uniform_int_distribution<Index>(query_tokens, 400)(random);
            const Matrix keys = normal_matrix(random, tokens, 64, 2.0f),
                         values = normal_matrix(random, tokens, 96),
                         queries = normal_matrix(random, query_tokens, 128);
            const std::vector<float> logits{1.0f, -2.0f, 0.5f, 3.0f};
            const std::span<const float> sinks =
                round % 2 ? std::span<const float>(logits) : std::span<const float>();
            const Part whole = part_of(keys, values, 0, tokens, queries, sinks, pool);
            std::vector<Index> borders{0, tokens};
            for (int i = 0; i < 3; ++i)
                borders.push_back(std::uniform_int_distribution<Index>(0, tokens)(random));
            std::sort(borders.begin(), borders.end());
            std::vector<Part> parts;
            for (std::size_t i = 0; i + 1 < borders.size(); ++i)
                parts.push_back(part_of(keys, values, borders[i], borders[i + 1], queries,
                                        i == 0 ? sinks : std::span<const float>(), pool));
            std::shuffle(parts.begin(), parts.end(), random);
            Part merged = parts[0];
            for (std::size_t i = 1; i < parts.size(); ++i)
                merge_attention(merged.output, merged.sums, parts[i].output, parts[i].sums);
            EXPECT_LE((merged.output - whole.output).cwiseAbs().maxCoeff(), 1e-5f) << tokens << " tokens";
            EXPECT_LE((merged.sums - whole.sums).cwiseAbs().maxCoeff(), 1e-5f);
        }
}

TEST(MergeAttention, NothingSeenIsNeutral) {
    const float none = -std::numeric_limits<float>::infinity();
    Matrix output = Matrix::Constant(1, 6, 3.0f), sums(1, 2), more = Matrix::Constant(1, 6, 5.0f),
           more_sums(1, 2);
    sums << none, 2.0f;
    more_sums << 1.0f, none;
    merge_attention(output, sums, more, more_sums);
    EXPECT_EQ(output.leftCols(3), more.leftCols(3));
    EXPECT_EQ(output.rightCols(3), Matrix::Constant(1, 3, 3.0f));
    EXPECT_EQ(sums(0, 0), 1.0f);
    EXPECT_EQ(sums(0, 1), 2.0f);
}

TEST(MergeAttention, RefusesShapesThatDoNotFit) {
    Matrix output = Matrix::Ones(2, 6), sums = Matrix::Ones(2, 2);
    EXPECT_EQ(refusal(ErrorCode::shape, [&] { merge_attention(output, sums, Matrix::Ones(2, 8), sums); }),
              "kvplane: merge_attention: outputs of 2 x 6 and 2 x 8 with sums of 2 x 2 and 2 x 2, expected "
              "two of one "
              "shape and a sum for each query token and head");
    refusal(ErrorCode::shape, [&] { merge_attention(output, sums, output, Matrix::Ones(2, 3)); });
}

}  // namespace
