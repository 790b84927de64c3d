// Random sequences of operations on small caches of random configurations, against naive ones.
//
// What is stored is within the bound that the cache states of what came in. What attention says is within
// T13 and T14 of double precision over what is stored, for all parameters and read policies. Sequence i of
// a run has the seed KVPLANE_TEST_SEED + i, so that a failure is run again by its own seed and
// KVPLANE_TEST_ROUNDS=1. By default there are 1000 sequences, about as many a second.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cache_support.hpp"
#include "kvplane/cache/capabilities.hpp"
#include "kvplane/io/cache_file.hpp"
#include "row_reference.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

constexpr float infinity = std::numeric_limits<float>::infinity();

/// Draws of one sequence.
class Dice {
  public:
    explicit Dice(std::uint64_t seed) : random_(seed) {}

    Index up_to(Index most) {
        return most <= 0 ? 0 : static_cast<Index>(random_() % static_cast<std::uint64_t>(most + 1));
    }
    bool one_in(Index n) { return up_to(n - 1) == 0; }
    Index of(std::initializer_list<Index> choices) {
        return choices.begin()[up_to(static_cast<Index>(choices.size()) - 1)];
    }
    double uniform(double low, double high) {
        return low + (high - low) * static_cast<double>(random_() >> 11) * 0x1p-53;
    }
    /// Uniform in the exponent.
    float magnitude(double low, double high) {
        return static_cast<float>(std::exp(uniform(std::log(low), std::log(high))));
    }
    Matrix normal(Index rows, Index cols, float scale) { return normal_matrix(random_, rows, cols, scale); }

  private:
    std::mt19937_64 random_;
};

std::string drawn_recipe(Dice& dice) {
    const auto number = [](Index n) { return std::to_string(n); };
    const auto width = [&] { return number(dice.one_in(8) ? 16 : 1 + dice.up_to(7)); };
    const auto setting = [&](const char* name, std::initializer_list<Index> values) {
        return dice.one_in(3) ? std::string("+").append(name).append("=").append(number(dice.of(values)))
                              : "";
    };
    const auto of_tokens = [&] {
        return setting("sinks", {0, 1, 3, 17}) + setting("recent", {0, 1, 5, 33, 100}) +
               setting("recent_bits", {8, 16});
    };
    const auto of_values = [&] {
        return setting("rotate_values", {0, 1}) + setting("value_group", {0, 8, 16, 32});
    };
    switch (dice.up_to(9)) {
        case 0:
            return "fp16";
        case 1:
            return std::string("block32:")
                .append(dice.one_in(2) ? "4" : "8")
                .append(dice.one_in(2) ? ":rotated" : "");
        case 2:
            return "kivi:" + number(1 + dice.up_to(7)) + (dice.one_in(2) ? ":32" : "");
        case 3:
            return dice.one_in(2) ? "standard" : "compact";
        case 4: {  // fitting a basis takes as long as many other operations
            if (!dice.one_in(3)) return "key_favored:4:4" + of_tokens();
            const std::string fit = "+fit_tokens=" + number(dice.of({64, 128, 150}));
            const char* const frame[] = {"before_rope", "after_rope", "tile"};
            if (dice.one_in(3)) return "weighted:3:" + width() + fit + of_tokens();
            if (dice.one_in(2))
                return "svdq:" + std::string(dice.one_in(2) ? "4-2" : "8-4-0-0") + ":" + width() + fit +
                       of_tokens();
            return "latent:3:" + width() + fit + "+frame=" + frame[dice.up_to(2)] +
                   setting("heads_together", {0, 1}) + of_tokens();
        }
        default:
            return "key_favored:" + width() + ":" + width() + of_tokens() + setting("rotate_keys", {0, 1}) +
                   setting("key_group", {32, 64, 128}) + of_values();
    }
}

