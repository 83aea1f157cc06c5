// Idle steps of rules with Adam's moments.
//
// Without a gradient and without coupled decay, step s = 1, 2, ... of a row turns
//
//     m <- beta1 m,   v <- beta2 v,   w <- (1 - shrink_s) w - a_s m / (sqrt(v) + e_s)
//
// where a_s is the step size and e_s the scaled eps. With x = sqrt(v) before the first of them, all
// of them together take from w
//
//     m * sum_s W_s / (x + X_s)      W_s = a_s (beta1 / sqrt(beta2))^s  prod_{r > s} (1 - shrink_r)
//                                    X_s = e_s / sqrt(beta2)^s
//
// The X_s lie close together, so the sum is W / (x + X) (1 + V / (x + X)^2), with the total weight
// W, the mean X and the variance V of the X_s. What that leaves out is at most E|X_s - X|^3 / x^3,
// and E|X_s - X|^3 <= V D where D^2 is the fourth central moment over V. `suits` asks that it be
// below 1e-8: x >= 464 (V D)^(1/3), for which x >= 464 (2 sqrt(V) + D) / 3 is enough. (AMSGrad
// divides by a v that does not fade: there X_s = e_s, and W_s has beta1^s.)
#pragma once

#include "core/annotations.h"
#include "core/floating.h"
#include "rules/idle.h"

namespace fusestep::rules {

struct IdleMoments {
  static constexpr int kPowers = 5;

  double shrink = 0;                // of the weight
  double momentum = 1, square = 1;  // what m and v are multiplied by
  double reach = 1;                 // ... what W_s of a later step is
  double widening = 1;              // ... and its X_s
  double sum[kPowers] = {};         // of W_s X_s^0, W_s X_s^1, ...
  bool is_closed = true;

  // One step of a rule, given in double. Where decay turns weights around, W_s change their sign.
  template <class Rule>
  FUSESTEP_HOST_DEVICE static IdleMoments of(const Rule& rule, double step_size, bool amsgrad) {
    IdleMoments idle;
    idle.shrink = rule.decay.shrink;
    idle.momentum = rule.moments.first.beta;
    idle.square = rule.moments.second.beta;
    idle.widening = amsgrad ? 1 : 1 / square_root(idle.square);
    idle.reach = idle.momentum * idle.widening;
    double term = step_size * idle.reach;
    for (double& one : idle.sum) {
      one = term;
      term *= rule.scaled_eps * idle.widening;
    }
    idle.is_closed = rule.decay.coupled == 0 && idle.shrink <= 1;
    return idle;
  }

  FUSESTEP_HOST_DEVICE IdleMoments then(const IdleMoments& later) const {
    IdleMoments both;
    both.shrink = joined_shares(shrink, later.shrink);
    both.momentum = momentum * later.momentum;
    both.square = square * later.square;
    both.reach = reach * later.reach;
    both.widening = widening * later.widening;
    double factor = reach;
    for (int i = 0; i < kPowers; ++i) {
      both.sum[i] = sum[i] - later.shrink * sum[i] + factor * later.sum[i];
      factor *= widening;
    }
    both.is_closed = is_closed && later.is_closed;
    return both;
  }

  // Of the X_s, about their mean. Without any weight there is nothing to be precise about.
  struct Spread {
    double mean = 0, variance = 0, tail = 0;  // the tail is D
  };
  FUSESTEP_HOST_DEVICE Spread spread() const {
    if (sum[0] == 0) return {};
    const double share = 1 / sum[0];
    const double mean = sum[1] * share;
    const double second = sum[2] * share, third = sum[3] * share, fourth = sum[4] * share;
    const double variance = second - mean * mean;
    const double central = fourth - mean * (4 * third - mean * (6 * second - 3 * mean * mean));
    // Rounding may leave less than nothing of them; NaN stays, and nothing suits it.
    if (variance <= 0) return {mean, 0, 0};
    return {mean, variance, central <= 0 ? 0 : square_root(central / variance)};
  }

  template <class T>
  struct Move {
    T shrink, momentum, square, weight, mean, correction, least;

    FUSESTEP_HOST_DEVICE explicit Move(const IdleMoments& idle)
        : shrink(static_cast<T>(idle.shrink)),
          momentum(static_cast<T>(idle.momentum)),
          square(static_cast<T>(idle.square)),
          weight(static_cast<T>(idle.sum[0])) {
      const Spread x = idle.spread();
      const double precise = 464 * (2 * square_root(x.variance) + x.tail) / 3;
      const double digits = least_divisor(T{});
      mean = static_cast<T>(x.mean);
      correction = static_cast<T>(idle.sum[0] * x.variance);
      least = static_cast<T>(precise < digits ? digits : precise);  // NaN stays, and nothing suits
    }

    FUSESTEP_HOST_DEVICE bool suits(T w, T m, T v) const {
      const bool far_enough = square_root(v) >= least;
      return is_ordinary(w) & is_ordinary(m) & is_ordinary(v) & ((m == T{0}) | far_enough);
    }
    FUSESTEP_HOST_DEVICE bool suits(T w, T m, T v, T v_max) const {
      return suits(w, m, v_max) & is_ordinary(v);
    }

    FUSESTEP_HOST_DEVICE void operator()(T& w, T& m, T& v) const {
      move(w, m, v);
      v *= square;
    }
    FUSESTEP_HOST_DEVICE void operator()(T& w, T& m, T& v, T& v_max) const {
      move(w, m, v_max);
      v *= square;
    }

   private:
    // Numbers below have too few digits, or soon will have.
    FUSESTEP_HOST_DEVICE static double least_divisor(float) { return 0x1p-100; }
    FUSESTEP_HOST_DEVICE static double least_divisor(double) { return 0x1p-960; }

    FUSESTEP_HOST_DEVICE void move(T& w, T& m, T v) const {
      const T per_x = T{1} / (square_root(v) + mean);
      const T moved = (m * per_x) * (weight + (correction * per_x) * per_x);
      const T kept = w - shrink * w;
      w = m != T{0} ? kept - moved : kept;  // without momentum there may be nothing to divide by
      m *= momentum;
    }
  };
};

}  // namespace fusestep::rules
