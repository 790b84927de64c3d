// examples/transformers/src/cache.hpp: the caches of all layers of a model, for a batch of sequences.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "kvplane/attention/parameters.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/io/policy_file.hpp"

namespace kvplane_python {

/// What a cache must know of one layer of a model.
struct Layer {
    Index kv_heads = 1, query_heads = 1, head_dim = 64, value_head_dim = 64;
    std::optional<kvplane::RopeSettings> rope;
    Index sliding_window = 0;  ///< 0: none

    /// Without a recipe.
    kvplane::CacheConfiguration configuration() const;
    std::string text() const;
    bool operator==(const Layer&) const = default;
};

/// How append() takes tokens.
struct AppendOptions {
    bool provisional = false;
    bool check = true;       ///< on a device: whether it waits for what the device finds of the numbers
    void* stream = nullptr;  ///< on a device: where the work goes
};

/// What attention takes beside queries.
struct Attention {
    double scale = 0.0, softcap = 0.0;
    std::vector<float> sink_logits;
    std::string read;                           ///< a read policy; empty: everything
    void* stream = nullptr;                     ///< on a device: where the work goes
    std::span<const float> device_sink_logits;  ///< on a device: instead of sink_logits, if any
};

/// What is cached of each layer, by recipe or policy.
struct Contents {
    std::vector<Layer> layers;
    std::vector<std::string> recipes;  ///< [layer]
    std::vector<kvplane::CacheConfiguration> configurations;

    /// recipes: one name for all layers, or one for each. Throws Error (option, shape).
    static Contents of(std::vector<Layer> layers, const std::vector<std::string>& recipes,
                       std::uint64_t rotation_seed);
    /// What a policy says. Throws Error (mismatch) for one of another model.
    static Contents of(std::vector<Layer> layers, const kvplane::ModelPolicy& policy,
                       const std::string& model);
};

/// Memory of caches that share pages, each page counted once.
class BytesOnce {
  public:
    /// A KvCache, or a cache on a device.
    template <class OneCache>
    void add(const OneCache& cache) {
        const auto& state = cache.state();
        // What is not in pages: the moments and bases that a cache has learned.
        const Index learned = cache.bytes() - state.page_bytes();
        const bool own_basis = cache.configuration().fits_basis() && state.latent;
        const Index basis = own_basis ? state.latent->bytes() : 0;
        if (own_basis) bases_[state.latent.get()] = basis;
        sum_ += learned - basis;
        const auto add_page = [&](const kvplane::PageReference& page) {
            if (page) pages_[page.data()] = page.bytes() + kvplane::PageReference::header_bytes;
        };
        add_page(state.sinks);
        for (const auto& page : state.tile_pages) add_page(page);
        for (const auto& page : state.recent) add_page(page);
    }
    Index sum() const {
        Index all = sum_;
        for (const auto& [page, size] : pages_) all += size;
        for (const auto& [basis, size] : bases_) all += size;
        return all;
    }

  private:
    std::map<const void*, Index> pages_, bases_;
    Index sum_ = 0;
};

/// Caches of each layer and sequence. Calls from several threads take turns. No call needs the GIL.
class Cache {
  public:
    virtual ~Cache() = default;

    Index layers() const noexcept { return static_cast<Index>(contents_.layers.size()); }
    const Layer& layer(Index layer) const;
    const std::vector<std::string>& recipes() const noexcept { return contents_.recipes; }
    Index batch() const;
    virtual Index threads() const noexcept = 0;
    /// The number of a device; -1 for the CPU.
    virtual int device() const noexcept { return -1; }

    /// Tokens of each sequence [batch] in a layer. Throws Error (index).
    std::vector<Index> tokens(Index layer) const;
    std::vector<Index> provisional_tokens(Index layer) const;
    std::vector<Index> packed_tokens(Index layer) const;
    /// The first token after sinks that attention still sees.
    std::vector<Index> first_kept(Index layer) const;
    bool needs_queries(Index layer) const;
    /// Whether append() makes use of queries at all.
    bool uses_queries(Index layer) const;

