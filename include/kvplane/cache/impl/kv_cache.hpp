// kvplane/cache/impl/kv_cache.hpp: KvCache below its templates.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "kvplane/cache/appender.hpp"
#include "kvplane/cache/decode.hpp"
#include "kvplane/cache/edit.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cache/prefill.hpp"
#include "kvplane/cache/reader.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/shared_prefix.hpp"
#include "kvplane/cache/workspace.hpp"
#include "kvplane/simd/floating_point.hpp"

namespace kvplane {

// AttentionWorkspace ---------------------------------------------------------------------------------------

KVPLANE_FUNCTION AttentionWorkspace::AttentionWorkspace(Executor* executor) : executor_(executor) {}
KVPLANE_FUNCTION AttentionWorkspace::AttentionWorkspace(AttentionWorkspace&&) noexcept = default;
KVPLANE_FUNCTION AttentionWorkspace& AttentionWorkspace::operator=(AttentionWorkspace&&) noexcept = default;
KVPLANE_FUNCTION AttentionWorkspace::~AttentionWorkspace() = default;

KVPLANE_FUNCTION const ReadReport& AttentionWorkspace::report() const noexcept {
    static const ReadReport none;
    return arrays_ ? arrays_->report : none;
}
KVPLANE_FUNCTION detail::Workspace& AttentionWorkspace::arrays() {
    if (!arrays_) arrays_ = std::make_unique<detail::Workspace>();
    return *arrays_;
}
KVPLANE_FUNCTION std::vector<AttentionWorkspace>& AttentionWorkspace::of_workers() {
    while (static_cast<Index>(of_workers_.size()) < executor().workers()) of_workers_.emplace_back();
    return of_workers_;
}

// Life -----------------------------------------------------------------------------------------------------

KVPLANE_FUNCTION KvCache::KvCache(const CacheConfiguration& configuration, TilePool& pool)
    : shape_(std::make_shared<const detail::CacheShape>(configuration)),
      pool_(&pool),
      state_(shape_->empty_state()) {}
KVPLANE_FUNCTION KvCache::KvCache(const CacheConfiguration& configuration, TilePool& pool,
                                  detail::CacheState&& state)
    : KvCache(configuration, pool) {
    state_ = std::move(state);
}
KVPLANE_FUNCTION KvCache::KvCache(std::shared_ptr<const detail::CacheShape> shape, TilePool* pool,
                                  const detail::CacheState& state)
    : shape_(std::move(shape)), pool_(pool), state_(state) {}
KVPLANE_FUNCTION KvCache::KvCache(KvCache&& other) noexcept
    : shape_(other.shape_),
      pool_(other.pool_),
      state_(std::exchange(other.state_, other.shape_->empty_state())) {}
KVPLANE_FUNCTION KvCache& KvCache::operator=(KvCache&& other) noexcept {
    if (this == &other) return *this;
    shape_ = other.shape_;
    pool_ = other.pool_;
    state_ = std::exchange(other.state_, other.shape_->empty_state());
    return *this;
}
KVPLANE_FUNCTION KvCache::~KvCache() = default;

KVPLANE_FUNCTION KvCache KvCache::fork() const {
    return {shape_, pool_, state_};
}
KVPLANE_FUNCTION void KvCache::clear() noexcept {
    state_ = shape_->empty_state();
}

// What it says of itself -----------------------------------------------------------------------------------

KVPLANE_FUNCTION const CacheConfiguration& KvCache::configuration() const noexcept {
    return shape_->configuration;
}
KVPLANE_FUNCTION Index KvCache::first_kept() const noexcept {
    return std::max(state_.dropped, std::min(state_.kept_sinks, tokens()));
}
KVPLANE_FUNCTION Index KvCache::packed_tokens() const noexcept {
    return state_.recent_first - state_.sink_count(shape_->recipe());
}
KVPLANE_FUNCTION Index KvCache::tokens_before_tile() const noexcept {
    const CacheRecipe& recipe = shape_->recipe();
    if (recipe.every_token) return std::numeric_limits<Index>::max();
    // A tile that was cut is opened first.
    const Index first = std::max(state_.cut() ? state_.tiles.back().first : state_.recent_first,
                                 recipe.sink_tokens),
                waiting = state_.layout ? tile_tokens : recipe.latents->fit_tokens;
    return first + waiting + recipe.recent_tokens - 1 - tokens();
}
KVPLANE_FUNCTION bool KvCache::needs_queries() const noexcept {
    const CacheRecipe& recipe = shape_->recipe();
    return recipe.shaped_keys ? !state_.shaping
                              : !state_.layout && recipe.latents && recipe.latents->basis.query_weighted;
}

KVPLANE_FUNCTION Index KvCache::bytes() const noexcept {
    Index sum = state_.page_bytes();
    if (configuration().fits_basis() && state_.latent) sum += state_.latent->bytes();
    if (state_.shaping && !configuration().query_moments) sum += state_.shaping->bytes();
    if (state_.queries)
        for (const SecondMoments& head : *state_.queries) sum += head.bytes();
    sum += state_.provisional_queries.size() * static_cast<Index>(sizeof(float));
    sum += static_cast<Index>(state_.attention.size() * sizeof(state_.attention[0]));
    return sum;
}
KVPLANE_FUNCTION double KvCache::bits_per_element() const noexcept {
    const Index elements = tokens() * configuration().elements_per_token();
    return elements == 0 ? 0.0 : 8.0 * static_cast<double>(bytes()) / static_cast<double>(elements);
}
KVPLANE_FUNCTION Index KvCache::predicted_bytes(const CacheConfiguration& c, Index tokens) {
    detail::require_configuration(c);
    require(tokens >= 0, ErrorCode::index, "predicted_bytes: ", tokens, " tokens, expected 0 or more");
    const CacheRecipe& recipe = c.recipe;
    require(!c.fits_basis(), ErrorCode::option, "predicted_bytes: recipe '", recipe.name,
            "' fits its own basis, from which the widths of its latents follow; expected one that is given");
    const detail::CacheShape shape(c);
    const Index tile = detail::counted_bytes(shape.layout->bytes);
    Index learned = recipe.shaped_keys && !c.query_moments
                        ? detail::learned_bytes(c, tokens - std::min(tokens, recipe.sink_tokens))
                        : 0;
    if (c.widths_by_token())
        learned += c.kv_heads * tile_tokens * static_cast<Index>(sizeof(detail::TokenAttention::value_type));
    if (recipe.every_token) return (tokens + tile_tokens - 1) / tile_tokens * tile;
    if (tokens == 0) return 0;
    const Index sinks = recipe.sink_tokens > 0 ? detail::counted_bytes(shape.sink_rows().bytes()) : 0;
    const Index rest = std::max<Index>(0, tokens - recipe.sink_tokens);
    const Index tiles = std::max<Index>(0, rest - recipe.recent_tokens) / tile_tokens;
    const Index recent =
        (rest - tiles * tile_tokens + detail::recent_page_tokens - 1) / detail::recent_page_tokens;
    return sinks + tiles * tile + recent * detail::counted_bytes(shape.recent_rows().bytes()) + learned;
}

/// Rounding of a token while it is recent (or a sink), then the grids of its tile, then what was clipped; and
/// all of that once more for each time that a tile was opened again.
KVPLANE_FUNCTION CacheErrorBound KvCache::error_bound() const {
    detail::Reader reader(*shape_, state_);
    const detail::StoredExtremes extremes = state_.extremes();
    const auto bound = [&](TileSide side) {
        const double before = shape_->rounding_bound(side, extremes.largest[side]) + extremes.carried[side];
        return shape_->packing_growth(side) * before + reader.tile_error_bound(side) + extremes.excess[side];
    };
    const double keys = bound(TileSide::keys);
    return {keys, configuration().values_in_keys ? keys : bound(TileSide::values)};
}

// Appending and forgetting ---------------------------------------------------------------------------------

KVPLANE_FUNCTION void KvCache::append_rows(const detail::AnyRows& keys, const detail::AnyRows* values,
                                           const detail::AnyRows* queries, bool provisional,
                                           Executor& executor) {
    require((values == nullptr) == configuration().values_in_keys, ErrorCode::option,
            values ? "append: values, but the configuration has them in keys; expected append(keys)"
                   : "append: keys alone, but the configuration does not have values in keys; expected "
                     "append(keys, values)");
    require(queries || !needs_queries(), ErrorCode::option, "append: recipe '", shape_->recipe().name,
            "' learns from the sequence's own queries; expected append(keys, values, queries), or ",
            shape_->recipe().shaped_keys ? "moments of queries" : "a basis", " in the configuration");
    detail::append_tokens(*shape_, state_, *pool_, keys, values, queries, provisional, executor);
}

KVPLANE_FUNCTION void KvCache::accept(Index count) {
    require(count >= 0 && count <= provisional_tokens(), ErrorCode::index, "accept: ", count, " of ",
            provisional_tokens(), " provisional tokens");
    detail::settle_tokens(*shape_, state_, *pool_, count);
}

KVPLANE_FUNCTION void KvCache::fit_basis() {
    require(configuration().fits_basis() && !state_.layout, ErrorCode::option, "fit_basis: recipe '",
            shape_->recipe().name, "' ",
            configuration().fits_basis() ? "has its basis" : "fits no basis of its own");
    const Index waiting = state_.settled() - state_.recent_first;
    require(waiting >= 2, ErrorCode::shape, "fit_basis: ", waiting,
            " tokens after the sinks, expected at least 2");
    detail::fit_own_basis(*shape_, state_, *pool_, waiting);
}

KVPLANE_FUNCTION void KvCache::truncate(Index count) {
    require(count >= 0 && count <= tokens(), ErrorCode::index, "truncate: to ", count, " of ", tokens(),
            " tokens");
    require(!state_.hides() || count <= state_.kept_sinks || count >= state_.dropped, ErrorCode::index,
            "truncate: to ", count, " tokens, expected at least ", state_.dropped,
            ", before which they were dropped, or at most the ", state_.kept_sinks, " sinks");
    if (count == tokens()) return;
    if (count == 0) return clear();
    state_.truncate(count);
}

KVPLANE_FUNCTION void KvCache::drop_before(Index token, Index sinks) {
    require(token >= 0 && token <= tokens(), ErrorCode::index, "drop_before: token ", token, " of ",
            tokens());
    require(sinks >= 0 && (!state_.hides() || sinks <= state_.kept_sinks), ErrorCode::index,
            "drop_before: ", sinks, " sinks to keep, expected 0 to ",
            state_.hides() ? state_.kept_sinks : tokens(), "; later ones were dropped");
    state_.drop_before(token, sinks, shape_->recipe().every_token);
}

KVPLANE_FUNCTION void KvCache::require_range(const char* call, Index first, Index last) const {
    require(first >= 0 && first <= last && last <= tokens(), ErrorCode::index, call, ": tokens ", first,
            " to ", last, " of ", tokens());
}

KVPLANE_FUNCTION void KvCache::remove(Index first, Index last) {
    require_range("remove", first, last);
    const CacheRecipe& recipe = shape_->recipe();
    require(first >= state_.sink_count(recipe) || first == last, ErrorCode::index, "remove: tokens ", first,
            " to ", last, ", expected none of the ", recipe.sink_tokens, " sinks of recipe '", recipe.name,
            "'");
    require(provisional_tokens() == 0, ErrorCode::option, "remove: ", provisional_tokens(),
            " provisional tokens, expected none: accept them, or truncate to ", state_.settled());
    require(shape_->rope || recipe.latents, ErrorCode::option,
            "remove: keys are stored after RoPE, and the configuration does not say which; expected "
            "CacheConfiguration::rope (with frequencies of 0 for a model that has none)");
    constexpr double most = 60000.0;
    const double largest = state_.extremes().largest.keys * shape_->turn_growth();
    require(!shape_->rope || largest <= most, ErrorCode::beyond_fp16, "remove: keys of magnitudes up to ",
            state_.extremes().largest.keys, " may become as large as ", largest,
            " when they are turned, expected at most ", most);
    if (first == last) return;
    if (last == tokens() && first >= state_.dropped) return truncate(first);
    detail::remove_tokens(*shape_, state_, *pool_, first, last);
}

KVPLANE_FUNCTION void KvCache::narrow(Index first, Index last, int key_bits, int value_bits) {
    require_range("narrow", first, last);
    detail::narrow_tiles(*shape_, state_, *pool_, first, last, {key_bits, value_bits});
}
KVPLANE_FUNCTION Index KvCache::narrowed_bytes(Index first, Index last, int key_bits, int value_bits) const {
    require_range("narrow", first, last);
    return bytes() - state_.page_bytes() +
           detail::narrowed_page_bytes(state_, first, last, {key_bits, value_bits});
}

// Attention ------------------------------------------------------------------------------------------------

KVPLANE_FUNCTION AttentionWorkspace& KvCache::thread_workspace() {
    thread_local AttentionWorkspace workspace;
    return workspace;
}

KVPLANE_FUNCTION void KvCache::require_queries(const detail::AnyRows& queries, Index out_rows, Index out_cols,
                                               const AttentionParameters& parameters) const {
    const CacheConfiguration& c = configuration();
    require(queries.heads == c.query_heads && queries.head_dim == c.key_head_dim, ErrorCode::shape,
            "attend: queries of ", queries.heads, " heads of ", queries.head_dim, " channels, expected ",
            c.query_heads, " of ", c.key_head_dim);
    require(out_rows == queries.tokens && out_cols == c.query_heads * c.value_head_dim, ErrorCode::shape,
            "attend: an output of ", out_rows, " x ", out_cols, ", expected ", queries.tokens, " x ",
            c.query_heads * c.value_head_dim);
    detail::require_parameters(parameters, c.query_heads, queries.tokens, tokens());
    require(parameters.key_fraction >= 1.0 || c.recipe.latents, ErrorCode::option, "attend: recipe '",
            c.recipe.name, "' has no latents to choose keys by; expected a key_fraction of 1");
}

/// That no query asks for tokens which were dropped.
KVPLANE_FUNCTION void KvCache::require_kept(const AttentionParameters& parameters, Index query_tokens) const {
    if (!state_.hides() || parameters.sliding_window == 0) return;
    const Index first_seen =
        parameters.first_position(tokens(), query_tokens) + 1 - parameters.sliding_window;
    require(first_seen >= state_.dropped, ErrorCode::option, "attend: a sliding window of ",
            parameters.sliding_window, " reaches token ", std::max<Index>(first_seen, 0), ", but tokens ",
            state_.kept_sinks, " to ", state_.dropped - 1, " were dropped");
    require(parameters.sinks <= state_.kept_sinks, ErrorCode::option, "attend: ", parameters.sinks,
            " sinks, but tokens ", state_.kept_sinks, " to ", state_.dropped - 1,
            " were dropped; expected drop_before() to keep as many");
}

KVPLANE_FUNCTION void KvCache::require_policy(const AttentionParameters& parameters) const {
    using Kind = ReadPolicy::Kind;
    const ReadPolicy& read = parameters.read;
    const CacheRecipe& recipe = shape_->recipe();
    require(read.kind == Kind::all || !state_.layout || detail::decodes(*state_.layout, state_.latent.get()),
            ErrorCode::option, "attend: recipe '", recipe.name,
            "' is not read by planes; expected ReadPolicy::all()");
    require(read.kind == Kind::all || !state_.has_narrowed(), ErrorCode::option,
            "attend: tiles were narrowed, which are read in full; expected ReadPolicy::all()");
    require(read.kind == Kind::all || !configuration().values_in_keys, ErrorCode::option,
            "attend: values in keys are read in full; expected ReadPolicy::all()");
    require(read.kind == Kind::all || !configuration().widths_by_token(), ErrorCode::option,
            "attend: values whose tokens have different widths are read in full; expected ReadPolicy::all()");
    require(read.kind == Kind::all || !configuration().keys_by_token(), ErrorCode::option, "attend: recipe '",
            recipe.name, "' has grids of keys by token, which are read in full; expected ReadPolicy::all()");
    const bool half_keys = !recipe.latents && recipe.keys.is_half(), half_values = recipe.values.is_half();
    const bool by_bits = read.kind == Kind::fixed || read.kind == Kind::aligned;
    require(!by_bits || ((!half_keys || read.key_bits >= 8.0) && (!half_values || read.value_bits >= 8.0)),
            ErrorCode::option, "attend: a read of ", read.key_bits, " bits of keys and ", read.value_bits,
            " of values, but recipe '", recipe.name, "' keeps ",
            half_keys && half_values ? "both"
            : half_keys              ? "keys"
                                     : "values",
            " in fp16, of which no fewer than 8 bits are a number; expected at least 8");
    require(read.kind != Kind::exponents || half_values || half_keys, ErrorCode::option, "attend: recipe '",
            recipe.name,
            "' holds no fp16 to be read by exponents; expected fp16 keys or values, or another policy");
}

KVPLANE_FUNCTION void KvCache::require_attend(const detail::AnyRows& queries, Index out_rows, Index out_cols,
                                              const AttentionParameters& parameters) const {
    require_queries(queries, out_rows, out_cols, parameters);
    require_policy(parameters);
    require_kept(parameters, queries.tokens);
}

KVPLANE_FUNCTION void KvCache::attend_rows(const detail::AnyRows& queries, const detail::OutputSink& output,
                                           const AttentionParameters& parameters,
                                           AttentionWorkspace& workspace) const {
    require_attend(queries, output.rows, output.cols, parameters);
    if (Matrix* const sums = output.more.log_sum_exp)
        sums->resize(queries.tokens, configuration().query_heads);
    if (Matrix* const weights = output.more.token_weights)
        weights->resize(configuration().kv_heads, tokens());
    attend_checked(queries, output, sequence(0, queries.tokens), parameters, workspace, nullptr);
}

KVPLANE_FUNCTION bool KvCache::decodes(const AttentionParameters& parameters) const noexcept {
    return parameters.key_fraction >= 1.0 && !parameters.decode_tiles &&
           (state_.tiles.empty() || detail::decodes(*state_.layout, state_.latent.get()));
}

KVPLANE_FUNCTION detail::BatchSequence KvCache::sequence(Index first_row, Index query_tokens) const noexcept {
    return {.shape = shape_.get(), .state = &state_, .first_row = first_row, .query_tokens = query_tokens};
}

KVPLANE_FUNCTION void KvCache::attend_checked(const detail::AnyRows& queries,
                                              const detail::OutputSink& output,
                                              const detail::BatchSequence& sequence,
                                              const AttentionParameters& parameters,
                                              AttentionWorkspace& workspace,
                                              detail::PrefixStates* shared) const {
    const Index query_tokens = sequence.query_tokens, first_row = sequence.first_row,
                dim = configuration().value_head_dim;
    if (query_tokens == 0) {
        if (output.more.token_weights) output.more.token_weights->setZero();
        return;
    }
    const detail::StandardFloatingPoint standard;
    if (decodes(parameters)) {
        const bool many = query_tokens > detail::decode_query_tokens;
        AttentionParameters used = parameters;
        if (many) used.read = ReadPolicy::all();
        Matrix* const weights = output.more.token_weights;
        // Kept weights take room for every token.
        const Index most = many && !weights ? detail::pass_query_tokens : detail::decode_query_tokens;
        std::array<detail::QueryToken, detail::pass_query_tokens> tokens;
        const Index position = parameters.first_position(state_.tokens, query_tokens);
        const bool adds_weights = weights && query_tokens > most;
        Matrix weights_of_pass;
        if (adds_weights) {
            weights_of_pass.resize(weights->rows(), weights->cols());
            weights->setZero();
        }
        // The last pass takes the most memory; it comes first, so that nothing is written where that fails.
        for (Index end = query_tokens, count; end > 0; end -= count) {
            count = std::min(most, end);
            const Index first = end - count;
            for (Index i = 0; i < count; ++i)
                tokens[static_cast<std::size_t>(i)] = {.row = first_row + first + i,
                                                       .position = position + first + i};
            detail::DecodePass pass({.cache = *shape_,
                                     .state = state_,
                                     .tokens = std::span(tokens).first(static_cast<std::size_t>(count)),
                                     .first_tile = sequence.shared_tiles,
                                     .end_tile = sequence.tiles(),
                                     .unpacked = true,
                                     .prefix = shared,
                                     .token_weights = adds_weights ? &weights_of_pass : weights},
                                    used, workspace.arrays(), workspace.executor());
            pass.run(queries);
            pass.outputs([&](Index head, Index token, const detail::DecodePass::Output& found) {
                output.store(output.context, first_row + first + token, head * dim, found.values, dim);
                if (output.more.log_sum_exp)
                    (*output.more.log_sum_exp)(first + token, head) = found.log_sum_exp;
            });
            if (adds_weights) *weights += weights_of_pass;
        }
        return;
    }
    const Matrix given = detail::widened(queries.visit(
        [&](const auto& rows) { return detail::AnyRows(rows.middle_tokens(first_row, query_tokens)); }));
    detail::PrefillOutput result =
        detail::prefill(*shape_, state_, given, parameters, output.more.token_weights, workspace.executor());
    for (Index i = 0; i < query_tokens; ++i)
        output.store(output.context, first_row + i, 0, result.values.row(i).data(), result.values.cols());
    if (output.more.log_sum_exp) *output.more.log_sum_exp = std::move(result.log_sum_exp);
}

KVPLANE_FUNCTION void KvCache::attend_batch_rows(
    std::span<const KvCache* const> caches, std::span<const Index> offsets, const detail::AnyRows& queries,
    const detail::OutputSink& output, const AttentionParameters& parameters, AttentionWorkspace& workspace) {
    const std::size_t count = caches.size();
    require(offsets.size() == count + 1 && offsets.front() == 0 && offsets.back() == queries.tokens &&
                std::is_sorted(offsets.begin(), offsets.end()),
            ErrorCode::shape, "attend_batch: ", offsets.size(), " offsets for ", count, " caches and ",
            queries.tokens, " query tokens, expected ", count + 1, " that ascend from 0 to ", queries.tokens);
    require(!parameters.bias && !parameters.position, ErrorCode::option,
            "attend_batch: a bias or a position, expected neither: sequences differ in them");
    require(output.rows == queries.tokens, ErrorCode::shape, "attend_batch: an output of ", output.rows,
            " rows, expected ", queries.tokens);
    const auto queries_of = [&](std::size_t i) {
        return queries.visit([&](const auto& rows) {
            return detail::AnyRows(rows.middle_tokens(offsets[i], offsets[i + 1] - offsets[i]));
        });
    };
    std::vector<detail::BatchSequence> sequences;
    for (std::size_t i = 0; i < count; ++i) {
        caches[i]->require_attend(queries_of(i), offsets[i + 1] - offsets[i], output.cols, parameters);
        sequences.push_back(caches[i]->sequence(offsets[i], offsets[i + 1] - offsets[i]));
    }
    std::vector<detail::BatchSequence*> sharing;
    for (std::size_t i = 0; i < count; ++i)
        if (const Index tokens = sequences[i].query_tokens;
            tokens > 0 && tokens <= detail::decode_query_tokens &&
            parameters.read.kind == ReadPolicy::Kind::all && caches[i]->decodes(parameters))
            sharing.push_back(&sequences[i]);
    detail::PrefixStates& shared = workspace.arrays().prefixes;
    detail::SharedPrefixes(queries, parameters, shared, workspace.arrays(), workspace.executor())
        .attend(sharing);

    // The longest first, so that none of them is the last to begin.
    std::vector<std::size_t> order(count);
    for (std::size_t i = 0; i < count; ++i) order[i] = i;
    const auto work = [&](std::size_t i) {
        return (caches[i]->tokens() - sequences[i].shared_tiles * tile_tokens) * sequences[i].query_tokens;
    };
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return work(a) > work(b); });
    Index left = 0;
    for (std::size_t i = 0; i < count; ++i) left += work(i);
    // What is more than a worker's share takes all workers.
    const Index workers = workspace.executor().workers();
    std::size_t together = 0;
    for (; together < count && work(order[together]) * workers > left; ++together) {
        const std::size_t i = order[together];
        left -= work(i);
        caches[i]->attend_checked(queries, output, sequences[i], parameters, workspace, &shared);
    }
    std::vector<AttentionWorkspace>& own = workspace.of_workers();
    detail::FirstFailure failure;
    detail::run_items(workspace.executor(), static_cast<Index>(count - together),
                      [&](Index item, Index worker) {
                          failure.guard([&] {
                              const std::size_t i = order[together + static_cast<std::size_t>(item)];
                              caches[i]->attend_checked(queries, output, sequences[i], parameters,
                                                        own[static_cast<std::size_t>(worker)], &shared);
                          });
                      });
    failure.rethrow();
}

KVPLANE_FUNCTION std::vector<std::vector<Index>> KvCache::selected_rows(
    const detail::AnyRows& queries, const AttentionParameters& parameters) const {
    require_queries(queries, queries.tokens, configuration().query_heads * configuration().value_head_dim,
                    parameters);
    return detail::selected_keys(*shape_, state_, detail::widened(queries), parameters);
}

KVPLANE_FUNCTION Matrix KvCache::stored(TileSide side, Index first, Index count) const {
    require(first >= 0 && count >= 0 && first + count <= tokens(), ErrorCode::index, "stored tokens ", first,
            " to ", first + count, " of ", tokens());
    require(count == 0 || !state_.hides() || first >= state_.dropped || first + count <= state_.kept_sinks,
            ErrorCode::index, "stored tokens ", first, " to ", first + count, ": tokens ", state_.kept_sinks,
            " to ", state_.dropped - 1, " were dropped");
    return detail::stored_rows(*shape_, state_, side, first, count);
}

}  // namespace kvplane
