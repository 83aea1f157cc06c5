// Row-wise Adagrad: one accumulator for each row of a table.
//
// Adagrad (Duchi, Hazan & Singer 2011, Figure 1) with the squares of a row's gradients averaged
// over its D elements, as recommenders use it for embeddings, where a whole second table would not
// fit (Mudigere et al. 2022, "Software-hardware co-design for fast and scalable training of deep
// learning recommendation models", section 4.1.4; Gupta et al. 2014 have the idea):
//
//     s_r <- s_r + sum_d g_rd^2 / D
//     w_r <- w_r - lr g_r / (sqrt(s_r) + eps)
//
// A row-wise rule moves one element like any other once it knows its row: `of_row` takes the mean
// of `square` over the row, updates the accumulator, and returns the rule for that row.
#pragma once

#include "rules/idle.h"
#include "rules/rule.h"
#include "rules/weight_decay.h"

namespace fusestep::rules {

struct RowwiseAdagradOptions {
  double lr = 1e-2;
  double eps = 1e-10;
  double weight_decay = 0;

  static constexpr auto fields() {
    return std::tuple{Field{"lr", &RowwiseAdagradOptions::lr},
                      Field{"eps", &RowwiseAdagradOptions::eps},
                      Field{"weight_decay", &RowwiseAdagradOptions::weight_decay}};
  }
};

template <class T>
struct RowwiseAdagrad {
  static constexpr bool kRowwise = true;
  using Options = RowwiseAdagradOptions;
  WeightDecay<T> decay;
  T lr, eps;
  T rate = 0;  // of one row

  FUSESTEP_HOST_DEVICE RowwiseAdagrad(const Options& o, const Progress&)
      : decay(WeightDecay<T>::l2(o.weight_decay)),
        lr(static_cast<T>(o.lr)),
        eps(static_cast<T>(o.eps)) {}

  FUSESTEP_HOST_DEVICE double square(T w, T g) const {
    const auto decayed = static_cast<double>(decay(w, g));
    return decayed * decayed;
  }

  FUSESTEP_HOST_DEVICE RowwiseAdagrad of_row(double mean_square, T& sum) const {
    RowwiseAdagrad rule = *this;
    sum += static_cast<T>(mean_square);
    rule.rate = lr / (square_root(sum) + eps);
    return rule;
  }

  FUSESTEP_HOST_DEVICE void operator()(T& w, T g) const {
    g = decay(w, g);
    w -= rate * g;
  }

  using Idle = IdleAtRest;
  static Idle idle(const Options& o, const Progress&) { return {o.weight_decay == 0}; }

  static std::vector<std::string_view> state_names(const Options&) { return {"sum"}; }
  static std::vector<std::string_view> scalar_names() { return {"step"}; }
  static double initial_state(const Options&) { return 0; }
  FUSESTEP_HOST_DEVICE static constexpr bool is_signed(std::size_t) { return false; }
  FUSESTEP_HOST_DEVICE static Progress advance(const Options&, Progress progress) {
    return next_step(progress);
  }
};

}  // namespace fusestep::rules
