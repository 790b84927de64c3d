// examples/cuda/decode.cpp: decodes on a GPU, beside the CPU. A cache is filled on the CPU, goes to the device, and grows
// and is attended to there; the CPU does the same, and outputs are compared.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "decode_layer.hpp"
#include "kvplane/attention/reference.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/cuda/device_attention.cuh"
#include "kvplane/cuda/device_cache.cuh"
#include "kvplane/metrics.hpp"
#include "kvplane/recipe_names.hpp"
#include "kvplane/recipes.hpp"
#include "options.hpp"

namespace {

using namespace kvplane;
using Layer = kvplane_examples::DecodeLayer;
using Clock = std::chrono::steady_clock;
using kvplane_examples::Options;

constexpr const char* summary =
    R"(Decodes on a GPU: caches of the CPU go to the device, grow there, and are attended to. Prints, at every power of
two of the context, tokens a second of one layer (append, plan and attend, started one by one), the times of attention
alone and of the rest, the bytes of the cache, and the error of outputs, on the device and on the CPU, against double
precision over what is stored. Without FILE, tensors of a real model that ship with kvplane are decoded, and after them
generated ones of a larger layer.)";

/// Numbers in device memory: rows of heads, from a matrix tokens x (heads * head_dim).
class DeviceMatrix {
  public:
    DeviceMatrix(const Matrix& rows, Index heads) : heads_(heads), columns_(rows.cols()) {
        float* memory = nullptr;
        cuda::require_cuda(cudaMalloc(reinterpret_cast<void**>(&memory), bytes(rows.rows())),
                           "taking memory");
        memory_.reset(memory);
        cuda::require_cuda(cudaMemcpy(memory, rows.data(), bytes(rows.rows()), cudaMemcpyHostToDevice),
                           "copying to the device");
    }
    cuda::DeviceRows rows(Index first, Index count) const {
        return {at(first), ScalarType::float32, count, heads_, columns_, columns_ / heads_};
    }
    cuda::DeviceOutput output(Index first, Index count) {
        return {at(first), ScalarType::float32, count, heads_, columns_, columns_ / heads_};
    }
    void copy_to(Matrix& to, cudaStream_t stream) const {
        cuda::require_cuda(
            cudaMemcpyAsync(to.data(), memory_.get(), bytes(to.rows()), cudaMemcpyDeviceToHost, stream),
            "copying from the device");
        cuda::require_cuda(cudaStreamSynchronize(stream), "waiting for the device");
    }

  private:
    struct Free {
        void operator()(float* memory) const { (void)cudaFree(memory); }
    };
    float* at(Index row) const { return memory_.get() + row * columns_; }
    std::size_t bytes(Index rows) const { return static_cast<std::size_t>(rows * columns_) * sizeof(float); }

    std::unique_ptr<float, Free> memory_;
    Index heads_, columns_;
};

/// A cache on the device, and the same one on the CPU.
class Pair {
  public:
    Pair(const Layer& layer, const CacheConfiguration& configuration, TilePool& host_pool,
         TilePool& device_pool, cudaStream_t stream)
        : layer_(layer),
          keys_(layer.keys, layer.kv_heads),
          values_(layer.values, layer.kv_heads),
          host_(configuration, host_pool),
          device_pool_(device_pool),
          stream_(stream) {}

    KvCache& host() { return host_; }
    /// Whether there is one on the device: not before a recipe has fitted its basis.
    bool has_device() const { return device_.has_value(); }
    cuda::DeviceCache& device() { return *device_; }
    const cuda::AttendLayer& attend_layer() const { return attend_layer_; }
    /// Why tokens are appended on the CPU and taken to the device; nullptr if it appends them itself.
    const char* host_appends_because() const { return cuda::host_appends_because(host_.configuration()); }

    /// All tokens before `end`.
    void append_before(Index end) {
        const Index first = host_.tokens();
        if (end == first) return;
        for (Index at = first; at < end;) {
            const Index count = std::min({end - at, layer_.queries.rows(), Index{128}});
            append_on_host(at, count);
            at += count;
        }
        if (device_ && !host_appends_because()) return append_on_device(first, end - first);
        const bool fits_basis = host_.configuration().fits_basis();
        if (fits_basis && !host_.state().latent) return;
        device_.emplace(cuda::DeviceCache::upload(host_, device_pool_, stream_));
        attend_layer_ =
            cuda::attend_layer(device_->shape(), {}, fits_basis ? device_->state().latent : nullptr);
    }
    /// The query of a token, of as many tokens. Files have those of the last tokens; before these any will do,
    /// to be learned from or to be answered.
    Index query_of(Index token, Index count) const {
        const Index missing = layer_.keys.rows() - layer_.queries.rows();
        return token >= missing ? token - missing : token % (layer_.queries.rows() - count + 1);
    }
    void append_on_host(Index token, Index count) {
        host_.append(layer_.keys.middleRows(token, count), layer_.values.middleRows(token, count),
                     layer_.queries.middleRows(query_of(token, count), count));
    }
    void append_on_device(Index token, Index count) {
        device_->append(keys_.rows(token, count), values_.rows(token, count), stream_,
                        cuda::AppendCheck::none);
    }

  private:
    const Layer& layer_;
    DeviceMatrix keys_, values_;
    KvCache host_;
    TilePool& device_pool_;
    std::optional<cuda::DeviceCache> device_;
    cuda::AttendLayer attend_layer_;
    cudaStream_t stream_;
};

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

/// How far rows are from attention in double precision over what a cache holds, relative to the latter.
double error_of(const Matrix& rows, const Matrix& queries, const Layer& layer, const KvCache& cache) {
    const MatrixD exact =
        reference_attention(cache.stored_keys(0, cache.tokens()), cache.stored_values(0, cache.tokens()),
                            queries, layer.query_heads, layer.kv_heads, {});
    return relative_error(exact, rows);
}

