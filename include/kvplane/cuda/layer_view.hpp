// kvplane/cuda/layer_view.hpp: the caches of one layer as kernels take them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/token_rows.hpp"
#include "kvplane/cuda/attend_arguments.hpp"
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

/// What attention knows of the caches of a layer.
struct AttendLayer {
    LayerView view;
    /// Of the rotations of keys and of values, where some are rotated: one sign a channel.
    std::vector<float> key_signs, value_signs;
    Index page_bytes = 0;    ///< of a page of tiles, by which other caches are known
    PlanePrefixes prefixes;  ///< of the planes that are read, for policies that decide tile by tile
};

/// Throws Error (option) for a configuration whose tiles the kernels do not read: keys in latents, values in
/// keys, and what key_tile_view() and value_tile_view() refuse; for heads of other than a multiple of 8
/// channels up to 256.
inline AttendLayer attend_layer(const kvplane::detail::CacheShape& shape, const PlanesRead& read = {}) {
    const CacheConfiguration& c = shape.configuration;
    require(!c.recipe.latents, ErrorCode::option, "cuda: keys in latents, expected keys in channels");
    require(!c.values_in_keys, ErrorCode::option, "cuda: values in keys, expected values of their own");
    const auto dim = [](Index d, const char* side) {
        require(d >= 8 && d <= 256 && d % 8 == 0, ErrorCode::option, "cuda: heads of ", d, " channels of ",
                side, ", expected a multiple of 8 up to 256");
        return static_cast<std::int32_t>(d);
    };
    const PageLayout& layout = *shape.layout;
    AttendLayer layer;
    LayerView& view = layer.view;
    view = {};
    view.kv_heads = static_cast<std::int32_t>(c.kv_heads);
    view.query_heads = static_cast<std::int32_t>(c.query_heads);
    view.key_head_dim = dim(c.key_head_dim, "keys");
    view.value_head_dim = dim(c.value_head_dim, "values");
    view.keys = key_tile_view(layout.key_format(0), read.keys);
    view.values = value_tile_view(layout.values, read.values);
    layer.prefixes = plane_prefixes(layout.key_format(0), layout.values, read.keys, read.values);
    view.value_offset = static_cast<std::int32_t>(layout.value_at[0]);
    view.head_stride = static_cast<std::int32_t>(layout.key_format(0).bytes() + layout.values.bytes());
    view.rotated_at = static_cast<std::int32_t>(layout.rotated_at);
    view.rotates_keys = layout.rotates_by_tile()        ? Rotation::by_tile
                        : shape.rotates(TileSide::keys) ? Rotation::all
                                                        : Rotation::none;
    view.rotates_values = shape.rotates(TileSide::values);
    view.sinks = detail::outside_view(shape.sink_rows(), c);
    view.recent = detail::outside_view(shape.recent_rows(), c);
    if (view.rotates_keys != Rotation::none) layer.key_signs = shape.rotation(TileSide::keys).signs();
    if (view.rotates_values) layer.value_signs = shape.rotation(TileSide::values).signs();
    layer.page_bytes = layout.bytes;
    return layer;
}

}  // namespace kvplane::cuda
