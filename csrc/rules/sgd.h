// SGD with momentum, and Nesterov's accelerated gradient.
//
// Sutskever, Martens, Dahl & Hinton (2013), "On the importance of initialization and momentum in
// deep learning", equations 1-2 (momentum) and 3-4 (NAG), in the form of torch.optim.SGD, which
// scales the velocity by the learning rate when it is used rather than when it is stored:
//
//     b <- mu b + (1 - dampening) g                  b_1 = g_1
//     w <- w - lr b                                  momentum
//     w <- w - lr (g + mu b)                         Nesterov
#pragma once

#include "rules/idle.h"
#include "rules/rule.h"
#include "rules/weight_decay.h"

namespace fusestep::rules {

struct SgdOptions {
  double lr = 1e-3;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  bool nesterov = false;

  static constexpr auto fields() {
    return std::tuple{Field{"lr", &SgdOptions::lr}, Field{"momentum", &SgdOptions::momentum},
                      Field{"dampening", &SgdOptions::dampening},
                      Field{"weight_decay", &SgdOptions::weight_decay},
                      Field{"nesterov", &SgdOptions::nesterov}};
  }
};

// Idle steps are linear in the weight and the velocity: w <- (1 - shrink) w + w_from_b b, ...
struct IdleVelocity {
  double shrink = 0, w_from_b = 0, b_from_w = 0, b_from_b = 1;
  bool is_closed = true;

  FUSESTEP_HOST_DEVICE IdleVelocity then(const IdleVelocity& later) const {
    return {joined_shares(shrink, later.shrink) - later.w_from_b * b_from_w,
            w_from_b - later.shrink * w_from_b + later.w_from_b * b_from_b,
            later.b_from_w - later.b_from_w * shrink + later.b_from_b * b_from_w,
            later.b_from_w * w_from_b + later.b_from_b * b_from_b};
  }

  template <class T>
  struct Move {
    T shrink, w_from_b, b_from_w, b_from_b;

    FUSESTEP_HOST_DEVICE explicit Move(const IdleVelocity& idle)
        : shrink(static_cast<T>(idle.shrink)),
          w_from_b(static_cast<T>(idle.w_from_b)),
          b_from_w(static_cast<T>(idle.b_from_w)),
          b_from_b(static_cast<T>(idle.b_from_b)) {}

    FUSESTEP_HOST_DEVICE bool suits(T w) const { return is_ordinary(w); }
    FUSESTEP_HOST_DEVICE bool suits(T w, T b) const { return is_ordinary(w) & is_ordinary(b); }

    FUSESTEP_HOST_DEVICE void operator()(T& w) const { w -= shrink * w; }
    FUSESTEP_HOST_DEVICE void operator()(T& w, T& b) const {
      const T before = w;
      w -= shrink * w - w_from_b * b;
      b = b_from_w * before + b_from_b * b;
    }
  };
};

template <class T>
struct Sgd {
  using Options = SgdOptions;
  WeightDecay<T> decay;
  T lr, momentum, undamped;
  T first, nesterov;  // 1 or 0

  FUSESTEP_HOST_DEVICE Sgd(const Options& o, const Progress& at)
      : decay(WeightDecay<T>::l2(o.weight_decay)),
        lr(static_cast<T>(o.lr)),
        momentum(static_cast<T>(o.momentum)),
        undamped(static_cast<T>(1 - o.dampening)),
        first(at.step == 1 && o.momentum != 0 ? T{1} : T{0}),
        nesterov(o.nesterov ? T{1} : T{0}) {}

  FUSESTEP_HOST_DEVICE void operator()(T& w, T g) const {
    g = decay(w, g);
    w -= conditioned(g);
  }

  FUSESTEP_HOST_DEVICE void operator()(T& w, T g, T& b) const {
    g = decay(w, g);
    advance(w, g, b);
  }

  FUSESTEP_HOST_DEVICE bool is_usual() const { return first == T{0}; }

  // For linear models, see rules/rule.h. What momentum carries on is 1 / (1 - mu) times the
  // gradient.
  FUSESTEP_HOST_DEVICE void observe(T) const {}
  FUSESTEP_HOST_DEVICE void observe(T, T&) const {}
  FUSESTEP_HOST_DEVICE T conditioned(T g) const { return lr * g; }
  FUSESTEP_HOST_DEVICE T conditioned(T g, T) const { return lr / (T{1} - momentum) * g; }
  FUSESTEP_HOST_DEVICE void advance(T& w, T g, T& b) const {
    b = first != T{0} ? g : momentum * b + undamped * g;
    w -= lr * (nesterov != T{0} ? g + momentum * b : b);
  }

  using Idle = IdleVelocity;
  static Idle idle(const Options& o, const Progress& at) {
    const Sgd<double> step(o, at);
    const double lambda = step.decay.coupled;
    if (step.momentum == 0) return {.shrink = step.lr * lambda};
    const double b_from_w = step.first != 0 ? lambda : step.undamped * lambda;
    const double b_from_b = step.first != 0 ? 0 : step.momentum;
    const double direct = step.nesterov != 0 ? lambda : 0;  // of the gradient itself
    const double share = step.nesterov != 0 ? step.momentum : 1;
    return {step.lr * (direct + share * b_from_w), -step.lr * share * b_from_b, b_from_w, b_from_b};
  }

  static std::vector<std::string_view> state_names(const Options& o) {
    if (o.momentum == 0) return {};
    return {"momentum_buffer"};
  }
  static std::vector<std::string_view> scalar_names() { return {}; }
  static double initial_state(const Options&) { return 0; }
  FUSESTEP_HOST_DEVICE static constexpr bool is_signed(std::size_t) { return true; }
  FUSESTEP_HOST_DEVICE static Progress advance(const Options&, Progress progress) {
    return next_step(progress);
  }
};

}  // namespace fusestep::rules
