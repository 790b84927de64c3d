// kvplane/cache/kv_cache.hpp: the key/value cache of one layer and one sequence.
//
//   TilePool pool;
//   KvCache cache({.kv_heads = 8, .query_heads = 32, .key_head_dim = 128, .value_head_dim = 128,
//                  .recipe = recipes::standard()}, pool);
//   cache.append(keys, values);        // tokens x (kv_heads * head_dim), after RoPE
//   cache.attend(queries, output);     // the last query_tokens of the sequence
//
// Tokens live in three places, in the order of their positions: sinks (fp16), tiles of 128 tokens (packed),
// and recent tokens (fp16 or 8 bits), which make the next tile. All of it is pages of a pool, counted by
// reference and never written while shared, so that a fork copies nothing.
//
// What is stored depends on the tokens and not on how they came: one at a time, in chunks or all at once give
// the same bytes. (A truncation inside a tile does not: the tile keeps its first tokens and a new one
// begins.)
//
// An append is all or nothing: everything that can fail happens before the cache changes. const calls on one
// cache may run at the same time; others need the cache to themselves. Several caches may share a pool from
// several threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "kvplane/attention/parameters.hpp"
#include "kvplane/cache/configuration.hpp"
#include "kvplane/cache/tile_pool.hpp"
#include "kvplane/cache/token_rows.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/scalar.hpp"
#include "kvplane/storage/tile.hpp"
#include "kvplane/transform/hadamard.hpp"

namespace kvplane {

class KvCache;
namespace detail {
struct CacheContent;
}

/// Bounds of |x - x'| over all stored elements, in the frame in which they are stored (rotated, where the
/// recipe rotates). A row of d channels is off by at most sqrt(d) times that in norm, in any frame.
struct CacheErrorBound {
    double key = 0.0;
    double value = 0.0;
};

class KvCache {
  public:
    /// Throws Error (option) for a configuration that cannot be. The pool must outlive the cache.
    KvCache(const CacheConfiguration& configuration, TilePool& pool)
        : configuration_((detail::require_configuration(configuration), configuration)),
          pool_(&pool),
          key_format_(key_format(configuration)),
          value_format_(value_format(configuration)),
          key_rotation_(configuration.key_head_dim, configuration.rotation_seed),
          value_rotation_(configuration.value_head_dim, configuration.rotation_seed + 1) {}

    KvCache(KvCache&&) noexcept = default;
    KvCache& operator=(KvCache&&) noexcept = default;

    /// A cache of the same content. It shares all pages; the first append to a page that is not full copies
    /// that page.
    KvCache fork() const { return KvCache(*this); }

    const CacheConfiguration& configuration() const noexcept { return configuration_; }
    /// Tokens appended and not truncated: the position of the next one.
    Index tokens() const noexcept { return state_.tokens; }
    /// The first token after the sinks that attend() still sees; see drop_before().
    Index first_kept() const noexcept { return std::max(state_.dropped, sinks()); }
    /// Tokens in packed tiles.
    Index packed_tokens() const noexcept { return state_.window_first - sinks(); }

    /// Appends tokens: keys tokens x (kv_heads * key_head_dim), values tokens x (kv_heads * value_head_dim),
    /// of float, Eigen::half or Eigen::bfloat16; matrices, views and expressions, or rank-3 tensors (heads,
    /// tokens, head_dim). Keys are as attention takes them, after RoPE. Throws Error (shape; not_finite and
    /// beyond_fp16 with the position; out_of_memory) and then has changed nothing.
    template <class K, class V>
    void append(const K& keys, const V& values) {
        append_rows(input_heads(keys, configuration_.kv_heads), input_heads(values, configuration_.kv_heads));
    }

