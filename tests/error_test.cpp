// The sentences of kvplane::Error.
#include "kvplane/error.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <string_view>

namespace kvplane {
namespace {

template <class... Parts>
std::string sentence_of(const Parts&... parts) {
    try {
        fail(ErrorCode::shape, parts...);
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::shape);
        return error.what();
    }
}

template <class... Parts>
std::string streamed(const Parts&... parts) {
    std::ostringstream stream;
    stream << "kvplane: ";
    (stream << ... << parts);
    return stream.str();
}

template <class Number>
class Sentences : public testing::Test {};
using Numbers = testing::Types<bool, short, unsigned short, int, unsigned, long, unsigned long, long long,
                               unsigned long long, float, double>;
TYPED_TEST_SUITE(Sentences, Numbers);

TYPED_TEST(Sentences, HoldNumbersAsStreamsPrintThem) {
    using Limits = std::numeric_limits<TypeParam>;
    for (const double number : {0.0, 1.0, 1.5, 7.0, 1000000.0, 123456.0, 1234567.0, 0.1, 1e-5, 1e-4,
                                2.0 / 3.0, 65504.0, 1e10, 1e100, 1e-300}) {
        if (number > static_cast<double>(Limits::max())) continue;
        const auto value = static_cast<TypeParam>(number);
        EXPECT_EQ(sentence_of("a ", value, ", b"), streamed("a ", value, ", b"));
        if constexpr (Limits::is_signed) {
            EXPECT_EQ(sentence_of(TypeParam(-value)), streamed(TypeParam(-value)));
        }
    }
    for (const TypeParam value : {Limits::max(), Limits::lowest(), Limits::min(), Limits::infinity(),
                                  Limits::quiet_NaN(), Limits::denorm_min(), Limits::epsilon()})
        EXPECT_EQ(sentence_of(value), streamed(value));
}

TEST(Error, HoldsTextOfEveryKind) {
    const std::string string = "string";
    char array[] = "array";
    const char* const pointer = "pointer";
    EXPECT_EQ(sentence_of(string, ' ', array, ' ', pointer, std::string_view(" view")),
              "kvplane: string array pointer view");
    EXPECT_EQ(sentence_of(), "kvplane: ");
}

TEST(Error, BytesAreNumbers) {
    EXPECT_EQ(sentence_of(std::uint8_t{65}, " ", std::int8_t{-3}), "kvplane: 65 -3");
}

TEST(Error, IsThrownOnlyWhereTheConditionFails) {
    EXPECT_NO_THROW(require(true, ErrorCode::option, "never"));
    EXPECT_THROW(require(false, ErrorCode::option, "always"), Error);
}

}  // namespace
}  // namespace kvplane
