// Saved caches: equal after loading, and refused when anything about them is wrong.
#include "kvplane/io/cache_file.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <iostream>
#include <random>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "cache/cache_support.hpp"
#include "cache/latent_sequence.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/io/safetensors.hpp"
#include "real_layers.hpp"
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

KvCache filled_cache(const CacheConfiguration& c, TilePool& pool, Index tokens) {
    std::mt19937_64 random(7);
    KvCache cache(c, pool);
    append(cache, normal_matrix(random, tokens, c.kv_heads * c.key_head_dim),
           normal_matrix(random, tokens, c.kv_heads * c.value_head_dim));
    return cache;
}

/// The same file with one tensor or metadata value replaced.
std::vector<std::byte> rewritten(const std::vector<std::byte>& bytes, const std::string& key,
                                 const std::string& value) {
    const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);
    SafetensorsWriter writer;
    for (const std::string& name : file.names())
        if (name != key) writer.add(name, file.info(name).shape, file.info(name).dtype, file.bytes(name));
    for (const auto& [name, text] : file.metadata())
        if (name != key || !value.empty()) writer.metadata(name, name == key ? value : text);
    return writer.to_bytes();
}

/// Recipe, and whether the file is compressed.
class SavedCache : public testing::TestWithParam<std::tuple<std::string, bool>> {
  protected:
    void SetUp() override {
        if (options_.compress && !can_compress()) GTEST_SKIP() << "built without libzstd";
    }
    std::vector<std::byte> saved(const KvCache& cache) const { return to_bytes(cache, options_); }

    CacheConfiguration configuration_ = configuration(std::get<0>(GetParam()));
    SaveOptions options_{.compress = std::get<1>(GetParam())};
    TilePool pool_;
};

TEST_P(SavedCache, LoadsBitForBit) {
    for (const Index tokens : {0, 1, 4, 130, 165, 700}) {
        const KvCache cache = filled_cache(configuration_, pool_, tokens);
        const std::vector<std::byte> bytes = saved(cache);
        const KvCache loaded = load_cache(bytes, configuration_, pool_);
        EXPECT_EQ(saved(loaded), bytes);
        EXPECT_EQ(to_bytes(loaded), to_bytes(cache));
        EXPECT_EQ(loaded.bytes(), cache.bytes());
        EXPECT_EQ(loaded.error_bound().key, cache.error_bound().key);
        std::mt19937_64 random(seed());
        const Matrix q = normal_matrix(random, std::min<Index>(tokens, 3), 4 * 32);
        Matrix before(q.rows(), 4 * 48), after(q.rows(), 4 * 48);
        cache.attend(q, before);
        loaded.attend(q, after);
        EXPECT_EQ(before, after);
    }
}

TEST_P(SavedCache, EveryAlteredByteIsRefused) {
    const std::vector<std::byte> bytes = saved(filled_cache(configuration_, pool_, 300));
    std::mt19937_64 random(seed());
    for (int i = 0; i < 300; ++i) {
        std::vector<std::byte> altered = bytes;
        const std::size_t at = i < 100 ? static_cast<std::size_t>(8 + i) : random() % bytes.size();
        altered[at] ^= static_cast<std::byte>(1u << random() % 8);
        try {
            const KvCache loaded = load_cache(altered, configuration_, pool_);
            // Only what the format itself allows to differ (white space, the order of members) may load.
            EXPECT_EQ(saved(loaded), bytes) << "byte " << at;
        } catch (const Error&) {
        }
    }
}

TEST_P(SavedCache, EveryTruncationIsRefused) {
    const std::vector<std::byte> bytes = saved(filled_cache(configuration_, pool_, 200));
    for (std::size_t size = 0; size < bytes.size(); size += 1 + size / 50) {
        const std::vector<std::byte> cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
        refusal(ErrorCode::format, [&] { load_cache(cut, configuration_, pool_); });
    }
}

INSTANTIATE_TEST_SUITE_P(Recipes, SavedCache,
                         testing::Combine(testing::Values("fp16", "block32:4:rotated", "standard",
                                                          "key_favored:3:5+recent_bits=8",
                                                          "key_favored:3:4+shaped_keys=1", "smallest",
                                                          "latent:2:2+fit_tokens=130+context=100000"),
                                          testing::Bool()));

