// Pages to chunks and back: every byte of every layout, and chunks that are not what they should be.
#include "kvplane/io/packed_pages.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cache/cache_support.hpp"
#include "kvplane/cache/shape.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;
using detail::PackedChunks;
using detail::PackedPages;
using detail::PageForm;
using detail::PageRun;

void expect_each_byte_once(const PageForm& form) {
    std::vector<int> count(static_cast<std::size_t>(form.bytes));
    for (const PageRun& run : form.runs)
        for (Index i = 0; i < run.count; ++i) ++count[static_cast<std::size_t>(run.at + i * run.step)];
    EXPECT_EQ(count, std::vector<int>(count.size(), 1));
}

TEST(PageForm, HasEveryByteOfAPageOnce) {
    TilePool pool;
    for (const std::string& recipe : recipe_names()) {
        SCOPED_TRACE(recipe);
        for (const Index dim : {16, 40}) {
            const CacheConfiguration c = configuration(recipe, 2, 4, dim, dim + 8);
            KvCache cache(c, pool);
            std::mt19937_64 random(1);
            append(cache, normal_matrix(random, 300, 2 * dim), normal_matrix(random, 300, 2 * (dim + 8)));
            expect_each_byte_once(PageForm::of(*cache.state().layout));
            expect_each_byte_once(PageForm::of_rows(cache.shape().recent_rows().bytes()));
        }
    }
    CacheConfiguration c = configuration("key_favored:3:3", 1, 4, 64, 32);
    c.values_in_keys = true;
    c.recipe.values = c.recipe.keys;
    c.recipe.rotary_bits = 16;
    expect_each_byte_once(PageForm::of(*KvCache(c, pool).state().layout));
    for (const Index bytes : {0, 1, 2, 3, 64, 77}) expect_each_byte_once(PageForm::of_rows(bytes));
}

class PackedPagesTest : public testing::Test {
  protected:
    void SetUp() override {
        if (!detail::can_pack()) GTEST_SKIP() << "built without libzstd";
    }
    /// Pages of bytes of which `levels` are used.
    void fill(const std::vector<const PageForm*>& forms, unsigned levels) {
        forms_ = forms;
        pages_.clear();
        for (const PageForm* form : forms_) {
            pages_.emplace_back(static_cast<std::size_t>(form->bytes));
            for (std::byte& byte : pages_.back()) byte = static_cast<std::byte>(random_() % levels);
        }
    }
    /// Packs, and keeps it as a file would.
    void pack() {
        const std::vector<std::span<const std::byte>> views(pages_.begin(), pages_.end());
        bytes_.clear();
        sizes_.clear();
        for (const std::vector<std::byte>& chunk : detail::pack_pages(views, forms_)) {
            bytes_.insert(bytes_.end(), chunk.begin(), chunk.end());
            sizes_.push_back(static_cast<std::int64_t>(chunk.size()));
        }
    }
    void unpack() {
        const std::vector<PageReference> pages =
            detail::unpack_pages({"file: tiles.chunks", bytes_, sizes_}, forms_, pool_);
        ASSERT_EQ(pages.size(), pages_.size());
        for (std::size_t i = 0; i < pages.size(); ++i) {
            ASSERT_EQ(pages[i].bytes(), static_cast<Index>(pages_[i].size()));
            EXPECT_EQ(std::memcmp(pages[i].data(), pages_[i].data(), pages_[i].size()), 0) << "page " << i;
        }
    }
    void refuses(const std::string& words) {
        const std::string sentence = refusal(ErrorCode::format, [&] { unpack(); });
        EXPECT_EQ(sentence.find("kvplane: file: tiles.chunks: "), 0u) << sentence;
        EXPECT_NE(sentence.find(words), std::string::npos) << sentence;
        EXPECT_EQ(pool_.bytes(), 0);
    }

    std::mt19937_64 random_{3};
    TilePool pool_;
    std::vector<const PageForm*> forms_;
    std::vector<std::vector<std::byte>> pages_;
    std::vector<std::byte> bytes_;
    std::vector<std::int64_t> sizes_;
};

