// bench/attention_bench.cpp: decode attention on packed bits against the bandwidth of memory.
//
//   Decode/RECIPE/TOKENS/QUERY_HEADS/KV_HEADS/HEAD_DIM/threads:T   one query token over a cache of so many
//   Decode8/..., Prefill512/...   the last 8 or 512 tokens as queries; with --window=W behind a sliding window
// RECIPE@POLICY reads in part (recipes::read_policy). Counters: `bytes` of the cache that are
// read, `bytes_per_second`, `bandwidth_share` = that over the read bandwidth that this run measures with as
// many threads, before and after each case; `fp16_floor_ratio` = time over what reading an fp16 cache at that
// bandwidth takes.
//   DecodeBatch/RECIPE/.../sequences:S/threads:T   one query token of each of S sequences in one call
//   DecodeLoop/...                                 the same in a call each
//   SharedPrefix/RECIPE/.../forks:F/threads:T      one query token of each of F forks of one sequence, which have
// a token of their own each, in one call; SharedPrefixApart/...: in a call each. Counter `over_one`:
// processor time over that of one sequence alone, measured in turns with it.
//   TokenWeights/RECIPE/.../queries:Q              attention of Q query tokens with sums of softmax weights. Counter
// `more_percent`: processor time over that without, measured in turns, less 1.
// Several caches take turns, together twice what the last-level cache holds, so that
// all of it comes from memory. Usage: attention_bench [--all] [--recipes=A,B] [--threads=1,2] [--window=W]
// [benchmark's own options]; --all: every length and shape, not only the main ones.
#include <benchmark/benchmark.h>

#include <cstring>
#include <ctime>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "bandwidth.hpp"
#include "cases.hpp"
#include "kvplane/cache/huge_pages.hpp"
#include "kvplane/cache/kv_cache.hpp"

namespace {

using namespace kvplane;
using kvplane_bench::configuration;
using kvplane_bench::name_of;
using kvplane_bench::random_rows;
using kvplane_bench::Shape;

/// Seconds since it was made: on the clock, and of all of this program's threads on processors, on which other work
/// of the machine counts for less.
class Stopwatch {
  public:
    double seconds() const { return now(CLOCK_MONOTONIC) - start_; }
    double processor_seconds() const { return now(CLOCK_PROCESS_CPUTIME_ID) - processor_start_; }

