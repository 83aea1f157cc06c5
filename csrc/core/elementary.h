// e^x, e^x - 1 and the logarithm as fixed sequences of IEEE operations, to a few units in the last
// place: the C library's differ between its versions and between processors.
#pragma once

#include <cstdint>
#include <limits>

#include "core/annotations.h"
#include "core/floating.h"

namespace fusestep {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// x = exponent ln 2 + rest with |rest| <= ln(2) / 2, for |x| < 745.
struct ReducedExponent {
  double power_of_two;  // 2^exponent
  double series;        // e^rest - 1

  FUSESTEP_HOST_DEVICE explicit ReducedExponent(double x) {
    constexpr double kRound = 0x1.8p52;  // adding it leaves no digits behind the point
    const double exponent = (x * 0x1.71547652b82fep+0 + kRound) - kRound;
    // ln 2 in two parts, of which the first times any exponent is exact.
    const double r = (x - exponent * 0x1.62e42feep-1) - exponent * 0x1.a39ef35793c76p-33;
    power_of_two = bit_cast<double>(
        static_cast<std::uint64_t>(static_cast<std::int64_t>(exponent) + 1023) << 52);
    // Taylor's series, its terms in pairs: a chain of twelve would take thrice as long.
    const double r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
    const double low = (1. / 2 + r * (1. / 6)) + r2 * (1. / 24 + r * (1. / 120));
    const double middle = (1. / 720 + r * (1. / 5040)) + r2 * (1. / 40320 + r * (1. / 362880));
    const double high =
        (1. / 3628800 + r * (1. / 39916800)) + r2 * (1. / 479001600 + r * (1. / 6227020800));
    series = r + r2 * ((low + r4 * middle) + r8 * high);
  }
};

// e^x; infinite above e^709, 0 below e^-708.
FUSESTEP_HOST_DEVICE double exp_of(double x) {
  if (x > 709) return kInfinity;
  if (x < -708) return 0;
  const ReducedExponent e(x);
  return e.power_of_two + e.power_of_two * e.series;
}

// e^x - 1, which keeps the digits of a small x.
FUSESTEP_HOST_DEVICE double expm1_of(double x) {
  if (x > 709) return kInfinity;
  if (x < -50) return -1;
  const ReducedExponent e(x);
  return (e.power_of_two - 1) + e.power_of_two * e.series;
}

// The natural logarithm of a normal x > 0.
FUSESTEP_HOST_DEVICE double log_of(double x) {
  // x = 2^exponent m with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh((m - 1) / (m + 1)).
  const auto bits = bit_cast<std::uint64_t>(x);
  const std::uint64_t shifted = bits - bit_cast<std::uint64_t>(0x1.6a09e667f3bcdp-1);
  const std::int64_t exponent = static_cast<std::int64_t>(shifted) >> 52;
  const double m = bit_cast<double>(bits - (static_cast<std::uint64_t>(exponent) << 52));
  const double t = (m - 1) / (m + 1), t2 = t * t;
  const double t4 = t2 * t2, t8 = t4 * t4;
  const double low = (1. / 3 + t2 * (1. / 5)) + t4 * (1. / 7 + t2 * (1. / 9));
  const double high = (1. / 11 + t2 * (1. / 13)) + t4 * (1. / 15 + t2 * (1. / 17));
  const double series = t2 * (low + t8 * (high + t8 * (1. / 19 + t2 * (1. / 21))));
  return static_cast<double>(exponent) * 0x1.62e42fefa39efp-1 + 2 * (t + t * series);
}

}  // namespace fusestep