    /// Attention of the last tokens of the sequence, causal among themselves. queries: query_tokens x
    /// (query_heads * key_head_dim), or a tensor; output: query_tokens x (query_heads * value_head_dim), of
    /// any float type and layout. Throws Error (shape, option) before it writes anything.
    template <class Q, class Derived>
    void attend(const Q& queries, Eigen::MatrixBase<Derived>& output,
                const AttentionParameters& parameters = {}) const {
        const auto rows = input_heads(queries, configuration_.query_heads);
        require_queries(rows.heads(), rows.tokens(), rows.head_dim(), output.rows(), output.cols());
        detail::require_parameters(parameters, configuration_.query_heads, rows.tokens(), tokens());
        if (rows.tokens() == 0) return;
        output = attend_rows(to_matrix_of(rows), parameters).template cast<typename Derived::Scalar>();
    }
    template <class Q, class Derived>
    void attend(const Q& queries, Eigen::MatrixBase<Derived>&& output,
                const AttentionParameters& parameters = {}) const {
        attend(queries, output, parameters);
    }

    /// Forgets all but the first `count` tokens. Throws Error (index) for more than there are, or for fewer
    /// than have been dropped.
    void truncate(Index count);

    /// Forgets the tokens before `token`, sinks excepted, for a sliding window: attention does not see them,
    /// and the pages that hold nothing else are given back. Positions stay. Throws Error (index) for a token
    /// beyond the end.
    void drop_before(Index token);

    /// Back to no tokens.
    void clear() noexcept { state_ = {}; }

    /// Memory of all pages, headers and unused room included. A page shared by forks counts in each.
    Index bytes() const noexcept {
        Index sum = state_.sinks ? page_bytes(state_.sinks.bytes()) : 0;
        for (const Tile& tile : state_.tiles) sum += page_bytes(tile.page.bytes());
        for (const PageReference& page : state_.window) sum += page_bytes(page.bytes());
        return sum;
    }
    /// 8 bytes() / elements of all tokens; 0 without tokens.
    double bits_per_element() const noexcept {
        const Index elements = tokens() * configuration_.elements_per_token();
        return elements == 0 ? 0.0 : 8.0 * static_cast<double>(bytes()) / static_cast<double>(elements);
    }
    /// What bytes() will be with that many tokens, appended and never truncated or dropped. Throws Error
    /// (option, index).
    static Index predicted_bytes(const CacheConfiguration& configuration, Index tokens);

    CacheErrorBound error_bound() const;

    /// The stored tokens [first, first + count) as attention sees them, in the frame of the input: tokens x
    /// (kv_heads * head_dim). For tests and inspection; slow. Throws Error (index).
    Matrix stored_keys(Index first, Index count) const { return stored(0, first, count); }
    Matrix stored_values(Index first, Index count) const { return stored(1, first, count); }

  private:
    friend struct detail::CacheContent;

    struct Tile {
        PageReference page;
        Index first;   ///< position of its first token
        Index tokens;  ///< fewer than 128 after a truncation, or while it fills
    };
    struct State {
        Index tokens = 0;
        Index dropped = 0;
        Index window_first = 0;  ///< position of the first token after the tiles
        PageReference sinks;
        std::vector<Tile> tiles;
        std::vector<PageReference> window;  ///< window_page_tokens each
        // For error_bound: the largest magnitude ever stored, and the largest clipped excess, by side.
        double largest[2] = {0.0, 0.0};
        double excess[2] = {0.0, 0.0};
    };
    /// What an append adds, complete before the state changes.
    struct Addition {
        State next;               ///< all but the tiles
        std::vector<Tile> tiles;  ///< new ones
        PageReference last_page;  ///< a copy of the last tile's shared page, to go on filling it
        Index last_tokens = 0;    ///< tokens of the last old tile afterwards
    };

    /// Recent tokens are kept in pages of this many, so that little room is unused.
    static constexpr Index window_page_tokens = 32;

    KvCache(const KvCache&) = default;

