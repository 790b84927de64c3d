// kvplane/io/impl/safetensors_header.hpp: the header as JSON.
#pragma once

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "kvplane/error.hpp"
#include "kvplane/io/json_text.hpp"
#include "kvplane/io/safetensors_header.hpp"
#include "kvplane/io/safetensors_text.hpp"

namespace kvplane::detail {

inline std::optional<DType> find_dtype(std::string_view name) {
    for (const DTypeFacts& facts : dtypes)
        if (name == facts.name) return facts.dtype;
    return std::nullopt;
}

/// Receives the header's JSON from nlohmann's event parser and fills `tensors` and `metadata`.
///
/// Events rather than a document: duplicate keys are seen, whole numbers are told from others, and nothing
/// nests, because anything deeper than the format is refused where it opens.
class HeaderReader {
  public:
    using json = nlohmann::json;

    HeaderReader(const std::string& source, TensorInfos& tensors, Metadata& metadata)
        : source_(source), tensors_(tensors), metadata_(metadata) {}

    bool null() { refuse_value("null"); }
    bool boolean(bool) { refuse_value("a boolean"); }
    bool number_integer(json::number_integer_t) { refuse_value("a negative number"); }
    bool number_float(json::number_float_t, const std::string& text) {
        refuse_value(concatenated("the number ", printable(text)));
    }
    bool binary(json::binary_t&) { refuse_value("binary data"); }
    bool number_unsigned(json::number_unsigned_t number);
    bool string(std::string& text);
    bool start_object(std::size_t);
    bool key(std::string& text);
    bool end_object();
    bool start_array(std::size_t);
    bool end_array();
    bool parse_error(std::size_t position, const std::string& token, const json::exception& error);

  private:
    /// Where in the header the next value stands.
    enum class Place { outermost, tensors, tensor_field, shape, data_offsets, metadata_value };

    bool tensor_key(std::string& text);
    bool field_key(std::string& text);
    void add_tensor();
    std::string expected() const;
    std::string where() const;

    template <class... Parts>
    [[noreturn]] void refuse(const Parts&... parts) const {
        fail(ErrorCode::format, source_, ": ", where(), parts...);
    }
    [[noreturn]] void refuse_value(const std::string& found) const {
        refuse("found ", found, ", expected ", expected());
    }

