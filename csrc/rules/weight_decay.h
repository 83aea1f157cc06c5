// Weight decay, in the two forms that rules offer.
//
//     coupled (L2)   g <- g + lambda w           the decay passes through the rule's moments
//     decoupled      w <- (1 - lr lambda) w      Loshchilov & Hutter (2019), Algorithm 2, line 12
#pragma once

#include "core/annotations.h"

namespace fusestep::rules {

template <class T>
struct WeightDecay {
  T coupled;  // lambda, or 0
  T shrink;   // lr lambda, or 0

  FUSESTEP_HOST_DEVICE static WeightDecay l2(double lambda) {
    return {static_cast<T>(lambda), T{0}};
  }

  FUSESTEP_HOST_DEVICE static WeightDecay of(double lambda, bool decoupled, double lr) {
    return decoupled ? WeightDecay{T{0}, static_cast<T>(lr * lambda)} : l2(lambda);
  }

  FUSESTEP_HOST_DEVICE bool is_coupled() const { return coupled != T{0}; }

  // Shrinks w where the decay is decoupled; returns the gradient with the decay that is coupled.
  //
  // Tests, not multiplications by zero: 0 * Inf would turn an infinite weight into NaN. And
  // w - shrink w, not (1 - shrink) w: rounding 1 - shrink to float32 errs the same way every step.
  FUSESTEP_HOST_DEVICE T operator()(T& w, T g) const {
    const T decayed = is_coupled() ? g + coupled * w : g;
    w = shrink != T{0} ? w - shrink * w : w;
    return decayed;
  }
};

}  // namespace fusestep::rules
