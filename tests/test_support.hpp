// tests/test_support.hpp: what several tests need: seeds that are printed, and refusals that are checked.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <random>
#include <string>
#include <utility>

#include "kvplane/error.hpp"

namespace kvplane_test {

/// The seed of a random test: KVPLANE_TEST_SEED from the environment, or the given one; printed either way.
inline std::uint64_t seed(std::uint64_t standard = 20240607) {
    const char* chosen = std::getenv("KVPLANE_TEST_SEED");
    const std::uint64_t value = chosen ? std::strtoull(chosen, nullptr, 10) : standard;
    std::cout << "seed " << value << " (KVPLANE_TEST_SEED)\n";
    return value;
}

/// Whether a sanitizer makes everything some ten times slower.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool sanitized = true;
#elif defined(__has_feature)
inline constexpr bool sanitized = __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
inline constexpr bool sanitized = false;
#endif

/// Of a long list of cases all, or every fifth under a sanitizer.
template <class List>
List thinned(List cases) {
    if (!sanitized) return cases;
    List some;
    for (std::size_t i = 0; i < cases.size(); i += 5) some.push_back(std::move(cases[i]));
    return some;
}

/// How often a random test draws: KVPLANE_TEST_ROUNDS from the environment, or the given number.
inline int rounds(int standard) {
    const char* chosen = std::getenv("KVPLANE_TEST_ROUNDS");
    return chosen ? std::max(1, std::atoi(chosen)) : standard;
}

/// Runs `call` and returns the sentence with which it was refused, "" (and a test failure) where it was not.
template <class Call>
std::string refusal(kvplane::ErrorCode expected, Call&& call) {
    try {
        call();
    } catch (const kvplane::Error& error) {
        EXPECT_EQ(error.code(), expected) << error.what();
        return error.what();
    }
    ADD_FAILURE() << "accepted; expected a refusal of kind '" << kvplane::name(expected) << "'";
    return "";
}

}  // namespace kvplane_test
