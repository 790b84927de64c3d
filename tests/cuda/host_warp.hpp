// tests/cuda/host_warp.hpp: the 32 lanes of a warp as arrays, so that cuda/tile_math.cuh runs on the host.
//
// Products go by the index tables of PTX (mma.m16n8k32 and m16n8k16), number by number.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numbers>
#include <type_traits>

namespace kvplane::cuda {

/// Scores are in units of log 2.
inline constexpr float log2_e = 1.44269504f;

/// A register: one number a lane.
template <class T>
struct Lanes {
    std::array<T, 32> at;

    Lanes() = default;
    template <class U>
    requires std::is_arithmetic_v<U>
    explicit Lanes(U all) { at.fill(static_cast<T>(all)); }
    T operator[](int lane) const { return at[static_cast<std::size_t>(lane)]; }
    T& operator[](int lane) { return at[static_cast<std::size_t>(lane)]; }
};

template <class T, class F>
auto each(const F& f) {
    Lanes<T> to;
    for (int i = 0; i < 32; ++i) to[i] = static_cast<T>(f(i));
    return to;
}

#define KVPLANE_LANES_OPERATOR(op)                                        \
    template <class T>                                                    \
    Lanes<T> operator op(const Lanes<T>& a, const Lanes<T>& b) {          \
        return each<T>([&](int i) { return a[i] op b[i]; });              \
    }                                                                     \
    template <class T, class U>                                           \
    requires std::is_arithmetic_v<U> Lanes<T>                             \
    operator op(const Lanes<T>& a, U b) {                                 \
        return each<T>([&](int i) { return a[i] op static_cast<T>(b); }); \
    }                                                                     \
    template <class T, class U>                                           \
    requires std::is_arithmetic_v<U> Lanes<T>                             \
    operator op(U a, const Lanes<T>& b) {                                 \
        return each<T>([&](int i) { return static_cast<T>(a) op b[i]; }); \
    }
KVPLANE_LANES_OPERATOR(+)
KVPLANE_LANES_OPERATOR(-)
KVPLANE_LANES_OPERATOR(*)
KVPLANE_LANES_OPERATOR(/)
KVPLANE_LANES_OPERATOR(%)
KVPLANE_LANES_OPERATOR(&)
KVPLANE_LANES_OPERATOR(|)
KVPLANE_LANES_OPERATOR(^)
KVPLANE_LANES_OPERATOR(>>)
KVPLANE_LANES_OPERATOR(<<)
#undef KVPLANE_LANES_OPERATOR

#define KVPLANE_LANES_COMPARISON(op)                                         \
    template <class T>                                                       \
    Lanes<bool> operator op(const Lanes<T>& a, const Lanes<T>& b) {          \
        return each<bool>([&](int i) { return a[i] op b[i]; });              \
    }                                                                        \
    template <class T, class U>                                              \
    requires std::is_arithmetic_v<U> Lanes<bool>                             \
    operator op(const Lanes<T>& a, U b) {                                    \
        return each<bool>([&](int i) { return a[i] op static_cast<T>(b); }); \
    }
KVPLANE_LANES_COMPARISON(<)
KVPLANE_LANES_COMPARISON(<=)
KVPLANE_LANES_COMPARISON(>)
KVPLANE_LANES_COMPARISON(>=)
KVPLANE_LANES_COMPARISON(==)
KVPLANE_LANES_COMPARISON(!=)
#undef KVPLANE_LANES_COMPARISON

/// As DeviceWarp of cuda/warp.cuh.
struct HostWarp {
    using Word = Lanes<std::uint32_t>;
    using Int = Lanes<std::int32_t>;
    using Float = Lanes<float>;
    using Flag = Lanes<bool>;

    static Word lane() {
        return each<std::uint32_t>([](int i) { return i; });
    }