/// One that can be; those that cannot are refused when the cache is built.
CacheConfiguration drawn_configuration(Dice& dice, TilePool& pool) {
    for (;;) {
        try {
            const Index kv_heads = dice.of({1, 1, 2, 3}), dims[] = {1, 2, 3, 5, 8, 16, 17, 31, 32, 40};
            CacheConfiguration c =
                configuration(drawn_recipe(dice), kv_heads, kv_heads * dice.of({1, 1, 2, 3}),
                              dims[dice.up_to(9)], dims[dice.up_to(9)]);
            if (c.key_head_dim % 2 == 1) c.rope.reset();
            c.rotation_seed = static_cast<std::uint64_t>(dice.up_to(3));
            const KvCache possible(c, pool);
            return c;
        } catch (const Error& error) {
            EXPECT_TRUE(error.code() == ErrorCode::option || error.code() == ErrorCode::shape)
                << error.what();
        }
    }
}

class Sequence {
  public:
    Sequence(std::uint64_t seed, TilePool& pool)
        : dice_(seed),
          pool_(pool),
          c_(drawn_configuration(dice_, pool)),
          able_(capabilities(c_)),
          cache_(c_, pool),
          key_scale_(dice_.magnitude(1e-8, 3e4)),
          value_scale_(dice_.magnitude(1e-8, 3e4)),
          kind_(dice_.up_to(4)) {
        naive_.keys.resize(0, c_.kv_heads * c_.key_head_dim);
        naive_.values.resize(0, c_.kv_heads * c_.value_head_dim);
    }

    /// For the trace of a failure.
    std::string described() const {
        return c_.recipe.name + ", " + std::to_string(c_.kv_heads) + " of " + std::to_string(c_.query_heads) +
               " heads, head_dims " + std::to_string(c_.key_head_dim) + " and " +
               std::to_string(c_.value_head_dim) + ", keys of " + std::to_string(key_scale_) +
               ", values of " + std::to_string(value_scale_) + ":" + done_;
    }

    void run() {
        append(dice_.of({1, 5, 40, 130, 170, 300}), false);
        for (Index left = 4 + dice_.up_to(6); left > 0 && !testing::Test::HasFailure(); --left) step();
        check_stored();
    }

  private:
    void note(const std::string& what) { done_ += " " + what; }

    void step() {
        switch (dice_.up_to(15)) {
            case 0:
            case 1:
            case 2:
                return append(dice_.one_in(4) ? dice_.up_to(200) : dice_.up_to(40), false);
            case 3:
            case 4:
                return append(dice_.up_to(12), true);
            case 5:
                return accept(dice_.up_to(cache_.provisional_tokens()));
            case 6:
                return truncate();
            case 7:
                return drop();
            case 8:
                return fork();
            case 9:
                return save();
            case 10:
                if (dice_.one_in(8)) return clear();
                return check_stored();
            case 11:
                return attend_batch();
            default:
                return attend();
        }
    }

