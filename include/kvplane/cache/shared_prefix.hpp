// kvplane/cache/shared_prefix.hpp: sequences of a batch that share their first tiles, as forks do.
//
// Tiles that several sequences share are attended by one pass over the query rows of all of them. Each
// sequence then goes on from the states of its rows. Sequences that part one after another, a tree of forks,
// are taken branch by branch.
#pragma once

#include <algorithm>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "kvplane/cache/decode.hpp"
#include "kvplane/cache/queries.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/cache/workspace.hpp"
#include "kvplane/simd/floating_point.hpp"

namespace kvplane::detail {

/// A sequence of a batch: its query tokens are those of its last tokens.
struct BatchSequence {
    const CacheShape* shape;
    const CacheState* state;
    Index first_row;         ///< of its query tokens, among those of the batch
    Index query_tokens;      ///< at least 1
    Index shared_tiles = 0;  ///< its first tiles that SharedPrefixes has attended, the result

    const TilePlace& tile(Index t) const noexcept { return state->tiles[static_cast<std::size_t>(t)]; }
    Index tiles() const noexcept { return static_cast<Index>(state->tiles.size()); }
};

/// Finds what sequences share, and attends it.
class SharedPrefixes {
  public:
    /// The states of a batch's rows over shared tiles are added to `states`.
    SharedPrefixes(const AnyRows& queries, const AttentionParameters& parameters, PrefixStates& states,
                   Workspace& workspace, Executor& executor)
        : queries_(queries),
          parameters_(parameters),
          states_(states),
          work_(workspace),
          executor_(executor) {}

    /// Sets shared_tiles of sequences that DecodePass reads with ReadPolicy::all(). Results do not depend on
    /// the executor. Throws std::bad_alloc.
    void attend(std::span<BatchSequence*> sequences) {
        // Forks share their CacheShape, so that pages of two shapes are never the same.
        for_groups(sequences, 0, [&](std::span<BatchSequence*> group) { descend(group, 0); });
    }

  private:
    /// Fewer tiles are not worth a pass of their own.
    static constexpr Index least_tiles = 2;
    /// Query tokens of a pass at most, which bounds the memory of its states.
    static constexpr Index pass_tokens = 64;

    static auto hidden(const CacheState& state) noexcept {
        return state.hides() ? std::pair(state.kept_sinks, state.dropped) : std::pair(Index{0}, Index{0});
    }
    /// What sequences that share tile t have in common.
    static auto key(const BatchSequence& sequence, Index t) noexcept {
        const TilePlace& tile = sequence.tile(t);
        return std::tuple(sequence.shape, tile.page, tile.first, tile.tokens, tile.row, tile.shift,
                          hidden(*sequence.state));
    }
    /// body(group) for all groups of two and more that share tile t. Members of a group keep their order.
    template <class Body>
    static void for_groups(std::span<BatchSequence*> members, Index t, const Body& body) {
        const auto has = std::stable_partition(members.begin(), members.end(),
                                               [&](const auto* s) { return s->tiles() > t; });
        members = members.first(static_cast<std::size_t>(has - members.begin()));
        std::stable_sort(members.begin(), members.end(),
                         [&](const auto* a, const auto* b) { return key(*a, t) < key(*b, t); });
        for (std::size_t first = 0, end; first < members.size(); first = end) {
            for (end = first + 1; end < members.size() && key(*members[end], t) == key(*members[first], t);)
                ++end;
            if (end - first > 1) body(members.subspan(first, end - first));
        }
    }
    /// Members have tiles up to `from` behind them, and share tile `from`.
    void descend(std::span<BatchSequence*> members, Index from) {
        const BatchSequence& first = *members.front();
        Index end = first.tiles();
        for (const BatchSequence* other : members.subspan(1)) {
            Index t = from;
            while (t < std::min(end, other->tiles()) && key(first, t) == key(*other, t)) ++t;
            end = t;
        }
        if (end - members.front()->shared_tiles >= least_tiles) attend_tiles(members, end);
        for_groups(members, end, [&](std::span<BatchSequence*> group) { descend(group, end); });
    }
    /// Some members at a time, in portions of one size.
    void attend_tiles(std::span<BatchSequence*> members, Index end) {
        Index tokens = 0;
        for (const BatchSequence* member : members) tokens += member->query_tokens;
        const Index portion = (tokens + pass_tokens - 1) / pass_tokens;
        for (std::size_t first = 0, next; first < members.size(); first = next) {
            Index taken = 0;
            for (next = first; next < members.size() && (next == first || taken * portion < tokens); ++next)
                taken += members[next]->query_tokens;
            attend_portion(members.subspan(first, next - first), end);
        }
    }
    void attend_portion(std::span<BatchSequence*> members, Index end) {
        tokens_.clear();
        for (const BatchSequence* member : members)
            for (Index i = 0; i < member->query_tokens; ++i)
                tokens_.push_back(
                    {.row = member->first_row + i,
                     .position =
                         parameters_.first_position(member->state->tokens, member->query_tokens) + i});
        const BatchSequence& first = *members.front();
        const CacheConfiguration& c = first.shape->configuration;
        if (!std::exchange(begun_, true)) states_.begin(queries_.tokens, c.query_heads, c.value_head_dim);
        const StandardFloatingPoint standard;
        DecodePass pass({.cache = *first.shape,
                         .state = *first.state,
                         .tokens = tokens_,
                         .first_tile = first.shared_tiles,
                         .end_tile = end,
                         .unpacked = false,
                         .prefix = &states_,
                         .token_weights = nullptr},
                        parameters_, work_, executor_);
        pass.run(queries_);
        pass.extend_prefix();
        for (BatchSequence* member : members) member->shared_tiles = end;
    }

    const AnyRows& queries_;
    const AttentionParameters& parameters_;
    PrefixStates& states_;
    Workspace& work_;
    Executor& executor_;
    bool begun_ = false;              ///< whether states_ is
    std::vector<QueryToken> tokens_;  ///< of the pass
};

}  // namespace kvplane::detail
