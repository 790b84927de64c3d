// tests/cuda/append_cases.hpp: what appends on a device are compared on: the same cases on the host in its
// place (append_host_test.cpp) and on a device (device_cache_gpu.cpp).
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cache/cache_support.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cuda/cache_base.hpp"

namespace kvplane_test {

struct AppendShape {
    Index kv_heads = 2, key_dim = 32, value_dim = 48;
};
struct AppendCase {
    std::string recipe;
    AppendShape shape;
    bool values_in_keys = false;
};

/// Every path through the kernels: granularities, schemes, widths, rows outside tiles, rotations, odd shapes.
inline std::vector<AppendCase> append_cases() {
    std::vector<AppendCase> cases;
    const auto add = [&](std::vector<std::string> recipes, AppendShape shape) {
        for (std::string& recipe : recipes) cases.push_back({std::move(recipe), shape});
    };
    add({"fp16",
         "block32:4",
         "block32:8:rotated",
         "kivi:2",
         "kivi:4:32",
         "key_favored:4:2",
         "key_favored:8:1+sinks=0+recent=0",
         "key_favored:3:5+rotate_keys=1+recent=100+key_group=64",
         "key_favored:7:6+recent_bits=8+recent_key_bits=16+sinks=17+value_group=16",
         "standard",
         "compact",
         "key_favored:6:7+recent_bits=8",
         "key_favored:1:8+rotate_keys=1+recent_bits=8",
         "key_favored:5:16",
         "key_favored:16:4",
         "key_favored:16:16+recent_bits=8",
         "fp16+rotate_keys=1+rotate_values=1",
         "block32:8",
         "block32:5+key_scheme=min_max+key_group=64",
         "block32:3:rotated+key_scheme=cell+key_group=96",
         "block32:7+key_scheme=min_max",
         "block32:4+key_group=24",
         "key_favored:4:4+key_scheme=symmetric",
         "key_favored:3:3+key_scheme=full_range",
         "key_favored:2:3+value_group=8",
         "block32:4+key_group=20",  // grids that begin in the middle of eight channels
         "block32:5:rotated+key_group=5",
         "key_favored:3:4+value_group=12"},
        {});
    add({"fp16", "standard", "compact", "key_favored:8:8", "key_favored:4:4", "block32:8",
         "block32:4:rotated"},
        {2, 128, 128});
    add({"fp16", "standard", "key_favored:3:3+rotate_keys=1+recent_bits=8", "block32:4:rotated", "kivi:2"},
        {3, 80, 37});
    add({"fp16", "standard", "compact", "key_favored:7:6", "key_favored:8:8", "block32:4"}, {2, 96, 80});
    add({"standard", "fp16", "key_favored:4:2+rotate_keys=1"}, {1, 1, 3});
    add({"key_favored:4:4+sinks=1", "standard+sinks=3"}, {1, 2, 4});  // rows at odd places of pages
    add({"key_favored:4:4", "standard", "block32:8:rotated"}, {1, 256, 192});
    return cases;
}

/// Latents: the caches fit their bases on the host, and go on on the device.
inline std::vector<AppendCase> latent_cases() {
    std::vector<AppendCase> cases;
    for (const char* const recipe :
         {"svdq:2+fit_tokens=140", "svdq:8-4-2-0:3+rotate_keys=1+recent_bits=8+fit_tokens=128",
          "latent:3:3+fit_tokens=130+context=100000",
          "latent:2:4+frame=after_rope+heads_together=1+fit_tokens=200",
          "weighted:3:16+fit_tokens=150+recent=0", "latent:4:2+fit_tokens=160+rotate_keys=1"})
        cases.push_back({recipe, {2, 32, 48}});
    cases.push_back({"latent:3:3+fit_tokens=200", {2, 64, 64}});
    return cases;
}

/// Multi-head latent attention: values in keys.
inline std::vector<AppendCase> values_in_keys_cases() {
    std::vector<AppendCase> cases;
    for (const char* const recipe :
         {"fp16", "standard", "key_favored:4:4+rotary_bits=16", "block32:8",
          "key_favored:6:2+recent_bits=8+recent_key_bits=8+rotary_bits=8", "key_favored:4:4+rotate_keys=1"})
        cases.push_back({recipe, {1, 144, 128}, true});
    cases.push_back({"standard", {1, 576, 512}, true});
    return cases;
}

inline CacheConfiguration configuration_of(const AppendCase& test) {
    CacheConfiguration made = configuration(test.recipe, test.shape.kv_heads, 2 * test.shape.kv_heads,
                                            test.shape.key_dim, test.shape.value_dim);
    if (test.shape.key_dim % 2 == 1) made.rope.reset();
    made.values_in_keys = test.values_in_keys;
    made.rotation_seed = 7;
    return made;
}

/// Numbers with what quantizers get wrong: outlier channels, constants, zeros of both signs, subnormals of
/// fp16.
inline Matrix append_numbers(std::mt19937_64& random, Index tokens, Index channels) {
    Matrix numbers = normal_matrix(random, tokens, channels, 2.0f);
    if (tokens == 0) return numbers;  // Eigen counts on from where there is no memory
    for (Index c = 0; c < channels; c += 7) numbers.col(c) *= 40.0f;
    for (Index c = 3; c < channels; c += 11) numbers.col(c).setConstant(0.1f);
    for (Index c = 5; c < channels; c += 13) numbers.col(c) *= 1e-7f;
    for (Index t = 0; t < tokens; t += 9) numbers.row(t) *= 1e-3f;
    for (Index t = 4; t < tokens; t += 31) numbers.row(t).setZero();
    for (Index i = 0; i < numbers.size(); i += 29) numbers.data()[i] = -0.0f;
    return numbers;
}

/// The elements of a matrix in a type, in the order of strides that a test chooses.
struct StridedRows {
    std::vector<std::byte> bytes;
    cuda::DeviceRows rows;  ///< rows.data is to be set

