// Pages that go round: a small pool, filled to the last page, whose unused memory is poisoned.
//
// All numbers are whole ones, chosen so that fp16 and grids of 4 bits hold them exactly. Whatever a cache
// says is then compared for equality, however often its tokens went into another tile.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory_resource>
#include <optional>
#include <vector>

#include "cache_support.hpp"
#include "kvplane/io/cache_file.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

/// So many bytes at a time, never zero: memory is poisoned when it is handed out and when it comes back.
class PoisonedMemory : public std::pmr::memory_resource {
  public:
    explicit PoisonedMemory(Index bytes) : left_(bytes) {}

    Index left() const noexcept { return left_; }
    /// Every block that is handed out.
    const std::map<std::byte*, std::size_t>& blocks() const noexcept { return blocks_; }

  private:
    void* do_allocate(std::size_t bytes, std::size_t alignment) override {
        if (static_cast<Index>(bytes) > left_) throw std::bad_alloc();
        void* const memory = std::pmr::new_delete_resource()->allocate(bytes, alignment);
        std::memset(memory, 0xA5, bytes);
        blocks_[static_cast<std::byte*>(memory)] = bytes;
        left_ -= static_cast<Index>(bytes);
        return memory;
    }
    void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
        const auto block = blocks_.find(static_cast<std::byte*>(memory));
        ASSERT_NE(block, blocks_.end());
        ASSERT_EQ(block->second, bytes);
        blocks_.erase(block);
        std::memset(memory, 0x5A, bytes);
        left_ += static_cast<Index>(bytes);
        std::pmr::new_delete_resource()->deallocate(memory, bytes, alignment);
    }
    bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }

    Index left_;
    std::map<std::byte*, std::size_t> blocks_;
};

constexpr Index heads = 2, dim = 16, channels = heads * dim;

CacheConfiguration whole_numbers(const std::string& recipe) {
    return configuration(recipe, heads, heads, dim, dim);
}

/// The token that is number `id` of all, at a position. Every eighth key is the least number throughout,
/// the one behind it the most, so that the grid of any 32 keys reaches from one to the other, as does that
/// of any head.
void write_token(std::uint32_t id, Index position, float least, float* key, float* value) {
    std::uint32_t state = id * 2654435761U + 12345U;
    const float most = least + 15.0f;
    const auto draw = [&](Index c) {
        state = state * 1664525U + 1013904223U;
        return c % dim == 0   ? least
               : c % dim == 1 ? most
                              : std::min(most, least + static_cast<float>(state >> 28));
    };
    for (Index c = 0; c < channels; ++c) {
        const float drawn = draw(c);
        key[c] = position % 8 == 0 ? least : position % 8 == 1 ? most : drawn;
        value[c] = draw(c);
    }
}

struct WrittenTokens {
    Matrix keys, values;
};
/// Those of `ids`, of which the first is at `position`.
WrittenTokens tokens_of(const std::uint32_t* ids, Index position, Index count, float least = 0.0f) {
    WrittenTokens tokens{Matrix(count, channels), Matrix(count, channels)};
    for (Index t = 0; t < count; ++t)
        write_token(ids[t], position + t, least, tokens.keys.row(t).data(), tokens.values.row(t).data());
    return tokens;
}

/// A cache of the pool, the naive one, and one that does the same in memory that nobody used before.
struct RotatedSequence {
    KvCache cache, fresh;
    std::vector<std::uint32_t> ids;
    Index dropped = 0;

    Index tokens() const { return static_cast<Index>(ids.size()); }
};

class Rotation {
  public:
    Rotation(const std::string& recipe, Index bytes)
        : memory_(bytes),
          pool_(&memory_),
          c_(whole_numbers(recipe)),
          least_(c_.recipe.values.rule.scheme == Scheme::full_range ? -8.0f : 0.0f) {
        for (int i = 0; i < 4; ++i) all_.push_back({KvCache(c_, pool_), KvCache(c_, fresh_), {}});
    }

