// kvplane/attention/executor.hpp: who runs the parts of one attention.
//
// An engine has threads of its own and derives from Executor; SerialExecutor and ThreadExecutor are for those
// that have none. Results do not depend on the number of workers.
#pragma once

#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#include "kvplane/compiled.hpp"
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

/// Keeps the first exception of a run's bodies, which executors cannot take, to be thrown after the run.
class FirstFailure {
  public:
    template <class Body>
    void guard(const Body& body) noexcept {
#if defined(__cpp_exceptions)
        try {
            body();
        } catch (...) {
            const std::lock_guard lock(mutex_);
            if (!failure_) failure_ = std::current_exception();
        }
#else
        body();
#endif
    }
    void rethrow() {
#if defined(__cpp_exceptions)
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
#endif
    }

  private:
#if defined(__cpp_exceptions)
    std::mutex mutex_;
    std::exception_ptr failure_;
#endif
};

/// body(item, worker) for every item below `items`. Throws what the first body threw that did, after all have run.
template <class Body>
void run_throwing_items(Executor& executor, Index items, const Body& body) {
    FirstFailure failure;
    run_items(executor, items, [&](Index item, Index worker) { failure.guard([&] { body(item, worker); }); });
    failure.rethrow();
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

/// The calling thread and others that wait for work between calls. Runs from several threads take turns. A run
/// that a body starts on the same executor (attention within an engine's own parallel loop) stays in the body's
/// thread.
class ThreadExecutor final : public Executor {
  public:
    /// Throws Error: option for less than one thread, out_of_memory where the system cannot start so many.
    explicit ThreadExecutor(Index threads);
    ~ThreadExecutor() override;
    ThreadExecutor(const ThreadExecutor&) = delete;
    ThreadExecutor& operator=(const ThreadExecutor&) = delete;

    Index workers() const noexcept override;
    void run(Index items, Body body, void* context) noexcept override;

  private:
    class Team;
    std::unique_ptr<Team> team_;
};

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/attention/impl/executor.hpp"
#endif
