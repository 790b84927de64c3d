// kvplane/cache/impl/appender.hpp: checks of input, and the Appender.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kvplane/cache/appender.hpp"
#include "kvplane/cache/incoming_rows.hpp"
#include "kvplane/cache/pages.hpp"
#include "kvplane/cache/reader.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/error.hpp"
#include "kvplane/latent/coder.hpp"
#include "kvplane/latent/fit.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/block.hpp"
#include "kvplane/quantize/shaped.hpp"
#include "kvplane/simd/floating_point.hpp"
#include "kvplane/storage/tile_coder.hpp"

namespace kvplane::detail {

KVPLANE_FUNCTION Matrix widened(const AnyRows& input) {
    Matrix matrix;
    widen_rows(input, 0, input.tokens, matrix);
    return matrix;
}

/// Throws Error (shape) for input of other heads than the cache has.
inline void require_input(const AnyRows& rows, const char* argument, Index heads, Index dim) {
    require(rows.heads == heads && rows.head_dim == dim, ErrorCode::shape, "append: ", argument, " of ",
            rows.heads, " heads of ", rows.head_dim, " channels, expected ", heads, " of ", dim);
}
/// So many tokens at most look at a tile before it is made, the last of those that come behind it.
inline constexpr Index looking_tokens = 32;
/// So many tokens are taken at a time.
inline constexpr Index piece_tokens = 64;

class Appender {
  public:
    Appender(const CacheShape& cache, CacheState& state, TilePool& pool, Executor& executor)
        : cache_(cache),
          state_(state),
          pool_(pool),
          executor_(executor),
          layout_(state.layout),
          latent_(state.latent),
          queries_(state.queries),
          shaping_(state.shaping),
          tokens_(state.tokens),
          settled_(state.settled()),
          recent_first_(state.recent_first),
          sinks_(state.sinks),
          recent_(state.recent),
          settled_extremes_(state.settled_extremes),
          provisional_(state.provisional),
          provisional_queries_(state.provisional_queries),
          attention_(state.attention),
          sink_rows_(cache.sink_rows()),
          recent_rows_(cache.recent_rows()),
          packers_(static_cast<std::size_t>(executor.workers())) {
        if (!state.tiles.empty()) last_tokens_ = state.tiles.back().tokens;
        const CacheConfiguration& c = cache.configuration;
        if (c.widths_by_token()) attention_.resize(static_cast<std::size_t>(c.kv_heads * tile_tokens));
    }

    /// Tokens of one piece in the stored frame.
    struct Piece {
        PerSide<RowView<const float>> rows;  ///< [token][kv_heads * dim]; no values where they are in keys
        const AnyRows* queries = nullptr;  ///< of all tokens of the append, after RoPE, where there are some
        Index first = 0;                   ///< of all tokens, the piece's first
        PerSide<double> largest;           ///< magnitudes
    };
    /// Adds tokens to settled ones; none may be provisional.
    void add(const Piece& piece) {
        open_cut_tile();
        settled_extremes_.include({.largest = piece.largest, .excess = {}, .carried = {}});
        Matrix learned_from;
        if (learns() && piece.queries) {
            widen_rows(*piece.queries, piece.first, piece.rows.keys.rows, learned_from);
            learned_from = before_rope(learned_from, tokens_);
        }
        for (Index done = 0, count; done < piece.rows.keys.rows; done += count) {
            // Not beyond the token at which the oldest tile is due, so that what is stored does not depend on
            // how the tokens came.
            count =
                fill(piece, done, std::min(piece.rows.keys.rows - done, due() - tokens_), settled_extremes_);
            settled_ = tokens_;
            for (Index t = done; t < done + count; ++t) note_query(learned_from, t);
            if (piece.queries) note_attention(*piece.queries, piece.first + done, count);
            make_what_is_due();
        }
    }
    /// Adds one token that may be taken back.
    void add_provisional(const Piece& piece) {
        StoredExtremes extremes{.largest = piece.largest, .excess = {}, .carried = {}};
        fill(piece, 0, 1, extremes);
        provisional_.push_back(extremes);
        if (!looks() || !piece.queries) return;
        Matrix query;
        widen_rows(*piece.queries, piece.first, 1, query);
        provisional_queries_.conservativeResize(provisional_queries_.rows() + 1, query.cols());
        provisional_queries_.bottomRows(1) = query;
    }
    /// Settles the first `count` provisional tokens: all is as if they had never been provisional.
    void settle(Index count) {
        if (count == 0) return;
        open_cut_tile();
        const Matrix learned_from = before_rope(provisional_queries_, settled_);
        const CacheConfiguration& c = cache_.configuration;
        for (Index t = 0; t < count; ++t) {
            settled_extremes_.include(provisional_[static_cast<std::size_t>(t)]);
            ++settled_;
            note_query(learned_from, t);
            if (provisional_queries_.rows() > 0)
                note_attention(rows_of_heads(row_view(provisional_queries_), c.query_heads, c.key_head_dim),
                               t, 1);
            make_what_is_due();
        }
        provisional_.erase(provisional_.begin(), provisional_.begin() + count);
        const Index left = !looks() ? 0 : std::max<Index>(0, provisional_queries_.rows() - count);
        provisional_queries_ = provisional_queries_.bottomRows(left).eval();
    }

