// kvplane/cuda/latent_table.hpp: how queries become the latents of each key head, for kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numbers>
#include <vector>

#include "kvplane/cuda/latent_view.hpp"
#include "kvplane/cuda/tile_views.hpp"
#include "kvplane/error.hpp"
#include "kvplane/latent/keys.hpp"
#include "kvplane/storage/tile_sequence.hpp"

namespace kvplane::cuda {

/// LatentView and what its table holds.
class LatentTable {
  public:
    /// Throws Error (option) for keys that are stored before RoPE, whose queries would have to be turned for
    /// every token; for more than 256 latents of a head.
    LatentTable(const LatentKeys& latent, const PageLayout& layout, int planes) {
        require(latent.frame() != KeyFrame::before_rope, ErrorCode::option,
                "cuda: latents of keys in the frame before_rope, expected tile or after_rope");
        std::vector<LatentHead> heads;
        for (Index h = 0; h < latent.kv_heads(); ++h) heads.push_back(head_of(latent, layout, h, planes));
        view_.channels = static_cast<std::int32_t>((latent.head_dim() + 15) / 16 * 16);
        for (const LatentHead& head : heads) {
            view_.columns = std::max(view_.columns, 32 * head.column_groups);
            view_.factor_bytes = std::max(view_.factor_bytes, 8u * head.keys.factor_stride());
            key_bytes_ = std::max(key_bytes_, head.keys.bytes);
        }
        const auto place = [end = std::uint32_t{0}](std::uint32_t& at, std::size_t bytes) mutable {
            at = end;
            end += static_cast<std::uint32_t>((bytes + 15) / 16 * 16);
            return end;
        };
        const auto channels = static_cast<std::size_t>(view_.channels),
                   columns = static_cast<std::size_t>(view_.columns);
        std::uint32_t head_at = 0;
        auto next = place;
        next(head_at, sizeof(LatentHead));
        next(view_.turns_at, channels * 8);
        next(view_.partners_at, channels * 4);
        next(view_.mean_at, channels * 4);
        next(view_.scale_at, columns * 4);
        view_.head_bytes = next(view_.basis_at, channels * columns * 2);
        bytes_.resize(heads.size() * view_.head_bytes);
        for (Index h = 0; h < latent.kv_heads(); ++h)
            fill(latent, heads[static_cast<std::size_t>(h)], h,
                 bytes_.data() + static_cast<std::size_t>(h) * view_.head_bytes);
    }

    /// Without the address of the table.
    const LatentView& view() const noexcept { return view_; }
    const std::vector<std::byte>& bytes() const noexcept { return bytes_; }
    /// The most bytes that are read of a tile of keys.
    std::int32_t key_bytes() const noexcept { return key_bytes_; }

  private:
    static LatentHead head_of(const LatentKeys& latent, const PageLayout& layout, Index h, int planes) {
        const Index s = latent.subspace_of_head(h);
        LatentHead head{};
        head.keys = key_tile_view(latent.format(s), planes);
        // Where no latent has bits, what is copied is not looked at.
        head.keys.bytes = std::max(head.keys.bytes, std::int32_t{16});
        const Index kept = latent.subspace(s).kept();
        require(kept <= 256, ErrorCode::option, "cuda: ", kept, " latents of a head, expected up to 256");
        head.key_at = static_cast<std::int32_t>(layout.key_at[static_cast<std::size_t>(s)]);
        head.value_at = static_cast<std::int32_t>(layout.value_at[static_cast<std::size_t>(h)]);
        head.column_groups = static_cast<std::int32_t>((kept + 31) / 32);
        return head;
    }

    template <class T>
    static void put(std::byte* at, Index i, T x) {
        std::memcpy(at + static_cast<std::size_t>(i) * sizeof(T), &x, sizeof(T));
    }
    void fill(const LatentKeys& latent, const LatentHead& head, Index h, std::byte* to) {
        std::memcpy(to, &head, sizeof head);
        for (std::int32_t c = 0; c < view_.channels; ++c) put(to + view_.partners_at, c, c);
        for (const RotaryEmbedding::Pair& pair : latent.embedding().pairs()) {
            if (pair.second < 0 || pair.frequency == 0.0 || latent.frame() == KeyFrame::after_rope) continue;
            view_.turns = true;
            const double turns = pair.frequency / (2.0 * std::numbers::pi);
            // Whole turns do not count. The factor keeps what was rounded up to 1 below 2^64.
            const auto part =
                static_cast<std::uint64_t>(std::ldexp((turns - std::floor(turns)) * (1.0 - 0x1p-53), 64));
            put(to + view_.turns_at, pair.first, part);
            put(to + view_.turns_at, pair.second, std::uint64_t{0} - part);
            put(to + view_.partners_at, pair.first, static_cast<std::int32_t>(pair.second));
            put(to + view_.partners_at, pair.second, static_cast<std::int32_t>(pair.first));
        }
        const Index s = latent.subspace_of_head(h), at = latent.head_offset(h);
        const LatentKeys::Subspace& subspace = latent.subspace(s);
        for (Index c = 0; c < latent.head_dim(); ++c) put(to + view_.mean_at, c, subspace.mean[at + c]);
        for (Index j = 0; j < subspace.kept(); ++j) fill_column(subspace, at, latent.head_dim(), j, to);
    }
    void fill_column(const LatentKeys::Subspace& subspace, Index first_channel, Index channels, Index column,
                     std::byte* to) const {
        put(to + view_.scale_at, column, subspace.from_latents_scale[column]);
        const auto number = [&](Index c) {
            if (subspace.channels.empty()) return subspace.from_latents(first_channel + c, column);
            const bool is_it = subspace.channels[static_cast<std::size_t>(column)] == first_channel + c;
            return Eigen::half(is_it ? 1.0f : 0.0f);
        };
        // [32 columns][16 channels][16 columns][lane][8 columns of these][4 channels]: lane 4 g + t has
        // channels 4 t to 4 t + 3 of column g of eight.
        std::byte* const basis =
            to + view_.basis_at + column / 32 * (view_.channels / 16) * 1024 + column % 32 / 16 * 512;
        for (Index c = 0; c < channels; ++c)
            put(basis + c / 16 * 1024 + (column % 8 * 4 + c % 16 / 4) * 16 + column % 16 / 8 * 8, c % 4,
                number(c));
    }

    LatentView view_{};
    std::vector<std::byte> bytes_;
    std::int32_t key_bytes_ = 0;
};

}  // namespace kvplane::cuda
