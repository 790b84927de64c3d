// kvplane/transform/impl/rope.hpp: the functions of transform/rope.hpp.
#pragma once

#include <cmath>
#include <utility>

#include "kvplane/transform/rope.hpp"

namespace kvplane {

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
