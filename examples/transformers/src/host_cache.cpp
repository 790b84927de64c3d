#include "host_cache.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "kvplane/io/session_file.hpp"

namespace kvplane_python {

using kvplane::CacheConfiguration;
using kvplane::KvCache;
using kvplane::detail::AnyRows;

namespace {

/// One team for each number of threads, which all caches of the process share.
std::shared_ptr<kvplane::ThreadExecutor> team(Index threads) {
    static std::mutex mutex;
    static std::map<Index, std::weak_ptr<kvplane::ThreadExecutor>> teams;
    require(threads >= 1, ErrorCode::option, "threads: ", threads, ", expected at least 1");
    if (threads == 1) return nullptr;
    const std::lock_guard lock(mutex);
    auto executor = teams[threads].lock();
    if (!executor) teams[threads] = executor = std::make_shared<kvplane::ThreadExecutor>(threads);
    return executor;
}

/// Throws Error (not_finite, beyond_fp16) for what no cache stores, so that a batch is appended as a whole or
/// not at all.
void require_storable(const SequenceRows& all, const char* name, std::span<const Index> padding) {
    for (Index b = 0; b < all.batch; ++b) {
        const Index first = padding.empty() ? 0 : padding[static_cast<std::size_t>(b)];
        all.of(b, first).visit([&](const auto& rows) {
            for (Index h = 0; h < rows.heads(); ++h)
                for (Index t = 0; t < rows.tokens(); ++t)
                    for (Index c = 0; c < rows.head_dim(); ++c) {
                        const auto x = static_cast<float>(*rows.at(h, t, c));
                        require(x - x == 0.0f, ErrorCode::not_finite, name, ": the value at sequence ", b,
                                ", token ", first + t, ", head ", h, ", channel ", c, " is ", x,
                                "; expected finite values");
                        require(x <= 65504.0f && x >= -65504.0f, ErrorCode::beyond_fp16, name,
                                ": the value at sequence ", b, ", token ", first + t, ", head ", h,
                                ", channel ", c, " is ", x,
                                "; expected a magnitude of at most 65504, the largest fp16");
                    }
        });
    }
}

}  // namespace

// Life -----------------------------------------------------------------------------------------------------

HostCache::HostCache(Contents contents, Index batch, Index threads)
    : Cache(std::move(contents), batch),
      pool_(std::make_shared<kvplane::TilePool>()),
      executor_(team(threads)),
      workspace_(std::make_unique<kvplane::AttentionWorkspace>(executor_.get())) {
    for (Index i = 0; i < layers(); ++i) caches_.push_back(empty_sequences(i));
}
HostCache::HostCache(const HostCache& other, const Lock&)
    : Cache(other.contents_, other.batch_),
      pool_(other.pool_),
      executor_(other.executor_),
      workspace_(std::make_unique<kvplane::AttentionWorkspace>(executor_.get())) {
    for (const Sequences& sequences : other.caches_) {
        Sequences& forks = caches_.emplace_back();
        for (const KvCache& cache : sequences) forks.push_back(cache.fork());
    }
}
std::unique_ptr<HostCache> HostCache::forked() const {
    const Lock lock(mutex_);
    return std::unique_ptr<HostCache>(new HostCache(*this, lock));
}
HostCache::Sequences HostCache::empty_sequences(Index layer) const {
    Sequences sequences;
    sequences.emplace_back(configuration(layer), *pool_);
    while (static_cast<Index>(sequences.size()) < batch_) sequences.push_back(sequences[0].fork());
    return sequences;
}

void save_all(const std::vector<const KvCache*>& caches, const std::filesystem::path& path, bool compress,
              bool sync) {
    kvplane::save_session(caches, path, {.sync = sync, .compress = compress});
}

void HostCache::save(const std::filesystem::path& path, bool compress, bool sync) const {
    const Lock lock(mutex_);
    std::vector<const KvCache*> all;  // [sequence][layer]
    for (std::size_t b = 0; b < caches_[0].size(); ++b)
        for (const Sequences& sequences : caches_) all.push_back(&sequences[b]);
    save_all(all, path, compress, sync);
}

void HostCache::load(const std::filesystem::path& path) {
    const Lock lock(mutex_);
    const auto file = kvplane::SessionFile::open(path);
    require(file.layers() > 0 && file.layers() % layers() == 0, ErrorCode::mismatch, "'", path.string(),
            "': ", file.layers(), " caches, expected a multiple of ", layers(),
            ", one for each layer and sequence");
    std::vector<CacheConfiguration> all;
    for (Index b = 0; b < file.layers() / layers(); ++b)
        all.insert(all.end(), contents_.configurations.begin(), contents_.configurations.end());
    std::vector<KvCache> loaded = file.load(all, *pool_);
    std::vector<Sequences> caches(caches_.size());
    for (std::size_t i = 0; i < loaded.size(); ++i) caches[i % caches.size()].push_back(std::move(loaded[i]));
    caches_ = std::move(caches);
    batch_ = static_cast<Index>(caches_[0].size());
}

// What it says of itself -----------------------------------------------------------------------------------

Cache::Standing HostCache::standing(Index layer, Index sequence) const {
    const KvCache& cache = sequences(layer)[static_cast<std::size_t>(sequence)];
    return {cache.tokens(), cache.provisional_tokens(), cache.packed_tokens(), cache.first_kept(),
            cache.state().hides()};
}
bool HostCache::learns_from_queries(Index layer) const {
    const Sequences& all = sequences(layer);
    return std::any_of(all.begin(), all.end(), [](const KvCache& cache) { return cache.needs_queries(); });
}
bool HostCache::looks_at_queries(Index layer) const {
    return learns_from_queries(layer) || configuration(layer).widths_by_token();
}
Index HostCache::bytes() const {
    const Lock lock(mutex_);
    BytesOnce bytes;
    for (const Sequences& sequences : caches_)
        for (const KvCache& cache : sequences) bytes.add(cache);
    return bytes.sum();
}
Matrix HostCache::stored(kvplane::TileSide side, Index layer, Index sequence) const {
    const Lock lock(mutex_);
    require_sequence(layer, sequence);
    return stored_of(sequences(layer)[static_cast<std::size_t>(sequence)], side);
}

// Tokens ---------------------------------------------------------------------------------------------------

void HostCache::append(Index layer, const SequenceRows& keys, const SequenceRows& values,
                       const SequenceRows* queries, std::span<const Index> padding,
                       const AppendOptions& options) {
    const Lock lock(mutex_);
    require_append(layer, keys, values, queries, padding);
    Sequences& all = sequences(layer);
    if (all.size() > 1) {
        require_storable(keys, "keys", padding);
        require_storable(values, "values", padding);
    }
    drop_unseen(layer);
    std::vector<Index> before;
    try {
        for (std::size_t b = 0; b < all.size(); ++b) {
            const Index first = padding.empty() ? 0 : padding[b], sequence = static_cast<Index>(b);
            KvCache& cache = all[b];
            before.push_back(cache.tokens());
            if (first == keys.tokens) continue;
            const AnyRows k = keys.of(sequence, first), v = values.of(sequence, first);
            if (queries) {
                const AnyRows q = queries->of(sequence, first);
                options.provisional ? cache.append_provisional(k, v, q) : cache.append(k, v, q, *workspace_);
            } else {
                options.provisional ? cache.append_provisional(k, v) : cache.append(k, v, *workspace_);
            }
        }
    } catch (...) {
        for (std::size_t b = 0; b < before.size(); ++b) all[b].truncate(before[b]);
        throw;
    }
}

void HostCache::drop_unseen(Index layer) {
    if (window(layer) == 0) return;
    for (Index b = 0; b < batch_; ++b) {
        KvCache& cache = sequences(layer)[static_cast<std::size_t>(b)];
        const Index seen = first_seen(layer, standing(layer, b));
        if (seen > cache.first_kept()) cache.drop_before(seen, 0);
    }
}

void HostCache::truncate_one(Index layer, Index sequence, Index count) {
    sequences(layer)[static_cast<std::size_t>(sequence)].truncate(count);
}
void HostCache::accept_one(Index layer, Index sequence, Index count) {
    sequences(layer)[static_cast<std::size_t>(sequence)].accept(count);
}
void HostCache::clear() {
    const Lock lock(mutex_);
    for (Sequences& sequences : caches_)
        for (KvCache& cache : sequences) cache.clear();
}
void HostCache::reorder_all(std::span<const Index> indices) {
    std::vector<Sequences> reordered(caches_.size());
    for (std::size_t i = 0; i < caches_.size(); ++i)
        for (const Index index : indices)
            reordered[i].push_back(caches_[i][static_cast<std::size_t>(index)].fork());
    caches_ = std::move(reordered);
}

// Attention ------------------------------------------------------------------------------------------------

namespace {

/// body(Eigen matrix [rows, heads * channels]) over memory of any strides: the memory itself where heads
/// stand side by side, otherwise a matrix that is copied to it.
template <class Body>
void with_output(const SequenceRows& output, void* first, Index rows, Index row_stride, const Body& body) {
    const bool in_place =
        output.channel_stride == 1 && (output.head_stride == output.channels || output.heads == 1);
    with_scalar(output.type, first, [&]<class Scalar>(Scalar* data) {
        const Index columns = output.heads * output.channels;
        if (in_place) {
            Eigen::Map<kvplane::RowMajorMatrix<Scalar>, 0, Eigen::OuterStride<>> map(
                data, rows, columns, Eigen::OuterStride<>(row_stride));
            return body(map);
        }
        kvplane::RowMajorMatrix<Scalar> matrix(rows, columns);
        body(matrix);
        for (Index r = 0; r < rows; ++r)
            for (Index h = 0; h < output.heads; ++h)
                for (Index c = 0; c < output.channels; ++c)
                    data[r * row_stride + h * output.head_stride + c * output.channel_stride] =
                        matrix(r, h * output.channels + c);
    });
}

}  // namespace

void HostCache::attend(Index layer, const SequenceRows& queries, const SequenceRows& output,
                       std::span<const Index> padding, const Attention& attention) {
    const Lock lock(mutex_);
    require_attend(layer, queries, output, padding);
    const Sequences& all = sequences(layer);
    const kvplane::AttentionParameters parameters = this->parameters(layer, attention);
    if (queries.tokens == 0) return;
    const bool padded = std::any_of(padding.begin(), padding.end(), [](Index rows) { return rows > 0; });
    if (queries.tokens == 1 && !padded) {
        std::vector<const KvCache*> caches;
        for (const KvCache& cache : all) caches.push_back(&cache);
        std::vector<Index> offsets(caches.size() + 1);
        std::iota(offsets.begin(), offsets.end(), Index{0});
        with_output(output, output.data, output.batch, output.batch_stride, [&](auto& out) {
            KvCache::attend_batch(caches, offsets, queries.one_token_each(), out, parameters, *workspace_);
        });
        return;
    }
    for (std::size_t b = 0; b < all.size(); ++b) {
        const Index first = padding.empty() ? 0 : padding[b], rows = queries.tokens - first;
        const auto sequence = static_cast<Index>(b);
        auto* const start = static_cast<std::byte*>(output.data);
        with_output(output, start + output.bytes_to(sequence, 0), first, output.token_stride,
                    [](auto& out) { out.setZero(); });
        if (rows > 0)
            with_output(
                output, start + output.bytes_to(sequence, first), rows, output.token_stride,
                [&](auto& out) { all[b].attend(queries.of(sequence, first), out, parameters, *workspace_); });
    }
}

}  // namespace kvplane_python
