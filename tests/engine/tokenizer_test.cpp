// The tokenizer against the reference ids, against a naive implementation of the same rules, and its
// refusals.
#include "engine/tokenizer.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>

#include "engine/engine_support.hpp"
#include "kvplane/io/safetensors.hpp"
#include "test_support.hpp"

namespace {

using engine::Gguf;
using engine::TextStream;
using engine::TokenId;
using engine::Tokenizer;
using engine::ValueType;
using kvplane::ErrorCode;
using kvplane_test::GgufWriter;
using kvplane_test::refusal;
using Pieces = std::vector<std::string>;

Pieces pieces(std::string_view text) {
    Pieces result;
    while (!text.empty()) {
        const std::size_t length = engine::detail::first_piece(text);
        result.emplace_back(text.substr(0, length));
        text.remove_prefix(length);
    }
    return result;
}

TEST(Pieces, FollowGpt2sPatternWithDigitsApart) {
    EXPECT_EQ(pieces("Hello world"), (Pieces{"Hello", " world"}));
    EXPECT_EQ(pieces("a  b"), (Pieces{"a", " ", " b"}));
    EXPECT_EQ(pieces("a \n b"), (Pieces{"a", " \n", " b"}));
    EXPECT_EQ(pieces("a\n\nb"), (Pieces{"a", "\n", "\n", "b"}));
    EXPECT_EQ(pieces("   "), (Pieces{"   "}));
    EXPECT_EQ(pieces(" "), (Pieces{" "}));
    EXPECT_EQ(pieces("\n"), (Pieces{"\n"}));
    EXPECT_EQ(pieces("end \n"), (Pieces{"end", " \n"}));
    EXPECT_EQ(pieces("x 1  23"), (Pieces{"x", " ", "1", "  ", "2", "3"}));
    EXPECT_EQ(pieces("3.14a"), (Pieces{"3", ".", "1", "4", "a"}));
    EXPECT_EQ(pieces("don't we'll I'D"), (Pieces{"don", "'t", " we", "'ll", " I", "'", "D"}));
    EXPECT_EQ(pieces("'sun 'sun"), (Pieces{"'s", "un", " '", "sun"}));
    EXPECT_EQ(pieces("!'s"), (Pieces{"!'", "s"}));
    EXPECT_EQ(pieces("(a)?! b"), (Pieces{"(", "a", ")?!", " b"}));
    EXPECT_EQ(pieces(" ... x"), (Pieces{" ...", " x"}));
    EXPECT_EQ(pieces("\xc3\xbc\xc3\x9f \xd0\x9f\xd1\x80"), (Pieces{"\xc3\xbc\xc3\x9f", " \xd0\x9f\xd1\x80"}));
    EXPECT_EQ(pieces("\xc2\xbd\xe2\x85\xa7 x"), (Pieces{"\xc2\xbd", "\xe2\x85\xa7", " x"}));  // 1/2, roman 8
    EXPECT_EQ(pieces("a\xe3\x80\x80\xe3\x80\x80z"), (Pieces{"a", "\xe3\x80\x80", "\xe3\x80\x80", "z"}));
    EXPECT_EQ(pieces("a\x1c z"),
              (Pieces{"a", "\x1c", " z"}));  // a separator to Python, no white space to Unicode
    EXPECT_EQ(pieces("a\xcc\x81z"), (Pieces{"a", "\xcc\x81", "z"}));  // a combining accent is no letter
    EXPECT_EQ(pieces("a\xff\xfe z"), (Pieces{"a", "\xff\xfe", " z"}));
    EXPECT_EQ(pieces("a \xe6\x9d"), (Pieces{"a", " \xe6\x9d"}));
}

TEST(Pieces, FollowQwensPattern) {
    const auto cut = [](std::string_view text) {
        Pieces result;
        while (!text.empty()) {
            const std::size_t length = engine::detail::first_piece_qwen2(text);
            result.emplace_back(text.substr(0, length));
            text.remove_prefix(length);
        }
        return result;
    };
    EXPECT_EQ(cut("Hello world"), (Pieces{"Hello", " world"}));
    EXPECT_EQ(cut("(a)?!\n\n b"), (Pieces{"(a", ")?!\n\n", " b"}));  // any character may lead a word
    EXPECT_EQ(cut("x.y\n"), (Pieces{"x", ".y", "\n"}));
    EXPECT_EQ(cut("don't I'D'x"), (Pieces{"don", "'t", " I", "'D", "'x"}));
    EXPECT_EQ(cut("a  12"), (Pieces{"a", " ", " ", "1", "2"}));
    EXPECT_EQ(cut("a \t\r\n  b"), (Pieces{"a", " \t\r\n", " ", " b"}));
    EXPECT_EQ(cut("a \n "), (Pieces{"a", " \n", " "}));
    EXPECT_EQ(cut("a   "), (Pieces{"a", "   "}));
    EXPECT_EQ(cut(" ... \xc3\xbc"), (Pieces{" ...", " \xc3\xbc"}));
    EXPECT_EQ(cut("\na"), (Pieces{"\n", "a"}));
    EXPECT_EQ(cut("a\xe3\x80\x80z"), (Pieces{"a", "\xe3\x80\x80z"}));
}

TEST(CodePoints, EveryCharacterIsReadAndNothingElse) {
    const auto encoded = [](char32_t c) {
        if (c < 0x10000) return engine::detail::utf8(c);
        std::string four;
        for (const int shift : {18, 12, 6, 0})
            four += static_cast<char>(shift == 18 ? 0xf0 | c >> 18 : 0x80 | (c >> shift & 0x3f));
        return four;
    };
    for (char32_t c = 0; c < 0x110000; ++c) {
        const std::string text = encoded(c);
        const auto read = engine::detail::first_code_point(text);
        const bool is_surrogate = c >= 0xd800 && c < 0xe000;
        ASSERT_TRUE(read.value == (is_surrogate ? engine::detail::not_a_character : c))
            << static_cast<std::uint32_t>(c);
        ASSERT_EQ(read.length, is_surrogate ? 1 : text.size()) << static_cast<std::uint32_t>(c);
        ASSERT_FALSE(read.incomplete);
        if (is_surrogate) continue;
        for (std::size_t size = 1; size < text.size(); ++size)
            ASSERT_TRUE(engine::detail::first_code_point(text.substr(0, size)).incomplete)
                << static_cast<std::uint32_t>(c);
    }
    for (const char* wrong :
         {"\x80", "\xbf", "\xc0\x80", "\xc1\xbf", "\xe0\x80\x80", "\xe0\x9f\xbf", "\xf0\x8f\xbf\xbf",
          "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff", "\xc3(", "\xe2\x82(", "\xf0\x9f\x99("}) {
        const auto read = engine::detail::first_code_point(wrong);
        EXPECT_TRUE(read.value == engine::detail::not_a_character);
        EXPECT_EQ(read.length, 1u);
        EXPECT_FALSE(read.incomplete);
    }
}

TEST(CodePoints, TablesAreInOrderAndApart) {
    const auto check = [](const auto& ranges, std::size_t characters) {
        std::size_t count = 0;
        char32_t after = 0;
        for (const auto& range : ranges) {
            ASSERT_TRUE(range.first >= after);
            ASSERT_TRUE(range.last >= range.first);
            after = range.last + 2;  // neighbours would have been one range
            count += range.last - range.first + 1;
        }
        EXPECT_EQ(count, characters);
        for (const auto& range : ranges) {
            ASSERT_TRUE(engine::unicode::contains(ranges, range.first));
            ASSERT_TRUE(engine::unicode::contains(ranges, range.last));
            ASSERT_FALSE(engine::unicode::contains(ranges, range.first - 1));
            ASSERT_FALSE(engine::unicode::contains(ranges, range.last + 1));
        }
    };
    check(engine::unicode::letters, 131756);  // of Unicode 14
    check(engine::unicode::numbers, 1791);
    check(engine::unicode::spaces, 25);
}

TEST(ByteAlphabet, NumbersWhatDoesNotPrintFromU0100On) {
    const auto alphabet = engine::detail::byte_alphabet();
    ASSERT_EQ(alphabet.size(), 256u);
    const std::pair<char32_t, int> known[] = {{0x100, 0x00}, {0x10a, 0x0a}, {0x120, 0x20}, {'!', '!'},
                                              {'~', '~'},    {0x121, 0x7f}, {0x142, 0xa0}, {0xa1, 0xa1},
                                              {0xac, 0xac},  {0x143, 0xad}, {0xae, 0xae},  {0xff, 0xff}};
    for (const auto& [character, byte] : known)
        EXPECT_EQ(static_cast<unsigned char>(alphabet.at(character)), byte);
}

/// A tokenizer of all bytes and of merge rules that are made up at random.
struct RandomVocabulary {
    std::vector<std::string> tokens = kvplane_test::byte_tokens(), rules;

