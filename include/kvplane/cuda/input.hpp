// kvplane/cuda/input.hpp: loads of what appends are given, eight channels at a time where they lie together.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvplane/cuda/arguments.hpp"
#include "kvplane/cuda/block.hpp"
#include "kvplane/cuda/device.hpp"
#include "kvplane/cuda/numbers.hpp"

namespace kvplane::cuda::detail {

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

/// Input whose channels do not lie so that eight can be loaded at once, of any type.
inline constexpr int input_apart = 3;

/// Eight channels of input as they were loaded; zeros behind the last channel where it is apart.
template <int type>
struct Eight {
    static constexpr bool pairs = type == input_half || type == input_bfloat;
    FourWords words[pairs ? 1 : 2];

    KVPLANE_DEVICE void load(const InputView& input, std::int64_t token, int head, int c, int channels) {
        if constexpr (type == input_apart) {
            float x[4] = {}, y[4] = {};
            load_four(input, token, head, c, channels, x);
            if (c + 4 < channels) load_four(input, token, head, c + 4, channels, y);
            for (int i = 0; i < 4; ++i) {
                words[0].at[i] = bits_of(x[i]);
                words[1].at[i] = bits_of(y[i]);
            }
        } else {
            const std::int64_t at = token * input.token_stride + head * input.head_stride + c;
            const auto* const from = reinterpret_cast<const FourWords*>(
                static_cast<const std::byte*>(input.data) + at * (pairs ? 2 : 4));
            words[0] = from[0];
            if constexpr (!pairs) words[1] = from[1];
        }
    }
    KVPLANE_DEVICE void clear() {
        for (FourWords& four : words)
            for (std::uint32_t& word : four.at) word = 0;
    }
    KVPLANE_DEVICE void numbers(float (&x)[8]) const {
        KVPLANE_UNROLL
        for (int i = 0; i < 8; ++i) {
            if constexpr (type == input_half)
                x[i] = widened(static_cast<std::uint16_t>(words[0].at[i / 2] >> i % 2 * 16));
            else if constexpr (type == input_bfloat)
                x[i] = float_of(i % 2 == 0 ? words[0].at[i / 2] << 16 : words[0].at[i / 2] & 0xFFFF0000u);
            else
                x[i] = float_of(words[i / 4].at[i % 4]);
        }
    }
    /// The numbers rounded to fp16.
    KVPLANE_DEVICE FourWords halves() const {
        if constexpr (type == input_half) return words[0];
        float x[8];
        numbers(x);
        FourWords made;
        KVPLANE_UNROLL
        for (int i = 0; i < 4; ++i) made.at[i] = nearest_halves(x[2 * i], x[2 * i + 1]);
        return made;
    }
};

/// The largest magnitude of what a thread has seen.
template <int type>
class Largest {
  public:
    KVPLANE_DEVICE void note(const Eight<type>& eight) {
        KVPLANE_UNROLL
        for (const FourWords& four : eight.words) KVPLANE_UNROLL
        for (const std::uint32_t word : four.at) {
            if constexpr (Eight<type>::pairs)
                most_ = greater_words(most_, word & 0x7FFF7FFFu);
            else
                most_ = most_ < (word & 0x7FFFFFFFu) ? word & 0x7FFFFFFFu : most_;
        }
    }
    KVPLANE_DEVICE void note(const Largest& other) {
        if constexpr (Eight<type>::pairs)
            most_ = greater_words(most_, other.most_);
        else
            most_ = most_ < other.most_ ? other.most_ : most_;
    }
    /// NaN where there was one.
    KVPLANE_DEVICE float magnitude() const {
        if constexpr (!Eight<type>::pairs) return float_of(most_);
        const std::uint32_t low = most_ & 0xFFFFu, high = most_ >> 16;
        const auto most = static_cast<std::uint16_t>(low < high ? high : low);
        return type == input_half ? widened(most) : widened_bfloat(most);
    }

  private:
    std::uint32_t most_ = 0;  ///< of pairs: of the first and of the second numbers
};

/// Calls body(constant) with the type of input, or that it is apart.
template <class Body>
KVPLANE_DEVICE void with_type(const InputView& input, const Body& body) {
    with_bits<input_float, input_half, input_bfloat, input_apart>(input.in_eights ? input.type : input_apart,
                                                                  body);
}

/// Some rows and channels of a head that a phase reads: channels [channel, channel + count) of rows [begin,
/// end), row 0 being token `first`.
struct InputPart {
    const InputView& input;
    std::int64_t first;
    int head, channel, count, begin, end;

