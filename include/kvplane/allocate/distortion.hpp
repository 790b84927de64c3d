// kvplane/allocate/distortion.hpp: what a width costs in squared error, where nothing was measured.
#pragma once

#include <cstdint>

#include "kvplane/compiled.hpp"

namespace kvplane {

/// Relative squared error as a function of the width.
enum class DistortionCurve : std::uint8_t {
    automatic,           ///< measured where the layers were measured, four_to_minus_bits otherwise
    measured,            ///< what this library's quantizer makes of the tensors: see measure_layer
    four_to_minus_bits,  ///< 4^-b, the law of arXiv 2502.15075; any width
    uniform_gaussian,  ///< the uniform quantizer of least error for a unit Gaussian; see gaussian_distortion
    lloyd_max_gaussian,  ///< the Lloyd-Max quantizer of a unit Gaussian; see gaussian_distortion
};

/// The distortion of an analytic curve at one width, 1 at width 0. The two Gaussian curves are the mean
/// squared errors of the best quantizers of 2^width levels for a Gaussian of variance 1 (J. Max, Quantizing
/// for minimum distortion, IRE Trans. Inf. Theory 6, 1960, tables I and II; recomputed here to ten digits, of
/// which Max's fourth to sixth differ: .009497 there is .009501), for widths 0, 1, 2, ... 8 and 1.58 (three
/// levels). Throws Error (not_finite, option) for a negative width, one that the table lacks, and the curves
/// `automatic` and `measured`, which are none.
double analytic_distortion(DistortionCurve curve, double width);

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/allocate/impl/distortion.hpp"
#endif