    /// The last one begins at an address that no more than one element can be loaded from.
    enum class Order { token_head_channel, head_token_channel, channels_apart, unaligned };

    StridedRows(const Matrix& matrix, Index heads, ScalarType type, Order order) {
        const Index tokens = matrix.rows(), dim = heads > 0 ? matrix.cols() / heads : 0,
                    before = order == Order::unaligned ? 1 : 0;
        rows.type = type;
        rows.tokens = tokens;
        rows.heads = heads;
        switch (order) {
            case Order::token_head_channel:
            case Order::unaligned:
                rows.token_stride = heads * dim;
                rows.head_stride = dim;
                break;
            case Order::head_token_channel:
                rows.token_stride = dim + 4;
                rows.head_stride = tokens * (dim + 4);
                break;
            case Order::channels_apart:
                rows.token_stride = 3;
                rows.head_stride = dim * (3 * tokens + 1);
                rows.channel_stride = 3 * tokens + 1;
                break;
        }
        const Index elements = tokens == 0
                                   ? 0
                                   : (tokens - 1) * rows.token_stride + (heads - 1) * rows.head_stride +
                                         (dim - 1) * rows.channel_stride + 1;
        bytes.assign(static_cast<std::size_t>(elements + before) * bytes_of(type), std::byte{0xFF});
        for (Index t = 0; t < tokens; ++t)
            for (Index h = 0; h < heads; ++h)
                for (Index c = 0; c < dim; ++c) {
                    const Index at = t * rows.token_stride + h * rows.head_stride + c * rows.channel_stride;
                    put(before + at, matrix(t, h * dim + c));
                }
        rows.data = bytes.data() + static_cast<std::size_t>(before) * bytes_of(type);
    }

