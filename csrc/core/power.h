// base^n and e^x as fixed sequences of IEEE operations.
//
// Bias corrections need them once a step. std::pow would do, but its last bit depends on the C
// library and, through run-time dispatch inside it, on the processor; these do not.
#pragma once

#include <cstdint>

#include "core/annotations.h"

namespace fusestep {

// base^n for n >= 0 by repeated squaring; relative error below n * 2^-52.
FUSESTEP_HOST_DEVICE double power(double base, std::int64_t n) {
  double result = 1;
  for (; n > 0; n >>= 1, base *= base)
    if (n & 1) result *= base;
  return result;
}

// e^x for -700 < x <= 0 (below, 0): e^x = (e^(x / 1024))^1024 with a Taylor series inside.
FUSESTEP_HOST_DEVICE double exponential(double x) {
  if (x < -700) return 0;
  constexpr int kSquarings = 10;
  const double r = x / (1 << kSquarings);  // |r| < 0.69, exact: a division by a power of two
  // expm1 keeps the digits that 1 + r would lose before they are squared ten times.
  double series = 0;
  for (int k = 20; k >= 1; --k) series = r / k * (1 + series);
  for (int i = 0; i < kSquarings; ++i) series = series * (2 + series);  // (1 + s)^2 - 1
  return 1 + series;
}

}  // namespace fusestep