    explicit RandomVocabulary(std::mt19937& random) {
        std::vector<std::string> known{"a", "b", "c"};
        for (int i = 0; i < 40; ++i) {
            const std::string left = known[random() % known.size()], right = known[random() % known.size()];
            if (std::ranges::find(tokens, left + right) != tokens.end()) continue;
            known.push_back(left + right);
            tokens.push_back(left + right);
            rules.push_back(left + " " + right);
        }
    }
    kvplane_test::Bytes file() const {
        GgufWriter writer;
        writer.add_text("tokenizer.ggml.model", "gpt2");
        writer.add_text("tokenizer.ggml.pre", "smollm");
        writer.add_texts("tokenizer.ggml.tokens", tokens);
        writer.add_array("tokenizer.ggml.token_type", ValueType::int32,
                         std::vector<std::int32_t>(tokens.size(), 1));
        writer.add_texts("tokenizer.ggml.merges", rules);
        return writer.bytes();
    }
    /// The definition of BPE: as long as a rule applies, join at the earliest rule's leftmost place.
    Pieces join(const std::string& piece) const {
        Pieces symbols;
        for (const char character : piece) symbols.emplace_back(1, character);
        for (std::size_t rule = 0; rule < rules.size();) {
            std::size_t i = 0;
            while (i + 1 < symbols.size() && symbols[i] + " " + symbols[i + 1] != rules[rule]) ++i;
            if (i + 1 >= symbols.size()) {
                ++rule;
                continue;
            }
            symbols[i] += symbols[i + 1];
            symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(i) + 1);
            rule = 0;
        }
        return symbols;
    }
};

