#include "device_arrays.hpp"

#include "kvplane/cuda/error.cuh"

namespace kvplane_python {

using kvplane::cuda::require_cuda;

DeviceRows device_rows(const SequenceRows& rows, Index sequence, Index first) {
    return {rows.at(sequence, first), rows.type,        rows.tokens - first, rows.heads,
            rows.token_stride,        rows.head_stride, rows.channel_stride};
}
DeviceOutput device_output(const SequenceRows& rows, Index sequence, Index first) {
    return {rows.at(sequence, first), rows.type,       rows.tokens - first, rows.heads,
            rows.token_stride,        rows.head_stride};
}

namespace {

/// Whether the heads of a token are one run of numbers, and tokens are as far apart.
template <class Rows>
bool in_runs(const Rows& rows, Index channels) {
    return (rows.heads == 1 || rows.head_stride == channels) &&
           (rows.tokens == 1 || rows.token_stride >= rows.heads * channels);
}
/// What CUDA takes as the bytes from token to token: at least those of a row, also where there is one row
/// alone.
std::size_t pitch(Index tokens, Index token_stride, Index width, std::size_t size) {
    return to_size(tokens == 1 ? width : token_stride) * size;
}

}  // namespace

void copy_rows(const DeviceRows& from, const DeviceOutput& to, Index channels, cudaMemcpyKind kind,
               cudaStream_t stream) {
    const bool together = in_runs(from, channels) && in_runs(to, channels);
    const Index width = together ? from.heads * channels : channels;
    const std::size_t size = size_of(from.type);
    for (Index h = 0; h < (together ? 1 : from.heads); ++h)
        require_cuda(
            cudaMemcpy2DAsync(static_cast<std::byte*>(to.data) + to_size(h * to.head_stride) * size,
                              pitch(to.tokens, to.token_stride, width, size),
                              static_cast<const std::byte*>(from.data) + to_size(h * from.head_stride) * size,
                              pitch(from.tokens, from.token_stride, width, size), to_size(width) * size,
                              to_size(from.tokens), kind, stream),
            "copying tokens");
}

void clear_rows(const SequenceRows& output, Index sequence, Index rows, cudaStream_t stream) {
    const bool together = in_runs(output, output.channels);
    const Index width = together ? output.heads * output.channels : output.channels;
    const std::size_t size = size_of(output.type);
    for (Index h = 0; h < (together ? 1 : output.heads); ++h)
        require_cuda(cudaMemset2DAsync(output.at(sequence, 0) + to_size(h * output.head_stride) * size,
                                       pitch(rows, output.token_stride, width, size), 0,
                                       to_size(width) * size, to_size(rows), stream),
                     "clearing rows of padding");
}

Fetched::Fetched(const SequenceRows& rows, cudaStream_t stream) : rows_(rows) {
    const Index last = (rows.batch - 1) * rows.batch_stride + (rows.heads - 1) * rows.head_stride +
                       (rows.tokens - 1) * rows.token_stride + (rows.channels - 1) * rows.channel_stride;
    bytes_.resize(rows.tokens == 0 ? 0 : to_size(last + 1) * size_of(rows.type));
    rows_.data = bytes_.data();
    if (!bytes_.empty())
        require_cuda(cudaMemcpyAsync(bytes_.data(), rows.data, bytes_.size(), cudaMemcpyDeviceToHost, stream),
                     "copying from the device");
}

}  // namespace kvplane_python
