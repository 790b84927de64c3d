// kvplane/cuda/cache_base.hpp: a cache whose pages are in a device's memory, apart from CUDA itself: what its
// host side knows, and which blocks an append runs. DeviceCache (cuda/device_cache.cuh) runs them on a
// stream; tests run them on the host.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "kvplane/attention/executor.hpp"
#include "kvplane/cache/appender.hpp"
#include "kvplane/cache/incoming_rows.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cache/pages.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/cuda/append_tables.hpp"
#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/device_rows.hpp"
#include "kvplane/cuda/queue.hpp"
#include "kvplane/error.hpp"
#include "kvplane/simd/floating_point.hpp"
#include "kvplane/storage/tile_coder.hpp"

namespace kvplane::cuda {

/// Whether append() makes sure that it can store what it is given.
enum class AppendCheck : std::uint8_t {
    /// It waits for the device, and throws as KvCache::append does.
    wait,
    /// It does not wait. The caller knows that all numbers are finite, and that none is beyond 32000 (65504
    /// where nothing is quantized), rotated ones included. Others harm no more than the tokens that share a
    /// grid, or a head's row, with them: these decode to any numbers, NaN and infinity included.
    /// error_bound() of the cache then means nothing.
    none,
};

/// Why the CPU must append the tokens of a configuration: what its recipe does. nullptr where a device does
/// it.
inline const char* host_appends_because(const CacheConfiguration& c) noexcept {
    const auto clips = [](const SideRecipe& side) { return !side.is_half() && side.rule.clip != Clip::none; };
    if (c.recipe.shaped_keys) return "shapes keys";
    if (c.widths_by_token()) return "gives tokens of values different widths";
    if ((!c.recipe.latents && clips(c.recipe.keys)) || (!c.values_in_keys && clips(c.recipe.values)))
        return "clips to the least squared error";
    return nullptr;
}

namespace detail {

/// Numbers in device memory, with a copy on the host. Copies share the memory until one of them changes.
template <class T>
class DeviceTable {
  public:
    /// What change() to so many entries needs: memory, where there is none that fits or others see it. Throws
    /// Error (out_of_memory).
    PageReference room_for(std::size_t count, TilePool& pool) {
        host_.reserve(count);
        const auto bytes = [](std::size_t entries) { return static_cast<Index>(entries * sizeof(T)); };
        if (count == 0 || (owned() && page_.bytes() >= bytes(count))) return {};
        return pool.unfilled(bytes(std::max<std::size_t>(64, std::bit_ceil(count))));
    }
    /// Makes the entries from `first` on those of `next`. room: of room_for(), for all entries or more.
    void change(Index first, const std::vector<T>& next, PageReference room, Queue& queue) {
        const auto count = first + static_cast<Index>(next.size());
        host_.resize(static_cast<std::size_t>(first));
        host_.insert(host_.end(), next.begin(), next.end());
        if (room) {
            page_ = std::move(room);
            first = 0;
        }
        if (first < count)
            queue.to_device(page_.data() + first * static_cast<Index>(sizeof(T)), host_.data() + first,
                            static_cast<std::size_t>(count - first) * sizeof(T));
    }
    /// Entry i, for a kernel to change; nullptr where others see the memory.
    T* entry(Index i) const noexcept { return owned() ? reinterpret_cast<T*>(page_.data()) + i : nullptr; }
    /// Says what a kernel has made of entry i.
    void changed(Index i, const T& to) { host_[static_cast<std::size_t>(i)] = to; }
    bool owned() const noexcept { return page_.references() == 1; }
    const T* device() const noexcept { return page_ ? reinterpret_cast<const T*>(page_.data()) : nullptr; }
    const std::vector<T>& host() const noexcept { return host_; }
    Index bytes() const noexcept { return page_ ? kvplane::detail::counted_bytes(page_.bytes()) : 0; }

  private:
    PageReference page_;
    std::vector<T> host_;
};

/// Pages in other memory: each is copied once, however many caches share it.
class PageCopies {
  public:
    /// body(to, from, bytes) copies a page.
    template <class Body>
    CacheState copied(const CacheState& state, TilePool& pool, const Body& body) {
        CacheState other = state;
        const auto move = [&](PageReference& page) {
            if (!page) return;
            PageReference& copy = copies_[page.data()];
            if (!copy) {
                copy = pool.unfilled(page.bytes());
                body(copy.data(), page.data(), static_cast<std::size_t>(page.bytes()));
            }
            page = copy;
        };
        move(other.sinks);
        for (PageReference& page : other.recent) move(page);
        for (std::size_t t = 0; t < other.tiles.size(); ++t) {
            move(other.tile_pages[t]);
            other.tiles[t].page = other.tile_pages[t].data();
        }
        return other;
    }

