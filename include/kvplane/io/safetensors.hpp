// kvplane/io/safetensors.hpp: read and write safetensors files.
//
// A safetensors file is [header length: 8 bytes, little-endian][header: JSON, padded with spaces][data]. The
// header maps every tensor's name to its dtype, shape and [begin, end) in the data, and "__metadata__" to
// pairs of strings. Tensors are row-major and fill the data without holes.
// https://huggingface.co/docs/safetensors; limits and order as in its reference implementation.
//
//     const auto file = kvplane::SafetensorsFile::open("dump.safetensors");
//     const auto keys = file.matrix<Eigen::half>("layers.0.keys");  // tokens x (heads * head_dim), no copy
//
//     kvplane::SafetensorsWriter writer;
//     writer.add("layers.0.keys", keys, {keys.rows(), 3, 64});
//     writer.write("copy.safetensors");
//
// A reader of files from anywhere: whatever is malformed is refused with a sentence that names the file, the
// tensor and what was expected, and nothing outside the file is ever read. POSIX, little-endian.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

static_assert(std::endian::native == std::endian::little,
              "safetensors data is little-endian and is not converted");

/// The element types that are read and written, in the order in which the reference implementation ranks
/// them; the writer relies on their sizes never falling in this order. Others (BOOL, F8_E4M3, ...) are
/// refused.
enum class DType : std::uint8_t { uint8, int8, float16, bfloat16, int32, float32, float64, int64 };

/// The dtype as the format spells it: "F16", "BF16", "I32", ...
constexpr const char* name(DType dtype) noexcept;

/// Bytes of one element.
constexpr std::size_t bytes_of(DType dtype) noexcept;

/// The C++ types of the elements.
template <class Scalar>
concept TensorScalar = CacheScalar<Scalar> || std::same_as<Scalar, double> ||
    std::same_as<Scalar, std::int8_t> || std::same_as<Scalar, std::uint8_t> ||
    std::same_as<Scalar, std::int32_t> || std::same_as<Scalar, std::int64_t>;

/// The dtype of a C++ type: dtype_of<Eigen::half> is DType::float16.
template <TensorScalar Scalar>
inline constexpr DType dtype_of = std::same_as<Scalar, float>             ? DType::float32
                                  : std::same_as<Scalar, Eigen::half>     ? DType::float16
                                  : std::same_as<Scalar, Eigen::bfloat16> ? DType::bfloat16
                                  : std::same_as<Scalar, double>          ? DType::float64
                                  : std::same_as<Scalar, std::int8_t>     ? DType::int8
                                  : std::same_as<Scalar, std::uint8_t>    ? DType::uint8
                                  : std::same_as<Scalar, std::int32_t>    ? DType::int32
                                                                          : DType::int64;

/// What the header says of one tensor. `begin` and `end` are bytes from the start of the data.
struct TensorInfo {
    DType dtype = DType::float32;
    std::vector<Index> shape;  ///< outermost first; empty for a single number
    std::size_t begin = 0;
    std::size_t end = 0;

    /// Number of elements.
    Index size() const noexcept { return static_cast<Index>((end - begin) / bytes_of(dtype)); }
};

/// A safetensors file that is open for reading.
///
/// open() and from_bytes() check the whole header, so that everything after them can only be refused for what
/// the caller asks: a name that is not there (index), another dtype (mismatch), a shape that does not fit
/// (shape). Two things that the reference implementation lets pass are refused: a tensor that begins at no
/// multiple of its element's size, and a field of a tensor's entry other than dtype, shape, data_offsets.
/// Views point into the mapped file and are valid while this object, one moved or one copied from it
/// lives (copies share the mapping). Another process that shortens the file while it is mapped makes reads of
/// the lost part fail with SIGBUS, as with every mapped file.
class SafetensorsFile {
  public:
    /// Maps a file. The data is not read before it is looked at, unless the file's header length is no
    /// multiple of 8 (old writers): then its data is misaligned for its type and is copied once, here.
    /// Throws Error: io where the system refuses or `path` is no regular file, format where the content is
    /// malformed, out_of_memory.
    static SafetensorsFile open(const std::filesystem::path& path);

