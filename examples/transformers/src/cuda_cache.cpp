#include "cuda_cache.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "host_cache.hpp"
#include "kvplane/cache/capabilities.hpp"
#include "kvplane/cuda/device_attention.cuh"
#include "kvplane/cuda/device_cache.cuh"

namespace kvplane_python {

using kvplane::CacheConfiguration;
using kvplane::KvCache;
using kvplane::PageReference;
using kvplane::ReadPolicy;
using kvplane::cuda::AppendCheck;
using kvplane::cuda::AttendLayer;
using kvplane::cuda::AttendWorkspace;
using kvplane::cuda::DeviceCache;
using kvplane::cuda::DeviceOutput;
using kvplane::cuda::DeviceRows;
using kvplane::cuda::DeviceSequence;
using kvplane::cuda::require_cuda;

namespace {

/// Makes a device current while this lives.
class CurrentDevice {
  public:
    explicit CurrentDevice(int device) {
        int found = 0;
        require_cuda(cudaGetDevice(&found), "asking for the current device");
        if (found == device) return;
        require_cuda(cudaSetDevice(device), "choosing a device");
        before_ = found;
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;
    ~CurrentDevice() {
        if (before_ >= 0) (void)cudaSetDevice(before_);
    }

  private:
    int before_ = -1;
};

/// The memory of a cache and its forks, whose calls take turns: pages may change hands.
struct SharedPages {
    explicit SharedPages(int of) : device(of) {
        require_cuda(cudaEventCreateWithFlags(&passed, cudaEventDisableTiming), "making an event");
    }
    SharedPages(const SharedPages&) = delete;
    SharedPages& operator=(const SharedPages&) = delete;
    ~SharedPages() { (void)cudaEventDestroy(passed); }

    /// Work that is started on the stream from now on comes after all work before, also that of calls which are
    /// given no stream. Throws Error (option) for a stream that is captured: a graph's launches would append no
    /// new tokens, and would go by plans that are made over again.
    void enter(cudaStream_t to) {
        cudaStreamCaptureStatus captured = cudaStreamCaptureStatusNone;
        require_cuda(cudaStreamIsCapturing(to, &captured), "looking at a stream");
        require(
            captured == cudaStreamCaptureStatusNone, ErrorCode::option,
            "stream: one that is captured in a CUDA graph, which kvplane's caches do not serve; expected a "
            "stream that works");
        if (to == stream) return;
        require_cuda(cudaEventRecord(passed, stream), "marking the end of work on a stream");
        require_cuda(cudaStreamWaitEvent(to, passed, 0), "waiting for another stream");
        stream = to;
    }

    const int device;
    std::mutex turns;
    kvplane::cuda::DeviceMemory memory;
    kvplane::TilePool pool{&memory};
    cudaStream_t stream = nullptr;  ///< of the last call that was given one; CUDA's default before
    cudaEvent_t passed{};
};

std::size_t size_of(ScalarType type) {
    return kvplane::bytes_of(type);
}
std::size_t to_size(Index number) {
    return static_cast<std::size_t>(number);
}

/// The tokens [first, ..) of one sequence as rows of the device.
DeviceRows device_rows(const SequenceRows& rows, Index sequence, Index first) {
    return {rows.at(sequence, first), rows.type,        rows.tokens - first, rows.heads,
            rows.token_stride,        rows.head_stride, rows.channel_stride};
}
DeviceOutput device_output(const SequenceRows& rows, Index sequence, Index first) {
    return {rows.at(sequence, first), rows.type,       rows.tokens - first, rows.heads,
            rows.token_stride,        rows.head_stride};
}

/// Whether the CPU must store every token: keys that are shaped, values of different widths, grids that clip.
bool appends_on_host(const CacheConfiguration& c) {
    const auto& recipe = c.recipe;
    const auto clips = [](const kvplane::SideRecipe& side) {
        return !side.is_half() && side.rule.clip != kvplane::Clip::none;
    };
    return recipe.shaped_keys || c.widths_by_token() || (!recipe.latents && clips(recipe.keys)) ||
           clips(recipe.values);
}

/// Throws Error (option) for a recipe that a device does not serve.
void require_served(const CacheConfiguration& c, const std::string& name, int device) {
    const auto& recipe = c.recipe;
    const char* const why =
        c.keys_by_token() ? "has grids of keys by token"
        : recipe.latents && recipe.latents->basis.frame == kvplane::KeyFrame::before_rope
            ? "stores keys before RoPE"
        : c.fits_basis() && recipe.latents->own_heads_together && c.kv_heads * c.key_head_dim > 256
            ? "may have more than 256 latents a head"
            : nullptr;
    require(!why, ErrorCode::option, "recipe '", name, "' on device ", place_name(device), ": it ",
            why ? why : "",
            ", which kvplane reads on the CPU alone; expected fp16, kivi, key_favored, standard, compact, "
            "smallest, latent or weighted");
    // Of latents that are still to be fitted, all but the keys.
    CacheConfiguration known = c;
    if (c.fits_basis()) {
        known.recipe.latents.reset();
        known.recipe.keys = {};
    }
    (void)kvplane::cuda::attend_layer(kvplane::detail::CacheShape(known));
}

/// A sequence that ends after `tokens` tokens, for queries that stand before its end.
DeviceSequence ended_at(DeviceSequence sequence, Index tokens) {
    std::size_t count = sequence.tiles.size();
    while (count > 0 && sequence.tiles[count - 1].first >= tokens) --count;
    sequence.tiles = sequence.tiles.first(count);
    if (sequence.recent_first >= tokens) sequence.recent = {};
    sequence.recent_first = std::min(sequence.recent_first, tokens);
    sequence.sink_count = std::min(sequence.sink_count, tokens);
    sequence.tokens = tokens;
    return sequence;
}

/// How many query tokens of a sequence a block takes, and in how many parts of so many a long prompt goes.
constexpr Index most_query_tokens = 8, most_parts = 64;

/// Copies of host pages on a device, by the address of the host's: each is copied once, however many caches share
/// it. While a copy is there, so is the host's page, which whoever writes copies first: another page, at another
/// address. So no copy is ever out of date.
class MirroredPages {
  public:
    /// Between begin() and end() all pages are asked for; the copies of others go.
    void begin() { ++round_; }
    std::byte* copy_of(const PageReference& page, kvplane::TilePool& pool, cudaStream_t stream) {
        Copy& copy = copies_[page.data()];
        copy.round = round_;
        if (!copy.here) {
            copy.there = pool.unfilled(page.bytes());
            require_cuda(cudaMemcpyAsync(copy.there.data(), page.data(), to_size(page.bytes()),
                                         cudaMemcpyHostToDevice, stream),
                         "copying a page to the device");
            copy.here = page;
        }
        return copy.there.data();
    }
    void end() {
        std::erase_if(copies_, [&](const auto& one) { return one.second.round != round_; });
    }

