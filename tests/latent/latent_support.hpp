// tests/latent/latent_support.hpp: rows with correlated channels, and their moments by definition.
#pragma once

#include "kvplane/matrix.hpp"
#include "test_inputs.hpp"

namespace kvplane_test {

/// Correlated rows with a mean: normal * mixing + mean.
inline kvplane::Matrix correlated(const kvplane::Matrix& normal, const kvplane::Matrix& mixing,
                                  const Eigen::RowVectorXf& mean) {
    kvplane::Matrix rows = normal * mixing;
    rows.rowwise() += mean;
    return rows;
}
inline kvplane::Matrix correlated(kvplane::Index tokens, kvplane::Index channels, Random& random) {
    const kvplane::Matrix mixing =
        kvplane::Matrix::Identity(channels, channels) + 0.4f * normal_matrix(channels, channels, random);
    const Eigen::RowVectorXf mean = 2.0f * normal_matrix(1, channels, random).row(0);
    return correlated(normal_matrix(tokens, channels, random), mixing, mean);
}

struct Moments {
    Eigen::VectorXd mean;
    kvplane::MatrixD covariance;
};
/// In long double, two passes.
inline Moments by_definition(const kvplane::Matrix& rows) {
    using Wide = Eigen::Matrix<long double, Eigen::Dynamic, Eigen::Dynamic>;
    const Wide wide = rows.cast<long double>();
    const Eigen::Matrix<long double, 1, Eigen::Dynamic> mean =
        wide.colwise().sum() / static_cast<long double>(rows.rows());
    const Wide centered = wide.rowwise() - mean;
    return {mean.transpose().cast<double>(),
            (centered.transpose() * centered / static_cast<long double>(rows.rows())).cast<double>()};
}

}  // namespace kvplane_test
