// The header's bytes, pinned: they are those of the reference implementation.
#include "kvplane/io/safetensors_header.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "test_support.hpp"

namespace {

using kvplane::DType;
using kvplane::ErrorCode;
using kvplane::detail::is_utf8;
using kvplane::detail::read_header;
using kvplane::detail::written_header;
using kvplane_test::refusal;

/// The length and the text of a header, which is padded with spaces to a multiple of 8 bytes.
void expect_header(const std::string& header, std::string text) {
    while (text.size() % 8 != 0) text += ' ';
    ASSERT_GE(header.size(), 8U);
    std::uint64_t length;
    std::memcpy(&length, header.data(), 8);
    EXPECT_EQ(length, header.size() - 8);
    EXPECT_EQ(header.substr(8), text);
}

TEST(SafetensorsHeader, BytesArePinned) {
    expect_header(written_header({}, {}), "{}      ");
    const std::string a = "a", quoted = "q\"\\\n\x01/\x7f", greek = "\xce\xb1\xf0\x9f\x98\x80", empty;
    expect_header(
        written_header({{&a, {DType::int64, {2, 0, 3}, 0, 0}},
                        {&quoted, {DType::float64, {}, 0, 8}},
                        {&greek, {DType::bfloat16, {1, 2}, 8, 12}},
                        {&empty, {DType::uint8, {9223372036854775807}, 12, 9223372036854775819U}}},
                       {{"b", ""}, {"a \"1\"", "\t\xc3\xa4"}}),
        "{\"__metadata__\":{\"a \\\"1\\\"\":\"\\t\xc3\xa4\",\"b\":\"\"},"
        "\"a\":{\"dtype\":\"I64\",\"shape\":[2,0,3],\"data_offsets\":[0,0]},"
        "\"q\\\"\\\\\\n\\u0001/\x7f\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[0,8]},"
        "\"\xce\xb1\xf0\x9f\x98\x80\":{\"dtype\":\"BF16\",\"shape\":[1,2],\"data_offsets\":[8,12]},"
        "\"\":{\"dtype\":\"U8\",\"shape\":[9223372036854775807],\"data_offsets\":[12,9223372036854775819]}}");
}

TEST(SafetensorsHeader, ManyTensorsTakeLinearTime) {
    std::vector<std::string> names(50'000);
    std::vector<kvplane::detail::NamedTensor> tensors;
    for (std::size_t i = 0; i < names.size(); ++i) {
        names[i] = "layers." + std::to_string(i);
        tensors.push_back({&names[i], {DType::uint8, {1}, i, i + 1}});
    }
    std::string file = written_header(tensors, {});
    const std::size_t data_at = file.size();
    file.resize(data_at + names.size());
    const auto header = read_header(std::as_bytes(std::span(file)), "memory");
    EXPECT_EQ(header.tensors.size(), names.size());
    EXPECT_EQ(header.data_at, data_at);
    EXPECT_EQ(header.tensors.at("layers.777").begin, 777U);
}

TEST(SafetensorsHeader, IsRefusedBeyondTheLongest) {
    refusal(ErrorCode::option, [] {
        written_header({}, {{"key", std::string(kvplane::detail::longest_header, 'x')}});
    });
}

TEST(SafetensorsHeader, KnowsUtf8) {
    for (const char* good : {"", "a", "\xc3\xa4", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\x7f"})
        EXPECT_TRUE(is_utf8(good)) << good;
    EXPECT_TRUE(is_utf8(std::string("\0", 1)));
    for (const char* bad :
         {"\xff", "\xc3", "a\xe2\x82", "\xc0\x80", "\xed\xa0\x80", "\xf5\x80\x80\x80", "\x80"})
        EXPECT_FALSE(is_utf8(bad)) << bad;
}

}  // namespace
