// kvplane/cuda/encode.hpp: tokens to rows of pages and to tiles, by the threads of a block.
//
// A function here is what one block does, in phases: block.run(phase) calls phase(thread, threads) for every
// thread and waits for all of them. On a device the threads are a block's; on the host a loop takes their
// place (HostBlock), so that the bytes can be compared with those of KvCache where there is no device.
// Between phases nothing is kept but shared and global memory.
//
// Shared memory of a tile's block: the rows of the group of tokens that share grids, as fp16 or floats; their
// grids; partial results, and in their place codes of one byte. Rows are longer by 4 elements for each 32, so
// that the passes of a rotation meet all banks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/numbers.hpp"

namespace kvplane::cuda::detail {

/// A block of threads that one thread of the host stands for.
struct HostBlock {
    int threads = 64;
    bool backwards = false;  ///< the last thread first: a phase in which threads wait for each other shows

    template <class Phase>
    void run(const Phase& phase) const {
        for (int i = 0; i < threads; ++i) phase(backwards ? threads - 1 - i : i, threads);
    }
};

#if defined(__CUDACC__)
/// The block that runs.
struct DeviceBlock {
    template <class Phase>
    __device__ void run(const Phase& phase) const {
        phase(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
        __syncthreads();
    }
};
#endif

/// Division by a number that is a power of two more often than not.
struct Divisor {
    int by, shift;

