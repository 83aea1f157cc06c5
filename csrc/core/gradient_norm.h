// The L2 norm of all gradients of a step together, and what is done with it.
#pragma once

#include "core/annotations.h"
#include "core/floating.h"

namespace fusestep {

struct GradientNorm {
  double value;
  bool finite;  // no gradient holds a NaN or an infinity
};

FUSESTEP_HOST_DEVICE bool is_finite(double x) { return x >= -largest(x) && x <= largest(x); }

// Where the squares of float64 gradients add up to more than a float64 holds, they are summed again
// with each gradient multiplied by this. A power of two changes no digit.
inline constexpr double kPrescale = 0x1p-600;

// The norm, given the sum of the squares.
FUSESTEP_HOST_DEVICE GradientNorm norm_of(double sum) { return {square_root(sum), is_finite(sum)}; }

// The norm, given the sum of the squares of prescaled gradients.
FUSESTEP_HOST_DEVICE GradientNorm norm_of_prescaled(double sum) {
  return {square_root(sum) * (1 / kPrescale), is_finite(sum)};
}

// What gradients of this norm are multiplied by, as in torch.nn.utils.clip_grad_norm_, with its
// 1e-6.
FUSESTEP_HOST_DEVICE double clip_factor(double max_norm, double norm) {
  const double clip = max_norm / (norm + 1e-6);
  return clip < 1 || clip != clip ? clip : 1;
}

// The norm of two vectors together, given the norm of each. (std::hypot may differ from one C
// library to the next.)
FUSESTEP_HOST_DEVICE double hypotenuse(double a, double b) {
  const double larger = a < b ? b : a;
  if (larger == 0 || !is_finite(larger)) return a + b;
  return larger * square_root((a / larger) * (a / larger) + (b / larger) * (b / larger));
}

}  // namespace fusestep
