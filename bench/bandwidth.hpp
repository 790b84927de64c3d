// bench/bandwidth.hpp: the read bandwidth of this machine, measured in the run that reports a share of it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "kvplane/quantize/kernels.hpp"

namespace kvplane_bench {

namespace detail {

/// Adds up a buffer in whole vectors, four streams at a time: nothing but loads.
template <int Lanes>
KVPLANE_INLINE std::uint64_t sum_words(const std::byte* data, std::size_t bytes) {
    using Words = kvplane::detail::quantize::Words<Lanes>;
    constexpr std::size_t step = sizeof(Words);
    Words sums[4]{};
    for (std::size_t at = 0; at + 4 * step <= bytes; at += 4 * step)
        for (std::size_t i = 0; i < 4; ++i) {
            Words words;
            kvplane::detail::quantize::load(words, data + at + i * step);
            sums[i] += words;
        }
    const Words all = sums[0] + sums[1] + sums[2] + sums[3];
    std::uint64_t sum = 0;
    for (int i = 0; i < Lanes; ++i) sum += all[i];
    return sum;
}

inline std::uint64_t sum_bytes(const std::byte* data, std::size_t bytes) {
    return kvplane::run_on(kvplane::current_isa(),
                           [&](auto lanes) KVPLANE_BODY { return sum_words<lanes>(data, bytes); });
}

}  // namespace detail

/// Bytes per second that `threads` threads together read from memory, the best of several passes over 256 MiB
/// each (larger than the caches). Measured once for each number of threads.
inline double read_bandwidth(int threads) {
    static std::vector<double> measured(64, 0.0);
    double& best = measured[static_cast<std::size_t>(threads)];
    if (best > 0.0) return best;
    constexpr std::size_t bytes = std::size_t{256} << 20;
    std::vector<std::vector<std::byte>> buffers(static_cast<std::size_t>(threads),
                                                std::vector<std::byte>(bytes, std::byte{1}));
    volatile std::uint64_t sink = 0;
    for (int pass = 0; pass < 7; ++pass) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<std::thread> readers;
        for (auto& buffer : buffers)
            readers.emplace_back([&] { sink = sink + detail::sum_bytes(buffer.data(), buffer.size()); });
        for (auto& reader : readers) reader.join();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, static_cast<double>(bytes) * threads / seconds.count());
    }
    return best;
}

}  // namespace kvplane_bench