    /// Reads a file that is in memory. `bytes` must stay valid and unchanged while the views are used; data
    /// that does not start at an address divisible by 8 is copied once. `source` stands for the file in error
    /// sentences. Throws Error: format, out_of_memory.
    static SafetensorsFile from_bytes(std::span<const std::byte> bytes, std::string source = "memory");

    /// The names of all tensors, in byte order.
    std::vector<std::string> names() const;
    bool contains(std::string_view name) const { return tensors_.contains(name); }

    /// Dtype and shape. Throws Error (index) where there is no such tensor.
    const TensorInfo& info(std::string_view name) const;

    /// The elements as they are stored, aligned to their type. Throws Error (index).
    std::span<const std::byte> bytes(std::string_view name) const;

    /// The pairs of "__metadata__"; empty where the file has none.
    const std::map<std::string, std::string, std::less<>>& metadata() const noexcept { return metadata_; }

    /// A tensor of rank 2 [rows, cols] or rank 3 [tokens, heads, head_dim] as rows x cols or tokens x
    /// (heads * head_dim), without copying. Throws Error: index, mismatch (another dtype), shape (another
    /// rank).
    template <TensorScalar Scalar>
    Eigen::Map<const RowMajorMatrix<Scalar>> matrix(std::string_view name) const;

    /// A tensor of any rank as rows x cols, without copying. Throws Error: index, mismatch (another dtype),
    /// shape (another number of elements).
    template <TensorScalar Scalar>
    Eigen::Map<const RowMajorMatrix<Scalar>> matrix(std::string_view name, Index rows, Index cols) const;

    /// A tensor with its own dimensions, without copying. Throws Error: index, mismatch (another dtype),
    /// shape (another rank).
    template <TensorScalar Scalar, int Rank>
    Eigen::TensorMap<const Eigen::Tensor<Scalar, Rank, Eigen::RowMajor>> tensor(std::string_view name) const;

    /// A F16, BF16, F32 or F64 tensor of rank 2 or 3, flattened as matrix() does and converted to float. A
    /// double that float cannot hold becomes infinite. Throws Error: index, mismatch (integers), shape.
    Matrix to_float_matrix(std::string_view name) const;

  private:
    SafetensorsFile() = default;
    static SafetensorsFile parse(std::span<const std::byte> bytes, std::string source,
                                 std::shared_ptr<const std::byte> owner);
    std::pair<Index, Index> matrix_shape(std::string_view name) const;
    template <TensorScalar Scalar>
    const Scalar* elements(std::string_view name) const;

    std::string source_;
    std::shared_ptr<const std::byte> owner_;  // the mapping or the aligned copy; null where the caller owns
    const std::byte* data_ = nullptr;         // first byte of the data, divisible by 8
    std::map<std::string, TensorInfo, std::less<>> tensors_;
    std::map<std::string, std::string, std::less<>> metadata_;
};

/// Collects tensors (it copies them) and metadata, and writes them as a safetensors file.
///
/// The file depends on what was added, not on the order: tensors stand by dtype, widest first, then by name
/// in byte order, which keeps every tensor aligned without holes; metadata stands by key. The bytes are those
/// of the reference implementation. Every add() checks first and changes nothing where it refuses.
class SafetensorsWriter {
  public:
    /// Adds a tensor of any shape from its elements in row-major order.
    /// Throws Error: shape where `shape` has a negative size or does not make up `bytes`; option where the
    /// name was added before, is "__metadata__" or is no UTF-8.
    void add(std::string name, std::vector<Index> shape, DType dtype, std::span<const std::byte> bytes);

    /// Adds a dense Eigen object or expression: [rows, cols], or [size] where its type is a vector.
    template <class Derived>
    requires TensorScalar<typename Derived::Scalar>
    void add(std::string name, const Eigen::DenseBase<Derived>& matrix);

    /// Adds a dense Eigen object or expression, its coefficients taken row by row, under another shape of the
    /// same number of elements: a matrix tokens x (heads * head_dim) as {tokens, heads, head_dim}.
    template <class Derived>
    requires TensorScalar<typename Derived::Scalar>
    void add(std::string name, const Eigen::DenseBase<Derived>& matrix, std::vector<Index> shape);