TEST(SavedCacheFile, RefusesWhatBelongsElsewhere) {
    TilePool pool;
    const CacheConfiguration c = configuration("standard");
    const std::vector<std::byte> bytes = to_bytes(filled_cache(c, pool, 400));
    const auto says = [](const std::string& sentence, const char* word) {
        EXPECT_NE(sentence.find(word), std::string::npos) << sentence;
    };
    says(refusal(ErrorCode::mismatch, [&] { load_cache(rewritten(bytes, "kvplane.format", "9"), c, pool); }),
         "format 9");
    says(refusal(ErrorCode::mismatch, [&] { load_cache(bytes, configuration("compact"), pool); }),
         "another configuration");
    says(refusal(ErrorCode::mismatch, [&] { load_cache(bytes, configuration("standard", 4), pool); }),
         "another configuration");
    says(refusal(ErrorCode::format, [&] { load_cache(rewritten(bytes, "kvplane.tokens", "401"), c, pool); }),
         "checksum");
    says(refusal(ErrorCode::format, [&] { load_cache(rewritten(bytes, "kvplane.tokens", "-4"), c, pool); }),
         "number of tokens");
    says(refusal(ErrorCode::format, [&] { load_cache(rewritten(bytes, "kvplane.checksum", ""), c, pool); }),
         "not a kvplane cache");
    says(refusal(ErrorCode::format, [&] { load_cache(rewritten(bytes, "tiles", ""), c, pool); }),
         "no tensor");
    refusal(ErrorCode::io, [&] { load_cache("/no/such/file", c, pool); });
}

TEST(SavedCacheFile, GoesThroughTheDisk) {
    TilePool pool;
    const CacheConfiguration c = configuration("compact");
    const auto path = std::filesystem::temp_directory_path() / "kvplane_cache_file_test.safetensors";
    const KvCache cache = filled_cache(c, pool, 400);
    save_cache(cache, path);
    EXPECT_EQ(to_bytes(load_cache(path, c, pool)), to_bytes(cache));
    std::filesystem::remove(path);
}

// -- The checksum, as a reader in another language would compute it -----------------------------------------

std::uint64_t add_word(std::uint64_t hash, std::uint64_t word) {
    hash = (hash ^ word) * 1099511628211U;
    return hash ^ (hash >> 29);
}

/// Byte by byte, whatever the machine.
std::uint64_t add_array(std::uint64_t hash, std::span<const std::byte> bytes) {
    hash = add_word(hash, bytes.size());
    std::uint64_t word = 0;
    for (std::size_t i = 0; i < bytes.size(); ++i) {
        word |= static_cast<std::uint64_t>(bytes[i]) << 8 * (i % 8);
        if (i % 8 != 7) continue;
        hash = add_word(hash, word);
        word = 0;
    }
    return add_word(hash, word);
}

/// The same in four lanes.
std::uint64_t add_lanes(std::uint64_t hash, std::span<const std::byte> bytes) {
    hash = add_word(hash, bytes.size());
    std::uint64_t lanes[4];
    for (std::uint64_t k = 0; k < 4; ++k) lanes[k] = 0xCBF29CE484222325U + k;
    std::uint64_t word = 0;
    for (std::size_t i = 0; i < (bytes.size() + 31) / 32 * 32; ++i) {
        if (i < bytes.size()) word |= static_cast<std::uint64_t>(bytes[i]) << 8 * (i % 8);
        if (i % 8 != 7) continue;
        lanes[i / 8 % 4] = add_word(lanes[i / 8 % 4], word);
        word = 0;
    }
    for (const std::uint64_t lane : lanes) hash = add_word(hash, lane);
    return hash;
}

std::uint64_t basis_checksum(const SafetensorsFile& file) {
    std::uint64_t hash = 0xCBF29CE484222325U;
    for (int p = 0; file.contains("latent.parts." + std::to_string(p) + ".mean"); ++p) {
        const std::string prefix = "latent.parts." + std::to_string(p) + ".";
        const auto segments = file.matrix<std::int64_t>(prefix + "segments");
        for (Index run = 0; run < segments.rows(); ++run)
            for (Index field = 0; field < 2; ++field)
                hash = add_word(hash, static_cast<std::uint64_t>(segments(run, field)));
        for (const char* name : {"mean", "encode_scale", "decode_scale", "decode", "encode", "channels"})
            hash = add_array(hash, file.bytes(prefix + name));
    }
    return hash;
}

