// kvplane/cuda/tile_planes.hpp: codes of the rows that a block has in shared memory, and the planes of a tile
// made of them.
//
// A thread makes the codes of some tokens times some channels and packs them in its registers. Lanes are what
// words of a plane belong to, tokens of keys and channels of values; a lane has `depth` codes, as many as
// fill a word of the narrowest plane. Lanes are 4, words of 16 bytes, or 2 where 32 codes fill a word.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/block.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/input.hpp"
#include "kvplane/cuda/numbers.hpp"
#include "kvplane/cuda/tile_work.hpp"
#include "kvplane/storage/planes.hpp"

namespace kvplane::cuda::detail {

// Planes
// -----------------------------------------------------------------------------------------------------

/// Codes of some lanes, four bytes a word: [lane][code / 4].
template <int lanes_, int depth_>
struct PackedCodes {
    static constexpr int lanes = lanes_, depth = depth_;
    std::uint32_t four[lanes][depth / 4];
};

/// Word j of a plane of each lane.
template <int width, class Codes>
KVPLANE_DEVICE void words_of(const Codes& codes, int shift, int j, std::uint32_t (&words)[Codes::lanes]) {
    constexpr int fours = 8 / width;  // of codes a word
    constexpr std::uint32_t mask = 0x01010101u * ((1u << width) - 1u);
    KVPLANE_UNROLL
    for (int lane = 0; lane < Codes::lanes; ++lane) {
        words[lane] = codes.four[lane][j * fours] >> shift & mask;
        KVPLANE_UNROLL
        for (int k = 1; k < fours; ++k)
            words[lane] |= (codes.four[lane][j * fours + k] >> shift & mask) << k * width;
    }
}
template <int lanes>
KVPLANE_DEVICE void store_words(std::byte* to, const std::uint32_t (&words)[lanes]) {
    if constexpr (lanes == 4)
        *reinterpret_cast<FourWords*>(to) = {words[0], words[1], words[2], words[3]};
    else
        *reinterpret_cast<TwoWords*>(to) = {words[0], words[1]};
}
/// Bit i is set where token `token` + i, i < 32, is written.
KVPLANE_DEVICE inline std::uint32_t covered_tokens(const TilesArguments& a, int token) {
    const int begin = a.from - token, end = a.to - token;
    const std::uint32_t before = begin <= 0    ? 0u
                                 : begin >= 32 ? ~0u
                                               : (1u << begin) - 1u,
                        up_to = end <= 0    ? 0u
                                : end >= 32 ? ~0u
                                            : (1u << end) - 1u;
    return up_to & ~before;
}
/// Words of which the bits of others stay: lane i's where lane_bits has bit i, of these the bits of codes
/// that code_bits has.
KVPLANE_DEVICE_APART inline void merge_words(std::uint32_t* to, int lanes, std::uint32_t a, std::uint32_t b,
                                             std::uint32_t c, std::uint32_t d, std::uint32_t lane_bits,
                                             std::uint32_t code_bits, int width) {
    std::uint32_t written = 0;
    KVPLANE_KEEP_ROLLED
    for (int i = 0; i < 32 / width; ++i)
        if (code_bits >> i & 1u) written |= ((1u << width) - 1u) << (i % 4 * 8 + i / 4 * width);
    KVPLANE_KEEP_ROLLED
    for (int lane = 0; lane < lanes; ++lane) {
        if (lane_bits >> lane & 1u) to[lane] = (a & written) | (to[lane] & ~written);
        a = b, b = c, c = d;
    }
}
template <int width, int lanes>
KVPLANE_DEVICE void merge(std::byte* to, const std::uint32_t (&words)[lanes], std::uint32_t lane_bits,
                          std::uint32_t code_bits) {
    merge_words(reinterpret_cast<std::uint32_t*>(to), lanes, words[0], words[1],
                lanes > 2 ? words[lanes - 2] : 0u, lanes > 2 ? words[lanes - 1] : 0u, lane_bits, code_bits,
                width);
}

/// A plane of keys of one width: tokens token, .. of the tile, channels c, .. of the part.
template <int width, class Of, class Codes>
KVPLANE_DEVICE void pack_keys(const TileWork<Of>& work, const SegmentPart& part, std::byte* plane, int shift,
                              const Codes& codes, int token, int c) {
    constexpr int depth = 32 / width, words_of_lane = Codes::depth / depth;
    const int units = (part.segment_channels + depth - 1) / depth,
              ends = (part.channels - c + depth - 1) / depth;
    std::byte* const to = plane + ((token / 16 * units + (part.first + c) / depth) * 16 + token % 16) * 4;
    KVPLANE_UNROLL
    for (int j = 0; j < words_of_lane; ++j) {
        if (j > 0 && j >= ends) break;
        std::uint32_t words[Codes::lanes];
        words_of<width>(codes, shift, j, words);
        if (work.a.fresh)
            store_words(to + j * 64, words);
        else
            merge<width>(to + j * 64, words, covered_tokens(work.a, token), ~0u);
    }
}
/// A plane of values of one width: channels c, .. of the part, tokens token, .. of the tile.
template <int width, class Of, class Codes>
KVPLANE_DEVICE void pack_values(const TileWork<Of>& work, const SegmentPart& part, std::byte* plane,
                                int shift, const Codes& codes, int token, int c) {
    constexpr int depth = 32 / width, units = tile_rows / depth;
    std::byte* const to = plane + ((((part.first + c) / 16) * units + token / depth) * 16 + c % 16) * 4;
    KVPLANE_UNROLL
    for (int j = 0; j < Codes::depth / depth; ++j) {
        std::uint32_t words[Codes::lanes];
        words_of<width>(codes, shift, j, words);
        if (work.a.fresh)
            store_words(to + j * 64, words);
        else
            merge<width>(to + j * 64, words, ~0u, covered_tokens(work.a, token + j * depth));
    }
}

/// Where the planes of a segment are: the narrowest, which is the last one; before it one of 2 bits where
/// that is wider, and one of 4. (4 + 4 bits have two of 4.)
struct PlacedPlanes {
    std::byte *last = nullptr, *twos = nullptr, *fours = nullptr;
    int shift_of_twos = 0, shift_of_fours = 0;

