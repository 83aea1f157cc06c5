#include "linear/softmax.h"

#include <algorithm>

#include "core/elementary.h"
#include "linear/losses.h"

namespace fusestep::linear {
namespace {

// The root u of u + reach e^u = t: the logarithm of a class's probability after the step. The root
// of w + e^w = t + ln(reach), Wright's omega, is ln(reach) above it.
double log_of_probability(double t, double reach) {
  if (!(reach > 1e-300)) return t;
  const double shift = log_of(reach);
  return LineAndExponential::of(1).root((t + shift) - 1) - shift;
}

}  // namespace

void softmax_derivatives(const double* p, std::int64_t classes, std::int64_t label,
                         double* derivatives) {
  const double most = *std::max_element(p, p + classes);
  double total = 0;
  for (std::int64_t k = 0; k < classes; ++k) total += derivatives[k] = exp_of(p[k] - most);
  for (std::int64_t k = 0; k < classes; ++k) derivatives[k] /= total;
  // 1 - pi as the sum of the others: it keeps the digits of a small one.
  double others = 0;
  for (std::int64_t k = 0; k < classes; ++k) others += k == label ? 0 : derivatives[k];
  derivatives[label] = -others;
}

// With z the logarithm of the sum after the step, ln pi_k + h q_k (pi_k - [k = y]) = p_k - z. Given
// z this is one equation for each class; z is where the probabilities add up to 1. Their sum falls
// and is convex in z, so Newton's steps from the left stay there.
void softmax_integrals(const double* p, std::int64_t classes, std::int64_t label, double h,
                       const double* q, double* integrals, double* logs) {
  // Where one class alone has probability 1.
  double z = p[label];
  for (std::int64_t k = 0; k < classes; ++k)
    if (k != label) z = std::max(z, p[k] - h * q[k]);

  for (int i = 0; i < 100; ++i) {
    double excess = 0, slope = 0;  // of the sum over 1, in which the label has pi - 1
    for (std::int64_t k = 0; k < classes; ++k) {
      const double reach = h * q[k], t = p[k] - z;
      logs[k] = k == label ? LineAndExponential::of(reach).root(t) : log_of_probability(t, reach);
      const double probability = exp_of(logs[k]);
      excess += k == label ? expm1_of(logs[k]) : probability;
      slope += probability / (1 + reach * probability);
    }
    const double step = excess / slope;
    if (!(step > 1e-13)) break;  // rounding, from here on
    z += step;
  }

  for (std::int64_t k = 0; k < classes; ++k)
    integrals[k] = h * (k == label ? expm1_of(logs[k]) : exp_of(logs[k]));
}

}  // namespace fusestep::linear