  private:
    std::map<const std::byte*, PageReference> copies_;
};

/// Some tokens of a device's rows on the host.
class FetchedRows {
  public:
    FetchedRows(const DeviceRows& rows, Index head_dim, Index tokens, Queue& queue)
        : rows_(rows), head_dim_(head_dim), tokens_(tokens) {
        const Index elements = tokens == 0
                                   ? 0
                                   : (tokens - 1) * rows.token_stride + (rows.heads - 1) * rows.head_stride +
                                         (head_dim - 1) * rows.channel_stride + 1;
        bytes_.resize(static_cast<std::size_t>(elements) * bytes_of(rows.type));
        if (!bytes_.empty()) queue.to_host(bytes_.data(), rows.data, bytes_.size());
    }
    /// After Queue::wait().
    kvplane::detail::AnyRows view() const {
        switch (rows_.type) {
            case ScalarType::float16:
                return as<Eigen::half>();
            case ScalarType::bfloat16:
                return as<Eigen::bfloat16>();
            default:
                return as<float>();
        }
    }

  private:
    template <class Scalar>
    kvplane::detail::AnyRows as() const {
        return HeadRows<Scalar>(reinterpret_cast<const Scalar*>(bytes_.data()), rows_.heads, tokens_,
                                head_dim_, rows_.head_stride, rows_.token_stride, rows_.channel_stride);
    }
    DeviceRows rows_;
    Index head_dim_, tokens_;
    std::vector<std::byte> bytes_;
};

/// Sets a state's tiles aside but for the last, which is all that an append looks at: to copy a state then
/// takes as long however many tiles there are. Puts them back when it goes, behind them those that the state
/// has then.
class TilesAside {
  public:
    explicit TilesAside(CacheState& state) : state_(state), count_(static_cast<Index>(state.tiles.size())) {
        if (count_ < 2) return;
        std::vector<TilePlace> last_tile{state.tiles.back()};
        std::vector<PageReference> last_page{state.tile_pages.back()};
        tiles_ = std::exchange(state.tiles, std::move(last_tile));
        pages_ = std::exchange(state.tile_pages, std::move(last_page));
        tiles_.pop_back();
        pages_.pop_back();
    }
    TilesAside(const TilesAside&) = delete;
    TilesAside& operator=(const TilesAside&) = delete;
    ~TilesAside() {
        if (count_ < 2) return;
        // There is room for one, and for more where make_room() was called.
        tiles_.insert(tiles_.end(), state_.tiles.begin(), state_.tiles.end());
        std::move(state_.tile_pages.begin(), state_.tile_pages.end(), std::back_inserter(pages_));
        state_.tiles = std::move(tiles_);
        state_.tile_pages = std::move(pages_);
    }
    /// For so many behind those set aside. Throws std::bad_alloc.
    void make_room(std::size_t tiles) {
        const auto grown = [&](std::size_t capacity, std::size_t size) {
            return size + tiles <= capacity ? capacity : std::max(size + tiles, 2 * capacity);
        };
        tiles_.reserve(grown(tiles_.capacity(), tiles_.size()));
        pages_.reserve(grown(pages_.capacity(), pages_.size()));
    }
    /// Tiles before, those set aside and the last.
    Index count() const noexcept { return count_; }

  private:
    CacheState& state_;
    Index count_;
    std::vector<TilePlace> tiles_;
    std::vector<PageReference> pages_;
};

/// One append: the state as it will be, and the blocks that fill its pages. Pages that others see are copied
/// before they are written, and the state changes when nothing can fail any more.
class DeviceAppend {
  public:
    struct Input {
        const DeviceRows& keys;
        const DeviceRows* values;  ///< nullptr where they are in keys
        Findings* findings;        ///< in device memory
    };

    DeviceAppend(const CacheShape& cache, const CacheState& state, TilePool& pool, const AppendTables& tables,
                 Queue& queue, const Input& input)
        : cache_(cache),
          state_(state),
          pool_(pool),
          tables_(tables),
          queue_(queue),
          input_(input),
          next_(state),
          recent_rows_(cache.recent_rows()),
          sides_{side(TileSide::keys), side(TileSide::values)} {}

    /// Starts all of it. entry: of the last old tile in a table, where a kernel may change it.
    void run(DeviceTile* entry) {
        const Index tokens = input_.keys.tokens;
        if (cache_.recipe().every_token) return fill_tiles(tokens, entry);
        if (next_.cut()) open_cut_tile();
        fill_sinks(tokens);
        make_tiles(tokens);
        fill_recent(tokens);
    }

    CacheState& next() noexcept { return next_; }
    /// Whether the last old tile's page holds tokens now that are not the state's.
    bool wrote_old_tile() const noexcept { return wrote_old_tile_; }
    /// Whether a kernel changes the entry of the last old tile, and no tiles are new.
    bool changed_entry() const noexcept { return changed_entry_; }