/// Returns a note about where tokens are appended, if it is not the device.
std::string decode(const Layer& layer, const std::string& recipe) {
    constexpr Index measured = 64, repeated = 20;
    const cudaStream_t stream = nullptr;
    const CacheConfiguration configuration = kvplane_examples::configuration(layer, recipe);
    cuda::DeviceMemory memory;
    TilePool device_pool(&memory), host_pool;
    Pair caches(layer, configuration, host_pool, device_pool, stream);
    cuda::AttendWorkspace workspace;
    AttentionWorkspace host_workspace;
    const Index tokens = layer.keys.rows(), columns = layer.query_heads * configuration.value_head_dim;
    const DeviceMatrix queries(layer.queries, layer.query_heads);
    DeviceMatrix output(Matrix::Zero(1, columns), layer.query_heads);
    Matrix on_device(1, columns), on_host(1, columns);

    for (Index at = 0, goal = 512; at < tokens; at = std::min(goal, tokens), goal *= 2) {
        const Index end = std::min(goal, tokens), first = std::max(at, end - measured);
        caches.append_before(first);
        // Not where tokens come from the CPU, nor before a recipe has learned what it stores by.
        const bool steps = caches.has_device() && !caches.host_appends_because() && first > at;
        if (!steps) caches.append_before(end);
        if (!caches.has_device()) continue;
        const auto plan = [&] {
            const cuda::DeviceSequence sequences[] = {caches.device().sequence()};
            workspace.plan(caches.attend_layer(), sequences, 1, {}, stream);
        };
        const auto attend = [&](Index token) {
            workspace.attend(queries.rows(caches.query_of(token, 1), 1), output.output(0, 1), nullptr,
                             stream);
        };
        // Memory is taken before time is.
        plan();
        attend(end - 1);
        cuda::require_cuda(cudaStreamSynchronize(stream), "waiting for the device");
        const auto start = Clock::now();
        for (Index t = first; steps && t < end; ++t) {
            caches.append_on_device(t, 1);
            plan();
            attend(t);
        }
        cuda::require_cuda(cudaStreamSynchronize(stream), "waiting for the device");
        const double step = seconds_since(start) / static_cast<double>(end - first);
        const auto begin = Clock::now();
        for (Index i = 0; i < repeated; ++i) attend(end - 1);
        cuda::require_cuda(cudaStreamSynchronize(stream), "waiting for the device");
        const double attention = seconds_since(begin) / static_cast<double>(repeated);

        output.copy_to(on_device, stream);
        if (steps) caches.append_on_host(first, end - first);
        const Matrix query = layer.queries.middleRows(caches.query_of(end - 1, 1), 1);
        caches.host().attend(query, on_host, {}, host_workspace);
        std::printf("%-12s %-22s %8ld ", layer.name.c_str(), recipe.c_str(), static_cast<long>(end));
        if (steps)
            std::printf("%10.0f %10.1f us %8.1f us", 1.0 / step, 1e6 * attention, 1e6 * (step - attention));
        else
            std::printf("%10s %10.1f us %11s", "", 1e6 * attention, "");
        std::printf(" %12ld %6.2f %10.6f %10.6f\n", static_cast<long>(caches.device().bytes()),
                    caches.host().bits_per_element(), error_of(on_device, query, layer, caches.host()),
                    error_of(on_host, query, layer, caches.host()));
        std::fflush(stdout);
    }
    const char* const because = caches.host_appends_because();
    return because
               ? recipe + " " + because + ", which is done on the CPU; the device attends to what is stored"
               : "";
}

}  // namespace

int main(int count, char** arguments) {
    kvplane_examples::DecodeSettings settings;
    settings.tokens = 32768;
    settings.queries = 8192;
    std::vector<std::string> names{"fp16",    "key_favored:8:8", "standard",
                                   "compact", "smallest",        "latent:3:3"};
    Options options("decode", summary);
    kvplane_examples::add_options(options, settings);
    options.texts("--recipes A,B,C", names, "how keys and values are stored", Options::Need::optional,
                  [](const std::string& name) { (void)recipes::parse(name); });
    options.footer(kvplane::recipes::help());
    return options.run(count, arguments, [&] {
        int devices = 0;
        const cudaError_t status = cudaGetDeviceCount(&devices);
        require(status == cudaSuccess && devices > 0, ErrorCode::io, "no CUDA device: ",
                status == cudaSuccess ? "the driver knows none" : cudaGetErrorString(status));
        cudaDeviceProp device{};
        cuda::require_cuda(cudaGetDeviceProperties(&device, 0), "asking the device");
        std::printf("%s, compute capability %d.%d\n", device.name, device.major, device.minor);
        std::vector<Layer> layers;
        if (settings.files.empty()) {
            kvplane_examples::DecodeSettings shipped;
            for (const auto& file : kvplane_examples::shipped_files()) shipped.files.push_back(file.string());
            layers = kvplane_examples::decode_layers(shipped);
        }
        for (Layer& layer : kvplane_examples::decode_layers(settings)) layers.push_back(std::move(layer));
        std::printf("%-12s %-22s %8s %10s %13s %11s %12s %6s %10s %10s\n", "layer", "recipe", "context",
                    "tokens/s", "attend", "the rest", "bytes", "bits", "error", "of the CPU");
        std::set<std::string> notes;
        for (const Layer& layer : layers)
            for (const std::string& name : names) notes.insert(decode(layer, name));
        for (const std::string& note : notes)
            if (!note.empty()) std::printf("%s\n", note.c_str());
    });
}
