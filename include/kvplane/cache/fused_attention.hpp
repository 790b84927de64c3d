// kvplane/cache/fused_attention.hpp: KvCache read as packed bits, in full or in part (attention/decode.hpp).
// Part of kv_cache.hpp, which includes it.
#pragma once

#include "kvplane/cache/kv_cache.hpp"

namespace kvplane {

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
        together_ = layout && layout->latent && layout->latent->subspaces() == 1 && heads_ > 1;
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
        work_.first_rows_.resize(static_cast<std::size_t>(rows_));
        work_.finite_rows_.resize(static_cast<std::size_t>(rows_));
        for (Index r = 0; r < rows_; ++r)
            work_.first_rows_[static_cast<std::size_t>(r)] = r / block_ * block_;
        for (FusedScratch& scratch : work_.scratch_) scratch.read() = {};
        if (by_weight() && chunks_ > 0) reserve_by_weight();
    }

    template <CacheScalar Scalar>
    void take(const HeadRows<Scalar>& queries, const AttentionParameters& parameters) noexcept {
        for (Index head = 0; head < queries.heads(); ++head) {
            work_.rules_.emplace_back(parameters, head, query_tokens_, key_dim_);
            const float scale = work_.rules_.back().plain() ? work_.rules_.back().scale() : 1.0f;
            for (Index i = 0; i < query_tokens_; ++i) {
                const Index r = head * query_tokens_ + i;
                float* const row = work_.plain_.data() + r * key_dim_;
                bool finite = true;
                for (Index c = 0; c < key_dim_; ++c) {
                    row[c] = scale * static_cast<float>(*queries.at(head, i, c));
                    finite = finite && std::isfinite(row[c]);
                }
                // A row that is not finite gets NaN in the end, and must not reach the plans that it shares
                // with others.
                work_.finite_rows_[static_cast<std::size_t>(r)] = finite;
                if (!finite) std::fill_n(row, key_dim_, 0.0f);
            }
        }
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
        looks_twice_ = in_two && policy_.kind == ReadPolicy::Kind::aligned &&
                       (policy_.shared || policy_.key_bits < most_key_bits());
        if (looks_twice_) plan_first_look();
        each<&Fused::process>(tile_items + heads_);
        if (looks_twice_) {
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
            for (Index r = 0; r < rows_; ++r) merge_partial(part(0, r), part(chunk, r));
    }

    /// The output of query head `head`, token i; in the frame of the input.
    const float* output(Index head, Index i) noexcept {
        const Index row = head * query_tokens_ + i;
        float* const values = part(0, row).output;
        if (!work_.finite_rows_[static_cast<std::size_t>(row)]) {
            std::fill_n(values, value_dim_, std::numeric_limits<float>::quiet_NaN());
            return values;
        }
        const float sum = *part(0, row).sum;
        for (Index c = 0; c < value_dim_; ++c) values[c] = sum == 0.0f ? 0.0f : values[c] / sum;
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

    /// Where a row's place for item i of `count` is: head by head, so that workers, which have different
    /// heads or chunks, do not write into one cache line.
    Index place(Index row, Index i, Index count) const noexcept {
        return row + i * block_ + work_.first_rows_[static_cast<std::size_t>(row)] * (count - 1);
    }
    PartialAttention part(Index chunk, Index row) noexcept {
        const Index at = place(row, chunk, chunks_ + 1);
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
                    tile_rows(t, next_of(t, work.end, item, part_of(h)), h, row, rows, work.chunk, t - first,
                              offsets.data() + (t - first) * rows, scratch);
            });
        }
    }

    /// The tile that this worker probably reads after tile t; else t again.
    Index next_of(Index t, Index end, Index item, Index part) noexcept {
        for (Index next = t + 1; next < end; ++next)
            if (!hidden(tile(next)) && (!look_again_ || looks_again(next, part))) return next;
        item += work_.executor().workers();
        return item < chunks_ * across() ? item / across() * chunk_tiles : t;
    }

    /// Scores of one tile and, unless reads are aligned, what its values add. `place` among the tiles that
    /// were projected together.
    void tile_rows(Index t, Index next, Index head, Index row, Index rows, Index chunk, Index place,
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
        const KeyRead read = key_read(format, t, next, key_part, queries, stride, row, rows, chunk, scratch);
        scratch.read().key_bits += read.bits - (look_again_ ? first_bits(key_part) : 0);
        scratch.read().keys += look_again_ ? 0 : elements(format);
        const std::byte* const next_values = values(this->tile(next), head);
        fused_scores(isa_, format, keys(tile, key_part), keys(this->tile(next), key_part), queries, stride,
                     rows, offsets, scratch, scores, read.planes, read.two_parts, read.ahead);
        apply(row, rows, tile.first, tile.tokens, tile_tokens, scores);
        if (by_weight()) {
            // Each tile keeps its own largest score: what other tiles seem to hold may turn out otherwise.
            std::array<float, fused_rows> sums{};
            std::fill_n(tops_of(t, row), rows, none);
            fused_softmax(isa_, scores, tile_tokens, rows, {tops_of(t, row), sums.data(), nullptr, 0});
            for (Index r = 0; r < rows; ++r)
                add_weights(part(chunk, row + r), *tops_of(t, row + r), sums[static_cast<std::size_t>(r)]);
            detail::prefetch_grids(layout.values, next_values);
            return note_weights(t, head, row, rows, chunk, scratch);
        }
        const PartialAttention to = part(chunk, row);
        fused_softmax(isa_, scores, tile_tokens, rows, to);
        const std::uint8_t* const planes = policy_.kind == ReadPolicy::Kind::fixed
                                               ? fixed_planes(layout.values, policy_.value_bits, scratch)
                                               : nullptr;
        fused_output(isa_, layout.values, values(tile, head), next_values, scores, rows, scratch, to.output,
                     stride_, planes, two_parts(policy_.value_bits));
        count_values(planes, scratch);
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
        work_.tile_class_.resize(tiles * layout.key_at.size());
        work_.class_tiles_.resize(layout.key_at.size() * tile_classes);
        work_.key_order_.resize(3 * of_keys);
        work_.key_gains_.resize(of_keys);
        work_.first_bits_.resize(layout.key_at.size());
        work_.class_bits_.resize(layout.key_at.size() * tile_classes);
        work_.tile_importance_.resize(tiles * all_blocks);
        work_.whole_keys_.assign(chunks * all_blocks, 0);
        work_.score_errors_.assign(chunks * all_blocks, 0.0);
        work_.value_errors_.assign(chunks * all_blocks, 0.0);
        work_.value_norms_.assign((chunks + 1) * static_cast<std::size_t>(heads_), 0.0f);
    }
    float* weights_of(Index t, Index row) noexcept {
        return work_.weights_.data() + (t * rows_ + row) * tile_tokens;
    }
    float* tops_of(Index t, Index row) noexcept { return work_.tops_.data() + place(row, t, tile_count()); }
    float* units_of(Index t, Index row) noexcept {
        return work_.units_.data() + place(row, t, tile_count()) * value_units();
    }
    Index block_of(Index row) const noexcept {
        return row / block_ * row_blocks() + row % block_ / fused_rows;
    }
    float* importance_of(Index t, Index block) noexcept {
        return work_.importance_.data() + (block * tile_count() + t) * value_units();
    }
    float& value_norm(Index chunk, Index head) noexcept {
        return work_.value_norms_[static_cast<std::size_t>(head * (chunks_ + 1) + chunk)];
    }
    float largest_value() const noexcept { return static_cast<float>(cache_.state_.largest[1]); }

    /// How much of a tile of keys is read, and of the tile after it; planes of nullptr: all.
    struct KeyRead {
        const std::uint8_t *planes, *ahead;
        Index bits;
        bool two_parts;
    };
    KeyRead key_read(const TileFormat& format, Index t, Index next, Index part, const float* queries,
                     Index stride, Index row, Index rows, Index chunk, FusedScratch& scratch) noexcept {
        if (look_again_) {
            const Index of_class = class_of(t, part), bits = class_bits(part, of_class);
            return {class_planes(part, of_class), class_planes(part, class_of(next, part)), bits,
                    bits == bits_read(format, nullptr) ||
                        two_parts(static_cast<double>(bits) / static_cast<double>(elements(format)))};
        }
        const std::uint8_t* planes = nullptr;
        switch (policy_.kind) {
            case ReadPolicy::Kind::aligned:
                if (!looks_twice_) break;
                return {first_look(part), first_look(part), first_bits(part), false};
            case ReadPolicy::Kind::fixed:
                planes = fixed_planes(format, policy_.key_bits, scratch);
                break;
            case ReadPolicy::Kind::exponents:
                align_keys(isa_, format, keys(tile(t), part), queries, stride, rows, policy_.thresholds,
                           scratch, scratch.planes().data());
                planes = scratch.planes().data();
                break;
            case ReadPolicy::Kind::tolerance:
                planes =
                    bounded_planes(format, keys(tile(t), part), queries, stride, row, rows, chunk, scratch);
                break;
            case ReadPolicy::Kind::all:
                break;
        }
        return {planes, planes, bits_read(format, planes), two_parts(policy_.key_bits)};
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
    // Keys are read by budget in two looks, but for a budget of their own that all of them fit into. The
    // first takes an eighth of the bits, first planes of the channels that count most, and tells roughly what
    // every token weighs. The second reads what T12 makes of the rest: an error of a score does to the output
    // what the softmax weights of its tile allow, so that channels of tiles without weight get no more bits,
    // and those of others many.

    /// Classes of tiles by the power of two of what an error of their scores does to the output.
    static constexpr Index tile_classes = 32;
    /// Chunks whose first tile tells what channels count, at most.
    static constexpr Index most_weighed = 4;

    Index part_of(Index head) const noexcept {
        const TileLayout& layout = *cache_.state_.layout;
        return layout.latent ? layout.latent->subspace_of_head(head) : head;
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
    Index first_bits(Index part) const noexcept { return work_.first_bits_[static_cast<std::size_t>(part)]; }
    Index class_bits(Index part, Index of_class) const noexcept {
        return work_.class_bits_[static_cast<std::size_t>(part * tile_classes + of_class)];
    }
    bool looks_again(Index t, Index part) const noexcept {
        return class_bits(part, class_of(t, part)) != first_bits(part);
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
        for (Index r = 0; r < rows; ++r)
            add_weights(part(chunk, row + r), *tops_of(t, row + r), sum_of_weights(t, row + r));
    }
    /// Adds weights that are relative to `top` to the sum of a row.
    static void add_weights(const PartialAttention& to, float top, float sum) noexcept {
        if (top == none) return;
        const float larger = std::max(*to.largest, top);
        const float there = *to.largest == none ? 0.0f : *to.sum * std::exp(*to.largest - larger);
        *to.sum = there + sum * std::exp(top - larger);
        *to.largest = larger;
    }
    float sum_of_weights(Index t, Index row) noexcept {
        return Eigen::Map<const Eigen::ArrayXf>(weights_of(t, row), tile_tokens).sum();
    }
    int most_key_bits() const noexcept {
        int most = 0;
        for (Index p = 0; p < parts(); ++p)
            for (const TileFormat::Placed& s : cache_.state_.layout->key_format(p).segments())
                most = std::max(most, s.bits);
        return most;
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
    /// What the channels (or latents) of one head, or of all that share them, count: from the first tiles of
    /// some chunks, for steps and queries change little from tile to tile.
    void weigh_keys(Index item, Index worker) noexcept {
        FusedScratch& scratch = work_.scratch_[static_cast<std::size_t>(worker)];
        const TileLayout& layout = *cache_.state_.layout;
        const bool latent = layout.latent != nullptr;
        const Index step = (chunks_ + most_weighed - 1) / most_weighed;
        Index looked = 0;
        for (Index chunk = 0; chunk < chunks_; chunk += step) {
            const Work work = work_of(chunk * across() + item);
            Index t = work.begin;
            while (t < work.end && hidden(tile(t))) ++t;
            if (t == work.end) continue;
            ++looked;
            if (latent) turn_to(t, 1, false, scratch);
            for_blocks(work, [&](Index head, Index row, Index rows) {
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
        // In the mean over rows and tiles.
        const float all = static_cast<float>(std::max<Index>(1, looked * rows_ / parts()));
        for (Index u = item * key_units(); u < (item + 1) * key_units(); ++u) {
            ReadUnit& unit = work_.key_units_[static_cast<std::size_t>(u)];
            unit.importance /= all;
            for (int p = 0; p < unit.split.count; ++p)
                work_.key_gains_[static_cast<std::size_t>(u)][static_cast<std::size_t>(p)] =
                    plane_gain(unit.importance / static_cast<float>(unit.size), plane_worth(unit.split, p));
        }
    }
    void plan_first_look() noexcept {
        std::fill(work_.key_units_.begin(), work_.key_units_.end(), ReadUnit{0.0f, {}, 0});
        each<&Fused::weigh_keys>(across());
        Index stored = 0;
        for (const ReadUnit& unit : work_.key_units_) stored += unit.size * unit.split.bits();
        choose_planes(work_.key_units_, std::min(stored / 8, key_budget(policy_.key_bits) / 2),
                      work_.key_order_, work_.first_look_, 1);
        for (Index p = 0; p < parts(); ++p)
            work_.first_bits_[static_cast<std::size_t>(p)] =
                bits_read(cache_.state_.layout->key_format(p), first_look(p));
        // Where no plane is small enough, nothing is known that a budget could be shared by.
        policy_.shared = policy_.shared && std::any_of(work_.first_look_.begin(), work_.first_look_.end(),
                                                       [](int planes) { return planes > 0; });
    }
    /// Sorts tiles into classes. A score that is off by one moves the output by the token's weight times its
    /// value's distance from the output; the square of that is taken as a fiftieth of the square of what the
    /// token's grids span, and so follows from tile_importance_. Returns the exponent field of that in the
    /// first class: what an error of a tile's scores counts to a bit of one channel, where values' gains are
    /// for a bit of all channels of a unit of tokens.
    int classify_tiles() noexcept {
        const PlaneSplit& split = cache_.state_.layout->values.segments()[0].split;
        // sqrt(2): of the nearest power of two.
        const float span = 1.41421356f * power_of_two(split.bits() == 16 ? 20 : 2 * split.bits()) / 50.0f *
                           static_cast<float>(read_unit_depth(split)) * key_dims();
        const Index blocks_of_part = blocks() / parts();
        const auto for_tiles = [&](const auto& body) {
            for (Index t = 0; t < tile_count(); ++t)
                for (Index p = 0; p < parts() && !hidden(tile(t)); ++p)
                    body(p, t, work_.tile_class_[static_cast<std::size_t>(t * parts() + p)]);
        };
        int top = 0;
        for_tiles([&](Index p, Index t, std::uint8_t& field) {
            float sum = 0.0f;
            for (Index block = p * blocks_of_part; block < (p + 1) * blocks_of_part; ++block)
                sum += work_.tile_importance_[static_cast<std::size_t>(block * tile_count() + t)];
            field = static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(span * sum) >> 23);
            top = std::max<int>(top, field);
        });
        std::fill(work_.class_tiles_.begin(), work_.class_tiles_.end(), Index{0});
        for_tiles([&](Index p, Index, std::uint8_t& of_tile) {
            of_tile = static_cast<std::uint8_t>(std::min<Index>(top - of_tile, tile_classes - 1));
            ++work_.class_tiles_[static_cast<std::size_t>(p * tile_classes + of_tile)];
        });
        return top;
    }
    /// Channels of values for each token of a tile of keys: what makes their bits comparable.
    float key_dims() const noexcept {
        return static_cast<float>(value_dim_) / static_cast<float>(tile_tokens);
    }
    /// The planes of keys that the second look reads, by class of tiles.
    void plan_keys() noexcept {
        const int top = classify_tiles();
        if (policy_.shared)
            gain_values();
        else
            work_.gains_.clear();
        // body(tiles, what is read of a unit in the end, and so far, the unit, gain of a plane).
        const auto for_units = [&](const auto& body) {
            for (Index p = 0; p < parts(); ++p)
                for (Index c = 0; c < tile_classes; ++c) {
                    const Index have = work_.class_tiles_[static_cast<std::size_t>(p * tile_classes + c)];
                    const float tile = std::ldexp(1.0f, top - 127 - static_cast<int>(c));
                    for (Index u = 0; u < key_units() && have > 0; ++u) {
                        const auto at = static_cast<std::size_t>(p * key_units() + u);
                        const std::array<float, 3>& gains = work_.key_gains_[at];
                        body(have, class_planes(p, c)[u], first_look(p)[u], work_.key_units_[at],
                             [&gains, tile](int plane) {
                                 return plane_gain(gains[static_cast<std::size_t>(plane)], tile);
                             });
                    }
                }
        };
        const double copies =
            static_cast<double>(blocks()) / static_cast<double>(parts()) / static_cast<double>(key_dims());
        double looked = 0.0;
        for_units([&](Index have, std::uint8_t& planes, int first, const ReadUnit& unit, const auto& gain) {
            planes = static_cast<std::uint8_t>(first);
            looked += static_cast<double>(have * unit.size * unit.split.prefix_bits(first));
            for (int plane = first; plane < unit.split.count; ++plane)
                work_.gains_.add(gain(plane),
                                 copies * static_cast<double>(have * unit.size * unit.split[plane]));
        });
        const double budget =
            copies * (static_cast<double>(visible_tiles() * key_budget(policy_.key_bits)) - looked) +
            (policy_.shared ? value_budget() : 0.0);
        const float least = work_.gains_.least(std::max(budget, 0.0) + 1e-6);
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
        for (Index p = 0; p < parts(); ++p)
            for (Index c = 0; c < tile_classes; ++c)
                work_.class_bits_[static_cast<std::size_t>(p * tile_classes + c)] =
                    work_.class_tiles_[static_cast<std::size_t>(p * tile_classes + c)] > 0
                        ? bits_read(cache_.state_.layout->key_format(p), class_planes(p, c))
                        : 0;
    }
    Index visible_tiles() const noexcept {
        Index count = 0;
        for (Index t = 0; t < tile_count(); ++t) count += hidden(tile(t)) ? 0 : 1;
        return count;
    }
    /// Bits of values, by channel, that the mean allows.
    double value_budget() const noexcept {
        return policy_.value_bits * static_cast<double>(visible_tiles() * tile_tokens * blocks());
    }
    /// The fewest planes with which no score is off by more than what half the tolerance allows, shared out
    /// among channels evenly; nullptr: all. Where the first tile of a chunk needs all, the others get them
    /// too without being asked: as good for the certificate, and asking takes as long as reading.
    const std::uint8_t* bounded_planes(const TileFormat& format, const std::byte* tile, const float* queries,
                                       Index stride, Index row, Index rows, Index chunk,
                                       FusedScratch& scratch) noexcept {
        const auto at = static_cast<std::size_t>(block_of(row) * chunks_ + chunk);
        if (work_.whole_keys_[at]) return nullptr;
        const std::span<ReadUnit> units =
            scratch.read_units().first(static_cast<std::size_t>(read_units(format)));
        key_importance(isa_, format, tile, queries, stride, rows, true, scratch, units.data());
        // Queries are scaled already where scores are no more than products; a softcap takes off, never adds.
        const auto& rule = work_.rules_[static_cast<std::size_t>(row / query_tokens_)];
        const double scale = rule.plain() ? 1.0 : static_cast<double>(rule.scale());
        double channels = 0.0, error = 0.0;
        bool whole = true;
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
            whole = whole && have == units[u].split.count;
            error += off(have);
        }
        work_.whole_keys_[at] = whole;
        if (whole) return nullptr;
        work_.score_errors_[at] = std::max(work_.score_errors_[at], error);
        return scratch.planes().data();
    }
    /// What weights come to by read unit of values, once a tile's scores are weights.
    void note_weights(Index t, Index head, Index row, Index rows, Index chunk,
                      FusedScratch& scratch) noexcept {
        const TileFormat& format = cache_.state_.layout->values;
        const Index depth = read_unit_depth(format.segments()[0].split);
        float* const steps = scratch.scores();
        UnitWeight kind = UnitWeight::largest;
        if (policy_.kind != ReadPolicy::Kind::exponents) {
            kind = bounded() ? UnitWeight::reach : UnitWeight::squares;
            const float norm =
                value_steps(isa_, format, values(tile(t), head), largest_value(), bounded(), steps);
            if (bounded()) value_norm(chunk, head) = std::max(value_norm(chunk, head), norm);
        }
        unit_weights(isa_, weights_of(t, row), rows, steps, kind, depth, units_of(t, row));
    }
    void count_values(const std::uint8_t* planes, FusedScratch& scratch) const noexcept {
        const TileFormat& format = cache_.state_.layout->values;
        scratch.read().value_bits += bits_read(format, planes);
        scratch.read().values += elements(format);
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
    FusedScratch::Read all_read() noexcept {
        FusedScratch::Read all;
        for (FusedScratch& scratch : work_.scratch_) {
            all.key_bits += scratch.read().key_bits;
            all.keys += scratch.read().keys;
            all.value_bits += scratch.read().value_bits;
            all.values += scratch.read().values;
        }
        return all;
    }
    void report() noexcept {
        const FusedScratch::Read read = all_read();
        const auto mean = [](Index bits, Index elements) {
            return elements > 0 ? static_cast<double>(bits) / static_cast<double>(elements) : 0.0;
        };
        work_.report_ = {
            mean(read.key_bits, read.keys), mean(read.value_bits, read.values),
            read.values > 0 ? mean(read.key_bits + read.value_bits, read.keys + read.values) : 0.0};
        if (!bounded() || chunks_ == 0) return;
        for (Index block = 0; block < blocks(); ++block) {
            const double norm = largest_norm(block / row_blocks());
            double error = 2.0 * std::tanh(0.5 * score_error(block)) * norm;
            for (Index chunk = 0; chunk < chunks_; ++chunk)
                error += work_.value_errors_[static_cast<std::size_t>(block * chunks_ + chunk)];
            if (error == 0.0) continue;
            work_.report_.error_bound = std::max(work_.report_.error_bound, error);
            work_.report_.relative_error_bound = std::max(work_.report_.relative_error_bound, error / norm);
        }
    }
    double score_error(Index block) const noexcept {
        double most = 0.0;
        for (Index chunk = 0; chunk < chunks_; ++chunk)
            most = std::max(most, work_.score_errors_[static_cast<std::size_t>(block * chunks_ + chunk)]);
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
            const bool counts = sum > 0.0f && work_.finite_rows_[static_cast<std::size_t>(r)];
            work_.norms_[static_cast<std::size_t>(r)] = counts ? 1.0f / sum : 0.0f;
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
            const FusedScratch::Read read = all_read();
            budget +=
                (policy_.key_bits * static_cast<double>(read.keys) - static_cast<double>(read.key_bits)) /
                static_cast<double>(value_dim_);
        }
        gain_values();
        const float least = work_.gains_.least(std::max(budget, 0.0) + 1e-6);
        std::fill(work_.least_.begin(), work_.least_.end(), least);
    }
    /// How much all values count; by budget, in the first worker's histogram, how many units count how much.
    void weigh() noexcept {
        for (FusedScratch& scratch : work_.scratch_) scratch.gains().clear();
        each<&Fused::weigh_values>(blocks());
        if (bounded()) return;
        for (std::size_t w = 1; w < work_.scratch_.size(); ++w)
            work_.scratch_[0].gains().add(work_.scratch_[w].gains());
    }
    /// What the planes of all values gain.
    void gain_values() noexcept {
        const PlaneSplit& split = cache_.state_.layout->values.segments()[0].split;
        const std::array<float, 3> worth = value_worths();
        work_.gains_.clear();
        work_.scratch_[0].gains().for_each([&](float importance, double units) {
            for (int p = 0; p < split.count; ++p)
                work_.gains_.add(plane_gain(importance, worth[static_cast<std::size_t>(p)]),
                                 units * static_cast<double>(split[p] * read_unit_depth(split)));
        });
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
                    rows = std::min(fused_rows, (head + 1) * block_ - row), units = value_units();
        const auto of_rows = [&](const std::vector<float>& all) {
            return Eigen::Map<const Eigen::ArrayXf>(all.data() + row, rows);
        };
        const auto norms = of_rows(work_.norms_), tops = of_rows(work_.all_tops_);
        Eigen::Array<float, Eigen::Dynamic, 1, 0, fused_rows, 1> by(rows);
        GainHistogram& gains = scratch.gains();
        for (Index t = 0; t < tile_count(); ++t) {
            if (hidden(tile(t))) continue;
            const Eigen::Map<const Eigen::ArrayXf> seen(tops_of(t, row), rows);
            by = (seen > none).select(norms * (seen - tops).exp(), 0.0f);
            float* const importance = importance_of(t, block);
            std::fill_n(importance, units, 0.0f);
            if (bounded()) {
                for (Index r = 0; r < rows; ++r)
                    for (Index u = 0; u < units; ++u)
                        importance[u] = std::max(importance[u], by[r] * units_of(t, row + r)[u]);
                continue;
            }
            for (Index r = 0; r < rows; ++r) {
                const float square = by[r] * by[r];
                const float* const of_row = units_of(t, row + r);
                for (Index u = 0; u < units; ++u) importance[u] += square * of_row[u];
            }
            float sum = 0.0f;
            for (Index u = 0; u < units; ++u) {
                sum += importance[u];
                // As its bucket is counted, so that the budget holds.
                importance[u] = GainHistogram::rounded_down(importance[u]);
                gains.add(importance[u], 1.0);
            }
            work_.tile_importance_[static_cast<std::size_t>(block * tile_count() + t)] = sum;
        }
        if (bounded()) bound_values(block, head, gains);
    }
    /// The least gain of a plane that is read, where what is not read may be off by what is left of the
    /// tolerance.
    void bound_values(Index block, Index head, GainHistogram& gains) noexcept {
        const PlaneSplit& split = cache_.state_.layout->values.segments()[0].split;
        const std::array<float, 3> worth = value_worths();
        gains.clear();
        for (Index t = 0; t < tile_count(); ++t) {
            if (hidden(tile(t))) continue;
            const float* const importance = importance_of(t, block);
            for (Index u = 0; u < value_units(); ++u)
                for (int p = 0; p < split.count; ++p) {
                    const float gain = plane_gain(importance[u], worth[static_cast<std::size_t>(p)]);
                    // What is off without the plane.
                    gains.add(gain, static_cast<double>(split[p]) * static_cast<double>(gain));
                }
        }
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
        double& error = work_.value_errors_[static_cast<std::size_t>(block * chunks_ + chunk)];
        // Gains fall from plane to plane.
        std::fill_n(planes, units, std::uint8_t{0});
        for (int p = 0; p < split.count; ++p)
            for (Index u = 0; u < units; ++u)
                planes[u] = static_cast<std::uint8_t>(
                    planes[u] + (plane_gain(importance[u], worth[static_cast<std::size_t>(p)]) >= least));
        if (!bounded()) return;
        std::array<float, 4> reach{};
        for (int p = 0; p <= split.count; ++p) reach[static_cast<std::size_t>(p)] = unread_reach(split, p);
        for (Index u = 0; u < units; ++u)
            error += static_cast<double>(importance[u]) * static_cast<double>(reach[planes[u]]);
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
                count_values(planes, scratch);
                // Where there are no grids either, nothing is left to add.
                if (format.segments()[0].bits == 16 &&
                    std::all_of(planes, planes + value_units(), [](std::uint8_t have) { return have == 0; }))
                    continue;
                for (Index r = 0; r < rows; ++r) {
                    const float by = rescale(t, row + r, to.largest[r]);
                    if (by == 1.0f) continue;
                    Eigen::Map<Eigen::ArrayXf>(weights_of(t, row + r), tile_tokens) *= by;
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
        const LatentKeys::Subspace& subspace = keys.subspace(keys.subspace_of_head(head));
        const Index at = keys.head_offset(head), kept = subspace.kept(), depth = scratch.depth();
        run_on(isa_, [&](auto lanes) KVPLANE_BODY {
            for (Index i = 0; i < count; ++i)
                for (Index r = 0; r < rows; ++r) {
                    const Index from = (row + r) * key_dim_;
                    const float* const turn = scratch.turn(i);
                    offsets[i * rows + r] = detail::fused::turn_row<lanes>(
                        work_.plain_.data() + from, work_.partner_.data() + from, turn, turn + depth,
                        subspace.mean.data() + at, key_dim_, scratch.turned() + (i * rows + r) * depth);
                }
        });
        if (keys.settings().directions == LatentDirections::eigenvectors) {
            detail::project(isa_, scratch.turned(), depth, count * rows, subspace.from_latents.data() + at * kept,
                            key_dim_, kept, subspace.from_latents_scale.data(), scratch.projected(), depth);
            return;
        }
        for (Index r = 0; r < count * rows; ++r)
            for (Index j = 0; j < kept; ++j) {
                const Index c = static_cast<Index>(subspace.channels[static_cast<std::size_t>(j)]) - at;
                scratch.projected()[r * depth + j] =
                    c >= 0 && c < key_dim_ ? scratch.turned()[r * depth + c] * subspace.from_latents_scale[j] : 0.0f;
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
    bool looks_twice_ = false, look_again_ = false;
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

}  // namespace kvplane