TEST(Tokenizer, JoinsLikeTheDefinitionOfBytePairEncoding) {
    std::mt19937 random(static_cast<std::uint32_t>(kvplane_test::seed()));
    for (int round = 0; round < 300; ++round) {
        const RandomVocabulary vocabulary(random);
        const auto bytes = vocabulary.file();
        const Tokenizer tokenizer{Gguf(bytes)};
        std::string text(random() % 60, ' ');
        for (char& character : text) character = static_cast<char>('a' + random() % 3);
        Pieces joined;
        for (const TokenId token : tokenizer.encode(text)) joined.emplace_back(tokenizer.bytes(token));
        ASSERT_EQ(joined, vocabulary.join(text)) << text;
    }
}

TEST(Tokenizer, RecognisesSpecialTokensTheLongestFirst) {
    const auto bytes = kvplane_test::SmallModel::file().bytes();
    const Tokenizer tokenizer{Gguf(bytes)};
    EXPECT_EQ(tokenizer.size(), 262);
    EXPECT_EQ(tokenizer.encode("<|end|>"), (std::vector<TokenId>{256}));
    EXPECT_EQ(tokenizer.encode("<|end"), (std::vector<TokenId>{258}));
    EXPECT_EQ(tokenizer.encode("<|en"), (std::vector<TokenId>{257, 'e', 'n'}));
    EXPECT_EQ(tokenizer.encode("<<|end|>|>"), (std::vector<TokenId>{'<', 256, '|', '>'}));
    EXPECT_EQ(tokenizer.encode("hello"), (std::vector<TokenId>{261, 'o'}));
    EXPECT_EQ(tokenizer.encode("he<|ll"), (std::vector<TokenId>{259, 257, 260}));
    EXPECT_EQ(tokenizer.end_of_text(), 256);
    EXPECT_EQ(tokenizer.find("hell"), 261);
    EXPECT_EQ(tokenizer.find("help"), -1);
    EXPECT_TRUE(tokenizer.is_special(257));
    EXPECT_FALSE(tokenizer.is_special(259));
    EXPECT_EQ(tokenizer.decode(std::vector<TokenId>{261, 'o', 256}), "hello<|end|>");
    refusal(ErrorCode::index, [&] { tokenizer.decode(std::vector<TokenId>{262}); });
    refusal(ErrorCode::index, [&] { tokenizer.bytes(-1); });
    refusal(ErrorCode::index, [&] { tokenizer.is_special(262); });
}

