// Adam, AdamW and AMSGrad.
//
// Kingma & Ba (2015), "Adam: a method for stochastic optimization", Algorithm 1:
//
//     m <- beta1 m + (1 - beta1) g
//     v <- beta2 v + (1 - beta2) g^2
//     w <- w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//
// with both bias corrections moved out of the loop, as the end of the paper's section 2 suggests:
//
//     w <- w - step_size m / (sqrt(v) + scaled_eps)
//     step_size = lr sqrt(1 - beta2^t) / (1 - beta1^t),   scaled_eps = eps sqrt(1 - beta2^t)
//
// AdamW: Loshchilov & Hutter (2019), Algorithm 2 (decoupled weight decay).
// AMSGrad: Reddi, Kale & Kumar (2018), Algorithm 2: the largest v so far in place of v.
#pragma once

#include "core/power.h"
#include "rules/idle_moments.h"
#include "rules/moving_average.h"
#include "rules/rule.h"
#include "rules/weight_decay.h"

namespace fusestep::rules {

struct AdamOptions {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  bool amsgrad = false;
  bool decoupled_weight_decay = false;

  static constexpr auto fields() {
    return std::tuple{Field{"lr", &AdamOptions::lr},
                      Field{"beta1", &AdamOptions::beta1},
                      Field{"beta2", &AdamOptions::beta2},
                      Field{"eps", &AdamOptions::eps},
                      Field{"weight_decay", &AdamOptions::weight_decay},
                      Field{"amsgrad", &AdamOptions::amsgrad},
                      Field{"decoupled_weight_decay", &AdamOptions::decoupled_weight_decay}};
  }
};

// The moving averages of g and g^2 that Adam and NAdam share.
template <class T>
struct Moments {
  MovingAverage<T> first, second;

  FUSESTEP_HOST_DEVICE Moments(double beta1, double beta2) : first(beta1), second(beta2) {}

  FUSESTEP_HOST_DEVICE bool are_long() const { return first.is_long() && second.is_long(); }

  FUSESTEP_HOST_DEVICE void operator()(T g, T& m, T& v) const {
    average(g, m);
    average_square(g, v);
  }

  FUSESTEP_HOST_DEVICE void average(T g, T& m) const { m = first.of(m, g); }

  FUSESTEP_HOST_DEVICE void average_square(T g, T& v) const {
    // ((1 - beta2) g) g, because g^2 would overflow earlier; a v that has overflowed stays infinite
    // (and its weight still), where inf - inf would make it NaN.
    const T moved = second(v, (second.one_minus_beta * g) * g);
    v = v <= largest(v) ? moved : v;
  }
};

template <class T>
struct Adam {
  using Options = AdamOptions;
  WeightDecay<T> decay;
  Moments<T> moments;
  T step_size, scaled_eps;

  FUSESTEP_HOST_DEVICE Adam(const Options& o, const Progress& at)
      : decay(WeightDecay<T>::of(o.weight_decay, o.decoupled_weight_decay, o.lr)),
        moments(o.beta1, o.beta2) {
    const double correction1 = 1 - power(o.beta1, at.step);
    const double correction2 = square_root(1 - power(o.beta2, at.step));
    step_size = static_cast<T>(o.lr * correction2 / correction1);
    scaled_eps = static_cast<T>(o.eps * correction2);
  }

  FUSESTEP_HOST_DEVICE void operator()(T& w, T g, T& m, T& v) const {
    moments(decay(w, g), m, v);
    w -= conditioned(m, m, v);
  }

  FUSESTEP_HOST_DEVICE void operator()(T& w, T g, T& m, T& v, T& v_max) const {
    moments(decay(w, g), m, v);
    v_max = maximum(v_max, v);
    w -= conditioned(m, m, v_max);
  }

  FUSESTEP_HOST_DEVICE bool is_usual() const { return !decay.is_coupled() && moments.are_long(); }

  // For linear models, too, see rules/rule.h: the moving average passes all of a gradient on.
  FUSESTEP_HOST_DEVICE void observe(T g, T&, T& v) const { moments.average_square(g, v); }
  FUSESTEP_HOST_DEVICE T conditioned(T g, T, T v) const {
    return step_size * (g / (square_root(v) + scaled_eps));
  }
  FUSESTEP_HOST_DEVICE void advance(T& w, T g, T& m, T v) const {
    moments.average(g, m);
    w -= conditioned(m, m, v);
  }

  using Idle = IdleMoments;
  static Idle idle(const Options& o, const Progress& at) {
    const Adam<double> step(o, at);
    return Idle::of(step, step.step_size, o.amsgrad);
  }

  static std::vector<std::string_view> state_names(const Options& o) {
    if (o.amsgrad) return {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
    return {"exp_avg", "exp_avg_sq"};
  }
  static std::vector<std::string_view> scalar_names() { return {"step"}; }
  static double initial_state(const Options&) { return 0; }
  FUSESTEP_HOST_DEVICE static constexpr bool is_signed(std::size_t state) { return state == 0; }
  FUSESTEP_HOST_DEVICE static Progress advance(const Options&, Progress progress) {
    return next_step(progress);
  }
};

}  // namespace fusestep::rules