    /// Numbers of several kinds, so that grids, extremes and weights are not always alike.
    Matrix numbers(Index rows, Index cols, float scale) {
        Matrix made = dice_.normal(rows, cols, scale);
        if (kind_ == 1 && rows > 0) made.col(cols / 2) *= 30.0f;
        if (kind_ == 2) made.array() += 5.0f * scale;
        if (kind_ == 3 && rows > 0) made.row(dice_.up_to(rows - 1)) *= 30.0f;
        if (kind_ == 4) made = made.unaryExpr([=](float x) { return x < 0.0f ? -scale : scale; }).eval();
        return made;
    }
    void append(Index count, bool provisional) {
        note((provisional ? "draft " : "append ") + std::to_string(count));
        Matrix k = numbers(count, naive_.keys.cols(), key_scale_),
               v = numbers(count, naive_.values.cols(), value_scale_);
        const bool bad = count > 0 && dice_.one_in(20);
        if (bad) (dice_.one_in(2) ? k : v).data()[0] = dice_.one_in(2) ? infinity : std::nanf("");
        const Index before = cache_.tokens(), drafts = cache_.provisional_tokens();
        try {
            provisional ? append_provisional(cache_, k, v) : kvplane_test::append(cache_, k, v);
            ASSERT_FALSE(bad) << "what is no number was taken";
            naive_.append(k, v);
        } catch (const Error& error) {
            const bool large = error.code() == ErrorCode::beyond_fp16;
            ASSERT_TRUE(large || (bad && error.code() == ErrorCode::not_finite)) << error.what();
            ASSERT_EQ(cache_.tokens(), before);
            ASSERT_EQ(cache_.provisional_tokens(), drafts);
            if (large) key_scale_ *= 0.03f, value_scale_ *= 0.03f;
        }
    }
    void accept(Index count) {
        note("accept " + std::to_string(count));
        cache_.accept(count);
    }
    Index first_kept() const { return naive_.dropped > cache_.state().kept_sinks ? naive_.dropped : 0; }
    void truncate() {
        const Index least = first_kept(), most = naive_.tokens();
        const Index count =
            dice_.one_in(3) ? least + dice_.up_to(most - least) : std::max(least, most - dice_.up_to(20));
        note("truncate " + std::to_string(count));
        cache_.truncate(count);
        naive_.truncate(count);
        naive_.dropped = std::min(naive_.dropped, count);
    }
    void drop() {
        const Index token = dice_.up_to(naive_.tokens()),
                    sinks = dice_.one_in(2) ? cache_.state().kept_sinks : dice_.up_to(20);
        note("drop " + std::to_string(token) + " but " + std::to_string(sinks));
        const bool gone = sinks > cache_.state().kept_sinks && naive_.dropped > cache_.state().kept_sinks;
        try {
            cache_.drop_before(token, sinks);
            naive_.dropped = std::max(naive_.dropped, token);
            ASSERT_FALSE(gone) << "sinks that had been dropped are kept";
        } catch (const Error& error) {
            ASSERT_EQ(error.code(), ErrorCode::index) << error.what();
            ASSERT_TRUE(gone) << error.what();
        }
    }
    void fork() {
        note("fork");
        KvCache other = cache_.fork();
        std::vector<std::byte> before;
        if (cache_.provisional_tokens() == 0) before = to_bytes(cache_);
        // Either goes on; the other goes astray, and is not missed.
        if (dice_.one_in(2)) std::swap(other, cache_);
        const Matrix k = numbers(50, naive_.keys.cols(), key_scale_),
                     v = numbers(50, naive_.values.cols(), value_scale_);
        try {
            kvplane_test::append(other, k, v);
            if (other.first_kept() == 0) other.truncate(dice_.up_to(other.tokens()));
        } catch (const Error& error) {
            ASSERT_EQ(error.code(), ErrorCode::beyond_fp16) << error.what();
        }
        if (!before.empty()) {
            ASSERT_TRUE(to_bytes(cache_) == before) << "a fork changed what it came from";
        }
    }
    void save() {
        note("save");
        cache_.accept();
        const std::vector<std::byte> bytes = to_bytes(cache_);
        cache_ = load_cache(bytes, c_, pool_);
        ASSERT_TRUE(to_bytes(cache_) == bytes);
    }
    void clear() {
        note("clear");
        cache_.clear();
        naive_.truncate(0);
        naive_.dropped = 0;
    }
    void check_stored() {
        ASSERT_EQ(cache_.tokens(), naive_.tokens());
        if (naive_.tokens() > 0) expect_within_bounds(cache_, naive_);
    }

    // -- Attention ------------------------------------------------------------------------------------

