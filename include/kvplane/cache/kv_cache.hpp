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
// the same bytes. Drafts, which may be taken back, are appended as provisional tokens: attention sees them
// like others, but no tile is made of them, so that to take them back leaves no trace. A truncation inside a
// tile cannot undo what the tile has rounded: its tokens become recent ones when the sequence goes on, and
// are rounded once more with their next tile (unless tiles are fp16).
//
// A recipe with latents and no basis given fits its own to the first tokens after the sinks (recipe.latents->
// fit_tokens): until then these wait where recent tokens do, in recent_bits, and are counted so. What it sees
// of queries is what append() is given with their tokens, taken-back tokens included.
//
// An append is all or nothing: everything that can fail happens before the cache changes. const calls on one
// cache may run at the same time; others need the cache to themselves. Several caches may share a pool from
// several threads.
#pragma once

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "kvplane/attention/executor.hpp"
#include "kvplane/attention/parameters.hpp"
#include "kvplane/attention/read_policy.hpp"
#include "kvplane/cache/configuration.hpp"
#include "kvplane/cache/pages.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

/// What attention gives beside its output, for each matrix that is there.
struct AttentionOutputs {
    /// Made query_tokens x query_heads: the log of the sum of exp(score) over what each query sees (-infinity
    /// for nothing; a sink logit counts), with which merge_attention() puts the outputs of several caches
    /// together.
    Matrix* log_sum_exp = nullptr;
    /// Made kv_heads x tokens: the softmax weights that a token got from all query tokens of the call and all
    /// query heads of the key head, summed; what eviction by heavy hitters (H2O, arXiv 2306.14048) and by
    /// observation windows (SnapKV, arXiv 2404.14469) goes by. The weights of a query row sum up to 1, or to
    /// what a sink logit leaves. Tokens that no query sees have 0; rows that are not finite are left out.
    Matrix* token_weights = nullptr;
};

namespace detail {

struct BatchSequence;
struct CacheShape;
struct Workspace;
class PrefixStates;

/// Where attention puts its output: store(context, query token, first column, values [count]).
struct OutputSink {
    Index rows, cols;  ///< of all of it
    void (*store)(void* context, Index row, Index column, const float* values, Index count);
    void* context;
    AttentionOutputs more;
};

}  // namespace detail

/// Memory that attention works in, and who runs it. Kept from call to call, so that a call of a shape that
/// was seen before allocates nothing. One call at a time; moved, not copied.
class AttentionWorkspace {
  public:
    /// executor: nullptr for the calling thread alone; must outlive the workspace.
    explicit AttentionWorkspace(Executor* executor = nullptr);
    AttentionWorkspace(AttentionWorkspace&&) noexcept;
    AttentionWorkspace& operator=(AttentionWorkspace&&) noexcept;
    ~AttentionWorkspace();

    /// Of the last call of up to 8 query tokens that read planes.
    const ReadReport& report() const noexcept;

    /// For kvplane's own use.
    detail::Workspace& arrays();
    /// One for each worker of the executor, for calls that each run in one of them.
    std::vector<AttentionWorkspace>& of_workers();
    Executor& executor() noexcept { return executor_ ? *executor_ : static_cast<Executor&>(serial_); }

  private:
    Executor* executor_;
    SerialExecutor serial_;
    std::unique_ptr<detail::Workspace> arrays_;
    std::vector<AttentionWorkspace> of_workers_;
};

/// Bounds of |x - x'| over all stored elements, in the frame in which they are stored (rotated, where the
/// recipe or a tile rotates). A row of d channels is off by at most sqrt(d) times that in norm, in any frame.
struct CacheErrorBound {
    double key = 0.0;
    double value = 0.0;
};

class KvCache {
  public:
    /// Throws Error (option) for a configuration that cannot be. The pool must outlive the cache.
    KvCache(const CacheConfiguration& configuration, TilePool& pool);

    /// What was moved from is an empty cache of the same configuration.
    KvCache(KvCache&& other) noexcept;
    KvCache& operator=(KvCache&& other) noexcept;
    ~KvCache();