  private:
    static double now(clockid_t clock) {
        timespec time{};
        clock_gettime(clock, &time);
        return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
    }
    double start_ = now(CLOCK_MONOTONIC), processor_start_ = now(CLOCK_PROCESS_CPUTIME_ID);
};

struct Caches {
    HugePageResource memory;
    TilePool pool{&memory};
    std::vector<KvCache> caches;
};

/// The caches of one case, at least so many; made when it is asked for, and kept while it is.
Caches& caches_of(const std::string& recipe, const Shape& shape, std::size_t at_least = 1) {
    static std::string key;
    static std::unique_ptr<Caches> made;
    const std::string wanted = name_of(recipe, shape) + "/" + std::to_string(at_least);
    if (key == wanted) return *made;
    made = std::make_unique<Caches>();
    const CacheConfiguration c = configuration(recipe, shape);
    const Index piece = std::min<Index>(shape.tokens, 2048), channels = shape.kv_heads * shape.head_dim;
    const Matrix keys = random_rows(piece, channels, 1), values = random_rows(piece, channels, 2);
    do {
        KvCache& cache = made->caches.emplace_back(c, made->pool);
        for (Index t = 0; t < shape.tokens; t += piece) cache.append(keys, values);
    } while (made->caches[0].bytes() * static_cast<Index>(made->caches.size()) <
                 static_cast<Index>(kvplane_bench::beyond_caches()) ||
             made->caches.size() < at_least);
    key = wanted;
    return *made;
}

/// How a case of decode() asks.
struct Asked {
    Index queries = 1, window = 0;
    int threads = 1;
};

/// name: a recipe, and after an @ a read policy.
void decode(benchmark::State& state, const std::string& name, const Shape& shape, const Asked& asked) {
    const int threads = asked.threads;
    const std::size_t at = name.find('@');
    Caches& all = caches_of(name.substr(0, at), shape);
    AttentionParameters parameters;
    parameters.sliding_window = asked.window;
    if (at != std::string::npos) parameters.read = recipes::read_policy(name.substr(at + 1));
    ThreadExecutor executor(threads);
    AttentionWorkspace workspace(&executor);
    const Matrix queries = random_rows(asked.queries, shape.query_heads * shape.head_dim, 3);
    Matrix output(asked.queries, shape.query_heads * shape.head_dim);
    std::size_t next = 0;
    const double before = kvplane_bench::read_bandwidth(threads);
    for (auto _ : state) {
        all.caches[next].attend(queries, output, parameters, workspace);
        benchmark::DoNotOptimize(output.data());
        next = (next + 1) % all.caches.size();
    }
    auto bytes = static_cast<double>(all.caches[0].bytes());
    if (at != std::string::npos) {
        // Planes that were not read.
        AttentionWorkspace whole;
        const ReadReport some = workspace.report();
        all.caches[0].attend(queries, output, {}, whole);
        bytes -= static_cast<double>(all.caches[0].packed_tokens() * shape.kv_heads * shape.head_dim) / 8.0 *
                 (whole.report().key_bits - some.key_bits + whole.report().value_bits - some.value_bits);
    }
    // Of what was there before and after: other work on the machine changes it from minute to minute.
    const double bandwidth = 0.5 * (before + kvplane_bench::read_bandwidth(threads)),
                 runs = static_cast<double>(state.iterations());
    const double fp16 = 4.0 * static_cast<double>(shape.tokens * shape.kv_heads * shape.head_dim);
    state.counters["bytes"] = bytes;
    state.SetBytesProcessed(static_cast<std::int64_t>(bytes * runs));
    state.counters["bandwidth_share"] =
        benchmark::Counter(bytes * runs / bandwidth, benchmark::Counter::kIsRate);
    state.counters["fp16_floor_ratio"] = benchmark::Counter(
        fp16 / bandwidth * runs, benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

/// One query token of each of many sequences, together or one after another.
void decode_many(benchmark::State& state, const std::string& recipe, const Shape& shape,
                 std::size_t sequences, int threads, bool together) {
    Caches& all = caches_of(recipe, shape, sequences);
    ThreadExecutor executor(threads);
    AttentionWorkspace workspace(&executor);
    const auto count = static_cast<Index>(sequences);
    const Matrix queries = random_rows(count, shape.query_heads * shape.head_dim, 3);
    Matrix output(count, shape.query_heads * shape.head_dim);
    std::vector<const KvCache*> batch(sequences);
    std::vector<Index> offsets(sequences + 1);
    for (std::size_t i = 0; i <= sequences; ++i) offsets[i] = static_cast<Index>(i);
    std::size_t next = 0;
    for (auto _ : state) {
        for (const KvCache*& cache : batch) {
            cache = &all.caches[next];
            next = (next + 1) % all.caches.size();
        }
        if (together)
            KvCache::attend_batch(batch, offsets, queries, output, {}, workspace);
        else
            for (Index i = 0; i < count; ++i) {
                auto row = output.row(i);
                batch[static_cast<std::size_t>(i)]->attend(queries.row(i), row, {}, workspace);
            }
        benchmark::DoNotOptimize(output.data());
    }
    state.SetItemsProcessed(state.iterations() * count);
}

/// One query token of each of some forks, together or one after another.
void decode_forks(benchmark::State& state, const std::string& recipe, const Shape& shape, std::size_t forks,
                  int threads, bool together) {
    Caches& all = caches_of(recipe, shape, 2);
    ThreadExecutor executor(threads);
    AttentionWorkspace workspace(&executor);
    const auto count = static_cast<Index>(forks);
    const Index channels = shape.kv_heads * shape.head_dim;
    std::vector<std::vector<KvCache>> families;
    for (const KvCache& parent : all.caches) {
        std::vector<KvCache>& family = families.emplace_back();
        for (std::size_t i = 0; i < forks; ++i) {
            family.push_back(parent.fork());
            family.back().append(random_rows(1, channels, 10 + i), random_rows(1, channels, 100 + i));
        }
    }
    const Matrix queries = random_rows(count, shape.query_heads * shape.head_dim, 3);
    Matrix output(count, shape.query_heads * shape.head_dim), one(1, shape.query_heads * shape.head_dim);
    std::vector<const KvCache*> batch(forks);
    std::vector<Index> offsets(forks + 1);
    for (std::size_t i = 0; i <= forks; ++i) offsets[i] = static_cast<Index>(i);
    std::size_t next = 0;
    const auto take = [&]() -> const std::vector<KvCache>& {
        next = (next + 1) % families.size();
        return families[next];
    };
    double of_forks = 0.0, of_one = 0.0;
    for (auto _ : state) {
        const std::vector<KvCache>& family = take();
        for (std::size_t i = 0; i < forks; ++i) batch[i] = &family[i];
        const Stopwatch forks_watch;
        if (together)
            KvCache::attend_batch(batch, offsets, queries, output, {}, workspace);
        else
            for (Index i = 0; i < count; ++i) {
                auto row = output.row(i);
                batch[static_cast<std::size_t>(i)]->attend(queries.row(i), row, {}, workspace);
            }
        state.SetIterationTime(forks_watch.seconds());
        of_forks += forks_watch.processor_seconds();
        const Stopwatch one_watch;
        take()[0].attend(queries.row(0), one, {}, workspace);
        of_one += one_watch.processor_seconds();
        benchmark::DoNotOptimize(output.data());
    }
    state.counters["over_one"] = of_forks / of_one;
}

void add_forks(const std::string& recipe, const Shape& shape, std::size_t forks) {
    for (const int threads : {1, 2})
        for (const bool together : {false, true}) {
            const std::string name = std::string(together ? "SharedPrefix/" : "SharedPrefixApart/") +
                                     name_of(recipe, shape) + "/forks:" + std::to_string(forks) +
                                     "/threads:" + std::to_string(threads);
            benchmark::RegisterBenchmark(name.c_str(),
                                         [=](benchmark::State& state) {
                                             decode_forks(state, recipe, shape, forks, threads, together);
                                         })
                ->UseManualTime()
                ->Unit(benchmark::kMicrosecond);
        }
}

/// Attention with sums of softmax weights, in turns with attention without.
void token_weights(benchmark::State& state, const std::string& recipe, const Shape& shape, Index queries) {
    Caches& all = caches_of(recipe, shape);
    ThreadExecutor executor(1);
    AttentionWorkspace with(&executor), without(&executor);
    const Matrix asked = random_rows(queries, shape.query_heads * shape.head_dim, 3);
    Matrix output(queries, shape.query_heads * shape.head_dim), weights;
    std::size_t next = 0;
    double seconds[2] = {0.0, 0.0};
    const auto attend = [&](bool wanted) {
        const KvCache& cache = all.caches[next];
        next = (next + 1) % all.caches.size();
        const Stopwatch watch;
        cache.attend(asked, output, {}, wanted ? with : without,
                     {.token_weights = wanted ? &weights : nullptr});
        seconds[wanted] += watch.processor_seconds();
        return watch.seconds();
    };
    attend(true), attend(false);
    seconds[0] = seconds[1] = 0.0;
    for (auto _ : state) {
        state.SetIterationTime(attend(true));
        attend(false);
    }
    state.counters["more_percent"] = 100.0 * (seconds[1] / seconds[0] - 1.0);
}

void add_token_weights(const std::string& recipe, const Shape& shape, Index queries) {
    const std::string name = "TokenWeights/" + name_of(recipe, shape) + "/queries:" + std::to_string(queries);
    benchmark::RegisterBenchmark(
        name.c_str(), [=](benchmark::State& state) { token_weights(state, recipe, shape, queries); })
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
}

void add_batch(const std::string& recipe, const Shape& shape, std::size_t sequences) {
    std::vector<int> teams{1, 2};
    if (const auto cores = static_cast<int>(std::thread::hardware_concurrency()); cores > 2)
        teams.push_back(cores);
    for (const int threads : teams)
        for (const bool together : {false, true}) {
            const std::string name = std::string(together ? "DecodeBatch/" : "DecodeLoop/") +
                                     name_of(recipe, shape) + "/sequences:" + std::to_string(sequences) +
                                     "/threads:" + std::to_string(threads);
            benchmark::RegisterBenchmark(name.c_str(),
                                         [=](benchmark::State& state) {
                                             decode_many(state, recipe, shape, sequences, threads, together);
                                         })
                ->UseRealTime()
                ->Unit(benchmark::kMicrosecond);
        }
}

void add(const std::string& recipe, const Shape& shape, Asked asked) {
    std::string name = asked.queries == 1   ? "Decode"
                       : asked.queries <= 8 ? "Decode" + std::to_string(asked.queries)
                                            : "Prefill" + std::to_string(asked.queries);
    name += "/" + name_of(recipe, shape) + "/threads:" + std::to_string(asked.threads);
    if (asked.window > 0) name += "/window:" + std::to_string(asked.window);
    benchmark::RegisterBenchmark(name.c_str(),
                                 [=](benchmark::State& state) { decode(state, recipe, shape, asked); })
        ->UseRealTime()
        ->Unit(benchmark::kMicrosecond);
}

std::vector<std::string> split(const std::string& list) {
    std::vector<std::string> parts;
    std::stringstream words(list);
    for (std::string word; std::getline(words, word, ',');) parts.push_back(word);
    return parts;
}

}  // namespace

int main(int count, char** arguments) {
    bool all = false;
    int kept = 0;
    std::vector<int> teams{1, 2};
    Index window = 0;
    std::string recipes =
        "fp16,fp16@published,fp16@aligned,block32:8,key_favored:8:8,key_favored:8:8@6,key_favored:8:8@5,"
        "key_favored:8:8@4,"
        "key_favored:8:8@3,key_favored:4:4,key_favored:4:2,key_favored:3:3,key_favored:2:2,standard,"
        "latent:3:3+heads_together=0,latent:2:2+heads_together=0";
    for (int i = 0; i < count; ++i) {
        if (std::strcmp(arguments[i], "--all") == 0)
            all = true;
        else if (std::strncmp(arguments[i], "--recipes=", 10) == 0)
            recipes = arguments[i] + 10;
        else if (std::strncmp(arguments[i], "--threads=", 10) == 0) {
            teams.clear();
            for (const std::string& threads : split(arguments[i] + 10)) teams.push_back(std::stoi(threads));
        } else if (std::strncmp(arguments[i], "--window=", 9) == 0)
            window = std::stol(arguments[i] + 9);
        else
            arguments[kept++] = arguments[i];
    }
    for (const std::string& recipe : split(recipes)) {
        const auto add_all = [&](const Shape& shape, Index queries) {
            for (const int threads : teams) add(recipe, shape, {queries, window, threads});
        };
        add_all({32768, 32, 8, 128}, 1);
        add_all({4096, 32, 8, 128}, 8);
        add_all({4096, 32, 8, 128}, 512);
        if (!all) continue;
        add_all({32768, 32, 8, 128}, 8);
        for (const Index tokens : {512, 4096, 131072}) add_all({tokens, 32, 8, 128}, 1);
        for (const Index tokens : {512, 4096, 32768}) {
            add_all({tokens, 32, 32, 128}, 1);
            add_all({tokens, 9, 3, 64}, 1);
        }
    }
    for (const char* recipe : {"fp16", "key_favored:4:4"}) add_batch(recipe, {512, 32, 8, 128}, 64);
    for (const char* recipe : {"key_favored:4:4", "standard"})
        for (const Index kv_heads : {8, 32})
            for (const std::size_t forks : {std::size_t{2}, std::size_t{16}})
                add_forks(recipe, {8192, 32, kv_heads, 128}, forks);
    for (const char* recipe : {"key_favored:4:4", "standard"}) {
        for (const Index tokens : {8192, 32768}) add_token_weights(recipe, {tokens, 32, 8, 128}, 1);
        add_token_weights(recipe, {4096, 32, 8, 128}, 512);
    }
    benchmark::Initialize(&kept, arguments);
    if (benchmark::ReportUnrecognizedArguments(kept, arguments)) return 1;
    benchmark::RunSpecifiedBenchmarks();
}
