// A step over a list of parameters, on this machine's threads: one parallel region for all of them.
#pragma once

#include <cstdint>
#include <span>

#include "core/dtypes.h"
#include "core/layout.h"
#include "cpu/thread_pool.h"
#include "rules/registry.h"

namespace fusestep::cpu {

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

// Moves every parameter and its state. The calling thread runs the errand (which may be empty, and
// must not throw) before it takes part; where there are several threads the others begin without
// it.
void update(WorkList list, const StepOptions& options, const Errand& errand = {});

// Wakes the threads that a step over so many elements will use, if it is to begin soon.
void announce(std::int64_t elements);

struct GradientNorm {
  double value;  // the L2 norm of all gradients together
  bool finite;   // no gradient holds a NaN or an infinity
};

GradientNorm gradient_norm(WorkList list);

void clear_gradients(WorkList list);

}  // namespace fusestep::cpu
