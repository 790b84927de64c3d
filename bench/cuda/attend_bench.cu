// Attention on packed tiles in device memory: time, and the time that plainly reading as many bytes takes.
//
//   cuda_attend_bench [recipes]     widths and shapes of bench/README.md, 32 query heads over 8 key heads of
//   128
//
// Times are medians of 31 launches, from event to event, with a second-level cache that holds nothing of the
// pages: a kernel reads as much other memory before each. Pages are random bytes behind random pointers, with
// grids that are numbers.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cuda/timing.cuh"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/cuda/device_attention.cuh"
#include "kvplane/cuda/layer_view.hpp"
#include "kvplane/recipe_names.hpp"

namespace {

using namespace kvplane;
using namespace kvplane::cuda;
using namespace kvplane_bench;

struct Shape {
    Index sequences, tokens;
};

/// A batch of sequences of full tiles without tokens outside them.
class Batch {
  public:
    Batch(const PageLayout& layout, const LatentKeys* latent, const Shape& shape) : layout_(layout) {
        std::mt19937_64 random(7);
        const Index tiles = shape.tokens / tile_tokens, pages = tiles * shape.sequences;
        bytes_ = static_cast<std::size_t>(pages * layout.bytes);
        must(cudaMalloc(&memory_, bytes_), "memory of pages");
        // Some pages many times.
        const Index different = std::min<Index>(pages, 64);
        std::vector<std::byte> page(static_cast<std::size_t>(different * layout.bytes));
        for (std::size_t i = 0; i + 8 <= page.size(); i += 8) {
            const std::uint64_t bits = random();
            std::memcpy(&page[i], &bits, 8);
        }
        for (Index p = 0; p < different; ++p) fill_grids(page.data() + p * layout.bytes, random);
        for (Index p = 0; p < pages; p += different)
            must(cudaMemcpy(memory_ + p * layout.bytes, page.data(),
                            static_cast<std::size_t>(std::min(different, pages - p) * layout.bytes),
                            cudaMemcpyHostToDevice),
                 "copy");
        std::vector<Index> order(static_cast<std::size_t>(pages));
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random);
        for (Index i = 0; i < pages; ++i)
            tiles_.push_back({memory_ + order[static_cast<std::size_t>(i)] * layout.bytes,
                              static_cast<std::int32_t>(i % tiles * tile_tokens), 0, 128, 0});
        must(cudaMalloc(&device_tiles_, tiles_.size() * sizeof(DeviceTile)), "memory");
        must(cudaMemcpy(device_tiles_, tiles_.data(), tiles_.size() * sizeof(DeviceTile),
                        cudaMemcpyHostToDevice),
             "copy");
        for (Index s = 0; s < shape.sequences; ++s) {
            DeviceSequence& sequence = sequences_.emplace_back();
            sequence.tiles = std::span(tiles_).subspan(static_cast<std::size_t>(s * tiles),
                                                       static_cast<std::size_t>(tiles));
            sequence.device_tiles = device_tiles_ + s * tiles;
            sequence.tokens = sequence.recent_first = shape.tokens;
            sequence.page_bytes = layout.bytes;
            sequence.latent = latent;
        }
    }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;
    ~Batch() {
        cudaFree(memory_);
        cudaFree(device_tiles_);
    }
    std::span<const DeviceSequence> sequences() const { return sequences_; }
    const std::byte* memory() const { return memory_; }

  private:
    void fill_grids(std::byte* page, std::mt19937_64& random) const {
        std::uniform_real_distribution<float> uniform(0.005f, 0.02f);
        const auto fill = [&](std::byte* tile, const TileFormat& format) {
            if (format.by_token()) {
                TokenOfRow tokens;
                std::iota(tokens.begin(), tokens.end(), std::uint8_t{0});
                std::shuffle(tokens.begin(), tokens.end(), random);
                write_runs(format, tokens, tile);
            }
            for (const TileFormat::Placed& s : format.segments()) {
                if (!s.has_grids()) {
                    // High bytes of small numbers.
                    if (s.is_half())
                        for (Index i = 0; i < 128 * s.channels; ++i)
                            tile[s.plane_at[0] + i] =
                                static_cast<std::byte>((random() & 0x80) | 0x2C | (random() & 3));
                    continue;
                }
                for (Index g = 0; g < s.grids; ++g) {
                    const auto put = [&](Index at, float x) {
                        const Eigen::half half(x);
                        std::memcpy(tile + at, &half, 2);
                    };
                    if (step_bytes(s.scheme) == 2)
                        put(s.step_at + 2 * g, uniform(random));
                    else
                        tile[s.step_at + g] = static_cast<std::byte>(step_byte(uniform(random)));
                    if (has_lower(s.scheme)) put(s.lower_at + 2 * g, -8.0f * uniform(random));
                }
            }
        };
        for (std::size_t h = 0; h < layout_.value_at.size(); ++h) {
            fill(page + layout_.key_at[h], layout_.key_format_of_head(static_cast<Index>(h)));
            fill(page + layout_.value_at[h], layout_.values);
        }
    }

    const PageLayout& layout_;
    std::byte* memory_ = nullptr;
    DeviceTile* device_tiles_ = nullptr;
    std::size_t bytes_ = 0;
    std::vector<DeviceTile> tiles_;
    std::vector<DeviceSequence> sequences_;
};

