// bench/latent_bench.cpp: what latents cost: fitting a basis, and turning keys into tiles.
//
//   Fit/CHANNELS/TOKENS/threads:T   moments of all tokens, taken by T threads and merged, then the basis of
//   all heads
//                                   together, query-weighted; heads of 64 up to 512 channels, of 128 above
//   Schedule/CHANNELS               the best schedule for 3 bits
//   Encode/CHANNELS, Decode/CHANNELS  tiles of 128 tokens of fp32 keys after RoPE, 3 bits in the best
//   schedule;
//                                   `bandwidth_share`: the keys as fp16 over one core's read bandwidth
#include <benchmark/benchmark.h>

#include <random>
#include <thread>
#include <vector>

#include "bandwidth.hpp"
#include "kvplane/latent/coder.hpp"
#include "kvplane/latent/fit.hpp"

namespace {

using namespace kvplane;

Matrix keys_of(Index tokens, Index channels) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    Matrix keys = Matrix::NullaryExpr(tokens, channels, [&] { return normal(generator); });
    for (Index j = 0; j < channels; ++j)
        keys.col(j) *= std::exp(-3.0f * static_cast<float>(j) / static_cast<float>(channels));
    return keys;
}

struct Heads {
    explicit Heads(Index channels) : dim(channels <= 512 ? 64 : 128), count(channels / dim) {}
    Index dim, count;
};

LatentStatistics statistics_of(const Matrix& keys, int threads) {
    const Heads heads(keys.cols());
    std::vector<LatentStatistics> parts(static_cast<std::size_t>(threads),
                                        {heads.count, heads.count, heads.dim});
    std::vector<std::thread> workers;
    const Index share = keys.rows() / threads;
    for (int i = 0; i < threads; ++i)
        workers.emplace_back([&, i] {
            LatentStatistics& part = parts[static_cast<std::size_t>(i)];
            constexpr Index block = 1024;
            for (Index first = i * share; first < (i + 1) * share; first += block)
                part.add_keys({keys.middleRows(first, std::min(block, (i + 1) * share - first)), 0});
            part.add_queries(keys.middleRows(i * share, std::min<Index>(share, 2048)));
        });
    for (std::thread& worker : workers) worker.join();
    for (std::size_t i = 1; i < parts.size(); ++i) parts[0].merge(parts[i]);
    return parts[0];
}

LatentRecipe recipe() {
    LatentRecipe recipe;
    recipe.basis.heads_together = true;
    return recipe;
}

void fit(benchmark::State& state) {
    const Matrix keys = keys_of(state.range(1), state.range(0));
    const RopeSettings rope;
    for (auto _ : state) {
        const LatentStatistics statistics = statistics_of(keys, static_cast<int>(state.range(2)));
        benchmark::DoNotOptimize(fit_latent_basis(statistics, &rope, recipe().basis));
    }
}

void schedule(benchmark::State& state) {
    Eigen::VectorXd spectrum(state.range(0));
    for (Index j = 0; j < spectrum.size(); ++j)
        spectrum[j] = std::exp(-6.0 * static_cast<double>(j) / static_cast<double>(spectrum.size()));
    for (auto _ : state) benchmark::DoNotOptimize(best_schedule(spectrum, 3.25));
}

void tiles(benchmark::State& state, bool encode) {
    const Index channels = state.range(0);
    const Matrix keys = keys_of(4096, channels);
    const RopeSettings rope;
    const auto latent = fit_latent_keys(statistics_of(keys, 1), rope, recipe());
    LatentCoder coder(latent);
    std::vector<std::byte> tile(static_cast<std::size_t>(latent->format(0).bytes() + 64));
    std::byte* const at = tile.data() + (64 - reinterpret_cast<std::uintptr_t>(tile.data()) % 64);
    coder.encode({keys.topRows(tile_tokens), 0}, std::span(&at, 1));
    Index first = 0;
    for (auto _ : state) {
        if (encode)
            benchmark::DoNotOptimize(
                coder.encode({keys.middleRows(first, tile_tokens), first}, std::span(&at, 1)));
        else
            benchmark::DoNotOptimize(coder.latents(0, at, tile_tokens).data());
        first = (first + tile_tokens) % keys.rows();
    }
    const double bytes =
        2.0 * static_cast<double>(tile_tokens * channels) * static_cast<double>(state.iterations());
    state.SetBytesProcessed(static_cast<std::int64_t>(bytes));
    state.counters["bandwidth_share"] =
        benchmark::Counter(bytes / kvplane_bench::read_bandwidth(1), benchmark::Counter::kIsRate);
}

BENCHMARK(fit)
    ->Name("Fit")
    ->ArgNames({"", "", "threads"})
    ->ArgsProduct({{64, 192, 512, 1024}, {4096, 32768}, {1, 2}})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(schedule)->Name("Schedule")->Arg(64)->Arg(192)->Arg(1024)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(tiles, encode, true)->Name("Encode")->Arg(64)->Arg(192)->Arg(1024);
BENCHMARK_CAPTURE(tiles, decode, false)->Name("Decode")->Arg(64)->Arg(192)->Arg(1024);

}  // namespace

BENCHMARK_MAIN();
