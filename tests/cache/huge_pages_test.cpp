// Memory in slabs of huge pages: what is handed out, when it goes back, and a cache that lives in it.
#include "kvplane/cache/huge_pages.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cache_support.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
constexpr std::size_t page = HugePageResource::page_bytes;

TEST(HugePages, HandsOutAlignedMemoryThatDoesNotOverlap) {
    std::mt19937_64 random(kvplane_test::seed());
    HugePageResource memory(page);
    EXPECT_EQ(memory.bytes(), 0u);
    struct Piece {
        unsigned char* at;
        std::size_t bytes, alignment;
        unsigned char mark;
    };
    std::vector<Piece> pieces;
    for (int i = 0; i < 4000; ++i) {
        if (pieces.size() < 20 || random() % 2) {
            const std::size_t bytes = random() % 8 == 0 ? random() % (3 * page) : 1 + random() % 40000,
                              alignment = std::size_t{1} << random() % 13;
            auto* const at = static_cast<unsigned char*>(memory.allocate(bytes, alignment));
            ASSERT_EQ(reinterpret_cast<std::uintptr_t>(at) % alignment, 0u);
            const auto mark = static_cast<unsigned char>(i);
            std::memset(at, mark, bytes);
            pieces.push_back({at, bytes, alignment, mark});
        } else {
            std::swap(pieces[random() % pieces.size()], pieces.back());
            const Piece piece = pieces.back();
            for (std::size_t b = 0; b < piece.bytes; ++b) ASSERT_EQ(piece.at[b], piece.mark);
            memory.deallocate(piece.at, piece.bytes, piece.alignment);
            pieces.pop_back();
        }
    }
    for (const Piece& piece : pieces) memory.deallocate(piece.at, piece.bytes, piece.alignment);
    // The last slab stays for what comes.
    EXPECT_LE(memory.bytes(), 3 * page);
}

TEST(HugePages, TakesSlabsAndGivesThemBack) {
    HugePageResource memory(page);
    void* const first = memory.allocate(page / 2, 64);
    EXPECT_EQ(memory.bytes(), page);
    void* const second = memory.allocate(page / 2, 64);
    EXPECT_EQ(memory.bytes(), page);
    void* const third = memory.allocate(64, 64);
    EXPECT_EQ(memory.bytes(), 2 * page);
    memory.deallocate(first, page / 2, 64);
    EXPECT_EQ(memory.bytes(), 2 * page);
    memory.deallocate(second, page / 2, 64);
    EXPECT_EQ(memory.bytes(), page);
    // The slab in use starts anew when it is empty.
    memory.deallocate(third, 64, 64);
    EXPECT_EQ(memory.bytes(), page);
    void* const whole = memory.allocate(page, 64);
    EXPECT_EQ(memory.bytes(), page);
    memory.deallocate(whole, page, 64);
    void* const large = memory.allocate(5 * page + 1, 4 * page);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(large) % (4 * page), 0u);
    EXPECT_EQ(memory.bytes(), 6 * page);
    memory.deallocate(large, 5 * page + 1, 4 * page);
}

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KVPLANE_TEST_ASAN 1
#endif
#endif

TEST(HugePages, RefusesWhatThereIsNot) {
#if defined(KVPLANE_TEST_ASAN) || defined(__SANITIZE_ADDRESS__)
    GTEST_SKIP() << "the sanitizer ends a program that asks for so much";
#endif
    HugePageResource memory;
    TilePool pool(&memory);
    kvplane_test::refusal(ErrorCode::out_of_memory, [&] { pool.page(Index{1} << 60); });
    EXPECT_EQ(memory.bytes(), 0u);
}

TEST(HugePages, ServeCachesOfSeveralThreads) {
    HugePageResource memory(page);
    {
        TilePool pool(&memory);
        std::vector<std::thread> threads;
        std::vector<Matrix> outputs(4, Matrix(1, 4 * 48));
        for (std::size_t i = 0; i < outputs.size(); ++i)
            threads.emplace_back([&, i] {
                std::mt19937_64 random(1);
                KvCache cache(kvplane_test::configuration("standard"), pool);
                const Matrix k = kvplane_test::normal_matrix(700, 64, random),
                             v = kvplane_test::normal_matrix(700, 96, random),
                             q = kvplane_test::normal_matrix(1, 128, random);
                for (int again = 0; again < 20; ++again) {
                    cache.clear();
                    cache.append(k, v);
                }
                cache.attend(q, outputs[i]);
            });
        for (std::thread& thread : threads) thread.join();
        for (const Matrix& output : outputs) EXPECT_EQ(output, outputs[0]);
        EXPECT_GT(memory.bytes(), 0u);
    }
    EXPECT_EQ(memory.bytes(), page) << "all but the slab in use";
}

}  // namespace
