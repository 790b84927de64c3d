// Sessions: all layers of a sequence in one file.
#include "kvplane/io/session_file.hpp"

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
#include "test_support.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

class Session : public testing::Test {
  protected:
    Session()
        : path_(std::filesystem::temp_directory_path() / ("kvplane_session_" + std::to_string(::getpid()))) {}
    ~Session() override { std::filesystem::remove(path_); }

    KvCache& add(const std::string& recipe, Index tokens) {
        configurations_.push_back(configuration(recipe));
        return add(configurations_.back(), tokens);
    }
    KvCache& add(const CacheConfiguration& c, Index tokens) {
        caches_.emplace_back(c, pool_);
        append(caches_.back(), normal_matrix(random_, tokens, c.kv_heads * c.key_head_dim),
               normal_matrix(random_, tokens, c.kv_heads * c.value_head_dim));
        return caches_.back();
    }
    std::vector<const KvCache*> layers() const {
        std::vector<const KvCache*> all;
        for (const KvCache& cache : caches_) all.push_back(&cache);
        return all;
    }
    std::vector<std::byte> file() const {
        const MappedFile mapped = MappedFile::open(path_);
        return {mapped.bytes().begin(), mapped.bytes().end()};
    }
    void write(const std::vector<std::byte>& bytes) const {
        std::ofstream file(path_, std::ios::binary | std::ios::trunc);
        file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    }
    void expect_same(const KvCache& a, const KvCache& b) {
        EXPECT_EQ(to_bytes(a), to_bytes(b));
        EXPECT_EQ(a.bytes(), b.bytes());
        EXPECT_EQ(a.first_kept(), b.first_kept());
        if (a.tokens() < 2) return;
        const Matrix q = normal_matrix(random_, 2, 4 * 32);
        EXPECT_EQ(attend(a, q), attend(b, q));
    }

    std::filesystem::path path_;
    TilePool pool_;
    std::mt19937_64 random_{7};
    std::vector<CacheConfiguration> configurations_;
    std::vector<KvCache> caches_;
};

TEST_F(Session, LoadsEveryRecipeBitForBit) {
    Index tokens = 150;
    for (const std::string& recipe : recipe_names()) add(recipe, tokens += 31);
    caches_[0].truncate(100);
    caches_[5].truncate(200);  // inside a tile
    caches_[1].drop_before(150);
    caches_[8].drop_before(200, 3);
    caches_[10].clear();
    // A fork shares pages and goes on by itself.
    configurations_.push_back(configurations_[3]);
    caches_.push_back(caches_[3].fork());
    caches_.back().truncate(caches_[3].tokens() - 40);
    save_session(layers(), path_);
    const std::vector<KvCache> loaded = load_session(path_, configurations_, pool_);
    ASSERT_EQ(loaded.size(), caches_.size());
    for (std::size_t i = 0; i < loaded.size(); ++i) {
        SCOPED_TRACE(i);
        expect_same(loaded[i], caches_[i]);
    }
    // The same again, one by one, from the last.
    const SessionFile session = SessionFile::open(path_);
    EXPECT_EQ(session.layers(), static_cast<Index>(caches_.size()));
    for (std::size_t i = loaded.size(); i-- > 0;)
        expect_same(session.load(static_cast<Index>(i), configurations_[i], pool_), caches_[i]);
    // The file follows from the content.
    const std::vector<std::byte> before = file();
    std::vector<const KvCache*> again;
    for (const KvCache& cache : loaded) again.push_back(&cache);
    save_session(again, path_, {.sync = false});
    EXPECT_EQ(file(), before);
    if (!can_compress()) return;
    save_session(again, path_, {.sync = false, .compress = true});
    EXPECT_LT(file().size(), before.size());
    const std::vector<KvCache> compressed = load_session(path_, configurations_, pool_);
    for (std::size_t i = 0; i < loaded.size(); ++i) {
        SCOPED_TRACE(i);
        expect_same(compressed[i], caches_[i]);
        expect_same(SessionFile::open(path_).load(static_cast<Index>(i), configurations_[i], pool_),
                    caches_[i]);
    }
}

TEST_F(Session, RefusesWhatBelongsElsewhere) {
    const auto says = [](const std::string& sentence, const std::string& words) {
        EXPECT_NE(sentence.find(words), std::string::npos) << sentence;
    };
    says(refusal(ErrorCode::option, [&] { save_session({}, path_); }), "no layers");
    add("standard", 300);
    add("compact", 300);
    add("standard", 200);
    save_session(layers(), path_);
    const Index used = pool_.bytes();
    const auto load = [&](std::vector<int> order) {
        std::vector<CacheConfiguration> wanted;
        for (const int i : order) wanted.push_back(configurations_[static_cast<std::size_t>(i)]);
        (void)load_session(path_, wanted, pool_);
    };
    says(refusal(ErrorCode::mismatch, [&] { load({0, 1}); }), "a session of 3 layers, expected 2");
    says(refusal(ErrorCode::mismatch, [&] { load({0, 1, 2, 2}); }), "a session of 3 layers, expected 4");
    says(refusal(ErrorCode::mismatch, [&] { load({0, 2, 1}); }), "layer.1. a cache of another configuration");
    says(refusal(ErrorCode::mismatch, [&] { load_cache(path_, configurations_[0], pool_); }),
         "a session of several layers");
    const SessionFile session = SessionFile::open(path_);
    says(refusal(ErrorCode::index, [&] { session.load(3, configurations_[0], pool_); }), "layer 3 of 3");
    says(refusal(ErrorCode::index, [&] { session.load(-1, configurations_[0], pool_); }), "layer -1 of 3");
    says(refusal(ErrorCode::mismatch, [&] { session.load(1, configurations_[0], pool_); }), "configuration");
    save_cache(caches_[0], path_);
    says(refusal(ErrorCode::mismatch, [&] { (void)SessionFile::open(path_); }), "no session");
    append_provisional(caches_[1], Matrix::Ones(2, 64), Matrix::Ones(2, 96));
    says(refusal(ErrorCode::option, [&] { save_session(layers(), path_); }), "provisional");
    EXPECT_EQ(load_cache(path_, configurations_[0], pool_).tokens(), 300);  // still there
    caches_[1].truncate(300);
    EXPECT_EQ(pool_.bytes(), used);
}