    /// Fits the basis to the oldest `count` recent tokens, and makes the tiles that are due. cut: a schedule
    /// that asks for more latents than the keys determine is cut; otherwise it is refused.
    void fit(Index count, bool cut) {
        const CacheConfiguration& c = cache_.configuration;
        LatentRecipe recipe = *c.recipe.latents;
        recipe.basis.heads_together = recipe.own_heads_together;
        const RotaryEmbedding rope =
            c.rope ? RotaryEmbedding(c.key_head_dim, *c.rope) : RotaryEmbedding::none(c.key_head_dim);
        SecondMoments keys(c.kv_heads * c.key_head_dim);
        keys.add(rope.before({recent_keys(0, c.kv_heads, count), recent_first_}).rows, "keys");
        const CacheState::QueryMoments none(static_cast<std::size_t>(c.kv_heads),
                                            SecondMoments(c.key_head_dim));
        const LatentStatistics statistics(c.query_heads, std::move(keys), queries_ ? *queries_ : none);
        latent_ = fit_latent_keys(statistics, c.rope, recipe, recipe.basis.context, cut);
        layout_ = std::make_shared<const PageLayout>(page_layout(c, latent_.get()));
        queries_.reset();
        if (!looks()) provisional_queries_ = {};
        make_what_is_due();
    }

    /// Makes all of it part of the state. Throws std::bad_alloc and then has changed nothing.
    void commit() {
        state_.tile_pages.reserve(state_.tile_pages.size() + tile_pages_.size());
        state_.tiles.reserve(state_.tiles.size() + tiles_.size());
        // Nothing below can fail.
        if (opened_) {
            state_.tiles.pop_back();
            state_.tile_pages.pop_back();
            state_.stale = false;
        } else if (!state_.tiles.empty()) {
            state_.tiles.back().tokens = last_tokens_;
        }
        if (last_page_) {
            state_.tile_pages.back() = std::move(last_page_);
            state_.tiles.back().page = state_.tile_pages.back().data();
            state_.stale = false;
        }
        std::move(tile_pages_.begin(), tile_pages_.end(), std::back_inserter(state_.tile_pages));
        state_.tiles.insert(state_.tiles.end(), tiles_.begin(), tiles_.end());
        state_.layout = std::move(layout_);
        state_.latent = std::move(latent_);
        state_.queries = std::move(queries_);
        state_.shaping = std::move(shaping_);
        state_.tokens = tokens_;
        state_.recent_first = recent_first_;
        state_.sinks = std::move(sinks_);
        state_.recent = std::move(recent_);
        state_.settled_extremes = settled_extremes_;
        state_.provisional = std::move(provisional_);
        state_.provisional_queries = std::move(provisional_queries_);
        state_.attention = std::move(attention_);
    }