/// A basis and widths for keys of a spectrum that falls by e over 30 latents, as those of models do.
std::shared_ptr<const LatentKeys> fitted_basis(const CacheConfiguration& configuration) {
    std::mt19937_64 random(11);
    std::normal_distribution<float> normal;
    const auto numbers = [&](Index rows, Index columns) {
        Matrix to(rows, columns);
        for (Index i = 0; i < to.size(); ++i) to.data()[i] = normal(random);
        return to;
    };
    const Index dim = configuration.key_head_dim, heads = configuration.kv_heads;
    Matrix keys = numbers(1024, heads * dim);
    for (Index c = 0; c < keys.cols(); ++c) keys.col(c) *= std::exp(static_cast<float>(c % dim) / -30.0f);
    TilePool pool;
    KvCache cache(configuration, pool);
    cache.append(keys, numbers(1024, heads * configuration.value_head_dim),
                 numbers(1024, configuration.query_heads * dim));
    return cache.state().latent;
}

}  // namespace

int main(int count, char** arguments) try {
    const std::byte* const other = begin_bench();
    const std::span named(arguments, static_cast<std::size_t>(count));
    std::printf("empty launch %.1f us\n", time_of([] { read_all<<<1, 32>>>(nullptr, 0, nullptr); }, other));
    std::printf("%-18s %3s %7s %7s %9s %10s %7s %6s\n", "recipe", "B", "N", "MB", "us", "plain read", "TB/s",
                "share");
    const std::vector<Shape> shapes = {{1, 4096}, {1, 32768}, {8, 8192}, {1, 131072}, {8, 32768}};
    struct Row {
        const char* recipe;
        bool all;
        PlanesRead read = {};
        const char* note = "";
    };
    for (const Row& row :
         {Row{"key_favored:4:4", true}, Row{"latent:3:3", false}, Row{"latent:4:4", false},
          Row{"smallest", false}, Row{"key_favored:8:8", false},
          Row{"key_favored:8:8", false, {1, 1}, " first planes"}, Row{"key_favored:2:2", false},
          Row{"key_favored:5:3", true}, Row{"key_favored:4:2", false}, Row{"key_favored:3:3", false},
          Row{"kivi:4:32", false}, Row{"key_favored:6:6", false}, Row{"fp16", true}}) {
        if (!is_wanted(row.recipe, named)) continue;
        CacheConfiguration configuration{.kv_heads = 8,
                                         .query_heads = 32,
                                         .key_head_dim = 128,
                                         .value_head_dim = 128,
                                         .recipe = recipes::parse(row.recipe)};
        if (configuration.recipe.latents) {
            configuration.recipe.latents->basis.heads_together = false;
            configuration.rope = RopeSettings{};
            configuration.latent_keys = fitted_basis(configuration);
        }
        const kvplane::detail::CacheShape shape(configuration);
        const AttendLayer layer = attend_layer(shape, row.read);
        if (layer.latent)
            for (const ChannelSegment& s : layer.latent->subspace(0).segments)
                std::printf("%s: %d latents of %d bits\n", row.recipe, static_cast<int>(s.channels), s.bits);
        for (const Shape& of : shapes) {
            if (!row.all && of.tokens * of.sequences < 131072) continue;
            if (std::string(row.recipe) == "fp16" && of.tokens * of.sequences > 262144) continue;
            const Batch batch(*shape.layout, layer.latent.get(), of);
            std::vector<Eigen::half> queries(static_cast<std::size_t>(of.sequences * 32 * 128));
            std::mt19937_64 random(3);
            std::normal_distribution<float> normal;
            for (Eigen::half& q : queries) q = Eigen::half(normal(random));
            void *in = nullptr, *out = nullptr;
            must(cudaMalloc(&in, queries.size() * 2), "memory");
            must(cudaMalloc(&out, queries.size() * 2), "memory");
            must(cudaMemcpy(in, queries.data(), queries.size() * 2, cudaMemcpyHostToDevice), "copy");
            AttendWorkspace workspace;
            workspace.plan(layer, batch.sequences(), 1, {}, nullptr);
            const DeviceRows q{in, ScalarType::float16, of.sequences, 32, 32 * 128, 128};
            const DeviceOutput o{out, ScalarType::float16, of.sequences, 32, 32 * 128, 128};
            const double us = time_of([&] { workspace.attend(q, o, nullptr, nullptr); }, other);
            const double bytes = static_cast<double>(of.sequences * of.tokens / 128 * 8) *
                                 (layer.latent ? static_cast<double>(layer.page_bytes) / 8.0
                                               : layer.view.keys.bytes + layer.view.values.bytes);
            const double plain = time_of(
                [&] {
                    read_all<<<1056, 256>>>(reinterpret_cast<const uint4*>(batch.memory()),
                                            static_cast<std::size_t>(bytes) / 16, nullptr);
                },
                other);
            std::printf("%-18s %3d %7d %7.1f %9.1f %10.1f %7.2f %6.2f  %d x %d warps%s\n", row.recipe,
                        static_cast<int>(of.sequences), static_cast<int>(of.tokens), bytes / 1e6, us, plain,
                        bytes / us / 1e6, plain / us, workspace.blocks(), workspace.warps(), row.note);
            cudaFree(in);
            cudaFree(out);
        }
    }
} catch (const kvplane::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
