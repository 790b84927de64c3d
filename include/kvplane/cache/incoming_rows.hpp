// kvplane/cache/incoming_rows.hpp: tokens on their way into a cache: as floats, in the frame in which they are
// stored, and checked, in one go while a row is in a core's cache.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kvplane/attention/executor.hpp"
#include "kvplane/cache/shape.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"
#include "kvplane/quantize/block.hpp"
#include "kvplane/quantize/kernels.hpp"

namespace kvplane::detail {

/// A token's channels as floats [heads * head_dim]. Returns the largest magnitude, which is not at most fp16_max
/// if a number is NaN, infinite or beyond fp16.
template <CacheScalar Scalar>
float widen_token(Isa isa, const HeadRows<Scalar>& rows, Index token, float* to) {
    if (rows.channel_stride() == 1 && rows.head_stride() == rows.head_dim())
        return widen_checked(isa, rows.at(0, token), rows.channels(), to);
    float largest = 0.0f;
    for (Index h = 0; h < rows.heads(); ++h, to += rows.head_dim()) {
        float magnitude;
        if (rows.channel_stride() == 1) {
            magnitude = widen_checked(isa, rows.at(h, token), rows.head_dim(), to);
        } else {
            for (Index c = 0; c < rows.head_dim(); ++c) to[c] = static_cast<float>(*rows.at(h, token, c));
            magnitude = largest_magnitude(isa, to, rows.head_dim());
        }
        if (largest <= fp16_max && !(magnitude <= largest)) largest = magnitude;
    }
    return largest;
}

/// [token][heads * head_dim] as floats.
inline void widen_rows(const AnyRows& input, Index first, Index count, Matrix& to) {
    to.resize(count, input.channels());
    if (to.size() == 0) return;
    const Isa isa = current_isa();
    input.visit([&](const auto& rows) {
        for (Index t = 0; t < count; ++t) widen_token(isa, rows, first + t, to.data() + t * to.cols());
    });
}

inline const char* name_of(TileSide side) noexcept {
    return side == TileSide::keys ? "keys" : "values";
}

/// Throws Error (not_finite, beyond_fp16), with the position, for what is no fp16 number.
inline void require_fp16(const AnyRows& input, const char* argument) {
    input.visit([&](const auto& rows) { require_storable(rows, argument); });
}
/// That every value can be stored, in the frame in which it is. Throws Error (not_finite, beyond_fp16).
inline void require_magnitudes(const CacheShape& cache, const AnyRows& input, TileSide side) {
    const char* const argument = name_of(side);
    require_fp16(input, argument);
    // Keys that are rotated tile by tile must be storable both ways.
    const bool rotates = cache.may_rotate(side), by_tile = rotates && !cache.rotates(side);
    const float most = cache.largest_magnitude();
    Matrix stored;
    for (Index token = 0; token < input.tokens; ++token) {
        widen_rows(input, token, 1, stored);
        Index channel = 0;
        float magnitude = by_tile ? stored.row(0).cwiseAbs().maxCoeff(&channel) : 0.0f;
        if (magnitude <= most) {
            if (rotates) cache.rotation(side).rotate(stored);
            magnitude = stored.row(0).cwiseAbs().maxCoeff(&channel);
        }
        require(magnitude <= most, ErrorCode::beyond_fp16, "append: ", argument, ": token ", token,
                ", channel ", channel, " has the magnitude ", magnitude,
                " (after rotation, where the recipe rotates); expected at most ", most);
    }
}

/// The tokens of one side, piece by piece.
class IncomingRows {
  public:
    IncomingRows(const CacheShape& cache, const AnyRows& input, TileSide side)
        : cache_(cache),
          input_(input),
          side_(side),
          in_place_(input.type == ScalarType::float32 && !cache.rotates(side) && input.channel_stride == 1 &&
                    (input.head_stride == input.head_dim || input.heads == 1)) {}

    /// Takes the tokens [first, first + count). Returns false where one of them may be such that it cannot be
    /// stored, which require_magnitudes() then says.
    bool take(Index first, Index count, Executor& executor) {
        if (!in_place_) {
            taken_.resize(count, input_.channels());
            rows_ = row_view(taken_);
        }
        const Index items = (count + item_tokens - 1) / item_tokens;
        found_.assign(static_cast<std::size_t>(items), {});
        input_.visit([&](const auto& input) {
            if (in_place_) rows_ = in_place(input.middle_tokens(first, count));
            run_items(executor, items, [&](Index item, Index) {
                const Index begin = item * item_tokens, end = std::min(begin + item_tokens, count);
                Found& found = found_[static_cast<std::size_t>(item)];
                for (Index t = begin; t < end; ++t) take_token(input, first + t, t, found);
            });
        });
        Found all;
        for (const Found& found : found_) {
            all.largest = std::max(all.largest, found.largest);
            all.good &= found.good;
        }
        largest_ = all.largest;
        return all.good;
    }

    /// What was taken, [token][heads * head_dim], until the next is; the input itself where that has the form.
    RowView<const float> rows() const noexcept { return rows_; }
    /// The largest magnitude of it.
    float largest() const noexcept { return largest_; }

  private:
    /// What one body of an executor takes.
    static constexpr Index item_tokens = 8;
    struct Found {
        float largest = 0.0f;
        bool good = true;
    };

    template <class Scalar>
    static RowView<const float> in_place(const HeadRows<Scalar>& input) noexcept {
        if constexpr (std::is_same_v<Scalar, float>)
            return {input.data(), input.token_stride(), input.tokens()};
        else
            return {};
    }
    template <class Scalar>
    void take_token(const HeadRows<Scalar>& input, Index token, Index to, Found& found) {
        float magnitude;
        if (in_place_) {
            magnitude = largest_magnitude(isa_, rows_[to], input.channels());
        } else {
            Eigen::Map<Eigen::RowVectorXf> row(taken_.data() + to * taken_.cols(), taken_.cols());
            magnitude = widen_token(isa_, input, token, row.data());
            found.good &= magnitude <= fp16_max;
            if (cache_.rotates(side_)) {
                cache_.rotation(side_).rotate(row);
                magnitude = largest_magnitude(isa_, row.data(), row.size());
            }
        }
        found.good &= is_storable(magnitude);
        found.largest = std::max(found.largest, magnitude);
    }
    /// Keys that are rotated tile by tile must be storable both ways, and a rotation makes no element larger than
    /// its head's norm.
    bool is_storable(float magnitude) const noexcept {
        return static_cast<double>(magnitude) * cache_.packing_growth(side_) <=
               static_cast<double>(cache_.largest_magnitude());
    }

    const CacheShape& cache_;
    const AnyRows input_;
    const TileSide side_;
    const bool in_place_;
    const Isa isa_ = current_isa();
    Matrix taken_;
    std::vector<Found> found_;
    RowView<const float> rows_{};
    float largest_ = 0.0f;
};

}  // namespace kvplane::detail
