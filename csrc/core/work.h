// What a step has to do, whichever device does it.
#pragma once

#include <span>

#include "core/dtypes.h"
#include "core/layout.h"

namespace fusestep {

namespace rules {
struct Coefficients;
}

// One parameter's share of a step.
struct Work {
  Iteration iteration;
  DType compute;  // the type the rule computes in
  const rules::Coefficients* rule;
  double gradient_factor = 1;  // multiplies the gradient, besides the step's own factor
};

struct StepOptions {
  double gradient_factor = 1;  // multiplies every gradient
  bool clear_gradients = false;
};

using WorkList = std::span<const Work* const>;

}  // namespace fusestep
