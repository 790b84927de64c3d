// Ranges of tokens: out to a file, and back to where they were.
#include "kvplane/io/range_file.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "cache/cache_support.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/io/file.hpp"
#include "kvplane/io/safetensors.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

class Range : public testing::TestWithParam<std::string> {
  protected:
    ~Range() override {
        for (const auto& path : paths_) std::filesystem::remove(path);
    }
    const std::filesystem::path& path(std::size_t i = 0) {
        while (paths_.size() <= i)
            paths_.push_back(
                std::filesystem::temp_directory_path() /
                ("kvplane_range_" + std::to_string(::getpid()) + "_" + std::to_string(paths_.size())));
        return paths_[i];
    }
    KvCache filled(const CacheConfiguration& c, Index tokens) {
        KvCache cache(c, pool_);
        append(cache, normal_matrix(random_, tokens, c.kv_heads * c.key_head_dim),
               normal_matrix(random_, tokens, c.kv_heads * c.value_head_dim));
        return cache;
    }
    void expect_same(const KvCache& a, const KvCache& b) {
        ASSERT_EQ(to_bytes(a), to_bytes(b));
        const Matrix q = normal_matrix(random_, 3, 4 * 32);
        EXPECT_EQ(attend(a, q), attend(b, q));
        EXPECT_EQ(a.error_bound().key, b.error_bound().key);
    }
    /// The same tokens in both, and the same after them.
    void go_on(KvCache& a, KvCache& b) {
        const Matrix keys = normal_matrix(random_, 150, 64), values = normal_matrix(random_, 150, 96);
        append(a, keys, values);
        append(b, keys, values);
        expect_same(a, b);
    }

    TilePool pool_;
    std::mt19937_64 random_{7};
    std::vector<std::filesystem::path> paths_;
};

TEST_P(Range, LeavesMemoryAndComesBack) {
    const CacheConfiguration c = configuration(GetParam());
    KvCache cache = filled(c, 900), whole = cache.fork();
    const Index start = cache.state().tiles[0].first;
    for (const Index tiles : {1, 3, 5}) {
        SCOPED_TRACE(tiles);
        whole = filled(c, 900);
        cache = load_cache(to_bytes(whole), c, pool_);  // pages of its own
        const Index used = pool_.bytes(), end = start + tiles * 128;
        save_range(cache, start, end, path());
        cache.drop_before(end);
        if (end < cache.state().recent_first) {
            EXPECT_LE(pool_.bytes(), used - tiles * cache.state().layout->bytes);
            EXPECT_EQ(cache.first_kept(), end);
        }
        load_range(path(), cache);
        EXPECT_EQ(pool_.bytes(), used);
        expect_same(cache, whole);
        // Tokens come while others are away.
        save_range(cache, start, end, path());
        cache.drop_before(end, std::min<Index>(2, c.recipe.sink_tokens));
        const Matrix keys = normal_matrix(random_, 150, 64), values = normal_matrix(random_, 150, 96);
        append(cache, keys, values);
        append(whole, keys, values);
        load_range(path(), cache);
        expect_same(cache, whole);
        go_on(cache, whole);
    }
}

TEST_P(Range, SeveralComeBackLastFirst) {
    const CacheConfiguration c = configuration(GetParam());
    KvCache cache = filled(c, 900), whole = cache.fork();
    const Index start = cache.state().tiles[0].first;
    for (std::size_t i = 0; i < 4; ++i) {
        const Index first = start + static_cast<Index>(i) * 128;
        save_range(cache, first, first + 128, path(i));
    }
    cache.drop_before(start + 4 * 128 + 5);  // the fifth tile stays
    const std::vector<std::byte> dropped = to_bytes(cache);
    for (const std::size_t wrong : {0u, 1u, 2u}) {
        const std::string sentence = refusal(ErrorCode::mismatch, [&] { load_range(path(wrong), cache); });
        EXPECT_NE(sentence.find("the cache lacks [" + std::to_string(start) + ", " +
                                std::to_string(start + 4 * 128) + ")"),
                  std::string::npos)
            << sentence;
    }
    EXPECT_EQ(to_bytes(cache), dropped);
    for (std::size_t i = 4; i-- > 0;) {
        load_range(path(i), cache);
        const Index first = start + static_cast<Index>(i) * 128;
        if (i > 0) {
            // As if only the tokens before it had been dropped.
            KvCache expected = whole.fork();
            expected.drop_before(first);
            expect_same(cache, expected);
        }
    }
    expect_same(cache, whole);
    refusal(ErrorCode::mismatch, [&] { load_range(path(0), cache); });  // it has them
}