  private:
    /// Whether `count` channels from any multiple of it may be loaded at once, in loads of up to 16 bytes.
    std::int32_t loads(const DeviceRows& rows, Index dim, int count) const noexcept {
        const auto address = reinterpret_cast<std::uintptr_t>(rows.data);
        return tables_.begins_at(count) && rows.channel_stride == 1 && rows.token_stride % count == 0 &&
               rows.head_stride % count == 0 && dim % count == 0 &&
               address % std::min<std::size_t>(16, static_cast<std::size_t>(count) * bytes_of(rows.type)) ==
                   0;
    }
    RowPlace place(const kvplane::detail::TokenRows& rows, TileSide side, Index capacity) const noexcept {
        return {.rows_at = rows.row(side, 0, 0),
                .steps_at = rows.step_at(side, 0, 0),
                .bits = rows.bits(side),
                .capacity = static_cast<std::int32_t>(capacity)};
    }
    Side side(TileSide side) const {
        Side made{};
        if (side == TileSide::values && !input_.values) return made;
        const DeviceRows& rows = side == TileSide::keys ? input_.keys : *input_.values;
        made.input = {.data = rows.data,
                      .type = static_cast<std::int32_t>(rows.type),
                      .in_fours = loads(rows, cache_.dim(side), 4),
                      .in_eights = loads(rows, cache_.dim(side), 8),
                      .token_stride = rows.token_stride,
                      .head_stride = rows.head_stride,
                      .channel_stride = rows.channel_stride};
        made.signs = tables_.signs(side);
        made.dim = static_cast<std::int32_t>(cache_.dim(side));
        made.largest = cache_.largest_magnitude();
        made.recent = place(recent_rows_, side, kvplane::detail::recent_page_tokens);
        if (cache_.recipe().every_token) made.recent.bits = 32;
        return made;
    }
    Index heads() const noexcept { return cache_.configuration.kv_heads; }

    bool others_see(const PageReference& page) const {
        Index own = 0;
        for (const CacheState* state : {&state_, static_cast<const CacheState*>(&next_)}) {
            own += state->sinks == page;
            own += std::count(state->recent.begin(), state->recent.end(), page);
            if (!state->tile_pages.empty()) own += state->tile_pages.back() == page;
        }
        return page.references() > own;
    }
    PageReference writable(const PageReference& page) {
        if (!others_see(page)) return page;
        PageReference copy = pool_.unfilled(page.bytes());
        queue_.within_device(copy.data(), page.data(), static_cast<std::size_t>(page.bytes()));
        return copy;
    }
    PageReference zeros(Index bytes) {
        PageReference page = pool_.unfilled(bytes);
        queue_.clear(page.data(), static_cast<std::size_t>(bytes));
        return page;
    }

    /// Tokens [done_, done_ + count) of the input to the rows from `row` on of some pages.
    void write_rows(const kvplane::detail::TokenRows& rows, const std::vector<PageReference>& pages,
                    Index row, Index count) {
        RowsArguments a{};
        a.sides[0] = sides_[0];
        a.sides[1] = sides_[1];
        a.side_count = input_.values ? 2 : 1;
        a.heads = static_cast<std::int32_t>(heads());
        for (int s = 0; s < a.side_count; ++s)
            a.places[s] = place(rows, s == 0 ? TileSide::keys : TileSide::values, rows.capacity());
        a.page_rows = static_cast<std::int32_t>(rows.capacity());
        a.findings = input_.findings;
        for (Index begin = 0, some; begin < count; begin += some) {
            const Index page = (row + begin) / a.page_rows,
                        most = (page + RowsArguments::most_pages) * a.page_rows - row - begin;
            some = std::min(most, count - begin);
            a.first = done_ + begin;
            a.count = static_cast<std::int32_t>(some);
            a.row = static_cast<std::int32_t>((row + begin) % a.page_rows);
            for (Index p = page; p < page + RowsArguments::most_pages && p < static_cast<Index>(pages.size());
                 ++p)
                a.pages[p - page] = pages[static_cast<std::size_t>(p)].data();
            const int batches = (a.count + RowsArguments::rows_of_block - 1) / RowsArguments::rows_of_block;
            queue_.run(a, batches, a.heads * a.side_count, tables_.rows_shared());
        }
        done_ += count;
        next_.tokens += count;
    }

    void fill_sinks(Index tokens) {
        const Index sinks = cache_.recipe().sink_tokens,
                    count = std::min(tokens - done_, sinks - next_.tokens);
        if (count <= 0) return;
        const kvplane::detail::TokenRows rows = cache_.sink_rows();
        next_.sinks = next_.sinks ? writable(next_.sinks) : zeros(rows.bytes());
        write_rows(rows, {next_.sinks}, next_.tokens, count);
        next_.recent_first = next_.tokens;
    }

    void make_tiles(Index tokens) {
        const Index old = next_.tokens - next_.recent_first, after = old + tokens - done_,
                    tiles = std::max<Index>(0, (after - cache_.recipe().recent_tokens) / tile_tokens);
        if (tiles == 0) return;
        constexpr Index pages_of_tile = tile_tokens / kvplane::detail::recent_page_tokens;
        for (Index first = 0; first < tiles; first += TileSources::most_tiles) {
            const Index count = std::min<Index>(TileSources::most_tiles, tiles - first);
            TileSources sources{};
            sources.first = done_ - old + first * tile_tokens;
            for (Index t = 0; t < count; ++t)
                for (Index p = 0; p < pages_of_tile; ++p) {
                    const auto page = static_cast<std::size_t>((first + t) * pages_of_tile + p);
                    if (page < next_.recent.size()) sources.recent[t][p] = next_.recent[page].data();
                }
            encode(sources, count, next_.recent_first + first * tile_tokens, 0, tile_tokens, true, {});
        }
        const Index packed = tiles * tile_tokens;
        next_.recent_first += packed;
        const Index taken = std::max<Index>(0, packed - old);
        done_ += taken;
        next_.tokens += taken;
        next_.recent.erase(
            next_.recent.begin(),
            next_.recent.begin() + std::min<std::ptrdiff_t>(std::ssize(next_.recent), tiles * pages_of_tile));
    }

