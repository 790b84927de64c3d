// tests/joined_main.cpp: main of a program that joins the test files of a folder.
//
//   cache_tests                          runs the tests of all files
//   cache_tests --of=cache/edit_test.cpp  those of one file
//
// A filter that only leaves tests out, -NAME, does so of these too. One that names tests counts instead of the file:
// that is how googletest starts the program again for a test that must die.
//
// Googletest knows the file of each test, so nobody lists what a file has.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <string>
#include <string_view>

namespace {

[[noreturn]] void refuse(const std::string& sentence) {
    std::cerr << sentence << '\n';
    std::exit(2);
}

bool ends_with_path(std::string_view path, std::string_view end) {
    return path.ends_with(end) && (path.size() == end.size() || path[path.size() - end.size() - 1] == '/');
}

/// What googletest's filter calls the tests of `file`: "Suite.*" where all tests of a suite are of that file.
std::string tests_of(std::string_view file) {
    const testing::UnitTest& all = *testing::UnitTest::GetInstance();
    std::string patterns;
    for (int i = 0; i < all.total_test_suite_count(); ++i) {
        const testing::TestSuite& suite = *all.GetTestSuite(i);
        std::string some;
        int count = 0;
        for (int j = 0; j < suite.total_test_count(); ++j) {
            const testing::TestInfo& test = *suite.GetTestInfo(j);
            // ctest runs this program once for each file, and would never run such a test.
            if (!std::string_view(test.file()).ends_with("_test.cpp"))
                refuse(std::string(test.file()) + ": has the test " + suite.name() + "." + test.name() +
                       ", expected in a file *_test.cpp");
            if (!ends_with_path(test.file(), file)) continue;
            some += std::string(suite.name()) + "." + test.name() + ":";
            ++count;
        }
        patterns += count > 0 && count == suite.total_test_count() ? std::string(suite.name()) + ".*:" : some;
    }
    if (patterns.empty()) refuse("--of=" + std::string(file) + ": no test is of that file");
    return patterns;
}

}  // namespace

int main(int count, char** arguments) {
    testing::InitGoogleTest(&count, arguments);
    constexpr std::string_view option = "--of=";
    if (count > 2 || (count == 2 && !std::string_view(arguments[1]).starts_with(option)))
        refuse("expected --of=FILE or googletest's options, not '" + std::string(arguments[count - 1]) + "'");
    if (count == 2) {
        std::string& filter = testing::GTEST_FLAG(filter);
        const std::size_t dash = std::min(filter.find('-'), filter.size());
        const std::string named = filter.substr(0, dash), left_out = filter.substr(dash);
        if (named.empty() || named == "*")
            filter = tests_of(std::string_view(arguments[1]).substr(option.size())) + left_out;
    }
    return RUN_ALL_TESTS();
}
