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
  // overflow, gives w*, to the bit. Where both are so large that their difference overflows, in the
  // form in which it does not.
  FUSESTEP_HOST_DEVICE T operator()(T w, T reference, T importance) const {
    const T kappa = strength * importance;
    const T kept = T{1} / (T{1} + kappa);
    const T away = w - reference;
    const T near = kappa < T{1} ? w : reference;
    const T of_kept = kappa < T{1} ? -kappa : T{1};
    const T rest = kept == T{0} ? T{0} : w * kept;  // of a weight that may be infinite
    const T mixed = rest + reference * (T{1} - kept);
    const bool overflows = (away < -largest(away)) | (away > largest(away));
    const T pulled = overflows ? mixed : near + of_kept * (away * kept);
    return kappa == T{0} ? w : pulled;
  }
};

}  // namespace fusestep::rules