    static Index page_bytes(Index bytes) noexcept { return bytes + PageReference::header_bytes; }
    const CacheRecipe& recipe() const noexcept { return configuration_.recipe; }
    Index sinks() const noexcept { return std::min(recipe().sink_tokens, state_.tokens); }
    Index tile_bytes() const noexcept {
        return configuration_.kv_heads * (key_format_.bytes() + value_format_.bytes());
    }
    Index tile_offset(int side, Index head) const noexcept {
        return head * (key_format_.bytes() + value_format_.bytes()) + (side == 0 ? 0 : key_format_.bytes());
    }
    Index dim(int side) const noexcept {
        return side == 0 ? configuration_.key_head_dim : configuration_.value_head_dim;
    }
    TokenRows sink_rows() const { return {configuration_, recipe().sink_tokens, 16}; }
    TokenRows window_rows() const { return {configuration_, window_page_tokens, recipe().recent_bits}; }
    /// Half of fp16's range where anything is quantized, so that no grid can ever leave fp16 later, when its
    /// tile is made and an append could no longer be refused.
    float largest_magnitude() const noexcept {
        const bool exact =
            recipe().keys.bits == 16 && recipe().values.bits == 16 && recipe().recent_bits == 16;
        return exact ? fp16_max : 32000.0f;
    }

    template <CacheScalar K, CacheScalar V>
    void append_rows(const HeadRows<K>& keys, const HeadRows<V>& values);
    template <CacheScalar Scalar>
    void require_input(const HeadRows<Scalar>& rows, const char* argument, Index dim) const;
    void require_queries(Index heads, Index query_tokens, Index head_dim, Index out_rows,
                         Index out_cols) const;
    void require_magnitude(const Matrix& rows, const char* argument, Index first) const;

    class Appender;
    struct Block;
    class Reader;
    Matrix attend_rows(Matrix queries, const AttentionParameters& parameters) const;
    Matrix stored(int side, Index first, Index count) const;

    template <CacheScalar Scalar>
    static Matrix to_matrix_of(const HeadRows<Scalar>& rows) {
        Matrix matrix(rows.tokens(), rows.channels());
        for (Index h = 0; h < rows.heads(); ++h)
            matrix.middleCols(h * rows.head_dim(), rows.head_dim()) = rows.head(h).template cast<float>();
        return matrix;
    }

    CacheConfiguration configuration_;
    TilePool* pool_;
    TileFormat key_format_, value_format_;
    Hadamard key_rotation_, value_rotation_;
    State state_;
};

// Appending ------------------------------------------------------------------------------------------------

template <CacheScalar Scalar>
void KvCache::require_input(const HeadRows<Scalar>& rows, const char* argument, Index dim) const {
    require(rows.heads() == configuration_.kv_heads && rows.head_dim() == dim, ErrorCode::shape,
            "append: ", argument, " of ", rows.heads(), " heads of ", rows.head_dim(), " channels, expected ",
            configuration_.kv_heads, " of ", dim);
    require_storable(rows, argument);
}

inline void KvCache::require_magnitude(const Matrix& rows, const char* argument, Index first) const {
    Index token = 0, channel = 0;
    if (rows.size() == 0) return;
    const float largest = rows.cwiseAbs().maxCoeff(&token, &channel);
    require(largest <= largest_magnitude(), ErrorCode::beyond_fp16, "append: ", argument, ": token ",
            first + token, ", channel ", channel, " has the magnitude ", largest,
            " (after rotation, where the recipe rotates); expected at most ", largest_magnitude());
}

/// Builds what an append adds, piece by piece, without changing the cache.
class KvCache::Appender {
  public:
    explicit Appender(const KvCache& cache)
        : cache_(cache), sink_rows_(cache.sink_rows()), window_rows_(cache.window_rows()) {
        State& next = added_.next;
        next.tokens = cache.state_.tokens;
        next.dropped = cache.state_.dropped;
        next.window_first = cache.state_.window_first;
        next.sinks = cache.state_.sinks;
        next.window = cache.state_.window;
        for (int side = 0; side < 2; ++side) {
            next.largest[side] = cache.state_.largest[side];
            next.excess[side] = cache.state_.excess[side];
        }
        if (!cache.state_.tiles.empty()) added_.last_tokens = cache.state_.tiles.back().tokens;
    }

