// Many sequences in one call of attention, with and without shared prefixes: bit for bit what each gives by
// itself.
#include <gtest/gtest.h>

#include <deque>
#include <limits>
#include <memory>
#include <span>
#include <vector>

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
                         testing::ValuesIn(thinned(std::vector<std::string>{
                             "fp16", "block32:4", "kivi:2", "key_favored:4:2", "standard",
                             "latent:3:3+fit_tokens=130", "svdq:2+fit_tokens=140"})),
                         test_name);

/// Forks of forks, which part by appends, truncations and dropped tokens, or not at all.
class SharedPrefix : public testing::TestWithParam<std::string> {
  protected:
    std::mt19937_64 random_{seed()};
    TilePool pool_;
    std::deque<KvCache> caches_;
    Index kv_heads_ = 2, query_heads_ = 4;

    Index up_to(Index most) { return std::uniform_int_distribution<Index>(0, most)(random_); }
    void more(KvCache& cache, Index tokens) {
        append(cache, normal_matrix(random_, tokens, 32 * kv_heads_, 2.0f),
               normal_matrix(random_, tokens, 48 * kv_heads_));
    }
    KvCache& fork_of(std::size_t parent, Index tokens) {
        caches_.push_back(caches_[parent].fork());
        more(caches_.back(), tokens);
        return caches_.back();
    }
    /// A tree: roots of various lengths, forks of them and of forks.
    void grow(Index kv_heads, Index query_heads) {
        kv_heads_ = kv_heads, query_heads_ = query_heads;
        caches_.clear();
        const CacheConfiguration c = configuration(GetParam(), kv_heads, query_heads);
        for (const Index tokens : {300, 2100, 4300}) more(caches_.emplace_back(c, pool_), tokens);
        for (const Index tokens : {0, 1, 90, 700, 2300}) fork_of(2, tokens);
        for (const Index tokens : {5, 400}) fork_of(7, tokens);
        for (const Index tokens : {10, 130, 1}) fork_of(1, tokens);
        fork_of(0, 200);
        fork_of(2, 0).truncate(3000);
        fork_of(2, 0).truncate(4000);
        fork_of(14, 250);
        fork_of(3, 40).drop_before(700, 5);
        fork_of(16, 60);
        fork_of(16, 60).drop_before(1500, 5);
        // The first two tiles stay, the second with tokens that others see.
        fork_of(2, 60).drop_before(700, 200);
    }
    /// What each sequence gives by itself, and all together with some numbers of workers.
    void compare(const std::vector<const KvCache*>& batch, const std::vector<Index>& counts,
                 const AttentionParameters& parameters) {
        std::vector<Index> offsets{0};
        for (const Index count : counts) offsets.push_back(offsets.back() + count);
        Matrix queries = normal_matrix(random_, offsets.back(), 32 * query_heads_, 0.5f);
        // A row that is not finite stays alone with it.
        queries(offsets.back() / 2, 3) = std::numeric_limits<float>::quiet_NaN();
        const auto bits = [](const Matrix& values) {
            return Eigen::Map<const Eigen::Array<std::int32_t, Eigen::Dynamic, 1>>(
                       reinterpret_cast<const std::int32_t*>(values.data()), values.size())
                .eval();
        };
        Matrix alone(offsets.back(), 48 * query_heads_);
        for (std::size_t i = 0; i < batch.size(); ++i) {
            Matrix out(counts[i], 48 * query_heads_);
            batch[i]->attend(queries.middleRows(offsets[i], counts[i]), out, parameters);
            alone.middleRows(offsets[i], counts[i]) = out;
        }
        for (const Index threads : {0, 3}) {
            std::unique_ptr<ThreadExecutor> executor;
            if (threads > 0) executor = std::make_unique<ThreadExecutor>(threads);
            AttentionWorkspace workspace(executor.get());
            Matrix together(offsets.back(), 48 * query_heads_);
            for (int again = 0; again < 2; ++again) {
                together.setConstant(-7.0f);
                KvCache::attend_batch(batch, offsets, queries, together, parameters, workspace);
                for (std::size_t i = 0; i < batch.size(); ++i)
                    ASSERT_TRUE((bits(together.middleRows(offsets[i], counts[i])) ==
                                 bits(alone.middleRows(offsets[i], counts[i])))
                                    .all())
                        << "sequence " << i << " of " << batch[i]->tokens() << " tokens, " << threads
                        << " threads";
            }
        }
    }
};

TEST_P(SharedPrefix, GivesTheSameBitsAsApart) {
    for (const auto& [kv_heads, query_heads] : {std::pair<Index, Index>{2, 4}, {2, 2}, {1, 5}}) {
        grow(kv_heads, query_heads);
        const std::vector<float> sinks = {0.5f, -2.0f, 3.0f, 0.0f, 1.0f};
        const std::vector<float> slopes = {0.01f, 0.02f, 0.03f, 0.04f, 0.05f};
        for (int round = 0; round < 10; ++round) {
            std::vector<const KvCache*> batch;
            std::vector<Index> counts;
            AttentionParameters parameters;
            const bool window = round % 5 == 1;
            for (Index i = 2 + up_to(20); i >= 0; --i) {
                const auto& cache =
                    caches_[static_cast<std::size_t>(up_to(static_cast<Index>(caches_.size()) - 1))];
                if (window && cache.first_kept() > 10) continue;
                batch.push_back(&cache);
                counts.push_back(i % 7 == 3 ? up_to(9) : 1 + up_to(3));
            }
            if (window) parameters.sliding_window = 1000, parameters.sinks = 4;
            const auto heads = static_cast<std::size_t>(query_heads);
            if (round % 5 == 2) parameters.sink_logits = std::span(sinks).first(heads);
            if (round % 5 == 3) parameters.alibi_slopes = std::span(slopes).first(heads);
            if (round % 5 == 4) parameters.softcap = 5.0;
            compare(batch, counts, parameters);
        }
    }
}

/// More query tokens than one pass takes.
TEST_P(SharedPrefix, ManyForks) {
    grow(2, 2);
    std::vector<const KvCache*> batch;
    for (int i = 0; i < 45; ++i) batch.push_back(&caches_[static_cast<std::size_t>(2 + i % 6)]);
    compare(batch, std::vector<Index>(45, 3), {});
}

INSTANTIATE_TEST_SUITE_P(Recipes, SharedPrefix,
                         testing::ValuesIn(thinned(std::vector<std::string>{
                             "fp16", "kivi:4:32", "key_favored:4:4", "key_favored:8:8",
                             "key_favored:3:5+rotate_keys=1+recent=100+key_group=64",
                             "key_favored:8:1+sinks=0+recent=0", "standard", "latent:3:3+fit_tokens=130",
                             "latent:2:4+frame=after_rope+heads_together=1+fit_tokens=200",
                             "latent:4:4+heads_together=1+fit_tokens=200"})),
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