TEST(Tokenizer, GivesBackEveryByteString) {
    std::mt19937 random(static_cast<std::uint32_t>(kvplane_test::seed()));
    const auto bytes = kvplane_test::SmallModel::file().bytes();
    const Tokenizer tokenizer{Gguf(bytes)};
    for (int round = 0; round < 2000; ++round) {
        std::string text(random() % 40, ' ');
        for (char& character : text) character = "<|end> hel1'\xe2\x82\xac\xff\n"[random() % 17];
        ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
    }
}

/// A SentencePiece vocabulary: scores say what is joined first, and characters without a token become bytes.
struct SmallSentencePiece {
    std::vector<std::string> tokens{"<bos>", "<eos>", "<unk>", "<unused0>"};
    std::vector<std::int32_t> types{3, 3, 2, 5};
    std::vector<float> scores{0, 0, 0, 0};
    bool add_space = false;

    SmallSentencePiece() {
        constexpr char digits[] = "0123456789ABCDEF";
        for (int byte = 0; byte < 256; ++byte)
            add(std::string("<0x") + digits[byte / 16] + digits[byte % 16] + ">", 6, 0);
        add("  ", 4, -1000), add("\n\n", 4, -1000);                                            // 260, 261
        for (const char* single : {"a", "b", "c", "\xe2\x96\x81", "\n"}) add(single, 1, -99);  // 262 to 266
        add("ab", 1, -2), add("bc", 1, -1), add("cc", 1, -3);  // 267, 268, 269
        add("\xe2\x96\x81"
            "a",
            1, -4),
            add("\xe2\x96\x81\xe2\x96\x81"
                "b",
                1, 0);  // 270, 271
    }
    void add(const std::string& token, std::int32_t type, float score) {
        tokens.push_back(token), types.push_back(type), scores.push_back(score);
    }
    kvplane_test::Bytes file() const {
        GgufWriter writer;
        writer.add_text("tokenizer.ggml.model", "llama");
        writer.add_texts("tokenizer.ggml.tokens", tokens);
        writer.add_array("tokenizer.ggml.token_type", ValueType::int32, types);
        writer.add_array("tokenizer.ggml.scores", ValueType::float32, scores);
        writer.add("tokenizer.ggml.bos_token_id", ValueType::uint32, std::uint32_t{0});
        writer.add("tokenizer.ggml.eos_token_id", ValueType::uint32, std::uint32_t{1});
        writer.add("tokenizer.ggml.unknown_token_id", ValueType::uint32, std::uint32_t{2});
        writer.add("tokenizer.ggml.add_space_prefix", ValueType::boolean,
                   static_cast<std::uint8_t>(add_space));
        return writer.bytes();
    }
};

