// Parts of parameters, for step.cpp: apart from it, because g++ inlines less in a large file, and a
// step of rows takes a quarter longer then.
#pragma once

#include <cstdint>

#include "core/work.h"
#include "cpu/kernels.h"

namespace fusestep::cpu {

// Moves tiles [first, last) of a part.
void update_part(const KernelTable& kernels, const Work& work, const StepOptions& options,
                 std::int64_t first, std::int64_t last);

// For each of tiles [first, last): the sum of the squares of what moves in it.
void sum_moved_squares(const KernelTable& kernels, const Work& work, std::int64_t first,
                       std::int64_t last, double prescale, double* sums);

}  // namespace fusestep::cpu