    /// Adds an Eigen::Tensor, TensorMap or expression of either storage order under its own dimensions.
    template <class Derived>
    requires TensorScalar<typename Derived::Scalar>
    void add(std::string name, const Eigen::TensorBase<Derived, Eigen::ReadOnlyAccessors>& tensor);

    /// Adds a pair to "__metadata__". Throws Error (option) where the key was added before, or either is no
    /// UTF-8.
    void metadata(std::string key, std::string value);

    /// The file in memory. Throws Error (option) where the header would be longer than the format allows.
    std::vector<std::byte> to_bytes() const;

    /// Writes the file: under another name in the same folder, synced, then renamed to `path`, so that `path`
    /// is at any time either what it was or complete, and untouched where this throws. A link at `path` is
    /// replaced, not followed. Throws Error: io with the system's reason, option as to_bytes().
    void write(const std::filesystem::path& path) const;

  private:
    struct Entry {
        DType dtype;
        std::vector<Index> shape;
        std::vector<std::byte> bytes;
    };
    using Entries = std::map<std::string, Entry, std::less<>>;

    std::vector<const Entries::value_type*> file_order() const;
    std::string header(const std::vector<const Entries::value_type*>& order) const;

    Entries entries_;
    std::map<std::string, std::string, std::less<>> metadata_;
};

// ---------------------------------------------------------------------------------------------------------
// Dtypes

namespace detail {

struct DTypeFacts {
    DType dtype;
    const char* name;
    std::size_t bytes;
};

inline constexpr std::array<DTypeFacts, 8> dtypes{{{DType::uint8, "U8", 1},
                                                   {DType::int8, "I8", 1},
                                                   {DType::float16, "F16", 2},
                                                   {DType::bfloat16, "BF16", 2},
                                                   {DType::int32, "I32", 4},
                                                   {DType::float32, "F32", 4},
                                                   {DType::float64, "F64", 8},
                                                   {DType::int64, "I64", 8}}};

/// The reader finds an entry at its dtype's number; the writer aligns tensors by the order of sizes.
constexpr bool dtypes_in_order() {
    for (std::size_t i = 0; i < dtypes.size(); ++i) {
        if (static_cast<std::size_t>(dtypes[i].dtype) != i) return false;
        if (i > 0 && dtypes[i].bytes < dtypes[i - 1].bytes) return false;
    }
    return true;
}
static_assert(dtypes_in_order());
static_assert(sizeof(Eigen::half) == 2 && sizeof(Eigen::bfloat16) == 2);

inline std::optional<DType> find_dtype(std::string_view name) {
    for (const DTypeFacts& facts : dtypes)
        if (name == facts.name) return facts.dtype;
    return std::nullopt;
}

}  // namespace detail

constexpr const char* name(DType dtype) noexcept {
    return detail::dtypes[static_cast<std::size_t>(dtype)].name;
}

constexpr std::size_t bytes_of(DType dtype) noexcept {
    return detail::dtypes[static_cast<std::size_t>(dtype)].bytes;
}

// ---------------------------------------------------------------------------------------------------------
// Sentences, and arithmetic that cannot overflow

namespace detail {

/// Strings one after another. (Not by operator+: g++ 12 warns of an overlap in `"text" + std::string()` that
/// is not there.)
template <class... Parts>
std::string concatenated(const Parts&... parts) {
    std::string text;
    ((text += parts), ...);
    return text;
}

/// Text from a file as a sentence can show it: one line, and short even where the file says megabytes.
inline std::string printable(std::string_view text) {
    constexpr std::size_t longest = 80;
    std::size_t kept = std::min(text.size(), longest);
    // A cut must not fall into a UTF-8 sequence.
    while (kept < text.size() && kept > 0 && (static_cast<unsigned char>(text[kept]) & 0xC0) == 0x80) --kept;
    std::string shown;
    for (const char c : text.substr(0, kept)) {
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F)
            shown += '?';
        else
            shown += c;
    }
    return kept < text.size() ? shown + "..." : shown;
}

