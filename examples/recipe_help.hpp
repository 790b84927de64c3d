// examples/recipe_help.hpp: the recipes and read policies that command lines take, for --help.
#pragma once

#include <string>

namespace kvplane_examples {

inline std::string recipe_help() {
    return R"(recipes:
  fp16                    two bytes a number
  block32:BITS[:rotated]  symmetric blocks of 32 channels, 4 or 8 bits, as engines commonly have them
  kivi:BITS[:GROUP]       keys by channel, values by token, one width (arXiv 2402.02750)
  key_favored:KEY:VALUE   more bits for keys than for values (arXiv 2502.15075)
  standard, compact       the defaults without calibration: keys 5 bits, values 3; keys 4, values 2
  svdq:BITS[:VALUE]       keys in the SVD basis of all heads (arXiv 2502.15304); BITS 2, 1.25 or 8-4-2-1-1-0-0-0
  latent:KEY:VALUE        keys in the query-weighted basis, KEY bits on average in the best widths
  weighted:KEY:VALUE      the same without a basis: widths by channel
each with settings after a '+': sinks=N, recent=N, recent_bits=8|16, rotate_keys=0|1, rotate_values=0|1,
  key_scheme=, value_scheme=cell|min_max|symmetric, key_clip=, value_clip=0|1, key_group=32|64|128,
  value_group=N; with latents frame=before_rope|after_rope|tile, query_weighted=, heads_together=,
  layers_together=0|1, context=N, fit_tokens=N
)";
}

inline std::string read_policy_help() {
    return R"(read policies, after an '@', as in key_favored:8:8@4 (up to 8 query tokens at a time):
  BITS, KEY:VALUE         bits read of an element on average, where they count most; or of keys and of values
  fixedN                  the first N bits of every code
  tolerance=T             what keeps every output within T of the largest value
  published, aligned, exponents=A:B:C    of fp16, by exponents (arXiv 2409.16546)
)";
}

}  // namespace kvplane_examples
