// bench/bandwidth.hpp: the read bandwidth of this machine, measured in the run that reports a share of it.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "kvplane/attention/executor.hpp"
#include "kvplane/cache/huge_pages.hpp"
#include "kvplane/simd/vector.hpp"

namespace kvplane_bench {

namespace detail {

/// Adds up a buffer in whole vectors, four streams at a time: nothing but loads.
template <int Lanes>
KVPLANE_INLINE std::uint64_t sum_words(const std::byte* data, std::size_t bytes) {
    using Words = kvplane::detail::simd::Words<Lanes>;
    constexpr std::size_t step = sizeof(Words);
    Words sums[4]{};
    for (std::size_t at = 0; at + 4 * step <= bytes; at += 4 * step)
        for (std::size_t i = 0; i < 4; ++i) {
            Words words;
            kvplane::detail::simd::load(words, data + at + i * step);
            sums[i] += words;
        }
    const Words all = sums[0] + sums[1] + sums[2] + sums[3];
    std::uint64_t sum = 0;
    for (int i = 0; i < Lanes; ++i) sum += all[i];
    return sum;
}

inline std::uint64_t sum_bytes(const std::byte* data, std::size_t bytes) {
    return kvplane::detail::run_on(kvplane::current_isa(),
                                   [&](auto lanes) KVPLANE_BODY { return sum_words<lanes>(data, bytes); });
}

}  // namespace detail

/// Bytes of which little stays in the caches until it is read again: twice the last level, 256 MiB at least.
inline std::size_t beyond_caches() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const long last_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
    const long last_level = 0;
#endif
    return std::max(std::size_t{256} << 20, 2 * static_cast<std::size_t>(std::max(0L, last_level)));
}

/// Bytes per second that `threads` threads together read from memory now: the best of three passes, in huge pages
/// and after one that starts the threads.
inline double read_bandwidth(int threads) {
    static const std::size_t size = beyond_caches();
    static const std::byte* const buffer = [] {
        static kvplane::HugePageResource memory;
        void* const all = memory.allocate(size, 64);
        std::memset(all, 1, size);
        return static_cast<const std::byte*>(all);
    }();
    kvplane::ThreadExecutor executor(threads);
    // Pieces are small, so that none of the threads waits long for the last one.
    const kvplane::Index pieces = 16 * threads;
    const std::size_t bytes = size / static_cast<std::size_t>(pieces);
    std::atomic<std::uint64_t> sink = 0;
    double best = 0.0;
    for (int pass = 0; pass < 4; ++pass) {
        const auto start = std::chrono::steady_clock::now();
        kvplane::detail::run_items(executor, pieces, [&](kvplane::Index item, kvplane::Index) {
            sink += detail::sum_bytes(buffer + static_cast<std::size_t>(item) * bytes, bytes);
        });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        if (pass > 0)
            best = std::max(best, static_cast<double>(bytes) * static_cast<double>(pieces) / seconds.count());
    }
    return best;
}

}  // namespace kvplane_bench