std::string documented_checksum(const SafetensorsFile& file) {
    const auto text = [&](const char* key) -> const std::string& {
        return file.metadata().find(key)->second;
    };
    std::uint64_t hash =
        add_lanes(0xCBF29CE484222325U, std::as_bytes(std::span(text("kvplane.configuration"))));
    for (const char* key :
         {"kvplane.tokens", "kvplane.dropped", "kvplane.window_first", "kvplane.kept_sinks"})
        hash = add_word(hash, std::stoull(text(key)));
    for (const char* name : {"sinks", "tiles", "recent", "tile_first", "tile_tokens", "tile_row",
                             "tile_shift", "tile_bits", "extremes"})
        hash = add_lanes(hash, file.bytes(name));
    if (file.contains("latent.parts.0.mean")) {
        const std::string sum = std::to_string(basis_checksum(file));
        hash = add_lanes(hash, std::as_bytes(std::span(sum)));
    }
    if (file.contains("queries.count")) {
        const auto heads = static_cast<std::size_t>(file.info("queries.count").size());
        for (std::size_t h = 0; h < heads; ++h)
            for (const char* name : {"queries.count", "queries.mean", "queries.scatter"}) {
                const auto all = file.bytes(name);
                hash = add_lanes(hash, all.subspan(h * (all.size() / heads), all.size() / heads));
            }
    }
    for (const char* name : {"shaping", "attention"})
        if (file.contains(name)) hash = add_lanes(hash, file.bytes(name));
    return std::to_string(hash);
}

TEST(SavedCacheFile, ChecksumIsTheDocumentedOne) {
    TilePool pool;
    for (const char* recipe : {"fp16", "standard", "key_favored:3:5+recent_bits=8", "svdq:2+fit_tokens=200",
                               "latent:4:4+fit_tokens=200", "weighted:5:8+fit_tokens=200", "smallest"})
        for (const Index tokens : {3, 150, 300, 600}) {
            const CacheConfiguration c = configuration(recipe);
            const Sequence s(c, tokens, 3);
            KvCache cache(c, pool);
            cache.append(s.keys, s.values, s.queries);
            const std::vector<std::byte> bytes = to_bytes(cache);
            const SafetensorsFile file = SafetensorsFile::from_bytes(bytes);
            EXPECT_EQ(file.metadata().find("kvplane.checksum")->second, documented_checksum(file))
                << recipe << ", " << tokens << " tokens";
        }
}

/// Tiles that cannot be, in a file whose checksum is right.
TEST(SavedCacheFile, RefusesTilesThatContradictTheRecipe) {
    TilePool pool;
    const CacheConfiguration c = configuration("smallest");
    const PageLayout layout = detail::page_layout(c, nullptr);
    const std::vector<std::byte> bytes = to_bytes(filled_cache(c, pool, 600));
    const auto refused = [&](Index page, Index at, int value) {
        std::vector<std::byte> altered = bytes;
        const SafetensorsFile file = SafetensorsFile::from_bytes(altered);
        const Index tiles = file.bytes("tiles").data() - altered.data();
        altered[static_cast<std::size_t>(tiles + page * layout.bytes + at)] = static_cast<std::byte>(value);
        const std::string sum = documented_checksum(SafetensorsFile::from_bytes(altered));
        return refusal(ErrorCode::format,
                       [&] { load_cache(rewritten(altered, "kvplane.checksum", sum), c, pool); });
    };
    EXPECT_NE(
        refused(2, layout.rotated_at + 1, 2).find("tile 2: its keys of head 1 are neither rotated nor not"),
        std::string::npos);
    EXPECT_NE(refused(3, layout.value_at[0], 0x55).find("tile 3: its tokens do not have the widths"),
              std::string::npos);
}

/// Numbers that the writers of data/cache_format_3.safetensors and 4 made as well.
Matrix numbers(Index rows, Index cols, int salt) {
    Matrix matrix(rows, cols);
    for (Index r = 0; r < rows; ++r)
        for (Index c = 0; c < cols; ++c)
            matrix(r, c) = static_cast<float>((r * 37 + c * 11 + salt) % 101 - 50) / 32.0f;
    return matrix;
}

