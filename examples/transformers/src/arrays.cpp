#include "arrays.hpp"

#include <array>
#include <utility>

namespace kvplane_python {

namespace {

std::string text_of(nb::handle object) {
    return nb::str(object).c_str();
}

/// "torch.float64" or "float64"; "list" for what has no element type.
std::string type_text(nb::handle object) {
    if (nb::hasattr(object, "dtype")) return text_of(nb::getattr(object, "dtype"));
    return text_of(nb::getattr(object.type(), "__name__"));
}

ScalarType scalar_type_of(nb::dlpack::dtype type, nb::handle object, const char* name) {
    using Code = nb::dlpack::dtype_code;
    const auto is = [&](Code code, int bits) {
        return type.code == static_cast<std::uint8_t>(code) && type.bits == bits && type.lanes == 1;
    };
    if (is(Code::Float, 32)) return ScalarType::float32;
    if (is(Code::Float, 16)) return ScalarType::float16;
    if (is(Code::Bfloat, 16)) return ScalarType::bfloat16;
    kvplane::fail(ErrorCode::option, name, ": elements of ", type_text(object),
                  ", expected float32, float16 or bfloat16");
}

template <class Import>
bool take(nb::handle object, Import& to) noexcept {
    try {
        return nb::try_cast(object, to);
    } catch (...) {
        PyErr_Clear();
        return false;
    }
}

/// Says why an object was not taken, where that is known.
void refuse_object(nb::handle object, const char* name, bool writable) {
    if (nb::hasattr(object, "device") && nb::hasattr(nb::getattr(object, "device"), "type")) {
        const std::string device = text_of(nb::getattr(nb::getattr(object, "device"), "type"));
        require(device == "cpu", ErrorCode::option, name, ": on device '", device, "', expected the CPU");
    }
    kvplane::fail(ErrorCode::option, name, ": ", type_text(object), ", expected ",
                  writable ? "a writable array" : "an array", " of float32, float16 or bfloat16 on the CPU");
}

}  // namespace

Array::Array(nb::handle object, const char* name, bool writable) : name_(name) {
    bool bits_of_bfloat16 = false;
    if (!(writable ? take(object, written_) : take(object, read_))) {
        // numpy knows the bfloat16 of ml_dtypes, but hands it to nobody; its bits are as good.
        bits_of_bfloat16 = nb::hasattr(object, "view") && type_text(object) == "bfloat16";
        const nb::object bits = bits_of_bfloat16 ? nb::getattr(object, "view")("uint16") : nb::borrow(object);
        if (!bits_of_bfloat16 || !(writable ? take(bits, written_) : take(bits, read_)))
            refuse_object(object, name, writable);
    }
    const auto look = [&](const auto& array) {
        require(array.device_type() == nb::device::cpu::value, ErrorCode::option, name,
                ": on another device, expected the CPU");
        data_ = const_cast<void*>(static_cast<const void*>(array.data()));
        type_ = bits_of_bfloat16 ? ScalarType::bfloat16 : scalar_type_of(array.dtype(), object, name);
        for (std::size_t i = 0; i < array.ndim(); ++i) {
            shape_.push_back(static_cast<Index>(array.shape(i)));
            strides_.push_back(static_cast<Index>(array.stride(i)));
        }
    };
    writable ? look(written_) : look(read_);
}

std::string Array::shape_text() const {
    std::string text = "(";
    for (std::size_t i = 0; i < shape_.size(); ++i)
        text.append(i == 0 ? "" : ", ").append(std::to_string(shape_[i]));
    return text.append(shape_.size() == 1 ? ",)" : ")");
}

namespace {

kvplane::detail::AnyRows rows(void* data, ScalarType type, Index heads, Index tokens, Index channels,
                              Index head_stride, Index token_stride, Index channel_stride) {
    const kvplane::HeadRows<float> view(static_cast<const float*>(data), heads, tokens, channels, head_stride,
                                        token_stride, channel_stride);
    kvplane::detail::AnyRows any(view);
    any.type = type;
    return any;
}

}  // namespace

kvplane::detail::AnyRows SequenceRows::of(Index sequence, Index first) const {
    return rows(static_cast<std::byte*>(data) + bytes_to(sequence, first), type, heads, tokens - first,
                channels, head_stride, token_stride, channel_stride);
}
kvplane::detail::AnyRows SequenceRows::one_token_each() const {
    return rows(data, type, heads, batch, channels, head_stride, batch_stride, channel_stride);
}
std::string SequenceRows::text() const {
    return std::string("batch ")
        .append(std::to_string(batch))
        .append(", ")
        .append(std::to_string(heads))
        .append(" heads, ")
        .append(std::to_string(tokens))
        .append(" tokens, ")
        .append(std::to_string(channels))
        .append(" channels");
}

SequenceRows sequence_rows(const Array& array) {
    require(array.dimensions() == 4 || array.dimensions() == 3, ErrorCode::shape, array.name(), ": shape ",
            array.shape_text(),
            ", expected (batch, heads, tokens, channels), or (heads, tokens, channels) of one "
            "sequence");
    SequenceRows r;
    r.data = array.data();
    r.type = array.type();
    const Index more = array.dimensions() - 3;
    if (more) r.batch = array.shape(0), r.batch_stride = array.stride(0);
    r.heads = array.shape(more), r.head_stride = array.stride(more);
    r.tokens = array.shape(more + 1), r.token_stride = array.stride(more + 1);
    r.channels = array.shape(more + 2), r.channel_stride = array.stride(more + 2);
    return r;
}

kvplane::detail::AnyRows matrix_rows(const Array& array, Index heads) {
    if (array.dimensions() == 3)
        return rows(array.data(), array.type(), array.shape(0), array.shape(1), array.shape(2),
                    array.stride(0), array.stride(1), array.stride(2));
    require(array.dimensions() == 2, ErrorCode::shape, array.name(), ": shape ", array.shape_text(),
            ", expected (tokens, channels) or (heads, tokens, channels)");
    kvplane::detail::require_divisible(array.shape(1), heads);
    const Index channels = array.shape(1) / heads;
    return rows(array.data(), array.type(), heads, array.shape(0), channels, channels * array.stride(1),
                array.stride(0), array.stride(1));
}

nb::capsule owner_of(float* memory) {
    return nb::capsule(memory, [](void* p) noexcept { delete[] static_cast<float*>(p); });
}

}  // namespace kvplane_python
