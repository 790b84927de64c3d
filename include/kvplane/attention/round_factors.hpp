// kvplane/attention/round_factors.hpp: factors by the fastest way that an instruction set has.
#pragma once

#include "kvplane/attention/factors.hpp"
#include "kvplane/attention/kernels/dispatch.hpp"
#include "kvplane/attention/lanes.hpp"

namespace kvplane::detail {

/// Makes the factors of `rows` rows.
inline void round_factors(Isa isa, const Factors& all, Index rows) noexcept {
    const PlaneDot& kernels = plane_dot_of(isa);
    if (kernels.factors && !all.active && !(all.low && all.unread)) return kernels.factors(all, rows);
    run_on(isa, [&](auto lanes) KVPLANE_BODY {
        by_rows(rows, [&](auto together, Index first)
                          KVPLANE_BODY { factor_rows<lanes, together>(all.from_row(first)); });
    });
}

}  // namespace kvplane::detail
