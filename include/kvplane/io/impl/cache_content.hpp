// kvplane/io/impl/cache_content.hpp: what a cache holds as tensors, and back with every number checked.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <string_view>
#include <type_traits>
#include <utility>

#include "kvplane/cache/edit.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/error.hpp"
#include "kvplane/io/cache_content.hpp"
#include "kvplane/io/checksum.hpp"
#include "kvplane/io/impl/latent_content.hpp"
#include "kvplane/io/json_text.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/io/safetensors_text.hpp"
#include "kvplane/storage/narrow.hpp"
#include "kvplane/storage/tile_coder.hpp"

namespace kvplane::detail {

// The checksum ---------------------------------------------------------------------------------------------

/// A number that stands for a basis in a configuration.
inline std::string basis_checksum(const LatentKeys& keys) {
    WordHash sum;
    for (Index i = 0; i < keys.subspaces(); ++i) {
        const LatentKeys::Subspace& subspace = keys.subspace(i);
        for (const ChannelSegment& segment : subspace.segments) {
            sum.add(static_cast<std::uint64_t>(segment.channels));
            sum.add(static_cast<std::uint64_t>(segment.bits));
        }
        const auto add = [&](const auto& numbers) {
            add_serial(sum,
                       std::as_bytes(std::span(numbers.data(), static_cast<std::size_t>(numbers.size()))));
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

KVPLANE_FUNCTION std::string CacheContent::checksum() const {
    WordHash sum;
    const auto add_number = [&](const char*, Index number) { sum.add(static_cast<std::uint64_t>(number)); };
    const auto add_bytes = [&](std::span<const std::byte> bytes) {
        if (format < 5) return add_serial(sum, bytes);
        sum.add(bytes.size());
        LaneHash lanes;
        lanes.add(bytes);
        lanes.finish(sum);
    };
    const auto add_array = [&](const char*, const auto& array) {
        if constexpr (!std::is_same_v<std::decay_t<decltype(array)>, PageArray>) {
            add_bytes(std::as_bytes(std::span(array)));
        } else if (format < 5) {  // of a file: one piece
            std::span<const std::byte> all;
            array.each([&](std::span<const std::byte> piece) { all = piece; });
            add_serial(sum, all);
        } else {
            sum.add(array.size());
            LaneHash lanes;
            array.each([&](std::span<const std::byte> piece) { lanes.add(piece); });
            lanes.finish(sum);
        }
    };
    if (layers > 0)
        for (const Index number : {layers, layer}) add_number(layers_key, number);
    if (range_first) add_number(range_key, *range_first);
    add_array("configuration", std::span(configuration));
    each_number(*this, add_number);
    each_tensor(*this, add_array);
    if (!basis_sum.empty()) add_array("basis", std::span(basis_sum));
    for (const SecondMoments& head : queries) {
        const MatrixD& scatter = head.scatter();
        const double count = head.count();
        add_array("count", std::span(&count, 1));
        add_array("mean", std::span(head.mean().data(), static_cast<std::size_t>(head.mean().size())));
        add_array("scatter", std::span(scatter.data(), static_cast<std::size_t>(scatter.size())));
    }
    if (shaping) add_array("shaping", std::span(shaping->triangles()));
    if (!attention.empty()) add_array("attention", std::span(attention));
    return sum.text();
}

// The configuration ----------------------------------------------------------------------------------------

inline std::string latents_json(const CacheConfiguration& c) {
    if (!c.recipe.latents) return "null";
    const LatentRecipe& latents = *c.recipe.latents;
    return JsonObject()
        .add_text("basis", basis_json(latents.basis))
        .add_text("rope", rope_json(c.rope))
        .add("groups", latents.groups)
        .add("bits", latents.bits)
        .add("own_heads_together", latents.own_heads_together)
        .add("fit_tokens", latents.fit_tokens)
        .add_text("given", c.latent_keys ? json_text(basis_checksum(*c.latent_keys)) : "null")
        .text();
}

inline std::string side_json(const SideRecipe& side) {
    JsonObject json;
    json.add("bits", side.bits)
        .add("granularity", name(side.rule.granularity))
        .add("group", side.rule.group)
        .add("scheme", name(side.rule.scheme))
        .add("clip", side.rule.clip == Clip::mse_optimal)
        .add("rotate", side.rotate);
    if (!side.widths.empty()) {
        std::vector<int> widths;
        for (const TokenRun& run : side.widths)
            widths.insert(widths.end(), {static_cast<int>(run.tokens), run.bits});
        json.add("widths", widths);
    }
    return json.text();
}

/// Everything that what is stored depends on. The recipe's name is not part of it. moved: whether keys in
/// channels have moved, which are turned by RoPE when they are read.
inline std::string configuration_json(const CacheConfiguration& c, bool moved) {
    JsonObject json;
    json.add("kv_heads", c.kv_heads)
        .add("query_heads", c.query_heads)
        .add("key_head_dim", c.key_head_dim)
        .add("value_head_dim", c.value_head_dim)
        .add("rotation_seed", c.rotation_seed)
        .add_text("keys", side_json(c.recipe.keys))
        .add_text("values", side_json(c.recipe.values))
        .add("sink_tokens", c.recipe.sink_tokens)
        .add("recent_tokens", c.recipe.recent_tokens)
        .add("recent_bits", c.recipe.recent_bits)
        .add("every_token", c.recipe.every_token)
        .add_text("latents", latents_json(c));
    // What older files do not have is left out where it does not count.
    if (c.values_in_keys) json.add("rotary_bits", c.recipe.rotary_bits);
    if (const int bits = c.recipe.recent_bits_of(TileSide::keys); bits != c.recipe.recent_bits)
        json.add("recent_key_bits", bits);
    if (c.recipe.shaped_keys) json.add("shaped_keys", true).add("context", c.context);
    if (c.recipe.rotates_by_tile) json.add("rotates_by_tile", true);
    if (moved && !c.recipe.latents) json.add_text("rope", rope_json(c.rope));
    return json.text();
}

// From a cache ---------------------------------------------------------------------------------------------

KVPLANE_FUNCTION void PageArray::each(const ByteSink& take) const {
    if (pages_.empty()) return take(file_);
    std::vector<std::byte> copy;
    auto partial = partial_.begin();
    for (std::size_t i = 0; i < pages_.size(); ++i) {
        const std::span<const std::byte> page(pages_[i].data(), static_cast<std::size_t>(pages_[i].bytes()));
        if (partial == partial_.end() || *partial != i) {
            take(page);
            continue;
        }
        copy.assign(page.begin(), page.end());
        clear_(i, copy.data());
        take(copy);
        ++partial;
    }
}

KVPLANE_FUNCTION std::vector<std::span<const std::byte>> PageArray::all(
    std::vector<std::vector<std::byte>>& copies) const {
    std::vector<std::span<const std::byte>> all;
    for (const PageReference& page : pages_)
        all.emplace_back(page.data(), static_cast<std::size_t>(page.bytes()));
    for (const std::size_t i : partial_) {
        std::vector<std::byte> copy(all[i].begin(), all[i].end());
        clear_(i, copy.data());
        all[i] = copies.emplace_back(std::move(copy));
    }
    return all;
}

KVPLANE_FUNCTION PageReference PageArray::page(TilePool& pool, Index at, Index bytes) const {
    return pool.page_of(file_.data() + at, bytes);
}

KVPLANE_FUNCTION std::string own_basis_checksum(const KvCache& cache) {
    const CacheState& state = cache.state();
    return cache.configuration().fits_basis() && state.layout ? basis_checksum(*state.latent) : "";
}

KVPLANE_FUNCTION CacheContent CacheContent::of(const KvCache& cache) {
    const CacheState& state = cache.state();
    const CacheShape& shape = cache.shape();
    require(state.provisional.empty(), ErrorCode::option, "save: ", state.provisional.size(),
            " provisional tokens, expected none: accept them, or truncate to ", state.settled());
    CacheContent content;
    content.tokens = state.tokens;
    content.kept_sinks = state.kept_sinks;
    content.dropped = state.dropped;
    content.window_first = state.recent_first;
    const StoredExtremes& extremes = state.settled_extremes;
    content.extremes = {extremes.largest.keys,  extremes.largest.values, extremes.excess.keys,
                        extremes.excess.values, extremes.carried.keys,   extremes.carried.values};

    const Index sinks = state.sink_count(shape.recipe());
    if (state.sinks)
        content.sinks = PageArray({&state.sinks, 1}, {0}, [&shape, sinks](std::size_t, std::byte* page) {
            shape.sink_rows().clear(page, sinks);
        });

    std::vector<std::size_t> partial;
    for (std::size_t t = 0; t < state.tiles.size(); ++t) {
        const TilePlace& tile = state.tiles[t];
        if (tile.tokens < kvplane::tile_tokens) partial.push_back(t);
        content.tile_first.push_back(tile.first);
        content.tile_tokens.push_back(tile.tokens);
        content.tile_row.push_back(tile.row);
        content.tile_shift.push_back(tile.shift);
        PerSide<int> bits{0, 0};
        for (const NarrowedLayout& narrowed : state.narrowed)
            if (narrowed.layout.get() == tile.layout) bits = narrowed.most_bits;
        content.tile_bits.push_back(bits.keys);
        content.tile_bits.push_back(bits.values);
    }
    content.tiles = PageArray(state.tile_pages, std::move(partial), [&state](std::size_t t, std::byte* page) {
        clear_tiles(state.tiles[t], page);
    });

    const Index rest = (state.tokens - state.recent_first) % recent_page_tokens;
    if (rest > 0) partial = {state.recent.size() - 1};
    content.recent =
        PageArray(state.recent, std::move(partial),
                  [&shape, rest](std::size_t, std::byte* page) { shape.recent_rows().clear(page, rest); });

    content.configuration = configuration_json(cache.configuration(), content.moved());
    content.basis_sum = own_basis_checksum(cache);
    if (!content.basis_sum.empty()) content.basis = state.latent;
    if (state.queries) content.queries = *state.queries;
    content.shaping = state.shaping;
    content.attention = state.attention;
    return content;
}

KVPLANE_FUNCTION bool CacheContent::uniform() const noexcept {
    return std::all_of(tile_bits.begin(), tile_bits.end(), [](auto bits) { return bits == 0; });
}

/// The shape and dtype of a tensor of each kind.
inline DType dtype_of_array(const PageArray&) {
    return DType::uint8;
}
template <class Number>
DType dtype_of_array(const std::vector<Number>&) {
    return dtype_of<Number>;
}

/// The forms of pages with tiles, by their layouts.
class TileForms {
  public:
    explicit TileForms(std::span<const TilePlace> tiles) {
        for (const TilePlace& tile : tiles)
            if (!forms_.contains(tile.layout)) forms_.emplace(tile.layout, PageForm::of(*tile.layout));
        for (const TilePlace& tile : tiles) each_.push_back(&forms_.at(tile.layout));
    }
    std::span<const PageForm* const> each() const noexcept { return each_; }

  private:
    std::map<const PageLayout*, PageForm> forms_;
    std::vector<const PageForm*> each_;
};

KVPLANE_FUNCTION void CacheContent::pack(const KvCache& cache) {
    const auto packed = [](const PageArray& array, std::span<const PageForm* const> forms) {
        std::vector<std::vector<std::byte>> copies;
        return pack_pages(array.all(copies), forms);
    };
    packed_tiles = packed(tiles, TileForms(cache.state().tiles).each());
    const PageForm form = PageForm::of_rows(cache.shape().recent_rows().bytes());
    packed_recent = packed(recent, std::vector<const PageForm*>(cache.state().recent.size(), &form));
    format = packed_cache_format;
}

inline void add_packed(SafetensorsWriter& writer, const std::string& name, const PackedChunks& chunks) {
    std::vector<std::int64_t> sizes;
    Index bytes = 0;
    for (const std::vector<std::byte>& chunk : chunks) {
        sizes.push_back(static_cast<std::int64_t>(chunk.size()));
        bytes += sizes.back();
    }
    writer.add_streamed(name + ".chunks", {bytes}, DType::uint8, [&chunks](const ByteSink& take) {
        for (const std::vector<std::byte>& chunk : chunks) take(chunk);
    });
    writer.add(name + ".chunk_bytes", {static_cast<Index>(sizes.size())}, DType::int64,
               std::as_bytes(std::span(sizes)));
}

KVPLANE_FUNCTION void CacheContent::add_to(SafetensorsWriter& writer, const std::string& prefix) const {
    const auto tile_count = static_cast<Index>(tile_first.size());
    each_tensor(*this, [&](const char* name, const auto& array) {
        const auto size = static_cast<Index>(array.size());
        std::vector<Index> shape{size};
        if constexpr (std::is_same_v<std::decay_t<decltype(array)>, PageArray>) {
            if (packed() && &array != &sinks)
                return add_packed(writer, prefix + name, &array == &tiles ? packed_tiles : packed_recent);
            if (&array == &tiles && uniform()) shape = {tile_count, tile_count > 0 ? size / tile_count : 0};
            writer.add_streamed(prefix + name, std::move(shape), DType::uint8,
                                [&array](const ByteSink& take) { array.each(take); });
        } else {
            writer.add(prefix + name, std::move(shape), dtype_of_array(array),
                       std::as_bytes(std::span(array)));
        }
    });
    if (basis) add_latent_keys(writer, prefix + "latent.", *basis);
    if (!queries.empty()) add_queries(writer, prefix + "queries.", queries);
    if (shaping) {
        const std::vector<Eigen::half>& numbers = shaping->triangles();
        writer.add(prefix + "shaping", {static_cast<Index>(numbers.size())}, DType::float16,
                   std::as_bytes(std::span(numbers)));
    }
    if (!attention.empty())
        writer.add(prefix + "attention", {static_cast<Index>(attention.size())}, dtype_of_array(attention),
                   std::as_bytes(std::span(attention)));
    writer.metadata(prefix + "kvplane.configuration", configuration);
    each_number(
        *this, [&](const char* key, Index number) { writer.metadata(prefix + key, std::to_string(number)); });
    if (range_first) {
        writer.metadata(prefix + range_key, std::to_string(*range_first));
        writer.metadata(prefix + "kvplane.basis", basis_sum);
    }
    writer.metadata(prefix + "kvplane.checksum", checksum());
    if (layers == 0) add_format(writer, format);
}

KVPLANE_FUNCTION void add_format(SafetensorsWriter& writer, Index format) {
    writer.metadata("kvplane.format", std::to_string(format));
    if (format == packed_cache_format) writer.metadata(compression_key, zstd_compression);
}

// From a file ----------------------------------------------------------------------------------------------

/// What a file says under a prefix, with sentences that name it.
class ContentReader {
  public:
    ContentReader(const SafetensorsFile& file, const std::string& source, const std::string& prefix)
        : file_(file), source_(source), prefix_(prefix) {}

    const std::string& text(const std::string& key) const {
        const auto found = file_.metadata().find(key);
        require(found != file_.metadata().end(), ErrorCode::format, source_, ": no metadata '", key,
                "': not a kvplane cache");
        return found->second;
    }
    void read(const char* name, PageArray& to) const { to = PageArray(bytes(name, DType::uint8)); }
    template <class Number>
    void read(const char* name, std::vector<Number>& to) const {
        const std::span<const std::byte> from = bytes(name, dtype_of<Number>);
        to.resize(from.size() / sizeof(Number));
        if (!from.empty()) std::memcpy(to.data(), from.data(), from.size());
    }
    PackedPages packed(const char* name) const {
        const std::string tensor = concatenated(name, ".chunks"), sizes = concatenated(name, ".chunk_bytes");
        PackedPages packed{.name = concatenated(source_, ": ", prefix_, tensor),
                           .chunks = bytes(tensor.c_str(), DType::uint8),
                           .chunk_bytes = {}};
        read(sizes.c_str(), packed.chunk_bytes);
        return packed;
    }
    /// What queries have seen of the tokens that become the next tile.
    void read_attention(const CacheConfiguration& c, CacheContent& content) const {
        // Before the first token there is none.
        if (!c.widths_by_token() || !file_.contains(prefix_ + "attention")) return;
        read("attention", content.attention);
        const Index size = c.kv_heads * kvplane::tile_tokens;
        require(static_cast<Index>(content.attention.size()) == size, ErrorCode::format, source_,
                ": attention of ", content.attention.size(), " numbers, expected ", size);
        require(std::all_of(content.attention.begin(), content.attention.end(),
                            [](auto sum) { return sum >= 0; }),
                ErrorCode::format, source_, ": attention of less than 0");
    }
    /// Moments and bases refuse numbers that cannot be theirs; where a file brings them, it is malformed.
    void read_latents(const CacheConfiguration& c, CacheContent& content) const {
#if defined(__cpp_exceptions)
        try {
            read_learned(c, content);
        } catch (const Error& error) {
            const ErrorCode code = error.code();
            if (code != ErrorCode::shape && code != ErrorCode::option && code != ErrorCode::not_finite) throw;
            fail(ErrorCode::format, source_, ": ", sentence_of(error));
        }
#else
        read_learned(c, content);
#endif
    }

  private:
    void read_learned(const CacheConfiguration& c, CacheContent& content) const {
        read_shaping(c, content);
        read_own_latents(c, content);
    }
    /// What shapes keys, and what it has yet to learn from.
    void read_shaping(const CacheConfiguration& c, CacheContent& content) const {
        if (!c.recipe.shaped_keys) return;
        if (file_.contains(prefix_ + "queries.count"))
            content.queries =
                read_queries(LatentFile(file_, source_), prefix_ + "queries.", c.kv_heads, c.key_head_dim);
        if (!file_.contains(prefix_ + "shaping")) return;
        std::vector<Eigen::half> numbers;
        read("shaping", numbers);
        const Index size = c.kv_heads * KeyShaping::triangle_size(c.key_head_dim);
        require(static_cast<Index>(numbers.size()) == size, ErrorCode::format, source_, ": shaping of ",
                numbers.size(), " numbers, expected ", size);
        for (const Eigen::half number : numbers)
            require((Eigen::numext::isfinite)(number), ErrorCode::format, source_, ": shaping is not finite");
        content.shaping = std::make_shared<const KeyShaping>(c.kv_heads, c.key_head_dim, std::move(numbers));
    }
    void read_own_latents(const CacheConfiguration& c, CacheContent& content) const {
        if (!c.fits_basis()) return;
        const LatentFile file(file_, source_);
        LatentRecipe recipe = *c.recipe.latents;
        recipe.basis.heads_together = recipe.own_heads_together;
        if (file.contains(prefix_ + "latent.parts.0.mean")) {
            content.basis = read_latent_keys(file, prefix_ + "latent.", recipe.basis, c.kv_heads,
                                             c.query_heads, c.key_head_dim, c.rope);
            content.basis_sum = basis_checksum(*content.basis);
        } else if (file.contains(prefix_ + "queries.count")) {
            content.queries = read_queries(file, prefix_ + "queries.", c.kv_heads, c.key_head_dim);
        }
    }
    std::span<const std::byte> bytes(const char* name, DType dtype) const {
        const std::string tensor = prefix_ + name;
        require(file_.contains(tensor), ErrorCode::format, source_, ": no tensor '", tensor, "'");
        require(file_.info(tensor).dtype == dtype, ErrorCode::format, source_, ": tensor '", tensor,
                "' has another dtype, expected ", kvplane::name(dtype));
        return file_.bytes(tensor);
    }

    const SafetensorsFile& file_;
    const std::string& source_;
    const std::string& prefix_;
};

KVPLANE_FUNCTION Index metadata_number(const SafetensorsFile& file, const std::string& source,
                                       const std::string& key) {
    const std::string& digits = ContentReader(file, source, "").text(key);
    require(
        !digits.empty() && digits.size() <= 15 && digits.find_first_not_of("0123456789") == std::string::npos,
        ErrorCode::format, source, ": ", key, " is '", digits, "', expected a number of tokens");
    return std::stol(digits);
}

KVPLANE_FUNCTION CacheContent CacheContent::read(const SafetensorsFile& file, const std::string& source,
                                                 const CacheConfiguration& wanted, TilePool& pool,
                                                 const std::string& prefix, Index layers, Index layer) {
    require_configuration(wanted);
    const ContentReader reader(file, source, prefix);
    CacheContent content;
    content.layers = layers;
    content.layer = layer;
    const std::string& version = reader.text("kvplane.format");
    const Index oldest = layers > 0 ? cache_format : oldest_cache_format;
    for (content.format = oldest; content.format <= packed_cache_format; ++content.format)
        if (version == std::to_string(content.format)) break;
    require(content.format <= packed_cache_format, ErrorCode::mismatch, source, ": a cache of format ",
            version, ", expected ", oldest, " to ", packed_cache_format);
    each_tensor(content, [&](const char* name, auto& array) {
        if constexpr (std::is_same_v<std::decay_t<decltype(array)>, PageArray>)
            if (content.packed() && &array != &content.sinks) return;
        reader.read(name, array);
    });
    content.configuration = reader.text(prefix + "kvplane.configuration");
    const std::string expected = configuration_json(wanted, content.moved());
    require(content.configuration == expected, ErrorCode::mismatch, source, ": ", prefix,
            prefix.empty() ? "" : " ", "a cache of another configuration: ", content.configuration,
            ", expected ", expected);
    each_number(content, [&](const char* key, Index& number) {
        number = metadata_number(file, source, prefix + key);
    });
    const std::size_t extreme_count = content.format >= 4 ? 6 : 4;
    require(content.extremes.size() == extreme_count, ErrorCode::format, source,
            ": extremes: ", content.extremes.size(), " numbers, expected ", extreme_count);
    if (file.metadata().contains(prefix + range_key)) {
        content.range_first = metadata_number(file, source, prefix + range_key);
        content.basis_sum = reader.text(prefix + "kvplane.basis");
    } else {
        reader.read_latents(wanted, content);
    }
    reader.read_attention(wanted, content);
    if (content.packed()) {
        require(!content.range_first, ErrorCode::format, source, ": a range of tokens that is compressed");
        const std::string& compression = reader.text(compression_key);
        require(compression == zstd_compression, ErrorCode::mismatch, source, ": compressed with '",
                printable(compression), "', expected ", zstd_compression);
        content.unpack(reader.packed("tiles"), reader.packed("recent"), wanted, pool, source);
    }
    require(reader.text(prefix + "kvplane.checksum") == content.checksum(), ErrorCode::format, source, ": ",
            prefix, prefix.empty() ? "" : " ", "the checksum does not match: the content was altered");
    return content;
}

/// Nothing is checked here but what its sizes go by.
KVPLANE_FUNCTION void CacheContent::unpack(const PackedPages& from_tiles, const PackedPages& from_recent,
                                           const CacheConfiguration& wanted, TilePool& pool,
                                           const std::string& source) {
    const CacheShape shape(wanted);
    CacheState state = empty_state(shape);
    const std::vector<TilePlace> places = this->places(state, source);
    Index tile_bytes = 0;
    for (const TilePlace& place : places) tile_bytes += place.layout->bytes;
    from_tiles.require_room(tile_bytes);

    const PageForm form = PageForm::of_rows(shape.recent_rows().bytes());
    const Index left = tokens - window_first;
    constexpr Index most = Index{1} << 40;
    require(left >= 0 && left < most, ErrorCode::format, source, ": tokens ", tokens, " and window_first ",
            window_first, " contradict each other");
    const Index recent_count = (left + recent_page_tokens - 1) / recent_page_tokens;
    from_recent.require_room(recent_count * form.bytes);

    unpacked_tiles = unpack_pages(from_tiles, TileForms(places).each(), pool);
    tiles = PageArray(unpacked_tiles, {}, {});
    unpacked_recent = unpack_pages(
        from_recent, std::vector<const PageForm*>(static_cast<std::size_t>(recent_count), &form), pool);
    recent = PageArray(unpacked_recent, {}, {});
}

KVPLANE_FUNCTION StoredExtremes CacheContent::stored_extremes() const noexcept {
    StoredExtremes all{
        .largest = {extremes[0], extremes[1]}, .excess = {extremes[2], extremes[3]}, .carried = {}};
    if (format >= 4) all.carried = {extremes[4], extremes[5]};
    return all;
}

/// The layout of a tile that was narrowed to these widths. Throws Error (format) where the recipe's cannot
/// be.
inline const PageLayout* read_narrowed(CacheState& state, const PerSide<int>& bits, std::size_t tile,
                                       const std::string& source) {
    const auto expect = [&](bool holds) {
        require(holds, ErrorCode::format, source, ": tile ", tile, ": ", bits.keys, " bits of keys and ",
                bits.values, " of values, which no tile of the recipe is narrowed to");
    };
    expect(can_narrow(*state.layout, bits.keys, bits.values));
    const PageLayout* const layout = narrowed_layout(state.narrowed, *state.layout, bits);
    expect(std::any_of(state.narrowed.begin(), state.narrowed.end(), [&](const NarrowedLayout& one) {
        return one.layout.get() == layout && one.most_bits == bits;
    }));
    return layout;
}

/// The state of a cache with the content's basis.
KVPLANE_FUNCTION CacheState CacheContent::empty_state(const CacheShape& shape) const {
    CacheState state = shape.empty_state();
    if (basis) {
        state.latent = basis;
        state.layout = std::make_shared<const PageLayout>(page_layout(shape.configuration, basis.get()));
    }
    return state;
}

KVPLANE_FUNCTION void CacheContent::require_cache(const CacheConfiguration& configuration_wanted,
                                                  const std::string& source) const {
    const CacheShape shape(configuration_wanted);
    CacheState state = empty_state(shape);
    const std::vector<TilePlace> places = this->places(state, source);
    require_consistent(shape, state, places, source);
}

KVPLANE_FUNCTION bool CacheContent::moved() const noexcept {
    return std::any_of(tile_shift.begin(), tile_shift.end(), [](auto shift) { return shift != 0; });
}

KVPLANE_FUNCTION std::vector<TilePlace> CacheContent::places(CacheState& state,
                                                             const std::string& source) const {
    const auto expect = [&](bool holds, const auto&... what) {
        require(holds, ErrorCode::format, source, ": ", what...);
    };
    const std::size_t count = tile_first.size(), rows = format >= 5 ? count : 0;
    expect(state.layout || count == 0, "tiles, but no basis to read them with");
    expect(tile_tokens.size() == count && tile_row.size() == rows && tile_shift.size() == rows &&
               tile_bits.size() == 2 * rows,
           "tiles: ", count, " positions, ", tile_tokens.size(), " numbers of tokens, ", tile_row.size(),
           " rows, ", tile_shift.size(), " shifts and ", tile_bits.size(), " widths contradict each other");
    std::vector<TilePlace> places;
    for (std::size_t i = 0; i < count; ++i) {
        TilePlace place{.page = nullptr,
                        .layout = state.layout.get(),
                        .first = static_cast<Index>(tile_first[i]),
                        .tokens = static_cast<Index>(tile_tokens[i])};
        if (format >= 5) {
            place.row = static_cast<Index>(tile_row[i]);
            place.shift = static_cast<Index>(tile_shift[i]);
            const std::int64_t keys = tile_bits[2 * i], values = tile_bits[2 * i + 1];
            expect(keys >= 0 && keys <= 16 && values >= 0 && values <= 16 && (keys > 0 || values == 0),
                   "tile ", i, ": ", keys, " bits of keys and ", values, " of values");
            if (keys > 0) {
                const PerSide<int> bits{static_cast<int>(keys), static_cast<int>(values)};
                place.layout = read_narrowed(state, bits, i, source);
            }
        }
        constexpr Index most = Index{1} << 40;
        expect(place.first >= 0 && place.first < most && place.tokens >= 1 && place.row >= 0 &&
                   place.end_row() <= kvplane::tile_tokens && place.shift >= 0 && place.shift < most,
               "tile ", i, ": ", place.tokens, " tokens from row ", place.row, " and token ", place.first,
               ", moved by ", place.shift, ", expected 1 to 128 tokens of a tile");
        places.push_back(place);
    }
    return places;
}

KVPLANE_FUNCTION std::vector<PageReference> CacheContent::pages(const std::vector<TilePlace>& places,
                                                                TilePool& pool,
                                                                const std::string& source) const {
    std::vector<PageReference> pages = unpacked_tiles;
    Index at = 0;
    for (std::size_t t = 0; t < places.size() && !packed(); ++t) {
        pages.push_back(tiles.page(pool, at, places[t].layout->bytes));
        at += places[t].layout->bytes;
    }
    for (std::size_t t = 0; t < places.size(); ++t) {
        const PageLayout& layout = *places[t].layout;
        for (Index head = 0; layout.rotates_by_tile() && head < layout.subspaces(); ++head)
            require(std::to_integer<int>(pages[t].data()[layout.rotated_at + head]) <= 1, ErrorCode::format,
                    source, ": tile ", t, ": its keys of head ", head, " are neither rotated nor not");
        if (!layout.values.by_token()) continue;
        for (const Index value_at : layout.value_at)
            require(runs_are_whole(layout.values, pages[t].data() + value_at), ErrorCode::format, source,
                    ": tile ", t, ": its tokens do not have the widths of the recipe");
    }
    return pages;
}

KVPLANE_FUNCTION std::vector<PageReference> CacheContent::recent_pages(Index page_bytes,
                                                                       TilePool& pool) const {
    if (packed()) return unpacked_recent;
    std::vector<PageReference> pages;
    for (Index at = 0; at < static_cast<Index>(recent.size()); at += page_bytes)
        pages.push_back(recent.page(pool, at, page_bytes));
    return pages;
}

KVPLANE_FUNCTION void CacheContent::require_consistent(const CacheShape& shape, const CacheState& state,
                                                       const std::vector<TilePlace>& places,
                                                       const std::string& source) const {
    const auto expect = [&](bool holds, const auto&... what) {
        require(holds, ErrorCode::format, source, ": ", what...);
    };
    const CacheRecipe& recipe = shape.recipe();
    const bool needs_queries = recipe.shaped_keys
                                   ? !shaping
                                   : !state.layout && recipe.latents && recipe.latents->basis.query_weighted;
    expect(queries.empty() || needs_queries, "moments of queries in a cache that needs none");
    constexpr Index most = Index{1} << 40;
    expect(tokens >= 0 && tokens < most && dropped >= 0 && dropped <= tokens && window_first >= 0 &&
               window_first <= tokens && kept_sinks >= 0 && kept_sinks < most,
           "tokens ", tokens, ", kept_sinks ", kept_sinks, ", dropped ", dropped, ", window_first ",
           window_first, " contradict each other");
    const Index kept = format == 3 ? recipe.sink_tokens : kept_sinks;
    const Index sink_count = std::min(recipe.sink_tokens, tokens);
    const Index sink_bytes = sink_count > 0 ? shape.sink_rows().bytes() : 0;
    expect(static_cast<Index>(sinks.size()) == sink_bytes, "sinks: ", sinks.size(), " bytes, expected ",
           sink_bytes);
    expect(window_first >= sink_count, "window_first ", window_first, ", expected at least the ", sink_count,
           " sinks");
    Index tile_bytes = 0;
    for (const TilePlace& place : places) tile_bytes += place.layout->bytes;
    expect(static_cast<Index>(tiles.size()) == tile_bytes, "tiles: ", tiles.size(), " bytes for ",
           places.size(), " tiles of ", tile_bytes, " bytes");
    // Tiles follow each other; where some were dropped there is a gap.
    const auto may_begin = [&](Index first, Index at) {
        return first == at || (kept <= at && at < first && first <= dropped);
    };
    Index next = sink_count;
    for (std::size_t i = 0; i < places.size(); ++i) {
        expect(may_begin(places[i].first, next), "tile ", i, ": ", places[i].tokens, " tokens from ",
               places[i].first, ", expected 1 to 128 from ", next,
               dropped > next ? " or one that was dropped" : "");
        next = places[i].first + places[i].tokens;
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
    CacheState state = empty_state(shape);
    const std::vector<TilePlace> places = this->places(state, source);
    require_consistent(shape, state, places, source);
    if (shaping) state.shaping = shaping;
    if (!queries.empty()) {
        state.queries = std::make_shared<const CacheState::QueryMoments>(queries);
        state.shaping = nullptr;
    }
    state.tokens = tokens;
    state.dropped = dropped;
    state.recent_first = window_first;
    if (format >= 4) state.kept_sinks = kept_sinks;
    state.settled_extremes = stored_extremes();
    if (!attention.empty()) state.attention = attention;
    if (sinks.size() > 0) state.sinks = sinks.page(pool, 0, static_cast<Index>(sinks.size()));
    std::vector<PageReference> pages = this->pages(places, pool, source);
    for (std::size_t i = 0; i < places.size(); ++i) state.add_tile(std::move(pages[i]), places[i]);
    state.stale = !state.tiles.empty() && state.tiles.back().tokens < kvplane::tile_tokens;  // of format 3
    state.recent = recent_pages(shape.recent_rows().bytes(), pool);
    return KvCache(configuration_wanted, pool, std::move(state));
}

}  // namespace kvplane::detail
