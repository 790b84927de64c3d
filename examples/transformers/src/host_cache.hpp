// examples/transformers/src/host_cache.hpp: a cache in the CPU's memory.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "cache.hpp"
#include "kvplane/attention/executor.hpp"

namespace kvplane_python {

/// KvCaches in a pool of their own: one for each layer and sequence.
class HostCache final : public Cache {
  public:
    using Sequences = std::vector<kvplane::KvCache>;

    /// Throws Error (option).
    HostCache(Contents contents, Index batch, Index threads);

    Index threads() const noexcept override { return executor_ ? executor_->workers() : 1; }
    void append(Index layer, const SequenceRows& keys, const SequenceRows& values,
                const SequenceRows* queries, std::span<const Index> padding,
                const AppendOptions& options) override;
    void attend(Index layer, const SequenceRows& queries, const SequenceRows& output,
                std::span<const Index> padding, const Attention& attention) override;
    void clear() override;
    std::unique_ptr<Cache> fork() const override { return forked(); }
    Index bytes() const override;
    Matrix stored(kvplane::TileSide side, Index layer, Index sequence) const override;
    void save(const std::filesystem::path& path, bool compress, bool sync) const override;
    void load(const std::filesystem::path& path) override;

    // For a cache on a device, whose tokens are here while recipes learn from them.

    std::unique_ptr<HostCache> forked() const;
    kvplane::TilePool& pool() noexcept { return *pool_; }
    Sequences& sequences(Index layer) { return caches_[static_cast<std::size_t>(layer)]; }
    const Sequences& sequences(Index layer) const { return caches_[static_cast<std::size_t>(layer)]; }
    /// Empty ones.
    Sequences empty_sequences(Index layer) const;
    /// What uses_queries() says of a layer whose tokens are here.
    bool looks_at_queries(Index layer) const override;
    bool learns_from_queries(Index layer) const override;
    Standing standing(Index layer, Index sequence) const override;

  private:
    explicit HostCache(const HostCache& other, const Lock&);

    std::mutex& turns() const override { return mutex_; }
    void truncate_one(Index layer, Index sequence, Index count) override;
    void accept_one(Index layer, Index sequence, Index count) override;
    void reorder_all(std::span<const Index> indices) override;
    void drop_unseen(Index layer);

    std::shared_ptr<kvplane::TilePool> pool_;  ///< before the caches in it
    std::vector<Sequences> caches_;            ///< [layer][sequence]
    std::shared_ptr<kvplane::ThreadExecutor> executor_;
    std::unique_ptr<kvplane::AttentionWorkspace> workspace_;
    mutable std::mutex mutex_;
};

/// Writes the caches [sequence][layer] to a file. Throws Error (option, io).
void save_all(const std::vector<const kvplane::KvCache*>& caches, const std::filesystem::path& path,
              bool compress, bool sync);

}  // namespace kvplane_python
