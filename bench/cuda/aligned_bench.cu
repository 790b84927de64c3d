// Attention on a device that decides tile by tile what is read, beside attention that reads everything:
// time, bits read, and what the output is off by.
//
//   cuda_aligned_bench [recipes]     32 query heads over 8 key heads of 128
//
// Keys and queries are normal numbers, and so scores; a token of every hot tile, and the first of the sinks,
// has a score that is larger by 20. Without sinks (fp16) the first tile of every sequence is hot. Pages
// stand in random order, each in memory of its own. Times as those of cuda_attend_bench. An error is the
// largest of any output's number, over the largest number of a whole read's output.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cuda/timing.cuh"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cuda/device_attention.cuh"
#include "kvplane/cuda/layer_view.hpp"
#include "kvplane/recipe_names.hpp"

namespace {

using namespace kvplane;
using namespace kvplane::cuda;
using namespace kvplane_bench;

constexpr Index heads = 8, query_heads = 32, dim = 128;
/// Tiles of either kind that differ.
constexpr Index kinds = 48;

struct Shape {
    Index sequences, tokens;
};

/// A cache whose first tiles are cold, and whose others are hot; and a token of queries.
struct Templates {
    explicit Templates(const char* recipe)
        : cache({.kv_heads = heads,
                 .query_heads = query_heads,
                 .key_head_dim = dim,
                 .value_head_dim = dim,
                 .recipe = recipes::parse(recipe)},
                pool) {
        std::mt19937_64 random(7);
        std::normal_distribution<float> normal;
        const auto some = [&](Index rows, Index columns) {
            return Matrix(Matrix::NullaryExpr(rows, columns, [&] { return normal(random); }));
        };
        const Matrix of_heads = some(1, heads * dim);
        queries = 0.1f * some(1, query_heads * dim);
        for (Index h = 0; h < query_heads; ++h)
            queries.middleCols(h * dim, dim) += of_heads.middleCols(h / 4 * dim, dim);
        sinks = cache.configuration().recipe.sink_tokens;
        const Index tokens = sinks + 2 * kinds * tile_tokens;
        Matrix keys = some(tokens, heads * dim);
        for (Index tile = -1; tile < 2 * kinds; ++tile) {
            if (tile < 0 ? sinks == 0 : tile < kinds) continue;
            const Index token =
                tile < 0 ? 0 : sinks + tile * tile_tokens + static_cast<Index>(random() % 128);
            for (Index h = 0; h < heads; ++h) {
                const auto q = of_heads.middleCols(h * dim, dim);
                keys.row(token).segment(h * dim, dim) +=
                    20.0f * std::sqrt(static_cast<float>(dim)) / q.squaredNorm() * q;
            }
        }
        cache.append(keys, some(tokens, heads * dim));
        // So that the last tiles are full too.
        cache.append(some(512, heads * dim), some(512, heads * dim));
    }
    TilePool pool;
    KvCache cache;
    Matrix queries;
    Index sinks = 0;
};

void* device_copy(const void* from, std::size_t bytes) {
    void* to = nullptr;
    must(cudaMalloc(&to, bytes), "memory");
    must(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy");
    return to;
}

/// Sequences of full tiles, behind sinks where there are some.
class Batch {
  public:
    Batch(const Templates& of, const Shape& shape, double hot) {
        std::mt19937_64 random(11);
        const auto& held = of.cache.state();
        const Index page = held.tiles[0].layout->bytes, tiles = shape.tokens / tile_tokens,
                    pages = tiles * shape.sequences;
        std::vector<std::byte> kinds_of(static_cast<std::size_t>(2 * kinds * page));
        for (Index i = 0; i < 2 * kinds; ++i)
            std::memcpy(&kinds_of[static_cast<std::size_t>(i * page)],
                        held.tiles[static_cast<std::size_t>(i)].page, static_cast<std::size_t>(page));
        std::byte* const from = static_cast<std::byte*>(device_copy(kinds_of.data(), kinds_of.size()));
        must(cudaMalloc(&memory_, static_cast<std::size_t>(pages * page)), "memory of pages");
        if (of.sinks > 0)
            sinks_ = device_copy(held.sinks.data(),
                                 static_cast<std::size_t>(of.cache.shape().sink_rows().bytes()));
        // As many as the share says, in random places.
        std::vector<bool> is_hot(static_cast<std::size_t>(pages));
        std::fill_n(is_hot.begin(), static_cast<std::size_t>(std::lround(hot * static_cast<double>(pages))),
                    true);
        std::shuffle(is_hot.begin(), is_hot.end(), random);
        for (Index s = 0; of.sinks == 0 && s < shape.sequences; ++s)
            is_hot[static_cast<std::size_t>(s * tiles)] = true;
        std::vector<Index> order(static_cast<std::size_t>(pages));
        for (Index i = 0; i < pages; ++i) order[static_cast<std::size_t>(i)] = i;
        std::shuffle(order.begin(), order.end(), random);
        for (Index i = 0; i < pages; ++i) {
            std::byte* const to = memory_ + order[static_cast<std::size_t>(i)] * page;
            const Index kind =
                static_cast<Index>(random() % kinds) + (is_hot[static_cast<std::size_t>(i)] ? kinds : 0);
            must(cudaMemcpyAsync(to, from + kind * page, static_cast<std::size_t>(page),
                                 cudaMemcpyDeviceToDevice),
                 "copy");
            tiles_.push_back({to, static_cast<std::int32_t>(of.sinks + i % tiles * tile_tokens), 0, 128, 0});
        }
        must(cudaDeviceSynchronize(), "copy");
        cudaFree(from);
        device_tiles_ =
            static_cast<DeviceTile*>(device_copy(tiles_.data(), tiles_.size() * sizeof(DeviceTile)));
        for (Index s = 0; s < shape.sequences; ++s) {
            DeviceSequence& sequence = sequences_.emplace_back();
            sequence.tiles = std::span(tiles_).subspan(static_cast<std::size_t>(s * tiles),
                                                       static_cast<std::size_t>(tiles));
            sequence.device_tiles = device_tiles_ + s * tiles;
            sequence.sinks = static_cast<const std::byte*>(sinks_);
            sequence.sink_count = of.sinks;
            sequence.tokens = sequence.recent_first = of.sinks + shape.tokens;
            sequence.page_bytes = page;
        }
    }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;
    ~Batch() {
        cudaFree(memory_);
        cudaFree(sinks_);
        cudaFree(device_tiles_);
    }
    std::span<const DeviceSequence> sequences() const { return sequences_; }

  private:
    std::byte* memory_ = nullptr;
    void* sinks_ = nullptr;
    DeviceTile* device_tiles_ = nullptr;
    std::vector<DeviceTile> tiles_;
    std::vector<DeviceSequence> sequences_;
};

}  // namespace

int main(int count, char** arguments) try {
    const std::byte* const other = begin_bench();
    const std::span named(arguments, static_cast<std::size_t>(count));
    std::printf("%-16s %2s %7s %5s  %-16s %8s %7s %6s %6s %6s  %-24s %9s %9s\n", "recipe", "B", "N", "hot",
                "read", "us", "of all", "keys", "values", "bits", "values by planes", "error", "bound");
    struct Read {
        const char* name;
        ReadPolicy policy;
        PlanesRead planes = {};
    };
    constexpr int never = AlignmentThresholds::never;
    for (const char* recipe : {"key_favored:8:8", "fp16"}) {
        if (!is_wanted(recipe, named)) continue;
        const bool half = std::string(recipe) == "fp16";
        std::vector<Read> reads = {{"all", ReadPolicy::all()}};
        if (half) {
            reads.push_back({"all, this kernel", ReadPolicy::exponents({never, never, never})});
            reads.push_back({"exponents", ReadPolicy::exponents()});
            reads.push_back({"exponents, T11", ReadPolicy::exponents(AlignmentThresholds::supported())});
            reads.push_back({"tolerance .02", ReadPolicy::tolerance(0.02)});
            reads.push_back({"8 + 8 bits", ReadPolicy::all(), {1, 1}});
        } else {
            reads.push_back({"tolerance 0", ReadPolicy::tolerance(0.0)});
            reads.push_back({"tolerance .02", ReadPolicy::tolerance(0.02)});
            reads.push_back({"tolerance .2", ReadPolicy::tolerance(0.2)});
            reads.push_back({"4 bits", ReadPolicy::aligned(4.0)});
            reads.push_back({"4 + 4 bits", ReadPolicy::all(), {1, 1}});
        }
        const Templates templates(recipe);
        for (const Shape& shape : {Shape{1, 131072}, Shape{8, 32768}})
            for (const double hot : {1.0, 0.5, 0.25, 0.1, 0.05, 0.01}) {
                const Batch batch(templates, shape, hot);
                const Matrix queries = templates.queries.replicate(shape.sequences, 1);
                const RowMajorMatrix<float> rows = queries;
                const auto bytes = static_cast<std::size_t>(rows.size()) * 4;
                void* const in = device_copy(rows.data(), bytes);
                void *out = nullptr, *bounds = nullptr, *counts = nullptr;
                must(cudaMalloc(&out, bytes), "memory");
                must(cudaMalloc(&bounds, static_cast<std::size_t>(shape.sequences * query_heads) * 4),
                     "memory");
                must(cudaMalloc(&counts, sizeof(ReadCounts)), "memory");
                std::vector<float> whole(static_cast<std::size_t>(rows.size())), output(whole.size()),
                    bound(static_cast<std::size_t>(shape.sequences * query_heads));
                double whole_us = 0.0;
                for (const Read& read : reads) {
                    const AttendLayer layer = attend_layer(templates.cache.shape(), read.planes);
                    AttendWorkspace workspace;
                    workspace.plan(layer, batch.sequences(), 1, {.read = read.policy}, nullptr);
                    const DeviceRows q{in,          ScalarType::float32, shape.sequences,
                                       query_heads, query_heads * dim,   dim};
                    const DeviceOutput o{out,         ScalarType::float32, shape.sequences,
                                         query_heads, query_heads * dim,   dim};
                    const double us = time_of([&] { workspace.attend(q, o, nullptr, nullptr); }, other);
                    if (whole_us == 0.0) whole_us = us;
                    const bool decides = read.policy.kind != ReadPolicy::Kind::all;
                    ReadCounts counted{};
                    std::fill(bound.begin(), bound.end(), 0.0f);
                    if (decides) {
                        must(cudaMemset(counts, 0, sizeof(ReadCounts)), "clear");
                        workspace.attend(q, o, nullptr, nullptr,
                                         {static_cast<float*>(bounds), static_cast<ReadCounts*>(counts)});
                        must(cudaMemcpy(&counted, counts, sizeof counted, cudaMemcpyDeviceToHost), "copy");
                        must(cudaMemcpy(bound.data(), bounds, bound.size() * 4, cudaMemcpyDeviceToHost),
                             "copy");
                    } else {
                        counted.keys[layer.prefixes.key_planes] =
                            counted.values[layer.prefixes.value_planes] = 1;
                    }
                    must(cudaMemcpy(output.data(), out, bytes, cudaMemcpyDeviceToHost), "copy");
                    if (&read == &reads[0]) whole = output;
                    float error = 0.0f, largest = 0.0f;
                    for (std::size_t i = 0; i < output.size(); ++i) {
                        error = std::max(error, std::abs(output[i] - whole[i]));
                        largest = std::max(largest, std::abs(whole[i]));
                    }
                    const ReadReport report = read_report(layer.prefixes, dim, dim, counted, bound);
                    const double tiles = static_cast<double>(counted.values[0] + counted.values[1] +
                                                             counted.values[2] + counted.values[3]);
                    std::printf("%-16s %2d %7d %5.2f  %-16s %8.1f %7.2f %6.2f %6.2f %6.2f ", recipe,
                                static_cast<int>(shape.sequences), static_cast<int>(shape.tokens), hot,
                                read.name, us, us / whole_us, report.key_bits, report.value_bits,
                                report.mean_bits);
                    for (int p = 0; p < 4; ++p)
                        std::printf(" %5.3f", static_cast<double>(counted.values[p]) / tiles);
                    std::printf(" %9.1e %9.1e  %d x %d warps\n", static_cast<double>(error / largest),
                                report.relative_error_bound, workspace.blocks(), workspace.warps());
                }
                for (void* memory : {in, out, bounds, counts}) cudaFree(memory);
            }
    }
} catch (const kvplane::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