CacheConfiguration layer_of_old_files() {
    CacheConfiguration c;
    c.query_heads = 2;
    c.key_head_dim = 16;
    c.value_head_dim = 8;
    c.recipe = recipes::parse("key_favored:5:3+rotate_keys=1+recent_bits=8+value_scheme=min_max");
    return c;
}
/// That attention is what it was when the file was written.
void expect_attention(const KvCache& cache, const float (&expected)[2][16]) {
    Matrix output(2, 16);
    cache.attend(numbers(2, 32, 3), output);
    for (Index r = 0; r < 2; ++r)
        for (Index i = 0; i < 16; ++i) EXPECT_NEAR(output(r, i), expected[r][i], 1e-5f);
}

/// A cache of 400 tokens, 420 of them appended, dropped before 150; and what attention of it gave when it was
/// written.
TEST(SavedCacheFile, ReadsFormat3) {
    const CacheConfiguration c = layer_of_old_files();
    TilePool pool;
    KvCache cache =
        load_cache(std::filesystem::path(KVPLANE_TEST_DATA) / "cache_format_3.safetensors", c, pool);
    EXPECT_EQ(cache.tokens(), 400);
    EXPECT_EQ(cache.first_kept(), 150);
    EXPECT_EQ(cache.bytes(), 7104);
    const float expected[2][16] = {
        {-0.928675115f, -0.844433665f, -0.561753333f, -0.202352762f, 0.0546511449f, 0.413895488f,
         0.694225252f, 0.817028165f, 0.733025372f, 1.00379634f, 0.834984839f, -1.02713501f, -0.915399551f,
         -0.661843538f, -0.300957859f, -0.021528231f},
        {-0.241942167f, 0.101890549f, 0.428493023f, 0.695079327f, 0.96242547f, 0.611350775f, -0.99665159f,
         -0.829862058f, -0.793561399f, -0.576844752f, -0.294523507f, 0.074447304f, 0.332234621f, 0.676837146f,
         0.839789152f, 0.595299482f}};
    expect_attention(cache, expected);
    // It is written in the format of today, and goes on.
    KvCache again = load_cache(to_bytes(cache), c, pool);
    again.append(numbers(300, 16, 4), numbers(300, 8, 5));
    EXPECT_EQ(again.tokens(), 700);
    EXPECT_LT(again.error_bound().value, 1.0);
}

/// 300 tokens, cut to 200, then 200 more, dropped before 150 but for 2; and what it was when it was written.
TEST(SavedCacheFile, ReadsFormat4) {
    const CacheConfiguration c = layer_of_old_files();
    TilePool pool;
    const auto path = std::filesystem::path(KVPLANE_TEST_DATA) / "cache_format_4.safetensors";
    const KvCache cache = load_cache(path, c, pool);
    EXPECT_EQ(cache.tokens(), 400);
    EXPECT_EQ(cache.first_kept(), 150);
    EXPECT_EQ(cache.state().kept_sinks, 2);
    EXPECT_EQ(cache.bytes(), 8000);
    EXPECT_DOUBLE_EQ(cache.error_bound().key, 0.1982574134361087);
    EXPECT_DOUBLE_EQ(cache.error_bound().value, 0.51631787009390551);
    const float expected[2][16] = {
        {-0.948350966f, -0.852067411f, -0.556176722f, -0.218636185f, 0.0681257024f, 0.403060168f,
         0.695379913f, 0.829904199f, 0.740146875f, 0.989884615f, 0.762067497f, -0.999393284f, -0.917741716f,
         -0.647093415f, -0.296895623f, 0.00814142264f},
        {-0.249408022f, 0.098305501f, 0.417232901f, 0.696458995f, 0.962456465f, 0.615868986f, -1.00189197f,
         -0.835858285f, -0.825896204f, -0.591320276f, -0.290349454f, 0.0497006588f, 0.344241709f,
         0.658134639f, 0.836688936f, 0.594186962f}};
    expect_attention(cache, expected);
    EXPECT_EQ(load_cache(to_bytes(cache), c, pool).bytes(), 8000);
}

