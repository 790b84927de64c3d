// kvplane/io/latent_file.hpp: statistics and bases of latent keys, to and from safetensors.
//
// Two kinds of files. Statistics (`calibrate` of the examples writes them) serve every recipe with latents
// and merge; bases are what an engine ships with a model, for one recipe. Both say which model they belong
// to.
//
//   statistics  layers.L.keys.count [1], .mean [d], .scatter [d, d];
//               layers.L.queries.count [heads], .mean [heads, head_dim], .scatter [heads, head_dim, head_dim];
//               layers.L.weighted_queries.* likewise, where queries have weights; F64, before RoPE,
//               d = heads * head_dim
//   bases       layers.L.parts.P, P the number of the subspace:
//               .segments [runs, 2] I64 (latents, bits), .mean, .encode_scale, .decode_scale F32,
//               .decode (D), .encode (E) F16 or .channels I64
// Metadata: kvplane.format, kvplane.model (any name), kvplane.rope and kvplane.heads (JSON).
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/latent/keys.hpp"
#include "kvplane/latent/statistics.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane {

/// Statistics of all layers of a model.
struct Calibration {
    std::string model;
    std::optional<RopeSettings> rope;
    std::vector<LatentStatistics> layers;

    /// Throws Error (mismatch) for another model, rotary embedding or shape, and then has changed nothing.
    void merge(const Calibration& other);
};

/// Throws Error: option (no layers, layers of different heads, a rotary embedding that is none, beyond 65536
/// layers, heads or channels a head), not_finite, io; and then leaves what was at `path`.
void save_calibration(const Calibration& calibration, const std::filesystem::path& path);
/// Throws Error: io; format; mismatch (no statistics; with `model` not empty, of another model).
Calibration load_calibration(const std::filesystem::path& path, const std::string& model = "");

/// Bases and widths of all layers of a model. Throws Error (option) for no layers, different kinds of bases,
/// or numbers beyond what load_latent_keys reads, (io); and then leaves what was at `path`.
void save_latent_keys(const std::vector<std::shared_ptr<const LatentKeys>>& layers, const std::string& model,
                      const std::filesystem::path& path);
/// Throws Error: io; format; mismatch (no bases; with `model` not empty, of another model).
std::vector<std::shared_ptr<const LatentKeys>> load_latent_keys(const std::filesystem::path& path,
                                                                const std::string& model = "");

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/io/impl/latent_file.hpp"
#endif
