// Files of caches take no second copy of a cache, and survive the end of memory at every allocation.
#include "kvplane/io/cache_content.hpp"

#include <gtest/gtest.h>
#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "cache/cache_support.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/io/range_file.hpp"
#include "kvplane/io/session_file.hpp"
#include "test_support.hpp"

namespace {
std::atomic<long> allocations_left{-1};  // negative: no end
std::atomic<long> held{0}, peak{0};      // bytes

void* allocated(std::size_t size) noexcept {
    if (allocations_left >= 0 && allocations_left-- == 0) {
        allocations_left = 0;  // it has ended for good
        return nullptr;
    }
    void* const memory = std::malloc(size ? size : 1);
    if (!memory) return nullptr;
    held += static_cast<long>(malloc_usable_size(memory));
    if (held > peak) peak = held.load();
    return memory;
}
void freed(void* memory) noexcept {
    if (memory) held -= static_cast<long>(malloc_usable_size(memory));
    std::free(memory);
}
}  // namespace

// Every allocation of this program but those with an alignment, which pages have. Not inlined, or g++ would
// see free() meet operator new.
__attribute__((noinline)) void* operator new(std::size_t size) {
    void* const memory = allocated(size);
    if (!memory) throw std::bad_alloc();
    return memory;
}
__attribute__((noinline)) void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    return allocated(size);
}
__attribute__((noinline)) void operator delete(void* memory) noexcept {
    freed(memory);
}
__attribute__((noinline)) void operator delete(void* memory, std::size_t) noexcept {
    freed(memory);
}

namespace {

using namespace kvplane;
using namespace kvplane_test;

KvCache filled(const CacheConfiguration& c, TilePool& pool, Index tokens) {
    std::mt19937_64 random(7);
    KvCache cache(c, pool);
    append(cache, normal_matrix(random, tokens, c.kv_heads * c.key_head_dim),
           normal_matrix(random, tokens, c.kv_heads * c.value_head_dim));
    return cache;
}

/// Bytes that a call holds at most, beside pages of a pool and what it held before.
template <class Call>
long peak_of(Call&& call) {
    const long before = held;
    peak = before;
    call();
    return peak - before;
}

/// A folder that is gone afterwards.
class Folder {
  public:
    Folder()
        : path_(std::filesystem::temp_directory_path() / ("kvplane_content_" + std::to_string(::getpid()))) {
        std::filesystem::create_directory(path_);
    }
    ~Folder() { std::filesystem::remove_all(path_); }
    std::filesystem::path operator/(const char* name) const { return path_ / name; }
    Index files() const {
        return static_cast<Index>(std::distance(std::filesystem::directory_iterator(path_), {}));
    }

