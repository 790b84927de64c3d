// kvplane/cache/token_rows.hpp: a page of unquantized tokens: sinks, and tokens too recent for a tile.
//
// A page holds `capacity` tokens of all heads: for each head the rows of its keys, then for each head those
// of its values. fp16: 2 bytes a channel. 8 bits: a byte a channel on a symmetric grid of the head's row, and
// after all rows the fp16 steps, in the same order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cache/configuration.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/block.hpp"

namespace kvplane {

class TokenRows {
  public:
    TokenRows(const CacheConfiguration& configuration, Index capacity, int bits)
        : kv_heads_(configuration.kv_heads),
          dim_{configuration.key_head_dim, configuration.value_head_dim},
          capacity_(capacity),
          bits_(bits) {}

    Index capacity() const noexcept { return capacity_; }
    Index bytes() const noexcept {
        const Index rows = capacity_ * kv_heads_ * (dim_[0] + dim_[1]);
        return bits_ == 16 ? 2 * rows : rows + 2 * 2 * capacity_ * kv_heads_;
    }

    bool half() const noexcept { return bits_ == 16; }
    /// The rows of one head and side (0 keys, 1 values), where they are fp16: capacity x dim.
    const Eigen::half* half_rows(const std::byte* page, int side, Index head) const noexcept {
        return reinterpret_cast<const Eigen::half*>(page) + row(side, head, 0);
    }

    /// Stores tokens [first, first + count) of both matrices, tokens x (kv_heads * dim), from row `at` on.
    void write(const Matrix& keys, const Matrix& values, Index first, Index count, Index at,
               std::byte* page) {
        for (int side = 0; side < 2; ++side) {
            const Matrix& rows = side == 0 ? keys : values;
            for (Index head = 0; head < kv_heads_; ++head)
                bits_ == 16 ? write_half(rows, side, head, first, count, at, page)
                            : write_bytes(rows, side, head, first, count, at, page);
        }
    }

    /// Rows [at, at + count) of one head and side (0 keys, 1 values) as floats, `stride` apart.
    void read(const std::byte* page, int side, Index head, Index at, Index count, float* out,
              Index stride) const {
        const Index dim = dim_[side];
        if (bits_ == 16) {
            const auto* from = reinterpret_cast<const Eigen::half*>(page) + row(side, head, at);
            const Isa isa = current_isa();
            for (Index t = 0; t < count; ++t) widen_row(isa, from + t * dim, dim, out + t * stride);
            return;
        }
        const auto* codes = reinterpret_cast<const std::uint8_t*>(page) + row(side, head, at);
        for (Index t = 0; t < count; ++t, codes += dim) {
            const auto step =
                static_cast<float>(*reinterpret_cast<const Eigen::half*>(page + step_at(side, head, at + t)));
            for (Index c = 0; c < dim; ++c)
                out[t * stride + c] = step * static_cast<float>(static_cast<int>(codes[c]) - 128);
        }
    }

    /// Asks for the rows that read() will be given next.
    void prefetch(const std::byte* page, int side, Index head, Index at, Index count) const noexcept {
        const Index size = bits_ / 8, first = row(side, head, at) * size;
        for (Index byte = 0; byte < count * dim_[side] * size; byte += 64)
            __builtin_prefetch(page + first + byte, 0, 3);
    }

  private:
    /// Elements before a row.
    Index row(int side, Index head, Index at) const noexcept {
        const Index keys = side == 0 ? 0 : capacity_ * kv_heads_ * dim_[0];
        return keys + (head * capacity_ + at) * dim_[side];
    }
    /// Bytes before the fp16 step of a row.
    Index step_at(int side, Index head, Index at) const noexcept {
        const Index rows = capacity_ * kv_heads_ * (dim_[0] + dim_[1]);
        return rows + 2 * ((side * kv_heads_ + head) * capacity_ + at);
    }

    void write_half(const Matrix& rows, int side, Index head, Index first, Index count, Index at,
                    std::byte* page) {
        auto* to = reinterpret_cast<Eigen::half*>(page) + row(side, head, at);
        const Isa isa = current_isa();
        for (Index t = 0; t < count; ++t)
            narrow_row(isa, rows.data() + (first + t) * rows.cols() + head * dim_[side], dim_[side],
                       to + t * dim_[side]);
    }
    void write_bytes(const Matrix& rows, int side, Index head, Index first, Index count, Index at,
                     std::byte* page) {
        const GridRule rule{Granularity::per_token, dim_[side], Scheme::symmetric, Clip::none};
        quantizer_.quantize(head_rows(rows, kv_heads_), side == 0 ? "keys" : "values", head, first, count, 0,
                            dim_[side], rule, 8, reinterpret_cast<std::uint8_t*>(page) + row(side, head, at),
                            dim_[side]);
        std::copy(quantizer_.step().begin(), quantizer_.step().end(),
                  reinterpret_cast<Eigen::half*>(page + step_at(side, head, at)));
    }

    Index kv_heads_;
    Index dim_[2];
    Index capacity_;
    int bits_;
    BlockQuantizer quantizer_;
};

}  // namespace kvplane
