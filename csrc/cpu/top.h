// The largest elements of a parameter's gradient, or of the update that it would make.
#pragma once

#include "core/work.h"
#include "selections/selection.h"

namespace fusestep::cpu {

// Selects as many of the elements of `work`, which moves a part, as its choice asks for. NaN is
// larger than any number; of equal elements the first ones are selected.
selections::Selection find_top(const Work& work, const StepOptions& options);

}  // namespace fusestep::cpu
