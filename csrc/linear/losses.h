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
// The left side rises and is convex. Halley's steps, whose errors are cubed, start from an upper
// bound near enough for two or three of them: where the exponential's series up to the square is r,
// or, if that is nearer, where the exponential's part alone is r. (Where r is far below 0: where
// the exponential's part is linear, or -e.)
inline double root_of_line_and_exponential(double e, double r) {
  const auto halley = [](double value, double slope, double curvature) {
    return value * slope / (slope * slope - 0.5 * value * curvature);
  };
  const double line = 1 + e;
  double d = r / line < r + e ? r / line : r + e;
  if (r > -0.25 * line) d = 2 * r / (line + square_root(line * line + 2 * e * r));
  if (d > 1 && 1 + r / e < 1e300) {
    const double bound = log_of(1 + r / e);
    if (bound < d) d = bound - halley(bound, line + r, e + r);
  }
  for (int i = 0; i < 100; ++i) {
    const double grown = e * expm1_of(d), curvature = e + grown;
    const double step = halley((d - r) + grown, 1 + curvature, curvature);
    d -= step;
    const double size = step < 0 ? -step : step;
    if (!(size * size * size > 1e-14 * (d < 0 ? -d : d))) break;
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
