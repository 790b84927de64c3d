// Caches of many shapes: heads, head_dims, tokens at every border, query tokens and recipes, drawn by a seed.
//
// Attention is compared with double precision over what is stored, within T14. KVPLANE_TEST_SEED draws
// others, KVPLANE_TEST_ROUNDS=N draws N of them for each recipe instead of 8, and larger ones: a second or so
// each.
#include <gtest/gtest.h>

#include <cstdlib>
#include <numeric>
#include <sstream>

#include "cache_support.hpp"
#include "kvplane/io/cache_file.hpp"
#include "row_reference.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;
using Random = std::mt19937_64;

/// 0: not said.
int chosen_rounds() {
    const char* const chosen = std::getenv("KVPLANE_TEST_ROUNDS");
    return chosen ? std::atoi(chosen) : 0;
}

struct Case {
    std::string recipe;
    Index kv_heads, group, key_dim, value_dim, tokens, query_tokens;
    int variant;  ///< of attention: 0 plain, 1 softcap, 2 sliding window, 3 ALiBi
    std::uint64_t seed;

    CacheConfiguration configuration() const {
        CacheConfiguration made =
            kvplane_test::configuration(recipe, kv_heads, kv_heads * group, key_dim, value_dim);
        // An odd number of channels has no RoPE; half of the time it is asked for and refused.
        if (key_dim % 2 == 1 && variant % 2 == 0) made.rope.reset();
        return made;
    }
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << c.recipe << ": " << c.kv_heads << " key heads of " << c.group << " query heads, head_dim "
               << c.key_dim << " of keys and " << c.value_dim << " of values, " << c.tokens << " tokens, "
               << c.query_tokens << " query tokens, variant " << c.variant << ", inputs of seed " << c.seed;
}

Index one_of(std::initializer_list<Index> choices, Random& random) {
    return choices.begin()[random() % choices.size()];
}

/// Around the end of the sinks, of tiles, and of recent tokens.
Index border(const CacheRecipe& recipe, Random& random) {
    const Index sinks = one_of({0, recipe.sink_tokens}, random),
                recent = one_of({0, recipe.recent_tokens}, random),
                tiles = one_of({0, 1, 1, 2, 2, 3}, random), off = one_of({-1, 0, 1}, random);
    return std::max<Index>(1, sinks + tile_tokens * tiles + recent + off);
}

/// Multiplications of the reference and of fitting a basis, roughly: what a case takes.
double cost(const Case& c) {
    const CacheRecipe recipe = recipes::parse(c.recipe);
    const auto heads = static_cast<double>(c.kv_heads), tokens = static_cast<double>(c.tokens),
               dims = static_cast<double>(c.key_dim + c.value_dim),
               rows = heads * static_cast<double>(c.group * c.query_tokens);
    double sum = rows * tokens * dims + 100.0 * heads * tokens * dims;
    if (recipe.latents) {
        const double channels =
                         static_cast<double>(c.key_dim) * (recipe.latents->own_heads_together ? heads : 1.0),
                     subspaces = recipe.latents->own_heads_together ? 1.0 : heads;
        sum += 50.0 * subspaces * channels * channels * channels + 4.0 * rows * dims * dims * 8.0;
    }
    return sum;
}

Case draw(const std::string& recipe, Random& random) {
    for (;;) {
        Case c{.recipe = recipe,
               .kv_heads = one_of({1, 2, 3, 8}, random),
               .group = one_of({1, 3, 4, 6, 7, 9, 16, 24}, random),
               .key_dim = one_of({1, 31, 64, 72, 80, 96, 112, 128, 160, 256, 512, 576}, random),
               .value_dim = one_of({1, 31, 64, 72, 80, 96, 112, 128, 160, 256, 512, 576}, random),
               .tokens = border(recipes::parse(recipe), random),
               .query_tokens = 1 + static_cast<Index>(random() % 9),
               .variant = static_cast<int>(random() % 4),
               .seed = random()};
        c.query_tokens = std::min(c.query_tokens, c.tokens);
        if (cost(c) < (chosen_rounds() > 0 ? 1e9 : 4e7)) return c;
    }
}

// -- The sweep ----------------------------------------------------------------------------------------------

/// What is refused of a shape: groups of latents that do not divide it, half a pair of RoPE.
bool refused(const Case& c, TilePool& pool) {
    const CacheConfiguration configuration = c.configuration();
    const auto& latents = configuration.recipe.latents;
    const Index channels = c.key_dim * (latents && latents->own_heads_together ? c.kv_heads : 1);
    const bool divides =
        !latents || latents->groups.empty() || channels % static_cast<Index>(latents->groups.size()) == 0;
    if (divides && (!configuration.rope || c.key_dim % 2 == 0)) return false;
    EXPECT_NE(
        refusal(divides ? ErrorCode::option : ErrorCode::shape, [&] { KvCache cache(configuration, pool); }),
        "");
    return true;
}
/// A basis cannot be fitted to fewer than two tokens, nor to fewer than it has latents; nothing then changes.
void expect_fit_or_refusal(const KvCache& cache) {
    if (!cache.configuration().fits_basis() || cache.latent_keys()) return;
    KvCache fork = cache.fork();
    const Index waiting = cache.tokens() - std::min(cache.tokens(), cache.configuration().recipe.sink_tokens);
    const std::vector<std::byte> before = to_bytes(cache);
    try {
        fork.fit_basis();
        EXPECT_GE(waiting, 2);
        EXPECT_NE(fork.latent_keys(), nullptr);
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::shape) << error.what();
        EXPECT_EQ(to_bytes(fork), before);
    }
}