  private:
    /// A page that may be written: the given one, or a copy of it where others see it too.
    PageReference writable(const PageReference& page) {
        if (!others_see(page)) return page;
        PageReference copy = pool_.page(page.bytes());
        std::memcpy(copy.data(), page.data(), static_cast<std::size_t>(page.bytes()));
        return copy;
    }
    /// The cache and this appender hold a page themselves; who else does sees it too.
    bool others_see(const PageReference& page) const {
        Index own = 0;
        own += (state_.sinks == page) + (sinks_ == page);
        own += std::count(state_.recent.begin(), state_.recent.end(), page);
        own += std::count(recent_.begin(), recent_.end(), page);
        if (!state_.tile_pages.empty()) own += state_.tile_pages.back() == page;
        return page.references() > own;
    }
    /// What one worker packs with.
    struct Packer {
        PerSide<std::optional<TileCoder>> coders;  ///< made when a tile is
        BlockQuantizer quantizer;                  ///< of tokens outside tiles
        ShapedQuantizer chooser;                   ///< of rotation tile by tile
        Matrix weight, rotated_weight, room;       ///< E[u u^T] of queries in the frames of keys
        std::vector<float> least, most;            ///< [channel]
        Matrix gathered;
        RowMajorMatrix<Eigen::half> halves;
        PerSide<double> excess;  ///< the largest of what it packed since take_excess()
    };
    TileCoder& coder(TileSide side, Packer& packer) {
        std::optional<TileCoder>& coder = packer.coders[side];
        if (!coder) coder.emplace(side == TileSide::keys ? layout_->keys[0] : layout_->values);
        return *coder;
    }
    /// body(item, packer) for every item below `items`, each by one worker.
    template <class Body>
    void pack_items(Index items, Index tokens, const Body& body) {
        // To wake others takes longer than few tokens do.
        if (tokens < 8) {
            for (Index item = 0; item < items; ++item) body(item, packers_[0]);
            return;
        }
        run_throwing_items(executor_, items, [&](Index item, Index worker) {
            const StandardFloatingPoint standard;
            body(item, packers_[static_cast<std::size_t>(worker)]);
        });
    }
    /// body(side, head, packer) for all that is stored by head.
    template <class Body>
    void pack_heads(Index tokens, const Body& body) {
        const Index heads = cache_.configuration.kv_heads;
        pack_items(cache_.configuration.values_in_keys ? heads : 2 * heads, tokens,
                   [&](Index item, Packer& packer) {
                       body(item < heads ? TileSide::keys : TileSide::values, item % heads, packer);
                   });
    }
    /// By how much clipped values were off.
    void take_excess(StoredExtremes& extremes) {
        for (Packer& packer : packers_)
            for (const TileSide side : {TileSide::keys, TileSide::values})
                extremes.excess[side] =
                    std::max(extremes.excess[side], std::exchange(packer.excess[side], 0.0));
    }
    void add_tile(PageReference page, Index first, Index count) {
        tiles_.push_back({.page = page.data(), .layout = layout_.get(), .first = first, .tokens = count});
        tile_pages_.push_back(std::move(page));
    }

    /// The number of settled tokens at which the oldest recent ones become a tile, or are what a basis is
    /// fitted to.
    Index due() const noexcept {
        if (cache_.recipe().every_token) return std::numeric_limits<Index>::max();
        return recent_first_ + waiting() + cache_.recipe().recent_tokens;
    }
    Index waiting() const noexcept { return layout_ ? tile_tokens : cache_.recipe().latents->fit_tokens; }
    void make_what_is_due() {
        while (settled_ >= due()) layout_ ? make_tile() : fit(waiting(), true);
    }

    /// Stores up to `count` tokens of a piece where the next ones go; returns how many.
    Index fill(const Piece& piece, Index first, Index count, StoredExtremes& extremes) {
        if (cache_.recipe().every_token) return fill_tile(piece, first, count, extremes);
        return tokens_ < cache_.recipe().sink_tokens ? fill_sinks(piece, first, count)
                                                     : fill_recent(piece, first, count);
    }

