// kvplane/io/impl/cache_file.hpp: what a cache holds as tensors, and back with every number checked.
#pragma once

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "kvplane/cache/shape.hpp"
#include "kvplane/error.hpp"
#include "kvplane/io/cache_file.hpp"
#include "kvplane/io/impl/latent_content.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/storage/tile_coder.hpp"

namespace kvplane {

namespace detail {

/// The hash of words that io/cache_file.hpp describes.
class WordHash {
  public:
    void add(std::span<const std::byte> bytes) noexcept {
        add_word(bytes.size());
        std::size_t at = 0;
        for (; at + 8 <= bytes.size(); at += 8) add_word(load_u64(bytes.data() + at));
        std::uint64_t rest = 0;
        if (at < bytes.size()) std::memcpy(&rest, bytes.data() + at, bytes.size() - at);
        add_word(rest);
    }
    void add_word(std::uint64_t word) noexcept {
        state_ = (state_ ^ word) * 0x100000001B3ull;
        state_ ^= state_ >> 29;  // a plain product would never move high bits of a word down
    }
    std::string text() const { return std::to_string(state_); }

  private:
    std::uint64_t state_ = 0xCBF29CE484222325ull;
};

/// A number that stands for a basis in a configuration.
inline std::string basis_checksum(const LatentKeys& keys) {
    WordHash sum;
    for (Index i = 0; i < keys.subspaces(); ++i) {
        const LatentKeys::Subspace& subspace = keys.subspace(i);
        for (const ChannelSegment& segment : subspace.segments) {
            sum.add_word(static_cast<std::uint64_t>(segment.channels));
            sum.add_word(static_cast<std::uint64_t>(segment.bits));
        }
        const auto add = [&](const auto& numbers) {
            sum.add(std::as_bytes(std::span(numbers.data(), static_cast<std::size_t>(numbers.size()))));
        };
        add(subspace.mean);
        add(subspace.to_latents_scale);
        add(subspace.from_latents_scale);
        add(subspace.from_latents);
        add(subspace.to_latents);
        add(subspace.channels);
    }
    return sum.text();
}

inline nlohmann::json latents_json(const CacheConfiguration& c) {
    if (!c.recipe.latents) return nullptr;
    const LatentRecipe& latents = *c.recipe.latents;
    return {
        {"basis", basis_json(latents.basis)},
        {"rope", rope_json(c.rope)},
        {"groups", latents.groups},
        {"bits", latents.bits},
        {"own_heads_together", latents.own_heads_together},
        {"fit_tokens", latents.fit_tokens},
        {"given", c.latent_keys ? nlohmann::json(basis_checksum(*c.latent_keys)) : nlohmann::json(nullptr)}};
}

inline nlohmann::json side_json(const SideRecipe& side) {
    return {{"bits", side.bits},
            {"granularity", name(side.rule.granularity)},
            {"group", side.rule.group},
            {"scheme", name(side.rule.scheme)},
            {"clip", side.rule.clip == Clip::mse_optimal},
            {"rotate", side.rotate}};
}

/// Everything that what is stored depends on. The recipe's name is not part of it.
inline std::string configuration_json(const CacheConfiguration& c) {
    nlohmann::json json{{"kv_heads", c.kv_heads},
                        {"query_heads", c.query_heads},
                        {"key_head_dim", c.key_head_dim},
                        {"value_head_dim", c.value_head_dim},
                        {"rotation_seed", c.rotation_seed},
                        {"keys", side_json(c.recipe.keys)},
                        {"values", side_json(c.recipe.values)},
                        {"sink_tokens", c.recipe.sink_tokens},
                        {"recent_tokens", c.recipe.recent_tokens},
                        {"recent_bits", c.recipe.recent_bits},
                        {"every_token", c.recipe.every_token},
                        {"latents", latents_json(c)}};
    // What files of before do not have is left out where it does not count.
    if (c.values_in_keys) json["rotary_bits"] = c.recipe.rotary_bits;
    return json.dump();
}

inline void append_page(std::vector<std::byte>& to, const PageReference& page) {
    to.insert(to.end(), page.data(), page.data() + page.bytes());
}

KVPLANE_FUNCTION CacheContent CacheContent::of(const KvCache& cache) {
    const CacheState& state = cache.state();
    require(state.provisional.empty(), ErrorCode::option, "save: ", state.provisional.size(),
            " provisional tokens, expected none: accept them, or truncate to ", state.settled());
    for (const TilePlace& tile : state.tiles)
        require(tile.layout == state.layout.get() && tile.row == 0 && tile.shift == 0, ErrorCode::option,
                "save: tiles that were narrowed, or whose tokens have moved, expected neither");
    CacheContent content;
    content.configuration = configuration_json(cache.configuration());
    content.tokens = state.tokens;
    content.kept_sinks = state.kept_sinks;
    content.dropped = state.dropped;
    content.window_first = state.recent_first;
    const StoredExtremes& extremes = state.settled_extremes;
    for (const PerSide<double>& of : {extremes.largest, extremes.excess, extremes.carried})
        content.extremes.insert(content.extremes.end(), {of.keys, of.values});
    const TokenRows sink_rows = cache.shape().sink_rows(), recent_rows = cache.shape().recent_rows();
    if (state.sinks) {
        append_page(content.sinks, state.sinks);
        sink_rows.clear(content.sinks.data(), state.sink_count(cache.configuration().recipe));
    }
    for (std::size_t t = 0; t < state.tiles.size(); ++t) {
        const TilePlace& tile = state.tiles[t];
        append_page(content.tiles, state.tile_pages[t]);
        if (state.stale && t + 1 == state.tiles.size())
            clear_tiles(*state.layout, tile.tokens,
                        content.tiles.data() + content.tiles.size() - state.layout->bytes);
        content.tile_first.push_back(tile.first);
        content.tile_tokens.push_back(tile.tokens);
    }
    for (const PageReference& page : state.recent) append_page(content.recent, page);
    if (const Index rest = (state.tokens - state.recent_first) % recent_page_tokens; rest > 0)
        recent_rows.clear(content.recent.data() + content.recent.size() - recent_rows.bytes(), rest);
    if (cache.configuration().fits_basis() && state.layout) content.basis = state.latent;
    if (state.queries) content.queries = *state.queries;
    return content;
}

KVPLANE_FUNCTION std::string CacheContent::checksum() const {
    WordHash sum;
    sum.add(std::as_bytes(std::span(configuration)));
    for (const Index number : {tokens, dropped, window_first})
        sum.add_word(static_cast<std::uint64_t>(number));
    if (kept_sinks) sum.add_word(static_cast<std::uint64_t>(*kept_sinks));
    sum.add(sinks);
    sum.add(tiles);
    sum.add(recent);
    sum.add(std::as_bytes(std::span(tile_first)));
    sum.add(std::as_bytes(std::span(tile_tokens)));
    sum.add(std::as_bytes(std::span(extremes)));
    if (basis) {
        const std::string basis_sum = basis_checksum(*basis);
        sum.add(std::as_bytes(std::span(basis_sum)));
    }
    for (const SecondMoments& head : queries) {
        const MatrixD& scatter = head.scatter();
        const double count = head.count();
        sum.add(std::as_bytes(std::span(&count, 1)));
        sum.add(std::as_bytes(std::span(head.mean().data(), static_cast<std::size_t>(head.mean().size()))));
        sum.add(std::as_bytes(std::span(scatter.data(), static_cast<std::size_t>(scatter.size()))));
    }
    return sum.text();
}

/// Whether the parts make up a cache: positions without gaps, pages of the right number and size.
KVPLANE_FUNCTION void CacheContent::require_consistent(const CacheShape& shape, const CacheState& state,
                                                       const std::string& source) const {
    const auto expect = [&](bool holds, const auto&... what) {
        require(holds, ErrorCode::format, source, ": ", what...);
    };
    const CacheRecipe& recipe = shape.recipe();
    const bool needs_queries = !state.layout && recipe.latents && recipe.latents->basis.query_weighted;
    const Index tile_bytes = state.layout ? state.layout->bytes : 0;
    expect(queries.empty() || needs_queries, "moments of queries in a cache that needs none");
    expect(state.layout || tile_first.empty(), "tiles, but no basis to read them with");
    constexpr Index most = Index{1} << 40;
    expect(tokens >= 0 && tokens < most && dropped >= 0 && dropped <= tokens && window_first >= 0 &&
               window_first <= tokens && (!kept_sinks || (*kept_sinks >= 0 && *kept_sinks < most)),
           "tokens ", tokens, ", kept_sinks ", kept_sinks.value_or(0), ", dropped ", dropped,
           ", window_first ", window_first, " contradict each other");
    const Index kept = kept_sinks.value_or(recipe.sink_tokens);
    const Index sink_count = std::min(recipe.sink_tokens, tokens);
    const Index sink_bytes = sink_count > 0 ? shape.sink_rows().bytes() : 0;
    expect(static_cast<Index>(sinks.size()) == sink_bytes, "sinks: ", sinks.size(), " bytes, expected ",
           sink_bytes);
    expect(window_first >= sink_count, "window_first ", window_first, ", expected at least the ", sink_count,
           " sinks");
    const auto count = tile_first.size();
    expect(tile_tokens.size() == count && tiles.size() == count * static_cast<std::size_t>(tile_bytes),
           "tiles: ", tiles.size(), " bytes for ", count, " tiles of ", tile_bytes);
    // Tiles follow each other; where some were dropped there is a gap.
    const auto may_begin = [&](Index first, Index at) {
        return first == at || (kept <= at && at < first && first <= dropped);
    };
    Index next = sink_count;
    for (std::size_t i = 0; i < count; ++i) {
        const auto first = static_cast<Index>(tile_first[i]);
        expect(may_begin(first, next) && tile_tokens[i] >= 1 && tile_tokens[i] <= kvplane::tile_tokens,
               "tile ", i, ": ", tile_tokens[i], " tokens from ", first, ", expected 1 to 128 from ", next,
               dropped > next ? " or one that was dropped" : "");
        next = first + static_cast<Index>(tile_tokens[i]);
    }
    expect(may_begin(window_first, next), "the tiles end at token ", next, ", expected ", window_first);
    const Index left = tokens - window_first;
    expect(!recipe.every_token || left == 0, left,
           " tokens outside tiles of a recipe that quantizes every one");
    const Index pages = (left + recent_page_tokens - 1) / recent_page_tokens;
    const Index page_bytes = shape.recent_rows().bytes();
    expect(left < most / 2 && static_cast<Index>(recent.size()) == pages * page_bytes,
           "recent: ", recent.size(), " bytes, expected ", pages, " pages of ", page_bytes);
}

KVPLANE_FUNCTION KvCache CacheContent::restore(const CacheConfiguration& configuration_wanted, TilePool& pool,
                                               const std::string& source) const {
    const CacheShape shape(configuration_wanted);
    CacheState state = shape.empty_state();
    if (basis) {
        state.latent = basis;
        state.layout = std::make_shared<const PageLayout>(page_layout(configuration_wanted, basis.get()));
    }
    require_consistent(shape, state, source);
    const auto page_of = [&](const std::vector<std::byte>& from, Index bytes, std::size_t index) {
        PageReference page = pool.page(bytes);
        std::memcpy(page.data(), from.data() + index * static_cast<std::size_t>(bytes),
                    static_cast<std::size_t>(bytes));
        return page;
    };
    if (!queries.empty()) state.queries = std::make_shared<const CacheState::QueryMoments>(queries);
    state.tokens = tokens;
    state.dropped = dropped;
    state.recent_first = window_first;
    if (kept_sinks) state.kept_sinks = *kept_sinks;
    state.settled_extremes = {
        .largest = {extremes[0], extremes[1]}, .excess = {extremes[2], extremes[3]}, .carried = {}};
    if (kept_sinks) state.settled_extremes.carried = {extremes[4], extremes[5]};
    if (!sinks.empty()) state.sinks = page_of(sinks, static_cast<Index>(sinks.size()), 0);
    for (std::size_t i = 0; i < tile_first.size(); ++i)
        state.add_tile(page_of(tiles, state.layout->bytes, i),
                       {.page = nullptr,
                        .layout = state.layout.get(),
                        .first = static_cast<Index>(tile_first[i]),
                        .tokens = static_cast<Index>(tile_tokens[i])});
    state.stale = !state.tiles.empty() && state.tiles.back().tokens < kvplane::tile_tokens;  // of format 3
    const Index page_bytes = shape.recent_rows().bytes();
    for (std::size_t i = 0; i * static_cast<std::size_t>(page_bytes) < recent.size(); ++i)
        state.recent.push_back(page_of(recent, page_bytes, i));
    return KvCache(configuration_wanted, pool, std::move(state));
}

inline SafetensorsWriter cache_writer(const KvCache& cache) {
    const CacheContent content = CacheContent::of(cache);
    const auto tiles = static_cast<Index>(content.tile_first.size());
    const auto size = [](const auto& bytes) { return static_cast<Index>(bytes.size()); };
    SafetensorsWriter writer;
    writer.add("sinks", {size(content.sinks)}, DType::uint8, content.sinks);
    writer.add("tiles", {tiles, tiles > 0 ? size(content.tiles) / tiles : 0}, DType::uint8, content.tiles);
    writer.add("recent", {size(content.recent)}, DType::uint8, content.recent);
    writer.add("tile_first", {tiles}, DType::int64, std::as_bytes(std::span(content.tile_first)));
    writer.add("tile_tokens", {tiles}, DType::int64, std::as_bytes(std::span(content.tile_tokens)));
    writer.add("extremes", {size(content.extremes)}, DType::float64,
               std::as_bytes(std::span(content.extremes)));
    if (content.basis) add_latent_keys(writer, "latent.", *content.basis);
    if (!content.queries.empty()) add_queries(writer, "queries.", content.queries);
    writer.metadata("kvplane.format", cache_format_version);
    writer.metadata("kvplane.configuration", content.configuration);
    writer.metadata("kvplane.tokens", std::to_string(content.tokens));
    writer.metadata("kvplane.kept_sinks", std::to_string(*content.kept_sinks));
    writer.metadata("kvplane.dropped", std::to_string(content.dropped));
    writer.metadata("kvplane.window_first", std::to_string(content.window_first));
    writer.metadata("kvplane.checksum", content.checksum());
    return writer;
}

class CacheFile {
  public:
    CacheFile(const SafetensorsFile& file, std::string source) : file_(file), source_(std::move(source)) {}

