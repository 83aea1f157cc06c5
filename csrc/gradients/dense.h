// A dense gradient: one value for every element of the parameter, already in memory.
//
// The prologue of a step is folded into one factor:
//
//     factor = grad_scale x min(1, max_norm / norm) x (-1 where the objective is maximised)
//
// and, after it, one bound: clip_value.
#pragma once

#include <cstdint>
#include <limits>

#include "core/annotations.h"

namespace fusestep::gradients {

template <class T>
struct Dense {
  const T* values;
  T factor;

  FUSESTEP_HOST_DEVICE T operator()(std::int64_t i) const { return factor * values[i]; }
};

// Each value brought to within the bound, as by torch.nn.utils.clip_grad_value_; NaN stays.
template <class T>
struct Bounded : Dense<T> {
  T bound = std::numeric_limits<T>::infinity();

  FUSESTEP_HOST_DEVICE T operator()(std::int64_t i) const {
    const T g = Dense<T>::operator()(i);
    const T below = bound < g ? bound : g;
    return below < -bound ? -bound : below;
  }
};

}  // namespace fusestep::gradients
