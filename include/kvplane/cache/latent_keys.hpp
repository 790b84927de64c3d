// kvplane/cache/latent_keys.hpp: the keys of one layer in latents: a basis, its widths, and their tiles.
//
// What a cache keeps of a LatentBasis: of every part (one a key head, or one for all) the latents that have
// bits, as fp16 columns with a scale each. A part's tile is a key tile (storage/tile.hpp) whose channels are
// latents. Several caches share one object where it is part of the model; a cache that fits its own owns it
// and counts its bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kvplane/allocate/latent_schedule.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/storage/tile.hpp"
#include "kvplane/transform/latent_basis.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane {

class LatentKeys {
  public:
    /// One part as it is stored. Column j of E is encode_scale[j] times column j of `encode`, of D likewise.
    struct Part {
        std::vector<ChannelSegment> segments;  ///< of the kept latents: widths 1 to 8, first latent first
        Eigen::RowVectorXf mean;               ///< channels
        Eigen::RowVectorXf encode_scale, decode_scale;  ///< kept latents
        RowMajorMatrix<Eigen::half> decode;             ///< channels x kept; none for channels as directions
        RowMajorMatrix<Eigen::half> encode;             ///< the same; none where it equals `decode` (C = I)
        std::vector<std::int64_t> channels;             ///< channels as directions: which ones

        Index kept() const noexcept { return decode_scale.size(); }
    };

    /// From a basis and a schedule for each of its parts. Throws Error (shape) where these do not belong
    /// together, or a schedule keeps more latents than the statistics of the basis determine.
    LatentKeys(const LatentBasis& basis, std::span<const LatentSchedule> schedules);
    /// From stored parts. Throws Error (shape, not_finite, option).
    LatentKeys(const BasisSettings& settings, Index kv_heads, Index query_heads, Index head_dim,
               const std::optional<RopeSettings>& rope, std::vector<Part> parts);

    const BasisSettings& settings() const noexcept { return settings_; }
    KeyFrame frame() const noexcept { return settings_.frame; }
    Index kv_heads() const noexcept { return kv_heads_; }
    Index query_heads() const noexcept { return query_heads_; }
    Index head_dim() const noexcept { return head_dim_; }
    const std::optional<RopeSettings>& rope() const noexcept { return rope_; }
    const RotaryEmbedding& embedding() const noexcept { return embedding_; }

    Index parts() const noexcept { return static_cast<Index>(parts_.size()); }
    const Part& part(Index p) const { return parts_[static_cast<std::size_t>(p)]; }
    Index part_channels() const noexcept { return kv_heads_ * head_dim_ / parts(); }
    Index part_of_head(Index kv_head) const noexcept { return parts() == 1 ? 0 : kv_head; }
    /// Where a head's channels begin within its part.
    Index head_offset(Index kv_head) const noexcept { return parts() == 1 ? kv_head * head_dim_ : 0; }
    const TileFormat& format(Index p) const { return formats_[static_cast<std::size_t>(p)]; }

    /// E and D as floats. E is channels x kept.
    Matrix encode_matrix(Index p) const { return expand(part(p), true); }
    Matrix decode_matrix(Index p) const { return expand(part(p), false); }

    /// Memory of what is stored: fp16 columns, scales, means, channel numbers.
    Index bytes() const noexcept;

  private:
    void require_parts() const;
    static Matrix expand(const Part& part, bool encode);

    BasisSettings settings_;
    Index kv_heads_, query_heads_, head_dim_;
    std::optional<RopeSettings> rope_;
    RotaryEmbedding embedding_;
    std::vector<Part> parts_;
    std::vector<TileFormat> formats_;
};

