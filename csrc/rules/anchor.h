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
  T strength;  // lr lambda; finite, so that an importance of 0 stays 0

  FUSESTEP_HOST_DEVICE static Anchor of(double strength) {
    const bool fits = strength < static_cast<double>(largest(T{}));
    return {fits ? static_cast<T>(strength) : largest(T{})};
  }

  // Written from the end that is nearer: no pull leaves w, and the strongest, for which kappa may
  // overflow, gives w*, to the bit. Where w - w* overflows, the result still lies between them.
  FUSESTEP_HOST_DEVICE T operator()(T w, T reference, T importance) const {
    const T kappa = strength * importance;
    const T difference = w - reference;
    const T above = difference > largest(w) ? largest(w) : difference;  // NaN stays
    const T away = above < -largest(w) ? -largest(w) : above;
    const T kept = away * (T{1} / (T{1} + kappa));
    const T near = kappa < T{1} ? w : reference;
    const T of_kept = kappa < T{1} ? -kappa : T{1};
    return kappa == T{0} ? w : near + of_kept * kept;
  }
};

}  // namespace fusestep::rules
