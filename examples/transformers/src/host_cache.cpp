#include "cache.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "kvplane/io/session_file.hpp"
#include "kvplane/recipe_names.hpp"

namespace kvplane_python {

using kvplane::CacheConfiguration;
using kvplane::KvCache;
using kvplane::detail::AnyRows;

namespace {

using Lock = std::lock_guard<std::mutex>;

/// One team for each number of threads, which all caches of the process share.
std::shared_ptr<kvplane::ThreadExecutor> team(Index threads) {
    static std::mutex mutex;
    static std::map<Index, std::weak_ptr<kvplane::ThreadExecutor>> teams;
    require(threads >= 1, ErrorCode::option, "threads: ", threads, ", expected at least 1");
    if (threads == 1) return nullptr;
    const Lock lock(mutex);
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

CacheConfiguration Layer::configuration() const {
    CacheConfiguration c;
    c.kv_heads = kv_heads;
    c.query_heads = query_heads;
    c.key_head_dim = head_dim;
    c.value_head_dim = value_head_dim;
    c.rope = rope;
    if (sliding_window > 0) c.context = sliding_window;
    return c;
}
std::string Layer::text() const {
    const auto number = [](Index n) { return std::to_string(n); };
    std::string text = "kvplane.Layer(kv_heads=";
    text.append(number(kv_heads)).append(", query_heads=").append(number(query_heads)).append(", head_dim=");
    text.append(number(head_dim));
    if (value_head_dim != head_dim) text.append(", value_head_dim=").append(number(value_head_dim));
    if (sliding_window > 0) text.append(", sliding_window=").append(number(sliding_window));
    return text.append(rope ? ", rope=...)" : ")");
}

// Life -----------------------------------------------------------------------------------------------------

Cache::Cache(std::vector<Layer> layers, const std::vector<std::string>& recipes, Index batch, Index threads,
             std::uint64_t rotation_seed)
    : layers_(std::move(layers)) {
    require(!layers_.empty(), ErrorCode::shape, "layers: none, expected at least 1");
    require(recipes.size() == 1 || recipes.size() == layers_.size(), ErrorCode::shape,
            "recipe: ", recipes.size(), " names for ", layers_.size(),
            " layers, expected one for all or one for each");
    std::vector<CacheConfiguration> configurations;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        recipes_.push_back(recipes[recipes.size() == 1 ? 0 : i]);
        CacheConfiguration& c = configurations.emplace_back(layers_[i].configuration());
        c.recipe = kvplane::recipes::parse(recipes_.back());
        c.rotation_seed = rotation_seed;
    }
    begin(configurations, batch, threads);
}
Cache::Cache(std::vector<Layer> layers, const kvplane::ModelPolicy& policy, const std::string& model,
             Index batch, Index threads)
    : layers_(std::move(layers)) {
    std::vector<CacheConfiguration> own;
    for (const Layer& layer : layers_) own.push_back(layer.configuration());
    policy.require_model(model, own);
    for (const CacheConfiguration& c : policy.configurations()) recipes_.push_back(c.recipe.name);
    begin(policy.configurations(), batch, threads);
}

void Cache::begin(const std::vector<CacheConfiguration>& configurations, Index batch, Index threads) {
    require(batch >= 1, ErrorCode::option, "batch: ", batch, ", expected at least 1");
    for (std::size_t i = 0; i < layers_.size(); ++i)
        require(layers_[i].sliding_window >= 0, ErrorCode::option, "layer ", i, ": a sliding window of ",
                layers_[i].sliding_window, ", expected at least 1, or 0 for none");
    configurations_ = configurations;
    executor_ = team(threads);
    pool_ = std::make_shared<kvplane::TilePool>();
    workspace_ = std::make_unique<kvplane::AttentionWorkspace>(executor_.get());
    for (const CacheConfiguration& c : configurations_) {
        Sequences& sequences = caches_.emplace_back();
        sequences.emplace_back(c, *pool_);
        while (static_cast<Index>(sequences.size()) < batch) sequences.push_back(sequences[0].fork());
    }
}

void Cache::save(const std::filesystem::path& path, bool compress, bool sync) const {
    const Lock lock(mutex_);
    std::vector<const KvCache*> all;  // [sequence][layer]
    for (std::size_t b = 0; b < caches_[0].size(); ++b)
        for (const Sequences& sequences : caches_) all.push_back(&sequences[b]);
    kvplane::save_session(all, path, {.sync = sync, .compress = compress});
}

void Cache::load(const std::filesystem::path& path) {
    const Lock lock(mutex_);
    const auto file = kvplane::SessionFile::open(path);
    require(file.layers() > 0 && file.layers() % layers() == 0, ErrorCode::mismatch, "'", path.string(),
            "': ", file.layers(), " caches, expected a multiple of ", layers(),
            ", one for each layer and sequence");
    std::vector<CacheConfiguration> all;
    for (Index b = 0; b < file.layers() / layers(); ++b)
        all.insert(all.end(), configurations_.begin(), configurations_.end());
    std::vector<KvCache> loaded = file.load(all, *pool_);
    std::vector<Sequences> caches(caches_.size());
    for (std::size_t i = 0; i < loaded.size(); ++i) caches[i % caches.size()].push_back(std::move(loaded[i]));
    caches_ = std::move(caches);
}

std::unique_ptr<Cache> Cache::fork() const {
    const Lock lock(mutex_);
    std::unique_ptr<Cache> copy(new Cache);
    copy->layers_ = layers_;
    copy->recipes_ = recipes_;
    copy->configurations_ = configurations_;
    copy->pool_ = pool_;
    copy->executor_ = executor_;
    copy->workspace_ = std::make_unique<kvplane::AttentionWorkspace>(executor_.get());
    for (const Sequences& sequences : caches_) {
        Sequences& forks = copy->caches_.emplace_back();
        for (const KvCache& cache : sequences) forks.push_back(cache.fork());
    }
    return copy;
}

// What it says of itself -----------------------------------------------------------------------------------

Cache::Sequences& Cache::sequences(Index layer) {
    require(layer >= 0 && layer < layers(), ErrorCode::index, "layer ", layer, " of ", layers());
    return caches_[static_cast<std::size_t>(layer)];
}
const Cache::Sequences& Cache::sequences(Index layer) const {
    return const_cast<Cache&>(*this).sequences(layer);
}
const Layer& Cache::layer(Index layer) const {
    sequences(layer);
    return layers_[static_cast<std::size_t>(layer)];
}

Index Cache::batch() const {
    const Lock lock(mutex_);
    return static_cast<Index>(caches_[0].size());
}

namespace {

template <class Number>
std::vector<Index> of_each(const std::vector<KvCache>& sequences, const Number& number) {
    std::vector<Index> all;
    for (const KvCache& cache : sequences) all.push_back(number(cache));
    return all;
}

}  // namespace

std::vector<Index> Cache::tokens(Index layer) const {
    const Lock lock(mutex_);
    return of_each(sequences(layer), [](const KvCache& cache) { return cache.tokens(); });
}
std::vector<Index> Cache::provisional_tokens(Index layer) const {
    const Lock lock(mutex_);
    return of_each(sequences(layer), [](const KvCache& cache) { return cache.provisional_tokens(); });
}
std::vector<Index> Cache::packed_tokens(Index layer) const {
    const Lock lock(mutex_);
    return of_each(sequences(layer), [](const KvCache& cache) { return cache.packed_tokens(); });
}
std::vector<Index> Cache::first_kept(Index layer) const {
    const Lock lock(mutex_);
    return of_each(sequences(layer), [](const KvCache& cache) { return cache.first_kept(); });
}
bool Cache::needs_queries(Index layer) const {
    const Lock lock(mutex_);
    const Sequences& all = sequences(layer);
    return std::any_of(all.begin(), all.end(), [](const KvCache& cache) { return cache.needs_queries(); });
}
bool Cache::uses_queries(Index layer) const {
    return needs_queries(layer) || configurations_[static_cast<std::size_t>(layer)].widths_by_token();
}

Index Cache::bytes() const {
    const Lock lock(mutex_);
    std::map<const void*, Index> pages, bases;
    Index sum = 0;
    for (const Sequences& sequences : caches_)
        for (const KvCache& cache : sequences) {
            const auto& state = cache.state();
            // What is not in pages: the moments and bases that a cache has learned.
            const Index learned = cache.bytes() - state.page_bytes();
            const bool own_basis = cache.configuration().fits_basis() && state.latent;
            const Index basis = own_basis ? state.latent->bytes() : 0;
            if (own_basis) bases[state.latent.get()] = basis;
            sum += learned - basis;
            const auto add = [&](const kvplane::PageReference& page) {
                if (page) pages[page.data()] = page.bytes() + kvplane::PageReference::header_bytes;
            };
            add(state.sinks);
            for (const auto& page : state.tile_pages) add(page);
            for (const auto& page : state.recent) add(page);
        }
    for (const auto& [page, size] : pages) sum += size;
    for (const auto& [basis, size] : bases) sum += size;
    return sum;
}

double Cache::bits_per_element() const {
    const double bits = 8.0 * static_cast<double>(bytes());
    const Lock lock(mutex_);
    double elements = 0.0;
    for (std::size_t i = 0; i < caches_.size(); ++i)
        for (const KvCache& cache : caches_[i]) {
            const Index window = layers_[i].sliding_window;
            const Index tokens = window > 0 ? std::min(window, cache.tokens()) : cache.tokens();
            elements += static_cast<double>(tokens * cache.configuration().elements_per_token());
        }
    return elements > 0.0 ? bits / elements : 0.0;
}

Matrix Cache::stored(kvplane::TileSide side, Index layer, Index sequence) const {
    const Lock lock(mutex_);
    const Sequences& all = sequences(layer);
    require(sequence >= 0 && sequence < static_cast<Index>(all.size()), ErrorCode::index, "sequence ",
            sequence, " of ", all.size());
    const KvCache& cache = all[static_cast<std::size_t>(sequence)];
    const Index first = cache.first_kept() > cache.state().kept_sinks ? cache.first_kept() : 0;
    return side == kvplane::TileSide::keys ? cache.stored_keys(first, cache.tokens() - first)
                                           : cache.stored_values(first, cache.tokens() - first);
}

// Tokens ---------------------------------------------------------------------------------------------------

void Cache::require_rows(const SequenceRows& rows, const char* name, Index layer, Index heads,
                         Index channels) const {
    const auto batch = static_cast<Index>(caches_[0].size());
    require(rows.batch == batch && rows.heads == heads && rows.channels == channels, ErrorCode::shape, name,
            ": ", rows.text(), ", expected batch ", batch, ", ", heads, " heads of ", channels,
            " channels, those of layer ", layer);
}
void Cache::require_padding(std::span<const Index> padding, Index tokens) const {
    require(padding.empty() || padding.size() == caches_[0].size(), ErrorCode::shape,
            "padding: ", padding.size(), " numbers for ", caches_[0].size(), " sequences");
    for (std::size_t b = 0; b < padding.size(); ++b)
        require(padding[b] >= 0 && padding[b] <= tokens, ErrorCode::index, "padding: ", padding[b],
                " of the ", tokens, " rows of sequence ", b);
}

void Cache::append(Index layer, const SequenceRows& keys, const SequenceRows& values,
                   const SequenceRows* queries, std::span<const Index> padding, bool provisional) {
    const Lock lock(mutex_);
    Sequences& all = sequences(layer);
    const CacheConfiguration& c = configurations_[static_cast<std::size_t>(layer)];
    require_rows(keys, "keys", layer, c.kv_heads, c.key_head_dim);
    require_rows(values, "values", layer, c.kv_heads, c.value_head_dim);
    require(values.tokens == keys.tokens, ErrorCode::shape, "values: ", values.tokens, " tokens, expected ",
            keys.tokens, " as keys have");
    if (queries) {
        require_rows(*queries, "queries", layer, c.query_heads, c.key_head_dim);
        require(queries->tokens == keys.tokens, ErrorCode::shape, "queries: ", queries->tokens,
                " tokens, expected ", keys.tokens, " as keys have");
    }
    require_padding(padding, keys.tokens);
    for (const KvCache& cache : all)
        require(queries || !cache.needs_queries(), ErrorCode::option, "append: recipe '",
                recipes_[static_cast<std::size_t>(layer)],
                "' learns from the sequence's own queries; expected append(keys, values, queries)");
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
                provisional ? cache.append_provisional(k, v, q) : cache.append(k, v, q, *workspace_);
            } else {
                provisional ? cache.append_provisional(k, v) : cache.append(k, v, *workspace_);
            }
        }
    } catch (...) {
        for (std::size_t b = 0; b < before.size(); ++b) all[b].truncate(before[b]);
        throw;
    }
}

