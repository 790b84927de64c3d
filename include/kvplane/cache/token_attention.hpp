// kvplane/cache/token_attention.hpp: which tokens of the next tile queries look at.
//
// Where tokens of values have different widths, those get the most bits that later queries will weigh most.
// What is known of these is how the queries weigh them that come between the last token of a tile and the
// time when it is packed. A token counts for the sum of its squared softmax weights, because an error of its
// value adds to the squared error of an output by the square of its weight. The softmax is over the sinks,
// the tile and the tokens behind it: over packed tokens it would cost another attention, and it orders the
// tokens of a tile nearly alike.
//
// Widths decide stored bytes, so these must not depend on the machine. Keys and queries are rounded to small
// whole numbers, whose products sum up exactly in any order, and a softmax is taken in whole numbers too.
#pragma once

#include <cstdint>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/storage/tile_format.hpp"

namespace kvplane::detail {

/// [key head][128] sums of squared weights in units of 2^-20: of what each query head's next queries see.
using TokenAttention = std::vector<std::int32_t>;

/// Weighs the tokens of one tile for one key head at a time.
class AttentionMeter {
  public:
    /// Rows [token][dim] for the tokens before the tile, its 128, and those behind it, which the caller fills
    /// before take_keys(). Throws std::bad_alloc.
    RowView<float> keys(Index tokens, Index dim);
    /// Rounds the keys, less the mean of the first `whole`.
    void take_keys(Index whole);
    /// Adds to squares [128] what query heads [row][dim] of one token see, which are of the first `seen` keys; the
    /// tile's begin at `first`.
    void measure(RowView<const float> queries, Index seen, Index first, std::int32_t* squares);

  private:
    /// Rows of queries that are scored together, and tokens whose rounded keys stand together.
    static constexpr Index row_block = 4, token_block = 16;

    Index tokens_ = 0, dim_ = 0, stride_ = 0;
    std::vector<float> keys_;            ///< [token][stride], padded with zeros
    std::vector<float> mean_, query_;    ///< [stride]
    std::vector<std::int16_t> rounded_;  ///< [token of a block][stride]
    std::vector<std::int32_t> blocks_;   ///< [block of tokens][pair of channels][token of it]
    std::vector<float> units_;           ///< [token, padded] what 1 in a rounded key counts for
    std::vector<std::int16_t> queries_;  ///< [row of a block][stride]
    std::vector<std::int32_t> scores_;   ///< [row of a block][token, padded]
};

/// What the tokens of a tile count for by their attention alone [128], none of them nothing: a twentieth of
/// the mean is added. Empty where no query has looked.
std::vector<double> attention_by_token(const TokenAttention& attention, Index head);

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/cache/impl/token_attention.hpp"
#endif
