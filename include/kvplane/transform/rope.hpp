// kvplane/transform/rope.hpp: rotary embedding (arXiv 2104.09864), its inverse, and the frames of keys.
//
// Channels form pairs. Pair i of a head at position p turns by the angle p f_i. Engines hand over keys that
// are turned already. There are three frames. A key goes from one to another by rotations that depend on
// positions alone, so without loss:
//
//   before_rope   k: as the projection gave it
//   after_rope    R(p) k: what attention multiplies with a query
//   tile          R(p - m0) k, where m0 is the position of the first token of the key's tile. Slow pairs
//                 look as before RoPE. No key is turned at a read, because
//                 q.k' = (R(-m0) q).(R(-m0) k') exactly (T6).
//
// Keys carry their frame in their type (FramedKeys), so that they cannot be mixed. Angles are computed in
// double: at position 8000 an fp32 angle would be off by 5e-4.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kvplane/compiled.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace kvplane {

/// Which channels make a pair: (2i, 2i + 1), as GGUF stores llama models; or (i, i + dims / 2), as most
/// Python implementations do.
enum class RopeLayout : std::uint8_t { interleaved, halves };

constexpr const char* name(RopeLayout layout) noexcept {
    return layout == RopeLayout::interleaved ? "interleaved" : "halves";
}

/// The rotary embedding of a model.
struct RopeSettings {
    RopeLayout layout = RopeLayout::interleaved;
    /// How many channels of a head turn, counted from the first; even. 0: as many as frequencies say, or all.
    Index dims = 0;
    double base = 10000.0;  ///< f_i = base^(-2 i / dims)
    /// [pair] radians per position, for scaled positions (linear, NTK, YaRN, Llama 3). Empty: from base.
    std::vector<double> frequencies = {};

    bool operator==(const RopeSettings&) const = default;
};

enum class KeyFrame : std::uint8_t { before_rope, after_rope, tile };

constexpr const char* name(KeyFrame frame) noexcept {
    switch (frame) {
        case KeyFrame::before_rope:
            return "before_rope";
        case KeyFrame::after_rope:
            return "after_rope";
        case KeyFrame::tile:
            return "tile";
    }
    return "unknown";
}

/// Keys of consecutive tokens in one frame. rows is [tokens, kv_heads * head_dim]. first_position is the
/// position of rows.row(0). In the frame of a tile it is also the position that all rows are turned back by.
template <KeyFrame frame_>
struct FramedKeys {
    static constexpr KeyFrame frame = frame_;
    Matrix rows;
    Index first_position = 0;
};

class RotaryEmbedding {
  public:
    /// Two channels that turn together, or one alone (second = -1), which is left over if an odd number of
    /// channels does not turn. Every channel of a head is in exactly one pair. A pair of frequency 0 does not
    /// turn.
    struct Pair {
        Index first, second;
        double frequency;
    };

    /// For heads of head_dim channels. Throws Error (option) if dims is odd or above head_dim, the base is
    /// not above 0, or the frequencies are not finite or not dims / 2 in number.
    explicit RotaryEmbedding(Index head_dim, const RopeSettings& settings = {});
    /// For a model without rotary embedding: all frames are the same.
    static RotaryEmbedding none(Index head_dim);

    Index head_dim() const noexcept { return head_dim_; }
    const std::vector<Pair>& pairs() const noexcept { return pairs_; }

    /// Turns `rows` [tokens, heads * head_dim] in place; row i stands at position first_position + i. Throws
    /// Error (shape) if the number of columns is not a multiple of head_dim.
    template <class Derived>
    void rotate(Eigen::MatrixBase<Derived>& rows, Index first_position) const {
        turn_rows(rows, first_position, 1, 1.0);
    }
    /// The inverse of rotate().
    template <class Derived>
    void rotate_back(Eigen::MatrixBase<Derived>& rows, Index first_position) const {
        turn_rows(rows, first_position, 1, -1.0);
    }
    /// Turns every row by the same number of positions, forward or back (negative).
    template <class Derived>
    void turn(Eigen::MatrixBase<Derived>& rows, Index positions) const {
        turn_rows(rows, positions, 0, 1.0);
    }