    KVPLANE_DEVICE explicit Divisor(int number) : by(number), shift(-1) {
        if ((number & (number - 1)) != 0) return;
        shift = 0;
        while (1 << shift < number) ++shift;
    }
    /// For x >= 0.
    KVPLANE_DEVICE int quotient(int x) const { return shift >= 0 ? x >> shift : x / by; }
    KVPLANE_DEVICE int rest(int x) const { return shift >= 0 ? x & (by - 1) : x % by; }
};

// What threads share
// -----------------------------------------------------------------------------------------

KVPLANE_DEVICE inline void raise(std::uint32_t* where, std::uint32_t value) {
#if defined(__CUDA_ARCH__)
    atomicMax(where, value);
#else
    if (*where < value) *where = value;
#endif
}
KVPLANE_DEVICE inline void raise(std::uint64_t* where, double value) {
    std::uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
#if defined(__CUDA_ARCH__)
    atomicMax(reinterpret_cast<unsigned long long*>(where), static_cast<unsigned long long>(bits));
#else
    if (*where < bits) *where = bits;
#endif
}
/// raise() by all threads of a phase together.
KVPLANE_DEVICE inline void raise_together(std::uint32_t* where, std::uint32_t value) {
#if defined(__CUDA_ARCH__)
    value = __reduce_max_sync(0xFFFFFFFFu, value);
    if (threadIdx.x % 32 == 0 && value > 0) atomicMax(where, value);
#else
    raise(where, value);
#endif
}

/// Four numbers of consecutive elements that lie on a multiple of four.
struct alignas(16) FourFloats {
    float at[4];
};
struct alignas(8) FourHalves {
    std::uint16_t at[4];
};
struct alignas(16) FourWords {
    std::uint32_t at[4];
};

/// Where channel c of a row stands in shared memory.
KVPLANE_DEVICE constexpr int place_of(int c) {
    return c + c / 32 * 4;
}
/// Elements from row to row.
KVPLANE_DEVICE constexpr int pitch_of(int channels) {
    return (channels + 31) / 32 * 36;
}
KVPLANE_DEVICE constexpr int whole_units_of(int channels) {
    return (channels + 31) / 32 * 32;
}

/// Where a block keeps what; in bytes, multiples of 16.
struct SharedPlan {
    int resident, staging, codes, low_codes, lower, inverse, step, partial, row_grids, found, bytes;
    int pitch, staging_pitch, code_pitch, grids;
    int in_place;  ///< whether rows stay where they were staged
};
inline constexpr int grid_parts = 8, most_unbiased = 32;

KVPLANE_DEVICE inline SharedPlan shared_plan(const Item& item, const Segment* segments, int dim) {
    SharedPlan plan{};
    int bytes = 0, code_columns = 0, halves = 0, unbiased = 0;
    plan.grids = 0;
    for (int s = item.first_segment; s < item.first_segment + item.segments; ++s) {
        const Segment& segment = segments[s];
        const int end = item.first_channel + item.channels,
                  last = segment.first_channel + segment.channels < end
                             ? segment.first_channel + segment.channels
                             : end,
                  first =
                      segment.first_channel > item.first_channel ? segment.first_channel : item.first_channel;
        code_columns += whole_units_of(last - first);
        const int grids = segment.bits == 16   ? last - first
                          : segment.by_channel ? last - first
                                               : item.resident_rows * segment.runs;
        if (grids > plan.grids) plan.grids = grids;
        halves |= segment.bits == 16;
        unbiased |= segment.bits != 16 && segment.scheme == scheme_unbiased;
    }
    const auto take = [&bytes](int size) {
        const int at = bytes;
        bytes += (size + 15) / 16 * 16;
        return at;
    };
    plan.pitch = pitch_of(item.channels);
    plan.staging_pitch = pitch_of(dim);
    plan.code_pitch = code_columns + 4;
    plan.resident = take(item.resident_rows * plan.pitch * (item.halves ? 2 : 4));
    plan.in_place = item.staged && !item.halves && item.resident_rows == step_rows && item.channels == dim;
    plan.staging = plan.in_place ? plan.resident : take(item.staged ? step_rows * plan.staging_pitch * 4 : 0);
    plan.lower = take(plan.grids * 4);
    plan.inverse = take(plan.grids * 4);
    plan.step = take(plan.grids * 4);
    plan.row_grids = take(step_rows * 3 * 4);
    plan.found = take(static_cast<int>(sizeof(Findings)));
    // Grids are known when codes are made, so that these take the place of what led to them.
    int partial = 2 * grid_parts * plan.grids * 4;
    if (unbiased && partial < most_unbiased * 16 * 8 * 2) partial = most_unbiased * 16 * 8 * 2;
    if (partial < step_rows * grid_parts * 4) partial = step_rows * grid_parts * 4;
    plan.partial = plan.codes = bytes;
    const int codes = (item.code_rows * plan.code_pitch + 15) / 16 * 16;
    plan.low_codes = plan.codes + codes;
    (void)take(partial < codes * (halves ? 2 : 1) ? codes * (halves ? 2 : 1) : partial);
    plan.bytes = bytes;
    return plan;
}

/// Calls body(constant) with the number of a plane's bits.
template <int value>
struct Constant {
    static constexpr int count = value;
};
template <class Body>
KVPLANE_DEVICE void with_bits(int width, const Body& body) {
    switch (width) {
        case 1:
            return body(Constant<1>{});
        case 2:
            return body(Constant<2>{});
        case 4:
            return body(Constant<4>{});
        default:
            return body(Constant<8>{});
    }
}

// Input
// ------------------------------------------------------------------------------------------------------

KVPLANE_DEVICE inline float number_of(const InputView& input, std::int64_t at) {
    if (input.type == input_float) return static_cast<const float*>(input.data)[at];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(input.data)[at];
    return input.type == input_half ? widened(bits) : widened_bfloat(bits);
}
/// Up to four channels of a token and head from c on, a multiple of 4; zeros behind the last.
KVPLANE_DEVICE inline void load_four(const InputView& input, std::int64_t token, int head, int c,
                                     int channels, float (&x)[4]) {
    const std::int64_t at = token * input.token_stride + head * input.head_stride + c * input.channel_stride;
    if (input.in_fours) {
        if (input.type == input_float) {
            const FourFloats four =
                *reinterpret_cast<const FourFloats*>(static_cast<const float*>(input.data) + at);
            for (int i = 0; i < 4; ++i) x[i] = four.at[i];
        } else {
            const FourHalves four =
                *reinterpret_cast<const FourHalves*>(static_cast<const std::uint16_t*>(input.data) + at);
            for (int i = 0; i < 4; ++i)
                x[i] = input.type == input_half ? widened(four.at[i]) : widened_bfloat(four.at[i]);
        }
        return;
    }
    for (int i = 0; i < 4; ++i)
        x[i] = c + i < channels ? number_of(input, at + i * input.channel_stride) : 0.0f;
}

KVPLANE_DEVICE inline float number(std::uint16_t x) {
    return widened(x);
}
KVPLANE_DEVICE inline float number(float x) {
    return x;
}
KVPLANE_DEVICE inline void put(std::uint16_t* to, float x) {
    *to = nearest_half(x);
}
KVPLANE_DEVICE inline void put(float* to, float x) {
    *to = x;
}
KVPLANE_DEVICE inline void four_numbers(const std::uint16_t* from, float (&x)[4]) {
    const FourHalves four = *reinterpret_cast<const FourHalves*>(from);
    for (int i = 0; i < 4; ++i) x[i] = widened(four.at[i]);
}
KVPLANE_DEVICE inline void four_numbers(const float* from, float (&x)[4]) {
    const FourFloats four = *reinterpret_cast<const FourFloats*>(from);
    for (int i = 0; i < 4; ++i) x[i] = four.at[i];
}
KVPLANE_DEVICE inline void put_four(std::uint16_t* to, const float (&x)[4]) {
    FourHalves four;
    for (int i = 0; i < 4; ++i) four.at[i] = nearest_half(x[i]);
    *reinterpret_cast<FourHalves*>(to) = four;
}
KVPLANE_DEVICE inline void put_four(float* to, const float (&x)[4]) {
    FourFloats four;
    for (int i = 0; i < 4; ++i) four.at[i] = x[i];
    *reinterpret_cast<FourFloats*>(to) = four;
}

/// load(i, x), then use(i, x), for the items below `count` that are a thread's: four loads before the first
/// use.
template <class Load, class Use>
KVPLANE_DEVICE void loads_ahead(int thread, int threads, int count, const Load& load, const Use& use) {
    constexpr int ahead = 4;
    for (int first = thread; first < count; first += ahead * threads) {
        float x[ahead][4];
        KVPLANE_UNROLL
        for (int u = 0; u < ahead; ++u)
            if (first + u * threads < count) load(first + u * threads, x[u]);
        KVPLANE_UNROLL
        for (int u = 0; u < ahead; ++u)
            if (first + u * threads < count) use(first + u * threads, x[u]);
    }
}

// Rotation
// ---------------------------------------------------------------------------------------------------

/// Stages half, 2 half, .. of a rotation, `count` numbers at a time; the last ones also take the scale.
template <int count>
KVPLANE_DEVICE void rotate_some(float* row, int first, int half, float scale, const float* signs_after) {
    float x[count];
    KVPLANE_UNROLL
    for (int i = 0; i < count; ++i) x[i] = row[place_of(first + i * half)];
    KVPLANE_UNROLL
    for (int apart = 1; apart < count; apart *= 2) {
        KVPLANE_UNROLL
        for (int i = 0; i < count; ++i)
            if ((i & apart) == 0) {
                const float a = x[i], b = x[i + apart];
                x[i] = sum_of(a, b);
                x[i + apart] = difference_of(a, b);
            }
    }
    KVPLANE_UNROLL
    for (int i = 0; i < count; ++i) {
        const int c = first + i * half;
        if (scale != 1.0f) x[i] = product_of(x[i], scale);
        if (signs_after) x[i] = product_of(x[i], signs_after[c]);
        row[place_of(c)] = x[i];
    }
}
/// Replaces rows [begin, end) by their products with H / sqrt(n), block by block of the diagonal, and with
/// signs where these are given; transform/impl/hadamard.hpp, operation by operation.
template <class Block>
KVPLANE_DEVICE void rotate_rows(const Block& block, float* rows, int pitch, int begin, int end, int channels,
                                const float* signs_after) {
    // Two stages at first, then three at a time: with rows of their pitch, all of them meet different banks.
    for (int done = 0, stages = 2; 1 << done < channels; done += stages, stages = 3) {
        block.run([=](int thread, int threads) {
            for (int first = 0, log_size; first < channels; first += 1 << log_size) {
                log_size = 0;
                while (2 << log_size <= channels - first) ++log_size;
                if (done >= log_size) continue;
                const int of_block = stages < log_size - done ? stages : log_size - done, half = 1 << done;
                const bool last = done + of_block == log_size;
                const float scale =
                    last ? quotient_of(1.0f, root_of(static_cast<float>(1 << log_size))) : 1.0f;
                const float* const after = last ? signs_after : nullptr;
                const int log_groups = log_size - of_block;
                for (int item = thread; item < (end - begin) << log_groups; item += threads) {
                    float* const row = rows + (begin + (item >> log_groups)) * pitch;
                    const int group = item & ((1 << log_groups) - 1),
                              at = first + ((group >> done) << (done + of_block)) + (group & (half - 1));
                    if (of_block == 3)
                        rotate_some<8>(row, at, half, scale, after);
                    else if (of_block == 2)
                        rotate_some<4>(row, at, half, scale, after);
                    else
                        rotate_some<2>(row, at, half, scale, after);
                }
            }
        });
    }
    if (signs_after && channels % 2 == 1)  // a block of one, which no stage has touched
        block.run([=](int thread, int threads) {
            for (int row = begin + thread; row < end; row += threads)
                rows[row * pitch + place_of(channels - 1)] =
                    product_of(rows[row * pitch + place_of(channels - 1)], signs_after[channels - 1]);
        });
}

// Rows as they are stored outside tiles
// ------------------------------------------------------------------------

/// Where the grid of a row of 8 bits stands.
struct RowGrids {
    float *step, *lower, *inverse;  ///< [step_rows]
    KVPLANE_DEVICE explicit RowGrids(float* from)
        : step(from), lower(from + step_rows), inverse(lower + step_rows) {}
};

/// Takes tokens first + row of the input to the rows [begin, end) of `rows`, as floats in the frame in which
/// they are stored; checks them, and leaves the largest magnitude of each row in eight parts.
template <class Block>
KVPLANE_DEVICE void stage_rows(const Block& block, const Side& side, int head, std::int64_t first, int begin,
                               int end, float* rows, int pitch, float* partial, std::uint32_t* bad,
                               std::uint32_t* largest) {
    if (begin >= end) return;
    block.run([&](int thread, int threads) {
        const Divisor fours((side.dim + 3) / 4);
        loads_ahead(
            thread, threads, (end - begin) * fours.by,
            [&](int item, float(&x)[4]) {
                load_four(side.input, first + begin + fours.quotient(item), head, fours.rest(item) * 4,
                          side.dim, x);
            },
            [&](int item, float(&x)[4]) {
                const int row = begin + fours.quotient(item), c = fours.rest(item) * 4;
                float signs[4] = {1.0f, 1.0f, 1.0f, 1.0f};
                if (side.signs) four_numbers(side.signs + c, signs);
                bool good = true;
                for (int i = 0; i < 4; ++i) {
                    good &= magnitude_of(x[i]) <= 65504.0f;
                    x[i] = product_of(x[i], signs[i]);
                }
                put_four(rows + row * pitch + place_of(c), x);
                if (!good) raise(bad, ~static_cast<std::uint32_t>(first + row));
            });
    });
    if (side.signs) rotate_rows(block, rows, pitch, begin, end, side.dim, nullptr);
    block.run([&](int thread, int threads) {
        float most = 0.0f;
        for (int item = thread; item < (end - begin) * grid_parts; item += threads) {
            const int row = begin + item / grid_parts, part = item % grid_parts;
            float magnitude = 0.0f;
            for (int c = part; c < side.dim; c += grid_parts) {
                const float x = magnitude_of(rows[row * pitch + place_of(c)]);
                magnitude = magnitude < x ? x : magnitude;
            }
            partial[row * grid_parts + part] = magnitude;
            most = most < magnitude ? magnitude : most;
            if (!(magnitude <= side.largest)) raise(bad, ~static_cast<std::uint32_t>(first + row));
        }
        raise_together(largest, bits_of(most));
    });
}
/// The grids of rows of 8 bits, from what stage_rows() left.
template <class Block>
KVPLANE_DEVICE void fit_rows(const Block& block, int begin, int end, const float* partial, RowGrids grids) {
    if (begin >= end) return;
    block.run([=](int thread, int threads) {
        for (int row = begin + thread; row < end; row += threads) {
            float most = 0.0f;
            for (int part = 0; part < grid_parts; ++part) {
                const float x = partial[row * grid_parts + part];
                most = most < x ? x : most;
            }
            const FittedGrid grid = fitted_grid(scheme_symmetric, 8, -most, most);
            grids.step[row] = grid.step;
            grids.lower[row] = grid.lower;
            grids.inverse[row] = grid.inverse;
        }
    });
}

/// Tokens into rows of pages.
template <class Block>
KVPLANE_DEVICE void write_rows(const Block& block, const RowsArguments& a, int batch, int place,
                               std::byte* shared) {
    const int side_index = place / a.heads, head = place % a.heads;
    const Side& side = a.sides[side_index];
    const RowPlace& to = a.places[side_index];
    const int done = batch * RowsArguments::rows_of_block,
              count = a.count - done < RowsArguments::rows_of_block ? a.count - done
                                                                    : RowsArguments::rows_of_block;
    const int pitch = pitch_of(side.dim);
    float* const rows = reinterpret_cast<float*>(shared);
    float* const partial = rows + RowsArguments::rows_of_block * pitch;
    const RowGrids grids(partial + step_rows * grid_parts);
    stage_rows(block, side, head, a.first + done, 0, count, rows, pitch, partial,
               &a.findings->bad[side_index], &a.findings->largest[side_index]);
    if (to.bits == 8) fit_rows(block, 0, count, partial, grids);
    block.run([&](int thread, int threads) {
        const int fours = (side.dim + 3) / 4;
        for (int item = thread; item < count * fours; item += threads) {
            const int row = item / fours, c = item % fours * 4, index = a.row + done + row,
                      left = side.dim - c < 4 ? side.dim - c : 4;
            std::byte* const page = a.pages[index / a.page_rows];
            const std::int64_t at = static_cast<std::int64_t>(head) * to.capacity + index % a.page_rows;
            const float* const from = rows + row * pitch + place_of(c);
            if (to.bits == 16) {
                auto* const halves =
                    reinterpret_cast<std::uint16_t*>(page + to.rows_at + 2 * (at * side.dim + c));
                if (side.dim % 4 == 0 && to.rows_at % 8 == 0) {
                    FourHalves four;
                    for (int i = 0; i < 4; ++i) four.at[i] = nearest_half(from[i]);
                    *reinterpret_cast<FourHalves*>(halves) = four;
                } else {
                    for (int i = 0; i < left; ++i) halves[i] = nearest_half(from[i]);
                }
                continue;
            }
            auto* const codes = reinterpret_cast<std::uint8_t*>(page + to.rows_at + at * side.dim + c);
            for (int i = 0; i < left; ++i)
                codes[i] =
                    static_cast<std::uint8_t>(code_of(from[i], grids.lower[row], grids.inverse[row], 255));
            if (c == 0)
                *reinterpret_cast<std::uint16_t*>(page + to.steps_at + 2 * at) =
                    nearest_half(grids.step[row]);
        }
    });
}
KVPLANE_DEVICE inline int rows_shared_bytes(int dim) {
    return 4 * (RowsArguments::rows_of_block * pitch_of(dim) + step_rows * (grid_parts + 3));
}

// Rows of a tile
// ---------------------------------------------------------------------------------------------

/// Rows of shared memory, fp16 bits or floats.
template <class Value>
struct Rows {
    Value* data;
    int pitch;

