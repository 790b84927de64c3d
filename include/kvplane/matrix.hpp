// kvplane/matrix.hpp: the Eigen types and views that every part takes.
//
// A matrix of keys, values or queries is tokens x channels, row-major: one row a token. A layer's matrix is
// tokens x (heads * head_dim), channel h * head_dim + c belonging to head h. The same data as a rank-3
// Eigen::Tensor has the dimensions (heads, tokens, channels of one head), in either storage order.
//
// Functions read their inputs through HeadRows: a list of heads, each a tokens x head_dim view with any
// strides. It is made without copying from every dense Eigen matrix, block, map, Tensor and TensorMap whose
// memory can be addressed; an expression (a sum, a cast, a product) is evaluated once.
#pragma once

#include <Eigen/Core>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <unsupported/Eigen/CXX11/Tensor>
#include <utility>

#include "kvplane/compiled.hpp"
#include "kvplane/error.hpp"

namespace kvplane {

#if defined(KVPLANE_COMPILED)
namespace detail {

/// Refers to the library. Where it was compiled with another -mavx2, -mavx512f or -march=native than the
/// program, such that matrices of one cannot be freed by the other, the program does not link.
[[gnu::used]] static bool (*const library_aligns_eigen_matrices)() noexcept =
    &library_aligns_eigen_matrices_to<EIGEN_DEFAULT_ALIGN_BYTES>;

}  // namespace detail
#endif

using Index = Eigen::Index;
static_assert(sizeof(Index) == 8, "kvplane: sizes of files and caches take a 64-bit target");

/// tokens x channels, one row a token.
template <class Scalar>
using RowMajorMatrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Matrix = RowMajorMatrix<float>;
using MatrixD = RowMajorMatrix<double>;

/// A read-only tokens x channels view with any strides.
template <class Scalar>
using MatrixView = Eigen::Map<const RowMajorMatrix<Scalar>, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;

namespace detail {

/// Rows of numbers, `stride` apart.
template <class T>
struct RowView {
    T* data;
    Index stride;
    Index rows;

    T* operator[](Index row) const noexcept { return data + row * stride; }
    /// Without the first `row` rows.
    RowView from(Index row) const noexcept { return {data + row * stride, stride, rows - row}; }
    operator RowView<const T>() const noexcept requires(!std::is_const_v<T>) { return {data, stride, rows}; }
};

}  // namespace detail

/// The element types of keys, values and queries.
template <class Scalar>
concept CacheScalar =
    std::same_as<Scalar, float> || std::same_as<Scalar, Eigen::half> || std::same_as<Scalar, Eigen::bfloat16>;

enum class ScalarType : std::uint8_t { float32, float16, bfloat16 };

template <CacheScalar Scalar>
inline constexpr ScalarType scalar_type = std::same_as<Scalar, float>         ? ScalarType::float32
                                          : std::same_as<Scalar, Eigen::half> ? ScalarType::float16
                                                                              : ScalarType::bfloat16;

constexpr std::size_t bytes_of(ScalarType type) noexcept {
    return type == ScalarType::float32 ? 4 : 2;
}

/// Keys, values or queries of one layer as a list of heads, whatever holds them. It does not own the data
/// unless it was made from an expression; a view must not outlive what it looks at. Strides are in elements.
template <CacheScalar Scalar>
class HeadRows {
  public:
    HeadRows(const Scalar* data, Index heads, Index tokens, Index head_dim, Index head_stride,
             Index token_stride, Index channel_stride)
        : data_(data),
          heads_(heads),
          tokens_(tokens),
          head_dim_(head_dim),
          head_stride_(head_stride),
          token_stride_(token_stride),
          channel_stride_(channel_stride) {}

    /// Takes over an evaluated expression.
    HeadRows(RowMajorMatrix<Scalar>&& owned, Index heads)
        : HeadRows(nullptr, heads, owned.rows(), heads > 0 ? owned.cols() / heads : 0,
                   heads > 0 ? owned.cols() / heads : 0, owned.cols(), 1) {
        owned_ = std::move(owned);
    }

    Index heads() const noexcept { return heads_; }
    Index tokens() const noexcept { return tokens_; }
    Index head_dim() const noexcept { return head_dim_; }
    /// Channels of all heads together.
    Index channels() const noexcept { return heads_ * head_dim_; }
    Index head_stride() const noexcept { return head_stride_; }
    Index token_stride() const noexcept { return token_stride_; }
    Index channel_stride() const noexcept { return channel_stride_; }

    const Scalar* data() const noexcept { return data_ ? data_ : owned_.data(); }
    /// Null where an empty input has no memory.
    const Scalar* at(Index head, Index token, Index channel = 0) const noexcept {
        const Scalar* const first = data();
        return first ? first + head * head_stride_ + token * token_stride_ + channel * channel_stride_
                     : first;
    }
    MatrixView<Scalar> head(Index head) const {
        return {at(head, 0), tokens_, head_dim_, {token_stride_, channel_stride_}};
    }
    /// `count` tokens from `first` on, as a view of the same memory.
    HeadRows middle_tokens(Index first, Index count) const {
        return {at(0, first), heads_, count, head_dim_, head_stride_, token_stride_, channel_stride_};
    }

  private:
    RowMajorMatrix<Scalar> owned_;
    const Scalar* data_;
    Index heads_, tokens_, head_dim_, head_stride_, token_stride_, channel_stride_;
};

namespace detail {

/// HeadRows of any element type: what a call looks like below the templates that users see. It does not own
/// the data.
struct AnyRows {
    const void* data;
    ScalarType type;
    Index heads, tokens, head_dim;
    Index head_stride, token_stride, channel_stride;  ///< in elements

