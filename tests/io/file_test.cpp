// Files: mapped whole; replaced whole, with their permissions, and only where they are files.
#include "kvplane/io/file.hpp"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string>

#include "test_support.hpp"

namespace {

using kvplane::ErrorCode;
using kvplane::FileReplacement;
using kvplane::MappedFile;
using kvplane_test::refusal;

class Files : public testing::Test {
  protected:
    void SetUp() override {
        std::string pattern = (std::filesystem::temp_directory_path() / "kvplane-XXXXXX").string();
        ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
        folder_ = pattern;
    }
    void TearDown() override { std::filesystem::remove_all(folder_); }

    std::string path(const std::string& name) const { return (folder_ / name).string(); }
    void replace(const std::string& name, const std::string& text) const {
        FileReplacement file(path(name));
        file.write(std::as_bytes(std::span(text)));
        file.commit();
    }
    std::string text(const std::string& name) const {
        std::ifstream in(path(name), std::ios::binary);
        return {std::istreambuf_iterator<char>(in), {}};
    }
    struct stat status(const std::string& name) const {
        struct stat status {};
        EXPECT_EQ(::lstat(path(name).c_str(), &status), 0) << name;
        return status;
    }
    std::ptrdiff_t files() const { return std::distance(std::filesystem::directory_iterator(folder_), {}); }

    std::filesystem::path folder_;
};

TEST_F(Files, AMappingOutlivesItsFile) {
    replace("f", "seven b");
    MappedFile file = MappedFile::open(path("f"));
    const MappedFile copy = file;
    replace("f", "other");
    file = MappedFile::open(path("f"));
    EXPECT_EQ(file.bytes().size(), 5U);
    ASSERT_EQ(copy.bytes().size(), 7U);
    EXPECT_EQ(copy.bytes()[6], std::byte{'b'});
    replace("empty", "");
    EXPECT_TRUE(MappedFile::open(path("empty")).bytes().empty());
}

TEST_F(Files, WhatIsNoFileIsNotMapped) {
    ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
    EXPECT_NE(refusal(ErrorCode::io, [&] { MappedFile::open(path("pipe")); }).find("not a regular file"),
              std::string::npos);
    refusal(ErrorCode::io, [&] { MappedFile::open(folder_); });
    refusal(ErrorCode::io, [&] { MappedFile::open(path("absent")); });
}

TEST_F(Files, PermissionsAreKept) {
    for (const mode_t mode : {0600U, 0644U, 0640U, 0400U, 0755U, 0666U}) {
        const std::string name = "f" + std::to_string(mode);
        std::ofstream(path(name)) << "before";
        ASSERT_EQ(::chmod(path(name).c_str(), mode), 0);
        replace(name, "after");
        EXPECT_EQ(status(name).st_mode & 07777U, mode);
        EXPECT_EQ(text(name), "after");
    }
}

TEST_F(Files, AReplacementOfAPrivateFileIsPrivateFromTheStart) {
    std::ofstream(path("f")) << "before";
    ASSERT_EQ(::chmod(path("f").c_str(), 0600), 0);
    const FileReplacement file(path("f"));
    EXPECT_EQ(files(), 2);
    for (const auto& entry : std::filesystem::directory_iterator(folder_))
        EXPECT_EQ(status(entry.path().filename().string()).st_mode & 0777U, 0600U) << entry.path();
}

TEST_F(Files, TheOwnerIsKept) {
    if (::geteuid() != 0) GTEST_SKIP() << "files of others can be made by root alone";
    std::ofstream(path("f")) << "before";
    ASSERT_EQ(::chown(path("f").c_str(), 12345, 23456), 0);
    ASSERT_EQ(::chmod(path("f").c_str(), 0640), 0);
    replace("f", "after");
    EXPECT_EQ(status("f").st_uid, 12345U);
    EXPECT_EQ(status("f").st_gid, 23456U);
    EXPECT_EQ(status("f").st_mode & 07777U, 0640U);
}

TEST_F(Files, PipesSocketsAndDevicesAreNotReplaced) {
    const auto refused = [&](const std::string& name) {
        const mode_t before = status(name).st_mode;
        const std::ptrdiff_t count = files();
        const std::string sentence = refusal(ErrorCode::io, [&] { replace(name, "text"); });
        EXPECT_NE(sentence.find(path(name)), std::string::npos) << sentence;
        EXPECT_NE(sentence.find("regular file"), std::string::npos) << sentence;
        EXPECT_EQ(status(name).st_mode, before);
        EXPECT_EQ(files(), count);
    };
    ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
    refused("pipe");
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    ASSERT_LT(path("socket").size(), sizeof address.sun_path);
    path("socket").copy(address.sun_path, sizeof address.sun_path - 1);
    const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
    ASSERT_EQ(::bind(socket, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    refused("socket");
    ::close(socket);
    // As /dev/null; only where the system lets this process make one.
    if (::mknod(path("null").c_str(), S_IFCHR | 0666, (1 << 8) | 3) == 0) refused("null");
}

TEST_F(Files, ALinkIsReplacedAndNotFollowed) {
    replace("target", "kept");
    std::filesystem::create_symlink("target", path("link"));
    replace("link", "new");
    EXPECT_TRUE(S_ISREG(status("link").st_mode));
    EXPECT_EQ(text("target"), "kept");
    EXPECT_EQ(text("link"), "new");
}

TEST_F(Files, WhatIsNotCommittedVanishes) {
    replace("f", "kept");
    {
        FileReplacement file(path("f"));
        file.write(std::as_bytes(std::span("lost")));
        EXPECT_EQ(files(), 2);
    }
    EXPECT_EQ(files(), 1);
    EXPECT_EQ(text("f"), "kept");
}

}  // namespace