  private:
    struct Copy {
        PageReference here, there;
        Index round = 0;
    };
    std::unordered_map<const std::byte*, Copy> copies_;
    Index round_ = 0;
};

/// A sequence whose pages are mirrored.
struct MirroredSequence {
    std::vector<kvplane::cuda::DeviceTile> tiles;
    std::vector<const std::byte*> recent;
    const std::byte* sinks = nullptr;
    PageReference table;

    void show(const KvCache& cache, MirroredPages& pages, kvplane::TilePool& pool, cudaStream_t stream) {
        const auto& state = cache.state();
        std::vector<kvplane::cuda::DeviceTile> next;
        for (std::size_t t = 0; t < state.tiles.size(); ++t) {
            next.push_back(kvplane::cuda::detail::DeviceAppend::device_tile(state.tiles[t]));
            next.back().page = pages.copy_of(state.tile_pages[t], pool, stream);
        }
        if (next != tiles) {
            const Index bytes = static_cast<Index>(next.size() * sizeof(next[0]));
            if (!table || table.bytes() < bytes) table = pool.unfilled((2 * bytes + 255) / 256 * 256);
            tiles.clear();
            if (bytes > 0)
                require_cuda(cudaMemcpyAsync(table.data(), next.data(), to_size(bytes),
                                             cudaMemcpyHostToDevice, stream),
                             "copying a table of tiles");
            tiles = std::move(next);
        }
        recent.clear();
        for (const PageReference& page : state.recent) recent.push_back(pages.copy_of(page, pool, stream));
        sinks = state.sinks ? pages.copy_of(state.sinks, pool, stream) : nullptr;
    }
    DeviceSequence sequence(const KvCache& cache) const {
        const auto& state = cache.state();
        return {.tiles = tiles,
                .device_tiles = tiles.empty()
                                    ? nullptr
                                    : reinterpret_cast<const kvplane::cuda::DeviceTile*>(table.data()),
                .sinks = sinks,
                .recent = recent,
                .sink_count = state.sink_count(cache.configuration().recipe),
                .recent_first = state.recent_first,
                .tokens = cache.tokens(),
                .hidden_from = state.kept_sinks,
                .hidden_to = state.dropped,
                .page_bytes = state.layout->bytes,
                .latent = state.latent.get(),
                .narrowed = state.has_narrowed()};
    }
};

class CudaCache final : public Cache {
  public:
    CudaCache(Contents contents, Index batch, Index threads, int device)
        : Cache(std::move(contents), batch), host_(std::make_unique<HostCache>(contents_, batch, threads)) {
        for (Index i = 0; i < layers(); ++i)
            require_served(configuration(i), contents_.recipes[to_size(i)], device);
        const CurrentDevice current(device);
        pages_ = std::make_shared<SharedPages>(device);
        for (Index i = 0; i < layers(); ++i) {
            DeviceLayer& layer = layers_.emplace_back();
            layer.truncates_exactly = kvplane::capabilities(configuration(i)).truncates_exactly;
            layer.mirrors = appends_on_host(configuration(i));
            start(i);
        }
    }
    ~CudaCache() override {
        try {
            const Lock lock(turns());
            const CurrentDevice current(device());
            layers_.clear();
            long_calls_.reset();
        } catch (...) {  // the driver has ended before this
        }
    }

    Index threads() const noexcept override { return host_->threads(); }
    int device() const noexcept override { return pages_->device; }

    void append(Index layer, const SequenceRows& keys, const SequenceRows& values,
                const SequenceRows* queries, std::span<const Index> padding,
                const AppendOptions& options) override;
    void attend(Index layer, const SequenceRows& queries, const SequenceRows& output,
                std::span<const Index> padding, const Attention& attention) override;

    void clear() override {
        const Lock lock(turns());
        const CurrentDevice current(device());
        host_->clear();
        for (Index i = 0; i < layers(); ++i) start(i);
    }
    std::unique_ptr<Cache> fork() const override;