    struct Drawn {
        AttentionParameters parameters;
        std::vector<float> slopes, logits;
        Matrix bias;
    };
    void draw_parameters(Drawn& d, Index query_tokens) {
        AttentionParameters& p = d.parameters;
        const Index tokens = naive_.tokens();
        if (dice_.one_in(3)) p.scale = static_cast<double>(dice_.magnitude(1e-3, 10.0));
        if (dice_.one_in(5)) p.softcap = static_cast<double>(dice_.magnitude(0.1, 100.0));
        if (dice_.one_in(5)) p.causal = false;
        if (query_tokens > tokens || dice_.one_in(5)) p.position = dice_.up_to(tokens + 40);
        if (p.causal && dice_.one_in(4)) p.sliding_window = 1 + dice_.up_to(tokens), p.sinks = dice_.up_to(6);
        if (dice_.one_in(5)) {
            for (Index h = 0; h < c_.query_heads; ++h)
                d.slopes.push_back(static_cast<float>(dice_.uniform(-0.2, 0.2)));
            p.alibi_slopes = d.slopes;
        }
        if (dice_.one_in(5)) {
            for (Index h = 0; h < c_.query_heads; ++h)
                d.logits.push_back(static_cast<float>(dice_.uniform(-9.0, 9.0)));
            p.sink_logits = d.logits;
        }
        if (dice_.one_in(5) && tokens > 0) {
            d.bias =
                dice_.normal(dice_.one_in(2) ? query_tokens : c_.query_heads * query_tokens, tokens, 2.0f);
            const Index masks = dice_.of({2, 10, 1000});
            for (Index i = 0; i < d.bias.size(); ++i)
                if (dice_.one_in(masks)) d.bias.data()[i] = -infinity;
            if (dice_.one_in(4)) d.bias.row(dice_.up_to(d.bias.rows() - 1)).setConstant(-infinity);
            p.bias = &d.bias;
        }
        p.decode_tiles = dice_.one_in(5);
        if (p.decode_tiles || !dice_.one_in(3)) return;
        const bool half = c_.recipe.keys.is_half() || c_.recipe.values.is_half() || c_.recipe.latents;
        const double bits = half ? dice_.uniform(8.0, 16.0) : dice_.uniform(0.0, 9.0);
        switch (dice_.up_to(4)) {
            case 0:
                if (able_.reads_by_bits) p.read = ReadPolicy::fixed(bits);
                break;
            case 1:
                if (able_.reads_by_bits) p.read = ReadPolicy::aligned(bits);
                break;
            case 2:
                if (able_.reads_by_bits)
                    p.read =
                        ReadPolicy::aligned(bits, half ? dice_.uniform(8.0, 16.0) : dice_.uniform(0.0, 9.0));
                break;
            case 3:
                if (able_.reads_by_tolerance)
                    p.read = ReadPolicy::tolerance(static_cast<double>(dice_.magnitude(1e-5, 3.0)));
                break;
            default:
                if (able_.reads_by_exponents) p.read = ReadPolicy::exponents();
        }
    }
    Matrix draw_queries(Index query_tokens) {
        // Scores from nothing to hundreds; sometimes anything.
        const float usual =
            1.0f / std::max(key_scale_ * std::sqrt(static_cast<float>(c_.key_head_dim)), 1e-8f);
        const float scale = dice_.one_in(6) ? dice_.magnitude(1e-8, 3e4) : usual * dice_.magnitude(1e-2, 1e2);
        return dice_.normal(query_tokens, c_.query_heads * c_.key_head_dim, scale);
    }
    void attend() {
        const Index query_tokens = dice_.one_in(5) ? 9 + dice_.up_to(dice_.one_in(4) ? 60 : 3)
                                                   : 1 + (dice_.one_in(2) ? 0 : dice_.up_to(7));
        Drawn drawn;
        draw_parameters(drawn, query_tokens);
        const AttentionParameters& p = drawn.parameters;
        const Matrix queries = draw_queries(query_tokens);
        Matrix out = Matrix::Constant(query_tokens, c_.query_heads * c_.value_head_dim, -77.0f), sums;
        note("attend " + std::to_string(query_tokens) +
             (p.read.kind == ReadPolicy::Kind::all ? "" : " some planes of") + (p.bias ? " biased" : ""));
        try {
            cache_.attend(queries, out, p, workspace_, {.log_sum_exp = &sums});
        } catch (const Error& error) {
            // A window that reaches what was dropped, and sinks that were.
            ASSERT_EQ(error.code(), ErrorCode::option) << error.what();
            ASSERT_GT(naive_.dropped, cache_.state().kept_sinks) << error.what();
            ASSERT_GT(p.sliding_window, 0) << error.what();
            return;
        }
        RowReference reference(cache_);
        // What is not read of fp16 counts as its middle, also of the smallest numbers.
        const double longest =
            8.0 * reference.longest_value() + 0x1p-16 * std::sqrt(static_cast<double>(c_.value_head_dim));
        const ReadPolicy::Kind kind = p.read.kind;
        const bool bounded = kind != ReadPolicy::Kind::aligned && kind != ReadPolicy::Kind::exponents;
        const bool packed = reads_packed(cache_, p) && query_tokens <= detail::decode_query_tokens;
        const double certified =
            kind == ReadPolicy::Kind::tolerance && packed ? workspace_.report().error_bound : 0.0;
        ASSERT_TRUE(out.allFinite()) << out;
        // The reference takes longer than what it checks: of many rows some.
        const Index most = c_.query_heads * query_tokens > 8 ? c_.query_heads * query_tokens / 5 : 1;
        for (Index head = 0; head < c_.query_heads; ++head)
            for (Index i = 0; i < query_tokens; ++i) {
                if (!dice_.one_in(most)) continue;
                reference.compute(queries.row(i).segment(head * c_.key_head_dim, c_.key_head_dim), head, i,
                                  query_tokens, p);
                const auto row =
                    out.row(i).segment(head * c_.value_head_dim, c_.value_head_dim).cast<double>().eval();
                if (bounded || !packed) {
                    ASSERT_LE((row - reference.output).norm(), reference.bound + certified)
                        << "query head " << head << ", token " << i << ": " << row << "\nexpected "
                        << reference.output;
                } else {
                    ASSERT_LE(row.norm(), longest) << "query head " << head << ", token " << i;
                }
                if (kind != ReadPolicy::Kind::all) continue;
                const double off = static_cast<double>(sums(i, head)) - reference.log_sum_exp;
                if (reference.log_sum_exp == -std::numeric_limits<double>::infinity()) {
                    ASSERT_EQ(sums(i, head), -infinity);
                } else {
                    ASSERT_LE(std::abs(off), reference.score_bound + 1e-5) << "log_sum_exp " << sums(i, head);
                }
            }
    }
    /// Bit for bit what each cache gives by itself.
    void attend_batch() {
        note("batch");
        KvCache shorter = cache_.fork();
        shorter.truncate(std::max(first_kept(), naive_.tokens() - dice_.up_to(30)));
        const KvCache* const caches[] = {&cache_, &shorter, &cache_};
        std::vector<Index> offsets{0};
        for (const KvCache* cache : caches)
            offsets.push_back(offsets.back() + std::min(cache->tokens(), dice_.of({0, 1, 2, 9})));
        const Matrix queries = draw_queries(offsets.back());
        Matrix out(offsets.back(), c_.query_heads * c_.value_head_dim);
        AttentionParameters p;
        if (able_.reads_by_bits && dice_.one_in(2)) p.read = ReadPolicy::fixed(8.0);
        KvCache::attend_batch(caches, offsets, queries, out, p, workspace_);
        for (std::size_t i = 0; i < 3; ++i) {
            const Index count = offsets[i + 1] - offsets[i];
            ASSERT_TRUE(out.middleRows(offsets[i], count) ==
                        kvplane_test::attend(*caches[i], queries.middleRows(offsets[i], count), p))
                << "cache " << i;
        }
    }

    Dice dice_;
    TilePool& pool_;
    CacheConfiguration c_;
    CacheCapabilities able_;
    KvCache cache_;
    NaiveCache naive_;
    float key_scale_, value_scale_;
    Index kind_;
    AttentionWorkspace workspace_;
    std::string done_;
};

TEST(Operations, RandomSequencesAgainstNaiveCaches) {
    const std::uint64_t first = seed();
    TilePool pool;
    for (int i = 0, all = rounds(sanitized ? 100 : 1000); i < all; ++i) {
        const std::uint64_t own = first + static_cast<std::uint64_t>(i);
        Sequence sequence(own, pool);
        try {
            sequence.run();
        } catch (const std::exception& error) {
            ADD_FAILURE() << error.what();
        }
        if (HasFailure())
            FAIL() << "KVPLANE_TEST_SEED=" << own << " KVPLANE_TEST_ROUNDS=1: " << sequence.described();
        if (i % 64 == 0) pool.trim();
    }
    EXPECT_EQ(pool.pages(), pool.unused_pages());
}

}  // namespace
