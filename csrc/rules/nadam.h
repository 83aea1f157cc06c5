// NAdam: Adam with Nesterov momentum.
//
// Dozat (2016), "Incorporating Nesterov momentum into Adam", Algorithm 2, with the momentum
// schedule of torch.optim.NAdam (Sutskever et al. 2013, section 2.1):
//
//     mu_t = beta1 (1 - 0.96^(t psi) / 2)            psi = momentum_decay
//     m, v   as in Adam
//     w <- w - lr ((1 - mu_t) / (1 - prod_{i<=t} mu_i) g
//                  + mu_{t+1} / (1 - prod_{i<=t+1} mu_i) m) / (sqrt(v / (1 - beta2^t)) + eps)
//
// As in Adam, sqrt(1 - beta2^t) is moved out of the loop.
#pragma once

#include "core/power.h"
#include "rules/adam.h"
#include "rules/idle_moments.h"
#include "rules/rule.h"
#include "rules/weight_decay.h"

namespace fusestep::rules {

struct NAdamOptions {
  double lr = 2e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  double momentum_decay = 4e-3;
  bool decoupled_weight_decay = false;

  static constexpr auto fields() {
    return std::tuple{Field{"lr", &NAdamOptions::lr},
                      Field{"beta1", &NAdamOptions::beta1},
                      Field{"beta2", &NAdamOptions::beta2},
                      Field{"eps", &NAdamOptions::eps},
                      Field{"weight_decay", &NAdamOptions::weight_decay},
                      Field{"momentum_decay", &NAdamOptions::momentum_decay},
                      Field{"decoupled_weight_decay", &NAdamOptions::decoupled_weight_decay}};
  }
};

template <class T>
struct NAdam {
  using Options = NAdamOptions;
  WeightDecay<T> decay;
  Moments<T> moments;
  T gradient_weight, momentum_weight, scaled_eps;

  FUSESTEP_HOST_DEVICE NAdam(const Options& o, const Progress& at)
      : decay(WeightDecay<T>::of(o.weight_decay, o.decoupled_weight_decay, o.lr)),
        moments(o.beta1, o.beta2) {
    const double mu = momentum(o, at.step);
    const double next_mu = momentum(o, at.step + 1);
    const double correction2 = square_root(1 - power(o.beta2, at.step));
    const double lr = o.lr * correction2;
    gradient_weight = static_cast<T>(lr * (1 - mu) / (1 - at.momentum_product));
    momentum_weight = static_cast<T>(lr * next_mu / (1 - at.momentum_product * next_mu));
    scaled_eps = static_cast<T>(o.eps * correction2);
  }

  FUSESTEP_HOST_DEVICE void operator()(T& w, T g, T& m, T& v) const {
    g = decay(w, g);
    moments(g, m, v);
    w -= (gradient_weight * g + momentum_weight * m) / (square_root(v) + scaled_eps);
  }

  FUSESTEP_HOST_DEVICE bool is_usual() const { return !decay.is_coupled() && moments.are_long(); }

  FUSESTEP_HOST_DEVICE static double momentum(const Options& o, std::int64_t step) {
    constexpr double kLog096 = -0.040821994520255166;  // ln 0.96
    return o.beta1 *
           (1 - 0.5 * exponential(static_cast<double>(step) * o.momentum_decay * kLog096));
  }

  using Idle = IdleMoments;
  static Idle idle(const Options& o, const Progress& at) {
    const NAdam<double> step(o, at);
    return Idle::of(step, step.momentum_weight, false);
  }

  static std::vector<std::string_view> state_names(const Options&) {
    return {"exp_avg", "exp_avg_sq"};
  }
  static std::vector<std::string_view> scalar_names() { return {"step", "mu_product"}; }
  static double initial_state(const Options&) { return 0; }
  FUSESTEP_HOST_DEVICE static constexpr bool is_signed(std::size_t state) { return state == 0; }
  FUSESTEP_HOST_DEVICE static Progress advance(const Options& o, Progress progress) {
    progress = next_step(progress);
    progress.momentum_product *= momentum(o, progress.step);
    return progress;
  }
};

}  // namespace fusestep::rules