    void fill_recent(Index tokens) {
        const Index count = tokens - done_, at = next_.tokens - next_.recent_first;
        if (count == 0) return;
        constexpr Index page_tokens = kvplane::detail::recent_page_tokens;
        for (Index t = at / page_tokens * page_tokens; t < at + count; t += page_tokens) {
            const auto page = static_cast<std::size_t>(t / page_tokens);
            if (page < next_.recent.size())
                next_.recent[page] = writable(next_.recent[page]);
            else if (t + page_tokens <= at + count)
                next_.recent.push_back(pool_.unfilled(recent_rows_.bytes()));
            else
                next_.recent.push_back(zeros(recent_rows_.bytes()));
        }
        write_rows(recent_rows_, next_.recent, at, count);
    }

    /// New tiles of positions from `position` on, or the last one, of which rows [from, to) are written.
    void encode(const TileSources& sources, Index count, Index position, Index from, Index to, bool fresh,
                const TileChange& change) {
        TilesArguments a{};
        a.sides[0] = sides_[0];
        a.sides[1] = sides_[1];
        a.formats = tables_.formats();
        a.segments = tables_.segments();
        a.tile_count = static_cast<std::int32_t>(count);
        a.from = static_cast<std::int32_t>(from);
        a.to = static_cast<std::int32_t>(to);
        a.fresh = fresh;
        a.findings = input_.findings;
        a.change = change;
        a.sources = sources;
        for (Index t = 0; t < count; ++t) {
            if (fresh) {
                TilePlace place{};
                place.layout = next_.layout.get();
                place.first = position + t * tile_tokens;
                place.tokens = to;
                next_.add_tile(pool_.unfilled(next_.layout->bytes), place);
            }
            const std::size_t index =
                next_.tile_pages.size() - static_cast<std::size_t>(fresh ? 1 : count - t);
            a.pages[t] = next_.tile_pages[index].data();
        }
        // Values need no basis: they are under way while the host computes angles.
        run_tiles(a, false);
        if (!next_.latent) return;
        PageReference centred, latents, angles;
        ProductArguments back = latents_of(sources, count, position, centred, latents, angles, a);
        run_tiles(a, true);
        back.back = 1;
        back.strips = tables_.strips(true);
        run_products(back);
    }
    /// The items in latents, or the others.
    void run_tiles(TilesArguments& a, bool in_latents) {
        for (const AppendTables::Run& run : tables_.runs()) {
            if (run.in_latents != in_latents) continue;
            a.items = tables_.items() + run.first;
            a.item_count = run.count;
            a.kind = run.kind;
            queue_.run(a, run.count * a.tile_count, run.shared);
            a.change = {};  // made by the first of them
        }
    }
    void run_products(const ProductArguments& a) {
        const int blocks =
            a.tile_count * a.subspace_count * a.strips * (tile_rows / ProductArguments::rows_of_block);
        if (blocks > 0) queue_.run(a, blocks, product_shared_bytes());
    }
    /// Keys in latents, into memory that the tiles are made from. What it returns is what measures them
    /// afterwards.
    ProductArguments latents_of(const TileSources& sources, Index count, Index position,
                                PageReference& centred, PageReference& latents, PageReference& angles,
                                TilesArguments& tiles) {
        const LatentKeys& latent = *next_.latent;
        const Index channels = heads() * cache_.dim(TileSide::keys);
        const auto floats = [&](Index number) {
            return pool_.unfilled((number * static_cast<Index>(sizeof(float)) + 255) / 256 * 256);
        };
        // Of few sizes, because the pool keeps them by size.
        const auto some = static_cast<Index>(std::bit_ceil(static_cast<std::size_t>(count)));
        centred = floats(some * tile_tokens * channels);
        latents = floats(std::max<Index>(1, some * tables_.latent_floats()));
        CentreArguments centre{};
        centre.side = sides_[0];
        centre.heads = static_cast<std::int32_t>(heads());
        centre.tile_count = static_cast<std::int32_t>(count);
        centre.rotates_back = cache_.rotates(TileSide::keys);
        centre.pair_count = tables_.pair_count();
        centre.pairs = tables_.pairs();
        centre.angles_by_row = latent.frame() == KeyFrame::before_rope;
        centre.mean = tables_.mean();
        centre.centred = reinterpret_cast<float*>(centred.data());
        centre.findings = input_.findings;
        centre.sources = sources;
        if (centre.pair_count > 0) {
            // In double and on the host, because stored bits follow from them.
            std::vector<float> found;
            const Index of_tile = centre.angles_by_row ? tile_tokens : 1;
            found.reserve(static_cast<std::size_t>(2 * count * of_tile * centre.pair_count));
            for (Index i = 0; i < count * of_tile; ++i) {
                const Index at = centre.angles_by_row ? position + i : position + i * tile_tokens;
                for (const double frequency : tables_.frequencies()) {
                    const double angle = -1.0 * static_cast<double>(at) * frequency;
                    found.push_back(static_cast<float>(std::cos(angle)));
                    found.push_back(static_cast<float>(std::sin(angle)));
                }
            }
            angles = floats(static_cast<Index>(found.size()));
            queue_.to_device(angles.data(), found.data(), found.size() * sizeof(float));
            centre.angles = reinterpret_cast<const float*>(angles.data());
        }
        queue_.run(centre, centre.tile_count * centre.heads * (tile_rows / step_rows),
                   tables_.centre_shared());
        ProductArguments product{};
        product.subspaces = tables_.subspaces();
        product.subspace_count = tables_.subspace_count();
        product.strips = tables_.strips(false);
        product.tile_count = centre.tile_count;
        product.all_channels = static_cast<std::int32_t>(channels);
        product.latent_stride = tables_.latent_floats();
        product.centred = centre.centred;
        product.latents = reinterpret_cast<float*>(latents.data());
        product.findings = input_.findings;
        run_products(product);
        tiles.latents = product.latents;
        tiles.latent_stride = product.latent_stride;
        return product;
    }

