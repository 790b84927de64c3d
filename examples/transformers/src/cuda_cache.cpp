#include "cuda_cache.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

#include "device_attention.hpp"
#include "device_pages.hpp"
#include "drafted_sequence.hpp"
#include "host_cache.hpp"
#include "kvplane/cache/capabilities.hpp"
#include "mirrored_pages.hpp"

namespace kvplane_python {

using kvplane::CacheConfiguration;
using kvplane::ReadPolicy;
using kvplane::cuda::AppendCheck;

namespace {

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
            layer.mirrors = kvplane::cuda::host_appends_because(configuration(i)) != nullptr;
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
            for (const DraftedSequence& sequence : of(i).sequences) bytes.add(sequence.cache());
        }
        return bytes.sum();
    }
    Matrix stored(kvplane::TileSide side, Index layer, Index sequence) const override {
        const Lock lock(turns());
        require_sequence(layer, sequence);
        if (of(layer).on_host) return stored_of(host_->sequences(layer)[to_size(sequence)], side);
        const CurrentDevice current(device());
        kvplane::TilePool pool;
        return stored_of(of(layer).sequences[to_size(sequence)].cache().download(pool, stream()), side);
    }

    void save(const std::filesystem::path& path, bool compress, bool sync) const override;
    void load(const std::filesystem::path& path) override;

  private:
    struct DeviceLayer {
        /// While sequences have yet to learn what they are stored by; for good where `mirrors`.
        bool on_host = false;
        /// Whether the CPU appends every token. What it stores is copied to the device, which attends to it.
        bool mirrors = false;
        MirroredPages mirrored_pages;
        std::vector<MirroredSequence> mirrored;
        bool truncates_exactly = false;
        mutable std::vector<DraftedSequence> sequences;  ///< a download takes over what kernels have found
        DeviceAttention attention;

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
            for (const DraftedSequence& sequence : layer.sequences)
                copy.sequences.push_back(sequence.fork(stream()));
        }
    }

    DeviceLayer& of(Index layer) { return layers_[to_size(layer)]; }
    const DeviceLayer& of(Index layer) const { return layers_[to_size(layer)]; }
    cudaStream_t stream() const { return pages_->stream; }

    std::mutex& turns() const override { return pages_->turns; }
    Standing standing(Index layer, Index sequence) const override {
        if (of(layer).on_host) return host_->standing(layer, sequence);
        const DraftedSequence& one = of(layer).sequences[to_size(sequence)];
        const auto& state = one.cache().state();
        return {one.cache().tokens(), one.provisional(), state.packed(), one.cache().first_kept(),
                state.hides()};
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

    /// No tokens: on the device, or where the cache has a basis to fit, on the host.
    void start(Index layer) {
        DeviceLayer& made = of(layer);
        made.sequences.clear();
        made.attention.forget_views();
        made.forget_mirrors();
        made.on_host = made.mirrors || configuration(layer).fits_basis();
        if (made.on_host) return;
        for (Index b = 0; b < batch_; ++b)
            made.sequences.emplace_back(DeviceCache(configuration(layer), pages_->pool),
                                        made.truncates_exactly);
    }

    static bool is_ready(const std::vector<KvCache>& sequences) {
        return std::all_of(sequences.begin(), sequences.end(), [](const KvCache& cache) {
            return cache.state().layout && cache.provisional_tokens() == 0 && !cache.needs_queries();
        });
    }
    std::vector<DraftedSequence> uploaded(Index layer, const std::vector<KvCache>& sequences) const {
        std::vector<const KvCache*> all;
        for (const KvCache& cache : sequences) all.push_back(&cache);
        std::vector<DraftedSequence> made;
        for (DeviceCache& cache : DeviceCache::upload(all, pages_->pool, stream()))
            made.emplace_back(std::move(cache), of(layer).truncates_exactly);
        return made;
    }
    void upload_when_ready(Index layer) {
        if (!of(layer).on_host || of(layer).mirrors || !is_ready(host_->sequences(layer))) return;
        std::vector<KvCache> empty = host_->empty_sequences(layer);
        of(layer).sequences = uploaded(layer, host_->sequences(layer));
        host_->sequences(layer) = std::move(empty);
        of(layer).on_host = false;
        of(layer).forget_mirrors();
    }
    /// Of a sequence that has to fit its basis anew, the whole layer.
    void download_to_fit(Index layer) {
        std::vector<DeviceCache*> all;
        for (DraftedSequence& sequence : of(layer).sequences) all.push_back(&sequence.cache());
        std::vector<KvCache> caches = DeviceCache::download(all, host_->pool(), stream());
        for (KvCache& cache : caches)
            if (cache.tokens() == 0) cache = KvCache(configuration(layer), host_->pool());
        host_->sequences(layer) = std::move(caches);
        of(layer).sequences.clear();
        of(layer).on_host = true;
    }

    // Calls

    void append_to_host(Index layer, const SequenceRows& keys, const SequenceRows& values,
                        const SequenceRows* queries, std::span<const Index> padding,
                        const AppendOptions& options);
    void append_to_device(Index layer, const SequenceRows& keys, const SequenceRows& values,
                          std::span<const Index> padding, const AppendOptions& options);
    void attend_on_host(Index layer, const SequenceRows& queries, const SequenceRows& output,
                        std::span<const Index> padding, const Attention& attention);
    std::vector<Attended> attended(Index layer);

    std::shared_ptr<SharedPages> pages_;  ///< before what is in them
    std::unique_ptr<HostCache> host_;  ///< of the same batch; its layers are empty but for those on the host
    std::vector<DeviceLayer> layers_;
    DeviceAttention::Workspace long_calls_;  ///< of calls of many query tokens, for all layers
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
            DraftedSequence& sequence = of(i).sequences[b];
            require(sequence.provisional() == 0, ErrorCode::option, "save: sequence ", b, ", layer ", i, ": ",
                    sequence.provisional(),
                    " provisional tokens, expected none; accept() or truncate() come before it");
            caches.push_back(&sequence.cache());
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
    std::vector<std::vector<DraftedSequence>> sequences(to_size(layers()));
    std::vector<bool> uploads(to_size(layers()));
    for (Index i = 0; i < layers(); ++i) {
        uploads[to_size(i)] = !of(i).mirrors && is_ready(host->sequences(i));
        if (!uploads[to_size(i)]) continue;
        sequences[to_size(i)] = uploaded(i, host->sequences(i));
        host->sequences(i) = host->empty_sequences(i);
    }
    batch_ = host->batch();
    host_ = std::move(host);
    for (Index i = 0; i < layers(); ++i) {
        of(i).attention.forget_views();
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
    std::vector<DraftedSequence>& all = of(layer).sequences;
    const AppendCheck check = options.check ? AppendCheck::wait : AppendCheck::none;
    if (options.provisional) {
        all[0].require_kept(keys, "keys");
        all[0].require_kept(values, "values");
    }
    for (Index b = 0; b < batch_; ++b) {
        const Standing now = standing(layer, b);
        const Index seen = window(layer) > 0 ? first_seen(layer, now) : 0;
        if (seen > now.first_kept) all[to_size(b)].cache().drop_before(seen, 0, stream());
    }
    std::vector<Index> before;
    std::vector<DeviceCache> forks;  // to which a batch goes back that is refused in its middle
    try {
        for (Index b = 0; b < batch_; ++b) {
            DraftedSequence& sequence = all[to_size(b)];
            const Index first = padding.empty() ? 0 : padding[to_size(b)];
            before.push_back(sequence.cache().tokens());
            if (options.check && batch_ > 1) forks.push_back(sequence.cache().fork(stream()));
            if (first == keys.tokens) continue;
            sequence.append(device_rows(keys, b, first), device_rows(values, b, first), options.provisional,
                            check, stream());
        }
    } catch (...) {
        for (std::size_t b = 0; b < before.size(); ++b)
            all[b].take_back(before[b], options.provisional, b < forks.size() ? &forks[b] : nullptr,
                             stream());
        throw;
    }
    // append() of others accepts the provisional ones.
    if (!options.provisional)
        for (DraftedSequence& sequence : all) sequence.accept_all();
}

void CudaCache::truncate_one(Index layer, Index sequence, Index count) {
    if (of(layer).on_host) {
        host_->sequences(layer)[to_size(sequence)].truncate(count);
        return;
    }
    const CurrentDevice current(device());
    DraftedSequence& one = of(layer).sequences[to_size(sequence)];
    if (count >= one.cache().tokens()) return;
    one.truncate(count, stream());
    if (count == 0 && configuration(layer).fits_basis()) download_to_fit(layer);
}

void CudaCache::accept_one(Index layer, Index sequence, Index count) {
    if (of(layer).on_host) {
        host_->sequences(layer)[to_size(sequence)].accept(count);
        const CurrentDevice current(device());
        return upload_when_ready(layer);
    }
    of(layer).sequences[to_size(sequence)].accept(count);
}

void CudaCache::reorder_all(std::span<const Index> indices) {
    const CurrentDevice current(device());
    // Each sequence goes on in one of the new ones; the others are forks.
    std::vector<std::vector<std::optional<DraftedSequence>>> reordered(layers_.size());
    std::vector<std::size_t> heir(to_size(batch_), indices.size());
    for (std::size_t i = 0; i < indices.size(); ++i) heir[to_size(indices[i])] = i;
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
        if (layers_[layer].on_host) continue;
        for (std::size_t i = 0; i < indices.size(); ++i) {
            reordered[layer].emplace_back();
            if (heir[to_size(indices[i])] != i)
                reordered[layer].back().emplace(layers_[layer].sequences[to_size(indices[i])].fork(stream()));
        }
    }
    host_->reorder(indices);
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
        if (layers_[layer].on_host) continue;
        std::vector<DraftedSequence> sequences;
        for (std::size_t i = 0; i < indices.size(); ++i) {
            std::optional<DraftedSequence>& fork = reordered[layer][i];
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
        const kvplane::cuda::AttendLayer& view = all.attention.view(attended[0], attended.size());
        (void)kvplane::cuda::aligned_rule(parameters.read, view.prefixes, view.view.key_head_dim,
                                          view.view.value_head_dim);
    }
    for (Index b = 0; b < batch_; ++b) {
        const Index tokens = attended[to_size(b)].sequence.tokens,
                    rows = queries.tokens - (padding.empty() ? 0 : padding[to_size(b)]);
        require(rows <= tokens, ErrorCode::shape, "queries: ", rows, " tokens of sequence ", b,
                ", which has ", tokens, "; expected its last ones");
    }
    if (queries.tokens == 0) return;
    parameters.sink_logits = all.attention.sink_logits(attention, pages_->pool, stream());
    all.attention.attend(attended, queries, output, padding, parameters, long_calls_, stream());
}

std::vector<Attended> CudaCache::attended(Index layer) {
    DeviceLayer& all = of(layer);
    std::vector<Attended> made;
    for (const DraftedSequence& one : all.sequences)
        made.push_back({one.cache().sequence(), &one.cache().shape(), one.cache().state().latent});
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
    for (Index b = 0; b < rows.batch; ++b)
        copy_rows(device_rows(rows, b, 0), device_output(output, b, 0), rows.channels, cudaMemcpyHostToDevice,
                  stream());
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
