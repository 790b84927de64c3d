// examples/engine/tokenizer.hpp: the tokenizer of a GGUF file: text to token ids and back.
//
// Encoding goes in three steps, each as the tokenizer was trained:
//   1. special tokens (`<|im_start|>`, ...) are recognised wherever they stand, the longest first;
//   2. what lies between is cut into pieces, as `tokenizer.ggml.pre` says:
//        smollm   every digit (\p{N}) is a piece of its own; between digits GPT-2's pattern cuts:
//                 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//        qwen2    (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|
//                 \s*[\r\n]+|\s+(?!\S)|\s+
//      SentencePiece (`tokenizer.ggml.model` = llama) cuts nothing;
//   3. the bytes of a piece are joined pair by pair: the pair of the earliest merge rule first, of equal ones the
//      leftmost. SentencePiece joins characters, first what makes the token of the highest score.
// A byte that has no token of its own (the vocabulary has none for bytes that UTF-8 hardly or never uses)
// becomes the vocabulary's unknown token. Text that is not valid UTF-8 is encoded byte by byte all the same,
// and no text is normalized.
//
// decode() gives back the bytes that were encoded, except those that became the unknown token, and U+2581,
// which is a space to SentencePiece. TextStream does it token by token and holds back the bytes of a
// character until it is complete, so that what a program prints is valid UTF-8 at any moment.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <queue>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/gguf.hpp"
#include "engine/unicode_ranges.hpp"

namespace engine {

using TokenId = std::int32_t;

/// The vocabulary of a GGUF file. It owns what it needs: the file may go. Const functions may run
/// concurrently.
class Tokenizer {
  public:
    /// Throws Error: (mismatch) for another kind of tokenizer than byte-level BPE (gpt2) with pre-tokenizer
    /// smollm or qwen2 and SentencePiece (llama), or one that adds a space or an end, (format) where
    /// vocabulary and merge rules do not fit together.
    explicit Tokenizer(const Gguf& file);

    /// The ids of a text, special tokens in it included. Nothing is added in front or behind.
    std::vector<TokenId> encode(std::string_view text) const;
    /// The bytes of the tokens, special ones as they are written. Throws Error (index) for an unknown id.
    std::string decode(std::span<const TokenId> tokens) const;
    /// The bytes of one token. Throws Error (index).
    std::string_view bytes(TokenId token) const;

    TokenId size() const noexcept { return static_cast<TokenId>(bytes_of_token_.size()); }
    /// The token with exactly these bytes, or -1.
    TokenId find(std::string_view bytes) const;
    /// Whether it is a control token: an answer ends where one comes.
    bool is_special(TokenId token) const;
    /// The token that the model expects in front of every text, or -1.
    TokenId begin_of_text() const noexcept { return begin_of_text_; }
    /// The token that ends a text or an answer (<|im_end|>), or -1.
    TokenId end_of_text() const noexcept { return end_of_text_; }

  private:
    struct Merge {
        double rank;  ///< the lowest first
        TokenId token;
    };
    static std::uint64_t pair(TokenId left, TokenId right) noexcept {
        return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
    }
    void read_vocabulary(const Gguf& file);
    void read_merges(const Gguf& file);
    void read_scores(const Gguf& file);
    TokenId special_at(std::string_view text) const;
    void encode_plain(std::string_view text, std::vector<TokenId>& tokens) const;
    void encode_piece(std::string_view piece, std::vector<TokenId>& tokens) const;

    std::size_t (*first_piece_)(std::string_view) = nullptr;  // null: SentencePiece
    std::vector<std::string> bytes_of_token_;
    std::vector<bool> is_special_;
    std::unordered_map<std::string_view, TokenId> token_of_bytes_;  // views of bytes_of_token_
    std::unordered_map<std::uint64_t, Merge> merges_;
    std::vector<float> scores_;  // of SentencePiece, by token; NaN: it is never joined
    std::array<std::vector<TokenId>, 256> special_tokens_;  // by the first byte, the longest first
    std::vector<TokenId> token_of_byte_ = std::vector<TokenId>(256, -1);
    TokenId begin_of_text_ = -1, end_of_text_ = -1;
};

/// Decodes a stream of tokens to text. What push() and finish() return, put together, is valid UTF-8: bytes
/// that cannot belong to a character become U+FFFD.
class TextStream {
  public:
    explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}