    Index bytes() const override {
        const Lock lock(turns());
        BytesOnce bytes;
        for (Index i = 0; i < layers(); ++i) {
            if (of(i).on_host)
                for (const KvCache& cache : host_->sequences(i)) bytes.add(cache);
            for (const Sequence& sequence : of(i).sequences) bytes.add(sequence.cache);
        }
        return bytes.sum();
    }
    Matrix stored(kvplane::TileSide side, Index layer, Index sequence) const override {
        const Lock lock(turns());
        require_sequence(layer, sequence);
        if (of(layer).on_host) return stored_of(host_->sequences(layer)[to_size(sequence)], side);
        const CurrentDevice current(device());
        kvplane::TilePool pool;
        return stored_of(of(layer).sequences[to_size(sequence)].cache.download(pool, pages_->stream), side);
    }

    void save(const std::filesystem::path& path, bool compress, bool sync) const override;
    void load(const std::filesystem::path& path) override;

  private:
    /// Keys and values of some provisional tokens as they came, in pages of the pool.
    struct Draft {
        PageReference memory[2];
        DeviceRows keys, values;
    };
    /// One sequence. Its last tokens may be provisional. They are appended like others; but before a tile is made,
    /// which could not be taken back without a trace, `before` is a fork without the tokens in `drafts`.
    struct Sequence {
        DeviceCache cache;
        Index provisional = 0;
        std::optional<DeviceCache> before;
        std::vector<Draft> drafts;  ///< those behind `before`

        void accept_all() {
            provisional = 0;
            before.reset();
            drafts.clear();
        }
    };
    struct View {
        std::shared_ptr<const kvplane::LatentKeys> basis;  ///< where the cache has fitted its own
        AttendLayer layer;
    };
    struct DeviceLayer {
        /// While sequences have yet to learn what they are stored by; for good where `mirrors`.
        bool on_host = false;
        /// Whether the CPU appends every token. What it stores is copied to the device, which attends to it.
        bool mirrors = false;
        MirroredPages mirrored_pages;
        std::vector<MirroredSequence> mirrored;
        bool truncates_exactly = false;
        mutable std::vector<Sequence> sequences;  ///< what is downloaded takes over what kernels have found
        std::vector<View> views;
        /// Each layer has its own, whose plan is on its way while the next one's is made.
        std::unique_ptr<AttendWorkspace> workspace;
        std::vector<float> sink_logits;
        PageReference sink_logits_there;

        void forget_mirrors() {
            mirrored.clear();
            mirrored_pages = {};
        }
    };

    explicit CudaCache(const CudaCache& other, const Lock&)
        : Cache(other.contents_, other.batch_), pages_(other.pages_), host_(other.host_->forked()) {
        for (const DeviceLayer& layer : other.layers_) {
            DeviceLayer& copy = layers_.emplace_back();
            copy.on_host = layer.on_host;
            copy.truncates_exactly = layer.truncates_exactly;
            copy.mirrors = layer.mirrors;
            copy.mirrored_pages = layer.mirrored_pages;
            for (Sequence& sequence : layer.sequences) copy.sequences.push_back(forked(sequence));
        }
    }

    DeviceLayer& of(Index layer) { return layers_[to_size(layer)]; }
    const DeviceLayer& of(Index layer) const { return layers_[to_size(layer)]; }
    cudaStream_t stream() const { return pages_->stream; }

    std::mutex& turns() const override { return pages_->turns; }
    Standing standing(Index layer, Index sequence) const override {
        if (of(layer).on_host) return host_->standing(layer, sequence);
        const Sequence& one = of(layer).sequences[to_size(sequence)];
        const auto& state = one.cache.state();
        return {one.cache.tokens(), one.provisional, state.packed(), one.cache.first_kept(), state.hides()};
    }
    bool learns_from_queries(Index layer) const override {
        return of(layer).on_host && host_->learns_from_queries(layer);
    }
    bool looks_at_queries(Index layer) const override {
        return of(layer).on_host && host_->looks_at_queries(layer);
    }
    void truncate_one(Index layer, Index sequence, Index count) override;
    void accept_one(Index layer, Index sequence, Index count) override;
    void reorder_all(std::span<const Index> indices) override;

    Sequence forked(Sequence& sequence) const {
        Sequence copy{sequence.cache.fork(stream()), sequence.provisional, {}, sequence.drafts};
        if (sequence.before) copy.before.emplace(sequence.before->fork(stream()));
        return copy;
    }
    /// No tokens: on the device, or where the cache has a basis to fit, on the host.
    void start(Index layer) {
        DeviceLayer& made = of(layer);
        made.sequences.clear();
        made.views.clear();
        made.forget_mirrors();
        made.on_host = made.mirrors || configuration(layer).fits_basis();
        if (made.on_host) return;
        for (Index b = 0; b < batch_; ++b)
            made.sequences.push_back({DeviceCache(configuration(layer), pages_->pool), 0, {}, {}});
    }

    static bool is_ready(const std::vector<KvCache>& sequences) {
        return std::all_of(sequences.begin(), sequences.end(), [](const KvCache& cache) {
            return cache.state().layout && cache.provisional_tokens() == 0 && !cache.needs_queries();
        });
    }
    std::vector<Sequence> uploaded(const std::vector<KvCache>& sequences) const {
        std::vector<const KvCache*> all;
        for (const KvCache& cache : sequences) all.push_back(&cache);
        std::vector<Sequence> made;
        for (DeviceCache& cache : DeviceCache::upload(all, pages_->pool, stream()))
            made.push_back({std::move(cache), 0, {}, {}});
        return made;
    }
    void upload_when_ready(Index layer) {
        if (!of(layer).on_host || of(layer).mirrors || !is_ready(host_->sequences(layer))) return;
        std::vector<KvCache> empty = host_->empty_sequences(layer);
        of(layer).sequences = uploaded(host_->sequences(layer));
        host_->sequences(layer) = std::move(empty);
        of(layer).on_host = false;
        of(layer).forget_mirrors();
    }
    /// Of a sequence that has to fit its basis anew, the whole layer.
    void download_to_fit(Index layer) {
        std::vector<DeviceCache*> all;
        for (Sequence& sequence : of(layer).sequences) all.push_back(&sequence.cache);
        std::vector<KvCache> caches = DeviceCache::download(all, host_->pool(), stream());
        for (KvCache& cache : caches)
            if (cache.tokens() == 0) cache = KvCache(configuration(layer), host_->pool());
        host_->sequences(layer) = std::move(caches);
        of(layer).sequences.clear();
        of(layer).on_host = true;
    }

