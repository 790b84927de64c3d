// kvplane/cache/values_in_keys.hpp: weighted sums of values that are the first channels of keys.
//
// The planes of keys have tokens in their lanes, and sums over tokens want channels there. With one key head
// under many query heads, a tile meets so many rows that it pays to pack its codes anew once, as those of a
// tile of values whose grids all have the step 1: sums of codes come out of the integer kernels, and a
// channel's own grid is applied to them,
//
//   sum_t w_t v'_tc = lower_c sum_t w_t + step_c sum_t w_t (code_tc + 1/2).
//
// Where grids do not cover the whole tile channel by channel (fp16, groups of 32 or 64 tokens), it is decoded
// to floats instead.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "kvplane/attention/float_rows.hpp"
#include "kvplane/attention/scratch.hpp"
#include "kvplane/attention/tile_attention.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/storage/tile_coder.hpp"
#include "kvplane/storage/tile_planes.hpp"
#include "kvplane/storage/tile_sequence.hpp"

namespace kvplane::detail {

/// One worker's: the tile that it asked for last stays ready for the next rows.
class ValuesInKeys {
  public:
    /// Takes memory for all formats of the tiles. Throws std::bad_alloc.
    void begin(const TileSequence& tiles, Index value_dim) {
        ready_ = nullptr;
        if (tiles.tiles == 0 || !tiles.layout->values_in_keys) return;
        if (value_dim != value_dim_) readers_.clear();
        value_dim_ = value_dim;
        for (Index t = 0; t < tiles.tiles; ++t)
            if (!reader_of(tiles.value_format(t))) readers_.emplace_back(tiles.value_format(t), value_dim);
    }
    /// output[r][c] += sum over t of weights[r * 128 + t] v'_tc.
    ///   keys    the tile, one that begin() has seen the format of
    void add(Isa isa, const TileFormat& format, const std::byte* keys, const float* weights,
             AttentionScratch& scratch, RowView<float> output) noexcept {
        Reader& reader = *reader_of(format);
        if (keys != ready_) reader.prepare(isa, keys);
        ready_ = keys;
        reader.add(isa, weights, scratch, output);
    }

  private:
    /// Of tiles of one format.
    class Reader {
      public:
        Reader(const TileFormat& keys, Index value_dim)
            : keys_(keys), value_dim_(value_dim), coder_(keys), codes_(keys.segments()[0].channels) {
            const TileFormat::Placed& segment = keys.segments()[0];
            if (segment.has_grids() && keys.rule().granularity == Granularity::per_channel &&
                keys.rule().group == tile_tokens)
                repack(segment.bits);
            else
                rows_.resize(static_cast<std::size_t>(tile_tokens * keys.channels()));
            // What a decoder takes once.
            if (!values_) {
                const std::vector<std::byte> empty(static_cast<std::size_t>(keys.bytes()));
                coder_.decode(empty.data(), tile_tokens, rows_.data(), keys.channels());
            }
        }
        const TileFormat& format() const noexcept { return keys_; }

        void prepare(Isa isa, const std::byte* keys) noexcept {
            if (!values_) {
                coder_.decode(keys, tile_tokens, rows_.data(), keys_.channels());
                return;
            }
            const TileFormat::Placed& segment = keys_.segments()[0];
            unpack_segment(keys_, 0, segment.bits, keys, codes_);
            pack_segment(*values_, 0, codes_, 0, tile_tokens, page_.data());
            widen_row(isa, reinterpret_cast<const Eigen::half*>(keys + segment.step_at), value_dim_,
                      step_.data());
            if (!has_lower(segment.scheme)) {
                const float to_lower = lower_in_steps(segment.scheme, segment.bits);
                Eigen::Map<Eigen::ArrayXf>(lower_.data(), value_dim_) =
                    to_lower * Eigen::Map<const Eigen::ArrayXf>(step_.data(), value_dim_);
            } else {
                widen_row(isa, reinterpret_cast<const Eigen::half*>(keys + segment.lower_at), value_dim_,
                          lower_.data());
            }
        }
        void add(Isa isa, const float* weights, AttentionScratch& scratch, RowView<float> output) noexcept {
            if (!values_)
                return add_rows(isa, {weights, tile_tokens, output.rows},
                                {rows_.data(), keys_.channels(), tile_tokens}, value_dim_, output);
            const RowView<float> sums{sums_.data(), padded_channels(value_dim_), output.rows};
            std::fill_n(sums_.begin(), sums.rows * sums.stride, 0.0f);
            const std::byte* const page = page_.data();
            add_tile_values(isa, *values_, {.tile = page, .next = page}, weights, scratch, sums);
            using Row = Eigen::Map<const Eigen::ArrayXf>;
            const Row step(step_.data(), value_dim_), lower(lower_.data(), value_dim_);
            for (Index r = 0; r < output.rows; ++r) {
                const float weight = Row(weights + r * tile_tokens, tile_tokens).sum();
                Eigen::Map<Eigen::ArrayXf>(output[r], value_dim_) +=
                    step * Row(sums[r], value_dim_) + lower * weight;
            }
        }

      private:
        /// Makes a tile of values of step 1 from 0 on, but for its codes.
        void repack(int bits) {
            values_.emplace(TileSide::values, value_dim_, bits,
                            GridRule{Granularity::per_token, value_dim_, Scheme::min_max, Clip::none});
            page_.resize(static_cast<std::size_t>(values_->bytes()));
            std::fill_n(reinterpret_cast<Eigen::half*>(page_.data() + values_->segments()[0].step_at),
                        tile_tokens, Eigen::half(1.0f));
            step_.resize(static_cast<std::size_t>(value_dim_));
            lower_.resize(step_.size());
            sums_.resize(static_cast<std::size_t>(row_block_rows * padded_channels(value_dim_)));
        }

        TileFormat keys_;
        Index value_dim_;
        TileCoder coder_;
        TileCodes codes_;
        std::optional<TileFormat> values_;  ///< of the codes packed anew; none: rows of floats
        std::vector<std::byte> page_;
        std::vector<float> step_, lower_;  ///< [channel]
        std::vector<float> sums_;          ///< [row][channel, padded]
        std::vector<float> rows_;          ///< [token][channel of the keys]
    };
    Reader* reader_of(const TileFormat& format) noexcept {
        const auto found = std::find_if(readers_.begin(), readers_.end(),
                                        [&](const Reader& reader) { return reader.format() == format; });
        return found == readers_.end() ? nullptr : &*found;
    }

    Index value_dim_ = 0;
    std::vector<Reader> readers_;
    const std::byte* ready_ = nullptr;
};

}  // namespace kvplane::detail