/// Their own checksum is looked at, too.
TEST(SavedCacheFile, RefusesAlteredFilesOfOlderFormats) {
    const CacheConfiguration c = layer_of_old_files();
    TilePool pool;
    for (const char* name : {"cache_format_3.safetensors", "cache_format_4.safetensors"}) {
        const MappedFile file = MappedFile::open(std::filesystem::path(KVPLANE_TEST_DATA) / name);
        const std::vector<std::byte> bytes(file.bytes().begin(), file.bytes().end());
        for (std::size_t at = bytes.size() - 7000; at < bytes.size(); at += 97) {
            std::vector<std::byte> altered = bytes;
            altered[at] ^= std::byte{4};
            refusal(ErrorCode::format, [&] { load_cache(altered, c, pool); });
        }
        refusal(ErrorCode::format, [&] { load_cache(rewritten(bytes, "kvplane.format", "5"), c, pool); });
    }
    EXPECT_EQ(pool.pages(), 0);
}

/// What was taken back is nowhere in the file, on any path into a page.
TEST_P(SavedCache, HoldsNothingOfTokensThatWereTakenBack) {
    for (const Index left : {1, 3, 60, 130, 140, 165, 290}) {
        SCOPED_TRACE(left);
        KvCache one = filled_cache(configuration_, pool_, left), other = one.fork();
        const Index heads = configuration_.kv_heads;
        const auto goes_on = [&](KvCache& cache, float with) {
            append_provisional(cache, Matrix::Constant(20, heads * configuration_.key_head_dim, with),
                               Matrix::Constant(20, heads * configuration_.value_head_dim, with));
            cache.truncate(left);
        };
        goes_on(one, 3.0f);
        goes_on(other, -7.0f);
        EXPECT_EQ(saved(one), saved(other));
    }
}

// -- Compressed ---------------------------------------------------------------------------------------------

class CompressedCache : public testing::Test {
  protected:
    void SetUp() override {
        if (!can_compress()) GTEST_SKIP() << "built without libzstd";
    }
    static std::vector<std::byte> compressed(const KvCache& cache) {
        return to_bytes(cache, {.compress = true});
    }
    TilePool pool_;
};

/// What the shipped layers of a real model save, in per cent of packed tiles and of the file. A quarter to
/// half of such a file of 1024 tokens are recent ones, which save 11 to 18%.
TEST_F(CompressedCache, OfRealTensorsIsSmaller) {
    struct Case {
        const char* recipe;
        double tiles, file;
    };
    for (const auto& [recipe, tiles, file] : {Case{"standard", 6.2, 7.2},
                                              {"compact", 7.1, 8.0},
                                              {"key_favored:4:2", 7.1, 11.0},
                                              {"key_favored:3:3", 9.0, 12.0},
                                              {"key_favored:2:2", 8.3, 12.5},
                                              {"key_favored:4:4", 8.7, 11.5},
                                              {"latent:2:2+fit_tokens=700", 8.0, 10.5}}) {
        SCOPED_TRACE(recipe);
        double plain = 0, packed = 0, plain_tiles = 0, packed_tiles = 0;
        for (const RealLayer& layer : real_layers()) {
            CacheConfiguration c = configuration(recipe, 3, 9, 64, 64);
            c.rope->base = 100000;
            KvCache cache(c, pool_);
            append(cache, layer.keys, layer.values);
            const std::vector<std::byte> all = to_bytes(cache), less = compressed(cache);
            EXPECT_EQ(to_bytes(load_cache(less, c, pool_)), all);
            const SafetensorsFile from = SafetensorsFile::from_bytes(all),
                                  to = SafetensorsFile::from_bytes(less);
            plain += static_cast<double>(all.size());
            packed += static_cast<double>(less.size());
            plain_tiles += static_cast<double>(from.bytes("tiles").size());
            packed_tiles += static_cast<double>(to.bytes("tiles.chunks").size());
        }
        const double saved_of_tiles = 100 * (1 - packed_tiles / plain_tiles),
                     saved = 100 * (1 - packed / plain);
        std::cout << recipe << ": saves " << saved_of_tiles << "% of tiles, " << saved << "% of files\n";
        EXPECT_GT(saved_of_tiles, tiles);
        EXPECT_GT(saved, file);
        EXPECT_LT(saved_of_tiles, tiles + 2);  // more would be too good to be true
        EXPECT_LT(saved, file + 2);
    }
}