    KVPLANE_DEVICE Value* at(int row, int c) const { return data + row * pitch + place_of(c); }
};
/// Up to four channels of a token that was stored outside tiles before.
KVPLANE_DEVICE inline void load_recent(const Side& side, const std::byte* page, int head, int row, int c,
                                       float (&x)[4]) {
    const std::int64_t at = static_cast<std::int64_t>(head) * side.recent.capacity + row % recent_rows;
    if (side.recent.bits == 16) {
        const auto* const halves =
            reinterpret_cast<const std::uint16_t*>(page + side.recent.rows_at + 2 * (at * side.dim + c));
        for (int i = 0; i < 4; ++i) x[i] = c + i < side.dim ? widened(halves[i]) : 0.0f;
        return;
    }
    const auto* const codes =
        reinterpret_cast<const std::uint8_t*>(page + side.recent.rows_at + at * side.dim + c);
    const float step = widened(*reinterpret_cast<const std::uint16_t*>(page + side.recent.steps_at + 2 * at));
    for (int i = 0; i < 4; ++i)
        x[i] =
            c + i < side.dim ? product_of(step, static_cast<float>(static_cast<int>(codes[i]) - 128)) : 0.0f;
}

/// The tokens [base, base + 32) of a tile, of one head, as they are or would be stored outside tiles: floats
/// in `rows`. `first`: the token of the input that is token 0 of the tile.
template <class Block>
KVPLANE_DEVICE void stage_tokens(const Block& block, const Side& side, int head, std::int64_t first, int base,
                                 int begin, int end, const std::byte* const* recent, float* rows, int pitch,
                                 float* partial, float* row_grids, std::uint32_t* bad,
                                 std::uint32_t* largest) {
    // Rows [begin, fresh) are recent tokens, [fresh, end) come from the input.
    const std::int64_t before = -(first + base);
    const int fresh = before <= begin ? begin : before >= end ? end : static_cast<int>(before);
    if (begin < fresh)
        block.run([&](int thread, int threads) {
            const int fours = (side.dim + 3) / 4;
            for (int item = thread; item < (fresh - begin) * fours; item += threads) {
                const int row = begin + item / fours, c = item % fours * 4, token = base + row;
                float x[4];
                load_recent(side, recent[token / recent_rows], head, token, c, x);
                for (int i = 0; i < 4; ++i) rows[row * pitch + place_of(c + i)] = x[i];
            }
        });
    stage_rows(block, side, head, first + base, fresh, end, rows, pitch, partial, bad, largest);
    if (side.recent.bits == 32 || fresh >= end) return;
    const RowGrids grids(row_grids);
    if (side.recent.bits == 8) fit_rows(block, fresh, end, partial, grids);
    block.run([&](int thread, int threads) {
        const Divisor fours((side.dim + 3) / 4);
        for (int item = thread; item < (end - fresh) * fours.by; item += threads) {
            const int row = fresh + fours.quotient(item);
            float* const at = rows + row * pitch + place_of(fours.rest(item) * 4);
            float x[4];
            four_numbers(at, x);
            if (side.recent.bits == 16) {
                for (int i = 0; i < 4; ++i) x[i] = widened(nearest_half(x[i]));
            } else {
                const float step = grids.step[row], lower = grids.lower[row], inverse = grids.inverse[row];
                for (int i = 0; i < 4; ++i)
                    x[i] = product_of(step, static_cast<float>(code_of(x[i], lower, inverse, 255) - 128));
            }
            put_four(at, x);
        }
    });
}

/// What encode_tile() works on.
template <class Value>
struct TileWork {
    const TilesArguments& a;
    const Item& item;
    const Side& side;
    const SharedPlan& plan;
    Rows<Value> rows;
    std::byte *tile, *shared;
    int tile_index;
    Findings* found;  ///< of the block