TEST(SentencePiece, JoinsWhatScoresHighestFirst) {
    const auto bytes = SmallSentencePiece().file();
    const Tokenizer tokenizer{Gguf(bytes)};
    const auto encoded = [&](std::string_view text) { return tokenizer.encode(text); };
    EXPECT_EQ(encoded("abc"), (std::vector<TokenId>{262, 268}));  // bc before ab
    EXPECT_EQ(encoded("ab"), (std::vector<TokenId>{267}));
    EXPECT_EQ(encoded("abab"), (std::vector<TokenId>{267, 267}));
    EXPECT_EQ(encoded(" a"), (std::vector<TokenId>{270}));
    EXPECT_EQ(encoded("\xe2\x96\x81"
                      "a"),
              (std::vector<TokenId>{270}));  // the mark is a space
    EXPECT_EQ(encoded("a   b"),
              (std::vector<TokenId>{262, 260, 265, 263}));  // user-defined runs, from the left
    EXPECT_EQ(encoded("\n\n\n"), (std::vector<TokenId>{261, 266}));
    EXPECT_EQ(encoded("a\xc3\xbc"), (std::vector<TokenId>{262, 4 + 0xc3, 4 + 0xbc}));
    EXPECT_EQ(encoded("\xff"), (std::vector<TokenId>{4 + 0xff}));
    EXPECT_EQ(encoded("<0x0A>").size(), 6u);  // not the byte's token
    EXPECT_EQ(encoded("<unused0>").size(), 9u);
    EXPECT_EQ(encoded("a<eos>"), (std::vector<TokenId>{262, 1}));
    EXPECT_EQ(tokenizer.decode(std::vector<TokenId>{270, 4 + 0xc3, 4 + 0xbc, 260}), " a\xc3\xbc  ");
    EXPECT_EQ(tokenizer.begin_of_text(), 0);
    EXPECT_TRUE(tokenizer.is_special(1));
    EXPECT_FALSE(tokenizer.is_special(261)) << "an answer goes on after an empty line";
}

TEST(SentencePiece, RefusesWhatItDoesNotDo) {
    const auto expect_refused = [](ErrorCode code, const SmallSentencePiece& file, const std::string& said) {
        const auto bytes = file.file();
        const std::string sentence = refusal(code, [&] { Tokenizer{Gguf(bytes)}; });
        EXPECT_NE(sentence.find(said), std::string::npos) << sentence;
    };
    SmallSentencePiece file;
    file.add_space = true;
    expect_refused(ErrorCode::mismatch, file, "add_space_prefix is true");
    file = {};
    file.scores.pop_back();
    expect_refused(ErrorCode::format, file, "272 tokens, but 271 scores");
    file = {};
    file.tokens[4] = "<0xG0>";
    expect_refused(ErrorCode::format, file, "the byte token '<0xG0>'");
}

TEST(Tokenizer, RefusesWhatDoesNotFitTogether) {
    struct Change {
        ErrorCode code;
        std::string said;
        std::string model = "gpt2", pre = "smollm";
        std::vector<std::string> extra_tokens = {"xy"}, merges = {"x y"};
        std::vector<std::int32_t> extra_types = {1};
        std::string key = "unused";
        bool flag = false;
    };
    const auto file = [](const Change& change) {
        auto tokens = kvplane_test::byte_tokens();
        std::vector<std::int32_t> types(tokens.size(), 1);
        tokens.insert(tokens.end(), change.extra_tokens.begin(), change.extra_tokens.end());
        types.insert(types.end(), change.extra_types.begin(), change.extra_types.end());
        GgufWriter writer;
        writer.add_text("tokenizer.ggml.model", change.model);
        writer.add_text("tokenizer.ggml.pre", change.pre);
        writer.add_texts("tokenizer.ggml.tokens", tokens);
        writer.add_array("tokenizer.ggml.token_type", ValueType::int32, types);
        writer.add_texts("tokenizer.ggml.merges", change.merges);
        writer.add(change.key, ValueType::boolean, static_cast<std::uint8_t>(change.flag));
        writer.add("tokenizer.ggml.eos_token_id", ValueType::uint32, std::uint32_t{change.flag ? 999u : 0u});
        return writer.bytes();
    };
    const auto format = ErrorCode::format, mismatch = ErrorCode::mismatch;
    const Change changes[] = {
        {.code = mismatch,
         .said = "'bert'; this engine knows gpt2 (byte-level BPE) and llama (SentencePiece)",
         .model = "bert"},
        {.code = mismatch, .said = "'llama-bpe'; this engine knows smollm and qwen2", .pre = "llama-bpe"},
        {.code = mismatch, .said = "add_eos_token", .key = "tokenizer.ggml.add_eos_token", .flag = true},
        {.code = mismatch,
         .said = "add_space_prefix",
         .key = "tokenizer.ggml.add_space_prefix",
         .flag = true},
        {.code = format, .said = "257 tokens, but 258 token types", .extra_types = {1, 1}},
        {.code = mismatch, .said = "token 256 has type 6", .extra_types = {6}},
        {.code = format, .said = "token 256 is empty", .extra_tokens = {""}},
        {.code = format, .said = "appears twice", .extra_tokens = {"x"}},
        {.code = format, .said = "stands for no byte", .extra_tokens = {"x y"}},
        {.code = format, .said = "merge rule 0, 'xy', is not two tokens", .merges = {"xy"}},
        {.code = format, .said = "merge rule 1, 'x z'", .merges = {"x y", "x z"}},
        {.code = format, .said = "merge rule 1, 'x y', appears twice", .merges = {"x y", "x y"}},
        {.code = format, .said = "eos_token_id is 999", .flag = true},
    };
    for (const Change& change : changes) {
        const auto bytes = file(change);
        const std::string sentence = refusal(change.code, [&] { Tokenizer{Gguf(bytes)}; });
        EXPECT_NE(sentence.find(change.said), std::string::npos) << sentence << "\n" << change.said;
    }
    const auto bytes = file({.code = format, .said = ""});
    Tokenizer{Gguf(bytes)};
}

