// kvplane/cuda/fragments.hpp: which lane of a warp holds which codes of a tile.
//
// The tensor-core product m16n8k32 multiplies A (16 rows x 32, bytes) by B (32 x 8 columns, bytes). Lane 4 g
// + t holds column g of B, and along the product two words of four bytes, which are its own: the lanes of
// equal t hold the same places of all columns, and A in the same places. So any order of the places along the
// product will do, as long as A has the same. Here each lane takes what the words of the stored planes hold:
//
//   keys     a column is a token, the product runs over channels. The lane of quarter t holds *chunks* of
//            consecutive channels, chunk 4 q + t for q = 0, 1, ...; a product takes an *octet*, eight
//            channels of a chunk. A 32-bit word of a 4-bit plane is one octet: its low and its high halves of
//            bytes are the two words of B.
//   values   a column is a channel, the product runs over tokens. The lane of quarter t holds *quads* of four
//            consecutive tokens; a product takes two of them, quads 2 m and 2 m + 1.
//
// A chunk is as many channels (tokens) as a word of the narrowest plane holds, so that no word is read twice;
// or 8 where widths differ and the kernel must not depend on them.
//
// The product of queries and keys leaves in lane 4 g + t the scores of columns 2 t and 2 t + 1 of row g.
// Columns stand for tokens in such an order (score_token) that these are the lane's own quads of tokens: the
// product of weights and values then begins where that of queries and keys has ended, without an exchange
// between lanes.
//
// Everything here is plain arithmetic, so that tests walk through all of it on the host.
#pragma once

#include <cstdint>

#include "kvplane/cuda/device.hpp"
#include "kvplane/storage/planes.hpp"

namespace kvplane::cuda {

/// Codes in a 32-bit word of the narrowest plane of a width.
constexpr int least_chunk(int bits) noexcept {
    const PlaneSplit split = plane_split(bits);
    const int chunk = 32 / split[split.count - 1];
    return chunk < 8 ? 8 : chunk;
}

/// Octets that each lane holds of `channels` channels.
constexpr int octets_of(int channels, int chunk) noexcept {
    return (channels + 4 * chunk - 1) / (4 * chunk) * (chunk / 8);
}

/// The first channel of an octet of the lanes of a quarter.
template <class Word>
KVPLANE_DEVICE constexpr Word octet_channel(int octet, Word quarter, int chunk) noexcept {
    const int round = octet / (chunk / 8), part = octet % (chunk / 8);
    return quarter * static_cast<std::uint32_t>(chunk) +
           static_cast<std::uint32_t>(round * 4 * chunk + part * 8);
}

/// The first token of a quad, 0 to 7, of the lanes of a quarter.
template <class Word>
KVPLANE_DEVICE constexpr Word quad_token(int quad, Word quarter, int chunk) noexcept {
    const int round = 4 * quad / chunk, part = 4 * quad % chunk;
    return quarter * static_cast<std::uint32_t>(chunk) + static_cast<std::uint32_t>(round * 4 * chunk + part);
}

/// The first token of the four that column `column` stands for in the four products (m, 0) to (m, 3) of
/// scores.
template <class Word>
KVPLANE_DEVICE constexpr Word score_token(int m, Word column, int chunk) noexcept {
    const Word even = quad_token(2 * m, column >> 1, chunk), odd = quad_token(2 * m + 1, column >> 1, chunk);
    return even + (odd - even) * (column & 1u);
}

/// Bytes of the plane before the word of token `token` in unit `unit`, of a plane of keys with so many units
/// a block of 16 tokens; of four tokens where `token` is a multiple of 4.
template <class Word>
KVPLANE_DEVICE constexpr Word key_word(Word token, Word unit, std::uint32_t units) noexcept {
    return (token >> 4) * (units * 64u) + unit * 64u + (token & 15u) * 4u;
}
/// The same of values: the word of channel `channel` in unit `unit` of tokens.
template <class Word>
KVPLANE_DEVICE constexpr Word value_word(Word channel, Word unit, std::uint32_t units) noexcept {
    return (channel >> 4) * (units * 64u) + unit * 64u + (channel & 15u) * 4u;
}

/// A byte 1 << bits in each byte of a word, less one: the mask of four codes.
constexpr std::uint32_t code_mask(int bits) noexcept {
    return ((1u << bits) - 1u) * 0x01010101u;
}

}  // namespace kvplane::cuda