    /// A cache of the same content. It shares all pages; the first append to a page that is not full copies
    /// that page.
    KvCache fork() const;

    const CacheConfiguration& configuration() const noexcept;
    /// Where its pages come from.
    TilePool& pool() const noexcept { return *pool_; }
    /// Tokens appended and not truncated: the position of the next one.
    Index tokens() const noexcept { return state_.tokens; }
    /// The first token after the kept sinks that attend() sees; see drop_before().
    Index first_kept() const noexcept;
    /// Tokens in packed tiles.
    Index packed_tokens() const noexcept;

    /// How many tokens can come before some become a tile, or a basis is fitted. Of recipes that quantize
    /// every token the largest number there is.
    Index tokens_before_tile() const noexcept;

    /// Appends tokens: keys tokens x (kv_heads * key_head_dim), values tokens x (kv_heads * value_head_dim),
    /// of float, Eigen::half or Eigen::bfloat16; matrices, views and expressions, or rank-3 tensors (heads,
    /// tokens, head_dim). Keys are as attention takes them, after RoPE. Throws Error (shape; not_finite and
    /// beyond_fp16 with the position; out_of_memory) and then has changed nothing.
    ///
    /// queries: those of the same tokens, tokens x (query_heads * key_head_dim), after RoPE. They are looked
    /// at only while needs_queries(); without them append() then throws Error (option). Where tokens of values
    /// have different widths, they are looked at for good, but need not be given.
    ///
    /// All provisional tokens are accepted first.
    ///
    /// With a workspace its executor's workers share the tokens and the heads among them. What is stored does not
    /// depend on how many there are. Without one the calling thread does it alone.
    template <class K, class V>
    void append(const K& keys, const V& values) {
        append_both(keys, values, false, serial());
    }
    template <class K, class V>
    void append(const K& keys, const V& values, AttentionWorkspace& workspace) {
        append_both(keys, values, false, workspace.executor());
    }
    /// Where values are in keys: the keys are all there is. append() with values is then refused (option).
    template <class K>
    void append(const K& keys) {
        append_rows(heads_of_kv(keys), nullptr, nullptr, false, serial());
    }
    template <class K>
    void append(const K& keys, AttentionWorkspace& workspace) {
        append_rows(heads_of_kv(keys), nullptr, nullptr, false, workspace.executor());
    }
    template <class K, class V, class Q>
    void append(const K& keys, const V& values, const Q& queries) {
        append_with(keys, values, queries, false, serial());
    }
    template <class K, class V, class Q>
    void append(const K& keys, const V& values, const Q& queries, AttentionWorkspace& workspace) {
        append_with(keys, values, queries, false, workspace.executor());
    }

    /// The same for tokens that may yet be taken back: drafts, or tokens of a step that another layer may
    /// refuse. truncate() to a count within them leaves exactly what an append() of the other tokens would
    /// have. Recipes that quantize every token pack these too.
    template <class K, class V>
    void append_provisional(const K& keys, const V& values) {
        append_both(keys, values, true, serial());
    }
    template <class K>
    void append_provisional(const K& keys) {
        append_rows(heads_of_kv(keys), nullptr, nullptr, true, serial());
    }
    template <class K, class V, class Q>
    void append_provisional(const K& keys, const V& values, const Q& queries) {
        append_with(keys, values, queries, true, serial());
    }
    /// Tokens at the end of the sequence that are provisional.
    Index provisional_tokens() const noexcept { return tokens() - state_.settled(); }
    /// Makes the first `count` provisional tokens tokens like all others, and the tiles that are then due.
    /// Throws Error: index (more than there are); out_of_memory; shape as fit_basis(). Then nothing has
    /// changed.
    void accept(Index count);
    /// Accepts all of them.
    void accept() { accept(provisional_tokens()); }

