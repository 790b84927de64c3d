// kvplane/cuda/append_tables.hpp: what kernels look up of a configuration: the formats of tiles, which block
// encodes what of them, signs of rotations, the basis of latents. Made once, in a page of a device's pool,
// and shared by forks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "kvplane/cache/pages.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/latents.hpp"
#include "kvplane/cuda/queue.hpp"
#include "kvplane/cuda/tile_work.hpp"
#include "kvplane/cuda/token_rows.hpp"
#include "kvplane/storage/tile_planes.hpp"

namespace kvplane::cuda::detail {

using kvplane::detail::CacheShape;
using kvplane::detail::CacheState;
using kvplane::detail::PerSide;

static_assert(static_cast<int>(ScalarType::float32) == input_float &&
              static_cast<int>(ScalarType::float16) == input_half &&
              static_cast<int>(ScalarType::bfloat16) == input_bfloat);
static_assert(tile_rows == tile_tokens && recent_rows == kvplane::detail::recent_page_tokens);

class AppendTables {
  public:
    AppendTables(const CacheShape& cache, const CacheState& state, TilePool& pool, Queue& queue) {
        const CacheConfiguration& c = cache.configuration;
        const PageLayout& layout = *state.layout;
        for (Index s = 0; s < static_cast<Index>(layout.keys.size()); ++s) add_format(layout.key_format(s));
        if (!layout.values_in_keys) add_format(layout.values);
        for (Index s = 0; s < layout.subspaces(); ++s) {
            const auto format = static_cast<std::int32_t>(layout.keys.size() == 1 ? 0 : s);
            if (state.latent) place_subspace(*state.latent, s);
            add_items(cache, TileSide::keys, s, format, layout.key_format(s),
                      layout.key_at[static_cast<std::size_t>(s)],
                      state.latent ? &subspaces_.back() : nullptr);
        }
        for (Index head = 0; head < c.kv_heads && !layout.values_in_keys; ++head)
            add_items(cache, TileSide::values, head, static_cast<std::int32_t>(formats_.size()) - 1,
                      layout.values, layout.value_at[static_cast<std::size_t>(head)], nullptr);
        make_runs(cache);
        upload(cache, state, pool, queue);
        for (const TileSide side : {TileSide::keys, TileSide::values}) {
            const int dim = static_cast<int>(cache.dim(side));
            rows_shared_ = std::max(rows_shared_, rows_shared_bytes(dim));
            if (side == TileSide::keys && state.latent) centre_shared_ = centre_shared_bytes(dim);
        }
    }

    /// Items side by side that one launch takes.
    struct Run {
        TileKind kind;
        bool in_latents;
        int first, count;
        int shared;  ///< memory that a block takes
    };
    const std::vector<Run>& runs() const noexcept { return runs_; }

    const Item* items() const noexcept { return at<Item>(items_at_); }
    const Format* formats() const noexcept { return at<Format>(formats_at_); }
    const Segment* segments() const noexcept { return at<Segment>(segments_at_); }
    const Subspace* subspaces() const noexcept { return at<Subspace>(subspaces_at_); }
    /// nullptr where a side is not rotated.
    const float* signs(TileSide side) const noexcept {
        return signs_at_[side] < 0 ? nullptr : at<float>(signs_at_[side]);
    }
    const std::int32_t* pairs() const noexcept { return at<std::int32_t>(pairs_at_); }
    const float* mean() const noexcept { return at<float>(mean_at_); }

    int subspace_count() const noexcept { return static_cast<int>(subspaces_.size()); }
    int pair_count() const noexcept { return static_cast<int>(pairs_.size()); }
    /// [pair] radians a position.
    const std::vector<double>& frequencies() const noexcept { return pairs_; }
    /// Strips of columns that a product of all subspaces takes, to latents and back.
    int strips(bool back) const noexcept {
        int most = 0;
        for (const Subspace& s : subspaces_) most = std::max(most, back ? s.channels : s.kept);
        return (most + ProductArguments::columns_of_block - 1) / ProductArguments::columns_of_block;
    }
    /// Floats of the latents of a tile.
    std::int64_t latent_floats() const noexcept { return latent_floats_; }
    /// Whether blocks take runs of the input's channels that begin at multiples of `count`.
    bool begins_at(int count) const noexcept {
        return std::all_of(items_.begin(), items_.end(), [&](const Item& item) {
            const Segment* const first = segments_.data() + item.first_segment;
            return item.latent_at >= 0 || std::all_of(first, first + item.segments, [&](const Segment& s) {
                       return s.first_channel % count == 0;
                   });
        });
    }
    /// Shared memory that blocks take.
    int rows_shared() const noexcept { return rows_shared_; }
    int centre_shared() const noexcept { return centre_shared_; }
    /// The most of any.
    int shared() const noexcept {
        int most = std::max(rows_shared_, centre_shared_);
        for (const Run& run : runs_) most = std::max(most, run.shared);
        return most;
    }

