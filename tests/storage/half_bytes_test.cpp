// Rows of numbers as the two bytes of fp16: those of Eigen's conversion, on every instruction set, for every
// length of the tail; what fp16 cannot hold is seen wherever it stands.
#include "kvplane/storage/half_bytes.hpp"

#include <limits>
#include <vector>

#include "flushed_subnormals.hpp"
#include "kvplane/matrix.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

using kvplane::Index;
using kvplane::Isa;
using kvplane_test::for_each_isa;

struct Bytes {
    explicit Bytes(std::size_t count)
        : high(count + 1, 0xEE), low(count + 1, 0xEE), largest(count + 1, 0x0400) {}

    std::vector<std::uint8_t> high, low;
    std::vector<std::uint16_t> largest;
};

template <class Scalar>
bool split(Isa isa, const std::vector<Scalar>& row, Bytes& to) {
    return kvplane::detail::split_halves(isa, row.data(), static_cast<Index>(row.size()), to.high.data(),
                                         to.low.data(), to.largest.data());
}

template <class Scalar>
void expect_bytes_of(const std::vector<Scalar>& row) {
    for_each_isa([&](Isa isa) {
        const std::size_t count = row.size();
        Bytes found(count);
        ASSERT_TRUE(split(isa, row, found));
        for (std::size_t i = 0; i < count; ++i) {
            const std::uint16_t bits = Eigen::half(static_cast<float>(row[i])).x;
            ASSERT_EQ(found.high[i] << 8 | found.low[i], bits) << "number " << i << " of " << count;
            ASSERT_EQ(found.largest[i], std::max<int>(0x0400, bits & 0x7FFF)) << i << " of " << count;
        }
        // Nothing behind the row.
        EXPECT_EQ(found.high[count], 0xEE);
        EXPECT_EQ(found.low[count], 0xEE);
        EXPECT_EQ(found.largest[count], 0x0400);
    });
}

TEST(HalfBytes, OfEveryFp16Number) {
    std::vector<Eigen::half> all;
    for (int i = 0; i < 65536; ++i)
        if ((i & 0x7FFF) <= 0x7BFF)
            all.push_back(Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(i)));
    expect_bytes_of(all);
}

TEST(HalfBytes, OfRowsOfAnyLengthAndType) {
    kvplane_test::Random random(kvplane_test::seed());
    for (std::size_t count = 0; count <= 70; ++count) {
        const kvplane::Matrix values = kvplane_test::normal_matrix(1, static_cast<Index>(count), random);
        std::vector<float> row(values.data(), values.data() + count);
        if (count > 3) row[count / 2] = -65504.0f, row[count - 1] = 1e-40f, row[0] = -0.0f;
        expect_bytes_of(row);
        std::vector<Eigen::bfloat16> brain;
        for (const float x : row) brain.push_back(Eigen::bfloat16(0.25f * x));
        expect_bytes_of(brain);
    }
}

template <class Scalar>
void expect_seen(Scalar bad) {
    for (std::size_t at = 0; at < 37; ++at)
        for_each_isa([&](Isa isa) {
            std::vector<Scalar> row(37, Scalar(1.5f));
            row[at] = bad;
            Bytes to(row.size());
            EXPECT_FALSE(split(isa, row, to)) << static_cast<float>(bad) << " at " << at;
        });
}

TEST(HalfBytes, SeesWhatFp16CannotHold) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    for (const float bad :
         {65505.0f, -65505.0f, infinity, -infinity, std::numeric_limits<float>::quiet_NaN()})
        expect_seen(bad);
    for (const float bad : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
        expect_seen(Eigen::half(bad));
        expect_seen(Eigen::bfloat16(bad));
    }
    expect_seen(Eigen::bfloat16(70000.0f));
}

}  // namespace