    Index fill_sinks(const Piece& piece, Index first, Index count) {
        count = std::min(count, cache_.recipe().sink_tokens - tokens_);
        sinks_ = sinks_ ? writable(sinks_) : pool_.page(sink_rows_.bytes());
        pack_heads(count, [&](TileSide side, Index head, Packer& packer) {
            sink_rows_.write(side, head, piece.rows[side], first, count, tokens_, sinks_.data(),
                             packer.quantizer);
        });
        tokens_ += count;
        recent_first_ = tokens_;
        return count;
    }

    Index fill_recent(const Piece& piece, Index first, Index count) {
        const Index at = tokens_ - recent_first_;
        for (Index t = at / recent_page_tokens * recent_page_tokens; t < at + count;
             t += recent_page_tokens) {
            const auto page = static_cast<std::size_t>(t / recent_page_tokens);
            if (page == recent_.size())
                recent_.push_back(pool_.page(recent_rows_.bytes()));
            else
                recent_[page] = writable(recent_[page]);
        }
        write_recent(piece.rows, first, count, at);
        tokens_ += count;
        return count;
    }
    /// Tokens [first, first + count) of some rows as recent ones from `at` on, whose pages are there.
    void write_recent(const PerSide<RowView<const float>>& rows, Index first, Index count, Index at) {
        pack_heads(count, [&](TileSide side, Index head, Packer& packer) {
            for (Index t = at, some; t < at + count; t += some) {
                const Index row = t % recent_page_tokens;
                some = std::min(recent_page_tokens - row, at + count - t);
                recent_rows_.write(side, head, rows[side], first + t - at, some, row,
                                   recent_[static_cast<std::size_t>(t / recent_page_tokens)].data(),
                                   packer.quantizer);
            }
        });
    }

    /// Whether something is still to be learned from queries.
    bool learns() const noexcept { return cache_.recipe().shaped_keys ? !shaping_ : !layout_; }
    /// Whether queries are looked at, for that or for what they see.
    bool looks() const noexcept { return learns() || !attention_.empty(); }
    /// Queries of consecutive tokens from `position` on before RoPE; empty where nothing is to be learned.
    Matrix before_rope(const Matrix& queries, Index position) const {
        if (!learns() || queries.rows() == 0) return {};
        Matrix turned = queries;
        if (cache_.rope) cache_.rope->rotate_back(turned, position);
        return turned;
    }
    /// What the queries of the last `count` settled tokens, the tokens [first, first + count) of `queries`, see of
    /// the next tile, if they come in the last moment before it is made.
    void note_attention(const AnyRows& queries, Index first, Index count) {
        if (attention_.empty() || !layout_) return;
        const Index end = std::max(recent_first_ + tile_tokens, due() - looking_tokens),
                    behind = std::max(settled_ - count, end);
        // Every other one: all would cost twice as much and tell hardly more.
        const Index position = behind + (behind - end) % 2;
        if (position >= settled_) return;
        const CacheConfiguration& c = cache_.configuration;
        const Index dim = c.key_head_dim, sinks = std::min(c.recipe.sink_tokens, settled_),
                    recent = settled_ - recent_first_;
        const Index before = first - (settled_ - count);
        Matrix looking((settled_ - position + 1) / 2, queries.channels());
        queries.visit([&](const auto& rows) {
            for (Index row = 0; row < looking.rows(); ++row)
                widen_token(current_isa(), rows, before + position + 2 * row, looking.row(row).data());
        });
        if (cache_.rotates(TileSide::keys)) cache_.key_rotation.rotate(looking);
        for (Index head = 0; head < c.kv_heads; ++head) {
            const RowView<float> keys = meter_.keys(sinks + recent, dim);
            if (sinks > 0)
                sink_rows_.read(sinks_.data(), TileSide::keys, head, 0, sinks, keys.data, keys.stride);
            read_recent(TileSide::keys, head, recent, keys[sinks], keys.stride);
            meter_.take_keys(sinks + tile_tokens);
            for (Index row = 0; row < looking.rows(); ++row)
                meter_.measure({looking.row(row).data() + head * c.group() * dim, dim, c.group()},
                               sinks + position + 2 * row + 1 - recent_first_, sinks,
                               attention_.data() + head * tile_tokens);
        }
    }
    /// What a basis that is still to be fitted, or shaping, learns of the queries of a token, where it needs
    /// them. Token by token, because sums in another order would give other bytes.
    void note_query(const Matrix& queries, Index token) {
        const CacheConfiguration& c = cache_.configuration;
        if (!learns() || queries.rows() == 0 || settled_ <= c.recipe.sink_tokens) return;
        if (!own_queries_) {
            own_queries_ = queries_
                               ? std::make_shared<CacheState::QueryMoments>(*queries_)
                               : std::make_shared<CacheState::QueryMoments>(
                                     static_cast<std::size_t>(c.kv_heads), SecondMoments(c.key_head_dim));
            queries_ = own_queries_;
        }
        for (Index head = 0; head < c.query_heads; ++head)
            (*own_queries_)[static_cast<std::size_t>(head / c.group())].add(
                queries.block(token, head * c.key_head_dim, 1, c.key_head_dim));
        if (!c.recipe.shaped_keys ||
            queries_->front().count() < static_cast<double>(shaping_tokens * c.group()))
            return;
        shaping_ = std::make_shared<const KeyShaping>(c, *queries_);
        queries_.reset();
        own_queries_.reset();
    }