    KVPLANE_DEVICE int eights() const { return (count + 7) / 8; }
};
/// Raises `bad` by the first token that has a magnitude beyond `limit`, or NaN.
KVPLANE_DEVICE_APART inline void find_bad(const InputPart& part, float limit, std::uint32_t* bad) {
    KVPLANE_KEEP_ROLLED
    for (int row = part.begin; row < part.end; ++row) KVPLANE_KEEP_ROLLED
    for (int c = part.channel; c < part.channel + part.count; ++c) {
        const InputView& input = part.input;
        const float x = number_of(input, (part.first + row) * input.token_stride +
                                             part.head * input.head_stride + c * input.channel_stride);
        if (!(magnitude_of(x) <= limit)) return raise(bad, ~static_cast<std::uint32_t>(part.first + row));
    }
}
/// By a thread of a phase: use_of(c)(row, eight) for eights of the part, four loads before the first use.
/// Returns their largest magnitude.
template <int type, class UseOf>
KVPLANE_DEVICE float each_eight(const InputPart& part, int thread, int threads, const UseOf& use_of) {
    constexpr int ahead = type == input_apart ? 1 : 4;
    const ThreadGrid grid(thread, threads, part.eights(), 32);
    const int channels = part.channel + part.count;
    Largest<type> largest;
    for (int e = grid.column; e < part.eights(); e += grid.columns) {
        const auto use = use_of(e * 8);
        const auto load = [&](Eight<type>& eight, int row) {
            eight.load(part.input, part.first + row, part.head, part.channel + e * 8, channels);
        };
        int row = part.begin + grid.row;
        for (; row + (ahead - 1) * grid.rows < part.end; row += ahead * grid.rows) {
            Eight<type> eights[ahead];
            KVPLANE_UNROLL
            for (int u = 0; u < ahead; ++u) load(eights[u], row + u * grid.rows);
            KVPLANE_UNROLL
            for (int u = 0; u < ahead; ++u) {
                largest.note(eights[u]);
                use(row + u * grid.rows, eights[u]);
            }
        }
        KVPLANE_KEEP_ROLLED
        for (; row < part.end; row += grid.rows) {
            Eight<type> eight;
            load(eight, row);
            largest.note(eight);
            use(row, eight);
        }
    }
    return largest.magnitude();
}

// Numbers in shared memory
// ------------------------------------------------------------------------

KVPLANE_DEVICE inline float number(std::uint16_t x) {
    return widened(x);
}
KVPLANE_DEVICE inline float number(float x) {
    return x;
}
/// `count` numbers, 2, 4 or 8, that lie on a multiple of as many.
template <int count>
KVPLANE_DEVICE void load_numbers(const std::uint16_t* from, float (&x)[count]) {
    std::uint32_t words[count / 2];
    if constexpr (count == 8) {
        const FourWords four = *reinterpret_cast<const FourWords*>(from);
        for (int i = 0; i < 4; ++i) words[i] = four.at[i];
    } else if constexpr (count == 4) {
        const TwoWords two = *reinterpret_cast<const TwoWords*>(from);
        for (int i = 0; i < 2; ++i) words[i] = two.at[i];
    } else {
        words[0] = *reinterpret_cast<const std::uint32_t*>(from);
    }
    KVPLANE_UNROLL
    for (int i = 0; i < count; ++i) x[i] = widened(static_cast<std::uint16_t>(words[i / 2] >> i % 2 * 16));
}
template <int count>
KVPLANE_DEVICE void load_numbers(const float* from, float (&x)[count]) {
    if constexpr (count == 2) {
        const TwoFloats two = *reinterpret_cast<const TwoFloats*>(from);
        for (int i = 0; i < 2; ++i) x[i] = two.at[i];
    } else {
        KVPLANE_UNROLL
        for (int k = 0; k < count; k += 4) {
            const FourFloats four = *reinterpret_cast<const FourFloats*>(from + k);
            for (int i = 0; i < 4; ++i) x[k + i] = four.at[i];
        }
    }
}
/// The same to memory, 4 or 8.
template <int count>
KVPLANE_DEVICE void put_numbers(std::uint16_t* to, const float (&x)[count]) {
    if constexpr (count == 8) {
        FourWords four;
        for (int i = 0; i < 4; ++i) four.at[i] = nearest_halves(x[2 * i], x[2 * i + 1]);
        *reinterpret_cast<FourWords*>(to) = four;
    } else {
        TwoWords two;
        for (int i = 0; i < 2; ++i) two.at[i] = nearest_halves(x[2 * i], x[2 * i + 1]);
        *reinterpret_cast<TwoWords*>(to) = two;
    }
}
template <int count>
KVPLANE_DEVICE void put_numbers(float* to, const float (&x)[count]) {
    KVPLANE_UNROLL
    for (int k = 0; k < count; k += 4) {
        FourFloats four;
        for (int i = 0; i < 4; ++i) four.at[i] = x[k + i];
        *reinterpret_cast<FourFloats*>(to + k) = four;
    }
}

}  // namespace kvplane::cuda::detail