    /// The characters that are complete now. Throws Error (index) for an unknown id.
    std::string push(TokenId token);
    /// The end of the text: what is still incomplete.
    std::string finish();

  private:
    std::string take_characters(bool at_end);

    const Tokenizer* tokenizer_;
    std::string pending_;
};

// ---------------------------------------------------------------------------------------------------------
// Implementation
// ---------------------------------------------------------------------------------------------------------

namespace detail {

struct CodePoint {
    char32_t value;      ///< not_a_character where the bytes are not UTF-8
    std::size_t length;  ///< in bytes
    bool incomplete;     ///< the text ends inside a character
};
inline constexpr char32_t not_a_character = 0xffffffff;

/// The code point a (non-empty) text starts with. Overlong forms, surrogates and values beyond U+10FFFF are
/// no characters; of what is none, one byte is taken at a time.
inline CodePoint first_code_point(std::string_view text) noexcept {
    const auto byte = [text](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    if (byte(0) < 0x80) return {byte(0), 1, false};
    const std::size_t length = byte(0) >= 0xf0 ? 4 : byte(0) >= 0xe0 ? 3 : 2;
    if (byte(0) < 0xc2 || byte(0) > 0xf4) return {not_a_character, 1, false};
    char32_t value = byte(0) & (0xffu >> (length + 1));
    for (std::size_t i = 1; i < length; ++i) {
        if (i == text.size()) return {not_a_character, 1, true};
        const bool too_low =
            i == 1 && ((byte(0) == 0xe0 && byte(1) < 0xa0) || (byte(0) == 0xf0 && byte(1) < 0x90));
        const bool too_high =
            i == 1 && ((byte(0) == 0xed && byte(1) > 0x9f) || (byte(0) == 0xf4 && byte(1) > 0x8f));
        if ((byte(i) & 0xc0) != 0x80 || too_low || too_high) return {not_a_character, 1, false};
        value = value << 6 | (byte(i) & 0x3fu);
    }
    return {value, length, false};
}

inline std::string utf8(char32_t code_point) {
    const auto tail = [code_point](int shift) {
        return static_cast<char>(0x80 | (code_point >> shift & 0x3f));
    };
    if (code_point < 0x80) return {static_cast<char>(code_point)};
    if (code_point < 0x800) return {static_cast<char>(0xc0 | code_point >> 6), tail(0)};
    return {static_cast<char>(0xe0 | code_point >> 12), tail(6), tail(0)};
}

enum class CharacterKind { letter, number, space, other };

inline CharacterKind kind(char32_t code_point) noexcept {
    if (code_point < 0x80) {  // most of every text
        if ((code_point | 0x20) >= 'a' && (code_point | 0x20) <= 'z') return CharacterKind::letter;
        if (code_point >= '0' && code_point <= '9') return CharacterKind::number;
        if (code_point == ' ' || (code_point >= 9 && code_point <= 13)) return CharacterKind::space;
        return CharacterKind::other;
    }
    if (unicode::contains(unicode::letters, code_point)) return CharacterKind::letter;
    if (unicode::contains(unicode::numbers, code_point)) return CharacterKind::number;
    if (unicode::contains(unicode::spaces, code_point)) return CharacterKind::space;
    return CharacterKind::other;
}

/// The length of the run of characters of one kind that a text starts with, and of the last one in it.
struct Run {
    std::size_t length = 0, last = 0;
};
inline Run run_of(CharacterKind wanted, std::string_view text) noexcept {
    Run run;
    while (run.length < text.size()) {
        const CodePoint next = first_code_point(text.substr(run.length));
        if (kind(next.value) != wanted) break;
        run.last = next.length;
        run.length += next.length;
    }
    return run;
}

/// The length of the contraction ('s, 'll, ...) a text starts with, or 0.
inline std::size_t contraction(std::string_view text, bool any_case = false) noexcept {
    const auto same = [any_case](char letter, char c) {
        return c == letter || (any_case && letter != '\'' && c == letter - 'a' + 'A');
    };
    for (const std::string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
        if (text.size() >= ending.size() && std::equal(ending.begin(), ending.end(), text.begin(), same))
            return ending.size();
    return 0;
}

/// The length of the first piece of a (non-empty) text, by the pattern `qwen2`.
inline std::size_t first_piece_qwen2(std::string_view text) noexcept {
    if (const std::size_t length = contraction(text, true)) return length;
    const auto is_break = [&](std::size_t i) { return text[i] == '\r' || text[i] == '\n'; };
    const CodePoint first = first_code_point(text);
    const CharacterKind first_kind = kind(first.value);
    if (first_kind == CharacterKind::number) return first.length;
    // Any one character but a number or the end of a line may lead a word.
    const std::size_t lead = first_kind == CharacterKind::letter || is_break(0) ? 0 : first.length;
    if (const std::size_t length = run_of(CharacterKind::letter, text.substr(lead)).length)
        return lead + length;

    const std::size_t start = text[0] == ' ' ? 1 : 0;
    if (const std::size_t length = run_of(CharacterKind::other, text.substr(start)).length) {
        std::size_t end = start + length;
        while (end < text.size() && is_break(end)) ++end;
        return end;
    }
    // White space: up to its last end of a line; otherwise all but its last character, which may lead a word.
    const Run spaces = run_of(CharacterKind::space, text);
    for (std::size_t end = spaces.length; end > 0; --end)
        if (is_break(end - 1)) return end;
    const bool whole = spaces.length == text.size() || spaces.length == spaces.last;
    return whole ? spaces.length : spaces.length - spaces.last;
}

/// The same by the pattern `smollm`.
inline std::size_t first_piece(std::string_view text) noexcept {
    if (const std::size_t length = contraction(text)) return length;
    const std::size_t start = text[0] == ' ' && text.size() > 1 ? 1 : 0;  // a space may lead a word
    const CodePoint first = first_code_point(text.substr(start));
    const CharacterKind first_kind = kind(first.value);
    if (first_kind == CharacterKind::letter || first_kind == CharacterKind::other)
        return start + run_of(first_kind, text.substr(start)).length;
    if (first_kind == CharacterKind::number && start == 0) return first.length;

    // White space: all of it before a digit or the end, otherwise all but its last character, which may lead a
    // word.
    const Run spaces = run_of(CharacterKind::space, text);
    const bool at_end = spaces.length == text.size() ||
                        kind(first_code_point(text.substr(spaces.length)).value) == CharacterKind::number;
    return at_end || spaces.length == spaces.last ? spaces.length : spaces.length - spaces.last;
}

/// In the file, a token's bytes are written as printable characters: those that are printable in Latin-1
/// stand for themselves, the other 68 are numbered from U+0100 on. This is the table from character to byte.
inline std::unordered_map<char32_t, char> byte_alphabet() {
    std::unordered_map<char32_t, char> alphabet;
    char32_t next = 0x100;
    for (char32_t byte = 0; byte < 256; ++byte) {
        const bool printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
        alphabet[printable ? byte : next++] = static_cast<char>(byte);
    }
    return alphabet;
}

/// The bytes that a text in the byte alphabet stands for. Throws Error (format).
inline std::string bytes_from_alphabet(std::string_view text,
                                       const std::unordered_map<char32_t, char>& alphabet) {
    std::string bytes;
    for (std::size_t i = 0; i < text.size();) {
        const CodePoint next = first_code_point(text.substr(i));
        const auto found = alphabet.find(next.value);
        kvplane::require(found != alphabet.end(), ErrorCode::format, "tokenizer: '", text,
                         "' has a character at byte ", i, " that stands for no byte");
        bytes += found->second;
        i += next.length;
    }
    return bytes;
}

/// SentencePiece writes a space as U+2581.
inline std::string with_spaces(std::string_view text) {
    constexpr std::string_view mark = "\xe2\x96\x81";
    std::string result;
    for (std::size_t at; (at = text.find(mark)) != std::string_view::npos;
         text.remove_prefix(at + mark.size()))
        (result += text.substr(0, at)) += ' ';
    return result += text;
}

/// The byte that <0x0A> stands for. Throws Error (format).
inline unsigned char byte_of_token(std::string_view text) {
    unsigned char byte = 0;
    const bool framed = text.size() == 6 && text.starts_with("<0x") && text.ends_with('>');
    const char* last = framed ? text.data() + 5 : nullptr;
    kvplane::require(framed && std::from_chars(text.data() + 3, last, byte, 16).ptr == last,
                     ErrorCode::format, "tokenizer: the byte token '", text, "', expected <0x00> to <0xFF>");
    return byte;
}

inline bool flag(const Gguf& file, std::string_view key, bool standard) {
    const Value* value = file.find_value(key);
    return value ? value->flag() : standard;
}

inline void require_off(const Gguf& file, std::string_view key, bool standard = false) {
    kvplane::require(!flag(file, key, standard), ErrorCode::mismatch, "tokenizer: ", key,
                     " is true, expected false");
}

/// The id under a key, or -1 where the key is missing. Throws Error (format) where there is no such token.
inline TokenId token_of_key(const Gguf& file, std::string_view key, std::size_t vocabulary) {
    const Value* value = file.find_value(key);
    if (!value) return -1;
    const std::int64_t token = value->integer();
    kvplane::require(token >= 0 && static_cast<std::uint64_t>(token) < vocabulary, ErrorCode::format,
                     "tokenizer: ", key, " is ", token, " in a vocabulary of ", vocabulary);
    return static_cast<TokenId>(token);
}

}  // namespace detail

inline Tokenizer::Tokenizer(const Gguf& file) {
    const std::string_view kind = file.value("tokenizer.ggml.model").text();
    kvplane::require(kind == "gpt2" || kind == "llama", ErrorCode::mismatch,
                     "tokenizer: tokenizer.ggml.model is '", kind,
                     "'; this engine knows gpt2 (byte-level BPE) and llama (SentencePiece)");
    const bool sentence_piece = kind == "llama";
    if (!sentence_piece) {
        const std::string_view pre = file.value("tokenizer.ggml.pre").text();
        if (pre == "smollm") first_piece_ = detail::first_piece;
        if (pre == "qwen2") first_piece_ = detail::first_piece_qwen2;
        kvplane::require(first_piece_ != nullptr, ErrorCode::mismatch, "tokenizer: tokenizer.ggml.pre is '",
                         pre, "'; this engine knows smollm and qwen2");
    }
    detail::require_off(file, "tokenizer.ggml.add_eos_token");
    detail::require_off(file, "tokenizer.ggml.add_space_prefix", sentence_piece);
    read_vocabulary(file);
    sentence_piece ? read_scores(file) : read_merges(file);
    end_of_text_ = detail::token_of_key(file, "tokenizer.ggml.eos_token_id", bytes_of_token_.size());
    if (!detail::flag(file, "tokenizer.ggml.add_bos_token", sentence_piece)) return;
    (void)file.value("tokenizer.ggml.bos_token_id");  // refuses a file without it
    begin_of_text_ = detail::token_of_key(file, "tokenizer.ggml.bos_token_id", bytes_of_token_.size());
}

inline void Tokenizer::read_vocabulary(const Gguf& file) {
    // Of tokenizer.ggml.token_type.
    constexpr std::int64_t normal = 1, unknown_type = 2, control = 3, user_defined = 4, unused = 5,
                           byte_type = 6;
    const auto texts = file.value("tokenizer.ggml.tokens").texts();
    const Value& types = file.value("tokenizer.ggml.token_type");
    kvplane::require(types.size == texts.size(), ErrorCode::format, "tokenizer: ", texts.size(),
                     " tokens, but ", types.size, " token types");
    const bool sentence_piece = first_piece_ == nullptr;
    const auto alphabet = detail::byte_alphabet();
    bytes_of_token_.reserve(texts.size());  // so that views of it stay valid
    for (std::size_t i = 0; i < texts.size(); ++i) {
        const std::int64_t type = types.integer(i);
        kvplane::require(
            type == normal || type == control || type == user_defined || type == unused ||
                (sentence_piece && (type == unknown_type || type == byte_type)),
            ErrorCode::mismatch, "tokenizer: token ", i, " has type ", type,
            ", expected 1 (normal), 3 (control), 4 (user defined) or 5 (unused), of SentencePiece also 2 "
            "(unknown) or 6 (byte)");
        kvplane::require(!texts[i].empty(), ErrorCode::format, "tokenizer: token ", i, " is empty");
        const auto token = static_cast<TokenId>(i);
        is_special_.push_back(type == control);
        if (type == byte_type) {
            const unsigned char byte = detail::byte_of_token(texts[i]);
            token_of_byte_[byte] = token;
            bytes_of_token_.emplace_back(1, static_cast<char>(byte));
            continue;
        }
        const bool is_text = type == normal || type == user_defined;
        bytes_of_token_.push_back(is_text && sentence_piece ? detail::with_spaces(texts[i])
                                  : type == normal          ? detail::bytes_from_alphabet(texts[i], alphabet)
                                                            : std::string(texts[i]));
        if (!is_text && type != control) continue;
        if (type != normal)
            special_tokens_[static_cast<unsigned char>(bytes_of_token_.back()[0])].push_back(token);
        kvplane::require(token_of_bytes_.emplace(bytes_of_token_.back(), token).second, ErrorCode::format,
                         "tokenizer: token ", i, ", '", texts[i], "', appears twice");
    }
    for (std::vector<TokenId>& tokens : special_tokens_)
        std::ranges::stable_sort(tokens, std::greater{},
                                 [this](TokenId token) { return bytes(token).size(); });

    const TokenId unknown = detail::token_of_key(file, "tokenizer.ggml.unknown_token_id", texts.size());
    for (int byte = 0; byte < 256; ++byte) {
        TokenId& token = token_of_byte_[static_cast<std::size_t>(byte)];
        const char character = static_cast<char>(byte);
        if (token < 0) token = find({&character, 1});
        if (token < 0) token = unknown;
        kvplane::require(token >= 0, ErrorCode::format, "tokenizer: there is no token for byte ", byte,
                         " and none for what is unknown");
    }
}

/// SentencePiece lists no pairs: whatever makes a normal token may be joined.
inline void Tokenizer::read_scores(const Gguf& file) {
    constexpr std::int64_t normal = 1;
    const Value &scores = file.value("tokenizer.ggml.scores"),
                &types = file.value("tokenizer.ggml.token_type");
    kvplane::require(scores.size == bytes_of_token_.size(), ErrorCode::format,
                     "tokenizer: ", bytes_of_token_.size(), " tokens, but ", scores.size, " scores");
    for (std::size_t i = 0; i < scores.size; ++i)
        scores_.push_back(types.integer(i) == normal ? static_cast<float>(scores.number(i))
                                                     : std::numeric_limits<float>::quiet_NaN());
}

inline void Tokenizer::read_merges(const Gguf& file) {
    const auto alphabet = detail::byte_alphabet();
    const auto rules = file.value("tokenizer.ggml.merges").texts();
    merges_.reserve(rules.size());
    for (std::size_t rank = 0; rank < rules.size(); ++rank) {
        const std::size_t space = rules[rank].find(' ');
        kvplane::require(space != std::string_view::npos, ErrorCode::format, "tokenizer: merge rule ", rank,
                         ", '", rules[rank], "', is not two tokens with a space between them");
        const std::string left = detail::bytes_from_alphabet(rules[rank].substr(0, space), alphabet);
        const std::string right = detail::bytes_from_alphabet(rules[rank].substr(space + 1), alphabet);
        const TokenId left_token = find(left), right_token = find(right), both = find(left + right);
        kvplane::require(left_token >= 0 && right_token >= 0 && both >= 0, ErrorCode::format,
                         "tokenizer: merge rule ", rank, ", '", rules[rank],
                         "', joins or makes something that is no token");
        const Merge merge{static_cast<double>(rank), both};
        kvplane::require(merges_.emplace(pair(left_token, right_token), merge).second, ErrorCode::format,
                         "tokenizer: merge rule ", rank, ", '", rules[rank], "', appears twice");
    }
}

inline std::string_view Tokenizer::bytes(TokenId token) const {
    kvplane::require(token >= 0 && token < size(), ErrorCode::index, "tokenizer: token ", token,
                     " in a vocabulary of ", size());
    return bytes_of_token_[static_cast<std::size_t>(token)];
}

inline bool Tokenizer::is_special(TokenId token) const {
    bytes(token);  // refuses an unknown id
    return is_special_[static_cast<std::size_t>(token)];
}

inline TokenId Tokenizer::find(std::string_view bytes) const {
    const auto found = token_of_bytes_.find(bytes);
    return found == token_of_bytes_.end() ? -1 : found->second;
}

/// The special token that a (non-empty) text starts with, or -1.
inline TokenId Tokenizer::special_at(std::string_view text) const {
    for (const TokenId token : special_tokens_[static_cast<unsigned char>(text[0])])
        if (text.starts_with(bytes_of_token_[static_cast<std::size_t>(token)])) return token;
    return -1;
}

inline std::vector<TokenId> Tokenizer::encode(std::string_view text) const {
    std::vector<TokenId> tokens;
    while (!text.empty()) {
        TokenId special = -1;
        std::size_t plain = 0;
        while (plain < text.size() && (special = special_at(text.substr(plain))) < 0) ++plain;
        encode_plain(text.substr(0, plain), tokens);
        if (special >= 0) tokens.push_back(special);
        text.remove_prefix(plain + (special >= 0 ? bytes(special).size() : 0));
    }
    return tokens;
}

/// Text without special tokens.
inline void Tokenizer::encode_plain(std::string_view text, std::vector<TokenId>& tokens) const {
    if (!first_piece_) return encode_piece(detail::with_spaces(text), tokens);
    while (!text.empty()) {
        const std::size_t length = first_piece_(text);
        encode_piece(text.substr(0, length), tokens);
        text.remove_prefix(length);
    }
}

/// Joins the bytes of a piece. The symbols form a linked list; the joins that are possible wait in a queue,
/// the earliest rule first and of one rule the leftmost. A join in the queue is out of date when one of its
/// symbols has changed in the meantime, which shows in its length. O(n log n), so that a piece of any length
/// (a megabyte of one letter) is no problem.
inline void Tokenizer::encode_piece(std::string_view piece, std::vector<TokenId>& tokens) const {
    struct Symbol {
        TokenId token;
        std::size_t length, before, next;  // length 0: joined to the symbol before
    };
    using Join = std::tuple<double, std::size_t, std::size_t, TokenId>;  // rank, left symbol, length, token
    const std::size_t end = piece.size();
    std::vector<Symbol> symbols(end);
    std::priority_queue<Join, std::vector<Join>, std::greater<>> joins;

    const auto propose = [&](std::size_t left) {
        const std::size_t right = symbols[left].next;
        if (right == end) return;
        const std::size_t length = symbols[left].length + symbols[right].length;
        if (!first_piece_) {
            const TokenId token = find(piece.substr(left, length));
            const float score = token < 0 ? NAN : scores_[static_cast<std::size_t>(token)];
            if (!std::isnan(score)) joins.emplace(-score, left, length, token);
        } else if (const auto rule = merges_.find(pair(symbols[left].token, symbols[right].token));
                   rule != merges_.end())
            joins.emplace(rule->second.rank, left, length, rule->second.token);
    };
    // Symbols are bytes at first, or characters, which may have no token.
    for (std::size_t i = 0, before = end; i < end;) {
        const std::size_t length = first_piece_ ? 1 : detail::first_code_point(piece.substr(i)).length;
        symbols[i] = {first_piece_ ? token_of_byte_[static_cast<unsigned char>(piece[i])]
                                   : find(piece.substr(i, length)),
                      length, before, i + length};
        before = std::exchange(i, i + length);
    }
    for (std::size_t i = 0; i < end; i = symbols[i].next) propose(i);

    while (!joins.empty()) {
        const auto [rank, left, length, token] = joins.top();
        joins.pop();
        const std::size_t right = symbols[left].next;
        const bool current = symbols[left].length > 0 && right != end &&
                             symbols[left].length + symbols[right].length == length;
        if (!current) continue;
        const std::size_t after = symbols[right].next;
        symbols[left] = {token, length, symbols[left].before, after};
        symbols[right].length = 0;
        if (after != end) symbols[after].before = left;
        propose(left);
        if (symbols[left].before != end) propose(symbols[left].before);
    }
    for (std::size_t i = 0; i < end; i = symbols[i].next) {
        if (symbols[i].token >= 0)
            tokens.push_back(symbols[i].token);
        else
            for (const char byte : piece.substr(i, symbols[i].length))
                tokens.push_back(token_of_byte_[static_cast<unsigned char>(byte)]);
    }
}

inline std::string Tokenizer::decode(std::span<const TokenId> tokens) const {
    std::string text;
    for (const TokenId token : tokens) text += bytes(token);
    return text;
}

inline std::string TextStream::push(TokenId token) {
    pending_ += tokenizer_->bytes(token);
    return take_characters(false);
}

inline std::string TextStream::finish() {
    return take_characters(true);
}

inline std::string TextStream::take_characters(bool at_end) {
    std::string text;
    std::size_t done = 0;
    while (done < pending_.size()) {
        const detail::CodePoint next = detail::first_code_point(std::string_view(pending_).substr(done));
        if (next.incomplete && !at_end) break;
        text +=
            next.value == detail::not_a_character ? detail::utf8(0xfffd) : pending_.substr(done, next.length);
        done += next.length;
    }
    pending_.erase(0, done);
    return text;
}

}  // namespace engine