    /// Recipes that quantize every token: the last tile goes on, and others follow.
    void fill_tiles(Index tokens, DeviceTile* entry) {
        while (done_ < tokens) {
            const bool goes_on = !next_.tiles.empty() && next_.tiles.back().tokens < tile_tokens &&
                                 next_.tiles.back().row == 0 && next_.tiles.back().shift == 0 &&
                                 next_.tiles.back().layout == next_.layout.get();
            const Index from = goes_on ? next_.tiles.back().tokens : 0,
                        whole = goes_on ? 0
                                        : std::min<Index>((tokens - done_) / tile_tokens,
                                                          TileSources::most_tiles),
                        taken =
                            whole > 0 ? whole * tile_tokens : std::min(tokens - done_, tile_tokens - from);
            TileSources sources{};
            sources.first = done_ - from;
            TileChange change{};
            if (goes_on) {
                TilePlace& tile = next_.tiles.back();
                next_.tile_pages.back() = writable(next_.tile_pages.back());
                tile.page = next_.tile_pages.back().data();
                if (next_.stale) clear_stale();
                wrote_old_tile_ = next_.tile_pages.back() == state_.tile_pages.back();
                tile.tokens += taken;
                change.tile = device_tile(tile);
                change.entry = tokens == taken ? entry : nullptr;
                changed_entry_ = change.entry != nullptr;
            }
            encode(sources, std::max<Index>(1, whole), next_.tokens, from,
                   whole > 0 ? tile_tokens : from + taken, !goes_on, change);
            done_ += taken;
            next_.tokens += taken;
            next_.recent_first = next_.tokens;
            if (!goes_on) next_.stale = false;
        }
    }
    /// Makes zero what the last tile's page holds of tokens taken back, on the host.
    void clear_stale() {
        const PageReference& page = next_.tile_pages.back();
        std::vector<std::byte> bytes(static_cast<std::size_t>(page.bytes()));
        queue_.to_host(bytes.data(), page.data(), bytes.size());
        queue_.wait();
        kvplane::detail::clear_tiles(next_.tiles.back(), bytes.data());
        queue_.to_device(page.data(), bytes.data(), bytes.size());
        next_.stale = false;
    }

    /// A tile that was cut is opened on the host, where the first token of the input follows it: it becomes
    /// recent tokens.
    void open_cut_tile() {
        TilePool host;
        CacheState state = next_;
        const std::size_t last = state.tiles.size() - 1;
        state.tile_pages[last] = host.unfilled(state.tile_pages[last].bytes());
        state.tiles[last].page = state.tile_pages[last].data();
        queue_.to_host(state.tile_pages[last].data(), next_.tile_pages[last].data(),
                       static_cast<std::size_t>(next_.tile_pages[last].bytes()));
        const FetchedRows keys(input_.keys, cache_.dim(TileSide::keys), 1, queue_);
        std::optional<FetchedRows> values;
        if (input_.values) values.emplace(*input_.values, cache_.dim(TileSide::values), 1, queue_);
        queue_.wait();
        SerialExecutor executor;
        std::optional<kvplane::detail::AnyRows> value_rows;
        if (values) value_rows.emplace(values->view());
        kvplane::detail::append_tokens(cache_, state, host, keys.view(), value_rows ? &*value_rows : nullptr,
                                       nullptr, false, executor);
        const auto move = [&](PageReference& page) {
            PageReference copy = pool_.unfilled(page.bytes());
            queue_.to_device(copy.data(), page.data(), static_cast<std::size_t>(page.bytes()));
            page = std::move(copy);
        };
        for (PageReference& page : state.recent) move(page);
        for (std::size_t t = last; t < state.tiles.size(); ++t) {
            move(state.tile_pages[t]);
            state.tiles[t].page = state.tile_pages[t].data();
        }
        next_ = std::move(state);
        done_ = 1;
    }

