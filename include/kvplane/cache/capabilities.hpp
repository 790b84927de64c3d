// kvplane/cache/capabilities.hpp: what a configuration can do beyond storing and attending, as data.
#pragma once

#include <string>
#include <vector>

#include "kvplane/cache/configuration.hpp"
#include "kvplane/compiled.hpp"

namespace kvplane {

/// What a cache of some configuration supports. What it does not is refused with a sentence by the call that
/// asks for it.
struct CacheCapabilities {
    /// Attention reads the packed bits as they are, without allocation, but for a key_fraction. Otherwise it
    /// decodes tiles to floats, which takes many times as long.
    bool decodes_packed = false;
    /// Why tiles are decoded, in words that follow "because"; empty where packed bits are read.
    std::string decodes_tiles_because;
    /// Which of the two ways attention goes, in two words.
    const char* path() const noexcept { return decodes_packed ? "packed bits" : "decoded tiles"; }
    /// ReadPolicy::fixed and aligned, of any number of bits; of a side in fp16, of 8 bits and more.
    bool reads_by_bits = false;
    bool reads_by_tolerance = false;  ///< ReadPolicy::tolerance
    bool reads_by_exponents = false;  ///< ReadPolicy::exponents, of sides in fp16
    bool selects_keys = false;        ///< AttentionParameters::key_fraction
    /// A truncation inside a tile loses nothing. Otherwise its tokens are rounded once more with their next
    /// tile. Provisional tokens are taken back exactly by every recipe.
    bool truncates_exactly = false;
    bool removes = false;  ///< KvCache::remove
    /// The widths that KvCache::narrow leaves keys and values of the recipe's width, largest first; of keys in
    /// latents those of the widest latents. None where they cannot be narrowed.
    std::vector<int> narrower_keys, narrower_values;
    bool fits_basis = false;     ///< the cache fits a basis of its own to the first tokens
    bool wants_queries = false;  ///< append() takes queries until KvCache::needs_queries() says no
    /// append() chooses which tokens of values get more bits by queries, where these are given.
    bool weighs_tokens = false;
    bool predicts_bytes = false;  ///< KvCache::predicted_bytes
};

/// Throws Error (option) for a configuration that cannot be.
CacheCapabilities capabilities(const CacheConfiguration& configuration);

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/cache/impl/capabilities.hpp"
#endif
