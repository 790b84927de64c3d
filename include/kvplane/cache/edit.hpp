// kvplane/cache/edit.hpp: what changes in tokens that are stored: some are removed, or lose their low planes.
#pragma once

#include <vector>

#include "kvplane/cache/pages.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/compiled.hpp"

namespace kvplane::detail {

/// Takes the tokens [first, last) out of a sequence without provisional tokens; they are neither among its
/// sinks nor its last. Tokens behind them move back. Throws Error (out_of_memory) and then has changed
/// nothing.
void remove_tokens(const CacheShape& cache, CacheState& state, TilePool& pool, Index first, Index last);

/// The layout of tiles whose codes have at most these bits, from that of tiles which have more: that one
/// itself where they have not, one of `known`, or a new one, which is added there. Throws Error (option).
const PageLayout* narrowed_layout(std::vector<NarrowedLayout>& known, const PageLayout& wide,
                                  const PerSide<int>& most_bits);

/// Narrows the tiles whose tokens all lie in [first, last) to at most these widths. Throws Error (option,
/// out_of_memory) and then has changed nothing.
void narrow_tiles(const CacheShape& cache, CacheState& state, TilePool& pool, Index first, Index last,
                  const PerSide<int>& most_bits);
/// The page_bytes() of the state after that. Throws Error (option).
Index narrowed_page_bytes(const CacheState& state, Index first, Index last, const PerSide<int>& most_bits);

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/cache/impl/edit.hpp"
#endif