  public:
    static DeviceTile device_tile(const TilePlace& tile) {
        return {.page = tile.page,
                .first = static_cast<std::int32_t>(tile.first),
                .row = static_cast<std::int32_t>(tile.row),
                .tokens = static_cast<std::int32_t>(tile.tokens),
                .shift = static_cast<std::int32_t>(tile.shift)};
    }

  private:
    const CacheShape& cache_;
    const CacheState& state_;
    TilePool& pool_;
    const AppendTables& tables_;
    Queue& queue_;
    const Input input_;
    CacheState next_;
    kvplane::detail::TokenRows recent_rows_;
    Side sides_[2];
    Index done_ = 0;  ///< tokens of the input
    bool wrote_old_tile_ = false, changed_entry_ = false;
};

/// The host's side of a cache in device memory. Each call that takes a Queue starts its work there, and the
/// memory holds what it says when that is done.
class CacheBase {
  public:
    CacheBase(const CacheConfiguration& configuration, TilePool& device)
        : CacheBase(std::make_shared<const CacheShape>(configuration), device, {}) {
        state_ = shape_->empty_state();
        require_basis();
    }
    static std::vector<CacheBase> upload(std::span<const KvCache* const> caches, TilePool& device,
                                         Queue& queue) {
        for (const KvCache* const cache : caches)
            require(cache->provisional_tokens() == 0, ErrorCode::option, "upload: a cache with ",
                    cache->provisional_tokens(),
                    " provisional tokens, which stay on the host; expected accept() or truncate() before it");
        PageCopies copies;
        std::vector<CacheBase> all;
        for (const KvCache* const cache : caches) {
            all.push_back(CacheBase(std::make_shared<const CacheShape>(cache->shape()), device, {}));
            CacheBase& made = all.back();
            made.state_ = cache->state();
            made.require_basis();
            made.state_ = copies.copied(
                made.state_, device,
                [&](std::byte* to, const std::byte* from, std::size_t n) { queue.to_device(to, from, n); });
            made.show_tiles(0, made.tiles_.room_for(made.state_.tiles.size(), device), queue);
            made.show_outside(made.outside_.room_for(made.state_.recent.size(), device), queue);
        }
        return all;
    }
    static std::vector<KvCache> download(std::span<CacheBase* const> caches, TilePool& host, Queue& queue) {
        PageCopies copies;
        std::vector<KvCache> all;
        for (CacheBase* const cache : caches) {
            cache->collect(queue);
            all.emplace_back(
                cache->configuration(), host,
                copies.copied(cache->state_, host, [&](std::byte* to, const std::byte* from, std::size_t n) {
                    queue.to_host(to, from, n);
                }));
        }
        queue.wait();
        return all;
    }

    /// Waits for nothing: what kernels have found of tokens that were appended without a check is copied, for
    /// each to take over by itself.
    CacheBase fork(Queue& queue) const {
        CacheBase other(shape_, *pool_, state_);
        if (unread_) {
            other.record_ = pool_->unfilled(record_.bytes());
            queue.within_device(other.record_.data(), record_.data(), sizeof(Findings));
            other.unread_ = true;
        }
        other.tables_ = tables_;
        other.tiles_ = tiles_;
        other.outside_ = outside_;
        return other;
    }

    const CacheConfiguration& configuration() const noexcept { return shape_->configuration; }
    const CacheShape& shape() const noexcept { return *shape_; }
    const CacheState& state() const noexcept { return state_; }
    TilePool& pool() const noexcept { return *pool_; }
    Index tokens() const noexcept { return state_.tokens; }
    Index first_kept() const noexcept {
        return std::max(state_.dropped, std::min(state_.kept_sinks, tokens()));
    }
    Index bytes() const noexcept {
        Index sum = state_.page_bytes();
        if (configuration().fits_basis() && state_.latent) sum += state_.latent->bytes();
        if (state_.shaping && !configuration().query_moments) sum += state_.shaping->bytes();
        if (state_.queries)
            for (const SecondMoments& head : *state_.queries) sum += head.bytes();
        return sum + static_cast<Index>(state_.attention.size() * sizeof(state_.attention[0]));
    }

    const DeviceTile* device_tiles() const noexcept { return tiles_.device(); }
    const std::vector<DeviceTile>& tiles() const noexcept { return tiles_.host(); }
    const std::byte* sink_page() const noexcept { return state_.sinks ? state_.sinks.data() : nullptr; }
    const std::byte* const* device_recent_pages() const noexcept { return outside_.device(); }
    const std::vector<const std::byte*>& recent_pages() const noexcept { return outside_.host(); }