/// Provisional tokens may be taken back, so that windows are those of the token after the settled ones.
void Cache::drop_unseen(Index layer) {
    const Index window = layers_[static_cast<std::size_t>(layer)].sliding_window;
    if (window == 0) return;
    for (KvCache& cache : sequences(layer)) {
        const Index seen = cache.tokens() - cache.provisional_tokens() + 1 - window;
        if (seen > cache.first_kept()) cache.drop_before(seen, 0);
    }
}

void Cache::require_truncation(Index layer, Index sequence, Index count) const {
    const KvCache& cache = sequences(layer)[static_cast<std::size_t>(sequence)];
    const Index window = layers_[static_cast<std::size_t>(layer)].sliding_window;
    if (window == 0 || count == 0 || count >= cache.tokens() || !cache.state().hides()) return;
    require(count + 1 - window >= cache.first_kept(), ErrorCode::index, "truncate: sequence ", sequence,
            ", layer ", layer, ": to ", count, " tokens, whose sliding window of ", window,
            " reaches tokens before ", cache.first_kept(), ", which were dropped; expected at least ",
            cache.first_kept() + window - 1,
            " tokens, or that those to be taken back are appended as provisional");
}

void Cache::truncate(std::span<const Index> counts) {
    const Lock lock(mutex_);
    const std::size_t batch = caches_[0].size();
    require(counts.size() == 1 || counts.size() == batch, ErrorCode::shape, "truncate: ", counts.size(),
            " numbers of tokens for ", batch, " sequences, expected one for all or one for each");
    const auto count = [&](std::size_t b) { return counts[counts.size() == 1 ? 0 : b]; };
    for (std::size_t b = 0; b < batch; ++b) {
        Index longest = 0;
        for (Index i = 0; i < layers(); ++i) {
            longest = std::max(longest, sequences(i)[b].tokens());
            require_truncation(i, static_cast<Index>(b), count(b));
        }
        require(count(b) >= 0 && count(b) <= longest, ErrorCode::index, "truncate: sequence ", b, ": to ",
                count(b), " of ", longest, " tokens");
    }
    for (Sequences& sequences : caches_)
        for (std::size_t b = 0; b < batch; ++b)
            if (count(b) < sequences[b].tokens()) sequences[b].truncate(count(b));
}

