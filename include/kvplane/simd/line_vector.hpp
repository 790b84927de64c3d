// kvplane/simd/line_vector.hpp: arrays that vectors are loaded from.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace kvplane::detail {

/// Memory that starts with a cache line, so that no vector lies across two, which takes twice as long to load.
template <class T>
struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t line{64};

    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) noexcept {}
    T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), line)); }
    void deallocate(T* memory, std::size_t) noexcept { ::operator delete(memory, line); }
    bool operator==(const LineAllocator&) const = default;
};
template <class T>
using LineVector = std::vector<T, LineAllocator<T>>;

}  // namespace kvplane::detail