    void append(const DeviceRows& keys, const DeviceRows* values, Queue& queue, AppendCheck check) {
        require_append(keys, values);
        if (keys.tokens == 0) return;
        if (!tables_) tables_ = std::make_shared<const AppendTables>(*shape_, state_, *pool_, queue);
        require(tables_->shared() <= queue.most_shared_bytes(), ErrorCode::option,
                "append on the device: blocks of ", tables_->shared(),
                " bytes of shared memory for heads of ", configuration().key_head_dim, " and ",
                configuration().value_head_dim, " channels, where ", queue.most_shared_bytes(),
                " are there; download(), KvCache::append() and upload() do it");
        const bool waits = check == AppendCheck::wait;
        PageReference own;
        if (waits) own = new_findings(queue);
        if (!waits && !record_) record_ = new_findings(queue);
        // What a cut tile has carried is counted from all that came before.
        if (state_.cut() && !configuration().recipe.every_token) collect(queue);
        const kvplane::detail::StandardFloatingPoint standard;
        Index changed_from = -1;  // of the table of tiles
        PageReference tiles_room, outside_room;
        {
            TilesAside aside(state_);
            const Index last = aside.count() - 1;
            DeviceAppend work(*shape_, state_, *pool_, *tables_, queue,
                              {keys, values, reinterpret_cast<Findings*>((waits ? own : record_).data())});
            Traces traces{state_, work};
            const DeviceTile before =
                last >= 0 ? tiles_.host()[static_cast<std::size_t>(last)] : DeviceTile{};
            work.run(tiles_.entry(last));
            if (waits) {
                Findings found;
                queue.to_host(&found, own.data(), sizeof found);
                queue.wait();
                if (found.bad[0] != 0 || found.bad[1] != 0) {
                    if (work.changed_entry()) tiles_.change(last, {before}, {}, queue);
                    refuse(keys, values, found, queue);
                }
                include(found, work.next().settled_extremes);
            } else {
                unread_ = true;
            }
            CacheState& next = work.next();
            // All memory is taken before anything changes.
            aside.make_room(next.tiles.size());
            outside_room = outside_.room_for(next.recent.size(), *pool_);
            if (!work.changed_entry() &&
                (next.tiles.size() != state_.tiles.size() ||
                 (last >= 0 && DeviceAppend::device_tile(next.tiles.back()) != before))) {
                changed_from = std::max<Index>(0, last);  // as many as are set aside
                tiles_room =
                    tiles_.room_for(static_cast<std::size_t>(changed_from) + next.tiles.size(), *pool_);
            }
            if (work.changed_entry()) tiles_.changed(last, DeviceAppend::device_tile(next.tiles.back()));
            traces.stay = false;
            state_ = std::move(next);
        }
        if (changed_from >= 0) show_tiles(changed_from, std::move(tiles_room), queue);
        show_outside(std::move(outside_room), queue);
    }

    void truncate(Index count, Queue& queue) {
        require(count >= 0 && count <= tokens(), ErrorCode::index, "truncate: to ", count, " of ", tokens(),
                " tokens");
        require(!state_.hides() || count <= state_.kept_sinks || count >= state_.dropped, ErrorCode::index,
                "truncate: to ", count, " tokens, expected at least ", state_.dropped,
                ", before which they were dropped, or at most the ", state_.kept_sinks, " sinks");
        if (count == tokens()) return;
        PageReference tiles_room = tiles_.room_for(state_.tiles.size(), *pool_),
                      outside_room = outside_.room_for(state_.recent.size(), *pool_);
        if (count == 0) {
            state_ = shape_->empty_state();
            record_ = {};
            unread_ = false;
        } else {
            state_.truncate(count);
        }
        show_tiles(std::max<Index>(0, static_cast<Index>(state_.tiles.size()) - 1), std::move(tiles_room),
                   queue);
        show_outside(std::move(outside_room), queue);
    }
    void drop_before(Index token, Index sinks, Queue& queue) {
        require(token >= 0 && token <= tokens(), ErrorCode::index, "drop_before: token ", token, " of ",
                tokens());
        require(sinks >= 0 && (!state_.hides() || sinks <= state_.kept_sinks), ErrorCode::index,
                "drop_before: ", sinks, " sinks to keep, expected 0 to ",
                state_.hides() ? state_.kept_sinks : tokens(), "; later ones were dropped");
        const std::size_t before = state_.tiles.size();
        PageReference room = tiles_.room_for(before, *pool_);
        state_.drop_before(token, sinks, shape_->recipe().every_token);
        if (state_.tiles.size() != before) show_tiles(0, std::move(room), queue);
    }

    /// Takes over what kernels have found of tokens that were appended without a check.
    void collect(Queue& queue) {
        if (!unread_) return;
        Findings found;
        queue.to_host(&found, record_.data(), sizeof found);
        queue.wait();
        queue.clear(record_.data(), sizeof found);
        include(found, state_.settled_extremes);
        unread_ = false;
    }

  private:
    /// Remembers of an append that fails after it has written the last old tile that the tile has traces of
    /// it.
    struct Traces {
        CacheState& state;
        const DeviceAppend& work;
        bool stay = true;

        ~Traces() {
            if (stay && work.wrote_old_tile()) state.stale = true;
        }
    };