    /// Appends tokens to every sequence of a layer. padding [batch]: how many of the first rows belong to no
    /// token; empty: none. Tokens that a layer's sliding window will never see again are dropped first. All
    /// or nothing but for memory that ends.
    virtual void append(Index layer, const SequenceRows& keys, const SequenceRows& values,
                        const SequenceRows* queries, std::span<const Index> padding,
                        const AppendOptions& options) = 0;
    /// Attention of the last tokens of every sequence. Rows of padding become 0.
    virtual void attend(Index layer, const SequenceRows& queries, const SequenceRows& output,
                        std::span<const Index> padding, const Attention& attention) = 0;

    /// counts [batch], or one for all sequences. Layers that have fewer tokens, because an append failed
    /// after others had theirs, stay as they are. All or nothing.
    void truncate(std::span<const Index> counts);
    /// Takes the last tokens off every sequence of every layer.
    void crop(Index count);
    /// Makes all but the last `keep` provisional tokens of every sequence tokens like all others.
    void accept(Index keep);
    virtual void clear() = 0;
    /// Sequence i becomes what sequence indices[i] was; pages are shared. Throws Error (index).
    void reorder(std::span<const Index> indices);
    virtual std::unique_ptr<Cache> fork() const = 0;

    /// Pages that sequences share are counted once.
    virtual Index bytes() const = 0;
    double bits_per_element() const;
    /// As attention sees them [tokens, heads * channels]. Throws Error (index).
    virtual Matrix stored(kvplane::TileSide side, Index layer, Index sequence) const = 0;

    virtual void save(const std::filesystem::path& path, bool compress, bool sync) const = 0;
    /// What a file holds, which was saved by a cache of these layers and recipes. Throws Error as
    /// load_session().
    virtual void load(const std::filesystem::path& path) = 0;

  protected:
    using Lock = std::lock_guard<std::mutex>;

    /// Throws Error (option).
    Cache(Contents contents, Index batch);

    /// What says how a sequence stands.
    struct Standing {
        Index tokens, provisional, packed, first_kept;
        bool hides;  ///< whether attention does not see some tokens
    };
    // What calls need of a derived class; they hold the lock.
    virtual std::mutex& turns() const = 0;
    virtual Standing standing(Index layer, Index sequence) const = 0;
    virtual bool learns_from_queries(Index layer) const = 0;
    virtual bool looks_at_queries(Index layer) const = 0;
    virtual void truncate_one(Index layer, Index sequence, Index count) = 0;
    virtual void accept_one(Index layer, Index sequence, Index count) = 0;
    virtual void reorder_all(std::span<const Index> indices) = 0;

    void require_layer(Index layer) const;
    /// The sequence of a layer; throws Error (index).
    void require_sequence(Index layer, Index sequence) const;
    void require_rows(const SequenceRows& rows, const char* name, Index layer, Index heads,
                      Index channels) const;
    void require_padding(std::span<const Index> padding, Index tokens) const;
    /// All that is checked of the arguments of append() and attend() before anything changes.
    void require_append(Index layer, const SequenceRows& keys, const SequenceRows& values,
                        const SequenceRows* queries, std::span<const Index> padding) const;
    void require_attend(Index layer, const SequenceRows& queries, const SequenceRows& output,
                        std::span<const Index> padding) const;
    kvplane::AttentionParameters parameters(Index layer, const Attention& attention) const;
    const kvplane::CacheConfiguration& configuration(Index layer) const {
        return contents_.configurations[static_cast<std::size_t>(layer)];
    }
    Index window(Index layer) const {
        return contents_.layers[static_cast<std::size_t>(layer)].sliding_window;
    }
    /// The first token that a window still sees when the next one comes. Provisional tokens may be taken
    /// back, so that windows are those of the token after the settled ones.
    Index first_seen(Index layer, const Standing& of) const {
        return of.tokens - of.provisional + 1 - window(layer);
    }

    Contents contents_;
    Index batch_;

  private:
    template <class Number>
    std::vector<Index> of_each(Index layer, const Number& number) const;
    void require_truncation(Index layer, Index sequence, Index count) const;
};

/// Every stored key or value of a cache that attention sees, of positions from its first kept token on.
Matrix stored_of(const kvplane::KvCache& cache, kvplane::TileSide side);

}  // namespace kvplane_python