    KvCache load(const CacheConfiguration& configuration, TilePool& pool) const {
        require_configuration(configuration);
        const std::string& version = text("kvplane.format");
        require(version == cache_format_version || version == "3", ErrorCode::mismatch, source_,
                ": a cache of format ", version, ", expected 3 or ", cache_format_version);
        CacheContent content;
        content.configuration = text("kvplane.configuration");
        const std::string wanted = configuration_json(configuration);
        require(content.configuration == wanted, ErrorCode::mismatch, source_,
                ": a cache of another configuration: ", content.configuration, ", expected ", wanted);
        content.tokens = number("kvplane.tokens");
        if (version != "3") content.kept_sinks = number("kvplane.kept_sinks");
        content.dropped = number("kvplane.dropped");
        content.window_first = number("kvplane.window_first");
        read("sinks", DType::uint8, content.sinks);
        read("tiles", DType::uint8, content.tiles);
        read("recent", DType::uint8, content.recent);
        read("tile_first", DType::int64, content.tile_first);
        read("tile_tokens", DType::int64, content.tile_tokens);
        read("extremes", DType::float64, content.extremes);
        const std::size_t expected = content.kept_sinks ? 6 : 4;
        require(content.extremes.size() == expected, ErrorCode::format, source_,
                ": extremes: ", content.extremes.size(), " numbers, expected ", expected);
        read_latents(configuration, content);
        require(text("kvplane.checksum") == content.checksum(), ErrorCode::format, source_,
                ": the checksum does not match: the content was altered");
        return content.restore(configuration, pool, source_);
    }