TEST_P(Range, ContinuesAPrefix) {
    const CacheConfiguration c = configuration(GetParam());
    KvCache whole = filled(c, 900);
    const Index start = whole.state().tiles[0].first, recent = whole.state().recent_first;
    save_range(whole, 0, start + 128, path(0));
    save_range(whole, start + 128, start + 2 * 128, path(1));
    const bool ends = c.recipe.every_token;  // its last tile is not full
    const Index end = ends ? start + 6 * 128 : 900;
    save_range(whole, start + 2 * 128, end, path(2));
    KvCache cache(c, pool_);
    load_range(path(0), cache);
    KvCache prefix = whole.fork();
    prefix.truncate(start + 128);
    expect_same(cache, prefix);
    expect_same(load_cache(path(0), c, pool_), prefix);
    refusal(ErrorCode::mismatch, [&] { load_range(path(0), cache); });
    refusal(ErrorCode::mismatch, [&] { load_range(path(2), cache); });
    load_range(path(1), cache);
    load_range(path(2), cache);
    if (ends) whole.truncate(end);
    expect_same(cache, whole);
    go_on(cache, whole);
    if (ends || recent == 900) return;
    // The recent tokens by themselves.
    KvCache other = load_cache(to_bytes(whole), c, pool_);
    const Index tokens = other.tokens(), first = other.state().recent_first;
    save_range(other, first, tokens, path(0));
    other.truncate(first);
    load_range(path(0), other);
    expect_same(other, whole);
}

/// From 0 on, a range ends anywhere.
TEST_P(Range, PrefixIsATruncatedFork) {
    const CacheConfiguration c = configuration(GetParam());
    KvCache whole = filled(c, 500);
    for (const Index last : {1, 3, 4, 100, 260, 333, 470, 499, 500}) {
        SCOPED_TRACE(last);
        KvCache prefix = whole.fork();
        prefix.truncate(last);
        save_range(whole, 0, last, path());
        KvCache loaded = load_cache(path(), c, pool_);
        ASSERT_EQ(to_bytes(loaded), to_bytes(prefix));
        go_on(loaded, prefix);
    }
}

INSTANTIATE_TEST_SUITE_P(Recipes, Range, testing::ValuesIn(recipe_names()), test_name);

class RangeFile : public Range {};
INSTANTIATE_TEST_SUITE_P(One, RangeFile, testing::Values("standard"));

void says(const std::string& sentence, const std::string& words) {
    EXPECT_NE(sentence.find(words), std::string::npos) << sentence;
}

TEST_P(RangeFile, NamesTheNearestBorders) {
    const CacheConfiguration c = configuration("standard");
    KvCache cache = filled(c, 700);  // sinks to 4, tiles to 644, recent tokens
    const auto save = [&](Index first, Index last) { save_range(cache, first, last, path()); };
    says(refusal(ErrorCode::index, [&] { save(100, 260); }),
         "to begin at 0, 4 or 132 and to end at 132 or 260");
    says(refusal(ErrorCode::index, [&] { save(132, 300); }), "to end at 260 or 388");
    says(refusal(ErrorCode::index, [&] { save(2, 132); }), "to begin at 0, 4 and to end");
    says(refusal(ErrorCode::index, [&] { save(644, 690); }), "to end at 644 or 700");
    says(refusal(ErrorCode::index, [&] { save(132, 132); }), "tokens [132, 132) of 700");
    says(refusal(ErrorCode::index, [&] { save(-4, 132); }), "tokens [-4, 132) of 700");
    says(refusal(ErrorCode::index, [&] { save(132, 701); }), "of 700");
    EXPECT_FALSE(std::filesystem::exists(path()));
    cache.truncate(400);  // inside the tile from 388 on
    says(refusal(ErrorCode::index, [&] { save(388, 400); }), "to begin at 0, 260 and to end at 388");
    append_provisional(cache, Matrix::Ones(2, 64), Matrix::Ones(2, 96));
    says(refusal(ErrorCode::option, [&] { save(4, 132); }), "provisional");
    cache.truncate(400);
    cache.drop_before(200);
    says(refusal(ErrorCode::index, [&] { save(132, 388); }), "but [4, 200) were dropped");
    save(260, 388);
    KvCache few = filled(c, 3);
    says(refusal(ErrorCode::index, [&] { save_range(few, 1, 3, path()); }), "no whole tile");
    const KvCache unfitted = filled(configuration("latent:3:3+fit_tokens=512"), 300);
    says(refusal(ErrorCode::option, [&] { save_range(unfitted, 4, 300, path()); }), "yet to fit its basis");
}

TEST_P(RangeFile, RefusesWhatBelongsElsewhere) {
    const CacheConfiguration c = configuration("standard");
    KvCache cache = filled(c, 700);
    save_range(cache, 4, 260, path());
    says(refusal(ErrorCode::mismatch, [&] { load_cache(path(), c, pool_); }), "a range of tokens");
    KvCache other = filled(configuration("compact"), 700);
    other.drop_before(260);
    says(refusal(ErrorCode::mismatch, [&] { load_range(path(), other); }), "another configuration");
    KvCache empty(c, pool_);
    says(refusal(ErrorCode::mismatch, [&] { load_range(path(), empty); }), "lacks [0, 0)");
    KvCache cut = cache.fork();
    cut.truncate(132 + 40);
    save_range(cache, 132 + 128, 388, path(1));
    refusal(ErrorCode::mismatch, [&] { load_range(path(1), cut); });
    // A range that holds recent tokens comes back at the end alone.
    save_range(cache, 516, 700, path(1));
    cache.drop_before(644);
    refusal(ErrorCode::mismatch, [&] { load_range(path(1), cache); });

    // A basis of the cache's own.
    const CacheConfiguration latent = configuration("latent:3:3+fit_tokens=130+context=100000");
    KvCache one = filled(latent, 500), two = filled(latent, 500);
    save_range(one, 4, 132, path());
    two.drop_before(132);
    says(refusal(ErrorCode::mismatch, [&] { load_range(path(), two); }), "another basis");
    one.drop_before(132);
    load_range(path(), one);
    EXPECT_EQ(one.first_kept(), 4);
}

