// kvplane/cache/impl/token_rows.hpp: the functions of cache/token_rows.hpp.
#pragma once

#include <algorithm>

#include "kvplane/cache/token_rows.hpp"
#include "kvplane/quantize/block.hpp"
#include "kvplane/simd/half.hpp"

namespace kvplane::detail {

KVPLANE_FUNCTION void TokenRows::write(TileSide side, Index head, RowView<const float> rows, Index first,
                                       Index count, Index at, std::byte* page,
                                       BlockQuantizer& quantizer) const {
    half(side) ? write_half(rows, side, head, first, count, at, page)
               : write_bytes(rows, side, head, first, count, at, page, quantizer);
}

KVPLANE_FUNCTION void TokenRows::read(const std::byte* page, TileSide side, Index head, Index at, Index count,
                                      float* out, Index stride) const {
    const Index channels = dim(side);
    const TileSide from_side = stored(side);
    if (half(from_side)) {
        const auto* from = reinterpret_cast<const Eigen::half*>(page + row(from_side, head, at));
        const Isa isa = current_isa();
        for (Index t = 0; t < count; ++t)
            widen_row(isa, from + t * dim(from_side), channels, out + t * stride);
        return;
    }
    const auto* codes = reinterpret_cast<const std::uint8_t*>(page + row(from_side, head, at));
    for (Index t = 0; t < count; ++t, codes += dim(from_side)) {
        const auto step = static_cast<float>(
            *reinterpret_cast<const Eigen::half*>(page + step_at(from_side, head, at + t)));
        for (Index c = 0; c < channels; ++c)
            out[t * stride + c] = step * static_cast<float>(static_cast<int>(codes[c]) - 128);
    }
}

KVPLANE_FUNCTION void TokenRows::write_half(RowView<const float> rows, TileSide side, Index head, Index first,
                                            Index count, Index at, std::byte* page) const {
    auto* to = reinterpret_cast<Eigen::half*>(page + row(side, head, at));
    const Isa isa = current_isa();
    for (Index t = 0; t < count; ++t)
        narrow_row(isa, rows[first + t] + head * dim(side), dim(side), to + t * dim(side));
}

KVPLANE_FUNCTION void TokenRows::write_bytes(RowView<const float> rows, TileSide side, Index head,
                                             Index first, Index count, Index at, std::byte* page,
                                             BlockQuantizer& quantizer) const {
    quantizer.quantize(rows_of_heads(rows, kv_heads_, dim(side)),
                       {.argument = side == TileSide::keys ? "keys" : "values",
                        .head = head,
                        .first = first,
                        .count = count,
                        .channels = dim(side),
                        .rule = {Granularity::per_token, dim(side), Scheme::symmetric, Clip::none},
                        .bits = 8,
                        .codes = reinterpret_cast<std::uint8_t*>(page + row(side, head, at)),
                        .code_stride = dim(side)});
    std::copy(quantizer.step().begin(), quantizer.step().end(),
              reinterpret_cast<Eigen::half*>(page + step_at(side, head, at)));
}

}  // namespace kvplane::detail