  private:
    std::filesystem::path path_;
};

TEST(CacheContent, TakesNoMemoryThatGrowsWithTheCache) {
    const Folder folder;
    const auto path = folder / "cache";
    for (const char* recipe : {"fp16", "standard", "latent:3:3+fit_tokens=130+context=100000"}) {
        SCOPED_TRACE(recipe);
        const CacheConfiguration c = configuration(recipe);
        TilePool pool;
        const auto peaks = [&](Index tokens) {
            KvCache cache = filled(c, pool, tokens);
            cache.truncate(tokens - 1);
            const KvCache* const layers[] = {&cache, &cache};
            std::vector<long> all;
            all.push_back(peak_of([&] { save_cache(cache, path, {.sync = false}); }));
            all.push_back(peak_of([&] { (void)load_cache(path, c, pool); }));
            all.push_back(peak_of([&] { save_session(layers, path, {.sync = false}); }));
            all.push_back(peak_of([&] { (void)load_session(path, std::vector{c, c}, pool); }));
            if (can_compress()) {
                save_cache(cache, path, {.sync = false, .compress = true});
                all.push_back(peak_of([&] { (void)load_cache(path, c, pool); }));
            }
            const Index end = cache.state().tiles.back().first;
            all.push_back(peak_of(
                [&] { save_range(cache, cache.state().tiles[0].first, end, path, {.sync = false}); }));
            cache.drop_before(end);
            all.push_back(peak_of([&] { load_range(path, cache); }));
            return all;
        };
        const std::vector<long> small = peaks(600), large = peaks(600 + 64 * 128);
        // Of 64 tiles more, what is known of each: positions, references, headers of pages.
        for (std::size_t i = 0; i < small.size(); ++i) {
            EXPECT_LT(large[i] - small[i], 64 * 600) << "call " << i << ", " << small[i] << " before";
        }
    }
}

/// Calls with memory that ends after 0, 1, 2 ... allocations, until it is enough. Returns how often it ended.
template <class Call, class Check>
int each_end_of_memory(Call&& call, Check&& check) {
    for (int count = 0;; ++count) {
        bool ended = false;
        allocations_left = count;
        try {
            call();
        } catch (const std::bad_alloc&) {
            ended = true;
        } catch (const Error& error) {
            allocations_left = -1;
            EXPECT_EQ(error.code(), ErrorCode::out_of_memory) << error.what();
            ended = true;
        }
        allocations_left = -1;
        if (!ended) return count;
        check();
    }
}

TEST(CacheContent, SurvivesTheEndOfMemoryAtEveryAllocation) {
    for (const char* recipe :
         {"standard", "latent:3:3+fit_tokens=130+context=100000", "weighted:3:3+fit_tokens=400"}) {
        SCOPED_TRACE(recipe);
        const Folder folder;
        const auto path = folder / "cache", session = folder / "session", range = folder / "range";
        const CacheConfiguration c = configuration(recipe);
        const std::vector<CacheConfiguration> both{c, c};
        TilePool pool;
        KvCache cache = filled(c, pool, 390);
        cache.truncate(380);
        const bool fitted = cache.packed_tokens() > 0;
        const KvCache* const layers[] = {&cache, &cache};
        save_cache(cache, path);
        const std::vector<std::byte> bytes = to_bytes(cache);
        const auto same = [&](const KvCache& other) { return to_bytes(other) == bytes; };
        const Index used = pool.bytes();
        int checks = 0;  // some of them in full, which takes time
        const auto unchanged = [&] {
            ASSERT_EQ(pool.bytes(), used);
            ASSERT_EQ(folder.files(), 1);
            if (checks++ % 16 != 0) return;
            ASSERT_TRUE(same(cache));
            ASSERT_TRUE(same(load_cache(path, c, pool)));
        };
        EXPECT_GT(each_end_of_memory([&] { save_cache(cache, path, {.sync = false}); }, unchanged), 50);
        EXPECT_GT(each_end_of_memory([&] { (void)to_bytes(cache); }, unchanged), 50);
        EXPECT_GT(each_end_of_memory([&] { (void)load_cache(path, c, pool); }, unchanged), 50);
        if (can_compress()) {
            const std::vector<std::byte> less = to_bytes(cache, {.compress = true});
            EXPECT_GT(each_end_of_memory([&] { (void)to_bytes(cache, {.compress = true}); }, unchanged), 50);
            EXPECT_GT(each_end_of_memory([&] { (void)load_cache(less, c, pool); }, unchanged), 50);
        }
        EXPECT_GT(each_end_of_memory([&] { save_session(layers, session, {.sync = false}); }, unchanged),
                  100);
        const auto unchanged_files = [&] {
            ASSERT_EQ(pool.bytes(), used);
            ASSERT_EQ(folder.files(), 2);
        };
        EXPECT_GT(each_end_of_memory([&] { (void)load_session(session, both, pool); }, unchanged_files), 100);
        std::filesystem::remove(session);
        if (!fitted) continue;
        const Index first = cache.state().tiles[0].first;
        EXPECT_GT(each_end_of_memory([&] { save_range(cache, first, first + 128, range, {.sync = false}); },
                                     unchanged),
                  50);
        cache.drop_before(first + 128);
        const std::vector<std::byte> dropped = to_bytes(cache);
        const Index left = pool.bytes();
        EXPECT_GT(each_end_of_memory([&] { load_range(range, cache); },
                                     [&] {
                                         ASSERT_EQ(pool.bytes(), left);
                                         ASSERT_EQ(to_bytes(cache), dropped);
                                     }),
                  50);
        EXPECT_TRUE(same(cache));
    }
}

/// The pool's own memory, too.
TEST(CacheContent, ReturnsPagesWhereThePoolIsAtItsEnd) {
    const Folder folder;
    const auto session = folder / "session", range = folder / "range";
    const CacheConfiguration c = configuration("standard");
    TilePool other;
    KvCache cache = filled(c, other, 700);
    const KvCache* const layers[] = {&cache, &cache, &cache};
    save_session(layers, session);
    save_range(cache, 4, 4 + 3 * 128, range);
    FailingMemory memory;
    for (Index count = 0;; ++count) {
        TilePool pool(&memory);
        memory.left = count;
        try {
            (void)load_session(session, std::vector{c, c, c}, pool);
            EXPECT_EQ(count, 3 * (1 + 5 + 2));
            break;
        } catch (const Error& error) {
            ASSERT_EQ(error.code(), ErrorCode::out_of_memory);
            ASSERT_EQ(pool.bytes(), 0);
        }
    }
    for (Index count = 0;; ++count) {
        memory.left = std::numeric_limits<Index>::max();
        TilePool pool(&memory);
        KvCache dropped = filled(c, pool, 700);
        dropped.drop_before(4 + 3 * 128);
        pool.trim();
        const std::vector<std::byte> before = to_bytes(dropped);
        const Index used = pool.bytes();
        memory.left = count;
        try {
            load_range(range, dropped);
            EXPECT_EQ(count, 3);
            break;
        } catch (const Error& error) {
            ASSERT_EQ(error.code(), ErrorCode::out_of_memory);
            ASSERT_EQ(pool.bytes(), used);
            ASSERT_EQ(to_bytes(dropped), before);
        }
    }
}

}  // namespace
