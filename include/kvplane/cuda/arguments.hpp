// kvplane/cuda/arguments.hpp: what kernels take: plain structs of pointers and numbers.
//
// Offsets are in bytes unless they say otherwise. Nothing here knows of caches, so that nvcc can read it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/quantize/grid.hpp"

namespace kvplane::cuda {

/// A tile of a cache in device memory, as attention kernels find it.
struct DeviceTile {
    const std::byte* page;
    std::int32_t first;   ///< position of the first token
    std::int32_t row;     ///< in which row of the tile that one is
    std::int32_t tokens;  ///< up to 128
    std::int32_t shift;   ///< by how many positions tokens have moved back since they were stored

    friend bool operator==(const DeviceTile&, const DeviceTile&) = default;
};

namespace detail {

/// Tokens of a tile, of a page of recent ones, and of what a block turns to floats at a time.
inline constexpr int tile_rows = 128, recent_rows = 32, step_rows = 32;

/// Elements of input, kvplane::ScalarType as numbers.
enum : std::int32_t { input_float, input_half, input_bfloat };

struct InputView {
    const void* data;
    std::int32_t type;
    std::int32_t in_fours, in_eights;  ///< whether so many channels may be loaded at once
    std::int64_t token_stride, head_stride, channel_stride;  ///< in elements
};

/// Where a page of tokens outside tiles has those of one side.
struct RowPlace {
    std::int64_t rows_at, steps_at;
    std::int32_t bits;      ///< 16: fp16; 8: codes; 32: no such rows, tokens go into tiles as they come
    std::int32_t capacity;  ///< rows of a head
};

/// Keys or values on their way in.
struct Side {
    InputView input;
    const float* signs;  ///< [dim] of the rotation; nullptr: none
    std::int32_t dim;    ///< channels of a head
    float largest;       ///< the largest magnitude that may be stored
    RowPlace recent;
};

/// What kernels find out of the tokens of an append, all by raising numbers from 0.
struct Findings {
    std::uint32_t largest[2];  ///< bits of the largest magnitude stored, of keys and of values
    std::uint32_t bad[2];      ///< the complement of the first token that cannot be stored; 0: none
    std::uint64_t excess[2];   ///< bits, as double, of the largest error beyond what grids say
};

/// A change of one entry of a table of tiles; no entry: none.
struct TileChange {
    DeviceTile* entry;
    DeviceTile tile;
};

/// Tokens that become rows of pages. A block takes `rows_of_block` tokens of one side and head.
struct RowsArguments {
    static constexpr int most_pages = 64;
    static constexpr int rows_of_block = 8;

    Side sides[2];
    RowPlace places[2];  ///< of the pages that are written
    std::int32_t side_count, heads;
    std::int64_t first;       ///< token of the input
    std::int32_t count, row;  ///< tokens, and the row of the first page that the first one goes to
    std::int32_t page_rows;   ///< rows of a page
    Findings* findings;
    std::byte* pages[most_pages];
};

/// Consecutive channels of a tile, kvplane::TileFormat::Placed as numbers.
struct Segment {
    std::int32_t first_channel, channels, bits;
    Scheme scheme;
    std::int32_t
        by_channel;  ///< a grid for each channel of `group` tokens; otherwise for `group` channels of a token
    std::int32_t group, runs;
    std::int32_t planes, width[3], shift[3], low_byte[3], plane_at[3];
    std::int32_t step_at, lower_at, exponent_at;
};
struct Format {
    std::int32_t first_segment, segments;  ///< in a list of all
    std::int32_t keys;                     ///< whether lanes of units are tokens
    std::int32_t channels, grid_end, plane_begin;
};

/// What the items of a launch have in common. A kernel of one kind has a fraction of the instructions that any
/// tile may need, of which it waits for fewer.
enum TileKind : std::int32_t {
    tiles_any,
    tiles_of_halves,   ///< fp16, of the input as it is
    tiles_of_codes,    ///< codes of fp16 rows, by extremes
    tiles_staged,      ///< codes of rows that are rotated or rounded to 8 bits on the way
    tiles_of_latents,  ///< codes of latents
};

/// What one block encodes of every tile: some channels and tokens.
struct Item {
    std::int32_t side, head, format;
    std::int32_t at;  ///< of the tile in its page
    std::int32_t first_segment, segments;
    std::int32_t first_channel, channels;  ///< of the tile; within a segment they begin at a multiple of 32
    std::int32_t first_row, rows;
    std::int32_t resident_rows;  ///< how many a block takes to its shared memory at a time, a power of two
    std::int32_t spans_tokens;   ///< whether grids span all resident rows
    std::int32_t halves;         ///< whether shared memory holds fp16 numbers
    std::int32_t direct;         ///< whether planes are made of the input itself: all channels are fp16
    std::int32_t staged;         ///< whether rows are rotated or rounded to 8 bits on the way
    std::int32_t latent_at;      ///< in floats, of a subspace among the latents of a tile; -1: not in latents
    std::int32_t latent_stride;
    std::int32_t clears;  ///< whether it is this block that makes the room between grids and planes zero
};

/// Where the tokens of tiles come from: recent tokens first, input behind them.
struct TileSources {
    static constexpr int most_tiles = 32;

    std::int64_t
        first;  ///< token of the input that is the first of the first tile; below 0: it is a recent one
    const std::byte* recent[most_tiles][tile_rows / recent_rows];
};

/// Tokens that become tiles.
struct TilesArguments {
    Side sides[2];
    const Item* items;
    const Format* formats;
    const Segment* segments;
    std::int32_t item_count, tile_count;
    TileKind kind;               ///< of all items
    std::int32_t from, to;       ///< rows of each tile that are written
    std::int32_t fresh;          ///< whether all others become zero; otherwise they stay
    std::int64_t latent_stride;  ///< floats from tile to tile
    float* latents;
    Findings* findings;
    TileChange change;
    std::byte* pages[TileSources::most_tiles];
    TileSources sources;
};

/// A subspace of latents. Positions in floats.
struct Subspace {
    std::int32_t first_channel, channels, kept;
    std::int32_t latent_at,
        latent_stride;  ///< of a tile's latents: where they begin, and from token to token
    const float *to_latents, *from_latents;  ///< [channels][latent_stride], [kept][channels padded to 32]
    const float* mean;                       ///< [channels]
};

/// Keys of tiles in the frame of their basis, less its mean: [tile][128][all_channels].
struct CentreArguments {
    Side side;
    std::int32_t heads, tile_count, rotates_back;
    std::int32_t pair_count;    ///< pairs of channels of a head that RoPE turns
    const std::int32_t* pairs;  ///< [pair][2]
    const float* angles;        ///< [tile][128, or 1 where all rows turn alike][pair][2]: cosine, sine
    std::int32_t angles_by_row;
    const float* mean;  ///< [all_channels]
    float* centred;
    Findings* findings;
    TileSources sources;
};

/// Products of centred keys with the columns of a basis, and of latents with those of its inverse.
struct ProductArguments {
    static constexpr int rows_of_block = 64, columns_of_block = 64, depth = 32;

    const Subspace* subspaces;
    std::int32_t subspace_count, strips;  ///< strips of columns_of_block columns, the most of any subspace
    std::int32_t tile_count, back;        ///< back: from latents
    std::int32_t all_channels;
    std::int64_t latent_stride;
    float *centred, *latents;
    Findings* findings;
};

}  // namespace detail
}  // namespace kvplane::cuda