TEST_F(PackedPagesTest, ComeBackByteForByte) {
    const PageForm rows = PageForm::of_rows(4097),
                   short_rows{.bytes = 100, .runs = {{7, 0, 60, 1}, {9, 60, 40, 1}}},
                   long_rows{.bytes = 300000, .runs = {{0, 0, 300000, 1}}};
    for (const unsigned levels : {1u, 2u, 200u, 256u})
        for (const std::size_t count : {0u, 1u, 5u, 70u}) {
            SCOPED_TRACE(std::to_string(levels) + " levels, " + std::to_string(count) + " pages");
            std::vector<const PageForm*> forms;
            for (std::size_t i = 0; i < count; ++i)
                forms.push_back(i % 5 == 3 ? &long_rows : i % 3 == 1 ? &short_rows : &rows);
            fill(forms, levels);
            pack();
            unpack();
        }
}

/// One stream of 3 chunks of codes of 7 bits, of 65536, 65536 and 18928 bytes.
TEST_F(PackedPagesTest, TakeWhatTheirEntropyIs) {
    const PageForm form{.bytes = 50000, .runs = {{0, 0, 50000, 1}}};
    fill({&form, &form, &form}, 128);
    pack();
    ASSERT_EQ(sizes_.size(), 3u);
    EXPECT_NEAR(static_cast<double>(sizes_[0]), 65536 * 7 / 8, 600);
    EXPECT_NEAR(static_cast<double>(sizes_[2]), 18928 * 7 / 8, 300);
    // What would save too little stands as it is.
    fill({&form, &form, &form}, 253);
    pack();
    EXPECT_EQ(sizes_, (std::vector<std::int64_t>{65536, 65536, 18928}));
    EXPECT_EQ(std::memcmp(bytes_.data(), pages_[0].data(), 50000), 0);
}

TEST_F(PackedPagesTest, RefuseWhatTheyCannotBe) {
    const PageForm form{.bytes = 50000, .runs = {{0, 0, 50000, 1}}};
    fill({&form, &form, &form}, 128);
    pack();
    const std::vector<std::byte> bytes = bytes_;
    const std::vector<std::int64_t> sizes = sizes_;
    const auto change = [&](std::size_t chunk, std::int64_t size, const std::string& words) {
        sizes_[chunk] = size;
        refuses(words);
        sizes_ = sizes;
    };
    change(1, 0, "chunk 1 takes 0 bytes, expected 1 to 65536 of the ");
    change(1, -1, "chunk 1 takes -1 bytes");
    change(1, 65537, "chunk 1 takes 65537 bytes");
    change(2, sizes[2] + 1, "chunk 2 takes ");
    change(2, sizes[2] - 1, "chunk 2: zstd gives ");
    change(0, sizes[0] + 1, "chunk 0: zstd gives ");
    sizes_.pop_back();
    refuses("chunk 2 is missing");
    sizes_ = sizes;
    sizes_.push_back(1);
    bytes_.push_back(std::byte{0});
    refuses("4 chunks in ");
    sizes_ = sizes;
    refuses("3 chunks in ");
    bytes_ = bytes;
    for (std::size_t size = 0; size < bytes.size(); size += 997) {
        bytes_.resize(size);
        refuses("chunk ");
        bytes_ = bytes;
    }
}

/// Frames that would give more, or less, than the pages have room for.
TEST_F(PackedPagesTest, RefuseFramesOfAnotherSize) {
    const PageForm large{.bytes = 65536, .runs = {{0, 0, 65536, 1}}};
    const PageForm small{.bytes = 60000, .runs = {{0, 0, 60000, 1}}};
    fill({&large}, 1);
    pack();
    forms_ = {&small};
    refuses("chunk 0: zstd gives Destination buffer is too small, expected 60000 bytes");
    fill({&small}, 1);
    pack();
    forms_ = {&large};
    refuses("chunk 0: zstd gives fewer bytes, expected 65536 bytes");
}

TEST(PackedPagesSize, MayNotClaimMoreThanTheirChunksHold) {
    const PackedPages packed{"file: tiles.chunks", {}, {1, 1}};
    for (const Index bytes : {0, 1, 2 << 16}) packed.require_room(bytes);
    EXPECT_EQ(
        refusal(ErrorCode::format, [&] { packed.require_room(3 << 16); }),
        "kvplane: file: tiles.chunks: 2 chunks for 196608 bytes, expected at least one for every 65536");
}

}  // namespace
