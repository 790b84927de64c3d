// kvplane/attention/kernels/impl/dispatch.hpp: the table of kernels.
#pragma once

#include "kvplane/attention/kernels/amx.hpp"
#include "kvplane/attention/kernels/avx2.hpp"
#include "kvplane/attention/kernels/avx2_vnni.hpp"
#include "kvplane/attention/kernels/avx512_two_planes.hpp"
#include "kvplane/attention/kernels/dispatch.hpp"
#include "kvplane/attention/kernels/neon.hpp"
#include "kvplane/attention/kernels/scalar.hpp"

namespace kvplane::detail {

KVPLANE_FUNCTION const PlaneDot& plane_dot_of(Isa isa) noexcept {
    switch (isa) {
#if defined(KVPLANE_NEON)
        case Isa::neon:
            return neon::plane_dots;
#endif
#if defined(KVPLANE_X86)
        case Isa::amx:
            return amx::plane_dots;
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
