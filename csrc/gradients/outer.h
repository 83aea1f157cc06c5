// The gradient of a linear layer's weight, as what it is made of: what went into the layer, and
// what came back for its outputs,
//
//     g[r, c] = sum_k coefficient_k error[k, r] x[k, c]
//
// where the terms k and their coefficients are those of samples (gradients/samples.h).
#pragma once

#include <cstdint>

#include "core/flat_array.h"

namespace fusestep::gradients {

struct Outer {
  FlatArray error, x;  // of shape [terms, rows] and [terms, columns]
  std::int64_t rows = 0, columns = 0;
};

}  // namespace fusestep::gradients
