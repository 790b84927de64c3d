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
#include "kvplane/cache/latent_keys.hpp"
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
/// was seen before allocates nothing. One call at a time.
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
    std::vector<float> largest_, sum_, output_;    ///< by part of the sequence, and row
    ReadReport report_;
    std::vector<std::array<Index, 2>> bits_,
        elements_;  ///< that parts of the sequence read, by part and head
    // Of reads by weight. weights_: relative to the largest score so far, tops_, by tile, row (and token);
    // units_: what they come to in every read unit of values, by tile, row and unit; importance_: of all
    // rows together, by tile, block of rows and unit; least_: the least gain that is read, by block; norms_:
    // 1 / sum of weights, by row, relative to all_tops_.
    std::vector<float> weights_, tops_, units_, importance_, least_, norms_, all_tops_;
    // Of keys by budget: the units of all parts; the planes of them that the first look takes; by part and
    // class of tiles what is read in the end; the class of each tile and part, and how many there are.
    std::vector<ReadUnit> key_units_;
    std::vector<std::uint8_t> first_look_, class_planes_, tile_class_;
    std::vector<std::uint16_t> key_order_;
    std::vector<Index> class_tiles_;
    // For the certificate: errors of scores and of values by part of the sequence and block of rows; the
    // largest norm of a value by part and head.
    std::vector<double> score_errors_, value_errors_;
    std::vector<float> value_norms_;
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
        return keys ? std::max<Index>(1, keys->part_channels() / 4) : 1;
    }
    void require_readable(const AttentionParameters& parameters) const {
        require(
            parameters.read.kind == ReadPolicy::Kind::all || !state_.layout || reads_planes(*state_.layout),
            ErrorCode::option, "attend: recipe '", recipe().name,
            "' is not read by planes; expected ReadPolicy::all()");
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

// Appending ------------------------------------------------------------------------------------------------

template <CacheScalar Scalar>
void KvCache::require_input(const HeadRows<Scalar>& rows, const char* argument, Index heads,
                            Index dim) const {
    require(rows.heads() == heads && rows.head_dim() == dim, ErrorCode::shape, "append: ", argument, " of ",
            rows.heads(), " heads of ", rows.head_dim(), " channels, expected ", heads, " of ", dim);
}

/// That every value can be stored, in the frame in which it is. Throws Error (not_finite, beyond_fp16).
template <CacheScalar Scalar>
void KvCache::require_magnitudes(const HeadRows<Scalar>& rows, int side) const {
    const char* const argument = side == 0 ? "keys" : "values";
    const bool rotates = side == 0 ? recipe().keys.rotate : recipe().values.rotate;
    const float largest = kvplane::largest_magnitude(rows), most = largest_magnitude();
    if (!(largest <= fp16_max)) require_storable(rows, argument);
    // A rotation makes no element larger than its head's norm.
    if (largest * (rotates ? std::sqrt(static_cast<float>(dim(side))) : 1.0f) <= most) return;
    Matrix stored;
    for (Index token = 0; token < rows.tokens(); ++token) {
        to_matrix(rows.middle_tokens(token, 1), stored);
        if (rotates) (side == 0 ? key_rotation_ : value_rotation_).rotate(stored);
        Index channel = 0;
        const float magnitude = stored.row(0).cwiseAbs().maxCoeff(&channel);
        require(magnitude <= most, ErrorCode::beyond_fp16, "append: ", argument, ": token ", token,
                ", channel ", channel, " has the magnitude ", magnitude,
                " (after rotation, where the recipe rotates); expected at most ", most);
    }
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
        next.layout = cache.state_.layout;
        next.queries = cache.state_.queries;
        for (int side = 0; side < 2; ++side) {
            next.largest[side] = cache.state_.largest[side];
            next.excess[side] = cache.state_.excess[side];
        }
        if (!cache.state_.tiles.empty()) added_.last_tokens = cache.state_.tiles.back().tokens;
    }

    /// Tokens of one piece, already in the stored frame, and their largest magnitudes by side; queries before
    /// RoPE, where they are needed.
    void add(const Matrix& keys, const Matrix& values, const Matrix& queries, const double (&largest)[2]) {
        for (int side = 0; side < 2; ++side)
            added_.next.largest[side] = std::max(added_.next.largest[side], largest[side]);
        for (Index done = 0; done < keys.rows();) {
            const Index left = keys.rows() - done;
            if (cache_.recipe().every_token)
                done += fill_tile(keys, values, done, left);
            else if (added_.next.tokens < cache_.recipe().sink_tokens)
                done += fill_sinks(keys, values, done, left);
            else
                done += fill_window(keys, values, queries, done, left);
        }
    }

    /// Fits the basis to `count` tokens of the window, and makes the tiles that are due.
    void fit(Index count, bool by_request) {
        State& next = added_.next;
        const CacheConfiguration& c = cache_.configuration_;
        LatentRecipe recipe = *c.recipe.latents;
        recipe.basis.heads_together = recipe.own_heads_together;
        const RotaryEmbedding rope =
            c.rope ? RotaryEmbedding(c.key_head_dim, *c.rope) : RotaryEmbedding::none(c.key_head_dim);
        SecondMoments keys(c.kv_heads * c.key_head_dim);
        keys.add(rope.before({window_keys(count), next.window_first}).rows, "keys");
        const QueryMoments none(static_cast<std::size_t>(c.kv_heads), SecondMoments(c.key_head_dim));
        const LatentStatistics statistics(c.query_heads, std::move(keys),
                                          next.queries ? *next.queries : none);
        // By request, a schedule that asks for more latents than there are is refused; otherwise it is cut.
        next.layout = std::make_shared<const TileLayout>(
            tile_layout(c, fit_latent_keys(statistics, c.rope, recipe, recipe.basis.context, !by_request)));
        next.queries.reset();
        while (next.tokens >= next.window_first + tile_tokens + c.recipe.recent_tokens) make_tile();
    }

    Addition& result() noexcept { return added_; }

  private:
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
    const TileLayout& layout() const noexcept { return *added_.next.layout; }
    TileCoder& coder(int side) {
        if (!coders_[side]) coders_[side].emplace(side == 0 ? layout().keys[0] : layout().values);
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

    Index fill_window(const Matrix& keys, const Matrix& values, const Matrix& queries, Index first,
                      Index count) {
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
        const Index waiting = next.layout ? tile_tokens : cache_.recipe().latents->fit_tokens;
        const Index due = next.window_first + waiting + cache_.recipe().recent_tokens;
        if (next.tokens < due) count = std::min(count, due - next.tokens);
        window_rows_.write(keys, values, first, count, row, next.window[page].data());
        if (!next.layout && queries.rows() > 0) note_queries(queries.middleRows(first, count));
        next.tokens += count;
        if (next.tokens >= due) {
            if (next.layout)
                make_tile();
            else
                fit(waiting, false);
        }
        return count;
    }

    /// Token by token, for sums in another order would give other bytes.
    void note_queries(const Matrix& queries) {
        const CacheConfiguration& c = cache_.configuration_;
        if (!queries_) {
            queries_ = added_.next.queries
                           ? std::make_shared<QueryMoments>(*added_.next.queries)
                           : std::make_shared<QueryMoments>(static_cast<std::size_t>(c.kv_heads),
                                                            SecondMoments(c.key_head_dim));
            added_.next.queries = queries_;
        }
        for (Index t = 0; t < queries.rows(); ++t)
            for (Index head = 0; head < c.query_heads; ++head)
                (*queries_)[static_cast<std::size_t>(head / c.group())].add(
                    queries.block(t, head * c.key_head_dim, 1, c.key_head_dim));
    }

    /// The oldest `count` keys of the window as attention takes them, tokens x (kv_heads * key_head_dim).
    Matrix window_keys(Index count) {
        const Index dim = cache_.dim(0), heads = cache_.configuration_.kv_heads;
        Matrix keys(count, heads * dim);
        for (Index head = 0; head < heads; ++head)
            read_window(0, head, count, keys.data() + head * dim, keys.cols());
        if (cache_.recipe().keys.rotate) cache_.key_rotation_.rotate_back(keys);
        return keys;
    }
    void read_window(int side, Index head, Index count, float* to, Index stride) const {
        for (Index t = 0; t < count; t += window_page_tokens)
            window_rows_.read(added_.next.window[static_cast<std::size_t>(t / window_page_tokens)].data(),
                              side, head, 0, std::min(window_page_tokens, count - t), to + t * stride,
                              stride);
    }

    /// The oldest 128 recent tokens become a tile.
    void make_tile() {
        State& next = added_.next;
        const Index heads = cache_.configuration_.kv_heads;
        PageReference page = cache_.pool_->page(layout().bytes);
        const auto encode = [&](int side, Index head, Index at) {
            const Index dim = cache_.dim(side);
            const auto encode_rows = [&](const auto& rows) {
                coder(side).encode(head_rows(rows), side == 0 ? "keys" : "values", 0, 0, tile_tokens, 0,
                                   page.data() + at);
            };
            if (window_rows_.half()) {
                halves_.resize(tile_tokens, dim);
                for (Index p = 0; p < tile_tokens / window_page_tokens; ++p)
                    std::copy_n(
                        window_rows_.half_rows(next.window[static_cast<std::size_t>(p)].data(), side, head),
                        window_page_tokens * dim, halves_.data() + p * window_page_tokens * dim);
                encode_rows(halves_);
            } else {
                gathered_.resize(tile_tokens, dim);
                read_window(side, head, tile_tokens, gathered_.data(), dim);
                encode_rows(gathered_);
            }
            next.excess[side] = std::max(next.excess[side], coder(side).excess().largest);
        };
        if (layout().latent) {
            if (!latents_) latents_.emplace(layout().latent);
            std::vector<std::byte*> tiles;
            for (const Index at : layout().key_at) tiles.push_back(page.data() + at);
            const double off = latents_->encode({window_keys(tile_tokens), next.window_first}, tiles);
            next.excess[0] = std::max(next.excess[0], off);
        } else {
            for (Index head = 0; head < heads; ++head)
                encode(0, head, layout().key_at[static_cast<std::size_t>(head)]);
        }
        for (Index head = 0; head < heads; ++head)
            encode(1, head, layout().value_at[static_cast<std::size_t>(head)]);
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
            added_.tiles.push_back({cache_.pool_->page(layout().bytes), next.tokens, 0});
            tokens = &added_.tiles.back().tokens;
        } else if (old && !added_.last_page) {
            added_.last_page = writable(cache_.state_.tiles.back().page);
        }
        std::byte* const page = (added_.tiles.empty() ? added_.last_page : added_.tiles.back().page).data();
        count = std::min(count, tile_tokens - *tokens);
        for (int side = 0; side < 2; ++side)
            for (Index head = 0; head < cache_.configuration_.kv_heads; ++head)
                coder(side).encode(
                    head_rows(side == 0 ? keys : values, cache_.configuration_.kv_heads),
                    side == 0 ? "keys" : "values", head, first, count, *tokens,
                    page + (side == 0 ? layout().key_at : layout().value_at)[static_cast<std::size_t>(head)]);
        *tokens += count;
        next.tokens += count;
        next.window_first = next.tokens;
        return count;
    }

    const KvCache& cache_;
    std::optional<TileCoder> coders_[2];  ///< made when a tile is
    std::optional<LatentCoder> latents_;
    std::shared_ptr<QueryMoments> queries_;  ///< this addition's own copy
    TokenRows sink_rows_, window_rows_;
    Matrix gathered_;
    RowMajorMatrix<Eigen::half> halves_;
    Addition added_;
};

