// examples/engine/recall.hpp: a document that hides codes in prose and asks for them at its end.
//
//   ... prose ... The secret code of Alice is 48213. ... prose ...     16 names, evenly spread
//   ... 160 tokens of prose ...
//   The secret code of Karl is 70956.                                  each name once more, in another order
//
// A model that reads this can tell the digits of the second time from the first, and from nothing else.
// Divergence on prose does not see whether a cache keeps what nobody has looked at yet; this does.
#pragma once

#include <array>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/text_file.hpp"
#include "engine/tokenizer.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace engine {

struct RecallDocument {
    static constexpr kvplane::Index codes = 16, digits = 5, prose_before_questions = 160;

    std::vector<TokenId> tokens;
    kvplane::Index questions = 0;          ///< where they begin
    std::vector<kvplane::Index> answered;  ///< of every digit of the answers, the token; `digits` a code
};

namespace detail {

inline constexpr std::array recall_names{"Alice", "Peter",  "Maria", "Karl",  "Susan", "Henry",
                                         "Julia", "David",  "Laura", "Simon", "Helen", "Thomas",
                                         "Clara", "Robert", "Emma",  "Oscar"};

/// std::shuffle gives another order with another standard library.
template <class Values>
void shuffle(Values& values, std::mt19937_64& random) {
    for (std::size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random() % i]);
}

}  // namespace detail

/// A document of `count` tokens with prose of the text from `first` on. The seed chooses codes and orders.
/// Throws Error: option (too few tokens for all lines), index (a text that is too short), mismatch (a
/// vocabulary whose digits are no tokens).
inline RecallDocument recall_document(const Tokenizer& tokenizer, const std::vector<TokenId>& text,
                                      kvplane::Index first, kvplane::Index count, std::uint64_t seed) {
    using kvplane::Index;
    constexpr std::size_t codes = RecallDocument::codes;
    std::mt19937_64 random(seed);
    auto names = detail::recall_names;
    detail::shuffle(names, random);
    struct Line {
        std::vector<TokenId> sentence, code, end;
        Index size() const { return static_cast<Index>(sentence.size() + code.size() + end.size()); }
    };
    std::vector<Line> lines;
    Index taken = 0;
    for (const char* name : names) {
        std::string code;
        for (Index i = 0; i < RecallDocument::digits; ++i) code += static_cast<char>('0' + random() % 10);
        lines.push_back({tokenizer.encode("\nThe secret code of " + std::string(name) + " is "),
                         tokenizer.encode(code), tokenizer.encode(".\n")});
        kvplane::require(lines.back().code.size() == static_cast<std::size_t>(RecallDocument::digits),
                         kvplane::ErrorCode::mismatch, "recall: '", code, "' is ", lines.back().code.size(),
                         " tokens, expected one a digit");
        taken += 2 * lines.back().size();
    }
    const Index prose = count - taken, spread = prose - RecallDocument::prose_before_questions;
    kvplane::require(spread >= static_cast<Index>(codes), kvplane::ErrorCode::option, "recall: ", count,
                     " tokens, expected at least ",
                     taken + RecallDocument::prose_before_questions + static_cast<Index>(codes),
                     " for all questions");

    RecallDocument document;
    const std::vector<TokenId> words = context_from(tokenizer, text, first, prose);
    const auto add_prose = [&](Index from, Index to) {
        document.tokens.insert(document.tokens.end(), words.begin() + from, words.begin() + to);
    };
    const auto add_line = [&](const Line& line, bool asked) {
        for (const auto* part : {&line.sentence, &line.code, &line.end})
            for (const TokenId token : *part) {
                if (asked && part == &line.code)
                    document.answered.push_back(static_cast<Index>(document.tokens.size()));
                document.tokens.push_back(token);
            }
    };
    for (Index i = 0; i < static_cast<Index>(codes); ++i) {
        add_prose(spread * i / RecallDocument::codes, spread * (i + 1) / RecallDocument::codes);
        add_line(lines[static_cast<std::size_t>(i)], false);
    }
    add_prose(spread, prose);
    document.questions = static_cast<Index>(document.tokens.size());
    detail::shuffle(lines, random);
    for (const Line& line : lines) add_line(line, true);
    return document;
}

}  // namespace engine
