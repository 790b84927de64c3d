// kvplane/attention/lanes.hpp: the words of simd/ that attention/ and read/ are written in.
#pragma once

#include "kvplane/simd/half.hpp"
#include "kvplane/simd/vector.hpp"

namespace kvplane::detail {

using simd::by_rows;
using simd::exponential;
using simd::Floats;
using simd::Ints;
using simd::larger;
using simd::load;
using simd::merge_rows;
using simd::plus;
using simd::reduce_rows;
using simd::store;
using simd::store_low_bytes;
using simd::sum_lanes;
using simd::widen;
using simd::Words;

}  // namespace kvplane::detail
