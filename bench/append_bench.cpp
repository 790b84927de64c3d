// bench/append_bench.cpp: appending to a cache against the bandwidth of memory.
//
//   Append/RECIPE/SCALAR/TOKENS_AT_A_TIME/THREADS   8 key heads of 128, input from memory, up to 8192 tokens
//
// Counters: `bytes_per_second` of input; `bandwidth_share` = that over the read bandwidth of as many threads,
// measured before and after each case; `least_us`, `median_us` and `worst_us` of single appends; where one token
// is appended, `tile_us`, the least of those that make a tile.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "bandwidth.hpp"
#include "cases.hpp"
#include "kvplane/cache/huge_pages.hpp"
#include "kvplane/cache/kv_cache.hpp"

namespace {

using namespace kvplane;

template <class Scalar>
void append(benchmark::State& state, const std::string& recipe, Index count, int threads) {
    constexpr Index most = 8192, channels = 8 * 128, input_tokens = 16384;
    CacheConfiguration c = kvplane_bench::configuration(recipe, {most, 32, 8, 128});
    if (c.recipe.shaped_keys) {
        SecondMoments queries(128);
        queries.add(kvplane_bench::random_rows(512, 128, 3));
        c.query_moments = std::make_shared<const std::vector<SecondMoments>>(8, queries);
    }
    // 64 MiB at least, so that the input comes from memory.
    const RowMajorMatrix<Scalar> keys = kvplane_bench::random_rows(2048, channels, 1)
                                            .template cast<Scalar>()
                                            .replicate(input_tokens / 2048, 1);
    const RowMajorMatrix<Scalar> values = kvplane_bench::random_rows(2048, channels, 2)
                                              .template cast<Scalar>()
                                              .replicate(input_tokens / 2048, 1);
    // Recipes that weigh tokens by queries get some.
    const RowMajorMatrix<Scalar> queries =
        kvplane_bench::random_rows(c.widths_by_token() ? 2048 : 0, 32 * 128, 4)
            .template cast<Scalar>()
            .replicate(input_tokens / 2048, 1);
    HugePageResource memory;
    TilePool pool(&memory);
    ThreadExecutor executor(threads);
    AttentionWorkspace workspace(&executor);
    KvCache cache(c, pool);
    const auto fill = [&](Index from) {
        if (queries.rows() > 0)
            cache.append(keys.middleRows(from, count), values.middleRows(from, count),
                         queries.middleRows(from, count), workspace);
        else
            cache.append(keys.middleRows(from, count), values.middleRows(from, count), workspace);
    };
    while (cache.tokens() < most) fill(cache.tokens());  // the pool has its pages
    std::vector<double> microseconds, with_tile;
    Index at = 0;
    const double before = kvplane_bench::read_bandwidth(threads);
    for (auto _ : state) {
        if (cache.tokens() + count > most) cache.clear();
        const Index packed = cache.packed_tokens();
        const auto start = std::chrono::steady_clock::now();
        fill(at);
        const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
        microseconds.push_back(took.count());
        if (count == 1 && cache.packed_tokens() > packed + 1) with_tile.push_back(took.count());
        at = (at + count) % input_tokens;
    }
    const double bandwidth = 0.5 * (before + kvplane_bench::read_bandwidth(threads)),
                 bytes = static_cast<double>(state.iterations() * count * channels * 2 *
                                             static_cast<Index>(sizeof(Scalar)));
    state.SetBytesProcessed(static_cast<std::int64_t>(bytes));
    state.counters["bandwidth_share"] = benchmark::Counter(bytes / bandwidth, benchmark::Counter::kIsRate);
    std::sort(microseconds.begin(), microseconds.end());
    state.counters["least_us"] = microseconds.front();
    state.counters["median_us"] = microseconds[microseconds.size() / 2];
    if (!with_tile.empty()) state.counters["tile_us"] = *std::min_element(with_tile.begin(), with_tile.end());
    // Of a thousand, so that a pause of the machine is not taken for the cache's.
    state.counters["worst_us"] = microseconds[microseconds.size() - 1 - microseconds.size() / 1000];
}

}  // namespace

int main(int count, char** arguments) {
    for (const char* recipe :
         {"fp16", "key_favored:8:8", "key_favored:4:4", "key_favored:4:4+value_scheme=min_max",
          "key_favored:4:4+shaped_keys=1", "key_favored:4:2", "key_favored:4:2+value_widths=32x4/32x2/64x1",
          "key_favored:2:2", "standard", "smallest", "latent:3:3+heads_together=0"})
        for (const bool half : {true, false})
            for (const Index tokens : {1, 512})
                for (const int threads : {1, 2}) {
                    const std::string name = std::string("Append/") + recipe + (half ? "/fp16/" : "/fp32/") +
                                             std::to_string(tokens) + "/" + std::to_string(threads);
                    benchmark::RegisterBenchmark(name.c_str(),
                                                 [=](benchmark::State& state) {
                                                     half
                                                         ? append<Eigen::half>(state, recipe, tokens, threads)
                                                         : append<float>(state, recipe, tokens, threads);
                                                 })
                        ->UseRealTime()
                        ->Unit(benchmark::kMicrosecond);
                }
    benchmark::Initialize(&count, arguments);
    if (benchmark::ReportUnrecognizedArguments(count, arguments)) return 1;
    benchmark::RunSpecifiedBenchmarks();
}