    /// Tokens of one piece, already in the stored frame.
    void add(const Matrix& keys, const Matrix& values) {
        note_largest(keys, 0);
        note_largest(values, 1);
        for (Index done = 0; done < keys.rows();) {
            const Index left = keys.rows() - done;
            if (cache_.recipe().every_token)
                done += fill_tile(keys, values, done, left);
            else if (added_.next.tokens < cache_.recipe().sink_tokens)
                done += fill_sinks(keys, values, done, left);
            else
                done += fill_window(keys, values, done, left);
        }
    }

    Addition& result() noexcept { return added_; }

  private:
    void note_largest(const Matrix& rows, int side) {
        if (rows.size() == 0) return;
        double& largest = added_.next.largest[side];
        largest = std::max(largest, static_cast<double>(rows.cwiseAbs().maxCoeff()));
    }

    /// A page that may be written: the given one, or a copy of it where others see it too.
    PageReference writable(const PageReference& page) {
        if (!others_see(page)) return page;
        PageReference copy = cache_.pool_->page(page.bytes());
        std::memcpy(copy.data(), page.data(), static_cast<std::size_t>(page.bytes()));
        return copy;
    }
    /// The cache and this addition hold a page themselves; who else does sees it too.
    bool others_see(const PageReference& page) const {
        Index own = 0;
        for (const State* state : {&cache_.state_, &added_.next}) {
            own += state->sinks == page;
            own += std::count(state->window.begin(), state->window.end(), page);
        }
        if (!cache_.state_.tiles.empty()) own += cache_.state_.tiles.back().page == page;
        return page.references() > own;
    }
    TileCoder& coder(int side) {
        if (!coders_[side]) coders_[side].emplace(side == 0 ? cache_.key_format_ : cache_.value_format_);
        return *coders_[side];
    }

    Index fill_sinks(const Matrix& keys, const Matrix& values, Index first, Index count) {
        State& next = added_.next;
        count = std::min(count, cache_.recipe().sink_tokens - next.tokens);
        next.sinks = next.sinks ? writable(next.sinks) : cache_.pool_->page(sink_rows_.bytes());
        sink_rows_.write(keys, values, first, count, next.tokens, next.sinks.data());
        next.tokens += count;
        next.window_first = next.tokens;
        return count;
    }

    Index fill_window(const Matrix& keys, const Matrix& values, Index first, Index count) {
        State& next = added_.next;
        const Index at = next.tokens - next.window_first, row = at % window_page_tokens;
        const auto page = static_cast<std::size_t>(at / window_page_tokens);
        if (page == next.window.size())
            next.window.push_back(cache_.pool_->page(window_rows_.bytes()));
        else
            next.window[page] = writable(next.window[page]);
        count = std::min(count, window_page_tokens - row);
        // Not beyond the token at which the oldest tile is due, so that what is stored does not depend on how
        // the tokens came.
        const Index due = next.window_first + tile_tokens + cache_.recipe().recent_tokens;
        if (next.tokens < due) count = std::min(count, due - next.tokens);
        window_rows_.write(keys, values, first, count, row, next.window[page].data());
        next.tokens += count;
        if (next.tokens >= due) make_tile();
        return count;
    }