    const std::string& source_;
    TensorInfos& tensors_;
    Metadata& metadata_;
    Place place_ = Place::outermost;
    bool metadata_seen_ = false;
    std::string name_;   // the key in the outermost object
    std::string field_;  // the key in the object that the name stands for
    std::optional<DType> dtype_;
    std::optional<std::vector<std::uint64_t>> shape_, data_offsets_;
};

inline std::string HeaderReader::where() const {
    switch (place_) {
        case Place::outermost:
            return "header: ";
        case Place::tensors:
            return concatenated(name_ == metadata_key ? name_ : tensor_named(name_), ": ");
        case Place::metadata_value:
            return concatenated(metadata_key, ": '", printable(field_), "': ");
        default:
            return concatenated(tensor_named(name_), ": ", printable(field_), ": ");
    }
}

inline std::string HeaderReader::expected() const {
    switch (place_) {
        case Place::outermost:
            return "an object of tensors";
        case Place::tensors:
            return name_ == metadata_key ? "an object of strings"
                                         : "an object with dtype, shape, data_offsets";
        case Place::metadata_value:
            return "a string";
        case Place::tensor_field:
            return field_ == "dtype" ? "a string" : "a list of whole numbers";
        default:
            return "a whole number that 64 bits hold";
    }
}

inline bool HeaderReader::number_unsigned(json::number_unsigned_t number) {
    if (place_ == Place::shape)
        shape_->push_back(number);
    else if (place_ == Place::data_offsets && data_offsets_->size() < 2)
        data_offsets_->push_back(number);
    else if (place_ == Place::data_offsets)
        refuse("more than two numbers, expected [begin, end]");
    else
        refuse_value("a number");
    return true;
}

inline bool HeaderReader::string(std::string& text) {
    if (place_ == Place::metadata_value) {
        metadata_.emplace(field_, text);
        return true;
    }
    if (place_ != Place::tensor_field || field_ != "dtype") refuse_value("a string");
    dtype_ = find_dtype(text);
    if (!dtype_)
        refuse("'", printable(text), "' is not supported, expected F32, F16, BF16, F64, I8, U8, I32 or I64");
    return true;
}

inline bool HeaderReader::start_object(std::size_t) {
    if (place_ == Place::outermost) {
        place_ = Place::tensors;
        return true;
    }
    if (place_ != Place::tensors) refuse_value("an object");
    place_ = name_ == metadata_key ? Place::metadata_value : Place::tensor_field;
    field_.clear();
    dtype_.reset();
    shape_.reset();
    data_offsets_.reset();
    return true;
}

inline bool HeaderReader::key(std::string& text) {
    if (place_ == Place::tensors) return tensor_key(text);
    if (place_ == Place::tensor_field) return field_key(text);
    field_ = text;
    if (metadata_.contains(text)) refuse("this key stands twice");
    return true;
}

inline bool HeaderReader::tensor_key(std::string& text) {
    name_ = text;
    if (tensors_.contains(text) || (text == metadata_key && metadata_seen_))
        refuse("this name stands twice in the header");
    metadata_seen_ |= text == metadata_key;
    return true;
}

inline bool HeaderReader::field_key(std::string& text) {
    field_ = text;
    if (text != "dtype" && text != "shape" && text != "data_offsets")
        refuse("not a known field, expected dtype, shape, data_offsets");
    if ((text == "dtype" && dtype_) || (text == "shape" && shape_) ||
        (text == "data_offsets" && data_offsets_))
        refuse("this field stands twice");
    return true;
}

inline bool HeaderReader::end_object() {
    if (place_ == Place::tensor_field) add_tensor();
    place_ = place_ == Place::tensors ? Place::outermost : Place::tensors;
    return true;
}

inline bool HeaderReader::start_array(std::size_t) {
    if (place_ != Place::tensor_field || field_ == "dtype") refuse_value("a list");
    place_ = field_ == "shape" ? Place::shape : Place::data_offsets;
    (place_ == Place::shape ? shape_ : data_offsets_).emplace();
    return true;
}

inline bool HeaderReader::end_array() {
    if (place_ == Place::data_offsets && data_offsets_->size() != 2)
        refuse(data_offsets_->size(), " numbers, expected [begin, end]");
    place_ = Place::tensor_field;
    return true;
}

inline bool HeaderReader::parse_error(std::size_t position, const std::string&,
                                      const json::exception& error) {
    // nlohmann's sentence quotes the offending token, which may be most of the header and no UTF-8.
    std::string_view reason = error.what();
    reason = reason.substr(0, reason.find("; last read"));
    for (const std::string_view lead : {"] ", "syntax error "})
        if (const auto found = reason.find(lead); found != std::string_view::npos)
            reason = reason.substr(found + lead.size());
    fail(ErrorCode::format, source_, ": header is no JSON: ", printable(reason), " (byte ", position,
         " of the header)");
}

/// The checks that need one tensor alone. Place is tensor_field.
inline void HeaderReader::add_tensor() {
    field_ = !dtype_ ? "dtype" : !shape_ ? "shape" : "data_offsets";
    if (!dtype_ || !shape_ || !data_offsets_) refuse("missing");
    const std::uint64_t begin = (*data_offsets_)[0], end = (*data_offsets_)[1];
    if (begin > end) refuse("[", begin, ", ", end, "] ends before it begins");
    if (begin % bytes_of(*dtype_) != 0)
        refuse("begins at ", begin, ", expected a multiple of ", bytes_of(*dtype_), " for ",
               kvplane::name(*dtype_));
    const std::optional<std::size_t> bytes = shape_bytes(*shape_, bytes_of(*dtype_));
    if (!bytes) refuse("shape ", shape_text(*shape_), " overflows");
    if (end - begin != *bytes)
        refuse("[", begin, ", ", end, "] holds ", end - begin, " bytes, expected ", *bytes, " for ",
               kvplane::name(*dtype_), " ", shape_text(*shape_));
    tensors_.emplace(name_, TensorInfo{*dtype_,
                                       {shape_->begin(), shape_->end()},
                                       static_cast<std::size_t>(begin),
                                       static_cast<std::size_t>(end)});
}

/// Cuts the header out of the file.
inline std::string_view header_text(std::span<const std::byte> file, const std::string& source) {
    require(file.size() >= length_field_bytes, ErrorCode::format, source, ": the file has ", file.size(),
            " bytes, expected at least 8 for the length of the header");
    std::uint64_t length;
    std::memcpy(&length, file.data(), length_field_bytes);
    require(length <= longest_header, ErrorCode::format, source, ": the header's length is given as ", length,
            " bytes, expected at most ", longest_header, " (is this a safetensors file?)");
    require(length <= file.size() - length_field_bytes, ErrorCode::format, source,
            ": the header should have ", length, " bytes but the file ends after ",
            file.size() - length_field_bytes, " of them");
    const std::string_view header(reinterpret_cast<const char*>(file.data()) + length_field_bytes,
                                  static_cast<std::size_t>(length));
    require(header.starts_with('{'), ErrorCode::format, source,
            ": header is no JSON: expected '{' as its first byte");
    // nlohmann takes a NUL for the end and would ignore what follows.
    const std::size_t nul = header.find('\0');
    require(nul == std::string_view::npos, ErrorCode::format, source, ": header is no JSON: byte ", nul + 1,
            " of the header is zero");
    return header;
}

/// Tensors must fill the data: no overlap, no hole, nothing behind the file's end or after the last tensor.
inline void require_data_filled(const TensorInfos& tensors, std::size_t data_bytes,
                                const std::string& source) {
    std::vector<const TensorInfos::value_type*> order;
    order.reserve(tensors.size());
    for (const auto& tensor : tensors) order.push_back(&tensor);
    std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
        return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
    });
    std::size_t filled = 0;
    std::string before = "the start of the data";
    for (const auto* tensor : order) {
        const auto& [name, info] = *tensor;
        require(info.end <= data_bytes, ErrorCode::format, source, ": ", tensor_named(name),
                ": data_offsets: [", info.begin, ", ", info.end, "] goes beyond the file, which holds ",
                data_bytes, " bytes of data");
        require(info.begin == filled, ErrorCode::format, source, ": ", tensor_named(name),
                ": begins at byte ", info.begin, " of the data, ",
                info.begin < filled ? "inside of " : "leaving a hole after ", before, "; expected ", filled);
        filled = info.end;
        before = tensor_named(name);
    }
    require(filled == data_bytes, ErrorCode::format, source, ": the file holds ", data_bytes,
            " bytes of data, expected ", filled, " for its tensors");
}

