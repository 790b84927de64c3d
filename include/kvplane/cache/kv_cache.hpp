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
// A recipe with latents and no basis given fits its own to the first tokens after the sinks (recipe.latents->
// fit_tokens): until then these wait where recent tokens do, in recent_bits, and are counted so. What it sees
// of queries is what append() is given with their tokens, taken-back tokens included.
//
// An append is all or nothing: everything that can fail happens before the cache changes. const calls on one
// cache may run at the same time; others need the cache to themselves. Several caches may share a pool from
// several threads.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <exception>
#include <limits>
#include <mutex>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "kvplane/attention/decode.hpp"
#include "kvplane/attention/executor.hpp"
#include "kvplane/attention/parameters.hpp"
#include "kvplane/cache/configuration.hpp"
#include "kvplane/cache/tile_pool.hpp"
#include "kvplane/cache/token_rows.hpp"
#include "kvplane/error.hpp"
#include "kvplane/latent/coder.hpp"
#include "kvplane/latent/fit.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/scalar.hpp"
#include "kvplane/storage/tile.hpp"
#include "kvplane/transform/hadamard.hpp"

namespace kvplane {

class KvCache;
namespace detail {
struct CacheContent;
}

/// What an attention read of the packed tokens.
struct ReadReport {
    /// In the mean over their elements (of latents, those that have bits), grids aside; 0 where it read none.
    double key_bits = 0.0;
    double value_bits = 0.0;
    double mean_bits = 0.0;  ///< of both together
    /// With ReadPolicy::tolerance, what T13 guarantees: the largest |o - o'|_2 of a head and query token, o
    /// the output of a read of everything; and that by the largest norm of a value that the head's grids can
    /// hold, at most the tolerance. Both up to the rounding of factors (T14). Else 0.
    double error_bound = 0.0;
    double relative_error_bound = 0.0;
};

/// Memory that attention works in, and who runs it. Kept from call to call, so that a call of a shape that
/// was seen before allocates nothing. One call at a time; moved, not copied.
class AttentionWorkspace {
  public:
    /// executor: nullptr for the calling thread alone; must outlive the workspace.
    explicit AttentionWorkspace(Executor* executor = nullptr) : executor_(executor) {}

    /// Of the last call that went the fused way.
    const ReadReport& report() const noexcept { return report_; }

  private:
    friend class KvCache;
    Executor& executor() noexcept { return executor_ ? *executor_ : static_cast<Executor&>(serial_); }

    Executor* executor_;
    SerialExecutor serial_;
    std::vector<FusedScratch> scratch_;  ///< by worker
    /// Query rows, head by head, already scaled where scores are no more than that: as given, with the
    /// channels of each pair exchanged, and as keys in channels are stored.
    std::vector<float> plain_, partner_, rotated_;
    std::vector<detail::ScoreRule<float>> rules_;  ///< by query head
    std::vector<float> largest_, sum_, output_;    ///< by head, part of the sequence, and row
    ReadReport report_;
    std::vector<Index> first_rows_;  ///< of the head of each row
    std::vector<std::uint8_t> finite_rows_;
    // Of reads by weight. weights_: relative to the largest score so far, tops_, by tile, row and token, and
    // by head, tile and row; units_: what they come to in every read unit of values, by head, tile, row and
    // unit; importance_: of all rows together, by block of rows, tile and unit; least_: the least gain that
    // is read, by block; norms_: 1 / sum of weights, by row, relative to all_tops_.
    std::vector<float> weights_, tops_, units_, importance_, least_, norms_, all_tops_;
    GainHistogram gains_;
    // Of keys by budget: the units of all parts, and what their planes gain in a tile of importance 1; the
    // planes that the first look takes; by part and class of tiles the planes and bits that are read in the
    // end, and how many tiles there are; the class of each tile and part; by block of rows and tile the sum
    // of importance_.
    std::vector<ReadUnit> key_units_;
    std::vector<std::array<float, 3>> key_gains_;
    std::vector<std::uint8_t> first_look_, class_planes_, tile_class_;
    std::vector<std::uint16_t> key_order_;
    std::vector<Index> first_bits_, class_bits_, class_tiles_;
    std::vector<float> tile_importance_;
    // For the certificate, by block of rows and part of the sequence: errors of scores and of values, and
    // whether keys are needed in full; by head and part the largest norm of a value.
    std::vector<double> score_errors_, value_errors_;
    std::vector<float> value_norms_;
    std::vector<std::uint8_t> whole_keys_;
};

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
          key_rotation_(configuration.key_head_dim, configuration.rotation_seed),
          value_rotation_(configuration.value_head_dim, configuration.rotation_seed + 1) {
        if (!configuration.fits_basis())
            layout_ =
                std::make_shared<const TileLayout>(tile_layout(configuration, configuration.latent_keys));
        clear();
    }

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
    ///
    /// queries: those of the same tokens, tokens x (query_heads * key_head_dim), after RoPE. They are looked
    /// at only while needs_queries(); without them append() then throws Error (option).
    template <class K, class V>
    void append(const K& keys, const V& values) {
        require(
            !needs_queries(), ErrorCode::option, "append: recipe '", recipe().name,
            "' fits its basis to the sequence's own queries; expected append(keys, values, queries), or a "
            "basis in the configuration");
        append_rows(input_heads(keys, configuration_.kv_heads), input_heads(values, configuration_.kv_heads),
                    Matrix());
    }
    template <class K, class V, class Q>
    void append(const K& keys, const V& values, const Q& queries) {
        const auto k = input_heads(keys, configuration_.kv_heads);
        Matrix seen;
        if (needs_queries()) {
            const auto q = input_heads(queries, configuration_.query_heads);
            require_input(q, "queries", configuration_.query_heads, configuration_.key_head_dim);
            require_storable(q, "queries");
            require(q.tokens() == k.tokens(), ErrorCode::shape, "append: ", k.tokens(), " keys and ",
                    q.tokens(), " queries, expected as many of each");
            seen = to_matrix_of(q);
        }
        append_rows(k, input_heads(values, configuration_.kv_heads), std::move(seen));
    }