    /// A tile that was cut becomes recent tokens again, so that the sequence goes on as if it had never been
    /// made. What its tokens have lost is carried.
    void open_cut_tile() {
        if (cache_.recipe().every_token || opened_ || !state_.cut()) return;
        Reader reader(cache_, state_);
        const Reader::Run run = reader.run_of(state_.tiles.back());
        PerSide<Matrix> rows;
        for (const TileSide side : {TileSide::keys, TileSide::values}) {
            const Index heads = cache_.configuration.kv_heads, dim = cache_.dim(side);
            const bool as_input = side == TileSide::keys && (latent_ || reader.query_turn(run) != 0 ||
                                                             run.tile->layout->rotates_by_tile());
            rows[side].resize(run.count, heads * dim);
            for (Index head = 0; head < heads; ++head)
                rows[side].middleCols(head * dim, dim) =
                    as_input ? reader.input_keys(run, head, heads * dim) : reader.rows(run, side, head);
            if (as_input && cache_.rotates(side)) cache_.rotation(side).rotate(rows[side]);
            // fp16 comes out of a tile as it went in.
            const TileFormat& format =
                side == TileSide::keys ? run.tile->layout->key_format(0) : run.tile->layout->values;
            if (!as_input && recent_rows_.half(side) && format.segments()[0].is_half()) continue;
            double& carried = settled_extremes_.carried[side];
            carried = cache_.packing_growth(side) *
                          (carried + cache_.rounding_bound(side, settled_extremes_.largest[side])) +
                      reader.tile_error_bound(side, run) + settled_extremes_.excess[side];
            if (as_input) carried *= cache_.turn_growth();
        }
        // The tokens behind it are provisional ones.
        const std::vector<PageReference> behind = std::exchange(recent_, {});
        const Index count = tokens_ - recent_first_;
        const auto page_of = [&](Index row) -> std::byte* {
            const auto page = static_cast<std::size_t>(row / recent_page_tokens);
            if (page == recent_.size()) recent_.push_back(pool_.page(recent_rows_.bytes()));
            return recent_[page].data();
        };
        for (Index t = 0; t < run.count; t += recent_page_tokens) page_of(t);
        write_recent({row_view(rows.keys), row_view(rows.values)}, 0, run.count, 0);
        for (Index t = 0; t < count; ++t)
            recent_rows_.copy(behind[static_cast<std::size_t>(t / recent_page_tokens)].data(),
                              t % recent_page_tokens, page_of(run.count + t),
                              (run.count + t) % recent_page_tokens);
        recent_first_ = run.first;
        std::fill(attention_.begin(), attention_.end(), 0);
        opened_ = true;
    }

