// kvplane/io/safetensors_text.hpp: parts of the sentences that name tensors, and sizes that cannot overflow.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvplane/matrix.hpp"

namespace kvplane::detail {

/// Strings one after another. (Not by operator+: g++ 12 warns of an overlap in `"text" + std::string()` that
/// is not there.)
template <class... Parts>
std::string concatenated(const Parts&... parts) {
    std::string text;
    ((text += parts), ...);
    return text;
}

/// Text from a file as a sentence can show it: one line, and short even where the file says megabytes.
inline std::string printable(std::string_view text) {
    constexpr std::size_t longest = 80;
    std::size_t kept = std::min(text.size(), longest);
    // A cut must not fall into a UTF-8 sequence.
    while (kept < text.size() && kept > 0 && (static_cast<unsigned char>(text[kept]) & 0xC0) == 0x80) --kept;
    std::string shown;
    for (const char c : text.substr(0, kept)) {
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F)
            shown += '?';
        else
            shown += c;
    }
    return kept < text.size() ? shown + "..." : shown;
}

/// "tensor 'layers.0.keys'"
inline std::string tensor_named(std::string_view name) {
    return concatenated("tensor '", printable(name), "'");
}

/// "[1024, 3, 64]"
template <class Size>
std::string shape_text(const std::vector<Size>& shape) {
    constexpr std::size_t most = 8;
    std::string text = "[";
    for (std::size_t i = 0; i < std::min(shape.size(), most); ++i)
        text.append(i > 0 ? ", " : "").append(std::to_string(shape[i]));
    return text.append(shape.size() > most ? ", ...]" : "]");
}

/// Bytes of a tensor whose elements take `element_bytes` each, or nothing where they overflow an Index. Sizes
/// other than 0 are multiplied even where one is 0, so that any product of sizes, in any grouping, fits too.
/// A negative size overflows.
template <class Size>
std::optional<std::size_t> shape_bytes(const std::vector<Size>& shape, std::size_t element_bytes) {
    constexpr auto most = static_cast<std::uint64_t>(std::numeric_limits<Index>::max());
    std::uint64_t product = element_bytes;
    bool empty = false;
    for (const Size size : shape) {
        const auto factor = static_cast<std::uint64_t>(size);
        if (factor == 0)
            empty = true;
        else if (factor > most / product)
            return std::nullopt;
        else
            product *= factor;
    }
    return empty ? 0 : static_cast<std::size_t>(product);
}

}  // namespace kvplane::detail