    template <class T>
    KVPLANE_DEVICE T* part(int at) const {
        return reinterpret_cast<T*>(shared + at);
    }
    KVPLANE_DEVICE std::int64_t first() const {
        return a.sources.first + static_cast<std::int64_t>(tile_rows) * tile_index;
    }
    KVPLANE_DEVICE bool covers(int token) const { return token >= a.from && token < a.to; }
};

/// Takes tokens [base, base + resident_rows) to shared memory; those that are not written become zero.
template <class Value, class Block>
KVPLANE_DEVICE void load_tokens(const Block& block, const TileWork<Value>& work, int base) {
    const Item& item = work.item;
    const TilesArguments& a = work.a;
    const Divisor columns(whole_units_of(item.channels) / 4);
    const int fours = columns.by;
    if (item.latent_at >= 0) {
        const float* const latents = a.latents + work.tile_index * a.latent_stride + item.latent_at;
        block.run([&](int thread, int threads) {
            for (int i = thread; i < item.resident_rows * fours; i += threads) {
                const int row = i / fours, c = i % fours * 4;
                float x[4];
                for (int j = 0; j < 4; ++j)
                    x[j] = c + j < item.channels
                               ? latents[static_cast<std::int64_t>(base + row) * item.latent_stride +
                                         item.first_channel + c + j]
                               : 0.0f;
                put_four(work.rows.at(row, c), x);
            }
        });
        return;
    }
    const std::byte* const* const recent = a.sources.recent[work.tile_index];
    std::uint32_t *const bad = &work.found->bad[item.side], *const largest = &work.found->largest[item.side];
    if (!item.staged) {
        block.run([&](int thread, int threads) {
            float most = 0.0f;
            const std::int64_t first = work.first();
            loads_ahead(
                thread, threads, item.resident_rows * fours,
                [&](int i, float(&x)[4]) {
                    const int c = columns.rest(i) * 4, token = base + columns.quotient(i),
                              channel = item.first_channel + c;
                    if (!work.covers(token) || c >= item.channels)
                        x[0] = x[1] = x[2] = x[3] = 0.0f;
                    else if (first + token < 0)
                        load_recent(work.side, recent[token / recent_rows], item.head, token, channel, x);
                    else
                        load_four(work.side.input, first + token, item.head, channel, work.side.dim, x);
                },
                [&](int i, float(&x)[4]) {
                    const int c = columns.rest(i) * 4, row = columns.quotient(i);
                    // Recent tokens have been looked at.
                    if (first + base + row >= 0) {
                        bool good = true;
                        for (int j = 0; j < 4; ++j) {
                            const float magnitude = magnitude_of(x[j]);
                            good &= magnitude <= work.side.largest;
                            most = most < magnitude ? magnitude : most;
                        }
                        if (!good) raise(bad, ~static_cast<std::uint32_t>(first + base + row));
                        if (!item.halves && work.side.recent.bits == 16)
                            for (int j = 0; j < 4; ++j) x[j] = widened(nearest_half(x[j]));
                    }
                    put_four(work.rows.at(row, c), x);
                });
            raise_together(largest, bits_of(most));
        });
        return;
    }
    float* const staging = work.template part<float>(work.plan.staging);
    for (int step = 0; step < item.resident_rows; step += step_rows) {
        const int low = base + step, begin = a.from > low ? a.from - low : 0,
                  end = a.to - low < step_rows ? a.to - low : step_rows;
        if (begin < end)
            stage_tokens(block, work.side, item.head, work.first(), low, begin, end, recent, staging,
                         work.plan.staging_pitch, work.template part<float>(work.plan.partial),
                         work.template part<float>(work.plan.row_grids), bad, largest);
        if (work.plan.in_place && begin == 0 && end == step_rows) continue;
        block.run([&](int thread, int threads) {
            for (int i = thread; i < step_rows * fours; i += threads) {
                const int row = i / fours, c = i % fours * 4;
                const bool given = row >= begin && row < end;
                if (given && work.plan.in_place) continue;
                float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                if (given)
                    for (int j = 0; j < 4; ++j)
                        if (c + j < item.channels)
                            x[j] =
                                staging[row * work.plan.staging_pitch + place_of(item.first_channel + c + j)];
                put_four(work.rows.at(step + row, c), x);
            }
        });
    }
}

/// The part of a segment that a block encodes.
struct SegmentPart {
    const Segment& segment;
    int first, channels;  ///< within the segment
    int column;           ///< of the block's rows
    int code_column;      ///< of its codes
};

// Grids
// ------------------------------------------------------------------------------------------------------

/// A grid for each channel of all resident tokens.
template <class Value, class Block>
KVPLANE_DEVICE void fit_channels(const Block& block, const TileWork<Value>& work, const SegmentPart& part,
                                 int base) {
    const int rows = work.item.resident_rows, channels = part.channels;
    float *const min = work.template part<float>(work.plan.partial), *const max = min + grid_parts * channels;
    block.run([&](int thread, int threads) {
        const Divisor columns(channels);
        for (int i = thread; i < grid_parts * channels; i += threads) {
            const int c = columns.rest(i), share = columns.quotient(i);
            float low = number(*work.rows.at(share, part.column + c)), high = low;
            for (int row = share + grid_parts; row < rows; row += grid_parts) {
                const float x = number(*work.rows.at(row, part.column + c));
                low = x < low ? x : low;
                high = high < x ? x : high;
            }
            min[i] = low;
            max[i] = high;
        }
    });
    block.run([&](int thread, int threads) {
        auto* const step = reinterpret_cast<std::uint16_t*>(work.tile + part.segment.step_at);
        auto* const lower = reinterpret_cast<std::uint16_t*>(work.tile + part.segment.lower_at);
        for (int c = thread; c < channels; c += threads) {
            float low = min[c], high = max[c];
            for (int share = 1; share < grid_parts; ++share) {
                const float x = min[share * channels + c], y = max[share * channels + c];
                low = x < low ? x : low;
                high = high < y ? y : high;
            }
            const FittedGrid grid = fitted_grid(part.segment.scheme, part.segment.bits, low, high);
            work.template part<float>(work.plan.lower)[c] = grid.lower;
            work.template part<float>(work.plan.inverse)[c] = grid.inverse;
            work.template part<float>(work.plan.step)[c] = grid.step;
            const int at = base / part.segment.group * part.segment.channels + part.first + c;
            step[at] = grid.stored_step;
            if (keeps_lower(part.segment.scheme)) lower[at] = grid.stored_lower;
        }
    });
}

/// Of fp16 keys: the exponents of the largest magnitudes.
template <class Value, class Block>
KVPLANE_DEVICE void note_exponents(const Block& block, const TileWork<Value>& work, const SegmentPart& part,
                                   int base) {
    block.run([&](int thread, int threads) {
        for (int c = thread; c < part.channels; c += threads) {
            std::uint32_t most = 0;
            for (int row = 0; row < work.item.resident_rows; ++row) {
                if (!work.covers(base + row)) continue;
                const std::uint32_t bits =
                    nearest_half(number(*work.rows.at(row, part.column + c))) & 0x7FFFu;
                most = most < bits ? bits : most;
            }
            std::byte& exponent = work.tile[part.segment.exponent_at + part.first + c];
            const auto found = static_cast<std::byte>(most >> 10);
            const bool starts = work.a.fresh ? base == work.item.first_row : work.a.from == 0 && base == 0;
            if (starts || exponent < found) exponent = found;
            // A list of an odd number of exponents is one byte longer.
            if (starts && part.first + c + 1 == part.segment.channels && part.segment.channels % 2 == 1)
                work.tile[part.segment.exponent_at + part.segment.channels] = std::byte{0};
        }
    });
}

/// The channels of a run of a token.
struct RunOfChannels {
    int first, count;
};
KVPLANE_DEVICE inline RunOfChannels run_of(const Segment& segment, int run) {
    const int first = run * segment.group, left = segment.channels - first;
    return {first, left < segment.group ? left : segment.group};
}

/// Stores the grid of a token's run.
template <class Value>
KVPLANE_DEVICE void store_grid(const TileWork<Value>& work, const Segment& segment, int run, int token,
                               const FittedGrid& grid) {
    if (!work.covers(token) && !work.a.fresh) return;
    const int at = run * tile_rows + token;
    const bool given = work.covers(token);
    if (segment.scheme == scheme_unbiased)
        work.tile[segment.step_at + at] = static_cast<std::byte>(given ? grid.stored_step >> 7 : 0);
    else
        reinterpret_cast<std::uint16_t*>(work.tile + segment.step_at)[at] =
            given ? grid.stored_step : std::uint16_t{0};
    if (keeps_lower(segment.scheme))
        reinterpret_cast<std::uint16_t*>(work.tile + segment.lower_at)[at] =
            given ? grid.stored_lower : std::uint16_t{0};
}

/// A grid for each run of channels of each resident token.
template <class Value, class Block>
KVPLANE_DEVICE void fit_runs(const Block& block, const TileWork<Value>& work, const SegmentPart& part,
                             int base) {
    const Segment& segment = part.segment;
    const int rows = work.item.resident_rows, shares = segment.group >= 32 ? grid_parts : 1,
              grids = rows * segment.runs;
    float *const min = work.template part<float>(work.plan.partial), *const max = min + shares * grids;
    block.run([&](int thread, int threads) {
        for (int i = thread; i < shares * grids; i += threads) {
            const int share = i % shares, row = i / shares % rows, run = i / shares / rows;
            const RunOfChannels channels = run_of(segment, run);
            if (share >= channels.count) {
                min[i] = max[i] = number(*work.rows.at(row, part.column + channels.first));
                continue;
            }
            float low = number(*work.rows.at(row, part.column + channels.first + share)), high = low;
            for (int c = share + shares; c < channels.count; c += shares) {
                const float x = number(*work.rows.at(row, part.column + channels.first + c));
                low = x < low ? x : low;
                high = high < x ? x : high;
            }
            min[i] = low;
            max[i] = high;
        }
    });
    block.run([&](int thread, int threads) {
        for (int g = thread; g < grids; g += threads) {
            float low = min[g * shares], high = max[g * shares];
            for (int share = 1; share < shares; ++share) {
                const float x = min[g * shares + share], y = max[g * shares + share];
                low = x < low ? x : low;
                high = high < y ? y : high;
            }
            const FittedGrid grid = fitted_grid(segment.scheme, segment.bits, low, high);
            work.template part<float>(work.plan.lower)[g] = grid.lower;
            work.template part<float>(work.plan.inverse)[g] = grid.inverse;
            work.template part<float>(work.plan.step)[g] = grid.step;
            store_grid(work, segment, g / rows, base + g % rows, grid);
        }
    });
}

/// The same of grids without bias, some runs at a time: element i of a run goes to sum i % 16.
template <class Value, class Block>
KVPLANE_DEVICE void fit_unbiased(const Block& block, const TileWork<Value>& work, const SegmentPart& part,
                                 int base) {
    const Segment& segment = part.segment;
    const int rows = work.item.resident_rows, grids = rows * segment.runs, bits = segment.bits;
    double *const squares = work.template part<double>(work.plan.partial), *const products =
                                                                               squares + most_unbiased * 16;
    float *const lower = work.template part<float>(work.plan.lower),
                 *const inverse = work.template part<float>(work.plan.inverse),
                 *const steps = work.template part<float>(work.plan.step);
    const auto total = [](const double* of) {
        double sums[16];
        for (int i = 0; i < 16; ++i) sums[i] = of[i];
        for (int width = 8; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) sums[i] = sum_of(sums[i], sums[i + width]);
        return sums[0];
    };
    const float centre = 0.5f - static_cast<float>(1 << (bits - 1));
    for (int first = 0; first < grids; first += most_unbiased) {
        const int count = grids - first < most_unbiased ? grids - first : most_unbiased;
        block.run([&](int thread, int threads) {
            for (int i = thread; i < count * 16; i += threads) {
                const int g = first + i / 16, row = g & (rows - 1), element = i % 16;  // rows: a power of two
                const RunOfChannels channels = run_of(segment, g / rows);
                double sum = 0.0;
                for (int c = element; c < channels.count; c += 16) {
                    const double x = number(*work.rows.at(row, part.column + channels.first + c));
                    sum = sum_of(sum, product_of(x, x));
                }
                squares[i] = sum;
            }
        });
        block.run([&](int thread, int threads) {
            for (int i = thread; i < count; i += threads) {
                const int g = first + i;
                const double squared = total(squares + 16 * i);
                const FittedGrid grid = centred_cells(bits, squared, run_of(segment, g / rows).count);
                lower[g] = grid.lower;
                inverse[g] = grid.inverse;
            }
        });
        block.run([&](int thread, int threads) {
            for (int i = thread; i < count * 16; i += threads) {
                const int g = first + i / 16, row = g % rows, element = i % 16;
                const RunOfChannels channels = run_of(segment, g / rows);
                double sum = 0.0;
                for (int c = element; c < channels.count; c += 16) {
                    const float x = number(*work.rows.at(row, part.column + channels.first + c)),
                                q = static_cast<float>(code_of(x, lower[g], inverse[g], (1 << bits) - 1)) +
                                    centre;
                    sum = sum_of(sum, product_of(static_cast<double>(x), static_cast<double>(q)));
                }
                products[i] = sum;
            }
        });
        block.run([&](int thread, int threads) {
            for (int i = thread; i < count; i += threads) {
                const int g = first + i;
                FittedGrid grid{};
                grid.lower = lower[g];
                grid.inverse = inverse[g];
                choose_step(bits, total(squares + 16 * i), total(products + 16 * i), grid);
                lower[g] = grid.lower;
                inverse[g] = grid.inverse;
                steps[g] = grid.step;
                store_grid(work, segment, g / rows, base + g % rows, grid);
            }
        });
    }
}

// Codes
// ------------------------------------------------------------------------------------------------------

/// The grids of a part of a segment, and which of them is whose.
struct GridsOfPart {
    const float *lower, *inverse, *step;
    int by_channel, rows, group, runs, scheme, bits;

