// Many sequences in one call of attention: bit for bit what each gives by itself.
#include <gtest/gtest.h>

#include <deque>

#include "cache_support.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/recipes.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

class Batch : public testing::TestWithParam<std::string> {
  protected:
    CacheConfiguration configuration_ = kvplane_test::configuration(GetParam());
    std::mt19937_64 random_{seed()};
    TilePool pool_;

    Index up_to(Index most) { return std::uniform_int_distribution<Index>(0, most)(random_); }
    KvCache cache_of(Index tokens) {
        KvCache cache(configuration_, pool_);
        append(cache, normal_matrix(random_, tokens, 64, 2.0f), normal_matrix(random_, tokens, 96));
        return cache;
    }
};

TEST_P(Batch, EqualsEachSequenceByItself) {
    std::deque<KvCache> caches;
    for (const Index tokens : {0, 1, 5, 130, 164, 300, 301, 2500}) caches.push_back(cache_of(tokens));
    caches.push_back(caches[5].fork());
    for (int round = 0; round < 12; ++round) {
        std::vector<const KvCache*> batch;
        std::vector<Index> offsets{0};
        for (Index i = up_to(11); i >= 0; --i) {
            batch.push_back(&caches[static_cast<std::size_t>(up_to(8))]);
            const Index most = std::min<Index>(batch.back()->tokens(), up_to(3) == 0 ? 20 : 3);
            offsets.push_back(offsets.back() + up_to(most));
        }
        const Matrix queries = normal_matrix(random_, offsets.back(), 128);
        AttentionParameters parameters;
        if (round % 3 == 1) parameters.softcap = 20.0;
        if (round % 3 == 2 && (GetParam() == "standard" || GetParam() == "key_favored:4:2"))
            parameters.read = recipes::read_policy("3");
        Matrix alone(offsets.back(), 192);
        for (std::size_t i = 0; i < batch.size(); ++i) {
            const Index count = offsets[i + 1] - offsets[i];
            Matrix out(count, 192);
            batch[i]->attend(queries.middleRows(offsets[i], count), out, parameters);
            alone.middleRows(offsets[i], count) = out;
        }
        for (const Index threads : {0, 2, 5}) {
            std::unique_ptr<ThreadExecutor> executor;
            if (threads > 0) executor = std::make_unique<ThreadExecutor>(threads);
            AttentionWorkspace workspace(executor.get());
            for (int again = 0; again < 2; ++again) {
                Matrix together = Matrix::Constant(offsets.back(), 192, -7.0f);
                KvCache::attend_batch(batch, offsets, queries, together, parameters, workspace);
                ASSERT_EQ(together, alone) << "round " << round << ", " << threads << " threads";
            }
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Recipes, Batch,
                         testing::Values("fp16", "block32:4", "kivi:2", "key_favored:4:2", "standard",
                                         "latent:3:3+fit_tokens=130", "svdq:2+fit_tokens=140"),
                         test_name);

TEST(BatchOfCaches, BadInputIsRefusedBeforeAnythingIsWritten) {
    TilePool pool;
    KvCache cache(configuration("standard"), pool), other(configuration("standard", 2, 4, 64), pool);
    cache.append(Matrix::Ones(10, 64), Matrix::Ones(10, 96));
    other.append(Matrix::Ones(10, 128), Matrix::Ones(10, 96));
    Matrix queries = Matrix::Ones(3, 128), output = Matrix::Constant(3, 192, 5.0f);
    AttentionWorkspace workspace;
    std::vector<const KvCache*> batch{&cache, &cache};
    const auto attend = [&](const std::vector<Index>& offsets, const AttentionParameters& parameters = {}) {
        KvCache::attend_batch(batch, offsets, queries, output, parameters, workspace);
    };
    EXPECT_EQ(refusal(ErrorCode::shape,
                      [&] {
                          attend({0, 3});
                      }),
              "kvplane: attend_batch: 2 offsets for 2 caches and 3 query tokens, expected 3 that ascend from "
              "0 to 3");
    refusal(ErrorCode::shape, [&] { attend({0, 1, 2}); });
    refusal(ErrorCode::shape, [&] { attend({0, 4, 3}); });
    refusal(ErrorCode::shape, [&] { attend({1, 2, 3}); });
    const Matrix bias = Matrix::Zero(1, 10);
    AttentionParameters with_bias;
    with_bias.bias = &bias;
    refusal(ErrorCode::option, [&] { attend({0, 1, 3}, with_bias); });
    batch[1] = &other;
    EXPECT_EQ(refusal(ErrorCode::shape,
                      [&] {
                          attend({0, 1, 3});
                      }),
              "kvplane: attend: queries of 4 heads of 32 channels, expected 4 of 64");
    EXPECT_EQ(output, Matrix::Constant(3, 192, 5.0f));
    batch.clear();
    KvCache::attend_batch(batch, std::vector<Index>{0}, Matrix(0, 128), output, {}, workspace);
    EXPECT_EQ(output, Matrix::Constant(3, 192, 5.0f));
}

}  // namespace
