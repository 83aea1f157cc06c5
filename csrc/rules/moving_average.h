// An exponential moving average, a <- beta a + (1 - beta) x: of gradients, and of parameters.
#pragma once

#include "core/annotations.h"

namespace fusestep::rules {

// Written as a + ((1 - beta) x - (1 - beta) a) where beta >= 1/2: in float32, 0.999 and 0.001 as
// they are stored add up to 1 + 1.3e-8, which the sum of many steps turns into a v that is 1.3e-5
// too large. Below 1/2 the other form is the accurate one (with beta = 0 it must give x, whatever a
// is).
template <class T>
struct MovingAverage {
  T beta, one_minus_beta;

  FUSESTEP_HOST_DEVICE explicit MovingAverage(double beta)
      : beta(static_cast<T>(beta)), one_minus_beta(static_cast<T>(1 - beta)) {}

  FUSESTEP_HOST_DEVICE bool is_long() const { return beta >= T{0.5}; }

  FUSESTEP_HOST_DEVICE T operator()(T a, T share) const {
    return is_long() ? a + (share - one_minus_beta * a) : beta * a + share;
  }

  // Of x itself, where its share need not be worked out in another order.
  FUSESTEP_HOST_DEVICE T of(T a, T x) const { return (*this)(a, one_minus_beta * x); }
};

}  // namespace fusestep::rules