    KVPLANE_DEVICE int index(int c, int row) const {
        return by_channel ? c : runs == 1 ? row : c / group * rows + row;
    }
    /// Of channels c, c + 1, .. of a row, c a multiple of 4.
    KVPLANE_DEVICE void four(const float* of, int c, int row, float (&to)[4]) const {
        if (by_channel) return four_numbers(of + c, to);
        if (runs == 1 || group % 4 == 0) {
            to[0] = to[1] = to[2] = to[3] = of[index(c, row)];
            return;
        }
        const int last = runs * group - 1;
        for (int j = 0; j < 4; ++j) to[j] = of[index(c + j < last ? c + j : last, row)];
    }
};

/// How far x lies outside a grid that clips.
KVPLANE_DEVICE inline double clipped(int bits, float x, float lower, float step) {
    if (step == 0.0f) return 0.0;
    const float upper = sum_of(lower, product_of(step, static_cast<float>(1 << bits)));
    const double least = lower < upper ? lower : upper, most = lower < upper ? upper : lower, value = x;
    return value < least ? least - value : value - most;
}
/// By how much the error of a code without bias exceeds half a step.
KVPLANE_DEVICE inline float beyond_half_step(int bits, float x, int code, float step) {
    const float q = static_cast<float>(code) + (0.5f - static_cast<float>(1 << (bits - 1)));
    return difference_of(magnitude_of(difference_of(x, product_of(q, step))), 0.5f * step);
}
/// The larger of `excess` and of what the first `count` of four codes exceed half a step by.
KVPLANE_DEVICE inline double with_excess(const GridsOfPart& grids, const float (&x)[4], const int (&code)[4],
                                         const float (&lower)[4], int c, int row, int count, double excess) {
    float step[4];
    grids.four(grids.step, c, row, step);
    float beyond = 0.0f;
    for (int j = 0; j < 4; ++j) {
        if (j >= count) continue;
        if (grids.scheme == scheme_unbiased) {
            const float over = beyond_half_step(grids.bits, x[j], code[j], step[j]);
            beyond = beyond < over ? over : beyond;
        } else {
            const double over = clipped(grids.bits, x[j], lower[j], step[j]);
            excess = excess < over ? over : excess;
        }
    }
    return excess < beyond ? static_cast<double>(beyond) : excess;
}

/// Puts what four codes of latents stand for in the place of the latents, to be measured.
template <class Value>
KVPLANE_DEVICE void keep_decoded(const TileWork<Value>& work, const GridsOfPart& grids, const int (&code)[4],
                                 const float (&lower)[4], int token, int channel, int c, int count) {
    float* const to = work.a.latents + work.tile_index * work.a.latent_stride + work.item.latent_at +
                      static_cast<std::int64_t>(token) * work.item.latent_stride + work.item.first_channel +
                      channel;
    for (int j = 0; j < 4; ++j)
        if (j < count)
            to[j] = sum_of(lower[j], product_of(grids.step[c + j], static_cast<float>(code[j]) + 0.5f));
}

/// Codes of the resident rows [first_row, first_row + code_rows), zero where a token is not written.
template <class Value, class Block>
KVPLANE_DEVICE void make_codes(const Block& block, const TileWork<Value>& work, const SegmentPart& part,
                               int base, int first_row) {
    const Segment& segment = part.segment;
    const GridsOfPart grids{work.template part<float>(work.plan.lower),
                            work.template part<float>(work.plan.inverse),
                            work.template part<float>(work.plan.step),
                            segment.by_channel,
                            work.item.resident_rows,
                            segment.group,
                            segment.runs,
                            segment.scheme,
                            segment.bits};
    const Divisor fours(whole_units_of(part.channels) / 4);
    const int count = work.item.code_rows * fours.by, column = part.column, channels = part.channels;
    const bool half = segment.bits == 16, latent = work.item.latent_at >= 0,
               measured = segment.scheme == scheme_full_range || segment.scheme == scheme_unbiased;
    std::byte* const codes = work.shared + work.plan.codes + part.code_column;
    const int to_low = work.plan.low_codes - work.plan.codes, pitch = work.plan.code_pitch;
    block.run([&](int thread, int threads) {
        double excess = 0.0;
        for (int i = thread; i < count; i += threads) {
            const int code_row = fours.quotient(i), row = first_row + code_row, c = fours.rest(i) * 4,
                      left = channels - c < 4 ? channels - c : 4;
            std::uint32_t high = 0, low = 0;
            if (left > 0 && work.covers(base + row)) {
                float x[4];
                if (column % 4 == 0)
                    four_numbers(work.rows.at(row, column + c), x);
                else
                    for (int j = 0; j < 4; ++j)
                        x[j] = j < left ? number(*work.rows.at(row, column + c + j)) : 0.0f;
                if (half) {
                    for (int j = 0; j < 4; ++j) {
                        const std::uint32_t bits = j < left ? nearest_half(x[j]) : 0u;
                        high |= bits >> 8 << 8 * j;
                        low |= (bits & 0xFFu) << 8 * j;
                    }
                } else {
                    float lower[4], inverse[4];
                    int code[4];
                    grids.four(grids.lower, c, row, lower);
                    grids.four(grids.inverse, c, row, inverse);
                    for (int j = 0; j < 4; ++j) {
                        code[j] = code_of(x[j], lower[j], inverse[j], (1 << grids.bits) - 1);
                        if (j < left) high |= static_cast<std::uint32_t>(code[j]) << 8 * j;
                    }
                    if (measured) excess = with_excess(grids, x, code, lower, c, row, left, excess);
                    if (latent) keep_decoded(work, grids, code, lower, base + row, column + c, c, left);
                }
            }
            std::byte* const to = codes + code_row * pitch + c;
            *reinterpret_cast<std::uint32_t*>(to) = high;
            if (half) *reinterpret_cast<std::uint32_t*>(to + to_low) = low;
        }
        if (excess > 0.0) raise(&work.found->excess[work.item.side], excess);
    });
}

// Planes
// -----------------------------------------------------------------------------------------------------

/// One plane of keys from codes. A word is a token's.
template <int width, class Value>
KVPLANE_DEVICE void pack_keys(const TileWork<Value>& work, const SegmentPart& part, const std::byte* codes,
                              int shift, std::byte* plane, int base, int thread, int threads) {
    constexpr int depth = 32 / width;
    constexpr std::uint32_t mask = 0x01010101u * ((1u << width) - 1u);
    const int units = (part.segment.channels + depth - 1) / depth, first_unit = part.first / depth,
              own_units = (part.channels + depth - 1) / depth, pitch = work.plan.code_pitch;
    const int count = work.item.code_rows / 16 * own_units * 4;
    for (int i = thread; i < count; i += threads) {
        const int quad = i % 4, unit = i / 4 % own_units, sixteen = i / 4 / own_units,
                  row = sixteen * 16 + quad * 4;
        const std::byte* const from = codes + row * pitch + part.code_column + unit * depth;
        FourWords words;
        for (int t = 0; t < 4; ++t) {
            std::uint32_t word = 0;
            for (int k = 0; k < 8 / width; ++k)
                word |= (*reinterpret_cast<const std::uint32_t*>(from + t * pitch + 4 * k) >> shift & mask)
                        << (k * width);
            words.at[t] = word;
        }
        const int token = base + row;
        std::byte* const to = plane + ((token / 16 * units + first_unit + unit) * 16 + token % 16) * 4;
        if (work.a.fresh || (work.covers(token) && work.covers(token + 3))) {
            *reinterpret_cast<FourWords*>(to) = words;
            continue;
        }
        for (int t = 0; t < 4; ++t)
            if (work.covers(token + t)) reinterpret_cast<std::uint32_t*>(to)[t] = words.at[t];
    }
}

/// Four of the bytes of two words, b's behind a's: those that the digits of `which` number, the last digit
/// first.
KVPLANE_DEVICE inline std::uint32_t picked(std::uint32_t a, std::uint32_t b, std::uint32_t which) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(a, b, which);
#else
    const std::uint64_t both = static_cast<std::uint64_t>(b) << 32 | a;
    std::uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
        result |= static_cast<std::uint32_t>(both >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
#endif
}

/// One plane of values. A word is a channel's, of 32 / width tokens.
template <int width, class Value>
KVPLANE_DEVICE void pack_values(const TileWork<Value>& work, const SegmentPart& part, const std::byte* codes,
                                int shift, std::byte* plane, int base, int thread, int threads) {
    constexpr int depth = 32 / width;
    constexpr std::uint32_t mask = (1u << width) - 1u;
    const int units = tile_rows / depth, own_units = work.item.code_rows / depth,
              pitch = work.plan.code_pitch, sixteens = (part.channels + 15) / 16;
    for (int i = thread; i < sixteens * own_units * 4; i += threads) {
        const int quad = i % 4, unit = i / 4 % own_units, sixteen = i / 4 / own_units, row = unit * depth,
                  token = base + row;
        const std::byte* const from = codes + row * pitch + part.code_column + sixteen * 16 + quad * 4;
        FourWords words{};
        KVPLANE_UNROLL
        for (int k = 0; k < 8 / width; ++k) {
            std::uint32_t tokens[4];
            KVPLANE_UNROLL
            for (int j = 0; j < 4; ++j)
                tokens[j] = *reinterpret_cast<const std::uint32_t*>(from + (4 * k + j) * pitch);
            // [token][channel] to [channel][token].
            const std::uint32_t a = picked(tokens[0], tokens[1], 0x5140),
                                b = picked(tokens[2], tokens[3], 0x5140),
                                d = picked(tokens[0], tokens[1], 0x7362),
                                e = picked(tokens[2], tokens[3], 0x7362);
            const std::uint32_t channels[4] = {picked(a, b, 0x5410), picked(a, b, 0x7632),
                                               picked(d, e, 0x5410), picked(d, e, 0x7632)};
            KVPLANE_UNROLL
            for (int c = 0; c < 4; ++c)
                words.at[c] |= (channels[c] >> shift & mask * 0x01010101u) << (k * width);
        }
        auto* const to = reinterpret_cast<FourWords*>(
            plane + (((part.first / 16 + sixteen) * units + token / depth) * 16 + quad * 4) * 4);
        if (!work.a.fresh && !(work.covers(token) && work.covers(token + depth - 1))) {
            std::uint32_t written = 0;
            for (int k = 0; k < 8 / width; ++k)
                for (int j = 0; j < 4; ++j)
                    if (work.covers(token + 4 * k + j)) written |= mask << (8 * j + k * width);
            if (written == 0) continue;
            const FourWords old = *to;
            for (int c = 0; c < 4; ++c) words.at[c] |= old.at[c] & ~written;
        }
        *to = words;
    }
}

/// Planes of the resident rows [first_row, first_row + code_rows).
template <class Value, class Block>
KVPLANE_DEVICE void pack_planes(const Block& block, const TileWork<Value>& work, const SegmentPart& part,
                                int base) {
    block.run([&](int thread, int threads) {
        for (int p = 0; p < part.segment.planes; ++p) {
            const std::byte* const codes =
                work.shared + (part.segment.low_byte[p] ? work.plan.low_codes : work.plan.codes);
            std::byte* const plane = work.tile + part.segment.plane_at[p];
            with_bits(part.segment.width[p], [&](auto bits) {
                constexpr int width = decltype(bits)::count;
                if (work.a.formats[work.item.format].keys)
                    pack_keys<width>(work, part, codes, part.segment.shift[p], plane, base, thread, threads);
                else
                    pack_values<width>(work, part, codes, part.segment.shift[p], plane, base, thread,
                                       threads);
            });
        }
    });
}

// Tiles
// ------------------------------------------------------------------------------------------------------

/// body(part) for every segment that an item has channels of.
template <class Body>
KVPLANE_DEVICE void each_part(const TilesArguments& a, const Item& item, const Body& body) {
    int code_column = 0;
    for (int s = item.first_segment; s < item.first_segment + item.segments; ++s) {
        const Segment& segment = a.segments[s];
        const int begin =
                      segment.first_channel > item.first_channel ? segment.first_channel : item.first_channel,
                  of_item = item.first_channel + item.channels,
                  of_segment = segment.first_channel + segment.channels,
                  end = of_item < of_segment ? of_item : of_segment;
        body(SegmentPart{segment, begin - segment.first_channel, end - begin, begin - item.first_channel,
                         code_column});
        code_column += whole_units_of(end - begin);
    }
}

template <class Value, class Block>
KVPLANE_DEVICE void encode_item(const Block& block, const TilesArguments& a, const Item& item, int tile,
                                std::byte* shared) {
    const Side& side = a.sides[item.side];
    const SharedPlan plan = shared_plan(item, a.segments, side.dim);
    const TileWork<Value> work{a,
                               item,
                               side,
                               plan,
                               {reinterpret_cast<Value*>(shared + plan.resident), plan.pitch},
                               a.pages[tile] + item.at,
                               shared,
                               tile,
                               reinterpret_cast<Findings*>(shared + plan.found)};
    block.run([&](int thread, int threads) {
        if (thread == 0) *work.found = Findings{};
        const Format& format = a.formats[item.format];
        if (a.fresh && item.clears)
            for (int i = format.grid_end + thread; i < format.plane_begin; i += threads)
                work.tile[i] = std::byte{0};
    });
    for (int base = item.first_row; base < item.first_row + item.rows; base += item.resident_rows) {
        if (!a.fresh && (base >= a.to || base + item.resident_rows <= a.from)) continue;
        load_tokens(block, work, base);
        each_part(a, item, [&](const SegmentPart& part) {
            if (part.segment.bits == 0) return;
            if (part.segment.bits == 16) {
                if (a.formats[item.format].keys) note_exponents(block, work, part, base);
            } else if (part.segment.by_channel) {
                fit_channels(block, work, part, base);
            } else if (part.segment.scheme == scheme_unbiased) {
                fit_unbiased(block, work, part, base);
            } else {
                fit_runs(block, work, part, base);
            }
            for (int row = 0; row < item.resident_rows; row += item.code_rows) {
                make_codes(block, work, part, base, row);
                pack_planes(block, work, part, base + row);
            }
        });
    }
    block.run([&](int thread, int) {
        if (thread != 0) return;
        raise(&a.findings->largest[item.side], work.found->largest[item.side]);
        if (work.found->bad[item.side] != 0) raise(&a.findings->bad[item.side], work.found->bad[item.side]);
        double excess;
        memcpy(&excess, &work.found->excess[item.side], sizeof excess);
        if (excess > 0.0) raise(&a.findings->excess[item.side], excess);
    });
}

/// What block `index` of item_count x tile_count does.
template <class Block>
KVPLANE_DEVICE void encode_tile(const Block& block, const TilesArguments& a, int index, std::byte* shared) {
    const int tile = index / a.item_count;
    const Item& item = a.items[index % a.item_count];
    if (index == 0 && a.change.entry)
        block.run([&](int thread, int) {
            if (thread == 0) *a.change.entry = a.change.tile;
        });
    if (!a.fresh && (item.first_row >= a.to || item.first_row + item.rows <= a.from)) return;
    if (item.halves)
        encode_item<std::uint16_t>(block, a, item, tile, shared);
    else
        encode_item<float>(block, a, item, tile, shared);
}

// Latents
// ----------------------------------------------------------------------------------------------------

KVPLANE_DEVICE inline int centre_shared_bytes(int dim) {
    return 4 * (step_rows * pitch_of(dim) + step_rows * (grid_parts + 3));
}
/// 32 tokens of a head of a tile to the frame of the basis: block `index` of tiles x heads x 4.
template <class Block>
KVPLANE_DEVICE void centre_keys(const Block& block, const CentreArguments& a, int index, std::byte* shared) {
    const int base = index % (tile_rows / step_rows) * step_rows,
              head = index / (tile_rows / step_rows) % a.heads,
              tile = index / (tile_rows / step_rows) / a.heads, dim = a.side.dim, pitch = pitch_of(dim);
    float *const rows = reinterpret_cast<float*>(shared), *const partial = rows + step_rows * pitch,
                 *const row_grids = partial + step_rows * grid_parts;
    stage_tokens(block, a.side, head, a.sources.first + static_cast<std::int64_t>(tile_rows) * tile, base, 0,
                 step_rows, a.sources.recent[tile], rows, pitch, partial, row_grids, &a.findings->bad[0],
                 &a.findings->largest[0]);
    if (a.rotates_back) rotate_rows(block, rows, pitch, 0, step_rows, dim, a.side.signs);
    if (a.pair_count > 0)
        block.run([&](int thread, int threads) {
            for (int i = thread; i < step_rows * a.pair_count; i += threads) {
                const int row = i / a.pair_count, pair = i % a.pair_count;
                const std::int64_t of =
                    a.angles_by_row ? static_cast<std::int64_t>(tile) * tile_rows + base + row : tile;
                const float* const angle = a.angles + 2 * (of * a.pair_count + pair);
                float &x = rows[row * pitch + place_of(a.pairs[2 * pair])],
                      &y = rows[row * pitch + place_of(a.pairs[2 * pair + 1])];
                const float xc = product_of(x, angle[0]), ys = product_of(y, angle[1]),
                            xs = product_of(x, angle[1]), yc = product_of(y, angle[0]);
                x = difference_of(xc, ys);
                y = sum_of(xs, yc);
            }
        });
    block.run([&](int thread, int threads) {
        for (int i = thread; i < step_rows * dim; i += threads) {
            const int row = i / dim, c = i % dim;
            a.centred[(static_cast<std::int64_t>(tile) * tile_rows + base + row) * a.heads * dim +
                      head * dim + c] =
                difference_of(rows[row * pitch + place_of(c)], a.mean[head * dim + c]);
        }
    });
}

KVPLANE_DEVICE inline int product_shared_bytes() {
    using A = ProductArguments;
    return 4 * (A::rows_of_block * (A::depth + 1) + A::depth * A::columns_of_block +
                A::rows_of_block * A::columns_of_block);
}
/// 64 tokens times 32 columns: block `index` of tiles x subspaces x strips x 2. Sums are in the order of the
/// rows of the columns, each product rounded.
template <class Block>
KVPLANE_DEVICE void multiply_keys(const Block& block, const ProductArguments& a, int index,
                                  std::byte* shared) {
    using A = ProductArguments;
    constexpr int halves = tile_rows / A::rows_of_block, eight = 8;
    const int base = index % halves * A::rows_of_block,
              strip = index / halves % a.strips * A::columns_of_block;
    const Subspace& subspace = a.subspaces[index / halves / a.strips % a.subspace_count];
    const int tile = index / halves / a.strips / a.subspace_count;
    const int depth = a.back ? subspace.kept : subspace.channels,
              columns = a.back ? subspace.channels : subspace.kept;
    if (strip >= columns) return;
    float* const centred = a.centred + (static_cast<std::int64_t>(tile) * tile_rows + base) * a.all_channels +
                           subspace.first_channel;
    float* const latents = a.latents + tile * a.latent_stride + subspace.latent_at +
                           static_cast<std::int64_t>(base) * subspace.latent_stride;
    const float* const from = a.back ? latents : centred;
    const std::int64_t from_stride = a.back ? subspace.latent_stride : a.all_channels;
    const float* const factors = a.back ? subspace.from_latents : subspace.to_latents;
    const int factor_stride = whole_units_of(columns);
    float *const x = reinterpret_cast<float*>(shared), *const y = x + A::rows_of_block * (A::depth + 1),
                 *const sums = y + A::depth * A::columns_of_block;
    block.run([&](int thread, int threads) {
        for (int i = thread; i < A::rows_of_block * A::columns_of_block; i += threads) sums[i] = 0.0f;
    });
    for (int first = 0; first < depth; first += A::depth) {
        const int count = depth - first < A::depth ? depth - first : A::depth;
        block.run([&](int thread, int threads) {
            for (int i = thread; i < A::rows_of_block * A::depth; i += threads) {
                const int row = i / A::depth, k = i % A::depth;
                x[row * (A::depth + 1) + k] = k < count ? from[row * from_stride + first + k] : 0.0f;
            }
            for (int i = thread; i < A::depth * A::columns_of_block; i += threads) {
                const int k = i / A::columns_of_block, j = i % A::columns_of_block;
                y[i] = k < count ? factors[static_cast<std::int64_t>(first + k) * factor_stride + strip + j]
                                 : 0.0f;
            }
        });
        block.run([&](int thread, int threads) {
            for (int i = thread; i < A::rows_of_block / eight * A::columns_of_block; i += threads) {
                const int j = i % A::columns_of_block, row = i / A::columns_of_block * eight;
                float sum[eight];
                for (int r = 0; r < eight; ++r) sum[r] = sums[(row + r) * A::columns_of_block + j];
                for (int k = 0; k < count; ++k) {
                    const float factor = y[k * A::columns_of_block + j];
                    for (int r = 0; r < eight; ++r)
                        sum[r] = sum_of(sum[r], product_of(factor, x[(row + r) * (A::depth + 1) + k]));
                }
                for (int r = 0; r < eight; ++r) sums[(row + r) * A::columns_of_block + j] = sum[r];
            }
        });
    }
    block.run([&](int thread, int threads) {
        constexpr float most = 30000.0f;
        float off = 0.0f;
        for (int i = thread; i < A::rows_of_block * A::columns_of_block; i += threads) {
            const int row = i / A::columns_of_block, j = strip + i % A::columns_of_block;
            if (j >= columns) continue;
            const float sum = sums[i];
            if (a.back) {
                const float difference = magnitude_of(
                    difference_of(centred[static_cast<std::int64_t>(row) * a.all_channels + j], sum));
                off = off < difference ? difference : off;
            } else {
                latents[static_cast<std::int64_t>(row) * subspace.latent_stride + j] = sum < -most  ? -most
                                                                                       : sum > most ? most
                                                                                                    : sum;
            }
        }
        if (off > 0.0f) raise(&a.findings->excess[0], static_cast<double>(off));
    });
}

}  // namespace kvplane::cuda::detail