  private:
    void add_format(const TileFormat& format) {
        Format made{.first_segment = static_cast<std::int32_t>(segments_.size()),
                    .segments = static_cast<std::int32_t>(format.segments().size()),
                    .keys = format.side() == TileSide::keys,
                    .channels = static_cast<std::int32_t>(format.channels()),
                    .grid_end = 0,
                    .plane_begin = static_cast<std::int32_t>(format.grid_bytes())};
        for (const TileFormat::Placed& placed : format.segments()) {
            const bool by_channel = format.rule().granularity == Granularity::per_channel;
            const Index group =
                by_channel ? format.rule().group : std::min(format.rule().group, placed.channels);
            Segment segment{};
            segment.first_channel = static_cast<std::int32_t>(placed.first_channel);
            segment.channels = static_cast<std::int32_t>(placed.channels);
            segment.bits = placed.bits;
            segment.scheme = placed.scheme;
            segment.by_channel = by_channel;
            segment.group = static_cast<std::int32_t>(group);
            segment.runs = by_channel ? 0 : static_cast<std::int32_t>(groups_of(placed.channels, group));
            segment.planes = placed.split.count;
            for (int p = 0; p < placed.split.count; ++p) {
                const kvplane::detail::PlaneSource source = kvplane::detail::plane_source(placed.split, p);
                segment.width[p] = source.width;
                segment.shift[p] = source.shift;
                segment.low_byte[p] = source.byte;
                segment.plane_at[p] = static_cast<std::int32_t>(placed.plane_at[static_cast<std::size_t>(p)]);
            }
            segment.step_at = static_cast<std::int32_t>(placed.step_at);
            segment.lower_at = static_cast<std::int32_t>(placed.lower_at);
            segment.exponent_at = static_cast<std::int32_t>(placed.exponent_at);
            Index end = 0;
            if (placed.has_grids())
                end = has_lower(placed.scheme) ? placed.lower_at + 2 * placed.grids
                                               : placed.step_at + step_bytes(placed.scheme) * placed.grids;
            else if (placed.is_half() && made.keys)
                end = placed.exponent_at + (placed.channels + 1) / 2 * 2;
            made.grid_end = std::max(made.grid_end, static_cast<std::int32_t>(end));
            segments_.push_back(segment);
        }
        formats_.push_back(made);
    }

    void place_subspace(const LatentKeys& latent, Index s) {
        const LatentKeys::Subspace& from = latent.subspace(s);
        Subspace to{};
        to.channels = static_cast<std::int32_t>(latent.subspace_channels());
        to.first_channel = static_cast<std::int32_t>(s) * to.channels;
        to.kept = static_cast<std::int32_t>(from.kept());
        to.latent_at = static_cast<std::int32_t>(latent_floats_);
        to.latent_stride = whole_units_of(to.kept);
        latent_floats_ += static_cast<std::int64_t>(tile_rows) * to.latent_stride;
        subspaces_.push_back(to);
    }

