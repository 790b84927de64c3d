// examples/transformers/src/cache.hpp: the caches of all layers of a model, for a batch of sequences.
#pragma once

#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "kvplane/attention/executor.hpp"
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

/// What attention takes beside queries.
struct Attention {
    double scale = 0.0, softcap = 0.0;
    std::vector<float> sink_logits;
    std::string read;  ///< a read policy; empty: everything
};

/// KvCaches in a pool of their own: one for each layer and sequence. Calls from several threads take turns.
/// No call needs the GIL.
class Cache {
  public:
    /// recipes: one name for all layers, or one for each. Throws Error (option, shape).
    Cache(std::vector<Layer> layers, const std::vector<std::string>& recipes, Index batch, Index threads,
          std::uint64_t rotation_seed);
    /// What a policy says. Throws Error (mismatch) for one of another model.
    Cache(std::vector<Layer> layers, const kvplane::ModelPolicy& policy, const std::string& model,
          Index batch, Index threads);
    /// What a file holds, which was saved by a cache of these layers and recipes. Throws Error as
    /// load_session().
    void load(const std::filesystem::path& path);
    void save(const std::filesystem::path& path, bool compress, bool sync) const;

    Index layers() const noexcept { return static_cast<Index>(layers_.size()); }
    const Layer& layer(Index layer) const;
    const std::vector<std::string>& recipes() const noexcept { return recipes_; }
    Index batch() const;
    Index threads() const noexcept { return executor_ ? executor_->workers() : 1; }

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
    void append(Index layer, const SequenceRows& keys, const SequenceRows& values,
                const SequenceRows* queries, std::span<const Index> padding, bool provisional);
    /// Attention of the last tokens of every sequence. Rows of padding become 0.
    void attend(Index layer, const SequenceRows& queries, const SequenceRows& output,
                std::span<const Index> padding, const Attention& attention);

    /// counts [batch], or one for all sequences. Layers that have fewer tokens, because an append failed
    /// after others had theirs, stay as they are. All or nothing.
    void truncate(std::span<const Index> counts);
    /// Takes the last tokens off every sequence of every layer.
    void crop(Index count);
    /// Makes all but the last `keep` provisional tokens of every sequence tokens like all others.
    void accept(Index keep);
    void clear();
    /// Sequence i becomes what sequence indices[i] was; pages are shared. Throws Error (index).
    void reorder(std::span<const Index> indices);
    std::unique_ptr<Cache> fork() const;

    /// Pages that sequences share are counted once.
    Index bytes() const;
    double bits_per_element() const;
    /// As attention sees them [tokens, heads * channels]. Throws Error (index).
    Matrix stored(kvplane::TileSide side, Index layer, Index sequence) const;

  private:
    using Sequences = std::vector<kvplane::KvCache>;

    Cache() = default;
    void begin(const std::vector<kvplane::CacheConfiguration>& configurations, Index batch, Index threads);
    Sequences& sequences(Index layer);
    const Sequences& sequences(Index layer) const;
    void require_rows(const SequenceRows& rows, const char* name, Index layer, Index heads,
                      Index channels) const;
    void require_padding(std::span<const Index> padding, Index tokens) const;
    void require_truncation(Index layer, Index sequence, Index count) const;
    void drop_unseen(Index layer);

    std::vector<Layer> layers_;
    std::vector<std::string> recipes_;  ///< [layer]
    std::vector<kvplane::CacheConfiguration> configurations_;
    std::shared_ptr<kvplane::TilePool> pool_;  ///< before the caches in it
    std::vector<Sequences> caches_;            ///< [layer][sequence]
    std::shared_ptr<kvplane::ThreadExecutor> executor_;
    std::unique_ptr<kvplane::AttentionWorkspace> workspace_;
    mutable std::mutex mutex_;
};

}  // namespace kvplane_python