    void step(int number) {
        RotatedSequence& one = all_[random(all_.size())];
        switch (random(10)) {
            case 0:
                drop(one);
                break;
            case 1: {
                RotatedSequence& other = all_[random(all_.size())];
                if (&other == &one) break;
                other = {one.cache.fork(), one.fresh.fork(), one.ids, one.dropped};
                break;
            }
            case 2:
            case 3: {
                const auto least =
                    static_cast<std::size_t>(one.dropped > one.cache.state().kept_sinks ? one.dropped : 0);
                const std::size_t most = one.ids.size() - least,
                                  count = least +
                                          (random(2) ? random(most + 1) : most - std::min(most, random(6)));
                one.cache.truncate(static_cast<Index>(count));
                one.fresh.truncate(static_cast<Index>(count));
                one.ids.resize(count);
                one.dropped = std::min(one.dropped, static_cast<Index>(count));
                break;
            }
            case 4:
                if (random(4) == 0) clear(one);
                break;
            default:
                if (!append(one, 1 + static_cast<Index>(random(random(4) ? 40 : 200)))) {
                    ++refused;
                    random(2) ? drop(all_[random(all_.size())]) : clear(all_[random(all_.size())]);
                }
        }
        fresh_.trim();
        poison_unused();
        check(number);
    }

    int refused = 0, reused = 0;

  private:
    std::size_t random(std::size_t below) { return below == 0 ? 0 : random_() % below; }