    CacheBase(std::shared_ptr<const CacheShape> shape, TilePool& pool, CacheState state)
        : shape_(std::move(shape)), pool_(&pool), state_(std::move(state)) {}

    void require_basis() const {
        require(state_.layout != nullptr, ErrorCode::option, "cache on the device: recipe '",
                configuration().recipe.name,
                "' has yet to fit its basis, which is done on the host; expected a basis in the "
                "configuration, or "
                "fit_basis() before upload()");
    }
    PageReference new_findings(Queue& queue) {
        PageReference page = pool_->unfilled(256);
        queue.clear(page.data(), sizeof(Findings));
        return page;
    }
    void include(const Findings& found, kvplane::detail::StoredExtremes& extremes) const {
        kvplane::detail::StoredExtremes more{};
        for (const TileSide side : {TileSide::keys, TileSide::values}) {
            const int s = side == TileSide::keys ? 0 : 1;
            more.largest[side] = std::bit_cast<float>(found.largest[s]);
            more.excess[side] = std::bit_cast<double>(found.excess[s]);
        }
        if (configuration().values_in_keys) more.largest.values = more.largest.keys;
        extremes.include(more);
    }

    void require_rows(const DeviceRows& rows, const char* argument, Index dim) const {
        require(rows.heads == configuration().kv_heads, ErrorCode::shape, "append: ", argument, " of ",
                rows.heads, " heads, expected ", configuration().kv_heads);
        require(rows.tokens >= 0 && rows.tokens <= std::numeric_limits<std::int32_t>::max(), ErrorCode::shape,
                "append: ", rows.tokens, " tokens of ", argument, ", expected 0 to 2^31 - 1");
        require(rows.token_stride >= 0 && rows.head_stride >= 0 && rows.channel_stride >= 0, ErrorCode::shape,
                "append: ", argument, " with strides of ", rows.token_stride, ", ", rows.head_stride, " and ",
                rows.channel_stride, ", expected none below 0");
        require(rows.data || rows.tokens * dim == 0, ErrorCode::shape, "append: ", argument,
                " at no address");
    }
    void require_append(const DeviceRows& keys, const DeviceRows* values) const {
        const CacheConfiguration& c = configuration();
        require((values == nullptr) == c.values_in_keys, ErrorCode::option,
                values ? "append: values, but the configuration has them in keys; expected append(keys)"
                       : "append: keys alone, but the configuration does not have values in keys; expected "
                         "append(keys, values)");
        const char* const because = host_appends_because(c);
        require(!because, ErrorCode::option, "append on the device: recipe '", c.recipe.name, "' ",
                because ? because : "",
                ", which is done on the host; download(), KvCache::append() and upload() do it");
        require_rows(keys, "keys", c.key_head_dim);
        if (!values) return;
        require_rows(*values, "values", c.value_head_dim);
        require(keys.tokens == values->tokens, ErrorCode::shape, "append: ", keys.tokens, " keys and ",
                values->tokens, " values, expected as many of each");
    }
    /// Says on the host what is wrong with the input.
    [[noreturn]] void refuse(const DeviceRows& keys, const DeviceRows* values, const Findings& found,
                             Queue& queue) {
        const FetchedRows key_rows(keys, configuration().key_head_dim, keys.tokens, queue);
        std::optional<FetchedRows> value_rows;
        if (values) value_rows.emplace(*values, configuration().value_head_dim, values->tokens, queue);
        queue.wait();
        kvplane::detail::require_magnitudes(*shape_, key_rows.view(), TileSide::keys);
        if (values) kvplane::detail::require_magnitudes(*shape_, value_rows->view(), TileSide::values);
        const int side = found.bad[0] != 0 ? 0 : 1;
        fail(ErrorCode::not_finite, "append: ", side == 0 ? "keys" : "values", ": token ", ~found.bad[side],
             " held a number that cannot be stored, and holds another now; expected input that does not "
             "change "
             "while it is appended");
    }

    /// Makes the table of tiles from tile `first` on that of the state.
    void show_tiles(Index first, PageReference room, Queue& queue) {
        std::vector<DeviceTile> entries;
        for (std::size_t t = static_cast<std::size_t>(first); t < state_.tiles.size(); ++t)
            entries.push_back(DeviceAppend::device_tile(state_.tiles[t]));
        tiles_.change(first, entries, std::move(room), queue);
    }
    void show_outside(PageReference room, Queue& queue) {
        std::vector<const std::byte*> pages;
        for (const PageReference& page : state_.recent) pages.push_back(page.data());
        if (pages != outside_.host()) outside_.change(0, pages, std::move(room), queue);
    }

    std::shared_ptr<const CacheShape> shape_;
    TilePool* pool_;
    CacheState state_;
    std::shared_ptr<const AppendTables> tables_;
    DeviceTable<DeviceTile> tiles_;
    DeviceTable<const std::byte*> outside_;
    PageReference record_;  ///< Findings of tokens that were appended without a check
    bool unread_ = false;
};

}  // namespace detail
}  // namespace kvplane::cuda