/// Layers of one configuration are told apart by the checksum.
TEST_F(Session, RefusesLayersInAnotherOrder) {
    add("standard", 200);
    add("standard", 200);
    save_session(layers(), path_);
    const std::vector<std::byte> bytes = file();
    const auto original = SafetensorsFile::from_bytes(bytes);
    const auto swapped = [](std::string name) {
        if (name.starts_with("layer.")) name[6] = name[6] == '0' ? '1' : '0';
        return name;
    };
    SafetensorsWriter writer;
    for (const std::string& name : original.names())
        writer.add(swapped(name), original.info(name).shape, original.info(name).dtype, original.bytes(name));
    for (const auto& [key, value] : original.metadata()) writer.metadata(swapped(key), value);
    writer.write(path_);
    EXPECT_NE(refusal(ErrorCode::format, [&] { (void)load_session(path_, configurations_, pool_); })
                  .find("layer.0. the checksum"),
              std::string::npos);
}

TEST_F(Session, RefusesEveryAlteredByte) {
    add("standard", 300);
    add("latent:3:3+fit_tokens=130+context=100000", 300);
    add("weighted:3:16+fit_tokens=150+recent=0", 100);
    save_session(layers(), path_);
    const std::vector<std::byte> bytes = file();
    std::vector<std::vector<std::byte>> expected;
    for (const KvCache& cache : caches_) expected.push_back(to_bytes(cache));
    const std::size_t header =
        8 + static_cast<std::size_t>(bytes[0]) + 256 * static_cast<std::size_t>(bytes[1]);
    const Index used = pool_.bytes(), pages = pool_.pages();
    int refused = 0;
    for (int i = 0; i < rounds(600); ++i) {
        std::vector<std::byte> altered = bytes;
        const std::size_t at = i % 2 ? random_() % header : header + random_() % (bytes.size() - header);
        altered[at] ^= static_cast<std::byte>(1u << random_() % 8);
        write(altered);
        try {
            const std::vector<KvCache> loaded = load_session(path_, configurations_, pool_);
            for (std::size_t l = 0; l < 3; ++l) EXPECT_EQ(to_bytes(loaded[l]), expected[l]) << "byte " << at;
        } catch (const Error&) {
            ++refused;
            ASSERT_EQ(pool_.bytes(), used);
            EXPECT_TRUE(refused <= i || pool_.pages() == pages);  // none was ever asked for
        }
    }
    EXPECT_GT(refused, rounds(600) * 9 / 10);
}

TEST_F(Session, RefusesEveryTruncation) {
    add("standard", 200);
    add("fp16", 200);
    save_session(layers(), path_);
    const std::vector<std::byte> bytes = file();
    const Index pages = pool_.pages();
    for (std::size_t size = 0; size < bytes.size(); size += 1 + size / 20) {
        write({bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size)});
        refusal(ErrorCode::format, [&] { (void)load_session(path_, configurations_, pool_); });
    }
    EXPECT_EQ(pool_.pages(), pages);
}

/// A later layer with a right checksum, which contradicts itself.
TEST_F(Session, ChecksAllLayersBeforeItTakesPages) {
    add("standard", 400);
    add("standard", 400);
    SafetensorsWriter writer;
    std::vector<detail::CacheContent> contents;
    for (const KvCache& cache : caches_) contents.push_back(detail::CacheContent::of(cache));
    contents[1].window_first -= 1;
    for (Index layer : {0, 1}) {
        auto& content = contents[static_cast<std::size_t>(layer)];
        content.layers = 2, content.layer = layer;
        content.add_to(writer, "layer." + std::to_string(layer) + ".");
    }
    writer.metadata("kvplane.format", "5");
    writer.metadata("kvplane.layers", "2");
    writer.write(path_);
    const Index pages = pool_.pages();
    const SessionFile session = SessionFile::open(path_);
    const std::string sentence =
        refusal(ErrorCode::format, [&] { (void)session.load(configurations_, pool_); });
    EXPECT_NE(sentence.find("the tiles end at token"), std::string::npos) << sentence;
    EXPECT_EQ(pool_.pages(), pages);
    EXPECT_EQ(session.load(0, configurations_[0], pool_).tokens(), 400);  // the other is as it should be
}

}  // namespace