  private:
    void put(Index at, float x) {
        const auto store = [&](auto value) {
            std::memcpy(bytes.data() + static_cast<std::size_t>(at) * sizeof value, &value, sizeof value);
        };
        if (rows.type == ScalarType::float32)
            store(x);
        else if (rows.type == ScalarType::float16)
            store(static_cast<Eigen::half>(x));
        else
            store(static_cast<Eigen::bfloat16>(x));
    }
};

/// The matrix as it is after a type.
inline Matrix rounded_to(const Matrix& matrix, ScalarType type) {
    if (type == ScalarType::float16) return matrix.cast<Eigen::half>().cast<float>();
    if (type == ScalarType::bfloat16) return matrix.cast<Eigen::bfloat16>().cast<float>();
    return matrix;
}

/// How much of a page differs, "" for nothing.
inline std::string page_difference(const PageReference& a, const PageReference& b, const std::string& name) {
    if (a.bytes() != b.bytes())
        return name + ": " + std::to_string(a.bytes()) + " and " + std::to_string(b.bytes()) + " bytes";
    Index different = 0, first = -1;
    for (Index i = 0; i < a.bytes(); ++i)
        if (a.data()[i] != b.data()[i]) {
            if (first < 0) first = i;
            ++different;
        }
    if (different == 0) return "";
    return name + ": " + std::to_string(different) + " of " + std::to_string(a.bytes()) +
           " bytes differ, the first at " + std::to_string(first) + ": " +
           std::to_string(std::to_integer<int>(a.data()[first])) + " instead of " +
           std::to_string(std::to_integer<int>(b.data()[first]));
}

/// What differs between two caches on the host: every page, every place of a tile, every count. Of pages that
/// tokens were taken back from, and of those that an append failed in, what is left of these tokens is not
/// looked at.
inline std::string cache_difference(const KvCache& cache, const KvCache& expected, bool whole_pages = true) {
    const auto &a = cache.state(), &b = expected.state();
    if (a.tokens != b.tokens || a.recent_first != b.recent_first || a.tiles.size() != b.tiles.size() ||
        a.recent.size() != b.recent.size() || a.dropped != b.dropped || a.kept_sinks != b.kept_sinks)
        return "counts: " + std::to_string(a.tokens) + " tokens, " + std::to_string(a.tiles.size()) +
               " tiles, " + std::to_string(a.recent.size()) + " recent pages from " +
               std::to_string(a.recent_first) + "; expected " + std::to_string(b.tokens) + ", " +
               std::to_string(b.tiles.size()) + ", " + std::to_string(b.recent.size()) + " from " +
               std::to_string(b.recent_first);
    const auto extremes = a.extremes(), wanted = b.extremes();
    if (!(extremes.largest == wanted.largest))
        return "largest magnitudes " + std::to_string(extremes.largest.keys) + " and " +
               std::to_string(extremes.largest.values) + ", expected " + std::to_string(wanted.largest.keys) +
               " and " + std::to_string(wanted.largest.values);
    if (!(extremes.excess == wanted.excess))
        return "excess " + std::to_string(extremes.excess.keys) + " and " +
               std::to_string(extremes.excess.values) + ", expected " + std::to_string(wanted.excess.keys) +
               " and " + std::to_string(wanted.excess.values);
    if (!(extremes.carried == wanted.carried)) return "carried bounds differ";
    for (std::size_t t = 0; t < a.tiles.size(); ++t)
        if (a.tiles[t].first != b.tiles[t].first || a.tiles[t].tokens != b.tiles[t].tokens ||
            a.tiles[t].row != b.tiles[t].row || a.tiles[t].shift != b.tiles[t].shift ||
            a.tiles[t].layout->bytes != b.tiles[t].layout->bytes)
            return "place of tile " + std::to_string(t);
    if (!whole_pages) return "";
    std::string found = page_difference(a.sinks, b.sinks, "sinks");
    for (std::size_t p = 0; p < a.recent.size() && found.empty(); ++p)
        found = page_difference(a.recent[p], b.recent[p], "recent page " + std::to_string(p));
    for (std::size_t t = 0; t < a.tiles.size() && found.empty(); ++t) {
        found = page_difference(a.tile_pages[t], b.tile_pages[t], "tile " + std::to_string(t));
        if (found.empty()) continue;
        const auto& layout = *a.tiles[t].layout;
        for (std::size_t i = 0; i < layout.key_at.size(); ++i)
            found += (i == 0 ? "; keys at " : ", ") + std::to_string(layout.key_at[i]);
        for (std::size_t i = 0; i < layout.value_at.size(); ++i)
            found += (i == 0 ? "; values at " : ", ") + std::to_string(layout.value_at[i]);
    }
    return found;
}

}  // namespace kvplane_test