/// Encodes and decodes the tiles of one LatentKeys, in memory that is reused from tile to tile. Copies share
/// the widened basis.
class LatentCoder {
  public:
    explicit LatentCoder(std::shared_ptr<const LatentKeys> keys) : keys_(std::move(keys)) {
        std::vector<Matrix> decode;
        for (Index p = 0; p < keys_->parts(); ++p) {
            coders_.emplace_back(keys_->format(p));
            decode.push_back(keys_->decode_matrix(p));
        }
        decode_ = std::make_shared<const std::vector<Matrix>>(std::move(decode));
    }

    /// Encodes 128 keys after RoPE, tokens x (kv_heads * head_dim); the tile of part p begins at tiles[p].
    /// Returns the largest |k - k'| of any element in the basis' frame. Latents beyond +-30000 standard
    /// deviations saturate.
    double encode(FramedKeys<KeyFrame::after_rope> keys, std::span<std::byte* const> tiles);

    /// The first `tokens` latents of part p: tokens x kept.
    const Matrix& latents(Index p, const std::byte* tile, Index tokens) {
        latents_.resize(tokens, keys_->part(p).kept());
        if (latents_.size() > 0)
            coders_[static_cast<std::size_t>(p)].decode(tile, tokens, latents_.data(), latents_.cols());
        return latents_;
    }
    const Matrix& decode_matrix(Index p) const { return (*decode_)[static_cast<std::size_t>(p)]; }

    /// The keys of one head after RoPE, tokens x head_dim, from the first `most` latents. `first`: position
    /// of the tile's first token.
    Matrix reconstruct(Index kv_head, const std::byte* tile, Index tokens, Index first, Index most);

  private:
    Matrix in_frame(FramedKeys<KeyFrame::after_rope> keys) const;

    std::shared_ptr<const LatentKeys> keys_;
    std::vector<TileCoder> coders_;
    std::shared_ptr<const std::vector<Matrix>> decode_;
    std::vector<Matrix> encode_;
    Matrix latents_;
};

// Implementation -------------------------------------------------------------------------------------------

namespace detail {

/// Columns divided by their largest magnitude, so that fp16 holds them whatever the size of keys.
inline void store_columns(const Matrix& columns, RowMajorMatrix<Eigen::half>& stored,
                          Eigen::RowVectorXf& scale) {
    scale = columns.size() > 0 ? Eigen::RowVectorXf(columns.cwiseAbs().colwise().maxCoeff())
                               : Eigen::RowVectorXf::Zero(columns.cols());
    const Eigen::RowVectorXf divisor = scale.unaryExpr([](float s) { return s > 0.0f ? s : 1.0f; });
    stored = (columns.array().rowwise() / divisor.array()).matrix().cast<Eigen::half>();
}

inline std::vector<ChannelSegment> kept_segments(const LatentSchedule& schedule) {
    std::vector<ChannelSegment> kept;
    for (ChannelSegment segment : schedule.segments)
        if (segment.bits > 0) {
            segment.scheme = scheme_for(segment.bits);
            kept.push_back(segment);
        }
    return kept;
}

}  // namespace detail