    KVPLANE_DEVICE PlacedPlanes(const Segment& segment, std::byte* tile) {
        KVPLANE_UNROLL
        for (int p = 0; p < PlaneSplit::max_planes; ++p) {
            if (p >= segment.planes) continue;
            std::byte* const at = tile + segment.plane_at[p];
            if (p == segment.planes - 1) {
                last = at;
            } else if (segment.width[p] == 4) {
                fours = at;
                shift_of_fours = segment.shift[p];
            } else {
                twos = at;
                shift_of_twos = segment.shift[p];
            }
        }
    }
    /// pack(width, plane, shift) for each of them.
    template <int narrowest, class Pack>
    KVPLANE_DEVICE void each(const Pack& pack) const {
        if (fours) pack(Constant<4>{}, fours, shift_of_fours);
        if constexpr (narrowest == 1)
            if (twos) pack(Constant<2>{}, twos, shift_of_twos);
        pack(Constant<narrowest>{}, last, 0);
    }
};

// Codes
// ------------------------------------------------------------------------------------------------------

/// The grids of a part of a segment, and which of them is whose.
struct GridsOfPart {
    const TwoFloats* cells;
    const float* steps;
    int by_channel, rows, group, runs;
    float last;    ///< code
    float centre;  ///< of codes without bias, which stand for code + centre steps

    template <class Of>
    KVPLANE_DEVICE GridsOfPart(const TileWork<Of>& work, const Segment& segment)
        : cells(work.cells()),
          steps(work.steps()),
          by_channel(segment.by_channel),
          rows(work.count),
          group(segment.group),
          runs(segment.runs),
          last(static_cast<float>((1 << segment.bits) - 1)),
          centre(0.5f - 0.5f * static_cast<float>(1 << segment.bits)) {}