    // Drafts

    bool makes_tile(const DeviceCache& cache, Index more) const {
        const auto& state = cache.state();
        const auto& recipe = cache.configuration().recipe;
        const Index outside = std::max(state.tokens + more, recipe.sink_tokens) -
                              std::max(state.recent_first, recipe.sink_tokens);
        return state.cut() || outside - recipe.recent_tokens >= kvplane::tile_tokens;
    }
    Draft kept(const CacheConfiguration& configuration, const DeviceRows& keys,
               const DeviceRows& values) const;
    void copy_rows(const DeviceRows& from, std::byte* to, Index channels) const;
    static void require_copied(const SequenceRows& rows, const char* name);
    static void forget_drafts_from(Sequence& sequence, Index count);

    // Calls

    void append_to_host(Index layer, const SequenceRows& keys, const SequenceRows& values,
                        const SequenceRows* queries, std::span<const Index> padding,
                        const AppendOptions& options);
    void append_to_device(Index layer, const SequenceRows& keys, const SequenceRows& values,
                          std::span<const Index> padding, const AppendOptions& options);
    void attend_on_host(Index layer, const SequenceRows& queries, const SequenceRows& output,
                        std::span<const Index> padding, const Attention& attention);
    /// A sequence as kernels take it, and what its tiles are.
    struct Attended {
        DeviceSequence sequence;
        const kvplane::detail::CacheShape* shape;
        std::shared_ptr<const kvplane::LatentKeys> latent;
    };
    std::vector<Attended> attended(Index layer);
    const AttendLayer& view(Index layer, const Attended& sequence);
    void clear_rows(const SequenceRows& output, Index sequence, Index rows) const;
    void attend_sequence(const AttendLayer& view, const DeviceSequence& sequence, const DeviceRows& queries,
                         const DeviceOutput& output, const kvplane::AttentionParameters& parameters,
                         std::unique_ptr<AttendWorkspace>& workspace);
    void attend_parts(const AttendLayer& view, std::span<const DeviceSequence> sequences, Index query_tokens,
                      DeviceRows queries, DeviceOutput output, const kvplane::AttentionParameters& parameters,
                      std::unique_ptr<AttendWorkspace>& workspace);
    std::span<const float> sink_logits(Index layer, const Attention& attention);

    std::shared_ptr<SharedPages> pages_;  ///< before what is in them
    std::unique_ptr<HostCache> host_;  ///< of the same batch; its layers are empty but for those on the host
    std::vector<DeviceLayer> layers_;
    std::unique_ptr<AttendWorkspace> long_calls_;  ///< of calls of many query tokens, for all layers
};

std::unique_ptr<Cache> CudaCache::fork() const {
    const Lock lock(turns());
    const CurrentDevice current(device());
    return std::unique_ptr<Cache>(new CudaCache(*this, lock));
}

// Files ----------------------------------------------------------------------------------------------------

void CudaCache::save(const std::filesystem::path& path, bool compress, bool sync) const {
    const Lock lock(turns());
    const CurrentDevice current(device());
    kvplane::TilePool pool;
    std::vector<std::vector<KvCache>> downloaded(to_size(layers()));
    for (Index i = 0; i < layers(); ++i) {
        std::vector<DeviceCache*> caches;
        for (std::size_t b = 0; b < of(i).sequences.size(); ++b) {
            Sequence& sequence = of(i).sequences[b];
            require(sequence.provisional == 0, ErrorCode::option, "save: sequence ", b, ", layer ", i, ": ",
                    sequence.provisional,
                    " provisional tokens, expected none; accept() or truncate() come before it");
            caches.push_back(&sequence.cache);
        }
        if (!caches.empty()) downloaded[to_size(i)] = DeviceCache::download(caches, pool, stream());
    }
    std::vector<const KvCache*> all;  // [sequence][layer]
    for (std::size_t b = 0; b < to_size(batch_); ++b)
        for (Index i = 0; i < layers(); ++i)
            all.push_back(of(i).on_host ? &host_->sequences(i)[b] : &downloaded[to_size(i)][b]);
    save_all(all, path, compress, sync);
}

void CudaCache::load(const std::filesystem::path& path) {
    const Lock lock(turns());
    const CurrentDevice current(device());
    std::unique_ptr<HostCache> host = host_->forked();
    host->load(path);
    std::vector<std::vector<Sequence>> sequences(to_size(layers()));
    std::vector<bool> uploads(to_size(layers()));
    for (Index i = 0; i < layers(); ++i) {
        uploads[to_size(i)] = !of(i).mirrors && is_ready(host->sequences(i));
        if (!uploads[to_size(i)]) continue;
        sequences[to_size(i)] = uploaded(host->sequences(i));
        host->sequences(i) = host->empty_sequences(i);
    }
    batch_ = host->batch();
    host_ = std::move(host);
    for (Index i = 0; i < layers(); ++i) {
        of(i).views.clear();
        of(i).forget_mirrors();
        of(i).sequences = std::move(sequences[to_size(i)]);
        of(i).on_host = !uploads[to_size(i)];
    }
}

// Tokens ---------------------------------------------------------------------------------------------------

void CudaCache::append(Index layer, const SequenceRows& keys, const SequenceRows& values,
                       const SequenceRows* queries, std::span<const Index> padding,
                       const AppendOptions& options) {
    const Lock lock(turns());
    require_append(layer, keys, values, queries, padding);
    const CurrentDevice current(device());
    pages_->enter(static_cast<cudaStream_t>(options.stream));
    if (of(layer).on_host)
        append_to_host(layer, keys, values, queries, padding, options);
    else
        append_to_device(layer, keys, values, padding, options);
}

/// Rows of a device on the host, with the same strides.
class Fetched {
  public:
    Fetched(const SequenceRows& rows, cudaStream_t stream) : rows_(rows) {
        const Index last = (rows.batch - 1) * rows.batch_stride + (rows.heads - 1) * rows.head_stride +
                           (rows.tokens - 1) * rows.token_stride + (rows.channels - 1) * rows.channel_stride;
        bytes_.resize(rows.tokens == 0 ? 0 : to_size(last + 1) * size_of(rows.type));
        rows_.data = bytes_.data();
        if (!bytes_.empty())
            require_cuda(
                cudaMemcpyAsync(bytes_.data(), rows.data, bytes_.size(), cudaMemcpyDeviceToHost, stream),
                "copying from the device");
    }
    /// After waiting for the stream.
    const SequenceRows& rows() const noexcept { return rows_; }

