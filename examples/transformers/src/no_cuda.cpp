// In place of cuda_cache.cpp in builds without CUDA.
#include "cuda_cache.hpp"

namespace kvplane_python {

bool cuda_is_built() noexcept {
    return false;
}
int cuda_device_count() noexcept {
    return 0;
}
std::unique_ptr<Cache> make_cuda_cache(Contents, Index, Index, int device) {
    kvplane::fail(ErrorCode::option, "device: ", place_name(device), ", ", without_cuda);
}

}  // namespace kvplane_python
