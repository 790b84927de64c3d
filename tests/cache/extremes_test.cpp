// Numbers at the ends of their ranges: queries up to the largest float and down to where their factors
// count as 0, keys up to the largest fp16, one key or channel far above all others.
//
// Outputs are within T14 of double precision over what is stored, or NaN where scores may not be floats.
// They are never silently 0.
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "cache_support.hpp"
#include "row_reference.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

class Extremes : public testing::TestWithParam<std::string> {
  protected:
    static constexpr Index tokens = 300, dim = 32;

    CacheConfiguration configuration_ = configuration(GetParam(), 1, 1, dim, dim);
    std::mt19937_64 random_{seed()};
    TilePool pool_;

    Matrix uniform(Index rows, float low, float high) {
        std::uniform_real_distribution<float> number(low, high);
        return Matrix::NullaryExpr(rows, dim, [&] { return number(random_); });
    }
    KvCache cache_of(const Matrix& keys, const Matrix& values) {
        KvCache cache(configuration_, pool_);
        append(cache, keys, values);
        return cache;
    }
    /// Of 1 to 8 query tokens and of 9, on every instruction set. Returns how many rows were NaN.
    int expect_right_or_nan(const KvCache& cache, const Matrix& queries) {
        int not_numbers = 0;
        RowReference reference(cache);
        for (const Index count : {1, 8, 9}) {
            const Matrix q = queries.topRows(count);
            for_each_isa([&](Isa) {
                const Matrix out = attend(cache, q);
                for (Index i = 0; i < count; ++i) {
                    if (out.row(i).array().isNaN().all()) {
                        ++not_numbers;
                        continue;
                    }
                    reference.compute(q.row(i), 0, i, count, {});
                    ASSERT_LE((out.row(i).cast<double>() - reference.output).norm(), reference.bound)
                        << count << " query tokens, row " << i << ": " << out.row(i);
                }
            });
        }
        return not_numbers;
    }
};

/// Scores from 1e-32 to beyond all floats, of both signs and of one: where all are far below 0, the largest
/// still decides.
TEST_P(Extremes, QueriesOfAnySize) {
    // A rotated head may have one channel as large as its norm.
    for (const float largest_key : {1e-4f, 1.0f, 5000.0f})
        for (const float low : {-1.0f, 0.05f}) {
            KvCache cache = cache_of(-largest_key * uniform(tokens, low, 1.0f), uniform(tokens, 1.0f, 1.2f));
            for (const float largest_query :
                 {1e-44f, 1e-38f, 1e-32f, 1e-20f, 1.0f, 1e10f, 1e20f, 1e22f, 1e30f, 1e33f, 1e36f, 1e37f,
                  1e38f, std::numeric_limits<float>::max()}) {
                SCOPED_TRACE("keys of " + std::to_string(largest_key) + ", queries of " +
                             std::to_string(largest_query) + (low < 0.0f ? ", of both signs" : ", of one"));
                const Matrix q = largest_query * uniform(9, low, 1.0f);
                const int not_numbers = expect_right_or_nan(cache, q);
                const float score = largest_query * std::max(1.0f, largest_key);
                if (score < (configuration_.recipe.latents ? 1e28f : 1e34f)) {
                    EXPECT_EQ(not_numbers, 0);
                }
                if (HasFatalFailure()) return;
            }
        }
}

/// What is no number, or more than that, makes NaN of its row and of no other.
TEST_P(Extremes, ARowThatIsNoNumberGetsNaN) {
    KvCache cache = cache_of(uniform(tokens, -1.0f, 1.0f), uniform(tokens, 1.0f, 1.2f));
    constexpr float infinity = std::numeric_limits<float>::infinity();
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity})
        for (const Index count : {1, 8, 9}) {
            Matrix q = uniform(count, -1.0f, 1.0f);
            const Index row = count / 2;
            q(row, 5) = bad;
            const Matrix out = attend(cache, q);
            for (Index i = 0; i < count; ++i)
                EXPECT_EQ(out.row(i).array().isNaN().count(), i == row ? dim : 0)
                    << bad << ", row " << i << " of " << count;
        }
}

/// One channel of keys so far above the others that their factors round to 0.
TEST_P(Extremes, OneChannelFarAboveAllOthers) {
    for (const float above : {1e2f, 1e4f, 3e4f}) {
        Matrix keys = uniform(tokens, -0.01f, 0.01f);
        keys.col(7) *= 100.0f * above;
        if (configuration_.recipe.keys.rotate) keys *= 0.1f;
        KvCache cache = cache_of(keys, uniform(tokens, 1.0f, 1.2f));
        EXPECT_EQ(expect_right_or_nan(cache, uniform(9, -1.0f, 1.0f)), 0) << above;
    }
}

/// One token whose weight, or whose values, take all of the scale: the factors of the others round to 0.
TEST_P(Extremes, OneTokenFarAboveAllOthers) {
    for (const float score : {1.0f, 30.0f, 80.0f, 200.0f})
        for (const float value : {1.0f, 1e3f, 1e4f}) {
            SCOPED_TRACE("a score of " + std::to_string(score) + ", values of " + std::to_string(value));
            Matrix keys = uniform(tokens, -0.1f, 0.1f), values = uniform(tokens, 1.0f, 1.2f);
            const Matrix q = uniform(9, 0.5f, 1.0f);
            keys.row(70).setConstant(score * std::sqrt(static_cast<float>(dim)) /
                                     (0.75f * static_cast<float>(dim)));
            values.row(70) *= value;
            KvCache cache = cache_of(keys, values);
            EXPECT_EQ(expect_right_or_nan(cache, q), 0);
        }
}

INSTANTIATE_TEST_SUITE_P(Recipes, Extremes,
                         testing::ValuesIn(thinned(std::vector<std::string>{
                             "fp16", "block32:8", "block32:7+key_scheme=min_max", "kivi:2", "key_favored:8:8",
                             "key_favored:4:4", "key_favored:6:3", "key_favored:16:4", "key_favored:1:1",
                             "standard", "key_favored:5:5+rotate_keys=1", "latent:3:3+fit_tokens=130",
                             "weighted:3:16+fit_tokens=150"})),
                         test_name);

}  // namespace
