#include "arrays.hpp"

#include <array>
#include <utility>

#include "cuda_cache.hpp"

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

bool on_cuda(nb::handle object) {
    return nb::hasattr(object, "is_cuda") && nb::hasattr(object, "data_ptr") &&
           nb::isinstance<nb::bool_>(nb::getattr(object, "is_cuda")) &&
           nb::cast<bool>(nb::getattr(object, "is_cuda"));
}

/// Throws Error (option) for an array of another place.
[[noreturn]] void refuse_place(const char* name, const std::string& found, int device) {
    const bool cuda = found.rfind("cuda", 0) == 0;
    require(!cuda || device != on_cpu || cuda_is_built(), ErrorCode::option, name, ": on device '", found,
            "', ", without_cuda);
    kvplane::fail(ErrorCode::option, name, ": on device '", found, "', expected ", place_name(device),
                  cuda && device == on_cpu ? ", or a cache that is made with device='cuda'" : "");
}
void require_place(nb::handle object, const char* name, int device) {
    if (!nb::hasattr(object, "device") || !nb::hasattr(nb::getattr(object, "device"), "type")) {
        if (device != on_cpu) refuse_place(name, "cpu", device);
        return;
    }
    const nb::object place = nb::getattr(object, "device");
    const std::string type = text_of(nb::getattr(place, "type"));
    if (device == on_cpu ? type != "cpu" : text_of(place) != "cuda:" + std::to_string(device))
        refuse_place(name, device == on_cpu && type != "cuda" ? type : text_of(place), device);
}

/// Says why an object was not taken, where that is known.
[[noreturn]] void refuse_object(nb::handle object, const char* name, bool writable, int device) {
    const bool is_array = nb::hasattr(object, "dtype") && nb::hasattr(object, "shape");
    if (is_array) require_place(object, name, device);
    kvplane::fail(ErrorCode::option, name, ": ", type_text(object), ", expected ",
                  writable ? "a writable array" : "an array", " of float32, float16 or bfloat16 on ",
                  place_name(device));
}

/// torch's element types, once torch is there.
struct TorchTypes {
    PyObject *float32, *float16, *bfloat16;

    static const TorchTypes& get() {
        static const TorchTypes types = [] {
            const nb::module_ torch = nb::module_::import_("torch");
            const auto named = [&](const char* name) { return nb::getattr(torch, name).release().ptr(); };
            return TorchTypes{named("float32"), named("float16"), named("bfloat16")};
        }();
        return types;
    }
};

}  // namespace

std::string place_name(int device) {
    return device == on_cpu ? "the CPU" : "'cuda:" + std::to_string(device) + "'";
}

bool Array::take_torch_tensor(nb::handle object, int device) {
    if (!on_cuda(object)) return false;
    if (nb::cast<int>(object.attr("get_device")()) != device)
        refuse_place(name_, text_of(object.attr("device")), device);
    require(!nb::cast<bool>(object.attr("requires_grad")), ErrorCode::option, name_,
            ": with a gradient, which kvplane does not compute; expected a tensor without, as under "
            "torch.no_grad()");
    const nb::object type = object.attr("dtype");
    const TorchTypes& types = TorchTypes::get();
    if (type.ptr() == types.float16)
        type_ = ScalarType::float16;
    else if (type.ptr() == types.bfloat16)
        type_ = ScalarType::bfloat16;
    else
        require(type.ptr() == types.float32, ErrorCode::option, name_, ": elements of ", text_of(type),
                ", expected float32, float16 or bfloat16");
    for (const nb::handle size : nb::borrow<nb::tuple>(object.attr("shape")))
        shape_.push_back(nb::cast<Index>(size));
    for (const nb::handle stride : nb::borrow<nb::tuple>(object.attr("stride")()))
        strides_.push_back(nb::cast<Index>(stride));
    data_ = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(object.attr("data_ptr")()));
    tensor_ = nb::borrow(object);
    return true;
}

Array::Array(nb::handle object, const char* name, bool writable, int device) : name_(name) {
    if (device != on_cpu) {
        try {
            if (take_torch_tensor(object, device)) return;
        } catch (const nb::python_error&) {  // of another layout
            refuse_object(object, name, writable, device);
        }
    }
    bool bits_of_bfloat16 = false;
    if (device != on_cpu || !on_cuda(object)) {
        if (!(writable ? take(object, written_) : take(object, read_))) {
            // numpy knows the bfloat16 of ml_dtypes, but hands it to nobody; its bits are as good.
            bits_of_bfloat16 = nb::hasattr(object, "view") && type_text(object) == "bfloat16";
            const nb::object bits =
                bits_of_bfloat16 ? nb::getattr(object, "view")("uint16") : nb::borrow(object);
            if (!bits_of_bfloat16 || !(writable ? take(bits, written_) : take(bits, read_)))
                refuse_object(object, name, writable, device);
        }
    } else {
        require_place(object, name, device);
    }
    const auto look = [&](const auto& array) {
        const bool here = device == on_cpu
                              ? array.device_type() == nb::device::cpu::value
                              : array.device_type() == nb::device::cuda::value && array.device_id() == device;
        if (!here) {
            require_place(object, name, device);
            kvplane::fail(ErrorCode::option, name, ": on another device, expected ", place_name(device));
        }
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
