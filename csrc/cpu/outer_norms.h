// How long samples' gradients are, where each is a sum of outer products: without making one.
#pragma once

#include <vector>

#include "core/dtypes.h"
#include "core/flat_array.h"
#include "gradients/samples.h"

namespace fusestep::cpu {

// One for each sample, 0 for those that are not there. `x` may be null: all ones. Rows of `error`
// have `rows` elements, those of `x` have `columns`.
//
//     |sum_t e_t x_t'|^2 = sum_t sum_u (e_t . e_u) (x_t . x_u)
//
// With several positions it is a little more than that: an upper bound for the sum that a step
// makes in the type it computes in.
std::vector<double> norms_of_outer(const gradients::Samples& samples, DType compute,
                                   const FlatArray& error, std::int64_t rows, const FlatArray* x,
                                   std::int64_t columns);

}  // namespace fusestep::cpu
