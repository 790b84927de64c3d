// kvplane/io/policy_file.hpp: how every layer of one model is cached, in one file that ships with the model.
//
//     const ModelPolicy policy = ModelPolicy::load("policy.safetensors");
//     policy.require_model("SmolLM2 135M Instruct", layers);  // what the engine knows of its layers
//     KvCache cache(policy.configuration(3), pool);           // recipe, widths, basis, moments
//
// A policy is a configuration for each layer with everything that it takes: the recipe by name
// (recipe_names.hpp), the basis and widths of its latents, the moments of queries that shape its keys. The
// program `tune` of the examples makes one from measured sensitivities (allocate/sensitivity.hpp).
//
//   tensors    layers.L.parts.P.*   the basis of a layer with latents, as in files of bases (latent_file.hpp)
//              layers.L.queries.*   moments of queries of a layer with shaped keys, as in files of statistics
//   metadata   kvplane.format       "model policy 1"
//              kvplane.model        the model's name
//              kvplane.heads        JSON: layers, kv_heads, query_heads, key_head_dim, value_head_dim,
//                                   values_in_keys
//              layers.L.recipe      a name that recipes::parse() takes
//              layers.L.rope, .basis   JSON, as kvplane.rope and kvplane.basis of latent_file.hpp
//              layers.L.context, .rotation_seed
//              kvplane.checksum     WordHash (io/checksum.hpp) of keys and texts of all the others, then of
//                                   name, dtype, sizes and bytes of every tensor, each in order of names
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "kvplane/cache/configuration.hpp"
#include "kvplane/compiled.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

/// A configuration for every layer of one model.
class ModelPolicy {
  public:
    /// Throws Error: option where there is no layer, or more than 65536; where a layer has other heads than
    /// the first or a recipe that its name does not give back; and whatever a cache refuses about a
    /// configuration (option, shape, mismatch). mismatch for a recipe with latents that has no basis, or
    /// with shaped keys that has no moments. The sentence names the layer.
    ModelPolicy(std::string model, std::vector<CacheConfiguration> layers);

    /// The model's name, as the engine has it.
    const std::string& model() const noexcept { return model_; }
    /// [layer]
    const std::vector<CacheConfiguration>& configurations() const noexcept { return layers_; }
    /// Throws Error (index).
    const CacheConfiguration& configuration(Index layer) const;

    /// Refuses a model that the policy was not made for. `layers` are the engine's own: of each its heads,
    /// channels, RoPE and values_in_keys are compared; recipes, bases and contexts are not looked at. Throws
    /// Error (mismatch) saying what differs, where, and what the policy expects.
    void require_model(const std::string& model, std::span<const CacheConfiguration> layers) const;

    /// Throws Error: option for a name that is no UTF-8; not_finite; io. What was at `path` is then
    /// untouched.
    void save(const std::filesystem::path& path) const;
    /// Throws Error: io; format where the file is damaged or contradicts itself; mismatch where it is
    /// another kind of file, or a policy of another version of this format.
    static ModelPolicy load(const std::filesystem::path& path);

  private:
    std::string model_;
    std::vector<CacheConfiguration> layers_;
};

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/io/impl/policy_file.hpp"
#endif
