// kvplane/cache/append.hpp: how tokens come into a KvCache. Part of kv_cache.hpp, which includes it.
#pragma once

#include "kvplane/cache/kv_cache.hpp"

namespace kvplane {

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

}  // namespace kvplane