    void clear(RotatedSequence& one) {
        one.cache.clear();
        one.fresh.clear();
        one.ids.clear();
        one.dropped = 0;
    }
    void drop(RotatedSequence& one) {
        const auto token = static_cast<Index>(random(one.ids.size() + 1));
        one.cache.drop_before(token);
        one.fresh.drop_before(token);
        one.dropped = std::max(one.dropped, token);
    }
    bool append(RotatedSequence& one, Index count) {
        std::vector<std::uint32_t> ids(static_cast<std::size_t>(count));
        for (std::uint32_t& id : ids) id = next_id_++;
        const WrittenTokens more = tokens_of(ids.data(), one.tokens(), count, least_);
        const bool provisional = random(4) == 0;
        const Index needed = pages_needed(one, count), room = pages_left();
        try {
            provisional ? one.cache.append_provisional(more.keys, more.values)
                        : one.cache.append(more.keys, more.values);
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ErrorCode::out_of_memory) << error.what();
            EXPECT_GT(needed, room) << "refused, though it fits";
            return false;
        }
        if (c_.recipe.every_token) {
            EXPECT_LE(needed, room);
        }
        provisional ? one.fresh.append_provisional(more.keys, more.values)
                    : one.fresh.append(more.keys, more.values);
        one.ids.insert(one.ids.end(), ids.begin(), ids.end());
        if (provisional && random(2)) {
            const auto some =
                static_cast<Index>(random(static_cast<std::size_t>(one.fresh.provisional_tokens()) + 1));
            try {
                one.cache.accept(some);
                one.fresh.accept(some);
            } catch (const Error& error) {
                EXPECT_EQ(error.code(), ErrorCode::out_of_memory) << error.what();
            }
        }
        return true;
    }

    // Pages of one size: of every other recipe no more is asked than that some page was needed.
    Index pages_needed(const RotatedSequence& one, Index count) const {
        if (!c_.recipe.every_token) return 1 << 20;
        const auto pages = [](Index tokens) { return (tokens + tile_tokens - 1) / tile_tokens; };
        const bool copies =
            one.tokens() % tile_tokens != 0 && one.cache.state().tile_pages.back().references() > 1;
        return pages(one.tokens() + count) - pages(one.tokens()) + copies;
    }
    Index pages_left() const {
        if (!c_.recipe.every_token) return 0;
        return memory_.left() / one_page() + pool_.unused_pages();
    }
    Index one_page() const { return all_[0].cache.state().layout->bytes; }

    /// Poisons what no cache refers to any more, and counts pages.
    void poison_unused() {
        std::vector<std::byte*> used;
        const auto use = [&](const PageReference& page) {
            if (page) used.push_back(page.data());
        };
        for (const RotatedSequence& one : all_) {
            const detail::CacheState& state = one.cache.state();
            use(state.sinks);
            for (const PageReference& page : state.tile_pages) use(page);
            for (const PageReference& page : state.recent) use(page);
        }
        std::sort(used.begin(), used.end());
        used.erase(std::unique(used.begin(), used.end()), used.end());
        ASSERT_EQ(pool_.pages() - pool_.unused_pages(), static_cast<Index>(used.size())) << "pages leak";
        ASSERT_EQ(pool_.pages(), static_cast<Index>(memory_.blocks().size()));
        Index bytes = 0;
        for (std::byte* const page : used) {
            bytes += detail::counted_bytes(static_cast<Index>(memory_.blocks().at(page)));
            reused += std::binary_search(poisoned_.begin(), poisoned_.end(), page);
        }
        ASSERT_EQ(pool_.bytes(), bytes);
        std::vector<std::byte*> unused;
        for (const auto& [block, size] : memory_.blocks()) {
            if (std::binary_search(used.begin(), used.end(), block)) continue;
            unused.push_back(block);
            if (!std::binary_search(poisoned_.begin(), poisoned_.end(), block))
                std::memset(block, 0xEE, size);
        }
        poisoned_ = std::move(unused);
    }

    void check(int number) {
        const bool thoroughly = number % 256 == 0;
        // Of four caches two at a time, so that what one does to another is seen soon.
        for (std::size_t i = 0; i < all_.size(); ++i) {
            if (!thoroughly && (i + static_cast<std::size_t>(number)) % 2 != 0) continue;
            RotatedSequence& one = all_[i];
            ASSERT_EQ(one.cache.tokens(), one.tokens());
            const Index from = one.dropped > one.cache.state().kept_sinks ? one.dropped : 0;
            Index first = from, count = one.tokens() - from;
            if (!thoroughly && count > 6) {
                first += static_cast<Index>(random(static_cast<std::size_t>(count - 5)));
                count = 6;
            }
            if (count > 0) {
                const WrittenTokens exact = tokens_of(one.ids.data() + first, first, count, least_);
                ASSERT_EQ(one.cache.stored_keys(first, count), exact.keys)
                    << "tokens from " << first << " on";
                ASSERT_EQ(one.cache.stored_values(first, count), exact.values)
                    << "tokens from " << first << " on";
            }
            if (!thoroughly) continue;
            if (one.cache.provisional_tokens() == 0 && one.fresh.provisional_tokens() == 0) {
                ASSERT_EQ(to_bytes(one.cache), to_bytes(one.fresh));
            }
            check_attention(one);
        }
    }
    /// Bit for bit that of memory nobody used before; and in double precision where nothing is rounded to 8
    /// bits.
    void check_attention(const RotatedSequence& one) {
        for (const Index query_tokens : {1, 9}) {
            if (one.tokens() < query_tokens) continue;
            const Matrix queries = normal_matrix(random_, query_tokens, channels, 0.05f);
            AttentionParameters decoding;
            decoding.decode_tiles = query_tokens > 1;
            const Matrix output = attend(one.cache, queries, decoding);
            ASSERT_EQ(output, attend(one.fresh, queries, decoding));
            if (query_tokens == 1) continue;
            ASSERT_EQ(attend(one.cache, queries), attend(one.fresh, queries));
            const WrittenTokens exact = tokens_of(one.ids.data(), 0, one.tokens(), least_);
            NaiveCache naive{exact.keys, exact.values, one.dropped};
            const Matrix mask = naive.mask(query_tokens, one.cache.state().kept_sinks);
            AttentionParameters parameters;
            parameters.bias = &mask;
            const MatrixD expected =
                reference_attention(naive.keys, naive.values, queries, heads, heads, parameters);
            ASSERT_LE((output.cast<double>() - expected).cwiseAbs().maxCoeff(), 2e-4);
        }
    }

    PoisonedMemory memory_;
    TilePool pool_, fresh_;
    CacheConfiguration c_;
    float least_;  ///< of all numbers: -8 to 7, or 0 to 15
    std::vector<RotatedSequence> all_;
    std::vector<std::byte*> poisoned_;  ///< unused pages, in ascending order
    std::uint32_t next_id_ = 1;
    std::mt19937_64 random_{seed()};
};

