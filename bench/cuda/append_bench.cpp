// How fast a device takes tokens in: prompts of 4096 tokens beside a copy of the same bytes, and single
// tokens.
//
//   cuda_append_bench [recipes]
//
// Prints a table. Medians of 21 calls, by events; the L2 cache is flushed by reading other memory before each.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "kvplane/cuda/device_cache.cuh"
#include "kvplane/recipe_names.hpp"

namespace {

using namespace kvplane;
using cuda::require_cuda;

constexpr Index heads = 8, dim = 128, prompt = 4096;
constexpr int rounds = 21;

struct Memory {
    void* data = nullptr;
    explicit Memory(std::size_t bytes) { require_cuda(cudaMalloc(&data, bytes), "taking memory"); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { (void)cudaFree(data); }
};

class Clock {
  public:
    explicit Clock(cudaStream_t stream) : stream_(stream) {
        require_cuda(cudaEventCreate(&begin_), "making an event");
        require_cuda(cudaEventCreate(&end_), "making an event");
    }
    /// Microseconds of the device from the start of body() to its end, the median; before() is not timed.
    template <class Before, class Body>
    double median(const Before& before, const Body& body) {
        std::vector<double> times;
        for (int i = 0; i < rounds + 3; ++i) {
            before();
            flush();
            require_cuda(cudaEventRecord(begin_, stream_), "recording");
            body();
            require_cuda(cudaEventRecord(end_, stream_), "recording");
            require_cuda(cudaStreamSynchronize(stream_), "waiting");
            float milliseconds = 0.0f;
            require_cuda(cudaEventElapsedTime(&milliseconds, begin_, end_), "timing");
            if (i >= 3) times.push_back(1e3 * static_cast<double>(milliseconds));
        }
        std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
        return times[rounds / 2];
    }