/// "tensor 'layers.0.keys'"
inline std::string tensor_named(std::string_view name) {
    return concatenated("tensor '", printable(name), "'");
}

/// "[1024, 3, 64]"
template <class Size>
std::string shape_text(const std::vector<Size>& shape) {
    constexpr std::size_t most = 8;
    std::string text = "[";
    for (std::size_t i = 0; i < std::min(shape.size(), most); ++i)
        text.append(i > 0 ? ", " : "").append(std::to_string(shape[i]));
    return text.append(shape.size() > most ? ", ...]" : "]");
}

/// Bytes of a tensor, or nothing where they overflow an Index. Sizes other than 0 are multiplied even where
/// one is 0, so that any product of sizes, in any grouping, fits too. A negative size overflows.
template <class Size>
std::optional<std::size_t> shape_bytes(const std::vector<Size>& shape, DType dtype) {
    constexpr auto most = static_cast<std::uint64_t>(std::numeric_limits<Index>::max());
    std::uint64_t product = bytes_of(dtype);
    bool empty = false;
    for (const Size size : shape) {
        const auto factor = static_cast<std::uint64_t>(size);
        if (factor == 0)
            empty = true;
        else if (factor > most / product)
            return std::nullopt;
        else
            product *= factor;
    }
    return empty ? 0 : static_cast<std::size_t>(product);
}

}  // namespace detail

// ---------------------------------------------------------------------------------------------------------
// The header

namespace detail {

/// The longest header that the reference implementation reads, in bytes.
inline constexpr std::uint64_t longest_header = 100'000'000;
inline constexpr std::size_t length_field_bytes = 8;
inline constexpr std::string_view metadata_key = "__metadata__";

using TensorInfos = std::map<std::string, TensorInfo, std::less<>>;
using Metadata = std::map<std::string, std::string, std::less<>>;

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
    const std::optional<std::size_t> bytes = shape_bytes(*shape_, *dtype_);
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

}  // namespace detail

// ---------------------------------------------------------------------------------------------------------
// The operating system

namespace detail {

/// Refuses with the reason that the system gave. `error` is errno, read before anything could change it.
[[noreturn]] inline void fail_io(const std::string& source, const char* action, int error) {
    fail(ErrorCode::io, source, ": ", action, ": ",
         std::error_code(error, std::generic_category()).message());
}

/// An open file that is closed at the end.
class FileDescriptor {
  public:
    explicit FileDescriptor(int descriptor) noexcept : descriptor_(descriptor) {}
    FileDescriptor(const FileDescriptor&) = delete;
    FileDescriptor& operator=(const FileDescriptor&) = delete;
    ~FileDescriptor() { close(); }

    int get() const noexcept { return descriptor_; }
    /// False, with errno, where the system reports a write that failed late.
    bool close() noexcept { return descriptor_ < 0 || ::close(std::exchange(descriptor_, -1)) == 0; }