    /// Whether append() needs queries: while the cache has yet to fit a query-weighted basis of its own, or
    /// to learn from 512 tokens how to shape keys.
    bool needs_queries() const noexcept;
    /// Fits the cache's own basis now, to all tokens that wait and are not provisional, as SVDq does at the
    /// end of a prompt; and makes the tiles that are then due. Throws Error: option (the recipe fits no
    /// basis, or has done so), shape (fewer than two tokens wait; fewer independent keys than latents that
    /// are to have bits), out_of_memory.
    void fit_basis();
    /// The basis that tiles are stored in; nullptr where keys are stored in channels, and before it is
    /// fitted.
    const LatentKeys* latent_keys() const noexcept { return state_.latent.get(); }

    /// Attention of the last tokens of the sequence, causal among themselves (or of others: see
    /// AttentionParameters::position and causal). queries: query_tokens x
    /// (query_heads * key_head_dim), or a tensor; output: query_tokens x (query_heads * value_head_dim), of
    /// any float type and layout. Throws Error (shape, option, not_finite) before it writes anything.
    ///
    /// Packed bits are read as they are (cache/decode.hpp), which allocates nothing in a workspace that has
    /// seen the shape before. What cannot be read so (capabilities() says of which recipes and why; a
    /// key_fraction) takes many times as long: a tile is decoded to floats once for a block of query tokens
    /// (cache/prefill.hpp), with memory that is taken at every call (std::bad_alloc). Either way the workspace's
    /// executor runs it, and results do not depend on how many workers it has. Without a workspace the calling
    /// thread's own is used.
    ///
    /// more: what else is wanted. It does not change a bit of the output. Sums of weights take memory: of up
    /// to 8 query tokens 2 bytes a query row and token, kept in the workspace; of more 4 bytes a token for
    /// each of the up to 128 group() rows that every worker has in hand, and for each of those blocks. Up to
    /// 8 query tokens keep weights as fp16 until they are summed.
    template <class Q, class Derived>
    void attend(const Q& queries, Eigen::MatrixBase<Derived>& output,
                const AttentionParameters& parameters = {}) const {
        attend(queries, output, parameters, thread_workspace());
    }
    template <class Q, class Derived>
    void attend(const Q& queries, Eigen::MatrixBase<Derived>& output, const AttentionParameters& parameters,
                AttentionWorkspace& workspace, const AttentionOutputs& more = {}) const {
        const auto rows = input_heads(queries, configuration().query_heads);
        attend_rows(rows, sink_of(output, more), parameters, workspace);
    }
    template <class Q, class Derived>
    void attend(const Q& queries, Eigen::MatrixBase<Derived>&& output,
                const AttentionParameters& parameters = {}) const {
        attend(queries, output, parameters);
    }

    /// attend() of many sequences in one call, as a server decodes them: workers take whole sequences, the
    /// long ones together, so that many short sequences use all workers as one long one does. Cache i takes
    /// the query tokens [offsets[i], offsets[i + 1]) of `queries`, which are all of its kind, and gives the
    /// same rows of `output`. The caches have one configuration (the same heads and widths at least); one may
    /// come several times. The parameters hold for all, without bias and position. Throws Error as attend(),
    /// and shape for offsets that do not begin at 0, ascend, and end with the queries; and then has written
    /// nothing, unless memory ended (std::bad_alloc).
    ///
    /// Prefixes that sequences share are read once: where decoding forks have their first tiles in common,
    /// and the policy is to read everything, these are attended for the queries of all of them, branch by
    /// branch of a tree of forks. Either way each sequence gets bit for bit what attend() gives it by itself.
    template <class Q, class Derived>
    static void attend_batch(std::span<const KvCache* const> caches, std::span<const Index> offsets,
                             const Q& queries, Eigen::MatrixBase<Derived>& output,
                             const AttentionParameters& parameters, AttentionWorkspace& workspace) {
        if (caches.empty()) return;
        const auto rows = input_heads(queries, caches[0]->configuration().query_heads);
        attend_batch_rows(caches, offsets, rows, sink_of(output, {}), parameters, workspace);
    }

