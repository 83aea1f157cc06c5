// A step over a list of parameters, on this machine's threads: one parallel region for all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "core/gradient_norm.h"
#include "core/work.h"
#include "cpu/thread_pool.h"

namespace fusestep::cpu {

// Moves every parameter and its state. The calling thread runs the errand (which may be empty, and
// must not throw) before it takes part; where there are several threads the others begin without
// it.
void update(WorkList list, const StepOptions& options, const Errand& errand = {});

// Wakes the threads that a step over so many elements will use, if it is to begin soon.
void announce(std::int64_t elements);

GradientNorm gradient_norm(WorkList list);

// The sums of the squares of the prescaled gradients, one for each tile of the list.
std::vector<double> tile_sums(WorkList list, double prescale);

// Counts an update of what the list has moved: parts whose blocks are not counted by tile.
void count_updates(WorkList list);

void clear_gradients(WorkList list);

// Those of which a step moves less than they have; update() clears the others as it goes.
void clear_whole_gradients(WorkList list);

}  // namespace fusestep::cpu
