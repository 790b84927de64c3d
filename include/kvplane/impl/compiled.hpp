// kvplane/impl/compiled.hpp: what kvplane::compiled says about itself.
#pragma once

#include "kvplane/compiled.hpp"
#include "kvplane/version.hpp"

#if defined(KVPLANE_COMPILED)
#include <Eigen/Core>
#endif

#define KVPLANE_QUOTED_(x) #x
#define KVPLANE_QUOTED(x) KVPLANE_QUOTED_(x)

namespace kvplane {

KVPLANE_FUNCTION const char* version() noexcept {
    return KVPLANE_QUOTED(KVPLANE_VERSION_MAJOR) "." KVPLANE_QUOTED(KVPLANE_VERSION_MINOR) "." KVPLANE_QUOTED(
        KVPLANE_VERSION_PATCH);
}

#if defined(KVPLANE_COMPILED)
namespace detail {

template <int alignment>
bool library_aligns_eigen_matrices_to() noexcept {
    return true;
}
template bool library_aligns_eigen_matrices_to<EIGEN_DEFAULT_ALIGN_BYTES>() noexcept;

}  // namespace detail
#endif

}  // namespace kvplane

#undef KVPLANE_QUOTED
#undef KVPLANE_QUOTED_