TEST(Tokenizer, AByteWithoutTokenBecomesTheUnknownToken) {
    const auto file = [](bool with_unknown) {
        auto tokens = kvplane_test::byte_tokens();
        tokens[0xff] = "<unk>";
        std::vector<std::int32_t> types(256, 1);
        types[0xff] = 3;
        GgufWriter writer;
        writer.add_text("tokenizer.ggml.model", "gpt2");
        writer.add_text("tokenizer.ggml.pre", "smollm");
        writer.add_texts("tokenizer.ggml.tokens", tokens);
        writer.add_array("tokenizer.ggml.token_type", ValueType::int32, types);
        writer.add_texts("tokenizer.ggml.merges", {});
        if (with_unknown)
            writer.add("tokenizer.ggml.unknown_token_id", ValueType::uint32, std::uint32_t{0xff});
        return writer.bytes();
    };
    const auto with = file(true), without = file(false);
    EXPECT_EQ(Tokenizer{Gguf(with)}.encode("a\xff"), (std::vector<TokenId>{'a', 0xff}));
    EXPECT_NE(refusal(ErrorCode::format, [&] { Tokenizer{Gguf(without)}; }).find("byte 255"),
              std::string::npos);
}

TEST(TextStream, HandsOutCompleteCharactersOnly) {
    const auto bytes = kvplane_test::SmallModel::file().bytes();  // one token a byte
    const Tokenizer tokenizer{Gguf(bytes)};
    TextStream stream(tokenizer);
    Pieces parts;
    for (const TokenId token : tokenizer.encode("a\xe2\x82\xac\xf0\x9f\x99\x82z"))
        parts.push_back(stream.push(token));
    EXPECT_EQ(parts, (Pieces{"a", "", "", "\xe2\x82\xac", "", "", "", "\xf0\x9f\x99\x82", "z"}));
    EXPECT_EQ(stream.finish(), "");
    EXPECT_EQ(stream.push(0xe2), "");
    EXPECT_EQ(stream.push('a'),
              "\xef\xbf\xbd"
              "a");
    EXPECT_EQ(stream.push(0xff), "\xef\xbf\xbd");
    EXPECT_EQ(stream.push(0xf0), "");
    EXPECT_EQ(stream.push(0x9f), "");
    EXPECT_EQ(stream.finish(), "\xef\xbf\xbd\xef\xbf\xbd");
    EXPECT_EQ(stream.push('b'), "b");
    refusal(ErrorCode::index, [&] { stream.push(262); });
}

