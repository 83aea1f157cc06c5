// The sum of samples' gradients as an array, for rules that cannot take it piece by piece.
#pragma once

#include "core/dtypes.h"
#include "selections/part.h"

namespace fusestep::cpu {

// Of all elements of the part, in C order and in the type that a rule computes in.
void add_up_samples(const selections::Part& part, DType compute, std::byte* sums);

}  // namespace fusestep::cpu