AttentionParameters parameters_of(const Case& c, const std::vector<float>& slopes) {
    AttentionParameters parameters;
    if (c.variant == 1) parameters.softcap = 3.0;
    if (c.variant == 2) parameters.sliding_window = 1 + c.tokens / 2, parameters.sinks = 2;
    if (c.variant == 3) parameters.alibi_slopes = slopes;
    return parameters;
}

void check(const Case& c) {
    TilePool pool;
    if (refused(c, pool)) return;
    const CacheConfiguration configuration = c.configuration();
    Random random(c.seed);
    Matrix keys = normal_matrix(random, c.tokens, c.kv_heads * c.key_dim, 2.0f);
    keys.col(keys.cols() / 2) *= 8.0f;
    const Matrix values = normal_matrix(random, c.tokens, c.kv_heads * c.value_dim),
                 queries = normal_matrix(random, c.query_tokens, configuration.query_heads * c.key_dim);
    const std::vector<float> slopes(static_cast<std::size_t>(configuration.query_heads), 0.01f);
    const AttentionParameters parameters = parameters_of(c, slopes);
    const Index first_part = static_cast<Index>(random() % static_cast<std::uint64_t>(c.tokens + 1));

    std::vector<std::byte> bytes;
    std::vector<Matrix> outputs;
    bool decodes = false;  // whether packed bits are read as they are
    MatrixD exact(c.query_tokens, configuration.query_heads * c.value_dim),
        bounds(c.query_tokens, configuration.query_heads), fp32 = bounds;
    for_each_isa([&](Isa) {
        KvCache cache(configuration, pool);
        kvplane_test::append(cache, keys.topRows(first_part), values.topRows(first_part));
        kvplane_test::append(cache, keys.bottomRows(c.tokens - first_part),
                             values.bottomRows(c.tokens - first_part));
        const bool first = bytes.empty();
        if (first) {
            bytes = to_bytes(cache);
            expect_fit_or_refusal(cache);
            decodes = reads_packed(cache, parameters);
            RowReference reference(cache);
            for (Index head = 0; head < configuration.query_heads; ++head)
                for (Index i = 0; i < c.query_tokens; ++i) {
                    reference.compute(queries.row(i).segment(head * c.key_dim, c.key_dim), head, i,
                                      c.query_tokens, parameters);
                    exact.row(i).segment(head * c.value_dim, c.value_dim) = reference.output;
                    bounds(i, head) = reference.bound;
                    fp32(i, head) = reference.fp32;
                }
        } else {
            EXPECT_EQ(to_bytes(cache), bytes) << "bytes differ between instruction sets";
        }
        outputs.push_back(attend(cache, queries, parameters));
        for (Index head = 0; head < configuration.query_heads; ++head)
            for (Index i = 0; i < c.query_tokens; ++i) {
                const auto part = [&](const auto& m) {
                    return m.row(i).segment(head * c.value_dim, c.value_dim).template cast<double>().eval();
                };
                const double off = (part(outputs.back()) - part(exact)).norm();
                ASSERT_LE(off, bounds(i, head)) << "query head " << head << ", token " << i;
                // A factor that lies within fp32 rounding of two int8 may become either: one unit, of which
                // T14 counts half of one for each of 31 factors or more. Two of them are more than happen.
                const double apart = (part(outputs.back()) - part(outputs[0])).norm();
                ASSERT_LE(apart, fp32(i, head) + (decodes ? bounds(i, head) * 4.0 / 31.0 : 0.0))
                    << "query head " << head << ", token " << i << ", from the first instruction set";
            }
    });
}

class Shapes : public testing::TestWithParam<std::string> {};

TEST_P(Shapes, AttendWithinT14OnAllInstructionSets) {
    const std::string& recipe = GetParam();
    Random random(std::accumulate(recipe.begin(), recipe.end(), seed(), [](std::uint64_t sum, char c) {
        return 31 * sum + static_cast<std::uint64_t>(c);
    }));
    const int rounds = chosen_rounds() > 0 ? chosen_rounds() : 8;
    for (int round = 0; round < rounds && !HasFailure(); ++round) {
        const Case c = draw(recipe, random);
        std::ostringstream described;
        described << "round " << round << ", " << c;
        SCOPED_TRACE(described.str());
        check(c);
    }
}

INSTANTIATE_TEST_SUITE_P(Recipes, Shapes, testing::ValuesIn(with(recipe_names(), token_grid_names())),
                         test_name);

}  // namespace
