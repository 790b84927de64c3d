// examples/engine/threads.hpp: a team of threads that shares the work of one loop after another.
//
// A forward pass is 150 loops, for one token about 100 microseconds each, so what counts is how fast a loop
// starts: waiting threads spin for a moment before they sleep. Which thread takes which index is
// left to chance; a loop whose iterations do not depend on that gives the same result with any number of
// them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace engine {

using kvplane::Index;

class Threads {
  public:
    /// A team of `count` threads, the caller of for_each() being one; 0 means one for each core.
    /// Throws Error (option).
    explicit Threads(int count = 0) {
        kvplane::require(count >= 0 && count <= 1024, kvplane::ErrorCode::option, "threads: ", count,
                         ", expected 0 (as many as cores) to 1024");
        if (count == 0) count = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
        for (int i = 1; i < count; ++i) helpers_.emplace_back([this] { help(); });
    }
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;
    ~Threads() {
        stop_ = true;
        start_helpers();
        for (std::thread& helper : helpers_) helper.join();
    }

    int count() const noexcept { return static_cast<int>(helpers_.size()) + 1; }

    /// Calls body(i) once for every i in [0, count), in any order and on any thread of the team, and returns
    /// when all calls have. body must not throw (that ends the program) nor call for_each itself. Calls from
    /// several threads take turns.
    void for_each(Index count, const std::function<void(Index)>& body) noexcept {
        const std::lock_guard turn(turn_);
        body_ = &body;
        count_ = count;
        next_ = 0;
        busy_ = static_cast<int>(helpers_.size());
        if (count > 1) {
            start_helpers();
            work();
            for (int left; (left = busy_.load()) > 0;) wait(busy_, left);
        } else {
            work();
        }
    }

  private:
    void start_helpers() noexcept {
        ++round_;
        round_.notify_all();
    }

    void work() noexcept {
        for (Index i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*body_)(i);
    }

    void help() noexcept {
        for (std::uint64_t seen = 0;;) {
            wait(round_, seen);
            seen = round_.load();
            if (stop_) return;
            work();
            if (--busy_ == 0) busy_.notify_all();
        }
    }

    /// Returns when a number is no longer `old`.
    template <class Number>
    static void wait(const std::atomic<Number>& number, Number old) noexcept {
        for (int i = 0; i < 4000; ++i) {
            if (number.load() != old) return;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        number.wait(old);
    }

    std::vector<std::thread> helpers_;
    std::mutex turn_;
    std::atomic<bool> stop_ = false;
    std::atomic<std::uint64_t> round_ = 0;
    std::atomic<int> busy_ = 0;
    std::atomic<Index> next_ = 0;
    const std::function<void(Index)>* body_ = nullptr;
    Index count_ = 0;
};

}  // namespace engine
