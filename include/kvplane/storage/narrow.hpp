// kvplane/storage/narrow.hpp: tiles that give up their low planes.
//
// A prefix of a code's planes is the code of a coarser grid over the same interval: cells of a width that is
// 2^dropped times the old one, from the same lower end. So a tile narrows without being decoded. Its planes
// are copied, its steps are multiplied by a power of two, and T1 holds for the wider cells as it did for the
// narrow ones: no value is further from its cell's middle than half of it. In the frame of a rotation that is
// as true as in any other.
//
// Grids around a code of zero (symmetric, full_range) have no such prefix: what is left would not be
// symmetric to 0. fp16 numbers have none that
// is worth keeping: where other channels are narrowed, they stay.
#pragma once

#include <cstddef>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/storage/tile_format.hpp"
#include "kvplane/storage/tile_sequence.hpp"

namespace kvplane {

/// The widths that codes of `bits` bits (1 to 8) can be narrowed to, largest first: those of the prefixes of
/// their planes, such as {6, 4} for 7 bits. Throws Error (option).
std::vector<int> narrower_widths(int bits);

namespace detail {

/// The format of a tile whose codes have `bits` bits at most: each segment keeps the widest prefix of its
/// planes that is no wider, or its fp16 numbers. Throws Error (option) where a segment has none, or is
/// symmetric and wider; or where there is nothing but fp16 and it is wider.
TileFormat narrowed(const TileFormat& format, int bits);
/// Where values are in keys, value_bits is not looked at.
PageLayout narrowed(const PageLayout& layout, int key_bits, int value_bits);

/// Whether that is possible.
bool can_narrow(const PageLayout& layout, int key_bits, int value_bits) noexcept;

/// The most bits that codes of a format have; 16 where all channels are fp16.
int widest_codes(const TileFormat& format) noexcept;

/// Fills a page of zeros that is laid out as `narrow`, a narrowed() layout of `wide`, from one laid out as
/// that.
void narrow_page(const PageLayout& wide, const std::byte* from, const PageLayout& narrow,
                 std::byte* to) noexcept;

}  // namespace detail
}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/storage/impl/narrow.hpp"
#endif
