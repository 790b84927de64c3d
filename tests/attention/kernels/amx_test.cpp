// The kernels for AMX, on tiles in plain C++ where the machine has AVX-512 alone.
#include "kvplane/attention/kernels/amx.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstring>

#include "attention/kernels/plane_dot_support.hpp"

namespace {

#if defined(KVPLANE_X86)
using namespace kvplane;

/// What the instructions do.
struct EmulatedTiles {
    using Tile = std::array<std::array<std::uint8_t, 64>, 16>;

    template <int to>
    static void zero() noexcept {
        tiles[to] = {};
    }
    template <int to>
    static void load(const void* from, Index stride) noexcept {
        for (Index row = 0; row < 16; ++row)
            std::memcpy(tiles[to][static_cast<std::size_t>(row)].data(),
                        static_cast<const std::byte*>(from) + row * stride, 64);
    }
    template <int from>
    static void store(void* to, Index stride) noexcept {
        for (Index row = 0; row < 16; ++row)
            std::memcpy(static_cast<std::byte*>(to) + row * stride,
                        tiles[from][static_cast<std::size_t>(row)].data(), 64);
    }
    template <int to, int a, int b>
    static void dot() noexcept {
        for (std::size_t m = 0; m < 16; ++m)
            for (std::size_t n = 0; n < 16; ++n) {
                std::int32_t sum;
                std::memcpy(&sum, tiles[to][m].data() + 4 * n, 4);
                for (std::size_t k = 0; k < 16; ++k)
                    for (std::size_t j = 0; j < 4; ++j)
                        sum += static_cast<std::int8_t>(tiles[a][m][4 * k + j]) * tiles[b][k][4 * n + j];
                std::memcpy(tiles[to][m].data() + 4 * n, &sum, 4);
            }
    }

    static inline std::array<Tile, 8> tiles{};
};

TEST(Amx, OnEmulatedTilesEqualsTheDefinition) {
    if (!is_supported(Isa::avx512)) GTEST_SKIP() << "this machine lacks AVX512_VNNI";
    using namespace kvplane::detail::amx;
    kvplane_test::Random random(kvplane_test::seed());
    constexpr detail::PlaneDot emulated{
        .name = "emulated",
        .of_width = {plane_dot_on<EmulatedTiles, 1>, plane_dot_on<EmulatedTiles, 2>,
                     plane_dot_on<EmulatedTiles, 4>},
        .pairs = {{{.bits = 3, .dot = pair_dot_on<EmulatedTiles, 2, 1>},
                   {.bits = 5, .dot = pair_dot_on<EmulatedTiles, 4, 1>},
                   {.bits = 6, .dot = pair_dot_on<EmulatedTiles, 4, 2>},
                   {.bits = 8, .dot = pair_dot_on<EmulatedTiles, 4, 4>}}}};
    kvplane_test::expect_the_definition(emulated, random);
    for (const auto& pair : emulated.pairs) kvplane_test::expect_both_planes(emulated, pair.bits, random);
}

/// A scope inside of another leaves the tiles set up for it.
TEST(Amx, ScopesNest) {
    if (!is_supported(Isa::amx)) GTEST_SKIP() << "this machine lacks AMX";
    alignas(64) std::array<std::int32_t, 256> found{};
    found.fill(7);
    const detail::amx::TileScope outer;
    { const detail::amx::TileScope inner; }
    detail::amx::Tiles::zero<0>();
    detail::amx::Tiles::store<0>(found.data(), 64);
    EXPECT_EQ(found, (std::array<std::int32_t, 256>{}));
}
#else
TEST(Amx, IsForX86) {
    GTEST_SKIP() << "a kernel for x86";
}
#endif

}  // namespace
