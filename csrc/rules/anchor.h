// An anchor: a pull back to where a weight has been, after the rule has moved it.
//
// Minimising l(w) + lambda/2 sum F (w - w*)^2 by a gradient step on l and a proximal step on the
// penalty (Parikh & Boyd 2014, "Proximal algorithms", section 4.2), decoupled from the rule's
// moments as AdamW's decay is:
//
//     w <- (w + kappa w*) / (1 + kappa)          kappa = lr lambda F
//
// which is stable for every strength. F = 1 is L2-SP (Li, Grandvalet & Davoine 2018, equation 2), F
// the diagonal of the Fisher information is EWC (Kirkpatrick et al. 2017, equation 3).
#pragma once

#include "core/annotations.h"
#include "core/floating.h"

namespace fusestep::rules {

template <class T>
struct Anchor {
  T strength;  // lr lambda

  FUSESTEP_HOST_DEVICE T operator()(T w, T reference, T importance) const {
    return pulled(w, reference, strength * importance);
  }
  FUSESTEP_HOST_DEVICE T operator()(T w, T reference) const {
    return pulled(w, reference, strength);
  }

 private:
  // Written from the end that is nearer: no pull leaves w, and the strongest gives w*, to the bit.
  FUSESTEP_HOST_DEVICE static T pulled(T w, T reference, T pull) {
    const T kappa = pull <= largest(pull) ? pull : largest(pull);  // the product may overflow
    const T away = w - reference;
    const T share = away / (T{1} + kappa);
    return kappa < T{1} ? w - kappa * share : reference + share;
  }
};

}  // namespace fusestep::rules
