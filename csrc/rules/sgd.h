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
    w -= lr * g;
  }

  FUSESTEP_HOST_DEVICE void operator()(T& w, T g, T& b) const {
    g = decay(w, g);
    b = first != T{0} ? g : momentum * b + undamped * g;
    w -= lr * (nesterov != T{0} ? g + momentum * b : b);
  }

  static std::vector<std::string_view> state_names(const Options& o) {
    if (o.momentum == 0) return {};
    return {"momentum_buffer"};
  }
  static std::vector<std::string_view> scalar_names() { return {}; }
  static double initial_state(const Options&) { return 0; }
  FUSESTEP_HOST_DEVICE static Progress advance(const Options&, Progress progress) {
    return next_step(progress);
  }
};

}  // namespace fusestep::rules
