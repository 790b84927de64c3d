// The passes of the shaped encoding on every instruction set, against sums that are added up anew for each code.
#include "kvplane/quantize/shaped_kernels.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kvplane/simd/line_vector.hpp"
#include "kvplane/simd/transpose.hpp"
#include "test_inputs.hpp"
#include "test_support.hpp"

namespace {

namespace shaped = kvplane::detail::shaped;
using kvplane::Index;
using kvplane::Isa;
using kvplane::detail::LineVector;
using kvplane_test::for_each_isa;
using kvplane_test::Random;
using CodeBytes = std::vector<std::uint8_t>;

constexpr std::size_t at(Index place) {
    return static_cast<std::size_t>(place);
}

/// Rows of weights as round_row() makes them, at random.
struct Weights {
    Weights(Random& random, Index places)
        : stride(shaped::padded(places)),
          weights(at(places * stride)),
          shifts(at(2 * places)),
          columns(at(places / 2 * stride)) {
        for (Index j = 0; j < places; ++j) {
            Index room = 32767 - shaped::max_channels / 2;
            for (Index i = 0; i < places; ++i) {
                if (i == j || room == 0 || random() % 3 == 0) continue;
                const Index most = std::min<Index>(room, random() % 8 == 0 ? 20000 : 2000),
                            weight = static_cast<Index>(random() % static_cast<std::uint64_t>(most + 1));
                room -= weight;
                weights[at(j * stride + i)] = static_cast<std::int16_t>(random() % 2 ? weight : -weight);
            }
            const bool fine = random() % 4 != 0;
            shifts[at(2 * j)] = fine ? 6 + static_cast<std::int32_t>(random() % 6) : 0;
            shifts[at(2 * j + 1)] = fine ? 0 : static_cast<std::int32_t>(random() % 4);
        }
        kvplane::detail::run_on(Isa::scalar, [&](auto) KVPLANE_BODY {
            kvplane::detail::simd::transpose_words(weights.data(), stride / 2, places, places / 2,
                                                   columns.data(), stride);
        });
    }
    shaped::Feedback feedback() { return {weights.data(), shifts.data(), stride, columns.data()}; }

    Index stride;
    LineVector<std::int16_t> weights;
    LineVector<std::int32_t> shifts, columns;
};

/// One pass over one token: the errors [place] and codes that it leaves.
void plain_pass(const Weights& of, Index places, int bits, const std::int32_t* positions, bool before,
                std::vector<std::int64_t>& errors, CodeBytes& codes) {
    const int fine = shaped::position_bits(bits);
    for (Index j = 0; j < places; ++j) {
        std::int64_t sum = 0;
        for (Index i = 0; i < (before ? j : places); ++i)
            sum += of.weights[at(j * of.stride + i)] * errors[at(i)];
        const int to_sum = of.shifts[at(2 * j)], to_position = of.shifts[at(2 * j + 1)];
        const std::int64_t position = positions[j * shaped::tile],
                           cell = ((position >> to_position) - (sum >> to_sum)) >> (fine - to_position),
                           code = std::clamp<std::int64_t>(cell, 0, (1 << bits) - 1),
                           middle = (1 << (fine - 1)) + (1 << (shaped::finer_bits - 1)),
                           error = ((code << fine) + middle - position) >> shaped::finer_bits;
        codes[at(j)] = static_cast<std::uint8_t>(code);
        errors[at(j)] = std::clamp<std::int64_t>(error, -32767, 32767);
    }
}

TEST(ShapedKernels, KeptSumsAreThoseThatAreAddedUpAnew) {
    Random random(kvplane_test::seed());
    int changed_late = 0;
    for (int round = 0; round < 40; ++round) {
        const Index places = shaped::block * (1 + static_cast<Index>(random() % 20)),
                    tokens = 1 + static_cast<Index>(random() % shaped::tile);
        const int bits = 1 + static_cast<int>(random() % 8), passes = static_cast<int>(random() % 5);
        Weights back(random, places), down(random, places);
        LineVector<std::int32_t> positions(at(places * shaped::tile));
        const int fine = shaped::position_bits(bits);
        for (std::int32_t& position : positions) {
            const auto cells = static_cast<std::int32_t>(random() % (3u << bits)) - (1 << bits);
            position = (cells << fine) + static_cast<std::int32_t>(random() % (1u << fine) | 1u);
        }
        std::vector<CodeBytes> expected, but_one;
        for (Index t = 0; t < tokens; ++t) {
            std::vector<std::int64_t> errors(at(places));
            CodeBytes codes(at(places)), before;
            plain_pass(back, places, bits, positions.data() + t, true, errors, codes);
            for (int pass = 0; pass < passes; ++pass) {
                before = codes;
                plain_pass(down, places, bits, positions.data() + t, false, errors, codes);
                changed_late += pass > 1 && before != codes;
            }
            expected.push_back(codes);
        }
        for_each_isa([&](Isa isa) {
            LineVector<std::int32_t> errors(at(places / 2 * shaped::tile)),
                sums(at(places * shaped::strip_tokens));
            LineVector<std::uint8_t> codes(at(places * shaped::tile));
            const shaped::Tile tile{places, bits, positions.data(), errors.data(), codes.data(), sums.data()};
            const shaped::Feedback feedback = back.feedback(), descent = down.feedback();
            kvplane::detail::run_on(isa, [=](auto lanes) KVPLANE_BODY {
                shaped::code_tokens<lanes>(tile, feedback, descent, passes, tokens);
            });
            for (Index t = 0; t < tokens; ++t)
                for (Index j = 0; j < places; ++j)
                    ASSERT_EQ(codes[at(j * shaped::tile + t)], expected[at(t)][at(j)])
                        << places << " places, " << bits << " bits, " << passes << " passes, token " << t
                        << ", place " << j;
        });
    }
    EXPECT_GT(changed_late, 100) << "the passes that go by kept sums have hardly been asked";
}

TEST(ShapedKernels, WritesCodesByChannel) {
    Random random(kvplane_test::seed());
    for (const Index channels : {1, 15, 16, 40, 128})
        for (const Index tokens : {1, 16, 37, 128}) {
            LineVector<std::uint8_t> codes(at(channels * shaped::tile));
            for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(random());
            std::vector<Index> place_of(at(channels));
            for (Index c = 0; c < channels; ++c) place_of[at(c)] = c;
            std::shuffle(place_of.begin(), place_of.end(), random);
            const Index stride = channels + 3;
            for_each_isa([&](Isa isa) {
                CodeBytes to(at(tokens * stride), 0xA5), expected = to;
                for (Index t = 0; t < tokens; ++t)
                    for (Index c = 0; c < channels; ++c)
                        expected[at(t * stride + c)] = codes[at(place_of[at(c)] * shaped::tile + t)];
                kvplane::detail::run_on(isa, [&](auto) KVPLANE_BODY {
                    shaped::write_codes(codes.data(), place_of.data(), tokens, channels, to.data(), stride);
                });
                EXPECT_EQ(to, expected) << channels << " channels, " << tokens << " tokens";
            });
        }
}

}  // namespace