    /// The oldest 128 recent tokens become a tile.
    void make_tile() {
        State& next = added_.next;
        PageReference page = cache_.pool_->page(cache_.tile_bytes());
        for (int side = 0; side < 2; ++side) {
            gathered_.resize(tile_tokens, cache_.dim(side));
            for (Index head = 0; head < cache_.configuration_.kv_heads; ++head) {
                for (Index t = 0; t < tile_tokens; t += window_page_tokens)
                    window_rows_.read(next.window[static_cast<std::size_t>(t / window_page_tokens)].data(),
                                      side, head, 0, window_page_tokens,
                                      gathered_.data() + t * cache_.dim(side), cache_.dim(side));
                coder(side).encode(head_rows(gathered_), side == 0 ? "keys" : "values", 0, 0, tile_tokens, 0,
                                   page.data() + cache_.tile_offset(side, head));
                next.excess[side] = std::max(next.excess[side], coder(side).excess().largest);
            }
        }
        added_.tiles.push_back({std::move(page), next.window_first, tile_tokens});
        next.window.erase(next.window.begin(), next.window.begin() + tile_tokens / window_page_tokens);
        next.window_first += tile_tokens;
    }

    /// Every token into the tile that is being filled.
    Index fill_tile(const Matrix& keys, const Matrix& values, Index first, Index count) {
        State& next = added_.next;
        const bool old = added_.tiles.empty() && !cache_.state_.tiles.empty();
        Index* tokens = old                    ? &added_.last_tokens
                        : added_.tiles.empty() ? nullptr
                                               : &added_.tiles.back().tokens;
        if (!tokens || *tokens == tile_tokens) {
            added_.tiles.push_back({cache_.pool_->page(cache_.tile_bytes()), next.tokens, 0});
            tokens = &added_.tiles.back().tokens;
        } else if (old && !added_.last_page) {
            added_.last_page = writable(cache_.state_.tiles.back().page);
        }
        std::byte* const page = (added_.tiles.empty() ? added_.last_page : added_.tiles.back().page).data();
        count = std::min(count, tile_tokens - *tokens);
        for (int side = 0; side < 2; ++side)
            for (Index head = 0; head < cache_.configuration_.kv_heads; ++head)
                coder(side).encode(head_rows(side == 0 ? keys : values, cache_.configuration_.kv_heads),
                                   side == 0 ? "keys" : "values", head, first, count, *tokens,
                                   page + cache_.tile_offset(side, head));
        *tokens += count;
        next.tokens += count;
        next.window_first = next.tokens;
        return count;
    }

