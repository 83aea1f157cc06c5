// A random permutation of 0 ... n - 1 of which any entry can be worked out by itself.
//
// The first k entries are k different numbers, drawn without replacement, and neither a list of n
// numbers nor a memory of earlier draws is needed: a GPU can work out each of them on its own.
//
// A Feistel network over pairs (Luby & Rackoff 1988), here of Z_a x Z_b with a b >= n (Black &
// Rogaway 2002, "Ciphers with arbitrary finite domains", section 5); a number that leaves 0 ... n -
// 1 is permuted again until it comes back (cycle walking, section 3 there), which is rare, since a
// b is hardly larger than n.
#pragma once

#include <cstdint>

#include "core/annotations.h"
#include "core/floating.h"
#include "core/random.h"

namespace fusestep::selections {

class Permutation {
 public:
  FUSESTEP_HOST_DEVICE Permutation(std::int64_t n, const RandomStream& random)
      : n_(static_cast<std::uint64_t>(n)), random_(random) {
    rows_ = static_cast<std::uint64_t>(square_root(static_cast<double>(n_)));
    if (rows_ == 0) rows_ = 1;
    columns_ = (n_ + rows_ - 1) / rows_;
  }

  FUSESTEP_HOST_DEVICE std::int64_t operator()(std::int64_t i) const {
    auto number = static_cast<std::uint64_t>(i);
    do {
      number = permuted(number);
    } while (number >= n_);
    return static_cast<std::int64_t>(number);
  }

 private:
  static constexpr std::uint64_t kRounds = 4;

  FUSESTEP_HOST_DEVICE std::uint64_t permuted(std::uint64_t number) const {
    std::uint64_t row = number / columns_, column = number % columns_;
    for (std::uint64_t round = 0; round < kRounds; round += 2) {
      row = added(row, below(rows_, round, column), rows_);
      column = added(column, below(columns_, round + 1, row), columns_);
    }
    return row * columns_ + column;
  }

  // A random number below `limit`, which is below 2^32.
  FUSESTEP_HOST_DEVICE std::uint64_t below(std::uint64_t limit, std::uint64_t round,
                                           std::uint64_t half) const {
    return ((random_.bits(half * kRounds + round) >> 32) * limit) >> 32;
  }

  FUSESTEP_HOST_DEVICE static std::uint64_t added(std::uint64_t a, std::uint64_t b,
                                                  std::uint64_t limit) {
    const std::uint64_t sum = a + b;
    return sum < limit ? sum : sum - limit;
  }

  std::uint64_t n_, rows_, columns_;
  RandomStream random_;
};

}  // namespace fusestep::selections
