// tests/test_folder.hpp: a test with a folder of its own.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <random>
#include <string>

namespace kvplane_test {

/// The folder is empty at first, and goes with the test.
class FolderTest : public testing::Test {
  protected:
    FolderTest()
        : folder_(std::filesystem::temp_directory_path() /
                  ("kvplane_test_" + std::to_string(std::random_device{}()))) {
        std::filesystem::create_directory(folder_);
    }
    ~FolderTest() override { std::filesystem::remove_all(folder_); }

    std::filesystem::path folder_;
};

}  // namespace kvplane_test
