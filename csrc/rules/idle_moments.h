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
// W, the mean X and the variance V of the X_s. What that leaves out is of the order of
// (sqrt(V) / (x + X))^3, and `suits` asks that it be below 1e-8. (AMSGrad divides by a v that does
// not fade: there X_s = e_s, and W_s has beta1^s.)
#pragma once

#include "core/annotations.h"
#include "core/floating.h"
#include "rules/idle.h"

namespace fusestep::rules {

struct IdleMoments {
  double shrink = 0;                         // of the weight
  double momentum = 1, square = 1;           // what m and v are multiplied by
  double reach = 1;                          // ... what W_s of a later step is
  double widening = 1;                       // ... and its X_s
  double weight = 0, first = 0, second = 0;  // sums of W_s, W_s X_s, W_s X_s^2
  bool is_closed = true;

  // One step of a rule, given in double.
  template <class Rule>
  FUSESTEP_HOST_DEVICE static IdleMoments of(const Rule& rule, double step_size, bool amsgrad) {
    IdleMoments idle;
    idle.shrink = rule.decay.shrink;
    idle.momentum = rule.moments.first.beta;
    idle.square = rule.moments.second.beta;
    idle.widening = amsgrad ? 1 : 1 / square_root(idle.square);
    idle.reach = idle.momentum * idle.widening;
    const double x = rule.scaled_eps * idle.widening;
    idle.weight = step_size * idle.reach;
    idle.first = idle.weight * x;
    idle.second = idle.first * x;
    idle.is_closed = rule.decay.coupled == 0;
    return idle;
  }

  FUSESTEP_HOST_DEVICE IdleMoments then(const IdleMoments& later) const {
    IdleMoments both;
    const double kept = 1 - later.shrink;
    both.shrink = joined_shares(shrink, later.shrink);
    both.momentum = momentum * later.momentum;
    both.square = square * later.square;
    both.reach = reach * later.reach;
    both.widening = widening * later.widening;
    both.weight = kept * weight + reach * later.weight;
    both.first = kept * first + reach * widening * later.first;
    both.second = kept * second + reach * widening * widening * later.second;
    both.is_closed = is_closed && later.is_closed;
    return both;
  }

  template <class T>
  struct Move {
    T shrink, momentum, square, weight, mean, correction, least;

    FUSESTEP_HOST_DEVICE explicit Move(const IdleMoments& idle)
        : shrink(static_cast<T>(idle.shrink)),
          momentum(static_cast<T>(idle.momentum)),
          square(static_cast<T>(idle.square)),
          weight(static_cast<T>(idle.weight)) {
      constexpr double kLeastRatio = 500;  // of x + X to the deviation of X: 500^-3 = 0.8e-8
      const double share = idle.weight > 0 ? 1 / idle.weight : 0;
      const double mean_x = idle.first * share;
      const double variance = idle.second * share - mean_x * mean_x;
      const double positive = variance < 0 ? 0 : variance;  // NaN stays: nothing suits it
      mean = static_cast<T>(mean_x);
      correction = static_cast<T>(idle.weight * positive);
      least = static_cast<T>(kLeastRatio * kLeastRatio * positive);
    }

    FUSESTEP_HOST_DEVICE bool suits(T, T m, T v) const {
      const T x = square_root(v) + mean;
      return (m == T{0}) | (x * x >= least);
    }
    FUSESTEP_HOST_DEVICE bool suits(T w, T m, T, T v_max) const { return suits(w, m, v_max); }

    FUSESTEP_HOST_DEVICE void operator()(T& w, T& m, T& v) const {
      move(w, m, v);
      v *= square;
    }
    FUSESTEP_HOST_DEVICE void operator()(T& w, T& m, T& v, T& v_max) const {
      move(w, m, v_max);
      v *= square;
    }

   private:
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
