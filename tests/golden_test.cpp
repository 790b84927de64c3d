// The stored bytes of every recipe, pinned: whoever changes the format sees it here, and raises the version
// (cache_format in io/cache_content.hpp) so that old files are refused or read, never misread.
//
//   KVPLANE_GOLDEN=print golden_test     prints the table below as this build makes it, and hashes of what
//                                        attention returns for every recipe, read policy, number of query
//                                        tokens and instruction set: for comparing two builds
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "byte_hash.hpp"
#include "cache/cache_support.hpp"
#include "kvplane/io/cache_file.hpp"
#include "test_inputs.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

std::uint64_t hash_of(const void* data, std::size_t size) {
    ByteHash hash;
    hash.add(data, size);
    return hash.value();
}

/// Numbers that every compiler and library makes alike: sums of four hashed uniforms, some channels large.
Matrix made(Index rows, Index cols, std::uint64_t stream) {
    Matrix matrix(rows, cols);
    std::uint64_t state = stream * 0x9E3779B97F4A7C15u;
    const auto uniform = [&] {  // splitmix64, in -1 .. 1
        std::uint64_t x = state += 0x9E3779B97F4A7C15u;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
        x = (x ^ x >> 27) * 0x94D049BB133111EBu;
        return static_cast<float>(static_cast<std::int32_t>((x ^ x >> 31) >> 40)) * 0x1p-23f - 1.0f;
    };
    for (Index r = 0; r < rows; ++r)
        for (Index c = 0; c < cols; ++c) {
            float sum = 0.0f;
            for (int i = 0; i < 4; ++i) sum += uniform();
            matrix(r, c) = c % 13 == 5 ? 8.0f * sum : sum;
        }
    return matrix;
}

constexpr Index tokens = 700;

KvCache filled(const std::string& recipe, TilePool& pool) {
    KvCache cache(configuration(recipe, 2, 4, 40, 48), pool);
    append(cache, made(tokens, 2 * 40, 1), made(tokens, 2 * 48, 2));
    return cache;
}

const std::map<std::string, std::uint64_t>& golden() {
    static const std::map<std::string, std::uint64_t> hashes{
#include "data/golden_bytes.inc"
    };
    return hashes;
}

std::vector<std::string> recipes_and_more() {
    std::vector<std::string> names = recipe_names();
    for (const char* more :
         {"key_favored:8:8", "key_favored:16:4", "key_favored:4:16", "key_favored:5:7", "key_favored:6:3",
          "key_favored:1:1", "kivi:8", "latent:8:8+fit_tokens=256",
          "latent:3:3+heads_together=1+fit_tokens=256", "key_favored:4:2+value_scheme=unbiased",
          "key_favored:5:3+value_scheme=unbiased+value_group=16+rotate_keys=1"})
        names.push_back(more);
    return names;
}

bool prints() {
    const char* const wanted = std::getenv("KVPLANE_GOLDEN");
    return wanted && std::string(wanted) == "print";
}

/// A basis is fitted in floating point, by operations that another target may order or contract otherwise.
bool pinned(const CacheRecipe& recipe) {
#if defined(__x86_64__) && !defined(__FMA__)
    return recipe.name != "";
#else
    return !recipe.latents && !recipe.shaped_keys;
#endif
}

TEST(Golden, StoredBytesAreThoseOfTheFormat) {
    TilePool pool;
    for (const std::string& recipe : recipes_and_more())
        for_each_isa([&](Isa isa) {
            const KvCache cache = filled(recipe, pool);
            const std::vector<std::byte> bytes = to_bytes(cache);
            const std::uint64_t hash = hash_of(bytes.data(), bytes.size());
            if (prints()) {
                if (isa == Isa::scalar)
                    std::printf("{\"%s\", 0x%016llXu},\n", recipe.c_str(),
                                static_cast<unsigned long long>(hash));
                return;
            }
            if (!pinned(cache.configuration().recipe)) return;
            ASSERT_TRUE(golden().contains(recipe)) << recipe;
            EXPECT_EQ(hash, golden().at(recipe)) << recipe;
        });
}

TEST(Golden, PrintsWhatAttentionReturns) {
    if (!prints()) GTEST_SKIP() << "only with KVPLANE_GOLDEN=print";
    TilePool pool;
    for (const std::string& recipe : recipes_and_more()) {
        KvCache cache = filled(recipe, pool);
        cache.drop_before(150);
        for (const char* policy :
             {"all", "4", "9", "3:5", "9:10", "fixed4:8", "fixed8", "tolerance=0.1", "aligned", "published"})
            for (const Index query_tokens : {1, 3, 8, 9})
                for_each_isa([&](Isa isa) {
                    AttentionParameters parameters;
                    if (std::string(policy) != "all") parameters.read = recipes::read_policy(policy);
                    if (query_tokens == 3) parameters.softcap = 20.0;
                    if (query_tokens == 8) parameters.sliding_window = 300;
                    AttentionWorkspace workspace;
                    Matrix output(query_tokens, 4 * 48);
                    try {
                        cache.attend(made(query_tokens, 4 * 40, 3), output, parameters, workspace);
                    } catch (const Error&) {
                        return;
                    }
                    const ReadReport report = workspace.report();
                    std::printf("# %s@%s %d %s %016llX %.17g %.17g %.17g %.17g\n", recipe.c_str(), policy,
                                static_cast<int>(query_tokens), std::string(name(isa)).c_str(),
                                static_cast<unsigned long long>(hash_of(
                                    output.data(), sizeof(float) * static_cast<std::size_t>(output.size()))),
                                report.key_bits, report.value_bits, report.mean_bits,
                                report.relative_error_bound);
                });
    }
}

}  // namespace