    /// Whether append() needs queries: while the cache has yet to fit a query-weighted basis of its own.
    bool needs_queries() const noexcept {
        return !state_.layout && recipe().latents && recipe().latents->basis.query_weighted;
    }
    /// Fits the cache's own basis now, to all tokens that wait, as SVDq does at the end of a prompt; and
    /// makes the tiles that are then due. Throws Error: option (the recipe fits no basis, or has done so),
    /// shape (fewer than two tokens wait; fewer independent keys than latents that are to have bits),
    /// out_of_memory.
    void fit_basis();
    /// The basis that tiles are stored in; nullptr where keys are stored in channels, and before it is
    /// fitted.
    const LatentKeys* latent_keys() const noexcept {
        return state_.layout ? state_.layout->latent.get() : nullptr;
    }

    /// Attention of the last tokens of the sequence, causal among themselves. queries: query_tokens x
    /// (query_heads * key_head_dim), or a tensor; output: query_tokens x (query_heads * value_head_dim), of
    /// any float type and layout. Throws Error (shape, option) before it writes anything.
    ///
    /// Up to 8 query tokens go the fused way (attention/decode.hpp), which reads the packed bits as they are
    /// and allocates nothing in a workspace that has seen the shape before; more, and recipes that it cannot
    /// read (keys by token, latents before RoPE, a key_fraction), go by blocks of query tokens, for
    /// which a tile is decoded once, and matrix products, which take memory at every call (std::bad_alloc).
    /// Either way the workspace's executor runs it, and results do not depend on how many workers it has.
    /// Without a workspace the calling thread's own is used.
    template <class Q, class Derived>
    void attend(const Q& queries, Eigen::MatrixBase<Derived>& output,
                const AttentionParameters& parameters = {}) const {
        thread_local AttentionWorkspace workspace;
        attend(queries, output, parameters, workspace);
    }
    template <class Q, class Derived>
    void attend(const Q& queries, Eigen::MatrixBase<Derived>& output, const AttentionParameters& parameters,
                AttentionWorkspace& workspace) const {
        const auto rows = input_heads(queries, configuration_.query_heads);
        require_queries(rows.heads(), rows.tokens(), rows.head_dim(), output.rows(), output.cols());
        detail::require_parameters(parameters, configuration_.query_heads, rows.tokens(), tokens());
        require_sparse(parameters);
        require_readable(parameters);
        if (rows.tokens() == 0) return;
        if (fuses(rows.tokens(), parameters)) {
            attend_fused(rows, output, parameters, workspace);
            return;
        }
        output = attend_rows(to_matrix_of(rows), parameters, workspace.executor())
                     .template cast<typename Derived::Scalar>();
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
    void clear() noexcept {
        state_ = {};
        state_.layout = layout_;
    }

    /// Memory of all pages, headers and unused room included, and of a basis of the cache's own or what it
    /// has seen for one. A page shared by forks counts in each. A basis that was given is part of the model.
    Index bytes() const noexcept {
        Index sum = state_.sinks ? page_bytes(state_.sinks.bytes()) : 0;
        for (const Tile& tile : state_.tiles) sum += page_bytes(tile.page.bytes());
        for (const PageReference& page : state_.window) sum += page_bytes(page.bytes());
        if (configuration_.fits_basis() && latent_keys()) sum += latent_keys()->bytes();
        if (state_.queries)
            for (const SecondMoments& head : *state_.queries) sum += head.bytes();
        return sum;
    }
    /// 8 bytes() / elements of all tokens; 0 without tokens.
    double bits_per_element() const noexcept {
        const Index elements = tokens() * configuration_.elements_per_token();
        return elements == 0 ? 0.0 : 8.0 * static_cast<double>(bytes()) / static_cast<double>(elements);
    }
    /// What bytes() will be with that many tokens, appended and never truncated or dropped. Throws Error
    /// (option, index; option also where the cache fits its own basis, for the widths follow from that).
    static Index predicted_bytes(const CacheConfiguration& configuration, Index tokens);

    CacheErrorBound error_bound() const;

    /// The tokens of tiles that take part for each query with parameters.key_fraction: query head by query
    /// head, query_tokens each. For tests and inspection. Throws Error as attend().
    template <class Q>
    std::vector<std::vector<Index>> selected_keys(const Q& queries,
                                                  const AttentionParameters& parameters) const {
        const auto rows = input_heads(queries, configuration_.query_heads);
        require_queries(rows.heads(), rows.tokens(), rows.head_dim(), rows.tokens(),
                        configuration_.query_heads * configuration_.value_head_dim);
        detail::require_parameters(parameters, configuration_.query_heads, rows.tokens(), tokens());
        require_sparse(parameters);
        return selected(to_matrix_of(rows), parameters);
    }

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
    using QueryMoments = std::vector<SecondMoments>;  ///< by key head
    struct State {
        /// Of tiles; nullptr until the cache has fitted its basis.
        std::shared_ptr<const TileLayout> layout;
        std::shared_ptr<const QueryMoments> queries;  ///< before RoPE, while needed
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
    Index tile_bytes() const noexcept { return state_.layout ? state_.layout->bytes : 0; }
    Index dim(int side) const noexcept {
        return side == 0 ? configuration_.key_head_dim : configuration_.value_head_dim;
    }
    TokenRows sink_rows() const { return {configuration_, recipe().sink_tokens, 16}; }
    TokenRows window_rows() const { return {configuration_, window_page_tokens, recipe().recent_bits}; }
    /// Half of fp16's range where anything is quantized, so that no grid can ever leave fp16 later, when its
    /// tile is made and an append could no longer be refused.
    float largest_magnitude() const noexcept {
        const bool exact = recipe().keys.bits == 16 && recipe().values.bits == 16 &&
                           recipe().recent_bits == 16 && !recipe().latents;
        return exact ? fp16_max : 32000.0f;
    }

    template <CacheScalar K, CacheScalar V>
    void append_rows(const HeadRows<K>& keys, const HeadRows<V>& values, Matrix queries);
    template <CacheScalar Scalar>
    void require_input(const HeadRows<Scalar>& rows, const char* argument, Index heads, Index dim) const;
    template <CacheScalar Scalar>
    void require_magnitudes(const HeadRows<Scalar>& rows, int side) const;
    void require_queries(Index heads, Index query_tokens, Index head_dim, Index out_rows,
                         Index out_cols) const;

    class Appender;
    void commit(Addition& added);
    class Reader;
    /// Query tokens that the fused path takes at once.
    static constexpr Index fused_query_tokens = 8;
    /// Whether the fused path reads all that is stored.
    bool fuses(Index query_tokens, const AttentionParameters& parameters) const noexcept {
        if (query_tokens > fused_query_tokens || parameters.key_fraction < 1.0) return false;
        return state_.tiles.empty() || reads_planes(*state_.layout);
    }
    static bool reads_planes(const TileLayout& layout) noexcept {
        return fused_values(layout.values) &&
               (layout.latent ? layout.latent->frame() != KeyFrame::before_rope : fused_keys(layout.keys[0]));
    }
    class Fused;
    template <CacheScalar Scalar, class Derived>
    void attend_fused(const HeadRows<Scalar>& queries, Eigen::MatrixBase<Derived>& output,
                      const AttentionParameters& parameters, AttentionWorkspace& workspace) const;

    struct QueryBlock;
    struct Queries;
    struct Selection;
    class Blocked;
    Matrix attend_rows(const Matrix& given, const AttentionParameters& parameters, Executor& executor) const;
    Selection select(Reader& reader, const Queries& queries, const AttentionParameters& parameters) const;
    Index packed_in_tiles() const noexcept {
        Index sum = 0;
        for (const Tile& tile : state_.tiles) sum += tile.tokens;
        return sum;
    }
    /// How many leading latents of a part choose tokens.
    Index selection_latents(const AttentionParameters& parameters) const noexcept {
        if (parameters.selection_latents > 0) return parameters.selection_latents;
        const LatentKeys* const keys = latent_keys();
        return keys ? std::max<Index>(1, keys->subspace_channels() / 4) : 1;
    }
    void require_readable(const AttentionParameters& parameters) const {
        require(
            parameters.read.kind == ReadPolicy::Kind::all || !state_.layout || reads_planes(*state_.layout),
            ErrorCode::option, "attend: recipe '", recipe().name,
            "' is not read by planes; expected ReadPolicy::all()");
        const bool half_keys = !recipe().latents && recipe().keys.bits == 16,
                   half_values = recipe().values.bits == 16;
        const ReadPolicy& read = parameters.read;
        const bool by_bits = read.kind == ReadPolicy::Kind::fixed || read.kind == ReadPolicy::Kind::aligned;
        require(
            !by_bits || ((!half_keys || read.key_bits >= 8.0) && (!half_values || read.value_bits >= 8.0)),
            ErrorCode::option, "attend: a read of ", read.key_bits, " bits of keys and ", read.value_bits,
            " of values, but recipe '", recipe().name, "' keeps ",
            half_keys && half_values ? "both"
            : half_keys              ? "keys"
                                     : "values",
            " in fp16, of which no fewer than 8 bits are a number; expected at least 8");
        require(parameters.read.kind != ReadPolicy::Kind::exponents || recipe().values.bits == 16 ||
                    (!recipe().latents && recipe().keys.bits == 16),
                ErrorCode::option, "attend: recipe '", recipe().name,
                "' holds no fp16 to be read by exponents; expected fp16 keys or values, or another policy");
    }
    void require_sparse(const AttentionParameters& parameters) const {
        require(parameters.key_fraction >= 1.0 || recipe().latents, ErrorCode::option, "attend: recipe '",
                recipe().name, "' has no latents to choose keys by; expected a key_fraction of 1");
    }
    std::vector<std::vector<Index>> selected(const Matrix& given,
                                             const AttentionParameters& parameters) const;
    Matrix stored(int side, Index first, Index count) const;

    /// Tokens x channels of all heads, as floats.
    template <CacheScalar Scalar>
    static void to_matrix(const HeadRows<Scalar>& rows, Matrix& matrix) {
        matrix.resize(rows.tokens(), rows.channels());
        if (matrix.size() == 0) return;
        if constexpr (std::is_same_v<Scalar, Eigen::half>)
            if (rows.channel_stride() == 1) {
                const Isa isa = current_isa();
                for (Index t = 0; t < rows.tokens(); ++t)
                    for (Index h = 0; h < rows.heads(); ++h)
                        widen_row(isa, rows.at(h, t), rows.head_dim(),
                                  matrix.data() + t * matrix.cols() + h * rows.head_dim());
                return;
            }
        for (Index h = 0; h < rows.heads(); ++h)
            matrix.middleCols(h * rows.head_dim(), rows.head_dim()) = rows.head(h).template cast<float>();
    }
    template <CacheScalar Scalar>
    static Matrix to_matrix_of(const HeadRows<Scalar>& rows) {
        Matrix matrix;
        to_matrix(rows, matrix);
        return matrix;
    }

    CacheConfiguration configuration_;
    TilePool* pool_;
    std::shared_ptr<const TileLayout> layout_;  ///< nullptr: it follows from a basis of the cache's own
    Hadamard key_rotation_, value_rotation_;
    State state_;
};

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
    require(!c.fits_basis(), ErrorCode::option, "predicted_bytes: recipe '", recipe.name,
            "' fits its own basis, from which the widths of its latents follow; expected one that is given");
    const Index tile = page_bytes(tile_layout(c, c.latent_keys).bytes);
    if (recipe.every_token) return (tokens + tile_tokens - 1) / tile_tokens * tile;
    if (tokens == 0) return 0;
    const Index sinks = recipe.sink_tokens > 0 ? page_bytes(TokenRows(c, recipe.sink_tokens, 16).bytes()) : 0;
    const Index rest = std::max<Index>(0, tokens - recipe.sink_tokens);
    const Index tiles = std::max<Index>(0, rest - recipe.recent_tokens) / tile_tokens;
    const Index window = (rest - tiles * tile_tokens + window_page_tokens - 1) / window_page_tokens;
    return sinks + tiles * tile +
           window * page_bytes(TokenRows(c, window_page_tokens, recipe.recent_bits).bytes());
}

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

}  // namespace kvplane

#include "kvplane/cache/append.hpp"
#include "kvplane/cache/blocked_attention.hpp"
#include "kvplane/cache/fused_attention.hpp"
