// kvplane/allocate/distortion.hpp: the squared error that a width causes, for use where nothing was measured.
#pragma once

#include <cstdint>

#include "kvplane/compiled.hpp"

namespace kvplane {

/// Relative squared error as a function of the width.
enum class DistortionCurve : std::uint8_t {
    automatic,           ///< measured where the layers were measured, four_to_minus_bits otherwise
    measured,            ///< the error of this library's quantizer on the tensors; see measure_layer
    four_to_minus_bits,  ///< 4^-b, the law of arXiv 2502.15075; any width
    uniform_gaussian,  ///< the uniform quantizer of least error for a unit Gaussian; see analytic_distortion
    lloyd_max_gaussian,  ///< the Lloyd-Max quantizer of a unit Gaussian; see analytic_distortion
};

/// The distortion of an analytic curve at one width. At width 0 it is 1. The two Gaussian curves are the mean
/// squared errors of the best quantizers of 2^width levels for a Gaussian of variance 1, for widths 0, 1, 2,
/// ... 8 and 1.58 (three levels). Their source is J. Max, Quantizing for minimum distortion, IRE Trans. Inf.
/// Theory 6, 1960, tables I and II. They were recomputed here to ten digits, and Max's fourth to sixth digits
/// differ: .009497 there is .009501. Throws Error: not_finite for a width that is not finite; option for a
/// negative width, a width that the table lacks, and the curves `automatic` and `measured`, which are not
/// analytic.
double analytic_distortion(DistortionCurve curve, double width);

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/allocate/impl/distortion.hpp"
#endif