inline LatentKeys::LatentKeys(const LatentBasis& basis, std::span<const LatentSchedule> schedules)
    : settings_(basis.settings()),
      kv_heads_(basis.kv_heads()),
      query_heads_(basis.query_heads()),
      head_dim_(basis.head_dim()),
      rope_(basis.rope() ? std::optional(*basis.rope()) : std::nullopt),
      embedding_(rope_ ? RotaryEmbedding(head_dim_, *rope_) : RotaryEmbedding::none(head_dim_)) {
    require(schedules.size() == basis.parts().size(), ErrorCode::shape, "latent keys: ", schedules.size(),
            " schedules for a basis of ", basis.parts().size(), " parts");
    for (std::size_t p = 0; p < schedules.size(); ++p) {
        const LatentBasis::Part& from = basis.parts()[p];
        const LatentSchedule& schedule = schedules[p];
        const Index kept = schedule.kept();
        require(schedule.channels() == from.spectrum.size(), ErrorCode::shape, "latent keys: a schedule of ",
                schedule.channels(), " latents for part ", p, " of ", from.spectrum.size());
        require(kept <= from.rank, ErrorCode::shape, "latent keys: the schedule of part ", p, " keeps ", kept,
                " latents, the keys that its basis was fitted to determine only ", from.rank);
        Part part;
        part.segments = detail::kept_segments(schedule);
        part.mean = from.mean;
        const Matrix encode = from.encode.leftCols(kept), decode = from.decode.leftCols(kept);
        if (settings_.directions == LatentDirections::channels) {
            part.encode_scale.resize(kept);
            part.decode_scale.resize(kept);
            for (Index j = 0; j < kept; ++j) {
                Index channel = 0;
                part.decode_scale[j] = decode.col(j).maxCoeff(&channel);
                part.encode_scale[j] = encode(channel, j);
                part.channels.push_back(channel);
            }
        } else {
            detail::store_columns(decode, part.decode, part.decode_scale);
            detail::store_columns(encode, part.encode, part.encode_scale);
            // Orthonormal columns: E and D differ in scale alone.
            if (!settings_.query_weighted) part.encode.resize(0, 0);
        }
        parts_.push_back(std::move(part));
    }
    require_parts();
    for (const Part& part : parts_)
        formats_.emplace_back(TileSide::keys, part.segments, GridRule{Granularity::per_channel, tile_tokens});
}

inline LatentKeys::LatentKeys(const BasisSettings& settings, Index kv_heads, Index query_heads,
                              Index head_dim, const std::optional<RopeSettings>& rope,
                              std::vector<Part> parts)
    : settings_(settings),
      kv_heads_(kv_heads),
      query_heads_(query_heads),
      head_dim_(head_dim),
      rope_(rope),
      embedding_(rope ? RotaryEmbedding(head_dim, *rope) : RotaryEmbedding::none(head_dim)),
      parts_(std::move(parts)) {
    require_parts();
    for (const Part& part : parts_)
        formats_.emplace_back(TileSide::keys, part.segments, GridRule{Granularity::per_channel, tile_tokens});
}

inline void LatentKeys::require_parts() const {
    const Index count = settings_.heads_together ? 1 : kv_heads_;
    require(parts() == count, ErrorCode::shape, "latent keys: ", parts(), " parts, expected ", count);
    const bool by_channel = settings_.directions == LatentDirections::channels;
    for (Index p = 0; p < parts(); ++p) {
        const Part& part = this->part(p);
        const Index kept = part.kept(), channels = part_channels();
        const auto fits = [&](const RowMajorMatrix<Eigen::half>& m, bool wanted) {
            return wanted ? m.rows() == channels && m.cols() == kept : m.size() == 0;
        };
        Index with_bits = 0;
        for (const ChannelSegment& segment : part.segments) {
            require(segment.channels >= 1 && segment.bits >= 1 && segment.bits <= 8, ErrorCode::option,
                    "latent keys: part ", p, " has a run of ", segment.channels, " latents of ", segment.bits,
                    " bits, expected widths of 1 to 8");
            with_bits += segment.channels;
        }
        require(part.mean.size() == channels && kept <= channels && with_bits == kept &&
                    part.encode_scale.size() == kept && fits(part.decode, !by_channel) &&
                    fits(part.encode, !by_channel && settings_.query_weighted) &&
                    static_cast<Index>(part.channels.size()) == (by_channel ? kept : 0),
                ErrorCode::shape, "latent keys: part ", p, " of ", kept, " latents is not one of ", channels,
                " channels");
        for (const std::int64_t channel : part.channels)
            require(channel >= 0 && channel < channels, ErrorCode::index, "latent keys: part ", p,
                    ": channel ", channel, " of ", channels);
        require(part.mean.allFinite() && part.encode_scale.allFinite() && part.decode_scale.allFinite() &&
                    part.decode.cast<float>().allFinite() && part.encode.cast<float>().allFinite(),
                ErrorCode::not_finite, "latent keys: part ", p, " is not finite");
    }
}

