// kvplane/read/importance.hpp: how much the channels of a tile of keys count for some queries.
#pragma once

#include <cstddef>

#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/read/plan.hpp"
#include "kvplane/simd/isa.hpp"

namespace kvplane::detail {

/// How much every plane group of a tile of keys counts for some rows of queries: the sum over rows and
/// channels of (q step)^2, averaged over the tile's groups of tokens. With `reach` it is the sum over
/// channels of the largest |q| times the largest step, which bounds what one step makes of a score. A step of
/// fp16 is the last place of a channel's largest magnitude.
///   values  [channels], overwritten
///   groups  [plane_groups(format)], the result
void key_importance(Isa isa, const TileFormat& format, const std::byte* tile, RowView<const float> queries,
                    bool reach, float* values, PlaneGroup* groups_out) noexcept;

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/read/impl/importance.hpp"
#endif
