// kvplane/latent/turn_average.hpp: moments of rotated vectors, averaged over positions, in closed form.
//
// Statistics are of keys and queries before RoPE, but a basis sees rotated vectors. A key is rotated by its
// place in its tile (0 to 127, all equally likely), a query by its distance. The averages of R(t) m and
// R(t) M R(t)^T over t = 0 .. count - 1 need no samples.
#pragma once

#include <cmath>
#include <complex>

#include "kvplane/matrix.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane::detail {

/// Averages over t = 0 .. count - 1 of turned vectors and second moments, R(t) m and R(t) M R(t)^T.
///
/// A pair of channels, taken as a complex number, turns by e^{i t f}. A 2 x 2 block between two pairs is the
/// sum of a part that commutes with rotations and a part that anticommutes. Each part is one complex number,
/// and they turn by e^{i t (f - g)} and e^{i t (f + g)}.
class TurnAverage {
  public:
    TurnAverage(const RotaryEmbedding& rope, Index count) : rope_(rope), count_(static_cast<double>(count)) {}

    Eigen::VectorXd mean(const Eigen::VectorXd& mean) const {
        Eigen::VectorXd turned = mean;
        for (Index head = 0; head < mean.size(); head += rope_.head_dim())
            for (const auto& pair : rope_.pairs()) {
                if (pair.second < 0) continue;
                const std::complex<double> z =
                    phase(pair.frequency) *
                    std::complex<double>(mean[head + pair.first], mean[head + pair.second]);
                turned[head + pair.first] = z.real();
                turned[head + pair.second] = z.imag();
            }
        return turned;
    }

    MatrixD second_moment(const MatrixD& moment) const {
        MatrixD turned = moment;
        const Index dim = rope_.head_dim();
        for (const auto& f : rope_.pairs())
            for (const auto& g : rope_.pairs()) {
                if (f.frequency == 0.0 && g.frequency == 0.0) continue;
                const std::complex<double> minus = phase(f.frequency - g.frequency),
                                           plus = phase(f.frequency + g.frequency);
                for (Index row = 0; row < moment.rows(); row += dim)
                    for (Index col = 0; col < moment.cols(); col += dim)
                        turn_block(moment, row, col, f, g, minus, plus, turned);
            }
        return turned;
    }

  private:
    using Pair = RotaryEmbedding::Pair;

    static void turn_block(const MatrixD& moment, Index row, Index col, const Pair& f, const Pair& g,
                           std::complex<double> minus, std::complex<double> plus, MatrixD& turned) {
        const auto at = [&](Index i, Index j) { return i < 0 || j < 0 ? 0.0 : moment(row + i, col + j); };
        const double a = at(f.first, g.first), b = at(f.first, g.second), c = at(f.second, g.first),
                     d = at(f.second, g.second);
        const std::complex<double> commuting = minus * std::complex<double>(0.5 * (a + d), 0.5 * (c - b));
        const std::complex<double> anti = plus * std::complex<double>(0.5 * (a - d), 0.5 * (c + b));
        const auto set = [&](Index i, Index j, double x) {
            if (i >= 0 && j >= 0) turned(row + i, col + j) = x;
        };
        set(f.first, g.first, commuting.real() + anti.real());
        set(f.second, g.second, commuting.real() - anti.real());
        set(f.second, g.first, anti.imag() + commuting.imag());
        set(f.first, g.second, anti.imag() - commuting.imag());
    }

    /// The mean of e^{i t w}.
    std::complex<double> phase(double w) const {
        const double half = std::sin(0.5 * w);
        if (std::abs(half) < 1e-12) return 1.0;
        const double angle = 0.5 * (count_ - 1.0) * w;  // not std::polar, which takes no negative length
        return std::sin(0.5 * count_ * w) / (count_ * half) *
               std::complex<double>(std::cos(angle), std::sin(angle));
    }

    const RotaryEmbedding& rope_;
    double count_;
};

}  // namespace kvplane::detail
