// kvplane/attention/impl/executor.hpp: a team of threads.
#pragma once

#include "kvplane/attention/executor.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "kvplane/error.hpp"

namespace kvplane {

class ThreadExecutor::Team {
  public:
    Team() = default;
    /// Ends the threads that were started.
    ~Team() {
        stopping_ = true;
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
        for (std::thread& thread : others_) thread.join();
    }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    void start(Index threads) {
#if defined(__cpp_exceptions)
        try {
            start_others(threads);
        } catch (const std::system_error&) {  // what std::thread throws
            fail(ErrorCode::out_of_memory, "ThreadExecutor: the system started ", size(), " of ", threads,
                 " threads");
        }
#else
        start_others(threads);
#endif
    }

    Index size() const noexcept {
        return static_cast<Index>(others_.size()) + 1;
    }

    void run(Index items, Body body, void* context) noexcept {
        if (others_.empty() || items <= 1 || running_ == this) {
            for (Index item = 0; item < items; ++item) body(context, item, 0);
            return;
        }
        const std::lock_guard turn(turn_);
        body_ = body;
        context_ = context;
        items_ = items;
        next_.store(0, std::memory_order_relaxed);
        busy_.store(static_cast<std::uint32_t>(others_.size()), std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
        work(0);
        if (happens_soon([&] { return busy_.load(std::memory_order_acquire) == 0; })) return;
        for (std::uint32_t busy; (busy = busy_.load(std::memory_order_acquire)) != 0;) busy_.wait(busy);
    }

  private:
    void start_others(Index threads) {
        others_.reserve(static_cast<std::size_t>(threads - 1));
        for (Index worker = 1; worker < threads; ++worker)
            others_.emplace_back([this, worker] { serve(worker); });
    }

    /// Spins before a thread sleeps, because waking one takes 20 to 50 us and an attention has several
    /// rounds.
    template <class Happened>
    static bool happens_soon(const Happened& happened) noexcept {
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
        do {
            for (int i = 0; i < 16; ++i) {
                if (happened()) return true;
#if defined(__x86_64__) || defined(_M_X64)
                __builtin_ia32_pause();
#endif
            }
        } while (std::chrono::steady_clock::now() < until);
        return false;
    }

    void work(Index worker) noexcept {
        const Team* const outer = std::exchange(running_, this);
        for (Index item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items_;)
            body_(context_, item, worker);
        running_ = outer;
    }
    void serve(Index worker) noexcept {
        for (std::uint32_t seen = 0;;) {
            if (!happens_soon([&] { return round_.load(std::memory_order_relaxed) != seen; }))
                round_.wait(seen, std::memory_order_acquire);
            seen = round_.load(std::memory_order_acquire);
            if (stopping_) return;
            work(worker);
            if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
        }
    }

    /// The team whose bodies this thread runs.
    inline static thread_local const Team* running_ = nullptr;

    std::vector<std::thread> others_;
    std::mutex turn_;
    std::atomic<std::uint32_t> round_{0}, busy_{0};
    std::atomic<Index> next_{0};
    std::atomic<bool> stopping_{false};
    Body body_ = nullptr;
    void* context_ = nullptr;
    Index items_ = 0;
};

KVPLANE_FUNCTION ThreadExecutor::ThreadExecutor(Index threads) {
    require(threads >= 1, ErrorCode::option, "ThreadExecutor: ", threads, " threads, expected at least 1");
    team_ = std::make_unique<Team>();
    team_->start(threads);
}
KVPLANE_FUNCTION ThreadExecutor::~ThreadExecutor() = default;

KVPLANE_FUNCTION Index ThreadExecutor::workers() const noexcept {
    return team_->size();
}
KVPLANE_FUNCTION void ThreadExecutor::run(Index items, Body body, void* context) noexcept {
    team_->run(items, body, context);
}

}  // namespace kvplane