    /// [count][heads * key dim] the oldest recent keys of some heads as attention takes them.
    Matrix recent_keys(Index first_head, Index heads, Index count) const {
        const Index dim = cache_.dim(TileSide::keys);
        Matrix keys(count, heads * dim);
        for (Index head = 0; head < heads; ++head)
            read_recent(TileSide::keys, first_head + head, count, keys.data() + head * dim, keys.cols());
        if (cache_.recipe().keys.rotate) cache_.key_rotation.rotate_back(keys);
        return keys;
    }
    void read_recent(TileSide side, Index head, Index count, float* to, Index stride) const {
        for (Index t = 0; t < count; t += recent_page_tokens)
            recent_rows_.read(recent_[static_cast<std::size_t>(t / recent_page_tokens)].data(), side, head, 0,
                              std::min(recent_page_tokens, count - t), to + t * stride, stride);
    }

    /// The oldest 128 recent tokens become a tile.
    void make_tile() {
        PageReference page = pool_.page(layout_->bytes);
        if (latent_ && !latents_) latents_.emplace(latent_);
        const auto shaping = latent_ || shaping_ || !queries_
                                 ? shaping_
                                 : std::make_shared<const KeyShaping>(cache_.configuration, *queries_);
        const KeyShaping::Frame frame =
            shaping ? KeyShaping::frame(cache_.rope, recent_first_) : KeyShaping::Frame{};
        const auto keys = static_cast<Index>(layout_->key_at.size()),
                   values = layout_->values_in_keys ? 0 : cache_.configuration.kv_heads;
        pack_items(keys + values, tile_tokens, [&](Index item, Packer& packer) {
            if (item >= keys)
                pack_values(item - keys, page.data(), packer);
            else if (latent_)
                pack_latents(item, page.data(), packer);
            else
                pack_keys(item, shaping.get(), frame, page.data(), packer);
        });
        take_excess(settled_extremes_);
        std::fill(attention_.begin(), attention_.end(), 0);
        add_tile(std::move(page), recent_first_, tile_tokens);
        recent_.erase(recent_.begin(), recent_.begin() + tile_tokens / recent_page_tokens);
        recent_first_ += tile_tokens;
    }
    void pack_latents(Index subspace, std::byte* page, Packer& packer) {
        const Index heads = cache_.configuration.kv_heads / latent_->subspaces();
        const double off =
            latents_->encode(subspace, {recent_keys(subspace * heads, heads, tile_tokens), recent_first_},
                             page + layout_->key_at[static_cast<std::size_t>(subspace)]);
        packer.excess.keys = std::max(packer.excess.keys, off);
    }
    void pack_keys(Index head, const KeyShaping* shaping, const KeyShaping::Frame& frame, std::byte* page,
                   Packer& packer) {
        const auto weigh = [&](bool rotated, Matrix& weight) {
            shaping->weigh(frame, rotated ? &cache_.key_rotation : nullptr, head, weight, packer.room);
        };
        const bool choose = layout_->rotates_by_tile() && shaping;
        if (shaping) weigh(cache_.rotates(TileSide::keys), packer.weight);
        if (choose) weigh(true, packer.rotated_weight);
        const bool rotate = choose && rotation_helps(head, packer);
        if (rotate) page[layout_->rotated_at + head] = std::byte{1};
        if (shaping) coder(TileSide::keys, packer).shape(rotate ? packer.rotated_weight : packer.weight);
        encode_recent(TileSide::keys, head, page + layout_->key_at[static_cast<std::size_t>(head)], packer,
                      rotate);
    }
    void pack_values(Index head, std::byte* page, Packer& packer) {
        if (!attention_.empty()) coder(TileSide::values, packer).weigh(attention_by_token(attention_, head));
        encode_recent(TileSide::values, head, page + layout_->value_at[static_cast<std::size_t>(head)],
                      packer, false);
    }
    /// Whether rotation makes the expected error of scores with a head's keys of the next tile smaller. Their
    /// steps are as wide as channels are, apart from a factor.
    bool rotation_helps(Index head, Packer& packer) const {
        Matrix& keys = packer.gathered;
        const Index dim = cache_.dim(TileSide::keys);
        keys.resize(tile_tokens, dim);
        read_recent(TileSide::keys, head, tile_tokens, keys.data(), dim);
        const auto expected = [&](const Matrix& weight) {
            packer.chooser.set_weight(weight);
            return packer.chooser.expected_error(channel_widths(keys, packer)).shaped;
        };
        const double plain = expected(packer.weight);
        cache_.key_rotation.rotate(keys);
        return expected(packer.rotated_weight) < plain;
    }
    /// [channel] how far values of some rows are apart.
    static Eigen::VectorXf channel_widths(const Matrix& rows, Packer& packer) {
        const Index channels = rows.cols();
        if (channels % kernel_channels != 0) return rows.colwise().maxCoeff() - rows.colwise().minCoeff();
        packer.least.resize(static_cast<std::size_t>(channels));
        packer.most.resize(static_cast<std::size_t>(channels));
        column_extremes(current_isa(), {rows.data(), ScalarType::float32, channels}, rows.rows(), channels,
                        packer.least.data(), packer.most.data());
        return Eigen::Map<const Eigen::VectorXf>(packer.most.data(), channels) -
               Eigen::Map<const Eigen::VectorXf>(packer.least.data(), channels);
    }
    /// The oldest 128 recent tokens of one side and head, into their tile.
    void encode_recent(TileSide side, Index head, std::byte* tile, Packer& packer, bool rotate) {
        const Index dim = cache_.dim(side);
        TileCoder& coder = this->coder(side, packer);
        const auto encode = [&](const auto& rows) { coder.encode(head_rows(rows), name_of(side), {}, tile); };
        if (recent_rows_.half(side) && !rotate) {
            packer.halves.resize(tile_tokens, dim);
            for (Index p = 0; p < tile_tokens / recent_page_tokens; ++p)
                std::copy_n(recent_rows_.half_rows(recent_[static_cast<std::size_t>(p)].data(), side, head),
                            recent_page_tokens * dim, packer.halves.data() + p * recent_page_tokens * dim);
            encode(packer.halves);
        } else {
            packer.gathered.resize(tile_tokens, dim);
            read_recent(side, head, tile_tokens, packer.gathered.data(), dim);
            if (rotate) cache_.rotation(side).rotate(packer.gathered);
            encode(packer.gathered);
        }
        packer.excess[side] = std::max(packer.excess[side], coder.excess().largest);
    }