template <CacheScalar K, CacheScalar V>
void KvCache::append_rows(const HeadRows<K>& keys, const HeadRows<V>& values, Matrix queries) {
    require_input(keys, "keys", configuration_.kv_heads, configuration_.key_head_dim);
    require_input(values, "values", configuration_.kv_heads, configuration_.value_head_dim);
    require(keys.tokens() == values.tokens(), ErrorCode::shape, "append: ", keys.tokens(), " keys and ",
            values.tokens(), " values, expected as many of each");
    if (keys.tokens() == 0) return;
    require_magnitudes(keys, 0);
    require_magnitudes(values, 1);
    if (queries.rows() > 0 && configuration_.rope)
        RotaryEmbedding(configuration_.key_head_dim, *configuration_.rope).rotate_back(queries, tokens());
    Appender appender(*this);
    // In pieces that stay in a core's cache from one step to the next.
    const Isa isa = current_isa();
    Matrix k, v;
    for (Index first = 0; first < keys.tokens(); first += window_page_tokens) {
        const Index count = std::min(window_page_tokens, keys.tokens() - first);
        to_matrix(keys.middle_tokens(first, count), k);
        to_matrix(values.middle_tokens(first, count), v);

        if (recipe().keys.rotate) key_rotation_.rotate(k);
        if (recipe().values.rotate) value_rotation_.rotate(v);
        const double largest[2] = {kvplane::largest_magnitude(isa, k.data(), k.size()),
                                   kvplane::largest_magnitude(isa, v.data(), v.size())};
        appender.add(k, v, queries.rows() > 0 ? Matrix(queries.middleRows(first, count)) : queries, largest);
    }
    commit(appender.result());
}

inline void KvCache::commit(Addition& added) {
    state_.tiles.reserve(state_.tiles.size() + added.tiles.size());
    // Nothing below can fail.
    if (added.last_page) state_.tiles.back().page = std::move(added.last_page);
    if (!state_.tiles.empty()) state_.tiles.back().tokens = added.last_tokens;
    for (Tile& tile : added.tiles) state_.tiles.push_back(std::move(tile));
    std::swap(added.next.tiles, state_.tiles);
    state_ = std::move(added.next);
}

