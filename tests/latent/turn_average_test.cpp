// Moments of turned rows in closed form, against the average over all turns.
#include "kvplane/latent/turn_average.hpp"

#include <numbers>
#include <string>
#include <vector>

#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::Index;
using kvplane::MatrixD;
using kvplane::RopeLayout;
using kvplane::RopeSettings;
using kvplane::RotaryEmbedding;
using kvplane_test::normal_matrix;
using kvplane_test::Random;

struct Turning {
    std::string name;
    Index head_dim, heads;
    RotaryEmbedding rope;
};
std::vector<Turning> turnings() {
    std::vector<Turning> all;
    for (const RopeLayout layout : {RopeLayout::interleaved, RopeLayout::halves}) {
        const std::string of = name(layout);
        const auto add = [&](const char* what, Index dim, Index heads, RopeSettings settings) {
            settings.layout = layout;
            all.push_back({of + ", " + what, dim, heads, RotaryEmbedding(dim, settings)});
        };
        add("all", 8, 1, {});
        add("three heads", 6, 3, {});
        add("partial", 10, 2, {.dims = 4});
        add("odd", 7, 2, {.dims = 4});
        add("two of three", 3, 2, {.dims = 2});
        add("a still pair", 9, 1, {.dims = 6, .frequencies = {0.9, 0.0, 0.01}});
        add("equal and opposite", 8, 1, {.frequencies = {0.3, 0.3, -0.3, 1e-14}});
        add("whole turns", 6, 1, {.frequencies = {2.0 * std::numbers::pi, std::numbers::pi, 3.0}});
    }
    all.push_back({"none", 5, 2, RotaryEmbedding::none(5)});
    return all;
}

TEST(TurnAverage, IsTheAverageOverTurns) {
    Random random(kvplane_test::seed());
    for (const Turning& test : turnings())
        for (const Index count : {1, 2, 3, 128, 1000}) {
            SCOPED_TRACE(testing::Message() << test.name << ", " << count << " turns");
            const Index channels = test.head_dim * test.heads;
            const MatrixD root = normal_matrix(channels, channels, random).cast<double>();
            const MatrixD moment = root * root.transpose();
            const Eigen::VectorXd mean = normal_matrix(1, channels, random).cast<double>().row(0).transpose();
            MatrixD moments = MatrixD::Zero(channels, channels), means = MatrixD::Zero(1, channels);
            for (Index t = 0; t < count; ++t) {
                MatrixD turned = moment;
                test.rope.turn(turned, t);
                MatrixD both = turned.transpose();
                test.rope.turn(both, t);
                moments += both / static_cast<double>(count);
                MatrixD one = mean.transpose();
                test.rope.turn(one, t);
                means += one / static_cast<double>(count);
            }
            const kvplane::detail::TurnAverage average(test.rope, count);
            EXPECT_LT((average.second_moment(moment) - moments).cwiseAbs().maxCoeff(), 1e-11 * moment.norm());
            EXPECT_LT((average.mean(mean) - means.row(0).transpose()).cwiseAbs().maxCoeff(),
                      1e-11 * mean.norm());
        }
}

}  // namespace
