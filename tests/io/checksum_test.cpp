// The hash of cache files, against one that is computed byte by byte.
#include "kvplane/io/checksum.hpp"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "test_support.hpp"

namespace {

using namespace kvplane::detail;

std::uint64_t added_word(std::uint64_t hash, std::uint64_t word) {
    hash = (hash ^ word) * 1099511628211U;
    return hash ^ (hash >> 29);
}

std::uint64_t word_at(const std::vector<std::byte>& bytes, std::size_t at) {
    std::uint64_t word = 0;
    for (std::size_t i = 0; i < 8 && at + i < bytes.size(); ++i)
        word |= static_cast<std::uint64_t>(bytes[at + i]) << 8 * i;
    return word;
}

TEST(Checksum, DoesNotDependOnPieces) {
    std::mt19937_64 random(kvplane_test::seed());
    for (std::size_t size = 0; size < 300; ++size) {
        std::vector<std::byte> bytes(size);
        for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
        std::uint64_t lanes[4], expected = 0xCBF29CE484222325U;
        for (std::uint64_t k = 0; k < 4; ++k) lanes[k] = 0xCBF29CE484222325U + k;
        for (std::size_t at = 0; at < (size + 31) / 32 * 32; at += 8)
            lanes[at / 8 % 4] = added_word(lanes[at / 8 % 4], word_at(bytes, at));
        for (const std::uint64_t lane : lanes) expected = added_word(expected, lane);
        for (int round = 0; round < 20; ++round) {
            LaneHash hash;
            for (std::size_t at = 0; at < size;) {
                const std::size_t count = std::min(size - at, random() % (round < 10 ? 9 : 100));
                hash.add(std::span(bytes).subspan(at, count));
                at += count;
            }
            WordHash sum;
            hash.finish(sum);
            ASSERT_EQ(sum.state(), expected) << size << " bytes";
        }
    }
}

TEST(Checksum, OfOneLaneEndsWithTheRest) {
    std::vector<std::byte> bytes;
    for (std::size_t size = 0; size < 40; ++size) {
        std::uint64_t expected = added_word(0xCBF29CE484222325U, size);
        for (std::size_t at = 0; at <= size / 8 * 8; at += 8)
            expected = added_word(expected, word_at(bytes, at));
        WordHash sum;
        add_serial(sum, bytes);
        ASSERT_EQ(sum.state(), expected) << size << " bytes";
        bytes.push_back(static_cast<std::byte>(size * 37 + 1));
    }
}

}  // namespace
