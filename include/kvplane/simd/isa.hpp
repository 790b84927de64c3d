// kvplane/simd/isa.hpp: which instruction set the kernels use, as something one can list, print and force.
//
// Kernels are compiled for each instruction set through function target attributes, so a program built with
// plain -O2 still runs AVX-512. All of them give the same bytes; forcing one is for tests and measurements.
//
// To add one: an enumerator, a row of all_isas with its test, a KVPLANE_TARGET_ macro where it needs one, and
// its kernels in attention/kernels/. A new number of lanes also needs a function beside run_avx512 below.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <string_view>
#include <type_traits>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/error.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define KVPLANE_X86 1
#define KVPLANE_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define KVPLANE_TARGET_AVX2_VNNI __attribute__((target("avx2,fma,f16c,avxvnni")))
#define KVPLANE_TARGET_AVX512 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#define KVPLANE_NEON 1
#define KVPLANE_TARGET_NEON __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
/// For the bodies that one source shares between instruction sets: they take the target of their caller.
#define KVPLANE_INLINE __attribute__((always_inline)) inline
/// The same for a lambda: [&](auto lanes) KVPLANE_BODY { ... }
#define KVPLANE_BODY __attribute__((always_inline))

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "kvplane's storage format is little-endian");

namespace kvplane {

/// Instruction sets, ascending. `scalar` is what the program was compiled for (SSE2 or Advanced SIMD at
/// least), `neon` the same with the dot product of Armv8.2.
enum class Isa : int { scalar, neon, avx2, avx2_vnni, avx512, amx };

struct IsaDescription {
    Isa isa;
    std::string_view name;      ///< what KVPLANE_ISA takes
    std::string_view features;  ///< what the processor must have
    int lanes;                  ///< fp32 numbers of a vector: what run_on() compiles for
    bool (*test)() noexcept;    ///< whether this machine can run it
};

namespace detail {

inline bool always() noexcept {
    return true;
}
#if defined(KVPLANE_NEON)
inline bool has_neon() noexcept {
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}
#else
inline bool has_neon() noexcept {
    return false;
}
#endif
#if defined(KVPLANE_X86)
// F16C and AVX_VNNI are bits of cpuid that compilers have no name for. The operating system's part (that it
// keeps the registers) is the same as AVX2's.
inline bool has_avx2() noexcept {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
}
inline bool has_avx2_vnni() noexcept {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
inline bool has_avx512() noexcept {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
/// Linux hands tile registers out on request, once a process.
inline bool has_amx() noexcept {
#if defined(__linux__)
    static const bool granted = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
        if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile) == 0 || (d & int8) == 0)
            return false;
        constexpr long request_permission = 0x1023, tile_data = 18;
        return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return granted;
#else
    return false;
#endif
}
#else
inline bool has_avx2() noexcept {
    return false;
}
inline bool has_avx2_vnni() noexcept {
    return false;
}
inline bool has_avx512() noexcept {
    return false;
}
inline bool has_amx() noexcept {
    return false;
}
#endif

}  // namespace detail

/// Every instruction set once, in the order of Isa.
inline constexpr std::array<IsaDescription, 6> all_isas{{
    {Isa::scalar, "scalar", "none", 4, detail::always},
    {Isa::neon, "neon", "ASIMDDP", 4, detail::has_neon},
    {Isa::avx2, "avx2", "AVX2 FMA F16C", 8, detail::has_avx2},
    {Isa::avx2_vnni, "avx2_vnni", "AVX2 FMA F16C AVX_VNNI", 8, detail::has_avx2_vnni},
    {Isa::avx512, "avx512", "AVX512F AVX512BW AVX512DQ AVX512VL AVX512_VNNI", 16, detail::has_avx512},
    {Isa::amx, "amx", "AVX512F AVX512BW AVX512DQ AVX512VL AVX512_VNNI AMX_TILE AMX_INT8", 16,
     detail::has_amx},
}};

namespace detail {

/// The row of an instruction set, or nullptr for a number that is none.
constexpr const IsaDescription* description_of(Isa isa) noexcept {
    const auto at = static_cast<std::size_t>(isa);
    return at < all_isas.size() ? &all_isas[at] : nullptr;
}

constexpr bool rows_follow_the_enumeration() noexcept {
    for (std::size_t i = 0; i < all_isas.size(); ++i)
        if (static_cast<std::size_t>(all_isas[i].isa) != i) return false;
    return true;
}
static_assert(rows_follow_the_enumeration());

}  // namespace detail

constexpr std::string_view name(Isa isa) noexcept {
    const IsaDescription* const description = detail::description_of(isa);
    return description ? description->name : "unknown";
}

/// Whether this machine can run it.
inline bool is_supported(Isa isa) noexcept {
    const IsaDescription* const description = detail::description_of(isa);
    return description && description->test();
}

/// All that this machine can run, ascending.
std::vector<Isa> supported_isas();

/// The instruction set of that name. Throws Error (option) for an unknown one, or one this machine lacks.
Isa isa_named(std::string_view wanted);

namespace detail {

/// What KVPLANE_ISA names, or the best that this machine has. Throws Error (option); the sentence goes to
/// stderr as well, because the first call may come from a function that must not throw.
Isa initial_isa();

inline std::atomic<Isa>& isa_slot() {
    static std::atomic<Isa> slot{initial_isa()};
    return slot;
}

}  // namespace detail

/// The instruction set in use: the best supported one, or the one KVPLANE_ISA names, or the forced one.
inline Isa current_isa() {
    return detail::isa_slot().load(std::memory_order_relaxed);
}

/// Makes all kernels of this process use `isa`. Throws Error (option) when this machine lacks it.
void force_isa(Isa isa);

namespace detail {

template <int lanes>
using LaneCount = std::integral_constant<int, lanes>;

template <class Body>
inline auto run_scalar(const Body& body) {
    return body(LaneCount<4>{});
}
#if defined(KVPLANE_X86)
template <class Body>
KVPLANE_TARGET_AVX2 inline auto run_avx2(const Body& body) {
    return body(LaneCount<8>{});
}
template <class Body>
KVPLANE_TARGET_AVX512 inline auto run_avx512(const Body& body) {
    return body(LaneCount<16>{});
}
#endif

/// Runs a loop body written once with vector types, compiled for the given instruction set: `body` is a
/// generic lambda marked KVPLANE_BODY that takes the number of fp32 lanes as an integral constant and calls
/// nothing but KVPLANE_INLINE functions.
template <class Body>
auto run_on(Isa isa, const Body& body) {
#if defined(KVPLANE_X86)
    // A target is an attribute of a function, so that rows of a table cannot hold it.
    const IsaDescription* const description = description_of(isa);
    switch (description ? description->lanes : 4) {
        case 16:
            return run_avx512(body);
        case 8:
            return run_avx2(body);
        default:
            break;
    }
#endif
    return run_scalar(body);
}

}  // namespace detail
}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/simd/impl/isa.hpp"
#endif
