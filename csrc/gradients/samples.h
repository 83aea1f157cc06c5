// A gradient for each of several samples, which a step adds up as it goes:
//
//     g = (sum_i weight_i clip_i v_i + noise) / divisor
//
// With max_norm C, clip_i = min(1, C / |v_i|) bounds what one sample may say, where |v_i| is the
// norm of its gradients of all parameters together; and the noise, of standard deviation
// noise_multiplier C, hides whether it was there at all. That is the step of DP-SGD (Abadi et al.
// 2016, "Deep learning with differential privacy", algorithm 1).
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/gradient_norm.h"
#include "core/random.h"
#include "gradients/sum_of_samples.h"

namespace fusestep::gradients {

struct Samples {
  std::vector<double> weight;  // 0: that sample is not there
  std::optional<double> max_norm;
  double noise_multiplier = 0;
  double divisor = 1;
  std::int64_t positions = 1;  // the gradient of a sample is the sum of so many rows of values

  std::vector<std::int64_t> present;  // samples that are there

  // Found when the step is known: which rows are added up, and times what; and the noise.
  std::vector<std::int64_t> row;
  std::vector<double> coefficient;
  Noise noise;

  std::int64_t count() const { return static_cast<std::int64_t>(weight.size()); }
  bool has_noise() const { return noise_multiplier > 0; }

  // Nothing is there that could move anything, or age it.
  bool is_nothing() const { return present.empty() && !has_noise(); }

  void find_present() {
    present.clear();
    for (std::int64_t i = 0; i < count(); ++i)
      if (weight[static_cast<std::size_t>(i)] != 0) present.push_back(i);
  }

  // The gradients are going to be multiplied by `grad_scale`, which counts for their norms, and not
  // for the noise. `norms` are those of all samples, if they are asked for.
  void plan(const std::vector<double>& norms, double grad_scale, const RandomStream& random) {
    row.clear();
    coefficient.clear();
    for (const std::int64_t number : present) {
      const auto sample = static_cast<std::size_t>(number);
      const double clip =
          max_norm ? clip_factor(*max_norm, norms[sample] * std::abs(grad_scale)) : 1;
      for (std::int64_t i = 0; i < positions; ++i) {
        row.push_back(number * positions + i);
        coefficient.push_back(weight[sample] * clip / divisor);
      }
    }
    noise = {random, 0};
    if (has_noise())
      noise.deviation = noise_multiplier * *max_norm / divisor / std::abs(grad_scale);
  }
};

}  // namespace fusestep::gradients
