// kvplane/transform/impl/rope.hpp: the functions of transform/rope.hpp.
#pragma once

#include <cmath>
#include <utility>

#include "kvplane/simd/isa.hpp"
#include "kvplane/simd/vector.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane {
namespace detail {

/// x c - y s and x s + y c, channel by channel. Products are rounded before they are added.
template <int Lanes>
KVPLANE_INLINE void turn_halves(float* x, float* y, const float* cosine, const float* sine) {
    simd::Floats<Lanes> a, b, c, s, ac, bs, as, bc;
    simd::load(a, x);
    simd::load(b, y);
    simd::load(c, cosine);
    simd::load(s, sine);
    simd::multiply_rounded<Lanes>(ac, a, c);
    simd::multiply_rounded<Lanes>(bs, b, s);
    simd::multiply_rounded<Lanes>(as, a, s);
    simd::multiply_rounded<Lanes>(bc, b, c);
    simd::store(x, ac - bs);
    simd::store(y, as + bc);
}
/// The same of pairs that stand side by side, with their cosines and sines twice.
template <int Lanes, std::size_t... Lane>
KVPLANE_INLINE void turn_interleaved(float* pairs, const float* cosine, const float* sine,
                                     std::index_sequence<Lane...>) {
    simd::Floats<Lanes> x, c, s, kept, crossed;
    simd::load(x, pairs);
    simd::load(c, cosine);
    simd::load(s, sine);
    const simd::Floats<Lanes> other = __builtin_shufflevector(x, x, (Lane ^ 1)...),
                              sign = {(Lane & 1 ? 1.0f : -1.0f)...};
    simd::multiply_rounded<Lanes>(kept, x, c);
    simd::multiply_rounded<Lanes>(crossed, other, s);
    simd::store(pairs, kept + sign * crossed);
}

}  // namespace detail

KVPLANE_FUNCTION RotaryEmbedding::RotaryEmbedding(Index head_dim, const RopeSettings& settings)
    : head_dim_(head_dim) {
    const Index listed = 2 * static_cast<Index>(settings.frequencies.size());
    const Index dims = settings.dims != 0 ? settings.dims : listed != 0 ? listed : head_dim;
    require(head_dim >= 1 && dims >= 0 && dims <= head_dim && dims % 2 == 0, ErrorCode::option,
            "RoPE: ", dims, " channels of a head of ", head_dim, " turn, expected an even number of them");
    require(std::isfinite(settings.base) && settings.base > 0.0, ErrorCode::option, "RoPE: a base of ",
            settings.base, ", expected a number above 0");
    const auto count = static_cast<std::size_t>(dims / 2);
    require(settings.frequencies.empty() || settings.frequencies.size() == count, ErrorCode::option,
            "RoPE: ", settings.frequencies.size(), " frequencies, expected ", count,
            ", one for each pair of ", dims, " channels");
    for (Index i = 0; i < dims / 2; ++i) {
        const double frequency =
            settings.frequencies.empty()
                ? std::pow(settings.base, -2.0 * static_cast<double>(i) / static_cast<double>(dims))
                : settings.frequencies[static_cast<std::size_t>(i)];
        require(std::isfinite(frequency), ErrorCode::option, "RoPE: the frequency of pair ", i, " is ",
                frequency, ", expected a finite number");
        if (settings.layout == RopeLayout::interleaved)
            pairs_.push_back({2 * i, 2 * i + 1, frequency});
        else
            pairs_.push_back({i, i + dims / 2, frequency});
    }
    layout_ = settings.layout;
    while (turning_ < count && pairs_[turning_].frequency != 0.0) ++turning_;
    leave(dims);
}

KVPLANE_FUNCTION RotaryEmbedding RotaryEmbedding::none(Index head_dim) {
    require(head_dim >= 1, ErrorCode::option, "RoPE: a head of ", head_dim, " channels, expected at least 1");
    RotaryEmbedding still;
    still.head_dim_ = head_dim;
    still.leave(0);
    return still;
}

KVPLANE_FUNCTION void RotaryEmbedding::leave(Index first) {
    for (Index c = first; c < head_dim_; c += 2) pairs_.push_back({c, c + 1 < head_dim_ ? c + 1 : -1, 0.0});
}

