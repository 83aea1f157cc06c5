// A dense gradient: one value for every element of the parameter, already in memory.
//
// The prologue of a step is folded into one factor:
//
//     factor = grad_scale x min(1, max_norm / norm) x (-1 where the objective is maximised)
#pragma once

#include <cstdint>

#include "core/annotations.h"

namespace fusestep::gradients {

template <class T>
struct Dense {
  const T* values;
  T factor;

  FUSESTEP_HOST_DEVICE T operator()(std::int64_t i) const { return factor * values[i]; }
};

}  // namespace fusestep::gradients
