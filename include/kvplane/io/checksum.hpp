// kvplane/io/checksum.hpp: the hash that cache files are checked by. io/cache_file.hpp describes it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

namespace kvplane::detail {

/// 8 bytes, at any address.
inline std::uint64_t checksum_word(const std::byte* bytes) noexcept {
    std::uint64_t word;
    std::memcpy(&word, bytes, sizeof(word));
    return word;
}

/// A hash of words.
class WordHash {
  public:
    explicit WordHash(std::uint64_t first = 0) noexcept : state_(0xCBF29CE484222325ull + first) {}

    void add(std::uint64_t word) noexcept {
        state_ = (state_ ^ word) * 0x100000001B3ull;
        state_ ^= state_ >> 29;  // a plain product would never move high bits of a word down
    }
    std::uint64_t state() const noexcept { return state_; }
    std::string text() const { return std::to_string(state_); }

  private:
    std::uint64_t state_;
};

/// An array in one lane: of bases, and of all arrays of formats 3 and 4.
inline void add_serial(WordHash& sum, std::span<const std::byte> bytes) noexcept {
    sum.add(bytes.size());
    std::size_t at = 0;
    for (; at + 8 <= bytes.size(); at += 8) sum.add(checksum_word(bytes.data() + at));
    std::uint64_t rest = 0;
    if (at < bytes.size()) std::memcpy(&rest, bytes.data() + at, bytes.size() - at);
    sum.add(rest);
}

/// An array that comes in pieces, in four lanes, whose products need not wait for each other. Its size in
/// bytes goes into the sum before.
class LaneHash {
  public:
    void add(std::span<const std::byte> piece) noexcept {
        if (held_ > 0) {
            const std::size_t count = std::min(block - held_, piece.size());
            if (count > 0) std::memcpy(rest_.data() + held_, piece.data(), count);
            held_ += count;
            piece = piece.subspan(count);
            if (held_ < block) return;
            add_block(rest_.data());
        }
        std::array<WordHash, 4> lanes = lanes_;  // in registers
        std::size_t at = 0;
        for (; at + block <= piece.size(); at += block)
            for (std::size_t i = 0; i < lanes.size(); ++i)
                lanes[i].add(checksum_word(piece.data() + at + 8 * i));
        lanes_ = lanes;
        held_ = piece.size() - at;
        if (held_ > 0) std::memcpy(rest_.data(), piece.data() + at, held_);
    }
    /// Adds the whole array to a sum.
    void finish(WordHash& sum) noexcept {
        if (held_ > 0) {
            std::memset(rest_.data() + held_, 0, block - held_);
            add_block(rest_.data());
        }
        for (const WordHash& lane : lanes_) sum.add(lane.state());
    }

  private:
    static constexpr std::size_t block = 32;

    void add_block(const std::byte* words) noexcept {
        for (std::size_t i = 0; i < lanes_.size(); ++i) lanes_[i].add(checksum_word(words + 8 * i));
    }

    std::array<WordHash, 4> lanes_{WordHash(0), WordHash(1), WordHash(2), WordHash(3)};
    std::array<std::byte, block> rest_;
    std::size_t held_ = 0;  ///< bytes of the rest
};

}  // namespace kvplane::detail
