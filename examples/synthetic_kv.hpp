// examples/synthetic_kv.hpp: keys, values and queries that look like a model's, made from a seed.
//
// What real caches have and plain noise lacks: a spectrum that decays along directions that are no channels,
// a few channels many times larger than the rest, large means, rotary embedding, and a first token that all
// later ones attend to and whose value is small. Each can be turned off. Used by examples, tests and benchmarks.
#pragma once

#include <Eigen/QR>
#include <cmath>
#include <cstdint>
#include <random>

#include "kvplane/matrix.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane_examples {

using kvplane::Index;
using kvplane::Matrix;

struct SyntheticOptions {
    Index tokens = 1024;
    Index kv_heads = 2;
    Index query_heads = 8;
    Index head_dim = 128;
    Index queries = 64;  ///< of the last positions
    double key_scale = 4.0;
    double value_scale = 1.0;
    double spectrum_decay = 6.0;  ///< L: variance e^{-L t} along direction t in [0, 1] of the keys
    Index outlier_channels = 2;   ///< per head
    double outlier_scale = 8.0;
    double mean_scale = 1.0;  ///< size of each channel's mean, in standard deviations
    bool sink = true;
    double rope_base = 10000.0;  ///< 0: keys are not rotated by position
    std::uint64_t seed = 1;
};

struct SyntheticLayer {
    Matrix keys_before_rope;  ///< tokens x (kv_heads * head_dim)
    Matrix keys;              ///< the same after rotary embedding
    Matrix values;            ///< tokens x (kv_heads * head_dim)
    Matrix queries;           ///< queries x (query_heads * head_dim), after rotary embedding
};

namespace detail {

class Generator {
  public:
    explicit Generator(std::uint64_t seed) : engine_(seed) {}

    Matrix normal(Index rows, Index cols) {
        Matrix matrix(rows, cols);
        for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = static_cast<float>(normal_(engine_));
        return matrix;
    }
    Matrix rotation(Index size) {
        return Eigen::HouseholderQR<Eigen::MatrixXf>(normal(size, size)).householderQ() *
               Eigen::MatrixXf::Identity(size, size);
    }
    Index channel(Index channels) { return std::uniform_int_distribution<Index>(0, channels - 1)(engine_); }

  private:
    std::mt19937_64 engine_;
    std::normal_distribution<double> normal_;
};

}  // namespace detail

inline SyntheticLayer synthetic_layer(const SyntheticOptions& options) {
    detail::Generator generator(options.seed);
    const Index dim = options.head_dim, group = options.query_heads / options.kv_heads;
    SyntheticLayer layer;
    layer.keys_before_rope.resize(options.tokens, options.kv_heads * dim);
    layer.queries.resize(options.queries, options.query_heads * dim);
    layer.values =
        static_cast<float>(options.value_scale) * generator.normal(options.tokens, options.kv_heads * dim);

    Eigen::VectorXf deviation(dim);
    for (Index i = 0; i < dim; ++i)
        deviation[i] = static_cast<float>(
            std::exp(-0.5 * options.spectrum_decay * static_cast<double>(i) / static_cast<double>(dim)));
    deviation *=
        static_cast<float>(options.key_scale) / std::sqrt(deviation.squaredNorm() / static_cast<float>(dim));

    for (Index h = 0; h < options.kv_heads; ++h) {
        const Matrix basis = generator.rotation(dim);
        Matrix keys = generator.normal(options.tokens, dim) * deviation.asDiagonal() * basis.transpose();
        const Matrix mean =
            static_cast<float>(options.mean_scale * options.key_scale) * generator.normal(1, dim);
        keys.rowwise() += mean.row(0);
        Eigen::VectorXf gain = Eigen::VectorXf::Ones(dim);
        for (Index i = 0; i < options.outlier_channels; ++i)
            gain[generator.channel(dim)] = static_cast<float>(options.outlier_scale);
        keys = keys * gain.asDiagonal();
        if (options.sink && options.tokens > 0) {
            keys.row(0) = 3.0f * keys.row(0);
            layer.values.block(0, h * dim, 1, dim) *= 0.1f;
        }
        layer.keys_before_rope.middleCols(h * dim, dim) = keys;
        // Queries look along the keys' leading directions, weakly where the keys are large.
        for (Index q = 0; q < group; ++q) {
            Matrix queries = generator.normal(options.queries, dim) * basis.transpose();
            queries = queries * gain.cwiseInverse().asDiagonal();
            if (options.sink && options.tokens > 0)
                queries.rowwise() += 2.0f * keys.row(0).cwiseQuotient(gain.cwiseAbs2().transpose()) /
                                     std::max(1.0f, keys.row(0).cwiseQuotient(gain.transpose()).norm());
            layer.queries.middleCols((h * group + q) * dim, dim) = queries;
        }
    }
    layer.keys = layer.keys_before_rope;
    if (options.rope_base > 0.0) {
        kvplane::RopeSettings settings;
        settings.base = options.rope_base;
        const kvplane::RotaryEmbedding rope(dim, settings);
        rope.rotate(layer.keys, 0);
        rope.rotate(layer.queries, options.tokens - options.queries);
    }
    return layer;
}

}  // namespace kvplane_examples