    /// Whether the grids of eight channels of a row lie side by side or are one.
    KVPLANE_DEVICE bool in_eights() const { return by_channel || runs == 1 || group % 8 == 0; }
    KVPLANE_DEVICE int index(int c, int row) const {
        if (by_channel) return c;
        if (runs == 1) return row;
        const int run = c / group;  // behind the last channel there is none
        return (run < runs ? run : runs - 1) * rows + row;
    }
    /// The grids of channels c, c + 1, .., by channel.
    template <int count>
    KVPLANE_DEVICE void load_channels(int c, float (&lower)[count], float (&inverse)[count]) const {
        KVPLANE_UNROLL
        for (int j = 0; j < count; j += 2) {
            const FourFloats two = *reinterpret_cast<const FourFloats*>(cells + c + j);
            lower[j] = two.at[0];
            inverse[j] = two.at[1];
            lower[j + 1] = two.at[2];
            inverse[j + 1] = two.at[3];
        }
    }
    /// One grid for all.
    template <int count>
    KVPLANE_DEVICE void load_one(int index, float (&lower)[count], float (&inverse)[count]) const {
        const TwoFloats one = cells[index];
        KVPLANE_UNROLL
        for (int j = 0; j < count; ++j) {
            lower[j] = one.at[0];
            inverse[j] = one.at[1];
        }
    }
};

/// The largest error of codes without bias beyond half a step, of channels of a token that share a grid.
template <int count>
KVPLANE_DEVICE float beyond_half_step(const float (&x)[count], const float (&cell)[count], float centre,
                                      float step, int left) {
    float most = 0.0f;
    KVPLANE_UNROLL
    for (int j = 0; j < count; ++j) {
        const float q = sum_of(number_of_cell(cell[j]), centre),
                    error = magnitude_of(difference_of(x[j], product_of(q, step)));
        most = j < left ? greater_of(most, error) : most;
    }
    // Rounding keeps the order of numbers, so that the largest difference is that of the largest error.
    return difference_of(most, 0.5f * step);
}

/// Whose grids are whose, as code is compiled for it.
enum : int { grids_by_channel, grids_by_row, grids_unbiased };

/// Codes of keys: tokens row, .. of the resident ones, channels c, .. of the part. Zero where there is none.
template <int kind, class Of, class Codes>
KVPLANE_DEVICE void make_keys(const TileWork<Of>& work, const SegmentPart& part, const GridsOfPart& grids,
                              int row, int c, Codes& codes, float& beyond) {
    KVPLANE_UNROLL
    for (int e = 0; e < Codes::depth / 8; ++e) {
        const int at = c + 8 * e;
        float lower[8], inverse[8];
        int of_rows = 0;
        if constexpr (kind == grids_by_channel)
            grids.load_channels(at, lower, inverse);
        else
            of_rows = grids.index(at, row);
        KVPLANE_UNROLL
        for (int t = 0; t < Codes::lanes; ++t) {
            if constexpr (kind != grids_by_channel) grids.load_one(of_rows + t, lower, inverse);
            float x[8], cell[8];
            load_numbers<8>(work.rows.at(row + t, part.column + at), x);
            KVPLANE_UNROLL
            for (int j = 0; j < 8; ++j) cell[j] = cell_of(x[j], lower[j], inverse[j], grids.last);
            codes.four[t][2 * e] = codes_of_cells(cell[0], cell[1], cell[2], cell[3]);
            codes.four[t][2 * e + 1] = codes_of_cells(cell[4], cell[5], cell[6], cell[7]);
            // Rows that are not written are zero, and so are their steps and errors.
            if constexpr (kind == grids_unbiased)
                beyond = greater_of(beyond, beyond_half_step(x, cell, grids.centre, grids.steps[of_rows + t],
                                                             part.channels - at));
        }
    }
    const int left = part.channels - c;
    if (left >= Codes::depth && work.covers(work.base + row, Codes::lanes)) return;
    KVPLANE_UNROLL
    for (int t = 0; t < Codes::lanes; ++t) {
        const bool covered = work.covers(work.base + row + t);
        KVPLANE_UNROLL
        for (int k = 0; k < Codes::depth / 4; ++k) {
            const int kept = covered ? left - 4 * k : 0;
            codes.four[t][k] &= kept >= 4 ? ~0u : kept <= 0 ? 0u : (1u << 8 * kept) - 1u;
        }
    }
}
/// The same of values: channels c, .. and tokens row, ..
template <int kind, class Of, class Codes>
KVPLANE_DEVICE void make_values(const TileWork<Of>& work, const SegmentPart& part, const GridsOfPart& grids,
                                int row, int c, Codes& codes, float& beyond) {
    constexpr int channels = Codes::lanes;
    const int left = part.channels - c;
    float lower[channels], inverse[channels];
    int of_rows = 0;
    if constexpr (kind == grids_by_channel)
        grids.load_channels(c, lower, inverse);
    else
        of_rows = grids.index(c, row);
    const typename Of::Value* from = work.rows.at(row, part.column + c);
    KVPLANE_UNROLL
    for (int q = 0; q < Codes::depth / 4; ++q) {
        float cell[4][channels];
        KVPLANE_UNROLL
        for (int t = 0; t < 4; ++t) {
            float x[channels];
            if constexpr (kind != grids_by_channel) grids.load_one(of_rows + 4 * q + t, lower, inverse);
            load_numbers<channels>(from, x);
            from += work.rows.pitch;
            KVPLANE_UNROLL
            for (int j = 0; j < channels; ++j) cell[t][j] = cell_of(x[j], lower[j], inverse[j], grids.last);
            if constexpr (kind == grids_unbiased)
                beyond = greater_of(beyond, beyond_half_step(x, cell[t], grids.centre,
                                                             grids.steps[of_rows + 4 * q + t], left));
        }
        KVPLANE_UNROLL
        for (int j = 0; j < channels; ++j)
            codes.four[j][q] = codes_of_cells(cell[0][j], cell[1][j], cell[2][j], cell[3][j]);
    }
    if (left >= channels && work.covers(work.base + row, Codes::depth)) return;
    const std::uint32_t covered = covered_tokens(work.a, work.base + row);
    KVPLANE_UNROLL
    for (int q = 0; q < Codes::depth / 4; ++q) {
        // A bit to a byte of ones.
        const std::uint32_t kept = ((covered >> 4 * q & 0xFu) * 0x00204081u & 0x01010101u) * 0xFFu;
        KVPLANE_UNROLL
        for (int j = 0; j < channels; ++j) codes.four[j][q] &= j < left ? kept : 0u;
    }
}

/// The words of planes one by one, where eights of channels have several grids.
template <class Of>
KVPLANE_DEVICE void encode_words(const TileWork<Of>& work, const SegmentPart& part, const GridsOfPart& grids,
                                 bool keys, int thread, int threads) {
    const Segment& segment = part.segment;
    KVPLANE_KEEP_ROLLED
    for (int p = 0; p < segment.planes; ++p) {
        const int width = segment.width[p], depth = 32 / width,
                  units = ((keys ? segment.channels : tile_rows) + depth - 1) / depth;
        // Lanes, and words of each of them.
        const int lanes = keys ? work.count : (part.channels + 15) / 16 * 16,
                  deep = keys ? (part.channels + depth - 1) / depth : work.count / depth;
        KVPLANE_KEEP_ROLLED
        for (int i = thread; i < lanes * deep; i += threads) {
            const int lane = i % lanes, first = i / lanes * depth,
                      of_tile = lane + (keys ? work.base : part.first),
                      begin = first + (keys ? part.first : work.base);
            std::uint32_t word = 0, written = 0;
            KVPLANE_KEEP_ROLLED
            for (int k = 0; k < depth; ++k) {
                const int row = keys ? lane : first + k, c = keys ? first + k : lane;
                const std::uint32_t mask = (1u << width) - 1u;
                const int at = k % 4 * 8 + k / 4 * width;
                if (work.a.fresh || work.covers(work.base + row)) written |= mask << at;
                if (c >= part.channels || !work.covers(work.base + row)) continue;
                const TwoFloats grid = grids.cells[grids.index(c, row)];
                const std::uint32_t code = bits_of(
                    cell_of(number(*work.rows.at(row, part.column + c)), grid.at[0], grid.at[1], grids.last));
                word |= (code >> segment.shift[p] & mask) << at;
            }
            auto* const to = reinterpret_cast<std::uint32_t*>(
                work.tile + segment.plane_at[p] +
                ((of_tile / 16 * units + begin / depth) * 16 + of_tile % 16) * 4);
            if (written == ~0u)
                *to = word;
            else if (written != 0)
                *to = (word & written) | (*to & ~written);
        }
    }
}

/// By how much numbers lie outside grids that clip or, without bias, errors exceed half a step, one by one.
template <class Of, class Block>
KVPLANE_DEVICE void measure_codes(const Block& block, const TileWork<Of>& work, const SegmentPart& part) {
    const Segment& segment = part.segment;
    block.run([&](int thread, int threads) {
        const GridsOfPart grids(work, segment);
        const float codes = static_cast<float>(1 << segment.bits);
        const ThreadGrid grid(thread, threads, part.channels, 32);
        float beyond = 0.0f;
        double excess = 0.0;
        KVPLANE_KEEP_ROLLED
        for (int row = grid.row; row < work.count; row += grid.rows) {
            if (!work.covers(work.base + row)) continue;
            KVPLANE_KEEP_ROLLED
            for (int c = grid.column; c < part.channels; c += grid.columns) {
                const int at = grids.index(c, row);
                const float step = grids.steps[at], lower = grids.cells[at].at[0],
                            x[1] = {number(*work.rows.at(row, part.column + c))};
                if (segment.scheme == Scheme::unbiased) {
                    const float cell[1] = {cell_of(x[0], lower, grids.cells[at].at[1], grids.last)};
                    beyond = greater_of(beyond, beyond_half_step(x, cell, grids.centre, step, 1));
                    continue;
                }
                const float upper = sum_of(lower, product_of(step, codes)), least = lesser_of(lower, upper),
                            most = greater_of(lower, upper);
                if (step == 0.0f || (x[0] >= least && x[0] <= most)) continue;
                const double value = x[0], outside = x[0] < least ? least - value : value - most;
                excess = excess < outside ? outside : excess;
            }
        }
        if (excess < beyond) excess = static_cast<double>(beyond);
        if (excess > 0.0) raise(&work.found->excess[work.item.side], excess);
    });
}
/// Puts what codes of latents stand for in the place of the latents, to be measured.
template <class Of, class Block>
KVPLANE_DEVICE void keep_decoded(const Block& block, const TileWork<Of>& work, const SegmentPart& part) {
    float* const latents =
        work.a.latents + work.tile_index * work.a.latent_stride + work.item.latent_at + part.channel;
    block.run([&](int thread, int threads) {
        const GridsOfPart grids(work, part.segment);
        const ThreadGrid grid(thread, threads, part.channels, 32);
        for (int c = grid.column; c < part.channels; c += grid.columns) KVPLANE_UNROLL_FEW
        for (int row = grid.row; row < work.count; row += grid.rows) {
            if (!work.covers(work.base + row)) continue;
            const int at = grids.index(c, row);
            const TwoFloats of = grids.cells[at];
            const float cell =
                cell_of(number(*work.rows.at(row, part.column + c)), of.at[0], of.at[1], grids.last);
            latents[static_cast<std::int64_t>(work.base + row) * work.item.latent_stride + c] =
                sum_of(of.at[0], product_of(grids.steps[at], sum_of(number_of_cell(cell), 0.5f)));
        }
    });
}

/// Codes and planes of a part of a segment with grids, of the resident rows.
template <int narrowest, int kind, class Of>
KVPLANE_DEVICE_INLINED float encode_part(const TileWork<Of>& work, const SegmentPart& part,
                                         const GridsOfPart& grids, bool keys, int thread, int threads) {
    constexpr int depth = 32 / narrowest, lanes = depth == 32 ? 2 : 4;
    const PlacedPlanes planes(part.segment, work.tile);
    float beyond = 0.0f;
    if (keys) {
        // Eight threads side by side have eights of one row, which meet all banks, and whole units.
        const ThreadGrid grid(thread, threads, (part.channels + depth - 1) / depth, 8);
        KVPLANE_KEEP_ROLLED
        for (int c = grid.column * depth; c < part.channels; c += grid.columns * depth) KVPLANE_KEEP_ROLLED
        for (int row = grid.row * lanes; row < work.count; row += grid.rows * lanes) {
            PackedCodes<lanes, depth> codes;
            make_keys<kind>(work, part, grids, row, c, codes, beyond);
            planes.each<narrowest>([&](auto width, std::byte* plane, int shift) {
                pack_keys<decltype(width)::count>(work, part, plane, shift, codes, work.base + row, c);
            });
        }
        return beyond;
    }
    const int channels = (part.channels + 15) / 16 * 16;
    const ThreadGrid grid(thread, threads, channels / lanes, 32);
    KVPLANE_KEEP_ROLLED
    for (int c = grid.column * lanes; c < channels; c += grid.columns * lanes) KVPLANE_KEEP_ROLLED
    for (int row = grid.row * depth; row < work.count; row += grid.rows * depth) {
        PackedCodes<lanes, depth> codes;
        make_values<kind>(work, part, grids, row, c, codes, beyond);
        planes.each<narrowest>([&](auto width, std::byte* plane, int shift) {
            pack_values<decltype(width)::count>(work, part, plane, shift, codes, work.base + row, c);
        });
    }
    return beyond;
}
template <class Of, class Block>
KVPLANE_DEVICE_INLINED void encode_codes(const Block& block, const TileWork<Of>& work,
                                         const SegmentPart& part) {
    const Segment& segment = part.segment;
    const bool keys = work.a.formats[work.item.format].keys;
    block.run([&](int thread, int threads) {
        const GridsOfPart grids(work, segment);
        if constexpr (Of::any)
            if (!grids.in_eights()) return encode_words(work, part, grids, keys, thread, threads);
        const int kind = segment.by_channel                   ? grids_by_channel
                         : segment.scheme == Scheme::unbiased ? grids_unbiased
                                                              : grids_by_row;
        // Where nothing is unbiased, rows stand here twice, and the second is not reached.
        constexpr int last_kind = Of::has_unbiased ? grids_unbiased : grids_by_row;
        float beyond = 0.0f;
        with_bits<4, 2, 1>(segment.width[segment.planes - 1], [&](auto narrowest) {
            with_bits<grids_by_channel, grids_by_row, last_kind>(kind, [&](auto of) {
                beyond = encode_part<decltype(narrowest)::count, decltype(of)::count>(work, part, grids, keys,
                                                                                      thread, threads);
            });
        });
        if (beyond > 0.0f) raise(&work.found->excess[work.item.side], static_cast<double>(beyond));
    });
    if constexpr (Of::any)
        if (segment.scheme == Scheme::full_range ||
            (segment.scheme == Scheme::unbiased && segment.runs > 1 && segment.group % 8 != 0))
            measure_codes(block, work, part);
    if constexpr (Of::has_latents)
        if (work.item.latent_at >= 0) keep_decoded(block, work, part);
}

}  // namespace kvplane::cuda::detail
