// examples/engine/parallel.hpp: loops that share kvplane's threads.
//
// A forward pass is 150 loops, for one token about 100 microseconds each. Which thread takes which index is left
// to chance; a loop whose iterations do not depend on that gives the same result with any number of threads.
#pragma once

#include <algorithm>
#include <thread>

#include "kvplane/attention/executor.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace engine {

using kvplane::Executor;
using kvplane::Index;
using kvplane::ThreadExecutor;

/// The number of threads that is meant by `asked`: 0 stands for one a core. Throws Error (option).
inline Index thread_count(Index asked) {
    kvplane::require(asked >= 0 && asked <= 1024, kvplane::ErrorCode::option, "threads: ", asked,
                     ", expected 0 (as many as cores) to 1024");
    return asked > 0 ? asked : std::max<Index>(1, std::thread::hardware_concurrency());
}

/// Calls body(i) once for every i in [0, count), in any order and on any thread, and returns when all calls
/// have. body must not throw, which ends the program, nor start another loop on the same threads.
template <class Body>
void parallel_for(Executor& threads, Index count, const Body& body) noexcept {
    const auto call = [](void* context, Index i, Index) { (*static_cast<const Body*>(context))(i); };
    threads.run(count, call, const_cast<Body*>(&body));
}

}  // namespace engine
