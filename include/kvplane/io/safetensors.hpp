// kvplane/io/safetensors.hpp: read and write safetensors files (the format: io/safetensors_header.hpp).
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

#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unsupported/Eigen/CXX11/Tensor>
#include <utility>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/io/file.hpp"
#include "kvplane/io/safetensors_header.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

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
    /// The elements, of the dtype that is asked for.
    const void* elements(std::string_view name, DType dtype) const;
    std::pair<Index, Index> matrix_shape(std::string_view name) const;
    void require_elements(std::string_view name, Index rows, Index cols) const;
    void require_rank(std::string_view name, std::size_t rank) const;

    std::string source_;
    std::shared_ptr<const std::byte> owner_;  // the mapping or the aligned copy; null where the caller owns
    const std::byte* data_ = nullptr;         // first byte of the data, divisible by 8
    detail::TensorInfos tensors_;
    detail::Metadata metadata_;
};

/// Takes one piece of a tensor's bytes after another.
using ByteSink = std::function<void(std::span<const std::byte>)>;
/// Gives all bytes of a tensor to a sink, in pieces. Each call gives the same bytes.
using ByteSource = std::function<void(const ByteSink& take)>;

/// Collects tensors and metadata, and writes them as a safetensors file. Tensors are copied, but for those
/// whose bytes are asked for when the file is written.
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

    /// Adds a tensor whose bytes `source` gives each time that the file is written. What `source` refers to
    /// must outlive the writer's last use. Throws Error as add(). to_bytes() and write() throw Error (shape)
    /// where it gives more or fewer bytes than `shape` says.
    void add_streamed(std::string name, std::vector<Index> shape, DType dtype, ByteSource source);

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

    /// The file in memory. Throws Error: option where the header would be longer than the format allows;
    /// shape as add_streamed().
    std::vector<std::byte> to_bytes() const;

    /// Writes the file: under another name in the same folder, synced (see WriteOptions), then renamed to
    /// `path`, so that `path` is at any time either what it was or complete, and untouched where this throws.
    /// A regular file keeps its permissions; a link at `path` is replaced, not followed; anything else there
    /// is refused. See FileReplacement (io/file.hpp). Throws Error: io with the system's reason; option and
    /// shape as to_bytes().
    void write(const std::filesystem::path& path, const WriteOptions& options = {}) const;

  private:
    struct Entry {
        DType dtype;
        std::vector<Index> shape;
        std::size_t size;              ///< in bytes
        std::vector<std::byte> bytes;  ///< empty where there is a source
        ByteSource source;
    };
    using Entries = std::map<std::string, Entry, std::less<>>;

    /// Throws Error for what cannot be added; returns the bytes that the shape makes up.
    std::size_t require_addable(const std::string& name, const std::vector<Index>& shape, DType dtype) const;
    /// All bytes of the file, piece by piece.
    void each_piece(const ByteSink& take) const;
    std::size_t data_bytes() const noexcept;

    std::vector<const Entries::value_type*> file_order() const;
    std::string header(const std::vector<const Entries::value_type*>& order) const;

    Entries entries_;
    detail::Metadata metadata_;
};

// Templates ------------------------------------------------------------------------------------------------

template <TensorScalar Scalar>
Eigen::Map<const RowMajorMatrix<Scalar>> SafetensorsFile::matrix(std::string_view name) const {
    const auto* const data = static_cast<const Scalar*>(elements(name, dtype_of<Scalar>));
    const auto [rows, cols] = matrix_shape(name);
    return {data, rows, cols};
}

template <TensorScalar Scalar>
Eigen::Map<const RowMajorMatrix<Scalar>> SafetensorsFile::matrix(std::string_view name, Index rows,
                                                                 Index cols) const {
    const auto* const data = static_cast<const Scalar*>(elements(name, dtype_of<Scalar>));
    require_elements(name, rows, cols);
    return {data, rows, cols};
}

template <TensorScalar Scalar, int Rank>
Eigen::TensorMap<const Eigen::Tensor<Scalar, Rank, Eigen::RowMajor>> SafetensorsFile::tensor(
    std::string_view name) const {
    const auto* const data = static_cast<const Scalar*>(elements(name, dtype_of<Scalar>));
    require_rank(name, static_cast<std::size_t>(Rank));
    const std::vector<Index>& shape = info(name).shape;
    Eigen::DSizes<Index, Rank> dimensions;
    for (std::size_t i = 0; i < shape.size(); ++i) dimensions[i] = shape[i];
    return {data, dimensions};
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

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/io/impl/safetensors.hpp"
#endif
