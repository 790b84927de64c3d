// examples/engine/text_file.hpp: the tokens of a text in a file.
#pragma once

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "engine/tokenizer.hpp"
#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace engine {

/// Throws Error (io) where the file cannot be read.
inline std::vector<TokenId> read_tokens(const Tokenizer& tokenizer, const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string text;
    char buffer[1 << 16];
    while (file.read(buffer, sizeof buffer), file.gcount() > 0)
        text.append(buffer, static_cast<std::size_t>(file.gcount()));
    kvplane::require(file.eof() && !file.bad(), kvplane::ErrorCode::io, path, ": cannot be read");
    return tokenizer.encode(text);
}

/// A context of `count` tokens: those of a text from `first` on, behind the one that the model expects in
/// front of every text, if it does. Throws Error (index) where the text has fewer.
inline std::vector<TokenId> context_from(const Tokenizer& tokenizer, const std::vector<TokenId>& text,
                                         kvplane::Index first, kvplane::Index count) {
    const auto size = static_cast<kvplane::Index>(text.size());
    kvplane::require(first >= 0 && count >= 0 && first <= size && count <= size - first,
                     kvplane::ErrorCode::index, count, " tokens from ", first, " on of a text of ", size);
    std::vector<TokenId> tokens(text.begin() + first, text.begin() + first + count);
    if (tokenizer.begin_of_text() < 0 || tokens.empty()) return tokens;
    tokens.pop_back();
    tokens.insert(tokens.begin(), tokenizer.begin_of_text());
    return tokens;
}

}  // namespace engine
