// Adagrad.
//
// Duchi, Hazan & Singer (2011), "Adaptive subgradient methods for online learning and stochastic
// optimization", the diagonal form of Figure 1, with torch.optim.Adagrad's decay of the rate:
//
//     s <- s + g^2
//     w <- w - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)
#pragma once

#include "rules/idle.h"
#include "rules/rule.h"
#include "rules/weight_decay.h"

namespace fusestep::rules {

struct AdagradOptions {
  double lr = 1e-2;
  double lr_decay = 0;
  double weight_decay = 0;
  double initial_accumulator_value = 0;
  double eps = 1e-10;

  static constexpr auto fields() {
    return std::tuple{
        Field{"lr", &AdagradOptions::lr}, Field{"lr_decay", &AdagradOptions::lr_decay},
        Field{"weight_decay", &AdagradOptions::weight_decay},
        Field{"initial_accumulator_value", &AdagradOptions::initial_accumulator_value},
        Field{"eps", &AdagradOptions::eps}};
  }
};

template <class T>
struct Adagrad {
  using Options = AdagradOptions;
  WeightDecay<T> decay;
  T lr, eps;

  FUSESTEP_HOST_DEVICE Adagrad(const Options& o, const Progress& at)
      : decay(WeightDecay<T>::l2(o.weight_decay)),
        lr(static_cast<T>(o.lr / (1 + static_cast<double>(at.step - 1) * o.lr_decay))),
        eps(static_cast<T>(o.eps)) {}

  FUSESTEP_HOST_DEVICE void operator()(T& w, T g, T& sum) const {
    g = decay(w, g);
    observe(g, sum);
    w -= conditioned(g, sum);
  }

  // For linear models, too, see rules/rule.h.
  FUSESTEP_HOST_DEVICE void observe(T g, T& sum) const { sum += g * g; }
  FUSESTEP_HOST_DEVICE T conditioned(T g, T sum) const {
    return lr * (g / (square_root(sum) + eps));
  }

  using Idle = IdleAtRest;
  static Idle idle(const Options& o, const Progress&) { return {o.weight_decay == 0}; }

  static std::vector<std::string_view> state_names(const Options&) { return {"sum"}; }
  static std::vector<std::string_view> scalar_names() { return {"step"}; }
  static double initial_state(const Options& o) { return o.initial_accumulator_value; }
  FUSESTEP_HOST_DEVICE static constexpr bool is_signed(std::size_t) { return false; }
  FUSESTEP_HOST_DEVICE static Progress advance(const Options&, Progress progress) {
    return next_step(progress);
  }
};

}  // namespace fusestep::rules
