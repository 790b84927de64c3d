// bench/cache_file_bench.cpp: sessions to a file and back.
//
//   Save/RECIPE/SYNC   30 layers of 8192 tokens, 9 query heads over 3 of 64, into a file of the temporary
//                      folder; SYNC: 1 where it is on the disk when the call returns, 0 where it is in the
//                      page cache
//   Load/RECIPE/NEW    the same back, from the page cache; NEW: 1 into memory that the system has yet to
//                      give, 0 into pages that the pool kept
//   SaveCompressed/RECIPE, LoadCompressed/RECIPE/NEW   the same of compressed files, into the page cache
//   Range/RECIPE       4096 old tokens of each layer out and back, a file each, as an engine offloads them
//
// Counters: `bytes_per_second` of the file, of compressed ones as it would be without; of both ways for
// ranges. `MB` of the file, and `saved`, the part of it that compression saves.
#include <benchmark/benchmark.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "cases.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/io/range_file.hpp"
#include "kvplane/io/session_file.hpp"

namespace {

using namespace kvplane;

constexpr Index layers = 30, tokens = 8192;

std::filesystem::path path() {
    return std::filesystem::temp_directory_path() / ("kvplane_bench_" + std::to_string(::getpid()));
}

struct Layers {
    explicit Layers(const std::string& recipe)
        : configurations(layers, kvplane_bench::configuration(recipe, {tokens, 9, 3, 64})) {
        const Matrix keys = kvplane_bench::random_rows(tokens, 3 * 64, 1),
                     values = kvplane_bench::random_rows(tokens, 3 * 64, 2);
        caches.reserve(layers);
        for (const CacheConfiguration& c : configurations) {
            caches.emplace_back(c, pool);
            caches.back().append(keys, values);
        }
        for (const KvCache& cache : caches) pointers.push_back(&cache);
    }

    TilePool pool;
    std::vector<CacheConfiguration> configurations;
    std::vector<KvCache> caches;
    std::vector<const KvCache*> pointers;
};

/// Of a file that takes `bytes`, and `plain` where nothing is compressed.
void count_bytes(benchmark::State& state, Index plain, Index bytes) {
    state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations()) * plain);
    state.counters["MB"] = static_cast<double>(bytes) / 1e6;
    state.counters["saved"] = 1.0 - static_cast<double>(bytes) / static_cast<double>(plain);
    std::filesystem::remove(path());
}

Index saved_bytes(const Layers& session, const SaveOptions& options) {
    save_session(session.pointers, path(), options);
    return static_cast<Index>(std::filesystem::file_size(path()));
}

void save(benchmark::State& state, const std::string& recipe, const SaveOptions& options) {
    const Layers session(recipe);
    const Index plain = saved_bytes(session, {.sync = false});
    std::filesystem::remove(path());
    Index bytes = 0;
    for (auto _ : state) {
        save_session(session.pointers, path(), options);
        state.PauseTiming();
        bytes = static_cast<Index>(std::filesystem::file_size(path()));
        // A file that takes the place of another is written to the disk at once, by ext4 at least.
        std::filesystem::remove(path());
        state.ResumeTiming();
    }
    count_bytes(state, plain, bytes);
}

void load(benchmark::State& state, const std::string& recipe, bool compress, bool is_new) {
    TilePool pool;
    std::vector<CacheConfiguration> configurations;
    Index plain = 0, bytes = 0;
    {
        Layers session(recipe);
        configurations = session.configurations;
        plain = saved_bytes(session, {.sync = false});
        bytes = saved_bytes(session, {.sync = false, .compress = compress});
    }
    for (auto _ : state) {
        benchmark::DoNotOptimize(load_session(path(), configurations, pool));
        state.PauseTiming();
        if (is_new) pool.trim();
        state.ResumeTiming();
    }
    count_bytes(state, plain, bytes);
}

void range(benchmark::State& state, const std::string& recipe) {
    Layers session(recipe);
    const Index first = session.configurations[0].recipe.sink_tokens, last = first + 4096;
    Index bytes = 0;
    for (auto _ : state) {
        bytes = 0;
        for (KvCache& cache : session.caches) {
            save_range(cache, first, last, path(), {.sync = false});
            cache.drop_before(last);
            load_range(path(), cache);
            bytes += 2 * static_cast<Index>(std::filesystem::file_size(path()));
        }
    }
    count_bytes(state, bytes, bytes);
}

}  // namespace

int main(int argc, char** argv) {
    for (const std::string recipe :
         {"fp16", "key_favored:8:8", "standard", "compact", "key_favored:3:3", "key_favored:2:2"}) {
        const auto add = [&](const std::string& name, auto&& body) {
            benchmark::RegisterBenchmark(name.c_str(), body)->Unit(benchmark::kMillisecond)->UseRealTime();
        };
        for (const bool flag : {false, true}) {
            const std::string end = "/" + recipe + (flag ? "/1" : "/0");
            add("Save" + end, [=](benchmark::State& state) { save(state, recipe, {.sync = flag}); });
            add("Load" + end, [=](benchmark::State& state) { load(state, recipe, false, flag); });
            if (!can_compress()) continue;
            add("LoadCompressed" + end, [=](benchmark::State& state) { load(state, recipe, true, flag); });
        }
        if (can_compress())
            add("SaveCompressed/" + recipe,
                [=](benchmark::State& state) { save(state, recipe, {.sync = false, .compress = true}); });
        add("Range/" + recipe, [=](benchmark::State& state) { range(state, recipe); });
    }
    benchmark::Initialize(&argc, argv);
    benchmark::RunSpecifiedBenchmarks();
}
