// The document of codes: what stands where, and that a seed makes the same one.
#include "engine/recall.hpp"

#include <gtest/gtest.h>

#include "engine/engine_support.hpp"
#include "test_support.hpp"

namespace {

using namespace engine;
using kvplane::ErrorCode;
using kvplane::Index;
using kvplane_test::refusal;

class Recall : public testing::Test {
  protected:
    RecallDocument document(Index count, std::uint64_t seed) const {
        return recall_document(tokenizer, prose, 3, count, seed);
    }

    kvplane_test::Bytes bytes = kvplane_test::SmallModel::file().bytes();
    Tokenizer tokenizer{Gguf(bytes)};
    std::vector<TokenId> prose = tokenizer.encode(std::string(4000, 'p'));
};

TEST_F(Recall, AsksForEveryCodeThatStandsInTheText) {
    const RecallDocument made = document(2500, 5);
    ASSERT_EQ(made.tokens.size(), 2500u);
    ASSERT_EQ(made.answered.size(), 80u);
    const std::string text = tokenizer.decode(made.tokens);
    const std::span<const TokenId> all(made.tokens);
    const std::string stated = tokenizer.decode(all.first(static_cast<std::size_t>(made.questions)));
    const std::string asked = tokenizer.decode(all.subspan(static_cast<std::size_t>(made.questions)));
    EXPECT_TRUE(stated.ends_with(std::string(160, 'p')));
    EXPECT_EQ(asked.find('p'), std::string::npos) << "no prose between the questions";
    std::size_t lines = 0, in_order = 0, before = 0;
    for (std::size_t at = 0; (at = asked.find("The secret", at)) != std::string::npos; ++at, ++lines) {
        const std::string line = asked.substr(at, asked.find('\n', at) - at);
        const std::size_t place = stated.find(line);
        ASSERT_NE(place, std::string::npos) << line;
        in_order += place > before;
        before = place;
    }
    EXPECT_EQ(lines, 16u);
    EXPECT_LT(in_order, 14u) << "the questions come in another order";
    for (std::size_t i = 0; i < made.answered.size(); ++i) {
        const auto at = static_cast<std::size_t>(made.answered[i]);
        const std::string_view digit = tokenizer.bytes(made.tokens[at]);
        EXPECT_TRUE(digit.size() == 1 && digit[0] >= '0' && digit[0] <= '9');
        EXPECT_EQ(tokenizer.bytes(made.tokens[at - 1]) == " ", i % 5 == 0)
            << "codes are asked for from their first digit";
    }
}

TEST_F(Recall, ASeedMakesTheSameDocument) {
    EXPECT_EQ(document(2000, 5).tokens, document(2000, 5).tokens);
    EXPECT_NE(document(2000, 5).tokens, document(2000, 6).tokens);
}

TEST_F(Recall, RefusesWhatHasNoRoom) {
    EXPECT_NE(refusal(ErrorCode::option, [&] { document(600, 1); }).find("for all questions"),
              std::string::npos);
    refusal(ErrorCode::index, [&] { document(20000, 1); });
}

}  // namespace