    template <class T>
    static T read(const std::byte* base, std::uint32_t at) {
        T value;
        std::memcpy(&value, base + at, sizeof value);
        return value;
    }
    /// Whether a device would take the address.
    template <std::size_t bytes>
    static void check(const std::byte* from) {
        if (reinterpret_cast<std::uintptr_t>(from) % bytes != 0) std::abort();
    }
    template <std::size_t words>
    static void load(const std::byte* base, const Word& at, Word (&to)[words]) {
        for (int i = 0; i < 32; ++i) {
            check<4 * words>(base + at[i]);
            for (std::uint32_t w = 0; w < words; ++w) to[w][i] = read<std::uint32_t>(base, at[i] + 4 * w);
        }
    }
    static void load16(const std::byte* base, const Word& at, Word (&to)[4]) { load(base, at, to); }
    static void load8(const std::byte* base, const Word& at, Word (&to)[2]) { load(base, at, to); }
    static Word load4(const std::byte* base, const Word& at) {
        Word to[1];
        load(base, at, to);
        return to[0];
    }
    static Word load2(const std::byte* base, const Word& at) {
        return each<std::uint32_t>(
            [&](int i) { return check<2>(base + at[i]), read<std::uint16_t>(base, at[i]); });
    }
    static Word load1(const std::byte* base, const Word& at) {
        return each<std::uint32_t>([&](int i) { return read<std::uint8_t>(base, at[i]); });
    }
    static void store16(std::byte* base, const Word& at, const Word (&from)[4]) {
        for (int i = 0; i < 32; ++i) {
            check<16>(base + at[i]);
            for (std::uint32_t w = 0; w < 4; ++w) std::memcpy(base + at[i] + 4 * w, &from[w].at[index(i)], 4);
        }
    }
    static void store8(std::byte* base, const Word& at, const Word& first, const Word& second) {
        for (int i = 0; i < 32; ++i) {
            check<8>(base + at[i]);
            std::memcpy(base + at[i], &first.at[index(i)], 4);
            std::memcpy(base + at[i] + 4, &second.at[index(i)], 4);
        }
    }
    static void store4(std::byte* base, const Word& at, const Word& word, const Flag& there) {
        for (int i = 0; i < 32; ++i)
            if (there[i]) {
                check<4>(base + at[i]);
                std::memcpy(base + at[i], &word.at[index(i)], 4);
            }
    }
    static void store4(std::byte* base, const Word& at, const Word& word) {
        store4(base, at, word, Flag(true));
    }
    static void store2(std::byte* base, const Word& at, const Word& word) {
        for (int i = 0; i < 32; ++i) {
            check<2>(base + at[i]);
            const auto low = static_cast<std::uint16_t>(word[i]);
            std::memcpy(base + at[i], &low, 2);
        }
    }
    static std::size_t index(int lane) { return static_cast<std::size_t>(lane); }
    static Float load_bias(const float* bias, const Word& row, const Int& key, const Flag& there) {
        return each<float>(
            [&](int i) { return there[i] ? bias[row[i] + static_cast<std::uint32_t>(key[i])] : 0.0f; });
    }