    /// Whether a tile of every_token recipes can take more tokens: its own stand as new ones will.
    bool goes_on(const TilePlace& tile) const noexcept {
        return tile.row == 0 && tile.shift == 0 && tile.layout == layout_.get();
    }
    /// Every token into the tile that is being filled.
    Index fill_tile(const Piece& piece, Index first, Index count, StoredExtremes& extremes) {
        const bool old = tiles_.empty() && !state_.tiles.empty() && goes_on(state_.tiles.back());
        Index* tokens = old ? &last_tokens_ : tiles_.empty() ? nullptr : &tiles_.back().tokens;
        if (!tokens || *tokens == tile_tokens) {
            add_tile(pool_.page(layout_->bytes), tokens_, 0);
            tokens = &tiles_.back().tokens;
        } else if (old && !last_page_) {
            last_page_ = writable(state_.tile_pages.back());
            if (state_.stale) clear_tiles(state_.tiles.back(), last_page_.data());
            // Until commit(): an append that fails leaves its tokens behind.
            state_.stale = state_.stale || last_page_ == state_.tile_pages.back();
        }
        std::byte* const page = (tiles_.empty() ? last_page_ : tile_pages_.back()).data();
        count = std::min(count, tile_tokens - *tokens);
        pack_heads(count, [&](TileSide side, Index head, Packer& packer) {
            const auto& at = side == TileSide::keys ? layout_->key_at : layout_->value_at;
            TileCoder& coder = this->coder(side, packer);
            coder.encode(rows_of_heads(piece.rows[side], cache_.configuration.kv_heads, cache_.dim(side)),
                         name_of(side), {.head = head, .first = first, .count = count, .tile_token = *tokens},
                         page + at[static_cast<std::size_t>(head)]);
            packer.excess[side] = std::max(packer.excess[side], coder.excess().largest);
        });
        take_excess(extremes);
        *tokens += count;
        tokens_ += count;
        recent_first_ = tokens_;
        return count;
    }