/// Tiles of three layouts, two of them parts of one, a gap, and recent tokens.
KvCache edited(TilePool& pool) {
    CacheConfiguration c = layer_of_old_files();
    c.rope = RopeSettings{};
    KvCache cache(c, pool);
    cache.append(numbers(1200, 16, 1), numbers(1200, 8, 2));
    cache.narrow(0, 300, 4, 2);
    cache.narrow(500, 800, 4, 3);
    cache.remove(400, 420);
    cache.drop_before(200, 2);
    return cache;
}

TEST_F(CompressedCache, MayHoldTilesOfSeveralLayouts) {
    const KvCache cache = edited(pool_);
    ASSERT_EQ(cache.state().narrowed.size(), 2u);
    const KvCache loaded = load_cache(compressed(cache), cache.configuration(), pool_);
    EXPECT_EQ(to_bytes(loaded), to_bytes(cache));
    EXPECT_EQ(loaded.bytes(), load_cache(to_bytes(cache), cache.configuration(), pool_).bytes());
}

/// The order of streams and the size of chunks are part of the format.
TEST_F(CompressedCache, ReadsFormat6) {
    const KvCache cache = edited(pool_);
    const auto path = std::filesystem::path(KVPLANE_TEST_DATA) / "cache_format_6.safetensors";
    const KvCache loaded = load_cache(path, cache.configuration(), pool_);
    EXPECT_EQ(to_bytes(loaded), to_bytes(cache));
}

TEST_F(CompressedCache, SaysWhatIsWrong) {
    const CacheConfiguration c = configuration("standard");
    const std::vector<std::byte> bytes = compressed(filled_cache(c, pool_, 700));
    const Index used = pool_.bytes();
    const auto says = [&](ErrorCode code, const std::string& key, const std::string& value,
                          const std::string& words) {
        const std::string sentence =
            refusal(code, [&] { load_cache(rewritten(bytes, key, value), c, pool_); });
        EXPECT_NE(sentence.find(words), std::string::npos) << sentence;
        EXPECT_EQ(pool_.bytes(), used);
    };
    says(ErrorCode::mismatch, "kvplane.compression", "lz4", "compressed with 'lz4', expected zstd");
    says(ErrorCode::format, "kvplane.compression", "", "no metadata 'kvplane.compression'");
    says(ErrorCode::format, "kvplane.format", "5", "no tensor 'tiles'");
    says(ErrorCode::format, "tiles.chunks", "", "no tensor 'tiles.chunks'");
    says(ErrorCode::format, "recent.chunk_bytes", "", "no tensor 'recent.chunk_bytes'");
    says(ErrorCode::format, "kvplane.tokens", "3", "contradict each other");
    says(ErrorCode::format, "kvplane.tokens", "999999999999999", "contradict each other");
    says(ErrorCode::format, "kvplane.tokens", "1000000000000", "chunks for ");
    says(ErrorCode::format, "kvplane.checksum", "1", "the checksum does not match");
    // A reader of format 5 says the same of 6 as this one of 7.
    says(ErrorCode::mismatch, "kvplane.format", "7", "format 7, expected 3 to 6");
}

TEST(SavedCacheFile, CompressesOnlyWithZstd) {
    if (can_compress()) GTEST_SKIP() << "built with libzstd";
    TilePool pool;
    const KvCache cache = filled_cache(configuration("standard"), pool, 300);
    EXPECT_NE(refusal(ErrorCode::option, [&] { (void)to_bytes(cache, {.compress = true}); })
                  .find("built without libzstd"),
              std::string::npos);
    const auto path = std::filesystem::path(KVPLANE_TEST_DATA) / "cache_format_6.safetensors";
    const CacheConfiguration c = edited(pool).configuration();
    EXPECT_NE(
        refusal(ErrorCode::mismatch, [&] { (void)load_cache(path, c, pool); }).find("built without libzstd"),
        std::string::npos);
}

TEST(SavedCacheFile, RefusesProvisionalTokens) {
    TilePool pool;
    KvCache cache = filled_cache(configuration("standard"), pool, 10);
    append_provisional(cache, Matrix::Ones(2, 64), Matrix::Ones(2, 96));
    EXPECT_EQ(refusal(ErrorCode::option, [&] { (void)to_bytes(cache); }),
              "kvplane: save: 2 provisional tokens, expected none: accept them, or truncate to 10");
    cache.accept();
    EXPECT_EQ(load_cache(to_bytes(cache), cache.configuration(), pool).tokens(), 12);
}

}  // namespace
