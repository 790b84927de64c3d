// kvplane/isa.hpp: which instruction set the kernels use, as something one can list, print and force.
//
// Kernels are compiled for each instruction set through function target attributes, so a program built with
// plain -O2 still runs AVX-512. All of them give the same bytes; forcing one is for tests and measurements.
#pragma once

#include <array>
#include <atomic>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "kvplane/error.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
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
enum class Isa : int { scalar, neon, avx2, avx2_vnni, avx512 };

struct IsaDescription {
    Isa isa;
    std::string_view name;      ///< what KVPLANE_ISA takes
    std::string_view features;  ///< what the processor must have
};

inline constexpr std::array<IsaDescription, 5> all_isas{{
    {Isa::scalar, "scalar", "none"},
    {Isa::neon, "neon", "ASIMDDP"},
    {Isa::avx2, "avx2", "AVX2 FMA F16C"},
    {Isa::avx2_vnni, "avx2_vnni", "AVX2 FMA F16C AVX_VNNI"},
    {Isa::avx512, "avx512", "AVX512F AVX512BW AVX512DQ AVX512VL AVX512_VNNI"},
}};

inline std::string_view name(Isa isa) noexcept {
    for (const auto& description : all_isas)
        if (description.isa == isa) return description.name;
    return "unknown";
}

#if defined(KVPLANE_X86)
namespace detail {
/// A bit of what cpuid says, for features that compilers have no name for. The operating system's part (that
/// it keeps the registers) is the same as AVX2's.
inline bool has_f16c() noexcept {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
inline bool has_avx_vnni() noexcept {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
}  // namespace detail
#endif

/// Whether this machine can run it.
inline bool is_supported(Isa isa) noexcept {
    switch (isa) {
        case Isa::scalar:
            return true;
#if defined(KVPLANE_NEON)
        case Isa::neon:
            return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
#if defined(KVPLANE_X86)
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && detail::has_f16c();
        case Isa::avx2_vnni:
            return is_supported(Isa::avx2) && detail::has_avx_vnni();
        case Isa::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512vnni");
#endif
        default:
            return false;
    }
}

/// All that this machine can run, ascending.
inline std::vector<Isa> supported_isas() {
    std::vector<Isa> supported;
    for (const auto& description : all_isas)
        if (is_supported(description.isa)) supported.push_back(description.isa);
    return supported;
}

/// The instruction set of that name. Throws Error (option) for an unknown one, or one this machine lacks.
inline Isa isa_named(std::string_view wanted) {
    for (const auto& description : all_isas) {
        if (description.name != wanted) continue;
        require(is_supported(description.isa), ErrorCode::option, "instruction set ", wanted,
                ": this machine lacks it (needs ", description.features, ")");
        return description.isa;
    }
    fail(ErrorCode::option, "instruction set '", wanted,
         "': expected scalar, neon, avx2, avx2_vnni or avx512");
}

namespace detail {

inline Isa initial_isa() {
    if (const char* wanted = std::getenv("KVPLANE_ISA"); wanted && *wanted) return isa_named(wanted);
    Isa best = Isa::scalar;
    for (const auto& description : all_isas)
        if (is_supported(description.isa)) best = description.isa;
    return best;
}

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
inline void force_isa(Isa isa) {
    require(is_supported(isa), ErrorCode::option, "instruction set ", name(isa), ": this machine lacks it");
    detail::isa_slot().store(isa, std::memory_order_relaxed);
}

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

}  // namespace detail

/// Runs a loop body written once with vector types, compiled for the given instruction set: `body` is a
/// generic lambda marked KVPLANE_BODY that takes the number of fp32 lanes as an integral constant and calls
/// nothing but KVPLANE_INLINE functions.
template <class Body>
auto run_on(Isa isa, const Body& body) {
    switch (isa) {
#if defined(KVPLANE_X86)
        case Isa::avx512:
            return detail::run_avx512(body);
        case Isa::avx2:
        case Isa::avx2_vnni:
            return detail::run_avx2(body);
#endif
        default:
            return detail::run_scalar(body);
    }
}

}  // namespace kvplane
