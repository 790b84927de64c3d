// kvplane/simd/impl/isa.hpp: the functions of simd/isa.hpp.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "kvplane/simd/isa.hpp"

namespace kvplane {

KVPLANE_FUNCTION std::vector<Isa> supported_isas() {
    std::vector<Isa> supported;
    for (const IsaDescription& description : all_isas)
        if (description.test()) supported.push_back(description.isa);
    return supported;
}

namespace detail {

/// What is wrong with a name; "" where nothing is, and then `isa` is what it names.
inline std::string refuse_isa_name(std::string_view wanted, Isa& isa) {
    std::string names;
    for (const IsaDescription& description : all_isas) {
        if (description.name == wanted) {
            isa = description.isa;
            if (description.test()) return "";
            return "instruction set " + std::string(wanted) + ": this machine lacks it (needs " +
                   std::string(description.features) + ")";
        }
        const bool last = &description == &all_isas.back();
        names += (names.empty() ? "" : last ? " or " : ", ") + std::string(description.name);
    }
    return "instruction set '" + std::string(wanted) + "': expected " + names;
}

KVPLANE_FUNCTION Isa initial_isa() {
    Isa isa = supported_isas().back();
    const char* const wanted = std::getenv("KVPLANE_ISA");
    if (!wanted || !*wanted) return isa;
    const std::string refusal = refuse_isa_name(wanted, isa);
    if (refusal.empty()) return isa;
    std::fprintf(stderr, "kvplane: KVPLANE_ISA: %s\n", refusal.c_str());
    fail(ErrorCode::option, refusal);
}

}  // namespace detail

KVPLANE_FUNCTION Isa isa_named(std::string_view wanted) {
    Isa isa = Isa::scalar;
    const std::string refusal = detail::refuse_isa_name(wanted, isa);
    require(refusal.empty(), ErrorCode::option, refusal);
    return isa;
}

KVPLANE_FUNCTION void force_isa(Isa isa) {
    require(is_supported(isa), ErrorCode::option, "instruction set ", name(isa), ": this machine lacks it");
    detail::isa_slot().store(isa, std::memory_order_relaxed);
}

}  // namespace kvplane