void Cache::crop(Index count) {
    const Lock lock(mutex_);
    require(count >= 0, ErrorCode::index, "crop: ", count, " tokens to take off, expected 0 or more");
    for (Index i = 0; i < layers(); ++i)
        for (std::size_t b = 0; b < caches_[0].size(); ++b) {
            const Index tokens = sequences(i)[b].tokens();
            require(count <= tokens, ErrorCode::index, "crop: ", count, " of ", tokens,
                    " tokens of sequence ", b, ", layer ", i);
            require_truncation(i, static_cast<Index>(b), tokens - count);
        }
    for (Sequences& sequences : caches_)
        for (KvCache& cache : sequences) cache.truncate(cache.tokens() - count);
}

void Cache::accept(Index keep) {
    const Lock lock(mutex_);
    require(keep >= 0, ErrorCode::index, "accept: all but ", keep, " provisional tokens, expected 0 or more");
    for (Sequences& sequences : caches_)
        for (KvCache& cache : sequences)
            if (const Index more = cache.provisional_tokens() - keep; more > 0) cache.accept(more);
}

void Cache::clear() {
    const Lock lock(mutex_);
    for (Sequences& sequences : caches_)
        for (KvCache& cache : sequences) cache.clear();
}

void Cache::reorder(std::span<const Index> indices) {
    const Lock lock(mutex_);
    const auto batch = static_cast<Index>(caches_[0].size());
    require(!indices.empty(), ErrorCode::shape, "reorder: no sequences, expected at least 1");
    for (const Index index : indices)
        require(index >= 0 && index < batch, ErrorCode::index, "reorder: sequence ", index, " of ", batch);
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

void Cache::attend(Index layer, const SequenceRows& queries, const SequenceRows& output,
                   std::span<const Index> padding, const Attention& attention) {
    const Lock lock(mutex_);
    const Sequences& all = sequences(layer);
    const CacheConfiguration& c = configurations_[static_cast<std::size_t>(layer)];
    require_rows(queries, "queries", layer, c.query_heads, c.key_head_dim);
    require_rows(output, "out", layer, c.query_heads, c.value_head_dim);
    require(output.tokens == queries.tokens, ErrorCode::shape, "out: ", output.tokens, " tokens, expected ",
            queries.tokens, " as queries have");
    require_padding(padding, queries.tokens);
    kvplane::AttentionParameters parameters;
    parameters.scale = attention.scale;
    parameters.softcap = attention.softcap;
    parameters.sliding_window = layers_[static_cast<std::size_t>(layer)].sliding_window;
    parameters.sink_logits = attention.sink_logits;
    if (!attention.read.empty()) parameters.read = kvplane::recipes::read_policy(attention.read);
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