  private:
    int descriptor_;
};

/// A file in memory, unmapped with its last owner.
struct MappedFile {
    std::shared_ptr<const std::byte> owner;
    std::size_t size;
};

inline MappedFile map_file(const std::string& source) {
    // Without O_NONBLOCK, opening a pipe would wait for its other end instead of being refused.
    const FileDescriptor file(::open(source.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (file.get() < 0) fail_io(source, "cannot open", errno);
    struct stat status {};
    if (::fstat(file.get(), &status) != 0) fail_io(source, "cannot read its size", errno);
    require(S_ISREG(status.st_mode), ErrorCode::io, source, ": not a regular file");
    const auto size = static_cast<std::size_t>(status.st_size);
    if (size == 0) return {nullptr, 0};  // which mmap refuses
    void* const mapping = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (mapping == MAP_FAILED) fail_io(source, "cannot map", errno);
    const auto unmap = [size](const std::byte* data) { ::munmap(const_cast<std::byte*>(data), size); };
    return {std::shared_ptr<const std::byte>(static_cast<const std::byte*>(mapping), unmap), size};
}

/// A copy that is aligned for every dtype.
inline std::shared_ptr<const std::byte> aligned_copy(std::span<const std::byte> bytes,
                                                     const std::string& source) {
    constexpr std::align_val_t alignment{64};
    auto* const copy = static_cast<std::byte*>(::operator new(bytes.size() + 1, alignment, std::nothrow));
    require(copy != nullptr, ErrorCode::out_of_memory, source, ": no memory for a copy of ", bytes.size(),
            " bytes of misaligned data");
    std::shared_ptr<const std::byte> owner(
        copy, [](const std::byte* data) { ::operator delete(const_cast<std::byte*>(data), alignment); });
    if (!bytes.empty()) std::memcpy(copy, bytes.data(), bytes.size());
    return owner;
}

/// A file under a passing name beside `target`, which becomes `target` in commit() and otherwise vanishes.
class TemporaryFile {
  public:
    explicit TemporaryFile(const std::filesystem::path& target)
        : target_(target.string()), file_(create(target)) {
        if (file_.get() < 0) fail_io(target_, "cannot create a file in its folder", errno);
    }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;
    ~TemporaryFile() { remove(); }

    void write(std::span<const std::byte> bytes) {
        while (!bytes.empty()) {
            const ssize_t written = ::write(file_.get(), bytes.data(), bytes.size());
            if (written < 0 && errno != EINTR) refuse("cannot write");
            if (written > 0) bytes = bytes.subspan(static_cast<std::size_t>(written));
        }
    }

    void commit() {
        if (::fsync(file_.get()) != 0) refuse("cannot write");
        if (!file_.close()) refuse("cannot write");
        if (::rename(name_.c_str(), target_.c_str()) != 0) refuse("cannot rename the finished file to this");
        name_.clear();
    }

  private:
    int create(const std::filesystem::path& target) {
        static std::atomic<unsigned> counter{0};
        int descriptor = -1;
        do {
            const unsigned number = counter.fetch_add(1, std::memory_order_relaxed);
            // Not made from the target's name, which may be as long as the system allows.
            const std::string name =
                concatenated(".kvplane-", std::to_string(::getpid()), "-", std::to_string(number), ".tmp");
            name_ = (target.parent_path() / name).string();
            descriptor = ::open(name_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        } while (descriptor < 0 && errno == EEXIST);
        return descriptor;
    }

    [[noreturn]] void refuse(const char* action) {
        const int error = errno;
        remove();  // here and not in the destructor alone, which does not run where fail() aborts
        fail_io(target_, action, error);
    }

    void remove() noexcept {
        if (!name_.empty()) ::unlink(name_.c_str());
        name_.clear();
    }

    std::string target_;
    std::string name_;
    FileDescriptor file_;
};

}  // namespace detail

// ---------------------------------------------------------------------------------------------------------
// Reading

inline SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
    std::string source = path.string();
    const detail::MappedFile file = detail::map_file(source);
    return parse({file.owner.get(), file.size}, std::move(source), file.owner);
}

inline SafetensorsFile SafetensorsFile::from_bytes(std::span<const std::byte> bytes, std::string source) {
    return parse(bytes, std::move(source), nullptr);
}

inline SafetensorsFile SafetensorsFile::parse(std::span<const std::byte> bytes, std::string source,
                                              std::shared_ptr<const std::byte> owner) {
    SafetensorsFile file;
    file.source_ = std::move(source);
    const std::string_view header = detail::header_text(bytes, file.source_);
    detail::HeaderReader reader(file.source_, file.tensors_, file.metadata_);
    nlohmann::json::sax_parse(header.begin(), header.end(), &reader);
    const auto data = bytes.subspan(detail::length_field_bytes + header.size());
    detail::require_data_filled(file.tensors_, data.size(), file.source_);
    const bool aligned = reinterpret_cast<std::uintptr_t>(data.data()) % 8 == 0;
    file.owner_ = aligned ? std::move(owner) : detail::aligned_copy(data, file.source_);
    file.data_ = aligned ? data.data() : file.owner_.get();
    return file;
}

inline std::vector<std::string> SafetensorsFile::names() const {
    std::vector<std::string> names;
    names.reserve(tensors_.size());
    for (const auto& tensor : tensors_) names.push_back(tensor.first);
    return names;
}

inline const TensorInfo& SafetensorsFile::info(std::string_view name) const {
    const auto found = tensors_.find(name);
    if (found != tensors_.end()) return found->second;
    std::string present;
    for (const auto& tensor : tensors_) {
        if (present.size() > 200) {
            present += ", ...";
            break;
        }
        present.append(present.empty() ? "" : ", ").append(detail::printable(tensor.first));
    }
    fail(ErrorCode::index, source_, ": no ", detail::tensor_named(name), " among ", tensors_.size(),
         " tensors (", present, ")");
}

inline std::span<const std::byte> SafetensorsFile::bytes(std::string_view name) const {
    const TensorInfo& tensor = info(name);
    return {data_ + tensor.begin, tensor.end - tensor.begin};
}

template <TensorScalar Scalar>
const Scalar* SafetensorsFile::elements(std::string_view name) const {
    const TensorInfo& tensor = info(name);
    require(tensor.dtype == dtype_of<Scalar>, ErrorCode::mismatch, source_, ": ", detail::tensor_named(name),
            " holds ", kvplane::name(tensor.dtype), ", expected ", kvplane::name(dtype_of<Scalar>));
    return reinterpret_cast<const Scalar*>(data_ + tensor.begin);
}

inline std::pair<Index, Index> SafetensorsFile::matrix_shape(std::string_view name) const {
    const std::vector<Index>& shape = info(name).shape;
    require(shape.size() == 2 || shape.size() == 3, ErrorCode::shape, source_, ": ",
            detail::tensor_named(name), " has the shape ", detail::shape_text(shape),
            ", expected [rows, cols] or [tokens, heads, head_dim]");
    return {shape[0], shape.size() == 2 ? shape[1] : shape[1] * shape[2]};
}

template <TensorScalar Scalar>
Eigen::Map<const RowMajorMatrix<Scalar>> SafetensorsFile::matrix(std::string_view name) const {
    const Scalar* const data = elements<Scalar>(name);
    const auto [rows, cols] = matrix_shape(name);
    return {data, rows, cols};
}

template <TensorScalar Scalar>
Eigen::Map<const RowMajorMatrix<Scalar>> SafetensorsFile::matrix(std::string_view name, Index rows,
                                                                 Index cols) const {
    const Scalar* const data = elements<Scalar>(name);
    const std::optional<std::size_t> wanted =
        detail::shape_bytes(std::vector<Index>{rows, cols}, dtype_of<Scalar>);
    require(wanted == bytes(name).size(), ErrorCode::shape, source_, ": ", detail::tensor_named(name),
            " has the shape ", detail::shape_text(info(name).shape), ", which is not ", rows, " x ", cols,
            " elements");
    return {data, rows, cols};
}

template <TensorScalar Scalar, int Rank>
Eigen::TensorMap<const Eigen::Tensor<Scalar, Rank, Eigen::RowMajor>> SafetensorsFile::tensor(
    std::string_view name) const {
    const Scalar* const data = elements<Scalar>(name);
    const std::vector<Index>& shape = info(name).shape;
    require(shape.size() == static_cast<std::size_t>(Rank), ErrorCode::shape, source_, ": ",
            detail::tensor_named(name), " has the shape ", detail::shape_text(shape), ", expected rank ",
            Rank);
    Eigen::DSizes<Index, Rank> dimensions;
    for (std::size_t i = 0; i < shape.size(); ++i) dimensions[i] = shape[i];
    return {data, dimensions};
}

inline Matrix SafetensorsFile::to_float_matrix(std::string_view name) const {
    switch (info(name).dtype) {
        case DType::float32:
            return matrix<float>(name);
        case DType::float16:
            return matrix<Eigen::half>(name).cast<float>();
        case DType::bfloat16:
            return matrix<Eigen::bfloat16>(name).cast<float>();
        case DType::float64:
            return matrix<double>(name).cast<float>();
        default:
            fail(ErrorCode::mismatch, source_, ": ", detail::tensor_named(name), " holds ",
                 kvplane::name(info(name).dtype), ", expected F32, F16, BF16 or F64");
    }
}

// ---------------------------------------------------------------------------------------------------------
// Writing

namespace detail {

/// Text as a JSON string, or nothing where it is no UTF-8: then the dump drops bytes, and reading it back
/// shows that. (A strict dump would throw, and this must work without exceptions.)
inline std::optional<std::string> json_string(const std::string& text) {
    using json = nlohmann::json;
    std::string dumped = json(text).dump(-1, ' ', false, json::error_handler_t::ignore);
    const json back = json::parse(dumped, nullptr, false);
    if (!back.is_string() || back.get_ref<const std::string&>() != text) return std::nullopt;
    return dumped;
}

inline std::string joined(const std::vector<std::string>& parts) {
    std::string text;
    for (const std::string& part : parts) text.append(text.empty() ? "" : ",").append(part);
    return text;
}

/// What the header says of a tensor behind its name.
inline std::string json_fields(DType dtype, const std::vector<Index>& shape, std::size_t begin,
                               std::size_t end) {
    std::vector<std::string> sizes;
    for (const Index size : shape) sizes.push_back(std::to_string(size));
    return concatenated(":{\"dtype\":\"", kvplane::name(dtype), "\",\"shape\":[", joined(sizes),
                        "],\"data_offsets\":[", std::to_string(begin), ",", std::to_string(end), "]}");
}

}  // namespace detail

inline void SafetensorsWriter::add(std::string name, std::vector<Index> shape, DType dtype,
                                   std::span<const std::byte> bytes) {
    const std::string subject = detail::concatenated("safetensors writer: ", detail::tensor_named(name));
    require(name != detail::metadata_key, ErrorCode::option, subject, ": this name is reserved");
    require(detail::json_string(name).has_value(), ErrorCode::option, subject, ": the name is no UTF-8");
    require(!entries_.contains(name), ErrorCode::option, subject, ": this name was added before");
    require(std::all_of(shape.begin(), shape.end(), [](Index size) { return size >= 0; }), ErrorCode::shape,
            subject, ": shape ", detail::shape_text(shape), ", expected sizes of 0 or more");
    const std::optional<std::size_t> expected = detail::shape_bytes(shape, dtype);
    require(expected.has_value(), ErrorCode::shape, subject, ": shape ", detail::shape_text(shape),
            " overflows");
    require(*expected == bytes.size(), ErrorCode::shape, subject, ": ", bytes.size(), " bytes, expected ",
            *expected, " for ", kvplane::name(dtype), " ", detail::shape_text(shape));
    entries_.emplace(std::move(name), Entry{dtype, std::move(shape), {bytes.begin(), bytes.end()}});
}

template <class Derived>
requires TensorScalar<typename Derived::Scalar>
void SafetensorsWriter::add(std::string name, const Eigen::DenseBase<Derived>& matrix,
                            std::vector<Index> shape) {
    using Scalar = typename Derived::Scalar;
    const RowMajorMatrix<Scalar> rows = matrix.derived().matrix();
    const std::span<const Scalar> elements(rows.data(), static_cast<std::size_t>(rows.size()));
    add(std::move(name), std::move(shape), dtype_of<Scalar>, std::as_bytes(elements));
}

template <class Derived>
requires TensorScalar<typename Derived::Scalar>
void SafetensorsWriter::add(std::string name, const Eigen::DenseBase<Derived>& matrix) {
    std::vector<Index> shape{matrix.rows(), matrix.cols()};
    if constexpr (Derived::IsVectorAtCompileTime) shape = {matrix.size()};
    add(std::move(name), matrix, std::move(shape));
}

template <class Derived>
requires TensorScalar<typename Derived::Scalar>
void SafetensorsWriter::add(std::string name,
                            const Eigen::TensorBase<Derived, Eigen::ReadOnlyAccessors>& tensor) {
    using Scalar = typename Derived::Scalar;
    using Traits = Eigen::internal::traits<Derived>;
    constexpr int rank = Traits::NumDimensions;
    const auto& expression = static_cast<const Derived&>(tensor);
    Eigen::Tensor<Scalar, rank, Eigen::RowMajor> rows;
    if constexpr (static_cast<int>(Traits::Layout) == static_cast<int>(Eigen::RowMajor)) {
        rows = expression;
    } else if constexpr (rank < 2) {
        rows = expression.swap_layout();  // Eigen 3.4's shuffle cannot take rank 0
    } else {
        // swap_layout() reverses the dimensions; the shuffle puts them back.
        Eigen::array<int, static_cast<std::size_t>(rank)> reversed;
        for (int i = 0; i < rank; ++i) reversed[static_cast<std::size_t>(i)] = rank - 1 - i;
        rows = expression.swap_layout().shuffle(reversed);
    }
    const std::span<const Scalar> elements(rows.data(), static_cast<std::size_t>(rows.size()));
    add(std::move(name), {rows.dimensions().begin(), rows.dimensions().end()}, dtype_of<Scalar>,
        std::as_bytes(elements));
}

inline void SafetensorsWriter::metadata(std::string key, std::string value) {
    const std::string subject =
        detail::concatenated("safetensors writer: metadata '", detail::printable(key), "'");
    require(detail::json_string(key).has_value(), ErrorCode::option, subject, ": the key is no UTF-8");
    require(detail::json_string(value).has_value(), ErrorCode::option, subject, ": the value is no UTF-8");
    require(!metadata_.contains(key), ErrorCode::option, subject, ": this key was added before");
    metadata_.emplace(std::move(key), std::move(value));
}

inline std::vector<const SafetensorsWriter::Entries::value_type*> SafetensorsWriter::file_order() const {
    std::vector<const Entries::value_type*> order;
    order.reserve(entries_.size());
    for (const auto& entry : entries_) order.push_back(&entry);
    std::stable_sort(order.begin(), order.end(),
                     [](const auto* a, const auto* b) { return a->second.dtype > b->second.dtype; });
    return order;
}

/// The length field and the padded header: all of the file before the data.
inline std::string SafetensorsWriter::header(const std::vector<const Entries::value_type*>& order) const {
    std::vector<std::string> pairs, members;
    for (const auto& [key, value] : metadata_)
        pairs.push_back(detail::concatenated(*detail::json_string(key), ":", *detail::json_string(value)));
    if (!pairs.empty())
        members.push_back(detail::concatenated("\"__metadata__\":{", detail::joined(pairs), "}"));
    std::size_t begin = 0;
    for (const auto* entry : order) {
        const auto& [name, tensor] = *entry;
        const std::size_t end = begin + tensor.bytes.size();
        members.push_back(*detail::json_string(name) +
                          detail::json_fields(tensor.dtype, tensor.shape, begin, end));
        begin = end;
    }
    std::string text = detail::concatenated("{", detail::joined(members), "}");
    text.resize((text.size() + 7) / 8 * 8, ' ');
    require(text.size() <= detail::longest_header, ErrorCode::option, "safetensors writer: a header of ",
            text.size(), " bytes for ", entries_.size(), " tensors and ", metadata_.size(),
            " pairs of metadata, expected at most ", detail::longest_header);
    std::string length(detail::length_field_bytes, '\0');
    const std::uint64_t size = text.size();
    std::memcpy(length.data(), &size, detail::length_field_bytes);
    return length + text;
}

inline std::vector<std::byte> SafetensorsWriter::to_bytes() const {
    const auto order = file_order();
    const std::string start = header(order);
    const auto start_bytes = std::as_bytes(std::span(start));
    std::vector<std::byte> file(start_bytes.begin(), start_bytes.end());
    for (const auto* entry : order)
        file.insert(file.end(), entry->second.bytes.begin(), entry->second.bytes.end());
    return file;
}

inline void SafetensorsWriter::write(const std::filesystem::path& path) const {
    const auto order = file_order();
    const std::string start = header(order);
    detail::TemporaryFile file(path);
    file.write(std::as_bytes(std::span(start)));
    for (const auto* entry : order) file.write(entry->second.bytes);
    file.commit();
}

}  // namespace kvplane