class RealTokenizer : public testing::Test {
  protected:
    static const Tokenizer& tokenizer() {
        static const Tokenizer shared{Gguf::open(kvplane_test::model_path())};
        return shared;
    }
    static nlohmann::json reference() {
        return nlohmann::json::parse(std::ifstream(KVPLANE_TEST_DATA "/smollm2_reference.json"));
    }
};

TEST_F(RealTokenizer, GivesTheReferenceIds) {
    KVPLANE_NEEDS_MODEL();
    const auto cases = reference()["tokenizer_cases"];
    EXPECT_GE(cases.size(), 10u);
    for (const auto& example : cases) {
        const auto text = example["text"].get<std::string>();
        const auto ids = example["ids"].get<std::vector<TokenId>>();
        EXPECT_EQ(tokenizer().encode(text), ids) << text;
        EXPECT_EQ(tokenizer().decode(ids), text);
    }
    for (const char* name : {"greedy", "greedy_long"}) {
        const auto ids = reference()[name]["continuation_ids"].get<std::vector<TokenId>>();
        const auto text = reference()[name]["text"].get<std::string>();
        EXPECT_EQ(tokenizer().decode(ids), text);
        EXPECT_EQ(tokenizer().encode(text), ids);
        std::string streamed;
        TextStream stream(tokenizer());
        for (const TokenId id : ids) streamed += stream.push(id);
        EXPECT_EQ(streamed + stream.finish(), text);
    }
}

TEST_F(RealTokenizer, GivesTheReferenceIdsOfALongText) {
    KVPLANE_NEEDS_MODEL();
    const auto file =
        kvplane::SafetensorsFile::open(KVPLANE_TEST_DATA "/smollm2_reference_logits.safetensors");
    const auto stored = file.matrix<std::int64_t>("token_ids", 1, 2048);
    std::vector<TokenId> ids(stored.data(), stored.data() + stored.size());
    EXPECT_EQ(tokenizer().encode(tokenizer().decode(ids)), ids);
}

TEST_F(RealTokenizer, KnowsItsSpecialTokens) {
    KVPLANE_NEEDS_MODEL();
    EXPECT_EQ(tokenizer().size(), 49152);
    EXPECT_EQ(tokenizer().find("<|im_start|>"), 1);
    EXPECT_EQ(tokenizer().end_of_text(), 2);
    EXPECT_TRUE(tokenizer().is_special(16));
    EXPECT_FALSE(tokenizer().is_special(17));
}

TEST_F(RealTokenizer, TakesTimeInProportionToTheText) {
    KVPLANE_NEEDS_MODEL();
    std::string text(1 << 20, 'a');  // one piece: joining pair by pair with a scan would take minutes
    for (int i = 0; i < 20000; ++i) text += " word after word, 12";
    const auto start = std::chrono::steady_clock::now();
    const auto ids = tokenizer().encode(text);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    EXPECT_EQ(tokenizer().decode(ids), text);
    EXPECT_LT(seconds.count(), 20);
}

class OtherTokenizer : public testing::TestWithParam<const char*> {};

TEST_P(OtherTokenizer, GivesTransformersIds) {
    KVPLANE_NEEDS_MODEL_OF(GetParam());
    const Tokenizer tokenizer{Gguf::open(kvplane_test::model_path(GetParam()))};
    const auto reference = nlohmann::json::parse(
        std::ifstream(std::string(KVPLANE_TEST_DATA "/") + GetParam() + "_reference.json"));
    const auto& cases = reference.at("tokenizer_cases");
    EXPECT_GE(cases.size(), 25u);
    for (const auto& example : cases) {
        const auto text = example["text"].get<std::string>();
        const auto ids = example["ids"].get<std::vector<TokenId>>();
        EXPECT_EQ(tokenizer.encode(text), ids) << text;
        EXPECT_EQ(tokenizer.decode(ids), text);
    }
}
INSTANTIATE_TEST_SUITE_P(, OtherTokenizer, testing::Values("gemma3", "qwen2"),
                         [](const auto& each) { return std::string(each.param); });

}  // namespace