  private:
    /// Reads and writes what is not of interest, which also fills the queue while the host goes ahead.
    void flush() {
        constexpr std::size_t half = std::size_t{96} << 20;
        require_cuda(cudaMemcpyAsync(static_cast<char*>(other_.data) + half, other_.data, half,
                                     cudaMemcpyDeviceToDevice, stream_),
                     "flushing");
    }
    cudaStream_t stream_;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
    Memory other_{std::size_t{192} << 20};
};

CacheConfiguration configuration_of(const std::string& recipe) {
    CacheConfiguration c;
    c.kv_heads = heads;
    c.query_heads = 4 * heads;
    c.key_head_dim = c.value_head_dim = dim;
    c.recipe = recipes::parse(recipe);
    c.rope = RopeSettings{};
    return c;
}

Matrix normal(Index tokens, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> numbers;
    Matrix matrix(tokens, heads * dim);
    for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = numbers(random);
    return matrix;
}

/// A configuration whose basis is given, fitted to some tokens.
CacheConfiguration with_basis(const CacheConfiguration& c, TilePool& host) {
    if (!c.fits_basis()) return c;
    KvCache cache(c, host);
    const Matrix keys = normal(700, 3), values = normal(700, 4);
    Matrix queries(700, c.query_heads * dim);
    for (Index h = 0; h < c.query_heads; ++h)
        queries.middleCols(h * dim, dim) = keys.middleCols(h / c.group() * dim, dim).rowwise().reverse();
    cache.append(keys, values, queries);
    CacheConfiguration given = c;
    given.latent_keys = cache.state().latent;
    given.recipe.latents->basis.heads_together = given.latent_keys->settings().heads_together;
    return given;
}

/// wanted: recipes; none: those of bench/README.md.
void run(std::vector<std::string> wanted) {
    if (wanted.empty())
        wanted = {"fp16",      "standard", "compact",    "key_favored:4:4", "key_favored:8:8",
                  "block32:8", "kivi:4",   "latent:4:4", "weighted:4:4"};
    cudaDeviceProp device{};
    require_cuda(cudaGetDeviceProperties(&device, 0), "asking for the device");
    cudaStream_t stream = nullptr;
    require_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    std::printf("%s, %d multiprocessors; %td tokens of %td heads x %td, fp16 input, keys and values\n",
                device.name, device.multiProcessorCount, prompt, heads, dim);
    const std::size_t side_bytes = static_cast<std::size_t>(prompt * heads * dim) * 2;
    Memory keys(side_bytes), values(side_bytes), copy(side_bytes);
    {
        const RowMajorMatrix<Eigen::half> half_keys = normal(prompt, 1).cast<Eigen::half>(),
                                          half_values = normal(prompt, 2).cast<Eigen::half>();
        require_cuda(cudaMemcpy(keys.data, half_keys.data(), side_bytes, cudaMemcpyHostToDevice), "copying");
        require_cuda(cudaMemcpy(values.data, half_values.data(), side_bytes, cudaMemcpyHostToDevice),
                     "copying");
    }
    Clock clock(stream);
    const double empty = clock.median([] {}, [] {});
    const std::size_t large = std::size_t{512} << 20;
    double bandwidth = 0.0;
    {
        Memory from(large), to(large);
        const double time = clock.median(
            [] {},
            [&] {
                require_cuda(cudaMemcpyAsync(to.data, from.data, large, cudaMemcpyDeviceToDevice, stream),
                             "copying");
            });
        bandwidth = 2.0 * static_cast<double>(large) / time * 1e-6;
    }
    const double copied = clock.median(
        [] {},
        [&] {
            require_cuda(cudaMemcpyAsync(copy.data, keys.data, side_bytes, cudaMemcpyDeviceToDevice, stream),
                         "copying");
            require_cuda(
                cudaMemcpyAsync(copy.data, values.data, side_bytes, cudaMemcpyDeviceToDevice, stream),
                "copying");
        });
    std::printf("nothing: %.1f us; copy of 512 MiB: %.2f TB/s read and written; of the prompt: %.1f us\n\n",
                empty, bandwidth, copied);
    std::printf("%-32s %12s %10s %10s %12s %12s %14s\n", "recipe", "prompt us", "TB/s", "of copy", "token us",
                "token host", "waiting host");
    for (const std::string& name : wanted) {
        TilePool host;
        cuda::DeviceMemory memory;
        TilePool pool(&memory);
        const CacheConfiguration c = with_basis(configuration_of(name), host);
        const auto rows = [&](const Memory& of, Index first, Index tokens) {
            return cuda::DeviceRows{.data = static_cast<const char*>(of.data) + 2 * first * heads * dim,
                                    .type = ScalarType::float16,
                                    .tokens = tokens,
                                    .heads = heads,
                                    .token_stride = heads * dim,
                                    .head_stride = dim,
                                    .channel_stride = 1};
        };
        std::optional<cuda::DeviceCache> cache;
        const auto start = [&] {
            cache.emplace(c, pool);
            // Pages, tables and the kernel are there before the clock starts.
            cache->append(rows(keys, 0, 1), rows(values, 0, 1), stream, cuda::AppendCheck::none);
            cache->truncate(0, stream);
        };
        const double time = clock.median(start, [&] {
            cache->append(rows(keys, 0, prompt), rows(values, 0, prompt), stream, cuda::AppendCheck::none);
        });
        const double bytes = 2.0 * static_cast<double>(side_bytes) + static_cast<double>(cache->bytes());
        const double rate = bytes / time * 1e-6;
        start();
        cache->append(rows(keys, 0, 300), rows(values, 0, 300), stream, cuda::AppendCheck::none);
        Index at = 300;
        const double token = clock.median([] {},
                                          [&] {
                                              cache->append(rows(keys, at, 1), rows(values, at, 1), stream,
                                                            cuda::AppendCheck::none);
                                              ++at;
                                          });
        const auto host_time = [&](cuda::AppendCheck check) {
            require_cuda(cudaStreamSynchronize(stream), "waiting");
            const auto begin = std::chrono::steady_clock::now();
            for (int i = 0; i < 512; ++i, ++at)
                cache->append(rows(keys, at, 1), rows(values, at, 1), stream, check);
            require_cuda(cudaStreamSynchronize(stream), "waiting");
            return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
                       .count() /
                   512.0;
        };
        const double host_none = host_time(cuda::AppendCheck::none),
                     host_wait = host_time(cuda::AppendCheck::wait);
        std::printf("%-32s %12.1f %10.2f %10.2f %12.1f %12.1f %14.1f\n", name.c_str(), time, rate,
                    rate / bandwidth, token, host_none, host_wait);
    }
    std::printf(
        "\nTB/s: input read and pages written. token us: between events around one token, less than which\n"
        "nothing takes %.1f. token host: of 512 in a row, tiles included; waiting host: with the check.\n",
        empty);
}

}  // namespace

int main(int count, char** arguments) {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("NO DEVICE: nothing is measured\n");
        return 0;
    }
    try {
        run({arguments + 1, arguments + count});
    } catch (const std::exception& error) {
        std::printf("FAILED: %s\n", error.what());
        return 1;
    }
    return 0;
}
