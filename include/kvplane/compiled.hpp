// kvplane/compiled.hpp: header-only, or compiled once.
//
// kvplane is header-only. A program may link the CMake target kvplane::compiled instead of kvplane::kvplane:
// a static library that holds everything in the impl/ folders, so that the program itself compiles faster.
// The target defines KVPLANE_COMPILED, and with it the same headers only declare what the library defines.
#pragma once

#if defined(KVPLANE_COMPILED)
#define KVPLANE_FUNCTION
#else
#define KVPLANE_FUNCTION inline
#endif

// Whether io/ is there, which needs nlohmann/json. kvplane::compiled defines this as it was when the library
// was built, so that the headers never declare what the library lacks.
#if !defined(KVPLANE_WITH_JSON)
#if __has_include(<nlohmann/json.hpp>)
#define KVPLANE_WITH_JSON 1
#else
#define KVPLANE_WITH_JSON 0
#endif
#endif

namespace kvplane {

/// The version of the code in use, such as "0.1.0". With kvplane::compiled it is the library's, which differs
/// from KVPLANE_VERSION_MAJOR and so on where the headers of one version meet the library of another.
const char* version() noexcept;

#if defined(KVPLANE_COMPILED)
namespace detail {

/// Defined in the library for one number only, the alignment of its own Eigen matrices. Eigen frees memory by
/// the rules of that alignment, which changes with -mavx2, -mavx512f and -march=native.
template <int alignment>
bool library_aligns_eigen_matrices_to() noexcept;

}  // namespace detail
#endif

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/impl/compiled.hpp"
#endif