TEST_P(RangeFile, RefusesEveryAlteredByte) {
    const CacheConfiguration c = configuration("standard");
    KvCache cache = filled(c, 700);
    save_range(cache, 4, 260, path());
    std::vector<std::byte> bytes;
    {
        const MappedFile file = MappedFile::open(path());
        bytes.assign(file.bytes().begin(), file.bytes().end());
    }
    const std::vector<std::byte> whole = to_bytes(cache);
    cache.drop_before(260);
    const std::vector<std::byte> before = to_bytes(cache);
    pool_.trim();
    const Index pages = pool_.pages();
    int refused = 0;
    const int count = rounds(1000);
    for (int i = 0; i < count; ++i) {
        std::vector<std::byte> altered = bytes;
        const std::size_t at = i % 2 ? random_() % bytes.size() : random_() % 1600;
        altered[at] ^= static_cast<std::byte>(1u << random_() % 8);
        std::ofstream(path(), std::ios::binary | std::ios::trunc)
            .write(reinterpret_cast<const char*>(altered.data()),
                   static_cast<std::streamsize>(altered.size()));
        try {
            KvCache loaded = cache.fork();
            load_range(path(), loaded);
            EXPECT_EQ(to_bytes(loaded), whole) << "byte " << at;
        } catch (const Error&) {
            ++refused;
            ASSERT_EQ(to_bytes(cache), before);
        }
        pool_.trim();
        ASSERT_EQ(pool_.pages(), pages);
    }
    EXPECT_GT(refused, count * 9 / 10);
}

/// Bounds of errors cover what comes from a file.
TEST_P(RangeFile, BringsItsExtremes) {
    const CacheConfiguration c = configuration("standard");
    KvCache cache = filled(c, 132 + 40);
    save_range(cache, 0, 132, path(0));
    append(cache, 100.0f * normal_matrix(random_, 400, 64), 50.0f * normal_matrix(random_, 400, 96));
    save_range(cache, 132, 260, path(1));
    KvCache other = load_cache(path(0), c, pool_);
    const CacheErrorBound before = other.error_bound();
    load_range(path(1), other);
    EXPECT_GT(other.error_bound().key, 2.0 * before.key);
    KvCache prefix = cache.fork();
    prefix.truncate(260);
    expect_same(other, prefix);
}

/// What has a right checksum and contradicts itself.
TEST_P(RangeFile, RefusesRangesThatCannotBe) {
    const CacheConfiguration c = configuration("standard");
    KvCache cache = filled(c, 700);
    save_range(cache, 516, 700, path());
    cache.truncate(516);
    const auto altered = [&](auto&& alter) {
        const SafetensorsFile file = SafetensorsFile::open(path());
        auto content = detail::CacheContent::read(file, "test", c, pool_);
        alter(content);
        SafetensorsWriter writer;
        content.add_to(writer);
        writer.write(path(1));
        return refusal(ErrorCode::format, [&] { load_range(path(1), cache); });
    };
    const std::vector<std::byte> before = to_bytes(cache);
    says(altered([](auto& content) { content.range_first = 2; }), "contradicts itself");
    says(altered([](auto& content) { content.tokens = 516; }), "contradicts itself");
    says(altered([](auto& content) { content.dropped = 700; }), "contradicts itself");
    says(altered([](auto& content) { content.tokens += 500; }), "contradicts itself");
    says(altered([](auto& content) { content.tokens += 40; }), "recent: ");
    says(altered([](auto& content) { content.tile_tokens[0] = 127; }), "tile 0: 127 tokens");
    says(altered([](auto& content) { content.tile_first[0] += 1; }), "tile 0: ");
    says(altered([](auto& content) { content.window_first -= 1; }), "the tiles end at");
    says(altered([](auto& content) { content.tile_first.push_back(644); }), "tiles: ");
    EXPECT_EQ(to_bytes(cache), before);
    load_range(path(), cache);
    EXPECT_EQ(cache.tokens(), 700);
}

/// A compressed file of a cache is a range from 0 on like any other.
TEST_F(Range, FromTheStartMayBeCompressed) {
    if (!can_compress()) GTEST_SKIP() << "built without libzstd";
    const CacheConfiguration c = configuration("standard");
    KvCache cache = filled(c, 4 + 3 * 128), loaded(c, pool_);
    save_cache(cache, path(), {.sync = false, .compress = true});
    load_range(path(), loaded);
    expect_same(loaded, cache);
    go_on(loaded, cache);
}

}  // namespace
