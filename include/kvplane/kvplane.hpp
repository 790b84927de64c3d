// kvplane/kvplane.hpp: everything. io/safetensors.hpp and cache/serialize.hpp need nlohmann/json and are
// left out where that is not installed.
#pragma once

#include "kvplane/allocate/bit_allocation.hpp"
#include "kvplane/allocate/key_favored.hpp"
#include "kvplane/attention/parameters.hpp"
#include "kvplane/attention/reference.hpp"
#include "kvplane/cache/configuration.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cache/tile_pool.hpp"
#include "kvplane/cache/token_rows.hpp"
#include "kvplane/error.hpp"
#include "kvplane/isa.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/metrics.hpp"
#include "kvplane/quantize/block.hpp"
#include "kvplane/quantize/grid.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/quantize/scalar.hpp"
#include "kvplane/recipes.hpp"
#include "kvplane/storage/planes.hpp"
#include "kvplane/storage/tile.hpp"
#include "kvplane/theory/bounds.hpp"
#include "kvplane/transform/hadamard.hpp"
#include "kvplane/version.hpp"
#if __has_include(<nlohmann/json.hpp>)
#include "kvplane/cache/serialize.hpp"
#include "kvplane/io/safetensors.hpp"
#endif
