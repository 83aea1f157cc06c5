// The losses of linear models, as functions of the prediction p = w x, and what a sample does to p.
//
//     squared     (p - y)^2 / 2
//     logistic    ln(1 + e^(-y p))      y = 1 or -1
//     hinge       max(0, 1 - y p)       y = 1 or -1
//
// A plain step moves w by the derivative at p. An importance-aware step (Karampatziakis & Langford
// 2011, "Online importance weight aware updates", arXiv:1011.1576) moves it by what infinitely many
// small steps would, h of them in all: with q = sum a x^2 for the metric a (diagonal, the learning
// rate included), w(t)' = -l'(p(t)) a x and so p(t)' = -q l'(p(t)). Then
//
//     w <- w - s a x      s = integral of l'(p(t)) from t = 0 to h = (p(0) - p(h)) / q
//
// in closed form, or nearly: section 3 of the paper. p(h) lies between p and the label, however
// large h is, and two steps of h/2 are one of h.
#pragma once

#include <cstdint>

#include "core/elementary.h"

namespace fusestep::linear {

enum class Loss : std::uint8_t { squared, logistic, hinge, softmax };

// The root d of d + e (exp(d) - 1) = r, for e >= 0.
//
// Halley's steps from above. The left side rises and is convex, so r / (1 + e) lies above the root;
// where r > 0 so does ln(1 + r / e), and where r < 0, r + e. The nearest of them is near enough for
// two or three steps.
inline double root_of_line_and_exponential(double e, double r) {
  double d = r / (1 + e);
  if (d > 1 && 1 + r / e < 1e300) {
    const double bound = log_of(1 + r / e);
    d = bound < d ? bound : d;
  } else if (r < 0 && r + e < d) {
    d = r + e;
  }
  for (int i = 0; i < 100; ++i) {
    const double grown = expm1_of(d);
    const double value = (d - r) + e * grown;
    const double curvature = e + e * grown, slope = 1 + curvature;
    const double newton = value / slope;
    const double step = newton / (1 - 0.5 * newton * curvature / slope);
    d -= step;
    if (!(step * step > 1e-12 * d * d)) break;  // what is left is of the order of the step's cube
  }
  return d;
}

struct Squared {
  static double derivative(double p, double y) { return p - y; }

  // The distance to the label shrinks by e^(-h q).
  static double integral(double p, double y, double h, double q) {
    return (p - y) * (-expm1_of(-h * q) / q);
  }
};

struct Logistic {
  static double derivative(double p, double y) { return -y / (1 + exp_of(y * p)); }

  // The margin m = y p grows by d with m + d + e^(m + d) = m + e^m + h q: the paper has the same by
  // Lambert's function, which overflows, and loses the digits of a small d.
  static double integral(double p, double y, double h, double q) {
    const double margin = y * p, length = h * q;
    double d;
    if (margin < 0 && length > 700)  // e^d would overflow; the new margin is positive or close
      d = root_of_line_and_exponential(1, (margin + length) + expm1_of(margin)) - margin;
    else
      d = root_of_line_and_exponential(exp_of(margin < 700 ? margin : 700), length);
    return -y * d / q;
  }
};

struct Hinge {
  static double derivative(double p, double y) { return y * p < 1 ? -y : 0; }

  static double integral(double p, double y, double h, double q) {
    const double missing = 1 - y * p;
    if (missing <= 0) return 0;
    return -y * (h * q < missing ? h : missing / q);
  }
};

}  // namespace fusestep::linear
