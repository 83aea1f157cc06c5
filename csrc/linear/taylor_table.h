// A smooth function by Taylor's polynomials around the multiples of 1/16: a third of the time that
// exponentials, divisions or iterations take one after the other. The next sample waits for it.
//
// Eight terms leave an error of a few units in the last place where the function's nearest pole is
// pi away, as those of the exponential's relatives are: the polynomial's variable is 1/32 at most.
#pragma once

#include <array>
#include <cstdint>

#include "core/floating.h"
#include "cpu/fp_environment.h"

namespace fusestep::linear {

inline constexpr int kTaylorTerms = 8;

template <int reach>  // of the points around 0
class TaylorTable {
 public:
  // find(x, c) finds the coefficients around x.
  template <class Find>
  explicit TaylorTable(Find find) {
    const cpu::IeeeEnvironment ieee;
    for (std::int64_t k = -kPoints; k <= kPoints; ++k)
      find(static_cast<double>(k) / kPointsPerUnit, around(k));
  }

  bool reaches(double x) const { return x >= -reach && x <= reach; }

  // The function's value, where that is within reach.
  double operator()(double x) const {
    constexpr double kRound = 0x1.8p52 / kPointsPerUnit;  // adding it rounds to the next point
    const double rounded = x + kRound, r = x - (rounded - kRound);
    const double* const c = around(static_cast<std::int64_t>(bit_cast<std::uint64_t>(rounded) -
                                                             bit_cast<std::uint64_t>(kRound)));
    // A tree of sums, whose powers of r are there before the coefficients are.
    const double r2 = r * r, r3 = r2 * r, r4 = r2 * r2;
    return ((c[0] + c[1] * r) + (c[2] * r2 + c[3] * r3)) +
           ((c[4] * r4 + c[5] * (r4 * r)) + (c[6] * (r4 * r2) + c[7] * (r4 * r3)));
  }

 private:
  static constexpr int kPointsPerUnit = 16;
  static constexpr std::int64_t kPoints = reach * kPointsPerUnit;

  double* around(std::int64_t k) { return lines_[static_cast<std::size_t>(kPoints + k)].c; }
  const double* around(std::int64_t k) const {
    return lines_[static_cast<std::size_t>(kPoints + k)].c;
  }

  struct alignas(64) Line {  // of a cache
    double c[kTaylorTerms];
  };
  std::array<Line, 2 * kPoints + 1> lines_;
};

}  // namespace fusestep::linear