KVPLANE_FUNCTION SafetensorsHeader read_header(std::span<const std::byte> file, const std::string& source) {
    SafetensorsHeader header;
    const std::string_view text = header_text(file, source);
    HeaderReader reader(source, header.tensors, header.metadata);
    nlohmann::json::sax_parse(text.begin(), text.end(), &reader);
    header.data_at = length_field_bytes + text.size();
    require_data_filled(header.tensors, file.size() - header.data_at, source);
    return header;
}

KVPLANE_FUNCTION std::string written_header(const std::vector<NamedTensor>& tensors,
                                            const Metadata& metadata) {
    std::string text = "{";
    const auto begin_member = [&](const std::string& key) {
        if (text.back() != '{') text += ',';
        text.append(json_text(key)).append(":");
    };
    if (!metadata.empty()) {
        begin_member(std::string(metadata_key));
        text += '{';
        for (const auto& [key, value] : metadata) {
            begin_member(key);
            text += json_text(value);
        }
        text += '}';
    }
    for (const NamedTensor& tensor : tensors) {
        begin_member(*tensor.name);
        text.append("{\"dtype\":").append(json_text(kvplane::name(tensor.info.dtype)));
        text.append(",\"shape\":").append(json_text(tensor.info.shape));
        text.append(",\"data_offsets\":").append(json_text(std::vector{tensor.info.begin, tensor.info.end}));
        text += '}';
    }
    text += '}';
    text.resize((text.size() + 7) / 8 * 8, ' ');
    require(text.size() <= longest_header, ErrorCode::option, "safetensors writer: a header of ", text.size(),
            " bytes for ", tensors.size(), " tensors and ", metadata.size(),
            " pairs of metadata, expected at most ", longest_header);
    std::string length(length_field_bytes, '\0');
    const std::uint64_t size = text.size();
    std::memcpy(length.data(), &size, length_field_bytes);
    return length + text;
}

/// A dump that leaves out what is no UTF-8, read back, is the same text or not. (A strict dump would throw,
/// and this must work without exceptions.)
KVPLANE_FUNCTION bool is_utf8(const std::string& text) {
    using json = nlohmann::json;
    const std::string dumped = json(text).dump(-1, ' ', false, json::error_handler_t::ignore);
    const json back = json::parse(dumped, nullptr, false);
    return back.is_string() && back.get_ref<const std::string&>() == text;
}

}  // namespace kvplane::detail