    /// Forgets all but the first `count` tokens. Throws Error (index) for more than there are, or where
    /// tokens were dropped that would be among the last.
    void truncate(Index count);

    /// Forgets the tokens in [sinks, token), for a sliding window: attention does not see them, and the pages
    /// of tiles that hold nothing else are given back. Positions stay. attend() then refuses a sliding window
    /// that reaches those tokens, and more AttentionParameters::sinks. Throws Error (index) for a token
    /// beyond the end, and for sinks that have been dropped.
    void drop_before(Index token, Index sinks);
    /// With the sinks of the call before; at first those that the recipe keeps in fp16.
    void drop_before(Index token) { drop_before(token, state_.kept_sinks); }

    /// Takes the tokens [first, last) out of the sequence: those behind them move back by as many positions,
    /// and attention is what it would be had they been computed there (a context shift). Keys in tiles are
    /// not touched, because queries are turned by RoPE instead; those of recent tokens are turned and rounded
    /// once more. Pages of tiles that hold nothing else are given back; a tile in whose middle tokens were
    /// removed is two afterwards, which share its page. Throws Error, and then has changed nothing: index (no
    /// such tokens, or sinks of the recipe among them); option (provisional tokens; a configuration without
    /// `rope`, unless it has latents); beyond_fp16 (keys so large that a turn might leave fp16);
    /// out_of_memory.
    void remove(Index first, Index last);

    /// Leaves the tiles whose tokens all lie in [first, last) at most key_bits and value_bits an element:
    /// their codes lose their low planes (storage/narrow.hpp says which widths become which), which is all
    /// that is lost, and the pages go back to the pool. error_bound() holds afterwards for the wider cells.
    /// Tokens outside tiles, and a last tile that is not full, stay as they are, and new tiles get the
    /// recipe's widths. All or nothing, so that it takes memory for the new pages first. attend() then
    /// refuses a ReadPolicy other than all. Throws Error, and then has changed nothing: index (no such
    /// tokens); option (widths that a tile cannot be narrowed to); out_of_memory.
    void narrow(Index first, Index last, int key_bits, int value_bits);
    /// What bytes() would be after narrow(). Throws Error (index, option).
    Index narrowed_bytes(Index first, Index last, int key_bits, int value_bits) const;

    /// Back to no tokens.
    void clear() noexcept;

    /// Memory of all pages, headers and unused room included, and of a basis of the cache's own or what it
    /// has seen for one. A page shared by forks counts in each. A basis that was given is part of the model.
    Index bytes() const noexcept;
    /// 8 bytes() / elements of all tokens; 0 without tokens.
    double bits_per_element() const noexcept;
    /// What bytes() will be with that many tokens, appended and never truncated or dropped. Throws Error
    /// (option, index; option also where the cache fits its own basis, because the widths follow from that).
    static Index predicted_bytes(const CacheConfiguration& configuration, Index tokens);

    CacheErrorBound error_bound() const;

    /// The tokens of tiles that take part for each query with parameters.key_fraction: query head by query
    /// head, query_tokens each. For tests and inspection. Throws Error as attend().
    template <class Q>
    std::vector<std::vector<Index>> selected_keys(const Q& queries,
                                                  const AttentionParameters& parameters) const {
        const auto rows = input_heads(queries, configuration().query_heads);
        return selected_rows(rows, parameters);
    }

    /// The stored tokens [first, first + count) as attention sees them, in the frame of the input: tokens x
    /// (kv_heads * head_dim). For tests and inspection; slow. Throws Error (index).
    Matrix stored_keys(Index first, Index count) const { return stored(TileSide::keys, first, count); }
    Matrix stored_values(Index first, Index count) const { return stored(TileSide::values, first, count); }

    /// What it holds, for io/cache_file.hpp and other readers of packed tiles. Valid until the cache changes.
    const detail::CacheState& state() const noexcept { return state_; }
    const detail::CacheShape& shape() const noexcept { return *shape_; }
    /// A cache of this content, which must be one of the configuration.
    KvCache(const CacheConfiguration& configuration, TilePool& pool, detail::CacheState&& state);

