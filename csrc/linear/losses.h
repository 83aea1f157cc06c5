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
#include "linear/taylor_table.h"

namespace fusestep::linear {

enum class Loss : std::uint8_t { squared, logistic, hinge, softmax };

// The root d of d + share (d^2/2! + d^3/3! + ...) = t near 0: the first five terms of the inverse
// series. It converges for |t| < 1 at least, and the less the share, which is at most 1, the
// farther.
inline double inverse_series(double t, double share) {
  const double share2 = share * share;
  const double a2 = 1. / 2, a3 = share * (1. / 2) - 1. / 6;
  const double a4 = (1. / 24 - share * (5. / 12)) + share2 * (5. / 8);
  const double a5 = (share * (5. / 24) - 1. / 120) + share2 * (share * (7. / 8) - 7. / 8);
  const double t2 = t * t, scaled = share * t2;
  return t - scaled * ((a2 - a3 * t) + t2 * (a4 - a5 * t));
}

// The root d of d + e (exp(d) - 1) = r, for e >= 0, to a relative error of about `tolerance`.
//
// The left side rises and is convex, and all its derivatives are known once exp(d) is. So a step
// inverts its whole series around d rather than its tangent. From d = 0, which takes no
// exponential, one or two such steps are enough, where the root is within reach of the series.
//
// Elsewhere Halley's steps lead there from an upper bound: where the exponential's series up to the
// square is r, or, if that is nearer, where the exponential's part alone is r. (Where r is far
// below 0: where the exponential's part is linear, or -e.)
struct LineAndExponential {
  double e;
  double flat;   // 1 / (1 + e), the inverse of the slope at 0
  double share;  // e / (1 + e), of the exponential in the slope

  static LineAndExponential of(double e) { return {e, 1 / (1 + e), e / (1 + e)}; }

  double root(double r, double tolerance = 1e-15) const {
    double d = 0;
    if (const double t = r * flat; magnitude(t) < 0.5 + 0.8 * flat) {
      d = inverse_series(t, share);
      if (is_exact(t, share, d, tolerance)) return d;
    } else {
      d = upper_bound(r);
    }
    for (int i = 0; i < 100; ++i) {
      const double grown = e * expm1_of(d), curvature = e + grown, inverse = 1 / (1 + curvature);
      const double t = (r - d - grown) * inverse, part = curvature * inverse;
      d += magnitude(t) < 0.5 ? inverse_series(t, part) : t / (1 + 0.5 * t * part);
      if (is_exact(t, part, d, tolerance)) break;
    }
    return d;
  }

 private:
  static double magnitude(double x) { return x < 0 ? -x : x; }

  // The first term that the inverse series leaves out is less than this. True for NaN.
  static bool is_exact(double t, double share, double d, double tolerance) {
    const double t2 = t * t;
    return !(share * (t2 * t2 * t2) > tolerance * magnitude(d));
  }

  double upper_bound(double r) const {
    const double line = 1 + e;
    double d = r / line < r + e ? r / line : r + e;
    if (r > -0.25 * line) d = 2 * r / (line + square_root(line * line + 2 * e * r));
    if (d > 1 && 1 + r / e < 1e300) {
      const double bound = log_of(1 + r / e);
      const double slope = line + r, curvature = e + r, value = bound;
      if (bound < d) d = bound - value * slope / (slope * slope - 0.5 * value * curvature);
    }
    return d;
  }
};

// 1 / (1 + e^m) = f has f' = f^2 - f, and so the coefficients
//
//     (n + 1) c_{n+1} = c_0 c_n + c_1 c_{n-1} + ... + c_n c_0 - c_n
inline const TaylorTable<64> logistic_table([](double m, double* c) {
  c[0] = 1 / (1 + exp_of(m));
  for (int n = 0; n + 1 < kTaylorTerms; ++n) {
    double product = 0;
    for (int i = 0; i <= n; ++i) product += c[i] * c[n - i];
    c[n + 1] = (product - c[n]) / (n + 1);
  }
});

// 1 / (1 + e^m), for every m.
[[gnu::always_inline]] inline double logistic_of_minus(double m) {
  if (logistic_table.reaches(m)) [[likely]]
    return logistic_table(m);
  return 1 / (1 + exp_of(m));
}

// e^x, near enough to 0.
inline const TaylorTable<32> exponential_table([](double x, double* c) {
  c[0] = exp_of(x);
  for (int n = 0; n + 1 < kTaylorTerms; ++n) c[n + 1] = c[n] / (n + 1);
});

// The root u of u + e^u = x, Wright's omega function's logarithm. With v = e^u,
//
//     u' = 1 / (1 + v), v' = v u'
//
// so that the coefficients of both series follow from each other.
inline const TaylorTable<32> margin_table([](double x, double* u) {
  u[0] = LineAndExponential::of(1).root(x - 1);
  double v[kTaylorTerms] = {exp_of(u[0])};
  for (int n = 0; n + 1 < kTaylorTerms; ++n) {
    double rest = n == 0 ? 1 : 0;
    for (int i = 0; i < n; ++i) rest -= (i + 1) * u[i + 1] * v[n - i];
    u[n + 1] = rest / ((n + 1) * (1 + v[0]));
    double product = 0;
    for (int i = 0; i <= n; ++i) product += v[i] * (n - i + 1) * u[n - i + 1];
    v[n + 1] = product / (n + 1);
  }
});

struct Squared {
  static double derivative(double p, double y) { return p - y; }

  // The distance to the label shrinks by e^(-h q).
  static double integral(double p, double y, double h, double q, double /*tolerance*/ = 0) {
    return (p - y) * (-expm1_of(-h * q) / q);
  }
};

struct Logistic {
  static double derivative(double p, double y) { return -y * logistic_of_minus(y * p); }

  // The margin m = y p grows by d with m + d + e^(m + d) = m + e^m + h q: the paper has the same by
  // Lambert's function, which overflows, and loses the digits of a small d.
  static double integral(double p, double y, double h, double q, double tolerance = 1e-15) {
    return -y * growth(y * p, h * q, tolerance) / q;
  }

 private:
  static double growth(double margin, double length, double tolerance) {
    if (margin < 0 && length > 700)  // e^d would overflow; the new margin is positive or close
      return LineAndExponential::of(1).root((margin + length) + expm1_of(margin), tolerance) -
             margin;
    const double flat = logistic_of_minus(margin);
    // The difference of the margins has enough digits where it is not a small one.
    if (tolerance > 1e-12 && length * flat > 0.03 && exponential_table.reaches(margin)) {
      const double x = (margin + length) + exponential_table(margin);
      if (margin_table.reaches(x)) return margin_table(x) - margin;
    }
    const double e = exp_of(margin < 700 ? margin : 700);
    return LineAndExponential{e, flat, logistic_of_minus(-margin)}.root(length, tolerance);
  }
};

struct Hinge {
  static double derivative(double p, double y) { return y * p < 1 ? -y : 0; }

  static double integral(double p, double y, double h, double q, double /*tolerance*/ = 0) {
    const double missing = 1 - y * p;
    if (missing <= 0) return 0;
    return -y * (h * q < missing ? h : missing / q);
  }
};

}  // namespace fusestep::linear