KVPLANE_FUNCTION void RotaryEmbedding::angles_at(double positions,
                                                 std::vector<std::array<double, 2>>& angles) const {
    angles.resize(pairs_.size());
    for (std::size_t i = 0; i < pairs_.size(); ++i) {
        const double angle = positions * pairs_[i].frequency;
        angles[i] = {std::cos(angle), std::sin(angle)};
    }
}

KVPLANE_FUNCTION void RotaryEmbedding::vectors_of(const std::vector<std::array<double, 2>>& angles,
                                                  std::vector<float>& vectors) const {
    vectors.clear();
    const int copies = layout_ == RopeLayout::halves ? 1 : 2;
    for (const std::size_t part : {std::size_t{0}, std::size_t{1}})
        for (std::size_t i = 0; i < turning_; ++i)
            vectors.insert(vectors.end(), static_cast<std::size_t>(copies),
                           static_cast<float>(angles[i][part]));
}
KVPLANE_FUNCTION RotaryEmbedding::Turn RotaryEmbedding::turn_of(Index positions) const {
    Turn turn;
    angles_at(static_cast<double>(positions), turn.angles);
    vectors_of(turn.angles, turn.vectors);
    return turn;
}
KVPLANE_FUNCTION void RotaryEmbedding::turn_row(float* row, Index channels, const Turn& turn) const {
    const bool halves = layout_ == RopeLayout::halves;
    const Index apart = halves && turning_ > 0 ? pairs_[0].second : 0, copies = halves ? 1 : 2,
                count = static_cast<Index>(turn.vectors.size()) / 2;
    const float *const cosine = turn.vectors.data(), *const sine = cosine + count;
    const Index dim = head_dim_;
    const Index done = detail::run_on(current_isa(), [=](auto lanes) KVPLANE_BODY {
        const Index whole = count / lanes * lanes;
        for (Index head = 0; head < channels; head += dim)
            for (Index i = 0; i < whole; i += lanes) {
                float* const x = row + head + i;
                if (halves)
                    detail::turn_halves<lanes>(x, x + apart, cosine + i, sine + i);
                else
                    detail::turn_interleaved<lanes>(x, cosine + i, sine + i,
                                                    std::make_index_sequence<lanes>{});
            }
        return whole / copies;
    });
    for (Index head = 0; head < channels; head += dim)
        for (auto i = static_cast<std::size_t>(done); i < pairs_.size(); ++i)
            if (pairs_[i].frequency != 0.0)
                turn_pair(row[head + pairs_[i].first], row[head + pairs_[i].second], turn.angles[i]);
}

KVPLANE_FUNCTION FramedKeys<KeyFrame::after_rope> RotaryEmbedding::after(
    FramedKeys<KeyFrame::before_rope> keys) const {
    rotate(keys.rows, keys.first_position);
    return {std::move(keys.rows), keys.first_position};
}

KVPLANE_FUNCTION FramedKeys<KeyFrame::after_rope> RotaryEmbedding::after(
    FramedKeys<KeyFrame::tile> keys) const {
    turn(keys.rows, keys.first_position);
    return {std::move(keys.rows), keys.first_position};
}

KVPLANE_FUNCTION FramedKeys<KeyFrame::before_rope> RotaryEmbedding::before(
    FramedKeys<KeyFrame::after_rope> keys) const {
    rotate_back(keys.rows, keys.first_position);
    return {std::move(keys.rows), keys.first_position};
}

KVPLANE_FUNCTION FramedKeys<KeyFrame::tile> RotaryEmbedding::to_tile(
    FramedKeys<KeyFrame::after_rope> keys) const {
    turn(keys.rows, -keys.first_position);
    return {std::move(keys.rows), keys.first_position};
}

KVPLANE_FUNCTION FramedKeys<KeyFrame::tile> RotaryEmbedding::to_tile(
    FramedKeys<KeyFrame::before_rope> keys) const {
    rotate(keys.rows, 0);
    return {std::move(keys.rows), keys.first_position};
}

}  // namespace kvplane