  private:
    void read_latents(const CacheConfiguration& c, CacheContent& content) const {
        if (!c.fits_basis()) return;
        const LatentFile file(file_, source_);
        LatentRecipe recipe = *c.recipe.latents;
        recipe.basis.heads_together = recipe.own_heads_together;
        if (file.contains("latent.parts.0.mean"))
            content.basis = read_latent_keys(file, "latent.", recipe.basis, c.kv_heads, c.query_heads,
                                             c.key_head_dim, c.rope);
        else if (file.contains("queries.count"))
            content.queries = read_queries(file, "queries.", c.kv_heads, c.key_head_dim);
    }
    const std::string& text(const char* key) const {
        const auto found = file_.metadata().find(key);
        require(found != file_.metadata().end(), ErrorCode::format, source_, ": no metadata '", key,
                "': not a kvplane cache");
        return found->second;
    }
    Index number(const char* key) const {
        const std::string& digits = text(key);
        require(!digits.empty() && digits.size() <= 15 &&
                    digits.find_first_not_of("0123456789") == std::string::npos,
                ErrorCode::format, source_, ": ", key, " is '", digits, "', expected a number of tokens");
        return std::stol(digits);
    }
    template <class Element>
    void read(const char* tensor, DType dtype, std::vector<Element>& to) const {
        require(file_.contains(tensor), ErrorCode::format, source_, ": no tensor '", tensor, "'");
        require(file_.info(tensor).dtype == dtype, ErrorCode::format, source_, ": tensor '", tensor,
                "' has another dtype, expected ", name(dtype));
        const auto bytes = file_.bytes(tensor);
        to.resize(bytes.size() / sizeof(Element));
        if (!bytes.empty()) std::memcpy(to.data(), bytes.data(), bytes.size());
    }

    const SafetensorsFile& file_;
    std::string source_;
};

}  // namespace detail

KVPLANE_FUNCTION std::vector<std::byte> to_bytes(const KvCache& cache) {
    return detail::cache_writer(cache).to_bytes();
}

KVPLANE_FUNCTION void save_cache(const KvCache& cache, const std::filesystem::path& path) {
    detail::cache_writer(cache).write(path);
}

KVPLANE_FUNCTION KvCache load_cache(const std::filesystem::path& path,
                                    const CacheConfiguration& configuration, TilePool& pool) {
    return detail::CacheFile(SafetensorsFile::open(path), path.string()).load(configuration, pool);
}

KVPLANE_FUNCTION KvCache load_cache(std::span<const std::byte> bytes, const CacheConfiguration& configuration,
                                    TilePool& pool) {
    return detail::CacheFile(SafetensorsFile::from_bytes(bytes), "memory").load(configuration, pool);
}

}  // namespace kvplane
