// Planes: the split of every width, and the packing of rows, bit by bit: every width, every code, every
// neighbourhood of a code, every row length from 0 to 40.
#include "kvplane/storage/planes.hpp"

#include <vector>

#include "test_support.hpp"

namespace {

using kvplane::ErrorCode;
using kvplane::Index;
using kvplane::pack_row;
using kvplane::plane_split;
using kvplane::PlaneSplit;
using kvplane::row_bytes;
using kvplane::unpack_row;

using Codes = std::vector<std::uint8_t>;
using Packed = std::vector<std::byte>;

constexpr int plane_widths[] = {1, 2, 4};
constexpr Index longest_row = 40;

/// The table of design.md.
const std::vector<std::pair<int, std::vector<int>>> splits{{1, {1}},       {2, {2}},    {3, {2, 1}},
                                                           {4, {4}},       {5, {4, 1}}, {6, {4, 2}},
                                                           {7, {4, 2, 1}}, {8, {4, 4}}, {16, {8, 4, 4}}};

// -- Splits -----------------------------------------------------------------------------------------------

TEST(PlaneSplit, IsTheTableOfTheDesign) {
    for (const auto& [bits, widths] : splits) {
        const PlaneSplit split = plane_split(bits);
        ASSERT_EQ(split.count, static_cast<int>(widths.size())) << bits;
        EXPECT_EQ(split.bits(), bits);
        EXPECT_EQ(split.is_half(), bits == 16);
        EXPECT_LE(split.count, PlaneSplit::max_planes);
        EXPECT_EQ(split.prefix_bits(0), 0);
        int above = 0;
        for (int p = 0; p < split.count; ++p) {
            EXPECT_EQ(split[p], widths[static_cast<std::size_t>(p)]) << bits;
            above += split[p];
            EXPECT_EQ(split.prefix_bits(p + 1), above) << bits;
            EXPECT_EQ(split.shift(p), bits - above) << bits;
        }
    }
}

TEST(PlaneSplit, RefusesOtherWidths) {
    for (const int bits : {-1, 0, 9, 10, 12, 15, 17, 32}) {
        const std::string sentence = kvplane_test::refusal(ErrorCode::option, [&] { plane_split(bits); });
        EXPECT_NE(sentence.find("bits: " + std::to_string(bits)), std::string::npos) << sentence;
    }
}

TEST(RowBytes, RoundUp) {
    for (const int width : plane_widths)
        for (Index codes = 0; codes <= longest_row; ++codes) {
            const Index bytes = row_bytes(codes, width);
            EXPECT_GE(8 * bytes, codes * width);
            EXPECT_LT(8 * bytes, codes * width + 8);
        }
}

// -- Rows -------------------------------------------------------------------------------------------------

/// A row of `count` bytes that counts up in steps of an odd number: over all 256 starts every byte stands at
/// every place, beside changing neighbours. Whole bytes, so that bits beyond the plane are set too.
Codes row_of_bytes(Index count, int start, int step) {
    Codes codes;
    for (Index i = 0; i < count; ++i)
        codes.push_back(static_cast<std::uint8_t>(start + static_cast<int>(i) * step));
    return codes;
}

/// Bits [i w, (i+1) w) of a row, by the definition.
int packed_code(const Packed& packed, Index i, int width) {
    int code = 0;
    for (int b = 0; b < width; ++b) {
        const Index bit = i * width + b;
        const auto byte = std::to_integer<int>(packed[static_cast<std::size_t>(bit / 8)]);
        code |= (byte >> (bit % 8) & 1) << b;
    }
    return code;
}

constexpr std::byte guard{0xA5};

TEST(PackRow, PutsEveryCodeAtItsPlaceAndNothingElse) {
    for (const int width : plane_widths)
        for (int shift = 0; shift + width <= 8; ++shift)
            for (Index count = 0; count <= longest_row; ++count)
                for (int start = 0; start < 256; ++start) {
                    const Codes codes = row_of_bytes(count, start, 37);
                    const auto bytes = static_cast<std::size_t>(row_bytes(count, width));
                    Packed packed(bytes + 8, guard);
                    pack_row(codes.data(), count, width, shift, packed.data());
                    for (Index i = 0; i < count; ++i)
                        ASSERT_EQ(packed_code(packed, i, width),
                                  codes[static_cast<std::size_t>(i)] >> shift & ((1 << width) - 1))
                            << width << "-bit plane from bit " << shift << ", code " << i << " of " << count;
                    for (Index bit = count * width; bit < 8 * static_cast<Index>(bytes); ++bit)
                        ASSERT_EQ(packed_code(packed, bit, 1), 0) << "the end of a row is not zero";
                    for (std::size_t i = bytes; i < packed.size(); ++i)
                        ASSERT_EQ(packed[i], guard) << "written beyond the row";
                }
}

TEST(UnpackRow, AppendsThePlaneToEveryCode) {
    for (const int width : plane_widths)
        for (const bool first : {true, false})
            for (Index count = 0; count <= longest_row; ++count)
                for (int start = 0; start < 256; ++start) {
                    // Packed bytes of all patterns, their unused end set too: it must not be looked at.
                    Packed packed;
                    for (const std::uint8_t byte : row_of_bytes(row_bytes(count, width), start, 37))
                        packed.push_back(std::byte{byte});
                    const Codes before = row_of_bytes(count, start * 7, 91);
                    Codes codes = before;
                    codes.resize(codes.size() + 8, 0xA5);
                    unpack_row(packed.data(), count, width, first, codes.data());
                    for (Index i = 0; i < count; ++i) {
                        const auto at = static_cast<std::size_t>(i);
                        const int high = first ? 0 : before[at] << width & 0xFF;
                        ASSERT_EQ(codes[at], high | packed_code(packed, i, width))
                            << width << "-bit plane, code " << i << " of " << count;
                    }
                    for (std::size_t i = before.size(); i < codes.size(); ++i)
                        ASSERT_EQ(codes[i], 0xA5) << "written beyond the row";
                }
}

/// Split into planes and put together again, a prefix of the planes is a prefix of the code: every width,
/// every code at every place, every length, every number of planes.
TEST(Planes, OfAPrefixAreThePrefixOfTheCode) {
    for (int bits = 1; bits <= 8; ++bits) {
        const PlaneSplit split = plane_split(bits);
        const int codes_of_width = 1 << bits;
        for (Index count = 0; count <= longest_row; ++count)
            for (int start = 0; start < codes_of_width; ++start) {
                Codes codes = row_of_bytes(count, start, 1);
                for (auto& code : codes) code = static_cast<std::uint8_t>(code % codes_of_width);
                Codes read(codes.size(), 0xEE);
                for (int p = 0; p < split.count; ++p) {
                    Packed packed(static_cast<std::size_t>(row_bytes(count, split[p])), guard);
                    pack_row(codes.data(), count, split[p], split.shift(p), packed.data());
                    unpack_row(packed.data(), count, split[p], p == 0, read.data());
                    for (std::size_t i = 0; i < codes.size(); ++i)
                        ASSERT_EQ(read[i], codes[i] >> (bits - split.prefix_bits(p + 1)))
                            << bits << " bits, " << p + 1 << " planes, code " << i << " of " << count;
                }
            }
    }
}

}  // namespace
