// kvplane/io/file.hpp: files of the operating system: mapped for reading, replaced as a whole for writing.
// POSIX.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

#include "kvplane/compiled.hpp"

namespace kvplane {

/// A file's bytes, for reading. Copies share the mapping, which ends with the last of them. Another process
/// that shortens the file while it is mapped makes reads of the lost part fail with SIGBUS, as with every
/// mapped file.
class MappedFile {
  public:
    /// Maps a file, whose content is not read before it is looked at. Throws Error (io) where the system
    /// refuses, or `path` is no regular file.
    static MappedFile open(const std::filesystem::path& path);

    std::span<const std::byte> bytes() const noexcept { return {data_.get(), size_}; }
    /// Keeps the bytes mapped; nullptr for an empty file.
    const std::shared_ptr<const std::byte>& owner() const noexcept { return data_; }

  private:
    MappedFile() = default;

    std::shared_ptr<const std::byte> data_;
    std::size_t size_ = 0;
};

/// How a file is written.
struct WriteOptions {
    /// Whether the content is on the disk before the file takes its name, so that a power failure leaves what
    /// was there or all of the new file. Without it a power failure may leave a damaged file, but nobody
    /// waits for the disk: for what is no loss, such as tokens that can be computed again.
    bool sync = true;
};

/// Writes a file under another name in the same folder and renames it to its own in commit(), so that at any
/// time the file is either what it was or complete.
///
/// What is not committed is removed at the end. Only a process that is killed meanwhile leaves something
/// behind: `.kvplane-PID-N.tmp`, PID being its number.
class FileReplacement {
  public:
    /// Replaces a regular file, whose permissions and, where the system allows it, owner are kept, or a
    /// symbolic link, which is not followed. Where there is nothing, the new file is readable and writable as
    /// the process' umask says. Throws Error (io) where the system refuses, or a device, pipe or socket is at
    /// `path`.
    explicit FileReplacement(const std::filesystem::path& path);
    FileReplacement(const FileReplacement&) = delete;
    FileReplacement& operator=(const FileReplacement&) = delete;
    ~FileReplacement();

    /// Appends. Throws Error (io).
    void write(std::span<const std::byte> bytes);
    /// Syncs, where the options say so, and renames. Throws Error (io), and then what was at the path is
    /// untouched.
    void commit(const WriteOptions& options = {});

  private:
    void create();
    [[noreturn]] void refuse(const char* action);
    bool close() noexcept;
    void remove() noexcept;

    std::string target_;
    std::string name_;  // of the temporary file; empty where there is none
    int descriptor_ = -1;
};

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/io/impl/file.hpp"
#endif
