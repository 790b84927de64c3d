// kvplane/error.hpp: what bad input gets.
//
// Every public function checks its arguments before it changes anything and refuses bad ones with a
// sentence that says which argument, where, and what was expected. With exceptions that sentence is a
// kvplane::Error; with -fno-exceptions it goes to stderr and the program aborts.
#pragma once

// kvplane's arithmetic is exact where the storage format needs it, and NaN and infinity have a meaning here.
// -fassociative-math by itself has a macro with gcc alone (from 12 on), -funsafe-math-optimizations with
// none.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__)
#error "kvplane: -ffast-math, -Ofast and their parts let the compiler change the bits that are stored and drop the checks for NaN; compile the files that include kvplane without them"
#endif

#include <concepts>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#include "kvplane/compiled.hpp"

namespace kvplane {

/// What kind of input was refused. The sentence in Error::what() says the rest.
enum class ErrorCode {
    shape,          ///< sizes that do not fit together, or a size the function cannot take
    option,         ///< a width, group size, scheme or other setting outside what is supported
    index,          ///< a token, row or channel outside the object
    not_finite,     ///< NaN or infinity where numbers are needed
    beyond_fp16,    ///< a magnitude that fp16 storage cannot hold
    format,         ///< a file or buffer whose content is malformed
    mismatch,       ///< a file or object that is well-formed but belongs to another configuration
    io,             ///< the operating system refused to open, map, read or write
    out_of_memory,  ///< an allocator returned nothing
};

/// The name of a code, as used in messages: "shape", "option", ...
constexpr const char* name(ErrorCode code) noexcept {
    switch (code) {
        case ErrorCode::shape:
            return "shape";
        case ErrorCode::option:
            return "option";
        case ErrorCode::index:
            return "index";
        case ErrorCode::not_finite:
            return "not finite";
        case ErrorCode::beyond_fp16:
            return "beyond fp16";
        case ErrorCode::format:
            return "format";
        case ErrorCode::mismatch:
            return "mismatch";
        case ErrorCode::io:
            return "io";
        case ErrorCode::out_of_memory:
            return "out of memory";
    }
    return "unknown";
}

/// The one exception type of the library.
class Error : public std::runtime_error {
  public:
    Error(ErrorCode code, const std::string& sentence) : std::runtime_error(sentence), code_(code) {}
    ErrorCode code() const noexcept { return code_; }

  private:
    ErrorCode code_;
};

namespace detail {

/// One part of a sentence: text, a character or a number.
class Part {
  public:
    Part(const char* text) noexcept : kind_(Kind::text), text_(text) {}
    Part(std::string_view text) noexcept : kind_(Kind::text), text_(text) {}
    Part(const std::string& text) noexcept : kind_(Kind::text), text_(text) {}
    Part(char character) noexcept : kind_(Kind::character), character_(character) {}
    template <std::signed_integral Number>
    Part(Number number) noexcept : kind_(Kind::signed_number), signed_(number) {}
    template <std::unsigned_integral Number>
    Part(Number number) noexcept : kind_(Kind::unsigned_number), unsigned_(number) {}
    Part(double number) noexcept : kind_(Kind::real_number), real_(number) {}
    Part(float number) noexcept : Part(static_cast<double>(number)) {}

    /// Numbers look as std::ostream prints them: real ones with six significant digits.
    void append_to(std::string& sentence) const;

  private:
    enum class Kind : unsigned char { text, character, signed_number, unsigned_number, real_number };
    Kind kind_;
    union {
        std::string_view text_;
        char character_;
        long long signed_;
        unsigned long long unsigned_;
        double real_;
    };
};

[[noreturn]] void refuse(ErrorCode code, std::initializer_list<Part> parts);

}  // namespace detail

/// Refuses: throws Error, or aborts with the same sentence where exceptions are off. The parts follow one
/// another: fail(ErrorCode::shape, "keys: ", 3, " rows, expected 4").
template <class... Parts>
[[noreturn]] void fail(ErrorCode code, const Parts&... parts) {
    detail::refuse(code, {detail::Part(parts)...});
}

/// fail() unless the condition holds. The parts are only put together when it does not.
template <class... Parts>
void require(bool condition, ErrorCode code, const Parts&... parts) {
    if (!condition) [[unlikely]]
        fail(code, parts...);
}

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/impl/error.hpp"
#endif