    const KvCache& cache_;
    std::optional<TileCoder> coders_[2];  ///< made when a tile is
    TokenRows sink_rows_, window_rows_;
    Matrix gathered_;
    Addition added_;
};

template <CacheScalar K, CacheScalar V>
void KvCache::append_rows(const HeadRows<K>& keys, const HeadRows<V>& values) {
    require_input(keys, "keys", configuration_.key_head_dim);
    require_input(values, "values", configuration_.value_head_dim);
    require(keys.tokens() == values.tokens(), ErrorCode::shape, "append: ", keys.tokens(), " keys and ",
            values.tokens(), " values, expected as many of each");
    if (keys.tokens() == 0) return;
    Appender appender(*this);
    for (Index first = 0; first < keys.tokens(); first += tile_tokens) {
        const Index count = std::min(tile_tokens, keys.tokens() - first);
        Matrix k = to_matrix_of(keys.middle_tokens(first, count));
        Matrix v = to_matrix_of(values.middle_tokens(first, count));
        if (recipe().keys.rotate) key_rotation_.rotate(k);
        if (recipe().values.rotate) value_rotation_.rotate(v);
        require_magnitude(k, "keys", first);
        require_magnitude(v, "values", first);
        appender.add(k, v);
    }
    Addition& added = appender.result();
    state_.tiles.reserve(state_.tiles.size() + added.tiles.size());
    // Nothing below can fail.
    if (added.last_page) state_.tiles.back().page = std::move(added.last_page);
    if (!state_.tiles.empty()) state_.tiles.back().tokens = added.last_tokens;
    for (Tile& tile : added.tiles) state_.tiles.push_back(std::move(tile));
    std::swap(added.next.tiles, state_.tiles);
    state_ = std::move(added.next);
}

// Forgetting -----------------------------------------------------------------------------------------------

inline void KvCache::truncate(Index count) {
    require(count >= 0 && count <= tokens(), ErrorCode::index, "truncate: to ", count, " of ", tokens(),
            " tokens");
    require(state_.dropped <= recipe().sink_tokens || count >= state_.dropped, ErrorCode::index,
            "truncate: to ", count, " tokens, expected at least ", state_.dropped,
            ", before which they were dropped");
    if (count == tokens()) return;
    if (count == 0) return clear();
    state_.tokens = count;
    while (!state_.tiles.empty() && state_.tiles.back().first >= count) state_.tiles.pop_back();
    if (!state_.tiles.empty() && count < state_.window_first) {
        Tile& last = state_.tiles.back();
        last.tokens = std::min(last.tokens, count - last.first);
    }
    state_.window_first = std::min(state_.window_first, count);
    const Index recent = count - state_.window_first;
    state_.window.resize(static_cast<std::size_t>((recent + window_page_tokens - 1) / window_page_tokens));
}

inline void KvCache::drop_before(Index token) {
    require(token >= 0 && token <= tokens(), ErrorCode::index, "drop_before: token ", token, " of ",
            tokens());
    if (token <= state_.dropped) return;
    state_.dropped = token;
    auto kept = state_.tiles.begin();
    while (kept != state_.tiles.end() && kept->first + kept->tokens <= token) ++kept;
    // The tile that is being filled stays, however old its tokens.
    if (recipe().every_token && kept == state_.tiles.end() && kept != state_.tiles.begin()) --kept;
    state_.tiles.erase(state_.tiles.begin(), kept);
}

inline Index KvCache::predicted_bytes(const CacheConfiguration& c, Index tokens) {
    detail::require_configuration(c);
    require(tokens >= 0, ErrorCode::index, "predicted_bytes: ", tokens, " tokens, expected 0 or more");
    const CacheRecipe& recipe = c.recipe;
    const Index tile = page_bytes(c.kv_heads * (key_format(c).bytes() + value_format(c).bytes()));
    if (recipe.every_token) return (tokens + tile_tokens - 1) / tile_tokens * tile;
    if (tokens == 0) return 0;
    const Index sinks = recipe.sink_tokens > 0 ? page_bytes(TokenRows(c, recipe.sink_tokens, 16).bytes()) : 0;
    const Index rest = std::max<Index>(0, tokens - recipe.sink_tokens);
    const Index tiles = std::max<Index>(0, rest - recipe.recent_tokens) / tile_tokens;
    const Index window = (rest - tiles * tile_tokens + window_page_tokens - 1) / window_page_tokens;
    return sinks + tiles * tile +
           window * page_bytes(TokenRows(c, window_page_tokens, recipe.recent_bits).bytes());
}

// Reading --------------------------------------------------------------------------------------------------

/// Consecutive tokens of one head, decoded.
struct KvCache::Block {
    Index first, count;
    const float* rows;  ///< count x dim
};

/// Decodes one head, run by run: sinks, tiles, recent tokens.
class KvCache::Reader {
  public:
    explicit Reader(const KvCache& cache)
        : cache_(cache),
          keys_(cache.key_format_),
          values_(cache.value_format_),
          sink_rows_(cache.sink_rows()),
          window_rows_(cache.window_rows()) {}

    /// Runs that hold tokens which are still kept.
    Index runs() const noexcept {
        const State& state = cache_.state_;
        return static_cast<Index>(state.tiles.size()) + (cache_.sinks() > 0) + !state.window.empty();
    }

