// In which order the gradients of samples are added up, and what noise is added to them: the same
// on every device.
//
// The sum begins with -0, to which x adds x. Samples are added to it one after another, each times
// its coefficient; then the noise.
#pragma once

#include <cstdint>

#include "core/annotations.h"
#include "core/normal.h"
#include "core/random.h"

namespace fusestep::gradients {

inline constexpr int kSamplesAtOnce = 4;  // whose values are asked for before they are added

template <class T>
inline constexpr T kNoSamples = T{-0.0};

template <class T>
FUSESTEP_HOST_DEVICE T plus_four(T sum, T a, T b, T c, T d) {
  return (((sum + a) + b) + c) + d;
}

// Noise for a parameter's elements, numbered in C order.
struct Noise {
  RandomStream random{};
  double deviation = 0;

  FUSESTEP_HOST_DEVICE double operator()(std::int64_t element) const {
    return deviation * standard_normal(random.bits(static_cast<std::uint64_t>(element)));
  }

  // To elements from `begin` on.
  template <class T>
  void add(std::int64_t begin, std::int64_t count, T* sum) const {
    if (deviation == 0) return;
    for (std::int64_t i = 0; i < count; ++i) sum[i] += static_cast<T>((*this)(begin + i));
  }
};

}  // namespace fusestep::gradients
