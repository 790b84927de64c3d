// kvplane/attention/executor.hpp: who runs the parts of one attention.
//
// An engine has threads of its own and derives from Executor; SerialExecutor and ThreadExecutor are for those
// that have none. Results do not depend on the number of workers.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

class Executor {
  public:
    using Body = void (*)(void* context, Index item, Index worker);

    virtual ~Executor() = default;
    /// How many bodies run at the same time at most.
    virtual Index workers() const noexcept = 0;
    /// Calls body(context, item, worker) once for every item below `items`, in any order, with workers from 0
    /// to workers() - 1 of which none runs two bodies at once; returns when all are done. Must not throw.
    virtual void run(Index items, Body body, void* context) noexcept = 0;
};

namespace detail {

/// body(item, worker) for every item below `items`, run by the executor. The body must not throw.
template <class Body>
void run_items(Executor& executor, Index items, Body&& body) noexcept {
    using Called = std::remove_reference_t<Body>;
    executor.run(
        items,
        [](void* context, Index item, Index worker) { (*static_cast<Called*>(context))(item, worker); },
        &body);
}

}  // namespace detail

/// Everything in the calling thread.
class SerialExecutor final : public Executor {
  public:
    Index workers() const noexcept override { return 1; }
    void run(Index items, Body body, void* context) noexcept override {
        for (Index item = 0; item < items; ++item) body(context, item, 0);
    }
};

/// The calling thread and others that wait for work between calls. One run at a time.
class ThreadExecutor final : public Executor {
  public:
    /// Throws Error (option) for less than one thread.
    explicit ThreadExecutor(Index threads) {
        require(threads >= 1, ErrorCode::option, "ThreadExecutor: ", threads,
                " threads, expected at least 1");
        for (Index worker = 1; worker < threads; ++worker)
            others_.emplace_back([this, worker] { serve(worker); });
    }
    ~ThreadExecutor() override {
        stopping_ = true;
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
        for (std::thread& thread : others_) thread.join();
    }
    ThreadExecutor(const ThreadExecutor&) = delete;
    ThreadExecutor& operator=(const ThreadExecutor&) = delete;

    Index workers() const noexcept override { return static_cast<Index>(others_.size()) + 1; }
    void run(Index items, Body body, void* context) noexcept override {
        if (others_.empty() || items <= 1) {
            for (Index item = 0; item < items; ++item) body(context, item, 0);
            return;
        }
        body_ = body;
        context_ = context;
        items_ = items;
        next_.store(0, std::memory_order_relaxed);
        busy_.store(static_cast<std::uint32_t>(others_.size()), std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
        work(0);
        if (look_out([&] { return busy_.load(std::memory_order_acquire) == 0; })) return;
        for (std::uint32_t busy; (busy = busy_.load(std::memory_order_acquire)) != 0;) busy_.wait(busy);
    }

  private:
    /// Looks out for what will soon be: to be woken takes 20 to 50 us, and an attention has several rounds.
    template <class Happened>
    static bool look_out(const Happened& happened) noexcept {
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
        for (Index item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items_;)
            body_(context_, item, worker);
    }
    void serve(Index worker) noexcept {
        for (std::uint32_t seen = 0;;) {
            if (!look_out([&] { return round_.load(std::memory_order_relaxed) != seen; }))
                round_.wait(seen, std::memory_order_acquire);
            seen = round_.load(std::memory_order_acquire);
            if (stopping_) return;
            work(worker);
            if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
        }
    }

    std::vector<std::thread> others_;
    std::atomic<std::uint32_t> round_{0}, busy_{0};
    std::atomic<Index> next_{0};
    std::atomic<bool> stopping_{false};
    Body body_ = nullptr;
    void* context_ = nullptr;
    Index items_ = 0;
};

}  // namespace kvplane
