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
  T keep;     // 1 - lr lambda, or 1

  static WeightDecay l2(double lambda) { return {static_cast<T>(lambda), T{1}}; }

  static WeightDecay of(double lambda, bool decoupled, double lr) {
    return decoupled ? WeightDecay{T{0}, static_cast<T>(1.0 - lr * lambda)} : l2(lambda);
  }

  // Shrinks w where the decay is decoupled; returns the gradient with the decay that is coupled.
  FUSESTEP_HOST_DEVICE T operator()(T& w, T g) const {
    // A test, not a multiplication by zero: 0 * Inf would turn an infinite weight into NaN.
    const T decayed = coupled != T{0} ? g + coupled * w : g;
    w *= keep;
    return decayed;
  }
};

}  // namespace fusestep::rules
