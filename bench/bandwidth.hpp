// bench/bandwidth.hpp: the read bandwidth of this machine, measured in the run that reports a share of it.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

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

/// Bytes per second that `threads` threads together read from memory now: the best of three passes.
inline double read_bandwidth(int threads) {
    static const std::vector<std::byte> buffer(beyond_caches(), std::byte{1});
    const std::size_t bytes = buffer.size() / static_cast<std::size_t>(threads);
    double best = 0.0;
    volatile std::uint64_t sink = 0;
    for (int pass = 0; pass < 3; ++pass) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<std::thread> readers;
        const auto read = [&](std::size_t i) {
            sink = sink + detail::sum_bytes(buffer.data() + i * bytes, bytes);
        };
        for (int i = 1; i < threads; ++i) readers.emplace_back(read, static_cast<std::size_t>(i));
        read(0);
        for (auto& reader : readers) reader.join();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, static_cast<double>(bytes) * threads / seconds.count());
    }
    return best;
}

}  // namespace kvplane_bench