    /// Run `run` of one side and head, into `rows` (resized).
    Block read(Index run, int side, Index head, std::vector<float>& rows) {
        const State& state = cache_.state_;
        const Index dim = cache_.dim(side);
        if (cache_.sinks() > 0 && run-- == 0) {
            rows.resize(static_cast<std::size_t>(cache_.sinks() * dim));
            sink_rows_.read(state.sinks.data(), side, head, 0, cache_.sinks(), rows.data(), dim);
            return {0, cache_.sinks(), rows.data()};
        }
        if (run < static_cast<Index>(state.tiles.size())) {
            const Tile& tile = state.tiles[static_cast<std::size_t>(run)];
            rows.resize(static_cast<std::size_t>(tile_tokens * dim));
            (side == 0 ? keys_ : values_)
                .decode(tile.page.data() + cache_.tile_offset(side, head), tile.tokens, rows.data(), dim);
            return {tile.first, tile.tokens, rows.data()};
        }
        const Index count = state.tokens - state.window_first;
        rows.resize(static_cast<std::size_t>(count * dim));
        for (Index t = 0; t < count; t += window_page_tokens)
            window_rows_.read(state.window[static_cast<std::size_t>(t / window_page_tokens)].data(), side,
                              head, 0, std::min(window_page_tokens, count - t), rows.data() + t * dim, dim);
        return {state.window_first, count, rows.data()};
    }

    double tile_error_bound(const Tile& tile, int side) {
        double bound = 0.0;
        for (Index head = 0; head < cache_.configuration_.kv_heads; ++head)
            bound = std::max(
                bound, (side == 0 ? keys_ : values_)
                           .error_bound(tile.page.data() + cache_.tile_offset(side, head), tile.tokens));
        return bound;
    }

