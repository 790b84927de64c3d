// kvplane/impl/error.hpp: puts sentences together.
#pragma once

#include "kvplane/error.hpp"

#include <charconv>

#if !defined(__cpp_exceptions)
#include <cstdio>
#include <cstdlib>
#endif

namespace kvplane::detail {

KVPLANE_FUNCTION void Part::append_to(std::string& sentence) const {
    char digits[32];
    char* end = digits;
    switch (kind_) {
        case Kind::text:
            sentence += text_;
            return;
        case Kind::character:
            sentence += character_;
            return;
        case Kind::signed_number:
            end = std::to_chars(digits, digits + sizeof digits, signed_).ptr;
            break;
        case Kind::unsigned_number:
            end = std::to_chars(digits, digits + sizeof digits, unsigned_).ptr;
            break;
        case Kind::real_number:
            end = std::to_chars(digits, digits + sizeof digits, real_, std::chars_format::general, 6).ptr;
            break;
    }
    sentence.append(digits, end);
}

KVPLANE_FUNCTION void refuse(ErrorCode code, std::initializer_list<Part> parts) {
    std::string sentence = "kvplane: ";
    for (const Part& part : parts) part.append_to(sentence);
#if defined(__cpp_exceptions)
    throw Error(code, sentence);
#else
    std::fprintf(stderr, "%s (%s)\n", sentence.c_str(), name(code));
    std::abort();
#endif
}

}  // namespace kvplane::detail
