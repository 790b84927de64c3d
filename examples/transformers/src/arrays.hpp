// examples/transformers/src/arrays.hpp: numpy arrays, torch tensors and all else that speaks DLPack or the
// buffer protocol, as rows of heads. No element is copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane_python {

namespace nb = nanobind;
using kvplane::ErrorCode;
using kvplane::Index;
using kvplane::Matrix;
using kvplane::require;
using kvplane::ScalarType;

/// Where arrays are: the number of a CUDA device, or -1 for the CPU.
inline constexpr int on_cpu = -1;
/// "the CPU" or "'cuda:0'"
std::string place_name(int device);

/// An array that Python holds: its memory, for as long as this lives. Made, copied and destroyed with the
/// GIL.
class Array {
  public:
    /// Throws Error: option for what is no array, for other element types than fp32, fp16 and bf16, for
    /// memory elsewhere than on `device` and, where it is to be written, for memory that cannot be. `name` is
    /// the argument's. Of torch's CUDA tensors attributes alone are read, in a microsecond; DLPack would
    /// record an event.
    Array(nb::handle object, const char* name, bool writable = false, int device = on_cpu);

    Index dimensions() const noexcept { return static_cast<Index>(shape_.size()); }
    Index shape(Index i) const { return shape_[static_cast<std::size_t>(i)]; }
    /// In elements.
    Index stride(Index i) const { return strides_[static_cast<std::size_t>(i)]; }
    ScalarType type() const noexcept { return type_; }
    void* data() const noexcept { return data_; }
    const char* name() const noexcept { return name_; }
    /// "(2, 3, 64)"
    std::string shape_text() const;

  private:
    bool take_torch_tensor(nb::handle object, int device);

    nb::ndarray<nb::ro> read_;
    nb::ndarray<> written_;
    nb::object tensor_;  ///< a CUDA tensor of torch
    void* data_ = nullptr;
    ScalarType type_ = ScalarType::float32;
    std::vector<Index> shape_, strides_;
    const char* name_;
};

/// Keys, values, queries or outputs of some sequences: [batch][head][token][channel] with any strides, in
/// elements.
struct SequenceRows {
    void* data = nullptr;
    ScalarType type = ScalarType::float32;
    Index batch = 1, heads = 1, tokens = 0, channels = 0;
    Index batch_stride = 0, head_stride = 0, token_stride = 0, channel_stride = 1;

    std::size_t bytes_to(Index sequence, Index token) const noexcept {
        return static_cast<std::size_t>(sequence * batch_stride + token * token_stride) *
               kvplane::bytes_of(type);
    }
    /// The first number of a sequence's token.
    std::byte* at(Index sequence, Index token) const noexcept {
        return static_cast<std::byte*>(data) + bytes_to(sequence, token);
    }
    /// The tokens of one sequence from `first` on.
    kvplane::detail::AnyRows of(Index sequence, Index first) const;
    /// One token a sequence, as rows of heads.
    kvplane::detail::AnyRows one_token_each() const;
    /// "batch 2, 3 heads, 5 tokens, 64 channels"
    std::string text() const;
};

/// An array [batch, heads, tokens, channels], or without the first dimension for one sequence. Throws Error
/// (shape) for another number of dimensions.
SequenceRows sequence_rows(const Array& array);

/// An array [tokens, heads * channels] or [heads, tokens, channels] of one sequence; heads: of the former.
/// Throws Error (shape).
kvplane::detail::AnyRows matrix_rows(const Array& array, Index heads);

/// Who frees memory of new float[] that numpy holds.
nb::capsule owner_of(float* memory);

/// body(pointer to the element type of `type`).
template <class Body>
decltype(auto) with_scalar(ScalarType type, void* data, const Body& body) {
    switch (type) {
        case ScalarType::float16:
            return body(static_cast<Eigen::half*>(data));
        case ScalarType::bfloat16:
            return body(static_cast<Eigen::bfloat16*>(data));
        default:
            return body(static_cast<float*>(data));
    }
}

}  // namespace kvplane_python