  private:
    KvCache(std::shared_ptr<const detail::CacheShape> shape, TilePool* pool, const detail::CacheState& state);

    template <class Input>
    auto heads_of_kv(const Input& input) const {
        return input_heads(input, configuration().kv_heads);
    }
    static Executor& serial() noexcept { return thread_workspace().executor(); }
    template <class K, class V>
    void append_both(const K& keys, const V& values, bool provisional, Executor& executor) {
        const auto value_heads = heads_of_kv(values);  // may own what it is a view of
        const detail::AnyRows rows(value_heads);
        append_rows(heads_of_kv(keys), &rows, nullptr, provisional, executor);
    }
    template <class K, class V, class Q>
    void append_with(const K& keys, const V& values, const Q& queries, bool provisional, Executor& executor) {
        if (!needs_queries() && !configuration().widths_by_token())
            return append_both(keys, values, provisional, executor);
        const auto value_heads = heads_of_kv(values);
        const detail::AnyRows value_rows(value_heads);
        const auto query_heads = input_heads(queries, configuration().query_heads);
        const detail::AnyRows query_rows(query_heads);
        append_rows(heads_of_kv(keys), &value_rows, &query_rows, provisional, executor);
    }
    static AttentionWorkspace& thread_workspace();
    template <class Derived>
    static detail::OutputSink sink_of(Eigen::MatrixBase<Derived>& output, const AttentionOutputs& more) {
        const auto store = [](void* context, Index row, Index column, const float* values, Index count) {
            auto& to = *static_cast<Eigen::MatrixBase<Derived>*>(context);
            for (Index c = 0; c < count; ++c)
                to(row, column + c) = static_cast<typename Derived::Scalar>(values[c]);
        };
        return {output.rows(), output.cols(), store, &output, more};
    }

    // Below the seam: inputs have become rows of heads.
    void append_rows(const detail::AnyRows& keys, const detail::AnyRows* values,
                     const detail::AnyRows* queries, bool provisional, Executor& executor);
    void attend_rows(const detail::AnyRows& queries, const detail::OutputSink& output,
                     const AttentionParameters& parameters, AttentionWorkspace& workspace) const;
    static void attend_batch_rows(std::span<const KvCache* const> caches, std::span<const Index> offsets,
                                  const detail::AnyRows& queries, const detail::OutputSink& output,
                                  const AttentionParameters& parameters, AttentionWorkspace& workspace);
    /// attend_rows() of what was checked: of some rows of `queries`, into the same of the output. `shared`
    /// holds what was attended already, if anything was.
    void attend_checked(const detail::AnyRows& queries, const detail::OutputSink& output,
                        const detail::BatchSequence& sequence, const AttentionParameters& parameters,
                        AttentionWorkspace& workspace, detail::PrefixStates* shared) const;
    /// Whether DecodePass reads it with these parameters.
    bool decodes(const AttentionParameters& parameters) const noexcept;
    detail::BatchSequence sequence(Index first_row, Index query_tokens) const noexcept;
    std::vector<std::vector<Index>> selected_rows(const detail::AnyRows& queries,
                                                  const AttentionParameters& parameters) const;
    void require_attend(const detail::AnyRows& queries, Index out_rows, Index out_cols,
                        const AttentionParameters& parameters) const;
    void require_queries(const detail::AnyRows& queries, Index out_rows, Index out_cols,
                         const AttentionParameters& parameters) const;
    void require_policy(const AttentionParameters& parameters) const;
    void require_range(const char* call, Index first, Index last) const;
    void require_kept(const AttentionParameters& parameters, Index query_tokens) const;
    Matrix stored(TileSide side, Index first, Index count) const;

    std::shared_ptr<const detail::CacheShape> shape_;
    TilePool* pool_;
    detail::CacheState state_;
};

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/cache/impl/kv_cache.hpp"
#endif