    /// Blocks of one tile: runs of tokens that share no grid with others, and runs of channels where these
    /// have grids of their own and are many.
    void add_items(const CacheShape& cache, TileSide side, Index head, std::int32_t format_index,
                   const TileFormat& format, Index at, const Subspace* subspace) {
        const int recent = cache.recipe().every_token ? 32
                           : cache.configuration.values_in_keys
                               ? cache.recipe().recent_bits_of(TileSide::keys)
                               : cache.recipe().recent_bits_of(side);
        bool all_half = true, half_keys = false;
        for (const TileFormat::Placed& segment : format.segments()) {
            all_half &= segment.is_half();
            half_keys |= segment.is_half() && format.side() == TileSide::keys;
        }
        const bool by_channel = format.grids_span_tokens();
        Item item{};
        item.side = side == TileSide::keys ? 0 : 1;
        item.head = static_cast<std::int32_t>(head);
        item.format = format_index;
        item.at = static_cast<std::int32_t>(at);
        item.staged = !subspace && (cache.rotates(side) || recent == 8);
        item.halves = !subspace && !item.staged && (recent == 16 || all_half);
        item.direct = !subspace && !item.staged && all_half;
        const int element = item.halves ? 2 : 4;
        const auto pitch = [&](Index channels) {
            const int columns = whole_units_of(static_cast<int>(channels));
            return item.halves ? half_pitch_of(columns) : pitch_of(columns);
        };
        const int budget = item.staged ? 80 * 1024 : 48 * 1024;
        item.spans_tokens = by_channel;
        item.resident_rows = by_channel                 ? static_cast<std::int32_t>(format.rule().group)
                             : half_keys && item.direct ? tile_rows
                             : 2 * step_rows * pitch(format.channels()) * element <= budget || item.direct
                                 ? 2 * step_rows
                                 : step_rows;
        item.latent_at = subspace ? subspace->latent_at : -1;
        item.latent_stride = subspace ? subspace->latent_stride : 0;
        const int rows = half_keys ? tile_rows : item.resident_rows;
        const auto fits = [&](int channels) {
            return !by_channel || item.resident_rows * pitch(channels) * element <= budget;
        };
        const auto add = [&] {
            for (int row = 0; row < tile_rows; row += rows) {
                item.first_row = row;
                item.rows = rows;
                item.clears = row == 0 && item.first_channel == 0;
                items_.push_back(item);
            }
        };
        item.segments = 0;
        const int first = formats_[static_cast<std::size_t>(format_index)].first_segment;
        for (int s = 0; s < static_cast<int>(format.segments().size()); ++s) {
            const int channels = segments_[static_cast<std::size_t>(first + s)].channels,
                      begin = segments_[static_cast<std::size_t>(first + s)].first_channel;
            for (int c = 0; c < channels; c += 32) {
                const int more = std::min(32, channels - c);
                if (item.segments > 0 && !fits(item.channels + more)) {
                    add();
                    item.segments = 0;
                }
                if (item.segments == 0) {
                    item.first_segment = first + s;
                    item.first_channel = begin + c;
                    item.channels = 0;
                }
                item.segments = first + s - item.first_segment + 1;
                item.channels += more;
            }
        }
        if (item.segments > 0) add();
    }

    /// The kind that has what an item needs, and little else.
    TileKind kind_of(const Item& item) const {
        bool all_halves = true, plain = true, biased = true;
        for (int s = item.first_segment; s < item.first_segment + item.segments; ++s) {
            const Segment& segment = segments_[static_cast<std::size_t>(s)];
            all_halves &= segment.bits == 16;
            biased &= segment.scheme != Scheme::unbiased;
            plain &= segment.bits <= 8 && segment.scheme != Scheme::full_range &&
                     (segment.by_channel || segment.runs == 1 || segment.group % 8 == 0);
        }
        if (all_halves && item.halves) return tiles_of_halves;
        if (!plain) return tiles_any;
        if (item.staged) return tiles_staged;
        if (!biased) return tiles_any;
        return item.latent_at >= 0 ? tiles_of_latents : item.halves ? tiles_of_codes : tiles_any;
    }
    /// Puts items of a kind side by side, those that need a basis behind the others.
    void make_runs(const CacheShape& cache) {
        const auto order = [&](const Item& item) { return std::pair(item.latent_at >= 0, kind_of(item)); };
        std::stable_sort(items_.begin(), items_.end(),
                         [&](const Item& a, const Item& b) { return order(a) < order(b); });
        for (int i = 0; i < static_cast<int>(items_.size()); ++i) {
            const Item& item = items_[static_cast<std::size_t>(i)];
            const auto [in_latents, kind] = order(item);
            if (runs_.empty() || runs_.back().kind != kind || runs_.back().in_latents != in_latents)
                runs_.push_back({kind, in_latents, i, 0, 0});
            Run& run = runs_.back();
            ++run.count;
            const Index dim = cache.dim(item.side == 0 ? TileSide::keys : TileSide::values);
            run.shared =
                std::max(run.shared, shared_plan(item, segments_.data(), static_cast<int>(dim)).bytes);
        }
    }

