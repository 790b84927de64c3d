// kvplane/allocate/impl/distortion.hpp: the tables of the Gaussian curves.
#pragma once

#include "kvplane/allocate/distortion.hpp"

#include <array>
#include <cmath>
#include <cstddef>

#include "kvplane/error.hpp"

namespace kvplane {

namespace detail::distortion {

// [width in bits] distortion of the best quantizers of a unit Gaussian. tests/allocate/distortion_test.cpp
// computes both tables again.
inline constexpr std::array<double, 9> uniform_table = {1,
                                                        0.3633802276324,
                                                        0.1188460503841,
                                                        0.03743965939152,
                                                        0.01154288443135,
                                                        0.003495211361506,
                                                        0.001040045408792,
                                                        0.000304332770824,
                                                        0.00008768618578399};
inline constexpr std::array<double, 9> lloyd_max_table = {1,
                                                          0.3633802276324,
                                                          0.1174818478293,
                                                          0.0345477607885,
                                                          0.009501008008192,
                                                          0.002504668355675,
                                                          0.0006442396653171,
                                                          0.0001634782299804,
                                                          0.00004118508286698};
inline constexpr double three_levels = 0.1901740392479;  // the same for both: three levels are always uniform

/// The table index of a width: -1 if the tables lack it, 9 for three levels.
inline int table_index(double width) {
    if (std::abs(width - std::log2(3.0)) < 0.006) return 9;  // 1.58 and 1.585 stand for log2(3)
    const double rounded = std::round(width);
    return width == rounded && rounded <= 8 ? static_cast<int>(rounded) : -1;
}

}  // namespace detail::distortion

KVPLANE_FUNCTION double analytic_distortion(DistortionCurve curve, double width) {
    require(std::isfinite(width), ErrorCode::not_finite, "width: ", width, ", expected a finite number");
    require(width >= 0, ErrorCode::option, "width: ", width, ", expected 0 or more");
    if (curve == DistortionCurve::four_to_minus_bits) return std::exp2(-2 * width);
    const bool uniform = curve == DistortionCurve::uniform_gaussian;
    require(uniform || curve == DistortionCurve::lloyd_max_gaussian, ErrorCode::option,
            "curve: ", static_cast<int>(curve), ", expected an analytic one");
    const int index = detail::distortion::table_index(width);
    require(index >= 0, ErrorCode::option, "width: ", width,
            " is not in the table, expected an integer from 0 to 8, or 1.58");
    if (index == 9) return detail::distortion::three_levels;
    const auto& table = uniform ? detail::distortion::uniform_table : detail::distortion::lloyd_max_table;
    return table[static_cast<std::size_t>(index)];
}

}  // namespace kvplane
