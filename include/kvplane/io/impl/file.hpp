// kvplane/io/impl/file.hpp: open, mmap, write, rename.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>
#include <utility>

#include "kvplane/error.hpp"
#include "kvplane/io/file.hpp"

namespace kvplane {

namespace detail {

/// Refuses with the reason that the system gave. `error` is errno, read before anything could change it.
[[noreturn]] inline void fail_io(const std::string& source, const char* action, int error) {
    fail(ErrorCode::io, source, ": ", action, ": ",
         std::error_code(error, std::generic_category()).message());
}

/// Closes a file that was only read.
class ReadDescriptor {
  public:
    explicit ReadDescriptor(int descriptor) noexcept : descriptor_(descriptor) {}
    ReadDescriptor(const ReadDescriptor&) = delete;
    ReadDescriptor& operator=(const ReadDescriptor&) = delete;
    ~ReadDescriptor() {
        if (descriptor_ >= 0) ::close(descriptor_);
    }
    int get() const noexcept { return descriptor_; }

  private:
    int descriptor_;
};

}  // namespace detail

KVPLANE_FUNCTION MappedFile MappedFile::open(const std::filesystem::path& path) {
    const std::string source = path.string();
    // Without O_NONBLOCK, opening a pipe would wait for its other end instead of being refused.
    const detail::ReadDescriptor file(::open(source.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (file.get() < 0) detail::fail_io(source, "cannot open", errno);
    struct stat status {};
    if (::fstat(file.get(), &status) != 0) detail::fail_io(source, "cannot read its size", errno);
    require(S_ISREG(status.st_mode), ErrorCode::io, source, ": not a regular file");
    MappedFile mapped;
    mapped.size_ = static_cast<std::size_t>(status.st_size);
    if (mapped.size_ == 0) return mapped;  // which mmap refuses
    void* const memory = ::mmap(nullptr, mapped.size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (memory == MAP_FAILED) detail::fail_io(source, "cannot map", errno);
    const auto unmap = [size = mapped.size_](const std::byte* data) {
        ::munmap(const_cast<std::byte*>(data), size);
    };
    mapped.data_ = std::shared_ptr<const std::byte>(static_cast<const std::byte*>(memory), unmap);
    return mapped;
}

KVPLANE_FUNCTION FileReplacement::FileReplacement(const std::filesystem::path& path)
    : target_(path.string()) {
    create();
}

KVPLANE_FUNCTION FileReplacement::~FileReplacement() {
    close();
    remove();
}

KVPLANE_FUNCTION void FileReplacement::create() {
    struct stat before {};
    const bool exists = ::lstat(target_.c_str(), &before) == 0;
    // A folder is refused by rename() itself.
    require(!exists || S_ISREG(before.st_mode) || S_ISLNK(before.st_mode) || S_ISDIR(before.st_mode),
            ErrorCode::io, target_,
            ": cannot replace a device, pipe or socket, expected a regular file or nothing");
    const bool replaces = exists && S_ISREG(before.st_mode);
    const std::string folder = std::filesystem::path(target_).parent_path().string();
    static std::atomic<unsigned> counter{0};
    do {
        const unsigned number = counter.fetch_add(1, std::memory_order_relaxed);
        // Not made from the target's name, which may be as long as the system allows.
        name_ = folder.empty() || folder.back() == '/' ? folder : folder + '/';
        name_.append(".kvplane-").append(std::to_string(::getpid())).append("-");
        name_.append(std::to_string(number)).append(".tmp");
        // What takes the place of a private file is private from the start.
        descriptor_ = ::open(name_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, replaces ? 0600 : 0666);
    } while (descriptor_ < 0 && errno == EEXIST);
    if (descriptor_ < 0) {
        const int error = errno;
        name_.clear();
        detail::fail_io(target_, "cannot create a file in its folder", error);
    }
    if (!replaces) return;
    struct stat now {};
    if (::fstat(descriptor_, &now) != 0) refuse("cannot read the permissions of its replacement");
    const bool owned = (now.st_uid == before.st_uid && now.st_gid == before.st_gid) ||
                       ::fchown(descriptor_, before.st_uid, before.st_gid) == 0 ||
                       ::fchown(descriptor_, static_cast<uid_t>(-1), before.st_gid) == 0;
    mode_t mode = before.st_mode & 0777U;
    if (!owned && now.st_gid != before.st_gid) mode &= ~static_cast<mode_t>(0070);  // of another group
    if ((now.st_mode & 0777U) != mode && ::fchmod(descriptor_, mode) != 0)
        refuse("cannot keep its permissions");
}

KVPLANE_FUNCTION void FileReplacement::write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
        const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
        if (written < 0 && errno != EINTR) refuse("cannot write");
        if (written > 0) bytes = bytes.subspan(static_cast<std::size_t>(written));
    }
}

KVPLANE_FUNCTION void FileReplacement::commit(const WriteOptions& options) {
    if (options.sync && ::fsync(descriptor_) != 0) refuse("cannot write");
    if (!close()) refuse("cannot write");
    if (::rename(name_.c_str(), target_.c_str()) != 0) refuse("cannot rename the finished file to this");
    name_.clear();
}

KVPLANE_FUNCTION void FileReplacement::refuse(const char* action) {
    const int error = errno;
    close();  // here and not in the destructor alone, which does not run where fail() aborts
    remove();
    detail::fail_io(target_, action, error);
}

/// False, with errno, where the system reports a write that failed late.
KVPLANE_FUNCTION bool FileReplacement::close() noexcept {
    return descriptor_ < 0 || ::close(std::exchange(descriptor_, -1)) == 0;
}

KVPLANE_FUNCTION void FileReplacement::remove() noexcept {
    if (!name_.empty()) ::unlink(name_.c_str());
    name_.clear();
}

}  // namespace kvplane
