// kvplane/attention/kernels/dispatch.hpp: which integer kernels attention uses.
//
// They follow the instruction set of isa.hpp, which can be listed, forced by force_isa() and by KVPLANE_ISA.
#pragma once

#include "kvplane/attention/kernels/avx2.hpp"
#include "kvplane/attention/kernels/avx2_vnni.hpp"
#include "kvplane/attention/kernels/avx512_two_planes.hpp"
#include "kvplane/attention/kernels/neon.hpp"
#include "kvplane/attention/kernels/scalar.hpp"
#include "kvplane/simd/isa.hpp"

namespace kvplane::detail {

/// The kernels of an instruction set that this machine has.
inline const PlaneDot& plane_dot_of(Isa isa) noexcept {
    switch (isa) {
#if defined(KVPLANE_NEON)
        case Isa::neon:
            return neon::plane_dots;
#endif
#if defined(KVPLANE_X86)
        case Isa::avx512:
            return avx512::plane_dots;
        case Isa::avx2_vnni:
            return avx2_vnni::plane_dots;
        case Isa::avx2:
            return avx2::plane_dots;
#endif
        default:
            return scalar::plane_dots;
    }
}

}  // namespace kvplane::detail