    /// What a number of positions turns each pair by: made once where many rows turn alike.
    struct Turn {
        std::vector<std::array<double, 2>> angles;  ///< [pair] cosine and sine
        std::vector<float> vectors;                 ///< cosines, then sines, as vectors of channels take them
    };
    /// Forward, or back (negative).
    Turn turn_of(Index positions) const;
    /// Turns a row of floats, of as many heads as it holds: the numbers that turn() gives.
    void turn_row(float* row, Index channels, const Turn& turn) const;

    FramedKeys<KeyFrame::after_rope> after(FramedKeys<KeyFrame::before_rope> keys) const;
    FramedKeys<KeyFrame::after_rope> after(FramedKeys<KeyFrame::tile> keys) const;
    FramedKeys<KeyFrame::before_rope> before(FramedKeys<KeyFrame::after_rope> keys) const;
    /// `keys` must be all keys of one tile.
    FramedKeys<KeyFrame::tile> to_tile(FramedKeys<KeyFrame::after_rope> keys) const;
    FramedKeys<KeyFrame::tile> to_tile(FramedKeys<KeyFrame::before_rope> keys) const;

  private:
    RotaryEmbedding() = default;
    /// Lists the channels from `first` on as pairs that do not turn.
    void leave(Index first);
    /// [pair] cosine and sine of the angle that the pair turns by over `positions` positions.
    void angles_at(double positions, std::vector<std::array<double, 2>>& angles) const;
    template <class Scalar>
    static void turn_pair(Scalar& x, Scalar& y, const std::array<double, 2>& angle) {
        const auto cosine = static_cast<Scalar>(angle[0]), sine = static_cast<Scalar>(angle[1]);
        const Scalar turned = x * cosine - y * sine;
        y = x * sine + y * cosine;
        x = turned;
    }
    /// The cosines, then the sines, that go with the channels that turn_row() turns as vectors.
    void vectors_of(const std::vector<std::array<double, 2>>& angles, std::vector<float>& vectors) const;
    /// Turns row i by sign (first + i stride) positions.
    template <class Derived>
    void turn_rows(Eigen::MatrixBase<Derived>& rows, Index first, Index stride, double sign) const;

    Index head_dim_ = 0;
    std::vector<Pair> pairs_;
    RopeLayout layout_ = RopeLayout::interleaved;
    std::size_t turning_ = 0;  ///< leading pairs that stand as the layout says and turn
};

template <class Derived>
void RotaryEmbedding::turn_rows(Eigen::MatrixBase<Derived>& rows, Index first, Index stride,
                                double sign) const {
    using Scalar = typename Derived::Scalar;
    require(rows.cols() % head_dim_ == 0, ErrorCode::shape, "RoPE: rows of ", rows.cols(),
            " channels, expected a multiple of ", head_dim_);
    constexpr bool by_vectors =
        std::is_same_v<Scalar, float> && detail::has_memory<Derived> && Derived::IsRowMajor;
    Turn turn;
    for (Index r = 0; r < rows.rows(); ++r) {
        const bool other = r == 0 || stride != 0;
        if (other) angles_at(sign * static_cast<double>(first + r * stride), turn.angles);
        if constexpr (by_vectors)
            if (rows.derived().innerStride() == 1) {
                if (other) vectors_of(turn.angles, turn.vectors);
                turn_row(rows.derived().data() + r * rows.derived().outerStride(), rows.cols(), turn);
                continue;
            }
        for (Index head = 0; head < rows.cols(); head += head_dim_)
            for (std::size_t i = 0; i < pairs_.size(); ++i)
                if (pairs_[i].frequency != 0.0)
                    turn_pair(rows(r, head + pairs_[i].first), rows(r, head + pairs_[i].second),
                              turn.angles[i]);
    }
}

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/transform/impl/rope.hpp"
#endif
