// kvplane/cache/workspace.hpp: what one attention over packed bits works in, kept from call to call.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "kvplane/attention/scratch.hpp"
#include "kvplane/attention/softmax.hpp"
#include "kvplane/cache/queries.hpp"
#include "kvplane/cache/values_in_keys.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/read/budget.hpp"
#include "kvplane/read/coarse_pass.hpp"
#include "kvplane/read/exponents.hpp"
#include "kvplane/read/fixed.hpp"
#include "kvplane/read/planner.hpp"
#include "kvplane/read/tolerance.hpp"
#include "kvplane/simd/half.hpp"
#include "kvplane/simd/line_vector.hpp"

namespace kvplane::detail {

/// The softmax states of all rows, one for each chunk of tiles and one for the tokens outside tiles.
class ChunkStates {
  public:
    /// Throws std::bad_alloc.
    void begin(const DecodeShape& shape, Index channels) {
        shape_ = shape;
        stride_ = padded_channels(channels);
        const auto states = static_cast<std::size_t>((shape.chunks() + 1) * shape.rows());
        largest_.resize(states);
        sum_.resize(states);
        output_.resize(states * static_cast<std::size_t>(stride_));
    }
    /// Of a row and, behind it, of the next rows of its head. The chunk after the last is that of tokens
    /// outside tiles.
    SoftmaxState of(Index chunk, Index row) noexcept {
        const Index at = shape_.place(row, chunk, shape_.chunks() + 1);
        return {largest_.data() + at, sum_.data() + at, output_.data() + at * stride_, stride_};
    }

  private:
    DecodeShape shape_;
    Index stride_ = 0;
    std::vector<float> largest_, sum_;  ///< [head][chunk][row of the head]
    LineVector<float> output_;          ///< [head][chunk][row of the head][channels, padded]
};

/// The softmax weights of tiles, or of blocks of tokens outside tiles, until their sums are known: to 11 bits, for
/// all that they take is memory.
class KeptWeights {
  public:
    /// Throws std::bad_alloc.
    void begin(const DecodeShape& shape, Index tiles) {
        shape_ = shape;
        tiles_ = tiles;
        const auto rows = static_cast<std::size_t>(tiles * shape.rows());
        weights_.resize(rows * static_cast<std::size_t>(tile_tokens));
        largest_.resize(rows);
    }
    /// Fetches what keep() will write: the processor does not wait for it while it computes scores.
    void prefetch(Index tile, const RowBlock& block) noexcept {
        Eigen::half* const to = weights_.data() + at(tile, block.first) * tile_tokens;
        for (Index i = 0; i < block.rows * tile_tokens; i += 32) __builtin_prefetch(to + i, 1, 3);
    }
    /// Some rows' weights [row][128] of a tile, relative to the largest scores [row].
    void keep(Isa isa, Index tile, const RowBlock& block, const float* weights,
              const float* largest) noexcept {
        narrow_row(isa, weights, block.rows * tile_tokens,
                   weights_.data() + at(tile, block.first) * tile_tokens);
        std::copy_n(largest, block.rows, largest_.data() + at(tile, block.first));
    }
    /// [row][128] of a row and the next rows of its head.
    const Eigen::half* weights(Index tile, Index row) const noexcept {
        return weights_.data() + at(tile, row) * tile_tokens;
    }
    const float* largest(Index tile, Index row) const noexcept { return largest_.data() + at(tile, row); }

  private:
    Index at(Index tile, Index row) const noexcept { return shape_.place(row, tile, tiles_); }

    DecodeShape shape_;
    Index tiles_ = 0;
    LineVector<Eigen::half> weights_;  ///< [head][tile][row of the head][token] exp(score - largest)
    std::vector<float> largest_;       ///< [head][tile][row of the head]
};

/// The softmax states of a batch's rows over the first tiles of their sequences, from which a pass goes on. They
/// are those that the pass itself would have there, so that it ends with the same bits.
class PrefixStates {
  public:
    /// No tokens seen. Throws std::bad_alloc.
    void begin(Index query_tokens, Index query_heads, Index channels) {
        heads_ = query_heads;
        stride_ = padded_channels(channels);
        const auto states = static_cast<std::size_t>(2 * query_tokens * query_heads);
        largest_.assign(states, nothing_seen);
        sum_.assign(states, 0.0f);
        output_.assign(states * static_cast<std::size_t>(stride_), 0.0f);
    }
    /// Of all chunks that are complete.
    SoftmaxState complete(Index query_token, Index query_head) noexcept {
        return at(2 * (query_token * heads_ + query_head));
    }
    /// Of the first tiles of the chunk after them.
    SoftmaxState open(Index query_token, Index query_head) noexcept {
        return at(2 * (query_token * heads_ + query_head) + 1);
    }

  private:
    SoftmaxState at(Index state) noexcept {
        return {largest_.data() + state, sum_.data() + state, output_.data() + state * stride_, stride_};
    }

    Index heads_ = 0, stride_ = 0;
    std::vector<float> largest_, sum_;  ///< [query token][query head][complete, open]
    LineVector<float> output_;          ///< [query token][query head][complete, open][channels, padded]
};

/// What one worker has for itself.
struct WorkerScratch {
    AttentionScratch attention;
    QueryProjection projection;
    ValuesInKeys values_in_keys;
    ReadCount count;
    std::vector<float> largest, factors;                  ///< [row of a head] for sums of weights
    std::array<std::uint8_t, tile_tokens / 8> planes[2];  ///< of a tile's values, and of the next
};

/// One call at a time.
struct Workspace {
    std::vector<WorkerScratch> workers;
    std::vector<Index> chunks;  ///< of tiles, that are read
    QueryRows queries;
    ChunkStates states;
    PrefixStates prefixes;            ///< of a batch
    TileWeights weights;              ///< where values wait
    KeptWeights kept, kept_unpacked;  ///< where sums of weights are wanted
    ReadReport report;                ///< of the last call

    FixedPlanner fixed;
    ExponentsPlanner exponents;
    TolerancePlanner tolerance;
    BudgetPlanner budget;
    CoarsePassPlanner coarse_pass;

    /// The planner of a policy; nullptr reads everything.
    ReadPlanner* planner(const ReadPolicy& policy, const PageLayout& layout) noexcept {
        switch (policy.kind) {
            case ReadPolicy::Kind::all:
                return nullptr;
            case ReadPolicy::Kind::fixed:
                return &fixed;
            case ReadPolicy::Kind::exponents:
                return &exponents;
            case ReadPolicy::Kind::tolerance:
                return &tolerance;
            case ReadPolicy::Kind::aligned:
                break;
        }
        int most = 0;
        for (Index s = 0; s < layout.subspaces(); ++s)
            for (const TileFormat::Placed& segment : layout.key_format(s).segments())
                most = std::max(most, segment.bits);
        // A budget of their own that all bits of keys fit into needs no coarse pass.
        if (policy.shared || policy.key_bits < most) return &coarse_pass;
        return &budget;
    }
};

}  // namespace kvplane::detail