inline void KvCache::fit_basis() {
    require(configuration_.fits_basis() && !state_.layout, ErrorCode::option, "fit_basis: recipe '",
            recipe().name, "' ", configuration_.fits_basis() ? "has its basis" : "fits no basis of its own");
    const Index waiting = tokens() - state_.window_first;
    require(waiting >= 2, ErrorCode::shape, "fit_basis: ", waiting,
            " tokens after the sinks, expected at least 2");
    Appender appender(*this);
    appender.fit(waiting, true);
    commit(appender.result());
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

// Reading --------------------------------------------------------------------------------------------------

/// Decodes, run by run: sinks, tiles, recent tokens.
class KvCache::Reader {
  public:
    /// Consecutive tokens; those of a tile, or not.
    struct Run {
        Index first, count;
        const Tile* tile;
    };

    explicit Reader(const KvCache& cache)
        : cache_(cache), sink_rows_(cache.sink_rows()), window_rows_(cache.window_rows()) {
        const State& state = cache.state_;
        if (cache.sinks() > 0) runs_.push_back({0, cache.sinks(), nullptr});
        for (const Tile& tile : state.tiles) runs_.push_back({tile.first, tile.tokens, &tile});
        if (!state.window.empty())
            runs_.push_back({state.window_first, state.tokens - state.window_first, nullptr});
        if (state.tiles.empty()) return;
        values_.emplace(state.layout->values);
        if (state.layout->latent)
            latents_.emplace(state.layout->latent);
        else
            keys_.emplace(state.layout->keys[0]);
    }

    /// Runs that hold tokens which are still kept.
    const std::vector<Run>& runs() const noexcept { return runs_; }

    /// One side (0 keys, 1 values) and head of a run, in the frame of its rows: count x dim. Not for keys in
    /// latents.
    const Matrix& rows(const Run& run, int side, Index head) {
        const Index dim = cache_.dim(side);
        decoded_.resize(run.count, dim);
        if (run.tile) {
            (side == 0 ? *keys_ : *values_).decode(tile(run, side, head), run.count, decoded_.data(), dim);
        } else if (run.first < cache_.sinks()) {
            sink_rows_.read(cache_.state_.sinks.data(), side, head, 0, run.count, decoded_.data(), dim);
        } else {
            for (Index t = 0; t < run.count; t += window_page_tokens)
                window_rows_.read(
                    cache_.state_.window[static_cast<std::size_t>(t / window_page_tokens)].data(), side, head,
                    0, std::min(window_page_tokens, run.count - t), decoded_.data() + t * dim, dim);
        }
        return decoded_;
    }

    bool in_latents(const Run& run) const noexcept { return run.tile && latents_; }
    /// Keys of one head of a run in the frame of the input; of latents the first `most` count.
    Matrix input_keys(const Run& run, Index head, Index most) {
        if (in_latents(run))
            return latents_->reconstruct(head, latent_tile(run, head), run.count, run.first, most);
        Matrix keys = rows(run, 0, head);
        if (cache_.recipe().keys.rotate) cache_.key_rotation_.rotate_back(keys);
        return keys;
    }

    /// q.k of queries and the keys of a run. Of latents the first `most` count.
    void scores(const Run& run, const Queries& queries, Index most, Matrix& scores);

    double tile_error_bound(const Tile& tile, int side) {
        const Run run{tile.first, tile.tokens, &tile};
        if (side == 0 && latents_) return 0.0;  // measured when it was made
        double bound = 0.0;
        for (Index head = 0; head < cache_.configuration_.kv_heads; ++head)
            bound = std::max(
                bound, (side == 0 ? *keys_ : *values_).error_bound(this->tile(run, side, head), tile.tokens));
        return bound;
    }

  private:
    const std::byte* tile(const Run& run, int side, Index head) const {
        const TileLayout& layout = *cache_.state_.layout;
        return run.tile->page.data() +
               (side == 0 ? layout.key_at : layout.value_at)[static_cast<std::size_t>(head)];
    }
    const std::byte* latent_tile(const Run& run, Index head) const {
        return tile(run, 0, cache_.state_.layout->latent->part_of_head(head));
    }

    void projected_scores(const Run& run, const LatentKeys& keys, const Queries& queries, Index most,
                          Matrix& scores);

    const KvCache& cache_;
    std::vector<Run> runs_;
    std::optional<TileCoder> keys_, values_;
    std::optional<LatentCoder> latents_;
    TokenRows sink_rows_, window_rows_;
    Matrix decoded_, turned_, projected_;
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

/// Some of the queries: of the heads that share some key heads, and of some query tokens.
struct KvCache::QueryBlock {
    Index first_head, heads;  ///< of keys
    Index first, tokens;
};

/// Queries of a block, query head by query head below each other, as given and as keys in channels are
/// stored; and what becomes of their scores.
struct KvCache::Queries {
    /// given: all of them, query_tokens x (query_heads * key_head_dim).
    Queries(const KvCache& cache, const Matrix& given, const AttentionParameters& parameters,
            const QueryBlock& which)
        : block(which), per_head(cache.configuration_.group() * which.tokens) {
        const CacheConfiguration& c = cache.configuration_;
        first_position = cache.tokens() - given.rows();
        plain.resize(block.heads * per_head, c.key_head_dim);
        for (Index h = 0; h < block.heads * c.group(); ++h) {
            const Index head = block.first_head * c.group() + h;
            plain.middleRows(h * block.tokens, block.tokens) =
                given.block(block.first, head * c.key_head_dim, block.tokens, c.key_head_dim);
            rules.emplace_back(parameters, head, given.rows(), c.key_head_dim);
        }
        rotated = plain;
        if (c.recipe.keys.rotate) cache.key_rotation_.rotate(rotated);
    }

    Index rows() const noexcept { return plain.rows(); }
    Index token(Index row) const noexcept { return block.first + row % block.tokens; }
    Index position(Index row) const noexcept { return first_position + token(row); }
    /// Of the last query token.
    Index last_position() const noexcept { return first_position + block.first + block.tokens - 1; }

    QueryBlock block;
    Index per_head;  ///< rows of one key head
    Index first_position;
    Matrix plain, rotated;
    std::vector<detail::ScoreRule<float>> rules;  ///< by query head of the block

    /// From q.k of a run to what the softmax takes; hidden tokens get -infinity.
    void apply(const Reader::Run& run, Index hidden_from, Index hidden_to, Matrix& scores) const {
        constexpr float none = -std::numeric_limits<float>::infinity();
        for (Index r = 0; r < rows(); ++r) {
            const detail::ScoreRule<float>& rule = rules[static_cast<std::size_t>(r / block.tokens)];
            auto row = scores.row(r);
            const bool all_seen = run.first + run.count - 1 <= position(r) &&
                                  (run.first >= hidden_to || run.first < hidden_from);
            if (rule.plain() && all_seen) {
                row *= rule.scale();
                continue;
            }
            for (Index t = 0; t < run.count; ++t) {
                const Index key = run.first + t;
                row[t] =
                    key >= hidden_from && key < hidden_to ? none : rule(row[t], token(r), position(r), key);
            }
        }
    }
};

inline void KvCache::Reader::scores(const Run& run, const Queries& queries, Index most, Matrix& scores) {
    const Index first_head = queries.block.first_head, per_head = queries.per_head;
    scores.resize(queries.rows(), run.count);
    const LatentKeys* const keys = in_latents(run) ? cache_.state_.layout->latent.get() : nullptr;
    if (keys && keys->frame() != KeyFrame::before_rope)
        return projected_scores(run, *keys, queries, most, scores);
    for (Index h = 0; h < queries.block.heads; ++h) {
        auto to = scores.middleRows(h * per_head, per_head);
        if (keys)
            to.noalias() = queries.plain.middleRows(h * per_head, per_head) *
                           input_keys(run, first_head + h, most).transpose();
        else
            to.noalias() =
                queries.rotated.middleRows(h * per_head, per_head) * rows(run, 0, first_head + h).transpose();
    }
}

/// The queries are turned and projected, once for the tile; no key is rebuilt. (Keys before RoPE have an
/// angle each, so these are: the slow path that SVDq's authors name.)
inline void KvCache::Reader::projected_scores(const Run& run, const LatentKeys& keys, const Queries& queries,
                                              Index most, Matrix& scores) {
    const Index per_head = queries.per_head, dim = cache_.dim(0);
    turned_ = queries.plain;
    if (keys.frame() == KeyFrame::tile) keys.embedding().turn(turned_, -run.first);
    const Matrix* latents = nullptr;
    for (Index h = 0; h < queries.block.heads; ++h) {
        const Index head = queries.block.first_head + h, part = keys.part_of_head(head),
                    at = keys.head_offset(head);
        if (!latents || keys.parts() > 1)
            latents = &latents_->latents(part, latent_tile(run, head), run.count);
        const Index kept = std::min(most, latents->cols());
        const auto turned = turned_.middleRows(h * per_head, per_head);
        projected_.noalias() = turned * latents_->decode_matrix(part).block(at, 0, dim, kept);
        auto to = scores.middleRows(h * per_head, per_head);
        to.noalias() = projected_ * latents->leftCols(kept).transpose();
        to.colwise() += turned * keys.part(part).mean.segment(at, dim).transpose();
    }
}

/// For every row the least approximate score that a token of a tile needs to take part; and the approximate
/// scores, rows x tokens in tiles.
struct KvCache::Selection {
    Eigen::VectorXf least;
    Matrix scores;
};

inline KvCache::Selection KvCache::select(Reader& reader, const Queries& queries,
                                          const AttentionParameters& parameters) const {
    Selection selection{Eigen::VectorXf(queries.rows()), Matrix(queries.rows(), packed_in_tiles())};
    const Index latents = selection_latents(parameters);
    Matrix scores;
    Index at = 0;
    for (const Reader::Run& run : reader.runs()) {
        if (!run.tile) continue;
        reader.scores(run, queries, latents, scores);
        queries.apply(run, recipe().sink_tokens, state_.dropped, scores);
        selection.scores.middleCols(at, run.count) = scores;
        at += run.count;
    }
    const auto kept = static_cast<Index>(std::ceil(parameters.key_fraction * static_cast<double>(at)));
    std::vector<float> sorted(static_cast<std::size_t>(at));
    for (Index r = 0; r < queries.rows() && at > 0; ++r) {
        std::copy_n(selection.scores.row(r).data(), at, sorted.begin());
        const auto place = sorted.begin() + std::clamp<Index>(kept - 1, 0, at - 1);
        std::nth_element(sorted.begin(), place, sorted.end(), std::greater<>());
        selection.least[r] = *place;
    }
    return selection;
}

/// The blocked path: heads and blocks of query tokens, each by itself, with an online softmax over runs.
class KvCache::Blocked {
  public:
    Blocked(const KvCache& cache, const Matrix& queries, const AttentionParameters& parameters,
            Executor& executor)
        : cache_(cache),
          queries_(queries),
          parameters_(parameters),
          output_(queries.rows(), cache.configuration_.query_heads * cache.dim(1)) {
        const LatentKeys* const keys = cache.latent_keys();
        // One part holds the latents of all heads, which so decode it together.
        const Index heads = cache.configuration_.kv_heads, together = keys && keys->parts() == 1 ? heads : 1;
        for (Index head = 0; head < heads; head += together)
            for (Index first = 0; first < queries.rows(); first += block_tokens)
                blocks_.push_back({head, together, first, std::min(block_tokens, queries.rows() - first)});
        readers_.emplace_back(cache);
        if (blocks_.size() > 1)
            while (static_cast<Index>(readers_.size()) < executor.workers())
                readers_.push_back(readers_.front());
    }

    Matrix run(Executor& executor) {
        const auto body = [](void* self, Index item, Index worker) {
            static_cast<Blocked*>(self)->guarded(item, worker);
        };
        if (readers_.size() == 1) {
            SerialExecutor alone;
            alone.run(static_cast<Index>(blocks_.size()), body, this);
        } else {
            executor.run(static_cast<Index>(blocks_.size()), body, this);
        }
#if defined(__cpp_exceptions)
        if (failure_) std::rethrow_exception(failure_);
#endif
        if (cache_.recipe().values.rotate) cache_.value_rotation_.rotate_back(output_);
        return std::move(output_);
    }

  private:
    /// Query tokens of a block: enough to make up for decoding, few enough to share out among threads.
    static constexpr Index block_tokens = 128;

    /// What fails here fails where memory ends; executors take no exceptions.
    void guarded(Index item, Index worker) noexcept {
#if defined(__cpp_exceptions)
        try {
            attend(blocks_[static_cast<std::size_t>(item)], readers_[static_cast<std::size_t>(worker)]);
        } catch (...) {
            const std::lock_guard lock(mutex_);
            failure_ = std::current_exception();
        }
#else
        attend(blocks_[static_cast<std::size_t>(item)], readers_[static_cast<std::size_t>(worker)]);
#endif
    }

    void attend(const QueryBlock& block, Reader& reader) {
        const Queries queries(cache_, queries_, parameters_, block);
        const Index value_dim = cache_.dim(1), rows = queries.rows(), per_head = queries.per_head;
        const Index hidden_from = cache_.recipe().sink_tokens, hidden_to = cache_.state_.dropped;
        const Index all_latents = cache_.dim(0) * cache_.configuration_.kv_heads;
        constexpr float none = -std::numeric_limits<float>::infinity();
        Selection selection;
        const bool sparse = parameters_.key_fraction < 1.0;
        if (sparse) selection = cache_.select(reader, queries, parameters_);
        Eigen::VectorXf largest = Eigen::VectorXf::Constant(rows, none), sum = Eigen::VectorXf::Zero(rows);
        Matrix weighted = Matrix::Zero(rows, value_dim), scores;

        Index packed = 0;
        for (const Reader::Run& run : reader.runs()) {
            const Index at = std::exchange(packed, run.tile ? packed + run.count : packed);
            if (run.first > queries.last_position()) break;
            if (run.first >= hidden_from && run.first + run.count <= hidden_to) continue;
            if (sparse && run.tile &&
                (selection.scores.middleCols(at, run.count).rowwise().maxCoeff().array() <
                 selection.least.array())
                    .all())
                continue;
            reader.scores(run, queries, all_latents, scores);
            queries.apply(run, hidden_from, hidden_to, scores);
            if (sparse && run.tile)
                for (Index r = 0; r < rows; ++r)
                    for (Index t = 0; t < run.count; ++t)
                        if (selection.scores(r, at + t) < selection.least[r]) scores(r, t) = none;
            for (Index r = 0; r < rows; ++r) {
                auto row = scores.row(r);
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
            for (Index h = 0; h < block.heads; ++h)
                weighted.middleRows(h * per_head, per_head).noalias() +=
                    scores.middleRows(h * per_head, per_head) * reader.rows(run, 1, block.first_head + h);
        }
        const Index first_head = block.first_head * cache_.configuration_.group();
        for (Index r = 0; r < rows; ++r)
            output_.row(queries.token(r)).segment((first_head + r / block.tokens) * value_dim, value_dim) =
                weighted.row(r) * (sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f);
    }

    const KvCache& cache_;
    const Matrix& queries_;
    const AttentionParameters& parameters_;
    Matrix output_;
    std::vector<QueryBlock> blocks_;
    std::vector<Reader> readers_;  ///< by worker
#if defined(__cpp_exceptions)
    std::mutex mutex_;
    std::exception_ptr failure_;
#endif
};

inline Matrix KvCache::attend_rows(const Matrix& given, const AttentionParameters& parameters,
                                   Executor& executor) const {
    return Blocked(*this, given, parameters, executor).run(executor);
}

/// The fused path: chunks of tiles and heads, in any order and thread, each into a part of its own; then the
/// parts are merged in the order of the sequence.
class KvCache::Fused {
  public:
    Fused(const KvCache& cache, Index query_tokens, const ReadPolicy& policy, AttentionWorkspace& workspace)
        : cache_(cache),
          work_(workspace),
          policy_(policy),
          isa_(current_isa()),
          query_tokens_(query_tokens),
          heads_(cache.configuration_.kv_heads),
          block_(cache.configuration_.group() * query_tokens),
          rows_(heads_ * block_),
          key_dim_(cache.dim(0)),
          value_dim_(cache.dim(1)),
          stride_(padded_channels(value_dim_)),
          first_position_(cache.tokens() - query_tokens),
          chunks_((static_cast<Index>(cache.state_.tiles.size()) + chunk_tiles - 1) / chunk_tiles),
          sink_rows_(cache.sink_rows()),
          window_rows_(cache.window_rows()) {
        const TileLayout* const layout = cache.state_.layout.get();
        together_ = layout && layout->latent && layout->latent->parts() == 1 && heads_ > 1;
        const Index widest = std::max({key_dim_ * (together_ ? heads_ : 1), stride_, tile_tokens});
        work_.scratch_.resize(static_cast<std::size_t>(work_.executor().workers()));
        for (FusedScratch& scratch : work_.scratch_) scratch.reserve(widest);
        const auto parts = static_cast<std::size_t>((chunks_ + 1) * rows_);
        work_.plain_.resize(static_cast<std::size_t>(rows_ * key_dim_));
        work_.rotated_.resize(work_.plain_.size());
        work_.partner_.resize(layout && layout->latent ? work_.plain_.size() : 0);
        work_.largest_.resize(parts);
        work_.sum_.resize(parts);
        work_.output_.resize(parts * static_cast<std::size_t>(stride_));
        work_.rules_.reserve(static_cast<std::size_t>(cache.configuration_.query_heads));
        work_.rules_.clear();
        work_.bits_.assign(static_cast<std::size_t>(chunks_ * heads_), {0, 0});
        work_.elements_.assign(work_.bits_.size(), {0, 0});
        if (by_weight() && chunks_ > 0) reserve_by_weight();
    }

    template <CacheScalar Scalar>
    void take(const HeadRows<Scalar>& queries, const AttentionParameters& parameters) noexcept {
        bool finite = true;
        for (Index head = 0; head < queries.heads(); ++head) {
            work_.rules_.emplace_back(parameters, head, query_tokens_, key_dim_);
            const float scale = work_.rules_.back().plain() ? work_.rules_.back().scale() : 1.0f;
            for (Index i = 0; i < query_tokens_; ++i) {
                float* const row = work_.plain_.data() + (head * query_tokens_ + i) * key_dim_;
                for (Index c = 0; c < key_dim_; ++c) {
                    row[c] = scale * static_cast<float>(*queries.at(head, i, c));
                    finite = finite && std::isfinite(row[c]);
                }
            }
        }
        if (!finite) policy_ = ReadPolicy::all();
        std::copy(work_.plain_.begin(), work_.plain_.end(), work_.rotated_.begin());
        if (cache_.recipe().keys.rotate)
            for (Index r = 0; r < rows_; ++r)
                cache_.key_rotation_.rotate(work_.rotated_.data() + r * key_dim_);
        if (work_.partner_.empty()) return;
        for (Index r = 0; r < rows_; ++r) {
            const float* const row = work_.plain_.data() + r * key_dim_;
            float* const partner = work_.partner_.data() + r * key_dim_;
            for (const RotaryEmbedding::Pair& pair : cache_.latent_keys()->embedding().pairs()) {
                const Index second = pair.second >= 0 ? pair.second : pair.first;
                partner[pair.first] = row[second];
                partner[second] = row[pair.first];
            }
        }
    }

    void run() noexcept {
        const Index tile_items = chunks_ * across();
        const bool in_two = by_weight() && chunks_ > 0;
        const bool aligned = in_two && policy_.kind == ReadPolicy::Kind::aligned;
        if (aligned) plan_first_look();
        each<&Fused::process>(tile_items + heads_);
        if (aligned) {
            take_norms();
            weigh();
            plan_keys();
            look_again_ = true;
            each<&Fused::process>(tile_items);
        }
        if (in_two) {
            // Which values count is known when all scores are.
            take_norms();
            if (policy_.kind != ReadPolicy::Kind::exponents) choose_values();
            each<&Fused::add_values>(tile_items);
        }
        report();
        for (Index chunk = 1; chunk <= chunks_; ++chunk)
            for (Index r = 0; r < rows_; ++r) merge_partial(part(0), part(chunk), r);
    }

    /// The output of query head `head`, token i; in the frame of the input.
    const float* output(Index head, Index i) noexcept {
        const Index row = head * query_tokens_ + i;
        float* const values = work_.output_.data() + row * stride_;
        const float sum = work_.sum_[static_cast<std::size_t>(row)];
        for (Index c = 0; c < value_dim_; ++c) values[c] = sum > 0.0f ? values[c] / sum : 0.0f;
        if (cache_.recipe().values.rotate) cache_.value_rotation_.rotate_back(values);
        return values;
    }

  private:
    template <auto member>
    void each(Index items) noexcept {
        work_.executor().run(
            items,
            [](void* self, Index item, Index worker) { (static_cast<Fused*>(self)->*member)(item, worker); },
            this);
    }

    static constexpr Index chunk_tiles = 16;
    static constexpr float none = -std::numeric_limits<float>::infinity();

    PartialAttention part(Index chunk, Index row = 0) noexcept {
        const Index at = chunk * rows_ + row;
        return {work_.largest_.data() + at, work_.sum_.data() + at, work_.output_.data() + at * stride_,
                stride_};
    }

    /// Items of tiles for each chunk: one a head, or one for all.
    Index across() const noexcept { return together_ ? 1 : heads_; }
    Index row_blocks() const noexcept { return (block_ + fused_rows - 1) / fused_rows; }
    /// Whether values are read to depths that depend on all weights, so after all scores.
    bool by_weight() const noexcept {
        return policy_.kind != ReadPolicy::Kind::all && policy_.kind != ReadPolicy::Kind::fixed;
    }
    bool bounded() const noexcept { return policy_.kind == ReadPolicy::Kind::tolerance; }
    bool hidden(const Tile& tile) const noexcept {
        return tile.first >= cache_.recipe().sink_tokens && tile.first + tile.tokens <= cache_.state_.dropped;
    }
    Index tile_count() const noexcept { return static_cast<Index>(cache_.state_.tiles.size()); }
    const Tile& tile(Index t) const noexcept { return cache_.state_.tiles[static_cast<std::size_t>(t)]; }
    const std::byte* values(const Tile& tile, Index head) const noexcept {
        return tile.page.data() + cache_.state_.layout->value_at[static_cast<std::size_t>(head)];
    }
    const std::byte* keys(const Tile& tile, Index part) const noexcept {
        return tile.page.data() + cache_.state_.layout->key_at[static_cast<std::size_t>(part)];
    }

    /// The chunk, heads and tiles of an item.
    struct Work {
        Index chunk, head, heads, begin, end;
    };
    Work work_of(Index item) const noexcept {
        const Index chunk = item / across();
        return {chunk, together_ ? 0 : item % heads_, together_ ? heads_ : 1, chunk * chunk_tiles,
                std::min((chunk + 1) * chunk_tiles, static_cast<Index>(cache_.state_.tiles.size()))};
    }
    /// body(head, first row, rows) for every block of rows of its heads.
    template <class Body>
    void for_blocks(const Work& work, const Body& body) noexcept {
        for (Index h = work.head; h < work.head + work.heads; ++h)
            for (Index row = h * block_; row < (h + 1) * block_; row += fused_rows)
                body(h, row, std::min(fused_rows, (h + 1) * block_ - row));
    }
    void clear(Index chunk, Index head, Index heads) noexcept {
        for (Index r = head * block_; r < (head + heads) * block_; ++r) {
            const PartialAttention p = part(chunk, r);
            *p.largest = none;
            *p.sum = 0.0f;
            std::fill_n(p.output, stride_, 0.0f);
        }
    }

    void process(Index item, Index worker) noexcept {
        FusedScratch& scratch = work_.scratch_[static_cast<std::size_t>(worker)];
        if (const Index tile_items = chunks_ * across(); item >= tile_items) {
            clear(chunks_, item - tile_items, 1);
            return token_rows(item - tile_items, chunks_, scratch);
        }
        const Work work = work_of(item);
        clear(work.chunk, work.head, work.heads);
        // Latents go some tiles at a time, for the sake of the projection; others tile by tile.
        const bool latent = cache_.state_.layout->latent != nullptr;
        const Index step = latent ? fused_tiles : 1;
        bool turned = false;  // the tiles before
        for (Index first = work.begin; first < work.end; first += step) {
            const Index count = std::min(step, work.end - first);
            const bool projects = latent && scores_any(first, count, work);
            if (projects) turn_to(first, count, turned, scratch);
            turned = projects;
            for_blocks(work, [&](Index h, Index row, Index rows) {
                std::array<float, fused_tiles * fused_rows> offsets{};
                if (projects) project(h, row, rows, count, offsets.data(), scratch);
                for (Index t = first; t < first + count; ++t)
                    tile_rows(t, t + 1 < work.end ? tile(t + 1) : first_of(item, t), h, row, rows, work.chunk,
                              t - first, offsets.data() + (t - first) * rows, scratch);
            });
        }
    }

    /// The first tile of what this worker probably does after `item`; else tile `t` again.
    const Tile& first_of(Index item, Index t) const noexcept {
        const Index next = item + work_.executor().workers();
        return tile(next < chunks_ * across() ? next / across() * chunk_tiles : t);
    }

    /// Scores of one tile and, unless reads are aligned, what its values add. `place` among the tiles that
    /// were projected together.
    void tile_rows(Index t, const Tile& next, Index head, Index row, Index rows, Index chunk, Index place,
                   const float* offsets, FusedScratch& scratch) noexcept {
        const Tile& tile = this->tile(t);
        if (hidden(tile)) return;
        const TileLayout& layout = *cache_.state_.layout;
        const Index key_part = part_of(head);
        if (look_again_ && !looks_again(t, key_part)) return keep_scores(t, row, rows, chunk);
        const TileFormat& format = layout.key_format(key_part);
        const float* queries = work_.rotated_.data() + row * key_dim_;
        Index stride = key_dim_;
        if (layout.latent) {
            stride = scratch.depth();
            queries = scratch.projected() + place * rows * stride;
        }
        float* const scores = by_weight() ? weights_of(t, row) : scratch.scores();
        const std::uint8_t* planes = look_again_ ? class_planes(key_part, class_of(t, key_part))
                                                 : key_planes(format, keys(tile, key_part), key_part, queries,
                                                              stride, row, rows, chunk, scratch);
        bool in_two_parts = two_parts(policy_.key_bits);
        if (look_again_) {
            const Index bits = bits_read(format, planes);
            work_.bits_[static_cast<std::size_t>(chunk * heads_ + head)][0] +=
                bits - bits_read(format, first_look(key_part));
            in_two_parts = bits == bits_read(format, nullptr) ||
                           two_parts(static_cast<double>(bits) / static_cast<double>(elements(format)));
        } else {
            count_read(format, planes, chunk, head, 0);
        }
        fused_scores(isa_, format, keys(tile, key_part), keys(next, key_part), queries, stride, rows, offsets,
                     scratch, scores, planes, in_two_parts);
        apply(row, rows, tile.first, tile.tokens, tile_tokens, scores);
        const PartialAttention to = part(chunk, row);
        fused_softmax(isa_, scores, tile_tokens, rows, to);
        if (by_weight()) return note_weights(t, head, row, rows, chunk, scratch);
        planes = policy_.kind == ReadPolicy::Kind::fixed
                     ? fixed_planes(layout.values, policy_.value_bits, scratch)
                     : nullptr;
        fused_output(isa_, layout.values, values(tile, head), values(next, head), scores, rows, scratch,
                     to.output, stride_, planes, two_parts(policy_.value_bits));
        count_read(layout.values, planes, chunk, head, 1);
    }

    // Partial reads ----------------------------------------------------------------------------------------

    /// Where little more than 4 bits are read, their own error is larger than that of factors of 8 bits.
    bool two_parts(double bits) const noexcept {
        return (policy_.kind != ReadPolicy::Kind::aligned && policy_.kind != ReadPolicy::Kind::fixed) ||
               bits > 5.0;
    }
    Index blocks() const noexcept { return heads_ * row_blocks(); }
    Index value_units() const noexcept { return value_units_; }
    Index key_units() const noexcept { return key_units_; }
    void reserve_by_weight() {
        const TileLayout& layout = *cache_.state_.layout;
        value_units_ = read_units(layout.values);
        for (Index p = 0; p < parts(); ++p)
            key_units_ = std::max(key_units_, read_units(layout.key_format(p)));

        const auto tiles = static_cast<std::size_t>(cache_.state_.tiles.size()),
                   rows = static_cast<std::size_t>(rows_), all_blocks = static_cast<std::size_t>(blocks()),
                   units = static_cast<std::size_t>(value_units()),
                   chunks = static_cast<std::size_t>(chunks_);
        work_.weights_.resize(tiles * rows * tile_tokens);
        work_.tops_.resize(tiles * rows);
        work_.units_.resize(tiles * rows * units);
        work_.importance_.resize(tiles * all_blocks * units);
        work_.least_.resize(all_blocks);
        work_.norms_.resize(rows);
        work_.all_tops_.resize(rows);
        const std::size_t of_keys = layout.key_at.size() * static_cast<std::size_t>(key_units());
        work_.key_units_.resize(of_keys);
        work_.first_look_.resize(of_keys);
        work_.class_planes_.resize(of_keys * tile_classes);
        work_.tile_class_.resize(tiles * cache_.state_.layout->key_at.size());
        work_.class_tiles_.resize(cache_.state_.layout->key_at.size() * tile_classes);
        work_.key_order_.resize(3 * of_keys);
        work_.score_errors_.assign(chunks * all_blocks, 0.0);
        work_.value_errors_.assign(chunks * all_blocks, 0.0);
        work_.value_norms_.assign((chunks + 1) * static_cast<std::size_t>(heads_), 0.0f);
    }
    float* weights_of(Index t, Index row) noexcept {
        return work_.weights_.data() + (t * rows_ + row) * tile_tokens;
    }
    float* tops_of(Index t, Index row) noexcept { return work_.tops_.data() + t * rows_ + row; }
    float* units_of(Index t, Index row) noexcept {
        return work_.units_.data() + (t * rows_ + row) * value_units();
    }
    Index block_of(Index row) const noexcept {
        return row / block_ * row_blocks() + row % block_ / fused_rows;
    }
    float* importance_of(Index t, Index block) noexcept {
        return work_.importance_.data() + (t * blocks() + block) * value_units();
    }
    float& value_norm(Index chunk, Index head) noexcept {
        return work_.value_norms_[static_cast<std::size_t>(chunk * heads_ + head)];
    }
    float largest_value() const noexcept { return static_cast<float>(cache_.state_.largest[1]); }

    /// How much of a tile of keys is read; nullptr: all.
    const std::uint8_t* key_planes(const TileFormat& format, const std::byte* tile, Index part,
                                   const float* queries, Index stride, Index row, Index rows, Index chunk,
                                   FusedScratch& scratch) noexcept {
        switch (policy_.kind) {
            case ReadPolicy::Kind::fixed:
                return fixed_planes(format, policy_.key_bits, scratch);
            case ReadPolicy::Kind::aligned:
                return first_look(part);
            case ReadPolicy::Kind::exponents:
                align_keys(isa_, format, tile, queries, stride, rows, policy_.thresholds, scratch,
                           scratch.planes().data());
                return scratch.planes().data();
            case ReadPolicy::Kind::tolerance:
                return bounded_planes(format, tile, queries, stride, row, rows, chunk, scratch);
            case ReadPolicy::Kind::all:
                break;
        }
        return nullptr;
    }
    /// As many planes as fit into `bits`, of every unit.
    const std::uint8_t* fixed_planes(const TileFormat& format, double bits,
                                     FusedScratch& scratch) const noexcept {
        std::size_t unit = 0;
        for (const TileFormat::Placed& s : format.segments()) {
            if (s.bits == 0) continue;
            int planes = 0;
            while (planes < s.split.count && s.split.prefix_bits(planes + 1) <= bits) ++planes;
            const Index depth = read_unit_depth(s.split),
                        size = format.side() == TileSide::keys ? s.channels : tile_tokens;
            for (Index first = 0; first < size; first += depth)
                scratch.planes()[unit++] = static_cast<std::uint8_t>(planes);
        }
        return scratch.planes().data();
    }
    // Keys are read by budget in two looks. The first takes an eighth of the bits, first planes of the
    // channels that count most, and tells roughly what every token weighs. The second reads what T12 makes of
    // the rest: an error of a score does to the output what the softmax weights of its tile allow, so that
    // channels of tiles without weight get no more bits, and those of others many.

    /// Classes of tiles by the power of two of what an error of their scores does to the output.
    static constexpr Index tile_classes = 32;

    Index part_of(Index head) const noexcept {
        const TileLayout& layout = *cache_.state_.layout;
        return layout.latent ? layout.latent->part_of_head(head) : head;
    }
    Index parts() const noexcept { return static_cast<Index>(cache_.state_.layout->key_at.size()); }
    const std::uint8_t* first_look(Index part) const noexcept {
        return work_.first_look_.data() + part * key_units();
    }
    Index class_of(Index t, Index part) const noexcept {
        return work_.tile_class_[static_cast<std::size_t>(t * parts() + part)];
    }
    std::uint8_t* class_planes(Index part, Index of_class) noexcept {
        return work_.class_planes_.data() + (part * tile_classes + of_class) * key_units();
    }
    bool looks_again(Index t, Index part) noexcept {
        return !std::equal(first_look(part), first_look(part) + key_units(),
                           class_planes(part, class_of(t, part)));
    }
    /// Whether scores of any of these tiles are to be computed.
    bool scores_any(Index first, Index count, const Work& work) noexcept {
        if (!look_again_) return true;
        for (Index t = first; t < first + count; ++t)
            for (Index head = work.head; head < work.head + work.heads; ++head)
                if (looks_again(t, part_of(head))) return true;
        return false;
    }
    /// A tile whose scores stay as the first look left them.
    void keep_scores(Index t, Index row, Index rows, Index chunk) noexcept {
        const PartialAttention to = part(chunk, row);
        for (Index r = 0; r < rows; ++r) {
            const float seen = *tops_of(t, row + r), top = std::max(to.largest[r], seen);
            if (seen == none) continue;
            const float sum = sum_of_weights(t, row + r) * std::exp(seen - top);
            to.sum[r] = (to.largest[r] == none ? 0.0f : to.sum[r] * std::exp(to.largest[r] - top)) + sum;
            to.largest[r] = top;
        }
    }
    float sum_of_weights(Index t, Index row) noexcept {
        return Eigen::Map<const Eigen::ArrayXf>(weights_of(t, row), tile_tokens).sum();
    }
    /// Bits of all channels that have some, of a budget of so many in the mean.
    Index key_budget(double mean) const noexcept {
        Index channels = 0;
        const TileLayout& layout = *cache_.state_.layout;
        for (Index p = 0; p < parts(); ++p)
            for (const TileFormat::Placed& s : layout.key_format(p).segments())
                channels += s.bits > 0 ? s.channels : 0;
        return static_cast<Index>(std::floor(mean * static_cast<double>(channels) + 1e-6));
    }
    /// What the channels (or latents) of all heads count: from the first tile of every chunk, for steps and
    /// queries change little from tile to tile. And the planes of the first look.
    void plan_first_look() noexcept {
        FusedScratch& scratch = work_.scratch_[0];
        const TileLayout& layout = *cache_.state_.layout;
        const bool latent = layout.latent != nullptr;

        std::fill(work_.key_units_.begin(), work_.key_units_.end(), ReadUnit{0.0f, {}, 0});
        Index looked = 0;
        for (Index chunk = 0; chunk < chunks_; ++chunk) {
            const Work all{chunk, 0, heads_, chunk * chunk_tiles,
                           std::min((chunk + 1) * chunk_tiles, tile_count())};
            Index t = all.begin;
            while (t < all.end && hidden(tile(t))) ++t;
            if (t == all.end) continue;
            ++looked;
            if (latent) turn_to(t, 1, false, scratch);
            for_blocks(all, [&](Index head, Index row, Index rows) {
                const Index part = part_of(head);
                const float* queries = work_.rotated_.data() + row * key_dim_;
                Index stride = key_dim_;
                std::array<float, fused_rows> offsets{};
                if (latent) {
                    project(head, row, rows, 1, offsets.data(), scratch);
                    queries = scratch.projected();
                    stride = scratch.depth();
                }
                const TileFormat& format = layout.key_format(part);
                const std::span<ReadUnit> units = scratch.read_units();
                key_importance(isa_, format, keys(tile(t), part), queries, stride, rows, false, scratch,
                               units.data());
                ReadUnit* const to = work_.key_units_.data() + part * key_units();
                for (Index u = 0; u < read_units(format); ++u) {
                    const ReadUnit& unit = units[static_cast<std::size_t>(u)];
                    to[u] = {to[u].importance + unit.importance, unit.split, unit.size};
                }
            });
        }
        Index stored = 0;
        for (const ReadUnit& unit : work_.key_units_) stored += unit.size * unit.split.bits();
        // In the mean over rows and tiles.
        for (ReadUnit& unit : work_.key_units_)
            unit.importance /= static_cast<float>(std::max<Index>(1, looked * rows_ / parts()));
        choose_planes(work_.key_units_, std::min(stored / 8, key_budget(policy_.key_bits) / 2),
                      work_.key_order_, work_.first_look_, 1);
        // Where no plane is small enough, nothing is known that a budget could be shared by.
        policy_.shared = policy_.shared && std::any_of(work_.first_look_.begin(), work_.first_look_.end(),
                                                       [](int planes) { return planes > 0; });
    }
    /// The planes of keys that the second look reads, by class of tiles. A score that is off by one moves the
    /// output by the token's weight times its value's distance from the output; the square of that is taken
    /// as a fiftieth of the square of what the token's grids span, and so follows from importance_of().
    void plan_keys() noexcept {
        const PlaneSplit& split = cache_.state_.layout->values.segments()[0].split;
        // What a score of one tile counts to a bit of one channel; values' gains are for a bit of all
        // channels of a unit of tokens.
        const float dims = static_cast<float>(value_dim_) / static_cast<float>(tile_tokens),
                    span = power_of_two(split.bits() == 16 ? 20 : 2 * split.bits()) / 50.0f *
                           static_cast<float>(read_unit_depth(split)) * dims;
        const auto field = [&](Index t, Index part) {
            float sum = 0.0f;
            for (Index block = 0; block < blocks(); ++block)
                if (part_of(block / row_blocks()) == part)
                    sum = std::accumulate(importance_of(t, block), importance_of(t, block) + value_units(),
                                          sum);
            // Of the nearest power of two.
            return static_cast<int>(std::bit_cast<std::uint32_t>(1.41421356f * span * sum) >> 23);
        };
        int top = 0;
        Index tiles = 0;
        for (Index t = 0; t < tile_count(); ++t) {
            if (hidden(tile(t))) continue;
            ++tiles;
            for (Index p = 0; p < parts(); ++p) {
                const int of_tile = field(t, p);
                work_.tile_class_[static_cast<std::size_t>(t * parts() + p)] =
                    static_cast<std::uint8_t>(of_tile);
                top = std::max(top, of_tile);
            }
        }
        std::fill(work_.class_tiles_.begin(), work_.class_tiles_.end(), Index{0});
        for (Index t = 0; t < tile_count(); ++t)
            for (Index p = 0; p < parts() && !hidden(tile(t)); ++p) {
                std::uint8_t& of_tile = work_.tile_class_[static_cast<std::size_t>(t * parts() + p)];
                of_tile = static_cast<std::uint8_t>(std::min<Index>(top - of_tile, tile_classes - 1));
                ++work_.class_tiles_[static_cast<std::size_t>(p * tile_classes + of_tile)];
            }

        GainHistogram& gains = work_.scratch_[0].gains();
        if (!policy_.shared) gains.clear();
        // body(tiles, what is read of a unit in the end and so far, the unit, gain of a plane).
        const auto for_units = [&](const auto& body) {
            for (Index p = 0; p < parts(); ++p)
                for (Index c = 0; c < tile_classes; ++c) {
                    const Index have = work_.class_tiles_[static_cast<std::size_t>(p * tile_classes + c)];
                    const float tile = std::ldexp(1.0f, top - 127 - static_cast<int>(c));
                    for (Index u = 0; u < key_units() && have > 0; ++u) {
                        const ReadUnit& unit =
                            work_.key_units_[static_cast<std::size_t>(p * key_units() + u)];
                        body(have, class_planes(p, c)[u], first_look(p)[u], unit, [&, tile](int plane) {
                            return plane_gain(
                                unit.importance * tile / static_cast<float>(std::max(unit.size, 1)),
                                plane_worth(unit.split, plane));
                        });
                    }
                }
        };
        const double copies =
            static_cast<double>(blocks()) / static_cast<double>(parts()) / static_cast<double>(dims);
        double looked = 0.0;
        for_units([&](Index have, std::uint8_t& planes, int first, const ReadUnit& unit, const auto& gain) {
            planes = static_cast<std::uint8_t>(first);
            looked += static_cast<double>(have * unit.size * unit.split.prefix_bits(first));
            for (int plane = first; plane < unit.split.count; ++plane)
                gains.add(gain(plane), copies * static_cast<double>(have * unit.size * unit.split[plane]));
        });
        const double budget = copies * (static_cast<double>(tiles * key_budget(policy_.key_bits)) - looked) +
                              (policy_.shared ? value_budget() : 0.0);
        const float least = gains.least(std::max(budget, 0.0) + 1e-6);
        double left = budget;
        const auto take_from = [&](float gain_from) {
            for_units([&](Index have, std::uint8_t& planes, int, const ReadUnit& unit, const auto& gain) {
                for (; planes < unit.split.count && gain(planes) >= gain_from; ++planes) {
                    const double takes = copies * static_cast<double>(have * unit.size * unit.split[planes]);
                    if (gain_from < least && takes > left) break;
                    left -= takes;
                }
            });
        };
        take_from(least);
        // Of the next bucket, whose gains hardly differ, what the budget has room for.
        if (!policy_.shared) take_from(least / GainHistogram::bucket_ratio);
    }
    /// Bits of values, by channel, that the mean allows.
    double value_budget() const noexcept {
        Index tokens = 0;
        for (Index t = 0; t < tile_count(); ++t) tokens += hidden(tile(t)) ? 0 : tile_tokens;
        return policy_.value_bits * static_cast<double>(tokens * blocks());
    }
    /// The fewest planes with which no score is off by more than what half the tolerance allows, shared out
    /// among channels evenly.
    const std::uint8_t* bounded_planes(const TileFormat& format, const std::byte* tile, const float* queries,
                                       Index stride, Index row, Index rows, Index chunk,
                                       FusedScratch& scratch) noexcept {
        const std::span<ReadUnit> units =
            scratch.read_units().first(static_cast<std::size_t>(read_units(format)));
        key_importance(isa_, format, tile, queries, stride, rows, true, scratch, units.data());
        // Queries are scaled already where scores are no more than products; a softcap takes off, never adds.
        const auto& rule = work_.rules_[static_cast<std::size_t>(row / query_tokens_)];
        const double scale = rule.plain() ? 1.0 : static_cast<double>(rule.scale());
        double channels = 0.0, error = 0.0;
        for (const ReadUnit& unit : units) channels += unit.size;
        const double allowed = 2.0 * std::atanh(std::min(0.25 * policy_.error, 0.999));
        for (std::size_t u = 0; u < units.size(); ++u) {
            const double importance = scale * static_cast<double>(units[u].importance);
            const auto off = [&](int planes) {
                return importance * static_cast<double>(unread_reach(units[u].split, planes));
            };
            // Below its first plane an fp16 number is not one yet.
            int have = units[u].split.bits() == 16 ? 1 : 0;
            while (have < units[u].split.count && !(off(have) * channels <= allowed * units[u].size)) ++have;
            scratch.planes()[u] = static_cast<std::uint8_t>(have);
            error += off(have);
        }
        double& most = work_.score_errors_[static_cast<std::size_t>(chunk * blocks() + block_of(row))];
        most = std::max(most, error);
        return scratch.planes().data();
    }
    /// What weights come to by read unit of values, once a tile's scores are weights.
    void note_weights(Index t, Index head, Index row, Index rows, Index chunk,
                      FusedScratch& scratch) noexcept {
        std::copy_n(part(chunk, row).largest, rows, tops_of(t, row));
        const TileFormat& format = cache_.state_.layout->values;
        const Index depth = read_unit_depth(format.segments()[0].split);
        float* const steps = scratch.scores();
        UnitWeight kind = UnitWeight::largest;
        if (policy_.kind != ReadPolicy::Kind::exponents) {
            kind = bounded() ? UnitWeight::reach : UnitWeight::squares;
            float& norm = value_norm(chunk, head);
            norm = std::max(
                norm, value_steps(isa_, format, values(tile(t), head), largest_value(), bounded(), steps));
        }
        unit_weights(isa_, weights_of(t, row), rows, steps, kind, depth, units_of(t, row));
    }
    /// Adds what a tile's planes come to, to the count of its chunk and head.
    void count_read(const TileFormat& format, const std::uint8_t* planes, Index chunk, Index head,
                    std::size_t side) noexcept {
        const auto at = static_cast<std::size_t>(chunk * heads_ + head);
        work_.elements_[at][side] += elements(format);
        work_.bits_[at][side] += bits_read(format, planes);
    }
    static Index elements(const TileFormat& format) noexcept {
        Index sum = 0;
        for (const TileFormat::Placed& s : format.segments())
            sum += s.bits > 0 ? s.channels * tile_tokens : 0;
        return sum;
    }
    /// Of the codes of a tile; planes of nullptr: all.
    static Index bits_read(const TileFormat& format, const std::uint8_t* planes) noexcept {
        Index sum = 0;
        for (const TileFormat::Placed& s : format.segments()) {
            if (s.bits == 0) continue;
            const bool keys = format.side() == TileSide::keys;
            const Index size = keys ? s.channels : tile_tokens, other = keys ? tile_tokens : s.channels;
            if (!planes) {
                sum += size * other * s.bits;
                continue;
            }
            std::array<Index, detail::UnitsByDepth::depths> prefix{};
            for (int p = 0; p <= s.split.count; ++p)
                prefix[static_cast<std::size_t>(p)] = s.split.prefix_bits(p);
            const Index depth = read_unit_depth(s.split);
            Index bits = 0;
            for (Index first = 0; first < size; first += depth)
                bits += std::min(depth, size - first) * prefix[*planes++];
            sum += other * bits;
        }
        return sum;
    }
    void report() noexcept {
        double bits[2] = {}, elements[2] = {};
        for (std::size_t i = 0; i < work_.bits_.size(); ++i)
            for (std::size_t side = 0; side < 2; ++side) {
                bits[side] += static_cast<double>(work_.bits_[i][side]);
                elements[side] += static_cast<double>(work_.elements_[i][side]);
            }
        work_.report_ = {elements[0] > 0.0 ? bits[0] / elements[0] : 0.0,
                         elements[1] > 0.0 ? bits[1] / elements[1] : 0.0,
                         elements[1] > 0.0 ? (bits[0] + bits[1]) / (elements[0] + elements[1]) : 0.0};
        if (!bounded() || chunks_ == 0) return;
        for (Index block = 0; block < blocks(); ++block) {
            const double norm = largest_norm(block / row_blocks());
            double error = 2.0 * std::tanh(0.5 * score_error(block)) * norm;
            for (Index chunk = 0; chunk < chunks_; ++chunk)
                error += work_.value_errors_[static_cast<std::size_t>(chunk * blocks() + block)];
            if (error == 0.0) continue;
            work_.report_.error_bound = std::max(work_.report_.error_bound, error);
            work_.report_.relative_error_bound = std::max(work_.report_.relative_error_bound, error / norm);
        }
    }
    double score_error(Index block) const noexcept {
        double most = 0.0;
        for (Index chunk = 0; chunk < chunks_; ++chunk)
            most = std::max(most, work_.score_errors_[static_cast<std::size_t>(chunk * blocks() + block)]);
        return most;
    }
    double largest_norm(Index head) noexcept {
        float most = 0.0f;
        for (Index chunk = 0; chunk <= chunks_; ++chunk) most = std::max(most, value_norm(chunk, head));
        return static_cast<double>(most);
    }

    /// The largest score and the sum of weights of every row, over the whole sequence.
    void take_norms() noexcept {
        for (Index r = 0; r < rows_; ++r) {
            float top = none, sum = 0.0f;
            for (Index chunk = 0; chunk <= chunks_; ++chunk) top = std::max(top, *part(chunk, r).largest);
            for (Index chunk = 0; chunk <= chunks_; ++chunk)
                if (const PartialAttention p = part(chunk, r); *p.largest != none)
                    sum += *p.sum * std::exp(*p.largest - top);
            work_.all_tops_[static_cast<std::size_t>(r)] = top;
            work_.norms_[static_cast<std::size_t>(r)] = sum > 0.0f ? 1.0f / sum : 0.0f;
        }
    }
    /// What a row's weights of tile t are to be multiplied by to be relative to `top`.
    float rescale(Index t, Index row, float top) noexcept {
        const float seen = *tops_of(t, row);
        return seen == top ? 1.0f : seen == none ? 0.0f : std::exp(seen - top);
    }
    /// The least gain of a plane of values that is read: by budget, of all heads together; by tolerance, of
    /// every block of rows what its scores leave of it.
    void choose_values() noexcept {
        weigh();
        if (bounded()) return;
        double budget = value_budget();
        if (policy_.shared) {  // and what keys have left, or taken, of it
            double bits = 0.0, elements = 0.0;
            for (std::size_t i = 0; i < work_.bits_.size(); ++i) {
                bits += static_cast<double>(work_.bits_[i][0]);
                elements += static_cast<double>(work_.elements_[i][0]);
            }
            budget += (policy_.key_bits * elements - bits) / static_cast<double>(value_dim_);
        }
        const float least = work_.scratch_[0].gains().least(std::max(budget, 0.0) + 1e-6);
        std::fill(work_.least_.begin(), work_.least_.end(), least);
    }
    /// How much all values count; by budget also what their planes gain, in the first worker's histogram.
    void weigh() noexcept {
        for (FusedScratch& scratch : work_.scratch_) scratch.gains().clear();
        each<&Fused::weigh_values>(blocks());
        if (bounded()) return;
        for (std::size_t w = 1; w < work_.scratch_.size(); ++w)
            work_.scratch_[0].gains().add(work_.scratch_[w].gains());
    }
    /// What each plane of values gains, for a bit and an importance of 1.
    std::array<float, 3> value_worths() const noexcept {
        const PlaneSplit& split = cache_.state_.layout->values.segments()[0].split;
        std::array<float, 3> worth{};
        for (int p = 0; p < split.count; ++p)
            worth[static_cast<std::size_t>(p)] = bounded() ? plane_reach(split, p) : plane_worth(split, p);
        return worth;
    }
    /// For one block of rows: how much every unit of values counts.
    void weigh_values(Index block, Index worker) noexcept {
        FusedScratch& scratch = work_.scratch_[static_cast<std::size_t>(worker)];
        const Index head = block / row_blocks(), row = head * block_ + block % row_blocks() * fused_rows,
                    rows = std::min(fused_rows, (head + 1) * block_ - row);
        const PlaneSplit& split = cache_.state_.layout->values.segments()[0].split;
        const Index depth = read_unit_depth(split), units = value_units();
        GainHistogram& gains = scratch.gains();
        if (bounded()) gains.clear();
        const std::array<float, 3> worth = value_worths();
        std::array<double, 3> amount{};
        for (int p = 0; p < split.count; ++p)
            amount[static_cast<std::size_t>(p)] =
                static_cast<double>(split[p]) * (bounded() ? 1.0 : static_cast<double>(depth));
        for (Index t = 0; t < tile_count(); ++t) {
            if (hidden(tile(t))) continue;
            float* const importance = importance_of(t, block);
            std::fill_n(importance, units, 0.0f);
            for (Index r = 0; r < rows; ++r) {
                const auto at = static_cast<std::size_t>(row + r);
                const float norm = work_.norms_[at] * rescale(t, row + r, work_.all_tops_[at]);
                const float* const of_row = units_of(t, row + r);
                if (bounded())
                    for (Index u = 0; u < units; ++u)
                        importance[u] = std::max(importance[u], norm * of_row[u]);
                else
                    for (Index u = 0; u < units; ++u) importance[u] += norm * norm * of_row[u];
            }
            for (Index u = 0; u < units; ++u)
                for (std::size_t p = 0; p < static_cast<std::size_t>(split.count); ++p) {
                    const float gain = plane_gain(importance[u], worth[p]);
                    // Of a tolerance, what is off without the plane.
                    gains.add(gain, bounded() ? amount[p] * static_cast<double>(gain) : amount[p]);
                }
        }
        if (!bounded()) return;
        const double left = policy_.error - 2.0 * std::tanh(0.5 * score_error(block));
        work_.least_[static_cast<std::size_t>(block)] =
            gains.least_but(std::max(0.0, left) * largest_norm(head));
    }
    /// How much of the values of tile t is read.
    void value_planes(Index t, Index row, Index rows, Index chunk, const std::array<float, 3>& worth,
                      std::uint8_t* planes) noexcept {
        const PlaneSplit& split = cache_.state_.layout->values.segments()[0].split;
        const Index units = value_units(), block = block_of(row);
        if (policy_.kind == ReadPolicy::Kind::exponents) {
            for (Index u = 0; u < units; ++u) {
                float largest = 0.0f;
                for (Index r = 0; r < rows; ++r)
                    largest = std::max(
                        largest, units_of(t, row + r)[u] *
                                     rescale(t, row + r, work_.all_tops_[static_cast<std::size_t>(row + r)]));
                // The exponent field: a weight is at most 1, and 0 where it would not be a normal number.
                const int below = 127 - static_cast<int>(std::bit_cast<std::uint32_t>(largest) >> 23);
                const int have = split.bits() != 16 ? split.count
                                 : largest > 0.0f   ? detail::aligned_planes(below, policy_.thresholds)
                                                    : 0;
                planes[u] = static_cast<std::uint8_t>(have);
            }
            return;
        }
        const float* const importance = importance_of(t, block);
        const float least = work_.least_[static_cast<std::size_t>(block)];
        double& error = work_.value_errors_[static_cast<std::size_t>(chunk * blocks() + block)];
        for (Index u = 0; u < units; ++u) {
            // Gains fall from plane to plane.
            int have = 0;
            for (int p = 0; p < split.count; ++p)
                have += plane_gain(importance[u], worth[static_cast<std::size_t>(p)]) >= least;
            planes[u] = static_cast<std::uint8_t>(have);
            if (bounded())
                error += static_cast<double>(importance[u]) * static_cast<double>(unread_reach(split, have));
        }
    }
    void add_values(Index item, Index worker) noexcept {
        FusedScratch& scratch = work_.scratch_[static_cast<std::size_t>(worker)];
        const Work work = work_of(item);
        const TileFormat& format = cache_.state_.layout->values;
        const std::array<float, 3> worth = value_worths();
        std::uint8_t *planes = scratch.planes().data(), *next_planes = planes + tile_tokens / 8;
        for_blocks(work, [&](Index head, Index row, Index rows) {
            const PartialAttention to = part(work.chunk, row);
            const auto from = [&](Index t) {
                while (t < work.end && hidden(tile(t))) ++t;
                return t;
            };
            Index t = from(work.begin);
            if (t < work.end) value_planes(t, row, rows, work.chunk, worth, planes);
            for (Index next; t < work.end; t = next, std::swap(planes, next_planes)) {
                next = from(t + 1);
                if (next < work.end) value_planes(next, row, rows, work.chunk, worth, next_planes);
                const Tile& ahead = tile(next < work.end ? next : t);
                count_read(format, planes, work.chunk, head, 1);
                // Where there are no grids either, nothing is left to add.
                if (format.segments()[0].bits == 16 &&
                    std::all_of(planes, planes + value_units(), [](std::uint8_t have) { return have == 0; }))
                    continue;
                for (Index r = 0; r < rows; ++r) {
                    const float by = rescale(t, row + r, to.largest[r]);
                    if (by == 1.0f) continue;
                    float* const weights = weights_of(t, row + r);
                    for (Index i = 0; i < tile_tokens; ++i) weights[i] *= by;
                }
                fused_output(isa_, format, values(tile(t), head), values(ahead, head), weights_of(t, row),
                             rows, scratch, to.output, stride_, planes, two_parts(policy_.value_bits),
                             next < work.end ? next_planes : planes);
            }
        });
    }

    /// From q.k (already scaled where that is all) to what the softmax takes; padding is not seen.
    void apply(Index row, Index rows, Index first, Index count, Index padded, float* scores) const noexcept {
        const Index hidden_from = cache_.recipe().sink_tokens, hidden_to = cache_.state_.dropped;
        for (Index r = 0; r < rows; ++r, scores += tile_tokens) {
            const Index query = (row + r) % query_tokens_, position = first_position_ + query;
            const auto& rule = work_.rules_[static_cast<std::size_t>((row + r) / query_tokens_)];
            std::fill(scores + count, scores + padded, none);
            if (rule.plain() && first + count - 1 <= position && (first >= hidden_to || first < hidden_from))
                continue;
            for (Index t = 0; t < count; ++t) {
                const Index key = first + t;
                if ((key >= hidden_from && key < hidden_to) || !rule.sees(position, key))
                    scores[t] = none;
                else if (!rule.plain())
                    scores[t] = rule(scores[t], query, position, key);
            }
        }
    }

    /// The turns back by the first positions of `count` tiles: exact for the first of a chunk, for others
    /// from
    /// the tile before where that is 128 tokens away.
    void turn_to(Index first, Index count, bool go_on, FusedScratch& scratch) const noexcept {
        const LatentKeys& keys = *cache_.state_.layout->latent;
        const bool turns = keys.frame() == KeyFrame::tile;
        const Index depth = scratch.depth();
        const auto exact = [&](Index positions, float* cosine) {
            for (const RotaryEmbedding::Pair& pair : keys.embedding().pairs()) {
                const double angle = turns ? -static_cast<double>(positions) * pair.frequency : 0.0;
                const auto sine = static_cast<float>(std::sin(angle));
                cosine[pair.first] = static_cast<float>(std::cos(angle));
                cosine[depth + pair.first] = -sine;
                if (pair.second < 0) continue;
                cosine[pair.second] = cosine[pair.first];
                cosine[depth + pair.second] = sine;
            }
        };
        if (!go_on) exact(tile_tokens, scratch.turn(fused_tiles));
        const auto position = [&](Index t) { return cache_.state_.tiles[static_cast<std::size_t>(t)].first; };
        for (Index i = 0; i < count; ++i) {
            float* const to = scratch.turn(i);
            if ((i == 0 && !go_on) || position(first + i) != position(first + i - 1) + tile_tokens) {
                exact(position(first + i), to);
                continue;
            }
            const float *const from = scratch.turn(i > 0 ? i - 1 : fused_tiles - 1), *const step =
                                                                                         scratch.turn(
                                                                                             fused_tiles);
            run_on(isa_, [&](auto lanes) KVPLANE_BODY {
                detail::fused::step_turn<lanes>(from, from + depth, step, step + depth, key_dim_, to,
                                                to + depth);
            });
        }
    }

    /// The queries of some rows as the latents of `count` tiles see them; offsets: what the mean adds to
    /// their scores. Both tile by tile.
    void project(Index head, Index row, Index rows, Index count, float* offsets,
                 FusedScratch& scratch) const noexcept {
        const LatentKeys& keys = *cache_.state_.layout->latent;
        const LatentKeys::Part& part = keys.part(keys.part_of_head(head));
        const Index at = keys.head_offset(head), kept = part.kept(), depth = scratch.depth();
        run_on(isa_, [&](auto lanes) KVPLANE_BODY {
            for (Index i = 0; i < count; ++i)
                for (Index r = 0; r < rows; ++r) {
                    const Index from = (row + r) * key_dim_;
                    const float* const turn = scratch.turn(i);
                    offsets[i * rows + r] = detail::fused::turn_row<lanes>(
                        work_.plain_.data() + from, work_.partner_.data() + from, turn, turn + depth,
                        part.mean.data() + at, key_dim_, scratch.turned() + (i * rows + r) * depth);
                }
        });
        if (keys.settings().directions == LatentDirections::eigenvectors) {
            detail::project(isa_, scratch.turned(), depth, count * rows, part.decode.data() + at * kept,
                            key_dim_, kept, part.decode_scale.data(), scratch.projected(), depth);
            return;
        }
        for (Index r = 0; r < count * rows; ++r)
            for (Index j = 0; j < kept; ++j) {
                const Index c = static_cast<Index>(part.channels[static_cast<std::size_t>(j)]) - at;
                scratch.projected()[r * depth + j] =
                    c >= 0 && c < key_dim_ ? scratch.turned()[r * depth + c] * part.decode_scale[j] : 0.0f;
            }
    }

    /// Sinks and recent tokens of one head.
    void token_rows(Index head, Index chunk, FusedScratch& scratch) noexcept {
        constexpr Index most = FusedScratch::token_rows;
        static_assert(most == window_page_tokens);
        const State& state = cache_.state_;
        for (Index t = 0; t < cache_.sinks(); t += most)
            some_rows(sink_rows_, state.sinks.data(), t, t, std::min(most, cache_.sinks() - t), head, chunk,
                      scratch);
        const Index recent = state.tokens - state.window_first;
        for (Index t = 0; t < recent; t += most) {
            const auto page = static_cast<std::size_t>(t / most);
            some_rows(window_rows_, state.window[page].data(), 0, state.window_first + t,
                      std::min(most, recent - t), head, chunk, scratch,
                      t + most < recent ? state.window[page + 1].data() : nullptr);
        }
    }
    /// next: the page whose keys are read after this one's values.
    void some_rows(const TokenRows& store, const std::byte* page, Index at, Index first, Index count,
                   Index head, Index chunk, FusedScratch& scratch, const std::byte* next = nullptr) noexcept {
        if (first >= cache_.recipe().sink_tokens && first + count <= cache_.state_.dropped) return;
        const Index padded = (count + unit_lanes - 1) / unit_lanes * unit_lanes;
        for (Index row = head * block_; row < (head + 1) * block_; row += fused_rows) {
            const Index rows = std::min(fused_rows, (head + 1) * block_ - row);
            store.prefetch(page, 1, head, at, count);
            store.read(page, 0, head, at, count, scratch.rows(), key_dim_);
            detail::row_scores(isa_, work_.rotated_.data() + row * key_dim_, key_dim_, rows, scratch.rows(),
                               key_dim_, count, key_dim_, scratch.scores(), tile_tokens);
            apply(row, rows, first, count, padded, scratch.scores());
            if (next) store.prefetch(next, 0, head, 0, window_page_tokens);
            const PartialAttention to = part(chunk, row);
            fused_softmax(isa_, scratch.scores(), padded, rows, to);
            store.read(page, 1, head, at, count, scratch.rows(), value_dim_);
            if (bounded() && chunks_ > 0)
                for (Index t = 0; t < count; ++t)
                    value_norm(chunk, head) = std::max(
                        value_norm(chunk, head),
                        Eigen::Map<const Eigen::RowVectorXf>(scratch.rows() + t * value_dim_, value_dim_)
                            .norm());
            detail::add_rows(isa_, scratch.scores(), tile_tokens, rows, scratch.rows(), value_dim_, count,
                             value_dim_, to.output, stride_);
        }
    }

    const KvCache& cache_;
    AttentionWorkspace& work_;
    ReadPolicy policy_;
    Isa isa_;
    Index query_tokens_, heads_, block_, rows_, key_dim_, value_dim_, stride_, first_position_, chunks_;
    bool together_ = false;  ///< all heads read the same tiles of keys, so they go together
    bool look_again_ = false;
    Index value_units_ = 0, key_units_ = 0;  ///< of a tile and head; of keys the most of any part
    TokenRows sink_rows_, window_rows_;
};

template <CacheScalar Scalar, class Derived>
void KvCache::attend_fused(const HeadRows<Scalar>& queries, Eigen::MatrixBase<Derived>& output,
                           const AttentionParameters& parameters, AttentionWorkspace& workspace) const {
    Fused fused(*this, queries.tokens(), parameters.read, workspace);
    fused.take(queries, parameters);
    fused.run();
    const Index dim = configuration_.value_head_dim;
    for (Index head = 0; head < configuration_.query_heads; ++head)
        for (Index i = 0; i < queries.tokens(); ++i) {
            const float* const values = fused.output(head, i);
            for (Index c = 0; c < dim; ++c)
                output(i, head * dim + c) = static_cast<typename Derived::Scalar>(values[c]);
        }
}

inline std::vector<std::vector<Index>> KvCache::selected(const Matrix& given,
                                                         const AttentionParameters& parameters) const {
    const Queries queries(*this, given, parameters, {0, configuration_.kv_heads, 0, given.rows()});
    Reader reader(*this);
    const Selection selection = select(reader, queries, parameters);
    std::vector<std::vector<Index>> all(static_cast<std::size_t>(queries.rows()));
    Index at = 0;
    for (const Reader::Run& run : reader.runs()) {
        if (!run.tile) continue;
        for (Index r = 0; r < queries.rows(); ++r)
            for (Index t = 0; t < run.count; ++t)
                if (selection.scores(r, at + t) >= selection.least[r])
                    all[static_cast<std::size_t>(r)].push_back(run.first + t);
        at += run.count;
    }
    return all;
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
    for (Index head = 0; head < configuration_.kv_heads; ++head)
        for (const Reader::Run& run : reader.runs()) {
            const Index from = std::max(first, run.first),
                        to = std::min(first + count, run.first + run.count);
            if (from >= to) continue;
            all.block(from - first, head * dim(side), to - from, dim(side)) =
                (side == 0 ? reader.input_keys(run, head, all.cols()) : reader.rows(run, 1, head))
                    .middleRows(from - run.first, to - from);
        }
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