  private:
    SequenceRows rows_;
    std::vector<std::byte> bytes_;
};

void CudaCache::append_to_host(Index layer, const SequenceRows& keys, const SequenceRows& values,
                               const SequenceRows* queries, std::span<const Index> padding,
                               const AppendOptions& options) {
    const Fetched key_rows(keys, stream()), value_rows(values, stream());
    std::optional<Fetched> query_rows;
    if (queries) query_rows.emplace(*queries, stream());
    require_cuda(cudaStreamSynchronize(stream()), "waiting for tokens");
    host_->append(layer, key_rows.rows(), value_rows.rows(), queries ? &query_rows->rows() : nullptr, padding,
                  options);
    upload_when_ready(layer);
}

void CudaCache::append_to_device(Index layer, const SequenceRows& keys, const SequenceRows& values,
                                 std::span<const Index> padding, const AppendOptions& options) {
    DeviceLayer& all = of(layer);
    const AppendCheck check = options.check ? AppendCheck::wait : AppendCheck::none;
    const bool keeps_drafts = options.provisional && !all.truncates_exactly;
    if (keeps_drafts) {
        require_copied(keys, "keys");
        require_copied(values, "values");
    }
    for (Index b = 0; b < batch_; ++b) {
        const Standing now = standing(layer, b);
        const Index seen = window(layer) > 0 ? first_seen(layer, now) : 0;
        if (seen > now.first_kept) all.sequences[to_size(b)].cache.drop_before(seen, 0, stream());
    }
    std::vector<Index> before;
    std::vector<DeviceCache> forks;  // to which a batch goes back that is refused in its middle
    try {
        for (Index b = 0; b < batch_; ++b) {
            Sequence& sequence = all.sequences[to_size(b)];
            const Index first = padding.empty() ? 0 : padding[to_size(b)], rows = keys.tokens - first;
            before.push_back(sequence.cache.tokens());
            if (options.check && batch_ > 1) forks.push_back(sequence.cache.fork(stream()));
            if (rows == 0) continue;
            const DeviceRows k = device_rows(keys, b, first), v = device_rows(values, b, first);
            if (keeps_drafts) {
                if (!sequence.before && makes_tile(sequence.cache, rows))
                    sequence.before.emplace(sequence.cache.fork(stream()));
                if (sequence.before) sequence.drafts.push_back(kept(configuration(layer), k, v));
            }
            sequence.cache.append(k, v, stream(), check);
            if (options.provisional) sequence.provisional += rows;
        }
    } catch (...) {
        for (std::size_t b = 0; b < before.size(); ++b) {
            Sequence& sequence = all.sequences[b];
            if (options.provisional) sequence.provisional -= sequence.cache.tokens() - before[b];
            if (b < forks.size())
                sequence.cache = std::move(forks[b]);
            else if (before[b] < sequence.cache.tokens())
                sequence.cache.truncate(before[b], stream());
            forget_drafts_from(sequence, before[b]);
        }
        throw;
    }
    // append() of others accepts the provisional ones.
    if (!options.provisional)
        for (Sequence& sequence : all.sequences) sequence.accept_all();
}

CudaCache::Draft CudaCache::kept(const CacheConfiguration& configuration, const DeviceRows& keys,
                                 const DeviceRows& values) const {
    Draft draft;
    const auto keep = [&](const DeviceRows& rows, Index channels, PageReference& memory) {
        const Index bytes = rows.tokens * rows.heads * channels * static_cast<Index>(size_of(rows.type));
        memory = pages_->pool.unfilled((bytes + 4095) / 4096 * 4096);
        copy_rows(rows, memory.data(), channels);
        return DeviceRows{memory.data(), rows.type, rows.tokens, rows.heads, rows.heads * channels,
                          channels,      1};
    };
    draft.keys = keep(keys, configuration.key_head_dim, draft.memory[0]);
    draft.values = keep(values, configuration.value_head_dim, draft.memory[1]);
    return draft;
}

/// To [token][head][channel].
void CudaCache::copy_rows(const DeviceRows& from, std::byte* to, Index channels) const {
    const std::size_t size = size_of(from.type);
    const auto copy = [&](const std::byte* source, Index pitch, std::byte* target, Index width) {
        const std::size_t to_pitch = to_size(from.heads * channels) * size;
        // A pitch is at least as large as a row; of one token there is none.
        const std::size_t from_pitch = from.tokens == 1 ? to_size(width) * size : to_size(pitch) * size;
        require_cuda(cudaMemcpy2DAsync(target, to_pitch, source, from_pitch, to_size(width) * size,
                                       to_size(from.tokens), cudaMemcpyDeviceToDevice, stream()),
                     "copying provisional tokens");
    };
    const auto* const source = static_cast<const std::byte*>(from.data);
    if (from.head_stride == channels && (from.tokens == 1 || from.token_stride >= from.heads * channels)) {
        copy(source, from.token_stride, to, from.heads * channels);
        return;
    }
    for (Index h = 0; h < from.heads; ++h)
        copy(source + to_size(h * from.head_stride) * size, from.token_stride,
             to + to_size(h * channels) * size, channels);
}

/// Throws Error (shape) for rows that copy_rows() does not copy.
void CudaCache::require_copied(const SequenceRows& rows, const char* name) {
    require(rows.channel_stride == 1 || rows.channels == 1, ErrorCode::shape, name,
            ": provisional tokens whose channels are ", rows.channel_stride,
            " apart on a device, expected neighbours");
    require(rows.tokens <= 1 || rows.token_stride >= rows.channels, ErrorCode::shape, name,
            ": provisional tokens that are ", rows.token_stride, " numbers apart on a device, expected ",
            rows.channels, " or more: rows of memory of their own");
}

/// Forgets the drafts of tokens from `count` on, and the fork where there are none before.
void CudaCache::forget_drafts_from(Sequence& sequence, Index count) {
    if (!sequence.before) return;
    Index at = sequence.before->tokens();
    std::size_t kept = 0;
    for (Draft& draft : sequence.drafts) {
        if (at >= count) break;
        draft.keys.tokens = draft.values.tokens = std::min(draft.keys.tokens, count - at);
        at += draft.keys.tokens;
        ++kept;
    }
    sequence.drafts.resize(kept);
    if (kept == 0) sequence.before.reset();
}

void CudaCache::truncate_one(Index layer, Index sequence, Index count) {
    if (of(layer).on_host) {
        host_->sequences(layer)[to_size(sequence)].truncate(count);
        return;
    }
    const CurrentDevice current(device());
    Sequence& one = of(layer).sequences[to_size(sequence)];
    if (count >= one.cache.tokens()) return;
    const Index settled = one.cache.tokens() - one.provisional;
    if (one.before) {
        // The tokens that stay once more, behind what was before the first tile of drafts.
        DeviceCache again = one.before->fork(stream());
        if (count < again.tokens()) again.truncate(count, stream());
        for (const Draft& draft : one.drafts) {
            DeviceRows keys = draft.keys, values = draft.values;
            keys.tokens = values.tokens = std::min(keys.tokens, count - again.tokens());
            if (keys.tokens <= 0) break;
            again.append(keys, values, stream(), AppendCheck::none);
        }
        one.cache = std::move(again);
        forget_drafts_from(one, count);
    } else {
        one.cache.truncate(count, stream());
    }
    one.provisional = std::max<Index>(0, count - settled);
    if (one.provisional == 0) one.accept_all();
    if (count == 0 && configuration(layer).fits_basis()) download_to_fit(layer);
}

void CudaCache::accept_one(Index layer, Index sequence, Index count) {
    if (of(layer).on_host) {
        host_->sequences(layer)[to_size(sequence)].accept(count);
        const CurrentDevice current(device());
        return upload_when_ready(layer);
    }
    Sequence& one = of(layer).sequences[to_size(sequence)];
    one.provisional -= count;
    if (one.provisional == 0) one.accept_all();
}

void CudaCache::reorder_all(std::span<const Index> indices) {
    const CurrentDevice current(device());
    // Each sequence goes on in one of the new ones; the others are forks.
    std::vector<std::vector<std::optional<Sequence>>> reordered(layers_.size());
    std::vector<std::size_t> heir(to_size(batch_), indices.size());
    for (std::size_t i = 0; i < indices.size(); ++i) heir[to_size(indices[i])] = i;
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
        if (layers_[layer].on_host) continue;
        for (std::size_t i = 0; i < indices.size(); ++i) {
            reordered[layer].emplace_back();
            if (heir[to_size(indices[i])] != i)
                reordered[layer].back().emplace(forked(layers_[layer].sequences[to_size(indices[i])]));
        }
    }
    host_->reorder(indices);
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
        if (layers_[layer].on_host) continue;
        std::vector<Sequence> sequences;
        for (std::size_t i = 0; i < indices.size(); ++i) {
            std::optional<Sequence>& fork = reordered[layer][i];
            sequences.push_back(std::move(fork ? *fork : layers_[layer].sequences[to_size(indices[i])]));
        }
        layers_[layer].sequences = std::move(sequences);
    }
}

// Attention ------------------------------------------------------------------------------------------------

void CudaCache::attend(Index layer, const SequenceRows& queries, const SequenceRows& output,
                       std::span<const Index> padding, const Attention& attention) {
    const Lock lock(turns());
    require_attend(layer, queries, output, padding);
    require(output.channel_stride == 1 || output.channels == 1, ErrorCode::shape, "out: channels ",
            output.channel_stride, " apart on a device, expected neighbours");
    const CurrentDevice current(device());
    pages_->enter(static_cast<cudaStream_t>(attention.stream));
    kvplane::AttentionParameters parameters = this->parameters(layer, attention);
    require(parameters.read.kind != ReadPolicy::Kind::fixed, ErrorCode::option, "read: '", attention.read,
            "' on device ", place_name(device()),
            ", expected '', tolerance, exponents, aligned or a number of bits on average");
    DeviceLayer& all = of(layer);
    if (all.on_host && !std::all_of(host_->sequences(layer).begin(), host_->sequences(layer).end(),
                                    [](const KvCache& cache) { return cache.state().layout != nullptr; })) {
        require(parameters.read.kind == ReadPolicy::Kind::all, ErrorCode::option, "read: '", attention.read,
                "' of keys in latents on device ", place_name(device()), ", expected '': all bits");
        return attend_on_host(layer, queries, output, padding, attention);
    }
    const std::vector<Attended> attended = this->attended(layer);
    if (parameters.read.kind != ReadPolicy::Kind::all) {
        const AttendLayer& of_layer = view(layer, attended[0]);
        (void)kvplane::cuda::aligned_rule(parameters.read, of_layer.prefixes, of_layer.view.key_head_dim,
                                          of_layer.view.value_head_dim);
    }
    for (Index b = 0; b < batch_; ++b) {
        const Index tokens = attended[to_size(b)].sequence.tokens,
                    rows = queries.tokens - (padding.empty() ? 0 : padding[to_size(b)]);
        require(rows <= tokens, ErrorCode::shape, "queries: ", rows, " tokens of sequence ", b,
                ", which has ", tokens, "; expected its last ones");
    }
    if (queries.tokens == 0) return;
    parameters.sink_logits = sink_logits(layer, attention);
    // As on the CPU, calls of more tokens read everything.
    if (queries.tokens > most_query_tokens) parameters.read = ReadPolicy::all();

    const bool padded = std::any_of(padding.begin(), padding.end(), [](Index rows) { return rows > 0; });
    const bool one_basis = std::all_of(attended.begin(), attended.end(), [&](const Attended& one) {
        return one.sequence.latent == attended[0].sequence.latent;
    });
    const auto in_a_row = [&](const SequenceRows& rows) {
        return rows.batch == 1 || rows.tokens == 1 || rows.batch_stride == rows.tokens * rows.token_stride;
    };
    if (!padded && one_basis && queries.tokens <= most_query_tokens && in_a_row(queries) &&
        in_a_row(output)) {
        std::vector<DeviceSequence> sequences;
        for (const Attended& one : attended) sequences.push_back(one.sequence);
        DeviceRows from = device_rows(queries, 0, 0);
        DeviceOutput to = device_output(output, 0, 0);
        from.tokens = to.tokens = batch_ * queries.tokens;
        if (queries.tokens == 1)
            from.token_stride = queries.batch_stride, to.token_stride = output.batch_stride;
        return attend_parts(view(layer, attended[0]), sequences, queries.tokens, from, to, parameters,
                            all.workspace);
    }
    for (Index b = 0; b < batch_; ++b) {
        const Attended& one = attended[to_size(b)];
        const Index first = padding.empty() ? 0 : padding[to_size(b)];
        if (first > 0) clear_rows(output, b, first);
        if (first == queries.tokens) continue;
        attend_sequence(view(layer, one), one.sequence, device_rows(queries, b, first),
                        device_output(output, b, first), parameters,
                        queries.tokens > most_query_tokens ? long_calls_ : all.workspace);
    }
}

/// The last tokens of one sequence: eight of them at a time are queries of a sequence that ends with them.
void CudaCache::attend_sequence(const AttendLayer& view, const DeviceSequence& sequence,
                                const DeviceRows& queries, const DeviceOutput& output,
                                const kvplane::AttentionParameters& parameters,
                                std::unique_ptr<AttendWorkspace>& workspace) {
    const Index before = sequence.tokens - queries.tokens;
    for (Index at = 0; at < queries.tokens;) {
        // Those that are no eight come first.
        const Index rest = (queries.tokens - at) % most_query_tokens,
                    each = rest > 0 ? rest : most_query_tokens,
                    parts = rest > 0 ? 1 : std::min((queries.tokens - at) / each, most_parts);
        std::vector<DeviceSequence> sequences;
        for (Index p = 1; p <= parts; ++p) sequences.push_back(ended_at(sequence, before + at + p * each));
        DeviceRows from = queries;
        DeviceOutput to = output;
        from.tokens = to.tokens = parts * each;
        from.data = static_cast<const std::byte*>(queries.data) +
                    to_size(at * queries.token_stride) * size_of(queries.type);
        to.data =
            static_cast<std::byte*>(output.data) + to_size(at * output.token_stride) * size_of(output.type);
        attend_parts(view, sequences, each, from, to, parameters, workspace);
        at += parts * each;
    }
}

void CudaCache::attend_parts(const AttendLayer& view, std::span<const DeviceSequence> sequences,
                             Index query_tokens, DeviceRows queries, DeviceOutput output,
                             const kvplane::AttentionParameters& parameters,
                             std::unique_ptr<AttendWorkspace>& workspace) {
    if (!workspace) workspace = std::make_unique<AttendWorkspace>();
    workspace->plan(view, sequences, query_tokens, parameters, stream());
    workspace->attend(queries, output, nullptr, stream());
}

std::vector<CudaCache::Attended> CudaCache::attended(Index layer) {
    DeviceLayer& all = of(layer);
    std::vector<Attended> made;
    for (const Sequence& one : all.sequences)
        made.push_back({one.cache.sequence(), &one.cache.shape(), one.cache.state().latent});
    if (!all.on_host) return made;
    const std::vector<KvCache>& caches = host_->sequences(layer);
    all.mirrored.resize(caches.size());
    all.mirrored_pages.begin();
    for (std::size_t b = 0; b < caches.size(); ++b) {
        all.mirrored[b].show(caches[b], all.mirrored_pages, pages_->pool, stream());
        made.push_back({all.mirrored[b].sequence(caches[b]), &caches[b].shape(), caches[b].state().latent});
    }
    all.mirrored_pages.end();
    return made;
}

const AttendLayer& CudaCache::view(Index layer, const Attended& sequence) {
    const auto basis = configuration(layer).fits_basis() ? sequence.latent : nullptr;
    std::vector<View>& views = of(layer).views;
    for (const View& one : views)
        if (one.basis == basis) return one.layer;
    // Those of sequences that are gone go.
    if (views.size() > 2 * to_size(batch_))
        std::erase_if(views, [](const View& one) { return one.basis.use_count() <= 2; });
    views.push_back({basis, kvplane::cuda::attend_layer(*sequence.shape, {}, basis)});
    return views.back().layer;
}

std::span<const float> CudaCache::sink_logits(Index layer, const Attention& attention) {
    if (!attention.device_sink_logits.empty() || attention.sink_logits.empty())
        return attention.device_sink_logits;
    DeviceLayer& all = of(layer);
    const std::size_t count = attention.sink_logits.size();
    if (all.sink_logits != attention.sink_logits) {
        const std::size_t bytes = count * sizeof(float);
        if (!all.sink_logits_there || to_size(all.sink_logits_there.bytes()) < bytes)
            all.sink_logits_there = pages_->pool.unfilled(static_cast<Index>((bytes + 255) / 256 * 256));
        all.sink_logits.clear();
        require_cuda(cudaMemcpyAsync(all.sink_logits_there.data(), attention.sink_logits.data(), bytes,
                                     cudaMemcpyHostToDevice, stream()),
                     "copying sink logits");
        all.sink_logits = attention.sink_logits;
    }
    return {reinterpret_cast<const float*>(all.sink_logits_there.data()), count};
}

void CudaCache::clear_rows(const SequenceRows& output, Index sequence, Index rows) const {
    const std::size_t size = size_of(output.type);
    const bool together = output.head_stride == output.channels || output.heads == 1;
    const Index width = together ? output.heads * output.channels : output.channels;
    for (Index h = 0; h < (together ? 1 : output.heads); ++h)
        require_cuda(cudaMemset2DAsync(output.at(sequence, 0) + to_size(h * output.head_stride) * size,
                                       to_size(rows == 1 ? width : output.token_stride) * size, 0,
                                       to_size(width) * size, to_size(rows), stream()),
                     "clearing rows of padding");
}

/// While sequences learn what they are stored by, a few hundred tokens, the CPU attends to them.
void CudaCache::attend_on_host(Index layer, const SequenceRows& queries, const SequenceRows& output,
                               std::span<const Index> padding, const Attention& attention) {
    if (queries.tokens == 0) return;
    const Fetched query_rows(queries, stream());
    Attention on_host = attention;
    if (!attention.device_sink_logits.empty()) {
        on_host.sink_logits.resize(attention.device_sink_logits.size());
        require_cuda(
            cudaMemcpyAsync(on_host.sink_logits.data(), attention.device_sink_logits.data(),
                            on_host.sink_logits.size() * sizeof(float), cudaMemcpyDeviceToHost, stream()),
            "copying sink logits");
    }
    require_cuda(cudaStreamSynchronize(stream()), "waiting for queries");
    // [batch][token][head][channel]
    SequenceRows rows = output;
    rows.channel_stride = 1;
    rows.head_stride = rows.channels;
    rows.token_stride = rows.heads * rows.channels;
    rows.batch_stride = rows.tokens * rows.token_stride;
    const std::size_t size = size_of(rows.type);
    std::vector<std::byte> bytes(to_size(rows.batch * rows.batch_stride) * size);
    rows.data = bytes.data();
    host_->attend(layer, query_rows.rows(), rows, padding, on_host);
    const bool together = output.head_stride == output.channels || output.heads == 1;
    const Index width = together ? rows.token_stride : rows.channels;
    for (Index b = 0; b < rows.batch; ++b)
        for (Index h = 0; h < (together ? 1 : rows.heads); ++h)
            require_cuda(cudaMemcpy2DAsync(output.at(b, 0) + to_size(h * output.head_stride) * size,
                                           to_size(rows.tokens == 1 ? width : output.token_stride) * size,
                                           rows.at(b, 0) + to_size(h * rows.head_stride) * size,
                                           to_size(rows.token_stride) * size, to_size(width) * size,
                                           to_size(rows.tokens), cudaMemcpyHostToDevice, stream()),
                         "copying output to the device");
    // What is copied goes with this call.
    require_cuda(cudaStreamSynchronize(stream()), "waiting for output");
}

}  // namespace

bool cuda_is_built() noexcept {
    return true;
}
int cuda_device_count() noexcept {
    int count = 0;
    const cudaError_t result = cudaGetDeviceCount(&count);
    (void)cudaGetLastError();
    return result == cudaSuccess ? count : 0;
}
std::unique_ptr<Cache> make_cuda_cache(Contents contents, Index batch, Index threads, int device) {
    return std::make_unique<CudaCache>(std::move(contents), batch, threads, device);
}

}  // namespace kvplane_python
