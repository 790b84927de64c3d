// kvplane/attention/kernels/dispatch.hpp: which integer kernels attention uses.
//
// They follow the instruction set of isa.hpp, which can be listed, forced by force_isa() and by KVPLANE_ISA.
#pragma once

#include "kvplane/attention/kernels/amx_tiles.hpp"
#include "kvplane/attention/kernels/plane_dot.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/simd/isa.hpp"

namespace kvplane::detail {

/// The kernels of an instruction set that this machine has.
const PlaneDot& plane_dot_of(Isa isa) noexcept;

/// What kernels of an instruction set need on a thread that calls many of them with up to `rows` rows. They work
/// without, more slowly.
class KernelScope {
  public:
#if defined(KVPLANE_X86)
    KernelScope(Isa isa, Index rows) noexcept : tiles_(isa == Isa::amx && rows >= amx::least_rows) {}

  private:
    amx::TileScope tiles_;
#else
    KernelScope(Isa, Index) noexcept {}
#endif
};

}  // namespace kvplane::detail

#if !defined(KVPLANE_COMPILED)
#include "kvplane/attention/kernels/impl/dispatch.hpp"
#endif