inline Matrix LatentKeys::expand(const Part& part, bool encode) {
    const Eigen::RowVectorXf& scale = encode ? part.encode_scale : part.decode_scale;
    if (part.decode.size() == 0) {  // channels as directions, or nothing kept
        Matrix columns = Matrix::Zero(part.mean.size(), part.kept());
        for (std::size_t j = 0; j < part.channels.size(); ++j)
            columns(static_cast<Index>(part.channels[j]), static_cast<Index>(j)) =
                scale[static_cast<Index>(j)];
        return columns;
    }
    const auto& stored = encode && part.encode.size() > 0 ? part.encode : part.decode;
    Matrix columns = stored.cast<float>();
    columns.array().rowwise() *= scale.array();
    return columns;
}

inline Index LatentKeys::bytes() const noexcept {
    Index sum = 0;
    for (const Part& part : parts_)
        sum += 2 * (part.decode.size() + part.encode.size()) + 4 * part.mean.size() + 8 * part.kept() +
               2 * static_cast<Index>(part.channels.size());
    return sum;
}

inline Matrix LatentCoder::in_frame(FramedKeys<KeyFrame::after_rope> keys) const {
    switch (keys_->frame()) {
        case KeyFrame::before_rope:
            return keys_->embedding().before(std::move(keys)).rows;
        case KeyFrame::tile:
            return keys_->embedding().to_tile(std::move(keys)).rows;
        default:
            return std::move(keys.rows);
    }
}

inline double LatentCoder::encode(FramedKeys<KeyFrame::after_rope> keys, std::span<std::byte* const> tiles) {
    constexpr float most = 30000.0f;
    if (encode_.empty())
        for (Index p = 0; p < keys_->parts(); ++p) encode_.push_back(keys_->encode_matrix(p));
    const Matrix rows = in_frame(std::move(keys));
    double largest = 0.0;
    for (Index p = 0; p < keys_->parts(); ++p) {
        const Matrix centered =
            rows.middleCols(p * keys_->part_channels(), keys_->part_channels()).rowwise() -
            keys_->part(p).mean;
        if (keys_->part(p).kept() == 0) {
            largest = std::max(largest, static_cast<double>(centered.cwiseAbs().maxCoeff()));
            continue;
        }
        Matrix latents(rows.rows(), keys_->part(p).kept());
        latents.noalias() = centered * encode_[static_cast<std::size_t>(p)];
        latents = latents.cwiseMax(-most).cwiseMin(most);
        std::byte* const tile = tiles[static_cast<std::size_t>(p)];
        coders_[static_cast<std::size_t>(p)].encode(head_rows(latents), "latents", 0, 0, rows.rows(), 0,
                                                    tile);
        const Matrix close = this->latents(p, tile, rows.rows()) * decode_matrix(p).transpose();
        largest = std::max(largest, static_cast<double>((centered - close).cwiseAbs().maxCoeff()));
    }
    return largest;
}

inline Matrix LatentCoder::reconstruct(Index kv_head, const std::byte* tile, Index tokens, Index first,
                                       Index most) {
    const Index p = keys_->part_of_head(kv_head), at = keys_->head_offset(kv_head), dim = keys_->head_dim();
    const Matrix& z = latents(p, tile, tokens);
    const Index kept = std::min(most, z.cols());
    Matrix rows(tokens, dim);
    rows.noalias() = z.leftCols(kept) * decode_matrix(p).block(at, 0, dim, kept).transpose();
    rows.rowwise() += keys_->part(p).mean.segment(at, dim);
    if (keys_->frame() == KeyFrame::before_rope) keys_->embedding().rotate(rows, first);
    if (keys_->frame() == KeyFrame::tile) keys_->embedding().turn(rows, first);
    return rows;
}

}  // namespace kvplane