  private:
    const KvCache& cache_;
    TileCoder keys_, values_;
    TokenRows sink_rows_, window_rows_;
};

inline void KvCache::require_queries(Index heads, Index query_tokens, Index head_dim, Index out_rows,
                                     Index out_cols) const {
    require(heads == configuration_.query_heads && head_dim == configuration_.key_head_dim, ErrorCode::shape,
            "attend: queries of ", heads, " heads of ", head_dim, " channels, expected ",
            configuration_.query_heads, " of ", configuration_.key_head_dim);
    require(query_tokens <= tokens(), ErrorCode::shape, "attend: ", query_tokens, " query tokens over ",
            tokens(), " cached ones, expected the last of them");
    require(
        out_rows == query_tokens && out_cols == configuration_.query_heads * configuration_.value_head_dim,
        ErrorCode::shape, "attend: an output of ", out_rows, " x ", out_cols, ", expected ", query_tokens,
        " x ", configuration_.query_heads * configuration_.value_head_dim);
}

/// Online softmax over runs; the query tokens of all heads that share a key/value head go together.
inline Matrix KvCache::attend_rows(Matrix queries, const AttentionParameters& parameters) const {
    const Index query_tokens = queries.rows(), group = configuration_.group();
    const Index key_dim = dim(0), value_dim = dim(1), rows = group * query_tokens;
    if (recipe().keys.rotate) key_rotation_.rotate(queries);
    Matrix output(query_tokens, configuration_.query_heads * value_dim);
    Reader reader(*this);
    std::vector<float> key_rows, value_rows;
    const Index first_position = tokens() - query_tokens, hidden_from = recipe().sink_tokens,
                hidden_to = state_.dropped;
    constexpr float none = -std::numeric_limits<float>::infinity();

    for (Index kv_head = 0; kv_head < configuration_.kv_heads; ++kv_head) {
        Matrix stacked(rows, key_dim);
        for (Index g = 0; g < group; ++g)
            stacked.middleRows(g * query_tokens, query_tokens) =
                queries.middleCols((kv_head * group + g) * key_dim, key_dim);
        Eigen::VectorXf largest = Eigen::VectorXf::Constant(rows, none), sum = Eigen::VectorXf::Zero(rows);
        Matrix weighted = Matrix::Zero(rows, value_dim), scores;

        for (Index run = 0; run < reader.runs(); ++run) {
            const Block keys = reader.read(run, 0, kv_head, key_rows);
            if (keys.first >= hidden_from && keys.first + keys.count <= hidden_to) continue;
            scores.noalias() = stacked * Eigen::Map<const Matrix>(keys.rows, keys.count, key_dim).transpose();
            for (Index r = 0; r < rows; ++r) {
                const Index query = r % query_tokens, position = first_position + query;
                const detail::ScoreRule<float> rule(parameters, kv_head * group + r / query_tokens,
                                                    query_tokens, key_dim);
                auto row = scores.row(r);
                const bool all_seen = keys.first + keys.count - 1 <= position &&
                                      (keys.first >= hidden_to || keys.first < hidden_from);
                if (rule.plain() && all_seen) {
                    row *= rule.scale();
                } else {
                    for (Index t = 0; t < keys.count; ++t) {
                        const Index key = keys.first + t;
                        row[t] =
                            key >= hidden_from && key < hidden_to ? none : rule(row[t], query, position, key);
                    }
                }
                const float top = std::max(largest[r], row.maxCoeff());
                if (top == none) {
                    row.setZero();
                    continue;
                }
                const float rescale = std::exp(largest[r] - top);
                row = (row.array() - top).exp().matrix();
                sum[r] = sum[r] * rescale + row.sum();
                weighted.row(r) *= rescale;
                largest[r] = top;
            }
            const Block values = reader.read(run, 1, kv_head, value_rows);
            weighted.noalias() += scores * Eigen::Map<const Matrix>(values.rows, values.count, value_dim);
        }
        for (Index r = 0; r < rows; ++r)
            output.row(r % query_tokens)
                .segment((kv_head * group + r / query_tokens) * value_dim, value_dim) =
                weighted.row(r) * (sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f);
    }
    if (recipe().values.rotate) value_rotation_.rotate_back(output);
    return output;
}

inline Matrix KvCache::stored(int side, Index first, Index count) const {
    require(first >= 0 && count >= 0 && first + count <= tokens(), ErrorCode::index, "stored tokens ", first,
            " to ", first + count, " of ", tokens());
    require(count == 0 || first >= first_kept() || first + count <= sinks() || state_.dropped <= sinks(),
            ErrorCode::index, "stored tokens ", first, " to ", first + count, ": those before ", first_kept(),
            " were dropped");
    Matrix all(count, configuration_.kv_heads * dim(side));
    if (count == 0) return all;
    Reader reader(*this);
    std::vector<float> rows;
    for (Index head = 0; head < configuration_.kv_heads; ++head)
        for (Index run = 0; run < reader.runs(); ++run) {
            const Block block = reader.read(run, side, head, rows);
            const Index from = std::max(first, block.first),
                        to = std::min(first + count, block.first + block.count);
            if (from >= to) continue;
            all.block(from - first, head * dim(side), to - from, dim(side)) =
                Eigen::Map<const Matrix>(block.rows, block.count, dim(side))
                    .middleRows(from - block.first, to - from);
        }
    if (side == 0 && recipe().keys.rotate) key_rotation_.rotate_back(all);
    if (side == 1 && recipe().values.rotate) value_rotation_.rotate_back(all);
    return all;
}

/// Rounding of a token while it is recent (or a sink), then the grids of its tile, then what was clipped.
inline CacheErrorBound KvCache::error_bound() const {
    double bound[2];
    Reader reader(*this);
    for (int side = 0; side < 2; ++side) {
        const double largest = state_.largest[side];
        const double half = largest * 0x1p-11 + 0x1p-25;
        const double byte = recipe().recent_bits == 8 ? largest / 127.0 * (0.5 + 0x1p-9) + 0x1p-24 : 0.0;
        double tiles = 0.0;
        for (const Tile& tile : state_.tiles) tiles = std::max(tiles, reader.tile_error_bound(tile, side));
        bound[side] = std::max(half, byte) + tiles + state_.excess[side];
    }
    return {bound[0], bound[1]};
}

}  // namespace kvplane