    const CacheShape& cache_;
    CacheState& state_;
    TilePool& pool_;
    Executor& executor_;
    // The state as it will be, but for tiles.
    std::shared_ptr<const PageLayout> layout_;
    std::shared_ptr<const LatentKeys> latent_;
    std::shared_ptr<const CacheState::QueryMoments> queries_;
    std::shared_ptr<const KeyShaping> shaping_;
    Index tokens_, settled_, recent_first_;
    PageReference sinks_;
    std::vector<PageReference> recent_;
    StoredExtremes settled_extremes_;
    std::vector<StoredExtremes> provisional_;
    Matrix provisional_queries_;
    TokenAttention attention_;
    // New tiles, and how the last old one goes on.
    std::vector<PageReference> tile_pages_;
    std::vector<TilePlace> tiles_;
    PageReference last_page_;  ///< a page that may be written, once the last old tile is being filled
    Index last_tokens_ = 0;    ///< tokens of the last old tile afterwards
    bool opened_ = false;      ///< whether the last old tile is recent tokens now

    std::shared_ptr<CacheState::QueryMoments> own_queries_;  ///< this appender's own copy
    std::optional<LatentCoder> latents_;
    TokenRows sink_rows_, recent_rows_;
    AttentionMeter meter_;
    std::vector<Packer> packers_;  ///< [worker]
};

KVPLANE_FUNCTION void append_tokens(const CacheShape& cache, CacheState& state, TilePool& pool,
                                    const AnyRows& keys, const AnyRows* values, const AnyRows* queries,
                                    bool provisional, Executor& executor) {
    const CacheConfiguration& c = cache.configuration;
    if (queries) {
        require_input(*queries, "queries", c.query_heads, c.key_head_dim);
        require_fp16(*queries, "queries");
        require(queries->tokens == keys.tokens, ErrorCode::shape, "append: ", keys.tokens, " keys and ",
                queries->tokens, " queries, expected as many of each");
    }
    require_input(keys, "keys", c.kv_heads, c.key_head_dim);
    if (values) {
        require_input(*values, "values", c.kv_heads, c.value_head_dim);
        require(keys.tokens == values->tokens, ErrorCode::shape, "append: ", keys.tokens, " keys and ",
                values->tokens, " values, expected as many of each");
    }
    if (keys.tokens == 0) return;
    const StandardFloatingPoint standard;
    Appender appender(cache, state, pool, executor);
    if (!provisional) appender.settle(state.tokens - state.settled());
    IncomingRows of_keys(cache, keys, TileSide::keys);
    std::optional<IncomingRows> of_values;
    if (values) of_values.emplace(cache, *values, TileSide::values);
    // In pieces that stay in a core's cache from one step to the next; of provisional tokens each has its own
    // extremes.
    const Index most = provisional ? 1 : piece_tokens;
    bool checked = false;
    Appender::Piece piece;
    for (Index first = 0; first < keys.tokens; first += most) {
        const Index count = std::min(most, keys.tokens - first);
        bool good = of_keys.take(first, count, executor);
        piece.rows.keys = of_keys.rows();
        piece.largest.keys = piece.largest.values = of_keys.largest();
        if (values) {
            good = of_values->take(first, count, executor) && good;
            piece.rows.values = of_values->rows();
            piece.largest.values = of_values->largest();
        }
        if (!good && !checked) {
            require_magnitudes(cache, keys, TileSide::keys);
            if (values) require_magnitudes(cache, *values, TileSide::values);
            checked = true;
        }
        piece.queries = queries;
        piece.first = first;
        provisional ? appender.add_provisional(piece) : appender.add(piece);
    }
    appender.commit();
}

KVPLANE_FUNCTION void settle_tokens(const CacheShape& cache, CacheState& state, TilePool& pool, Index count) {
    const StandardFloatingPoint standard;
    SerialExecutor executor;
    Appender appender(cache, state, pool, executor);
    appender.settle(count);
    appender.commit();
}

KVPLANE_FUNCTION void fit_own_basis(const CacheShape& cache, CacheState& state, TilePool& pool, Index count) {
    const StandardFloatingPoint standard;
    SerialExecutor executor;
    Appender appender(cache, state, pool, executor);
    appender.fit(count, false);
    appender.commit();
}

}  // namespace kvplane::detail