/// KVPLANE_TEST_ROUNDS=N goes round N times instead.
void rotate(const std::string& recipe, Index bytes) {
    Rotation rotation(recipe, bytes);
    const int all = rounds(sanitized ? 2000 : 34000);
    for (int i = 0; i < all; ++i) {
        rotation.step(i);
        if (testing::Test::HasFatalFailure() || testing::Test::HasFailure())
            FAIL() << recipe << ", operation " << i;
    }
    // Otherwise the pool was never full, or nothing came back.
    EXPECT_GT(rotation.refused, all / 1000);
    EXPECT_GT(rotation.reused, all / 100);
}

Index page_bytes(const std::string& recipe) {
    TilePool pool;
    return KvCache(whole_numbers(recipe), pool).state().layout->bytes;
}

const std::string four_bits =
    "key_favored:4:4+sinks=3+recent=5+rotate_values=0+key_group=32+value_scheme=min_max";

TEST(PageReuse, OfHalfTilesThatFillAsTheyCome) {
    rotate("fp16", 7 * page_bytes("fp16"));
}
TEST(PageReuse, OfTilesOfBlocksThatFillAsTheyCome) {
    rotate("block32:4", 7 * page_bytes("block32:4"));
}
TEST(PageReuse, OfTilesSinksAndRecentTokens) {
    rotate(four_bits, 17 * page_bytes(four_bits));
}

/// A pool that is full to the last page refuses one more token and changes nothing; with a page back it fits.
TEST(PageReuse, AFullPoolRefusesOneTokenMore) {
    constexpr Index pages = 5;
    PoisonedMemory memory(pages * page_bytes("fp16"));
    TilePool pool(&memory);
    KvCache cache(whole_numbers("fp16"), pool);
    std::vector<std::uint32_t> ids(pages * tile_tokens + 1);
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::uint32_t>(i);
    const WrittenTokens all = tokens_of(ids.data(), 0, static_cast<Index>(ids.size()));
    cache.append(all.keys.topRows(pages * tile_tokens), all.values.topRows(pages * tile_tokens));
    EXPECT_EQ(memory.left(), 0);
    const KvCache fork = cache.fork();
    const std::vector<std::byte> before = to_bytes(cache);
    const Index bytes = pool.bytes();
    const auto append_one = [&](KvCache& to) { to.append(all.keys.bottomRows(1), all.values.bottomRows(1)); };
    for (int again = 0; again < 2; ++again) {
        refusal(ErrorCode::out_of_memory, [&] { append_one(cache); });
        EXPECT_EQ(to_bytes(cache), before);
        EXPECT_EQ(pool.bytes(), bytes);
        EXPECT_EQ(pool.pages(), pages);
        EXPECT_EQ(pool.unused_pages(), 0);
    }
    // A fork holds on to the page that is dropped.
    cache.drop_before(tile_tokens);
    refusal(ErrorCode::out_of_memory, [&] { append_one(cache); });
    EXPECT_EQ(to_bytes(fork), before);
}
TEST(PageReuse, ADroppedPageTakesTheNextToken) {
    constexpr Index pages = 5, tokens = pages * tile_tokens;
    PoisonedMemory memory(pages * page_bytes("fp16"));
    TilePool pool(&memory);
    KvCache cache(whole_numbers("fp16"), pool);
    std::vector<std::uint32_t> ids(tokens + 1);
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::uint32_t>(i);
    const WrittenTokens all = tokens_of(ids.data(), 0, tokens + 1);
    cache.append(all.keys.topRows(tokens), all.values.topRows(tokens));
    cache.drop_before(tile_tokens - 1);  // one token of the first page is still seen
    refusal(ErrorCode::out_of_memory,
            [&] { cache.append(all.keys.bottomRows(1), all.values.bottomRows(1)); });
    cache.drop_before(tile_tokens);
    EXPECT_EQ(pool.unused_pages(), 1);
    cache.append(all.keys.bottomRows(1), all.values.bottomRows(1));
    EXPECT_EQ(pool.unused_pages(), 0);
    EXPECT_EQ(cache.stored_keys(tile_tokens, tokens + 1 - tile_tokens),
              all.keys.bottomRows(tokens + 1 - tile_tokens));
    EXPECT_EQ(cache.stored_values(tile_tokens, tokens + 1 - tile_tokens),
              all.values.bottomRows(tokens + 1 - tile_tokens));
}

}  // namespace