    template <class T>
    const T* at(std::ptrdiff_t offset) const noexcept {
        return reinterpret_cast<const T*>(page_.data() + offset);
    }
    template <class T>
    std::ptrdiff_t put(std::vector<std::byte>& bytes, const T* from, std::size_t count) {
        const std::size_t offset = (bytes.size() + 63) / 64 * 64;
        bytes.resize(offset + count * sizeof(T));
        if (count > 0) std::memcpy(bytes.data() + offset, from, count * sizeof(T));
        return static_cast<std::ptrdiff_t>(offset);
    }

    void upload(const CacheShape& cache, const CacheState& state, TilePool& pool, Queue& queue) {
        std::vector<std::byte> bytes;
        items_at_ = put(bytes, items_.data(), items_.size());
        formats_at_ = put(bytes, formats_.data(), formats_.size());
        segments_at_ = put(bytes, segments_.data(), segments_.size());
        for (const TileSide side : {TileSide::keys, TileSide::values}) {
            signs_at_[side] = -1;
            if (!cache.rotates(side)) continue;
            const std::vector<float>& signs = cache.rotation(side).signs();
            signs_at_[side] = put(bytes, signs.data(), signs.size());
        }
        std::vector<std::pair<std::ptrdiff_t, std::ptrdiff_t>> factors_at;
        if (state.latent) {
            std::vector<std::int32_t> pairs;
            for (const RotaryEmbedding::Pair& pair : state.latent->embedding().pairs())
                if (pair.frequency != 0.0 && state.latent->frame() != KeyFrame::after_rope) {
                    pairs.insert(pairs.end(), {static_cast<std::int32_t>(pair.first),
                                               static_cast<std::int32_t>(pair.second)});
                    pairs_.push_back(pair.frequency);
                }
            pairs_at_ = put(bytes, pairs.data(), pairs.size());
            std::vector<float> mean;
            for (Index s = 0; s < state.latent->subspaces(); ++s) {
                const Eigen::RowVectorXf& part = state.latent->subspace(s).mean;
                mean.insert(mean.end(), part.data(), part.data() + part.size());
            }
            mean_at_ = put(bytes, mean.data(), mean.size());
            for (Index s = 0; s < state.latent->subspaces(); ++s) {
                const auto padded = [&](const Matrix& columns) {
                    Matrix wide =
                        Matrix::Zero(columns.rows(), whole_units_of(static_cast<int>(columns.cols())));
                    wide.leftCols(columns.cols()) = columns;
                    return put(bytes, wide.data(), static_cast<std::size_t>(wide.size()));
                };
                const std::ptrdiff_t to = padded(state.latent->to_latents(s)),
                                     from = padded(state.latent->from_latents(s).transpose());
                factors_at.emplace_back(to, from);
            }
        }
        subspaces_at_ = put(bytes, subspaces_.data(), subspaces_.size());
        page_ = pool.unfilled(static_cast<Index>((bytes.size() + 255) / 256 * 256));
        for (std::size_t s = 0; s < subspaces_.size(); ++s) {
            subspaces_[s].to_latents = at<float>(factors_at[s].first);
            subspaces_[s].from_latents = at<float>(factors_at[s].second);
            subspaces_[s].mean = at<float>(mean_at_) + subspaces_[s].first_channel;
        }
        if (!subspaces_.empty())
            std::memcpy(bytes.data() + subspaces_at_, subspaces_.data(),
                        subspaces_.size() * sizeof(Subspace));
        queue.to_device(page_.data(), bytes.data(), bytes.size());
    }

    std::vector<Item> items_;
    std::vector<Format> formats_;
    std::vector<Segment> segments_;
    std::vector<Subspace> subspaces_;
    std::vector<double> pairs_;
    std::int64_t latent_floats_ = 0;
    std::ptrdiff_t items_at_ = 0, formats_at_ = 0, segments_at_ = 0, subspaces_at_ = 0, pairs_at_ = 0,
                   mean_at_ = 0;
    PerSide<std::ptrdiff_t> signs_at_;
    std::vector<Run> runs_;
    int rows_shared_ = 0, centre_shared_ = 0;
    PageReference page_;
};

}  // namespace kvplane::cuda::detail