    template <CacheScalar Scalar>
    AnyRows(const HeadRows<Scalar>& rows)
        : data(rows.data()),
          type(scalar_type<Scalar>),
          heads(rows.heads()),
          tokens(rows.tokens()),
          head_dim(rows.head_dim()),
          head_stride(rows.head_stride()),
          token_stride(rows.token_stride()),
          channel_stride(rows.channel_stride()) {}

    Index channels() const noexcept { return heads * head_dim; }
    /// body(HeadRows of the element type).
    template <class Body>
    decltype(auto) visit(const Body& body) const {
        switch (type) {
            case ScalarType::float16:
                return body(as<Eigen::half>());
            case ScalarType::bfloat16:
                return body(as<Eigen::bfloat16>());
            default:
                return body(as<float>());
        }
    }

  private:
    template <class Scalar>
    HeadRows<Scalar> as() const {
        return {static_cast<const Scalar*>(data),
                heads,
                tokens,
                head_dim,
                head_stride,
                token_stride,
                channel_stride};
    }
};

template <class Derived>
inline constexpr bool has_memory = (Eigen::internal::traits<Derived>::Flags & Eigen::DirectAccessBit) != 0;

inline void require_divisible(Index channels, Index heads) {
    require(heads >= 1, ErrorCode::option, "heads: ", heads, ", expected at least 1");
    require(channels % heads == 0, ErrorCode::shape, "a matrix of ", channels,
            " channels does not divide into ", heads, " heads");
}

}  // namespace detail

/// A matrix tokens x (heads * head_dim) as heads. Throws Error (shape) when channels do not divide by heads.
template <class Derived>
requires CacheScalar<typename Derived::Scalar> HeadRows<typename Derived::Scalar> head_rows(
    const Eigen::DenseBase<Derived>& matrix, Index heads = 1) {
    using Scalar = typename Derived::Scalar;
    const Derived& m = matrix.derived();
    detail::require_divisible(m.cols(), heads);
    if constexpr (detail::has_memory<Derived>) {
        const Index row_stride = m.IsRowMajor ? m.outerStride() : m.innerStride();
        const Index col_stride = m.IsRowMajor ? m.innerStride() : m.outerStride();
        const Index head_dim = m.cols() / heads;
        return {m.data(), heads, m.rows(), head_dim, head_dim * col_stride, row_stride, col_stride};
    } else {
        return {RowMajorMatrix<Scalar>(m), heads};
    }
}

namespace detail {

/// Rows of heads that stand side by side.
template <CacheScalar Scalar>
HeadRows<Scalar> rows_of_heads(RowView<const Scalar> rows, Index heads, Index head_dim) {
    return {rows.data, heads, rows.rows, head_dim, head_dim, rows.stride, 1};
}
/// A matrix as rows.
template <class Scalar>
RowView<const Scalar> row_view(const RowMajorMatrix<Scalar>& matrix) {
    return {matrix.data(), matrix.cols(), matrix.rows()};
}

template <class TensorLike>
HeadRows<std::remove_const_t<typename TensorLike::Scalar>> tensor_head_rows(const TensorLike& tensor) {
    const Index heads = tensor.dimension(0), tokens = tensor.dimension(1), channels = tensor.dimension(2);
    if constexpr (static_cast<int>(TensorLike::Layout) == static_cast<int>(Eigen::RowMajor))
        return {tensor.data(), heads, tokens, channels, tokens * channels, channels, 1};
    else
        return {tensor.data(), heads, tokens, channels, 1, heads, heads * tokens};
}

}  // namespace detail

/// A tensor (heads, tokens, channels of one head), row-major or column-major.
template <CacheScalar Scalar, int Options, class IndexType>
HeadRows<Scalar> head_rows(const Eigen::Tensor<Scalar, 3, Options, IndexType>& tensor) {
    return detail::tensor_head_rows(tensor);
}

/// A mapped tensor (heads, tokens, channels of one head), row-major or column-major.
template <class Plain, int Options, template <class> class MakePointer>
requires(Plain::NumDimensions ==
         3) auto head_rows(const Eigen::TensorMap<Plain, Options, MakePointer>& tensor) {
    return detail::tensor_head_rows(tensor);
}

/// Rows of heads as they are, for instance [head][token][channel] with strides of the caller's own.
template <CacheScalar Scalar>
const HeadRows<Scalar>& head_rows(const HeadRows<Scalar>& rows) {
    return rows;
}

/// Any input that head_rows() takes: a matrix or expression with its number of heads, a tensor, or rows of heads.
template <class Input>
auto input_heads(const Input& input, Index heads) {
    if constexpr (std::is_same_v<Input, detail::AnyRows>)
        return input;
    else if constexpr (requires { head_rows(input, heads); })
        return head_rows(input, heads);
    else
        return head_rows(input);
}

/// Any input as a matrix tokens x (heads * channels): matrices of any element type, and rank-3 tensors
/// (heads, tokens, channels).
template <class Scalar, class Input>
RowMajorMatrix<Scalar> to_matrix(const Input& input) {
    if constexpr (std::is_base_of_v<Eigen::DenseBase<Input>, Input>) {
        return input.template cast<Scalar>();
    } else {
        const auto rows = head_rows(input);
        RowMajorMatrix<Scalar> matrix(rows.tokens(), rows.channels());
        for (Index h = 0; h < rows.heads(); ++h)
            matrix.middleCols(h * rows.head_dim(), rows.head_dim()) = rows.head(h).template cast<Scalar>();
        return matrix;
    }
}

}  // namespace kvplane
