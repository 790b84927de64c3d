// kvplane/cache/token_rows.hpp: a page of unquantized tokens: sinks, and tokens too recent for a tile.
//
// A page holds `capacity` tokens of all heads: for each head the rows of its keys, then for each head those
// of its values. fp16: 2 bytes a channel. 8 bits: a byte a channel on a symmetric grid of the head's row, and
// after all rows the fp16 steps, in the same order. Keys and values may differ in that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kvplane/cache/configuration.hpp"
#include "kvplane/cache/state.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane::detail {

class BlockQuantizer;

class TokenRows {
  public:
    TokenRows(const CacheConfiguration& configuration, Index capacity, PerSide<int> bits)
        : kv_heads_(configuration.kv_heads),
          dim_{configuration.key_head_dim, configuration.value_head_dim},
          values_in_keys_(configuration.values_in_keys),
          capacity_(capacity),
          bits_(bits) {
        if (values_in_keys_) bits_.values = bits_.keys;
    }

    Index capacity() const noexcept { return capacity_; }
    Index bytes() const noexcept {
        return row_bytes() + step_bytes(TileSide::keys) +
               (values_in_keys_ ? 0 : step_bytes(TileSide::values));
    }

    /// Whether the rows of a side are fp16.
    bool half(TileSide side) const noexcept { return bits_[side] == 16; }
    /// The rows of one head and side, where they are fp16: capacity x dim. Not of values in keys.
    const Eigen::half* half_rows(const std::byte* page, TileSide side, Index head) const noexcept {
        return reinterpret_cast<const Eigen::half*>(page + row(side, head, 0));
    }

    /// Bytes before a row.
    Index row(TileSide side, Index head, Index at) const noexcept {
        const Index keys = side == TileSide::keys ? 0 : side_bytes(TileSide::keys);
        return keys + (head * capacity_ + at) * dim(side) * element_bytes(side);
    }
    /// Bytes before the fp16 step of a row.
    Index step_at(TileSide side, Index head, Index at) const noexcept {
        const Index keys = side == TileSide::keys ? 0 : step_bytes(TileSide::keys);
        return row_bytes() + keys + 2 * (head * capacity_ + at);
    }
    /// Bits of a channel: 16 or 8.
    int bits(TileSide side) const noexcept { return bits_[side]; }

    /// Whether a side has rows of its own.
    bool stores(TileSide side) const noexcept { return stored(side) == side; }
    /// Stores tokens [first, first + count) of one head of a side, of rows tokens x (kv_heads * dim), from row `at`
    /// on. Calls for other heads or sides may run at the same time, each with a quantizer of its own.
    void write(TileSide side, Index head, RowView<const float> rows, Index first, Index count, Index at,
               std::byte* page, BlockQuantizer& quantizer) const;

    /// Rows [at, at + count) of one head and side as floats, `stride` apart.
    void read(const std::byte* page, TileSide side, Index head, Index at, Index count, float* out,
              Index stride) const;

    /// Copies a token of all heads, bit by bit, to row `to` of another page.
    void copy(const std::byte* from_page, Index from, std::byte* to_page, Index to) const noexcept {
        each_row([&](TileSide side, Index head) {
            std::memcpy(to_page + row(side, head, to), from_page + row(side, head, from),
                        static_cast<std::size_t>(dim(side) * element_bytes(side)));
            if (!half(side))
                std::memcpy(to_page + step_at(side, head, to), from_page + step_at(side, head, from),
                            sizeof(Eigen::half));
        });
    }
    /// Makes the rows from `first` on zero, as in a new page.
    void clear(std::byte* page, Index first) const noexcept {
        each_row([&](TileSide side, Index head) {
            for (Index at = first; at < capacity_; ++at) {
                std::memset(page + row(side, head, at), 0,
                            static_cast<std::size_t>(dim(side) * element_bytes(side)));
                if (!half(side)) std::memset(page + step_at(side, head, at), 0, sizeof(Eigen::half));
            }
        });
    }

    /// Asks for the rows that read() will be given next.
    void prefetch(const std::byte* page, TileSide side, Index head, Index at, Index count) const noexcept {
        const TileSide from = stored(side);
        const Index first = row(from, head, at);
        for (Index byte = 0; byte < count * dim(from) * element_bytes(from); byte += 64)
            __builtin_prefetch(page + first + byte, 0, 3);
    }

  private:
    Index dim(TileSide side) const noexcept { return dim_[side]; }
    /// The side whose rows hold those of `side`.
    TileSide stored(TileSide side) const noexcept { return values_in_keys_ ? TileSide::keys : side; }
    Index element_bytes(TileSide side) const noexcept { return bits_[side] / 8; }
    /// Bytes of all rows of a side, and of the steps behind all rows.
    Index side_bytes(TileSide side) const noexcept {
        return capacity_ * kv_heads_ * dim(side) * element_bytes(side);
    }
    Index row_bytes() const noexcept {
        return side_bytes(TileSide::keys) + (values_in_keys_ ? 0 : side_bytes(TileSide::values));
    }
    Index step_bytes(TileSide side) const noexcept { return half(side) ? 0 : 2 * capacity_ * kv_heads_; }
    /// body(side, head) for all that is stored.
    template <class Body>
    void each_row(const Body& body) const noexcept {
        for (const TileSide side : {TileSide::keys, TileSide::values})
            for (Index head = 0; head < kv_heads_ && stores(side); ++head) body(side, head);
    }

    void write_half(RowView<const float> rows, TileSide side, Index head, Index first, Index count, Index at,
                    std::byte* page) const;
    void write_bytes(RowView<const float> rows, TileSide side, Index head, Index first, Index count, Index at,
                     std::byte* page, BlockQuantizer& quantizer) const;

    Index kv_heads_;
    PerSide<Index> dim_;
    bool values_in_keys_;
    Index capacity_;
    PerSide<int> bits_;
};

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/cache/impl/token_rows.hpp"
#endif
