// kvplane/cuda/layer_view.hpp: the caches of one layer as kernels take them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/token_rows.hpp"
#include "kvplane/cuda/attend_arguments.hpp"
#include "kvplane/cuda/latent_table.hpp"
#include "kvplane/cuda/tile_views.hpp"

namespace kvplane::cuda {

/// How many planes of each side are read.
struct PlanesRead {
    int keys = PlaneSplit::max_planes, values = PlaneSplit::max_planes;
};

namespace detail {

inline OutsideView outside_view(const kvplane::detail::TokenRows& rows, const CacheConfiguration& c) {
    const auto side = [&](TileSide side, Index dim) {
        const int bits = rows.bits(side);
        return TokenRowsView{bits == 16, static_cast<std::int32_t>(rows.capacity()),
                             static_cast<std::int32_t>(dim * bits / 8), rows.row(side, 0, 0),
                             bits == 16 ? 0 : rows.step_at(side, 0, 0)};
    };
    return {side(TileSide::keys, c.key_head_dim), side(TileSide::values, c.value_head_dim)};
}

}  // namespace detail

/// What attention knows of the caches of a layer. Made once for each layer, for whoever attends with it takes
/// what it holds to the device.
struct AttendLayer {
    LayerView view;
    /// Of the rotations of keys and of values, where some are rotated: one sign a channel.
    std::vector<float> key_signs, value_signs;
    Index page_bytes = 0;    ///< of a page of tiles, by which other caches are known
    PlanePrefixes prefixes;  ///< of the planes that are read, for policies that decide tile by tile
    std::shared_ptr<const LatentKeys> latent;  ///< of keys in latents: the basis that all caches must have
    std::shared_ptr<const LatentTable> table;  ///< what kernels take of it
};

/// latent: for caches that fit a basis of their own, that of the cache, DeviceCache::state().latent. Throws
/// Error (option) for a configuration whose tiles the kernels do not read: values in keys, and what
/// LatentTable, key_tile_view() and value_tile_view() refuse; for heads of other than a multiple of 8
/// channels up to 256.
inline AttendLayer attend_layer(const kvplane::detail::CacheShape& shape, const PlanesRead& read = {},
                                std::shared_ptr<const LatentKeys> latent = nullptr) {
    const CacheConfiguration& c = shape.configuration;
    require(!c.values_in_keys, ErrorCode::option, "cuda: values in keys, expected values of their own");
    const auto dim = [](Index d, const char* side) {
        require(d >= 8 && d <= 256 && d % 8 == 0, ErrorCode::option, "cuda: heads of ", d, " channels of ",
                side, ", expected a multiple of 8 up to 256");
        return static_cast<std::int32_t>(d);
    };
    require(!latent || c.fits_basis(), ErrorCode::option,
            "cuda: a basis given for caches that do not fit one of their own");
    AttendLayer layer;
    layer.latent = latent ? std::move(latent) : c.latent_keys;
    LayerView& view = layer.view;
    view = {};
    view.kv_heads = static_cast<std::int32_t>(c.kv_heads);
    view.query_heads = static_cast<std::int32_t>(c.query_heads);
    view.key_head_dim = dim(c.key_head_dim, "keys");
    view.value_head_dim = dim(c.value_head_dim, "values");
    view.rotates_values = shape.rotates(TileSide::values);
    view.sinks = detail::outside_view(shape.sink_rows(), c);
    view.recent = detail::outside_view(shape.recent_rows(), c);
    require(!c.recipe.latents || layer.latent, ErrorCode::option, "cuda: recipe '", c.recipe.name,
            "' without a basis, expected that of the cache, or one in the configuration");
    const PageLayout layout = kvplane::detail::page_layout(c, layer.latent.get());
    layer.page_bytes = layout.bytes;
    view.values = value_tile_view(layout.values, read.values);
    view.rotated_at = static_cast<std::int32_t>(layout.rotated_at);
    if (layout.rotates_by_tile()) view.rotates_keys = Rotation::by_tile;
    if (layer.latent) {
        layer.table = std::make_shared<const LatentTable>(*layer.latent, layout, read.keys);
        view.latents = layer.table->view();
        // Weights by token take the place of factors.
        if (view.values.runs > 0)
            view.latents.factor_bytes = std::max(view.latents.factor_bytes, ValueTileView::run_bytes);
        view.keys.bytes = layer.table->key_bytes();
    } else {
        view.keys = key_tile_view(layout.key_format(0), read.keys);
        layer.prefixes = plane_prefixes(layout.key_format(0), layout.values, read.keys, read.values);
        view.value_offset = static_cast<std::int32_t>(layout.value_at[0]);
        view.head_stride = static_cast<std::int32_t>(layout.key_format(0).bytes() + layout.values.bytes());
    }
    if (shape.rotates(TileSide::keys)) view.rotates_keys = Rotation::all;
    if (view.rotates_keys != Rotation::none) layer.key_signs = shape.rotation(TileSide::keys).signs();
    if (view.rotates_values) layer.value_signs = shape.rotation(TileSide::values).signs();
    return layer;
}

}  // namespace kvplane::cuda
