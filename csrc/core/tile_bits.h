// Which elements of a tile are meant: one bit for each.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#include "core/tiling.h"

namespace fusestep {

class TileBits {
 public:
  static constexpr std::int64_t kWord = 64, kWords = kTileSize / kWord;

  static TileBits first(std::int64_t count) {
    TileBits bits;
    bits.set(0, count);
    return bits;
  }

  using Bytes = std::array<unsigned char, static_cast<std::size_t>(kTileSize)>;

  // The bits of bytes that are 1 or 0. Eight at a time: the product brings the lowest bit of each
  // byte into the highest byte.
  static TileBits of(const Bytes& bytes) {
    TileBits bits;
    for (std::size_t i = 0; i < bytes.size(); i += 8) {
      std::uint64_t eight;
      std::memcpy(&eight, &bytes[i], sizeof eight);
      bits.words[i / 64] |= ((eight * 0x0102040810204080ull) >> 56) << (i % 64);
    }
    return bits;
  }

  void unset(std::int64_t i) {
    words[static_cast<std::size_t>(i / kWord)] &= ~(std::uint64_t{1} << (i % kWord));
  }

  void set(std::int64_t begin, std::int64_t end) {
    for (std::int64_t word = begin / kWord; word * kWord < end; ++word) {
      const std::int64_t low = std::max(begin - word * kWord, std::int64_t{0});
      const std::int64_t high = std::min(end - word * kWord, kWord);
      words[static_cast<std::size_t>(word)] |= below(high) & ~below(low);
    }
  }

  bool operator[](std::int64_t i) const {
    return words[static_cast<std::size_t>(i / kWord)] >> (i % kWord) & 1;
  }

  bool any() const {
    return std::ranges::any_of(words, [](std::uint64_t word) { return word != 0; });
  }

  std::int64_t count() const {
    std::int64_t total = 0;
    for (const std::uint64_t word : words) total += std::popcount(word);
    return total;
  }

  bool all(std::int64_t begin, std::int64_t end) const { return next(begin, false) >= end; }

  std::int64_t first_set() const { return next(0, true); }

  struct Stretch {
    std::int64_t begin, end;
  };

  // The first bits in a row that are set, and all of them.
  Stretch first_run() const {
    const std::int64_t begin = next(0, true);
    return {begin, next(begin, false)};
  }

  // True where none is set from this one on.
  bool none_from(std::int64_t begin) const { return next(begin, true) == kTileSize; }

  // How many runs of bits that are set there are.
  std::int64_t runs() const {
    std::int64_t total = 0;
    std::uint64_t before = 0;  // the bit before the word, at its lowest place
    for (const std::uint64_t word : words) {
      total += std::popcount(word & ~(word << 1 | before));
      before = word >> (kWord - 1);
    }
    return total;
  }

  // One byte for each bit: 0 where it is not set. Eight at a time: each byte of a product with
  // 0x01... is all eight bits, of which each keeps its own.
  Bytes bytes() const {
    Bytes result;
    for (std::size_t i = 0; i < result.size(); i += 8) {
      const std::uint64_t eight = words[i / 64] >> (i % 64) & 0xff;
      const std::uint64_t spread = (eight * 0x0101010101010101ull) & 0x8040201008040201ull;
      std::memcpy(&result[i], &spread, sizeof spread);
    }
    return result;
  }

  TileBits operator&(const TileBits& other) const {
    TileBits both;
    for (std::size_t i = 0; i < words.size(); ++i) both.words[i] = words[i] & other.words[i];
    return both;
  }

  TileBits without(const TileBits& other) const {
    TileBits rest;
    for (std::size_t i = 0; i < words.size(); ++i) rest.words[i] = words[i] & ~other.words[i];
    return rest;
  }

  bool operator==(const TileBits&) const = default;

  // Calls visit(begin, end) for each run of bits that are set.
  template <class Visit>
  void for_each_run(Visit visit) const {
    for (std::int64_t at = next(0, true); at < kTileSize;) {
      const std::int64_t end = next(at, false);
      visit(at, end);
      at = next(end, true);
    }
  }

  std::array<std::uint64_t, static_cast<std::size_t>(kWords)> words{};

 private:
  static std::uint64_t below(std::int64_t bit) {
    return bit >= kWord ? ~std::uint64_t{0} : (std::uint64_t{1} << bit) - 1;
  }

  // The first place from `at` on where the bit has this value; kTileSize where there is none.
  std::int64_t next(std::int64_t at, bool value) const {
    while (at < kTileSize) {
      const std::uint64_t word = words[static_cast<std::size_t>(at / kWord)];
      const std::uint64_t rest = (value ? word : ~word) >> (at % kWord);
      if (rest != 0) return at + std::countr_zero(rest);
      at = (at / kWord + 1) * kWord;
    }
    return kTileSize;
  }
};

}  // namespace fusestep