    static Float as_float(const Word& x) {
        return each<float>([&](int i) { return std::bit_cast<float>(x[i]); });
    }
    static Word as_word(const Float& x) {
        return each<std::uint32_t>([&](int i) { return std::bit_cast<std::uint32_t>(x[i]); });
    }
    static float half(std::uint32_t bits) {
        return static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(bits)));
    }
    static Float low_half(const Word& x) {
        return each<float>([&](int i) { return half(x[i] & 0xFFFFu); });
    }
    static Float high_half(const Word& x) {
        return each<float>([&](int i) { return half(x[i] >> 16); });
    }
    static Word pack_halves(const Float& low, const Float& high) {
        return each<std::uint32_t>([&](int i) {
            const auto bits = [](float x) { return std::uint32_t{Eigen::half(x).x}; };
            return bits(low[i]) | bits(high[i]) << 16;
        });
    }
    template <std::uint32_t selector>
    static Word permute(const Word& a, const Word& b) {
        return each<std::uint32_t>([&](int i) {
            const std::uint64_t both = std::uint64_t{b[i]} << 32 | a[i];
            std::uint32_t to = 0;
            for (int byte = 0; byte < 4; ++byte)
                to |= static_cast<std::uint32_t>(both >> (8 * (selector >> (4 * byte) & 7)) & 0xFF)
                      << (8 * byte);
            return to;
        });
    }
    static Float to_float(const Int& x) {
        return each<float>([&](int i) { return static_cast<float>(x[i]); });
    }
    static Int to_int(const Word& x) {
        return each<std::int32_t>([&](int i) { return static_cast<std::int32_t>(x[i]); });
    }
    static Float multiply_add(const Float& a, const Float& b, const Float& c) {
        return each<float>([&](int i) { return std::fma(a[i], b[i], c[i]); });
    }
    static Float multiply_add(const Float& a, float b, const Float& c) {
        return multiply_add(a, Float(b), c);
    }
    static Float maximum(const Float& a, const Float& b) {
        return each<float>([&](int i) { return std::fmax(a[i], b[i]); });
    }
    static Word minimum(const Word& a, const Word& b) {
        return each<std::uint32_t>([&](int i) { return std::min(a[i], b[i]); });
    }
    static Word count_bits(const Word& x) {
        return each<std::uint32_t>([&](int i) { return std::popcount(x[i]); });
    }
    static Float absolute(const Float& x) {
        return each<float>([&](int i) { return std::abs(x[i]); });
    }
    static Float exp2(const Float& x) {
        return each<float>([&](int i) { return std::exp2(x[i]); });
    }
    static Float cosine(const Word& x) {
        return each<float>([&](int i) { return std::cos(turn_angle(x[i])); });
    }
    static Float sine(const Word& x) {
        return each<float>([&](int i) { return std::sin(turn_angle(x[i])); });
    }
    static double turn_angle(std::uint32_t x) {
        return static_cast<std::int32_t>(x) * (2.0 * std::numbers::pi * 0x1p-32);
    }
    static Word multiply_high(const Word& a, const Word& b) {
        return each<std::uint32_t>([&](int i) { return std::uint64_t{a[i]} * b[i] >> 32; });
    }
    static Float tanh(const Float& x) {
        return each<float>([&](int i) { return std::tanh(x[i]); });
    }
    template <class T>
    static Lanes<T> select(const Flag& flag, const Lanes<T>& yes, const Lanes<T>& no) {
        return each<T>([&](int i) { return flag[i] ? yes[i] : no[i]; });
    }
    static Flag both(const Flag& a, const Flag& b) {
        return each<bool>([&](int i) { return a[i] && b[i]; });
    }
    static Flag either(const Flag& a, const Flag& b) {
        return each<bool>([&](int i) { return a[i] || b[i]; });
    }

    static void sync() {}
    static bool any(const Flag& flag) {
        return std::any_of(flag.at.begin(), flag.at.end(), [](bool x) { return x; });
    }
    static Float of_lane(const Float& x, int lane) { return Float(x[lane]); }
    static Float shuffle_xor(const Float& x, int lanes) {
        return each<float>([&](int i) { return x[i ^ lanes]; });
    }

    /// sums += A B; a_at and b_at give what stands in a row (column) and a place along the product.
    template <int depth, class Sum, class A, class B>
    static void multiply(Lanes<Sum> (&sums)[4], const A& a_at, const B& b_at) {
        Sum b[depth][8];
        for (int k = 0; k < depth; ++k)
            for (int column = 0; column < 8; ++column) b[k][column] = b_at(k, column);
        for (int row = 0; row < 16; ++row) {
            Sum sum[8] = {};
            for (int k = 0; k < depth; ++k) {
                const Sum a = a_at(row, k);
                for (int column = 0; column < 8; ++column) sum[column] += a * b[k][column];
            }
            for (int column = 0; column < 8; ++column)
                sums[row / 8 * 2 + column % 2][row % 8 * 4 + column / 2] += sum[column];
        }
    }
    static std::uint32_t byte_of(const Word& word, int lane, int byte) {
        return word[lane] >> (8 * byte) & 0xFFu;
    }
    static void multiply_signed(Int (&sums)[4], const Word (&a)[4], const Word (&b)[2]) {
        multiply<32>(
            sums,
            [&](int row, int k) {
                return static_cast<std::int32_t>(static_cast<std::int8_t>(
                    byte_of(a[row / 8 + 2 * (k / 16)], row % 8 * 4 + k % 16 / 4, k % 4)));
            },
            [&](int k, int column) {
                return static_cast<std::int32_t>(byte_of(b[k / 16], column * 4 + k % 16 / 4, k % 4));
            });
    }
    static void multiply_unsigned(Int (&sums)[4], const Word (&a)[4], const Word (&b)[2]) {
        multiply<32>(
            sums,
            [&](int row, int k) {
                return static_cast<std::int32_t>(
                    byte_of(a[row / 8 + 2 * (k / 16)], row % 8 * 4 + k % 16 / 4, k % 4));
            },
            [&](int k, int column) {
                return static_cast<std::int32_t>(byte_of(b[k / 16], column * 4 + k % 16 / 4, k % 4));
            });
    }
    static void multiply_halves(Float (&sums)[4], const Word (&a)[4], const Word& b0, const Word& b1) {
        const auto at = [](const Word& word, int lane, int k) {
            return half(word[lane] >> (16 * (k % 2)) & 0xFFFFu);
        };
        multiply<16>(
            sums, [&](int row, int k) { return at(a[row / 8 + 2 * (k / 8)], row % 8 * 4 + k % 8 / 2, k); },
            [&](int k, int column) { return at(k < 8 ? b0 : b1, column * 4 + k % 8 / 2, k); });
    }
};

}  // namespace kvplane::cuda
