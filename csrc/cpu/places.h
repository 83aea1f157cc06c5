// Elements of a tile that do not lie together, by their places in it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/tiling.h"

namespace fusestep::cpu {

class Places {
 public:
  void add(std::int64_t begin, std::int64_t end) {
    while (begin < end) place_[static_cast<std::size_t>(count_++)] = static_cast<Place>(begin++);
  }

  std::int64_t count() const { return count_; }
  std::int64_t operator[](std::int64_t i) const { return place_[static_cast<std::size_t>(i)]; }

  // Brings those with the same key(place), an unsigned number of 32 bits, together; they stay in
  // order. Digit by digit: keys are step counts, nearly always so close that there is one digit.
  template <class Key>
  void sort_by(Key key) {
    std::array<std::uint32_t, static_cast<std::size_t>(kTileSize)> keys;  // by place
    std::uint32_t least = ~std::uint32_t{0}, most = 0;
    for (std::int64_t i = 0; i < count_; ++i) {
      const Place place = place_[static_cast<std::size_t>(i)];
      keys[place] = key(place);
      least = std::min(least, keys[place]);
      most = std::max(most, keys[place]);
    }
    constexpr int kDigitBits = 8;
    for (int shift = 0; shift < 32 && (most - least) >> shift != 0; shift += kDigitBits)
      sort_by_digit([&](Place place) {
        return static_cast<std::size_t>((keys[place] - least) >> shift) % (1 << kDigitBits);
      });
  }

 private:
  using Place = std::uint16_t;

  template <class Digit>
  void sort_by_digit(Digit digit) {
    const auto before = place_;
    std::array<std::size_t, 257> first{};  // where places with each digit begin
    for (std::int64_t i = 0; i < count_; ++i)
      ++first[digit(before[static_cast<std::size_t>(i)]) + 1];
    for (std::size_t i = 1; i < first.size(); ++i) first[i] += first[i - 1];
    for (std::int64_t i = 0; i < count_; ++i) {
      const Place place = before[static_cast<std::size_t>(i)];
      place_[first[digit(place)]++] = place;
    }
  }

  std::int64_t count_ = 0;
  std::array<Place, static_cast<std::size_t>(kTileSize)> place_;
};

}  // namespace fusestep::cpu
