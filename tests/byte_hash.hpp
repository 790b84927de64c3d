// tests/byte_hash.hpp: one number for many bytes, which tests compare with what it was.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvplane_test {

/// FNV-1a.
class ByteHash {
  public:
    void add(const void* data, std::size_t size) {
        for (std::size_t i = 0; i < size; ++i)
            value_ = (value_ ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001B3u;
    }
    std::uint64_t value() const { return value_; }

  private:
    std::uint64_t value_ = 0xCBF29CE484222325u;
};

}  // namespace kvplane_test
